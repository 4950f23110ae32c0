"""The smallest method in stages: a linear classifier, soft labels that it gives (files only), and a second classifier that learns from them.

`RAN` lists the stages that were run, `STOP` names a stage that is interrupted at its second step, or before its files.
"""
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from wsl_nb import core, metrics
from wsl_nb import training_checkpoint as disk
from wsl_nb.core import normalise
from wsl_nb.training import Run, RunConfig, each_once, lr_factor
from wsl_nb.training_config import check_config, stage_done, stage_hash

STAGES, RAN, STOP = ('classifier', 'labels', 'segment'), [], []


@dataclass(frozen=True)
class StagedConfig(RunConfig):
    "Recipe of the three stages."
    layout: str = 'embedded' # Layout of the data
    data_preset: str = 'small' # Preset of the embedded data
    data_train: int = 16 # Images to learn from
    data_eval: int = 6 # Images of val and test
    eval_split: str = 'val' # Split that is scored
    grid: int = 4 # Cells a side of the mean colours
    sharp: float = 1. # Factor of the logits before they become labels
    rounds: int = 2 # Updates of the last stage
    hard: bool = False # Labels 0 and 1 instead of probabilities
    steps: int = 2 # Updates of the first stage
    batch: int = 4 # Images
    lr: float = 1e-3 # Step size


LAPTOP = StagedConfig()
VOC = replace(LAPTOP, layout='voc')


class Staged(nn.Module):
    "Both classifiers on the mean colours of a grid."
    def __init__(self, cfg, classes):
        super().__init__()
        width = 3 * cfg.grid ** 2
        self.grid, self.classifier, self.segment = cfg.grid, nn.Linear(width, classes), nn.Linear(width, classes)

    def forward(self, image, part): return getattr(self, part)(F.adaptive_avg_pool2d(image, self.grid).flatten(1))


def check_recipe(cfg, data):
    core.require(cfg.grid > 0, f'grid {cfg.grid}', '1 or more', 'say --grid N')
    for steps in (cfg.steps, cfg.rounds): check_config(replace(cfg, steps=steps))


def stage_hashes(cfg, data):
    first = stage_hash(cfg, ('steps', 'batch', 'lr', 'seed', 'grid'), (data.hash,))
    second = stage_hash(cfg, ('sharp', 'hard'), (first,))
    return dict(classifier=first, labels=second, segment=stage_hash(cfg, ('rounds',), (second,)))


def view(sample, generator): return sample | {'image': normalise(sample['image'])}


def stage_model(cfg, data):
    core.seed_everything(cfg.seed, 'weights')
    return Staged(cfg, len(data.classes))


def train_stage(stage, cfg, data, out, hash, target):
    "Trains one of the two classifiers in out/<stage>."
    model = stage_model(cfg, data)
    run = Run(cfg, out / stage, (out / stage / 'config.yaml').exists(), model, [dict(params=list(getattr(model, stage).parameters()))], lr_factor,
              data.split('train', ('image', 'label'), view), stage, hash, say=lambda *text: None)
    for step, batch in run:
        if stage in STOP and step == 1: raise KeyboardInterrupt
        loss = F.binary_cross_entropy_with_logits(run.model(batch['image'], stage), target(batch))
        run.update(dict(bce=loss), loss, dict(bce=1.))
    return run.close()


def write_labels(cfg, data, out, hash):
    "Files only, written in place as careless code does."
    if 'labels' in STOP: raise KeyboardInterrupt
    model, split, folder = stage_model(cfg, data), data.split('train', ('image', 'label'), view), out / 'labels'
    disk.load_model(model, disk.checkpoint(out / 'classifier')); folder.mkdir(exist_ok=True)
    for batch in each_once(split, 8):
        with torch.no_grad(): soft = (cfg.sharp * model(batch['image'], 'classifier')).sigmoid() * batch['label']
        for i, row in zip(batch['index'].tolist(), (soft > .5).float() if cfg.hard else soft):
            with open(folder / f'{i}.npy', 'wb') as f: np.save(f, row.numpy())
    disk.write_part(folder / 'result.json', dict(finished=True, stage_hash=hash))


def train(cfg, data, out, resume=False):
    out = Path(out); out.mkdir(parents=True, exist_ok=True)
    core.require(resume or not (out / 'config.yaml').exists(), f'{out} with config.yaml', 'a new folder', 'say --resume')
    disk.write_part(out / 'config.yaml', disk.as_plain(cfg)); disk.write_part(out / 'classes.json', list(data.classes))
    hashes = stage_hashes(cfg, data)
    for stage in STAGES:
        if stage_done(out / stage, hashes[stage]): continue
        RAN.append(stage)
        if stage == 'classifier': train_stage(stage, cfg, data, out, hashes[stage], lambda b: b['label'])
        if stage == 'labels': write_labels(cfg, data, out, hashes[stage])
        if stage == 'segment': train_stage(stage, replace(cfg, steps=cfg.rounds), data, out, hashes[stage], lambda b: torch.stack([torch.from_numpy(np.load(out / 'labels' / f'{i}.npy')) for i in b['index'].tolist()]))
    result = dict(finished=True, records=[], seconds=0., stages=hashes); disk.write_part(out / 'result.json', result)
    return result


def load_run(run, classes, which='best'):
    cfg = disk.read_config(Path(run) / 'config.yaml', StagedConfig); model = Staged(cfg, classes)
    for stage in ('classifier', 'segment'):
        state = disk.read_parts(disk.checkpoint(Path(run) / stage))['model.safetensors']
        getattr(model, stage).load_state_dict({k.removeprefix(f'{stage}.'): v for k, v in state.items() if k.startswith(f'{stage}.')})
    return model.eval(), cfg


def from_weights(cfg, classes, file):
    "A file of the first classifier alone, which also stands for the second."
    from safetensors.torch import load_file
    model, state = Staged(cfg, classes), {k.removeprefix('classifier.'): v for k, v in load_file(file).items() if k.startswith('classifier.')}
    model.classifier.load_state_dict(state); model.segment.load_state_dict(state)
    return model


def evaluate(model, split, cfg):
    loss = 0.
    for batch in each_once(split.view(('image', 'label'), view), 8):
        with torch.no_grad(): loss += F.binary_cross_entropy_with_logits(model(batch['image'], 'segment'), batch['label'], reduction='sum').item()
    about = dict(unit='nats', images=len(split), seeds=cfg.seed, preset='LAPTOP', config_hash=core.text_hash(disk.as_plain(cfg)), weights_hash=core.state_hash(model.state_dict()),
                 data_hash=split.hash, subset=split.subset, seconds=0., cpu_seconds=0.)
    return [metrics.record('staged', split.dataset, split.name, 'cross entropy', loss / len(split), **about)]


def predict(model, images, cfg):
    found = []
    for image in images:
        x = normalise(torch.from_numpy(image.copy()).float().permute(2, 0, 1) / 255)[None]
        with torch.no_grad(): scores = model(x, 'segment')[0]
        found.append(dict(scores=scores.numpy(), maps=scores.sigmoid()[:, None, None].expand(-1, *image.shape[:2]).numpy(), labels=np.full(image.shape[:2], scores.argmax() + 1, np.uint8)))
    return found


def step_cost(cfg, classes=None, batch=None, repeats=2):
    return dict(preset='LAPTOP', device='cpu', threads=1, batch=batch or cfg.batch, phases=[('classifier', cfg.steps), ('segment', cfg.rounds)], seconds=[1., 3.], gigabytes=1.)


def cost_rows(measured): return [dict(recipe=m['preset'], stages=' / '.join(n for n, _ in m['phases'])) for m in measured]
