"Recomputes the golden vectors of AffinityNet from stored weights, inputs and crop boxes; nothing in it knows the sizes of a directory."
import copy
from dataclasses import replace
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from parity import Near, Same
from torch import nn
from torchvision.models.resnet import Bottleneck

from wsl_nb import affinity as af, affinity_base as base, affinity_labels as labels, crf, metrics_binary as binary
from wsl_nb.core import normalise
from wsl_nb.metrics import confusion_matrix
from wsl_nb.training_config import lr_factor

STRIDE = 8                                                                 # Pixels a cell in every file
VGG_GROUPS = (2, 2, 4)                                                     # Of the GroupNorm variant, named by the README of the vectors
POLY = dict(lr=.1, steps=6)                                                # Of `poly_sgd`, named there too
THIN = 97                                                                  # Large index tables keep every 97th pair
VARIANTS = dict(standard_os32=None, torchvision_os8=(1, 2), seed_os8=(2, 4), irn_os8_dil2_4=(1, 1))  # Dilation of the first block of layer3, layer4


# --- the networks of the directory -----------------------------------------------------------------------------------

def part(tensors, prefix):
    "Tensors whose name starts with the prefix, without it."
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def head_of(weights):
    "The library's head with the stored weights."
    names = ('f8_3', 'f8_4', 'f8_5', 'f9')
    shapes = [weights[f'{n}.weight'].shape for n in names]
    head = af.AffinityHead([s[1] for s in shapes[:3]], [s[0] for s in shapes])
    head.load_state_dict({f'{n}.weight': weights[f'{n}.weight'] for n in names})
    return head


def group_normed(head, weights):
    "The same head with a GroupNorm after each of its first convolutions."
    head = copy.deepcopy(head)
    for n, groups in zip('345', VGG_GROUPS):
        norm = nn.GroupNorm(groups, getattr(head, f'f8_{n}').out_channels)
        norm.load_state_dict(part(weights, f'vgg.gn8_{n}.'))
        setattr(head, f'f8_{n}', nn.Sequential(getattr(head, f'f8_{n}'), norm))
    return head


class TinyNet(nn.Module):
    "The three convolutions of the directory as a backbone, and the library's head; groups go by the library's names."
    def __init__(self, weights):
        super().__init__()
        self.backbone = nn.Module()
        for n, geometry in dict(tb1=dict(stride=STRIDE), tb2=dict(padding=1), tb3=dict(padding=1)).items():
            own = part(weights, f'{n}.'); out, into, *kernel = own['weight'].shape
            conv = nn.Conv2d(into, out, kernel, bias='bias' in own, **geometry); conv.load_state_dict(own)
            self.backbone.add_module(n, conv)
        self.aff_head = head_of(weights)

    def levels(self, image):
        "Outputs of the three ReLUs."
        found = []
        for conv in self.backbone.children(): image = conv(image).relu(); found.append(image)
        return tuple(found)

    def forward(self, image): return self.aff_head(self.levels(image))

    def stored(self, prefix):
        "Weights by the names of the directory."
        return {prefix + k.split('.', 1)[1]: v.detach().clone() for k, v in self.state_dict().items()}


# --- pairs, dilation, head -------------------------------------------------------------------------------------------

def indices(s, config):
    "Flat grid indices of both ends of every pair."
    found = {f'r{r}_offsets_dy_dx': Same(torch.tensor(af.pair_offsets(r))) for r in (int(k[1:].split('_')[0]) for k in s if k.endswith('_dy_dx'))}
    for name in (k.removesuffix('_from') for k in s if k.endswith('_from')):
        r, (h, w) = int(name[1:].split('_')[0]), map(int, name.split('_')[1].split('x'))
        first, second = af.pair_views(torch.arange(h * w).view(h, w), r)
        keep = slice(None, None, 1 if s[f'{name}_from'].numel() == first.numel() else THIN)
        found |= {f'{name}_from': Same(first.flatten()[keep]), f'{name}_to': Same(torch.stack([x.flatten()[keep] for x in second]))}
    return found


def bottlenecks(weights, planes, stride=2):
    "A stage of torchvision's ResNet with the stored weights, in evaluation mode."
    into, count = weights['0.conv1.weight'].shape[1], 1 + max(int(k.split('.')[0]) for k in weights)
    short = nn.Sequential(nn.Conv2d(into, 4 * planes, 1, stride, bias=False), nn.BatchNorm2d(4 * planes))
    layer = nn.Sequential(Bottleneck(into, planes, stride, short), *(Bottleneck(4 * planes, planes) for _ in range(count - 1)))
    lost = layer.load_state_dict(weights, strict=False)
    assert not lost.unexpected_keys and all(k.endswith('num_batches_tracked') for k in lost.missing_keys), lost
    return layer.eval()


@torch.no_grad()
def dilated_resnet(s, config):
    "The two last stages in each variant."
    found = {}
    for name, first in VARIANTS.items():
        third, fourth = (bottlenecks(part(s, f'layer{i}.'), s[f'layer{i}.0.conv1.weight'].shape[0]) for i in (3, 4))
        if first: base.dilate(third, 2, first[0]); base.dilate(fourth, 4, first[1])
        out = third(s['x'])
        found |= {f'{name}.layer3_block0': Near(third[0](s['x']), 1e-5), f'{name}.layer3_out': Near(out, 1e-5), f'{name}.layer4_out': Near(fourth(out), 1e-5)}
    return found


def dense(affinity, grid, radius):
    "Symmetric matrix with unit diagonal, read off the library's transition: row i of W divided by its diagonal."
    step = af.transition(affinity, grid, radius, 'partial', 1.).to_dense()
    return step / step.diagonal()[:, None]


def aff_head(s, config):
    "Embedding, affinities, the dense matrix, all gradients; the variant with GroupNorm."
    levels, r = [s[f'conv{i}'].requires_grad_() for i in (4, 5, 6)], config['radius']
    head = head_of(s)
    e = head(levels); pairs = af.pair_affinities(e, r, 'partial')
    pairs.flatten(2).backward(s['grad_aff_seed'])
    grads = {f'grad.conv{i}': x.grad for i, x in zip((4, 5, 6), levels)} | {f'grad.{n}': p.grad for n, p in head.named_parameters()}
    vgg = af.pair_affinities(group_normed(head, s)(levels), r, 'partial')
    grid, a = e.shape[-2:], pairs.detach()
    return {'embedding': Near(e.detach(), 1e-5), 'aff': Near(a.flatten(2), 1e-5), 'vgg.aff': Near(vgg.detach().flatten(2), 1e-5),
            'aff_dense_sample0': Near(dense(a[0], grid, r), 1e-5), 'aff_dense_last': Near(dense(a[-1], grid, r), 1e-5),
            'grad_conv4_norm': Near(levels[0].grad.norm(), 0, 1e-4)} | {k: Near(g, 1e-5 * g.abs().max().item(), 1e-4) for k, g in grads.items()}


# --- maps and labels -------------------------------------------------------------------------------------------------

@torch.no_grad()
def cam_infer(s, config):
    "Inputs at every scale, the normalised sum of the stored maps, background scores, dense CRF under both exponents."
    picture, keys = s['image_rgb_uint8'].numpy(), next(v for k, v in s.items() if k.startswith('label_onehot')).nonzero().flatten()
    raw = [torch.stack([s[f'cam_raw_{i}'], s[f'cam_raw_{i + 1}']]) for i in range(0, 2 * len(base.VOC_OFFICIAL.scales), 2)]
    maps, same = iter(raw), nn.Conv2d(*2 * [raw[0].shape[1]], 1, bias=False)
    nn.init.dirac_(same.weight)
    cam, = af.multi_scale_cam(lambda x: next(maps), same, [picture], [keys.tolist()])
    ids = F.pad(keys + 1, (1, 0))
    low, high = (af.background_score(cam, config[k]) for k in ('la', 'ha'))
    found = {f'net_input_{i}': Near(x, 1e-5) for i, x in enumerate(x for pair in af.scaled_inputs(picture, base.VOC_OFFICIAL.scales) for x in pair)}
    if find_spec('pydensecrf'): found |= {f'crf_{k}': Near(p, 1e-3) for k, p in zip(('la', 'ha'), crf.dense_crf(picture, torch.stack([low, high]), labels.CRF, 'pydensecrf'))}
    return found | {'norm_cam': Near(cam, 1e-5), 'bg_score_low': Near(low[0], 1e-5), 'bg_score_high': Near(high[0], 1e-5), 'crf_keys': Same(ids),
                    'cam_pred_bg0.2': Same(ids[torch.cat([torch.full_like(cam[:1], .2), cam]).argmax(0)])}


def aff_labels(s, config):
    "Label map, the three kinds of pairs and the input of the network, for each sample."
    side, found = STRIDE * config['grid_lab'], {}
    for n in sorted({k.split('.')[0] for k in s}):
        box, flipped = s[f'{n}.crop_box'].tolist(), bool(s[f'{n}.flipped'])
        low, high = (s[f'{n}.{k}_fp16'].float() for k in ('la', 'ha'))
        image, maps = labels.crop_pair(s[f'{n}.image_rgb_uint8'].permute(2, 0, 1), torch.cat([low, high]), box, flipped, side)
        label, image = af.confident_labels(*maps.chunk(2), STRIDE), normalise(image[None].float() / 255)[0]
        pairs = dict(zip(('bg_pos', 'fg_pos', 'neg'), af.pair_labels(label, config['radius'], 'partial')))
        found |= {f'{n}.label_map': Same(label), f'{n}.net_image_stride4': Near(image[:, ::4, ::4], 1e-5)} | {f'{n}.{k}': Same(v.flatten(1)) for k, v in pairs.items()}
    return found


# --- training --------------------------------------------------------------------------------------------------------

def recipe(config, steps, lr):
    "The released recipe at the rate and length of the directory."
    return replace(base.VOC_OFFICIAL, lr=lr, weight_decay=config['wd'], steps=steps, radius=config['radius'])


def four_groups():
    "A module with a parameter in each group: the released script logs the rate of an empty group too."
    return nn.ModuleDict(dict(backbone=nn.Conv2d(1, 1, 1), aff_head=nn.Conv2d(1, 1, 1)))


def rates(optimizer, first, factor):
    "Sets the rates of an update as a run does; returns them."
    for g, lr in zip(optimizer.param_groups, first): g['lr'] = lr * factor
    return [g['lr'] for g in optimizer.param_groups]


def train_steps(s, config):
    "Every step of the released script, in its compatibility mode."
    order, net = s['batch_order'].tolist(), TinyNet(part(s, 'init.'))
    cfg = recipe(config, len(order), config['lr'])
    update, logged = base.optimizer(net, cfg), base.optimizer(four_groups(), cfg)
    first, first_logged = ([g['lr'] for g in o.param_groups] for o in (update, logged))
    found, log = {}, {k: [] for k in ('bg_loss', 'fg_loss', 'neg_loss', 'bg_cnt', 'fg_cnt', 'neg_cnt', 'loss', 'lr_groups_momentum_wd')}
    for step, ids in enumerate(order):
        factor = lr_factor(cfg, step); rates(update, first, factor)
        distance = af.pair_distances(net(torch.stack([s[f'img_{i}_fp16'].float() for i in ids])), cfg.radius, cfg.border)
        known = tuple(torch.stack([s[f'labels_{i}.{k}'] for i in ids]).bool().view_as(distance) for k in ('bg_pos', 'fg_pos', 'neg'))
        terms = af.affinity_terms(distance, known, cfg.affinity_log)
        loss = base.total(terms, net, step, cfg)
        update.zero_grad(); loss.backward(); update.step()
        log['lr_groups_momentum_wd'].append([*rates(logged, first_logged, factor), logged.defaults['momentum'], logged.param_groups[2]['weight_decay']])
        log['loss'].append(loss.item())
        for (k, v), mask in zip(terms.items(), known): log[f'{k}_loss'].append(v.item()); log[f'{k}_cnt'].append(mask.sum().item() + 1e-5)
        if not step: found |= net.stored('after_step1.')
    near = lambda k, v: Near(torch.tensor(v), 1e-6 if k.startswith('lr') else 1e-5, 1e-6)
    return {k: Near(v, 1e-5) for k, v in (found | net.stored('final.')).items()} | {f'log.{k}': near(k, v) for k, v in log.items()}


def poly_sgd(s, config):
    "Given gradients through the four groups. A run ends with its last step; the released class goes on at the last rate."
    cfg, net = recipe(config, POLY['steps'], POLY['lr']), four_groups()
    params = [net['backbone'].weight, net['backbone'].bias, net['aff_head'].weight, net['aff_head'].bias]
    for i, p in enumerate(params): p.data = s[f'p{i}.0'].clone()
    update, lr, found = base.optimizer(net, cfg), [], {}
    first = [g['lr'] for g in update.param_groups]
    for t in range(len(s['lr'])):
        lr.append(rates(update, first, lr_factor(cfg, min(t, cfg.steps - 1))))
        for i, p in enumerate(params): p.grad = s[f'g{i}.{t}'].clone()
        update.step()
        found |= {f'p{i}.{t + 1}': Near(p.detach().clone(), 1e-6) for i, p in enumerate(params)}
    return found | {'lr': Near(torch.tensor(lr), 1e-6), 'momentum_of_group0': Near(torch.tensor([update.param_groups[0]['momentum']]), 1e-8)}


# --- walk ------------------------------------------------------------------------------------------------------------

@torch.no_grad()
def random_walk(s, config):
    "From the image to the label image; the whole transition matrix is the walk of a unit score at each cell."
    picture, r, beta, steps = s['image_rgb_uint8'].numpy(), config['radius'], config['beta'], 2 ** config['logt']
    cfg = replace(base.VOC_OFFICIAL, radius=r, alpha=config['alpha'], beta=beta, walk_steps=steps)
    e = labels.embeddings(TinyNet(part(s, 'w.')), [picture], cfg)
    pairs, grid = af.pair_affinities(e, r, 'partial')[0], e.shape[-2:]
    step = af.transition(pairs, grid, r, 'partial', beta)
    below, right = (STRIDE * n - m for n, m in zip(grid, picture.shape))
    pooled = F.avg_pool2d(F.pad(af.background_score(s['cams_in'], config['alpha']), (0, right, 0, below)), STRIDE)
    walk = af.random_walk(pooled, step, steps)
    up = F.interpolate(walk[None], scale_factor=STRIDE, mode='bilinear', align_corners=False)[0]
    whole = af.random_walk(torch.eye(grid[0] * grid[1]).unflatten(1, grid), step, steps).flatten(1)
    return {'aff_dense_raw': Near(dense(pairs, grid, r), 1e-6), 'trans_mat_step0': Near(step.to_dense().T, 1e-6), 'trans_mat_final': Near(whole, 1e-4),
            'cam_with_bg_pooled': Near(pooled, 1e-6), 'cam_rw_grid': Near(walk, 1e-4), 'cam_rw_up_stride4': Near(up[:, ::4, ::4], 1e-4),
            'pred': Same(F.pad(s['cam_keys'] + 1, (1, 0))[labels.walked(e[0], s['cams_in'], cfg).argmax(0)])}


def edge_affinities(edge, paths, radius):
    "Affinity of every pair, in the library's order: 1 - largest edge on the way; all is edge outside the grid. (h,w) -> (n,h,w)"
    h, w = edge.shape
    wide = F.pad(edge, (radius, radius, 0, radius), value=1.)
    return torch.stack([1 - torch.stack([wide[y:y + h, radius + x:radius + x + w] for y, x in paths[offset]]).amax(0) for offset in af.pair_offsets(radius)])


def irn(s, config):
    "The walk on all pairs of the grid, with affinities from edges: what the padded border of the later method gives."
    if config['irn_radius'] != 5: return {}                                # its walk has radius 5, whatever the paths that are stored
    paths = {tuple(path[0].tolist()): path.tolist() for k, v in s.items() if k.startswith('search_paths_') for path in v}
    edge, found = s['edge'][0, 0], {}
    pairs = edge_affinities(edge, paths, 5)
    for name in (k for k in s if k.startswith('propagate_')):
        beta, power = (int(x) for x in name.removeprefix('propagate_beta').split('_exp'))
        step = af.transition(pairs, tuple(edge.shape), 5, 'full', float(beta))
        found[name] = Near(af.random_walk(s['cam'] * (1 - edge), step, 2 ** power), 1e-4)
    return found


# --- metrics ---------------------------------------------------------------------------------------------------------

def truth_of(trimap, label, policy):
    "Class id where the pet is, 0 ground; the border by the policy."
    mask = torch.where(trimap == 1, label.to(torch.uint8), torch.where(trimap == 2, 0, 255)).to(torch.uint8)
    return binary.apply_border(mask, policy, int(label))


def metrics(s, config):
    "Scores of each border policy, pooled and image by image, and over all classes."
    pairs, found = [(s[f'pred_{i}'], s[f'trimap_{i}'], label) for i, label in enumerate(s['labels'])], {}
    image = ('precision', 'recall', 'f1', 'iou')
    for policy in binary.BORDERS:
        counts = torch.tensor([binary.binary_counts(p, truth_of(t, label, policy)) for p, t, label in pairs])
        row = lambda scores, keys: torch.tensor([scores[k] for k in keys])
        found |= {f'{policy}.tp_fp_fn_tn': Same(counts.sum(0)), f'{policy}.pooled_P_R_F1_IoUfg_IoUbg_mIoU': Near(row(binary.pooled_scores(counts), (*image, 'iou_background', 'miou')), 1e-6),
                  f'{policy}.per_image_P_R_F1_IoU': Near(torch.stack([row(binary.binary_scores(c), image) for c in counts]), 1e-6), f'{policy}.per_image_mean': Near(row(binary.mean_scores(counts), image), 1e-6)}
    for n in (int(k.split('.class')[1].split('_')[0]) for k in s if k.endswith('_confusion')):
        matrix = sum(confusion_matrix(p, truth_of(t, label, 'ignore'), n) for p, t, label in pairs)
        scores = binary.class_scores(matrix)
        found |= {f'ignore.class{n}_confusion': Same(matrix), f'ignore.class{n}_iou': Near(scores['iou'], 1e-6, nan=True), f'ignore.class{n}_miou_nanmean': Near(scores['miou_found'], 1e-6)}
    return found


def compute(stored, config):
    "(file stem, name) -> recomputed tensor with its tolerance."
    forms = dict(indices=indices, dilated_resnet=dilated_resnet, aff_head=aff_head, cam_infer=cam_infer, aff_labels=aff_labels, train_steps=train_steps,
                 poly_sgd=poly_sgd, random_walk=random_walk, metrics=metrics)
    found = {stem: form(stored[stem], config['config']) for stem, form in forms.items()}
    if 'irn' in stored: found['irn'] = irn(stored['irn'], config['config'])
    return {(stem, k): v for stem, own in found.items() for k, v in own.items() if k in stored[stem]}
