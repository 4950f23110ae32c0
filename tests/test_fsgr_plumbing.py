"The incidents of earlier runs of the captioner, each against the line that stops it: batches by name, rates as shares, chance level, tables, word vectors, masks, signs, failures that are not swallowed."
import json, math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from test_cli import refused
from test_nonfinite import command
from training_child import FSGR_TINY, prepare
from wsl_nb import fsgr_training as recipe
from wsl_nb.captions import tokenise
from wsl_nb.captions_vocabulary import SPECIALS, Vocabulary, check_ids
from wsl_nb.core import BadInput, torch_rng
from wsl_nb.data import collate
from wsl_nb.data_farm import VOCABULARY
from wsl_nb.fsgr import tag_similarity
from wsl_nb.fsgr_base import PRESETS, STAGES, frozen_clip, rate, stage_config, tag_names
from wsl_nb.fsgr_data import Captioned, true_tags
from wsl_nb.fsgr_training import evaluate, losses_xe, new_model, total, xavier
from wsl_nb.vit import text_features

BARE = replace(FSGR_TINY, stages=('xe',), eval_split='', checkpoint_every=0, memory=0, data_train=6, steps=2) # Where scores do not matter
WORDS = Vocabulary((*SPECIALS, *VOCABULARY))


@pytest.fixture(autouse=True, scope='module')
def cache(tmp_path_factory):
    "A cache of this module's own."
    patch = pytest.MonkeyPatch(); patch.setenv('WSL_NB_CACHE', str(tmp_path_factory.mktemp('cache'))); yield; patch.undo()


@pytest.fixture(scope='module')
def clip(): return frozen_clip(BARE, say=lambda *_: None)


@pytest.fixture(scope='module')
def data(cache): return prepare('fsgr', dict(data_train=6))[2]


class Source:
    "Passes on what a set reads, notes which fields were opened, and may put sentences in place of others."
    def __init__(self, inner, sentences=None): self.inner, self.opened, self.sentences = inner, set(), sentences or {}
    def __getattr__(self, name): return getattr(self.inner, name)
    def read(self, split, index, field):
        self.opened.add(field); found = self.inner.read(split, index, field)
        return self.sentences.get(index, found) if (split, field) == ('train', 'captions') else found


def captioner(clip, words=WORDS, **changes): return new_model(replace(BARE, **changes), words, clip)


def batch_of(data, clip, pictures=2):
    "A training batch as the loop gets it, with the true tags of its patches."
    split = data.split('train', ('image', 'captions'), recipe.view_of(BARE, clip)).first(pictures); said = [tokenise(split.source.read('train', i, 'captions')) for i in range(pictures)]; items = Captioned(split, said)
    tags = torch.stack([true_tags(torch.as_tensor(split.source.read('train', i, 'mask')), own, (12, 12), tag_names(BARE.tags)) for i, own in enumerate(said)])
    return collate([items[i] for i in range(pictures)]), tags


def lines(out): return [json.loads(l) for l in (out/'xe'/'log.jsonl').read_text().splitlines()]


def stepless(monkeypatch):
    "Counts the updates that are begun."
    begun, made = [], recipe.losses_xe; monkeypatch.setattr(recipe, 'losses_xe', lambda *args, **extra: begun.append(args[2]) or made(*args, **extra)); return begun


# --- batches ---------------------------------------------------------------------------------------------------------

def test_a_batch_is_read_by_name(data, clip):
    "Any order, and noise in front of everything: the same losses; no place has a meaning, and a lacking part is named."
    batch, tags = batch_of(data, clip); model = captioner(clip).eval(); want = {k: v.item() for k, v in losses_xe(model, batch, 0, BARE, tags).items()}; noise = dict(placeholder=torch.randn(2, 100, 2048))
    for other in (dict(reversed(batch.items())), noise | batch, batch | noise): assert {k: v.item() for k, v in losses_xe(model, other, 0, BARE, tags).items()} == want
    assert set(batch) == {'id', 'index', 'image', 'size', 'captions'} and batch['image'].shape == (2, 3, 96, 96) and [len(c) for c in batch['captions']] == [5, 5]
    for key in (0, 1, 'labels'):
        with pytest.raises(KeyError): batch[key]
    with pytest.raises(KeyError, match='image'): losses_xe(model, {k: v for k, v in batch.items() if k != 'image'}, 0, BARE, tags)
    with pytest.raises(BadInput, match="fields .*'labels'"): data.split('train', ('image', 'labels'))


def test_training_opens_pictures_and_sentences_only(data, tmp_path):
    "Both stages, with tags of a frozen CLIP: no mask, no box, no label is opened; the true tags, where asked for, open masks."
    for labels, fields in (('captions', {'image', 'captions'}), ('true', {'image', 'captions', 'mask'})):
        source = Source(data.source); recipe.train(replace(BARE, stages=STAGES, steps=1, labels=labels), replace(data, source=source), tmp_path/labels); assert source.opened == fields


# --- rates -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('preset', PRESETS)
@pytest.mark.parametrize('stage', STAGES)
def test_every_rate_of_every_preset_is_a_share(preset, stage):
    "Within 0 and 1 in every update, never 0, 1 somewhere or on the way to it; whatever the base rate is, so nothing is multiplied twice."
    cfg = replace(stage_config(PRESETS[preset], stage, 500), steps=600); shares = [rate(cfg, s, stage) for s in range(600)]; assert all(0 < s <= 1 for s in shares) and max(shares) > .99
    assert shares == [rate(replace(cfg, lr=lr), s, stage) for lr in (1., 1e-8) for s in range(600)][:600] and max(shares) * cfg.lr <= cfg.lr_max / 1.2


@pytest.mark.parametrize('changes', [dict(xe_lr=.25), dict(lr=1.), dict(xe_lr=1., schedule='constant', steps=0, xe_epochs=2)], ids=str)
def test_a_rate_of_a_quarter_never_makes_a_step(data, tmp_path, monkeypatch, changes):
    "A base rate of 0.25, or of 1 that a share of a quarter makes 0.25: refused with the rate and the guard, no update begun, no checkpoint."
    begun = stepless(monkeypatch)
    with pytest.raises(BadInput, match='learning rate') as e: recipe.train(replace(BARE, **changes), data, tmp_path/'run')
    assert 'lr_max' in e.value.expected and '0.005' in e.value.expected and not begun and not list(tmp_path.rglob('checkpoints/step_*'))


# --- chance level ----------------------------------------------------------------------------------------------------

def many_words(folder):
    "A vocabulary as long as that of COCO, with the words of the drawn sentences."
    return str(Vocabulary((*SPECIALS, *VOCABULARY, *(f'w{i}' for i in range(10201 - 4 - len(VOCABULARY))))).save(folder/'many.json'))


@pytest.mark.parametrize('lr', [1e-7, 1e-6])
def test_a_loss_at_chance_level_ends_the_run_with_exit_2(tmp_path, capsys, monkeypatch, lr):
    "A rate of almost nothing: after so many updates the log has a line of it, and the command ends with 2, naming loss, ln V and both rates."
    monkeypatch.setattr(recipe, 'CHANCE', 3); cfg = replace(BARE, xe_lr=lr, steps=6, vocabulary=many_words(tmp_path), schedule='constant')
    code, text = refused(capsys, *command(tmp_path, cfg, tmp_path/'run', method='fsgr')); notes = [l for l in lines(tmp_path/'run') if 'chance level' in str(l.get('note'))]
    assert code == 2 and 'chance level' in text and f'ln 10201 = {math.log(10201):.3f}' in text and f'{lr:.2e}, {lr * cfg.old_lr:.2e}' in text and 'learning rate' in text and len(notes) == 1 and notes[0]['step'] == 2 and notes[0]['note'] in text
    assert [l['step'] for l in lines(tmp_path/'run') if 'terms' in l] == [0, 1, 2] and not (tmp_path/'run'/'xe'/'result.json').exists()


def test_a_loss_that_moves_is_not_at_chance_level(tmp_path, monkeypatch, data):
    "The same run with a rate that teaches something goes on to its end."
    monkeypatch.setattr(recipe, 'CHANCE', 12); cfg = replace(BARE, steps=14, vocabulary=many_words(tmp_path), schedule='constant'); assert recipe.train(cfg, data, tmp_path/'run')['finished']
    found = lines(tmp_path/'run'); assert not any('chance' in str(l.get('note')) for l in found) and [l['terms']['xe'] for l in found if 'terms' in l][11] < .9 * math.log(10201)


@pytest.mark.parametrize('changes, name', [(dict(xe_lr=0.), 'xe_lr'), (dict(xe_lr=4e-8), 'xe_lr'), (dict(stages=STAGES, scst_lr=1e-10), 'scst_lr'), (dict(lr=-1.), 'xe_lr')], ids=str)
def test_a_rate_of_nothing_is_refused(data, tmp_path, changes, name):
    "A base rate of 0, one squared by mistake (2e-4 twice), of either stage, before there is a folder."
    with pytest.raises(BadInput, match=f'{name} ') as e: recipe.train(replace(BARE, **changes), data, tmp_path/'run')
    assert f'--{name}' in e.value.cure and not (tmp_path/'run').exists()


# --- tables ----------------------------------------------------------------------------------------------------------

def test_a_missing_row_is_refused_before_the_first_step(data, tmp_path, monkeypatch):
    "`train` asks whether every id has a row; with one row too few no update begins, and word, sentence and picture are named. The fault itself comes late, and names nothing."
    begun, made = stepless(monkeypatch), recipe.check_ids; rare = replace(data, source=Source(data.source, {4: ['a zebra on grass', 'a cat']})); asked = []
    monkeypatch.setattr(recipe, 'check_ids', lambda words, said, ids, rows, longest: asked.append((rows, len(words), len(said))) or made(words, said, ids, rows - 1, longest))
    with pytest.raises(BadInput) as e: recipe.train(BARE, rare, tmp_path/'run')
    rows, size, sentences = asked[0]; assert rows == size and sentences == 27 and not begun and not list(tmp_path.rglob("checkpoints/step_*"))
    assert f'{size - 1} rows' in e.value.got and '"zebra"' in e.value.got and '"a zebra on grass"' in e.value.got and data.splits['train'][4] in e.value.got and f'{size} rows' in e.value.expected
    table = nn.Embedding(size - 1, 4); assert table(torch.tensor([[2, 4, size - 2, 3]])).isfinite().all()
    with pytest.raises(IndexError, match='^index out of range in self$'): table(torch.tensor([[2, size - 1, 3]]))


@pytest.mark.parametrize('sentence', ['', ' . '])
def test_a_sentence_without_a_word_is_refused_before_the_first_step(data, tmp_path, monkeypatch, sentence):
    begun = stepless(monkeypatch)
    with pytest.raises(BadInput, match=f'empty captions, first of image {data.splits["train"][2]}'): recipe.train(BARE, replace(data, source=Source(data.source, {2: ['a cat', sentence]})), tmp_path/'run')
    assert not begun


@pytest.mark.parametrize('size', [5, 9, len(WORDS)])
def test_tables_are_as_long_as_the_vocabulary(clip, size):
    "Rows, outputs and words agree; every id and every sentence, even one that is too long, goes through both tables."
    words = Vocabulary(WORDS.words[:size]); model = captioner(clip, words).eval(); decoder = model.decoder; assert decoder.word_emb.num_embeddings == decoder.fc.out_features == len(words) == size == int(model.words[0]) and decoder.pos_emb.num_embeddings == BARE.longest + 1
    batch = dict(image=torch.randn(1, 3, 96, 96, generator=torch_rng('x')), captions=[[' '.join(words.words[4:] * 30), words.words[-1], 'zebra']]); assert losses_xe(model, batch, 0, replace(BARE, beta=0.))['xe'].isfinite() and len(words) == size
    assert check_ids(words, batch['captions'][0], ['a'] * 3, decoder.word_emb.num_embeddings, BARE.longest)['truncated'] == 1


@pytest.mark.parametrize('fault', [IndexError('index out of range in self'), RuntimeError('device-side assert'), FloatingPointError('x')], ids=lambda e: type(e).__name__)
def test_nothing_is_caught_in_the_loop(data, tmp_path, monkeypatch, fault):
    "A batch that fails ends the run with its own exception; none is skipped, and no result is written."
    begun, made = [], recipe.losses_xe
    def _fails(*args, **extra):
        begun.append(args[2])
        if args[2] == 1: raise fault
        return made(*args, **extra)
    monkeypatch.setattr(recipe, 'losses_xe', _fails)
    with pytest.raises(type(fault), match=str(fault)): recipe.train(replace(BARE, steps=4), data, tmp_path/'run')
    assert begun == [0, 1] and not list(tmp_path.rglob('result.json'))


@pytest.mark.parametrize('how', ['clip', 'xavier'])
def test_word_vectors_survive_the_start_of_a_run(data, clip, tmp_path, how):
    "After the first update of a run, at almost no rate, the row of each word still is CLIP's vector of it; with `xavier`, and with Xavier's rule after the vectors, it is not."
    cfg = replace(BARE, word_init=how, steps=1, xe_lr=1e-7); recipe.train(cfg, data, tmp_path/'run'); model, _ = recipe.load_run(tmp_path/'run'); known = model.vocabulary.words[4:]; assert len(known) > 15
    want = text_features(clip, list(known), ('{}',)); near = lambda m: F.cosine_similarity(m.decoder.word_emb.weight[4:].detach().cpu(), want)
    if how == 'xavier': assert near(model).abs().mean() < .3
    else: assert near(model).min() > .9999; xavier(model); assert near(model).abs().mean() < .3


# --- masks, signs, switches --------------------------------------------------------------------------------------------

def test_no_cell_is_hidden_by_default(clip):
    "Patches that sum to exactly zero, all of them: no preset hides one, and what is said stays finite. The old mask hides them all, and its softmax is no number."
    assert not any(p.accidental_mask for p in PRESETS.values()); images = torch.randn(2, 3, 96, 96, generator=torch_rng('x')); words = torch.tensor([[2, 5, 6, 3]] * 2)
    for mask in (None, True):
        model = captioner(clip, **{} if mask is None else dict(accidental_mask=mask)).eval(); model.att_embed.register_forward_hook(lambda m, x, y: y * 0); picture = model.understand(images)
        if mask: assert picture.hidden.all() and picture.hidden.shape == (2, 144)
        else: assert picture.hidden is None and picture.tokens.isfinite().all() and model(images, words)[0].isfinite().all()
    assert torch.full((1, 144), -math.inf).softmax(-1).isnan().all()


def test_thirty_updates_bring_patches_of_a_tag_together(data, clip):
    "Down the total of the first stage: patches of one tag become more alike, and nearer than those of two. Down the published sum, they part."
    batch, tags = batch_of(data, clip, 4); cfg = replace(BARE, beta=1.); flat = tags.flatten(); other = (flat[:, None] != flat[None]) & (flat >= 0) & (flat >= 0)[:, None]; ends = {}
    for sign in ('ours', 'published'):
        model = captioner(clip, beta=1.).eval(); seen = model.look(batch['image']); seen = type(seen)(*(x.detach() for x in seen)); model.look = lambda images: seen; optimizer, found = torch.optim.Adam(model.att_embed.parameters(), lr=2e-3), []
        for _ in range(31):
            z = model.features(seen).flatten(0, 1); terms = losses_xe(model, batch, 0, cfg, tags); unit = F.normalize(z.detach(), dim=-1); found.append((tag_similarity(z.detach(), flat).item(), terms['contrast'].item(), (unit @ unit.T)[other].mean().item()))
            loss = total(terms, model, 0, cfg) if sign == 'ours' else terms['xe'] + tag_similarity(z, flat); optimizer.zero_grad(); loss.backward(); optimizer.step()
        ends[sign] = found[0], found[-1]
    (start, ours), (again, published) = ends['ours'], ends['published']; assert start == again and ours[0] > start[0] + .05 and ours[1] < start[1] - .5 and ours[0] > ours[2] + .2
    assert published[0] < start[0] - .2 and published[1] > start[1] + .5


def test_a_scorer_that_fails_ends_the_run(data, tmp_path, monkeypatch, clip):
    "Its exception is the run's; no score is written down in its place. A sentence too few is refused by the scorer itself."
    def _breaks(*args): raise ValueError('no tokeniser')
    with monkeypatch.context() as m:
        m.setattr(recipe, 'caption_scores', _breaks); cfg = replace(BARE, eval_split='val', evaluate_every=1, words=4)
        with pytest.raises(ValueError, match='no tokeniser'): recipe.train(cfg, data, tmp_path/'run')
        assert [l['step'] for l in lines(tmp_path/'run') if 'terms' in l] == [0] and 'CIDEr' not in (tmp_path/'run'/'xe'/'log.jsonl').read_text()
    made = recipe.write_split; monkeypatch.setattr(recipe, 'write_split', lambda *args: made(*args)[:-1])
    with pytest.raises(BadInput, match='3 hypotheses'): evaluate(captioner(clip).eval(), data.split('val'), replace(BARE, words=4))


def test_what_is_off_is_said(data, tmp_path, capsys):
    "Every run says which parts are on; a run without a codebook that needs one is refused, with both ways out."
    recipe.train(replace(BARE, steps=1), data, tmp_path/'on'); assert 'parts: prompts on, contrast on, language_map on, memory OFF' in capsys.readouterr().out
    recipe.train(replace(BARE, steps=1, text=False, beta=0., tags=''), data, tmp_path/'off'); assert 'parts: prompts on, contrast OFF, language_map OFF, memory OFF' in capsys.readouterr().out
    for changes in (dict(text=False), dict(beta=0.)):
        with pytest.raises(BadInput, match='no codebook') as e: recipe.check_recipe(replace(BARE, tags='', **changes), data)
        assert '--tags' in e.value.cure and '--no_text' in e.value.cure


def test_prompts_learn_through_the_tower(data, clip):
    "The first prompts, before the first block, get a gradient of both terms; so nothing behind them can be stored."
    batch, tags = batch_of(data, clip)
    for term in ('xe', 'contrast'):
        model = captioner(clip).train(); losses_xe(model, batch, 0, BARE, tags)[term].backward(); visual = model.backbone.visual
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (visual.prompt_embeddings, visual.deep_prompt_embeddings, visual.prompt_proj.weight)) and visual.conv1.weight.grad is None
    with torch.no_grad(): stored = model.eval().look(batch['image']).patches; visual.prompt_embeddings += .5 * torch.randn(visual.prompt_embeddings.shape, generator=torch_rng('prompts')); assert not torch.allclose(stored, model.look(batch['image']).patches, atol=1e-3)
