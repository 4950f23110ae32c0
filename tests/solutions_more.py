"Solutions of the exercises at the end of the MoRe lesson, and the check that compares an answer with them."
from dataclasses import replace

import torch
import torch.nn.functional as F


def cre_by_hand(q, P, confident, tau=.5): return -F.log_softmax(P @ q / tau, 0)[confident].mean()


def mean_entropy(gate, present): return torch.special.entr(gate).sum(-1)[present > 0].mean()


def on_object(picks, mask):
    patches = F.max_pool2d((mask > 0).float()[None, None], 8)[0, 0]
    return patches[picks[:, 1], picks[:, 2]].mean()


def paper_graph(recipe): return replace(recipe, gate='dot', tails='patches', neighbours=72)


SOLUTIONS = dict(cre_by_hand=cre_by_hand, mean_entropy=mean_entropy, on_object=on_object, paper_graph=paper_graph)


def verdict(function, *given):
    "'not written yet', 'right', or what is wrong with the answer of a reader's function."
    try: answer = function(*given)
    except Exception as e: return f'not yet, it raises {type(e).__name__}: {e}'
    if answer is None or answer is ...: return 'not written yet'
    right = SOLUTIONS[function.__name__](*given)
    if isinstance(right, torch.Tensor): return number(answer, right.item())
    if answer == right: return 'right'
    if type(answer) is not type(right): return f'not yet, it gives {type(answer).__name__}, a recipe is wanted'
    odd = sorted(k for k in vars(right) if getattr(answer, k) != getattr(right, k))
    return f'not yet, look at {", ".join(odd)}'


def number(answer, right):
    "The verdict on a number: what it is, what it should be, and the usual reason for NaN."
    try: answer = torch.as_tensor(answer, dtype=torch.float64).detach()
    except (TypeError, ValueError): return f'not yet, it gives {type(answer).__name__}, a number is wanted'
    if answer.numel() != 1: return f'not yet, it gives {tuple(answer.shape)}, one number is wanted'
    if answer.isnan(): return 'not yet, it gives nan: 0 times the logarithm of 0 shall count as 0'
    return 'right' if abs(answer.item() - right) < 1e-3 * max(1, abs(right)) else f'not yet, it gives {answer.item():.4f} instead of {right:.4f}'


def check(function, *given): print(f'{function.__name__}: {verdict(function, *given)}')
