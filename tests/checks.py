"""What must hold for this project: each check takes the project's folder and returns its faults as lines, none where all is well.

tests/test_project.py applies them to this project, and to small projects in which a fault was planted."""
import ast, configparser, importlib.metadata, os, re, shlex, shutil, signal, subprocess, sys, tempfile, urllib.parse, warnings, zipfile
from functools import lru_cache
from pathlib import Path
import nbformat
from bs4 import BeautifulSoup
from execnb.nbio import read_nb
from IPython.core.inputtransformer2 import TransformerManager
from nbconvert.filters import markdown2html
from nbdev.process import extract_directives, nb_lang
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
from shrink import is_bar # noqa: E402

OFFLINE = ROOT/'tests'/'offline'
LIMIT = 600 # seconds for one program
MAX_NB, MAX_NBS = 250_000, 3_000_000 # bytes: one notebook, all of nbs/
COLUMNS = 140
BY_HAND = {'all.py', '__main__.py'} # modules that no notebook writes
UNSEEN = {'.ipynb_checkpoints', '_proc', '_docs'}

class Broken(Exception):
    "A check cannot be made, or its tool ended badly; the message is what that tool said"

# ---------------------------------------------------------------- reading the project

def settings(root):
    cfg = configparser.ConfigParser(delimiters=['='])
    cfg.read(root/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def package_dir(root): return root/settings(root)['lib_path']

def pages(root): return sorted(p for p in (root/'nbs').rglob('*.ipynb') if not UNSEEN & set(p.parts))

def cells(p, kind='code'): return [(i,c) for i,c in enumerate(read_nb(p).cells) if c.cell_type==kind]

def directives(c): return extract_directives(c, remove=False)

def exports(c): return any(o.startswith('export') for o in directives(c))

def module(p):
    "The modules that a notebook names with default_exp"
    return [d['default_exp'][0] for _,c in cells(p) if (d:=directives(c)).get('default_exp')]

def tree(source):
    "Syntax tree of a cell, which may hold magics"
    try: return ast.parse(source)
    except SyntaxError: return ast.parse(TransformerManager().transform_cell(source))

def parse(p): return ast.parse(p.read_text(encoding='utf-8'))

def scripts(root): return sorted(p for o in ('tools', 'tests', 'bench') for p in (root/o).rglob('*.py'))

def copy(root, dest, package=True):
    "Copy what nbdev needs of `root` to `dest`; without the package only what was not written from notebooks"
    skip = shutil.ignore_patterns('.*', '__pycache__', '_proc', '_docs', '*.bak')
    for f in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'MANIFEST.in', 'LICENSE'):
        if (root/f).exists(): shutil.copy2(root/f, dest/f)
    shutil.copytree(root/'nbs', dest/'nbs', ignore=skip)
    lib = package_dir(root)
    if package: shutil.copytree(lib, dest/lib.name, ignore=skip)
    else:
        (dest/lib.name).mkdir()
        for f in {'__init__.py', *BY_HAND}:
            if (lib/f).exists(): shutil.copy2(lib/f, dest/lib.name)

# ---------------------------------------------------------------- running a tool with a time limit

def call(cmd, cwd, limit=LIMIT, env=None):
    "Run `cmd` without a network; exit code (None if stopped after `limit` s) and output. Whatever it started ends with it."
    env = {**os.environ, 'OMP_NUM_THREADS':'1', 'MPLBACKEND':'Agg', 'PYTHONPATH':os.pathsep.join([str(cwd), str(OFFLINE)]),
           'M3DV_CACHE':'off', **(env or {})}
    for o in ('M3DV_DATA', 'M3DV_OUT', 'IN_TEST'): env.pop(o, None)
    with tempfile.TemporaryFile('w+', encoding='utf-8', errors='replace') as f:
        p = subprocess.Popen(cmd, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=f, stderr=subprocess.STDOUT, start_new_session=True)
        try: rc = p.wait(limit)
        except subprocess.TimeoutExpired: rc = None
        finally:
            try: os.killpg(p.pid, signal.SIGKILL)
            except ProcessLookupError: pass
            p.wait()
        f.seek(0)
        return rc, f.read()

def python(code, cwd):
    rc,out = call([sys.executable, '-c', code], cwd)
    if rc!=0: raise Broken(f"stopped after {LIMIT} s\n{out}" if rc is None else out)
    return out

# ---------------------------------------------------------------- notebooks and what is written from them

def export(root):
    "The package is what the notebooks export"
    with tempfile.TemporaryDirectory() as d:
        d,lib = Path(d),package_dir(root).name
        copy(root, d, package=False)
        python('from nbdev.doclinks import nbdev_export; nbdev_export()', d)
        here,there = ({str(p.relative_to(o)):p.read_bytes() for p in [*(o/lib).rglob('*.py'), *o.glob('pyproject.toml')]} for o in (root,d))
    how = lambda f: 'missing' if f not in here else 'not from a notebook' if f not in there else 'differs from its notebook'
    return [f"{f}: {how(f)}; run `make export`" for f in sorted(here|there) if here.get(f)!=there.get(f)]

def clean(root):
    "Notebooks keep to their format and are clean"
    res = []
    for p in pages(root):
        try:
            with warnings.catch_warnings(action='error'):
                nbformat.validate(nbformat.reads(p.read_text(encoding='utf-8'), nbformat.NO_CONVERT))
        except Exception as e: res.append(f"{p.relative_to(root)}: not a notebook: {type(e).__name__}: {str(e)[:300]}")
    with tempfile.TemporaryDirectory() as d:
        copy(root, Path(d))
        python('from nbdev.clean import nbdev_clean; nbdev_clean()', d)
        rel = [p.relative_to(root) for p in pages(root)]
        return res + [f"{o}: not clean; run `make export`" for o in rel if (root/o).read_bytes()!=(d/o).read_bytes()]

def names(root):
    "One notebook for each module, and nothing that nbdev passes over in silence"
    res,seen = [],{}
    for p in pages(root):
        rel,exps = p.relative_to(root),module(p)
        if p.name[0] in '_.': res.append(f"{rel}: nbdev passes over names that begin with {p.name[0]}")
        if len(exps)>1: res.append(f"{rel}: more than one default_exp: {', '.join(exps)}")
        for e in exps:
            if e in seen: res.append(f"{rel}: module {e} is already written by {seen[e]}")
            seen[e] = rel
        for i,c in cells(p):
            said = re.findall(r'^\s*#\s*\|\s*(exporti|exports|export|default_exp)\b', c.source, flags=re.M)
            if set(said)-set(directives(c)): res.append(f"{rel} cell {i}: `#| {said[0]}` is not at the top of its cell; nbdev ignores it")
            if said and not exps and 'default_exp' not in said: res.append(f"{rel} cell {i}: exports without a default_exp")
    lib = package_dir(root)
    written = [p for p in lib.rglob('*.py') if p.name not in {'__init__.py', '_modidx.py', *BY_HAND}]
    mods = {'.'.join(p.relative_to(lib).with_suffix('').parts) for p in written}
    res += [f"{e}: named by {seen[e]}, but there is no such module" for e in sorted(set(seen)-mods)]
    return res + [f"{m}: a module that no notebook names" for m in sorted(mods-set(seen))]

def readme(root):
    "README.md is what index.ipynb gives"
    rc,out = call([sys.executable, str(ROOT/'tools'/'readme.py'), '--check', '--root', str(root)], root)
    return [] if rc==0 else out.strip().splitlines()[-12:] or [f'tools/readme.py ended with {rc}']

def docs(root):
    "The processors of the docs pass on every page"
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        copy(root, d)
        out = python("from nbdev.serve import proc_nbs; proc_nbs('nbs', n_workers=0)", d)
        res = [f"{p.relative_to(root)}: not processed" for p in pages(root) if not (d/'_proc'/p.relative_to(root/'nbs')).exists()]
        for p in (d/'_proc').rglob('*.ipynb'):
            errors = [(i,o) for i,c in cells(p) for o in c.outputs if o['output_type']=='error']
            res += [f"{p.relative_to(d/'_proc')}: cell {i}: {o['ename']}: {o['evalue']}" for i,o in errors]
    mixed = re.findall(r'Found cells containing imports and other code.*?\n---\n(.*?)\n---', out, flags=re.S)
    return res + [f"imports share a cell with other code: {m.strip().splitlines()[0]} …" for m in mixed]

# ---------------------------------------------------------------- links

@lru_cache(maxsize=200)
def html(p, changed):
    "The prose of a page as HTML; `changed` is the file's time, so that an edited one is read again"
    text = p.read_text(encoding='utf-8') if p.suffix=='.md' else '\n\n'.join(c.source for _,c in cells(p, 'markdown'))
    return BeautifulSoup(markdown2html(text), 'html.parser')

def prose(p): return html(p, p.stat().st_mtime_ns)

def anchors(p):
    "Anchors of a page: its headings, as GitHub and Quarto write them, ids of its own, and the symbols that its notebook exports"
    page = prose(p)
    heads = [h.get_text().removesuffix('¶').strip().lower() for h in page.find_all(re.compile('^h[1-6]$'))]
    res = {re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', h)) for h in heads} # Quarto
    res |= {re.sub(r'\s', '-', re.sub(r'[^\w\s-]', '', h)) for h in heads} # GitHub
    res |= {t['id'] for t in page.select('[id]') if not re.fullmatch('h[1-6]', t.name)} | set(re.findall(r'\{#([\w-]+)', page.get_text()))
    if p.suffix!='.ipynb': return res
    defined = [n for _,c in cells(p) if exports(c) for n in ast.walk(tree(c.source))]
    return res | {n.name.lower() for n in defined if isinstance(n, (ast.FunctionDef, ast.ClassDef))}

def links(root):
    "Links lead to a file of the project, and to a heading of it"
    res = []
    for p in [*pages(root), *sorted(root.glob('*.md'))]:
        for t in prose(p).select('[href]:not(.anchor-link), [src]'):
            t = t.get('href') or t.get('src')
            if re.match(r'[a-z][a-z0-9+.-]*:|//', t): continue
            path,_,anchor = urllib.parse.unquote(t).partition('#')
            to = (p.parent/path).resolve() if path else p
            if not to.exists() or not to.is_relative_to(root): res.append(f"{p.relative_to(root)}: nothing at {t}")
            elif anchor and to.suffix in ('.md', '.ipynb') and anchor not in anchors(to):
                res.append(f"{p.relative_to(root)}: no heading for {t}")
    return list(dict.fromkeys(res))

# ---------------------------------------------------------------- stored outputs, and cells that no test would run

STRAY = {'path': re.compile(r'(?:^|(?<=[\s\'"(=\[,]))/(?:[\w.+-]+/)+[\w.+-]+|(?<!\w)[A-Z]:\\\\?\w', flags=re.M), # absolute, two names deep
         'progress bar': re.compile(r'<progress|progress-bar|[█▏▎▍▌▋▊▉]|\d+(?:\.\d+)?(?:it/s|s/it)|\d+%\|'),
         'time': re.compile(r'(?<![\d:\[,.])\d\d:[0-5]\d(?![\d\],.])|<th>time</th>'),
         'address': re.compile(r'\b0x[0-9a-f]{8,}')}

def texts(o):
    "The parts of a stored output that a reader reads"
    if 'text' in o: yield ''.join(o['text'])
    for k,v in o.get('data', {}).items():
        unread = r'<script\b.*?</script>|<style\b.*?</style>|data:[\w/+]+;base64,[\w+/=]+'
        if k.startswith('text/'): yield re.sub(unread, '', ''.join(v), flags=re.S)
    if o['output_type']=='error': yield o['ename']+': '+o['evalue']

def outputs(root):
    "Stored outputs are small and the same on every machine"
    res = []
    for p in pages(root):
        rel,n = p.relative_to(root),p.stat().st_size
        if n>=MAX_NB: res.append(f"{rel}: {n:,} bytes; a notebook has less than {MAX_NB:,}")
        for i,o in [(i,o) for i,c in cells(p) for o in c.outputs]:
            if o['output_type']=='error': res.append(f"{rel} cell {i}: stored error {o['ename']}")
            if is_bar(o): res.append(f"{rel} cell {i}: stored output is what a progress bar has left; run `make export`")
            found = [(what,t,m) for t in texts(o) for what,r in STRAY.items() if (m:=r.search(t))]
            res += [f"{rel} cell {i}: stored output holds a {what}: {t[max(0,m.start()-20):m.end()+20]!r}" for what,t,m in found]
    size = sum(p.stat().st_size for p in (root/'nbs').rglob('*') if p.is_file() and not UNSEEN & set(p.parts))
    return res + ([f"nbs: {size:,} bytes; all together have less than {MAX_NBS:,}"] if size>=MAX_NBS else [])

def skipped_in(c, flags):
    "Why nbdev_test would pass over (a part of) a cell, or miss its failure"
    if c.cell_type in ('raw', 'markdown'):
        if re.search(r'^\s*(?:-\s+)?skip_(?:exec|showdoc)\s*:', c.source, flags=re.M): yield 'skip_exec or skip_showdoc'
        return
    if re.search(r'^\s*#\s*\|\s*eval\s*:\s*false', c.source, flags=re.M|re.I): yield 'eval: false'
    if flags & set(directives(c)) and exports(c): yield 'an export with a test flag is not run'
    if 'nbdev_export(' in c.source:
        code = [l.strip() for l in re.split(r'[\n;]', c.source) if l.strip() and not l.strip().startswith('#')]
        if set(code)-{'import nbdev', 'nbdev.nbdev_export()'}:
            yield 'nbdev_test passes over a cell that calls nbdev_export; give the rest a cell of its own'
    if re.search(r'^\s*(?:!|%%(?:bash|sh|script)\b|%sx\b)', c.source, flags=re.M):
        yield 'a shell command may fail unseen; use subprocess.run(..., check=True)'

def skips(root):
    "Every cell is run by the tests"
    flags = set(settings(root).get('tst_flags', '').split())
    res = [f"{p.relative_to(root)}: nbdev_test passes over its folder" for p in (root/'nbs').rglob('.notest')]
    for p in pages(root):
        rel,nb = p.relative_to(root),read_nb(p)
        if nb_lang(nb)!='python': res.append(f"{rel}: the language of its kernel is not python")
        res += [f"{rel} cell {i}: {why}" for i,c in enumerate(nb.cells) for why in skipped_in(c, flags)]
        run = [c for _,c in cells(p) if c.source.strip() and 'nbdev_export(' not in c.source and not flags & set(directives(c))]
        if not run: res.append(f"{rel}: no cell is run")
    return res

# ---------------------------------------------------------------- the package and what it needs

def package(root):
    "A wheel, made from the source archive, holds every module, and its commands exist"
    with tempfile.TemporaryDirectory() as d:
        d = Path(d)
        copy(root, d)
        rc,out = call([sys.executable, '-m', 'build', '--no-isolation', '--outdir', 'dist', '.'], d)
        if rc!=0: return out.strip().splitlines()[-12:]
        with zipfile.ZipFile(next((d/'dist').glob('*.whl'))) as z: z.extractall(d/'wheel')
        dist = importlib.metadata.Distribution.at(next((d/'wheel').glob('*.dist-info')))
        there,commands = {str(f) for f in dist.files},dist.entry_points.select(group='console_scripts')
    want = {p.relative_to(root).as_posix() for p in package_dir(root).rglob('*.py')}
    res = [f"{o}: not in the wheel" for o in sorted(want-there)]
    res += [f"{o}: in the wheel, but of another place" for o in sorted(there-want) if o.endswith('.py')]
    for c in commands:
        p = root/(c.module.replace('.', '/')+'.py')
        functions = {n.name for n in parse(p).body if isinstance(n, ast.FunctionDef)} if p.exists() else ()
        if c.attr not in functions: res.append(f"{c.name}: no function {c.attr} in {c.module}")
    return res if commands else res+['no commands']

def requirements(root):
    "`requirements` of settings.ini, and those of its extras, are what the package imports"
    cfg,lib,used = settings(root),package_dir(root),{}
    lists = [cfg[k] for k in cfg if k.endswith('requirements') and k!='dev_requirements']
    said = {canonicalize_name(Requirement(o).name) for v in lists for o in shlex.split(v)}
    for p in lib.rglob('*.py'):
        for n in ast.walk(parse(p)):
            if isinstance(n, ast.Import): used |= {a.name.split('.')[0]:p for a in n.names}
            if isinstance(n, ast.ImportFrom) and not n.level: used[n.module.split('.')[0]] = p
    dists = importlib.metadata.packages_distributions()
    of = {m:{canonicalize_name(o) for o in dists.get(m, [m])} for m in used if m not in sys.stdlib_module_names and m!=lib.name}
    lost = [m for m in sorted(of) if not of[m] & said]
    return [f"{m}: imported by {used[m].relative_to(root)}, but not in the requirements of settings.ini" for m in lost] + \
        [f"{o}: in the requirements of settings.ini, but nothing imports it" for o in sorted(said-set().union(*of.values()))]

# ---------------------------------------------------------------- how the code is written

def columns(root):
    "No line of code is longer than a page is wide"
    lines = [(f"{p.relative_to(root)} cell {i}", c.source) for p in pages(root) for i,c in cells(p)]
    lines += [(str(p.relative_to(root)), p.read_text(encoding='utf-8')) for p in scripts(root)]
    long = [(at, n, len(l)) for at,s in lines for n,l in enumerate(s.splitlines(), 1) if len(l)>COLUMNS]
    return [f"{at} line {n}: {width} columns; at most {COLUMNS}" for at,n,width in long]

def lint(root):
    "ruff finds no error in tools, tests and bench"
    dirs = [o for o in ('tools', 'tests', 'bench') if (root/o).is_dir()]
    ruff = [sys.executable, '-m', 'ruff', 'check', '--no-cache', '--quiet', '--output-format', 'concise']
    rc,out = call([*ruff, '--config', str(ROOT/'pyproject.toml'), *dirs], root)
    return out.strip().splitlines() or [f'exit code {rc}'] if rc else []

def public_functions(t):
    "Functions that a module exports, methods of its classes, and methods that it patches into a class"
    shown = next(ast.literal_eval(n.value) for n in t.body if isinstance(n, ast.Assign) and getattr(n.targets[0], 'id', '')=='__all__')
    for n in t.body:
        if isinstance(n, ast.ClassDef) and n.name in shown:
            yield from ((f"{n.name}.{f.name}", f) for f in n.body if isinstance(f, ast.FunctionDef))
        if isinstance(n, ast.FunctionDef):
            patched = any('patch' in ast.unparse(o) for o in n.decorator_list)
            cls = ast.unparse(n.args.args[0].annotation or n.args.args[0]) if patched else ''
            if cls and cls[0]!='_': yield f"{cls}.{n.name}",n
            elif n.name in shown: yield n.name,n

def annotations(root):
    "Every public argument of every public function says its type"
    res = []
    for p in sorted(package_dir(root).glob('[!_]*.py')):
        if p.name in BY_HAND: continue
        for name,f in public_functions(parse(p)):
            if f.name.startswith('_') and f.name not in ('__init__', '__call__'): continue
            args = [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs]
            args = [a.arg for a in args if a.annotation is None and a.arg[0]!='_' and a.arg not in ('self', 'cls')]
            if args: res.append(f"{p.relative_to(root)}: {name}: no type for {', '.join(args)}")
    return res

def reached(trees, lib):
    "Which names of which modules of the package a page or a file reaches for: place, module, name ('' for the module itself)"
    alias,nodes = {},[(i,n) for i,t in trees for n in ast.walk(t)]
    for i,n in nodes:
        if isinstance(n, ast.Import):
            for m,a in [(o.name.partition('.')[2], o.asname) for o in n.names if o.name.startswith(lib+'.')]:
                alias[a or f'{lib}.{m}'] = m
                yield i,m,''
        if isinstance(n, ast.ImportFrom):
            m = '.'.join(o for o in (lib if n.level else '', n.module) if o)
            for o in n.names:
                if m==lib:
                    alias[o.asname or o.name] = o.name
                    yield i,o.name,''
                elif m.startswith(lib+'.'): yield i,m[len(lib)+1:],o.name
    for i,n in nodes:
        if isinstance(n, ast.Attribute) and isinstance(n.value, (ast.Name, ast.Attribute)):
            if (a:=ast.unparse(n.value)) in alias: yield i,alias[a],n.attr

def private(root):
    "A name that begins with an underscore stays in its module"
    lib,res = package_dir(root).name,[]
    files = [(p, module(p), [(f' cell {i}', tree(c.source)) for i,c in cells(p)]) for p in pages(root)]
    files += [(p, [], [('', parse(p))]) for p in [*scripts(root), *(package_dir(root)/o for o in BY_HAND)] if p.exists()]
    for p,own,trees in files:
        found = [(i,m,n) for i,m,n in reached(trees, lib) if re.match('_(?!_)', n) and m not in own]
        res += [f"{p.relative_to(root)}{i}: {lib}.{m}.{n} is private" for i,m,n in found]
    return list(dict.fromkeys(res))

def order(root):
    "A numbered page leans only on pages with lower numbers"
    lib,number,res = package_dir(root).name,lambda p: re.match(r'\d*', p.name)[0],[]
    of = {m:number(p) for p in pages(root) for m in module(p)}
    for p in pages(root):
        if not number(p): continue
        for i,m,_ in reached([(i, tree(c.source)) for i,c in cells(p)], lib):
            if m in module(p) or m.startswith('_'): continue
            where = f'page {of[m]}' if m in of else 'no page'
            if not of.get(m, '~')<number(p): res.append(f"{p.relative_to(root)} cell {i}: {lib}.{m} is of {where}, not of a lower one")
    return list(dict.fromkeys(res))

# ---------------------------------------------------------------- what is installed, and from where

PIN = re.compile(r'^([\w.-]+)==(\S+)', flags=re.M)

def pins(p): return {canonicalize_name(k):v for k,v in PIN.findall(p.read_text(encoding='utf-8'))}

def supply(root):
    "Actions of the workflows are named by commit, and requirements.txt has the releases of constraints.txt, each with its hashes"
    res = []
    for p in sorted((root/'.github'/'workflows').glob('*.y*ml')):
        for o in re.findall(r'uses:\s*(\S+)', p.read_text(encoding='utf-8')):
            if not re.search(r'@[0-9a-f]{40}$', o): res.append(f"{p.relative_to(root)}: {o} is not named by a commit")
    lists = root/'constraints.txt', root/'requirements.txt'
    if not all(p.exists() for p in lists): return [*res, *[f"{p.name}: missing" for p in lists if not p.exists()]]
    want,there = map(pins, lists)
    res += [f"requirements.txt: {k} {there.get(k, 'missing')}, but {v} in constraints.txt" for k,v in want.items() if there.get(k)!=v]
    whole = lists[1].read_text(encoding='utf-8').replace('\\\n', ' ')
    return res + [f"requirements.txt: {l.split()[0]} has no hash" for l in whole.splitlines() if PIN.match(l) and '--hash=sha256:' not in l]

# ---------------------------------------------------------------- importing it

IMPORT = '''
import importlib, sys
lib,*mods = sys.argv[1:]
def watch(event, args):
    inet = event in ('socket.connect', 'socket.sendto') and isinstance(args[1], tuple)
    if inet or event in ('socket.getaddrinfo', 'socket.gethostbyname'):
        print(f'{now}: reaches for the network on import: {event}')
        raise OSError('no network here')
now,pages = lib,{}
sys.addaudithook(watch)
for m in mods:
    now = f'{lib}.{m}'
    try: pages[now] = importlib.import_module(now)
    except Exception as e: print(f'{now}: {type(e).__name__}: {e}')
ns,whole = {},f'{lib}.all'
if whole in pages: exec(f'from {whole} import *', ns)
else: print(f'{whole}: no such module')
for now,page in pages.items():
    if now==f'{lib}.cli': continue # commands are for a shell
    lost = [o for o in getattr(page, '__all__', []) if whole in pages and ns.get(o, pages) is not getattr(page, o)]
    if lost: print(f"{whole}: not the names of {now}: {', '.join(lost)}")
'''

def imports(root):
    "Every module can be imported without a network, and `all` offers the public names of every page"
    lib = package_dir(root)
    mods = sorted(p.stem for p in lib.glob('[!_]*.py'))
    rc,out = call([sys.executable, '-c', IMPORT, lib.name, *mods], root)
    return out.strip().splitlines() if rc==0 else [*out.strip().splitlines(), f'exit code {rc}']

CHECKS = [export, clean, names, readme, docs, links, outputs, skips, requirements, package,
          columns, lint, annotations, private, order, supply, imports]

# ---------------------------------------------------------------- one notebook

def run_notebook(root, p, limit=LIMIT):
    "Run the cells of a notebook with nbdev_test in a process of its own"
    rel = p.relative_to(root).as_posix()
    with tempfile.TemporaryDirectory() as d:
        cmd = [str(Path(sys.executable).with_name('nbdev_test')), '--path', rel, '--n_workers', '0', '--do_print']
        rc,out = call(cmd, root, limit, env=dict(TMPDIR=d))
    if rc is None: return [*out.strip().splitlines()[-20:], f'stopped after {limit} s']
    # nbdev_test calls a notebook that it skipped passed: only one that it started and completed counts
    ran = f'Starting {p}' in out and f'Completed {p}' in out and re.search(r'^Success\.$', out, flags=re.M)
    if rc==0 and ran: return []
    return [*out.strip().splitlines()[-80:], f'exit code {rc}' if rc else 'not run: nbdev_test skipped it']
