"The same on copies of real files, in the official layouts. Skips without WSL_NB_DATA."
import json, shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from test_formats import ALL, QUIET, assert_named, coco_faults, voc_faults
from wsl_nb.formats import VOC_CLASSES, open_set, read_list
from wsl_nb.formats_check import check
from wsl_nb.formats_write import export

pytestmark = [pytest.mark.data, QUIET]


@pytest.fixture
def real(data_root):
    "A function from a folder name to the folder, skipping where it is absent."
    def find(name):
        folder = data_root/name
        if not folder.is_dir(): pytest.skip(f'no {name} in WSL_NB_DATA')
        return folder
    return find


def copied(folder, to):
    "A writable copy."
    to = Path(shutil.copytree(folder, to, copy_function=shutil.copyfile))
    for p in (to, *to.rglob('*')): p.chmod(0o755 if p.is_dir() else 0o644)
    return to


def test_real_files_are_clean(real):
    "The check finds nothing in the excerpts."
    for name, layout in (('voc_from_coco', 'voc'), ('coco', 'coco'), ('voc', 'voc')): assert check(real(name), layout) == []


def test_voc_labels_equal_the_published_vectors(real):
    "Labels from the XML equal the pickled file of the excerpt, whatever the order of its keys."
    root = real('voc_from_coco')
    file = next(iter(root.rglob('cls_labels_onehot.npy')), None)
    data = open_set(root, 'voc')
    assert data.classes == VOC_CLASSES and {k: len(v) for k, v in data.splits.items()} == {'train': 12, 'train_aug': 12, 'trainval': 22, 'val': 10}
    if file is None: pytest.skip('no label file in the excerpt')
    published = np.load(file, allow_pickle=True).item()
    for s in data.split('trainval', ('label',)): assert np.array_equal(s['label'].numpy(), published[s['id']]), s['id']


def test_both_dialects_of_the_official_lists(real):
    "10,582 ids, the same in both, none of them in val."
    lists = real('voc_lists')
    paths, bare = read_list(lists/'irn_psa'/'train_aug.txt'), read_list(lists/'transformer_wsss'/'train_aug.txt')
    assert len(paths) == len(bare) == 10582 and set(paths) == set(bare)
    assert not set(bare) & set(read_list(lists/'transformer_wsss'/'val.txt'))


def test_voc_samples(real):
    "Masks keep ids and the 255 border; train_aug reads the borderless grey masks; boxes lie inside the image."
    data = open_set(real('voc_from_coco'), 'voc')
    for s in data.split('train', ALL):
        assert s['mask'].shape == s['size'] == tuple(s['image'].shape[1:]) and (s['mask'] == 255).any()
        assert (s['boxes'][:, 2:] <= torch.tensor(s['size'][::-1])).all() and (s['boxes'] >= 0).all()
        assert set(np.unique(s['mask'])) - {0, 255} <= {int(c) + 1 for c in s['label'].nonzero()}
    border = lambda split: sum(int((s['mask'] == 255).sum()) for s in data.split(split, ('mask',)))
    assert border('train_aug') < border('train')


def test_coco_samples_agree_with_the_annotation_file(real):
    "Labels, boxes and areas recomputed from the JSON by hand."
    root = real('coco')
    data = open_set(root, 'coco')
    raw = json.loads((root/'annotations'/'instances_val2017.json').read_text())
    number = {c['id']: i for i, c in enumerate(sorted(raw['categories'], key=lambda c: c['id']))}
    assert len(data.classes) == 80 and data.classes[0] == 'person' and data.classes[-1] == 'toothbrush'
    for s in data.split('val'):
        notes = [a for a in raw['annotations'] if a['image_id'] == int(s['id'])]
        assert sorted({number[a['category_id']] for a in notes}) == s['label'].nonzero().flatten().tolist()
        single = [a for a in notes if not a['iscrowd']]
        assert len(s['boxes']) == len(single) and len(s['captions']) == 5 and s['mask'].shape == s['size'] == tuple(s['image'].shape[1:])
        assert torch.allclose(s['boxes'][:, 2] - s['boxes'][:, 0], torch.tensor([a['bbox'][2] for a in single]), atol=1e-3)
        covered = sum(a['area'] for a in notes)
        assert (s['mask'] > 0).sum() <= 1.1 * covered + 50
    assert any((s['mask'] == 255).any() for s in data.split('val', ('mask',)))


@pytest.mark.parametrize('fault', list(voc_faults(Path('.'), ['a', 'b'], ['c'])))
def test_voc_faults_are_named(real, tmp_path, fault):
    "Each planted fault, on a copy."
    root = copied(real('voc_from_coco')/'VOCdevkit'/'VOC2012', tmp_path/'VOC2012')
    train, val = (read_list(root/'ImageSets'/'Segmentation'/f'{s}.txt') for s in ('train', 'val'))
    assert_named(root, 'voc', *voc_faults(root, train, val)[fault])


@pytest.mark.parametrize('fault', ('jpeg', 'image', 'mask', 'region', 'size', 'range', 'box', 'stray', 'twice', 'unlisted', 'overlap', 'json'))
def test_coco_faults_are_named(real, tmp_path, fault):
    "Each planted fault, on a copy."
    root = copied(real('coco'), tmp_path/'coco')
    assert_named(root, 'coco', *coco_faults(root)[fault])


def test_a_weak_split_needs_no_mask(real, tmp_path):
    "Real photographs with every mask deleted."
    root = copied(real('voc_from_coco')/'VOCdevkit'/'VOC2012', tmp_path/'VOC2012')
    for kind in ('SegmentationClass', 'SegmentationClassAug', 'SegmentationObject'): shutil.rmtree(root/kind)
    assert all(s['label'].sum() > 0 for s in open_set(tmp_path, 'voc').split('train_aug', ('image', 'label')))


def test_real_sets_are_exported_to_the_other_layout(real, tmp_path):
    "COCO to VOC: labels of single objects, boxes and masks return."
    data = open_set(real('coco'), 'coco')
    back = open_set(export(data, 'voc', tmp_path/'VOC2012'), 'voc')
    for a, b in zip(data.split('val', ('mask', 'boxes')), back.split('val', ('mask', 'boxes'))):
        assert torch.equal(a['mask'], b['mask']) and torch.equal(a['box_labels'], b['box_labels'])
        assert torch.allclose(a['boxes'], b['boxes'], atol=2e-2)
