"""MoRe's training step straight from its equations: the form that `bench_more` times the library against.

Attention materialised with the unscaled copy, image and mirror at every scale, one PAR call a stack and image, loops over
images and classes, every term computed and multiplied by its weight. It shares parameters with the library's model.
"""
import math

import torch
import torch.nn.functional as F

from wsl_nb import crf, more
from wsl_nb.core import denormalise, torch_rng
from wsl_nb.more_base import balanced_cross_entropy, energy_loss, weights

TERMS = ('cls', 'aux', 'mct', 'ptc', 'cre', 'ure', 'seg', 'reg')


def plain_attention_block(block, x):
    "(B,N,D) -> (B,N,D) and the query-key products before scaling (B,K,N,N), which no loss reads."
    attn, (B, N, D) = block.attn, x.shape
    q, k, v = attn.qkv(block.norm1(x)).reshape(B, N, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    scores = q @ k.transpose(-2, -1) * attn.scale
    unscaled = scores / attn.scale
    x = x + attn.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(B, N, D))
    return x + block.mlp(block.norm2(x)), unscaled


def plain_features(model, image):
    "Final and auxiliary patches (B,D,h,w), class tokens (B,C,D)."
    encoder, keep = model.encoder, model.cfg.aux_block % len(model.encoder.blocks)
    x, grid = encoder.tokens_in(image)
    for i, block in enumerate(encoder.blocks):
        x, unscaled = plain_attention_block(block, x)
        if i == keep: aux = x[:, encoder.front:]
    x = encoder.norm(x)
    unscaled.sum(1)[:, model.cfg.registers:encoder.front, encoder.front:].detach()       # the score maps that nothing uses
    on_grid = lambda t: t.transpose(1, 2).unflatten(2, grid)
    return on_grid(x[:, encoder.front:]), on_grid(aux), x[:, model.cfg.registers:encoder.front]


def plain_forward(model, image):
    "Training forward, decoder always on."
    features, aux, tokens = plain_features(model, image)
    logits = lambda head, x: head(F.adaptive_max_pool2d(x, 1)).flatten(1)
    return more.Outputs(logits(model.classifier, features), logits(model.aux_classifier, aux), features, aux, tokens,
                        model.graph(tokens, features), model.decoder(features))


@torch.no_grad()
def plain_multi_scale(model, image, scales):
    "Final and auxiliary CAM in [0,1), (B,C,H,W): image and mirror at every scale, the first included."
    size, sums = image.shape[-2:], [0., 0.]
    for scale in scales:
        x = F.interpolate(image, size=[int(scale * n) for n in size], mode='bilinear', align_corners=False)
        features, aux, _ = plain_features(model, torch.cat([x, x.flip(-1)]))
        for i, (f, head) in enumerate(((features, model.classifier), (aux, model.aux_classifier))):
            cam = F.interpolate(head(f), size=size, mode='bilinear', align_corners=False)
            straight, mirrored = cam.chunk(2)
            sums[i] = sums[i] + torch.maximum(straight, mirrored.flip(-1)).relu()
    out = []
    for m in sums:
        m = m - m.amin((-2, -1), keepdim=True)
        out.append(m / (m.amax((-2, -1), keepdim=True) + 1e-5))
    return out


def plain_patch_labels(cam, cam_aux, label, grid, step, cfg):
    "Label maps of CRE, URE and PTC at the patch grid; each source is resized for each map."
    def threshold(source, low, high):
        value, index = (F.interpolate(source, size=grid, mode='bilinear', align_corners=False) * label[:, :, None, None]).max(1)
        out = index + 1
        out[value <= high] = 255
        out[value <= low] = 0
        return out.to(torch.uint8)
    late = step > cfg.switch
    return dict(cre=threshold(cam if late else cam_aux, *(cfg.late if late else cfg.cre_early)),
                ure=threshold(cam if late else cam_aux, *(cfg.late if late else cfg.ure_early)), affinity=threshold(cam_aux, *cfg.affinity))


def par_sliced(image, masks, iterations=10, dilations=(1, 2, 4, 8, 12, 24), w1=.3, w2=.01):
    "PAR of one stack: (B,3,H,W), (B,K,h,w) -> (B,K,H,W). Neighbours are slices of one padded tensor, stacked."
    (h, w), r, shifts = image.shape[-2:], max(dilations), crf._shifts(dilations)
    def around(x):
        padded = F.pad(x, (r,) * 4, mode='replicate')
        return torch.stack([padded[..., r + y:r + y + h, r + x_:r + x_ + w] for y, x_ in shifts], 2)
    masks = F.interpolate(masks, size=(h, w), mode='bilinear', align_corners=True)
    near = around(image)
    affinity = -((near - image[:, :, None]).abs() / (near.std(2, keepdim=True) + 1e-8) / w1) ** 2
    distance = torch.tensor([math.hypot(*s) for s in shifts]).to(image)
    position = (-(distance / (distance.std() + 1e-8) / w1) ** 2).softmax(0)
    weight = affinity.mean(1, keepdim=True).softmax(2) + w2 * position.view(1, 1, -1, 1, 1)
    for _ in range(iterations): masks = (around(masks) * weight).sum(2)
    return masks


@torch.no_grad()
def plain_refined_labels(image, cam, label, values, par=par_sliced):
    "Pseudo label (B,H,W) from two stacks, each refined on its own, image by image."
    size, out = image.shape[-2:], []
    half = lambda x: F.interpolate(x, size=[n // 2 for n in x.shape[-2:]], mode='bilinear', align_corners=False)
    picture = half((denormalise(image) * 255).clamp(0, 255).to(torch.uint8).float() / 255)
    for b, y in enumerate(label):
        ids = torch.cat([torch.zeros(1, dtype=torch.long), y.nonzero()[:, 0] + 1])
        found = []
        for value in values:
            stack = half(torch.cat([torch.full_like(cam[b, :1], value), cam[b] * y[:, None, None]])[None])[:, ids].softmax(1)
            refined = F.interpolate(par(picture[b:b + 1], stack), size=size, mode='bilinear', align_corners=False)
            found.append(ids[refined.argmax(1)[0]])
        low, high = found
        final = high.clone()
        final[high == 0] = 255
        final[(high == 0) & (low == 0)] = 0
        out.append(final.to(torch.uint8))
    return torch.stack(out)


def plain_mct(tokens, tau):
    "Contrast of the class tokens, image by image."
    out = [F.cross_entropy(F.normalize(q, dim=-1) @ F.normalize(q, dim=-1).T / tau, torch.arange(len(q))) for q in tokens]
    return sum(out) / len(out)


def plain_ptc(features, label_map):
    "Affinity mask with 255 where a pair does not count, then the two sums."
    ids = label_map.flatten(1)
    mask = (ids[:, :, None] == ids[:, None]).long()
    mask[(ids[:, :, None] == 255) | (ids[:, None] == 255)] = 255
    mask[:, torch.arange(ids.shape[1]), torch.arange(ids.shape[1])] = 255
    p = F.normalize(features.flatten(2), dim=1)
    similar = torch.einsum('bdn,bdm->bnm', p, p).abs()
    near, far = (mask == 1).float(), (mask == 0).float()
    return .5 * (1 - (near * similar).sum() / (near.sum() + 1)) + .5 * (far * similar).sum() / (far.sum() + 1)


def plain_cre(tokens, patches, label_map, label, tau=.5, eps=1e-4):
    "One image and one class after the other: exponentials, their sum, the logarithm."
    q, losses = F.normalize(tokens, dim=-1), []
    for b in range(len(q)):
        image = 0.
        for c in label[b].nonzero().flatten().tolist():
            e = torch.exp(patches[b].detach() @ q[b, c] / tau)
            each = -torch.log(e / (e.sum() + eps))
            chosen = (label_map[b].flatten() == c + 1).float()
            image = image + (each * chosen).sum() / (chosen.sum() + 1e-4)
        losses.append(image)
    return sum(losses) / len(q)


def plain_ure_candidates(label_map, kernel=6, accept=1.2):
    "Rows, columns by window corner of one map (h,w): the accepted ones, the confident ones, one window after the other."
    roi = torch.where(label_map == 255, 1., torch.where(label_map == 0, 0., 2.))
    margin, accepted, confident = kernel // 2, [], []
    for y in range(roi.shape[0] - kernel):
        for x in range(roi.shape[1] - kernel):
            state = roi[y + margin, x + margin].item()
            if state == 1 and (roi[y:y + kernel, x:x + kernel].sum() / kernel ** 2).item() >= accept - 1e-6: accepted.append((y, x))
            if state == 2: confident.append((y, x))
    return [torch.tensor(p, dtype=torch.long).reshape(-1, 2) for p in (accepted, confident)]


def plain_pick(label_map, keys, count=8, kernel=6):
    "Picked positions of each image, drawn as `more.pick_uncertain` draws them."
    out = []
    for one, key in zip(label_map, keys):
        (found, confident), generator = plain_ure_candidates(one, kernel), torch_rng(*key)
        if len(found) > count: found = found[torch.randperm(len(found), generator=generator)[:count]]
        else:
            extra = (count - len(found)) // 4
            pool = confident if len(confident) >= extra else torch.cartesian_prod(*(torch.arange(n - kernel) for n in one.shape))
            found = torch.cat([found, pool[torch.randperm(len(pool), generator=generator)[:extra]]])
        out.append(found)
    return out


def plain_ure(tokens, features, label, picks):
    "One token after the other, one class after the other."
    losses = []
    for b, places in enumerate(picks):
        q = F.normalize(tokens[b].detach(), dim=-1)
        for y, x in places.tolist():
            u, near, far = F.normalize(features[b, :, y, x], dim=0), 0., 0.
            for c in range(len(q)):
                p = (u @ q[c]).abs()
                if label[b, c] > 0: near = near + p
                else: far = far + p
            n = label[b].sum()
            losses.append(.5 * (1 - near / (n + 1)) + .5 * far / (len(q) - n + 1))
    return torch.stack(losses).mean() if losses else features[:0].sum()


def plain_step_losses(model, batch, step, cfg, par=par_sliced):
    "All eight terms, active or not."
    image, y = batch['image'], batch['label']
    out = plain_forward(model, image)
    cam, cam_aux = plain_multi_scale(model, image, cfg.scales)
    maps = plain_patch_labels(cam, cam_aux, y, out.features.shape[-2:], step, cfg)
    picks = plain_pick(maps['ure'], [(cfg.seed, step, int(i), 'ure') for i in batch['index']])
    pseudo = plain_refined_labels(image, cam, y, cfg.refine, par)
    soft = lambda logits: F.multilabel_soft_margin_loss(logits, y)
    return dict(cls=soft(out.cls), aux=soft(out.aux), mct=plain_mct(out.tokens, cfg.mct_tau), ptc=plain_ptc(out.features, maps['affinity']),
                cre=plain_cre(out.tokens, out.features.flatten(2).mT, maps['cre'], y, cfg.cre_tau, cfg.cre_eps), ure=plain_ure(out.tokens, out.features, y, picks),
                seg=balanced_cross_entropy(out.seg, pseudo), reg=energy_loss(image, out.seg, pseudo, cfg))


def plain_total(terms, step, cfg):
    "Weighted sum; a term that is not active yet counts 0.0 times."
    active = weights(cfg, step)
    return sum(active.get(k, 0.) * v for k, v in terms.items())
