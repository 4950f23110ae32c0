"""CLIP Surgery's hot paths straight from their equations: the forms that `bench_surgery` and the tests hold the library against.

Feature surgery with every product of token, class and channel; two streams through the last blocks with attention written out.
"""
import torch
import torch.nn.functional as F


def materialised(tokens, texts, temperature=2.):
    "The released form of feature surgery: products of every token, class and channel, minus their mean over classes, then the sum; a picture at a time."
    tokens, out = F.normalize(tokens, dim=-1), []
    for t in tokens:
        share = (temperature * t[:1] @ texts.T).softmax(-1); w = share / share.mean(-1, keepdim=True)
        products = t[:, None] * texts[None] * w.view(1, -1, 1); out.append((products - products.mean(1, keepdim=True)).sum(-1))
    return torch.stack(out)


def attended(q, k, v):
    "softmax(q k^T / sqrt(d)) v with the whole matrix."
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -.5).softmax(-1) @ v


def two_paths(clip, images, positions, blocks):
    "Both streams side by side: the last blocks compute queries, keys and values once, attend twice, and only the original stream passes the MLP; (B,1+N,E)."
    tower = clip.visual; x = tower.conv1(images).flatten(2).transpose(1, 2)
    x = tower.ln_pre(torch.cat([tower.class_embedding.expand(len(x), 1, -1), x], 1) + positions); new, stack = None, tower.transformer.resblocks
    for i, block in enumerate(stack):
        heads, y = block.attn.num_heads, block.ln_1(x)
        q, k, v = F.linear(y, block.attn.in_proj_weight, block.attn.in_proj_bias).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        if i >= len(stack) - blocks: new = (x if new is None else new) + block.attn.out_proj(attended(v, v, v).transpose(1, 2).flatten(2))
        x = x + block.attn.out_proj(attended(q, k, v).transpose(1, 2).flatten(2)); x = x + block.mlp(block.ln_2(x))
    return tower.ln_post(torch.cat([x[:, :1], new[:, 1:]], 1)) @ tower.proj
