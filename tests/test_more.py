"Blocks and losses of MoRe against forms written straight from the equations; the three NaN mechanisms and their guards."
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import reference_more as plain
from training_child import MORE_TINY
from wsl_nb import cli, more, more_base
from wsl_nb.core import BadInput, normalise, seed_everything, torch_rng
from wsl_nb.data import embedded
from wsl_nb.formats_write import export
from wsl_nb.maps import class_maps, three_way_labels
from wsl_nb.vit import TokenViT

TINY = replace(MORE_TINY, ptc_from=0, lir_from=0, seg_from=0)
STEPS = (0, TINY.switch, TINY.switch + 1) # Auxiliary maps, the last step of them, final maps


def noise(*shape, key='noise'): return torch.randn(*shape, generator=torch_rng(key, *shape))


def network(cfg=TINY, classes=5, apart=True):
    "A model of a fixed seed; `apart` tells its class tokens apart, as training does."
    seed_everything('test more')
    model = more.MoRe(cfg, classes)
    with torch.no_grad():
        if apart: model.encoder.cls_token.add_(.2 * noise(*model.encoder.cls_token.shape))
    return model


def batch(classes=5, size=64, count=2):
    "Smooth images with one and two present classes."
    label = torch.zeros(count, classes)
    for b in range(count): label[b, [b, 3][:1 + b % 2]] = 1
    return dict(image=normalise(F.interpolate(noise(count, 3, 8, 8), size=(size, size), mode='bilinear').sigmoid()), label=label, index=torch.arange(count))


def scene(B=2, C=5, D=12, h=11, w=13):
    "Tokens, patches, labels and a label map of blobs with uncertain rims."
    label = torch.zeros(B, C); label[:, 0] = 1; label[1:, 2] = 1
    value = F.interpolate(noise(B, C, 4, 4), size=(h, w), mode='bilinear').sigmoid()
    return noise(B, C, D).requires_grad_(), noise(B, D, h, w).requires_grad_(), label, three_way_labels(value, label, .45, .6)


def close(a, b, tolerance=1e-5):
    assert torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=tolerance, atol=tolerance), (a, b)


# --- the network ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [(64, 64), (64, 88), (71, 58)])
def test_shapes_for_images_of_any_size(size):
    h, w = (n // 8 for n in size)
    out, D = network()(noise(2, 3, *size)), TINY.dim
    assert [tuple(x.shape) for x in out] == [(2, 5), (2, 5), (2, D, h, w), (2, D, h, w), (2, 5, D), (2, 5, D), (2, 6, h, w)]
    assert more.attention_maps(out.features, out.tokens).shape == (2, 5, h, w)


@pytest.mark.parametrize('depth, aux, block', [(3, -3, 0), (4, -3, 1), (4, -1, 3)])
def test_auxiliary_patches_are_those_after_their_block_and_not_normed(depth, aux, block):
    model, image = network(replace(TINY, depth=depth, aux_block=aux)), noise(1, 3, 64, 64)
    stream = model.encoder.block_outputs(image)[1 + block][:, model.encoder.front:]
    close(model(image).aux_features.flatten(2).mT, stream)


def test_registers_are_thrown_away_and_class_tokens_keep_their_order():
    model, image = network(), noise(1, 3, 64, 64)
    whole = model.encoder.norm(model.encoder.block_outputs(image)[-1])
    close(model(image).class_tokens, whole[:, TINY.registers:TINY.registers + 5])


def test_attention_is_the_materialised_one():
    "Without a window, blocks equal softmax attention written out."
    encoder = TokenViT(9, 16, 2, 2, 8, 4, 2.)
    x, _ = encoder.tokens_in(noise(2, 3, 32, 40))
    for block in encoder.blocks: close(block(x), plain.plain_attention_block(block, x)[0])


def test_class_logits_pool_first_and_are_not_the_maximum_of_the_map():
    model, image = network(), noise(2, 3, 64, 64)
    out = model(image)
    close(out.cls, F.conv2d(out.features.amax((2, 3), keepdim=True), model.classifier.weight)[:, :, 0, 0])
    assert ((out.cls - class_maps(out.features, model.classifier).amax((2, 3))).abs() > .01).any()


@pytest.mark.parametrize('gcr', [True, False])
@pytest.mark.parametrize('classes', [2, 5, 20])
def test_class_tokens_start_equal_so_mct_is_ln_c(classes, gcr):
    out = network(replace(TINY, gcr=gcr), classes, apart=False)(noise(2, 3, 64, 64))
    assert more.class_token_contrast(out.tokens).item() == pytest.approx(math.log(classes), abs=1e-4)
    lam = more.attention_maps(out.features, out.tokens)
    assert (lam - lam[:, :1]).abs().max() < 1e-4


def test_only_cre_breaks_the_symmetry():
    "At equal tokens mct has no gradient; CRE pulls each present class its own way."
    _, f, label, label_map = scene()
    q = noise(2, 1, 12).expand(-1, 5, -1).clone().requires_grad_()
    mct, = torch.autograd.grad(more.class_token_contrast(q), q)
    cre, = torch.autograd.grad(more.confident_relation(q, f.flatten(2).mT, label_map, label), q)
    assert mct.abs().max() < 1e-6 < 1e-3 < (cre[1, 0] - cre[1, 2]).abs().max() and not cre[:, 1].any()


def test_registers_differ_and_all_other_front_tokens_are_copies():
    encoder = network(apart=False).encoder
    place, token = encoder.pos_embed[0, :encoder.front], encoder.cls_token[0]
    assert (token == token[0]).all() and (place[TINY.registers:] == place[TINY.registers]).all()
    assert len({tuple(p.tolist()) for p in place[:TINY.registers]}) == TINY.registers


# --- graph category representation ---------------------------------------------------------------------------------

def graph(**changes):
    seed_everything('graph')
    return more.GraphCategoryRepresentation(12, **changes)


@pytest.mark.parametrize('classes, asked, kept', [(5, None, 2), (6, None, 3), (1, None, 1), (20, None, 10), (5, 7, 7), (5, 400, 35)])
def test_neighbours_are_half_the_classes_unless_asked(classes, asked, kept):
    steps = graph(neighbours=asked).steps(noise(2, classes, 12), noise(2, 30, 12))
    assert steps['index'].shape == (2, classes, min(kept, classes + 30)) and all(len(set(r.tolist())) == len(r) for r in steps['index'].flatten(0, 1))


@pytest.mark.parametrize('tails', ['tokens_patches', 'patches'])
@pytest.mark.parametrize('gate', ['sum_product', 'dot'])
def test_graph_equals_its_equations(tails, gate):
    layer, M, P = graph(neighbours=4, tails=tails, gate=gate), noise(2, 5, 12), noise(2, 20, 12)
    close(layer(M, P), plain.plain_graph(layer, M, P, 4, tails, gate), 1e-4)


def test_the_two_gates_differ():
    M, P = noise(2, 5, 12), noise(2, 20, 12)
    a, b = (graph(gate=g).steps(M, P) for g in ('sum_product', 'dot'))
    assert torch.equal(a['index'], b['index']) and not torch.allclose(a['gate'], b['gate'], atol=1e-2)


def test_no_gradient_reaches_patches_through_graph_or_cre():
    q, f, label, label_map = scene()
    patches = f.flatten(2).mT
    out = graph()(q, patches)
    loss = out.square().sum() + more.confident_relation(out, patches, label_map, label)
    token, patch = torch.autograd.grad(loss, [q, f], allow_unused=True)
    assert patch is None and token.abs().sum() > 0


# --- losses --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('tau', [.5, .1])
@pytest.mark.parametrize('eps', [1e-4, 0])
def test_cre_equals_the_loop(tau, eps):
    q, f, label, label_map = scene()
    patches = f.flatten(2).mT * .3
    ours, loop = more.confident_relation(q, patches, label_map, label, tau, eps), plain.plain_cre(q, patches, label_map, label, tau, eps)
    close(ours, loop); close(*(torch.autograd.grad(v, q)[0] for v in (ours, loop)))


def test_cre_ignores_confident_patches_of_absent_classes():
    q, f, label, label_map = scene()
    changed = label_map.clone(); changed[label_map == 0] = 5
    close(more.confident_relation(q, f.flatten(2).mT, changed, label), more.confident_relation(q, f.flatten(2).mT, label_map, label))


def test_ure_candidates_equal_the_loop():
    label_map = scene(B=4)[3]
    accepted, confident = more.uncertain_candidates(label_map)
    assert accepted.shape == (4, 5, 7) and accepted.any() and confident.any()
    for b, m in enumerate(label_map):
        a, c = plain.plain_ure_candidates(m)
        assert torch.equal(accepted[b].nonzero(), a) and torch.equal(confident[b].nonzero(), c)


def test_ure_anchor_is_the_corner_or_the_tested_patch():
    label_map, keys = scene(B=4, h=20, w=24)[3], [(b,) for b in range(4)]
    corner, centre = (more.pick_uncertain(label_map, keys, a) for a in ('corner', 'centre'))
    loop = [torch.cat([torch.full((len(p), 1), b), p], 1) for b, p in enumerate(plain.plain_pick(label_map, keys))]
    assert torch.equal(corner, torch.cat(loop)) and torch.equal(centre - corner, torch.tensor([0, 3, 3]).expand_as(corner))
    full = corner[:, 0].bincount() == 8
    tested = label_map[centre[:, 0], centre[:, 1], centre[:, 2]]
    assert full.any() and (tested[full[centre[:, 0]]] == 255).all()
    missed = label_map[corner[:, 0], corner[:, 1], corner[:, 2]]
    assert (missed != 255).any(), 'the released corner token may be anything'


@pytest.mark.parametrize('value, picked', [(0, 2), (1, 2), (255, 2)])
def test_an_image_without_candidates_gives_two_tokens(value, picked):
    "All background and all uncertain: any position; all confident: confident ones."
    label_map = torch.full((3, 9, 9), value, dtype=torch.uint8)
    assert more.pick_uncertain(label_map, [(b,) for b in range(3)])[:, 0].bincount().tolist() == [picked] * 3


@pytest.mark.parametrize('side', [5, 6])
def test_ure_says_that_a_map_is_too_small(side):
    with pytest.raises(BadInput, match='more than 6 patches'): more.uncertain_candidates(torch.zeros(1, 9, side, dtype=torch.uint8))


def test_ure_equals_the_loop_and_trains_patches_only():
    q, f, label, label_map = scene(B=3)
    keys = [(b,) for b in range(3)]
    ours, loop = more.uncertain_relation(q, f, label, more.pick_uncertain(label_map, keys)), plain.plain_ure(q, f, label, plain.plain_pick(label_map, keys))
    close(ours, loop)
    (a, token), b = torch.autograd.grad(ours, [f, q], allow_unused=True), torch.autograd.grad(loop, f)[0]
    close(a, b); assert token is None
    nothing = more.uncertain_relation(q, f, label, torch.empty(0, 3, dtype=torch.long))
    assert nothing == 0 and not torch.autograd.grad(nothing, f)[0].any()


def test_ptc_equals_the_loop_over_pairs():
    _, f, _, label_map = scene(h=5, w=4)
    ours, loop = more_base.patch_token_contrast(f, label_map), plain.plain_pairs(f, label_map)
    close(ours, loop); close(*(torch.autograd.grad(v, f)[0] for v in (ours, loop)))
    assert more_base.patch_token_contrast(f, torch.full_like(label_map, 255)) == .5


def test_balanced_cross_entropy_equals_the_loop_over_pixels():
    logits, ids = noise(2, 4, 5, 6), torch.randint(0, 4, (2, 5, 6), generator=torch_rng('ids')).to(torch.uint8)
    ids[0, 0], ids[1, :, 2] = 255, 255
    for m in (ids, torch.where(ids == 255, 255, 0).to(torch.uint8), ids.clamp(min=1)):
        close(more_base.balanced_cross_entropy(logits, m), plain.plain_balanced(logits, m))
    assert more_base.balanced_cross_entropy(logits, torch.full_like(ids, 255)) == 0


@pytest.mark.parametrize('step', STEPS)
def test_losses_of_a_step_equal_the_plain_step(step):
    "All terms and gradients, for final maps of the decoder, without a window: the plain step knows no other."
    cfg = replace(TINY, patch_window=None, decoder_map='cam')
    model, data = network(cfg), batch()
    ours, loop = more.losses(model, data, step, cfg), plain.plain_step_losses(model, data, step, cfg)
    assert list(ours) == ['cls', 'aux', 'mct', 'ptc', 'cre', 'ure', 'seg', 'reg']
    for k in ours: close(ours[k], loop[k], 1e-4)
    params = [p for p in model.parameters() if p.requires_grad]
    a, b = (torch.autograd.grad(sum(t.values()), params) for t in (ours, {k: loop[k] for k in ours}))
    assert max((x - y).norm() / (y.norm() + 1e-3) for x, y in zip(a, b)) < 1e-3


@pytest.mark.parametrize('cfg', [MORE_TINY, more_base.LAPTOP, more_base.LAPTOP_BASELINE, more_base.VOC_OFFICIAL, more_base.COCO_OFFICIAL, replace(MORE_TINY, w_mct=0., w_seg=0.)],
                         ids=['tiny', 'LAPTOP', 'LAPTOP_BASELINE', 'VOC_OFFICIAL', 'COCO_OFFICIAL', 'without mct and seg'])
def test_losses_have_the_names_of_the_weights(cfg):
    "Around every first step, on a small network with the schedule of the recipe."
    small = replace(TINY, **{k: getattr(cfg, k) for k in ('ptc_from', 'lir_from', 'seg_from', 'switch', 'gcr', *(f'w_{t}' for t in ('cls', 'aux', 'mct', 'ptc', 'cre', 'ure', 'seg', 'reg')))})
    model, data = network(small), batch()
    for step in sorted({0, *(max(0, s + d) for s in (cfg.ptc_from, cfg.lir_from, cfg.seg_from, cfg.switch) for d in (-1, 0, 1))}):
        terms = more.losses(model, data, step, small)
        assert terms.keys() == more.weights(cfg, step).keys() and all(v.ndim == 0 and v.isfinite() for v in terms.values())
        assert more.total(terms, model, step, small).item() == pytest.approx(sum(w * terms[k].item() for k, w in more.weights(small, step).items()), rel=1e-5)


def test_official_schedules():
    "Conditions are n > 2000 on VOC, n > 8000, 12000, 16000 on COCO."
    at = lambda cfg, *steps: [len(more.weights(cfg, s)) for s in steps]
    assert at(more_base.VOC_OFFICIAL, 0, 2000, 2001) == [6, 6, 8]
    assert at(more_base.COCO_OFFICIAL, 0, 8000, 8001, 12000, 12001, 16000, 16001) == [3, 3, 4, 4, 6, 6, 8]


def test_decoder_and_maps_are_skipped_while_nobody_needs_them(monkeypatch):
    def never(*args, **rest): raise AssertionError('was called')
    cfg = replace(TINY, ptc_from=2, lir_from=2, seg_from=4)
    model, data = network(cfg), batch()
    for name in ('training_cams', 'refined_labels', 'upsampled_lam'): monkeypatch.setattr(more, name, never)
    model.decoder.forward = never
    assert list(more.losses(model, data, 1, cfg)) == ['cls', 'aux', 'mct'] and model(data['image'], False).seg is None
    monkeypatch.undo(); monkeypatch.setattr(more, 'refined_labels', never)
    assert 'ure' in more.losses(model, data, 3, cfg)
    with pytest.raises(AssertionError, match='was called'): more.losses(model, data, 4, cfg)


@pytest.mark.parametrize('precision', [torch.bfloat16, torch.float16])
def test_losses_stay_in_float32_under_autocast(precision):
    model, data = network(), batch()
    exact = more.losses(model, data, 9, TINY)
    with torch.autocast('cpu', precision): terms = more.losses(model, data, 9, TINY)
    assert {k: v.dtype for k, v in terms.items()} == dict.fromkeys(exact, torch.float32) and all(v.isfinite() for v in terms.values())
    for k in ('cls', 'aux', 'mct'): close(terms[k], exact[k], .05)


@pytest.mark.parametrize('name', ['class_token_contrast', 'confident_relation', 'uncertain_relation', 'patch_token_contrast', 'balanced_cross_entropy'])
def test_a_loss_gives_the_same_number_inside_autocast(name):
    "Bit for bit: a product in half precision would differ."
    rng = torch_rng(name)
    q, f, y = torch.randn(2, 5, 16, generator=rng), torch.randn(2, 16, 8, 8, generator=rng), torch.tensor([[1., 0, 1, 0, 0], [0, 1., 0, 0, 0]])
    ids = torch.randint(0, 3, (2, 8, 8), generator=rng).to(torch.uint8)
    args = dict(class_token_contrast=(q,), confident_relation=(q, f.flatten(2).mT, ids, y), uncertain_relation=(q, f, y, torch.tensor([[0, 2, 3], [1, 4, 4]])),
                patch_token_contrast=(f, ids), balanced_cross_entropy=(f, ids))[name]
    loss = getattr(more, name)
    with torch.autocast('cpu', torch.bfloat16): inside = loss(*args)
    assert inside.dtype == torch.float32 and torch.equal(inside, loss(*args))


def test_bf16_map_passes_change_few_labels():
    model, data = network(), batch(count=4)
    with torch.no_grad(): out = model(data['image'])
    maps = [more.training_cams(model, data['image'], out, replace(TINY, cam_precision=p), data['label']) for p in ('fp32', 'bf16')]
    found = [more.patch_labels(*m, data['label'], (8, 8), 0, TINY) for m in maps]
    assert all(m.dtype == torch.float32 for m in maps[1]) and not torch.equal(maps[0][0], maps[1][0])
    for k in found[0]: assert (found[0][k] != found[1][k]).float().mean() < .05, k


def test_absent_classes_have_no_map():
    model, data = network(), batch()
    with torch.no_grad(): out = model(data['image'])
    every, present = (more.training_cams(model, data['image'], out, TINY, y) for y in (None, data['label']))
    for a, b in zip(every, present): close(a * data['label'][:, :, None, None], b)


def test_training_opens_no_training_mask(tmp_path):
    "The masks of all training images are deleted; the run still learns, and is scored on val."
    data = embedded('small', size=64, train=6, val=2, test=0)
    root = export(data, 'voc', tmp_path/'VOC2012')
    masks = [p for s in ('train', 'train_aug') for i in data.splits['train'] for p in root.rglob(f'{i}.png')]
    assert masks
    for p in set(masks): p.unlink()
    out = tmp_path/'run'
    assert cli.main(['train', 'more', '--config', str(as_yaml(tmp_path, layout='voc', steps=3, seg_from=1)), '--data', str(tmp_path), '--out', str(out)]) == 0
    assert (out/'result.json').exists()


def as_yaml(folder, **changes):
    "MORE_TINY as a recipe file."
    import yaml
    from wsl_nb.training_checkpoint import as_plain
    file = folder/'recipe.yaml'; file.write_text(yaml.safe_dump(as_plain(replace(MORE_TINY, **changes))))
    return file


# --- the three ways to NaN, and their guards -----------------------------------------------------------------------

@pytest.mark.parametrize('side, overflows', [(146, False), (147, True), (448, True)])
def test_nan_1_the_segmentation_sum_overflows_half_precision(side, overflows):
    "ln 21 a pixel: 65504 is passed between 146 and 147 pixels a side; small smoke tests do not reveal it."
    logits, label_map = torch.zeros(1, 21, 7, 7).half(), torch.ones(1, side, side, dtype=torch.uint8)
    big = F.interpolate(logits.float(), size=(side, side), mode='bilinear')
    released = F.cross_entropy(big, label_map.long(), reduction='none').half().sum()
    assert released.isinf() == overflows and (0. * released).isnan() == overflows, 'a factor 0.0 makes it NaN'
    ours = more_base.balanced_cross_entropy(logits, label_map)
    assert ours.dtype == torch.float32 and ours.item() == pytest.approx(.5 * math.log(21), abs=1e-4)


@pytest.mark.parametrize('shift, overflows', [(.24, False), (.25, True), (.3, True)])
def test_nan_2_the_gate_overflows_half_precision(shift, overflows):
    "(sum t)(sum tanh 2t) over 768 channels of one common shift; the guard is float32 inside autocast."
    layer = more.GraphCategoryRepresentation(768)
    with torch.no_grad():
        for proj in (layer.head_proj, layer.tail_proj): proj.weight.zero_(); proj.bias.fill_(shift)
    near, mixed = torch.full((768,), shift).half(), torch.tanh(torch.full((768,), 2 * shift)).half()
    logit = near.sum() * mixed.sum()
    assert logit.isinf() == overflows and logit.expand(3).softmax(-1).isnan().all() == overflows
    M, P = noise(1, 4, 768).half().requires_grad_(), noise(1, 9, 768).half()
    with torch.autocast('cpu', torch.float16): steps = layer.steps(M, P)
    assert steps['gate_logit'].dtype == torch.float32 and steps['gate_logit'].max().item() == pytest.approx(shift * 768 * math.tanh(2 * shift) * 768, rel=1e-3)
    grads = torch.autograd.grad(steps['out'].square().sum(), [M, *layer.parameters()], allow_unused=True)
    assert steps['out'].isfinite().all() and all(g.isfinite().all() for g in grads if g is not None)


def projected(*values):
    "Token, patches of these projections, all confident, and the label."
    q = torch.tensor([[[1., 0.]]]).requires_grad_()
    return q, torch.tensor([[[v, 1.] for v in values]]), torch.ones(1, 1, len(values), dtype=torch.uint8), torch.ones(1, 1)


@pytest.mark.parametrize('tau, value, becomes', [(.5, 12, 'finite'), (.5, 44, 'inf'), (.5, 45, 'nan'), (.1, 5, 'finite'), (.1, 8, 'inf'), (.1, 9, 'nan')])
def test_nan_3_naive_cre(tau, value, becomes):
    "Projections of plus and minus `value`: exp overflows at 88.7, its quotient underflows before."
    args = projected(value, -value)
    naive = plain.released_cre(*args, tau)
    assert dict(finite=naive.isfinite(), inf=naive.isinf(), nan=naive.isnan())[becomes]
    ours = more.confident_relation(*args, tau)
    assert ours.item() == pytest.approx(value / tau, rel=1e-3) and torch.autograd.grad(ours, args[0])[0].isfinite().all()
    if becomes == 'finite': close(ours, naive, 1e-3)


def test_nan_3_infinity_on_a_patch_that_is_masked_out():
    q, patches, label_map, label = projected(0., 0., -60.)
    label_map[..., 2] = 0
    assert plain.released_cre(q, patches, label_map, label).isnan()
    assert more.confident_relation(q, patches, label_map, label).item() == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize('value, loss', [(-6, 3.01), (-12, 14.79), (-25, 40.79)])
def test_the_constant_makes_cre_an_absolute_pull(value, loss):
    "Four patches of equal projection: ln 4 by the paper's equation, whatever the projection."
    args = projected(*[value] * 4)
    assert more.confident_relation(*args).item() == pytest.approx(loss, abs=.01) == plain.released_cre(*args).item()
    assert more.confident_relation(*args, eps=0).item() == pytest.approx(math.log(4), abs=1e-3)


def test_nan_3_the_dead_branch():
    "Every exponential underflows: the released loss is log(1 + 1e-4) without gradient; ours keeps pulling."
    q, *rest = projected(*[-60.] * 4)
    dead, ours = plain.released_cre(q, *rest), more.confident_relation(q, *rest)
    assert dead.item() == pytest.approx(1e-4, rel=1e-2) and not dead.requires_grad
    assert ours.item() == pytest.approx(120 + math.log(1e-4), rel=1e-3) and torch.autograd.grad(ours, q)[0].abs().max() > 1
