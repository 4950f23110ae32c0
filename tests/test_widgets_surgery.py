"Explorers of surgery: every control changes the picture, what is drawn lies where it belongs, and absent words, wide images and no objects are fine."
import numpy as np
import pytest
import torch

import test_widgets_affinity
from test_widgets_cdtr import lines
from wsl_nb import widgets_surgery
from wsl_nb.core import BadInput
from wsl_nb.metrics import pixel_auc
from wsl_nb.surgery_localisation import decode_cell, match
from wsl_nb.viz import PREDICTION, TRUTH, overlay

SIZE, GRID, WORDS = (48, 80), (6, 10), ['cat', 'bus', 'boat']


def world(words=3):
    "Two wide images, where each word is (the last one nowhere), maps of every word on a 6x10 grid for two treatments."
    random = torch.Generator().manual_seed(0); images = torch.rand(2, 3, *SIZE, generator=random); masks = torch.zeros(2, words, *SIZE, dtype=torch.bool)
    for k in range(words - 1): masks[:, k, 8 + 4 * k:24, 8:40 + 8 * k] = True
    return images, masks, {n: torch.rand(2, words, *GRID, generator=random) for n in ('plain', 'both')}


def scores(maps, masks):
    large = torch.nn.functional.interpolate(maps, SIZE, mode='nearest').numpy()
    return np.array([[pixel_auc(m, t.numpy()) if t.any() else np.nan for m, t in zip(*pair)] for pair in zip(large, masks)])


def attention(blocks=3):
    "Weights of 60 patches to 60 patches for two kinds."
    return {k: torch.rand(blocks, 60, 60, generator=torch.Generator().manual_seed(n)).softmax(-1).unflatten(-1, GRID) for n, k in enumerate(('q-k', 'v-v'))}


def words():
    images, masks, maps = world(); return widgets_surgery.words_explorer(images, maps, WORDS, masks, {n: scores(m, masks) for n, m in maps.items()})


def rows():
    images, masks, _ = world(); return widgets_surgery.rows_explorer(images[0], attention(), ['block 3', 'block 4', 'block 5'], masks[0, 0])


def sums():
    images, masks, maps = world(); steps = torch.stack([*maps.values(), sum(maps.values())])
    return widgets_surgery.sum_explorer(images, steps, WORDS, None, masks, np.stack([scores(m, masks) for m in steps]), [.5, .6, .7])


TRUE = [torch.tensor([[8., 8., 40., 32.], [4., 4., 14., 14.], [60., 30., 76., 46.]]), torch.tensor([[30., 10., 70., 44.]])]


def matched():
    "Every matching at every radius, one class an object."
    scale = torch.tensor([*SIZE[::-1]] * 2).float(); made = {}
    for how in ('cell', 'inside', 'centre'):
        for radius in (0., 1., 2.):
            made[how, radius] = []
            for n, boxes in enumerate(TRUE):
                pred = decode_cell(torch.randn(len(boxes), *GRID, 4, generator=torch.Generator().manual_seed(n))); found = match(pred, boxes / scale, torch.arange(len(boxes)), how, radius, .2)
                made[how, radius].append(dict(grid=GRID, cells=torch.stack([found.i, found.j], 1), owners=found.box, best=found.best, boxes=pred[torch.arange(len(boxes)), found.best[:, 0], found.best[:, 1]] * scale, left=int(found.unassigned)))
    return made


def heads():
    images, _, _ = world(); return widgets_surgery.head_explorer(images, TRUE, matched())


ALL = pytest.mark.parametrize('make', [words, rows, sums, heads], ids=lambda f: f.__name__)


@ALL
def test_every_control_changes_the_picture_quickly_and_says_so(make):
    explorer = make(); assert 'role="status"' in explorer.readout.value and all(len(box.options) > 1 for box in explorer.controls.values())
    test_widgets_affinity.test_controls_change_the_picture_which_keeps_its_size(lambda: explorer); test_widgets_affinity.test_a_move_is_quick_and_leaves_no_figure(lambda: explorer)


def test_scores_belong_to_their_maps_and_turn_with_them():
    explorer = words(); _, masks, maps = world(); table = {n: scores(m, masks) for n, m in maps.items()}
    for image in (0, 1):
        for word in (0, 1, 2):
            for inverted in (False, True):
                for name, value in dict(image=image, word=word, inverted=inverted).items(): explorer.controls[name].value = value
                for name, s in table.items():
                    said = f'{name} AUC {1 - s[image, word] if inverted else s[image, word]:.2f}'; assert (said + (', inverted' if inverted else '') in explorer.readout.value) == (word < 2)
    assert 'AUC' not in explorer.readout.value # the last word is nowhere
    m, t = maps['plain'][0, 0].repeat_interleave(8, 0).repeat_interleave(8, 1).numpy(), masks[0, 0].numpy(); assert pixel_auc(-m, t) == pytest.approx(1 - pixel_auc(m, t))


def test_an_inverted_map_is_the_map_of_its_negative():
    images, masks, maps = world(); draw = lambda map, inverted: widgets_surgery.draw_words(images[0], {'plain': map}, 'cat', masks[0, 0], inverted=inverted).axes
    plain, negative = draw(maps['plain'][0, 0], True), draw(-maps['plain'][0, 0], False); assert np.allclose(plain[1].images[0].get_array(), negative[1].images[0].get_array(), atol=1e-6)
    assert [[t.get_text() for t in a[-1].get_yticklabels()] for a in (plain, negative)] == [['highest', 'lowest'], ['lowest', 'highest']]
    assert len(plain[1].collections) == 1 and not draw(maps['plain'][0, 0], False)[1].get_title().count('AUC') # no score was given
    for odd in (torch.ones(GRID), torch.full(GRID, torch.nan)): assert np.allclose(draw(odd, False)[1].images[0].get_array(), overlay(images[0], np.zeros(GRID)), atol=1e-6) # nothing to stretch
    with pytest.raises(BadInput, match='name maps and scores alike'): widgets_surgery.draw_words(images[0], {'plain': maps['plain'][0, 0]}, 'cat', scores={'both': .5})


def test_a_patch_looks_where_its_row_says():
    "One patch gives all its weight to another one: only that one is bright, in its kind and block."
    images, masks, _ = world(); weights = {k: torch.full((3, 60, *GRID), 1e-9) for k in ('q-k', 'v-v')}; weights['v-v'][1, 2 * 10 + 7, 4, 3] = 1
    figure = widgets_surgery.draw_rows(images[0], weights, 2, 7, ['a', 'b', 'c'], masks[0, 0]); whole = np.asarray(figure.axes[0].images[0].get_array()); assert whole.shape == (48 * 2 + 3, 80 * 4 + 9, 3)
    part = lambda y, x: whole[y * 51:y * 51 + 48, x * 83:x * 83 + 80]; bright = np.zeros(GRID); bright[4, 3] = 1
    assert np.allclose(part(1, 2), overlay(images[0], bright), atol=.01) and np.allclose(part(0, 0), images[0].permute(1, 2, 0), atol=.01) and (part(1, 0) == 1).all()
    dots = figure.axes[0].lines[0].get_xydata(); assert dots.tolist() == [[83 * x + 7.5 * 8 - .5, 51 * y + 2.5 * 8 - .5] for y, x in ((0, 0), *((y, x) for y in (0, 1) for x in (1, 2, 3)))]
    itself, on = figure.axes[1:]; assert np.allclose(itself.lines[1].get_ydata(), 1e-9) and np.allclose(on.lines[1].get_ydata(), [0, float(masks[0, 0, 32:40, 24:32].float().mean()), 0], atol=1e-6)
    assert np.allclose(widgets_surgery.patch_shares(masks[0, 0], GRID), torch.nn.functional.avg_pool2d(masks[0, 0][None].float(), 8)[0])


def test_rows_without_mask_of_one_block_and_large_pictures():
    images, _, _ = world(); one = widgets_surgery.draw_rows(images[0], attention(1), 0, 0); assert len(one.axes) == 2 and [t.get_text() for t in one.axes[0].texts] == ['1', 'q-k', 'v-v']
    large = widgets_surgery.draw_rows(torch.rand(3, 480, 800), {'v-v': attention()['v-v']}, 5, 9, mask=torch.ones(480, 800)); assert large.axes[0].images[0].get_array().shape == (77, 4 * 128 + 9, 3)
    assert np.allclose(large.axes[0].lines[0].get_xydata()[0], [9.5 * 12.8 - .5, 5.5 * 77 / 6 - .5]) and np.allclose(large.axes[2].lines[0].get_ydata(), 1)
    with pytest.raises(BadInput, match='columns 0 to 9'): widgets_surgery.draw_rows(images[0], attention(), 0, 10)
    with pytest.raises(BadInput, match='a name for each block'): widgets_surgery.draw_rows(images[0], attention(), 0, 0, ['a'])


def test_the_sum_marks_its_block():
    images, masks, maps = world(); steps = torch.stack([m[0, 0] for m in maps.values()]); draw = lambda **v: widgets_surgery.draw_sum(images[0], steps, 1, 'cat', **v).axes
    image, large, curve, below = draw(mask=masks[0, 0], scores=[.25, .75], average=[.4, .6]); assert large.get_title() == 'sum up to 2\nAUC 0.75' and curve.get_title() == 'AUC: 0.75'
    assert np.allclose(large.images[0].get_array(), overlay(images[0], widgets_surgery.stretch(steps[1])), atol=1e-6) and below.patches[0].get_x() == 10.5
    assert [line.get_ydata().tolist() for line in curve.lines[1:3]] == [[.4, .6], [.25, .75]] and curve.get_ylim() == (-.03, 1.03)
    assert draw()[2].get_title().startswith('no AUC') and draw(scores=[np.nan, .5])[2].get_title().startswith('no AUC')
    with pytest.raises(BadInput, match='a name for each'): draw(blocks=['only one'])


def test_cells_have_the_colour_of_their_object_and_counts_are_those_of_the_matching():
    images, _, _ = world(); made = matched(); assert any(found['left'] for each in made.values() for found in each)
    for (how, radius), each in made.items():
        for image, boxes, found in zip(images, TRUE, each):
            cells, best, bars = widgets_surgery.draw_matching(image, boxes, found, how).axes; filled = [p for p in cells.patches if p.get_fill()]; colours = widgets_surgery.class_colours(len(boxes))
            assert [(round((p.get_y() + .5) / 8), round((p.get_x() + .5) / 8)) for p in filled] == [tuple(c) for c in found['cells'].tolist()] and all(np.allclose(p.get_facecolor()[:3], colours[o]) for p, o in zip(filled, found['owners'].tolist()))
            assert cells.get_title() == f'{how}\n{found["left"]} of {len(boxes)} objects left out' and lines(cells, TRUTH) == boxes.tolist() and np.allclose(lines(best, PREDICTION), found['boxes'], atol=2e-3)
            counts = torch.bincount(found['owners'], minlength=len(boxes))[(boxes[:, 2:] - boxes[:, :2]).prod(1).argsort()]; assert [p.get_width() for p in bars.patches] == counts.tolist() and sum('left out' in t.get_text() for t in bars.texts) == found['left']


def test_a_scene_without_objects_and_what_does_not_belong_together():
    images, _, _ = world(); nothing = dict(grid=GRID, cells=torch.zeros(0, 2), owners=torch.zeros(0), best=torch.zeros(0, 2), boxes=torch.zeros(0, 4))
    axes = widgets_surgery.draw_matching(images[0], torch.zeros(0, 4), nothing).axes; assert axes[0].get_title() == '0 of 0 objects left out' and axes[1].get_title() == 'no object'
    with pytest.raises(BadInput, match='owner of 0 to 0'): widgets_surgery.draw_matching(images[0], TRUE[1], matched()['centre', 1.][0])
    made = matched(); del made['inside', 2.]
    with pytest.raises(BadInput, match='inside'): widgets_surgery.head_explorer(images, TRUE, made)
    with pytest.raises(BadInput, match='not 1 images'): widgets_surgery.head_explorer(images[:1], TRUE[:1], matched())
