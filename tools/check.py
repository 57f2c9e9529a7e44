"""Check the project and run every notebook: what `make test` does.

Prints a line per check and per notebook as each completes, and `N passed, M failed` last. Exit code 1 if anything failed."""
import argparse, ast, json, os, re, shutil, signal, subprocess, sys, tempfile, time, urllib.parse, zipfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 600 # seconds for one notebook
MAX_NB, MAX_NBS = 250_000, 3_000_000 # bytes: one notebook, all of nbs/

class Broken(Exception):
    "A check cannot be made, or its tool ended badly; the message is what that tool said"

# ---------------------------------------------------------------- reading the project

def settings(root):
    cfg = ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(root/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def lib(root): return settings(root)['lib_path']

def notebooks(root): return sorted(p for p in (root/'nbs').rglob('*.ipynb') if not {'.ipynb_checkpoints', '_proc', '_docs'} & set(p.parts))

def read(p): return json.loads(p.read_text(encoding='utf-8'))

def src(c): return ''.join(c['source'])

def cells(p, kind='code'): return [(i,c) for i,c in enumerate(read(p)['cells']) if c['cell_type']==kind]

def directives(s):
    "The `#|` lines that nbdev obeys: those before the first line of code"
    res = []
    for l in s.splitlines():
        if not l.strip() or l.lstrip().startswith('%%'): continue
        m = re.match(r'\s*#\s*\|\s*(.*)', l)
        if not m: break
        res.append(m[1].strip())
    return res

def modules(root):
    "Names of the modules in the package, less those that nbdev writes for itself"
    d = root/lib(root)
    names = ('.'.join(p.relative_to(d).with_suffix('').parts) for p in d.rglob('*.py'))
    return {n for n in names if n.split('.')[-1] not in ('__init__', '_modidx')}

def copy(root, dest, modules=True):
    "Copy what nbdev needs of `root` to `dest`"
    skip = shutil.ignore_patterns('.*', '__pycache__', '_proc', '_docs', '*.bak')
    for f in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'MANIFEST.in', 'LICENSE'):
        if (root/f).exists(): shutil.copy2(root/f, dest/f)
    shutil.copytree(root/'nbs', dest/'nbs', ignore=skip)
    if modules: shutil.copytree(root/lib(root), dest/lib(root), ignore=skip)
    else:
        (dest/lib(root)).mkdir()
        init = root/lib(root)/'__init__.py'
        if init.exists(): shutil.copy2(init, dest/lib(root))

# ---------------------------------------------------------------- running a tool with a time limit

def call(cmd, cwd, limit=LIMIT, env=None):
    "Run `cmd`; return exit code (None if stopped after `limit` s), output and seconds. Whatever it started ends with it."
    env = {k:v for k,v in {**os.environ, 'OMP_NUM_THREADS':'1', 'MPLBACKEND':'Agg', 'PYTHONPATH':str(cwd), 'M3DV_CACHE':'off', **(env or {})}.items()
           if k not in ('M3DV_DATA', 'M3DV_OUT', 'IN_TEST')}
    start = time.time()
    with tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as f:
        p = subprocess.Popen(cmd, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT, start_new_session=True)
        try: rc = p.wait(limit)
        except subprocess.TimeoutExpired: rc = None
        finally:
            try: os.killpg(p.pid, signal.SIGKILL)
            except ProcessLookupError: pass
            p.wait()
        f.seek(0)
        return rc, f.read(), time.time()-start

def python(code, cwd):
    rc,out,_ = call([sys.executable, '-c', code], cwd)
    if rc!=0: raise Broken(f"stopped after {LIMIT} s\n{out}" if rc is None else out)
    return out

# ---------------------------------------------------------------- the checks: each returns a list of faults

def export(root):
    "package equals export"
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        copy(root, d, modules=False)
        python('from nbdev.doclinks import nbdev_export; nbdev_export()', d)
        a,b = ({str(p.relative_to(o)):p.read_bytes() for p in [*(o/lib(root)).rglob('*.py'), *o.glob('pyproject.toml')]} for o in (root,d))
    how = {True:'not from a notebook', False:'missing', None:'differs from its notebook'}
    return [f"{f}: {how[None if f in a and f in b else f in a]}; run `make export`" for f in sorted(a|b) if a.get(f)!=b.get(f)]

def malformed(p):
    "What of the notebook format `p` does not keep to, '' if nothing; importing nbformat's own check takes longer than all the rest"
    try: nb = read(p)
    except ValueError as e: return str(e)
    if not isinstance(nb, dict) or nb.get('nbformat')!=4 or not isinstance(nb.get('cells'), list): return 'not of format 4'
    for i,c in enumerate(nb['cells']):
        need = {'cell_type', 'id', 'metadata', 'source'} | ({'execution_count', 'outputs'} if c.get('cell_type')=='code' else set())
        if need-set(c): return f"cell {i} has no {', '.join(sorted(need-set(c)))}"
    ids = [c['id'] for c in nb['cells']]
    return '' if len(set(ids))==len(ids) else 'two cells have one id'

def clean(root):
    "notebooks clean"
    res = []
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        for p in notebooks(root):
            fault = malformed(p)
            if fault: res.append(f"{p.relative_to(root)}: not a notebook: {fault}")
        copy(root, d)
        python('from nbdev.clean import nbdev_clean; nbdev_clean()', d)
        res += [f"{p.relative_to(root)}: not clean; run `make export`" for p in notebooks(root) if p.read_bytes()!=(d/p.relative_to(root)).read_bytes()]
    return res

def names(root):
    "one notebook per module"
    res,seen = [],{}
    for p in notebooks(root):
        rel = p.relative_to(root)
        if p.name[0] in '_.': res.append(f"{rel}: nbdev passes over names that begin with {p.name[0]}")
        exps = [o.split()[1] for _,c in cells(p) for o in directives(src(c)) if o.split()[:1]==['default_exp'] and len(o.split())>1]
        if len(exps)>1: res.append(f"{rel}: more than one default_exp: {', '.join(exps)}")
        for e in exps:
            if e in seen: res.append(f"{rel}: module {e} is already written by {seen[e]}")
            seen[e] = rel
        for i,c in cells(p):
            live = [o.split()[0] for o in directives(src(c)) if o.split()]
            said = re.findall(r'^\s*#\s*\|\s*(exporti|exports|export|default_exp)\b', src(c), flags=re.M)
            if any(o not in live for o in said): res.append(f"{rel} cell {i}: `#| {said[0]}` is not at the top of its cell, so nbdev ignores it")
            if not exps and 'default_exp' not in said and said: res.append(f"{rel} cell {i}: exports without a default_exp")
    mods = modules(root)
    res += [f"{e}: named by {seen[e]}, but there is no such module" for e in sorted(set(seen)-mods)]
    return res + [f"{m}: a module that no notebook names" for m in sorted(mods-set(seen))]

def readme(root):
    "README.md from index.ipynb"
    rc,out,_ = call([sys.executable, str(ROOT/'tools'/'readme.py'), '--check', '--root', str(root)], root)
    return [] if rc==0 else out.strip().splitlines()[-12:] or [f'tools/readme.py ended with {rc}']

def docs(root):
    "docs pass"
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        copy(root, d)
        out = python("from nbdev.serve import proc_nbs; proc_nbs('nbs', n_workers=0)", d)
        res = [f"{p.relative_to(root)}: not processed" for p in notebooks(root) if not (d/'_proc'/p.relative_to(root/'nbs')).exists()]
        for p in (d/'_proc').rglob('*.ipynb'):
            for i,c in cells(p):
                for o in c['outputs']:
                    if o['output_type']=='error': res.append(f"{p.relative_to(d/'_proc')}: cell {i}: {o['ename']}: {o['evalue']}")
    mixed = re.findall(r'Found cells containing imports and other code.*?\n---\n(.*?)\n---', out, flags=re.S)
    return res + [f"imports share a cell with other code: {m.strip().splitlines()[0]} …" for m in mixed]

def slugs(root, p):
    "Anchors of a page: its headings, as GitHub and Quarto write them, and the symbols that its notebook exports"
    text = p.read_text(encoding='utf-8') if p.suffix=='.md' else '\n\n'.join(src(c) for _,c in cells(p, 'markdown'))
    heads = [re.sub(r'[`*]', '', h).strip().lower() for h in re.findall(r'^#+\s+(.*)$', text, flags=re.M)]
    res = {re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', h)) for h in heads} | {re.sub(r'\s', '-', re.sub(r'[^\w\s-]', '', h)) for h in heads}
    res |= set(re.findall(r'id=["\']([^"\']+)', text)) | set(re.findall(r'\{#([\w-]+)', text))
    if p.suffix=='.ipynb':
        for _,c in cells(p):
            if not any(o.startswith('export') for o in directives(src(c))): continue
            for n in ast.walk(ast.parse(src(c))):
                if isinstance(n, (ast.FunctionDef, ast.ClassDef)): res.add(n.name.lower())
    return res

def prose(text):
    "Markdown without its code"
    text = re.sub(r'^(```|~~~).*?^\1', '', text, flags=re.S|re.M)
    return re.sub(r'`[^`\n]*`', '', text)

def targets(text):
    text = prose(text)
    return re.findall(r'\]\(\s*<?([^)\s>]+)>?(?:\s+["\'][^)]*)?\)', text) + re.findall(r'(?:src|href)\s*=\s*["\']([^"\']+)', text) + \
        re.findall(r'^\s*\[[^\]]+\]:\s*(\S+)', text, flags=re.M)

def links(root):
    "links lead somewhere"
    pages = [(p, src(c)) for p in notebooks(root) for _,c in cells(p, 'markdown')]
    pages += [(p, p.read_text(encoding='utf-8')) for p in sorted(root.glob('*.md'))]
    res = []
    for p,text in pages:
        for t in targets(text):
            if re.match(r'[a-z][a-z0-9+.-]*:|//', t): continue
            path,_,anchor = urllib.parse.unquote(t).partition('#')
            to = (p.parent/path).resolve() if path else p
            if not to.exists() or not to.is_relative_to(root): res.append(f"{p.relative_to(root)}: nothing at {t}")
            elif anchor and to.suffix in ('.md', '.ipynb') and anchor not in slugs(root, to): res.append(f"{p.relative_to(root)}: no heading for {t}")
    return list(dict.fromkeys(res))

_PATH = re.compile(r'(?:^|(?<=[\s\'"(=\[,]))/(?:[\w.+-]+/)+[\w.+-]+|(?<!\w)[A-Z]:\\\\?\w', flags=re.M) # absolute: two names at least
_BAR = re.compile(r'<progress|progress-bar|[█▏▎▍▌▋▊▉]|\d+(?:\.\d+)?(?:it/s|s/it)|\d+%\|')
_TIME = re.compile(r'(?<![\d:\[,.])\d\d:[0-5]\d(?![\d\],.])|<th>time</th>')

def texts(o):
    "The parts of a stored output that a reader reads"
    if 'text' in o: yield ''.join(o['text'])
    for k,v in o.get('data', {}).items():
        if k.startswith('text/'): yield re.sub(r'<script\b.*?</script>|<style\b.*?</style>|data:[\w/+]+;base64,[\w+/=]+', '', ''.join(v), flags=re.S)
    if o['output_type']=='error': yield o['ename']+': '+o['evalue']

def outputs(root):
    "stored outputs"
    res,size = [],0
    for p in notebooks(root):
        rel,n = p.relative_to(root),p.stat().st_size
        if n>=MAX_NB: res.append(f"{rel}: {n:,} bytes; a notebook has less than {MAX_NB:,}")
        for i,c in cells(p):
            for o in c['outputs']:
                if o['output_type']=='error': res.append(f"{rel} cell {i}: stored error {o['ename']}")
                for t in texts(o):
                    for what,r in (('path',_PATH), ('progress bar',_BAR), ('time',_TIME)):
                        m = r.search(t)
                        if m: res.append(f"{rel} cell {i}: stored output holds a {what}: {t[max(0,m.start()-20):m.end()+20]!r}")
    size = sum(p.stat().st_size for p in (root/'nbs').rglob('*') if p.is_file() and not {'.ipynb_checkpoints', '_proc', '_docs'} & set(p.parts))
    return res + ([f"nbs: {size:,} bytes; all together have less than {MAX_NBS:,}"] if size>=MAX_NBS else [])

def skips(root):
    "nothing is skipped"
    flags,res = set(settings(root).get('tst_flags', '').split()),[]
    res += [f"{p.relative_to(root)}: nbdev_test passes over its folder" for p in (root/'nbs').rglob('.notest')]
    for p in notebooks(root):
        rel,nb = p.relative_to(root),read(p)
        if nb['metadata'].get('kernelspec', {}).get('language', 'python')!='python': res.append(f"{rel}: the language of its kernel is not python")
        for i,c in enumerate(nb['cells']):
            s,at = src(c),f"{rel} cell {i}"
            if c['cell_type'] in ('raw', 'markdown') and re.search(r'^\s*(?:-\s+)?skip_(?:exec|showdoc)\s*:', s, flags=re.M): res.append(f"{at}: skip_exec or skip_showdoc")
            if c['cell_type']!='code': continue
            if re.search(r'^\s*#\s*\|\s*eval\s*:\s*false', s, flags=re.M|re.I): res.append(f"{at}: eval: false")
            ds = {o.split()[0].rstrip(':') for o in directives(s) if o.split()}
            if flags & ds and any(o.startswith('export') for o in ds): res.append(f"{at}: an export with a test flag is not run")
            if 'nbdev_export(' in s:
                code = [l.strip() for l in re.split(r'[\n;]', s) if l.strip() and not l.strip().startswith('#')]
                if set(code)-{'import nbdev', 'nbdev.nbdev_export()'}: res.append(f"{at}: nbdev_test passes over a cell that calls nbdev_export; give the rest a cell of its own")
            if re.search(r'^\s*(?:!|%%(?:bash|sh|script)\b|%sx\b)', s, flags=re.M): res.append(f"{at}: a shell command may fail unseen; use subprocess.run(..., check=True)")
        run = [c for c in nb['cells'] if c['cell_type']=='code' and src(c).strip() and 'nbdev_export(' not in src(c)
               and not flags & {o.split()[0].rstrip(':') for o in directives(src(c)) if o.split()}]
        if not run: res.append(f"{rel}: no cell is run")
    return res

def package(root):
    "package builds"
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        copy(root, d)
        # a wheel made from the source archive: what is missing from the archive is missing here
        rc,out,_ = call([sys.executable, '-m', 'build', '--no-isolation', '--outdir', 'dist', '.'], d)
        if rc!=0: return out.strip().splitlines()[-12:]
        with zipfile.ZipFile(next((d/'dist').glob('*.whl'))) as z:
            there,points = set(z.namelist()),next(o for o in z.namelist() if o.endswith('entry_points.txt'))
            want = {p.relative_to(root).as_posix() for p in (root/lib(root)).rglob('*.py')}
            scripts = re.findall(r'^(\w+) = ([\w.]+):(\w+)$', z.read(points).decode().partition('[console_scripts]')[2].partition('\n[')[0], flags=re.M)
    res = [f"{o}: not in the wheel" for o in sorted(want-there)] + [f"{o}: in the wheel, but of another place" for o in sorted(there-want) if o.endswith('.py')]
    for name,mod,f in scripts:
        p = root/(mod.replace('.', '/')+'.py')
        if not p.exists() or not re.search(rf'^def {f}\(', p.read_text(encoding='utf-8'), flags=re.M): res.append(f"{name}: no function {f} in {mod}")
    return res if scripts else res+['no commands']

_DIST = dict(plum='plum-dispatch', sklearn='scikit-learn', skimage='scikit-image', IPython='ipython', PIL='pillow', yaml='pyyaml')

def requirements(root):
    "requirements are what is imported"
    names = lambda k: {re.split(r'[<>=!~\[]', o)[0].lower() for o in settings(root).get(k, '').split()}
    said,more = names('requirements'),names('distributed_requirements')
    used = {}
    for p in (root/lib(root)).rglob('*.py'):
        for n in ast.walk(ast.parse(p.read_text(encoding='utf-8'))):
            mods = [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module] if isinstance(n, ast.ImportFrom) and not n.level else []
            for m in mods: used.setdefault(m.split('.')[0], p.relative_to(root))
    used = {_DIST.get(k, k).lower():v for k,v in used.items() if k not in sys.stdlib_module_names and k!=lib(root)}
    return [f"{k}: imported by {used[k]}, but not in `requirements` of settings.ini" for k in sorted(set(used)-said-more)] + \
        [f"{k}: in `requirements` of settings.ini, but nothing imports it" for k in sorted((said|more)-set(used))]

def pytests(root, f, limit=2*LIMIT):
    "Run a file of tests/; one whose tests were all skipped has not passed"
    rc,out,_ = call([sys.executable, '-m', 'pytest', '-q', '-p', 'no:cacheprovider', str(f)], root, limit)
    return [] if rc==0 and re.search(r'\d+ passed', out) else [*out.strip().splitlines()[-30:], 'stopped: too slow' if rc is None else f'exit code {rc}']

SELF = 'self-test of the checks'
CHECKS = [export, clean, names, readme, docs, links, outputs, skips, requirements, package]

# ---------------------------------------------------------------- the notebooks

def run_notebook(root, p, limit=LIMIT):
    "Run a notebook's cells with nbdev_test in a process of its own"
    rel = p.relative_to(root).as_posix()
    with tempfile.TemporaryDirectory() as d:
        cmd = [str(Path(sys.executable).with_name('nbdev_test')), '--path', rel, '--n_workers', '0', '--do_print']
        rc,out,_ = call(cmd, root, limit, env=dict(TMPDIR=d))
    if rc is None: return [f'stopped after {limit} s', *out.strip().splitlines()[-20:]]
    # nbdev_test calls a notebook that it skipped passed: only one that it started and completed counts
    ran = f'Starting {p}' in out and f'Completed {p}' in out and re.search(r'^Success\.$', out, flags=re.M)
    if rc==0 and ran: return []
    return [*out.strip().splitlines()[-80:], f'exit code {rc}' if rc else 'not run: nbdev_test skipped it']

def files(root):
    skip = {'.git', '.venv', '__pycache__', '.ipynb_checkpoints', '.pytest_cache'}
    res = set()
    for d,ds,fs in os.walk(root):
        ds[:] = [o for o in ds if o not in skip and not o.endswith('.egg-info')]
        res |= {Path(d)/f for f in fs}
    return res

# ---------------------------------------------------------------- all together

def guarded(f, *args):
    "Faults found by `f` and the seconds it took; a check that breaks has found a fault"
    start = time.time()
    try: res = f(*args)
    except Broken as e: res = str(e).strip().splitlines()[-40:] or ['ended badly, without a word']
    except Exception as e: res = [f'{type(e).__name__}: {e}']
    return res, time.time()-start

def jobs(root, only):
    "Checks and notebooks by name, the slowest known first"
    res = {f.__doc__:(f, root) for f in CHECKS}
    res |= {SELF if f.name=='test_check.py' else f.relative_to(root).as_posix():(pytests, root, f) for f in sorted((root/'tests').glob('test_*.py'))}
    res |= {p.relative_to(root).as_posix():(run_notebook, root, p) for p in notebooks(root)}
    return {k:v for k,v in res.items() if not only or any(o in k for o in only)}

def order(todo, times):
    "Unknown ones go by size: tutorials and later pages take longer"
    def key(k): return -times.get(k, 60 if k in ('docs pass', SELF) or 'tutorials/' in k else 30 if k.endswith('.ipynb') else 5)
    return sorted(todo, key=key)

def check(root, only=(), workers=None):
    root,times_f = root.resolve(),Path(sys.prefix)/'m3dv_check_times.json'
    times = json.loads(times_f.read_text()) if root==ROOT and times_f.exists() else {}
    todo,before,start = jobs(root, only),files(root),time.time()
    if not todo: sys.exit(f"nothing is called {' '.join(only)}")
    workers = workers or min(os.cpu_count() or 1, 4)
    known = sum(times.get(k, 0) for k in todo)
    print(f"{len(todo)} checks and notebooks, {workers} at a time" + (f"; about {max(1, round(known/workers/60))} min" if all(k in times for k in todo) else ''), flush=True)
    bad,n = [],0
    def report(k, faults, secs):
        nonlocal n
        n += 1
        print(f"[{n}/{len(todo)+1}] {'FAILED' if faults else 'ok':6} {secs:6.1f} s  {k}", flush=True)
        for o in faults: print(f"        {o}", flush=True)
        if faults: bad.append(k)
    with ThreadPoolExecutor(workers) as ex:
        wait = {ex.submit(guarded, *todo[k]):k for k in order(todo, times)}
        for f in as_completed(wait):
            report(wait[f], *f.result())
            times[wait[f]] = round(f.result()[1], 1)
    report('no file left behind', [f"{p.relative_to(root)}: new" for p in sorted(files(root)-before)], 0)
    if root==ROOT: times_f.write_text(json.dumps(times, indent=1))
    print(f"{time.time()-start:.0f} s" + (f"; failed: {', '.join(bad)}" if bad else ''))
    print(f"{n-len(bad)} passed, {len(bad)} failed")
    return bool(bad)

if __name__=='__main__':
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('only', nargs='*', help='run only what has one of these in its name')
    a.add_argument('--root', type=Path, default=ROOT, help='the project')
    a.add_argument('--workers', type=int, help='how many at a time')
    o = a.parse_args()
    sys.exit(check(o.root, o.only, o.workers))
