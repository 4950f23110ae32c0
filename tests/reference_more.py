"""MoRe's blocks in the slowest form, straight from the equations of the specification, one element after the other.

The forms that the benchmark times (attention, maps, CRE, URE, picks, the whole step) live in `bench_more_plain`; here are those
that only the tests need, and the released CRE with its overflow, its masked infinity and its dead branch.
"""
import math

import torch
import torch.nn.functional as F

from bench_more_plain import plain_attention_block, plain_cre, plain_pick, plain_step_losses, plain_ure, plain_ure_candidates  # noqa: F401

PLAIN = ('plain_attention_block', 'plain_cre', 'plain_pick', 'plain_step_losses', 'plain_ure', 'plain_ure_candidates')


def plain_graph(layer, tokens, patches, keep, tails='tokens_patches', gate='sum_product'):
    "Class tokens after the graph layer, class by class and neighbour by neighbour."
    out = []
    for M, P in zip(tokens, patches):
        T = layer.tail_proj(P if tails == 'patches' else torch.cat([M, P]))
        rows = []
        for m in M:
            h = layer.head_proj(m)
            s = torch.stack([h @ t for t in T]) / math.sqrt(len(h))
            near = s.argsort(descending=True)[:keep].tolist()
            r = s[near].exp() / s[near].exp().sum()
            g = []
            for weight, j in zip(r, near):
                t, inner = T[j], torch.tanh(h + (1 - weight) * h + weight * T[j])
                g.append(t.sum() * inner.sum() if gate == 'sum_product' else (t * inner).sum())
            k = torch.stack(g).softmax(0)
            a = sum(w * T[j] for w, j in zip(k, near))
            rows.append(layer.norm(F.leaky_relu(layer.linear1(.1 * (h + a) + m)) + F.leaky_relu(layer.linear2(.1 * h * a + m))))
        out.append(torch.stack(rows))
    return torch.stack(out)


def plain_pairs(features, label_map):
    "PTC, pair by pair over the whole batch."
    near, far = [], []
    for f, m in zip(features.flatten(2), label_map.flatten(1)):
        for i in range(len(m)):
            for j in range(len(m)):
                if i == j or 255 in (m[i], m[j]): continue
                s = F.cosine_similarity(f[:, i], f[:, j], dim=0).abs()
                (near if m[i] == m[j] else far).append(s)
    return .5 * (1 - sum(near) / (len(near) + 1)) + .5 * sum(far) / (len(far) + 1)


def plain_balanced(logits, label_map):
    "Balanced cross-entropy, pixel by pixel; the label map has the size of the logits."
    sums, counts = [0., 0.], [0, 0]
    for b, y, x in torch.cartesian_prod(*(torch.arange(n) for n in label_map.shape)).tolist():
        c = int(label_map[b, y, x])
        if c == 255: continue
        sums[c > 0] += logits[b, :, y, x].logsumexp(0) - logits[b, c, y, x]
        counts[c > 0] += 1
    return .5 * sum(s / (n + 1e-6) for s, n in zip(sums, counts))


def released_cre(tokens, patches, label_map, label, tau=.5, eps=1e-4):
    "CRE as it was released: exponentials, a mask by multiplication, and a branch for a sum of zero."
    q, losses = F.normalize(tokens, dim=-1), []
    for b in range(len(q)):
        image = 0.
        for c in label[b].nonzero().flatten().tolist():
            e = torch.exp(patches[b].detach() @ q[b, c] / tau)
            each = -torch.log(e / (e.sum() + eps)) if e.sum() > 0 else torch.full_like(e, math.log(1 + eps))
            chosen = (label_map[b].flatten() == c + 1).float()
            image = image + (each * chosen).sum() / (chosen.sum() + 1e-4)
        losses.append(image)
    return sum(losses) / len(q)
