"""Files that carry what was learnt, and what was cut: recipes, saved networks, crops. Odd, damaged, hostile and old ones are read as they
were written, or refused in one line that names them; and names in pictures"""
import copy, json, os, resource, shutil, sys, time, warnings
from hashlib import sha256
from pathlib import Path
import matplotlib.pyplot as plt, numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load, save
from m3dv.blend import Blend, plot_weights
from m3dv.core import M3dvError, M3dvWarning, set_seed
from m3dv.learner import get_learner
from m3dv.loaders import get_dls
from m3dv.model import DenseNet3D, make_net
from m3dv.plot import gallery, plot_nodule, show_figure, show_slices
from m3dv.predict import load_network, load_networks, predict_crops, save_network
from m3dv.recipe import RECIPES, Recipe, load_recipe, save_recipe
from m3dv.store import CropStore
from m3dv.synth import synth_nodule, synth_nodules

FIXTURES = Path(__file__).parent/'fixtures'
DEEP = '['*100_000

def refused(f, says='', names='', seconds=2):
    "`f` raises our own error, within `seconds`: one printable line, not too long, that holds `says` and `names`"
    t = time.process_time()
    with pytest.raises(M3dvError) as e: f()
    assert time.process_time()-t<seconds
    s = str(e.value)
    assert s.isprintable() and len(s)<=1000 and says in s and str(names) in s, s

def tried(f, *args, names='', **kwargs):
    "What `f` gives; None where it is refused as it should be"
    try: return f(*args, **kwargs)
    except M3dvError as e: assert str(e).isprintable() and len(str(e))<=1000 and str(names) in str(e), str(e)

def warned(f):
    "What `f` gives, and its warnings"
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always'); res = f()
        return res,[o for o in w if issubclass(o.category, M3dvWarning)]

def nested(n, v=()):
    for _ in range(n): v = [v]
    return v

ODD = [None, True, False, -1, 0, 1, 2, 3.5, 1e300, -1e-300, 10**30, float('nan'), float('inf'),
    '', ' ', 'x', 'a\nb', '\ud800', 'y'*5000, '::', 'os:system', [], [1], [[]], ['all'], {}, {'a':1}, {'':[]}, nested(15), nested(400)]

# ---------------------------------------------------------------- recipes

@pytest.mark.parametrize('k', [*json.loads(json.dumps(RECIPES['default'].__dict__, default=vars)), 'aug.', 'unknown'])
def test_recipe_field(tmp_path, k):
    "Any field with any value: a recipe that can be shown, compared and saved, or one line"
    keys,f = [f'aug.{o}' for o in vars(Recipe().aug)] if k=='aug.' else [k],tmp_path/'r.json'
    for key in keys:
        for v in ODD:
            d = dict(aug={key[4:]:v}) if key.startswith('aug.') else {key:v}
            r = tried(Recipe, **d) if key!='unknown' else tried(load_recipe, d)
            if r is not None: repr(r), hash(r); assert load_recipe(save_recipe(r, f))==r
            f.write_text(json.dumps(d)); again = tried(load_recipe, f, names=f)
            assert (again is None)==(r is None) and (r is None or again==r), (key, v)

FILES = {'empty':b'', 'brackets':b'['*5000, 'braces':b'{"a":'*5000, 'many':DEEP.encode(), 'open':b'{"name": "a', 'list':b'[1]',
    'number':b'3', 'null':b'null', 'bytes':bytes(range(256)), 'utf16':'{"epochs": 3}'.encode('utf-16'),
    'large':b'['+b'1,'*3_000_000+b'1]', 'digits':b'{"seed": '+b'1'*5000+b'}', 'name':b'{"name": 3}',
    'names':b'{"name": ["a"]}', 'twice':'\ufeff\ufeff{}'.encode()}

@pytest.mark.parametrize('k', FILES)
def test_recipe_file(tmp_path, k):
    f = tmp_path/'r.json'; f.write_bytes(FILES[k])
    refused(lambda: load_recipe(f), names=f)

def test_recipe_mark(tmp_path):
    "A byte order mark is skipped, as it is in tables"
    (tmp_path/'r.json').write_bytes('{"epochs": 3, "name": "Größe"}'.encode('utf-8-sig'))
    assert load_recipe(tmp_path/'r.json')==Recipe('Größe', epochs=3)

@pytest.mark.parametrize('o', [3, None, 'best?', 'x'*5000, 'a\0b', '~nobody/r.json', '\udcff', '.', b'default', 2.5, []], ids=repr)
def test_no_recipe(o): refused(lambda: load_recipe(o))

# ---------------------------------------------------------------- what is built

WIDE = [{k:v} for k,vs in dict(stride=[0, 9], k=[-1, 0], nf=[10**9, 10**400, True, None, '24', [24]], eps=[-5, 0, float('nan')],
    theta=[0, 1e-9, 2, '.5'], blocks=[[3000]*3, [], [1]*9, [-1], [2.5], '246', {}], momentum=[-.1, float('inf')], c_in=[0, 1000],
    n_out=[0, 10**6], bottleneck=[10**5], bias=[2, []], deep=[3]).items() for v in vs]
WIDE += [dict(nf=4096, k=1024), dict(nf=4096, k=1000, bottleneck=64)]

@pytest.mark.parametrize('args', WIDE, ids=lambda d: str(d)[:40])
def test_limits(args):
    "Refused in no time and no memory, and in a recipe's network as well"
    was = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(lambda: make_net('default', **args))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss-was<50_000 # KB

# ---------------------------------------------------------------- saved networks

def digest(d): return sha256(json.dumps({k:v for k,v in d.items() if k!='checksum'}, sort_keys=True).encode()).hexdigest()

def write(f, d, b=None):
    "The two files of a network, with the right checksums"
    if b is not None: d = d | dict(weights=sha256(b).hexdigest()); f.with_suffix('.safetensors').write_bytes(b)
    f.with_suffix('.json').write_text(json.dumps(d | dict(checksum=digest(d))))

def some_crops():
    i = np.indices((4,2,8,8,8))
    return torch.from_numpy((i*np.array([11,7,5,3,2])[:,None,None,None,None,None]).sum(0)%251).to(torch.uint8)

@pytest.fixture(scope='module')
def learn(tmp_path_factory):
    d = synth_nodules(tmp_path_factory.mktemp('d')/'d', n=12, n_test=4, side=32, progress=False)
    set_seed(0)
    return get_learner(get_dls(d, side=8, margin=2, bs=4, device='cpu', progress=False), net=DenseNet3D(nf=4, k=4, blocks=(1,1)), mixup=0.)

@pytest.fixture
def net(learn, tmp_path):
    "A saved network: its name, description and weights"
    w = save_network(learn, tmp_path/'n')
    return tmp_path/'n',json.loads(w.with_suffix('.json').read_text()),w.read_bytes()

@pytest.mark.parametrize('v,p', [('0.2.0', [0.3767445608973503, 0.41214408352971077, 0.44886425882577896, 0.4863331466913223]),
    ('0.3.0', [0.37875962257385254, 0.41252024099230766, 0.4483795277774334, 0.4842279851436615]),
    ('0.4.0-format1', [0.37875962257385254, 0.41252024099230766, 0.4483795277774334, 0.4842279851436615])])
def test_older(tmp_path, v, p):
    "Networks of versions 0.2 and 0.3 predict what they predicted then"
    f = FIXTURES/f'm3dv-{v}'; n = load_network(f)
    np.testing.assert_allclose(n(some_crops()), p, atol=1e-5)
    r = n.recipe
    assert (n.side, n.mask, n.tta, n.classes, r.side, r.margin, r.bs, r.train_frac)==(8,'cut','flips',[0,1],8,2,4,1.)
    for e in ('.json','.safetensors'): shutil.copy(FIXTURES/f'm3dv-{v}{e}', tmp_path)
    j = tmp_path/f'm3dv-{v}.json'; d = json.loads(j.read_text())
    for odd in (d|dict(format=9), d|dict(format=2), d|dict(more=1), {k:o for k,o in d.items() if k!='net'}):
        j.write_text(json.dumps(odd)); refused(lambda: load_network(j), names=j)

def test_saved(net, learn):
    "Format, recipe, classes and checksums are there, and what is read is what was saved"
    f,d,b = net; n = load_network(f)
    assert (d['format'], d['classes'], d['weights'], d['checksum'])==(2, [0,1], sha256(b).hexdigest(), digest(d))
    assert load_recipe(d['recipe'])==learn.recipe==n.recipe
    x = some_crops(); assert (n(x)==predict_crops(learn.model, x, 8)).all()
    f.with_suffix('.json').write_text(json.dumps(dict(reversed(d.items())))); assert repr(load_network(f))==repr(n) # laid out anew

def test_random_numbers(net):
    "Loading draws none"
    was = torch.get_rng_state(); load_network(net[0]); assert (torch.get_rng_state()==was).all()

def flips(b, step):
    for i in range(0, 8*len(b), step):
        o = bytearray(b); o[i//8] ^= 1<<i%8; yield bytes(o)

def check_bits(net, every, of_weights):
    "Every `every`-th bit of the description, every `of_weights`-th of the weights: found, or harmless"
    f,d,b = net; j,w,x,n,harmless = f.with_suffix('.json'),f.with_suffix('.safetensors'),some_crops(),load_network(f),0
    s = j.read_bytes()
    for o in flips(s, every):
        j.write_bytes(o); m = tried(load_network, f, names=f)
        if m is not None: harmless += 1; assert repr(m)==repr(n) and m.recipe==n.recipe and (m(x)==n(x)).all()
    j.write_bytes(s); assert harmless<.02*len(s)
    for o in flips(b, of_weights): w.write_bytes(o); refused(lambda: load_network(f), 'checksum', w)

def test_network_bits(net): check_bits(net, 29, 211)

@pytest.mark.slow
def test_network_all_bits(net): check_bits(net, 1, 7)

def leaves(d, at=()):
    for k,v in d.items() if isinstance(d, dict) else enumerate(d) if isinstance(d, list) else ():
        yield (*at, k); yield from leaves(v, (*at, k))

def check_values(net, every):
    "Every `every`-th of all values at all places of a description with a fitting checksum: refused, or a network that predicts"
    f,d,b = net; x,n,values = some_crops(),0,(*ODD, 5, 8, 2**31, {'constructor':'os:system', 'args':{}})
    for i,at in enumerate(leaves({k:v for k,v in d.items() if k!='checksum'})):
        for v in values[i%every::every]:
            o = copy.deepcopy(d); p = o
            for k in at[:-1]: p = p[k]
            p[at[-1]] = v; write(f, o); m = tried(load_network, f, names=f); n += 1
            p = None if m is None else tried(m, x)
            assert p is None or np.isfinite(p).all(), (at, v)
    assert n>1500//every

def test_network_values(net): check_values(net, 4)

@pytest.mark.slow
def test_network_all_values(net): check_values(net, 1)

CHANGES = dict(missing=lambda d, k: d.pop(k), extra=lambda d, k: d.update(more=torch.zeros(3)),
    renamed=lambda d, k: d.update({k+'.x':d.pop(k)}),
    longer=lambda d, k: d.update({k:torch.cat([d[k]]*2)}), flat=lambda d, k: d.update({k:d[k].flatten()[None]}),
    empty=lambda d, k: d.update({k:torch.zeros(0)}),
    whole=lambda d, k: d.update({k:d[k].long()}), bools=lambda d, k: d.update({k:d[k]>0}), complexes=lambda d, k: d.update({k:d[k]+0j}),
    nan=lambda d, k: d[k].view(-1)[:1].fill_(np.nan), inf=lambda d, k: d[k].view(-1)[-1:].fill_(-np.inf))

@pytest.mark.parametrize('how', CHANGES)
def test_weights(net, how):
    "Weights with other names, shapes, types or values, and fitting checksums"
    f,d,b = net; sd = load(b)
    for k in [k for k,v in sd.items() if v.is_floating_point()]:
        o = {n:v.clone() for n,v in sd.items()}; CHANGES[how](o, k); write(f, d, save(o))
        refused(lambda: load_network(f), '' if how=='extra' else k, f'{f}.safetensors')

def test_precision(net):
    "Weights in another precision are taken in the network's own"
    f,d,b = net
    for t in (torch.float16, torch.bfloat16, torch.float64):
        write(f, d, save({k:v.to(t) if v.is_floating_point() else v for k,v in load(b).items()}))
        assert {p.dtype for p in load_network(f).net.parameters()}=={torch.float32}

def header(b, n=None): return (len(b) if n is None else n).to_bytes(8, 'little')+b

@pytest.mark.parametrize('b', [b'', b'a', b'\xff'*8, b'\xff'*100, b'\x80\x04\x95pickle', header(b'{', 2**40),
    header(b'{}'), header(DEEP.encode()), header(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,0]}}')],
    ids=lambda b: repr(b[:12]))
def test_no_weights(net, b):
    f,d,_ = net; write(f, d, b); refused(lambda: load_network(f), 'does not hold the weights that n.json describes', f'{f}.safetensors')

def test_huge_weights(net):
    "A file of 100 GB is refused by its size"
    f = net[0].with_suffix('.safetensors')
    with open(f, 'r+b') as h: h.truncate(100*10**9)
    refused(lambda: load_network(f), 'it has 100000 MB, more than 10', f)

def test_swapped(net, learn, tmp_path):
    "The weights of another network, of the same shape"
    f = net[0]; other = save_network(learn, tmp_path/'other'); b = bytearray(other.read_bytes()); b[-1] ^= 1; other.write_bytes(b)
    shutil.copy(other, f.with_suffix('.safetensors')); refused(lambda: load_network(f), 'its checksum differs')

def test_diverged(learn, tmp_path):
    "A network that is not finite is not saved"
    l = copy.copy(learn); l.model = copy.deepcopy(learn.model)
    with torch.no_grad(): l.model.features[0].weight[0] = np.inf
    refused(lambda: save_network(l, tmp_path/'a'), 'features.0.weight is not finite; the training diverged')
    assert not list(tmp_path.iterdir())

def test_trust(net, tmp_path, monkeypatch):
    "No module that a file names is imported unasked"
    (tmp_path/'m3dv_bait.py').write_text("raise SystemExit('imported')"); monkeypatch.syspath_prepend(tmp_path)
    f,d,_ = net; write(f, d|dict(net=dict(constructor='m3dv_bait:f', args={})))
    refused(lambda: load_network(f), 'building it runs that code; if you trust it, give trust_code=True', f'{f}.json')
    refused(lambda: load_networks([f]), 'trust_code=True')
    assert 'm3dv_bait' not in sys.modules

@pytest.mark.skipif(os.name=='nt', reason='permissions are those of POSIX')
@pytest.mark.parametrize('mask', [0o022, 0o002, 0o077], ids=oct)
def test_permissions(learn, tmp_path, mask):
    "Networks, recipes and exported networks have the permissions of any new file"
    was = os.umask(mask)
    try:
        fs = [w:=save_network(learn, tmp_path/'n'), w.with_suffix('.json'), save_recipe(Recipe(), tmp_path/'r.json')]
        if mask==0o002: fs.append(load_network(w).to_onnx(tmp_path/'n.onnx'))
    finally: os.umask(was)
    assert {f.name:oct(f.stat().st_mode&0o777) for f in fs}=={f.name:oct(0o666&~mask) for f in fs}

def test_home(learn, tmp_path, monkeypatch):
    "`~` is the home folder wherever a network is named"
    monkeypatch.setenv('HOME', str(tmp_path)); monkeypatch.setenv('USERPROFILE', str(tmp_path)); monkeypatch.chdir(tmp_path)
    save_network(learn, '~/run/models/seed0_fold0'); save_recipe(Recipe(), '~/r.json')
    for f in ('~/run/models/seed0_fold0', '~/run/models/seed0_fold0.json'): load_network(f)
    n, = load_networks('~/run/models'); assert len(load_networks(['~/run/models/seed0_fold0']))==1 and load_recipe('~/r.json')==Recipe()
    shutil.copytree(learn.dls.recipe and Path(learn.dls.train_ds.items[0]).parent, tmp_path/'d')
    name = sorted((tmp_path/'d').glob('*.npz'))[0].name
    assert (n.predict(f'~/d/{name}')==n.predict([f'~/d/{name}'])).all() and len(n.predict('~/d'))==len(list((tmp_path/'d').glob('*.npz')))
    assert not (tmp_path/'~').exists()

@pytest.mark.parametrize('p', ['', '.', '/', 'none', 'a\0b', 3, None, '~nobody/n', 'x'*5000], ids=lambda p: repr(p)[:12])
def test_no_network(p): refused(lambda: load_network(p))

# ---------------------------------------------------------------- crops on disk

@pytest.fixture
def crops(tmp_path, monkeypatch):
    "Two nodules, their crops, the file that holds them, and its bytes"
    d = synth_nodules(tmp_path/'d', n=12, n_test=4, side=32, progress=False); fs = sorted((d/'train_val').glob('*.npz'))[:2]
    monkeypatch.setattr(os, 'fsync', lambda fd: None)                  # the disk is not what is tried here
    want = CropStore(8).get(fs); CropStore(8, cache=tmp_path/'c').add(fs); f, = (tmp_path/'c').glob('*.npy')
    return fs,want,f,f.read_bytes()

def mended(crops, memory, n=1):
    "The crops are right, with `n` warnings, and the file is what it was"
    fs,want,f,b = crops
    got,ws = warned(lambda: CropStore(8, cache=f.parent, memory=memory).get(fs))
    assert (got==want).all() and len(ws)==n and f.read_bytes()==b, [str(w.message) for w in ws]

def check_store_bits(crops, every):
    for o in flips(crops[3], every): crops[2].write_bytes(o); mended(crops, 0)

def test_store_bits(crops): check_store_bits(crops, 61)

@pytest.mark.slow
def test_store_all_bits(crops): check_store_bits(crops, 1)

DAMAGE = dict(empty=lambda b: b'', short=lambda b: b[:-1], half=lambda b: b[:len(b)//2], long=lambda b: b+b'0', twice=lambda b: b+b,
    zeros=lambda b: bytes(len(b)), shifted=lambda b: b[1:]+b[:1], header=lambda b: b'\x93NUMPY\x01\x00v\x00'+b'{'*118+b[128:],
    pickle=lambda b: b'\x80\x04]\x94.'+b[5:], json=lambda b: DEEP.encode()[:len(b)],
    swapped=lambda b: b[:128]+b[1152:2176]+b[128:1152]+b[2176:], table=lambda b: b[:-96]+b[-160:-96][:64]+b[-32:])

@pytest.mark.parametrize('memory', [0., 2.])
@pytest.mark.parametrize('how', DAMAGE)
def test_store_damage(crops, how, memory):
    assert (o:=DAMAGE[how](crops[3]))!=crops[3]
    crops[2].write_bytes(o); mended(crops, memory); mended(crops, memory, 0)

@pytest.mark.parametrize('how', DAMAGE)
def test_store_damage_in_use(crops, how):
    "The file changes under a store that has read it"
    fs,want,f,b = crops; s = CropStore(8, cache=f.parent, memory=0); assert (s.get(fs)==want).all()
    f.write_bytes(DAMAGE[how](b)); got,ws = warned(lambda: s.get(fs))
    assert (got==want).all() and len(ws)==1 and f.read_bytes()==b

def test_store_other_file(crops, tmp_path):
    "A whole file of other nodules under this name, and one that is no file at all"
    fs,want,f,b = crops; other = sorted(fs[0].parent.glob('*.npz'))[2:4]
    CropStore(8, cache=tmp_path/'o').add(other); shutil.copy(next((tmp_path/'o').glob('*.npy')), f); mended(crops, 0)
    f.unlink(); f.symlink_to(f.name); mended(crops, 0, 0)               # a link to itself: like no file
    f.unlink(); os.mkfifo(f); mended(crops, 0, 0)                       # would be waited for
    f.chmod(0); mended(crops, 0, 1 if os.geteuid() else 0)
    f.unlink(); f.mkdir(); got,ws = warned(lambda: CropStore(8, cache=f.parent).get(fs))
    assert (got==want).all() and [str(w.message).split('; ')[1] for w in ws]==['crops are cut anew at each start']

def test_store_full(crops, monkeypatch):
    "A disk that is full: the crops go into memory; where they must not, one line"
    def full(fd): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(os, 'fsync', full)
    fs,want,f,b = crops; s = CropStore(8, cache=f.parent, memory=0); s.add(fs); f.write_bytes(b[:-1])
    refused(lambda: s.get(fs), 'No space left on device; the crops of this store lie there and can be neither read nor written', f)
    got,ws = warned(lambda: CropStore(8, cache=f.parent).get(fs)); assert (got==want).all() and len(ws)==1
    refused(lambda: CropStore(8, cache=f.parent, memory=0).get(fs), 'memory is limited to 0')
    assert [o.name for o in f.parent.iterdir() if o.name.endswith('.part')]==[]

def test_store_link(crops, tmp_path):
    "A link that waits under the name of the file to be written is not followed"
    fs,want,f,b = crops; (tmp_path/'mine').write_text('mine'); f.unlink()
    f.with_name(f'.{f.name}.{os.getpid()}.part').symlink_to(tmp_path/'mine'); mended(crops, 0, 0)
    assert (tmp_path/'mine').read_text()=='mine' and not f.is_symlink()

# ---------------------------------------------------------------- names in pictures

NAMES = [r'$\foo$', r'$5^{$ \alpha_$ {', '</script><b>"x"', '&lt;', 'caf\udce9', 'a\0b\tc\rd', '一𝔸', 'n'*500, r'\input{x}',
    '%(name)s {0} {', '']

@pytest.mark.parametrize('tex', [False, True])
def test_titles(tex):
    x,m = synth_nodule(1, np.random.default_rng(0), 32)
    with plt.rc_context({'text.usetex':tex} if tex else {}), warnings.catch_warnings():
        warnings.simplefilter('ignore')                                 # no font has every letter
        for a in (gallery([x]*len(NAMES), titles=NAMES)[0], show_slices(x, m, title=''.join(NAMES))[0]):
            for o in a.figure.axes: o.set_xticks([]), o.set_yticks([]), o.set_xlabel(''), o.set_ylabel('')
            a.figure.canvas.draw(); plt.close('all')

@pytest.mark.parametrize('name', NAMES, ids=lambda s: ascii(s)[:20])
def test_page(name):
    "A title in a page ends no script, opens no tag and is stored as UTF-8"
    x,m = synth_nodule(1, np.random.default_rng(0), 32)
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); s = show_figure(plot_nodule(x, m, title=name)).data
    s.encode(); assert s.count('</script>')==1 and '<b>' not in s

def test_members():
    "Recipes' names beside the weights of a blend"
    w = pd.Series([.5,.5], NAMES[:2]); per = pd.DataFrame([[.5,.5,1.]]*2, columns=[*NAMES[:2],'temperature'])
    ax = plot_weights(Blend(NAMES[:2], w, 1., pd.DataFrame(), per)); ax.figure.canvas.draw(); plt.close('all')
    assert [o.get_text() for o in ax.get_yticklabels()]==NAMES[:2]
