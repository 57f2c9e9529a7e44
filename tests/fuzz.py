"""Damaged and odd files of every format that m3dv reads: each must be read correctly, or be refused by M3dvError on one line that names it.

python tests/fuzz.py --n 20000 --seed 0     the long version; writes results/fuzz.csv (--bits 1: every bit; 0: none)
python tests/fuzz.py --only 'npz:812'       one mutant again, with its traceback

A mutant is drawn by (seed, format, number) alone. It is read in a process of its own, which may take 1 GB more than it has and 2 s of CPU;
an audit hook sees every pickle that is opened, every file that is written elsewhere, every import that a file asks for."""
import argparse, copy, csv, io, json, multiprocessing, os, re, resource, shutil, signal, struct, sys, tempfile, time, traceback, warnings
import zipfile, zlib
from collections import Counter
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
os.environ |= dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg', M3DV_CACHE='off') # before anything imports torch
import numpy as np, torch
from safetensors.torch import load, save
from m3dv.core import M3dvError, M3dvWarning
from m3dv.crossval import train_run
from m3dv.data import describe_nodule, hash_nodule, read_labels, read_nodule, read_sample
from m3dv.evaluate import oof_arrays, read_oof, spread_table
from m3dv.predict import load_network
from m3dv.recipe import load_recipe, save_recipe
from m3dv.runs import Run, check_folds, find_folds, gather_folds
from m3dv.store import CropStore
from m3dv.submission import check_submission, submission, write_submission
from m3dv.synth import synth_nodules

ROOT = Path(__file__).resolve().parent.parent
GB,SECONDS,HANGS,WIDTH = 2**30,2,60,2000 # bytes; CPU seconds for one mutant; seconds after which it is killed; characters of a message
EVERY = 1000
READ = ('same','changed','refused') # the outcomes that are well
BAIT = 'm3dv_fuzz_bait' # a module that some mutants name; nothing may import it

def pick(rng, xs): return xs[rng.integers(len(xs))]

# ---------------------------------------------------------------- bytes

ODD_INTS = [0, 1, 2, 7, 127, 128, 255, 256, 32767, 65535, 2**31-1, 2**31, 2**32-1, 2**63-1, 2**63, 2**64-1]

def put_int(rng, b, at):
    "An odd number of 1 to 8 bytes, in either order, in place of what stands at `at`"
    k = pick(rng, [1, 2, 4, 8]); v = int(pick(rng, [*ODD_INTS, len(b), len(b)-1, len(b)+1])) % 256**k
    return b[:at]+v.to_bytes(k, pick(rng, ['little', 'big']))+b[at+k:]

def one_byte_op(rng, b):
    n = len(b)
    if not n: return rng.bytes(pick(rng, [1, 64]))
    i,j = sorted(rng.integers(n+1, size=2)); at = int(rng.integers(n)) if rng.random()<.6 else int(rng.integers(min(n, 200)))
    op = rng.integers(9)
    if op==0: return b[:at]+bytes([b[at]^(1<<rng.integers(8))])+b[at+1:]
    if op==1: return b[:at]+rng.bytes(1)+b[at+1:]
    if op==2: return b[:at]
    if op==3: return b[:i]+b[min(j, i+64):]
    if op==4: return b[:at]+rng.bytes(pick(rng, [1, 4, 100]))+b[at:]
    if op==5: return b[:at]+b[i:j]+b[at:]
    if op==6: return b[:i]+bytes(min(j-i, 64))+b[min(j, i+64):]
    if op==7: return b[i:]+b[:i]
    return put_int(rng, b, at)

def in_bytes(rng, b):
    for _ in range(pick(rng, [1, 1, 2, 4])): b = one_byte_op(rng, b)
    return b

# ---------------------------------------------------------------- text

ODD_CHARS = ['\0', '\x07', '\x1b[31m', '\x7f', '\x85', '\u2028', '\u202e', '\ufeff', '\r', '\n', '\t', '"', "'", ',', ';', '\\', '/', '=',
    '<b>', '$', '{', '[', 'é', '０', '−', '🫁', '\udc80', '\ud800', ' ', '\xa0', '%s', '..', f'{BAIT}:f']
ODD_NUMBERS = ['1e999', '-1e999', '-1', 'nan', 'NaN', 'inf', 'Infinity', '1_0', '0x10', '１', '9'*30, '9'*400, '9'*5000, '1e-400', '-0',
    '1.', '.5', '+1', ' 1', '', 'None', 'null', 'true', '0.5', '1e5', '2', '1,5', '2147483648', '1e300', '0e0', '00', '1'*300_000, '[]']

def one_text_op(rng, s):
    lines = s.splitlines(True) or ['']
    i,at = int(rng.integers(len(lines))),int(rng.integers(len(s)+1))
    op = rng.integers(10)
    if op==0: return s[:at]+pick(rng, ODD_CHARS)+s[at:]
    if op<=2:
        found = list(re.finditer(r'-?\d+(\.\d+)?(e-?\d+)?', s))
        return s[:(m:=pick(rng, found)).start()]+pick(rng, ODD_NUMBERS)+s[m.end():] if found else s
    if op==3: return s[:at]+pick(rng, ['[', '{"a":', '(', '"', '[1,', '{'])*pick(rng, [1, 100, 5000, 100_000])+s[at:]
    if op==4: return ''.join(lines[:i]+lines[i:i+1]*pick(rng, [2, 3, 1000])+lines[i:])
    if op==5: return ''.join(lines[:i]+lines[i+1:])
    if op==6: return s.replace('\n', pick(rng, ['\r', '\r\n', '\n\n', '\x85', '', ' ', '\v', '\0\n']))
    if op==7: return s[:at]+pick(rng, ['x', '9', ' ', 'é', ',', '"'])*pick(rng, [1000, 200_000])+s[at:]
    if op==8: return pick(rng, ['', ' ', '\n', '\n'*9, '\ufeff', 'null', '3', '""', '[]', '{}', 'x', ',', '"'])
    swaps = [(',', ';'), (',', '\t'), ('"', "'"), ('0', 'O'), ('1', '0'), (':', '='), (',', ',,'), ('e', 'E'), ('\n', ' \n ')]
    return s.replace(*pick(rng, swaps))

def in_text(rng, b):
    "Odd characters, numbers, nesting, lines and encodings"
    s = b.decode('utf-8')
    for _ in range(pick(rng, [1, 1, 2])): s = one_text_op(rng, s)
    enc = pick(rng, ['utf-8']*6+['utf-8-sig', 'utf-16', 'utf-32', 'latin-1', 'cp932', 'utf-7', 'ascii'])
    return s.encode(enc, 'surrogatepass' if enc[:3]=='utf' and enc!='utf-7' else 'replace')

ODD_CELLS = [*ODD_NUMBERS[:-2], *ODD_CHARS, ' ', '..', 'a/b', '=1+1', '@x', '+a', 'a\nb', '007', 'NA', 'name', 'label', 'x'*10_000, 'fold9',
    'x\x1b[2J', '1.0', '-']

def in_cells(rng, b):
    "A CSV file with odd cells, rows, columns and headers"
    t = list(csv.reader(io.StringIO(b.decode('utf-8'), newline='')))
    for _ in range(pick(rng, [1, 1, 2])):
        i,j,op = int(rng.integers(len(t))),int(rng.integers(len(t[0]))),rng.integers(10)
        if op<=3: t[i] = [pick(rng, ODD_CELLS) if k==j else c for k,c in enumerate(t[i])]
        elif op==4: t[i] = t[i][:j]+t[i][j+1:]
        elif op==5: t[i] = t[i]+[pick(rng, ODD_CELLS)]
        elif op==6: t.insert(i, list(pick(rng, t)))
        elif op==7 and len(t)>1: del t[i]
        elif op==8: t = [r[j:]+r[:j] for r in t]
        else:
            v,first = pick(rng, ODD_CELLS),int(rng.integers(2))
            t = t[:first]+[[v if q==j else c for q,c in enumerate(r)] for r in t[first:]]
        if not t or not t[0]: t[:1] = [['']]
    f = io.StringIO(newline=''); csv.writer(f, lineterminator='\n', escapechar='\\', quoting=pick(rng, [0, 1])).writerows(t)
    return f.getvalue().encode('utf-8', 'surrogatepass')

# ---------------------------------------------------------------- JSON

ODD_VALUES = [None, True, False, 0, -1, 1, 2, 3, 7, 10**9, 2**31, 2**63, 10**30, -10**9, .5, -0., 1e-300, 1e300, float('nan'), float('inf'),
    '', 'a', 'x'*10_000, f'{BAIT}:f', BAIT, '0', '../x', 'a\nb', 'a\x1b[2J', '\ud800', [], [1], [0], [3000]*3, [1]*2000, [[1]], [None],
    ['a','b'], {}, {'a':1}, {'':{}}]
ODD_KEYS = ['', 'a', 'name', 'net', 'seed', 'constructor', 'args', 'format', 'classes', '__class__', 'self', 'x'*5000, 'a\nb']

def odd_value(rng): return copy.deepcopy(pick(rng, ODD_VALUES))

def spots(d, at=()):
    "The places in a JSON value"
    yield at
    for k,v in d.items() if isinstance(d, dict) else enumerate(d) if isinstance(d, list) else (): yield from spots(v, (*at, k))

def one_value_op(rng, d):
    at = pick(rng, list(spots(d)))
    if not at: return odd_value(rng) if rng.random()<.2 else d
    box = d
    for k in at[:-1]: box = box[k]
    k,op = at[-1],rng.integers(8)
    if op<=4: box[k] = odd_value(rng)
    elif op==5: del box[k]
    elif op==6 and isinstance(box, dict): box[pick(rng, [*ODD_KEYS, k+' ', k.upper()])] = odd_value(rng)
    elif isinstance(v:=box[k], (int,float)): box[k] = pick(rng, [-v, v*1000, v+1, str(v), [v], float(v)])
    return d

def in_values(rng, b):
    "A JSON file with odd values, names left out and names too many"
    d = json.loads(b)
    for _ in range(pick(rng, [1, 1, 2, 3])): d = one_value_op(rng, d)
    return json.dumps(d, indent=pick(rng, [None, 1])).encode()

# ---------------------------------------------------------------- npy, zip, safetensors

ODD_DESCR = ["('|u1',)", "'a1'", "'O'", "'<f8'", "'>u2'", "'|b1'", "'u1'", "'V1'", "'S1'", "[('a','|u1')]", "'|u1,|u1'", "'(32,)u1'", '1',
    'None', "''", "'x'", "'m8[3s]'", "('|u1',(2,))", "'U1000000000'", "'|S2147483648'", "[('','|u1')]", "{'names':['a'],'formats':['u1']}",
    "'|i1'", "b'|u1'", '()', '[]', "'M8[ns]'"]
ODD_SHAPE = ['(32,32)', '(32,32,32,1)', '(-32,-32,-32)', '(32.,32,32)', '(True,32,32)', '(1000000000,)*3',
    '(1000000000,1000000000,1000000000)', '()', '32', '[32,32,32]', "('32',32,32)", '('+'9'*5000+',)', '(0,0,0)', '(512,512,512)',
    '(31,31,31)', '(33,33,33)', '(513,513,513)', 'None', '(32768,)', '(9223372036854775808,)', '(32,32,32', '(2,)*64']
CUBE = "'fortran_order':False,'shape':(32,32,32)"
ODD_HEADER = ["{1:2,'a':3}", '{}', '[]', '1', "''", "'"+'a'*9000+"'", '('*200+')'*200, "{'descr':'|u1'}", "__import__('os')", '-'*9000,
    'lambda:0', '{**{}}', '\0', '{', 'é', "{'descr':'|u1','fortran_order':2,'shape':(32,32,32)}",
    "{'descr':'|u1','fortran_order':True,'shape':(32,32,32)}", '[]*99', '{[]:1}', '1'*5000, '0_', "f''", "{'a':1}"*2,
    f"{{'descr':'|u1',{CUBE},'x':1}}", f"{{'descr':'\\x00',{CUBE}}}", "'\\ud800'", '# -*- coding: x -*-']

def odd_npy(rng, b):
    "An npy array with an odd header: its text, its version, its length"
    n = 10+int.from_bytes(b[8:10], 'little'); head,data = b[10:n].decode('latin-1'),b[n:]
    op = rng.integers(6)
    if op==0: head = pick(rng, ODD_HEADER)
    elif op==1: head = re.sub(r"('descr': )(\[.*?\]|'[^']*')", lambda m: m[1]+pick(rng, ODD_DESCR), head)
    elif op==2: head = re.sub(r"\([\d, ]*\)", lambda m: pick(rng, ODD_SHAPE), head)
    elif op==3: head = head.replace('False', pick(rng, ['True', '0', "'a'", 'None', '[]']))
    elif op==4: data = data[:rng.integers(len(data)+1)] if rng.random()<.5 else data+rng.bytes(100)
    version = pick(rng, [(1,0)]*4+[(2,0), (3,0), (0,0), (4,0), (255,255)])
    head = head.encode('utf-8' if version==(3,0) else 'latin-1', 'replace'); head += b' '*(-(len(head)+11)%64)+b'\n'
    size = len(head)+(int(pick(rng, [-64, -1, -2, 1, 64, 30_000])) if op==5 else 0)
    k = 2 if version in ((1,0),(0,0),(255,255)) else 4
    return b'\x93NUMPY'+bytes(version)+(size % 256**k).to_bytes(k, 'little')+head+data

def npy(a):
    f = io.BytesIO(); np.save(f, a, allow_pickle=True)
    return f.getvalue()

def odd_array(rng, voxel, seg):
    "Arrays that are no nodule, or another one"
    v = [voxel.astype('f4'), voxel[:31], voxel[None], voxel.astype('>u2'), np.array([{}], object), np.array([Path()], object),
        np.zeros(0, 'u1'), np.asfortranarray(voxel), voxel[::-1], voxel*0, seg, voxel.astype('M8[s]'), voxel.view([('a','u1')]),
        np.array('x'), voxel.astype('U1'), voxel.astype(complex), np.ones((40,)*3, 'u1'), np.ones((32,)*3, '?'), seg*0, voxel.view('i1')]
    return npy(pick(rng, v))

ODD_MEMBERS = ['voxel', 'VOXEL.npy', '../voxel.npy', '/voxel.npy', 'voxel.npy/', 'x'*5000, 'a\0b', 'é.npy', 'voxel.npy', '\x1b[2J.npy',
    'a\nb', f'{"x,"*20}.npy'*9]

def in_zip(rng, b):
    "An npz file with other arrays, headers, members and fields, and with right checksums"
    with zipfile.ZipFile(io.BytesIO(b)) as z: ms = [[o, z.read(o)] for o in z.namelist()]
    voxel,seg = (np.load(io.BytesIO(m[1])) for m in ms[:2])
    i,op = int(rng.integers(2)),rng.integers(8)
    if op<=2: ms[i][1] = odd_npy(rng, ms[i][1])
    elif op==3: ms[i][1] = odd_array(rng, voxel, seg)
    elif op==4: ms[i][0] = pick(rng, ODD_MEMBERS)
    elif op==5: ms += [['x.npy', odd_array(rng, voxel, seg)]]*pick(rng, [1, 2, 300])
    elif op==6: ms = pick(rng, [ms[:1], ms[1:], [], ms[::-1], ms*2])
    f = io.BytesIO()
    how = int(pick(rng, [0, 8, 8, 8, 12, 14]))
    with warnings.catch_warnings(), zipfile.ZipFile(f, 'w') as z:
        warnings.simplefilter('ignore')
        for name,data in ms: z.writestr(zipfile.ZipInfo(name), data, how)                      # with a date of its own, not now
        if rng.random()<.1: z.comment = rng.bytes(99)
    return odd_fields(rng, f.getvalue()) if op==7 else f.getvalue()

def odd_fields(rng, b):
    "Odd bytes in the headers of a zip file's members, its directory and its end"
    for _ in range(pick(rng, [1, 2])):
        heads = [m.start() for m in re.finditer(rb'PK(\x01\x02|\x03\x04|\x05\x06)', b)]
        b = put_int(rng, b, pick(rng, heads)+4+int(rng.integers(42)))
    return b

def in_tensors(rng, b):
    "A safetensors file with an odd header, odd tensors, or one too many or too few"
    n = int.from_bytes(b[:8], 'little')
    if rng.random()<.5:
        h = in_values(rng, b[8:8+n]) if rng.random()<.7 else in_text(rng, b[8:8+n])
        return len(h).to_bytes(8, 'little')+h+b[8+n:]
    d = load(b); k = pick(rng, sorted(d)); x = d[k]; v = pick(rng, [float('nan'), float('inf'), -float('inf'), 3e38, -1e30, -1., 0.])
    other = torch.full_like(x, v) if x.is_floating_point() else x-9
    changes = [{f'{k}.x':x}, dict(x=torch.zeros(3)), *({k:o} for o in (x[None].clone(), x.double(), x.half(), x.int(), x.bool(), other,
        torch.zeros(0), torch.cat([x.flatten()]*3)))]
    if (i:=int(rng.integers(len(changes)+1)))<2: d.pop(k)
    if i<len(changes): d |= changes[i]
    return save(d)

def in_store(rng, b):
    "A file of crops with an odd header of its crops or of its table"
    n = b.rindex(b'\x93NUMPY')
    return odd_npy(rng, b[:n])+b[n:] if rng.random()<.5 else b[:n]+odd_npy(rng, b[n:])

KINDS = dict(zip=(in_bytes, in_zip, odd_fields), csv=(in_bytes, in_text, in_cells), json=(in_bytes, in_text, in_values),
    tensors=(in_bytes, in_tensors), npy=(in_bytes, in_store))

# ---------------------------------------------------------------- checksums made right again

def sealed_network(files):
    "The JSON of a network with the checksums of its weights and of itself"
    d = json.loads(files['n.json'])
    if isinstance(d, dict):
        d = {k:v for k,v in d.items() if k!='checksum'} | dict(weights=sha256(files['n.safetensors']).hexdigest())
        d |= dict(checksum=sha256(json.dumps(d, sort_keys=True).encode()).hexdigest())
    return {'n.json':json.dumps(d).encode()}

def sealed_run(files):
    "The records of a run's folds with the checksums of their files"
    res = {}
    for name in ('seed0_fold0', 'seed0_fold1'):
        d = json.loads(files[f:=f'folds/{name}.json'])
        if isinstance(d, dict) and isinstance(d.get('files'), dict):
            d['files'] = {k:sha256(files[k.format(name)]).hexdigest()[:16] if k.format(name) in files else v for k,v in d['files'].items()}
        res[f] = json.dumps(d).encode()
    return res

SEALS = dict(network=sealed_network, run=sealed_run)

# ---------------------------------------------------------------- the formats

SCRATCH = [None] # the folder in which everything is written
TINY = dict(name='tiny', side=8, margin=0, epochs=1, bs=4, n_folds=2, net_args=dict(nf=2, k=1, blocks=[1], bottleneck=1))

@lru_cache
def small_nodule():
    "A nodule of few bytes"
    z = np.indices((32,)*3)-16; r = (z**2).sum(0)
    return np.where(r<60, 160, 40).astype(np.uint8), r<60

def make_seeds(d):
    "One folder per format, with documents that the package writes"
    synth_nodules(d/'data', 8, 2, side=32, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); train_run(d/'data', d/'out', TINY, jobs=1, device='cpu', progress=False)
    for f in FORMATS: (d/f).mkdir(exist_ok=True)
    shutil.copy2(d/'data'/'train_val'/'candidate1.npz', d/'npz'/'drawn.npz')
    np.savez_compressed(d/'npz'/'small.npz', voxel=small_nodule()[0], seg=small_nodule()[1])
    np.savez(d/'npz'/'stored.npz', voxel=small_nodule()[0], seg=small_nodule()[1])
    rows = [l.split(',') for l in (d/'data'/'train_val.csv').read_text().splitlines()]
    (d/'labels'/'train_val.csv').write_text(''.join(f"{a},{b},{'group' if not i else f'p{i//2}'}\n" for i,(a,b) in enumerate(rows)))
    seeds = dict(sample='data/sampleSubmission.csv', submission='out/submission.csv', oof='out/oof.csv', recipe='out/recipe.json')
    for to,f in seeds.items(): shutil.copy2(d/f, d/to)
    for e in ('json','safetensors'):
        shutil.copy2(d/'out'/'models'/f'seed0_fold0.{e}', d/'network'/f'n.{e}')
        shutil.copy2(ROOT/'tests'/'fixtures'/f'm3dv-0.3.0.{e}', d/'network'/f'old.{e}')
    shutil.copytree(d/'out', d/'run', dirs_exist_ok=True)
    np.savez_compressed(d/'store'/'a.npz', voxel=small_nodule()[0], seg=small_nodule()[1])
    crops(d/'store')

def plain(names):
    "Nothing but names that a person can read on one line, each once"
    assert len(set(names))==len(names), 'a name twice'
    for o in names:
        assert isinstance(o, str) and o.strip() and o.replace('\xa0', ' ').isprintable(), f'name {o!r}'
        assert not re.search(r'[/\\]|^[.][.]?$', o), f'name {o!r}'

def nodule(f):
    n = read_nodule(f); describe_nodule(*n)
    assert n.voxel.dtype==np.uint8 and n.seg.dtype==bool and n.voxel.shape==n.seg.shape and n.voxel.ndim==3 and len(set(n.seg.shape))==1
    return hash_nodule(n)

def labels(f):
    d = read_labels(f); plain(d.name.tolist()); assert set(d.label)<={0,1}
    return d.to_dict('list')

def sample(f):
    s = read_sample(f, ['candidate3', 'candidate8']); plain(s.ids); assert all(h.isprintable() and h for h in s.header), 'header'
    return [s.header, s.ids, s.id_col]

def use_sample(f, v):
    "A submission in the sample's form is written and is what was asked for"
    s = read_sample(f); p = np.linspace(0, 1, len(s.ids))
    write_submission(submission(s.ids, p, s), f.with_name('out.csv'), s); assert check_submission(f.with_name('out.csv'), s)==len(s.ids)

def recipe(f): return repr(load_recipe(f))

def use_recipe(f, v):
    r = load_recipe(f); hash(r); plain([r.name]); assert len(repr(r))<WIDTH*10
    assert load_recipe(save_recipe(r, f.with_name('again.json')))==r

def network(f):
    n = load_network(f.with_suffix(''))
    assert all(torch.isfinite(p).all() for p in n.net.state_dict().values()), 'weights that are no numbers'
    return repr(n)+str(zlib.crc32(save({k:v.contiguous() for k,v in n.net.state_dict().items()})))

def use_network(f, v):
    p = load_network(f.with_suffix('')).predict([small_nodule()]); assert len(p)==1 and ((p>=0)&(p<=1)).all()

def crops(d, memory=1.): return CropStore(8, cache=d, memory=memory).get([d/'a.npz']).numpy().tobytes()
def store(f): return [crops(f.parent), crops(f.parent, 0)]

def oof(f):
    d = read_oof(f); assert np.isfinite(d.p).all() and set(d.label)<={0,1}
    plain(list(dict.fromkeys(d.name))); plain(list(dict.fromkeys(d.recipe)))
    for c in ('repeat','fold','seed'): assert d[c].dtype.kind=='i' and (d[c]>=0).all(), c
    return d.to_dict('list')

def use_oof(f, v): d = read_oof(f); oof_arrays(d); spread_table(d, 'fold')

RUN_PARTS = ['oof', 'baselines', 'history', 'scores', 'submission', 'networks', 'str', 'done', 'folds', 'gather']

def run(f):
    "What a run's folder says, part by part: a part that is refused says so in one line"
    d = next(p for p in f.parents if p.name=='run'); res,r,data = {},Run(d),d.parent/'data'
    look = dict(str=lambda: str(r), done=lambda: [r.done, r.left], networks=lambda: [repr(n) for n in r.networks('cpu')],
        folds=lambda: find_folds(d).to_dict('list'), gather=lambda: gather_folds(data, d, check_folds(find_folds(d), data)).to_dict('list'))
    for k in RUN_PARTS:
        try: v = look[k]() if k in look else getattr(r, k).to_dict('list')
        except M3dvError as e: v = e; one_line(e, d, 'seed0_fold0', 'seed0_fold1')
        res[k] = str(v)
    return res

def no_use(f, v): pass

FORMATS = dict( # how each is read and used; its documents: file, kind, whether a damaged byte may change what is read
    npz=(nodule, no_use, [('drawn.npz', 'zip', False), ('small.npz', 'zip', False), ('stored.npz', 'zip', False)]),
    labels=(labels, no_use, [('train_val.csv', 'csv', True)]), sample=(sample, use_sample, [('sampleSubmission.csv', 'csv', True)]),
    submission=(check_submission, no_use, [('submission.csv', 'csv', True)]), recipe=(recipe, use_recipe, [('recipe.json', 'json', True)]),
    network=(network, use_network, [('n.json', 'json', False), ('n.safetensors', 'tensors', False), ('old.json', 'json', True),
        ('old.safetensors', 'tensors', True)]),
    store=(store, no_use, [('crops*.npy', 'npy', False)]), oof=(oof, use_oof, [('oof.csv', 'csv', True)]),
    run=(run, no_use, [(f, 'tensors' if f.endswith('s') else f.rsplit('.')[-1], True) for f in [
        'recipe.json', 'oof.csv', 'baselines.csv', 'history.csv', 'scores.csv', 'submission.csv', 'folds/seed0_fold0.csv',
        'folds/seed0_fold0.json', 'folds/seed0_fold1_log.csv', 'models/seed0_fold0.json', 'models/seed0_fold1.safetensors']]))

# ---------------------------------------------------------------- what no random change finds

def zipped(**arrays):
    f = io.BytesIO(); np.savez_compressed(f, **arrays)
    return f.getvalue()

def blank_header():
    "An npz whose header is 400 MB of blanks"
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w', 8, compresslevel=1) as z, z.open('voxel.npy', 'w', force_zip64=True) as h:
        h.write(b'\x93NUMPY\x02\x00'+struct.pack('<I', 25*2**24))
        for _ in range(25): h.write(b' '*2**24)
    return f.getvalue()

def net_json(b, **changes): d = json.loads(b); d['net'] |= changes; return json.dumps(d).encode()

def board(n): i = np.arange(n)%2==0; return i[:,None,None]^i[:,None]^i

def full(n, seg=None): return zipped(voxel=np.zeros((n,)*3, 'u1'), seg=np.ones((n,)*3, '?') if seg is None else seg)

NESTED = {f'{s[:3]} nested':s.encode()*100_000 for s in ('[', '{"a":')}
NETS = [('stride', 0), ('k', -1), ('nf', 10**9), ('nf', 1e9), ('nf', 40_000), ('eps', -5), ('blocks', [3000]*3), ('blocks', []),
    ('blocks', [1]*40),
    ('bottleneck', 10**6), ('n_out', 10**8), ('c_in', 10**7), ('theta', 1e9), ('k', 10**5), ('momentum', 1e30), ('constructor',
    f'{BAIT}:f'),
    ('constructor', 'os:system')]
BOMBS = dict( # format: name → (file, bytes from the seed's bytes); those in LARGE take seconds to make
    npz={k:('drawn.npz', f) for k,f in dict(blank_header=lambda b: blank_header(), full_mask=lambda b: full(512),
        board=lambda b: full(512, board(512)), side_512=lambda b: full(512, np.zeros((512,)*3, '?')),
            too_large=lambda b: full(600)).items()},
    recipe={k:('recipe.json', lambda b, v=v: v) for k,v in NESTED.items()} | dict(bom=('recipe.json', lambda b: b'\xef\xbb\xbf'+b),
        large=('recipe.json', lambda b: b'['+b'1,'*10_000_000+b'1]')),
    network={k:('n.json', lambda b, v=v: v) for k,v in NESTED.items()} |
        {f'{k} {v}'[:30]:('n.json', lambda b, k=k, v=v: net_json(b, **{k:v})) for k,v in NETS},
    labels={k:('train_val.csv', f) for k,f in dict(wide=lambda b: b'name,label'+b',a'*200_000+b'\n',
        long=lambda b: b'name,label\n'+b''.join(b'a%d,1\n'%i for i in range(100_000)),
        cell=lambda b: b'name,label\n"'+b'x'*2_000_000+b'",1\n').items()},
    oof=dict(wide=('oof.csv', lambda b: b.replace(b'\n', b',1'*20_000+b'\n'))))
SHARE = dict(run=.4) # of the mutants, against 1 of each other format: what a run's folder says takes a quarter of a second
LARGE = {'blank_header', 'full_mask', 'board', 'side_512', 'too_large', 'large', 'long', 'wide'}

# ---------------------------------------------------------------- the judge

class Escape(Exception):
    "What a reader must not do; the first argument is the outcome"

def one_line(e, d, *names):
    "The message of a refusal is one printable line that names a file in `d`"
    s = str(e)
    if not s.isprintable(): raise Escape('several lines' if len(s.splitlines())>1 else 'control characters', s[:300])
    if len(s)>WIDTH: raise Escape('long message', s[:100])
    if str(d) not in s and not any(n in s for n in names): raise Escape('file not named', s[:300])

EVENTS = [] # what the audit hook saw
CHANGES = ('os.mkdir', 'os.rename', 'os.remove', 'os.symlink', 'os.truncate')
WRITES = os.O_WRONLY|os.O_RDWR|os.O_CREAT|os.O_TRUNC|os.O_APPEND

def watch(event, args):
    if not EVENTS or EVENTS[0] is not True: return
    if event=='pickle.find_class': EVENTS.append(('pickle', f'{args[0]}.{args[1]}'))
    elif event=='import' and args[0].startswith(BAIT): EVENTS.append(('import', args[0]))
    elif event in ('os.system', 'subprocess.Popen', 'socket.connect', 'os.exec'): EVENTS.append(('ran', event))
    elif event in ('open', *CHANGES) and isinstance(args[0], (str,bytes,os.PathLike)):
        if event=='open' and not args[2] & WRITES: return
        for p in args[:1+(event in ('os.rename', 'os.symlink'))]:
            if not os.path.abspath(os.fsdecode(p)).startswith(str(SCRATCH[0])): EVENTS.append(('wrote outside', f'{event} {p}'))

def memory_ran_out(e, seen=()):
    "Is there a lack of memory among the reasons of an exception? Reasons may form a ring"
    if e is None or e in seen: return False
    if isinstance(e, MemoryError) or 'allocate memory' in str(e): return True
    return any(memory_ran_out(o, (*seen, e)) for o in (e.__cause__, e.__context__))

def where(e):
    "The last lines of a traceback: exception, place in the package, place where it was raised"
    fs = traceback.extract_tb(e.__traceback__); own = [f for f in fs if '/m3dv/' in f.filename]
    at = [f"{Path(f.filename).name}:{f.lineno} {f.name}: {f.line}" for f in [*own[-2:], fs[-1]]]
    return f"{type(e).__name__}: {str(e)[:200]!r} | "+' | '.join(dict.fromkeys(at))

def judge(fmt, f, seed, may_change):
    "Read the file `f`: the outcome, and what an escape said"
    read,use,_ = FORMATS[fmt]; names = [o for p in f.parent.glob('*') for o in (p.name, p.stem)]
    try:
        v = read(f)
        if repr(v)==repr(seed): return 'same',''
        if not may_change: return 'changed in silence',str(v)[:100]
    except M3dvError as e:
        if memory_ran_out(e): return 'memory',where(e)
        try: one_line(e, f.parent, *names)
        except Escape as o: return o.args[0],where(e)
        return 'refused',''
    try: use(f, v)
    except M3dvError as e:
        if memory_ran_out(e): return 'memory',where(e)
        try: one_line(e, '')
        except Escape as o: return o.args[0],where(e)
    return 'changed',''

def judged(fmt, f, seed, may_change):
    "The same, with whatever else can happen"
    EVENTS[:] = [True]; t = time.process_time()
    resource.setrlimit(resource.RLIMIT_CPU, (int(t+2*SECONDS)+1, resource.RLIM_INFINITY))
    try: out = judge(fmt, f, seed, may_change)
    except Escape as e: out = e.args[0],str(e.args[1])
    except AssertionError as e: out = 'nonsense accepted',where(e)
    except BaseException as e: out = ('memory' if memory_ran_out(e) else 'exception'),where(e)
    seen,t = EVENTS[1:],time.process_time()-t; EVENTS.clear()
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY,)*2)
    if seen: out = seen[0]
    if t>SECONDS: out = 'slow',f"{t:.1f} s of CPU, {out[0]}"
    return *out,t

# ---------------------------------------------------------------- the process that reads

def mutant(fmt, job, seeds):
    "File, how it was changed, the bytes of all files that differ, and whether it may read otherwise, of the mutant `job`"
    kind,docs = job[1],FORMATS[fmt][2]
    if kind=='bit': _,_,rel,i = job; b = bytearray(seeds[rel]); b[i//8] ^= 1<<i%8; how,b = 'bit',bytes(b)
    elif kind=='bomb': rel,make = BOMBS[fmt][job[2]]; how,b = 'bomb',make(seeds[rel])
    else:
        rng = np.random.default_rng([job[2], zlib.crc32(fmt.encode()), job[3]])
        pat,k,_ = pick(rng, docs); rel = next(r for r in seeds if Path(r).match(pat) and len(Path(r).parts)==len(Path(pat).parts))
        f = pick(rng, KINDS[k]); how,b = f.__name__.removeprefix('in_').replace('_', ' '),f(rng, seeds[rel])
    may = next(m for p,_,m in docs if Path(rel).match(p)) or how in ('zip','bomb'); fs = {rel:b}
    if fmt in SEALS and not rel.startswith('old') and kind!='bit' and (kind=='bomb' or rng.random()<.7):
        try: fs |= SEALS[fmt](seeds | fs)
        except (ValueError, RecursionError): pass
        else: how,may = f'{how}, sealed',True
    return rel,how,fs,may

def everything(d): return {p.relative_to(d).as_posix():p.read_bytes() for p in sorted(d.rglob('*')) if p.is_file()}

def restore(d, seeds):
    now = everything(d)
    for r in now.keys()-seeds.keys(): (d/r).unlink()
    for r,b in seeds.items():
        if now.get(r)!=b: (d/r).write_bytes(b)

def child(conn, root, seeds):
    "Answer each job with its outcome; the bytes of what escapes come with it"
    SCRATCH[0] = root; torch.set_num_threads(1); sys.addaudithook(watch); value = {}
    warnings.simplefilter('error'); warnings.simplefilter('ignore', M3dvWarning)
    for fmt in seeds:
        for rel in seeds[fmt]:
            if not any(Path(rel).match(p) for p,_,_ in FORMATS[fmt][2]): continue
            v = value[fmt,rel] = FORMATS[fmt][0](root/fmt/rel); FORMATS[fmt][1](root/fmt/rel, v)
        restore(root/fmt, seeds[fmt])
    now = int(Path('/proc/self/statm').read_text().split()[0])*resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now+GB,)*2); conn.send('ready')
    while (job:=conn.recv()) is not None:
        fmt,d = job[0],root/job[0]
        try: rel,how,fs,may = mutant(fmt, job, seeds[fmt])
        except Exception: conn.send(f'{job}: no mutant was made\n{traceback.format_exc()}'); continue
        for r,b in fs.items(): (d/r).write_bytes(b)
        out,why,t = judged(fmt, d/rel, value[fmt,rel], may)
        restore(d, seeds[fmt])
        conn.send((rel, how, out, why, t, b'' if out in READ else fs[rel]))

class Reader:
    "A forked process that reads mutants, begun anew when one has killed it"
    def __init__(self, root, seeds): self.root,self.seeds,self.p = root,seeds,None
    def start(self):
        self.conn,there = multiprocessing.Pipe()
        self.p = multiprocessing.get_context('fork').Process(target=child, args=(there, self.root, self.seeds), daemon=True)
        self.p.start(); there.close()
        assert self.conn.recv()=='ready'
    def ask(self, job):
        if self.p is None: self.start()
        self.conn.send(job)
        try:
            if self.conn.poll(HANGS):
                if isinstance(res:=self.conn.recv(), tuple): return res
                raise RuntimeError(res)
            out = 'slow',f'killed after {HANGS} s'
        except EOFError:
            self.p.join(); rc = self.p.exitcode
            out = ('slow', f'stopped after {2*SECONDS} s of CPU') if rc==-signal.SIGXCPU else ('died', f'exit code {rc}')
        self.stop()
        for fmt,s in self.seeds.items(): restore(self.root/fmt, s)
        rel,how,fs,_ = mutant(job[0], job, self.seeds[job[0]])
        return rel,how,*out,0.,fs[rel]
    def stop(self):
        if self.p is not None: self.p.kill(); self.p.join(); self.conn.close(); self.p = None

# ---------------------------------------------------------------- all of it

def jobs(seeds, n, seed, bits, large, formats):
    "`n` mutants of all formats together, the bombs, and every `bits`-th bit of a small npz, network and store"
    share = {f:SHARE.get(f, 1) for f in formats}
    for f in formats:
        yield from ((f, 'random', seed, i) for i in range(round(n*share[f]/sum(share.values()))))
        yield from ((f, 'bomb', k) for k in BOMBS.get(f, ()) if large or k not in LARGE)
    small = [(f, r) for f in formats for r in seeds[f] if bits and (r.startswith(('n.', 'crops')) or r=='small.npz')]
    for f,r in small: yield from ((f, 'bit', r, i) for i in range(seed%bits, 8*len(seeds[f][r]), bits))

def escaped(counts): return sum(v for k,v in counts.items() if k[2] not in READ)

def fuzz(n=20_000, seed=0, bits=1, large=True, formats=FORMATS, keep=None, only=(), made=None, progress=print):
    "Counts of (format, how, outcome), and the smallest of each kind of escape: {key: (job, file, outcome, why, bytes)}"
    counts,found,slowest,t = Counter(),{},Counter(),time.time()
    with tempfile.TemporaryDirectory() as tmp:
        SCRATCH[0] = root = Path(tmp).resolve()
        if made: shutil.copytree(made, root, dirs_exist_ok=True)
        else: make_seeds(root)
        seeds = {f:everything(root/f) for f in formats}; reader = Reader(root, seeds)
        try:
            for i,job in enumerate(only or jobs(seeds, n, seed, bits, large, list(formats))):
                rel,how,out,why,sec,b = reader.ask(job)
                counts[job[0],how,out] += 1; slowest[job[0],how] = max(slowest[job[0],how], sec)
                if out not in READ:
                    why = why.replace(str(root), '…'); key = job[0],out,re.sub(r"\d+|'[^']*'", '#', why.split(' | ', 1)[-1])
                    if key not in found or len(b)<len(found[key][-1]): found[key] = job,rel,out,why,b
                if i%EVERY==EVERY-1: progress(f"{job[0]}: {i+1} mutants, {escaped(counts)} escaped, {time.time()-t:.0f} s", flush=True)
        finally: reader.stop()
    if keep:
        Path(keep).mkdir(parents=True, exist_ok=True)
        for job,rel,_,_,b in found.values():
            name = re.sub(r'[^\w.-]', '_', f"{'-'.join(map(str, job))}-{Path(rel).name}")
            if len(b)<2**20: (Path(keep)/name).write_bytes(b)
    return counts,found,slowest

def table(counts, slowest):
    "Rows of format, how, mutants, and how often each outcome came"
    outs = [*READ, *sorted({o for _,_,o in counts}-set(READ))]
    yield ['format', 'change', 'mutants', *outs, 'slowest_s']
    for f,h in sorted({(f,h) for f,h,_ in counts}, key=lambda k: (list(FORMATS).index(k[0]), k[1])):
        ns = [counts[f,h,o] for o in outs]
        yield [f, h, sum(ns), *ns, f"{slowest[f,h]:.2f}"]

def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('--n', type=int, default=20_000, help='mutants of all formats together, beside the bombs and the bits')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--bits', type=int, default=1, help='every how manieth bit of a small npz, network and store; 0: none')
    p.add_argument('--formats', nargs='+', default=list(FORMATS))
    p.add_argument('--only', nargs='+', help='FORMAT:NUMBER, or FORMAT:name of a bomb')
    p.add_argument('--keep', help='folder for the bytes of what escapes'); p.add_argument('--out', default=str(ROOT/'results'/'fuzz.csv'))
    a = p.parse_args()
    only = [(f, 'random', a.seed, int(i)) if i.isdecimal() else (f, 'bomb', i) for f,_,i in (o.partition(':') for o in a.only or ())]
    counts,found,slowest = fuzz(a.n, a.seed, a.bits, True, a.formats, a.keep, only)
    rows = list(table(counts, slowest))
    for r in rows: print(*(f'{c!s:>{9 if i else 12}}' for i,c in enumerate(r)))
    for job,rel,out,why,b in found.values(): print(f"\n{out}: {':'.join(map(str, job))} {rel} ({len(b)} bytes)\n  {why}")
    print(f"\nseed {a.seed}: {sum(counts.values())} mutants, {escaped(counts)} escaped in {len(found)} ways")
    if not only and a.out!='-':
        with open(a.out, 'w', newline='') as f: csv.writer(f, lineterminator='\n').writerows(rows)
    return bool(found)

if __name__=='__main__': sys.exit(main())
