"""Crops cut from the original cubes and from cubes cut to a smaller side must agree: check_crops.py LARGE SMALL"""
import sys
from pathlib import Path
import numpy as np
from m3dv.data import read_nodule, list_nodules, crop_start
from m3dv.transforms import cut_crop

def compare(
    a, # nodule in the large cube
    b, # the same nodule in the small one
    side:int, # side of the crop, voxels
)->str: # what differs, '' if nothing does; None where the cut has truncated the mask
    "Compare the crops of one nodule"
    gap = (a.seg.shape[0]-b.seg.shape[0])//2
    if b.seg.sum()!=a.seg.sum(): return
    (va,ma),(vb,mb) = cut_crop(a.voxel, a.seg, side),cut_crop(b.voxel, b.seg, side)
    if va.shape!=(side,)*3 or vb.shape!=va.shape: return f"shapes {va.shape} and {vb.shape}"
    sa,sb = crop_start(a.seg, side),crop_start(b.seg, side)
    if (sa-sb!=gap).any(): return f"starts {sa} and {sb}, expected {gap} apart"
    if not np.array_equal(ma, mb): return f"masks differ in {(ma!=mb).sum()} voxels"
    # where the crop reaches past the small cube its border is repeated; the large cube has more to show there
    inside = np.ix_(*[(np.arange(side)+s>=0) & (np.arange(side)+s<b.seg.shape[0]) for s in sb])
    if not np.array_equal(va[inside], vb[inside]): return f"grey levels differ in {(va[inside]!=vb[inside]).sum()} voxels"
    return ''

def main(large, small):
    files = {f"{o}/{p.name}":p for o in ('train_val','test') for p in list_nodules(Path(small)/o)}
    n,cut,bad = 0,0,[]
    for o in ('train_val', 'test'):
        for p in list_nodules(Path(large)/o):
            k = f"{o}/{p.name}"
            if k not in files: continue
            a,b = read_nodule(p),read_nodule(files[k])
            for side in (32, 48):
                r = compare(a, b, side)
                n,cut = n+(r is not None),cut+(r is None)
                if r: bad.append(f"{k}, side {side}: {r}")
    for o in bad: print(o)
    print(f"{n} crops compared, {cut} left out because the cut has truncated the mask, {len(bad)} differ")
    return not n or bool(bad)

if __name__=='__main__': sys.exit(main(*sys.argv[1:3]))
