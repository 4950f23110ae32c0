"VOC and COCO on the exported farm: there and back, every planted fault named, masks never needed by a weak split."
import json, shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wsl_nb.core import BadInput, write_mask
from wsl_nb.data import embedded
from wsl_nb.formats import open_set, read_list, read_xml
from wsl_nb.formats_check import check
from wsl_nb.formats_write import export, instance_masks

ALL = ('image', 'label', 'mask', 'boxes')
QUIET = pytest.mark.filterwarnings('ignore:__array__ implementation:DeprecationWarning')  # of pycocotools with NumPy 2
pytestmark = QUIET


def cut_jpeg(path):
    "Takes the last third of a file away."
    path.write_bytes(path.read_bytes()[:len(path.read_bytes()) * 2 // 3])


def as_colour(path):
    "Saves a palette mask as its colours."
    with Image.open(path) as im: rgb = im.convert('RGB')
    rgb.save(path)


def edit(path, change):
    "Changes a JSON file in place."
    raw = json.loads(path.read_text()); change(raw); path.write_text(json.dumps(raw))


def voc_faults(root, train, val):
    "Fault -> (planting it, words of its finding, file or id that the finding names), for ids of the lists train and val."
    mask, jpeg, xml = (lambda i, f=f, e=e: root/f/f'{i}.{e}' for f, e in (('SegmentationClass', 'png'), ('JPEGImages', 'jpg'), ('Annotations', 'xml')))
    line = lambda name, text: (root/'ImageSets'/'Segmentation'/f'{name}.txt').open('a').write(text + '\n')
    grey = lambda i, value=None: Image.fromarray(np.full((40, 50) if value is None else Image.open(mask(i)).size[::-1], value or 0, np.uint8)).save(mask(i))
    t = train[1]
    def no_mask():
        mask(t).unlink(); (root/'SegmentationClassAug'/mask(t).name).unlink(missing_ok=True)
    return dict(
        colour=(lambda: as_colour(mask(t)), 'palette read as colour', t),
        mask=(no_mask, 'mask missing', t),
        aug=(lambda: as_colour_grey(root/'SegmentationClassAug'/mask(t).name), 'palette read as colour', t),
        size=(lambda: grey(t), 'size mismatch between image and mask', t),
        range=(lambda: grey(t, 200), 'label out of range', t),
        png=(lambda: mask(t).write_bytes(mask(t).read_bytes()[:60]), 'mask not decodable', t),
        jpeg=(lambda: cut_jpeg(jpeg(t)), 'image truncated', t),
        image=(jpeg(t).unlink, 'image missing', t),
        overlap=(lambda: line('train_aug', val[0]), 'overlap of training and validation images (train_aug/val', val[0]),
        overlap_train=(lambda: line('train', f'/JPEGImages/{val[0]}.jpg /SegmentationClassAug/{val[0]}.png'), 'overlap of training and validation images (train/val', val[0]),
        twice=(lambda: line('train', t), 'listed twice (train.txt', t),
        xml=(xml(t).unlink, 'annotation missing', t),
        xml_broken=(lambda: xml(t).write_text('<annotation><object>'), 'annotation not readable', t),
        name=(lambda: xml(t).write_text(xml(t).read_text().replace('<name>', '<name>un', 1)), 'label out of range: object name', t),
        box=(lambda: xml(t).write_text(xml(t).read_text().replace('<xmax>', '<xmax>9', 1)), 'box outside its image', t),
        orphan=(lambda: write_mask(root/'SegmentationClass'/'stranger.png', np.zeros((4, 4), np.uint8)), 'file without an image', 'stranger'),
        empty=(lambda: (root/'ImageSets'/'Segmentation'/'val.txt').write_text(''), 'empty list', 'val.txt'))


def as_colour_grey(path):
    "Saves a grey mask with three channels."
    with Image.open(path) as im: Image.merge('RGB', [im.convert('L')] * 3).save(path)


def coco_faults(root):
    "Fault -> (planting it, words of its finding, what the finding names), for the split train."
    file = next((root/'annotations').glob('instances_train*.json'))
    other = next((root/'annotations').glob('instances_val*.json'))
    folder = root/file.stem.split('_')[1]
    raw = json.loads(file.read_text())
    name, note = raw['images'][0]['file_name'], str(raw['annotations'][0]['id'])
    first = lambda key, value: lambda: edit(file, lambda r: r['annotations'][0].__setitem__(key, value))
    return dict(
        jpeg=(lambda: cut_jpeg(folder/name), 'image truncated', name),
        image=((folder/name).unlink, 'image missing', name),
        mask=(first('segmentation', []), 'mask missing', note),
        region=(first('segmentation', dict(size=[3, 3], counts=[9])), 'size mismatch between image and mask region', note),
        size=(lambda: edit(file, lambda r: r['images'][0].__setitem__('height', 7)), 'size mismatch between image and annotation', name),
        range=(first('category_id', 999), 'label out of range', note),
        box=(first('bbox', [0, 0, 5000, 5]), 'box outside', note),
        stray=(first('image_id', 10 ** 11), 'annotation of an image that is not listed', note),
        twice=(lambda: edit(file, lambda r: r['images'].append(r['images'][0])), 'listed twice', name),
        unlisted=(lambda: shutil.copy(folder/name, folder/'extra.jpg'), 'not in the annotation file', 'extra.jpg'),
        overlap=(lambda: edit(other, lambda r: r['images'].append(raw['images'][0])), 'overlap of training and validation images', name),
        json=(lambda: file.write_text('{"images": ['), 'annotation file not readable', file.name))


def assert_named(root, layout, plant, words, name):
    "After planting, one finding has the words, names the file, and carries a cure."
    plant()
    hits = [f for f in check(root, layout) if words in f.what and name in f.what]
    assert hits and all(f.kind in ('missing', 'surplus', 'broken') and len(f.cure) > 10 for f in hits), [str(f) for f in check(root, layout)]


@pytest.fixture(scope='module')
def farm(tmp_path_factory):
    "A small set and its two exports."
    patch = pytest.MonkeyPatch(); patch.setenv('WSL_NB_CACHE', str(tmp_path_factory.mktemp('cache')))
    data, folder = embedded('hard', train=5, val=3, test=0, size=64), tmp_path_factory.mktemp('exports')
    yield data, export(data, 'voc', folder/'VOC2012'), export(data, 'coco', folder/'coco')
    patch.undo()


@pytest.fixture
def copies(farm, tmp_path):
    "Copies of both exports, to be spoilt."
    return [Path(shutil.copytree(root, tmp_path/root.name)) for root in farm[1:]]


def test_exports_are_clean_and_equal_to_the_farm(farm):
    "Masks, boxes, labels return exactly, images up to JPEG, and the check finds nothing."
    data, voc, coco = farm
    for root, layout in ((voc, 'voc'), (coco, 'coco')):
        assert check(root, layout) == []
        back = open_set(root, layout)
        assert back.classes == data.classes and [len(back.splits[s]) for s in ('train', 'val')] == [5, 3]
        for split in ('train', 'val'):
            for a, b in zip(data.split(split, ALL), back.split(split, ALL)):
                assert all(torch.equal(a[k], b[k]) for k in ('label', 'mask', 'boxes', 'box_labels')) and a['size'] == b['size']
                assert (a['image'] - b['image']).abs().mean() < .04


@pytest.mark.parametrize('fault', list(voc_faults(Path('.'), ['a', 'b'], ['c'])))
def test_voc_faults_are_named(copies, fault):
    "Each planted fault of the VOC export."
    root = copies[0]
    train, val = (read_list(root/'ImageSets'/'Segmentation'/f'{s}.txt') for s in ('train', 'val'))
    assert_named(root, 'voc', *voc_faults(root, train, val)[fault])


@pytest.mark.parametrize('fault', ('jpeg', 'image', 'mask', 'region', 'size', 'range', 'box', 'stray', 'twice', 'unlisted', 'overlap', 'json'))
def test_coco_faults_are_named(copies, fault):
    "Each planted fault of the COCO export."
    assert_named(copies[1], 'coco', *coco_faults(copies[1])[fault])


def test_a_weak_split_needs_no_mask(copies):
    "Every mask deleted: image and label still read, also through a transform; a split with masks says what is missing."
    root = copies[0]
    for kind in ('SegmentationClass', 'SegmentationClassAug'): shutil.rmtree(root/kind)
    data = open_set(root, 'voc')
    assert len([s['label'].sum() for s in data.split('train_aug', ('image', 'label'))]) == 5
    with pytest.raises(BadInput, match='no mask'): data.split('train_aug', ('image', 'mask'))[0]


def test_labels_come_from_the_annotation_unless_asked_otherwise(copies):
    "Difficult objects count; without XML the error names the way out, and the way out works."
    root, want = copies[0], [s['label'] for s in open_set(copies[0], 'voc').split('train', ('label',))]
    for xml in (root/'Annotations').iterdir(): xml.write_text(xml.read_text().replace('<difficult>0', '<difficult>1'))
    assert all(torch.equal(a, b['label']) for a, b in zip(want, open_set(root, 'voc').split('train', ('label',))))
    shutil.rmtree(root/'Annotations')
    with pytest.raises(BadInput, match="labels='masks'"): open_set(root, 'voc').split('train', ('label',))[0]
    assert all(torch.equal(a, b['label']) for a, b in zip(want, open_set(root, 'voc', labels='masks').split('train', ('label',))))


def test_one_split_is_enough_and_both_list_dialects_are_read(copies):
    "Only val; lists with two paths a line."
    voc, coco = copies
    lists = voc/'ImageSets'/'Segmentation'
    ids = read_list(lists/'val.txt')
    (lists/'val.txt').write_text(''.join(f'/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png\n' for i in ids))
    for f in lists.glob('tr*.txt'): f.unlink()
    data = open_set(voc.parent, 'voc')
    assert data.splits == {'val': ids} and len(list(data.split('val', ALL))) == 3
    (coco/'annotations'/'instances_train2017.json').unlink()
    assert list(open_set(coco, 'coco').splits) == ['val'] and check(coco, 'coco') == []


def test_a_crowd_is_255_in_the_mask_and_has_no_box(copies):
    "Crowd as uncompressed RLE; its class stays in the label; smaller instances lie on top."
    file = copies[1]/'annotations'/'instances_val2017.json'
    def change(raw):
        im = raw['images'][0]
        raw['annotations'] = [a for a in raw['annotations'] if a['image_id'] == im['id']][:1]
        raw['annotations'].append(dict(id=77, image_id=im['id'], category_id=8, iscrowd=1, area=64 * 64, bbox=[0, 0, 64, 64], segmentation=dict(size=[64, 64], counts=[0, 64 * 64])))
        raw['annotations'].append(dict(id=78, image_id=im['id'], category_id=7, iscrowd=0, area=4, bbox=[0, 0, 2, 2], segmentation=[[0, 0, 2, 0, 2, 2, 0, 2]]))
    edit(file, change)
    data = open_set(copies[1], 'coco'); s = data.split('val', ALL)[0]
    assert len(data.splits['val']) == 1 and len(s['boxes']) == 2 and s['label'][7] == 1 and 7 not in s['box_labels'].tolist()
    assert (s['mask'] == 255).any() and (s['mask'][:2, :2] == 7).all() and not (s['mask'] == 0).any()
    assert s['boxes'][1].tolist() == [0, 0, 2, 2]


def test_grey_images_have_three_channels(copies):
    "A grey JPEG in either layout."
    for root, layout in zip(copies, ('voc', 'coco')):
        data = open_set(root, layout)
        path = root/'JPEGImages'/f"{data.splits['val'][0]}.jpg" if layout == 'voc' else root/'val2017'/f"{data.splits['val'][0]}.jpg"
        with Image.open(path) as im: grey = im.convert('L')
        grey.save(path)
        assert open_set(root, layout).split('val', ('image',))[0]['image'].shape == (3, 64, 64) and check(root, layout) == []


def test_voc_goes_to_coco_and_back(farm, tmp_path):
    "A set read from disk is exported like any other; regions of VOC are the class pixels in each box."
    voc = open_set(farm[1], 'voc')
    masks = instance_masks(voc, 'train', 0)
    assert len(masks) == len(voc.split('train', ('boxes',))[0]['boxes']) and all(m.any() for m in masks)
    back = open_set(export(voc, 'coco2014', tmp_path/'c'), 'coco2014')
    assert all(torch.equal(a['boxes'], b['boxes']) and torch.equal(a['label'], b['label']) for a, b in zip(voc.split('val', ALL), back.split('val', ALL)))
    assert open_set(export(back, 'voc', tmp_path/'v'), 'voc').classes == voc.classes


def test_a_wrong_folder_is_told_where_we_looked(tmp_path):
    "The error lists the places, and the check turns it into a finding."
    for layout, marker in (('voc', 'VOCdevkit'), ('coco', 'instances_')):
        with pytest.raises(BadInput, match=marker): open_set(tmp_path, layout)
        assert [f.kind for f in check(tmp_path, layout)] == ['missing']
    with pytest.raises(BadInput, match='voc, coco'): open_set(tmp_path, 'papyrus')


def test_boxes_are_one_based_and_inclusive_on_disk_only(farm):
    "A full-width box is 1..W in the XML and 0..W in the sample."
    root = farm[1]
    name = farm[0].splits['train'][0]
    text = (root/'Annotations'/f'{name}.xml').read_text()
    box = read_xml(root/'Annotations'/f'{name}.xml')[2][0]
    assert f'<xmin>{box[0] + 1:g}</xmin>' in text and f'<xmax>{box[2]:g}</xmax>' in text
    assert torch.equal(torch.tensor(box), farm[0].split('train', ('boxes',))[0]['boxes'][0])


def test_the_hash_follows_the_files(copies):
    "Another list or another annotation is another set."
    before = [open_set(r, l).hash for r, l in zip(copies, ('voc', 'coco'))]
    assert before == [open_set(r, l).hash for r, l in zip(copies, ('voc', 'coco'))]
    lists = copies[0]/'ImageSets'/'Segmentation'/'train.txt'; lists.write_text('\n'.join(read_list(lists)[1:]))
    edit(copies[1]/'annotations'/'instances_train2017.json', lambda raw: raw['annotations'].pop())
    assert all(a != b.hash for a, b in zip(before, [open_set(r, l) for r, l in zip(copies, ('voc', 'coco'))]))
