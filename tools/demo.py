"""Audit a competition folder, train on it and run the training tutorial as an HTML page; without a folder, on synthetic nodules."""
import argparse, os, subprocess, sys, time
from dataclasses import replace
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
    if data:
        from m3dv.core import M3dvError
        from m3dv.data import read_competition
        try: c = read_competition(data)
        except M3dvError as e: sys.exit(str(e))
        return [len(c.train), len(c.test)]
    import inspect
    from m3dv.synth import synth_nodules
    p = inspect.signature(synth_nodules).parameters
    return [p['n'].default, p['n_test'].default]

def whole(data, n, n_test):
    "Are the synthetic nodules of an earlier run all there?"
    from m3dv.core import M3dvError
    from m3dv.data import read_competition
    try: c = read_competition(data)
    except M3dvError: return False
    return (len(c.train), len(c.test))==(n, n_test)

def minutes(s): return f'{max(s/60, .5):.1f} min' if s<570 else f'{s/60:.0f} min'

def main(data, out, epochs=None, folds=None):
    begun = time.time()
    if data and not (data/'train_val').is_dir(): sys.exit(f"{data}: no folder train_val in it; DATA is a competition folder, see README.md")
    print('Measuring the speed of this machine …', flush=True)
    from m3dv.core import pick_device
    from m3dv.crossval import estimate
    from m3dv.recipe import RECIPES
    r = RECIPES['default']
    r = replace(r, epochs=epochs or r.epochs, n_folds=folds or r.n_folds)
    n,n_test = nodules(data)
    # a file takes some hundredths of a second to write or read, a program some ten seconds to start;
    # the tutorial trains one fold for at most six epochs
    files,train = .15*(n+n_test)*(not data)+.02*(n+n_test)+15,estimate(n, n_test, r)+15
    tut = estimate(n, 0, replace(r, epochs=min(r.epochs,6)), jobs=1, n_folds=1)+40
    print(f"{n} labelled and {n_test} unlabelled nodules, {r.n_folds} folds of {r.epochs} epochs on {pick_device().type}. "
          f"Three steps: the files (about {minutes(files)}), training (about {minutes(train)}), the tutorial (about {minutes(tut)}). "
          f"All together about {minutes(files+train+tut)}.", flush=True)
    out.mkdir(parents=True, exist_ok=True)
    print('\n1/3 The files', flush=True)
    if not data:
        data = out/'data'
        if whole(data, n, n_test): print(f"{data}: synthetic nodules of an earlier run")
        else: program('m3dv_synth', data, '--force')
    program('m3dv_audit', data, '--out', out/'audit.csv')
    print('\n2/3 Training', flush=True)
    flags = [o for f,v in (('--epochs', epochs), ('--folds', folds)) if v for o in (f, v)]
    again = '--resume' if (out/'recipe.json').is_file() and data!=out/'data' else '--force' # a run on one's own nodules is resumed
    program('m3dv_train', '--data', data, '--out', out, again, *flags)
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
