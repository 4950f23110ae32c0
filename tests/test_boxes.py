"Boxes and localisation scores: every golden number of the components, the sweep against its plain form, faults."
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import bench_cdtr_sweep as plain
from wsl_nb import boxes as bx
from wsl_nb.core import BadInput, rng

GOLDEN = Path(__file__).parent/'golden'/'cdtr'/'components'
golden = pytest.mark.skipif(not GOLDEN.exists(), reason='no golden set of CDTR')
TAUS = np.arange(0, 1, .01)


@pytest.fixture(scope='module')
def stored():
    "Tensors of the components."
    from safetensors.numpy import load_file
    return load_file(GOLDEN/'components.safetensors')


# --- golden --------------------------------------------------------------------------------------------------------

def off_by_one(found, wanted, allowed):
    "Boxes are equal; with another OpenCV than the vectors were made with, `allowed` of them may differ, by a pixel."
    far = np.abs(found - wanted).max(-1)
    assert (far > 0).sum() <= (0 if cv2.__version__.startswith('5.') else allowed) and far.max() <= 1, f'{int((far > 0).sum())} boxes differ, by {far.max()} px'


@golden
@pytest.mark.parametrize('name', ['224', 'nonsq'])
def test_golden_boxes(stored, name):
    "Kept pixels and boxes of ten maps at six thresholds, square and not."
    width, height = (224, 224) if name == '224' else json.loads((GOLDEN/'config.json').read_text())['nonsq_wh']
    found = np.stack([bx.boxes_at(m, (height, width), stored['box.thresholds']) for m in stored['box.maps']])
    off_by_one(found, stored[f'box.boxes_{name}'], 6)
    for m, kept in zip(stored['box.maps'], stored[f'box.kept_pixels_{name}']):
        grey = (bx.enlarge(m, (height, width)) * 255).astype(np.uint8)
        assert [(grey > int(float(str(t)) * int(grey.max()))).sum() for t in stored['box.thresholds']] == kept.tolist()
    if name == 'nonsq':
        for i in (0, 1): assert np.abs(bx.enlarge(stored['box.maps'][i], (height, width)) - stored[f'box.resized_nonsq_{i}']).max() < 1e-6


@golden
def test_golden_iou(stored):
    "Pairwise without one more pixel, a matrix with it."
    pairs = [bx.box_iou(a[None], b[None])[0, 0] for a, b in zip(stored['iou.a'], stored['iou.b'])]
    assert np.abs(np.array(pairs) - stored['iou.cdtr']).max() < 1e-6
    a, b = (stored[f'iou.{k}'][:6].astype(int).clip(0) for k in 'ab')
    assert np.abs(bx.box_iou(a, b, True) - stored['iou.wsol_matrix_first6_clipped_at_0']).max() < 1e-6


@golden
def test_golden_truth_boxes(stored):
    "The released rounding to 1e-4, twice the same; the image's own offset is at most a pixel and a half away."
    for (w, h, x, y, bw, bh), wanted in zip(stored['gtbox.wh_xywh'].astype(np.float64), stored['gtbox.xyxy']):
        box = np.array([[x, y, x + bw, y + bh]])
        for _ in range(2): assert np.abs(bx.crop_boxes(box, (int(h), int(w)), offset='float_size')[0] - wanted).max() < 1e-4
        assert np.abs(bx.crop_boxes(box, (int(h), int(w)))[0] - wanted).max() < 1.5


@golden
def test_golden_evaluation(stored):
    "The table of the released loop, exactly: Top-1, Top-5, what it calls GT-known, and classification."
    table = stored['eval.metrics_thr_top1loc_top5loc_gtloc_acc1_acc5']; taus, sums = table[:, 0], {}
    for logits, maps, target, truth in zip(stored['eval.logits'], stored['eval.cams'], stored['eval.targets'], stored['eval.gt_xyxy']):
        hits = bx.count_hits(logits, maps, target, truth[None], (224, 224), taus, 'cdtr')
        alone = [bx.count_hits(torch.tensor(logits), torch.tensor(maps), target, truth[None], (224, 224), [t], 'cdtr') for t in taus]
        assert all((hits[k] == np.concatenate([a[k] for a in alone])).all() for k in hits)
        sums = bx.add_hits(sums, hits)
    curves = bx.loc_curves(sums, len(stored['eval.targets']))
    for column, (name, unit) in enumerate([('top1_loc', 1), ('top5_loc', 1), (bx.PROTOCOLS['cdtr'].known, 1), ('cls1', 100), ('cls5', 100)], 1):
        assert np.allclose(unit * curves[name], table[:, column], atol=1e-12 * unit, rtol=0), name
    assert not np.allclose(curves['gt_known'], table[:, 3])  # the two are different scores


@golden
def test_golden_max_box_acc(stored):
    "Both versions, every threshold; the enlarged map to 1e-12."
    assert np.abs(bx.enlarge(stored['box.maps'][0], (224, 224), 'bicubic_minmax')[::8, ::8] - stored['maxbox.scoremap0_stride8']).max() < 1e-12
    truth, index = stored['maxbox.gt'], stored['maxbox.raw_maps_index']
    for kind, contours in (('single', 'largest'), ('multi', 'all')):
        sums = sum(bx.box_hits(stored['box.maps'][i], truth[truth[:, 0] == i, 1:], (224, 224), TAUS, contours).astype(int) for i in index)
        found = bx.max_box_acc(sums, len(index))
        assert np.allclose(100 * found['acc'], stored[f'maxbox.{kind}.acc_30_50_70'], atol=1e-9) and np.isclose(100 * found['mean'], stored[f'maxbox.{kind}.acc_30_50_70'].mean())
        assert (sums[1] == stored[f'maxbox.{kind}.correct_iou50_per_threshold']).all()


@golden
def test_golden_pxap(stored):
    "Four maps in one pool; a pool in two parts is the same pool."
    counts = []
    for m, (x0, y0, x1, y1) in zip(stored['box.maps'], stored['pxap.mask_boxes']):
        mask = np.zeros((224, 224), bool); mask[y0:y1 + 1, x0:x1 + 1] = True
        counts.append(bx.pixel_counts(m, bx.ignored_mask(mask, [[0, 0, 224, 10]]), TAUS))
    assert abs(100 * bx.pxap(sum(counts)) - stored['pxap.value']) < 1e-6 and bx.pxap(sum(counts[:1]) + sum(counts[1:])) == bx.pxap(sum(counts))


# --- the sweep -----------------------------------------------------------------------------------------------------

def odd_map(r):
    "A map of one of seven kinds: noise, few levels, smooth, plateaus, blots, enlarged blocks, faint."
    from scipy.ndimage import gaussian_filter
    shape, kind = r.integers(1, 30, 2), r.integers(7)
    noise = r.random(shape)
    if kind == 1: return r.integers(0, r.integers(2, 6), shape).astype(float)
    if kind == 2: return gaussian_filter(noise, r.uniform(.3, 3))
    if kind == 3: return np.round(gaussian_filter(noise, r.uniform(.3, 2)) * 20)
    if kind == 4: return (noise < r.uniform(.1, .9)) * r.integers(1, 4, shape).astype(float)
    if kind == 5: return cv2.resize(r.integers(0, 4, r.integers(2, 7, 2)).astype(np.float32), (int(shape[1]), int(shape[0])), interpolation=int(r.integers(3)))
    return np.where(noise > .99, 50., noise) if kind == 6 else noise


@pytest.mark.parametrize('seed', range(6))
def test_the_sweep_gives_the_boxes_of_the_plain_form(seed):
    "Maps at their own size and enlarged, by all three rules, at even and at odd thresholds, with ties and plateaus."
    r = rng('sweep against plain', seed)
    for trial in range(150):
        m = odd_map(r); size = m.shape if trial % 3 else tuple(int(n) for n in r.integers(1, 60, 2))
        p = list(bx.PROTOCOLS.values())[trial % 3]; taus = [TAUS[::5], np.unique(r.random(12)), np.arange(0, 1, .01), np.array([.2])][trial % 4]
        assert (bx.boxes_at(m, size, taus, p) == plain.plain_boxes(m, size, taus, p.enlarge, p.nothing)).all(), (trial, m.shape, size)


@pytest.mark.parametrize('kind', plain.KINDS)
def test_the_sweep_on_maps_of_the_benchmark(kind):
    for m in plain.maps_of(kind, 4): assert (bx.boxes_at(m, (224, 224), TAUS) == plain.enlarged_once(m, (224, 224), TAUS)).all()


def test_a_sweep_traces_fewer_contours_than_it_has_thresholds(monkeypatch):
    "One bump: all masks are one region, so a handful of contours say it all."
    seen = []; trace = cv2.findContours
    monkeypatch.setattr(cv2, 'findContours', lambda *a: seen.append(1) or trace(*a))
    y, x = np.mgrid[:14, :14]; bx.boxes_at(np.exp(-((y - 6) ** 2 + (x - 7) ** 2) / 20), (224, 224), TAUS)
    assert len(seen) < 12


def test_all_contours_with_holes_at_every_threshold():
    "As OpenCV lists them, the box of the largest among them."
    for i, m in enumerate(plain.maps_of('noise', 3)):
        found, largest = bx.contours_at(m, (60, 80), TAUS, 'cdtr'), bx.boxes_at(m, (60, 80), TAUS)
        grey = plain.plain_grey(m, (60, 80))
        for t, boxes, box in zip(TAUS, found, largest):
            listed = cv2.findContours((grey > int(t * int(grey.max()))).astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
            assert boxes.tolist() == [[x, y, x + w, y + h] for x, y, w, h in map(cv2.boundingRect, listed)] and box.tolist() in boxes.tolist()


@pytest.mark.parametrize('name', bx.PROTOCOLS)
@pytest.mark.parametrize('value', [0., -3.7, .1, 1e30, float('nan'), float('inf')])
def test_a_map_without_contrast_has_no_box_and_no_nan(name, value):
    "Incident: min-max of a constant map is 0/0, and NaN becomes any number of 8 bits; enlarged first, a constant is rounding noise."
    m = np.full((14, 14), value); p = bx.PROTOCOLS[name]
    if not np.isfinite(value): m[:7] = 1.
    assert (bx.enlarge(m, (50, 70), p.enlarge) == 0).all() and (bx.boxes_at(m, (50, 70), TAUS, p) == np.float32(p.nothing)).all()
    hits = bx.count_hits([1., 0], np.stack([m, m]), 0, [[0, 0, 50, 50]], (50, 70), TAUS, p)
    assert not hits['top1_loc'].any() and not hits['gt_known'].any() and hits['cls1'].all()
    counts = bx.pixel_counts(m, np.eye(50, 70, dtype=np.uint8), TAUS, p); assert counts[:, 1:].sum() == 0 and counts.sum() == 3500


# --- scores --------------------------------------------------------------------------------------------------------

def scene(r, classes=7, n=2):
    "Logits, maps, target and truth of one image."
    truth = np.sort(r.uniform(0, 90, (n, 2, 2)), 1).reshape(n, 4)
    return r.standard_normal(classes), np.stack([plain.bumps(.1, int(r.integers(1 << 30))) for _ in range(classes)]), int(r.integers(classes)), truth


@pytest.mark.parametrize('name', bx.PROTOCOLS)
def test_scores_are_those_of_their_definitions(name):
    "Each score written out for one image at a time; only two maps are read."
    p, r = bx.PROTOCOLS[name], rng('scores', name)
    for _ in range(12):
        logits, maps, target, truth = scene(r)
        order = np.argsort(-logits); iou = lambda c: bx.protocol_iou(bx.boxes_at(maps[c], (90, 90), TAUS, p), truth, (90, 90), p)
        over = lambda i, strict: i > .5 if strict == '>' else i >= .5
        hits = bx.count_hits(logits, maps, target, truth, (90, 90), TAUS, name); top = order[0]
        assert (hits['gt_known'] == over(iou(target), p.known_iou)).all() and (hits['loc_predicted_class'] == over(iou(top), p.known_iou)).all()
        assert (hits['top1_loc'] == ((top == target) & over(iou(top), p.top_iou))).all()
        assert (hits['top5_loc'] == ((target in order[:5]) & over(iou(top if name == 'cdtr' else target), p.top_iou))).all()
        spoilt = maps.copy(); spoilt[[c for c in range(7) if c not in (top, target)]] = np.nan
        assert all((v == hits[k]).all() for k, v in bx.count_hits(logits, spoilt, target, truth, (90, 90), TAUS, name).items())
        row = bx.loc_row(logits, maps, target, truth, (90, 90), TAUS[30], p); json.dumps(row)
        assert all(row[k] == hits[k][30] for k in hits) and row['predicted'] == top and row['iou'] == iou(top)[30] and row['target_iou'] == iou(target)[30]


def test_an_overlap_of_exactly_a_half_is_enough_for_max_box_acc():
    "Inclusive pixels: 5x5 of 5x10."
    m = np.pad(np.ones((4, 4)), 3)
    for contours in ('largest', 'all'): assert bx.box_hits(m, [[3, 3, 7, 12]], (10, 10), [.2], contours)[:, 0].tolist() == [True, True, False]


def test_first_or_best_true_box():
    m = np.zeros((10, 10)); m[5:9, 5:9] = 1; truth = [[0, 0, 3, 3], [5, 5, 9, 9]]
    known = {n: bx.count_hits([1, 0], np.stack([m, m]), 0, truth, (10, 10), [.5], n)['gt_known'][0] for n in bx.PROTOCOLS}
    assert known == dict(cdtr=False, tscam=True, wsol=True)


def test_one_map_for_all_classes_and_fewer_than_five_classes():
    r = rng('agnostic'); logits, maps, target, truth = scene(r, 3)
    same = bx.count_hits(logits, maps[0], target, truth, (90, 90), TAUS); repeated = bx.count_hits(logits, maps[:1].repeat(3, 0), target, truth, (90, 90), TAUS)
    assert all((same[k] == repeated[k]).all() for k in same) and same['cls5'].all()


def test_sums_do_not_depend_on_how_they_were_added():
    "Two processes with their own images give the sums of one; bool is never added as bool."
    r = rng('sums'); every = [bx.count_hits(*scene(r), (90, 90), TAUS) for _ in range(7)]
    def total(rows):
        sums = {}
        for row in rows: sums = bx.add_hits(sums, row)
        return sums
    one, two = total(every), bx.add_hits(total(every[:3]), total(every[3:]))
    for k in one: assert (one[k] == two[k]).all() and (one[k] == np.sum([e[k] for e in every], 0)).all() and one[k].dtype == np.int64


def test_the_best_threshold_of_the_scored_images_is_never_below_an_honest_one():
    "Noise without any best threshold: choosing on the test set invents one, the more so on fewer images; the draws follow the seed."
    hits = rng('inflation').random((200, 40)) < .5
    small, large = (bx.threshold_inflation(hits, n) for n in (10, 100))
    assert small['inflation'] > 2 * large['inflation'] > 0 and abs(large['honest'] - .5) < .03
    again, other = bx.threshold_inflation(hits, 10), bx.threshold_inflation(hits, 10, seed=1)
    assert again['tuned'] == small['tuned'] and (again['index'] == small['index']).all() and (other['index'] != small['index']).any()
    assert small['tuned'] - small['honest'] == pytest.approx(small['inflation'])
    assert bx.choose_threshold([.2, .7, .7, .1]) == 1


def test_average_precision_of_pixels_is_that_of_scikit_learn():
    from sklearn.metrics import average_precision_score
    r = rng('pxap'); m, mask = r.random((20, 30)).astype(np.float32), (r.random((20, 30)) < .3).astype(np.uint8)
    fine = np.round(bx.enlarge(m, (20, 30), 'bicubic_minmax') * 100) / 100
    counts = bx.pixel_counts(fine, mask, np.unique(fine)[:-1])
    assert bx.pxap(counts) == pytest.approx(average_precision_score(mask.ravel(), fine.ravel()), abs=1e-12)


# --- views ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [(40, 40), (41, 97), (97, 41), (64, 65), (200, 33)])
def test_the_centre_cut_is_that_of_torchvision_and_the_box_stays_on_its_object(size):
    "Image at the place where torchvision cuts; a bright rectangle fills its moved box to within a pixel; nothing is changed in place."
    from torchvision.transforms.v2 import functional as TF
    from wsl_nb.core import denormalise
    from wsl_nb.data_transforms import CentreCrop
    image = torch.zeros(3, *size); t, l = size[0] // 2 - 8, size[1] // 2 - 7; image[:, t:t + 15, l:l + 13] = 1
    sample = dict(image=image, boxes=torch.tensor([[l, t, l + 13., t + 15]]), mask=image[0].byte(), label=torch.ones(2)); kept = {k: v.clone() for k, v in sample.items()}
    out = CentreCrop(48, 40)(sample)
    wanted = TF.center_crop(TF.resize(image, [48], TF.InterpolationMode.BICUBIC, antialias=True).clamp(0, 1), [40, 40])
    assert (denormalise(out['image']) - wanted).abs().max() < 1e-5 and out['mask'].shape == (40, 40) and out['mask'].dtype == torch.uint8
    rows, columns = (torch.where((out['image'][0] > out['image'].mean()).any(d))[0] for d in (1, 0))
    bright = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
    assert (out['boxes'][0] - bright).abs().max() <= 1 and all((sample[k] == kept[k]).all() for k in kept)
    again = CentreCrop(48, 40, 'float_size')(sample)
    assert (again['image'] == out['image']).all() and (again['boxes'].numpy() == bx.crop_boxes(kept['boxes'], size, 48, 40, 'float_size')).all()
    assert bool((again['boxes'] == out['boxes']).all()) == (size[0] == size[1]) and (again['boxes'] - out['boxes']).abs().max() < 1
    assert (CentreCrop(48, 40)(sample)['boxes'] == out['boxes']).all()


@pytest.mark.parametrize('size, factor', [((48, 97), 1), ((101, 48), 1), ((24, 41), 2), ((53, 24), 2)])
def test_the_centre_cut_moves_masks_with_the_image_to_the_pixel(size, factor):
    "An image that is its own mask: not resized at all (any pixels), or twice as large (a rectangle)."
    from wsl_nb.core import denormalise
    from wsl_nb.data_transforms import CentreCrop
    mask = torch.from_numpy(rng('mask', *size).integers(0, 2, size).astype(np.uint8)) if factor == 1 else torch.zeros(size, dtype=torch.uint8)
    if factor == 2: mask[size[0] // 2 - 5:size[0] // 2 + 3, size[1] // 2 - 6:size[1] // 2 + 7] = 1
    out = CentreCrop(48, 40)(dict(image=mask.float().repeat(3, 1, 1), mask=mask, part=mask, context=mask))
    assert all((out[k] == (denormalise(out['image'])[0] > .5)).all() for k in ('mask', 'part', 'context')) and 0 < out['mask'].sum() < 1600


def test_squashed_boxes_written_out():
    "Width goes with x, height with y; an image that is wider than high, in a view that is higher than wide."
    assert bx.squash_boxes([[30, 10, 60, 25], [0, 0, 150, 50]], (50, 150), (100, 75)).tolist() == [[15, 20, 30, 50], [0, 0, 75, 100]]


@pytest.mark.parametrize('name', bx.PROTOCOLS)
def test_an_object_that_is_found_to_the_pixel(name):
    "Image and view of one size. CDTR compares edges: IoU 1. The squashed protocols compare the last pixel of the truth with the far edge of their own box, which is one pixel more."
    m = np.zeros((40, 40)); m[8:23, 5:31] = 1; truth = bx.truth_under([[5, 8, 31, 23]], (40, 40), (40, 40), name); iou = bx.protocol_iou(bx.boxes_at(m, (40, 40), [.5], name), truth, (40, 40), name)[0]
    assert truth.tolist() == [[5, 8, 31, 23] if name == 'cdtr' else [5, 8, 30, 22]]
    assert iou == (1 if name == 'cdtr' else pytest.approx(26 * 15 / (27 * 16)))


def test_a_second_pass_sees_the_same_truth():
    "Incident: a reader that edits its stored box returns a wrong one the second time."
    box = np.array([[10., 20, 110, 90]]); first = bx.crop_boxes(box, (120, 160)), bx.squash_boxes(box, (120, 160))
    second = bx.crop_boxes(box, (120, 160)), bx.squash_boxes(box, (120, 160))
    assert all((a == b).all() for a, b in zip(first, second)) and box.tolist() == [[10, 20, 110, 90]]


@pytest.mark.parametrize('call, word', [
    (lambda: bx.boxes_at(np.ones((2, 3, 3)), (9, 9), [.1]), 'one class'), (lambda: bx.boxes_at(np.ones((3, 3)), (9,), [.1]), 'height and width'),
    (lambda: bx.boxes_at(np.ones((3, 3)), (9, 9), [0, 1.2]), 'ascending'), (lambda: bx.contours_at(np.ones((3, 3)), (9, 9), [.3, .2]), 'sort'),
    (lambda: bx.boxes_at(np.ones((3, 3)), (9, 9), [.2], 'paper'), 'tscam'), (lambda: bx.protocol_iou([[0, 0, 1, 1]], [0, 0, 1, 1], (9, 9)), 'one row'),
    (lambda: bx.box_iou(np.ones((2, 5)), np.ones((1, 4))), 'xyxy'), (lambda: bx.threshold_inflation(np.ones(5)), 'stack'),
    (lambda: bx.loc_curves({}, 3), 'at least one image'), (lambda: bx.pxap(np.zeros((2, 4))), 'masks'), (lambda: bx.crop_frame((0, 5)), 'fits')])
def test_bad_input_says_what_to_do(call, word):
    with pytest.raises(BadInput, match=word): call()
