"""Metrics against the golden numbers, torchmetrics and scikit-learn; records against the contract."""
import dataclasses, json, math
from pathlib import Path

import numpy as np
import pytest
import torch

from wsl_nb import metrics
from wsl_nb.core import BadInput, rng

GOLDEN = Path(__file__).parent/'golden'/'more'
FIELDS = '''schema method dataset split metric value unit spread values kind source protocol images skipped seeds preset config_hash weights_hash
data_hash version commit device threads seconds cpu_seconds date run'''.split()
COMMON = dict(unit='%', images=9, preset='P', config_hash='c', weights_hash='w', data_hash='d', seconds=1, cpu_seconds=1)


def pair(key, shape=(3, 17, 23), classes=6):
    r = rng(key)
    return torch.tensor(r.integers(0, classes, shape)), torch.tensor(np.where(r.random(shape) < .1, 255, r.integers(0, classes, shape)))


def test_golden():
    from safetensors.torch import load_file
    stored, want = load_file(GOLDEN/'labels.safetensors'), json.loads((GOLDEN/'config.json').read_text())['metrics']
    got = metrics.segmentation_scores(metrics.confusion_matrix(stored['metric.pred'].where(stored['metric.gt'] != 255, 0), stored['metric.gt'], 21))
    names = dict(miou='miou', pAcc='pixel_accuracy', mAcc='mean_accuracy', miou_table_mean='miou_all', iou='iou', precision='precision', recall='recall', confusion='confusion')
    for theirs, ours in names.items():
        a = np.array([math.nan if v is None else v for v in np.atleast_1d(np.array(want[theirs], object))], float)
        b = np.where(np.isinf(got[ours]), np.nan, got[ours])                # JSON stores infinite and undefined as null
        np.testing.assert_allclose(np.atleast_1d(b), a, atol=1e-6, err_msg=theirs)
    assert math.isinf(got['confusion_ratio'])


@pytest.mark.parametrize('classes', [2, 6, 81])
def test_matrix_equals_torchmetrics(classes):
    from torchmetrics.classification import MulticlassConfusionMatrix, MulticlassJaccardIndex
    pred, gt = pair(classes, classes=classes)
    matrix = metrics.confusion_matrix(pred, gt, classes)
    assert torch.equal(matrix, MulticlassConfusionMatrix(classes, ignore_index=255)(pred, gt)) and matrix.dtype == torch.int64
    jaccard = MulticlassJaccardIndex(classes, average=None, ignore_index=255)(pred, gt)
    np.testing.assert_allclose(np.nan_to_num(metrics.segmentation_scores(matrix)['iou']), jaccard, atol=1e-6)


def test_matrices_add_up():
    pred, gt = pair('sum')
    assert torch.equal(sum(metrics.confusion_matrix(p, g, 6) for p, g in zip(pred, gt)), metrics.confusion_matrix(pred, gt, 6))


@pytest.mark.parametrize('change', ['size', 'channel', '255', 'high', 'label', 'float', 'negative', 'bool'])
def test_matrix_refuses(change):
    pred, gt = pair('bad')
    if change == 'size': pred = pred[:, :-1]
    if change == 'channel': gt = gt.unsqueeze(-1).expand(-1, -1, -1, 3)
    if change == '255': pred[0, 0, 0] = 255; gt[0, 0, 0] = 255              # refused even where the truth is not counted
    if change == 'high': pred[0, 0, 0] = 6
    if change == 'label': gt[0, 0, 0] = 6
    if change == 'float': pred = pred.float()
    if change == 'negative': gt[0, 0, 0] = -1
    if change == 'bool': pred = (pred > 2).long() * 7
    with pytest.raises(BadInput, match='cure'): metrics.confusion_matrix(pred, gt, 6)


@pytest.mark.filterwarnings('error')
def test_read_only_arrays_are_taken():
    ids = np.eye(5, dtype=np.uint8) * 3; ids.flags.writeable = False
    assert metrics.confusion_matrix(ids, ids, 4).trace() == 25
    assert metrics.far_mass(np.broadcast_to(1., (5, 5)), ids) == 0 and metrics.pixel_auc(ids, ids) == 1


def test_tags_and_auc_equal_sklearn():
    sk = pytest.importorskip('sklearn.metrics')
    r = rng('tags')
    pred, label = r.random((50, 8)) < .3, r.random((50, 8)) < .3
    assert abs(metrics.tags_f1(pred, label) - sk.f1_score(label, pred, average='samples', zero_division=1)) < 1e-12
    heat, mask = np.round(r.random((20, 30)), 1), r.random((20, 30)) < .4       # rounding makes ties
    assert abs(metrics.pixel_auc(heat, mask) - sk.roc_auc_score(mask.ravel(), heat.ravel())) < 1e-12


def test_far_mass_equals_brute_force():
    r = rng('far')
    mask, maps = r.random((24, 30)) < .01, r.random((3, 24, 30))
    y, x = np.mgrid[:24, :30]
    nearest = np.min([np.hypot(y - a, x - b) for a, b in zip(*np.nonzero(mask))], 0)
    for d in (0, 5, 16):
        np.testing.assert_allclose(metrics.far_mass(maps, mask, d), (maps * (nearest > d)).sum((1, 2)) / maps.sum((1, 2)))
    several = np.stack([mask, mask[::-1], mask[:, ::-1]])
    np.testing.assert_allclose(metrics.far_mass(torch.tensor(maps), torch.tensor(several), 5), [metrics.far_mass(m, k, 5) for m, k in zip(maps, several)])


def test_fields_are_those_of_the_contract():
    assert sorted(f.name for f in dataclasses.fields(metrics.Result)) == sorted(FIELDS)
    assert metrics.KINDS == ('paper', 'official log', 'earlier report', 'ours', 'not run')


@pytest.mark.parametrize('field', [f for f in FIELDS if f != 'commit'])
def test_our_number_needs_every_field(field):
    whole = metrics.record('m', 'd', 's', 'x', [1., 3.], seeds=[0, 1], **COMMON)
    assert dataclasses.replace(whole, commit=None).value == 2
    with pytest.raises(BadInput): dataclasses.replace(whole, **{field: None})


@pytest.mark.parametrize('values', [[1.5], [1., 2., 4.], [.5, math.inf]])
def test_spread_and_round_trip(tmp_path, values):
    r = metrics.record('m', 'd', 's', 'x', values, seeds=range(len(values)), **COMMON)
    assert r.spread == 'single seed' if len(values) == 1 else r.spread == pytest.approx(np.std(values, ddof=1)) if np.isfinite(values).all() else r.spread == math.inf
    file = metrics.write_results(tmp_path/'a'/'result.json', [r])
    assert metrics.read_results(file) == [r]
    json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f'{name} is not JSON'))


def test_columns_never_mix():
    make = lambda kind, value: metrics.Result(1, 'm', 'd', 's', 'x', value, '%', kind, source=None if kind == 'not run' else 'src', preset='P')
    ours = metrics.record('m', 'd', 's', 'x', 44., seeds=0, **COMMON)
    rows = [make('paper', 11.), make('official log', 22.), make('earlier report', 33.), ours, make('not run', 'cmd')]
    lines = metrics.results_table(rows).splitlines()
    assert lines[0].split(' | ')[5:] == ['paper', 'official log', 'earlier report', 'ours', 'not run |'] and lines[3] == ''
    assert [c.split()[0] for c in lines[2].split(' | ')[5:]] == ['11.0', '22.0', '33.0', '44.0', '`cmd`']


def test_no_commit_outside_a_checkout(monkeypatch, tmp_path):
    import wsl_nb
    monkeypatch.setattr(wsl_nb, '__file__', str(tmp_path/'__init__.py')); metrics._commit.cache_clear()
    assert metrics._commit() is None
    metrics._commit.cache_clear()
