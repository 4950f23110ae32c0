"Non-finite values that reach one term of a method each, through the command line: exit code 3, the term by name, a folder that replays it. And what `train` refuses."
import json
from dataclasses import replace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from training_child import AFFINITY_TINY, MORE_TINY
from wsl_nb import affinity_recipe, cli, core, data, more, more_recipe
from wsl_nb.training_checkpoint import as_plain

ALL = replace(MORE_TINY, ptc_from=0, lir_from=0, seg_from=0, steps=4, checkpoint_every=1)
OFF = {k: {f'w_{k}': 0.} for k in ('cls', 'aux', 'mct', 'ptc', 'cre', 'ure', 'seg', 'reg')}
CASES = dict( # Term -> (poisoned parameter, terms that it would reach as well and that are switched off)
    cls=('classifier.weight', ()), aux=('aux_classifier.weight', ()), mct=('graph_layer.norm.bias', ('cre', 'ure')),
    ptc=('encoder.norm.weight', ('cls', 'mct', 'cre', 'ure', 'seg', 'reg')), cre=('graph_layer.norm.bias', ('mct', 'ure')),
    ure=('graph_layer.norm.bias', ('mct', 'cre')), seg=('decoder.conv8.weight', ('reg',)), reg=('decoder.conv8.weight', ('seg',)))


def command(folder, cfg, out, *words, method='more'):
    "Words of a training command with this recipe."
    file = folder/f'{out.name}.yaml'; file.write_text(yaml.safe_dump(as_plain(cfg)))
    return ['train', method, '--config', str(file), '--out', str(out), *map(str, words)]


def poisoned(folder, cfg, name, value=float('nan')):
    "A weight file whose parameter `name` holds one bad number."
    core.seed_everything(0)
    state = {k: v.contiguous() for k, v in more.MoRe(cfg, len(data.CLASSES)).state_dict().items()}
    state[name].view(-1)[0] = value
    save_file(state, folder/'poisoned.safetensors')
    return folder/'poisoned.safetensors'


def fails(capsys, *words):
    "Exit code and message, without a traceback."
    code = cli.main([str(w) for w in words]); text = capsys.readouterr().err
    assert 'Traceback' not in text
    return code, text


def stopped_and_replayed(capsys, out, term, step, stage=''):
    "The message named the term, the folder is complete, and replay ends in the same term at the same images."
    folder = out/stage/'nonfinite'; facts = json.loads((folder/'facts.json').read_text())
    assert (facts['term'], facts['step'], len(facts['ids'])) == (term, step, 2) and facts['stage'] == stage and not (out/'result.json').exists()
    assert {p.name for p in folder.iterdir()} == {'config.yaml', 'facts.json', 'model.safetensors', 'batch.pt', 'manifest.json'}
    code, text = fails(capsys, 'replay', out)
    assert code == 3 and f'"{term}"' in text and f'step {step}' in text and all(i in text for i in facts['ids'])


@pytest.mark.parametrize('term', CASES)
@pytest.mark.parametrize('value', [float('nan'), float('inf')], ids=['nan', 'inf'])
def test_poisoned_weights_end_in_their_term(tmp_path, capsys, term, value):
    name, others = CASES[term]
    cfg, out = replace(ALL, **{k: v for o in others for k, v in OFF[o].items()}), tmp_path/'run'
    code, text = fails(capsys, *command(tmp_path, cfg, out, '--init', poisoned(tmp_path, cfg, name, value)))
    assert code == 3 and f'"{term}"' in text and 'step 0' in text and str(out/'nonfinite') in text, text
    stopped_and_replayed(capsys, out, term, 0)


@pytest.mark.parametrize('term', CASES)
def test_only_the_named_term_is_bad(tmp_path, term):
    "The poison of each case reaches no other active term."
    name, others = CASES[term]
    cfg = replace(ALL, **{k: v for o in others for k, v in OFF[o].items()})
    model = more.MoRe(cfg, len(data.CLASSES)); more_recipe.start_from(model, more_recipe.read_weights(poisoned(tmp_path, cfg, name)))
    split = data.embedded('small', size=64, train=4, val=2, test=0).split('train', ('image', 'label'), more_recipe.train_transform(cfg))
    terms = more.losses(model, data.collate([split[0], split[1]]), 0, cfg)
    assert [k for k, v in terms.items() if not v.isfinite()] == [term]


def test_a_term_that_is_not_active_cannot_poison(tmp_path, capsys):
    "A decoder full of NaN does no harm before its first step, and stops the run there."
    cfg, out = replace(ALL, seg_from=2, w_reg=0.), tmp_path/'run'
    code, text = fails(capsys, *command(tmp_path, cfg, out, '--init', poisoned(tmp_path, cfg, 'decoder.conv8.weight')))
    assert code == 3 and '"seg"' in text and 'step 2' in text
    stopped_and_replayed(capsys, out, 'seg', 2)
    assert fails(capsys, 'train', 'more', '--config', out/'config.yaml', '--out', out, '--resume')[0] == 3


@pytest.mark.parametrize('w_reg', [0., .05])
@pytest.mark.parametrize('value', [float('inf'), float('nan')], ids=str)
def test_an_image_that_is_not_finite_is_named(tmp_path, capsys, monkeypatch, value, w_reg):
    "A bad picture among good ones: the message names its batch."
    class Bad:
        def __call__(self, sample, generator):
            sample = old(ALL)(sample, generator)
            if sample['index'] == 5: sample['image'][0, 3, 3] = value
            return sample
    old, out = more_recipe.train_transform, tmp_path/'run'
    monkeypatch.setattr(more_recipe, 'train_transform', lambda cfg: Bad())
    code, text = fails(capsys, *command(tmp_path, replace(ALL, steps=12, w_reg=w_reg), out))
    assert code == 3 and '"cls"' in text, text
    facts = json.loads((out/'nonfinite'/'facts.json').read_text())
    split = data.embedded('small', size=64, train=12, val=2, test=2).split('train')
    assert split.ids[5] in facts['ids'] and split.ids[5] in text
    stopped_and_replayed(capsys, out, 'cls', facts['step'])


def test_two_passes_name_the_bad_one(tmp_path, capsys):
    cfg, out = replace(ALL, accumulate=2, w_cre=0., w_ure=0.), tmp_path/'run'
    assert fails(capsys, *command(tmp_path, cfg, out, '--init', poisoned(tmp_path, cfg, 'graph_layer.norm.bias')))[0] == 3
    stopped_and_replayed(capsys, out, 'mct', 0)


# --- AffinityNet: the stage is named too -----------------------------------------------------------------------------

STAGED = dict( # Term -> (stage, poisoned parameter, changes, labels of two cells beside each other; all others are neutral)
    cls=('classifier', 'cam_head.weight', {}, None), joint=('affinity', 'cam_head.weight', dict(mode='joint'), None), bg=('affinity', 'aff_head.f9.weight', {}, (0, 0)),
    fg=('affinity', 'aff_head.f8_3.weight', {}, (1, 1)), neg=('affinity', 'aff_head.f8_5.weight', {}, (0, 1)), seg=('segment', 'segment.4.weight', {}, None))


class TwoCells:
    "A view of AffinityNet with a single pair of labelled cells."
    def __init__(self, view, labels): self.view, self.labels = view, labels
    def __call__(self, sample, generator):
        sample = self.view(sample, generator); mask = torch.full_like(sample['mask'], 255)
        mask[8, 8], mask[8, 9] = self.labels
        return sample | dict(mask=mask)


@pytest.fixture
def planted(monkeypatch):
    "A function that plants a bad number where a stage starts from, and the labels that its pairs have."
    def plant(stage, name, value, labels):
        model_of, view_of = affinity_recipe.new_model, affinity_recipe.train_transform
        def _model(at, *rest):
            model = model_of(at, *rest)
            if at == stage:
                with torch.no_grad(): dict(model.named_parameters())[name].view(-1)[0] = value
            return model
        monkeypatch.setattr(affinity_recipe, 'new_model', _model)
        if labels: monkeypatch.setattr(affinity_recipe, 'train_transform', lambda cfg, at, out: TwoCells(view_of(cfg, at, out), labels) if at == 'affinity' else view_of(cfg, at, out))
    return plant


@pytest.mark.parametrize('case', STAGED)
@pytest.mark.parametrize('value', [float('nan'), float('inf')], ids=['nan', 'inf'])
def test_each_term_of_affinitynet_is_named_with_its_stage(tmp_path, capsys, planted, case, value):
    "What the stages before it made is kept; without the bad number the run goes on from there."
    stage, name, changes, labels = STAGED[case]; term, out, cfg = 'cls' if case == 'joint' else case, tmp_path/'run', replace(AFFINITY_TINY, **changes)
    planted(stage, name, value, labels)
    code, text = fails(capsys, *command(tmp_path, cfg, out, method='affinity'))
    assert code == 3 and f'"{term}"' in text and 'step 0' in text and str(out/stage/'nonfinite') in text, text
    stopped_and_replayed(capsys, out, term, 0, stage)
    finished = affinity_recipe.STAGES[:affinity_recipe.STAGES.index(stage)]
    assert [s for s in affinity_recipe.STAGES if (out/s/'result.json').exists()] == list(finished)


def test_an_image_that_is_not_finite_is_named_in_the_stage_affinity(tmp_path, capsys, monkeypatch):
    "Its pixels are bad, not the weights: the batch of its stage is named and replayed, and a run without it goes on from the stages that are there."
    class Bad:
        def __init__(self, view): self.view = view
        def __call__(self, sample, generator):
            sample = self.view(sample, generator)
            if sample['index'] == 5: sample['image'][0, 3, 3] = float('nan')
            return sample
    view_of, out = affinity_recipe.train_transform, tmp_path/'run'
    monkeypatch.setattr(affinity_recipe, 'train_transform', lambda cfg, at, run: Bad(view_of(cfg, at, run)) if at == 'affinity' else view_of(cfg, at, run))
    words = command(tmp_path, replace(AFFINITY_TINY, steps=6), out, method='affinity')
    code, text = fails(capsys, *words); facts = json.loads((out/'affinity'/'nonfinite'/'facts.json').read_text())
    assert code == 3 and 'wsss_0_train_00005' in facts['ids'] and 'wsss_0_train_00005' in text and facts['term'] in ('bg', 'fg', 'neg')
    stopped_and_replayed(capsys, out, facts['term'], facts['step'], 'affinity')
    monkeypatch.undo(); assert cli.main([*words, '--resume']) == 0 and 'labels: done' in capsys.readouterr().out


# --- what `train` refuses ------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    "A finished run of one step."
    folder = tmp_path_factory.mktemp('refused')
    assert cli.main(command(folder, replace(MORE_TINY, steps=1), folder/'run')) == 0
    return folder/'run'


def test_a_used_folder_is_refused(run, capsys):
    code, text = fails(capsys, *command(run.parent, replace(MORE_TINY, steps=1), run))
    assert code == 2 and 'config.yaml' in text and 'resume' in text


def test_resume_in_an_empty_folder_is_refused(tmp_path, capsys):
    code, text = fails(capsys, *command(tmp_path, MORE_TINY, tmp_path/'nothing', '--resume'))
    assert code == 2 and 'config.yaml' in text and not (tmp_path/'nothing').exists()


@pytest.mark.parametrize('field, value', [('w_cre', '.7'), ('seed', '3'), ('gate', 'dot'), ('scales', '1')])
def test_a_changed_field_is_named(run, capsys, field, value):
    code, text = fails(capsys, *command(run.parent, replace(MORE_TINY, steps=1), run, '--resume', f'--{field}', value))
    assert code == 2 and field in text


@pytest.mark.parametrize('words, says', [
    (['--precision', 'fp16'], 'fp16'), (['--gate', 'official'], 'official'), (['--patch', 'many'], 'many'), (['--batch', '13'], '12 training images'),
    (['--train_split', 'nothing'], 'nothing'), (['--lr', '5'], 'lr_max'), (['--init', 'nowhere.pth'], 'nowhere.pth'), (['--data_preset', 'nothing'], 'nothing'), (['--crop', '40'], 'patch')])
def test_fields_that_cannot_work_are_refused(tmp_path, capsys, words, says):
    if torch.cuda.is_available() and 'fp16' in words: pytest.skip('fp16 works on a GPU')
    code, text = fails(capsys, *command(tmp_path, ALL, tmp_path/'run', *words))
    assert code == 2 and says in text and not (tmp_path/'run'/'result.json').exists()


def test_weights_of_another_recipe_are_refused(tmp_path, capsys):
    file = poisoned(tmp_path, replace(ALL, dim=24, heads=2), 'classifier.weight')
    code, text = fails(capsys, *command(tmp_path, ALL, tmp_path/'run', '--init', file))
    assert code == 2 and 'do not fit' in text and not (tmp_path/'run').exists()


def test_a_damaged_reproducer_is_refused(tmp_path, capsys):
    cfg, out = replace(ALL, w_reg=0.), tmp_path/'run'
    assert fails(capsys, *command(tmp_path, cfg, out, '--init', poisoned(tmp_path, cfg, 'decoder.conv8.weight')))[0] == 3
    (out/'nonfinite'/'batch.pt').unlink()
    code, text = fails(capsys, 'replay', out)
    assert code == 2 and 'batch.pt' in text
