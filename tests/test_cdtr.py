"Blocks and losses of CDTR against forms written straight from the equations, CATR by subset of the vectors, and the incidents of the released code and of an earlier run."
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import create_transform

import parity
import parity_cdtr
import reference_cdtr as plain
from wsl_nb import cdtr, cdtr_base as base, cdtr_weights
from wsl_nb.core import BadInput, normalise, rng, seed_everything, torch_rng
from wsl_nb.data_farm import VOCABULARY
from wsl_nb.data_transforms import crop_box, resize
from wsl_nb.training_config import autocast
from wsl_nb.vit_clip import image_features, random_clip

GOLDEN = Path(__file__).parent/'golden'/'cdtr'
TINY = replace(base.CUB_OFFICIAL, dim=24, depth=4, heads=3, patch=8, side=6, mlp_ratio=2., drop_path=0., csm_width=3, ocm_blocks=3, clip_dim=7, precision='fp32', batch=3)
CLASSES = 5


def noise(*shape, key='noise'): return torch.randn(*shape, generator=torch_rng('cdtr', key, *shape))


def pair(classes=CLASSES, cfg=TINY):
    "(the library's network, the plain one), the same random weights."
    other = plain.randomised(plain.PlainCDTR(classes, cfg.dim, cfg.depth, cfg.heads, cfg.mlp_ratio, cfg.patch, cfg.side, cfg.csm_width, cfg.ocm_blocks), torch_rng('cdtr', 'weights'))
    ours = cdtr.CDTR(cfg, classes); cdtr_weights.start_from(ours, other.state_dict())
    return ours, other


class Colours:
    "A CLIP whose picture features are mean colours times a matrix."
    def __init__(self, width=TINY.clip_dim): self.matrix, self.side, self.positional_embedding, self.mean, self.std = noise(3, width, key='clip'), TINY.patch * TINY.side, torch.zeros(1), (.4, .5, .6), (.2, .3, .4)
    def encode_image(self, x): return (1 + x.mean((2, 3))) @ self.matrix.abs()                     # similarities above the clamp


def batch(n=3, size=(48, 48)): return dict(image=noise(n, 3, *size, key='image'), label=torch.eye(CLASSES)[torch.arange(n) * 2 % CLASSES])


def sentences(width=TINY.clip_dim): return F.normalize(noise(CLASSES, width, key='text').abs(), dim=1)


def near(a, b, tolerance=1e-5): torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * max(b.abs().max().item(), 1e-3))


# --- blocks ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('grid', [(2, 2), (2, 7), (3, 5), (7, 4), (9, 12), (14, 14)])
@pytest.mark.parametrize('training', [True, False])
def test_modules_on_any_grid_equal_their_plain_forms(grid, training):
    "Odd sides too; one grouped convolution is as good as separate branches, in its gradient and in its running statistics."
    ours, other = pair(); ours.train(training), other.train(training)
    rows = noise(TINY.depth, 4, TINY.heads, *grid, key='rows').softmax(-1)
    a, b = (rows.clone().requires_grad_() for _ in range(2))
    stimulated, object_map = ours.csm(a.transpose(0, 1).flatten(1, 2)), ours.object_map(a)
    found = other.stimulation(b.transpose(0, 1).flatten(1, 2)) | other.constraint(b)
    near(stimulated, found['csm_map']); near(object_map, found['pre_map'][:, 0])
    weight = noise(4, CLASSES, *grid, key='weight'), noise(4, *grid, key='weight')
    for m, o in ((stimulated, object_map), (found['csm_map'], found['pre_map'][:, 0])): ((m * weight[0]).sum() + (o * weight[1]).sum()).backward()
    near(a.grad, b.grad, 1e-3); assert (a.grad[TINY.ocm_blocks:] != 0).any() and not a.grad[0].equal(a.grad[1])
    for name, p in other.named_parameters():
        if p.grad is not None: near(plain.under_released_name(dict((n, q.grad) for n, q in ours.named_parameters()), name), p.grad, 1e-3)
    for name, value in other.named_buffers(): near(plain.under_released_name(ours.state_dict(), name), value)


def test_the_last_blocks_are_left_out_of_the_object_map():
    ours, _ = pair(); rows = noise(TINY.depth, 2, TINY.heads, 6, 6).softmax(-1).requires_grad_()
    ours.object_map(rows).sum().backward()
    assert (rows.grad[:TINY.ocm_blocks] != 0).flatten(1).any(1).all() and not rows.grad[TINY.ocm_blocks:].any()


def test_without_offsets_the_kernel_is_a_convolution():
    ski, read = cdtr.SemanticKernel(CLASSES), noise(2, CLASSES, 7, 10)
    assert not ski.offset.weight.any() and 0 < ski.offset.bias.abs().max() <= (9 * CLASSES) ** -.5 # as drawn: tiny, the same everywhere, not zero
    torch.nn.init.zeros_(ski.offset.bias)
    near(ski(noise(2, CLASSES, 7, 10, key='guide'), read), F.conv2d(read, ski.deform.weight, padding=1))


@pytest.mark.parametrize('grid', [(5, 8), (6, 6)])
def test_taps_are_row_by_row_with_down_before_right(grid):
    "Against an independent sampler, offsets of many cells; and one tap alone, which must read the cell that its offset names."
    ski, read, guide = cdtr.SemanticKernel(CLASSES), noise(2, CLASSES, *grid, key='read'), noise(2, CLASSES, *grid, key='guide')
    with torch.no_grad():
        ski.offset.weight.copy_(noise(18, CLASSES, 3, 3)); out, offsets = ski(guide, read), ski.offsets(guide)
        assert offsets.abs().max() > 5
        for b in range(2): near(out[b], torch.from_numpy(plain.numpy_deform(read[b].numpy(), offsets[b].numpy(), ski.deform.weight.numpy())).float(), 1e-4)
        ski.offset.weight.zero_(); ski.deform.weight.zero_()
        for tap, (dy, dx) in ((0, (2, -1)), (5, (-1, 3)), (7, (0, -2))):
            ski.offset.bias.zero_(); ski.offset.bias[2 * tap], ski.offset.bias[2 * tap + 1] = dy, dx
            ski.deform.weight.zero_(); ski.deform.weight[torch.arange(CLASSES), torch.arange(CLASSES), tap // 3, tap % 3] = 1
            down, right = tap // 3 - 1 + dy, tap % 3 - 1 + dx
            near(ski(guide, read), F.pad(read, (9, 9, 9, 9))[:, :, 9 + down:9 + down + grid[0], 9 + right:9 + right + grid[1]])


def test_roles_of_the_two_maps_swap():
    for roles in ('code', 'figure'):
        ours, _ = pair(cfg=replace(TINY, ski_roles=roles)); maps = ours(batch()['image'])
        guide, read = (maps.tokens, maps.stimulated)[::1 if roles == 'code' else -1]
        near(maps.deformed, ours.ski(guide * maps.attention[:, None], read))


@pytest.mark.parametrize('size', [(48, 48), (64, 40), (37, 99), (16, 16)])
def test_any_image_size(size):
    "Grids that are not square; a remainder below one patch is cut off."
    ours, _ = pair(); image = noise(2, 3, *size); h, w = (n // TINY.patch for n in size)
    maps = ours(image)
    assert maps.attention.shape == maps.object_.shape == (2, h, w) and maps.tokens.shape == maps.stimulated.shape == maps.deformed.shape == maps.fused().shape == (2, CLASSES, h, w)
    assert 0 < maps.attention.min() and maps.attention.max() < TINY.heads and all(m.isfinite().all() for m in maps)
    with torch.no_grad():
        whole, cut = ours.eval()(image), ours(image[..., :h * TINY.patch, :w * TINY.patch])
        near(whole.fused(), cut.fused()); assert whole.object_ is None and whole.deformed is None


def test_attention_is_the_mean_over_blocks_summed_over_heads():
    ours, other = pair(); maps, whole = ours(batch()['image']), other(batch()['image'])
    near(maps.attention, whole['attn_map']); near(ours.vit(batch()['image']).rows.flatten(3), whole['cls_attn'])
    with torch.no_grad():
        for block in ours.vit.blocks: block.attn.qkv.weight.zero_(); block.attn.qkv.bias.zero_()
        near(ours.eval()(batch()['image']).attention, torch.full((3, 6, 6), TINY.heads / 37)) # looks everywhere alike, at itself too


def test_blocks_are_dropped_in_training_alone():
    "A rate that rises along a line from zero; a dropped block still tells where it looked."
    cfg = replace(TINY, drop_path=.6, depth=4); ours, _ = pair(cfg=cfg); image = batch()['image']
    rate = lambda block, k: getattr(getattr(block, f'drop_path{k}'), 'drop_prob', 0.)
    for k in (1, 2): assert [rate(b, k) for b in ours.vit.blocks] == pytest.approx([0, .2, .4, .6])
    seed_everything('drop'); first, again = (ours.train().vit(image) for _ in range(2))
    assert not first.patches.equal(again.patches) and (first.rows > 0).all() and first.rows.isfinite().all()
    calm, other = pair(); near(ours.eval().vit(image).patches, calm.eval().vit(image).patches)
    seed_everything('mean'); many = torch.stack([ours.train().vit.blocks[1].drop_path1(torch.ones(400, 1, 1)) for _ in range(20)])
    assert abs(many.mean().item() - 1) < .05 and many.unique().tolist() == pytest.approx([0., 1 / .8])


# --- losses ----------------------------------------------------------------------------------------------------------

def test_equal_values_at_the_limit_are_all_pushed_down():
    a = torch.tensor([[.5, .1, .2, .2], [.2, .9, .3, .2]])[None].requires_grad_() # sorted .1 .2 .2 .2 .2 .3 .5 .9
    loss = cdtr.area_loss(a, .25); loss.backward() # index 2: limit .2
    assert loss.item() == pytest.approx((.1 + 4 * .2) / 8) and a.grad.mul(8).tolist() == [[[0, 1, 1, 1], [1, 0, 0, 1]]]
    same = torch.full((3, 4, 5), .03); assert cdtr.area_loss(same, .1).item() == pytest.approx(3 * .03) # all equal: all of them, summed over images
    for share, kept in ((.25, 50), (.1, 20)): # of 14x14 different cells, as the specification counts them
        cells = noise(1, 14, 14).abs().requires_grad_(); cdtr.area_loss(cells, share).backward(); assert (cells.grad > 0).sum() == kept


@pytest.mark.parametrize('shape, share', [((4, 9, 12), .25), ((2, 3, 5), .1), ((1, 6, 6), .5)])
def test_area_on_maps_with_ties(shape, share):
    a = (noise(*shape).abs() * 3).round() / 3; near(cdtr.area_loss(a, share), plain.plain_area(a, share)[0])


def test_every_object_map_against_all_attention_or_its_own():
    "The two losses are nearly the same number; their gradients are not: broadcasting pulls every object map to the mean of the batch."
    o, a = torch.rand(4, 5, 7, generator=torch_rng('object')).requires_grad_(), torch.rand(4, 5, 7, generator=torch_rng('attention')).requires_grad_()
    loss = cdtr.map_loss(o, a, 'broadcast'); near(loss, plain.plain_map(o, a)); loss.backward()
    near(o.grad, 2 / o.numel() * (o - a.mean(0)).detach()); near(a.grad, 2 / o.numel() * (a - o.mean(0)).detach())
    o.grad = a.grad = None; own = cdtr.map_loss(o, a, 'paired'); own.backward()
    assert own.item() == pytest.approx(sum((p - q).square().mean().item() for p, q in zip(o, a)) / 4)
    near(o.grad, 2 / o.numel() * (o - a).detach()); near(a.grad, -o.grad)
    assert cdtr.map_loss(o[:1], a[:1], 'broadcast').item() == pytest.approx(cdtr.map_loss(o[:1], a[:1], 'paired').item())


@pytest.mark.parametrize('variant', ['cub', 'imnet'])
def test_pairing_shows_in_the_gradient_of_the_vectors(variant):
    "The vectors' note: under a thousandth in the loss, 5 to 12 % in the convolution over branches, more in a branch."
    stored, config = parity.stored_tensors(GOLDEN/variant); cfg, inputs = parity_cdtr.recipe(config), stored['inputs']
    image = F.interpolate(inputs['images_lowres'], scale_factor=8); clip = parity_cdtr.StandIn(inputs['clip.image_proj'], config['image_size']); found = {}
    for pairing in ('broadcast', 'paired'):
        own = replace(cfg, pairing=pairing); model = parity_cdtr.network(stored['weights'], own, inputs['clip.text_features']).train()
        terms = cdtr.losses(model, dict(image=image, label=F.one_hot(inputs['targets'], model.classes)), 0, own, clip=clip); cdtr.total(terms, model, 0, own).backward()
        found[pairing] = terms['map'].item(), {n: plain.under_released_name({k: p.grad for k, p in model.named_parameters()}, n) for n in stored['grads'] if n.startswith('block') and not n.startswith('blocks')}
    assert found['broadcast'][0] == pytest.approx(stored['train']['L.loss_map'].item(), abs=1e-5) and found['paired'][0] == pytest.approx(stored['train']['L.loss_map_paired_NOT_OFFICIAL'].item(), abs=1e-5)
    assert abs(found['paired'][0] / found['broadcast'][0] - 1) < 3e-3
    moved = {n: ((found['paired'][1][n] - g).abs().max() / g.abs().max()).item() for n, g in found['broadcast'][1].items()}
    assert .04 < moved['block_catconv.weight'] < .13 and max(moved.values()) > .1
    for n, g in found['broadcast'][1].items(): near(g, stored['grads'][n].view_as(g), 2e-3)


@pytest.mark.parametrize('mask_source', ['fused', 'attention'])
@pytest.mark.parametrize('stretch', ['raw', 'minmax'])
def test_clip_moves_the_attention_and_nothing_else(mask_source, stretch):
    cfg = replace(TINY, mask_source=mask_source, object_map=stretch, prompt_index='label'); ours, _ = pair(cfg=cfg); ours.text.copy_(sentences())
    terms = cdtr.losses(ours, batch(), 0, cfg, clip=Colours()); terms['sba'].backward()
    moved = {n for n, p in ours.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved and all(n.startswith('vit.') for n in moved) and 'vit.norm.weight' not in moved # the last norm feeds the head only
    for block in range(TINY.depth): assert f'vit.blocks.{block}.attn.qkv.weight' in moved
    assert not {n for n in moved if n.startswith(f'vit.blocks.{TINY.depth - 1}.mlp')}


def test_guiding_map_is_that_of_the_true_class():
    ours, other = pair(); maps, found, target = ours(batch()['image']), other(batch()['image']), torch.tensor([4, 0, 2])
    for stretch in ('raw', 'minmax'): near(cdtr.guiding_map(maps, target, replace(TINY, object_map=stretch)), plain.plain_object_map(found, target, stretch == 'minmax')[:, 0], 1e-4)
    near(cdtr.guiding_map(maps, target, TINY), maps.fused()[torch.arange(3), target])


def test_composites_and_their_pixels():
    image, mask = noise(2, 3, 48, 40), torch.rand(2, 6, 5, generator=torch_rng('mask'))
    both = cdtr.composites(image, mask); near(both[:2] + both[2:], image)
    ramp = cdtr.composites(torch.ones(1, 3, 9, 31), torch.linspace(0, 1, 5).expand(1, 4, 5)); near(ramp[0], torch.linspace(0, 1, 31).expand(3, 9, 31)) # the outermost cells lie on the outermost pixels
    clip = Colours(); pixels = cdtr.clip_pixels(torch.zeros(1, 3, 2, 2), clip)
    near(pixels[0, :, 0, 0], (torch.tensor([.485, .456, .406]) - torch.tensor(clip.mean)) / torch.tensor(clip.std))


def test_sentence_of_an_image():
    "By position it is that of class number i, whatever image number i shows: an index into a list. By label it is its own."
    ours, _ = pair(); words = sentences(); clip, data = Colours(), batch(3)
    def loss(index, text, label=data['label']):
        cfg = replace(TINY, prompt_index=index); ours.text.copy_(text)
        with torch.no_grad(): return cdtr.losses(ours, dict(image=data['image'], label=label), 0, cfg, clip=clip)['sba'].item()
    target = data['label'].argmax(1).tolist(); assert target == [0, 2, 4]
    changed = words.clone(); changed[3:] = changed[3:].flip(0) # classes 3 and 4
    assert loss('position', words) == loss('position', changed) and loss('label', words) != loss('label', changed)
    moved = words.clone(); moved[1] = moved[1].flip(0) # class 1, which no image shows
    assert loss('position', words) != loss('position', moved) and loss('label', words) == loss('label', moved)
    with torch.no_grad(): # by hand
        ours.text.copy_(words); maps = ours(data['image']); cfg = replace(TINY, prompt_index='label'); expected = 0.
        for i, y in enumerate(target):
            mask = F.interpolate(cdtr.guiding_map(maps, torch.tensor(target), cfg)[i][None, None], size=(48, 48), mode='bilinear', align_corners=True)[0]
            f, b = (max((image_features(clip, (m * data['image'][i])[None])[0] @ words[y]).item(), 1e-4) for m in (mask, 1 - mask))
            expected -= math.log(f / (f + b)) / 3
    assert loss('label', words) == pytest.approx(expected, rel=1e-4)


def test_similarities_are_clamped():
    assert cdtr.boost_loss(torch.tensor([.3]), torch.tensor([.3])).item() == pytest.approx(math.log(2))
    low = cdtr.boost_loss(torch.tensor([-.4]), torch.tensor([.5])).item(); assert low == pytest.approx(-math.log(1e-4 / .5001), rel=1e-5)
    fore = torch.tensor([-1., 0., 1.]).requires_grad_(); cdtr.boost_loss(fore, torch.tensor([-1., -1., -1.])).backward(); assert fore.grad.isfinite().all() # 0/0 without the clamp


def test_a_constant_map_is_stretched_to_zero():
    maps = torch.stack([torch.full((3, 4), 2.), torch.arange(12.).view(3, 4)]).requires_grad_(); out = cdtr.stretched(maps)
    assert not out[0].any() and out[1].min() == 0 and out[1].max() == 1
    out.square().sum().backward(); assert maps.grad.isfinite().all()


@pytest.mark.parametrize('cfg, names', [(TINY, ('cls', 'csm', 'area', 'map', 'ski')), (replace(TINY, ski=False, w_sba=0.), ('cls', 'csm', 'area', 'map')), (replace(TINY, csm=False, ski=False, ocm_blocks=0, w_area=0.), ('cls',))])
def test_total_by_hand(cfg, names):
    "Values, the order of the scales, the closed form of the best scale, and fixed halves."
    ours = cdtr.CDTR(cfg, CLASSES); assert cdtr.scaled(cfg) == names and len(ours.scale) == len(names)
    assert set(cdtr.weights(cfg, 0)) == {*names} | ({'sba'} if cfg.w_sba else set()) == set(cdtr.weights(cfg, 10 ** 6))
    terms, s = {k: torch.tensor(.5 + i) for i, k in enumerate((*names, 'sba')) if k != 'sba' or cfg.w_sba}, torch.tensor([.7 + .2 * i for i in range(len(names))])
    ours.scale.data.copy_(s)
    by_hand = sum(terms[k].item() / (2 * v ** 2) + math.log(1 + v ** 2) for k, v in zip(names, s.tolist())) + cfg.w_sba * terms.get('sba', torch.tensor(0.)).item()
    total = cdtr.total(terms, ours, 0, cfg); assert total.item() == pytest.approx(by_hand, rel=1e-6)
    for i, k in enumerate(names): # s^2 = (L + sqrt(L^2 + 8 L)) / 4
        L = terms[k].item(); ours.scale.data[i] = math.sqrt((L + math.sqrt(L * L + 8 * L)) / 4)
    ours.scale.grad = None; cdtr.total(terms, ours, 0, cfg).backward(); assert ours.scale.grad.abs().max() < 1e-6
    fixed = cdtr.CDTR(replace(cfg, scales='fixed'), CLASSES); assert fixed.scale is None
    assert float(cdtr.total(terms, fixed, 0, fixed.cfg)) == pytest.approx(sum(terms[k].item() for k in names) / 2 + cfg.w_sba * terms.get('sba', torch.tensor(0.)).item())


def test_all_losses_equal_their_plain_forms():
    ours, other = pair(); clip, data = Colours(), batch(4); ours.text.copy_(sentences()); target = data['label'].argmax(1)
    terms, found = cdtr.losses(ours, data, 0, TINY, clip=clip), plain.plain_losses(other(data['image']), target, TINY.area)
    for name, own in parity_cdtr.LOSSES.items():
        if own != 'sba': near(terms[own], found[name])
    mask = F.interpolate(plain.plain_object_map(other(data['image']), target, False), size=(48, 48), mode='bilinear', align_corners=True)
    found['loss_clip'] = plain.plain_clip_loss(*(F.cosine_similarity(clip.encode_image(m * data['image']), ours.text[:4]) for m in (mask, 1 - mask))); near(terms['sba'], found['loss_clip'])
    whole = cdtr.total(terms, ours, 0, TINY), plain.plain_total(found, other.AutomaticWeightedLoss.params, TINY.w_sba); near(*whole)
    for t in whole: t.backward() # every path: that of the kernel through the attention too
    grads = {n: p.grad for n, p in ours.named_parameters()}
    for n, p in other.named_parameters(): near(plain.under_released_name(grads, n), p.grad, 1e-3)


def test_rates_are_those_of_the_scheduler():
    "Stepped after each epoch with that epoch's number: the first rate comes twice, everything is an epoch late."
    for epochs, lr in ((110, 5e-5), (14, 2.5e-4), (50, 5e-5 * 32 / 512), (3, 1e-4)): assert base.epoch_rates(epochs, lr) == pytest.approx(plain.timm_rates(epochs, lr).tolist(), abs=1e-12)
    assert base.epoch_rates(110, 5e-5)[:2] == [1e-6, 1e-6] and max(base.epoch_rates(110, 5e-5)) == pytest.approx(4.98e-5, rel=1e-3)


@pytest.mark.parametrize('cfg', [TINY, replace(TINY, mask_source='attention', object_map='minmax', clip_pixels='clip', pairing='paired', prompt_index='label')])
def test_half_precision_stays_finite(cfg):
    "Losses and rows are float32 under autocast; the rows are those of full precision up to the rounding of their inputs."
    ours, _ = pair(cfg=cfg); ours.text.copy_(sentences()); data = batch(); exact = ours.vit(data['image']).rows
    with autocast(replace(cfg, precision='bf16'), 'cpu'): terms, rows = cdtr.losses(ours, data, 0, cfg, clip=Colours()), ours.vit(data['image']).rows
    assert rows.dtype == torch.float32 and (rows.sum((3, 4)) <= 1 + 1e-5).all() and (rows / exact - 1).abs().mean() < .05
    assert all(t.dtype == torch.float32 and t.isfinite() for t in terms.values())
    cdtr.total(terms, ours, 0, cfg).backward(); assert all(p.grad is None or p.grad.isfinite().all() for p in ours.parameters())


def test_rows_keep_the_digits_of_their_scores():
    "Under autocast a product of matrices would round the scores to three digits: two scores of 20.00 and 20.05 would be one."
    q, k, v = (noise(1, 6, 8, key=key) * size for key, size in (('q', 9), ('k', 9), ('v', 1))); same = lambda x: x
    block = SimpleNamespace(norm1=same, norm2=torch.zeros_like, mlp=same, ls1=same, ls2=same, drop_path1=same, drop_path2=same, attn=SimpleNamespace(num_heads=2, scale=.5, qkv=lambda x: torch.cat([q, k, v], -1), proj=same, proj_drop=same))
    heads = lambda x: x.unflatten(2, (2, 4)).transpose(1, 2).double()
    with torch.autocast('cpu', torch.bfloat16): out, row = base.block_with_row(block, torch.zeros(1, 6, 8))
    seen = (heads(q) @ heads(k).mT * .5).softmax(-1); near(row, seen[:, :, 0, 1:].float()); assert row.dtype == torch.float32
    near(out.float(), (seen @ heads(v)).transpose(1, 2).flatten(2).float(), .05)


# --- full size -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('cfg, classes, count', [(base.CUB_OFFICIAL, 200, 23_321_578), (base.CATR_CUB_OFFICIAL, 200, 22_929_159), (base.ILSVRC_OFFICIAL, 1000, 52_237_979), (replace(base.ILSVRC_OFFICIAL, ski=False, w_sba=0.), 1000, 43_075_960)])
def test_as_many_parameters_as_the_released_classes(cfg, classes, count):
    with torch.device('meta'): assert sum(p.numel() for p in cdtr.CDTR(cfg, classes).parameters()) == count


def test_first_losses_of_the_real_network():
    "Four images: three classifiers that know nothing, the lowest quarter of uniform attention, an object map near one half, a CLIP that sees no difference."
    cfg = replace(base.CUB_OFFICIAL, clip_model='farm', clip_dim=64, drop_path=0., precision='fp32', prompt_index='label'); seed_everything('first'); ours = cdtr.CDTR(cfg, 200).train()
    ours.text.copy_(F.normalize(noise(*ours.text.shape, key='text') + 3, dim=1)) # sentences are alike
    with torch.no_grad(): terms = cdtr.losses(ours, dict(image=noise(4, 3, 224, 224), label=torch.eye(200)[[3, 50, 120, 199]]), 0, cfg, clip=random_clip('farm', list(VOCABULARY))); total = cdtr.total(terms, ours, 0, cfg)
    for k, value, room in (('cls', math.log(200), .1), ('csm', math.log(200), .2), ('ski', math.log(200), .3), ('area', 4 * .0078, .003), ('map', .26, .03), ('sba', math.log(2), .05)): assert terms[k].item() == pytest.approx(value, abs=room), k
    assert total.item() == pytest.approx(13.2, abs=.3)


# --- CATR ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('variant', ['cub', 'imnet'])
def test_catr_by_subset_of_the_vectors(variant):
    "The same tensors under CATR's names, no SKI, no CLIP, four scales."
    stored, config = parity.stored_tensors(GOLDEN/variant); weights, s, t = stored['weights'], stored['weights']['AutomaticWeightedLoss.params'][:4], stored['train']
    file = {k.replace('down_1', 'down').replace('up_1', 'up'): v for k, v in weights.items() if not k.startswith('dnc_')} | {'AutomaticWeightedLoss.params': s}
    cfg = replace(parity_cdtr.recipe(config), ski=False, w_sba=0.); model = cdtr.CDTR(cfg, config['num_classes'])
    cdtr_weights.start_from(model, file | tracked(file))
    label = F.one_hot(stored['inputs']['targets'], model.classes); image = F.interpolate(stored['inputs']['images_lowres'], scale_factor=8)
    terms, maps = cdtr.losses(model.train(), dict(image=image, label=label), 0, cfg), model(image)
    for k, m in dict(x_map=maps.tokens, csm_map=maps.stimulated, attn_map=maps.attention, pre_map=maps.object_).items(): near(m, t[k].view_as(m), 2e-4)
    for name, own in parity_cdtr.LOSSES.items():
        if own in terms: assert terms[own].item() == pytest.approx(t[f'L.{name}'].item(), rel=1e-5, abs=1e-5)
    assert list(terms) == ['cls', 'csm', 'area', 'map'] and maps.deformed is None
    four = {k: t[f'L.{k}'] for k in ('loss_x', 'loss_att', 'loss_area', 'loss_map')}; near(cdtr.total(terms, model, 0, cfg), plain.plain_total(four, s))


def tracked(file):
    "Counters of the normalisations, which the vectors leave out."
    return {k.replace('running_mean', 'num_batches_tracked'): torch.tensor(0) for k in file if k.endswith('running_mean')}


def test_a_model_without_classes_is_refused():
    with pytest.raises(BadInput, match='0 classes'): cdtr.CDTR(base.LAPTOP, 0)


def test_catr_weights_do_not_go_into_cdtr():
    "The released evaluation loads what fits: a CATR file left CDTR's modules random, without a word."
    catr = replace(TINY, ski=False, w_sba=0.); file = plain.PlainCDTR(CLASSES, TINY.dim, TINY.depth, TINY.heads, TINY.mlp_ratio, TINY.patch, TINY.side, TINY.csm_width, TINY.ocm_blocks, catr=True).state_dict()
    model = cdtr.CDTR(TINY, CLASSES); before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(BadInput, match='nothing for ski'): cdtr_weights.start_from(model, file)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    own = cdtr.CDTR(catr, CLASSES); cdtr_weights.start_from(own, file); assert torch.equal(own.csm.up[0].weight, file['att_layer.up.conv.UConv.0.weight'])
    with pytest.raises(BadInput, match='scale'): cdtr_weights.start_from(own, file | {'AutomaticWeightedLoss.params': torch.ones(5)})


# --- incidents -------------------------------------------------------------------------------------------------------

def test_clip_gets_no_gradient_and_is_no_part_of_the_model():
    "The released code leaves CLIP's 151 million weights to pile up gradients that nobody reads."
    cfg = replace(TINY, clip_model='farm', clip_dim=64); ours = cdtr.CDTR(cfg, CLASSES).train(); ours.text.copy_(sentences(64)); clip = random_clip('farm', list(VOCABULARY))
    cdtr.total(cdtr.losses(ours, batch(), 0, cfg, clip=clip), ours, 0, cfg).backward()
    assert all(p.grad is None and not p.requires_grad for p in clip.parameters()) and not clip.training
    assert not {id(p) for g in cdtr.groups(ours, cfg) for p in g['params']} & {id(p) for p in clip.parameters()} and set(ours.state_dict()) == {'text', *dict(ours.named_parameters()), *dict(ours.named_buffers())}


def test_decay_spares_what_the_released_optimiser_spares():
    ours, _ = pair(); decayed, free = cdtr.groups(ours, TINY); names = {id(p): n for n, p in ours.named_parameters()}
    spared = {names[id(p)] for p in free['params']}
    assert 'weight_decay' not in decayed and free['weight_decay'] == 0 and {'vit.cls_token', 'vit.pos_embed', 'scale', 'vit.norm.weight', 'head.bias', 'csm.down.1.weight'} <= spared
    assert {n for n, p in ours.named_parameters() if p.ndim > 1} - spared == {names[id(p)] for p in decayed['params']} and len(spared) + len(decayed['params']) == len(names)


# --- views -----------------------------------------------------------------------------------------------------------

VIEW = dict(is_training=True, color_jitter=.4, auto_augment='rand-m9-mstd0.5-inc1', interpolation='bicubic', re_prob=.25, re_mode='pixel', re_count=1) # As the released script asks timm


def photograph(H, W, key='photograph'):
    "A smooth picture with edges and noise, raw pixels of 8 bits."
    coarse = torch.rand(1, 3, 6, 9, generator=torch_rng(key, H, W)); image = F.interpolate(coarse, (H, W), mode='nearest') * .7 + F.interpolate(coarse.flip(1), (H, W), mode='bilinear') * .3
    return (image[0] * 255).round() / 255


@pytest.mark.parametrize('side', [224, 96])
def test_colours_and_geometry_change_as_in_timm(side):
    "RandAugment and erasing of timm's own factory, asked as the released script asks, with the same seeds: equal bit for bit."
    _, changes, last = create_transform(side, separate=True, **VIEW); own, = changes.transforms # RandAugment takes the place of colour jitter
    assert base.TrainView(side).augment == VIEW['auto_augment'] and base.TrainView(side).erase == VIEW['re_prob']
    image, moved, erased = photograph(side, side), 0, 0
    for seed in range(40):
        with base.borrowed_generators(rng('view', seed)): expected = own(Image.fromarray((image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()))
        found = base.rand_augment(image, VIEW['auto_augment'], rng('view', seed)); assert torch.equal((found * 255).round(), torch.from_numpy(np.array(expected)).permute(2, 0, 1).float()); moved += not torch.equal(found, image)
        with base.borrowed_generators(rng('view', seed)): expected = last.transforms[-1](normalise(image))
        found = base.random_erase(normalise(image), .25, rng('view', seed)); assert torch.equal(found, expected); erased += not torch.equal(found, normalise(image))
    assert 25 < moved <= 40 and 3 <= erased <= 20
    near(normalise(image), last.transforms[-2](image))


def test_a_training_view_is_crop_mirror_changes_normalisation_erasing_in_this_order():
    "Step by step from the sample's generator; each step can be left out; the pixels are those of PIL but for rounding."
    sample = dict(image=photograph(150, 210), label=torch.ones(1)); mirrored = []
    for seed in range(12):
        for augment, erase in (('', 0.), (VIEW['auto_augment'], .25), ('', 1.)):
            g = rng('steps', seed); t, l, h, w = crop_box((150, 210), (.08, 1.), (3 / 4, 4 / 3), g); flip = g.random() < .5; part = sample['image'][:, t:t + h, l:l + w]
            image = resize(part, (64, 64), 'bicubic'); pil = Image.fromarray((part * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).resize((64, 64), Image.Resampling.BICUBIC)
            assert (image - torch.from_numpy(np.array(pil)).permute(2, 0, 1) / 255).abs().max() < 1.5 / 255
            if flip: image = image.flip(-1)
            if augment: image = base.rand_augment(image, augment, g)
            image = normalise(image)
            if erase: image = base.random_erase(image, erase, g)
            assert torch.equal(base.TrainView(64, (.08, 1.), augment, erase)(sample, rng('steps', seed))['image'], image)
        mirrored.append(flip)
    assert 2 < sum(mirrored) < 10


def test_erasing_writes_noise_into_one_rectangle():
    "Every pixel of it a normal number of its own, between 2 and 33 % of the image, as often as it is asked."
    image = torch.full((3, 64, 64), 9.); shares, values = [], []
    for seed in range(60):
        found = base.random_erase(image, .5, rng('erase', seed)); changed = (found != 9).all(0)
        if not changed.any(): continue
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero(); assert changed[rows.min():rows.max() + 1, columns.min():columns.max() + 1].all()
        shares.append(changed.float().mean().item()); values.append(found[:, changed].flatten())
    values = torch.cat(values); assert 18 < len(shares) < 42 and .015 < min(shares) < max(shares) < .35 and abs(values.mean()) < .05 and abs(values.std() - 1) < .05 and (image == 9).all()
    assert torch.equal(base.random_erase(image, 0., rng(0)), image)
