"""losses.py against the formulas of METHOD.md on Python floats; gradients against central differences. All in float64 unless said."""

import math

import pytest
import torch
from tiny import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from losses import CHUNK, OutputLayer, backward_by_chunks, full_logits, importance_weight, mixed_kl, sampled_token, token_logprobs, topk_logits

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
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * scale).to(dtype) for _ in range(2)]


def value_and_gradient(function, student, teacher):
    """Row n weighs n + 1, so that rows which leak into each other show."""
    student = student.clone().requires_grad_()
    value = function(student, teacher)
    assert value.shape == student.shape[:1]
    return value.detach(), torch.autograd.grad((value * torch.arange(1, len(value) + 1)).sum(), student)[0]


# The reference: plain probabilities, lists of floats, one row at a time.


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
    return top + [sum(v for i, v in enumerate(p) if i not in support)] if tail else [v / sum(top) for v in top]


def assert_equals_reference(function, reference):
    """`reference` takes the probabilities of the student and of the teacher, lists of floats."""
    student, teacher = logits()
    value, gradient = value_and_gradient(function, student, teacher)

    def at(x, n):
        return reference(softmax(x), softmax(teacher[n].tolist()))

    for n, row in enumerate(student.tolist()):
        assert value[n].item() == pytest.approx(at(row, n), abs=1e-12)
        for i in range(len(row)):
            up, down = ([v + (h if i == j else 0) for j, v in enumerate(row)] for h in (1e-5, -1e-5))
            assert gradient[n, i].item() == pytest.approx((n + 1) * (at(up, n) - at(down, n)) / 2e-5, abs=1e-8)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_divergences_equal_the_formulas(alpha):
    """Catches swapped sides, swapped weights, a wrong mixture, the teacher's support instead of the student's, a tail that is lost."""
    assert_equals_reference(lambda s, t: full_logits(s, t, alpha), lambda p, q: family(p, q, alpha))
    for k, tail in ((1, True), (2, False), (3, True), (3, False), (6, True), (6, False)):
        if True:

            def reference(p, q):
                return family(on(p, largest(p, k), tail), on(q, largest(p, k), tail), alpha)

            assert_equals_reference(lambda s, t: topk_logits(s, t, k, alpha, tail), reference)


@pytest.mark.parametrize("w", [0.0, 0.3, 0.5, 1.0])
def test_mixed_kl_equals_the_formula(w):
    assert_equals_reference(lambda s, t: mixed_kl(s, t, w), lambda p, q: w * kl(q, p) + (1 - w) * kl(p, q))

    def reference(p, q):
        p, q = on(p, largest(q, 3), tail=False), on(q, largest(q, 3), tail=False)
        return w * kl(q, p) + (1 - w) * kl(p, q)

    assert_equals_reference(lambda s, t: mixed_kl(s, t, w, k=3), reference)
    assert mixed_kl(*logits(), w, k=100).tolist() == pytest.approx(mixed_kl(*logits(), w).tolist())  # k > V


def test_sampled_token_and_token_logprobs_equal_the_formulas():
    """The gradient of the first factor must be stopped: with it the gradient would have a second term."""
    (student, teacher), ids = logits(), [6, 0, 3, 3]
    value, gradient = value_and_gradient(lambda s, t: sampled_token(s, t, torch.tensor(ids)), student, teacher)
    logprobs = token_logprobs(student, torch.tensor(ids))
    for n, y in enumerate(ids):
        p, q = softmax(student[n].tolist()), softmax(teacher[n].tolist())
        assert logprobs[n].item() == pytest.approx(math.log(p[y]), abs=1e-12)
        assert value[n].item() == pytest.approx((math.log(p[y]) - math.log(q[y])) * math.log(p[y]), abs=1e-12)
        expected = [(n + 1) * math.log(p[y] / q[y]) * ((i == y) - p[i]) for i in range(7)]  # d log p_y / d logit_i = [i = y] - p_i
        assert gradient[n].tolist() == pytest.approx(expected, abs=1e-12)


def test_sampled_token_has_the_gradient_of_the_reverse_kl_but_not_its_value():
    """The expectation over y ~ student is exact: all y, weighted by pi(y)."""
    student, teacher = logits()
    pi = student.softmax(-1)

    def expectation(s, t):
        return sum(pi[:, y] * sampled_token(s, t, torch.full((4,), y)) for y in range(7))

    value, gradient = value_and_gradient(expectation, student, teacher)
    divergence, expected = value_and_gradient(full_logits, student, teacher)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)
    assert (divergence > 0).all() and (value < 0).any() and ((value - divergence).abs() > 0.1).all()
    # what should be logged instead
    logged = sum(pi[:, y] * (token_logprobs(student, ys) - token_logprobs(teacher, ys)) for y in range(7) for ys in [torch.full((4,), y)])
    torch.testing.assert_close(logged, divergence, rtol=0, atol=1e-12)


def test_importance_weight():
    logprobs = torch.tensor([-1.0, -1.0, -3.0, -1.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.0, -1.5, -1.0, -900.0], dtype=torch.float64)
    weight = importance_weight(logprobs, old, cap=2.0)
    assert weight.tolist() == pytest.approx([1.0, math.exp(0.5), math.exp(-2.0), 2.0])  # capped above only; exp(899) overflows, then 2
    assert not weight.requires_grad  # a gradient here would turn the loss into another one


@pytest.mark.parametrize("name", OBJECTIVES)
def test_equal_inputs_give_zero_and_swapped_inputs_another_value(name):
    student, teacher = logits()
    value, gradient = value_and_gradient(OBJECTIVES[name], student, student.clone())
    assert value.abs().max() < 1e-14 and gradient.abs().max() < 1e-14
    assert ((OBJECTIVES[name](student, teacher) - OBJECTIVES[name](teacher, student)).abs() > 1e-3).all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_top_k_grows_with_k_up_to_the_full_divergence(alpha):
    """Joining tokens in one bucket can only lose divergence. Catches a tail of one side only or a support that is not nested."""
    student, teacher = logits()
    full = full_logits(student, teacher, alpha)
    values = [topk_logits(student, teacher, k, alpha) for k in range(1, 7)] + [full]
    assert all((lower <= upper + 1e-12).all() for lower, upper in zip(values, values[1:])) and (values[0] < 0.99 * full).all()
    for tail in (True, False):
        for k in (7, 100):
            torch.testing.assert_close(topk_logits(student, teacher, k, alpha, tail), full, rtol=0, atol=1e-12)


def test_the_family_jumps_at_its_ends():
    """(5) goes to 0 linearly, the full KLs stand at the ends themselves. Catches ends without their special case, or a rescaled (5)."""
    for f in (full_logits, lambda s, t, alpha: topk_logits(s, t, 3, alpha)):
        for end, inside in ((1.0, 0.999), (0.0, 0.001)):
            assert (f(*logits(scale=3.0), end) > 0.5).all() and (f(*logits(scale=3.0), inside) < 0.01).all()
    student, teacher = logits(scale=0.5)  # no large ratios: the rest of (5) is of second order
    for eps in (1e-3, 1e-6):
        for end, inside in ((1.0, 1 - eps), (0.0, eps)):
            expected = eps * full_logits(student, teacher, end)
            torch.testing.assert_close(full_logits(student, teacher, inside), expected, rtol=20 * eps, atol=1e-14)


def test_alpha_outside_its_range_raises():
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            full_logits(*logits(), alpha)
        with pytest.raises(ValueError, match="alpha"):
            topk_logits(*logits(), 3, alpha)


def test_the_teachers_support_is_blind_and_the_default_is_not():
    teacher = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0, -2.0, -1.5, -1.0]], dtype=torch.float64)
    student = teacher.clone()
    student[0, 7] = 20.0  # nearly all mass on one token outside the teacher's top 4
    value, gradient = value_and_gradient(lambda s, t: mixed_kl(s, t, k=4), student, teacher)
    assert value.abs().item() < 1e-12 and gradient.abs().max() < 1e-12
    true = full_logits(student, teacher).item()
    assert true > 3
    assert topk_logits(student, teacher, 4, tail=False).item() > 1  # the student's own support sees it, even renormalised
    value, gradient = value_and_gradient(lambda s, t: topk_logits(s, t, 4), student, teacher)
    assert value.item() == pytest.approx(true, rel=1e-6) and gradient.abs().max() > 1e-9


def test_the_tail_bucket_keeps_its_digits_in_fp32():
    """One side has 1e-5 of its mass outside the top 3, the other 0.1: the fp32 value and gradient must have fp32's digits."""
    small, large = (torch.tensor([[(1 - tail) / 3] * 3 + [tail / 50] * 50]).log() for tail in (1e-5, 0.1))

    def naive(s, t):
        p, q = ((lambda top: torch.cat([top, 1 - top.sum(-1, keepdim=True)], -1))(x.softmax(-1)[:, :3]) for x in (s, t))
        return (q * (q / p).log()).sum(-1)

    def errors(function):
        (value, gradient), exact = value_and_gradient(function, small, large), value_and_gradient(function, small.double(), large.double())
        assert value.dtype == torch.float32
        return [((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip((value, gradient), exact)]

    assert max(errors(lambda s, t: topk_logits(s, t, 3, alpha=0.0))) < 2e-6
    assert max(errors(lambda s, t: topk_logits(t, s, 3))) < 2e-6  # the same number as a reverse KL
    assert max(errors(naive)) > 1e-3  # so this case does tell the two apart


@pytest.mark.parametrize("name", OBJECTIVES)
def test_precision(name):
    """bf16 logits are computed in fp32 (not in bf16 and cast at the end); float64 is not narrowed."""
    function = OBJECTIVES[name]
    halves = logits(dtype=torch.bfloat16)
    value = function(*halves)
    assert value.dtype == torch.float32 and torch.equal(value, function(*(x.float() for x in halves)))
    assert function(*logits()).dtype == torch.float64 and function(*logits(dtype=torch.float32)).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_logits_are_finite(name, dtype):
    """Logits 1e4 apart: probabilities are exactly 0 on both sides, and 0 x inf or log(0) would give nan."""
    student = torch.tensor([[1e4, 0.0, -1e4, 5.0, -3.0], [0.0, 1e4, 0.0, 0.0, 0.0]], dtype=dtype)
    teacher = torch.tensor([[-1e4, 0.0, 1e4, 3.0, -9.0], [0.0, 0.0, 1e4, 0.0, 0.0]], dtype=dtype)
    value, gradient = value_and_gradient(OBJECTIVES[name], student, teacher)
    assert value.isfinite().all() and gradient.isfinite().all()
    if name == "full":
        assert value.tolist() == pytest.approx([2e4, 1e4])  # not clipped either


@pytest.mark.parametrize("name", [n for n in OBJECTIVES if n != "sampled"])
def test_a_tiny_divergence_keeps_its_gradient(name):
    """Below fp32's resolution the value may be negative; a clamp at 0 would give gradient 0 there."""
    student, teacher = logits(rows=400, scale=1.0)
    teacher = (student + 2e-4 * teacher).float()
    value, gradient = value_and_gradient(OBJECTIVES[name], student.float(), teacher)
    exact = value_and_gradient(OBJECTIVES[name], student.float().double(), teacher.double())[1]
    negative = value <= 0
    assert negative.any() and (gradient[negative].abs().amax(-1) > 1e-6).all()
    assert ((gradient - exact).abs().amax(-1) / exact.abs().amax(-1)).median() < 0.02


@pytest.mark.parametrize(
    "name, settings",
    [("llama", {}), ("gemma2", {"final_logit_softcapping": 3.0}), ("cohere", {"logit_scale": 0.25}), ("cohere2", {}), ("granite", {}),
     ("gpt2", {}), ("phi", {})],
)  # fmt: skip
def test_output_layer_equals_the_models_own_logits(name, settings):
    """Catches a forgotten scale, cap or bias, a cut on one of them only, and dropout or a changed mode in the comparison."""
    model = tiny(name, **settings)
    if model.lm_head.bias is not None:  # phi
        torch.nn.init.normal_(model.lm_head.bias)
    ids = torch.tensor([[5, 9, 3, 7, 2], [39, 1, 0, 8, 8]])
    with torch.no_grad():
        hidden, expected = model.base_model(input_ids=ids).last_hidden_state, model(input_ids=ids).logits
        for vocab_size in (None, 30):
            torch.testing.assert_close(OutputLayer(model, vocab_size)(hidden), expected[..., :vocab_size], rtol=0, atol=1e-12)
    for dtype in (torch.float32, torch.bfloat16):
        OutputLayer(model.to(dtype))  # no false refusal by rounding


def test_output_layer_refuses_an_unknown_step_by_name_and_puts_modes_back():
    model = tiny("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    model.transformer.h[0].eval()
    modes = [m.training for m in model.modules()]
    OutputLayer(model)  # with dropout on, the two forwards would differ
    assert [m.training for m in model.modules()] == modes
    for extra in (lambda logits: logits * 1.01, lambda logits: logits + torch.arange(40) / 100):
        hook = model.lm_head.register_forward_hook(lambda module, inputs, logits: extra(logits))
        with pytest.raises(ValueError, match="gpt2"):
            OutputLayer(model)
        hook.remove()
        assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("size", [1, 2, 3, 1000, None])
@pytest.mark.parametrize("name", sorted(OBJECTIVES))
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite", "phi3"])
def test_chunks_equal_the_whole(name, size, family):
    """Values and the gradients of hidden states and output weights. Catches a lost last chunk or block, one that is counted twice, weights
    that get one block's gradient, a divisor a chunk, a forgotten cap or scale in the backward by hand."""
    model, teacher = tiny(family), tiny(family, seed=1).requires_grad_(False)
    ours, theirs = OutputLayer(model, 37), OutputLayer(teacher, 37)
    leaf, teacher_hidden, weight = torch.randn(40, 32).double().requires_grad_(), torch.randn(40, 32).double(), torch.arange(40.0).double() % 9
    parameters = [leaf, *model.get_output_embeddings().parameters()]

    def loss(logits, against, weight):
        value = sampled_token(logits, against, weight.long()) if name == "sampled" else OBJECTIVES[name](logits, against)
        return torch.stack([value * weight, value], dim=-1)

    whole = loss(ours(leaf * 2), theirs(teacher_hidden), weight)
    expected = torch.autograd.grad(whole[:, 0].sum() / 7, parameters)
    for p in parameters[1:]:
        p.grad = torch.ones_like(p)  # what was there stays
    columns = backward_by_chunks(loss, ours, leaf * 2, weight, divisor=7, teacher=(theirs, teacher_hidden), size=size)
    torch.testing.assert_close(columns, whole.detach(), rtol=0, atol=1e-11)
    for p, wanted in zip(parameters, expected):
        assert wanted.abs().max() > 0.01
        torch.testing.assert_close(p.grad - (p is not leaf) * 1.0, wanted, rtol=0, atol=1e-11)


def test_bias_frozen_weights_and_fp32_gradients_of_bf16_weights():
    model = tiny("llama", dtype=torch.bfloat16)
    model.lm_head = torch.nn.Linear(32, 40).bfloat16()
    model.lm_head.weight.grad_dtype = torch.float32
    layer, hidden = OutputLayer(model, 37), torch.randn(9, 32).bfloat16().requires_grad_()

    def loss(logits):
        return full_logits(logits, logits.detach().roll(1, 0))[:, None]

    reference = torch.autograd.grad((loss(layer(hidden))[:, 0]).sum(), [hidden, model.lm_head.weight, model.lm_head.bias])
    backward_by_chunks(loss, layer, hidden * 1, divisor=1)
    for p, wanted in zip((hidden, model.lm_head.weight, model.lm_head.bias), reference):
        torch.testing.assert_close(p.grad.float(), wanted.float(), rtol=0.05, atol=0.05)
    assert model.lm_head.weight.grad.dtype == torch.float32

    model.lm_head.requires_grad_(False)
    before = model.lm_head.weight.grad.clone()
    backward_by_chunks(loss, layer, hidden * 1, divisor=1)
    assert torch.equal(model.lm_head.weight.grad, before)


def test_chunks_without_a_token_give_zero_gradients():
    model = tiny("llama")
    hidden, layer = torch.zeros(0, 32, dtype=torch.float64, requires_grad=True), OutputLayer(model)
    columns = backward_by_chunks(lambda logits: full_logits(logits, logits.detach())[:, None], layer, hidden * 1, divisor=1)
    assert columns.shape == (0, 1) and hidden.grad.shape == (0, 32)
    assert model.lm_head.weight.grad.shape == (40, 32) and not model.lm_head.weight.grad.any()


class Largest(TorchDispatchMode):
    """Records the numel of the largest tensor that any operation, forward or backward, returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            self.numel = max(self.numel, x.numel() if isinstance(x, torch.Tensor) else 0)
        return result


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_chunks_never_hold_tokens_x_vocabulary(name):
    """Neither in one tensor nor, saved for the backward, in many."""
    model, teacher = tiny("llama", vocab_size=500), tiny("llama", vocab_size=500, seed=1)
    layer, other = OutputLayer(model), OutputLayer(teacher)
    v, d, size = 500, 32, 5
    block = CHUNK["cpu"][1] * size  # rows
    n = 8 * block
    hidden, teacher_hidden = torch.randn(n, d).double().requires_grad_(), torch.randn(n, d).double()

    def loss(logits, against):
        return OBJECTIVES[name](logits, against)[:, None]

    def measure(function):
        saved = []
        with Largest() as largest:
            with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
                function()
        return largest.numel, max(saved)

    largest, saved = measure(lambda: backward_by_chunks(loss, layer, hidden * 1, divisor=1, teacher=(other, teacher_hidden), size=size))
    assert largest <= max(block * v, v * d, n * d) < n * v / 5 and saved <= max(size * v, v * d)
    largest, saved = measure(lambda: loss(layer(hidden), other(teacher_hidden).detach()).sum().backward())
    assert largest >= n * v and saved >= n * v  # both recorders do see it when it is there
