"Recomputes the golden vectors of MoRe from stored weights, inputs and picks."

import torch
import torch.nn.functional as F
from parity import Near, Same

from wsl_nb import crf, maps as soft, more, more_weights
from wsl_nb.more_base import MoReConfig, balanced_cross_entropy, patch_token_contrast, refined_labels
from wsl_nb.core import denormalise, minmax
from wsl_nb.vit import raw_scores


def recipe(config):
    "MoReConfig of a directory: its sizes, thresholds and weights."
    w = config['w']
    return MoReConfig(
        dim=config['dim'], depth=config['depth'], heads=config['heads'], patch=config['patch'], side=config['img'] // config['patch'],
        mlp_ratio=config['mlp_ratio'], registers=config['register_tokens'], aux_block=config['aux_layer'], decoder_dim=config['dec'],
        scales=tuple(config['scales']), cre_tau=config['temp'], background=config['bkg'], refine=(config['low'], config['high']),
        ure_early=(config['low'], config['high']), affinity=(config['low'], config['high']), steps=config['max_iters'],
        w_ptc=w['ptc'], w_cre=w['cle'], w_ure=w['une'], w_seg=w['seg'], w_reg=w['reg'])


def forward(model, s, config):
    "Encoder, graph and outputs of one training forward."
    out, stream = model(s['image']), model.encoder.block_outputs(s['image'])
    front = model.encoder.front
    tol = {f'enc.block{i}.out': Near(x) for i, x in enumerate(stream[1:])}
    tokens = lambda x: x.flatten(2).mT
    embedded = tokens(model.encoder.patch_embed(s['image'][..., :out.features.shape[-2] * config['patch'], :out.features.shape[-1] * config['patch']]))
    rows = slice(config['register_tokens'], front)
    score = raw_scores(model.encoder.blocks[-1], stream[-2], rows)[..., front:].sum(1).unflatten(-1, out.features.shape[-2:])
    lam = more.attention_maps(out.features, out.tokens)
    return out, tol | {
        'enc.patch_embed': Near(embedded), 'enc.tokens_in': Near(stream[0]), 'enc.class_tokens': Near(out.class_tokens),
        'enc.patch_tokens': Near(tokens(out.features)), 'enc.aux_patch_tokens': Near(tokens(out.aux_features)),
        'out.cls': Near(out.cls), 'out.cls_aux': Near(out.aux), 'out.seg': Near(out.seg), 'out.fmap': Near(out.features),
        'out.tokens': Near(out.tokens), 'out.tokens_no_gcr': Near(out.class_tokens), 'out.score_maps': Near(score, 1e-3),
        'cam.raw': Near(soft.class_maps(out.features, model.classifier)), 'cam.raw_aux': Near(soft.class_maps(out.aux_features, model.aux_classifier)),
        'lam.raw': Near(lam, 1e-4, 1e-5), 'lam.norm': Near(minmax(lam))}


def graph(model, out, s):
    "Every intermediate of the graph layer; neighbours are compared as sets."
    g = model.graph_layer.steps(out.class_tokens, out.features.flatten(2).mT)
    names = dict(head='head', tail='tail', topk_value='score', edge_prob='edge', gate_prob='gate', aggregate='aggregate', sum_in='sum_in', bi_in='product_in', pre_norm='pre_norm', out='out')
    order = s['gcr.topk_index'].long().argsort(-1)
    ours = g['index'].sort(-1).values
    return {f'gcr.{k}': Near(g[v]) for k, v in names.items()} | {
        'gcr.gate_logit': Near(g['gate_logit'], 1e-4, 1e-4), 'gcr.topk_index': Same(ours.gather(-1, order.argsort(-1)))}


def maps(model, out, s, config, cfg):
    "Multi-scale maps, the label maps made from stored maps, PAR, refined label and un-normalised image."
    y, grid = s['label'], out.features.shape[-2:]
    cam, aux = more.training_cams(model, s['image'], out, cfg)
    lam = soft.multi_scale(lambda x: (lam_of(model, x),), s['image'], tuple(config['lam_ms_scales']), relu=(False,))[0]
    early = more.patch_labels(s['cam'], s['cam_aux'], y, grid, 0, cfg)
    late = more.patch_labels(s['cam'], s['cam_aux'], y, grid, cfg.switch + 1, cfg)
    ids = early['affinity'].flatten(1)
    pair = (ids[:, :, None] == ids[:, None]).long()
    unsure = (ids[:, :, None] == 255) | (ids[:, None] == 255) | torch.eye(ids.shape[1], dtype=torch.bool)
    par = config['par']
    return {
        'cam': Near(cam), 'cam_aux': Near(aux), 'lam_ms': Near(lam),
        'label_mid': Same(soft.three_way_labels(s['cam'], y, config['low'], config['high']), .995),
        'label_bkg': Same(soft.hard_labels(s['cam'], y, config['bkg']), .995),
        'mask_cre_early': Same(early['cre'], .995), 'mask_ure_early': Same(early['ure'], .995), 'mask_late': Same(late['cre'], .995),
        'aff_mask': Same(pair.masked_fill(unsure, 255), .995),
        'denorm': Near((denormalise(s['image']) * 255).clamp(0, 255).to(torch.uint8).float() / 255, 1 / 255 + 1e-6),
        'par.mask_out': Near(crf.par_refine(s['par.image'], s['par.mask_in'], par['num_iter'], tuple(par['dilations']), par['w1'], par['w2'])),
        'refined_pseudo_label': Same(refined_labels(s['image'], s['cam'], y, cfg.refine), .995)}


def lam_of(model, image):
    "Raw attention maps of one scale."
    features, _, tokens = model.features(image)
    return more.attention_maps(features, model.graph(tokens, features))


def terms_of(model, s, config, cfg):
    "Losses of the stored masks, their gradients, and the tokens picked for URE."
    out, y = model(s['image']), s['label']
    image_of = [torch.cat([torch.full((len(s[f'ure.selected_pos{b}']), 1), b), s[f'ure.selected_pos{b}'].long()], 1) for b in range(len(y))]
    picks, patches = torch.cat(image_of), out.features.flatten(2).mT
    cre = lambda m: more.confident_relation(out.tokens, patches, s[m], y, cfg.cre_tau, cfg.cre_eps)
    soft = lambda logits: F.multilabel_soft_margin_loss(logits, y)
    terms = dict(
        cls=soft(out.cls), cls_aux=soft(out.aux), mct=more.class_token_contrast(out.tokens, cfg.mct_tau),
        ptc=patch_token_contrast(out.features, more.patch_labels(s['cam'], s['cam_aux'], y, out.features.shape[-2:], 0, cfg)['affinity']),
        cre_early=cre('mask_cre_early'), cre_late=cre('mask_late'), ure=more.uncertain_relation(out.tokens, out.features, y, picks),
        seg=balanced_cross_entropy(out.seg, s['refined_pseudo_label']))
    logits = F.interpolate(out.seg, size=s['image'].shape[-2:], mode='bilinear', align_corners=False)
    logits.retain_grad()
    e = config['energy']
    energy = lambda kernel: crf.dense_energy(denormalise(s['image']), logits, s['refined_pseudo_label'], e['sigma_rgb'], e['sigma_xy'], e['scale_factor'], e['weight'], kernel=kernel)
    lattice, exact = energy('lattice'), energy('exact')
    field, = torch.autograd.grad(lattice, logits, retain_graph=True)
    weight = dict(cls=1, cls_aux=1, mct=1, ptc=cfg.w_ptc, cre_early=cfg.w_cre, ure=cfg.w_ure, seg=cfg.w_seg)
    whole = sum(w * terms[k] for k, w in weight.items()) + cfg.w_reg * lattice
    whole.backward()
    chosen = F.normalize(out.features.detach(), dim=1)
    found = {f'loss.{k}': Near(v.detach(), 0, 1e-4) for k, v in terms.items()}
    found |= {f'grad.{n}': Near(p.grad, 1e-6, 1e-3) for n, p in model.named_parameters()}
    found |= {f'ure.selected_tokens{b}': Near(chosen[b][:, p[:, 1], p[:, 2]].T) for b, p in enumerate(image_of)}
    return found | {'loss.total': Near(whole.detach(), 0, 1e-4), 'energy.exact_gaussian': Near(exact.detach(), 0, 1e-3),
                    'energy.lattice': Near(lattice.detach(), 0, 1e-3), 'loss.reg': Near(lattice.detach(), 0, 1e-3),
                    'energy.grad_lattice_area_half': Near(F.avg_pool2d(field, 2) * 1e6, .02 * float(s['energy.grad_lattice_area_half'].abs().max()))}


def candidates(label_map):
    "(image, row, column) of all accepted windows, as stored."
    return more.uncertain_candidates(label_map)[0].nonzero()


def probes(s, config):
    "Losses in isolation, on random tensors."
    q, f, y, m = s['tokens'].requires_grad_(), s['fmap'].requires_grad_(), s['label'], s['mask']
    cre = lambda fmap, tau: more.confident_relation(q, fmap.flatten(2).mT, m, y, tau, 1e-4)
    loss, negative = cre(f, config['temp']), cre(s['cre.neg_fmap'], config['temp'])
    each = torch.stack([more.confident_relation(q[b:b + 1], f[b:b + 1].flatten(2).mT, m[b:b + 1], y[b:b + 1], config['temp'], 1e-4) for b in range(len(q))])
    ure = more.uncertain_relation(q, f, y, s['ure.selected_pos'].long())
    mct_in = s['mct.tokens'].requires_grad_()
    mct = more.class_token_contrast(mct_in)
    ids, sure = m.flatten(1), m.flatten(1) != 255
    pair = sure[:, :, None] & sure[:, None] & ~torch.eye(ids.shape[1], dtype=torch.bool)
    same = ids[:, :, None] == ids[:, None]
    seg = lambda label: Near(balanced_cross_entropy(s['seg.logits'], label), 1e-7, 1e-4)
    mixed = s['seg.label_mixed']
    return {
        'cre.loss': Near(loss.detach(), 0, 1e-4), 'cre.per_image': Near(each.detach(), 1e-6, 1e-4), 'cre.grad_tokens': Near(torch.autograd.grad(loss, q)[0], 1e-6, 1e-3),
        'cre.neg_loss': Near(negative.detach(), 0, 1e-4), 'cre.neg_grad_tokens': Near(torch.autograd.grad(negative, q)[0], 1e-6, 1e-3),
        'cre.tau01_loss': Near(cre(.5 * f, .1).detach(), 0, 1e-4),
        'ure.candidates': Same(candidates(m)), 'ure.loss': Near(ure.detach(), 0, 1e-4), 'ure.grad_fmap_absmax': Near(torch.autograd.grad(ure, f)[0].abs().amax(1), 1e-6, 1e-3),
        'mct.loss': Near(mct.detach(), 0, 1e-4), 'mct.grad': Near(torch.autograd.grad(mct, mct_in)[0], 1e-6, 1e-3),
        'mct.loss_identical': Near(more.class_token_contrast(torch.ones_like(mct_in)).detach(), 0, 1e-4),
        'ptc.loss': Near(patch_token_contrast(f, m).detach(), 0, 1e-4), 'ptc.n_pos_neg': Near(torch.stack([(pair & same).sum(), (pair & ~same).sum()]), 0, 0),
        'seg.loss_mixed': seg(mixed), 'seg.loss_all_bg': seg(torch.zeros_like(mixed)), 'seg.loss_all_ignore': seg(torch.full_like(mixed, 255)), 'seg.loss_no_bg': seg(mixed.masked_fill(mixed == 0, 1))}


def crf_rows(s, config):
    "Dense CRF with the official parameters, by our own lattice."
    c = config['crf']
    params = crf.CRFParams(iterations=c['iter_max'], gaussian_sxy=c['pos_xy_std'], gaussian_compat=c['pos_w'], bilateral_sxy=c['bi_xy_std'], bilateral_srgb=c['bi_rgb_std'], bilateral_compat=c['bi_w'])
    q = torch.as_tensor(crf.dense_crf(s['crf.image_rgb'].numpy(), s['crf.prob_in'].numpy(), params, backend='torch'))
    return {'crf.Q': Near(q, 1e-3)} | crf_label(s, q)


def crf_label(s, q):
    "Label map of a CRF result: background, then the present classes of the first image."
    ids = F.pad(s['label'][0].nonzero().flatten() + 1, (1, 0))
    return {'crf.label': Same(ids[q.argmax(0)], .995)}


def compute(stored, config):
    "(file stem, name) -> recomputed tensor with its tolerance."
    cfg = recipe(config)
    model = more.MoRe(cfg, config['C'])
    model.load_state_dict(more_weights.from_official(stored['weights']))
    s = {k: v for stem, part in stored.items() if stem not in ('weights', 'probes') for k, v in part.items()}
    with torch.no_grad():
        out, named = forward(model, s, config)
        named |= graph(model, out, s) | maps(model, out, s, config, cfg) | crf_rows(s, config)
    named |= terms_of(model, s, config, cfg) | {'ure.candidates': Same(candidates(s['mask_ure_early']))}
    found = {(stem, k): named[k] for stem, part in stored.items() if stem not in ('weights', 'probes') for k in part if k in named}
    return found | {('probes', k): v for k, v in (probes(stored['probes'], config) if 'probes' in stored else {}).items()}
