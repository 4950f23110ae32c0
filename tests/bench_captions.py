"What `bench.py` times of caption scores: CIDEr-D of a set of the size of COCO's validation split against pycocoevalcap's scorer, and the tokeniser."
import numpy as np

from bench import Row, timed_row
from wsl_nb.captions import Cider, document_frequencies, ptb_tokens
from wsl_nb.core import rng


def corpus(images, each=5, words=6000):
    "References of each image and an edited one of them; words as frequent as in text (the k-th as 1/k), those of an image partly shared by its references."
    r = rng('bench captions', images); chance = 1 / np.arange(1, words + 1) ** 1.05; chance /= chance.sum()
    lengths = r.poisson(4.5, (images, each)) + 6; drawn = r.choice(words, (images, each, 40), p=chance); topic = r.choice(words, (images, 12), p=chance); shared = r.random((images, each, 40)) < .5
    place = np.minimum(r.integers(0, 3, (images, each, 40)).cumsum(-1) // 2, 11)
    ids = np.where(shared, np.take_along_axis(topic[:, None].repeat(each, 1), place, 2), drawn)
    references = [[' '.join(f'w{k}' for k in ids[i, j, :lengths[i, j]]) for j in range(each)] for i in range(images)]
    return references, [edited(refs[int(r.integers(each))], r) for refs in references]


def edited(sentence, r):
    "A word dropped, doubled or replaced here and there."
    out = []
    for word in sentence.split():
        chance = r.random()
        if chance < .1: continue
        out += [word, word] if chance < .14 else [f'w{int(r.integers(6000))}'] if chance < .2 else [word]
    return ' '.join(out)


def scorer_of(references, hypotheses, table):
    "pycocoevalcap's scorer with given document frequencies in place of its own count."
    from collections import defaultdict
    from pycocoevalcap.cider.cider_scorer import CiderScorer
    scorer = CiderScorer()
    for refs, hypothesis in zip(references, hypotheses): scorer += (hypothesis, refs)
    scorer.document_frequency = defaultdict(float, table)
    return scorer


def cider_pair(quick, repeats, now):
    "5,000 captions with five references each; both sides build the vectors of the references inside the measurement, and are given the document frequencies in their own form."
    references, hypotheses = corpus(60 if quick else 5000); df = document_frequencies(references); table = df.counts
    slow, fast = (lambda: np.array(scorer_of(references, hypotheses, table).compute_cider())), (lambda: Cider(references, df).scores(hypotheses))
    row = timed_row(f'CIDEr-D, {len(references)} captions x 5 references, frequencies given; plain: pycocoevalcap', slow, fast, repeats, now, error=float(np.abs(slow() - fast()).max()), allowed=1e-9, aim=None if quick else 4)
    row.more['mean score'] = float(fast().mean()); row.more['different n-grams'] = len(table)
    yield row
    images = len(references)
    def _counted():
        scorer = scorer_of(references, hypotheses, {}); scorer.compute_doc_freq(); return scorer.document_frequency
    own, kept = _counted(), document_frequencies(references)
    yield timed_row(f'document frequencies of {images} images; plain: pycocoevalcap', _counted, lambda: document_frequencies(references), repeats, now, error=float(own != kept.counts), allowed=0)


def reward_pair(quick, repeats, now):
    "A batch of self-critical training, 50 images with 5 captions each; ours keeps the vectors of the references, pycocoevalcap builds them for each caption."
    references, hypotheses = corpus(10 if quick else 50); images = len(references)
    df = document_frequencies([[s] for r in references for s in r]); table, owner = df.counts, np.repeat(np.arange(images), 5) # as many documents as captions scored: pycocoevalcap takes the number of these
    captions, again = [s for h in hypotheses for s in (h, h, h + ' w1', h[:len(h) // 2], h)], [references[i] for i in owner]
    kept = Cider(references, df)
    slow, fast = (lambda: np.array(scorer_of(again, captions, table).compute_cider())), (lambda: kept.scores(captions, owner))
    yield timed_row(f'reward of {len(captions)} captions of {images} images; plain: pycocoevalcap', slow, fast, repeats, now, error=float(np.abs(slow() - fast()).max()), allowed=1e-9)


def tokens_row(quick, repeats, now):
    "Raw captions to tokens; no second form, since the Java program runs in another process."
    words = "a man isn't riding his horse, and the dog's close-up is near St. Mark's at 3:30 p.m.".split()
    r = rng('bench tokens'); texts = [' '.join(r.choice(words, 11)).capitalize() + '.' for _ in range(200 if quick else 5000)]
    start = now(); count = sum(len(ptb_tokens(t)) for t in texts); seconds = now() - start
    yield Row(f'tokeniser, {len(texts)} sentences', more={'milliseconds a sentence': seconds / len(texts) * 1e3, 'tokens': count})


PARTS = dict(cider=cider_pair, reward=reward_pair, tokens=tokens_row)
