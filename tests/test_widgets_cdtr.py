"Explorers of localisation: every control changes the picture, what is drawn lies where it belongs, and one class, wide images and missing boxes are fine."
import numpy as np
import pytest
import torch

import test_widgets_affinity
from wsl_nb import widgets, widgets_cdtr
from wsl_nb.boxes import boxes_at, enlarge, polygons_at
from wsl_nb.core import BadInput
from wsl_nb.viz import PREDICTION, TRUTH

SIZE, GRID, TAUS = (48, 80), (6, 10), [0., .2, .5, .8]
CLASSES = ['cat', 'bus', 'boat']


def world(classes=3):
    "Two wide images, smooth maps of every class on a 6x10 grid, true boxes."
    random = torch.Generator().manual_seed(0); images = torch.rand(2, 3, *SIZE, generator=random)
    maps = torch.nn.functional.interpolate(torch.rand(2, classes, 3, 5, generator=random), size=GRID, mode='bilinear')
    return images, maps, [torch.tensor([[8., 8., 40., 32.]]), torch.tensor([[30., 10., 70., 44.], [4., 4., 20., 20.]])]


def all_boxes(maps): return np.stack([boxes_at(m, SIZE, TAUS) for m in maps]) if maps.ndim == 3 else boxes_at(maps, SIZE, TAUS)


def localisation(classes=3):
    images, maps, truth = world(classes); named = {'attention': maps.mean(1), 'product': maps}
    return widgets_cdtr.localisation_explorer(images, named, {n: [all_boxes(m) for m in ms] for n, ms in named.items()}, truth, TAUS, CLASSES[:classes], [0, classes - 1], [classes - 1, 0], [torch.tensor([0]), torch.tensor([classes - 1, 0])], dict(threshold=.5))


def attention():
    images, _, truth = world(); rows = torch.rand(2, 4, 3, *GRID, generator=torch.Generator().manual_seed(1)); boxes = torch.full((2, 4, 4, 4), torch.nan)
    for b, i, j in np.ndindex(2, 4, 4): boxes[b, i, j] = torch.tensor([i, j, 30. + 9 * j, 20. + 5 * i + b]) if i <= j else torch.nan
    return widgets_cdtr.attention_explorer(images, rows, boxes, truth, 3)


def composites():
    images, maps, _ = world(); similarities = {k: torch.rand(2, 2, generator=torch.Generator().manual_seed(n)) for n, k in enumerate(('label', 'position', 'generic'))}
    return widgets_cdtr.composites_explorer(images, images - .5, .5 - images, similarities, {k: [f'a {k} {i}' for i in range(2)] for k in similarities}, maps[:, 0])


def protocols(known=True):
    images, maps, truth = world(); views = {}
    for n, name in enumerate(('crop', 'squash')):
        boxes = np.stack([all_boxes(m[n]) for m in maps]); hits = torch.rand(3, 2, len(TAUS), generator=torch.Generator().manual_seed(n)) > .5
        views[name] = dict(images=[i[:, :, :48 + 8 * n] for i in images], truth=truth, boxes=boxes, hits=dict(zip(('Top-1 Loc', 'GT-known', 'Cls@1')[n:], hits))) | (dict(known=boxes[::-1], ious=np.full((2, 4), .123)) if known and n else {})
    return widgets_cdtr.protocols_explorer(views, TAUS, ['cat for cat', 'bus for boat'])


def offsets():
    images, _, truth = world(); random = torch.Generator().manual_seed(2)
    return widgets_cdtr.offsets_explorer(images[0], {n: torch.randn(18, *GRID, generator=random) * s for n, s in {'start': .02, 'end': 1.5}.items()}, truth[0])


ALL = pytest.mark.parametrize('make', [localisation, attention, composites, protocols, offsets], ids=lambda f: f.__name__)


@ALL
def test_controls_change_the_picture_which_keeps_its_size(make):
    explorer = make(); assert 'role="status"' in explorer.readout.value and all(len(box.options) > 1 for box in explorer.controls.values())
    test_widgets_affinity.test_controls_change_the_picture_which_keeps_its_size(lambda: explorer)


@ALL
def test_a_move_is_quick_and_leaves_no_figure(make): test_widgets_affinity.test_a_move_is_quick_and_leaves_no_figure(make)


def lines(ax, colour):
    "Boxes of a colour on the axes, as xyxy."
    from matplotlib.colors import to_rgba
    return [(np.array(p.get_bbox().extents) + .5).round(3).tolist() for p in ax.patches if p.get_edgecolor() == to_rgba(colour)]


@pytest.mark.parametrize('shape, size', [((6, 10), (48, 80)), ((14, 14), (224, 224)), ((7, 5), (70, 50)), ((1, 1), (8, 9))], ids=str)
def test_the_chosen_region_is_the_one_that_the_box_surrounds(shape, size):
    "Against the contours of OpenCV, for maps with several regions; the resizing may differ by rounding in a few pixels."
    for seed in range(20):
        map = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        for tau, box in zip(TAUS[1:], boxes_at(map, size, TAUS[1:])):
            chosen, others = widgets_cdtr.chosen_region(map, size, tau, box); assert chosen.shape == size and not (chosen & others).any()
            if map.numel() == 1: assert not chosen.any() and not others.any(); continue # a constant map has no contour
            y, x = chosen.nonzero(); assert np.abs(np.array([x.min(), y.min(), x.max() + 1, y.max() + 1]) - box).max() <= 1
            grey = (enlarge(map, size) * 255).astype(np.uint8); assert ((grey > int(tau * grey.max())) != (chosen | others)).mean() < .005
            corners = polygons_at(map, size, tau)[0]; assert chosen[corners[:, 1], corners[:, 0]].mean() > .9


def test_boxes_and_overlaps_lie_where_they_belong():
    images, maps, truth = world(); every = np.stack([all_boxes(maps[1, k]) for k in (0, 2)])
    axes = widgets_cdtr.draw_localisation(images[1], maps[1, [0, 2]], ['a', 'b'], every, truth[1], TAUS, .5, 'image 1\nboat').axes
    assert [lines(a, TRUTH) for a in axes[:3]] == [truth[1].tolist()] * 3 and axes[0].get_title() == 'image 1\nboat'
    assert [lines(a, PREDICTION) for a in axes[:3]] == [[], [every[0][2].tolist()], [every[1][2].tolist()]]
    wanted = [widgets_cdtr.box_overlap(b, truth[1]) for b in every]
    for ax, name, w in zip(axes[1:3], 'ab', wanted): assert ax.get_title() == f'{name}\nIoU {w[2]:.2f}'
    assert [np.allclose(line.get_ydata(), w) for line, w in zip(axes[3].lines, wanted)] == [True, True] and axes[3].lines[-1].get_xydata().tolist() == [[.5, wanted[1][2]]]


def test_no_box_no_truth_no_contour():
    images, maps, truth = world(); draw = lambda map, boxes, truth: widgets_cdtr.draw_localisation(images[0], [map], ['product'], boxes, truth, TAUS, .2).axes
    nothing = draw(torch.ones(GRID), all_boxes(torch.ones(GRID))[None], truth[0]); assert nothing[1].get_title() == 'product\nIoU 0.00' and not nothing[1].collections
    missing = draw(maps[0, 0], np.full((1, 4, 4), np.nan), truth[0]); assert missing[1].get_title() == 'product\nno box' and lines(missing[1], PREDICTION) == []
    bare = draw(maps[0, 0], all_boxes(maps[0, 0])[None], torch.zeros(0, 4)); assert bare[1].get_title() == 'product\n' and lines(bare[0], TRUTH) == [] and len(lines(bare[1], PREDICTION)) == 1
    assert draw(torch.full(GRID, torch.nan), np.full((1, 4, 4), np.nan), truth[0])[1].get_title() == 'product\nno box'


def test_one_class_and_the_class_selector():
    one = localisation(1); assert one.controls['class']._options_labels == ('truth', 'predicted', 'cat')
    explorer = localisation(); texts = {}
    for index, name in enumerate(explorer.controls['class']._options_labels): explorer.controls['class'].index = index; texts[name] = explorer.readout.value
    assert 'truth: cat' in texts['truth'] and 'predicted: boat' in texts['predicted'] and 'image 0 bus' in texts['bus']
    score = lambda text: text.split('product IoU ')[1][:4]
    assert score(texts['truth']) == score(texts['cat']) and score(texts['predicted']) == score(texts['boat'])


def test_a_present_class_is_scored_with_its_own_boxes():
    explorer = localisation(); images, maps, truth = world(); explorer.controls['image'].value = 1; explorer.controls['class'].value = 0; own = all_boxes(maps[1, 0])[2:3]
    said = lambda t: f'product IoU {widgets_cdtr.box_overlap(own, t)[0]:.2f}'; assert said(truth[1][1:]) != said(truth[1][:1]) and said(truth[1][1:]) in explorer.readout.value
    explorer.controls['class'].value = 1; own = all_boxes(maps[1, 1])[2:3]; assert said(truth[1]) in explorer.readout.value # absent: any box


def test_the_grid_marks_the_blocks_and_takes_their_mean():
    images, _, truth = world(); rows = torch.zeros(4, 2, *GRID); rows[1, :, 2, 3] = 1; rows[3, :, 0, 9] = 1
    draw = lambda first, last, **v: widgets_cdtr.draw_attention_grid(images[0], rows, first, last, **v)
    figure = draw(1, 2, constraint=2, truth=truth[0], boxes=torch.full((4, 4, 4), 3.)); grid, mean = figure.axes
    assert [line.get_xdata().tolist() for line in grid.lines] == [[10.5, 31.5], [-.5, 20.5]] and [p.get_x() for p in grid.patches] == [-.5, 32.5]
    bright = np.argwhere(np.abs(mean.images[-1].get_array() - np.array([.993, .906, .144])).sum(-1) < .9); assert len(bright) and (bright.min(0) >= (16, 24)).all() and (bright.max(0) < (24, 32)).all()
    assert mean.get_title() == 'mean of blocks 1 to 2\nIoU 0.00' and draw(3, 3).axes[1].get_title() == 'block 3' and draw(3, 1).axes[1].get_title() == 'no mean'
    assert grid.images[0].get_array().mask.sum() == 4 * 10 + 13 * 43 - 13 * 40 # the gaps, and nothing else
    with pytest.raises(BadInput, match='0 to 3'): draw(0, 4)
    assert widgets_cdtr.draw_attention_grid(images[0], torch.rand(1, 1, *GRID), 0, 0).axes[1].get_title() == 'block 0'


def test_zero_is_the_mean_grey_and_the_chosen_prompt_is_marked():
    images, _, _ = world(); draw = lambda prompt: widgets_cdtr.draw_composites(images[0], torch.zeros(3, *SIZE), torch.ones(3, *SIZE), {'a': [.3, .1], 'b': [-.2, .1]}, {'a': 'one', 'b': 'two'}, prompt).axes
    axes = draw('b'); assert np.allclose(axes[1].images[0].get_array(), [.485, .456, .406]) and np.allclose(axes[2].images[0].get_array(), [.714, .68, .631])
    assert [t.get_text() for t in axes[3].texts] == ['a: one', '0.75', 'b: two', '0.00'] and [t.get_weight() for t in axes[3].texts] == ['normal'] * 2 + ['bold'] * 2
    assert 'loss 0.288' in draw('a')[3].get_title(loc='left') and [p.get_width() for p in axes[3].patches] == pytest.approx([.3, .1, -.2, .1])
    with pytest.raises(BadInput, match='one of them chosen'): draw('c')


def test_the_table_counts_what_the_protocol_has():
    explorer = protocols(); explorer.controls['threshold'].value = .5; text = explorer.readout.value; assert 'IoU 0.12' in text and 'image 0: cat for cat' not in text
    verdicts = dict(a={'x': np.array([1, 0, 1]), 'y': np.array([0, 0, 1])}, b={'x': np.array([0, 1, 1])}); figure, (ax,) = widgets.board(1, 1.)
    widgets_cdtr.verdict_table(ax, verdicts, ['x', 'y'], 0); said = [t.get_text() for t in ax.texts]
    assert said == ['a', 'b', 'x', '✓ 66.7 %', '✗ 66.7 %', 'y', '✗ 33.3 %', '–'] and len(ax.patches) == 1
    assert 'crop' in protocols(False).readout.value


def test_arrows_start_at_the_taps_and_end_where_they_look():
    images, _, _ = world(); offsets = torch.zeros(18, *GRID); offsets[2 * 5 + 1] = 2; offsets[2 * 0] = -3 # tap 5 two cells to the right, tap 0 three cells up
    left, right = widgets_cdtr.draw_offsets(images[0], offsets, 1, 4).axes; arrows = left.collections[0]
    assert np.allclose(arrows.XY[5], [5.5 * 8 - .5, 1.5 * 8 - .5]) and np.allclose([arrows.U[5], arrows.V[5], arrows.U[0], arrows.V[0], arrows.U[3]], [16, 0, 0, -24, 0])
    assert 'cell 1, 4' in left.get_title() and f'{5 / 9:.2g} cells' in left.get_title() and '1 outside' in left.get_title()
    field = right.collections[0]; assert np.allclose(np.hypot(field.U / 8, field.V / 8), 1) and f'{np.hypot(2, 3) / 9:.2g} cells' in right.get_title()
    assert not np.isnan(widgets_cdtr.draw_offsets(images[0], torch.zeros(18, *GRID), 0, 0).axes[1].collections[0].U).any()
    with pytest.raises(BadInput, match='cell 6, 0'): widgets_cdtr.draw_offsets(images[0], offsets, 6, 0)


def test_scales_lines_and_bars():
    log = [dict(step=s, scale=dict(cls=1 + s / 10, csm=1 - s / 100)) for s in range(5)]; weight = widgets_cdtr.draw_scales(log, ['cls', 'csm']).axes[1]
    assert np.allclose(weight.lines[1].get_ydata(), [1 / (2 * (1 + s / 10) ** 2) for s in range(5)]); assert widgets_cdtr.resting_scale(4.55) == pytest.approx(1.74, abs=.005) and widgets_cdtr.resting_scale(1.) == pytest.approx(1.)
    s = torch.tensor(widgets_cdtr.resting_scale(.3), requires_grad=True); (.3 / (2 * s ** 2) + torch.log(1 + s ** 2)).backward(); assert abs(s.grad) < 1e-5
    points = [dict(name=f'p{i}', cls=10. + i, known=5., kind='paper' if i else 'ours') for i in range(20)]; plane, text = widgets_cdtr.draw_loc_lines(points).axes
    assert plane.get_xlim() == (0, 100) and len(text.texts) == 20 and all(np.allclose(np.prod(line.get_xydata(), 1), 1000 * (k + 1)) for k, line in enumerate(plane.lines[:9]))
    assert widgets_cdtr.count_seen([]).shape == (0, 2) and widgets_cdtr.count_seen([torch.tensor([4, 4]), [5], [4]]).tolist() == [[1, 1], [1, 2], [1, 2]]
    with pytest.raises(BadInput, match="csm"): widgets_cdtr.draw_scales(log[:0] + [dict(step=0, scale=dict(cls=1.))], ['cls', 'csm'])
