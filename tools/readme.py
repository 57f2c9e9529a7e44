"""Write README.md from nbs/index.ipynb, as the docs show it, without Quarto. `--check` compares and writes nothing."""
import argparse, base64, difflib, os, re, sys
from pathlib import Path

NOTE = '<!-- Written from nbs/index.ipynb by tools/readme.py: edit there, not here. -->'

def fence(text, lang=''):
    "`text` in a fenced block that is longer than any fence inside it"
    f = '`'*max([3, *(len(m)+1 for m in re.findall(r'`{3,}', text))])
    return f"{f}{lang}\n{text.rstrip()}\n{f}"

def relink(md):
    "Links are relative to nbs/ in the notebook and to the project in README.md"
    def to(t):
        if re.match(r'[a-z][a-z0-9+.-]*:|//|#', t): return t
        path,sep,anchor = t.partition('#')
        return os.path.normpath(os.path.join('nbs', path)).replace(os.sep, '/') + sep + anchor
    def outside(s):
        s = re.sub(r'(\]\(\s*<?)([^)\s>]+)', lambda m: m[1]+to(m[2]), s)
        return re.sub(r'((?:src|href)\s*=\s*["\'])([^"\']+)', lambda m: m[1]+to(m[2]), s)
    parts = re.split(r'(^```.*?^```|`[^`\n]*`)', md, flags=re.S|re.M)
    return ''.join(o if i%2 else outside(o) for i,o in enumerate(parts))

def front(text):
    "Title and description, which nbdev moves to a raw cell, as Markdown again"
    import yaml
    d = yaml.safe_load(text.strip().strip('-'))
    return '\n\n'.join(o for o in (f"# {d['title']}", NOTE, d.get('description')) if o)

def output(o, images):
    "One output: Markdown as it is, a picture as a file, the rest as a fenced block"
    if 'text' in o: return fence(''.join(o['text']), 'text')
    d = o.get('data', {})
    if 'text/markdown' in d: return relink(''.join(d['text/markdown']).strip())
    if 'image/png' in d:
        name = f'nbs/images/index_{len(images)}.png'
        images[name] = base64.b64decode(''.join(d['image/png']))
        return f'![]({name})'
    if 'text/plain' in d: return fence(''.join(d['text/plain']), 'text')

def render(
    root, # the project
): # text of README.md, and the pictures that it shows as {path: bytes}
    "Process index.ipynb with the processors of nbdev's docs and write the result as Markdown"
    os.chdir(root)
    from nbdev.process import NBProcessor
    from nbdev.processors import FilterDefaults, add_links, insert_warning
    # the addresses of the site stand in settings.ini alone: no links to it, and a warning that names this tool instead of nbdev
    procs = [p for p in FilterDefaults().procs() if p not in (add_links, insert_warning)]
    nbp = NBProcessor(root/'nbs'/'index.ipynb', procs=procs)
    nbp.process()
    parts,images = [],{}
    for c in nbp.nb.cells:
        s = c.get('source') or ''
        quarto = dict(re.findall(r'^#\|\s*([\w-]+):\s*(\S+)', s, flags=re.M))
        s = re.sub(r'^#\|.*\n?', '', s, flags=re.M).strip()
        if c.cell_type=='raw' and s.startswith('---'): parts.append(front(s))
        elif c.cell_type=='markdown': parts.append(relink(s))
        elif c.cell_type=='code' and quarto.get('include')!='false':
            if s and quarto.get('echo')!='false': parts.append(fence(s, 'python'))
            if quarto.get('output')!='false': parts += [output(o, images) for o in c.get('outputs', [])]
    return '\n\n'.join(p for p in parts if p)+'\n', images

def main(root, check):
    root = root.resolve()
    text,images = render(root)
    want = {'README.md':text.encode(), **images}
    if not check:
        for f,b in want.items():
            (root/f).parent.mkdir(parents=True, exist_ok=True)
            (root/f).write_bytes(b)
        return 0
    bad = [f for f,b in want.items() if not (root/f).exists() or (root/f).read_bytes()!=b]
    if 'README.md' in bad and (root/'README.md').exists():
        old = (root/'README.md').read_text(encoding='utf-8').splitlines()
        print('\n'.join(list(difflib.unified_diff(old, text.splitlines(), 'README.md', 'nbs/index.ipynb', lineterm='', n=0))[:10]))
    for f in bad: print(f"{f}: not what nbs/index.ipynb gives; run `make export`")
    return len(bad)>0

if __name__=='__main__':
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument('--root', type=Path, default=Path(__file__).resolve().parent.parent, help='the project')
    a.add_argument('--check', action='store_true', help='compare only')
    o = a.parse_args()
    sys.exit(main(o.root, o.check))
