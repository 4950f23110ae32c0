"Ablations: each distinct stage runs once, an interruption repeats nothing, no run writes into the files of another."
import json, os, shutil, sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import wsl_nb
from wsl_nb import cli, metrics, training_ablate
from wsl_nb.core import BadInput, file_hash, write_image
from wsl_nb.data import embedded
from wsl_nb.training_ablate import ablate, combinations, read_over, stage_counts

import linear_method, staged_method

HERE = Path(__file__).resolve().parent
SMALL = staged_method.StagedConfig()
quiet = lambda *text: None


def drawn(cfg): return embedded(cfg.data_preset, size=32, train=cfg.data_train, val=cfg.data_eval, test=cfg.data_eval)
def bytes_of(folder): return {str(p.relative_to(folder)): file_hash(p) for p in sorted(Path(folder).rglob('*')) if p.is_file()}


@pytest.fixture(autouse=True)
def clean(tmp_path, monkeypatch):
    "Counters at zero; drawn images in a folder of the session."
    staged_method.RAN.clear(); staged_method.STOP.clear()
    yield
    staged_method.STOP.clear()


def run(changes, out, **more): return ablate(staged_method, SMALL, changes, drawn, out, **(dict(say=quiet, preset='LAPTOP') | more))


# --- stages ----------------------------------------------------------------------------------------------------------

def test_each_distinct_stage_runs_once(tmp_path):
    changes, said = combinations(dict(sharp=(1., 2.), rounds=(1, 2, 3))), []
    results = run(changes, tmp_path/'out', say=said.append)
    assert [staged_method.RAN.count(s) for s in staged_method.STAGES] == [1, 2, 6]
    assert stage_counts(tmp_path/'out', staged_method.STAGES) == dict(classifier=(1, 5), labels=(2, 4), segment=(6, 0))
    assert said[-1] == 'stages: classifier made 1 time, shared 5 times; labels made 2 times, shared 4 times; segment made 6 times, shared 0 times'
    records = metrics.read_results(tmp_path/'out'/'result.json')
    assert [r.preset for r in records] == [f'LAPTOP, {name}' for name in changes] and records == [r for rows in results.values() for r in rows]
    assert records[0].run == 'sharp=1,rounds=1/seed0, last of each stage' and len({r.value for r in records}) == 6


def test_a_shared_stage_gives_the_same_numbers_as_one_of_its_own(tmp_path):
    both = run(combinations(dict(rounds=(1, 3))), tmp_path/'both')
    alone = run(combinations(dict(rounds=(3,))), tmp_path/'alone')
    for a, b in zip(both['rounds=3'], alone['rounds=3'], strict=True): assert (a.value, a.weights_hash) == (b.value, b.weights_hash)


def test_files_are_linked_and_later_runs_leave_them_alone(tmp_path, monkeypatch):
    out = tmp_path/'out'; run(combinations(dict(sharp=(1.,))), out)
    before = bytes_of(out/'sharp=1')
    run(combinations(dict(sharp=(1., 2.), hard=(False, True))), tmp_path/'other'); assert bytes_of(out/'sharp=1') == before
    run(combinations(dict(sharp=(1., 2.))), out, resume=True)
    checkpoint = next((out/'sharp=1'/'seed0'/'classifier').glob('checkpoints/*/model.safetensors'))
    twin = out/'sharp=2'/'seed0'/checkpoint.relative_to(out/'sharp=1'/'seed0')
    assert os.path.samefile(checkpoint, twin) and bytes_of(out/'sharp=1') == before
    with open(twin.parents[2]/'log.jsonl', 'a') as f: f.write('a later run adds to its log\n')
    assert bytes_of(out/'sharp=1') == before
    # the code changes: all stages are stale, and the stage of files writes in place; only the run that is asked for may change
    own = staged_method.stage_hashes
    monkeypatch.setattr(staged_method, 'stage_hashes', lambda cfg, data: {k: v + 'x' for k, v in own(cfg, data).items()})
    staged_method.RAN.clear(); training_ablate.ablate(staged_method, SMALL, combinations(dict(sharp=(2.,))), drawn, out, resume=True, preset='LAPTOP', say=quiet)
    assert staged_method.RAN == list(staged_method.STAGES) and bytes_of(out/'sharp=1') == before and not os.path.samefile(checkpoint, twin)


def test_a_stale_stage_of_files_is_unlinked_before_it_is_written(tmp_path, monkeypatch):
    out = tmp_path/'out'; run(combinations(dict(rounds=(1, 2))), out)
    mine, theirs = (out/f'rounds={n}'/'seed0'/'labels'/'0.npy' for n in (2, 1))
    assert os.path.samefile(mine, theirs); before = file_hash(theirs)
    own = staged_method.stage_hashes
    monkeypatch.setattr(staged_method, 'stage_hashes', lambda cfg, data: own(cfg, data) | dict(labels='new', segment=f'new {cfg.rounds}'))
    monkeypatch.setattr(np, 'save', lambda f, a, save=np.save: save(f, a + 1))
    run(combinations(dict(rounds=(2,))), out, resume=True)
    assert file_hash(theirs) == before != file_hash(mine) and staged_method.RAN[-2:] == ['labels', 'segment']


def test_scores_of_older_weights_never_stand_for_newer_ones(tmp_path, monkeypatch):
    out, one = tmp_path/'out', combinations(dict(rounds=(2,))); old = run(one, out)['rounds=2'][0]
    own, scored = staged_method.stage_hashes, []
    monkeypatch.setattr(staged_method, 'stage_hashes', lambda cfg, data: own(cfg, data) | dict(labels='new', segment='new')) # the code of two stages changes …
    monkeypatch.setattr(np, 'save', lambda f, a, save=np.save: save(f, 1 - a))
    def evaluate(*given, evaluate=staged_method.evaluate):
        scored.append(1)
        if len(scored) == 1: raise KeyboardInterrupt # … and the resumed ablation is killed when all is trained
        return evaluate(*given)
    monkeypatch.setattr(staged_method, 'evaluate', evaluate)
    with pytest.raises(KeyboardInterrupt): run(one, out, resume=True)
    staged_method.RAN.clear(); new = run(one, out, resume=True)['rounds=2'][0]
    assert staged_method.RAN == [] and len(scored) == 2 and new.value != old.value and new.weights_hash != old.weights_hash
    assert run(one, out, resume=True)['rounds=2'][0] == new and len(scored) == 2


@pytest.mark.parametrize('stop', staged_method.STAGES)
def test_an_interrupted_ablation_goes_on_and_repeats_nothing(stop, tmp_path):
    changes, out = combinations(dict(sharp=(1., 2.), rounds=(2, 3))), tmp_path/'out'
    whole = run(changes, tmp_path/'whole'); counts = [staged_method.RAN.count(s) for s in staged_method.STAGES]; staged_method.RAN.clear()
    staged_method.STOP.append(stop)
    with pytest.raises(KeyboardInterrupt): run(changes, out)
    assert not (out/'result.json').exists()
    staged_method.STOP.clear(); again = run(changes, out, resume=True)
    assert [staged_method.RAN.count(s) - (s == stop) for s in staged_method.STAGES] == counts # the interrupted stage began twice
    assert {k: [(r.value, r.weights_hash) for r in v] for k, v in again.items()} == {k: [(r.value, r.weights_hash) for r in v] for k, v in whole.items()}
    staged_method.RAN.clear(); run(changes, out, resume=True); assert staged_method.RAN == []


def test_values_and_seeds_may_be_added_and_nothing_else(tmp_path):
    out = tmp_path/'out'; run(combinations(dict(rounds=(1,))), out); staged_method.RAN.clear()
    results = run(combinations(dict(rounds=(1, 2))), out, seeds=(0, 1), resume=True)
    assert staged_method.RAN == ['classifier', 'labels', 'segment', 'segment', 'segment']
    assert all(r.seeds == (0, 1) and isinstance(r.spread, float) for rows in results.values() for r in rows)
    for change, says in ((dict(split='test'), 'split'), (dict(preset='VOC'), 'preset')):
        with pytest.raises(BadInput, match=says): run(combinations(dict(rounds=(1, 2))), out, resume=True, **change)
    with pytest.raises(BadInput, match='not empty'): run(combinations(dict(rounds=(1,))), out)
    with pytest.raises(BadInput, match='ablation.json'): run(combinations(dict(rounds=(1,))), tmp_path/'none', resume=True)


def test_what_cannot_work_is_refused_before_any_training(tmp_path):
    for over in (dict(grid=(4, 0)), dict(batch=(4, 0)), dict(data_preset=('small', 'typo'))):
        name = list(combinations(over))[-1]
        with pytest.raises(BadInput, match=name): run(combinations(over), tmp_path/'out')
    with pytest.raises(BadInput, match='dev'): run(combinations(dict(grid=(4,))), tmp_path/'out', split='dev')
    assert staged_method.RAN == [] and not (tmp_path/'out').exists()


def test_data_follow_the_recipe(tmp_path):
    results = run(combinations(dict(data_preset=('small', 'wsss'))), tmp_path/'out')
    assert len({rows[0].data_hash for rows in results.values()}) == 2 and staged_method.RAN.count('classifier') == 2


# --- one stage -------------------------------------------------------------------------------------------------------

class LinearData(linear_method.Tiny):
    "The tiny split, which is also its set."
    def split(self, name): return self


def linear_scores(model, split, cfg):
    about = dict(unit='share', images=len(split), seeds=cfg.seed, preset='LAPTOP', config_hash='c', weights_hash='w', data_hash='d', seconds=0., cpu_seconds=0.)
    return [metrics.record('linear', 'tiny', 'val', 'accuracy', linear_method.evaluate(model, split, cfg)[0]['value'], **about)]


def test_a_method_without_stages(tmp_path):
    linear = SimpleNamespace(**(vars(linear_method) | dict(evaluate=linear_scores, name='linear')))
    cfg = linear_method.LinearConfig(steps=6, batch=4, lr=.01, lr_max=2., evaluate_every=2, checkpoint_every=2, log_every=1)
    changes, trained, out = combinations(read_over(cfg, ['lr=1e-2,1e-1'])), [], tmp_path/'out'
    def train(*given, **more): trained.append(given[2]); return linear_method.train(*given, **more)
    linear.train = train
    results = ablate(linear, cfg, changes, LinearData(cfg), out, seeds=(0, 1), say=quiet)
    assert len(trained) == 4 and [r.run for r in metrics.read_results(out/'lr=0.01'/'seed1'/'scores.json')][0].startswith('lr=0.01/seed1/step_')
    assert 'best on val' in results['lr=0.1'][0].run and results['lr=0.1'][0].preset == 'LAPTOP, lr=0.1'
    assert ablate(linear, cfg, changes, LinearData(cfg), out, seeds=(0, 1), resume=True, say=quiet) == results and len(trained) == 4
    (out/'lr=0.1'/'seed1'/'scores.json').unlink() # killed between training and scoring
    assert ablate(linear, cfg, changes, LinearData(cfg), out, seeds=(0, 1), resume=True, say=quiet) == results and len(trained) == 5


# --- the command, and runs in stages -----------------------------------------------------------------------------------

@pytest.fixture(scope='module', autouse=True)
def registered(tmp_path_factory):
    "Makes tests/staged_method.py the method `staged` of this process."
    folder = tmp_path_factory.mktemp('methods'); shutil.copy(HERE/'staged_method.py', folder/'staged.py')
    wsl_nb.__path__.append(str(folder)); kept, cli.METHODS = cli.METHODS, (*cli.METHODS, 'staged')
    yield
    wsl_nb.__path__.remove(str(folder)); cli.METHODS = kept; sys.modules.pop('wsl_nb.staged', None)


def command(capsys, *words):
    "Exit code and all that is printed."
    capsys.readouterr(); code = cli.main([str(w) for w in words]); said = capsys.readouterr()
    assert 'Traceback' not in said.err
    return code, said.out + said.err


def test_the_command_leaves_table_chart_and_page(tmp_path, capsys):
    words = ['ablate', 'staged', '--over', 'sharp=1,2', 'rounds=1,2', '--out', tmp_path/'out', '--batch', '8']
    code, text = command(capsys, *words)
    assert code == 0 and 'classifier made 1 time, shared 3 times' in text and '4 of 4: sharp=2, rounds=2, seed 0' in text
    assert [r.preset for r in metrics.read_results(tmp_path/'out'/'result.json')][0] == 'LAPTOP, batch=8, sharp=1, rounds=1'
    assert (tmp_path/'out'/'table.md').read_text().count('\n') == 6 and (tmp_path/'out'/'chart.png').stat().st_size > 3000
    page = (tmp_path/'out'/'report.html').read_text(); assert 'A single seed' in page and 'shared 3 times' in page and 'Other than in LAPTOP: batch=8.' in page
    code, text = command(capsys, *words); assert code == 2 and '--resume' in text
    code, text = command(capsys, *words, '--resume'); assert code == 0 and text.count('is there') == 4
    code, text = command(capsys, *words, '--resume', '--metric', 'mIoU'); assert code == 2 and 'cross entropy' in text
    assert command(capsys, 'results', tmp_path/'out')[1].count('| staged | LAPTOP, batch=8, sharp=') == 4
    assert len(json.loads((tmp_path/'out'/'sharp=1,rounds=1'/'seed0'/'classes.json').read_text())) == 8


def test_a_misspelt_metric_costs_one_run(tmp_path, capsys):
    words = ['ablate', 'staged', '--over', 'rounds=1,2,3', '--out', tmp_path/'out']
    code, text = command(capsys, *words, '--metric', ' ,'); assert code == 2 and 'empty place' in text and not (tmp_path/'out').exists()
    code, text = command(capsys, *words, '--metric', 'cross,mIoU'); assert code == 2 and "['mIoU'] in --metric cross,mIoU" in text and 'cross entropy' in text and '2 of 3' not in text
    assert [p.parent.parent.name for p in (tmp_path/'out').glob('*/*/scores.json')] == ['rounds=1']
    code, text = command(capsys, *words, '--metric', 'cross', '--resume'); assert code == 0 and text.count('is there') == 1 and '3 of 3' in text


def test_a_folder_of_runs_is_no_run(tmp_path, capsys):
    out = tmp_path/'out'; run(combinations(dict(rounds=(1, 2))), out); write_image(tmp_path/'a.png', np.zeros((32, 48, 3), np.uint8))
    for words in (['predict', 'staged', '--run', out, '--out', tmp_path/'own', tmp_path/'a.png'], ['eval', 'staged', '--run', out]):
        code, text = command(capsys, *words); assert code == 2 and f'--run {out/"rounds=1"/"seed0"}, one of 2 runs inside: rounds=1/seed0, rounds=2/seed0' in text
    code, text = command(capsys, 'eval', 'staged', '--run', out/'rounds=2'); assert code == 2 and 'one of 1 runs inside: seed0' in text
    (out/'rounds=2'/'seed0'/'config.yaml').unlink(); code, text = command(capsys, 'eval', 'staged', '--run', out/'rounds=2'/'seed0'); assert code == 2 and 'check --run' in text # stages are no runs
    assert not (tmp_path/'own').exists()


def test_one_by_one_and_seeds(tmp_path, capsys):
    code, text = command(capsys, 'ablate', 'staged', '--over', 'rounds=1,2,3', '--over', 'hard=false,true', '--one-by-one', '--seeds', '0,1', '--split', 'test', '--out', tmp_path/'out')
    records = metrics.read_results(tmp_path/'out'/'result.json')
    assert code == 0 and len(records) == 4 and {r.split for r in records} == {'test'} and {r.seeds for r in records} == {(0, 1)} and '±' in text


@pytest.mark.parametrize('words, says', [(['--over', 'sharpp=1'], 'spelling'), (['--over', 'sharp=far'], 'float'), (['--over', 'hard=perhaps'], 'true or false'), (['--over', 'sharp=1,1'], 'each value once'), ([], '--over'),
    (['--over', 'seed=1,2'], '--seeds'), (['--over', 'sharp=1', '--seed', '3'], '--seeds 3'), (['--over', 'grid=4,0'], 'grid=0: grid 0'), (['--over', 'sharp=1', '--split', 'dev'], 'dev'), (['--over', 'sharp=1', '--preset', 'VOC'], '--data'),
    (['--over', 'sharp=1', '--seeds', 'x'], '--seeds'), (['--over', 'sharp=1', '--lrr', '1'], '--lrr'), (['--over', 'sharp=1', '--resume'], 'ablation.json')])
def test_bad_input_ends_with_2_and_leaves_nothing(words, says, tmp_path, capsys):
    code, text = command(capsys, 'ablate', 'staged', *words, '--out', tmp_path/'out')
    assert code == 2 and says in text and not (tmp_path/'out').exists()


def test_help_lists_options_and_fields(capsys):
    code, text = command(capsys, 'ablate', 'staged', '--help')
    assert code == 0 and all(w in text for w in ('--over', '--one-by-one', '--seeds', '--sharp', 'Factor of the logits', '--channels_last'))
    code, text = command(capsys, 'ablate', 'staged', '--over', 'sharp=1'); assert code == 2 and '--out DIR' in text


def test_a_run_in_stages_is_trained_scored_and_used(tmp_path, capsys):
    out = tmp_path/'run'; write_image(tmp_path/'a.png', np.zeros((32, 48, 3), np.uint8))
    code, text = command(capsys, 'train', 'staged', '--out', out)
    assert code == 0 and f'wrote {out}: stages classifier, labels, segment' in text and f'wsl-nb eval staged --run {out}' in text
    assert command(capsys, 'eval', 'staged', '--run', out)[0] == 0
    assert metrics.read_results(out/'eval_val.json')[0].run == 'run, last of each stage' # nothing was evaluated, so there is no best
    assert command(capsys, 'eval', 'staged', '--run', out, '--checkpoint', 'last', '--overwrite')[0] == 0
    assert metrics.read_results(out/'eval_val.json')[0].run == 'run, last of each stage'
    code, text = command(capsys, 'eval', 'staged', '--run', out, '--checkpoint', '2', '--overwrite'); assert code == 2 and 'best or last' in text
    assert command(capsys, 'predict', 'staged', '--run', out, '--out', tmp_path/'own', tmp_path/'a.png')[0] == 0 and (tmp_path/'own'/'000_a_labels.png').exists()
    assert command(capsys, 'train', 'staged', '--out', out, '--resume')[0] == 0


def test_weights_of_a_first_stage_make_a_model(tmp_path, capsys):
    write_image(tmp_path/'a.png', np.zeros((32, 48, 3), np.uint8)); staged_method.train(SMALL, drawn(SMALL), tmp_path/'run')
    file = next((tmp_path/'run'/'classifier').glob('checkpoints/*/model.safetensors'))
    assert command(capsys, 'predict', 'staged', '--weights', file, '--out', tmp_path/'own', tmp_path/'a.png')[0] == 0


def test_doctor_knows_methods_in_stages(capsys):
    code, text = command(capsys, 'doctor', 'staged'); assert code == 0 and 'classifier / segment' in text


# --- batch size --------------------------------------------------------------------------------------------------------

def test_batch_size_is_measured_until_the_memory_is_used(capsys):
    "In processes of their own, with the small recipe of MoRe."
    code, text = command(capsys, 'doctor', 'more', '--find-batch-size', '--batch', '2')
    rows = [line.split('|')[1:4] for line in text.splitlines() if line.startswith('| ') and line.split('|')[1].strip().isdigit()]
    assert code == 0 and [int(r[0]) for r in rows] == [1, 2] and all(float(r[1]) > 0 for r in rows)
    used = [float(r[2]) for r in rows]; assert used[0] <= used[1] * 1.02 and used[0] > .1
    code, text = command(capsys, 'doctor', 'more', '--find-batch-size', '--memory', '0.05'); assert code == 2 and 'no batch fits' in text
    code, text = command(capsys, 'doctor', '--find-batch-size'); assert code == 2 and 'METHOD' in text


def test_a_batch_that_would_not_fit_is_not_tried():
    from wsl_nb.cli_data import find_batch_size
    tried = []
    def measure(batch): tried.append(batch); return dict(phases=[('a', 3), ('b', 1)], seconds=[.1, .5], gigabytes=1 + batch / 8, idle=.9)
    rows = find_batch_size(measure, 3., say=quiet)
    assert tried == [1, 2, 4, 8, 16] and [r['batch'] for r in rows] == tried and rows[0]['images a second'] == pytest.approx(4 / .8)
    tried.clear(); assert [r['batch'] for r in find_batch_size(measure, 2.9, say=quiet)] == [1, 2, 4, 8] and tried == [1, 2, 4, 8] # 16 would take 3
