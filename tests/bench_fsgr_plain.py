"Plain forms of what `bench.py fsgr` times: beam search without caches and with caches of unprojected inputs, geometry of every picture, contrast as one matrix."
import math

import torch
import torch.nn.functional as F

from wsl_nb.fsgr_decoder import BOS, EOS, Beams


def chosen(state, parents):
    "Rows of each tensor of a state in the order of the chosen beams."
    at = torch.arange(len(parents))[:, None]
    return [t[at, parents] for t in state]


def search(step, state, images, beams, steps):
    "Beam search as the official code does it: all candidates sorted, all steps taken, sentences ordered at the end."
    words, score, alive, lines, logs = torch.full((images, 1), BOS), torch.zeros(images, 1), torch.ones(images, 1), [], []
    for t in range(steps):
        log, state = step(words, state); B, b, V = log.shape
        if t: alive = alive * (words != EOS).float(); log = log * alive[..., None]; old = score[..., None].expand_as(log).clone(); old[..., 1:] = -999
        candidates = score[..., None] + log
        if t: candidates = alive[..., None] * candidates + old * (1 - alive[..., None])
        score, flat = (x[:, :beams] for x in candidates.flatten(1).sort(-1, descending=True)); parents, words = flat // V, flat % V
        state = chosen(state, parents); alive = alive.gather(1, parents)
        lines = [x.gather(1, parents) for x in lines] + [words]; logs = [x.gather(1, parents) for x in logs] + [log.flatten(1).gather(1, flat)]
    score, order = score.sort(1, descending=True)
    return Beams(*(torch.stack(x, -1).gather(1, order[..., None].expand(-1, -1, steps)) for x in (lines, logs)), score)


def whole_prefix(decoder, picture):
    "Step that reads the sentence so far from its beginning, every time."
    def _step(words, state):
        so_far = torch.cat([*state, words[..., None]], -1) if state else words[..., None]; B, b, t = so_far.shape
        tokens = picture.tokens.repeat_interleave(b, 0)
        log = decoder(so_far.flatten(0, 1), picture._replace(tokens=tokens))[:, -1]
        return log.view(B, b, -1), [so_far]
    return _step


def attend(block, q, k, v, look=None):
    "Attention of a block from inputs: everything is projected."
    a = block.attention; split = lambda t: t.unflatten(-1, (a.heads, -1)).transpose(1, 2)
    q, k, v = split(a.fc_q(q)), split(a.fc_k(k)), split(a.fc_v(v)); logits = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return a.fc_o((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


def kept_inputs(decoder, picture):
    "Step that keeps the inputs of every layer and projects them all again, those of the picture for every beam too: the form of the official code."
    def _step(words, state):
        B, b = words.shape; t = state[0].shape[2] + 1 if state else 1; new = []
        x = decoder.word_emb(words.flatten()) + decoder.pos_emb.weight[t]; tokens = picture.tokens.repeat_interleave(b, 0)
        for i, layer in enumerate(decoder.layers):
            past = torch.cat([state[i], x.view(B, b, 1, -1)], 2) if state else x.view(B, b, 1, -1); new.append(past); inputs = past.flatten(0, 1); q = x[:, None]
            s = layer.lnorm1(q + layer.self_att.layer_norm(q + attend(layer.self_att, q, inputs, inputs)))
            c = layer.lnorm2(s + layer.enc_att.layer_norm(s + attend(layer.enc_att, s, tokens + picture.places, tokens))); x = layer.pwff(c)[:, 0]
        return decoder.fc(x).log_softmax(-1).view(B, b, -1), new
    return _step


def every_pair(encoder, grid, images):
    "Bias of the encoder as the official code makes it: 64 numbers for every pair of cells and every picture."
    y, x = (t.flatten().float() for t in torch.meshgrid(*(torch.arange(n) for n in grid), indexing='ij')); w = [1 / n + 1 for n in grid]
    apart = lambda t, n, side: ((t / n)[:, None] - (t / n)[None]).abs().div(side).clamp_min(1e-3).log()
    d = torch.stack([apart(y, grid[0], w[0]), apart(x, grid[1], w[1]), torch.zeros(len(y), len(y)), torch.zeros(len(y), len(y))], -1)[None].expand(images, -1, -1, -1)
    angle = (100 * d[..., None] / 1000 ** (torch.arange(8) / 8)).flatten(3); e = torch.cat([angle.sin(), angle.cos()], -1)
    return torch.stack([F.linear(e, g.weight, g.bias)[..., 0] for g in encoder.WGs], 1).relu().clamp_min(1e-6).log()


def one_matrix(z, tags, temperature=.07):
    "Supervised contrast from the whole matrix of products, by the formula."
    z = F.normalize(z, dim=-1); s = z @ z.T / temperature; s = s - s.amax(1, keepdim=True).detach(); others = 1 - torch.eye(len(z))
    log = s - (s.exp() * others).sum(1, keepdim=True).log(); same = (tags[:, None] == tags[None]).float() * others
    return -((same * log).sum(1) / same.sum(1).clamp_min(1)).mean()
