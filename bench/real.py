"""The tables of a finished run on real nodules, beside the classical baselines: writes results/NAME_*.csv, aggregates only.

    m3dv_train --data DIR --out RUN --repeats 3
    python bench/real.py --data DIR --run RUN --name m3dv-64
"""
import argparse
import pandas as pd
from pathlib import Path
from m3dv.blend import blend
from m3dv.classical import baselines
from m3dv.features import feature_table
from m3dv.crossval import curve_table
from m3dv.data import read_competition
from m3dv.evaluate import compare_all, compare, label_issues, read_oof, score_table, spread_table
from m3dv.metrics import delong
from m3dv.predict import load_network, predict_views
from m3dv.recipe import load_recipe
from m3dv.store import CropStore

OUT = Path(__file__).resolve().parent.parent/'results'

def symmetries(data, run, oof):
    "What averaging over symmetries gains, and whether the spread of the views, or the probability, tells wrong predictions from right ones"
    path = read_competition(data).train.set_index('name').path
    def views(g, net): return predict_views(net.net, CropStore(net.side).get(list(path[g.name])), net.side, net.mask, net.tta)
    d = [(g,views(g, load_network(run/'models'/f'seed{s}_fold{k}'))) for (s,k),g in oof.groupby(['seed','fold'])]
    d = pd.concat([g.assign(mean=v.mean(1), first=v[:,0], spread=v.std(1)) for g,v in d])
    c = compare(d.assign(p=d['mean']), d.assign(p=d['first'])); rows = {'AUC, mean over symmetries less one view':c[2:5]}
    for r,g in d.groupby('repeat'):
        wrong = ((g.p>=.5)!=(g.label==1)).astype(int)
        rows[f'AUC of the spread for being wrong, repeat {r}'] = delong(wrong, g.spread)
        rows[f'AUC of closeness to 0.5 for being wrong, repeat {r}'] = delong(wrong, -(g.p-.5).abs())
    return pd.DataFrame(rows, ['value','lo','hi']).T.rename_axis('figure')

def main(data, run, name):
    oof,r,x = read_oof(run/'oof.csv'),load_recipe(run/'recipe.json'),feature_table(read_competition(data).train)
    low = baselines(data, r, table=x)
    pair = pd.concat([oof, low[low.recipe=='classical']])
    bs = [blend(pair, weights=w, name=f'{r.name} and classical, {w} weights') for w in ('fitted','equal')]
    curve = pd.concat([baselines(data, r, table=x, train_frac=s).assign(train_frac=s) for s in (.25,.5,.75,1.)])
    curve = {k:curve_table(g.assign(recipe=g.recipe+g.train_frac.map(' {:.0%}'.format))) for k,g in curve.groupby('recipe')}
    OUT.mkdir(exist_ok=True)
    def save(t, what): print(t.round(3).to_string(), '\n'); t.round(4).to_csv(OUT/f'{name}_{what}.csv', lineterminator='\n')
    save(compare_all(oof, pd.concat([low, *(b.oof for b in bs)])), 'recipes')
    save(score_table(oof), 'scores')
    both = pd.concat([spread_table(oof), spread_table(oof, 'fold').reset_index('fold')]).reset_index().astype(dict(fold='Int64'))
    save(both.set_index(['repeat','fold']).sort_index(), 'spread')
    save(pd.concat(curve, names=['recipe']), 'learning_curve')
    save(symmetries(data, run, oof), 'symmetries')
    print(bs[0], f"\n{len(label_issues(pair))} of {oof.name.nunique()} labels are disputed by both in all repeats")

if __name__=='__main__':
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('--data', type=Path, required=True, help='competition folder')
    a.add_argument('--run', type=Path, required=True, help='folder of a run of m3dv_train on it')
    a.add_argument('--name', required=True, help='of the nodules, in the names of the tables')
    o = a.parse_args(); main(o.data, o.run, o.name)
