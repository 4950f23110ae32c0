"The command line, end to end, on a method of thirty lines: exit codes, messages, nothing overwritten unasked."
import contextlib, dataclasses, json, re, shutil, signal, subprocess, sys, time
from pathlib import Path

import numpy as np
import pytest

import wsl_nb
from wsl_nb import cli
from wsl_nb.core import read_mask, write_image

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope='module', autouse=True)
def toy(tmp_path_factory):
    "Makes tests/toy_method.py the method `toy` of this process and of those it starts."
    folder = tmp_path_factory.mktemp('methods')
    shutil.copy(HERE / 'toy_method.py', folder / 'toy.py')
    (folder / 'start.py').write_text(f'import sys, wsl_nb; wsl_nb.__path__.append({str(folder)!r})\nfrom wsl_nb import cli; cli.METHODS += ("toy",); sys.exit(cli.main())\n')
    wsl_nb.__path__.append(str(folder)); kept, cli.METHODS = cli.METHODS, (*cli.METHODS, 'toy')
    yield folder
    wsl_nb.__path__.remove(str(folder)); cli.METHODS = kept
    sys.modules.pop('wsl_nb.toy', None)


@pytest.fixture(scope='module')
def run(toy, tmp_path_factory):
    "A finished run of the toy."
    out = tmp_path_factory.mktemp('run') / 'toy'
    assert cli.main(['train', 'toy', '--out', str(out)]) == 0
    return out


def refused(capsys, *words):
    "Code and message of a command that must fail without a traceback."
    code = cli.main([str(w) for w in words]); text = capsys.readouterr().err
    assert 'Traceback' not in text and text.strip()
    return code, text


def test_help_is_quick_and_complete():
    code = 'import sys; from wsl_nb.cli import main; assert main(["--help"]) == 0; assert not {"torch", "tyro", "matplotlib"} & set(sys.modules)'
    text = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True).stdout
    for command in ('demo', 'lab', 'data', 'train', 'ablate', 'eval', 'predict', 'replay', 'results', 'doctor', 'assets'): assert command in text


def test_help_offers_the_methods_that_are_built(capsys):
    for command in ('demo', 'train', 'ablate', 'eval', 'predict', 'doctor'):
        with contextlib.suppress(SystemExit): cli.main([command, *(['toy'] if command in cli.WITH_RECIPE else []), '--help'])
        assert f'one of {", ".join(cli.methods_present())}' in ' '.join(capsys.readouterr().out.split())
    assert 'toy' in cli.methods_present()


def test_every_field_of_the_recipe_is_a_flag(capsys):
    assert cli.main(['train', 'toy', '--help']) == 0
    text = capsys.readouterr().out
    for word in ('--preset', '--resume', '--accumulate', '--data_preset', 'Step whose second term'): assert word in text


def test_flags_over_file_over_preset(tmp_path):
    (tmp_path / 'a.yaml').write_text('lr: 1e-2\nbatch: 2\nbetas: [0.8, 0.9]\nchannels_last: true\n')
    out = tmp_path / 'run'
    assert cli.main(['train', 'toy', '--out', str(out), '--config', str(tmp_path / 'a.yaml'), '--batch', '3', '--steps', '1']) == 0
    import yaml
    found = yaml.safe_load((out / 'config.yaml').read_text())
    assert (found['lr'], found['batch'], found['steps'], found['betas'], found['channels_last']) == (.01, 3, 1, [.8, .9], True)


@pytest.mark.parametrize('words, says', [
    (['train', 'nothing', '--out', 'x'], 'one of'), (['train', 'toy', '--preset', 'NOTHING', '--out', 'x'], 'LAPTOP'), (['train', 'toy'], '--out'),
    (['train', 'toy', '--out', 'x', '--lrr', '1'], '--lrr'), (['train', 'toy', '--out', 'x', '--batch', 'many'], 'many'), (['train', 'toy', '--preset', 'VOC', '--out', 'x'], '--data'),
    (['train', 'toy', '--data', '.', '--out', 'x'], 'embedded'), (['train', 'toy', '--config', 'none.yaml', '--out', 'x'], 'none.yaml'), (['train', 'toy', '--precision', 'fp16', '--out', 'x'], 'fp16'),
    (['eval', 'toy', '--run', 'nowhere'], 'config.yaml'), (['predict', 'toy', '--run', 'nowhere', '--out', 'y', 'none.png'], 'none.png'), (['predict', 'toy', '--out', 'y'], 'IMAGE'),
    (['replay', 'nowhere'], 'facts.json'), (['data', 'check', 'voc', 'nowhere'], 'nowhere'), (['demo', 'toy', '--outt', 'x'], '--outt'), (['fly'], 'fly'), ([], 'COMMAND'),
    (['assets', 'make'], 'name'), (['eval', 'toy', '--run', 'RUN', '--protocol', 'cam2seg'], 'this method has one'), (['eval', 'toy', '--run', 'RUN', '--num-images', '0'], '1 or more'), (['eval', 'toy', '--run', 'RUN', '--processes', '-1'], '0 or more'), (['eval', 'toy', '--run', 'RUN', '--processes', '2'], 'without --protocol'),
    (['data', 'check', 'voc', '.', '--boxes', 'voc'], 'one form'), (['eval', 'toy', '--run', 'RUN', '--truth', 'one'], 'one form'), (['predict', 'cdtr', '--preset', 'CUB', '--weights', 'x', '--out', 'y', 'IMAGE'], '--classes FILE.txt'), (['predict', 'toy', '--run', 'RUN', '--classes', 'a,a', '--out', 'y', 'IMAGE'], 'each class once'), (['predict', 'toy', '--run', 'RUN', '--classes', 'a,b', '--out', 'y', 'IMAGE'], '--classes with 2 names'),
    (['data', 'fetch', 'nothing', '--out', 'x'], 'pet'), (['data', 'fetch', 'cub', '--out', 'x'], 'by hand'), (['data', 'fetch', 'pet'], '--out'), (['doctor', 'toy'], 'step_cost'), (['doctor', 'toy', '--find-batch-size'], 'step_cost'), (['doctor', '--find-batch-size'], 'METHOD'), (['doctor', 'more', '--memory', '4'], '--find-batch-size'), (['ablate', 'nothing', '--over', 'lr=1', '--out', 'x'], 'one of'), (['doctor', 'nothing'], 'one of')])
def test_bad_input_ends_with_2(words, says, run, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_image(tmp_path/'image.png', np.zeros((20, 20, 3), np.uint8))
    code, text = refused(capsys, *(dict(RUN=run, IMAGE=tmp_path/'image.png').get(w, w) for w in words))
    assert code == 2 and says in text


def test_a_method_that_is_not_built_says_which_are(capsys):
    absent = [m for m in cli.METHODS if m not in cli.methods_present()]
    if not absent: pytest.skip('all are built')
    code, text = refused(capsys, 'demo', absent[0])
    assert code == 2 and 'not built yet' in text and 'toy' in text


def test_debug_shows_the_traceback(capsys):
    assert cli.main(['train', 'nothing', '--out', 'x', '--debug']) == 2
    assert 'Traceback' in capsys.readouterr().err


def test_a_run_is_not_overwritten_and_resumes(run, capsys):
    before = (run / 'result.json').read_bytes()
    code, text = refused(capsys, 'train', 'toy', '--out', run)
    assert code == 2 and 'resume' in text and (run / 'result.json').read_bytes() == before
    code, text = refused(capsys, 'train', 'toy', '--out', run, '--resume', '--lr', '.5')
    assert code == 2 and 'lr' in text
    assert cli.main(['train', 'toy', '--out', str(run), '--resume']) == 0
    assert len(json.loads((run / 'classes.json').read_text())) == 8


def test_eval_writes_complete_records_once(run, capsys):
    from wsl_nb.metrics import read_results
    assert cli.main(['eval', 'toy', '--run', str(run)]) == 0
    record, = read_results(run / 'eval_val.json')
    assert record.images == 6 and record.run == 'toy/step_000004, best on val'
    code, text = refused(capsys, 'eval', 'toy', '--run', run)
    assert code == 2 and '--overwrite' in text
    assert cli.main(['eval', 'toy', '--run', str(run), '--num-images', '2']) == 0
    assert read_results(run / 'eval_val_2.json')[0].split == 'val[:2]'
    code, text = refused(capsys, 'eval', 'toy', '--run', run, '--num-images', '999', '--overwrite')
    assert code == 2 and '1..6' in text
    code, text = refused(capsys, 'eval', 'toy', '--run', run, '--split', 'dev')
    assert code == 2 and 'dev' in text


@pytest.fixture()
def drawing(toy, monkeypatch):
    "Gives the toy protocols and pictures; what it was asked for."
    asked, module = [], sys.modules['wsl_nb.toy']
    def protocols(model, split, cfg, chosen, processes=0):
        asked.append(('scores', list(chosen), processes))
        return {n: [dataclasses.replace(r, metric=m, unit=u) for r in module.evaluate(model, split, cfg) for m, u in (('mIoU', '%'), ('F1', 'share'))] for n in chosen}
    def pictures(model, split, cfg, out, protocol=None, processes=0):
        asked.append(('pictures', protocol, processes)); (out/'a.png').touch(); return ['a.png']
    for name, value in dict(PROTOCOLS=dict(given='G', predicted='P'), evaluate_protocols=protocols, evaluation_files=pictures).items(): monkeypatch.setattr(module, name, value, raising=False)
    return asked


def test_several_protocols_are_one_table(run, drawing, tmp_path, capsys):
    from wsl_nb.metrics import read_results
    file = tmp_path/'scores.json'; capsys.readouterr()
    assert cli.main(['eval', 'toy', '--run', str(run), '--protocol', 'all', '--out', str(file)]) == 0
    text = capsys.readouterr().out
    assert '| metric | given | predicted |' in text and text.count('mIoU (%)') == 1 and '<br>' not in text and '[1]' not in text and 'F1' not in text
    assert f'wrote {file}: 4 numbers, each with its protocol' in text and [(r.metric, r.run) for r in read_results(file)] == [(m, 'toy/step_000004, best on val') for m in ('mIoU', 'F1')] * 2
    assert cli.main(['eval', 'toy', '--run', str(run), '--protocol', 'given', '--out', str(file), '--overwrite']) == 0 and '[1]' in capsys.readouterr().out


def test_pictures_are_of_one_protocol_and_need_masks(run, drawing, tmp_path, capsys):
    words, out = ['eval', 'toy', '--run', run, '--out', tmp_path/'scores.json', '--overwrite', '--pictures', tmp_path/'pictures'], tmp_path/'pictures'
    code, text = refused(capsys, *words, '--protocol', 'all'); assert code == 2 and 'given, predicted' in text and 'one protocol' in text
    names = json.loads((run/'classes.json').read_text()); own = tmp_path/'own'; random = np.random.default_rng(0)
    for name in names:
        (own/name).mkdir(parents=True)
        for i in range(2): write_image(own/name/f'{i}.png', random.integers(0, 256, (32, 32, 3), np.uint8))
    (own/'classes.txt').write_text('\n'.join(names) + '\n')
    code, text = refused(capsys, *words, '--layout', 'folder', '--data', own); assert code == 2 and 'no masks' in text
    assert drawing == [] and not out.exists() and not (tmp_path/'scores.json').exists()
    assert cli.main([str(w) for w in (*words, '--protocol', 'predicted', '--processes', '2')]) == 0 and drawing == [('scores', ['predicted'], 2), ('pictures', 'P', 2)]
    drawing.clear(); assert cli.main([str(w) for w in words]) == 0 and drawing == [('pictures', None, 0)] and (out/'a.png').exists()


def test_class_names_of_the_pets_are_known(run, tmp_path, monkeypatch):
    from wsl_nb.formats_pet import PET_CLASSES
    module = cli.method('toy'); monkeypatch.setattr(sys.modules['wsl_nb.toy'], 'PET', dataclasses.replace(module.LAPTOP, layout='pet'), raising=False)
    from safetensors.torch import save_file
    save_file(module.Toy(module.LAPTOP, len(PET_CLASSES)).state_dict(), tmp_path/'weights.safetensors')
    args = cli.build_parser().parse_args(['predict', 'toy', '--preset', 'PET', '--weights', str(tmp_path/'weights.safetensors'), '--out', 'x', 'y.png'])
    from wsl_nb.cli_predict import predictor
    assert tuple(predictor(args)[3]) == PET_CLASSES


def test_predict_keeps_the_size_of_own_images(run, tmp_path, capsys):
    random = np.random.default_rng(0)
    for name, shape in dict(portrait=(70, 40, 3), landscape=(40, 70, 3), grey=(50, 50)).items(): write_image(tmp_path / f'{name}.png', random.integers(0, 256, shape, np.uint8))
    out = tmp_path / 'out'
    assert cli.main(['predict', 'toy', '--run', str(run), '--out', str(out), str(tmp_path)]) == 0
    assert sorted(p.name for p in out.glob('*.png')) == sorted(f'{i:03d}_{n}_{k}.png' for i, n in enumerate(('grey', 'landscape', 'portrait')) for k in ('labels', 'maps'))
    assert read_mask(out / '002_portrait_labels.png').shape == (70, 40) and (out / 'report.html').stat().st_size > 10000
    code, text = refused(capsys, 'predict', 'toy', '--run', run, '--out', out, tmp_path)
    assert code == 2 and 'not empty' in text
    assert cli.main(['predict', 'toy', '--run', str(run), '--out', str(out), '--overwrite', str(tmp_path / 'grey.png')]) == 0
    assert len(list(out.glob('*.png'))) == 2


def test_predict_from_weights_alone(run, tmp_path, capsys):
    write_image(tmp_path / 'a.png', np.zeros((32, 48, 3), np.uint8))
    weights = next((run / 'checkpoints').glob('step_*/model.safetensors'))
    words = ['predict', 'toy', '--weights', str(weights), '--out', str(tmp_path / 'out'), str(tmp_path / 'a.png')]
    assert cli.main(words) == 0
    code, text = refused(capsys, *words, '--overwrite', '--classes', 'a,b')
    assert code == 2 and 'misshaped' in text


def test_demo_replaces_only_what_it_made(tmp_path, capsys):
    out = str(tmp_path / 'demo')
    assert cli.main(['demo', 'toy', '--out', out]) == 0
    assert refused(capsys, 'demo', 'toy', '--out', out)[0] == 2
    assert cli.main(['demo', 'toy', '--out', out, '--overwrite']) == 0
    (tmp_path / 'mine').mkdir(); (tmp_path / 'mine' / 'thesis.txt').touch()
    assert refused(capsys, 'demo', 'toy', '--out', tmp_path / 'mine', '--overwrite')[0] == 2 and (tmp_path / 'mine' / 'thesis.txt').exists()


def test_non_finite_ends_with_3_and_replays(tmp_path, capsys):
    out = tmp_path / 'run'
    assert refused(capsys, 'train', 'toy', '--out', out, '--poison', '2')[0] == 3
    code, text = refused(capsys, 'replay', out)
    assert code == 3 and '"size"' in text and 'step 2' in text


def test_interrupt_ends_with_130_and_resumes(toy, tmp_path):
    out, words = tmp_path / 'run', ['train', 'toy', '--pause', '0.05', '--steps', '60', '--log_every', '1']
    process = subprocess.Popen([sys.executable, str(toy / 'start.py'), *words, '--out', str(out)], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    end = time.time() + 120
    while time.time() < end and not ((out / 'log.jsonl').exists() and (out / 'log.jsonl').stat().st_size): time.sleep(.05)
    process.send_signal(signal.SIGINT)
    assert 'Traceback' not in process.communicate(timeout=60)[1] and process.returncode == 130
    steps = [int(p.name.split('_')[1]) for p in (out / 'checkpoints').glob('step_*')]
    assert steps and max(steps) < 60
    assert cli.main([*words, '--out', str(out), '--resume']) == 0


def test_results_reads_runs_and_lists(run, tmp_path, capsys):
    from wsl_nb.metrics import read_results, write_results
    if not (run / 'eval_val.json').exists(): cli.main(['eval', 'toy', '--run', str(run)])
    found = read_results(run / 'eval_val.json')
    write_results(tmp_path / 'a' / 'result.json', found); (tmp_path / 'b').mkdir()
    shutil.copy(run / 'result.json', tmp_path / 'b'); capsys.readouterr()
    assert cli.main(['results', str(tmp_path)]) == 0
    assert '| toy | LAPTOP |' in capsys.readouterr().out


def test_eval_refuses_data_whose_classes_are_not_those_of_the_run(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path/'run')
    names = json.loads((other/'classes.json').read_text()); (other/'classes.json').write_text(json.dumps(names[::-1]))
    code, text = refused(capsys, 'eval', 'toy', '--run', other, '--out', tmp_path/'scores.json')
    assert code == 2 and 'those of the run in their order' in text and not (tmp_path/'scores.json').exists()


@pytest.mark.parametrize('words', [['data', 'make', 'typo', '--out', 'kept', '--overwrite'], ['data', 'make', 'wsss', '--layout', 'cub', '--train', '4', '--val', '2', '--test', '0', '--out', 'kept', '--overwrite'],
                                   ['data', 'make', 'small', '--layout', 'typo', '--train', '2', '--val', '1', '--test', '0', '--out', 'kept', '--overwrite'], ['demo', 'toy', '--seeds', 'x', '--out', 'kept', '--overwrite']])
def test_a_command_that_is_refused_deletes_nothing(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('WSL_NB_CACHE', str(tmp_path/'cache'))
    (tmp_path/'kept').mkdir(); (tmp_path/'kept'/'.wsl-nb').touch(); (tmp_path/'kept'/'result.json').write_text('[]')
    assert refused(capsys, *words)[0] == 2
    assert sorted(p.name for p in (tmp_path/'kept').iterdir()) == ['.wsl-nb', 'result.json'] and [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []


def test_data_make_replaces_only_what_it_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path); monkeypatch.setenv('WSL_NB_CACHE', str(tmp_path/'cache'))
    make = ['data', 'make', 'small', '--layout', 'coco', '--size', '32', '--train', '2', '--val', '1', '--test', '0', '--out', 'set']
    assert cli.main(make) == 0 and refused(capsys, *make)[0] == 2
    (tmp_path/'set'/'mine.txt').touch(); assert cli.main([*make, '--overwrite']) == 0 and not (tmp_path/'set'/'mine.txt').exists()
    (tmp_path/'set'/'.wsl-nb').unlink(); code, text = refused(capsys, *make, '--overwrite')
    assert code == 2 and 'did not make' in text and (tmp_path/'set'/'annotations').is_dir()


def test_results_are_found_in_evaluations_too(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path/'runs'/'toy')
    for file in other.glob('eval_*'): file.unlink()
    assert cli.main(['eval', 'toy', '--run', str(other), '--num-images', '2']) == 0 and cli.main(['eval', 'toy', '--run', str(other)]) == 0
    capsys.readouterr(); assert cli.main(['results', str(tmp_path/'runs'), '--like', 'Best On Val']) == 0
    text = capsys.readouterr().out; assert '| score (share) |' in text and '[:2]' not in text
    assert cli.main(['results', str(tmp_path/'runs'), '--like', 'nothing of it']) == 0 and 'no recorded result' in capsys.readouterr().out


def test_lab_opens_the_lesson_at_the_address_it_prints(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(cli.subprocess, 'call', lambda words, cwd: asked.append((words, cwd)) or 0)
    assert cli.main(['lab', '--port=1234']) == 0
    (words, cwd), = asked
    assert '--LabApp.default_url=/lab/tree/nbs/02_more.ipynb' in words and f'--ServerApp.root_dir={cwd}' in words and words[-1] == '--port=1234' and (Path(cwd)/'nbs'/'02_more.ipynb').is_file()
    assert 'copy the address' in capsys.readouterr().out


def test_train_says_where_the_run_lies_and_what_comes_next(tmp_path, capsys):
    assert cli.main(['train', 'toy', '--out', str(tmp_path/'run'), '--steps', '2']) == 0
    text = capsys.readouterr().out
    assert f'wrote {tmp_path/"run"}: 2 steps' in text and f'wsl-nb predict toy --run {tmp_path/"run"}' in text


def test_a_run_in_stages_has_an_end_too(tmp_path):
    (tmp_path/'first').mkdir(); (tmp_path/'first'/'result.json').write_text('{}')
    text = cli.ended(tmp_path, 'toy')
    assert text.splitlines()[0] == f'wrote {tmp_path}' and f'wsl-nb eval toy --run {tmp_path}' in text


def test_data_can_be_made_in_the_folder_one_stands_in(tmp_path, monkeypatch):
    monkeypatch.setenv('WSL_NB_CACHE', str(tmp_path/'cache')); (tmp_path/'here').mkdir(); monkeypatch.chdir(tmp_path/'here')
    assert cli.main(['data', 'make', 'small', '--layout', 'coco', '--size', '32', '--train', '2', '--val', '1', '--test', '0', '--out', '.']) == 0
    assert (tmp_path/'here'/'annotations').is_dir()


def test_train_aug_needs_both_folders(tmp_path, capsys):
    code, text = refused(capsys, 'data', 'train-aug', tmp_path/'voc', tmp_path/'sbd')
    assert code == 2 and 'voc' in text


def test_data_is_made_and_checked(tmp_path, capsys):
    pytest.importorskip('wsl_nb.formats_check')
    out = tmp_path / 'voc'
    assert cli.main(['data', 'make', 'small', '--out', str(out), '--train', '3', '--val', '2', '--test', '2']) == 0
    assert cli.main(['data', 'check', 'voc', str(out)]) == 0, capsys.readouterr().out
    next(out.rglob('JPEGImages/*.jpg')).unlink(); capsys.readouterr()
    assert cli.main(['data', 'check', 'voc', str(out)]) == 2
    assert 'cure:' in capsys.readouterr().out
    assert cli.main(['data', 'list']) == 0 and 'wsss' in capsys.readouterr().out


def test_commands_of_the_readme_are_understood():
    "Every `wsl-nb` line of README.md parses, and names a preset that exists."
    text = (HERE.parent / 'README.md').read_text(encoding='utf-8')
    lines = [l.split('#')[0].split('wsl-nb ', 1)[1].split() for block in re.findall(r'```sh\n(.*?)```', text, re.S) for l in block.splitlines() if 'wsl-nb ' in l.split('#')[0]]
    assert len(lines) >= 5
    for words in lines:
        args, rest = cli.build_parser().parse_known_args(words)
        recipes = cli.presets(cli.method(args.method)) if hasattr(args, 'preset') and args.method in cli.methods_present() else {}
        assert not hasattr(args, 'preset') or args.preset in recipes, words
        if args.command in cli.WITH_RECIPE: cli.recipe(recipes[args.preset], rest) # what is left are fields of the recipe, else exit 2
        else: assert not rest, words


def test_doctor(capsys):
    assert cli.main(['doctor']) == 0 and 'torch' in capsys.readouterr().out
