"""Checks that two generated things are what the notebooks say, without touching either.

    python tools/check_sync.py export    wsl_nb/*.py is what `nbdev_export` writes
    python tools/check_sync.py clean     nbs/*.ipynb is what `nbdev_clean` leaves

Works on a copy in a temporary folder, so that it needs no git and changes nothing. Exit 1 names the files that differ.
"""
import shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def texts(folder, pattern):
    "Contents of the files of a folder by name."
    return {p.name: p.read_bytes() for p in folder.glob(pattern) if not p.name.startswith('.')}


def differing(command, part, pattern, empty):
    "Files under `part` that change when an nbdev command runs on a copy; `empty` starts it without them."
    with tempfile.TemporaryDirectory() as spare:
        copy = Path(spare)
        for name in ('settings.ini', 'pyproject.toml'): shutil.copy(ROOT / name, copy)
        shutil.copytree(ROOT / 'nbs', copy / 'nbs', ignore=shutil.ignore_patterns('.*'))
        (copy / 'wsl_nb').mkdir()
        before = texts(ROOT / part, pattern)
        if not empty:
            for name, text in before.items(): (copy / part / name).write_bytes(text)
        done = subprocess.run([Path(sys.executable).with_name(command)], cwd=copy, capture_output=True, text=True)
        if done.returncode: sys.exit(f'{command} failed:\n{done.stdout}{done.stderr}')
        after = texts(copy / part, pattern)
    return sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))


def main():
    "Command line; see the top of this file."
    kinds = dict(export=('nbdev_export', 'wsl_nb', '*.py', True), clean=('nbdev_clean', 'nbs', '*.ipynb', False))
    if len(sys.argv) != 2 or sys.argv[1] not in kinds: sys.exit(__doc__)
    command, part, *_ = kinds[sys.argv[1]]
    wrong = differing(*kinds[sys.argv[1]])
    for name in wrong: print(f'{part}/{name} differs from what {command} writes; run {command} and commit the result')
    if not wrong: print(f'{part} is as {command} leaves it')
    sys.exit(bool(wrong))


if __name__ == '__main__': main()
