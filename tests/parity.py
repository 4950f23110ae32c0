"""Compares a method with its golden vectors: python tests/parity.py METHOD [DIR].

DIR is any directory of the method's format, or the parent of several. Everything is recomputed from stored weights,
inputs and random picks. Prints name, origin, largest error, tolerance and verdict of each tensor; what is not
compared is printed with its reason. The last line is `METHOD: N compared, N failed, N not covered`.
"""
import fnmatch
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent


@dataclass
class Near:
    "A recomputed tensor and how closely it must agree: |ours - stored| <= atol + rtol * |stored|."
    value: torch.Tensor
    atol: float = 1e-4
    rtol: float = 0.
    nan: bool = False # NaN has a meaning and must stand in the same places

    def check(self, stored):
        "(largest error, tolerance as text, passed)"
        ours, stored = torch.as_tensor(self.value).double(), stored.double()
        if ours.numel() != stored.numel(): return float('nan'), f'shape {tuple(ours.shape)} against {tuple(stored.shape)}', False
        ours = ours.reshape(stored.shape)
        gap = (ours - stored).abs()
        if self.nan: gap[ours.isnan() & stored.isnan()] = 0
        ok = bool((gap <= self.atol + self.rtol * stored.abs().nan_to_num()).all()) and not gap.isnan().any()
        return gap.max().item() if gap.numel() else 0., f'{self.atol:g} + {self.rtol:g}*|x|', ok


@dataclass
class Same:
    "A recomputed label map or index set of which at least `share` must be equal."
    value: torch.Tensor
    share: float = 1.

    def check(self, stored):
        "(share that differs, tolerance as text, passed)"
        ours = torch.as_tensor(self.value)
        if tuple(ours.shape) != tuple(stored.shape): return float('nan'), f'shape {tuple(ours.shape)} against {tuple(stored.shape)}', False
        wrong = (ours.long() != stored.long()).double().mean().item() if stored.numel() else 0.
        return wrong, f'{self.share:.1%} equal', wrong <= 1 - self.share + 1e-12


@dataclass
class Alike:
    "A recomputed field that must correlate with the stored one (another filter of the same shape)."
    value: torch.Tensor
    least: float = .9

    def check(self, stored):
        "(1 - correlation, tolerance as text, passed)"
        pair = torch.stack([torch.as_tensor(self.value).double().flatten(), stored.double().flatten()])
        r = torch.corrcoef(pair)[0, 1].item()
        return 1 - r, f'r >= {self.least}', r >= self.least


def scope(method):
    "(patterns of what is no result, patterns of results out of scope), each pattern with its reason."
    entry = json.loads((HERE / 'parity_scope.json').read_text())[method]
    return entry['inputs'], entry['out_of_scope'], entry.get('needs_extra', {}), entry['origin']


def reason(stem, name, patterns):
    "Reason of the first pattern that matches the name, or file stem and name (`irn/cam`), else None."
    return next((why for pattern, why in patterns.items() if fnmatch.fnmatch(f'{stem}/{name}' if '/' in pattern else name, pattern)), None)


def stored_tensors(folder):
    "File stem -> name -> tensor of a directory, and its config."
    return {f.stem: load_file(f) for f in sorted(Path(folder).glob('*.safetensors'))}, json.loads((Path(folder) / 'config.json').read_text())


def compare(method, folder, say=print):
    "(compared, failed, not covered) of one directory; prints a line for each tensor."
    inputs, outside, extra, origin = scope(method)
    stored, config = stored_tensors(folder); module = importlib.import_module(f'parity_{method}')
    try:
        if hasattr(module, 'extra'): stored |= module.extra(Path(folder), config) # numbers beside the tensor files
        ours = module.compute(stored, config)
    except KeyError as e: sys.exit(f'got {folder} without "{e.args[0]}"\nexpected every file and tensor of the format\ncure: restore the directory')
    compared = failed = missing = 0
    for stem, name in sorted((stem, name) for stem in stored for name in stored[stem]):
        if stem == 'weights' or reason(stem, name, inputs): continue
        row, outlier = f'{stem + "/" + name:52}', reason(stem, name, outside)
        if (stem, name) in ours and not outlier:
            error, tolerance, ok = ours[stem, name].check(stored[stem][name])
            compared, failed = compared + 1, failed + (not ok)
            say(f'{row} {reason(stem, name, origin) or "?":14} {error:10.2e}  {tolerance:22} {"ok" if ok else "FAILED"}')
        else:
            missing += not (outlier or reason(stem, name, extra))
            say(f'{row} not covered: {outlier or reason(stem, name, extra) or "no recomputation"}')
    return compared, failed, missing


def folders(path):
    "The directory itself, or each directory below it that holds a config.json."
    path = Path(path)
    return [path] if (path / 'config.json').exists() else sorted(p.parent for p in path.glob('*/config.json'))


def main(method, path=None):
    "Exit code: 0 when nothing failed and at least 95 % of the denominator was compared."
    found = folders(path or HERE / 'golden' / method)
    if not found: sys.exit(f'got {path or HERE / "golden" / method}\nexpected a directory with config.json and *.safetensors, or its parent\ncure: check the path')
    counts = torch.tensor([compare(method, folder) for folder in found]).sum(0).tolist()
    print(f'{method}: {counts[0]} compared, {counts[1]} failed, {counts[2]} not covered')
    return int(counts[1] > 0 or counts[0] < .95 * (counts[0] + counts[2]))


if __name__ == '__main__':
    sys.path.insert(0, str(HERE))
    sys.exit(main(*sys.argv[1:3]))
