"""What each choice of the method is worth, on the toy: one table, from the real scripts. First run examples/toy.py, then

    python examples/ablations.py --toy runs/toy
    python examples/ablations.py --toy runs/grid --grid     (after examples/toy.py --seed 3 --out runs/grid: a world of its own)

Stage 1: both terms of L_SRT or one, and the authors' order of the two, all on the traces that runs/toy/srt has sampled. Stage 2: objective,
alpha and teacher, all from runs/toy/srt, at the toy's learning rates. One seed; what is finished is not run again. --grid: the learning
rates themselves, of both stages and of the baselines, each at the number of responses that toy.py gives it.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import toy

TERMS = {
    "both terms (default)": "both",
    "L_generation alone": "generation",
    "L_revision alone": "revision",
    "L_generation on wrong, then L_revision": "sequential",
}
STAGE_2 = {
    "full_logits, alpha 1: reverse KL (default)": [],
    "full_logits, alpha 0.5: Jensen-Shannon": ["--alpha", 0.5],
    "full_logits, alpha 0: forward KL": ["--alpha", 0],
    "topk_logits, k 8, alpha 1": ["--objective", "topk_logits", "--topk", 8],
    "sampled_token": ["--objective", "sampled_token"],
    "mixed_kl, half and half": ["--objective", "mixed_kl"],
    "teacher ema, rate 0.05": ["--teacher", "ema"],
    "teacher synced every 25 steps": [
        "--teacher",
        "ema",
        "--teacher-rate",
        1,
        "--teacher-interval",
        25,
    ],
    "teacher live": ["--teacher", "live"],
}

GRID = {"srt": (2e-4, 5e-4, 1e-3), "sdzero": (1e-4, 3e-4, 1e-3), "rft": (2e-4, 5e-4, 1e-3), "grpo": (3e-4, 1e-3),
        "sdft": (2e-5, 5e-5, 1e-4), "sdpo": (2e-5, 5e-5, 1e-4)}  # fmt: skip


def grid(folder, always):
    """A table of the held-out accuracy by method and learning rate."""
    print(
        "\n| method | "
        + " | ".join(["learning rate: accuracy, %"] * 3)
        + " |\n"
        + "| --- " * 4
        + "|"
    )
    for method, rates in GRID.items():
        cells = []
        for lr in rates:
            flags, out = ["--lr", lr, *always], folder / "grid" / f"{method}-{lr}"
            if method == "srt":
                traces = ["--traces", folder / "srt" / "traces.jsonl"]
                evals = toy.run(
                    "srt.py",
                    folder,
                    "stage1",
                    "--model",
                    folder / "base",
                    *traces,
                    *toy.STAGE_1,
                    *flags,
                    out,
                )
            elif method == "sdzero":
                evals = toy.run(
                    "sdzero.py",
                    folder,
                    "stage2",
                    "--model",
                    folder / "srt",
                    *toy.STAGE_2,
                    *flags,
                    out,
                )
            else:
                evals = toy.baseline(folder, method, *flags, out)
            cells.append(f"{lr:g}: {toy.spread([evals[-1]['accuracy']])}")
        print(f"| {method} | " + " | ".join(cells + [""] * (3 - len(cells))) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Ablations on the toy")
    parser.add_argument(
        "--toy",
        type=Path,
        default=Path("runs/toy"),
        help="what examples/toy.py wrote (default: runs/toy)",
    )
    parser.add_argument("--grid", action="store_true", help="the learning rates instead")
    args = parser.parse_args()
    if not (args.toy / "sdzero" / "config.json").exists():
        print(
            f"ablations.py: {args.toy} holds no finished run: run examples/toy.py first",
            file=sys.stderr,
        )
        raise SystemExit(2)
    seed, out, started = (
        json.loads((args.toy / "srt" / "settings.json").read_text())["flags"]["seed"],
        args.toy / "ablations",
        time.time(),
    )
    always = ["--seed", seed, "--eval-every", 10**6, "--output"]
    if args.grid:
        return grid(args.toy, always)
    rows = []
    for name, terms in TERMS.items():
        flags = [
            "--model",
            args.toy / "base",
            "--traces",
            args.toy / "srt" / "traces.jsonl",
            *toy.STAGE_1,
            "--terms",
            terms,
        ]
        folder = (
            args.toy / "srt" if terms == "both" else out / f"srt-{terms}"
        )  # the defaults have run already
        rows.append(("1", name, toy.run("srt.py", args.toy, "stage1", *flags, *always, folder)[-1]))
    for name, flags in STAGE_2.items():
        folder = out / "-".join(str(f).strip("-") for f in flags) if flags else args.toy / "sdzero"
        command = ["--model", args.toy / "srt", *toy.STAGE_2, *flags, *always, folder]
        rows.append(("2", name, toy.run("sdzero.py", args.toy, "stage2", *command)[-1]))
    print(
        "\n| stage | variant | accuracy, % | after one revision, % | wrong put right, % | right broken, % | tokens |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for stage, name, e in rows:
        cells = [
            toy.spread([e[key]])
            for key in ("accuracy", "revised_accuracy", "wrong_to_right", "right_to_wrong")
        ]
        print(f"| {stage} | {name} | {' | '.join(cells)} | {e['length']:.1f} |")
    print(f"\nseed {seed}; {(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
