"""AffinityNet's hot paths straight from their equations: the forms that `bench_affinity` and the block tests hold the library against.

Pairs as two lists of indices that are gathered, a dense N x N matrix that is squared, one forward pass for each image, scale and mirror.
"""
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from wsl_nb.core import normalise


def listed_pairs(h, w, radius, border):
    "(first, second) flat cells of every pair, cell by cell; 'partial': first cells have all their offsets inside the grid."
    offsets = [(y, x) for y in range(radius) for x in range(1 - radius, radius) if x * x + y * y < radius * radius and (y > 0 or x > 0)]
    starts = [(y, x) for y in range(h) for x in range(w) if border == 'full' or (y <= h - radius and radius - 1 <= x <= w - radius)]
    pairs = [(y * w + x, (y + dy) * w + x + dx) for dy, dx in offsets for y, x in starts if y + dy < h and 0 <= x + dx < w]
    return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1)


def gathered_distances(e, pairs):
    "(B,D,h,w) -> (B,pairs): both ends are copied, subtracted, averaged."
    first, second = pairs
    flat = e.flatten(2)
    return (flat[:, :, first] - flat[:, :, second]).abs().mean(1)


def dense_transition(affinity, pairs, cells, beta, dtype=torch.float32):
    "(pairs) -> (N,N), columns sum to 1: symmetric, unit diagonal, powered, divided."
    matrix = torch.eye(cells, dtype=dtype)
    matrix[pairs] = affinity.to(dtype); matrix[pairs[::-1]] = affinity.to(dtype)
    matrix = matrix ** beta
    return matrix / matrix.sum(0, keepdim=True)


def squared_walk(scores, affinity, pairs, beta, doublings):
    "(K,h,w) after 2 ** doublings steps: the matrix is multiplied by itself."
    matrix = dense_transition(affinity, pairs, scores[0].numel(), beta)
    for _ in range(doublings): matrix = matrix @ matrix
    return (scores.flatten(1) @ matrix).view_as(scores)


def exact_walk(scores, affinity, pairs, beta, steps):
    "(K,h,w) in float64 after so many steps, one product a step."
    matrix = dense_transition(affinity, pairs, scores[0].numel(), beta, torch.float64).T.contiguous()
    x = scores.double().flatten(1).T
    for _ in range(steps): x = matrix @ x
    return x.T.reshape(scores.shape)


@torch.no_grad()
def one_by_one_cam(features, classifier, pictures, kinds, scales=(1., .5, 1.5, 2.)):
    "As `affinity.multi_scale_cam`: a forward pass for each picture, scale and mirror, all classes at full size."
    found = []
    for picture, own in zip(pictures, kinds):
        size, total = picture.shape[:2], 0.
        for scale in scales:
            h, w = (round(n * scale) for n in size)
            small = np.array(Image.fromarray(picture).resize((w, h), Image.Resampling.BICUBIC))
            for mirrored in (False, True):
                x = normalise(torch.from_numpy(small).permute(2, 0, 1)[None].float() / 255)
                cam = F.relu(F.conv2d(features(x.flip(-1) if mirrored else x), classifier.weight))
                cam = F.interpolate(cam, size=size, mode='bilinear', align_corners=False)[0]
                total = total + (cam.flip(-1) if mirrored else cam)
        total = total[own]
        found.append(total / (total.amax((1, 2), keepdim=True) + 1e-5))
    return found
