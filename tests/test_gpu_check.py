"""The GPU's path, as far as a CPU shows it: gpu_check.py, compiled losses, memory, --resume."""

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
from types import SimpleNamespace

import memory_table
import pytest
import torch
from test_scripts import save_model
from test_training import Live
from tiny import make_tokenizer, tiny
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

import common
import losses
import sdzero
import srt
from losses import OutputLayer, backward_by_chunks, hidden_states, predicting_last
from rollout import LEVELS, Decoder, Rollout, generate, prefill, sample, side_by_side, uniforms
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
    assert finished == {str(part) for part in range(9)}
    assert "| sampling, Qwen3-0.6B" in (tmp_path / "rows.md").read_text()


def flags(*given):
    nothing = ["--model", "-", "--dataset", "-", "--output", "/nothing/is/here"]
    return sdzero.parse_arguments([*nothing, *given])


def by_chunks(loss, rows, against=True, vocab_size=37, compiled=False):
    """Columns and gradients of `rows` tokens in chunks of 4, of a layer with rows beyond V."""
    student, other = tiny("llama", dtype=torch.float32), tiny("llama", 40, 1, torch.float32)
    generator = torch.Generator().manual_seed(rows)
    hidden, teacher_hidden = torch.randn(2, rows, 32, generator=generator)
    hidden.requires_grad_()
    tensors = [torch.randint(36, (rows,), generator=generator)]
    tensors.append(torch.randn(rows, generator=generator))
    teacher = (OutputLayer(other.requires_grad_(False), vocab_size), teacher_hidden)
    columns = backward_by_chunks(
        loss,
        OutputLayer(student, vocab_size),
        hidden * 1,
        *tensors,
        divisor=rows,
        teacher=teacher if against else None,
        size=4,
        compiled=compiled,
    )
    return columns, hidden.grad, student.get_output_embeddings().weight.grad


@pytest.fixture
def compiles_anew():
    """Nothing that was compiled before is used, nor afterwards what is compiled here."""

    def forget():
        torch._dynamo.reset()
        losses.compiled_chunk_backward.cache_clear()

    forget()
    yield
    forget()


@pytest.mark.parametrize(
    "given",
    [
        (),
        ("--objective", "topk_logits", "--topk", "8", "--importance-cap", "2"),
        ("--objective", "sampled_token", "--temperature", "0.7"),
    ],
)
def test_compiled_losses_are_captured_whole_and_once(given, compiles_anew, monkeypatch):
    """As `distill` compiles them, without Inductor: the loss is a new closure in every micro-batch,
    which must not compile again; a graph break or a lost gradient shows, too."""
    compile = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile)
    counters.clear()
    for rows in (9, 7, 8, 0):  # chunks of 4, 4, 1; 4, 3; 4, 4; none
        got = by_chunks(sdzero.make_loss(flags(*given)), rows, compiled=True)
        expected = by_chunks(sdzero.make_loss(flags(*given)), rows)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert counters["stats"]["unique_graphs"] == 2  # any number of rows, and one row
    by_chunks(sdzero.make_loss(flags(*given)), 8, vocab_size=36, compiled=True)
    assert counters["stats"]["unique_graphs"] == 3  # for one vocabulary


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
def test_losses_compiled_by_inductor(compiles_anew):
    """The real backend. Where the gradient took the place of the logits, torch 2.11 computed the
    log ratio from what was overwritten."""

    def nll(logits, token_ids, weight):
        nll = -srt.token_logprobs(logits, token_ids)
        return torch.stack([weight * nll, nll], dim=-1)

    for loss, against in ((nll, False), (sdzero.make_loss(flags()), True)):
        got = by_chunks(loss, 8, against, compiled=True)
        torch.testing.assert_close(got, by_chunks(loss, 8, against), rtol=1e-5, atol=1e-6)


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


def test_the_tables_of_memory_are_what_the_estimate_says(capsys, monkeypatch):
    """In memory_table.py's docstring and in the README."""
    monkeypatch.setattr(sys, "argv", ["memory_table.py"])
    memory_table.main()
    cells = [line.replace(" ", "") for line in capsys.readouterr().out.splitlines()]
    documented = memory_table.__doc__.replace(" ", "")
    assert len(cells) == 3 and all(line in documented for line in cells)
    most = [max(float(line.split("|")[i]) for i in (2, 4)) for line in cells]
    readme = (SCRIPT.parents[1] / "README.md").read_text()
    assert "takes {}, {} and {} GB at most".format(*most) in " ".join(readme.split())


class Flash(torch.autograd.Function):
    """What flash attention keeps: queries, keys, values, the result. Nothing is computed."""

    @staticmethod
    def forward(context, query, key, value):
        result = torch.empty_like(query)
        context.save_for_backward(query, key, value, result)
        return result

    @staticmethod
    def backward(context, gradient):
        return tuple(map(torch.empty_like, context.saved_tensors[:3]))


@pytest.mark.parametrize("name", memory_table.SHAPES)
def test_activations_of_the_readmes_models(name, monkeypatch):
    """The estimate against every tensor of a forward and backward pass over one trace of stage 1,
    with checkpointing, on the meta device, where nothing is allocated: at most 10% too much."""

    def attention(module, query, key, value, *rest, **settings):
        return Flash.apply(query, key, value).transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, "stub", attention)
    lm = memory_table.on_meta(name)
    parts, _ = memory_table.estimate(lm, srt)
    lm.model.set_attn_implementation("stub")
    common.checkpoint_layers(lm.model.train())
    for p in lm.model.parameters():
        p.grad = torch.empty_like(p)
    length = 512 + 2 * 16384 + len(memory_table.PHRASE)
    with Live([x for p in lm.model.parameters() for x in (p, p.grad)]) as live:
        hidden_states(lm.model, [[3] * length]).sum().backward()
    assert 0.9 < live.peak / parts["activations"] < 1, live.peak / parts["activations"]


def test_the_optimizer_takes_the_largest_weight_last():
    """The temporary copies of the embedding take 20 bytes for each of its weights, and come when
    the gradients of all others are gone, 4 bytes for each of theirs."""
    model = tiny("qwen3", vocab_size=400, dtype=torch.bfloat16)
    optimizer, embedding = common.Optimizer(model), 400 * 32

    def step():
        for weight in optimizer.weights:
            weight.grad = torch.ones_like(weight, dtype=torch.float32)
        gradients = live.now
        optimizer.step(1e-3)
        return gradients

    with Live() as live:
        step()  # from here on AdamW's moments are there
    moments = [x for state in optimizer.adamw.state.values() for x in state.values()]
    low = [low for _, low, _ in optimizer.narrow]
    with Live([*model.parameters(), *moments, *low]) as live:
        gradients = step()
    others = sum(weight.numel() for weight in optimizer.weights) - embedding
    assert live.peak - gradients < 20 * embedding - 4 * others


# ------------------------------------ branches for a GPU, with tensors that claim to be on one


class OnCUDA(torch.Tensor):
    is_cuda = True


def on_cuda(tensor):
    return tensor.detach().as_subclass(OnCUDA).requires_grad_(tensor.requires_grad)


@pytest.fixture
def as_before(monkeypatch):
    """What `prepare_torch` changes in the process."""
    enabled = torch.backends.cuda.cudnn_sdp_enabled()
    sdpa = common.sdpa_attention.sdpa_attention_forward
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", sdpa)
    with torch._dynamo.config.patch(suppress_errors=False, disable=False):
        yield
    torch.backends.cuda.enable_cudnn_sdp(enabled)


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_a_model_on_a_gpu(has_bfloat16, as_before, tmp_path, monkeypatch, capsys):
    """float32 where the card has no bfloat16, with a warning, as of a transformers that copies
    heads; and no cuDNN attention, in training either. Here nothing can be compiled for it."""
    save_model(tmp_path / "model", family="qwen3")
    empty, ones = torch.empty, torch.ones
    monkeypatch.setattr(torch, "empty", lambda *sizes, device=None, **more: empty(*sizes, **more))
    monkeypatch.setattr(torch, "ones", lambda *sizes, device=None, **more: ones(*sizes, **more))
    monkeypatch.setattr(torch, "compile", lambda function: lambda tensor: 1 / 0)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *device: module)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bfloat16)
    monkeypatch.delattr(common.sdpa_attention, "pack_gqa", raising=False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    graphs = "on" if has_bfloat16 else "off"
    model = "--model", str(tmp_path / "model")
    args = flags(*model, "--device", "cuda", "--cuda-graphs", graphs)
    common.inherit_prompt(args)
    lm = common.load_lm(args)
    mlps = (layer.mlp for layer in lm.model.model.layers)
    packed = {side_by_side([mlp.gate_proj.weight, mlp.up_proj.weight]) for mlp in mlps}
    assert packed == {graphs == "on"}
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch._dynamo.config.suppress_errors and torch._dynamo.config.disable
    assert lm.model.dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)
    errors = capsys.readouterr().err
    assert "nothing is compiled here" in errors and "division by zero" in errors
    assert ("no bfloat16" in errors) != has_bfloat16 and "for every query head" in errors


def test_compiled_layers_leave_attention_out(as_before, monkeypatch):
    """transformers copies the cache for every query head where its attention is compiled."""
    compiled, attention = [], common.sdpa_attention.sdpa_attention_forward

    def watched(*tensors, **settings):
        compiled.append(torch.compiler.is_compiling())
        return attention(*tensors, **settings)

    monkeypatch.setattr(common.sdpa_attention, "sdpa_attention_forward", watched)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    common.prepare_torch("cpu", compiles=True)
    torch._dynamo.config.suppress_errors = False
    model = tiny("qwen3")
    settings = dict(max_new_tokens=5, eos_token_ids=[], seed=0)
    expected = generate(model, [[3, 4], [5]], **settings)
    compiled.clear()
    got = generate(model, [[3, 4], [5]], compile_layers=True, **settings)
    assert [r.ids for r in got] == [r.ids for r in expected]
    assert len(compiled) >= 3 * 5 and not any(compiled)
    torch._dynamo.reset()


def test_both_stages_compile_their_losses_on_a_gpu(monkeypatch):
    """And only there: on a CPU it does not pay."""
    model, seen = tiny("llama", dtype=torch.float32), []

    def watched(*rest, compiled, **settings):
        seen.append(compiled)
        return backward_by_chunks(*rest, **settings)

    for script in (srt, sdzero):
        monkeypatch.setattr(script, "backward_by_chunks", watched)
    layer, teacher = OutputLayer(model), Teacher(model)
    trace = srt.Trace("", "", 0, "", "", "", True, [5], [6, 7], [8], [9, 1])
    example = sdzero.Example([5, 6], Rollout([7, 1], [-1.0, -1.0], True), 1, [8])
    for wrap, expected in ((lambda x: x, [False] * 2), (on_cuda, [True] * 2)):
        seen.clear()
        for script in (srt, sdzero):
            rows = partial(lambda *rest, wrap: wrap(predicting_last(*rest)), wrap=wrap)
            monkeypatch.setattr(script, "predicting_last", rows)
        srt.srt_loss(model, layer, [trace], (1, 2), 1)
        sdzero.distill(model, teacher, layer, layer, [example], flags(), 1)
        assert seen == expected


def test_all_rows_of_the_output_layer_on_a_gpu(monkeypatch):
    """What test_losses.py sets by hand."""
    model = tiny("llama", dtype=torch.float32)
    assert OutputLayer(model, 37).rows == 37
    model.lm_head.weight = torch.nn.Parameter(on_cuda(model.lm_head.weight))
    assert OutputLayer(model, 37).rows == 40


def test_random_numbers_of_an_apple_gpu(monkeypatch):
    """24 bits in fp32, as there is no float64; the same for the same seed and position."""
    arange, seeds = (
        torch.arange,
        torch.arange(50_000).as_subclass(
            type("OnMPS", (torch.Tensor,), {"device": SimpleNamespace(type="mps")})
        ),
    )
    monkeypatch.setattr(torch, "arange", lambda *bounds, device: arange(*bounds))
    u = uniforms(seeds, arange(50_000) % 7).as_subclass(torch.Tensor)
    assert u.dtype == torch.float32 and u.shape == (50_000, LEVELS)
    assert 0 <= u.min() < 1e-4 and 1 - 1e-4 < u.max() < 1 and (u * 2**24 % 1 == 0).all()
    assert torch.allclose(u.mean(0), torch.full((3,), 0.5), atol=0.01)
    assert torch.allclose(u.var(0), torch.full((3,), 1 / 12), atol=0.003)


def test_memory_may_grow_in_segments():
    """Before torch's first allocation on a GPU, and not against what the user has set."""
    code = "import os, torch; torch.version.cuda = '13.0'; import common; "
    code += "print(os.environ['PYTORCH_ALLOC_CONF'])"
    env = {name: value for name, value in os.environ.items() if name != "PYTORCH_ALLOC_CONF"}
    own = "max_split_size_mb:64"
    for given, expected in (({}, "expandable_segments:True"), ({"PYTORCH_ALLOC_CONF": own}, own)):
        run = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**env, **given},
            cwd=SCRIPT.parents[1],
        )
        assert run.stdout.strip() == expected, run.stderr


# ---------------------------------------------------------------------- what a step costs, counted


class Operations(TorchDispatchMode):
    """Names of the operations that are kernels, with the number of elements that each makes."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and function is not torch.ops.aten._unsafe_view.default:
            sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            writes = function._schema.is_mutable
            self.made.append((function.name(), 0 if writes else max(sizes, default=0)))
        return result


@pytest.mark.skipif(not hasattr(common.sdpa_attention, "pack_gqa"), reason="transformers < 5.23")
def test_a_decode_step_copies_no_cache():
    """56 kernels a layer of Qwen3's, none of which makes anything of the size of its cache."""
    counts = []
    for layers in (2, 3):
        model = tiny(
            "qwen3", dtype=torch.bfloat16, num_hidden_layers=layers, max_position_embeddings=512
        )
        with torch.no_grad():
            decoder = Decoder(model, prefill(model, [(0, 0)]), 4, 512, 511, [1], sample)
            with Operations() as operations:
                decoder.step(4, 512)
        counts.append(len(operations.made))
        largest = max(size for name, size in operations.made)
        assert largest < decoder.cache.layers[0].numel() / 8, operations.made
    assert counts[1] - counts[0] <= 58, counts


def test_a_loss_makes_few_passes_over_the_logits():
    """(4) with all that is logged: one log-softmax for each side, and no more large tensors than
    22, forward and backward, of which a compiler makes a few kernels."""
    logits, teacher = torch.randn(2, 8, 1000)
    ids = torch.arange(8)
    with Operations() as operations:
        columns = sdzero.make_loss(flags())(logits.requires_grad_(), teacher, ids, ids.float())
        columns[:, 0].sum().backward()
    large = [name for name, size in operations.made if size >= logits.numel()]
    assert large.count("aten::_log_softmax") == 2 and len(large) <= 22, large
