"""CDTR on real photographs (`make real`): DeiT-S at 224 pixels trains on two layouts, is scored under all protocols and boxes own photographs; CLIP ViT-B/32 from a file; CUB's tables with placeholder images.

All weights are random: none were at hand, so the chain is proven and no score is. The heavy part starts every command as a user does, in its own process.
"""
import json, os, shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from test_formats_wsol_real import stem, wsol_rows
from test_real_more import finished, killed_after, photos # noqa: F401 (a fixture)
from wsl_nb import cdtr, cdtr_own
from wsl_nb.boxes import PROTOCOLS
from wsl_nb.cdtr_base import CUB
from wsl_nb.core import file_hash, read_image, write_image
from wsl_nb.formats import open_set
from wsl_nb.training_checkpoint import read_log
from wsl_nb.vit_clip import random_clip

pytestmark = pytest.mark.data
TERMS = {'cls', 'csm', 'area', 'map', 'ski'} # Without CLIP


def real(data_root, name):
    "A folder of the real files."
    if not (data_root/name).is_dir(): pytest.skip(f'no {name} in WSL_NB_DATA')
    return data_root/name


def coco_to_learn_from(data_root, folder):
    "The photographs of `wsol_from_coco`, their one list dealt out to train and test: layout wsol."
    root = Path(shutil.copytree(real(data_root, 'wsol_from_coco'), folder/'coco')); old, = (p.parent for p in root.rglob('localization.txt')); new = old.parent/'train'; new.mkdir()
    names = sorted({l.split(',')[0] for l in (old/'class_labels.txt').read_text().split()})
    for file in sorted(old.iterdir()):
        lines = file.read_text().splitlines(); to = lambda odd: ''.join(f'{l}\n' for l in lines if names.index(l.split(',')[0]) % 2 == odd)
        (new/file.name).write_text(to(0)); file.write_text(to(1))
    return root, len(names) // 2


def imagenet_to_learn_from(data_root, folder):
    "The validation images of ILSVRC, once more in folders of their classes as training images: layout ilsvrc."
    root = Path(shutil.copytree(real(data_root, 'ilsvrc'), folder/'ilsvrc')); data = open_set(root, 'ilsvrc'); split = data.split('test', ('label',)); wnids = list(wnids_of(root))
    for i, s in enumerate(split):
        kind, file = wnids[int(s['label'].argmax())], data.source.path('test', i); (root/'train'/kind).mkdir(parents=True, exist_ok=True); shutil.copy(file, root/'train'/kind/f'{kind}_{i}.JPEG')
    return root, len(split)


def wnids_of(root):
    "Synsets in their order."
    from wsl_nb.formats_ilsvrc import ilsvrc_classes
    return ilsvrc_classes(root)


SETS = dict(coco=(coco_to_learn_from, ['--preset', 'CUB', '--layout', 'wsol', '--eval_split', ''], ['--boxes', 'half-open']), imagenet=(imagenet_to_learn_from, ['--preset', 'ILSVRC'], [])) # How to make it, words of train, words about the folder


@pytest.mark.slow
@pytest.mark.parametrize('name', SETS)
def test_full_width(data_root, photos, tmp_path, name): # noqa: F811
    "DeiT-S, 224 px, RandAugment and erasing, batch 2, every loss but CLIP's: killed after a step, resumed, scored under three protocols with pictures; boxes on three photographs."
    make, preset, about = SETS[name]; (root, images), out, table = make(data_root, tmp_path), tmp_path/'run', []
    train = ['train', 'cdtr', *preset, '--data', root, *about, '--out', out, '--train_split', 'train', '--w_sba', '0', '--batch', '2', '--accumulate', '1', '--epochs', '0', '--steps', '2', '--schedule', 'constant', '--precision', 'fp32', '--checkpoint_every', '1', '--keep_last', '1', '--log_every', '1']
    table.append(('train, killed after a step', killed_after(tmp_path, out, 1, *train), ''))
    text = finished(tmp_path, table, 'train, resumed, to the end', *train, '--resume'); assert 'resume: at step 1' in text and 'deit_s says where' in text
    lines = [l for l in read_log(out) if 'terms' in l]; assert [l['step'] for l in lines] == [0, 1] and all(set(l['terms']) == TERMS and all(np.isfinite(v) for v in l['terms'].values()) for l in lines)
    classes = len(json.loads((out/'classes.json').read_text())); assert lines[0]['terms']['cls'] == pytest.approx(np.log(classes), rel=.15)
    finished(tmp_path, table, f'eval, {images} images, 3 protocols', 'eval', 'cdtr', '--run', out, '--data', root, *about, '--split', 'test', '--protocol', 'all')
    records = json.loads((out/'eval_test_all.json').read_text()); assert {r['images'] for r in records} == {images} and {f'fused Top-1 Loc, {p}' for p in PROTOCOLS} | {'CAM MaxBoxAccV2, wsol', 'attention GT-known Loc, tscam', 'Cls@5, cdtr'} <= {r['metric'] for r in records}
    finished(tmp_path, table, 'eval with pictures', 'eval', 'cdtr', '--run', out, '--data', root, *about, '--split', 'test', '--num-images', '3', '--pictures', tmp_path/'pictures')
    rows = json.loads((tmp_path/'pictures'/'rows.json').read_text()); assert len(rows) == 3 and all((tmp_path/'pictures'/f'{r["id"]}.png').exists() for r in rows)
    finished(tmp_path, table, 'predict, 3 photographs', 'predict', 'cdtr', '--run', out, '--out', tmp_path/'own', *photos.values()); boxes = json.loads((tmp_path/'own'/'boxes.json').read_text()); assert len(boxes) == 12
    sizes = {file.name: read_image(file).shape[:2] for file in photos.values()}
    for b in boxes: x0, y0, x1, y1 = b['xyxy']; assert tuple(b['size']) == sizes[b['file']] and 0 <= x0 < x1 <= b['size'][1] and 0 <= y0 < y1 <= b['size'][0]
    assert (tmp_path/'own'/'report.html').stat().st_size > 1e5; shutil.rmtree(out)
    print(f'\n{name}: {images} images, {classes} classes, DeiT-S, 224 px, batch 2, {min(2, os.cpu_count())} threads')
    for what, seconds, cost in table: print(f'  {what:32} {seconds:7.1f} s   {cost}')


@pytest.mark.slow
def test_one_step_with_clip_from_a_file(data_root, tmp_path, capsys):
    "CLIP ViT-B/32 with random weights, written to a file and read as a released one would be: prompts, six losses, one update; CLIP does not change."
    root, _ = coco_to_learn_from(data_root, tmp_path); file, table = tmp_path/'ViT-B-32.safetensors', []; torch.manual_seed(0)
    save_file({k: v.contiguous() for k, v in random_clip(CUB.clip_model).state_dict().items()}, file); before, out = file_hash(file), tmp_path/'run'
    text = finished(tmp_path, table, 'train, 1 step with CLIP ViT-B/32', 'train', 'cdtr', '--preset', 'CUB', '--layout', 'wsol', '--data', root, '--boxes', 'half-open', '--train_split', 'train', '--eval_split', '', '--clip_file', file, '--out', out, '--batch', '2', '--accumulate', '1', '--epochs', '0', '--steps', '1', '--schedule', 'constant', '--precision', 'fp32', '--log_every', '1')
    assert 'ViT-B-32.safetensors: 302 tensors' in text and file_hash(file) == before
    line, = (l for l in read_log(out) if 'terms' in l); assert set(line['terms']) == TERMS | {'sba'} and line['weights']['sba'] == 2.4 and 0 < line['terms']['sba'] < 9.3 # random towers: the clamp at 1e-4 may hold
    print(f'\n  {table[0][0]:32} {table[0][1]:7.1f} s   {table[0][2]}')


def test_cub_tables_with_placeholder_images(data_root, tmp_path):
    "The official tables, 8 images of their official sizes: DeiT-S boxes them and is scored; the truth in the view is that of the table, its last pixels included."
    root = Path(shutil.copytree(real(data_root, 'cub')/'CUB_200_2011', tmp_path/'CUB_200_2011')); cub = open_set(root, 'cub'); assert (len(cub.splits['trainval']), len(cub.splits['test'])) == (5994, 5794)
    sizes, random = {stem(r.name)[0]: r.size for r in wsol_rows(real(data_root, 'wsol_metadata')/'CUB'/'test')[0]}, np.random.default_rng(0); split = cub.split('test').first(8)
    for i, name in enumerate(split.ids):
        H, W = sizes[name]; picture = random.integers(60, 90, (H, W, 3)).astype(np.uint8); x0, y0, x1, y1 = cub.source.parts['test'].boxes[i][0].astype(int); picture[y0:y1, x0:x1, 0] = 230; write_image(root/'images'/f'{name}.jpg', picture)
    torch.manual_seed(0); model = cdtr.CDTR(CUB, 200).eval(); assert sum(p.numel() for p in model.parameters()) == 23321578
    out = tmp_path/'out'; out.mkdir(); files = cdtr_own.evaluation_files(model, split, CUB, out, PROTOCOLS['tscam']); rows = json.loads((out/'rows.json').read_text()); assert len(rows) == 8 and len(files) == 11
    for i, r in enumerate(rows):
        H, W = sizes[r['id']]; table = cub.source.parts['test'].boxes[i][0].clip(0, [W, H, W, H]) - [0, 0, 1, 1]; assert r['size'] == [224, 224] and np.allclose(r['truth'], [table * [224 / W, 224 / H, 224 / W, 224 / H]], atol=1e-3) and r['target_class'] in r['id']
    from wsl_nb.cdtr_scores import evaluate_protocols
    found = evaluate_protocols(model, split, CUB); assert {r.images for rows_ in found.values() for r in rows_} == {8} and all(r.split == 'test[:8]' for rows_ in found.values() for r in rows_)


def test_boxes_on_photographs_that_ship_with_packages():
    "DeiT-S with random weights on four photographs of scikit-image, one grey: boxes inside, proportions kept, whatever the size."
    data = pytest.importorskip('skimage.data'); torch.manual_seed(0); model = cdtr.CDTR(CUB, 200).eval()
    pictures = [p if p.ndim == 3 else np.repeat(p[..., None], 3, -1) for p in (data.chelsea(), data.coffee(), data.rocket(), data.camera())]; assert {p.shape[2] for p in pictures} == {3}
    for picture, found in zip(pictures, cdtr_own.predict(model, pictures, CUB)):
        (H, W), maps = picture.shape[:2], list(found['maps'].values()); h, w = maps[0].shape; assert abs(np.log(h / w * W / H)) < .12 and 150 < h * w < 250 and len(maps) == 4
        for x0, y0, x1, y1 in found['boxes'].values(): assert 0 <= x0 < x1 <= W and 0 <= y0 < y1 <= H
