"What `bench.py fsgr` times: beam search, geometry, contrast, sentences that share a picture, CIDEr-D, a step of self-critical training."
from dataclasses import replace

import torch

import bench_fsgr_plain as plain
from bench import Row, gap, timed_row
from bench_captions import PARTS as SCORES
from wsl_nb.captions import document_frequencies
from wsl_nb.captions_vocabulary import SPECIALS, Vocabulary
from wsl_nb.core import seed_everything, torch_rng
from wsl_nb.data_farm import VOCABULARY
from wsl_nb.fsgr import Understood, contrast_loss, critical_loss
from wsl_nb.fsgr_base import COCO, LAPTOP
from wsl_nb.fsgr_blocks import Encoder, grid_positions
from wsl_nb.fsgr_decoder import Decoder, beam_search, follow
from wsl_nb.fsgr_training import losses_xe, new_model, rewards_of, total
from wsl_nb.vit_clip import random_clip


def noise(*shape, key='bench'): return torch.randn(*shape, generator=torch_rng('bench fsgr', key, *shape))


def words_of(count):
    "A vocabulary of so many words."
    return Vocabulary((*SPECIALS, *(f'w{i}' for i in range(count - len(SPECIALS)))))


# --- beam search -----------------------------------------------------------------------------------------------------

@torch.no_grad()
def beam_rows(quick, repeats, now):
    "A sentence of 20 words by 5 beams at the size of the recipe for COCO, encoder output given; the same words from both forms."
    V, D, N, steps = (50, 32, 16, 6) if quick else (10201, 512, 196, 20); seed_everything('bench beam'); side = round(N ** .5)
    decoder = Decoder(V, 54, 2 if quick else 4, D, 4 if quick else 8, 4 * D).eval(); decoder.fc.weight.data.mul_(4); picture = Understood(noise(1, N, D), grid_positions((side, side), D), None)
    fast = lambda: beam_search(decoder.step, decoder.start(picture), follow, 1, beams=5, steps=steps)
    for name, step in (('the whole sentence again for every word', plain.whole_prefix), ('unprojected inputs kept, as the official code does', plain.kept_inputs)):
        slow = lambda: plain.search(step(decoder, picture), [], 1, 5, steps); a, b = slow(), fast()
        row = timed_row(f'beam search, 5 beams, {steps} words, {V} in the vocabulary, {N} patches; plain: {name}', slow, fast, repeats, now, error=float((a.words != b.words).sum()), allowed=0, aim=None if quick else 6)
        row.more['largest difference of a score'] = gap(a.scores, b.scores); yield row


# --- encoder and losses ----------------------------------------------------------------------------------------------

@torch.no_grad()
def geometry_rows(quick, repeats, now):
    "The bias of two encoder layers for a batch."
    side, images = (4, 2) if quick else (14, 8); seed_everything('bench geometry'); encoder = Encoder(2, 512, 512, 8, 2048).eval()
    slow, fast = (lambda: plain.every_pair(encoder, (side, side), images)), (lambda: encoder.bias((side, side)).expand(images, -1, -1, -1))
    yield timed_row(f'geometry, {images} pictures of {side} x {side}; plain: every pair of every picture', slow, fast, repeats, now, error=(slow() - fast()).abs().max().item(), allowed=2e-2) # logarithms of small numbers whose angles are scaled by 100


def contrast_rows(quick, repeats, now):
    "Local contrast and its gradient; memory is what the form in rows is for."
    M, rows = (60, 16) if quick else (3136, 512); z, tags = noise(M, 512).requires_grad_(), torch.randint(0, 20, (M,), generator=torch_rng('tags'))
    def _run(loss): z.grad = None; value = loss(); value.backward(); return z.grad.clone()
    slow, fast = (lambda: _run(lambda: plain.one_matrix(z, tags))), (lambda: _run(lambda: contrast_loss(z, tags, rows=rows)))
    yield timed_row(f'contrast of {M} patches with its gradient; plain: one matrix', slow, fast, repeats, now, error=gap(slow(), fast()), allowed=1e-4)


def caption_rows(quick, repeats, now):
    "An update on pictures with five sentences each: the tower sees a picture five times, or once."
    cfg, clip = replace(LAPTOP, dropout=0., gumbel=False, beta=0.), random_clip('farm', list(VOCABULARY)); B = 1 if quick else 8
    model = new_model(cfg, Vocabulary((*SPECIALS, *VOCABULARY)), clip); model.backbone.dropout.p = 0.; model.train()
    images, said = noise(B, 3, 96, 96), [[' '.join(VOCABULARY[(i + j + k) % len(VOCABULARY)] for k in range(8)) for j in range(5)] for i in range(B)]
    def _step(batch):
        model.zero_grad(); loss = total(losses_xe(model, batch, 0, cfg), model, 0, cfg); loss.backward(); return loss.detach()
    slow = lambda: _step(dict(image=images.repeat_interleave(5, 0), captions=[[c] for own in said for c in own])); fast = lambda: _step(dict(image=images, captions=said))
    yield timed_row(f'update on {B} pictures with five sentences each; plain: a picture for every sentence', slow, fast, repeats, now, error=gap(slow(), fast()), allowed=1e-4)


# --- rewards ---------------------------------------------------------------------------------------------------------

def scst_rows(quick, repeats, now):
    "A step of self-critical training and what its parts take; nothing is compared."
    cfg, name, B, V = (LAPTOP, 'farm', 2, 37) if quick else (replace(COCO, tags='coco80', templates=('a photo of a {}.',)), 'ViT-B-16', 2, 10201); clip = random_clip(name, list(VOCABULARY)); seed_everything('bench scst')
    model = new_model(replace(cfg, word_init='xavier'), Vocabulary((*SPECIALS, *VOCABULARY)) if quick else words_of(V), clip).train(); rule = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-5)
    images, said = noise(B, 3, cfg.side, cfg.side), [[' '.join(model.vocabulary.words[4 + (i + j + k) % 20] for k in range(10)) for j in range(5)] for i in range(B)]; frequencies = document_frequencies([[s] for own in said for s in own]); shares = {}
    def _part(name, f): start = now(); out = f(); shares[name] = shares.get(name, 0) + now() - start; return out
    def _step():
        with torch.no_grad(): seen = _part('tower', lambda: model.look(images))
        picture = _part('encoder', lambda: model.understand(images, seen)); beams = _part('beam search', lambda: beam_search(model.decoder.step, model.decoder.start(picture), follow, B, beams=cfg.beams, steps=cfg.words))
        rewards = _part('reward', lambda: rewards_of(model, beams.words, said, frequencies)); loss = critical_loss(beams.logprobs, rewards)
        rule.zero_grad(); _part('gradient', loss.backward); _part('update', rule.step)
    _step(); shares.clear(); start = now()
    for _ in range(repeats): _step()
    took = now() - start
    yield Row(f'step of self-critical training, {name}, {B} pictures, {cfg.beams} beams, {cfg.words} words', fast=took / repeats, more={'pictures a second': B * repeats / took, 'shares of time': {k: v / took for k, v in shares.items()}})


PARTS = dict(beam=beam_rows, geometry=geometry_rows, contrast=contrast_rows, captions=caption_rows, scst=scst_rows) | SCORES
