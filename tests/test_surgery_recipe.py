"Runs of the localisation head: killed, resumed, spread over processes, poisoned; what is refused; features that are kept; scores over processes; layouts through the command line; own words through it."
import json, math, shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from test_cli import refused
from test_nonfinite import command, fails, stopped_and_replayed
from test_training import final, log, same, two_processes, whole
from training_child import SURGERY_TINY, prepare
from wsl_nb import cli, core, surgery_own, surgery_recipe as recipe
from wsl_nb import training_checkpoint as disk
from wsl_nb.core import ASSETS, BadInput, read_image, torch_rng, write_image
from wsl_nb.data import embedded
from wsl_nb.formats import open_set
from wsl_nb.formats_write import export
from wsl_nb.metrics import ledger, read_results
from wsl_nb.surgery_base import LAPTOP, VIEWS, BoxView
from wsl_nb.vit_clip import random_clip

BARE = replace(SURGERY_TINY, eval_split='', checkpoint_every=0, cache=False) # Where scores do not matter


# --- runs ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A finished run on drawn images, all checkpoints kept, and its data."
    out, before = tmp_path_factory.mktemp('surgery')/'run', torch.get_num_threads(); torch.set_num_threads(1)
    module, cfg, data = prepare('surgery', dict(keep_last=9, accumulate=2, steps=6)); module.train(cfg, data, out); torch.set_num_threads(before)
    (out/'classes.json').write_text(json.dumps(list(data.classes)))
    return out, cfg, data


@pytest.mark.parametrize('steps', [2, 4])
def test_resumed_equals_uninterrupted(run, tmp_path, steps):
    "Cut back to a checkpoint: weights and log are the same bit for bit; the kept features are computed again and are the same."
    out, cfg, data = run; cut = Path(shutil.copytree(out, tmp_path/'cut')); (cut/'result.json').unlink()
    for folder in disk.checkpoints(cut):
        if int(folder.name.split('_')[1]) > steps: shutil.rmtree(folder)
    torch.rand(3); recipe.frozen_tower.cache_clear() # a new process loads CLIP again, which must not move the generators
    result = recipe.train(cfg, data, cut, resume=True); same(out, cut); assert result['finished']


def test_workers_do_not_matter(run, tmp_path):
    "Views are drawn from the key of the image, not from the generators of the process."
    module, cfg, data = prepare('surgery', dict(keep_last=9, accumulate=2, steps=6, workers=2)); module.train(cfg, data, tmp_path/'b'); same(run[0], tmp_path/'b')


def test_kept_features_are_those_of_the_turned_pictures(run):
    "For all eight views, in half precision; the views of a picture come from one opening of its file; order and batch size change nothing but rounding."
    _, cfg, data = run; clip = recipe.clip_of(cfg); model = recipe.new_model(cfg, data, clip); turns = replace(cfg, augment='turns', batch=5)
    split = data.split('train', ('image', 'boxes'), BoxView(96, clip.mean, clip.std, 'turns')); kept = recipe.Cache(clip, model.texts, split, turns); assert kept.cams.shape[:2] == (12, VIEWS['turns']) and kept.cams.dtype == torch.float16
    from wsl_nb.core import rng
    for view in range(8):
        s = next(x for k in range(400) if (x := split.transform(data.split('train', ('image', 'boxes'))[3], rng('view', k)))['view'] == view); fresh = recipe.frozen_features(clip, s['image'][None], model.texts, cfg)
        for a, b in zip(fresh, kept(dict(index=torch.tensor([3]), view=[view]), torch.device('cpu'))): assert (a - b).abs().max() < 2e-3


def test_features_that_are_kept_and_those_that_are_computed_train_alike(run, tmp_path):
    "Within half precision."
    _, cfg, data = run
    for kept in (True, False): recipe.train(replace(cfg, cache=kept, steps=3, eval_split='', checkpoint_every=0), data, tmp_path/str(kept))
    a, b = ([l['terms'] for l in log(tmp_path/x) if 'terms' in l] for x in ('True', 'False')); assert len(a) == 3 and all(x == pytest.approx(y, rel=2e-2) for x, y in zip(a, b)) and a != b


@pytest.mark.parametrize('head', ['grid', 'cell'])
def test_two_processes_equal_accumulation(tmp_path, head):
    "Two processes of micro-batch 2 against two passes of 2: every term and the weights, but for statistics of batch normalisation."
    changes = dict(eval_split='', steps=3, workers=0, checkpoint_every=0, augment='none') | (dict(head='cell', grid=7, width=32, matching='cell', radius=1.5, match_iou=.01) if head == 'cell' else {})
    whole(tmp_path/'one', 'surgery', accumulate=2, **changes)
    codes, texts = two_processes(tmp_path/'two', 'surgery', accumulate=1, **changes); assert codes == [0, 0], texts
    a, b = ([l['terms'] for l in log(tmp_path/x) if 'terms' in l] for x in ('one', 'two')); assert len(a) == 3 and all(x == pytest.approx(y, rel=1e-3, abs=1e-5) for x, y in zip(a, b))
    one, two = final(tmp_path/'one'), final(tmp_path/'two'); assert one.keys() == two.keys() and max((one[k] - two[k]).abs().max().item() for k in one if 'running' not in k and 'tracked' not in k and 'texts' not in k) < 1e-4 and not any('Warning' in t for t in texts), texts


@pytest.mark.parametrize('changes', [{}, dict(head='cell', grid=7, width=32, matching='cell', radius=1.5, cam='unnormed')], ids=['grid', 'earlier'])
def test_bf16(tmp_path, changes):
    "Every term and weight is finite; maps and boxes are float32."
    whole(tmp_path/'a', 'surgery', precision='bf16', steps=3, eval_split='', checkpoint_every=0, **changes); lines = [l for l in log(tmp_path/'a') if 'terms' in l]
    assert len(lines) == 3 and all(math.isfinite(v) for l in lines for v in (*l['terms'].values(), l['total'], l['gradient_norm'])) and all(v.isfinite().all() for v in final(tmp_path/'a').values())
    cfg = replace(SURGERY_TINY, **changes); clip = recipe.clip_of(cfg); model = recipe.new_model(cfg, prepare('surgery', changes)[2], clip); images = torch.randn(1, 3, 96, 96, generator=torch_rng('bf16'))
    with torch.autocast('cpu', torch.bfloat16): features = recipe.frozen_features(clip, images, model.texts, cfg); boxes = model(images, features, torch.tensor([[0, 1]]))
    assert features.cams.dtype == features.tokens.dtype == boxes.dtype == torch.float32


def test_training_makes_the_boxes_better(tmp_path):
    "Eighty updates on sixteen pictures: the loss at least halves, and most of these objects get a box."
    _, cfg, data = prepare('surgery', dict(data_train=16, steps=80, batch=8, lr=2e-3, warmup=5, width=32, augment='none', checkpoint_every=0, eval_split='')); recipe.train(cfg, data, tmp_path/'run'); losses = [l['total'] for l in log(tmp_path/'run') if 'terms' in l]
    model, _ = recipe.load_run(tmp_path/'run', 8); rows = {r.metric: r.value for r in recipe.evaluate(model, data.split('train'), cfg)}; assert losses[-1] < losses[0] / 2 and rows['local acc@0.5'] > 80, (losses[0], losses[-1], rows['local acc@0.5'])


POISON = dict(l1=dict(w_giou=0.), giou=dict(w_l1=0.), both={}) # Term that is named -> changes


@pytest.mark.parametrize('case', POISON)
@pytest.mark.parametrize('value', [float('nan'), float('inf')], ids=['nan', 'inf'])
def test_each_term_is_named_and_replayed(tmp_path, capsys, monkeypatch, case, value):
    "Exit 3 with the term and the images; `wsl-nb replay` ends in the same term."
    made, cfg, out = recipe.new_model, replace(BARE, steps=2, **POISON[case]), tmp_path/'run'
    def _planted(*args):
        model = made(*args)
        with torch.no_grad(): model.head.from_cams.weight.view(-1)[0] = value
        return model
    monkeypatch.setattr(recipe, 'new_model', _planted); term = dict(both='l1').get(case, case)
    code, text = fails(capsys, *command(tmp_path, cfg, out, method='surgery')); assert code == 3 and f'"{term}"' in text and 'step 0' in text and str(out/'nonfinite') in text, text
    stopped_and_replayed(capsys, out, term, 0)


def test_a_batch_without_an_object_is_an_update_of_nothing(tmp_path):
    "Where no learnt class is in the pictures: losses of zero, finite weights, and the run goes on."
    _, cfg, data = prepare('surgery', dict(steps=2, eval_split='', cache=False)); split = data.split('train', ('image', 'boxes'), BoxView(96, (0,) * 3, (1,) * 3)); clip = recipe.clip_of(cfg); model = recipe.new_model(cfg, data, clip).train()
    s = split[0]; batch = dict(image=s['image'][None], boxes=[torch.zeros(0, 4)], box_labels=[torch.zeros(0).long()]); terms = recipe.losses(model, batch, 0, cfg); recipe.total(terms, model, 0, cfg).backward(); assert all(float(v.detach()) == 0 for v in terms.values()) and all((p.grad == 0).all() for p in model.parameters())


# --- what is refused -----------------------------------------------------------------------------------------------

REFUSED = [(dict(train_split='test'), 'train_split "test"', '--train_split'), (dict(eval_split='test'), 'eval_split "test"', '--eval_split'), (dict(train_split='val'), 'in val and in val', 'eval_split ""'), (dict(learnt=('zebra',)), 'zebra', '--learnt'), (dict(layers=7), 'layers 7 of 6', '--layers'), (dict(blocks=9, layers=3), '9 surgery blocks', ''),
           (dict(head='cell', matching='inside'), 'inside', '--matching cell'), (dict(reach=-1.), 'reach -1.0', 'set them'), (dict(match_iou=1.), 'match_iou 1.0', 'set them'), (dict(w_l1=0., w_giou=0.), 'weight 0', '--w_l1'), (dict(grid=25), 'grid 25', '--grid'), (dict(clip_model='ViT-B-32'), 'no clip_file', '--clip_file'),
           (dict(clip_model='ViT-B-32', clip_file='nowhere.pt', side=224, grid=28), 'nowhere.pt', ''), (dict(init='nowhere.safetensors'), 'nowhere.safetensors', ''), (dict(templates='imagenet85'), 'unknown words', '')]


@pytest.mark.parametrize('changes, got, cure', REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else '')
def test_recipes_that_cannot_work_are_refused_before_anything_is_written(tmp_path, changes, got, cure):
    _, _, data = prepare('surgery', {}); cfg = replace(SURGERY_TINY, **changes)
    with pytest.raises(BadInput) as e: recipe.train(cfg, data, tmp_path/'run')
    assert got in e.value.got and cure in e.value.cure and not (tmp_path/'run').exists()


def test_files_of_a_run_are_noted_and_another_is_not_gone_on_with(run, tmp_path):
    "CLIP, and the head that it started from, by name and SHA-256; other bytes under the same path are refused on resume."
    out, cfg, data = run; noted = json.loads((out/'init.json').read_text()); assert noted == dict(clip_file=dict(file='clip_farm.safetensors', sha256=core.file_hash(ASSETS/'clip_farm.safetensors')))
    start = tmp_path/'start.safetensors'; model, _ = recipe.load_run(out, 8); save_file({k: v.contiguous() for k, v in model.state_dict().items()}, start); own = replace(BARE, init=str(start), steps=2); recipe.train(own, data, tmp_path/'run'); recipe.train(own, data, tmp_path/'run', resume=True)
    save_file({k: v + 1 for k, v in load_file(start).items()}, start)
    with pytest.raises(BadInput, match='not the file that this run began with'): recipe.train(own, data, tmp_path/'run', resume=True)


def test_another_clip_under_the_same_name_is_another_clip(tmp_path):
    "In one process the features change with the file; a run that was trained on the first one refuses the second, when it is resumed and when it is scored; records name it."
    state = load_file(ASSETS/'clip_farm.safetensors'); file = tmp_path/'clip.safetensors'; save_file(state, file); _, _, data = prepare('surgery', {}); cfg = replace(BARE, clip_file=str(file), steps=2); recipe.train(cfg, data, tmp_path/'run')
    model, _ = recipe.load_run(tmp_path/'run', 8); images = torch.randn(1, 3, 96, 96, generator=torch_rng('clip')); before = recipe.frozen_features(recipe.clip_of(cfg), images, model.texts, cfg); mark = recipe.evaluate(model, data.split('val'), cfg)[0].protocol['labels']
    save_file({k: v * 1.5 if k == 'visual.proj' else v + (.1 if k == 'visual.conv1.weight' else 0) for k, v in state.items()}, file); after = recipe.frozen_features(recipe.clip_of(cfg), images, model.texts, cfg); assert (before.cams - after.cams).abs().max() > 1e-4
    with pytest.raises(BadInput, match='not the file that this run began with'): recipe.load_run(tmp_path/'run', 8)
    assert recipe.evaluate(model, data.split('val'), cfg)[0].protocol['labels'] != mark and 'CLIP farm' in mark


@pytest.mark.parametrize('words, says', [(['--reach', '1.5'], 'reach'), (['--matching', 'inside'], 'matching: centre -> inside'), (['--blocks', '4'], 'blocks')])
def test_a_changed_field_is_named_on_resume(run, tmp_path, capsys, words, says):
    code, text = refused(capsys, *command(tmp_path, run[1], run[0], '--resume', *words, method='surgery')); assert code == 2 and says in text


# --- layouts through the command line ------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def chains(tmp_path_factory):
    "A function from a layout to (folder of data, finished run), trained by the command line."
    patch = pytest.MonkeyPatch(); patch.setenv('WSL_NB_CACHE', str(tmp_path_factory.mktemp('cache'))); made, data = {}, embedded('small+hard', train=14, val=6, test=4, size=96)
    def chain(layout):
        if layout not in made:
            folder = tmp_path_factory.mktemp(f'run_{layout}'); root = export(data, layout, folder/layout)
            assert cli.main(command(folder, replace(BARE, layout=layout, steps=2, eval_split='val'), folder/'run', '--data', root, method='surgery')) == 0
            made[layout] = root, folder/'run'
        return made[layout]
    yield chain
    patch.undo()


@pytest.mark.parametrize('layout', ['dior', 'vhr10', 'voc', 'coco'])
def test_the_whole_chain_through_the_command_line(chains, layout, capsys, tmp_path):
    "check, train, eval with its table and pictures; the file of scores can be read; DIOR's says what RemoteCLIP has seen."
    root, out = chains(layout); data = open_set(root, layout); assert json.loads((out/'classes.json').read_text()) == list(data.classes) and cli.main(['data', 'check', layout, str(root)]) == 0; capsys.readouterr()
    assert cli.main(['eval', 'surgery', '--run', str(out), '--data', str(root), '--split', 'val']) == 0; text = capsys.readouterr().out; assert 'local acc@0.5' in text
    file, = out.glob('eval_*.json'); found = read_results(file); ledger(found); assert ('RemoteCLIP was trained on captions of DIOR' in found[0].protocol['border']) == (layout == 'dior')
    assert cli.main(['eval', 'surgery', '--run', str(out), '--data', str(root), '--split', 'val', '--protocol', 'baselines']) == 0 and 'typical size, true centre: acc@0.5' in capsys.readouterr().out
    assert cli.main(['eval', 'surgery', '--run', str(out), '--data', str(root), '--split', 'val', '--pictures', str(tmp_path/'pictures'), '--num-images', '3']) == 0
    table = json.loads((tmp_path/'pictures'/'summary.json').read_text()); assert table['metrics']['oracle']['micro']['n'] == table['num_gt'] == sum(len(s['boxes']) for s in (data.split('val', ('image', 'boxes'))[i] for i in range(3)))


# --- own words through the command line ----------------------------------------------------------------------------

@pytest.fixture
def pictures(tmp_path):
    "A tall, a wide and a tiny photograph, one of them grey."
    out = []
    for i, size in enumerate(((400, 130, 3), (60, 333, 3), (9, 9, 3))):
        file = tmp_path/f'photo{i}.png'; write_image(file, np.random.default_rng(i).integers(0, 256, size, np.uint8)); out.append(str(file))
    from PIL import Image
    Image.open(out[0]).convert('L').save(out[0]); return out


@pytest.mark.parametrize('file', ['farm', 'RemoteCLIP-ViT-B-32.pt'])
@pytest.mark.parametrize('words', ['ship', 'boat,red truck,duck'])
def test_predict_with_a_weight_file_and_words(tmp_path, capsys, pictures, file, words):
    "Overlays and points for every picture, of any size; one word, too; what the file is taken for is said."
    weights = ASSETS/'clip_farm.safetensors' if file == 'farm' else tmp_path/file; words = words.replace('ship', 'boat') if file == 'farm' else words
    if file != 'farm': torch.manual_seed(0); torch.save(random_clip('ViT-B-32').state_dict(), weights)
    assert cli.main(['predict', 'surgery', '--weights', str(weights), '--classes', words, '--out', str(tmp_path/'out'), *pictures]) == 0; text = capsys.readouterr().out; assert ('QuickGELU' in text and 'ViT-B-32, 448 px, sentences "aerial" (10)' in text) == (file != 'farm')
    rows = json.loads((tmp_path/'out'/'points.json').read_text()); names = words.split(','); assert len(rows) == 3 * len(names) and {r['class'] for r in rows} == set(names) and not (tmp_path/'out'/'boxes.json').exists()
    for r in rows:
        h, w = r['size']; assert read_image(tmp_path/r['file']).shape[:2] == (h, w) and len(r['inside']) == len(r['outside']) >= 1 and all(0 <= x < w and 0 <= y < h for x, y in r['inside'] + r['outside'])
    for i in range(3):
        for kind in ('maps', 'points'): assert (tmp_path/'out'/f'{i:03d}_photo{i}_{kind}.png').stat().st_size > 2000
    assert 'promptable segmenter' in (tmp_path/'out'/'report.html').read_text()


def test_predict_with_a_run_draws_boxes_for_its_classes_and_for_others(run, tmp_path, capsys, pictures):
    "A head with shared weights answers for words that it was not trained on; boxes in boxes.json, inside the picture."
    out, cfg, data = run
    for i, words in enumerate(([], ['--classes', 'striped duck,boat'])):
        assert cli.main(['predict', 'surgery', '--run', str(out), *words, '--out', str(tmp_path/f'out{i}'), *pictures]) == 0; rows = json.loads((tmp_path/f'out{i}'/'boxes.json').read_text()); assert {r['class'] for r in rows} == ({'striped duck', 'boat'} if words else set(data.classes))
        for r in rows: (h, w), (x0, y0, x1, y1) = r['size'], r['xyxy']; assert 0 <= x0 <= x1 <= w and 0 <= y0 <= y1 <= h
        assert (tmp_path/f'out{i}'/'000_photo0_boxes.png').exists() and (tmp_path/f'out{i}'/'points.json').exists()


@pytest.mark.parametrize('words, says', [(['--weights', 'nothing.pt', '--classes', 'ship'], 'no file at'), (['--weights', 'FARM', '--classes', 'ship'], 'unknown words'), (['--weights', 'FARM', '--classes', 'boat', '--preset', 'DIOR'], 'clip_farm.safetensors'), (['--weights', 'BROKEN', '--classes', 'boat'], 'cannot be read')])
def test_predict_refuses_with_a_reason_and_writes_nothing(tmp_path, capsys, pictures, words, says):
    (tmp_path/'broken.pt').write_bytes(b'PK\x03\x04 no'); words = [{'FARM': str(ASSETS/'clip_farm.safetensors'), 'BROKEN': str(tmp_path/'broken.pt')}.get(w, w) for w in words]
    code, text = refused(capsys, 'predict', 'surgery', *words, '--out', str(tmp_path/'out'), *pictures); assert code == 2 and says in text and not (tmp_path/'out').exists()


def test_the_recipes_load_their_own_words():
    "LAPTOP stands for the file as it is; a named preset keeps its side and sentences."
    model, cfg = surgery_own.from_words(replace(LAPTOP, clip_file='x'), ['boat'], ASSETS/'clip_farm.safetensors'); assert cfg.clip_model == 'farm' and cfg.clip_file.endswith('clip_farm.safetensors') and model.head is None
