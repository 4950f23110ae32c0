"The parity tool: it passes on the golden vectors, on another directory of the format, and it can fail."
import json, shutil, subprocess, sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import parity

GOLDEN = Path(__file__).parent/'golden'/'more'
BATCHED = ('image', 'label', 'enc.*', 'out.*', 'gcr.*', 'cam*', 'lam*', 'denorm', 'label_*', 'mask_*', 'aff_mask', 'refined_pseudo_label')


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads(); torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def counts(capsys, *words):
    "(exit code, compared, failed, not covered, the whole text)."
    capsys.readouterr(); code = parity.main(*map(str, words)); text = capsys.readouterr().out
    last = text.splitlines()[-1].removeprefix('more: ').split(', ')
    return code, *(int(x.split()[0]) for x in last), text


def copy(to, change=lambda stem, name, tensor: tensor, **config):
    "A golden directory whose tensors went through `change`; None drops one."
    to.mkdir(parents=True)
    for file in GOLDEN.glob('*.safetensors'):
        kept = {k: change(file.stem, k, v) for k, v in load_file(file).items()}
        if any(v is not None for v in kept.values()): save_file({k: v.contiguous() for k, v in kept.items() if v is not None}, to/file.name)
    (to/'config.json').write_text(json.dumps(json.loads((GOLDEN/'config.json').read_text()) | config))
    return to


def first_image(stem, name, tensor):
    "What the official code says about the first image alone: all that it computes image by image; the energy's 1/B doubles."
    if stem == 'weights' or name.startswith(('par.', 'crf.')): return tensor
    if stem == 'probes' or name.endswith(('_pos1', '_tokens1')): return None
    if name == 'energy.grad_lattice_area_half': return 2 * tensor[:1]
    if name.startswith('ure.selected_'): return tensor
    return tensor[:1] if parity.reason(name, dict.fromkeys(BATCHED, True)) else None


def test_golden_vectors(capsys):
    code, compared, failed, missing, text = counts(capsys, 'more')
    assert (code, failed) == (0, 0) and compared >= 90 and compared / (compared + missing) >= .95
    assert text.splitlines()[-1] == f'more: {compared} compared, 0 failed, {missing} not covered'
    print(text.splitlines()[-1])


def test_every_row_says_where_it_comes_from(capsys):
    rows = counts(capsys, 'more')[-1].splitlines()[:-1]
    assert all('official code' in r or 'own oracle' in r or 'not covered: ' in r for r in rows) and all(len(r) > 60 for r in rows)


def test_another_directory_of_the_format(tmp_path, capsys):
    "One image instead of two, no probes, no losses; and the parent of two directories."
    one = copy(tmp_path/'sets'/'one', first_image, B=1)
    code, compared, failed, missing, text = counts(capsys, 'more', one)
    assert (code, failed, missing) == (0, 0, 0) and compared > 40, text
    copy(tmp_path/'sets'/'two')
    code, both, failed, _, _ = counts(capsys, 'more', tmp_path/'sets')
    assert code == 0 and failed == 0 and both == compared + counts(capsys, 'more')[1]


@pytest.mark.parametrize('name', ['enc.block2.out', 'gcr.gate_prob', 'cam', 'loss.cre_early', 'grad.encoder.norm.weight', 'crf.Q', 'cre.neg_loss', 'label_bkg'])
def test_one_changed_tensor_fails(tmp_path, capsys, name):
    def spoil(stem, k, v):
        if k != name: return v
        v = v.clone()
        if v.is_floating_point(): v.view(-1)[0] += .01 * (1 + v.abs().max())
        else: v.view(-1)[:len(v.view(-1)) // 10] += 1
        return v
    code, _, failed, _, text = counts(capsys, 'more', copy(tmp_path/'a', spoil))
    assert code == 1 and failed == 1 and any(f'/{name} ' in r and 'FAILED' in r for r in text.splitlines()), text


def test_permuted_tensors_and_other_weights_fail(tmp_path, capsys):
    code, _, failed, _, _ = counts(capsys, 'more', copy(tmp_path/'a', lambda stem, k, v: v.flip(1) if k == 'enc.tokens_in' else v))
    assert (code, failed) == (1, 1)
    code, compared, failed, _, _ = counts(capsys, 'more', copy(tmp_path/'b', lambda stem, k, v: v * 1.01 if k == 'encoder.norm.weight' else v))
    assert code == 1 and failed > 20


def test_a_tensor_nobody_computes_is_not_covered(tmp_path, capsys):
    "More than 5 % of them: exit code 1 although nothing failed."
    folder = copy(tmp_path/'a')
    known = counts(capsys, 'more', folder)[1]
    for few, code in ((1, 0), (known // 15, 1)):
        save_file(load_file(GOLDEN/'losses.safetensors') | {f'unheard.{i}': torch.zeros(1) for i in range(few)}, folder/'losses.safetensors')
        found = counts(capsys, 'more', folder)
        assert found[0] == code and found[2] == 0 and found[3] >= few and 'unheard.0' in found[4]


@pytest.mark.parametrize('lacking', ['weights', 'forward', 'cam', 'labels'])
def test_a_missing_file_is_named(tmp_path, lacking):
    folder = copy(tmp_path/'a'); (folder/f'{lacking}.safetensors').unlink()
    with pytest.raises(SystemExit) as e: parity.main('more', folder)
    needed = load_file(GOLDEN/f'{lacking}.safetensors')
    assert 'cure: ' in e.value.code and str(folder) in e.value.code and any(f'"{k}"' in e.value.code for k in [lacking, *needed])


def test_an_empty_folder_and_an_unknown_method_are_refused(tmp_path):
    with pytest.raises(SystemExit, match='config.json'): parity.main('more', tmp_path)
    with pytest.raises(SystemExit, match='nothing'): parity.main('nothing')


def test_as_a_command():
    "The form that the README names: last line and exit code."
    done = subprocess.run([sys.executable, str(Path(parity.__file__)), 'more'], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith('more: ') and ' 0 failed, ' in done.stdout.splitlines()[-1]
