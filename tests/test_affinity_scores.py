"Scores of AffinityNet against numbers counted here: constants of the background, mirror images, means over images, protocol, the checkpoint of an ablation."
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from linear_method import LinearConfig
from test_affinity_labels import MEAN, STD
from wsl_nb import affinity_scores, metrics, training_ablate
from wsl_nb import training_checkpoint as disk
from wsl_nb.affinity_base import LAPTOP
from wsl_nb.core import rng, torch_rng


def pictures(n, *size): return list(rng('affinity scores', *size).integers(0, 256, (n, *size, 3), np.uint8))
def normalised(p): return (torch.from_numpy(p.copy()).permute(2, 0, 1).float() / 255 - MEAN) / STD
def mirrored(p): return np.ascontiguousarray(p[:, ::-1])


# --- label maps ----------------------------------------------------------------------------------------------------

def test_each_map_has_the_background_of_its_kind(monkeypatch):
    "CAM: cam_background and no CRF; CAM + CRF: crf_background and a CRF; both with the ids of the classes asked for."
    cfg, cam = replace(LAPTOP, cam_background=.4, crf_background=.1), torch.rand(2, 6, 7, generator=torch_rng('cam'))
    monkeypatch.setattr(affinity_scores, 'class_activation', lambda *args: [cam])
    found, = affinity_scores.score_maps(affinity_scores.Pipeline(), pictures(1, 6, 7), [[2, 5]], cfg, ('CAM', 'CAM + CRF'))
    assert list(found) == ['CAM', 'CAM + CRF']
    for kind, background, refine in (('CAM', .4, False), ('CAM + CRF', .1, True)):
        scores, ids, follows = found[kind]; raw = np.concatenate([np.full((1, 6, 7), background), cam.numpy()])
        assert np.allclose(scores, raw / raw.sum(0), atol=1e-6) and ids.tolist() == [0, 3, 6] and follows is refine


class Left(nn.Module):
    "A classifier that sees the left half of an image alone."
    def __init__(self): super().__init__(); self.cam_head = nn.Conv2d(3, 4, 1, bias=False); nn.init.normal_(self.cam_head.weight, generator=torch_rng('left'))
    def forward(self, image): return self.cam_head(image[..., :image.shape[-1] // 2].mean((2, 3), keepdim=True)).flatten(1)


def test_class_logits_are_the_mean_of_picture_and_mirror_image():
    "A classifier of the left half then knows both halves alike; a picture and its mirror image get the same."
    model, shown = Left().eval(), pictures(2, 8, 10); weight = model.cam_head.weight.detach().flatten(1)
    want = torch.stack([(normalised(p)[..., :5].mean((1, 2)) + normalised(p)[..., 5:].mean((1, 2))) / 2 @ weight.T for p in shown])
    got = affinity_scores.class_logits(model, shown); assert torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(affinity_scores.class_logits(model, [mirrored(p) for p in shown]), got, atol=1e-5)
    assert not torch.allclose(model(torch.stack([normalised(p) for p in shown])), got, atol=.01)


class Leaning(nn.Module):
    "A final network on a grid of 4 pixels that is not symmetric: each cell looks at its right neighbour."
    def __init__(self): super().__init__(); self.conv = nn.Conv2d(3, 3, (1, 2)); nn.init.normal_(self.conv.weight, generator=torch_rng('leaning')); nn.init.normal_(self.conv.bias, generator=torch_rng('bias'))
    def forward(self, image): return 4 * self.conv(F.pad(F.avg_pool2d(image, 4), (0, 1)))


@pytest.mark.parametrize('size', [(8, 16), (9, 13)])
def test_the_mirror_image_of_the_final_network_is_turned_back(size):
    "Mean of what it says about the picture and, turned back, about the mirror image of the padded picture; probabilities at the size of the picture."
    model, (p,) = Leaning().eval(), pictures(1, *size); H, W = size
    x = torch.zeros(1, 3, -(-H // 8) * 8, -(-W // 8) * 8); x[0, :, :H, :W] = normalised(p); back = torch.arange(x.shape[-1] - 1, -1, -1)
    with torch.no_grad(): straight, turned = (F.interpolate(model(v), size=x.shape[-2:], mode='bilinear', align_corners=False).softmax(1) for v in (x, x[..., back]))
    got = affinity_scores.segment_scores(model, [p]); assert got.shape == (1, 3, H, W) and torch.allclose(got.sum(1), torch.ones(1, H, W), atol=1e-5)
    assert torch.allclose(got, ((straight + turned[..., back]) / 2)[..., :H, :W], atol=1e-5) and not torch.allclose(straight, turned[..., back], atol=.1)


# --- numbers -------------------------------------------------------------------------------------------------------

def test_scores_of_two_images_counted_by_hand():
    "First image: one pixel found, one invented, of six. Second: one found as another class, three missed, of eight; a pixel is undecided. The third has no decided pixel."
    tally = affinity_scores.Tally(5)
    for labels, truth in (([1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]), ([3, 0, 0, 0, 0, 0, 0, 0, 1], [2, 2, 2, 2, 0, 0, 0, 0, 255]), ([4, 4], [255, 255])):
        tally.add(np.array([labels], np.uint8), torch.tensor([truth], dtype=torch.uint8))
    rows = {what: value for what, value, unit in tally.rows()}; assert {u for *_, u in tally.rows()} == {'%'}
    # classes: ground 8 right, 1 too few, 3 too many; 1: one right, one too many; 2: none of four; 3: called once; 4 nowhere
    want = {'mIoU': (8 / 12 + 1 / 2 + 0 + 0) / 4, 'mIoU without background': (1 / 2 + 0 + 0) / 3, 'foreground IoU': 2 / 6, 'binary mIoU': (2 / 6 + 8 / 12) / 2, 'precision': 2 / 3, 'recall': 2 / 5, 'F1': 4 / 8,
            'precision, mean over images': (1 / 2 + 1) / 2, 'recall, mean over images': (1 + 1 / 4) / 2, 'F1, mean over images': (2 / 3 + 2 / 5) / 2, 'foreground IoU, mean over images': (1 / 2 + 1 / 4) / 2}
    assert rows == pytest.approx({k: 100 * v for k, v in want.items()})


def test_a_record_says_how_its_map_was_made():
    "Exponents, steps and constants stand where they belong; a border policy is named."
    cfg = replace(LAPTOP, alpha=5., beta=7., walk_steps=11, colour=13., colour_steps=17, cam_background=.3, crf_background=.1); p = affinity_scores.Protocol('predicted', 'border_bg')
    made = {k: affinity_scores.how_made(cfg, p, f'{k} mIoU') for k in affinity_scores.KINDS}
    assert {k: v['threshold'] for k, v in made.items()} == {'CAM': 'background 0.3', 'CAM + CRF': 'background 0.1', 'colour walk': 'alpha 5, beta 7, colours times 13, 17 steps', 'walk': 'alpha 5, beta 7, 11 steps',
                                                           'walk + CRF': 'alpha 5, beta 7, 11 steps', 'final network': 'argmax'}
    assert {k: v['tags'] for k, v in made.items()} == dict.fromkeys(made, 'predicted') | {'final network': 'none'} and {v['border'] for v in made.values()} == {'border_bg'}


# --- the checkpoint of an ablation ---------------------------------------------------------------------------------

def scored(model, split, cfg):
    "The number that a model holds, as a record."
    about = dict(unit='%', images=1, seeds=0, preset='none', config_hash='none', weights_hash='none', data_hash='none', seconds=0., cpu_seconds=0.)
    return [metrics.record('held', 'drawn', 'val', 'number', float(model), **about)]


@pytest.mark.parametrize('which, value', [('best', 4.), ('last', 6.)])
@pytest.mark.parametrize('stages', [False, True])
def test_an_ablation_scores_the_checkpoint_asked_for(tmp_path, stages, which, value):
    "Step 4 was best, step 6 is last; in a run of stages each stage is loaded so."
    class Linear(nn.Module):
        def __init__(self, cfg, classes): super().__init__(); self.register_buffer('held', torch.zeros(()))
        def __float__(self): return float(self.held)
    def train(cfg, data, out, resume):
        (out/'checkpoints').mkdir()
        for step in (2, 4, 6): disk.write_parts(out/'checkpoints'/f'step_{step:06}', {'progress.json': dict(best=dict(step=4)), 'model.safetensors': dict(held=torch.tensor(float(step)))})
    method = SimpleNamespace(train=train, evaluate=scored, Linear=Linear)
    if stages: vars(method).update(STAGES=('classifier',), stage_hashes=lambda cfg, data: dict(classifier='hash'), load_run=lambda run, classes, which='best': (dict(best=4., last=6.)[which], None))
    data, run = SimpleNamespace(classes=['a'], split=lambda name: None), tmp_path/'lr=1'/'seed0'; run.mkdir(parents=True)
    row, = training_ablate.train_and_score(method, LinearConfig(), data, run, 'val', which)
    assert row.value == value and metrics.read_results(run/'scores.json') == [row]
    assert row.run == (f'lr=1/seed0, {which} of each stage' if stages else f'lr=1/seed0/step_{int(value):06}, ' + ('best on val' if which == 'best' else 'last'))
