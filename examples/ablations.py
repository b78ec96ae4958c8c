"""What each choice of the method is worth on the toy: one table. First run examples/toy.py, then

    python examples/ablations.py --toy runs/toy
    python examples/ablations.py --toy runs/grid --grid    (a world of its own: before it,
                                                  examples/toy.py --seed 103 --out runs/grid)

Stage 1: both terms of L_SRT or one of them, and the authors' order of the two, all on the traces
that runs/toy/srt has sampled. Stage 2: objective, alpha and teacher, all from runs/toy/srt. --grid
shows the learning rates instead, of both stages and of the baselines. One seed; what is finished is
not run again.

World 0 (2 cores, 2026-11-26, commit 53f839f), accuracy in %; read large differences only:

| stage 1           |      | stage 2               |      | stage 2                       |      |
| ----------------- | ---- | --------------------- | ---- | ----------------------------- | ---- |
| both terms        | 89.4 | reverse KL, base      | 95.3 | sampled_token                 | 81.2 |
| L_generation only | 89.0 | Jensen-Shannon, 0.5   | 95.0 | teacher ema, 0.05             | 85.7 |
| L_revision only   | 63.9 | forward KL            | 94.8 | teacher synced every 25 steps | 95.0 |
| one, then other   | 85.4 | top-8                 | 95.5 | teacher live                  | 2.7  |
|                   |      | mixed KL, half, half  | 94.8 |                               |      |

Learning rates, on the worlds on which the task was designed: SD-Zero on world 100 at 3e-4 and 1e-3:
99.0 and 99.3; GRPO on worlds 100 and 102 at 3e-4: 64.5 and 69.5, at 1e-3: 93.0 and 90.7; on world
102 at 2e-5, 5e-5 and 1e-4 SDFT: 74.4, 87.4, 56.2, and SDPO: 57.2, 65.0, 74.1. In use are 3e-4,
1e-3, 5e-5 and 1e-4: of GRPO and SDPO the highest that were tried.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import toy

TERMS = {
    "both terms (default)": "both",
    "L_generation only": "generation",
    "L_revision only": "revision",
    "L_generation on wrong, then L_revision": "sequential",
}
SYNCED = ["--teacher", "ema", "--teacher-rate", 1, "--teacher-interval", 25]
STAGE_2 = {
    "full_logits, alpha 1: reverse KL (default)": [],
    "full_logits, alpha 0.5: Jensen-Shannon": ["--alpha", 0.5],
    "full_logits, alpha 0: forward KL": ["--alpha", 0],
    "topk_logits, k 8, alpha 1": ["--objective", "topk_logits", "--topk", 8],
    "sampled_token": ["--objective", "sampled_token"],
    "mixed_kl, half and half": ["--objective", "mixed_kl"],
    "teacher ema, rate 0.05": ["--teacher", "ema"],
    "teacher synced every 25 steps": SYNCED,
    "teacher live": ["--teacher", "live"],
}
GRID = {
    "srt": (2e-4, 5e-4, 1e-3),
    "sdzero": (1e-4, 3e-4, 1e-3),
    "rft": (2e-4, 5e-4, 1e-3),
    "grpo": (3e-4, 1e-3, 3e-3),
    "sdft": (2e-5, 5e-5, 1e-4),
    "sdpo": (2e-5, 5e-5, 1e-4),
}


def stage_1(folder, output, *flags):
    """The last evaluation of a stage 1 on the traces that the toy's own has sampled."""
    traces = ["--model", folder / "base", "--traces", folder / "srt" / "traces.jsonl"]
    return toy.run("srt.py", folder / "stage1.jsonl", output, *traces, *toy.STAGE_1, *flags)[-1]


def stage_2(folder, output, *flags):
    flags = ["--model", folder / "srt", *toy.STAGE_2, *flags]
    return toy.run("sdzero.py", folder / "stage2.jsonl", output, *flags)[-1]


def ablations(folder, always):
    rows = []
    for name, terms in TERMS.items():
        # the defaults have run already
        output = folder / "srt" if terms == "both" else folder / "ablations" / f"srt-{terms}"
        rows.append(("1", name, stage_1(folder, output, "--terms", terms, *always)))
    for name, flags in STAGE_2.items():
        output = folder / "sdzero"
        if flags:
            output = folder / "ablations" / "-".join(str(flag).strip("-") for flag in flags)
        rows.append(("2", name, stage_2(folder, output, *flags, *always)))
    columns = {title: key for title, key in toy.COLUMNS.items() if key != "correction_rate"}
    print(f"\n| stage | variant | {' | '.join(columns)} |\n| --- | --- |" + " --- |" * len(columns))
    for stage, name, evaluation in rows:
        print(f"| {stage} | {name} | {toy.cells([evaluation], columns)} |")


def grid(folder, always):
    """A table of the held-out accuracy by method and learning rate."""
    print(f"\n| method |{' learning rate: accuracy, % |' * 3}\n{'| --- ' * 4}|")
    for method, rates in GRID.items():
        cells = []
        for lr in rates:
            flags, output = ["--lr", lr, *always], folder / "grid" / f"{method}-{lr}"
            if method == "srt":
                evaluation = stage_1(folder, output, *flags)
            elif method == "sdzero":
                evaluation = stage_2(folder, output, *flags)
            else:
                evaluation = toy.baseline(folder, method, output, *flags)[-1]
            cells.append(f"{lr:g}: {toy.spread([evaluation['accuracy']])}")
        print(f"| {method} | {' | '.join(cells + [''] * (3 - len(cells)))} |", flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Ablations on the toy")
    add = parser.add_argument
    add("--toy", type=Path, default=Path("runs/toy"), help="what toy.py wrote (default: runs/toy)")
    add("--grid", action="store_true", help="the learning rates instead")
    args = parser.parse_args(argv)
    if not all((args.toy / run / "config.json").exists() for run in ("srt", "sdzero")):
        print(f"ablations.py: {args.toy} holds no finished run of toy.py", file=sys.stderr)
        raise SystemExit(2)
    started = time.time()
    settings = json.loads((args.toy / "srt" / "settings.json").read_text())
    always = ["--seed", settings["flags"]["seed"], "--eval-every", 10**6]
    (grid if args.grid else ablations)(args.toy, always)
    print(f"\nseed {always[1]}; {(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
