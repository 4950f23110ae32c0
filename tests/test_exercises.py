"The check of the exercises knows an empty function, a right one and a wrong one; the lesson itself compares the solutions with the library."
import pytest
import torch

import solutions_affinity as affinity
import solutions_cdtr as cdtr
import solutions_fsgr as fsgr
import solutions_more as more
import solutions_surgery as surgery
from wsl_nb.more_base import LAPTOP

GIVEN = dict(cre_by_hand=(torch.tensor([1., 0.]), torch.rand(5, 2), torch.arange(5) < 2), mean_entropy=(torch.rand(2, 3, 4).softmax(-1), torch.tensor([[1., 0, 1], [0, 1, 0]])),
             on_object=(torch.tensor([[0, 0, 0], [0, 1, 1]]), torch.eye(16).roll(3, 1)), paper_graph=(LAPTOP,))


@pytest.mark.parametrize('name', more.SOLUTIONS)
def test_answers_are_told_apart(name, capsys):
    def named(body): body.__name__ = name; return body
    for body, says in ((lambda *given: None, 'not written yet'), (lambda *given: more.SOLUTIONS[name](*given), 'right'), (lambda *given: LAPTOP if name == 'paper_graph' else 7., 'not yet'),
                       (lambda *given: 1 / 0, 'ZeroDivisionError'), (lambda *given: 'word', 'not yet')):
        more.check(named(body), *GIVEN[name]); text = capsys.readouterr().out
        assert text.startswith(f'{name}: {says}') or says in text and 'right' not in text, text


PAIRS = dict(one_step=(torch.rand(2, 4), torch.rand(4, 4)), in_the_limit=(torch.tensor([[.6, .5, .1, .2], [.2, .3, .9, .1]]), torch.tensor([True, True, True, False])), bonds=(6, 7, 3))


MAPS = dict(class_aware=(torch.rand(6, 6) + .1, (torch.arange(36).reshape(6, 6) // 12).long(), 0, 1), area_factor=(32,), broadcast_gradient=(torch.rand(3, 4, 4), torch.rand(3, 4, 4)))
WORDS = dict(maskclip=(torch.rand(3, 4), (torch.rand(4, 4), torch.rand(4)), (torch.rand(4, 4), torch.rand(4))), changes_the_order=(torch.tensor([[.5, .45], [.2, .1]]), torch.tensor([.9, 1.1])), flipped_auc=(.3,))

TAGS = dict(tag_length=(12,), advantages=(torch.tensor([[2., 0., 1.], [5., 5., 5.]]),), similarity_gradient=(torch.nn.functional.normalize(torch.rand(4, 3), dim=1), 1 - torch.eye(4), .5))


@pytest.mark.parametrize('lesson,name,given', [(affinity, n, PAIRS[n]) for n in affinity.SOLUTIONS] + [(cdtr, n, MAPS[n]) for n in cdtr.SOLUTIONS] + [(surgery, n, WORDS[n]) for n in surgery.SOLUTIONS] + [(fsgr, n, TAGS[n]) for n in fsgr.SOLUTIONS])
def test_answers_in_numbers_are_told_apart(lesson, name, given, capsys):
    def named(body): body.__name__ = name; return body
    for body, says in ((lambda *given: None, 'not written yet'), (lambda *given: lesson.SOLUTIONS[name](*given), 'right'), (lambda *given: lesson.SOLUTIONS[name](*given) + 1, 'not yet, the largest'),
                       (lambda *given: torch.zeros(9, 9), 'not yet, it gives the shape'), (lambda *given: 1 / 0, 'ZeroDivisionError'), (lambda *given: 'word', 'numbers are wanted'),
                       (lambda *given: lesson.SOLUTIONS[name](*given) * float('nan'), 'not finite')):
        lesson.check(named(body), *given); text = capsys.readouterr().out
        assert says in text and (says == 'right' or 'right' not in text), text


def test_the_usual_slips_are_wrong():
    "Columns instead of rows; a sum of values instead of a mean; both directions of a pair."
    scores, A = PAIRS['one_step']
    assert 'sum to 1' in affinity.verdict(type('f', (), dict(__name__='one_step', __call__=lambda self, s, a: s @ a.T))(), scores, A)
    def bonds(h, w, radius): return 2 * affinity.SOLUTIONS['bonds'](h, w, radius)
    assert 'counted once' in affinity.verdict(bonds, 6, 7, 3)
