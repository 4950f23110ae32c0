"""CLIP Surgery and the localisation head in plain tensor code that shares nothing with the library: another directory of golden vectors, of any size.

Weights are a dictionary by open_clip's names; attention, streams, maps, points, decoding, matching and scores are written from the specification, with loops where that is plainer.
"""
import json
import math

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from bench_surgery_plain import attended, materialised

GROUPS = ('oracle', 'local', 'centre', 'top1')


def block_weights(front, D, random):
    "Names and numbers of one block."
    shapes = {'attn.in_proj_weight': (3 * D, D), 'attn.in_proj_bias': (3 * D,), 'attn.out_proj.weight': (D, D), 'attn.out_proj.bias': (D,), 'mlp.c_fc.weight': (4 * D, D), 'mlp.c_fc.bias': (4 * D,), 'mlp.c_proj.weight': (D, 4 * D), 'mlp.c_proj.bias': (D,)}
    found = {f'{front}.{k}': random(*s) * (s[-1] ** -.5 if len(s) > 1 else .1) for k, s in shapes.items()}
    return found | {f'{front}.{ln}.{k}': random(D) * .1 + (k == 'weight') for ln in ('ln_1', 'ln_2') for k in ('weight', 'bias')}


def weights_of(c, random):
    "A CLIP of these sizes."
    D, T, E, n = c['width'], c['text_width'], c['embed_dim'], c['image_size'] // c['patch']
    w = {'visual.conv1.weight': random(D, 3, c['patch'], c['patch']) * .1, 'visual.class_embedding': random(D), 'visual.positional_embedding': random(1 + n * n, D) * .5, 'visual.proj': random(D, E) * D ** -.5, 'token_embedding.weight': random(c['vocab'], T), 'positional_embedding': random(c['ctx'], T) * .1, 'text_projection': random(T, E) * T ** -.5, 'logit_scale': torch.tensor(2.6)}
    for i in range(c['layers']): w |= block_weights(f'visual.transformer.resblocks.{i}', D, random)
    for i in range(c['text_layers']): w |= block_weights(f'transformer.resblocks.{i}', T, random)
    for name, size in (('visual.ln_pre', D), ('visual.ln_post', D), ('ln_final', T)): w |= {f'{name}.weight': random(size) * .1 + 1, f'{name}.bias': random(size) * .1}
    return w


def norm(w, name, x): return F.layer_norm(x, x.shape[-1:], w[f'{name}.weight'], w[f'{name}.bias'])


def parts(w, name, y, heads):
    "Queries, keys, values, each (B,heads,N,d)."
    return F.linear(y, w[f'{name}.attn.in_proj_weight'], w[f'{name}.attn.in_proj_bias']).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def out(w, name, mixed): return F.linear(mixed.transpose(1, 2).flatten(2), w[f'{name}.attn.out_proj.weight'], w[f'{name}.attn.out_proj.bias'])


def mlp(w, name, x, quick):
    "The MLP with its norm and residual."
    y = F.linear(norm(w, f'{name}.ln_2', x), w[f'{name}.mlp.c_fc.weight'], w[f'{name}.mlp.c_fc.bias']); y = y * (1.702 * y).sigmoid() if quick else F.gelu(y)
    return x + F.linear(y, w[f'{name}.mlp.c_proj.weight'], w[f'{name}.mlp.c_proj.bias'])


def positions(w, c, grid):
    "The table moved to a grid, bilinear."
    table, n = w['visual.positional_embedding'], c['image_size'] // c['patch']
    return table if grid == (n, n) else torch.cat([table[:1], F.interpolate(table[1:].T.reshape(1, -1, n, n), grid, mode='bilinear', align_corners=False)[0].flatten(1).T])


def streams(w, c, images, surgery, quick=True, identity=False):
    "Name -> tensor of every block; tokens in the joint space; LN1 and both attentions of the first surgery block."
    grid = tuple(s // c['patch'] for s in images.shape[2:]); x = F.conv2d(images, w['visual.conv1.weight'], stride=c['patch']).flatten(2).transpose(1, 2); seen, new, L = {}, None, c['layers']
    x = norm(w, 'visual.ln_pre', torch.cat([w['visual.class_embedding'].expand(len(x), 1, -1), x], 1) + positions(w, c, grid))
    for i in range(L):
        name = f'visual.transformer.resblocks.{i}'; y = norm(w, f'{name}.ln_1', x); q, k, v = parts(w, name, y, c['heads']); plain = out(w, name, attended(q, k, v))
        if i >= L - surgery:
            read = out(w, name, v if identity else attended(v, v, v)); new = (x if new is None else new) + read
            if i == L - surgery: seen |= {'dual0.ln1': y, 'dual0.attn_new': read, 'dual0.attn_ori': plain}
        x = mlp(w, name, x + plain, quick); seen |= {f'block{i}.out': x} if i < L - surgery else {f'block{i}.new': new, f'block{i}.ori': x}
    return seen, norm(w, 'visual.ln_post', x if new is None else torch.cat([x[:, :1], new[:, 1:]], 1)) @ w['visual.proj'], grid


def text_vectors(w, c, ids):
    "encode_text of each prompt: causal blocks, read at the largest id."
    flat = ids.flatten(0, 1); x = w['token_embedding.weight'][flat] + w['positional_embedding']; mask = torch.full((c['ctx'],) * 2, float('-inf')).triu(1)
    for i in range(c['text_layers']):
        name = f'transformer.resblocks.{i}'; q, k, v = parts(w, name, norm(w, f'{name}.ln_1', x), c['text_heads']); x = mlp(w, name, x + out(w, name, (q @ k.transpose(-2, -1) * q.shape[-1] ** -.5 + mask).softmax(-1) @ v), True)
    return (norm(w, 'ln_final', x)[range(len(flat)), flat.argmax(1)] @ w['text_projection']).view(*ids.shape[:2], -1)


def shown(scores, grid, size):
    "Stretched on the tokens, laid out, enlarged: (B,K,H,W)."
    low, high = scores[:, 1:].amin(1, keepdim=True), scores[:, 1:].amax(1, keepdim=True)
    return F.interpolate(((scores[:, 1:] - low) / (high - low)).transpose(1, 2).unflatten(-1, grid), tuple(size), mode='bilinear', align_corners=False)


def points_of(map_, size, least, down):
    "Cells of a coarser map at or above a share of its range, the best last; as many of the lowest."
    coarse = F.interpolate(map_[None, None], tuple(n // down for n in map_.shape), mode='bilinear', align_corners=False)[0, 0]; h, w = coarse.shape; flat = ((coarse - coarse.min()) / (coarse.max() - coarse.min())).flatten().tolist()
    n, order = min(sum(v >= least for v in flat), h * w // 2), sorted(range(h * w), key=flat.__getitem__)
    at = lambda cell: [int(min((cell % w + .5) * size[1] / w, size[1] - 1)), int(min((cell // w + .5) * size[0] / h, size[0] - 1))]
    return torch.tensor([at(cell) for cell in [*order[-n:], *order[:n]]]), torch.tensor([1] * n + [0] * n)


@torch.no_grad()
def map_vectors(w, c, random):
    "Everything that `io` of the stored vectors holds, but for the table that was written back."
    p, S = c['patch'], c['image_size']; io = dict(image=random(c['batch'], 3, S, S), image_hi=random(1, 3, S + 2 * p, S + 2 * p), image_ns=random(2, 3, S + p, S - p), text_tokens=torch.randint(1, c['vocab'] - 1, (c['classes'] + 1, c['prompts'], c['ctx']), generator=torch.Generator().manual_seed(c['seed'])))
    io['text_tokens'][..., -1] = c['vocab'] - 1; raw = io['text_features_raw'] = text_vectors(w, c, io['text_tokens']); mean = F.normalize(F.normalize(raw, dim=-1).mean(1), dim=-1); T, red = io['text_features'], io['redundant_features'] = mean[:-1].clone(), mean[-1:].clone()
    seen, tokens, grid = streams(w, c, io['image'], c['surgery_blocks']); io |= seen | dict(surgery_tokens=tokens, surgery_tokens_norm=F.normalize(tokens, dim=-1), plain_tokens=streams(w, c, io['image'], 0)[1], maskclip_tokens=streams(w, c, io['image'], 1, identity=True)[1], pos_before=w['visual.positional_embedding'])
    cos = F.normalize(tokens, dim=-1) @ T.T; prob = (c['fs_temperature'] * cos[:, :1]).softmax(-1); fs = materialised(tokens, T, c['fs_temperature']); offset = lambda t: F.normalize(tokens, dim=-1) @ (t - red).T
    io |= dict(similarity_raw=cos, fs_prob=prob, fs_weight=prob / prob.mean(-1, keepdim=True), similarity_surgery=fs, similarity_surgery_single=offset(T[:1]), similarity_surgery_multi_red=offset(T))
    io |= {f'map_{k}': shown(s, grid, c['out_hw']).permute(0, 2, 3, 1).contiguous() for k, s in dict(plain=F.normalize(io['plain_tokens'], dim=-1) @ T.T, raw=cos, surgery=fs).items()}
    for k in range(c['classes']): io[f'points.{k}'], io[f'point_labels.{k}'] = points_of(fs[0, 1:, k].view(grid), c['out_hw'], c['point_t'], c['down'])
    _, io['hi.surgery_tokens'], high = streams(w, c, io['image_hi'], c['surgery_blocks']); io['hi.pos_after'] = positions(w, c, high); _, wide, ns = streams(w, c, io['image_ns'], c['surgery_blocks'])
    io |= {'ns.surgery_tokens': wide, 'ns.similarity_surgery': materialised(wide, T, c['fs_temperature'])}; io['ns.map_surgery'] = shown(io['ns.similarity_surgery'], ns, c['out_hw'])
    for name, form in dict(cam=lambda x: F.normalize(norm(w, 'visual.ln_post', x) @ w['visual.proj'], dim=-1), seedcam=lambda x: F.normalize(x, dim=-1) @ w['visual.proj']).items():
        for l in c['cam_layers']: io[f'{name}_layer{l}'] = (form(seen[f'block{l}.new'])[:, 1:] @ T.T).transpose(1, 2).unflatten(-1, grid)
        io[f'{name}_mean'] = torch.stack([io[f'{name}_layer{l}'] for l in c['cam_layers']]).mean(0); io[f'{name}_fused'] = F.interpolate(io[f'{name}_mean'], (c['cam_res'],) * 2, mode='bilinear', align_corners=False)
    io |= {'open_clip.image_embed': tokens[:, 0].clone(), 'open_clip.image_embed_gelu': streams(w, c, io['image'], 0, quick=False)[1][:, 0].clone()}
    return io


# --- the head --------------------------------------------------------------------------------------------------------

def overlap(p, q, pad=0., hull=False):
    "IoU or GIoU of two boxes as tensors, areas from sides that are never negative."
    side = lambda low, high: (high - low).clamp(min=0); area = lambda b: side(b[0], b[2]) * side(b[1], b[3]); both = side(torch.max(p[0], q[0]), torch.min(p[2], q[2])) * side(torch.max(p[1], q[1]), torch.min(p[3], q[3]))
    union = area(p) + area(q) - both; around = side(torch.min(p[0], q[0]), torch.max(p[2], q[2])) * side(torch.min(p[1], q[1]), torch.max(p[3], q[3]))
    return both / (union + pad).clamp(min=1e-9) - ((around - union) / (around + pad).clamp(min=1e-9) if hull else 0)


def scores_of(pred, cam, boxes, labels):
    "Rows of `eval_rows` and `eval_top1`, by loops; and the shares."
    cut, (Gh, Gw), rows, top = pred.clamp(0, 1), pred.shape[2:4], [], []
    for b, (own, kinds) in enumerate(zip(boxes, labels)):
        for m, (g, c) in enumerate(zip(own, kinds.tolist())):
            i, j = min(int((g[1] + g[3]) / 2 * Gh), Gh - 1), min(int((g[0] + g[2]) / 2 * Gw), Gw - 1); iou = [[float(overlap(cut[b, c, y, x], g)) for x in range(Gw)] for y in range(Gh)]
            rows.append([b, m, c, max(map(max, iou)), max(iou[y][x] for y in range(max(0, i - 1), min(Gh, i + 2)) for x in range(max(0, j - 1), min(Gw, j + 2))), iou[i][j]])
        for c in sorted(set(kinds.tolist())):
            y, x = divmod(int(cam[b, c].flatten().argmax()), Gw); top.append([b, c, max(float(overlap(cut[b, c, y, x], g)) for g, k in zip(own, kinds.tolist()) if k == c)])
    return torch.tensor(rows), torch.tensor(top)


def shares(rows, top, macro):
    "Accuracies at three levels, over all or as the mean of classes."
    found = {}
    for k, name in enumerate(GROUPS):
        value, kind = (top[:, 2], top[:, 1]) if name == 'top1' else (rows[:, 3 + k], rows[:, 2])
        for cut in (.3, .5, .7):
            hit = (value >= cut).float(); found[f'{"macro" if macro else "acc"}_{name}_{cut}'] = torch.stack([hit[kind == c].mean() for c in kind.unique()]).mean() if macro else hit.mean()
    return found


def chain(w, name, x, count):
    "Convolution, norm of 32 groups, ReLU, `count` times."
    for k in range(count):
        kernel = w[f'{name}.{3 * k}.weight']; x = F.conv2d(x, kernel, w[f'{name}.{3 * k}.bias'], padding=kernel.shape[-1] // 2); x = F.group_norm(x, 32, w[f'{name}.{3 * k + 1}.weight'], w[f'{name}.{3 * k + 1}.bias']).relu()
    return x


def earlier_vectors(c, random, boxes, labels):
    "The earlier head behind its image encoder, and its losses on its own boxes and on boxes near the truth."
    B, C, G, H, D = c['batch'], c['classes'], c['cell_grid'], 32, c['width']; shapes = dict(img_proj=[(H, 16, 1)], cam_proj=[(H, C, 1)], multi_layer_proj=[(2 * H, 3 * D, 1), (H, 2 * H, 1)], fusion_conv=[(2 * H, 3 * H, 3), (H, 2 * H, 3)])
    w = {f'{n}.{3 * k}.weight': random(o, i, r, r) * (i * r * r) ** -.5 for n, rows in shapes.items() for k, (o, i, r) in enumerate(rows)} | {f'{n}.{3 * k}.bias': random(o) * .1 for n, rows in shapes.items() for k, (o, _, _) in enumerate(rows)}
    w |= {f'{n}.{3 * k + 1}.{kind}': random(o) * .1 + (kind == 'weight') for n, rows in shapes.items() for k, (o, _, _) in enumerate(rows) for kind in ('weight', 'bias')} | {'box_head.weight': random(4 * C, H, 1, 1) * .3, 'box_head.bias': random(4 * C) * .1}
    features, cam, multi = random(B, 16, G, G), random(B, C, G, G), [random(B, 9, D) for _ in range(3)]; tokens = F.interpolate(torch.cat(multi, -1).transpose(1, 2).unflatten(-1, (3, 3)), (G, G), mode='bilinear', align_corners=False)
    mixed = chain(w, 'fusion_conv', torch.cat([chain(w, 'img_proj', features, 1), chain(w, 'cam_proj', cam, 1), chain(w, 'multi_layer_proj', tokens, 2)], 1), 2); raw = F.conv2d(mixed, w['box_head.weight'], w['box_head.bias']).view(B, C, 4, G, G).permute(0, 1, 3, 4, 2)
    line = torch.linspace(0, 1, G); at = torch.stack(torch.meshgrid(line, line, indexing='xy'), -1); centre, half = (at + .5 * raw[..., :2].tanh()).clamp(0, 1), raw[..., 2:].sigmoid().clamp(.01, 1) / 2; own = torch.cat([centre - half, centre + half], -1).clamp(0, 1)
    near = torch.stack([torch.stack([(boxes[b][labels[b] == k][0] if (labels[b] == k).any() else torch.tensor([.2, .2, .5, .5])) + .02 * random(G, G, 4) for k in range(C)]) for b in range(B)])
    found = {'seed.img_features': features, 'seed.fused_cam': cam, 'seed.boxes': own, 'seed2.boxes': near} | {f'seed.multi.{i}': m for i, m in enumerate(multi)} | {f'seedhead.{k}': v for k, v in w.items()}
    for name, given in (('seed', own), ('seed2', near)):
        pred, l1, giou = given.clone().requires_grad_(), [], []
        for b in range(B):
            for g, k in zip(boxes[b], labels[b].tolist()):
                cells = [(y, x) for y in range(G) for x in range(G)]; value = lambda cell: overlap(pred[b, k, cell[0], cell[1]].detach(), g, 0., True); top = max(cells, key=lambda cell: float(value(cell)))
                if float(value(top)) < .3: continue
                for y, x in cells:
                    if int(top[0] - 1.5) <= y <= int(top[0] + 1.5) and int(top[1] - 1.5) <= x <= int(top[1] + 1.5): l1.append((pred[b, k, y, x] - g).abs().mean()); giou.append(1 - overlap(pred[b, k, y, x], g, 1e-6, True))
        mean = [torch.stack(v).mean() if v else pred.sum() * 0 for v in (l1, giou)]; loss = mean[0] + 2 * mean[1]; loss.backward(); found |= {f'{name}.num_pos': torch.tensor(len(l1)), f'{name}.loss_l1': mean[0].detach(), f'{name}.loss_giou': mean[1].detach(), f'{name}.loss_total': loss.detach()} | ({'seed2.grad_boxes': pred.grad} if name == 'seed2' else {})
    return found


def head_vectors(c, random):
    "Everything that `head` of the stored vectors holds."
    B, C, Gh, Gw = c['batch'], c['classes'], *c['grid_hw']; unit = lambda *s: random(*s).sigmoid(); boxes = [torch.cat([a := unit(c['objects'], 2) * .7, a + .05 + .25 * unit(c['objects'], 2)], 1) for _ in range(B)]; labels = [torch.arange(c['objects']) * 3 % C for _ in range(B)]
    p, q = (torch.cat([a := unit(9, 2) * .6, a + .3 * unit(9, 2)], 1) for _ in range(2)); raw, prior = random(B, C, Gh, Gw, 4).requires_grad_(), .05 + .2 * unit(C, 2)
    head = {'pair.p': p, 'pair.q': q, 'pair.iou': torch.stack([overlap(a, b) for a, b in zip(p, q)]), 'pair.giou': torch.stack([overlap(a, b, 0., True) for a, b in zip(p, q)]), 'pair.seed_giou': torch.stack([overlap(a, b, 1e-6, True) for a, b in zip(p, q)])} | {f'gt_boxes.{b}': x for b, x in enumerate(boxes)} | {f'gt_labels.{b}': x for b, x in enumerate(labels)}
    at = torch.stack(torch.meshgrid((torch.arange(Gw) + .5) / Gw, (torch.arange(Gh) + .5) / Gh, indexing='xy'), -1); centre = at + 2 / torch.tensor([Gw, Gh]) * raw[..., :2].tanh(); half = prior.view(1, C, 1, 1, 2) * (4 * (raw[..., 2:] / 4).tanh()).exp() / 2; pred = torch.cat([centre - half, centre + half], -1)
    owner, best = {}, []
    for b in range(B):
        area = [float((g[2] - g[0]) * (g[3] - g[1])) for g in boxes[b]]
        for m in sorted(range(c['objects']), key=lambda m: (area[m], m)):
            g, k = boxes[b][m], int(labels[b][m]); i, j = min(int((g[1] + g[3]) / 2 * Gh), Gh - 1), min(int((g[0] + g[2]) / 2 * Gw), Gw - 1); near = [(y, x) for y in range(max(0, i - 1), min(Gh, i + 2)) for x in range(max(0, j - 1), min(Gw, j + 2))]
            iou = {cell: float(overlap(pred[b, k, cell[0], cell[1]].detach(), g)) for cell in near}; top = max(near, key=lambda cell: iou[cell]); best.append([b, m, *top, iou[top]])
            for cell in near: owner.setdefault((b, k, *cell), m)
    pos = sorted((b, m, y, x) for (b, k, y, x), m in owner.items()); terms = dict(l1={}, giou_loss={})
    for b, m, y, x in pos:
        mine, g = pred[b, labels[b][m], y, x], boxes[b][m]; terms['l1'].setdefault((b, m), []).append((mine - g).abs().mean()); terms['giou_loss'].setdefault((b, m), []).append(1 - overlap(mine, g, 0., True))
    mean = {k: torch.stack([torch.stack(v).mean() for v in of.values()]).mean() for k, of in terms.items()}; loss = mean['l1'] + 2 * mean['giou_loss']; loss.backward(); cam = random(B, C, Gh, Gw)
    near = (torch.cat([torch.stack([boxes[b][labels[b] == k].mean(0) if (labels[b] == k).any() else torch.zeros(4) for k in range(C)]).view(1, C, 1, 1, 4) for b in range(B)]) + .05 * random(B, C, Gh, Gw, 4)).detach()
    head |= {'v2.raw': raw.detach(), 'v2.prior': prior, 'v2.pred_boxes': pred.detach(), 'v2.pos': torch.tensor(pos), 'v2.best': torch.tensor(sorted(best)), 'v2.num_pos': torch.tensor(len(pos)), 'v2.num_unassigned': torch.tensor(B * c['objects'] - len({r[:2] for r in pos})), 'v2.loss': loss.detach(), 'v2.grad_raw': raw.grad} | {f'v2.{k}': v.detach() for k, v in mean.items()}
    for name, boxes_, macro in (('v2', pred.detach(), False), ('v2e', near, True)):
        rows, top = scores_of(boxes_, cam, boxes, labels); head |= {f'{name}.cam': cam, f'{name}.pred_boxes': boxes_, f'{name}.eval_rows': rows, f'{name}.eval_top1': top} | {f'{name}.{k}': v for m in {False, macro} for k, v in shares(rows, top, m).items()}
    return head | earlier_vectors(c, random, boxes, labels)


def write_directory(folder, seed, **sizes):
    "A directory as the golden one is, in other sizes; sizes not named are those of a small tower."
    c = dict(embed_dim=20, image_size=32, patch=8, width=24, layers=5, heads=3, ctx=8, vocab=40, text_width=16, text_heads=2, text_layers=1, classes=3, prompts=2, batch=2, out_hw=[21, 34], cam_res=5, point_t=.7, down=2, seed=seed, activation='QuickGELU', surgery_blocks=3, fs_temperature=2, grid_hw=[5, 8], objects=4, cell_grid=5) | sizes
    c['cam_layers'] = list(range(c['layers'] - 2, c['layers'])); generator = torch.Generator().manual_seed(seed); random = lambda *s: torch.randn(*s, generator=generator); folder.mkdir(parents=True)
    w = weights_of(c, random); files = dict(weights=w, io=map_vectors(w, c, random), head=head_vectors(c, random))
    for name, tensors in files.items(): save_file({k: v.detach().clone().contiguous() for k, v in tensors.items()}, folder/f'{name}.safetensors')
    (folder/'config.json').write_text(json.dumps(c)); assert math.prod(c['out_hw']) > 0
    return folder
