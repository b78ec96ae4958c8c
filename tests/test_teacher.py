"""teacher.py: what may move, when, in which precision, and in which mode."""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import textwrap

import pytest
import torch
from tiny import tiny

import teacher as teacher_file
from teacher import Teacher

KINDS = ["base", "live", "ema"]
IDS = torch.tensor([[5, 9, 3, 7, 2, 8, 11]])
NO_DROPOUT = dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
DROPOUT = dict(resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)


def fingerprint(model):
    """Of all weights and buffers with their names: it changes with a single bit."""
    sha = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        sha.update(name.encode() + tensor.detach().double().numpy().tobytes())
    return sha.hexdigest()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_before_the_first_step_the_teacher_equals_the_student(kind, dtype):
    """Weights, buffers and predictions, to the last bit, and after a load of its own state too.
    Catches an average that starts at zero, and a detour through another precision."""
    student = tiny("llama", dtype=dtype)
    student.register_buffer("statistic", torch.ones(3))
    expected = student(input_ids=IDS).logits
    teacher = Teacher(student, kind)
    for _ in range(2):
        assert fingerprint(teacher.module) == fingerprint(student)
        with teacher.scoring() as model:
            assert torch.equal(model(input_ids=IDS).logits, expected)
        teacher.load_state_dict(teacher.state_dict())


@pytest.mark.parametrize("kind", ["base", "ema"])
def test_the_copy_has_its_own_storage_and_base_never_moves(kind):
    """Catches memory that is shared with the student, and gradients switched off in the student."""
    student = tiny("llama", dtype=torch.float32).train()
    student.register_buffer("statistic", torch.ones(3))
    # For ema: none of the three steps is one that moves the average.
    teacher = Teacher(student, kind, rate=0.1, interval=4 if kind == "ema" else 1)
    start = fingerprint(teacher.module)
    assert all(p.requires_grad for p in student.parameters())
    assert not any(p.requires_grad for p in teacher.module.parameters())
    for _ in train(student, 3, teacher):
        assert fingerprint(teacher.module) == start != fingerprint(student)
    assert student.training


def test_live_is_the_student_and_update_leaves_it_alone():
    student = tiny("llama", dtype=torch.float32)
    teacher = Teacher(student, "live")
    for _ in train(student, 1):
        trained = fingerprint(student)
        teacher.update(1)
        assert teacher.module is student and fingerprint(student) == trained
        assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rate_1_is_a_hard_copy(dtype):
    """At every third step, and nothing between."""
    student = tiny("llama", dtype=dtype)
    teacher = Teacher(student, "ema", rate=1.0, interval=3)
    expected = fingerprint(student)
    for step in train(student, 7, teacher):
        if step % 3 == 0:
            expected = fingerprint(student)
        assert fingerprint(teacher.module) == expected


def test_the_default_rate_is_not_a_hard_copy():
    """Teacher(student, "ema") is to be an average: after one step it is near its start."""
    student = tiny("llama", dtype=torch.float32)
    teacher = Teacher(student, "ema")
    start = teacher.module.lm_head.weight.clone()
    list(train(student, 1, teacher))
    moved = (teacher.module.lm_head.weight - start).norm() / (student.lm_head.weight - start).norm()
    assert moved.item() == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize("rate, interval", [(0.05, 1), (0.5, 1), (0.3, 3)])
def test_ema_equals_a_loop(rate, interval):
    """Catches a swapped rate, an update at the wrong steps, weights matched with the wrong names, a
    module that lags behind the average."""
    student = tiny("gpt2", dtype=torch.float32, **NO_DROPOUT)
    teacher = Teacher(student, "ema", rate, interval)
    expected = {n: p.detach().double().clone() for n, p in student.named_parameters()}
    for step in train(student, 7, teacher):
        if step % interval == 0:
            for name, p in student.named_parameters():
                expected[name] = (1 - rate) * expected[name] + rate * p.detach().double()
        for name, weight in teacher.module.named_parameters():
            torch.testing.assert_close(weight.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_a_bf16_student_gets_an_fp32_average():
    """`stuck` is what an average in bf16 would be: after 100 updates it is where it was."""
    student = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    torch.nn.init.constant_(student.weight, 1.0)
    teacher, average = Teacher(student, "ema", rate=0.01), 1.0
    stuck = student.weight.detach().clone()
    torch.nn.init.constant_(student.weight, 1.0625)
    for step in range(1, 101):
        teacher.update(step)
        average = 0.99 * average + 0.01 * 1.0625
        stuck.lerp_(student.weight.detach(), 0.01)
    assert stuck.item() == 1.0
    assert teacher.average["weight"].item() == pytest.approx(average, abs=1e-5) and average > 1.03
    weight = teacher.module.weight
    assert weight.dtype == torch.bfloat16
    assert weight.item() == torch.tensor(average).bfloat16().item()


@pytest.mark.parametrize("kind", KINDS)
def test_scoring_is_in_eval_mode_without_gradient_and_puts_modes_back(kind):
    """Catches dropout in the teacher, a student that is left in eval mode, modes or gradients that
    stay switched off when the block ends with an error."""
    student = tiny("gpt2", **DROPOUT)
    expected = student(input_ids=IDS).logits.detach()
    student.train()
    student.transformer.h[0].eval()
    teacher = Teacher(student, kind)
    if kind != "live":
        assert not any(m.training for m in teacher.module.modules())
        teacher.module.train()  # even when somebody calls it
        teacher.module.transformer.h[0].eval()

    def modes():
        return [m.training for m in [*student.modules(), *teacher.module.modules()]]

    before = modes()
    for _ in range(2):
        with teacher.scoring() as model:
            logits = model(input_ids=IDS).logits
        assert torch.equal(logits, expected) and not logits.requires_grad
        assert torch.is_grad_enabled() and modes() == before
    with pytest.raises(RuntimeError, match="out of memory"), teacher.scoring():
        raise RuntimeError("out of memory")
    assert modes() == before and torch.is_grad_enabled()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_teacher_goes_on_as_if_never_stopped(dtype):
    """In bf16 the state must hold the fp32 average: the module's own weights have lost its last
    bits. It is loaded by value: the caller's tensors must not move along."""
    student = tiny("llama", dtype=dtype)
    first = Teacher(student, "ema", rate=0.02)
    list(train(student, 3, first))
    torch.save(first.state_dict(), file := io.BytesIO())
    state, saved = (torch.load(io.BytesIO(file.getvalue())) for _ in range(2))
    second = Teacher(student, "ema", rate=0.02)
    assert fingerprint(second.module) != fingerprint(first.module)
    second.load_state_dict(state)
    for step in (4, 5, 6, 7):
        assert fingerprint(second.module) == fingerprint(first.module)
        for name, average in first.average.items():
            assert torch.equal(second.average[name], average)
        first.update(step)
        second.update(step)
    for name in state:
        assert torch.equal(state[name], saved[name])


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_another_kind_or_model_is_refused(kind):
    """Catches a moving average that is ignored without a word, and leaves the teacher alone."""
    student = tiny("llama", dtype=torch.float32)
    average = Teacher(student, "ema").state_dict()
    teacher = Teacher(student, kind)
    without_one = {n: t + 1 for n, t in average.items() if n != "lm_head.weight"}
    with_another = {**{n: t + 1 for n, t in average.items()}, "adapter": torch.zeros(1)}
    wrong = [without_one, with_another]
    wrong.append({} if kind == "ema" else average)
    before = fingerprint(teacher.module)
    for state in wrong:
        with pytest.raises(ValueError, match=f"not this {kind} teacher's state"):
            teacher.load_state_dict(state)
    assert fingerprint(teacher.module) == before
    teacher.load_state_dict(average if kind == "ema" else {})


def test_tied_weights_stay_tied():
    """Catches an average with two copies of one matrix, and a copy whose output layer is cut off
    from its embedding."""
    student = tiny("qwen3", dtype=torch.float32, tie_word_embeddings=True)
    teacher = Teacher(student, "ema", rate=0.5)
    start = student.lm_head.weight.detach().clone()
    list(train(student, 1, teacher))
    assert teacher.module.lm_head.weight is teacher.module.model.embed_tokens.weight
    assert len([n for n in teacher.average if "lm_head" in n or "embed_tokens" in n]) == 1
    middle = (start + student.lm_head.weight.detach()) / 2
    torch.testing.assert_close(teacher.module.lm_head.weight, middle)


WRONG = [
    {"kind": "frozen"},
    {"rate": 0.0},
    {"rate": 1.5},
    {"rate": -0.1},
    {"rate": float("nan")},
    {"interval": 0},
]


@pytest.mark.parametrize("settings", WRONG)
def test_wrong_settings_raise(settings):
    with pytest.raises(ValueError, match="teacher"):
        Teacher(torch.nn.Linear(1, 1), **{"kind": "ema", **settings})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["base", "ema"])
def test_the_copy_is_on_the_students_gpu(kind):
    student = tiny("llama", dtype=torch.bfloat16).cuda()
    teacher = Teacher(student, kind, rate=1.0)
    assert all(t.is_cuda for t in [*teacher.module.parameters(), *teacher.average.values()])
    with torch.no_grad():
        student.lm_head.weight.add_(1)
    teacher.update(1)
    same = torch.equal(teacher.module.lm_head.weight, student.lm_head.weight)
    assert same == (kind == "ema")


ALONE = """
import sys
from types import SimpleNamespace
import torch
import teacher as file

assert file.__file__.startswith({folder!r}), file.__file__
from teacher import Teacher

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(0.5))

    def forward(self, x):
        return SimpleNamespace(logits=self.layer(x))

torch.manual_seed(0)
student, input_ids, step = Model(), torch.randn(9, 4), 10
optimizer = torch.optim.SGD(student.parameters(), lr=1.0)
start = student.layer[0].bias.detach().clone()
expected = student.eval()(input_ids).logits.detach()
student.train()
student(input_ids).logits.sum().backward()
{example}
assert torch.equal(logits, expected) and not logits.requires_grad and student.training
moved = student.layer[0].bias.detach() - start
assert moved.abs().max() > 0.5
torch.testing.assert_close(model.layer[0].bias - start, 0.05 * moved)
others = {{"common", "srt", "sdzero", "rollout", "losses", "verifier"}} & set(sys.modules)
assert not others, others
print("done")
"""


def test_the_file_by_itself_runs_its_docstrings_example(tmp_path):
    """Copied into an empty folder: the example at the top of the file, word for word, with a module
    that is not from transformers. Catches an import of a neighbour, and an example nobody ran."""
    shutil.copy(teacher_file.__file__, tmp_path)
    paragraphs = teacher_file.__doc__.split("\n\n")
    example = textwrap.dedent(next(text for text in paragraphs if text.startswith("    ")))
    assert "teacher.update" in example
    script = tmp_path / "script.py"
    script.write_text(ALONE.format(example=example, folder=str(tmp_path)))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert run.stdout.strip() == "done", run.stderr
