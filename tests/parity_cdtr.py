"Recomputes the golden vectors of CDTR from stored weights and inputs: a whole model, or components. Nothing in it knows the sizes of a directory."
import re
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from parity import Near, Same
from reference_cdtr import under_released_name
from torch import nn

from wsl_nb import boxes as bx, cdtr, cdtr_base as base
from wsl_nb.cdtr_weights import from_official, our_name
from wsl_nb.training_checkpoint import load_weights
from wsl_nb.training_config import make_optimizer
from wsl_nb.vit_clip import similarity

OFFICIAL = dict(cub=base.CUB_OFFICIAL, imnet=base.ILSVRC_OFFICIAL)
LOSSES = dict(loss_x='cls', loss_att='csm', loss_area='area', loss_map='map', loss_dnc='ski', loss_clip='sba') # Released name -> ours
EARLIER_RATE = base.CUB_OFFICIAL.lr * 32 / 512                                # Of an earlier report: scaled by its batch


# --- tolerances ------------------------------------------------------------------------------------------------------

def map_like(x): return Near(x, 2e-4 * x.abs().max().item(), 1e-4)


def loss_like(x): return Near(x.detach(), 1e-5, 1e-5)


def grad_like(x): return Near(x, 1e-6 + 1e-3 * x.abs().max().item())


@dataclass
class Stepped:
    "A parameter after a step: 1e-5, but twice the rate where the gradient is noise, since Adam's first step goes by its sign."
    value: torch.Tensor
    grads: tuple[torch.Tensor, torch.Tensor] # Ours and the stored one; keys' biases have none but rounding
    lr: float

    def check(self, stored):
        "(largest error, tolerance as text, passed)"
        noise = torch.stack([g.abs() < 1e-6 * g.abs().max() for g in self.grads]).any(0)
        firm, loose = Near(self.value[~noise], 1e-5).check(stored[~noise]), Near(self.value[noise], 2 * self.lr).check(stored[noise])
        return firm[0], f'{firm[1]}, {int(noise.sum())} loose', firm[2] and loose[2]


# --- the whole model -------------------------------------------------------------------------------------------------

def recipe(config):
    "The released recipe at the sizes of the directory."
    return replace(OFFICIAL[config['variant']], dim=config['embed_dim'], depth=config['depth'], heads=config['num_heads'], patch=config['patch_size'], side=config['image_size'] // config['patch_size'],
                   mlp_ratio=config['mlp_ratio'], csm_width=config['c_base'], ocm_blocks=config['ocm_blocks'], drop_path=config['drop_path'], clip_dim=config['clip_dim'], w_sba=config['clip_loss_weight'],
                   area=config['area_quantile'], batch=config['batch'], accumulate=1, lr=config['lr'], precision='fp32')


def network(weights, cfg, text):
    "The library's model with the stored weights and text features."
    model = cdtr.CDTR(cfg, len(weights['head.bias']))
    own = {k: v for k, v in model.state_dict().items() if k.endswith('num_batches_tracked')}
    load_weights(model, own | from_official(weights) | dict(text=F.normalize(text, dim=1)))
    return model


class StandIn(nn.Module):
    "The directory's CLIP: pooled colours times a matrix."
    def __init__(self, matrix, side):
        super().__init__()
        self.matrix, self.side, self.pool, self.features = matrix, side, side // round((len(matrix) / 3) ** .5), None
        self.positional_embedding = torch.zeros(1)

    def encode_image(self, x):
        self.features = F.avg_pool2d(x, self.pool).flatten(1) @ self.matrix
        return self.features


@contextmanager
def watched(**modules):
    "Name -> output of a module while the block runs; the input instead where the name ends in '_in'."
    found, hooks = {}, []
    for name, module in modules.items():
        if name.endswith('_in'): hooks.append(module.register_forward_pre_hook(lambda m, x, name=name: found.__setitem__(name, x[0])))
        else: hooks.append(module.register_forward_hook(lambda m, x, out, name=name: found.__setitem__(name, out)))
    try: yield found
    finally:
        for h in hooks: h.remove()


def stages(model):
    "Modules whose output has a name in the vectors; tokens after block l are what the next norm reads."
    norms = [b.norm1 for b in model.vit.blocks][1:] + [model.vit.norm]
    return {f'tokens_after_block{l}_in': n for l, n in enumerate(norms)} | dict(
        tokens_norm=model.vit.norm, csm_down=model.csm.down, csm_up=model.csm.up, ocm_mix=model.ocm.mix, ocm_prebnsig=model.ocm.join, ski_offset=model.ski.offset, seen=model.vit, maps=model)


def train(model, image, target, clip, cfg):
    "One forward pass of training with everything that the vectors name, then the step."
    label = F.one_hot(target, model.classes).float()
    with watched(**stages(model.train())) as seen: terms = cdtr.losses(model, dict(image=image, label=label), 0, cfg, clip=clip)
    total, maps = cdtr.total(terms, model, 0, cfg), seen.pop('maps')
    guiding, (fore, back), each = cdtr.guiding_map(maps, target, cfg), clip.features.chunk(2), torch.arange(len(target))
    a = maps.attention.detach().requires_grad_(); cdtr.area_loss(a, cfg.area).backward()
    found = {k.removesuffix('_in'): v for k, v in seen.items() if torch.is_tensor(v)} | {f'ocm_block{l}': seen['ocm_mix'][:, [l]] for l in range(cfg.ocm_blocks)} | dict(
        cls_attn=seen['seen'].rows.flatten(3), attn_map=maps.attention, x_map=maps.tokens, csm_map=maps.stimulated, ski_map=maps.deformed, pre_map=maps.object_,
        x_logits=maps.tokens.mean((2, 3)), attn_logits=maps.stimulated.mean((2, 3)), dnc_logits=maps.deformed.mean((2, 3)),
        object_map=guiding, object_map_224_stride8=cdtr.composites(torch.ones_like(image), guiding)[:len(target), 0, ::8, ::8], fg_image_features=fore, bg_image_features=back,
        sim_fg=similarity(fore, model.text)[each, each], sim_bg=similarity(back, model.text)[each, each], attn_map_area_kept=a * (a.grad != 0))
    return terms, total, {k: v.detach() for k, v in found.items()}


def after_step(model, cfg, names, grads):
    "Parameters after one AdamW step through the recipe's groups, and running statistics."
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    make_optimizer(cfg, cdtr.groups(model, cfg)).step()
    now, found = model.state_dict(), {}
    for name in names:
        kind, own = name.split('.', 1); value = under_released_name(now, own)
        found[name] = map_like(value) if kind == 'buffer' else Stepped(value, (under_released_name(before, own), grads[own]), cfg.lr)
    return found


def found_boxes(maps, size, thresholds):
    "Boxes of each map at each threshold, in whatever order they come, (n,T,4)."
    order = thresholds.argsort(); back = order.argsort()
    return torch.stack([torch.from_numpy(bx.boxes_at(m, size, thresholds[order]))[back] for m in maps])


@torch.no_grad()
def evaluated(model, image, config, s):
    "Evaluation mode: the maps, and the boxes of the predicted class."
    maps, rows = model.eval()(image), model.vit(image).rows
    cams = maps.fused() / (2 if config['variant'] == 'imnet' else 1)
    logits = maps.tokens.mean((2, 3)); top = logits.argmax(1)
    chosen, size = cams[torch.arange(len(top)), top], tuple(image.shape[-2:])
    return dict(x_logits=map_like(logits), cams=map_like(cams), feats=map_like((maps.tokens + maps.stimulated) / 2), pre_map=map_like(model.object_map(rows)), top1=Same(top),
                boxes=Same(found_boxes(chosen, size, s['box_thresholds'])), resized_cam_stride8=map_like(torch.stack([torch.from_numpy(bx.enlarge(m, size)) for m in chosen])[:, ::8, ::8]))


def whole(stored, config):
    "Everything about a model."
    cfg, inputs = recipe(config), stored['inputs']
    image = inputs['images_lowres'].repeat_interleave(k := config['image_size'] // inputs['images_lowres'].shape[-1], -1).repeat_interleave(k, -2)
    clip = StandIn(inputs['clip.image_proj'], config['image_size'])
    make = lambda: network(stored['weights'], cfg, inputs['clip.text_features'])
    found = {('eval', k): v for k, v in evaluated(make(), image, config, stored['eval']).items()}
    model = make(); terms, total, seen = train(model, image, inputs['targets'], clip, cfg)
    losses = {k: terms[ours] for k, ours in LOSSES.items()} | dict(awl=cdtr.total({k: v for k, v in terms.items() if k != 'sba'}, model, 0, cfg), total=total)
    total.backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    found |= {('train', k): map_like(v) for k, v in seen.items()} | {('train', f'L.{k}'): loss_like(v) for k, v in losses.items()}
    found |= {('grads', k): grad_like(under_released_name(grads, k)) for k in stored['grads']}
    return found | {('after_step', k): v for k, v in after_step(model, cfg, stored['after_step'], stored['grads']).items()}


# --- components ------------------------------------------------------------------------------------------------------

def part(tensors, prefix):
    "Tensors whose name starts with the prefix, without it."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def stimulation(s, config):
    "CSM without its last convolution, on a grid that is not square: first in evaluation mode, then in training."
    state = {our_name(f'att_layer.{k}').removeprefix('csm.'): v for k, v in part(s, 'csm.weight.').items()}
    width, maps = (state['down.0.weight'].shape[i] for i in (0, 1)); classes = len(state['up.0.weight'])
    csm = cdtr.CategoryStimulation(maps, classes, width // 2)
    nn.init.dirac_(csm.classify.weight)                                       # passes on what it gets
    load_weights(csm, {k: v for k, v in csm.state_dict().items() if k.endswith('tracked') or k.startswith('classify')} | state)
    with torch.no_grad(): quiet, loud = csm.eval()(s['csm.in']), csm.train()(s['csm.in'])
    now = csm.state_dict()
    return {'csm.out_eval': map_like(quiet), 'csm.out_train': map_like(loud)} | {k: map_like(now[our_name('att_layer.' + k.removeprefix('csm.after.')).removeprefix('csm.')]) for k in s if k.startswith('csm.after.')}


def kernel(s, config):
    "SKI with offsets of many cells, most of them outside."
    ski = cdtr.SemanticKernel(s['ski.x_map'].shape[1])
    load_weights(ski, {our_name(f'dnc_att_layer.{k}').removeprefix('ski.'): v for k, v in part(s, 'ski.weight.').items()})
    guide = s['ski.x_map'] * s['ski.cls_attn']
    with torch.no_grad(): out = ski(guide, s['ski.csm_map']); return {'ski.offset': map_like(ski.offsets(guide)), 'ski.map': map_like(out), 'ski.logits': map_like(out.mean((2, 3)))}


def loss(s, config, variant):
    "Losses and their sum without CLIP on maps with ties; gradients of maps and scales."
    s, cfg = part(s, f'loss_{variant}.'), replace(OFFICIAL[variant], w_sba=0.)
    attention, object_map = (s[k].clone().requires_grad_() for k in ('attn_map', 'pre_map'))
    model = nn.Module(); model.scale = nn.Parameter(s['awl_params'].clone())
    terms = {ours: F.cross_entropy(s[k], s['targets']) for ours, k in dict(cls='x_logits', csm='attn_logits', ski='dnc_logits').items()}
    terms |= dict(area=cdtr.area_loss(attention, cfg.area), map=cdtr.map_loss(object_map[:, 0], attention, cfg.pairing))
    total = cdtr.total(terms, model, 0, cfg); total.backward()
    found = {f'out.{k}': loss_like(terms[ours]) for k, ours in LOSSES.items() if ours in terms} | {'out.total': loss_like(total)}
    found |= {'grad.attn_map': grad_like(attention.grad), 'grad.pre_map': grad_like(object_map.grad), 'grad.awl_params': grad_like(model.scale.grad)}
    return {f'loss_{variant}.{k}': v for k, v in found.items()}


def rates(s, config):
    "Learning rate of each epoch; the earlier report scaled it below its floor."
    lr = dict(official_cub=base.CUB_OFFICIAL.lr, official_imnet=base.ILSVRC_OFFICIAL.lr, seed_run=EARLIER_RATE)
    return {f'lr.{k}': Near(torch.tensor(base.epoch_rates(len(s[f'lr.{k}']), v), dtype=torch.float64), 1e-12) for k, v in lr.items() if f'lr.{k}' in s}


def draws(s, config):
    "Order of the images of a process in an epoch."
    numbers = {k: map(int, re.fullmatch(r'sampler\.R(\d+)\.rank(\d+)\.epoch(\d+)', k).groups()) for k in s if k.startswith('sampler.')}
    return {k: Same(torch.tensor(base.repeated_draws(config['n_train'], epoch, processes, rank))) for k, (processes, rank, epoch) in numbers.items()}


def small(s, config):
    "CLIP loss from similarities; object maps from their minimum to their maximum."
    return {'clip.loss': loss_like(cdtr.boost_loss(s['clip.sim_fg'], s['clip.sim_bg'])), 'norm.out': map_like(cdtr.stretched(s['norm.in']))}


def box_maps(s, config):
    "Maps to boxes, in a square and in another rectangle."
    maps, taus, (w, h) = s['box.maps'], s['box.thresholds'], config['nonsq_wh']
    sizes, found = {'224': (224, 224), 'nonsq': (h, w)}, {}
    for name, size in sizes.items():
        fine = np.stack([bx.enlarge(m, size) for m in maps]); grey = (fine * 255).astype(np.uint8)
        above = [[(g > int(float(str(t)) * int(g.max()))).sum() for t in taus.numpy()] for g in grey]
        found |= {f'box.boxes_{name}': Same(found_boxes(maps, size, taus)), f'box.kept_pixels_{name}': Same(torch.tensor(np.array(above)))}
    return found | {k: map_like(torch.from_numpy(bx.enlarge(maps[int(k.rsplit('_', 1)[1])], (h, w)))) for k in s if k.startswith('box.resized_nonsq_')}


def overlaps(s, config):
    "IoU row by row, and between inclusive boxes; truth boxes after resizing and cutting, in the released rounding."
    first = [s[f'iou.{k}'][:len(s['iou.wsol_matrix_first6_clipped_at_0'])].clamp(min=0).int() for k in 'ab']
    truth = [bx.crop_boxes(torch.stack([x, y, x + w, y + h])[None], (int(height), int(width)), offset='float_size') for width, height, x, y, w, h in s['gtbox.wh_xywh'].double()]
    return {'iou.cdtr': Near(torch.from_numpy(bx.box_iou(s['iou.a'], s['iou.b']).diagonal().copy()), 1e-6), 'iou.wsol_matrix_first6_clipped_at_0': Near(torch.from_numpy(bx.box_iou(*first, plus_one=True)), 1e-6),
            'gtbox.xyxy': Near(torch.from_numpy(np.concatenate(truth)), 1e-4)}


def localisation(s, config):
    "The released evaluation's table."
    name = 'eval.metrics_thr_top1loc_top5loc_gtloc_acc1_acc5'; taus, sums = s[name][:, 0], {}
    order = taus.argsort(); back = order.argsort()
    for logits, maps, target, truth in zip(s['eval.logits'], s['eval.cams'], s['eval.targets'], s['eval.gt_xyxy']):
        sums = bx.add_hits(sums, bx.count_hits(logits, maps, int(target), truth[None], (224, 224), taus[order], 'cdtr'))
    curves = bx.loc_curves(sums, len(s['eval.targets']))
    columns = [curves['top1_loc'], curves['top5_loc'], curves['loc_predicted_class'], 100 * curves['cls1'], 100 * curves['cls5']]
    return {name: Near(torch.cat([taus[:, None], torch.from_numpy(np.stack(columns, 1))[back]], 1), 1e-9)}


def reference_evaluation(s, config):
    "MaxBoxAcc with the largest and with all contours, PxAP, and the score map that they start from."
    maps, size, taus = s['box.maps'][s['maxbox.raw_maps_index']], (224, 224), np.arange(0, 1, .01)
    truth = {int(i): s['maxbox.gt'][s['maxbox.gt'][:, 0] == i, 1:] for i in s['maxbox.gt'][:, 0].unique()}
    found = {'maxbox.scoremap0_stride8': Near(torch.from_numpy(bx.enlarge(maps[0], size, 'bicubic_minmax')[::8, ::8].copy()), 1e-6)}
    for name, contours in dict(single='largest', multi='all').items():
        sums = sum(bx.box_hits(maps[i], t, size, taus, contours).astype(int) for i, t in truth.items())
        found |= {f'maxbox.{name}.acc_30_50_70': Near(torch.from_numpy(100 * bx.max_box_acc(sums, len(truth))['acc']), 1e-9), f'maxbox.{name}.correct_iou50_per_threshold': Near(torch.from_numpy(sums[1]), 1e-9)}
    counts = 0
    for m, (x0, y0, x1, y1) in zip(maps, s['pxap.mask_boxes'].tolist()):
        mask = np.zeros(size); mask[y0:y1 + 1, x0:x1 + 1] = 1
        counts = counts + bx.pixel_counts(m, bx.ignored_mask(mask, [(0, 0, size[1], 10)]), taus)
    return found | {'pxap.value': Near(torch.tensor(100 * bx.pxap(counts), dtype=torch.float64), 1e-6)}


def compute(stored, config):
    "(file stem, name) -> recomputed tensor with its tolerance."
    if 'variant' in config: return whole(stored, config)
    s, found = stored['components'], {}
    for form in (stimulation, kernel, rates, draws, small, box_maps, overlaps, localisation, reference_evaluation): found |= form(s, config)
    for variant in OFFICIAL: found |= loss(s, config, variant)
    return {('components', k): v for k, v in found.items()}
