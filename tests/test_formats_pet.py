"Oxford-IIIT Pet: the exported farm read back, each planted fault named, lists that are missing or contradict themselves."
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from test_formats import assert_named
from wsl_nb import cli
from wsl_nb.core import BadInput
from wsl_nb.data import embedded
from wsl_nb.formats import open_set
from wsl_nb.formats_check import check
from wsl_nb.formats_pet import PET_CLASSES, PetRow, dialect, misnamed, pet_classes, pet_rows, read_trimap
from wsl_nb.formats_write import export


def recode(path, table):
    "Writes a trimap with other values: 1, 2, 3 -> table."
    with Image.open(path) as im: values = np.asarray(im)
    Image.fromarray(np.uint8([0, *table])[values]).save(path)


def grey(path):
    "Saves a photograph with one channel."
    with Image.open(path) as im: im = im.convert('L')
    im.save(path, 'JPEG')


def change_line(path, name, position, value):
    "Another word in the line of an image."
    lines = [line.split() for line in path.read_text().splitlines()]
    for words in lines:
        if words and words[0] == name: words[position] = str(value)
    path.write_text(''.join(' '.join(words) + '\n' for words in lines))


def pet_faults(root, trainval, test):
    "Fault -> (planting it, words of its finding, file or id that the finding names)."
    image, mask, note = (lambda i, f=f, e=e: root/f/f'{i}.{e}' for f, e in (('images', 'jpg'), ('annotations/trimaps', 'png'), ('annotations', 'txt')))
    t, line = trainval[1], lambda name: next(l for l in note('list').read_text().splitlines() if l.split()[0] == name) + '\n'
    add = lambda name, text: note(name).write_text(note(name).read_text() + text)
    other = lambda name: 1 + int(line(name).split()[1]) % 7
    return dict(
        image=(lambda: image(t).unlink(), 'image missing', t),
        jpeg=(lambda: image(t).write_bytes(image(t).read_bytes()[:800]), 'image truncated', t),
        grey=(lambda: grey(image(t)), 'grey image', t),
        trimap=(lambda: mask(t).unlink(), 'trimap missing', t),
        png=(lambda: mask(t).write_bytes(mask(t).read_bytes()[:50]), 'mask not decodable', t),
        cat=(lambda: recode(mask(t), (1, 0, 255)), '0 background, 1 cat, 2 dog, 255 border', t),
        dog=(lambda: recode(mask(t), (2, 0, 255)), '0 background, 1 cat, 2 dog, 255 border', t),
        less=(lambda: recode(mask(t), (0, 1, 2)), 'from which 1 was subtracted', t),
        black=(lambda: recode(mask(t), (255, 0, 255)), 'black-and-white', t),
        other=(lambda: recode(mask(t), (38, 75, 113)), 'no dialect that is known to us', t),
        colour=(lambda: Image.new('RGB', (64, 64)).save(mask(t)), 'palette read as colour', t),
        size=(lambda: Image.new('L', (50, 40), 2).save(mask(t)), 'size mismatch between image and mask', t),
        overlap=(lambda: add('trainval', line(test[0])), 'overlap of training and test images (trainval/test', test[0]),
        twice=(lambda: add('test', line(test[0])), 'listed twice (test.txt', test[0]),
        line=(lambda: add('test', f'{test[0]}.jpg\n'), 'line other than', test[0]),
        breed=(lambda: change_line(note('test'), test[0], 1, other(test[0])), 'CLASS-ID that contradicts the name', test[0]),
        number=(lambda: change_line(note('list'), test[0], 1, 99), 'CLASS-ID that contradicts the name', test[0]),
        species=(lambda: change_line(note('trainval'), t, 2, 1 + t[0].isupper()), 'SPECIES that contradicts the initial', t),
        apart=(lambda: note('list').write_text(note('list').read_text().replace(line(t), '')), 'not in both', t),
        orphan=(lambda: Image.new('L', (4, 4), 1).save(mask('stranger_1')), 'file without an image', 'stranger_1'),
        empty=(lambda: note('test').write_text('# nothing\n'), 'empty list', 'test.txt'))


FAULTS = list(pet_faults(Path('.'), ['a', 'b'], ['c']))


@pytest.fixture(scope='module')
def farm(tmp_path_factory):
    "A set with one object an image, and its export."
    patch = pytest.MonkeyPatch(); patch.setenv('WSL_NB_CACHE', str(tmp_path_factory.mktemp('cache')))
    data = embedded('wsol', train=24, val=12, test=10, size=64)
    yield data, export(data, 'pet', tmp_path_factory.mktemp('exports')/'oxford-iiit-pet')
    patch.undo()


@pytest.fixture
def copy(farm, tmp_path):
    "A copy of the export, to be spoilt."
    return Path(shutil.copytree(farm[1], tmp_path/'oxford-iiit-pet'))


def test_the_farm_returns(farm):
    "Order, labels, sizes; masks outside the band; nothing to find for the check; names of classes as the files have them."
    data, root = farm; back = open_set(root.parent, 'pet')
    assert check(root, 'pet') == [] and [c.lower() for c in back.classes] == list(data.classes) and back.source.fields == ('image', 'label', 'mask')
    given = [s for split in ('train', 'val') for s in data.split(split, ('image', 'label', 'mask'))]
    for a, b in (*zip(given, back.split('trainval'), strict=True), *zip(data.split('test', ('image', 'label', 'mask')), back.split('test'), strict=True)):
        known = b['mask'] != 255
        assert torch.equal(a['label'], b['label']) and a['size'] == b['size'] and torch.equal(a['mask'][known], b['mask'][known])
        assert 0 < (~known).float().mean() < .5 and (a['image'] - b['image']).abs().mean() < .04


def test_every_breed_is_in_train_and_val(farm):
    "train and val divide trainval in its order; breeds with two images or more are on both sides; the same again."
    back = open_set(farm[1], 'pet'); breeds = lambda split: Counter(i.rsplit('_', 1)[0] for i in back.splits[split])
    assert sorted(back.splits['train'] + back.splits['val']) == sorted(back.splits['trainval']) and not set(back.splits['trainval']) & set(back.splits['test'])
    assert [i for i in back.splits['trainval'] if i in set(back.splits['val'])] == back.splits['val']
    for breed, n in breeds('trainval').items(): assert breeds('val')[breed] == (max(n // 10, 1) if n > 1 else 0) and breeds('train')[breed] >= 1
    assert open_set(farm[1], 'pet').splits == back.splits


@pytest.mark.parametrize('fault', FAULTS)
def test_faults_are_named(copy, fault):
    "Each planted fault of the export."
    data = open_set(copy, 'pet')
    assert_named(copy, 'pet', *pet_faults(copy, data.splits['trainval'], data.splits['test'])[fault])


@pytest.mark.parametrize('fault, words', dict(breed='contradict', number='contradict', twice='listed twice', overlap='listed twice', line='bad lines', empty='is empty').items())
def test_faults_of_lists_stop_the_reader(copy, fault, words):
    "What would give wrong labels or scores on training images is an error that names the line or the image."
    data = open_set(copy, 'pet'); plant, _, name = pet_faults(copy, data.splits['trainval'], data.splits['test'])[fault]; plant()
    with pytest.raises(BadInput, match=words) as e: open_set(copy, 'pet')
    assert name in e.value.got and 'data check' in e.value.cure


@pytest.mark.parametrize('fault', ('trimap', 'cat', 'dog', 'less', 'black', 'other', 'colour', 'size'))
def test_faults_of_trimaps_stop_who_asks_for_masks(copy, fault):
    "Nothing is converted by guess; a split without masks does not notice."
    data = open_set(copy, 'pet'); plant, words, name = pet_faults(copy, data.splits['trainval'], data.splits['test'])[fault]; plant()
    assert data.split('trainval', ('image', 'label'))[1]['id'] == name
    with pytest.raises(BadInput, match=name) as e: data.split('trainval', ('mask',))[1]
    if fault in ('cat', 'dog', 'less', 'black', 'other'): assert words in e.value.got and '1 pet, 2 background, 3 undecided' in e.value.expected


def test_a_weak_split_needs_no_trimap(copy):
    "Every trimap deleted: image and label still read."
    shutil.rmtree(copy/'annotations'/'trimaps')
    data = open_set(copy, 'pet'); assert all(s['label'].sum() == 1 for s in data.split('train', ('image', 'label')))
    with pytest.raises(BadInput, match='no mask'): data.split('test', ('mask',))[0]


def test_a_photograph_that_is_missing_is_named(copy):
    "Whatever is asked for, for each sample has the size of its photograph."
    data = open_set(copy, 'pet'); name = data.splits['test'][0]; (copy/'images'/f'{name}.jpg').unlink()
    for fields in (('image',), ('label',), ('mask',)):
        with pytest.raises(BadInput, match=f'{name}.jpg'): data.split('test', fields)[0]


@pytest.mark.parametrize('there, splits, said', (
    (('list', 'trainval', 'test'), dict(trainval=36, test=10), ''), (('list',), dict(trainval=46), 'all 46 images of list.txt are trainval'),
    (('trainval',), dict(trainval=36), 'no test.txt'), (('test',), dict(test=10), 'no trainval.txt'), (('trainval', 'test'), dict(trainval=36, test=10), ''),
    (('list', 'trainval'), dict(trainval=36, test=10), 'the 10 images of list.txt that trainval.txt does not name are test'),
    (('list', 'test'), dict(trainval=36, test=10), 'the 36 images of list.txt that test.txt does not name are trainval')))
def test_some_lists_are_enough_and_it_is_said(copy, capsys, there, splits, said):
    "Any one list opens; what replaces the others is printed, and nothing if both parts have their list."
    for path in (copy/'annotations').glob('*.txt'):
        if path.stem not in there: path.unlink()
    data = open_set(copy, 'pet'); text = capsys.readouterr().out
    assert {k: len(v) for k, v in data.splits.items() if k in ('trainval', 'test')} == splits and said in text and bool(said) == bool(text)
    assert ('train' in data.splits) == ('val' in data.splits) == ('trainval' in splits) and check(copy, 'pet') == []


@pytest.mark.parametrize('form', ('PNG RGBA', 'PNG LA', 'PNG P', 'GIF P', 'PNG L', 'JPEG CMYK', 'JPEG L', 'BMP RGB'))
def test_whatever_lies_under_jpg_becomes_three_channels(copy, form):
    "The kinds of files that the official set has under .jpg, and some more; grey ones are named by the check, others are nobody's fault."
    kind, mode = form.split(); data = open_set(copy, 'pet'); path = copy/'images'/f'{data.splits["test"][0]}.jpg'
    with Image.open(path) as im: changed = im.convert('L').convert('LA') if mode == 'LA' else im.quantize(256) if mode == 'P' else im.convert(mode); before = np.asarray((im.convert('L') if mode in ('L', 'LA') else im).convert('RGB')).astype(int)
    if mode == 'RGBA': changed.putalpha(128)
    changed.save(path, kind, **(dict(transparency=3) if form == 'PNG P' else {}))
    s = data.split('test', ('image', 'mask'))[0]; got = s['image'].permute(1, 2, 0).numpy() * 255
    assert got.shape == before.shape and s['size'] == tuple(s['mask'].shape) and np.abs(got - before).mean() < 8
    assert [f.what.split(':')[0] for f in check(copy, 'pet')] == ['colour missing'] * (mode in ('L', 'LA'))


def test_the_lists_decide_not_the_folder(copy):
    "Hidden twins of trimaps, stray files, photographs that no list names: not read, not named, and the fingerprint stays."
    before = open_set(copy, 'pet'); first = before.splits['test'][0]
    for path in ((copy/'images'/'Cat_1.mat'), (copy/'annotations'/'trimaps'/f'._{first}.png'), (copy/'images'/'.DS_Store')): path.write_bytes(b'x')
    shutil.copy(copy/'images'/f'{first}.jpg', copy/'images'/'Cat_900.jpg'); shutil.copy(copy/'annotations'/'trimaps'/f'{first}.png', copy/'annotations'/'trimaps'/'Cat_900.png')
    after = open_set(copy, 'pet')
    assert after.splits == before.splits and after.hash == before.hash and check(copy, 'pet') == []
    Image.new('L', (64, 64), 2).save(copy/'annotations'/'trimaps'/f'{first}.png'); assert open_set(copy, 'pet').hash != before.hash


def official(root, rows):
    "A folder with these lines in all of trainval.txt; no pictures."
    (root/'images').mkdir(parents=True); (root/'annotations').mkdir()
    (root/'annotations'/'trainval.txt').write_text('#Image CLASS-ID SPECIES BREED ID\n' + ''.join(f'{name} {kind} {1 + name[0].islower()} 1\n' for name, kind in rows))
    return root


def test_few_breeds_of_the_official_set_keep_its_37_classes(tmp_path):
    "The classes of a set do not depend on which images are there; a breed is its class id minus one."
    data = open_set(official(tmp_path/'a', [('Sphynx_3', 34), ('pug_12', 26), ('pug_1', 26)]), 'pet')
    assert (data.name, data.classes) == ('Oxford-IIIT Pet', PET_CLASSES) and [s.argmax().item() for s in (data.source.read('trainval', i, 'label') for i in range(3))] == [33, 25, 25]
    assert data.splits['train'] + data.splits['val'] != data.splits['trainval'] or len(data.splits['val']) == 1
    for rows, words in (([('Sphynx_3', 33), ('pug_1', 26)], 'line 2: Sphynx_3 with CLASS-ID 33, which is Siamese'), ([('pug_1', 26), ('pugg_2', 26), ('beagle_1', 5)], 'line 3: pugg_2'), ([('pug_1', 0)], 'no class')):
        with pytest.raises(BadInput, match=words): open_set(official(tmp_path/words[:8]/str(len(rows)), rows), 'pet')


def test_own_classes_need_names_for_all_ids(tmp_path):
    "Classes come from the lines when each id occurs, from classes.txt always; a gap says so."
    assert open_set(official(tmp_path/'own', [('owl_1', 2), ('Hen_1', 1)]), 'pet').classes == ('Hen', 'owl')
    root = official(tmp_path/'gap', [('owl_1', 3), ('Hen_1', 1)])
    with pytest.raises(BadInput, match='classes.txt'): open_set(root, 'pet')
    assert [f.kind for f in check(root, 'pet') if 'classes.txt' in f.cure] == ['broken']
    (root/'classes.txt').write_text('Hen\nlark\nowl\n'); assert open_set(root, 'pet').classes == ('Hen', 'lark', 'owl')
    rows = [PetRow('list.txt, line 1', 'Hen_1', 1, 1), PetRow('list.txt, line 2', 'Hen_2', 2, 1)]
    with pytest.raises(BadInput, match='a name of its own'): pet_classes(root.parent, rows)
    assert misnamed(rows, ('Hen', 'lark')) == ['list.txt, line 2: Hen_2 with CLASS-ID 2, which is lark']


def test_lines_of_lists(tmp_path):
    "Remarks, blank lines, a byte order mark, Windows line ends, tabs; breeds with underscores; paths and half lines are none."
    (tmp_path/'list.txt').write_bytes('\ufeff#remark\r\n\r\n  american_pit_bull_terrier_7\t3 2  2 \r\nPug 1 2 3\n../pug_1 26 2 1\npug_1 26 2\npug_1 26 2 1 9\n'.encode())
    rows, bad = pet_rows(tmp_path/'list.txt')
    assert [(r.name, r.breed, r.kind, r.species, r.place) for r in rows] == [('american_pit_bull_terrier_7', 'american_pit_bull_terrier', 3, 2, 'list.txt, line 3')] and [b.split(':')[0] for b in bad] == ['line 4', 'line 5', 'line 6', 'line 7']


@pytest.mark.parametrize('values, words', (((0, 1, 255), '1 cat, 2 dog, 255'), ((0, 2, 255), '1 cat, 2 dog, 255'), ((1, 255), '1 cat, 2 dog, 255'), ((0, 1, 2), '1 was subtracted'), ((0, 1), '1 was subtracted'), ((0, 255), 'black-and-white'), ((255,), 'black-and-white'), ((0, 1, 2, 3), 'no dialect'), ((38, 75), 'no dialect')))
def test_dialects_are_named(values, words): assert words in dialect(values)


def test_trimaps_with_a_palette_are_read(tmp_path):
    "Ids are ids, whatever their colours; a lone value is enough."
    im = Image.fromarray(np.uint8([[1, 2, 3]])); im.putpalette([9, 9, 9] * 256); im.save(tmp_path/'t.png')
    assert read_trimap(tmp_path/'t.png').tolist() == [[1, 2, 3]]
    Image.new('L', (2, 1), 3).save(tmp_path/'t.png'); assert read_trimap(tmp_path/'t.png').tolist() == [[3, 3]]


def test_an_opened_set_becomes_a_folder_of_photographs(farm, tmp_path):
    "Image-level labels survive the way into another layout."
    pets = open_set(farm[1], 'pet'); back = open_set(export(pets, 'folder', tmp_path/'own'), 'folder')
    labels = lambda data: {Path(s['id']).name: s['label'].tolist() for s in data.split('test', ('label',))}
    assert back.classes == pets.classes and len(labels(pets)) == 10 and labels(back) == labels(pets)


def test_the_command_line_checks_pets(copy, capsys):
    "Clean: 0; a planted fault: 2, with its name and cure; no set: 2, with the places and the command that fetches it."
    assert cli.main(['data', 'check', 'pet', str(copy.parent)]) == 0 and 'complete and sound' in capsys.readouterr().out
    name = open_set(copy, 'pet').splits['test'][0]; recode(copy/'annotations'/'trimaps'/f'{name}.png', (1, 0, 255))
    assert cli.main(['data', 'check', 'pet', str(copy)]) == 2; text = capsys.readouterr().out
    assert name in text and '255 border' in text and 'cure' in text
    assert cli.main(['data', 'check', 'pet', str(copy/'images')]) == 2 and name in capsys.readouterr().out
    (copy.parent/'else').mkdir(); shutil.rmtree(copy)
    assert cli.main(['data', 'check', 'pet', str(copy.parent/'else')]) == 2 and 'data fetch pet' in capsys.readouterr().out
