"Recomputes the golden vectors of FSGR: tower, language map, encoder, decoder, losses, gradients, beams, caption scores, prototypes."
import json

import torch
import torch.nn.functional as F
from parity import Near, Same

from wsl_nb import fsgr, fsgr_blocks as blocks, fsgr_decoder as dec, fsgr_memory as memory
from wsl_nb.fsgr_weights import from_official, living

GRAD = 1e-3 # Relative tolerance of gradients


def extra(folder, config):
    "Numbers beside the tensors: `values` of the config, and the caption scores."
    values = config['values']; numbers = {k: torch.tensor(v, dtype=torch.float64) for k, v in values.items() if isinstance(v, float) and k != 'beam_seconds'}
    numbers |= {f'grad_norm.{k}': torch.tensor(v, dtype=torch.float64) for k, v in values['grad_norms'].items()}
    numbers |= {f'count.{k}': torch.tensor(len(values[k])) for k in ('no_grad_params', 'requires_grad_false')}
    found = dict(values=numbers)
    if (folder / 'metrics.json').exists():
        config['sentences'] = json.loads((folder / 'metrics.json').read_text())
        found['metrics'] = {k: torch.tensor(v, dtype=torch.float64) for k, v in config['sentences']['scores'].items()}
    return found


def model_of(stored, config):
    "The captioner with the stored weights."
    return from_official(stored['weights'], config['heads'])


def tower_rows(model, stored, config):
    "Every stored block, the branch that the code does not use, and the three outputs."
    images, found, tower = stored['inputs']['image'], {}, model.backbone
    for i, (before, x) in enumerate(tower.blocks(images)):
        if f'visual.block{i}' in stored['visual']: found[f'visual.block{i}'] = Near(x, 1e-5)
    N = stored['visual']['visual.att_feats'].shape[1]
    from wsl_nb.fsgr_tower import csa_tokens
    found['visual.csa_branch'] = Near(csa_tokens(tower.visual.transformer.resblocks[-1], before[:, -N:]), 1e-5)
    for name, x in zip(('att_feats', 'global_feat', 'align_feats'), tower(images)): found[f'visual.{name}'] = Near(x, 1e-5)
    return {('visual', k): v for k, v in found.items()}


def geometry_rows(model, stored, config):
    "Embedding of distances and its weight in each head, for the stored rows."
    side = config['image_size'] // config['patch']; rows = stored['geometry']['rows']
    table = blocks.geometry_table((side, side)); at = blocks.cell_distances((side, side))[rows]
    weight = torch.stack([F.linear(table, g.weight, g.bias)[:, 0] for g in model.encoder.WGs]).relu()
    return {('geometry', 'box_embedding_rows'): Near(table[at], 2e-4), ('geometry', 'relative_weights_rows'): Near(weight[:, at], 2e-4)}


def encoder_rows(model, stored, config):
    "Language map, both streams, every layer of the encoder; then every layer of the decoder."
    images, words = stored['inputs']['image'], stored['inputs']['seq']; seen = model.look(images); q = model.tags(seen); features = model.features(seen)
    codebook = model.text_embed.text_embeddings; side = config['image_size'] // config['patch']
    places, bias = blocks.grid_positions((side, side), features.shape[-1]), model.encoder.bias((side, side)); e = model.encoder
    found = {'quant.global_logit': Near(seen.picture @ codebook.T, 1e-5), 'quant.top20': Same(q.top), 'quant.seg_logit': Near(q.scores, 1e-4), 'quant.index': Same(q.index), 'quant.text_grids': Near(q.grids, 1e-5), 'att_embed.out': Near(features, 1e-5),
             'encoder.pixel_embed': Near(e.pixel_embed(q.grids), 1e-5), 'pos.grid_embed': Near(places.expand(len(images), -1, -1), 1e-5), 'contrast_feats': Near(F.normalize(features, dim=-1).flatten(0, 1)[:, None], 1e-5)}
    x, seen_words = e.layer_norm(features), e.layer_norm(e.pixel_embed(q.grids))
    for i, layer in enumerate(e.layers): x = layer(x, seen_words, places, bias); found[f'encoder.layer{i}'] = Near(x, 1e-5)
    kept = []; log = model.decoder(words, model.understand(images), kept)
    return {('outputs', k): v for k, v in (found | {f'decoder.layer{i}': Near(y, 1e-5) for i, y in enumerate(kept)} | {'logprobs': Near(log, 1e-4)}).items()}


def gumbel_rows(stored):
    "The straight-through choice with the stored noise, and its gradient."
    i, o = stored['inputs'], stored['outputs']; scores = o['quant.seg_logit'].clone().requires_grad_(); words = stored['weights']['text_embed.text_embeddings'][o['quant.top20']]
    assign = fsgr.assign_tags(scores, i['gumbel.noise']); grids = assign.transpose(1, 2) @ words; (grids * i['gumbel.cotangent']).sum().backward()
    return {('outputs', 'gumbel.assign'): Near(assign.detach(), 1e-5), ('outputs', 'gumbel.text_grids'): Near(grids.detach(), 1e-5), ('outputs', 'gumbel.grad_logits'): Near(scores.grad, 1e-5, GRAD), ('outputs', 'gumbel.argmax_of_logits'): Same(scores.argmax(1))}


def loss_rows(model, stored, config):
    "Losses, the gradient of their sum for every parameter, and which parameters get none."
    i, values = stored['inputs'], config['values']; log, features = model(i['image'], i['seq']); z, labels = features.flatten(0, 1), i['labels'].long().flatten()
    found = {('values', 'ce'): Near(ce := fsgr.word_loss(log, i['seq']), 1e-5), ('values', 'supcon_labels'): Near(con := fsgr.contrast_loss(z, labels, rows=100), 1e-5), ('values', 'supcon_index'): Near(fsgr.contrast_loss(z, stored['outputs']['quant.index'].flatten()), 1e-5),
             ('values', 'forward_similarity_labels'): Near(fsgr.tag_similarity(z, labels), 1e-5), ('values', 'total_beta0.25'): Near(total := ce + .25 * con, 1e-5)}
    model.zero_grad(); total.backward(); dead = len(stored['weights']) - len(living(stored['weights']))
    own = dict(model.named_parameters()); have = {k: p.grad for k, p in own.items() if p.grad is not None}
    for k, v in values['grad_norms'].items(): found['values', f'grad_norm.{k}'] = Near(have[k].norm() if k in have else float('nan'), 1e-6, GRAD)
    for k in stored['outputs']:
        if k.startswith('grad.'): found['outputs', k] = Near(have[k.removeprefix('grad.')], 1e-6, GRAD)
    frozen = [k for k, p in own.items() if not p.requires_grad] + ['text_embed.text_embeddings']
    found['values', 'count.requires_grad_false'] = Same(torch.tensor(len(frozen))); found['values', 'count.no_grad_params'] = Same(torch.tensor(len(own) + 1 - len(have) + dead))
    x = F.normalize(i['supcon2.features'], dim=-1); n = len(x) # two views: all views of all samples are one set
    for name, tags in (('supcon2', i['supcon2.labels']), ('supcon2_selfsup', torch.arange(n))): found['values', name] = Near(fsgr.contrast_loss(i['supcon2.features'].transpose(0, 1).flatten(0, 1), tags.repeat(2)), 1e-5)
    return {k: Near(v.value.detach() if torch.is_tensor(v.value) else v.value, v.atol, v.rtol) if isinstance(v, Near) else v for k, v in found.items()}


def beam_rows(model, stored, config):
    "Beams of two widths, greedy words; the self-critical loss and its gradient."
    i, o, found = stored['inputs'], {}, {}; picture = model.understand(i['image']); B, steps = len(i['image']), config['gen_len']
    for name, beams in (('beam', 5), ('beam3', 3)):
        with torch.no_grad(): b = dec.beam_search(model.decoder.step, model.decoder.start(picture), dec.follow, B, beams=beams, steps=steps)
        found |= {f'{name}.words': Same(b.words), f'{name}.logprobs': Near(b.logprobs, 1e-4)}
        if name == 'beam': found['beam1.words'] = Same(b.words[:, 0])
    words = torch.full((B, 1), dec.BOS); cache = model.decoder.start(picture); line = []
    for _ in range(steps): log, cache = model.decoder.step(words, cache); words = log.argmax(-1); line.append(words)
    found['greedy.words'] = Same(torch.cat(line, 1))
    model.zero_grad(); loss = fsgr.critical_loss(fsgr.write(model, i['image'], 5, steps).logprobs, i['reward']); loss.backward()
    found['scst.grad.decoder.fc.weight'] = Near(model.decoder.fc.weight.grad, 1e-6, GRAD)
    norm = lambda part: torch.stack([p.grad.norm() if p.grad is not None else torch.zeros(()) for p in part.parameters()]).norm()
    return {('outputs', k): v for k, v in found.items()} | {('values', 'scst_loss'): Near(loss.detach(), 1e-5), ('values', 'scst_grad_norm_backbone'): Near(norm(model.backbone), 0), ('values', 'scst_grad_norm_encoder'): Near(norm(model.encoder), 1e-6, GRAD)}


def memory_rows(s):
    "Attention over words and prototypes, and a prototype's value from its nearest keys."
    heads, width = s['out.attn'].shape[1], len(s['b.q']); split = lambda t: t.unflatten(-1, (heads, -1)).transpose(-3, -2)
    q, k, v = (split(F.linear(s['x'], s[f'w.{n}'], s[f'b.{n}'])) for n in 'qkv'); m = memory.Prototypes(heads, width // heads, len(s['proto_k']), bank=len(s['knn.bank_k']))
    m.seg_input.data, m.seg_memory.data = s['seg_input'], s['seg_memory']; m.proto_k, m.proto_v, m.count = split(s['proto_k']), split(s['proto_v']), torch.tensor([1, 1])
    L = s['x'].shape[1]; k, v, look = m.extend(k, v, torch.ones(1, 1, L, L, dtype=torch.bool).tril())
    weights = (q @ k.transpose(-2, -1) / q.shape[-1] ** .5).masked_fill(~look, -torch.inf).softmax(-1)
    y = F.linear((weights @ v).transpose(1, 2).flatten(2), s['w.o'], s['b.o'])
    distance, index = torch.cdist(s['knn.centroids'], s['knn.bank_k'], compute_mode='donot_use_mm_for_euclid_dist').topk(s['knn.index'].shape[1], largest=False)
    return {('pma_oracle', k): v for k, v in {'out.attn': Near(weights.detach(), 1e-5), 'out.y': Near(y.detach(), 1e-5), 'knn.distance': Near(distance, 1e-5), 'knn.index': Same(index), 'knn.out_v': Near(memory.prototype_values(s['knn.centroids'], s['knn.bank_k'], s['knn.bank_v'], s['knn.index'].shape[1]), 1e-5)}.items()}


def meshed_rows(s, config):
    "The library's beam search on another model: every layer of its encoder, its words, its beams."
    import reference_m2 as m2
    w = {k.removeprefix('w.'): v for k, v in s.items() if k.startswith('w.')}; heads, words = config['m2']['h'], s['out.beam_words']
    encoded, mask = m2.encode(w, s['in.features'], heads); b = m2.beams(w, encoded, heads, words.shape[1], words.shape[2])
    return {('m2', k): v for k, v in {'out.encoder': Near(encoded, 1e-5), 'out.encoder_mask': Near(mask.float(), 0), 'out.logprobs': Near(m2.decode(w, s['in.seq'], encoded, heads), 1e-4), 'out.beam_words': Same(b.words), 'out.beam_logprobs': Near(b.logprobs, 1e-4)}.items()}


def caption_rows(s):
    "Caption scores from the stored tokenised sentences."
    from wsl_nb import captions
    keys = sorted(s['references_tok']); refs, hyps = [s['references_tok'][k] for k in keys], [s['hypotheses_tok'][k][0] for k in keys]
    corpus, each = captions.bleu(refs, hyps); rouge, rouges = captions.rouge_l(refs, hyps); found = dict(bleu_corpus=corpus, bleu_sentence=each, rouge_l=rouge, rouge_l_each=rouges)
    found['cider_d'], found['cider_d_each'] = captions.cider(refs, hyps); found['cider_d_scst'], found['cider_d_scst_each'] = captions.cider(refs, hyps, captions.document_frequencies([[c] for c in s['scst_df_corpus_tok']]))
    return {('metrics', k): Near(torch.as_tensor(v, dtype=torch.float64), 1e-9) for k, v in found.items()}


def compute(stored, config):
    "(file stem, name) -> recomputed tensor with its tolerance."
    model = model_of(stored, config); found = {}
    with torch.no_grad(): found |= tower_rows(model, stored, config) | geometry_rows(model, stored, config) | encoder_rows(model, stored, config)
    found |= gumbel_rows(stored) | loss_rows(model, stored, config) | beam_rows(model, stored, config)
    if 'pma_oracle' in stored: found |= memory_rows(stored['pma_oracle'])
    with torch.no_grad(): found |= meshed_rows(stored['m2'], config) if 'm2' in stored else {}
    return found | (caption_rows(config['sentences']) if 'metrics' in stored else {})
