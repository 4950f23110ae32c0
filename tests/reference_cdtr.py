"""CDTR and CATR straight from the equations of the specification, under the names of the released code, with the whole attention of every block.

`PlainCDTR` is the form that `bench_cdtr` times and the block tests hold the library against; `write_directory` makes golden-like directories of other sizes from it.
"""
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from wsl_nb.cdtr_weights import our_name


# --- names -----------------------------------------------------------------------------------------------------------

def under_released_name(tensors, name):
    "The library's tensor that the released code calls so; branches of the object map are slices of one tensor."
    if name.startswith('block') and name[5].isdigit():
        block, rest = name.removeprefix('block').split('.', 1)
        joined = tensors[f'ocm.mix.{rest}']
        return joined if joined.ndim == 0 else joined[int(block)][None]
    return tensors[our_name(name)]


# --- the network -----------------------------------------------------------------------------------------------------

class PlainBlock(nn.Module):
    "Transformer block that returns the whole of its attention."
    def __init__(self, dim, heads, hidden):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim, 1e-6), nn.LayerNorm(dim, 1e-6)
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x):
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(-1)
        x = x + self.attn.proj((seen @ v).transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(F.gelu(self.mlp.fc1(self.norm2(x)))), seen


def stage(into, out):
    "Two convolutions of CSM with their normalisations."
    return nn.Sequential(*(layer for width in (into, out) for layer in (nn.Conv2d(width, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out, momentum=.01), nn.LeakyReLU(.01))))


def nested(path, module):
    "A module under a dotted path."
    for part in reversed(path.split('.')):
        outer = nn.Module(); outer.add_module(part, module); module = outer
    return module


class PlainCDTR(nn.Module):
    "The released network; every intermediate by the names of the golden vectors."
    def __init__(self, classes, dim=384, depth=12, heads=6, ratio=4, patch=16, side=14, width=8, ocm=9, catr=False):
        super().__init__()
        self.ocm, self.catr, suffix = ocm, catr, '' if catr else '_1'
        self.cls_token, self.pos_embed = nn.Parameter(torch.zeros(1, 1, dim)), nn.Parameter(torch.zeros(1, 1 + side * side, dim))
        self.patch_embed = nested('proj', nn.Conv2d(3, dim, patch, patch))
        self.blocks, self.norm = nn.ModuleList(PlainBlock(dim, heads, int(dim * ratio)) for _ in range(depth)), nn.LayerNorm(dim, 1e-6)
        self.head = nn.Conv2d(dim, classes, 3, 1, 1)
        self.att_layer = nn.Module()
        self.att_layer.add_module(f'down{suffix}', nested('1.UConv', stage(depth * heads, 2 * width)))
        self.att_layer.add_module(f'up{suffix}', nested('conv.UConv', stage(depth * heads + 2 * width, classes)))
        self.att_cls = nn.Conv2d(classes, classes, 1, bias=False)
        for l in range(ocm): self.add_module(f'block{l}', nn.Sequential(nn.Conv2d(heads, 1, 1, bias=False), nn.BatchNorm2d(1), nn.LeakyReLU()))
        self.block_catconv, self.block_catbn = nn.Conv2d(ocm, 1, 3, 1, 1, bias=False), nn.BatchNorm2d(1)
        if not catr:
            self.dnc_att_layer = nn.Module()
            self.dnc_att_layer.conv_offset = nn.Conv2d(classes, 18, 3, 1, 1)
            self.dnc_att_layer.deform_conv = nn.Conv2d(classes, classes, 3, 1, 1, bias=False)
        self.AutomaticWeightedLoss = nn.Module(); self.AutomaticWeightedLoss.params = nn.Parameter(torch.ones(4 if catr else 5))

    def forward(self, image):
        x = self.patch_embed.proj(image); grid = x.shape[-2:]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1) + self.pos_embed
        found, attention = {}, []
        for l, block in enumerate(self.blocks):
            x, seen = block(x); attention.append(seen); found[f'tokens_after_block{l}'] = x
        x = self.norm(x); whole = torch.stack(attention)                                    # (L,B,K,1+N,1+N), kept for all that follows
        rows = whole[:, :, :, 0, 1:]
        maps = rows.transpose(0, 1).flatten(1, 2).unflatten(2, grid)
        found |= dict(tokens_norm=x, cls_attn=rows, attn_map=whole.mean(0).sum(1)[:, 0, 1:].unflatten(1, grid), x_map=self.head(x[:, 1:].transpose(1, 2).unflatten(2, grid)))
        found |= self.stimulation(maps) | self.constraint(rows.unflatten(3, grid))
        return found | ({} if self.catr else self.kernel(found))

    def stimulation(self, maps):
        "CSM."
        down, up = self.att_layer.children()
        small = next(down.children()).UConv(F.max_pool2d(maps, 2))
        wide = next(up.children()).UConv(torch.cat([maps, F.interpolate(small, size=maps.shape[-2:], mode='bilinear', align_corners=False)], 1))
        return dict(csm_down=small, csm_up=wide, csm_map=self.att_cls(wide))

    def constraint(self, maps):
        "OCM, a branch for each block."
        each = [getattr(self, f'block{l}')(maps[l]) for l in range(self.ocm)]
        before = self.block_catbn(self.block_catconv(torch.cat(each, 1)))
        return {f'ocm_block{l}': m for l, m in enumerate(each)} | dict(ocm_prebnsig=before, pre_map=before.sigmoid())

    def kernel(self, found):
        "SKI."
        from torchvision.ops import deform_conv2d
        offset = self.dnc_att_layer.conv_offset(found['x_map'] * found['attn_map'][:, None])
        return dict(ski_offset=offset, ski_map=deform_conv2d(found['csm_map'], offset, self.dnc_att_layer.deform_conv.weight, padding=1))


def numpy_deform(read, offset, weight):
    "3x3 deformable convolution of one image, one sample after the other: (C,h,w), (18,h,w), (O,C,3,3) -> (O,h,w)."
    (C, h, w), out = read.shape, np.zeros((len(weight), *read.shape[1:]))
    for y in range(h):
        for x in range(w):
            for tap in range(9):
                v, u = y + tap // 3 - 1 + offset[2 * tap, y, x], x + tap % 3 - 1 + offset[2 * tap + 1, y, x]
                top, left = math.floor(v), math.floor(u)
                value = np.zeros(C)
                for a, share_a in ((top, 1 - (v - top)), (top + 1, v - top)):
                    for b, share_b in ((left, 1 - (u - left)), (left + 1, u - left)):
                        if 0 <= a < h and 0 <= b < w: value += share_a * share_b * read[:, a, b]
                out[:, y, x] += weight[:, :, tap // 3, tap % 3] @ value
    return out


# --- losses ----------------------------------------------------------------------------------------------------------

def plain_area(attention, share):
    "(sum over the batch of the lowest values over the number of cells, attention with the rest set to zero); one image after the other."
    kept = []
    for a in attention:
        limit = sorted(a.detach().flatten().tolist())[math.floor(a.numel() * share)]
        kept.append(torch.where(a <= limit, a, torch.zeros_like(a)))
    return sum(k.sum() for k in kept) / attention[0].numel(), torch.stack(kept)


def plain_map(object_map, attention):
    "Every object map against the attention of every image of the batch."
    return torch.stack([(o - a).square().mean() for o in object_map for a in attention]).mean()


def plain_total(terms, scales, weight=0.):
    "Loss / (2 s^2) + ln(1 + s^2) over the scaled ones, in order; the CLIP loss, if any, with its weight."
    names = [k for k in ('loss_x', 'loss_att', 'loss_area', 'loss_map', 'loss_dnc') if k in terms]
    out = sum(terms[k] / (2 * s * s) + (1 + s * s).log() for k, s in zip(names, scales, strict=True))
    return out + weight * terms['loss_clip'] if 'loss_clip' in terms else out


def plain_losses(found, target, area):
    "All losses but CLIP's."
    pooled = {k: found[m].mean((2, 3)) for k, m in dict(loss_x='x_map', loss_att='csm_map', loss_dnc='ski_map').items() if m in found}
    return {k: F.cross_entropy(v, target) for k, v in pooled.items()} | dict(loss_area=plain_area(found['attn_map'], area)[0], loss_map=plain_map(found['pre_map'][:, 0], found['attn_map']))


def plain_object_map(found, target, stretch):
    "Fused map of the true class, (B,1,h,w); gradient through the attention alone."
    maps = torch.stack([a * (t[y] + s[y]).detach() for a, t, s, y in zip(found['attn_map'], found['x_map'], found['csm_map'], target)])[:, None]
    if not stretch: return maps
    low, high = maps.flatten(1).min(1).values.view(-1, 1, 1, 1), maps.flatten(1).max(1).values.view(-1, 1, 1, 1)
    return (maps - low) / (high - low + 1e-15)


def plain_clip_loss(fore, back):
    "Mean of -log(f / (f + b)), both clamped."
    fore, back = fore.clamp(1e-4, .9999), back.clamp(1e-4, .9999)
    return -(fore / (fore + back)).log().mean()


# --- directories of the golden format, of any size -------------------------------------------------------------------

def randomised(module, generator):
    "All parameters at random, of a size that keeps a signal alive; those of norms around 1 and 0."
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1: p.copy_(noise * (.5 if name in ('cls_token', 'pos_embed') else 1.5 / p[0].numel() ** .5))
            else: p.copy_(.1 * noise + (1. if name.endswith('weight') else 0.))
        for p in (p for n, p in module.named_parameters() if n.endswith('params')): p.add_(1.)
    return module


def copied(tensors): return {k: v.detach().clone().contiguous() for k, v in tensors.items()}


def saved(folder, config, **files):
    "The directory."
    folder.mkdir(parents=True, exist_ok=True)
    for stem, tensors in files.items(): save_file(copied(tensors), folder / f'{stem}.safetensors')
    (folder / 'config.json').write_text(json.dumps(config))


def plain_step(model, found, inputs, config):
    "(tensors of the CLIP loss, all losses): the stand-in CLIP, the text of image i is that of class i."
    target, area, wide = inputs['targets'], config['area_quantile'], config['image_size']
    image = F.interpolate(inputs['images_lowres'], size=(wide, wide))
    mask = plain_object_map(found, target, config['variant'] == 'imnet')
    big = F.interpolate(mask, size=(wide, wide), mode='bilinear', align_corners=True)
    encode = lambda x: F.adaptive_avg_pool2d(x, round((len(inputs['clip.image_proj']) / 3) ** .5)).flatten(1) @ inputs['clip.image_proj']
    features = [encode(big * image), encode((1 - big) * image)]
    fore, back = (F.cosine_similarity(f, inputs['clip.text_features'][:len(f)]) for f in features)
    terms = plain_losses(found, target, area) | dict(loss_clip=plain_clip_loss(fore, back))
    scales = model.AutomaticWeightedLoss.params
    sums = dict(awl=plain_total({k: v for k, v in terms.items() if k != 'loss_clip'}, scales), total=plain_total(terms, scales, config['clip_loss_weight']))
    return dict(object_map=mask, object_map_224_stride8=big[..., ::8, ::8], fg_image_features=features[0], bg_image_features=features[1], sim_fg=fore[:, None, None], sim_bg=back[:, None, None],
                attn_map_area_kept=plain_area(found['attn_map'], area)[1]), terms | sums


def plain_adamw(model, lr, decay=.05):
    "Decay on what has more than one axis, but not on token and positions."
    free = lambda n, p: p.ndim < 2 or n in ('cls_token', 'pos_embed')
    return torch.optim.AdamW([dict(params=[p for n, p in model.named_parameters() if free(n, p) == kind], weight_decay=0. if kind else decay) for kind in (False, True)], lr=lr)


def write_model_directory(folder, seed, variant, classes, batch, dim, depth, heads, ratio, patch, side, width, ocm, clip_dim, lr=1e-3, weight=.7, area=.2):
    "A directory like `cub` or `imnet`, computed by the plain forms above."
    g, wide = torch.Generator().manual_seed(seed), patch * side
    config = dict(variant=variant, num_classes=classes, batch=batch, embed_dim=dim, depth=depth, num_heads=heads, mlp_ratio=ratio, patch_size=patch, image_size=wide, c_base=width, ocm_blocks=ocm,
                  clip_dim=clip_dim, lr=lr, clip_loss_weight=weight, area_quantile=area, drop_path=0.)
    model = randomised(PlainCDTR(classes, dim, depth, heads, ratio, patch, side, width, ocm), g)
    n = next(n for n in range(6, 0, -1) if wide % n == 0)
    inputs = dict(images_lowres=torch.randn(batch, 3, wide // 8, wide // 8, generator=g), targets=torch.randint(classes, (batch,), generator=g))
    inputs |= {'clip.image_proj': torch.randn(3 * n * n, clip_dim, generator=g), 'clip.text_features': torch.randn(classes, clip_dim, generator=g)}
    image = F.interpolate(inputs['images_lowres'], size=(wide, wide))
    with torch.no_grad(): model.train()(image)                                           # running statistics that are not 0 and 1
    state = copied({k: v for k, v in model.state_dict().items() if not k.endswith('tracked')})
    with torch.no_grad(): calm = model.eval()(image)
    feats = (calm['x_map'] + calm['csm_map']) / 2
    cams = calm['attn_map'][:, None] * feats * (1 if variant == 'imnet' else 2); logits = calm['x_map'].mean((2, 3)); top = logits.argmax(1)
    taus = torch.tensor([.1, .2, .4, .6]); views = [plain_enlarged(c[t], (wide, wide)) for c, t in zip(cams, top)]
    boxes = torch.tensor([[plain_box(v, t) for t in (.1, .2, .4, .6)] for v in views])
    found = model.train()(image)
    more, losses = plain_step(model, found, inputs, config)
    losses['total'].backward()
    train = {k: v for k, v in found.items() if not k.startswith('tokens_after_block') or int(k[18:]) in (0, depth // 2, depth - 1)} | more | {f'L.{k}': v for k, v in losses.items()}
    train |= dict(x_logits=found['x_map'].mean((2, 3)), attn_logits=found['csm_map'].mean((2, 3)), dnc_logits=found['ski_map'].mean((2, 3)))
    train, grads = copied(train), copied({n: p.grad for n, p in model.named_parameters()})
    plain_adamw(model, lr).step()
    after = {f'param.{n}': p for n, p in model.named_parameters() if p.numel() <= 64 or n == 'att_cls.weight'} | {f'buffer.{n}': b for n, b in model.named_buffers() if not n.endswith('tracked')}
    saved(folder, config, weights=state, inputs=inputs, train=train, grads=grads, after_step=after,
          eval=dict(x_logits=logits, cams=cams, feats=feats, pre_map=calm['pre_map'], top1=top, box_thresholds=taus, boxes=boxes, resized_cam_stride8=torch.from_numpy(np.stack(views))[:, ::8, ::8]))


# --- boxes and protocols ---------------------------------------------------------------------------------------------

def plain_enlarged(map, size, bicubic=False):
    "(h,w) -> (H,W) in [0,1]: stretched, then bilinear; or bicubic in float64, then stretched."
    import cv2
    stretch = lambda m: (m - m.min()) / (m.max() - m.min())
    map = np.asarray(map, np.float64 if bicubic else np.float32)
    return stretch(cv2.resize(map, size[::-1], interpolation=cv2.INTER_CUBIC)) if bicubic else cv2.resize(stretch(map), size[::-1], interpolation=cv2.INTER_LINEAR)


def plain_contours(fine, tau):
    "All contours above a share of the maximum."
    import cv2
    grey = (fine * 255).astype(np.uint8)
    return cv2.findContours((grey > int(tau * grey.max())).astype(np.uint8), cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]


def plain_box(fine, tau):
    "Box of the largest contour, half-open."
    import cv2
    x, y, w, h = cv2.boundingRect(max(plain_contours(fine, tau), key=cv2.contourArea))
    return [float(v) for v in (x, y, x + w, y + h)]


def plain_iou(a, b, one=0.):
    "IoU of two boxes."
    sides = [max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]) + one, 0.) for i in (0, 1)]
    area = lambda r: (r[2] - r[0] + one) * (r[3] - r[1] + one)
    return sides[0] * sides[1] / (area(a) + area(b) - sides[0] * sides[1])


def box_components(g, config):
    "box.*, iou.*, gtbox.*"
    w, h = config['nonsq_wh']; taus = [.05, .2, .4, .6, .8]
    maps = F.interpolate(torch.randn(config['n_maps'], 1, 5, 5, generator=g), size=(12, 15), mode='bicubic')[:, 0] + .05 * torch.randn(config['n_maps'], 12, 15, generator=g)
    found = {'box.maps': maps, 'box.thresholds': torch.tensor(taus)}
    for name, size in {'224': (224, 224), 'nonsq': (h, w)}.items():
        views = [plain_enlarged(m, size) for m in maps]
        found |= {f'box.boxes_{name}': torch.tensor([[plain_box(v, t) for t in taus] for v in views]),
                  f'box.kept_pixels_{name}': torch.tensor([[int((u > int(t * u.max())).sum()) for t in taus] for u in ((v * 255).astype(np.uint8) for v in views)])}
    found['box.resized_nonsq_1'] = torch.from_numpy(plain_enlarged(maps[1], (h, w)))
    a, b = (torch.cat([p := 50 * torch.rand(9, 2, generator=g), p + 1 + 60 * torch.rand(9, 2, generator=g)], 1) for _ in range(2))
    found |= {'iou.a': a, 'iou.b': b, 'iou.cdtr': torch.tensor([plain_iou(p, q) for p, q in zip(a.tolist(), b.tolist())]),
              'iou.wsol_matrix_first6_clipped_at_0': torch.tensor([[plain_iou(p, q, 1.) for q in b[:6].int().tolist()] for p in a[:6].int().tolist()], dtype=torch.float64)}
    raw, truth = [], []
    for wide, high in config['img_sizes']:
        x, y, bw, bh = (torch.rand(4, generator=g) * torch.tensor([wide / 2, high / 2, wide / 2, high / 2])).tolist()
        scale = 256 / min(wide, high); raw.append([wide, high, x, y, bw, bh])
        shift = [round((n * scale - 224 + 1) / 2) for n in (wide, high)] * 2
        truth.append([min(max(v * scale - s, 0.), 224.) for v, s in zip((x, y, x + bw, y + bh), shift)])
    return found | {'gtbox.wh_xywh': torch.tensor(raw), 'gtbox.xyxy': torch.tensor(truth, dtype=torch.float64)}


def protocol_components(g, maps, n, classes):
    "eval.*, maxbox.*, pxap.*"
    cams = F.interpolate(torch.randn(n, classes, 4, 4, generator=g), size=(11, 13), mode='bicubic')
    logits, target, truth, taus = torch.randn(n, classes, generator=g), torch.randint(classes, (n,), generator=g), [], (.1, .3)
    logits[::2].scatter_(1, target[::2, None], 9.); rows = []
    for c, l in zip(cams, logits): truth.append([v + d for v, d in zip(plain_box(plain_enlarged(c[l.argmax()], (224, 224)), .2), (4., 3., -5., -2.))])
    for tau in taus:
        iou = [plain_iou(plain_box(plain_enlarged(c[l.argmax()], (224, 224)), tau), t) >= .5 for c, l, t in zip(cams, logits, truth)]
        first, five = [int(l.argmax()) == t for l, t in zip(logits, target.tolist())], [t in l.topk(5).indices.tolist() for l, t in zip(logits, target.tolist())]
        rows.append([tau, sum(map(min, iou, first)) / n, sum(map(min, iou, five)) / n, sum(iou) / n, 100 * sum(first) / n, 100 * sum(five) / n])
    views, steps = [plain_enlarged(m, (224, 224), True) for m in maps], np.arange(0, 1, .01)
    gt = [[i, *(int(v) for v in plain_box(v, .3)[:2]), *(int(v) - 1 for v in plain_box(v, .3)[2:])] for i, v in enumerate(views)] + [[0, 5, 5, 90, 70]]
    found = {'eval.cams': cams, 'eval.logits': logits, 'eval.targets': target, 'eval.gt_xyxy': torch.tensor(truth, dtype=torch.float64), 'eval.metrics_thr_top1loc_top5loc_gtloc_acc1_acc5': torch.tensor(rows, dtype=torch.float64)}
    found |= {'maxbox.gt': torch.tensor(gt), 'maxbox.raw_maps_index': torch.arange(len(maps)), 'maxbox.scoremap0_stride8': torch.from_numpy(views[0])[::8, ::8]}
    return found | box_accuracies(views, gt, steps) | pixel_precision(views[:3], gt, steps)


def box_accuracies(views, gt, steps):
    "maxbox.single.*, maxbox.multi.*"
    import cv2
    best = {'single': np.zeros((len(views), len(steps))), 'multi': np.zeros((len(views), len(steps)))}
    for i, v in enumerate(views):
        for t, tau in enumerate(steps):
            rect = lambda c: [min(p, 223) for p in (lambda x, y, w, h: (x, y, x + w, y + h))(*cv2.boundingRect(c))]
            found = plain_contours(v, tau); score = lambda c: max(plain_iou(rect(c), r[1:], 1.) for r in gt if r[0] == i)
            best['single'][i, t], best['multi'][i, t] = score(max(found, key=cv2.contourArea)), max(map(score, found))
    return {f'maxbox.{k}.acc_30_50_70': torch.tensor([100 * (v >= d).mean(0).max() for d in (.3, .5, .7)]) for k, v in best.items()} | {
        f'maxbox.{k}.correct_iou50_per_threshold': torch.from_numpy((v >= .5).sum(0).astype(float)) for k, v in best.items()}


def pixel_precision(views, gt, steps):
    "pxap.*: from the highest bin down, precision times the recall that is gained."
    pos = neg = 0; edges = np.append(steps, [1., 2.])
    for i, v in enumerate(views):
        x0, y0, x1, y1 = gt[i][1:]; mask = np.zeros((224, 224), int); mask[:10] = 255; mask[y0:y1 + 1, x0:x1 + 1] = 1
        pos, neg = pos + np.histogram(v[mask == 1], edges)[0], neg + np.histogram(v[mask == 0], edges)[0]
    value = recall = hits = called = 0.
    for p, q in zip(pos[::-1], neg[::-1]):
        hits += p; called += p + q
        if called: value += hits / called * (hits / pos.sum() - recall); recall = hits / pos.sum()
    return {'pxap.mask_boxes': torch.tensor([r[1:] for r in gt[:len(views)]]), 'pxap.value': torch.tensor(100 * value, dtype=torch.float64)}


# --- components ------------------------------------------------------------------------------------------------------

def stimulation_components(g, config):
    "csm.*"
    C, width, (h, w) = config['C'], config['c_base'], config['csm_hw']
    net = randomised(PlainCDTR(C, 8, config['depth'], config['heads'], 1, 8, 2, width, 1), g); x = torch.rand(config['B'], config['depth'] * config['heads'], h, w, generator=g)
    with torch.no_grad():
        net.train().stimulation(x); before = copied(net.att_layer.state_dict())
        calm, loud = net.eval().stimulation(x)['csm_up'], net.train().stimulation(x)['csm_up']
    own = lambda front, state, keep: {f'csm.{front}.{k}': v for k, v in state.items() if keep(k)}
    return own('weight', before, lambda k: not k.endswith('tracked')) | own('after', net.att_layer.state_dict(), lambda k: 'running' in k) | {'csm.in': x, 'csm.out_eval': calm, 'csm.out_train': loud}


def kernel_components(g, config):
    "ski.*, sampled one by one."
    C, B, (h, w) = config['C'], config['B'], config['ski_hw']
    draw = lambda *shape: torch.randn(*shape, generator=g)
    conv = nn.Conv2d(C, 18, 3, 1, 1); weight, a, t, c = draw(C, C, 3, 3), draw(B, 1, h, w).abs(), draw(B, C, h, w), draw(B, C, h, w)
    with torch.no_grad(): conv.weight.copy_(draw(18, C, 3, 3)); offset = conv(t * a)
    out = torch.from_numpy(np.stack([numpy_deform(*(x.double().numpy() for x in (c[b], offset[b], weight))) for b in range(B)])).float()
    return {'ski.weight.conv_offset.weight': conv.weight, 'ski.weight.conv_offset.bias': conv.bias, 'ski.weight.deform_conv.weight': weight,
            'ski.x_map': t, 'ski.csm_map': c, 'ski.cls_attn': a, 'ski.offset': offset, 'ski.map': out, 'ski.logits': out.mean((2, 3))}


def loss_components(g, variant, area, classes):
    "loss_VARIANT.*, on maps with many equal values."
    n, (h, w) = 4, (9, 12)
    attention = ((torch.rand(n, h, w, generator=g) * 12).round() / 6).requires_grad_(); object_map = torch.rand(n, 1, h, w, generator=g).requires_grad_()
    logits, target, scales = {k: torch.randn(n, classes, generator=g) for k in ('x_logits', 'attn_logits', 'dnc_logits')}, torch.randint(classes, (n,), generator=g), (1 + .3 * torch.randn(5, generator=g)).requires_grad_()
    terms = {f'loss_{k}': F.cross_entropy(logits[m], target) for k, m in dict(x='x_logits', att='attn_logits', dnc='dnc_logits').items()}
    terms |= dict(loss_area=plain_area(attention, area)[0], loss_map=plain_map(object_map[:, 0], attention))
    total = plain_total(terms, scales); total.backward()
    found = logits | dict(targets=target, attn_map=attention, pre_map=object_map, awl_params=scales) | {f'out.{k}': v for k, v in terms.items()} | {
        'out.total': total, 'grad.attn_map': attention.grad, 'grad.pre_map': object_map.grad, 'grad.awl_params': scales.grad}
    return {f'loss_{variant}.{k}': v for k, v in found.items()}


def timm_rates(epochs, lr):
    "Rate of each epoch by timm's scheduler, stepped before training with 0 and after each epoch with its own number."
    from timm.scheduler import CosineLRScheduler
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    schedule, found = CosineLRScheduler(optimizer, t_initial=epochs, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-6), []
    schedule.step(0)
    for epoch in range(epochs): found.append(optimizer.param_groups[0]['lr']); schedule.step(epoch)
    return torch.tensor(found, dtype=torch.float64)


def plain_draws(images, epoch, processes, rank):
    "Three draws of each image in a row, dealt out to the processes one by one; a multiple of 256 is kept."
    order = [i for i in torch.randperm(images, generator=torch.Generator().manual_seed(epoch)).tolist() for _ in range(3)]
    while len(order) % processes: order.append(order[len(order) - 3 * images])
    return torch.tensor(order[rank::processes][:images // 256 * 256 // processes])


def write_component_directory(folder, seed, **config):
    "A directory like `components`: C, B, c_base, csm_hw, depth, heads, ski_hw, n_maps, nonsq_wh, img_sizes, n_train, n_eval."
    g = torch.Generator().manual_seed(seed); fore, back = torch.randn(2, 7, 1, 1, generator=g).mul(.4).clamp(-1, 1)
    maps = torch.randn(3, 6, 10, generator=g); maps[2] *= 1e-3
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    found = stimulation_components(g, config) | kernel_components(g, config) | loss_components(g, 'cub', .25, config['C']) | loss_components(g, 'imnet', .1, config['C']) | box_components(g, config)
    found |= protocol_components(g, found['box.maps'], config['n_eval'], 6)
    found |= {'clip.sim_fg': fore, 'clip.sim_bg': back, 'clip.loss': plain_clip_loss(fore, back), 'norm.in': maps, 'norm.out': (maps - low) / (high - low)}
    found |= {f'sampler.R{p}.rank{r}.epoch{e}': plain_draws(config['n_train'], e, p, r) for p, r, e in ((1, 0, 2), (3, 2, 1), (5, 0, 0))}
    found |= {'lr.official_cub': timm_rates(30, 5e-5), 'lr.official_imnet': timm_rates(9, 2.5e-4), 'lr.seed_run': timm_rates(12, 3.125e-6)}
    saved(folder, config, components=found)
