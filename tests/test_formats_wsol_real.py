"The tables of CUB, the WSOL lists and four images of ImageNet, read in full. Skips without WSL_NB_DATA."
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from test_formats_real import copied, real  # noqa: F401 (a fixture)
from wsl_nb.core import BadInput, write_image
from wsl_nb.formats import open_set
from wsl_nb.formats_check import check
from wsl_nb.formats_wsol import cut, half_open, stem, wsol_rows

pytestmark = pytest.mark.data
PARTS = {'CUB/train': 5994, 'CUB/val': 1000, 'CUB/test': 5794, 'ILSVRC/val': 10000}  # images of each list


def test_cub_tables_are_read_in_full(real):  # noqa: F811
    "11,788 images of 200 classes without one of them at hand; the official division, and a tenth of every class for validation."
    cub = open_set(real('cub'), 'cub'); counts = {k: len(v) for k, v in cub.splits.items()}
    assert (cub.name, len(cub.classes), cub.classes[0], cub.classes[-1]) == ('CUB-200-2011', 200, 'Black_footed_Albatross', 'Common_Yellowthroat')
    assert counts['trainval'] == 5994 == counts['train'] + counts['val'] and counts['test'] == 5794 and not set(cub.splits['train']) & set(cub.splits['val'])
    of = {split: Counter(cub.source.parts[split].kinds) for split in cub.splits}
    assert all(of['val'][k] == max(of['trainval'][k] // 10, 1) and of['test'][k] > 0 for k in range(200)) and set(of['trainval'].values()) == {29, 30}
    assert open_set(real('cub')/'CUB_200_2011', 'cub').splits == cub.splits


def test_cub_tables_against_the_list_of_the_same_images(real):  # noqa: F811
    "x, y, x + width, y + height are the numbers of the WSOL list, which cuts them at the last pixel; classes and division agree."
    cub, seen = open_set(real('cub'), 'cub'), Counter()
    for ours, theirs in (('trainval', 'train'), ('test', 'test')):
        rows, bad = wsol_rows(real('wsol_metadata')/'CUB'/theirs); part = cub.source.parts[ours]; at = {name: i for i, name in enumerate(part.ids)}
        assert bad == [] and len(rows) == len(at)
        for r in rows:
            i = at[stem(r.name)[0]]; edge = part.boxes[i] + np.float32([0, 0, 1, 1]); seen['same'] += np.array_equal(edge, r.boxes)
            assert part.kinds[i] == r.kind and np.array_equal(cut(edge, r.size), r.boxes)
            H, W = r.size; x, y = part.boxes[i][0, 2:]; seen['on'] += (x == W) + int(y == H); seen['beyond'] += (x > W) + int(y > H); seen['zero'] += part.boxes[i][0, 0] == 0
            area = lambda b: float(np.prod(b[0, 2:] - b[0, :2])); assert area(cut(part.boxes[i], r.size)) > .92 * area(part.boxes[i])
    assert seen == dict(same=11710, on=51, beyond=30, zero=73)


def test_a_cub_image_is_needed_only_when_it_is_read(real, tmp_path):  # noqa: F811
    "Generated placeholders of the official sizes for a few images, among them one whose box leaves its image."
    root = copied(real('cub')/'CUB_200_2011', tmp_path/'CUB_200_2011'); rows = {stem(r.name)[0]: r for r in wsol_rows(real('wsol_metadata')/'CUB'/'test')[0]}
    cub = open_set(root, 'cub'); part = cub.source.parts['test']; beyond = [i for i, n in enumerate(part.ids) if (part.boxes[i][0, 2:] > rows[n].size[::-1]).any()]
    some = [0, 17, beyond[0], len(part.ids) - 1]
    for i in some: write_image(root/'images'/f'{part.ids[i]}.jpg', np.full((*rows[part.ids[i]].size, 3), 90, np.uint8))
    for i in some:
        s = cub.split('test')[i]; assert s['size'] == rows[s['id']].size and s['label'].argmax() == rows[s['id']].kind == s['box_labels'][0]
        assert np.allclose(np.minimum(s['boxes'][0].numpy() + [0, 0, 1, 1], [1e9, 1e9, *s['size'][::-1]]), rows[s['id']].boxes[0])
    with pytest.raises(BadInput, match='no file'): cub.split('test')[1]
    kinds = Counter(f.kind for f in check(root, 'cub')); assert kinds == dict(missing=1), kinds  # the images that are not there, and nothing else


@pytest.mark.parametrize('part, count', PARTS.items())
def test_wsol_lists_are_read_in_full(real, part, count):  # noqa: F811
    "No contradiction, one class of each, boxes inside; none ends beyond the last pixel, some at it."
    rows, bad = wsol_rows(real('wsol_metadata')/part); assert bad == [] and len(rows) == count and len({r.name for r in rows}) == count
    assert {r.kind for r in rows} == set(range(1000 if 'ILSVRC' in part else 200)) and all(len(r.boxes) > 0 for r in rows)
    ends = np.concatenate([r.boxes[:, 2:] - r.size[::-1] for r in rows]); assert ends.max() == 0 and (ends[:, 0] == 0).sum() > 10
    share = np.mean([len(r.boxes) > 1 for r in rows]); assert round(100 * share, 2) == (20.52 if 'ILSVRC' in part else 0)


def test_wsol_sets_open_without_images(real, capsys):  # noqa: F811
    "Labels and boxes from the lists; the missing images are said, and looked for by name when one is read."
    cub = open_set(real('wsol_metadata')/'CUB', 'wsol'); assert {f'CUB/{k}': len(v) for k, v in cub.splits.items()} == {k: v for k, v in PARTS.items() if 'CUB' in k}
    text = capsys.readouterr().out; assert text.count('no image found') == 3 and len(cub.classes) == 200 and cub.classes == open_set(real('cub'), 'cub').classes
    net = open_set(real('wsol_metadata')/'ILSVRC', 'wsol'); s = net.split('val', ('label', 'boxes'))[9999]; assert s['label'].sum() == 1 and len(net.classes) == 1000
    with pytest.raises(BadInput, match='dataset'): net.split('val', ('image',))[0]
    with pytest.raises(BadInput, match='lists of 2 sets'): open_set(real('wsol_metadata'), 'wsol')


def test_the_excerpt_of_coco_is_half_open(real, capsys):  # noqa: F811
    "Refused as inclusive, with the cure; 24 images of 14 classes, 37 boxes inside, some at the edge; clean."
    root = real('wsol_from_coco')
    with pytest.raises(BadInput, match='localization.txt') as e: open_set(root, 'wsol')
    assert "boxes='half-open'" in e.value.cure
    data = open_set(root, 'wsol', boxes='half-open'); assert list(data.splits) == ['test'] and len(data.splits['test']) == 24 and len(data.classes) == 14 and not capsys.readouterr().out
    boxes = [(s['boxes'].numpy(), *s['size']) for s in data.split('test') if s['label'].sum() == 1 and tuple(s['image'].shape[1:]) == s['size']]
    assert len(boxes) == 24 and sum(len(b) for b, *_ in boxes) == 37 and all((b >= 0).all() and (b[:, 2:] <= (W, H)).all() and (b[:, 2:] > b[:, :2]).all() for b, H, W in boxes)
    assert sum(int((b[:, 2] == W).sum()) for b, H, W in boxes) == 6
    assert check(root, 'wsol', 'half-open') == [] and any('half-open lists' in f.what for f in check(root, 'wsol'))


def test_four_images_of_imagenet(real, capsys):  # noqa: F811
    "Layout ilsvrc and layout wsol give the same truth; sizes, classes by name, boxes of the list; no training images."
    root = real('ilsvrc'); net = open_set(root, 'ilsvrc'); text = capsys.readouterr().out
    assert (net.name, len(net.classes), list(net.splits)) == ('ILSVRC (all boxes)', 1000, ['test']) and 'train: no images' in text and '50.0 % with more than one' in text
    lists = open_set(root, 'wsol'); assert lists.classes == net.classes and lists.splits == net.splits
    names = {'10': ('Angora', (375, 500)), '10010': ('lighter', (375, 500)), '30010': ('black_grouse', (333, 500)), '666': ('typewriter_keyboard', (500, 375))}
    for a, b in zip(net.split('test'), lists.split('test'), strict=True):
        name, size = names[a['id'].rpartition('_')[2].lstrip('0')]
        assert all((a[k] == b[k]).all() for k in ('image', 'label', 'boxes')) and a['size'] == size == tuple(a['image'].shape[1:]) and net.classes[a['label'].argmax()] == name
    listed = [list(map(int, line.split(',')[1:])) for line in (root/'metadata'/'test'/'localization.txt').read_text().splitlines()]
    assert np.array_equal(np.concatenate([s['boxes'].numpy() for s in net.split('test', ('boxes',))]), half_open(listed))
    assert check(root, 'ilsvrc') == [] and check(root, 'wsol') == []


def test_faults_of_imagenet_files(real, tmp_path):  # noqa: F811
    "A copy of the four, one cut short and one at another size."
    root = copied(real('ilsvrc'), tmp_path/'ilsvrc'); files = sorted((root/'val').iterdir()); files[0].write_bytes(files[0].read_bytes()[:9000])
    with Image.open(files[1]) as im: half = im.resize((im.width // 2, im.height // 2))
    half.save(files[1], 'JPEG'); text = [f.what for f in check(root, 'ilsvrc')]
    assert any('truncated' in t and files[0].name in t for t in text) and any('differs from the image' in t and files[1].name in t for t in text)
    with pytest.raises(BadInput, match=files[0].name): [s for s in open_set(root, 'ilsvrc').split('test', ('image',))]
