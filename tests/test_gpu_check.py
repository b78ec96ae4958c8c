"""The GPU's path, as far as a CPU shows it: gpu_check.py, compiled losses, --resume."""

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import memory_table
import pytest
import torch
from tiny import make_tokenizer, tiny
from torch._dynamo.utils import counters

import common
import sdzero
import srt
from losses import OutputLayer, backward_by_chunks
from teacher import Teacher

SCRIPT = Path(__file__).with_name("gpu_check.py")


def test_gpu_check_runs_and_finds_nothing_wrong(tmp_path):
    """Every part with tiny sizes: an API that changed under the script, and a check that fails."""
    command = [sys.executable, SCRIPT, "--smoke", "--output", tmp_path]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, capture_output=True, text=True, env=env)
    assert run.returncode == 0, run.stdout + run.stderr
    results = [json.loads(line) for line in open(tmp_path / "gpu_check.jsonl")]
    finished = {result["name"].split()[0] for result in results if "took_s" in result}
    assert finished == {str(part) for part in range(10)}
    assert "| sampling, Qwen3-0.6B" in (tmp_path / "rows.md").read_text()


def flags(*given):
    nothing = ["--model", "-", "--dataset", "-", "--output", "/nothing/is/here"]
    return sdzero.parse_arguments([*nothing, *given])


def by_chunks(loss, rows, against=True):
    """Columns and gradients of `rows` tokens in chunks of 4, of a layer with rows beyond V."""
    student, other = tiny("llama", dtype=torch.float32), tiny("llama", 40, 1, torch.float32)
    generator = torch.Generator().manual_seed(rows)
    hidden, teacher_hidden = torch.randn(2, rows, 32, generator=generator)
    hidden.requires_grad_()
    tensors = [torch.randint(37, (rows,), generator=generator)]
    tensors.append(torch.randn(rows, generator=generator))
    teacher = (OutputLayer(other.requires_grad_(False), 37), teacher_hidden)
    columns = backward_by_chunks(
        loss,
        OutputLayer(student, 37),
        hidden * 1,
        *tensors,
        divisor=rows,
        teacher=teacher if against else None,
        size=4,
    )
    return columns, hidden.grad, student.get_output_embeddings().weight.grad


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("--objective", "topk_logits", "--topk", "8", "--importance-cap", "2"),
        ("--objective", "sampled_token", "--temperature", "0.7"),
    ],
)
def test_compiled_losses_are_captured_whole_and_once(given, monkeypatch):
    """As `distill` compiles them, without Inductor: the loss is a new closure in every micro-batch,
    which must not compile again; a graph break or a lost gradient shows, too."""
    compile = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile)
    torch._dynamo.reset()
    counters.clear()
    for rows in (9, 7, 8):  # chunks of 4, 4, 1; 4, 3; 4, 4
        got = by_chunks(common.compiled(sdzero.make_loss(flags(*given))), rows)
        expected = by_chunks(sdzero.make_loss(flags(*given)), rows)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2  # any number of rows, and one row


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
def test_a_loss_compiled_by_inductor():
    """The real backend: its code writes no wrong gradient into the logits that it was given."""

    def loss(logits, token_ids, weight):
        nll = -srt.token_logprobs(logits, token_ids)
        return torch.stack([weight * nll, nll], dim=-1)

    torch._dynamo.reset()
    got = by_chunks(common.compiled(loss), 8, against=False)
    torch.testing.assert_close(got, by_chunks(loss, 8, against=False), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["base", "ema"])
def test_a_resumed_run_keeps_no_second_state(kind, tmp_path, monkeypatch):
    """It was loaded onto the GPU and lived as long as the run: 2 bytes per weight, with ema 6. The
    moments may be the loaded ones, which AdamW takes over on a CPU."""

    def start():
        model = tiny("llama", dtype=torch.bfloat16)
        optimizer = common.Optimizer(model)
        return model, optimizer, Teacher(model, kind)

    model, optimizer, teacher = start()
    model(input_ids=torch.tensor([[3, 4, 5]])).logits.float().square().mean().backward()
    optimizer.step(1e-3)
    teacher.update(1)
    folder = tmp_path / "checkpoint-1"
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    torch.save(
        {"optimizer": optimizer.state_dict(), "teacher": teacher.state_dict()},
        folder / "training_state.pt",
    )
    loaded, load = [], torch.load

    def watched(*args, **settings):
        assert settings["map_location"] == "cpu"
        state = load(*args, **settings)
        moments = [x for s in state["optimizer"]["adamw"]["state"].values() for x in s.values()]
        others = [*state["optimizer"]["low"], *state["teacher"].values()]
        for name, tensors in (("moment", moments), ("other", others)):
            loaded.extend((name, weakref.ref(tensor.untyped_storage())) for tensor in tensors)
        return state

    monkeypatch.setattr(torch, "load", watched)
    expected = [p.clone() for p in model.parameters()]
    model, optimizer, teacher = start()
    run = common.Run.__new__(common.Run)
    run.args = argparse.Namespace(lora=None, training_bytes=None)
    lm = common.LM(model, *[None] * 4)
    run.folder, run.task = tmp_path, common.Task(run.args, lm, *[None] * 5)
    assert run.restore(optimizer=optimizer, teacher=teacher) == 1
    gc.collect()
    assert all(torch.equal(a, b) for a, b in zip(expected, model.parameters()))
    assert len([name for name, _ in loaded if name == "other"]) == len(expected) * (
        2 if kind == "ema" else 1
    )
    assert not [name for name, storage in loaded if name == "other" and storage() is not None]


def test_the_memory_table_by_hand():
    """Qwen3-4B on an H100 with the README's stage-2 command: each part from its shape, so that
    neither the estimate nor the flags' defaults change without the README's table."""
    parameters = 151936 * 2560 + 2560  # tied embeddings, the last norm
    attention = 2560 * (32 + 8 + 8) * 128 + 32 * 128 * 2560 + 2 * 128
    parameters += 36 * (attention + 3 * 2560 * 9728 + 2 * 2560)
    parts, slots = memory_table.estimate(memory_table.on_meta("4B"), sdzero)
    assert parts["weights"] == parts["teacher"] == 2 * parameters
    assert parts["optimizer"] == 10 * parameters and parts["gradients"] == 4 * parameters
    one_slot = 36 * 2 * 8 * 128 * 2 * (512 + 8192)
    assert slots[1] == str(int((0.9 * 85e9 - 14 * parameters) / one_slot))
    assert slots[0] == "–" and 75e9 < sum(parts.values()) < 84e9
