"What `bench.py affinity` times: the random walk, pair distances with their gradient, multi-scale CAM in batches, the CRF of two exponents."
import ctypes
import gc
import os
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

import bench_affinity_plain as plain
from bench import Row, alternate, timed_row
from wsl_nb import affinity as af, affinity_base as base, crf
from wsl_nb.affinity_labels import CRF
from wsl_nb.core import seed_everything, torch_rng
from wsl_nb.data import example

RADIUS, BETA = base.VOC_OFFICIAL.radius, base.VOC_OFFICIAL.beta


def noise(*shape, key='bench'): return torch.randn(*shape, generator=torch_rng('bench affinity', key, *shape))


def apart(a, b): return (a.double() - b.double()).abs().max().item()


# --- memory ----------------------------------------------------------------------------------------------------------

def status(field):
    "Megabytes of this process by a field of the system's status file; None where there is none."
    try: lines = Path('/proc/self/status').read_text().splitlines()
    except OSError: return None
    return next((int(l.split()[1]) / 1024 for l in lines if l.startswith(field + ':')), None)


def resident_peak(run):
    "Megabytes by which the resident memory rises at most while `run` runs; None where the system does not say."
    gc.collect()
    try:
        libc = ctypes.CDLL('libc.so.6')
        libc.mallopt(-3, 2 ** 17); libc.malloc_trim(0)                                     # freed blocks go back at once: what is kept for later would hide a rise, or be one
        Path('/proc/self/clear_refs').write_text('5')                                      # the peak starts again
    except (OSError, AttributeError): return None
    before = status('VmRSS'); kept = run()                                                 # the result counts
    peak = status('VmHWM') - before
    libc.mallopt(-3, 2 ** 25)                                                              # large blocks are kept again, as they are by default after a while
    return peak


def tensor_peak(run):
    "Megabytes of tensors alive at once at most while `run` runs, as the allocator reports each of them."
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')                                        # it talks about accelerators that it does not find
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen: kept = run()
    changes = sorted((e.start_ns(), e.nbytes()) for e in seen.profiler.kineto_results.events() if e.name() == '[memory]')
    alive = np.cumsum([n for _, n in changes])
    return max(float(alive.max()), 0.) / 2 ** 20


def megabytes(**forms):
    "Form -> peaks of both kinds."
    def middle(peaks): return None if None in peaks else statistics.median(peaks)          # holes in the heap make a single one differ by a few
    return {name: dict(tensors=tensor_peak(run), resident=middle([resident_peak(run) for _ in range(3)])) for name, run in forms.items()}


# --- walk ------------------------------------------------------------------------------------------------------------

def walk_scene(side, roughness):
    "(affinities on the grid, the same in a list with its pairs, two score maps); a smooth embedding with an edge and so much noise."
    e = F.interpolate(noise(1, 16, side // 4, side // 4), size=(side, side), mode='bilinear') * .3 + roughness * noise(1, 16, side, side)
    e[..., side // 2:] += 1
    pairs = plain.listed_pairs(side, side, RADIUS, 'partial')
    return af.pair_affinities(e, RADIUS, 'partial')[0], torch.exp(-plain.gathered_distances(e, pairs))[0], pairs, torch.stack([e[0, 0].sigmoid(), e[0, 1].sigmoid()])


def walk_forms(side, doublings, roughness=0.):
    "Functions that walk: dense, ours; and the scores before and after, in float64."
    grid, listed, pairs, scores = walk_scene(side, roughness)
    slow = lambda: plain.squared_walk(scores, listed, pairs, BETA, doublings)
    fast = lambda: af.random_walk(scores, af.transition(grid, (side, side), RADIUS, 'partial', BETA), 2 ** doublings)
    return slow, fast, scores, plain.exact_walk(scores, listed, pairs, BETA, 2 ** doublings)


def walk_rows(quick, repeats, now):
    "From affinities to two score maps after 256 steps; on a rough embedding many cells have hardly a neighbour, where rounding counts most."
    side, doublings = (12, 4) if quick else (64, 8)
    slow, fast, scores, exact = walk_forms(side, doublings)
    fast(); slow_runs, fast_runs = (alternate(dict(it=f), n, now, 0)['it'] for f, n in ((slow, 1 if quick else max(1, repeats - 1)), (fast, 5 * repeats)))
    rough_slow, rough_fast, rough_scores, rough = walk_forms(side, doublings, 1.)
    errors = {'smooth': dict(ours=apart(fast(), exact), dense=apart(slow(), exact)), 'rough': dict(ours=apart(rough_fast(), rough), dense=apart(rough_slow(), rough))}
    yield Row(f'random walk, {side}x{side}, 2 channels, {2 ** doublings} steps; plain: dense squaring', statistics.median(slow_runs), statistics.median(fast_runs), max(e['ours'] for e in errors.values()), 1e-5, 100,
              dict(plain=[min(slow_runs), max(slow_runs)], fast=[min(fast_runs), max(fast_runs)]),
              {'errors against the float64 walk': errors, 'largest change of a score': dict(smooth=apart(exact, scores), rough=apart(rough, rough_scores)),
               'extra MB (aim: ours 10)': megabytes(ours=fast, dense=slow)})


# --- pair distances --------------------------------------------------------------------------------------------------

def pair_rows(quick, repeats, now):
    "Forward and backward of one image at the width and grid of a 448-pixel crop."
    width, side = (12, 13) if quick else (448, 56)
    e, pairs = noise(1, width, side, side).requires_grad_(), plain.listed_pairs(side, side, RADIUS, 'partial')
    weight = noise(1, len(pairs[0]), key='weight')
    def slow():
        d = plain.gathered_distances(e, pairs)
        return d.detach(), torch.autograd.grad((d * weight).sum(), e)[0]
    def fast():
        d = af.pair_distances(e, RADIUS, 'partial').flatten(1)
        return d.detach(), torch.autograd.grad((d * weight).sum(), e)[0]
    error = max(map(apart, slow(), fast()))
    memory = megabytes(ours=fast, gather=slow)
    share = {k: memory['ours'][k] / memory['gather'][k] for k in memory['ours'] if memory['gather'][k]}
    yield timed_row(f'pair distances with gradient, {width} channels, {side}x{side}, B=1; plain: gather', slow, fast, repeats, now, error=error, allowed=1e-4, aim=6,
                    more={'extra MB': memory, 'share of the memory (aim 0.4)': share})


# --- multi-scale CAM -------------------------------------------------------------------------------------------------

def cam_rows(quick, repeats, now):
    "Eight pictures of one size with their mirrors in one batch at each scale, against one forward pass for each."
    for backbone, sides, count in ([('small', (48, 64), 2)] if quick else [('small', (96, 96), 8), ('resnet50', (64, 96), 8)]):
        seed_everything('bench affinity')
        net = base.Classifier(replace(base.VOC_OFFICIAL, backbone=backbone, frozen_until=''), 20).eval()
        pictures = [np.ascontiguousarray(example('wsss', 0, 'train', i, max(sides))['image'][:sides[0], :sides[1]]) for i in range(count)]
        kinds = [[i % 20, (i + 7) % 20] for i in range(count)]
        slow = lambda: torch.cat(plain.one_by_one_cam(net.backbone, net.cam_head, pictures, kinds))
        fast = lambda: torch.cat(af.multi_scale_cam(net.backbone, net.cam_head, pictures, kinds))
        yield timed_row(f'multi-scale CAM of {count} pictures, {sides[0]}x{sides[1]}, 4 scales, {backbone}, random weights; plain: one by one', slow, fast, 1 if quick else repeats, now,
                        error=apart(slow(), fast()), allowed=1e-4)


# --- CRF of two exponents --------------------------------------------------------------------------------------------

def crf_rows(quick, repeats, now):
    "Confident labels need a CRF under a low and a high exponent of the background; the kernels are the picture's."
    side = 48 if quick else 320
    picture = np.ascontiguousarray(example('wsss', 0, 'train', 0, side)['image'])
    cam = F.interpolate(noise(1, 1, 5, 5, key='cam'), size=(side, side), mode='bicubic')[0].sigmoid()
    both = torch.stack([af.background_score(cam, a) for a in (base.VOC_OFFICIAL.alpha_low, base.VOC_OFFICIAL.alpha_high)])
    for backend in ('pydensecrf', 'torch'):
        try: crf.crf_backend(backend)
        except crf.MissingPackage:
            yield Row(f'CRF of two exponents, {backend}', more={'not run': 'no such package'}); continue
        slow = lambda: torch.from_numpy(np.stack([crf.dense_crf(picture, p, CRF, backend) for p in both]))
        fast = lambda: torch.from_numpy(crf.dense_crf(picture, both, CRF, backend))
        yield timed_row(f'CRF of two exponents, {side}x{side}, {backend}; plain: two calls', slow, fast, 1 if quick else repeats, now, error=apart(slow(), fast()), allowed=1e-4)


PARTS = dict(walk=walk_rows, pairs=pair_rows, cam=cam_rows, crf=crf_rows)
