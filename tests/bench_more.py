"""What `bench.py more` times: PAR, CRE and URE, the training step with its parts and its rate, bfloat16 CAM passes."""
import statistics
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

import bench_more_plain as plain
import reference_par
from bench import Row, alternate, gap, timed_row
from wsl_nb import crf, more, more_base
from wsl_nb.core import denormalise, normalise, seed_everything, torch_rng
from wsl_nb.data import example
from wsl_nb.maps import three_way_labels

VIT_B = replace(more_base.VOC_OFFICIAL, batch=1, lr=0., weight_decay=0.)                  # rate 0: the work of a step, the weights of the first
STEP = 2500                                                                                # every term is active


# --- scenes ----------------------------------------------------------------------------------------------------------

def pictures(size, count=1):
    "Drawn images of one size with two of 20 classes each, as a batch."
    drawn = [example('wsss', 0, 'train', i, size)['image'] for i in range(count)]
    image = torch.stack([torch.from_numpy(np.ascontiguousarray(d)).permute(2, 0, 1).float() / 255 for d in drawn])
    label = torch.zeros(count, 20)
    for b in range(count): label[b, [3 * b + 1, 3 * b + 2]] = 1
    return dict(image=normalise(image), label=label, index=torch.arange(count))


def network(cfg, classes=20):
    "Random weights of a fixed seed; class tokens are told apart so that no map ties with another."
    seed_everything('bench')
    model = more.MoRe(cfg, classes)
    with torch.no_grad(): model.encoder.cls_token.add_(.02 * torch.randn(model.encoder.cls_token.shape, generator=torch_rng('bench', 'tokens')))
    return model


def small(**change):
    "A network of the same build for quick checks."
    return replace(VIT_B, dim=96, depth=4, heads=3, side=7, decoder_dim=32, **change)


# --- PAR ---------------------------------------------------------------------------------------------------------------

def par_rows(quick, repeats, now):
    "Two stacks of four channels at the half size of a 448-pixel crop: one library call against two plain ones."
    side = 48 if quick else 224
    image = denormalise(pictures(side)['image'])
    stacks = [torch.rand(1, 4, side, side, generator=torch_rng('bench', 'par', i)).softmax(1) for i in range(2)]
    fast = lambda: crf.par_refine(image, torch.cat(stacks, 1))
    forms = {'neighbours stacked from slices': (plain.par_sliced, 1.8), 'convolutions, as the released code': (reference_par.par_plain, None), 'the library, called twice': (crf.par_refine, None)}
    for name, (form, aim) in forms.items():
        two = lambda: torch.cat([form(image, s) for s in stacks], 1)
        with torch.no_grad():
            yield timed_row(f'PAR, 2 stacks of 4, {side} px; plain: {name}', two, fast, 1 if quick else repeats, now, error=gap(two(), fast()), allowed=1e-4, aim=aim)


# --- CRE and URE -------------------------------------------------------------------------------------------------------

def relation_scene(B=4, grid=28, C=20, D=768):
    "Tokens, patches and a label map of blobs with uncertain rims."
    noise = lambda *shape: torch.randn(*shape, generator=torch_rng('bench', 'relation', *shape))
    tokens, features = noise(B, C, D), .2 * noise(B, D, grid, grid)
    label = torch.zeros(B, C)
    for b in range(B): label[b, [(b + i) % C for i in (0, C // 4, C // 2)]] = 1
    value = F.interpolate(noise(B, C, grid // 4, grid // 4), size=(grid, grid), mode='bilinear').sigmoid()
    from wsl_nb.maps import three_way_labels
    return tokens, features, label, three_way_labels(value, label, .5, .68)


def relation_rows(quick, repeats, now):
    "Losses and their gradients over a batch; picks drawn with the same keys."
    tokens, features, label, label_map = relation_scene(*((2, 16, 8, 32) if quick else (4, 28, 20, 768)))
    keys, tau, eps = [(0, 0, b, 'ure') for b in range(len(label))], .5, 1e-4
    q, f = tokens.requires_grad_(), features.requires_grad_()

    def cre_plain(): return plain.plain_cre(q, f.flatten(2).mT, label_map, label, tau, eps)
    def cre_fast(): return more.confident_relation(q, f.flatten(2).mT, label_map, label, tau, eps)
    def ure_plain(): return plain.plain_ure(q, f, label, plain.plain_pick(label_map, keys))
    def ure_fast(): return more.uncertain_relation(q, f, label, more.pick_uncertain(label_map, keys))
    forms = {'CRE': (cre_plain, cre_fast, [q]), 'URE': (ure_plain, ure_fast, [f]), 'CRE and URE': (lambda: cre_plain() + ure_plain(), lambda: cre_fast() + ure_fast(), [q, f])}
    where = f'B={len(label)}, {label_map.shape[-1]}x{label_map.shape[-1]}, C={label.shape[1]}, D={q.shape[-1]}'
    for name, (slow, fast, leaves) in forms.items():
        a, b = ([v.detach(), *torch.autograd.grad(v, leaves)] for v in (slow(), fast()))
        error, once = max(map(gap, a, b)), lambda form, leaves=leaves: lambda: torch.autograd.grad(form(), leaves)
        yield timed_row(f'{name} with gradient, {where}', once(slow), once(fast), 2 if quick else 4 * repeats, now, error=error, allowed=1e-4, aim=5 if 'and' in name else None)
    same = rows_of(plain.plain_pick(label_map, keys)).equal(more.pick_uncertain(label_map, keys))
    yield Row('URE picks differ (1: yes)', error=float(not same), allowed=0)


# --- the step ----------------------------------------------------------------------------------------------------------

def fast_losses(model, batch, step, cfg):
    "Terms and total of the library."
    terms = more.losses(model, batch, step, cfg)
    return terms, more.total(terms, model, step, cfg)


def plain_losses(model, batch, step, cfg):
    "Terms and total of the plain form."
    terms = plain.plain_step_losses(model, batch, step, cfg)
    return terms, plain.plain_total(terms, step, cfg)


def one_step(form, model, optimiser, batch, step, cfg):
    "Forward, maps, terms, backward, update; returns the terms. Gradients stay for a look."
    optimiser.zero_grad(set_to_none=True)
    terms, whole = form(model, batch, step, cfg)
    whole.backward(); optimiser.step()
    return {k: v.detach() for k, v in terms.items()}


def adamw(model, cfg):
    "The optimiser of a run."
    from wsl_nb.training_config import make_optimizer
    return make_optimizer(cfg, more.groups(model, cfg))


def step_forms(model, batch, cfg, step=STEP):
    "Functions that do one step each, all on the same weights."
    slow, ours = torch.optim.AdamW(more.groups(model, cfg), betas=cfg.betas, foreach=False, fused=False), adamw(model, cfg)
    run = lambda form, optimiser, c: lambda: one_step(form, model, optimiser, batch, step, c)
    return dict(plain=run(plain_losses, slow, cfg), fast=run(fast_losses, ours, cfg), bf16=run(fast_losses, ours, replace(cfg, cam_precision='bf16')))


def step_rows(quick, repeats, now):
    "A whole training step in three forms at two crop sizes, its parts and its rate; the same weights throughout."
    cfg = small() if quick else VIT_B
    model = network(cfg)
    for size, aim, rounds in [(128, None, 1)] if quick else [(224, 1.1, repeats), (448, 1.2, max(1, repeats - 2))]:
        batch, where = pictures(size), f'width {cfg.dim}, depth {cfg.depth}, {size} px, B=1'
        forms = step_forms(model, batch, cfg)
        same, first = step_error(model, forms, now)
        runs = alternate(forms, rounds, now, warm=0)
        if size == 448: runs = {k: v + first.get(k, []) for k, v in runs.items()}          # a long step counts from the first on, 224 px has warmed up
        mid, ends = {k: statistics.median(v) for k, v in runs.items()}, {k: [min(v), max(v)] for k, v in runs.items()}
        yield Row(f'training step, {where}, fp32', mid['plain'], mid['fast'], max(same.values()), 1e-4, aim, dict(plain=ends['plain'], fast=ends['fast']), dict(errors=same))
        share = {} if size == 448 else {'label-map pixels changed, random weights': changed_share(model, cfg, batch)}
        yield Row(f'training step, {where}, bf16 CAM passes', mid['plain'], mid['bf16'], aim=1.7, spread=dict(plain=ends['plain'], fast=ends['bf16']), more=share)
        yield rate_row(model, cfg, batch, where, now)


def step_error(model, forms, now):
    "Relative differences of the losses (largest) and of the gradient (norm of the whole), whether URE picks other tokens; and the seconds it took."
    terms, grads, picks, seconds, start = {}, {}, {}, {}, now()
    with noted(plain, 'plain_pick', picks), noted(more, 'pick_uncertain', picks):
        for name in ('plain', 'fast'):
            start = now(); terms[name] = forms[name](); seconds[name] = [now() - start]
            grads[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    gaps = {k: gap(v, terms['fast'][k]) for k, v in terms['plain'].items()}
    assert set(grads['plain']) == set(grads['fast']) and all(v.abs() > 0 for v in terms['plain'].values()), (terms, 'a term says nothing')
    norm = lambda tensors: torch.stack([t.norm() for t in tensors]).norm()
    apart = norm([g - grads['fast'][n] for n, g in grads['plain'].items()]) / norm(grads['plain'].values())
    return dict(losses=max(gaps.values()), gradient=apart.item(), picks=float(not rows_of(picks['plain_pick']).equal(picks['pick_uncertain']))), seconds


@contextmanager
def noted(module, name, found):
    "Keeps the last result of a function of a module while it is open."
    call = getattr(module, name)
    def run(*args, **kw):
        found[name] = call(*args, **kw)
        return found[name]
    setattr(module, name, run)
    try: yield
    finally: setattr(module, name, call)


def rows_of(picks):
    "Positions of each image as (image, row, column)."
    return torch.cat([torch.cat([torch.full((len(p), 1), b), p], 1) for b, p in enumerate(picks)])


# --- parts and rate ----------------------------------------------------------------------------------------------------

PIECES = {'training_cams': 'CAM passes', 'patch_labels': 'label maps', 'class_token_contrast': 'mct', 'patch_token_contrast': 'ptc', 'confident_relation': 'cre',
          'pick_uncertain': 'ure picks', 'uncertain_relation': 'ure', 'refined_labels': 'PAR and pseudo label', 'balanced_cross_entropy': 'seg', 'energy_loss': 'reg'}


@contextmanager
def stopwatch(owner, names, found, now):
    "Adds the seconds of functions of a module or object to `found` while it is open."
    before = {n: getattr(owner, n) for n in names}
    def timed(label, call):
        def run(*args, **kw):
            start = now()
            try: return call(*args, **kw)
            finally: found[label] = found.get(label, 0.) + now() - start
        return run
    for n, label in names.items(): setattr(owner, n, timed(label, before[n]))
    try: yield found
    finally:
        for n, call in before.items(): setattr(owner, n, call)


def step_parts(model, cfg, batch, now):
    "Name -> seconds of the parts of one library step."
    found, optimiser = {}, adamw(model, cfg)
    for p in model.parameters(): p.grad = None
    with stopwatch(more, PIECES, found, now), stopwatch(model, dict(forward='forward'), found, now):
        start = now(); terms, whole = fast_losses(model, batch, STEP, cfg); found['all terms'] = now() - start
    del model.forward                                                                      # the class has it
    start = now(); whole.backward(); found['backward'] = now() - start
    optimiser.step()
    start = now(); optimiser.step(); found['optimiser'] = now() - start
    found['the rest'] = found.pop('all terms') - sum(v for k, v in found.items() if k not in ('backward', 'optimiser', 'all terms'))
    return found


def encoder_flops(cfg, grid, classes=20):
    "Multiplications and additions of one image through the encoder."
    patches = grid[0] * grid[1]
    n, d = patches + cfg.registers + classes, cfg.dim
    return cfg.depth * ((8 + 4 * cfg.mlp_ratio) * n * d * d + 4 * n * n * d) + 2 * patches * d * 3 * cfg.patch ** 2


def step_flops(cfg, size, classes=20):
    "Of one library step with one image: one forward and backward, the CAM passes less the one that the forward saves, decoder, graph, PTC."
    grid = lambda s: (int(s * size) // cfg.patch,) * 2
    n, d, k = grid(1)[0] ** 2, cfg.dim, cfg.decoder_dim
    decoder, graph, pairs = 2 * n * (9 * d * k + 9 * k * k + k * (classes + 1)), 2 * d * d * (4 * classes + n), 2 * n * n * d
    learn = 3 * (encoder_flops(cfg, grid(1)) + decoder + pairs) + 3 * graph - 2 * n * d * 3 * cfg.patch ** 2       # no gradient for pixels
    return learn + sum(2 * encoder_flops(cfg, grid(s)) for s in cfg.scales) - encoder_flops(cfg, grid(1))


def product_rate(cfg, tokens, now, repeats=3):
    "Operations a second of the four matrix products of a block, float32."
    d, hidden, total = cfg.dim, int(cfg.dim * cfg.mlp_ratio), 0.
    for i, o in ((d, 3 * d), (d, d), (d, hidden), (hidden, d)):
        x, w, b = torch.randn(tokens, i), torch.randn(o, i), torch.randn(o)
        total += statistics.median(alternate(dict(it=lambda: F.linear(x, w, b)), repeats, now)['it'])
    return (8 + 4 * cfg.mlp_ratio) * tokens * d * d / max(total, 1e-9)


def rate_row(model, cfg, batch, where, now):
    "Seconds of each part, and the rate of the step over that of a matrix product."
    size, parts = batch['image'].shape[-1], step_parts(model, cfg, batch, now)
    rate = step_flops(cfg, size) / sum(parts.values()) / 1e9
    product = product_rate(cfg, 2 * (cfg.registers + 20 + (size // cfg.patch) ** 2), now) / 1e9
    return Row(f'parts and rate, {where}, fp32', more={'seconds': parts, 'GFLOP of the step': step_flops(cfg, size) / 1e9, 'GFLOP/s of the step': rate,
                                                       'GFLOP/s of a matrix product': product, 'share (aim 0.6)': rate / product})


# --- bfloat16 ----------------------------------------------------------------------------------------------------------

@torch.no_grad()
def changed_share(model, cfg, batch):
    "Share of pixels of each label map that differ when the CAM passes run in bfloat16."
    image, y = batch['image'], batch['label']
    out = model(image, False)
    def maps(precision):
        cam, aux = more.training_cams(model, image, out, replace(cfg, cam_precision=precision))
        early, late = (more.patch_labels(cam, aux, y, out.features.shape[-2:], step, cfg) for step in (cfg.switch, cfg.switch + 1))
        return {'cre': early['cre'], 'ure': early['ure'], 'affinity': early['affinity'], 'cre and ure, late': late['cre'], 'refined': more.refined_labels(image, cam, y, cfg.refine)}
    exact, low = maps('fp32'), maps('bf16')
    return {k: (exact[k] != low[k]).double().mean().item() for k in exact}


def bf16_rows(quick, repeats, now):
    "Changed label-map pixels of trained models: the shipped small ones on held-out drawn images, at the four scales of the VOC recipe."
    from wsl_nb.core import BadInput
    from wsl_nb.data import embedded_of
    from wsl_nb.pretrain import shipped
    for name in ('more_laptop', 'more_unwindowed'):
        try: model, cfg, *_ = shipped(name)
        except BadInput:
            yield Row(f'bf16 label maps of {name}', more={'not run': 'no such asset; make assets'}); continue
        split = embedded_of(cfg).split('val', ('image', 'label'))
        samples = [split[i] for i in range(8 if quick else 100)]
        batch = dict(image=normalise(torch.stack([s['image'] for s in samples])), label=torch.stack([s['label'] for s in samples]))
        share = changed_share(model, replace(cfg, scales=VIT_B.scales), batch)
        yield Row(f'bf16 label maps of the shipped {name}, {len(samples)} images', more={'pixels changed': share, 'largest (aim 0.005)': max(share.values())})


def flop_rows(quick, repeats, now):
    "The count of operations against the one of torch, on the small network."
    from torch.utils.flop_counter import FlopCounterMode
    cfg = small(); model = network(cfg)
    counter, batch = FlopCounterMode(display=False), pictures(128)
    with counter:
        terms, whole = plain_losses(model, batch, STEP, replace(cfg, scales=(1.,)))
        whole.backward()
    ours = step_flops(replace(cfg, scales=(1.,)), 128) + encoder_flops(cfg, (8, 8))        # the plain step runs scale 1 twice
    yield Row('operations counted, ours against torch', error=abs(ours / counter.get_total_flops() - 1), allowed=.03)


PARTS = dict(par=par_rows, relation=relation_rows, flops=flop_rows, bf16=bf16_rows, step=step_rows)
