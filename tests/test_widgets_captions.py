"Explorers of captions: every control changes the picture, what is drawn lies where it belongs, and long sentences, large codebooks and ended beams are fine."
import numpy as np
import pytest
import torch

import test_widgets_affinity
from wsl_nb import widgets_captions
from wsl_nb.core import BadInput
from wsl_nb.viz import PREDICTION, TRUTH, class_colours, overlay, pixels, to_grey

SIZE, GRID = (48, 80), (6, 10)
BOOKS = {'large': ['cat', 'bus', 'grass', 'road'], 'things': ['bus', 'cat']}
VOCABULARY, END = ['<unk>', 'a', '<bos>', '<eos>', 'cat', 'bus'], 3
# three beams: 'a cat', then 'cat' and 'a bus'; the word of a beam that waits is 0
STEPS = [([0, 0, 0], [1, 4, 5], [-1., -2., -3.]), ([0, 1, 0], [4, 3, 5], [-1.5, -2.5, -2.8]), ([0, 1, 2], [3, 0, 3], [-1.7, -2.5, -2.9]), ([0, 1, 2], [0, 0, 0], [-1.7, -2.5, -2.9])]


def world():
    "Two wide images, one number in [0,1) for each patch."
    random = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, *SIZE, generator=random), torch.rand(2, *GRID, generator=random)


def tagged():
    "Scores of both codebooks, the best tags, and a truth of cats on grass."
    scores = {k: torch.rand(2, len(n), *GRID, generator=torch.Generator().manual_seed(len(n))) for k, n in BOOKS.items()}; cats = torch.zeros(2, *GRID, dtype=torch.long); cats[:, 2:4, 3:7] = 1
    return {k: s.argmax(1) for k, s in scores.items()}, {'large': torch.where(cats > 0, 0, 2), 'things': torch.where(cats > 0, 1, -1)}, scores


def tags():
    maps, truth, scores = tagged(); return widgets_captions.tags_explorer(world()[0], maps, BOOKS, truth, scores, {'large': {'coherence': .5}})


def sentences():
    "Two sentences of different length with weights of two layers."
    said = [['a', 'cat', '<eos>'], ['a', 'bus', 'on', 'a', 'road', '<eos>']]
    return said, [torch.rand(2, len(s), 60, generator=torch.Generator().manual_seed(len(s))).softmax(-1).unflatten(-1, GRID) for s in said]


def looks():
    said, weights = sentences(); mask = torch.zeros(SIZE); mask[16:32, 24:56] = 1
    return widgets_captions.looks_explorer(world()[0], said, weights, [['a cat', 'the cat'], ['a bus on a road']], [{'probability': torch.rand(len(s), generator=torch.Generator().manual_seed(1))} for s in said], [mask, mask])


def trace():
    "The tree of `STEPS` for the first image, its mirror with other scores for the second."
    return [tuple(torch.tensor([own, own]) + (.01 * torch.arange(2)[:, None] if k == 2 else 0) for k, own in enumerate(s)) for s in STEPS]


def beams(): return widgets_captions.beams_explorer(world()[0], trace(), VOCABULARY, END, dict(step=1))


REWARDS = np.array([[2., 1., 3.], [.5, 0., .25]])


def rewards():
    return widgets_captions.rewards_explorer(world()[0], [['a cat', 'a bus', 'the cat'], ['bus', '', 'a']], REWARDS, -REWARDS, np.stack([REWARDS / 2, REWARDS / 4, REWARDS / 8, REWARDS / 8], 2), np.ones((2, 3)), [['a cat'], ['a bus', 'the bus']], ([100, 200], [.5, 1.5], 'a score'))


ALL = pytest.mark.parametrize('make', [tags, looks, beams, rewards], ids=lambda f: f.__name__)


@ALL
def test_every_control_changes_the_picture_quickly_and_says_so(make):
    explorer = make(); assert 'role="status"' in explorer.readout.value and all(len(box.options) > 1 for box in explorer.controls.values())
    test_widgets_affinity.test_controls_change_the_picture_which_keeps_its_size(lambda: explorer); test_widgets_affinity.test_a_move_is_quick_and_leaves_no_figure(lambda: explorer)


def test_a_patch_has_the_colour_of_its_tag_in_every_codebook():
    images, _ = world(); maps, truth, _ = tagged(); colours = widgets_captions.tag_colours(maps, BOOKS); assert list(colours) == ['cat', 'bus', 'grass', 'road'] and np.allclose(list(colours.values()), class_colours(4))
    for method, names in BOOKS.items():
        shown, grey = widgets_captions.tag_picture(images[0], maps[method][0].numpy(), names, colours), to_grey(images[0])
        for y, x in ((0, 0), (3, 5), (5, 9)): assert np.allclose(shown[8 * y + 3, 8 * x + 3], .4 * grey[8 * y + 3, 8 * x + 3] + .6 * colours[names[maps[method][0, y, x]]])
    blank = widgets_captions.tag_picture(images[0], truth['things'][0].numpy(), BOOKS['things'], colours); assert np.array_equal(blank[0, 0], to_grey(images[0])[0, 0]) and not np.allclose(blank[20, 30], to_grey(images[0])[20, 30])
    assert np.array_equal(widgets_captions.tag_picture(images[0], np.full(GRID, -1), [], {}), to_grey(images[0]).astype(np.float32))


def test_a_large_codebook_gives_colours_to_what_occurs():
    names = [f'tag {i}' for i in range(4585)]; index = np.where(np.arange(60) < 30, 4000, np.arange(60) + 50).reshape(GRID)
    colours = widgets_captions.tag_colours({'': index[None]}, {'': names}); assert len(colours) == 31 and np.allclose(colours['tag 4000'], class_colours(1)[0])
    listed = [t.get_text() for t in widgets_captions.draw_tags(world()[0][0], index, names, 0, 0).axes[2].texts]; assert listed[0] == 'tag 4000 30' and len(listed) == 12 and listed[-1] == 'and 20 more 20'
    small = [t.get_text() for t in widgets_captions.draw_tags(world()[0][0], index % 2, ['a', 'a tag with a very long name'], 0, 0).axes[2].texts]; assert len(small) == 2 and small[1].startswith('a tag with a very…')


def test_the_cursor_names_its_patch_and_bars_are_its_best_tags():
    images, _ = world(); maps, truth, scores = tagged(); row, column = 4, 7; own = scores['large'][0][:, row, column]
    figure = widgets_captions.draw_tags(images[0], maps['large'][0], BOOKS['large'], row, column, scores['large'][0], truth['large'][0], {'coherence': .125}); image, tag, true, listed, bars = figure.axes
    assert image.get_title() == f'patch 4, 7\n{BOOKS["large"][own.argmax()]}' and true.get_title() == f'truth: grass\n{100 * (maps["large"][0] == truth["large"][0]).float().mean():.0f}% of patches right'
    for ax in (image, tag, true): assert np.allclose([p.get_bbox().extents for p in ax.patches], [[55.5, 31.5, 63.5, 39.5]] * 2)
    order = own.sort(descending=True); assert [p.get_width() for p in bars.patches] == order.values.tolist() and [t.get_text() for t in bars.texts[:-1:2]] == [BOOKS['large'][i] for i in order.indices] and bars.texts[-1].get_text() == 'coherence 0.12'
    counts = torch.bincount(maps['large'][0].flatten(), minlength=4); assert sorted(t.get_text() for t in listed.texts) == sorted(f'{n} {c}' for n, c in zip(BOOKS['large'], counts.tolist()) if c)
    some = scores['large'][0].clone(); some[[0, 2]] = torch.nan; assert len(widgets_captions.draw_tags(images[0], maps['large'][0], BOOKS['large'], row, column, some).axes[-1].patches) == 2
    assert widgets_captions.draw_tags(images[0], maps['things'][0], BOOKS['things'], row, column, truth=truth['things'][0]).axes[2].get_title().startswith('truth: no word\n')
    assert 'no word for it' in widgets_captions.draw_tags(images[0], maps['things'][0], BOOKS['things'], row, column, truth=torch.full(GRID, -1)).axes[2].get_title()


def test_maps_of_tags_that_do_not_belong_together():
    images, numbers = world(); maps, truth, scores = tagged(); one = lambda index, **v: widgets_captions.draw_tags(images[0], index, BOOKS['large'], 0, 0, **v)
    for wrong in (numbers[0], maps['large'], maps['large'][0] + 1): # shares, a batch, a number that is no tag
        with pytest.raises(BadInput, match='whole numbers up to 3'): one(wrong)
    with pytest.raises(BadInput, match='whole numbers'): one(maps['large'][0], truth=truth['large'][0][:5])
    with pytest.raises(BadInput, match=r'\(4, 6, 10\)'): one(maps['large'][0], scores=scores['things'][0])
    with pytest.raises(BadInput, match='rows 0 to 5'): widgets_captions.draw_tags(images[0], maps['large'][0], BOOKS['large'], 6, 0)
    with pytest.raises(BadInput, match='one grid'): widgets_captions.tags_explorer(images, {'large': maps['large'], 'things': maps['things'][:, :5]}, BOOKS)
    with pytest.raises(BadInput, match='name them alike'): widgets_captions.tags_explorer(images, maps, BOOKS, {'large': truth['large']})


def test_a_word_looks_where_its_weights_say():
    images, _ = world(); weights = torch.full((2, *GRID), 1e-9); weights[1, 4, 3] = .5; bright = np.zeros(GRID); bright[4, 3] = 1; mask = torch.zeros(SIZE); mask[:8, :8] = 1
    draw = lambda word, **v: widgets_captions.draw_looks(images[0], ['a', 'cat'], weights, word, ['a cat', 'the cat'], {'probability': [.25, .5]}, **v)
    image, map, scale, chart, sentence, below = draw(1, mask=mask).axes; assert np.allclose(map.images[0].get_array(), overlay(images[0], bright), atol=1e-6)
    assert map.get_title() == 'before "cat"\nhighest 0.500, even 0.017' and image.get_title() == 'image\nword 2 of 2' and chart.get_title() == 'probability: 0.5' and chart.lines[-1].get_xydata().tolist() == [[2, .5]]
    assert [(t.get_text(), t.get_weight()) for t in sentence.texts] == [('a', 'normal'), ('cat', 'bold')] and [t.get_text() for t in below.texts] == ['a cat', 'the cat'] and all(len(ax.collections) == 1 for ax in (image, map))
    assert (np.abs(pixels(draw(1)).astype(int) - [255, 127, 14]).sum(-1) < 20).sum() > 200 # the word's box is orange
    ended = draw(2).axes; assert np.array_equal(ended[1].images[0].get_array(), to_grey(images[0])) and ended[1].get_title() == 'the sentence has ended\nafter 2 words' and len(ended[3].lines) == 1 and all(t.get_weight() == 'normal' for t in ended[4].texts)


def test_long_sentences_keep_off_their_references():
    words = [f'skateboard{i}' for i in range(20)]; figure = widgets_captions.draw_looks(world()[0][0], words, torch.rand(20, *GRID), 3, ['a reference'])
    letters = widgets_captions.line_letters(figure.get_figwidth()); places = widgets_captions.broken_lines(words, letters); assert places[0] == (0, 0) and places[-1][0] > 2 and all(x + len(w) <= letters for (_, x), w in zip(places, words))
    sentence, below = figure.axes[-2:]; assert below.get_position().y1 <= sentence.get_position().y0 + 1e-9 and sentence.get_position().y1 <= figure.axes[0].get_position().y0
    assert widgets_captions.broken_lines(['abcdef'], 3) == [(0, 0)] and widgets_captions.broken_lines([], 3) == [] # a word longer than a line


def test_sentences_and_weights_that_do_not_belong_together():
    images, _ = world(); said, weights = sentences()
    with pytest.raises(BadInput, match='a map for each word'): widgets_captions.draw_looks(images[0], said[0], weights[1][0], 0)
    with pytest.raises(BadInput, match='at most two'): widgets_captions.draw_looks(images[0], said[0], weights[0][0], 0, curves={k: [1., 2., 3.] for k in 'abc'})
    with pytest.raises(BadInput, match='one of each'): widgets_captions.looks_explorer(images, said, weights, references=[['a']])
    with pytest.raises(BadInput, match='each layer and word'): widgets_captions.looks_explorer(images, said, weights, layers=['only one'])


def test_the_tree_by_hand():
    steps = [tuple(np.array(x) for x in s) for s in STEPS]; assert widgets_captions.beam_rows(steps, 1).tolist() == [[0, 0], [1, 1], [0, 2]] and widgets_captions.beam_rows(steps, 3).tolist() == [[0, 0, 0, 0], [1, 1, 1, 1], [0, 2, 2, 2]]
    assert [w.tolist() for w in widgets_captions.beam_ends(steps, END)] == [[False] * 3, [False] * 3, [False, True, False], [True] * 3]
    image, tree, ranks = widgets_captions.draw_beams(world()[0][0], STEPS, VOCABULARY, 2, END).axes; assert tree.get_title() == 'step 3 of 4: 3 of 3 beams have ended' and ranks.get_title('left') == 'final ranking'
    assert [t.get_text().split() for t in ranks.texts] == [['1.', '-1.70', 'a', 'cat', '<eos>'], ['2.', '-2.50', 'cat', '<eos>'], ['3.', '-2.90', 'a', 'bus', '<eos>']]
    drawn = [(round(float(l.get_xdata()[-1])), l.get_ydata().tolist(), l.get_color(), l.get_linestyle()) for l in tree.lines if len(l.get_xdata()) == 2]; dead, best = '#bbbbbb', PREDICTION
    assert drawn == [(1, [0, 0], best, '-'), (1, [0, 1], 'black', '-'), (1, [0, 2], dead, '-'), (2, [0, 0], best, '-'), (2, [1, 1], 'black', '-'), (2, [0, 2], 'black', '-'), (3, [0, 0], best, '-'), (3, [1, 1], 'black', ':'), (3, [2, 2], 'black', '-')]
    assert [t.get_text() for t in tree.texts if t.get_bbox_patch()] == ['<eos>\n-2.5', '<eos>\n-1.7', '<eos>\n-2.9'] and 'bus\n-3.0' in [t.get_text() for t in tree.texts] and len(tree.texts) == 1 + 8


def test_the_tree_at_a_step_knows_nothing_of_later_ones():
    axes = widgets_captions.draw_beams(world()[0][0], STEPS, VOCABULARY, 0, END).axes; assert axes[1].get_title() == 'step 1 of 4: 0 of 3 beams have ended' and axes[2].get_title('left') == 'ranking so far'
    assert len(axes[1].lines) == 3 and not [l for l in axes[1].lines if l.get_color() == '#bbbbbb'] and axes[1].get_xlim() == (-.5, 4.5) # a beam dies at the next step only
    wide = [([0], [1], [-1.]), ([0, 0], [4, 3], [-1., -2.])]; assert len(widgets_captions.draw_beams(world()[0][0], wide, VOCABULARY, 1, END).axes[2].texts) == 2 # fewer beams at the start
    fast = widgets_captions.draw_beams(world()[0][0], [([0], [3], [-1.])], VOCABULARY, 0, END); assert fast.axes[1].get_title() == 'step 1 of 1: 1 of 1 beams have ended'


def test_trees_that_cannot_be():
    images, _ = world(); draw = lambda *s, step=0: widgets_captions.draw_beams(images[0], list(s), VOCABULARY, step, END)
    with pytest.raises(BadInput, match='words 0 to 5'): draw(([0], [6], [-1.]))
    with pytest.raises(BadInput, match='parents of the beams before'): draw(([1], [1], [-1.]))
    with pytest.raises(BadInput, match='parents of the beams before'): draw(([0, 0], [1], [-1.]))
    with pytest.raises(BadInput, match='step 1 of 1'): draw(([0], [1], [-1.]), step=1)
    with pytest.raises(BadInput, match='for 3 images'): widgets_captions.beams_explorer([*images, images[0]], trace(), VOCABULARY, END)
    with pytest.raises(BadInput, match='for 2 images'): widgets_captions.beams_explorer(images, [], VOCABULARY, END)


def test_rewards_stand_against_their_mean():
    draw = lambda values, beam=0, **v: widgets_captions.draw_rewards(world()[0][0], ['a', 'b', 'c'], values, beam, **v); green, red, grey = widgets_captions.GAIN_COLOURS; assert green == TRUTH
    figure = draw([2., 1., 3.], 2, logprobs=[-1., -2., -3.], parts=[[1., 1.], [.5, .5], [2., 1.]], penalty=[1., 1., .5], references=['x', 'y'], course=([1, 2], [3., 4.], 'score')); image, bars, parts, course, below = figure.axes
    assert [p.get_width() for p in bars.patches] == [2, 1, 3] and np.allclose([p.get_facecolor() for p in bars.patches], [widgets_captions.Patch(color=c).get_facecolor() for c in (grey, red, green)]) and bars.lines[0].get_xdata().tolist() == [2, 2]
    assert [t.get_text() for t in bars.texts] == ['a', '2.00 (+0.00), log p -1.0', 'b', '1.00 (-1.00), log p -2.0', 'c', '3.00 (+1.00), log p -3.0'] and bars.get_title('left') == 'rewards, mean 2.00' and bars.texts[4].get_color() == PREDICTION and bars.texts[0].get_color() != PREDICTION
    assert [p.get_height() for p in parts.patches] == [2, 1] and parts.get_title() == 'beam 3: by words in a row\nlength penalty x0.50' and course.lines[0].get_xydata().tolist() == [[1, 3], [2, 4]] and course.get_title() == 'score' and [t.get_text() for t in below.texts] == ['x', 'y']
    assert len(draw([0., 0., 0.]).axes) == 2 and not [p for p in draw([0., 0., 0.]).axes[1].patches if p.get_width()]


def test_rewards_that_do_not_belong_together():
    images, _ = world(); draw = lambda values, **v: widgets_captions.draw_rewards(images[0], ['a', 'b'], values, v.pop('beam', 0), **v)
    for wrong in (dict(values=[1., 2., 3.]), dict(values=[1., 2.], beam=2), dict(values=[1., 2.], logprobs=[1.])):
        with pytest.raises(BadInput, match='a number for each sentence'): draw(**wrong)
    with pytest.raises(BadInput, match='adds up'): draw([1., 2.], parts=[[1., 0.], [1., .5]])
    with pytest.raises(BadInput, match=r'\(images, beams'): widgets_captions.rewards_explorer(images, [['a', 'b'], ['c']], [[1., 2.], [3., 4.]])
    with pytest.raises(BadInput, match='in the same order'): widgets_captions.rewards_explorer(images, [['a'], ['b']], [[1.], [2.]], references=[['a']])
