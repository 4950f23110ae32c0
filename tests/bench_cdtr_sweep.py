"Threshold sweep of `bench.py cdtr`: boxes of many maps at many thresholds, one by one and in one go."
import time

import cv2
import numpy as np

from bench import alternate, timed_row
from wsl_nb.boxes import boxes_at, enlarge
from wsl_nb.core import rng

SIZE, GRID = (224, 224), 14
KINDS = dict(smooth=0., rough=.1, noise=3.)  # spread of the noise on bumps of height 0.4 to 1


# --- plain ---------------------------------------------------------------------------------------------------------

def plain_grey(map, size, rule='minmax_bilinear'):
    "The enlarged map in 256 levels."
    return (enlarge(map, size, rule) * 255).astype(np.uint8)


def plain_box(grey, threshold, nothing=(0, 0, 1, 1)):
    "Box of the largest contour at one threshold."
    kept = cv2.threshold(grey, int(threshold * int(grey.max())), 255, cv2.THRESH_TOZERO)[1]
    contours = cv2.findContours(kept, cv2.RETR_TREE, cv2.CHAIN_APPROX_SIMPLE)[0]
    if not contours: return nothing
    x, y, w, h = cv2.boundingRect(max(contours, key=cv2.contourArea))
    return x, y, x + w, y + h


def plain_boxes(map, size, thresholds, rule='minmax_bilinear', nothing=(0, 0, 1, 1)):
    "From map to box for each threshold anew, as a sweep over calls does it."
    return np.float32([plain_box(plain_grey(map, size, rule), t, nothing) for t in thresholds])


def enlarged_once(map, size, thresholds):
    "A better plain form: the map is enlarged once, then every threshold on its own."
    grey = plain_grey(map, size)
    return np.float32([plain_box(grey, t) for t in thresholds])


# --- maps ----------------------------------------------------------------------------------------------------------

def bumps(noise, *key):
    "A map (14,14) of one to three objects with noise on every cell."
    r = rng('sweep', *key); y, x = np.mgrid[:GRID, :GRID]; out = noise * r.standard_normal((GRID, GRID))
    for _ in range(r.integers(1, 4)):
        cy, cx = r.uniform(2, GRID - 2, 2); out += r.uniform(.4, 1) * np.exp(-((y - cy) ** 2 + (x - cx) ** 2) / (2 * r.uniform(1.5, 4) ** 2))
    return out.astype(np.float32)


def maps_of(kind, n): return [bumps(KINDS[kind], kind, i) for i in range(n)]


# --- rows ----------------------------------------------------------------------------------------------------------

def rows(quick=False, repeats=3, now=time.process_time):
    "1,000 maps, a third of each kind, at 100 thresholds; the row's extras: each kind, and against the map enlarged once."
    count, thresholds = (12, np.arange(0, 1, .1)) if quick else (1000, np.arange(0, 1, .01))
    maps = [m for k, kind in enumerate(KINDS) for m in maps_of(kind, count // 3 + (k < count % 3))]
    run = lambda form, some: np.stack([form(m, SIZE, thresholds) for m in some])
    plain, fast = run(plain_boxes, maps), run(boxes_at, maps)
    row = timed_row(f'boxes of {count} maps at {len(thresholds)} thresholds', lambda: run(plain_boxes, maps), lambda: run(boxes_at, maps), repeats, now, warm=0,
                    error=float(np.abs(plain - fast).max()), allowed=0., aim=2.)
    row.more['boxes that differ'] = int((plain != fast).any(-1).sum())
    for kind in KINDS:
        some = maps_of(kind, count // 3)
        found = alternate({form.__name__: lambda form=form: run(form, some) for form in (plain_boxes, enlarged_once, boxes_at)}, repeats, now, warm=0)
        seconds = {name: float(np.median(v)) for name, v in found.items()}
        row.more[f'{kind} maps'] = dict(plain=seconds['plain_boxes'] / seconds['boxes_at'], enlarged_once=seconds['enlarged_once'] / seconds['boxes_at'])
    return [row]


PARTS = dict(sweep=rows)
