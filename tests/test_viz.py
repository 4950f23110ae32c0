"Pictures: maps land on their pixels, boxes on their borders, pages hold all they show."
import re

import matplotlib
import numpy as np
import pytest
import torch

from wsl_nb import viz
from wsl_nb.core import BadInput


def bright(picture, bar):
    "Half-open extent (x1, y1, x2, y2) of the pixels whose green channel is above a bar."
    hot = picture[..., 1] > bar
    (y,), (x,) = np.nonzero(hot.any(1)), np.nonzero(hot.any(0))
    return int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1


@pytest.mark.parametrize('size', [(96, 96), (448, 448), (300, 200), (200, 300), (97, 143)])
@pytest.mark.parametrize('grid', [(12, 12), (14, 28), (28, 7)])
def test_a_planted_box_lands_on_its_pixels(size, grid):
    (H, W), (h, w) = size, grid
    planted = torch.zeros(h, w); planted[h // 4:h // 2, w // 3:w - 1] = 1
    found = bright(viz.overlay(torch.zeros(3, H, W), planted, alpha=1.), matplotlib.colormaps['viridis'](.5)[1])
    expected = w // 3 * W / w, h // 4 * H / h, (w - 1) * W / w, h // 2 * H / h
    assert np.abs(np.array(found) - expected).max() <= (0 if H % h == W % w == 0 else 1)


def test_the_drawn_figure_shows_it_at_the_same_place():
    "The panel of the figure, rendered at one screen pixel an image pixel, shows the box where the image has it."
    planted = np.zeros((12, 12), np.float32); planted[3:6, 4:11] = 1
    figure = viz.draw_maps(np.zeros((96, 96, 3), np.uint8), [planted], ['map'], width=.96)
    shown = figure.axes[1].images[0].get_array()
    assert bright(np.asarray(shown), .6 * matplotlib.colormaps['viridis'](.5)[1]) == (32, 24, 88, 48)
    assert list(figure.axes[1].images[0].get_extent()) == [-.5, 95.5, 95.5, -.5]


def test_tensors_and_arrays_give_the_same_picture():
    image, map = torch.rand(3, 20, 30), torch.rand(5, 6)
    a, b = viz.overlay(image, map), viz.overlay(image.permute(1, 2, 0).numpy(), map.numpy())
    assert np.array_equal(a, b)
    grey = torch.rand(1, 20, 30)
    assert viz.to_rgb(grey).shape == viz.to_rgb(grey[0]).shape == (20, 30, 3)
    assert viz.to_rgb(image.requires_grad_()).shape == (20, 30, 3)


def test_half_precision_and_constant_maps():
    assert viz.overlay(torch.rand(3, 8, 8), torch.rand(2, 2).bfloat16()).dtype == np.float32
    assert np.isfinite(viz.overlay(torch.rand(3, 8, 8), torch.zeros(2, 2))).all()


def test_same_arguments_same_bytes_and_nothing_left_open():
    import matplotlib.pyplot as plt
    figures = lambda: [viz.draw_maps(np.ones((9, 9, 3)), [np.eye(3)], ['a']), viz.draw_matrix(np.eye(2), ['a', 'b']), viz.draw_bars({'a': [1, 2]}, ['x', 'y']),
                       viz.draw_curves([dict(step=i, total=i) for i in range(5)], ['total'], [('p', 0, 3)]), viz.draw_labels(np.ones((9, 9, 3)), np.eye(9, dtype=np.uint8), ['a'])]
    first, second = [viz.png(f) for f in figures()], [viz.png(f) for f in figures()]
    assert first == second and plt.get_fignums() == []


def test_settings_of_the_caller_stay():
    with matplotlib.rc_context({'font.size': 33}):
        viz.draw_matrix(np.eye(2), ['a', 'b'])
        assert matplotlib.rcParams['font.size'] == 33


def test_box_borders_are_half_open():
    figure = viz.draw_boxes(np.zeros((10, 10, 3)), truth=[[0, 0, 10, 10]], predicted=torch.tensor([[2, 3, 4, 5]]))
    green, orange = figure.axes[0].patches
    assert green.get_bbox().extents.tolist() == [-.5, -.5, 9.5, 9.5] and orange.get_bbox().extents.tolist() == [1.5, 2.5, 3.5, 4.5]
    assert matplotlib.colors.to_hex(green.get_edgecolor()) == viz.TRUTH and matplotlib.colors.to_hex(orange.get_edgecolor()) == viz.PREDICTION


def test_a_class_keeps_its_colour():
    assert np.array_equal(viz.class_colours(80)[:8], viz.class_colours(8))
    mask = np.array([[0, 1], [2, 255]])
    picture = viz.colour_labels(np.zeros((2, 2, 3)), mask, 2, alpha=1.)
    assert np.allclose(picture[0, 1], viz.class_colours(2)[0]) and np.allclose(picture[1, 1], 1) and np.allclose(picture[0, 0], 0)


def test_a_page_asks_for_nothing(tmp_path):
    page = viz.report_html(tmp_path / 'deep' / 'report.html', 'A <title>', [dict(title='T', rows=[{'a': 1.23456, 'b': None}], figures=viz.draw_grid([np.eye(4)]))]).read_text()
    assert not re.search(r'(src|href)="(?!data:)', page) and 'http' not in page and '<title>A &lt;title&gt;' in page and '1.235' in page
    assert 'name="viewport"' in page and [p.name for p in (tmp_path / 'deep').iterdir()] == ['report.html']


def test_wrong_input_says_what_to_do():
    for wrong in (lambda: viz.to_rgb(np.zeros((2, 3, 4, 5))), lambda: viz.overlay(np.zeros((4, 4)), np.zeros((2, 2, 2))),
                  lambda: viz.draw_labels(np.zeros((4, 4)), np.full((4, 4), 7), ['a']), lambda: viz.report_html('x.html', 'x', [dict(picture=1)])):
        with pytest.raises(BadInput, match='cure'): wrong()
