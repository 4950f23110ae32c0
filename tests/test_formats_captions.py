"Reader, splits, check and caches of COCO captions: there and back, both forms of split files, every planted fault in one message, caches that mend themselves."
import json, pickle, shutil, threading, time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from wsl_nb import cli, formats_captions as said
from wsl_nb.captions import tokenise
from wsl_nb.core import BadInput, write_image
from wsl_nb.data import Split, collate, embedded
from wsl_nb.data_transforms import resize
from wsl_nb.formats import open_set
from wsl_nb.formats_check import check
from wsl_nb.formats_write import export

COUNTS = dict(train=40, val=6, test=5)


@pytest.fixture(scope='module')
def farm(tmp_path_factory):
    "Drawn pictures, and the folder made of them."
    data, root = embedded('wsss', size=48, **COUNTS), tmp_path_factory.mktemp('captions')/'coco'
    return data, export(data, 'coco_captions', root)


@pytest.fixture
def copy(farm, tmp_path): return Path(shutil.copytree(farm[1], tmp_path/'coco')) # A folder to spoil


def spoil(root, change, part='train'):
    "Changes a captions file."
    file = root/'annotations'/f'captions_{part}2014.json'; raw = json.loads(file.read_text()); change(raw); file.write_text(json.dumps(raw))


def arrays(root, change):
    "Changes the ids of the arrays."
    for name in said.ARRAYS: file = root/'annotations'/f'coco_{name}_ids.npy'; np.save(file, np.array(list(change(name, np.load(file).tolist())), np.int64))


def without_arrays(root):
    "Removes the arrays."
    for name in said.ARRAYS: (root/'annotations'/f'coco_{name}_ids.npy').unlink()
    return root


def owners(root):
    "Annotation id -> image id."
    return {a['id']: a['image_id'] for p in ('train', 'val') for a in json.loads((root/'annotations'/f'captions_{p}2014.json').read_text())['annotations']}


def karpathy(root, place='', change=lambda rows: rows):
    "Writes dataset_coco.json with the splits of the arrays."
    of, words, rows = owners(root), dict(train='train', restval='restval', dev='val', test='test'), []
    for name, word in words.items(): rows += [dict(cocoid=i, split=word, filename=f'{i:012d}.jpg', filepath='val2014', sentences=[]) for i in dict.fromkeys(of[n] for n in np.load(root/'annotations'/f'coco_{name}_ids.npy').tolist())]
    (root/place).mkdir(exist_ok=True); (root/place/'dataset_coco.json').write_text(json.dumps(dict(dataset='coco', images=change(rows))))


def read(data): return {s: [(i, data.source.read(s, k, 'captions')) for k, i in enumerate(ids)] for s, ids in data.splits.items()} # All captions


# --- there and back ------------------------------------------------------------------------------------------------

def test_there_and_back(farm):
    "Captions and order are those of the drawn set, train with restval; pictures up to JPEG loss; two fields and no more."
    data, root = farm; found = open_set(root, 'coco_captions'); assert {s: len(i) for s, i in found.splits.items()} == COUNTS and found.layout == 'coco_captions' and found.classes == () and found.name == 'coco, Karpathy splits'
    for split, n in COUNTS.items():
        for i in range(n):
            assert found.source.read(split, i, 'captions') == data.source.read(split, i, 'captions') and found.source.size(split, i) == (48, 48)
            assert abs(found.source.read(split, i, 'image').astype(int) - data.source.read(split, i, 'image')).mean() < 9
    rows = found.source.rows['train']; assert {r.file.parent.name for r in rows[:36]} == {'train2014'} and {r.file.parent.name for r in rows[36:]} == {'val2014'}
    with pytest.raises(BadInput, match=r"fields \['label'\]"): found.split('train', ('image', 'label'))
    sample = found.split('val')[2]; assert set(sample) == {'id', 'index', 'image', 'size', 'captions'} and len(sample['captions']) == 5


def test_a_caption_set_can_be_exported_again(farm, tmp_path):
    "Without masks or boxes; the three usual splits stay what they are."
    found = open_set(farm[1], 'coco_captions'); again = open_set(export(found, 'coco_captions', tmp_path/'again'), 'coco_captions')
    assert {s: [c for _, c in rows] for s, rows in read(found).items()} == {s: [c for _, c in rows] for s, rows in read(again).items()}


def test_karpathys_file_and_the_arrays_are_the_same_splits(farm, copy):
    "In any of three folders, alone or beside the arrays; captions come from the official files."
    before = read(open_set(copy, 'coco_captions')); karpathy(copy, 'karpathy'); assert read(open_set(copy, 'coco_captions')) == before
    without_arrays(copy); assert read(open_set(copy, 'coco_captions')) == before and check(copy, 'coco_captions') == []
    (copy/'karpathy'/'dataset_coco.json').rename(copy/'dataset_coco.json'); assert read(open_set(copy.parent, 'coco_captions')) == before


def test_without_split_files_the_release_deals(copy):
    "Train and val of the official files."
    found = open_set(without_arrays(copy), 'coco_captions'); assert {s: len(i) for s, i in found.splits.items()} == dict(train=36, val=15) and found.name == 'coco' and check(copy, 'coco_captions') == []


@pytest.mark.parametrize('home', ['images/{}2014', 'images'])
def test_images_may_lie_in_a_folder_images(copy, home):
    "By part, or all together."
    before = read(open_set(copy, 'coco_captions'))
    for part in ('train', 'val'):
        for file in (copy/f'{part}2014').iterdir(): new = copy/home.format(part)/file.name; new.parent.mkdir(parents=True, exist_ok=True); file.rename(new)
        (copy/f'{part}2014').rmdir()
    found = open_set(copy, 'coco_captions'); assert read(found) == before and found.source.read('test', 1, 'image').shape == (48, 48, 3) and check(copy, 'coco_captions') == []


def test_which_of_two_releases_is_read(copy):
    "2014 with split files, for which they were made; 2017 without; either by name."
    for part in ('train', 'val'): shutil.copy(copy/'annotations'/f'captions_{part}2014.json', copy/'annotations'/f'captions_{part}2017.json'); shutil.copytree(copy/f'{part}2014', copy/f'{part}2017')
    year = lambda found: found.source.rows['train'][0].file.parent.name; assert year(open_set(copy, 'coco_captions')) == 'train2014' and year(said.open_coco_captions(copy, '2017')) == 'train2017'
    without_arrays(copy); assert year(open_set(copy, 'coco_captions')) == 'train2017' and year(said.open_coco_captions(copy, '2014')) == 'train2014'


def test_the_fingerprint_follows_captions_images_and_splits(copy):
    "A corrected word, other bytes of a picture, another split: each makes another set."
    seen = [open_set(copy, 'coco_captions').hash]; assert open_set(copy, 'coco_captions').hash == seen[0]
    spoil(copy, lambda raw: raw['annotations'][0].update(caption='a cat')); seen.append(open_set(copy, 'coco_captions').hash)
    write_image(copy/'train2014'/'000000000002.jpg', np.zeros((48, 48, 3), np.uint8)); seen.append(open_set(copy, 'coco_captions').hash)
    moved = np.load(copy/'annotations'/'coco_dev_ids.npy').tolist()[:5]; arrays(copy, lambda n, ids: [i for i in ids if i not in moved] + moved * (n == 'test')); seen.append(open_set(copy, 'coco_captions').hash)
    without_arrays(copy); seen.append(open_set(copy, 'coco_captions').hash); assert len(set(seen)) == 5


# --- faults --------------------------------------------------------------------------------------------------------

def image_ids(root, only=('train', 'restval', 'dev', 'test')):
    "Image ids in place of annotation ids."
    of = owners(root); arrays(root, lambda n, ids: list(dict.fromkeys(of[i] for i in ids)) if n in only else ids)


def far_apart(root):
    "Annotation ids that no image has."
    for part in ('train', 'val'): spoil(root, lambda raw: [a.update(id=a['id'] + 5000) for a in raw['annotations']], part)
    arrays(root, lambda n, ids: [i + 5000 for i in ids])


FAULTS = {
    'swapped, both counted from 1': (image_ids, 'coco_train_ids.npy', 'image ids where annotation ids belong', '36 image ids, of which 36'),
    'swapped, ids far apart': (lambda root: (far_apart(root), image_ids(root)), 'coco_train_ids.npy', 'image ids where annotation ids belong', '36 image ids, of which 0'),
    'one array swapped': (lambda root: (far_apart(root), image_ids(root, ('dev',))), 'coco_dev_ids.npy', 'image ids where annotation ids belong', '6 image ids, of which 0'),
    'one array swapped, all of them hits': (lambda root: image_ids(root, ('dev',)), 'arrays of annotation ids', 'image in two splits', 'in train and val'),
    'unknown id': (lambda root: arrays(root, lambda n, ids: ids + [7777, 8888] * (n == 'test')), 'coco_test_ids.npy', 'id that the captions files do not have', 'annotation 7777, annotation 8888'),
    'leak': (lambda root: arrays(root, lambda n, ids: ids + [1, 2, 3, 4, 5] * (n == 'test')), 'arrays of annotation ids', 'image in two splits', '000000000001.jpg in train and test'),
    'leak of one caption': (lambda root: arrays(root, lambda n, ids: ids + [3] * (n == 'dev')), 'arrays of annotation ids', 'image in two splits', '000000000001.jpg in train and val'),
    'leak in the file of Karpathy': (lambda root: (karpathy(root, change=lambda rows: rows + [rows[0] | dict(split='test')]), without_arrays(root)), 'dataset_coco.json', 'image in two splits', '000000000001.jpg in train and test'),
    'unknown image': (lambda root: (karpathy(root, change=lambda rows: rows + [rows[0] | dict(cocoid=4711)]), without_arrays(root)), 'dataset_coco.json', 'id that the captions files do not have', 'image 4711'),
    'unknown word': (lambda root: (karpathy(root, change=lambda rows: [r | dict(split='dev') for r in rows]), without_arrays(root)), 'coco', 'list of splits not readable', 'dev'),
    'contradiction': (lambda root: karpathy(root, change=lambda rows: rows[:-1]), 'split files', 'dataset_coco.json and arrays that differ', 'test (4 and 5 images)'),
    'two of four': (lambda root: [(root/'annotations'/f'coco_{n}_ids.npy').unlink() for n in ('restval', 'dev')], 'annotations', 'list of a split missing', 'coco_restval_ids.npy, coco_dev_ids.npy'),
    'table': (lambda root: np.save(root/'annotations'/'coco_dev_ids.npy', np.eye(3)), 'annotations', 'list of splits not readable', 'coco_dev_ids.npy'),
    'half of a number': (lambda root: np.save(root/'annotations'/'coco_dev_ids.npy', np.array([1.5])), 'annotations', 'list of splits not readable', 'coco_dev_ids.npy'),
    'empty caption': (lambda root: spoil(root, lambda raw: raw['annotations'][7].update(caption='  ')), 'captions_train2014.json', 'caption without a word', 'annotation 8 of 000000000002.jpg'),
    'caption of marks': (lambda root: spoil(root, lambda raw: raw['annotations'][7].update(caption=' . ')), 'captions_train2014.json', 'caption without a word', 'annotation 8 of 000000000002.jpg'),
    'caption of another split': (lambda root: spoil(root, lambda raw: raw['annotations'][7].update(image_id=40)), 'captions_train2014.json', 'annotation of an image that is not listed', 'annotation 8 of image 40'),
    'annotation id twice': (lambda root: spoil(root, lambda raw: raw['annotations'].append(dict(raw['annotations'][4]))), 'captions_train2014.json', 'annotation id listed twice', '5'),
    'image twice': (lambda root: spoil(root, lambda raw: raw['images'].append(dict(raw['images'][3]))), 'captions_train2014.json', 'image id or file name listed twice', '4 (000000000004.jpg)'),
    'one image in both files': (lambda root: spoil(root, lambda raw: raw['images'].append(dict(raw['images'][0], id=3)), 'val'), 'captions_val2014.json', 'image id or file name listed twice', '3 (000000000037.jpg)'),
    'no caption': (lambda root: (without_arrays(root), spoil(root, lambda raw: raw.update(annotations=raw['annotations'][5:]))), 'captions_train2014.json', 'image without a caption', '000000000001.jpg (0)'),
    'missing image': (lambda root: [(root/'val2014'/f'{i:012d}.jpg').unlink() for i in (40, 45)], 'val2014', 'image missing', '000000000040.jpg'),
    'broken file': (lambda root: (root/'annotations'/'captions_val2014.json').write_text('{"images": ['), 'annotations', 'annotation file not readable', 'captions_val2014.json'),
    'other file': (lambda root: (root/'annotations'/'captions_val2014.json').write_text('{"images": [], "annotations": [{"id": 1}]}'), 'annotations', 'annotation file not readable', 'image_id'),
}


@pytest.mark.parametrize('fault', FAULTS)
def test_each_fault_has_one_clear_message(copy, capsys, fault):
    "On opening: where, what, which, how many, what would be right, and the cure; nothing else is said. The check names it too."
    plant, place, words, case = FAULTS[fault]; plant(copy); capsys.readouterr()
    with pytest.raises(BadInput) as e: open_set(copy, 'coco_captions')
    assert e.value.got.startswith(f'{place} in {copy}: {words}, ') and case in e.value.got and e.value.expected in said.REFUSED.values() and e.value.cure and capsys.readouterr().out == ''
    first = check(copy, 'coco_captions')[0]; assert first.what.startswith(f'{words} ({place}, ') and case in first.what and first.cure == e.value.cure


def test_an_array_that_would_run_code_is_not_run(copy, tmp_path):
    "A pickle in an array file is refused unread."
    class Trap:
        def __reduce__(self): return Path.touch, (tmp_path/'ran',)
    np.save(copy/'annotations'/'coco_dev_ids.npy', np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(BadInput, match='list of splits not readable'): open_set(copy, 'coco_captions')
    (copy/'annotations'/'coco_dev_ids.npy').write_bytes(pickle.dumps(Trap()))
    with pytest.raises(BadInput, match='list of splits not readable'): open_set(copy, 'coco_captions')
    assert not (tmp_path/'ran').exists()


TOLD = {
    'few captions': (lambda root: (spoil(root, lambda raw: raw.update(annotations=raw['annotations'][2:])), arrays(root, lambda n, ids: [i for i in ids if i > 2])), 'fewer than five captions', '000000000001.jpg (3)'),
    'unlisted image': (lambda root: arrays(root, lambda n, ids: ids[5:] if n == 'train' else ids), 'image that no split names', '000000000001.jpg'),
    'unlisted captions': (lambda root: arrays(root, lambda n, ids: ids[2:] if n == 'train' else ids), 'image of which only some captions are listed', '000000000001.jpg'),
    'listed twice': (lambda root: arrays(root, lambda n, ids: ids + ids[:2] * (n == 'train')), 'listed twice', 'coco_train_ids.npy, 2: 1, 2'),
}


@pytest.mark.parametrize('what', TOLD)
def test_what_does_no_harm_is_told_in_a_line(copy, capsys, what):
    "The set opens, with a note; the check finds it."
    plant, words, case = TOLD[what]; plant(copy); capsys.readouterr(); found = open_set(copy, 'coco_captions'); text = capsys.readouterr().out
    assert text.count('\n') == 1 and text.startswith(f'note: {words}') and case in text; finding, = check(copy, 'coco_captions'); assert finding.what in text
    if what == 'unlisted captions': assert len(found.source.read('train', 0, 'captions')) == 5


def test_other_numbers_than_those_of_the_full_release_are_told(copy, capsys, monkeypatch):
    "Excerpts are not full releases; a full one with other splits is said by numbers, and is not refused."
    assert said.usual_numbers(dict(train=40, val=6, test=5), '2014', 51) == '' and sum(said.KARPATHY_IMAGES.values()) == 123287
    monkeypatch.setattr(said, 'KARPATHY_IMAGES', dict(train=41, val=5, test=5)); open_set(copy, 'coco_captions'); assert 'train 40 where 41 are usual, val 6 where 5 are usual' in capsys.readouterr().out
    finding, = check(copy, 'coco_captions'); assert finding.what.startswith('other numbers of images than the usual splits have') and 'published' in finding.cure
    monkeypatch.setattr(said, 'KARPATHY_IMAGES', COUNTS); assert check(copy, 'coco_captions') == []


def test_a_part_that_was_not_fetched(copy, capsys):
    "Its splits are left out with a line; lost single images are another thing; nothing at all is refused."
    shutil.rmtree(copy/'train2014'); assert list(open_set(copy, 'coco_captions').splits) == ['val', 'test'] and 'no image at all of this part of the release (train2014, 1: needed by train)' in capsys.readouterr().out
    (copy/'val2014'/'000000000051.jpg').unlink()
    with pytest.raises(BadInput, match='image missing, 1 .000000000051'): open_set(copy, 'coco_captions')
    shutil.rmtree(copy/'val2014')
    with pytest.raises(BadInput, match='without images of train2014, val2014'): open_set(copy, 'coco_captions')


def test_files_that_only_the_check_opens(copy):
    "Broken images, stated sizes, images that no file names."
    (copy/'train2014'/'stranger.jpg').write_bytes(b'1'); (copy/'val2014'/'000000000037.jpg').write_bytes(b'2'); spoil(copy, lambda raw: raw['images'][0].update(width=47))
    assert [(f.kind, f.what.split(' (')[0]) for f in check(copy, 'coco_captions')] == [('broken', 'size mismatch between image and annotation'), ('broken', 'image truncated or not decodable'), ('surplus', 'image that is not in the annotation file')]


def test_the_command_line_checks_and_lists(copy, capsys):
    "Exit codes 0 and 2; the layout is in the list."
    assert cli.main(['data', 'check', 'coco_captions', str(copy)]) == 0 and 'complete and sound' in capsys.readouterr().out
    image_ids(copy); assert cli.main(['data', 'check', 'coco_captions', str(copy)]) == 2; text = capsys.readouterr().out; assert text.count('image ids where annotation ids belong') == 4 and '4 findings' in text
    assert cli.main(['data', 'check', 'coco_captions', str(copy/'val2014'/'..'/'..'/'..')]) == 2 and 'captions_{train,val}{2014,2017}.json' in capsys.readouterr().out


# --- caches --------------------------------------------------------------------------------------------------------

def test_tokens_are_made_once_and_made_again_when_damaged(farm, tmp_path, monkeypatch):
    "One readable file a split; other captions, ids or rules make another one."
    split = open_set(farm[1], 'coco_captions').split('val', ('captions',)); calls = []
    monkeypatch.setattr(said.sentences, 'tokenise', lambda texts: calls.append(len(texts)) or tokenise(texts)); first = said.pretokenised(split, tmp_path)
    assert first == [tokenise(split[i]['captions']) for i in range(6)] and calls == [30] and said.pretokenised(split, tmp_path) == first and calls == [30]
    file, = tmp_path.iterdir(); whole = file.read_text(); assert json.loads(whole)['captions'][2] == [split.ids[2], first[2]] and len(whole.splitlines()) == 8
    for text in (whole[:-9], whole.replace(' on ', ' in ', 1), '{}', '[1]', whole.replace(split.ids[0], 'x')): file.write_text(text); assert said.pretokenised(split, tmp_path) == first and file.read_text() == whole
    assert len(calls) == 6 and said.pretokenised(split.first(2), tmp_path) == first[:2]
    changed = Split(SimpleNamespace(fields=('captions',), read=lambda s, i, f: [f'Ein Fuß, {i} mal.']), 'val', split.ids, (), ('captions',), None, split.dataset, split.hash) # the same fingerprint and ids
    assert said.pretokenised(changed, tmp_path)[3] == ['ein fuß 3 mal'] and 'fuß' in ''.join(f.read_text(encoding='utf-8') for f in tmp_path.iterdir())
    monkeypatch.setattr(said, 'file_hash', lambda path: 'another rule'); before = len(calls); said.pretokenised(split, tmp_path); assert len(calls) == before + 1


def test_tokens_go_to_the_cache_folder(farm, tmp_path, monkeypatch):
    "Where `WSL_NB_CACHE` points."
    monkeypatch.setenv('WSL_NB_CACHE', str(tmp_path/'cache')); split = farm[0].split('test', ('captions',)); said.pretokenised(split); assert [p.suffix for p in (tmp_path/'cache').glob('captions_test_*')] == ['.json']


def test_squares_are_the_pictures_squashed(farm, tmp_path):
    "Within half a byte of what the transform would give; captions, ids and order stay; workers read the same file."
    split = open_set(farm[1], 'coco_captions').split('val', ('image', 'captions')); squares = said.SquareCache(split, 20, tmp_path); part = squares.split()
    straight = [resize(split[i]['image'], (20, 20), 'bicubic') for i in range(6)]; assert all((part[i]['image'] - straight[i]).abs().max() <= .5 / 255 + 1e-6 for i in range(6)) and part.ids == split.ids and part[5]['captions'] == split[5]['captions']
    loader = torch.utils.data.DataLoader(part, 3, num_workers=2, collate_fn=collate); batches = list(loader); assert torch.equal(torch.cat([b['image'] for b in batches]), torch.stack([part[i]['image'] for i in range(6)]))
    assert 'squares' not in pickle.loads(pickle.dumps(part)).source.__dict__ and part.hash != split.hash and said.SquareCache(split, 20, tmp_path).split().hash == part.hash and said.SquareCache(split, 21, tmp_path).split().hash != part.hash
    moved = squares.split(lambda s, g: s | dict(image=s['image'] * 0)); assert moved[1]['image'].abs().max() == 0 and said.pretokenised(part, tmp_path) == said.pretokenised(split, tmp_path)


def test_squares_give_up_the_aspect(tmp_path):
    "A wide picture fills the whole square; what is written is whole rows of bytes."
    wide = np.zeros((10, 40, 3), np.uint8); wide[:, 20:] = 255; said.write_squares(tmp_path/'s.npy', lambda i: wide, 3, 8); found = np.load(tmp_path/'s.npy', mmap_mode='r'); assert found.shape == (3, 8, 8, 3) and found[:, :, :3].max() == 0 and found[:, :, 5:].min() == 255


def test_other_fields_pass_through_the_cache_of_squares(farm, tmp_path):
    "As the drawn set has them, in their own size."
    split = farm[0].split('val'); part = said.SquareCache(split, 16, tmp_path).split(fields=('image', 'mask', 'label')); assert part[2]['image'].shape == (3, 16, 16) and part[2]['mask'].shape == (48, 48) and torch.equal(part[2]['label'], split[2]['label'])


def test_a_damaged_file_of_squares_is_made_again(farm, tmp_path):
    "Cut off, or of another kind; a whole one is left alone."
    split = farm[0].split('test', ('image', 'captions')); file = said.SquareCache(split, 12, tmp_path).file; whole, stamp = file.read_bytes(), file.stat().st_mtime_ns; said.SquareCache(split, 12, tmp_path); assert file.stat().st_mtime_ns == stamp
    for bad in (whole[:-1], whole[:50], b'', b'no array at all'): file.write_bytes(bad); said.SquareCache(split, 12, tmp_path); assert file.read_bytes() == whole
    np.save(file, np.zeros((2, 2))); said.SquareCache(split, 12, tmp_path); assert file.read_bytes() == whole


def test_a_full_disk_is_told_before_anything_is_read(farm, tmp_path, monkeypatch):
    "How much is needed, how much is there; no file is left."
    monkeypatch.setattr(said.shutil, 'disk_usage', lambda p: SimpleNamespace(free=2000)); split = farm[0].split('test', ('image',))
    with pytest.raises(BadInput, match='2e-06 GB free') as e: said.SquareCache(split, 24, tmp_path)
    assert e.value.expected.startswith('8.64e-06 GB for 5 squares of 24') and [p.name for p in tmp_path.iterdir()] == ['.lock']


def test_a_broken_picture_stops_the_cache_and_leaves_nothing(copy, tmp_path):
    "The file is named; the next try starts anew."
    (copy/'val2014'/'000000000048.jpg').write_bytes(b'JFIF'); split = open_set(copy, 'coco_captions').split('test', ('image', 'captions'))
    with pytest.raises(BadInput, match='000000000048.jpg'): said.SquareCache(split, 24, tmp_path/'c')
    assert [p.name for p in (tmp_path/'c').iterdir()] == ['.lock']


def test_several_processes_make_one_file(farm, tmp_path, monkeypatch):
    "The second one waits for the first and finds its file."
    pytest.importorskip('fcntl'); split, made, plain = farm[0].split('val', ('image', 'captions')), [], said.write_squares
    monkeypatch.setattr(said, 'write_squares', lambda *given: (made.append(1), time.sleep(.3), plain(*given)))
    both = [threading.Thread(target=said.SquareCache, args=(split, 10, tmp_path)) for _ in range(3)]; [t.start() for t in both]; [t.join() for t in both]; assert made == [1]


def test_a_cache_of_squares_says_what_it_cannot_do(farm, tmp_path):
    "Another split, no side, nothing to cache."
    split = farm[0].split('test', ('image', 'captions')); squares = said.SquareCache(split, 9, tmp_path)
    for call, words in ((lambda: squares.read('val', 0, 'image'), 'image 0 of val'), (lambda: squares.read('test', 5, 'image'), 'image 5 of test'), (lambda: said.SquareCache(split, 0, tmp_path), 'side 0')):
        with pytest.raises(BadInput, match=words): call()
