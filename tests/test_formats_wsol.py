"CUB, WSOL lists and ILSVRC: the exported farm read back, each planted fault named, truth that nobody can edit, parts that are missing."
import pickle, re, shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from test_formats import assert_named
from wsl_nb import cli
from wsl_nb.core import BadInput
from wsl_nb.data import embedded
from wsl_nb.formats import LOCATED, held_out, open_set
from wsl_nb.formats_check import check
from wsl_nb.formats_ilsvrc import ilsvrc_classes, truth_lists
from wsl_nb.formats_write import export, write_xml
from wsl_nb.formats_wsol import BOXES, half_open, open_cub, open_wsol, read_synsets, wsol_rows

KEYS = ('label', 'boxes', 'box_labels')


@pytest.fixture(scope='module')
def farm(tmp_path_factory):
    "A set with one object an image, and its three exports."
    patch = pytest.MonkeyPatch(); patch.setenv('WSL_NB_CACHE', str(tmp_path_factory.mktemp('cache')))
    data, folder = embedded('wsol', train=90, val=8, test=10, size=64), tmp_path_factory.mktemp('exports')
    yield data, {layout: export(data, layout, folder/layout) for layout in LOCATED}
    patch.undo()


@pytest.fixture
def copy(farm, tmp_path):
    "A function from a layout to a copy of its export, to be spoilt."
    return lambda layout: Path(shutil.copytree(farm[1][layout], tmp_path/layout))


def change(path, number, text):
    "Another line in place of one, counted from 1; none for None; more for several."
    lines = path.read_text().splitlines(); lines[number - 1:number] = [] if text is None else text.split('\n')
    path.write_text(''.join(f'{line}\n' for line in lines))


def line(path, number):
    "A line, counted from 1."
    return path.read_text().splitlines()[number - 1]


def smaller(path):
    "Saves an image at half its size, as another one of the same name."
    with Image.open(path) as im: half = im.resize((im.width // 2, im.height // 2))
    half.save(path, 'JPEG')


def cub_plants(root):
    "Fault -> (planting it, words of its finding, what the finding names)."
    table = lambda name: root/f'{name}.txt'
    file = line(table('images'), 7).split()[1]; image = root/'images'/file; name = Path(file).name
    other = f'{1 + int(line(table("image_class_labels"), 7).split()[1]) % 8}'
    return dict(
        image=(image.unlink, 'image missing', name),
        jpeg=(lambda: image.write_bytes(image.read_bytes()[:700]), 'image truncated', name),
        extra=(lambda: shutil.copy(image, image.with_name('stranger.jpg')), 'no list names', 'stranger.jpg'),
        table=(table('train_test_split').unlink, 'table missing', 'train_test_split.txt'),
        no_boxes=(table('bounding_boxes').unlink, 'table missing', 'bounding_boxes.txt'),
        no_class=(lambda: change(table('image_class_labels'), 7, None), 'image without a line (image_class_labels.txt', 'id 7'),
        no_split=(lambda: change(table('train_test_split'), 7, None), 'image without a line (train_test_split.txt', 'id 7'),
        no_box=(lambda: change(table('bounding_boxes'), 7, None), 'image without a line (bounding_boxes.txt', 'id 7'),
        stray=(lambda: change(table('bounding_boxes'), 7, line(table('bounding_boxes'), 7) + '\n9999 1 1 5 5'), 'image that is not listed', 'line 8: id 9999'),
        twice=(lambda: change(table('images'), 8, line(table('images'), 7)), 'listed twice', 'line 8: id 7'),
        file_twice=(lambda: change(table('images'), 8, f'8 {file}'), 'listed twice', f'line 8: {file}'),
        class_=(lambda: change(table('image_class_labels'), 7, f'7 {other}'), 'contradicts the folder', 'line 7: id 7'),
        class_range=(lambda: change(table('image_class_labels'), 7, '7 900'), 'contradicts the folder', 'no class'),
        word=(lambda: change(table('image_class_labels'), 7, '7 seven'), 'other words', 'line 7: 7 seven'),
        split=(lambda: change(table('train_test_split'), 7, '7 2'), 'other words', 'line 7: 7 2'),
        number=(lambda: change(table('bounding_boxes'), 7, '7 1 2 three 4'), 'other words', 'line 7: 7 1 2 three'),
        nan=(lambda: change(table('bounding_boxes'), 7, '7 1 2 nan 4'), 'other words', 'line 7: 7 1 2 nan'),
        short=(lambda: change(table('bounding_boxes'), 7, '7 1 2 3'), 'other words', 'line 7: 7 1 2 3'),
        empty=(lambda: change(table('bounding_boxes'), 7, '7 1 2 0 4'), 'outside its image, or empty', 'line 7: id 7'),
        negative=(lambda: change(table('bounding_boxes'), 7, '7 -3 2 9 4'), 'outside its image, or empty', 'line 7: id 7'),
        outside=(lambda: change(table('bounding_boxes'), 7, '7 40 40 60 60'), 'outside its image, or empty', file),
        shrunk=(lambda: smaller(image) or change(table('bounding_boxes'), 7, '7 20 20 40 40'), 'outside its image, or empty', file),
        leaves=(lambda: change(table('images'), 7, '7 ../x.jpg'), 'other words', 'line 7: 7 ../x.jpg'),
        classes=(lambda: change(table('classes'), 2, None), 'other words', 'classes.txt'))


def wsol_plants(root):
    "The same for WSOL lists."
    note = lambda name, split='test': root/'metadata'/split/f'{name}.txt'
    file = line(note('image_ids'), 3); image = root/file; kind = int(line(note('class_labels'), 3).split(',')[1])
    at = next(n for n, l in enumerate(note('localization').read_text().splitlines(), 1) if l.startswith(file))
    return dict(
        image=(image.unlink, 'image missing', image.name),
        all_images=(lambda: shutil.rmtree(root/'test') or [shutil.rmtree(root/s) for s in ('train', 'val')], 'image missing (test, looked in', file),
        jpeg=(lambda: image.write_bytes(image.read_bytes()[:700]), 'image truncated', image.name),
        extra=(lambda: shutil.copy(image, image.with_name('stranger.jpg')), 'no list names', 'stranger.jpg'),
        size=(lambda: smaller(image), 'differs from the image (test/image_sizes.txt', file),
        table=(note('class_labels').unlink, 'table missing', 'class_labels.txt'),
        no_ids=(lambda: note('image_ids').write_text(''), 'empty list', 'image_ids.txt'),
        twice=(lambda: change(note('image_ids'), 4, file), 'listed twice (test/image_ids.txt', file),
        endings=(lambda: change(note('image_ids'), 4, file[:-3] + 'png'), 'listed twice', 'several endings'),
        class_twice=(lambda: change(note('class_labels'), 4, line(note('class_labels'), 3)), 'listed twice (test/class_labels.txt', 'line 4'),
        no_class=(lambda: change(note('class_labels'), 3, None), 'without a line (test/class_labels.txt', file),
        no_size=(lambda: change(note('image_sizes'), 3, None), 'without a line (test/image_sizes.txt', file),
        no_box=(lambda: change(note('localization'), at, None), 'without a line (test/localization.txt', file),
        stray=(lambda: change(note('class_labels'), 3, line(note('class_labels'), 3) + '\nnobody.jpg,1'), 'image that is not listed', 'line 4: nobody.jpg'),
        class_=(lambda: change(note('class_labels'), 3, f'{file},{(kind + 1) % 8}'), 'contradicts the folder', 'line 3'),
        half=(lambda: change(note('class_labels'), 3, f'{file},0.5'), 'other words', 'line 3: class 0.5'),
        negative=(lambda: change(note('class_labels'), 3, f'{file},-1'), 'other words', 'line 3: class -1'),
        word=(lambda: change(note('image_sizes'), 3, f'{file},64,wide'), 'other words', 'line 3'),
        zero=(lambda: change(note('image_sizes'), 3, f'{file},0,64'), 'other words', 'line 3: size 0 x 64'),
        leaves=(lambda: change(note('image_ids'), 3, '../../etc/passwd.jpg'), 'other words', 'line 3'),
        empty=(lambda: change(note('localization'), at, f'{file},9,9,4,4'), 'outside its image, or empty', f'line {at}'),
        outside=(lambda: change(note('localization'), at, f'{file},9,9,90,40'), 'outside its image, or empty', f'line {at}'),
        edge=(lambda: change(note('localization'), at, f'{file},0,0,64,64'), 'as in half-open lists', f'line {at}'),
        shared=(lambda: [shutil.copy(note(k), note(k, 'val')) for k in ('image_ids', 'class_labels', 'image_sizes', 'localization')], 'image in two splits (val/test', file),
        classes=(lambda: (root/'classes.txt').write_text('1 001.cat\n'), 'classes', 'since class ids run to'))


def ilsvrc_plants(root):
    "The same for ILSVRC."
    one, note = root/'list'/'val_boxes.txt', lambda name, split='test': root/'metadata'/split/f'{name}.txt'
    path, kind, *box = line(one, 3).split(); image = root/'val'/Path(path).name; name = image.name
    train, other = next((root/'train').rglob('*.JPEG')), (int(kind) + 1) % 8; v2 = root/line(note('image_ids', 'val'), 2)
    return dict(
        image=(image.unlink, 'image missing (metadata/test', name),
        jpeg=(lambda: image.write_bytes(image.read_bytes()[:700]), 'image truncated', name),
        train=(lambda: train.write_bytes(b'GIF'), 'image truncated', train.name),
        untrue=(lambda: shutil.copy(image, root/'val'/'stranger.JPEG'), 'image without a box', 'stranger.JPEG'),
        copy=(lambda: (root/'val'/'n00000001').mkdir() or shutil.copy(image, root/'val'/'n00000001'/name), 'listed twice', name),
        folder=(lambda: (root/'val'/f'n{other + 1:08d}').mkdir() or image.rename(root/'val'/f'n{other + 1:08d}'/name), 'contradicts the folder (val', name),
        strange=(lambda: (root/'train'/'birds').mkdir(), 'folder that is no class', 'birds'),
        hollow=(lambda: [p.unlink() for p in train.parent.iterdir()], 'class folder without an image', train.parent.name),
        size=(lambda: smaller(image), 'differs from the image (metadata/test', name),
        v2=(lambda: smaller(v2), 'differs from the image (val/image_sizes.txt', v2.name),
        v2_image=(v2.unlink, 'image missing', v2.name),
        v2_class=(lambda: change(note('class_labels', 'val'), 2, f'{line(note("image_ids", "val"), 2)},8'), 'other words', 'class 8 of 8'),
        test_class=(lambda: change(note('class_labels'), 2, f'{line(note("image_ids"), 2)},8'), 'other words', 'class 8 of 8'),
        partial=((root/'synsets.txt').unlink, 'no file names them (val/class_labels.txt', '8 class folders of 1000'),
        class_=(lambda: change(one, 3, ' '.join([path, str(other), *box])), 'contradicts the folder (val_boxes.txt', 'line 3'),
        lists=(lambda: change(one, 3, ' '.join([name, str(other), *box])), 'two lists differ', name),
        range=(lambda: change(one, 3, ' '.join([path, '8', *box])), 'other words', 'line 3'),
        word=(lambda: change(one, 3, f'{path} {kind} 1 2 three 4'), 'other words', 'line 3'),
        several=(lambda: change(one, 3, f'{path} {kind} 1 2 3 4 1 2 5 6'), 'other words', 'line 3'),
        twice=(lambda: change(one, 4, line(one, 3)), 'listed twice', 'line 4'),
        empty=(lambda: change(one, 3, f'{path} {kind} 9 9 4 4'), 'outside its image, or empty', 'line 3'),
        outside=(lambda: change(one, 3, f'{path} {kind} 40 40 200 200'), 'outside its image, or empty', name),
        unnamed=(lambda: (root/'train'/'n99999999').mkdir(), 'class folders that', 'n99999999'),
        synsets=(lambda: change(root/'synsets.txt', 2, '7 n00000002 x'), 'numbers out of order', 'line 2'))


PLANTS = dict(cub=cub_plants, wsol=wsol_plants, ilsvrc=ilsvrc_plants)
NAMES = dict(cub=('image jpeg extra table no_boxes no_class no_split no_box stray twice file_twice class_ class_range word split number nan short empty negative outside shrunk leaves classes').split(),
             wsol=('image all_images jpeg extra size table no_ids twice endings class_twice no_class no_size no_box stray class_ half negative word zero leaves empty outside edge shared classes').split(),
             ilsvrc=('image jpeg train untrue copy folder strange hollow size v2 v2_image v2_class test_class partial class_ lists range word several twice empty outside unnamed synsets').split())


@pytest.mark.parametrize('layout, fault', [(layout, fault) for layout, faults in NAMES.items() for fault in faults])
def test_faults_are_named(copy, layout, fault):
    "A clean export has no finding; each planted fault is one."
    root = copy(layout); plants = PLANTS[layout](root)
    assert list(plants) == NAMES[layout] and check(root, layout) == []
    assert_named(root, layout, *plants[fault])


@pytest.mark.parametrize('layout, fault', [('cub', f) for f in 'table no_class no_split no_box stray twice file_twice class_ class_range word split number nan short empty negative leaves classes'.split()]
                         + [('wsol', f) for f in 'table no_ids twice endings no_class no_size no_box stray class_ half negative zero leaves empty outside edge shared classes'.split()]
                         + [('ilsvrc', f) for f in 'copy folder v2_class test_class partial unnamed synsets'.split()])
def test_faults_of_lists_stop_the_reader(copy, layout, fault):
    "What would give wrong labels or boxes is an error that names file or line, though no image was opened."
    root = copy(layout); plant, _, name = PLANTS[layout](root)[fault]; plant()
    with pytest.raises(BadInput) as e: open_set(root, layout)
    assert name in str(e.value) and e.value.cure


@pytest.mark.parametrize('fault', 'class_ range word several twice empty'.split())
def test_faults_of_the_list_of_one_box_stop_who_asks_for_it(copy, fault):
    "The other list still opens."
    root = copy('ilsvrc'); plant, words, name = ilsvrc_plants(root)[fault]; plant(); open_set(root, 'ilsvrc')
    with pytest.raises(BadInput, match=name) as e: open_set(root, 'ilsvrc', truth='one')
    assert 'val_boxes.txt' in e.value.got


# --- there and back --------------------------------------------------------------------------------------------------

def by_name(split):
    "Samples by file name."
    return {s['id'].rpartition('/')[2]: s for s in split}


@pytest.mark.parametrize('layout', LOCATED)
def test_the_farm_returns(farm, layout):
    "Classes, images, labels and boxes; the Set says what it is, is the same again, and travels to workers."
    data, roots = farm; back = open_set(roots[layout], layout)
    assert (back.classes, back.layout, back.source.fields) == (data.classes, layout, ('image', 'label', 'boxes')) and open_set(roots[layout], layout).hash == back.hash
    given = {s['id']: s for split in data.splits for s in data.split(split, ('image', 'label', 'boxes'))}
    splits = dict(cub=dict(trainval=90, test=18), wsol=dict(train=90, val=8, test=10), ilsvrc=dict(train=90, val=8, test=10))[layout]
    for split, count in splits.items():
        fields = ('image', 'label') + ('boxes',) * ((layout, split) != ('ilsvrc', 'train'))
        found = by_name(pickle.loads(pickle.dumps(back.split(split, fields)))); assert len(found) == count == len(back.splits[split])
        for name, s in found.items():
            assert all(torch.equal(given[name][k], s[k]) for k in set(KEYS) & set(s)) and s['size'] == given[name]['size'] and (given[name]['image'] - s['image']).abs().mean() < .04


def test_validation_images_of_cub_are_a_tenth_of_every_class(farm):
    "The same again, from the hash of the id; no test image among them; train and val together are trainval."
    back = open_set(farm[1]['cub'], 'cub'); classes = lambda split: [i.split('/')[0] for i in back.splits[split]]
    assert sorted(back.splits['train'] + back.splits['val']) == sorted(back.splits['trainval']) and not set(back.splits['test']) & set(back.splits['trainval'])
    for name in set(classes('trainval')):
        n = classes('trainval').count(name); assert classes('val').count(name) == (max(n // 10, 1) if n > 1 else 0) and classes('train').count(name) >= 1
    assert [back.splits['trainval'].index(i) for i in back.splits['val']] == held_out(back.splits['trainval'], [(c,) for c in classes('trainval')])


@pytest.mark.parametrize('layout', LOCATED)
def test_truth_is_never_edited_in_place(farm, layout):
    "The same sample twice gives equal boxes, whatever was done to the first; the arrays share no memory."
    data = open_set(farm[1][layout], layout); split = data.split('test', ('boxes',)); first = split[3]; before = first['boxes'].clone()
    first['boxes'][:] = first['boxes'] * .5 + 16; first['box_labels'] += 1
    again = split[3]; assert torch.equal(again['boxes'], before) and torch.equal(again['box_labels'], data.split('test', ('boxes',))[3]['box_labels'])
    boxes, labels = data.source.read('test', 3, 'boxes'); boxes += 1; labels.append(7)
    assert torch.equal(split[3]['boxes'], before) and len(data.source.read('test', 3, 'boxes')[1]) == 1 and data.source.parts['test'].boxes[3].dtype == np.float32


@pytest.mark.parametrize('layout, files', dict(cub=['bounding_boxes.txt'], wsol=[f'metadata/{s}/localization.txt' for s in ('train', 'val', 'test')], ilsvrc=['metadata', 'list']).items())
def test_a_weak_split_needs_no_boxes(copy, layout, files):
    "Every list of boxes deleted: image and label of training images are read, boxes are not a field."
    root = copy(layout)
    for name in files: (shutil.rmtree if (root/name).is_dir() else Path.unlink)(root/name)
    data = open_set(root, layout); assert data.source.fields == ('image', 'label') and all(s['label'].sum() == 1 for s in data.split('train', ('image', 'label')))
    with pytest.raises(BadInput, match='boxes'): data.split('train', ('image', 'boxes'))


@pytest.mark.parametrize('layout', LOCATED)
def test_grey_images_get_three_channels(copy, layout):
    "A file with one channel, as CUB and ImageNet have some; no fault for the check."
    root = copy(layout); data = open_set(root, layout); path = data.source.path('test', 0)
    with Image.open(path) as im: grey = im.convert('L')
    grey.save(path, 'JPEG'); image = data.split('test', ('image',))[0]['image']
    assert image.shape == (3, 64, 64) and torch.equal(image[0], image[2]) and check(root, layout) == []


@pytest.mark.parametrize('layout', LOCATED)
def test_an_opened_set_is_exported_again(farm, tmp_path, layout):
    "Into WSOL lists and back: classes, labels and boxes of test."
    data = open_set(farm[1][layout], layout); weak = layout == 'ilsvrc' # without boxes in training nothing can be written
    if weak:
        with pytest.raises(BadInput, match='train without boxes'): export(data, 'wsol', tmp_path/'w')
        return
    back = open_set(export(data, 'wsol', tmp_path/'w'), 'wsol'); a, b = by_name(data.split('test', ('label', 'boxes'))), by_name(back.split('test', ('label', 'boxes')))
    assert back.classes == data.classes and len(a) == len(b)
    for s, t in zip(data.split('test', ('label', 'boxes')), back.split('test', ('label', 'boxes')), strict=True): assert all(torch.equal(s[k], t[k]) for k in KEYS)


# --- CUB ---------------------------------------------------------------------------------------------------------------

def test_a_box_that_leaves_its_image_is_cut(copy):
    "As the official tables have some, by a few pixels; floats are kept; one that lies outside is an error that names the image."
    root = copy('cub'); data = open_cub(root); index = data.splits['test'].index(line(root/'images.txt', 95).split()[1][:-4])
    for text, box in (('95 10.5 20.25 53.5 45', [10.5, 20.25, 64, 64]), ('95 0 0 64 64', [0, 0, 64, 64]), ('95 1 2 30 40', [1, 2, 31, 42])):
        change(root/'bounding_boxes.txt', 95, text); assert open_cub(root).split('test', ('boxes',))[index]['boxes'].tolist() == [box] and check(root, 'cub') == []
    change(root/'bounding_boxes.txt', 95, '95 70 70 9 9')
    with pytest.raises(BadInput, match='outside the image') as e: open_cub(root).split('test', ('boxes',))[index]
    assert Path(data.splits['test'][index]).name in e.value.got


def test_cub_opens_from_its_parents_and_without_images(copy):
    "Tables alone say classes, splits and labels; the message about a missing image names the file."
    root = copy('cub'); target = root.parent/'data'/'CUB'/'CUB_200_2011'; shutil.copytree(root, target); full = open_set(target, 'cub')
    for place in (target.parent, target.parent.parent, target/'images'): assert open_set(place, 'cub').hash == full.hash
    shutil.rmtree(target/'images'); bare = open_set(target, 'cub')
    assert bare.splits == full.splits and bare.hash != full.hash and bare.source.read('test', 0, 'label').sum() == 1
    with pytest.raises(BadInput, match=Path(bare.splits['test'][0]).name): bare.split('test', ('label',))[0]
    (target/'images.txt').unlink()
    with pytest.raises(BadInput, match='Caltech') as e: open_set(target, 'cub')
    assert 'images.txt' in e.value.expected


# --- WSOL lists ----------------------------------------------------------------------------------------------------------

def test_the_convention_is_an_argument(copy):
    "Inclusive and half-open differ by a pixel on two sides, and in the fingerprint; a list that ends at the edge is refused as inclusive."
    root = copy('wsol'); sets = {kind: open_wsol(root, boxes=kind) for kind in ('inclusive', 'half-open')}
    for a, b in zip(*(d.split('test', ('boxes',)) for d in sets.values())): assert (a['boxes'] - b['boxes']).tolist() == [[0, 0, 1, 1]]
    assert len({d.hash for d in sets.values()}) == 2 and open_set(root, 'wsol', boxes='half-open').hash == sets['half-open'].hash
    with pytest.raises(BadInput, match='half-open'): open_wsol(root, boxes='exclusive')
    note = root/'metadata'/'val'/'localization.txt'; file = line(note, 1).split(',')[0]; change(note, 1, f'{file},3,4,64,60')
    with pytest.raises(BadInput, match='line 1') as e: open_wsol(root)
    assert "boxes='half-open'" in e.value.cure and open_wsol(root, 'half-open').split('val', ('boxes',))[0]['boxes'].tolist() == [[3, 4, 64, 60]]
    assert [f.kind for f in check(root, 'wsol')] == ['broken'] and check(root, 'wsol', 'half-open') == []


def test_several_boxes_of_an_image_keep_their_order(copy):
    "Lines of one image need not be neighbours."
    root = copy('wsol'); note = root/'metadata'/'test'/'localization.txt'; file = line(note, 2).split(',')[0]
    note.write_text(note.read_text() + f'{file},0,0,63,63\n{file},5,6,7,8\n'); s = open_wsol(root).split('test', ('boxes',))[1]
    assert s['boxes'][1:].tolist() == [[0, 0, 64, 64], [5, 6, 8, 9]] and len(set(s['box_labels'].tolist())) == 1


def test_boxes_may_lack_in_training_only(copy):
    "Some training images, or the whole list; labels are there, and test has its boxes."
    root = copy('wsol'); note = root/'metadata'/'train'/'localization.txt'; change(note, 1, None)
    data = open_wsol(root); assert data.split('train', ('boxes',))[0]['boxes'].shape == (0, 4) and check(root, 'wsol') == []
    note.unlink(); data = open_wsol(root); assert len(data.split('test', ('boxes',))[0]['boxes']) == 1
    with pytest.raises(BadInput, match='train without boxes'): data.split('train', ('boxes',))[0]


def test_a_size_that_differs_stops_who_asks_for_boxes(copy):
    "Boxes are meant for another image; a weak split does not notice."
    root = copy('wsol'); data = open_wsol(root); smaller(data.source.path('test', 0))
    assert data.split('test', ('image', 'label'))[0]['size'] == (32, 32)
    with pytest.raises(BadInput, match='as its list says'): data.split('test', ('image', 'boxes'))[0]
    (root/'metadata'/'test'/'image_sizes.txt').unlink(); assert open_wsol(root).split('test', ('boxes',))[1]['boxes'].shape == (1, 4)


def test_names_of_classes(copy):
    "classes.txt, with or without numbers; synsets.txt; folders; else an error with the cure."
    root = copy('wsol'); names = ('cat', 'rabbit', 'deer', 'duck', 'train', 'boat', 'bus', 'truck')
    assert open_wsol(root).classes == names
    (root/'classes.txt').write_text(''.join(f'{n}\n' for n in 'ABCDEFGHI')); assert open_wsol(root).classes == tuple('ABCDEFGHI')
    (root/'classes.txt').unlink(); assert open_wsol(root).classes == names
    (root/'synsets.txt').write_text(''.join(f'{k} n{k:08d} {n}, {n} again\n' for k, n in enumerate(names))); assert open_wsol(root).classes == tuple(f'{n}, {n} again' for n in names)
    (root/'synsets.txt').unlink()
    for split in ('train', 'val', 'test'):
        for file in (root/'metadata'/split).iterdir(): file.write_text(''.join(f'{split}/' + l.split('/', 2)[2] + '\n' for l in file.read_text().splitlines()))
    with pytest.raises(BadInput, match='classes.txt'): open_wsol(root)
    assert any('classes.txt' in f.cure for f in check(root, 'wsol'))


@pytest.mark.parametrize('lists, images', (('metadata', 'images'), ('metadata', ''), ('metadata/CUB', 'dataset/CUB'), ('metadata/ILSVRC', 'ILSVRC'), ('', ''), ('CUB', ''), ('metadata/CUB', '')))
def test_lists_and_images_in_the_usual_places(farm, tmp_path, capsys, lists, images):
    "Found from the common parent, from the lists, and from a folder of images beside them; nothing is said."
    root = farm[1]['wsol']; home = tmp_path/'home'; shutil.copytree(root/'metadata', home/lists, dirs_exist_ok=True)
    for split in ('train', 'val', 'test'): shutil.copytree(root/split, home/images/split, dirs_exist_ok=True)
    data = open_set(home, 'wsol'); assert data.split('test', ('image',))[0]['image'].shape == (3, 64, 64) and not capsys.readouterr().out
    assert open_set(home/lists, 'wsol').splits == data.splits and open_set(home/lists/'test', 'wsol').hash == data.hash and check(home, 'wsol') == []


def test_what_was_looked_for_is_said(copy, capsys):
    "No image at all: labels and boxes are read, an image is not, and the places are named; two sets need a choice."
    root = copy('wsol'); home = root.parent/'lists'; shutil.copytree(root/'metadata', home/'metadata'/'CUB'); shutil.copytree(root/'metadata', home/'metadata'/'ILSVRC')
    with pytest.raises(BadInput, match='lists of 2 sets'): open_set(home, 'wsol')
    data = open_set(home/'metadata'/'CUB', 'wsol'); text = capsys.readouterr().out
    assert all(f'{split}: no image found' in text for split in data.splits) and data.name == 'CUB (WSOL lists)' and data.split('test', ('label', 'boxes'))[0]['size'] == (64, 64)
    with pytest.raises(BadInput, match='dataset'): data.split('test', ('image',))[0]
    with pytest.raises(BadInput, match='image_ids.txt'): open_set(root/'train'/'nothing', 'wsol')


# --- ILSVRC --------------------------------------------------------------------------------------------------------------

def with_second_box(root):
    "Adds a box to the third image of the list of all boxes; its file name without ending."
    note = root/'metadata'/'test'/'localization.txt'; file = line(note, 3).split(',')[0]; note.write_text(note.read_text() + f'{file},2,3,4,5\n')
    return Path(file).stem


def test_which_boxes_were_read_is_part_of_the_name(copy, capsys):
    "All where there is a list of all, one if asked for or alone; the share of images with several is printed; the prints differ."
    root = copy('ilsvrc'); name = with_second_box(root)
    every, one = open_set(root, 'ilsvrc'), open_set(root, 'ilsvrc', truth='one'); text = capsys.readouterr().out
    assert every.name.endswith('(all boxes)') and one.name.endswith('(one box)') and every.hash != one.hash and open_set(root, 'ilsvrc', truth='all').hash == every.hash
    assert '10.0 % with more than one' in text and '0.0 % with more than one' in text
    assert [len(by_name(d.split('test', ('boxes',)))[name]['boxes']) for d in (every, one)] == [2, 1]
    shutil.rmtree(root/'metadata'); alone = open_set(root, 'ilsvrc'); assert alone.name.endswith('(one box)') and list(alone.splits) == ['train', 'test']
    for truth in ('all', 'two'):
        with pytest.raises(BadInput): open_set(root, 'ilsvrc', truth=truth)


@pytest.mark.parametrize('form', ('together', 'apart', 'commas', 'wnids', 'xml', 'xml voc', 'kaggle'))
def test_every_form_of_the_boxes_gives_the_same(copy, form):
    "The list of all boxes with boxes in one line or several, and XML, against the WSOL list."
    root = copy('ilsvrc'); with_second_box(root); given = by_name(open_set(root, 'ilsvrc').split('test', ('label', 'boxes'))); wnids = list(ilsvrc_classes(root)); kinds = {}
    lines, xml = [], root/'Annotations'/'CLS-LOC'/'val'
    for n, s in given.items():
        kind = int(s['label'].argmax()); kinds[n] = wnids[kind]; numbers = [[int(v) for v in (box - torch.tensor([0, 0, 1, 1])).tolist()] for box in s['boxes']]
        if form.startswith('xml') or form == 'kaggle': write_xml(xml/f'{n}.xml', s['size'], [wnids[kind]] * len(numbers), s['boxes'].numpy() - np.float32([1, 1, 1, 1] if form != 'xml voc' else [0, 0, 0, 0]))
        else: lines += [' '.join(map(str, [f'val/{n}.JPEG', wnids[kind] if form == 'wnids' else kind, *(v for box in group for v in box)])) for group in ([numbers] if form != 'apart' else [[box] for box in numbers])]
    if lines: (root/'list'/'val_folder_new.txt').write_text(''.join(f'{l.replace(" ", ",") if form == "commas" else l}\n' for l in lines))
    shutil.rmtree(root/'metadata')
    if form == 'kaggle': shutil.copytree(root, root.parent/'k'/'ILSVRC'/'Data'/'CLS-LOC'); root = root.parent/'k'; shutil.move(root/'ILSVRC'/'Data'/'CLS-LOC'/'Annotations', root/'ILSVRC'/'Annotations'); shutil.move(root/'ILSVRC'/'Data'/'CLS-LOC'/'synsets.txt', root/'LOC_synset_mapping.txt')
    back = open_set(root, 'ilsvrc', boxes='voc' if form == 'xml voc' else 'inclusive'); assert back.name.endswith('(all boxes)') and len(truth_lists(Path(back.root))) == 2
    for n, s in by_name(back.split('test', ('label', 'boxes'))).items(): assert all(torch.equal(given[n][k], s[k]) for k in KEYS), n


def test_sorted_and_flat_validation_images_are_the_same_set(copy):
    "Labels and boxes by file name, whichever folder an image is in; without a list the folders give the labels."
    root = copy('ilsvrc'); flat = by_name(open_set(root, 'ilsvrc').split('test')); wnids = list(ilsvrc_classes(root))
    for n, s in flat.items():
        folder = root/'val'/wnids[s['label'].argmax()]; folder.mkdir(exist_ok=True); (root/'val'/f'{n}.JPEG').rename(folder/f'{n}.JPEG')
    data = open_set(root, 'ilsvrc'); assert check(root, 'ilsvrc') == [] and data.splits['test'][0].count('/') == 2
    for n, s in by_name(data.split('test')).items(): assert all(torch.equal(flat[n][k], s[k]) for k in ('image', *KEYS))
    shutil.rmtree(root/'metadata'); shutil.rmtree(root/'list'); data = open_set(root, 'ilsvrc'); assert data.name.endswith('(no boxes)') and data.source.fields == ('image', 'label')
    for n, s in by_name(data.split('test')).items(): assert torch.equal(flat[n]['label'], s['label'])


@pytest.mark.parametrize('gone, splits, said', ((['train'], ['val', 'test'], 'train: no images'), (['val2'], ['train', 'test'], 'val: none of 8 listed images'), (['val'], ['train', 'val'], 'test: no images in val'),
                                                (['metadata', 'list'], ['train'], 'test: images in val, but neither'), (['metadata'], ['train', 'test'], ''), (['train', 'val2'], ['test'], 'train: no images')))
def test_a_split_without_files_does_not_exist_and_it_is_said(copy, capsys, gone, splits, said):
    "Any part may be absent."
    root = copy('ilsvrc')
    for name in gone: shutil.rmtree(root/name)
    data = open_set(root, 'ilsvrc'); assert list(data.splits) == splits and said in capsys.readouterr().out
    with pytest.raises(BadInput, match='split'): data.split(next(s for s in ('train', 'val', 'test', 'trainval') if s not in splits), ('image',))


@pytest.mark.parametrize('count', (3, 5))
def test_numbers_of_classes_are_not_read_as_those_of_the_folders_at_hand(copy, count):
    "A part of the class folders and no file of names: number 2 of a list is not the third folder. With the file, or without lists of numbers, the set opens."
    root = copy('ilsvrc'); names = (root/'synsets.txt').read_text(); (root/'synsets.txt').unlink(); shutil.rmtree(root/'metadata'/'test')
    for folder in sorted((root/'train').iterdir())[count:]: shutil.rmtree(folder)
    shutil.rmtree(root/'list')
    with pytest.raises(BadInput, match=f'{count} class folders of 1000') as e: open_set(root, 'ilsvrc')
    assert 'synsets.txt' in e.value.cure and any(f'{count} class folders' in f.what for f in check(root, 'ilsvrc'))
    (root/'synsets.txt').write_text(names); assert len(open_set(root, 'ilsvrc').splits['val']) == 8
    (root/'synsets.txt').unlink(); shutil.rmtree(root/'metadata'); assert len(open_set(root, 'ilsvrc').classes) == count


@pytest.mark.parametrize('layout', LOCATED)
def test_the_fingerprint_covers_boxes_and_sizes(copy, layout):
    "A box that moves by a pixel, a size that is stated otherwise and a class that is named otherwise are another set, though files and ids are the same."
    root = copy(layout); fresh = lambda: open_set(root, layout); before = fresh(); assert fresh().hash == before.hash
    seen = {before.hash}; boxes = dict(cub='bounding_boxes.txt', wsol='metadata/test/localization.txt', ilsvrc='metadata/test/localization.txt')[layout]
    edits = [(boxes, r'\d+(\.0)?$', lambda hit: str(int(float(hit[0])) - 1))] + [('metadata/test/image_sizes.txt', r'\d+$', lambda hit: str(int(hit[0]) + 1))] * (layout != 'cub')
    edits += [(dict(wsol='classes.txt', ilsvrc='synsets.txt').get(layout), r'\w+$', lambda hit: hit[0] + 's')] * (layout != 'cub') # a name of CUB is that of its folder
    for k, (file, pattern, by) in enumerate(edits):
        change(root/file, 1, re.sub(pattern, by, line(root/file, 1))); after = fresh(); seen.add(after.hash)
        assert len(seen) == k + 2 and after.splits == before.splits, file


def test_images_without_a_box_are_left_out_and_counted(copy, capsys):
    "They cannot be scored; listed images that are missing are counted too."
    root = copy('ilsvrc'); image = next((root/'val').iterdir()); shutil.copy(image, root/'val'/'ILSVRC2012_val_00000007.JPEG'); image.unlink()
    data = open_set(root, 'ilsvrc'); assert len(data.splits['test']) == 10 and '1 of them missing; 1 image without a box left out' in capsys.readouterr().out
    with pytest.raises(BadInput, match=image.name): [s for s in data.split('test', ('image',))]


def test_classes_of_imagenet(tmp_path):
    "Sorted by wnid whatever the order of lines; both official forms; other lines are refused."
    (tmp_path/'s.txt').write_text('n02 no\n')
    with pytest.raises(BadInput, match='line 1'): read_synsets(tmp_path/'s.txt')
    (tmp_path/'s.txt').write_text('n00000002 tench, Tinca tinca\nn00000001 crane\n'); assert read_synsets(tmp_path/'s.txt') == dict(n00000001='crane', n00000002='tench, Tinca tinca')
    (tmp_path/'s.txt').write_text('n00000001 crane\nn00000001 crane\n')
    with pytest.raises(BadInput, match='named twice'): read_synsets(tmp_path/'s.txt')
    (tmp_path/'train'/'n00000001').mkdir(parents=True)
    with pytest.raises(BadInput, match='synsets.txt'): open_set(tmp_path, 'ilsvrc')
    with pytest.raises(BadInput, match='account of your own'): open_set(tmp_path/'train'/'n00000001'/'x', 'ilsvrc')


# --- boxes, command line ---------------------------------------------------------------------------------------------------

def test_the_three_conventions_name_the_same_pixels():
    "An object that fills a picture 5 wide and 4 high, as each kind of list writes it."
    for kind, numbers in dict(zip(BOXES, ([0, 0, 4, 3], [0, 0, 5, 4], [1, 1, 5, 4]))).items(): assert half_open([numbers], kind).tolist() == [[0, 0, 5, 4]]


def test_numbers_of_lists_are_not_bound_to_a_form(tmp_path):
    "Byte order mark, Windows line ends, blank lines, spaces after commas, floats; commas in file names."
    folder = tmp_path/'test'; folder.mkdir(); name = 'a/b, c.jpg'
    for key, text in dict(image_ids=f'\ufeff{name}\r\n\r\n', class_labels=f'{name}, 0\r\n', image_sizes=f'{name}, 30, 20\n', localization=f'{name},1.5,2,3.0,4\n').items(): (folder/f'{key}.txt').write_bytes(text.encode())
    (row,), bad = wsol_rows(folder); assert bad == [] and (row.name, row.kind, row.size, row.boxes.tolist()) == (name, 0, (20, 30), [[1.5, 2, 4, 5]])


@pytest.mark.parametrize('layout', LOCATED)
def test_the_command_line_checks(copy, capsys, layout):
    "Clean: 0; a planted fault: 2, with its name and cure; no set: 2, with where to get it."
    root = copy(layout); assert cli.main(['data', 'check', layout, str(root)]) == 0 and 'complete and sound' in capsys.readouterr().out
    plant, words, name = PLANTS[layout](root)['jpeg']; plant()
    assert cli.main(['data', 'check', layout, str(root)]) == 2; text = capsys.readouterr().out
    assert words in text and name in text and 'cure' in text
    (root.parent/'else').mkdir(); shutil.rmtree(root)
    assert cli.main(['data', 'check', layout, str(root.parent/'else')]) == 2 and 'by hand from' in capsys.readouterr().out
