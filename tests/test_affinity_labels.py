"Label files and views of AffinityNet against forms written here in NumPy: exponents, padding, ids, windows."
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wsl_nb import affinity_labels
from wsl_nb.affinity_base import LAPTOP
from wsl_nb.core import read_mask, rng, torch_rng, write_mask
from wsl_nb.crf import dense_crf

MEAN, STD = (torch.tensor(v)[:, None, None] for v in ((.485, .456, .406), (.229, .224, .225))) # Of ImageNet


def uniform(*shape, key='uniform'): return torch.rand(*shape, generator=torch_rng('affinity labels', key, *shape))


class Images(list):
    "A split of drawn images with one row of labels each."
    def __init__(self, labels, size):
        images = (torch.from_numpy(rng('affinity labels', i).integers(0, 256, (3, *size)).astype(np.float32)) / 255 for i in range(len(labels)))
        super().__init__(dict(id=f'img_{i}', index=i, image=x, label=torch.tensor(l, dtype=torch.float32)) for i, (x, l) in enumerate(zip(images, labels)))
        self.ids = [s['id'] for s in self]


def with_background(cam, alpha):
    "(1+K,H,W): how much is left by the largest map, to the power alpha, before the maps."
    return np.concatenate([(1 - cam.max(0, keepdims=True)) ** alpha, cam])


# --- files ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('crf', [False, True])
def test_low_and_high_labels_are_under_their_own_exponents(tmp_path, monkeypatch, crf):
    "`low` holds the objects under alpha_low and `high` those under alpha_high, in 1/255; the classes are those of the image."
    cfg, split = replace(LAPTOP, alpha_low=2., alpha_high=9., confident_crf=crf), Images([[1, 0, 1, 0], [0, 0, 0, 1]], (9, 12))
    cams = [uniform(2, 9, 12), uniform(1, 9, 12)]
    monkeypatch.setattr(affinity_labels, 'class_activation', lambda model, samples, kinds, cfg: [cams[s['index']] for s in samples])
    affinity_labels.make_labels(None, split, cfg, tmp_path, 'hash')
    for s, cam, kinds in zip(split, cams, ([0, 2], [3])):
        picture = (s['image'] * 255).round().byte().permute(1, 2, 0).numpy()
        with np.load(tmp_path/'files'/f'{s["id"]}.npz') as f:
            assert f['kinds'].tolist() == kinds and np.abs(f['cam'] - cam.numpy()).max() < 1e-3
            for name, alpha in (('low', 2.), ('high', 9.)):
                scores = with_background(cam.numpy(), alpha)
                want = dense_crf(picture, scores, affinity_labels.CRF) if crf else scores / scores.sum(0)
                assert np.abs(f[name] / 255 - want[1:]).max() < .6 / 255, name
            if not crf: assert (f['high'] >= f['low']).all() and (f['high'] > f['low']).mean() > .5, 'a high exponent leaves less to the background'


def test_pseudo_labels_hold_the_id_of_the_class(tmp_path):
    "Class c is written as c + 1 and background as 0; without a step of the walk each pixel is what its scores say. An image without a class is background."
    class Colours(nn.Module):
        def __init__(self): super().__init__(); self.weight = nn.Parameter(torch.ones(1))
        def forward(self, image): return image * self.weight
    cfg, split, cams = replace(LAPTOP, grid=1, radius=2, walk_steps=0, alpha=3., crf=False), Images([[0, 1, 0, 1], [1, 0, 0, 0], [0] * 4], (8, 11)), [uniform(2, 8, 11), uniform(1, 8, 11), torch.zeros(0, 8, 11)]
    (tmp_path/'labels'/'files').mkdir(parents=True)
    for s, cam in zip(split, cams):
        cam[:, 2:4, 3:6] *= .02 # background wins here
        np.savez(tmp_path/'labels'/'files'/f'{s["id"]}.npz', low=np.zeros(cam.shape, np.uint8), high=np.zeros(cam.shape, np.uint8), kinds=s['label'].nonzero().flatten().numpy(), cam=cam.numpy().astype(np.float16))
    affinity_labels.make_pseudo(Colours().eval(), split, tmp_path/'labels', cfg, tmp_path/'pseudo', 'hash')
    for s, cam, ids in zip(split, cams, ([0, 2, 4], [0, 1], [0])):
        got = read_mask(tmp_path/'pseudo'/'files'/f'{s["id"]}.png')
        want = np.array(ids)[with_background(cam.half().float().numpy(), 3.).argmax(0)] if len(ids) > 1 else np.zeros((8, 11), int)
        assert (got == want).all() and sorted(np.unique(got)) == ids


# --- walk ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('steps', [0, 3])
def test_the_walk_pads_its_scores_with_zeros(steps):
    "Background is scored first, then all scores are padded with zeros to whole cells, averaged, spread and enlarged; the walk is a dense product here."
    cfg, (H, W), (h, w) = replace(LAPTOP, grid=4, radius=3, border='full', alpha=2., beta=4., walk_steps=steps), (10, 13), (4, 4)
    cam, e = uniform(2, H, W), uniform(5, h, w).double().numpy()
    scores = np.zeros((3, 4 * h, 4 * w)); scores[:, :H, :W] = with_background(cam.double().numpy(), 2.)
    pooled = scores.reshape(3, h, 4, w, 4).mean((2, 4))
    cells = list(itertools.product(range(h), range(w))); step = np.zeros((h * w, h * w))
    for (i, (y, x)), (j, (v, u)) in itertools.product(enumerate(cells), repeat=2):
        if (y - v) ** 2 + (x - u) ** 2 < 9: step[i, j] = np.exp(-np.abs(e[:, y, x] - e[:, v, u]).mean()) ** 4
    spread = np.linalg.matrix_power(step / step.sum(1, keepdims=True), steps) @ pooled.reshape(3, -1).T
    want = F.interpolate(torch.from_numpy(spread.T.reshape(1, 3, h, w)), scale_factor=4, mode='bilinear', align_corners=False)[0, :, :H, :W]
    got = affinity_labels.walked(torch.from_numpy(e).float(), cam, cfg); assert got.shape == (3, H, W) and torch.allclose(got.double(), want, atol=1e-5)


# --- views ---------------------------------------------------------------------------------------------------------

def window_of(found, image, padding):
    "(top, left, mirrored) of the one place where the whole image lies in a view that is `padding` everywhere else."
    (H, W), side, places = image.shape[-2:], found.shape[-1], []
    for t, l, mirrored in itertools.product(range(side - H + 1), range(side - W + 1), (False, True)):
        want = padding.expand(3, side, side).clone(); want[:, t:t + H, l:l + W] = image.flip(-1) if mirrored else image
        if torch.allclose(found, want, atol=1e-5): places.append((t, l, mirrored))
    assert len(places) == 1, f'{len(places)} places where the image is whole and all around it black'
    return places[0]


def placed(values, place, side, around):
    "A label map where its image was placed."
    t, l, mirrored = place; out = np.full((side, side), around); out[t:t + values.shape[0], l:l + values.shape[1]] = values[:, ::-1] if mirrored else values
    return out


def test_confident_views_are_black_outside_the_image(tmp_path):
    "Padding is black before the normalisation, so (0 - mean) / std after it; the labels move along and are neutral where nothing but padding is."
    cfg, side, (sample,) = replace(LAPTOP, crop=16, grid=4, jitter=(0.,) * 4), 16, Images([[1, 1]], (10, 13)); (tmp_path/'files').mkdir()
    low, high = (np.zeros((2, 10, 13), np.uint8) for _ in range(2)); low[0, :, :6] = high[0, :, :6] = 255; high[1, 5:, 6:] = 255 # first class; background; and neutral to the lower right
    np.savez(tmp_path/'files'/'img_0.npz', low=low, high=high, kinds=np.arange(2), cam=np.zeros((2, 10, 13), np.float16))
    image, places = (sample['image'] - MEAN) / STD, set()
    for i in range(12):
        found = affinity_labels.ConfidentView(cfg, tmp_path)(sample, rng('view', i)); place = window_of(found['image'], image, -MEAN / STD); places.add(place)
        cells = lambda q, around: placed(q.astype(float), place, side, around).reshape(4, 4, 4, 4).mean((1, 3))
        a, b = ([cells(255 - q.sum(0), 0.), *(cells(p, 0.) for p in q)] for q in (low.astype(int), high.astype(int)))
        label = np.argmax(a, 0); label[label == 0] = 255; label[np.argmax(b, 0) == 0] = 0; label[np.max(a + b, 0) == 0] = 255
        assert (found['mask'].numpy() == label).all() and {0, 1, 255} <= set(np.unique(label))
    assert len(places) > 6 and {m for *_, m in places} == {False, True}


def test_pseudo_labels_are_ignored_outside_the_image(tmp_path):
    "255 where the view reaches over the image, and the ids of the file inside, moved and mirrored with the image."
    cfg, (sample,) = replace(LAPTOP, crop=16, segment_scale=(1., 1.)), Images([[1, 1, 1]], (10, 13)); (tmp_path/'files').mkdir()
    mask = rng('pseudo').integers(0, 4, (10, 13)).astype(np.uint8); write_mask(tmp_path/'files'/'img_0.png', mask); image, places = (sample['image'] - MEAN) / STD, set()
    for i in range(12):
        found = affinity_labels.PseudoView(cfg, tmp_path)(sample, rng('view', i)); place = window_of(found['image'], image, -MEAN / STD); places.add(place)
        assert found['mask'].dtype == torch.uint8 and (found['mask'].numpy() == placed(mask, place, 16, 255)).all()
    assert len(places) > 6 and {m for *_, m in places} == {False, True}
