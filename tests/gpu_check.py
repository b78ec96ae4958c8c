"""Everything that has to be seen on a GPU once: is it right, how fast is it, what does it take?

    python tests/gpu_check.py --output checks             all parts: 14 minutes on an H100
    python tests/gpu_check.py --output checks --only 1    one part, or several: --only 1 4
    python tests/gpu_check.py --output checks --smoke     tiny, on a CPU: figures mean nothing

Where a command may take 10 minutes, it is two on one warm machine, with an --output for each:

    --only 0 1 2 3 4 5 --minutes 9.5        --only 0 8 6 7 --minutes 9

It needs torch >= 2.11 (CUDA), transformers >= 5.17 and this repository; neither data nor a hub.
The parts, the most useful first, with minutes on an H100. (Compiling the first loss took 50 to 70 s
of parts 1, 5 and 8 there, in each process; layers 17. The minutes of part 7 are an estimate: it
failed after the rows below, because it sampled ids that the loss leaves out, mended since. So
are 1.5 minutes of part 1, for what it compares since then.)

    0  0.1  ceilings    copy bandwidth and bf16 matrix products: all shares are shares of these
    1  6.1  right       the families' greedy tokens against the CPU in float64, eagerly, by CUDA
                        graphs and compiled; log-probabilities; the distribution and the random
                        numbers of replayed graphs; losses, gradients and optimizer against the CPU;
                        both scripts, killed and resumed
    2  0.1  products    of the output layer, with the odd number of ids and with all rows
    3  0.1  attention   of one decode step: cuDNN's kernel and torch's, what a new length costs
    4  0.6  decode      Qwen3-4B's step: eagerly, by graph, compiled, packed; kernels by time
    5  1.5  loss        by chunks: objectives, sizes of chunks; as it is, compiled, whole logits
    8  1    fit         Qwen3-4B with its teacher, 4,096 tokens: peak memory, slots beside it
    6  2    training    Qwen3-1.7B: a step of each stage, its kernels by time, the optimizer, memory
                        against the estimate; whether compiling its layers would pay (an estimate)
    7  3    sampling    Qwen3-0.6B: tokens/s and a whole stage-2 step, ours and transformers'

Results are written as they come: all of them to gpu_check.jsonl, rows for the README to rows.md.
A part starts only while its minutes fit into --minutes; one that fails says so, and the rest goes
on, after a CUDA error in a new process. The exit code is 1 if something failed or was wrong.

One H100 80GB, torch 2.11.0+cu130, seed 0, examples/results/gpu_check_h100.jsonl. Everything of part
1 was right, for mixtures of experts without graphs; so were log-probabilities of four layers of
Qwen3-0.6B in bf16, and test_rollout.py, test_losses.py and test_teacher.py passed there.

The ceilings: copying 3.03 TB/s, products 787 TFLOP/s. Random weights of the models' shapes, bf16.

    decode step of Qwen3-4B, ms (transformers 5.24, 2026-11-27)
    slots x tokens   eagerly   by graph   compiled   of copying alone
    16 x 2,048          61.0        9.6        6.6                64%
    16 x 4,096          57.5       11.3        8.6                68%
    64 x 2,048          43.1       16.1       12.4                73%
    64 x 4,096          60.9       22.6       19.0                81%

    Eager steps wait for the host, whose processor was slower than the day before (31.9 and 28.2 ms
    for the first and the last row). Then, with torch's own attention, graphs took 10.9 and 25.6 ms,
    and with transformers 5.17, which copies the cache for every query head, 39.9 and 255.8.

    A step launches 779 kernels compiled, 2,219 as it is: 18 and 58 for each of 36 layers, and 131
    others. Compiling took 17 s, once for all layers and shapes. The first row compiled: products
    3.7 ms, attention 2.0, all else 0.9. The logits of four layers are 1.61% away from float64;
    compiled, attention included, 1.37%.

    Since then weights are packed, and drawing is compiled. Not run, but read in Inductor's code for
    an H100 (torch 2.11 and 2.14, from tensors without a GPU): 12 launches a layer instead of 16, to
    which cuBLAS adds two sums of split products, and 10 for drawing instead of 52. By the kernels'
    times q, k and v took 22 us a layer, and their 31 MB in one product should take 14, at the speed
    of products of that size: 0.3 ms less a step.

    attention of one layer, ms       cuDNN   torch's own
    16 rows x 2,048 tokens           0.064         0.095
    16 rows x 4,096                  0.106         0.180
    64 rows x 2,048                  0.203         0.251
    64 rows x 4,096                  0.384         0.489

    cuDNN plans for each shape not seen before: 41 to 46 ms here (medians; at worst 115), the day
    before, at lengths that were no multiples of 64, 483 with 16 rows and 47 with 64. For the few
    shapes of graphs it is on, elsewhere the scripts switch it off. Two batched products with a
    softmax between them take 0.081, 0.133, 0.249 and 0.476 ms.

    sampling from Qwen3-0.6B, 256 responses of at most 256 tokens, 64 slots, tokens/s
                                                          2026-11-27  2026-11-26
    eagerly                                                    1,094       1,449
    by graphs, torch's own attention                    3,069, 3,091       4,392
    by graphs, cuDNN's attention                        3,374, 3,640
    by graphs, compiled, torch's own attention          4,227, 4,592
    transformers 5.17: generate, ours eagerly, by graphs              295, 713, 2,209

    losses and steps, 2026-11-26 with transformers 5.17 (*: 27)     time         peak memory
    full_logits, both layers, 8,192 x 2,560 x 151,669              66 ms (49% of products)    2.6 GB
    the same with whole logits, half of the tokens                 53 ms                     14.9 GB
    full_logits, 8,192 x 4,096 x 128,256, 8 chunks of 2^26 *       72 ms (61%)                2.7 GB
    the same, 4 chunks of 2^26 *                                   72 ms (61%)                1.6 GB
    the same, 2 chunks of 2^26 *                                   77 ms (57%)                1.1 GB
    the same, 1 chunk of 2^28 *                                    69 ms (63%)                2.8 GB
    stage 2, Qwen3-1.7B, 16 responses, 20,544 tokens               3.9 s (13%)  35.2 (estimate 38.4)
    stage 1, Qwen3-1.7B, 4 traces, 22,340 tokens                   2.0 s                4.1 GB more
    stage 2, Qwen3-4B, a response of 4,096 tokens                  1.0 s        77.0 (estimate 77.3)

The losses of the 26th ran in blocks of 8 chunks of 2^26 logits, the steps in 32 of 2^24; all of
them compiled apart from their gradients, which took 32 bytes for each pair of logits, with the copy
of the gradient. Compiled with its gradient (not run, read as above) full_logits is one kernel,
takes 14 bytes and two thirds of the instructions. The default is 4 chunks of 2^26 now.
"""

import argparse
import contextlib
import gc
import json
import math
import os
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import torch
import torch.nn.functional as F
import transformers
from tiny import make_tokenizer, tiny
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations import sdpa_attention

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import losses
import rollout
import sdzero
import srt
from losses import CHUNK, OutputLayer, backward_by_chunks
from rollout import Rollout
from sdzero import Example, distill_step
from teacher import Teacher

parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
)
parser.add_argument("--output", type=Path, default=Path(os.environ.get("OUT", "checks")))
parser.add_argument("--smoke", action="store_true")
parser.add_argument("--only", nargs="*", type=int)
parser.add_argument("--minutes", type=float, default=15)
parser.add_argument("--began", type=float, help=argparse.SUPPRESS)  # after a CUDA error: the first
parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)  # process's, and its
OPTIONS = parser.parse_args()  # checks that are over

BIG = not OPTIONS.smoke  # the sizes, and all that only CUDA has
DEVICE = "cuda" if BIG else "cpu"
BEGAN = OPTIONS.began or time.time()
GB = 1e9
HALF = torch.bfloat16
OPTIONS.output.mkdir(parents=True, exist_ok=True)
MODE = "a" if OPTIONS.skip else "w"
RESULTS = open(OPTIONS.output / "gpu_check.jsonl", MODE)
ROWS = open(OPTIONS.output / "rows.md", MODE)
PEAK = {"copy": 3.0e12, "product": 7.5e14}  # bytes/s, FLOP/s: guesses until `ceilings` has run
WRONG = []  # names of what failed


# --------------------------------------------------------------------------------------- measuring


def say(name: str, **values) -> None:
    """One result, written at once. A value `right` says whether it is as it must be."""
    if not values.get("right", True):
        WRONG.append(name)
    seconds = round(time.time() - BEGAN, 1)
    RESULTS.write(json.dumps({"seconds": seconds, "name": name, **values}) + "\n")
    RESULTS.flush()
    figures = []
    for key, value in values.items():
        figures.append(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}")
    print(f"[{seconds:5.1f}] {name}: {', '.join(figures)}", flush=True)


def row(what: str, figure: str) -> None:
    """A row of the README's table, written at once."""
    ROWS.write(f"| {what} | {figure} |\n")
    ROWS.flush()


def sync() -> None:
    if BIG:
        torch.cuda.synchronize()


def seconds_of(function) -> float:
    sync()
    start = time.perf_counter()
    function()
    sync()
    return time.perf_counter() - start


def ms(function, calls: int = 20) -> float:
    """The median milliseconds of a call on the GPU, after two that warm up. Where the GPU waits for
    the host, that counts."""
    if not BIG:
        return seconds_of(function) * 1e3
    function()
    function()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
    for before, after in events:
        before.record()
        function()
        after.record()
    sync()
    return statistics.median(before.elapsed_time(after) for before, after in events)


def seconds_and_peak(function) -> tuple[float, int]:
    """Seconds of a call, and its peak in bytes above what was allocated before."""
    if not BIG:
        return seconds_of(function), 0
    torch.cuda.reset_peak_memory_stats()
    start = torch.cuda.memory_allocated()
    took = seconds_of(function)
    return took, torch.cuda.max_memory_allocated() - start


def allocated() -> int:
    return torch.cuda.memory_allocated() if BIG else 0


def free() -> None:
    gc.collect()
    torch._dynamo.reset()  # a function that is compiled more than eight times is compiled no more
    if BIG:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextlib.contextmanager
def cudnn(on: bool):
    """cuDNN's attention allowed. Elsewhere it is off, as in the scripts."""
    torch.backends.cuda.enable_cudnn_sdp(on)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def prepare_strictly(prepare, *given, **settings):
    """torch would say why, go on without what it cannot compile, and all would be "right"."""
    prepare(*given, **settings)
    torch._dynamo.config.suppress_errors = False
    torch._dynamo.config.fail_on_recompile_limit_hit = True


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:160] if str(error) else ''}"


# ------------------------------------------------------------------------------------------ models


def shape(hidden, inner, layers, heads, vocab=151936):
    return dict(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8 if BIG else 2,
        head_dim=128 if BIG else 16,
        vocab_size=vocab if BIG else 2048,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


QWEN3 = {  # their shapes; the weights are random
    "0.6B": shape(1024, 3072, 28, 16) if BIG else shape(64, 96, 2, 8),
    "1.7B": shape(2048, 6144, 28, 16) if BIG else shape(64, 96, 2, 8),
    "4B": shape(2560, 9728, 36, 32) if BIG else shape(64, 96, 2, 8),
}
USED = 151669 if BIG else 2039  # ids of Qwen3's tokenizer, an odd number: what load_lm cuts to
PHRASE = list(range(5, 21))


def build(name: str, **changed):
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3", **{**QWEN3[name], **changed})
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=HALF).eval()


def flags(*given) -> argparse.Namespace:
    """sdzero.py's flags, with their defaults."""
    nowhere = Path(tempfile.gettempdir()) / "nothing is here"
    always = ["--model", "-", "--dataset", "-", "--output", nowhere, "--gradient-checkpointing"]
    return sdzero.parse_arguments([str(flag) for flag in (*always, *given)])


WAYS = {  # of sampling
    "eagerly": {},
    "by graphs": dict(cuda_graph=True),
    "by graphs, compiled, packed": dict(cuda_graph=True, compile_layers=True),
}


def sample(model, prompts, limits, slots, way, seed=1, **more) -> list[Rollout]:
    """Responses without an EOS. seed: None is torch's own generator."""
    if "packed" in way:
        rollout.pack_weights(model)
    settings = dict(eos_token_ids=[], slots=slots, seed=seed, **WAYS[way], **more)
    return rollout.generate(model, prompts, max_new_tokens=limits, **settings)


# -------------------------------------------------------------------------------------- 0 ceilings


def ceilings():
    n, m = (2**30, 8192) if BIG else (2**16, 64)
    a, b = torch.randn(2, n, device=DEVICE)
    PEAK["copy"] = 8 * n / ms(lambda: b.copy_(a), 10) * 1e3
    x, y = torch.randn(2, m, m, device=DEVICE).to(HALF)
    PEAK["product"] = 2 * m**3 / ms(lambda: x @ y, 10) * 1e3
    say("ceilings", copy_TB_per_s=PEAK["copy"] / 1e12, product_TFLOPs=PEAK["product"] / 1e12)
    if BIG:
        grows = any(segment.get("is_expandable") for segment in torch.cuda.memory_snapshot())
        cudnn = torch.backends.cudnn.version()
        say("memory", GB=torch.cuda.mem_get_info()[1] / GB, expandable=grows, cudnn=cudnn)


# ----------------------------------------------------------------------------------------- 1 right

PROMPTS = [[5, 9, 3, 7, 2, 8, 11], [4], [6, 6, 13, 9, 22, 31, 8, 2, 2, 17, 12], [7, 3], [9, 4, 21]]


def greedy_tokens():
    """Every family in float64, where no two logits are nearly equal, looking every fourth step."""
    good, bad = 0, {}
    settings = dict(max_new_tokens=14, eos_token_ids=[1, 2, 3, 14, 15], temperature=0, slots=4)
    for family in sorted(rollout.FAMILIES) if BIG else ["llama", "gemma3_text"]:
        model = tiny(family)
        expected = rollout.generate(model, PROMPTS * 2, **settings)
        model = model.to(DEVICE)
        # the tests' mixture-of-experts layers read on the host which experts are used
        moe = "moe" in family or family in ("mixtral", "olmoe")
        compiled = BIG and family in ("gemma3_text", "qwen3")  # some seconds for each
        for way in list(WAYS)[: 1 if moe else 2 + compiled]:
            if "packed" in way:
                rollout.pack_weights(model)
            got = rollout.generate(model, PROMPTS * 2, check_every=4, **WAYS[way], **settings)
            same = [r.ids for r in got] == [r.ids for r in expected]
            pairs = zip(
                (x for r in got for x in r.logprobs), (x for r in expected for x in r.logprobs)
            )
            if same and max(abs(x - y) for x, y in pairs) < 1e-4:
                good += 1
            else:
                bad[f"{family}, {way}"] = "tokens" if not same else "log-probabilities"
    say("right: greedy tokens of the families", good=good, bad=bad, right=not bad)


def experts_in_graphs():
    """transformers' own experts (grouped products) do not read on the host: can be captured."""
    aligned = dict(hidden_size=64, moe_intermediate_size=64, head_dim=16)
    model = tiny("qwen3_moe", dtype=HALF, **aligned).to(DEVICE)
    if BIG:
        model.set_experts_implementation("grouped_mm")
    check_logprobs("qwen3_moe in bf16", model, PROMPTS * 2, "by graphs", 0.5)  # experts may change


def check_logprobs(name, model, prompts, way, tolerance):
    """Log-probabilities of sampled tokens against one full forward of each response."""
    worst = 0.0
    for prompt, response in zip(prompts, sample(model, prompts, 40, 4, way)):
        ids = torch.tensor([prompt + response.ids], device=DEVICE)
        with torch.no_grad():
            expected = losses.log_softmax(model(input_ids=ids).logits[0, len(prompt) - 1 : -1])
        expected = expected.gather(-1, ids[0, len(prompt) :, None])[:, 0].double().cpu()
        given = torch.tensor(response.logprobs, dtype=torch.float64)
        worst = max(worst, (expected - given).abs().max().item())
    say(f"right: log-probabilities, {name}, {way}", worst=worst, right=worst < tolerance)


def logprobs():
    exact, half = tiny("qwen3").to(DEVICE), build("0.6B", num_hidden_layers=4 if BIG else 2)
    with torch.no_grad():
        for p in half.parameters():
            if p.dim() > 1:
                p.normal_(std=p.shape[1] ** -0.5)  # distributions far from uniform
    longer = [[t % 37 for t in range(3, 3 + n)] for n in (5, 40, 17, 90, 3, 64, 21, 33)]
    for way in WAYS if BIG else list(WAYS)[:2]:  # on the CPU a test compiles
        check_logprobs("float64", exact, PROMPTS, way, 1e-5)
        check_logprobs("bf16, four layers of Qwen3-0.6B", half, longer, way, 0.2)


def distribution():
    """Tokens after the commonest beginning: a random state that graphs freeze or repeat shows."""
    model, n = tiny("llama").to(DEVICE), 8000 if BIG else 1000
    for temperature, top_p in ((1.0, 1.0), (1.3, 0.8)):
        settings = dict(temperature=temperature, top_p=top_p)
        way = list(WAYS)[-1 if BIG else 1]  # on a GPU drawing is compiled, too
        got = sample(model, [PROMPTS[0]] * n, 4, 500, way, **settings)
        for place in (0, 1, 3):
            begun = [tuple(r.ids[:place]) for r in got]
            commonest = max(set(begun), key=begun.count)
            tokens = [r.ids[place] for r, start in zip(got, begun) if start == commonest]
            ids = torch.tensor([PROMPTS[0] + list(commonest)], device=DEVICE)
            with torch.no_grad():
                p = (model(input_ids=ids).logits[0, -1] / temperature).softmax(-1).cpu()
            ordered, order = p.sort(descending=True)
            p[order[ordered.cumsum(0) - ordered >= top_p]] = 0
            expected = p / p.sum() * len(tokens)
            counts = torch.tensor(tokens).bincount(minlength=len(p))
            often = expected > 5
            chi2 = ((counts - expected)[often] ** 2 / expected[often]).sum().item()
            degrees = max(1, int(often.sum()) - 1)
            z = (chi2 - degrees) / (2 * degrees) ** 0.5
            what = f"right: distribution of token {place}, temperature {temperature}, top-p {top_p}"
            right = z < 4 and not counts[p == 0].any()
            say(what, chi_square_z=z, samples=len(tokens), right=bool(right))


@torch.inference_mode()
def random_numbers():
    """Replayed graphs and other slots must sample the same; without a seed each call is new. And
    compiled drawing, which rounds otherwise: one of 64 tokens may be another."""
    model = tiny("qwen3").to(DEVICE)

    def responses(seed, slots=6):
        return [r.ids for r in sample(model, PROMPTS * 3, 30, slots, "by graphs", seed)]

    def not_captured(fixed, n, length):
        return SimpleNamespace(replay=partial(fixed.step, n, length))

    values = dict(repeatable=responses(3) == responses(3))
    values["defaults_move"] = responses(None) != responses(None)
    values["slots_do_not_matter"] = responses(3, 4) == responses(3)
    replayed, capture = responses(3), rollout.FixedShapes.capture
    rollout.FixedShapes.capture = not_captured
    try:
        eagerly = responses(3)
    finally:
        rollout.FixedShapes.capture = capture
    values["graphs_equal_eager"] = replayed == eagerly
    say("right: random numbers", **values, right=all(values.values()))

    decoder, rows = full_decoder(model, 1, 64), torch.arange(64, device=DEVICE)
    seeds = torch.tensor(rollout.stream_seeds(1, 64), device=DEVICE)
    logits = 3 * torch.randn(64, QWEN3["4B"]["vocab_size"], device=DEVICE).to(HALF)
    drawn = []
    for compiled in (False, BIG):
        if compiled:
            decoder.compile()  # on the CPU tests compile
        u = decoder.uniforms(seeds, rows)
        drawn.append((u, *decoder.sampler(logits, u)))
    (u, ids, logprobs), (other_u, other_ids, other_logprobs) = drawn
    same = ids == other_ids
    values = dict(uniforms_equal=torch.equal(u, other_u), ids_equal=int(same.sum()))
    values["worst"] = (logprobs - other_logprobs)[same].abs().max().item()
    right = values["uniforms_equal"] and values["ids_equal"] >= 63 and values["worst"] < 1e-4
    say("right: compiled drawing", **values, right=right)


def loss_gradients():
    """Each loss by chunks, in fp32, bf16 and compiled, against the CPU in float64: what is logged,
    and the gradients. The last chunk has one row, for which the loss is compiled once more."""
    n, ids = (8 * 37 + 1, 4999) if BIG else (37 + 1, 197)
    config = dict(hidden_size=256 if BIG else 32, num_hidden_layers=1, vocab_size=ids + 6)
    hidden, teacher_hidden = torch.randn(2, n, config["hidden_size"], dtype=torch.float64)
    token_ids, old, weights = torch.randint(ids, (n,)), torch.randn(n), torch.randint(3, (n,))
    with patch.object(srt, "backward_by_chunks") as called:  # with stage 1's loss
        trace = srt.Trace("", "", 0, "", "", "", True, [5], [6], [7], [8])
        srt.srt_loss(tiny("llama"), None, [trace], (1, 2), 1)
    cases = {"stage 1": (called.call_args.args[0], weights)}
    for objective in ("full_logits", "topk_logits", "sampled_token", "mixed_kl"):
        cases[objective] = sdzero.make_loss(flags("--objective", objective)), old

    def results(name, device, dtype, compiled=False):
        student, teacher = (tiny("llama", seed=s, **config).to(device, dtype) for s in (0, 1))
        if dtype == HALF:
            student.get_output_embeddings().weight.grad_dtype = torch.float32
        teacher.requires_grad_(False)
        h, t = (x.detach().to(device, dtype, copy=True) for x in (hidden, teacher_hidden))
        h.requires_grad_()
        loss, more = cases[name]
        columns = backward_by_chunks(
            loss,
            OutputLayer(student, ids),
            h * 1,
            token_ids.to(device),
            more.to(device),
            divisor=n,
            teacher=None if name == "stage 1" else (OutputLayer(teacher, ids), t),
            size=37,
            compiled=compiled,
        )
        gradients = h.grad, student.get_output_embeddings().weight.grad
        return [x.double().cpu() for x in (*columns.unbind(-1), *gradients)]

    for name in cases:
        reference = results(name, "cpu", torch.float64)
        kinds = [(torch.float32, False, 1e-4), (HALF, False, 0.05)]
        if BIG and name in ("stage 1", "full_logits", "topk_logits"):
            kinds += [(torch.float32, True, 1e-4), (HALF, True, 0.05)]  # on the CPU a test compiles
        for dtype, compiled, tolerance in kinds:
            got = results(name, DEVICE, dtype, compiled)
            errors = torch.stack([(a - b).norm() / b.norm() for a, b in zip(got, reference)])
            values = dict(columns=errors[:-2].max().item(), gradients=errors[-2:].max().item())
            what = f"right: {name} by chunks, {str(dtype)[6:]}, compiled {compiled}"
            say(what, **values, right=bool((errors < tolerance).all()))
        free()  # its compiled kinds

    examples = [
        Example([5, 9, 1, 7], Rollout([8, 2, 11, 1], [-4.0] * 4, True), 0, [30, 31, 32, 30]),
        Example([4], Rollout([6, 13, 9, 22, 31, 8, 2], [-4.0] * 7, False), 1, [30, 33, 30]),
    ]
    whole = []
    for device in ("cpu", DEVICE):
        student, teacher = tiny("qwen3").to(device), Teacher(tiny("qwen3", seed=1).to(device))
        layers = OutputLayer(student, 37), OutputLayer(teacher.module, 37)
        distill_step(student, teacher, *layers, examples, flags("--micro-tokens", 40))
        whole.append(torch.cat([p.grad.cpu().flatten() for p in student.parameters()]))
    error = ((whole[0] - whole[1]).norm() / whole[0].norm()).item()
    say("right: stage-2 gradient in float64", relative_error=error, right=error < 1e-4)


def optimizer():
    """bf16 weights with split masters: as on the CPU, and as whole fp32 weights."""
    generator = torch.Generator().manual_seed(0)
    shapes = [p.shape for p in tiny("llama").parameters()]
    gradients = [[torch.randn(s, generator=generator) for s in shapes] for _ in range(5)]
    masters = []
    for device, dtype in (("cpu", HALF), (DEVICE, HALF), (DEVICE, torch.float32)):
        model = tiny("llama", dtype=HALF).to(device, dtype)
        opt = common.Optimizer(model, (0.9, 0.95), 0.1)
        for step, gradient in enumerate(gradients, 1):
            for p, g in zip(model.parameters(), gradient):
                p.grad = g.to(device, copy=True)
            opt.step(1e-4 * step)
        halves = {weight: low for weight, low, _ in opt.narrow}
        whole = [common.join(p, halves[p]) if p in halves else p for p in opt.weights]
        masters.append(torch.cat([p.detach().flatten() for p in whole]).cpu())
    cpu, gpu, plain = masters
    worst = (cpu - gpu).abs().max().item()
    values = dict(cpu_gpu_worst=worst, equals_whole_masters=torch.equal(gpu, plain))
    say("right: optimizer", **values, right=worst < 1e-6 and values["equals_whole_masters"])


def scripts():
    """Both stages of a tiny bf16 model by their own main; each again, broken off and resumed."""

    def broken(run, kind, step, values):
        log(run, kind, step, values)
        if (kind, step) == ("train", 3):  # the last checkpoint is of step 2
            raise KeyboardInterrupt

    grown = []

    def watched(run, **parts):
        gc.collect()
        before = allocated()
        step = restore(run, **parts)
        assert step == 2, step  # else it began anew
        gc.collect()
        weights = sum(p.numel() for p in run.task.lm.model.parameters())
        grown.append((allocated() - before) / weights)
        return step

    log, restore = common.Run.log, common.Run.restore
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = Path(name), make_tokenizer()
        settings = dict(vocab_size=len(tokenizer) + 3, eos_token_id=0, max_position_embeddings=256)
        model = tiny("qwen3", dtype=torch.float32, hidden_size=256 if BIG else 32, **settings)
        model.save_pretrained(folder / "base")
        tokenizer.save_pretrained(folder / "base")
        lines = [{"problem": f"{i} + {i} = ?", "answer": str(2 * i)} for i in range(48)]
        (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        always = f"--dataset {folder}/data.jsonl --verifier tiny:odd --eval-problems 4 "
        always += "--eval-samples 2 --eval-every 50 --save-every 2 --max-new-tokens 8 --lr 1e-3 "
        always += f"--device {DEVICE} --dtype bfloat16 --cuda-graphs {'on' if BIG else 'off'} "
        first = f"--model {folder}/base --batch-size 4 --epochs 1 --problems 16 "
        second = f"--model {folder}/srt --batch-size 2 --teacher ema --teacher-rate 0.3 "
        second += "--gradient-checkpointing "

        def call(script, flags):
            with open(os.devnull, "w") as null, contextlib.redirect_stdout(null):
                script.main((always + flags).split())

        try:
            for script, flags in ((srt, first), (sdzero, second)):
                name = script.__name__
                call(script, f"{flags} --output {folder}/{name}")
                common.Run.log = broken
                with contextlib.suppress(KeyboardInterrupt):
                    call(script, f"{flags} --output {folder}/{name}-parts")
                common.Run.log, common.Run.restore = log, watched
                call(script, f"{flags} --output {folder}/{name}-parts --resume")
                common.Run.restore = restore
        finally:
            common.Run.log, common.Run.restore = log, restore
        for name, added in zip(("srt", "sdzero"), grown, strict=True):
            flat, sampled = [], []
            for path in (folder / name, folder / f"{name}-parts"):
                model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
                flat.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
                logged = map(json.loads, open(path / "metrics.jsonl"))
                sampled.append([(x["length"], x["reward"]) for x in logged if x["kind"] == "train"])
            difference = flat[0] - flat[1]
            values = dict(worst=difference.abs().max().item(), bytes_added=added)
            values["rms"] = rms = difference.square().mean().sqrt().item()
            # One bf16 weight rounded otherwise may draw another token in stage 2, and all differs.
            steps = enumerate(zip(*sampled, strict=True), 1)
            values["sampled_otherwise_in_steps"] = [step for step, (a, b) in steps if a != b]
            # AdamW's moments are 8 bytes per weight, and all that a resumed run adds. On a GPU some
            # sums depend on the order of its threads, so that the weights may differ: in stage 1 by
            # an rms of 9e-5 where gradients are 0.1% off, by 7e-4 or more where a part of the
            # optimizer's state is lost (on a CPU).
            right = added < 9 and rms < 2e-4 if BIG else not rms
            say(f"right: {name}.py, killed and resumed", **values, right=right)


# -------------------------------------------------------------------------------------- 2 products


def products():
    """Rows of an odd number of logits keep Hopper from its fast kernels: how slow are they?"""
    n, width = (3520, QWEN3["4B"]["hidden_size"]) if BIG else (16, 64)
    every = QWEN3["4B"]["vocab_size"]
    weight, hidden = (torch.randn(k, width, device=DEVICE).to(HALF) for k in (every, n))
    for v in (USED, every):
        logits, part = torch.randn(n, v, device=DEVICE).to(HALF), weight[:v]
        total = torch.zeros(v, width, device=DEVICE)
        times = {
            "logits": ms(partial(torch.mm, hidden, part.T, out=logits)),
            "hidden_gradient": ms(partial(torch.mm, logits, part)),
        }
        if BIG:
            in_place = dict(out_dtype=torch.float32, out=total)
            add = partial(torch.addmm, total, logits.T, hidden, **in_place)
            times["weight_gradient"] = ms(add)
        share = 2 * n * v * width * len(times) / sum(times.values()) * 1e3 / PEAK["product"]
        say(f"products of the output layer, {n} x {v} x {width}, ms", **times, share=share)


# ------------------------------------------------------------------------------------- 3 attention


def decode_attention():
    """One layer's attention of a decode step, whose query heads that share a key head are packed:
    by cuDNN or by torch's own kernel? What does a shape cost that was not seen before?"""
    kv, size = (8, 128) if BIG else (2, 16)
    for n, length in ((16, 2048), (16, 4096), (64, 2048), (64, 4096)) if BIG else ((4, 64),):
        cached = torch.randn(n, 2, kv, length, size, device=DEVICE).to(HALF)
        q = torch.randn(n, kv, 4, size, device=DEVICE).to(HALF)

        def attend(rows, length, q=q, cached=cached):
            position = torch.linspace(length // 2, length - 1, rows, device=DEVICE).long()
            mask = rollout.attention_masks(SimpleNamespace(), position[:, None], length, HALF)
            k, v = cached[:rows, :, :, :length].unbind(1)
            return partial(F.scaled_dot_product_attention, q[:rows], k, v, attn_mask=mask)

        k, v, mask = *cached.double().unbind(1), attend(n, length).keywords["attn_mask"].double()
        expected = F.scaled_dot_product_attention(q.double(), k, v, attn_mask=mask)
        shapes = [(n, length * i // 8) for i in range(8, 0, -1)]
        for kernel in ("cudnn", "efficient") if BIG else ("CPU",):
            with cudnn(kernel == "cudnn"):
                first = [seconds_of(attend(*shape)) * 1e3 for shape in shapes]
                call = attend(n, length)
                error = ((call().double() - expected).norm() / expected.norm()).item()
                took = ms(call)
            speed = cached.numel() * HALF.itemsize / took / GB
            values = dict(ms=took, TB_per_s=speed, error=error, right=error < 0.01)
            values.update(new_shape_ms=statistics.median(first), worst_ms=max(first))
            say(f"attention, {n} rows x {length}, {kernel}", **values)
        del cached, q, k, v, expected, attend, call
        free()


# ---------------------------------------------------------------------------------------- 4 decode


def full_decoder(model, slots: int, length: int):
    """A decoder whose cache is full."""
    sampler = partial(rollout.sample, vocab_size=USED)
    with torch.inference_mode():
        like = rollout.prefill(model, [(0, 0)])
        decoder = rollout.Decoder(model, like, slots, length, length - 1, [1], sampler)
        for layer in decoder.cache.layers:
            layer.normal_()
        decoder.position.fill_(length - 2)
    return decoder


@torch.inference_mode()
def decode():
    """One step of Qwen3-4B with all slots at full length."""
    model = build("4B")
    rollout.pack_weights(model)
    sizes = ((16, 2048), (16, 4096), (64, 2048), (64, 4096)) if BIG else ((4, 64),)
    for size in sizes:
        decoder = full_decoder(model, *size)
        cached = sum(layer.numel() for layer in decoder.cache.layers)
        numbers = cached + sum(p.numel() for p in model.parameters())
        floor = numbers * HALF.itemsize / PEAK["copy"] * 1e3
        name = f"decode step of Qwen3-4B, {size[0]} slots x {size[1]:,} tokens"
        took = ms(partial(decoder.step, *size), 6)
        say(f"{name}, eagerly", ms=took, floor_ms=floor)
        figures = [f"{took:.1f} ms"]
        for way in ("as it is", "compiled", "compiled and packed") if BIG else ("packed",):
            with rollout.packed_products(model) if "packed" in way else contextlib.nullcontext():
                if way == "compiled":
                    decoder.compile()
                call = partial(rollout.FixedShapes(decoder), *size)
                values = dict(first_s=seconds_of(call), capture_s=seconds_of(call))
                took = ms(call, 12)
                values.update(ms=took, share_of_floor=floor / took)
                say(f"{name}, by graph, {way}", **values)
                figures.append(f"{took:.1f} ms")
                if size == sizes[0]:
                    kernels(f"{name}, {way}", partial(call.func.step, *size))
        end = f": {size[0] / took * 1e3:,.0f} tokens/s, {floor / took:.0%} of the copy bandwidth"
        row(f"{name}, eagerly, by graph, compiled, packed", ", ".join(figures) + end)
        del decoder, call
        gc.collect()


def kernels(name, step):
    """Where a step's time goes."""
    if not BIG:
        return
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        sync()
    found = [e for e in profile.key_averages() if e.self_device_time_total > 0]
    found.sort(key=lambda e: -e.self_device_time_total)
    top = [f"{e.key[:50]} x{e.count} {e.self_device_time_total / 1e3:.2f} ms" for e in found[:12]]
    total = sum(e.self_device_time_total for e in found) / 1e3
    say(f"kernels of {name}", count=sum(e.count for e in found), ms=total, top=top)


# ------------------------------------------------------------------------------------------ 5 loss


def loss():
    cases = [("8,192 x 4,096 x 128,256", 8192, dict(hidden_size=4096, vocab_size=128256), 128256)]
    cases += [("8,192 x 2,560 x 151,669", 8192, {}, USED)]
    for size, n, changed, ids in cases if BIG else [("tiny", 64, {}, USED)]:
        student, other = (build("4B", num_hidden_layers=1, **changed) for _ in range(2))
        student.get_output_embeddings().weight.grad_dtype = torch.float32
        layers = OutputLayer(student, ids), OutputLayer(other.requires_grad_(False), ids)
        width = student.config.hidden_size
        hidden, teacher_hidden = torch.randn(2, n, width, device=DEVICE).to(HALF)
        hidden.requires_grad_()
        tensors = torch.randint(ids, (n,), device=DEVICE), torch.zeros(n, device=DEVICE)
        call = partial(chunked, layers, hidden, teacher_hidden, tensors)
        full = partial(call, sdzero.make_loss(flags()))
        measure_loss("full_logits, not compiled", size, ids, full)
        if BIG:
            full = partial(full, compiled=True)
            for kind in (CHUNK["cuda"], (2**26, 2), (2**26, 8), (2**27, 8), (2**28, 4)):
                what = f"full_logits, chunks of 2^{int(math.log2(kind[0]))} x {kind[1]}"
                measure_loss(what, size, ids, full, kind)
            kernels(f"loss full_logits, {size}", full)
            for objective in ("topk_logits", "sampled_token"):
                function = sdzero.make_loss(flags("--objective", objective))
                measure_loss(objective, size, ids, partial(call, function, compiled=True))
        half = n // 2  # whole logits of all tokens do not fit

        def whole(h=hidden[:half], t=teacher_hidden[:half], layers=layers):
            with torch.no_grad():
                teacher_logits = layers[1](t)
            losses.full_logits(layers[0](h), teacher_logits).mean().backward()

        whole()
        took, memory = seconds_and_peak(whole)
        figure = f"{took * 1e3:.0f} ms, {memory / GB:.1f} GB"
        say(f"loss of {half} tokens with whole logits", ms=took * 1e3, GB=memory / GB)
        row(f"full_logits with whole logits, half of the tokens of {size}", figure)
        del student, other, layers, hidden, teacher_hidden, call, whole
        free()


def chunked(layers, hidden, teacher_hidden, tensors, function, **how):
    how.update(divisor=len(hidden), teacher=(layers[1], teacher_hidden))
    backward_by_chunks(function, layers[0], hidden * 1, *tensors, **how)


def measure_loss(what, size, ids, call, chunk=None):
    standard = CHUNK["cuda"]
    CHUNK["cuda"] = chunk or standard
    try:
        call()  # compiles
        took, memory = seconds_and_peak(call)
        took = ms(call, 5) / 1e3
    finally:
        CHUNK["cuda"] = standard
    share = 8 * call.args[1].numel() * ids / took / PEAK["product"]
    say(f"loss {what}, {size}", ms=took * 1e3, GB=memory / GB, share_of_products=share)
    row(f"loss {what}, {size}", f"{took * 1e3:.0f} ms, {memory / GB:.1f} GB")


# -------------------------------------------------------------------------------------- 6 training


def responses(count: int, longest: int, prompt: int = 128) -> list[Example]:
    """Responses whose lengths are quantiles of a geometric distribution; the last is `longest`."""
    examples = []
    generator = torch.Generator().manual_seed(0)
    for i in range(count):
        n = math.log1p(-(i + 0.5) / count) / math.log(0.5 / count) * longest
        ids = torch.randint(1, USED, (prompt + max(1, int(n)),), generator=generator).tolist()
        y = Rollout(ids[prompt:], [-2.0] * (len(ids) - prompt), True)
        examples.append(Example(ids[:prompt], y, i % 2, PHRASE))
    return examples


def set_up(name: str, checkpointing: bool = True):
    """A model that trains, its teacher, their output layers and its optimizer, as sdzero.main."""
    model = build(name).train()
    if checkpointing:
        common.checkpoint_layers(model)
    teacher, opt = Teacher(model), common.Optimizer(model, sdzero.BETAS, sdzero.WEIGHT_DECAY)
    return model, teacher, (OutputLayer(model, USED), OutputLayer(teacher.module, USED)), opt


def estimated(model, examples, args) -> int:
    """Bytes of training by the scripts' own estimate, for the longest of these responses."""
    lm = common.LM(model, None, {0}, USED, model.config.max_position_embeddings)
    lm.phrase_ids = lambda text: PHRASE
    args.max_new_tokens = max(len(e.response.ids) for e in examples)
    args.batch_size = len(examples)
    parts = common.estimate_memory(lm, args, len(examples[0].prompt_ids))
    return sum(n for part, n in parts.items() if not part.startswith("slot"))


@contextlib.contextmanager
def compiled_layers(*models):
    """Would it pay to compile the layers in training? Attention is then compiled with them: left
    out, it breaks the checkpointed layer in two, which the compiler refuses."""

    def run(compiled, weights, *args, **kwargs):
        gradients = [w.grad for w in weights]
        for w in weights:
            w.grad = None  # the compiler refuses fp32 gradients of bf16 weights
        try:
            return compiled(*args, **kwargs)
        finally:
            for w, gradient in zip(weights, gradients):
                w.grad = gradient

    registry, forward = transformers.AttentionInterface, sdpa_attention.sdpa_attention_forward
    outside = registry()["sdpa"]
    registry.register("sdpa", forward)
    layers = [layer for model in models for layer in model.model.layers]
    for layer in layers:
        backend = "inductor" if BIG else "aot_eager"  # which writes no code
        compiled = torch.compile(layer.forward, dynamic=True, backend=backend)
        layer.forward = partial(run, compiled, list(layer.parameters()))
    try:
        yield
    finally:
        registry.register("sdpa", outside)
        for layer in layers:
            del layer.forward


def training():
    args = flags("--micro-tokens", 16384 if BIG else 256)
    examples = responses(16, 4096) if BIG else responses(4, 40)
    model, teacher, layers, opt = set_up("1.7B")
    estimate = estimated(model, examples, args)
    student_tokens = sum(len(e.student_ids) for e in examples)
    teacher_tokens = sum(len(e.teacher_ids) for e in examples)
    scored = sum(len(e.response.ids) for e in examples)
    body = sum(p.numel() for p in model.model.layers.parameters())
    products = 2 * body * (4 * student_tokens + teacher_tokens)
    products += 8 * scored * USED * model.config.hidden_size
    free()
    for which in ("first", "second"):
        gradient = partial(distill_step, model, teacher, *layers, examples, args)
        took, update = seconds_of(gradient), seconds_of(lambda: opt.step(1e-6))
        share = products / took / PEAK["product"]
        values = dict(gradient_s=took, share_of_products=share, optimizer_s=update)
        say(f"stage-2 step of Qwen3-1.7B, {which}", tokens=student_tokens, **values)
    figure = f"{student_tokens / (took + update):,.0f} tokens/s, {share:.0%} of the products' peak"
    row(f"stage-2 step of Qwen3-1.7B without sampling, {scored:,} response tokens", figure)
    if BIG:
        held, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        values = dict(estimate_GB=estimate / GB, peak_GB=held / GB, reserved_GB=reserved / GB)
        say("memory of that step", **values, right=0.8 < estimate / held < 1.25)
        row("memory of that step", f"{held / GB:.1f} GB (estimate {estimate / GB:.1f})")
    kernels("stage-2 step of Qwen3-1.7B", gradient)  # after the peak was read
    traces = []
    for e in examples[-4:]:
        ids = [e.prompt_ids, e.response.ids, e.phrase_ids, e.response.ids]
        traces.append(srt.Trace("", "", 0, "", "", "", True, *ids))
    step = partial(srt.srt_step, model, layers[0], traces, (1, 2), args.micro_tokens)
    step()
    took, memory = seconds_and_peak(step)
    tokens = sum(len(t.ids) for t in traces)
    say("stage-1 step of Qwen3-1.7B", s=took, tokens_per_s=tokens / took, GB=memory / GB)
    row("stage-1 step of Qwen3-1.7B, 4 traces", f"{tokens / took:,.0f} tokens/s")
    model.zero_grad()  # from here on it may fail, so it comes last
    gradient()
    one = model.model.layers[1].mlp.down_proj.weight
    expected = one.grad.clone()
    with compiled_layers(model, teacher.module):
        model.zero_grad()
        values = dict(first_s=seconds_of(gradient))
        values["error"] = ((one.grad - expected).norm() / expected.norm()).item()
        values["gradient_s"] = seconds_of(gradient)
        values["share_of_products"] = products / values["gradient_s"] / PEAK["product"]
        say("stage-2 step of Qwen3-1.7B, layers compiled", **values, right=values["error"] < 0.05)
        kernels("stage-2 step of Qwen3-1.7B, layers compiled", gradient)


# -------------------------------------------------------------------------------------- 7 sampling


class EndAt(transformers.StoppingCriteria):
    """A row of transformers' generate ends at its own length."""

    def __init__(self, ends):
        self.ends = torch.tensor(ends, device=DEVICE)

    def __call__(self, input_ids, scores, **settings):
        return input_ids.shape[1] >= self.ends


def padded(rows: list[list[int]], left: bool = False) -> dict:
    width = max(map(len, rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, r in enumerate(rows):
        place = slice(width - len(r), None) if left else slice(len(r))
        ids[i, place], mask[i, place] = torch.tensor(r), 1
    return dict(input_ids=ids.to(DEVICE), attention_mask=mask.to(DEVICE))


def theirs(model, prompts, limits, slots) -> list[list[int]]:
    """transformers' generate, in batches of `slots`."""
    found = []
    for i in range(0, len(prompts), slots):
        batch, ends = padded(prompts[i : i + slots], left=True), limits[i : i + slots]
        width = batch["input_ids"].shape[1]
        out = model.generate(
            **batch,
            do_sample=True,
            top_k=0,
            max_new_tokens=max(ends),
            stopping_criteria=[EndAt([width + n for n in ends])],
        )
        found += [y[width : width + n].tolist() for y, n in zip(out, ends)]
    return found


def sampling():
    model = build("0.6B")
    model.generation_config.pad_token_id = 0
    slots, limit = (64, 256) if BIG else (4, 16)
    examples = responses(4 * slots, limit, 64 if BIG else 6)
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(1))
    prompts = [examples[i].prompt_ids for i in order]
    limits = [len(examples[i].response.ids) for i in order]

    ways = WAYS if BIG else list(WAYS)[:2]
    samplers = {f"ours, {way}": partial(sample, way=way, vocab_size=USED) for way in ways}
    samplers["transformers' generate"] = theirs
    what = f"sampling, Qwen3-0.6B, {slots} slots, {len(prompts)} responses of at most {limit}"
    for name, sampler in samplers.items():
        call = partial(sampler, model, prompts, limits, slots)
        first = seconds_of(call) if "graphs" in name else 0  # compiles, and plans attention
        took = seconds_of(call)
        say(f"{what}, {name}", s=took, tokens_per_s=sum(limits) / took, first_s=first)
        row(f"{what}, {name}", f"{sum(limits) / took:,.0f} tokens/s")
    del model
    free()
    whole_step(prompts[: slots // 4], limits[: slots // 4], slots)


def whole_step(prompts, limits, slots):
    """A stage-2 step with its sampling, ours and as most people write it."""
    model, teacher, layers, opt = set_up("0.6B", checkpointing=False)
    model.generation_config.pad_token_id = 0
    args = flags("--micro-tokens", 16384 if BIG else 256)

    def ours():
        ys = sample(model, prompts, limits, slots, list(WAYS)[-1 if BIG else 0], vocab_size=USED)
        examples = [Example(x, y, 0, PHRASE) for x, y in zip(prompts, ys)]
        distill_step(model, teacher, *layers, examples, args)
        opt.step(1e-6)

    def usual():
        model.eval()
        ys = theirs(model, prompts, limits, slots)
        model.train()
        for i in range(0, len(ys), 4):  # whole logits of more do not fit
            student = [x + y for x, y in zip(prompts[i : i + 4], ys[i : i + 4])]
            told = [x + y[len(x) :] for x, y in zip(prompts[i : i + 4], student)]
            told = [a + PHRASE + b for a, b in zip(told, ys[i : i + 4])]
            student_logits = model(**padded(student)).logits
            with torch.no_grad():
                teacher_logits = teacher.module(**padded(told)).logits
            sides = []
            for logits, rows in ((student_logits, student), (teacher_logits, told)):
                scored = []
                for x, r, y in zip(logits, rows, ys[i : i + 4]):
                    scored.append(x[len(r) - len(y) - 1 : len(r) - 1])
                sides.append(torch.cat(scored).float().log_softmax(-1))
            s, t = sides
            ((s.exp() * (s - t)).sum() / sum(limits)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    for name, step in (("ours", ours), ("generate, padded batches, whole logits", usual)):
        if step is usual:
            del opt
            for p in model.parameters():
                p.grad, p.grad_dtype = None, p.dtype
            adamw = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        step()
        took, memory = seconds_and_peak(step)
        what = f"stage-2 step with sampling, Qwen3-0.6B, {len(prompts)} responses, {name}"
        say(what, s=took, GB=memory / GB)
        row(what, f"{took:.2f} s, {memory / GB:.1f} GB")


# ------------------------------------------------------------------------------------------- 8 fit


def fit():
    model, teacher, layers, opt = set_up("4B")
    n = 4096 if BIG else 40
    example = Example([3] * 512, Rollout([7] * n, [-2.0] * n, True), 0, PHRASE)
    args = flags("--micro-tokens", 8192 if BIG else 256)
    estimate = estimated(model, [example], args)
    for _ in range(2):
        took = seconds_of(lambda: distill_step(model, teacher, *layers, [example], args))
        update = seconds_of(lambda: opt.step(1e-6))
    say("stage-2 step of Qwen3-4B, 4,096 tokens", gradient_s=took, optimizer_s=update)
    if not BIG:
        return
    held, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    values = dict(estimate_GB=estimate / GB, peak_GB=held / GB, reserved_GB=reserved / GB)
    say("memory of that step", **values, right=0.8 < estimate / held < 1.25)
    row("Qwen3-4B, stage 2, one response of 4,096 tokens", f"{held / GB:.1f} GB at most")
    free()
    slots = rollout.fit_slots(model, 512, 512 + n)
    limits = [8] * (slots - 1) + [n]
    settings = dict(max_new_tokens=limits, eos_token_ids=range(USED), slots=slots)
    rollout.generate(model, [[3] * 512] * slots, **settings)
    say("slots beside optimizer and teacher, Qwen3-4B", slots=slots, standing_GB=allocated() / GB)


# --------------------------------------------------------------------------------------- all parts

CHECKS = [  # (part, function, seconds on an H100)
    (0, ceilings, 5),
    (1, greedy_tokens, 30),
    (1, experts_in_graphs, 1),
    (1, logprobs, 33),
    (1, distribution, 20),
    (1, random_numbers, 20),
    (1, loss_gradients, 160),
    (1, optimizer, 1),
    (1, scripts, 100),
    (2, products, 2),
    (3, decode_attention, 4),
    (4, decode, 28),
    (5, loss, 90),
    (8, fit, 60),
    (6, training, 120),
    (7, sampling, 180),
]


def go_on_in_a_new_process(index: int) -> None:
    """After a CUDA error, which stays, with the checks after `index`."""
    command = [sys.executable, __file__, "--output", str(OPTIONS.output), "--skip", str(index + 1)]
    command += ["--minutes", str(OPTIONS.minutes), "--began", str(BEGAN)]
    if OPTIONS.only:
        command += ["--only", *map(str, OPTIONS.only)]
    os.execv(sys.executable, command)


def main():
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    gc.freeze()  # what is imported is never garbage: `free` need not look at it
    common.prepare_torch = partial(prepare_strictly, common.prepare_torch)  # of the scripts, too
    common.prepare_torch(DEVICE, compiles=BIG)
    if not BIG:
        torch.set_num_threads(1)
    card = torch.cuda.get_device_name() if BIG else "CPU, --smoke: figures mean nothing"
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    if OPTIONS.skip:
        WRONG.append("a CUDA error")
    else:
        row(f"{card}, {versions}, {time.strftime('%Y-%m-%d')}", "")
        row("---", "---")
    values = dict(card=card, versions=versions, python=sys.version.split()[0])
    say("machine", **values, right=not torch._dynamo.config.disable)  # else nothing is compiled
    for index, (part, check, guess) in enumerate(CHECKS):
        if index < OPTIONS.skip or (OPTIONS.only is not None and part not in OPTIONS.only):
            continue
        left = OPTIONS.minutes * 60 - (time.time() - BEGAN)
        if left < guess:
            say(f"{part} {check.__name__}", left_out=f"{left:.0f} s are left, it may take {guess}")
            continue
        start = time.time()
        try:
            check()
        except (Exception, SystemExit) as error:  # the scripts end by the latter
            say(f"{part} {check.__name__}", failed=first_line(error), right=False)
            traceback.print_exc()
            if "CUDA error" in str(error) or "device-side assert" in str(error):
                go_on_in_a_new_process(index)
        free()
        say(f"{part} {check.__name__}", took_s=round(time.time() - start, 1), expected_s=guess)
    print((OPTIONS.output / "rows.md").read_text())
    print(f"wrong: {', '.join(WRONG)}" if WRONG else "nothing was wrong")
    raise SystemExit(1 if WRONG else 0)


if __name__ == "__main__":
    main()
