"Layouts on the exported farm: there and back, every planted fault named, masks never needed by a weak split; own photographs."
import dataclasses, json, shutil
from types import SimpleNamespace
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from wsl_nb import cli_data, formats_write
from wsl_nb.core import BadInput, write_mask
from wsl_nb.data import embedded
from wsl_nb.formats import ENDINGS, LAYOUTS, held_out, open_set, read_list, read_xml
from wsl_nb.formats_check import check
from wsl_nb.formats_write import TRAIN_AUG, WRITERS, build_train_aug, export, instance_masks, train_aug_ids

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
    for layout, marker in (('voc', 'VOCdevkit'), ('coco', 'instances_'), ('folder', 'class folders')):
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


# --- own photographs ---------------------------------------------------------------------------------------------------

def picture(path, value=90, size=(7, 5), **save):
    "A small grey-blue picture."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (value, value, 200)).save(path, **save)
    return path


def classes_of(data, split):
    "Class names of each image, by id."
    return {s['id']: [data.classes[c] for c in s['label'].nonzero().flatten()] for s in data.split(split, ('label',))}


@pytest.fixture
def own(tmp_path):
    "Two classes of four pictures in class folders."
    for kind in ('dog', 'cat'):
        for i in range(4): picture(tmp_path/'pets'/kind/f'{i}.jpg')
    return tmp_path/'pets'


def written(root, text):
    "The folder with a CSV of this text."
    (root/'labels.csv').write_text(text); return root


def test_class_folders_are_read_in_every_ending(tmp_path, capsys):
    "All endings, upper and lower case; hidden files and leftovers of systems are no pictures; names of classes in order."
    root = tmp_path/'zoo'
    for k, ending in enumerate(ENDINGS):
        for kind in ('b', 'A'): picture(root/kind/f'{k}{ending.upper() if kind == "b" else ending}')
    for name in ('.hidden.jpg', 'Thumbs.db', '.DS_Store'): (root/'b'/name).write_bytes(b'x')
    (root/'__MACOSX').mkdir(); (root/'__MACOSX'/'0.jpg').write_bytes(b'x')
    data = open_set(root, 'folder')
    assert (data.name, data.layout, data.classes) == ('zoo', 'folder', ('A', 'b'))
    assert sorted(data.splits['train'] + data.splits['val']) == sorted(f'{kind}/{k}' for kind in 'Ab' for k in range(len(ENDINGS)))
    assert all(s['image'].shape == (3, 5, 7) and s['size'] == (5, 7) for split in data.splits for s in data.split(split))
    assert check(root, 'folder') == []


def test_a_tenth_becomes_val_and_is_announced(own, capsys):
    "One an class of four; the same ids each time; named validation images are left as they are."
    data = open_set(own, 'folder')
    assert capsys.readouterr().out == 'no validation images are named: 2 of 8 training images become val\n'
    assert sorted(i.split('/')[0] for i in data.splits['val']) == ['cat', 'dog'] and open_set(own, 'folder').splits == data.splits
    for split in ('train', 'val'):
        for kind in ('dog', 'cat'): (own/split).mkdir(exist_ok=True); shutil.copytree(own/kind, own/split/kind)
    for kind in ('dog', 'cat'): shutil.rmtree(own/kind)
    capsys.readouterr(); data = open_set(own, 'folder')
    assert {k: len(v) for k, v in data.splits.items()} == dict(train=8, val=8) and capsys.readouterr().out == ''
    assert classes_of(data, 'val')['val/cat/0'] == ['cat']


@pytest.mark.parametrize('seed', range(5))
def test_held_out_images_leave_every_class_one(seed):
    "Random multi-label sets: a tenth or a little more, never all of a class; one at least of each class that has images of its own alone."
    r = np.random.default_rng(seed)
    labels = [tuple(set(r.choice(list('abcde'), r.integers(1, 4), p=[.5, .3, .1, .07, .03]).tolist())) for _ in range(200)] + [('f',), ('g',), ('g',)]
    ids = [f'{seed}-{i}' for i in range(len(labels))]; chosen = held_out(ids, labels)
    for name in 'abcdefg':
        count, taken = sum(name in l for l in labels), sum(name in labels[i] for i in chosen)
        assert taken < count or count == 0
        if name in 'ab': assert taken >= count // 10
        assert taken == {'f': 0, 'g': 1}.get(name, taken)
    assert chosen == held_out(ids, labels) and len(chosen) <= len(labels) // 4


def test_a_class_may_be_called_train(own):
    "A folder `train` with pictures is a class; with class folders it is a split, in which a class may be called train again."
    (own/'dog').rename(own/'train')
    data = open_set(own, 'folder'); assert data.classes == ('cat', 'train') and len(data.splits['train']) == 6
    (own/'all').mkdir(); [(own/k).rename(own/'all'/k) for k in ('cat', 'train')]; (own/'all').rename(own/'train')
    data = open_set(own, 'folder'); assert data.classes == ('cat', 'train') and all(i.startswith('train/') for i in data.splits['train'])


def test_the_order_of_classes_may_be_given(own):
    "classes.txt decides; a class without an image may stand in it, a class that it lacks may not."
    (own/'classes.txt').write_text('dog\n\nbird\ncat\n')
    data = open_set(own, 'folder')
    assert data.classes == ('dog', 'bird', 'cat') and classes_of(data, 'val')[data.splits['val'][0]] in (['dog'], ['cat']) and check(own, 'folder') == []
    (own/'classes.txt').write_text('dog\nbird\n')
    with pytest.raises(BadInput, match=r"classes \['cat'\] that .*classes.txt does not name"): open_set(own, 'folder')


def test_photographs_stand_upright(own):
    "All eight EXIF orientations: size and pixels are those of the turned picture."
    for tag in range(1, 9):
        exif = Image.Exif(); exif[274] = tag
        picture(own/'cat'/'0.jpg', size=(8, 4), exif=exif)
        data = open_set(own, 'folder')
        split, index = next((s, ids.index('cat/0')) for s, ids in data.splits.items() if 'cat/0' in ids)
        want = (8, 4) if tag >= 5 else (4, 8)
        assert data.split(split, ('image',))[index]['image'].shape[1:] == want and data.split(split, ('label',))[index]['size'] == want


def test_a_csv_is_read_as_spreadsheets_write_it(own):
    "Byte order mark, CRLF, other names and order of columns, upper case, backslashes, three separators, pictures in `images`, empty lines."
    picture(own/'images'/'sub'/'x.PNG')
    text = '\ufeffNotes, Class ,SPLIT,FileName\r\n"a, b", cat; dog ,train,cat\\0.jpg\r\n,cat|dog,VAL,dog/1.jpg\r\n\r\n,"cat , dog,cat",Test,sub/x.PNG\r\n,dog,train,dog/2.jpg\r\n,,,\r\n'
    (own/'labels.csv').write_bytes(text.encode())
    data = open_set(own, 'folder')
    assert data.splits == dict(train=['cat/0', 'dog/2'], val=['dog/1'], test=['images/sub/x']) and data.classes == ('cat', 'dog')
    assert [classes_of(data, s) for s in data.splits] == [{'cat/0': ['cat', 'dog'], 'dog/2': ['dog']}, {'dog/1': ['cat', 'dog']}, {'images/sub/x': ['cat', 'dog']}]
    (own/'labels.csv').rename(own/'table.CSV'); assert open_set(own, 'folder').splits == data.splits


LINE = 'image,label,split\ncat/0.jpg,cat,train\n'
BAD_TABLES = dict(
    image=('picture,label\ncat/0.jpg,cat\n', r'image \(image\|file\|filename\)'), label=('image,kind\ncat/0.jpg,cat\n', r'label \(label\|labels\|class\|classes\)'),
    semicolon=('image;label\ncat/0.jpg;cat\n', 'comma-separated'), empty=('', 'with the columns'), none=('image,label\n', 'no image in'),
    cell=(LINE + 'dog/0.jpg,,train\ndog/1.jpg," ; ",val\n', 'line 3, 4: no label'), short=('image,label\ncat/0.jpg,cat\ndog/0.jpg\n', 'line 3: no label'),
    split=(LINE + 'dog/0.jpg,dog,validation\n', 'line 3: a split that is not known'), no_split=(LINE + 'dog/0.jpg,dog,\n', 'line 3: a split that is not known'),
    missing=(LINE + 'dog/9.jpg,dog,val\n', r'1 listed images that are missing \(dog/9.jpg\)'), twice=(LINE + 'dog/0.jpg,dog,val\ncat/0.jpg,dog,val\n', r'two images \(cat/0\)'),
    outside=(LINE + '../dog/0.jpg,dog,val\n', 'line 3: no image path'), absolute=(LINE + '/dog/0.jpg,dog,val\n', 'line 3: no image path'), blank=(LINE + ',dog,val\n', 'line 3: no image path'),
    one=(LINE + 'dog/0.jpg,cat,val\n', 'one class only'))


@pytest.mark.parametrize('fault', BAD_TABLES)
def test_bad_tables_are_named(own, fault):
    "Every fault of a CSV has its message, with the lines, and the check reports it too."
    text, words = BAD_TABLES[fault]; written(own, text)
    with pytest.raises(BadInput, match=words) as e: open_set(own, 'folder')
    assert len(e.value.cure) > 10 and e.value.expected
    found = check(own, 'folder')
    assert found[0].kind in ('broken', 'missing') and (fault == 'missing' or str(e.value.got) in found[0].what)


def test_bad_folders_are_named(own, tmp_path):
    "No image, no class folder, one class, one id twice, images too deep, unreadable endings, another word for a split, several tables, no text."
    def says(words):
        with pytest.raises(BadInput, match=words) as e: open_set(own, 'folder')
        assert check(own, 'folder')[0].kind in ('missing', 'broken') and len(e.value.cure) > 10
    (own/'one.csv').write_bytes('image,label\ncat/0.jpg,ca\u00f1\n'.encode('latin1')); says('no CSV text in UTF-8')
    (own/'two.csv').write_text(LINE); says('2 CSV files'); (own/'one.csv').unlink(); (own/'two.csv').unlink()
    picture(own/'cat'/'0.png'); says(r'two images \(cat/0\)'); (own/'cat'/'0.png').unlink()
    picture(own/'bird'/'2024'/'0.jpg'); says(r"without an image, but with images in its folders \['2024'\]"); shutil.rmtree(own/'bird')
    (own/'bird').mkdir(); (own/'bird'/'IMG_1.HEIC').touch(); says(r'1 files, none with an image ending \(IMG_1.HEIC'); shutil.rmtree(own/'bird')
    picture(own/'train'/'cat'/'0.jpg'); says(r"folders \['cat', 'dog'\] beside \['train'\]"); shutil.rmtree(own/'train')
    shutil.rmtree(own/'dog'); says('one class only'); shutil.move(own/'cat'/'1.jpg', own); shutil.rmtree(own/'cat'); says('no image in a class folder')
    (own/'1.jpg').unlink(); says('without a set in the folder layout')
    with pytest.raises(BadInput, match='without a set'): open_set(tmp_path/'nowhere', 'folder')


def test_the_check_looks_at_every_photograph(own):
    "Truncated, unlisted, in a format that is not read, hollow folder: findings, while the set still opens."
    (own/'cat'/'0.jpg').write_bytes((own/'cat'/'0.jpg').read_bytes()[:300]); picture(own/'loose.jpg'); picture(own/'dog'/'deeper'/'a.jpg')
    (own/'dog'/'a.heic').touch(); (own/'empty').mkdir(); (own/'LICENSE').write_text('free')
    found = {f.what: f for f in check(own, 'folder')}
    assert [(f.kind, what.split(' (')[0]) for what, f in found.items()] == [('broken', 'image truncated or not decodable'), ('surplus', 'file that is not read'),
            ('surplus', 'file in a format that is not read'), ('surplus', 'file that is not read'), ('missing', 'class folder without an image')]
    for name in ('0.jpg', 'loose.jpg', 'a.heic', 'dog/deeper, 1: a.jpg', 'empty'): assert any(name in what for what in found), name
    assert not any('LICENSE' in what for what in found)
    data = open_set(own, 'folder'); split = next(s for s, ids in data.splits.items() if 'cat/0' in ids)
    with pytest.raises(BadInput, match='cannot be decoded'): list(data.split(split))
    with pytest.raises(BadInput, match='fields'): data.split('train', ('image', 'mask'))


def test_the_hash_of_photographs_follows_names_labels_and_sizes(own):
    "Renaming, moving to another class, and another file each give another set; the name of the folder does not."
    hashes = [open_set(own, 'folder').hash]
    (own/'cat'/'0.jpg').rename(own/'cat'/'00.jpg'); hashes.append(open_set(own, 'folder').hash)
    (own/'cat'/'1.jpg').rename(own/'dog'/'9.jpg'); hashes.append(open_set(own, 'folder').hash)
    picture(own/'dog'/'9.jpg', size=(40, 40)); hashes.append(open_set(own, 'folder').hash)
    assert len(set(hashes)) == 4
    own.rename(own.parent/'other'); assert open_set(own.parent/'other', 'folder').hash == hashes[-1]


@pytest.mark.parametrize('preset, form', [('wsol', 'train'), ('hard', 'images')])
def test_the_farm_returns_from_folders(tmp_path, monkeypatch, preset, form):
    "One class an image: class folders; several: a CSV. Labels return exactly, images up to JPEG."
    monkeypatch.setenv('WSL_NB_CACHE', str(tmp_path/'cache'))
    data = embedded(preset, train=6, val=3, test=2, size=48); root = export(data, 'folder', tmp_path/'own')
    assert check(root, 'folder') == [] and (root/form).is_dir() and (root/'labels.csv').exists() == (form == 'images')
    back = open_set(root, 'folder'); assert back.classes == data.classes and list(back.splits) == ['train', 'val', 'test']
    for split in data.splits:
        there, here = ({Path(s['id']).name: s for s in d.split(split, ('image', 'label'))} for d in (data, back))
        assert there.keys() == here.keys()
        for name in there: assert torch.equal(there[name]['label'], here[name]['label']) and (there[name]['image'] - here[name]['image']).abs().mean() < .04


def test_export_to_folders_refuses_what_a_folder_cannot_say(own, tmp_path):
    "Names with separators; images without a class; a set without the usual splits; ids that become one file name."
    data = open_set(own, 'folder')
    change = lambda **k: dataclasses.replace(data, **k)
    for bad, words in ((change(classes=('cat', 'a;b')), 'class names'), (change(splits=dict(trainval=['cat/0'])), 'train, val or test'), (change(splits=dict(train=['cat/0'], val=['cat/0'])), 'occur twice')):
        with pytest.raises(BadInput, match=words): export(bad, 'folder', tmp_path/'out')
    data.source.labels['train'][0] = []
    with pytest.raises(BadInput, match='1 images without a class'): export(data, 'folder', tmp_path/'out')
    with pytest.raises(BadInput, match='without mask, boxes'): export(data, 'voc', tmp_path/'out')
    assert not (tmp_path/'out').exists()


# --- other public layouts, read back by readers of these lines only --------------------------------------------------------

def split_lines(path):
    "Words of each line that is no remark."
    return [line.split() for line in path.read_text().splitlines() if line[0] != '#']


def read_cub(root):
    "Split -> list of (image path, class id, boxes)."
    tables = [dict((n, rest) for n, *rest in split_lines(root/f'{k}.txt')) for k in ('images', 'image_class_labels', 'train_test_split', 'bounding_boxes')]
    out, names = {}, {n: name for n, name in split_lines(root/'classes.txt')}
    for n, ((file,), (kind,), (train,), box) in ((n, [t[n] for t in tables]) for n in sorted(tables[0], key=int)):
        assert names[kind] == file.split('/')[0] and all('.' in v for v in box)
        x, y, w, h = map(float, box)
        out.setdefault({'1': 'train', '0': 'test'}[train], []).append((root/'images'/file, int(kind) - 1, [[x, y, x + w, y + h]]))
    return out


def read_wsol(root):
    "Split -> list of (image path, class id, boxes); sizes are compared with the files, class ids with the order of folders."
    out = {}
    for lists in sorted((root/'metadata').iterdir()):
        rows = {k: [line.split(',') for line in (lists/f'{k}.txt').read_text().splitlines()] for k in ('image_ids', 'class_labels', 'image_sizes', 'localization')}
        kinds, boxes = dict(rows['class_labels']), {}
        for file, *size in rows['image_sizes']:
            with Image.open(root/file) as im: assert im.size == tuple(map(int, size))
        for file, x0, y0, x1, y1 in rows['localization']: boxes.setdefault(file, []).append([int(x0), int(y0), int(x1) + 1, int(y1) + 1])
        out[lists.name] = [(root/file, int(kinds[file]), boxes[file]) for file, in rows['image_ids']]
        names = [line.split()[1] for line in (root/'classes.txt').read_text().splitlines()]
        assert names == sorted(names) and all(path.parent.name == names[kind] for path, kind, _ in out[lists.name])
    return out


def read_pet(root):
    "Split -> list of (image path, class id, species, breed, trimap)."
    out, listed = {}, split_lines(root/'annotations'/'list.txt')
    for split in ('trainval', 'test'):
        rows = split_lines(root/'annotations'/f'{split}.txt'); assert all(row in listed for row in rows)
        for name, kind, species, breed in rows:
            with Image.open(root/'annotations'/'trimaps'/f'{name}.png') as im: assert im.mode == 'L'; values = np.asarray(im)
            assert name[0].isupper() == (species == '1')
            out.setdefault(split, []).append((root/'images'/f'{name}.jpg', int(kind) - 1, int(species), int(breed), values))
    assert len(listed) == sum(map(len, out.values()))
    return out


def read_dior(root, kind):
    "Split -> list of (image path, names, boxes), from upright or turned boxes."
    out = {}
    for split in ('train', 'val', 'test'):
        for name in (root/'ImageSets'/'Main'/f'{split}.txt').read_text().split():
            node = ET.parse(root/'Annotations'/f'{kind} Bounding Boxes'/f'{name}.xml').getroot(); objects = node.findall('object')
            if kind == 'Horizontal': boxes = [[int(o.findtext(f'bndbox/{k}')) for k in ('xmin', 'ymin', 'xmax', 'ymax')] for o in objects]
            else:
                assert {(o.findtext('angle'), o.findtext('type')) for o in objects} == {('0', 'robndbox')}
                boxes = [[int(o.findtext(f'robndbox/{axis}_{at}')) for at in ('left_top', 'right_bottom') for axis in 'xy'] for o in objects]
                for o, (x0, y0, x1, y1) in zip(objects, boxes):
                    assert [int(o.findtext(f'robndbox/{axis}_{at}')) for at in ('right_top', 'left_bottom') for axis in 'xy'] == [x1, y0, x0, y1]
            file = root/('JPEGImages-test' if split == 'test' else 'JPEGImages-trainval')/node.findtext('filename')
            assert len(name) == 5 and file.stem == name
            out.setdefault(split, []).append((file, [o.findtext('name') for o in objects], boxes))
    return out


@pytest.fixture(scope='module')
def animals(tmp_path_factory):
    "One object an image, and its exports in the layouts that ask for that."
    patch = pytest.MonkeyPatch(); patch.setenv('WSL_NB_CACHE', str(tmp_path_factory.mktemp('cache')))
    data, folder = embedded('wsol', train=9, val=4, test=3, size=64), tmp_path_factory.mktemp('official')
    yield data, {layout: export(data, layout, folder/layout) for layout in ('cub', 'wsol', 'pet', 'dior')}
    patch.undo()


def truth(data, *splits):
    "Samples of the splits, one after the other."
    return [s for split in splits for s in data.split(split, ('image', 'label', 'mask', 'boxes'))]


def same_picture(path, sample):
    "Equal up to JPEG."
    with Image.open(path) as im: got = torch.from_numpy(np.array(im)).permute(2, 0, 1) / 255
    return got.shape == sample['image'].shape and (got - sample['image']).abs().mean() < .04


def test_cub_returns(animals):
    "Boxes and labels exactly; val and test are both test; every class is listed."
    data, roots = animals
    found = read_cub(roots['cub'])
    for split, parts in (('train', ['train']), ('test', ['val', 'test'])):
        samples = truth(data, *parts); assert len(samples) == len(found[split])
        for s, (path, kind, boxes) in zip(samples, found[split]):
            assert s['boxes'].tolist() == boxes and s['box_labels'].tolist() == [kind] and path.stem == s['id'] and same_picture(path, s)
    assert split_lines(roots['cub']/'classes.txt') == [[str(k + 1), f'{k + 1:03d}.{c}'] for k, c in enumerate(data.classes)]


def test_wsol_lists_return(animals, copies):
    "Boxes and labels exactly, splits apart; several boxes of one class are several lines."
    data, roots = animals
    found = read_wsol(roots['wsol']); assert list(found) == ['test', 'train', 'val']
    for split in found:
        samples = truth(data, split); assert len(samples) == len(found[split])
        for s, (path, kind, boxes) in zip(samples, found[split]): assert s['boxes'].tolist() == boxes and s['box_labels'].tolist() == [kind] and same_picture(path, s)
    edit(copies[1]/'annotations'/'instances_val2017.json', lambda raw: [a.update(category_id=1) for a in raw['annotations']])
    (copies[1]/'annotations'/'instances_train2017.json').unlink()
    many = open_set(copies[1], 'coco'); found = read_wsol(export(many, 'wsol', copies[1].parent/'w'))['val']
    assert max(len(boxes) for *_, boxes in found) > 1
    for s, (_, kind, boxes) in zip(truth(many, 'val'), found): assert s['boxes'].tolist() == boxes and kind == 0


def test_pet_returns(animals):
    "Classes, species and breeds; the trimap is the mask outside a band of two pixels on each side of the outline."
    data, roots = animals
    found = read_pet(roots['pet']); half = len(data.classes) // 2
    for split, parts in (('trainval', ['train', 'val']), ('test', ['test'])):
        samples = truth(data, *parts); assert len(samples) == len(found[split])
        for s, (path, kind, species, breed, values) in zip(samples, found[split]):
            mask = s['mask'].numpy() > 0; out = np.pad(mask, 2, mode='edge')
            near = [out[y:y + mask.shape[0], x:x + mask.shape[1]] for y in range(5) for x in range(5)]
            assert s['box_labels'].tolist() == [kind] and (species, breed) == (1 + kind // half, 1 + kind % half) and same_picture(path, s)
            assert np.array_equal(values == 1, np.all(near, 0)) and np.array_equal(values == 2, ~np.any(near, 0)) and set(np.unique(values)) == {1, 2, 3}
            assert path.stem.rsplit('_', 1)[0].lower() == data.classes[kind]


def test_dior_returns(farm, tmp_path):
    "Several objects an image: names and boxes exactly, in both box styles."
    data, root = farm[0], export(farm[0], 'dior', tmp_path/'dior')
    (root/'ImageSets'/'Main'/'test.txt').touch()
    for kind in ('Horizontal', 'Oriented'):
        found = read_dior(root, kind); assert {k: len(v) for k, v in found.items()} == dict(train=5, val=3)
        for split in found:
            for s, (path, names, boxes) in zip(truth(data, split), found[split]):
                assert names == [data.classes[k] for k in s['box_labels']] and boxes == s['boxes'].tolist() and same_picture(path, s)
    assert (root/'classes.txt').read_text().split() == list(data.classes)


def test_dior_keeps_test_images_apart(animals):
    "Numbers go on through the splits; images of test lie in a folder of their own."
    data, roots = animals
    found = read_dior(roots['dior'], 'Horizontal'); files = [path for part in found.values() for path, *_ in part]
    assert [int(p.stem) for p in files] == list(range(1, 17)) and [p.parent.name for p in files] == ['JPEGImages-trainval'] * 13 + ['JPEGImages-test'] * 3 and all(p.is_file() for p in files)


def test_captions_of_coco_follow_the_official_schema(farm):
    "Five captions an image, numbered, on the same image records as the instances."
    data, root = farm[0], farm[2]
    for split in ('train', 'val'):
        said, seen = (json.loads((root/'annotations'/f'{kind}_{split}2017.json').read_text()) for kind in ('captions', 'instances'))
        assert set(said) == {'info', 'licenses', 'images', 'annotations'} and said['images'] == seen['images']
        assert all(set(a) == {'id', 'image_id', 'caption'} for a in said['annotations']) and len({a['id'] for a in said['annotations']}) == len(said['annotations'])
        ids = {im['source_id']: im['id'] for im in said['images']}
        for s in data.split(split, ('captions',)): assert [a['caption'] for a in said['annotations'] if a['image_id'] == ids[s['id']]] == s['captions']


@pytest.mark.parametrize('layout', ('cub', 'wsol', 'pet'))
def test_layouts_of_single_objects_refuse_others(farm, tmp_path, layout):
    "Nothing is written; the message counts the images and names the preset that fits."
    with pytest.raises(BadInput, match='without exactly one') as e: export(farm[0], layout, tmp_path/'x')
    assert 'preset wsol' in e.value.cure and not (tmp_path/'x').exists()


@pytest.mark.parametrize('layout', WRITERS)
def test_the_command_line_makes_every_layout(tmp_path, monkeypatch, capsys, layout):
    "`data make` for each layout; those that can be read are clean under `data check`; a refused set leaves the folder usable."
    from wsl_nb import cli
    monkeypatch.setenv('WSL_NB_CACHE', str(tmp_path/'cache')); out = tmp_path/'out'
    if layout in ('cub', 'wsol', 'ilsvrc', 'pet'): assert cli.main(['data', 'make', 'small', '--layout', layout, '--out', str(out), '--train', '2', '--val', '1', '--test', '1', '--size', '48']) == 2
    assert cli.main(['data', 'make', 'wsol', '--layout', layout, '--out', str(out), '--train', '4', '--val', '2', '--test', '2', '--size', '48']) == 0
    assert sum(p.suffix.lower() in ('.jpg', '.jpeg') for p in out.rglob('*')) == 8
    if layout in LAYOUTS: assert cli.main(['data', 'check', layout, str(out)]) == 0, capsys.readouterr().out
    assert cli.main(['data', 'list']) == 0 and layout in capsys.readouterr().out


# --- VOC with SBD ----------------------------------------------------------------------------------------------------------

def write_sbd(folder, train, val, masks):
    "SBD as its archive unpacks: two lists, and for each image a MATLAB file with a struct."
    (folder/'cls').mkdir(parents=True)
    for name, ids in dict(train=train, val=val).items(): (folder/f'{name}.txt').write_text('\n'.join(ids) + '\n')
    for name, mask in masks.items(): savemat(folder/'cls'/f'{name}.mat', dict(GTcls=dict(Segmentation=mask, CategoriesPresent=np.unique(mask[mask > 0]), Boundaries=np.zeros((20, 1), object))), do_compression=True)


@pytest.fixture
def voc_sbd(tmp_path):
    "VOC train a, b; val c; SBD train b, c, d; val e, f. VOC's own masks have a border of 255, those of SBD none. Masks by id."
    voc, sbd, masks = tmp_path/'VOCdevkit'/'VOC2012', tmp_path/'sbd'/'benchmark_RELEASE'/'dataset', {}
    for k, name in enumerate('abcdef'):
        mask = np.zeros((12 + k, 20 - k), np.uint8); mask[2:8, 3:9] = 1 + 3 * k; masks[name] = mask
        Image.fromarray(np.full((*mask.shape, 3), 20 * k, np.uint8)).save((voc/'JPEGImages').mkdir(parents=True, exist_ok=True) or voc/'JPEGImages'/f'{name}.jpg')
        formats_write.write_xml(voc/'Annotations'/f'{name}.xml', mask.shape, [formats_write.VOC_CLASSES[3 * k]], [[3, 2, 9, 8]])
    write_sbd(sbd, 'bcd', 'ef', {n: masks[n] for n in 'bcdef'})
    for name in 'abc': masks[name] = masks[name].copy(); masks[name][1, 3:9] = 255; write_mask(voc/'SegmentationClass'/f'{name}.png', masks[name])
    for name, ids in dict(train='ba', val='c').items(): formats_write.write_lines(voc/'ImageSets'/'Segmentation'/f'{name}.txt', ids)
    return voc, sbd, masks


def test_train_aug_is_voc_train_and_sbd_without_voc_val(voc_sbd, tmp_path, capsys):
    "Ids in order, masks of VOC before those of SBD, plain grey; the set is sound afterwards; from any usual parent; the command says so."
    voc, sbd, masks = voc_sbd
    assert cli_data.data_train_aug(SimpleNamespace(voc=tmp_path, sbd=tmp_path), []) == 0; out = capsys.readouterr().out
    assert 'VOC: train 2, val 1; SBD: train 3, val 2, together 5, of which 1 are in VOC val and left out, 1 in VOC train already' in out and '5 to write' in out and 'are complete' in out
    assert (voc/'ImageSets'/'Segmentation'/'train_aug.txt').read_text() == 'a\nb\nd\ne\nf\n'
    assert sorted(p.name for p in (voc/'SegmentationClassAug').iterdir()) == [f'{n}.png' for n in 'abdef']
    for name in 'abdef':
        with Image.open(voc/'SegmentationClassAug'/f'{name}.png') as im: assert im.mode == 'L' and np.array_equal(np.asarray(im), masks[name])
    data = open_set(voc, 'voc'); assert check(voc, 'voc') == []
    for s in data.split('train_aug', ('image', 'label', 'mask')): assert np.array_equal(s['mask'], masks[s['id']]) and s['label'].nonzero().flatten().tolist() == [int(masks[s['id']][2, 3]) - 1]


def test_train_aug_goes_on_where_it_stopped(voc_sbd, monkeypatch):
    "An interruption leaves whole masks and no list; the next call writes the rest, the one after that nothing."
    voc, sbd, masks = voc_sbd; file, write, done = voc/'ImageSets'/'Segmentation'/'train_aug.txt', formats_write.write_mask, []
    def interrupted(path, *rest, **named):
        if len(done) == 2: raise KeyboardInterrupt
        done.append(path); return write(path, *rest, **named)
    monkeypatch.setattr(formats_write, 'write_mask', interrupted)
    with pytest.raises(KeyboardInterrupt): build_train_aug(voc, sbd, str)
    assert not file.exists() and sorted((voc/'SegmentationClassAug').iterdir()) == sorted(done)
    monkeypatch.undo(); stamps = {p: p.stat().st_mtime_ns for p in done}
    for left in (3, 0):
        said = []; assert build_train_aug(voc, sbd, said.append) == file and f'{5 - left} masks are there, {left} to write' in said[-1]
    assert {p: p.stat().st_mtime_ns for p in done} == stamps and read_list(file) == list('abdef')


def test_a_list_in_the_other_dialect_is_kept(voc_sbd):
    "Two paths a line, another order: the same set, so the file stays as it is, and its masks are made."
    voc, sbd, _ = voc_sbd; file = voc/'ImageSets'/'Segmentation'/'train_aug.txt'
    file.write_text(text := ''.join(f'/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png\n' for n in 'fedba'))
    build_train_aug(voc, sbd, str); assert file.read_text() == text and len(list((voc/'SegmentationClassAug').iterdir())) == 5


def test_another_number_of_images_is_said_loudly(voc_sbd, monkeypatch):
    "With the twenty classes any number but the published one is a warning with both; classes of one's own are not measured by it."
    voc, sbd, _ = voc_sbd
    def warnings(): said = []; build_train_aug(voc, sbd, said.append); return [s for s in said if 'WARNING' in s]
    found, = warnings(); assert '5 images' in found and str(TRAIN_AUG) in found
    monkeypatch.setattr(formats_write, 'TRAIN_AUG', 5); assert warnings() == []
    monkeypatch.undo(); (voc/'classes.txt').write_text('\n'.join(formats_write.VOC_CLASSES)); assert warnings() == []


SBD_FAULTS = dict(
    overlap=(lambda voc, sbd: formats_write.write_lines(voc/'ImageSets'/'Segmentation'/'val.txt', 'cb'), r'1 images in train.txt and in val.txt \(b\)'),
    no_list=(lambda voc, sbd: (voc/'ImageSets'/'Segmentation'/'val.txt').unlink(), 'no .*val.txt'), no_ids=(lambda voc, sbd: (voc/'ImageSets'/'Segmentation'/'val.txt').write_text('\n'), '0 in val.txt'),
    no_sbd=(lambda voc, sbd: (sbd/'val.txt').unlink(), 'without SBD'), no_voc=(lambda voc, sbd: shutil.rmtree(voc/'JPEGImages'), 'without a set in the voc layout'),
    image=(lambda voc, sbd: (voc/'JPEGImages'/'e.jpg').unlink(), r'1 of 5 files missing in .*JPEGImages \(e\)'), mask=(lambda voc, sbd: (sbd/'cls'/'e.mat').unlink(), r'1 of 5 files missing in .*cls \(e\)'),
    cut=(lambda voc, sbd: (sbd/'cls'/'e.mat').write_bytes((sbd/'cls'/'e.mat').read_bytes()[:150]), 'e.mat, which cannot be read'),
    text=(lambda voc, sbd: (sbd/'cls'/'e.mat').write_text('<html>'), 'e.mat, which cannot be read'), other=(lambda voc, sbd: savemat(sbd/'cls'/'e.mat', dict(GTinst=1)), r'e.mat, which cannot be read \(KeyError\)'),
    colours=(lambda voc, sbd: savemat(sbd/'cls'/'e.mat', dict(GTcls=dict(Segmentation=np.zeros((4, 4, 3), np.uint8)))), 'e.mat with uint8 values of shape'),
    range=(lambda voc, sbd: savemat(sbd/'cls'/'e.mat', dict(GTcls=dict(Segmentation=np.full((16, 16), 21, np.uint8)))), r'e.mat with label values \[21\]'),
    size=(lambda voc, sbd: savemat(sbd/'cls'/'e.mat', dict(GTcls=dict(Segmentation=np.ones((4, 4), np.uint8)))), r'a mask \(4, 4\) for e'),
    colour=(lambda voc, sbd: as_colour(voc/'SegmentationClass'/'a.png'), 'colours, not class ids'),
    there=(lambda voc, sbd: write_mask(voc/'SegmentationClassAug'/'d.png', np.zeros((15, 17), np.uint8), palette=False), r'1 masks in .* that differ .*\(d\)'),
    listed=(lambda voc, sbd: (voc/'ImageSets'/'Segmentation'/'train_aug.txt').write_text('a\nb\nc\n'), '3 ids, 4 of them different')) # Fault -> (planting it, words)


@pytest.mark.parametrize('fault', SBD_FAULTS)
def test_train_aug_stops_at_what_is_missing_or_broken(voc_sbd, fault):
    "Every fault has its message with a cure; no list is written, and what was there stays."
    voc, sbd, _ = voc_sbd; plant, words = SBD_FAULTS[fault]; plant(voc, sbd); files = {p: p.read_bytes() for p in voc.rglob('*.*') if p.is_file()}
    with pytest.raises(BadInput, match=words) as e: build_train_aug(voc, sbd, str)
    assert len(e.value.cure) > 10 and e.value.expected and {p: p.read_bytes() for p in files} == files
    assert (voc/'ImageSets'/'Segmentation'/'train_aug.txt').exists() == (fault == 'listed')


@pytest.mark.data
@pytest.mark.parametrize('form', ('irn_psa', 'transformer_wsss'))
def test_train_aug_equals_the_published_list(data_root, tmp_path, form):
    "From the published train and val, and an SBD of the other images with some of val and train mixed in: number, order and ids of the published list, in either dialect."
    folder = data_root/'voc_lists'/form
    if not folder.is_dir(): pytest.skip('no voc_lists in WSL_NB_DATA')
    lists = tmp_path/'ImageSets'/'Segmentation'; lists.mkdir(parents=True)
    for name in ('train', 'val'): shutil.copyfile(folder/f'{name}.txt', lists/f'{name}.txt')
    train, val, published = (read_list(folder/f'{k}.txt') for k in ('train', 'val', 'train_aug'))
    assert len(published) == TRAIN_AUG and published == sorted(published) and set(train) < set(published) and not set(val) & set(published)
    rest = sorted(set(published) - set(train)) + train[::3] + val[::2]; rest = [rest[i] for i in np.random.default_rng(0).permutation(len(rest))]
    write_sbd(tmp_path/'sbd', rest[:6000], rest[5900:], {})
    said = []; assert train_aug_ids(tmp_path, tmp_path/'sbd', said.append) == published
    assert f'together {len(rest)}, of which {len(val[::2])} are in VOC val and left out, {len(train[::3])} in VOC train already' in said[0]
