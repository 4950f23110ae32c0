"CLIP: files of every form load strictly and run nothing, text vectors are never reused wrongly, gradients reach the pixels; its training and the shipped asset."
import json, os, pickle, subprocess, sys, warnings, zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from wsl_nb import core, vit_clip
from wsl_nb.core import BadInput, seed_everything, torch_rng
from wsl_nb.data_farm import CLASSES, VOCABULARY
from wsl_nb.vit import text_features

SMALL = dict(embed_dim=16, vision_cfg=dict(layers=2, width=32, head_width=16, patch_size=16, image_size=64), text_cfg=dict(context_length=77, vocab_size=49408, width=16, heads=2, layers=1))


def random_clip(quick=True, seed=0, cfg=SMALL):
    "open_clip's own class with random weights."
    import open_clip
    seed_everything(seed, 'random clip')
    return open_clip.model.CLIP(cfg['embed_dim'], cfg['vision_cfg'], cfg['text_cfg'], quick_gelu=quick).eval()


@pytest.fixture(scope='module')
def small(): return random_clip()


@pytest.fixture
def written(small, tmp_path):
    "A state dict in float32 on disk."
    torch.save(small.state_dict(), tmp_path / 'w.pt'); return tmp_path / 'w.pt'


def quietly(*args, **named): return vit_clip.load_clip(*args, say=lambda line: None, **named)


def pixels(side=64, n=2): return torch.rand(n, 3, side, side, generator=torch_rng('pixels', side))


# --- files -----------------------------------------------------------------------------------------------------------

class Released(torch.nn.Module):
    "Wraps a model as OpenAI's release does: three notes as buffers, float16 weights."
    def __init__(self, clip):
        super().__init__()
        for name, child in clip.named_children(): setattr(self, name, child)
        for name in ('positional_embedding', 'text_projection', 'logit_scale'): setattr(self, name, getattr(clip, name))
        for name, value in dict(input_resolution=64, context_length=77, vocab_size=49408).items(): self.register_buffer(name, torch.tensor(value))

    def forward(self, image): return self.visual(image) + self.input_resolution * 0


@pytest.fixture
def archive(tmp_path):
    "A TorchScript archive in float16."
    model = Released(random_clip().half()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore'); torch.jit.trace(model, pixels().half(), check_trace=False).save(str(tmp_path / 'ViT-small.pt'))
    return tmp_path / 'ViT-small.pt'


def test_a_torchscript_archive_is_read_without_torchscript(archive, small, monkeypatch):
    monkeypatch.setattr(torch.jit, 'load', None); said = []
    clip = vit_clip.load_clip(SMALL, archive, say=said.append)
    want = {k: v.half().float() for k, v in small.state_dict().items()}
    assert all(torch.equal(v, want[k]) for k, v in clip.state_dict().items()) and len(clip.state_dict()) == len(want)
    assert 'QuickGELU' in said[0] and 'TorchScript' in said[0] and clip.visual.proj.dtype == torch.float32
    rounded = random_clip(); rounded.load_state_dict(want)
    torch.testing.assert_close(clip.encode_image(pixels()), rounded.encode_image(pixels()))


class Evil:
    def __reduce__(self): return os.mkdir, ('harm',)


@pytest.mark.parametrize('form', ['archive', 'pickle', 'nested'])
def test_a_file_with_code_is_refused_and_not_run(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path); file = tmp_path / 'evil.pt'
    if form == 'archive':
        with zipfile.ZipFile(file, 'w') as z: z.writestr('evil/data.pkl', pickle.dumps(Evil(), 2)); z.writestr('evil/constants.pkl', b'')
    else: torch.save(Evil() if form == 'pickle' else dict(state_dict=dict(a=Evil())), file)
    with pytest.raises(BadInput, match='cannot be read safely'): vit_clip.read_clip_file(file)
    assert not Path('harm').exists()


@pytest.mark.parametrize('name, content, words', [('w.pt', b'', 'cannot be read'), ('w.pt', b'PK\x03\x04 torn', 'cannot be read'), ('w.safetensors', b'torn', 'cannot be read'), ('gone.pt', None, 'no file')])
def test_broken_files(name, content, words, tmp_path):
    if content is not None: (tmp_path / name).write_bytes(content)
    with pytest.raises(BadInput, match=words): vit_clip.read_clip_file(tmp_path / name)


def test_a_torn_archive_is_bad_input(archive):
    archive.write_bytes(archive.read_bytes()[:-4000])
    with pytest.raises(BadInput, match='cannot be read'): vit_clip.read_clip_file(archive)


@pytest.mark.parametrize('value', [[1, 2], {}, dict(a=3), torch.ones(2)], ids=str)
def test_a_file_of_something_else_is_refused(value, tmp_path):
    torch.save(value, tmp_path / 'w.pt')
    with pytest.raises(BadInput, match='state dict'): vit_clip.read_clip_file(tmp_path / 'w.pt')


@pytest.mark.parametrize('change, words', [
    (lambda s: s.pop('visual.proj'), r"missing \['visual.proj'\]"), (lambda s: s.update({'visual.extra': torch.ones(1)}), r"surplus \['visual.extra'\]"),
    (lambda s: s.update({'visual.positional_embedding': torch.ones(10, 32)}), r'visual.positional_embedding \(10, 32\) instead of \(17, 32\)')], ids=['missing', 'surplus', 'misshaped'])
def test_every_tensor_is_accounted_for(change, words, small, tmp_path):
    state = small.state_dict(); change(state); torch.save(state, tmp_path / 'w.pt')
    with pytest.raises(BadInput, match=words): quietly(SMALL, tmp_path / 'w.pt')


@pytest.mark.parametrize('name, words', [('ViT-B-33', "ViT-B-32"), ('hf-hub:someone/some-clip', 'hubs are not read'), ('local-dir:w', 'hubs are not read'), ('ViT-B-16-SigLIP', 'custom_text'), ('coca_ViT-B-32', 'multimodal_cfg'), ('roberta-ViT-B-32', 'hf_model_name'),
                                         ('convnext_base', 'timm_model_name')])
def test_models_of_another_kind_are_refused_before_the_file_is_opened(name, words, tmp_path):
    with pytest.raises(BadInput, match=words): quietly(name, tmp_path / 'nothing.pt')


def test_a_configuration_without_its_towers_is_refused(written):
    with pytest.raises(BadInput, match="'text_cfg'"): quietly(dict(embed_dim=16, vision_cfg=SMALL['vision_cfg']), written)


def test_a_name_is_looked_up_in_open_clip_and_decides_the_activation(small, tmp_path, written):
    import open_clip
    for name, extra in (('Small-16', {}), ('Small-16-quickgelu', dict(quick_gelu=True))):
        (tmp_path / f'{name}.json').write_text(json.dumps(SMALL | extra)); open_clip.add_model_config(tmp_path / f'{name}.json')
    plain, quick, slash, asked = quietly('Small-16', written), quietly('Small-16-quickgelu', written), quietly('Small/16', written), quietly('Small-16', written, quick_gelu=True)
    want = small.encode_image(pixels())
    for clip, same in ((quick, True), (asked, True), (plain, False), (slash, False)): assert torch.allclose(clip.encode_image(pixels()), want, atol=1e-6) == same
    assert quick.side == 64 and quick.mean == vit_clip.OPENAI_MEAN and quick.std == vit_clip.OPENAI_STD
    assert not any(p.requires_grad for p in quick.parameters()) and not quick.training


def test_the_notes_in_an_openai_state_dict_tell_its_activation(small, tmp_path):
    "A plain file of a name that says nothing: with OpenAI's three notes it is QuickGELU, without them GELU."
    notes = {k: torch.tensor(v) for k, v in dict(input_resolution=64, context_length=77, vocab_size=49408).items()}; want = small.encode_image(pixels())
    for extra, word, same in ((notes, 'holds input_resolution', True), ({}, 'nothing tells', False)):
        torch.save(small.state_dict() | extra, tmp_path/'w.pt'); said = []; clip = vit_clip.load_clip(SMALL, tmp_path/'w.pt', say=said.append)
        assert word in said[0] and torch.allclose(clip.encode_image(pixels()), want, atol=1e-6) == same
    assert vit_clip.choose_activation('ViT-B-32', 'w.pt', notes, 'state dict')[0] and not vit_clip.choose_activation('ViT-B-32', 'w.pt', {}, 'state dict')[0]


@pytest.mark.slow
def test_the_real_vit_b_32_has_302_tensors(tmp_path):
    import open_clip
    seed_everything('B-32'); model = open_clip.create_model('ViT-B-32', load_weights=False, pretrained_text=False).eval()
    torch.save({k: v.half() for k, v in model.state_dict().items()}, tmp_path / 'RemoteCLIP-ViT-B-32.pt'); said = []
    clip = vit_clip.load_clip('ViT-B/32', tmp_path / 'RemoteCLIP-ViT-B-32.pt', say=said.append)
    assert '302 tensors' in said[0] and 'QuickGELU' in said[0] and sum(p.numel() for p in clip.parameters()) == 151_277_313
    assert text_features(clip, ['cat', 'dog']).shape == (2, 512) and vit_clip.image_features(clip, pixels(224, 1)).shape == (1, 512)


# --- pictures and texts ------------------------------------------------------------------------------------------------

def test_gradients_reach_the_pixels_and_no_weight(small, written):
    clip = quietly(SMALL, written); image = pixels(50, 1).double().float().requires_grad_()
    vit_clip.image_features(clip, image)[0, 0].backward()
    assert all(p.grad is None for p in clip.parameters())
    step = torch.zeros_like(image); step[0, 1, 20, 30] = 1e-2
    with torch.no_grad(): slope = (vit_clip.image_features(clip, image + step) - vit_clip.image_features(clip, image - step))[0, 0] / 2e-2
    assert abs(slope - image.grad[0, 1, 20, 30]) < .05 * abs(slope) + 1e-6


@pytest.mark.parametrize('size', ((190, 230), (64, 200), (40, 50)))
def test_pictures_are_resized_as_pillow_does_it(size):
    "Bicubic and smoothed before it shrinks: without that, fine noise stays as strong as it was."
    class Keeps:
        "A CLIP that hands out the pixels it is given."
        side, positional_embedding = 32, torch.zeros(1)
        def encode_image(self, x): return x.flatten(1)
    image = torch.rand(1, 3, *size, generator=torch_rng('noise', *size)); small = [Image.fromarray(c.numpy()).resize((32, 32), Image.Resampling.BICUBIC) for c in image[0]]
    wanted = torch.stack([torch.from_numpy(np.array(c)) for c in small]).flatten()
    torch.testing.assert_close(vit_clip.image_features(Keeps(), image)[0], wanted / wanted.norm(), atol=1e-4, rtol=0)


def test_another_size_leaves_the_positions_alone(written):
    clip = quietly(SMALL, written); before = clip.visual.positional_embedding.clone()
    for size in ((64, 64), (96, 32), (200, 200), (64, 64)): assert vit_clip.image_features(clip, torch.rand(1, 3, *size)).shape == (1, 16)
    assert torch.equal(clip.visual.positional_embedding, before)


def test_a_long_prompt_is_named_and_not_cut(written):
    clip = quietly(SMALL, written); text = 'a photo of a {} ' + 'very ' * 80
    assert clip.tokenizer([text]).shape == (1, 77) # open_clip cuts
    with pytest.raises(BadInput, match=r'a photo of a dog very .*1 of 2 prompts are too long'): text_features(clip, ['dog'], ['{}', text])
    fits = ' '.join(['dog'] * 75); assert text_features(clip, [fits], ['{}']).shape == (1, 16)
    with pytest.raises(BadInput, match='too long'): text_features(clip, [fits], ['a {}'])


def test_text_vectors_do_not_depend_on_the_batch(written):
    clip = quietly(SMALL, written); names = [f'thing number {i}' for i in range(300)]
    many = text_features(clip, names, ['a {}', 'the {}'])
    torch.testing.assert_close(many[[0, 150, 299]], text_features(clip, [names[0], names[150], names[299]], ['a {}', 'the {}']), atol=1e-6, rtol=0)


def test_a_cache_file_serves_several_lists_and_another_activation_is_another_key(written, tmp_path, monkeypatch):
    file, clip, other = tmp_path / 'deep/text.safetensors', quietly(SMALL, written, quick_gelu=True), quietly(SMALL, written, quick_gelu=False)
    a, b = text_features(clip, ['cat'], cache=file), text_features(clip, ['cat', 'dog'], cache=str(file))
    c = text_features(other, ['cat'], cache=file)
    assert len(load_file(file)) == 3 and not torch.equal(a, c) and torch.allclose(a, b[:1], atol=1e-6)
    monkeypatch.setattr(clip, 'encode_text', None); assert torch.equal(text_features(clip, ['cat'], cache=file), a)
    a.zero_(); memory = {}; monkeypatch.undo()
    text_features(clip, ['cat'], cache=memory).zero_(); assert text_features(clip, ['cat'], cache=memory).norm() > .9 # callers own what they get
    assert [p.name for p in file.parent.iterdir()] == ['text.safetensors']


def test_unknown_words_are_all_listed():
    clip = vit_clip.clip_farm(VOCABULARY)
    with pytest.raises(BadInput, match=r"\['of', 'photo'\]|\['photo'\]"): text_features(clip, list(CLASSES))
    with pytest.raises(BadInput, match=r"\['fluffy', 'zebra'\]"): text_features(clip, ['fluffy zebra'], ['a {}'])


def test_no_network_is_needed(written):
    code = f'''import socket
def refuse(*a, **k): raise OSError("network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from wsl_nb import vit_clip; import json
vit_clip.load_clip(json.loads({json.dumps(SMALL)!r}), {str(written)!r})'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    assert done.returncode == 0 and '(state dict), side 64' in done.stdout, done.stderr


# --- training ----------------------------------------------------------------------------------------------------------

def tiny(**changes):
    "A recipe of seconds."
    from dataclasses import replace
    from wsl_nb.pretrain_clip import CLIP_FARM
    return replace(CLIP_FARM, **(dict(steps=6, batch=5, layers=2, width=16, patch=16, crop=48, data_train=24, data_eval=8, log_every=1, checkpoint_every=2, evaluate_every=3) | changes))


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
    "An uninterrupted run and its data."
    from wsl_nb import pretrain_clip
    out, data = tmp_path_factory.mktemp('clip') / 'run', pretrain_clip.clip_data(tiny())
    return pretrain_clip.train_clip(tiny(), data, out), out, data


def test_resumed_equals_uninterrupted(whole, tmp_path, monkeypatch):
    from wsl_nb import pretrain_clip
    result, out, data = whole; real = pretrain_clip.clip_losses
    def _stops(model, batch, step, cfg):
        if step == 5: raise KeyboardInterrupt
        return real(model, batch, step, cfg)
    monkeypatch.setattr(pretrain_clip, 'clip_losses', _stops)
    with pytest.raises(KeyboardInterrupt): pretrain_clip.train_clip(tiny(), data, tmp_path / 'run')
    monkeypatch.undo(); torch.rand(7) # the global generator stands elsewhere now
    resumed = pretrain_clip.train_clip(tiny(), data, tmp_path / 'run', resume=True)
    assert resumed['weights_hash'] == result['weights_hash'] and [r['value'] for r in resumed['records']] == [r['value'] for r in result['records']]
    with pytest.raises(BadInput, match='patch_dropout'): pretrain_clip.train_clip(tiny(patch_dropout=.2), data, tmp_path / 'run', resume=True)


def test_training_opens_pictures_and_captions_only(monkeypatch, tmp_path):
    from wsl_nb import data, pretrain_clip
    opened, real = set(), data.Farm.read
    monkeypatch.setattr(data.Farm, 'read', lambda self, split, index, field: (opened.add((split, field)), real(self, split, index, field))[1])
    pretrain_clip.train_clip(tiny(steps=2), pretrain_clip.clip_data(tiny()), tmp_path / 'run')
    assert {f for split, f in opened if split == 'train'} == {'image', 'captions'} and {s for s, _ in opened} == {'train', 'val'}


def test_the_shipped_clip_has_seen_the_training_images_of_the_lessons_and_none_of_their_test_images():
    "What the pages say about claims with CLIP: its pictures of one object are those that CDTR's small recipe trains on, not those it is scored on."
    from wsl_nb import pretrain_clip
    from wsl_nb.cdtr_base import LAPTOP
    from wsl_nb.data import embedded_of
    cfg = pretrain_clip.CLIP_FARM; objects, data = pretrain_clip.train_split(cfg, pretrain_clip.clip_data(cfg)).parts[1], embedded_of(LAPTOP)
    assert objects.ids == data.splits['train'] and not {*objects.ids} & {*data.splits['val'], *data.splits['test']} and cfg.crop == LAPTOP.crop
    seen = objects.sample(5, core.rng(0)); assert torch.equal(seen['image'], core.normalise(data.split('train', ('image',))[5]['image'])) and any(data.classes[int(data.split('train', ('label',))[5]['label'].argmax())] in said for said in seen['captions'])


def test_another_seed_is_another_run_and_building_leaves_the_generator_alone(whole, tmp_path):
    from wsl_nb import pretrain_clip
    other = pretrain_clip.train_clip(tiny(seed=1), whole[2], tmp_path / 'run')
    assert other['weights_hash'] != whole[0]['weights_hash']
    before = torch.get_rng_state(); pretrain_clip.build_clip(tiny()); assert torch.equal(torch.get_rng_state(), before)


def test_patches_are_left_out_in_training_only():
    from wsl_nb import pretrain_clip
    model, image = pretrain_clip.build_clip(tiny()), torch.rand(1, 3, 48, 48, generator=torch_rng(0)); seen = []
    hook = model.visual.transformer.register_forward_hook(lambda module, given, out: seen.append(out.shape[1]))
    model.train().encode_image(image); a, b = model.eval().encode_image(image), model.encode_image(image); hook.remove()
    assert seen == [1 + int(9 * (1 - tiny().patch_dropout)), 10, 10] and torch.equal(a, b)


def test_scores_do_not_depend_on_the_batch_and_count_equal_captions(whole):
    from wsl_nb import pretrain_clip
    model, cfg = pretrain_clip.load_clip_run(whole[1]); data = whole[2]
    for other in (tiny(batch=3), tiny(batch=100)):
        assert pretrain_clip.retrieval(model, data['pairs'].split('val'), other) == pretrain_clip.retrieval(model, data['pairs'].split('val'), cfg)
    class Same:
        "Every picture has the same caption."
        fields = ('image', 'captions')
        def read(self, split, index, field): return data['pairs'].source.read(split, index, field) if field == 'image' else ['a red cat on grass']
    split = data['pairs'].split('val'); split.source = Same()
    assert pretrain_clip.retrieval(model, split, cfg) == (1., 1.)


# --- the shipped model -------------------------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def shipped():
    from wsl_nb.pretrain_clip import clip_data, shipped_clip
    clip, cfg, scores, curve = shipped_clip(); return clip, cfg, scores, curve, clip_data(cfg)


def test_the_shipped_clip_scores_what_its_record_says(shipped):
    from wsl_nb.pretrain_clip import CLIP_FARM, evaluate_clip
    clip, cfg, scores, curve, data = shipped
    assert cfg == CLIP_FARM and scores[0].preset == 'CLIP_FARM' and {r.split for r in scores} == {'test'} and {r.images for r in scores} == {cfg.data_eval}
    again = evaluate_clip(clip, data, cfg, 'test', json.loads((core.ASSETS / 'clip_farm.json').read_text())['templates'])
    for old, new in zip(scores, again): assert abs(old.value - new.value) <= .005 and (old.metric, old.weights_hash, old.data_hash) == (new.metric, new.weights_hash, new.data_hash)
    assert all(r.value >= .6 for r in scores), {r.metric: r.value for r in scores}
    assert curve[0]['terms']['contrast'] > 3 > 1 > [c for c in curve if 'terms' in c][-1]['terms']['contrast']


def test_rounding_and_templates_of_the_shipped_clip(shipped):
    from wsl_nb.pretrain_clip import TEMPLATES, zero_shot
    note, (clip, cfg, _, _, data) = json.loads((core.ASSETS / 'clip_farm.json').read_text()), shipped
    assert all(abs(note['zero_shot_val_float32'][k] - note['zero_shot_val'][k]) <= .01 for k in TEMPLATES)
    assert note['templates'] == max(note['zero_shot_val'], key=note['zero_shot_val'].get) and clip.templates == TEMPLATES[note['templates']]
    assert abs(zero_shot(clip, data['objects'].split('val'), cfg, clip.templates) - note['zero_shot_val'][note['templates']]) <= .005
    assert sum(f.stat().st_size for f in core.ASSETS.glob('*.safetensors')) <= 6e6 and note['cpu_seconds'] > 0


def test_the_shipped_clip_knows_object_from_ground(shipped):
    "Cut out, an object is still its class for most pictures; the ground alone is not."
    from wsl_nb.core import normalise
    clip, cfg, _, _, data = shipped; split = data['objects'].split('val', ('image', 'label', 'mask'))
    samples = [split[i] for i in range(100)]; texts = text_features(clip, list(CLASSES), clip.templates)
    image, mask = normalise(torch.stack([s['image'] for s in samples])), torch.stack([s['mask'] > 0 for s in samples])[:, None].float()
    right = lambda x: (vit_clip.similarity(vit_clip.image_features(clip, x), texts).argmax(1) == torch.stack([s['label'] for s in samples]).argmax(1)).float().mean().item()
    assert right(mask * image) > right((1 - mask) * image) + .2
    assert vit_clip.image_features(clip, image.requires_grad_())[:, 0].sum().backward() is None and image.grad.abs().sum() > 0
