"""How fast rollout.py is. Run by hand; it is not a test. The weights are random: only sizes matter.

    python tests/bench_rollout.py                            the toy model, geometric lengths
    python tests/bench_rollout.py --lengths equal            all lengths equal
    python tests/bench_rollout.py --shape smollm2 --slots 16 --limit 128 --skip batch
                                                             the shape of SmolLM2-135M
    python tests/bench_rollout.py --growth                   time per token at 128 to 2,048 tokens
    python tests/bench_rollout.py --against old.py           also another rollout.py, in turn

There are 8 times as many prompts as slots, all different. The length of every response is forced
and drawn with a seed: all as long as the limit, or geometric with a mean of a quarter of the limit,
cut at the limit. These run in turn in one process, with the same model, dtype and sampling:
    ours            rollout.generate with one limit per prompt (it still looks for an EOS)
    generate        transformers' model.generate in batches of `slots`; a stopping criterion ends a
                    row, the last row to end ends the batch
    generate_batch  transformers' continuous batching, one max_new_tokens per request, at most
                    `slots` requests at once
    floor           the bare forward of `slots` rows over a ready cache to which nothing is written
                    (no sampling, no prefill, no mask to build), times the fewest steps that the
                    lengths allow: max(longest, ceil(sum / slots)). Its cache is as long as what the
                    rows hold on average
    dense floor     the same with the average length of the longest row, which is what attention
                    over a rectangle reads
    bare steps      the same forward at the number of rows and the longest length of every step (one
                    in 16 is timed) of continuous batching in the prompts' order, with lengths that
                    are not known beforehand: the rest of our time is all that is not the model
It prints the kept tokens per second, the median over the repeats (least and most in brackets), and
how many times as fast as each of the others ours is, in the median of the repeats.

Measured on 2 cores, torch 2.13.0 (CPU), transformers 5.24, fp32, one thread (OMP_NUM_THREADS=1),
tokens per second, median of 5 repeats (SmolLM2: of 2), 2026-11-25, with commit 4a51f7e, on a
machine whose MKL was slow with 2 or 3 rows (that commit decoded those as 4; later ones do not). The
bare forward is the dense floor.
                                                        ours  generate  generate_batch  bare forward
    toy, geometric lengths, 64 slots                   9,709     2,272           3,598        12,562
                                                               (4.2 x)         (2.6 x)        (0.76)
    toy, all of 256 tokens, an earlier commit         12,947     9,555               -        16,683
    (--lengths equal --skip batch)                            (1.36 x)                        (0.75)
    SmolLM2-135M's shape, geometric, 16 slots             70        25               -            94
    (--shape smollm2 --slots 16 --limit 64                     (2.9 x)                        (0.75)
    --skip batch --repeats 2)
Of the toy's time with geometric lengths 85% is the model's decode forward, 8% prefill, 5% sampling
and the step's own work, 2% the host. That forward takes 1.3 times as long as the bare one, because
a ready cache is dense in memory and ours has gaps where rows may still grow. From 128 to 2,048
tokens per response a step of 64 rows takes 3.5 times as long (--growth, an earlier commit):
attention 5.1 times, the rest 1.2 times.

Ours in turn with the first version, commit c4b0e6d (git show c4b0e6d:rollout.py > old.py; --against
old.py --skip batch generate), 2026-11-27, tokens per second: toy 12,404 and 12,352 (9 repeats),
SmolLM2's shape with 16 slots and --limit 64 91 and 90 (6 repeats; whichever comes first is 1 to 2%
slower).
"""

import argparse
import importlib.util
import inspect
import logging
import os
import statistics
import sys
import time
import warnings
from functools import partial
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, StoppingCriteria

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rollout


def shape(hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, positions):
    return dict(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
    )


SHAPES = {
    "toy": ("llama", shape(96, 256, 3, 4, 4, 24, 163, 4096)),
    "smollm2": ("llama", shape(576, 1536, 30, 9, 3, 64, 49152, 8192)),
    "qwen3-0.6b": ("qwen3", shape(1024, 3072, 28, 16, 8, 128, 151936, 40960)),
    "qwen3-4b": ("qwen3", shape(2560, 9728, 36, 32, 8, 128, 151936, 40960)),
}


class EndAt(StoppingCriteria):
    """A row ends when its own number of new tokens is reached."""

    def __init__(self, prompt: int, lengths: list[int], device):
        self.ends = torch.tensor(lengths, device=device) + prompt

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= self.ends


def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


def ours(args, model, prompts, lengths, sampler=rollout):
    settings = dict(eos_token_ids=[], slots=args.slots, cuda_graph=args.cuda_graph)
    out = sampler.generate(model, prompts, max_new_tokens=lengths, **settings)
    assert [len(r.ids) for r in out] == lengths


def from_file(path):
    spec = importlib.util.spec_from_file_location("other_rollout", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sampling(lengths, eos):
    plain = dict(do_sample=True, temperature=1.0, top_k=0, top_p=1.0)
    return GenerationConfig(max_new_tokens=max(lengths), eos_token_id=eos, pad_token_id=0, **plain)


def generate(args, model, prompts, lengths):
    config = sampling(lengths, None)
    for i in range(0, len(prompts), args.slots):
        batch, ends = prompts[i : i + args.slots], lengths[i : i + args.slots]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=args.device)
        mask = torch.tensor(
            [[0] * (width - len(p)) + [1] * len(p) for p in batch], device=args.device
        )
        out = model.generate(
            ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=[EndAt(width, ends, args.device)],
        )
        assert out.shape[1] == width + max(ends)


def generate_batch(args, model, prompts, lengths):
    from transformers import ContinuousBatchingConfig

    config = sampling(lengths, -1)
    parameters = inspect.signature(ContinuousBatchingConfig).parameters
    page = "page_size" if "page_size" in parameters else "block_size"  # its name up to 5.17
    cb = ContinuousBatchingConfig(
        **{page: args.page_size},
        num_blocks=args.slots * -(-(max(map(len, prompts)) + max(lengths)) // args.page_size),
        max_batch_tokens=args.batch_tokens,
        max_requests_per_batch=args.slots,
    )
    attention = model.config._attn_implementation
    with model.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=cb, block=True, timeout=5
    ) as manager:
        wanted = {manager.add_request(p, max_new_tokens=n): n for p, n in zip(prompts, lengths)}
        while wanted:
            result = manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                assert len(result.generated_tokens) == wanted.pop(result.request_id), result
            assert manager.is_running() or not wanted, "generate_batch stopped"
    model.set_attn_implementation(attention)


class Ready:
    """A cache that holds `length` positions already and takes no more."""

    def __init__(self, model, rows: int, length: int):
        self.layers = []  # keys and values, [rows, heads, length, size] each
        for x in rollout.prefill(model, [(0, 0)]):
            shape = rows, x.shape[2], length, x.shape[4]
            self.layers.append((x.new_full(shape, 0.1), x.new_full(shape, 0.1)))

    def update(self, key, value, layer, *args, **kwargs):
        return self.layers[layer]

    def get_seq_length(self, *args):
        return 0


@torch.inference_mode()
def forward_time(args, model, rows: int, length: int, calls: int) -> float:
    cache = Ready(model, rows, length)
    tokens = torch.zeros(rows, 1, dtype=torch.long, device=args.device)
    positions = torch.full_like(tokens, length - 1)
    mask = torch.zeros(rows, 1, 1, length, dtype=model.dtype, device=args.device)
    renamed = "cache" in inspect.signature(type(model).forward).parameters
    name = "cache" if renamed else "past_key_values"
    kwargs = {name: cache, "position_ids": positions, "attention_mask": mask, "use_cache": True}
    for timed in (False, True):
        sync(args.device)
        start = time.perf_counter()
        for _ in range(calls if timed else 3):
            model(input_ids=tokens, logits_to_keep=1, **kwargs)
        sync(args.device)
    return (time.perf_counter() - start) / calls


def schedule(prompts, lengths, slots):
    """What continuous batching in the prompts' order does: for each step the number of rows and the
    length of the longest, and the average length that a row holds."""
    waiting = list(zip(map(len, prompts), lengths))[::-1]
    rows, steps, held = [], [], 0
    while waiting or rows:
        while waiting and len(rows) < slots:
            prompt, n = waiting.pop()
            rows.append((len(steps) - prompt, len(steps) + n))
        now = len(steps) + 1
        steps.append((len(rows), max(now - born for born, _ in rows) - 1))
        held += sum(now - born - 1 for born, _ in rows)
        rows = [row for row in rows if row[1] > now]
    return steps, round(held / sum(lengths))


def report(name, times, tokens, reference=None):
    rates = sorted(tokens / t for t in times)
    ratio = ""
    if reference:
        ratio = statistics.median(t / r for t, r in zip(times, reference))
        ratio = f"   ours is {ratio:.2f} x"
    middle, least, most = statistics.median(rates), rates[0], rates[-1]
    print(
        f"  {name:<15}{middle:>10,.0f} tokens/s  [{least:,.0f} .. {most:,.0f}]{ratio}", flush=True
    )


def build(args):
    family, sizes = SHAPES[args.shape]
    torch.manual_seed(0)
    none = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    config = AutoConfig.for_model(family, **none, **sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype))
    return model.to(args.device).eval()


def parse_arguments():
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="toy")
    add("--slots", type=int, default=64)
    add("--lengths", choices=["equal", "geometric"], default="geometric")
    add("--limit", type=int, default=256, help="most new tokens")
    add(
        "--prompt", type=int, default=16, help="mean prompt length; drawn from half to 1.5 times it"
    )
    add("--repeats", type=int, default=5)
    add("--skip", nargs="*", default=[], choices=["generate", "batch"], help="leave out a sampler")
    add("--against", metavar="FILE", help="another rollout.py, of an older commit")
    add("--page-size", type=int, default=256, help="of generate_batch")
    add("--batch-tokens", type=int, default=256, help="most tokens of a generate_batch forward")
    add("--growth", action="store_true", help="instead: our time per token at several lengths")
    add("--device", default="cpu")
    add("--dtype", default="float32")
    add("--threads", type=int, default=1, help="on the CPU; 2 are slower beside other work")
    add("--cuda-graph", action="store_true", help="decode with CUDA graphs")
    return parser.parse_args()


def draw_prompts(args, n, vocab_size, rng):
    low, high = max(1, args.prompt // 2), args.prompt * 3 // 2 + 1
    sizes = torch.randint(low, high, (n,), generator=rng).tolist()
    return [torch.randint(2, vocab_size, (size,), generator=rng).tolist() for size in sizes]


def seconds(device, call) -> float:
    sync(device)
    start = time.perf_counter()
    call()
    sync(device)
    return time.perf_counter() - start


def growth(args, model, rng):
    prompts = draw_prompts(args, args.slots, model.config.vocab_size, rng)
    limits = [128, 256, 512, 1024, 2048]
    times, bare = {limit: [] for limit in limits}, {limit: [] for limit in limits}
    for _ in range(args.repeats):
        for limit in limits:
            lengths = [limit] * len(prompts)
            taken = seconds(args.device, partial(ours, args, model, prompts, lengths))
            times[limit].append(taken / limit)
            length = args.prompt + limit // 2
            bare[limit].append(forward_time(args, model, args.slots, length, 30))
    for limit in limits:
        step, forward = statistics.median(times[limit]), statistics.median(bare[limit])
        ratio = statistics.median(a / b for a, b in zip(times[limit], times[128]))
        own = statistics.median(a - b for a, b in zip(times[limit], bare[limit]))
        print(
            f"  {limit:>5} tokens: {step * 1e3:.3f} ms per step of {args.slots} rows, "
            f"{ratio:.2f} x that of 128; bare forward at its mean length {forward * 1e3:.3f} ms, "
            f"all the rest {own * 1e3:.3f} ms",
            flush=True,
        )


def compare(args, model, rng):
    prompts = draw_prompts(args, 8 * args.slots, model.config.vocab_size, rng)
    if args.lengths == "equal":
        lengths = [args.limit] * len(prompts)
    else:  # geometric on 1, 2, ...
        u = torch.rand(len(prompts), dtype=torch.float64, generator=rng)
        rate = torch.tensor(1 - 4 / args.limit, dtype=torch.float64).log()
        lengths = (1 + (u.log() / rate).long()).clamp(max=args.limit).tolist()
    tokens = sum(lengths)
    fewest = max(max(lengths), -(-tokens // args.slots))
    steps, held = schedule(prompts, lengths, args.slots)
    longest = round(statistics.mean(length for _, length in steps))
    shortest_prompt, longest_prompt = min(map(len, prompts)), max(map(len, prompts))
    print(
        f"  {len(prompts)} prompts of {shortest_prompt} to {longest_prompt} tokens, {args.slots} "
        f"slots, {args.lengths}: {tokens} tokens, mean {tokens / len(prompts):.0f}, limit "
        f"{args.limit}; {fewest} steps at least, {len(steps)} in this order; a row holds {held} on "
        f"average, the longest {longest}",
        flush=True,
    )
    samplers = {"ours": ours}
    if args.against:
        samplers["against"] = partial(ours, sampler=from_file(args.against))
    if "generate" not in args.skip:
        samplers["generate"] = generate
    if "batch" not in args.skip:
        samplers["generate_batch"] = generate_batch
    floors = ["floor", "dense floor", "bare steps"]
    times = {name: [] for name in [*samplers, *floors]}
    few = prompts[: args.slots], [8] * args.slots
    for repeat in range(args.repeats + 1):  # the first one warms up
        for name, sampler in samplers.items():
            work = (prompts, lengths) if repeat else few
            times[name].append(seconds(args.device, partial(sampler, args, model, *work)))
            # The floors are measured beside each sampler; their mean is one repeat.
            calls = max(5, fewest // 20)
            for floor, length in (("floor", held), ("dense floor", longest)):
                taken = forward_time(args, model, args.slots, length, calls)
                times[floor].append(fewest * taken)
            some = [forward_time(args, model, *step, 3) for step in steps[8::16]]
            times["bare steps"].append(len(steps) * statistics.mean(some))
    for name in times:
        k = len(samplers) if name in floors else 1
        repeats = range(k, len(times[name]), k)
        times[name] = [sum(times[name][i : i + k]) / k for i in repeats]
        report(name, times[name], tokens, None if name == "ours" else times["ours"])


def main():
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    model, rng = build(args), torch.Generator().manual_seed(1)
    name = f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    if args.device == "cuda":
        name = torch.cuda.get_device_name()
    print(
        f"{args.shape} {args.dtype}, {name}, load {os.getloadavg()[0]:.1f}, "
        f"torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    )
    (growth if args.growth else compare)(args, model, rng)


if __name__ == "__main__":
    main()
