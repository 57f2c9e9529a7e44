"""What is compared: m3dv and its peers, each in the form that its own tutorials use. speed.py starts one process for each.

A contender is a function of the options. It prepares itself, warms up, and gives back a function
that does one round and returns (amount, seconds).

    python bench/contenders.py NAME OPTIONS     answers each line `go` on its standard input with a line of JSON
"""
import inspect, json, math, os, sys, time
from pathlib import Path

SIDE,INNER,OUTER = 32,48,64     # sides of the network's input, of the crop that it is cut from, and of the cube in the augmentation part
SHIFT,DEGREES,ZOOM = 5,10.,.1   # as in the default recipe
KEYS = ('image','seg')

def clock(f, *args):
    "Result and seconds of a call"
    t = time.perf_counter(); r = f(*args)
    return r, time.perf_counter()-t

def labelled(o):
    "Files and labels of the training folder, as lists"
    from m3dv.data import read_competition
    df = read_competition(o['data']).train
    return list(df.path), df.label.tolist()

def split(o):
    "Files and labels outside fold `fold`, and those inside it: the folds of m3dv, so that all train on the same nodules"
    from m3dv.data import assign_folds, read_competition
    df = read_competition(o['data']).train
    folds = assign_folds(df, 5, 0)
    return [list(zip(d.path, d.label)) for d in (df[folds!=o.get('fold', 0)], df[folds==o.get('fold', 0)])]

def store_kw(o):
    "What `get_dls` has to be told to keep its crops on disk; nothing in versions without a store on disk"
    from m3dv.loaders import get_dls
    return {k:Path(o['cache']) for k in ('cache',) if o.get('cache') and k in inspect.signature(get_dls).parameters}

# ---------------------------------------------------------------- networks in plain PyTorch

def stock_net(nf=32, stride=1, k=16, blocks=(4,4), bottleneck=2, theta=.5, bias=True, eps=1e-3, momentum=.01):
    "DenseNet-BC in torchvision's idiom with the report's settings: plain modules, torch.cat after each layer"
    from collections import OrderedDict
    import torch
    from torch import nn
    bn = dict(eps=eps, momentum=momentum)
    class DenseLayer(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.norm1,self.relu1,self.conv1 = nn.BatchNorm3d(c, **bn),nn.ReLU(inplace=True),nn.Conv3d(c, bottleneck*k, 1, bias=False)
            self.norm2,self.relu2 = nn.BatchNorm3d(bottleneck*k, **bn),nn.ReLU(inplace=True)
            self.conv2 = nn.Conv3d(bottleneck*k, k, 3, padding=1, bias=bias)
        def forward(self, x): return torch.cat([self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x)))))), x], 1)
    class Transition(nn.Sequential):
        def __init__(self, c, c_out):
            super().__init__(OrderedDict(norm=nn.BatchNorm3d(c, **bn), relu=nn.ReLU(inplace=True),
                                         conv=nn.Conv3d(c, c_out, 1, bias=bias), pool=nn.AvgPool3d(2)))
    class DenseNet(nn.Module):
        def __init__(self):
            super().__init__()
            fs,c = OrderedDict(conv0=nn.Conv3d(1, nf, 3, stride=stride, padding=1, bias=bias)),nf
            for i,n in enumerate(blocks):
                if i: fs[f'transition{i}'] = Transition(c, int(c*theta)); c = int(c*theta)
                fs[f'denseblock{i+1}'] = nn.Sequential(*[DenseLayer(c+j*k) for j in range(n)]); c += n*k
            self.features = nn.Sequential(fs | OrderedDict(norm5=nn.BatchNorm3d(c, **bn), relu5=nn.ReLU(inplace=True)))
            self.classifier = nn.Linear(c, 2)
        def forward(self, x): return self.classifier(nn.functional.adaptive_avg_pool3d(self.features(x), 1).flatten(1))
    return DenseNet()

STOCK = dict(report=dict(), default=dict(nf=24, stride=2, blocks=(2,4,6), bias=False, eps=1e-5, momentum=.1))

def twin(name):
    "m3dv's network `name`, and the same in plain PyTorch with the same weights"
    import torch
    from m3dv.model import NETS
    torch.manual_seed(0)
    ours,stock = NETS[name](),stock_net(**STOCK[name])
    a,b = ours.state_dict(),stock.state_dict()
    if [v.shape for v in a.values()]!=[v.shape for v in b.values()]:
        raise SystemExit(f"the {name} network of m3dv and the one in plain PyTorch have not the same tensors in the same order")
    stock.load_state_dict(dict(zip(b, a.values())))
    return ours, stock

def network(name):
    """A network by name: NAME is m3dv's as its Learner lays it out, 'stock NAME' and 'stock NAME channels last' are plain PyTorch,
    'monai' is MONAI's DenseNet121"""
    import torch
    if name=='monai': from monai.networks.nets import DenseNet121; return DenseNet121(spatial_dims=3, in_channels=1, out_channels=2)
    ours,stock = twin(name.split()[1] if name.startswith('stock') else name)
    if not name.startswith('stock'): return ours.to(memory_format=torch.channels_last_3d)
    return stock.to(memory_format=torch.channels_last_3d) if name.endswith('channels last') else stock

def stepper(o):
    "A training step of network `net` on one batch of `bs`, and that batch; `keep` is what `get_learner` does with freed memory"
    import torch, torch.nn.functional as F
    from m3dv.core import keep_freed_memory
    if o.get('keep'): keep_freed_memory()
    net = network(o['net']); opt = torch.optim.Adam(net.parameters(), 1e-3)
    g = torch.Generator().manual_seed(0)
    x,y = torch.rand(o['bs'], 1, SIDE, SIDE, SIDE, generator=g)*2-1,torch.arange(o['bs'])%2
    if 'stock' not in o['net'] and o['net']!='monai' or o['net'].endswith('channels last'): x = x.to(memory_format=torch.channels_last_3d)
    def step(): loss = F.cross_entropy(net(x), y); opt.zero_grad(); loss.backward(); opt.step(); return loss
    return net, step

def step(o):
    _,f = stepper(o); f(); n = [1]
    n[0] = max(1, round(o['seconds']/clock(f)[1]))
    def go(): return n[0]*o['bs'], clock(lambda: [f() for _ in range(n[0])])[1]
    return go

# ---------------------------------------------------------------- reading files and cutting crops

def load_m3dv(o):
    from m3dv.loaders import CropStore
    fs = files(o)
    def go(): s = CropStore(INNER); return clock(lambda: len(s.add(fs)))
    return go

def files(o):
    from m3dv.data import read_competition
    c = read_competition(o['data'])
    return (list(c.train.path)+list(c.test.path))[:o.get('n')]

def monai_read():
    "Reading, and the crop round the mask: the box of the mask widened, then cut to `INNER` about its centre"
    from monai.data import NumpyReader
    from monai.transforms import CenterSpatialCropd, CropForegroundd, EnsureChannelFirstd, LoadImaged
    return [LoadImaged('image', reader=NumpyReader(npz_keys='voxel')), LoadImaged('seg', reader=NumpyReader(npz_keys='seg')),
        EnsureChannelFirstd(KEYS, channel_dim='no_channel'),
        CropForegroundd(KEYS, source_key='seg', margin=INNER//2, mode=('edge','constant'), start_coord_key=None, end_coord_key=None),
        CenterSpatialCropd(KEYS, INNER)]

def monai_cache(items, *tfms, threads=1):
    from monai.data import CacheDataset
    from monai.transforms import Compose
    return CacheDataset([dict(image=str(f), seg=str(f), label=int(y)) for f,y in items], Compose([*monai_read(), *tfms]),
                        num_workers=threads, progress=False)

def load_monai(o):
    fs = [(f,0) for f in files(o)]
    def go(): return clock(lambda: len(monai_cache(fs, threads=o['threads'])))
    go() if len(fs)<10 else monai_cache(fs[:4])
    return go

def voxels(path):
    import numpy as np, torch
    return torch.from_numpy(np.load(path)['voxel'])[None], np.eye(4)

def mask(path):
    import numpy as np, torch
    return torch.from_numpy(np.load(path)['seg'].astype('uint8'))[None], np.eye(4)

def subjects(items):
    import torchio as tio
    return [tio.Subject(image=tio.ScalarImage(f, reader=voxels), seg=tio.LabelMap(f, reader=mask), label=int(y)) for f,y in items]

def load_torchio(o):
    import torchio as tio
    fs,cut = [(f,0) for f in files(o)],tio.CropOrPad(INNER, mask_name='seg')
    def go(): return clock(lambda: len([s for s in tio.SubjectsDataset(subjects(fs), cut)]))
    return go

# ---------------------------------------------------------------- flips and an affine map, from 64 to 32 voxels

def cubes(o, n=16):
    "The first `n` nodules, cut to cubes of `OUTER`, uint8 (n,2,OUTER,OUTER,OUTER)"
    import numpy as np, torch
    from m3dv.data import read_nodule
    from m3dv.transforms import cut_crop
    return torch.from_numpy(np.stack([np.stack(cut_crop(*read_nodule(f), OUTER)).astype(np.uint8) for f in labelled(o)[0][:n]]))

def aug_rounds(f, n, o):
    "Rounds of `seconds` of a function that augments `n` nodules"
    f(); k = max(1, round(o['seconds']/clock(f)[1]))
    def go(): return k*n, clock(lambda: [f() for _ in range(k)])[1]
    return go

def aug_m3dv(o):
    from itertools import count
    from m3dv.transforms import Aug, draw_aug, resample
    x,a,epoch = cubes(o),Aug(SHIFT, 'flips', DEGREES, ZOOM, 0, 0, 0),count()
    return aug_rounds(lambda: resample(x, draw_aug(a, len(x), 0, next(epoch)), SIDE), len(x), o)

def monai_random(lazy=False):
    """Flips and affine map: the angles, shifts and zooms have the ranges of the default recipe; the zoom is drawn for each axis,
    shifts are not whole voxels"""
    from monai.transforms import RandAffined, RandFlipd
    return [RandFlipd(KEYS, prob=.5, spatial_axis=i) for i in range(3)] + [RandAffined(
        KEYS, spatial_size=(SIDE,)*3, prob=1., rotate_range=(math.radians(DEGREES),)*3,
        translate_range=(SHIFT,)*3, scale_range=(ZOOM,)*3, mode=('bilinear','nearest'), padding_mode=('border','zeros'),
        cache_grid=not lazy)]

def aug_monai(o):
    from monai.data import MetaTensor, list_data_collate, set_track_meta
    from monai.transforms import Compose
    lazy = o.get('lazy', False); set_track_meta(lazy)
    wrap = MetaTensor if lazy else lambda t: t
    ds = [dict(image=wrap(v[:1].float()), seg=wrap(v[1:].float())) for v in cubes(o)]
    t = Compose(monai_random(lazy), lazy=lazy)
    return aug_rounds(lambda: list_data_collate([t(d) for d in ds]), len(ds), o)

def torchio_random(first=None):
    "Flips and affine map; the map resamples the whole input, so `first` cuts away what no draw can reach"
    import torchio as tio
    kw = dict(copy=False)
    return tio.Compose([*([tio.CropOrPad(first, **kw)] if first else []), tio.RandomFlip(axes=(0,1,2), flip_probability=.5, **kw),
        tio.RandomAffine(scales=ZOOM, degrees=DEGREES, translation=SHIFT, isotropic=True, **kw), tio.CropOrPad(SIDE, **kw)])

def aug_torchio(o):
    import torch, torchio as tio
    ds = [tio.Subject(image=tio.ScalarImage(tensor=v[:1].float()), seg=tio.LabelMap(tensor=v[1:])) for v in cubes(o)]
    t = torchio_random(o.get('first'))
    def f(): ss = [t(s) for s in ds]; return torch.stack([s['image'].data for s in ss]), torch.stack([s['seg'].data for s in ss])
    return aug_rounds(f, len(ds), o)

# ---------------------------------------------------------------- training, end to end

def recipe(o):
    "The recipe of the options, on a share of the nodules where only the rate is asked for"
    from dataclasses import replace
    from m3dv.recipe import load_recipe
    r = load_recipe(o['recipe']); return replace(r, bs=o.get('bs', r.bs), train_frac=o.get('share', 1.))

def fit_m3dv(o):
    """Epochs as `train_fold` trains them: the loaders, the Learner and the recipe's own schedule;
    the clock runs while the training batches are gone through"""
    from dataclasses import replace
    from fastai.callback.core import Callback, CancelTrainException
    from m3dv.core import set_seed
    from m3dv.learner import fit_recipe, get_learner
    from m3dv.loaders import get_dls
    class Clock(Callback):
        limit = None
        def before_train(self): self.t,self.n = time.perf_counter(),0
        def after_batch(self):
            if not self.training: return
            self.n += len(self.y)
            if self.limit and self.iter+1>=self.limit: raise CancelTrainException
        def after_train(self): self.result = self.n,time.perf_counter()-self.t
    r,c = recipe(o),Clock()
    set_seed(o.get('fold', 0), reproducible=True)
    learn = get_learner(get_dls(o['data'], o.get('fold', 0), replace(r, seed=0), device='cpu', progress=False), cbs=c)
    def go(limit=o.get('limit')):
        c.limit = limit
        with learn.no_bar(), learn.no_logging(): fit_recipe(learn, 1)
        return c.result
    go(1); return go

def fit_stock(o):
    "The same in plain PyTorch: crops as one tensor, a batch resampled by `affine_grid` and `grid_sample`, MixUp, and a loop; no framework"
    import numpy as np, torch, torch.nn.functional as F
    from m3dv.data import read_nodule, take_frac, assign_folds, read_competition
    from m3dv.transforms import cut_crop
    r,df = recipe(o),read_competition(o['data']).train
    used = assign_folds(df, r.n_folds, 0)!=o.get('fold', 0); used[used] = take_frac(df.label[used], r.train_frac, 0)
    x = torch.from_numpy(np.stack([np.stack(cut_crop(*read_nodule(f), r.side+2*r.margin)).astype(np.uint8) for f in df.path[used]]))
    y = torch.tensor(df.label[used].tolist())
    net = network(o['net']); last = o['net'].endswith('channels last')
    opt = torch.optim.Adamax(net.parameters(), r.lr) if r.opt=='adamax' else torch.optim.AdamW(net.parameters(), r.lr, weight_decay=r.wd)
    draw = torch.distributions.Beta(torch.tensor(r.mixup), torch.tensor(r.mixup))
    def go(limit=o.get('limit')):
        net.train(); t,n = time.perf_counter(),0
        for b in torch.randperm(len(x)).split(r.bs)[:limit]:
            if len(b)<r.bs: continue
            v = plain_augment(x[b], r.aug, r.side)
            if last: v = v.to(memory_format=torch.channels_last_3d)
            j = torch.randperm(len(b)); w = draw.sample((len(b),)); w = torch.maximum(w, 1-w)
            out = net(torch.lerp(v[j], v, w.view(-1,1,1,1,1)))
            loss = (w*F.cross_entropy(out, y[b], reduction='none')+(1-w)*F.cross_entropy(out, y[b][j], reduction='none')).mean()
            opt.zero_grad(); loss.backward(); opt.step(); loss.item(); n += len(b)
        return n, time.perf_counter()-t
    go(1); return go

def plain_augment(x, aug, side):
    "The default and the report's augmentation of a batch in a dozen lines of PyTorch; all 48 symmetries where the recipe has them"
    import torch, torch.nn.functional as F
    from m3dv.transforms import symmetry_matrix, SYMMETRIES
    n,S = len(x),x.shape[-1]
    u = lambda *s: torch.rand(*s)*2-1
    R = symmetry_matrix(torch.randint(SYMMETRIES[aug.symmetry], (n,)))
    if aug.rotate:
        K = torch.zeros(n,3,3)
        K[:,0,1],K[:,0,2],K[:,1,2] = (u(n,3)*math.radians(aug.rotate)).T
        R = R@torch.linalg.matrix_exp(K-K.mT)
    if aug.zoom: R = R/(1+u(n,1,1)*aug.zoom)
    th = torch.cat([R*(side-1), 2*torch.randint(-aug.shift, aug.shift+1, (n,3,1))], 2)/(S-1)
    grid = F.affine_grid(th, (n,1,side,side,side), align_corners=True)
    v = F.grid_sample(x[:,:1].float(), grid, 'bilinear', 'border', align_corners=True)
    m = F.grid_sample(x[:,1:].float(), grid, 'nearest', 'zeros', align_corners=True)
    if aug.gain or aug.bias: v = (v-128)*(1+u(n,1,1,1,1)*aug.gain)+128+u(n,1,1,1,1)*aug.bias
    if aug.noise: v = v+torch.randn_like(v)*u(n,1,1,1,1).abs()*aug.noise
    return torch.where(m>.5, v.clamp(0, 255)/128-1, -1.)

def loop(net, loader, batch, lr=1e-3, limit=None):
    "A training loop as in the peers' classification tutorials; an epoch as a function"
    import torch
    from itertools import islice
    most = limit
    opt,loss_func = torch.optim.Adam(net.parameters(), lr),torch.nn.CrossEntropyLoss()
    def go(limit=most):
        net.train(); t,n = time.perf_counter(),0
        for b in islice(loader, limit):
            x,y = batch(b)
            opt.zero_grad(); loss = loss_func(net(x), y); loss.backward(); opt.step(); loss.item(); n += len(y)
        return n, time.perf_counter()-t
    return go

def monai_loader(items, train=True, bs=16):
    from monai.data import DataLoader, set_track_meta
    from monai.transforms import CenterSpatialCropd, MaskIntensityd, ScaleIntensityRanged
    set_track_meta(False)
    tfms = monai_random() if train else [CenterSpatialCropd(KEYS, SIDE)]
    ds = monai_cache(items, ScaleIntensityRanged('image', 0, 255, 0, 1), *tfms, MaskIntensityd('image', mask_key='seg'))
    return DataLoader(ds, batch_size=bs, shuffle=train, num_workers=1, drop_last=train)

def fit_monai(o):
    go = loop(network(o['net']), monai_loader(split(o)[0]), lambda b: (b['image'], b['label']), limit=o.get('limit'))
    go(1); return go

def fit_torchio(o):
    "The crops are cut once and kept in memory, as CacheDataset does for MONAI"
    import torchio as tio
    cut = tio.Compose([tio.CropOrPad(INNER, mask_name='seg', padding_mode='edge'), tio.RescaleIntensity((0,1), in_min_max=(0,255))])
    ds = tio.SubjectsDataset([cut(s) for s in subjects(split(o)[0])], tio.Compose([torchio_random(), tio.Mask('seg', copy=False)]))
    loader = tio.SubjectsLoader(ds, batch_size=16, shuffle=True, num_workers=1, drop_last=True)
    go = loop(network(o['net']), loader, lambda b: (b['image'][tio.DATA], b['label']), limit=o.get('limit'))
    go(1); return go

# ---------------------------------------------------------------- a process of its own for each round

def start_m3dv(o):
    "Seconds from the imports to the first augmented batch"
    from m3dv.learner import get_learner # noqa: F401, imported as a training would
    from m3dv.loaders import get_dls
    def go(): return 1, clock(lambda: get_dls(o['data'], progress=False, device='cpu', **store_kw(o)).one_batch())[1]
    return go

def start_monai(o):
    "The same for MONAI's dataset whose cut crops are kept on disk"
    from monai.data import DataLoader, PersistentDataset, set_track_meta
    from monai.transforms import Compose, MaskIntensityd, ScaleIntensityRanged
    set_track_meta(False); items = [dict(image=str(f), seg=str(f), label=int(y)) for f,y in split(o)[0]]
    def f():
        t = Compose([*monai_read(), ScaleIntensityRanged('image', 0, 255, 0, 1), *monai_random(), MaskIntensityd('image', mask_key='seg')])
        ds = PersistentDataset(items, t, cache_dir=o['cache'])
        if o.get('fill'): return [ds[i] for i in range(len(ds))]
        return next(iter(DataLoader(ds, batch_size=16, shuffle=True)))
    return lambda: (1, clock(f)[1])

def start_monai_cache(o):
    "The same for CacheDataset, which reads all files at each start"
    import monai.data, monai.transforms # noqa: F401, imported before the clock starts
    items = split(o)[0]
    return lambda: (1, clock(lambda: next(iter(monai_loader(items))))[1])

def imports(o):
    "Seconds of an import beyond others"
    def f(code): exec(code, {})
    f(o['after']); return lambda: (1, clock(f, o['code'])[1])

def large(o):
    "Seconds to the loaders, and of an epoch's batches without a network; the limit of memory leaves all crops on disk, however few"
    from m3dv.loaders import get_dls
    def go():
        dls,t = clock(lambda: get_dls(o['data'], progress=False, device='cpu', memory=.05, **store_kw(o)))
        return (len(dls.store), t) if o['what']=='get_dls' else (len(dls.train)*dls.bs, clock(lambda: [None for _ in dls.train])[1])
    return go

# ---------------------------------------------------------------- from the folder to a submission

def five_monai(o):
    """What `m3dv_train` does, with MONAI and its DenseNet121: a network per fold, the mean of the five as submission, and the table of
    out-of-fold predictions; one view a nodule"""
    import pandas as pd, torch
    from m3dv.data import read_competition
    from m3dv.recipe import load_recipe
    c,epochs = read_competition(o['data']),o.get('epochs') or load_recipe('default').epochs
    def run():
        ps,oof = [],[]
        for k in range(5):
            tr,va = split(o|dict(fold=k)); torch.manual_seed(k); net = network(o['net'])
            go = loop(net, monai_loader(tr), lambda b: (b['image'], b['label']))
            loaders = [monai_loader(i, False, 64) for i in (va, [(f,0) for f in c.test.path])]
            for _ in range(epochs): go(); p = predict(net, loaders[0])
            oof.append(pd.DataFrame(dict(name=[f.stem for f,_ in va], label=[y for _,y in va], repeat=0, fold=k, seed=0,
                                         recipe='MONAI, DenseNet121', p=p.double().tolist())))
            ps.append(predict(net, loaders[1]))
        p = torch.stack(ps).mean(0)
        pd.DataFrame(dict(name=c.test.name, predicted=p.tolist())).to_csv(Path(o['out'])/'submission.csv', index=False)
        pd.concat(oof).to_csv(Path(o['out'])/'oof.csv', index=False)
    def predict(net, loader):
        net.eval()
        with torch.no_grad(): return torch.cat([net(b['image']).softmax(1)[:,1] for b in loader])
    return lambda: (1, clock(run)[1])

# ---------------------------------------------------------------- do they do the same work?

def agree(o):
    """Differences where there must be none: identity, flip, rotation, crop round the mask, and the networks.
    Each row: what, who, figure, value, limit"""
    import numpy as np, torch, torchio as tio
    from monai.transforms import Affined, Flipd
    from m3dv.data import read_nodule
    from m3dv.transforms import AugParams, cut_crop, resample
    x,a = cubes(o, 1)[0],math.radians(8)
    t = lambda *v: torch.tensor([v])
    def ours(sym=0, angle=(0,0,0), shift=(0,0,0), zoom=1.):
        params = AugParams(t(sym)[0], t(*map(float, shift)), t(*map(float, angle)), *[t(zoom)[0]]*3, t(0.)[0], t(0)[0])
        return [v[0] for v in resample(x[None], params, SIDE)]
    def monai(k=None, **kw):
        d = dict(image=x[:1].float(), seg=x[1:].float())
        if k is not None: d = Flipd(KEYS, k)(d)
        d = Affined(KEYS, spatial_size=(SIDE,)*3, mode=('bilinear','nearest'), padding_mode=('border','zeros'), **kw)(d)
        return d['image'], d['seg']>.5
    def torchio(k=None, scales=1., degrees=0., translation=0.):
        s = tio.Subject(image=tio.ScalarImage(tensor=x[:1].float()), seg=tio.LabelMap(tensor=x[1:]))
        if k is not None: s = tio.Flip(k)(s)
        s = tio.CropOrPad(SIDE)(tio.Affine(scales, degrees, translation)(s))
        return s['image'].data, s['seg'].data>0
    rows = []
    def same(what, who, p, q, limit):
        rows.append((what, who, 'grey levels, mean difference', float((p[0].as_subclass(torch.Tensor)-q[0]).abs().mean()), limit))
        rows.append((what, who, 'mask, share that differs', float((p[1]!=q[1]).sum()/p[1].sum()), limit))
    best = lambda p, qs: min(qs, key=lambda q: float((p[0]-q[0]).abs().mean()))      # the libraries turn, shift and zoom to different sides
    same('identity', 'm3dv', [v[:,16:48,16:48,16:48] for v in (x[:1].float(), x[1:]>0)], ours(), 1e-3)
    for who,f in dict(MONAI=monai, TorchIO=torchio).items():
        same('identity', who, ours(), f(), 1e-3)
        same('flip', who, ours(4), f(0), 1e-3)
    same('rotation by 8 degrees', 'MONAI', r:=ours(angle=(a,0,0)), best(r, [monai(rotate_params=(s*a,0,0)) for s in (1,-1)]), 1e-3)
    same('rotation by 8 degrees', 'TorchIO', r, best(r, [torchio(degrees=(s*8,0,0)) for s in (1,-1)]), 1e-3)
    r = ours(shift=(1,2,3))
    same('shift by 1, 2, 3', 'MONAI', r, best(r, [monai(translate_params=[s*i for i in (1,2,3)]) for s in (1,-1)]), 1e-3)
    same('shift by 1, 2, 3', 'TorchIO', r, best(r, [torchio(translation=[s*i for i in (1,2,3)]) for s in (1,-1)]), 1e-3)
    same('zoom by 1.07', 'MONAI', r:=ours(zoom=1.07), best(r, [monai(scale_params=(s,)*3) for s in (1.07,1/1.07)]), 1e-3)
    same('zoom by 1.07', 'TorchIO', r, best(r, [torchio(scales=s) for s in (1.07,1/1.07)]), 1e-3)
    fs = files(o)[:40]; want = [np.stack(cut_crop(*read_nodule(f), INNER)) for f in fs]
    eq = lambda got: 1-float(np.mean([(np.asarray(a)==b).all() for a,b in zip(got, want)]))
    cut_monai = [np.concatenate([d['image'], d['seg']]) for d in monai_cache([(f,0) for f in fs])]
    rows.append(('crop round the mask', 'MONAI', 'share of nodules whose crop differs', eq(cut_monai), .2))
    cut = tio.CropOrPad(INNER, mask_name='seg', padding_mode='edge')
    cut_torchio = [np.concatenate([s['image'].data, s['seg'].data]) for s in tio.SubjectsDataset(subjects([(f,0) for f in fs]), cut)]
    rows.append(('crop round the mask', 'TorchIO', 'share of nodules whose crop differs', eq(cut_torchio), .2))
    for k in STOCK: rows += alike(k)
    return lambda: rows

def alike(name):
    """Logits and gradients of m3dv's network and of the one in plain PyTorch, in training, in float64:
    in float32 rounding turns the sign of a value near 0 here and there, and a ReLU's gradient with it"""
    import torch, torch.nn.functional as F
    g = torch.Generator().manual_seed(1); x,y = (torch.rand(4, 1, SIDE, SIDE, SIDE, generator=g)*2-1).double(),torch.arange(4)%2
    def run(net):
        out = net.double()(x)
        F.cross_entropy(out, y).backward()
        return out, torch.cat([p.grad.flatten() for p in net.parameters()])
    (a,da),(b,db) = map(run, nets:=twin(name))
    n = [sum(p.numel() for p in net.parameters()) for net in nets]
    return [(f'{name} network', 'plain PyTorch', 'logits, largest difference', float((a-b).abs().max()), 1e-9),
            (f'{name} network', 'plain PyTorch', 'gradient, relative difference', float((da-db).norm()/da.norm()), 1e-9),
        (f'{name} network', 'plain PyTorch', f'parameters less m3dv\'s {n[0]:,}', n[1]-n[0], 0)]

# ---------------------------------------------------------------- where a training step spends its time

def profile(o):
    "The operators of a training step by the time that they themselves take. Each row: who, operator, calls, ms, share"
    from torch.profiler import ProfilerActivity, profile
    net,f = stepper(o); k = 3
    for _ in range(2): f()
    with profile(activities=[ProfilerActivity.CPU]) as p:
        for _ in range(k): f()
    ev = sorted(p.key_averages(), key=lambda e: -e.self_cpu_time_total); tot = sum(e.self_cpu_time_total for e in ev)
    rows = [(e.key, e.count/k, e.self_cpu_time_total/k/1000, e.self_cpu_time_total/tot) for e in ev[:o.get('top', 14)]]
    return lambda: rows+[('all', sum(e.count for e in ev)/k, tot/k/1000, 1.)]

# ---------------------------------------------------------------- the process

def main(name, o):
    out = os.fdopen(os.dup(1), 'w'); os.dup2(2, 1)              # what libraries print must not be taken for an answer
    import warnings; warnings.simplefilter('ignore')
    if name!='imports': import torch; torch.set_num_threads(o['threads'])
    if 'torchio' in name: import SimpleITK as sitk; sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(o['threads'])
    go = globals()[name](o)
    print('ready', file=out, flush=True)
    for _ in sys.stdin:
        r = go()
        print(json.dumps(r if isinstance(r, list) else dict(n=r[0], seconds=r[1])), file=out, flush=True)

if __name__=='__main__': main(sys.argv[1], json.loads(sys.argv[2]))
