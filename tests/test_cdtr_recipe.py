"The recipes of CDTR against the specification, runs that are killed, resumed, spread and poisoned, what is refused, thresholds, layouts through the command line, own photographs, costs."
import json, math, shutil
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from test_affinity_recipe import farm # noqa: F401 (a fixture: drawn images, and a function that writes them in a layout)
from test_cli import refused
from test_nonfinite import command, fails, stopped_and_replayed
from test_training import final, log, same, two_processes, whole
from training_child import CDTR_TINY, prepare
from wsl_nb import cdtr, cdtr_own, cdtr_recipe, cdtr_scores, cli, core
from wsl_nb import training_checkpoint as disk
from wsl_nb.boxes import PROTOCOLS, count_hits
from wsl_nb.cdtr_base import CATR_CUB_OFFICIAL, CHANGES, CUB, CUB_OFFICIAL, ILSVRC, ILSVRC_OFFICIAL, LAPTOP, PRESETS, CDTRConfig, preset_name, rate_factor
from wsl_nb.cdtr_weights import from_weights
from wsl_nb.core import BadInput, read_image
from wsl_nb.data import embedded
from wsl_nb.formats import open_set
from wsl_nb.metrics import PROTOCOL, ledger, read_results
from wsl_nb.training_config import check_config
from wsl_nb.training_order import Order

IMAGES = dict(cub=5994, ilsvrc=1281167) # Training images of the two sets
BARE = replace(CDTR_TINY, w_sba=0., eval_split='', augment='', erase=0., checkpoint_every=0) # Where CLIP and scores do not matter


# --- recipes -------------------------------------------------------------------------------------------------------

def test_official_values():
    "Sections 3 to 6 of the specification: CDTR on CUB, on ILSVRC, CATR on CUB."
    both = dict(dim=384, depth=12, heads=6, patch=16, side=14, mlp_ratio=4., drop_path=.1, patch_window=None, stem='patch', csm=True, ski_roles='code', scales='learned', pairing='broadcast', prompt_index='position', mask_source='fused', clip_pixels='imagenet',
                prompts=('a photo of {}.',), crop=224, resize=256, crop_area=(.08, 1.), augment='rand-m9-mstd0.5-inc1', erase=.25, lr_min=1e-5, warmup_epochs=5, warmup_lr=1e-6, lag=1, weight_decay=.05, betas=(.9, .999), clip=0., optimizer='adamw',
                precision='fp16', repeats=3, cudnn_benchmark=True, accumulate=4, steps=0, w_cls=1., w_csm=1., w_area=1., w_map=1., w_ski=1., eval_split='')
    own = dict(cub=(CUB_OFFICIAL, dict(layout='cub', train_split='trainval', csm_width=8, ocm_blocks=9, ski=True, w_sba=2.4, area=.25, object_map='raw', tau=.2, epochs=110, batch=128, lr=5e-5, ema=0.)),
               ilsvrc=(ILSVRC_OFFICIAL, dict(layout='ilsvrc', train_split='train', csm_width=256, ocm_blocks=10, ski=True, w_sba=.01, area=.1, object_map='minmax', tau=.19, epochs=14, batch=64, lr=2.5e-4, ema=0.)),
               catr=(CATR_CUB_OFFICIAL, dict(layout='cub', train_split='trainval', csm_width=8, ocm_blocks=9, ski=False, w_sba=0., area=.25, tau=.1, epochs=80, batch=128, lr=5e-5, ema=.99996)))
    for cfg, values in own.values(): assert {k: getattr(cfg, k) for k in both | values} == both | values
    assert CDTRConfig() == CUB_OFFICIAL


@pytest.mark.parametrize('cfg, per_epoch, peak, at', [(CUB_OFFICIAL, 11, 4.98e-5, 6), (CATR_CUB_OFFICIAL, 11, 4.96e-5, 6), (ILSVRC_OFFICIAL, 5004, 2.01e-4, 5)], ids=['cub', 'catr', 'ilsvrc'])
def test_official_updates_and_their_rates(cfg, per_epoch, peak, at):
    "Epochs 1 and 2 at 1e-6, a line, then a cosine that the warm-up does not shift, one epoch late; the last epoch lies just above the floor."
    order = Order(IMAGES[cfg.layout], cfg.batch, cfg.accumulate, repeats=cfg.repeats); assert order.per_epoch == per_epoch
    run, E = replace(cfg, steps=cfg.epochs * per_epoch), cfg.epochs; rate = lambda epoch, within=0: cfg.lr * rate_factor(run, epoch * per_epoch + within)
    cosine = lambda t: 1e-5 + (cfg.lr - 1e-5) * (1 + math.cos(math.pi * t / E)) / 2
    assert rate(0) == rate(1) == pytest.approx(1e-6) and rate(5) == pytest.approx(1e-6 + 4 / 5 * (cfg.lr - 1e-6)) and rate(6) == pytest.approx(cosine(5))
    rates = [rate(e) for e in range(E)]; top = max(range(E), key=lambda e: rates[e])
    assert top == at and rates[top] == pytest.approx(peak, rel=5e-3) and rates[-1] == pytest.approx(cosine(E - 2)) and 1e-5 < rates[-1] < rates[-2]
    assert rate(3) == rate(3, per_epoch - 1) != rate(4) and (cfg is not CUB_OFFICIAL or np.mean(rates) == pytest.approx(2.9e-5, rel=.01))


def test_one_epoch_of_repeated_draws_shows_a_third_of_the_images_and_the_next_another_third():
    order = Order(5994, 128, 4, repeats=3); first, second = ({i for _, i, _ in order.epoch(e)} for e in (0, 1))
    assert len(first) == len(second) == 1998 and len(first & second) < 900
    assert Counter(Counter(i for _, i, _ in order.epoch(0)).values()) == {3: 1998}


def unexplained(cfg, official):
    "Fields of a recipe that differ from the official one without a reason, and reasons without a difference; some hold for CUB alone, and say so."
    return {f.name for f in fields(cfg) if getattr(cfg, f.name) != getattr(official, f.name)} ^ {k for k, reason in CHANGES.items() if cfg.layout == 'cub' or not reason.startswith('CUB alone')}


def test_our_recipes_differ_in_the_named_changes_alone():
    assert unexplained(CUB, CUB_OFFICIAL) == unexplained(ILSVRC, ILSVRC_OFFICIAL) == set() and unexplained(replace(CUB, tau=.3), CUB_OFFICIAL) == {'tau'}
    assert all(len(reason) > 10 for reason in CHANGES.values()) and {k for k, reason in CHANGES.items() if 'CUB alone' in reason} == {'train_split', 'eval_split'} and (CUB.train_split, CUB.eval_split) == ('train', 'val')


@pytest.mark.parametrize('name', PRESETS)
def test_every_preset_is_valid_and_known_by_its_name(name):
    cfg = PRESETS[name]; check_config(cfg, 'cuda')
    assert preset_name(replace(cfg, seed=3, workers=2)) == name and preset_name(replace(cfg, tau=.77)) == 'custom' and cli.presets(cli.method('cdtr'))[name] is cfg
    class Known: name, layout, classes, splits, split = cfg.layout, 'cub', ['a'] * 200, {cfg.train_split: ['x'], 'val': ['y'], 'test': ['z']}, lambda name, fields: SimpleNamespace(name=name, source=SimpleNamespace(fields=('image', 'label', 'boxes')))
    cdtr_recipe.check_recipe(cfg, Known)


@pytest.mark.parametrize('changes, terms', [({}, 'cls csm area map ski sba'), (dict(ski=False, w_sba=0.), 'cls csm area map'), (dict(csm=False, ski=False, ocm_blocks=0, w_area=0., w_sba=0.), 'cls'), (dict(w_ski=0.), 'cls csm area map sba')], ids=str)
def test_terms_follow_from_the_modules_and_their_weights(changes, terms):
    "Names of `weights`, of the losses, and the learned scales: all but CLIP's."
    cfg = replace(CDTR_TINY, **changes); model = cdtr_recipe.new_model(cfg, embedded('wsol', train=0, val=0, test=1).classes).train()
    batch = dict(image=torch.randn(2, 3, 64, 64), label=torch.eye(8)[:2])
    assert list(cdtr.weights(cfg, 0)) == list(cdtr.losses(model, batch, 0, cfg)) == terms.split() and len(model.scale) == len([t for t in terms.split() if t != 'sba'])
    assert hasattr(model, 'text') == bool(cfg.w_sba) and (not cfg.w_sba or torch.allclose(model.text.norm(dim=1), torch.ones(8)))


# --- runs ----------------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A finished run on drawn images, all checkpoints kept, and its data."
    out, before = tmp_path_factory.mktemp('cdtr')/'run', torch.get_num_threads(); torch.set_num_threads(1)
    module, cfg, data = prepare('cdtr', dict(keep_last=9, accumulate=2, steps=6)); module.train(cfg, data, out); torch.set_num_threads(before)
    (out/'classes.json').write_text(json.dumps(list(data.classes)))
    return out, cfg, data


@pytest.mark.parametrize('steps', [2, 4])
def test_resumed_equals_uninterrupted(run, tmp_path, steps):
    "Cut back to a checkpoint in the middle of an epoch: weights, log and thresholds are the same bit for bit, with workers too."
    out, cfg, data = run; cut = Path(shutil.copytree(out, tmp_path/'cut')); (cut/'result.json').unlink(); (cut/'taus.json').unlink()
    for folder in disk.checkpoints(cut):
        if int(folder.name.split('_')[1]) > steps: shutil.rmtree(folder)
    torch.rand(3); cdtr.guide.cache_clear() # a new process loads CLIP in the middle of an update, which must not move the generators
    result = cdtr_recipe.train(replace(cfg, workers=0), data, cut, resume=True)
    same(out, cut); assert (cut/'taus.json').read_bytes() == (out/'taus.json').read_bytes() and result['finished']


def test_workers_do_not_matter(run, tmp_path):
    "RandAugment and erasing draw from the key of the image, not from the generators of the process."
    module, cfg, data = prepare('cdtr', dict(keep_last=9, accumulate=2, steps=6, workers=2)); module.train(cfg, data, tmp_path/'b'); same(run[0], tmp_path/'b')


def test_a_run_that_was_killed_before_its_thresholds_were_chosen_chooses_them_on_resume(run, tmp_path):
    out, cfg, data = run; cut = Path(shutil.copytree(out, tmp_path/'cut')); (cut/'taus.json').unlink()
    cdtr_recipe.train(cfg, data, cut, resume=True); assert (cut/'taus.json').read_bytes() == (out/'taus.json').read_bytes()


def test_two_processes_equal_accumulation(tmp_path):
    "Two processes of micro-batch 2 against two passes of 2: every term, as each is computed on a micro-batch; statistics of batch normalisation are those of the first process."
    changes = dict(w_sba=.5, eval_split='', steps=3, workers=0, drop_path=0., checkpoint_every=0)
    whole(tmp_path/'one', 'cdtr', accumulate=2, **changes)
    codes, texts = two_processes(tmp_path/'two', 'cdtr', accumulate=1, **changes); assert codes == [0, 0], texts
    a, b = ([l['terms'] for l in log(tmp_path/x) if 'terms' in l] for x in ('one', 'two')); assert len(a) == 3 and all(x == pytest.approx(y, rel=1e-4, abs=1e-6) for x, y in zip(a, b))
    one, two = final(tmp_path/'one'), final(tmp_path/'two'); assert one.keys() == two.keys()
    assert max((one[k] - two[k]).abs().max().item() for k in one if 'running' not in k and 'tracked' not in k) < 1e-5
    assert any((one[k] - two[k]).abs().max() > 1e-6 for k in one if 'running' in k) and not any('Warning' in t for t in texts), texts


def test_the_area_loss_is_a_sum_over_the_images_of_a_pass(tmp_path):
    "One pass of 4 against two passes of 2, without batch normalisation: the token loss is a mean and agrees, the area loss is twice as large."
    changes = dict(csm=False, ski=False, ocm_blocks=0, w_sba=0., eval_split='', steps=1, drop_path=0., augment='', erase=0., checkpoint_every=0)
    for name, more in dict(a=dict(batch=4, accumulate=1), b=dict(batch=2, accumulate=2)).items(): whole(tmp_path/name, 'cdtr', **changes, **more)
    a, b = (log(tmp_path/x)[0]['terms'] for x in 'ab'); assert a['cls'] == pytest.approx(b['cls'], rel=1e-5) and a['area'] == pytest.approx(2 * b['area'], rel=1e-4)


def test_bf16(tmp_path):
    "Every term and weight is finite; the deformed map is computed in float32."
    whole(tmp_path/'a', 'cdtr', precision='bf16', steps=3, eval_split='', checkpoint_every=0); lines = [l for l in log(tmp_path/'a') if 'terms' in l]
    assert len(lines) == 3 and all(math.isfinite(v) for l in lines for v in (*l['terms'].values(), l['total'], l['gradient_norm'])) and all(v.isfinite().all() for v in final(tmp_path/'a').values())
    model = cdtr.CDTR(CDTR_TINY, 8).train()
    with torch.autocast('cpu', torch.bfloat16): maps = model(torch.randn(2, 3, 64, 64))
    assert maps.deformed.dtype == torch.float32 and maps.tokens.dtype == torch.bfloat16


@pytest.mark.parametrize('ema', [0., .9])
def test_one_step_is_saved_and_loaded_with_and_without_averaged_weights(tmp_path, ema):
    "The released code asked a missing average for its weights, after the last epoch."
    whole(tmp_path/'a', 'cdtr', ema=ema, steps=1, w_sba=0., eval_split=''); folder = disk.checkpoint(tmp_path/'a'); assert (folder/'ema.safetensors').exists() == bool(ema)
    model, cfg = cdtr_recipe.load_run(tmp_path/'a', 8); state = load_file(folder/('ema.safetensors' if ema else 'model.safetensors'))
    assert not model.training and cfg.ema == ema and model.taus == {} and all(torch.equal(v, state[k]) for k, v in model.state_dict().items() if k in state)


POISON = dict( # Term -> (poisoned weight or buffer, changes that keep it from other terms)
    cls=('head.weight', dict(w_ski=0., w_sba=0.)), csm=('csm.classify.weight', dict(w_ski=0., w_sba=0.)), area=('vit.blocks.0.attn.qkv.weight', dict(w_cls=0., w_csm=0., w_map=0., w_ski=0., w_sba=0.)),
    map=('ocm.join.1.weight', {}), ski=('ski.deform.weight', {}), sba=('text', {}), total=('scale', {}))


@pytest.mark.parametrize('term', POISON)
@pytest.mark.parametrize('value', [float('nan'), float('inf')], ids=['nan', 'inf'])
def test_each_term_is_named_and_replayed(tmp_path, capsys, monkeypatch, term, value):
    "Exit 3 with the term and the images; `wsl-nb replay` ends in the same term."
    name, changes = POISON[term]; made, cfg, out = cdtr_recipe.new_model, replace(BARE, **(dict(w_sba=.5, steps=2) | changes)), tmp_path/'run'
    def _planted(*args):
        model = made(*args)
        with torch.no_grad(): model.state_dict()[name].view(-1)[:None if name == 'text' else 1] = value # all prompts, a single weight
        return model
    monkeypatch.setattr(cdtr_recipe, 'new_model', _planted)
    code, text = fails(capsys, *command(tmp_path, cfg, out, method='cdtr')); assert code == 3 and f'"{term}"' in text and 'step 0' in text and str(out/'nonfinite') in text, text
    stopped_and_replayed(capsys, out, term, 0)


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -float('inf')], ids=str)
def test_offsets_that_are_not_finite_give_a_map_that_is_not(value):
    "torchvision's convolution would read outside its memory; nothing of it reaches the other images, and finite offsets are as before."
    ski = cdtr.SemanticKernel(4); guide, read = torch.randn(2, 4, 5, 6), torch.randn(2, 4, 5, 6); before = ski(guide, read)
    from torchvision.ops import deform_conv2d
    assert torch.equal(before, deform_conv2d(read, ski.offsets(guide), ski.deform.weight, padding=1))
    guide[1, 2, 3, 4] = value
    with torch.no_grad(): ski.offset.weight.fill_(.1)
    found = ski(guide, read); assert found[0].isfinite().all() and not found[1, :, 3, 4].isfinite().any()


def test_boxes_are_not_opened_in_training(farm, tmp_path): # noqa: F811
    "The lists of boxes are deleted: the run gives what it gave with them."
    outs = {}
    for name in ('whole', 'blind'):
        root = Path(shutil.copytree(farm[1]('wsol'), tmp_path/name)); lists = sorted(root.rglob('localization.txt')); assert len(lists) == 3
        for file in lists if name == 'blind' else (): file.unlink()
        outs[name] = tmp_path/f'{name}_run'; cdtr_recipe.train(replace(BARE, layout='wsol', steps=3), open_set(root, 'wsol'), outs[name])
    same(outs['whole'], outs['blind'])


# --- what is refused -----------------------------------------------------------------------------------------------

REFUSED = [
    (dict(train_split='test'), 'train_split "test"', '--train_split'), (dict(eval_split='test'), 'eval_split "test"', '--eval_split'), (dict(train_split='dev'), 'train_split "dev"', '--train_split'),
    (dict(train_split='val'), '4 images in val and in val', 'eval_split ""'), (dict(csm=False), 'ski without csm', '--no_ski'), (dict(ocm_blocks=4), 'ocm_blocks 4 of 3', '--ocm_blocks'), (dict(area=1.), 'area 1.0', '--area'), (dict(tau=1.), 'tau 1.0', '--tau'),
    (dict(crop=8), 'crop 8', '--crop'), (dict(prompt_index='position', batch=9), 'batch 9', '--prompt_index label'), (dict(epochs=2, steps=0, schedule='cosine', lr=9e-6), 'lr 9e-06 under its floor', '--lr'), (dict(epochs=2, steps=0), 'schedule onecycle with 2 epochs', '--schedule cosine'), (dict(data_preset='wsss'), 'exactly one class', 'wsol'),
    (dict(clip_model='ViT-B-32-quickgelu'), 'no weights for CLIP', 'clip_vit_b32'), (dict(clip_model='ViT-none', clip_file=__file__), 'ViT-none', 'name'), (dict(clip_dim=32), 'width 64', '--clip_dim 64'), (dict(init='nowhere.pth'), 'nowhere.pth', '')]


@pytest.mark.parametrize('changes, got, cure', REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else '')
def test_recipes_that_cannot_work_are_refused_before_anything_is_written(tmp_path, changes, got, cure):
    _, cfg, data = prepare('cdtr', {k: v for k, v in changes.items() if k != 'crop'}); cfg = replace(cfg, **changes)
    with pytest.raises(BadInput) as e: cdtr_recipe.train(cfg, data, tmp_path/'run')
    assert got in e.value.got and cure in e.value.cure and not (tmp_path/'run').exists()


def test_images_of_several_classes_are_refused_on_disk_too(tmp_path):
    "A table of labels, two of them for every other picture."
    root = tmp_path/'own'; root.mkdir()
    for i in range(6): Image.fromarray(np.full((40, 40, 3), 40 * i, np.uint8)).save(root/f'{i}.png')
    (root/'labels.csv').write_text('file,labels,split\n' + ''.join(f'{i}.png,{"cat" if i % 2 else "dog;cat"},train\n' for i in range(6)))
    with pytest.raises(BadInput, match='of own train, which does not show exactly one class'): cdtr_recipe.train(replace(BARE, layout='folder'), open_set(root, 'folder'), tmp_path/'run')
    assert not (tmp_path/'run').exists()


@pytest.mark.parametrize('layout', ['wsol', 'cub', 'ilsvrc', 'folder'])
def test_thresholds_need_boxes_and_clip_needs_names(farm, tmp_path, capsys, layout): # noqa: F811
    "An eval_split without boxes and classes that are numbers of WordNet are refused before anything is written; a folder learns without scores and says so."
    root = Path(shutil.copytree(farm[1](layout), tmp_path/'data')); has = open_set(root, layout); cfg = replace(BARE, layout=layout, steps=1, epochs=0, train_split='train', eval_split='val')
    if layout == 'folder':
        capsys.readouterr(); cdtr_recipe.train(replace(cfg, train_split='trainval'), has, tmp_path/'run'); text = capsys.readouterr().out
        assert 'train_split: "train" in place of "trainval"' in text and 'eval_split: "" in place of "val" (a folder has no boxes' in text and disk.read_config(tmp_path/'run'/'config.yaml', CDTRConfig).eval_split == ''
        return
    if cdtr_scores.has_boxes(has.split('val', ('image', 'label'))): cdtr_recipe.check_recipe(cfg, has)
    object.__setattr__(has.source.parts['val'], 'boxes', None)
    with pytest.raises(BadInput, match='eval_split "val", which has no boxes') as e: cdtr_recipe.train(cfg, has, tmp_path/'run')
    assert '--eval_split ""' in e.value.cure and not (tmp_path/'run').exists(); cdtr_recipe.check_recipe(replace(cfg, eval_split=''), has)
    numbers = replace(has, classes=[f'n{k:08d}' for k in range(len(has.classes))]); cdtr_recipe.check_recipe(replace(cfg, eval_split=''), numbers)
    with pytest.raises(BadInput, match='n00000000, n00000001') as e: cdtr_recipe.train(replace(cfg, eval_split='', w_sba=1., prompt_index='label'), numbers, tmp_path/'run')
    assert 'synsets.txt' in e.value.cure and '--w_sba 0' in e.value.cure and not (tmp_path/'run').exists()


def test_files_of_a_run_are_noted_and_another_is_not_gone_on_with(run, tmp_path):
    "Backbone and CLIP by name and SHA-256, those of the package too; other bytes under the same path are refused on resume, a path elsewhere is the same recipe."
    out, cfg, data = run; noted = json.loads((out/'init.json').read_text()); assert noted == dict(clip_file=dict(file='clip_farm.safetensors', sha256=core.file_hash(core.ASSETS/'clip_farm.safetensors')))
    start = tmp_path/'start.safetensors'; save_file(cdtr.CDTR(BARE, 8).state_dict(), start); own = replace(BARE, init=str(start), steps=2); cdtr_recipe.train(own, data, tmp_path/'run')
    assert json.loads((tmp_path/'run'/'init.json').read_text()) == dict(file=start.name, sha256=core.file_hash(start))
    cdtr_recipe.train(own, data, tmp_path/'run', resume=True)
    save_file({k: v + 1 for k, v in cdtr.CDTR(BARE, 8).state_dict().items()}, start); before = sorted(p.name for p in (tmp_path/'run').iterdir())
    with pytest.raises(BadInput, match='not the file that this run began with'): cdtr_recipe.train(own, data, tmp_path/'run', resume=True)
    assert before == sorted(p.name for p in (tmp_path/'run').iterdir())
    other = Path(shutil.copytree(out, tmp_path/'other')); (other/'init.json').write_text(json.dumps(noted | dict(clip_file=noted['clip_file'] | dict(sha256='0' * 64))))
    with pytest.raises(BadInput, match='clip_farm'): cdtr_recipe.train(cfg, data, other, resume=True)
    for folder in ('a', 'b'): (tmp_path/folder).mkdir(); shutil.copy(start, tmp_path/folder/'c.safetensors')
    found = {cdtr_scores.evaluate(cdtr.CDTR(BARE, 8).eval(), data.split('val'), replace(BARE, clip_file=str(tmp_path/f/'c.safetensors')))[0].config_hash for f in 'ab'}; assert len(found) == 1 and preset_name(replace(CUB, clip_file='x.pt')) == 'CUB'


@pytest.mark.parametrize('words, says', [(['--tau', '.3'], 'tau'), (['--ski_roles', 'figure'], 'ski_roles: code -> figure'), (['--pairing', 'broadcast'], 'pairing')])
def test_a_changed_field_is_named_on_resume(run, tmp_path, capsys, words, says):
    code, text = refused(capsys, *command(tmp_path, run[1], run[0], '--resume', *words, method='cdtr')); assert code == 2 and says in text


# --- thresholds ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def biased():
    "A random network that says the same class of every image, and 40 images, five of which show it."
    core.seed_everything(1); data = embedded('wsol', size=64, train=0, val=40, test=40); split = data.split('val', ('label',))
    model = cdtr.CDTR(BARE, 8).eval(); often = Counter(int(s['label'].argmax()) for s in split).most_common(1)[0][0]
    with torch.no_grad(): model.head.bias[often] = 9.
    return model, data


def test_thresholds_are_the_best_of_the_curve(biased):
    "Against one pass in plain code, under every protocol and for every kind of map; some are not at the border."
    model, data = biased; found = cdtr_scores.choose_taus(model, data.split('val'), BARE); assert len(found) == 12
    for view in ('crop', 'squash'):
        split = data.split('val', ('image', 'label', 'boxes'), cdtr_scores.eval_transform(BARE, view)); sums = {}
        for s in split:
            with torch.no_grad(): maps = model(s['image'][None])
            for name, p in PROTOCOLS.items():
                for kind in cdtr_scores.KINDS if p.view == view else ():
                    m = cdtr_scores.score_map(maps, kind)[0]
                    hits = count_hits(maps.tokens.mean((2, 3))[0], m, int(s['label'].argmax()), s['boxes'], tuple(s['image'].shape[-2:]), cdtr_scores.GRID, p)
                    sums[f'{name} {kind}'] = sums.get(f'{name} {kind}', 0) + hits['top1_loc'].astype(int)
        assert all(found[k] == cdtr_scores.GRID[v.argmax()] for k, v in sums.items())
    assert len(set(found.values())) > 2
    with pytest.raises(BadInput, match='"test"'): cdtr_scores.choose_taus(model, data.split('test'), BARE)


def test_the_test_split_is_scored_at_one_threshold_that_was_chosen_elsewhere(run, tmp_path):
    "Those of the run on test, the best on its own split, those of the recipe for another checkpoint or without the file; MaxBoxAcc alone chooses where it is measured, and says so."
    out, cfg, data = run; cut = Path(shutil.copytree(out, tmp_path/'run')); kept = json.loads((cut/'taus.json').read_text())
    assert (kept['split'], kept['images'], len(kept['taus'])) == ('val', 4, 12) and kept['checkpoint'] == disk.checkpoint(cut, 'best').name
    (cut/'taus.json').write_text(json.dumps(kept | dict(taus={k: round(.3 + .01 * i, 2) for i, k in enumerate(kept['taus'])})))
    model, _ = cdtr_recipe.load_run(cut, 8); split = data.split('test')
    for protocol in PROTOCOLS:
        wanted = cdtr_scores.thresholds_for(model, split, cfg, (protocol,), cdtr_scores.KINDS); assert all(list(v) == [model.taus[' '.join(k)]] for k, v in wanted.items())
    rows = [r for own in cdtr_scores.evaluate_protocols(model, split, cfg).values() for r in own]; said = lambda rows, metric: next(r.protocol['threshold'] for r in rows if r.metric == metric)
    assert said(rows, 'fused Top-1 Loc, cdtr') == f'{model.taus["cdtr fused"]:.2f} of the maximum, chosen on val' and 'best of this split' in said(rows, 'CAM MaxBoxAccV2, wsol')
    assert said(cdtr_scores.evaluate_all(model, split, cfg), 'fused Top-1 Loc, cdtr') == 'share of the maximum, chosen on val'
    assert {m for m in (r.metric for r in rows) if 'best of this split' in said(rows, m)} == {f'{k} {m}, wsol' for k in cdtr_scores.KINDS for m in ('MaxBoxAcc', 'MaxBoxAccV2')}
    assert 'best of this split' in said(cdtr_scores.evaluate(model, data.split('val'), cfg), 'fused Top-1 Loc, cdtr')
    for other in (cdtr_recipe.load_run(cut, 8, 2)[0], (cut/'taus.json').unlink() or cdtr_recipe.load_run(cut, 8)[0]):
        assert other.taus == {} and said(cdtr_scores.evaluate(other, split, cfg), 'fused Top-1 Loc, cdtr') == f'{cfg.tau:.2f} of the maximum, of the recipe'


# --- layouts through the command line ------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def chains(farm, tmp_path_factory): # noqa: F811
    "A function from a layout to (folder of data, finished run), trained by the command line."
    made = {}
    def chain(layout):
        if layout not in made:
            folder = tmp_path_factory.mktemp(f'run_{layout}'); split = dict(train_split='trainval') if layout == 'cub' else {}
            assert cli.main(command(folder, replace(BARE, layout=layout, steps=2, **split), folder/'run', '--data', farm[1](layout), method='cdtr')) == 0
            made[layout] = farm[1](layout), folder/'run'
        return made[layout]
    return chain


@pytest.mark.parametrize('layout', ['wsol', 'cub', 'ilsvrc', 'folder'])
def test_the_whole_chain_through_the_command_line(chains, layout, capsys):
    "train, check, eval under all protocols as one table; without boxes classes alone are scored."
    root, out = chains(layout); data = open_set(root, layout); assert json.loads((out/'classes.json').read_text()) == list(data.classes)
    assert cli.main(['data', 'check', layout, str(root)]) == 0; capsys.readouterr()
    assert cli.main(['eval', 'cdtr', '--run', str(out), '--data', str(root), '--protocol', 'all']) == 0; text = capsys.readouterr().out
    file, = out.glob('eval_*_all.json'); found = read_results(file); ledger(found); split = file.name.split('_')[1]
    assert split == ('test' if layout == 'cub' else 'val') and {r.images for r in found} == {len(data.splits[split])}
    assert all(0 <= r.value <= 100 and r.unit == '%' and set(r.protocol) == set(PROTOCOL) and r.protocol['labels'] == 'image-level' for r in found) and {r.preset for r in found} == {'custom, from random weights'}
    boxes = {'Top-1 Loc', 'Top-5 Loc', 'GT-known Loc', 'Loc of predicted class'}
    for name in PROTOCOLS:
        own = {r.metric.removesuffix(f', {name}') for r in found if r.metric.endswith(f', {name}')}
        assert own == {'Cls@1', 'Cls@5'} | ({f'{k} {m}' for k in cdtr_scores.KINDS for m in boxes | ({'MaxBoxAcc', 'MaxBoxAccV2'} if name == 'wsol' else set())} if layout != 'folder' else set())
    lines = [l for l in text.splitlines() if l.startswith('|')]; assert lines[0] == '| metric | cdtr | tscam | wsol |' and len(lines) == 2 + (26 if layout != 'folder' else 2) and all(', cdtr' not in l for l in lines)
    if layout != 'folder': assert lines[2].startswith('| fused Top-1 Loc (%) |') and lines[-1].startswith('| Cls@5 (%) |') and '| fused MaxBoxAccV2 (%) | - | - |' in text


def test_pictures_of_an_evaluation(chains, tmp_path, capsys):
    "One picture an image, rows that add up to the table, curves; a set without boxes is refused."
    root, out = chains('cub'); words = ['eval', 'cdtr', '--run', str(out), '--data', str(root), '--pictures', str(tmp_path/'pictures')]
    assert cli.main([*words, '--protocol', 'tscam', '--out', str(tmp_path/'a.json')]) == 0; data = open_set(root, 'cub'); value = {r.metric: r.value for r in read_results(tmp_path/'a.json')}
    rows = json.loads((tmp_path/'pictures'/'rows.json').read_text()); assert [r['id'] for r in rows] == list(data.splits['test']) and all((tmp_path/'pictures'/f'{i}.png').stat().st_size > 5000 for i in data.splits['test'])
    for key, words_ in cdtr_scores.WORDS.items(): assert value[f'fused {words_}, tscam'] == pytest.approx(100 * np.mean([r[key] for r in rows]))
    assert value['Cls@1, tscam'] == pytest.approx(100 * np.mean([r['cls1'] for r in rows])) and {r['threshold'] for r in rows} == {BARE.tau} and all(r['target_class'] in data.classes for r in rows)
    with np.load(tmp_path/'pictures'/'scores.npz') as f:
        assert f['scores'].shape == (len(rows), 8) and len(rows) == 11 and f['curves'].shape == (4, len(cdtr_scores.GRID)) and str(f['protocol']) == 'tscam'
        assert f['curves'][:, np.abs(f['thresholds'] - BARE.tau).argmin()] == pytest.approx([value[f'fused {w}, tscam'] / 100 for w in cdtr_scores.WORDS.values()])
    root, out = chains('folder'); code, text = refused(capsys, 'eval', 'cdtr', '--run', out, '--data', root, '--pictures', tmp_path/'none'); assert code == 2 and 'no boxes' in text and not (tmp_path/'none').exists()


def test_what_the_numbers_of_a_list_name_is_said_on_the_line(chains, farm, tmp_path, capsys): # noqa: F811
    "A list of half-open boxes is refused as inclusive and read as what it is; layouts of one form refuse the word."
    root = Path(shutil.copytree(farm[1]('wsol'), tmp_path/'half')); out = chains('wsol')[1]
    for file in root.rglob('localization.txt'):
        lines = [l.split(',') for l in file.read_text().split()]; file.write_text(''.join(f'{a},{x0},{y0},{int(x1) + 1},{int(y1) + 1}\n' for a, x0, y0, x1, y1 in lines))
    found = {}
    for name, at, words in (('plain', farm[1]('wsol'), []), ('half', root, ['--boxes', 'half-open'])):
        assert cli.main(['eval', 'cdtr', '--run', str(out), '--data', str(at), *words, '--protocol', 'wsol', '--out', str(tmp_path/f'{name}.json')]) == 0
        found[name] = {r.metric: r.value for r in read_results(tmp_path/f'{name}.json')}
    assert found['plain'] == found['half'] and cli.main(['data', 'check', 'wsol', str(root), '--boxes', 'half-open']) == 0
    code, text = refused(capsys, 'train', 'cdtr', '--preset', 'CUB', '--data', farm[1]('cub'), '--boxes', 'voc', '--out', tmp_path/'x'); assert code == 2 and 'one form' in text
    code, text = refused(capsys, 'data', 'check', 'cub', farm[1]('cub'), '--boxes', 'voc'); assert code == 2 and 'one form' in text


def test_a_full_recipe_says_what_it_needs(farm, tmp_path, capsys): # noqa: F811
    "CUB's own preset without weights: the missing CLIP is an error that names where to look, the missing DeiT a line; nothing is written."
    words = ['train', 'cdtr', '--preset', 'CUB', '--data', farm[1]('cub'), '--out', tmp_path/'run']
    code, text = refused(capsys, *words); assert code == 2 and '--clip_file' in text and 'clip_vit_b32' in text and not (tmp_path/'run').exists()
    code, text = refused(capsys, *words, '--w_sba', '0', '--init', tmp_path/'deit.pth'); assert code == 2 and 'deit.pth' in text and not (tmp_path/'run').exists()
    code, text = refused(capsys, 'ablate', 'cdtr', '--preset', 'CUB_OFFICIAL', '--w_sba', '0', '--over', 'area=.1,.2', '--data', farm[1]('cub'), '--out', tmp_path/'ablation'); assert code == 2 and 'of which the recipe learns' in text and '--train_split train' in text and not (tmp_path/'ablation').exists()
    assert cli.main(['train', 'cdtr', '--config', str(command(tmp_path, replace(BARE, layout='cub', train_split='trainval', steps=1), tmp_path/'tiny')[3]), '--data', str(farm[1]('cub')), '--out', str(tmp_path/'tiny')]) == 0
    assert 'deit_s says where' in capsys.readouterr().out


# --- own photographs, weights, costs -------------------------------------------------------------------------------

PHOTOGRAPHS = dict(wide=((70, 300), 'RGB'), tall=((300, 20), 'RGB'), grey=((50, 80), 'L'), alpha=((40, 90), 'RGBA'), palette=((64, 48), 'P'), line=((1, 90), 'RGB'), dot=((1, 1), 'RGB'), large=((1500, 2100), 'RGB'))


def test_boxes_on_photographs_of_every_form(run, tmp_path, capsys):
    "Files of any mode and size: a box of each of the best classes in pixels of the file, in pictures and in boxes.json."
    (tmp_path/'in').mkdir()
    for name, (size, mode) in PHOTOGRAPHS.items(): Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).convert(mode).save(tmp_path/'in'/f'{name}.png')
    assert cli.main(['predict', 'cdtr', '--run', str(run[0]), '--out', str(tmp_path/'out'), str(tmp_path/'in')]) == 0 and 'boxes.json' in capsys.readouterr().out
    rows = json.loads((tmp_path/'out'/'boxes.json').read_text()); assert len(rows) == 4 * len(PHOTOGRAPHS) and {r['file'][:-4] for r in rows} == set(PHOTOGRAPHS) and all(r['class'] in run[2].classes for r in rows)
    for r in rows:
        H, W = r['size']; x0, y0, x1, y1 = r['xyxy']; assert (H, W) == PHOTOGRAPHS[r['file'][:-4]][0] and 0 <= x0 < x1 <= W and 0 <= y0 < y1 <= H
    assert all([r['score'] for r in rows[i:i + 4]] == sorted([r['score'] for r in rows[i:i + 4]], reverse=True) for i in range(0, len(rows), 4))
    assert sorted(p.name for p in (tmp_path/'out').glob('*.png')) == sorted(f'{i:03d}_{n}_{k}.png' for i, n in enumerate(sorted(PHOTOGRAPHS)) for k in ('boxes', 'maps'))
    page = (tmp_path/'out'/'report.html').read_text(); assert 'boxes.json' in page and 'label' not in page.split('</p>')[0].lower() and all(f'{n}.png' in page for n in PHOTOGRAPHS)


def test_the_box_lies_where_the_map_is_high():
    "A network that sees red alone: painted rectangles are found, whatever the proportions."
    class Red(torch.nn.Module):
        def __init__(self): super().__init__(); self.one = torch.nn.Parameter(torch.ones(1))
        def forward(self, image):
            colour = torch.nn.functional.avg_pool2d(core.denormalise(image), 8); red = (colour[:, :1] - colour[:, 1:2]) * self.one
            return cdtr.Maps(torch.ones_like(red[:, 0]), torch.cat([red, -red], 1), torch.zeros_like(red), None, None)
    cfg = replace(BARE, crop=224)
    for H, W in ((200, 300), (900, 200), (1500, 2400)):
        picture = np.full((H, W, 3), 90, np.uint8); box = np.array([.3 * W, .2 * H, .7 * W, .6 * H]).round().astype(int); picture[box[1]:box[3], box[0]:box[2]] = (255, 0, 0)
        found, = cdtr_own.predict(Red().eval(), [picture], cfg); cell = max(H, W) / max(found['maps'][0].shape)
        assert np.abs(found['boxes'][0] - box).max() < cell and found['scores'].argmax() == 0, (found['boxes'][0], box)


def test_predictions_from_weights_alone(run, tmp_path, capsys):
    "A file of ours, with or without the prompts that only training needs; a file of the released code; one of another recipe is refused by its modules."
    out, cfg, data = run; state = load_file(disk.checkpoint(out, 'best')/'model.safetensors'); Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path/'a.png'); save_file({k: v for k, v in state.items() if k != 'text'}, tmp_path/'w.safetensors')
    (tmp_path/'names.txt').write_text('\n'.join(data.classes)); recipe = command(tmp_path, cfg, tmp_path/'x', method='cdtr')[3]; scores = {}
    for name, words in dict(run=['--run', out], weights=['--weights', tmp_path/'w.safetensors', '--config', recipe, '--classes', tmp_path/'names.txt']).items():
        assert cli.main([str(w) for w in ('predict', 'cdtr', *words, '--out', tmp_path/name, tmp_path/'a.png')]) == 0
        scores[name] = {r['class']: r['score'] for r in json.loads((tmp_path/name/'boxes.json').read_text())}
    assert scores['run'] == scores['weights'] and len(scores['run']) == 4
    code, text = refused(capsys, 'predict', 'cdtr', '--weights', tmp_path/'w.safetensors', '--preset', 'LAPTOP_CATR', '--out', tmp_path/'no', tmp_path/'a.png'); assert code == 2 and 'ski, which the model lacks' in text and not (tmp_path/'no').exists()
    model, again = cdtr_recipe.load_run(out, 8)[0], from_weights(cfg, 8, tmp_path/'w.safetensors').eval(); model.taus = {}; assert not again.text.any()
    a, b = (cdtr_own.predict(m, [read_image(tmp_path/'a.png')], cfg)[0] for m in (model, again)); assert (a['scores'] == b['scores']).all() and all((a['boxes'][c] == b['boxes'][c]).all() for c in a['boxes'])
    save_file({k: v.contiguous() for k, v in released(state).items()}, tmp_path/'official.safetensors'); official = from_weights(cfg, 8, tmp_path/'official.safetensors')
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in official.state_dict().items() if k != 'text') and not official.text.any()


def released(state):
    "Our weights under the names of the released code, branch by branch."
    out = {}
    for k, v in state.items():
        if k == 'text': continue
        if k.startswith('ocm.mix.'):
            for l, part in enumerate(v.chunk(2) if v.ndim else (v, v)): out[f'block{l}.{k.removeprefix("ocm.mix.")}'] = part.clone()
            continue
        for ours, theirs in (('vit.', ''), ('csm.down.', 'att_layer.down_1.1.UConv.'), ('csm.up.', 'att_layer.up_1.conv.UConv.'), ('csm.classify.', 'att_cls.'), ('ocm.join.0.', 'block_catconv.'), ('ocm.join.1.', 'block_catbn.'), ('ski.offset.', 'dnc_att_layer.conv_offset.'), ('ski.deform.', 'dnc_att_layer.deform_conv.'), ('scale', 'AutomaticWeightedLoss.params')):
            if k.startswith(ours): k = theirs + k.removeprefix(ours); break
        out[k] = v
    return out


def test_costs_are_measured_and_hours_follow():
    "Seconds of an image and memory; hours from the draws of the recipe; fp16 is timed as fp32 on a CPU."
    cfg = replace(CDTR_TINY, clip_model='farm'); found = cdtr_own.step_cost(replace(cfg, precision='fp16'), batch=2, repeats=1)
    assert (found['preset'], found['batch'], found['crop'], found['phases']) == ('custom', 2, 64, ['all']) and found['seconds'][0] > 0 and found['gigabytes'] > .05 and (found['precision'] == 'fp32' or torch.cuda.is_available())
    for name, draws in (('CUB', 110 * 5400), ('CUB_OFFICIAL', 110 * 5994), ('ILSVRC_OFFICIAL', 14 * 1281167), ('LAPTOP', LAPTOP.steps * LAPTOP.batch)):
        row, = cdtr_own.cost_rows([found | dict(preset=name, seconds=[2.])]); assert row[f'hours for {draws} images (estimate)'] == f'{draws * 2 / 3600:.3g}' and row['recipe'] == name
    with pytest.raises(BadInput, match='open_clip'): cdtr_own.step_cost(replace(cfg, clip_model='ViT-none'), batch=2)
