"Blocks of AffinityNet against forms written straight from the equations, over grids, radii and both borders; half precision under adversarial inputs."
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torchvision.models import resnet50

import bench_affinity_plain as plain
from wsl_nb import affinity as af, affinity_base as base
from wsl_nb.core import BadInput, seed_everything, torch_rng

OFFICIAL = base.VOC_OFFICIAL
FORMS = ('epsilon', 'stable')
checked = settings(max_examples=30, deadline=None, derandomize=True, database=None)


def noise(*shape, key='noise'): return torch.randn(*shape, generator=torch_rng('affinity', key, *shape))


@st.composite
def grids(draw):
    "(h, w, radius, border): any grid for 'full', for 'partial' one that has a pair."
    border, radius = draw(st.sampled_from(('partial', 'full'))), draw(st.integers(2, 5))
    least = (radius, 2 * radius - 1) if border == 'partial' else (1, 1)
    return draw(st.integers(least[0], 11)), draw(st.integers(least[1], 12)), radius, border


def near(h, w, radius, border):
    "Unordered pairs of cells, by looking at every two of them."
    cells, found = list(itertools.product(range(h), range(w))), set()
    for a, b in itertools.combinations(range(h * w), 2): # b is to the right in the same row, or below
        (y, x), (v, u) = cells[a], cells[b]
        if (y - v) ** 2 + (x - u) ** 2 < radius ** 2 and (border == 'full' or (y <= h - radius and radius - 1 <= x <= w - radius)): found.add((a, b))
    return found


# --- pairs -----------------------------------------------------------------------------------------------------------

@checked
@given(grids())
def test_pairs_are_all_that_are_near_and_no_others(case):
    h, w, radius, border = case
    e = noise(2, 3, h, w)
    d = af.pair_distances(e, radius, border)
    at = af.widened(torch.arange(h * w, dtype=torch.float32).view(h, w), radius, border, -1.)
    first, second = af.pair_views(at, radius)
    both = torch.stack([torch.stack([first, x]) for x in second], 1).long() # (2,n,h',w')
    inside = d[0].isfinite()
    found = both[:, inside].T.tolist()
    expected = near(*case)
    assert len(found) == len(expected) and {tuple(p) for p in found} == expected and not inside[(both < 0).any(0)].any()
    i, j = both[:, inside]
    assert torch.allclose(d[:, inside], (e.flatten(2)[:, :, i] - e.flatten(2)[:, :, j]).abs().mean(1), atol=1e-6)
    assert set(zip(*(x.tolist() for x in plain.listed_pairs(*case)))) == expected


@pytest.mark.parametrize('radius, count', [(2, 4), (3, 12), (4, 22), (5, 34)])
def test_half_a_disc_without_its_rim(radius, count):
    offsets = af.pair_offsets(radius)
    assert len(set(offsets)) == len(offsets) == count and not any((-y, -x) in offsets for y, x in offsets)
    assert max(y * y + x * x for y, x in offsets) < radius ** 2


@pytest.mark.parametrize('grid', [(4, 20), (20, 8), (1, 1)])
def test_grids_without_a_pair_are_refused_unless_the_border_is_full(grid):
    e = noise(1, 3, *grid)
    for call in (lambda: af.pair_distances(e, 5, 'partial'), lambda: af.pair_labels(torch.zeros(grid, dtype=torch.uint8), 5, 'partial')):
        with pytest.raises(BadInput, match=f'{grid[0]} x {grid[1]}'): call()
    assert af.pair_distances(e, 5, 'full').isfinite().sum() == len(near(*grid, 5, 'full'))


def test_the_graph_of_the_released_code_forgets_its_border():
    "Degrees at radius 5: 68 inside; few near three sides; ten cells alone. With all pairs every cell has neighbours, and the graph is its mirror image."
    def degrees(border):
        graph = torch.zeros(20 * 24, 20 * 24, dtype=torch.long)
        for a, b in near(20, 24, 5, border): graph[a, b] = graph[b, a] = 1
        step = af.transition(torch.ones(af.pair_distances(noise(1, 2, 20, 24), 5, border).shape[1:]), (20, 24), 5, border)
        assert torch.equal((step.to_dense() > 0).long(), graph + torch.eye(len(graph), dtype=torch.long))
        return graph.sum(1).view(20, 24)
    some, every = degrees('partial'), degrees('full')
    assert some[8, :4].tolist() == [2, 5, 9, 13] and some[8].flip(0)[:4].tolist() == [3, 7, 12, 17] and some[8, 12] == every[8, 12] == 68
    assert (some == 0).sum() == 10 and every.min() > 10
    assert torch.equal(every, every.flip(1)) and torch.equal(every, every.flip(0)) and not torch.equal(some, some.flip(1))


def test_gradient_of_pair_distances():
    "Against finite differences in float64, and against autograd of the gathered form."
    e = torch.randperm(2 * 3 * 5 * 9, generator=torch_rng('gradcheck')).view(2, 3, 5, 9).double().requires_grad_() # no two values are near
    for radius in (2, 3): assert torch.autograd.gradcheck(lambda x: af.PairDistance.apply(x, radius), e)
    e, seed = noise(2, 6, 7, 13).requires_grad_(), noise(2, 34, 3, 5, key='seed')
    ours, = torch.autograd.grad((af.pair_distances(e, 5, 'partial') * seed).sum(), e)
    gathered, = torch.autograd.grad((plain.gathered_distances(e, plain.listed_pairs(7, 13, 5, 'partial')) * seed.flatten(1).view(2, -1)).sum(), e)
    assert torch.allclose(ours, gathered, atol=1e-6)


# --- labels ----------------------------------------------------------------------------------------------------------

KNOWN = {(0, 0): 0, (1, 1): 1, (2, 2): 1, (0, 1): 2, (0, 2): 2, (1, 2): 2} # Kind of pair: background, same class, different; others say nothing


@checked
@given(grids(), st.integers(0, 2 ** 20))
def test_pair_labels_follow_the_table(case, seed):
    h, w, radius, border = case
    label = torch.tensor([0, 1, 2, 255], dtype=torch.uint8)[torch.randint(4, (h, w), generator=torch_rng('label map', seed))]
    kinds = af.pair_labels(label, radius, border)
    flat, counts = label.flatten().tolist(), [0, 0, 0]
    for a, b in near(*case):
        kind = KNOWN.get(tuple(sorted((flat[a], flat[b]))))
        if kind is not None: counts[kind] += 1
    assert [k.sum().item() for k in kinds] == counts and not (kinds[0] & kinds[1] | kinds[0] & kinds[2] | kinds[1] & kinds[2]).any()
    first, second = af.pair_views(af.widened(label, radius, border, 255), radius)
    for n, other in enumerate(second):
        for place in itertools.product(*map(range, first.shape)):
            kind = KNOWN.get(tuple(sorted((first[place].item(), other[place].item()))))
            assert [k[n][place].item() for k in kinds] == [kind == i for i in range(3)]


def test_confident_labels_follow_the_table():
    "Row: winner under the low exponent, under the high one, label; the last cells are padding, where nothing is known."
    rows = [(1, 1, 1), (2, 2, 2), (2, 1, 2), (0, 0, 0), (1, 0, 0), (0, 1, 255), (None, None, 255), (None, 0, 0), (2, None, 0)]
    stride, maps = 4, torch.zeros(2, 3, 1, len(rows))
    for x, winners in enumerate(rows):
        for which, k in zip(maps, winners[:2]):
            if k is not None: which[:, 0, x] = .2; which[k, 0, x] = .6
    large = maps.repeat_interleave(stride, -2).repeat_interleave(stride, -1)
    found = af.confident_labels(*large, stride)
    assert found.dtype == torch.uint8 and found.tolist() == [[r[2] for r in rows]]


def test_the_background_score_is_what_the_largest_map_leaves():
    cam = noise(2, 3, 4, 5).sigmoid()
    scores = af.background_score(cam, 3.)
    assert torch.equal(scores[:, 1:], cam) and torch.allclose(scores[:, 0], ((1 - cam).amin(1)) ** 3) and torch.equal(scores[1], af.background_score(cam[1], 3.))


def test_a_low_exponent_is_a_strong_background():
    "Object under the low exponent is object under the high one, background under the high is background under the low: the swapped order leaves no neutral cell."
    cam = torch.linspace(0, .999, 64).view(1, 1, -1).repeat(1, 4, 1)
    low, high = (af.background_score(cam, a) for a in (4, 32))
    assert torch.equal(low[1:], cam) and (low[0] >= high[0]).all()
    right, swapped = af.confident_labels(low, high, 4), af.confident_labels(high, low, 4)
    assert {0, 1, 255} == set(right.unique().tolist()) and {0, 1} == set(swapped.unique().tolist())
    assert right[0].tolist() == sorted(right[0].tolist(), key=[0, 255, 1].index)


# --- losses ----------------------------------------------------------------------------------------------------------

def test_terms_are_means_over_the_pairs_of_the_batch():
    "Written out; a kind without a pair is zero with a gradient of zero; the two forms agree away from 0 and 1."
    e = (2 * noise(2, 4, 6, 10)).requires_grad_()
    label = torch.full((2, 6, 10), 255, dtype=torch.uint8); label[0, :3] = 0; label[0, 4:] = 2; label[1, 2:4] = 1
    d, kinds = af.pair_distances(e, 4), af.pair_labels(label, 4)
    a = torch.exp(-d.double())
    for form in FORMS:
        terms = af.affinity_terms(d, kinds, form)
        for name, mask, p in (('bg', kinds[0], a), ('fg', kinds[1], a), ('neg', kinds[2], 1 - a)): assert terms[name].item() == pytest.approx(-p[mask].log().mean().item(), rel=1e-3)
    nothing = af.affinity_terms(d, af.pair_labels(torch.full_like(label, 255), 4))
    grad, = torch.autograd.grad(sum(nothing.values()), e)
    assert all(v == 0 for v in nothing.values()) and (grad == 0).all()


HARD = dict(constant=lambda s: torch.ones(s), zero=torch.zeros, huge=lambda s: 6e4 * torch.sign(noise(*s)), alternating=lambda s: (torch.arange(math.prod(s)).view(s) % 2 * 2. - 1) * 3,
            tiny=lambda s: 1e-7 * noise(*s), spike=lambda s: F.one_hot(torch.tensor(7), math.prod(s)).view(s) * 6e4)
LABELS = dict(alike=torch.ones(2, 7, 11), ground=torch.zeros(2, 7, 11), neutral=torch.full((2, 7, 11), 255.), mixed=torch.arange(154).view(2, 7, 11) % 3)


def finite_everywhere(device, precision):
    "Losses of the head and gradients of its input and weights for every hard input, label map, border and form of the logarithm."
    seed_everything('half precision')
    head = af.AffinityHead((5, 6, 7), (4, 4, 4, 12)).to(device)
    for (what, make), (known, label), border, form in itertools.product(HARD.items(), LABELS.items(), ('partial', 'full'), FORMS):
        levels = [make((2, c, 7, 11)).to(device).requires_grad_() for c in (5, 6, 7)]
        with torch.autocast(device, precision):
            d = af.pair_distances(head(levels), 4, border)
            terms = af.affinity_terms(d, af.pair_labels(label.to(device, torch.uint8), 4, border), form)
        assert d.dtype == torch.float32 and all(v.dtype == torch.float32 and v.isfinite() for v in terms.values()), (what, known, border, form, terms)
        grads = torch.autograd.grad(base.total(terms, None, 0, OFFICIAL), [*levels, *head.parameters()])
        assert all(g.isfinite().all() for g in grads), (what, known, border, form)


def test_bf16_is_finite_under_hard_inputs(): finite_everywhere('cpu', torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize('precision', [torch.float16, torch.bfloat16])
def test_half_precision_on_an_accelerator_is_finite_under_hard_inputs(precision): finite_everywhere('cuda', precision)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_embeddings_are_compared_in_float32(dtype):
    "A constant embedding: the affinity is 1, and in half precision log(1 + 1e-5 - 1) is minus infinity, which times 0 is no number."
    a, other = torch.ones(3, dtype=dtype), torch.zeros(3, dtype=dtype)
    assert (other * torch.log(1 + torch.tensor(1e-5, dtype=dtype) - a)).isnan().all()
    for make in HARD.values():
        e = make((1, 6, 7, 11)).to(dtype).requires_grad_()
        for form, border in itertools.product(FORMS, ('partial', 'full')):
            terms = af.affinity_terms(af.pair_distances(e, 4, border), af.pair_labels(LABELS['mixed'][:1].to(torch.uint8), 4, border), form)
            grad, = torch.autograd.grad(sum(terms.values()), e)
            assert all(v.isfinite() and v.dtype == torch.float32 for v in terms.values()) and grad.isfinite().all() and grad.dtype == dtype


# --- walk ------------------------------------------------------------------------------------------------------------

@checked
@given(grids(), st.integers(0, 2 ** 20), st.sampled_from((.5, 1., 8.)))
def test_a_step_is_an_average_over_neighbours(case, seed, beta):
    h, w, radius, border = case
    e, scores = noise(1, 4, h, w, key=seed), noise(3, h, w, key=seed)
    pairs = plain.listed_pairs(*case)
    step = af.transition(af.pair_affinities(e, radius, border)[0], (h, w), radius, border, beta)
    whole = step.to_dense().double()
    assert torch.allclose(whole.T, plain.dense_transition(torch.exp(-plain.gathered_distances(e, pairs))[0], pairs, h * w, beta, torch.float64), atol=1e-6)
    assert torch.allclose(whole.sum(1), torch.ones(h * w).double(), atol=1e-5) and (whole >= 0).all() and step.values().numel() <= len(pairs[0]) * 2 + h * w
    degree = 1 / whole.diagonal() # the cell itself weighs 1
    assert torch.allclose(degree[:, None] * whole, (degree[:, None] * whole).T, atol=1e-5 * degree.max())
    several = af.random_walk(scores, step, (0, 1, 5, 40))
    assert several.shape == (4, 3, h, w) and torch.equal(several[0], scores)
    for t, found in zip((0, 1, 5, 40), several):
        assert torch.equal(found, af.random_walk(scores, step, t))
        assert (found.flatten(1).amax(1) <= scores.flatten(1).amax(1) + 1e-5).all() and (found.flatten(1).amin(1) >= scores.flatten(1).amin(1) - 1e-5).all()
        assert torch.allclose(found.double().flatten(1) @ degree, scores.double().flatten(1) @ degree, atol=1e-4 * degree.sum())
    assert torch.allclose(af.random_walk(torch.full((1, h, w), .7), step, 40), torch.full((1, h, w), .7), atol=1e-5)


@pytest.mark.parametrize('border', ['partial', 'full'])
def test_walk_of_any_length_against_float64(border):
    e, scores = noise(1, 6, 9, 13), noise(2, 9, 13).sigmoid()
    pairs = plain.listed_pairs(9, 13, 5, border)
    step, listed = af.transition(af.pair_affinities(e, 5, border)[0], (9, 13), 5, border), torch.exp(-plain.gathered_distances(e, pairs))[0]
    for t in (1, 3, 100, 256): assert (af.random_walk(scores, step, t) - plain.exact_walk(scores, listed, pairs, 8., t)).abs().max() < 1e-5
    assert torch.allclose(af.random_walk(scores, step, 8), plain.squared_walk(scores, listed, pairs, 8., 3), atol=1e-5)


@pytest.mark.parametrize('steps', [(3, 1), (1, 1), (-1,), -1])
def test_lengths_that_do_not_rise_are_refused(steps):
    step = af.transition(torch.ones(34, 6, 6), (6, 6), 5)
    with pytest.raises(BadInput, match='rising'): af.random_walk(noise(1, 6, 6), step, steps)


# --- maps ------------------------------------------------------------------------------------------------------------

def test_halves_are_rounded_to_the_even_number():
    assert af.rounded((83, 109), .5) == (42, 54) and af.rounded((1, 3), .25) == (1, 1)


def small_classifier(**change):
    seed_everything('small classifier')
    return base.Classifier(replace(base.LAPTOP, **change), 5).eval()


def test_the_mean_of_a_map_is_the_logit():
    net, image = small_classifier(dropout=.5), noise(2, 3, 48, 40)
    maps = F.conv2d(net.backbone(image), net.cam_head.weight)
    assert torch.allclose(maps.mean((2, 3)), net(image), atol=1e-5) and net.cam_head.bias is None and (maps < 0).any()
    net.train()
    assert not torch.allclose(net(image), net(image))


def pictures(count, h=30, w=41): return [np.random.default_rng(i).integers(0, 256, (h, w, 3), dtype=np.uint8) for i in range(count)]


def test_maps_do_not_depend_on_who_shares_the_batch():
    net, three, kinds = small_classifier(), pictures(3), [[0, 4], [], [2]]
    found = af.multi_scale_cam(net.backbone, net.cam_head, three, kinds)
    assert [m.shape for m in found] == [(2, 30, 41), (0, 30, 41), (1, 30, 41)]
    for picture, own, m, slow in zip(three, kinds, found, plain.one_by_one_cam(net.backbone, net.cam_head, three, kinds)):
        alone, = af.multi_scale_cam(net.backbone, net.cam_head, [picture], [own])
        assert torch.allclose(m, alone, atol=1e-4) and torch.allclose(m, slow, atol=1e-4)
        if own: assert (m >= 0).all() and (m < 1).all() and (m.amax((1, 2)) > .9).all()
    mirrored, = af.multi_scale_cam(net.backbone, net.cam_head, [np.ascontiguousarray(three[0][:, ::-1])], [kinds[0]])
    assert torch.allclose(mirrored.flip(-1), found[0], atol=1e-3)
    with pytest.raises(BadInput, match='one size'): af.multi_scale_cam(net.backbone, net.cam_head, [*pictures(1), *pictures(1, 20)], [[0], [0]])


# --- networks --------------------------------------------------------------------------------------------------------

def parameters(module): return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize('size', [(64, 96), (65, 90)])
def test_dilation_keeps_what_the_strided_network_computes(size):
    "torchvision's names and count; with dilation of the stage before, every second and fourth cell is the strided network's output; with its own it is not."
    seed_everything('dilation')
    strided, image = resnet50(weights=None).eval(), noise(1, 3, *size)
    own = {k: v for k, v in strided.state_dict().items() if not k.startswith('fc.')}
    for m in strided.modules():
        if isinstance(m, torch.nn.BatchNorm2d): m.running_var.uniform_(.5, 2)
    second = strided.layer2(strided.layer1(strided.maxpool(strided.relu(strided.bn1(strided.conv1(image))))))
    third = strided.layer3(second); fourth = strided.layer4(third)
    for first_block, same in (('previous', True), ('same', False)):
        net = base.DilatedResNet('resnet50', first_block).eval(); net.load_state_dict(own, strict=True)
        with torch.no_grad(): levels = net.levels(image)
        assert parameters(net) == 23_508_032 and [x.shape[1] for x in levels] == list(net.channels) == [512, 1024, 2048]
        assert all(x.shape[-2:] == tuple(-(-n // 8) for n in size) for x in levels)
        for found, wanted, every in ((levels[0], second, 1), (levels[1], third, 2), (levels[2], fourth, 4)):
            assert torch.allclose(found[..., ::every, ::every], wanted, rtol=1e-4, atol=1e-5 * wanted.abs().max().item()) == (same or every == 1)


def test_the_head_of_a_resnet():
    head = af.AffinityHead((512, 1024, 2048))
    assert parameters(head) == 888_832 and list(head.state_dict()) == ['f8_3.weight', 'f8_4.weight', 'f8_5.weight', 'f9.weight']
    bound = 4 * math.sqrt(6 / (448 + 448))
    assert .99 * bound < head.f9.weight.abs().max() <= bound and head.f8_5.weight.std().item() == pytest.approx(math.sqrt(2 / 2048), rel=.01)
    a = af.pair_affinities(head([noise(1, c, 8, 12).relu() for c in (512, 1024, 2048)]), 5)
    assert .05 < a[a > 0].median() < .95 # affinities start in mid-range: the mean over channels, not the sum


def test_frozen_batch_norm_keeps_its_statistics():
    image = noise(2, 3, 64, 64)
    for bn, moves in (('frozen', False), ('train', True)):
        net = base.Classifier(replace(OFFICIAL, bn=bn), 5)
        before = {k: v.clone() for k, v in net.state_dict().items() if 'running' in k}
        assert net.train() is net and net.training and net.dropout.training and net.eval() is net and not net.dropout.training
        net.train()(image).sum().backward()
        assert len(before) == 2 * 53 and any(not torch.equal(v, net.state_dict()[k]) for k, v in before.items()) == moves
        frozen = {n for n, p in net.named_parameters() if not p.requires_grad}
        assert {n for n in frozen if 'conv' in n} == {n for n, _ in net.named_parameters() if n.startswith(('backbone.conv1', 'backbone.layer1.')) and 'conv' in n}
        assert ('backbone.layer4.0.bn1.weight' in frozen) != moves
        assert all((p.grad is not None) == p.requires_grad for p in net.parameters())
    with pytest.raises(BadInput, match='layer9'): base.Classifier(replace(OFFICIAL, frozen_until='layer9'), 5)


def test_four_groups_and_the_momentum_of_the_released_code():
    net = base.Segmenter(replace(base.LAPTOP), 5) # has all four kinds of parameters
    cfg = replace(OFFICIAL, lr=.1)
    update = base.optimizer(net, cfg)
    assert [(round(g['lr'], 6), g['weight_decay']) for g in update.param_groups] == [(.1, 5e-4), (.2, 0.), (1., 5e-4), (2., 0.)]
    assert {g['momentum'] for g in update.param_groups} == {cfg.weight_decay} == {5e-4}
    assert {g['momentum'] for g in base.optimizer(net, replace(cfg, momentum=.9)).param_groups} == {.9}
    learnt = [p for g in update.param_groups for p in g['params']]
    assert len({id(p) for p in learnt}) == len(learnt) == sum(p.requires_grad for p in net.parameters())


# --- losses of the stages --------------------------------------------------------------------------------------------

def test_without_weight_no_pair_is_formed(monkeypatch):
    cfg = replace(base.LAPTOP, mode='joint', lambda_aff=0., radius=3)
    seed_everything('joint')
    net = af.AffinityNet(cfg, 5)
    batch = dict(image=noise(2, 3, 48, 48), label=F.one_hot(torch.tensor([1, 4]), 5).float(), mask=[torch.zeros(12, 12, dtype=torch.uint8)] * 2)
    both = af.losses_affinity(net, batch, 0, replace(cfg, lambda_aff=.1))
    assert set(both) == set(base.weights(replace(cfg, lambda_aff=.1), 0, 'affinity')) == {'cls', 'bg', 'fg', 'neg'}
    whole = base.total(both, net, 0, replace(cfg, lambda_aff=.1))
    assert whole.item() == pytest.approx((both['cls'] + .1 * (both['bg'] / 4 + both['fg'] / 4 + both['neg'] / 2)).item(), rel=1e-6)
    def refuse(*_): raise AssertionError('a pair was formed')
    monkeypatch.setattr(af, 'pair_distances', refuse); monkeypatch.setattr(af, 'pair_labels', refuse)
    alone = af.losses_affinity(net, batch, 0, cfg)
    assert set(alone) == set(base.weights(cfg, 0, 'affinity')) == {'cls'} and torch.equal(alone['cls'], both['cls'])
    with pytest.raises(AssertionError, match='formed'): af.losses_affinity(net, batch, 0, replace(cfg, lambda_aff=.1))
