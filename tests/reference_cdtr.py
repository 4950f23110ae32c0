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
        return tensors[f'ocm.mix.{rest}'][int(block)][None]
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
