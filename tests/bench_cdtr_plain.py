"""CDTR's training step as the released code takes it: the whole attention of all blocks in one tensor, CLIP with gradients, two image and two text passes.

The network itself is `reference_cdtr.PlainCDTR`; the plain form of the threshold sweep is in `bench_cdtr_sweep`.
"""
import torch
import torch.nn.functional as F

from reference_cdtr import plain_clip_loss, plain_losses, plain_object_map, plain_total


def plain_similarity(clip, image, words):
    "Cosine of each image with its sentence: one image pass, one text pass."
    seen, said = clip.encode_image(image), clip.encode_text(clip.tokenizer(words).to(image.device))
    return (F.normalize(seen, dim=1) * F.normalize(said, dim=1)).sum(1)


def plain_step(model, clip, image, target, words, cfg):
    "(losses, total) of a batch by released names; sentence i goes with image i."
    found = model(image)
    wide = F.interpolate(plain_object_map(found, target, cfg.object_map == 'minmax'), size=image.shape[-2:], mode='bilinear', align_corners=True)
    fore, back = (plain_similarity(clip, mask * image, words) for mask in (wide, 1 - wide))
    terms = plain_losses(found, target, cfg.area) | dict(loss_clip=plain_clip_loss(fore, back))
    return terms, plain_total(terms, model.AutomaticWeightedLoss.params, cfg.w_sba)


def whole_attention(model, image):
    "(tokens after the last block, (L,B,K,1+N,1+N)) of `PlainCDTR`."
    x, kept = model.patch_embed.proj(image).flatten(2).transpose(1, 2), []
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x], 1) + model.pos_embed
    for block in model.blocks:
        x, seen = block(x); kept.append(seen)
    return x, torch.stack(kept)
