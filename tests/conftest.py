"""How the tests run: the slow ones only where asked for, the longest first; no file is left behind; the count is the last line"""
import os, signal
from collections import Counter
from pathlib import Path
import pytest

os.environ |= dict(OMP_NUM_THREADS='1', MPLBACKEND='Agg', M3DV_CACHE='off') # before anything imports torch

UNSEEN = {'.git', '.venv', '.venv-bench', '__pycache__', '.ipynb_checkpoints', '.pytest_cache', '.ruff_cache'}
SECONDS = 'm3dv/seconds' # what each test took the last time, in pytest's cache

def pytest_configure(config):
    # Ctrl-C and kill end what a test has started: pytest-xdist's processes would ignore the one and die at once of the other
    for s in (signal.SIGINT, signal.SIGTERM): signal.signal(s, signal.default_int_handler)
    config.addinivalue_line('markers', 'slow: takes minutes or downloads packages; left out unless selected with -m slow')

def worker(config): return hasattr(config, 'workerinput') # of pytest-xdist

def cache(config): return getattr(config, 'cache', None)

def guess(item):
    "Seconds that a test may take, where it has never run: a tutorial or a late page trains, the others look at something"
    return 60 if 'tutorials/' in item.nodeid else 30 if '.ipynb' in item.nodeid else 1

def pytest_collection_modifyitems(config, items):
    "Leave out what is slow, and let what takes long begin first, so that no process waits for another at the end"
    if not config.option.markexpr:
        slow = [o for o in items if o.get_closest_marker('slow')]
        if slow: config.hook.pytest_deselected(items=slow)
        items[:] = [o for o in items if not o.get_closest_marker('slow')]
    took = cache(config).get(SECONDS, {}) if cache(config) else {}
    items.sort(key=lambda o: -took.get(o.nodeid, guess(o)))

# ---------------------------------------------------------------- at the end

def files(root):
    res = set()
    for d,ds,fs in os.walk(root):
        ds[:] = [o for o in ds if o not in UNSEEN and not o.endswith('.egg-info')]
        res |= {(Path(d)/f).relative_to(root).as_posix() for f in fs}
    return res

def pytest_sessionstart(session):
    if not worker(session.config): session.config.files_before = files(session.config.rootpath)

def all_skipped(stats):
    "Test files of which nothing ran"
    ran = {o.nodeid.partition('::')[0] for k in ('passed', 'failed', 'error') for o in stats.get(k, [])}
    return sorted({o.nodeid.partition('::')[0] for o in stats.get('skipped', [])}-ran)

def pytest_sessionfinish(session):
    "One more check, of what the others left behind: files, and tests that did not run"
    config = session.config
    reporter = config.pluginmanager.get_plugin('terminalreporter')
    if worker(config) or not reporter or not any(reporter.stats.get(k) for k in ('passed', 'failed', 'skipped')): return
    faults = [f"{o}: left behind" for o in sorted(files(config.rootpath)-config.files_before)]
    faults += [f"{o}: all of its tests were skipped" for o in all_skipped(reporter.stats)]
    if session.exitstatus==pytest.ExitCode.INTERRUPTED: faults.append('stopped: not all tests have run')
    if cache(config):
        took = {o.nodeid:round(o.duration, 1) for k in ('passed', 'failed') for o in reporter.stats.get(k, []) if o.when=='call'}
        cache(config).set(SECONDS, {**cache(config).get(SECONDS, {}), **took})
    outcome,at = 'failed' if faults else 'passed',('tests/conftest.py', None, 'nothing_left_behind')
    report = pytest.TestReport(f'{at[0]}::{at[2]}', at, {}, outcome, '\n'.join(faults) or None, 'call')
    reporter.stats.setdefault(outcome, []).append(report)
    if faults and session.exitstatus==pytest.ExitCode.OK: session.exitstatus = pytest.ExitCode.TESTS_FAILED

@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    "The count, as the very last line"
    reporter = config.pluginmanager.get_plugin('terminalreporter')
    if worker(config) or not reporter or not hasattr(config, 'files_before'): return
    n = Counter({k:len(reporter.getreports(k)) for k in ('passed', 'failed', 'error', 'skipped', 'xfailed', 'xpassed')})
    passed,failed,skipped = n['passed']+n['xpassed'],n['failed']+n['error'],n['skipped']+n['xfailed']
    reporter.write_line(f"{passed} passed, {failed} failed" + (f", {skipped} skipped" if skipped else ''))
