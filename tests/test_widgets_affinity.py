"Explorers of affinities: every control changes the picture, errors are seen, and what is drawn lies where it belongs."
import time

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from wsl_nb import widgets, widgets_affinity
from wsl_nb.core import BadInput

GRID, OFFSETS = (6, 9), [(0, 1), (0, 2), (1, -1), (1, 0), (1, 1), (2, 0)]


def world():
    "A picture of 24x36 pixels with a square, its ids, and one number for each cell of a 6x9 grid."
    random = torch.Generator().manual_seed(0); truth = torch.zeros(24, 36, dtype=torch.uint8); truth[8:16, 12:28] = 1
    return torch.rand(3, 24, 36, generator=random), truth, torch.rand(GRID, generator=random)


def affinities():
    "One number for each pair, 100 times the first cell plus the second, and matrices that differ."
    index = torch.arange(54).view(GRID); made = torch.full((len(OFFSETS), *GRID), -1.)
    for k, (dy, dx) in enumerate(OFFSETS):
        for y in range(6 - dy):
            for x in range(max(0, -dx), 9 - max(0, dx)): made[k, y, x] = 100 * index[y, x] + index[y + dy, x + dx]
    return made, {t: torch.rand(54, 54, generator=torch.Generator().manual_seed(t)).softmax(1) for t in (1, 4)}


def confident():
    image, truth, cam = world(); exponents = [1., 4., 16.]; backgrounds = [(1 - cam) ** a for a in exponents]
    labels = [[torch.where(cam > low, 1, torch.where(cam < high, 0, 255)).to(torch.uint8) for high in backgrounds] for low in backgrounds]
    return widgets_affinity.confident_explorer(image, cam, exponents, backgrounds, labels, ['cat'], truth, dict(low=4.))


def affinity():
    image, truth, _ = world(); made, reach = affinities()
    return widgets_affinity.affinity_explorer(image, made.clamp(0) / 6000, OFFSETS, reach, GRID, truth)


def walk():
    image, truth, cam = world(); scores = torch.stack([torch.stack([1 - cam ** (1 + s), cam]) for s in range(4)])
    return widgets_affinity.walk_explorer(image, {1.: scores, 8.: scores.flip(0)}, [0, 1, 4, 256], truth)


ALL = pytest.mark.parametrize('make', [confident, affinity, walk], ids=lambda f: f.__name__)


@ALL
def test_controls_change_the_picture_which_keeps_its_size(make):
    explorer = make(); first = explorer.image.value.tobytes(), explorer.readout.value; sizes = {first[0][16:24]}
    assert first[0][:4] == b'\x89PNG' and all(name in first[1] for name in explorer.controls)
    for box in explorer.controls.values():
        begin, seen = box.index, set()
        for index in range(len(box.options)):
            box.index = index; seen.add(explorer.image.value.tobytes()); sizes.add(explorer.image.value.tobytes()[16:24])
            assert box.label in explorer.readout.value
        assert len(seen) == len(box.options), f'{box.description}: two positions show the same picture'
        box.index = begin
    assert (explorer.image.value.tobytes(), explorer.readout.value) == first and len(sizes) == 1


@ALL
def test_a_move_is_quick_and_leaves_no_figure(make):
    "The goal is 0.3 s of processor time; the bound is wide because machines are busy, and the numbers are printed."
    explorer = make(); clock = time.process_time(); found = widgets.latency(explorer, 20); each = (time.process_time() - clock) / found['moves']
    print(f'{make.__name__}: {each:.3f} s of processor time, median {found["median"]:.3f} s')
    assert found['moves'] > 5 and each < 1 and plt.get_fignums() == []


def test_the_disc_finds_both_ends_of_every_pair():
    made, _ = affinities(); index = np.arange(54).reshape(GRID)
    for cell in ((3, 4), (0, 0), (5, 8), (2, 8)):
        found, wanted = widgets_affinity.disc(made, OFFSETS, GRID, cell), np.full((5, 5), np.nan); wanted[2, 2] = 1
        for dy, dx in OFFSETS:
            for sign in (1, -1):
                y, x = cell[0] + sign * dy, cell[1] + sign * dx
                if 0 <= y < 6 and 0 <= x < 9: wanted[2 + sign * dy, 2 + sign * dx] = 100 * min(index[cell], index[y, x]) + max(index[cell], index[y, x])
        assert np.array_equal(found, wanted, equal_nan=True)


def test_the_cell_and_its_heat_lie_where_the_cell_is():
    image, truth, _ = world(); made, _ = affinities(); reach = torch.zeros(54, 54); reach[2 * 9 + 5, 4 * 9 + 1] = 1
    axes = widgets_affinity.draw_pair_affinities(image, made.clamp(0) / 6000, OFFSETS, {7: reach}, GRID, 2, 5, 7, truth).axes
    assert np.allclose(axes[0].patches[0].get_bbox().extents, [19.7, 7.7, 23.3, 11.3]) and 'cell 2, 5' in axes[0].get_title()
    assert '0% from its own side' in axes[2].get_title() and 't = 7' in axes[2].get_title() and axes[1].get_title().startswith(f'{2 * len(OFFSETS)} affinities')
    bright = np.argwhere(np.abs(axes[2].images[0].get_array() - np.array([.993, .906, .144])).sum(-1) < .8)
    assert len(bright) and (bright.min(0) >= (16, 4)).all() and (bright.max(0) < (20, 8)).all()


def test_the_walk_marks_the_best_length_and_leaves_unknown_pixels_out():
    image, truth, _ = world(); right = torch.stack([1. - truth.float(), truth.float()]); wrong = right.flip(0); unknown = truth.clone(); unknown[:, :18] = 255
    draw = lambda t, truth: widgets_affinity.draw_walk(image, {2.: torch.stack([wrong, right, wrong])}, [0, 8, 256], truth, 2., t)
    chart = draw(0, truth).axes[4]
    assert [(*line.get_xdata(), *line.get_ydata()) for line in chart.lines if line.get_marker() == '^'] == [(1, 1.)] and 'IoU at t = 0: 0' in chart.get_title()
    assert 'IoU 1.00' in draw(8, unknown).axes[3].get_title() and (widgets_affinity.walk_labels(torch.stack([right]), (24, 36))[0] == truth.numpy()).all()
    with pytest.raises(BadInput, match='same lengths'): widgets_affinity.draw_walk(image, {2.: torch.stack([right])}, [0, 8], truth, 2., 0)


def test_cells_alone_are_marked():
    degrees = torch.full((4, 5), 3); degrees[3, 1] = 0
    first, second = widgets_affinity.draw_graph_degree(dict(a=degrees, b=degrees + 1)).axes[:2]
    assert np.allclose(first.patches[0].get_bbox().extents, [.55, 2.55, 1.45, 3.45]) and '1 cells alone' in first.get_title() and not second.patches
