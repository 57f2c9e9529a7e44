"""Audit a competition folder, train on it and run the training tutorial as an HTML page; without a folder, on synthetic nodules."""
import argparse, os, subprocess, sys, time
from pathlib import Path
sys.path.insert(0, str(Path(__file__).resolve().parent))
import tutorial

ROOT = Path(__file__).resolve().parent.parent
TUTORIAL = ROOT/'nbs'/'tutorials'/'training.ipynb'

def program(name, *args):
    "Run one of m3dv's commands; its output goes to the screen as it comes"
    exe = Path(sys.executable).with_name(name)
    if not exe.exists(): exe = Path(f'{exe}.exe')
    rc = subprocess.run([str(exe), *map(str, args)], env={**os.environ, 'PYTHONUNBUFFERED':'1'}).returncode
    if rc: sys.exit(f"{name} {' '.join(map(str, args))} ended with exit code {rc}")

def nodules(data):
    "Labelled and unlabelled files in `data`, or in the folder that m3dv_synth will write"
    if data: return [len(list((data/o).glob('*.npz'))) for o in ('train_val', 'test')]
    import inspect
    from m3dv.synth import synth_nodules
    p = inspect.signature(synth_nodules).parameters
    return [p['n'].default, p['n_test'].default]

def fold_time(
    n:int, # labelled nodules
    n_test:int, # nodules to predict
    epochs:int=None, # instead of the recipe's
    folds:int=None, # instead of the recipe's
): # (seconds for one fold alone, folds that run side by side, epochs, folds, device)
    "How long one fold takes on this machine, from a few batches of the default recipe's network"
    import torch
    from m3dv.core import pick_device
    from m3dv.learner import RECIPES
    from m3dv.model import NETS
    from m3dv.transforms import MASK_MODES, SYMMETRIES
    r,dev = RECIPES['default'],pick_device('auto')
    epochs,folds = epochs or r.epochs,folds or r.n_folds
    if dev.type=='cpu': torch.set_num_threads(1)
    net = NETS[r.net](MASK_MODES[r.mask]).to(dev, memory_format=torch.channels_last_3d)
    x = torch.zeros(r.bs, MASK_MODES[r.mask], *[r.side]*3, device=dev)
    def step():
        net(x).sum().backward()
        if dev.type=='cuda': torch.cuda.synchronize()
    step()
    start = time.time()
    for _ in range(4): step()
    t = (time.time()-start)/4/r.bs*1.4 # augmentation, MixUp and optimiser take the rest
    passes = epochs*n*(folds-1)/folds + (n/folds*(epochs+SYMMETRIES[r.tta]) + n_test*SYMMETRIES[r.tta])/3 # a forward pass is a third of a step
    return t*passes, 1 if dev.type!='cpu' else min(folds, os.cpu_count() or 1), epochs, folds, dev

def minutes(s): return f'{max(s/60, .5):.1f} min' if s<570 else f'{s/60:.0f} min'

def main(data, out, epochs=None, folds=None):
    begun = time.time()
    if data and not (data/'train_val').is_dir(): sys.exit(f"{data}: no folder train_val in it; DATA is a competition folder, see README.md")
    print('Measuring the speed of this machine …', flush=True)
    n,n_test = nodules(data)
    one,side_by_side,e,k,dev = fold_time(n, n_test, epochs, folds)
    # the tutorial trains about one fold; reading a file takes some hundredths of a second, starting a program some ten
    files,train,tut = .03*(n+n_test)+20, one*-(-k//side_by_side)+20, one+60
    print(f"{n} labelled and {n_test} unlabelled nodules, {k} folds of {e} epochs on {dev}. Three steps: the files (about {minutes(files)}), "
          f"training (about {minutes(train)}), the tutorial (about {minutes(tut)}). All together about {minutes(files+train+tut)}.", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    print('\n1/3 The files', flush=True)
    if not data:
        data = out/'data'
        if (data/'train_val.csv').exists(): print(f"{data}: synthetic nodules of an earlier run")
        else: program('m3dv_synth', data)
    program('m3dv_audit', data, '--out', out/'audit.csv')
    print('\n2/3 Training', flush=True)
    flags = [o for f,v in (('--epochs', epochs), ('--folds', folds)) if v for o in (f, v)]
    program('m3dv_train', '--data', data, '--out', out, *flags)
    print('\n3/3 The tutorial', flush=True)
    tutorial.write(TUTORIAL, out/'tutorial.html', env=dict(M3DV_DATA=str(data), M3DV_OUT=str(out)))
    print(f"\nDone in {minutes(time.time()-begun)}. In {out}: {', '.join(sorted(o.name for o in out.iterdir()))}")

if __name__=='__main__':
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument('--data', type=Path, help='a competition folder; synthetic nodules without it')
    a.add_argument('--out', type=Path, default=Path('out'), help='folder for all results')
    a.add_argument('--epochs', type=int, help="epochs instead of the recipe's")
    a.add_argument('--folds', type=int, help="folds instead of the recipe's")
    o = a.parse_args()
    try: main(o.data and o.data.expanduser().resolve(), o.out.expanduser().resolve(), o.epochs, o.folds)
    except tutorial.CellFailed as e: sys.exit(str(e))
