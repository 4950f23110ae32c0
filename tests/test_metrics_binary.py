"Object against ground: every golden number of the affinity set, scikit-learn, border policies."
from pathlib import Path

import numpy as np
import pytest
import torch

from wsl_nb.core import BadInput, rng
from wsl_nb.formats_pet import trimap_mask
from wsl_nb.metrics import confusion_matrix
from wsl_nb.metrics_binary import BORDERS, apply_border, binary_counts, binary_scores, class_scores, fold_matrix, mean_scores, pooled_scores

GOLDEN = Path(__file__).parent/'golden'/'affinity'/'metrics.safetensors'
ORDER = ('precision', 'recall', 'f1', 'iou', 'iou_background', 'miou')


@pytest.fixture(scope='module')
def stored():
    "Tensors of the set, and the masks of its trimaps."
    from safetensors.numpy import load_file
    stored = load_file(GOLDEN)
    return stored, [trimap_mask(stored[f'trimap_{i}'], int(kind) - 1) for i, kind in enumerate(stored['labels'])]


@pytest.mark.parametrize('policy', BORDERS)
def test_golden_binary_scores(stored, policy):
    "Counts exactly; pooled, per image and their mean to 1e-6."
    stored, masks = stored
    rows = [binary_counts(stored[f'pred_{i}'], apply_border(mask, policy)) for i, mask in enumerate(masks)]
    assert np.array_equal(np.sum(rows, 0), stored[f'{policy}.tp_fp_fn_tn'])
    assert np.allclose([pooled_scores(rows)[k] for k in ORDER], stored[f'{policy}.pooled_P_R_F1_IoUfg_IoUbg_mIoU'], atol=1e-6, rtol=0)
    assert np.allclose([[binary_scores(row)[k] for k in ORDER[:4]] for row in rows], stored[f'{policy}.per_image_P_R_F1_IoU'], atol=1e-6, rtol=0)
    assert np.allclose([mean_scores(rows)[k] for k in ORDER[:4]], stored[f'{policy}.per_image_mean'], atol=1e-6, rtol=0)


def test_golden_classes(stored):
    "38 classes: the matrix exactly, IoU with NaN where a class occurs nowhere, mean over the others; its fold gives the binary counts."
    stored, masks = stored
    matrix = sum(confusion_matrix(stored[f'pred_{i}'], mask, 38) for i, mask in enumerate(masks))
    assert np.array_equal(matrix.numpy(), stored['ignore.class38_confusion']) and fold_matrix(matrix) == tuple(stored['ignore.tp_fp_fn_tn'])
    found = class_scores(matrix)
    assert np.isnan(found['iou']).sum() > 30 and np.allclose(found['iou'], stored['ignore.class38_iou'], atol=1e-6, rtol=0, equal_nan=True)
    assert abs(found['miou_found'] - stored['ignore.class38_miou_nanmean'].item()) < 1e-6
    assert np.isclose(found['miou_objects'], np.nanmean(stored['ignore.class38_iou'][1:]), atol=1e-6)


def test_no_golden_tensor_is_left_out(stored):
    "What the two tests above compare, with the inputs, is the whole file."
    names = {f'{k}_{i}' for k in ('trimap', 'pred') for i in range(4)} | {'labels', *(f'ignore.class38_{k}' for k in ('confusion', 'iou', 'miou_nanmean'))}
    names |= {f'{p}.{k}' for p in BORDERS for k in ('tp_fp_fn_tn', 'pooled_P_R_F1_IoUfg_IoUbg_mIoU', 'per_image_P_R_F1_IoU', 'per_image_mean')}
    assert set(stored[0]) == names


@pytest.mark.parametrize('seed', range(4))
def test_scores_equal_scikit_learn(seed):
    "Random masks with undecided pixels, as arrays and as tensors."
    from sklearn.metrics import f1_score, jaccard_score, precision_score, recall_score
    r = rng('binary', seed)
    pred, truth = r.integers(0, 4, (9, 11)).astype(np.uint8), np.where(r.random((9, 11)) < .2, 255, r.integers(0, 3, (9, 11))).astype(np.uint8)
    counts = binary_counts(pred, truth); known = truth != 255
    assert counts == binary_counts(torch.from_numpy(pred), torch.from_numpy(truth)) and sum(counts) == known.sum() and all(isinstance(n, int) for n in counts)
    a, b = truth[known] > 0, pred[known] > 0
    want = [f(a, b) for f in (precision_score, recall_score, f1_score, jaccard_score)] + [jaccard_score(~a, ~b)]
    assert np.allclose([binary_scores(counts)[k] for k in ORDER[:5]], want, atol=1e-12)


def test_nothing_found_and_nothing_to_find():
    "0/0 is 0, in the mean as well; a truth that is undecided everywhere is refused."
    blank = np.zeros((4, 4), np.uint8)
    assert binary_scores(binary_counts(blank, blank)) == dict(precision=0, recall=0, f1=0, iou=0, iou_background=1, miou=.5)
    rows = [binary_counts(blank, blank), binary_counts(blank + 3, blank + 1)]
    assert mean_scores(rows)['f1'] == .5 and pooled_scores(rows)['f1'] == 1
    with pytest.raises(BadInput, match='undecided'): binary_scores(binary_counts(blank, blank + 255))


@pytest.mark.parametrize('kind', ['array', 'tensor'])
def test_border_policies(kind):
    "Kind and type are kept, the argument is not changed, nothing but 255 changes."
    mask = np.uint8([[0, 255, 5], [5, 255, 0]]); given = mask.copy() if kind == 'array' else torch.from_numpy(mask.copy())
    for policy, fill in zip(BORDERS, (255, 0, 5)):
        out = apply_border(given, policy)
        assert type(out) is type(given) and out.dtype == given.dtype and np.array_equal(np.asarray(out), np.where(mask == 255, fill, mask)) and np.array_equal(np.asarray(given), mask)
    several = mask.copy(); several[0, 2] = 9
    with pytest.raises(BadInput, match='2 object classes'): apply_border(several, 'border_fg')
    assert apply_border(several, 'border_fg', 9)[0, 1] == 9 and apply_border(several, 'border_bg')[0, 1] == 0
