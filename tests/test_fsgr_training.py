"Runs of the captioner: rates and presets by hand, what is refused, stages that stop early and resume bit for bit, sentences that become numbers, tags that are kept, poison, scores."
import json, math, shutil
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from test_cli import refused
from test_nonfinite import command, fails, stopped_and_replayed
from test_training import final, log, same, whole
from training_child import FSGR_TINY, prepare
from wsl_nb import fsgr_data, fsgr_training as recipe, training
from wsl_nb import training_checkpoint as disk
from wsl_nb.captions import caption_scores, cider, document_frequencies, tokenise
from wsl_nb.captions_vocabulary import SPECIALS, Vocabulary
from wsl_nb.core import BadInput, NonFinite, torch_rng
from wsl_nb.data_farm import CLASSES, VOCABULARY
from wsl_nb.fsgr import contrast_loss, critical_loss, word_loss, write
from wsl_nb.fsgr_base import CHANGES, CODEBOOKS, COCO, COCO_OFFICIAL, LAPTOP, LAPTOP_PLAIN, PRESETS, FSGRConfig, frozen_clip, preset_name, rate, stage_config, tag_names, tag_vectors
from wsl_nb.fsgr_data import Captioned, named_tags, split_tags, true_tags
from wsl_nb.vit import text_features

BARE = replace(FSGR_TINY, eval_split='', checkpoint_every=0, memory=0, data_train=6, steps=2) # Where scores do not matter
WORDS = Vocabulary((*SPECIALS, *'a the cat duck truck red on grass water sky'.split()))
SAID = [['a cat on grass', 'the red cat', 'a cat'], ['duck on water on the water', 'a duck', 'the duck on a sky']]


@pytest.fixture(autouse=True, scope='module')
def cache(tmp_path_factory):
    "A cache of this module's own: tags and sentences are made here."
    patch = pytest.MonkeyPatch(); patch.setenv('WSL_NB_CACHE', str(tmp_path_factory.mktemp('cache'))); yield; patch.undo()


@pytest.fixture(scope='module')
def clip(): return frozen_clip(FSGR_TINY, say=lambda *_: None)


def captioner(clip, words=WORDS, **changes): return recipe.new_model(replace(BARE, **changes), words, clip)
def pixels(n, key=0): return torch.randn(n, 3, 96, 96, generator=torch_rng('pixels', key))


# --- recipes -------------------------------------------------------------------------------------------------------

XE_RATES = [.25, .5, .75, 1, 1, 1, .2, .2, .2, .2, .2, .2, .04, .04] # Section 5, passes 1 to 14
SCST_RATES = {15: 1, 28: 1, 29: .2, 31: .2, 32: .04, 34: .04, 35: .008, 60: .008} # Overall pass -> factor


@pytest.mark.parametrize('cfg', [COCO, COCO_OFFICIAL], ids=preset_name)
def test_rates_of_every_pass(cfg):
    "The table of the specification; a factor of the base rate, never a rate itself, and never 0; the same within a pass."
    own = replace(stage_config(cfg, 'xe', 500), epochs=14, steps=14 * 10); assert own.lr == 2e-4
    for e, want in enumerate(XE_RATES): assert {round(rate(own, 10 * e + k, 'xe'), 9) for k in range(10)} == {want}
    own = replace(stage_config(cfg, 'scst', 500), epochs=50, steps=500); assert own.lr == 1e-5 and cfg.lr_max == 5e-3
    for before in (14, 14., 27, 40):
        for e, want in SCST_RATES.items():
            if before < e <= before + 50: assert {round(rate(own, int(10 * (e - 1 - before)) + k, 'scst', before), 9) for k in range(10)} == {want}


def test_other_schedules_go_by_step(clip):
    "One cycle over the steps of the stage; constant without passes; prompts and adapters at a share of the rate."
    own = replace(stage_config(LAPTOP, 'xe', 2000), steps=100); assert rate(own, 29, 'xe') == training.lr_factor(own, 29) == pytest.approx(1) and rate(own, 99, 'xe') < .01 and rate(replace(COCO, steps=10), 3, 'xe') == 1
    model = captioner(clip); new, old = recipe.groups(model, replace(COCO, lr=2e-4)); assert old['lr'] == pytest.approx(2e-5) and 'lr' not in new and len(new['params']) + len(old['params']) == sum(p.requires_grad for p in model.parameters()) and {id(p) for p in old['params']} == {id(p) for n, p in model.named_parameters() if 'prompt' in n or 'S_Adapter' in n}


def test_a_stage_gets_its_own_numbers():
    "Batch, rate, passes; an evaluation a pass unless a number is given; steps, batch and rate of the recipe win."
    xe, scst = (stage_config(COCO_OFFICIAL, s, n) for s, n in (('xe', 1000), ('scst', 200))); assert (xe.batch, xe.lr, xe.epochs, xe.evaluate_every) == (50, 2e-4, 100, 20) and (scst.batch, scst.lr, scst.epochs, scst.evaluate_every) == (10, 1e-5, 100, 20)
    own = stage_config(replace(COCO, steps=7, batch=3, lr=1e-3, accumulate=2, evaluate_every=0), 'scst', 60); assert (own.batch, own.lr, own.epochs, own.steps, own.evaluate_every) == (3, 1e-3, 0, 7, 10) and stage_config(COCO, 'xe', 3).evaluate_every == 1 and stage_config(LAPTOP, 'xe', 9999).evaluate_every == 100


def test_values_of_the_specification_and_ours():
    "Section 5 for the public copy; the other preset differs from it exactly where CHANGES says so; defaults are the public copy's."
    given = dict(prompts=100, deep=11, adapters=(6, 11), align='standard', shortlist=20, gumbel=True, area='count', dim=512, heads=8, feedforward=2048, encoder_layers=2, decoder_layers=4, dropout=.1, longest=54, least=5, beta=.25, temperature=.07, word_init='xavier', prompt_norm='identity', captions='one', optimizer='adam', betas=(.9, .98), weight_decay=0.,
                 xe_batch=50, xe_lr=2e-4, old_lr=.1, scst_lr=1e-5, scst_batch=10, patience=5, xe_least=15, xe_epochs=100, precision='fp16', clip=0., seed=42, side=224, beams=5, words=20, merge=True, templates=('a photo of a {}.',), accidental_mask=False, ema=0., accumulate=1)
    assert {k: getattr(COCO_OFFICIAL, k) for k in given} == given and replace(COCO_OFFICIAL, tags='') == FSGRConfig(); changed = {f.name for f in fields(FSGRConfig) if getattr(COCO, f.name) != getattr(COCO_OFFICIAL, f.name)}
    assert changed == CHANGES.keys() and all(isinstance(v, str) and len(v) > 20 for v in CHANGES.values()) and {f.name for f in fields(FSGRConfig) if getattr(LAPTOP, f.name) != getattr(LAPTOP_PLAIN, f.name)} == {'beta'} and [preset_name(c) for c in PRESETS.values()] == list(PRESETS) and preset_name(replace(COCO, heads=4)) == 'custom' and preset_name(replace(COCO, seed=1, clip_file='x')) == 'COCO'


FREE = {'lr_max', 'channels_last', 'compile', 'cudnn_benchmark', 'workers', 'checkpoint_every', 'log_every', 'keep_last', 'layout', 'data_preset', 'data_train', 'data_eval', 'init', 'clip_file'} # No number depends on these, or the hash of the data and of the files says it


def test_every_field_that_matters_is_part_of_a_hash():
    "A field that is in none could change under a finished stage. The second stage depends on the first."
    data = prepare('fsgr', {})[2]; base = recipe.stage_hashes(FSGR_TINY, data); other = lambda v: not v if isinstance(v, bool) else v + 1 if isinstance(v, (int, float)) else v + 'x' if isinstance(v, str) else v + v[:1]
    for f in fields(FSGRConfig):
        if f.name in FREE | {'clip_model', 'stages'}: continue
        new = recipe.stage_hashes(replace(FSGR_TINY, **{f.name: other(getattr(FSGR_TINY, f.name))}), data); assert new['scst'] != base['scst'] and (new['xe'] == base['xe']) == f.name.startswith('scst'), f.name
    assert list(recipe.stage_hashes(replace(FSGR_TINY, stages=('xe',)), data).items()) == list(base.items())[:1] and recipe.stage_hashes(FSGR_TINY, prepare('fsgr', dict(data_train=8))[2]) != base


def test_codebooks_are_read_as_they_are(tmp_path):
    "The number of tags is that of the file; what stands there twice, nothing at all, or no file is refused."
    file = tmp_path/'tags.txt'; file.write_text('red truck\n\n cat \ntraffic light\n'); assert tag_names(str(file)) == ['red truck', 'cat', 'traffic light'] and len(tag_names('coco80')) == len(set(CODEBOOKS['coco80'])) == 80 and {'zebra', 'handbag', 'hair drier'} < set(tag_names('coco80'))
    for text, says in (('a\nb\na\n', r"twice: \['a'\]"), (' \n', 'with 0 tags')):
        file.write_text(text)
        with pytest.raises(BadInput, match=says): tag_names(str(file))
    with pytest.raises(BadInput, match='nowhere.txt'): tag_names('nowhere.txt')


REFUSED = [(dict(train_split='test'), 'train_split "test"', '--train_split'), (dict(eval_split='nowhere'), 'eval_split "nowhere"', '--eval_split'), (dict(eval_split='train'), 'in train and in train', '--train_split'), (dict(stages=('scst',)), 'stages scst', ''), (dict(stages=('scst', 'xe')), 'stages scst xe', ''), (dict(stages=()), 'stages', ''), (dict(tags=''), 'no codebook', '--no_text'), (dict(tags='', text=False), 'no codebook', '--beta 0'),
           *[({k: v}, f'{k} {v}', f'--{k}') for k, v in dict(prompts=0, shortlist=0, least=0, longest=2, heads=0, encoder_layers=0, decoder_layers=0, beams=0, words=0, patience=0, memory_every=0, xe_rise=0, scst_batch=0, contrast_cells=-1, memory=-1, beta=-.1).items()],
           (dict(dim=62), 'dim 62 with 4 heads', '--heads'), (dict(heads=5), '5 heads', '--dim'), (dict(words=24), '24 words with 24 positions', '--longest'), (dict(beams=1), 'one beam', '--beams'), (dict(tags='nowhere.txt'), 'nowhere.txt', ''), (dict(dim=32), 'dim 32', '--dim'), (dict(adapters=(6, 8)), 'blocks 6 to 8', '--adapters'), (dict(deep=8), 'before 8 blocks', '--deep'),
           (dict(clip_file='nowhere.pt'), 'nowhere.pt', ''), (dict(labels='true', data_preset='single', tags='coco80', templates=('{}',)), '', ''), (dict(vocabulary='nowhere.json'), 'nowhere.json', ''), (dict(least=9999), 'none 9999 times', '')]
LATE = ('nowhere.txt', 'dim 32', 'blocks 6', 'before 8', '', 'nowhere.json', 'none 9999') # Refused when there is a folder already, before the first update


@pytest.mark.parametrize('changes, got, cure', REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else '')
def test_recipes_that_cannot_work_are_refused(tmp_path, changes, got, cure):
    "Before the first update, nearly all of them before anything is written; the message names the value and the flag."
    cfg, data = replace(BARE, stages=('xe', 'scst'), **changes) if 'stages' not in changes else replace(BARE, **changes), prepare('fsgr', {})[2]
    with pytest.raises(BadInput) as e: recipe.train(cfg, data, tmp_path/'run')
    assert got in e.value.got and cure in e.value.cure and not list(tmp_path.glob('run/*/checkpoints')) and (not (tmp_path/'run').exists() or got.startswith(LATE))


def test_a_set_without_sentences_is_refused():
    data = prepare('fsgr', {})[2]; data = SimpleNamespace(name='dumb', splits=data.splits, source=SimpleNamespace(fields=('image', 'label')))
    with pytest.raises(BadInput, match='dumb without captions'): recipe.check_recipe(BARE, data)
    assert recipe.check_recipe(replace(BARE, text=False, beta=0., tags=''), prepare('fsgr', {})[2]) is None and recipe.check_recipe(replace(BARE, beams=1, stages=('xe',)), prepare('fsgr', {})[2]) is None


# --- sentences, words, losses --------------------------------------------------------------------------------------

def test_items_are_pictures_or_sentences():
    "Every sentence once, with the picture that it belongs to; ids tell them apart; another number of lists is refused."
    split = prepare('fsgr', {})[2].split('train', ('image', 'captions')).first(3); said = [['a', 'b'], ['c'], ['d', 'e', 'f']]; one, every = Captioned(split, said, 'one'), Captioned(split, said, 'all')
    assert [(one[i]['captions'], one[i]['index'], one[i]['id']) for i in range(6)] == [([s], i, f'{split.ids[i]}#{k}') for i, own in enumerate(said) for k, s in enumerate(own)] and [(every[i]['captions'], every[i]['index'], every[i]['id']) for i in range(3)] == [(s, i, split.ids[i]) for i, s in enumerate(said)] and len(set(one.ids)) == 6
    with pytest.raises(BadInput, match='2 pictures'): Captioned(split, said[:2])


@pytest.mark.parametrize('hidden', [False, True])
def test_one_sentence_an_item_or_all_of_a_picture_train_alike(clip, hidden):
    "The same sentences: the same loss and the same gradient of every parameter, dropout and noise off; with hidden cells, too."
    model = captioner(clip, beta=0., accidental_mask=hidden).eval(); images = pixels(2); forms = dict(all=dict(image=images, captions=SAID), one=dict(image=images[torch.tensor([0, 0, 0, 1, 1, 1])], captions=[[s] for own in SAID for s in own])); found = {}
    if hidden: # no sums of zero by accident, which depend on the size of the batch; every seventh cell by intent
        for part in (model.att_embed, model.encoder.pixel_embed): part[3].bias.data += .1
        model.att_embed.register_forward_hook(lambda m, x, y: y * (torch.arange(144) % 7 > 0)[:, None]); assert (model.understand(images).hidden == (torch.arange(144) % 7 == 0)).all()
    for name, batch in forms.items(): model.zero_grad(); loss = recipe.losses_xe(model, batch, 0, replace(BARE, beta=0.))['xe']; loss.backward(); found[name] = loss.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad(): words = WORDS.batch([s for own in SAID for s in own])[0]; direct = word_loss(model(forms['one']['image'], words)[0], words).item()
    assert found['all'][0] == pytest.approx(found['one'][0], abs=1e-5) == pytest.approx(direct, abs=1e-5) and found['all'][1].keys() == found['one'][1].keys() and all(torch.allclose(g, found['one'][1][n], atol=2e-5, rtol=1e-3) for n, g in found['all'][1].items()) and 'backbone.visual.prompt_embeddings' in found['all'][1]


def test_numbers_of_a_batch_know_their_picture(clip):
    words, owner = recipe.numbers(captioner(clip), dict(image=pixels(2), captions=[['a zebra', 'the cat'], ['duck']]), 54); assert words.tolist() == [[2, 4, 0, 3], [2, 5, 6, 3], [2, 7, 3, 1]] and owner.tolist() == [0, 0, 1]
    assert recipe.numbers(captioner(clip), dict(image=pixels(1), captions=[['a the cat duck truck']]), 4)[0].tolist() == [[2, 4, 5, 3]]


def test_terms_are_those_of_the_weights(clip):
    "Contrast of the cells that were drawn, with their own tags; without beta no contrast; the total is the weighted sum."
    model, batch, tags = captioner(clip).eval(), dict(image=pixels(2), captions=SAID, index=torch.tensor([3, 1])), torch.randint(0, 5, (4, 144), generator=torch_rng(0)).short(); cfg = replace(BARE, contrast_cells=20, beta=.25); extra = recipe.given(batch, tags, cfg); assert torch.equal(extra['tags'], tags[[3, 1]].long()) and extra['cells'].shape == (2, 20) and all(len(set(c)) == 20 for c in extra['cells'].tolist())
    terms = recipe.losses_xe(model, batch, 0, cfg, **extra); assert terms.keys() == recipe.weights(cfg, 0).keys() == {'xe', 'contrast'}; z = model.features(model.look(batch['image'])); picked = torch.cat([z[i, extra['cells'][i]] for i in range(2)]), torch.cat([extra['tags'][i, extra['cells'][i]] for i in range(2)])
    assert terms['contrast'].item() == pytest.approx(contrast_loss(*picked).item(), abs=1e-6) and recipe.total(terms, model, 0, cfg).item() == pytest.approx((terms['xe'] + .25 * terms['contrast']).item()) and recipe.weights(cfg, 0, 'scst') == dict(scst=1.); plain = replace(BARE, beta=0.); assert recipe.losses_xe(model, batch, 0, plain).keys() == recipe.weights(plain, 0).keys() == {'xe'} and recipe.given(batch, None, plain) == {} and 'cells' not in recipe.given(batch, tags, replace(BARE, contrast_cells=144))


def test_word_table_by_word(clip):
    "CLIP's vector of each word at the row of the word, in any order of the vocabulary; zeros for special and unknown words; nothing overwrites them, and nothing of the kind without the wish."
    order = ['water', 'cat', 'zzz', 'red', 'truck', 'on']; other = Vocabulary((*SPECIALS, *order)); a = captioner(clip, other, word_init='clip').decoder.word_emb.weight
    for i, w in enumerate(order): assert torch.allclose(a[4 + i], text_features(clip, [w], ('{}',))[0] if w != 'zzz' else torch.zeros(64), atol=1e-5)
    assert not a[:4].any(); b = captioner(clip, other, word_init='xavier').decoder; limit = (6 / (10 + 64)) ** .5; assert b.word_emb.weight[1].any() and limit * .9 < b.word_emb.weight.abs().max() <= limit and (6 / (25 + 64)) ** .5 * .9 < b.pos_emb.weight.abs().max() <= (6 / (25 + 64)) ** .5


def test_self_critical_terms_by_hand(clip):
    "CIDEr-D of every beam with the frequencies of the training captions, each its own document; kept for a replay, which does not score again."
    model, cfg, batch = captioner(clip).eval(), replace(BARE, beams=3, words=6), dict(image=pixels(2), captions=SAID); frequencies = document_frequencies([[s] for own in SAID for s in own]); kept = []; beams = write(model, batch['image'], 3, 6)
    loss = recipe.losses_scst(model, batch, 0, cfg, kept, frequencies)['scst']; want = torch.tensor([[cider([SAID[i]], [WORDS.decode(w.tolist())], frequencies)[0] for w in beams.words[i]] for i in range(2)]); assert torch.allclose(kept[0], want, atol=1e-5) and loss.item() == pytest.approx(critical_loss(beams.logprobs, want).item(), abs=1e-6)
    assert recipe.losses_scst(model, batch, 0, cfg, [torch.zeros(2, 3)])['scst'].item() == 0 and recipe.losses_scst(model, batch, 0, cfg, kept)['scst'].item() == loss.item() and len(kept) == 1
    exact = recipe.rewards_of(model, torch.tensor([[WORDS.encode('a cat on grass') + [3, 0, 0], WORDS.encode('a cat on grass on sky sky')], [WORDS.encode('a cat on grass') + [3, 4, 4], WORDS.encode('duck on water') + [3, 0, 0, 0]]]), SAID, frequencies); assert exact[0, 0] > exact[0, 1] > 0 and exact[1, 1] > exact[1, 0]


def test_repeated_words_are_merged_only_when_asked(clip, monkeypatch):
    assert recipe.merged('a a cat cat a on on') == 'a cat a on' and recipe.merged('') == ''; model, lines = captioner(clip), torch.tensor([[[4, 4, 6, 6, 3, 0]], [[5, 7, 3, 0, 0, 0]]]); monkeypatch.setattr(recipe, 'write', lambda *a: SimpleNamespace(words=lines))
    assert recipe.sentences(model, pixels(2), replace(BARE, merge=True)) == ['a cat', 'the duck'] and recipe.sentences(model, pixels(2), replace(BARE, merge=False)) == ['a a cat cat', 'the duck']


# --- scores and tags -----------------------------------------------------------------------------------------------

def test_every_picture_is_written_about_once(clip, monkeypatch):
    "Twenty pictures in two batches: as many sentences, in order, each that of its own picture; the first record decides and is CIDEr-D; the mode of the model is as before."
    data = prepare('fsgr', dict(data_eval=20))[2]; split, seen, old = data.split('val'), [], recipe.sentences; model = captioner(clip, Vocabulary((*SPECIALS, *VOCABULARY))).train(); cfg = replace(BARE, words=5, beams=2); monkeypatch.setattr(recipe, 'sentences', lambda m, x, c: seen.append(x) or [f'{x[i].sum().item():.3f}' for i in range(len(x))])
    view = split.view(('image',), recipe.view_of(cfg, clip)); assert recipe.write_split(model.eval(), split, cfg) == [f'{view[i]["image"].sum().item():.3f}' for i in range(20)] and [len(x) for x in seen] == [16, 4]
    monkeypatch.setattr(recipe, 'sentences', old); model.train(); rows = recipe.evaluate(model, split, cfg); assert model.training and rows[0].metric == 'CIDEr-D' and all(r.images == 20 and r.split == 'val' for r in rows) and 'object F1' in {r.metric for r in rows}
    scores = caption_scores([tokenise(split[i]['captions']) for i in range(20)], recipe.write_split(model.eval(), split, cfg)); assert {r.metric: r.value for r in rows if r.metric in scores} == pytest.approx(scores)


def test_true_and_named_tags_by_hand():
    "More than half of a cell decides, else the ground that the sentences name; the best tag among those that are named, seen from its mean."
    mask = torch.zeros(4, 8, dtype=torch.uint8); mask[:2, :2] = 3; mask[:2, 2] = 1; mask[2:, :2], mask[2, 0] = 5, 0; tags = [CLASSES[4], 'grass', CLASSES[2]]
    assert true_tags(mask, ['a thing on the grass'], (2, 4), tags).tolist() == [2, 1, 1, 1, 0, 1, 1, 1] and true_tags(mask, ['nowhere'], (2, 4), tags).tolist()[1] == -1 and true_tags(mask, ['on grass'], (2, 4), ['grass']).tolist()[0] == -1
    scores = torch.tensor([[[.9, .1, .5], [.8, .3, .5]]]).repeat(3, 1, 1); assert named_tags(scores, [['a red truck'], ['the cat'], ['nothing']], ['cat', 'red truck', 'truck']).tolist() == [[2, 1], [0, 0], [0, 1]]


@pytest.mark.parametrize('labels', ['value', 'captions'])
def test_tags_of_pictures_are_kept(clip, monkeypatch, tmp_path, labels):
    "The second call asks CLIP for nothing and gives the same; those of another path, codebook or picture are made anew; they are what the frozen CLIP says of each picture alone."
    monkeypatch.setenv('WSL_NB_CACHE', str(tmp_path)); data = prepare('fsgr', dict(data_train=35))[2]; split, cfg = data.split('train', ('image', 'captions')), replace(BARE, labels=labels); book, calls, old = tag_vectors(clip, cfg), [], fsgr_data.frozen_scores; monkeypatch.setattr(fsgr_data, 'frozen_scores', lambda *a: calls.append(1) or old(*a))
    a = split_tags(clip, book, split, cfg); assert len(calls) == 2 and a.shape == (35, 144) and a.dtype == torch.int16; b = split_tags(clip, book, split, cfg); assert len(calls) == 2 and torch.equal(a, b)
    view = split.view(('image', 'captions'), recipe.view_of(cfg, clip)); scores = old(clip, torch.stack([view[i]['image'] for i in range(35)]), book, 'vv' if labels == 'captions' else labels); want = named_tags(scores, [tokenise(view[i]['captions']) for i in range(35)], tag_names(cfg.tags)) if labels == 'captions' else scores.argmax(-1); assert (a == want).float().mean() > .99
    for other in (replace(cfg, labels='csa'), replace(cfg, templates=('the {}',))): n = len(calls); split_tags(clip, tag_vectors(clip, other), split, other); assert len(calls) > n
    n = len(calls); assert split_tags(clip, book, split.first(3), cfg).shape == (3, 144) and len(calls) > n


# --- runs ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def run(tmp_path_factory, cache):
    "A finished run of both stages with a memory, all checkpoints kept, and its data."
    out, before = tmp_path_factory.mktemp('fsgr')/'run', torch.get_num_threads(); torch.set_num_threads(1); module, cfg, data = prepare('fsgr', dict(keep_last=9, accumulate=2)); module.train(cfg, data, out); torch.set_num_threads(before)
    return out, cfg, data


@pytest.mark.parametrize('stage, steps', [('xe', 2), ('xe', 3), ('scst', 4)])
def test_resumed_equals_uninterrupted(run, tmp_path, stage, steps):
    "Cut back to a checkpoint of a stage: weights, banks, prototypes and logs are the same bit for bit; the stage before is not touched."
    out, cfg, data = run; cut = Path(shutil.copytree(out, tmp_path/'cut'))
    for note in (cut/'result.json', cut/stage/'result.json'): note.unlink()
    if stage == 'xe': shutil.rmtree(cut/'scst')
    for folder in disk.checkpoints(cut/stage):
        if int(folder.name.split('_')[1]) > steps: shutil.rmtree(folder)
    torch.rand(3); result = recipe.train(cfg, data, cut, resume=True); same(out, cut); assert result['finished'] and result['steps'] == 12 and result['stages'].keys() == {'xe', 'scst'}


def test_banks_are_in_checkpoints_and_stand_still_in_the_second_stage(run):
    "The first stage fills and clusters; the second starts from its best checkpoint, moves neither prototypes nor anything of CLIP's tower, and does move the rest."
    out, cfg, _ = run; best = json.loads((out/'xe'/'result.json').read_text())['best']['step']; start, end = (load_file(f/'model.safetensors') for f in (out/'xe'/'checkpoints'/f'step_{best:06d}', disk.checkpoint(out/'scst'))); m = 'decoder.layers.0.memory.'
    early, late = (load_file(out/'xe'/'checkpoints'/f'step_{s:06d}'/'model.safetensors') for s in (2, 6)); assert late[m + 'count'][0] > early[m + 'count'][0] > 0 and (early[m + 'count'][1], late[m + 'count'][1]) == (1, 3) and not torch.equal(early[m + 'proto_k'], late[m + 'proto_k']) and late[m + 'bank_k'].any()
    still = {k for k in start if torch.equal(start[k], end[k])}; assert {k for k in start if k.startswith('backbone.')} | {k for k in start if any(s in k for s in ('proto_', 'bank_', '.count'))} <= still and {k for k in start if k.startswith(('decoder.', 'encoder.', 'att_embed.')) and k.endswith('weight')} - still > {'decoder.fc.weight', 'encoder.layers.0.pwff.fc1.weight', 'att_embed.0.weight'}
    a, b = ([l for l in log(out/s) if 'terms' in l] for s in ('xe', 'scst')); assert [set(l['terms']) for l in a + b] == [{'xe', 'contrast'}] * 6 + [{'scst'}] * 6 and all(l['weights'] == dict(scst=1.) for l in b) and all(l['weights'] == dict(xe=1., contrast=.25) for l in a)


def test_stale_counts_from_the_best_score_and_not_before_its_pass():
    "Patience evaluations without a better one; before a pass of the first stage the count begins anew instead; nothing but what a checkpoint holds."
    cfg = replace(COCO, patience=3, evaluate_every=10, xe_least=5, epochs=50, steps=500); at = lambda step, best, stage, c=cfg: recipe.stale(SimpleNamespace(step=step, best=best and dict(step=best, value=1.), cfg=c), c, stage)
    assert not at(499, None, 'xe') and [s for s in range(10, 120, 10) if at(s, 10, 'scst')][0] == 40 and [s for s in range(10, 120, 10) if at(s, 10, 'xe')][0] == 70 and [s for s in range(10, 200, 10) if at(s, 60, 'xe')][0] == 90 and not at(30, 10, 'scst') and at(40, 10, 'xe', replace(cfg, epochs=0))


def test_early_stopping_ends_both_stages(tmp_path, monkeypatch):
    "With a score that never rises: patience evaluations after the first, in each stage; finished in result.json; a run that was killed before its note ends without another update."
    _, cfg, data = prepare('fsgr', dict(steps=0, xe_epochs=40, scst_epochs=30, xe_least=4, patience=2, evaluate_every=0, memory=0, data_train=6, batch=3, checkpoint_every=1, keep_last=99)); scored = []; monkeypatch.setattr(recipe, 'evaluate', lambda *a: scored.append(1) or [dict(metric='CIDEr-D', value=5.)])
    result = recipe.train(cfg, data, tmp_path/'run'); notes = {s: json.loads((tmp_path/'run'/s/'result.json').read_text()) for s in recipe.STAGES}; assert result['finished'] and all(n['finished'] for n in notes.values()) and (notes['xe']['steps'], notes['scst']['steps'], len(scored)) == (10, 6, 8) and notes['xe']['best']['step'] == notes['scst']['best']['step'] == 2
    before = final(tmp_path/'run'); (tmp_path/'run'/'result.json').unlink(); (tmp_path/'run'/'scst'/'result.json').unlink(); monkeypatch.setattr(recipe, 'losses_scst', None); again = recipe.train(cfg, data, tmp_path/'run', resume=True); assert again['finished'] and again['steps'] == 16 and len(scored) == 8 and all(torch.equal(v, final(tmp_path/'run')[k]) for k, v in before.items())
    assert disk.checkpoint(tmp_path/'run'/'scst', 'best').name == 'step_000002' and recipe.load_run(tmp_path/'run')[0].training is False


def test_a_loss_at_chance_ends_the_run(tmp_path, monkeypatch):
    "Guessing after so many updates: named with ln V and the rates, in the log, too. A loss that has moved goes on."
    made = recipe.new_model; monkeypatch.setattr(recipe, 'CHANCE', 2); cfg, data = replace(BARE, steps=4, stages=('xe',), xe_lr=1e-7), prepare('fsgr', dict(data_train=6))[2]
    def _guessing(*args): model = made(*args); model.decoder.fc.weight.data.zero_(); return model
    monkeypatch.setattr(recipe, 'new_model', _guessing)
    with pytest.raises(BadInput, match=r'chance level: loss .* ln \d+ = .*rates .*e-') as e: recipe.train(cfg, data, tmp_path/'run')
    assert e.value.got in (tmp_path/'run'/'xe'/'log.jsonl').read_text() and 'rate' in e.value.cure; run = SimpleNamespace(step=2, log=None, device='cpu', processes=1, optimizer=SimpleNamespace(param_groups=[dict(lr=0.)]))
    assert recipe.check_chance(run, .9 * math.log(34), 34) is None and recipe.check_chance(SimpleNamespace(step=1), math.log(34), 34) is None
    with pytest.raises(BadInput, match=r'rates 0\.00e\+00'): recipe.check_chance(run, math.log(34), 34)


def test_the_vocabulary_of_another_run_is_refused(run, tmp_path):
    "Other words in the same number, or more of them; the run's own is taken, and its model writes."
    out, cfg, _ = run; own = Vocabulary.load(out/'vocabulary.json'); model, found = recipe.load_stage(out, 'xe'); assert found == cfg and model.vocabulary.hash == own.hash and not model.training and len(recipe.sentences(model, pixels(2), cfg)) == 2
    cut = Path(shutil.copytree(out, tmp_path/'cut')); assert torch.equal(recipe.load_run(cut)[0].decoder.fc.weight.cpu(), load_file(disk.checkpoint(out/'scst', recipe.best_or_last(out/'scst'))/'model.safetensors')['decoder.fc.weight'])
    for words in ((*own.words[:4], *reversed(own.words[4:])), (*own.words, 'zebra')):
        Vocabulary(words).save(cut/'vocabulary.json')
        with pytest.raises(BadInput, match='vocabulary|misshaped'): recipe.load_stage(cut, 'xe')
    with pytest.raises(BadInput, match='without a checkpoint'): recipe.load_run(tmp_path/'nothing')


@pytest.mark.parametrize('words, says', [(['--beams', '3'], 'beams: 5 -> 3'), (['--beta', '0'], 'beta'), (['--scst_lr', '1e-4'], 'scst_lr'), (['--word_init', 'xavier'], 'word_init')])
def test_a_changed_field_is_named_on_resume(run, tmp_path, capsys, words, says):
    code, text = refused(capsys, *command(tmp_path, run[1], run[0], '--resume', *words, method='fsgr')); assert code == 2 and says in text


def planted(monkeypatch, stage, name):
    "The model of a stage starts with one number that is not finite."
    begin = recipe.start_of
    def _start(which, *args):
        model, before = begin(which, *args)
        if which == stage: dict(model.named_parameters())[name].data.view(-1)[-1] = torch.nan
        return model, before
    monkeypatch.setattr(recipe, 'start_of', _start)


@pytest.mark.parametrize('term, stage', [('xe', 'xe'), ('contrast', 'xe'), ('scst', 'scst')])
@pytest.mark.parametrize('memory', [0, 4])
def test_each_term_is_named_and_replayed(tmp_path, capsys, monkeypatch, term, stage, memory):
    "Exit 3 with the term and the pictures, in either stage; `wsl-nb replay` and `replay` with the model of the run end in the same term."
    out = tmp_path/'run'; cfg = replace(BARE, memory=memory, **dict(temperature=1e-40) if term == 'contrast' else {})
    if term != 'contrast': planted(monkeypatch, stage, 'decoder.fc.weight')
    code, text = fails(capsys, *command(tmp_path, cfg, out, method='fsgr')); assert code == 3 and f'"{term}"' in text and 'step 0' in text and str(out/stage/'nonfinite') in text, text
    stopped_and_replayed(capsys, out, term, 0, stage)
    with pytest.raises(NonFinite) as e: training.replay(out/stage/'nonfinite', recipe, recipe.model_of_run(out/stage/'nonfinite'))
    assert e.value.term == term


def test_bf16_with_a_memory(tmp_path, monkeypatch):
    "Both stages, clustering after each update: every term and weight is finite. Items of the first stage are sentences if the recipe says so, those of the second always pictures. Rewards count every training sentence as a document."
    counted, count = [], recipe.document_frequencies; monkeypatch.setattr(recipe, 'document_frequencies', lambda documents: counted.extend(documents) or count(documents)); whole(tmp_path/'a', 'fsgr', precision='bf16', steps=2, eval_split='', checkpoint_every=0, data_train=6, memory_every=1, captions='one'); lines = [l for l in log(tmp_path/'a') if 'terms' in l]
    assert len(lines) == 4 and all(math.isfinite(v) for l in lines for v in (*l['terms'].values(), l['total'], l['gradient_norm'])) and all(v.isfinite().all() for v in final(tmp_path/'a').values()) and [json.loads((tmp_path/'a'/s/'result.json').read_text())['epochs'] for s in recipe.STAGES] == [.133, .667] and len(counted) == 30 and all(len(d) == 1 for d in counted)


def test_a_captioner_goes_on_from_weights(run, tmp_path, clip):
    "`init` is taken whole, after Xavier and word vectors; a table of another length is refused by name; the file is noted."
    out, cfg, data = run; file = tmp_path/'start.safetensors'; model, _ = recipe.load_stage(out, 'xe'); save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file); fresh = recipe.new_model(replace(cfg, init=str(file)), model.vocabulary, clip); assert all(torch.equal(v, model.state_dict()[k]) for k, v in fresh.state_dict().items())
    with pytest.raises(BadInput, match='another vocabulary'): recipe.new_model(replace(cfg, init=str(file)), WORDS, clip)
    with pytest.raises(BadInput, match='another vocabulary'): recipe.new_model(replace(cfg, init=str(file)), Vocabulary((*model.vocabulary.words[:4], *reversed(model.vocabulary.words[4:]))), clip)
    own = replace(cfg, init=str(file), vocabulary=str(out/'vocabulary.json'), stages=('xe',), steps=1, accumulate=1, eval_split=''); recipe.train(own, data, tmp_path/'run'); assert json.loads((tmp_path/'run'/'init.json').read_text())['file'] == 'start.safetensors'


def test_training_makes_the_sentences_better(tmp_path):
    "Sixty updates on eight pictures: cross-entropy at least halves, and the sentences of these pictures score."
    _, cfg, data = prepare('fsgr', dict(data_train=8, steps=60, batch=4, stages=('xe',), eval_split='', checkpoint_every=0, words=16, memory=0)); recipe.train(cfg, data, tmp_path/'run'); losses = [l['terms']['xe'] for l in log(tmp_path/'run') if 'terms' in l]
    model, _ = recipe.load_run(tmp_path/'run'); assert losses[-1] < losses[0] / 2 and recipe.evaluate(model, data.split('train'), cfg)[0].value > 30, losses[::10]
