"Recomputes the golden vectors of CLIP Surgery and of the localisation head."
import torch
from parity import Near, Same
from parity_surgery_maps import map_rows

from wsl_nb import surgery_localisation as loc, surgery_scores as sc

# Stored name of a part of the earlier head -> ours
NAMES = dict(img_proj='from_image', cam_proj='from_cams', multi_layer_proj='from_tokens', fusion_conv='fuse', box_head='boxes')
TREE = {'from_image': ('',), 'from_cams': ('',), 'from_tokens': ('0.', '1.'), 'fuse': ('0.', '1.')} # A stored chain of conv, norm, ReLU is a chain of blocks


def truth(s):
    "All boxes of the batch, their images, their number within the image, their classes."
    count = sum(k.startswith('gt_boxes.') for k in s); boxes = [s[f'gt_boxes.{b}'] for b in range(count)]
    image = torch.cat([torch.full((len(x),), b) for b, x in enumerate(boxes)]); within = torch.cat([torch.arange(len(x)) for x in boxes])
    return torch.cat(boxes), image, within, torch.cat([s[f'gt_labels.{b}'] for b in range(count)])


def pairs_of(s, like):
    "Row of every object among all (image, class), image by image."
    boxes, image, within, label = truth(s)
    return boxes, image * like.shape[1] + label, image, within


def overlaps(s, config):
    "IoU and GIoU of pairs, and the earlier GIoU with 1e-6 on the areas."
    p, q = s['pair.p'], s['pair.q']
    return {'pair.iou': Near(loc.pair_iou(p, q), 1e-6), 'pair.giou': Near(loc.pair_giou(p, q), 1e-6), 'pair.seed_giou': Near(loc.pair_giou(p, q, 1e-6), 1e-6)}


def cell_centred(s, config):
    "Decoding, matching and losses of the head with shared weights."
    raw = s['v2.raw'].clone().requires_grad_(); boxes, pair, image, within = pairs_of(s, raw)
    pred = loc.decode_grid(raw.flatten(0, 1), s['v2.prior'].repeat(len(raw), 1), reach=2., spread=4.); found = loc.match(pred, boxes, pair)
    terms = loc.box_losses(pred, boxes, pair, found); loss = terms['l1'] + 2 * terms['giou']; loss.backward()
    best = torch.cat([torch.stack([image, within], 1), found.best], 1).float()
    pos = torch.stack([image[found.box], within[found.box], found.i, found.j], 1)
    return {'v2.pred_boxes': Near(pred.detach().view_as(raw), 1e-6, 1e-6), 'v2.pos': Same(sorted_rows(pos, s['v2.pos'])), 'v2.best': Near(torch.cat([best, found.best_iou[:, None]], 1), 1e-6), 'v2.num_pos': Same(torch.tensor(len(pos))), 'v2.num_unassigned': Same(found.unassigned),
            'v2.l1': Near(terms['l1'].detach(), 1e-5), 'v2.giou_loss': Near(terms['giou'].detach(), 1e-5), 'v2.loss': Near(loss.detach(), 1e-5), 'v2.grad_raw': Near(raw.grad, 1e-5)}


def sorted_rows(ours, stored):
    "Our rows in the order of the stored ones, as far as they are the same; else as they are."
    place = {tuple(r): i for i, r in enumerate(stored.tolist())}
    return torch.tensor(sorted(ours.tolist(), key=lambda r: place.get(tuple(r), len(place))))


def earlier_head(s, config):
    "The earlier head with its stored weights behind its image encoder."
    state = {k.removeprefix('seedhead.'): v for k, v in s.items() if k.startswith('seedhead.') and 'conf_head' not in k}
    width, classes = len(state['img_proj.0.bias']), len(state['box_head.bias']) // 4; tokens = state['multi_layer_proj.0.weight'].shape[1]
    head = loc.CellHead(tokens, classes, s['seed.img_features'].shape[-1], width)
    if state['img_proj.0.weight'].shape[1] != 128: head.from_image = loc._norm_block(state['img_proj.0.weight'].shape[1], width, 1, 32)
    found = {}
    for name, value in state.items():
        part, *rest = name.split('.'); ours = NAMES[part]
        if ours == 'boxes': found[f'boxes.{rest[0]}'] = value; continue
        place, kind = divmod(int(rest[0]), 3); found[f'{ours}.{TREE[ours][place]}{kind}.{rest[1]}'] = value
    own = {k: v for k, v in head.state_dict().items() if k.startswith('image.')}
    head.load_state_dict(own | found); head.eval()
    layers = [s[f'seed.multi.{i}'].transpose(1, 2) for i in range(sum(k.startswith('seed.multi.') for k in s))]; side = round(layers[0].shape[-1] ** .5)
    with torch.no_grad(): raw = head.all_classes(s['seed.img_features'], torch.cat(layers, 1).unflatten(-1, (side, side)), s['seed.fused_cam'])
    return {'seed.boxes': Near(loc.decode_cell(raw.flatten(0, 1).permute(0, 2, 3, 1)).view_as(s['seed.boxes']), 1e-6)}


def earlier_losses(s, config):
    "Matching and losses of the earlier experiment, on its own boxes and on boxes near the truth; its GIoU has 1e-6 on the areas."
    rows = {}
    for name in ('seed', 'seed2'):
        given = s[f'{name}.boxes'].clone().requires_grad_(); boxes, pair, *_ = pairs_of(s, given); pred = given.flatten(0, 1)
        found = loc.match(pred, boxes, pair, 'cell', 1.5, .3); terms = loc.box_losses(pred, boxes, pair, found, 'cell', pad=1e-6); loss = terms['l1'] + 2 * terms['giou']; loss.backward()
        rows |= {f'{name}.num_pos': Same(torch.tensor(len(found.box))), f'{name}.loss_l1': Near(terms['l1'].detach(), 1e-5), f'{name}.loss_giou': Near(terms['giou'].detach(), 1e-5), f'{name}.loss_total': Near(loss.detach(), 1e-5), f'{name}.grad_boxes': Near(given.grad, 1e-5)}
    return rows


def evaluated(s, config):
    "Every object's and every pair's IoU under each choice of a box, and the shares above three thresholds."
    rows = {}
    for name, own in dict(v2='v2.pred_boxes', v2e='v2e.pred_boxes').items():
        pred = s[own]; boxes, pair, image, within = pairs_of(s, pred); classes = pred.shape[1]
        found = sc.box_rows(pred.flatten(0, 1), s[f'{name}.cam'].flatten(0, 1), boxes, pair)
        rows |= {f'{name}.eval_rows': Near(torch.cat([torch.stack([image, within, pair % classes], 1).float(), found.objects[:, :3]], 1), 1e-6),
                 f'{name}.eval_top1': Near(torch.stack([found.pairs // classes, found.pairs % classes, found.top1], 1), 1e-6)}
        tables = sc.box_summary(sc.count_boxes(found, pair % classes, found.pairs % classes, (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt() * 800, classes), [str(c) for c in range(classes)])
        for ours, stored in dict(oracle='oracle', local='local', centre='centre', cam_top1='top1').items():
            for kind, word in (('micro', 'acc'), ('macro', 'macro')):
                rows |= {f'{name}.{word}_{stored}_{cut}': Near(torch.tensor(tables[ours][kind][f'acc@{cut}']), 1e-6) for cut in (.3, .5, .7)}
    return {k: v for k, v in rows.items() if k in s}


def head_rows(stored, config):
    "('head', name) -> recomputed tensor with its tolerance."
    s, found = stored['head'], {}
    for form in (overlaps, cell_centred, earlier_head, earlier_losses, evaluated): found |= form(s, config)
    return {('head', k): v for k, v in found.items()}


def compute(stored, config):
    "(file stem, name) -> recomputed tensor with its tolerance."
    return map_rows(stored, config) | head_rows(stored, config)
