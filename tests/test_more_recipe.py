"The real-data recipes against the specification, published numbers, weights at full size, protocols, and sets without masks."
import json
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from training_child import MORE_TINY
from wsl_nb import more, more_base, more_numbers, more_protocols, more_recipe, more_weights
from wsl_nb.core import BadInput, normalise, seed_everything
from wsl_nb.crf import CRF_PARAMS
from wsl_nb.data import embedded
from wsl_nb.metrics import ledger
from wsl_nb.more_base import CHANGES, COCO, COCO_OFFICIAL, VOC, VOC_OFFICIAL
from wsl_nb.training_config import lr_factor

SUMS = dict(pseudo=[1057.2, 1456.9], segmentation=[1350.6, 1351.1, 720.7], ablation=[401.9, 385.8, 329.5], confusion=[516.15, 532.93, 598.85], cost=[4504.0, 99.9], log=[669.0, 645.4, 621.1, 656.3, 605.5, 8.853], losses=[1.047, 11.738, 8.373, 1.543, 88.51, 4.129, 9.859])
OFFICIAL = dict(VOC=VOC_OFFICIAL, COCO=COCO_OFFICIAL)


# --- recipes -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('name, last', [('VOC', 20000), ('COCO', 80000)])
def test_official_rates_first_peak_and_last(name, last):
    "t < 1500: lr0 (1 - (1 - t/1500)(1 - 1e-6)); then lr0 (1 - t/last)^0.9, which does not restart: a small drop at 1500."
    cfg = OFFICIAL[name]; rate = lambda t: cfg.lr * lr_factor(cfg, t)
    assert cfg.steps == last and cfg.lr == 6e-5 and cfg.head_lr == 10
    assert rate(0) == pytest.approx(6e-11) and rate(1499) == pytest.approx(5.996e-5, rel=1e-5)
    assert rate(1500) == pytest.approx(6e-5 * (1 - 1500 / last) ** .9) and rate(1500) < rate(1499) == max(map(rate, range(last)))
    assert rate(last - 1) == pytest.approx(6e-5 * (1 / last) ** .9) and rate(last - 1) > 0
    if name == 'VOC': assert rate(1500) == pytest.approx(5.593e-5, rel=1e-4)


def test_official_rates_of_the_groups():
    with torch.device('meta'): model = more.MoRe(replace(VOC_OFFICIAL, depth=1, aux_block=-1), 20)
    groups = {g['name']: g for g in more.groups(model, VOC_OFFICIAL)}
    assert groups['encoder']['lr'] == 6e-5 and groups['heads']['lr'] == pytest.approx(6e-4) and {g['weight_decay'] for g in groups.values()} == {.01}
    heads = {n for n, p in model.named_parameters() if any(p is q for q in groups['heads']['params'])}
    assert heads == {n for n, _ in model.named_parameters() if n.startswith(('classifier', 'aux_classifier', 'graph_layer', 'decoder'))}


@pytest.mark.parametrize('name, want', [
    ('VOC', dict(batch=4, warmup=1500, power=.9, optimizer='adamw', betas=(.9, .999), switch=10000, cre_early=(.25, .5), ure_early=(.25, .7), late=(.35, .6), affinity=(.25, .7), refine=(.25, .7), background=.5, cre_tau=.5,
                 scales=(1., .5, .75, 1.5), crop=448, crop_mode='resized', crop_area=(.32, 1.), jitter=.5, evaluate_every=2000, clip=0., ema=0., precision='fp32')),
    ('COCO', dict(batch=2, warmup=1500, power=.9, optimizer='adamw', betas=(.9, .999), switch=50000, cre_early=(.25, .5), ure_early=(.25, .65), late=(.35, .6), affinity=(.25, .65), refine=(.25, .65), background=.45, cre_tau=.1,
                  scales=(1., .5, .75, 1.25, 1.5), crop=448, crop_mode='padded', crop_area=(.32, 1.), jitter=.8, clip=0., ema=0., precision='fp32'))])
def test_official_values(name, want):
    assert {k: getattr(OFFICIAL[name], k) for k in want} == want


@pytest.mark.parametrize('name, starts', [('VOC', dict(cls=(0, 1), aux=(0, 1), mct=(0, 1), ptc=(0, .3), cre=(0, .2), ure=(0, .1), seg=(2001, .12), reg=(2001, .05))),
                                          ('COCO', dict(cls=(0, 1), aux=(0, 1), mct=(0, 1), ptc=(8001, .3), cre=(12001, .1), ure=(12001, .01), seg=(16001, .12), reg=(16001, .05)))])
def test_official_losses_start_and_weigh(name, starts):
    for term, (first, weight) in starts.items():
        assert more_base.weights(OFFICIAL[name], first)[term] == weight and more_base.weights(OFFICIAL[name], 10 ** 6)[term] == weight
        if first: assert term not in more_base.weights(OFFICIAL[name], first - 1)


@pytest.mark.parametrize('ours, official', [(VOC, VOC_OFFICIAL), (COCO, COCO_OFFICIAL)])
def test_our_recipes_differ_in_the_named_changes_alone(ours, official):
    assert {f.name for f in fields(ours) if getattr(ours, f.name) != getattr(official, f.name)} == set(CHANGES)
    assert all(len(reason) > 40 for reason in CHANGES.values()) and VOC_OFFICIAL == more_base.MoReConfig()


def test_padding_gets_no_label():
    "A padded view: with 'ignored' the decoder's label and the pairs leave the border out, and no uncertain patch is taken there."
    cfg = replace(MORE_TINY, ptc_from=0, lir_from=0, seg_from=0, decoder_map='cam')
    seed_everything('padding'); model = more.MoRe(cfg, 5)
    whole = normalise(torch.rand(2, 3, 64, 64)); image = whole.clone(); image[..., 32:] = 0
    data = dict(image=image, label=torch.eye(5)[:2], index=torch.arange(2))
    a, b = (more.losses(model, data, 9, replace(cfg, padding=p)) for p in ('image', 'ignored'))
    assert {k for k in a if a[k] != b[k]} >= {'ptc', 'seg'} and all(v.isfinite() for v in b.values())
    a, b = (more.losses(model, dict(data, image=whole), 9, replace(cfg, padding=p)) for p in ('image', 'ignored'))
    assert all(a[k] == b[k] for k in a), 'without padding nothing changes'
    uncertain = torch.full((2, 20, 20), 255, dtype=torch.uint8); uncertain[:, 6:14, 4:9] = 1
    bordered = more_base.mark_padding(uncertain, F.pad(torch.ones(2, 3, 160, 80), (0, 80)), 0)
    everywhere, inside = (more.uncertain_candidates(m)[0].nonzero()[:, 2] + 3 for m in (uncertain, bordered))
    assert everywhere.max() >= 10 and inside.numel() and inside.max() < 10, 'no uncertain patch is taken in the border'


# --- published numbers and costs -----------------------------------------------------------------------------------

def test_published_numbers_are_records_with_a_source_and_never_ours():
    tables = [more_numbers.PSEUDO_LABELS, more_numbers.SEGMENTATION, more_numbers.ABLATION, more_numbers.CONFUSION, more_numbers.COST, more_numbers.COCO_LOG, more_numbers.HEADLINE, *more_numbers.LOG_SCORES.values()]
    for r in ledger([r for t in tables for r in t]):
        assert r.kind in ('paper', 'official log', 'earlier report') and r.source or r.kind == 'not run' and r.value.startswith('wsl-nb')
    said = {(r.split, r.kind): r.value for r in more_numbers.HEADLINE if r.metric == 'headline mIoU'}
    assert said['val', 'paper'] == said['val', 'earlier report'] == 76.4 and said['test', 'paper'] == 75.


def test_published_tables_have_the_sums_of_the_specification():
    "Sums of columns, added up from the text of the specification: a slip of one digit shows."
    total = lambda records, **where: round(sum(r.value for r in records if all(getattr(r, k) == v for k, v in where.items())), 3)
    N = more_numbers
    assert [total(N.PSEUDO_LABELS, metric=m) for m in ('pseudo label mIoU', 'pseudo label mIoU after CRF')] == SUMS['pseudo']
    assert [total(N.SEGMENTATION, dataset=d, split=s) for d, s in (('VOC 2012', 'val'), ('VOC 2012', 'test'), ('COCO 2014', 'val'))] == SUMS['segmentation']
    assert [total(N.ABLATION, metric=m) for m in ('precision', 'recall', 'mIoU')] == SUMS['ablation']
    assert [total(N.CONFUSION, method=m) for m in ('ToCo', 'DuPL', 'MoRe')] == SUMS['confusion'] and [total(N.COST, unit=u) for u in ('minutes', 'GB')] == SUMS['cost']
    assert [total([r for rows in N.LOG_SCORES.values() for r in rows], metric=m) for m in dict.fromkeys(r.metric for r in N.LOG_SCORES[2000])] == SUMS['log']
    assert [round(sum(r[k] for r in N.LOG_LOSSES), 3) for k in ('cls', 'aux', 'mct', 'ptc', 'cre', 'ure', 'seg')] == SUMS['losses']


def test_the_committed_costs_are_of_this_schedule(root):
    rows = json.loads((root/'results/more/cost/result.json').read_text())['rows']
    assert {r['preset'] for r in rows} == {'VOC', 'COCO'}
    for r in rows:
        assert [tuple(p) for p in r['phases']] == more_numbers.phases(more_base.PRESETS[r['preset']]) and r['crop'] == 448 and all(s > 1 for s in r['seconds'])


# --- weights -------------------------------------------------------------------------------------------------------

def official_file(cfg, classes):
    "Names and shapes of a released checkpoint at full size; zeros that take no memory."
    with torch.device('meta'): model = more.MoRe(cfg, classes)
    shapes = {k: v.shape for k, v in model.state_dict().items()}
    shapes |= {'encoder.head.weight': (cfg.registers + classes, cfg.dim), 'encoder.head.bias': (cfg.registers + classes,), 'graph_layer._fc1.0.weight': (cfg.dim, cfg.dim), 'graph_layer._fc1.0.bias': (cfg.dim,)}
    return {k: torch.zeros(1).expand(s) for k, s in shapes.items()}, model


@pytest.mark.parametrize('cfg, classes, tensors, parameters', [(VOC_OFFICIAL, 20, 169, 94746648), (COCO_OFFICIAL, 80, 169, 95007828)])
@pytest.mark.parametrize('form', ['module.', 'dictionary'])
def test_official_checkpoints_load_strictly_at_full_size(cfg, classes, tensors, parameters, form):
    state, model = official_file(cfg, classes)
    assert len(state) == tensors and sum(v.numel() for v in state.values()) == parameters
    given = {f'module.{k}': v for k, v in state.items()} if form == 'module.' else dict(step=1, model_state_dict={f'module.{k}': v for k, v in state.items()}, optimizer_state_dict=dict(state={}, param_groups=[]), lr=0.)
    assert {k: v.shape for k, v in more_weights.from_official(given).items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize('change, says', [(lambda s: s.pop('decoder.conv8.weight'), 'decoder.conv8.weight'), (lambda s: s.update({'decoder.extra': torch.zeros(1)}), 'decoder.extra'),
                                          (lambda s: s.update({'classifier.weight': torch.zeros(21, 768, 1, 1)}), 'classifier.weight'), (lambda s: s.update({'graph_layer.gate_U.weight': torch.zeros(1)}), 'gate_U')])
def test_an_official_file_that_does_not_fit_is_refused_by_name(change, says):
    state, _ = official_file(replace(VOC_OFFICIAL, depth=3), 20); change(state)
    with torch.device('meta'): model = more.MoRe(replace(VOC_OFFICIAL, depth=3), 20)
    with pytest.raises(BadInput, match=says): more_weights.start_from(model, state)


def test_a_pretrained_vit_b_16_fits_at_full_size():
    "timm's vit_base_patch16_224: 14 x 14 patches, one class token; every encoder weight is taken, heads stay."
    with torch.device('meta'): vit = VisionTransformer(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, num_classes=1000)
    state = {k: torch.zeros(1).expand(v.shape) for k, v in vit.state_dict().items()}
    with torch.device('meta'): model = more.MoRe(VOC_OFFICIAL, 20)
    new = more_weights.vit_encoder(state, model.encoder)
    assert {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in model.state_dict().items() if k.startswith('encoder.')}
    with pytest.raises(BadInput, match='blocks.12'): more_weights.start_from(model, state | {'blocks.12.norm1.weight': torch.zeros(768)})


# --- protocols -----------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def tiny():
    "An untrained model and a few images."
    seed_everything('protocols')
    return more.MoRe(replace(MORE_TINY, crop=64), 8).eval(), embedded('wsss', train=4, val=3, test=0, size=64).split('val')


def test_every_switch_changes_the_labels_and_processes_do_not(tiny):
    model, split = tiny; cfg = replace(MORE_TINY, crop=64)
    grid = more_protocols.every_switch((1., .75, 1.5))
    found = {}
    for name, best, mask, tags, label in more_protocols.label_maps(model, split, cfg, grid):
        assert best.shape == mask.shape and best.dtype == torch.uint8
        assert set(best.unique().tolist()) - {0} <= {int(i) + 1 for i in (tags if grid[name].map != 'decoder' else torch.ones(8)).nonzero().flatten()}
        found.setdefault(name, []).append(best)
    assert {len(v) for v in found.values()} == {3} and len({torch.stack(v).numpy().tobytes() for v in found.values()}) > 10
    again = {}
    for name, best, *_ in more_protocols.label_maps(model, split, cfg, grid, processes=2): again.setdefault(name, []).append(best)
    assert all(torch.equal(torch.stack(found[k]), torch.stack(again[k])) for k in grid)


def test_protocols_are_those_of_the_specification():
    "Section 6: squares of 1, 1.25, 1.5; seven scales; five patches, four in the test script; CRF of ten iterations."
    P, seven = more_protocols.PROTOCOLS, (1., .5, .75, 1.25, 1.5, 1.75, 2.)
    assert {k: (p.map, p.tags, p.scales, p.crf, p.tag_patches) for k, p in P.items()} == dict(decoder=('decoder', 'none', (1., 1.25, 1.5), True, 5), pseudo_lam=('lam', 'true', seven, True, 5),
        pseudo_cam=('cam', 'true', seven, True, 5), cam2seg=('lam', 'classifier', seven, True, 5), cam2seg_cam=('cam', 'classifier', seven, True, 5), cam2seg_test=('lam', 'decoder', seven, True, 4))
    assert vars(CRF_PARAMS) == dict(iterations=10, gaussian_sxy=1, gaussian_compat=3, bilateral_sxy=67, bilateral_srgb=3, bilateral_compat=4)


def test_decoder_scales_are_joined_by_the_maximum_of_mirror_sums():
    class Told:
        "Says for each side what its decoder gives: one value a class, another for the mirror."
        def __init__(self): self.classifier = torch.nn.Conv2d(2, 2, 1, bias=False)
        def __call__(self, pair):
            told = {8: ([1., 5., 0.], [2., 0., 0.]), 12: ([0., 0., 9.], [0., 3., 1.])}[pair.shape[-1]]
            seg = torch.tensor(told)[:, :, None, None].expand(-1, -1, 2, 2)
            return more.Outputs(torch.zeros(2, 2), None, torch.zeros(2, 2, 2, 2), None, None, torch.zeros(2, 2, 2), seg)
    views = more_protocols.Views(Told(), torch.zeros(1, 3, 8, 8))
    assert torch.allclose(views.decoder((1., 1.5), (5, 7)), torch.tensor([3., 5., 10.])[:, None, None].expand(-1, 5, 7)), 'max(1+2, 0+0), max(5+0, 0+3), max(0+0, 9+1)'


def test_protocol_scores_are_those_of_the_labels(tiny):
    "Against sums over the yielded label maps."
    model, split = tiny; cfg = replace(MORE_TINY, crop=64); chosen = {k: more_protocols.every_switch()[k] for k in ('lam, 1 scale, classifier tags, no CRF', 'decoder, 1 scale, none tags, no CRF')}
    hit, union, f1 = {}, {}, {}
    for name, best, mask, tags, label in more_protocols.label_maps(model, split, cfg, chosen):
        for c in range(9):
            a, b = best == c, mask == c
            hit[name, c] = hit.get((name, c), 0) + (a & b).sum().item(); union[name, c] = union.get((name, c), 0) + (a | b)[mask != 255].sum().item()
        f1[name] = f1.get(name, 0) + 2 * (tags * label).sum().item() / (tags.sum() + label.sum()).item() / len(split)
    present = {int(c) for i in range(len(split)) for c in split[i]['mask'].unique()} - {255}
    for name, rows in more_protocols.evaluate_protocols(model, split, cfg, chosen, say=None).items():
        value = {r.metric.split(',')[0]: r.value for r in rows}
        assert value['mIoU'] == pytest.approx(100 * np.mean([hit[name, c] / union[name, c] for c in present]))
        if 'tags' in name and 'none' not in name: assert value['tags F1'] == pytest.approx(f1[name])


def test_protocols_need_masks(tiny):
    model, split = tiny; blind = split.first(0); blind.source = type('Blind', (), dict(fields=('image', 'label')))()
    with pytest.raises(BadInput, match='leave --protocol out'): more_protocols.evaluate_protocols(model, blind, replace(MORE_TINY, crop=64))


def test_protocol_records_say_how_they_were_made(tiny):
    model, split = tiny
    found = more_protocols.evaluate_protocols(model, split.first(2), replace(MORE_TINY, crop=64), say=None)
    assert list(found) == ['decoder', 'pseudo_lam', 'pseudo_cam', 'cam2seg', 'cam2seg_cam', 'cam2seg_test']
    for name, rows in found.items():
        p = rows[0].protocol
        assert p['tags'] == 'true' if name.startswith('pseudo') else p['tags'] != 'true'
        assert '10 iterations' in p['crf'] and p['threshold'] == 'argmax' and rows[0].images == 2 and rows[0].split == 'val[:2]'
    with pytest.raises(BadInput, match='subset|whole splits'): ledger([r for rows in found.values() for r in rows])


def test_a_set_without_masks_gives_tags_alone(tiny):
    model, split = tiny
    class Blind:
        "Reads what a folder of photographs has."
        fields = ('image', 'label')
        def __init__(self, source): self.source = source
        def read(self, *where):
            assert where[2] in self.fields, f'opened {where[2]}'
            return self.source.read(*where)
        def size(self, *where): return self.source.size(*where)
    blind = split.first(0); blind.source = Blind(split.source)
    found = more_recipe.evaluate(model, blind, replace(MORE_TINY, crop=64))
    assert [r.metric for r in found] == ['tags F1'] and 0 <= found[0].value <= 1
    assert found[0].value == next(r.value for r in more_recipe.evaluate(model, split, replace(MORE_TINY, crop=64)) if r.metric == 'tags F1')


@pytest.mark.parametrize('asked, scored, split', [(2, 2, 'val[:2]'), (99, 3, 'val'), (0, 3, 'val')])
def test_scores_during_training_take_at_most_the_images_asked_for(tmp_path, asked, scored, split):
    cfg = replace(MORE_TINY, steps=1, eval_images=asked, evaluate_every=1)
    result = more_recipe.train(cfg, embedded('wsss', size=cfg.crop, train=16, val=3, test=0), tmp_path/'run')
    assert {(r['images'], r['split']) for r in result['records']} == {(scored, split)}


def test_a_run_that_ended_before_its_first_checkpoint_still_starts_from_its_weights(tmp_path):
    "Killed at once, then resumed: the same as never interrupted."
    from safetensors.torch import save_file
    from wsl_nb.training_checkpoint import as_plain, checkpoint, read_part, write_part
    seed_everything('init'); data = embedded('wsss', size=MORE_TINY.crop, train=16, val=2, test=0)
    save_file(more.MoRe(MORE_TINY, 8).state_dict(), tmp_path/'start.safetensors')
    cfg = replace(MORE_TINY, steps=2, init=str(tmp_path/'start.safetensors'), evaluate_every=0, eval_split='')
    more_recipe.train(cfg, data, tmp_path/'straight')
    (tmp_path/'killed').mkdir(); write_part(tmp_path/'killed'/'config.yaml', as_plain(cfg))
    more_recipe.train(cfg, data, tmp_path/'killed', resume=True)
    a, b = (read_part(checkpoint(tmp_path/d)/'model.safetensors') for d in ('straight', 'killed'))
    assert all(torch.equal(v, b[k]) for k, v in a.items()) and json.loads((tmp_path/'killed'/'init.json').read_text())['file'] == 'start.safetensors'
    more_recipe.train(replace(cfg, init=''), data, tmp_path/'noise')
    assert not torch.equal(read_part(checkpoint(tmp_path/'noise')/'model.safetensors')['classifier.weight'], a['classifier.weight'])


def test_a_run_is_not_gone_on_with_from_another_file(tmp_path):
    "Other bytes under the same path are refused on resume, and nothing of the run is touched."
    from safetensors.torch import save_file
    data, start = embedded('wsss', size=MORE_TINY.crop, train=16, val=2, test=0), tmp_path/'start.safetensors'
    save_file(more.MoRe(MORE_TINY, 8).state_dict(), start); cfg = replace(MORE_TINY, steps=1, init=str(start), evaluate_every=0, eval_split='')
    more_recipe.train(cfg, data, tmp_path/'run'); more_recipe.train(cfg, data, tmp_path/'run', resume=True)
    save_file({k: v + 1 for k, v in more.MoRe(MORE_TINY, 8).state_dict().items()}, start); before = {f: f.read_bytes() for f in (tmp_path/'run').rglob('*') if f.is_file()}
    with pytest.raises(BadInput, match='not the file that this run began with'): more_recipe.train(cfg, data, tmp_path/'run', resume=True)
    assert {f: f.read_bytes() for f in (tmp_path/'run').rglob('*') if f.is_file()} == before


def test_stages_that_a_short_run_never_reaches_are_named(capsys):
    data = embedded('wsss', size=96, train=4, val=2, test=0)
    more_recipe.check_recipe(replace(more_base.LAPTOP, steps=350), data); text = capsys.readouterr().out
    assert 'the decoder (--seg_from 400)' in text and '--switch' not in text
    more_recipe.check_recipe(more_base.LAPTOP, data); assert capsys.readouterr().out == ''


def test_an_unknown_validation_split_is_refused_before_training(tmp_path):
    with pytest.raises(BadInput, match='dev'): more_recipe.train(replace(MORE_TINY, eval_split='dev'), embedded('wsss', size=MORE_TINY.crop, train=16, val=3, test=0), tmp_path/'run')
    assert not (tmp_path/'run').exists()
