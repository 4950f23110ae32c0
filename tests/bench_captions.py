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


def with_frequencies(references, hypotheses, df):
    "pycocoevalcap's scorer from the same sentences with given document frequencies: they take the place of its own count."
    from collections import defaultdict
    from pycocoevalcap.cider.cider_scorer import CiderScorer
    scorer = CiderScorer()
    for refs, hypothesis in zip(references, hypotheses): scorer += (hypothesis, refs)
    scorer.document_frequency = defaultdict(float, df.counts); scorer.compute_doc_freq = lambda: None
    return np.array(scorer.compute_cider())


def cider_pair(quick, repeats, now):
    "5,000 captions with five references each; both sides build the vectors of the references inside the measurement, and are given the document frequencies."
    references, hypotheses = corpus(60 if quick else 5000); df = document_frequencies(references)
    slow, fast = (lambda: with_frequencies(references, hypotheses, df)), (lambda: Cider(references, df).scores(hypotheses))
    error = float(np.abs(slow() - fast()).max())
    row = timed_row(f'CIDEr-D, {len(references)} captions x 5 references, frequencies given; plain: pycocoevalcap', slow, fast, repeats, now, error=error, allowed=1e-9, aim=None if quick else 4)
    row.more['mean score'] = float(fast().mean()); row.more['different n-grams'] = len(df.counts)
    yield row
    built = Cider(references[:50], df); owner = np.repeat(np.arange(50), 5); five = [s for h in hypotheses[:50] for s in [h] * 5]
    again = lambda: with_frequencies([references[i] for i in owner], five, df)
    row = timed_row('a reward batch: 50 images x 5 captions, vectors of the references kept; plain: pycocoevalcap', again, lambda: built.scores(five, owner), repeats, now, error=float(np.abs(again() - built.scores(five, owner)).max()), allowed=1e-9)
    yield row


def tokens_row(quick, repeats, now):
    "Raw captions to tokens; no second form, since the Java program runs in another process."
    words = "a man isn't riding his horse, and the dog's close-up is near St. Mark's at 3:30 p.m.".split()
    r = rng('bench tokens'); texts = [' '.join(r.choice(words, 11)).capitalize() + '.' for _ in range(200 if quick else 5000)]
    start = now(); count = sum(len(ptb_tokens(t)) for t in texts); seconds = now() - start
    yield Row(f'tokeniser, {len(texts)} sentences', more={'milliseconds a sentence': seconds / len(texts) * 1e3, 'tokens': count})


PARTS = dict(cider=cider_pair, tokens=tokens_row)
