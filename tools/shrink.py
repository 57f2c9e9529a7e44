"""Reduce the pictures that are stored in notebooks to 64 colours, which makes them some three times smaller, and leave out
what progress bars have left behind: part of `make export`."""
import argparse, base64, io, json, re
from pathlib import Path
from PIL import Image

def small(png, colours=64):
    "A PNG with `colours` colours at the most; the same bytes where that is no gain or was done before"
    im = Image.open(io.BytesIO(png))
    if im.mode=='P': return png
    f = io.BytesIO(); im.convert('RGB').quantize(colours).save(f, 'PNG', optimize=True)
    return min(png, f.getvalue(), key=len)

def is_bar(o):
    "Is an output an empty page, or nothing but a style? A progress bar leaves both when it goes"
    h = o.get('data', {}).get('text/html')
    return h is not None and not re.sub(r'<style>.*?</style>', '', ''.join(h), flags=re.S).strip()

def shrink(path):
    "Shrink the pictures of a notebook, and remove traces of bars; bytes that were saved"
    nb,saved = json.loads(path.read_text(encoding='utf-8')),0
    for c in nb['cells']:
        if any(map(is_bar, outs:=c.get('outputs', []))): c['outputs'] = [o for o in outs if not is_bar(o)]; saved += 1
        for o in c.get('outputs', []):
            if not (v:=o.get('data', {}).get('image/png')): continue
            old = base64.b64decode(''.join(v)); new = small(old); saved += len(old)-len(new)
            if new!=old: o['data']['image/png'] = base64.b64encode(new).decode()
    if saved: path.write_text(json.dumps(nb, indent=1, sort_keys=True, ensure_ascii=False)+'\n', encoding='utf-8')
    return saved

if __name__=='__main__':
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument('notebooks', type=Path, nargs='*', help='all of nbs/ if none is named')
    root = Path(__file__).resolve().parent.parent
    for p in a.parse_args().notebooks or sorted((root/'nbs').rglob('*.ipynb')):
        if n:=shrink(p): print(f"{p.name}: {n:,} bytes less")
