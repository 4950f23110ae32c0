"Solutions of the exercises at the end of the CLIP Surgery lesson, and the check that compares an answer with them."
from pathlib import Path
from runpy import run_path

SHARED = run_path(str(Path(__file__).with_name('exercises.py')))


def maskclip(y, value, out):
    return (y @ value[0].T + value[1]) @ out[0].T + out[1]


def changes_the_order(scores, weights):
    before, after = scores.argmax(-1), (weights * scores - (weights * scores).mean(-1, keepdim=True)).argmax(-1)
    return (before != after).float().mean()


def flipped_auc(auc): return 1 - auc


SOLUTIONS = dict(maskclip=maskclip, changes_the_order=changes_the_order, flipped_auc=flipped_auc)
HINTS = dict(maskclip='; with the identity as attention every token keeps its own value', changes_the_order='; the mean over classes is the same for all classes of a token, the weights are not', flipped_auc='; what was hotter is now colder')


def verdict(function, *given): return SHARED['verdict'](SOLUTIONS, HINTS, function, *given)


def check(function, *given): print(f'{function.__name__}: {verdict(function, *given)}')
