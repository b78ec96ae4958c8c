"""Curves of runs, from their metrics.jsonl: accuracy and length, and stage 2's KL and loss.

    python examples/curves.py runs/toy/srt runs/toy/sdzero      ->  runs/toy/srt/curves.png

It needs matplotlib. One run is drawn against its optimizer steps, several against the responses
that they have generated for training. A run then begins where the run that made its --model ended:
stage 2 has paid for stage 1. What no run has logged gets no panel.
"""

import argparse
import json
import sys
from pathlib import Path

STYLE = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 13,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#dddddd",
    "legend.frameon": False,
}


def read(folder: Path, x: str) -> tuple[list[dict], float]:
    """(the lines of a run's metrics.jsonl, each with its "x", the last x). x: what that counts,
    "steps" or "generations".

    Baselines log how many responses they have generated. For the others they are counted here:
    stage 1 generates while it collects, and its steps sample nothing; stage 2 samples a batch
    once for all of its passes (an epoch's last batch may be smaller).
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
    """x and value of each line of one kind that has a value under `key`."""
    found = [line for line in lines if line["kind"] == kind and line.get(key) is not None]
    return [line["x"] for line in found], [line[key] for line in found]


def smooth(values: list[float], window: int) -> list[float]:
    """Mean of the last `window` values, of fewer at the start."""
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def draw(runs: dict[str, list[dict]], x: str, path: Path) -> None:
    """runs: lines of `read` by label. Raises ValueError where there is nothing to draw, and
    ImportError without matplotlib."""
    evaluated, stage_2 = [], []
    for label, lines in runs.items():
        if any(line["kind"] == "eval" for line in lines):
            evaluated.append(label)
        if any("kl_right" in line for line in lines):
            stage_2.append(label)
    steps = [len(series(runs[label], "train", "loss")[0]) for label in stage_2]
    window = max(1, max(steps, default=0) // 20)
    mean = f", mean of {window} steps" if window > 1 else ""
    titles = {}
    if evaluated:
        titles.update(accuracy="accuracy, %", length="tokens of a response")
    if stage_2:
        titles.update(kl=f"KL per token, nats{mean}", loss=f"loss{mean}")
    if not titles:
        raise ValueError("these runs have neither evaluations nor stage-2 steps")

    import matplotlib  # here, so that `read` needs the standard library only
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")  # draws without a screen
    plt.rcParams.update(STYLE)
    rows = len(titles) // 2
    figure, axes = plt.subplots(
        rows, 2, figsize=(11, 4 * rows), squeeze=False, layout="constrained"
    )
    panel = dict(zip(titles, axes.flat))
    for name, title in titles.items():
        panel[name].set_title(title)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer steps" if x == "steps" else "responses generated for training")
    for i, (label, lines) in enumerate(runs.items()):
        style = {"color": f"C{i}", "label": label}
        if label in evaluated:
            at, accuracy = series(lines, "eval", "accuracy")
            errors = [100 * (e["accuracy_se"] or 0) for e in lines if e["kind"] == "eval"]
            percent = [100 * a for a in accuracy]
            panel["accuracy"].errorbar(at, percent, errors, marker="o", capsize=3, **style)
            panel["length"].plot(*series(lines, "eval", "length"), marker="o", **style)
        if label in stage_2:
            at, loss = series(lines, "train", "loss")
            panel["loss"].plot(at, smooth(loss, window), **style)
            for key, dashes in (("right", "-"), ("wrong", "--")):
                at, kl = series(lines, "train", f"kl_{key}")
                style["label"] = f"{label}, {key} responses"
                panel["kl"].plot(at, smooth(kl, window), dashes, **style)
    for name in {"length", "loss"} & panel.keys():
        panel[name].set_ylim(bottom=0)
    for name in {"accuracy" if evaluated else "loss", "kl"} & panel.keys():
        panel[name].legend(loc="best")
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Curves of runs, from their metrics.jsonl")
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="output folders of the scripts")
    add("--x", choices=["steps", "generations"], help="(default: steps; of several runs the other)")
    add("--output", type=Path, help="the PNG (default: curves.png in the first run's folder)")
    args = parser.parse_args(argv)
    x = args.x or ("steps" if len(args.runs) == 1 else "generations")
    output = args.output or args.runs[0] / "curves.png"
    names = [run.resolve().name for run in args.runs]
    runs = {}
    try:
        for run, name in zip(args.runs, names):
            label = name if names.count(name) == 1 else str(run)  # two runs may have one name
            runs[label] = read(run, x)[0]
        draw(runs, x, output)
    except (OSError, ValueError, ImportError) as error:
        print(f"curves.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"saved {output}")


if __name__ == "__main__":
    main()
