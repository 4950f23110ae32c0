"The localisation head: boxes against torchvision, decoding, matching and losses against plain loops, what learns and what does not, heads, views."
import math
from dataclasses import replace

import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou

from training_child import SURGERY_TINY, prepare
from wsl_nb import surgery_recipe as recipe
from wsl_nb.core import BadInput, seed_everything, torch_rng
from wsl_nb.surgery_base import LAPTOP, LAPTOP_EARLIER, BoxView, turned, turned_boxes
from wsl_nb.surgery_localisation import (CellHead, GridHead, box_losses, cell_centres, home_cells, decode_cell, decode_grid, head_of, match, pair_giou, pair_iou, size_prior, standardise, windows)

HOW = dict(centre=('centre', 1.), inside=('inside', 1.), wide=('centre', 2.), cell=('cell', 1.5)) # Name -> matching and radius


def noise(*shape, key=0): return torch.randn(*shape, generator=torch_rng('localisation', key))


def boxes_of(n, key=0, least=.02, most=.5):
    "Random boxes inside the picture."
    r = torch.rand(n, 4, generator=torch_rng('boxes', key)); sides = least + (most - least) * r[:, 2:]; low = r[:, :2] * (1 - sides); return torch.cat([low, low + sides], 1)


# --- overlaps ------------------------------------------------------------------------------------------------------

def test_overlaps_are_those_of_torchvision():
    a, b = boxes_of(300, 1), boxes_of(300, 2)
    assert torch.allclose(pair_iou(a, b), box_iou(a, b).diagonal(), atol=1e-6) and torch.allclose(pair_giou(a, b), generalized_box_iou(a, b).diagonal(), atol=1e-6)


@pytest.mark.parametrize('box', [(.5, .5, .5, .5), (.6, .6, .4, .4), (.2, .3, .2, .7), (.1, .1, .1 + 1e-5, .1 + 1e-5)], ids=str)
def test_degenerate_boxes_have_finite_overlaps_and_slopes(box):
    "torchvision gives NaN for two points; here 0, and a gradient without NaN."
    p = torch.tensor([box], requires_grad=True); q = torch.tensor([box]); value = pair_giou(p, q); value.sum().backward(); assert value.isfinite().all() and p.grad.isfinite().all() and (pair_iou(p, q) <= 1).all()
    if box[0] >= box[2] or box[1] >= box[3]: assert pair_iou(p, q) == 0


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16], ids=str)
def test_small_boxes_survive_half_precision(dtype):
    "Areas of a pixel are below what float16 holds; boxes are measured in float32, under autocast too."
    a = torch.tensor([[.25, .25, .25 + 6 / 800, .25 + 6 / 800]])
    with torch.autocast('cpu', torch.bfloat16): found = pair_iou(a.to(dtype), a.to(dtype))
    assert found.dtype == torch.float32 and found.isfinite().all()


# --- decoding ------------------------------------------------------------------------------------------------------

def test_boxes_start_at_their_cell_with_the_prior_size_and_stay_in_reach():
    prior, start = torch.tensor([[.1, .3]]), decode_grid(torch.zeros(1, 5, 7, 4), torch.tensor([[.1, .3]])); at = cell_centres((5, 7))
    assert torch.allclose((start[0, ..., :2] + start[0, ..., 2:]) / 2, at, atol=1e-6) and torch.allclose(start[..., 2:] - start[..., :2], prior.expand(1, 5, 7, 2), atol=1e-6)
    far = decode_grid(noise(1, 5, 7, 4) * 50, prior, 2., 4.); centre, side = (far[..., :2] + far[..., 2:]) / 2 - at, far[..., 2:] - far[..., :2]
    assert (side > 0).all() and (centre.abs() <= 2.001 * torch.tensor([1 / 7, 1 / 5])).all() and (side / prior).log().abs().max() <= 4.001
    assert (cell_centres((5, 7))[2, 3] == torch.tensor([.5, .5])).all()


def test_the_earlier_boxes_reach_half_of_the_picture_from_every_cell():
    "Corner-aligned, half as large as the picture at the start, never under a hundredth, without a slope where clamped."
    start = decode_cell(torch.zeros(1, 7, 7, 4)); assert start[0, 3, 3].tolist() == [.25, .25, .75, .75] and start[0, 0, 0].tolist() == [0, 0, .25, .25] and start[0, 6, 0].tolist() == [0, .75, .25, 1]
    raw = torch.tensor([0., 0, -9, -9]).expand(1, 7, 7, 4).clone().requires_grad_(); small = decode_cell(raw); assert torch.allclose(small[0, 3, 3, 2:] - small[0, 3, 3, :2], torch.full((2,), .01), atol=1e-4); small[..., 2].sum().backward(); assert (raw.grad[..., 2] == 0).all()


# --- matching ------------------------------------------------------------------------------------------------------

def by_hand(pred, boxes, pair, how, radius, least=.3):
    "Positives (object, row, column) by loops over objects and cells."
    (Gh, Gw), chosen = pred.shape[1:3], {}
    score = lambda g, i, j: float((pair_giou if how == 'cell' else pair_iou)(pred[pair[g], i, j][None], boxes[g][None]))
    for g, (x0, y0, x1, y1) in enumerate(boxes.tolist()):
        ci, cj = min(Gh - 1, int((y0 + y1) / 2 * Gh)), min(Gw - 1, int((x0 + x1) / 2 * Gw)); cells = [(i, j) for i in range(Gh) for j in range(Gw)]
        if how == 'cell':
            best = max(cells, key=lambda c: score(g, *c))
            inside = lambda at, c: int(at - radius) <= c <= int(at + radius)
            chosen[g] = [c for c in cells if inside(best[0], c[0]) and inside(best[1], c[1])] if score(g, *best) >= least else []
        else:
            chosen[g] = [(i, j) for i, j in cells if abs(i - ci) <= int(radius) and abs(j - cj) <= int(radius)]
            if how == 'inside': chosen[g] = [(i, j) for i, j in chosen[g] if (i, j) == (ci, cj) or (x0 <= (j + .5) / Gw < x1 and y0 <= (i + .5) / Gh < y1)]
    if how == 'cell': return [(g, *c) for g in chosen for c in sorted(chosen[g])]
    area, owner = [(b[2] - b[0]) * (b[3] - b[1]) for b in boxes.tolist()], {}
    for g in sorted(chosen, key=lambda g: (area[g], g)):
        for c in chosen[g]: owner.setdefault((int(pair[g]), *c), g)
    return sorted((g, *c[1:]) for c, g in owner.items())


@pytest.mark.parametrize('name', HOW)
@pytest.mark.parametrize('grid', [(6, 6), (4, 9), (1, 1)], ids=str)
@pytest.mark.parametrize('key', range(3))
def test_matching_is_that_of_plain_loops(name, grid, key):
    "Which object learns at which cell of which pair, crowded pairs included; who is left out is counted."
    how, radius = HOW[name]; boxes, pair = boxes_of(14, key), torch.randint(0, 4, (14,), generator=torch_rng('pair', key)); start = decode_grid(noise(4, *grid, 4, key=key) * .5, torch.tensor([.2, .2]))
    found = match(start, boxes, pair, how, radius, .3); want = by_hand(start, boxes, pair, how, radius); assert list(zip(found.box.tolist(), found.i.tolist(), found.j.tolist())) == want
    assert int(found.unassigned) == 14 - len({w[0] for w in want}) and found.best.shape == (14, 2) and torch.allclose(found.best_iou, pair_iou(start[pair, found.best[:, 0], found.best[:, 1]], boxes))


def test_every_object_learns_from_the_first_update():
    "Of the drawn scenes, in their true pairs: all with cells around the centre, but for objects that lie on one another; far fewer with those of the earlier experiment."
    _, cfg, data = prepare('surgery', dict(data_train=60)); boxes, labels = recipe.every_box(data.split('train')); seen, shares = data.split('train', ('image', 'boxes'), BoxView(96, (0,) * 3, (1,) * 3)), {}
    for name, own in dict(grid=LAPTOP, earlier=LAPTOP_EARLIER).items():
        left = 0
        for i in range(60):
            s = seen[i]; truth = recipe.truth_of(dict(image=s['image'][None], boxes=[s['boxes']], box_labels=[s['box_labels']])); P = len(truth.pairs)
            start = decode_grid(torch.zeros(P, own.grid, own.grid, 4), recipe.known_sizes(data.split('train'), 8, 'class')[truth.pairs[:, 1]]) if name == 'grid' else decode_cell(noise(P, 7, 7, 4, key=i) * .5)
            left += int(match(start, truth.boxes, truth.pair, own.matching, own.radius, own.match_iou).unassigned)
        shares[name] = left / len(boxes)
    assert shares['grid'] == 0 and shares['earlier'] > .1, shares


def test_windows_of_a_whole_radius_are_symmetric_and_those_of_one_and_a_half_are_not():
    found = windows(torch.tensor([[3, 3]]), (7, 7), 1.)[0]; assert found.nonzero().tolist() == [[i, j] for i in (2, 3, 4) for j in (2, 3, 4)]
    odd = windows(torch.tensor([[3, 3]]), (7, 7), 1.5)[0]; assert odd.any(1).nonzero().flatten().tolist() == [1, 2, 3, 4]; assert home_cells(torch.tensor([[.9, .9, 1, 1.]]), (7, 7)).tolist() == [[6, 6]]


# --- losses --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('reduction', ['object', 'cell'])
@pytest.mark.parametrize('l1', ['plain', 'relative'])
def test_losses_are_those_of_plain_loops(reduction, l1):
    boxes, pair, pred = boxes_of(6), torch.tensor([0, 0, 1, 2, 2, 2]), decode_grid(noise(3, 8, 8, 4), torch.tensor([.2, .2])); found = match(pred, boxes, pair); terms = box_losses(pred, boxes, pair, found, reduction, l1); rows = {}
    for g, i, j in zip(found.box.tolist(), found.i.tolist(), found.j.tolist()):
        p, b = pred[pair[g], i, j], boxes[g]; scale = torch.stack([b[2] - b[0], b[3] - b[1]]).repeat(2) if l1 == 'relative' else 1
        rows.setdefault(g, []).append((float(((p - b).abs() / scale).mean()), 1 - float(generalized_box_iou(p[None], b[None]))))
    flat = [r for rs in rows.values() for r in rs]; mean = lambda k: sum(r[k] for r in flat) / len(flat) if reduction == 'cell' else sum(sum(r[k] for r in rs) / len(rs) for rs in rows.values()) / len(rows)
    assert float(terms['l1']) == pytest.approx(mean(0), rel=1e-5) and float(terms['giou']) == pytest.approx(mean(1), rel=1e-5)


def test_a_batch_without_objects_keeps_the_graph():
    "Zero with a gradient of zero for every weight, so that several processes and a loss scale go on."
    seed_everything(0); head = head_of(SURGERY_TINY, 8, 192); pred = decode_grid(head(noise(2, 3, 96, 96), noise(2, 192, 12, 12), noise(2, 8, 12, 12), torch.zeros(0, 2).long()), torch.zeros(0, 2)); assert pred.shape == (0, 24, 24, 4)
    none = torch.zeros(0, 4), torch.zeros(0).long(); terms = box_losses(pred, *none, match(pred, *none)); sum(terms.values()).backward()
    assert all(float(v.detach()) == 0 for v in terms.values()) and all(p.grad is not None and (p.grad == 0).all() for p in head.parameters())


def test_the_choice_of_cells_gets_no_gradient_and_other_cells_none_either():
    raw = noise(2, 6, 6, 4).requires_grad_(); pred = decode_grid(raw, torch.tensor([.2, .2])); boxes, pair = boxes_of(2), torch.tensor([0, 1]); found = match(pred.detach(), boxes, pair); box_losses(pred, boxes, pair, found)['giou'].backward()
    touched = torch.zeros(2, 6, 6, dtype=torch.bool); touched[pair[found.box], found.i, found.j] = True; assert torch.equal(raw.grad.abs().sum(-1) > 0, touched)


# --- heads ---------------------------------------------------------------------------------------------------------

def test_weights_are_shared_by_all_classes():
    "The answer for a class follows its map, not its number; the earlier head's follows the number."
    seed_everything(0); images, tokens, maps = noise(1, 3, 96, 96), noise(1, 192, 12, 12), standardise(noise(1, 8, 12, 12)); swapped = maps[:, [1, 0, *range(2, 8)]]; a, b = torch.tensor([[0, 0]]), torch.tensor([[0, 1]])
    grid = GridHead(192, 96, 24, 16).eval(); torch.nn.init.normal_(grid.boxes.weight); assert torch.allclose(grid(images, tokens, maps, a), grid(images, tokens, swapped, b), atol=1e-5) and not torch.allclose(grid(images, tokens, maps, a), grid(images, tokens, maps, b), atol=1e-3)
    cell = CellHead(192, 8, 7, 32).eval(); assert not torch.allclose(cell(images, tokens, maps, a), cell(images, tokens, swapped, b), atol=1e-3)


def test_the_size_of_the_earlier_head():
    "Section 3.9 of the specification: 6,322,916 weights in 40 tensors with its confidence convolution (256 channels to 20 classes), which nothing reads."
    head = CellHead(3 * 768, 20, 7, 256); count = sum(p.numel() for p in head.parameters()); assert (6322916 - count, 40 - len(list(head.parameters()))) == (20 * 257, 2)


def test_only_the_channel_of_the_given_class_learns():
    "With ten learnt classes of twenty, the filters of the others never move in the earlier head."
    seed_everything(0); head = CellHead(12, 6, 7, 32); raw = head(noise(2, 3, 32, 32), noise(2, 12, 4, 4), noise(2, 6, 4, 4), torch.tensor([[0, 1], [1, 4]])); raw.square().sum().backward()
    moved = (head.boxes.weight.grad.flatten(1).abs().sum(1) > 0).view(6, 4).any(1); assert moved.tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize('side, grid, says', [(96, 25, 'power of two'), (96, 96, 'power of two'), (448, 64, 'power of two')])
def test_grids_that_no_stride_gives_are_refused(side, grid, says):
    with pytest.raises(BadInput, match=says): GridHead(12, side, grid)


def test_prior_sizes_are_geometric_means():
    boxes, labels = boxes_of(40), torch.arange(40) % 3; found = size_prior(boxes, labels, 4); sides = boxes[:, 2:] - boxes[:, :2]
    assert torch.allclose(found[1], sides[labels == 1].log().mean(0).exp(), atol=1e-6) and torch.allclose(found[3], sides.log().mean(0).exp(), atol=1e-6) and torch.equal(size_prior(boxes, labels, 4, 'all').unique(dim=0)[0], found[3])
    with pytest.raises(BadInput, match='without area'): size_prior(torch.tensor([[.1, .1, .1, .2]]), torch.zeros(1).long(), 1)


def test_standardised_maps_know_no_scale_and_no_offset():
    maps = noise(2, 5, 6, 6); assert torch.allclose(standardise(maps * 7 + 3), standardise(maps), atol=1e-4) and (standardise(maps * 0 + 2) == 0).all() and abs(float(standardise(maps)[1].std(unbiased=False)) - 1) < 1e-4


# --- views ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('view', range(8))
def test_features_of_a_view_are_those_of_the_turned_picture_and_boxes_go_along(view):
    "A picture drawn with one bright box: the box of the view is where it is bright; views of views come back."
    boxes = torch.tensor([[.25, .125, .5, .875]]); picture = torch.zeros(16, 16); picture[2:14, 4:8] = 1; found, at = turned(picture, view).nonzero(), turned_boxes(boxes, view)[0] * 16
    assert [*found.min(0).values.flip(0).tolist(), *(found.max(0).values + 1).flip(0).tolist()] == at.tolist()
    assert math.isclose(float((turned_boxes(boxes, view)[0, 2:] - turned_boxes(boxes, view)[0, :2]).prod()), .25 * .75) and (view < 4 or torch.equal(turned(turned(picture, 4), 4), picture))


def test_clip_is_frozen(tmp_path):
    "Not one number of it moves in training, it gets no gradient, and no checkpoint holds it."
    module, cfg, data = prepare('surgery', dict(steps=4)); clip = recipe.clip_of(cfg); before = {k: v.clone() for k, v in clip.state_dict().items()}; module.train(cfg, data, tmp_path/'run')
    assert all(torch.equal(v, before[k]) for k, v in clip.state_dict().items()) and all(p.grad is None and not p.requires_grad for p in clip.parameters()) and not clip.training
    model, _ = recipe.load_run(tmp_path/'run', 8); assert {k.split('.')[0] for k in model.state_dict()} == {'head', 'texts', 'prior'} and {id(p) for g in recipe.groups(model, cfg) for p in g['params']} == {id(p) for p in model.parameters()}
    assert all(p.ndim > 1 for p in recipe.groups(model, cfg)[0]['params']) and recipe.groups(model, cfg)[1]['weight_decay'] == 0 and replace(cfg, steps=1) != cfg
