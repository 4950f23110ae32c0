"""AffinityNet on real pets: CAMs of a pretrained network against trimaps, and (`make real`) the five stages at real architecture, killed, resumed, scored, and predicting.

The weights are those of an ImageNet MobileNet-V2 beside WSL_NB_DATA, if there are any; ours are trained from noise.
"""
import json, os, shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from test_real_more import finished, killed_after, photos # noqa: F401 (a fixture)
from wsl_nb import affinity
from wsl_nb.affinity_recipe import STAGES
from wsl_nb.core import read_image, read_mask
from wsl_nb.crf import CRFParams, dense_crf
from wsl_nb.formats import open_set
from wsl_nb.training_checkpoint import read_log

pytestmark = pytest.mark.data
CATS_AND_DOGS = [*range(151, 269), *range(281, 286)] # ImageNet indices
SIDES = (225, 353, 449) # 32k + 1, as its padding wants
SIZE = 224 # Of pictures and masks that are compared
PET_CRF = CRFParams(iterations=10, gaussian_sxy=3, gaussian_compat=3, bilateral_sxy=50, bilateral_srgb=5, bilateral_compat=10)


@pytest.fixture(scope='module')
def pets():
    "Twenty pictures at 224 pixels with the pet (1), the ground (0), undecided (255)."
    root = Path(os.environ['WSL_NB_DATA'])/'oxford-iiit-pet'
    if not root.is_dir(): pytest.skip('no oxford-iiit-pet in WSL_NB_DATA')
    data, out = open_set(root, 'pet'), []
    for split in ('trainval', 'test'):
        for s in data.split(split):
            mask = F.interpolate(s['mask'][None, None], size=(SIZE, SIZE), mode='nearest')[0, 0].numpy()
            picture = Image.fromarray(np.ascontiguousarray((255 * s['image']).round().to(torch.uint8).permute(1, 2, 0).numpy())).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            out.append((np.array(picture), np.where((mask > 0) & (mask < 255), 1, mask)))
    assert len(out) == 20
    return out


@pytest.fixture(scope='module')
def mobilenet():
    "Features, and the classifier as a 1x1 convolution."
    from safetensors.torch import load_file
    from torchvision.models import mobilenet_v2
    file = Path(os.environ['WSL_NB_DATA']).parent/'weights'/'mobilenet_v2_imagenet1k_fp16.safetensors'
    if not file.is_file(): pytest.skip('no MobileNet-V2 weights beside WSL_NB_DATA')
    net = mobilenet_v2(weights=None); missing = net.load_state_dict({k: v.float() for k, v in load_file(file).items()}, strict=False)
    assert not missing.unexpected_keys and all(k.endswith('num_batches_tracked') for k in missing.missing_keys)
    head = torch.nn.Conv2d(1280, 1000, 1, bias=False)
    with torch.no_grad(): head.weight.copy_(net.classifier[1].weight[:, :, None, None])
    return net.eval(), head


def signed(image): return 2 * image - 1 # As this network wants its input


def object_iou(found, truth):
    "IoU of the pet, undecided pixels left out."
    known = truth != 255; a, b = found[known], truth[known] == 1
    return (a & b).sum() / (a | b).sum()


@pytest.fixture(scope='module')
def maps(pets, mobilenet):
    "Maps of the best cat or dog class of each picture, five in one call; and how often a cat or dog is the best class of all."
    net, head = mobilenet; kinds, best = [], 0
    with torch.no_grad():
        for picture, _ in pets:
            x = next(affinity.scaled_inputs(picture, (SIDES[0],), lambda size, side: (side, side), signed)); logits = net(x).mean(0)
            kinds.append([CATS_AND_DOGS[int(logits[CATS_AND_DOGS].argmax())]]); best += int(logits.argmax()) in CATS_AND_DOGS
    found = [m for i in range(0, 20, 5) for m in affinity.multi_scale_cam(net.features, head, [p for p, _ in pets[i:i + 5]], kinds[i:i + 5], SIDES, side=lambda size, side: (side, side), prepare=signed)]
    return [m[0].numpy() for m in found], best


def test_cams_of_a_pretrained_network_find_the_pet(pets, maps, record_property):
    "Mean IoU at the best of nine thresholds, which is picked on the same pictures: above 0.60, where the whole picture has 0.31."
    found, best = maps; score = {t: np.mean([object_iou(m > t, mask) for m, (_, mask) in zip(found, pets)]) for t in np.arange(.1, .55, .05).round(2)}
    at = max(score, key=score.get); record_property('mean IoU of the CAM', f'{score[at]:.3f} at threshold {at}, {best} of 20 with a cat or dog as best class')
    everything = np.mean([object_iou(mask < 2, mask) for _, mask in pets])
    assert score[at] >= .60 and everything < .35 and .1 < at < .5, score
    assert all(m.shape == (SIZE, SIZE) and m.min() >= 0 and m.max() == pytest.approx(1, abs=1e-3) for m in found)


def test_the_dense_crf_gives_them_borders(pets, maps, record_property):
    "The same maps beside a constant background score, refined: above 0.72."
    found, _ = maps; score = {}
    for background in (.15, .2): score[background] = np.mean([object_iou(dense_crf(picture, np.stack([np.full_like(m, background), m]), PET_CRF).argmax(0) == 1, mask) for m, (picture, mask) in zip(found, pets)])
    record_property('mean IoU after the CRF', ', '.join(f'{v:.3f} with background {k}' for k, v in score.items()))
    assert max(score.values()) >= .72


@pytest.mark.slow
def test_five_stages_at_real_architecture(data_root, photos, tmp_path): # noqa: F811
    "ResNet-50 (random weights), whole photographs in the maps, crops of 128 px: killed in the second network, resumed, scored under two protocols, three photographs."
    root, out = data_root/'oxford-iiit-pet', tmp_path/'run'
    if not root.is_dir(): pytest.skip('no oxford-iiit-pet in WSL_NB_DATA')
    train = ['train', 'affinity', '--preset', 'PET', '--data', root, '--out', out, '--crop', '128', '--scales', '1', '.5', '--steps', '2', '--batch', '2', '--checkpoint_every', '1', '--log_every', '1', '--eval_images', '1']
    table = [('train, killed in AffinityNet', killed_after(tmp_path, out/'affinity', 1, *train), '')]
    assert (out/'labels'/'result.json').exists() and not (out/'affinity'/'result.json').exists()
    text = finished(tmp_path, table, 'train, resumed, to the end', *train, '--resume')
    assert 'classifier: done' in text and 'labels: done' in text and 'resume: at step 1' in text
    result = json.loads((out/'result.json').read_text()); data = open_set(root, 'pet')
    assert list(result['stages']) == list(STAGES) and result['steps'] == 6 and json.loads((out/'classes.json').read_text()) == list(data.classes)
    for s, terms in dict(classifier={'cls'}, affinity={'bg', 'fg', 'neg'}, segment={'seg'}).items():
        lines = [l for l in read_log(out/s) if 'terms' in l]; assert [l['step'] for l in lines] == [0, 1] and all(set(l['terms']) == terms and all(np.isfinite(v) for v in l['terms'].values()) for l in lines)
    for i in data.splits['train']:
        with np.load(out/'labels'/'files'/f'{i}.npz') as f: assert f['low'].shape == f['high'].shape == f['cam'].shape == (1, *read_image(root/'images'/f'{i}.jpg').shape[:2])
        assert read_mask(out/'pseudo'/'files'/f'{i}.png').shape == read_image(root/'images'/f'{i}.jpg').shape[:2]
    finished(tmp_path, table, 'eval, 1 image, 2 protocols', 'eval', 'affinity', '--run', out, '--data', root, '--num-images', '1', '--protocol', 'label_given,predicted')
    records = json.loads((out/'eval_val_1_label_given,predicted.json').read_text()); assert {'CAM mIoU', 'walk + CRF foreground IoU', 'final network mIoU', 'tags F1'} <= {r['metric'] for r in records} and {r['images'] for r in records} == {1}
    finished(tmp_path, table, 'predict, 3 photographs', 'predict', 'affinity', '--run', out, '--out', tmp_path/'own', *photos.values())
    sizes = [read_image(file).shape[:2] for file in photos.values()]; assert max(map(max, sizes)) > 512 and all(h != w for h, w in sizes)
    for i, (kind, size) in enumerate(zip(photos, sizes)): assert read_mask(tmp_path/'own'/f'{i:03d}_{kind}_labels.png').shape == size
    assert (tmp_path/'own'/'report.html').exists(); shutil.rmtree(out)
    print(f'\nAffinityNet on {len(data.splits["train"])} pets, ResNet-50, crops of 128 px, batch 2, {min(2, os.cpu_count())} threads')
    for what, seconds, cost in table: print(f'  {what:32} {seconds:7.1f} s   {cost}')
