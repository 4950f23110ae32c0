"Which split has boxes, the views of the protocols and their truth, scores of single images, thresholds of the best checkpoint."
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from training_child import CDTR_TINY, prepare
from wsl_nb import boxes as bx
from wsl_nb import cdtr, cdtr_own, cdtr_scores
from wsl_nb import training_checkpoint as disk
from wsl_nb.core import BadInput
from wsl_nb.data import Split, embedded
from wsl_nb.formats_wsol import Row, WsolSource, half_open, part_of

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


# --- the truth of a squashed view, from the line of a list to the verdict --------------------------------------------

class Colours(torch.nn.Module):
    "A network that sees colours: its class maps are the channels of the image, on a grid."
    def __init__(self):
        super().__init__()
        self.nothing = torch.nn.Parameter(torch.zeros(1))

    def forward(self, image):
        cells = torch.nn.functional.adaptive_avg_pool2d(image, 12)
        return cdtr.Maps(cells.amax(1), cells, torch.zeros_like(cells), None, None)


class Listed(WsolSource):
    "Noise with a bright rectangle near the listed box, each image of its own odd size."
    def size(self, split, index): return self.sizes[index]

    def read(self, split, index, field):
        if field != 'image': return super().read(split, index, field)
        r = bx.rng('listed', index); image = r.integers(0, 60, (*self.sizes[index], 3)).astype(np.uint8)
        x0, y0, x1, y1 = (self.parts[split].boxes[index][0] + r.normal(0, .09 * min(self.sizes[index]), 4)).astype(int)
        image[max(y0, 0):y1, max(x0, 0):x1, index % 3] = 250
        return image


def listed_lines(n, sizes):
    "Lines of a list: id, inclusive corners."
    r = bx.rng('lines'); lines = []
    for i in range(n):
        (h, w), k = sizes[i], r.integers(12, 20); x0, y0 = r.integers(0, w - k - 2), r.integers(0, h - k - 2)
        lines.append(f'{i}.png,{x0},{y0},{r.integers(x0 + k, w)},{r.integers(y0 + k, h)}')
    return lines


def reference_truth(corners, size, side, whole):
    "Inclusive corners of the list scaled to the view; WSOL cuts them with int()."
    scaled = [v * side / n for v, n in zip(corners, (size[1], size[0]) * 2)]
    return [int(v) for v in scaled] if whole else scaled


def reference_iou(a, b):
    "Of inclusive corners."
    w, h = (max(min(a[k + 2], b[k + 2]) - max(a[k], b[k]) + 1, 0) for k in (0, 1)); area = lambda c: (c[2] - c[0] + 1) * (c[3] - c[1] + 1)
    return w * h / (area(a) + area(b) - w * h)


@pytest.mark.parametrize('side', [96, 224])
def test_a_line_of_a_list_reaches_the_verdict_of_the_reference(side):
    "Lists name the last pixel; ours are half-open; the squashed protocols measure inclusive corners once, not twice. Every sum of GT-known and MaxBoxAcc; half-open corners would give other sums."
    n = 24; r = bx.rng('sizes'); sizes = [tuple(int(2 * v + 1) for v in r.integers(24, 70, 2)) for _ in range(n)]; lines = listed_lines(n, sizes)
    corners = [[int(v) for v in line.split(',')[1:]] for line in lines]
    source = Listed(dict(val=part_of([Row(line.split(',')[0], i % 3, half_open([c]), sizes[i]) for i, (line, c) in enumerate(zip(lines, corners))], None)), 3); source.sizes = sizes
    split, cfg, model = Split(source, 'val', source.parts['val'].ids, ('red', 'green', 'blue'), ('image',)), replace(BARE, crop=side, resize=side + 8), Colours()
    wanted = {(name, 'CAM'): cdtr_scores.GRID for name in ('tscam', 'wsol')}; sums, _ = cdtr_scores.count_split(model, split, cfg, 'squash', wanted)
    found, other = ({k: np.zeros(len(cdtr_scores.GRID)) for k in ('tscam', 'wsol', 'v1')} for _ in range(2))
    view = split.view(('image', 'label'), cdtr_scores.eval_transform(cfg, 'squash'))
    for i in range(n):
        own, half = model(view[i]['image'][None]).tokens[0, i % 3].detach(), half_open([corners[i]])[0].astype(float)
        for name, last in dict(tscam=None, wsol=side - 1).items():
            boxes = bx.boxes_at(own, (side, side), cdtr_scores.GRID, name).astype(float); boxes = boxes if last is None else boxes.clip(max=last)
            for sums_, c in ((found, corners[i]), (other, half)):
                hits = np.array([reference_iou(b, reference_truth(c, sizes[i], side, name == 'wsol')) >= .5 for b in boxes.tolist()])
                sums_[name] += hits; sums_['v1'] += hits if name == 'wsol' else 0
    for name in ('tscam', 'wsol'): assert (sums[name, 'CAM']['gt_known'].numpy() == found[name]).all()
    assert (sums['wsol', 'CAM']['largest'][0].numpy() == found['v1']).all() and 0 < found['wsol'].max() < n
    assert any((found[k] != other[k]).any() for k in found)


def test_edges_of_the_truth_stay_edges_for_the_cdtr_protocol():
    "In either view; last pixels need the boxes of the image, which a centre cut does not keep."
    split = half_boxed()['val'].view(('image', 'label', 'boxes')); batch = lambda view: cdtr_scores.each_once(split.view(split.fields, cdtr_scores.eval_transform(BARE, view)), 3, 'cpu', 0)
    squashed, = batch('squash'); cut, = batch('crop')
    assert cdtr_scores.truth_of(squashed, 1)[1].tolist() == bx.squash_boxes([[2, 3, 12, 13]], (20, 30), (64, 64)).tolist()
    assert cdtr_scores.truth_of(cut, 1)[1].tolist() == bx.crop_boxes([[2, 3, 12, 13]], (20, 30), BARE.resize, BARE.crop).tolist()
    with pytest.raises(BadInput, match='squashed view'): cdtr_scores.truth_of(cut, 1, bx.PROTOCOLS['wsol'])


# --- scores ------------------------------------------------------------------------------------------------------------

def test_first_and_first_five_of_seven_classes():
    "The target is first in one image, fifth in one, sixth in one, seventh in one."
    class Ranks(torch.nn.Module):
        def __init__(self): super().__init__(); self.nothing = torch.nn.Parameter(torch.zeros(1))
        def forward(self, image): maps = torch.stack([torch.full((4, 4), float(7 - c)) for c in range(7)])[None].repeat(len(image), 1, 1, 1); return cdtr.Maps(maps[:, 0], maps, maps, None, None)
    rows = [Row(f'{i}.png', kind, None, (20, 30)) for i, kind in enumerate((0, 4, 5, 6))]; source = Drawn(dict(val=part_of(rows, None)), 7)
    split = Split(source, 'val', source.parts['val'].ids, tuple('abcdefg'), ('image',), dataset='drawn', hash='0')
    assert cdtr_scores.count_split(Ranks(), split, BARE, 'crop', {})[1].tolist() == [1, 2]
    values = {r.metric: r.value for r in cdtr_scores.evaluate_protocols(Ranks(), split, BARE, dict(cdtr=bx.PROTOCOLS['cdtr']))['cdtr']}; assert values == {'Cls@1, cdtr': 25, 'Cls@5, cdtr': 50}


def test_each_kind_of_map_written_out():
    attention, tokens, stimulated = torch.rand(2, 4, 4), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4); maps = cdtr.Maps(attention, tokens, stimulated, None, None)
    wanted = dict(CAM=tokens, attention=attention, product=attention[:, None] * tokens, fused=attention[:, None] * (tokens + stimulated))
    assert list(wanted) == list(cdtr_scores.KINDS) and all(torch.equal(cdtr_scores.score_map(maps, k), v) for k, v in wanted.items())
    assert torch.equal(cdtr_scores.score_map(maps._replace(stimulated=None), 'fused'), wanted['product'])


def test_average_precision_of_pixels_of_drawn_images():
    "Under the WSOL protocol alone; against the pool written out; MaxBoxAcc says how many thresholds were tried."
    data, model = embedded('wsol', size=64, train=0, val=3, test=6), cdtr.CDTR(BARE, 8).eval(); found = cdtr_scores.evaluate_protocols(model, data.split('test'), BARE)
    values = {r.metric: r for own in found.values() for r in own}; names = {m for m in values if 'PxAP' in m}; assert names == {f'{k} PxAP, wsol' for k in cdtr_scores.KINDS}
    counts = 0
    for s in data.split('test', ('image', 'label', 'mask'), cdtr_scores.eval_transform(BARE, 'squash')):
        with torch.no_grad(): own = model(s['image'][None]).fused()[0, int(s['label'].argmax())]
        counts = counts + bx.pixel_counts(own, s['mask'] > 0, np.arange(0, 1, .001))
    assert values['fused PxAP, wsol'].value == pytest.approx(100 * bx.pxap(counts), abs=1e-3) and 0 < bx.pxap(counts) < 1
    assert all(f'{len(cdtr_scores.GRID)} tried' in values[f'CAM {m}, wsol'].protocol['threshold'] for m in ('MaxBoxAcc', 'MaxBoxAccV2'))


def test_a_squashed_mask_is_squashed_like_its_image():
    mask = torch.zeros(20, 30, dtype=torch.uint8); mask[:10, :10] = 3; mask[10:, 20:] = 255
    out = cdtr_scores.Square(12, 'view')(dict(image=torch.zeros(3, 20, 30), mask=mask))['mask']
    assert out.shape == (12, 12) and (out[:6, :4] == 3).all() and (out[6:, 8:] == 255).all() and (out > 0).sum() == 48


# --- the picture of a verdict --------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name', bx.PROTOCOLS)
def test_a_picture_shows_what_the_protocol_measures(name, monkeypatch):
    "Region of the chosen contour and IoU at every threshold, as they reach the drawing."
    from wsl_nb import widgets_cdtr
    seen, p, draw, r = [], bx.PROTOCOLS[name], widgets_cdtr.draw_localisation, bx.rng('picture'); monkeypatch.setattr(widgets_cdtr, 'draw_localisation', lambda *a: seen.append(a) or draw(*a))
    maps = dict(CAM=r.random((6, 6)), fused=r.random((6, 6)) ** 2); logits, size, tau = np.eye(3)[1], (60, 60), .3
    row = bx.loc_row(logits, np.stack([maps['fused']] * 3), 1, [[30, 30, 41, 52], [5, 8, 40, 49]], size, tau, p) | dict(target_class='a', predicted_class='a')
    cdtr_own.draw_verdict(row, torch.zeros(3, *size), maps, p); _, shown, _, boxes, truth, taus, at, _ = seen[0]
    for m, drawn, every in zip(maps.values(), shown, boxes):
        assert widgets_cdtr.box_overlap(every, truth) == pytest.approx(bx.protocol_iou(bx.boxes_at(m, size, taus, p), row['truth'], size, p), abs=1e-9)
        region, _ = widgets_cdtr.chosen_region(drawn, size, at, every[taus.index(at)]); outline = bx.polygons_at(m, size, at, p)[0]
        ys, xs = np.nonzero(region); assert (xs.min(), ys.min(), xs.max(), ys.max()) == (*outline.min(0), *outline.max(0)) and region[outline[:, 1], outline[:, 0]].all()
    assert widgets_cdtr.box_overlap(boxes[-1], truth)[taus.index(at)] == pytest.approx(row['iou'])


# --- thresholds of a run -------------------------------------------------------------------------------------------------

def test_thresholds_belong_to_the_best_checkpoint_not_to_the_last(tmp_path, monkeypatch):
    "A run whose score falls: its thresholds are those that the best weights give."
    module, cfg, data = prepare('cdtr', dict(keep_last=9, data_eval=32, steps=6, lr=.009, checkpoint_every=2, evaluate_every=2, eval_split='val', w_sba=0., warmup_epochs=0)); falling = iter((9., 8., 7., 6., 5., 4.)); score = module.evaluate
    monkeypatch.setattr(module, 'evaluate', lambda *a: [replace(r, value=v, values=(v,)) for r, v in zip(score(*a)[:1], falling)])
    module.train(cfg, data, tmp_path/'run'); kept = json.loads((tmp_path/'run'/'taus.json').read_text())
    best, last = (module.load_run(tmp_path/'run', 8, which)[0] for which in ('best', 'last')); first, *_, end = disk.checkpoints(tmp_path/'run')
    assert kept['checkpoint'] == first.name == disk.checkpoint(tmp_path/'run', 'best').name != end.name and best.taus == kept['taus'] and last.taus == {}
    chosen = [cdtr_scores.choose_taus(m, data.split('val'), cfg) for m in (best, last)]; assert kept['taus'] == chosen[0] != chosen[1]
