"""Faults in runs: hostile folders, full disks, killed and stopped processes, networks that fail, outputs in any encoding"""
import io, os, resource, shutil, signal, subprocess, sys, threading, time
import numpy as np, pytest
from collections import Counter
from dataclasses import replace
from fastai.callback.core import Callback, CancelValidException
from fastai.callback.progress import CSVLogger
from fastai.callback.training import ShortEpochCallback
from pathlib import Path
from m3dv import cli, crossval, runs
from m3dv.core import M3dvError
from m3dv.crossval import run_tasks, train_run
from m3dv.curves import read_curves
from m3dv.data import read_competition, read_nodule
from m3dv.learner import get_learner
from m3dv.loaders import get_dls
from m3dv.recipe import RECIPES
from m3dv.runs import Run
from m3dv.synth import synth_nodules

QUICK = replace(RECIPES['default'], name='quick', side=16, margin=4, epochs=1, n_folds=2, bs=4, tta='none')
ROOT = Path(__file__).resolve().parent.parent
ENV = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS='1', M3DV_CACHE='off')

@pytest.fixture(scope='module')
def data(tmp_path_factory): return synth_nodules(tmp_path_factory.mktemp('nodules')/'d', n=12, n_test=4, side=32, progress=False)

@pytest.fixture
def train(data, tmp_path):
    "Train in this process, without bars"
    quiet = dict(device='cpu', jobs=1, progress=False)
    def f(out='run', recipe=QUICK, data=data, **kw): return train_run(data, tmp_path/out, recipe, **quiet | kw)
    return f

def said(f):
    "The one line with which `f` is refused"
    with pytest.raises(M3dvError) as e: f()
    assert '\n' not in str(e.value), str(e.value)
    return str(e.value)

def command(*words):
    "Exit code of a command in this process"
    name,*argv = map(str, words)
    try: getattr(cli, name)(argv)
    except SystemExit as e: return e.code
    return 0

FAULTS = '''
import os, sys, time
import torch
from torch import nn
from pathlib import Path

class Odd(Exception):
    "Cannot be brought back from a pickle"
    def __init__(self, a, b): super().__init__(f'{a} and {b}')

class Small(nn.Module):
    def __init__(self, c_in=1, n_out=2):
        super().__init__(); self.a,self.b = nn.Conv3d(c_in, 4, 3),nn.Linear(4, n_out)
        self.register_buffer('room', torch.zeros(50_000))
    def forward(self, x): return self.b(self.a(x).mean((2,3,4)))

class Steep(Small):
    def forward(self, x): return super().forward(x)*1e38*1e38
class Greedy(Small):
    def forward(self, x): return super().forward(x if not self.training else torch.empty(10**15))
class Wrong(Small):
    def forward(self, x): return self.a(x)
class Restless(Small):
    def forward(self, x): return super().forward(x)+self.extra
    def __init__(self, c_in=1, n_out=2): super().__init__(c_in, n_out); self.extra = torch.rand(1)

def odd(): raise Odd('this', 'that')
def leave(): sys.exit(3)
def full(): raise OSError(28, 'No space left on device', 'a.safetensors')
def none_left(): raise MemoryError('17 GB')
def segfault(): import ctypes; ctypes.string_at(0)
def work(s): t = time.time(); [None for _ in iter(lambda: time.time()-t<s, False)]; return os.getpid()
def mark(f): Path(f).write_text(str(os.getpid())); time.sleep(600)
'''

@pytest.fixture(scope='module', autouse=True)
def faults(tmp_path_factory):
    "A module of faults, which workers find because this process finds it"
    d = tmp_path_factory.mktemp('modules')
    (d/'faults.py').write_text(FAULTS); sys.path.insert(0, str(d))
    import faults
    yield faults
    sys.path.remove(str(d)); del sys.modules['faults']

# ---------------------------------------------------------------- a hostile place, a narrow encoding, an empty mask

@pytest.fixture(scope='module')
def hostile(data, tmp_path_factory):
    "A run of the command with two workers, where the current folder and that of the data hold modules of well-known names"
    here = tmp_path_factory.mktemp('hostile'); d = here/'d'
    shutil.copytree(data, d)
    for folder in (here, d):
        (folder/'m3dv').mkdir()
        for f in ('m3dv/__init__.py', *(f'{k}.py' for k in 'torch sitecustomize random joblib numpy pathlib argparse'.split())):
            (folder/f).write_text(f"open({str(here/'was_run')!r}, 'a').write({f!r}+'\\n')\nraise SystemExit('of the current folder')\n")
    comp = read_competition(d)
    for p in (*comp.train.path[:2], comp.test.path[0]): np.savez(p, voxel=read_nodule(p).voxel, seg=np.zeros((32,)*3, bool))
    code = "import sys; del sys.path[0]; from m3dv.cli import m3dv_train; m3dv_train()" # pip's programs do not look here either
    runs.save_recipe(QUICK, here/'quick.json')
    words = 'd --recipe quick.json --jobs 2 --device cpu --out run'.split()
    r = subprocess.run([sys.executable, '-c', code, *words], cwd=here, env=ENV|dict(PYTHONIOENCODING='cp932'), capture_output=True)
    return here, r.returncode, r.stdout.decode('cp932'), r.stderr.decode()

def test_nothing_is_imported_from_the_current_folder(hostile):
    here,code,out,err = hostile
    assert code==0, err
    assert not (here/'was_run').exists(), (here/'was_run').read_text()

def test_module_call_leaves_the_current_folder_out(hostile):
    "`python -m m3dv` is Python's own search of the current folder for m3dv; all that follows is not"
    here = hostile[0]; (here/'m3dv').rename(here/'m3dv_')
    r = subprocess.run([sys.executable, '-m', 'm3dv', 'audit', '--help'], cwd=here, env=ENV, capture_output=True, text=True)
    (here/'m3dv_').rename(here/'m3dv')
    assert r.returncode==0 and not (here/'was_run').exists(), r.stderr

def test_summary_in_a_narrow_encoding(hostile):
    _,code,out,_ = hostile
    assert code==0 and 'ROC AUC (95 % interval' in out
    assert '(0.' in out and '?' not in out

@pytest.mark.parametrize('enc', ['ascii','latin-1'])
def test_other_commands_in_a_narrow_encoding(hostile, enc, monkeypatch):
    "Each command's output, written as a file of that encoding"
    here = hostile[0]; monkeypatch.chdir(here)
    for words in (('m3dv_synth', f's_{enc}', '--n', 4, '--test', 2, '--side', 32), ('m3dv_audit', 'd', '--side', 16),
                  ('m3dv_submit', 'd', '--models', 'run', '--device', 'cpu'),
                  ('m3dv_gather', 'run', '--data', 'd', '--out', 'run', '--jobs', 1),
                  ('m3dv_train', '--help'), ('m3dv_train', 'd', '--out', 'run', '--recipe', 'é – ×')):
        o,e = (io.TextIOWrapper(io.BytesIO(), encoding=enc) for _ in range(2))
        with monkeypatch.context() as m:
            m.setattr(sys, 'stdout', o); m.setattr(sys, 'stderr', e)
            code = command(*words)
        o.flush(); e.flush()
        assert code==(2 if 'é – ×' in words else 0), (words, e.buffer.getvalue())
        assert (e if code else o).buffer.getvalue()

def test_empty_masks_are_said_once_and_counted(hostile):
    here,_,out,err = hostile
    assert err.count('\n')==1 and err.startswith('m3dv_train: warning: '), err
    assert '2 of 12 labelled nodules and 1 of 4 test nodules have an empty mask' in err
    assert '2 labelled nodules have an empty mask' in out and Run(here/'run').empty==2
    assert '2 labelled nodules have an empty mask' in Run(here/'run')._repr_markdown_()

# ---------------------------------------------------------------- what ends a task

WHY = dict(odd='a: Odd: this and that', leave='a: SystemExit: 3', none_left='a: out of memory (MemoryError: 17 GB); fewer folds',
    full="a: no room for its files (OSError: [Errno 28] No space left on device: 'a.safetensors'); make room")

@pytest.mark.parametrize('fault', WHY)
def test_reason_is_kept(faults, fault, tmp_path):
    s = said(lambda: run_tasks(dict(a=(getattr(faults, fault),)), 1, tmp_path))
    assert s.startswith(WHY[fault]) and s.endswith(f"traceback in {tmp_path/'a.log'}")
    assert f'in {fault}' in (tmp_path/'a.log').read_text()

def test_crash_of_a_worker_is_named(faults, tmp_path, capfd):
    s = said(lambda: run_tasks(dict(a=(faults.segfault,), b=(time.sleep, 60)), 2, tmp_path))
    assert 'a worker process crashed (SIGSEGV(-11))' in s and f"a ({tmp_path/'a.log'})" in s
    assert 'Segmentation fault' in (tmp_path/'a.log').read_text() and 'Fatal' not in capfd.readouterr().err

def test_reason_is_kept_where_no_log_can_be_written(faults, tmp_path):
    assert said(lambda: run_tasks(dict(a=(faults.odd,)), 1, tmp_path/'no'))=='a: Odd: this and that'

def test_nan_is_one_line(data, tmp_path, capsys):
    runs.save_recipe(replace(QUICK, net='faults:Steep', epochs=9), tmp_path/'steep.json')
    code = command('m3dv_train', data, '--out', tmp_path/'o', '--recipe', tmp_path/'steep.json', '--jobs', 1, '--device', 'cpu')
    err = capsys.readouterr().err
    assert code==2 and err.count('\n')==1 and 'seed0_fold0: training diverged in epoch 0' in err and 'lower learning rate' in err, err

def test_steep_training_is_one_line_or_none(data, tmp_path, capsys):
    "The example that was found: validation that is no number no longer ends the training with sklearn's error"
    runs.save_recipe(replace(QUICK, lr=10., epochs=3), tmp_path/'steep.json')
    code = command('m3dv_train', data, '--out', tmp_path/'o', '--recipe', tmp_path/'steep.json', '--jobs', 1, '--device', 'cpu')
    err = capsys.readouterr().err
    assert (code, err.count('\n'))==(0,0) or (code==2 and err.count('\n')==1 and 'lower learning rate' in err), err

def test_full_disk(train, tmp_path):
    "Files are limited to 100 kB: what is finished stays, the reason is said, and the run goes on when there is room"
    r = replace(QUICK, net='faults:Small')
    train(recipe=r, fold=0); was = (tmp_path/'run/models/seed0_fold0.safetensors').read_bytes()
    soft,hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        s = said(lambda: train(recipe=r, resume=True))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert 'File too large' in s and 'finished folds are kept, --resume' in s, s
    assert Run(tmp_path/'run').done==['seed0_fold0'] and not list((tmp_path/'run/models').glob('.*'))
    train(recipe=r, resume=True); train('whole', r)
    assert (tmp_path/'run/oof.csv').read_bytes()==(tmp_path/'whole/oof.csv').read_bytes()
    assert (tmp_path/'run/models/seed0_fold0.safetensors').read_bytes()==was

def test_out_of_memory_in_training(train, tmp_path):
    s = said(lambda: train(recipe=replace(QUICK, net='faults:Greedy')))
    assert s.startswith('seed0_fold0: out of memory (') and 'smaller bs' in s and 'finished folds are kept' in s, s

# ---------------------------------------------------------------- errors before the work

def test_own_network_is_trained_and_predicts(train): assert len(train(recipe=replace(QUICK, net='faults:Small')).submission)==4

@pytest.mark.parametrize('net,why', [('faults:Wrong','expected one or two logits'), ('faults:Restless','gives something else'),
    ('faults:Nothing','faults:Nothing'), ('nowhere:Net','nowhere:Net'), ('__main__:Net','of no module')])
def test_bad_network_leaves_the_run_alone(train, tmp_path, net, why):
    "Also with force, which removes a run before the training begins"
    by_hand = tmp_path/'run'; by_hand.mkdir(); runs.save_recipe(QUICK, by_hand/'recipe.json'); (by_hand/'oof.csv').write_text('precious')
    assert why in said(lambda: train(recipe=replace(QUICK, net=net), force=True))
    assert (by_hand/'oof.csv').read_text()=='precious'

def test_name_that_no_submission_can_hold(data, train, tmp_path):
    d = tmp_path/'d'; shutil.copytree(data, d); (d/'sampleSubmission.csv').unlink()
    os.rename(os.fsencode(read_competition(d).test.path[0]), os.fsencode(d/'test')+b'/nodule\xff.npz')
    assert 'UTF-8' in said(lambda: train(data=d))
    assert not (tmp_path/'run').exists()

def opened(folder, f):
    "How often each file of a folder is opened while `f` runs in this process"
    folder,n,on = folder.resolve(),Counter(),[True]
    def hook(event, args):
        if on and event=='open' and isinstance(args[0], (str,bytes,os.PathLike)):
            p = os.path.realpath(os.fsdecode(args[0]))
            if Path(p).is_relative_to(folder) and os.path.isfile(p): n[p] += 1
    sys.addaudithook(hook)
    try: f()
    finally: on.clear()
    return n

def test_each_file_is_opened_once(data, tmp_path, monkeypatch):
    "By the command itself, up to the moment when its workers begin"
    def stop(*args): raise M3dvError('stopped')
    monkeypatch.setattr(crossval, 'run_tasks', stop)
    n = opened(data, lambda: command('m3dv_train', data, '--out', tmp_path/'o', '--folds', 2, '--bs', 4, '--device', 'cpu'))
    assert len(n)==18 and set(n.values())=={1}, n

@pytest.mark.parametrize('words', [('m3dv_audit','{d}','--out','{o}'), ('m3dv_submit','{d}','--models','{d}','--out','{o}'),
    ('m3dv_train','{d}','--folds',2,'--bs',4,'--out','{o}'), ('m3dv_gather','{d}','--data','{d}','--out','{o}')], ids=lambda w: w[0])
@pytest.mark.parametrize('place', ['/proc/nowhere/x', '{t}/file/x'])
def test_place_that_cannot_be_written(data, tmp_path, words, place, capsys):
    "Refused before a nodule is opened"
    (tmp_path/'file').touch(); place = place.format(t=tmp_path)
    codes = []
    n = opened(data, lambda: codes.append(command(*(str(w).format(d=data, o=place) for w in words))))
    err = capsys.readouterr().err
    assert codes==[2] and err.count('\n')==1 and place.rpartition('/')[0] in err, err
    assert not [k for k in n if k.endswith('.npz')], n

def test_place_without_room(train, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, 'disk_usage', lambda d: shutil._ntuple_diskusage(10**9, 10**9-10**5, 10**5))
    assert 'are free' in said(train)
    assert not (tmp_path/'run').exists()

# ---------------------------------------------------------------- stopped and killed processes

def test_stopped_worker_is_told(faults, tmp_path, monkeypatch, capfd):
    "It is waited for, and goes on where it was. Then, in the same workers, an exception that no pickle can carry keeps its reason"
    monkeypatch.setattr(crossval, '_SILENT', 3)
    def freeze():
        while not (tmp_path/'a.log').is_file() or not (s:=(tmp_path/'a.log').read_text()).endswith('\n'): time.sleep(.1)
        pid = int(s.split()[-1])
        os.kill(pid, signal.SIGSTOP); time.sleep(6); os.kill(pid, signal.SIGCONT); froze.append(pid)
    froze,t = [],threading.Thread(target=freeze); t.start()
    done = run_tasks(dict(a=(faults.work, 2), b=(faults.work, .1)), 2, tmp_path); t.join()
    err = capfd.readouterr().err
    assert froze==[done['a']] and err.count('\n')==1, err
    assert err.startswith(f"a: process {done['a']} has made no progress for 3 s") and str(tmp_path/'a.log') in err
    assert list(tmp_path.iterdir())==[]
    s = said(lambda: run_tasks(dict(a=(faults.odd,), b=(time.sleep, 60)), 2, tmp_path))
    assert s==f"a: Odd: this and that; traceback in {tmp_path/'a.log'}"
    assert [f.name for f in tmp_path.iterdir()]==['a.log']

KILL = '''
import os, signal, sys, time
sys.path.insert(0, {path!r})
import faults
from m3dv.crossval import run_tasks
from pathlib import Path
def children(p): return [int(o) for t in Path(f'/proc/{{p}}/task').iterdir() for o in (t/'children').read_text().split()]
def family(p): return [p] + [o for c in children(p) for o in family(c)]
def alive(p):
    try: return Path(f'/proc/{{p}}/stat').read_text().rpartition(')')[2].split()[0]!='Z'
    except OSError: return False
for wait in (.2, 1, 2, 4):
    pid = os.fork()
    if not pid: run_tasks(dict(a=(faults.mark, {mark!r}), b=(time.sleep, 600)), 2); os._exit(0)
    while not children(pid): time.sleep(.02)
    time.sleep(wait)
    all_of_it = family(pid); os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    t = time.time()
    while any(map(alive, all_of_it)) and time.time()-t<5: time.sleep(.1)
    print(wait, len(all_of_it), [p for p in all_of_it if alive(p)], round(time.time()-t, 1), flush=True)
    for p in filter(alive, all_of_it): os.kill(p, signal.SIGKILL)
'''

@pytest.mark.skipif(not Path('/proc/self/task').is_dir(), reason='looks for processes in /proc')
def test_workers_end_with_a_killed_parent(faults, tmp_path):
    "Killed 0.2 to 4 s after its first child appeared, workers are reading Python, joblib, or torch; none is left after 5 s"
    code = KILL.format(path=str(Path(faults.__file__).parent), mark=str(tmp_path/'mark'))
    r = subprocess.run([sys.executable, '-c', code], env=ENV, capture_output=True, text=True)
    lines = r.stdout.splitlines()
    assert len(lines)==4 and all(' [] ' in l for l in lines), r.stdout+r.stderr
    assert max(int(l.split()[1]) for l in lines)>=4, r.stdout # the parent, its trackers, two workers

@pytest.mark.parametrize('moment,wait', [('begun',.3), ('at a time',1.5)])
def test_ctrl_c_is_one_line(data, tmp_path, moment, wait):
    "In the imports and while workers start; a second one changes nothing"
    words = ['train', str(data), *'--folds 2 --epochs 50 --bs 4 --jobs 2 --device cpu --out'.split(), str(tmp_path/'run')]
    code = "from m3dv.cli import main; print('begun', flush=True); main()"
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p = subprocess.Popen([sys.executable, '-c', code, *words], env=ENV, start_new_session=True, **pipes)
    while moment not in p.stdout.readline(): assert p.poll() is None, p.stderr.read()
    time.sleep(wait)
    for _ in range(3): os.killpg(p.pid, signal.SIGINT); time.sleep(.2)
    _,err = p.communicate(timeout=60)
    assert p.returncode==130 and err.startswith('m3dv_train: stopped; finished folds are kept; to resume: ') and err.count('\n')==1, err

# ---------------------------------------------------------------- what is shown

def test_names_are_text_in_a_notebook(tmp_path):
    "A run's name, folder and baselines bring neither markup nor lines into its summary"
    import mistune
    markdown2html = mistune.create_markdown(escape=False, plugins=['table'])
    evil = '<img src=x onerror=alert(1)>|[a](javascript:b)`$x$**'
    d = tmp_path/evil.replace('/', '')
    d.mkdir(); runs.save_recipe(replace(QUICK, name=evil), d/'recipe.json')
    p = np.linspace(.1, .9, 12)
    t = runs.pd.DataFrame(dict(name=[f'n{i}' for i in range(12)], label=np.arange(12)%2, repeat=0, fold=0, seed=0, recipe=evil, p=p))
    runs.write_table(t, d/'oof.csv'); runs.write_table(t.assign(recipe=evil+'2'), d/'baselines.csv')
    run = Run(d); html = markdown2html(run._repr_markdown_())
    assert '<img' not in html and 'href' not in html and evil[:28].replace('<', '&lt;').replace('>', '&gt;') in html, html
    for j in (f'seed0_fold{k}' for k in (0,1)): assert j in html

@pytest.mark.parametrize('short', [ShortEpochCallback(0.), ShortEpochCallback(.5, False), 'unvalidated'], ids=str)
def test_short_epochs_are_no_divergence(data, tmp_path, short):
    "Nor is an epoch without validation; and a log in which fastai has moved the figures of a short epoch is refused"
    class NoValidation(Callback):
        def before_validate(self): raise CancelValidException
    log = CSVLogger(tmp_path/'log.csv')
    dls = get_dls(data, 0, QUICK, bs=2, device='cpu', progress=False)
    learn = get_learner(dls, cbs=[NoValidation() if short=='unvalidated' else short, log])
    with learn.no_bar(), learn.no_logging(): learn.fit(7)
    r = read_curves(learn)
    assert r.verdict!='diverged' and len(learn.history())==7, r
    assert (r.why=='no epoch has a validation loss')==(getattr(short, 'pct', 0)==0), r
    assert 'row 1 has fewer values than the header' in said(lambda: read_curves(tmp_path/'log.csv'))
