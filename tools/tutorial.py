"""Run a notebook from top to bottom and write it as one HTML page that can be read without the internet."""
import argparse, os, re, sys, time
from pathlib import Path

_CDN = re.compile(r'<script\b[^>]*\bsrc\s*=\s*["\'](?:https?:)?//[^"\']*["\'][^>]*>\s*</script>', flags=re.S|re.I)
_EMPTY = re.compile(r'<script\b[^>]*(?:\bsrc\s*=\s*["\']["\']|mathjax-config)[^>]*>.*?</script>', flags=re.S|re.I)
_MODULE = re.compile(r'<script\b[^>]*\btype\s*=\s*["\']module["\'][^>]*>.*?</script>', flags=re.S|re.I)
_SHEET = re.compile(r'<link\b[^>]*\bhref\s*=\s*["\'](?:https?:)?//[^>]*>', flags=re.S|re.I)

class CellFailed(Exception): pass

def run(
    path, # notebook
    env:dict=None, # variables for its kernel
    timeout:int=3600, # limit for one cell, s
): # the notebook with its outputs
    "Run the cells of `path` in a kernel of this Python, with a line of progress for each"
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    os.environ['JUPYTER_PREFER_ENV_PATH'] = '1' # the kernel of this environment, whatever else is installed
    os.environ.update(env or {})
    nb = nbformat.read(path, as_version=4)
    code = [i for i,c in enumerate(nb.cells) if c.cell_type=='code' and c.source.strip()]
    now,start = [0],time.time()
    def first(i): return next((l for l in nb.cells[i].source.splitlines() if l.strip() and not l.lstrip().startswith('#|')), '')[:90]
    def begin(cell, cell_index):
        now[0] = cell_index
        if cell_index not in code: return
        print(f"  cell {code.index(cell_index)+1}/{len(code)}  {time.time()-start:5.0f} s  {first(cell_index)}", flush=True)
    client = NotebookClient(nb, timeout=timeout, kernel_name='python3', on_cell_start=begin, extra_arguments=['--IPKernelApp.log_level=40'],
                            resources={'metadata':{'path':str(Path(path).resolve().parent)}})
    try: client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as e:
        i = now[0]
        why = f"{e.ename}: {e.evalue}" if isinstance(e, CellExecutionError) else ' '.join(str(e).split())[:300]
        raise CellFailed(f"{path}: cell {code.index(i)+1} of {len(code)} ({first(i)}) failed\n{why}\n\n{nb.cells[i].source}") from None
    return nb

def to_html(
    nb, # notebook with outputs
    title:str, # title of the page
): # HTML
    "A page with pictures and, where a figure needs it, plotly.js inside; nothing is loaded from elsewhere"
    from nbconvert import HTMLExporter
    from plotly.offline import get_plotlyjs
    # cells that the site hides are hidden here, and progress bars are no result
    nb.cells = [c for c in nb.cells if not (c.cell_type=='code' and c.source.lstrip().startswith('#| hide'))]
    for c in nb.cells:
        if c.cell_type=='code': c.outputs = [o for o in c.outputs if '<progress' not in ''.join(o.get('data', {}).get('text/html', ''))]
    exporter = HTMLExporter(template_name='lab', embed_images=True, require_js_url='', mathjax_url='')
    html,_ = exporter.from_notebook_node(nb, resources={'metadata':{'name':title}})
    html = _SHEET.sub('', _EMPTY.sub('', _MODULE.sub('', _CDN.sub('', html))))
    if 'Plotly.' in html:
        head,body = html.split('</head>', 1)
        html = f"{head}<script>{get_plotlyjs()}</script>\n</head>{body}"
    return html

def outside(html):
    "Addresses that a page would load from elsewhere"
    html = re.sub(r'(<script\b[^>]*>).*?</script>', r'\1', html, flags=re.S|re.I)
    tags = re.findall(r'<(?:script|link|img|iframe|source|video|audio)\b[^>]*>', html, flags=re.I)
    return [t for t in tags if re.search(r'\b(?:src|href)\s*=\s*["\']?(?:https?:)?//', t, flags=re.I)]

def write(path, dest, env=None):
    "Run the notebook `path` and write its page `dest`"
    path,dest = Path(path),Path(dest)
    html = to_html(run(path, env), path.stem)
    left = outside(html)
    if left: raise CellFailed(f"{path}: the page would load {left[0]}")
    dest.parent.mkdir(parents=True, exist_ok=True)
    dest.write_text(html, encoding='utf-8')
    print(f"{dest}: {dest.stat().st_size/1e6:.1f} MB")

if __name__=='__main__':
    a = argparse.ArgumentParser(description=__doc__)
    a.add_argument('notebook', type=Path)
    a.add_argument('dest', type=Path, help='the HTML file')
    o = a.parse_args()
    try: write(o.notebook, o.dest)
    except CellFailed as e: sys.exit(str(e))
