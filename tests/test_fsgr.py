"The captioner, block by block, against what the specification says, written out: towers of any size, tags, contrast, geometry, encoder, decoder with caches, beams, prototypes, weight files."
import math
from copy import deepcopy
from itertools import product
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from bench_fsgr_plain import kept_inputs, search, whole_prefix
from wsl_nb.core import BadInput, seed_everything, torch_rng
from wsl_nb.fsgr import FSGR, Understood, assign_tags, contrast_loss, critical_loss, gumbel_noise, quantify, tag_similarity, word_loss, write
from wsl_nb.fsgr_blocks import Encoder, cell_distances, geometry_table, grid_positions, zero_sums
from wsl_nb.fsgr_decoder import BOS, EOS, PAD, Decoder, beam_search, follow
from wsl_nb.fsgr_memory import Prototypes, k_means, prototype_values
from wsl_nb.fsgr_tower import Tower, csa_tokens, first_tokens, run_block, value_tokens, vv_tokens
from wsl_nb.fsgr_weights import DEAD, from_official, living
from wsl_nb.surgery import surgery

TEXT, V, E = dict(context_length=12, vocab_size=100, width=32, heads=2, layers=1), 11, 24


def small(quick=True, seed=0, **vision):
    "A tiny CLIP of open_clip with random weights."
    seed_everything(seed)
    return open_clip.model.CLIP(E, dict(layers=4, width=48, head_width=12, patch_size=8, image_size=40) | vision, TEXT, quick_gelu=quick).requires_grad_(False).eval()


def noise(*shape, key=0): return torch.randn(shape, generator=torch_rng('fsgr', key))
def units(n, width=E, key=1): return F.normalize(noise(n, width, key=key), dim=1)


def stirred(module, key=0):
    "Every parameter moved at random, so that nothing is the identity by its start; integers stay."
    with torch.no_grad():
        for i, p in enumerate(module.parameters()): p += .1 * noise(*p.shape, key=(key, i)).to(p)
    return module


def tower(clip=None, **options): return Tower(clip or small(), **dict(prompts=3, deep=2, adapters=(1, 3)) | options).eval()
def decoder(words=V, memory=None, layers=2): return stirred(Decoder(words, 12, layers, E, 2, 32, memory=memory)).eval()
def captioner(seed=0, tags=9, memory=None, **options): return stirred(FSGR(tower(), units(tags), Decoder(V, 12, 2, E, 2, 32, memory=memory), 2, E, 2, 32, **options), seed).eval()


def picture(B=2, grid=(2, 3), hidden=None, key=2): return Understood(noise(B, math.prod(grid), E, key=key), grid_positions(grid, E), hidden)


# --- tower ---------------------------------------------------------------------------------------------------------

TOWERS = dict(plain={}, gelu=dict(quick=False), two_blocks=dict(layers=2), wide=dict(width=60, head_width=20), fine=dict(patch_size=4, image_size=16), mlp=dict(mlp_ratio=2.))


@pytest.mark.parametrize('kind', TOWERS)
def test_a_tower_without_prompts_is_clip(kind):
    "First tokens and blocks give CLIP's own class token: also with adapters, which begin as the identity."
    clip = small(**TOWERS[kind]); side = TOWERS[kind].get('image_size', 40); images = noise(2, 3, side, side); visual = tower(clip, adapters=(0, len(clip.visual.transformer.resblocks) - 1), deep=0).visual
    with torch.no_grad():
        x = first_tokens(visual, images)
        for block in visual.transformer.resblocks: x = run_block(block, x)
        assert torch.allclose(visual.ln_post(x[:, 0]) @ visual.proj, clip.encode_image(images), atol=1e-5) and not hasattr(clip.visual, 'prompt_embeddings') and not hasattr(clip.visual.transformer.resblocks[0], 'S_Adapter')


def table_for(v, size):
    "Positions of a tower for a picture of this size: class row, then the grid, bicubic where it is another one."
    table, grid = v.positional_embedding, [s // 8 for s in size]; side = math.isqrt(len(table) - 1); return table if grid == [side, side] else torch.cat([table[:1], F.interpolate(table[1:].T.reshape(1, -1, side, side), grid, mode='bicubic', align_corners=False)[0].flatten(1).T])


def by_hand(t, images, adapters):
    "Tokens after each block of a tower as section 3.1 words it: prompts between class token and patches, overwritten before a block, gone where none are left; adapters after attention."
    v, n = t.visual, t.visual.prompt_embeddings.shape[1]; x = v.conv1(images).flatten(2).transpose(1, 2); found = []
    x = v.ln_pre(torch.cat([v.class_embedding.expand(len(x), 1, -1), x], 1) + table_for(v, images.shape[-2:])); prompts = lambda p: (p @ v.prompt_proj.weight.T + v.prompt_proj.bias)[None].expand(len(x), -1, -1)
    cls, patches, slots = x[:, :1], x[:, 1:], prompts(v.prompt_embeddings[0])
    for i, b in enumerate(v.transformer.resblocks):
        if i > 0: slots = prompts(v.deep_prompt_embeddings[i - 1]) if i <= len(v.deep_prompt_embeddings) else slots[:, :0]
        x = torch.cat([cls, slots, patches], 1); y = b.ln_1(x); a = nn.MultiheadAttention.forward(b.attn, y, y, y)[0]
        if adapters[0] <= i <= adapters[1]: z = a @ b.S_Adapter.D_fc1.weight.T + b.S_Adapter.D_fc1.bias; a = a + (z * .5 * (1 + torch.erf(z / 2 ** .5))) @ b.S_Adapter.D_fc2.weight.T + b.S_Adapter.D_fc2.bias
        x = x + a; x = x + b.mlp(b.ln_2(x)); cls, slots, patches = x[:, :1], x[:, 1:1 + slots.shape[1]], x[:, 1 + slots.shape[1]:]; found.append(x)
    return found


@pytest.mark.parametrize('deep', [0, 1, 3])
@pytest.mark.parametrize('adapters', [(0, 0), (1, 2), (3, 3)], ids=str)
@pytest.mark.parametrize('size', [(40, 40), (40, 64), (16, 8)], ids=str)
def test_prompts_and_adapters_of_every_block(deep, adapters, size):
    "Against the loop above, on square and oblong pictures; the outputs follow from the last block by two norms in a row, or one."
    t = stirred(tower(deep=deep, adapters=adapters)); images = noise(2, 3, *size); v = t.visual
    with torch.no_grad():
        want, found, seen = by_hand(t, images, adapters), [x for _, x in t.blocks(images)], t(images); N = images.shape[-1] * images.shape[-2] // 64
        assert [x.shape[1] for x in found] == [1 + N + 3 * (i <= deep) for i in range(4)] and all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, want))
        patches = F.layer_norm(want[-1][:, -N:], (48,), v.prompt_norm.weight, v.prompt_norm.bias, 1e-6); cls = F.layer_norm(F.layer_norm(want[-1][:, 0], (48,), v.prompt_norm.weight, v.prompt_norm.bias, 1e-6), (48,), v.ln_post.weight, v.ln_post.bias)
        assert torch.allclose(seen.patches, patches, atol=1e-5) and torch.allclose(seen.picture, cls @ v.proj, atol=1e-5) and torch.allclose(seen.align, patches @ v.proj, atol=1e-5)


def test_an_adapter_whose_second_layer_is_zero_is_the_identity():
    "At the start a tower equals one without adapters, whatever the first layer holds."
    a, b = (tower(small(), adapters=r) for r in ((0, 3), (2, 2)))
    b.visual.load_state_dict({k: v for k, v in a.visual.state_dict().items() if k in b.visual.state_dict()}); images = noise(2, 3, 40, 40); assert all(torch.equal(x, y) for x, y in zip(a(images), b(images)))
    with torch.no_grad(): a.visual.transformer.resblocks[3].S_Adapter.D_fc2.bias += noise(48)
    assert not torch.allclose(a(images).patches, b(images).patches, atol=1e-3)


def test_only_prompts_and_adapters_learn():
    "By name; every one of them gets a gradient once it is not at its start, nothing of CLIP does."
    t = stirred(tower(small().requires_grad_(), deep=3, adapters=(0, 3))); sum(x.square().sum() for x in t(noise(2, 3, 40, 40))).backward()
    for name, p in t.named_parameters(): new = 'S_Adapter' in name or 'prompt' in name; assert p.requires_grad == new and (p.grad is not None and p.grad.abs().sum() > 0) == new, name
    assert sum('S_Adapter' in n for n, _ in t.named_parameters()) == 16 and all('token_embedding' not in n and 'text' not in n for n, _ in t.named_parameters()) and t.visual.transformer.resblocks[0].S_Adapter.D_fc1.out_features == 12


def test_prompts_start_as_stated_and_drop_out_in_training_only():
    t = tower(small(width=480, head_width=120, layers=2), prompts=40, deep=1, adapters=(1, 1)); v, limit = t.visual, math.sqrt(6 / (3 * 64 + 480)); spread = torch.cat([v.prompt_embeddings, v.deep_prompt_embeddings])
    assert spread.abs().max() <= limit and abs(spread.std() - limit / 3 ** .5) < .02 * limit and abs(v.prompt_proj.weight.std() - (2 / 480) ** .5) < 1e-3 and v.prompt_norm.eps == 1e-6 and torch.equal(v.prompt_norm.weight, torch.ones(480))
    a = v.transformer.resblocks[1].S_Adapter; assert abs(a.D_fc1.weight.std() - .02) < 1e-3 and not any(p.any() for p in (a.D_fc1.bias, a.D_fc2.weight, a.D_fc2.bias)) and not hasattr(v.transformer.resblocks[0], 'S_Adapter')
    images = noise(1, 3, 40, 40); assert torch.equal(t(images).patches, t(images).patches); t.train(); assert not torch.equal(t(images).patches, t(images).patches)
    clip = stirred(small()); assert torch.equal(tower(clip, norm='ln_post').visual.prompt_norm.weight, clip.visual.ln_post.weight)


@pytest.mark.parametrize('options, says', [(dict(adapters=(2, 4)), 'blocks 2 to 4'), (dict(adapters=(-1, 2)), '-1'), (dict(adapters=(3, 1)), 'blocks 3 to 1'), (dict(deep=4), 'before 4 blocks'), (dict(prompts=0), '0 prompts'), (dict(align='clip'), 'align "clip"')], ids=str)
def test_wishes_that_a_tower_cannot_fulfil_are_refused(options, says):
    with pytest.raises(BadInput, match=says): tower(**options)


def strange(kind):
    "A tower that prompts and adapters are not defined for."
    if kind == 'resnet': return open_clip.model.CLIP(32, dict(layers=(1, 1, 1, 1), width=16, image_size=64), TEXT)
    if kind == 'pooled': return small(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2)
    if kind == 'scaled': return small(ls_init_value=.1)
    return open_clip.model.CLIP(E, dict(timm_model_name='vit_tiny_patch16_224', timm_model_pretrained=False, image_size=32, timm_pool='token', timm_proj='linear'), TEXT)


@pytest.mark.parametrize('kind, says', [('resnet', 'ModifiedResNet'), ('pooled', 'VisionTransformer'), ('scaled', 'layer scale'), ('timm', 'TimmModel')])
def test_other_towers_are_refused_by_name(kind, says):
    with pytest.raises(BadInput, match=says): Tower(strange(kind), 3, 1, (0, 1))


def test_pictures_that_patches_do_not_divide_are_refused():
    with pytest.raises(BadInput, match='41'): tower()(noise(1, 3, 41, 40))


def test_three_other_paths_of_a_patch():
    "Correlative self-attention head by head, rows of weights that sum to two, no adapter; the value path; values asking values as the surgery lesson does it."
    t = stirred(tower(adapters=(0, 3), align='csa')); block, x = t.visual.transformer.resblocks[-1], noise(2, 25, 48); y = block.ln_1(x); q, k, v = (F.linear(y, w, b) for w, b in zip(block.attn.in_proj_weight.chunk(3), block.attn.in_proj_bias.chunk(3)))
    heads = [slice(i, i + 12) for i in range(0, 48, 12)]; weights = [sum((s[..., h] @ s[..., h].mT / 12 ** .5).softmax(-1) for s in (q, k)) for h in heads]; assert torch.allclose(weights[0].sum(-1), torch.full((2, 25), 2.))
    finish = lambda a: (z := x + block.attn.out_proj(a)) + block.mlp(block.ln_2(z))
    with torch.no_grad():
        assert torch.allclose(csa_tokens(block, x), finish(torch.cat([w @ v[..., h] for w, h in zip(weights, heads)], -1)), atol=1e-5) and torch.allclose(value_tokens(block, x), finish(v), atol=1e-5)
        images = noise(2, 3, 40, 40); seen = t(images); *_, (before, _) = t.blocks(images); n = t.visual.prompt_norm; assert torch.allclose(seen.align, n(csa_tokens(block, before[:, -25:])) @ t.visual.proj, atol=1e-5)
        standard = deepcopy(t); standard.align = 'standard'; assert torch.equal(standard(images).patches, seen.patches) and not torch.allclose(standard(images).align, seen.align, atol=1e-2)
        clip = small()
        for blocks in (1, 3, 4): assert torch.allclose(vv_tokens(clip.visual, first_tokens(clip.visual, images), blocks), surgery(clip, images, blocks, 'vv').new[-1], atol=1e-5)


# --- tags ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('shortlist', [1, 3, 7, 20])
@pytest.mark.parametrize('area', ['count', 'none'])
def test_the_language_map_written_out(shortlist, area):
    "Best tags of the picture, best of them at each patch, its vector over the number of its patches plus one; a shortlist longer than the codebook is the codebook."
    picture, align, codebook, scale = units(2, key=3), F.normalize(noise(2, 12, E, key=4), dim=-1), units(7), torch.tensor(100.); q = quantify(picture, align, codebook, scale, shortlist, area=area); K = min(shortlist, 7); assert q.top.shape == (2, K) and q.scores.shape == (2, K, 12)
    for b in range(2):
        top = sorted(range(7), key=lambda t: -float(picture[b] @ codebook[t]))[:K]; assert q.top[b].tolist() == top; tags = [max(top, key=lambda t: float(align[b, n] @ codebook[t])) for n in range(12)]; assert q.index[b].tolist() == tags
        assert torch.allclose(q.grids[b], torch.stack([codebook[t] / (tags.count(t) + 1 if area == 'count' else 1) for t in tags]), atol=1e-5)
        assert torch.allclose(q.scores[b], torch.stack([100 * align[b] @ codebook[t] for t in top]), atol=1e-4)


@pytest.mark.parametrize('area', ['count', 'none'])
@pytest.mark.parametrize('noisy', [False, True])
def test_straight_through_gradient_by_differences(area, noisy):
    "One-hot in value, the gradient of softmax in place of its own: central differences in float64 of the soft part."
    scores, g, cotangent = 2 * noise(2, 4, 5).double(), noise(2, 4, 5, key=5).double() if noisy else None, noise(2, 4, 5, key=6).double(); soft = lambda s: (s if g is None else s + g).softmax(1)
    hard = F.one_hot(soft(scores).argmax(1), 4).mT.double(); shape = lambda y: y / (y.sum(2, keepdim=True) + 1) if area == 'count' else y; value = lambda s: float((shape(hard + soft(s) - soft(scores)) * cotangent).sum())
    x = scores.float().requires_grad_(); found = assign_tags(x, None if g is None else g.float(), area); assert torch.allclose(found.double(), shape(hard), atol=1e-6); (found * cotangent.float()).sum().backward(); want = torch.zeros_like(scores)
    for at in product(range(2), range(4), range(5)): d = torch.zeros_like(scores); d[at] = 1e-5; want[at] = (value(scores + d) - value(scores - d)) / 2e-5
    assert torch.allclose(x.grad.double(), want, atol=1e-5) and want.abs().max() > .01


def test_noise_is_gumbels_and_only_in_training():
    "Mean and variance of the distribution; tags are those without noise in both modes; the map moves in training only, and not without `gumbel`."
    seed_everything(0); g = gumbel_noise(torch.zeros(200000)); assert abs(g.mean() - .5772) < .01 and abs(g.var() - math.pi ** 2 / 6) < .03 and g.isfinite().all()
    model = captioner(); model.backbone.logit_scale.data.fill_(0.); seen = model.look(noise(2, 3, 40, 40)); still = model.tags(seen); assert torch.equal(still.grids, model.tags(seen).grids); model.train(); a, b = model.tags(seen), model.tags(seen)
    assert torch.equal(a.index, still.index) and torch.equal(b.index, still.index) and not torch.equal(a.assign, b.assign) and torch.equal(a.scores, still.scores) and torch.equal(a.top.gather(1, a.scores.argmax(1)), a.index)
    quiet = captioner(gumbel=False).train(); seen = quiet.look(noise(2, 3, 40, 40)); assert torch.equal(quiet.tags(seen).grids, quiet.tags(seen).grids)


@pytest.mark.parametrize('codebook, dim, says', [(2 * units(5), E, 'length one'), (units(5, 16), E, 'codebook'), (units(5)[0], E, 'codebook'), (units(5) * torch.nan, E, 'length one'), (units(5), 32, 'dim 32')], ids=['long', 'narrow', 'flat', 'nan', 'dim'])
def test_codebooks_and_widths_that_do_not_fit_are_refused(codebook, dim, says):
    with pytest.raises(BadInput, match=says): FSGR(tower(), codebook, Decoder(V, 12, 1, dim, 2, 32), 1, dim, 2, 32)


def test_everything_that_is_looked_at_has_length_one():
    "Patches, picture and their words; features see each patch beside the whole picture, in this order."
    model, images = captioner(), noise(2, 3, 40, 40); seen = model.look(images); assert all(torch.allclose(x.norm(dim=-1), torch.ones(x.shape[:-1]), atol=1e-5) for x in seen); raw = model.backbone(images); layer, norm = model.att_embed[0], model.att_embed[3]
    both = torch.cat([F.normalize(raw.patches, dim=-1), F.normalize(raw.picture, dim=-1)[:, None].repeat(1, 25, 1)], -1); assert torch.allclose(model.features(seen), norm(F.celu(layer(both), 1.3)), atol=1e-5)


# --- contrast ------------------------------------------------------------------------------------------------------

def contrast_loop(z, tags, temperature=.07):
    "The formula of section 4, one anchor after the other, in float64."
    z = F.normalize(z.double(), dim=-1); terms = []
    for i in range(len(z)):
        s = z @ z[i] / temperature; others = torch.arange(len(z)) != i; friends = others & (tags == tags[i]) & (tags[i] >= 0)
        terms.append(-(s[friends] - s[others].logsumexp(0)).mean() if friends.any() else s.sum() * 0)
    return torch.stack(terms).mean()


TAGS = dict(mixed=[0, 1, 0, 2, 1, 0, 1, 5, 0], unknown=[0, -1, 0, -1, -1, 1, 1, 2, -2], alone=list(range(9)), nothing=[-1] * 9, one=[4] * 9)


@pytest.mark.parametrize('tags', TAGS)
@pytest.mark.parametrize('temperature', [.07, 1.])
def test_contrast_against_a_loop(tags, temperature):
    "Value and gradient, in one piece and in rows of any number; unknown tags have no friends but push others; anchors without friends stay in the mean."
    tags, z = torch.tensor(TAGS[tags]), noise(9, 6, key=7); a, b = z.clone().double().requires_grad_(), z.clone().requires_grad_(); want = contrast_loop(a, tags, temperature); want.backward()
    for rows in (1, 2, 4, 9, 4096):
        b.grad = None; found = contrast_loss(b, tags, temperature, rows); found.backward(); assert found.dtype == torch.float32 and abs(found.item() - want.item()) < 1e-5 and torch.allclose(b.grad.double(), a.grad, atol=1e-5)


def test_one_tag_everywhere_cannot_fall_below_chance():
    "Equal features: ln(n-1) whatever the tags; other features with one tag lie above; without friends there is nothing to lose."
    assert float(contrast_loss(torch.ones(9, 5), torch.tensor([0, 0, 1, 1, 2, 2, 2, 3, 3]))) == pytest.approx(math.log(8), abs=1e-5) and float(contrast_loss(torch.ones(9, 5) * torch.arange(1, 10)[:, None], torch.zeros(9).long())) == pytest.approx(math.log(8), abs=1e-5)
    assert float(contrast_loss(noise(9, 5), torch.zeros(9).long())) > math.log(8) and float(contrast_loss(noise(9, 5), torch.arange(9))) == 0


def test_a_step_down_the_contrast_makes_patches_of_a_tag_alike():
    "The sign that the public copy has wrong: the loss falls, the similarity of one tag rises; it is what it says."
    z, tags = noise(40, 8), torch.arange(40) % 4; before, first = tag_similarity(z, tags), contrast_loss(z, tags)
    for _ in range(30): z = z.detach().requires_grad_(); contrast_loss(z, tags).backward(); z = z - .2 * z.grad / z.grad.norm(dim=1, keepdim=True)
    assert before.abs() < .1 and tag_similarity(z, tags) > .5 and contrast_loss(z, tags) < first - .5
    u, t = F.normalize(noise(6, 4), dim=1), torch.tensor([0, 0, 0, 1, 1, -1]); cos = u @ u.T; rows = [(cos[0, 1] + cos[0, 2]) / 2, (cos[1, 0] + cos[1, 2]) / 2, (cos[2, 0] + cos[2, 1]) / 2, cos[3, 4], cos[3, 4], torch.tensor(0.)]; assert torch.allclose(tag_similarity(3 * u, t), torch.stack(rows).mean(), atol=1e-6)


@pytest.mark.parametrize('kind', [torch.float16, torch.bfloat16], ids=str)
def test_tags_and_contrast_are_computed_in_float32(kind):
    "Half-precision inputs inside autocast: what float32 gives for the same numbers, and float32 comes out."
    z, tags, picture, align, codebook = noise(30, 8).to(kind), torch.arange(30) % 3, units(2, key=3).to(kind), F.normalize(noise(2, 9, E, key=4), dim=-1).to(kind), units(7); scale = torch.tensor(100.); want = quantify(picture.float(), align.float(), codebook, scale, 5)
    with torch.autocast('cpu', torch.bfloat16): loss, q = contrast_loss(z, tags), quantify(picture, align, codebook, scale, 5)
    assert loss.dtype == q.grids.dtype == q.scores.dtype == torch.float32 and torch.equal(loss, contrast_loss(z.float(), tags)) and torch.equal(q.scores, want.scores) and torch.equal(q.grids, want.grids)


# --- geometry ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('grid', [(3, 5), (1, 4), (6, 2), (14, 14)], ids=str)
def test_geometry_of_every_pair(grid):
    "64 numbers for a pair of cells by the formula of section 3.6, rows first; the bias of every head from them."
    h, w = grid; cells = list(product(range(h), range(w))); table, at = geometry_table(grid).double(), cell_distances(grid); assert table.shape == (h * w, 64) and at.shape == (h * w, h * w); e = Encoder(1, E, E, 2, 32); stirred(e); bias = e.bias(grid)
    for i, j in [(i, j) for i in range(0, h * w, max(h * w // 9, 1)) for j in range(h * w)]:
        d = [math.log(max(abs(a - b) / n / (1 / n + 1), 1e-3)) for a, b, n in zip(cells[i], cells[j], grid)] + [0., 0.]; angle = [100 * x * 1000 ** (-k / 8) for x in d for k in range(8)]; row = torch.tensor([math.sin(a) for a in angle] + [math.cos(a) for a in angle], dtype=torch.float64)
        assert (table[at[i, j]] - row).abs().max() < 2e-4
        for k, g in enumerate(e.WGs): want = F.linear(row, g.weight.double(), g.bias.double()).item(); assert abs(bias[k, i, j].exp().item() - max(want, 1e-6)) < 1e-3 and (want > -1e-3 or bias[k, i, j].item() == pytest.approx(math.log(1e-6)))


@pytest.mark.parametrize('grid', [(3, 5), (5, 3), (1, 1), (14, 14)], ids=str)
def test_positions_of_every_cell(grid):
    "First half of the channels from the row, second from the column, coordinates up to a whole turn, sine and cosine in turn."
    found = grid_positions(grid, 16); assert found.shape == (math.prod(grid), 16)
    for r, c in product(*map(range, grid)):
        axis = lambda i, n: [(math.sin if j % 2 == 0 else math.cos)((i + 1) / (n + 1e-6) * 2 * math.pi / 10000 ** (2 * (j // 2) / 8)) for j in range(8)]
        assert torch.allclose(found[r * grid[1] + c], torch.tensor(axis(r, grid[0]) + axis(c, grid[1])), atol=1e-5)


# --- encoder -------------------------------------------------------------------------------------------------------

def encoder(**options): return stirred(Encoder(2, E, E, 2, 32, **options)).eval()


def asked(layer, x, k, v, bias):
    "Multi-head attention with linear layers, head by head, without its residual."
    a = layer.attention; out = []
    for h in range(2): s = slice(12 * h, 12 * h + 12); out.append(((a.fc_q(x)[..., s] @ a.fc_k(k)[..., s].mT / 12 ** .5 + bias[h]).softmax(-1)) @ a.fc_v(v)[..., s])
    return a.fc_o(torch.cat(out, -1))


@pytest.mark.parametrize('text', [True, False])
def test_encoder_written_out(text):
    "Section 3.7: one norm for both streams, positions on queries and keys but not on values, two residuals and norms; the map stays what is asked, without a map the patches ask what they have become."
    e, patches, words, grid = encoder(), noise(2, 6, E), noise(2, 6, E, key=8), (2, 3); places, bias = grid_positions(grid, E), e.bias(grid)
    with torch.no_grad():
        x, lin, norm = e.layer_norm(patches), e.pixel_embed[0], e.pixel_embed[3]; z = e.layer_norm(norm(F.celu(lin(words), 1.3)))
        for l in e.layers:
            kv = z if text else x; a = l.mhatt.layer_norm(x + places + asked(l.mhatt, x + places, kv + places, kv, bias)); b = l.lnorm(x + a); x = l.pwff.layer_norm(b + l.pwff.fc2(l.pwff.fc1(b).relu()))
        found, hidden = e(patches, words if text else None, grid); assert hidden is None and torch.allclose(found, x, atol=1e-5)


def test_without_text_a_captioner_does_not_know_its_codebook():
    images, words = noise(1, 3, 40, 40), torch.tensor([[BOS, 4, 5]]); pair = []
    for text in (True, False): model = captioner(text=text); a = model(images, words)[0]; model.text_embed.text_embeddings = units(9, key=9); pair.append(torch.equal(a, model(images, words)[0]))
    assert pair == [False, True]


def test_the_accidental_mask_touches_only_sums_of_zero():
    "Off: nothing is hidden. On: tokens that sum to zero, in either stream, are no keys of the encoder nor of the decoder; without one, nothing changes."
    plain, masked = encoder(), encoder(mask=True); masked.load_state_dict(plain.state_dict()); x, w, grid = noise(2, 6, E), noise(2, 6, E, key=8), (2, 3)
    with torch.no_grad():
        a, (b, none) = plain(x, w, grid)[0], masked(x, w, grid); assert torch.allclose(a, b, atol=1e-6) and not none.any() and torch.equal(none, zero_sums(x))
        x[1, 2] = 0.; x[0, 4] = torch.tensor([1., -1.] * 12); (a, no), (b, hidden) = plain(x, w, grid), masked(x, w, grid); assert no is None and hidden.nonzero().tolist() == [[0, 4], [1, 2]] and not torch.allclose(a, b, atol=1e-3)
        other = w.clone(); other[1, 2] += 1; other[0, 4] -= 1; assert torch.allclose(masked(x, other, grid)[0], b, atol=1e-6) and not torch.allclose(plain(x, other, grid)[0], a, atol=1e-3)
        masked.pixel_embed[3].weight.zero_(); masked.pixel_embed[3].bias.copy_(torch.tensor([1., -1.] * 12)); assert masked(x, w, grid)[1].all()


# --- decoder -------------------------------------------------------------------------------------------------------

def filled(d, key=0):
    "Prototypes in every layer, made of random banks."
    for i, layer in enumerate(d.layers): m = layer.memory; m.bank_k.copy_(noise(*m.bank_k.shape, key=(key, i))); m.bank_v.copy_(noise(*m.bank_v.shape, key=(key, i, 1))); m.count[0] = m.bank_k.shape[1]; m.cluster()
    return d


@pytest.mark.parametrize('memory', [False, True])
def test_a_later_word_never_changes_an_earlier_probability(memory):
    "Every word after a place replaced at random, the probabilities up to it stay; prototypes or not. And the word itself does matter."
    d = decoder(memory=dict(prototypes=4, bank=16) if memory else None); d = filled(d) if memory else d; p, words = picture(), torch.randint(4, V, (2, 9), generator=torch_rng(0)); words[:, 0] = BOS
    with torch.no_grad():
        log = d(words, p); assert torch.allclose(log.exp().sum(-1), torch.ones(2, 9), atol=1e-5)
        for t in range(8):
            other = words.clone(); other[:, t + 1:] = torch.randint(4, V, (2, 8 - t), generator=torch_rng(t)); new = d(other, p); assert torch.allclose(new[:, :t + 1], log[:, :t + 1], atol=1e-6)
            other = words.clone(); other[:, t] = (words[:, t] + 1).clamp(max=V - 1) if t else 5; assert (d(other, p)[:, t] - log[:, t]).abs().max() > 1e-4 or torch.equal(other, words)


def test_decoder_written_out():
    "Section 3.8, one sentence with padding at its end: positions from 1, zero for padding; keys of the picture with positions, values without; two residuals and norms after each question; rows of padding are zero."
    d, p, words = decoder(), picture(1), torch.tensor([[BOS, 4, 7, 5, PAD, PAD]]); live = (words != PAD).float()[..., None]
    with torch.no_grad():
        x = d.word_emb.weight[words] + d.pos_emb.weight[torch.tensor([[1, 2, 3, 4, 0, 0]])]; mask = torch.full((6, 6), -torch.inf).triu(1); mask[:, 4:] = -torch.inf
        for l in d.layers:
            s = l.self_att.layer_norm(x + asked(l.self_att, x, x, x, [mask, mask])); s = l.lnorm1(x + s) * live; c = l.enc_att.layer_norm(s + asked(l.enc_att, s, p.tokens + p.places, p.tokens, [0, 0])); c = l.lnorm2(s + c) * live
            x = l.pwff.layer_norm(c + l.pwff.fc2(l.pwff.fc1(c).relu())) * live
        assert torch.allclose(d(words, p), (x @ d.fc.weight.T).log_softmax(-1), atol=1e-5) and torch.allclose(d(words, p)[0, 4:].exp(), torch.full((2, V), 1 / V), atol=1e-6)


def test_padding_changes_no_word():
    "More of it at the end, and another vector for it."
    d, p, words = decoder(), picture(), torch.randint(4, V, (2, 6), generator=torch_rng(1))
    with torch.no_grad():
        words[1, 4:] = PAD; log = d(words, p); assert torch.allclose(d(F.pad(words, (0, 3), value=PAD), p)[:, :6], log, atol=1e-6); d.word_emb.weight[PAD] += 5; assert torch.allclose(d(words, p), log, atol=1e-6)


@pytest.mark.parametrize('memory', [False, True])
@pytest.mark.parametrize('hidden', [False, True])
def test_cached_steps_are_teacher_forcing(memory, hidden):
    "Random prefixes with padding anywhere after the first word, several beams of a picture, hidden cells, prototypes: word by word what the whole sentence gives."
    d = decoder(memory=dict(prototypes=4, bank=16) if memory else None); d = filled(d) if memory else d; B, b, L = 2, 3, 8; words = torch.randint(0, V, (B, b, L), generator=torch_rng(2)); words[..., 0] = BOS; assert (words == PAD).any()
    hide = torch.rand(B, 6, generator=torch_rng(3)) < .4; assert hide.any() and not hide.all(1).any(); p = picture(hidden=hide if hidden else None); many = Understood(p.tokens.repeat_interleave(b, 0), p.places, hide.repeat_interleave(b, 0) if hidden else None)
    with torch.no_grad():
        want, cache = d(words.flatten(0, 1), many).view(B, b, L, V), d.start(p); cache = follow(cache._replace(own=tuple((torch.zeros(B, 1, 2, 0, 12),) * 2 for _ in d.layers)), torch.zeros(B, b, dtype=torch.long))
        for t in range(L): log, cache = d.step(words[..., t], cache); assert torch.allclose(log, want[:, :, t], atol=2e-5), t
        assert cache.pad.shape == (B, b, L) and cache.own[0][0].shape == (B, b, 2, L, 12) and cache.cross[0][0].shape == (B, 2, 6, 12)


def test_hidden_cells_are_not_seen():
    d, hide = decoder(), torch.tensor([[True, False, False, True, False, False]] * 2); p, words = picture(hidden=hide), torch.tensor([[BOS, 4, 6]] * 2)
    with torch.no_grad():
        other = p._replace(tokens=torch.where(hide[..., None], noise(2, 6, E, key=11), p.tokens)); assert torch.allclose(d(words, p), d(words, other), atol=1e-6) and not torch.allclose(d(words, p._replace(hidden=None)), d(words, other._replace(hidden=None)), atol=1e-3)
        cut = Understood(p.tokens[:, ~hide[0]], p.places[~hide[0]], None); assert torch.allclose(d(words, p), d(words, cut), atol=1e-5)


def test_word_loss_leaves_out_padding():
    "The mean over words, not over rows; <eos> counts, what follows it does not."
    log, words = noise(2, 5, V).log_softmax(-1), torch.tensor([[BOS, 4, 5, EOS, PAD], [BOS, EOS, PAD, PAD, PAD]]); assert float(word_loss(log, words)) == pytest.approx(float(-(log[0, 0, 4] + log[0, 1, 5] + log[0, 2, EOS] + log[1, 0, EOS]) / 4), abs=1e-6)


# --- beams ---------------------------------------------------------------------------------------------------------

def table_step(size, steps, B, key=0, end=0.):
    "A model whose next word depends on the whole sentence so far: rows of a random table; its state is the sentence."
    tables = [noise(B, size ** t, size, key=(key, t)) for t in range(steps)]
    for t in tables: t[..., EOS] += end
    tables = [t.log_softmax(-1) for t in tables]
    def _step(words, state):
        if state is None: return tables[0][:, :1], torch.zeros(B, 1, 0, dtype=torch.long)
        so_far = torch.cat([state, words[..., None]], -1); code = sum(so_far[..., i] * size ** i for i in range(so_far.shape[-1])); return tables[so_far.shape[-1]].gather(1, code[..., None].expand(-1, -1, size)), so_far
    def _follow(state, parents): return state.gather(1, parents[..., None].expand(-1, -1, state.shape[-1]))
    return _step, _follow, tables


def every_sentence(tables, b, size, steps):
    "All sentences of a table model with the logarithm of their probability, best first."
    found = []
    for words in product(range(size), repeat=steps):
        end = words.index(EOS) + 1 if EOS in words else steps
        if any(words[end:]): continue # after the end only zeros
        logs = [float(tables[t][b, sum(w * size ** i for i, w in enumerate(words[:t])), words[t]]) for t in range(end)]; found.append((sum(logs), words, logs + [0.] * (steps - end)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize('end', [0., 2.])
def test_enough_beams_are_an_exhaustive_search(end):
    "Four words, three steps, forty sentences: all of them, in order, with the logarithms of every word."
    step, follow, tables = table_step(4, 3, 2, end=end); found = beam_search(step, None, follow, 2, beams=40, steps=3)
    for b in range(2):
        want = every_sentence(tables, b, 4, 3); assert len(want) == 40 and [tuple(w) for w in found.words[b].tolist()] == [w for _, w, _ in want] and torch.allclose(found.scores[b], torch.tensor([s for s, *_ in want]), atol=1e-5) and torch.allclose(found.logprobs[b], torch.tensor([l for *_, l in want]), atol=1e-5)


@pytest.mark.parametrize('beams', [1, 2, 3, 9])
@pytest.mark.parametrize('end', [0., 1.5, 6.])
def test_stopping_early_changes_nothing(beams, end):
    "Against all steps taken and all candidates sorted; with many ends the search does stop; scores are the sums; more beams than words at the first step."
    step, follow, _ = table_step(5, 6, 3, beams, end); calls = []; counted = lambda w, s: calls.append(1) or step(w, s)
    a, b = beam_search(counted, None, follow, 3, beams=beams, steps=6), search(lambda w, s: (lambda o: (o[0], [o[1]]))(step(w, s[0])), [None], 3, beams, 6) if beams <= 5 else None; assert a.words.shape == a.logprobs.shape == (3, beams, 6) and torch.allclose(a.scores, a.logprobs.sum(-1), atol=1e-5)
    assert (a.scores.diff(dim=1) <= 0).all() and (len(calls) < 6 or end < 6) and all(w[w.index(EOS) + 1:] == [0] * (5 - w.index(EOS)) for w in a.words.flatten(0, 1).tolist() if EOS in w) and len({tuple(w) for w in a.words[0].tolist()}) == beams
    if b is not None: assert torch.equal(a.words, b.words) and torch.allclose(a.logprobs, b.logprobs, atol=1e-6) and torch.allclose(a.scores, b.scores, atol=1e-5)


def test_one_beam_is_greedy():
    model, images = captioner(), noise(3, 3, 40, 40)
    with torch.no_grad():
        model.decoder.fc.weight *= 4; found, p, words = write(model, images, 1, 9), model.understand(images), torch.full((3, 1), BOS)
        for _ in range(9): words = torch.cat([words, model.decoder(words, p)[:, -1:].argmax(-1)], 1)
    for line, want in zip(found.words[:, 0].tolist(), words[:, 1:].tolist()): end = want.index(EOS) + 1 if EOS in want else 9; assert line == want[:end] + [0] * (9 - end)


@pytest.mark.parametrize('hidden', [False, True])
def test_caches_write_the_same_words(hidden):
    "The plain steps of the benchmark, which read the sentence from its beginning or keep inputs only; trace tells the tree."
    d, hide = decoder(layers=3), torch.tensor([[True, False, False, True, False, False]] * 4); d.fc.weight.data *= 3; p, trace = picture(4, hidden=hide if hidden else None), []
    with torch.no_grad():
        found = beam_search(d.step, d.start(p), follow, 4, beams=3, steps=8, trace=trace); lines = torch.zeros(4, 3, 0).long()
        for parents, words, score in trace: lines = torch.cat([lines.gather(1, parents[..., None].expand(-1, -1, lines.shape[-1])), words[..., None]], -1) if lines.shape[-1] else words[..., None]
        assert torch.equal(F.pad(lines, (0, 8 - lines.shape[-1])), found.words) and torch.equal(trace[-1][2], found.scores)
        for step in (() if hidden else (whole_prefix(d, p), kept_inputs(d, p))): plain = search(step, [], 4, 3, 8); assert torch.equal(plain.words, found.words) and torch.allclose(plain.scores, found.scores, atol=1e-4)


def test_gradient_flows_through_beams():
    "That of teacher forcing at the written words, for every parameter of decoder and encoder; CLIP's tower gets none."
    model, images = captioner(gumbel=False), noise(2, 3, 40, 40); found = write(model, images, 3, 6); weight = noise(2, 3, 6, key=12); (found.logprobs * weight).sum().backward(); learnt = {n: p for n, p in model.named_parameters() if not n.startswith('backbone.') and p.grad is not None}; got = {n: p.grad.clone() for n, p in learnt.items()}
    assert all(p.grad is None for p in model.backbone.parameters()) and {n.split('.')[0] for n in got} == {'decoder', 'encoder', 'att_embed'}; model.zero_grad()
    p = model.understand(images, seen=SimpleNamespace(**{k: v.detach() for k, v in model.look(images)._asdict().items()})); words = found.words.flatten(0, 1); line = torch.cat([torch.full((6, 1), BOS), words[:, :-1]], 1); log = model.decoder(line, Understood(p.tokens.repeat_interleave(3, 0), p.places, None)).gather(-1, words[..., None])[..., 0]
    alive = (F.pad((words == EOS).cumsum(1), (1, 0))[:, :-1] == 0); assert torch.allclose(found.logprobs.flatten(0, 1), log * alive, atol=1e-5); (log * alive * weight.flatten(0, 1)).sum().backward(); assert all(torch.allclose(p.grad, got[n], atol=1e-4, rtol=1e-3) for n, p in learnt.items())


def test_self_critical_loss_by_hand():
    "Mean over all steps, ended ones too, against the mean reward of the picture; what all beams of a picture share teaches nothing."
    log, rewards = -noise(2, 3, 5).abs(), noise(2, 3, key=13); want = -sum(float(log[i, k].sum() / 5) * float(rewards[i, k] - rewards[i].mean()) for i in range(2) for k in range(3)) / 6
    assert float(critical_loss(log, rewards)) == pytest.approx(want, abs=1e-6) and torch.allclose(critical_loss(log, rewards + torch.tensor([[5.], [-2.]])), critical_loss(log, rewards), atol=1e-6); log.requires_grad_(); critical_loss(log, torch.full((2, 3), 7.)).backward(); assert not log.grad.any()
    log.grad = None; critical_loss(log, torch.tensor([[1., 0., 0.], [0., 0., 0.]])).backward(); assert (log.grad[0, 0] < 0).all() and (log.grad[0, 1:] > 0).all() and not log.grad[1].any()


# --- prototypes ----------------------------------------------------------------------------------------------------

def test_k_means_against_a_loop():
    points = noise(30, 3, key=14); centres = points[[round(i * 29 / 4) for i in range(5)]].clone()
    for _ in range(10):
        near = [min(range(5), key=lambda c: float((p - centres[c]).norm())) for p in points]
        centres = torch.stack([points[[i for i, n in enumerate(near) if n == c]].mean(0) if c in near else centres[c] for c in range(5)])
    assert torch.allclose(k_means(points, 5), centres, atol=1e-5) and torch.allclose(k_means(points[:1].repeat(9, 1), 4), points[:1].repeat(4, 1), atol=1e-6)


def test_values_of_prototypes_by_hand():
    "Softmax of minus the distance over the nearest keys; all of the bank where it holds fewer."
    keys, values, centre = torch.tensor([[0., 0.], [3., 4.], [0., 1.], [9., 9.]]), torch.tensor([[1., 0.], [0., 1.], [2., 2.], [7., 7.]]), torch.zeros(1, 2); a = math.exp(-1)
    assert torch.allclose(prototype_values(centre, keys, values, 2), torch.tensor([[(1 + 2 * a) / (1 + a), 2 * a / (1 + a)]]), atol=1e-6) and torch.allclose(prototype_values(centre, keys, values, 1), values[:1])
    w = np.exp([0., -5., -1., -9 * 2 ** .5]); assert np.allclose(prototype_values(centre, keys, values, 99).numpy(), w / w.sum() @ values.numpy(), atol=1e-6)


def test_the_bank_keeps_the_last_words_without_padding():
    "Only in training, without gradient; words of <pad> are left out; the oldest go."
    m = Prototypes(2, 3, 2, bank=5); seen = []
    for i in range(7):
        k, v, words = noise(2, 2, 2, 3, key=(15, i)).requires_grad_(), noise(2, 2, 2, 3, key=(16, i)), torch.tensor([[True, i % 2 == 0], [True, False]]); m.train(i != 3); m.observe(k, v, words); m.store()
        if i != 3: seen += [(k[b, :, t].detach(), v[b, :, t]) for b in range(2) for t in range(2) if words[b, t]]
        for bank, part in ((m.bank_k, 0), (m.bank_v, 1)): want = [s[part] for s in seen[-5:]]; assert all(any(torch.equal(bank[:, j], w) for j in range(5)) for w in want)
    assert int(m.count[0]) == len(seen) and not m.bank_k.requires_grad and m.last is None; before = m.bank_k.clone(); m.store(); assert torch.equal(m.bank_k, before)


def test_prototypes_are_silent_before_the_first_clustering():
    "A decoder with a memory is one without until there are prototypes; a bank that is too small makes none; then segments get gradients, prototypes none."
    d, plain, p, words = decoder(memory=dict(prototypes=4, bank=16)), decoder(), picture(), torch.tensor([[BOS, 4, 6, 7]] * 2); plain.load_state_dict({k: v for k, v in d.state_dict().items() if 'memory' not in k})
    with torch.no_grad():
        assert torch.equal(d(words, p), plain(words, p)); d.train(); d(words[:1, :3], p._replace(tokens=p.tokens[:1])); d.eval(); m = d.layers[0].memory; m.store(); m.cluster(); assert int(m.count[0]) == 3 and int(m.count[1]) == 0 and torch.equal(d(words, p), plain(words, p))
    filled(d); assert not torch.allclose(d(words, p), plain(words, p), atol=1e-3) and all(int(l.memory.count[1]) == 1 for l in d.layers); d(words, p).sum().backward(); assert all(l.memory.seg_input.grad.any() and l.memory.seg_memory.grad.any() for l in d.layers) and {n for n, _ in m.named_parameters()} == {'seg_input', 'seg_memory'}
    assert {'proto_k', 'proto_v', 'bank_k', 'bank_v', 'count'} == {n for n, _ in m.named_buffers()} <= m.state_dict().keys()


# --- the whole, and its files --------------------------------------------------------------------------------------

def test_frozen_names_get_no_gradient_in_the_whole_captioner():
    "Words and contrast together reach every parameter that learns, and nothing else."
    model = captioner(); log, z = model(noise(2, 3, 40, 40), words := torch.tensor([[BOS, 4, 5, 6, EOS], [BOS, 7, 8, 9, EOS]])); (word_loss(log, words) + contrast_loss(z.flatten(0, 1), torch.arange(50) % 4)).backward()
    for name, p in model.named_parameters(): assert (p.grad is not None and p.grad.abs().sum() > 0) == (not name.startswith('backbone.') or 'prompt' in name or 'S_Adapter' in name), name


def test_oblong_pictures_go_through_the_whole_captioner():
    "The grid is read from the picture: rows first, and a batch is its pictures one by one."
    model, images, words = captioner(), noise(2, 3, 24, 56), torch.tensor([[BOS, 4, 5]] * 2)
    with torch.no_grad(): log, z = model(images, words); one = [model(i[None], words[:1])[0] for i in images]; assert z.shape == (2, 21, E) and torch.allclose(log, torch.cat(one), atol=1e-4) and torch.equal(model.understand(images).places, grid_positions((3, 7), E)) and write(model, images, 2, 4).words.shape == (2, 2, 4)


@pytest.fixture(scope='module')
def official():
    "A small captioner in the names of a file, with the parts of such files that take no part."
    model = captioner(); state = {k: v.contiguous() for k, v in model.state_dict().items()}; return model, state


def test_own_weights_come_back(official, tmp_path):
    "From the tensors and from a file; every output is the same; sizes are read from the shapes."
    model, state = official; save_file(state, tmp_path/'w.safetensors'); images, words = noise(1, 3, 40, 40), torch.tensor([[BOS, 4, 5]])
    for source in (state, tmp_path/'w.safetensors'):
        found = from_official(source, 4); assert not found.training and found.state_dict().keys() == state.keys()
        with torch.no_grad(): assert all(torch.equal(a, b) for a, b in zip(found(images, words), model(images, words)))
    with torch.no_grad(): assert not torch.equal(from_official(state, 2)(images, words)[0], model(images, words)[0]) # heads are the one number that no shape tells


def test_dead_parts_of_a_file_are_ignored(official):
    "The text tower with its adapters, the unused layer, state of the search; and nothing that is used is among them."
    _, state = official; dead = ['encoder.global_embed.0.weight', 'backbone.transformer.resblocks.0.S_Adapter.D_fc1.weight', 'backbone.token_embedding.weight', 'backbone.ln_final.bias', 'backbone.positional_embedding', 'backbone.text_projection', 'decoder.layers.0.self_att.running_keys', 'decoder.running_seq', 'decoder.running_mask_self_attention', 'enc_output', 'decoder.mask_enc']
    assert living(state) == state; found = from_official(state | {k: torch.zeros(3) for k in dead}, 4); assert all(torch.equal(v, state[k]) for k, v in found.state_dict().items()) and len(DEAD) > 0


@pytest.mark.parametrize('change, says', [(lambda s: s.pop('decoder.fc.weight'), 'decoder.fc.weight'), (lambda s: s.pop('backbone.visual.prompt_embeddings'), 'prompt_embeddings'), (lambda s: s.update({'decoder.layers.0.extra': torch.zeros(1)}), 'decoder.layers.0.extra'), (lambda s: s.update({'encoder.layers.1.pwff.fc1.bias': torch.zeros(7)}), r'fc1.bias \(7,\)'),
                                          (lambda s: s.update({'decoder.fc.weight': torch.zeros(V - 1, E)}), r'decoder.fc.weight \(10, 24\)'), (lambda s: s.pop('backbone.visual.transformer.resblocks.2.S_Adapter.D_fc1.bias'), r'\[1, 3\]'), (lambda s: s.pop('backbone.logit_scale'), 'logit_scale'), (lambda s: s.clear(), 'conv1')], ids=range(8))
def test_files_that_do_not_fit_are_refused_by_name(official, change, says):
    state = dict(official[1]); change(state)
    with pytest.raises(BadInput, match=says): from_official(state, 4)
