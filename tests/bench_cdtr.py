"What `bench.py cdtr` times: a training step with CLIP, the attention that is kept for the backward pass, the threshold sweep."
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import replace

import torch
import torch.nn.functional as F

import bench_cdtr_plain as plain
import bench_cdtr_sweep
from bench import Row, gap, timed_row
from parity_cdtr import LOSSES
from reference_cdtr import PlainCDTR, plain_adamw, under_released_name
from wsl_nb import cdtr
from wsl_nb.cdtr_base import CUB_OFFICIAL
from wsl_nb.vit_clip import random_clip
from wsl_nb.core import seed_everything, torch_rng
from wsl_nb.data_farm import VOCABULARY
from wsl_nb.training_config import make_optimizer
from wsl_nb.vit import text_features

FULL = replace(CUB_OFFICIAL, precision='fp32', drop_path=0., batch=4)             # stochastic depth off: both forms must drop the same blocks
QUICK = replace(FULL, dim=48, depth=3, heads=3, side=6, mlp_ratio=2., csm_width=4, ocm_blocks=2, clip_model='farm', clip_dim=64, prompts=('a {}',))


# --- both forms of everything, with the same weights -----------------------------------------------------------------

def twins(cfg, classes):
    "(the library's network, the plain one) with the same weights."
    seed_everything('bench cdtr')
    ours = cdtr.CDTR(cfg, classes).train()
    other = PlainCDTR(classes, cfg.dim, cfg.depth, cfg.heads, cfg.mlp_ratio, cfg.patch, cfg.side, cfg.csm_width, cfg.ocm_blocks).train()
    other.load_state_dict({k: under_released_name(ours.state_dict(), k) for k in other.state_dict()})
    return ours, other


def scene(cfg, classes, batch):
    "(images, target) with shapes in them, so that attention is not the same everywhere."
    g, side = torch_rng('bench cdtr', batch), cfg.patch * cfg.side
    rough = F.interpolate(torch.randn(batch, 3, 7, 7, generator=g), size=(side, side), mode='bicubic')
    return rough + .3 * torch.randn(batch, 3, side, side, generator=g), torch.randint(classes, (batch,), generator=g)


@contextmanager
def same_branches(ours, other):
    "Leaky ReLUs of the library take the side of zero that the plain form took before; yields [places, those where rounding had put them on the other side]."
    leaky = lambda net: [m for m in net.modules() if isinstance(m, torch.nn.LeakyReLU)]
    sides, mine, counts = {}, leaky(ours), [0, 0]
    def take(module, inputs, output):
        i = mine.index(module); side = sides[i] if i < len(mine) - 1 else torch.cat([sides[k] for k in range(i, len(sides))], 1) # the last one is all branches of the object map
        counts[0] += side.numel(); counts[1] += int((side != (inputs[0] > 0)).sum())
        return torch.where(side, inputs[0], module.negative_slope * inputs[0])
    hooks = [m.register_forward_hook(lambda m, x, y, i=i: sides.__setitem__(i, x[0] > 0)) for i, m in enumerate(leaky(other))]
    hooks += [m.register_forward_hook(take) for m in mine]
    try: yield counts
    finally:
        for h in hooks: h.remove()


# --- training step ---------------------------------------------------------------------------------------------------

def step_forms(cfg, classes, quick):
    "(plain step, ours, largest error of the losses, of the gradients, sides of the leaky ReLUs); a step is forward, backward and AdamW."
    (ours, other), clip = twins(cfg, classes), random_clip(cfg.clip_model, list(VOCABULARY))
    thawed, names = deepcopy(clip).requires_grad_(True), list(VOCABULARY[:classes]) if quick else [f'species {i}' for i in range(classes)]
    image, target = scene(cfg, classes, cfg.batch)
    words, batch = [cfg.prompts[0].format(n) for n in names[:len(target)]], dict(image=image, label=F.one_hot(target, classes).float())
    ours.text.copy_(text_features(clip, names, cfg.prompts))                          # once a run
    rules = make_optimizer(cfg, cdtr.groups(ours, cfg)), plain_adamw(other, cfg.lr, cfg.weight_decay)
    def slow():
        rules[1].zero_grad(); terms, total = plain.plain_step(other, thawed, image, target, words, cfg)
        total.backward(); rules[1].step()                                             # CLIP's own gradients pile up, as in the released code
        return terms | dict(total=total)
    def fast():
        rules[0].zero_grad()
        terms = cdtr.losses(ours, batch, 0, cfg, clip=clip)
        total = cdtr.total(terms, ours, 0, cfg); total.backward(); rules[0].step()
        return terms | dict(total=total)
    with same_branches(ours, other) as sides: a, b = slow(), fast()
    grads = {n: p.grad for n, p in ours.named_parameters()}
    losses = max((abs(a[k] - b[LOSSES.get(k, k)]) / abs(a[k])).item() for k in a)
    return slow, fast, losses, max(gap(p.grad, under_released_name(grads, n)) for n, p in other.named_parameters()), sides


def step_rows(quick, repeats, now):
    "DeiT-S with CLIP ViT-B/32, four images of 224 pixels."
    cfg, classes = (QUICK, 6) if quick else (FULL, 200)
    slow, fast, losses, grads, sides = step_forms(cfg, classes, quick)
    yield timed_row(f'training step with CLIP, B={cfg.batch}, {cfg.patch * cfg.side} px; plain: CLIP not frozen, 4 passes, whole attention', slow, fast, 1 if quick else repeats, now, error=grads, allowed=1e-3, aim=2,
                    more={'error is': 'the largest of a gradient over the largest value of its tensor', 'leaky ReLUs that rounding puts on the other side of zero': f'{sides[1]} of {sides[0]}, compared on the same side'})
    yield Row('losses of this step', error=losses, allowed=1e-4)


# --- memory ----------------------------------------------------------------------------------------------------------

@contextmanager
def kept_bytes(module):
    "Counts, while the block runs, the bytes that the backward pass will need, parameters left out; `found(outputs)` adds what is returned."
    own, seen = {p.untyped_storage().data_ptr() for p in module.parameters()}, {}
    def note(x):
        store = x.untyped_storage()
        if store.data_ptr() not in own: seen[store.data_ptr()] = x                     # keeps it alive: no address is used twice
        return x
    def found(outputs=()):
        for x in outputs: note(x)
        return sum(x.untyped_storage().nbytes() for x in seen.values())
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x): yield found


def attention_rows(quick, repeats, now):
    "What the two encoders keep beyond one that keeps no attention at all."
    cfg, classes, batch = (QUICK, 6, 2) if quick else (FULL, 200, 8)
    (ours, other), (image, _) = twins(cfg, classes), scene(cfg, classes, batch)
    with kept_bytes(ours) as found: bare = found([ours.vit.norm(ours.vit.block_outputs(image)[-1])])
    with kept_bytes(ours) as found: seen = ours.vit(image); rows = found(seen)
    with kept_bytes(other) as found: stacked = plain.whole_attention(other, image); whole = found(stacked)
    with kept_bytes(ours) as found: out = ours(image); forward = found(x for x in out if x is not None)
    with kept_bytes(other) as found: told = other(image); whole_forward = found(told.values())
    megabytes = lambda n: n / 2 ** 20
    yield Row(f'attention kept for the backward pass, B={batch}, {cfg.patch * cfg.side} px; plain: all of it, in one tensor', error=gap(stacked[1][:, :, :, 0, 1:].flatten(3), seen.rows.flatten(3)), allowed=1e-4, more={
        'MB beyond the encoder': dict(ours=megabytes(rows - bare), stacked=megabytes(whole - bare), encoder=megabytes(bare)), 'MB of the one tensor': megabytes(stacked[1].nbytes),
        'share of the stacked form (aim 0.05)': (rows - bare) / (whole - bare), 'share of the one tensor': (rows - bare) / stacked[1].nbytes,
        'MB of the whole forward pass': dict(ours=megabytes(forward), plain=megabytes(whole_forward))})


PARTS = dict(step=step_rows, attention=attention_rows, **bench_cdtr_sweep.PARTS)
