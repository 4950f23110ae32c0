"""The run, proven on a linear classifier."""
import json, math, os, random, shutil, signal, socket, subprocess, sys, time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import linear_method as lm
from training_child import prepare
from wsl_nb import affinity_base, affinity_recipe, core, training
from wsl_nb import training_checkpoint as disk
from wsl_nb.training_order import Order

HERE = Path(__file__).parent
ENV = os.environ | dict(OMP_NUM_THREADS='1')


def whole(out, method='linear', **changes):
    "An uninterrupted run in this process."
    module, cfg, data = prepare(method, changes)
    return module.train(cfg, data, out)


def trained(out): return [out] if (out/'checkpoints').exists() else sorted(p.parent for p in out.glob('*/checkpoints')) # Folders with checkpoints: of the run, or of its stages
def final(out): return {('' if f == out else f'{f.name}.') + k: v for f in trained(out) for k, v in load_file(disk.checkpoint(f)/'model.safetensors').items()}
def log(out): return [{k: v for k, v in json.loads(l).items() if k != 'images_per_second'} for f in trained(out) for l in (f/'log.jsonl').read_text().splitlines()]
def files(out): return {p.relative_to(out).as_posix(): p.read_bytes() for p in sorted(out.glob('*/files/*')) if p.is_file()} # What stages write for the next; folders are spares of a kill


def same(a, b):
    "Weights and files bit for bit, and logs."
    x, y = final(a), final(b)
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert log(a) == log(b)
    x, y = files(a), files(b)
    assert x.keys() == y.keys() and not [k for k in x if x[k] != y[k]]


def child(out, *rest, method='linear', env=ENV): return subprocess.Popen([sys.executable, str(HERE/'training_child.py'), method, str(out), *rest], env=env, cwd=HERE,
                                                        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
def flags(changes): return [f'{k}={v}' for k, v in changes.items()]
def done(out): return sum(len(p.read_text().splitlines()) for p in (out/'log.jsonl', *out.glob('*/log.jsonl')) if p.exists()) + len(files(out)) # Lines of logs and files of stages


def kill_and_resume(out, kills, method, whole, seed=0, **changes):
    "Kills the run at random instants of what `whole` did, or at those given, resuming each time, then lets it end."
    pick = random.Random(seed)
    for mark in sorted(pick.sample(range(1, done(whole) - 5), kills)) if isinstance(kills, int) else kills:
        job = child(out, '--pause', '0.03', *flags(changes), method=method)
        while job.poll() is None and done(out) < mark: time.sleep(0.002)
        time.sleep(pick.random() * 0.06)
        assert job.poll() is None, job.communicate()[0]
        os.killpg(job.pid, signal.SIGKILL); job.wait()
    job = child(out, *flags(changes), method=method)
    text = job.communicate(timeout=600)[0]
    assert job.returncode == 0, text


@pytest.mark.parametrize('method, kills', [('linear', 2), ('more', 2), ('affinity', (10, 19)), ('cdtr', 2), ('surgery', 2), ('fsgr', 2)], ids=lambda v: v if isinstance(v, str) else '')
def test_two_kills(tmp_path, method, kills):
    "AffinityNet: in the middle of its label files, and in its second network; workers would make its CRF start processes."
    changes = dict(workers=int(method != 'affinity'), accumulate=2)
    whole(tmp_path/'whole', method, **changes)
    kill_and_resume(tmp_path/'killed', kills, method, tmp_path/'whole', **changes)
    same(tmp_path/'whole', tmp_path/'killed')


@pytest.mark.slow
@pytest.mark.parametrize('method', ['linear', 'more', 'affinity', 'cdtr', 'surgery', 'fsgr'])
@pytest.mark.parametrize('workers', [1, 2])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_ten_kills(tmp_path, method, workers, accumulate):
    changes = dict(workers=workers, accumulate=accumulate) | (dict(steps=24) if method in ('more', 'cdtr', 'surgery', 'fsgr') else {}) # room for ten
    whole(tmp_path/'whole', method, **changes)
    kill_and_resume(tmp_path/'killed', 10, method, tmp_path/'whole', seed=workers * 2 + accumulate, **changes)
    same(tmp_path/'whole', tmp_path/'killed')


class Stop(Exception): pass


def stopped(out, at, **changes):
    "A run that dies of an exception before update `at`."
    module, cfg, data = prepare('linear', changes)
    old = lm.losses
    def losses(model, batch, step, cfg, **extra):
        if step == at: raise Stop
        return old(model, batch, step, cfg, **extra)
    lm.losses = losses
    try:
        with pytest.raises(Stop): module.train(cfg, data, out)
    finally: lm.losses = old
    return cfg, data


@pytest.mark.parametrize('changes', [dict(workers=0), dict(workers=2, accumulate=2), dict(ema=0.9, repeats=2, batch=3, idle_grad='zero'), dict(epochs=2, optimizer='sgd', schedule='onecycle')])
def test_resume_equals_uninterrupted(tmp_path, changes):
    whole(tmp_path/'a', **changes)
    cfg, data = stopped(tmp_path/'b', 8, **changes)
    torch.rand(3)
    lm.train(cfg, data, tmp_path/'b', resume=True)
    same(tmp_path/'a', tmp_path/'b')
    if cfg.ema: assert all(torch.equal(v, w) for v, w in zip(*[load_file(disk.checkpoint(tmp_path/x)/'ema.safetensors').values() for x in 'ab']))


def test_more_resumes_before_and_after_its_switch(tmp_path):
    "Every term is active on both sides of some checkpoint; workers and accumulation change nothing."
    changes = dict(accumulate=2, workers=1, keep_last=9, data_train=8)
    whole(tmp_path/'a', 'more', **changes)
    terms = [set(l['terms']) for l in log(tmp_path/'a') if 'terms' in l]
    assert terms[0] == {'cls', 'aux', 'mct'} and len(terms[3]) == 6 and len(terms[-1]) == 8
    for steps in (3, 9):
        cut = Path(shutil.copytree(tmp_path/'a', tmp_path/f'cut{steps}')); (cut/'result.json').unlink()
        for folder in disk.checkpoints(cut):
            if int(folder.name.split('_')[1]) > steps: shutil.rmtree(folder)
        module, cfg, data = prepare('more', changes)
        module.train(cfg, data, cut, resume=True)
        same(tmp_path/'a', cut)


@pytest.fixture(scope='module')
def stages(tmp_path_factory):
    "An uninterrupted run of AffinityNet, all checkpoints kept."
    out, before = tmp_path_factory.mktemp('stages')/'whole', torch.get_num_threads(); torch.set_num_threads(1)
    whole(out, 'affinity', accumulate=2, keep_last=9)
    torch.set_num_threads(before)
    return out


@pytest.mark.parametrize('stage', affinity_recipe.STAGES)
def test_affinity_resumes_inside_every_stage(tmp_path, capsys, stages, stage):
    "Cut back to the middle of a stage, with what a kill leaves behind: the rest is made again bit for bit, what came before is not touched."
    cut, names = Path(shutil.copytree(stages, tmp_path/'cut')), affinity_recipe.STAGES; at = names.index(stage)
    for later in names[at + 1:]: shutil.rmtree(cut/later)
    for note in (cut/'result.json', cut/stage/'result.json'): note.unlink()
    if stage in affinity_base.TRAINED: shutil.rmtree(disk.checkpoint(cut/stage))
    else:
        made = sorted((cut/stage/'files').iterdir())
        for file in made[1::2]: file.unlink()
        (made[0].parent/f'.{made[1].name}.kill').mkdir(); (made[0].parent/f'.{made[1].name}.kill'/made[1].name).write_bytes(b'half')
    times = {p: p.stat().st_mtime_ns for s in names[:at] for p in (cut/s).rglob('*') if p.is_file()}; kept = files(cut)
    module, cfg, data = prepare('affinity', dict(accumulate=2, keep_last=9)); capsys.readouterr()
    result = module.train(cfg, data, cut, resume=True)
    same(stages, cut)
    assert times == {p: p.stat().st_mtime_ns for p in times} and kept.items() <= files(cut).items()
    text = capsys.readouterr().out; assert [s for s in names if f'{s}: done' in text] == list(names[:at])
    assert result['stages'] == json.loads((stages/'result.json').read_text())['stages'] and result['steps'] == 12


def test_affinity_of_a_finished_run_is_its_result_and_a_changed_field_is_named(tmp_path, stages):
    cut = Path(shutil.copytree(stages, tmp_path/'again')); module, cfg, data = prepare('affinity', dict(accumulate=2, keep_last=9))
    again, first = module.train(cfg, data, cut, resume=True), json.loads((stages/'result.json').read_text())
    assert {k: v for k, v in again.items() if k != 'seconds'} == {k: v for k, v in first.items() if k != 'seconds'}
    same(stages, cut)
    with pytest.raises(core.BadInput, match=r'walk_steps: 8 -> 9'): module.train(replace(cfg, walk_steps=9), data, cut, resume=True)
    with pytest.raises(core.BadInput, match='empty or new'): module.train(cfg, data, cut)


def test_affinity_accumulates_over_micro_batches(tmp_path):
    """One pass of 4 images against two passes of 2, frozen batch normalisation, no augmentation: the classifier's term is a mean over images and agrees.

    bg, fg and neg are means over the pairs of a whole micro-batch, seg over its decided pixels: images with few of them weigh more in small batches.
    """
    changes = dict(bn='frozen', jitter=(0., 0., 0., 0.), steps=1, stages=('classifier', 'labels', 'affinity'))
    for name, more in dict(a=dict(batch=4, accumulate=1), b=dict(batch=2, accumulate=2)).items(): whole(tmp_path/name, 'affinity', **changes, **more)
    a, b = ([l['terms'] for l in log(tmp_path/x) if 'terms' in l] for x in 'ab')
    assert a[1]['cls'] == pytest.approx(b[1]['cls'], abs=1e-6)
    x, y = final(tmp_path/'a'), final(tmp_path/'b')
    assert all((x[k] - y[k]).abs().max() < 1e-5 for k in x if k.startswith('classifier.'))
    assert any(abs(a[0][k] - b[0][k]) > 1e-4 for k in ('bg', 'fg', 'neg')), 'these are counted over a micro-batch'


def test_affinity_in_bf16(tmp_path):
    "Every term of every stage is finite, every file is there, and the walk's affinities are in float32."
    whole(tmp_path/'a', 'affinity', precision='bf16')
    lines = [l for l in log(tmp_path/'a') if 'terms' in l]
    assert len(lines) == 12 and all(math.isfinite(v) for l in lines for v in (*l['terms'].values(), l['gradient_norm'])) and len(files(tmp_path/'a')) == 24
    assert all(v.isfinite().all() for v in final(tmp_path/'a').values())


def test_workers_do_not_matter(tmp_path):
    for w in (0, 1, 2): whole(tmp_path/str(w), workers=w, steps=6)
    same(tmp_path/'0', tmp_path/'1'); same(tmp_path/'0', tmp_path/'2')


def test_resume_of_a_finished_run_is_its_result(tmp_path):
    first = whole(tmp_path/'a', steps=3)
    _, cfg, data = prepare('linear', dict(steps=3))
    again = lm.train(cfg, data, tmp_path/'a', resume=True)
    assert first == again == json.loads((tmp_path/'a/result.json').read_text())
    assert training.stage_done(tmp_path/'a', '') == first and training.stage_done(tmp_path/'a', 'other') is None


def test_folders_and_configs_are_refused_by_name(tmp_path):
    _, cfg, data = prepare('linear', dict(steps=3))
    with pytest.raises(core.BadInput, match='config.yaml'): lm.train(cfg, data, tmp_path/'none', resume=True)
    lm.train(cfg, data, tmp_path/'a')
    with pytest.raises(core.BadInput, match='empty or new'): lm.train(cfg, data, tmp_path/'a')
    _, other, _ = prepare('linear', dict(steps=3, lr=0.02))
    with pytest.raises(core.BadInput, match=r'lr: 0.01 -> 0.02'): lm.train(other, data, tmp_path/'a', resume=True)
    smaller = lm.Tiny(prepare('linear', dict(images=21))[1])
    with pytest.raises(core.BadInput, match='data'): lm.train(cfg, smaller, tmp_path/'a', resume=True)


def test_config_file_is_complete(tmp_path):
    whole(tmp_path/'a', steps=2)
    assert disk.read_config(tmp_path/'a/config.yaml', lm.LinearConfig) == prepare('linear', dict(steps=2))[1]
    (tmp_path/'bad.yaml').write_text('lrr: 3\n')
    with pytest.raises(core.BadInput, match='lrr'): disk.read_config(tmp_path/'bad.yaml', lm.LinearConfig)


@pytest.mark.parametrize('part', [*training.PARTS, 'manifest.json'])
@pytest.mark.parametrize('damage', ['lacking', 'cut'])
def test_damaged_checkpoint_is_refused_by_name(tmp_path, part, damage):
    whole(tmp_path/'a', steps=6)
    _, cfg, data = prepare('linear', dict(steps=6))
    file = disk.checkpoint(tmp_path/'a')/part
    file.unlink() if damage == 'lacking' else file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(core.BadInput) as e: lm.train(cfg, data, tmp_path/'a', resume=True)
    assert part in e.value.got and 'step_000006' in e.value.got and 'step_000003' in e.value.cure


def test_spares_of_a_kill_do_not_count(tmp_path):
    whole(tmp_path/'a', steps=6)
    (tmp_path/'a/checkpoints/.step_000009.x/step_000009').mkdir(parents=True)
    (tmp_path/'a/log.jsonl').open('a').write('{"step": 6, "te')
    _, cfg, data = prepare('linear', dict(steps=6))
    assert lm.train(cfg, data, tmp_path/'a', resume=True)['steps'] == 6
    assert log(tmp_path/'a')[-1]['step'] == 5


def test_log_is_cut_back(tmp_path):
    cfg, data = stopped(tmp_path/'a', 8)
    assert [l['step'] for l in log(tmp_path/'a') if 'terms' in l] == list(range(8))
    run = training.Run(cfg, tmp_path/'a', True, model := lm.Linear(cfg, 3), lm.groups(model, cfg), training.lr_factor, data)
    assert run.step == 6 and max(l['step'] for l in log(tmp_path/'a')) == 5
    line = log(tmp_path/'a')[-2]
    assert {'step', 'epoch', 'terms', 'weights', 'total', 'lr', 'gradient_norm', 'skipped'} == line.keys() and len(line['lr']) == 2


def test_last_and_best_are_kept(tmp_path):
    scores = iter([0.1, 0.9, 0.3, 0.4, 0.5, 0.6])
    cfg = prepare('linear', dict(steps=12, evaluate_every=2, checkpoint_every=2, keep_last=2))[1]
    model = lm.Linear(cfg, 3)
    run = training.Run(cfg, tmp_path, False, model, lm.groups(model, cfg), training.lr_factor, lm.Tiny(cfg))
    for step, batch in run:
        terms = lm.losses(model, batch, step, cfg)
        run.update(terms, lm.total(terms, model, step, cfg), lm.weights(cfg, step))
        if run.due('evaluate'): run.record([dict(metric='m', value=next(scores))])
    assert run.close()['best'] == dict(value=0.9, step=4)
    assert [p.name for p in disk.checkpoints(tmp_path)] == ['step_000004', 'step_000010', 'step_000012']
    assert disk.checkpoint(tmp_path, 'best').name == 'step_000004'


def test_accumulation_is_a_mean_over_passes(tmp_path):
    for name, changes in dict(a=dict(batch=4, accumulate=1), b=dict(batch=2, accumulate=2)).items(): whole(tmp_path/name, steps=1, dropout=0., **changes)
    x, y = final(tmp_path/'a'), final(tmp_path/'b')
    assert not torch.equal(x['cls.weight'], y['cls.weight']), 'batch norm sees other batches'
    assert torch.allclose(x['cls.bias'], y['cls.bias'], atol=2e-2)


def two_processes(out, method='linear', **changes):
    "The same run in two processes on this machine."
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    group = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    jobs = [child(out, *flags(changes), method=method, env=ENV | group | dict(RANK=str(r), LOCAL_RANK=str(r))) for r in (0, 1)]
    texts = [job.communicate(timeout=300)[0] for job in jobs]
    return [job.returncode for job in jobs], texts


def test_a_process_leaves_its_group_when_the_program_ends():
    "Threads of a group that is still there abort now and then a process that has done all its work; what is registered first runs last."
    code = """import atexit, torch.distributed as dist
from wsl_nb.training_order import world
atexit.register(lambda: print('in a group:', dist.is_initialized()))
dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1); print(world(), world())"""
    found = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout == '(0, 1) (0, 1)\nin a group: False\n', found.stderr


def test_two_processes_equal_accumulation(tmp_path):
    changes = dict(steps=8, dropout=0., late_from=4, images=20)
    whole(tmp_path/'one', accumulate=2, **changes)
    codes, texts = two_processes(tmp_path/'two', accumulate=1, **changes)
    assert codes == [0, 0], texts
    one, two = final(tmp_path/'one'), final(tmp_path/'two')
    for k in one:
        if k.startswith(('cls', 'late', 'norm.weight', 'norm.bias')): assert (one[k] - two[k]).abs().max() < 1e-6, k
    assert texts[0].count('DDP runs with find_unused_parameters=True') == 1 and 'DDP runs' not in texts[1]
    assert not any('Warning' in t for t in texts), texts
    a, b = ([l['total'] for l in log(tmp_path/x) if 'total' in l] for x in ('one', 'two'))
    assert a == pytest.approx(b, abs=1e-6)
    assert [l['scores'] for l in log(tmp_path/'two') if 'scores' in l] == [l['scores'] for l in log(tmp_path/'one') if 'scores' in l]


def test_affinity_in_two_processes_equals_accumulation(tmp_path):
    """N processes of micro-batch b give one process with b and N passes, in every term of every stage, as each term is computed on a micro-batch in both.

    Batch normalisation is frozen: where it learns, each process has statistics of its own, and those of the first are kept. Files are shared out; every image has one.
    """
    changes = dict(bn='frozen', workers=0)
    whole(tmp_path/'one', 'affinity', accumulate=2, **changes)
    codes, texts = two_processes(tmp_path/'two', 'affinity', accumulate=1, **changes)
    assert codes == [0, 0], texts
    a, b = ([l['terms'] for l in log(tmp_path/x) if 'terms' in l] for x in ('one', 'two'))
    assert [set(x) for x in a[::4]] == [{'bg', 'fg', 'neg'}, {'cls'}, {'seg'}] and len(a) == 12 and all(x == pytest.approx(y, rel=1e-4, abs=1e-6) for x, y in zip(a, b))
    one, two = final(tmp_path/'one'), final(tmp_path/'two')
    assert one.keys() == two.keys() and max((one[k] - two[k]).abs().max().item() for k in one) < 1e-5
    assert files(tmp_path/'one').keys() == files(tmp_path/'two').keys()
    one, two = (json.loads((tmp_path/x/'result.json').read_text())['records'] for x in ('one', 'two'))
    assert [r['metric'] for r in one] == [r['metric'] for r in two] and [r['value'] for r in one] == pytest.approx([r['value'] for r in two], rel=1e-3, abs=1e-3)
    assert not any('Warning' in t for t in texts), texts


def test_fsgr_in_two_processes_equals_accumulation(tmp_path):
    """Both stages, beams and rewards included: N processes of micro-batch b give one process with b and N passes, each term computed on a micro-batch in both.

    Dropout, Gumbel noise and the choice of cells are random numbers that each process draws for itself, so they are off.
    """
    changes = dict(dropout=0., gumbel=False, contrast_cells=0, memory=0, workers=0, steps=3)
    whole(tmp_path/'one', 'fsgr', accumulate=2, **changes)
    codes, texts = two_processes(tmp_path/'two', 'fsgr', accumulate=1, **changes)
    assert codes == [0, 0], texts
    a, b = ([l['terms'] for l in log(tmp_path/x) if 'terms' in l] for x in ('one', 'two'))
    assert [set(x) for x in a] == [{'scst'}] * 3 + [{'xe', 'contrast'}] * 3 and all(x == pytest.approx(y, rel=1e-3, abs=1e-5) for x, y in zip(a, b))
    one, two = final(tmp_path/'one'), final(tmp_path/'two')
    assert one.keys() == two.keys() and max((one[k].float() - two[k].float()).abs().max().item() for k in one) < 1e-4
    assert not any('Warning' in t for t in texts), texts


def test_fsgr_in_bf16(tmp_path):
    "The forward pass in bfloat16, losses in float32: both stages end, and the terms stay near."
    whole(tmp_path/'a', 'fsgr', precision='bf16', dropout=0., gumbel=False, memory=0); whole(tmp_path/'b', 'fsgr', dropout=0., gumbel=False, memory=0)
    a, b = ([l['terms'] for l in log(tmp_path/x) if 'xe' in l.get('terms', {})] for x in 'ab')
    assert len(a) == 6 and all(x['xe'] == pytest.approx(y['xe'], rel=.03) and x['contrast'] == pytest.approx(y['contrast'], rel=.03) for x, y in zip(a, b)) and a != b


def test_more_in_two_processes_equals_accumulation(tmp_path):
    """N processes of micro-batch b give the update of one process with b and N passes, across every first step and the switch.

    That holds for all terms, as each is computed on a micro-batch in both. One batch of N*b is another matter: PTC divides by the pairs
    and the balanced cross-entropy by the pixels of a whole micro-batch, URE by its tokens; those are no means over images.
    """
    changes = dict(steps=10, workers=0)
    whole(tmp_path/'one', 'more', accumulate=2, **changes)
    codes, texts = two_processes(tmp_path/'two', 'more', accumulate=1, **changes)
    assert codes == [0, 0], texts
    one, two = final(tmp_path/'one'), final(tmp_path/'two')
    assert one.keys() == two.keys() and max((one[k] - two[k]).abs().max().item() for k in one) < 1e-6
    a, b = ([l['terms'] for l in log(tmp_path/x) if 'terms' in l] for x in ('one', 'two'))
    assert len(a) == 10 and all(x == pytest.approx(y, rel=1e-4, abs=1e-6) for x, y in zip(a, b))
    (a,), (b,) = ([l['scores'] for l in log(tmp_path/x) if 'scores' in l] for x in ('one', 'two'))
    assert a.keys() == b.keys() and all(float(a[k]) == pytest.approx(float(b[k]), rel=1e-4) for k in a) # a batch of two images rounds otherwise than two of one
    assert sum('DDP runs with find_unused_parameters=True' in t for t in texts) == 1 and not any('Warning' in t for t in texts), texts


@pytest.mark.slow
def test_two_processes_without_idle_parameters_accumulate_resume(tmp_path):
    changes = dict(steps=9, dropout=0., late_from=0, images=20, checkpoint_every=4)
    codes, texts = two_processes(tmp_path/'two', accumulate=2, **changes)
    assert codes == [0, 0] and 'DDP runs' not in texts[0], texts
    shutil.copytree(tmp_path/'two', tmp_path/'cut')
    shutil.rmtree(tmp_path/'cut/checkpoints/step_000009'); (tmp_path/'cut/result.json').unlink()
    codes, texts = two_processes(tmp_path/'cut', accumulate=2, **changes)
    assert codes == [0, 0] and 'resume: at step 8' in texts[0], texts
    same(tmp_path/'two', tmp_path/'cut')
    whole(tmp_path/'one', accumulate=4, **changes)
    assert all((a - b).abs().max() < 1e-6 for k, a in final(tmp_path/'one').items() if k[:3] in ('cls', 'lat') for b in [final(tmp_path/'two')[k]])


@pytest.mark.slow
def test_two_processes_stop_together(tmp_path):
    codes, texts = two_processes(tmp_path/'two', steps=6, late_from=0, poison='late.bias')
    assert codes == [1, 1] and all('NonFinite' in t and '"late"' in t for t in texts), texts


@pytest.mark.parametrize('name, term', [('cls.bias', 'cls'), ('late.weight', 'late'), ('norm.weight', 'cls')])
@pytest.mark.parametrize('accumulate', [1, 2])
def test_non_finite_term_is_named_and_replayed(tmp_path, name, term, accumulate):
    with pytest.raises(core.NonFinite) as e: whole(tmp_path/'a', late_from=0, poison=name, accumulate=accumulate)
    assert (e.value.term, e.value.step, len(e.value.ids)) == (term, 3, 2) and e.value.ids[0].startswith('img_')
    folder = tmp_path/'a/nonfinite'
    assert {p.name for p in folder.iterdir()} == {'config.yaml', 'facts.json', 'model.safetensors', 'batch.pt', 'manifest.json'}
    with pytest.raises(core.NonFinite) as again: training.replay(folder, lm)
    assert (again.value.term, again.value.step, again.value.ids) == (term, 3, e.value.ids)
    assert final(tmp_path/'a') and not (tmp_path/'a/result.json').exists()


def test_image_that_is_not_finite(tmp_path):
    class Bad(lm.Tiny):
        def sample(self, index, generator):
            out = super().sample(index, generator)
            if index == 7: out['image'][0, 0, 0] = float('inf')
            return out
    _, cfg, _ = prepare('linear', {})
    with pytest.raises(core.NonFinite) as e: lm.train(cfg, Bad(cfg), tmp_path)
    assert 'img_7' in e.value.ids
    with pytest.raises(core.NonFinite) as again: training.replay(tmp_path/'nonfinite', lm)
    assert again.value.term == e.value.term


def rooted(model, batch, step, cfg, **extra):
    "Finite terms; the gradient of the second is infinite at step 2."
    out = OLD(model, batch, step, cfg, **extra)
    return out | dict(late=out['late'] + (model.late.bias * (0. if step >= 2 else 1.)).abs().sum().sqrt() if step >= 2 else out['late'])


OLD = lm.losses


def test_non_finite_gradient_is_traced_to_its_term(tmp_path, monkeypatch):
    monkeypatch.setattr(lm, 'losses', rooted)
    with pytest.raises(core.NonFinite) as e: whole(tmp_path/'a', late_from=0, accumulate=2)
    assert (e.value.term, e.value.step) == ('gradient of late', 2)
    with pytest.raises(core.NonFinite) as again: training.replay(tmp_path/'a/nonfinite', lm)
    assert again.value.term == 'gradient of late'


def test_reproducer_holds_the_state_before_the_step(tmp_path):
    "Weights, buffers and generators of the reproducer are those after the step before."
    whole(tmp_path/'good', steps=3, checkpoint_every=1, late_from=0)
    with pytest.raises(core.NonFinite): whole(tmp_path/'bad', steps=24, checkpoint_every=1, late_from=0, poison='late.bias')
    x, y = final(tmp_path/'good'), load_file(tmp_path/'bad/nonfinite/model.safetensors')
    assert all(torch.equal(x[k], y[k]) for k in x if k not in ('late.bias',) and 'late' not in k) and torch.equal(x['norm.running_mean'], y['norm.running_mean'])


def test_damaged_reproducer_and_wrong_method_are_refused(tmp_path):
    with pytest.raises(core.NonFinite): whole(tmp_path/'a', poison='cls.bias')
    with pytest.raises(core.BadInput, match='LinearConfig'): training.replay(tmp_path/'a/nonfinite', training.disk)
    (tmp_path/'a/nonfinite/batch.pt').unlink()
    with pytest.raises(core.BadInput, match='batch.pt'): training.replay(tmp_path/'a/nonfinite', lm)


def test_precisions(tmp_path):
    with pytest.raises(core.BadInput, match='precision = fp16'): whole(tmp_path/'h', precision='fp16')
    assert not (tmp_path/'h').exists()
    whole(tmp_path/'a', steps=4); whole(tmp_path/'b', steps=4, precision='bf16'); whole(tmp_path/'c', steps=4, channels_last=True, tf32=True, cudnn_benchmark=True)
    a, b, c = (final(tmp_path/x)['cls.weight'] for x in 'abc')
    assert not torch.equal(a, b) and torch.allclose(a, b, atol=2e-2) and torch.allclose(a, c, atol=1e-6)
    seen = []
    old = lm.losses
    def spy(model, batch, *rest, **extra): seen.append(torch.is_autocast_enabled('cpu')); return old(model, batch, *rest, **extra)
    lm.losses = spy
    try: whole(tmp_path/'d', steps=1, precision='bf16')
    finally: lm.losses = old
    assert seen == [True]


def scaled_run(out, bad, **changes):
    "A run with a loss scaler, as fp16 has it; gradients of the draws in `bad` overflow."
    _, cfg, data = prepare('linear', dict(steps=6, late_from=0, dropout=0.) | changes)
    model = lm.Linear(cfg, 3)
    run = training.Run(cfg, out, False, model, lm.groups(model, cfg), training.lr_factor, data)
    run.scaler = torch.amp.GradScaler('cpu', init_scale=8.)
    steps = []
    for n, (step, batch) in enumerate(run):
        steps.append(step)
        terms = lm.losses(model, batch, step, cfg)
        hook = model.cls.weight.register_hook(lambda g: g * float('inf')) if n in bad else None
        run.update(terms, lm.total(terms, model, step, cfg), lm.weights(cfg, step))
        if hook: hook.remove()
    return run, steps


def test_skipped_scaler_steps_are_counted_and_hold_the_schedule(tmp_path):
    run, steps = scaled_run(tmp_path/'a', bad={1, 2})
    assert steps == [0, 1, 1, 1, 2, 3, 4, 5] and (run.skipped, run.skipped_row, run.draws, run.step) == (2, 0, 8, 6)
    assert [l['skipped'] for l in log(tmp_path/'a')] == [0, 2, 2, 2, 2, 2] and run.scaler.get_scale() == 2.
    assert run.close()['skipped'] == 2
    with pytest.raises(core.NonFinite) as e: scaled_run(tmp_path/'b', bad=set(range(1, 40)))
    assert e.value.step == 1


def test_scaler_changes_nothing_else(tmp_path):
    run, _ = scaled_run(tmp_path/'a', bad=set())
    whole(tmp_path/'b', steps=6, late_from=0, dropout=0.)
    assert torch.allclose(final(tmp_path/'b')['cls.weight'], run.model.cls.weight, atol=1e-6)


@pytest.mark.parametrize('workers', [0, 1])
def test_ctrl_c_saves_then_raises(tmp_path, workers):
    module, cfg, data = prepare('linear', dict(workers=workers))
    old, count, before = lm.losses, [0], signal.getsignal(signal.SIGINT)  # a job in the background of a shell is born deaf to Ctrl-C
    def losses(model, batch, step, cfg, **extra):
        count[0] += 1
        if count[0] == 8: os.kill(os.getpid(), signal.SIGINT)
        return old(model, batch, step, cfg, **extra)
    lm.losses = losses
    try:
        with pytest.raises(KeyboardInterrupt, match='saved at step 8'): module.train(cfg, data, tmp_path/'a')
    finally: lm.losses = old
    assert signal.getsignal(signal.SIGINT) is before
    assert disk.checkpoint(tmp_path/'a').name == 'step_000008'
    module.train(cfg, data, tmp_path/'a', resume=True)
    whole(tmp_path/'b', workers=workers); same(tmp_path/'a', tmp_path/'b')


def test_rates_are_printed_and_guarded(tmp_path, capsys):
    with pytest.raises(core.BadInput, match='lr_max'): whole(tmp_path/'a', lr=1.)
    assert not (tmp_path/'a').exists()
    whole(tmp_path/'a', steps=2, warmup=0)
    text = capsys.readouterr().out
    assert 'first 0.1, peak 0.1' in text and '22 draws an epoch, 2 an update, 11 updates an epoch, 0 left out' in text


def test_few_images_are_refused(tmp_path):
    with pytest.raises(core.BadInput, match='22 training images'): whole(tmp_path/'a', batch=23)


def test_every_image_once_an_epoch_and_the_rest_left_out():
    order = Order(images=22, batch=2, accumulate=2)
    draws = sum((part for part, _ in zip(order.parts(), range(10))), [])
    assert len({i for _, i, _ in draws}) == 20 and order.dropped == 2 < order.whole
    ranks = [[p for p, _ in zip(Order(22, 2, 1, 2, r).parts(), range(10))] for r in (0, 1)]
    assert [x for pair in zip(*ranks) for x in pair][:10] == [p for p, _ in zip(Order(22, 2, 2).parts(), range(20))][:10]


def test_copies_of_an_image_lie_in_different_passes():
    "Repeated augmentation on CUB's training images: a pass of 128 shows 128 images, four processes cut an update as four passes of one do, a resumed order goes on where it stopped."
    cut = lambda n, processes=1, rank=0, draw=0, **k: [p for p, _ in zip(Order(5994, 128, 4 // processes, processes, rank, repeats=3, **k).parts(draw), range(n))]
    one = cut(88); assert all(len({i for _, i, _ in p}) == len(p) == 128 for p in one)
    ranks = [cut(22, 4, r) for r in range(4)]; assert [p for update in zip(*ranks) for p in update] == one and sum(([*a, *b] for a, b in zip(*(zip(*[iter(cut(44, 2, r))] * 2) for r in (0, 1)))), []) == one
    order = Order(5994, 128, 4, repeats=3); first = sum(one[:44], []); assert sorted(first) == sorted(order.epoch(0)[:11 * 512]) and len({i for _, i, _ in first}) == order.distinct == 1878
    assert cut(8, draw=5) == one[20:28] and cut(4, draw=11) == one[44:48]


def test_the_images_of_an_epoch_are_counted_as_they_are_used(tmp_path, capsys):
    whole(tmp_path/'a', steps=2, warmup=0, repeats=3, batch=4)
    assert '22 draws an epoch, 7 different images in its updates, 4 an update, 5 updates an epoch, 2 left out' in capsys.readouterr().out


def test_idle_parameters_are_left_alone_or_decay(tmp_path):
    start = lm.Linear(prepare('linear', {})[1], 3).late.weight
    for name in ('none', 'zero'): whole(tmp_path/name, steps=3, idle_grad=name, weight_decay=0.1)
    assert torch.equal(final(tmp_path/'none')['late.weight'], start) and (final(tmp_path/'zero')['late.weight'].norm() < start.norm())


def test_terms_and_weights_must_agree(tmp_path):
    _, cfg, data = prepare('linear', {})
    model = lm.Linear(cfg, 3)
    run = training.Run(cfg, tmp_path, False, model, lm.groups(model, cfg), training.lr_factor, data)
    with pytest.raises(core.BadInput, match='late'):
        for step, batch in run: run.update(terms := lm.losses(model, batch, step, cfg), terms['cls'], dict(cls=1., late=1.))


def test_bad_file_in_a_worker_keeps_its_three_parts(tmp_path):
    class Bad(lm.Tiny):
        def sample(self, index, generator): raise core.BadInput('a cut JPEG', 'a whole one', 'fetch it again')
    _, cfg, _ = prepare('linear', dict(workers=1))
    with pytest.raises(core.BadInput, match='cut JPEG'): lm.train(cfg, Bad(cfg), tmp_path)


def test_evaluation_sees_every_image_once():
    data = lm.Tiny(prepare('linear', {})[1])
    assert sorted(i for b in training.each_once(data, 4, workers=1) for i in b['id']) == sorted(data.ids)


def test_no_bar_under_tests(tmp_path, capfd):
    whole(tmp_path/'a', steps=2)
    assert not training.live() and '%|' not in capfd.readouterr().err


def test_config_imports_light():
    code = 'import torch, sys; from wsl_nb.training import RunConfig; print([m for m in ("accelerate", "timm", "torchvision", "open_clip", "cv2", "matplotlib") if m in sys.modules])'
    assert subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=ENV).stdout.strip() == '[]'


@pytest.mark.slow
def test_torchrun(tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--standalone', str(HERE/'training_child.py'), 'linear', str(tmp_path/'two'), 'steps=4', 'dropout=0.']
    done = subprocess.run(command, env=ENV, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole(tmp_path/'one', steps=4, dropout=0., accumulate=2)
    assert all((a - b).abs().max() < 1e-6 for k, a in final(tmp_path/'one').items() if k.startswith('cls') for b in [final(tmp_path/'two')[k]])
    assert json.loads((tmp_path/'two/result.json').read_text())['processes'] == 2


@pytest.mark.slow
def test_compiled_model_gives_the_same(tmp_path):
    whole(tmp_path/'a', steps=3, dropout=0.); whole(tmp_path/'b', steps=3, dropout=0., compile=True)
    assert all(torch.allclose(a, final(tmp_path/'b')[k], atol=1e-6) for k, a in final(tmp_path/'a').items())


@pytest.mark.slow
def test_ctrl_c_in_two_processes(tmp_path):
    with socket.socket() as s: s.bind(('127.0.0.1', 0)); port = s.getsockname()[1]
    group = dict(WORLD_SIZE='2', LOCAL_WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    jobs = [child(tmp_path/'a', '--pause', '0.1', env=ENV | group | dict(RANK=str(r), LOCAL_RANK=str(r))) for r in (0, 1)]
    while done(tmp_path/'a') < 4: time.sleep(0.01)
    os.kill(jobs[1].pid, signal.SIGINT)
    texts = [job.communicate(timeout=100)[0] for job in jobs]
    assert all('KeyboardInterrupt: saved at step' in t for t in texts), texts


class Headed(lm.Linear):
    "A frozen network that is rebuilt, not saved, and never leaves eval mode."
    not_saved = ('frozen.',)
    def __init__(self, cfg, classes):
        super().__init__(cfg, classes)
        self.frozen = torch.nn.BatchNorm1d(3 * cfg.size ** 2).requires_grad_(False)
    def train(self, mode=True):
        super().train(mode); self.frozen.eval(); return self
    def forward(self, image):
        with torch.no_grad(): return self.drop(self.norm(self.frozen(image.flatten(1))))


def loop(out, model, cfg, losses=lm.losses, resume=False, until=None, extra=None):
    "The loop of every method, with its parts exchangeable."
    run = training.Run(cfg, out, resume, model, lm.groups(model, cfg), training.lr_factor, lm.Tiny(cfg))
    for step, batch in run:
        more = extra(step) if extra else {}
        terms = losses(run.model, batch, step, cfg, **more)
        run.update(terms, lm.total(terms, run.model, step, cfg), lm.weights(cfg, step), extra=more)
        if until and run.due('checkpoint') and run.step >= until: break
    return run


def test_frozen_parts_stay_in_eval_mode_and_out_of_checkpoints(tmp_path):
    cfg = prepare('linear', dict(steps=6))[1]
    model = Headed(cfg, 3)
    assert loop(tmp_path, model, cfg).close()['finished'] and not model.frozen.training and model.training
    assert not any(k.startswith('frozen') for k in final(tmp_path)) and model.frozen.num_batches_tracked == 0
    assert loop(tmp_path, Headed(cfg, 3), cfg, resume=True).step == 6


def test_a_loop_may_be_left_when_it_is_enough(tmp_path):
    cfg = prepare('linear', {})[1]
    result = loop(tmp_path, lm.Linear(cfg, 3), cfg, until=6).close(enough=True)
    assert (result['finished'], result['steps']) == (True, 6) and training.stage_done(tmp_path, '') == result
    assert disk.checkpoint(tmp_path).name == 'step_000006' and not loop(tmp_path/'b', lm.Linear(cfg, 3), cfg, until=3).close()['finished']


def rewarded(model, batch, step, cfg, reward=1., **extra):
    "A loss that gets something which is not in the batch."
    return {k: v * reward for k, v in lm.losses(model, batch, step, cfg).items()}


def test_extra_arguments_are_replayed(tmp_path):
    from types import SimpleNamespace
    cfg = prepare('linear', dict(late_from=0))[1]
    reward = lambda step: dict(reward=torch.tensor(float('nan') if step == 5 else 1.), names=['a', ('b', 2)])
    with pytest.raises(core.NonFinite) as e: loop(tmp_path, lm.Linear(cfg, 3), cfg, rewarded, extra=reward)
    assert (e.value.term, e.value.step) == ('cls', 5)
    method = SimpleNamespace(LinearConfig=lm.LinearConfig, Linear=lm.Linear, losses=rewarded, total=lm.total)
    with pytest.raises(core.NonFinite) as again: training.replay(tmp_path/'nonfinite', method)
    assert again.value.term == 'cls'


def test_bar_where_somebody_looks(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(training, 'live', lambda: True)
    whole(tmp_path/'a', steps=3)
    text = capfd.readouterr().err
    assert '3/3' in text and 'cls=' in text


def test_images_of_different_sizes_are_refused(tmp_path):
    class Ragged(lm.Tiny):
        def sample(self, index, generator): return super().sample(index, generator) | dict(image=torch.zeros(3, 6, 5 + index % 2))
    cfg = prepare('linear', dict(workers=1, batch=8))[1]
    with pytest.raises(core.BadInput, match='one batch'): lm.train(cfg, Ragged(cfg), tmp_path)
