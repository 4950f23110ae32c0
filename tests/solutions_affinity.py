"Solutions of the exercises at the end of the AffinityNet lesson, and the check that compares an answer with them."
import torch


def one_step(scores, A): return scores @ (A / A.sum(1, keepdim=True)).T


def in_the_limit(scores, region): return int(scores[:, region].mean(1).argmax())


def bonds(h, w, radius):
    offsets = [(y, x) for y in range(1 - radius, radius) for x in range(1 - radius, radius) if (y, x) > (0, 0) and y * y + x * x < radius * radius]
    return sum((h - abs(y)) * (w - abs(x)) for y, x in offsets if abs(y) < h and abs(x) < w)


SOLUTIONS = dict(one_step=one_step, in_the_limit=in_the_limit, bonds=bonds)


def verdict(function, *given):
    "'not written yet', 'right', or what is wrong with the answer of a reader's function."
    try: answer = function(*given)
    except Exception as e: return f'not yet, it raises {type(e).__name__}: {e}'
    if answer is None or answer is ...: return 'not written yet'
    right = torch.as_tensor(SOLUTIONS[function.__name__](*given), dtype=torch.float64)
    try: answer = torch.as_tensor(answer, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError): return f'not yet, it gives {type(answer).__name__}, numbers are wanted'
    if answer.shape != right.shape: return f'not yet, it gives the shape {tuple(answer.shape)} instead of {tuple(right.shape)}'
    if not answer.isfinite().all(): return 'not yet, it gives numbers that are not finite'
    gap = (answer - right).abs().max().item()
    if gap <= 1e-4 * max(1, right.abs().max().item()): return 'right'
    hint = {'one_step': '; does each row of weights sum to 1?', 'bonds': '; is each pair counted once, and none that leaves the grid?', 'in_the_limit': '; compare means over the region'}
    return f'not yet, the largest difference is {gap:.4g}{hint[function.__name__]}'


def check(function, *given): print(f'{function.__name__}: {verdict(function, *given)}')
