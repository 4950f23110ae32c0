"Tokens and scores of captions: reference vectors, pycocoevalcap, the Java tokeniser where there is one; vocabulary and its faults."
import importlib.util, json, shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from wsl_nb import captions
from wsl_nb.captions import (Cider, bleu, caption_scores, cider, document_frequencies, java_scores, load_frequencies, object_f1, ptb_tokens, rouge_l,
                             save_frequencies, tokenise)
from wsl_nb.captions_vocabulary import SPECIALS, Vocabulary, build_vocabulary, check_ids
from wsl_nb.core import BadInput, rng

GOLDEN = Path(__file__).parent / 'golden' / 'fsgr' / 'metrics.json'
MARKS = ["''", "'", '``', '`', '-LRB-', '-RRB-', '-LCB-', '-RCB-', '.', '?', '!', ',', ':', '-', '--', '...', ';'] # what the usual wrapper drops
HARD = [  # sentence, tokens: those of the Stanford tokeniser 3.4.1 with the marks dropped
    ("A man isn't riding; he can't, won't, don't and didn't.", "a man is n't riding he ca n't wo n't do n't and did n't"),
    ("They cannot see what they're gonna do, I've gotta go.", "they can not see what they 're gon na do i 've got ta go"),
    ('You wanna gimme that? lemme see.', 'you wan na gim me that lem me see'),
    ("'Tis the season, 'twas a night.", "'t is the season 't was a night"),
    ("It's 3:30 p.m. in the U.S. on St. Mark's Ave. near Mr. Smith and Dr. Jones.", "it 's 3:30 p.m. in the u.s. on st. mark 's ave. near mr. smith and dr. jones"),
    ("A bike costs $4.99 or 50% off, #45 bus, the 5th car of the 1950s and the '20s at -5 degrees.", "a bike costs $ 4.99 or 50 % off # 45 bus the 5th car of the 1950s and the '20s at -5 degrees"),
    ("A 20's style car with 1,000 people and 3/4 full, 12.5 feet.", "a 20 's style car with 1,000 people and 3/4 full 12.5 feet"),
    ('A sign (that says "STOP") [here] {there} <now>.', 'a sign -lrb- that says stop -rrb- -lsb- here -rsb- -lcb- there -rcb- <now>'),
    ('Wow!!! What??? Really!? Yes... no.... ok..', 'wow !!! what ??? really !? yes no ok'),
    ('A man’s dog “smiles” at the camera – a long — dash – here\'s ‘one’.', "a man 's dog smiles at the camera a long dash here 's one"),
    ("Salt & pepper, rock 'n' roll, black&white, AT&T, R&B, M&M's", "salt & pepper rock 'n' roll black & white at&t r&b m&m 's"),
    ("Y'all come here, the dogs' bowls, James' hat.", "y' all come here the dogs bowls james hat"),
    ('no. 5 train is No. 5, on Elm St. and 5th Ave. etc.', 'no. 5 train is no. 5 on elm st. and 5th ave. etc.'),
    ('No. no. No! 5ft. 6 ft. lb. 10:30am 5pm', 'no no no 5ft 6 ft. lb 10:30 am 5pm'),
    ('the 6\'2" man, 5\' tall, 12" pizza', 'the 6 2 man 5 tall 12 pizza'),
    ('u.s.a. flag, t.v. set, U.S.-based, a.m. D.C. J.K. Rowling', 'u.s.a. flag t.v. set u.s.-based a.m. d.c. j.k. rowling'),
    ("What's that?It's a dog,a cat and eating.He, hello;world", "what 's that?it 's a dog a cat and eating.he hello world"),
    ("could've mustn't wouldn't've Hawai'i o'clock ma'am D'Angelo", "could 've must n't would n't 've hawai'i o'clock ma'am d'angelo"),
    ('an object--with two dashes - and pull-out -- two', 'an object with two dashes and pull-out two'),
    ('iPhone6, 747-400, F-16, 4x4, 7-eleven, 1-800-555-1234', 'iphone6 747-400 f-16 4x4 7-eleven 1-800-555-1234'),
    ('a close-up of stove/oven in red/white/blue, a/b/c/d, w/ and w/o, black-and-white/red', 'a close-up of stove/oven in red/white/blue a/b/c / d w / and w/o black-and-white/red'),
    ('£5 and €6 and ¢5 and ½ cup, 1/2 cup, 2-1/2', '# 5 and $ 6 and cents 5 and 1/2 cup 1/2 cup 2-1/2'),
    ('café, jalapeño *star* a_b + = | @ at mail me@example.com www.a.com, a.com', 'café jalapeño * star * a_b + = | @ at mail me@example.com www.a.com a.com'),
    (':) :( ;-) <3 sign :do not', ':-rrb- :-lrb- ;--rrb- < 3 sign do not'),
    ('wash. the dog in Wash. DC, mass. Pa. pa.', 'wash the dog in wash. dc mass pa. pa'),
    ('', ''), (' ... -- ', ''), ('A dog\n on\ta mat .', 'a dog on a mat')]


@pytest.fixture(scope='module')
def golden():
    "Sentences and scores of the reference."
    found = json.loads(GOLDEN.read_text(encoding='utf-8'))
    keys = sorted(found['references_raw'])
    found['refs'], found['hyps'] = [found['references_tok'][k] for k in keys], [found['hypotheses_tok'][k][0] for k in keys]
    return found


@pytest.fixture(scope='module')
def odd():
    "References and hypotheses with empty and one-word captions, repeats, words of no reference."
    r = rng('odd captions'); words = [f'w{i}' for i in range(30)]
    some = lambda low, high: ' '.join(words[min(int(r.geometric(.12)) - 1, 29)] for _ in range(int(r.integers(low, high))))
    refs = [[some(1, 14) for _ in range(int(r.integers(1, 7)))] for _ in range(60)]
    hyps = [some(0, 16) for _ in refs]; hyps[:5] = ['', 'w0', 'new', f'{refs[3][0]} {refs[3][0]}', refs[4][0]]
    return refs, hyps


def java():
    "The package and Java, or skip."
    found = importlib.util.find_spec('pycocoevalcap')
    if found is None or shutil.which('java') is None: pytest.skip('needs pycocoevalcap and Java')
    return Path(next(iter(found.submodule_search_locations)))


def by_java(texts):
    "Tokens of the Stanford tokeniser, marks dropped; a space that does not break, inside a number, counts as a space."
    import subprocess
    done = subprocess.run(['java', '-cp', 'stanford-corenlp-3.4.1.jar', 'edu.stanford.nlp.process.PTBTokenizer', '-preserveLines', '-lowerCase'], cwd=java() / 'tokenizer',
                          input=''.join(' '.join(t.split()) + '\n' for t in texts).encode(), capture_output=True, check=True).stdout.decode().split('\n')
    return [[w for w in line.replace('\xa0', ' ').split(' ') if w and w not in MARKS] for line in done[:len(texts)]]


# --- tokens ----------------------------------------------------------------------------------------------------------

def test_tokens_equal_the_reference(golden):
    for name in ('references', 'hypotheses'):
        for key, raw in golden[f'{name}_raw'].items(): assert tokenise(raw) == golden[f'{name}_tok'][key]
    assert tokenise(golden['scst_df_corpus_raw']) == golden['scst_df_corpus_tok']


@pytest.mark.parametrize('raw, tokens', HARD)
def test_hard_sentences(raw, tokens):
    assert ptb_tokens(raw) == tokens.split()


def test_hard_sentences_are_what_java_gives():
    assert by_java([raw for raw, _ in HARD]) == [tokens.split() for _, tokens in HARD]


def test_tokens_of_tokens_are_the_same(golden):
    for text in golden['scst_df_corpus_tok']: assert ptb_tokens(text) == text.split()


@pytest.mark.data
def test_real_captions_tokenise_as_in_java(data_root, record_property):
    files = sorted((data_root / 'coco' / 'annotations').glob('captions_*.json'))
    texts = [a['caption'] for f in files for a in json.loads(f.read_text(encoding='utf-8'))['annotations']]
    equal = sum(ptb_tokens(t) == j for t, j in zip(texts, by_java(texts)))
    record_property('captions with the tokens of Java', f'{equal} of {len(texts)}')
    assert len(texts) > 100 and equal >= .99 * len(texts)


# --- scores ----------------------------------------------------------------------------------------------------------

def test_scores_equal_the_reference(golden):
    refs, hyps, want = golden['refs'], golden['hyps'], golden['scores']
    near = lambda got, name: np.testing.assert_allclose(got, want[name], rtol=0, atol=1e-9)
    whole, each = bleu(refs, hyps); near(whole, 'bleu_corpus'); near(each, 'bleu_sentence')
    mean, each = rouge_l(refs, hyps); near(mean, 'rouge_l'); near(each, 'rouge_l_each')
    mean, each = cider(refs, hyps); near(mean, 'cider_d'); near(each, 'cider_d_each')
    mean, each = cider(refs, hyps, document_frequencies([[s] for s in golden['scst_df_corpus_tok']])); near(mean, 'cider_d_scst'); near(each, 'cider_d_scst_each')
    table = caption_scores(refs, hyps)
    near([table[f'BLEU-{k}'] / 100 for k in (1, 2, 3, 4)], 'bleu_corpus'); near(table['ROUGE-L'] / 100, 'rouge_l'); near(table['CIDEr-D'] / 100, 'cider_d')


def test_scores_equal_pycocoevalcap(odd):
    pytest.importorskip('pycocoevalcap')
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider as Theirs
    from pycocoevalcap.rouge.rouge import Rouge
    refs, hyps = odd; gts, res = dict(enumerate(refs)), {i: [h] for i, h in enumerate(hyps)}
    whole, each = Bleu(4).compute_score(gts, res, verbose=0)
    np.testing.assert_allclose(bleu(refs, hyps)[0], whole, rtol=0, atol=1e-12); np.testing.assert_allclose(bleu(refs, hyps)[1], each, rtol=0, atol=1e-12)
    for ours, theirs, allowed in ((rouge_l(refs, hyps), Rouge(), 1e-12), (cider(refs, hyps), Theirs(), 1e-9)):
        mean, each = theirs.compute_score(gts, res)
        assert abs(ours[0] - mean) <= allowed; np.testing.assert_allclose(ours[1], each, rtol=0, atol=allowed)
    assert np.abs(cider(refs, hyps, clipped=False)[1] - each).max() > .1 # the package's "CIDEr" is CIDEr-D


def test_five_captions_an_image_score_as_one_by_one(odd):
    refs, hyps = odd; scorer = Cider(refs); r = rng('owners'); owner = r.integers(0, len(refs), 5 * len(refs))
    captions_ = [hyps[int(i)] for i in r.integers(0, len(hyps), len(owner))]
    np.testing.assert_allclose(scorer.scores(captions_, owner), [scorer.scores([c], [i])[0] for c, i in zip(captions_, owner)], rtol=0, atol=1e-14) # sums in another order
    one = [cider([refs[i]], [c], scorer.frequencies)[0] for c, i in zip(captions_, owner)] # references of one image alone, frequencies of all
    np.testing.assert_allclose(scorer.scores(captions_, owner), one, rtol=0, atol=1e-12)


def test_frequencies_survive_the_file_and_score_the_same(odd, tmp_path):
    refs, hyps = odd; df = document_frequencies(refs); again = load_frequencies(save_frequencies(tmp_path / 'df.json', df))
    assert again.counts == df.counts and again.documents == df.documents == len(refs)
    np.testing.assert_array_equal(Cider(refs, again).scores(hyps), Cider(refs, df).scores(hyps))
    plain = {}
    for sentences in refs:
        for gram in {tuple(w[i:i + n]) for w in (s.split() for s in sentences) for n in range(1, 5) for i in range(len(w) - n + 1)}: plain[gram] = plain.get(gram, 0) + 1
    assert plain == df.counts


def test_an_empty_caption_scores_nothing_and_a_word_something():
    refs = [['a b', 'a'], ['c d']]
    found = Cider(refs).scores(['', 'a', 'a', 'c'], [0, 0, 1, 1])
    assert found[0] == found[2] == 0 and found[1] > found[3] > 0 # 'c' loses a pair in length, 'a' has a reference as short as itself


@pytest.mark.parametrize('refs, hyps, word', [([], [], 'no image'), ([['a']], ['a', 'b'], '1 images with references, 2 hypotheses'), ([['a'], []], ['a', 'b'], 'image 1'), (['a b'], ['a'], 'image 0'), ({1: ['a']}, ['a'], 'dict')])
def test_lists_that_do_not_match_are_refused(refs, hyps, word):
    for score in (bleu, rouge_l, cider, caption_scores, java_scores):
        with pytest.raises(BadInput, match=word): score(refs, hyps)


def test_objects_are_counted_over_all_images():
    assert object_f1(['a cat on a bus', 'nothing'], [{'cat'}, {'dog'}], ['cat', 'dog', 'bus']) == 2 * 1 / (2 + 2)
    assert object_f1(['dogs'], [{'dog'}], ['dog']) == 0. # plural forms are other words


def test_meteor_by_java(golden):
    java()
    found = java_scores(golden['refs'], golden['hyps'], ('METEOR',))
    assert found['METEOR'] == pytest.approx(100 * golden['scores']['meteor_java'], abs=1e-9)


def test_what_java_would_need_is_said_in_words(monkeypatch):
    monkeypatch.setattr(captions.shutil, 'which', lambda name: None)
    assert all(v.startswith('not computed: ') for v in java_scores([['a']], ['a']).values())
    monkeypatch.setattr(captions.importlib.util, 'find_spec', lambda name: None)
    assert java_scores([['a']], ['a']) == dict.fromkeys(('METEOR', 'SPICE'), 'not computed: pycocoevalcap is not installed')


def test_spice_is_never_fetched(monkeypatch):
    folder = java() / 'spice' / 'lib'
    if (folder / 'stanford-corenlp-3.6.0.jar').exists(): pytest.skip('its parser is here')
    monkeypatch.setattr('urllib.request.urlretrieve', lambda *a, **k: pytest.fail('went to the network'))
    assert 'stanford-corenlp-3.6.0' in java_scores([['a dog']], ['a dog'], ('SPICE',))['SPICE']


# --- vocabulary ------------------------------------------------------------------------------------------------------

def test_words_come_by_count_then_alphabet(golden):
    texts = golden['scst_df_corpus_tok']; found = build_vocabulary(texts, least=2); count = {}
    for w in ' '.join(texts).split(): count[w] = count.get(w, 0) + 1
    assert found.words[:4] == SPECIALS == ('<unk>', '<pad>', '<bos>', '<eos>') and [found.index[w] for w in SPECIALS] == [0, 1, 2, 3]
    assert list(found.words[4:]) == [w for w, n in sorted(count.items(), key=lambda p: (-p[1], p[0])) if n >= 2] and found.counts == tuple(count[w] for w in found.words[4:])


def test_sentences_survive_ids_and_the_vocabulary_its_file(golden, tmp_path):
    texts = golden['scst_df_corpus_tok']; found = build_vocabulary(texts, 1, 'reference'); ids, lost = found.batch(texts)
    assert lost == 0 and [found.decode(r) for r in ids] == texts and (ids[:, 0] == 2).all() and ((ids == 3).sum(1) == 1).all()
    again = Vocabulary.load(found.save(tmp_path / 'v.json'))
    assert again == found and again.hash == found.hash != build_vocabulary(texts, 2).hash and torch.equal(again.batch(texts)[0], ids)


def test_reading_unknown_words_does_not_grow_the_vocabulary():
    found = build_vocabulary(['a b', 'a b'], 2); size, mark = len(found), found.hash
    for text in ('x y z', 'a q'): assert found.encode(text)[-1] == 0
    assert len(found) == len(found.index) == size and found.hash == mark
    with pytest.raises(AttributeError): found.words = ()


def test_one_row_too_few_is_found_before_training(golden):
    texts = golden['scst_df_corpus_tok']; found = build_vocabulary(texts, 1); ids = [f'image {i // 5}' for i in range(len(texts))]
    last = found.words[-1]; holder = next(i for i, t in enumerate(texts) if last in t.split())
    assert check_ids(found, texts, ids, len(found))['unknown'] == 0
    with pytest.raises(BadInput) as e: check_ids(found, texts, ids, len(found) - 1)
    for part in (f'{len(found) - 1} rows', f'"{last}"', ids[holder], texts[holder], f'{len(found)} rows'): assert part in str(e.value)
    table = torch.nn.Embedding(len(found) - 1, 2) # the incident: most batches pass, the one with the rarest word stops
    assert table(found.batch([t for t in texts if last not in t.split()])[0]).isfinite().all()
    with pytest.raises(IndexError): table(found.batch([texts[holder]])[0])


def test_an_empty_caption_is_named():
    found = build_vocabulary(['a dog'] * 5)
    with pytest.raises(BadInput, match='image 42'): check_ids(found, ['a dog', ''], ['41', '42'], len(found))
