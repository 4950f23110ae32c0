"Readers and checks of DIOR and NWPU VHR-10: there and back, both folder layouts, every planted fault by name, some classes only, and the command line."
import json, shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from wsl_nb import cli, formats_aerial as aerial
from wsl_nb.core import BadInput, write_image
from wsl_nb.data import embedded
from wsl_nb.formats import open_set
from wsl_nb.formats_check import check
from wsl_nb.formats_write import export, write_lines, write_tree


@pytest.fixture(scope='module')
def farm(tmp_path_factory):
    "Drawn images, and the two folders made of them."
    data, root = embedded('small+hard', train=8, val=4, test=4, size=64), tmp_path_factory.mktemp('aerial')
    return data, {layout: export(data, layout, root/layout) for layout in ('dior', 'vhr10')}


@pytest.fixture
def copy(farm, tmp_path): return lambda layout: Path(shutil.copytree(farm[1][layout], tmp_path/layout)) # A folder to spoil


def objects(*rows, size=64): return dict(size=dict(width=size, height=size), object=[dict(name=n, bndbox=dict(zip(('xmin', 'ymin', 'xmax', 'ymax'), b))) for n, *b in rows]) # As a tree for a horizontal file


# --- there and back ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('layout', ['dior', 'vhr10'])
def test_there_and_back(farm, layout):
    "Boxes, labels, sizes, order and classes are those of the drawn set; trainval is train and val; nothing is wrong."
    data, root = farm[0], farm[1][layout]; read = open_set(root, layout); assert read.classes == data.classes and check(root, layout) == [] and read.layout == layout
    for split in data.splits:
        assert len(read.splits[split]) == len(data.splits[split])
        for i in range(len(data.splits[split])):
            a, b = data.source.read(split, i, 'boxes'), read.source.read(split, i, 'boxes'); assert np.allclose(a[0], b[0]) and list(map(int, a[1])) == b[1] and (data.source.read(split, i, 'label') == read.source.read(split, i, 'label')).all()
            assert read.source.read(split, i, 'image').shape == (64, 64, 3) and read.source.size(split, i) == (64, 64)
    assert read.splits['trainval'] == read.splits['train'] + read.splits['val'] and sum(aerial.count_objects(read, 'test').values()) == sum(len(data.source.read('test', i, 'boxes')[1]) for i in range(4))


def test_both_folder_layouts_of_dior_are_one_set(farm, copy):
    "The earlier experiment's folders: images/trainval, annotations/horizontal, splits."
    old = copy('dior'); new = old.parent/'DIOR'
    for a, b in (('JPEGImages-trainval', 'images/trainval'), ('JPEGImages-test', 'images/test'), ('Annotations/Horizontal Bounding Boxes', 'annotations/horizontal'), ('Annotations/Oriented Bounding Boxes', 'annotations/oriented'), ('ImageSets/Main', 'splits')): (new/b).parent.mkdir(parents=True, exist_ok=True); shutil.move(old/a, new/b)
    shutil.copy(old/'classes.txt', new); a, b = open_set(farm[1]['dior'], 'dior'), open_set(old.parent, 'dior'); assert b.root == str(new) and a.splits == b.splits and check(new, 'dior') == []
    for i in range(8): assert (a.source.read('train', i, 'boxes')[0] == b.source.read('train', i, 'boxes')[0]).all() and (a.source.read('train', i, 'image') == b.source.read('train', i, 'image')).all()


def test_oriented_files_are_another_ground_truth(farm, copy):
    "Told from horizontal ones by what is in them; a set says which it was opened with; mixing is refused on opening, and found by the check."
    root = copy('dior'); upright, turned = (aerial.dior_notes(root, b) for b in ('horizontal', 'oriented')); a, b = open_set(root, 'dior'), open_set(root, 'dior', boxes='oriented'); assert b.name == 'dior, boxes around oriented ones' and a.hash != b.hash and np.allclose(a.source.read('test', 0, 'boxes')[0], b.source.read('test', 0, 'boxes')[0])
    name = a.splits['test'][0]; shutil.copy(turned/f'{name}.xml', upright/f'{name}.xml')
    with pytest.raises(BadInput, match='with oriented boxes') as e: open_set(root, 'dior')
    assert "boxes='oriented'" in e.value.cure; found, = check(root, 'dior'); assert 'oriented boxes among horizontal' in found.what and name in found.what and check(root, 'dior', 'oriented') == []


# --- faults --------------------------------------------------------------------------------------------------------

def test_an_unknown_name_is_an_error_and_no_object_is_dropped(copy):
    "With file and name, on opening and in the check."
    root = copy('dior'); path = aerial.dior_notes(root)/'00002.xml'; write_tree(path, objects(('cat', 1, 1, 9, 9), ('storage tank', 1, 1, 9, 9)))
    with pytest.raises(BadInput, match=r"00002.xml with object names \['storage tank'\]"): open_set(root, 'dior')
    assert any('storage tank' in f.what for f in check(root, 'dior'))


def test_boxes_without_an_extent_are_left_out_and_boxes_outside_are_cut_with_a_line(copy, capsys):
    "As in six official files, and one: counted and named; the rest of the image stays."
    root = copy('dior'); notes = aerial.dior_notes(root); write_tree(notes/'00001.xml', objects(('cat', 5, 6, 5, 20), ('cat', 5, 6, 30, 20), ('duck', 1, 1, 2, 1))); write_tree(notes/'00003.xml', objects(('cat', 60, 1, 66, 9)))
    capsys.readouterr(); data = open_set(root, 'dior'); text = capsys.readouterr().out; assert '2 boxes without width or height left out (00001)' in text and '1 boxes cut at the border (00003)' in text
    at = lambda n: data.source.read('train', data.splits['train'].index(n), 'boxes'); assert at('00001')[0].tolist() == [[5, 6, 30, 20]] and at('00001')[1] == [data.classes.index('cat')] and at('00003')[0].tolist() == [[60, 1, 64, 9]]
    kinds = [f.what.split(' (')[0] for f in check(root, 'dior')]; assert kinds == ['box without width or height, which is left out', 'box outside its image, or empty']


def test_corners_are_taken_as_they_stand(copy, capsys):
    "Swapped corners are no box, and are told; a corner that is no number stops the reader; the fingerprint follows every box and image."
    root = copy('dior'); path = aerial.dior_notes(root)/'00001.xml'; write_tree(path, objects(('cat', 30, 5, 10, 20), ('cat', 1, 2, 30, 40))); capsys.readouterr(); data = open_set(root, 'dior')
    assert '1 boxes without width or height left out (00001)' in capsys.readouterr().out and data.source.read('train', data.splits['train'].index('00001'), 'boxes')[0].tolist() == [[1, 2, 30, 40]] and 'without width or height' in check(root, 'dior')[0].what
    write_tree(path, objects(('cat', 30, 5, 10, 20), ('cat', 2, 2, 30, 40))); moved = open_set(root, 'dior'); (root/'JPEGImages-trainval'/'00002.jpg').unlink(); assert len({data.hash, moved.hash, open_set(root, 'dior').hash}) == 3
    write_tree(path, objects(('cat', 'nan', 5, 10, 20)))
    with pytest.raises(BadInput, match='no finite number'): open_set(root, 'dior')
    assert any('00001.xml' in f.what for f in check(root, 'dior'))


def test_the_seven_official_boxes_are_no_fault_of_a_copy(tmp_path, capsys):
    "Six without an extent and one that ends at 802: left out or cut when opened; the check is silent about one in each of these files, and about no other."
    rows = {n: [('dam', 9, 9, 9, 20), ('ship', 1, 1, 9, 9)] for n in aerial.DIOR_KNOWN['flat']} | {n: [('ship', 780, 5, 802, 20)] for n in aerial.DIOR_KNOWN['frame']}; notes = tmp_path/'Annotations'/'Horizontal Bounding Boxes'; assert len(rows) == 7
    for name, found in rows.items(): write_tree(notes/f'{name}.xml', objects(*found, size=800)); write_image(tmp_path/'JPEGImages-trainval'/f'{name}.jpg', np.zeros((800, 800, 3), np.uint8))
    write_lines(tmp_path/'ImageSets'/'Main'/'train.txt', sorted(rows)); capsys.readouterr(); data = open_set(tmp_path, 'dior'); text = capsys.readouterr().out
    assert '6 boxes without width or height left out' in text and '1 boxes cut at the border (05195)' in text and aerial.count_objects(data, 'train')['dam'] == 0 and data.source.read('train', data.splits['train'].index('05195'), 'boxes')[0].tolist() == [[780, 5, 800, 20]] and check(tmp_path, 'dior') == []
    write_tree(notes/'04137.xml', objects(*rows['04137'], ('dam', 5, 5, 5, 9), size=800)); write_tree(notes/'05195.xml', objects(('ship', 5, 5, 5, 9), size=800)); found, = check(tmp_path, 'dior'); assert '04137.xml, 05195.xml' in found.what


def test_repeated_lines_of_a_list_are_told(copy, capsys):
    root = copy('dior'); file = root/'ImageSets'/'Main'/'train.txt'; file.write_text(file.read_text() + '00001\n'); capsys.readouterr(); data = open_set(root, 'dior')
    assert '1 repeated lines' in capsys.readouterr().out and len(data.splits['train']) == 8


def spoil(root, kind):
    "One fault in a DIOR folder; gives a word of what the check has to say."
    notes, lists, images = aerial.dior_notes(root), root/'ImageSets'/'Main', root/'JPEGImages-trainval'
    if kind == 'image': (images/'00001.jpg').unlink(); return 'image missing'
    if kind == 'jpeg': (images/'00001.jpg').write_bytes(b'no'); return 'truncated'
    if kind == 'xml': (notes/'00001.xml').unlink(); return 'annotation missing'
    if kind == 'broken': (notes/'00001.xml').write_text('<annotation>'); return 'annotation not readable'
    if kind == 'size': write_image(images/'00001.jpg', np.zeros((30, 64, 3), np.uint8)); return 'differs from the image'
    if kind == 'twice': (lists/'train.txt').write_text((lists/'train.txt').read_text() + '00001\n'); return 'listed twice'
    if kind == 'shared': (lists/'test.txt').write_text((lists/'test.txt').read_text() + '00001\n'); return 'overlap'
    if kind == 'orphan': shutil.copy(notes/'00001.xml', notes/'77777.xml'); return 'file without an image'
    if kind == 'extra': shutil.copy(images/'00001.jpg', images/'77777.jpg'); return 'no list names'
    (lists/'val.txt').write_text(''); return 'empty list'


@pytest.mark.parametrize('kind', ['image', 'jpeg', 'xml', 'broken', 'size', 'twice', 'shared', 'orphan', 'extra', 'empty'])
def test_every_fault_of_dior_is_named_with_a_cure(copy, kind):
    root = copy('dior'); word = spoil(root, kind); found = check(root, 'dior'); assert any(word in f.what for f in found) and all(len(f.cure) > 10 for f in found), [str(f) for f in found]


def test_an_image_of_another_size_is_refused_when_it_is_opened(copy):
    root = copy('dior'); write_image(root/'JPEGImages-trainval'/'00001.jpg', np.zeros((30, 64, 3), np.uint8)); data = open_set(root, 'dior')
    with pytest.raises(BadInput, match='as its annotation states'): data.source.read('train', data.splits['train'].index('00001'), 'image')


@pytest.mark.parametrize('line, says', [('(1,2),(3,4)', 'line 2'), ('(1,2),(3,4),99', 'class 99'), ('1 2 3 4 5', 'line 2'), ('(a,2),(3,4),1', 'line 2')])
def test_lines_of_vhr10_that_cannot_be_read_are_named(copy, line, says):
    root = copy('vhr10'); file = root/'ground truth'/'001.txt'; file.write_text(f' ( 1 , 2 ) ,( 30,40 ), 1 \n{line}\n')
    with pytest.raises(BadInput, match=says): open_set(root, 'vhr10')
    assert any('001.txt' in f.what for f in check(root, 'vhr10'))


def spoil_vhr10(root, kind):
    "One fault in an NWPU VHR-10 folder; gives a word of what the check has to say."
    truth, images, negative = (root/name for name in ('ground truth', 'positive image set', 'negative image set'))
    if kind == 'image': (images/'001.jpg').unlink(); return 'image missing'
    if kind == 'jpeg': (images/'001.jpg').write_bytes(b'no'); return 'truncated'
    if kind == 'frame': (truth/'001.txt').write_text('(5,5),(90,20),1\n'); return 'outside its image'
    if kind == 'flat': (truth/'001.txt').write_text('(5,5),(5,20),1\n'); return 'without width or height'
    if kind == 'bare': (truth/'001.txt').write_text('\n'); return 'without an object'
    if kind == 'extra': shutil.copy(images/'001.jpg', images/'777.jpg'); return 'no list names'
    if kind == 'lost': (truth/'001.txt').unlink(); return 'annotation missing'
    if kind in ('twice', 'shared'): (root/'splits'/('train.txt' if kind == 'twice' else 'test.txt')).open('a').write('001\n'); return 'listed twice' if kind == 'twice' else 'overlap'
    negative.mkdir(); file = negative/'001.jpg'
    if kind == 'negative': shutil.copy(images/'002.jpg', file); return 'the picture of 002'
    file.write_bytes(b'no'); return 'truncated'


@pytest.mark.parametrize('kind', ['image', 'jpeg', 'frame', 'flat', 'bare', 'extra', 'lost', 'twice', 'shared', 'negative', 'negative jpeg'])
def test_every_fault_of_vhr10_is_named_with_a_cure(copy, kind):
    root = copy('vhr10'); word = spoil_vhr10(root, kind); found = check(root, 'vhr10'); assert any(word in f.what for f in found) and all(len(f.cure) > 10 and 'masks' not in f.cure for f in found), [str(f) for f in found]


def test_negative_pictures_are_in_no_split_and_files_without_an_object_are_told(copy, capsys):
    "Negative pictures have the numbers of positive ones; a sound folder of them is no fault."
    root = copy('vhr10'); whole = open_set(root, 'vhr10'); write_image(root/'negative image set'/'001.jpg', np.zeros((40, 50, 3), np.uint8)); data = open_set(root, 'vhr10'); assert data.splits == whole.splits and data.hash == whole.hash and data.source.read('train', 0, 'image').shape == (64, 64, 3) and check(root, 'vhr10') == []
    shutil.rmtree(root/'splits'); (root/'ground truth'/'003.txt').write_text(''); capsys.readouterr(); data = open_set(root, 'vhr10'); assert '1 files of ground truth without an object left out (003)' in capsys.readouterr().out and all('003' not in ids for ids in data.splits.values())


def test_vhr10_without_lists_is_dealt_out_by_the_id_alone(copy):
    "The same parts in another folder and order; about 60, 20 and 20 in a hundred of many."
    root = copy('vhr10'); shutil.rmtree(root/'splits'); data = open_set(root, 'vhr10'); assert sum(len(data.splits.get(s, ())) for s in ('train', 'val', 'test')) == 16 and all(aerial.seeded_part(n) == s for s in ('train', 'val', 'test') for n in data.splits.get(s, ()))
    share = Counter(aerial.seeded_part(f'{i:03d}') for i in range(1, 651)); assert abs(share['train'] / 650 - .6) < .04 and abs(share['val'] / 650 - .2) < .04
    (root/'splits').mkdir(); (root/'splits'/'train.txt').write_text('999\n')
    with pytest.raises(BadInput, match='999'): open_set(root, 'vhr10')


def test_a_coco_file_of_vhr10_gives_half_open_boxes(tmp_path):
    "x, y, w, h become edges; other categories are refused."
    kinds = [dict(id=i + 1, name=n) for i, n in enumerate(aerial.VHR10_CLASSES)]; note = dict(images=[dict(id=7, file_name='029.jpg', height=50, width=90)], categories=kinds, annotations=[dict(id=1, image_id=7, category_id=3, bbox=[27., 4, 60, 46], segmentation=[], area=1)])
    (tmp_path/'annotations.json').write_text(json.dumps(note)); data = open_set(tmp_path, 'vhr10'); split = next(iter(data.splits)); assert data.name == 'NWPU VHR-10' and data.source.read(split, 0, 'boxes')[0].tolist() == [[27, 4, 87, 50]] and data.source.read(split, 0, 'boxes')[1] == [2] and data.source.size(split, 0) == (50, 90)
    other = tmp_path/'other'; other.mkdir(); (other/'annotations.json').write_text(json.dumps(note | dict(categories=kinds[1:] + [dict(id=1, name='cat')])))
    with pytest.raises(BadInput, match='categories'): open_set(other, 'vhr10')


# --- some classes --------------------------------------------------------------------------------------------------

def test_only_some_classes_exist_in_some_splits(farm, capsys):
    "Objects, labels and images of the split follow; channels, other splits and the whole set stay; all that is left out is counted."
    data = open_set(farm[1]['dior'], 'dior'); names = ['cat', 'duck']; capsys.readouterr(); some = aerial.only_classes(data, names, ('train',)); text = capsys.readouterr().out; counts = aerial.count_objects(data, 'train')
    assert f'{sum(counts[n] for n in names)} of {sum(counts.values())} objects' in text and some.classes == data.classes and some.splits['test'] == data.splits['test'] and some.hash != data.hash
    assert {c for c, n in aerial.count_objects(some, 'train').items() if n} == {n for n in names if counts[n]} and aerial.count_objects(some, 'train')['cat'] == counts['cat'] and aerial.count_objects(some, 'test') == aerial.count_objects(data, 'test')
    split = some.split('train', ('image', 'label', 'boxes')); assert f'{8 - len(split)} of 8 images lose all objects' in text
    for s in (split[i] for i in range(len(split))): assert set(np.flatnonzero(s['label'])) == set(s['box_labels'].tolist()) <= {data.classes.index(n) for n in names} and len(s['boxes']) == len(s['box_labels']) and s['id'] in data.splits['train']
    with pytest.raises(BadInput, match='zebra'): aerial.only_classes(data, ['zebra'], ('train',))
    with pytest.raises(BadInput, match='noon'): aerial.only_classes(data, names, ('noon',))


# --- command line --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('layout', ['dior', 'vhr10'])
def test_data_make_and_check(tmp_path, capsys, monkeypatch, layout):
    "Drawn images written in the layout by the command, and found complete and sound; a missing image is exit 2."
    monkeypatch.setenv('WSL_NB_CACHE', str(tmp_path/'cache')); out = tmp_path/'set'
    assert cli.main(['data', 'make', 'hard', '--layout', layout, '--out', str(out), '--train', '3', '--val', '2', '--test', '2', '--size', '64']) == 0 and cli.main(['data', 'check', layout, str(out)]) == 0 and 'complete and sound' in capsys.readouterr().out
    next(out.rglob('*.jpg')).unlink(); assert cli.main(['data', 'check', layout, str(out)]) == 2 and 'image missing' in capsys.readouterr().out


def test_the_form_of_boxes_on_the_command_line(farm, capsys):
    assert cli.main(['data', 'check', 'dior', str(farm[1]['dior']), '--boxes', 'oriented']) == 0; capsys.readouterr()
    assert cli.main(['data', 'check', 'dior', str(farm[1]['dior']), '--boxes', 'voc']) == 2 and 'horizontal or oriented' in capsys.readouterr().err
    assert cli.main(['data', 'list']) == 0 and 'vhr10' in capsys.readouterr().out
