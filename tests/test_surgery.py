"Surgery on any plain ViT of open_clip: towers, sizes, streams, feature surgery against its materialised form, points, words; recipes; the incidents of plumbing."
import math
from copy import deepcopy
from dataclasses import fields, replace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bench_surgery_plain import materialised, two_paths
from wsl_nb import cli
from wsl_nb.core import BadInput, seed_everything, torch_rng
from wsl_nb.formats_aerial import DIOR_CLASSES, DIOR_WORDS, VHR10_CLASSES
from wsl_nb.surgery import (TREATMENTS, as_grid, attention_rows, check_tower, class_weights, compare, enlarged, feature_surgery, fused, layer_maps, positions_for, project, ranked_cells, read_blocks, read_out, sam_points, scores_of,
                            split_heads, stretch, surgery, word_maps)
from wsl_nb.surgery_base import CHANGES, DIOR, DIOR_EARLIER, LAPTOP, NESTED, PRESETS, SurgeryConfig, class_texts, class_words, preset_name, prompt_set, tower
from wsl_nb.surgery_localisation import pair_giou, pair_iou
from wsl_nb.training_config import check_config, lr_factor
from wsl_nb.vit import empty_features, text_features
from wsl_nb.vit_clip import freeze, image_features

TEXT = dict(context_length=12, vocab_size=100, width=32, heads=2, layers=1)


def small(quick=False, seed=0, **vision):
    "A tiny CLIP of open_clip with random weights."
    seed_everything(seed); shape = dict(layers=4, width=48, head_width=12, patch_size=8, image_size=40) | vision
    clip = freeze(open_clip.model.CLIP(24, shape, TEXT, quick_gelu=quick)); return clip


def noise(*shape, key=0): return torch.randn(*shape, generator=torch_rng('surgery', key))
def units(n, width=24, key=1): return F.normalize(noise(n, width, key=key), dim=1)


# --- towers and sizes ----------------------------------------------------------------------------------------------

TOWERS = dict(plain={}, quick=dict(quick=True), scaled=dict(ls_init_value=.1), two_blocks=dict(layers=2), wide=dict(width=60, head_width=20), dropout=dict(patch_dropout=.5), oblong=dict(image_size=(40, 64)))


@pytest.mark.parametrize('kind', TOWERS)
@pytest.mark.parametrize('size', [None, (48, 24), (8, 80)], ids=str)
def test_any_plain_tower_and_any_grid(kind, size):
    "Class token as in the model's own pass at its own size; the new stream is the sum of read-outs, for every number of blocks; nothing of the model changes."
    clip = small(**TOWERS[kind]); own = clip.visual.image_size if isinstance(clip.visual.image_size, tuple) else (clip.visual.image_size,) * 2; H, W = size or own
    before, images = {k: v.clone() for k, v in clip.state_dict().items()}, noise(2, 3, H, W); L = len(clip.visual.transformer.resblocks)
    with torch.no_grad():
        for blocks in range(L + 1):
            found = surgery(clip, images, blocks); assert found.grid == (H // 8, W // 8) and found.tokens.shape == (2, 1 + H * W // 64, 24) and len(found.new) == blocks
            if size is None: assert torch.allclose(found.tokens[:, 0], clip.encode_image(images), atol=1e-5)
            reads = read_blocks(clip, images, blocks)
            if not blocks: continue
            total = reads.entries[0] + sum(read_out(b, y) for b, y in zip(clip.visual.transformer.resblocks[L - blocks:], reads.normed)); assert torch.allclose(found.new[-1], total, atol=1e-5)
            assert torch.allclose(project(clip, total)[:, 1:], found.tokens[:, 1:], atol=1e-5) and torch.equal(found.original[-1], reads.last)
    assert clip.state_dict().keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in clip.state_dict().items()) and not clip.visual.transformer.resblocks[0].ln_1._forward_hooks


def test_batch_first_is_read_and_not_assumed():
    "The same weights with tokens in front give the same streams."
    clip, images = small(), noise(2, 3, 40, 40); other = deepcopy(clip); stack = other.visual.transformer; stack.batch_first = False
    for block in stack.resblocks: block.attn.batch_first = False
    a, b = (surgery(c, images, 3) for c in (clip, other)); assert clip.visual.transformer.batch_first and torch.allclose(a.tokens, b.tokens, atol=1e-5) and all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a.new + a.original, b.new + b.original))


def strange(kind):
    "A tower for which the read-outs are not defined."
    if kind == 'resnet': return open_clip.model.CLIP(32, dict(layers=(1, 1, 1, 1), width=16, image_size=64), TEXT)
    if kind == 'average': return small(pool_type='avg')
    if kind == 'pooled': return small(attentional_pool=True, attn_pooler_queries=4, attn_pooler_heads=2)
    if kind == 'late norm': return small(final_ln_after_pool=True)
    return nn.Linear(2, 2)


@pytest.mark.parametrize('kind, says', [('resnet', 'ModifiedResNet'), ('average', 'avg'), ('pooled', 'pool'), ('late norm', 'norm after pooling'), ('other', 'NoneType')])
def test_other_towers_are_refused_by_name(kind, says):
    with pytest.raises(BadInput, match=says) as e: check_tower(strange(kind))
    assert 'ViT-B-16' in e.value.cure


@pytest.mark.parametrize('size', [(41, 40), (3, 40), (40,)], ids=str)
def test_sizes_that_do_not_fit_are_refused(size):
    with pytest.raises(BadInput, match='multiples'): surgery(small(), torch.zeros(1, 3, *size), 2)


@pytest.mark.parametrize('call, says', [(lambda c, x: surgery(c, x, 5), '5 surgery blocks'), (lambda c, x: surgery(c, x, 2, 'kk'), 'attention "kk"'), (lambda c, x: surgery(c, F.pad(x, (0, 8)), 2, 'vv', 'nearest'), 'nearest'), (lambda c, x: layer_maps(c, surgery(c, x, 2), units(3), 3), '3 layers of 2')])
def test_other_wishes_are_refused(call, says):
    with pytest.raises(BadInput, match=says): call(small(), noise(1, 3, 40, 40))


@pytest.mark.parametrize('grid', [(2, 9), (5, 5), (7, 3)], ids=str)
def test_positions_are_those_of_torch_and_of_open_clip(grid):
    "Bilinear as torch does it on the grid part, bicubic as open_clip resizes a checkpoint; the class row stays."
    clip = small(); table = clip.visual.positional_embedding; two, three = (positions_for(clip.visual, grid, m) for m in ('bilinear', 'bicubic')); assert two.shape == three.shape == (1 + math.prod(grid), 48) and torch.equal(two[0], table[0]) and torch.equal(three[0], table[0])
    assert torch.allclose(two[1:], F.interpolate(table[1:].T.reshape(1, 48, 5, 5), grid, mode='bilinear', align_corners=False)[0].flatten(1).T, atol=1e-6)
    model = open_clip.model.CLIP(24, dict(layers=4, width=48, head_width=12, patch_size=8, image_size=tuple(8 * g for g in grid)), TEXT); state = dict(clip.state_dict())
    if grid[0] != grid[1]: open_clip.model.resize_pos_embed(state, model, antialias=True); assert torch.allclose(state['visual.positional_embedding'], three, atol=1e-6)


@pytest.mark.parametrize('attention, depth', [('vv', 3), ('identity', 1), ('qk', 4)])
def test_half_precision_stays_finite_and_near(attention, depth):
    "The whole pass under bfloat16 against float32."
    clip, images, texts = small(), noise(2, 3, 40, 40), units(5); exact = word_maps(clip, images, texts, depth, attention)
    with torch.autocast('cpu', torch.bfloat16): near = word_maps(clip, images, texts, depth, attention)
    assert near.isfinite().all() and (near - exact).abs().max() < .05 and F.cosine_similarity(near.flatten(), exact.flatten(), dim=0) > .99


def test_maskclip_is_one_block_with_the_identity():
    "The value path of the last block on the stream before it, with the residual."
    clip, images = small(), noise(1, 3, 40, 40); block = clip.visual.transformer.resblocks[-1]; reads = read_blocks(clip, images, 1); y = reads.normed[0]
    values = F.linear(F.linear(y, block.attn.in_proj_weight[96:], block.attn.in_proj_bias[96:]), block.attn.out_proj.weight, block.attn.out_proj.bias)
    assert torch.allclose(surgery(clip, images, 1, 'identity').new[0], reads.entries[0] + values, atol=1e-5)


def test_attention_with_its_own_weights_is_that_of_torch():
    "q-k read-outs are what nn.MultiheadAttention computes; rows of both kinds are probabilities of the same size."
    clip, images = small(), noise(2, 3, 40, 40); block = clip.visual.transformer.resblocks[1]; y = read_blocks(clip, images, 3).normed[0]
    with torch.no_grad():
        want, weights = block.attn(y, y, y, need_weights=True); assert torch.allclose(read_out(block, y, 'qk'), want, atol=1e-5) and torch.allclose(attention_rows(block, y, slice(0, 26), 'qk'), weights, atol=1e-5)
        rows = attention_rows(block, y, 7); assert rows.shape == (2, 1, 26) and torch.allclose(rows.sum(-1), torch.ones(2, 1)); q, v = split_heads(block, y, 'qv'); assert q.shape == v.shape == (2, 4, 26, 12) and not torch.equal(q, v)


# --- feature surgery -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('batch, length, classes', [(1, 50, 2), (3, 17, 20), (2, 1025, 59)])
def test_closed_form_is_the_released_one(batch, length, classes):
    tokens, texts = noise(batch, length, 64), units(classes, 64); found = feature_surgery(tokens, texts)
    assert found.shape == (batch, length, classes) and (found - materialised(tokens, texts)).abs().max() < 1e-6 and found.mean(-1).abs().max() < 1e-6


def test_weights_change_the_order_of_classes_and_a_common_offset_does_not():
    "Issue threads say that feature surgery keeps the best class: true without the weights, not with them."
    tokens, texts = noise(1, 500, 24), units(8); scores = scores_of(tokens, texts); best = scores.argmax(-1); plain = (scores - scores.mean(-1, keepdim=True)).argmax(-1)
    assert torch.equal(plain, best) and 0 < (feature_surgery(tokens, texts).argmax(-1) != best).float().mean() < .5 and torch.allclose(class_weights(scores[:, :1]).mean(-1), torch.ones(1, 1))


def test_a_map_depends_on_the_list_of_words():
    "Another third word moves the first one's map; plain scores do not move."
    tokens, texts = noise(1, 30, 24), units(4); a, b = (feature_surgery(tokens, texts[list(i)])[..., 0] for i in ((0, 1, 2), (0, 1, 3)))
    assert (a - b).abs().max() > .01 and torch.equal(scores_of(tokens, texts[[0, 1, 2]])[..., 0], scores_of(tokens, texts[[0, 1, 3]])[..., 0])


@pytest.mark.parametrize('value', [0., 7.])
def test_flat_maps_stretch_to_zero_and_others_to_the_whole_range(value):
    maps = torch.stack([torch.full((3, 4), value), torch.arange(12.).view(3, 4)]); found = stretch(maps)
    assert (found[0] == 0).all() and found[1].min() == 0 and found[1].max() == 1 and enlarged(maps[None], (7, 9)).shape == (1, 2, 7, 9) and enlarged(maps[None], (7, 9)).isfinite().all()


def test_layers_are_the_running_sum():
    "The last layer's map is that of surgery; fewer blocks are a shorter sum; centred maps have no mean over classes; fusion is a mean."
    clip, images, texts = small(), noise(2, 3, 40, 40), units(6); found = surgery(clip, images, 4); maps = layer_maps(clip, found, texts, 4)
    assert torch.allclose(maps[-1], word_maps(clip, images, texts, 4), atol=1e-6) and maps.shape == (4, 2, 6, 5, 5) and torch.allclose(fused(maps, (5, 5)), maps.mean(0), atol=1e-6) and fused(maps, (9, 2)).shape == (2, 6, 9, 2)
    centred = layer_maps(clip, found, texts, 2, centred=True); assert centred.mean(2).abs().max() < 1e-6 and torch.allclose(centred[-1], word_maps(clip, images, texts, 4, redundant=None), atol=1e-6)
    raw = layer_maps(clip, found, texts, 1, 'unnormed')[0]; assert torch.allclose(raw, as_grid(F.normalize(found.new[-1], dim=-1) @ clip.visual.proj @ texts.T, found.grid), atol=1e-6)


@pytest.mark.parametrize('blocks', [1, 3, 4])
def test_streams_are_those_of_two_paths_side_by_side(blocks):
    "Hooks beside an unmodified pass, against both streams written out."
    for quick in (True, False):
        clip, images = small(quick), noise(2, 3, 40, 40)
        with torch.no_grad(): assert torch.allclose(surgery(clip, images, blocks).tokens, two_paths(clip, images, clip.visual.positional_embedding, blocks), atol=2e-5)


# --- points and words ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('size', [(7, 300), (96, 96), (1, 1), (513, 380)], ids=str)
@pytest.mark.parametrize('grid', [(1, 1), (3, 11), (12, 12)], ids=str)
def test_points_lie_in_the_picture_best_last(size, grid):
    "As many outside as inside a word, at most half of the cells; every point is a pixel; of two words each brings its own."
    maps = noise(2, *grid, key=3); points, kinds = sam_points(maps[:1], size); inside, outside = ranked_cells(maps[0], size); n = len(inside)
    assert len(points) == 2 * n == len(kinds) and kinds.tolist() == [1] * n + [0] * n and torch.equal(points, torch.cat([inside, outside])) and 1 <= n <= max(1, math.prod(max(1, g // 2) for g in grid) // 2)
    assert (points >= 0).all() and (points[:, 0] < size[1]).all() and (points[:, 1] < size[0]).all()
    both, kinds = sam_points(maps, size); assert int(kinds.sum()) == n + len(ranked_cells(maps[1], size)[0])


@pytest.fixture(scope='module')
def farm(): return tower(LAPTOP)


@pytest.mark.parametrize('size', [(96, 96), (50, 200), (333, 90), (8, 8)], ids=str)
@pytest.mark.parametrize('words', [['deer'], ['duck', 'red truck', 'boat']], ids=len)
def test_words_on_a_picture_of_any_size(farm, size, words):
    "Four finite treatments of the same shape; a single word has maps, too."
    found = compare(farm, torch.rand(3, *size, generator=torch_rng(2)), words, prompt_set('farm')); assert list(found) == list(TREATMENTS) and len({m.shape for m in found.values()}) == 1
    for m in found.values(): assert m.shape[0] == len(words) and m.isfinite().all() and (m[0].numel() == 1 or m[0].std() > 0)
    h, w = found['plain'].shape[1:]; assert h * w <= 2 * 144 and (abs(np.log(h / w * size[1] / size[0])) < .4 or min(h, w) == 2)


def test_text_vectors_are_kept_between_calls(farm, monkeypatch, tmp_path):
    "The second call of the same classes asks the text tower for nothing; other sentences do."
    calls, old, file = [], farm.encode_text, tmp_path/'texts.safetensors'
    monkeypatch.setattr(farm, 'encode_text', lambda *a, **k: calls.append(1) or old(*a, **k))
    a = class_texts(farm, LAPTOP, ['cat', 'duck'], file); first = len(calls); b = class_texts(farm, LAPTOP, ['cat', 'duck'], file); assert first and len(calls) == first and torch.equal(a, b)
    class_texts(farm, LAPTOP, ['cat', 'deer'], file); assert len(calls) > first


# --- recipes -------------------------------------------------------------------------------------------------------

def test_values_of_the_earlier_experiment_and_of_ours():
    "Sections 3.9, 3.10, 4 and 5 of the specification."
    earlier = dict(train_split='trainval', clip_model='ViT-B-32', side=224, grid=7, width=256, head='cell', matching='cell', radius=1.5, match_iou=.3, w_l1=1., w_giou=2., reduction='cell', lr=1e-4, weight_decay=.01, batch=8, epochs=50, warmup=5070, clip=1., augment='none', templates='plain', cam='unnormed', blocks=6, layers=3, activation='quickgelu', precision='fp32', optimizer='adamw')
    ours = dict(train_split='train', eval_split='val', side=448, grid=56, head='grid', matching='centre', radius=1., reach=2., spread=4., w_l1=1., w_giou=2., reduction='object', lr=5e-4, weight_decay=.01, batch=32, epochs=24, lr_floor=.01, clip=1., augment='turns', templates='aerial', precision='bf16', l1='plain', prior='class')
    for cfg, want in ((DIOR_EARLIER, earlier), (DIOR, ours)): assert {k: getattr(cfg, k) for k in want} == want
    assert len(DIOR_EARLIER.learnt) == 10 and set(DIOR_EARLIER.learnt) <= set(DIOR_CLASSES) and DIOR == SurgeryConfig()


def unexplained(cfg): return {f.name for f in fields(cfg) if getattr(cfg, f.name) != getattr(DIOR_EARLIER, f.name)} ^ set(CHANGES) # Differences without a reason, and reasons without a difference


def test_our_recipe_differs_in_the_named_changes_alone():
    assert unexplained(DIOR) == set() and unexplained(replace(DIOR, tau=.3)) == {'tau'} and all(len(reason) > 7 for reason in CHANGES.values())


def test_the_nested_keys_of_the_specification_have_a_place():
    "Every key of section 5 is a field here, or is said to be none."
    names = {f.name for f in fields(SurgeryConfig)}; assert len(NESTED) == 30 and all('.' in k for k in NESTED)
    for key, field in NESTED.items(): assert not field or set(field.split()) <= names, (key, field)


@pytest.mark.parametrize('name', PRESETS)
def test_every_preset_is_valid_and_known_by_its_name(name):
    cfg = PRESETS[name]; check_config(cfg, 'cuda'); assert preset_name(replace(cfg, seed=3, workers=2)) == name and preset_name(replace(cfg, reach=1.7)) == 'custom' and cli.presets(cli.method('surgery'))[name] is cfg


# --- incidents -----------------------------------------------------------------------------------------------------

def test_giou_is_no_iou():
    "Not larger, negative where boxes lie apart, equal for nested ones; 1e-6 on areas costs a perfect pixel two fifths; the scores use the true overlap."
    a, b = (torch.rand(2000, 4, generator=torch_rng(k)) for k in 'ab'); a, b = (torch.cat([x[:, :2].minimum(x[:, 2:]), x[:, :2].maximum(x[:, 2:])], 1) for x in (a, b)); iou, giou = pair_iou(a, b), pair_giou(a, b)
    assert (giou <= iou + 1e-6).all() and (iou >= 0).all() and (giou[iou == 0] < 0).all()
    from torchvision.ops import box_iou, generalized_box_iou
    assert torch.allclose(iou, box_iou(a, b).diagonal(), atol=1e-5) and torch.allclose(giou, generalized_box_iou(a, b).diagonal(), atol=1e-5)
    inner = torch.tensor([[.2, .2, .4, .4]]); outer = torch.tensor([[.1, .1, .9, .5]]); assert torch.allclose(pair_iou(inner, outer), pair_giou(inner, outer))
    pixel = torch.tensor([[.5, .5, .5 + 1 / 800, .5 + 1 / 800]]); assert pair_iou(pixel, pixel) > .999 and pair_giou(pixel, pixel, 1e-6) == pytest.approx(.61, abs=.005)
    from wsl_nb.surgery_scores import box_rows
    pred, near = torch.tensor([[.3, .3, .7, .7]]).view(1, 1, 1, 4), torch.tensor([[.5, .3, .9, .7]]); rows = box_rows(pred, torch.zeros(1, 1, 1), near, torch.zeros(1).long())
    assert torch.allclose(rows.objects, torch.full((1, 4), 1 / 3)) and pair_giou(pred.view(1, 4), near) == pytest.approx(1 / 3, abs=1e-5) and pair_giou(pred.view(1, 4), near + .3) < 0 < .2


def test_every_name_of_dior_has_words():
    "All twenty names, and the ten of VHR-10, become words of a sentence: no capital, no sign, no two words in one; the eight that fell through are among them."
    words = class_words([*DIOR_CLASSES, *VHR10_CLASSES]); assert len(DIOR_CLASSES) == 20 and len(VHR10_CLASSES) == 10 and set(DIOR_CLASSES) <= set(DIOR_WORDS)
    assert all(w == w.lower() and w.replace(' ', '').isalpha() for w in words) and len(set(words[:20])) == 20
    fell = dict(storagetank='storage tank', tenniscourt='tennis court', baseballfield='baseball field', basketballcourt='basketball court', trainstation='train station') | {'Expressway-Service-area': 'expressway service area', 'Expressway-toll-station': 'expressway toll station'}
    assert dict(zip(fell, class_words(list(fell)))) == fell and ' ' in class_words(['windmill'])[0] or class_words(['windmill']) == ['windmill']


@pytest.mark.parametrize('name, per_epoch', [('LAPTOP', 62), ('LAPTOP_EARLIER', 62), ('DIOR', 183), ('DIOR_EARLIER', 1014), ('VHR10', 12)])
def test_no_epoch_is_trained_at_rate_zero(name, per_epoch):
    "Every update has a rate above zero; the mean of the first epoch is no less than a hundredth of the peak; warm-up ends in the first fifth."
    cfg = PRESETS[name]; run = replace(cfg, steps=cfg.steps or cfg.epochs * per_epoch); rates = np.array([lr_factor(run, s) for s in range(run.steps)])
    assert (rates > 0).all() and rates[:per_epoch].mean() > .01 and run.warmup <= run.steps / 5 and rates.max() == pytest.approx(1, abs=1e-3)


def test_one_class_has_a_map(farm):
    "Its mean over classes is itself: refused with the cure; with the empty string the map is the word's and has a range."
    with torch.no_grad(): tokens = surgery(farm, noise(1, 3, 96, 96)).tokens
    one = class_texts(farm, LAPTOP, ['deer'])
    with pytest.raises(BadInput, match='one class') as e: feature_surgery(tokens, one)
    empty = empty_features(farm, prompt_set('farm')); assert 'redundant' in e.value.cure and materialised(tokens, one).abs().max() < 1e-6
    found = feature_surgery(tokens, one, empty); assert found.std() > .01 and torch.allclose(found, F.normalize(tokens, dim=-1) @ (one - empty).T, atol=1e-6)


def test_reading_leaves_the_model_as_it_was(farm, monkeypatch):
    "Names, numbers, hooks and outputs; also after a pass that fails."
    before, images = {k: v.clone() for k, v in farm.state_dict().items()}, noise(1, 3, 96, 96); first = image_features(farm, images); fresh = tower(LAPTOP)
    surgery(farm, images, 8)
    with pytest.raises(BadInput): surgery(farm, images[..., :95], 8)
    def broken(x): raise RuntimeError('in the middle')
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match='middle'): patch.setattr(farm.visual.transformer.resblocks[6].mlp, 'forward', broken); surgery(farm, images, 8)
    assert list(farm.state_dict()) == list(before) and all(torch.equal(v, before[k]) for k, v in farm.state_dict().items()) and torch.equal(image_features(farm, images), first)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in farm.modules()); fresh.load_state_dict(farm.state_dict(), strict=True)


def test_other_sizes_leave_no_trace(farm):
    "Maps before and after pictures of other sizes are equal bit for bit; 4 x 16 patches are no 8 x 8."
    texts, images = class_texts(farm, LAPTOP, ['deer', 'duck']), noise(1, 3, 96, 96); before = word_maps(farm, images, texts)
    for size in ((48, 144), (192, 192), (32, 128)): assert word_maps(farm, F.interpolate(images, size), texts).shape[2:] == (size[0] // 8, size[1] // 8)
    assert torch.equal(word_maps(farm, images, texts), before); flat, square = (positions_for(farm.visual, g) for g in ((4, 16), (8, 8))); assert flat.shape == square.shape and not torch.allclose(flat, square)


@pytest.mark.parametrize('quick', [True, False])
def test_the_activation_of_the_file_is_the_activation_of_the_blocks(quick, tmp_path):
    "The recipe's word decides, and is said; the other one gives other numbers without an error."
    from wsl_nb.vit_clip import random_clip
    seed_everything(3); file = tmp_path/'some.pt'; torch.save(random_clip('ViT-B-32').state_dict(), file); said = []
    cfg = replace(DIOR, clip_file=str(file), activation='quickgelu' if quick else 'gelu'); clip = tower(cfg, said.append)
    kinds = {type(b.mlp.gelu).__name__ for b in clip.visual.transformer.resblocks}; assert kinds == {'QuickGELU' if quick else 'GELU'} and ('QuickGELU' in said[0]) == quick


def test_sentences_of_the_prompt_sets():
    "Eighty of OpenAI and five scenes; sentences from above for DIOR; every vector has unit length."
    assert len(prompt_set('imagenet85')) == 85 and 'satellite' in prompt_set('aerial')[0]; assert torch.allclose(text_features(tower(LAPTOP), ['duck'], prompt_set('farm')).norm(dim=1), torch.ones(1))
