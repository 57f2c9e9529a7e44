"""How often do the intervals of m3dv.metrics hold the truth, and how often does `compare` call equal recipes different?
Writes results/coverage.csv.

    python bench/coverage.py            1,000 simulations a cell, about an hour on one core
    python bench/coverage.py --n 50     a quick look, written nowhere
"""
import argparse, os, time
os.environ.setdefault('OMP_NUM_THREADS', '1')
import numpy as np, pandas as pd
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from scipy.special import expit
from scipy.stats import norm
from fastprogress.fastprogress import progress_bar
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from m3dv.evaluate import compare, select_best
from m3dv.metrics import METRICS, bootstrap, delong, resamples, roc_auc, roc_steps, wilson

OUT = Path(__file__).resolve().parent.parent/'results'/'coverage.csv'
FULL = 1000
SIZES,AUCS = (117,365),(.6,.7,.8,.9)
# variance of what all recipes see of a nodule, and of what one recipe sees in all its repeats; the rest is drawn anew in each repeat
SHARED,RECIPE = .5,.2

def study(rng, n, auc, repeats, seeds, recipes=1):
    "Labels, and for each recipe its calibrated probabilities (R,N); d' has the mean that gives `auc`, and the SD `seeds` over repeats"
    d = norm.ppf(auc)*2**.5
    y = (rng.random(n)<.5).astype(int)
    if min(y.sum(), n-y.sum())<10: return study(rng, n, auc, repeats, seeds, recipes)
    u = rng.normal(0, SHARED**.5, n)
    x = [u + rng.normal(0, RECIPE**.5, n) + rng.normal(0, (1-SHARED-RECIPE)**.5, (repeats,n)) + (d+rng.normal(0, seeds, (repeats,1)))*y
         for _ in range(recipes)]
    return y, [expit(d*o-d*d/2) for o in x]

def table(y, p, recipe='a'):
    "An out-of-fold table of these predictions"
    R,n = p.shape; r,i = np.repeat(np.arange(R), n),np.tile(np.arange(n), R)
    return pd.DataFrame(dict(name=i, label=y[i], repeat=r, fold=i%5, seed=r, recipe=recipe, p=p.ravel()))

def effects(seeds, k=5):
    "Effects of the seed on d', at equal probabilities and with the right variance"
    z = norm.ppf((np.arange(k)+.5)/k)
    return seeds*z/z.std() if seeds else np.zeros(1)

def truth_auc(auc, seeds): return float(norm.cdf((norm.ppf(auc)*2**.5+effects(seeds))/2**.5).mean())

def truths(auc, seeds, n=200_000):
    "Each figure of one repeat in the long run, averaged over seeds"
    d = norm.ppf(auc)*2**.5; x,y = norm.ppf((np.arange(n)//2+.5)/(n/2)),np.arange(n)%2
    return {m:float(np.mean([f(y, expit(d*(x+(d+o)*y)-d*d/2), np.ones((1,n)))[0] for o in effects(seeds)])) for m,(f,_) in METRICS.items()}

def two_level(y, p, n, seed):
    "Nodules drawn anew, each with all its repeats, then the repeats: the 2.5 % and 97.5 % quantiles of the AUC"
    w,R = resamples(len(y), n, seed),len(p)
    c = np.random.default_rng(seed).multinomial(R, np.full(R, 1/R), n)/R
    return np.nanquantile(sum(c[:,r]*roc_auc(y, p[r], w) for r in range(R)), [.025,.975])

def one(rng, n, auc, repeats, seeds, truth, k):
    "Which intervals held the truth in one study"
    y,(p,) = study(rng, n, auc, repeats, seeds)
    held = lambda i,t: i[0]<=t<=i[1]
    d = norm.ppf(auc)*2**.5
    res = {'ROC AUC, DeLong':held(delong(y, p)[1:], truth['ROC AUC']),
           'ROC AUC, two-level percentiles':held(two_level(y, p, k, int(rng.integers(1<<30))), truth['ROC AUC'])}
    for m in METRICS:
        i = bootstrap(y, p, m, n=k, seed=int(rng.integers(1<<30)))
        if m=='accuracy at 0.5': res[f'{m}, Wilson'] = held(wilson(i.value, len(y))[1:], truth[m])
        else: res[f'{m}, bootstrap'] = held(i[1:], truth[m])
    if repeats==1:      # Wilson's interval is about the threshold as it was found: its true sensitivity is known
        tp,fp = roc_steps(y, p[0], np.ones((1,n))); ok = fp[0]<=.1*fp[0,-1]+1e-9; j = np.flatnonzero(ok)[tp[0][ok].argmax()]
        cut = np.append(np.inf, np.unique(p[0])[::-1])[j]; x = (np.log(cut/(1-cut))+d*d/2)/d if np.isfinite(cut) else np.inf
        res['sensitivity at specificity 0.9, Wilson'] = held(wilson(tp[0,j]/tp[0,-1], int(tp[0,-1]))[1:], norm.sf(x-d))
    return res

def intervals(n_sim, repeats, seeds, n, auc):
    "Coverage of all intervals in one cell"
    rng,truth = np.random.default_rng([repeats,n,int(auc*10)]),truths(auc, seeds)
    res = pd.DataFrame([one(rng, n, auc, repeats, seeds, truth, 200) for _ in range(n_sim)])
    res['difference of ROC AUC, compare'] = [difference(rng, n, auc, repeats, seeds) for _ in range(n_sim)]
    return [('coverage', k, n, auc, repeats, seeds, res[k].mean(), n_sim) for k in res]

def difference(rng, n, auc, repeats, seeds, by=.03):
    "Does the interval of `compare` hold the difference of two recipes, of which the first is better by `by`?"
    y,(p,q) = study(rng, n, auc, repeats, seeds, 2)
    d,d2 = norm.ppf(auc)*2**.5,norm.ppf(auc-by)*2**.5
    c = compare(table(y, p), table(y, (np.log(q/(1-q))+d*d/2)/d-(d-d2)*y))
    return c.lo<=truth_auc(auc, seeds)-truth_auc(auc-by, seeds)<=c.hi

def best(n_sim, n):
    "Coverage of the figure of the best of twenty equal recipes"
    rng,hits = np.random.default_rng([99,n]),[]
    for _ in range(n_sim):
        y,ps = study(rng, n, .7, 1, 0., 20)
        c = select_best(pd.concat([table(y, p, f'r{i}') for i,p in enumerate(ps)]), n=100, seed=int(rng.integers(1<<30)))
        hits.append((c.corrected.lo<=.7<=c.corrected.hi, c.as_seen.lo<=.7<=c.as_seen.hi))
    return [('coverage', f'best of 20, {k}', n, .7, 1, 0., r, n_sim) for k,r in zip(('corrected','as it came out'), np.mean(hits, 0))]

def errors(n_sim, repeats, seeds, n, auc):
    "How often `compare` calls two equal recipes different"
    rng = np.random.default_rng([7,repeats,n,int(auc*10),int(seeds*10)])
    hits = [compare(table(y, p), table(y, q)).p_value<.05 for y,(p,q) in (study(rng, n, auc, repeats, seeds, 2) for _ in range(n_sim))]
    return [('type I', 'compare at 5 %', n, auc, repeats, seeds, np.mean(hits), n_sim)]

def trained(n_sim, repeats, n, auc, k=10):
    """Coverage of DeLong's interval where the predictors are fitted: logistic regression on `k` normal features, cross-validated;
    `auc` is that of the best possible weights"""
    rng,shift,rows = np.random.default_rng([5,repeats,n,int(auc*10)]),norm.ppf(auc)*(2/k)**.5,[]
    for _ in range(n_sim):
        y = (rng.random(n)<.5).astype(int); x = rng.normal(size=(n,k))+shift*y[:,None]
        p,true = np.empty((repeats,n)),[]
        for r in range(repeats):
            for tr,va in StratifiedKFold(5, shuffle=True, random_state=int(rng.integers(1<<30))).split(x, y):
                m = LogisticRegression().fit(x[tr], y[tr]); p[r,va] = m.predict_proba(x[va])[:,1]
                true.append(norm.cdf(shift*m.coef_.sum()/np.linalg.norm(m.coef_)/2**.5))        # exact: the score is normal in either class
        rows.append((*delong(y, p), np.mean(true)))
    a,lo,hi,own = np.array(rows).T
    truths = (('AUC of the models at hand', own), ('mean AUC over other training nodules', own.mean()))
    return [('trained', f'DeLong, {k}', n, auc, repeats, 0., ((lo<=t)&(t<=hi)).mean(), n_sim) for k,t in truths] \
        + [('trained', 'mean of AUC out of fold less that of its models', n, auc, repeats, 0., (a-own).mean(), n_sim)]

def call(job): return job[0](*job[1:])

def main(n_sim, jobs):
    start = time.time()
    todo = [(intervals, n_sim, r, s, n, a) for r,s in ((3,.1),(1,0.)) for n in SIZES[::-1] for a in AUCS]
    todo += [(best, max(n_sim//2, 2), n) for n in SIZES]
    todo += [(errors, n_sim, r, s, n, a) for s in (0.,.1) for r in (1,2,3)+(5,)*(s>0) for n in SIZES for a in AUCS]
    todo += [(trained, max(n_sim//2, 2), r, n, a) for r in (1,3) for n in SIZES for a in (.5,)+AUCS]
    with ProcessPoolExecutor(jobs) as ex: rows = [o for os in progress_bar(ex.map(call, todo), total=len(todo)) for o in os]
    df = pd.DataFrame(rows, columns=['kind','what','n','auc','repeats','seeds','rate','simulations'])
    df = df.sort_values(['kind','what','seeds','repeats','n','auc']).round(dict(rate=4))
    print(df.pivot(index=['kind','what','seeds','repeats','n'], columns='auc', values='rate').to_string())
    print(f'{time.time()-start:.0f} s')
    if n_sim>=FULL: OUT.parent.mkdir(exist_ok=True); df.to_csv(OUT, index=False, lineterminator='\n'); print(f'written to {OUT}')

if __name__=='__main__':
    a = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    a.add_argument('--n', type=int, default=FULL, help='simulations a cell')
    a.add_argument('--jobs', type=int, default=os.cpu_count(), help='processes')
    o = a.parse_args(); main(o.n, o.jobs)
