"""Times the plain and the fast form of a method side by side: python tests/bench.py METHOD [--quick] [--only a,b] [--repeats N] [--threads N] [--out FILE].

Both forms run in this process, in turn, on the same numbers. Prints median seconds (CPU time of the process in one
thread, wall time in several), ratio, largest error; writes them with CPU name and threads to results/METHOD/bench/result.json.
`--quick` checks at small sizes that both forms agree; its times mean nothing and no file is written unless --out is given.
"""
import argparse
import importlib
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

HERE = Path(__file__).resolve().parent


@dataclass
class Row:
    "One comparison: what was measured, how far the forms are apart, and what was aimed at."
    name: str # What is timed
    plain: float | None = None # Median seconds of the plain form
    fast: float | None = None # Median seconds of the library's form
    error: float | None = None # Largest error between them
    allowed: float | None = None # Largest error that counts as the same
    aim: float | None = None # Ratio aimed at
    spread: dict = field(default_factory=dict) # Fastest and slowest run of each form
    more: dict = field(default_factory=dict) # Anything else that was measured

    @property
    def ratio(self): return None if None in (self.plain, self.fast) else self.plain / self.fast

    @property
    def agrees(self): return self.error is None or bool(self.error <= self.allowed)

    def text(self):
        "One printed line, then one for each extra."
        parts = [f'{self.name:58}']
        if self.ratio: parts.append(f'plain {self.plain:8.4f} s   fast {self.fast:8.4f} s   {self.ratio:5.2f}x' + (f' (aim {self.aim}x)' if self.aim else ''))
        if self.error is not None: parts.append(f'error {self.error:.1e} (allowed {self.allowed:g})' + ('' if self.agrees else '   DIFFERENT'))
        return '   '.join(parts) + ''.join(f'\n    {k}: {shown(v)}' for k, v in self.more.items())


def shown(value):
    "A number with few digits, a table on one line."
    if isinstance(value, dict): return ', '.join(f'{k} {shown(v)}' for k, v in value.items())
    return f'{value:.4g}' if isinstance(value, float) else str(value)


def clock(threads):
    "CPU time of the process where one thread works, so that other programs do not count; wall time otherwise."
    return time.process_time if threads == 1 else time.perf_counter


def alternate(forms, repeats, now=time.process_time, warm=1):
    "Name -> seconds of each run; the forms take turns, `warm` rounds are not counted."
    found = {name: [] for name in forms}
    for turn in range(warm + repeats):
        for name, run in forms.items():
            start = now(); run(); seconds = now() - start
            if turn >= warm: found[name].append(seconds)
    return found


def timed_row(name, plain, fast, repeats, now, warm=1, **rest):
    "Row of two functions without arguments."
    runs = alternate(dict(plain=plain, fast=fast), repeats, now, warm)
    return Row(name, *(statistics.median(r) for r in runs.values()), spread={k: [min(r), max(r)] for k, r in runs.items()}, **rest)


def gap(a, b):
    "Largest difference of two tensors, relative to the largest value of the first."
    return ((a - b).abs().max() / a.abs().max().clamp(min=1e-30)).item() if a.numel() else 0.


def cpu_name():
    "Product name of the processor."
    try: return next(l.split(':', 1)[1].strip() for l in Path('/proc/cpuinfo').read_text().splitlines() if l.startswith('model name'))
    except (OSError, StopIteration): return platform.processor() or platform.machine()


def about(args):
    "What a reader needs to judge the times."
    import torch
    from wsl_nb import __version__
    from wsl_nb.metrics import _commit
    flags = {f for l in _lines('/proc/cpuinfo') if l.startswith('flags') for f in l.split(':', 1)[1].split()} & {'avx2', 'avx512f', 'avx512_bf16', 'amx_bf16'}
    return dict(schema=1, method=args.method, kind='bench', cpu=cpu_name(), cores=os.cpu_count(), threads=torch.get_num_threads(), instructions=sorted(flags),
                clock='CPU seconds of the process' if args.threads == 1 else 'wall seconds', repeats=args.repeats, quick=args.quick, torch=torch.__version__,
                python=platform.python_version(), version=__version__, commit=_commit(), date=datetime.now(timezone.utc).isoformat(timespec='seconds'))


def _lines(path):
    "Lines of a file of the system, none where there is no such file."
    try: return Path(path).read_text().splitlines()
    except OSError: return []


def rounded(value):
    "Floats to five digits: the record holds no more than was measured."
    if isinstance(value, dict): return {k: rounded(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)): return [rounded(v) for v in value]
    return float(f'{value:.5g}') if isinstance(value, float) else value


def write(path, head, rows):
    "The record: one object, one line for each row."
    from wsl_nb.core import atomic
    lines = [json.dumps(rounded(asdict(r) | dict(ratio=r.ratio, agrees=r.agrees)), ensure_ascii=False) for r in rows]
    text = json.dumps(rounded(head), ensure_ascii=False, indent=1)[:-2] + ',\n "rows": [\n' + ',\n'.join(lines) + '\n]}\n'
    if len(text.encode()) > 200_000: sys.exit(f'got a record of {len(text)} bytes\nexpected at most 200 KB\ncure: keep fewer extras in the rows')
    with atomic(path) as spare: spare.write_text(text, encoding='utf-8')


def arguments(argv):
    "Parsed command line."
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('method', nargs='?', default='more'); p.add_argument('--quick', action='store_true')
    p.add_argument('--only', default='', help='parts by name, comma between'); p.add_argument('--repeats', type=int, default=3)
    p.add_argument('--threads', type=int, default=1); p.add_argument('--out', default='', help='record file')
    return p.parse_args(argv)


def main(argv=None):
    "Exit code: 0 when the two forms of everything agree, whatever the ratios."
    args = arguments(argv)
    import torch
    torch.set_num_threads(args.threads)
    parts, rows = importlib.import_module(f'bench_{args.method}').PARTS, []
    wanted = [n for n in args.only.split(',') if n] or list(parts)
    unknown = set(wanted) - set(parts)
    if unknown: sys.exit(f'got part {sorted(unknown)}\nexpected one of {list(parts)}\ncure: check --only')
    print(' | '.join(f'{k} {v}' for k, v in about(args).items() if k in ('cpu', 'threads', 'clock', 'torch')), flush=True)
    for name in wanted:
        for row in parts[name](args.quick, args.repeats, clock(args.threads)):
            rows.append(row); print(row.text(), flush=True)
    out = args.out or ('' if args.quick or args.only else HERE.parent / 'results' / args.method / 'bench' / 'result.json')
    if out: write(out, about(args), rows)
    bad = [r.name for r in rows if not r.agrees]
    print(f'{args.method}: {len(rows)} rows, {len(bad)} different' + (f': {bad}' if bad else ''))
    return int(bool(bad))


if __name__ == '__main__':
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    sys.path.insert(0, str(HERE))
    sys.exit(main())
