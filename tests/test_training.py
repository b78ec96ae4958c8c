"""Masks, shifts and divisors of both stages' losses against one plain forward pass per token, in
float64; the optimizer; the estimate of the memory."""

import argparse
import math
import weakref
from types import SimpleNamespace

import pytest
import torch
from tiny import make_tokenizer, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import losses
import srt
from common import (
    LM,
    Optimizer,
    Problem,
    checkpoint_layers,
    estimate_memory,
    join,
    learning_rate,
    split,
)
from losses import OutputLayer, hidden_states
from rollout import Rollout
from sdzero import Example, distill, distill_step
from srt import Trace, srt_loss, srt_step
from teacher import Teacher

# the models' output layers have 40 rows: the last three must be cut off on both sides
EOS, VOCAB = 1, 37
PHRASES = [[30, 31, 32, 30], [30, 33, 30]]


def settings(**changed):
    flags = dict(
        objective="full_logits",
        alpha=1.0,
        topk=None,
        no_tail=False,
        temperature=1.0,
        skip_first=0,
        importance_cap=None,
        micro_tokens=64,
    )
    return argparse.Namespace(**{**flags, **changed})


def response(ids, finished):
    return Rollout(ids=ids, logprobs=[-4.0] * len(ids), finished=finished)


EXAMPLES = [  # finished, cut off, right, wrong, different lengths; an EOS id inside a prompt
    Example([5, 9, EOS, 7], response([8, 2, 11, EOS], True), 0, PHRASES[0]),
    Example([4], response([6, 13, 9, 22, 31, 8, 2], False), 1, PHRASES[1]),
    Example([7, 3, 3, 12, 4, 4, 21], response([5, EOS], True), 0, PHRASES[0]),
]
TOKENS = [token for e in EXAMPLES for token in e.response.ids]


def layers_of(student, teacher):
    return OutputLayer(student, VOCAB), OutputLayer(teacher, VOCAB)


def logprobs_after(model, ids, temperature=1.0):
    """log pi(. | ids) [VOCAB] by one plain forward pass: no batch, no padding, no shift."""
    logits = model(input_ids=torch.tensor([ids])).logits[0, -1, :VOCAB]
    return (logits / temperature).log_softmax(-1)


def reference_logprobs(student, teacher, temperature=1.0):
    """For every token of EXAMPLES log pi(. | x, y_<t) and log pi_bar(. | x, y, P_r, y_<t)."""
    rows = []
    for e in EXAMPLES:
        y = e.response.ids
        first_copy = y[:-1] if e.response.finished else y
        for t in range(len(y)):
            p = logprobs_after(student, e.prompt_ids + y[:t], temperature)
            with torch.no_grad():
                context = e.prompt_ids + first_copy + e.phrase_ids
                q = logprobs_after(teacher, context + y[:t], temperature)
            rows.append((p, q))
    p, q = zip(*rows)
    return torch.stack(p), torch.stack(q)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(a, b, tolerance=1e-6):
    """RMS norms compute in fp32 even in a float64 model, hence the tolerance."""
    assert a.keys() == b.keys() and len(a) > 5
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------- stage 2


@pytest.mark.parametrize(
    "family, temperature", [("llama", 1.0), ("qwen3", 1.0), ("gpt2", 0.7), ("gemma3_text", 1.0)]
)
def test_stage_2_equals_one_forward_per_token(family, temperature):
    """Catches a shift by one in either sequence, the first copy scored for the second, an EOS in
    the first copy, padding that is seen, a divisor per sequence or per micro-batch, ids beyond the
    tokenizer, a forgotten temperature."""
    student, other = tiny(family), tiny(family, seed=1)
    teacher = Teacher(other, "base")
    p, q = reference_logprobs(student, other, temperature)
    total = (p.exp() * (p - q)).sum(-1)
    total.mean().backward()
    expected = gradients(student)
    for micro_tokens in (1, 40, 10_000):  # one sequence per forward pass; two; all
        student.zero_grad()
        args = settings(temperature=temperature, micro_tokens=micro_tokens)
        layers = layers_of(student, teacher.module)
        metrics = distill_step(student, teacher, *layers, EXAMPLES, args)
        assert metrics["loss"] == pytest.approx(total.mean().item(), abs=1e-10)
        assert metrics["loss_tokens"] == len(total)
        assert_same_gradients(gradients(student), expected)


class Positions(torch.nn.Module):
    """Its hidden state at each place is that place's index: what reaches the output layer shows
    where it was taken from."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.base_model, self.seen = self.forward, []

    def forward(self, input_ids, use_cache):
        self.seen.append(input_ids.tolist())
        places = torch.arange(input_ids.shape[1], dtype=torch.float64)
        places = places.expand(len(input_ids), -1)[..., None]
        return argparse.Namespace(last_hidden_state=places * self.scale)


class Reveal(OutputLayer):
    """An output layer that notes the places which reach it."""

    vocab_size, rows, scale, cap = VOCAB, VOCAB, 1, None

    def __init__(self):
        self.places = []

    def linear(self, hidden, out):
        self.places += hidden[:, 0].tolist()
        return torch.mul(hidden, torch.arange(VOCAB), out=out)

    def linear_backward(self, hidden, grad):
        return grad.sum(-1, keepdim=True)


def test_the_teacher_scores_the_second_copy():
    """The row for y_t is the one before y_t: in x + y for the student, in the second y of
    x + y + P_r + y for the teacher. Catches a teacher that scores the first copy."""
    student, teacher, layers = Positions(), Teacher(Positions(), "live"), (Reveal(), Reveal())
    distill(student, teacher, *layers, EXAMPLES[:2], settings(), divisor=1)
    # x has 4 tokens and y 4, of which the first copy shows 3; then P_0 with 4. The other: 1, 7, 3.
    assert layers[0].places == [3, 4, 5, 6] + [0, 1, 2, 3, 4, 5, 6]
    assert layers[1].places == [10, 11, 12, 13] + [10, 11, 12, 13, 14, 15, 16]
    first = [5, 9, EOS, 7, 8, 2, 11, 30, 31, 32, 30, 8, 2, 11, EOS]
    assert teacher.module.seen[0][0] == first + [0] * 3


OBJECTIVES = {
    "topk_logits": (dict(topk=5), lambda p, q, y: losses.topk_logits(p, q, 5)),
    "topk_logits without tail": (
        dict(topk=5, no_tail=True),
        lambda p, q, y: losses.topk_logits(p, q, 5, tail=False),
    ),
    "sampled_token": ({}, losses.sampled_token),
    "mixed_kl": (dict(alpha=0.3), lambda p, q, y: losses.mixed_kl(p, q, 0.3)),
    "mixed_kl on top k": (dict(alpha=0.3, topk=4), lambda p, q, y: losses.mixed_kl(p, q, 0.3, 4)),
    "full_logits": ({}, lambda p, q, y: losses.full_logits(p, q)),
    "full_logits, alpha": (dict(alpha=0.5), lambda p, q, y: losses.full_logits(p, q, 0.5)),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_and_what_is_logged_beside_it(name):
    """Catches an objective without its settings, and a KL that is the objective's value instead of
    the reverse KL over the vocabulary."""
    more, formula = OBJECTIVES[name]
    student, other = tiny("llama"), tiny("llama", seed=1)
    args = settings(objective=name.split()[0].strip(","), **more)
    layers = layers_of(student, other)
    got = distill(student, Teacher(other), *layers, EXAMPLES, args, divisor=1)
    p, q = (x.detach() for x in reference_logprobs(student, other))
    y = torch.tensor(TOKENS)
    torch.testing.assert_close(got["loss"], formula(p, q, y))
    torch.testing.assert_close(got["kl"], (p.exp() * (p - q)).sum(-1))
    torch.testing.assert_close(got["log_ratio"], (p - q).gather(-1, y[:, None])[:, 0])
    torch.testing.assert_close(got["entropy"], -(p.exp() * p).sum(-1))
    assert got["reward"].tolist() == [0] * 4 + [1] * 7 + [0] * 2
    assert got["position"].tolist() == [*range(4), *range(7), *range(2)]


def test_the_metrics_of_a_step_are_means_over_its_tokens():
    """Catches a KL of the right responses under the wrong ones' name, and bins of positions that
    are off by one: y_0 ... y_15 belong to the first, y_16 to the second."""
    student, other = tiny("llama"), tiny("llama", seed=1)
    long = Example([4], response([6, 13, 9, 22] * 5, False), 1, PHRASES[1])
    examples = [*EXAMPLES, long]
    layers = layers_of(student, other)
    whole = distill(student, Teacher(other), *layers, examples, settings(), divisor=1)
    step = distill_step(student, Teacher(other), *layers, examples, settings(micro_tokens=30))
    right = torch.tensor([0] * 4 + [1] * 7 + [0] * 2 + [1] * 20).bool()
    late = torch.tensor([False] * (4 + 7 + 2 + 16) + [True] * 4)
    for name, wanted in {
        "kl": whole["kl"],
        "kl_right": whole["kl"][right],
        "kl_wrong": whole["kl"][~right],
        "log_ratio": whole["log_ratio"],
        "entropy": whole["entropy"],
    }.items():
        assert step[name] == pytest.approx(wanted.mean().item(), abs=1e-9), name
    bins = step["kl_from_position"]
    assert bins[0] == pytest.approx(whole["kl"][~late].mean().item(), abs=1e-9)
    assert bins[16] == pytest.approx(whole["kl"][late].mean().item(), abs=1e-9)
    assert [bins[low] for low in (64, 256, 1024)] == [None] * 3


def test_skipped_tokens():
    """The third response has two tokens only: with --skip-first 2 nothing of it is left."""
    student, other = tiny("llama"), tiny("llama", seed=1)
    layers = layers_of(student, other)
    whole = distill(student, Teacher(other), *layers, EXAMPLES, settings(), divisor=1)
    later = distill_step(student, Teacher(other), *layers, EXAMPLES, settings(skip_first=2))
    kept = whole["position"] >= 2
    assert later["loss_tokens"] == kept.sum() == 7
    assert later["loss"] == pytest.approx(whole["loss"][kept].mean().item(), abs=1e-10)
    rest = distill(student, Teacher(other), *layers, EXAMPLES, settings(skip_first=2), divisor=1)
    assert rest["position"].tolist() == [2, 3, *range(2, 7)]


def test_the_order_of_traces_comes_from_the_seed():
    traces = [SimpleNamespace(reward=1, k=k) for k in range(20)]
    flags = dict(terms="both", epochs=1, batch_size=20)
    orders = []
    for seed in (0, 1):
        ((batch, _),) = srt.plan(argparse.Namespace(seed=seed, **flags), traces)
        orders.append([trace.k for trace in batch])
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) == [*range(20)]


def test_the_same_text_for_two_problems_is_two_traces(monkeypatch):
    problems = [common.Problem(f"{i}?", "1", [i]) for i in (5, 6)]
    attempts = [common.Attempt(p, response([8], False), "a", 1) for p in problems]
    monkeypatch.setattr(srt, "sample_and_verify", lambda *rest, **more: attempts)
    monkeypatch.setattr(srt, "revise", lambda *rest, **more: [(a, a) for a in attempts])
    lm = SimpleNamespace(phrases=lambda args: [[1], [2]], text=str)
    flags = dict(attempts=1, revisions=1, phrase_wrong="No.", phrase_right="Yes.")
    task = SimpleNamespace(args=argparse.Namespace(**flags), lm=lm)
    assert [t.problem for t in srt.collect(task, problems, 0)[0]] == ["5?", "6?"]


def test_importance_weights():
    """Catches weights on what is logged, log pi_old of other tokens, a cap that is not applied."""
    student, other = tiny("llama"), tiny("llama", seed=1)
    layers = layers_of(student, other)
    whole = distill(student, Teacher(other), *layers, EXAMPLES, settings(), divisor=1)
    args = settings(importance_cap=1.5)
    weighted = distill(student, Teacher(other), *layers, EXAMPLES, args, divisor=1)
    log_pi = reference_logprobs(student, other)[0].detach()
    log_pi = log_pi.gather(-1, torch.tensor(TOKENS)[:, None])[:, 0]
    weights = (log_pi - -4.0).exp().clamp(max=1.5)
    assert (weights == 1.5).any() and (weights < 1.5).any()
    torch.testing.assert_close(weighted["loss"], whole["loss"] * weights)
    assert torch.equal(weighted["kl"], whole["kl"])


@pytest.mark.parametrize("moved", [False, True])
def test_a_step_without_a_token_moves_nothing(moved):
    """moved: a step before it leaves zeros as gradients, and momentum, which must not move
    anything; nor must weight decay."""
    student, other = tiny("llama"), tiny("llama", seed=1)
    layers = layers_of(student, other)
    optimizer = Optimizer(student, weight_decay=0.1)
    if moved:
        distill_step(student, Teacher(other), *layers, EXAMPLES, settings())
        assert optimizer.step(1e-3) > 0
    before = {n: p.clone() for n, p in student.named_parameters()}
    for examples, skip in (([], 0), (EXAMPLES, 100)):
        metrics = distill_step(
            student, Teacher(other), *layers, examples, settings(skip_first=skip)
        )
        assert metrics["loss"] == metrics["loss_tokens"] == 0 and optimizer.step(1.0) == 0
    assert all(torch.equal(p, before[n]) for n, p in student.named_parameters())


# ---------------------------------------------------------------------------------------- stage 1


def trace(prompt_ids, init_ids, phrase_ids, revision_ids, reward=0, finished=True):
    texts = ("1+1", "2", reward, "", "", "", finished)
    return Trace(*texts, prompt_ids, init_ids, phrase_ids, revision_ids)


TRACES = [
    trace([5, 9, EOS, 7], [8, 2, 11], PHRASES[0], [8, 2, 12, EOS]),
    trace([4], [6, 13, 9, 22, 31, 8, 2], PHRASES[1], [3], reward=1, finished=False),
    trace([7, 3, 3, 12, 4], [], PHRASES[0], [5, EOS]),
]


def srt_references(model):
    """L_revision (1) and L_generation (2) of TRACES by one forward pass per token."""
    revision, generation = torch.zeros(2, dtype=torch.float64).unbind()
    for t in TRACES:
        context = t.prompt_ids + t.init_ids + t.phrase_ids
        for i, token in enumerate(t.revision_ids):
            revision = revision - logprobs_after(model, context + t.revision_ids[:i])[token]
        written = t.init_ids + t.phrase_ids + t.revision_ids
        for i, token in enumerate(written):
            generation = generation - logprobs_after(model, t.prompt_ids + written[:i])[token]
    return revision, generation


@pytest.mark.parametrize("weights", [(1, 2), (1, 1), (0, 1)])
def test_srt_loss_equals_two_separate_losses(weights):
    """Catches a mask off by one at either border, a lost EOS, a wrong divisor."""
    model = tiny("qwen3")
    revision, generation = srt_references(model)
    expected = {(1, 2): revision + generation, (1, 1): generation, (0, 1): revision}[weights]
    values = srt_loss(model, OutputLayer(model, VOCAB), TRACES, weights, divisor=1)
    nll, weight = values["nll"], values["weight"]
    assert (nll * weight).sum().item() == pytest.approx(expected.item(), abs=1e-9)
    assert nll.sum().item() == pytest.approx(generation.item(), abs=1e-9)
    model.zero_grad()

    n_revision, n_rest = 4 + 1 + 2, 3 + 4 + 7 + 3 + 0 + 4
    mean = expected / (weights[0] * n_rest + weights[1] * n_revision)
    mean.backward()
    wanted = gradients(model)
    for micro_tokens in (1, 30, 10_000):
        model.zero_grad()
        metrics = srt_step(model, OutputLayer(model, VOCAB), TRACES, weights, micro_tokens)
        assert metrics["loss"] == pytest.approx(mean.item(), abs=1e-10)
        assert metrics["nll"] == pytest.approx(generation.item() / (n_revision + n_rest), abs=1e-9)
        assert_same_gradients(gradients(model), wanted)
    assert metrics["reward"] == metrics["cut_off"] == pytest.approx(1 / 3)
    assert metrics["length"] == pytest.approx(7 / 3)


def srt_gradient(model):
    return srt_step(model, OutputLayer(model, VOCAB), TRACES, (1, 2), 10_000)


def test_gradient_checkpointing_changes_nothing():
    """And it is on: each layer computes its output twice, once more in the backward pass."""
    model, results, calls = tiny("llama").train(), [], [0, 0]
    for on in (False, True):
        if on:
            checkpoint_layers(model)
        model.zero_grad()
        layer = OutputLayer(model, VOCAB)  # its own forward passes are not counted

        def count(module, inputs, on=on):
            calls[on] += 1

        hook = model.model.layers[1].mlp.register_forward_pre_hook(count)
        srt_step(model, layer, TRACES, (1, 2), 10_000)
        hook.remove()
        results.append(gradients(model))
    assert_same_gradients(*results, tolerance=0)
    assert calls[1] == 2 * calls[0]


# -------------------------------------------------------------------------------------- optimizer


def flat(tensors):
    return torch.cat([x.detach().double().flatten() for x in tensors])


def many_steps(model, step):
    for _ in range(20):
        srt_gradient(model)
        step()
        if step.__name__ != "ours":
            model.zero_grad()
    return flat(model.parameters())


def test_bf16_weights_move_as_fp32_ones_do():
    """At a learning rate of 5e-6 plain bf16 AdamW moves nothing, since an update is below half of
    a weight's last bit."""
    narrow, plain = tiny("llama", dtype=torch.bfloat16), tiny("llama", dtype=torch.bfloat16)
    wide = tiny("llama", dtype=torch.bfloat16).float()
    begin = flat(wide.parameters())
    optimizers = {model: Optimizer(model, clip=1e9) for model in (narrow, wide)}
    adamw = torch.optim.AdamW(plain.parameters(), lr=5e-6, weight_decay=0.0)

    def moved(model):
        def ours():
            optimizers[model].step(5e-6)

        return many_steps(model, ours if model in optimizers else adamw.step) - begin

    moved16, moved32, plain16 = moved(narrow), moved(wide), moved(plain)
    masters = flat(join(weight, low) for weight, low, _ in by_weight(optimizers[narrow], narrow))
    masters = masters - begin
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(masters, moved32, 0) > 0.9  # the gradients are bf16's, hence not 1
    assert masters.norm() / moved32.norm() == pytest.approx(1, abs=0.1)
    big = (
        begin.abs() > 0.01
    )  # half of the last bit is at least 2e-5 there: every plain step is lost
    assert plain16[big].abs().max() == 0
    assert moved16[big].abs().max() > 0 and cosine(moved16, moved32, 0) > 0.1


def by_weight(optimizer, model):
    """The optimizer's bf16 entries in the order of the model's parameters."""
    order = {id(p): i for i, p in enumerate(model.parameters())}
    return sorted(optimizer.narrow, key=lambda entry: order[id(entry[0])])


def test_optimizer_equals_plain_adamw_in_fp32_with_clipping_and_groups():
    """Catches decay of norms, a learning rate that stays, a norm after clipping, another clip."""
    ours, reference = tiny("llama", dtype=torch.float32), tiny("llama", dtype=torch.float32)
    optimizer = Optimizer(ours, (0.9, 0.95), 0.1, clip=0.5)
    parameters = list(reference.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95))
    for lr in (1e-3, 5e-4, 2e-3):
        srt_gradient(ours)
        srt_gradient(reference)
        norm = torch.sqrt(sum((p.grad**2).sum() for p in parameters))
        assert norm > 0.5
        for p in parameters:
            p.grad *= 0.5 / (norm + 1e-6)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        adamw.zero_grad()
        assert optimizer.step(lr) == pytest.approx(norm.item(), rel=1e-5)
    for a, b in zip(ours.parameters(), parameters):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_halves_of_a_weight_are_exact():
    """All ties and their neighbours, both signs, zeros, subnormals; a bf16 weight is one of the two
    nearest."""
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    cut = bits >> 16 << 16
    bits = torch.cat([bits, cut, cut + 0x8000, cut + 0x7FFF, torch.arange(9)]).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[values.abs() < 1e38]
    weight, low = split(values)
    assert torch.equal(join(weight, low).view(torch.int32), values.view(torch.int32))
    nearest = (values.bfloat16().float() - values).abs()
    assert ((weight.float() - values).abs() <= nearest).all()


def test_bf16_optimizer_equals_one_that_keeps_whole_masters():
    """Step by step and bit by bit, a state that was put back into a new optimizer included."""
    model = tiny("llama", dtype=torch.bfloat16)
    masters = tiny("llama", dtype=torch.bfloat16).float()
    optimizer, reference = (Optimizer(m, (0.9, 0.95), 0.1) for m in (model, masters))
    for step in range(1, 6):
        if step == 3:
            state = optimizer.state_dict()
            optimizer = Optimizer(model, (0.9, 0.95), 0.1)
            optimizer.load_state_dict(state)
        srt_gradient(model)
        for weight, master in zip(model.parameters(), masters.parameters()):
            master.grad = weight.grad.clone()
        assert optimizer.step(1e-4 * step) == reference.step(1e-4 * step)
        entries = by_weight(optimizer, model)
        for (weight, low, _), master in zip(entries, masters.parameters(), strict=True):
            assert torch.equal(join(weight, low), master)
            assert torch.equal(weight, split(master)[0])


def test_micro_batch_gradients_are_summed_in_fp32():
    """In bf16 256 + 1 is 256: seven gradients of 1 after one of 256 would leave no trace."""
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = Optimizer(model, clip=1e9)
    for scale in (256, *[1] * 7):
        (model.weight * scale).sum().backward()
    assert optimizer.step(0.0) == pytest.approx(263)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(value, dtype):
    model = tiny("llama", dtype=dtype)
    optimizer = Optimizer(model, weight_decay=0.1)
    before = [p.clone() for p in model.parameters()]
    next(model.parameters()).grad = torch.full_like(before[0], value, dtype=torch.float32)
    with pytest.raises(FloatingPointError, match="norm of the gradient"):
        optimizer.step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_a_gradient_of_zeros_does_not_stay():
    """An fp32 gradient beside a bf16 weight: the compiler refuses whatever comes next."""
    model = tiny("llama", dtype=torch.bfloat16)
    optimizer = Optimizer(model)
    before = [p.clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.zeros_like(p, dtype=torch.float32)
    assert optimizer.step(1.0) == 0
    assert all(p.grad is None and torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_learning_rates():
    """Catches a first step of 0, a warm-up that is one step off, a cosine that ends early."""
    cosine = argparse.Namespace(lr=2.0, warmup=0.05, lr_schedule="cosine")
    rates = [learning_rate(cosine, s, 100) for s in range(1, 101)]
    assert rates[:6] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])
    assert rates[5 + 95 // 2 + 1] == pytest.approx(1.0, abs=0.03)
    assert 0 < rates[-1] < 0.002 and rates[5:] == sorted(rates[5:], reverse=True)
    constant = argparse.Namespace(lr=2.0, warmup=20, lr_schedule="constant")
    rates = [learning_rate(constant, s, 40) for s in (1, 10, 20, 21, 40)]
    assert rates == pytest.approx([0.1, 1.0, 2.0, 2.0, 2.0])
    for warmup in (0, 1):  # one step, not all of them
        constant.warmup = warmup
        assert learning_rate(constant, 1, 40) == 2.0


def test_a_warm_up_that_does_not_end(capsys):
    """--lr is then never reached: 20 steps are the default, and a few problems make fewer."""
    for warmup, total, told in ((20, 20, False), (20, 19, True), (0.05, 3, False)):
        args = argparse.Namespace(lr=2.0, warmup=warmup, lr_schedule="constant")
        for step in range(1, total + 1):
            learning_rate(args, step, total)
        lines = capsys.readouterr().err.splitlines()
        assert lines == ["warning: --lr is not reached: there are 19 steps, --warmup has 20"] * told


# ----------------------------------------------------------------------------------------- memory


class Live(TorchDispatchMode):
    """Bytes of all storages that operations allocate, while somebody holds them; and the peak."""

    def __init__(self, known=()):
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in known}  # of before: not counted
        self.sizes, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in self.known | self.sizes.keys():
                    self.sizes[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.forget, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def forget(self, address):
        self.now -= self.sizes.pop(address)


def bytes_of(tensors):
    """Of distinct storages: tied weights count once."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def memory_flags(**changed):
    flags = dict(
        max_new_tokens=20,
        batch_size=4,
        micro_tokens=10_000,
        slots=3,
        gradient_checkpointing=False,
        phrase_wrong="No.",
        phrase_right="",
    )
    return argparse.Namespace(**{**flags, **changed})


def as_lm(model, context=64):
    return LM(model, make_tokenizer(), {EOS}, VOCAB, context)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3"])  # qwen3's embeddings are tied
def test_the_estimate_of_what_stays_is_what_is_allocated(family, dtype):
    """Weights, gradients, optimizer, teachers, byte by byte."""
    model = tiny(family, dtype=dtype)
    optimizer, lm = Optimizer(model), as_lm(model)
    srt_gradient(model)
    parts = estimate_memory(lm, memory_flags(), 3)
    assert parts["weights"] == bytes_of(model.parameters())
    assert parts["gradients"] == bytes_of(p.grad for p in model.parameters())
    optimizer.step(1e-3)
    kept = [low for _, low, _ in optimizer.narrow]
    for state in optimizer.adamw.state.values():
        kept += [state["exp_avg"], state["exp_avg_sq"]]
    assert parts["optimizer"] == bytes_of(kept)
    assert parts["teacher"] == 0
    for kind in ("base", "live", "ema"):
        teacher = Teacher(model, kind)
        own = [] if kind == "live" else [*teacher.module.parameters(), *teacher.average.values()]
        assert estimate_memory(lm, memory_flags(teacher=kind), 3)["teacher"] == bytes_of(own), kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_the_estimate_of_the_cache_is_that_of_the_models_own_cache(family, dtype):
    """A slot holds the longest that is sampled, a revision: x + y + P_r + y, which the context
    limits."""
    model, phrase = tiny(family, dtype=dtype), len("\n\nNo.\n\n")

    def cache_bytes(length):
        with torch.no_grad():
            _, cache = model(torch.zeros(1, length, dtype=torch.long), use_cache=True).to_tuple()
        return bytes_of(x for layer in cache.layers for x in (layer.keys, layer.values))

    for teacher, longer in ((None, "wrong"), ("base", "right")):
        phrases = {"phrase_wrong": "", "phrase_right": "", f"phrase_{longer}": "No."}
        args = memory_flags(max_new_tokens=20, teacher=teacher, **phrases)
        assert estimate_memory(as_lm(model), args, 3)["slot"] == cache_bytes(3 + 20 + phrase + 20)
        assert estimate_memory(as_lm(model, context=40), args, 3)["slot"] == cache_bytes(40)


SHAPES = {
    "multi-head": dict(hidden_size=64, intermediate_size=256, head_dim=16, num_key_value_heads=4),
    "grouped": dict(hidden_size=64, intermediate_size=192, head_dim=8, num_key_value_heads=2),
    "wide heads": dict(hidden_size=32, intermediate_size=96, head_dim=16, num_key_value_heads=2),
}


MIXTURES = {
    "mixtral": {},
    "qwen3_moe": dict(num_experts=8, num_experts_per_tok=4, moe_intermediate_size=64),
    "qwen2_moe": dict(shared_expert_intermediate_size=256),
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family, shape",
    [(family, shape) for family in ("llama", "qwen3") for shape in SHAPES]
    + [(family, "multi-head") for family in MIXTURES],
)
def test_activations_stay_below_the_estimate_but_not_far(family, shape, dtype, checkpointing):
    """The peak of one forward and backward pass, by live storages, weights and their gradients left
    out: 0.65 to 1.05 of the estimate, which is made for Qwen3 in bf16, the largest."""
    rows, length = 4, 128  # x 40, y 88
    settings = dict(SHAPES[shape], **MIXTURES.get(family, {}))
    settings |= dict(num_hidden_layers=6, max_position_embeddings=length)
    model = tiny(family, dtype=dtype, **settings).train()
    args = memory_flags(max_new_tokens=88, batch_size=rows, gradient_checkpointing=checkpointing)
    if checkpointing:
        checkpoint_layers(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with Live([x for p in model.parameters() for x in (p, p.grad)]) as live:
        hidden_states(model, [[3] * length] * rows).sum().backward()
    estimate = estimate_memory(as_lm(model, length), args, 40)["activations"]
    assert 0.65 * estimate < live.peak < 1.05 * estimate, live.peak / estimate


@pytest.mark.parametrize("teacher", [None, "base"])
def test_the_logits_estimate_is_what_a_backward_by_chunks_takes(teacher, monkeypatch):
    """At most, and at least a third: twelve tensors of a chunk, two of a block."""
    monkeypatch.setitem(losses.CHUNK, "cpu", (2**14, 8))
    model = tiny("llama", vocab_size=1000, dtype=torch.float32)
    layer, hidden = OutputLayer(model), torch.randn(1000, 32, requires_grad=True)
    model.lm_head.weight.grad = torch.zeros_like(model.lm_head.weight)
    known = [hidden, hidden.detach(), *model.parameters(), model.lm_head.weight.grad]
    against = (layer, hidden.detach()) if teacher else None

    def loss(logits, other=None):
        return losses.full_logits(logits, logits.detach().roll(1) if other is None else other)

    with Live(known) as live:
        losses.backward_by_chunks(loss, layer, hidden * 1, divisor=1, teacher=against)
    estimate = estimate_memory(as_lm(model), memory_flags(teacher=teacher), 3)["logits"]
    hidden_bytes = 3 * hidden.numel() * 4  # hidden * 1 and two gradients
    assert estimate / 3 < live.peak - hidden_bytes < estimate


def test_tokens_of_a_micro_batch():
    """Activations grow with the batch up to --micro-tokens, but never below one sequence."""
    lm = as_lm(tiny("llama", dtype=torch.float32), context=1000)

    def activations(teacher=None, **flags):
        return estimate_memory(lm, memory_flags(teacher=teacher, **flags), 3)["activations"]

    one = activations(batch_size=1)
    assert activations(batch_size=2) == 2 * one
    assert activations(batch_size=50, micro_tokens=1) == one
    assert activations(batch_size=50, micro_tokens=5 * (3 + 20 + 7 + 20)) == 5 * one
    assert activations("base", batch_size=1) == one * 23 // 50  # the student reads x + y only


def test_the_memory_report(capsys):
    """One line says what is needed; where something does not fit another says what to lower."""
    lm = as_lm(tiny("qwen3", dtype=torch.float32))
    problems = [Problem("", None, [5] * n) for n in (1, 3, 2)]  # the longest counts
    args = memory_flags(teacher="ema", phrase_wrong="", phrase_right="No.")
    common.fit_memory(lm, args, problems)
    captured = capsys.readouterr()
    assert args.cache_bytes is args.training_bytes is None and captured.err == ""
    parts = estimate_memory(lm, args, 3)
    training = sum(parts.values()) - parts["slot"]
    sampling = sum(parts[x] for x in ("weights", "optimizer", "teacher")) + 3 * parts["slot"]
    figures = f"training {training / 1e9:.3g}, sampling {sampling / 1e9:.3g} at 3 slots"
    assert figures in captured.out


class OnGPU:
    """A model that says that it is on a GPU; nothing is computed with it."""

    def __init__(self, model):
        self.model = model

    def __getattr__(self, name):
        return torch.device("cuda") if name == "device" else getattr(self.model, name)


@pytest.mark.parametrize("slots", [0, 1, 5, 10**6])
def test_slots_are_what_a_gpu_has_room_for(slots, capsys, monkeypatch):
    """Nine tenths of the card, less what is already there: the optimizer not yet while collecting.
    Where another program has half of the card, 95% of the rest. Too little is said; one slot is
    tried nevertheless."""
    model = tiny("qwen3", dtype=torch.float32)
    slot = common.cache_bytes_per_token(model)
    monkeypatch.setattr(common, "cache_bytes_per_token", lambda model: slot)
    lm, problems = as_lm(OnGPU(model)), [Problem("", None, [5, 9, 3])]
    args = memory_flags(slots=None, teacher="base", micro_tokens=1)
    parts = estimate_memory(lm, args, 3)
    standing = parts["weights"] + parts["optimizer"] + parts["teacher"]
    memory = math.ceil((standing + slots * parts["slot"]) / 0.9) if slots else standing
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory, memory))
    common.fit_memory(lm, args, problems)
    fitting = min(max(slots, 1), common.MAX_SLOTS)
    assert common.slots_that_fit(args, parts["slot"], args.training_bytes) == fitting
    assert args.cache_bytes - args.training_bytes == standing - parts["weights"]
    assert common.slots_that_fit(memory_flags(slots=7), parts["slot"], args.training_bytes) == 7
    errors = capsys.readouterr().err
    training = standing + parts["gradients"] + parts["activations"] + parts["logits"]
    before = args.training_bytes
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory // 2, memory))
    common.fit_memory(lm, args, problems)
    assert args.training_bytes - before == pytest.approx((0.95 / 2 - 0.9) * memory, abs=3)
    assert ("--micro-tokens" in errors) == (training > memory)
    assert ("--slots" in errors) == (slots == 0)
