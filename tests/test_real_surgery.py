"""The localisation head on real annotations (`make real`): forty files of DIOR in both forms and the excerpt of NWPU VHR-10, on generated placeholders with every box drawn; words on aerial and free photographs.

CLIP's weights are random: none were at hand, so the chain is proven and no score is. Every command starts as a user starts it, in its own process.
"""
import json, os, shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from test_real_cdtr import real
from test_real_more import finished, killed_after, photos # noqa: F401 (a fixture)
from wsl_nb.core import read_image, rng, write_image
from wsl_nb.formats import open_set
from wsl_nb.training_checkpoint import read_log
from wsl_nb.vit_clip import random_clip

pytestmark = pytest.mark.data


def placeholder(size, boxes, kinds, key):
    "A noisy ground with every box drawn in the colour of its class, small ones last."
    random = rng('placeholder', key); picture = random.integers(90, 120, (*size, 3)).astype(np.uint8)
    for k in np.argsort([-(b[2] - b[0]) * (b[3] - b[1]) for b in boxes]):
        x0, y0, x1, y1 = boxes[k].round().astype(int); picture[y0:y1, x0:x1] = rng('colour', int(kinds[k])).integers(0, 256, 3)
    return picture


def with_images(data_root, name, layout, folder, **form):
    "A copy of the annotations with a placeholder for every image that is listed."
    root = Path(shutil.copytree(real(data_root, name), folder/name)); data = open_set(root, layout, **form)
    for split in ('train', 'val', 'test'):
        for i, image in enumerate(data.splits[split]): write_image(data.source.path(split, i), placeholder(data.source.size(split, i), *data.source.read(split, i, 'boxes'), image))
    return root


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "A file as RemoteCLIP's is: ViT-B/32, random numbers."
    file = tmp_path_factory.mktemp('weights')/'RemoteCLIP-ViT-B-32.pt'; torch.manual_seed(0); torch.save(random_clip('ViT-B-32').state_dict(), file); return file


SETS = dict(horizontal=('dior', 'dior', [], {}), oriented=('dior', 'dior', ['--boxes', 'oriented'], dict(boxes='oriented')), vhr10=('nwpu_vhr10', 'vhr10', [], {})) # Folder, layout, words about boxes, arguments


@pytest.mark.slow
@pytest.mark.parametrize('kind', SETS)
def test_check_train_and_evaluate(data_root, weights, tmp_path, kind):
    "448 px, grid 56: the check finds nothing, training is killed after a step and resumed, scores and pictures of all held-out images; the earlier head on DIOR's learnt classes, too."
    name, layout, about, form = SETS[kind]; root, out, table = with_images(data_root, name, layout, tmp_path, **form), tmp_path/'run', []; data = open_set(root, layout, **form)
    assert 'complete and sound' in finished(tmp_path, table, 'check', 'data', 'check', layout, root, *about)
    train = ['train', 'surgery', '--preset', 'VHR10' if layout == 'vhr10' else 'DIOR', '--data', root, *about, '--clip_file', weights, '--batch', '2', '--epochs', '0', '--steps', '3', '--warmup', '1', '--precision', 'fp32', '--checkpoint_every', '1', '--log_every', '1', '--eval_split', '']
    table.append(('train, killed after a step', killed_after(tmp_path, out, 1, *train, '--out', out), ''))
    text = finished(tmp_path, table, 'train, resumed, to the end', *train, '--out', out, '--resume'); assert 'QuickGELU' in text
    lines = [l for l in read_log(out) if 'terms' in l]; assert [l['step'] for l in lines] == [0, 1, 2] and all(set(l['terms']) == {'l1', 'giou'} and all(np.isfinite(v) for v in l['terms'].values()) for l in lines)
    finished(tmp_path, table, 'eval', 'eval', 'surgery', '--run', out, '--data', root, *about, '--split', 'test', '--pictures', tmp_path/'pictures')
    summary, rows = (json.loads((tmp_path/'pictures'/f'{n}.json').read_text()) for n in ('summary', 'rows')); objects = sum(len(data.source.read('test', i, 'boxes')[1]) for i in range(len(data.splits['test'])))
    assert summary['metrics']['oracle']['micro']['n'] == objects == sum(len(r['objects']) for r in rows) and len(rows) == len(data.splits['test']) and all((tmp_path/'pictures'/f'{r["id"]}.png').exists() for r in rows)
    if kind == 'horizontal':
        early = ['train', 'surgery', '--preset', 'DIOR_EARLIER', '--data', root, '--clip_file', weights, '--batch', '2', '--epochs', '0', '--steps', '2', '--warmup', '1', '--log_every', '1', '--out', tmp_path/'early']
        text = finished(tmp_path, table, 'train, earlier head', *early); assert 'images lose all objects and are left out' in text and len([l for l in read_log(tmp_path/'early') if 'terms' in l]) == 2
    print(f'\n{kind}: {objects} held-out objects, ViT-B/32, 448 px, batch 2, {min(2, os.cpu_count())} threads')
    for what, seconds, cost in table: print(f'  {what:32} {seconds:7.1f} s   {cost}')


@pytest.mark.slow
def test_words_on_aerial_and_free_photographs(data_root, photos, weights, tmp_path): # noqa: F811
    "Every picture of `remote_sensing`, three photographs of COCO, four of scikit-image: maps, points inside the picture, one page."
    folder, table = tmp_path/'pictures', []; folder.mkdir(); found = sorted(p for p in real(data_root, 'remote_sensing').rglob('*') if p.suffix.lower() in ('.jpg', '.png', '.tif')) + list(photos.values()); assert len(found) >= 5
    for i, p in enumerate(found): shutil.copy(p, folder/f'{i:02d}_{p.name}')
    data = pytest.importorskip('skimage.data')
    for name in ('chelsea', 'coffee', 'rocket', 'camera'): Image.fromarray(getattr(data, name)()).save(folder/f'{name}.png')
    finished(tmp_path, table, f'predict, {len(list(folder.iterdir()))} pictures', 'predict', 'surgery', '--weights', weights, '--classes', 'ship,harbor', '--out', tmp_path/'out', folder)
    rows = json.loads((tmp_path/'out'/'points.json').read_text()); assert len(rows) == 2 * len(list(folder.iterdir()))
    for r in rows:
        h, w = r['size']; assert read_image(folder/r['file'], exif=True).shape[:2] == (h, w) and len(r['inside']) == len(r['outside']) >= 1 and all(0 <= x < w and 0 <= y < h for x, y in r['inside'] + r['outside'])
    for what, seconds, cost in table: print(f'\n  {what:32} {seconds:7.1f} s   {cost}')
