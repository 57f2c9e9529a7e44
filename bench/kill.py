"""Kill m3dv_train at random moments, go on with --resume, and compare the bytes with those of an undisturbed run: writes results/kill.csv.

    python bench/kill.py

A run is started, killed after a time drawn uniformly from the duration of the undisturbed run, started again with --resume, killed again,
and so on until one run comes to its end before its kill; then the next folder is begun. After each kill every file under a final name is
compared with the undisturbed run's, and it is measured how long processes of the run live on. A fold that was finished at a kill must have
the same weights' file, with the same time of change, from then on."""
import argparse, os, random, signal, subprocess, sys, tempfile, time
import pandas as pd
from pathlib import Path

OUT = Path(__file__).resolve().parent.parent/'results'
RECIPE = '{"name": "kill", "side": 16, "margin": 4, "epochs": 6, "n_folds": 3, "bs": 4, "tta": "none"}'
# of twenty kills: the process alone, or all of its group, as a terminal's Ctrl-C does
SIGNALS = ['KILL group']*10 + ['KILL']*6 + ['INT group']*2 + ['TERM', 'TERM group']

def start(here, out, *more):
    "Start m3dv_train in a group of its own"
    args = ['--data', 'nodules', '--out', str(out), '--recipe', 'kill.json', '--device', 'cpu', '--jobs', '2', *more]
    return subprocess.Popen([Path(sys.executable).with_name('m3dv_train'), *args], cwd=here, stdin=subprocess.DEVNULL,
                            stdout=open(here/'said.txt', 'w'), stderr=subprocess.STDOUT, start_new_session=True)

def alive(group):
    "Processes of a group that still run"
    res = []
    for p in Path('/proc').glob('[0-9]*'):
        try: state,_,pgrp = (p/'stat').read_text().rpartition(')')[2].split()[:3]
        except (OSError, ValueError): continue
        if int(pgrp)==group and state!='Z': res.append(int(p.name))
    return res

def end(p, how):
    "Send the signal; seconds until no process of the run is left"
    sig,_,group = how.partition(' ')
    sig,t = getattr(signal, f'SIG{sig}'),time.time()
    (os.killpg if group else os.kill)(p.pid, sig)
    while (left:=p.poll() is None or alive(p.pid)) and time.time()-t<60: time.sleep(.02)
    if left: os.killpg(p.pid, signal.SIGKILL); p.wait()
    return time.time()-t

def files(out): return {str(f.relative_to(out)):f.read_bytes() for f in sorted(out.rglob('[!.]*.*')) if f.is_file()}
def hidden(out): return len(list(out.rglob('.*.part')))
def finished(out): return {f.stem:(out/'models'/f'{f.stem}.safetensors').stat().st_mtime_ns for f in out.glob('folds/seed*_fold[0-9].csv')}

def kill_once(here, out, want, length, how, rng, kept):
    "Start or go on, and kill at a random moment; a row of the table, or None if the run came to its end"
    p,moment = start(here, out, '--resume'),rng.uniform(0, length)
    try: p.wait(moment)
    except subprocess.TimeoutExpired: pass
    else:
        if p.returncode: raise SystemExit(f"m3dv_train ended with {p.returncode}:\n{(here/'said.txt').read_text()[-2000:]}")
        return None
    gone = end(p, how)
    there,done = files(out),finished(out)
    kept.append(done)
    says = 'to resume: m3dv_train' in (here/'said.txt').read_text()
    return dict(run=out.name, signal=how, moment=round(moment/length, 3), finished=len(done), files=len(there),
                partial=sum(want.get(f)!=b for f,b in there.items()),
                hidden=hidden(out), seconds_to_end=round(gone, 2), exit_code=p.returncode, says_how=says)

def retrained(kept): return sum(any(later.get(j)!=t for later in kept[i+1:]) for i,d in enumerate(kept) for j,t in d.items())

def main(kills, seed, dest):
    rng,rows = random.Random(seed),[]
    hows = [SIGNALS[i%len(SIGNALS)] for i in range(kills)]; rng.shuffle(hows)
    signal.signal(signal.SIGINT, signal.default_int_handler) # a job in the background of a shell ignores it, and its children would
    with tempfile.TemporaryDirectory() as d:
        here = Path(d); (here/'kill.json').write_text(RECIPE)
        from m3dv.synth import synth_nodules
        synth_nodules(here/'nodules', n=24, n_test=6, side=48, progress=False)
        t = time.time(); p = start(here, here/'undisturbed'); p.wait(); length = time.time()-t
        if p.returncode: sys.exit((here/'said.txt').read_text())
        want = files(here/'undisturbed'); print(f"undisturbed run: {length:.0f} s, {len(want)} files", flush=True)
        n = 0
        while len(rows)<kills:
            out,mine,kept = here/f'run{n}',[],[]; n += 1
            while len(rows)+len(mine)<kills and (row:=kill_once(here, out, want, length, hows[len(rows)+len(mine)], rng, kept)):
                mine.append(row); print({k:v for k,v in row.items()}, flush=True)
            p = start(here, out, '--resume'); p.wait() # to its end; nothing is left to do if it came there by itself
            kept.append(finished(out)); got = files(out)
            same,again = p.returncode==0 and got==want and not hidden(out), retrained(kept)
            says = 'the same bytes' if same else 'OTHER BYTES: ' + ', '.join(f for f in got|want if got.get(f)!=want.get(f))
            print(f"{out.name}: {len(mine)} kills, then {says}; {again} finished folds trained again", flush=True)
            rows += [r | dict(same_bytes=same, retrained=again) for r in mine]
    df = pd.DataFrame(rows).rename_axis('kill')
    df.to_csv(dest, lineterminator='\n')
    bad = df[~df.same_bytes | (df.partial>0) | (df.retrained>0)]
    print(f"{len(df)} kills in {df.run.nunique()} runs: {len(df)-len(bad)} left only whole files under final names, and led to the same "
          f"bytes without training a finished fold again; the last process of a run ended at most {df.seconds_to_end.max():.1f} s after "
          f"the kill; {(df.finished>0).sum()} kills met finished folds, {df.hidden.gt(0).sum()} left hidden parts of files")
    sys.exit(1 if len(bad) else 0)

if __name__=='__main__':
    a = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    a.add_argument('--kills', type=int, default=20)
    a.add_argument('--seed', type=int, default=0)
    a.add_argument('--out', type=Path, default=OUT/'kill.csv', help='the table to write')
    o = a.parse_args(); main(o.kills, o.seed, o.out)
