"""The checks of checks.py on this project; and each of them finds its fault where one was planted in a small project"""
import re, shutil, subprocess, sys
import nbformat, pytest
from checks import CHECKS, MAX_NB, MAX_NBS, ROOT, Broken, call, python, run_notebook
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output, new_raw_cell
from pathlib import Path

def faults(check, root):
    try: return check(root)
    except Broken as e: return str(e).strip().splitlines()[-40:] or ['ended badly, without a word']

@pytest.mark.parametrize('check', CHECKS, ids=lambda f: f.__name__)
def test_project(check):
    found = faults(check, ROOT)
    if found: pytest.fail('\n'.join([f'{check.__doc__}: {len(found)} faults', *found]), pytrace=False)

# ---------------------------------------------------------------- a small project

def write(p, *cells, **meta):
    for i,c in enumerate(cells): c['id'] = f'c{i}'
    kernel = dict(display_name='python3', language='python', name='python3')
    nbformat.write(new_notebook(cells=list(cells), metadata=dict(kernelspec=kernel, **meta)), p)

def said(s): return [new_output('stream', text=s)]

def page(*more, name='one', first='import numpy as np'):
    "A page that exports one function, and then some more cells"
    f = f'#| export\ndef {name}(\n    x:int, # a number\n)->int: # the next\n    "Add one"\n    return x+1'
    return [new_markdown_cell(f'# {name}\n\n> A page'), new_code_cell(f'#| default_exp {name}'), new_code_cell(f'#| export\n{first}'),
            new_code_cell(f), new_code_cell(f'{name}(1)', outputs=said('2\n')), *more]

@pytest.fixture(scope='session')
def good(tmp_path_factory):
    "A project of three notebooks and two modules"
    d = tmp_path_factory.mktemp('mini')
    ini = (ROOT/'settings.ini').read_text(encoding='utf-8').replace('= m3dv', '= mini')
    ini = re.sub(r'(?m)^(\w*requirements|console_scripts).*\n(    .*\n)*', '', ini)
    (d/'settings.ini').write_text(ini+'requirements = numpy>=1\nconsole_scripts = one=mini.one:one\n', encoding='utf-8')
    for f in ('setup.py', 'MANIFEST.in', 'LICENSE'): shutil.copy2(ROOT/f, d)
    for o in ('nbs', 'tools', 'mini'): (d/o).mkdir()
    write(d/'nbs'/'00_one.ipynb', *page())
    write(d/'nbs'/'01_two.ipynb', *page(name='two', first='from mini.one import one'))
    write(d/'nbs'/'index.ipynb', new_markdown_cell('# mini\n\n> A project'), new_markdown_cell('See [one](00_one.ipynb#one) and `code`.'),
          new_code_cell('1+1', outputs=said('2\n')))
    (d/'.github'/'workflows').mkdir(parents=True)
    (d/'.github'/'workflows'/'test.yaml').write_text(f'- uses: actions/checkout@{"0a"*20} # v4\n')
    (d/'constraints.txt').write_text('numpy==2.0\n')
    (d/'requirements.txt').write_text('numpy==2.0 \\\n    --hash=sha256:00\n')
    (d/'mini'/'all.py').write_text('from mini.one import *\nfrom mini.two import *\n')
    python('from nbdev.doclinks import nbdev_export; nbdev_export()', d)
    subprocess.run([sys.executable, str(ROOT/'tools'/'readme.py'), '--root', str(d)], check=True)
    return d

@pytest.mark.parametrize('check', CHECKS, ids=lambda f: f.__name__)
def test_sound_project(good, check): assert faults(check, good)==[]

# ---------------------------------------------------------------- the faults

def add(*cells): return lambda d: write(d/'nbs'/'00_one.ipynb', *page(*cells))
def code(s): return add(new_code_cell(s))
def out(kind, data=None, **kwargs): return add(new_code_cell('2', outputs=[new_output(kind, data, **kwargs)]))
def prose(s): return add(new_markdown_cell(s))
def prints(s): return out('stream', text=s)
def puts(f, s): return lambda d: (d/f).write_text(s)
def appends(f, s): return lambda d: (d/f).open('a').write(s)
def edits(f, old, new): return lambda d: (d/f).write_text((d/f).read_text().replace(old, new, 1))
def removes(f): return lambda d: (d/f).unlink()

ONE,MODULE = 'nbs/00_one.ipynb','mini/one.py'
NETWORK = '\nimport socket\ntry: socket.create_connection(("127.0.0.1", 9))\nexcept OSError: pass\n'
PLANTED = [
    ('export', 'edited module', appends(MODULE, '\nx = 1\n'), 'differs'),
    ('export', 'left-over module', puts('mini/old.py', ''), 'not from a notebook'),
    ('export', 'missing module', removes(MODULE), 'missing'),
    ('clean', 'execution count', edits(ONE, '"execution_count": null', '"execution_count": 3'), 'not clean'),
    ('clean', 'metadata', lambda d: write(d/ONE, *page(), toc=1), 'not clean'),
    ('clean', 'broken JSON', puts(ONE, '{'), 'not a notebook'),
    ('clean', 'one id twice', edits(ONE, '"id": "c1"', '"id": "c0"'), 'not a notebook'),
    ('clean', 'no id', edits(ONE, '   "id": "c1",\n', ''), 'not a notebook'),
    ('names', 'one name twice', lambda d: write(d/'nbs'/'02_x.ipynb', *page()), 'already written'),
    ('names', 'no such module', lambda d: write(d/ONE, *page(name='three')), 'no such module'),
    ('names', 'notebook deleted', removes(ONE), 'no notebook names'),
    ('names', 'late export', code('y = 1\n#| export\nz = 2'), 'not at the top'),
    ('names', 'hidden notebook', lambda d: write(d/'nbs'/'_x.ipynb', new_code_cell('1')), 'passes over'),
    ('names', 'two modules', code('#| default_exp three'), 'more than one'),
    ('readme', 'edited index', edits('nbs/index.ipynb', 'See', 'Read'), 'make export'),
    ('docs', 'broken signature', code('#| export\ndef two(x:Nowhere): pass'), 'Nowhere'),
    ('docs', 'mixed imports', code('import os\nos.sep'), 'share a cell'),
    ('links', 'no file', prose('[a](nowhere.ipynb)'), 'nowhere.ipynb'),
    ('links', 'no heading', prose('[a](index.ipynb#nowhere)'), 'no heading'),
    ('links', 'no picture', prose('<img src="a.png">'), 'a.png'),
    ('links', 'reference', prose('[a][b]\n\n[b]: nowhere.md'), 'nowhere.md'),
    ('outputs', 'home folder', prints("wrote '/home/me/x.csv'"), 'path'),
    ('outputs', 'tqdm', prints('100%|██████| 3/3'), 'progress bar'),
    ('outputs', 'progress bar', out('display_data', {'text/html':"<progress value='1'>"}), 'progress bar'),
    ('outputs', 'what a bar left', out('display_data', {'text/html':'<style>a {}</style>'}), 'progress bar has left'),
    ('outputs', 'time', prints('0  0.69  00:03'), 'time'),
    ('outputs', 'address', prints('<A at 0x7f5a1c2b3d40>'), 'address'),
    ('outputs', 'error', out('error', ename='E', evalue='e', traceback=[]), 'stored error'),
    ('outputs', 'large notebook', prose('x'*MAX_NB), 'less than'),
    ('outputs', 'large folder', puts('nbs/x.txt', 'x'*MAX_NBS), 'all together'),
    ('skips', 'skip_exec', prose('- skip_exec: true'), 'skip_exec'),
    ('skips', 'eval: false', code('#| eval: false\n1'), 'eval: false'),
    ('skips', 'flagged export', code('#| export\n#| slow\nz = 1'), 'not run'),
    ('skips', 'after the export', code('import nbdev; nbdev.nbdev_export()\nassert False'), 'passes over'),
    ('skips', 'shell command', code('!false'), 'shell'),
    ('skips', 'notest', puts('nbs/.notest', ''), 'passes over'),
    ('skips', 'nothing to run', lambda d: write(d/'nbs'/'02_x.ipynb', new_code_cell('#| slow\n1/0')), 'no cell is run'),
    ('skips', 'other language', edits(ONE, '"language": "python"', '"language": "R"'), 'language'),
    ('package', 'settings left out', puts('MANIFEST.in', ''), 'missing expected setting'),
    ('package', 'no such command', puts(MODULE, ''), 'no function one'),
    ('requirements', 'not named', appends(MODULE, '\nimport torch.nn'), 'torch: imported by'),
    ('requirements', 'not imported', puts(MODULE, ''), 'nothing imports it'),
    ('columns', 'in a notebook', code('x = 1 # '+'x'*133), '141 columns'),
    ('columns', 'in a tool', puts('tools/a.py', '#'*141), '141 columns'),
    ('lint', 'unknown name', puts('tools/a.py', 'x = y\n'), 'F821'),
    ('annotations', 'function', edits(MODULE, 'x:int', 'x'), 'one: no type for x'),
    ('annotations', 'method', appends(MODULE, '\n@patch\ndef f(self:A, *, k=1): pass\n'), 'A.f: no type for k'),
    ('private', 'imported', code('from mini.two import _x'), 'mini.two._x is private'),
    ('private', 'reached for', code('import mini.two as m\nm._x'), 'mini.two._x is private'),
    ('private', 'in a tool', puts('tools/a.py', 'from mini import two\ntwo._x'), 'mini.two._x is private'),
    ('order', 'a later page', code('from mini.two import two'), 'page 01'),
    ('order', 'all pages', code('from mini.all import *'), 'no page'),
    ('supply', 'by tag', edits('.github/workflows/test.yaml', '0a'*20, 'v4'), 'checkout@v4 is not named by a commit'),
    ('supply', 'another release', edits('requirements.txt', '2.0', '2.1'), 'numpy 2.1, but 2.0'),
    ('supply', 'left out', edits('requirements.txt', 'numpy', 'nump'), 'numpy missing'),
    ('supply', 'no hash', edits('requirements.txt', '--hash=sha256:00', '# none'), 'no hash'),
    ('imports', 'broken module', appends(MODULE, '\nimport nowhere_at_all\n'), 'nowhere_at_all'),
    ('imports', 'a name left out', puts('mini/all.py', 'from mini.one import *\n'), 'not the names of mini.two: two'),
    ('imports', 'two of one name', appends('mini/all.py', 'def one(): pass\n'), 'not the names of mini.one: one'),
    ('imports', 'network', appends(MODULE, NETWORK), 'reaches for the network'),
]

@pytest.mark.parametrize('name,plant,want', [(f,p,s) for f,_,p,s in PLANTED], ids=[f'{f}-{t}' for f,t,*_ in PLANTED])
def test_planted_fault(good, tmp_path, name, plant, want):
    d = Path(shutil.copytree(good, tmp_path/'p'))
    plant(d)
    assert want in '\n'.join(faults(next(f for f in CHECKS if f.__name__==name), d))

def test_every_check_has_its_fault(): assert {f.__name__ for f in CHECKS}=={o[0] for o in PLANTED}

# ---------------------------------------------------------------- the two runners

@pytest.mark.parametrize('cells,want', [
    ([new_code_cell('x = 1'), new_code_cell('assert x==1')], ''),
    ([new_code_cell('raise ValueError("the reason")')], 'the reason'),
    ([new_raw_cell('---\nskip_exec: true\n---'), new_code_cell('1/0')], 'skipped'),
    ([new_code_cell('import os'), new_code_cell('os._exit(3)')], 'exit code 3'),
    ([new_code_cell('import time'), new_code_cell('time.sleep(100)')], 'stopped after 4 s'),
    ([new_code_cell('import socket'), new_code_cell('socket.create_connection(("192.0.2.1", 80), 1)')], 'no network in tests')],
    ids=['runs', 'fails', 'is skipped', 'dies', 'hangs', 'reaches out'])
def test_notebook_that(good, tmp_path, cells, want):
    d = Path(shutil.copytree(good, tmp_path/'p'))
    write(d/'nbs'/'05_x.ipynb', *cells)
    found = '\n'.join(run_notebook(d, d/'nbs'/'05_x.ipynb', limit=4 if 'stopped' in want else 60))
    assert want in found if want else not found

FEW = 'import pytest\ndef test_a(): pass\ndef test_b(): {}\n@pytest.mark.slow\ndef test_c(): pass\n'
LEAVES = FEW.format('open("left.txt", "w").close()')

@pytest.mark.parametrize('text,args,want', [
    (FEW.format('pass'), [], '3 passed, 0 failed'),
    (FEW.format('pass'), ['-q', '-m', 'slow'], '2 passed, 0 failed'),
    (FEW.format('assert 0'), ['-q'], '2 passed, 1 failed'),
    (FEW.format('pytest.skip()'), ['-n', '2'], '2 passed, 0 failed, 1 skipped'),
    (LEAVES, [], '2 passed, 1 failed'),
    (LEAVES, ['-q', '-n', '2'], '2 passed, 1 failed'),
    ('import pytest\ndef test(): pytest.skip()', [], '0 passed, 1 failed, 1 skipped'),
    ('import nowhere_at_all', ['-n', '2'], '0 passed, 1 failed'),
    ('', [], '0 passed, 0 failed')],
    ids=['passes', 'slow', 'fails', 'skips', 'leaves a file', 'leaves a file, two processes', 'all skipped', 'broken', 'empty'])
def test_last_line(tmp_path, text, args, want):
    "The count, one of it for what is left behind, and the exit code"
    shutil.copy2(ROOT/'tests'/'conftest.py', tmp_path)
    (tmp_path/'test_x.py').write_text(text)
    rc,said = call([sys.executable, '-m', 'pytest', *args, '--rootdir', str(tmp_path), '-p', 'no:cacheprovider', 'test_x.py'], tmp_path)
    assert said.rstrip('\n').splitlines()[-1]==want
    assert (rc==0)==(', 0 failed' in want and not want.startswith('0 passed'))
