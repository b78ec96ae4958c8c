"""Curves of runs of srt.py, sdzero.py and whatever else logs through srt.Run: accuracy and length, and the KL and the loss of stage 2.

    python examples/curves.py runs/toy/srt runs/toy/sdzero          ->  runs/toy/srt/curves.png        (needs matplotlib)

One run is drawn against its optimizer steps, several against the responses that they have generated for training: there a run begins
where the run that made its --model ended: stage 2 has paid for stage 1. What no run has logged gets no panel.
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def read(folder: Path, x: str) -> tuple[list[dict], float]:
    """(the lines of a run's metrics.jsonl, each with its "x": "steps" or "generations" up to there; the last x).

    Generations: a line says how many so far (baselines), or "collect" has its counts (stage 1), or a step has sampled a batch, once for all
    of its passes (stage 2; an epoch's last batch may be smaller). Stage 1 trains on what it has collected: its steps sample nothing.
    """
    lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
    path = folder / "settings.json"
    flags = json.loads(path.read_text())["flags"] if path.exists() else {}
    total = 0.0
    if x == "generations" and (Path(flags.get("model", "")) / "metrics.jsonl").exists():
        total = read(Path(flags["model"]), x)[1]
    before = total
    for line in lines:
        if x == "steps":
            total = 0 if line["kind"] == "collect" else line["step"]
        elif "generations" in line:
            total = before + line["generations"]
        elif line["kind"] == "collect":
            total += line["attempts"] + line["revisions_of_wrong"] + line["revisions_of_right"]
        elif line["kind"] == "train" and "passes" in flags:
            total += flags["batch_size"] / flags["passes"]
        line["x"] = total
    return lines, total


def series(lines: list[dict], kind: str, key: str) -> tuple[list[float], list[float]]:
    """x and values of what the lines of one kind have under `key`; lines without it are left out."""
    points = [
        (line["x"], line[key])
        for line in lines
        if line["kind"] == kind and line.get(key) is not None
    ]
    return tuple(map(list, zip(*points))) if points else ([], [])


def smooth(values: list[float], window: int) -> list[float]:
    """Mean of the last `window` values, of fewer at the start."""
    return [
        sum(part) / len(part)
        for part in (values[max(0, i + 1 - window) : i + 1] for i in range(len(values)))
    ]


def draw(runs: dict[str, list[dict]], x: str, path: Path) -> None:
    """runs: lines of `read` by label. Raises ValueError where there is nothing to draw."""
    evaluated = [any(line["kind"] == "eval" for line in lines) for lines in runs.values()]
    stage_2 = {label: [line for line in lines if line["kind"] == "train"] for label, lines in runs.items()
               if any("kl_right" in line for line in lines)}  # fmt: skip
    window = max([1, *(len(lines) // 20 for lines in stage_2.values())])
    mean = f", mean of {window} steps" if window > 1 else ""
    panels = ["accuracy, %", "tokens of a response"] * any(evaluated) + [
        f"KL, nats a token{mean}",
        f"loss{mean}",
    ] * bool(stage_2)
    if not panels:
        raise ValueError("these runs have neither evaluations nor stage-2 steps")
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
                         "axes.titlesize": 13, "axes.grid": True, "axes.grid.axis": "y", "grid.color": "#dddddd",
                         "legend.frameon": False})  # fmt: skip
    figure, axes = plt.subplots(
        len(panels) // 2, 2, figsize=(11, 4 * len(panels) // 2), squeeze=False, layout="constrained"
    )
    panel = dict(zip((title.split(",")[0].split()[0] for title in panels), axes.flat))
    for title, axis in zip(panels, axes.flat):
        axis.set_title(title)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer steps" if x == "steps" else "responses generated for training")
    for i, (label, lines) in enumerate(runs.items()):
        color = f"C{i}"
        if evaluated[i]:
            at, accuracy = series(lines, "eval", "accuracy")
            errors = [100 * (line["accuracy_se"] or 0) for line in lines if line["kind"] == "eval"]
            panel["accuracy"].errorbar(
                at,
                [100 * a for a in accuracy],
                errors,
                marker="o",
                capsize=3,
                color=color,
                label=label,
            )
            panel["tokens"].plot(
                *series(lines, "eval", "length"), marker="o", color=color, label=label
            )
        if label in stage_2:
            for key, style in (("kl_right", "-"), ("kl_wrong", "--")):
                at, kl = series(lines, "train", key)
                panel["KL"].plot(
                    at,
                    smooth(kl, window),
                    style,
                    color=color,
                    label=f"{label}, {key[3:]} responses",
                )
            at, loss = series(lines, "train", "loss")
            panel["loss"].plot(at, smooth(loss, window), color=color, label=label)
    for name in ("tokens", "loss"):
        if name in panel:
            panel[name].set_ylim(bottom=0)
    for name in ("accuracy" if any(evaluated) else "loss", "KL"):
        if name in panel:
            panel[name].legend(loc="best")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Curves of runs, from their metrics.jsonl, as a PNG"
    )
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN_FOLDER",
        help="outputs of srt.py, sdzero.py and the like",
    )
    parser.add_argument(
        "--x",
        choices=["steps", "generations"],
        help="what runs along (default: steps of one run, generations of several)",
    )
    parser.add_argument(
        "--output", type=Path, help="the picture (default: curves.png in the first run's folder)"
    )
    args = parser.parse_args(argv)
    x, output = (
        args.x or ("steps" if len(args.runs) == 1 else "generations"),
        args.output or args.runs[0] / "curves.png",
    )
    names = [
        run.resolve().name for run in args.runs
    ]  # two runs of one name are told apart by their parents' folders
    labels = [name if names.count(name) == 1 else str(run) for name, run in zip(names, args.runs)]
    try:
        draw({label: read(run, x)[0] for label, run in zip(labels, args.runs)}, x, output)
    except (OSError, ValueError) as error:
        print(f"curves.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"saved {output}")


if __name__ == "__main__":
    main()
