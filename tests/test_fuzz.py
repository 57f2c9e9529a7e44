"""The fuzzer in short, and its judge: each way in which a reader may fail is planted once and must be seen"""
import os, pickle, warnings
from collections import Counter
from pathlib import Path
import pytest
import fuzz
from m3dv.core import M3dvError

@pytest.fixture(scope='module')
def made(tmp_path_factory): d = tmp_path_factory.mktemp('seeds'); fuzz.make_seeds(d); return d

def test_short(made):
    "A few hundred mutants of all formats, small bombs, and some single bits: read correctly or refused in one line"
    counts,found,_ = fuzz.fuzz(n=420, seed=0, bits=499, large=False, made=made)
    for r in fuzz.table(counts, Counter()): print(*r[:-1])
    assert not found, '\n'.join(f"{out}: {':'.join(map(str, job))} {rel}: {why}" for job,rel,out,why,_ in found.values())
    for f in fuzz.FORMATS:
        outs = {o for k,_,o in counts if k==f}
        assert outs & {'same','changed'} and ('refused' in outs or f in ('store','run')), f"{f}: {outs}"

def test_mutants_are_drawn_by_number(made):
    "The same number gives the same bytes, whatever was drawn before; and hardly a mutant is the seed itself"
    for f in fuzz.FORMATS:
        seeds = fuzz.everything(made/f); jobs = [(f, 'random', 0, i) for i in range(150)]
        first = [fuzz.mutant(f, j, seeds) for j in jobs]
        assert first==[fuzz.mutant(f, j, seeds) for j in jobs[::-1]][::-1], f
        assert sum(fs[rel]==seeds[rel] for rel,_,fs,_ in first)<15, f

# ---------------------------------------------------------------- what the judge must see

def refuse(f, *args):
    e = M3dvError('x'); e.args = args
    raise e

def unpickle(f): pickle.loads(pickle.dumps(Counter()))

def bait(f):
    try: __import__(fuzz.BAIT)
    except ImportError: pass

def spin(f):
    while True: pass

def claim(f): raise AssertionError

FAULTS = dict(same=lambda f: 'seed', changed=lambda f: 'other', refused=lambda f: refuse(f, f'{f}: no'), exception=lambda f: {}[0],
    warning=lambda f: warnings.warn('x', stacklevel=1), nameless=lambda f: refuse(f, 'no'), lines=lambda f: refuse(f, f'{f}: a\nb'),
    control=lambda f: refuse(f, f'{f}: \x1b[2J'), long=lambda f: refuse(f, f'{f}: '+'x'*5000), memory=lambda f: bytearray(2**31), slow=spin,
    pickle=unpickle, written=lambda f: (f.parent.parent.parent/'x').write_text(''), made=lambda f: os.mkdir(f.parent.parent.parent/'y'),
    imported=bait, ran=lambda f: os.system(':'), died=lambda f: os._exit(3), nonsense=claim)
SEEN = dict(same='same', changed='changed', refused='refused', exception='exception', warning='exception', nameless='file not named',
    lines='several lines', control='control characters', long='long message', memory='memory', slow='slow', pickle='pickle',
    written='wrote outside', made='wrote outside', imported='import', ran='ran', died='died', nonsense='nonsense accepted')

def toy(f): return 'seed' if (k:=f.read_text())=='seed' else FAULTS[k](f) if k in FAULTS else 'other'

@pytest.fixture(scope='module')
def reader(tmp_path_factory):
    with pytest.MonkeyPatch.context() as m:
        m.setattr(fuzz, 'FORMATS', dict(toy=(toy, fuzz.no_use, [('a.csv', 'csv', False)]))); m.setattr(fuzz, 'SECONDS', .5)
        m.setattr(fuzz, 'BOMBS', dict(toy={k:('a.csv', lambda b, k=k: k.encode()) for k in FAULTS}))
        root = tmp_path_factory.mktemp('a')/'root'; (root/'toy').mkdir(parents=True); (root/'toy'/'a.csv').write_text('seed')
        r = fuzz.Reader(root, dict(toy=dict(a=b'')|{'a.csv':b'seed'})); (root/'toy'/'a').write_bytes(b'')
        yield r
        r.stop()

@pytest.mark.parametrize('k', FAULTS)
def test_judge(reader, k):
    rel,how,out,why,_,b = reader.ask(('toy', 'bomb', k))
    assert (rel,how,out)==('a.csv', 'bomb', SEEN[k]), why
    assert b==(b'' if out in fuzz.READ else k.encode())

def test_silence(reader):
    "A bit that changes what is read, where a checksum should have told"
    assert reader.ask(('toy', 'bit', 'a.csv', 0))[2]=='changed in silence'

def test_restored(reader):
    "The next mutant finds the folder as it was"
    reader.ask(('toy', 'bomb', 'changed'))
    assert fuzz.everything(Path(reader.root)/'toy')=={'a':b'', 'a.csv':b'seed'}
