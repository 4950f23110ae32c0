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
from wsl_nb.core import normalise, seed_everything, torch_rng
from wsl_nb.data import example

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
    image = F.interpolate(pictures(side)['image'], size=(side, side)).sigmoid()
    stacks = [torch.rand(1, 4, side, side, generator=torch_rng('bench', 'par', i)).softmax(1) for i in range(2)]
    fast = lambda: crf.par_refine(image, torch.cat(stacks, 1))
    for name, form, aim in (('slices', plain.par_sliced, 1.8), ('convolutions, as the released code', reference_par.par_plain, None)):
        two = lambda: torch.cat([form(image, s) for s in stacks], 1)
        with torch.no_grad():
            yield timed_row(f'PAR, two stacks of 4 at {side} px, plain by {name}', two, fast, 1 if quick else 2 * repeats, now, error=gap(two(), fast()), allowed=1e-4, aim=aim)


# --- CRE and URE -------------------------------------------------------------------------------------------------------

def relation_scene(B=4, grid=28, C=20, D=768):
    "Tokens, patches and a label map of blobs with uncertain rims."
    noise = lambda *shape: torch.randn(*shape, generator=torch_rng('bench', 'relation', *shape))
    tokens, features = noise(B, C, D), .2 * noise(B, D, grid, grid)
    label = torch.zeros(B, C)
    for b in range(B): label[b, [b, b + 5, b + 11]] = 1
    value = F.interpolate(noise(B, C, grid // 4, grid // 4), size=(grid, grid), mode='bilinear').sigmoid()
    from wsl_nb.maps import three_way_labels
    return tokens, features, label, three_way_labels(value, label, .5, .68)


def relation_rows(quick, repeats, now):
    "Losses and their gradients over a batch; picks drawn with the same keys."
    tokens, features, label, label_map = relation_scene(*((2, 14, 6, 32) if quick else (4, 28, 20, 768)))
    keys, tau, eps = [(0, 0, b, 'ure') for b in range(len(label))], .5, 1e-4
    q, f = tokens.requires_grad_(), features.requires_grad_()

    def cre_plain(): return plain.plain_cre(q, f.flatten(2).mT, label_map, label, tau, eps)
    def cre_fast(): return more.confident_relation(q, f.flatten(2).mT, label_map, label, tau, eps)
    def ure_plain(): return plain.plain_ure(q, f, label, plain.plain_pick(label_map, keys))
    def ure_fast(): return more.uncertain_relation(q, f, label, more.pick_uncertain(label_map, keys))
    forms = {'CRE': (cre_plain, cre_fast, q), 'URE': (ure_plain, ure_fast, f), 'CRE and URE': (lambda: cre_plain() + ure_plain(), lambda: cre_fast() + ure_fast(), q)}
    where = f'B={len(label)}, {label_map.shape[-1]}x{label_map.shape[-1]}, C={label.shape[1]}, D={q.shape[-1]}'
    for name, (slow, fast, leaf) in forms.items():
        error = max(gap(slow().detach(), fast().detach()), gap(torch.autograd.grad(slow(), leaf)[0], torch.autograd.grad(fast(), leaf)[0]))
        once = lambda form: lambda: torch.autograd.grad(form(), leaf)
        yield timed_row(f'{name} with gradient, {where}', once(slow), once(fast), 2 if quick else 4 * repeats, now, error=error, allowed=1e-4, aim=5 if 'and' in name else None)
    picks = plain.plain_pick(label_map, keys)
    same = torch.cat([torch.cat([torch.full((len(p), 1), b), p], 1) for b, p in enumerate(picks)]).equal(more.pick_uncertain(label_map, keys))
    yield Row('URE picks are the same', error=float(not same), allowed=0)


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
    "The run's optimiser."
    from wsl_nb.training_config import make_optimizer
    return make_optimizer(cfg, more.groups(model, cfg))


def step_forms(model, batch, cfg, step=STEP):
    "Functions that do one step each, all on the same weights."
    optimiser = adamw(model, cfg)
    run = lambda form, c: lambda: one_step(form, model, optimiser, batch, step, c)
    return dict(plain=run(plain_losses, cfg), fast=run(fast_losses, cfg), bf16=run(fast_losses, replace(cfg, cam_precision='bf16')))


def step_error(model, forms, step, cfg):
    "Largest relative difference of the active losses, and of the gradients, each against its own tensor's largest value."
    terms, grads = {}, {}
    for name in ('plain', 'fast'):
        terms[name] = forms[name]()
        grads[name] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    losses = {k: gap(terms['plain'][k], terms['fast'][k]) for k in terms['fast']}
    whole = torch.cat([g.flatten() for g in grads['plain'].values()]).norm()
    return losses, {n: ((g - grads['fast'][n]).norm() / whole).item() for n, g in grads['plain'].items() if n in grads['fast']}


PARTS = dict(par=par_rows, relation=relation_rows)
