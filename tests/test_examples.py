"""examples/: what each baseline trains on, GRPO's gradient against its formula in float64, each
method by its command line, the commands of the toy and its ablations; and that the benchmark of
training still runs."""

import json
import math
import re
import sys
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest
import torch
from test_scripts import (  # noqa: F401 (base, data: fixtures)
    FLAGS,
    base,
    call,
    data,
    lines_of,
    save_model,
)
from tiny import make_tokenizer, tiny
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import ablations
import baselines
import bench_training
import real
import toy
import worlds

import sdzero
import srt
from common import Problem
from losses import OutputLayer
from rollout import Rollout
from verifier import verify


def group(prompt_ids, rewards, seed=0):
    """Random responses to a problem, each of 2 to 6 tokens and an EOS."""
    generator = torch.Generator().manual_seed(seed)
    responses = []
    for n in torch.randint(2, 7, (len(rewards),), generator=generator).tolist():
        ids = torch.randint(2, 40, (n,), generator=generator).tolist()
        responses.append(Rollout(ids + [1], [0.0] * (n + 1), True))
    return baselines.Group(Problem(f"problem {prompt_ids}", "7", prompt_ids), responses, rewards)


# ------------------------------------------------------------------------- what methods train on


@pytest.mark.parametrize("micro_tokens", [12, 10_000])
def test_grpo_gradient(micro_tokens):
    """Catches advantages that are normalised over the batch, tokens that are shifted, a temperature
    that is forgotten, the divisor of a micro-batch."""
    groups = [
        group([3, 4, 5], [1, 0, 0, 1], 1),
        group([6], [1, 1, 1, 1], 2),
        group([7, 8], [0, 0, 1, 0], 3),
    ]
    model = tiny("llama")
    total, tokens = 0, 0
    for g in groups:
        r = torch.tensor(g.rewards, dtype=torch.float64)
        for y, a in zip(g.responses, (r - r.mean()) / (r.std(correction=0) + 1e-6)):
            ids = g.problem.prompt_ids + y.ids
            logprobs = (model(torch.tensor([ids])).logits[0] / 0.7).log_softmax(-1)
            for t in range(len(g.problem.prompt_ids), len(ids)):
                total, tokens = total - a * logprobs[t - 1, ids[t]], tokens + 1
    (total / tokens).backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    args = SimpleNamespace(micro_tokens=micro_tokens, temperature=0.7)
    metrics = baselines.grpo_step(model, OutputLayer(model), groups, args)
    assert metrics["loss"] == pytest.approx((total / tokens).item(), rel=1e-5)
    assert metrics["with_signal"] == 8 / 12
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], rtol=1e-5, atol=1e-6)  # A is fp32


def test_grpo_without_any_signal_has_no_gradient():
    """Catches a division by the tokens that have a signal, and by a standard deviation of 0."""
    model = tiny("llama")
    groups = [group([3], [1, 1]), group([4], [0, 0])]
    args = SimpleNamespace(micro_tokens=99, temperature=1.0)
    metrics = baselines.grpo_step(model, OutputLayer(model), groups, args)
    assert metrics == {"loss": 0.0, "with_signal": 0.0}
    assert all(p.grad is None for p in model.parameters())


def test_rft_keeps_distinct_right_responses():
    """Catches wrong ones that are kept, right ones that count twice or are lost, one response to
    two problems that is kept for one of them only."""
    g, h = group([3, 4], [1, 0, 1, 1]), group([5], [0, 1])
    g.responses[3] = h.responses[1] = g.responses[0]
    tokenizer = make_tokenizer()
    task = SimpleNamespace(
        lm=SimpleNamespace(text=tokenizer.decode, tokenizer=tokenizer), args=None
    )
    kept = baselines.right_responses(task, [g, h])
    a, b = g.responses[0].ids, g.responses[2].ids
    assert [t.revision_ids for t in kept] == [a, b, a]
    assert [t.ids for t in kept] == [[3, 4] + a, [3, 4] + b, [5] + a]
    assert all(t.finished and t.weights((1, 1)) == [1] * len(t.revision_ids) for t in kept)


def test_sft_trains_on_a_revision_without_its_attempt(base, tmp_path):  # noqa: F811
    """Catches a loss on the attempt, the phrase of the other verdict, an attempt cut at the first
    of two phrases, EOS before the phrase or missing at the end."""
    no, yes = "\n\nNo.\n\n", "\n\nYes.\n\n"
    texts = ["ab", f"ab{no}cd", f"cd{yes}e", f"a{no}b{yes}c", f"a{yes}b{no}c"]
    rows = [{"problem": f"{i}?", "answer": text} for i, text in enumerate(texts)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--method", "sft", "--model", base, "--dataset", tmp_path / "data.jsonl"]
    flags += [*FLAGS, "--output", tmp_path / "out", "--eval-problems", 0]
    flags += ["--phrase-wrong", "No.", "--phrase-right", "Yes."]
    args = baselines.parse_arguments([str(flag) for flag in flags])
    task = baselines.setup(args)
    solutions = baselines.load_solutions(task, args)
    found = {t.problem: t for t in baselines.worked_solutions(task, solutions)}
    ids, eos = (lambda text: baselines.ids_of(task.lm, text)), [task.lm.tokenizer.eos_token_id]
    for problem, attempt, phrase, last, reward in (
        ("0?", "", "", "ab", 1),
        ("1?", "ab", no, "cd", 0),
        ("2?", "cd", yes, "e", 1),
        ("3?", f"a{no}b", yes, "c", 1),
        ("4?", f"a{yes}b", no, "c", 0),
    ):
        trace = found[problem]
        before = ids(attempt) + ids(phrase)
        assert trace.ids == trace.prompt_ids + before + ids(last) + eos
        assert trace.weights((0, 1)) == [0] * len(before) + [1] * len(ids(last) + eos)
        assert trace.reward == reward and problem[0] in task.lm.text(trace.prompt_ids)


def test_sft_ends_with_a_stop_token_where_the_tokenizer_has_no_eos(tmp_path):
    save_model(tmp_path / "base", family="llama", eos=False, eos_token_id=None)
    (tmp_path / "data.jsonl").write_text(json.dumps({"problem": "1?", "answer": "ab"}))
    flags = ["--model", tmp_path / "base", "--dataset", tmp_path / "data.jsonl", *FLAGS]
    flags += ["--method", "sft", "--output", tmp_path / "out", "--eval-problems", 0]
    flags += ["--stop-tokens", "z"]
    task = baselines.setup(baselines.parse_arguments([str(flag) for flag in flags]))
    solutions = baselines.load_solutions(task, task.args)
    (trace,) = baselines.worked_solutions(task, solutions)
    assert task.lm.tokenizer.decode(trace.revision_ids) == "abz"


def test_what_the_teachers_are_shown():
    """SDPO: another response of the group, right and without EOS, never the scored one; a response
    for which there is none is left out. SDFT: the solution of its own problem."""
    g, lonely = group([3, 4], [0, 1, 1, 0]), group([5], [0, 1])
    a, b = g.responses[1].ids, g.responses[2].ids
    examples = baselines.sdpo_examples([g, lonely, group([6], [0, 0])], [9, 9])
    assert [e.response for e in examples] == [*g.responses, lonely.responses[0]]
    assert [e.reward for e in examples] == [0, 1, 1, 0, 0]  # its own, not that of what is shown
    shown = [e.shown_ids for e in examples]
    assert shown == [a[:-1], b[:-1], a[:-1], b[:-1], lonely.responses[1].ids[:-1]]
    assert examples[1].teacher_ids == [3, 4] + b[:-1] + [9, 9] + a
    assert examples[1].student_ids == [3, 4] + a
    solutions = {g.problem.key: [20, 21], lonely.problem.key: [22]}
    examples = baselines.sdft_examples([g, lonely], solutions, [9])
    expected = [[3, 4, 20, 21, 9] + y.ids for y in g.responses]
    expected += [[5, 22, 9] + y.ids for y in lonely.responses]
    assert [e.teacher_ids for e in examples] == expected
    assert [e.reward for e in examples] == g.rewards + lonely.rewards


# ------------------------------------------------------------------------------- command lines


def command(method, model, data, out, *flags):  # noqa: F811
    own = ["--batch-size", "8", "--problems", "12"]
    own += ["--group", "4"] if method != "sft" else []
    own += ["--generations", "64"] if method in ("grpo", "sdft", "sdpo") else []
    sources = ["--method", method, "--model", model, "--dataset", data, "--output", out]
    call(baselines, *sources, *FLAGS, *own, *flags)


def weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("method", ["rft", "grpo", "sdft", "sdpo"])
def test_command_line(method, base, data, tmp_path):  # noqa: F811
    """A whole run: what it logs, that it moves the weights, and what srt.json remembers."""
    folder = tmp_path / "out"
    command(method, base, data, folder)
    lines = lines_of(folder / "metrics.jsonl")
    train = [x for x in lines if x["kind"] == "train"]
    evals = [x for x in lines if x["kind"] == "eval"]
    assert evals[0]["step"] == 0 and evals[-1]["step"] == train[-1]["step"]
    if method == "rft":
        (counts,) = [x for x in lines if x["kind"] == "collect"]
        assert counts["generations"] == 4 * 12
        assert len(train) == 3 * math.ceil(counts["kept"] / 8)  # three epochs
    else:
        assert [x["generations"] for x in train] == [8 * i for i in range(1, 9)]
        assert all(0 <= x["cut_off"] <= 1 for x in train)
    assert not torch.equal(weights(base), weights(folder))
    saved = json.loads((folder / "srt.json").read_text())
    assert len(saved["trained"]) == 12 and not saved["problems"]


def test_from_a_model_of_stage_1(base, data, tmp_path, monkeypatch):  # noqa: F811
    """GRPO from SRT trains on what stage 2 would train on: not on what stage 1 has used, and not on
    what is held out; it remembers both lists."""
    sources = ["--dataset", data, *FLAGS, "--problems", "30", "--epochs", "1", "--batch-size", "64"]
    call(srt, "--model", base, *sources, "--output", tmp_path / "srt")
    used = json.loads((tmp_path / "srt" / "srt.json").read_text())["problems"]
    asked, held_out = set(), set()

    def watched(task, problems, purpose, sample=baselines.sample_and_verify):
        asked.update(p.key for p in problems)
        held_out.update(p.key for p in task.held_out)
        return sample(task, problems, purpose)

    monkeypatch.setattr(baselines, "sample_and_verify", watched)
    more = ["--generations", "104", "--problems", "26"]  # a pass over all that is left
    command("grpo", tmp_path / "srt", data, tmp_path / "grpo", *more)
    assert (len(used), len(asked), len(held_out)) == (30, 26, 4)
    assert not asked & {*used, *held_out}
    saved = json.loads((tmp_path / "grpo" / "srt.json").read_text())
    assert set(saved["problems"]) == set(used) and set(saved["trained"]) == {*used, *asked}


@pytest.mark.parametrize("method, verdict", [("grpo", 1), ("sdpo", 0)])
def test_nothing_learned(method, verdict, base, data, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Groups that are all right, or all wrong, from the first to the last: exit code 1 and no model
    that passes for a trained one."""

    def all_alike(task, problems, purpose, sample=baselines.sample_and_verify):
        return [replace(a, reward=verdict) for a in sample(task, problems, purpose)]

    monkeypatch.setattr(baselines, "sample_and_verify", all_alike)
    with pytest.raises(SystemExit) as stopped:
        command(method, base, data, tmp_path / "out", "--generations", "16")
    assert stopped.value.code == 1 and "not one step had a gradient" in capsys.readouterr().err
    assert len(lines_of(tmp_path / "out" / "metrics.jsonl")) > 1
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("method", ["sft", "sdft"])
def test_resume_compares_the_solutions(method, base, tmp_path, monkeypatch, capsys):  # noqa: F811
    """One that has changed is refused, of the same problems and answers; the same ones go on."""

    def stop(*args):
        raise RuntimeError

    monkeypatch.setattr(baselines, "train", stop)
    rows = [{"problem": f"{i}?", "answer": f"{i}", "worked": "ab"} for i in range(16)]
    path = tmp_path / "data.jsonl"
    for worked, end in (("ab", RuntimeError), ("ab", RuntimeError), ("ba", SystemExit)):
        rows = [{**row, "worked": worked} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        resume = ["--resume"] if (tmp_path / "out").exists() else []
        with pytest.raises(end) as stopped:
            command(method, base, path, tmp_path / "out", "--solution-column", "worked", *resume)
    message = "--resume needs the traces that the run began with: these are other ones"
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    "method, flags, message",
    [
        ("grpo", ["--group", "3"], "whole groups of 3"),
        ("grpo", ["--group", "1"], "no other response that --method grpo could learn from"),
        ("sdpo", ["--group", "1"], "no other response that --method sdpo could learn from"),
        ("sdft", ["--generations", "7"], "--generations 7 is less than a batch of 8"),
        ("rft", ["--generations", "8"], "belongs to --method grpo and sdft and sdpo"),
        ("grpo", ["--epochs", "2"], "belongs to --method sft and rft"),
        ("sft", ["--solution-column", "some"], "of 12 problems have no some"),
        ("sft", ["--generations", "8"], "belongs to --method grpo and sdft and sdpo"),
        ("sft", ["--group", "4"], "belongs to --method rft and grpo and sdft and sdpo"),
        ("grpo", ["--teacher", "live"], "belongs to --method sdft and sdpo"),
        ("sdpo", ["--solution-column", "answer"], "belongs to --method sft and sdft"),
        (
            "sdft",
            ["--solution-column", "worked"],
            "has no column worked; it has problem, answer, some\n",
        ),
        ("sdft", ["--solution-column", "some"], "of 12 problems have no some"),
        ("ppo", [], "invalid choice: 'ppo'"),
    ],
)
def test_bad_input(method, flags, message, base, tmp_path, capsys):  # noqa: F811
    """One line and exit code 2 before anything is sampled or written: a flag that would do nothing,
    solutions that some problems do not have."""
    rows = [{"problem": f"{i}?", "answer": f"{i}", "some": "x" * (i % 2)} for i in range(16)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(SystemExit) as stopped:
        command(method, base, tmp_path / "data.jsonl", tmp_path / "out", *flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------- the real model


def test_problems_of_the_real_model(tmp_path):
    """Every solution is right line by line and verifies, no numbers come twice, the same seed makes
    the same files, and a phrase of the warm-up fits the attempt before it."""
    real.write_problems(tmp_path, 5)
    problems, revised = [], [0, 0]
    for name, size in real.SIZES.items():
        rows = [json.loads(line) for line in open(tmp_path / f"{name}.jsonl")]
        assert len(rows) == size
        for row in rows:
            text = row["solution"]
            for r, phrase in enumerate(real.PHRASES):
                attempt, found, text = text.rpartition(f"\n\n{phrase}\n\n")
                revised[r] += found != ""
                assert not found or name == "warmup" and verify(attempt, row["answer"]) == r
            assert verify(text, row["answer"])
            people, *changes = re.findall(r"(\d+) (?:people|get (on|off))", row["problem"])
            people = int(people[0])
            *lines, _ = text.split("\n")
            for line, (n, sign) in zip(lines, changes, strict=True):
                now = people + int(n) if sign == "on" else people - int(n)
                assert line == f"{people} {'+' if sign == 'on' else '-'} {n} = {now}"
                people = now
            assert row["answer"] == str(people)
            problems.append(re.sub(r"\D+", " ", row["problem"]) + " ".join(s for _, s in changes))
    assert len(set(problems)) == len(problems) and revised[0] > 2 * revised[1] > 0
    files = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert files["both.jsonl"] == files["stage1.jsonl"] + files["stage2.jsonl"]
    real.write_problems(tmp_path, 5)
    assert files == {path.name: path.read_text() for path in tmp_path.iterdir()}
    seen = set()  # of problems: the same random numbers do not make the same problem again
    assert real.make_problem(Random(0), seen) != real.make_problem(Random(0), seen)


def test_commands_of_the_real_model(monkeypatch, tmp_path, capsys):
    """Every method starts from the right model with the right problems and number of responses;
    what is finished is not run again, what has begun goes on; the table has the figures of the
    row's own model."""
    scripts = {"srt.py": srt, "sdzero.py": sdzero, "examples/baselines.py": baselines}
    seen = {}

    def record(script, flags, **how):
        args = scripts[script].parse_arguments([str(flag) for flag in flags])
        assert args.seed == 5
        if args.eval_only:
            name = Path(args.model).name
            assert Path(args.dataset) == tmp_path / "heldout.jsonl"
            found = dict.fromkeys(real.COLUMNS.values(), list(real.RUNS).index(name) / 10)
            found["accuracy"] += 0.01 * (args.eval_temperature == 0)
            return SimpleNamespace(stdout="problems\n" + json.dumps(found))
        assert not args.eval_problems and args.output.name not in seen
        seen[args.output.name] = args
        args.output.mkdir(exist_ok=True)
        (args.output / "config.json").touch()
        settings = {"flags": {"model": args.model, "seed": args.seed}}
        (args.output / "settings.json").write_text(json.dumps(settings))
        line = json.dumps({"kind": "train", "step": 1, "seconds": 90.0, "sample": "text"})
        (args.output / "metrics.jsonl").write_text(f"{line}\n")

    monkeypatch.setattr(real, "call", record)
    (tmp_path / "srt").mkdir()
    (tmp_path / "srt" / "settings.json").touch()
    for _ in range(2):
        real.main(["--model", "smollm2", "--out", str(tmp_path), "--seed", "5"])
    budget = 4 * real.SIZES["stage1"] + real.SIZES["stage2"]
    for name, model, problems, responses in (
        ("base", "smollm2", "warmup", None),
        ("srt", "base", "stage1", None),
        ("sdzero", "srt", "stage2", None),
        ("rft", "base", "stage1", None),
        ("grpo", "base", "both", budget),
        ("grpo_from_srt", "srt", "stage2", real.SIZES["stage2"]),
        ("stage_2_only", "base", "stage2", None),
    ):
        args = seen.pop(name)
        assert (Path(args.model).name, Path(args.dataset).stem) == (model, problems)
        assert getattr(args, "generations", None) == responses
        assert args.temperature == 1 and args.max_new_tokens == 128
        assert args.resume == (name == "srt")
        if name in ("srt", "rft"):
            assert args.problems in (None, real.SIZES["stage1"])
            assert getattr(args, "group", 4) == 4 == getattr(args, "revisions", 3) + 1
    assert not seen
    table = capsys.readouterr().out
    assert "| SRT | 10.0 | 10.0 | 10.0 | 10.0 | 10.0 | 10.0 | 11.0 | 0.1 | 1.5 |" in table
    lines = [json.loads(line) for line in open(tmp_path / "report.jsonl")]
    assert [line["row"] for line in lines if "row" in line][:2] == ["base", "SRT"]
    assert {line["run"] for line in lines if "run" in line} == real.RUNS.keys()
    for other in (["--model", "smollm2"], ["--model", "another", "--seed", "5"]):
        with pytest.raises(SystemExit) as stopped:
            real.main([*other, "--out", str(tmp_path)])
        message = f"{tmp_path} was begun with --model smollm2 --seed 5: give these, or another"
        assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_problems_of_the_real_model_follow_the_seed(monkeypatch, tmp_path):
    """Catches those of another seed, or half a file, of a call that was killed before the base."""

    def stop(*args):
        raise RuntimeError

    monkeypatch.setattr(real, "run", stop)
    (tmp_path / "both.jsonl").touch()
    for seed in (0, 1):
        with pytest.raises(RuntimeError):
            real.main(["--model", "m", "--out", str(tmp_path), "--seed", str(seed)])
        found = (tmp_path / "stage1.jsonl").read_text()
        real.write_problems(tmp_path, seed)
        assert found == (tmp_path / "stage1.jsonl").read_text()


def half_written(path, text):
    """Instead of Path.write_text: a disk that is full, or a kill."""
    path.write_bytes(text[: len(text) // 2].encode())
    raise OSError("no room")


def test_half_an_evaluation_is_none(monkeypatch, tmp_path):
    """It is what the next call of real.py reads instead of evaluating."""
    evaluation = SimpleNamespace(stdout='problems\n{"accuracy": 0.5}')
    monkeypatch.setattr(real, "call", lambda *args, **how: evaluation)
    args = SimpleNamespace(out=tmp_path, device="cpu", seed=0)
    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(Path, "write_text", half_written)
        real.evaluate("srt", args)
    assert real.evaluate("srt", args) == {"accuracy": 0.5, "greedy": 0.5}


# --------------------------------------------------------------------- the toy and its ablations


@pytest.fixture
def commands(monkeypatch, tmp_path):
    """The commands that are called instead of being run, as their scripts understand them. Each
    leaves three evaluations of growing accuracy."""
    scripts = {"srt.py": srt, "sdzero.py": sdzero, "examples/baselines.py": baselines}
    seen = {}

    def record(script, *flags):
        args = scripts[script].parse_arguments([str(flag) for flag in flags])
        assert flags[flags.index("--device") + 1] == "cpu"  # also where there is a GPU
        assert Path(args.dataset).parent == tmp_path
        assert args.eval_dataset == str(tmp_path / "heldout.jsonl")
        name = str(args.output.relative_to(tmp_path))
        assert name not in seen
        seen[name] = args
        args.output.mkdir(parents=True, exist_ok=True)
        (args.output / "config.json").touch()
        (args.output / "settings.json").write_text(json.dumps({"flags": {"seed": args.seed}}))
        with open(args.output / "metrics.jsonl", "w") as file:
            for share in (0.25, 0.5, 0.75):
                figures = dict.fromkeys(toy.COLUMNS.values(), share)
                file.write(json.dumps({"kind": "eval", "step": 0, **figures}) + "\n")

    monkeypatch.setattr(toy, "call", record)
    return seen


def test_commands_of_the_toy(commands, tmp_path):
    """Catches a flag that a script no longer has, a budget that is not that of the stages, a
    method that starts from the wrong model or reads the wrong problems, rows that are swapped."""
    rows = {**toy.both_stages(tmp_path, 7), **toy.the_rest(tmp_path, 7)}
    models = {name: Path(args.model).name for name, args in commands.items()}
    from_srt = {"sdzero", "grpo_from_srt", "again", "synced"}
    assert {name for name, model in models.items() if model == "srt"} == from_srt
    assert all(models[name] == "base" for name in commands.keys() - from_srt)
    both = 4 * toy.SIZES["stage1"] + toy.SIZES["stage2"]
    for name, problems, budget in (
        ("rft", "stage1", None),
        ("grpo", "both", both),
        ("sdft", "both", both),
        ("sdpo", "both", both),
        ("grpo_3e-4", "both", both),
        ("grpo_from_srt", "both", toy.SIZES["stage2"]),
    ):
        args = commands[name]
        assert (Path(args.dataset).stem, args.generations) == (problems, budget)
        assert args.method == name.split("_")[0]
    assert commands["sdft"].solution_column == "solution"
    assert commands["synced"].teacher_interval * 32 == toy.SIZES["stage2"]
    assert commands["again"].epochs == commands["synced"].epochs == 2 * commands["sdzero"].epochs
    assert commands["grpo_3e-4"].lr == 3e-4 < commands["grpo"].lr
    assert all(args.seed == 7 for args in commands.values())
    assert len(rows) == 13 == len(commands) + 2
    first, at_a_budget = rows.pop("base"), rows.pop("GRPO, at stage 2's number of responses")
    assert (first["accuracy"], at_a_budget["accuracy"]) == (0.25, 0.5)
    assert {row["accuracy"] for row in rows.values()} == {0.75}


def test_a_toy_that_was_killed_goes_on(commands, tmp_path):
    """With what was not finished; catches a toy that only an empty folder lets start again."""
    (tmp_path / "srt").mkdir()
    (tmp_path / "srt" / "settings.json").touch()
    toy.both_stages(tmp_path, 0)
    assert {name: args.resume for name, args in commands.items()} == {"srt": True, "sdzero": False}
    toy.both_stages(tmp_path, 0)  # finished: neither is called again


def test_a_toy_of_another_world_is_refused(tmp_path, monkeypatch, capsys):
    """Catches a world whose results pass for those of another --seed."""

    def stop(*args):
        raise RuntimeError

    monkeypatch.setattr(toy, "pretrain", lambda world, tokenizer: tiny("llama"))
    monkeypatch.setattr(toy, "both_stages", stop)
    for seed, end in (("0", RuntimeError), ("0", RuntimeError), ("1", SystemExit)):
        with pytest.raises(end) as stopped:
            toy.main(["--out", str(tmp_path), "--seed", seed])
    message = f"{tmp_path} holds another world than 1: name another --out\n"
    assert stopped.value.code == 2 and capsys.readouterr().err.endswith(message)
    (tmp_path / "stage1.jsonl").unlink()
    with pytest.raises(SystemExit):
        toy.main(["--out", str(tmp_path)])
    assert f"cannot use {tmp_path}, name another --out" in capsys.readouterr().err


def test_commands_of_the_ablations(commands, tmp_path, capsys):
    """Each variant is another one, from the right model; what the toy has run is not run again."""
    toy.both_stages(tmp_path, 7)
    ablations.main(["--toy", str(tmp_path)])
    assert len(commands) == len(ablations.TERMS) + len(ablations.STAGE_2)
    unlike = []
    for name, args in commands.items():
        stage_1 = args.model.endswith("base")
        assert args.seed == 7 and (stage_1 or args.model.endswith("srt"))
        if stage_1 and name != "srt":
            assert args.traces == tmp_path / "srt" / "traces.jsonl"
        changed = ("terms",) if stage_1 else ("objective", "alpha", "topk", "teacher")
        changed += () if stage_1 else ("teacher_rate", "teacher_interval")
        unlike.append((stage_1, *(getattr(args, flag) for flag in changed)))
    assert len(set(unlike)) == len(unlike)
    table = capsys.readouterr().out
    assert table.count("| 75.0 | 75.0 | 75.0 | 75.0 | 0.8 |") == len(commands)

    ablations.main(["--toy", str(tmp_path), "--grid"])
    for method, rates in ablations.GRID.items():
        found = [args.lr for name, args in commands.items() if name.startswith(f"grid/{method}-")]
        assert found == list(rates)
    assert capsys.readouterr().out.count(": 75.0") == sum(map(len, ablations.GRID.values()))


def test_the_toys_web(monkeypatch):
    """A phrase fits the attempt before it in four cases of five, and who looks again at one of the
    seven goods is right three times in ten, at first never. What is given has no loss. No four
    goods come twice."""
    world, fits = toy.World(0), 0
    for _ in range(1000):
        given, text = world.document("revision")
        goods = re.search(r"Total of (.*)\?", given)[1].split(" + ")
        attempt, phrase, _ = given.split("\n\n")
        right = int(attempt.split("#### ")[1]) == world.answer(goods)
        fits += phrase == toy.PHRASES[right]
        assert text.endswith("<|eos|>") and "\n\n" not in text
    assert 0.75 < fits / 1000 < 0.85
    seven = [good for good in toy.GOODS if world.known[good] == (0.0, 0.3)]
    for again, low, high in ((False, 0, 0), (True, 0.25, 0.35)):
        found = [world.look_up(good, again) == world.price[good] for good in seven * 200]
        assert len(seven) == 7 and low <= sum(found) / len(found) <= high
    ids, labels = toy.padded([([3, 4], [5, 1]), ([3], [6, 7, 8, 1])], 0)
    assert ids.tolist() == [[3, 4, 5, 1, 0], [3, 6, 7, 8, 1]]
    assert labels.tolist() == [[-100, -100, 5, 1, -100], [-100, 6, 7, 8, 1]]
    world.seen.clear()
    monkeypatch.setattr(toy, "GOODS", toy.GOODS[:6])
    assert len({frozenset(world.make_problem()) for _ in range(15)}) == 15 == math.comb(6, 4)


def test_kinds_of_tokens():
    """Catches a price that is compared with another good's, and a phrase that does not end the
    first answer."""
    price = {"bako": 4, "tilu": 9}
    words = [
        "bako",
        ": 4",
        ", sum 4\n",
        "tilu",
        ": 4",
        ", sum 8\n",
        "#### 8",
        "\n\n",
        "Wait",
        "bako",
    ]
    assert toy.kinds_of_tokens(words, price) == (
        ["names", "right prices", "sums", "names", "wrong prices", "sums", "answer"]
        + ["what comes next", "more", "more"]
    )
    assert toy.kinds_of_tokens([": 4", "#### 4", "<|eos|>"], price) == [
        *("wrong prices", "answer", "what comes next"),
    ]


def test_where_the_kl_is():
    """The sum over the kinds of tokens is that of plain forward passes; wrong and right responses
    are kept apart."""
    tokenizer = toy.make_tokenizer()
    student, reviser = (tiny("llama", vocab_size=len(tokenizer), seed=s) for s in (0, 1))
    world = toy.World(5)
    texts = [toy.solution(world.make_problem(), [1, 2, 3, 4]) + "<|eos|>" for _ in range(3)]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    examples = [
        sdzero.Example([3, 9], Rollout(y, [0.0] * len(y), True), int(i == 0), [7, 8])
        for i, y in enumerate(ids)
    ]
    found = toy.where_the_kl_is(
        world, examples, SimpleNamespace(model=student, tokenizer=tokenizer), reviser_of(reviser)
    )
    totals = []
    for e in examples:
        n = len(e.response.ids)
        p = student(torch.tensor([e.student_ids])).logits[0, -n - 1 : -1].log_softmax(-1)
        q = reviser(torch.tensor([e.teacher_ids])).logits[0, -n - 1 : -1].log_softmax(-1)
        totals.append((p.exp() * (p - q)).sum().item())
    assert sum(found["right"]["nats"].values()) == pytest.approx(totals[0])
    assert sum(found["wrong"]["nats"].values()) == pytest.approx((totals[1] + totals[2]) / 2)
    assert found["wrong"]["tokens"] == len(ids[1]) and 0.05 < found["wrong"]["top"] < 1
    assert found["wrong"]["nats"]["more"] == 0 < found["wrong"]["nats"]["what comes next"]


def reviser_of(model):
    return SimpleNamespace(model=model)


def test_srt_revises_a_models_attempts(tmp_path, monkeypatch):
    """Everything by rule, so the figures are known. Catches SRT's revisions taken for the model's
    own, the phrase of the other verdict, EOS before it, shares of wrong attempts for right ones."""
    tokenizer, world, rows = toy.make_tokenizer(), toy.World(5), []
    for folder in ("base", "srt"):
        tiny("llama", vocab_size=len(tokenizer)).save_pretrained(tmp_path / folder)
        tokenizer.save_pretrained(tmp_path / folder)
    for _ in range(5):
        goods = world.make_problem()
        rows.append({"problem": toy.question(goods), "answer": str(world.answer(goods))})
    (tmp_path / "heldout.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    right, revised = [0, 1, 0, 1, 1], [1, 0, 0, 0, 1]

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def written(row, verdict):
        return f"#### {int(row['answer']) + (not verdict)}"

    def sample(lm, args, prompts, purpose, temperature):
        assert args.seed == 7 and temperature == 1 and len(prompts) == 5
        first, found = purpose == ("attempts",), []
        assert Path(lm.model.name_or_path).name == ("base" if first else "srt")
        for prompt, row, r, new in zip(prompts, rows, right, revised):
            text = toy.chat(row["problem"])
            text += "" if first else f"{written(row, r)}\n\n{toy.PHRASES[r]}\n\n"
            assert prompt == ids_of(text)
            ids = ids_of(written(row, r if first else new) + "<|eos|>")
            found.append(Rollout(ids, [0.0] * len(ids), True))
        return found

    monkeypatch.setattr(toy, "sample_all", sample)
    row, examples, student, reviser = toy.revised_by_srt(tmp_path, 7, "base")
    assert row == {
        "accuracy": 3 / 5,
        "revised_accuracy": 2 / 5,
        "correction_rate": pytest.approx(-1 / 2),
        "wrong_to_right": 1 / 2,
        "right_to_wrong": 2 / 3,
        "length": 2,
    }
    assert [e.reward for e in examples] == right
    assert [Path(lm.model.name_or_path).name for lm in (student, reviser)] == ["base", "srt"]


def test_the_trace_in_the_readme(tmp_path, capsys):
    """The first trace that puts a wrong attempt right, by the prices that are true, and the KL of
    this attempt's tokens. Catches a right attempt, or a total that is right by accident."""
    tokenizer, world = toy.make_tokenizer(), toy.World(5)
    models = [tiny("llama", vocab_size=len(tokenizer), seed=s, dtype=torch.float32) for s in (0, 1)]
    goods = world.make_problem()
    prices = [world.price[good] for good in goods]
    wrong = [(price + 1) % 10 for price in prices]
    by_accident = prices[::-1]
    assert by_accident != prices

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    lines = []
    for r, first, last in ((1, prices, prices), (0, wrong, by_accident), (0, wrong, prices)):
        ids = [ids_of(text) for text in (toy.chat(toy.question(goods)), toy.solution(goods, first))]
        ids += ids_of(toy.PHRASES[r]), ids_of(toy.solution(goods, last))
        texts = [toy.solution(goods, numbers) for numbers in (first, last)]
        answer = str(world.answer(goods))
        lines.append(srt.Trace(toy.question(goods), answer, r, toy.PHRASES[r], *texts, True, *ids))
    (tmp_path / "srt").mkdir()
    traces = "".join(json.dumps(vars(line)) + "\n" for line in lines)
    (tmp_path / "srt" / "traces.jsonl").write_text(traces)
    student, reviser = (SimpleNamespace(model=m, tokenizer=tokenizer) for m in models)
    toy.show_trace(tmp_path, world, student, reviser)
    out = capsys.readouterr().out
    for name, text in (("y  ", lines[2].init_text), ("y_rev", lines[2].revision_text)):
        assert re.search(rf"(?m)^{name} +(.*)$", out)[1] == text.replace("\n", " / ")
    assert f"P_0        {toy.PHRASES[0]}" in out
    y = lines[2].init_ids + [tokenizer.eos_token_id]
    told = lines[2].prompt_ids + lines[2].init_ids + lines[2].phrase_ids
    p, q = (
        model(torch.tensor([read + y])).logits[0, -len(y) - 1 : -1].log_softmax(-1)
        for model, read in zip(models, (lines[2].prompt_ids, told))
    )
    shown = [float(n) for n in re.search(r"KL, nats +(.*)", out)[1].split()]
    assert shown == pytest.approx((p.exp() * (p - q)).sum(-1).tolist(), abs=1e-3)


def test_worlds(tmp_path, capsys):
    """The tables and the figure are those of the runs; catches a world or a method that stands in
    another's row."""
    kl = {
        v: dict(nats=dict.fromkeys(toy.KINDS_OF_TOKENS, 0.5), tokens=9, top=1) for v in ("wrong",)
    }
    kl["right"] = kl["wrong"]
    for world in (0, 1):
        folder = tmp_path / f"seed{world}"
        for run, last in (("srt", 0.5), ("sdzero", 0.75 + world / 10)):
            (folder / run).mkdir(parents=True)
            with open(folder / run / "metrics.jsonl", "w") as file:
                for step, share in enumerate((0.25, last)):
                    figures = dict.fromkeys(toy.COLUMNS.values(), share)
                    line = {"kind": "eval", "step": step, "accuracy_se": 0.1, **figures}
                    file.write(json.dumps(line) + "\n")
        rows = {"SD-Zero": dict.fromkeys(toy.COLUMNS.values(), 0.75 + world / 10)}
        report = {"world": world, "rows": rows, "kl": {"base": kl}}
        (folder / "report.json").write_text(json.dumps(report))
    results, figure = tmp_path / "results" / "toy.jsonl", tmp_path / "figure.png"
    flags = ["--results", str(results), "--output", str(figure)]
    worlds.main(["--collect", str(tmp_path), *flags])
    first = capsys.readouterr().out
    assert "| SD-Zero | 75.0 / 85.0 | 80.0 ± 7.1 |" in first and "500.0 ± 0.0" in first
    worlds.main(flags)  # from the file alone
    assert capsys.readouterr().out == first
    for nowhere in ("/dev/full", "/proc/x/toy.jsonl"):
        with pytest.raises(SystemExit) as stopped:
            worlds.main(["--collect", str(tmp_path), "--results", nowhere])
        message = f"cannot write {nowhere}, name another --results"
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    lines = lines_of(results)
    assert worlds.mean_curve(lines, "sdzero") == [(0.0, [25, 25]), (0.0, [75, 85])]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return
    assert figure.stat().st_size > 10_000


@pytest.mark.parametrize(
    "example, flags, message",
    [
        (toy, "--seeds 0", "--seeds: must be at least 1, not 0"),
        (toy, "--seeds -1", "--seeds: must be at least 1, not -1"),
        (toy, "--out file", "cannot use file, name another --out"),
        (real, "--model m --out file", "cannot use file, name another --out"),
        (worlds, "--collect . --results none.jsonl", "no seed*/report.json"),
        (worlds, "--results none.jsonl", "cannot read none.jsonl"),
        (worlds, "--results file", "cannot read file"),
        (worlds, "--results rows", "cannot read rows: it holds no results of toy.py"),
        (worlds, "--results kl", "cannot read kl: it holds no results of toy.py"),
        (worlds, "--collect w", "w/seed0/report.json is damaged, repeat the command of toy.py"),
        (worlds, "--collect v", "cannot read the runs of toy.py in v: v/seed0/srt/metrics.jsonl,"),
        (worlds, "--output file/a.png", "cannot write file/a.png"),
        (worlds, "--output a.xyz", "cannot write a.xyz: Format 'xyz' is not supported"),
        (ablations, "--toy .", "no finished run"),
        (ablations, "--toy w", "no finished run"),
    ],
)
def test_what_the_examples_refuse(example, flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("no JSON")
    Path("rows").write_text(json.dumps({"kl": {}}))
    Path("kl").write_text(json.dumps({"row": "SRT", **dict.fromkeys(toy.COLUMNS.values(), 1)}))
    for path, text in (
        ("w/seed0/report.json", '{"world": 0, "ro'),
        ("w/sdzero/config.json", ""),
        ("v/seed0/report.json", '{"world": 0}'),
        ("v/seed0/srt/metrics.jsonl", "{}\n"),
    ):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(text)
    if "--output" in flags:
        pytest.importorskip("matplotlib")
    with pytest.raises(SystemExit) as stopped:
        example.main(flags.split())
    assert stopped.value.code == 2 and message in capsys.readouterr().err


# -------------------------------------------------------------------------- tests/bench_training.py


@pytest.mark.parametrize(
    "what, name",
    [
        ("loss", "full_logits"),
        ("loss", "topk_logits"),
        ("loss", "sampled_token"),
        ("srt", "srt"),
        ("step", "step"),
    ],
)
@pytest.mark.parametrize("ours", ["0", "1"])
def test_bench_training(what, name, ours, monkeypatch, capsys):
    """Both sides of each mode run, at sizes of no interest. Catches a benchmark that still calls
    what the scripts have renamed or moved."""
    for size, value in dict(TOKENS=70, VOCABULARY=128, ROWS=128, WIDTH=8).items():
        monkeypatch.setattr(bench_training, size, value)
    small = dict(vocab_size=128, hidden_size=36, intermediate_size=48, num_hidden_layers=2)
    monkeypatch.setattr(bench_training, "SMOLLM2", {**bench_training.SMOLLM2, **small})
    bench_training.main([what, "--child", f"{name}:{ours}"])
    seconds, megabytes = json.loads(capsys.readouterr().out)
    assert seconds > 0 and megabytes >= 0


def test_the_top_token_of_a_toy_response(monkeypatch):
    """One of 14 is the top 5%."""
    tokenizer, world = toy.make_tokenizer(), toy.World(5)
    text = toy.solution(world.make_problem(), [1, 2, 3, 4]) + "<|eos|>"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    example = sdzero.Example([3], Rollout(ids, [0.0] * 14, True), 1, [7])
    monkeypatch.setattr(toy, "kl_by_token", lambda *args: torch.arange(14.0))
    lm = SimpleNamespace(model=None, tokenizer=tokenizer)
    found = toy.where_the_kl_is(world, [example], lm, lm)["right"]
    assert found["top"] == pytest.approx(13 / 91) and sum(found["nats"].values()) == 91


def test_what_a_second_look_repeats():
    """By the phrase before it; and a price goes with its own good only."""
    world, seen = toy.World(0), []
    look_again = world.look_again

    def watched(goods, named, prices, repeat):
        seen.append(repeat)
        return look_again(goods, named, prices, repeat)

    world.look_again = watched
    for _ in range(50):
        given, _ = world.document("revision")
        assert seen[-1] == toy.REPEAT[toy.PHRASES.index(given.split("\n\n")[1])]
    world.look_up = lambda good, again=False: "afresh"
    assert look_again(["a", "b"], ["a", "c"], [1, 2], 1.0) == [1, "afresh"]


def test_the_toy_prints_what_it_measured(monkeypatch, tmp_path, capsys):
    def row(value):
        return dict.fromkeys(toy.COLUMNS.values(), value)

    def kl(world, examples, *models):
        """Of wrong responses, and twice that of right ones."""
        found = {}
        for n, verdict in ((1, "wrong"), (2, "right")):
            nats = dict.fromkeys(toy.KINDS_OF_TOKENS, share[examples] * n)
            found[verdict] = {"nats": nats, "tokens": 14 * n, "top": 0.25 * n}
        return found

    share = {"base": 0.1, "srt": 0.2, "sdzero": 0.3}
    stages = {"base": {**row(0.5), "accuracy_se": 0.021}, "SRT": row(0.6)}
    stages["SD-Zero"] = {**row(0.7), "accuracy_se": None}
    monkeypatch.setattr(toy, "both_stages", lambda out, seed: dict(stages))
    revised = lambda out, seed, whose: (row(share[whose]), whose, None, None)  # noqa: E731
    monkeypatch.setattr(toy, "revised_by_srt", revised)
    monkeypatch.setattr(toy, "where_the_kl_is", kl)
    monkeypatch.setattr(toy, "show_trace", lambda *args: None)
    monkeypatch.setattr(toy, "pictures", lambda out: None)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").touch()
    (tmp_path / "stage1.jsonl").write_text(toy.make_row(toy.World(3)))
    toy.main(["--out", str(tmp_path), "--seed", "3"])
    out = capsys.readouterr().out
    percents = {"base": 50, "SRT": 60, "SD-Zero": 70}
    percents |= {"base, revised by SRT": 10, "SD-Zero, revised by SRT": 30}
    for name, x in percents.items():
        assert f"| {name} | {' | '.join([f'{x:.1f}'] * 5)} | {x / 100:.1f} |" in out
    assert "seeds 3 to 3, standard errors of accuracies up to 2.1" in out
    for name, nats in (("base", 100), ("SRT", 200)):
        for n, verdict in ((1, "wrong"), (2, "right")):
            figures = " | ".join([f"{nats * n:.1f}"] * 7)
            assert f"| {name} | {verdict} | {14 * n}.0 | {25 * n}.0 | {figures} |" in out
    report = (tmp_path / "report.json").read_text()
    assert json.loads(report)["world"] == 3
    monkeypatch.setattr(Path, "write_text", half_written)
    with pytest.raises(SystemExit):
        toy.main(["--out", str(tmp_path), "--seed", "3"])
    assert f"cannot write to {tmp_path}, make room and repeat" in capsys.readouterr().err
    assert (tmp_path / "report.json").read_text() == report
