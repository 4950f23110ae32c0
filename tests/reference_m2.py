"The Meshed-Memory Transformer written from its paper and names: only so that the library's beam search runs on another model whose beams are stored."
import math

import torch
import torch.nn.functional as F

from wsl_nb.fsgr_decoder import PAD, beam_search


def linear(w, name, x): return F.linear(x, w[f'{name}.weight'], w.get(f'{name}.bias'))
def norm(w, name, x): return F.layer_norm(x, x.shape[-1:], w[f'{name}.weight'], w[f'{name}.bias'])


def attended(w, name, q, k, v, heads, look=None):
    "Attention with the memory slots of the encoder where there are some, residual, norm."
    a = f'{name}.attention'; keys, values = linear(w, f'{a}.fc_k', k), linear(w, f'{a}.fc_v', v); split = lambda t: t.unflatten(-1, (heads, -1)).transpose(1, 2)
    if f'{a}.m_k' in w:
        slots, width = w[f'{a}.m_k'].shape[1], w[f'{a}.m_k'].shape[2] // heads
        keys, values = (torch.cat([t, s * math.sqrt(f)], 1) for t, s, f in ((keys, w[f'{a}.m_k'].expand(len(k), -1, -1), width), (values, w[f'{a}.m_v'].expand(len(k), -1, -1), slots)))
    found = F.scaled_dot_product_attention(split(linear(w, f'{a}.fc_q', q)), split(keys), split(values), look).transpose(1, 2).flatten(2)
    return norm(w, f'{name}.layer_norm', q + linear(w, f'{a}.fc_o', found))


def forward_part(w, name, x): return norm(w, f'{name}.layer_norm', x + linear(w, f'{name}.fc2', linear(w, f'{name}.fc1', x).relu()))
def layers(w, part): return sum(k.startswith(f'{part}.layers.') and k.endswith('pwff.fc1.bias') for k in w)


def encode(w, features, heads):
    "Output of every encoder layer, (B,layers,N,D); no region is masked, since the test comes after the norm."
    x, outs = norm(w, 'encoder.layer_norm', linear(w, 'encoder.fc', features).relu()), []; mask = (x.sum(-1) == 0)[:, None, None]
    for i in range(layers(w, 'encoder')): x = forward_part(w, f'encoder.layers.{i}.pwff', attended(w, f'encoder.layers.{i}.mhatt', x, x, x, heads)); outs.append(x)
    return torch.stack(outs, 1), mask


def decode(w, words, encoded, heads):
    "Log-probabilities after every word, (B,L,V)."
    L, pad = words.shape[1], words == PAD; keep = (~pad)[..., None].float(); look = torch.ones(L, L, dtype=torch.bool).tril() & ~pad[:, None, None]
    x = w['decoder.word_emb.weight'][words] + w['decoder.pos_emb.weight'][torch.arange(1, L + 1).expand_as(words).masked_fill(pad, 0)]
    for i in range(layers(w, 'decoder')):
        name = f'decoder.layers.{i}'; s = attended(w, f'{name}.self_att', x, x, x, heads, look) * keep
        found = [attended(w, f'{name}.enc_att', s, encoded[:, j], encoded[:, j], heads) * keep for j in range(encoded.shape[1])]
        gates = [linear(w, f'{name}.fc_alpha{j + 1}', torch.cat([s, e], -1)).sigmoid() for j, e in enumerate(found)]
        x = forward_part(w, f'{name}.pwff', sum(e * g for e, g in zip(found, gates)) / math.sqrt(len(found)) * keep) * keep
    return linear(w, 'decoder.fc', x).log_softmax(-1)


def beams(w, encoded, heads, count, steps):
    "The library's beam search over this model, every word from the beginning."
    def _step(words, state):
        so_far = torch.cat([*state, words[..., None]], -1) if state else words[..., None]
        return decode(w, so_far.flatten(0, 1), encoded.repeat_interleave(so_far.shape[1], 0), heads)[:, -1].view(*words.shape, -1), [so_far]
    def _follow(state, parents): return [t[torch.arange(len(parents))[:, None], parents] for t in state]
    return beam_search(_step, [], _follow, len(encoded), beams=count, steps=steps)
