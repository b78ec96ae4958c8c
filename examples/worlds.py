"""The toy on several worlds: tables and figure of the README, from examples/results/toy.jsonl.

    python examples/worlds.py                       prints the tables, draws examples/worlds.png
    python examples/worlds.py --collect runs/toy    first writes the file anew, from the runs of
                                                    examples/toy.py --seeds 5 --baselines

A line of the file is an evaluation of a run, with the "responses" that it had sampled until then
(of stage 2 also stage 1's); a row of toy.py's table; or where the KL lies. Shares lie in [0, 1],
lengths are tokens. The figure needs matplotlib.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import curves
import toy

from common import explained

HERE = Path(__file__).resolve().parent
RESULTS, FIGURE = HERE / "results" / "toy.jsonl", HERE / "worlds.png"
CURVES = {  # run: its name, its colour
    "srt": ("SRT", "C1"),
    "sdzero": ("SD-Zero", "C3"),
    "grpo": ("GRPO", "C0"),
    "grpo_3e-4": ("GRPO, rate 3e-4", "C8"),
    "grpo_from_srt": ("GRPO from SRT", "C9"),
    "rft": ("RFT", "C7"),
    "sdft": ("SDFT", "C2"),
    "sdpo": ("SDPO", "C4"),
}


def collect(folder: Path) -> list[dict]:
    """The lines of the results file, from folder/seed*/, the runs of toy.py."""
    lines = []
    for report in sorted(folder.glob("seed*/report.json")):
        with explained(f"{report} is damaged, repeat the command of toy.py"):
            content = json.loads(report.read_text())
        world = {"world": content["world"]}
        for run in CURVES:
            if not (report.parent / run).exists():
                continue
            for line in curves.read(report.parent / run, "generations"):
                if line["kind"] == "eval":
                    figures = {key: line[key] for key in toy.COLUMNS.values()}
                    lines.append({**world, "run": run, "responses": line["x"], **figures})
        for name, row in content["rows"].items():
            figures = {key: row[key] for key in toy.COLUMNS.values()}
            lines.append({**world, "row": name, **figures})
        lines.append({**world, "kl": content["kl"]})
    return lines


def rounded(x):
    """Six digits of every float, however deep."""
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    return float(f"{x:.6g}") if isinstance(x, float) else x


def print_table(lines: list[dict]) -> None:
    rows = {}
    for line in lines:
        if "row" in line:
            rows.setdefault(line["row"], []).append(line)
    worlds = " / ".join(str(line["world"]) for line in next(iter(rows.values())))
    print(f"| model | worlds {worlds} | {' | '.join(toy.COLUMNS)} |")
    print("| --- | --- |" + " --- |" * len(toy.COLUMNS))
    for name, found in rows.items():
        single = " / ".join(f"{100 * line['accuracy']:.1f}" for line in found)
        print(f"| {name} | {single} | {toy.cells(found)} |")


def mean_curve(lines: list[dict], run: str) -> list[tuple[float, list[float]]]:
    """(responses, accuracy in % in each world) at every evaluation of a run. Stage 1 and RFT sample
    before they train: only their first and last evaluations tell anything here."""
    by_world = {}
    for line in lines:
        if line.get("run") == run:
            by_world.setdefault(line["world"], []).append(line)
    points = []
    for same in zip(*by_world.values()):
        points.append((same[0]["responses"], [100 * line["accuracy"] for line in same]))
    return points[:: max(1, len(points) - 1)] if run in ("srt", "rft") else points


def draw(lines: list[dict], path: Path) -> None:
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")  # draws without a screen
    plt.rcParams.update(curves.STYLE)
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(17, 5), layout="constrained")
    left.set_title("held-out accuracy, %")
    left.set_xlabel("responses sampled for training")
    middle.set_title("held-out accuracy, %, at the end")
    middle.set_xlabel("tokens of a response")
    for run, (name, color) in CURVES.items():
        points = mean_curve(lines, run)
        if not points:
            continue
        at, values = zip(*points)
        means = [statistics.mean(v) for v in values]
        spreads = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        bold = 3 if run == "sdzero" else 1.5
        left.plot(at, means, color=color, label=name, marker="o", markersize=4, linewidth=bold)
        low, high = ([m + s * d for m, d in zip(means, spreads)] for s in (-1, 1))
        left.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
        last = {line["world"]: line for line in lines if line.get("run") == run}.values()
        lengths = [line["length"] for line in last]
        middle.scatter(lengths, values[-1], color=color, label=name, s=25)
    middle.legend(loc="lower right")  # for both
    middle.set_xlim(left=0)
    kl = [line["kl"] for line in lines if "kl" in line]
    bars = [(student, verdict) for student in kl[0] for verdict in ("wrong", "right")]
    bottom = [0.0] * len(bars)
    for i, kind in enumerate(toy.KINDS_OF_TOKENS):
        heights = []
        for student, verdict in bars:
            heights.append(statistics.mean(world[student][verdict]["nats"][kind] for world in kl))
        labels = [f"{student},\n{verdict}" for student, verdict in bars]
        right.bar(labels, heights, bottom=bottom, label=kind, color=f"C{i}", width=0.6)
        bottom = [b + h for b, h in zip(bottom, heights)]
    right.set_title("KL per response, nats, SRT as the teacher")
    right.set_xlabel("student, and the verdict on its response")
    right.legend(loc="best")
    right.set_axisbelow(True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The toy on several worlds: tables and figure")
    add = parser.add_argument
    add("--collect", type=Path, metavar="FOLDER", help="write the results from these runs first")
    add("--results", type=Path, default=RESULTS, help="the file (default: %(default)s)")
    add("--output", type=Path, default=FIGURE, help="the PNG (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.collect:
        with explained(f"cannot read the runs of toy.py in {args.collect}"):
            lines = collect(args.collect)
        if not lines:
            print(f"worlds.py: no seed*/report.json in {args.collect}", file=sys.stderr)
            raise SystemExit(2)
        text = "".join(json.dumps(rounded(line)) + "\n" for line in lines)
        with explained(f"cannot write {args.results}, name another --results", OSError):
            args.results.parent.mkdir(parents=True, exist_ok=True)
            args.results.write_text(text)
    with explained(f"cannot read {args.results}"):  # which may be any other file
        lines = [json.loads(line) for line in open(args.results)]
        if not all(any(key in line for line in lines) for key in ("row", "kl")):
            raise ValueError("it holds no results of toy.py, which --collect FOLDER writes")
        print_table(lines)
        toy.print_kl([line["kl"] for line in lines if "kl" in line])
    try:
        with explained(f"cannot write {args.output}", OSError, ValueError):  # .xyz is no format
            draw(lines, args.output)
    except ImportError as error:
        print(f"worlds.py: no figure: {error}; pip install -e '.[plot]'", file=sys.stderr)
    else:
        print(f"\nsaved {args.output}")


if __name__ == "__main__":
    main()
