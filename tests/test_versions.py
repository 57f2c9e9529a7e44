"""Fresh installations: m3dv beside the newest release of all that it needs, and beside the lowest that settings.ini allows.

Each test makes a virtual environment, installs a copy of the project into it as README.md says (with uv where that is on the path, with pip
elsewhere), and runs every command and a short training there. Nothing is taken from this environment but pip itself.

torch is the exception. On Linux it comes with gigabytes of CUDA, so both tests install the release that this environment has:
neither the newest torch nor the bound `torch>=` is tested then. `M3DV_TORCH=any` tests both, and `M3DV_TORCH=2.9.1` takes that release.
The workflow sets `any`, beside an index of small CPU builds:

    PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu M3DV_TORCH=any pytest -m slow tests/test_versions.py

With uv it is UV_TORCH_BACKEND=cpu instead of the index. Packages that m3dv does not name itself are the newest in both tests."""
import importlib.metadata, json, os, shutil, signal, subprocess, sys, time
from configparser import ConfigParser
from pathlib import Path
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
LIMIT = 1200 # seconds for one command

def settings():
    "What settings.ini says"
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']

def floors():
    "The lowest release that settings.ini allows of each requirement"
    reqs = map(Requirement, settings()['requirements'].split())
    return {r.name:next(s.version for s in r.specifier if s.operator in ('>=','==')) for r in reqs}

def torch_release():
    "The torch that both tests take, None for any"
    v = os.environ.get('M3DV_TORCH') or importlib.metadata.version('torch')
    return None if v=='any' else v.split('+')[0]

def bindir(env): return env/('Scripts' if os.name=='nt' else 'bin')

class Shell:
    "Commands in a folder, and what they took"
    def __init__(self, cwd, path=()):
        self.cwd,self.lines = cwd,[]
        mine = {k:v for k,v in os.environ.items() if k not in ('PYTHONPATH','VIRTUAL_ENV','PYTHONHOME') and not k.startswith('M3DV_')}
        self.env = mine | dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg', M3DV_CACHE='off', PYTHONUTF8='1')
        self.env['PATH'] = os.pathsep.join([*map(str, path), os.environ['PATH']])
    def __call__(self, *cmd):
        "Run `cmd`, refuse any exit code but 0, return its output"
        start,(exe,*args) = time.time(),map(str, cmd)
        p = subprocess.Popen([shutil.which(exe, path=self.env['PATH']) or exe, *args], cwd=self.cwd, env=self.env, stdin=subprocess.DEVNULL,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding='utf-8', start_new_session=True)
        try: out,err = p.communicate(timeout=LIMIT)
        except BaseException:                                                     # too slow, or Ctrl-C: whatever it started ends with it
            os.killpg(p.pid, signal.SIGKILL) if hasattr(os, 'killpg') else p.kill()
            raise
        said = ' '.join(str(o) if len(str(o))<60 else '…' for o in (Path(cmd[0]).name, *cmd[1:]))
        self.lines.append(f"{time.time()-start:6.1f} s  {said}")
        assert p.returncode==0, f"{said}: exit code {p.returncode}\n{out[-3000:]}\n{err[-5000:]}"
        return out

def install(sh, env, *what):
    "Make the environment `env` and install into it"
    uv = shutil.which('uv')
    python = bindir(env)/'python'
    if uv:
        sh(uv, 'venv', '--quiet', '--python', sys.executable, env)
        sh(uv, 'pip', 'install', '--quiet', '--python', python, *what)
    else:
        sh(sys.executable, '-m', 'venv', '--without-pip', env)
        sh(sys.executable, '-m', 'pip', '--python', python, 'install', '--quiet', '--no-compile', '--disable-pip-version-check', *what)

def project(dest):
    "A copy of what is installed"
    dest.mkdir()
    for f in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'MANIFEST.in', 'LICENSE'): shutil.copy2(ROOT/f, dest)
    lib = settings()['lib_path']
    shutil.copytree(ROOT/lib, dest/lib, ignore=shutil.ignore_patterns('__pycache__'))
    return dest

VERSIONS = "import json, sys, importlib.metadata as m; print(json.dumps({k:m.version(k) for k in sys.argv[1:]}))"

NOTEBOOK = """
import importlib, pkgutil, m3dv
from pathlib import Path
for m in pkgutil.iter_modules(m3dv.__path__):
    if m.name!='__main__': importlib.import_module('m3dv.'+m.name)
from m3dv.all import *
data = Path('data')
files = sorted((data/'test').glob('*.npz'))
dls = get_dls(data, bs=4, progress=False)
learn = get_learner(dls)
learn.fit_one_cycle(1)
assert len(learn.history())==1
dls.show_batch()
learn.show_results()
assert learn.get_preds()[0].shape[1]==2
assert learn.predict(files[0])[2].shape==(2,)
save_network(learn, 'net')
p = load_network('net').predict(files)
assert p.shape==(4,) and ((0<p) & (p<1)).all(), p
doctor()
"""

def use(sh, env):
    "All commands, and what a notebook does, in an environment"
    version = settings()['version']
    for o in settings()['console_scripts'].split():
        name = o.partition('=')[0]
        assert 'usage' in sh(name, '--help')
        assert version in sh(name, '--version')
    assert version in sh(bindir(env)/'python', '-m', settings()['lib_name'], '--version')
    sh('m3dv_synth', 'data', '--n', 12, '--test', 4, '--side', 32)
    sh('m3dv_audit', 'data', '--out', 'audit.csv')
    sh('m3dv_train', '--data', 'data', '--out', 'run', '--folds', 2, '--epochs', 1, '--bs', 4)
    sh('m3dv_submit', '--models', 'run', '--data', 'data', '--out', 'again.csv')
    sh('m3dv_gather', 'run', '--data', 'data', '--out', 'whole')
    sh(bindir(env)/'python', '-c', NOTEBOOK)
    there = sorted(p.relative_to(sh.cwd).as_posix() for p in (sh.cwd/'run').rglob('*') if p.is_file())
    tables = ['submission.csv', 'oof.csv', 'history.csv', 'baselines.csv', 'scores.csv']
    nets = [f'models/seed0_fold{i}.{k}' for i in (0,1) for k in ('json','safetensors')]
    assert {f'run/{f}' for f in tables+nets}<=set(there), there
    sub = (sh.cwd/'run'/'submission.csv').read_bytes()
    assert len(sub.splitlines())==5
    assert sub==(sh.cwd/'again.csv').read_bytes()==(sh.cwd/'whole'/'submission.csv').read_bytes()
    assert len((sh.cwd/'audit.csv').read_text(encoding='utf-8').splitlines())==17

@pytest.fixture
def fresh(tmp_path, capsys):
    "Install the project beside what is asked for, use it, and give the versions back; the environment is removed in the end"
    env,start = tmp_path/'env',time.time()
    work = tmp_path/'work'
    work.mkdir()
    sh,found = Shell(work, [bindir(env)]),{}
    def _fresh(*what):
        install(sh, env, project(tmp_path/'copy'), *what)
        found.update(json.loads(sh(bindir(env)/'python', '-c', VERSIONS, *floors())))
        use(sh, env)
        return found
    yield _fresh
    with capsys.disabled():
        print(f"\nPython {sys.version.split()[0]}", ', '.join(f'{k} {v}' for k,v in found.items()), sep=', ')
        print(*sh.lines, f"{time.time()-start:6.1f} s  in all", sep='\n')
    shutil.rmtree(env, ignore_errors=True)

def test_newest(fresh):
    t = torch_release()
    found = fresh(*[f'torch=={t}'] if t else [])
    assert all(Version(found[k])>=Version(v) for k,v in floors().items()), found

def test_lowest(fresh, tmp_path):
    py = settings()['min_python']
    if '{}.{}'.format(*sys.version_info)!=py: pytest.skip(f"the lowest releases are those of Python {py}")
    pins = floors()
    if torch_release(): pins['torch'] = torch_release()
    (tmp_path/'lowest.txt').write_text('\n'.join(f'{k}=={v}' for k,v in pins.items()))
    found = fresh('-c', tmp_path/'lowest.txt')
    assert {k:Version(Version(found[k]).public) for k in pins}=={k:Version(v) for k,v in pins.items()}
