"The recipes of AffinityNet against the specification, hashes of stages, what is refused, all layouts through the command line, protocols, weights, own photographs."
import json, shutil
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from test_cli import refused
from training_child import AFFINITY_TINY, prepare
from wsl_nb import affinity, affinity_base, affinity_labels, affinity_own, affinity_recipe, affinity_scores, cli
from wsl_nb.affinity_base import CHANGES, LAPTOP, PET, VOC_OFFICIAL, stage_config
from wsl_nb.core import BadInput, read_mask, seed_everything
from wsl_nb.data import embedded
from wsl_nb.formats import open_set
from wsl_nb.formats_write import export
from wsl_nb.metrics import PROTOCOL, ledger, read_results, write_results
from wsl_nb.metrics_binary import BORDERS
from wsl_nb.training_checkpoint import as_plain
from wsl_nb.training_config import lr_factor
from wsl_nb.training_records import begin_stage
from wsl_nb.training_order import Order

STAGES, TRAINED, KINDS = affinity_recipe.STAGES, affinity_base.TRAINED, affinity_scores.KINDS
WHATS = ('mIoU', 'mIoU without background', 'foreground IoU', 'binary mIoU', 'precision', 'recall', 'F1', 'precision, mean over images', 'recall, mean over images', 'F1, mean over images', 'foreground IoU, mean over images')


def as_yaml(folder, **changes):
    "AFFINITY_TINY as a recipe file."
    import yaml
    file = folder/'recipe.yaml'; file.write_text(yaml.safe_dump(as_plain(replace(AFFINITY_TINY, **changes))))
    return file


# --- recipes -------------------------------------------------------------------------------------------------------

def test_official_values():
    "Section 5.1 and 3 of the specification."
    want = dict(classifier_epochs=15, classifier_batch=16, classifier_lr=.1, affinity_epochs=8, affinity_batch=8, affinity_lr=.1, weight_decay=5e-4, momentum='equals_decay', power=.9, schedule='poly', warmup=0, clip=0., ema=0.,
                precision='fp32', optimizer='sgd', head_lr=10., bias_lr=2., crop=448, long_side=(256, 512), jitter=(.3, .3, .3, .1), dropout=.5, scales=(1., .5, 1.5, 2.), alpha=16., alpha_low=4., alpha_high=32., confident_crf=True,
                radius=5, border='partial', beta=8., walk_steps=256, cam_background=.2, crf=False, head=(64, 128, 256, 448), grid=8, bn='frozen', mode='separate', affinity_log='epsilon', train_split='train_aug', layout='voc',
                stages=('classifier', 'labels', 'affinity', 'pseudo'))
    assert {k: getattr(VOC_OFFICIAL, k) for k in want} == want and VOC_OFFICIAL == affinity_base.AffinityNetConfig()
    assert vars(affinity_labels.CRF) == dict(iterations=10, gaussian_sxy=3, gaussian_compat=3, bilateral_sxy=80, bilateral_srgb=13, bilateral_compat=10)
    assert len(affinity.pair_offsets(VOC_OFFICIAL.radius)) == 34


@pytest.mark.parametrize('stage, epoch, steps', [('classifier', 661, 9915), ('affinity', 1322, 10576)])
def test_official_updates_and_their_rates(stage, epoch, steps):
    "10,582 images, the rest of an epoch is left out; lr (1 - t/T)^0.9 without a rise, above zero to the last update."
    own = stage_config(VOC_OFFICIAL, stage); assert Order(10582, own.batch).per_epoch == epoch and own.epochs * epoch == steps
    run = replace(own, steps=steps); rate = lambda t: own.lr * lr_factor(run, t)
    assert rate(0) == .1 and rate(steps // 2) == pytest.approx(.1 * (1 - (steps // 2) / steps) ** .9) and rate(steps - 1) == pytest.approx(.1 * (1 / steps) ** .9) and rate(steps - 1) > 0


@pytest.mark.parametrize('cfg, momentum', [(VOC_OFFICIAL, 5e-4), (PET, .9)])
@pytest.mark.parametrize('stage', TRAINED)
def test_rates_of_the_four_groups(cfg, momentum, stage):
    "Backbone weights 1, their biases 2, new weights 10, new biases 20 times the rate; biases do not decay; what is frozen is in none."
    own = replace(stage_config(cfg, stage), bn='train') # frozen batch normalisation leaves the backbone without a bias
    with torch.device('meta'): model = affinity_recipe.MODELS[stage](own, 20)
    rule = affinity_base.optimizer(model, own); assert {g['momentum'] for g in rule.param_groups} == {momentum} and type(rule) is torch.optim.SGD
    found = {(g['lr'], g['weight_decay']) for g in rule.param_groups}
    want = {(own.lr, cfg.weight_decay), (2 * own.lr, 0.), (10 * own.lr, cfg.weight_decay)} | ({(20 * own.lr, 0.)} if stage == 'segment' else set())
    assert np.allclose(sorted(found), sorted(want)) and len(found) == len(rule.param_groups) == len(want)
    held = {id(p) for g in rule.param_groups for p in g['params']}
    for name, p in model.named_parameters(): assert (id(p) in held) == (not name.startswith(('backbone.conv1', 'backbone.bn1', 'backbone.layer1'))) == p.requires_grad, name
    at = next(g['lr'] for g in rule.param_groups if any(p is next(model.backbone.layer4.parameters()) for p in g['params'])); assert at == own.lr


def unexplained(cfg):
    "Fields of a recipe that differ from the official one without a reason, and reasons without a difference."
    return {f.name for f in fields(cfg) if getattr(cfg, f.name) != getattr(VOC_OFFICIAL, f.name)} ^ set(CHANGES)


def test_our_recipe_differs_in_the_named_changes_alone():
    assert unexplained(PET) == set() and unexplained(replace(PET, beta=7.)) == {'beta'} and unexplained(replace(PET, border='partial')) == {'border'}
    assert all(len(reason) > 10 for reason in CHANGES.values())
    assert (PET.classifier_lr, PET.head_lr * PET.classifier_lr, PET.momentum, PET.weight_decay, PET.classifier_epochs, PET.classifier_batch, PET.long_side, PET.affinity_batch, PET.affinity_epochs, PET.lambda_aff) == (.01, .1, .9, 1e-4, 10, 16, (320, 512), 8, 8, 1.)


@pytest.mark.parametrize('stage', TRAINED)
def test_a_stage_trains_by_its_own_fields_unless_one_is_said_for_all(stage):
    own = stage_config(PET, stage); assert [getattr(own, k) for k in ('epochs', 'batch', 'lr')] == [getattr(PET, f'{stage}_{k}') for k in ('epochs', 'batch', 'lr')] and own.steps == 0
    own = stage_config(replace(PET, steps=7, batch=3, lr=.02), stage); assert (own.steps, own.epochs, own.batch, own.lr) == (7, 0, 3, .02)
    assert stage_config(replace(PET, epochs=2), stage).epochs == 2


# --- hashes of stages ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize('changes, first', [(dict(walk_steps=9), 'pseudo'), (dict(alpha=3.), 'pseudo'), (dict(beta=4.), 'pseudo'), (dict(crf=False), 'pseudo'), (dict(lambda_aff=.5), 'affinity'), (dict(radius=4), 'affinity'),
                                            (dict(affinity_lr=1e-4), 'affinity'), (dict(alpha_low=2.), 'labels'), (dict(confident_crf=False), 'labels'), (dict(scales=(1.,)), 'labels'), (dict(classifier_lr=1e-4), 'classifier'),
                                            (dict(seed=1), 'classifier'), (dict(segment_lr=1e-4), 'segment'), (dict(cam_background=.4, workers=2, log_every=7, keep_last=1, checkpoint_every=9, tags='predicted'), None)], ids=str)
def test_a_field_changes_its_stage_and_those_after_it(changes, first):
    _, cfg, data = prepare('affinity', {})
    a, b = (affinity_recipe.stage_hashes(c, data) for c in (cfg, replace(cfg, **changes)))
    assert list(a) == list(b) == list(STAGES) and len(set(a.values())) == 5
    assert [s for s in STAGES if a[s] != b[s]] == list(STAGES[STAGES.index(first):] if first else ())


def test_other_data_and_another_crf_make_other_stages(monkeypatch):
    _, cfg, data = prepare('affinity', {}); _, _, other = prepare('affinity', dict(data_train=16))
    a, b = (affinity_recipe.stage_hashes(cfg, d) for d in (data, other)); assert not set(a.values()) & set(b.values())
    monkeypatch.setattr(affinity_recipe, 'crf_backend', lambda: 'another'); b = affinity_recipe.stage_hashes(cfg, data)
    assert [s for s in STAGES if a[s] != b[s]] == list(STAGES[1:])
    plain = [affinity_recipe.stage_hashes(replace(cfg, confident_crf=False, crf=False), data)]; monkeypatch.undo()
    assert plain == [affinity_recipe.stage_hashes(replace(cfg, confident_crf=False, crf=False), data)], 'without a CRF its backend does not matter'
    assert list(affinity_recipe.stage_hashes(replace(cfg, stages=STAGES[:2]), data).items()) == list(a.items())[:2]


# --- joint training without the pairs ------------------------------------------------------------------------------

def test_lambda_0_forms_no_pair(tmp_path, monkeypatch):
    "Neither the head nor a function of the pairs is called, and no gradient reaches the head; the classifier's term alone trains."
    def never(*args, **kwargs): raise AssertionError('a pair was formed')
    for name in ('pair_distances', 'pair_labels', 'pair_views', 'affinity_terms'): monkeypatch.setattr(affinity, name, never)
    monkeypatch.setattr(affinity.AffinityHead, 'forward', never)
    module, cfg, data = prepare('affinity', dict(lambda_aff=0., mode='joint', stages=STAGES[:3], eval_split=''))
    module.train(cfg, data, tmp_path/'run')
    lines = [json.loads(l) for l in (tmp_path/'run/affinity/log.jsonl').read_text().splitlines()]
    assert len(lines) == 4 and all(set(l['terms']) == set(l['weights']) == {'cls'} for l in lines)
    with pytest.raises(AssertionError, match='pair'): module.train(replace(cfg, lambda_aff=.1), data, tmp_path/'other')


def test_joint_training_goes_on_from_the_classifier(tmp_path):
    "Both terms, the weight of the pairs in the log; the head of classes starts as stage 1 left it."
    module, cfg, data = prepare('affinity', dict(mode='joint', lambda_aff=.1, stages=STAGES[:3], affinity_init='init')); module.train(cfg, data, tmp_path/'run')
    line = json.loads((tmp_path/'run/affinity/log.jsonl').read_text().splitlines()[0])
    assert set(line['terms']) == {'cls', 'bg', 'fg', 'neg'} and line['weights'] == pytest.approx(dict(cls=1., bg=.025, fg=.025, neg=.05))
    assert line['total'] == pytest.approx(sum(line['weights'][k] * v for k, v in line['terms'].items()), rel=1e-5)
    before = affinity_recipe.load_run(tmp_path/'run', len(data.classes))[0].classifier
    new = affinity_recipe.new_model('affinity', stage_config(cfg, 'affinity'), len(data.classes), before)
    assert torch.equal(new.cam_head.weight, before.cam_head.weight) and all(torch.equal(v, before.backbone.state_dict()[k]) for k, v in new.backbone.state_dict().items())


# --- what is refused -----------------------------------------------------------------------------------------------

REFUSED = [
    (dict(train_split='dev'), 'train_split "dev"', 'train', '--train_split'),
    (dict(eval_split='dev'), 'eval_split "dev"', 'val', '--eval_split'),
    (dict(stages=('labels',)), 'stages labels', 'a beginning of classifier', '--stages'),
    (dict(stages=('classifier', 'affinity')), 'stages classifier affinity', 'a beginning of', 'each stage needs'),
    (dict(stages=()), 'stages', 'a beginning of', '--stages'),
    (dict(stages=('classifier', 'dance')), 'dance', 'a beginning of', '--stages'),
    (dict(lambda_aff=0.), 'lambda_aff 0', 'mode joint', '--mode joint'),
    (dict(radius=9), '16 a side', '17 or more', '--radius'),
    (dict(crop=60), 'crop 60', 'a multiple of 8', '--crop'),
    (dict(grid=2), 'grid 2', 'grid 4 for the backbone small', '--grid'),
    (dict(grid=8, crop=128), 'grid 8', 'grid 4 for the backbone small', '--grid'),
    (dict(backbone='resnet50', crop=148, grid=8), 'crop 148', 'multiple of 8', '--crop'),
    (dict(backbone='resnet50'), 'grid 4', 'grid 8 for the backbone resnet50', '--grid'),
    (dict(segment_head='deeplab', batch=1), 'one image an update', 'two or more', '--batch 2')]


@pytest.mark.parametrize('changes, got, expected, cure', REFUSED, ids=lambda v: str(v) if isinstance(v, dict) else '')
def test_recipes_that_cannot_work_are_refused_before_anything_is_written(tmp_path, changes, got, expected, cure):
    _, cfg, data = prepare('affinity', {}); cfg = replace(cfg, **({'crop': 64} | changes))
    with pytest.raises(BadInput) as e: affinity_recipe.train(cfg, data, tmp_path/'run')
    assert got in e.value.got and expected in e.value.expected and cure in e.value.cure and not (tmp_path/'run').exists()


def test_recipes_that_can_work_are_not_refused():
    _, cfg, data = prepare('affinity', {})
    for changes in ({}, dict(eval_split=''), dict(stages=STAGES[:1]), dict(lambda_aff=0., mode='joint'), dict(backbone='resnet50', grid=8, crop=128), dict(segment_head='deeplab'), dict(segment_head='deeplab', batch=1, stages=STAGES[:4])):
        affinity_recipe.check_recipe(replace(cfg, **changes), data)


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A finished run on drawn images, and its data."
    out = tmp_path_factory.mktemp('affinity')/'run'
    module, cfg, data = prepare('affinity', {}); module.train(cfg, data, out)
    (out/'classes.json').write_text(json.dumps(list(data.classes)))
    return out, cfg, data


@pytest.mark.parametrize('words, says', [(['--walk_steps', '9'], 'walk_steps: 8 -> 9'), (['--lambda_aff', '.5'], 'lambda_aff'), (['--stages', 'classifier'], 'stages'), (['--border', 'partial'], 'border')])
def test_a_changed_field_is_named_on_resume(run, tmp_path, capsys, words, says):
    code, text = refused(capsys, 'train', 'affinity', '--config', as_yaml(tmp_path), '--out', run[0], '--resume', *words)
    assert code == 2 and says in text


@pytest.mark.parametrize('stage, ending', [('labels', '.npz'), ('pseudo', '.png')])
def test_a_missing_label_file_is_named(run, tmp_path, stage, ending):
    "The files of a finished stage are gone when the next one wants them: the message names one; nothing is learnt from less."
    out, cfg, data = Path(shutil.copytree(run[0], tmp_path/'run')), *run[1:]; at = STAGES.index(stage)
    for later in STAGES[at + 1:]: shutil.rmtree(out/later)
    (out/'result.json').unlink()
    for gone in (out/stage/'files').iterdir(): gone.unlink()
    with pytest.raises(BadInput, match=f'wsss_0_train_000..{ending}'): affinity_recipe.train(cfg, data, out, resume=True)
    assert not (out/STAGES[at + 1]/'result.json').exists()


def test_a_stage_of_files_does_not_end_with_a_hole(run, tmp_path, monkeypatch):
    "Images that got no file are counted and named, and the stage is not finished."
    out, cfg, data = tmp_path/'run', run[1], run[2]; old = affinity_labels.crf_many
    monkeypatch.setattr(affinity_labels, 'crf_many', lambda *args, **kwargs: (f for i, f in enumerate(old(*args, **kwargs)) if i != 5))
    with pytest.raises(BadInput, match='1 images without a file.*00005'): affinity_recipe.train(replace(cfg, stages=STAGES[:2]), data, out)
    assert not (out/'labels'/'result.json').exists()
    monkeypatch.undo(); affinity_recipe.train(replace(cfg, stages=STAGES[:2]), data, out, resume=True)
    assert len(list((out/'labels'/'files').iterdir())) == 12


def test_files_of_another_hash_are_not_taken(run, tmp_path):
    out, cfg, data = Path(shutil.copytree(run[0]/'labels', tmp_path/'labels')), *run[1:]; before = {p.name: p.read_bytes() for p in (out/'files').iterdir()}
    (out/'result.json').unlink(); begin_stage(out, json.loads((out/'stage.json').read_text())['stage_hash']); assert {p.name for p in (out/'files').iterdir()} == before.keys()
    begin_stage(out, 'other'); assert not (out/'files').exists() and json.loads((out/'stage.json').read_text()) == dict(stage_hash='other')


def test_a_stage_whose_input_was_made_anew_is_trained_anew(run, tmp_path, monkeypatch):
    "Another CRF, so other labels: a network that had learnt the old ones is not taken for one of the new."
    out, cfg, data = Path(shutil.copytree(run[0], tmp_path/'run')), *run[1:]; (out/'result.json').unlink()
    monkeypatch.setattr(affinity_recipe, 'crf_backend', lambda: 'another'); monkeypatch.setattr(affinity_labels, 'CRF', replace(affinity_labels.CRF, iterations=1, bilateral_srgb=80))
    affinity_recipe.train(cfg, data, out, resume=True)
    logs = [[{k: v for k, v in json.loads(l).items() if k != 'images_per_second'} for l in (r/'affinity'/'log.jsonl').read_text().splitlines()] for r in (run[0], out)]
    assert json.loads((out/'classifier'/'result.json').read_text()) == json.loads((run[0]/'classifier'/'result.json').read_text())
    assert logs[0] != logs[1] and len(logs[1]) == len(logs[0])


def test_a_run_whose_first_stage_has_not_ended_cannot_be_loaded(run, tmp_path):
    out = Path(shutil.copytree(run[0], tmp_path/'run')); (out/'classifier'/'result.json').unlink()
    with pytest.raises(BadInput, match='without a finished classifier'): affinity_recipe.load_run(out, 8)
    (tmp_path/'run/segment/result.json').unlink(); shutil.copy(run[0]/'classifier/result.json', out/'classifier')
    model, _ = affinity_recipe.load_run(out, 8); assert model.segment is None and model.affinity is not None and not model.training
    file = next((out/'affinity'/'checkpoints').rglob('model.safetensors')); file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(BadInput, match='model.safetensors'): affinity_recipe.load_run(out, 8, 'last' if 'step_000004' in str(file) else 2)


# --- all layouts through the command line --------------------------------------------------------------------------

@pytest.fixture(scope='module')
def farm(tmp_path_factory):
    "Drawn images with one object each, and a function that writes them in a layout."
    patch = pytest.MonkeyPatch(); patch.setenv('WSL_NB_CACHE', str(tmp_path_factory.mktemp('cache')))
    data, root, made = embedded('wsol', train=16, val=6, test=5, size=64), tmp_path_factory.mktemp('exports'), {}
    def written(layout):
        if layout not in made: made[layout] = export(data, layout, root/(layout if layout != 'pet' else 'oxford-iiit-pet'))
        return made[layout]
    yield data, written
    patch.undo()


@pytest.fixture(scope='module')
def chains(farm, tmp_path_factory):
    "A function from a layout to (folder of data, finished run), trained by the command line."
    made = {}
    def chain(layout):
        if layout not in made:
            folder = tmp_path_factory.mktemp(f'run_{layout}')
            assert cli.main(['train', 'affinity', '--config', str(as_yaml(folder, layout=layout)), '--data', str(farm[1](layout)), '--out', str(folder/'run')]) == 0
            made[layout] = farm[1](layout), folder/'run'
        return made[layout]
    return chain


@pytest.mark.parametrize('layout', ['pet', 'voc', 'folder'])
def test_the_whole_chain_through_the_command_line(chains, layout, tmp_path, capsys):
    "train, eval under all protocols, predict; without masks only the tags are scored."
    root, out = chains(layout); data = open_set(root, layout); result = json.loads((out/'result.json').read_text())
    assert result['finished'] and list(result['stages']) == list(STAGES) and json.loads((out/'classes.json').read_text()) == list(data.classes)
    for s in ('labels', 'pseudo'): assert len(list((out/s/'files').rglob('*.*'))) == len(data.splits['train'])
    assert cli.main(['eval', 'affinity', '--run', str(out), '--data', str(root), '--protocol', 'all']) == 0
    found = read_results(out/'eval_val_all.json'); ledger(found)
    assert {r.images for r in found} == {len(data.splits['val'])} and {(r.split, r.skipped) for r in found} == {('val', 0)}
    scored = {r.metric for r in found}; tags = {'tags F1', 'top-1 class is present'}
    assert scored == tags | ({f'{k} {w}' for k in KINDS for w in WHATS} if layout != 'folder' else set())
    assert all(0 <= r.value <= 100 and set(r.protocol) == set(PROTOCOL) and r.protocol['labels'] == 'image-level' for r in found)
    assert len(found) == 6 * len(scored) and {(r.protocol['tags'], r.protocol['border']) for r in found if r.metric not in tags} == ({(t, b) for t in ('given', 'predicted', 'none') for b in BORDERS} if layout != 'folder' else set())
    (tmp_path/'in').mkdir()
    for name, size, mode in (('wide', (700, 300), 'RGB'), ('small', (30, 40), 'RGB'), ('grey', (50, 80), 'L'), ('palette', (64, 48), 'P'), ('alpha', (40, 90), 'RGBA')):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).convert(mode).save(tmp_path/'in'/f'{name}.png')
    assert cli.main(['predict', 'affinity', '--run', str(out), '--out', str(tmp_path/'out'), str(tmp_path/'in')]) == 0
    shapes = {p.stem[4:].removesuffix('_labels'): read_mask(p).shape for p in (tmp_path/'out').glob('*_labels.png')}
    assert shapes == dict(wide=(700, 300), small=(30, 40), grey=(50, 80), palette=(64, 48), alpha=(40, 90)) and (tmp_path/'out'/'report.html').exists()


def test_training_opens_no_mask(farm, tmp_path):
    "All trimaps, or all masks, are deleted: the five stages still run, and give what they gave with them."
    outs = {}
    for layout, masks in (('pet', 'annotations/trimaps'), ('voc', 'SegmentationClass')):
        for name in ('whole', 'blind'):
            root = Path(shutil.copytree(farm[1](layout), tmp_path/f'{layout}_{name}'))
            if name == 'blind':
                found = [p for p in root.rglob('*.png') if masks.split('/')[-1] in str(p.parent)]; assert len(found) >= 27
                for p in found: p.unlink()
            outs[name] = tmp_path/f'{layout}_{name}_run'
            affinity_recipe.train(replace(AFFINITY_TINY, layout=layout, eval_split=''), open_set(root, layout), outs[name])
        for p in (p for s in ('labels', 'pseudo') for p in (outs['whole']/s/'files').rglob('*') if p.is_file()): assert p.read_bytes() == (outs['blind']/p.relative_to(outs['whole'])).read_bytes()


# --- protocols -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def pet(chains):
    "A pipeline, its recipe and the validation pets, with an undecided band around each."
    root, out = chains('pet'); data = open_set(root, 'pet'); model, cfg = affinity_recipe.load_run(out, len(data.classes))
    return model, cfg, data.split('val')


def test_border_policies_are_those_of_the_pixels(pet):
    "Against sums over the yielded label maps: the band is left out, is ground, or is the pet."
    model, cfg, split = pet; chosen = affinity_scores.PROTOCOLS
    assert {k: (p.tags, p.border) for k, p in chosen.items()} == {'label_given': ('given', 'ignore'), 'label_given_border_bg': ('given', 'border_bg'), 'label_given_border_fg': ('given', 'border_fg'),
                                                                  'predicted': ('predicted', 'ignore'), 'predicted_border_bg': ('predicted', 'border_bg'), 'predicted_border_fg': ('predicted', 'border_fg')}
    found, kinds, masks = affinity_scores.evaluate_protocols(model, split, cfg, chosen), ('CAM', 'walk + CRF', 'final network'), 0
    maps = {t: list(affinity_scores.label_maps(model, split.view(('image', 'label', 'mask')), cfg, t, kinds)) for t in ('given', 'predicted')}
    for name, p in chosen.items():
        value = {r.metric: r.value for r in found[name]}
        for kind in kinds:
            sums = np.zeros(3); n = len(split.classes) + 1; matrix = np.zeros((n, n))
            for s, _, k, labels in maps[p.tags]:
                if k != kind: continue
                mask = s['mask'].numpy().astype(int); band = mask == 255; assert band.any(); masks += 1
                if p.border != 'ignore': mask = np.where(band, 0 if p.border == 'border_bg' else int(s['label'].argmax()) + 1, mask)
                here = mask != 255; a, b = (labels > 0)[here], (mask > 0)[here]; sums += [(a & b).sum(), (a & ~b).sum(), (~a & b).sum()]
                np.add.at(matrix, (mask[here], labels[here]), 1)
            tp, fp, fn = sums; union = matrix.sum(0) + matrix.sum(1) - np.diag(matrix)
            assert value[f'{kind} foreground IoU'] == pytest.approx(100 * tp / (tp + fp + fn)) and value[f'{kind} precision'] == pytest.approx(100 * tp / max(tp + fp, 1)) and value[f'{kind} recall'] == pytest.approx(100 * tp / (tp + fn))
            iou = np.divide(np.diag(matrix), union, where=union > 0, out=np.full(n, np.nan)) # a class counts where it is in the truth or in a prediction
            assert value[f'{kind} mIoU'] == pytest.approx(100 * np.nanmean(iou), abs=1e-4) and value[f'{kind} mIoU without background'] == pytest.approx(100 * np.nanmean(iou[1:]), abs=1e-4)
    assert masks == 6 * 3 * len(split)
    value = {k: {r.metric: r.value for r in rows} for k, rows in found.items()}
    assert len({value[k]['CAM foreground IoU'] for k in ('label_given', 'label_given_border_bg', 'label_given_border_fg')}) == 3
    assert all(value[k]['tags F1'] == value['label_given']['tags F1'] for k in value), 'tags have no border'


def test_given_and_predicted_classes(pet):
    "Given: the class of the image, whatever the classifier says; predicted on pets: its best one; the final network asks for neither."
    model, cfg, split = pet; view = split.view(('image', 'label', 'mask'))
    other = lambda s, z: {0, int(z.argmax()) + 1}
    for tags, allowed in (('given', lambda s, z: {0, int(s['label'].argmax()) + 1}), ('predicted', other)):
        for s, z, kind, labels in affinity_scores.label_maps(model, view, cfg, tags): assert kind == 'final network' or set(np.unique(labels)) <= allowed(s, z), (tags, kind)
    z = torch.tensor([-2., -1., -3.]); assert affinity_scores.present_classes(z, False) == affinity_scores.present_classes(z, True) == [1]
    z = torch.tensor([1., 3., -1.]); assert affinity_scores.present_classes(z, False) == [0, 1] and affinity_scores.present_classes(z, True) == [1]
    wrong = Wrong(model, split); given, predicted = (affinity_scores.evaluate_protocols(wrong, split, cfg, {k: affinity_scores.PROTOCOLS[k]})[k] for k in ('label_given', 'predicted'))
    value = [{r.metric: r.value for r in rows} for rows in (given, predicted)]
    assert value[0]['CAM mIoU'] > value[1]['CAM mIoU'] and value[0]['final network mIoU'] == value[1]['final network mIoU'] and value[0]['top-1 class is present'] == value[1]['top-1 class is present'] == 0


def Wrong(model, split):
    "The same pipeline with a classifier that sees a class in every image that is in none."
    import copy
    model = copy.deepcopy(model); absent = sorted(set(range(len(split.classes))) - {int(split[i]['label'].argmax()) for i in range(len(split))})[0]; forward = model.classifier.forward
    def _wrong(image): out = forward(image).abs().neg(); out[:, absent] = 1.; return out
    model.classifier.forward = _wrong
    return model


def test_every_image_is_scored_once(pet, monkeypatch):
    "Also with several processes, and with images of several sizes, of which neighbours of equal size go together."
    model, cfg, split = pet; view = split.view(('image', 'label', 'mask'))
    counts = Counter((s['id'], kind) for s, _, kind, _ in affinity_scores.label_maps(model, view, cfg)); assert counts == Counter({(i, k): 1 for i in split.ids for k in KINDS})
    class Sized(list): pass
    mixed = Sized(dict(index=i, image=torch.zeros(3, 8, 8 + 2 * (i // 18))) for i in range(41)); seen = []
    for rank in range(3):
        monkeypatch.setattr(affinity_labels, 'world', lambda: (rank, 3)); groups = list(affinity_labels.equal_sizes(mixed, cfg, 4)); seen += [s['index'] for g in groups for s in g]
        assert all(len({s['image'].shape for s in g}) == 1 for g in groups) and max(map(len, groups)) == 4
        few = list(affinity_labels.equal_sizes(mixed, replace(cfg, scales=(1., 2.), group_pixels=700), 4)); assert [s['index'] for g in few for s in g] == [s['index'] for g in groups for s in g]
        assert {len(g) for g in few if g[0]['image'].shape[-1] < 12} == {2} and {len(g) for g in few if g[0]['image'].shape[-1] == 12} == {1}, 'two images of 8 x 10, but not two of 8 x 12, have at most 700 pixels at twice the size'
    assert sorted(seen) == list(range(41))


def test_records_are_complete_and_survive_the_disk(pet, tmp_path):
    model, cfg, split = pet; rows = affinity_scores.evaluate(model, split, cfg); write_results(tmp_path/'r.json', rows)
    assert ledger(read_results(tmp_path/'r.json')) and [r.metric for r in read_results(tmp_path/'r.json')] == [r.metric for r in rows] and len({r.metric for r in rows}) == len(rows)
    assert not model.training and {(r.preset, r.method, r.images) for r in rows} == {('custom, from random weights', 'affinity', len(split))}
    crf = {r.metric.rsplit(' mIoU')[0]: r.protocol['crf'] for r in rows if r.metric in {f'{k} mIoU' for k in KINDS}}
    assert all(('10 iterations' in v) == ('+ CRF' in k) for k, v in crf.items())
    with pytest.raises(BadInput, match='whole splits'): ledger(affinity_scores.evaluate(model, split.first(2), cfg, ('CAM',)))


@pytest.mark.parametrize('asked, images, split', [(1, 1, 'val[:1]'), (99, 2, 'val'), (0, 2, 'val')])
def test_scores_during_training_take_at_most_the_images_asked_for(tmp_path, asked, images, split):
    module, cfg, data = prepare('affinity', dict(eval_images=asked, stages=STAGES[:3], steps=2)); result = module.train(cfg, data, tmp_path/'run')
    assert {(r['images'], r['split']) for r in result['records']} == {(images, split)}
    first = [json.loads((tmp_path/'run'/s/'result.json').read_text())['records'][0]['metric'] for s in ('classifier', 'affinity')]; assert first == ['tags F1', 'walk mIoU']


# --- weights -------------------------------------------------------------------------------------------------------

def released(*left_out, **more):
    "Names and head shapes of a released file: a few of its ResNet-38, and the four layers of its head."
    state = {'conv1a.weight': torch.zeros(64, 3, 3, 3), 'b2.conv_branch2a.weight': torch.zeros(2), 'b2_1.bn_branch2a.running_mean': torch.zeros(2), 'b7.conv_branch1.weight': torch.zeros(2), 'bn7.weight': torch.zeros(2),
             'f8_3.weight': torch.randn(64, 512, 1, 1), 'f8_4.weight': torch.randn(128, 1024, 1, 1), 'f8_5.weight': torch.randn(256, 4096, 1, 1), 'f9.weight': torch.randn(448, 448, 1, 1)}
    return {k: v for k, v in (state | more).items() if k not in left_out}


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_the_released_head_is_read_and_its_backbone_is_named(tmp_path, capsys, prefix):
    seed_everything('released'); state = released(); torch.save({prefix + k: v for k, v in state.items()}, tmp_path/'res38_aff.pth')
    found = affinity_own.from_official(tmp_path/'res38_aff.pth'); assert '5 weights of a ResNet-38' in capsys.readouterr().out
    head = affinity.AffinityHead((512, 1024, 4096)); head.load_state_dict(found); assert all(torch.equal(v, state[k]) for k, v in head.state_dict().items())
    levels = [torch.randn(1, c, 6, 6) for c in (512, 1024, 4096)]; e = [F.elu(F.conv2d(x, state[f'f8_{i}.weight'])) for x, i in zip(levels, (3, 4, 5))]
    assert torch.allclose(head(levels), F.elu(F.conv2d(torch.cat(e, 1), state['f9.weight'])), rtol=1e-4, atol=1e-4)


OTHER = dict( # Kind of file -> (its content, what the message names)
    vgg=(released(**{'gn8_3.weight': torch.zeros(64)}), 'VGG variant'), unknown=(released(**{'fc8.weight': torch.zeros(20, 4096, 1, 1)}), 'fc8'),
    missing=(released('f9.weight'), r"missing \['f9.weight'\]"), resnet=({'layer1.0.conv1.weight': torch.zeros(1)}, 'layer1'))


@pytest.mark.parametrize('kind', OTHER)
def test_other_official_files_are_refused_by_name(kind):
    state, says = OTHER[kind]
    with pytest.raises(BadInput, match=says): affinity_own.from_official(state)


def test_a_pipeline_is_read_from_one_file(run, tmp_path):
    "The state dict of `load_run`: the same answers; parts that are not there are None; surplus, missing and misshaped names are refused."
    from safetensors.torch import save_file
    out, cfg, data = run; model, _ = affinity_recipe.load_run(out, 8); state = {k: v.contiguous() for k, v in model.state_dict().items()}; file = tmp_path/'pipeline.safetensors'; save_file(state, file)
    again = affinity_own.from_weights(cfg, 8, file); picture = affinity_labels.pixels(data.split('val')[0]['image'])
    for a, b in zip(*(affinity_own.predict(m, [picture], cfg) for m in (model, again))): assert (a['scores'] == b['scores']).all() and (a['labels'] == b['labels']).all() and (a['decoder'] == b['decoder']).all()
    assert not again.training
    save_file({k: v for k, v in state.items() if k.startswith('classifier.')}, file); part = affinity_own.from_weights(cfg, 8, file); assert part.affinity is None and part.segment is None
    faults = ((lambda s: s.pop('affinity.aff_head.f9.weight'), 'f9.weight'), (lambda s: s.update({'stranger.weight': torch.zeros(1)}), 'stranger'), (lambda s: s.update({'classifier.cam_head.weight': torch.zeros(9, 64, 1, 1)}), 'cam_head'))
    for change, says in faults:
        spoilt = dict(state); change(spoilt); save_file(spoilt, file)
        with pytest.raises(BadInput, match=says): affinity_own.from_weights(cfg, 8, file)
    save_file({k: v for k, v in state.items() if not k.startswith('classifier.')}, file)
    with pytest.raises(BadInput, match='no classifier'): affinity_own.from_weights(cfg, 8, file)


def test_imagenet_weights_are_taken_strictly(tmp_path):
    "A torchvision ResNet-50 with its last layer: every tensor of the backbone is taken, in both dilations; a missing, surplus or misshaped name is refused."
    from torchvision.models import resnet50
    seed_everything('imagenet'); state = resnet50(weights=None).state_dict(); file = tmp_path/'resnet50.pth'; torch.save(state, file)
    own = stage_config(replace(PET, init=str(file)), 'affinity'); model = affinity_recipe.new_model('affinity', own, 37)
    have = model.backbone.state_dict(); assert have.keys() == {k for k in state if not k.startswith('fc.')} and all(torch.equal(v, state[k]) for k, v in have.items())
    assert sum(p.numel() for p in model.backbone.parameters()) == 23508032
    for change, says in ((lambda s: s.pop('layer3.2.conv2.weight'), 'layer3.2.conv2.weight'), (lambda s: s.update({'layer5.0.conv1.weight': torch.zeros(1)}), 'layer5'), (lambda s: s.update({'conv1.weight': torch.zeros(64, 1, 7, 7)}), 'conv1.weight')):
        spoilt = dict(state); change(spoilt); torch.save(spoilt, file)
        with pytest.raises(BadInput, match=says): affinity_recipe.from_imagenet(model, file)


def test_later_stages_start_where_the_recipe_says(run):
    "From `init`, here random, or from the trained classifier; new layers are new in any case."
    out, cfg, data = run; start = affinity_recipe.load_run(out, 8)[0].classifier; known = start.backbone.state_dict()
    for stage in ('affinity', 'segment'):
        for init in ('init', 'classifier'):
            model = affinity_recipe.new_model(stage, replace(cfg, **{f'{stage}_init': init}), 8, start)
            assert all(torch.equal(v, known[k]) for k, v in model.backbone.state_dict().items()) == (init == 'classifier')


# --- own photographs and costs -------------------------------------------------------------------------------------

@pytest.mark.parametrize('changes', [{}, dict(view='long_side', long_side=(48, 96)), dict(crf=False)], ids=str)
@pytest.mark.parametrize('size', [(700, 300), (30, 40), (16, 16), (64, 64), (5, 400)], ids=str)
def test_predictions_have_the_size_of_the_photograph(run, changes, size):
    "Scores, maps in [0,1) of the best classes, both label maps with the size and the classes of what was asked."
    model, cfg = affinity_recipe.load_run(run[0], 8); cfg = replace(cfg, **changes)
    picture = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8); found, = affinity_own.predict(model, [picture], cfg)
    best = sorted(range(8), key=lambda c: -found['scores'][c]); assert set(found) == {'scores', 'maps', 'labels', 'decoder'} and list(found['maps']) == best[:4]
    assert all(m.shape == size and 0 <= m.min() and m.max() <= 1 for m in found['maps'].values()) and found['labels'].shape == found['decoder'].shape == size and found['labels'].dtype == np.uint8
    present = [c + 1 for c in best if found['scores'][c] > 0] or [best[0] + 1]; assert set(np.unique(found['labels'])) <= {0, *present} and found['decoder'].max() <= 8


def test_predictions_without_later_stages(run):
    "Without AffinityNet the labels are those of CAM and CRF; without a final network there is no decoder."
    model, cfg = affinity_recipe.load_run(run[0], 8); part = affinity_scores.Pipeline(classifier=model.classifier).eval(); picture = affinity_labels.pixels(run[2].split('val')[0]['image'])
    found, = affinity_own.predict(part, [picture], cfg); assert set(found) == {'scores', 'maps', 'labels'} and found['labels'].shape == picture.shape[:2]


def test_pictures_of_one_channel_are_three_equal_ones(pet, chains, tmp_path):
    "A grey file in the set: read as RGB, trained on and scored like any other."
    root = Path(shutil.copytree(chains('pet')[0], tmp_path/'oxford-iiit-pet')); data = open_set(root, 'pet'); name = data.splits['val'][0]; file = root/'images'/f'{name}.jpg'
    with Image.open(file) as im: grey = im.convert('L')
    grey.save(file, quality=95); s = open_set(root, 'pet').split('val')[0]; assert s['id'] == name and s['image'].shape[0] == 3 and (s['image'][0] == s['image'][1]).all()
    assert affinity_scores.evaluate(pet[0], open_set(root, 'pet').split('val'), pet[1], ('CAM',))[0].images == len(data.splits['val'])


def test_costs_are_measured_in_each_stage_that_trains():
    "Seconds of an image in each stage, memory, and the hours of the whole recipe from them."
    found = affinity_own.step_cost(replace(LAPTOP, seed=3), batch=2, repeats=1)
    assert (found['preset'], found['batch'], found['crop'], found['phases']) == ('LAPTOP', 2, LAPTOP.crop, list(TRAINED)) and len(found['seconds']) == 3 and min(found['seconds']) > 0 and found['gigabytes'] > .05
    row, = affinity_own.cost_rows([found | dict(seconds=[1., 2., 4.])]); hours = LAPTOP.data_train * (LAPTOP.classifier_epochs + 2 * LAPTOP.affinity_epochs + 4 * LAPTOP.segment_epochs) / 3600
    assert row['recipe'] == 'LAPTOP' and row[f'hours for {LAPTOP.data_train} images (estimate)'] == f'{hours:.3g}' and row['seconds an image: classifier / affinity / segment (measured)'] == '1 / 2 / 4'
    row, = affinity_own.cost_rows([dict(found, preset='VOC_OFFICIAL', phases=list(TRAINED[:2]), seconds=[1., 1.])]); assert row['hours for 10582 images (estimate)'] == f'{10582 * 23 / 3600:.3g}'
    assert affinity_own.step_cost(replace(LAPTOP, stages=STAGES[:1]), batch=2, repeats=1)['phases'] == ['classifier']
