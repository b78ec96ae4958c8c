"""Curves of runs, from their metrics.jsonl: accuracy and length, and stage 2's KL and loss.

    python examples/curves.py runs/toy/srt runs/toy/sdzero      ->  runs/toy/srt/curves.png

It needs matplotlib. One run is drawn against its optimizer steps, several against the responses
that they have generated for training. A run then begins with all responses of the runs that made
its --model and its --traces: stage 2 has paid for stage 1. What no run has logged gets no panel.
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


def load(run: Path) -> tuple[list[dict], dict]:
    """(the lines of a run's metrics.jsonl, its flags). A last line that is half written, by a run
    that was killed, is left out. Raises ValueError with the file's name for what is no log."""
    path, lines = run / "metrics.jsonl", []
    text = path.read_text(errors="replace")
    for number, row in enumerate(text.splitlines(), 1):
        try:
            line = json.loads(row)
        except ValueError:
            if text.endswith(row):  # without a newline
                break
            line = None
        if not isinstance(line, dict) or not {"kind", "step"} <= line.keys():
            raise ValueError(f"{path}, line {number}: not a line of a run's log")
        lines.append(line)
    path = run / "settings.json"
    try:
        return lines, json.loads(path.read_text())["flags"] if path.exists() else {}
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not the settings of a run") from None


def built_on(run: Path, flags: dict) -> list[Path]:
    """The runs that made a run's --model and --traces; a warning where one is not to be found.

    A relative path was meant from where the command ran. That is not logged, but mostly it is one
    of the folders above the run; else it is taken to be the present one.
    """
    found = []
    for flag in ("model", "traces"):
        name, is_model = flags.get(flag), flag == "model"
        if not name:
            continue
        path = Path(name)
        if not is_model or path.name == "best" or path.name.startswith("checkpoint-"):
            path = path.parent  # the run's own folder
        bases = [*run.resolve().parents, Path.cwd()]
        places = [(base / path).resolve() for base in bases]
        logged = [place for place in places if (place / "metrics.jsonl").exists()]
        logged = [place for place in logged if place != run.resolve()]
        found += logged[:1]
        if logged or is_model and any(place.is_dir() for place in places):  # a model of no run
            continue
        owner = any((base / path.parent).is_dir() for base in bases)
        on_the_hub = is_model and name.count("/") == 1 and name[0] != "." and not owner
        if not on_the_hub:
            print(f"curves.py: {run}: {name} is not found; its run counts as 0", file=sys.stderr)
    return found


def generated(lines: list[dict], flags: dict) -> list[float]:
    """How many responses a run itself had generated for training after each of its lines.

    Baselines log it. For the others it is counted here: stage 1 generates while it collects, and
    its steps sample nothing; stage 2 samples a batch once for all of its passes (an epoch's last
    batch may be smaller).
    """
    counts, total = [], 0.0
    for line in lines:
        if "generations" in line:
            total = line["generations"]
        elif line["kind"] == "collect":
            for kind in ("attempts", "revisions_of_wrong", "revisions_of_right"):
                total += line.get(kind, 0)
        elif line["kind"] == "train" and "passes" in flags:
            total += flags["batch_size"] / flags["passes"]
        counts.append(total)
    return counts


def read(run: Path, x: str) -> list[dict]:
    """The lines of a run's metrics.jsonl, each with its "x". x: what that counts, "steps" or
    "generations"."""
    lines, flags = load(run)
    if x == "steps":
        return [{**line, "x": line["step"] * (line["kind"] != "collect")} for line in lines]
    before, waiting, seen = 0.0, built_on(run, flags), {run.resolve()}
    while waiting:
        earlier = waiting.pop()
        if earlier not in seen:  # one run may have made both the model and the traces
            seen.add(earlier)
            its_lines, its_flags = load(earlier)
            before += max(generated(its_lines, its_flags), default=0)
            waiting += built_on(earlier, its_flags)
    return [{**line, "x": before + n} for line, n in zip(lines, generated(lines, flags))]


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

    try:
        import matplotlib  # here, so that `read` needs the standard library only
        import matplotlib.pyplot as plt
    except ImportError:
        raise ImportError("it needs matplotlib: pip install -e '.[plot]'") from None

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
            runs[label] = read(run, x)
        draw(runs, x, output)
    except (OSError, ValueError, ImportError) as error:
        print(f"curves.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"saved {output}")


if __name__ == "__main__":
    main()
