"The embedded set is frozen, complete, lawful; splits keep their lock; the cache heals."
import hashlib, pickle

import numpy as np
import pytest
import torch

from wsl_nb import data
from wsl_nb.core import BadInput, rng
from wsl_nb.data_farm import PARTS, phrase

FROZEN = dict(
    wsol='bcd6b1ad32c62c0176a2015030fd9f684acda8c01bd66ad19b6bffaa969b4f86',
    wsss='a2afda74f0b52e628a563a2bad2c30354bf44cc501d16cf4a040c108a03a4ff0',
    wsss_broken='78279ecb516c8ee5e24a2fc9b1218bb2a5e515025c7a0410ce6b7b1a330611d3',
    hard='85798b70357aa285b2cf71e8b8e26d19e1b250b65fd8083a47e7e7c22fbab348',
    small='86287d21eb921b613c855a693d5ae2d8723235827df77a46abff0c4a811e3f87',
)  # Version 2: 20 pictures of split test at 96 px, the last five with camouflage 0.3 and occlusion 0.8


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "An empty cache folder."
    monkeypatch.setenv('WSL_NB_CACHE', str(tmp_path))
    data.farm_source.cache_clear()
    yield tmp_path
    data.farm_source.cache_clear()


@pytest.mark.parametrize('preset', FROZEN)
def test_the_generator_is_frozen(preset):
    "Pixels, masks and captions of 20 pictures; a change needs a new version and new results, not a new hash."
    digest = hashlib.sha256()
    for i in range(20):
        truth = data.example(preset, 0, 'test', i, 96, *((.3, .8) if i >= 15 else (0., 0.)))
        for key in ('image', 'mask', 'part', 'context'): digest.update(truth[key].tobytes())
        digest.update('\n'.join(truth['captions']).encode())
    assert (data.VERSION, digest.hexdigest()) == (2, FROZEN[preset])


@pytest.mark.parametrize('preset', FROZEN)
@pytest.mark.parametrize('occlusion', (0., 1.))
def test_the_truth_of_a_picture_agrees_with_itself(preset, occlusion):
    "Masks, instances, boxes, labels and parts tell one story, and every object can be seen."
    rule = data.PRESETS[preset]
    for i in range(40):
        t = data.example(preset, 3, 'train', i, 64, 0., occlusion)
        ids = t['box_labels'] + 1
        assert 1 <= len(ids) <= rule.objects[1] and len(t['captions']) == 5
        assert sorted(set(ids - 1)) == np.flatnonzero(t['label']).tolist() and set(np.unique(t['mask'])) == {0, *ids}
        assert (t['instances'].sum(0) == (t['mask'] > 0)).all()
        for mask, box, c, thing in zip(t['instances'], t['boxes'].astype(int), ids, t['objects']):
            assert (t['mask'][mask] == c).all() and mask.sum() > .15 * (64 * thing['scale']) ** 2
            ys, xs = np.nonzero(mask)
            assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert not (t['part'] & (t['mask'] == 0)).any() and not (t['context'] & (t['mask'] > 0)).any()


def test_a_picture_is_a_function_of_its_name():
    "Same name, same bytes; seed, split and index each change it; neither knob nor size changes the scene."
    image = lambda **kw: data.example(**(dict(preset='hard', seed=0, split='val', index=4) | kw))['image'].tobytes()
    assert image() == image()
    assert len({image(), image(seed=1), image(split='test'), image(index=5), image(camouflage=.5), image(occlusion=1.)}) == 6
    scenes = [data.example('hard', 0, 'val', 4, **kw)['objects'] for kw in ({}, dict(size=64), dict(camouflage=1.), dict(occlusion=1.))]
    assert all(s == scenes[0] for s in scenes)


def test_the_part_is_what_the_specification_says():
    "The part of animals takes 22 to 29 % of the object, that of vehicles 16 to 31 %, and is all that differs."
    shares = {c: [] for c in data.CLASSES}
    for i in range(240):
        t = data.example('wsol', 0, 'train', i)
        shares[data.CLASSES[t['box_labels'][0]]].append(t['part'].sum() / (t['mask'] > 0).sum())
    mean = {c: float(np.mean(v)) for c, v in shares.items()}
    assert all(.22 <= mean[c] <= .295 for c in data.CLASSES[:4]), mean
    assert all(.16 <= mean[c] <= .31 for c in data.CLASSES[4:]), mean
    assert set(PARTS) == set(data.CLASSES)


def test_context_comes_with_train_and_boat_except_in_the_broken_split():
    "Rails and water follow the probabilities of the presets, and the broken split shows the same toys."
    things = lambda preset: [(o, s['ground']) for i in range(1500) for s in [data.scene(preset, 0, 'test', i)] for o in s['objects']]
    usual, broken = things('wsss'), things('wsss_broken')
    rate = lambda rows, keep: np.mean([o['rails'] for o, _ in rows if keep(o)])
    train, other = lambda o: o['class'] == 'train', lambda o: o['class'] != 'train'
    assert abs(rate(usual, train) - .95) < .04 and rate(usual, other) < .04
    assert rate(broken, train) == 0 and abs(rate(broken, other) - .35) < .04
    assert np.mean([g == 'water' for o, g in usual if o['class'] == 'boat']) > .9 > .4 > np.mean([g == 'water' for o, g in broken if o['class'] == 'boat'])
    assert [o['class'] for o, _ in usual] == [o['class'] for o, _ in broken]


def test_body_colour_texture_and_direction_say_nothing_about_the_class():
    "Frequencies of each attribute within a class are those of all."
    rows = [o for i in range(4000) for o in data.scene('wsol', 1, 'train', i)['objects']]
    for key in ('colour', 'texture', 'mirrored'):
        table = np.array([[sum(o['class'] == c and o[key] == v for o in rows) for v in sorted({o[key] for o in rows})] for c in data.CLASSES])
        expected = table.sum(1, keepdims=True) * table.sum(0) / table.sum()
        assert ((table - expected) ** 2 / expected).sum() < 2.2 * (table.shape[0] - 1) * (table.shape[1] - 1), key


def test_camouflage_moves_bodies_towards_the_ground_and_leaves_parts():
    "At 1 the body has the ground's colour."
    gap = {}
    for value in (0., .5, 1.):
        t = data.example('wsol', 0, 'train', 7, camouflage=value)
        body, ground = (t['mask'] > 0) & (t['part'] == 0), t['mask'] == 0
        gap[value] = np.abs(np.median(t['image'][body], 0) - np.median(t['image'][ground], 0)).sum()
        part = t['image'][t['part'] > 0]
    assert gap[0.] > gap[.5] > gap[1.] and gap[1.] < 30 and len(part)


def test_captions_are_grammatical():
    "An before orange, the class of every told object in the first line, 33 words in all."
    assert phrase(dict(texture='plain', colour='orange', **{'class': 'cat'})) == 'an orange cat'
    assert phrase(dict(texture='striped', colour='orange', **{'class': 'cat'})) == 'a striped orange cat'
    for i in range(100):
        t = data.example('small', 0, 'train', i, 32)
        assert {w for line in t['captions'] for w in line.split()} <= set(data.VOCABULARY) and len(data.VOCABULARY) == 33
        assert all(o['class'] in t['captions'][0] for o in t['objects'][:3]) and t['captions'][0].endswith(t['ground'])


def test_the_cache_is_one_file_and_heals(cache):
    "Read back equal, drawn anew when damaged, truncated or removed, never left half written."
    make = lambda: data.embedded('wsss', train=6, val=3, test=3, size=48)
    want = [s['mask'] for s in make().split('val')]
    file = make().source.file
    assert [p.name for p in cache.iterdir()] == [file.name]
    for harm in (lambda: file.write_bytes(file.read_bytes()[:-300]), lambda: file.write_bytes(b'PK'), file.unlink):
        harm(); data.farm_source.cache_clear()
        assert all(torch.equal(a, b['mask']) for a, b in zip(want, make().split('val')))
    assert [p.name for p in cache.iterdir()] == [file.name]


def test_another_setting_is_another_set(cache):
    "Everything that decides a pixel is in the hash."
    base = dict(preset='wsss', seed=0, size=48, train=2, val=2, test=2, camouflage=0., occlusion=0.)
    hashes = {data.embedded(**(base | change)).hash for change in ({}, dict(preset='hard'), dict(seed=1), dict(size=64), dict(train=3), dict(camouflage=.5), dict(occlusion=.5))}
    assert len(hashes) == 7 and not list(cache.iterdir())  # and nothing was drawn


def test_a_split_opens_only_what_it_asked_for(cache):
    "Image and label are read without unpacking any mask; workers get no pixels by pickle."
    farm = data.embedded('wsss', train=4, val=2, test=0, size=48)
    weak = farm.split('train', ('image', 'label'))
    assert set(weak[0]) == {'id', 'index', 'size', 'image', 'label'} and 'layers' not in farm.source.parts
    assert len(pickle.dumps(weak)) < 5000 and torch.equal(pickle.loads(pickle.dumps(weak))[1]['image'], weak[1]['image'])


def test_a_transform_gets_the_generator_and_nothing_else_is_random(cache):
    "The same key gives the same sample; `split[i]` has a key of its own."
    farm = data.embedded('wsol', train=3, val=1, test=1, size=32)
    jitter = lambda sample, g: sample | {'image': sample['image'] + float(g.random())}
    split = farm.split('train', ('image',), jitter)
    assert torch.equal(split.sample(1, rng('e', 0, 1))['image'], split.sample(1, rng('e', 0, 1))['image'])
    assert not torch.equal(split.sample(1, rng('e', 0, 1))['image'], split.sample(1, rng('e', 1, 1))['image'])
    assert torch.equal(split[1]['image'], split[1]['image']) and split[0]['image'].mean() != split[1]['image'].mean()


def test_batches_and_workers(cache):
    "Stacked and listed keys, with and without worker processes."
    split = data.embedded('hard', train=6, val=1, test=1, size=32).split('train')
    for workers in (0, 1):
        batch = next(iter(torch.utils.data.DataLoader(split, 6, collate_fn=data.collate, num_workers=workers)))
        assert batch['image'].shape == (6, 3, 32, 32) and batch['label'].shape == (6, 8) and batch['index'].tolist() == list(range(6))
        assert all(len(batch[k]) == 6 and isinstance(batch[k], list) for k in ('id', 'size', 'mask', 'boxes', 'box_labels', 'captions', 'part', 'context'))


def test_bad_input_is_told_with_a_cure():
    "Unknown presets, splits, fields; values out of range."
    farm = data.embedded('wsss', train=1, val=1, test=1, size=32)
    for call in (lambda: data.embedded('zoo'), lambda: data.embedded(camouflage=2.), lambda: data.embedded(size=3), lambda: data.embedded(train=-1),
                 lambda: farm.split('holdout'), lambda: farm.split('train', ('image', 'depth')), lambda: data.example('zoo')):
        with pytest.raises(BadInput, match='cure'): call()
