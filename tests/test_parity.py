"The parity tool: it passes on the golden vectors, on another directory of the format, and it can fail."
import json, subprocess, sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import parity

GOLDEN = Path(__file__).parent/'golden'
LEAST = dict(more=90, affinity=125, cdtr=890, surgery=120, fsgr=260) # Method -> tensors compared at least
SPOILED = {'more': ['enc.block2.out', 'gcr.gate_prob', 'cam', 'loss.cre_early', 'grad.encoder.norm.weight', 'crf.Q', 'cre.neg_loss', 'label_bkg'],
           'affinity': ['r5_9x13_to', 'seed_os8.layer4_out', 'grad.f8_4.weight', 'norm_cam', 's1.label_map', 's0.fg_pos', 'final.tb1.bias', 'log.neg_cnt', 'p2.8', 'aff_dense_raw', 'pred', 'propagate_beta10_exp8', 'ignore.class38_iou'],
           'surgery': ['block3.new', 'dual0.attn_new', 'maskclip_tokens', 'hi.surgery_tokens', 'ns.similarity_surgery', 'fs_weight', 'map_surgery', 'points.1', 'text_features_raw', 'seedcam_fused', 'pair.giou', 'v2.pos', 'v2.grad_raw', 'v2e.macro_local_0.5', 'seed.boxes', 'seed2.loss_giou', 'v2.eval_top1'],
           'fsgr': ['visual.block1', 'visual.csa_branch', 'visual.global_feat', 'box_embedding_rows', 'relative_weights_rows', 'quant.global_logit', 'quant.text_grids', 'att_embed.out', 'contrast_feats', 'pos.grid_embed', 'encoder.pixel_embed', 'encoder.layer1', 'decoder.layer2', 'logprobs', 'beam.words', 'beam3.logprobs', 'greedy.words', 'grad.encoder.WGs.0.weight', 'grad.backbone.visual.prompt_proj.weight', 'scst.grad.decoder.fc.weight',
                    'ce', 'supcon_labels', 'supcon2', 'grad_norm.decoder.pos_emb.weight', 'count.no_grad_params', 'scst_loss', 'scst_grad_norm_backbone', 'gumbel.assign', 'gumbel.grad_logits', 'gumbel.argmax_of_logits', 'out.encoder', 'out.beam_words', 'out.beam_logprobs', 'out.attn', 'knn.index', 'knn.out_v', 'bleu_sentence', 'rouge_l', 'cider_d_each', 'cider_d_scst'],
           'cdtr/cub': ['cls_attn', 'tokens_after_block11', 'ocm_block8', 'ski_offset', 'L.loss_area', 'object_map_224_stride8', 'dnc_att_layer.conv_offset.weight', 'block3.0.weight', 'param.blocks.3.attn.qkv.bias', 'buffer.block_catbn.running_var', 'boxes'],
           'cdtr/components': ['csm.out_train', 'ski.map', 'loss_imnet.grad.pre_map', 'norm.out', 'box.boxes_nonsq', 'gtbox.xyxy', 'sampler.R4.rank3.epoch1', 'lr.seed_run', 'eval.metrics_thr_top1loc_top5loc_gtloc_acc1_acc5', 'maxbox.multi.correct_iou50_per_threshold', 'pxap.value']} # Method, or one of its sets -> tensors
BATCHED = ('image', 'label', 'enc.*', 'out.*', 'gcr.*', 'cam*', 'lam*', 'denorm', 'label_*', 'mask_*', 'aff_mask', 'refined_pseudo_label')


def counts(capsys, source, *folder):
    "(exit code, compared, failed, not covered, the whole text)."
    method = source.split('/')[0]
    capsys.readouterr(); code = parity.main(method, *folder); text = capsys.readouterr().out
    last = text.splitlines()[-1].removeprefix(f'{method}: ').split(', ')
    return code, *(int(x.split()[0]) for x in last), text


def changed_number(stem, name, value, change):
    "A number, or a list of them, after `change`."
    return change(stem, name, torch.tensor(value, dtype=torch.float64)).tolist()


def changed_values(values, change):
    "Numbers of a config after `change`: losses, lengths of gradients, and how many names a list has."
    norms = {k: changed_number('values', f'grad_norm.{k}', v, change) for k, v in values['grad_norms'].items()}
    names = {k: (v * 2)[:int(change('values', f'count.{k}', torch.tensor(len(v))))] for k, v in values.items() if isinstance(v, list)}
    return {k: changed_number('values', k, v, change) for k, v in values.items() if isinstance(v, float)} | names | dict(grad_norms=norms)


def copy(source, to, change=lambda stem, name, tensor: tensor, **config):
    "A golden directory of a method, or one of its sets, whose tensors went through `change`; None drops one."
    to.mkdir(parents=True)
    for file in (GOLDEN/source).glob('*.safetensors'):
        kept = {k: change(file.stem, k, v) for k, v in load_file(file).items()}
        if any(v is not None for v in kept.values()): save_file({k: v.contiguous() for k, v in kept.items() if v is not None}, to/file.name)
    stored = json.loads((GOLDEN/source/'config.json').read_text())
    if 'values' in stored: stored['values'] = changed_values(stored['values'], change)
    if (GOLDEN/source/'metrics.json').exists():
        metrics = json.loads((GOLDEN/source/'metrics.json').read_text()); metrics['scores'] = {k: changed_number('metrics', k, v, change) for k, v in metrics['scores'].items()}; (to/'metrics.json').write_text(json.dumps(metrics))
    (to/'config.json').write_text(json.dumps(stored | config))
    return to


def first_of_more(stem, name, tensor):
    "What the official code says about the first image alone: all that it computes image by image; the energy's 1/B doubles."
    if stem == 'weights' or name.startswith(('par.', 'crf.')): return tensor
    if stem == 'probes' or name.endswith(('_pos1', '_tokens1')): return None
    if name == 'energy.grad_lattice_area_half': return 2 * tensor[:1]
    if name.startswith('ure.selected_'): return tensor
    return tensor[:1] if parity.reason(stem, name, dict.fromkeys(BATCHED, True)) else None


def first_of_affinity(stem, name, tensor):
    "The first sample of each file that holds several, without what sums over them."
    matches = lambda *patterns: parity.reason(stem, name, dict.fromkeys(patterns, True))
    if matches('aff_head/aff_dense_last', 'aff_head/grad.f*', 'aff_head/grad_conv4_norm', 'aff_labels/s1.*', 'metrics/*.pooled*', 'metrics/*_mean', 'metrics/*.tp*', 'metrics/*class*', 'metrics/*_[123]'): return None
    return tensor[:1] if matches('aff_head/conv?', 'aff_head/embedding', 'aff_head/*aff', 'aff_head/grad*', 'dilated_resnet/x', 'dilated_resnet/*os*', 'metrics/labels', 'metrics/*.per_image*') else tensor


@pytest.mark.parametrize('method', LEAST)
def test_golden_vectors(capsys, method):
    code, compared, failed, missing, text = counts(capsys, method)
    assert (code, failed) == (0, 0) and compared >= LEAST[method] and compared / (compared + missing) >= .95
    assert text.splitlines()[-1] == f'{method}: {compared} compared, 0 failed, {missing} not covered'
    for row in text.splitlines()[:-1]: # every row says where it comes from
        assert len(row) > 60 and any(w in row for w in ('official code', 'public copy', 'own oracle', 'earlier report', 'own transcript', 'open_clip', 'torchvision', 'not covered: ')), row
    print(text.splitlines()[-1])


@pytest.mark.parametrize('method, change, least', [('more', first_of_more, 40), ('affinity', first_of_affinity, 100)])
def test_another_directory_of_the_format(tmp_path, capsys, method, change, least):
    "One image instead of several, nothing that sums over images; and the parent of two directories."
    one = copy(method, tmp_path/'sets'/'one', change, B=1)
    code, compared, failed, missing, text = counts(capsys, method, one)
    assert (code, failed, missing) == (0, 0, 0) and compared > least, text
    whole = counts(capsys, method, copy(method, tmp_path/'sets'/'two'))[1]
    code, both, failed, _, _ = counts(capsys, method, tmp_path/'sets')
    assert code == 0 and failed == 0 and both == compared + whole > 2 * compared


def test_directories_of_other_sizes(tmp_path, capsys):
    "Other widths, depths, heads, grids, classes, blocks of the object map, and every component anew, computed by plain code that shares nothing with the library."
    import reference_cdtr as plain
    plain.write_model_directory(tmp_path/'birds', 3, 'cub', classes=11, batch=4, dim=16, depth=5, heads=2, ratio=3, patch=8, side=10, width=5, ocm=3, clip_dim=12)
    plain.write_model_directory(tmp_path/'things', 4, 'imnet', classes=6, batch=3, dim=24, depth=4, heads=3, ratio=2, patch=16, side=8, width=2, ocm=4, clip_dim=9)
    plain.write_component_directory(tmp_path/'parts', 5, C=4, B=3, c_base=2, csm_hw=(6, 10), depth=3, heads=2, ski_hw=(7, 9), n_maps=6, nonsq_wh=(90, 131), img_sizes=[[300, 400], [257, 640], [224, 224]], n_train=700, n_eval=12)
    code, compared, failed, missing, text = counts(capsys, 'cdtr', tmp_path)
    assert (code, failed, missing) == (0, 0, 0) and compared > 450, text


def test_surgery_of_other_sizes(tmp_path, capsys):
    "Other widths, depths, heads, grids, class counts and surgery blocks, computed by plain code; a directory alone, and both together."
    import reference_surgery as plain
    plain.write_directory(tmp_path/'sets'/'small', 1); plain.write_directory(tmp_path/'sets'/'deep', 2, layers=9, width=32, heads=4, classes=7, surgery_blocks=7, image_size=60, patch=12, out_hw=[40, 31], batch=3, grid_hw=[7, 7], objects=9, embed_dim=28, prompts=4, fs_temperature=3, down=1)
    code, compared, failed, missing, text = counts(capsys, 'surgery', tmp_path/'sets'/'small'); assert (code, failed, missing) == (0, 0, 0) and compared > 95, text
    code, both, failed, missing, text = counts(capsys, 'surgery', tmp_path/'sets'); assert (code, failed, missing) == (0, 0, 0) and both > 2 * compared, text


def test_fsgr_of_other_sizes(tmp_path, capsys):
    "Other grids, widths, heads, depths, adapters, tags (fewer than twenty too), words and batches, computed by plain code; each directory alone, and all together."
    import reference_fsgr as plain
    meshed = dict(d_in=9, d_model=20, h=2, d_k=10, d_ff=30, memory=6, vocab=41, max_len=15, layers=3, batch=2, regions=7, seq_len=8, steps=8, eos_boost=1.5)
    sets = dict(small=plain.write_directory(tmp_path/'sets'/'small', 1), bare=plain.write_directory(tmp_path/'sets'/'bare', 3, batch=1, n_tags=4, h=1, d_k=20, heads=1, layers=2, deep_layers=1, num_tokens=1, adapter_layers=[1, 1], n_dec=0, captions=None, m2=None, pma_oracle=None),
                deep=plain.write_directory(tmp_path/'sets'/'deep', 2, image_size=42, patch=6, width=32, heads=2, layers=5, deep_layers=2, num_tokens=5, adapter_layers=[0, 3], n_tags=13, embed_dim=24, d_model=24, h=3, d_k=10, d_ff=40, n_enc=3, n_dec=3, vocab=47, max_len=20, seq_len=10, gen_len=8, eos_boost=1.5, scale=40, captions=15, m2=meshed, pma_oracle=dict(batch=2, len=9, d=20, heads=4, prototypes=9, bank=50, nearest=5)))
    total = 0
    for name, folder in sets.items():
        code, compared, failed, missing, text = counts(capsys, 'fsgr', folder); assert (code, failed, missing) == (0, 0, 0) and compared > dict(small=175, bare=120, deep=285)[name], text
        total += compared; words = load_file(folder/'outputs.safetensors')['beam.words']; ends = (words == plain.EOS).int().argmax(-1)[(words == plain.EOS).any(-1)]
        assert len(ends.unique()) > 1, 'sentences of one length do not show what a finished beam does'
    code, together, failed, missing, text = counts(capsys, 'fsgr', tmp_path/'sets'); assert (code, together, failed, missing) == (0, total, 0, 0), text


def test_the_plain_code_of_fsgr_says_what_the_public_copy_says():
    "What writes other directories is itself measured: every stored tensor of the captioner, every value, every score."
    import reference_fsgr as plain
    stored, config = parity.stored_tensors(GOLDEN/'fsgr'); near = lambda a, b, gap: (torch.as_tensor(a, dtype=torch.float64).detach() - torch.as_tensor(b, dtype=torch.float64)).abs().max() <= gap
    files, values = plain.captioner_vectors(stored['weights'], config, stored['inputs'], stored['geometry']['rows'], apart=None)
    for stem in files:
        missing = set(stored[stem]) - set(files[stem]); assert all(k.startswith('grad.') for k in missing) and len(missing) < 2
        for k in set(stored[stem]) - missing: assert near(files[stem][k], stored[stem][k], {'geometry': 2e-4}.get(stem, 1e-4 if k == 'quant.seg_logit' else 1e-5) * stored[stem][k].is_floating_point()), k
    for k, v in config['values'].items():
        if isinstance(v, float) and k != 'beam_seconds': assert near(values[k], v, 1e-5), k
        elif isinstance(v, list): assert set(values[k]) == set(v)
    assert set(values['grad_norms']) == set(config['values']['grad_norms']) and all(near(values['grad_norms'][k], v, 1e-6 + 1e-3 * v) for k, v in config['values']['grad_norms'].items())
    found = json.loads((GOLDEN/'fsgr'/'metrics.json').read_text()); scores = plain.caption_scores(found['references_tok'], found['hypotheses_tok'], found['scst_df_corpus_tok'])
    assert len(scores) == 8 and all(near(v, found['scores'][k], 1e-9) for k, v in scores.items())


def test_every_changed_tensor_of_fsgr_fails(tmp_path, capsys):
    "All of them at once: no row passes."
    def spoil(stem, k, v):
        if stem == 'weights' or parity.reason(stem, k, parity.scope('fsgr')[0]): return v
        v = v.clone(); v.view(-1)[0] += 1 if (v == v.round()).all() else .01 * (1 + v.abs().max()) # a mask is stored as 0. and 1.
        return v
    code, compared, failed, missing, text = counts(capsys, 'fsgr', copy('fsgr', tmp_path/'a', spoil))
    assert code == 1 and failed == compared >= LEAST['fsgr'] and missing == 0, text


@pytest.mark.parametrize('method, name', [(m, n) for m, names in SPOILED.items() for n in names])
def test_one_changed_tensor_fails(tmp_path, capsys, method, name):
    def spoil(stem, k, v):
        if k != name or stem == 'weights': return v
        v = v.clone()
        if v.is_floating_point(): v.view(-1)[-1 if name.startswith('eval.') else 0] += .01 * (1 + v.nan_to_num().abs().max()) # its first column is the threshold
        else: v.view(-1)[:max(len(v.view(-1)) // 10, 1)] += 1
        return v
    code, _, failed, _, text = counts(capsys, method, copy(method, tmp_path/'a', spoil))
    assert code == 1 and failed == 1 and any(f'/{name} ' in r and 'FAILED' in r for r in text.splitlines()), text


@pytest.mark.parametrize('method, output, weight, least', [('more', 'enc.tokens_in', 'encoder.norm.weight', 20), ('affinity', 'embedding', 'f9.weight', 12), ('cdtr/cub', 'tokens_after_block0', 'norm.weight', 20), ('surgery', 'surgery_tokens_norm', 'visual.ln_pre.weight', 20), ('fsgr', 'encoder.layer1', 'backbone.visual.ln_pre.weight', 150)])
def test_permuted_tensors_and_other_weights_fail(tmp_path, capsys, method, output, weight, least):
    code, _, failed, _, _ = counts(capsys, method, copy(method, tmp_path/'a', lambda stem, k, v: v.flip(1) if k == output else v))
    assert (code, failed) == (1, 1)
    code, compared, failed, _, _ = counts(capsys, method, copy(method, tmp_path/'b', lambda stem, k, v: v * 1.01 if k == weight else v))
    assert code == 1 and failed > least


def test_nan_that_means_absent_must_stand_in_its_place(tmp_path, capsys):
    def move(stem, k, v):
        if k != 'ignore.class38_iou': return v
        absent = v.isnan().nonzero()[0]
        return v.index_fill(0, absent, 0.)
    assert counts(capsys, 'affinity', copy('affinity', tmp_path/'a', move))[:3:2] == (1, 1)
    assert not parity.Near(torch.tensor([float('nan')])).check(torch.tensor([float('nan')]))[2]


@pytest.mark.parametrize('method, stem', [('more', 'losses'), ('affinity', 'aff_head'), ('cdtr/cub', 'train'), ('surgery', 'head'), ('fsgr', 'outputs')])
def test_a_tensor_nobody_computes_is_not_covered(tmp_path, capsys, method, stem):
    "More than 5 % of them: exit code 1 although nothing failed."
    folder = copy(method, tmp_path/'a')
    known = counts(capsys, method, folder)[1]
    for few, code in ((1, 0), (known // 15, 1)):
        save_file(load_file(GOLDEN/method/f'{stem}.safetensors') | {f'unheard.{i}': torch.zeros(1) for i in range(few)}, folder/f'{stem}.safetensors')
        found = counts(capsys, method, folder)
        assert found[0] == code and found[2] == 0 and found[3] >= few and 'unheard.0' in found[4]


def test_without_the_compiled_crf_its_rows_are_named_and_not_missing(monkeypatch, capsys):
    import parity_affinity
    monkeypatch.setattr(parity_affinity, 'find_spec', lambda name: None)
    code, _, failed, missing, text = counts(capsys, 'affinity')
    assert (code, failed, missing) == (0, 0, 0) and text.count('not covered: needs pydensecrf') == 2


@pytest.mark.parametrize('method, lacking', [('more', 'weights'), ('more', 'forward'), ('more', 'cam'), ('more', 'labels'), ('affinity', 'indices'), ('affinity', 'random_walk'), ('affinity', 'metrics'), ('cdtr/cub', 'inputs'), ('cdtr/cub', 'grads'), ('cdtr/components', 'components'), ('surgery', 'weights'), ('surgery', 'io'), ('surgery', 'head'), ('fsgr', 'weights'), ('fsgr', 'inputs'), ('fsgr', 'visual'), ('fsgr', 'geometry'), ('fsgr', 'outputs')])
def test_a_missing_file_is_named(tmp_path, method, lacking):
    folder = copy(method, tmp_path/'a'); (folder/f'{lacking}.safetensors').unlink()
    with pytest.raises(SystemExit) as e: parity.main(method.split('/')[0], folder)
    needed = load_file(GOLDEN/method/f'{lacking}.safetensors')
    assert 'cure: ' in e.value.code and str(folder) in e.value.code and any(f'"{k}"' in e.value.code for k in [lacking, *needed])


def test_an_empty_folder_and_an_unknown_method_are_refused(tmp_path):
    with pytest.raises(SystemExit, match='config.json'): parity.main('more', tmp_path)
    with pytest.raises(SystemExit, match='nothing'): parity.main('nothing')


@pytest.mark.parametrize('method', LEAST)
def test_as_a_command(method):
    "The form that the README names: last line and exit code."
    done = subprocess.run([sys.executable, str(Path(parity.__file__)), method], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1].startswith(f'{method}: ') and ' 0 failed, ' in done.stdout.splitlines()[-1]
