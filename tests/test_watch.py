"""What a run tells before it is lost: warnings, the best model, entropy, samples in text."""

import json
import math
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from test_scripts import FLAGS, STAGE_1, STAGE_2, call, lines_of, save_model, save_rows
from tiny import tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import losses
import sdzero
import srt


def step(n, **values):
    ordinary = {"cut_off": 0.1, "length": 100.0, "entropy": 0.5}
    return {"kind": "train", "step": n, **ordinary, **values}


def evaluation(n, accuracy, error=0.02):
    return {"kind": "eval", "step": n, "accuracy": accuracy, "accuracy_se": error}


@pytest.mark.parametrize(
    "name, before, after",
    [
        ("cut_off", 0.1, 0.35),
        ("length", 100, 230),
        ("length", 100, 20),
        ("entropy", 0.5, 0.05),
        ("entropy", 0.5, 1.6),
    ],
)
def test_a_step_that_goes_wrong_is_said(name, before, after):
    """However slowly. Catches a sign that looks at the wrong figure, in the wrong direction, or at
    one step."""
    lines = [step(n, **{name: before}) for n in range(1, 11)]
    lines += [step(n, **{name: math.sqrt(before * after)}) for n in range(11, 31)]
    assert common.signs_of_collapse(lines) == {}
    lines += [step(n, **{name: after}) for n in range(31, 41)]
    signs = common.signs_of_collapse(lines)
    assert list(signs) == [name] and f"{after:.3g}" in signs[name]
    too_few = [step(n, **{name: before if n <= 10 else after}) for n in range(1, 20)]
    assert common.signs_of_collapse(too_few) == {}
    single = [step(n) for n in range(1, 31)] + [step(31, **{name: after})]
    assert common.signs_of_collapse(single) == {}  # one bad batch is no collapse


def test_an_entropy_of_zero_is_a_collapse():
    lines = [step(n) for n in range(1, 11)] + [step(n, entropy=0.0) for n in range(11, 31)]
    assert list(common.signs_of_collapse(lines)) == ["entropy"]


def test_a_halved_length_is_what_stage_2_does():
    lines = [step(n, length=31) for n in range(1, 11)] + [step(n, length=15) for n in range(11, 31)]
    assert common.signs_of_collapse(lines) == {}


def test_steps_without_entropy_are_not_compared():
    """Stage 1 trains on stored traces, and a step without a token has no entropy."""
    lines = [step(n, cut_off=n / 30, entropy=None) for n in range(1, 31)]
    assert common.signs_of_collapse(lines) == {}


def test_a_fall_of_three_standard_errors_from_the_best_is_said():
    rising = [evaluation(0, 0.5), evaluation(1, 0.7), evaluation(2, 0.66)]
    assert common.signs_of_collapse(rising) == {}
    sentence = common.signs_of_collapse(rising + [evaluation(3, 0.63)])["accuracy"]
    assert "from 0.700 at step 1 to 0.630 at step 3" in sentence
    assert common.signs_of_collapse(rising + [evaluation(3, 0.65, 0.03)]) == {}
    assert common.signs_of_collapse(rising + [evaluation(3, 0.65)]) == {}  # 2.5 of them
    assert common.signs_of_collapse([evaluation(1, 0.7, 0.03), evaluation(2, 0.63, 0.01)]) == {}
    assert common.signs_of_collapse([evaluation(1, 0.9), evaluation(2, 0.0, 0.0)])
    assert common.signs_of_collapse([evaluation(0, 1.0, None), evaluation(1, 0.0, None)]) == {}


def test_the_clock_of_a_step(monkeypatch):
    """Two passes on a batch that was sampled in the first: each has its own seconds."""
    run, found = SimpleNamespace(started=0.0, log=lambda *rest: None), []
    run.args = Namespace(passes=2, eval_every=99, save_every=99)
    for number, now, tokens in ((1, 10.0, 50), (2, 13.0, 0)):
        monkeypatch.setattr(common.time, "time", lambda now=now: now)
        found.append({})
        common.Run.end_step(run, number, 4, found[-1], tokens)
    assert found == [{"seconds": 10.0, "tokens_per_s": 5.0}, {"seconds": 3.0}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [(f"{i} + {i + 1} = ?", str(2 * i + 1)) for i in range(60)]
    return save_rows(tmp_path_factory.mktemp("data") / "problems.jsonl", rows)


@pytest.mark.parametrize(
    "accuracies, best",
    [
        ((0.5, 0.3, 0.6, 0.4), 10),
        ((0.9, 0.3, 0.2, 0.5), None),
        ((0.9, 0.3, 0.3, 0.1), 5),  # the earlier of two equal ones
        ((0.5, 0.6, 0.3, 0.4), 5),  # the last one is better than the one before it only
    ],
)
def test_the_best_evaluated_model_is_kept_beside_the_last(
    accuracies, best, base, data, tmp_path, monkeypatch
):
    """The model before training does not count; where the last one is the best, it is enough."""
    seen, out = {}, tmp_path / "out"

    def evaluate(task, step):
        seen[step] = {n: p.clone() for n, p in task.lm.model.state_dict().items()}
        figures = dict(accuracy=accuracies[len(seen) - 1], accuracy_se=0.01, sample="")
        return figures

    monkeypatch.setattr(common, "evaluate", evaluate)
    steps = ["--batch-size", "4", "--problems", "44"]
    call(sdzero, *FLAGS, *STAGE_2, *steps, model=base, dataset=data, output=out)
    assert list(seen) == [0, 5, 10, 11]
    last = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(torch.equal(p, seen[11][n]) for n, p in last.items())
    assert (out / "best").exists() == (best is not None)
    if best:
        kept = AutoModelForCausalLM.from_pretrained(out / "best").state_dict()
        assert all(torch.equal(p, seen[best][n]) for n, p in kept.items())
        assert any(not torch.equal(p, last[n]) for n, p in kept.items())
        assert json.loads((out / "best" / "srt.json").read_text())["prompt"]
        tokenizers = [AutoTokenizer.from_pretrained(path) for path in (base, out / "best")]
        assert tokenizers[0].get_vocab() == tokenizers[1].get_vocab()


def test_a_warning_is_given_once_and_the_run_goes_on(base, data, tmp_path, monkeypatch, capsys):
    def evaluate(task, step):
        return dict(accuracy=0.9 if step < 5 else 0.1, accuracy_se=0.01, sample="")

    monkeypatch.setattr(common, "evaluate", evaluate)
    call(sdzero, *FLAGS, *STAGE_2, model=base, dataset=data, problems=24, output=tmp_path / "out")
    out = capsys.readouterr().out
    assert out.count("warning: held-out accuracy fell from 0.900 at step 0") == 1
    assert (tmp_path / "out" / "config.json").exists()


def test_samples_are_shown_with_their_verdicts(base, data, tmp_path, capsys):
    """Problem, response and verdict in text; at evaluations the revision and its verdict too."""
    call(srt, *FLAGS, *STAGE_1, model=base, dataset=data, output=tmp_path / "srt")
    model = tmp_path / "srt"
    call(sdzero, *FLAGS, *STAGE_2, model=model, dataset=data, output=tmp_path / "out")
    out = capsys.readouterr().out
    lines = lines_of(tmp_path / "out" / "metrics.jsonl")
    shown = [line["step"] for line in lines if line["kind"] == "train" and "sample" in line]
    assert shown == [1, 11]
    for line in lines:
        if "sample" in line:
            assert line["sample"] in out
            assert "problem: " in line["sample"] and "; gold '" in line["sample"]
            assert ("revised [" in line["sample"]) == (line["kind"] == "eval")
    collected = lines_of(tmp_path / "srt" / "metrics.jsonl")
    assert all("sample" in line for line in collected if line["kind"] in ("collect", "eval"))


def test_the_logged_entropy_is_the_students():
    """Against -sum p log p in float64, on the distribution at the sampling temperature."""
    from test_training import EXAMPLES, VOCAB, settings

    student, other = tiny("llama"), tiny("llama", seed=1)
    layers = losses.OutputLayer(student, VOCAB), losses.OutputLayer(other, VOCAB)
    teacher = sdzero.Teacher(other)
    got = sdzero.distill_step(student, teacher, *layers, EXAMPLES, settings(temperature=0.7))
    expected = []
    for e in EXAMPLES:
        logits = student(input_ids=torch.tensor([e.student_ids])).logits[0, :, :VOCAB] / 0.7
        for t in range(len(e.prompt_ids), len(e.student_ids)):
            p = logits[t - 1].softmax(-1).tolist()
            expected.append(-sum(x * math.log(x) for x in p))
    assert got["entropy"] == pytest.approx(sum(expected) / len(expected), rel=1e-6)
