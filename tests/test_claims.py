"Claims about quality, each over three seeds (`make slow`)."
import pytest

from wsl_nb import more_recipe
from wsl_nb.viz import markdown_table


@pytest.fixture(scope='module')
def three_seeds(tmp_path_factory):
    "Metric -> mean of three seeds, for the baseline and for MoRe, on the test split."
    results = more_recipe.demo(tmp_path_factory.mktemp('claims') / 'demo', seeds=(0, 1, 2))
    print(markdown_table(more_recipe.table_rows(results, more_recipe.SHOWN)))
    return {name: {r.metric: r for r in records} for name, records in results.items()}


@pytest.mark.slow
def test_more_lifts_the_attention_maps(three_seeds):
    "MoRe's LAM beats the baseline's by at least 8 mIoU points in the mean of three seeds, and for every seed."
    ours, plain = (three_seeds[k]['LAM mIoU'] for k in ('MoRe', 'baseline'))
    assert len(ours.values) == 3 and ours.images == 400
    assert ours.value - plain.value >= 8
    assert all(a > b for a, b in zip(ours.values, plain.values))


@pytest.mark.slow
def test_more_halves_the_far_mass(three_seeds):
    "What the LAM claims far from the object at least halves."
    assert three_seeds['MoRe']['LAM far mass'].value <= three_seeds['baseline']['LAM far mass'].value / 2


@pytest.mark.slow
def test_the_table_keeps_the_cam(three_seeds):
    "CAM, LAM and decoder stand in the same table, for both recipes."
    for records in three_seeds.values(): assert {'CAM mIoU', 'LAM mIoU', 'decoder mIoU', 'LAM confusion ratio', 'CAM far mass'} <= set(records)


@pytest.mark.slow
def test_the_tool_that_makes_results_runs(tmp_path, monkeypatch):
    "Ablation and protocols on four updates, two seeds; a second call takes the runs up again."
    import make_results
    from dataclasses import replace
    from wsl_nb import more_base
    from wsl_nb.metrics import read_results
    monkeypatch.setattr(more_base, 'LAPTOP', replace(more_base.LAPTOP, steps=4, switch=2, seg_from=2, data_train=32, data_eval=3))
    monkeypatch.setattr(make_results, 'SEEDS', (0, 1)); monkeypatch.setattr(make_results, 'CHANGED', dict(list(make_results.CHANGED.items())[:2]))
    for kind in ('ablation', 'protocols', 'ablation'):
        (tmp_path/kind).mkdir(exist_ok=True); getattr(make_results, kind)(tmp_path/'runs', tmp_path/kind)
    changed, every = (read_results(tmp_path/k/'result.json') for k in ('ablation', 'protocols'))
    assert {r.preset for r in changed} == {f'LAPTOP, {k}' for k in make_results.CHANGED} and all(r.seeds == (0, 1) for r in changed + every)
    assert len({r.metric for r in every if r.metric.startswith('mIoU, ')}) == 21
