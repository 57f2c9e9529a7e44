"""Each check of tools/check.py must fail when its fault is planted in a small project, and pass when it is not."""
import json, re, shutil, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import check

def cell(s, kind='code', id='c', out=None):
    c = dict(cell_type=kind, id=id, metadata={}, source=s.splitlines(True))
    if kind=='code': c.update(execution_count=None, outputs=out or [])
    return c

def stream(s): return [dict(output_type='stream', name='stdout', text=s.splitlines(True))]

def nb(*cells):
    for i,c in enumerate(cells): c['id'] = f'c{i}'
    return dict(cells=list(cells), metadata=dict(kernelspec=dict(display_name='python3', language='python', name='python3')), nbformat=4, nbformat_minor=5)

def write(p, n): p.write_text(json.dumps(n, indent=1, sort_keys=True, ensure_ascii=False)+'\n', encoding='utf-8')

PAGE = ['# One', '#| default_exp one', '#| export\nimport numpy as np', '#| export\ndef one(\n    x:int, # a number\n)->int: # the next\n    "Add one"\n    return x+1', 'one(1)']

def page(*more, exp='one', title='One'):
    s = [o.replace('default_exp one', f'default_exp {exp}').replace('One', title) for o in PAGE]
    return nb(cell(f'{s[0]}\n\n> A page', 'markdown'), *[cell(o) for o in s[1:4]], cell(s[4], out=stream('2\n')), *more)

def build(d):
    "A project of two notebooks and one module"
    ini = (ROOT/'settings.ini').read_text().replace('= m3dv', '= mini')
    ini = re.sub(r'(?m)^requirements.*', 'requirements = numpy>=1', ini)
    ini = re.sub(r'(?m)^distributed_requirements.*\n', '', ini)
    (d/'settings.ini').write_text(re.sub(r'(?m)^console_scripts.*\n(    .*\n)*', 'console_scripts = one=mini.one:one\n', ini))
    for f in ('setup.py', 'MANIFEST.in', 'LICENSE'): shutil.copy2(ROOT/f, d/f)
    (d/'nbs').mkdir()
    write(d/'nbs'/'00_one.ipynb', page())
    write(d/'nbs'/'index.ipynb', nb(cell('# mini\n\n> A project', 'markdown'), cell('See [one](00_one.ipynb#one) and `code`.', 'markdown'), cell('1+1', out=stream('2\n'))))
    check.python('from nbdev.doclinks import nbdev_export; nbdev_export()', d)
    assert check.call([sys.executable, str(ROOT/'tools'/'readme.py'), '--root', str(d)], d)[0]==0
    return d

@pytest.fixture(scope='session')
def good(tmp_path_factory): return build(tmp_path_factory.mktemp('mini'))

@pytest.fixture
def proj(good, tmp_path): return Path(shutil.copytree(good, tmp_path/'p'))

@pytest.mark.parametrize('f', check.CHECKS, ids=lambda f: f.__name__)
def test_sound_project(good, f): assert f(good)==[]

def edit(p, f):
    n = json.loads(p.read_text())
    f(n)
    write(p, n)

def one(p): return p/'nbs'/'00_one.ipynb'
def add(*cs): return lambda p: write(one(p), page(*cs))
def md(s): return add(cell(s, 'markdown'))
def out(s): return add(cell('2', out=stream(s)))
def again(p): write(p/'nbs'/'01_two.ipynb', page())

FAULTS = [
    ('export',  'edited module',     lambda p: (p/'mini'/'one.py').open('a').write('\nx = 1\n'), 'differs'),
    ('export',  'stale index',       lambda p: (p/'mini'/'_modidx.py').write_text('d = {}\n'), '_modidx.py'),
    ('export',  'left-over module',  lambda p: (p/'mini'/'old.py').write_text(''), 'not from a notebook'),
    ('export',  'missing module',    lambda p: (p/'mini'/'one.py').unlink(), 'missing'),
    ('clean',   'execution count',   lambda p: edit(one(p), lambda n: n['cells'][1].update(execution_count=3)), 'not clean'),
    ('clean',   'metadata',          lambda p: edit(one(p), lambda n: n['metadata'].update(toc=1)), 'not clean'),
    ('clean',   'broken JSON',       lambda p: one(p).write_text('{'), 'not a notebook'),
    ('clean',   'one id twice',      lambda p: edit(one(p), lambda n: n['cells'][1].update(id='c0')), 'one id'),
    ('clean',   'no id',             lambda p: edit(one(p), lambda n: n['cells'][1].pop('id')), 'has no id'),
    ('names',   'one name twice',    again, 'already written'),
    ('names',   'no such module',    lambda p: write(one(p), page(exp='two')), 'no such module'),
    ('names',   'notebook deleted',  lambda p: one(p).unlink(), 'no notebook names'),
    ('names',   'late export',       add(cell('y = 1\n#| export\nz = 2')), 'not at the top'),
    ('names',   'hidden notebook',   lambda p: write(p/'nbs'/'_x.ipynb', nb(cell('1'))), 'passes over'),
    ('readme',  'edited README',     lambda p: (p/'README.md').open('a').write('more\n'), 'make export'),
    ('readme',  'edited index',      lambda p: edit(p/'nbs'/'index.ipynb', lambda n: n['cells'].pop()), 'make export'),
    ('docs',    'broken signature',  add(cell('#| export\ndef two(x:Nowhere): pass')), 'Nowhere'),
    ('docs',    'mixed imports',     add(cell('import os\nos.sep')), 'share a cell'),
    ('links',   'no file',           md('[a](nowhere.ipynb)'), 'nowhere.ipynb'),
    ('links',   'no heading',        md('[a](index.ipynb#nowhere)'), 'no heading'),
    ('links',   'no picture',        md('<img src="a.png">'), 'a.png'),
    ('outputs', 'home folder',       out("wrote '/home/me/x.csv'"), 'path'),
    ('outputs', 'temporary folder',  out('/tmp/abc/x.npz'), 'path'),
    ('outputs', 'mac folder',        out('File /Users/me/x.py'), 'path'),
    ('outputs', 'progress bar',      add(cell('2', out=[dict(output_type='display_data', metadata={}, data={'text/html':["<progress value='1'>"]})])), 'progress bar'),
    ('outputs', 'tqdm',              out('100%|██████| 3/3'), 'progress bar'),
    ('outputs', 'time',              out('0  0.69  00:03'), 'time'),
    ('outputs', 'error',             add(cell('1/0', out=[dict(output_type='error', ename='E', evalue='e', traceback=[])])), 'stored error'),
    ('outputs', 'large notebook',    md('x'*check.MAX_NB), 'less than'),
    ('outputs', 'large folder',      lambda p: (p/'nbs'/'x.png').write_bytes(bytes(check.MAX_NBS)), 'all together'),
    ('skips',   'skip_exec',         md('- skip_exec: true'), 'skip_exec'),
    ('skips',   'skip_exec, raw',    add(cell('---\nskip_exec: true\n---', 'raw')), 'skip_exec'),
    ('skips',   'eval: false',       add(cell('#| eval: false\n1')), 'eval: false'),
    ('skips',   'flagged export',    add(cell('#| export\n#| slow\nz = 1')), 'not run'),
    ('skips',   'after the export',  add(cell('import nbdev; nbdev.nbdev_export()\nassert False')), 'passes over'),
    ('skips',   'shell command',     add(cell('!false')), 'shell'),
    ('skips',   'notest',            lambda p: (p/'nbs'/'.notest').touch(), 'passes over'),
    ('skips',   'nothing to run',    lambda p: write(p/'nbs'/'02_x.ipynb', nb(cell('#| slow\n1/0'))), 'no cell is run'),
    ('package', 'settings left out', lambda p: (p/'MANIFEST.in').write_text(''), 'missing expected setting'),
    ('package', 'no such command',   lambda p: (p/'mini'/'one.py').write_text(''), 'no function one'),
    ('requirements', 'not named',    lambda p: (p/'mini'/'one.py').open('a').write('\nimport torch.nn'), 'torch: imported by'),
    ('requirements', 'not imported', lambda p: (p/'mini'/'one.py').write_text(''), 'nothing imports it'),
    ('skips',   'other language',    lambda p: edit(one(p), lambda n: n['metadata']['kernelspec'].update(language='R')), 'language'),
]

@pytest.mark.parametrize('name,plant,said', [(f,p,s) for f,_,p,s in FAULTS], ids=[f'{f}: {t}' for f,t,*_ in FAULTS])
def test_planted_fault(proj, name, plant, said):
    plant(proj)
    faults,_ = check.guarded(getattr(check, name), proj)
    assert said in '\n'.join(faults)

def run(p, *cs, limit=60):
    f = p/'nbs'/'05_x.ipynb'
    write(f, nb(*cs))
    return '\n'.join(check.run_notebook(p, f, limit))

def test_notebook_runs(proj): assert run(proj, cell('x = 1'), cell('assert x==1')) == ''
def test_notebook_fails(proj): assert 'the reason' in run(proj, cell('raise ValueError("the reason")'))
def test_notebook_skipped(proj): assert 'skipped' in run(proj, cell('---\nskip_exec: true\n---', 'raw'), cell('1/0'))
def test_notebook_dies(proj): assert 'exit code 3' in run(proj, cell('import os'), cell('os._exit(3)'))
def test_notebook_hangs(proj): assert 'stopped after 3 s' in run(proj, cell('import time'), cell('time.sleep(100)'), limit=3)

def test_tests_fail(tmp_path):
    for s in ('def test(): assert 0', '', 'import pytest\ndef test(): pytest.skip()'):
        (tmp_path/'test_x.py').write_text(s)
        assert check.pytests(tmp_path, tmp_path/'test_x.py')

def test_closing_line(proj, capsys, monkeypatch):
    "The count, the exit code and the file left behind"
    monkeypatch.setattr(check, 'CHECKS', [check.links])
    assert not check.check(proj)
    assert capsys.readouterr().out.splitlines()[-1]=='4 passed, 0 failed'
    write(one(proj), page(cell('open("left.txt", "w").close()'), cell('1/0')))
    assert check.check(proj)
    assert capsys.readouterr().out.splitlines()[-1]=='2 passed, 2 failed'
