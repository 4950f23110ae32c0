"The same on copies of real files, in the official layouts. Skips without WSL_NB_DATA."
import json, re, shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from test_formats import ALL, QUIET, assert_named, coco_faults, voc_faults
from wsl_nb.data import embedded
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


# --- what we write has the form of the real files ------------------------------------------------------------------------

@pytest.fixture
def written(tmp_path, monkeypatch):
    "A function from a layout to an export of single objects."
    monkeypatch.setenv('WSL_NB_CACHE', str(tmp_path/'cache'))
    return lambda layout: export(embedded('wsol', train=10, val=3, test=3, size=48), layout, tmp_path/layout)


def forms(path, sep=None):
    "The kinds of lines in a list: what each word is, without remarks."
    kind = lambda word: next(k for k, rule in (('int', r'-?\d+'), ('float', r'-?\d+\.\d+'), ('file', r'\S+\.(jpe?g|JPEG)'), ('folder', r'\d{3}\.\S+'), ('word', '.+')) if re.fullmatch(rule, word))
    return {tuple(map(kind, line.split(sep))) for line in path.read_text().splitlines() if line[0] != '#'}


def tags(node, above=''):
    "Every path of tags below an XML node."
    here = f'{above}/{node.tag}'
    return {here}.union(*(tags(child, here) for child in node))


def test_cub_files_have_the_official_form(real, written):
    "Same files, same words in a line, numbers from 1, class folders with their number."
    there, here = real('cub')/'CUB_200_2011', written('cub')
    assert {p.name for p in there.glob('*.txt')} == {p.name for p in here.glob('*.txt')}
    for file in here.glob('*.txt'):
        assert forms(file) == forms(there/file.name), file.name
        assert [root/file.name for root in (there, here) if not (root/file.name).read_text().startswith('1 ') or not (root/file.name).read_text().endswith('\n')] == []
    assert all(re.match(r'\d+ \d{3}\.[^/ ]+/[^/ ]+\.jpg$', line) for root in (there, here) for line in (root/'images.txt').read_text().splitlines())
    assert {line.split()[1] for root in (there, here) for line in (root/'train_test_split.txt').read_text().splitlines()} == {'0', '1'}


def test_cub_boxes_are_corner_and_size(real):
    "The evaluation lists hold corner plus size, cut at the last pixel: width is that of the whole object, from 0."
    tables = [dict(line.split(' ', 1) for line in (real('cub')/'CUB_200_2011'/f'{k}.txt').read_text().splitlines()) for k in ('images', 'bounding_boxes')]
    boxes = {file: list(map(float, tables[1][n].split())) for n, file in tables[0].items()}
    sizes, corners = ({row[0]: list(map(int, row[1:])) for part in ('train', 'test') for row in (line.split(',') for line in (real('wsol_metadata')/'CUB'/part/f'{k}.txt').read_text().splitlines())}
                      for k in ('image_sizes', 'localization'))
    ends = [([x + w, y + h], corners[f][2:], sizes[f]) for f, (x, y, w, h) in boxes.items()]
    assert len(ends) == 11788 and all(list(map(min, end, (W - 1, H - 1))) == seen for end, seen, (W, H) in ends)
    assert sum(end[0] >= size[0] for end, _, size in ends) == 25 and min(b[0] for b in boxes.values()) == 0


def test_wsol_lists_have_the_official_form(real, written):
    "Words of each line as in the public lists of CUB and ILSVRC and in both excerpts."
    here = written('wsol')/'metadata'/'train'
    there = [p for folder in ('wsol_metadata', 'ilsvrc', 'wsol_from_coco') for p in real(folder).rglob('localization.txt')]
    assert len(there) == 6
    for lists in there:
        for key in ('image_ids', 'class_labels', 'image_sizes', 'localization'): assert forms(lists.parent/f'{key}.txt', ',') == forms(here/f'{key}.txt', ','), (lists.parent, key)


def test_wsol_boxes_name_the_last_pixel(real):
    "No box of the public lists reaches the width or height of its image, many end one before, many start at 0."
    count, last, first = 0, 0, 0
    for part in ('CUB/train', 'CUB/test', 'ILSVRC/val'):
        rows = lambda key: (line.split(',') for line in (real('wsol_metadata')/part/f'{key}.txt').read_text().splitlines())
        sizes = {file: (int(w), int(h)) for file, w, h in rows('image_sizes')}
        for file, *box in rows('localization'):
            x0, y0, x1, y1 = map(int, box); W, H = sizes[file]
            assert 0 <= x0 <= x1 < W and 0 <= y0 <= y1 < H
            count += 1; last += x1 == W - 1; first += x0 == 0
    assert (count, last) == (30320, 2239) and first > 1000


def test_pet_files_have_the_official_form(real, written):
    "Lists with four words, remarks in list.txt only, trimaps of the same mode and values; a capital for species 1; breeds count in each species."
    there, here = real('oxford-iiit-pet'), written('pet')
    for name in ('list', 'trainval', 'test'):
        text = [(root/'annotations'/f'{name}.txt').read_text() for root in (there, here)]
        assert forms(there/'annotations'/f'{name}.txt') == forms(here/'annotations'/f'{name}.txt') and len({t[0] == '#' for t in text}) == 1
        for line in ''.join(text).splitlines():
            if line[0] != '#': word, kind, species, breed = line.split(); assert word[0].isupper() == (species == '1') and re.fullmatch(r'.+_\d+', word) and int(breed) <= int(kind)
    for root in (there, here):
        for file in (root/'annotations'/'trimaps').iterdir():
            with Image.open(file) as im, Image.open(root/'images'/f'{file.stem}.jpg') as photo:
                assert im.mode == 'L' and im.size == photo.size and set(np.unique(np.asarray(im)).tolist()) == {1, 2, 3}


def test_dior_files_have_the_official_form(real, written):
    "Same folders, the same tags in both kinds of XML, five digits, whole numbers."
    there, here = real('dior'), written('dior')
    for kind in ('Horizontal', 'Oriented'):
        nodes = [[ET.parse(p).getroot() for p in (root/'Annotations'/f'{kind} Bounding Boxes').glob('*.xml')] for root in (there, here)]
        assert set.union(*map(tags, nodes[0])) == set.union(*map(tags, nodes[1])) and all(tags(n) == tags(nodes[0][0]) for part in nodes for n in part)
        box = 'bndbox' if kind == 'Horizontal' else 'robndbox'
        assert all(re.fullmatch(r'-?\d+', v.text) for part in nodes for n in part for v in n.iterfind(f'object/{box}/*'))
        assert {n.findtext(k) for part in nodes for n in part for k in ('segmented', 'size/depth')} == {'0', '3'}
    for split in ('train', 'val', 'test'): assert forms(there/'ImageSets'/'Main'/f'{split}.txt') == forms(here/'ImageSets'/'Main'/f'{split}.txt') == {('int',)}


def test_coco_files_have_the_official_keys(real, written):
    "Top level, annotation and category records have the same keys; image records have those that any reader needs, and the id of the source."
    there, here = real('coco')/'annotations', written('coco')/'annotations'
    for kind in ('instances', 'captions'):
        a, b = (json.loads((root/f'{kind}_val2017.json').read_text()) for root in (there, here))
        assert set(a) == set(b) and set(a['annotations'][0]) == set(b['annotations'][0]) and set(a.get('categories', [{}])[0]) == set(b.get('categories', [{}])[0])
        assert {k: type(v) for k, v in a['annotations'][0].items() if k not in ('segmentation', 'area', 'bbox')} == {k: type(v) for k, v in b['annotations'][0].items() if k not in ('segmentation', 'area', 'bbox')}
        assert set(b['images'][0]) - set(a['images'][0]) == {'source_id'} and set(b['images'][0]) > {'id', 'file_name', 'height', 'width'}
        assert all(re.fullmatch(r'\d{12}\.jpg', im['file_name']) for part in (a, b) for im in part['images'])


def test_real_photographs_become_a_folder(real, tmp_path):
    "COCO with several classes an image: a CSV; read back, labels are the same."
    data = open_set(real('coco'), 'coco'); back = open_set(export(data, 'folder', tmp_path/'own'), 'folder')
    assert check(tmp_path/'own', 'folder') == [] and back.classes == data.classes
    for split in data.splits:
        for a, b in zip(data.split(split, ('label',)), back.split(split, ('label',))): assert Path(b['id']).name == a['id'] and torch.equal(a['label'], b['label']) and a['size'] == b['size']
