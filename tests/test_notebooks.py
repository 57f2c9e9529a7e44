"""Every notebook runs from top to bottom"""
import pytest
from checks import ROOT, pages, run_notebook

@pytest.mark.parametrize('path', [p.relative_to(ROOT).as_posix() for p in pages(ROOT)])
def test_notebook(path):
    faults = run_notebook(ROOT, ROOT/path)
    if faults: pytest.fail('\n'.join(faults), pytrace=False)
