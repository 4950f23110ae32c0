"""PAR, dense CRF and dense energy against plain forms, golden vectors and each other."""
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from reference_par import par_plain
from wsl_nb import crf
from wsl_nb.core import BadInput, denormalise, rng, torch_rng

GOLDEN = Path(__file__).parent/'golden'/'more'
needs_lattice = pytest.mark.skipif(crf.crf_backend() != 'pydensecrf', reason='pydensecrf not installed')


def stored(name):
    from safetensors.torch import load_file
    return load_file(GOLDEN/f'{name}.safetensors')


def photo(height, width, key='photo'):
    "Smooth colour patches plus sensor noise, 8 bit levels, (1,3,H,W) in [0,1]."
    g = torch_rng(key, height, width)
    smooth = F.interpolate(torch.rand(1, 3, 5, 6, generator=g), size=(height, width), mode='bicubic').clamp(0, 1)
    return ((smooth * 8).round() / 8 * 255 + 4 * torch.randn(1, 3, height, width, generator=g)).clamp(0, 255).floor() / 255


def test_par_golden():
    d = stored('cam')
    torch.testing.assert_close(crf.par_refine(d['par.image'], d['par.mask_in']), d['par.mask_out'], atol=1e-4, rtol=0)


@pytest.mark.parametrize('size', [(112, 112), (40, 61), (7, 9)])
def test_fast_par_equals_plain(size):
    image = torch.cat([photo(*size), photo(*size, 'other'), torch.full((1, 3, *size), .3)])
    masks = torch.rand(3, 5, size[0] // 2, size[1] // 2, generator=torch_rng('m')).softmax(1)
    both = crf.par_refine(image, torch.cat([masks, masks ** 2], 1))
    for fast, stack in zip(both.split(5, 1), (masks, masks ** 2)):
        torch.testing.assert_close(fast, par_plain(image, stack), atol=1e-5, rtol=0)


def test_par_options_equal_plain():
    image, masks = photo(24, 30), torch.rand(1, 2, 24, 30, generator=torch_rng(1))
    args = (3, (1, 5), .7, .2)
    torch.testing.assert_close(crf.par_refine(image, masks, *args), par_plain(image, masks, *args), atol=1e-5, rtol=0)
    assert crf.par_refine(image, masks.requires_grad_()).requires_grad is False


@pytest.mark.parametrize('backend', [pytest.param('pydensecrf', marks=needs_lattice), 'torch'])
def test_crf_golden(backend):
    cam, labels = stored('cam'), stored('labels')
    got = torch.tensor(crf.dense_crf(labels['crf.image_rgb'].numpy(), cam['crf.prob_in'], backend=backend))
    torch.testing.assert_close(got, cam['crf.Q'], atol=1e-3, rtol=0)
    ids = labels['crf.label'].unique()                                      # background and the classes present, in order
    assert len(ids) == len(got) and (ids[got.argmax(0)] == labels['crf.label']).float().mean() >= .995


def scene(height, width, noise):
    "Three coloured things on ground, and blurred wrong-ish probabilities of them."
    r = rng('scene', height, width)
    y, x = np.mgrid[:height, :width] / np.array([height, width]).reshape(2, 1, 1)
    truth = np.zeros((height, width), int)
    truth[(y - .3) ** 2 + (x - .3) ** 2 < .04] = 1; truth[(abs(y - .7) < .15) & (abs(x - .65) < .22)] = 2
    image = np.array([[90, 140, 80], [190, 60, 50], [60, 70, 180]])[truth] + r.normal(0, noise, (height, width, 3))
    hot = torch.tensor(np.eye(3)[truth].transpose(2, 0, 1), dtype=torch.float32).unsqueeze(0)
    small = F.interpolate(hot, size=(height // 8, width // 8), mode='area') + .3 * torch.rand(1, 3, height // 8, width // 8, generator=torch_rng('s'))
    return image.clip(0, 255).astype(np.uint8), F.interpolate(small, size=(height, width), mode='bilinear')[0].clamp(0, 1).numpy(), truth


@needs_lattice
@pytest.mark.parametrize('size, noise', [((64, 64), 2), ((96, 120), 12), ((40, 33), 40)])
def test_backends_agree(size, noise):
    image, prob, truth = scene(*size, noise)
    one, other = (crf.dense_crf(image, prob, backend=b) for b in ('torch', 'pydensecrf'))
    assert np.abs(one - other).max() < 1e-3 and (one.argmax(0) == other.argmax(0)).mean() > .999


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('backend', [pytest.param('pydensecrf', marks=needs_lattice), 'torch'])
def test_read_only_arrays_are_taken(backend):
    image, prob, _ = scene(24, 32, 2); prob.flags.writeable = False
    read = image.copy(); read.flags.writeable = False
    assert np.array_equal(crf.dense_crf(read, prob, backend=backend), crf.dense_crf(image, prob.copy(), backend=backend))


def test_crf_mends_flat_colours():
    image, prob, truth = scene(64, 64, 2)
    assert (crf.dense_crf(image, prob, backend='torch').argmax(0) == truth).mean() > .99 > (prob.argmax(0) == truth).mean()


def test_fallback_warns_once_and_names_the_cure(monkeypatch):
    monkeypatch.setattr(crf, 'find_spec', lambda name: None); crf._warn_fallback.cache_clear()
    image, prob, _ = scene(16, 16, 1)
    with pytest.warns(UserWarning, match='torch backend.*pip install'): crf.dense_crf(image, prob)
    with warnings.catch_warnings(): warnings.simplefilter('error'); crf.dense_crf(image, prob); crf.dense_crf(image, prob, backend='torch')
    assert crf.crf_backend() == 'torch'
    with pytest.raises(ImportError, match='pip install'): crf.dense_crf(image, prob, backend='pydensecrf')
    with pytest.raises(BadInput): crf.crf_backend('pydensecrf')
    crf._warn_fallback.cache_clear()


def plain_energy(image, logits, labels, double=True):
    "The definition, whole kernel at once."
    logits = F.interpolate(logits.double(), size=image.shape[-2:], mode='bilinear', align_corners=False)
    s = F.interpolate(logits.softmax(1), scale_factor=.5, mode='bilinear', align_corners=False); b, c, h, w = s.shape
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing='ij')
    colour = F.interpolate(image.double() * 255, scale_factor=.5) / 15
    f = torch.cat([torch.stack([y, x]).expand(b, 2, h, w) / 50, colour], 1).flatten(2).transpose(1, 2)
    k, s = (-torch.cdist(f, f) ** 2 / 2).exp(), s.flatten(2).transpose(1, 2)
    g = (1 - s.amax(-1)).masked_fill(F.interpolate((labels == 255).double().unsqueeze(1), scale_factor=.5).flatten(1) > 0, 1).unsqueeze(-1)
    return s, -1e-7 / b * (s * g * (k @ s)).sum(), -2e-7 / b * g * (k @ s)


def test_energy_equals_definition():
    image, logits = torch.cat([photo(30, 42), photo(30, 42, 'b')]), torch.randn(2, 4, 8, 10, generator=torch_rng(3)).requires_grad_()
    labels = torch.randint(0, 4, (2, 30, 42), generator=torch_rng(4)); labels[:, 10:20] = 255
    loss = crf.dense_energy(image, logits, labels); loss.backward(); got = logits.grad.clone(); logits.grad = None
    s, value, gradient = plain_energy(image, logits, labels); s.backward(gradient.detach())
    torch.testing.assert_close(loss.double(), value.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(got, logits.grad, rtol=1e-4, atol=1e-3 * logits.grad.abs().max().item())


@pytest.mark.parametrize('kernel, rtol', [('exact', 1e-4), ('lattice', 1e-3)])
def test_energy_golden(kernel, rtol):
    f, want = stored('forward'), stored('losses')['energy.exact_gaussian' if kernel == 'exact' else 'energy.lattice']
    image, labels = denormalise(f['image']), stored('labels')['refined_pseudo_label']
    logits = F.interpolate(f['out.seg'], size=labels.shape[-2:], mode='bilinear', align_corners=False).requires_grad_()
    loss = crf.dense_energy(image, logits, labels, kernel=kernel); loss.backward()
    torch.testing.assert_close(loss.detach().view_as(want), want, rtol=rtol, atol=0)
    half, stored_half = F.avg_pool2d(logits.grad, 2) * 1e6, f['energy.grad_lattice_area_half']
    assert torch.corrcoef(torch.stack([half.flatten(), stored_half.flatten()]))[0, 1] > .9
    if kernel == 'lattice': torch.testing.assert_close(half, stored_half, rtol=0, atol=.02 * stored_half.abs().max().item())


def test_energy_is_float32_under_autocast():
    image, logits, labels = photo(16, 16), torch.randn(1, 3, 4, 4, generator=torch_rng(5)), torch.full((1, 16, 16), 255)
    with torch.autocast('cpu', torch.bfloat16): low = crf.dense_energy(image, logits, labels)
    assert low.dtype == torch.float32 and torch.equal(low, crf.dense_energy(image, logits, labels))
