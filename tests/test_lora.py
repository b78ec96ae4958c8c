"""lora.py against plain matrices, against full fine-tuning, and through the scripts."""

import argparse
import copy
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_training import (
    EXAMPLES,
    VOCAB,
    Live,
    as_lm,
    bytes_of,
    gradients,
    memory_flags,
    settings,
)
from tiny import make_tokenizer, tiny
from transformers import AutoModelForCausalLM

import common
import sdzero
import srt
from common import Optimizer, checkpoint_layers, estimate_memory
from lora import (
    LoraLinear,
    LoraTeacher,
    adapter_config,
    adapter_state,
    add_lora,
    load_adapter,
    lora_layers,
    merged_state_dict,
    round_at_random,
)
from losses import OutputLayer, hidden_states
from rollout import FAMILIES, generate
from sdzero import distill_step
from teacher import Teacher

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import baselines

IDS = torch.tensor([[5, 9, 3, 7, 2, 8, 11]])
REFUSED = {"gpt2": "Conv1D", "mixtral": "Mixtral", "olmoe": "Olmoe", "qwen2_moe": "Qwen2Moe"}
REFUSED["qwen3_moe"] = "Qwen3Moe"
RANK, ALPHA = 3, 5
SCALE = ALPHA / RANK


def adapted(family="llama", seed=0, factors=0, **more):
    """A tiny model with adapters. B is random as well (a start at 0 would hide faults); `factors`:
    another seed for A and B, with the same frozen weights."""
    model = tiny(family, seed=seed, **more)
    add_lora(model, RANK, ALPHA, seed=factors)
    generator = torch.Generator().manual_seed(factors + 100)
    for layer in lora_layers(model).values():
        layer.lora_B.data.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    return model


def merged(model, family="llama", **more):
    """A plain model of the family with W + SCALE x B A, by a loop over the names."""
    plain = tiny(family, **more)
    weights = dict(plain.named_parameters())
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(own[name])
            layer, _, kind = name.rpartition(".")
            if kind == "weight" and f"{layer}.lora_A" in own:
                A, B = own[f"{layer}.lora_A"], own[f"{layer}.lora_B"]
                for i in range(len(weight)):
                    weight[i] += SCALE * sum(B[i, r] * A[r] for r in range(RANK))
    return plain


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits


# -------------------------------------------------------------------------------------- the layer


@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_and_its_gradients_are_plain_matrices(bias):
    """Catches a wrong scale, A and B exchanged, a lost bias, a gradient of the frozen weight."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 4, bias, dtype=torch.float64).requires_grad_(False)
    layer = LoraLinear(linear, RANK, ALPHA, torch.Generator().manual_seed(0))
    layer.lora_B.data.normal_()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    G = torch.randn(2, 3, 4, dtype=torch.float64)
    W, A, B = layer.weight, layer.lora_A.detach(), layer.lora_B.detach()
    y = layer(x)
    y.backward(G)
    rows, G = x.detach().flatten(0, 1), G.flatten(0, 1)
    expected = rows @ (W + SCALE * B @ A).T + (linear.bias if bias else 0)
    torch.testing.assert_close(y.flatten(0, 1), expected)
    full = G.T @ rows  # the gradient of W, if it had one
    torch.testing.assert_close(layer.lora_A.grad, SCALE * B.T @ full)
    torch.testing.assert_close(layer.lora_B.grad, SCALE * full @ A.T)
    torch.testing.assert_close(x.grad.flatten(0, 1), G @ (W + SCALE * B @ A))
    assert layer.weight is linear.weight and layer.weight.grad is None


def test_the_start():
    """B is 0, so the model is what it was; A is Gaussian with variance 1 / (3 x in), the same for
    the same seed; nothing else is trained, and the output layer has no adapter."""
    model, before = tiny("qwen2", dtype=torch.bfloat16), tiny("qwen2", dtype=torch.bfloat16)
    add_lora(model, 200, 400, seed=3)
    assert torch.equal(logits(model), logits(before))
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, _ in before.named_parameters()}
    layers = lora_layers(model)
    assert len(layers) == 3 * 7 and type(model.lm_head) is torch.nn.Linear
    for name, layer in layers.items():
        A, B = layer.lora_A, layer.lora_B
        assert A.dtype == B.dtype == torch.float32 and not B.any(), name
        assert A.std().item() == pytest.approx((3 * layer.in_features) ** -0.5, rel=0.05)
        assert A.shape == (200, layer.in_features) and B.shape == (layer.out_features, 200)
        assert (A.abs() > 2 * A.std()).float().mean().item() == pytest.approx(0.0455, abs=0.01)
    assert len({layer.lora_A[0, 0].item() for layer in layers.values()}) == len(layers)
    again, other = tiny("qwen2"), tiny("qwen2")
    add_lora(again, 200, 400, seed=3)
    add_lora(other, 200, 400, seed=4)
    for name, A in adapter_state(again).items():
        assert torch.equal(A.float(), adapter_state(model)[name])
        assert ("lora_B" in name) == torch.equal(A, adapter_state(other)[name])


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family_equals_its_merged_model_or_is_refused(family):
    """The adapted model, the plain one with W + s B A, and `merged_state_dict` compute the same. A
    family that keeps matrices elsewhere is refused by name, and nothing of it is changed."""
    plain = tiny(family)
    if family in REFUSED:
        with pytest.raises(ValueError, match=f"{family}.*{REFUSED[family]}"):
            add_lora(plain, RANK, ALPHA)
        assert not lora_layers(plain) and all(p.requires_grad for p in plain.parameters())
        return
    model = adapted(family)
    expected = logits(merged(model, family))
    assert (expected - logits(plain)).abs().max() > 0.01
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    state = merged_state_dict(model)
    assert state.keys() == plain.state_dict().keys()
    plain.load_state_dict(state)
    torch.testing.assert_close(logits(plain), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)  # not merged itself


def test_sampling_is_that_of_the_merged_model():
    model, samples = adapted(), []
    for m in (model, merged(model), tiny("llama")):
        prompts = [[5, 9, 3], [7], [2, 8, 11, 4]]
        found = generate(m, prompts, max_new_tokens=20, eos_token_ids=1, slots=2, seed=0)
        samples.append([y.ids for y in found])
    assert samples[0] == samples[1] != samples[2]


def test_one_step_of_sgd_equals_full_fine_tuning():
    """With B = 0 the gradient of A is 0 and that of B is s G A^T, so that one step of plain SGD
    moves W by - lr s^2 G A^T A. That is full fine-tuning's - lr G at full rank, where the columns
    of A are orthonormal and s is 1; for any other A it is the same step seen through A^T A."""
    rank, lr = 48, 0.1  # the largest input of a tiny model's layers
    full = tiny("llama")
    full(input_ids=IDS).logits.square().mean().backward()
    for orthonormal in (True, False):
        model, scale = tiny("llama"), 1 if orthonormal else 2
        add_lora(model, rank, scale * rank)
        for layer in lora_layers(model).values() if orthonormal else ():
            square = torch.randn(rank, rank, dtype=torch.float64)
            layer.lora_A.data.copy_(torch.linalg.qr(square).Q[:, : layer.in_features])
        model(input_ids=IDS).logits.square().mean().backward()
        factors = [p for p in model.parameters() if p.requires_grad]
        torch.optim.SGD(factors, lr=lr).step()
        state = merged_state_dict(model)
        for name, layer in lora_layers(model).items():
            before = full.get_submodule(name).weight
            A, step = layer.lora_A.detach(), lr * before.grad
            assert step.abs().max() > 1e-7 and not layer.lora_A.grad.any()
            expected = before - (step if orthonormal else scale**2 * step @ A.T @ A)
            torch.testing.assert_close(state[f"{name}.weight"], expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_gradient_checkpointing_trains_the_same(dtype):
    """The inputs of the first layer need no gradient, since the embeddings are frozen: with the old
    kind of checkpointing nothing in it would be trained, without a word."""
    model, found = adapted(dtype=dtype).train(), []
    for on in (False, True):
        if on:
            checkpoint_layers(model)
        model.zero_grad()
        model(input_ids=IDS).logits.square().mean().backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys() and len(found[0]) == 2 * 3 * 7
    for name, gradient in found[0].items():
        assert gradient.any() and torch.equal(gradient, found[1][name]), name


# ------------------------------------------------------------------------------------ the teacher


def averaged(a, b, rate):
    """A model whose factors are (1 - rate) a + rate b."""
    model = copy.deepcopy(a)
    mixed = {n: (1 - rate) * x + rate * adapter_state(b)[n] for n, x in adapter_state(a).items()}
    load_adapter(model, mixed)
    return model


def test_a_copied_model_uses_its_own_factors():
    model = adapted()
    twin = copy.deepcopy(model)
    for tensor in adapter_state(twin).values():
        tensor.zero_()
    assert torch.equal(logits(twin), logits(tiny("llama")))
    assert not torch.equal(logits(model), logits(twin))


def test_replaced_factors_are_used():
    """load_state_dict(assign=True) and an assignment put other tensors into the layers: the forward
    pass must multiply with those, as must the teacher `live`."""
    model, state = adapted(), adapted(factors=1).state_dict()
    model.load_state_dict(state, assign=True)
    expected = logits(adapted(factors=1))
    assert torch.equal(logits(model), expected)
    layer = model.model.layers[0].mlp.up_proj
    layer.lora_A = torch.nn.Parameter(2 * layer.lora_A)
    assert not torch.equal(logits(model), expected)
    with LoraTeacher(model, "live").scoring() as module:
        torch.testing.assert_close(module(input_ids=IDS).logits, logits(merged(model)))


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
def test_stage_2_with_adapters_equals_plain_models(kind):
    """Student and teacher as two plain models with merged weights: the same losses, and gradients
    that follow from theirs: s B^T G for A, s G A^T for B. Catches a teacher that sees the student's
    adapter, a student that is scored with the teacher's, and a backward pass after a switch."""
    start, student = adapted(), adapted(factors=1)
    trained = adapter_state(student)
    load_adapter(student, adapter_state(start))
    teacher = LoraTeacher(student, kind, rate=0.3)
    load_adapter(student, {n: x.clone() for n, x in trained.items()})
    load_adapter(student, adapter_state(adapted(factors=1)))
    teacher.update(1)
    plain = merged(student)
    other = {"base": tiny("llama"), "live": plain, "ema": merged(averaged(start, student, 0.3))}
    layers = OutputLayer(student, VOCAB), OutputLayer(teacher.module, VOCAB)
    expected = distill_step(
        plain, Teacher(other[kind]), OutputLayer(plain, VOCAB), layers[1], EXAMPLES, settings()
    )
    assert expected["kl"] > 0.001
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_layers(student.train())
        student.zero_grad()
        found = distill_step(student, teacher, *layers, EXAMPLES, settings(micro_tokens=40))
        assert found["loss"] == pytest.approx(expected["loss"], abs=1e-8)
        assert found["entropy"] == pytest.approx(expected["entropy"], abs=1e-8)
        own = gradients(student)
        assert len(own) == 2 * len(lora_layers(student))
        for name, layer in lora_layers(student).items():
            G = plain.get_submodule(name).weight.grad
            A, B = layer.lora_A.detach(), layer.lora_B.detach()
            close = dict(rtol=0, atol=1e-6)
            torch.testing.assert_close(own[f"{name}.lora_A"], SCALE * B.T @ G, **close)
            torch.testing.assert_close(own[f"{name}.lora_B"], SCALE * G @ A.T, **close)


@pytest.mark.parametrize("kind", ["base", "live", "ema"])
def test_switching_is_undone(kind):
    """After the block, after an exception in it, and one block inside another; modes, too."""
    student = adapted(factors=1)
    teacher = LoraTeacher(student, kind)
    load_adapter(student, adapter_state(adapted(factors=2)))
    by_kind = {"base": tiny("llama"), "live": adapted(factors=2), "ema": adapted(factors=1)}
    expected, own = logits(by_kind[kind]), logits(adapted(factors=2))
    student.train()
    student.model.layers[0].eval()
    modes = [m.training for m in student.modules()]
    for _ in range(2):
        with teacher.scoring() as module:
            assert not any(m.training for m in module.modules())
            scores = module(input_ids=IDS).logits
            with pytest.raises(RuntimeError, match="memory"), teacher.scoring():
                raise RuntimeError("out of memory")
            assert torch.equal(module(input_ids=IDS).logits, scores)
        assert torch.equal(scores, expected) and not scores.requires_grad
        assert torch.equal(logits(student), own) and torch.is_grad_enabled()
        assert [m.training for m in student.modules()] == modes
    with pytest.raises(RuntimeError, match="memory"), teacher.scoring():
        raise RuntimeError("out of memory")
    assert torch.equal(logits(student), own)
    assert [m.training for m in student.modules()] == modes


def train(model, steps, teacher=None):
    """Optimizer steps, numbered from 1, on the model's trainable parameters."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, steps + 1):
        model(input_ids=IDS).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if teacher:
            teacher.update(step)
        yield step


@pytest.mark.parametrize("rate, interval", [(0.05, 1), (1.0, 1), (0.3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_ema_equals_a_loop(rate, interval, dtype):
    """Catches a start at zero, a swapped rate, wrong steps, factors exchanged, an average in bf16
    or one that shares memory with the student."""
    student = adapted(dtype=dtype)
    teacher = LoraTeacher(student, "ema", rate, interval)
    expected = {n: x.double() for n, x in adapter_state(student).items()}
    for step in train(student, 7, teacher):
        for name, x in adapter_state(student).items() if step % interval == 0 else ():
            expected[name] = (1 - rate) * expected[name] + rate * x.double()
        for name, x in teacher.state_dict().items():
            assert x.dtype == torch.float32
            torch.testing.assert_close(x.double(), expected[name], rtol=1e-6, atol=1e-6)


def test_a_restored_teacher_goes_on_as_if_never_stopped():
    student = adapted(dtype=torch.bfloat16)
    first = LoraTeacher(student, "ema", rate=0.02)
    list(train(student, 3, first))
    second = LoraTeacher(student, "ema", rate=0.02)
    state = {n: x.clone() for n, x in first.state_dict().items()}
    second.load_state_dict(state)
    for step in (4, 5):
        for name, x in first.average.items():
            assert torch.equal(second.average[name], x)
        first.update(step)
        second.update(step)
    assert any(not torch.equal(state[n], x) for n, x in second.average.items())  # by value
    name = next(iter(state))
    for wrong in ({}, {**state, "more": state[name]}, {**state, name: state[name][:1]}):
        with pytest.raises(ValueError, match="does not match"):
            second.load_state_dict(wrong)
    base = LoraTeacher(student)
    assert base.state_dict() == {}
    base.load_state_dict({})


def test_wrong_settings_raise():
    student = adapted()
    for wrong in ({"kind": "frozen"}, {"rate": 0.0}, {"rate": 1.5}, {"interval": 0}):
        with pytest.raises(ValueError, match="teacher"):
            LoraTeacher(student, **{"kind": "ema", **wrong})
    with pytest.raises(ValueError, match="LoraLinear"):
        add_lora(student, RANK, ALPHA)
    plain = tiny("llama")
    for rank, alpha in ((0, 1), (-1, 1), (1, 0), (1, -1.0), (1, math.nan)):
        with pytest.raises(ValueError, match="rank >= 1 and alpha > 0"):
            add_lora(plain, rank, alpha)
    assert all(p.requires_grad for p in plain.parameters())
    for kind in ("base", "live", "ema"):
        with pytest.raises(ValueError, match="add_lora first"):
            LoraTeacher(plain, kind)
    with pytest.raises(ValueError, match="add_lora first"):
        adapter_config(plain, "some/model")


# ----------------------------------------------------------------------------------------- saving


def test_rounding_at_random_is_right_on_average():
    """Both neighbours in the right shares, whatever the sign; what bf16 can hold stays."""
    low = torch.tensor([1.0, -1.0, 3e-3, -250.0]).bfloat16().float()
    high = (low.view(torch.int32) + 0x10000).view(torch.float32)  # the next one, away from 0
    for part in (0.0, 0.05, 0.5, 0.9):
        x = (low + part * (high - low)).repeat(20_000, 1)
        rounded = round_at_random(x, torch.Generator().manual_seed(0)).float()
        assert ((rounded == low) | (rounded == high)).all()
        shares = (rounded == high).float().mean(0)
        torch.testing.assert_close(shares, torch.full((4,), part), rtol=0, atol=0.015)
        assert part or torch.equal(rounded, low.repeat(20_000, 1))


def test_merging_into_bf16_keeps_small_updates():
    """An update of a hundredth of the last bit: rounding to nearest loses all of it; ours keeps
    what it adds up to along the direction that the adapter reads."""
    model = tiny("llama", dtype=torch.bfloat16)
    add_lora(model, 1, 1)
    layer, other = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.gate_proj
    for linear in (layer, other):
        linear.weight.data.fill_(1.0)
        linear.lora_A.data.fill_(1.0)
        linear.lora_B.data.fill_(2**-7 / 100)  # the last bit of 1.0 is 2^-7
    before = {n: x.clone() for n, x in model.state_dict().items()}
    assert torch.equal((layer.weight + layer.lora_B @ layer.lora_A).bfloat16(), layer.weight)
    state = merged_state_dict(model)
    moved = (state["model.layers.0.mlp.up_proj.weight"].float() - 1).mean().item()
    sigma = math.sqrt(0.01 * 0.99 / layer.weight.numel()) * 2**-7
    assert moved == pytest.approx(2**-7 / 100, abs=4 * sigma) and moved > 2**-7 / 300
    up, gate = (state[f"model.layers.0.mlp.{name}_proj.weight"] for name in ("up", "gate"))
    assert not torch.equal(up, gate)  # each layer has random numbers of its own
    again = merged_state_dict(model)
    for name, x in before.items():
        assert torch.equal(model.state_dict()[name], x)  # never merged in place
        if name in state:
            assert state[name].dtype == x.dtype and torch.equal(state[name], again[name])


def test_the_files_of_peft():
    """The names as peft 0.21 reads them; the output layer is not among the modules."""
    model = adapted(dtype=torch.bfloat16)
    config = adapter_config(model, "some/model")
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    assert (config["r"], config["lora_alpha"], config["bias"]) == (RANK, ALPHA, "none")
    state = adapter_state(model)
    layer = model.model.layers[1].self_attn.k_proj
    name = "base_model.model.model.layers.1.self_attn.k_proj.lora_{}.weight"
    assert torch.equal(state[name.format("A")], layer.lora_A)
    assert torch.equal(state[name.format("B")], layer.lora_B)
    assert len(state) == 2 * 3 * 7 and not any(x.requires_grad for x in state.values())


def test_wrapped_models_have_the_same_files():
    """Files with `module.` or `_orig_mod.` in their names load nowhere, or without a word."""
    import torch.distributed as dist

    model = adapted()
    state, plain = adapter_state(model), merged_state_dict(model)
    config = adapter_config(model, "some/model")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        for wrapped in (torch.compile(model), parallel, torch.compile(parallel)):
            assert adapter_state(wrapped).keys() == state.keys()
            found = merged_state_dict(wrapped)
            assert found.keys() == plain.keys()
            assert all(torch.equal(found[name], plain[name]) for name in plain)
            assert adapter_config(wrapped, "some/model") == config
            LoraTeacher(wrapped, "ema").load_state_dict(state)
    finally:
        dist.destroy_process_group()


# --------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_estimate_of_what_stays_is_what_is_allocated(dtype):
    """Weights, gradients, optimizer, teachers, byte by byte."""
    model = adapted(dtype=dtype)
    optimizer, lm = Optimizer(model), as_lm(model)
    model(input_ids=IDS).logits.square().mean().backward()
    parts = estimate_memory(lm, memory_flags(), 3)
    assert parts["weights"] == bytes_of(model.parameters())
    assert parts["gradients"] == bytes_of(p.grad for p in model.parameters() if p.requires_grad)
    optimizer.step(1e-3)
    kept = [low for _, low, _ in optimizer.narrow]
    for state in optimizer.adamw.state.values():
        kept += [state["exp_avg"], state["exp_avg_sq"]]
    assert parts["optimizer"] == bytes_of(kept)
    for kind in ("base", "live", "ema"):
        own = LoraTeacher(model, kind).average.values()
        assert estimate_memory(lm, memory_flags(teacher=kind), 3)["teacher"] == bytes_of(own), kind


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_stay_below_the_estimate(dtype, checkpointing):
    """The adapters' own ones fit into what the estimate allows for a frozen layer."""
    rows, length = 4, 128  # x 40, y 88
    sizes = dict(hidden_size=64, intermediate_size=192, head_dim=8, num_hidden_layers=6)
    model = tiny("qwen3", dtype=dtype, max_position_embeddings=length, **sizes).train()
    add_lora(model, 2, 4)
    args = memory_flags(max_new_tokens=88, batch_size=rows, gradient_checkpointing=checkpointing)
    if checkpointing:
        checkpoint_layers(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    known = [*model.parameters(), *(p.grad for p in model.parameters() if p.requires_grad)]
    with Live(known) as live:
        hidden_states(model, [[3] * length] * rows).sum().backward()
    estimate = estimate_memory(as_lm(model, length), args, 40)["activations"]
    assert 0.6 * estimate < live.peak < estimate, live.peak / estimate


# -------------------------------------------------------------------------------------- scripts


FLAGS = [
    *("--verifier", "tiny:odd", "--eval-problems", "4", "--eval-samples", "2", "--eval-every", "3"),
    *("--save-every", "2", "--max-new-tokens", "8", "--slots", "4", "--device", "cpu"),
    *("--lora", "4", "--lora-alpha", "6", "--lr", "1e-2"),
]
EMA = ["--teacher", "ema", "--teacher-rate", "0.6", "--teacher-interval", "2"]
STAGES = {
    "srt": (srt, ["--batch-size", "4", "--epochs", "2", "--problems", "16"]),
    "sdzero": (sdzero, ["--batch-size", "4", "--warmup", "2", *EMA]),
}


def call(name, model, data, out, *flags):
    script, own = STAGES[name]
    flags = ["--model", model, "--dataset", data, "--output", out, *FLAGS, *own, *flags]
    script.main([str(flag) for flag in flags])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, and problems."""
    folder, tokenizer = tmp_path_factory.mktemp("lora"), make_tokenizer()
    sizes = dict(vocab_size=len(tokenizer) + 3, eos_token_id=0, max_position_embeddings=256)
    for family in ("llama", "gpt2"):
        model = tiny(family, dtype=torch.float32, **sizes, **{"n_positions": 256})
        model.save_pretrained(folder / family)
        tokenizer.save_pretrained(folder / family)
    rows = [{"problem": f"{i} + {i + 1} = ?", "answer": str(2 * i + 1)} for i in range(44)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def runs(request, files, tmp_path_factory):
    """Both stages, uninterrupted; what each checkpoint held, by name."""
    out, model, data = tmp_path_factory.mktemp("runs"), files / "llama", files / "data.jsonl"
    for name in STAGES:
        call(name, model, data, out / name, "--dtype", request.param)
        model = out / name
    return argparse.Namespace(out=out, dtype=request.param)


def test_both_stages_save_merged_models_and_adapters(runs, files):
    """The folder loads as the base did and equals base and adapter together; in bf16 each weight
    is one of the two neighbours. Stage 2's adapter belongs to stage 1's merged model."""
    before, factors = files / "llama", []
    for name in STAGES:
        folder, dtype = runs.out / name, getattr(torch, runs.dtype)
        assert (folder / "config.json").exists() and not (folder / "adapter_config.json").exists()
        config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(before)
        assert (config["r"], config["lora_alpha"]) == (4, 6)  # of FLAGS
        base = AutoModelForCausalLM.from_pretrained(before, dtype=dtype)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.dtype == dtype and not lora_layers(model)
        frozen = {n: x.clone() for n, x in base.state_dict().items()}
        add_lora(base, config["r"], config["lora_alpha"])
        load_adapter(base, load_file(folder / "adapter" / "adapter_model.safetensors"))
        moved = 0
        for n, x in merged_state_dict(base).items():
            assert torch.equal(model.state_dict()[n], x), n
            moved += not torch.equal(x, frozen[n])
        assert moved == 3 * 7
        before = folder
        first = next(n for n in load_file(folder / common.ADAPTER) if n.endswith("lora_A.weight"))
        factors.append(load_file(folder / common.ADAPTER)[first])
        steps = [json.loads(line) for line in open(folder / "metrics.jsonl")]
        steps = [line for line in steps if line["kind"] == "train"]
        assert len(steps) > 4 and all(math.isfinite(line["grad_norm"]) for line in steps)
    one, two = (x.flatten() / x.norm() for x in factors)
    assert abs(one @ two) < 0.5  # stage 2 does not begin with the A that stage 1 began with


def test_the_factors_depend_on_the_seed(files, tmp_path):
    first = []
    for seed in ("0", "1", "1"):
        flags = ["--model", files / "llama", "--dataset", files / "data.jsonl", *FLAGS]
        flags += ["--output", tmp_path / "out", "--seed", seed]
        task = common.setup(srt.parse_arguments([str(flag) for flag in flags]))
        first.append(next(iter(lora_layers(task.lm.model).values())).lora_A)
    assert not torch.equal(first[0], first[1]) and torch.equal(first[1], first[2])


def recorded(monkeypatch, script):
    """(kind, rate, interval) of every LoraTeacher that the script makes."""
    made = []

    def make_teacher(*arguments):
        teacher = LoraTeacher(*arguments)
        made.append((teacher.kind, teacher.rate, teacher.interval))
        return teacher

    monkeypatch.setattr(script, "LoraTeacher", make_teacher)
    return made


class Killed(BaseException):
    pass


@pytest.mark.parametrize("name", STAGES)
def test_a_killed_run_goes_on_bit_for_bit(name, runs, files, tmp_path, monkeypatch):
    """Killed after step 5 of a run that saves at 2 and 4. The checkpoint holds adapters, optimizer
    and teacher, but no model; best/ is a merged model. Catches flags of the teacher that do not
    reach it, too."""
    model = files / "llama" if name == "srt" else runs.out / "srt"
    arguments = (name, model, files / "data.jsonl", tmp_path / "out", "--dtype", runs.dtype)
    log = common.Run.log

    def log_until_killed(run, kind, step, values):
        if (kind, step) == ("train", 5):
            raise Killed
        log(run, kind, step, values)

    monkeypatch.setattr(common.Run, "log", log_until_killed)
    monkeypatch.setattr(sdzero, "Teacher", None)  # which would copy the whole model
    teachers = recorded(monkeypatch, sdzero)
    with pytest.raises(Killed):
        call(*arguments)
    monkeypatch.undo()
    assert teachers == ([("ema", 0.6, 2)] if name == "sdzero" else [])
    checkpoint = tmp_path / "out" / "checkpoint-4"
    assert (checkpoint / "adapter" / "adapter_model.safetensors").exists()
    assert not (checkpoint / "model.safetensors").exists()
    assert not lora_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "best"))
    call(*arguments, "--resume")
    for file in ("model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "out" / file).read_bytes() == (runs.out / name / file).read_bytes()
    logs = []
    for folder in (tmp_path / "out", runs.out / name):
        lines = [json.loads(line) for line in open(folder / "metrics.jsonl")]
        for line in lines:
            line.pop("seconds", None)
            line.pop("tokens_per_s", None)
        logs.append(lines)
    assert logs[0] == logs[1]


@pytest.mark.parametrize("method", ["rft", "grpo", "sdft"])
def test_the_baselines_with_adapters(method, files, tmp_path, monkeypatch):
    """They run to the end, and every adapted matrix of what they save has moved; the teacher is a
    moving average."""
    monkeypatch.setattr(baselines, "Teacher", None)  # which would copy the whole model
    teachers = recorded(monkeypatch, baselines)
    flags = ["--method", method, "--model", files / "llama", "--dataset", files / "data.jsonl"]
    flags += [*FLAGS, "--batch-size", "8", "--output", tmp_path / "out"]
    baselines.main([str(flag) for flag in flags])
    assert teachers == ([("ema", 0.05, 1)] if method == "sdft" else [])
    base = AutoModelForCausalLM.from_pretrained(files / "llama").state_dict()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    moved = [n for n, x in model.state_dict().items() if not torch.equal(x, base[n])]
    assert len(moved) == 3 * 7 and (tmp_path / "out" / "adapter").is_dir()


def test_flags(files, tmp_path, capsys):
    """The learning rate's default, said; alpha's; what contradicts; a family that is refused."""
    needed = ["--model", "m", "--dataset", "d", "--output", str(tmp_path / "new")]
    for script in (srt, sdzero):
        args = script.parse_arguments([*needed, "--lora", "16"])
        assert args.lora_alpha == 32 and args.lr == pytest.approx(5e-5)
        assert "5e-05: for --lora ten times" in capsys.readouterr().out
        args = script.parse_arguments([*needed, "--lora", "16", "--lr", "1e-3"])
        assert args.lr == 1e-3 and "times" not in capsys.readouterr().out
        assert script.parse_arguments(needed).lr == 5e-6
        with pytest.raises(SystemExit):
            script.parse_arguments([*needed, "--lora-alpha", "16"])
        assert "--lora-alpha belongs to --lora" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        call("srt", files / "gpt2", files / "data.jsonl", tmp_path / "new")
    assert "gpt2" in (error := capsys.readouterr().err) and "Conv1D" in error
    assert not (tmp_path / "new").exists()
