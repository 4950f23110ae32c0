"COCO captions as the official files are: 31 images of 2017 with five captions each, and the faults that were met, planted on copies."
import json, shutil
from pathlib import Path

import numpy as np
import pytest

from wsl_nb import formats_captions as said
from wsl_nb.core import BadInput
from wsl_nb.data_transforms import resize
from wsl_nb.formats import open_set
from wsl_nb.formats_check import check

pytestmark = pytest.mark.data
PARTS = {'train': 16, 'val': 15}


@pytest.fixture
def real(data_root):
    "Folder of the excerpt."
    if not (data_root/'coco').is_dir(): pytest.skip('no coco in WSL_NB_DATA')
    return data_root/'coco'


@pytest.fixture
def copy(real, tmp_path):
    "A copy that can be changed, with arrays of annotation ids: val becomes dev (7 images) and test (8)."
    root = tmp_path/'coco'; (root/'annotations').mkdir(parents=True)
    for part in PARTS: shutil.copyfile(real/'annotations'/f'captions_{part}2017.json', root/'annotations'/f'captions_{part}2017.json'); shutil.copytree(real/f'{part}2017', root/f'{part}2017', copy_function=shutil.copyfile)
    lists = {n: [] for n in said.ARRAYS}; val = sorted(im['id'] for im in notes(root, 'val')['images'])
    for part in PARTS:
        for a in notes(root, part)['annotations']: lists['train' if part == 'train' else 'dev' if a['image_id'] in val[:7] else 'test'].append(a['id'])
    write(root, lists)
    return root


def notes(root, part): return json.loads((root/'annotations'/f'captions_{part}2017.json').read_text()) # A captions file


def write(root, lists):
    "The arrays."
    for name, ids in lists.items(): np.save(root/'annotations'/f'coco_{name}_ids.npy', np.array(ids, np.int64))


def lists(root): return {n: np.load(root/'annotations'/f'coco_{n}_ids.npy').tolist() for n in said.ARRAYS}


def spoil(root, part, change):
    "Changes a captions file."
    raw = notes(root, part); change(raw); (root/'annotations'/f'captions_{part}2017.json').write_text(json.dumps(raw))


def test_the_excerpt_opens_and_is_sound(real):
    "Sixteen and fifteen images in their stated sizes, five sentences each, nothing to find; the parent folder will do."
    data = open_set(real.parent, 'coco_captions'); assert data.name == 'COCO captions 2017' and {s: len(i) for s, i in data.splits.items()} == PARTS and check(real, 'coco_captions') == []
    for split, ids in data.splits.items():
        assert ids == sorted(ids) and ids == sorted(p.stem for p in (real/f'{split}2017').iterdir())
        for i in range(len(ids)): text = data.source.read(split, i, 'captions'); assert len(text) == 5 and all(c == c.strip() and c for c in text) and data.source.read(split, i, 'image').shape[:2] == tuple(data.source.size(split, i))
    assert set(map(tuple, (data.source.read('val', i, 'captions') for i in range(15)))) == {tuple(a['caption'].strip() for a in notes(real, 'val')['annotations'] if a['image_id'] == im['id']) for im in notes(real, 'val')['images']}


def test_splits_of_the_literature_on_real_ids(copy):
    "Arrays made of the real annotation ids open and are sound; so does Karpathy's form of the same."
    data = open_set(copy, 'coco_captions'); assert {s: len(i) for s, i in data.splits.items()} == dict(train=16, val=7, test=8) and data.name == 'COCO captions 2017, Karpathy splits' and check(copy, 'coco_captions') == []
    rows = [dict(cocoid=int(i), split=s, filename=f'COCO_val2014_{i}.jpg', filepath='val2014', sentids=[], sentences=[]) for s, ids in data.splits.items() for i in ids]; (copy/'dataset_coco.json').write_text(json.dumps(dict(images=rows, dataset='coco'))); again = open_set(copy, 'coco_captions'); assert again.splits == data.splits


FAULTS = {
    'swapped ids': (lambda root: write(root, dict(zip(said.ARRAYS, ([im['id'] for im in notes(root, 'train')['images']], [], *(np.array_split([im['id'] for im in notes(root, 'val')['images']], 2)))))), 'coco_train_ids.npy', 'image ids where annotation ids belong', '16 image ids'),
    'image ids in one array': (lambda root: write(root, lists(root) | dict(dev=[im['id'] for im in notes(root, 'val')['images']][:7])), 'coco_dev_ids.npy', 'image ids where annotation ids belong', '7 image ids'),
    'leaked split': (lambda root: write(root, (old := lists(root)) | dict(test=old['test'] + old['train'][:5])), 'arrays of annotation ids', 'image in two splits', 'in train and test'),
    'empty caption': (lambda root: spoil(root, 'val', lambda raw: raw['annotations'][3].update(caption='')), 'captions_val2017.json', 'caption without a word', 'annotation'),
    'missing image': (lambda root: (root/'train2017'/'000000000790.jpg').unlink(), 'train2017', 'image missing', '000000000790.jpg'),
    'captions of another release': (lambda root: (root/'annotations'/'captions_train2017.json').unlink(), 'coco_train_ids.npy', 'id that the captions files do not have', 'annotation'),
    'an id twice': (lambda root: spoil(root, 'train', lambda raw: raw['annotations'].append(raw['annotations'][0])), 'captions_train2017.json', 'annotation id listed twice', ''),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_planted_faults_each_give_one_clear_message(copy, fault):
    "On real ids; the check finds the same first."
    plant, place, words, case = FAULTS[fault]; plant(copy)
    with pytest.raises(BadInput) as e: open_set(copy, 'coco_captions')
    assert e.value.got.startswith(f'{place} in {copy}: {words}, ') and case in e.value.got and e.value.expected and e.value.cure
    assert check(copy, 'coco_captions')[0].what.startswith(words)


def test_caches_of_real_sentences_and_pictures(real, tmp_path):
    "Tokens without capitals and marks; squares of 224 pixels within half a byte of the transform."
    data = open_set(real, 'coco_captions'); split = data.split('val', ('image', 'captions')); tokens = said.pretokenised(split, tmp_path); assert [len(t) for t in tokens] == [5] * 15 and not any(c.isupper() or c == '.' for own in tokens for t in own for c in t)
    part = said.SquareCache(split, 224, tmp_path).split(); assert part.source.file.stat().st_size == 15 * 224 * 224 * 3 + 128
    for i in range(15): assert (part[i]['image'] - resize(split[i]['image'], (224, 224), 'bicubic')).abs().max() <= .5 / 255 + 1e-6
    assert said.pretokenised(part, tmp_path) == tokens and Path(part.source.file).is_file()
