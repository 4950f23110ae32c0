"Shared by all tests: one thread each, real data and accelerators only where there are any, the cost of real runs."
import os

os.environ.setdefault('OMP_NUM_THREADS', '1')
os.environ.setdefault('MPLBACKEND', 'agg')

import sys, time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'tools'))
COSTS = []


def real_data():
    "Folder of the real files, None without."
    folder = os.environ.get('WSL_NB_DATA')
    return Path(folder) if folder and Path(folder).is_dir() else None


def pytest_collection_modifyitems(items):
    "Skips what this machine cannot run."
    import torch
    for item in items:
        if 'data' in item.keywords and real_data() is None: item.add_marker(pytest.mark.skip(reason='WSL_NB_DATA is not set'))
        if 'gpu' in item.keywords and not torch.cuda.is_available(): item.add_marker(pytest.mark.skip(reason='no accelerator'))


@pytest.fixture(autouse=True)
def one_thread():
    "Every test in one thread, whatever the one before it chose."
    import torch
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def data_root():
    "Folder of the real files."
    return real_data()


@pytest.fixture(scope='session')
def root():
    "Root of the repository."
    return ROOT


def peak_gigabytes():
    "Largest memory of this process and of its largest child so far; None where the system does not say."
    try: import resource
    except ImportError: return None
    unit = 1e9 if sys.platform == 'darwin' else 1e6
    return tuple(resource.getrusage(w).ru_maxrss / unit for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item):
    "Notes seconds and peak memory of tests on real data."
    start = time.perf_counter()
    yield
    if 'data' in item.keywords: COSTS.append((item.name, time.perf_counter() - start, peak_gigabytes()))


def pytest_terminal_summary(terminalreporter):
    "Prints what real runs cost (in the process that ran them), and what the browser measured (in any process)."
    for report in terminalreporter.stats.get('passed', []):
        for name, value in getattr(report, 'user_properties', []): terminalreporter.write_line(f'{report.nodeid.split("::")[-1]}: {name} {value}')
    for name, seconds, peak in COSTS:
        memory = f', peak memory so far {peak[0]:.2f} GB, largest child {peak[1]:.2f} GB' if peak else ''
        terminalreporter.write_line(f'{name}: {seconds:.1f} s{memory}')
