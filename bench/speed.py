"""m3dv beside MONAI, TorchIO and plain PyTorch: writes results/speed_*.csv, results/profile_*.csv and results/machine.json.

    python bench/speed.py                      all parts, on synthetic nodules
    python bench/speed.py augment train        some of them
    python bench/speed.py --data DIR           on a competition folder
    python bench/speed.py --quick              a smoke test of some minutes, without the 5-fold run; tables in out/bench/quick only

`make bench` runs it. Contenders are processes of bench/contenders.py. They prepare and warm up one after the other, then take turns, a
round each, while the others wait. What is written is the median, the quartiles, and the ratio of medians to the first contender of its
group with a 95 % interval from a bootstrap of the rounds: a ratio of 2 says that m3dv is twice as fast, or takes half the memory.
"""
import argparse, json, os, platform, shutil, signal, subprocess, sys, tempfile, threading, time
import importlib.metadata as md
import numpy as np, pandas as pd, psutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from scipy.stats import bootstrap

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT/'out'/'bench'
CORES = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
ONE,TWO = dict(threads=1),dict(threads=2)
PAIR = dict(threads=1, procs=2)

# ---------------------------------------------------------------- processes

class Failed(Exception): pass

class Contender:
    "One or more processes of contenders.py that do rounds on demand; `fresh` ones are started for each round"
    def __init__(self, who, name, threads=1, procs=1, fresh=False, before=None, **o):
        self.who,self.name,self.fresh,self.before,self.ps = who,name,fresh,before,[]
        self.how = f'{procs} processes of {threads} thread' if procs>1 else f'{threads} thread{"s" if threads>1 else ""}'
        self.os = [o|dict(threads=threads, fold=i) for i in range(procs)]

    def start(self):
        env = os.environ|{k:str(self.os[0]['threads']) for k in ('OMP_NUM_THREADS','MKL_NUM_THREADS')}
        env |= dict(PYTHONPATH=str(ROOT), HF_HUB_OFFLINE='1')
        for o in self.os:
            log = tempfile.TemporaryFile('w+')
            p = subprocess.Popen([sys.executable, str(ROOT/'bench'/'contenders.py'), self.name, json.dumps(o, default=str)],
                                 stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=log, text=True, env=env)
            p.log = log; self.ps.append(p)
        for p in self.ps: self.read(p)
        return self

    def read(self, p):
        l = p.stdout.readline().strip()
        if l: return l
        p.wait(); p.log.seek(0)
        raise Failed(f"{self.who} ({self.name}) ended with exit code {p.returncode}:\n{p.log.read()[-3000:]}")

    def go(self):
        "Answers of one round of all processes at once"
        for p in self.ps: p.stdin.write('go\n'); p.stdin.flush()
        return [json.loads(self.read(p)) for p in self.ps]

    def round(self):
        "Nodules per second of one round, or 1/s where the amount is one"
        if self.before: self.before()
        if self.fresh: self.start()
        try: return sum(r['n']/r['seconds'] for r in self.go())
        finally:
            if self.fresh: self.stop()

    def stop(self):
        "End the processes: they end by themselves when their input does, unless they are in the middle of something"
        for p in self.ps: p.stdin.close()
        for p in self.ps:
            try: p.wait(10)
            except subprocess.TimeoutExpired: p.kill(); p.wait()
            p.stdout.close(); p.log.close()
        self.ps = []

class Peak(threading.Thread):
    """The largest memory that processes and their children hold together, MB: shared pages count once.
    `own` leaves out pages of files, which the system can drop and read again"""
    def __init__(self, pids, every=.2):
        super().__init__(daemon=True)
        self.pids,self.every,self.total,self.own,self.done = pids,every,0,0,threading.Event()
    def sample(self):
        tot,own = 0,0
        for pid in self.pids:
            try: tree = [pid]+[c.pid for c in psutil.Process(pid).children(recursive=True)]
            except psutil.Error: continue
            for k in tree:
                try: d = dict(l.split(':') for l in Path(f'/proc/{k}/smaps_rollup').read_text().splitlines()[1:])
                except (OSError, ValueError): continue
                kb = lambda f, d=d: int(d[f].split()[0]) if f in d else 0
                tot += kb('Pss'); own += kb('Pss_Anon')+kb('Pss_Shmem')
        self.total,self.own = max(self.total, tot/1024),max(self.own, own/1024)
    def run(self):
        while not self.done.wait(self.every): self.sample()
    def __enter__(self): self.start(); return self
    def __exit__(self, *_): self.sample(); self.done.set(); self.join()

# ---------------------------------------------------------------- rounds and tables

def say(*o): print(*o, flush=True)

def in_turn(contenders, rounds, label, warm=True):
    "Rates of all contenders, (rounds, contenders), measured in turn"
    say(f"{label}: {len(contenders)} contenders, {rounds} rounds"); begun,res = time.time(),[]
    try:
        if warm:
            for c in contenders:
                if not c.fresh: c.start()
            say(f"  ready after {time.time()-begun:.0f} s")
        t = time.time()
        for i in range(rounds):
            res.append([c.round() for c in contenders])
            say(f"  round {i+1} of {rounds}, about {(time.time()-t)/(i+1)*(rounds-i-1):.0f} s left")
    finally:
        for c in contenders: c.stop()
    return np.array(res)

def quart(v): return dict(zip(('median','lo','hi'), np.quantile(v, [.5,.25,.75])))

def ratio(a, b):
    "Ratio of the medians of paired samples `a` and `b`, and its 95 % interval"
    r = np.median(a)/np.median(b)
    if len(a)<3 or np.array_equal(a, b): return dict(ratio=r, ratio_lo=np.nan, ratio_hi=np.nan)
    i = bootstrap((a, b), lambda a, b, axis=-1: np.median(a, axis)/np.median(b, axis), paired=True, vectorized=True, method='percentile',
                  n_resamples=2000, rng=0).confidence_interval
    return dict(ratio=r, ratio_lo=i.low, ratio_hi=i.high)

def rows(what, contenders, vs, unit):
    "A group of the table from values (rounds, contenders); the first contender is what the others are compared with"
    up = unit==PER_S
    def times(v): return ratio(vs[:,0], v) if up else ratio(v, vs[:,0])
    return [dict(what=what, who=c.who, how=c.how) | quart(v) | dict(unit=unit) | times(v) | dict(n=len(v)) for c,v in zip(contenders, vs.T)]

PER_S,MS,S,MB = 'nodules/s','ms per nodule','s','MB'
FROM_RATE = {PER_S:lambda r: r, MS:lambda r: 1000/r, S:lambda r: 1/r}

def compare(a, groups, label, unit, rounds=None):
    "Measure groups of contenders, all in turn, as one table; a smoke test takes the first group"
    if a.quick: groups = dict(list(groups.items())[:1])
    flat = [c for g in groups.values() for c in g]; rates = in_turn(flat, rounds or a.rounds, label); res,i = [],0
    for what,g in groups.items(): res += rows(what, g, FROM_RATE[unit](rates[:,i:i+len(g)]), unit); i += len(g)
    return res

# ---------------------------------------------------------------- the parts

def part_check(a):
    "do all do the same work?"
    c = Contender('check', 'agree', data=a.data); res,bad = c.start().go()[0],[]; c.stop()
    t = pd.DataFrame(res, columns='what who figure value limit'.split()); bad = t[t.value.abs()>t.limit]
    if len(bad): raise Failed(f"the contenders do not do the same work:\n{bad.to_string()}")
    return t

def part_load(a):
    "reading the files and cutting the crops"
    n = dict(n=a.files, data=a.data)
    def g(*who, **o): return [Contender(w, f, **n, **o) for w,f in who]
    ours,monai,torchio = ('m3dv','load_m3dv'),('MONAI CacheDataset','load_monai'),('TorchIO','load_torchio')
    return compare(a, {'files to crops of 48, one thread':g(ours, monai, torchio),
                       'files to crops of 48, two threads':g(ours, monai, **TWO)}, 'load', MS)

def part_augment(a):
    "flips and an affine map of a cube of 64 and its mask, to 32"
    def g(**t):
        o = dict(data=a.data, seconds=a.seconds)|t
        return [Contender('m3dv', 'aug_m3dv', **o), Contender('MONAI', 'aug_monai', **o),
                Contender('MONAI, lazy', 'aug_monai', lazy=True, **o), Contender('TorchIO', 'aug_torchio', **o),
            Contender('TorchIO, cut to 56 first', 'aug_torchio', first=56, **o)]
    return compare(a, {'one thread':g(**ONE), 'two threads':g(**TWO)}, 'augment', MS)

def part_step(a):
    "a training step on one batch"
    def g(nets, **t): return [Contender(w, 'step', net=n, bs=8, seconds=a.seconds, keep=w in ('m3dv', kept), **t) for w,n in nets.items()]
    kept = 'plain, channels last, freed memory kept'
    dft,rep = [{'m3dv':k, kept:f'stock {k} channels last', 'plain PyTorch, channels last':f'stock {k} channels last'}
               for k in ('default','report')]
    dft['MONAI DenseNet121'] = 'monai'; rep['plain PyTorch'] = 'stock report'
    return compare(a, {f'{k} network, {w}':g(n, **t) for k,n in (('default',dft), ('report',rep))
                       for w,t in (('one thread',ONE), ('two threads',TWO))}, 'step', PER_S)

def part_train(a):
    "training the report's network, end to end"
    o = dict(data=a.data, recipe='report', share=a.share, bs=16)
    plain = (('plain PyTorch, channels last', 'stock report channels last'), ('plain PyTorch', 'stock report'))
    def g(**t): return [Contender('m3dv', 'fit_m3dv', **o, **t), *[Contender(w, 'fit_stock', net=n, **o, **t) for w,n in plain]]
    both = {'report network, two processes':g(**PAIR), 'report network, one process of two threads':g(**TWO)}
    return compare(a, both, 'train', PER_S, a.few)

def epochs(a, **kw):
    "Contenders of an epoch of the default recipe with both cores; of two processes each does half an epoch"
    d = dict(data=a.data, **kw); o = dict(recipe='default', share=a.epoch_share, **d)
    cs = [Contender('m3dv', 'fit_m3dv', **o, **PAIR), Contender('m3dv, one process', 'fit_m3dv', **o|dict(share=1.), **TWO),
        Contender('MONAI, DenseNet121', 'fit_monai', net='monai', **d, **TWO),
        Contender('MONAI, DenseNet121, one thread', 'fit_monai', net='monai', **d, **ONE),
        Contender("MONAI, m3dv's network in plain PyTorch", 'fit_monai', net='stock default', **d, **TWO),
        Contender("TorchIO, m3dv's network in plain PyTorch", 'fit_torchio', net='stock default', **d, **TWO),
        Contender('plain PyTorch, channels last', 'fit_stock', net='stock default channels last', **o, **PAIR)]
    return cs[:3:2] if a.quick else cs

def part_epoch(a):
    "an epoch with augmentation, the default recipe"
    return compare(a, {'default recipe, both cores':epochs(a)}, 'epoch', PER_S, a.few)

def part_memory(a):
    "memory of an epoch"
    cs = epochs(a, limit=6); say(f"memory: {len(cs)} contenders, one at a time, {a.few} rounds"); res = np.zeros((a.few, len(cs)))
    for i in range(a.few):
        for j,c in enumerate(cs):
            begun = c.start()
            with Peak([p.pid for p in begun.ps]) as m: c.go()
            c.stop(); res[i,j] = m.total
        say(f"  round {i+1} of {a.few}")
    return rows('peak of all processes, default recipe', cs, res, MB)

def part_start(a):
    "starting"
    imp = lambda who, code, after: Contender(who, 'imports', fresh=True, code=code, after=after)
    fast = 'from fastai.basics import *; from fastai.callback.all import *'
    res = compare(a, {"imports":[
        imp('m3dv.learner, beyond fastai', 'import m3dv.learner', fast), imp('fastai, beyond torch', fast, 'import torch'),
        imp('MONAI, beyond torch', 'import monai.data, monai.transforms, monai.networks.nets', 'import torch'),
        imp('TorchIO, beyond torch', 'import torchio', 'import torch')]}, 'imports', S)
    for r in res: r.update(ratio=np.nan, ratio_lo=np.nan, ratio_hi=np.nan)                 # beyond different things: no comparison
    with tempfile.TemporaryDirectory() as d:
        o = dict(data=a.data, fresh=True)
        warm = [Contender('m3dv', 'start_m3dv', cache=f'{d}/m3dv', **o),
                Contender('MONAI PersistentDataset', 'start_monai', cache=f'{d}/monai', **o)]
        cold = Contender('MONAI CacheDataset', 'start_monai_cache', **o)
        for c in (warm[0], Contender('', 'start_monai', cache=f'{d}/monai', fill=True, **o)): c.round()
        return res+compare(a, {'second start to the first batch, beyond imports':[*warm, cold]}, 'second start', S)

def variant(job):
    "Write nodule `src` seen through one of the cube's symmetries"
    import torch; torch.set_num_threads(1)
    from m3dv.data import read_nodule
    from m3dv.transforms import apply_symmetry
    src,i,dest = job
    v,m = (apply_symmetry(torch.from_numpy(o), i).numpy() for o in read_nodule(src))
    np.savez_compressed(dest, voxel=v, seg=m)

def many(a):
    "A folder for each size: the synthetic nodules, each seen through as many of the 48 symmetries as it takes"
    from m3dv.data import read_competition
    c = read_competition(synthetic(a)); src = list(zip(c.train.path, c.train.label)); top = max(a.sizes); dest = WORK/f'large{top}'
    whole = lambda d, n: (d/'train_val.csv').is_file() and len((d/'train_val.csv').read_text().splitlines())==n+1
    def finish(d, n):
        shutil.copytree(c.test.path.iloc[0].parent, d/'test', dirs_exist_ok=True)
        labels = pd.DataFrame(dict(name=[f'candidate{i}' for i in range(n)], label=[src[i%len(src)][1] for i in range(n)]))
        labels.to_csv(d/'train_val.csv', index=False)
    if not whole(dest, top):
        say(f"large: writing {top} nodules"); (dest/'train_val').mkdir(parents=True, exist_ok=True)
        todo = [(src[i%len(src)][0], i//len(src), dest/'train_val'/f'candidate{i}.npz') for i in range(top)]
        with ProcessPoolExecutor(CORES) as ex: list(ex.map(variant, todo, chunksize=50))
        finish(dest, top)
    for n in a.sizes[:-1]:
        if whole(d:=WORK/f'large{n}', n): continue
        (d/'train_val').mkdir(parents=True, exist_ok=True)
        for f in [f'candidate{i}.npz' for i in range(n)]:
            (d/'train_val'/f).unlink(missing_ok=True)
            os.link(dest/'train_val'/f, d/'train_val'/f)
        finish(d, n)
    return {n:WORK/f'large{n}' for n in a.sizes}

def part_large(a):
    "large sets"
    from contenders import store_kw
    folders = many(a); cache = WORK/'cache'; disk = bool(store_kw(dict(cache=cache))); got = []
    steps = [('first start, files to loaders','get_dls',True)] + [('second start, store to loaders','get_dls',False)]*disk
    steps += [("an epoch's batches, augmented",'batches',False)]
    say(f"large: {', '.join(map(str, a.sizes))} nodules, {a.few} rounds, store {'on disk' if disk else 'in memory'}"); begun = time.time()
    for i in range(a.few):
        for n,d in folders.items():
            for what,which,clear in steps:
                if clear: shutil.rmtree(cache/str(n), ignore_errors=True)
                c = Contender('m3dv', 'large', data=d, cache=cache/str(n), what=which).start()
                with Peak([p.pid for p in c.ps]) as m: r = c.go()[0]
                c.stop()
                got += [(what, n, 's per 1,000 nodules', 1000*r['seconds']/r['n']), (what, n, 'MB, all', m.total),
                        (what, n, 'MB, without pages of files', m.own)]
        say(f"  round {i+1} of {a.few}, about {(time.time()-begun)/(i+1)*(a.few-i-1):.0f} s left")
    shutil.rmtree(cache, ignore_errors=True)
    t = pd.DataFrame(got, columns=['what','nodules','unit','value']); res = []
    for (what,unit),g in t.groupby(['what','unit'], sort=False):
        by = {n:o.value.values for n,o in g.groupby('nodules')}
        res += [dict(what=what, nodules=n) | quart(v) | dict(unit=unit) | ratio(v, by[min(by)]) | dict(n=len(v)) for n,v in by.items()]
    return res

def part_fivefold(a):
    "from the folder to the submission of five folds"
    runs = WORK/'runs'; say(f"fivefold: m3dv_train{'' if a.alone else ' beside MONAI'}, {a.few} rounds"); secs,mem,begun = [],[],time.time()
    flags = ['--epochs', str(a.epochs)] if a.epochs else []
    class Run: who,how = 'm3dv_train','2 processes of 1 thread'
    peer = Contender('MONAI, DenseNet121', 'five_monai', net='monai', data=a.data, out=runs, epochs=a.epochs, **TWO)
    for i in range(a.few):
        shutil.rmtree(runs, ignore_errors=True); runs.mkdir(parents=True); t = time.perf_counter()
        exe = Path(sys.executable).with_name('m3dv_train')
        cmd = [str(exe), '--data', str(a.data), '--out', str(runs/'m3dv'), '--jobs', '2', *flags]
        with open(runs/'log.txt', 'w') as log:
            p = subprocess.Popen(cmd, stdout=log, stderr=log, env=os.environ|dict(PYTHONPATH=str(ROOT)))
        with Peak([p.pid], .5) as m: p.wait()
        s = time.perf_counter()-t
        if p.returncode or not (runs/'m3dv'/'submission.csv').is_file(): raise Failed((runs/'log.txt').read_text()[-3000:])
        say(f"  m3dv_train {s:.0f} s, {m.total:.0f} MB")
        if a.alone: secs.append((s,)); mem.append((m.total,)); continue
        t = time.perf_counter(); peer.start()
        with Peak([p.pid for p in peer.ps], .5) as q: peer.go()
        peer.stop(); secs.append((s, time.perf_counter()-t)); mem.append((m.total, q.total))
        say(f"  round {i+1} of {a.few}, about {(time.time()-begun)/(i+1)*(a.few-i-1):.0f} s left")
    if a.alone: return rows('folder to submission', [Run], np.array(secs), S) + rows('peak of all processes', [Run], np.array(mem), MB)
    from m3dv.evaluate import compare_all, read_oof
    save(a, 'speed_auc', compare_all(read_oof(runs/'m3dv'/'oof.csv'), read_oof(runs/'oof.csv')).rename_axis('who').reset_index())
    cs = [Run, peer]
    return rows('folder to submission', cs, np.array(secs), S) + rows('peak of all processes', cs, np.array(mem), MB)

def part_profile(a):
    "where a training step spends its time"
    res = {}
    for k in ('report','default'):
        t = []
        for who,net in (('m3dv', k), ('plain PyTorch, channels last', f'stock {k} channels last')):
            c = Contender(who, 'profile', net=net, bs=8); t += [(who, *r) for r in c.start().go()[0]]; c.stop()
        res[k] = pd.DataFrame(t, columns='who operator calls ms share'.split())
    return res

PARTS = {k[5:]:f for k,f in list(globals().items()) if k.startswith('part_') and k!='part_fivefold'}|dict(fivefold=part_fivefold)
# about, on two cores of an AVX2 server
MINUTES = dict(check=1, load=2, augment=2, step=4, train=5, epoch=6, memory=2, start=3, large=8, profile=1, fivefold=120)

# ---------------------------------------------------------------- the machine, the nodules, the files

def machine(a):
    "What a table was measured on"
    info = Path('/proc/cpuinfo').read_text().splitlines() if Path('/proc/cpuinfo').exists() else []
    cpu = next((l.split(':')[1].strip() for l in info if l.startswith('model name')), platform.processor())
    git = subprocess.run(['git', 'describe', '--always', '--dirty', '--exclude=*'], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    ver = {p:md.version(p) for p in 'm3dv torch monai torchio SimpleITK fastai numpy scipy'.split()}
    return dict(cpu=cpu, cores=CORES, memory_gb=round(psutil.virtual_memory().total/2**30), system=platform.system(),
                python=platform.python_version(), **ver, commit=git,
        load=a.load, data=a.named)

def synthetic(a):
    "The folder of synthetic nodules, as many as the competition's 64-voxel set has"
    from m3dv.data import read_competition
    from m3dv.synth import synth_nodules
    n,n_test = (365,117) if not a.quick else (60,12)
    d = WORK/f'nodules{n}'
    try: ok = (len((c:=read_competition(d)).train), len(c.test))==(n, n_test)
    except ValueError: ok = False
    if not ok: say(f"writing {n+n_test} synthetic nodules"); synth_nodules(d, n, n_test, 64, force=d.exists(), progress=False)
    return d

def save(a, name, t):
    t = pd.DataFrame(t); a.out.mkdir(parents=True, exist_ok=True)
    t.to_csv(a.out/f'{name}.csv', index=False, float_format='%.4g', lineterminator='\n')
    say(t.to_string(index=False, float_format='%.3g'), '\n')

def main(a):
    begun,todo = time.time(),a.parts or list(PARTS)
    if a.quick:
        a.rounds,a.few,a.seconds,a.share,a.epoch_share,a.files,a.sizes,a.out = 1,1,.1,.4,1.,24,(40,80),a.out or WORK/'quick'
        todo = a.parts or [k for k in PARTS if k!='fivefold']
        a.epochs = a.epochs or 1
    else:
        a.seconds,a.share,a.epoch_share,a.files,a.sizes,a.out = 1.,.06,.5,None,(500,2000,8000),a.out or ROOT/'results'
        minutes = sum(8 if k=='fivefold' and a.alone else MINUTES[k] for k in todo)
        say(f"{', '.join(todo)}: about {minutes} minutes on two idle cores")
    if CORES<2: sys.exit("the comparison takes two cores")
    if (l:=os.getloadavg()[0])>.7: say(f"other programs use this machine (load {l:.1f}): the figures will not be good")
    a.load = round(l, 2)
    a.named = 'synthetic' if not a.data else 'a competition folder'
    a.data = a.data.expanduser().resolve() if a.data else synthetic(a)
    at = a.out/'machine.json'; info = json.loads(at.read_text()) if at.is_file() else {}
    for k in todo:
        t,info[k] = time.time(),machine(a); res = PARTS[k](a)
        if isinstance(res, list): info[k]['rounds'] = max(r['n'] for r in res)
        for n,o in {f'speed_{k}':res}.items() if not isinstance(res, dict) else {f'{k}_{n}':o for n,o in res.items()}.items(): save(a, n, o)
        at.write_text(json.dumps(info, indent=1)+'\n'); say(f"{k}: {time.time()-t:.0f} s\n")
    say(f"{time.time()-begun:.0f} s; tables in {a.out}")

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog='; '.join(f'{k}: {f.__doc__}' for k,f in PARTS.items()))
    p.add_argument('parts', nargs='*', help=f"of {', '.join(PARTS)}; all without any")
    p.add_argument('--data', type=Path, help='competition folder; synthetic nodules without it')
    p.add_argument('--rounds', type=int, default=5, help='of the parts that take seconds a round')
    p.add_argument('--few', type=int, default=3, help='rounds of the parts that take minutes: memory, large, fivefold')
    p.add_argument('--alone', action='store_true', help='the 5-fold run without its peer, which takes half an hour a round')
    p.add_argument('--epochs', type=int, help="of the 5-fold run, instead of the recipe's")
    p.add_argument('--quick', action='store_true', help='a smoke test')
    p.add_argument('--out', type=Path, help='folder for the tables; results/ without it')
    o = p.parse_args()
    if odd:=set(o.parts)-set(PARTS): p.error(f"no part is called {', '.join(sorted(odd))}; there are {', '.join(PARTS)}")
    def stopped(*_): signal.signal(signal.SIGTERM, signal.SIG_IGN); sys.exit('stopped')         # so that the contenders are ended, too
    signal.signal(signal.SIGTERM, stopped)
    try: main(o)
    except Failed as e: sys.exit(str(e))
