"""Makes the committed records of results/ that no lesson and no command makes: trains, scores the test split once, writes.

    python tools/make_results.py ablation      the small recipe with one thing changed, three seeds (25 CPU-minutes)
    python tools/make_results.py protocols     every inference protocol on the small recipe, three seeds (10 CPU-minutes)
    python tools/make_results.py cost [--method affinity]     a few updates of the recipes at full size, a process each (6 CPU-minutes)
    python tools/make_results.py ablation --method cdtr       sixteen variants of CATR and CDTR, three seeds, two processes (110 CPU-minutes)
    python tools/make_results.py demo --method cdtr           the table of `wsl-nb demo cdtr` over three seeds, from those runs (1 second)
    python tools/make_results.py claims --method cdtr         measures in those runs, then a verdict for each claim (6 CPU-minutes)
    python tools/make_results.py claims --method surgery      four trainings of the small CLIP and of three heads, then the verdicts (45 CPU-minutes)
    python tools/make_results.py demo --method fsgr           the table of `wsl-nb demo fsgr` over three seeds (20 CPU-minutes)
    python tools/make_results.py claims --method fsgr         every variant of the captioner from three seeds, after the demo (45 CPU-minutes)
    python tools/make_results.py demo --method surgery        the tables of `wsl-nb demo surgery` over three seeds (10 CPU-minutes)

The ablation of cdtr begins with the four variants that most claims rest on (25 CPU-minutes); `--only tokens CATR` trains these alone.
Runs are kept under out/results and taken up again where a call was interrupted, also after a change of the code: delete that folder to measure anew. --out DIR writes elsewhere than results/METHOD.
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


def keep_config(runs, name, out):
    "The recipe of a variant's first seed beside its record."
    from wsl_nb.training_ablate import folder_name
    shutil.copy(runs / folder_name(name) / 'seed0' / 'config.yaml', out / f'config_{name.replace(", ", "_").replace(" ", "_")}.yaml')


def ablation(runs, out):
    "LAPTOP with one thing changed."
    from wsl_nb.data import embedded_of
    from wsl_nb import more_recipe
    from wsl_nb.more_base import LAPTOP
    from wsl_nb.training_ablate import ablate
    runs = runs / 'ablation'
    ablate(more_recipe, LAPTOP, CHANGED, embedded_of, runs, SEEDS, 'test', 'last', (runs / 'ablation.json').exists(), 'LAPTOP')
    shutil.copy(runs / 'result.json', out)
    for name in CHANGED: keep_config(runs, name, out)


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


CDTR_WORKERS = 2  # Processes of one thread


def one_variant(name, seed, runs):
    "One variant of CDTR from one seed, trained and scored, in a process of its own."
    from wsl_nb.cdtr_variants import run_variants
    torch.set_num_threads(1); run_variants(runs, (name,), (seed,), lambda *text: print(*text, flush=True))


def measured(run):
    "Measures of one run, in a process of its own."
    from wsl_nb.cdtr_variants import measure_run
    torch.set_num_threads(1); measure_run(run)


def side_by_side(work, jobs):
    "Calls of a function in two processes, begun in this order; the first fault ends all."
    with ProcessPoolExecutor(CDTR_WORKERS, multiprocessing.get_context('spawn')) as pool:
        done = [pool.submit(work, *job) for job in jobs]
        try:
            for f in done: f.result()
        except BaseException: pool.shutdown(cancel_futures=True); raise


def cdtr_ablation(runs, out, only=()):
    "CATR and CDTR with one thing changed each."
    from wsl_nb.cdtr_variants import VARIANTS, run_variants
    from wsl_nb.training_ablate import folder_name
    runs, names = runs / 'cdtr', tuple(only) or tuple(VARIANTS)
    run_variants(runs, ())  # the folder, before several processes write into it
    side_by_side(one_variant, [(n, s, runs) for n in names for s in SEEDS])
    ready = tuple(n for n in VARIANTS if all((runs / folder_name(n) / f'seed{s}' / 'scores.json').exists() for s in SEEDS))
    run_variants(runs, ready, SEEDS)
    shutil.copy(runs / 'result.json', out)
    for n in ready: keep_config(runs, n, out)


def cdtr_demo(runs, out, only=()):
    "The records of `wsl-nb demo cdtr --seeds 0,1,2`, from the runs of the ablation, which train the same recipes."
    from wsl_nb.cdtr_recipe import DEMO
    from wsl_nb.metrics import combine, read_results, write_results
    rows = []
    for name in DEMO:
        seeds = [read_results(runs / 'cdtr' / name / f'seed{s}' / 'scores.json') for s in SEEDS]
        rows += [combine(same) for same in zip(*seeds)]
        keep_config(runs / 'cdtr', name, out)
    write_results(out / 'result.json', rows)
    kept = {name: {f'seed{s}': json.loads((runs / 'cdtr' / name / f'seed{s}' / 'taus.json').read_text()) for s in SEEDS} for name in DEMO}
    (out / 'taus.json').write_text(json.dumps(kept, indent=1) + '\n', encoding='utf-8')


def cdtr_claims(runs, out, only=()):
    "Measures of every run that is there, then the verdicts."
    from wsl_nb.cdtr_claims import run_claims
    from wsl_nb.viz import markdown_table
    from wsl_nb.training_records import verdict_rows
    side_by_side(measured, [(f.parent,) for f in sorted((runs / 'cdtr').glob('*/seed*/scores.json'))])
    print(markdown_table(verdict_rows(run_claims(runs / 'cdtr', out / 'result.json', SEEDS))))


def heads_told(seed, folder):
    "What `score_heads` says of a seed, from its folder if it is there."
    from wsl_nb.surgery_claims import score_heads
    file = folder / 'told.json'
    if not file.exists():
        shutil.rmtree(folder, ignore_errors=True)
        told = score_heads(seed, folder); file.write_text(json.dumps(told))
    return json.loads(file.read_text())


def surgery_claims(runs, out):
    "Maps of four trainings of the small CLIP, heads of four seeds, then the verdicts."
    from wsl_nb.pretrain_clip import trained_clip
    from wsl_nb.surgery_claims import SEEDS as seeds, head_claims, map_claims, score_seeds
    from wsl_nb.training_records import verdict_rows, write_findings
    from wsl_nb.viz import markdown_table
    maps = map_claims(score_seeds(trained_clip(s, runs / 'clips') for s in seeds))
    heads = head_claims([heads_told(s, runs / 'surgery' / 'heads' / f'seed{s}') for s in seeds])
    print(markdown_table(verdict_rows(write_findings(out / 'result.json', maps + heads))))


def surgery_demo(runs, out):
    "The records of `wsl-nb demo surgery --seeds 0,1,2`, and the recipes of both heads."
    from wsl_nb.surgery_demo import DEMO, demo
    folder = runs / 'surgery' / 'demo'
    if not (folder / 'result.json').exists(): shutil.rmtree(folder, ignore_errors=True); demo(folder, SEEDS)
    shutil.copy(folder / 'result.json', out)
    for name in DEMO: keep_config(folder, name, out)


def fsgr_demo(runs, out):
    "The records of `wsl-nb demo fsgr --seeds 0,1,2`, and the recipes of both captioners."
    from wsl_nb.fsgr_demo import DEMO, demo
    folder = runs / 'fsgr' / 'demo'
    if not (folder / 'result.json').exists(): shutil.rmtree(folder, ignore_errors=True); demo(folder, SEEDS)
    shutil.copy(folder / 'result.json', out)
    for name in DEMO: keep_config(folder, name, out)


def captioner_told(name, seed, folder):
    "What `score_variant` says of a variant and a seed, from its folder if it is there."
    from wsl_nb.fsgr_claims import VARIANTS, score_variant
    file = folder / 'told.json'
    if not file.exists(): told = score_variant(replace(VARIANTS[name], seed=seed), folder); file.write_text(json.dumps(told))
    return json.loads(file.read_text())


def fsgr_claims(runs, out):
    "Captioners of every variant from three seeds, those of the demo read where they are, then the verdicts."
    from wsl_nb.fsgr_claims import VARIANTS, caption_claims
    from wsl_nb.fsgr_demo import DEMO
    from wsl_nb.training_ablate import folder_name
    from wsl_nb.training_records import verdict_rows, write_findings
    from wsl_nb.viz import markdown_table
    place = lambda n, s: runs / 'fsgr' / ('demo' if n in DEMO else 'variants') / folder_name(n) / f'seed{s}'
    jobs = [(n, s, place(n, s)) for s in SEEDS for n in VARIANTS]; side_by_side(captioner_told, jobs)
    found = {n: [captioner_told(n, s, place(n, s)) for s in SEEDS] for n in VARIANTS}
    print(markdown_table(verdict_rows(write_findings(out / 'result.json', caption_claims(found)))))


COST = dict(more=(('VOC', 'COCO'), 1), affinity=(('PET',), 2), surgery=(('DIOR', 'DIOR_EARLIER', 'VHR10'), 2), fsgr=(('COCO', 'COCO_OFFICIAL'), 2))  # Method -> its recipes at full size, images an update


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


KINDS = dict(ablation=dict(more=ablation, cdtr=cdtr_ablation), protocols=dict(more=protocols), cost={m: cost for m in COST}, claims=dict(cdtr=cdtr_claims, surgery=surgery_claims, fsgr=fsgr_claims), demo=dict(cdtr=cdtr_demo, surgery=surgery_demo, fsgr=fsgr_demo))  # Kind -> method -> what makes it


def main():
    "Command line; see the top of this file."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kind', choices=list(KINDS)); parser.add_argument('--method', choices=sorted({m for ms in KINDS.values() for m in ms})); parser.add_argument('--out', type=Path)
    parser.add_argument('--only', nargs='+', default=(), metavar='VARIANT', help='variants of the ablation of cdtr')
    args = parser.parse_args(); torch.set_num_threads(1); made = KINDS[args.kind]
    name = args.method or next(iter(made))
    if name not in made: parser.error(f'{args.kind} is for {" and ".join(made)}; the other records of {name} are made by wsl-nb demo and wsl-nb ablate')
    if args.only and made[name] is not cdtr_ablation: parser.error('--only is for ablation --method cdtr')
    out = (args.out or ROOT / 'results' / name) / args.kind; out.mkdir(parents=True, exist_ok=True)
    made[name](ROOT / 'out' / 'results', out, *([name] if args.kind == 'cost' else [args.only] if name == 'cdtr' else [])); print(f'wrote {out}')


if __name__ == '__main__': sys.exit(main())
