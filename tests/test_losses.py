"""losses.py against the README's formulas on Python floats; gradients against central differences.

All in float64 unless a test says otherwise. Tests with `device` also run on a GPU if there is one.
"""

import itertools
import math
import os
import shutil
import subprocess
import sys
import textwrap
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from tiny import tiny
from torch.utils._python_dispatch import TorchDispatchMode

import losses
from losses import (
    CHUNK,
    OutputLayer,
    backward_by_chunks,
    divergence,
    entropy,
    full_logits,
    hidden_states,
    importance_weight,
    log_softmax,
    micro_batches,
    mixed_kl,
    predicting_last,
    sampled_token,
    token_logprobs,
    topk_logits,
)
from rollout import FAMILIES

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
ALPHAS = [0.0, 0.3, 0.5, 1.0]
OBJECTIVES = {
    "full": lambda s, t: full_logits(s, t),
    "forward": lambda s, t: full_logits(s, t, alpha=0.0),
    "jsd": lambda s, t: full_logits(s, t, alpha=0.3),
    "topk": lambda s, t: topk_logits(s, t, 3),
    "topk jsd": lambda s, t: topk_logits(s, t, 3, alpha=0.5),
    "topk renormalised": lambda s, t: topk_logits(s, t, 3, tail=False),
    "sampled": lambda s, t: sampled_token(s, t, torch.arange(len(s)) % s.shape[-1]),
    "mixed": lambda s, t: mixed_kl(s, t, 0.3),
    "mixed topk": lambda s, t: mixed_kl(s, t, 0.3, k=3),
}


def logits(rows=4, vocabulary=7, scale=2.0, dtype=torch.float64):
    generator, shape = torch.Generator().manual_seed(0), (rows, vocabulary)
    pair = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [(x * scale).to(dtype) for x in pair]


def value_and_gradient(function, student, teacher):
    """Row n weighs n + 1, so that rows which leak into each other show."""
    student = student.clone().requires_grad_()
    value = function(student, teacher)
    assert value.shape == student.shape[:1]
    weighted = (value * torch.arange(1, len(value) + 1)).sum()
    return value.detach(), torch.autograd.grad(weighted, student)[0]


# ----------------------------------------- the reference: probabilities as lists, one row at a time


def softmax(x):
    return [math.exp(v) / sum(math.exp(u) for u in x) for v in x]


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q))


def family(p, q, alpha):  # p: student, q: teacher
    if alpha in (0, 1):
        return kl(p, q) if alpha == 1 else kl(q, p)
    m = [(1 - alpha) * a + alpha * b for a, b in zip(p, q)]
    return alpha * kl(q, m) + (1 - alpha) * kl(p, m)


def largest(p, k):
    return sorted(range(len(p)), key=lambda i: -p[i])[:k]


def on(p, support, tail):
    top = [p[i] for i in support]
    if tail:
        return top + [sum(v for i, v in enumerate(p) if i not in support)]
    return [v / sum(top) for v in top]


def assert_equals_reference(function, reference):
    """`reference` takes the probabilities of the student and of the teacher, lists of floats."""
    student, teacher = logits()
    value, gradient = value_and_gradient(function, student, teacher)

    def at(x, n):
        return reference(softmax(x), softmax(teacher[n].tolist()))

    def moved(row, i, step):
        return [v + (step if i == j else 0) for j, v in enumerate(row)]

    for n, row in enumerate(student.tolist()):
        assert value[n].item() == pytest.approx(at(row, n), abs=1e-12)
        for i in range(len(row)):
            slope = (at(moved(row, i, 1e-5), n) - at(moved(row, i, -1e-5), n)) / 2e-5
            assert gradient[n, i].item() == pytest.approx((n + 1) * slope, abs=1e-8)


# --------------------------------------------------------------------------------------- objectives


@pytest.mark.parametrize("alpha", ALPHAS)
def test_full_logits_equals_the_formulas(alpha):
    """Catches swapped sides, swapped weights and a wrong mixture."""
    assert_equals_reference(lambda s, t: full_logits(s, t, alpha), lambda p, q: family(p, q, alpha))


@pytest.mark.parametrize(
    "k, tail", [(1, True), (2, False), (3, True), (3, False), (6, True), (6, False)]
)
@pytest.mark.parametrize("alpha", ALPHAS)
def test_topk_logits_equals_the_formula(alpha, k, tail):
    """Catches what the test above does, the teacher's support, and a tail that is lost."""

    def reference(p, q):
        support = largest(p, k)
        return family(on(p, support, tail), on(q, support, tail), alpha)

    assert_equals_reference(lambda s, t: topk_logits(s, t, k, alpha, tail), reference)


@pytest.mark.parametrize("w", [0.0, 0.3, 0.5, 1.0])
def test_mixed_kl_equals_the_formula(w):
    """Catches a swapped weight, and the student's support instead of the teacher's."""

    def mixed(p, q):
        return w * kl(q, p) + (1 - w) * kl(p, q)

    def on_teachers_top_3(p, q):
        return mixed(on(p, largest(q, 3), tail=False), on(q, largest(q, 3), tail=False))

    assert_equals_reference(lambda s, t: mixed_kl(s, t, w), mixed)
    assert_equals_reference(lambda s, t: mixed_kl(s, t, w, k=3), on_teachers_top_3)
    whole = mixed_kl(*logits(), w)
    torch.testing.assert_close(mixed_kl(*logits(), w, k=100), whole)  # k > V


def test_sampled_token_and_token_logprobs_equal_the_formulas():
    """The gradient of the first factor must be stopped: else there would be a second term."""
    (student, teacher), ids = logits(), [6, 0, 3, 3]
    y = torch.tensor(ids)
    value, gradient = value_and_gradient(lambda s, t: sampled_token(s, t, y), student, teacher)
    logprobs = token_logprobs(student, y)
    for n, y in enumerate(ids):
        p, q = softmax(student[n].tolist()), softmax(teacher[n].tolist())
        ratio = math.log(p[y] / q[y])
        assert logprobs[n].item() == pytest.approx(math.log(p[y]), abs=1e-12)
        assert value[n].item() == pytest.approx(ratio * math.log(p[y]), abs=1e-12)
        # d log p_y / d logit_i = [i = y] - p_i
        expected = [(n + 1) * ratio * ((i == y) - p[i]) for i in range(7)]
        assert gradient[n].tolist() == pytest.approx(expected, abs=1e-12)


def test_sampled_token_has_the_gradient_of_the_reverse_kl_but_not_its_value():
    """The expectation over y ~ student is exact: all y, weighted by pi(y)."""
    student, teacher = logits()
    pi = student.softmax(-1)

    def all_rows(y):
        return torch.full((4,), y)

    def expectation(s, t):
        return sum(pi[:, y] * sampled_token(s, t, all_rows(y)) for y in range(7))

    value, gradient = value_and_gradient(expectation, student, teacher)
    exact, expected = value_and_gradient(full_logits, student, teacher)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    assert (exact > 0).all() and (value < 0).any() and ((value - exact).abs() > 0.1).all()
    # What estimates the value is the mean log ratio.
    ratio = torch.zeros(4, dtype=torch.float64)
    for y in range(7):
        log_pi, log_pi_bar = (token_logprobs(x, all_rows(y)) for x in (student, teacher))
        ratio += pi[:, y] * (log_pi - log_pi_bar)
    torch.testing.assert_close(ratio, exact, rtol=0, atol=1e-12)


def test_importance_weight():
    """Capped above only: exp(899) overflows to inf, and then is 2. A gradient in the weight would
    turn the loss into another one."""
    logprobs = torch.tensor([-1.0, -1.0, -3.0, -1.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0, -1.5, -1.0, -900.0], dtype=torch.float64)
    weight = importance_weight(logprobs, old, cap=2.0)
    assert weight.tolist() == pytest.approx([1.0, math.exp(0.5), math.exp(-2.0), 2.0])
    assert not weight.requires_grad


def test_entropy_equals_the_formula():
    """Catches a wrong sign, bits instead of nats, a mean over the vocabulary."""
    student, _ = logits()
    for n, value in enumerate(entropy(log_softmax(student)).tolist()):
        expected = -sum(p * math.log(p) for p in softmax(student[n].tolist()))
        assert value == pytest.approx(expected, abs=1e-12)
    assert entropy(log_softmax(torch.zeros(1, 7))).item() == pytest.approx(math.log(7))
    assert entropy(log_softmax(torch.tensor([[1e4, 0.0, -1e4]]))).item() == 0  # and not nan


@pytest.mark.parametrize("name", OBJECTIVES)
def test_log_probabilities_are_valid_logits(name):
    """Callers may compute a log-softmax once per side and use it everywhere."""
    student, teacher = logits()
    expected, wanted = value_and_gradient(OBJECTIVES[name], student, teacher)

    def on_logprobs(s, t):
        return OBJECTIVES[name](log_softmax(s), log_softmax(t))

    value, gradient = value_and_gradient(on_logprobs, student, teacher)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-13)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_divergence_of_log_probabilities_is_full_logits_to_the_last_bit(alpha):
    """Catches a second normalisation: the scripts go from one to the other without a change."""
    student, teacher = logits(dtype=torch.float32)
    whole = value_and_gradient(lambda s, t: full_logits(s, t, alpha), student, teacher)

    def in_two_steps(s, t):
        return divergence(log_softmax(s), log_softmax(t), alpha)

    parts = value_and_gradient(in_two_steps, student, teacher)
    assert torch.equal(whole[0], parts[0]) and torch.equal(whole[1], parts[1])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_inputs_give_zero_and_swapped_inputs_another_value(name):
    student, teacher = logits()
    value, gradient = value_and_gradient(OBJECTIVES[name], student, student.clone())
    assert value.abs().max() < 1e-14 and gradient.abs().max() < 1e-14
    there, back = OBJECTIVES[name](student, teacher), OBJECTIVES[name](teacher, student)
    assert ((there - back).abs() > 1e-3).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_top_k_grows_with_k_up_to_the_full_divergence(alpha):
    """Joining tokens in one bucket can only lose divergence. Catches a tail of one side only, and a
    support that is not nested."""
    student, teacher = logits()
    full = full_logits(student, teacher, alpha)
    values = [topk_logits(student, teacher, k, alpha) for k in range(1, 7)] + [full]
    for lower, upper in zip(values, values[1:]):
        assert (lower <= upper + 1e-12).all()
    assert (values[0] < 0.99 * full).all()
    for tail, k in itertools.product((True, False), (7, 100)):
        value = topk_logits(student, teacher, k, alpha, tail)
        torch.testing.assert_close(value, full, rtol=0, atol=1e-12)


def test_the_family_jumps_at_its_ends():
    """(5) goes to 0 linearly; the ends themselves are the full KLs. Catches ends without their
    special case, and a rescaled (5)."""
    ends = ((1.0, 0.999), (0.0, 0.001))
    for f in (full_logits, lambda s, t, alpha: topk_logits(s, t, 3, alpha)):
        for end, inside in ends:
            assert (f(*logits(scale=3.0), end) > 0.5).all()
            assert (f(*logits(scale=3.0), inside) < 0.01).all()
    student, teacher = logits(scale=0.5)  # no large ratios: the rest of (5) is of second order
    for eps in (1e-3, 1e-6):
        for end, inside in ((1.0, 1 - eps), (0.0, eps)):
            expected = eps * full_logits(student, teacher, end)
            value = full_logits(student, teacher, inside)
            torch.testing.assert_close(value, expected, rtol=20 * eps, atol=1e-14)


@pytest.mark.parametrize("alpha", [-0.1, 1.1, math.nan])
def test_alpha_and_w_outside_their_range_raise(alpha):
    for objective in (full_logits, divergence, lambda s, t, a: topk_logits(s, t, 3, a)):
        with pytest.raises(ValueError, match="alpha"):
            objective(*logits(), alpha)
    with pytest.raises(ValueError, match="w must"):
        mixed_kl(*logits(), alpha)


def test_supports_on_which_every_loss_is_zero_are_refused():
    """One token that has all the probability on both sides: 0 whatever the models say."""
    with pytest.raises(ValueError, match="k >= 2, not 1"):
        topk_logits(*logits(), 1, tail=False)
    with pytest.raises(ValueError, match="k >= 2, not 1"):
        mixed_kl(*logits(), k=1)
    for k in (0, -1):
        with pytest.raises(ValueError, match="topk_logits needs"):
            topk_logits(*logits(), k)
        with pytest.raises(ValueError, match="mixed_kl needs"):
            mixed_kl(*logits(), k=k)
    assert (topk_logits(*logits(), 1) > 0.01).all()  # with the tail there are two buckets


def test_the_teachers_support_is_blind_and_the_default_is_not():
    """Nearly all mass of the student is on one token outside the teacher's top 4."""
    teacher = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0, -1.5, -1.0]], dtype=torch.float64)
    student = teacher.clone()
    student[0, 7] = 20.0
    value, gradient = value_and_gradient(lambda s, t: mixed_kl(s, t, k=4), student, teacher)
    assert value.abs().item() < 1e-12 and gradient.abs().max() < 1e-12
    exact = full_logits(student, teacher).item()
    assert exact > 3
    # The student's own support sees it, even renormalised.
    assert topk_logits(student, teacher, 4, tail=False).item() > 1
    value, gradient = value_and_gradient(lambda s, t: topk_logits(s, t, 4), student, teacher)
    assert value.item() == pytest.approx(exact, rel=1e-6) and gradient.abs().max() > 1e-9


def test_the_tail_bucket_keeps_its_digits_in_fp32():
    """One side has 1e-5 of its mass outside the top 3, the other 0.1: the fp32 value and gradient
    must have fp32's digits. `naive` shows that this case does tell the two apart."""
    small, large = (
        torch.tensor([[(1 - tail) / 3] * 3 + [tail / 50] * 50]).log() for tail in (1e-5, 0.1)
    )

    def with_rest(x):
        top = x.softmax(-1)[:, :3]
        return torch.cat([top, 1 - top.sum(-1, keepdim=True)], dim=-1)

    def naive(s, t):
        p, q = with_rest(s), with_rest(t)
        return (q * (q / p).log()).sum(-1)

    def error(function):
        narrow = value_and_gradient(function, small, large)
        exact = value_and_gradient(function, small.double(), large.double())
        assert narrow[0].dtype == torch.float32
        return max(
            ((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(narrow, exact)
        )

    assert error(lambda s, t: topk_logits(s, t, 3, alpha=0.0)) < 2e-6
    assert error(lambda s, t: topk_logits(t, s, 3)) < 2e-6  # the same number as a reverse KL
    assert error(naive) > 1e-3


@pytest.mark.parametrize("name", OBJECTIVES)
def test_precision(name):
    """bf16 logits are computed in fp32, not in bf16 and cast at the end; float64 stays float64."""
    function = OBJECTIVES[name]
    halves = logits(dtype=torch.bfloat16)
    value = function(*halves)
    assert value.dtype == torch.float32
    assert torch.equal(value, function(*(x.float() for x in halves)))
    for dtype in (torch.float32, torch.float64):
        assert function(*logits(dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_logits_are_finite(name, dtype):
    """Logits 1e4 apart: probabilities are exactly 0 on both sides; 0 x inf or log 0 give nan."""
    student = torch.tensor([[1e4, 0.0, -1e4, 5.0, -3.0], [0.0, 1e4, 0.0, 0.0, 0.0]], dtype=dtype)
    teacher = torch.tensor([[-1e4, 0.0, 1e4, 3.0, -9.0], [0.0, 0.0, 1e4, 0.0, 0.0]], dtype=dtype)
    value, gradient = value_and_gradient(OBJECTIVES[name], student, teacher)
    assert value.isfinite().all() and gradient.isfinite().all()
    if name == "full":
        assert value.tolist() == pytest.approx([2e4, 1e4])  # not clipped either


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "sampled"])
def test_a_tiny_divergence_keeps_its_gradient(name):
    """Below fp32's resolution the value may be negative: a clamp at 0 would give gradient 0."""
    student, teacher = logits(rows=400, scale=1.0)
    teacher = (student + 2e-4 * teacher).float()
    student = student.float()
    value, gradient = value_and_gradient(OBJECTIVES[name], student, teacher)
    exact = value_and_gradient(OBJECTIVES[name], student.double(), teacher.double())[1]
    negative = value <= 0
    assert negative.any() and (gradient[negative].abs().amax(-1) > 1e-6).all()
    assert ((gradient - exact).abs().amax(-1) / exact.abs().amax(-1)).median() < 0.02


# ------------------------------------------------------------------ from token ids to hidden states


SEQUENCES = [[5, 9, 3, 7, 2, 8, 11, 4, 4, 9], [4], [6, 6, 13, 9]]


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_padding_is_not_seen(name):
    """Each row of a padded batch against the sequence by itself: catches left padding, positions
    that count the padding, an attention that sees it."""
    model = tiny(name)
    tolerance = 1e-5 if model.config._attn_implementation == "eager" else 1e-9
    with torch.no_grad():
        for row, ids in zip(hidden_states(model, SEQUENCES), SEQUENCES):
            by_itself = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
            torch.testing.assert_close(row[: len(ids)], by_itself, rtol=0, atol=tolerance)


def next_hidden(model, ids):
    """The hidden state [D] that predicts what follows `ids`: one plain forward of exactly them."""
    return model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]


@pytest.mark.parametrize("counts", [[3, 0, 1], [9, 0, 3], [1, 0, 0], [0, 0, 0]])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_predicting_last_equals_one_forward_per_token(name, counts):
    """Token t is predicted by a forward of all that is before it. Catches a shift by one, rows of
    the padding, rows in another order, and a count of 0 read as "all" (ids[-0:])."""
    model = tiny(name)
    expected = []
    for ids, count in zip(SEQUENCES, counts):
        for t in range(len(ids) - count, len(ids)):
            expected.append(next_hidden(model, ids[:t]))
    rows = predicting_last(model, SEQUENCES, counts)
    assert rows.shape == (sum(counts), 32)
    if expected:
        torch.testing.assert_close(rows, torch.stack(expected), rtol=0, atol=1e-6)


def test_student_and_teacher_are_aligned():
    """The same y after two contexts: row n of each side predicts the same token, the teacher's in
    its SECOND copy of y. Catches rows that come from the first one."""
    model, x, y, phrase = tiny("llama"), [5, 9, 7], [8, 2, 11], [30, 31, 30]
    student = predicting_last(model, [x + y], [3])
    teacher = predicting_last(model, [x + y + phrase + y], [3])
    for t in range(3):
        row = next_hidden(model, x + y[:t])
        torch.testing.assert_close(student[t], row, rtol=0, atol=1e-6)
        row = next_hidden(model, x + y + phrase + y[:t])
        torch.testing.assert_close(teacher[t], row, rtol=0, atol=1e-6)
    assert (student - teacher).abs().amax(-1).min() > 0.01


def test_counts_that_leave_nothing_to_predict_from_are_refused():
    """Python's slices would return the wrong rows without a word."""
    model = tiny("llama")
    for counts in ([10, 0, 1], [11, 0, 1], [1, 1, 1], [1, 0, -1]):
        with pytest.raises(ValueError, match="ids has no last"):
            predicting_last(model, SEQUENCES, counts)
    with pytest.raises(ValueError, match="zip"):
        predicting_last(model, SEQUENCES, [1, 0])


def test_sequences_as_tensors_and_sequences_that_are_refused():
    """An array plus a list of padding is a sum; position 65 of 64 is an obscure index error,
    and on a GPU one that ends the process."""
    model, counts = tiny("gpt2"), [2, 0, 1]
    expected = predicting_last(model, SEQUENCES, counts)
    for kind in (torch.tensor, np.array, tuple):
        assert torch.equal(predicting_last(model, [kind(s) for s in SEQUENCES], counts), expected)
    with pytest.raises(ValueError, match="no sequence"):
        predicting_last(model, [], [])
    assert predicting_last(model, [[3] * 64], [5]).shape == (5, 32)
    with pytest.raises(ValueError, match="65 ids.* 64 positions"):
        predicting_last(model, [[3] * 65], [5])
    assert predicting_last(tiny("llama"), [[3] * 65], [5]).shape == (5, 32)  # rotary: no table


def test_wrapped_models_are_refused_with_the_remedy():
    model = tiny("llama")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for wrapped in (parallel, torch.compile(parallel)):
            with pytest.raises(ValueError, match="pass ddp.module"):
                OutputLayer(wrapped)
            with pytest.raises(ValueError, match="pass ddp.module"):
                predicting_last(wrapped, SEQUENCES, [1, 0, 1])
    finally:
        dist.destroy_process_group()


def fewest_groups(lengths, budget):
    """By brute force: of all cuts of the sorted lengths that keep to budget and padding, the one
    with the fewest groups."""
    ordered, fewest = sorted(lengths, reverse=True), len(lengths)
    for cut in itertools.product([False, True], repeat=len(lengths) - 1):
        starts = [0, *(i + 1 for i, here in enumerate(cut) if here)]
        parts = [ordered[a:b] for a, b in zip(starts, [*starts[1:], len(lengths)])]
        positions = sum(len(part) * part[0] for part in parts)
        fits = all(len(part) == 1 or len(part) * part[0] <= budget for part in parts)
        if fits and sum(lengths) >= 0.9 * positions:
            fewest = min(fewest, len(parts))
    return fewest


@pytest.mark.parametrize("budget", [64, 300, 10_000])
def test_micro_batches_keep_to_budget_and_padding_with_few_groups(budget):
    """Catches sequences that are lost or come twice, a group over budget, more than 10% padding,
    and what keeps to all of that at too high a price, such as one sequence per group."""
    generator, ours, fewest = torch.Generator().manual_seed(0), 0, 0
    for _ in range(40):
        lengths = torch.randint(1, 100, (9,), generator=generator).tolist()
        groups = micro_batches(lengths, budget)
        assert sorted(i for group in groups for i in group) == list(range(9))
        positions = 0
        for group in groups:
            padded = len(group) * max(lengths[i] for i in group)
            assert len(group) == 1 or padded <= budget
            positions += padded
        assert sum(lengths) >= 0.9 * positions
        ours, fewest = ours + len(groups), fewest + fewest_groups(lengths, budget)
    assert fewest <= ours <= 1.1 * fewest


def test_micro_batches_by_hand():
    assert micro_batches([5] * 7, 15) == [[0, 1, 2], [3, 4, 5], [6]]
    assert micro_batches([20, 20], 15) == [[0], [1]]  # longer than the budget: by itself
    assert micro_batches([10, 8], 1000) == [[0, 1]]  # 18 of 20 positions are real
    assert micro_batches([10, 7], 1000) == [[0], [1]]  # 17 of 20 would be
    # What one group does not use of the 10%, the next one may: 26 of 28, after 20 of 20.
    assert micro_batches([4, 10, 2, 10], 1000) == [[1, 3], [0, 2]]
    # Four groups of at most 374 positions, not of 436: the lengths of bench_training.py's step.
    lengths = [62, 89, 90, 105, 109, 147, 187, 253]
    assert micro_batches(lengths, 1000) == [[7], [6, 5], [4, 3, 2], [1, 0]]
    assert micro_batches([], 64) == []


# --------------------------------------------------------------------------------- the output layer


@pytest.mark.parametrize(
    "name, settings",
    [
        ("llama", {}),
        ("gemma2", {"final_logit_softcapping": 3.0}),
        ("cohere", {"logit_scale": 0.25}),
        ("cohere2", {}),
        ("granite", {}),
        ("gpt2", {}),
        ("phi", {}),
    ],
)
def test_output_layer_equals_the_models_own_logits(name, settings):
    """Catches a forgotten scale, cap or bias, a cut on one of them only, and dropout or a changed
    mode in the comparison."""
    model = tiny(name, **settings)
    if model.lm_head.bias is not None:  # phi
        torch.nn.init.normal_(model.lm_head.bias)
    ids = torch.tensor([[5, 9, 3, 7, 2], [39, 1, 0, 8, 8]])
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state
        expected = model(input_ids=ids).logits
        for vocab_size in (None, 30):
            ours = OutputLayer(model, vocab_size)(hidden)
            torch.testing.assert_close(ours, expected[..., :vocab_size], rtol=0, atol=1e-12)
    for dtype in (torch.float32, torch.bfloat16):
        OutputLayer(model.to(dtype))  # no false refusal by rounding


def test_output_layer_refuses_an_unknown_step_by_name_and_puts_modes_back():
    model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    OutputLayer(model)  # with dropout on, the two forwards would differ
    assert [m.training for m in model.modules()] == modes

    def scaled(module, inputs, logits):
        return logits * 1.01

    def shifted(module, inputs, logits):
        return logits + torch.arange(40) / 100

    for extra_step in (scaled, shifted):
        hook = model.lm_head.register_forward_hook(extra_step)
        with pytest.raises(ValueError, match="gpt2"):
            OutputLayer(model)
        hook.remove()
        assert [m.training for m in model.modules()] == modes


def test_output_layer_does_not_blame_the_family_for_nan():
    model = tiny("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = math.nan
    with pytest.raises(ValueError, match="its logits are not finite"):
        OutputLayer(model)


# ----------------------------------------------------------------------------- the chunked backward


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [1, 2, 3, 1000, None])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi3"])
def test_chunks_equal_the_whole(name, size, family, device):
    """Values and the gradients of hidden states and output weights. Catches a lost last chunk or
    block, one that is counted twice, weights that get one block's gradient, a divisor per chunk, a
    forgotten cap or scale in the backward by hand."""
    model, teacher = tiny(family).to(device), tiny(family, seed=1).to(device).requires_grad_(False)
    ours, theirs = OutputLayer(model, 37), OutputLayer(teacher, 37)
    leaf, teacher_hidden = torch.randn(2, 40, 32, device=device).double()
    leaf.requires_grad_()
    weight = torch.arange(40, device=device).double() % 9
    parameters = [leaf, *model.get_output_embeddings().parameters()]

    def loss(logits, against, weight):
        if name == "sampled":
            value = sampled_token(logits, against, weight.long())
        else:
            value = OBJECTIVES[name](logits, against)
        return torch.stack([value * weight, value], dim=-1)

    whole = loss(ours(leaf * 2), theirs(teacher_hidden), weight)
    expected = torch.autograd.grad(whole[:, 0].sum() / 7, parameters)
    for p in parameters[1:]:
        p.grad = torch.ones_like(p)  # what was there stays
    against = (theirs, teacher_hidden)
    columns = backward_by_chunks(
        loss, ours, leaf * 2, weight, divisor=7, teacher=against, size=size
    )
    torch.testing.assert_close(columns, whole.detach(), rtol=0, atol=1e-11)
    for p, wanted in zip(parameters, expected):
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(p.grad - (p is not leaf) * 1.0, wanted, rtol=0, atol=1e-11)


def head_and_hidden(family="llama", dtype=torch.float64, rows=9, **settings):
    """A tiny model, its output layer cut to 37 of 40 ids, hidden states that want a gradient."""
    model = tiny(family, dtype=dtype, **settings)
    hidden = torch.randn(rows, 32).to(dtype).requires_grad_()
    return model, OutputLayer(model, 37), hidden


def against_mirror(logits):
    """A loss [n, V] -> [n] that is not zero and needs no teacher."""
    return full_logits(logits, logits.detach().flip(-1))


@pytest.mark.parametrize("family", ["llama", "phi"])  # without and with bias
@pytest.mark.parametrize("size", [2, None])
def test_products_with_all_rows_change_nothing(family, size, monkeypatch):
    """On a GPU the products take all 40 rows of the weight, the loss 37: the same here, on the CPU,
    in several blocks. Catches logits of unused ids that are left in the buffer as a gradient, and
    tensors of another block's tokens."""
    monkeypatch.setitem(CHUNK, "cpu", (37 * 2, 2))  # blocks of 4 rows
    results, weight = [], torch.arange(11.0)

    def weighted(student, teacher, weight):
        return weight * full_logits(student, teacher)

    for rows in (37, 40):
        model, layer, hidden = head_and_hidden(family, rows=11)
        _, teacher, teacher_hidden = head_and_hidden(family, rows=11, seed=1)
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias)
        layer.rows = teacher.rows = rows
        against = (teacher, teacher_hidden.detach())
        values = backward_by_chunks(
            weighted, layer, hidden * 1, weight, divisor=1, teacher=against, size=size
        )
        grads = [p.grad for p in model.lm_head.parameters()]
        results.append([values, hidden.grad, *grads])
        expected = weighted(layer(hidden), teacher(teacher_hidden), weight)
        torch.testing.assert_close(values, expected.detach(), rtol=0, atol=1e-10)
        inputs = [hidden, *model.lm_head.parameters()]
        for got, wanted in zip(results[-1][1:], torch.autograd.grad(expected.sum(), inputs)):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-10)
    for cut, whole in zip(*results):
        torch.testing.assert_close(whole, cut, rtol=0, atol=1e-11)
        assert cut.abs().max() > 0.01


def test_a_loss_may_return_one_number_per_token():
    """The objectives as they are: [n] gives what [n, 1] gives, as [N]."""
    results = []
    for loss in (against_mirror, lambda logits: against_mirror(logits)[:, None]):
        model, layer, hidden = head_and_hidden()
        columns = backward_by_chunks(loss, layer, hidden * 1, divisor=3, size=2)
        results.append((columns, hidden.grad, model.lm_head.weight.grad))
    assert results[0][0].shape == (9,) and results[1][0].shape == (9, 1)
    assert torch.equal(results[0][0], results[1][0][:, 0])
    assert torch.equal(results[0][1], results[1][1]) and torch.equal(results[0][2], results[1][2])


def test_shapes_that_do_not_fit_are_refused_before_any_gradient():
    """A batch of hidden states, targets of another length, a loss that is averaged already
    or not summed over the vocabulary."""
    model, layer, hidden = head_and_hidden(rows=6)
    with pytest.raises(ValueError, match=r"\[N, H\].*flatten"):
        backward_by_chunks(against_mirror, layer, hidden.view(2, 3, 32) * 1, divisor=1)
    for wrong in (dict(teacher=(layer, hidden[:5].detach())), {}):
        tensors = [] if wrong else [torch.zeros(7)]
        with pytest.raises(ValueError, match="6 rows"):
            backward_by_chunks(
                lambda *x: x[0].sum(-1), layer, hidden * 1, *tensors, divisor=1, **wrong
            )
    for wrong in (lambda x: against_mirror(x).mean(), lambda x: against_mirror(x)[:1]):
        with pytest.raises(ValueError, match=r"must return \[n\] or \[n, C\], not"):
            backward_by_chunks(wrong, layer, hidden * 1, divisor=1)
    # A number per vocabulary entry: column 0 would be taken for the loss.
    for wrong in (lambda x: x.softmax(-1) * x, lambda x: x[:, :2, None]):
        with pytest.raises(ValueError, match="sum over the vocabulary first"):
            backward_by_chunks(wrong, layer, hidden * 1, divisor=1)
    assert hidden.grad is None and model.lm_head.weight.grad is None


@pytest.mark.parametrize("frozen", ["body", "head", "both"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_gets_its_own(frozen):
    """A linear probe: hidden states without a graph. Catches an error after half of the work."""
    model, layer, hidden = head_and_hidden()
    learning = {"hidden": hidden, "weight": model.lm_head.weight}
    if frozen in ("body", "both"):
        hidden.requires_grad_(False)
        del learning["hidden"]
    if frozen in ("head", "both"):
        model.lm_head.requires_grad_(False)
        del learning["weight"]
    expected = against_mirror(layer(hidden))
    if learning:
        grads = torch.autograd.grad(expected.sum() / 2, list(learning.values()))
    values = backward_by_chunks(against_mirror, layer, hidden, divisor=2, size=4)
    torch.testing.assert_close(values, expected.detach(), rtol=0, atol=1e-12)
    for parameter, wanted in zip(learning.values(), grads if learning else []):
        torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=1e-12)
    assert "hidden" in learning or hidden.grad is None
    assert "weight" in learning or model.lm_head.weight.grad is None


@pytest.mark.parametrize("device", DEVICES)
def test_fp32_gradients_of_bf16_weights_with_a_bias(device):
    """bf16 products, added up in fp32 where the weight asks for it (`grad_dtype`)."""
    model = tiny("llama", dtype=torch.bfloat16)
    model.lm_head = torch.nn.Linear(32, 40).bfloat16()
    model.lm_head.weight.grad_dtype = torch.float32
    model.to(device)
    weight, bias = model.lm_head.weight, model.lm_head.bias
    hidden = torch.randn(9, 32, device=device).bfloat16().requires_grad_()
    layer = OutputLayer(model, 37)
    reference = against_mirror(layer(hidden)).sum()
    reference = torch.autograd.grad(reference, [hidden, weight, bias])
    backward_by_chunks(against_mirror, layer, hidden * 1, divisor=1)
    for p, wanted in zip((hidden, weight, bias), reference):
        torch.testing.assert_close(p.grad.float(), wanted.float(), rtol=0.05, atol=0.05)
    assert weight.grad.dtype == torch.float32
    before = weight.grad.clone()
    weight.grad += 256  # where bf16 has a step of 2, fp32 one of 2^-15
    backward_by_chunks(against_mirror, layer, hidden * 1, divisor=1)
    torch.testing.assert_close(weight.grad - 256, 2 * before, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inside", [True, False])
def test_hidden_states_of_autocast(inside, dtype, device):
    """As others' trainers call it: fp32 weights, hidden states in fp32 or bf16, and the backward
    pass inside of autocast or after it. Catches complaints about two dtypes: products with out= are
    not autocast."""
    model = tiny("llama", dtype=torch.float32).to(device)
    hidden = torch.randn(9, 32, device=device).to(dtype).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        layer = OutputLayer(model, 37)
        whole = against_mirror(layer(hidden))
    with torch.autocast(device, torch.bfloat16, enabled=inside):
        values = backward_by_chunks(against_mirror, layer, hidden * 1, divisor=1)
    grads = torch.autograd.grad(whole.sum(), [hidden, model.lm_head.weight])
    torch.testing.assert_close(values, whole.detach(), rtol=0.1, atol=0.1)
    for p, wanted in zip((hidden, model.lm_head.weight), grads):
        assert p.grad.dtype == p.dtype
        torch.testing.assert_close(p.grad, wanted, rtol=0.1, atol=0.1)


def test_a_loss_that_returns_logits_themselves():
    """Not the gradient that takes their place in memory."""
    for loss in (lambda x: x[:, 3], lambda x: x[:, :2]):
        _, layer, hidden = head_and_hidden()
        values = backward_by_chunks(loss, layer, hidden * 1, divisor=1)
        torch.testing.assert_close(values, loss(layer(hidden)).detach())


def test_a_step_that_its_caller_compiles():
    """There, too, the gradient takes the place of the logits, which torch.func would read later."""
    torch._dynamo.reset()
    results = []
    for wrap in (lambda step: step, partial(torch.compile, backend="aot_eager")):
        model, layer, hidden = head_and_hidden()

        def step(hidden, layer=layer):
            return backward_by_chunks(against_mirror, layer, hidden * 1, divisor=1, size=2)

        results.append([wrap(step)(hidden), hidden.grad, model.lm_head.weight.grad])
    torch.testing.assert_close(*results)
    torch._dynamo.reset()


def test_only_hidden_states_and_output_layer_get_a_gradient():
    _, layer, hidden = head_and_hidden()
    weight, scale = torch.ones(9, requires_grad=True), torch.ones((), requires_grad=True)
    backward_by_chunks(lambda x, w: w * scale * x[:, 3], layer, hidden * 1, weight, divisor=1)
    assert hidden.grad.any() and weight.grad is None and scale.grad is None


def test_chunks_without_a_token_give_zero_gradients():
    for loss, shape in ((against_mirror, (0,)), (lambda x: x[:, :3], (0, 3))):
        model, layer, hidden = head_and_hidden(rows=0)
        columns = backward_by_chunks(loss, layer, hidden * 1, divisor=1)
        assert columns.shape == shape and hidden.grad.shape == (0, 32)
        grad = model.lm_head.weight.grad
        assert grad.shape == (40, 32) and not grad.any()


class Largest(TorchDispatchMode):
    """Records the numel of the largest tensor that any operation, forward or backward, returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def largest_and_saved(function):
    """The numel of the largest tensor that is made, and of the largest that autograd saves. Instead
    of a look at the process's memory, which depends on the allocator."""
    saved = []

    def pack(x):
        saved.append(x.numel())
        return x

    with Largest() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        function()
    return largest.numel, max(saved)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_chunks_never_hold_tokens_x_vocabulary(name):
    """Neither in one tensor nor, saved for the backward pass, in many."""
    model, teacher = tiny("llama", vocab_size=500), tiny("llama", vocab_size=500, seed=1)
    layer, other = OutputLayer(model), OutputLayer(teacher)
    loss, v, d, size = OBJECTIVES[name], 500, 32, 5
    block = CHUNK["cpu"][1] * size  # rows
    n = 8 * block
    hidden, teacher_hidden = torch.randn(2, n, d).double()
    hidden.requires_grad_()

    def by_chunks():
        against = (other, teacher_hidden)
        backward_by_chunks(loss, layer, hidden * 1, divisor=1, teacher=against, size=size)

    def whole():
        loss(layer(hidden), other(teacher_hidden).detach()).sum().backward()

    made, saved = largest_and_saved(by_chunks)
    assert made <= max(block * v, v * d, n * d) < n * v / 5 and saved <= max(size * v, v * d)
    made, saved = largest_and_saved(whole)
    assert made >= n * v and saved >= n * v  # both recorders do see it when it is there


# ------------------------------------------------------------------------------- the file by itself


ALONE = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
import losses
from losses import OutputLayer, backward_by_chunks, full_logits, predicting_last

assert losses.__file__.startswith({folder!r}), losses.__file__
torch.manual_seed(0)
config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                     num_attention_heads=2, num_key_value_heads=1, pad_token_id=None)
student, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config)
x, y, phrase = [[3, 4], [5]], [[7, 8, 9], [11, 12]], [30, 31]
student_ids = [a + b for a, b in zip(x, y)]
teacher_ids = [a + b + phrase + b for a, b in zip(x, y)]
counts = [len(b) for b in y]
{example}
assert kl.shape == (5,) and (kl > 0).all(), kl
ours = [p.grad.clone() for p in student.parameters()]
student.zero_grad()
total = 0
for a, b in zip(student_ids, teacher_ids):
    n = 3 if len(a) == 5 else 2
    p = student(torch.tensor([a])).logits[0, -n - 1 : -1].log_softmax(-1)
    q = teacher(torch.tensor([b])).logits[0, -n - 1 : -1].log_softmax(-1).detach()
    total = total + (p.exp() * (p - q)).sum() / 5
total.backward()
torch.testing.assert_close(kl.sum() / 5, total.detach())
for p, grad in zip(student.parameters(), ours):
    torch.testing.assert_close(grad, p.grad)
others = {{"common", "srt", "sdzero", "rollout", "teacher", "verifier"}} & set(sys.modules)
assert not others, others
print("done")
"""


def test_the_file_by_itself_runs_its_docstrings_example(tmp_path):
    """Copied into an empty folder: the example at the top of the file, word for word, against whole
    logits. Catches an import of a neighbour, and an example that nobody ran."""
    shutil.copy(losses.__file__, tmp_path)
    paragraphs = losses.__doc__.split("\n\n")
    example = textwrap.dedent(next(text for text in paragraphs if text.startswith("    ")))
    assert "backward_by_chunks" in example
    script = tmp_path / "script.py"
    script.write_text(ALONE.format(example=example, folder=str(tmp_path)))
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(
        [sys.executable, script], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert run.stdout.strip() == "done", run.stderr


@pytest.mark.parametrize(
    "families", [("llama", "gemma2"), ("granite", "llama"), ("gemma2", "granite")]
)
def test_a_teacher_of_another_family_has_its_own_scale_and_cap(families):
    model, teacher = (tiny(family, seed=seed) for seed, family in enumerate(families))
    ours, theirs = OutputLayer(model, 37), OutputLayer(teacher, 37)
    generator = torch.Generator().manual_seed(0)
    hidden, told = 30 * torch.randn(2, 9, 32, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        expected = full_logits(ours(hidden), theirs(told))
    against = (theirs, told)
    got = backward_by_chunks(full_logits, ours, hidden, divisor=1, teacher=against, size=4)
    torch.testing.assert_close(got, expected)


def test_a_frozen_bias_gets_no_gradient():
    model = tiny("phi")
    model.lm_head.bias.requires_grad_(False)
    hidden = torch.randn(9, 32, dtype=torch.float64)
    backward_by_chunks(lambda x: x.logsumexp(-1), OutputLayer(model), hidden, divisor=1)
    assert model.lm_head.bias.grad is None and model.lm_head.weight.grad.any()
