"The check of the exercises knows an empty function, a right one and a wrong one; the lesson itself compares the solutions with the library."
import pytest
import torch

import solutions_more as more
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
