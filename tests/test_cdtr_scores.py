"Which split has boxes, the views of the protocols and their truth, scores of single images, thresholds of the best checkpoint."
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from training_child import CDTR_TINY
from wsl_nb import boxes as bx
from wsl_nb import cdtr, cdtr_scores
from wsl_nb.data import Split, embedded
from wsl_nb.formats_wsol import WsolSource, part_of, Row

BARE = replace(CDTR_TINY, w_sba=0., eval_split='', augment='', erase=0., checkpoint_every=0) # Where CLIP and scores do not matter


class Drawn(WsolSource):
    "Grey images of 20 x 30 pixels in the columns of a public layout."
    def size(self, split, index): return 20, 30
    def read(self, split, index, field): return np.full((20, 30, 3), 90, np.uint8) if field == 'image' else super().read(split, index, field)


def half_boxed(n=3):
    "A set whose val has boxes and whose held has none."
    rows = lambda boxed: [Row(f'{i}.png', i, np.float32([[2, 3, 12, 13]]) if boxed else None, (20, 30)) for i in range(n)]
    source = Drawn(dict(val=part_of(rows(True), None), held=part_of(rows(False), None)), n)
    return {k: Split(source, k, p.ids, tuple('abc'[:n]), ('image',), dataset='drawn', hash='0') for k, p in source.parts.items()}


def test_a_split_without_boxes_is_scored_for_classes_alone():
    "Its set may have boxes in other splits; nothing asks this one for them, and no threshold is chosen."
    splits, model = half_boxed(), cdtr.CDTR(BARE, 3).eval()
    assert {k: cdtr_scores.has_boxes(s) for k, s in splits.items()} == dict(val=True, held=False) and cdtr_scores.has_boxes(embedded('wsol', train=0, val=2, test=0).split('val')) and not cdtr_scores.has_boxes(SimpleNamespace(name='val', source=SimpleNamespace(fields=('image', 'label'))))
    metrics = {k: {r.metric for own in cdtr_scores.evaluate_protocols(model, s, BARE).values() for r in own} for k, s in splits.items()}
    assert metrics['held'] == {f'Cls@{k}, {p}' for k in (1, 5) for p in bx.PROTOCOLS} < metrics['val']
    assert cdtr_scores.choose_taus(model, splits['held'], BARE) == {} and len(cdtr_scores.choose_taus(model, splits['val'], BARE)) == 12
