"""MoRe on real files: maps land on their pixels, and (`make real`) ViT-B/16 at 448 pixels trains, is killed, resumes, is scored and predicts.

The heavy part starts every command as a user does, in its own process, and prints seconds and peak memory.
"""
import json, os, shutil, subprocess, sys, time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from training_child import MORE_TINY
from wsl_nb import more, more_recipe, viz
from wsl_nb.core import denormalise, read_image, read_mask
from wsl_nb.training_checkpoint import checkpoints, read_log

pytestmark = pytest.mark.data
PHOTOS = dict(portrait='000000183709', landscape='000000397133', grey='000000205401') # 480 x 640, 640 x 427, 640 x 408 turned grey
SETS = dict(voc_from_coco=('VOC_OFFICIAL', 'voc', []), coco=('COCO_OFFICIAL', 'coco', ['--ptc_from', '0', '--lir_from', '0']))
START = 'import json, resource, sys; from wsl_nb.cli import main; code = main(sys.argv[2:]); r = resource.getrusage(resource.RUSAGE_SELF); json.dump([r.ru_utime + r.ru_stime, r.ru_maxrss], open(sys.argv[1], "w")); sys.exit(code)'


@pytest.fixture
def photos(data_root, tmp_path):
    "Name -> file: a portrait, a landscape, and a file with a single channel."
    folder, out = tmp_path/'photos', {}
    if not (data_root/'coco').is_dir(): pytest.skip('no coco in WSL_NB_DATA')
    folder.mkdir()
    for name, stem in PHOTOS.items():
        image = Image.open(data_root/'coco'/'val2017'/f'{stem}.jpg')
        out[name] = folder/f'{name}.jpg'; (image.convert('L') if name == 'grey' else image).save(out[name])
    assert Image.open(out['grey']).mode == 'L'
    return out


# --- maps land on their pixels -------------------------------------------------------------------------------------

class Eye(more.MoRe):
    "A network that sees colour only: its patches are mean colours, both of its maps mark pure red."
    def __init__(self, cfg):
        super().__init__(replace(cfg, dim=3, heads=1, gcr=False), 1)
        with torch.no_grad(): self.classifier.weight.copy_(torch.tensor([1., -1., -1.]).view(1, 3, 1, 1))

    def features(self, image):
        colour = torch.nn.functional.avg_pool2d(denormalise(image), self.cfg.patch)
        return colour, colour, self.classifier.weight[None, :, :, 0, 0].expand(len(image), -1, -1)


def painted(image, place=(.35, .15, .6, .45)):
    "The image in dull colours with a red box, and the box (top, left, bottom, right) in pixels."
    H, W = image.shape[:2]
    t, l, b, r = (round(p * n) for p, n in zip(place, (H, W, H, W)))
    out = (image.mean(-1, keepdims=True) / 2).astype(np.uint8).repeat(3, -1)
    out[t:b, l:r] = (255, 0, 0)
    return out, (t, l, b, r)


def overlap(found, box):
    "IoU of a mask with a box, and the offset of their centres in pixels."
    truth = np.zeros_like(found); truth[box[0]:box[2], box[1]:box[3]] = True
    y, x = np.nonzero(found)
    return (found & truth).sum() / (found | truth).sum(), max(abs(y.mean() + .5 - (box[0] + box[2]) / 2), abs(x.mean() + .5 - (box[1] + box[3]) / 2))


@pytest.mark.parametrize('name', PHOTOS)
@pytest.mark.parametrize('maps', ['cam', 'lam'])
def test_predicted_maps_lie_on_what_they_mark(photos, name, maps):
    "Through every resize, scale and mirror of `predict`, and in the picture that `wsl-nb predict` draws: the box is found where it is painted."
    cfg = replace(MORE_TINY, crop=448, patch=16, eval_scales=(1., .5, 1.5))
    image, box = painted(read_image(photos[name]))
    found = more_recipe.predict(Eye(cfg).eval(), [image], cfg, maps)[0]
    assert found['labels'].shape == found['maps'].shape[1:] == image.shape[:2]
    patch = 16 * max(image.shape[:2]) / 448
    for mask in (found['maps'][0] > .5, found['labels'] == 1):
        iou, offset = overlap(mask, box)
        assert iou > .8 and offset < patch / 4, (iou, offset)
    figure = viz.draw_maps(image, [found['maps'][0]], ['red'])
    shown = np.asarray(figure.axes[1].images[0].get_array())
    hot = shown[..., 1] > shown[..., 2] + .1
    iou, offset = overlap(hot, tuple(round(v * hot.shape[i % 2] / image.shape[i % 2]) for i, v in enumerate(box)))
    assert iou > .7 and offset < patch / 3, (iou, offset)


@pytest.mark.parametrize('name', PHOTOS)
def test_scored_maps_lie_on_their_masks(photos, name):
    "The same through the square validation view and the masks at the size of the file."
    cfg = replace(MORE_TINY, crop=448, patch=16, eval_scales=(1., .5, 1.5), background=.5)
    image, (t, l, b, r) = painted(read_image(photos[name]))
    mask = torch.zeros(image.shape[:2], dtype=torch.uint8); mask[t:b, l:r] = 1
    sample = more_recipe.eval_transform(cfg)(dict(image=torch.from_numpy(image).permute(2, 0, 1).float() / 255), None)
    sums = more_recipe.tally(more_recipe.infer(Eye(cfg).eval(), sample['image'][None], cfg), dict(label=torch.ones(1, 1), mask=[mask]), cfg)
    for matrix in sums['matrix'][:2]: assert matrix.diagonal()[1] / (matrix[1].sum() + matrix[:, 1].sum() - matrix[1, 1]) > .8


# --- the whole way at full width -----------------------------------------------------------------------------------

def started(folder, *words):
    "A command in its own process, and the file that will hold its peak memory."
    env, note = os.environ | dict(OMP_NUM_THREADS=str(min(2, os.cpu_count()))), folder/f'memory_{len(list(folder.glob("memory_*")))}'
    note.touch()
    return subprocess.Popen([sys.executable, '-c', START, str(note), *map(str, words)], env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True), note


def finished(folder, table, what, *words):
    "Output of a command that must succeed; its cost goes into the table."
    clock = time.perf_counter(); job, note = started(folder, *words)
    text = job.communicate(timeout=3000)[0]
    assert job.returncode == 0, text
    cpu, memory = json.loads(note.read_text())
    table.append((what, time.perf_counter() - clock, f'{cpu:7.1f} CPU-s   {memory / (1e9 if sys.platform == "darwin" else 1e6):5.2f} GB'))
    return text


def killed_after(folder, out, steps, *words):
    "Kills a training as soon as its checkpoint of `steps` updates is there; returns its seconds."
    clock = time.perf_counter(); job, _ = started(folder, *words)
    while job.poll() is None and not any(p.name == f'step_{steps:06d}' for p in checkpoints(out)): time.sleep(.2)
    assert job.poll() is None, job.communicate()[0]
    job.kill(); job.communicate()
    return time.perf_counter() - clock


@pytest.mark.slow
@pytest.mark.parametrize('name', SETS)
def test_full_width(data_root, photos, tmp_path, name):
    "ViT-B/16 (random weights), 448 px, batch 1, every loss active: 4 steps with a kill after 2, scores of 2 images, 3 photographs."
    root, (preset, layout, more_words), out = data_root/name, SETS[name], tmp_path/'run'
    if not root.is_dir(): pytest.skip(f'no {name} in WSL_NB_DATA')
    train = ['train', 'more', '--preset', preset, '--layout', layout, '--data', root, '--out', out, '--train_split', 'train', '--batch', '1', '--steps', '4', '--seg_from', '1',
             '--checkpoint_every', '2', '--keep_last', '1', '--log_every', '1', '--eval_scales', '1', '.5', *more_words]
    table = [('train, killed at step 2', killed_after(tmp_path, out, 2, *train), '')]
    text = finished(tmp_path, table, 'train, resumed, scored on val', *train, '--resume')
    assert 'resume: at step 2' in text and json.loads((out/'result.json').read_text())['steps'] == 4
    lines = [l for l in read_log(out) if 'terms' in l]
    assert [l['step'] for l in lines] == [0, 1, 2, 3] and set(lines[0]['terms']) == {'cls', 'aux', 'mct', 'ptc', 'cre', 'ure'}
    assert all(set(l['terms']) == {'cls', 'aux', 'mct', 'ptc', 'cre', 'ure', 'seg', 'reg'} for l in lines[1:])
    assert lines[0]['terms']['mct'] == pytest.approx(np.log(20 if layout == 'voc' else 80), abs=1e-3)
    finished(tmp_path, table, 'eval, 2 images', 'eval', 'more', '--run', out, '--data', root, '--num-images', '2')
    records = json.loads((out/'eval_val_2.json').read_text())
    assert {'LAM mIoU', 'CAM mIoU', 'decoder mIoU'} <= {r['metric'] for r in records} and {r['images'] for r in records} == {2}
    finished(tmp_path, table, 'predict, 3 photographs', 'predict', 'more', '--run', out, '--out', tmp_path/'own', *photos.values())
    for i, (kind, file) in enumerate(photos.items()):
        H, W = read_image(file).shape[:2]
        assert read_mask(tmp_path/'own'/f'{i:03d}_{kind}_labels.png').shape == (H, W)
    assert (tmp_path/'own'/'report.html').exists()
    shutil.rmtree(out)
    print(f'\n{name}, ViT-B/16, 448 px, batch 1, {min(2, os.cpu_count())} threads; images a second: ' + ' '.join(str(l['images_per_second']) for l in lines))
    for what, seconds, cost in table: print(f'  {what:32} {seconds:7.1f} s   {cost}')
