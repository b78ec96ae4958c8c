"""SD-Zero on a real language model: SmolLM2-135M-Instruct, three hours on two CPU cores.

    python examples/real.py --model FOLDER_OR_NAME                    two processes on two cores
    python examples/real.py --model FOLDER_OR_NAME --processes 1 --device cuda         one GPU

The task is made here: word problems of three steps, whose solution is three equations and `####`.
Each step is mostly right, and one slip sinks the answer:

    Ana packs 23 pens into each of 7 bags. Then Ana finds another 45 pens. For each of them Ana
    gets 3 points. How many points does Ana get?

    7 * 23 = 161
    161 + 45 = 206
    206 * 3 = 618
    #### 618

So small a model cannot do that, and does not know the format. It is warmed up by fine-tuning on
worked solutions (baselines.py --method sft), and the result is the base of all methods. From there
on all that a method learns of an answer is the verifier's bit. No two problems have the same four
numbers, be they of the warm-up, of stage 1, of stage 2 or held out. Methods get the same number of
responses: 4 per problem of stage 1, and one per problem of stage 2; GRPO from SRT, like stage 2,
gets the latter.

Everything is in --out, and the same command goes on where it was stopped.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import PHRASES

ROOT = Path(__file__).resolve().parents[1]

NAMES = "Ana Ben Carla David Emma Felix Grace Hugo Iris Jack Kate Leo Mia Noah Olga Paul Rosa Sam"
THINGS = "apples pens books coins cards stamps marbles cookies candles shells tickets eggs beads"
STARTS = [
    "{name} has {a} boxes with {b} {things} each.",
    "{name} packs {b} {things} into each of {a} bags.",
    "There are {a} shelves, and {name} puts {b} {things} on each of them.",
    "For {a} days {name} collects {b} {things} a day.",
]
CHANGES = {
    "+": [
        "{name} buys {n} more.",
        "Then {name} finds another {n} {things}.",
        "A friend brings {n} {things} more.",
        "{name} gets {n} {things} as a present.",
    ],
    "-": [
        "{name} gives away {n} of them.",
        "Then {n} {things} are lost.",
        "{name} sells {n} of them.",
        "A friend takes {n} of the {things}.",
    ],
}
QUESTION = "How many {things} does {name} have now?"
LIMITS = (2, 9), (3, 12), (3, 49), (3, 49)  # of the four numbers
REVISIONS = 0.2  # share of the warm-up's solutions that revise an attempt, one in four a right one
SIZES = {"warmup": 1792, "stage1": 640, "stage2": 640, "heldout": 300}  # problems


# ----------------------------------------------------------------------------------------- the task


def make_problem(rng: random.Random, seen: set) -> tuple[dict[str, str], tuple]:
    """A problem with its answer and worked solution, and what `solution` needs to write another.

    seen: the numbers of all problems so far.
    """
    numbers, values = None, [0]
    while min(values) < 1 or numbers in seen:
        a, b, c, d = numbers = tuple(rng.randint(*limits) for limits in LIMITS)
        signs = rng.choices("+-", k=2)
        values = [a * b]
        for sign, n in zip(signs, (c, d)):
            values.append(values[-1] + n if sign == "+" else values[-1] - n)
    seen.add(numbers)
    words = {"name": rng.choice(NAMES.split()), "things": rng.choice(THINGS.split())}
    sentences = [rng.choice(STARTS).format(a=a, b=b, **words)]
    for sign, n in zip(signs, (c, d)):
        sentences.append(rng.choice(CHANGES[sign]).format(n=n, **words))
    sentences.append(QUESTION.format(**words))
    problem = {"problem": " ".join(sentences), "answer": str(values[-1])}
    return {**problem, "solution": solution(numbers, signs, values)}, (numbers, signs, values)


def solution(numbers: tuple, signs: list[str], values: list[int]) -> str:
    """values: what each step comes to."""
    lines, left = [], numbers[0]
    for sign, n, value in zip(["*", *signs], numbers[1:], values):
        lines.append(f"{left} {sign} {n} = {value}\n")
        left = value
    return "".join(lines) + f"#### {left}"


def slip(rng: random.Random, numbers: tuple, signs: list[str], values: list[int]) -> str:
    """The solution with one step wrong, and what comes after it computed from there."""
    wrong = values.copy()
    place = rng.randrange(len(wrong))
    wrong[place] += rng.choice([-10, -2, -1, 1, 2, 10])
    for i in range(place + 1, len(wrong)):
        n = numbers[i + 1]
        wrong[i] = wrong[i - 1] + n if signs[i - 1] == "+" else wrong[i - 1] - n
    return solution(numbers, signs, wrong)


def write_problems(out: Path, seed: int) -> None:
    rng, seen = random.Random(seed), set()
    for name, size in SIZES.items():
        rows = []
        for _ in range(size):
            row, steps = make_problem(rng, seen)
            if name == "warmup" and rng.random() < REVISIONS:
                right = rng.random() < 0.25
                attempt = row["solution"] if right else slip(rng, *steps)
                row["solution"] = f"{attempt}\n\n{PHRASES[right]}\n\n{row['solution']}"
            rows.append(json.dumps(row) + "\n")
        (out / f"{name}.jsonl").write_text("".join(rows))
    both = (out / "stage1.jsonl").read_text() + (out / "stage2.jsonl").read_text()
    (out / "both.jsonl").write_text(both)


# --------------------------------------------------------------------------------------- the runs

COMMON = "--max-new-tokens 112 --temperature 1 --dtype bfloat16 --save-every 10"
COMMON += " --micro-tokens 2048 --slots 192"
BASELINES = "examples/baselines.py"
RUNS = {  # name: (row of the table, script, model, problems, flags)
    "base": (
        "base",
        BASELINES,
        None,
        "warmup",
        "--method sft --solution-column solution --epochs 1 --batch-size 32 "
        "--lr 1e-4 --lr-schedule cosine --warmup 8",
    ),
    "srt": (
        "SRT",
        "srt.py",
        "base",
        "stage1",
        f"--problems {SIZES['stage1']} --epochs 2 --batch-size 32 --lr 1e-4",
    ),
    "sdzero": (
        "SD-Zero",
        "sdzero.py",
        "srt",
        "stage2",
        "--batch-size 50 --lr 5e-5 --warmup 4",
    ),
    "rft": (
        "RFT",
        BASELINES,
        "base",
        "stage1",
        "--method rft --epochs 2 --batch-size 32 --lr 1e-4 --lr-schedule cosine --warmup 0.05",
    ),
    "grpo": (
        "GRPO",
        BASELINES,
        "base",
        "both",
        f"--method grpo --generations {4 * SIZES['stage1'] + SIZES['stage2']} "
        "--batch-size 128 --lr 5e-5 --warmup 4",
    ),
    "grpo_from_srt": (
        "GRPO from SRT",
        BASELINES,
        "srt",
        "stage2",
        f"--method grpo --generations {SIZES['stage2']} --batch-size 128 --lr 5e-5 --warmup 4",
    ),
}
EVALUATION = "--eval-problems 300 --eval-samples 4 --eval-only"
COLUMNS = {  # of the table: key of an evaluation
    "accuracy, %": "accuracy",
    "standard error": "accuracy_se",
    "after one revision, %": "revised_accuracy",
    "correction rate, %": "correction_rate",
    "wrong put right, %": "wrong_to_right",
    "right broken, %": "right_to_wrong",
    "greedy, %": "greedy",
    "tokens": "length",
    "minutes": "minutes",
}


class Runner:
    """Calls the scripts as a user would, in as many processes as --processes says."""

    def __init__(self, args: argparse.Namespace):
        self.out, self.shared = args.out, ["--device", args.device, "--seed", args.seed]
        self.start = [sys.executable]
        if args.processes > 1:
            many = f"-m torch.distributed.run --nproc-per-node {args.processes}"
            self.start += many.split()
            os.environ.setdefault("OMP_NUM_THREADS", "1")

    def call(self, script: str, flags: list, **how) -> subprocess.CompletedProcess:
        flags = [str(flag) for flag in flags]
        print("\n$", shlex.join([*self.start[1:], script, *flags]), flush=True)
        done = subprocess.run([*self.start, ROOT / script, *flags], **how)
        if done.returncode:
            raise SystemExit(done.returncode)
        return done

    def run(self, name: str, model: Path) -> None:
        """One of RUNS, unless its output folder is complete."""
        _, script, _, problems, own = RUNS[name]
        output = self.out / name
        if (output / "config.json").exists():
            return
        flags = ["--model", model, "--dataset", self.out / f"{problems}.jsonl", *own.split()]
        flags += [*COMMON.split(), "--eval-problems", 0, *self.shared]
        resume = ["--resume"] if (output / "settings.json").exists() else []
        self.call(script, [*flags, "--output", output, *resume])

    def evaluate(self, name: str) -> dict:
        """Of the held-out problems, sampled at temperature 1; "greedy" is the accuracy without."""
        path = self.out / f"{name}.eval.json"
        if not path.exists():
            flags = ["--model", self.out / name, "--dataset", self.out / "heldout.jsonl"]
            flags += [*COMMON.split(), *EVALUATION.split(), *self.shared]
            found = []
            for more in (["--eval-temperature", 1], ["--eval-temperature", 0, "--eval-samples", 1]):
                done = self.call("sdzero.py", [*flags, *more], stdout=subprocess.PIPE, text=True)
                found.append(json.loads(done.stdout[done.stdout.index("{") :]))
            found[0]["greedy"] = found[1]["accuracy"]
            path.write_text(json.dumps(found[0], indent=1))
        return json.loads(path.read_text())


# --------------------------------------------------------------------------------------- the report


def steps_of(folder: Path) -> list[dict]:
    """The log of a run without its texts."""
    lines = []
    for line in open(folder / "metrics.jsonl"):
        line = {"run": folder.name, **json.loads(line)}
        line.pop("sample", None)
        lines.append({k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in line.items()})
    return lines


def print_table(rows: list[dict]) -> None:
    print(f"\n| model | {' | '.join(COLUMNS)} |\n| --- |{' --- |' * len(COLUMNS)}")
    for row in rows:
        cells = []
        for key in COLUMNS.values():
            scale = 1 if key in ("length", "minutes") else 100
            cells.append("-" if row[key] is None else f"{scale * row[key]:.1f}")
        print(f"| {row['row']} | {' | '.join(cells)} |")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="SD-Zero on a real model")
    add = parser.add_argument
    add("--model", required=True, help="a folder or name of SmolLM2-135M-Instruct")
    add("--out", type=Path, default=Path("runs/real"), help="where it goes on (default: runs/real)")
    add("--processes", type=int, default=2, help="torchrun's; on a GPU 1 (default: 2)")
    add("--device", default="cpu", help="cpu or cuda (default: cpu)")
    add("--seed", type=int, default=0, help="of the problems and of all sampling (default: 0)")
    args = parser.parse_args(argv)
    if not (args.out / "both.jsonl").exists():
        args.out.mkdir(parents=True, exist_ok=True)
        write_problems(args.out, args.seed)
    runner, rows, log = Runner(args), [], []
    for name, (row, _, model, _, _) in RUNS.items():
        runner.run(name, args.out / model if model else args.model)
        steps = steps_of(args.out / name)
        minutes = sum(step.get("seconds", 0) for step in steps) / 60  # without its evaluations
        rows.append({"row": row, **runner.evaluate(name), "minutes": minutes})
        log += steps
        print_table(rows)
    lines = [json.dumps(line) + "\n" for line in rows + log]
    (args.out / "report.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
