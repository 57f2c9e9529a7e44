"""The README renderer and the tutorial page"""
import base64, json, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT/'tools'))
import readme, tutorial

def notebook(p, *code):
    cells = [dict(cell_type='code', id=f'c{i}', metadata={}, source=s, execution_count=None, outputs=[]) for i,s in enumerate(code)]
    p.write_text(json.dumps(dict(cells=cells, metadata={}, nbformat=4, nbformat_minor=5)))
    return p

FIG = "HTML(go.Figure(go.Scatter(x=[1,2], y=[1,2])).to_html(full_html=False, include_plotlyjs='cdn', div_id='{}'))"

def test_page_is_whole(tmp_path):
    "Two figures, one plotly.js, a picture, nothing from elsewhere, and the variables that were given"
    f = notebook(tmp_path/'a.ipynb', 'import os, matplotlib.pyplot as plt, plotly.graph_objects as go\nfrom IPython.display import HTML',
                 FIG.format('a'), FIG.format('b'), '%matplotlib inline\nplt.plot([1,2]);', "os.environ['M3DV_DATA']")
    tutorial.write(f, tmp_path/'a.html', env=dict(M3DV_DATA='the folder'))
    html = (tmp_path/'a.html').read_text(encoding='utf-8')
    assert html.count('Plotly.newPlot(')==2 and html.count('plotly.js v')==1
    assert 'data:image/png' in html and 'the folder' in html and not tutorial.outside(html)

def test_failing_cell_is_named(tmp_path):
    f = notebook(tmp_path/'a.ipynb', '1+1', 'open("nowhere.csv")')
    with pytest.raises(tutorial.CellFailed, match=r'cell 2 of 2 \(open\("nowhere.csv"\)\) failed\nFileNotFoundError'):
        tutorial.write(f, tmp_path/'a.html')
    assert not (tmp_path/'a.html').exists()

@pytest.mark.parametrize('tag', [
    '<script src="https://a.b/c.js"></script>', "<img src='//a.b/c.png'>", '<link rel=stylesheet href="http://a.b/c.css">'])
def test_outside_is_seen(tag): assert tutorial.outside(f'<p>{tag}</p>')

@pytest.mark.parametrize('md,want', [
    ('[a](00_core.ipynb#x)', '[a](nbs/00_core.ipynb#x)'), ('[a](../LICENSE)', '[a](LICENSE)'),
    ('![](images/a.png)', '![](nbs/images/a.png)'),
    ('<img src="images/a.png">', '<img src="nbs/images/a.png">'), ('[a](#x)', '[a](#x)'), ('[a](https://a.b/c)', '[a](https://a.b/c)'),
    ('`[a](b.ipynb)`', '`[a](b.ipynb)`'), ('```\n[a](b.ipynb)\n```', '```\n[a](b.ipynb)\n```')])
def test_relink(md, want): assert readme.relink(md)==want

def test_output():
    images = {}
    assert readme.output(dict(output_type='stream', text=['a\n', 'b\n']), images)=='```text\na\nb\n```'
    assert readme.output(dict(data={'text/plain':['```']}), images)=='````text\n```\n````'
    assert readme.output(dict(data={'image/png':base64.b64encode(b'x').decode()}), images)=='![](nbs/images/index_0.png)'
    assert images=={'nbs/images/index_0.png':b'x'}

def test_shrink(tmp_path):
    "A picture of many colours gets smaller and looks the same; a second time changes nothing"
    import io, numpy as np
    from PIL import Image
    import shrink
    x = (np.indices((64,64)).sum(0)*2).astype(np.uint8); x = np.stack([x, x.T, 255-x], -1)
    f = io.BytesIO(); Image.fromarray(np.repeat(np.repeat(x, 4, 0), 4, 1)).save(f, 'PNG')
    nb = notebook(tmp_path/'a.ipynb', '1'); d = json.loads(nb.read_text())
    d['cells'][0]['outputs'] = [dict(output_type='display_data', metadata={}, data={'image/png':base64.b64encode(f.getvalue()).decode()})]
    nb.write_text(json.dumps(d))
    small = shrink.small(f.getvalue())
    assert shrink.small(small)==small and len(small)<=len(f.getvalue())
    assert np.abs(np.asarray(Image.open(io.BytesIO(small)).convert('RGB')).astype(int)-np.repeat(np.repeat(x, 4, 0), 4, 1)).mean()<8
    shrink.shrink(nb); was = nb.read_bytes(); assert shrink.shrink(nb)==0 and nb.read_bytes()==was

def test_bars_go(tmp_path):
    import shrink
    nb = notebook(tmp_path/'a.ipynb', '1'); d = json.loads(nb.read_text())
    page = lambda h: dict(output_type='display_data', metadata={}, data={'text/html':h, 'text/plain':'<IPython.core.display.HTML object>'})
    d['cells'][0]['outputs'] = [page(['\n<style>\n p {}\n', '</style>']), page(''), page('<b>a</b>')]
    nb.write_text(json.dumps(d)); shrink.shrink(nb)
    assert [o['data']['text/html'] for o in json.loads(nb.read_text())['cells'][0]['outputs']]==['<b>a</b>']
