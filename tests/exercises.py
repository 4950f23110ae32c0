"What the checks of the exercises share: the verdict on a reader's function that gives numbers."
import torch


def verdict(solutions, hints, function, *given):
    "'not written yet', 'right', or what is wrong with the answer of a reader's function."
    try: answer = function(*given)
    except Exception as e: return f'not yet, it raises {type(e).__name__}: {e}'
    if answer is None or answer is ...: return 'not written yet'
    right = torch.as_tensor(solutions[function.__name__](*given), dtype=torch.float64)
    try: answer = torch.as_tensor(answer, dtype=torch.float64).detach()
    except (TypeError, ValueError, RuntimeError): return f'not yet, it gives {type(answer).__name__}, numbers are wanted'
    if answer.shape != right.shape: return f'not yet, it gives the shape {tuple(answer.shape)} instead of {tuple(right.shape)}'
    if not answer.isfinite().all(): return 'not yet, it gives numbers that are not finite'
    gap = (answer - right).abs().max().item()
    if gap <= 1e-4 * max(1, right.abs().max().item()): return 'right'
    return f'not yet, the largest difference is {gap:.4g}{hints.get(function.__name__, "")}'
