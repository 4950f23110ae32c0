"""PAR straight from its equations, one call a stack: the plain form that `crf.par_refine` is held against."""
import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = [(-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1)]


def neighbours(x: Tensor, dilations: tuple) -> Tensor:
    "The 8 neighbours at every dilation, replicate padding: (B,C,H,W) -> (B,C,8*len(dilations),H,W)."
    b, c, h, w = x.shape
    kernel = x.new_zeros(8, 1, 3, 3)
    for n, (dy, dx) in enumerate(DIRECTIONS): kernel[n, 0, dy + 1, dx + 1] = 1
    out = []
    for d in dilations:
        padded = F.pad(x, (d, d, d, d), mode='replicate').view(b * c, 1, h + 2 * d, w + 2 * d)
        out.append(F.conv2d(padded, kernel, dilation=d).view(b, c, 8, h, w))
    return torch.cat(out, 2)


def par_plain(image: Tensor, masks: Tensor, iterations: int = 10, dilations: tuple = (1, 2, 4, 8, 12, 24), w1: float = .3, w2: float = .01) -> Tensor:
    "(B,3,H,W) in [0,1] and (B,K,h,w) -> (B,K,H,W)."
    masks = F.interpolate(masks, size=image.shape[-2:], mode='bilinear', align_corners=True)
    around = neighbours(image, dilations)                                     # (B,3,N,H,W)
    difference = (around - image.unsqueeze(2)).abs()
    spread = around.std(2, keepdim=True)
    affinity = -(difference / (spread + 1e-8) / w1) ** 2
    affinity = affinity.mean(1, keepdim=True).softmax(2)                      # (B,1,N,H,W)
    distance = torch.tensor([d * (dy * dy + dx * dx) ** .5 for d in dilations for dy, dx in DIRECTIONS]).to(image)
    position = -(distance / (distance.std() + 1e-8) / w1) ** 2
    weight = affinity + w2 * position.softmax(0).view(1, 1, -1, 1, 1)
    for _ in range(iterations): masks = (neighbours(masks, dilations) * weight).sum(2)
    return masks
