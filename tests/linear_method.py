"""The smallest method that obeys the contracts of a method module: a linear classifier with a second term that starts late."""
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from wsl_nb import core, training


@dataclass(frozen=True)
class LinearConfig(training.RunConfig):
    "Recipe of the linear classifier."
    size: int = 6 # Pixels of a side
    dropout: float = 0. # Draws from the global generator
    late_from: int = 4 # Step at which the second term starts
    classes: int = 3 # Of the tiny data
    images: int = 22 # Of the tiny data
    poison: str = '' # Parameter filled with NaN at step 3, '': none


class Linear(nn.Module):
    "Two heads on normalised pixels; the second learns only when its term is active."
    def __init__(self, cfg, classes):
        super().__init__()
        width, generator = 3 * cfg.size ** 2, core.torch_rng(cfg.seed, 'init')
        self.norm, self.drop = nn.BatchNorm1d(width), nn.Dropout(cfg.dropout)
        self.cls, self.late = nn.Linear(width, classes), nn.Linear(width, classes)
        for p in (self.cls.weight, self.late.weight): nn.init.normal_(p, std=0.02, generator=generator)
        for p in (self.cls.bias, self.late.bias): nn.init.zeros_(p)

    def forward(self, image): return self.drop(self.norm(image.flatten(1)))


class Tiny:
    "Split look-alike: a bright channel tells the class; noise and flip come from the generator."
    def __init__(self, cfg): self.cfg, self.classes, self.ids = cfg, [f'c{i}' for i in range(cfg.classes)], [f'img_{i}' for i in range(cfg.images)]
    def __len__(self): return self.cfg.images
    def __getitem__(self, index): return self.sample(index, core.rng('item', index))

    def sample(self, index, generator):
        image = core.rng('pixels', index).normal(size=(3, self.cfg.size, self.cfg.size)) * 0.3 + 0.1 * generator.normal()
        image[index % self.cfg.classes] += 1
        if generator.random() < 0.5: image = image[..., ::-1].copy()
        return dict(id=self.ids[index], index=index, image=torch.tensor(image, dtype=torch.float32), size=(self.cfg.size,) * 2,
                    label=F.one_hot(torch.tensor(index % self.cfg.classes), self.cfg.classes).float())


def weights(cfg, step): return dict(cls=1.) | (dict(late=0.5) if step >= cfg.late_from else {})
def total(terms, model, step, cfg): return sum(w * terms[k] for k, w in weights(cfg, step).items())
def groups(model, cfg): return [dict(params=[*model.norm.parameters(), *model.cls.parameters()]), dict(params=list(model.late.parameters()), lr=10 * cfg.lr)]


def losses(model, batch, step, cfg, **extra):
    x = model(batch['image'])
    out = dict(cls=F.multilabel_soft_margin_loss(model.cls(x).float(), batch['label']))
    if 'late' in weights(cfg, step): out['late'] = F.multilabel_soft_margin_loss(model.late(x).float(), batch['label'])
    return out


def evaluate(model, split, cfg):
    model.eval()
    hits = torch.zeros(2)
    for batch in training.each_once(split, 8):
        with torch.no_grad(): right = model.cls(model(batch['image'])).argmax(1) == batch['label'].argmax(1)
        hits += torch.tensor([right.sum(), len(right)])
    hits = training.sum_processes(hits)
    return [dict(metric='accuracy', value=(hits[0] / hits[1]).item(), images=int(hits[1]))]


def train(cfg, data, out, resume=False):
    model = Linear(cfg, cfg.classes)
    run = training.Run(cfg, out, resume, model, groups(model, cfg), training.lr_factor, data)
    for step, batch in run:
        if step == 3 and cfg.poison: plant(run.model, cfg.poison)
        with run.forward(): terms = losses(run.model, batch, step, cfg)
        run.update(terms, total(terms, run.model, step, cfg), weights(cfg, step))
        if run.due('evaluate'): run.record(evaluate(run.plain_model, data, cfg))
    return run.close()


def plant(model, name): model.get_parameter(name).data.view(-1)[0] = float('nan')
