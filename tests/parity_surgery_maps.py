"Recomputes the golden vectors of CLIP Surgery's maps: streams, tokens, texts, scores, maps, points, maps of layers."
import torch
from open_clip.model import CLIP
from parity import Near, Same

from wsl_nb import surgery as sg
from wsl_nb.vit import empty_features, text_features
from wsl_nb.vit_clip import freeze


def tower(weights, config, quick_gelu=True):
    "The stored weights in open_clip's model, name by name."
    vision = dict(layers=config['layers'], width=config['width'], head_width=config['width'] // config['heads'], patch_size=config['patch'], image_size=config['image_size'])
    text = dict(context_length=config['ctx'], vocab_size=config['vocab'], width=config['text_width'], heads=config['text_heads'], layers=config['text_layers'])
    clip = CLIP(config['embed_dim'], vision, text, quick_gelu=quick_gelu)
    clip.load_state_dict(weights)
    return freeze(clip)


def tokens_like(x): return Near(x, 2e-5, 1e-4)


def score_like(x): return Near(x, 1e-6)


def map_like(x): return Near(x, 1e-4)


def streams(clip, s, config):
    "Both streams of every block, and what the first surgery block adds."
    blocks, stack = config['surgery_blocks'], clip.visual.transformer.resblocks; first = len(stack) - blocks
    every, found = sg.read_blocks(clip, s['image'], len(stack)), sg.surgery(clip, s['image'], blocks)
    rows = {f'block{i}.out': every.entries[i + 1] for i in range(first)}
    rows |= {f'block{first + i}.{name}': x for name, part in (('new', found.new), ('ori', found.original)) for i, x in enumerate(part)}
    y = every.normed[first]
    return {k: tokens_like(x) for k, x in (rows | {'dual0.ln1': y, 'dual0.attn_new': sg.read_out(stack[first], y), 'dual0.attn_ori': sg.read_out(stack[first], y, 'qk')}).items()}


def tokens(clip, s, config):
    "Tokens under every treatment, another size, a rectangle; the model's own table afterwards."
    blocks = config['surgery_blocks']; found = sg.surgery(clip, s['image'], blocks)
    high, wide = sg.surgery(clip, s['image_hi'], blocks), sg.surgery(clip, s['image_ns'], blocks); scores = sg.feature_surgery(wide.tokens, s['text_features'], temperature=config['fs_temperature'])
    rows = {'surgery_tokens': found.tokens, 'surgery_tokens_norm': torch.nn.functional.normalize(found.tokens, dim=-1), 'plain_tokens': sg.surgery(clip, s['image'], 0).tokens, 'maskclip_tokens': sg.surgery(clip, s['image'], 1, 'identity').tokens,
            'hi.surgery_tokens': high.tokens, 'hi.pos_after': sg.positions_for(clip.visual, high.grid), 'pos_before': clip.visual.positional_embedding, 'ns.surgery_tokens': wide.tokens, 'open_clip.image_embed': found.tokens[:, 0]}
    return {k: tokens_like(x) for k, x in rows.items()} | {'ns.similarity_surgery': score_like(scores), 'ns.map_surgery': map_like(sg.enlarged(sg.as_grid(scores, wide.grid), config['out_hw']))}


def texts(clip, s, config):
    "The ensemble of each class and of the empty string, from stored prompts."
    ids = s['text_tokens']; names = [f'class{k}' for k in range(len(ids) - 1)]; forms = [f'{p} {{}}' for p in range(ids.shape[1])]
    known = {form.replace('{}', name): ids[k, p] for k, name in enumerate([*names, '']) for p, form in enumerate(forms)}
    clip.tokenizer = lambda prompts: torch.stack([known[p] for p in prompts])
    raw = clip.encode_text(ids.flatten(0, 1)).view(*ids.shape[:2], -1)
    return {'text_features_raw': Near(raw, 1e-5, 1e-5), 'text_features': Near(text_features(clip, names, forms), 1e-5), 'redundant_features': Near(empty_features(clip, forms), 1e-5)}


def scores(s, config):
    "Cosines, weights, feature surgery in three forms, maps, points."
    t, cos, fs, size, grid = s['text_features'], sg.scores_of(s['surgery_tokens'], s['text_features']), sg.feature_surgery(s['surgery_tokens'], s['text_features'], temperature=config['fs_temperature']), config['out_hw'], [config['image_size'] // config['patch']] * 2
    shown = lambda x: sg.enlarged(sg.as_grid(x, grid), size).permute(0, 2, 3, 1)
    found = dict(similarity_raw=score_like(cos), similarity_surgery=score_like(fs), fs_weight=score_like(sg.class_weights(cos[:, :1], config['fs_temperature'])), fs_prob=score_like((config['fs_temperature'] * cos[:, :1]).softmax(-1)),
                 similarity_surgery_single=score_like(sg.feature_surgery(s['surgery_tokens'], t[:1], s['redundant_features'])), similarity_surgery_multi_red=score_like(sg.feature_surgery(s['surgery_tokens'], t, s['redundant_features'])),
                 map_plain=map_like(shown(sg.scores_of(s['plain_tokens'], t))), map_raw=map_like(shown(cos)), map_surgery=map_like(shown(s['similarity_surgery'])))
    for k in range(len(t)):
        points, kinds = sg.sam_points(sg.as_grid(s['similarity_surgery'], grid)[0, k:k + 1], size, config['point_t'], config['down'])
        found |= {f'points.{k}': Same(points), f'point_labels.{k}': Same(kinds)}
    return found


def layers(clip, s, config):
    "Maps of the last blocks in both forms, their mean, their mean on the head's grid."
    found, side = sg.surgery(clip, s['image'], config['surgery_blocks']), [config['cam_res']] * 2; rows = {}
    for name, form in (('cam', 'cosine'), ('seedcam', 'unnormed')):
        maps = sg.layer_maps(clip, found, s['text_features'], len(config['cam_layers']), form)
        rows |= {f'{name}_layer{l}': m for l, m in zip(config['cam_layers'], maps)} | {f'{name}_mean': maps.mean(0), f'{name}_fused': sg.fused(maps, side)}
    return {k: tokens_like(x) for k, x in rows.items()}


@torch.no_grad()
def map_rows(stored, config):
    "('io', name) -> recomputed tensor with its tolerance."
    s, clip = stored['io'], tower(stored['weights'], config)
    gelu = tower(stored['weights'], config, False).encode_image(s['image'])
    return {('io', k): v for k, v in (streams(clip, s, config) | tokens(clip, s, config) | texts(clip, s, config) | scores(s, config) | layers(clip, s, config) | {'open_clip.image_embed_gelu': tokens_like(gelu)}).items()}
