"""How good are the tests? Change the code a little in many places, one at a time, and see whether they notice: writes results/mutants.csv.

    python tools/mutants.py --n 300 --seed 0       goes on where it was stopped; a larger N adds to the same draw
    python tools/mutants.py --only 'metrics.*sensitivity=0.9' --out -

A mutant is one comparison, operator, constant, default, condition or statement of an export cell, changed in a copy of the project,
in the notebook and in the module. Its page runs first, as nbdev_test runs it, then the test files that know the module; the first
failure or a time limit is the end.
The column `note` is for people: why a survivor does no harm."""
import argparse, ast, csv, importlib, json, os, random, re, shutil, signal, sys, tempfile, time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MODULES = ['data', 'loaders', 'metrics', 'evaluate', 'submission', 'runs']
FILES = ['test_files.py', 'test_fuzz.py']
TESTS = dict(data=FILES, evaluate=FILES, submission=FILES,
    runs=['test_runs.py', 'test_files.py', 'test_fuzz.py']) # beside the page
COLUMNS = ['module', 'line', 'column', 'function', 'kind', 'was', 'now', 'outcome', 'seconds', 'note']

# ---------------------------------------------------------------- what is changed

_compare = {ast.Eq:['!='], ast.NotEq:['=='], ast.Lt:['<=', '>='], ast.LtE:['<', '>'], ast.Gt:['>=', '<='], ast.GtE:['>', '<'],
    ast.Is:['is not'], ast.IsNot:['is'], ast.In:['not in'], ast.NotIn:['in']}
_binary = {ast.Add:'-', ast.Sub:'+', ast.Mult:'/', ast.Div:'*', ast.FloorDiv:'*', ast.Mod:'*', ast.Pow:'*',
    ast.BitAnd:'|', ast.BitOr:'&', ast.BitXor:'&'}
_calls = dict(min='max', max='min', any='all', all='any', minimum='maximum', maximum='minimum', floor='ceil', ceil='floor')

BARE = ast.Name, ast.Constant, ast.Call, ast.Attribute, ast.Subscript # need no brackets

def text(n): return ast.unparse(n)

def constants(n):
    "Other values for a constant"
    v = n.value
    if isinstance(v, bool): return [str(not v)]
    if isinstance(v, int): return [str(v+1), str(v-1)] if v else ['1']
    return [repr(v*2 if v else 1.)] if isinstance(v, float) else []

def operands(n): return [*operands(n.left), *operands(n.right)] if isinstance(n, ast.BinOp) else [n]

def may_be_number(n):
    "Not what joins texts, paths, lists or dictionaries: such a mutant fails at once, and tells nothing of the tests"
    if isinstance(n, ast.Call): return text(n.func) not in ('dict', 'str', 'Path', 'set', 'list')
    if isinstance(n, ast.Constant): return not isinstance(n.value, str)
    return not isinstance(n, (ast.JoinedStr, ast.Dict, ast.List, ast.Set))

def changes(n):
    "(kind, text) of what may stand in place of the node `n`"
    if isinstance(n, ast.Compare):
        for i,op in enumerate(n.ops):
            for o in _compare.get(type(op), ()):
                sides = [text(x) if isinstance(x, BARE) else f'({text(x)})' for x in [n.left, *n.comparators]]
                ops = [o if j==i else text(ast.Compare(ast.Name('a'), [p], [ast.Name('b')]))[2:-2] for j,p in enumerate(n.ops)]
                yield 'comparison','('+sides[0]+''.join(f' {p} {s}' for p,s in zip(ops, sides[1:]))+')'
    if isinstance(n, ast.BoolOp):
        yield 'and, or','('+text(ast.BoolOp(ast.Or() if isinstance(n.op, ast.And) else ast.And(), n.values))+')'
    if isinstance(n, ast.BinOp) and type(n.op) in _binary and all(map(may_be_number, operands(n))):
        yield 'arithmetic',f'(({text(n.left)}) {_binary[type(n.op)]} ({text(n.right)}))'
    if isinstance(n, ast.UnaryOp) and isinstance(n.op, (ast.Not, ast.USub, ast.Invert)): yield 'not, minus',f'({text(n.operand)})'
    if isinstance(n, ast.Constant): yield from (('constant', o) for o in constants(n))
    if isinstance(n, ast.Call):
        name = n.func.attr if isinstance(n.func, ast.Attribute) else getattr(n.func, 'id', '')
        if name in _calls:
            f = ast.Attribute(n.func.value, _calls[name]) if isinstance(n.func, ast.Attribute) else ast.Name(_calls[name])
            yield 'min, max',text(ast.Call(f, n.args, n.keywords))
    if isinstance(n, ast.IfExp): yield 'condition',f'({text(ast.IfExp(n.test, n.orelse, n.body))})'
    call = isinstance(n, ast.Expr) and not isinstance(n.value, (ast.Constant, ast.Yield))
    if call or isinstance(n, (ast.Raise, ast.AugAssign, ast.Delete)): yield 'removed statement','pass'
    if isinstance(n, ast.If) and not n.orelse: yield 'removed statement','pass'
    if isinstance(n, ast.Continue): yield 'continue, break','break'
    if isinstance(n, ast.Break): yield 'continue, break','continue'

class Mutant(NamedTuple):
    "One change of an export cell"
    module:str; page:str; cell:int; start:int; end:int; line:int; column:int; function:str; kind:str; was:str; now:str
    @property
    def key(self): return self.module,str(self.line),str(self.column),self.was,self.now
    def __str__(self):
        was,now = (' '.join(o.split())[:90] for o in (self.was, self.now))
        return f"{self.module}.py:{self.line} {self.function}: {was} → {now}"

def nodes(n, function=''):
    "Each node of a tree, but for annotations, messages and docstrings, with the name of its function and whether it is a default"
    if isinstance(n, ast.FunctionDef): function = n.name
    yield n,function
    for field,v in ast.iter_fields(n):
        if field in ('annotation', 'returns', 'decorator_list'): continue
        for c in v if isinstance(v, list) else [v]:
            if isinstance(c, ast.AST) and not isinstance(c, (ast.JoinedStr, ast.Import, ast.ImportFrom)): yield from nodes(c, function)

def mutants(root, module):
    "All mutants of a module: (row of its notebook's cells, place in the cell's source, what stands there then)"
    page = next(p for p in sorted((root/'nbs').glob('*.ipynb')) if f'"#| default_exp {module}"' in p.read_text(encoding='utf-8'))
    code = (root/'m3dv'/f'{module}.py').read_text(encoding='utf-8')
    for i,c in enumerate(json.loads(page.read_text(encoding='utf-8'))['cells']):
        src = ''.join(c['source'])
        if c['cell_type']!='code' or not src.startswith('#| export'): continue
        starts,s = [0],src.encode()
        for l in s.splitlines(True): starts.append(starts[-1]+len(l))
        if all(isinstance(o, ast.Import|ast.ImportFrom) for o in ast.parse(src).body): continue # written otherwise in the module
        body = src.split('\n', 1)[1].strip('\n'); first = code[:code.index(body)].count('\n')-src[:src.index(body)].count('\n')
        for n,function in nodes(ast.parse(src)):
            if not hasattr(n, 'lineno'): continue
            a,b = starts[n.lineno-1]+n.col_offset,starts[n.end_lineno-1]+n.end_col_offset
            for kind,now in changes(n):
                yield Mutant(module, page.name, i, a, b, first+n.lineno, n.col_offset, function, kind, s[a:b].decode(), now)

def draw(root, n, seed):
    "`n` mutants of all modules; a larger `n` holds those of a smaller one"
    all_ = list({m.key:m for k in MODULES for m in mutants(root, k)}.values())
    random.Random(seed).shuffle(all_)
    return all_[:n]

# ---------------------------------------------------------------- in a copy of the project

def copy(root, dest):
    skip = shutil.ignore_patterns('.*', '__pycache__', '_proc', '_docs', '*.egg-info', 'out', 'data', 'tutorials')
    return Path(shutil.copytree(root, dest, ignore=skip))

def write(d, m, root):
    "The notebook and the module of the mutant `m`, in the copy `d`"
    f,g = f'nbs/{m.page}',f'm3dv/{m.module}.py'; nb = json.loads((root/f).read_text(encoding='utf-8'))
    src = ''.join(nb['cells'][m.cell]['source']); s = src.encode(); new = (s[:m.start]+m.now.encode()+s[m.end:]).decode()
    nb['cells'][m.cell]['source'] = new.splitlines(True); (d/f).write_text(json.dumps(nb), encoding='utf-8')
    old,code = src.split('\n', 1)[1].strip('\n'),(root/g).read_text(encoding='utf-8'); ast.parse(new)
    (d/g).write_text(code.replace(old, new.split('\n', 1)[1].strip('\n'), 1), encoding='utf-8')

def restore(d, m, root):
    for f in (f'nbs/{m.page}', f'm3dv/{m.module}.py'): shutil.copyfile(root/f, d/f)

def preload():
    "What the pages import, so that each forked process has it"
    for m in 'fastai.callback.all matplotlib.pyplot nbdev.test plotly pytest scipy.stats sklearn.metrics skimage.measure'.split():
        importlib.import_module(m)

def tried(d, page, tests):
    "In a forked process: the page, then the test files"
    from nbdev.test import test_nb
    if not test_nb(d/'nbs'/page, do_print=True)[0]: return 1
    import pytest
    there = [str(d/'tests'/t) for t in tests if (d/'tests'/t).exists()]
    return 2 if there and pytest.main(['-x', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist', '--rootdir', str(d), *there]) else 0

def run(d, page, tests, limit, log):
    "'survived', 'page', 'tests' or 'time': what noticed"
    with tempfile.TemporaryDirectory() as tmp:
        if not (pid:=os.fork()):
            os.setsid(); os.chdir(d/'nbs'); sys.path[:0] = [str(d)]; sys.dont_write_bytecode = True
            os.environ |= dict(TMPDIR=tmp, PYTHONPATH=str(d), PYTHONDONTWRITEBYTECODE='1'); tempfile.tempdir = tmp
            f = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_TRUNC); os.dup2(f, 1); os.dup2(f, 2); rc = 3
            try: rc = tried(d, page, tests)
            finally: os._exit(rc)
        end = time.time()+limit
        while not (done:=os.waitpid(pid, os.WNOHANG))[0] and time.time()<end: time.sleep(.05)
        try: os.killpg(pid, signal.SIGKILL)
        except ProcessLookupError: pass
        if not done[0]: os.waitpid(pid, 0); return 'time'
    return {0:'survived', 1:'page', 2:'tests'}.get(os.waitstatus_to_exitcode(done[1]), 'page')

def wilson(k, n, z=1.96):
    p = k/n; mid,h = (p+z*z/2/n)/(1+z*z/n),z*(p*(1-p)/n+z*z/4/n/n)**.5/(1+z*z/n)
    return mid-h,mid+h

def tell(rows):
    "The score, by module and in all, and the survivors"
    for k in [*MODULES, None]:
        rs = [r for r in rows if k in (None, r['module'])]; n = len(rs); c = sum(r['outcome']!='survived' for r in rs)
        if n: print(f"{k or 'all':10} {c} of {n} caught, {c/n:.0%} ({' to '.join(f'{o:.0%}' for o in wilson(c, n))})")
    for r in rows:
        if r['outcome']=='survived':
            note = f"  ({r['note']})" if r['note'] else ''
            print(f"survived: {r['module']}.py:{r['line']} {r['function']}, {r['kind']}: {r['was'][:100]} → {r['now'][:100]}{note}")

def outcomes(ms):
    "A row for each mutant, tried in a copy of the project; each module's tests must pass without a change first"
    os.environ |= dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg', M3DV_CACHE='off'); preload()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp); d,clean,limit = copy(ROOT, tmp/'m'),copy(ROOT, tmp/'clean'),{}
        for k,m in {m.module:m for m in ms}.items():
            t = time.time(); got = run(d, m.page, TESTS.get(k, []), 1200, tmp/'log'); t = time.time()-t
            if got!='survived': sys.exit(f"{m.page}: fails without a change ({got})\n{(tmp/'log').read_text(errors='replace')[-3000:]}")
            limit[k] = 3*t+30; print(f"{k}: {t:.0f} s without a change", flush=True)
        for m in ms:
            write(d, m, clean); t = time.time()
            got = run(d, m.page, TESTS.get(m.module, []), limit[m.module], tmp/'log'); restore(d, m, clean); t = time.time()-t
            print(f"{got:8} {t:5.1f} s  {m}", flush=True)
            yield dict(zip(COLUMNS, [m.module, m.line, m.column, m.function, m.kind, m.was, m.now, got, f'{t:.1f}', '']))

def append(out, row):
    if out is None: return
    new = not out.exists()
    with out.open('a', encoding='utf-8', newline='') as f:
        w = csv.DictWriter(f, COLUMNS, lineterminator='\n')
        if new: w.writeheader()
        w.writerow(row)

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--n', type=int, default=300); p.add_argument('--seed', type=int, default=0)
    p.add_argument('--list', action='store_true', help='only print the mutants')
    p.add_argument('--only', help='a regular expression: of all mutants, those whose line it finds')
    p.add_argument('--out', default=str(ROOT/'results'/'mutants.csv'))
    a = p.parse_args(); out = None if a.out=='-' else Path(a.out)
    ms = [m for m in draw(ROOT, 10**9, a.seed) if re.search(a.only, str(m))] if a.only else draw(ROOT, a.n, a.seed)
    if a.list: print(*ms, f'{len(ms)} of {len(draw(ROOT, 10**9, 0))}', sep='\n'); return
    rows = list(csv.DictReader(out.open(encoding='utf-8'))) if out and out.exists() else []
    there = {(r['module'], r['line'], r['column'], r['was'], r['now']) for r in rows}
    if (old:=there-{m.key for m in ms}) and not a.only:
        sys.exit(f"{out}: {len(old)} of its rows are not in this draw; the code was changed since, or the seed: remove the file")
    for row in outcomes([m for m in ms if m.key not in there]): rows.append(row); append(out, row)
    tell(rows)

if __name__=='__main__': main()
