"""examples/baselines.py: what each method trains on, GRPO's gradient against its formula in float64, each method by its command line."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_scripts import FLAGS, base, call, data, lines_of  # noqa: F401: two of them are fixtures
from tiny import tiny
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import baselines
from losses import OutputLayer
from rollout import Rollout
from srt import Problem


def group(prompt_ids, rewards, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 7, (len(rewards),), generator=generator).tolist()
    responses = [Rollout(torch.randint(2, 40, (n,), generator=generator).tolist() + [1], [0.0] * (n + 1), True) for n in lengths]
    return baselines.Group(Problem(f"problem {prompt_ids}", "7", prompt_ids), responses, rewards)


@pytest.mark.parametrize("micro_tokens", [12, 10_000])
def test_grpo_gradient(micro_tokens):
    """Breaks if advantages are normalised over the batch, tokens shifted, the temperature forgotten, or a micro-batch's divisor taken."""
    groups = [group([3, 4, 5], [1, 0, 0, 1], 1), group([6], [1, 1, 1, 1], 2), group([7, 8], [0, 0, 1, 0], 3)]
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
    metrics = baselines.grpo_step(model, OutputLayer(model), groups, SimpleNamespace(micro_tokens=micro_tokens, temperature=0.7))
    assert metrics["loss"] == pytest.approx((total / tokens).item(), rel=1e-5) and metrics["with_signal"] == 8 / 12
    for n, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], rtol=1e-5, atol=1e-6)  # advantages are fp32


def test_grpo_without_any_signal_has_no_gradient():
    model = tiny("llama")
    groups = [group([3], [1, 1]), group([4], [0, 0])]
    metrics = baselines.grpo_step(model, OutputLayer(model), groups, SimpleNamespace(micro_tokens=99, temperature=1.0))
    assert metrics == {"loss": 0.0, "with_signal": 0.0} and all(p.grad is None for p in model.parameters())


def test_rft_keeps_distinct_right_responses():
    g = group([3, 4], [1, 0, 1, 1])
    g.responses[3] = g.responses[0]
    kept = baselines.right_responses([g, group([5], [0, 0])])
    assert [t["revision_ids"] for t in kept] == [g.responses[0].ids, g.responses[2].ids]
    assert all(t["prompt_ids"] == [3, 4] and t["init_ids"] == t["phrase_ids"] == [] and t["finished"] for t in kept)


def test_what_the_teachers_are_shown():
    """SDPO: another response of the group, right and without EOS, never the scored one; none where there is none."""
    g, lonely = group([3, 4], [0, 1, 1, 0]), group([5], [0, 1])
    a, b = g.responses[1].ids, g.responses[2].ids
    examples = baselines.sdpo_examples([g, lonely, group([6], [0, 0])], [9, 9])
    assert [e.response.ids for e in examples] == [y.ids for y in g.responses] + [lonely.responses[0].ids]
    assert [e.shown_ids for e in examples] == [a[:-1], b[:-1], a[:-1], b[:-1], lonely.responses[1].ids[:-1]]
    assert examples[1].teacher_ids == [3, 4] + b[:-1] + [9, 9] + a and examples[1].student_ids == [3, 4] + a
    shown = baselines.sdft_examples([g], {g.problem.key: [20, 21]}, [9])
    assert [e.teacher_ids for e in shown] == [[3, 4, 20, 21, 9] + y.ids for y in g.responses]


@pytest.mark.parametrize("method", ["rft", "grpo", "sdft", "sdpo"])
def test_command_line(method, base, data, tmp_path):  # noqa: F811
    flags = ["--batch-size", "8", "--group", "4", "--problems", "12"] + ([] if method == "rft" else ["--generations", "64"])
    call(baselines, "--method", method, "--model", base, "--dataset", data, *FLAGS, *flags, "--output", tmp_path / "out")
    lines = lines_of(tmp_path / "out" / "metrics.jsonl")
    train, evals = [x for x in lines if x["kind"] == "train"], [x for x in lines if x["kind"] == "eval"]
    assert evals[0]["step"] == 0 and evals[-1]["step"] == train[-1]["step"]
    if method == "rft":
        assert [x["generations"] for x in lines if x["kind"] == "collect"] == [4 * 12]
    else:
        assert [x["generations"] for x in train] == [8 * i for i in range(1, 9)]
    before, after = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, tmp_path / "out"))
    assert any(not torch.equal(p, before[n]) for n, p in after.items())


def test_bad_input(base, data, tmp_path):  # noqa: F811
    uneven, budget = ["--method", "grpo", "--group", "3", "--batch-size", "8"], ["--method", "rft", "--generations", "8"]
    for flags, message in ((uneven, "whole groups"), (budget, "--group")):
        with pytest.raises(baselines.BadInput, match=message):
            call(baselines, "--model", base, "--dataset", data, *FLAGS, *flags, "--output", tmp_path / "out")
