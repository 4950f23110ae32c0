"What `bench.py surgery` times: feature surgery, the image path at 512 pixels, the cache of text vectors, training of the head from kept features."
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

import bench_surgery_plain as plain
from bench import timed_row
from wsl_nb.core import seed_everything, torch_rng
from wsl_nb.data import embedded
from wsl_nb.data_farm import VOCABULARY
from wsl_nb.surgery import feature_surgery, positions_for, surgery
from wsl_nb.surgery_base import DIOR, LAPTOP, BoxView, prompt_set
from wsl_nb.surgery_recipe import Cache, Surgery, frozen_features, losses, total
from wsl_nb.vit import text_features
from wsl_nb.vit_clip import random_clip

CONTEXT = 59 # Classes of PASCAL Context


def noise(*shape, key='bench'): return torch.randn(*shape, generator=torch_rng('bench surgery', key, *shape))
def units(n, width): return F.normalize(noise(n, width, key='texts'), dim=1)
def apart(a, b): return (a.double() - b.double()).abs().max().item()


def clip_of(name):
    "A CLIP with random weights, the same in every call."
    seed_everything('bench surgery'); return random_clip(name, list(VOCABULARY))


# --- feature surgery -------------------------------------------------------------------------------------------------

def feature_rows(quick, repeats, now):
    "1,025 tokens of 512 channels, 59 classes; the fast form runs a hundred times in one measurement."
    length, classes, many = (65, 7, 20) if quick else (1025, CONTEXT, 100)
    tokens, texts = noise(1, length, 512), units(classes, 512); slow, fast = (lambda: plain.materialised(tokens, texts)), (lambda: feature_surgery(tokens, texts))
    def _often():
        for _ in range(many): fast()
    row = timed_row(f'feature surgery, {length} tokens x {classes} classes x 512; plain: products materialised', slow, _often, repeats, now, error=apart(slow(), fast()), allowed=1e-6, aim=None if quick else 100)
    row.fast /= many; row.spread['fast'] = [s / many for s in row.spread['fast']]
    yield row


# --- image path ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def path_rows(quick, repeats, now):
    "Pixels to scores of every token, text given to both; and each half of the gain alone."
    name, side, classes = ('farm', 96, 5) if quick else ('ViT-B-16', 512, CONTEXT); clip = clip_of(name); patch = clip.visual.patch_size[0]
    images, texts = noise(1, 3, side, side), units(classes, clip.visual.proj.shape[1]); where = positions_for(clip.visual, (side // patch,) * 2)
    slow = lambda: plain.materialised(plain.two_paths(clip, images, where, 6), texts); fast = lambda: feature_surgery(surgery(clip, images).tokens, texts)
    yield timed_row(f'image path, {name}, {side} px, {classes} classes; plain: two paths, products materialised', slow, fast, repeats, now, error=apart(slow(), fast()), allowed=2e-6, aim=None if quick else 1.1)
    slow, fast = (lambda: plain.two_paths(clip, images, where, 6)), (lambda: surgery(clip, images).tokens)
    yield timed_row(f'its streams alone, {name}, {side} px; plain: two paths', slow, fast, repeats, now, error=apart(slow(), fast()), allowed=2e-5)
    surgery_, forward = (lambda: surgery(clip, images).tokens), (lambda: clip.visual(F.interpolate(images, (clip.side,) * 2)) if quick else surgery(clip, images, 0).tokens)
    yield timed_row(f'what surgery costs beside plain CLIP, {name}, {side} px; "plain": surgery, "fast": CLIP alone', surgery_, forward, repeats, now)


# --- text ------------------------------------------------------------------------------------------------------------

def text_rows(quick, repeats, now):
    "Vectors of 20 classes in 85 sentences: encoded, and read from the file of an earlier call."
    name, names = ('farm', list(VOCABULARY[:3])) if quick else ('ViT-B-32', [f'class {i}' for i in range(20)]); clip, templates = clip_of(name), prompt_set('farm' if quick else 'imagenet85')
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder)/'texts.safetensors'; began = now(); first = text_features(clip, names, templates, file); seconds = now() - began
        row = timed_row(f'text vectors, {name}, {len(names)} classes x {len(templates)} sentences; plain: encoded, fast: from the file', lambda: text_features(clip, names, templates), lambda: text_features(clip, names, templates, file), 1, now, warm=0, error=apart(first, text_features(clip, names, templates, file)), allowed=0)
    row.more['seconds saved in every further start'] = row.plain - row.fast; row.more['first call, with writing'] = seconds
    yield row


# --- head ------------------------------------------------------------------------------------------------------------

def head_rows(quick, repeats, now):
    "An update of the head with its gradient: features asked of CLIP, or kept in half precision; the small recipe, and that of DIOR on random numbers."
    for name, cfg, count in [('LAPTOP', replace(LAPTOP, augment='none'), 4 if quick else 16)] + [('DIOR', replace(DIOR, augment='none'), 2)] * (not quick):
        clip = clip_of(cfg.clip_model); seed_everything('head'); model = Surgery(cfg, 20).train(); model.texts.copy_(units(20, model.texts.shape[1])); model.prior.fill_(.1)
        data = embedded('hard', size=cfg.side, train=count, val=0, test=0).split('train', ('image', 'boxes'), BoxView(cfg.side, clip.mean, clip.std)); samples = [data[i] for i in range(count)]
        batch = dict(image=torch.stack([s['image'] for s in samples]), boxes=[s['boxes'] for s in samples], box_labels=[s['box_labels'] for s in samples], index=torch.arange(count), view=[0] * count)
        began = time.perf_counter(); cache = Cache(clip, model.texts, data, replace(cfg, batch=count)); filled = time.perf_counter() - began
        def _step(features):
            model.zero_grad(); loss = total(losses(model, batch, 0, cfg, features()), model, 0, cfg); loss.backward(); return loss.detach()
        slow, fast = (lambda: _step(lambda: frozen_features(clip, batch['image'], model.texts, cfg))), (lambda: _step(lambda: cache(batch, torch.device('cpu'))))
        row = timed_row(f'training step of the head, {name}, {cfg.side} px, {cfg.grid} x {cfg.grid} cells, {count} images; plain: CLIP in every step, fast: kept features', slow, fast, repeats, now, error=apart(slow(), fast()), allowed=2e-2, aim=3 if name == 'DIOR' else None)
        row.more |= {'megabytes an image and view': sum(t[0, 0].numel() for t in (cache.cams, cache.tokens)) * 2 / 1e6, 'seconds to fill, an image': filled / count}
        yield row


PARTS = dict(features=feature_rows, path=path_rows, text=text_rows, head=head_rows)
