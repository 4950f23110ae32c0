"""The captioner on photographs and captions of COCO (`make real`): CLIP ViT-B/16 at 224 pixels trains in both stages, is killed in each, resumes, is scored and writes about own photographs; every size of the public copy; faults planted in copies of the files.

CLIP's weights are random: none were at hand, so the chain is proven and no score is. The heavy part starts every command as a user does, in its own process.
"""
import json, math, os
from collections import Counter
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from test_cli import refused
from test_formats_captions_real import FAULTS, copy, real, spoil # noqa: F401 (fixtures)
from test_real_more import finished, killed_after, photos # noqa: F401 (a fixture)
from wsl_nb import cli
from wsl_nb.captions import caption_scores, java_scores
from wsl_nb.captions_vocabulary import SPECIALS, Vocabulary, build_vocabulary, check_ids
from wsl_nb.core import BadInput, file_hash, read_image
from wsl_nb.formats import open_set
from wsl_nb.formats_captions import pretokenised
from wsl_nb.fsgr import write
from wsl_nb.fsgr_base import COCO80, COCO_OFFICIAL, frozen_clip
from wsl_nb.fsgr_training import groups, losses_xe, new_model, total, view_of
from wsl_nb.metrics import read_results
from wsl_nb.training_checkpoint import checkpoint, read_config, read_log
from wsl_nb.vit_clip import random_clip

pytestmark = pytest.mark.data
STUFF = 'sky cloud grass road pavement water sea sand snow tree bush mountain building wall floor ceiling window door fence field'.split()
WIDE = 10201 # Words of COCO's vocabulary
SCORES = {*(f'BLEU-{k}' for k in range(1, 5)), 'ROUGE-L', 'CIDEr-D', 'CIDEr'}


@pytest.fixture(autouse=True, scope='module')
def cache(tmp_path_factory):
    "A cache of this module's own: text vectors, tags, squares and sentences are made here."
    folder = tmp_path_factory.mktemp('cache'); patch = pytest.MonkeyPatch(); patch.setenv('WSL_NB_CACHE', str(folder)); yield folder; patch.undo()


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "A file as OpenAI's state dict is: ViT-B/16, half precision, three notes; random numbers."
    file = tmp_path_factory.mktemp('weights')/'ViT-B-16.pt'; torch.manual_seed(0); state = random_clip('ViT-B-16').state_dict()
    torch.save({k: v.half() for k, v in state.items()} | dict(input_resolution=torch.tensor(224), context_length=torch.tensor(77), vocab_size=torch.tensor(49408)), file); return file


@pytest.fixture(scope='module')
def tags(tmp_path_factory):
    "A codebook: the classes of COCO and words for what is no object."
    file = tmp_path_factory.mktemp('tags')/'tags.txt'; file.write_text('\n'.join([*COCO80.split('|'), *STUFF]) + '\n'); return file


def sentences(root, *splits):
    "Tokenised sentences, and the image of each."
    parts = [open_set(root, 'coco_captions').split(s, ('captions',)) for s in splits]; said = [(i, x) for p in parts for i, own in zip(p.ids, pretokenised(p)) for x in own]
    return [x for _, x in said], [i for i, _ in said]


@pytest.fixture
def vocabulary(real, tmp_path): # noqa: F811
    "A vocabulary file of the words that all 155 captions say twice."
    return build_vocabulary(sentences(real, 'train', 'val')[0], 2, 'excerpt of COCO 2017').save(tmp_path/'vocabulary.json')


def recipe(root, weights, tags, *more, preset='COCO'): return ['train', 'fsgr', '--preset', preset, '--data', root, '--clip_file', weights, '--tags', tags, '--batch', '2', '--log_every', '1', *more] # Words of a command without --out


def one_message(capsys, *words):
    "The message of a command that must end with code 2: got, expected and cure, once each, nothing else."
    capsys.readouterr(); code, text = refused(capsys, *words); lines = text.strip().split('\n')
    assert code == 2 and [l.split()[0] for l in lines] == ['wsl-nb:', 'expected', 'cure:'] and lines[0].startswith('wsl-nb: got ') and all(len(l.split()) > 2 for l in lines), text
    return text.strip()


# --- words ---------------------------------------------------------------------------------------------------------

def test_a_vocabulary_of_real_captions_is_readable_and_checked(real, vocabulary): # noqa: F811
    "One word a line with its count; unknown words are counted; a table with a row too few names its word, image and sentence; no id beyond the table has a word."
    said, ids = sentences(real, 'train', 'val'); count = Counter(w for s in said for w in s.split()); kept = {w: n for w, n in count.items() if n > 1}; words = Vocabulary.load(vocabulary)
    assert len(said) == 155 and len(set(ids)) == 31 and dict(json.loads(vocabulary.read_text())['words']) == kept and [l.strip(',') for l in vocabulary.read_text().splitlines()[2:-1]] == [json.dumps([w, n]) for w, n in zip(words.words[4:], words.counts)]
    found = check_ids(words, said, ids, len(words)); assert found == dict(captions=155, tokens=count.total(), unknown=count.total() - sum(kept.values()), longest=max(len(s.split()) for s in said) + 2, truncated=0) and 0 < found['unknown'] < found['tokens'] / 4
    assert all(words.decode(words.encode(s)) == ' '.join(w if w in kept else '<unk>' for w in s.split()) for s in said)
    last = words.words[-1]; holds = [k for k, s in enumerate(said) if last in s.split()]
    with pytest.raises(BadInput) as e: check_ids(words, said, ids, len(words) - 1)
    assert f'"{last}"' in e.value.got and e.value.got.endswith(f'{len(holds)}, first one of image {ids[holds[0]]}: "{said[holds[0]]}"')
    with pytest.raises(BadInput, match=f'got id {len(words)}\nexpected 0 to {len(words) - 1}'): words.decode([4, len(words)])


def test_scores_that_need_java_are_numbers_or_say_why_not(real): # noqa: F811
    "The fifth caption of each picture against the other four: people agree, and more so on their own picture than on the next."
    said, _ = sentences(real, 'train', 'val'); pictures = [said[i:i + 5] for i in range(0, len(said), 5)]; truth, fifth = [p[:4] for p in pictures], [p[4] for p in pictures]
    found, strange = java_scores(truth, fifth), java_scores(truth, fifth[1:] + fifth[:1], ('METEOR',)); assert set(found) == {'METEOR', 'SPICE'}
    for name, value in found.items(): assert value.startswith('not computed: ') and len(value) > 25 if isinstance(value, str) else 10 < value < 100, (name, value)
    assert isinstance(found['METEOR'], str) == isinstance(strange['METEOR'], str) and (isinstance(found['METEOR'], str) or found['METEOR'] > 2 * strange['METEOR'])
    right, wrong = caption_scores(truth, fifth), caption_scores(truth, fifth[1:] + fifth[:1]); assert set(right) == SCORES and all(right[k] > wrong[k] for k in SCORES) and right['CIDEr-D'] > 50
    print('\n' + '\n'.join(f'  the fifth caption, {k:8} {v if isinstance(v, str) else f"{v:.1f}"}' for k, v in (right | found).items()))


# --- the whole way at full width -----------------------------------------------------------------------------------

@pytest.mark.slow
def test_both_stages_are_killed_resumed_scored_and_used(data_root, real, photos, weights, tags, vocabulary, cache, tmp_path, capsys): # noqa: F811
    "COCO's recipe in float32, six updates a stage: the check, a kill in each stage, scores of 15 pictures from what was written, sentences about five photographs, the same from the bare weight file; another vocabulary is refused."
    out, table, words = tmp_path/'run', [], Vocabulary.load(vocabulary); said, _ = sentences(real, 'train'); known = [[w in words.index for w in s.split()] for s in said]
    assert 'complete and sound' in finished(tmp_path, table, 'check', 'data', 'check', 'coco_captions', real)
    train = recipe(real, weights, tags, '--vocabulary', vocabulary, '--steps', '6', '--xe_lr', '3e-4', '--image_cache', '--precision', 'fp32', '--checkpoint_every', '1', '--keep_last', '1', '--evaluate_every', '6', '--eval_images', '3', '--out', out)
    table.append(('train, killed in xe', killed_after(tmp_path, out/'xe', 1, *train), '')); first = load_file(checkpoint(out/'xe', 1)/'model.safetensors'); assert not (out/'xe'/'result.json').exists()
    table.append(('train, resumed, killed in scst', killed_after(tmp_path, out/'scst', 1, *train, '--resume'), '')); assert json.loads((out/'xe'/'result.json').read_text())['steps'] == 6
    text = finished(tmp_path, table, 'train, resumed, to the end', *train, '--resume'); flat = [k for own in known for k in own]
    assert 'xe: done' in text and 'resume: at step 1' in text and 'QuickGELU (the file holds input_resolution' in text and f'sentences: 80 of 16 pictures, {len(words)} words, {flat.count(False)} of {len(flat)} tokens unknown, longest {max(map(len, known)) + 2}, 0 cut' in text and 'parts: prompts on, contrast on, language_map on, memory OFF' in text
    terms = {s: [l['terms'] for l in read_log(out/s) if 'terms' in l] for s in ('xe', 'scst')}; steps = {s: [l['step'] for l in read_log(out/s) if 'terms' in l] for s in terms}; assert steps == dict(xe=[*range(6)], scst=[*range(6)])
    assert all(set(t) == k and all(np.isfinite(v) for v in t.values()) for s, k in dict(xe={'xe', 'contrast'}, scst={'scst'}).items() for t in terms[s]) and terms['xe'][0]['xe'] == pytest.approx(math.log(len(words)), rel=.25) and terms['xe'][0]['contrast'] > 0
    assert any(l['gradient_norm'] > 0 for l in read_log(out/'scst') if 'terms' in l); before, state = (load_file(checkpoint(out/s, 'last')/'model.safetensors') for s in terms); assert not torch.equal(before['decoder.fc.weight'], state['decoder.fc.weight']) # some beams were worth more than others
    changed = {k for k in state if not torch.equal(state[k], first[k])}; assert {'decoder.fc.weight', 'encoder.WGs.0.weight', 'att_embed.0.weight'} <= changed and not any(k.startswith('backbone.') and 'prompt' not in k and 'S_Adapter' not in k for k in changed)
    assert state['decoder.word_emb.weight'].shape == (len(words), 512) and len(state['text_embed.text_embeddings']) == 100 and Vocabulary.load(out/'vocabulary.json') == words
    squares, = cache.glob('squares_train_224_*.npy'); assert squares.stat().st_size == 16 * 224 * 224 * 3 + 128
    note = json.loads((out/'init.json').read_text()); assert note['clip_file'] == dict(file='ViT-B-16.pt', sha256=file_hash(weights)) and str(tmp_path) not in json.dumps(note)
    scores = scored(real, out, table, tmp_path, words, weights); own_photographs(data_root, photos, out, table, tmp_path); from_the_weight_file(photos, out, weights, tags, vocabulary, table, tmp_path); another_vocabulary(capsys, photos, real, out, weights, tags, words, tmp_path)
    print(f'\nCOCO: 16 and 15 pictures, ViT-B/16, 224 px, batch 2 with five sentences each, {min(2, os.cpu_count())} threads')
    for what, seconds, cost in table: print(f'  {what:32} {seconds:7.1f} s   {cost}')
    for name, value in scores.items(): print(f'  random weights, {name:8} {value if isinstance(value, str) else f"{value:.1f}"}')


def scored(real, out, table, folder, words, weights): # noqa: F811
    "Records say where they come from and are the scores of the sentences that were written; METEOR and SPICE are numbers or say why not."
    text = finished(folder, table, 'eval, 15 pictures, sentences', 'eval', 'fsgr', '--run', out, '--data', real, '--split', 'val', '--pictures', folder/'pictures'); records = read_results(out/'eval_val.json'); data = open_set(real, 'coco_captions')
    assert 'CIDEr-D' in text and {r.metric for r in records} == SCORES and records[0].metric == 'CIDEr-D' and all(0 <= r.value < 1000 and np.isfinite(r.value) for r in records)
    for r in records:
        assert (r.method, r.dataset, r.split, r.images, r.seeds, r.preset, r.data_hash) == ('fsgr', 'COCO captions 2017', 'val', 15, (42,), 'custom', data.hash) and r.run.startswith('run, ') and file_hash(weights)[:12] in r.protocol['labels'] and r.protocol['tags'].endswith('tags.txt')
    rows, summary = (json.loads((folder/'pictures'/f'{n}.json').read_text()) for n in ('sentences', 'summary')); by = {r['image_id']: r for r in rows}; assert sorted(by) == data.splits['val'] == sorted(p.stem for p in (real/'val2017').iterdir()) and [r['CIDEr-D'] for r in rows] == sorted(r['CIDEr-D'] for r in rows)
    again = caption_scores([by[i]['references'] for i in data.splits['val']], [by[i]['caption'] for i in data.splits['val']]); assert summary['images'] == 15 and {k: summary['scores'][k] for k in SCORES} == pytest.approx(again, abs=1e-9) and {r.metric: r.value for r in records} == pytest.approx(again, abs=1e-9)
    for r in rows: own = r['caption'].split(); assert len(own) <= 20 and set(own) <= set(words.words) - set(SPECIALS[1:]) and all(a != b for a, b in zip(own, own[1:])) and len(r['references']) == 5
    for k in ('METEOR', 'SPICE'): v = summary['scores'][k]; assert v.startswith('not computed: ') if isinstance(v, str) else 0 <= v <= 100, (k, v)
    return summary['scores']


def own_photographs(data_root, photos, out, table, folder): # noqa: F811
    "Upright, wide, grey, large, small: a sentence each, five beams, a picture of tags and of looks, one page."
    files = [*photos.values(), *sorted(p for p in (data_root/'remote_sensing').rglob('*.jpg') if 'dota' not in p.parts)]; sizes = {p.name: list(read_image(p, exif=True).shape[:2]) for p in files}; assert len(set(map(tuple, sizes.values()))) == len(files) >= 3
    text = finished(folder, table, f'predict, {len(files)} photographs', 'predict', 'fsgr', '--run', out, '--checkpoint', 'last', '--out', folder/'own', *files); rows = json.loads((folder/'own'/'sentences.json').read_text()); assert 'report.html' in text and {r['file']: r['size'] for r in rows} == sizes
    for i, r in enumerate(rows):
        scores = [b['score'] for b in r['beams']]; assert len(scores) == 5 and scores == sorted(scores, reverse=True) and (folder/'own'/f'{i:03d}_{r["file"].removesuffix(".jpg")}_tags.png').stat().st_size > 1000
        assert r['caption'] == ' '.join(w for w, _ in groupby(r['beams'][0]['caption'].split()))
    page = (folder/'own'/'report.html').read_text(); assert all(name in page for name in sizes) and 'no patch can have a word that the codebook lacks' in page


def from_the_weight_file(photos, out, weights, tags, vocabulary, table, folder): # noqa: F811
    "The last weights without their run: the same sentence, the same beams."
    file, config = checkpoint(out/'scst', 'last')/'model.safetensors', folder/'recipe.yaml'; config.write_text(f'clip_file: {weights}\ntags: {tags}\nvocabulary: {vocabulary}\n')
    finished(folder, table, 'predict from the weight file', 'predict', 'fsgr', '--weights', file, '--preset', 'COCO', '--config', config, '--out', folder/'bare', photos['portrait'])
    (row,), rows = (json.loads((folder/d/'sentences.json').read_text()) for d in ('bare', 'own')); assert row == next(r for r in rows if r['file'] == row['file'])


def another_vocabulary(capsys, photos, real, out, weights, tags, words, folder): # noqa: F811
    "A word less, two words swapped: refused beside the weight file, in the run, and as a start, each in one message."
    file, config, kept = checkpoint(out/'scst', 'last')/'model.safetensors', folder/'other.yaml', (out/'vocabulary.json').read_text(); swapped = list(words.words); swapped[10], swapped[20] = swapped[20], swapped[10]
    for name, other in dict(less=words.words[:-1], swapped=swapped).items():
        spare = Vocabulary(tuple(other)).save(folder/f'{name}.json'); config.write_text(f'clip_file: {weights}\ntags: {tags}\nvocabulary: {spare}\n')
        for command in (['predict', 'fsgr', '--weights', file, '--preset', 'COCO', '--config', config, '--out', folder/'new', photos['portrait']], recipe(real, weights, tags, '--vocabulary', spare, '--init', file, '--word_init', 'xavier', '--steps', '1', '--precision', 'fp32', '--out', folder/f'start_{name}')):
            assert f'{file}, trained with another vocabulary' in one_message(capsys, *command)
        assert not (folder/'new').exists(); spare.replace(out/'vocabulary.json'); text = one_message(capsys, 'eval', 'fsgr', '--run', out, '--data', real, '--split', 'train'); assert f'vocabulary.json with {len(words)} words' in text if name == 'swapped' else f'({len(words)}, 512) instead of ({len(words) - 1}, 512)' in text
        assert not (out/'eval_train.json').exists(); (out/'vocabulary.json').write_text(kept)


@pytest.mark.slow
def test_the_official_recipe_with_its_codebook_and_vocabulary(real, weights, tmp_path, capsys): # noqa: F811
    "4,585 tags and 10,201 words are counted in the files; one update a stage, one sentence an item, evaluation of nothing; half precision needs a GPU."
    out, table = tmp_path/'run', []; said, _ = sentences(real, 'train', 'val'); book, file = tmp_path/'ram_tags.txt', wide(said, tmp_path); book.write_text(''.join(f'thing {i}\n' for i in range(4585)))
    train = recipe(real, weights, book, '--vocabulary', file, '--steps', '1', '--eval_split', '', '--checkpoint_every', '0', '--out', out, preset='COCO_OFFICIAL')
    text = finished(tmp_path, table, 'train, one update a stage', *train, '--precision', 'fp32'); assert f'sentences: 80 of 16 pictures, {WIDE} words, 0 of ' in text and 'data: 80 draws an epoch' in text and 'data: 16 draws an epoch' in text
    xe, scst = ([l['terms'] for l in read_log(out/s) if 'terms' in l] for s in ('xe', 'scst')); assert len(xe) == len(scst) == 1 and xe[0]['xe'] == pytest.approx(math.log(WIDE), rel=.2) and np.isfinite([*xe[0].values(), *scst[0].values()]).all()
    state = load_file(checkpoint(out/'scst', 'last')/'model.safetensors'); assert {k: tuple(state[k].shape) for k in ('text_embed.text_embeddings', 'decoder.word_emb.weight', 'decoder.fc.weight')} == {'text_embed.text_embeddings': (4585, 512), 'decoder.word_emb.weight': (WIDE, 512), 'decoder.fc.weight': (WIDE, 512)}
    assert json.loads((out/'result.json').read_text())['stages'].keys() == {'xe', 'scst'} and read_config(out/'config.yaml', type(COCO_OFFICIAL)) == replace(COCO_OFFICIAL, tags=str(book), vocabulary=str(file), clip_file=str(weights), batch=2, steps=1, eval_split='', checkpoint_every=0, log_every=1, precision='fp32')
    if not torch.cuda.is_available():
        assert one_message(capsys, *train[:-1], tmp_path/'half') == 'wsl-nb: got precision = fp16 on a CPU\nexpected fp32 or bf16\ncure: set precision to bf16, or run on a GPU'
    for what, seconds, cost in table: print(f'\n  {what:32} {seconds:7.1f} s   {cost}')


def wide(said, folder):
    "A vocabulary of 10,201 words: the real ones, and made-up ones."
    own = build_vocabulary(said, 1); return Vocabulary((*own.words, *(f'word{i}' for i in range(WIDE - len(own)))), source='excerpt of COCO 2017, filled up').save(folder/'wide.json')


@pytest.mark.slow
def test_every_size_of_the_public_copy(real, weights, tags, tmp_path): # noqa: F811
    "297 tokens in each block, 196 patches, 10,201 words; parameters of the specification's table; gradients where something learns and nowhere else; five beams of twenty words."
    cfg = replace(COCO_OFFICIAL, clip_file=str(weights), tags=str(tags)); words = Vocabulary.load(wide(sentences(real, 'train', 'val')[0], tmp_path)); clip = frozen_clip(cfg, say=lambda *_: None); model = new_model(cfg, words, clip).train()
    split = open_set(real, 'coco_captions').split('val', ('image', 'captions'), view_of(cfg, clip)); batch = dict(image=torch.stack([split[i]['image'] for i in (0, 1)]), captions=pretokenised(split)[:2]); assert batch['image'].shape == (2, 3, 224, 224)
    millions = lambda p: sum(q.numel() for n, q in model.named_parameters() if n.startswith(p)) / 1e6; learn = lambda *s: sum(q.numel() for n, q in model.named_parameters() if n.startswith('backbone.') and q.requires_grad and any(w in n for w in s)) / 1e6
    table = {'backbone.visual.': 89.48, 'att_embed.': .657, 'encoder.': 6.836 - .264, 'decoder.': 27.298, 'decoder.word_emb.': 5.223, 'decoder.fc.': 5.223, 'decoder.layers.': 16.824, 'decoder.pos_emb.': .028}
    assert {k: millions(k) for k in table} == pytest.approx(table, abs=6e-3) and (learn('S_Adapter'), learn('prompt'), learn('')) == pytest.approx((1.775, 1.514, 3.289), abs=1e-3) and sum(len(g['params']) for g in groups(model, replace(cfg, lr=1.))) == sum(p.requires_grad for p in model.parameters())
    seen, hooks = [], [b.ln_2.register_forward_hook(lambda m, i, o: seen.append(tuple(o.shape))) for b in model.backbone.visual.transformer.resblocks]
    log, features = model(batch['image'], words.batch([own[0] for own in batch['captions']])[0]); [h.remove() for h in hooks]
    assert log.shape == (2, max(len(own[0].split()) for own in batch['captions']) + 2, WIDE) and features.shape == (2, 196, 512) and len(seen) == 12 and set(seen) == {(2, 297, 768)} and torch.allclose(log.exp().sum(-1), torch.ones(log.shape[:2]), atol=1e-3)
    terms = losses_xe(model, batch, 0, cfg, tags=torch.randint(0, 100, (2, 196))); total(terms, model, 0, cfg).backward()
    given = {n: p.grad for n, p in model.named_parameters()}; assert all((g is None) == (not p.requires_grad) for (n, p), g in zip(model.named_parameters(), given.values())) and all(torch.isfinite(g).all() for g in given.values() if g is not None) and all(given[n].abs().max() > 0 for n in ('backbone.visual.prompt_embeddings', 'backbone.visual.deep_prompt_embeddings', 'backbone.visual.transformer.resblocks.6.S_Adapter.D_fc2.weight', 'att_embed.0.weight', 'decoder.word_emb.weight', 'decoder.fc.weight'))
    with torch.no_grad(): beams = write(model.eval(), batch['image'][:1], 5, 20)
    assert beams.words.shape == (1, 5, 20) and int(beams.words.max()) < WIDE and (beams.scores.diff() <= 0).all()


# --- planted faults ------------------------------------------------------------------------------------------------

def stranger(raw): raw['annotations'][3].update(image_id=999999999) # An annotation of an image that is nowhere
IN_THE_SET = FAULTS | {'annotation of an unknown image': (lambda root: spoil(root, 'train', stranger), 'captions_train2017.json', 'annotation of an image that is not listed', 'of image 999999999'),
                       'captions cut off': (lambda root: (f := root/'annotations'/'captions_val2017.json').write_bytes(f.read_bytes()[:5000]), 'annotations', 'annotation file not readable', 'captions_val2017.json')} # Fault -> (how to plant it, place, words, first case)


@pytest.mark.parametrize('fault', IN_THE_SET)
def test_a_fault_in_the_set_is_one_message_and_no_run(copy, weights, tags, tmp_path, capsys, fault): # noqa: F811
    "Exit code 2, got, expected and cure once, nothing written; `data check` names it with the same words."
    plant, place, words, case = IN_THE_SET[fault]; plant(copy); out = tmp_path/'run'
    got = one_message(capsys, *recipe(copy, weights, tags, '--steps', '1', '--image_cache', '--out', out)).split('\n')[0]
    assert got.startswith(f'wsl-nb: got {place} in {copy}: {words}, ') and case in got and not out.exists()
    assert cli.main(['data', 'check', 'coco_captions', str(copy)]) == 2 and f': {words} (' in capsys.readouterr().out


def without_a_row(file): # Changed by hand
    text = file.read_text(); line = text.splitlines()[5]; file.write_text(text.replace(line + '\n', '')); return file


def cut_off(file): file.write_text(file.read_text()[:900]); return file


def listed(file, *lines): file.write_text(''.join(f'{l}\n' for l in lines)); return file # A codebook


IN_A_FILE = {
    'no vocabulary': (lambda d, v: ['--vocabulary', d/'none.json'], 'no file at '), 'vocabulary without a row': (lambda d, v: ['--vocabulary', without_a_row(v)], 'vocabulary.json with hash '), 'vocabulary cut off': (lambda d, v: ['--vocabulary', cut_off(v)], 'vocabulary.json, which is no JSON'),
    'no codebook': (lambda d, v: ['--tags', d/'none.txt'], "no codebook '"), 'codebook with a tag twice': (lambda d, v: ['--tags', listed(d/'tags.txt', 'sky', 'sea', 'sky')], "tags.txt with 3 tags, twice: ['sky']"), 'codebook without a tag': (lambda d, v: ['--tags', listed(d/'tags.txt', '', ' ')], 'tags.txt with 0 tags'),
    'tag that CLIP cannot read': (lambda d, v: ['--tags', listed(d/'tags.txt', 'sky', 'very ' * 90)], 'prompts are too long)'), 'more items than pictures': (lambda d, v: ['--batch', '17', '--vocabulary', v], '16 training images'), 'no word often enough': (lambda d, v: ['--least', '1000'], ' different words in 80 sentences, none 1000 times'),
} # Fault -> (flags from a folder and a sound vocabulary, what was got)


@pytest.mark.parametrize('fault', IN_A_FILE)
def test_a_fault_in_another_file_is_one_message(real, vocabulary, weights, tags, tmp_path, capsys, fault): # noqa: F811
    "Vocabulary, codebook, numbers: before the first update."
    make, got = IN_A_FILE[fault]; out = tmp_path/'run'
    assert got in one_message(capsys, *recipe(real, weights, tags, '--steps', '1', '--word_init', 'xavier', '--eval_split', '', '--out', out, *make(tmp_path, vocabulary))).split('\n')[0] and not (out/'xe'/'log.jsonl').exists()


def test_weights_of_another_clip_are_refused_before_there_is_a_run(real, weights, tags, tmp_path, capsys): # noqa: F811
    "A file cut off, a file of another size: one message, no folder."
    small, short, out = tmp_path/'ViT-B-32.pt', tmp_path/'ViT-B-16.pt', tmp_path/'run'; torch.save(random_clip('ViT-B-32').state_dict(), small); short.write_bytes(weights.read_bytes()[:10 ** 8])
    for file, got in ((small, 'ViT-B-32.pt: missing [], surplus [], misshaped '), (short, f'{short}, which cannot be read safely'), (tmp_path/'none.pt', 'no file at ')):
        assert got in one_message(capsys, *recipe(real, file, tags, '--steps', '1', '--out', out)) and not out.exists()
