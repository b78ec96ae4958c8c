"""Masks, shifts and divisors of both stages' losses against one plain forward a token, in float64; the optimizer."""

import argparse
import itertools
import math

import pytest
import torch
from tiny import tiny

from losses import OutputLayer
from rollout import FAMILIES, Rollout
from sdzero import Example, distill, distill_step
from srt import (
    LM, Optimizer, Problem, Stopped, checkpoint_layers, hidden_states, join, kept_bytes, learning_rate, micro_batches, report_memory, split, srt_loss,
    srt_step,
)  # fmt: skip
from teacher import Teacher

EOS, VOCAB = 1, 37  # the models' output layers have 40 rows: the last three must be cut off on both sides
PHRASES = [[30, 31, 32, 30], [30, 33, 30]]


def settings(**changed):
    flags = dict(
        objective="full_logits", alpha=1.0, topk=None, no_tail=False, temperature=1.0, skip_first=0, importance_cap=None, micro_tokens=64
    )
    return argparse.Namespace(**{**flags, **changed})


def response(ids, finished):
    return Rollout(ids=ids, logprobs=[-4.0] * len(ids), finished=finished)


EXAMPLES = [  # finished, cut off, right, wrong, of different lengths; a prompt and a first copy with an EOS id inside
    Example([5, 9, EOS, 7], response([8, 2, 11, EOS], True), 0, PHRASES[0]),
    Example([4], response([6, 13, 9, 22, 31, 8, 2], False), 1, PHRASES[1]),
    Example([7, 3, 3, 12, 4, 4, 21], response([5, EOS], True), 0, PHRASES[0]),
]


def logprobs_after(model, ids, temperature=1.0):
    """log pi(. | ids) [VOCAB] by one plain forward: no batch, no padding, no shift."""
    return (model(input_ids=torch.tensor([ids])).logits[0, -1, :VOCAB] / temperature).log_softmax(-1)


def reference_divergences(student, teacher, example, temperature):
    """D_KL(pi(. | x, y_<t) || pi_bar(. | x, y, P_r, y_<t)) for every t, METHOD.md (4)."""
    y = example.response.ids
    first_copy = y[:-1] if example.response.finished else y
    out = []
    for t in range(len(y)):
        p = logprobs_after(student, example.prompt_ids + y[:t], temperature)
        with torch.no_grad():
            q = logprobs_after(teacher, example.prompt_ids + first_copy + example.phrase_ids + y[:t], temperature)
        out.append((p.exp() * (p - q)).sum())
    return torch.stack(out)


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(a, b, tolerance=1e-6):  # RMS norms compute in fp32 even in a float64 model
    assert a.keys() == b.keys() and len(a) > 5
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=tolerance)


@pytest.mark.parametrize("family, temperature", [("llama", 1.0), ("qwen3", 1.0), ("gpt2", 0.7), ("gemma3_text", 1.0)])
def test_stage_2_equals_one_forward_a_token(family, temperature):
    """Catches a shift by one in either sequence, the first copy scored for the second, an EOS in the first copy, padding that is seen, a
    divisor per sequence or per micro-batch, ids beyond the tokenizer, a forgotten temperature."""
    student, other = tiny(family), tiny(family, seed=1)
    teacher = Teacher(other, "base")
    total = torch.cat([reference_divergences(student, other, e, temperature) for e in EXAMPLES])
    total.mean().backward()
    expected = gradients(student)
    for micro_tokens in (1, 40, 10_000):  # one sequence a pass; two; all
        student.zero_grad()
        args = settings(temperature=temperature, micro_tokens=micro_tokens)
        metrics = distill_step(student, teacher, OutputLayer(student, VOCAB), OutputLayer(teacher.module, VOCAB), EXAMPLES, args)
        assert metrics["loss"] == pytest.approx(total.mean().item(), abs=1e-10)
        assert metrics["loss_tokens"] == len(total)
        assert_same_gradients(gradients(student), expected)


class Positions(torch.nn.Module):
    """Its hidden state at each place is that place's index: what reaches the output layer shows where it was taken from."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1, dtype=torch.float64))
        self.base_model, self.seen = self.forward, []

    def forward(self, input_ids, use_cache):
        self.seen.append(input_ids.tolist())
        places = torch.arange(input_ids.shape[1], dtype=torch.float64).expand(len(input_ids), -1)[..., None]
        return argparse.Namespace(last_hidden_state=places * self.scale)


class Reveal(OutputLayer):
    """An output layer that notes the places which reach it."""

    vocab_size, scale, cap = VOCAB, 1, None

    def __init__(self):
        self.places = []

    def linear(self, hidden, out):
        self.places += hidden[:, 0].tolist()
        return torch.mul(hidden, torch.arange(VOCAB), out=out)

    def linear_backward(self, hidden, grad):
        return grad.sum(-1, keepdim=True)


def test_the_teacher_scores_the_second_copy():
    """The row for y_t is the one before y_t: in x + y for the student, in the second y of x + y + P_r + y for the teacher."""
    student, teacher, layers = Positions(), Teacher(Positions(), "live"), (Reveal(), Reveal())
    distill(student, teacher, *layers, EXAMPLES[:2], settings(), divisor=1)
    # x has 4 tokens and y 4, of which the first copy shows 3; then P_0 with 4. The other: x 1, y 7, P_1 3.
    assert layers[0].places == [3, 4, 5, 6] + [0, 1, 2, 3, 4, 5, 6]
    assert layers[1].places == [10, 11, 12, 13] + [10, 11, 12, 13, 14, 15, 16]
    assert teacher.module.seen[0][0] == [5, 9, EOS, 7, 8, 2, 11, 30, 31, 32, 30, 8, 2, 11, EOS] + [0] * 3


@pytest.mark.parametrize("objective, more", [("topk_logits", dict(topk=5)), ("sampled_token", {}), ("mixed_kl", dict(alpha=0.5)),
                                             ("full_logits", dict(alpha=0.5)), ("full_logits", dict(alpha=1.0))])  # fmt: skip
def test_every_objective_and_what_is_logged_beside_it(objective, more):
    import losses

    student, other = tiny("llama"), tiny("llama", seed=1)
    args = settings(objective=objective, **more)
    got = distill(student, Teacher(other), OutputLayer(student, VOCAB), OutputLayer(other, VOCAB), EXAMPLES, args, divisor=1)
    p = torch.stack([logprobs_after(student, e.prompt_ids + e.response.ids[:t]) for e in EXAMPLES for t in range(len(e.response.ids))])
    q = torch.stack([logprobs_after(other, e.teacher_ids[: -len(e.response.ids)] + e.response.ids[:t])
                     for e in EXAMPLES for t in range(len(e.response.ids))])  # fmt: skip
    y = torch.tensor([t for e in EXAMPLES for t in e.response.ids])
    expected = {
        "topk_logits": lambda: losses.topk_logits(p, q, 5),
        "sampled_token": lambda: losses.sampled_token(p, q, y),
        "mixed_kl": lambda: losses.mixed_kl(p, q, 0.5),
        "full_logits": lambda: losses.full_logits(p, q, more["alpha"]),
    }[objective]()
    torch.testing.assert_close(got["loss"], expected.detach())
    torch.testing.assert_close(got["kl"], (p.exp() * (p - q)).sum(-1).detach())
    torch.testing.assert_close(got["log_ratio"], (p - q).gather(-1, y[:, None])[:, 0].detach())
    assert got["reward"].tolist() == [0] * 4 + [1] * 7 + [0] * 2
    assert got["position"].tolist() == [*range(4), *range(7), *range(2)]


def test_skipped_tokens_importance_weight_and_a_step_without_tokens():
    student, other = tiny("llama"), tiny("llama", seed=1)
    layers = OutputLayer(student, VOCAB), OutputLayer(other, VOCAB)
    whole = distill(student, Teacher(other), *layers, EXAMPLES, settings(), divisor=1)
    later = distill_step(student, Teacher(other), *layers, EXAMPLES, settings(skip_first=2))
    kept = whole["position"] >= 2  # the third response has only two tokens: nothing of it is left
    assert later["loss_tokens"] == kept.sum() == 7 and later["loss"] == pytest.approx(whole["loss"][kept].mean().item(), abs=1e-10)

    weighted = distill(student, Teacher(other), *layers, EXAMPLES, settings(importance_cap=1.5), divisor=1)
    log_pi = torch.stack([logprobs_after(student, e.prompt_ids + e.response.ids[:t])[e.response.ids[t]]
                          for e in EXAMPLES for t in range(len(e.response.ids))]).detach()  # fmt: skip
    weights = (log_pi - -4.0).exp().clamp(max=1.5)
    assert (weights == 1.5).any() and (weights < 1.5).any()
    torch.testing.assert_close(weighted["loss"], whole["loss"] * weights)
    assert torch.equal(weighted["kl"], whole["kl"])  # what is logged has no weight

    student.zero_grad()
    optimizer = Optimizer(student, argparse.Namespace(lr=1.0, betas=(0.9, 0.999), weight_decay=0.1, clip=1.0))
    for moved in (False, True):  # a step in front of it leaves zeros behind as gradients, and momentum, which must not move anything
        if moved:
            distill_step(student, Teacher(other), *layers, EXAMPLES, settings())
            assert optimizer.step(1e-3) > 0
        before = {n: p.clone() for n, p in student.named_parameters()}
        for examples, skip in (([], 0), (EXAMPLES, 100)):
            assert distill_step(student, Teacher(other), *layers, examples, settings(skip_first=skip))["loss"] == 0
            assert optimizer.step(1.0) == 0
        assert all(torch.equal(p, before[n]) for n, p in student.named_parameters())


TRACES = [
    dict(prompt_ids=[5, 9, EOS, 7], init_ids=[8, 2, 11], phrase_ids=PHRASES[0], revision_ids=[8, 2, 12, EOS], reward=0, finished=True),
    dict(prompt_ids=[4], init_ids=[6, 13, 9, 22, 31, 8, 2], phrase_ids=PHRASES[1], revision_ids=[3], reward=1, finished=False),
    dict(prompt_ids=[7, 3, 3, 12, 4], init_ids=[], phrase_ids=PHRASES[0], revision_ids=[5, EOS], reward=0, finished=True),
]


@pytest.mark.parametrize("weights", [(1, 2), (1, 1), (0, 1)])
def test_srt_loss_equals_two_separate_losses(weights):
    """L_revision (1) and L_generation (2) by a forward a token each. Catches a mask off by one at either border, a lost EOS, a wrong divisor."""
    model = tiny("qwen3")
    revision, generation = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for t in TRACES:
        context = t["prompt_ids"] + t["init_ids"] + t["phrase_ids"]
        for i, token in enumerate(t["revision_ids"]):
            revision = revision - logprobs_after(model, context + t["revision_ids"][:i])[token]
        written = t["init_ids"] + t["phrase_ids"] + t["revision_ids"]
        for i, token in enumerate(written):
            generation = generation - logprobs_after(model, t["prompt_ids"] + written[:i])[token]
    expected = {(1, 2): revision + generation, (1, 1): generation, (0, 1): revision}[weights]
    nll, weight = srt_loss(model, OutputLayer(model, VOCAB), TRACES, weights, divisor=1)
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
        assert_same_gradients(gradients(model), wanted)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_padding_is_not_seen(family):
    model = tiny(family)
    sequences = [[5, 9, 3, 7, 2, 8, 11, 4, 4, 9], [4], [6, 6, 13, 9]]
    tolerance = 1e-5 if model.config._attn_implementation == "eager" else 1e-9
    with torch.no_grad():
        for row, ids in zip(hidden_states(model, sequences), sequences):
            alone = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
            torch.testing.assert_close(row[: len(ids)], alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize("budget", [64, 10_000])
@pytest.mark.parametrize("seed", range(6))
def test_micro_batches_against_all_cuts(seed, budget):
    """Every cut of the sorted lengths, by brute force: none with as many groups needs less padding; at least 90% of the positions are real."""
    lengths = torch.randint(1, 100, (9,), generator=torch.Generator().manual_seed(seed)).tolist()
    ordered, padding = sorted(lengths, reverse=True), {}
    for cut in itertools.product([False, True], repeat=8):
        edges = [0, *(i + 1 for i in range(8) if cut[i]), 9]
        parts = [ordered[a:b] for a, b in zip(edges, edges[1:])]
        if all(len(part) == 1 or len(part) * part[0] <= budget for part in parts):
            k = len(parts)
            padding[k] = min(padding.get(k, math.inf), sum(len(part) * part[0] for part in parts) - sum(lengths))
    groups = micro_batches(lengths, budget)
    assert sorted(i for g in groups for i in g) == list(range(9))
    assert all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= budget for g in groups)
    padded, k = sum(len(g) * max(lengths[i] for i in g) for g in groups), len(groups)
    assert padded - sum(lengths) == padding[k] and sum(lengths) >= 0.9 * padded
def test_micro_batches_of_a_large_step():
    lengths = (torch.empty(500).geometric_(1 / 300, generator=torch.Generator().manual_seed(0)) + 40).int().tolist()
    groups = micro_batches(lengths, 16384)
    assert sorted(i for g in groups for i in g) == list(range(500)) and len(groups) < 18  # filling them one by one takes 20
    assert sum(lengths) >= 0.9 * sum(len(g) * max(lengths[i] for i in g) for g in groups)
    lengths = [253, 187, 147, 109, 105, 90, 89, 62]
    assert [[lengths[i] for i in g] for g in micro_batches(lengths, 16384)] == [[253], [187, 147], [109, 105], [90, 89, 62]]
    assert micro_batches([], 64) == []


def test_gradient_checkpointing_changes_nothing():
    model, results = tiny("llama").train(), []
    for on in (False, True):
        if on:
            checkpoint_layers(model)
        model.zero_grad()
        srt_step(model, OutputLayer(model, VOCAB), TRACES, (1, 2), 10_000)
        results.append(gradients(model))
    assert_same_gradients(*results, tolerance=0)


def train_steps(model, make, steps=50):
    torch.manual_seed(0)
    optimizer = make(model)
    for _ in range(steps):
        srt_step(model, OutputLayer(model, VOCAB), TRACES, (1, 2), 10_000)
        optimizer(model)
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def test_bf16_weights_move_as_fp32_ones_do():
    """METHOD.md: at lr 5e-6 plain bf16 AdamW moves nothing, since an update is below half of a weight's last bit."""
    flags = argparse.Namespace(lr=5e-6, betas=(0.9, 0.999), weight_decay=0.0, clip=1e9)

    def ours(model):
        optimizer = Optimizer(model, flags)
        return lambda m: optimizer.step(5e-6)

    def plain(model):
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-6, weight_decay=0.0)

        def step(m):
            optimizer.step()
            optimizer.zero_grad()

        return step

    start16, start32 = tiny("llama", dtype=torch.bfloat16), tiny("llama", dtype=torch.bfloat16).float()
    begin = torch.cat([p.detach().double().flatten() for p in start32.parameters()])
    moved32 = train_steps(start32, ours) - begin
    plain16 = train_steps(tiny("llama", dtype=torch.bfloat16), plain) - begin
    optimizers = []

    def keep(model):
        optimizers.append(Optimizer(model, flags))
        return lambda m: optimizers[0].step(5e-6)

    moved16 = train_steps(start16, keep) - begin
    masters = torch.cat([join(w, low).double().flatten() for w, low, _ in optimizers[0].narrow]) - begin
    assert torch.nn.functional.cosine_similarity(masters, moved32, 0) > 0.9  # the gradients are bf16's, hence not 1
    assert masters.norm() / moved32.norm() == pytest.approx(1, abs=0.1)
    big = begin.abs() > 0.01  # half of the last bit is at least 2e-5 there: four plain steps of 5e-6 are lost, every one of them
    assert plain16[big].abs().max() == 0
    assert moved16[big].abs().max() > 0 and torch.nn.functional.cosine_similarity(moved16, moved32, 0) > 0.1


def test_optimizer_equals_plain_adamw_in_fp32_with_clipping_and_groups():
    ours, reference = tiny("llama", dtype=torch.float32), tiny("llama", dtype=torch.float32)
    optimizer = Optimizer(ours, argparse.Namespace(lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, clip=0.5))
    matrices, rest = [p for p in reference.parameters() if p.dim() > 1], [p for p in reference.parameters() if p.dim() == 1]
    adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.95))
    for lr in (1e-3, 5e-4, 2e-3):
        for model in (ours, reference):
            srt_step(model, OutputLayer(model, VOCAB), TRACES, (1, 2), 10_000)
        norm = torch.sqrt(sum((p.grad**2).sum() for p in reference.parameters()))
        assert norm > 0.5
        for p in reference.parameters():
            p.grad *= 0.5 / (norm + 1e-6)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        adamw.zero_grad()
        assert optimizer.step(lr) == pytest.approx(norm.item(), rel=1e-5)
    for a, b in zip(ours.parameters(), reference.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_halves_of_a_weight_are_exact():
    """All ties and their neighbours, both signs, zeros, subnormals; a bf16 weight is one of the two nearest."""
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0))
    bits = torch.cat([bits, bits >> 16 << 16, (bits >> 16 << 16) + 0x8000, (bits >> 16 << 16) + 0x7FFF, torch.arange(9)]).to(torch.int32)
    values = bits.view(torch.float32)
    values = values[values.abs() < 1e38]
    weight, low = split(values)
    assert torch.equal(join(weight, low).view(torch.int32), values.view(torch.int32))
    assert ((weight.float() - values).abs() <= (values.bfloat16().float() - values).abs()).all()


def test_bf16_optimizer_equals_one_that_keeps_whole_masters():
    model, masters = tiny("llama", dtype=torch.bfloat16), tiny("llama", dtype=torch.bfloat16).float()
    flags = argparse.Namespace(lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0)
    optimizer, reference = Optimizer(model, flags), Optimizer(masters, flags)
    for step in range(1, 6):
        srt_step(model, OutputLayer(model, VOCAB), TRACES, (1, 2), 10_000)
        for weight, master in zip(model.parameters(), masters.parameters()):
            master.grad = weight.grad.clone()
        assert optimizer.step(1e-4 * step) == reference.step(1e-4 * step)
        for (weight, low, _), master in zip(optimizer.narrow, masters.parameters(), strict=True):
            assert torch.equal(join(weight, low), master) and torch.equal(weight, split(master)[0])


def test_micro_batch_gradients_are_summed_in_fp32():
    """In bf16 256 + 1 is 256: seven gradients of 1 after one of 256 would leave no trace."""
    model = torch.nn.Linear(1, 1, bias=False).bfloat16()
    optimizer = Optimizer(model, argparse.Namespace(lr=1.0, betas=(0.9, 0.95), weight_decay=0.0, clip=1e9))
    for scale in (256, *[1] * 7):
        (model.weight * scale).sum().backward()
    assert optimizer.step(0.0) == pytest.approx(263)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched():
    model = tiny("llama", dtype=torch.float32)
    optimizer = Optimizer(model, argparse.Namespace(lr=1.0, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0))
    before = [p.clone() for p in model.parameters()]
    next(model.parameters()).grad = torch.full_like(before[0], math.nan)
    with pytest.raises(Stopped, match="not finite"):
        optimizer.step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


def test_learning_rates():
    cosine = argparse.Namespace(lr=2.0, warmup=0.05, lr_schedule="cosine")
    rates = [learning_rate(cosine, s, 100) for s in range(1, 101)]
    assert rates[:6] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0, 2.0])
    assert rates[5 + 95 // 2 + 1] == pytest.approx(1.0, abs=0.03) and 0 < rates[-1] < 0.002 and rates[5:] == sorted(rates[5:], reverse=True)
    constant = argparse.Namespace(lr=2.0, warmup=20, lr_schedule="constant")
    assert [learning_rate(constant, s, 40) for s in (1, 10, 20, 21, 40)] == pytest.approx([0.1, 1.0, 2.0, 2.0, 2.0])


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_kept_bytes_are_those_of_all_saved_tensors(family):
    """Against all saved tensors of one forward pass, weights left out; what it says of 60 tokens it says of 24."""
    model, seen = tiny(family, dtype=torch.float32), {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = hidden_states(model, [[0] * 60])
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    total = sum(size for address, size in seen.items() if address not in weights)
    assert kept_bytes(model, 60) == pytest.approx(total / len(hidden[0]), rel=0.05)
    assert kept_bytes(model, 60) == pytest.approx(kept_bytes(model, 24), rel=0.05)


def test_the_memory_report(capsys):
    """Weights, masters, moments, gradients, teacher and cache by hand, in both precisions; and the advice where it does not fit."""
    args = argparse.Namespace(max_new_tokens=20, batch_size=2, micro_tokens=10_000, slots=3, gradient_checkpointing=False, phrase_wrong="")
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        model = tiny("qwen3", dtype=dtype)
        lm, count = LM(model, None, {EOS}, VOCAB, 64), sum(p.numel() for p in model.parameters())
        lm.phrase_ids = lambda text: [7, 8]
        parts = report_memory(lm, args, [Problem("", None, [5, 9, 3])], "ema")
        config = model.config
        assert parts["weights"] == size * count and parts["gradients"] == 4 * count
        assert parts["optimizer"] == (8 if size == 4 else 10) * count and parts["teacher"] == (4 if size == 4 else 6) * count
        assert parts["cache"] == 3 * (3 + 20) * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size
        assert parts["activations"] == pytest.approx(2 * 23 * kept_bytes(model, 64), rel=0.05)  # two students' x + y
        assert report_memory(lm, args, [Problem("", None, [5, 9, 3])])["teacher"] == 0
    assert "training" in capsys.readouterr().out
    args.slots = 10**12
    report_memory(lm, args, [Problem("", None, [5, 9, 3])])
    captured = capsys.readouterr()
    assert "lower --slots" in captured.err and "--micro-tokens" not in captured.err
