"""Files from strangers: candidate files, tables, names, paths and folders that are odd, damaged, hostile or not ours.
What is tried and what is said stands in tables, one row per input."""
import io, multiprocessing, os, re, resource, secrets, stat, time, tracemalloc, warnings, zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
import numpy as np, pandas as pd, pytest
from numpy.lib import format as npf
from sklearn.metrics import roc_curve
from m3dv import cli, data, submission as subm
from m3dv.core import M3dvError, as_path, check_writable, one_line, quoted, write_atomic
from m3dv.data import (assign_folds, audit, check_files, check_names, find_sample, hash_file, hash_nodule,
    audit_summary, is_formula, is_number, list_nodules, read_competition, read_labels, read_nodule, read_sample, take_frac)
from m3dv.evaluate import read_oof
from m3dv.loaders import get_dls
from m3dv.metrics import METRICS
from m3dv.predict import load_network, load_networks
from m3dv.recipe import load_recipe
from m3dv.runs import Run, data_hash
from m3dv.store import store_folder
from m3dv.submission import check_submission, predict_folder, submission, submission_form
from m3dv.synth import synth_nodules

def refused(f, says='', where=None):
    "`f` is refused by our own error, in one printable line that is not too long, names `where`, and has `says`"
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(M3dvError) as e: f()
    s = str(e.value)
    assert s.isprintable() and len(s)<=900, s
    assert says in s, s
    if where is not None: assert one_line(where) in s, s
    return s

@pytest.fixture(scope='module')
def comp(tmp_path_factory):
    return read_competition(synth_nodules(tmp_path_factory.mktemp('a')/'d', n=12, n_test=4, side=32, progress=False))

def copy_of(comp, to):
    import shutil
    return Path(shutil.copytree(comp.path, to))

@contextmanager
def as_nobody(folder):
    "As a user who may do only what everybody may, and enter the folders above `folder`: root may read and write everything"
    if os.geteuid(): yield; return
    modes = {o:o.stat().st_mode for o in folder.parents if o.stat().st_mode & 0o011!=0o011}
    for o,m in modes.items(): o.chmod(m|0o011)
    mode = folder.stat().st_mode; folder.chmod(mode|0o055); os.seteuid(65534)
    try: yield
    finally:
        os.seteuid(0); folder.chmod(mode)
        for o,m in modes.items(): o.chmod(m)

# ---------------------------------------------------------------- candidate files

V,S = np.arange(32**3).reshape((32,)*3).astype(np.uint8),np.indices((32,)*3).sum(0)<20

def npy(a): o = io.BytesIO(); np.save(o, a); return o.getvalue()
def headed(text, v=(1,0), size=None, body=b''):
    "An array with this text for its header, which declares `size` bytes"
    text = text if isinstance(text, bytes) else text.encode('latin1')
    return npf.magic(*v) + (len(text) if size is None else size).to_bytes(2 if v==(1,0) else 4, 'little') + text + body
def described(**kw): return headed(repr(dict(descr='|u1', fortran_order=False, shape=(32,)*3) | kw), body=V.tobytes())

def zipped(f, voxel=npy(V), seg=npy(S), how=zipfile.ZIP_STORED, **others):
    "A candidate file of these bytes"
    with warnings.catch_warnings(), zipfile.ZipFile(f, 'w', how) as z:
        warnings.simplefilter('ignore')
        for k,o in dict(voxel=voxel, seg=seg, **others).items():
            if o is not None: z.writestr(f'{k}.npy', o)
    return f

def swapped(f, old, new):
    b = f.read_bytes(); assert b.count(old)>=1
    f.write_bytes(b.replace(old, new)); return f

HEAD = npy(V)[10:128]
ARRAYS = { # bytes of the array `voxel`: what is said
    'nothing': (b'', 'not a readable array'),
    'no array': (b'candidate', 'not a readable array'),
    'only the magic': (npf.magic(1,0), 'not a readable array'),
    'version 9': (headed(HEAD, (9,9), body=V.tobytes()), 'version (9, 9) of the format'),
    'a header of 800 MB, of which 1 kB is there': (headed(b' '*1000, (2,0), 800*2**20), 'a header of 838860800 bytes'),
    'a header of 4 GB': (headed(b'', (3,0), 2**32-1), 'a header of 4294967295 bytes'),
    'a header of 10,001 blanks': (headed(b' '*10_001), 'a header of 10001 bytes'),
    'keys that cannot be sorted': (headed("{1:2,'a':3}"), 'not a readable array'),
    'a tuple for a dtype': (described(descr=('|u1',)), 'not a readable array'),
    'a dtype of old': (described(descr='a1'), 'voxel: '),
    'a set with a list in it': (headed("{[1]}"), 'not a readable array'),
    '4,000 brackets': (headed('['*4000), 'not a readable array'),
    'an escape of old': (headed("'\\d'"), 'not a readable array'),
    'a call': (headed("__import__('os').system('true')"), 'not a readable array'),
    'bytes that are no letters': (headed(bytes(range(128, 256))), 'not a readable array'),
    'an unclosed brace': (headed(HEAD.replace(b'}', b' ')), 'not a readable array'),
    'a list for a shape': (described(shape=[32,32,32]), 'not a readable array'),
    'sides that are true': (described(shape=(True,)*3), 'side is True, expected 32 to 512'),
    'a negative side': (described(shape=(-32,)*3), 'side is -32'),
    'a side of 10**400': (described(shape=(10**400,)*3), 'side is 1000'),
    '2,000 axes': (described(shape=(1,)*2000), 'expected three axes'),
    'a text for the order': (described(fortran_order='no'), 'not a readable array'),
    'objects': (described(descr='|O'), 'holds Python objects, which are never unpickled'),
    'a record': (described(descr=[('a','|u1')]), 'expected uint8'),
    '2 GB a voxel': (described(descr='|V2000000000'), 'expected uint8'),
    'two bytes a voxel': (described(descr='<u2'), 'dtype is uint16, expected uint8'),
    'signed bytes': (described(descr='|i1'), 'dtype is int8, expected uint8'),
    'a byte less': (npy(V)[:-1], 'fewer than the 32768 bytes of its shape'),
    'a byte more': (npy(V)+b'0', 'more than the 32768 bytes of its shape'),
    'a header only': (npy(V)[:128], 'fewer than the 32768 bytes of its shape'),
}

@pytest.mark.parametrize('what', ARRAYS)
@pytest.mark.parametrize('how', [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_array(tmp_path, what, how):
    b,says = ARRAYS[what]
    f = zipped(tmp_path/'candidate1.npz', b, how=how)
    refused(lambda: read_nodule(f), 'candidate1.npz: voxel: ', f)
    refused(lambda: read_nodule(f), says)

MASKS = {'the byte 2': (npy(S)[:-1]+b'\2', 'seg: holds the byte 2; expected bool'),
    'bytes': (npy(S.astype(np.uint8)), 'seg: dtype is uint8, expected bool'),
    'another side': (npy(np.zeros((33,)*3, bool)), 'seg: shape is (33, 33, 33), but voxel has (32, 32, 32)')}

@pytest.mark.parametrize('what', MASKS)
def test_mask(tmp_path, what): refused(lambda: read_nodule(zipped(tmp_path/'a.npz', seg=MASKS[what][0])), MASKS[what][1], tmp_path/'a.npz')

def twin(f):
    with warnings.catch_warnings(), zipfile.ZipFile(f, 'w') as z:
        warnings.simplefilter('ignore')
        for k in ('voxel','voxel','seg'): z.writestr(f'{k}.npy', npy(V if k=='voxel' else S))

def encrypted(f):
    "A file that says so of its members"
    zipped(f)
    for mark in (b'PK\1\2\x14\3\x14\0', b'PK\3\4\x14\0'): swapped(f, mark+b'\0', mark+b'\1')

FILES = { # what writes the file: what is said
    'nothing': (lambda f: f.write_bytes(b''), 'not a zip file, or cut off'),
    'text': (lambda f: f.write_text('candidate1,1'), 'not a zip file, or cut off'),
    'half a download': (lambda f: f.write_bytes(zipped(f).read_bytes()[:30_000]), 'not a zip file, or cut off'),
    'no mask': (lambda f: zipped(f, seg=None), "no key 'seg'; it has ['voxel']"),
    'no voxels': (lambda f: zipped(f, voxel=None), "no key 'voxel'; it has ['seg']"),
    'other keys, with control characters': (lambda f: zipped(f, None, None, **{'a\x1b[31m':b'', 'x'*5000:b''}), "no key 'voxel'"),
    'voxels twice': (twin, 'voxel: is there 2 times; expected once'),
    'compressed by bzip2': (lambda f: zipped(f, how=zipfile.ZIP_BZIP2), 'voxel: compression 12 is not read'),
    'compressed by lzma': (lambda f: zipped(f, how=zipfile.ZIP_LZMA), 'voxel: compression 14 is not read'),
    'encrypted': (encrypted, 'damaged or cut off (RuntimeError'),
    'from a later version of zip': (lambda f: swapped(zipped(f), b'PK\1\2\x14\3\x14', b'PK\1\2\x14\3\xff'), '(zip file version 25.5)'),
    'another name in the member': (lambda f: swapped(zipped(f), b'\x09\0\0\0voxel', b'\x09\0\0\0vixel'), 'cut off (BadZipFile'),
    'a voxel changed': (lambda f: swapped(zipped(f), bytes(range(9)), bytes(range(1, 10))), "Bad CRC-32 for file 'voxel.npy')"),
    'the length of the header changed by two': (lambda f: swapped(zipped(f), b'\x93NUMPY\1\0\x76', b'\x93NUMPY\1\0\x74'), 'voxel: '),
}

@pytest.mark.parametrize('what', FILES)
def test_file(tmp_path, what):
    write,says = FILES[what]; f = tmp_path/'candidate1.npz'; write(f)
    refused(lambda: read_nodule(f), says, f)

def test_honest_files(tmp_path):
    "Whatever numpy may write is read as it is"
    for k,save in enumerate((np.savez, np.savez_compressed)):
        for j,order in enumerate('CF'):
            f = tmp_path/f'{k}{j}.npz'; save(f, seg=np.array(S, order=order), voxel=np.array(V, order=order), more=np.arange(3))
            nod = read_nodule(f)
            assert (nod.voxel==V).all() and (nod.seg==S).all() and nod.voxel.flags.writeable
            assert hash_nodule(nod)==hash_nodule(data.Nodule(V, S))
    for v in ((1,0), (2,0), (3,0)):
        assert (read_nodule(zipped(tmp_path/'v.npz', headed(HEAD, v, body=V.tobytes()))).voxel==V).all()

@pytest.mark.parametrize('what,step', [('header', 1), ('zip', 7), pytest.param('zip', 1, marks=pytest.mark.slow)])
def test_every_bit(tmp_path, what, step):
    "Each single bit of a small file: the same nodule, or our error that names it; of a stored file, of the header of its first array"
    v = np.zeros((32,)*3, np.uint8); v[3,4,5] = 200; s = v>100; f,g = tmp_path/'a.npz',tmp_path/'b.npz'
    (np.savez_compressed if what=='zip' else np.savez)(f, voxel=v, seg=s)
    b = f.read_bytes(); want = hash_nodule(read_nodule(f)); at = b.index(b'\x93NUMPY') if what=='header' else 0
    n = {'same':0, 'refused':0}
    for i in range(8*at, 8*(at+128) if what=='header' else 8*len(b), step):
        g.write_bytes(b[:i//8]+bytes([b[i//8]^(1<<i%8)])+b[i//8+1:])
        try: assert hash_nodule(read_nodule(g))==want, i; n['same'] += 1
        except M3dvError as e: assert str(e).startswith(f'{g}: ') and str(e).isprintable(), i; n['refused'] += 1
    if what=='header': assert n=={'same':0, 'refused':1024} # the checksum covers every one of them
    else: assert n['refused']>n['same']>0, n # dates and attributes of the members say nothing

def peak(f):
    "Bytes that `f` took at most"
    tracemalloc.start()
    try: f(); return tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()

def test_no_header_takes_memory(tmp_path):
    "200 kB on disk that declare 100 MB of header, all of it there"
    f = zipped(tmp_path/'a.npz', headed(b' '*(100*2**20), (2,0)), how=zipfile.ZIP_DEFLATED)
    assert f.stat().st_size<3e5
    assert peak(lambda: refused(lambda: read_nodule(f), 'a header of 104857600 bytes'))<2e7

def test_no_member_takes_memory(tmp_path):
    "A member that goes on for 60 MB after its array is left after the next block"
    f = zipped(tmp_path/'a.npz', npy(V)+bytes(60*2**20), how=zipfile.ZIP_DEFLATED)
    assert peak(lambda: refused(lambda: read_nodule(f), 'more than the 32768 bytes'))<2e7

def test_file_without_permission(comp, tmp_path):
    audit(comp, progress=False) # imports what nobody may import
    d = copy_of(comp, tmp_path/'d'); f = d/'train_val'/f'{comp.train.name[0]}.npz'; f.chmod(0); d.chmod(0o700)
    with as_nobody(tmp_path):
        if os.getuid()!=os.geteuid(): # the folder is another user's
            for look in (read_competition, audit, list_nodules, find_sample, lambda o: predict_folder('no-run', o, tmp_path/'s.csv')):
                refused(lambda look=look: look(d), 'cannot be ', tmp_path)
    d.chmod(0o755)
    with as_nobody(tmp_path):
        refused(lambda: read_nodule(f), 'cannot be read (Permission denied); allow it to be read', f)
        refused(lambda: check_files(d, progress=False), '1 of 16 files cannot be read', f)
        t = audit(d, progress=False)
    assert t.error.notna().sum()==1 and t.error[0].startswith('cannot be read (Permission denied)') and t['flags'][0]=='unreadable'

@pytest.mark.parametrize('cache', [None, 'cache'])
def test_loaders_without_permission(comp, tmp_path, cache):
    "Loaders, a fold's record and a store name a nodule that may not be read"
    few = dict(side=16, margin=4, bs=4, n_folds=2, device='cpu', progress=False, cache=cache and tmp_path/cache)
    get_dls(comp, **few) # imports what nobody may import
    d = copy_of(comp, tmp_path/'d'); f = d/'train_val'/f'{comp.train.name[0]}.npz'; f.chmod(0)
    if cache: (tmp_path/cache).chmod(0o777)
    with as_nobody(tmp_path):
        for look in (lambda: get_dls(d, **few), lambda: data_hash(read_competition(d)), lambda: hash_file(f)):
            refused(look, 'cannot be read (Permission denied); allow it to be read', f)

def test_audit_never_ends(comp, tmp_path):
    "Every bad file of this page in one folder: each has its row, with its error"
    d = copy_of(comp, tmp_path/'d')
    for i,(b,_) in enumerate(ARRAYS.values()): zipped(d/'test'/f'bad{i}.npz', b)
    for i,(write,_) in enumerate(FILES.values()): write(d/'train_val'/f'bad{i}.npz')
    t = audit(d, progress=False)
    assert t.error.notna().sum()==len(ARRAYS)+len(FILES) and len(t)==16+len(ARRAYS)+len(FILES)
    assert all(e.isprintable() and len(e)<=900 for e in t.error.dropna())
    refused(lambda: check_files(d, progress=False), f'{len(ARRAYS)} of {16+len(ARRAYS)} files cannot be read')

def masks(n):
    a = np.arange(n)
    yield 'full', np.ones((n,)*3, bool)
    yield 'checkerboard', (a[:,None,None]+a[:,None]+a)%2==0
    yield 'noise', np.random.default_rng(0).random((n,)*3, np.float32)<.1

def audited(d, pipe):
    "Audit a folder; what is said of its first file, and the memory that this process took for it, also in libraries that are not Python's"
    most = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*1024
    was = most(); pipe.send((audit(d, progress=False).iloc[0].to_dict(), most()-was))

@pytest.mark.parametrize('side', [256, pytest.param(512, marks=pytest.mark.slow)])
def test_large_masks(tmp_path, side):
    "Six bytes a voxel, the two of the nodule among them; scipy's `label` and `binary_dilation` take up to twelve"
    fork = multiprocessing.get_context('fork')
    d = synth_nodules(tmp_path/'d', n=2, n_test=0, side=32, progress=False); f = d/'train_val'/'candidate1.npz'
    for what,m in masks(side):
        np.savez_compressed(f, voxel=np.zeros(m.shape, np.uint8), seg=m); del m
        us,them = fork.Pipe(); p = fork.Process(target=audited, args=(d, them)); at = time.monotonic(); p.start()
        assert us.poll(60), f'{what}: took more than a minute'
        res,most = us.recv(); p.join()
        assert time.monotonic()-at<60 and most<6*side**3, (what, most/side**3)
        assert (res['components']==1)==(what=='full') and ('noise' in res['flags'])==(what!='full')

# ---------------------------------------------------------------- what systems leave in a folder

LEFT = ['._{}', '.{}.swp', '~${}', '.DS_Store', 'Thumbs.db', '.~lock.{}#']

def test_what_systems_leave(comp, tmp_path):
    "Beside every file of a competition folder and of a run stand those of a Mac and of an office program; nothing changes"
    d = copy_of(comp, tmp_path/'d')
    files = [f for f in d.rglob('*') if f.is_file()]
    for f in files:
        for o in LEFT: f.with_name(o.format(f.name)).write_bytes(b'\0\5\x16\7\0\2\0\0Mac OS X        ')
    (d/'__MACOSX'/'test').mkdir(parents=True); (d/'__MACOSX'/'test'/'._candidate1.npz').write_bytes(b'')
    was,c = comp,read_competition(d)
    for o in ('train','test'): assert getattr(c, o).name.tolist()==getattr(was, o).name.tolist()
    assert c.sample==was.sample and c.unlabelled==[]
    assert audit(d, progress=False).drop(columns='error').equals(audit(comp, progress=False).drop(columns='error'))
    assert len(check_files(d, progress=False))==16

def test_left_beside_a_sample(tmp_path):
    "The example: a USB stick from a Mac"
    for o in ('sampleSubmission.csv', '._sampleSubmission.csv', '~$sampleSubmission.csv'): (tmp_path/o).write_text('')
    assert find_sample(tmp_path).name=='sampleSubmission.csv'
    (tmp_path/'sample_submission.csv').write_text('')
    refused(lambda: find_sample(tmp_path), "has 2 sample submissions ('sampleSubmission.csv', 'sample_submission.csv')", tmp_path)

def test_left_beside_networks(tmp_path):
    (tmp_path/'models').mkdir()
    for o in ('._{}', '.{}.77.part', '~${}'): (tmp_path/'models'/o.format('seed0_fold0.safetensors')).write_bytes(b'')
    refused(lambda: load_networks(tmp_path), 'holds no networks', tmp_path)

# ---------------------------------------------------------------- paths, and what cannot be written

def test_home(comp, tmp_path, monkeypatch):
    "`~` is the home folder wherever a path is taken; no folder of that name is made"
    d = copy_of(comp, tmp_path/'d'); monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.chdir(tmp_path)
    n = comp.train.name[0]
    assert (read_nodule(f'~/d/train_val/{n}.npz').voxel==read_nodule(d/'train_val'/f'{n}.npz').voxel).all()
    assert len(read_labels('~/d/train_val.csv'))==12 and len(list_nodules('~/d/test'))==4
    assert read_sample('~/d/sampleSubmission.csv').ids==comp.sample.ids and find_sample('~/d')==d/'sampleSubmission.csv'
    assert read_competition('~/d').path==d and len(audit('~/d', progress=False))==16 and len(check_files('~/d', False))==16
    assert check_writable('~/x')==tmp_path/'x' and write_atomic('~/new/x', lambda f: f.write_text('1'))==tmp_path/'new'/'x'
    oof = pd.DataFrame(dict(name=['a'], label=0, repeat=0, fold=0, seed=0, recipe='r', p=.5)); oof.to_csv('oof.csv', index=False)
    assert len(read_oof('~/oof.csv'))==1 and check_submission('~/d/sampleSubmission.csv', comp.sample)==4
    monkeypatch.setenv('M3DV_CACHE', '~/c'); assert store_folder()==tmp_path/'c'
    for f in (load_networks, load_network, lambda o: predict_folder(o, '~/d', '~/s.csv', device='cpu', progress=False)):
        refused(lambda f=f: f('~/none'), f'{tmp_path}/none')
    (tmp_path/'run').mkdir(); (tmp_path/'run'/'recipe.json').write_text('no recipe')
    for f in (lambda o: Run(o).recipe, lambda o: load_recipe(f'{o}/recipe.json')): refused(lambda f=f: f('~/run'), 'recipe.json: not JSON')
    assert not (tmp_path/'~').exists() and sorted(o.name for o in tmp_path.iterdir())==['d', 'new', 'oof.csv', 'run']

PATHS = {'a number': (3, 'path (3) cannot be used'), 'nothing': (None, 'path (None) cannot be used'), 'bytes': (b'a', 'cannot be used'),
    'a zero byte': ('a\0b', 'holds a zero byte'), 'half a surrogate pair': ('\ud800', 'cannot be used'),
    'the home of nobody': ('~no-such-user-here/x', 'cannot be used')}
TAKE_PATHS = [as_path, check_writable, read_nodule, read_labels, list_nodules, read_competition, lambda o: write_atomic(o, lambda f: None)]

@pytest.mark.parametrize('what', PATHS)
@pytest.mark.parametrize('f', TAKE_PATHS)
def test_path(what, f): refused(lambda: f(PATHS[what][0]), PATHS[what][1])

TARGETS = { # made from a folder with the file a.txt in it: what is said
    'a folder': (lambda d: d, 'is a folder; expected the name of a file to write'),
    'in a file': (lambda d: d/'a.txt'/'b', 'a.txt: is a file'),
    'deep in a file': (lambda d: d/'a.txt'/'b'/'c'/'d', 'a.txt'),
    'a name of 300 letters': (lambda d: d/('x'*300), 'File name too long'),
    'in a folder with a name of 300 letters': (lambda d: d/('x'*300)/'a', 'File name too long'),
    'a device': (lambda d: Path(os.devnull), 'is a device; expected the name of a file to write'),
}

@pytest.mark.parametrize('what', TARGETS)
def test_target(tmp_path, what, comp):
    "Refused before the work, and at its end; neither leaves anything, and the submission and the audit never begin"
    (tmp_path/'a.txt').write_text('mine'); make,says = TARGETS[what]; f = make(tmp_path)
    refused(lambda: check_writable(f, file=True), says)
    refused(lambda: write_atomic(f, lambda f: f.write_text('x')))
    refused(lambda: predict_folder(tmp_path/'no-run', comp, f), says)
    assert [o.name for o in tmp_path.iterdir()]==['a.txt'] and (tmp_path/'a.txt').read_text()=='mine'
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)

def test_audit_command_refuses_first(comp, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(data, 'audit', lambda *_: pytest.fail('the work had begun'))
    with pytest.raises(SystemExit) as e: cli.m3dv_audit([str(comp.path), '--out', str(tmp_path)])
    out = capsys.readouterr()
    assert e.value.code==2 and out.err.count('\n')==1 and 'is a folder; expected the name of a file to write' in out.err

def test_folder_without_permission(tmp_path):
    "A folder that may not be written, and one in it that may not be entered"
    (tmp_path/'shut').mkdir(); (tmp_path/'shut').chmod(0); tmp_path.chmod(0o555); new = tmp_path/'new'/'a.csv'
    try:
        with as_nobody(tmp_path):
            refused(lambda: check_writable(tmp_path), 'cannot be written (Permission denied); name another place', tmp_path)
            refused(lambda: check_writable(new, file=True), 'cannot be written (Permission denied)', new)
            for f in (tmp_path/'a.csv', new):
                refused(lambda f=f: write_atomic(f, lambda o: o.write_text('x')), 'cannot be written (Permission denied)', f)
            refused(lambda: list_nodules(tmp_path/'shut'), 'shut: cannot be read (Permission denied)')
            refused(lambda: read_nodule(tmp_path/'shut'/'a.npz'), 'a.npz: cannot be read (Permission denied)')
    finally: tmp_path.chmod(0o755); (tmp_path/'shut').chmod(0o755)
    assert [o.name for o in tmp_path.iterdir()]==['shut']

def test_no_space(tmp_path):
    "A full disk, a limit on the size of files, more than is free"
    f = tmp_path/'a.csv'; f.write_text('old')
    refused(lambda: check_writable(f, 10**18), '1000000000000 MB will be written, and ', f)
    with pytest.raises(M3dvError, match='a.csv: cannot be written .No space left on device.; name another place'):
        write_atomic(f, lambda o: Path('/dev/full').write_text('x'))
    was = resource.getrlimit(resource.RLIMIT_FSIZE); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, was[1]))
    try:
        a = refused(lambda: check_writable(f), 'cannot be written (File too large)', f)
        b = refused(lambda: write_atomic(f, lambda o: o.write_text('x'*2000)), 'cannot be written (File too large)', f)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, was)
    assert '.part' not in a+b and f.read_text()=='old' and [o.name for o in tmp_path.iterdir()]==['a.csv']

def test_no_link_is_followed(tmp_path, monkeypatch):
    "Links where a hidden file might be made: none is followed, none is removed; the name is another each time"
    (tmp_path/'victim').write_text('mine'); f = tmp_path/'oof.csv'
    links = [tmp_path/f'.oof.csv.{o}.part' for o in (os.getpid(), 0, 'x')] + [tmp_path/'.oof.csv.part', tmp_path/'oof.csv.part']
    for o in links: o.symlink_to(tmp_path/'victim')
    seen = set()
    for _ in range(20): write_atomic(f, lambda o: seen.add(o.name) or o.write_text('whole'))
    assert len(seen)==20 and all(re.fullmatch(r'\.oof\.csv\.[0-9a-f]{16}\.part', o) for o in seen)
    monkeypatch.setattr(secrets, 'token_hex', lambda n: 'x') # as if it had been guessed
    refused(lambda: write_atomic(f, lambda o: o.write_text('x')), 'oof.csv: cannot be written (File exists)')
    f.unlink(); f.symlink_to(tmp_path/'victim'); monkeypatch.undo()
    write_atomic(f, lambda o: o.write_text('new')) # the link is replaced, not followed
    assert (tmp_path/'victim').read_text()=='mine' and not f.is_symlink() and all(o.is_symlink() for o in links)

@pytest.mark.parametrize('umask,mode', [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions(tmp_path, umask, mode):
    "A file has the permissions that the user's new files have, also where the library that writes it makes it private"
    from safetensors.numpy import save_file
    was = os.umask(umask)
    try:
        f = write_atomic(tmp_path/'a', lambda o: o.write_text('x'))
        g = write_atomic(tmp_path/'b', lambda o: save_file(dict(a=np.zeros(3)), o))
    finally: os.umask(was)
    assert {stat.S_IMODE(o.stat().st_mode) for o in (f,g)}=={mode}

def test_write_errors(tmp_path):
    from safetensors.numpy import save_file
    f = tmp_path/'a'
    refused(lambda: write_atomic(f, lambda o: None), 'a: cannot be written (nothing was written)')
    refused(lambda: write_atomic(f, lambda o: o.write_text('\udcff', encoding='utf-8')), 'a: cannot be written (')
    refused(lambda: write_atomic(f, lambda o: save_file(dict(a=np.zeros(3)), tmp_path/'none'/'x')), 'a: cannot be written (')
    with pytest.raises(ZeroDivisionError): write_atomic(f, lambda o: 1/0) # a fault of ours keeps its name
    assert list(tmp_path.iterdir())==[]

# ---------------------------------------------------------------- messages

ODD = ['a\nb', 'a\r\n\tb', '\x1b[2J', 'a\0', '\u2028', '\x85', '\udcff', '\u202egnp.exe', 'x'*10**6, '\ufeff', '\n'*1000]

@pytest.mark.parametrize('s', ODD)
def test_message_is_one_line(s):
    for o in (str(M3dvError(s)), one_line(s), quoted(s)): assert o.isprintable() and len(o)<=900
    assert len(quoted(s))<=60 and quoted(s)[0]==quoted(s)[-1]=="'"

# ---------------------------------------------------------------- names

EMPTY,CONTROL = 'is empty or holds a path','holds a control character'
NAMES = {'blank': (' ', EMPTY), 'a path': ('../a', EMPTY), 'a path of Windows': ('a\\b', EMPTY), 'dots': ('..', EMPTY),
    'a line break': ('a\nb', CONTROL), 'a tab': ('a\tb', CONTROL), 'a bell': ('a\x07', CONTROL), 'an escape': ('\x1b[31ma', CONTROL),
    'C1': ('a\x9b', CONTROL), 'a line separator': ('a\u2028b', CONTROL), 'right to left': ('a\u202eb', CONTROL),
    'a byte order mark': ('a\ufeffb', CONTROL), 'given twice': ('a', 'is given more than once')}

@pytest.mark.parametrize('what', NAMES)
def test_name(tmp_path, what):
    "In label files, samples, submissions and out-of-fold tables alike"
    name,says = NAMES[what]; f = tmp_path/'t.csv'
    def read(read, head, *rows):
        with f.open('w', encoding='utf-8', newline='') as h: pd.DataFrame([o.values() for o in rows], columns=head).to_csv(h, index=False)
        refused(lambda: read(f), says, f)
    two = lambda **kw: [dict(name='a', **kw), dict(name=name, **kw)]
    read(read_labels, ['name','label'], *two(label=1)); read(lambda f: read_sample(f, ['a']), ['id','p'], *two(p=.5))
    if what=='given twice': says = 'has two predictions' # once per repeat is as it should be
    else: read(read_oof, 'name label repeat fold seed recipe p'.split(), *two(label=1, repeat=0, fold=0, seed=0, recipe='r', p=.5))
    if what!='given twice': read(check_submission, ['id','p'], *two(p=.5)); refused(lambda: submission_form(['a', name]), says)
    else: says = 'is given more than once'; read(check_submission, ['id','p'], *two(p=.5))

def test_bytes_that_are_no_name(comp, tmp_path):
    "A file with a name that is not UTF-8, no sample: found before a network is loaded; the audit shows it"
    d = copy_of(comp, tmp_path/'d'); (d/'sampleSubmission.csv').unlink()
    try: os.rename(d/'test'/f'{comp.test.name[0]}.npz', os.fsencode(d/'test')+b'/caf\xe9.npz')
    except OSError: pytest.skip('this file system takes only names in UTF-8')
    refused(lambda: predict_folder(tmp_path/'no-run', d, tmp_path/'s.csv'), r"('caf\udce9') holds a control character, or is not UTF-8")
    c = read_competition(d)
    refused(lambda: submission(c.test.name, np.full(4, .5), c.sample), 'is not UTF-8')
    t = audit(d, progress=False)
    assert t.name[t['flags'].str.contains('odd name')].tolist()==[r'caf\udce9'] and t.error.isna().all()
    cli.m3dv_audit([str(d), '--out', str(tmp_path/'audit.csv')])
    assert r'caf\udce9' in (tmp_path/'audit.csv').read_text(encoding='utf-8')

FORMULAS = ["=1+cmd|' C'!A0", '+1', '-1', '@SUM(A1)', '＝1', ' =1']

@pytest.mark.parametrize('name', FORMULAS)
def test_formula(comp, tmp_path, name):
    "A file that a spreadsheet would run is refused, unless the sample asks for it, letter by letter; the audit disarms it"
    d,old = copy_of(comp, tmp_path/'d'),comp.test.name[0]
    sample = (d/'sampleSubmission.csv').read_text(); (d/'sampleSubmission.csv').unlink()
    (d/'test'/f'{old}.npz').rename(d/'test'/f'{name}.npz')
    assert is_formula(name)
    refused(lambda: predict_folder(tmp_path/'no-run', d, tmp_path/'s.csv'), f'would run the name ({quoted(name)}) as a formula; rename')
    t = audit(d, progress=False)
    assert t.name[t['flags'].str.contains('odd name')].tolist()==[f"'{name}"]
    if name!=name.strip(): return # the blank is not part of a sample's id
    (d/'sampleSubmission.csv').write_text(sample.replace(f'{old},', f'"{name}",'), encoding='utf-8')
    c = read_competition(d); s = submission(c.test.name, np.full(4, .5), c.sample)
    assert s.iloc[:,0].tolist()==c.sample.ids and name in c.sample.ids
    subm.write_submission(s, tmp_path/'s.csv', c.sample)
    assert read_sample(tmp_path/'s.csv', c.sample.ids).ids==c.sample.ids

@pytest.mark.parametrize('name', ['candidate1', '1-2', 'a=b', 'ä', '結節', '007', "o'neill", 'a b', 'a,b', 'a"b', '🫁'])
def test_honest_name(tmp_path, name):
    "What is read, and comes back from a submission as it was"
    check_names([name]); assert not is_formula(name)
    s = submission([name, 'b'], [.25, .5]); f = subm.write_submission(s, tmp_path/'s.csv')
    assert set(read_sample(f, [name, 'b']).ids)=={name, 'b'}

# ---------------------------------------------------------------- tables

OOF = dict(name='c1', label='1', repeat='0', fold='2', seed='7', recipe='default', p='0.25')
VALUES = dict(p=['', 'inf', '-inf', 'nan', '1e999', '0_1', 'x', '٣', '0x1p-3', '1,5'], label=['', '2', '-1', 'yes', 'nan', '0.5', 'True'],
    fold=['', 'first', '1.5', '-1', 'nan', 'inf', '１'], repeat=['', 'x', '1.5', '-1'], seed=['', 'x', '1.5', '9'*30],
    recipe=['', 'a\x07', 'a\nb'])

@pytest.mark.parametrize('column,value', [(k,v) for k,vs in VALUES.items() for v in vs])
def test_oof_value(tmp_path, column, value):
    f = tmp_path/'oof.csv'; pd.DataFrame([OOF|dict(name='c0'), OOF|{column:value}]).to_csv(f, index=False)
    refused(lambda: read_oof(f), f"{column} of 'c1' is (", f)

def test_oof_honest(tmp_path):
    "Types and values as they were written, beside columns of one's own"
    f = tmp_path/'oof.csv'; t = pd.DataFrame([OOF|dict(name='007'), OOF|dict(p='1e-05')]).assign(train_frac=['0.5','1'], note=['', 'x'])
    t.to_csv(f, index=False)
    d = read_oof(f)
    assert d[['name','p','fold','train_frac','note']].values.tolist()==[['007',.25,2,.5,''], ['c1',1e-5,2,1.,'x']]
    assert all(d[c].dtype.kind=='i' for c in ('label','repeat','fold','seed'))

@pytest.mark.parametrize('text,says', [('', 'empty'), ('name,p\na,1\n', 'has no column label'), ('\0', 'holds a zero byte'),
    ('name,name,label,repeat,fold,seed,recipe,p\n', 'has 2 column name'),
    ('name,label,repeat,fold,seed,recipe,p\na,1\n', 'row 2 has 2 values'), ('"', 'empty')])
def test_oof_text(tmp_path, text, says):
    f = tmp_path/'oof.csv'; f.write_text(text); refused(lambda: read_oof(f), says, f)

LABELS = {
    'another header': ('id,target\na,1\n', "header is 'id,target'; expected name,label"),
    'two columns of one name': ('name,label,x,x\n', 'two columns have one name'),
    'a column without a name': ('name,label,\na,1,2\n', "the column ('') has no name that can be printed"),
    'our own column': ('name,label,path\na,1,2\n', 'rename the column path'),
    'a column with a control character': ('name,label,a\x07\na,1,2\n', 'has no name that can be printed'),
    'label 2': ('name,label\na,2\n', "label of 'a' is ('2'); expected 0 or 1"),
    'label of a megabyte': ('name,label\na,'+'1'*10**6, 'not a CSV file'),
    'label of many lines': ('name,label\na,"1\n2\n3"\n', "label of 'a' is ('1\\n2\\n3')"),
    'a zero byte': ('name,label\na\0,1\n', 'holds a zero byte'),
    'a megabyte of header': (','.join(['x'*99]*10**4), 'expected name,label'),
}

@pytest.mark.parametrize('what', LABELS)
def test_labels(tmp_path, what):
    f = tmp_path/'l.csv'; f.write_text(LABELS[what][0], encoding='utf-8'); refused(lambda: read_labels(f), LABELS[what][1], f)

@pytest.mark.parametrize('s', ['1', '0.5', '1e-5', '.5', 'inf', 'nan', '1_0', '٣', '1e400', ''])
def test_number(s): assert is_number(s)==(s in ('1', '0.5', '1e-5', '.5'))

@pytest.mark.parametrize('p', ['inf', 'nan', '1_0', '-0.1', '1.1', '', '0,5', '٠'])
def test_submission_value(tmp_path, p):
    f = tmp_path/'s.csv'; pd.DataFrame(dict(Id=['a'], p=[p])).to_csv(f, index=False)
    refused(lambda: check_submission(f), "prediction of 'a' is (", f)

# ---------------------------------------------------------------- folds

def test_folds_as_they_came_out():
    "Groups of any kind: every fold holds both classes, or the folds are refused; what is refused says which fold"
    rng = np.random.default_rng(0); seen = dict(made=0, refused=0)
    for k in range(100):
        n = int(rng.integers(8, 60)); df = pd.DataFrame(dict(name=[f'c{i}' for i in range(n)], label=rng.integers(0, 2, n)))
        df['group'] = rng.integers(0, rng.integers(2, n), n)
        if rng.random()<.3: df['group'] = df.group.where(df.label==0, 0) # all ones in one group
        folds = int(rng.integers(2, 7))
        try: f = assign_folds(df, folds, k)
        except M3dvError as e: seen['refused'] += 1; assert re.match(r'fold \d of|n_folds|group', str(e)), e; continue
        seen['made'] += 1
        t = pd.crosstab(f, df.label).reindex(index=range(folds), columns=[0,1], fill_value=0)
        assert (t>0).all(axis=None) and (pd.crosstab(f, df.group)>0).sum().eq(1).all()
    assert seen['made']>25 and seen['refused']>25, seen

def test_defect_of_the_splitter_is_seen(monkeypatch):
    "A splitter that leaves a fold empty, or a nodule out, is not believed"
    df = pd.DataFrame(dict(name=list('abcdefgh'), label=[0,1]*4))
    class Bad:
        def __init__(self, *_, **__): pass
        def split(self, x, *_): return [(None, np.arange(8)), (None, np.array([], int))]
    monkeypatch.setattr(data, 'StratifiedKFold', Bad)
    refused(lambda: assign_folds(df, 2), 'fold 1 of 2 would hold 0 ones and 0 zeros, expected both; take fewer folds')

# ---------------------------------------------------------------- limits and defaults, on both of their sides

def test_limit_of_side(comp):
    refused(lambda: audit(comp, side=7, progress=False), 'side (7) of the crop is not between 8')
    assert len(audit(comp, side=8, progress=False))==16

def test_limit_of_fraction():
    y = np.arange(20)%2
    for k in (0, -.1, 1.01): refused(lambda k=k: take_frac(y, k), f'train_frac ({k}) is not above 0 and up to 1')
    assert take_frac(y, 1).all() and take_frac(y, .5).sum()==10 and take_frac(y, .01).sum()==4

def test_as_many_groups_as_folds():
    df = pd.DataFrame(dict(name=list('abcdefghijkl'), label=[0,1]*6, patient=np.repeat([1,2,3,4], [2,2,4,4])))
    assert set(assign_folds(df, 4, group='patient'))=={0,1,2,3}
    refused(lambda: assign_folds(df, 5, group='patient'), 'has 4 values, fewer than the 5 folds')

def test_audit_counts_each_class(comp):
    c = replace(comp, train=comp.train.drop(index=comp.train.index[comp.train.label==1][:3]))
    t = audit(c, progress=False); one,zero = (t.label==1).sum(),(t.label==0).sum()
    assert one!=zero and f'({one} ones, {zero} zeros)' in audit_summary(t)

def test_default_sensitivity():
    "0.9, as the figure's name says, by scikit-learn's curve"
    rng = np.random.default_rng(0); y = np.arange(60)%2; p = rng.random(60)*.7+.3*y
    fpr,tpr,_ = roc_curve(y, p, drop_intermediate=False); w = np.ones((1,60))
    assert METRICS['specificity at sensitivity 0.9'][0](y, p, w)[0]==pytest.approx((1-fpr[tpr>=.9]).max())
    assert METRICS['sensitivity at specificity 0.9'][0](y, p, w)[0]==pytest.approx(tpr[1-fpr>=.9].max())

def test_default_crops(comp): assert get_dls(comp, bs=4, n_folds=2, device='cpu', cache=None, progress=False).store.side==32+2*8
