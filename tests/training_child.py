"""A training run in its own process, for kills, Ctrl-C and process groups.

Usage: python training_child.py METHOD OUT [--pause SECONDS] [field=value …]. Resumes if OUT has begun.
"""
import ast, dataclasses, pathlib, sys, time
from dataclasses import replace

import torch

from wsl_nb import affinity_base, cdtr_base, fsgr_base, surgery_base, training
from wsl_nb.data import embedded
from wsl_nb.more_base import LAPTOP


def linear():
    "Module, tiny config, function config -> data."
    import linear_method
    cfg = linear_method.LinearConfig(steps=24, batch=2, lr=0.01, lr_max=0.2, warmup=3, dropout=0.2, checkpoint_every=3, evaluate_every=6, log_every=1, clip=1.)
    return linear_method, cfg, linear_method.Tiny


MORE_TINY = replace(LAPTOP, data_preset='small', data_train=12, data_eval=2, dim=16, depth=3, heads=2, side=8, mlp_ratio=2., crop=64, decoder_dim=16, scales=(1., .5), w_reg=.05,
                    ptc_from=2, lir_from=1, seg_from=5, switch=7, steps=12, batch=2, lr=1e-3, checkpoint_every=3, log_every=1) # Every term and both sides of every switch in twelve steps


def more():
    "MoRe at the size of a stamp, on drawn images."
    from wsl_nb import more_recipe
    return more_recipe, MORE_TINY, lambda cfg: embedded(cfg.data_preset, size=cfg.crop, train=cfg.data_train, val=cfg.data_eval, test=0)


AFFINITY_TINY = replace(affinity_base.LAPTOP, data_train=12, data_eval=2, crop=64, scales=(1., .5), walk_steps=8, steps=4, batch=2, checkpoint_every=2, log_every=1) # All five stages in two seconds


def affinity():
    "AffinityNet at the size of a stamp, on drawn images."
    from wsl_nb import affinity_recipe
    return affinity_recipe, AFFINITY_TINY, lambda cfg: embedded(cfg.data_preset, size=cfg.crop, train=cfg.data_train, val=cfg.data_eval, test=0)


CDTR_TINY = replace(cdtr_base.LAPTOP, init='', data_train=16, data_eval=4, dim=16, depth=3, heads=2, ocm_blocks=2, csm_width=2, side=8, mlp_ratio=2., drop_path=.1, crop=64, resize=72, augment='rand-m9-mstd0.5-inc1', erase=.25,
                    steps=10, batch=2, lr=1e-3, lr_min=1e-5, checkpoint_every=2, log_every=1) # Every term, every augmentation, the shipped CLIP


def cdtr():
    "CDTR at the size of a stamp, on drawn images with one object each."
    from wsl_nb import cdtr_recipe
    return cdtr_recipe, CDTR_TINY, lambda cfg: embedded(cfg.data_preset, size=cfg.crop, train=cfg.data_train, val=cfg.data_eval, test=cfg.data_eval)


SURGERY_TINY = replace(surgery_base.LAPTOP, data_train=12, data_eval=4, width=16, steps=10, batch=2, warmup=2, checkpoint_every=2, log_every=1) # The head on features of the shipped CLIP, kept in memory


def surgery():
    "The localisation head at the size of a stamp, on drawn images."
    from wsl_nb import surgery_recipe
    return surgery_recipe, SURGERY_TINY, lambda cfg: embedded(cfg.data_preset, size=96, train=cfg.data_train, val=cfg.data_eval, test=cfg.data_eval)


FSGR_TINY = replace(fsgr_base.LAPTOP, data_train=12, data_eval=4, steps=6, batch=2, memory=4, memory_bank=64, memory_every=2, evaluate_every=3, checkpoint_every=2, log_every=1, words=8) # Both stages, contrast, noise and a memory


def fsgr():
    "A captioner at the size of a stamp, on drawn scenes."
    from wsl_nb import fsgr_training
    return fsgr_training, FSGR_TINY, lambda cfg: embedded(cfg.data_preset, size=96, train=cfg.data_train, val=cfg.data_eval, test=cfg.data_eval)


METHODS = dict(linear=linear, more=more, affinity=affinity, cdtr=cdtr, surgery=surgery, fsgr=fsgr) # a method joins here with a config of some seconds


def prepare(method, changes):
    "Module, config with changes, data."
    module, cfg, data = METHODS[method]()
    cfg = dataclasses.replace(cfg, **changes)
    return module, cfg, data(cfg)


def value(text):
    "A Python literal, or the text itself."
    try: return ast.literal_eval(text)
    except (ValueError, SyntaxError): return text


def slow_files(pause):
    "A pause before each label file."
    from wsl_nb import affinity_labels
    old = affinity_labels.crf_many
    affinity_labels.crf_many = lambda *args, **kwargs: (time.sleep(pause) or found for found in old(*args, **kwargs))


def main(method, out, *rest):
    "Trains; a pause after each update, and before each file of a stage that writes files, leaves time for a kill."
    pause = float(rest[rest.index('--pause') + 1]) if '--pause' in rest else 0.
    module, cfg, data = prepare(method, {k: value(v) for k, v in (r.split('=', 1) for r in rest if '=' in r)})
    update = training.Run.update
    def slow(self, *args, **kwargs): update(self, *args, **kwargs); time.sleep(pause)
    training.Run.update = slow
    if method == 'affinity': slow_files(pause)
    torch.set_num_threads(1)
    return module.train(cfg, data, pathlib.Path(out), resume=(pathlib.Path(out)/'config.yaml').exists())


if __name__ == '__main__':
    main(*sys.argv[1:])
