"""FSGR in plain tensor code that shares nothing with the library: another directory of golden vectors, of any size.

Weights are a dictionary by the public copy's names. Everything is computed in float64 and stored as float32; gradients come from autograd on the dictionary,
beams from running every sentence anew, distances of cells pair by pair. The Meshed-Memory Transformer, prototypes and caption scores are written out too, in other sizes.
"""
import json
import math
from collections import Counter

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

PAD, BOS, EOS = 1, 2, 3
GRADS = ('att_embed.0.weight', 'backbone.visual.prompt_embeddings', 'backbone.visual.deep_prompt_embeddings', 'backbone.visual.prompt_proj.weight', 'encoder.WGs.0.weight', 'encoder.layer_norm.weight', 'decoder.fc.weight', 'decoder.word_emb.weight', 'decoder.layers.0.enc_att.attention.fc_k.weight')


class Unclear(Exception):
    "Two choices too near for float32 to tell them apart, or a <pad> in the middle of a sentence, after which all words are equal."


def clear(ok):
    "Raises `Unclear` if this is not so."
    if not ok: raise Unclear


# --- weights ---------------------------------------------------------------------------------------------------------

def matrix(random, name, into, out, bias=True): return {f'{name}.weight': random(out, into) * into ** -.5} | ({f'{name}.bias': random(out) * .1} if bias else {})
def gain(random, name, size): return {f'{name}.weight': 1 + random(size) * .1, f'{name}.bias': random(size) * .1}


def asking(random, name, D, inner):
    "Attention with four linear layers, and its norm."
    w = {}
    for k in 'qkv': w |= matrix(random, f'{name}.attention.fc_{k}', D, inner)
    return w | matrix(random, f'{name}.attention.fc_o', inner, D) | gain(random, f'{name}.layer_norm', D)


def forward_weights(random, name, D, hidden): return matrix(random, f'{name}.fc1', D, hidden) | matrix(random, f'{name}.fc2', hidden, D) | gain(random, f'{name}.layer_norm', D)


def tower_weights(c, random):
    "CLIP's tower with prompts and adapters."
    W, n, v = c['width'], c['image_size'] // c['patch'], 'backbone.visual'; low, high = c['adapter_layers']
    w = {f'{v}.conv1.weight': random(W, 3, c['patch'], c['patch']) * (3 * c['patch'] ** 2) ** -.5, f'{v}.class_embedding': random(W) * .2, f'{v}.positional_embedding': random(1 + n * n, W) * .3, f'{v}.proj': random(W, c['embed_dim']) * W ** -.5, 'backbone.logit_scale': torch.tensor(math.log(c['scale'])).double()}
    w |= {f'{v}.prompt_embeddings': random(1, c['num_tokens'], W) * .3, f'{v}.deep_prompt_embeddings': random(c['deep_layers'], c['num_tokens'], W) * .3} | matrix(random, f'{v}.prompt_proj', W, W)
    for name in ('ln_pre', 'ln_post', 'prompt_norm'): w |= gain(random, f'{v}.{name}', W)
    for i in range(c['layers']):
        b = f'{v}.transformer.resblocks.{i}'; w |= {f'{b}.attn.in_proj_weight': random(3 * W, W) * W ** -.5, f'{b}.attn.in_proj_bias': random(3 * W) * .1}
        w |= matrix(random, f'{b}.attn.out_proj', W, W) | gain(random, f'{b}.ln_1', W) | gain(random, f'{b}.ln_2', W) | matrix(random, f'{b}.mlp.c_fc', W, 4 * W) | matrix(random, f'{b}.mlp.c_proj', 4 * W, W)
        if low <= i <= high: w |= matrix(random, f'{b}.S_Adapter.D_fc1', W, W // 4) | matrix(random, f'{b}.S_Adapter.D_fc2', W // 4, W)
    return w


def weights_of(c, random):
    "A captioner of these sizes; the layer that nothing uses is there too."
    D, E, inner, hidden = c['d_model'], c['embed_dim'], c['h'] * c['d_k'], c['d_ff']; w = tower_weights(c, random) | {'text_embed.text_embeddings': F.normalize(random(c['n_tags'], E), dim=-1)}
    for name, into in (('att_embed', c['width'] + E), ('encoder.pixel_embed', E), ('encoder.global_embed', E)): w |= matrix(random, f'{name}.0', into, D) | gain(random, f'{name}.3', D)
    w |= gain(random, 'encoder.layer_norm', D)
    for i in range(c['h']): w |= matrix(random, f'encoder.WGs.{i}', 64, 1)
    for i in range(c['n_enc']): b = f'encoder.layers.{i}'; w |= asking(random, f'{b}.mhatt', D, inner) | gain(random, f'{b}.lnorm', D) | forward_weights(random, f'{b}.pwff', D, hidden)
    for i in range(c['n_dec'] + 1):
        b = f'decoder.layers.{i}'; w |= asking(random, f'{b}.self_att', D, inner) | asking(random, f'{b}.enc_att', D, inner) | gain(random, f'{b}.lnorm1', D) | gain(random, f'{b}.lnorm2', D) | forward_weights(random, f'{b}.pwff', D, hidden)
        w[f'{b}.enc_att.attention.fc_o.weight'] *= 3; w[f'{b}.enc_att.attention.fc_q.weight'] *= 2
    return w | {'decoder.word_emb.weight': random(c['vocab'], D), 'decoder.pos_emb.weight': random(c['max_len'] + 1, D), 'decoder.fc.weight': random(c['vocab'], D) * c['fc_scale'] * D ** -.5}


def trained(name): return not name.startswith(('backbone.', 'text_embed.')) or 'S_Adapter' in name or 'prompt' in name


def endings(table, hidden, boost):
    "Rows of the last layer that the mean of the words does not move, but for <eos>, which it favours, and <pad>, which it avoids: after that one all words would be equal."
    mean = hidden.mean(0); table -= (table @ mean)[:, None] * mean / mean.square().sum()
    for row, by in ((EOS, boost), (PAD, -40)): table[row] += by * mean / mean.square().sum()


# --- the captioner ---------------------------------------------------------------------------------------------------

def linear(w, name, x): return F.linear(x, w[f'{name}.weight'], w.get(f'{name}.bias'))
def norm(w, name, x, eps=1e-5): return F.layer_norm(x, x.shape[-1:], w[f'{name}.weight'], w[f'{name}.bias'], eps)
def quick(x): return x * (1.702 * x).sigmoid()
def mixed(logits, v): return (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)


def parts(w, b, x, heads):
    "Queries, keys, values of a block of CLIP."
    return F.linear(norm(w, f'{b}.ln_1', x), w[f'{b}.attn.in_proj_weight'], w[f'{b}.attn.in_proj_bias']).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)


def after_attention(w, b, x, found): x = x + found; return x + linear(w, f'{b}.mlp.c_proj', quick(linear(w, f'{b}.mlp.c_fc', norm(w, f'{b}.ln_2', x))))


def tower(w, c, images):
    "Name -> tensor: every block, the branch without use, the three outputs."
    v, seen, P, heads = 'backbone.visual', {}, c['num_tokens'], c['heads']; x = F.conv2d(images, w[f'{v}.conv1.weight'], stride=c['patch']).flatten(2).transpose(1, 2); B, N, _ = x.shape
    x = norm(w, f'{v}.ln_pre', torch.cat([w[f'{v}.class_embedding'].expand(B, 1, -1), x], 1) + w[f'{v}.positional_embedding']); first, patches = x[:, :1], x[:, 1:]
    for i in range(c['layers']):
        b = f'{v}.transformer.resblocks.{i}'; source = w[f'{v}.prompt_embeddings'][0] if i == 0 else w[f'{v}.deep_prompt_embeddings'][i - 1] if i <= c['deep_layers'] else w[f'{v}.prompt_embeddings'][0, :0]
        x = torch.cat([first, linear(w, f'{v}.prompt_proj', source).expand(B, -1, -1), patches], 1); q, k, value = parts(w, b, x, heads); a = linear(w, f'{b}.attn.out_proj', mixed(q @ k.mT * q.shape[-1] ** -.5, value))
        if f'{b}.S_Adapter.D_fc1.weight' in w: a = a + linear(w, f'{b}.S_Adapter.D_fc2', F.gelu(linear(w, f'{b}.S_Adapter.D_fc1', a)))
        before, x = patches, after_attention(w, b, x, a); first, patches = x[:, :1], x[:, -N:]; seen[f'visual.block{i}'] = x; assert x.shape[1] == 1 + N + P * (i <= c['deep_layers'])
    q, k, value = parts(w, b, before, heads); s = q.shape[-1] ** -.5; seen['visual.csa_branch'] = after_attention(w, b, before, linear(w, f'{b}.attn.out_proj', mixed(q @ q.mT * s, value) + mixed(k @ k.mT * s, value)))
    att, top = (norm(w, f'{v}.prompt_norm', t, 1e-6) for t in (patches, first[:, 0]))
    return seen | {'visual.att_feats': att, 'visual.global_feat': norm(w, f'{v}.ln_post', top) @ w[f'{v}.proj'], 'visual.align_feats': att @ w[f'{v}.proj']}


def embedded(w, name, x): return norm(w, f'{name}.3', F.celu(linear(w, f'{name}.0', x), 1.3))


def chosen(scores, words, noise=0.):
    "One tag a patch, soft in gradient, over the patches of that tag and one: (weights, language map)."
    soft = (scores + noise).softmax(1); hard = torch.zeros_like(soft).scatter(1, soft.argmax(1, keepdim=True), 1.); y = hard + soft - soft.detach(); y = y / (y.sum(2, keepdim=True) + 1)
    return y, y.mT @ words


def sine_code(n, D):
    "Row code, then column code, of every cell."
    half = D // 2; code = [[(math.sin if j % 2 == 0 else math.cos)(i / (n + 1e-6) * 2 * math.pi / 10000 ** (2 * (j // 2) / half)) for j in range(half)] for i in range(1, n + 1)]
    return torch.tensor([code[r] + code[k] for r in range(n) for k in range(n)], dtype=torch.float64)


def distance_code(n, rows):
    "64 numbers for each of these cells and every other cell."
    cells, found = [(r, k) for r in range(n) for k in range(n)], []; omega = torch.tensor([1000 ** (-k / 8) for k in range(8)], dtype=torch.float64)
    for a in rows: found.append([[math.log(max(abs(cells[a][axis] - cell[axis]) / n / (1 / n + 1), 1e-3)) for axis in (0, 1)] + [0., 0.] for cell in cells])
    angle = (100 * torch.tensor(found, dtype=torch.float64)[..., None] * omega).flatten(2)
    return torch.cat([angle.sin(), angle.cos()], -1)


def positive(w, c, code): return torch.stack([linear(w, f'encoder.WGs.{i}', code)[..., 0] for i in range(c['h'])]).relu()


def asked(w, name, q, k, v, heads, add=None):
    "Attention with something added to its logits, residual, norm."
    a = f'{name}.attention'; q_, k_, v_ = (linear(w, f'{a}.fc_{n}', t).unflatten(-1, (heads, -1)).transpose(1, 2) for n, t in zip('qkv', (q, k, v)))
    logits = q_ @ k_.mT * q_.shape[-1] ** -.5; return norm(w, f'{name}.layer_norm', q + linear(w, f'{a}.fc_o', mixed(logits if add is None else logits + add, v_)))


def fed(w, name, x): return norm(w, f'{name}.layer_norm', x + linear(w, f'{name}.fc2', linear(w, f'{name}.fc1', x).relu()))


def understood(w, c, seen):
    "Name -> tensor from the tower's outputs to the last layer of the encoder."
    att, top, align = (F.normalize(seen[f'visual.{k}'], dim=-1, eps=0) for k in ('att_feats', 'global_feat', 'align_feats')); codebook, o, n = w['text_embed.text_embeddings'], {}, c['image_size'] // c['patch']
    o['quant.global_logit'] = top @ codebook.T; o['quant.top20'] = torch.stack([torch.tensor(sorted(range(len(codebook)), key=row.__getitem__, reverse=True)[:20]) for row in o['quant.global_logit'].tolist()])
    words = codebook[o['quant.top20']]; o['quant.seg_logit'] = w['backbone.logit_scale'].exp() * words @ align.mT; o['quant.index'] = o['quant.top20'].gather(1, o['quant.seg_logit'].argmax(1)); o['quant.text_grids'] = chosen(o['quant.seg_logit'], words)[1]
    x = o['att_embed.out'] = embedded(w, 'att_embed', torch.cat([att, top[:, None].expand(-1, att.shape[1], -1)], -1)); o['contrast_feats'] = F.normalize(x, dim=-1).flatten(0, 1)[:, None]
    pos = sine_code(n, c['d_model']); o['pos.grid_embed'] = pos.expand(len(x), -1, -1); bias = positive(w, c, distance_code(n, range(n * n))).clamp(min=1e-6).log(); o['encoder.pixel_embed'] = embedded(w, 'encoder.pixel_embed', o['quant.text_grids'])
    x, map_ = (norm(w, 'encoder.layer_norm', t) for t in (x, o['encoder.pixel_embed']))
    for i in range(c['n_enc']): b = f'encoder.layers.{i}'; x = o[f'encoder.layer{i}'] = fed(w, f'{b}.pwff', norm(w, f'{b}.lnorm', x + asked(w, f'{b}.mhatt', x + pos, map_ + pos, map_, c['h'], bias)))
    return o


def start_of(words):
    "What every decoder begins with: positions, 0 at <pad>; what a word may not look at, as logits; 1 where there is a word."
    pad, L = words == PAD, words.shape[1]; never = torch.ones(L, L, dtype=torch.bool).triu(1) | pad[:, None, None]
    return torch.arange(1, L + 1).expand_as(words).masked_fill(pad, 0), torch.zeros(never.shape, dtype=torch.float64).masked_fill(never, -math.inf), (~pad)[..., None].double()


def decoded(w, c, words, tokens, pos):
    "Name -> output of each layer of the decoder, and the log-probabilities."
    places, never, keep = start_of(words); o, x = {}, w['decoder.word_emb.weight'][words] + w['decoder.pos_emb.weight'][places]
    for i in range(c['n_dec'] + 1):
        b = f'decoder.layers.{i}'; s = norm(w, f'{b}.lnorm1', x + asked(w, f'{b}.self_att', x, x, x, c['h'], never)) * keep
        found = norm(w, f'{b}.lnorm2', s + asked(w, f'{b}.enc_att', s, tokens + pos, tokens, c['h'])) * keep; x = o[f'decoder.layer{i}'] = fed(w, f'{b}.pwff', found) * keep
    return o | {'logprobs': linear(w, 'decoder.fc', x).log_softmax(-1)}


def beams(run, images, count, steps, apart=1e-4):
    "(words, log-probability of each word), both (images,count,steps): `run(picture of each sentence, sentences)` says what comes next; sentences are run anew for every word."
    lines = [[([], [], 0.)] for _ in range(images)] # words, tensors, score
    for _ in range(steps):
        flat = [(b, *line) for b in range(images) for line in lines[b]]; log = run([b for b, *_ in flat], torch.tensor([[BOS, *words] for _, words, *_ in flat])); options = [[] for _ in range(images)]
        for (b, words, tensors, score), own in zip(flat, log):
            if EOS in words: options[b].append((words + [0], tensors + [own[0] * 0], score)); continue
            options[b] += [(words + [k], tensors + [own[k]], score + p) for k, p in enumerate(own.tolist())]
        lines = [sorted(o, key=lambda line: -line[2])[:count + 1] for o in options]
        for own in lines: clear(apart is None or all(a[2] - b[2] > apart for a, b in zip(own, own[1:])) and not any(PAD in line[0] for line in own[:count]))
        lines = [own[:count] for own in lines]
    return torch.tensor([[line[0] for line in own] for own in lines]), torch.stack([torch.stack([torch.stack(line[1]) for line in own]) for own in lines])


def contrast(z, tags):
    "Supervised contrast of unit vectors, anchor by anchor, temperature .07; an anchor alone counts as zero."
    terms = []
    for i in range(len(z)):
        others = [a for a in range(len(z)) if a != i]; s = z[others] @ z[i] / .07; same = torch.tensor([int(tags[a]) == int(tags[i]) for a in others])
        terms.append(-(s - s.logsumexp(0))[same].mean() if same.any() else z.sum() * 0)
    return torch.stack(terms).mean()


def agreement(z, tags):
    "Mean cosine with those of the same tag, then over anchors."
    own = [[a for a in range(len(z)) if a != i and tags[a] == tags[i]] for i in range(len(z))]
    return torch.stack([(z[a] @ z[i]).mean() if a else z[i].sum() * 0 for i, a in enumerate(own)]).mean()


# --- files of a directory --------------------------------------------------------------------------------------------

def inputs_of(c, random, generator):
    "Pictures, sentences of different lengths, labels, rewards, noise."
    N, K, B, L = (c['image_size'] // c['patch']) ** 2, min(20, c['n_tags']), c['batch'], c['seq_len']; whole = lambda top, *s: torch.randint(top, s, generator=generator); seq = torch.full((B, L), PAD)
    for b in range(B): n = L - 2 - b % (L - 3); seq[b, :n + 2] = torch.tensor([BOS, *(whole(c['vocab'] - 4, n) + 4).tolist(), EOS])
    return dict(image=random(B, 3, c['image_size'], c['image_size']), seq=seq, labels=whole(6, B, N).double(), reward=torch.rand(B, 5, generator=generator).double(), **{'gumbel.noise': -(-torch.rand(B, K, N, generator=generator).double().clamp(min=1e-9).log()).log(), 'gumbel.cotangent': random(B, N, c['embed_dim']), 'supcon2.features': F.normalize(random(c['views'], 2, 10), dim=-1), 'supcon2.labels': whole(4, c['views'])})


def loss_values(w, c, i, o):
    "Losses, their gradients, and who gets none: (values, tensors)."
    z, labels = o['contrast_feats'][:, 0], i['labels'].flatten(); log = o['logprobs'][:, :-1].flatten(0, 1); target = i['seq'][:, 1:].flatten(); ce = -log[range(len(log)), target][target != PAD].mean(); con = contrast(z, labels); total = ce + .25 * con
    found = torch.autograd.grad(total, list(w.values()), allow_unused=True, retain_graph=True); have = {k: g for k, g in zip(w, found) if g is not None and trained(k)}; pair = i['supcon2.features'].transpose(0, 1).flatten(0, 1); n = len(pair) // 2
    values = {'ce': ce, 'supcon_labels': con, 'supcon_index': contrast(z, o['quant.index'].flatten()), 'forward_similarity_labels': agreement(z, labels.tolist()), 'total_beta0.25': total, 'supcon2': contrast(pair, i['supcon2.labels'].repeat(2)), 'supcon2_selfsup': contrast(pair, torch.arange(n).repeat(2))}
    last = f'backbone.visual.transformer.resblocks.{c["adapter_layers"][1]}.S_Adapter.D_fc2.weight'
    return {k: float(v.detach()) for k, v in values.items()} | dict(grad_norms={k: float(g.norm()) for k, g in have.items()}, no_grad_params=[k for k in w if k not in have], requires_grad_false=[k for k in w if not trained(k)]), {f'grad.{k}': have[k] for k in (*GRADS, last)}


def search_vectors(w, c, i, seen, apart):
    "Beams of two widths, greedy words; the self-critical loss, whose tower gets no gradient."
    o = understood(w, c, {k: t.detach() for k, t in seen.items()}); tokens, pos, steps = o[f'encoder.layer{c["n_enc"] - 1}'], o['pos.grid_embed'][0], c['gen_len']
    run = lambda pictures, words: decoded(w, c, words, tokens[pictures], pos)['logprobs'][:, -1]
    words, logs = beams(run, c['batch'], 5, steps, apart); found = {'beam.words': words, 'beam.logprobs': logs, 'beam1.words': words[:, 0]}; found['beam3.words'], found['beam3.logprobs'] = beams(run, c['batch'], 3, steps, apart)
    line = torch.full((c['batch'], 1), BOS)
    for _ in range(steps): best = run(range(c['batch']), line).topk(2); clear(apart is None or (best.values[:, 0] - best.values[:, 1] > apart).all() and not (best.indices[:, 0] == PAD).any()); line = torch.cat([line, best.indices[:, :1]], 1)
    found['greedy.words'] = line[:, 1:]; loss = -(logs.mean(-1) * (i['reward'] - i['reward'].mean(1, keepdim=True))).mean()
    names = [k for k in w if trained(k)]; grads = {k: g for k, g in zip(names, torch.autograd.grad(loss, [w[k] for k in names], allow_unused=True)) if g is not None}; length = lambda front: math.sqrt(sum(float(g.square().sum()) for k, g in grads.items() if k.startswith(front)))
    return found | {'scst.grad.decoder.fc.weight': grads['decoder.fc.weight']}, dict(scst_loss=float(loss.detach()), scst_grad_norm_backbone=length('backbone.'), scst_grad_norm_encoder=length('encoder.'))


def captioner_vectors(w, c, i, rows, apart=1e-4):
    "(file stem -> tensors, values) that follow from weights and inputs, in float64; `Unclear` where choices are nearer than `apart`, None: never."
    w = {k: t.double().requires_grad_() for k, t in w.items()}; i = {k: t.double() if t.is_floating_point() else t for k, t in i.items()}
    seen = tower(w, c, i['image']); o = understood(w, c, seen); o |= decoded(w, c, i['seq'], o[f'encoder.layer{c["n_enc"] - 1}'], o['pos.grid_embed'][0])
    best = o['quant.seg_logit'].topk(2, 1).values; clear(apart is None or (best[:, 0] - best[:, 1]).min() > 5 * apart and o['quant.global_logit'].sort(1).values.diff(dim=1).min() > .02 * apart)
    scores = o['quant.seg_logit'].detach().float().double().requires_grad_(); o['gumbel.assign'], o['gumbel.text_grids'] = chosen(scores, w['text_embed.text_embeddings'][o['quant.top20']].detach(), i['gumbel.noise']); o['gumbel.argmax_of_logits'] = scores.argmax(1)
    o['gumbel.grad_logits'], = torch.autograd.grad((o['gumbel.text_grids'] * i['gumbel.cotangent']).sum(), scores); values, grads = loss_values(w, c, i, o); found, more = search_vectors(w, c, i, seen, apart)
    code = distance_code(c['image_size'] // c['patch'], rows.tolist()); return dict(visual=seen, geometry=dict(rows=rows, box_embedding_rows=code, relative_weights_rows=positive(w, c, code)), outputs=o | grads | found), values | more


def captioner_files(c, random, generator):
    "(file stem -> tensors, values) of a captioner with random weights, whose last layer is bent to the words' mean."
    w, i, n = weights_of(c, random), inputs_of(c, random, generator), c['image_size'] // c['patch']
    with torch.no_grad(): o = understood(w, c, tower(w, c, i['image'])); kept = decoded(w, c, i['seq'], o[f'encoder.layer{c["n_enc"] - 1}'], o['pos.grid_embed'][0]); endings(w['decoder.fc.weight'], kept[f'decoder.layer{c["n_dec"]}'][i['seq'] != PAD], c['eos_boost'])
    w, i = ({k: t.float() if t.is_floating_point() else t for k, t in d.items()} for d in (w, i)); files, values = captioner_vectors(w, c, i, torch.randint(n * n, (4,), generator=generator))
    return dict(weights=w, inputs=i) | files, values


def meshed_vectors(c, random, generator):
    "The Meshed-Memory Transformer: encoder with memory slots, decoder with a gate for each layer of the encoder."
    D, h, inner, B, L, n = c['d_model'], c['h'], c['h'] * c['d_k'], c['batch'], c['seq_len'], c['layers']; w = matrix(random, 'encoder.fc', c['d_in'], D) | gain(random, 'encoder.layer_norm', D)
    for i in range(n):
        e, d = f'encoder.layers.{i}', f'decoder.layers.{i}'; w |= asking(random, f'{e}.mhatt', D, inner) | forward_weights(random, f'{e}.pwff', D, c['d_ff']) | {f'{e}.mhatt.attention.m_{k}': random(1, c['memory'], inner) / s for k, s in (('k', c['d_k']), ('v', c['memory']))}
        w |= asking(random, f'{d}.self_att', D, inner) | asking(random, f'{d}.enc_att', D, inner) | forward_weights(random, f'{d}.pwff', D, c['d_ff'])
        for j in range(n): w |= matrix(random, f'{d}.fc_alpha{j + 1}', 2 * D, D)
    w |= {'decoder.word_emb.weight': random(c['vocab'], D), 'decoder.pos_emb.weight': random(c['max_len'] + 1, D), 'decoder.fc.weight': random(c['vocab'], D) * 2.5 * D ** -.5}; w = {k: t.float().double() for k, t in w.items()}
    features = random(B, c['regions'], c['d_in']).float().double(); features[0, -2:] = 0; seq = torch.randint(4, c['vocab'], (B, L), generator=generator); seq[:, 0] = BOS; seq[0, -2:] = torch.tensor([EOS, PAD])
    x, layers = norm(w, 'encoder.layer_norm', linear(w, 'encoder.fc', features).relu()), []; clear((x.sum(-1) != 0).all()); cut = lambda t: t.unflatten(-1, (h, -1)).transpose(1, 2)
    for i in range(n):
        a = f'encoder.layers.{i}.mhatt.attention'; q, k, v = (linear(w, f'{a}.fc_{s}', x) for s in 'qkv'); k, v = (torch.cat([t, m.expand(B, -1, -1) * s ** .5], 1) for t, m, s in ((k, w[f'{a}.m_k'], c['d_k']), (v, w[f'{a}.m_v'], c['memory'])))
        found = mixed(cut(q) @ cut(k).mT * c['d_k'] ** -.5, cut(v)); x = fed(w, f'encoder.layers.{i}.pwff', norm(w, f'encoder.layers.{i}.mhatt.layer_norm', x + linear(w, f'{a}.fc_o', found))); layers.append(x)

    def _hidden(pictures, words):
        places, never, keep = start_of(words); y = w['decoder.word_emb.weight'][words] + w['decoder.pos_emb.weight'][places]
        for i in range(n):
            d = f'decoder.layers.{i}'; s = asked(w, f'{d}.self_att', y, y, y, h, never) * keep; each = [asked(w, f'{d}.enc_att', s, t[pictures], t[pictures], h) * keep for t in layers]
            y = fed(w, f'{d}.pwff', sum(e * linear(w, f'{d}.fc_alpha{j + 1}', torch.cat([s, e], -1)).sigmoid() for j, e in enumerate(each)) / n ** .5 * keep) * keep
        return y
    endings(w['decoder.fc.weight'], _hidden(range(B), seq)[seq != PAD], c['eos_boost']); w['decoder.fc.weight'] = w['decoder.fc.weight'].float().double(); log = lambda pictures, words: linear(w, 'decoder.fc', _hidden(pictures, words)).log_softmax(-1)
    words, logs = beams(lambda pictures, words: log(pictures, words)[:, -1], B, 5, c['steps'])
    return {f'w.{k}': t for k, t in w.items()} | {'in.features': features, 'in.seq': seq, 'out.encoder': torch.stack(layers, 1), 'out.encoder_mask': torch.zeros(B, 1, 1, c['regions']), 'out.logprobs': log(range(B), seq), 'out.beam_words': words, 'out.beam_logprobs': logs}


def prototype_vectors(c, random):
    "Attention over words and prototypes, query by query; values of prototypes from their nearest keys."
    d, h, L, M = c['d'], c['heads'], c['len'], c['prototypes']; s = {f'w.{k}': random(d, d) * d ** -.5 for k in 'qkvo'} | {f'b.{k}': random(d) * .1 for k in 'qkvo'} | dict(x=random(c['batch'], L, d), proto_k=random(M, d), proto_v=random(M, d), seg_input=random(d), seg_memory=random(d))
    s |= {'knn.bank_k': random(c['bank'], 7), 'knn.bank_v': random(c['bank'], 7), 'knn.centroids': random(M, 7)}; s = {k: t.float().double() for k, t in s.items()}; q, k, v = (F.linear(s['x'], s[f'w.{n}'], s[f'b.{n}']) for n in 'qkv')
    attn, mix = torch.zeros(c['batch'], h, L, L + M, dtype=torch.float64), torch.zeros_like(q)
    for b in range(c['batch']):
        for a in range(h):
            own = slice(a * d // h, (a + 1) * d // h)
            for t in range(L):
                keys = torch.cat([k[b, :t + 1, own] + s['seg_input'][own], s['proto_k'][:, own] + s['seg_memory'][own]]); p = (keys @ q[b, t, own] / (d // h) ** .5).softmax(0)
                attn[b, a, t, :t + 1], attn[b, a, t, L:] = p[:t + 1], p[t + 1:]; mix[b, t, own] = p @ torch.cat([v[b, :t + 1, own], s['proto_v'][:, own]])
    far = (s['knn.centroids'][:, None] - s['knn.bank_k'][None]).square().sum(-1).sqrt(); order = far.argsort(1)[:, :c['nearest']]; near = far.gather(1, order); clear(near.diff(dim=1).min() > 1e-5)
    return s | {'out.attn': attn, 'out.y': F.linear(mix, s['w.o'], s['b.o']), 'knn.index': order, 'knn.distance': near, 'knn.out_v': torch.stack([(-near[m]).softmax(0) @ s['knn.bank_v'][order[m]] for m in range(M)])}


# --- caption scores --------------------------------------------------------------------------------------------------

def grams(text, n): words = text.split(); return Counter(tuple(words[i:i + n]) for i in range(len(words) - n + 1))


def bleu(pairs):
    "Cumulative BLEU-1 to 4 of sentences with their references, counted together; the closest length of each."
    long = sum(len(h.split()) for _, h in pairs); short = sum(min((abs(len(r.split()) - len(h.split())), len(r.split())) for r in refs)[1] for refs, h in pairs); product, found = 1., []
    for n in range(1, 5):
        right = sum(min(count, max(grams(r, n)[g] for r in refs)) for refs, h in pairs for g, count in grams(h, n).items()); product *= (right + 1e-15) / (sum(sum(grams(h, n).values()) for _, h in pairs) + 1e-9)
        ratio = (long + 1e-15) / (short + 1e-9); found.append(product ** (1 / n) * (math.exp(1 - 1 / ratio) if ratio < 1 else 1))
    return found


def rouge(refs, h):
    "ROUGE-L: best precision and best recall of the longest common subsequence, not of one reference."
    def _common(a, b):
        row = [0] * (len(b) + 1)
        for x in a:
            before, row = row, [0]
            for j, y in enumerate(b): row.append(before[j] + 1 if x == y else max(before[j + 1], row[-1]))
        return row[-1]
    a = h.split(' '); long = [(_common(a, r.split(' ')), len(r.split(' '))) for r in refs]; p, r = max(n / len(a) for n, _ in long), max(n / size for n, size in long)
    return (1 + 1.2 ** 2) * p * r / (r + 1.2 ** 2 * p) if p and r else 0.


def cider_d(pairs, documents):
    "CIDEr-D of each sentence; a document is a list of captions."
    df = Counter(g for doc in documents for g in {g for text in doc for n in range(1, 5) for g in grams(text, n)}); vector = lambda text, n: {g: count * (math.log(len(documents)) - math.log(max(1, df[g]))) for g, count in grams(text, n).items()}; size = lambda v: math.sqrt(sum(x * x for x in v.values())); found = []
    for refs, h in pairs:
        total = 0.
        for r in refs:
            gap = sum(grams(h, 2).values()) - sum(grams(r, 2).values())
            for n in range(1, 5): a, b = vector(h, n), vector(r, n); product = sum(min(x, b.get(g, 0.)) * b.get(g, 0.) for g, x in a.items()); total += product / ((size(a) * size(b)) or 1) * math.exp(-gap ** 2 / 72) / 4
        found.append(10 * total / len(refs))
    return found


def caption_scores(refs, hyps, corpus):
    "Every score but METEOR, pictures in the order of their names."
    pairs = [(refs[k], hyps[k][0]) for k in sorted(refs)]; mean = lambda x: sum(x) / len(x); each, plain, scst = [rouge(*p) for p in pairs], cider_d(pairs, [r for r, _ in pairs]), cider_d(pairs, [[t] for t in corpus])
    return dict(bleu_corpus=bleu(pairs), bleu_sentence=[list(x) for x in zip(*(bleu([p]) for p in pairs))], rouge_l=mean(each), rouge_l_each=each, cider_d=mean(plain), cider_d_each=plain, cider_d_scst=mean(scst), cider_d_scst_each=scst)


def sentences(count, generator):
    "Captions of few words, and their scores."
    words = 'a red blue man dog ball grass on the with two sits runs under table'.split(); draw = lambda low, high: int(torch.randint(low, high, (1,), generator=generator)); text = lambda: ' '.join(words[draw(0, len(words))] for _ in range(draw(1, 12)))
    refs = {f'{i:03}': [text() for _ in range(draw(1, 6))] for i in range(count)}; hyps = {k: [text() if draw(0, 3) else r[0]] for k, r in refs.items()}; corpus = [text() for _ in range(4 * count)]
    return dict(references_tok=refs, hypotheses_tok=hyps, scst_df_corpus_tok=corpus, scores=caption_scores(refs, hyps, corpus))


def write_files(folder, c):
    "The directory of the seed in the config."
    generator = torch.Generator().manual_seed(c['seed']); random = lambda *s: torch.randn(*s, generator=generator).double(); files, values = captioner_files(c, random, generator)
    with torch.no_grad():
        if c['m2']: files['m2'] = meshed_vectors(c['m2'], random, generator)
        if c['pma_oracle']: files['pma_oracle'] = prototype_vectors(c['pma_oracle'], random)
    folder.mkdir(parents=True); (folder/'config.json').write_text(json.dumps(c | dict(values=values)))
    for name, tensors in files.items(): save_file({k: (v.float() if v.is_floating_point() else v).detach().clone().contiguous() for k, v in tensors.items()}, folder/f'{name}.safetensors')
    if c['captions']: (folder/'metrics.json').write_text(json.dumps(sentences(c['captions'], generator)))
    return folder


def write_directory(folder, seed, **sizes):
    "A directory as the golden one is, in other sizes; sizes not named are those of a small captioner. Where `m2`, `pma_oracle`, `captions` are None, their file is left out. A seed of unclear choices is passed over."
    c = dict(image_size=20, patch=4, width=24, heads=3, layers=3, embed_dim=16, num_tokens=2, deep_layers=2, adapter_layers=[1, 2], n_tags=30, d_model=16, d_k=6, h=2, d_ff=28, n_enc=1, n_dec=1, vocab=33, max_len=14, batch=3, seq_len=8, gen_len=6, fc_scale=2.5, eos_boost=2., scale=100, views=9, captions=8,
             m2=dict(d_in=14, d_model=12, h=3, d_k=4, d_ff=20, memory=3, vocab=29, max_len=12, layers=2, batch=3, regions=5, seq_len=6, steps=5, eos_boost=2.), pma_oracle=dict(batch=3, len=5, d=12, heads=3, prototypes=4, bank=33, nearest=3)) | sizes
    for c['seed'] in range(seed, seed + 100_000, 1000):
        try: return write_files(folder, c)
        except Unclear: pass
    raise Unclear(f'no seed of 100 from {seed} on')
