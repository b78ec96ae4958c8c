"""How fast rollout.py is: run by hand, not a test. Random weights of the given shape; only the sizes matter.

    python tests/bench_rollout.py                                        the toy model, lengths (b) geometric
    python tests/bench_rollout.py --lengths equal                        (a) all equal
    python tests/bench_rollout.py --shape smollm2 --slots 16 --limit 128 --skip batch      SmolLM2-135M's shape
    python tests/bench_rollout.py --growth                               time per token at 128 to 2,048 tokens

8 times as many prompts as slots, all different. Every response's length is forced, drawn with a seed: (a) all as long as the limit, (b)
geometric with a mean of a quarter of the limit, cut at it. The samplers, interleaved in one process, same model, dtype and sampling:
    ours            rollout.generate with one limit a prompt (the look for an EOS goes on at every step)
    generate        transformers' model.generate, batches of `slots`, a row ends by a stopping criterion, a batch with its last row
    generate_batch  transformers' continuous batching, one max_new_tokens a request, at most `slots` requests at once
    floor           the bare forward of `slots` rows over a ready cache that nothing is written to (no sampling, prefill, or mask to build),
                    times the fewest steps that the lengths allow: max(longest, ceil(sum / slots)). Its cache length is the mean of what
                    the rows hold; `dense floor`: the mean of what the longest row holds, which attention over a rectangle reads;
    bare steps      the same forward at the rows and the longest row's length of every step (each 16th is timed) of continuous batching in
                    the prompts' order, lengths unknown beforehand: what is left to it is all of ours that is not the model
Printed: tokens/s of kept tokens, median over the repeats (least and most in brackets), and ours over each in the median of the repeats.
"""

import argparse
import inspect
import logging
import os
import statistics
import sys
import time
import warnings
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, StoppingCriteria

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rollout


def shape(hidden, intermediate, layers, heads, kv_heads, head_dim, vocab, positions):
    return dict(hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads, vocab_size=vocab,
                num_key_value_heads=kv_heads, head_dim=head_dim, max_position_embeddings=positions, tie_word_embeddings=True)  # fmt: skip


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


def ours(args, model, prompts, lengths):
    out = rollout.generate(model, prompts, max_new_tokens=lengths, eos_token_ids=[model.config.vocab_size], slots=args.slots,
                           cuda_graph=args.cuda_graph)  # fmt: skip
    assert [len(r.ids) for r in out] == lengths


def sampling(lengths, eos):
    return GenerationConfig(max_new_tokens=max(lengths), do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=eos,
                            pad_token_id=0)  # fmt: skip


def generate(args, model, prompts, lengths):
    config = sampling(lengths, None)
    for i in range(0, len(prompts), args.slots):
        batch, ends = prompts[i : i + args.slots], lengths[i : i + args.slots]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(p)) + p for p in batch], device=args.device)
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch], device=args.device)
        out = model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=[EndAt(width, ends, args.device)])
        assert out.shape[1] == width + max(ends)


def generate_batch(args, model, prompts, lengths):
    from transformers import ContinuousBatchingConfig

    config = sampling(lengths, -1)
    blocks = args.slots * -(-(max(map(len, prompts)) + max(lengths)) // args.page_size)
    cb = ContinuousBatchingConfig(page_size=args.page_size, num_blocks=blocks, max_batch_tokens=args.batch_tokens,
                                  max_requests_per_batch=args.slots)  # fmt: skip
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
        probe = rollout.prefill(model, [(0, 0)])
        layers, _, heads, _, size = probe.shape
        self.kv = [probe.new_full((rows, heads, length, size), 0.1) for _ in range(layers)]

    def update(self, key, value, layer, *args, **kwargs):
        return self.kv[2 * layer], self.kv[2 * layer + 1]

    def get_seq_length(self, *args):
        return 0


@torch.inference_mode()
def forward_time(args, model, rows: int, length: int, calls: int) -> float:
    cache = Ready(model, rows, length)
    tokens = torch.zeros(rows, 1, dtype=torch.long, device=args.device)
    positions, mask = torch.full_like(tokens, length - 1), torch.zeros(rows, 1, 1, length, dtype=model.dtype, device=args.device)
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    kwargs = {name: cache, "position_ids": positions, "attention_mask": mask, "use_cache": True}
    for timed in (False, True):
        sync(args.device)
        start = time.perf_counter()
        for _ in range(calls if timed else 3):
            model(input_ids=tokens, logits_to_keep=1, **kwargs)
        sync(args.device)
    return (time.perf_counter() - start) / calls


def schedule(prompts, lengths, slots):
    """What continuous batching in the prompts' order does: ([(rows, length of the longest)] a step, mean length held by a row)."""
    waiting, rows, steps, held = list(zip(map(len, prompts), lengths))[::-1], [], [], 0
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
    ratio = f"   ours is {statistics.median(t / r for t, r in zip(times, reference)):.2f} x" if reference else ""
    print(f"  {name:<15}{statistics.median(rates):>10,.0f} tokens/s  [{rates[0]:,.0f} .. {rates[-1]:,.0f}]{ratio}", flush=True)


def build(args):
    family, sizes = SHAPES[args.shape]
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, bos_token_id=None, eos_token_id=None, pad_token_id=None, **sizes)
    return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, args.dtype)).to(args.device).eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="toy")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--lengths", choices=["equal", "geometric"], default="geometric")
    parser.add_argument("--limit", type=int, default=256, help="most new tokens")
    parser.add_argument("--prompt", type=int, default=16, help="mean prompt length; they are drawn from half of it to one and a half")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip", nargs="*", default=[], choices=["generate", "batch"], help="leave out one of transformers' samplers")
    parser.add_argument("--page-size", type=int, default=256, help="of generate_batch")
    parser.add_argument("--batch-tokens", type=int, default=256, help="of generate_batch: the most tokens in one of its forwards")
    parser.add_argument("--growth", action="store_true", help="instead: our time per token at 128 to 2,048 tokens a response")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU; 2 are far slower on the toy beside other work")
    parser.add_argument("--cuda-graph", action="store_true", help="rollout.generate's cuda_graph: has not run on a GPU yet")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    model, rng = build(args), torch.Generator().manual_seed(1)
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    print(f"{args.shape} {args.dtype}, {name}, load {os.getloadavg()[0]:.1f}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")

    def draw_prompts(n):
        sizes = torch.randint(max(1, args.prompt // 2), args.prompt * 3 // 2 + 1, (n,), generator=rng).tolist()
        return [torch.randint(2, model.config.vocab_size, (size,), generator=rng).tolist() for size in sizes]

    if args.growth:
        prompts, limits = draw_prompts(args.slots), [128, 256, 512, 1024, 2048]
        times = {limit: [] for limit in limits}
        bare = {limit: [] for limit in limits}
        for _ in range(args.repeats):
            for limit in limits:
                sync(args.device)
                start = time.perf_counter()
                ours(args, model, prompts, [limit] * len(prompts))
                sync(args.device)
                times[limit].append((time.perf_counter() - start) / limit)
                bare[limit].append(forward_time(args, model, args.slots, args.prompt + limit // 2, 30))
        for limit in limits:
            ratio = statistics.median(a / b for a, b in zip(times[limit], times[128]))
            own = statistics.median(a - b for a, b in zip(times[limit], bare[limit]))
            forward = statistics.median(bare[limit])
            print(f"  {limit:>5} tokens: {statistics.median(times[limit]) * 1e3:.3f} ms a step of {args.slots} rows, {ratio:.2f} x that of 128; "
                  f"bare forward at its mean length {forward * 1e3:.3f} ms, all the rest {own * 1e3:.3f} ms", flush=True)  # fmt: skip
        return

    prompts = draw_prompts(8 * args.slots)
    if args.lengths == "equal":
        lengths = [args.limit] * len(prompts)
    else:  # geometric on 1, 2, ...
        u = torch.rand(len(prompts), dtype=torch.float64, generator=rng)
        lengths = (1 + (u.log() / torch.tensor(1 - 4 / args.limit, dtype=torch.float64).log()).long()).clamp(max=args.limit).tolist()
    tokens, fewest = sum(lengths), max(max(lengths), -(-sum(lengths) // args.slots))
    steps, held = schedule(prompts, lengths, args.slots)
    longest = round(statistics.mean(length for _, length in steps))
    print(f"  {len(prompts)} prompts of {min(map(len, prompts))} to {max(map(len, prompts))} tokens, {args.slots} slots, {args.lengths}: "
          f"{tokens} tokens, mean {tokens / len(prompts):.0f}, limit {args.limit}; {fewest} steps at least, {len(steps)} in this order; "
          f"a row holds {held} on average, the longest {longest}", flush=True)  # fmt: skip
    samplers = {"ours": ours, "generate": generate, "generate_batch": generate_batch}
    samplers = {k: f for k, f in samplers.items() if k not in [{"batch": "generate_batch"}.get(s, s) for s in args.skip]}
    floors = ["floor", "dense floor", "bare steps"]
    times = {name: [] for name in [*samplers, *floors]}
    for repeat in range(args.repeats + 1):  # the first one warms up
        for name, sampler in samplers.items():
            sync(args.device)
            start = time.perf_counter()
            sampler(args, model, prompts, lengths) if repeat else sampler(args, model, prompts[: args.slots], [8] * args.slots)
            sync(args.device)
            times[name].append(time.perf_counter() - start)
            for floor, length in (("floor", held), ("dense floor", longest)):  # beside each sampler; below, their mean is one repeat
                times[floor].append(fewest * forward_time(args, model, args.slots, length, max(5, fewest // 20)))
            times["bare steps"].append(
                len(steps) * statistics.mean(forward_time(args, model, rows, length, 3) for rows, length in steps[8::16])
            )
    for name in times:
        k = len(samplers) if name in floors else 1
        times[name] = [sum(times[name][i : i + k]) / k for i in range(k, len(times[name]), k)]
        report(name, times[name], tokens, None if name == "ours" else times["ours"])


if __name__ == "__main__":
    main()
