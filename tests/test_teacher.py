"""teacher.py: what may move, when, in which precision, and in which mode."""

import hashlib
import io

import pytest
import torch
from tiny import tiny

from teacher import Teacher

IDS = torch.tensor([[5, 9, 3, 7, 2, 8, 11]])


def fingerprint(model):
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return hashlib.sha256(b"".join(n.encode() + t.detach().double().numpy().tobytes() for n, t in tensors)).hexdigest()


def train(student, steps, teacher=None):
    """Real optimizer steps, numbered from 1; a buffer moves too, as a running statistic would."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    for step in range(1, steps + 1):
        student(input_ids=IDS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        getattr(student, "statistic", torch.zeros(1)).add_(1)
        if teacher is not None:
            teacher.update(step)
        yield step


@pytest.mark.parametrize("kind", ["base", "ema"])
def test_starts_as_a_copy_with_its_own_storage_and_base_never_moves(kind):
    """Catches an average that starts at zero, a copy that shares memory with the student, gradients switched off in the student."""
    student = tiny("llama", dtype=torch.float32).train()
    student.register_buffer("statistic", torch.ones(3))
    teacher = Teacher(student, kind, rate=0.1, interval=4 if kind == "ema" else 1)  # of three steps none moves the average
    start = fingerprint(teacher.module)
    assert start == fingerprint(student)
    assert all(p.requires_grad for p in student.parameters()) and not any(p.requires_grad for p in teacher.module.parameters())
    for _ in train(student, 3, teacher):
        assert fingerprint(teacher.module) == start != fingerprint(student)
    assert student.training


def test_live_is_the_student_and_update_leaves_it_alone():
    student = tiny("llama", dtype=torch.float32)
    teacher = Teacher(student, "live")
    for _ in train(student, 1):
        trained = fingerprint(student)
        teacher.update(1)
        assert teacher.module is student and fingerprint(student) == trained and all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rate_1_is_a_hard_copy(dtype):
    student = tiny("llama", dtype=dtype)
    teacher = Teacher(student, "ema", rate=1.0, interval=3)
    start = [p.clone() for p in teacher.module.parameters()]
    for step in train(student, 7, teacher):
        expected = start if step < 3 else latest if step % 3 else list(student.parameters())
        assert all(torch.equal(a, b) for a, b in zip(teacher.module.parameters(), expected, strict=True))
        latest = [p.detach().clone() for p in teacher.module.parameters()]


@pytest.mark.parametrize("rate, interval", [(0.05, 1), (0.5, 1), (0.3, 3)])
def test_ema_equals_a_loop(rate, interval):
    """Catches a swapped rate, an update at the wrong steps, weights matched with the wrong names, a module that lags the average."""
    student = tiny("gpt2", dtype=torch.float32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    teacher = Teacher(student, "ema", rate, interval)
    expected = {n: p.detach().double().clone() for n, p in student.named_parameters()}
    for step in train(student, 7, teacher):
        if step % interval == 0:
            expected = {n: (1 - rate) * expected[n] + rate * p.detach().double() for n, p in student.named_parameters()}
        for name, weight in teacher.module.named_parameters():
            torch.testing.assert_close(weight.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_a_bf16_student_gets_an_fp32_average():
    student = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.constant_(student.weight, 1.0)
    teacher, average, bf16_average = Teacher(student, "ema", rate=0.01), 1.0, student.weight.detach().clone()
    torch.nn.init.constant_(student.weight, 1.0625)
    for step in range(1, 101):
        teacher.update(step)
        average = 0.99 * average + 0.01 * 1.0625
        bf16_average.lerp_(student.weight.detach(), 0.01)
    assert bf16_average.item() == 1.0  # what an average in bf16 would be: stuck
    assert teacher.average["weight"].item() == pytest.approx(average, abs=1e-5) and average > 1.03
    assert teacher.module.weight.dtype == torch.bfloat16 and teacher.module.weight.item() == torch.tensor(average).bfloat16().item()


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
def test_scoring_is_in_eval_mode_without_gradient_and_puts_modes_back(kind):
    student = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = student(input_ids=IDS).logits.detach()
    student.train()
    student.transformer.h[0].eval()
    teacher = Teacher(student, kind)
    assert kind == "live" or not any(m.training for m in teacher.module.modules())
    if kind != "live":
        teacher.module.train()  # even when somebody calls it
        teacher.module.transformer.h[0].eval()

    def modes():
        return [m.training for m in [*student.modules(), *teacher.module.modules()]]

    before = modes()
    for _ in range(2):
        with teacher.scoring() as model:
            logits = model(input_ids=IDS).logits
        assert torch.equal(logits, expected) and not logits.requires_grad and torch.is_grad_enabled()
        assert modes() == before
    with pytest.raises(RuntimeError, match="out of memory"), teacher.scoring():
        raise RuntimeError("out of memory")
    assert modes() == before and torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_teacher_goes_on_as_if_never_stopped(dtype):
    """In bf16 the state must hold the fp32 average: the module's own weights have lost its last bits."""
    student = tiny("llama", dtype=dtype)
    first = Teacher(student, "ema", rate=0.02)
    list(train(student, 3, first))
    saved = {n: t.clone() for n, t in first.state_dict().items()}
    torch.save(saved, file := io.BytesIO())
    state = torch.load(io.BytesIO(file.getvalue()))
    second = Teacher(student, "ema", rate=0.02)
    assert fingerprint(second.module) != fingerprint(first.module)
    second.load_state_dict(state)
    for step in (4, 5, 6, 7):
        assert fingerprint(second.module) == fingerprint(first.module)
        assert all(torch.equal(second.average[n], a) for n, a in first.average.items())
        first.update(step), second.update(step)
    assert all(torch.equal(state[n], saved[n]) for n in saved)  # loaded by value: the caller's tensors did not move along
    with pytest.raises(ValueError, match="lm_head"):
        second.load_state_dict({n: t for n, t in state.items() if n != "lm_head.weight"})
    base = Teacher(student)
    assert base.state_dict() == {}
    start = fingerprint(base.module)
    base.load_state_dict({})
    assert fingerprint(base.module) == start


def test_tied_weights_stay_tied():
    """Catches an average with two copies of one matrix, or a copy whose output layer is cut off from its embedding."""
    student = tiny("qwen3", dtype=torch.float32, tie_word_embeddings=True)
    teacher = Teacher(student, "ema", rate=0.5)
    start = student.lm_head.weight.detach().clone()
    list(train(student, 1, teacher))
    assert teacher.module.lm_head.weight is teacher.module.model.embed_tokens.weight
    assert len([n for n in teacher.average if "lm_head" in n or "embed_tokens" in n]) == 1
    torch.testing.assert_close(teacher.module.lm_head.weight, (start + student.lm_head.weight.detach()) / 2)


def test_wrong_settings_raise():
    for settings in ({"kind": "frozen"}, {"rate": 0.0}, {"rate": 1.5}, {"rate": -0.1}, {"rate": float("nan")}, {"interval": 0}):
        with pytest.raises(ValueError, match="teacher"):
            Teacher(torch.nn.Linear(1, 1), **{"kind": "ema", **settings})
