"""Makes the committed records of results/ that no lesson and no command makes: trains, scores the test split once, writes.

    python tools/make_results.py ablation      the small recipe with one thing changed, three seeds (25 CPU-minutes)
    python tools/make_results.py protocols     every inference protocol on the small recipe, three seeds (10 CPU-minutes)
    python tools/make_results.py cost [--method affinity]     a few updates of the recipes at full size, a process each (6 CPU-minutes)

Runs are kept under out/results and taken up again where a call was interrupted; --out DIR writes elsewhere than results/METHOD.
"""
import argparse, json, multiprocessing, shutil, sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (0, 1, 2)
CHANGED = {'gate dot, 72 patches as tails': dict(gate='dot', tails='patches', neighbours=72), 'URE at the centre': dict(ure_anchor='centre'),
           'without CRE': dict(w_cre=0.), 'without URE': dict(w_ure=0.), 'without GCR': dict(gcr=False)}  # Of LAPTOP


def scored(cfg, folder):
    "Test records of one run of the demo's form, from its folder if it is there."
    from wsl_nb.metrics import read_results, write_results
    from wsl_nb.more_recipe import train_and_score
    file = folder / 'scores.json'
    if not file.exists():
        shutil.rmtree(folder, ignore_errors=True)
        write_results(file, train_and_score(cfg, folder))
    return read_results(file)


def ablation(runs, out):
    "LAPTOP with one thing changed."
    from wsl_nb.data import embedded_of
    from wsl_nb import more_recipe
    from wsl_nb.more_base import LAPTOP
    from wsl_nb.training_ablate import ablate, folder_name
    runs = runs / 'ablation'
    ablate(more_recipe, LAPTOP, CHANGED, embedded_of, runs, SEEDS, 'test', 'last', (runs / 'ablation.json').exists(), 'LAPTOP')
    shutil.copy(runs / 'result.json', out)
    for name in CHANGED: shutil.copy(runs / folder_name(name) / 'seed0' / 'config.yaml', out / f'config_{name.replace(", ", "_").replace(" ", "_")}.yaml')


def protocols(runs, out):
    "Every protocol on the runs of LAPTOP."
    from wsl_nb.metrics import write_results
    from wsl_nb.more_base import LAPTOP
    from wsl_nb.more_protocols import PROTOCOLS, evaluate_protocols, every_switch
    from wsl_nb.data import embedded_of
    from wsl_nb.more_recipe import load_run
    from wsl_nb.training_ablate import joined
    per_seed, data = [], embedded_of(LAPTOP)
    for s in SEEDS:
        cfg, folder = replace(LAPTOP, seed=s), runs / 'laptop' / f'seed{s}'
        scored(cfg, folder)
        found = evaluate_protocols(load_run(folder, len(data.classes))[0], data.split('test'), cfg, every_switch() | dict(cam2seg_test=PROTOCOLS['cam2seg_test']))
        per_seed.append([replace(r, run=f'laptop/seed{s}') for rows in found.values() for r in rows])
    write_results(out / 'result.json', joined(per_seed))
    shutil.copy(runs / 'laptop' / 'seed0' / 'config.yaml', out / 'config.yaml')


COST = dict(more=(('VOC', 'COCO'), 1), affinity=(('PET',), 2))  # Method -> its recipes at full size, images an update


def one_cost(name, preset, batch):
    "Cost of one recipe, in a process of its own so that its memory is its own."
    from wsl_nb.cli import method, presets
    module = method(name); torch.set_num_threads(1)
    return module.step_cost(presets(module)[preset], batch=batch)


def cost(runs, out, name='more'):
    "Seconds and memory of single updates."
    from wsl_nb import __version__
    from wsl_nb.metrics import _commit
    rows, (recipes, batch) = [], COST[name]
    for preset in recipes:
        with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as pool: rows.append(pool.submit(one_cost, name, preset, batch).result())
    found = dict(kind='cost', version=__version__, commit=_commit(), torch=torch.__version__, date=datetime.now(timezone.utc).isoformat(timespec='seconds'), rows=rows)
    (out / 'result.json').write_text(json.dumps(found, indent=1) + '\n', encoding='utf-8')


def main():
    "Command line; see the top of this file."
    kinds = dict(ablation=ablation, protocols=protocols, cost=cost)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('kind', choices=list(kinds)); parser.add_argument('--method', choices=list(COST), default='more'); parser.add_argument('--out', type=Path)
    args = parser.parse_args(); torch.set_num_threads(1)
    if args.method != 'more' and args.kind != 'cost': parser.error(f'{args.kind} is for more; the records of {args.method} are made by wsl-nb demo and wsl-nb ablate')
    out = (args.out or ROOT / 'results' / args.method) / args.kind; out.mkdir(parents=True, exist_ok=True)
    kinds[args.kind](ROOT / 'out' / 'results', out, *([args.method] if args.kind == 'cost' else [])); print(f'wrote {out}')


if __name__ == '__main__': sys.exit(main())
