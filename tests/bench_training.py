"""The training half, measured by hand: each alternative in a process of its own, interleaved, medians.

    python tests/bench_training.py loss       full_logits, topk_logits, sampled_token: by chunks against whole logits; seconds and peak memory
    python tests/bench_training.py step       one stage-2 step against model.generate + padded batches + whole logits
    python tests/bench_training.py srt        one L_SRT step against the version with two records a tuple
    python tests/bench_training.py memory     what the scripts say about memory before they start, against what a step takes; the estimate
                                              is of tensors: MALLOC_MMAP_THRESHOLD_=65536 keeps glibc's fragmentation out of the measure

Peak memory is the resident set above what it was with weights, inputs and code loaded, sampled every millisecond. With OMP_NUM_THREADS=1
seconds are that thread's CPU time, which other work on the machine disturbs less; else wall time. `loss` has the gradients' tensors
allocated before, as in every micro-batch but the first. Random weights in SmolLM2-135M's shape; 2,048 tokens, vocabulary 49,152, width 576.
"""

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
N, V, D = 2048, 49152, 576
SMOLLM2 = dict(vocab_size=V, hidden_size=D, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
               max_position_embeddings=8192, tie_word_embeddings=True, rope_theta=100000.0, bos_token_id=None, eos_token_id=0)  # fmt: skip
FLAGS = argparse.Namespace(objective="full_logits", alpha=1.0, topk=None, no_tail=False, temperature=1.0, skip_first=0, importance_cap=None,
                           micro_tokens=16384, lr=1e-5, betas=(0.9, 0.999), weight_decay=0.01, clip=1.0)  # fmt: skip


def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * 4096


def measured(function, repeats=2, start=None):
    """(seconds of the last of some calls, peak MB above the start); the first one warms up."""
    peak, running = 0, True
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def watch():
        nonlocal peak
        while running:
            peak = max(peak, resident())
            time.sleep(0.001)

    start = start or resident()
    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(repeats):
        began = clock()
        function()
        seconds = clock() - began
    running = False
    watcher.join()
    return seconds, (peak - start) / 1e6


def bench_loss(objective: str, ours: bool):
    import losses

    torch.manual_seed(0)
    layer, other = losses.OutputLayer.__new__(losses.OutputLayer), losses.OutputLayer.__new__(losses.OutputLayer)
    for x in (layer, other):
        x.weight, x.bias, x.vocab_size, x.scale, x.cap = torch.nn.Parameter(torch.randn(V, D) * 0.02), None, V, 1, None
    other.weight.requires_grad_(False)
    student_h, teacher_h, token_ids = torch.randn(N, D, requires_grad=True), torch.randn(N, D), torch.randint(V, (N,))

    def loss(student_l, teacher_l, token_ids):
        if objective == "full_logits":
            return losses.full_logits(student_l, teacher_l)[:, None]
        if objective == "topk_logits":
            return losses.topk_logits(student_l, teacher_l, 64)[:, None]
        return losses.sampled_token(student_l, teacher_l, token_ids)[:, None]

    layer.weight.grad, student_h.grad = torch.zeros_like(layer.weight), torch.zeros_like(student_h)

    def run():
        if ours:
            losses.backward_by_chunks(loss, layer, student_h * 1, token_ids, divisor=N, teacher=(other, teacher_h))
        else:
            with torch.no_grad():
                teacher_l = other(teacher_h)
            (loss(layer(student_h * 1), teacher_l, token_ids).sum() / N).backward()

    return measured(run)


def smollm2():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMOLLM2))


def bench_srt(ours: bool):
    from losses import OutputLayer
    from srt import srt_step

    model, generator = smollm2().train(), torch.Generator().manual_seed(0)

    def ids(low, high):
        return torch.randint(1, V, (int(torch.randint(low, high, (), generator=generator)),), generator=generator).tolist()

    traces = [dict(prompt_ids=ids(40, 80), init_ids=ids(20, 200), phrase_ids=ids(12, 13), revision_ids=ids(20, 200), reward=0, finished=True)
              for _ in range(4)]  # fmt: skip
    layer = OutputLayer(model)

    def run():
        model.zero_grad()
        if ours:
            return srt_step(model, layer, traces, (1, 2), 16384)
        # two records a tuple, as the framework's version has them: a batch of each kind, padded, whole logits, cross entropy with labels
        divisor = sum(len(t["init_ids"]) + len(t["phrase_ids"]) + 2 * len(t["revision_ids"]) for t in traces)
        for revision_alone in (True, False):
            rows = []
            for t in traces:
                given = t["prompt_ids"] + (t["init_ids"] + t["phrase_ids"] if revision_alone else [])
                rows.append((given, ([] if revision_alone else t["init_ids"] + t["phrase_ids"]) + t["revision_ids"]))
            width = max(len(a) + len(b) for a, b in rows)
            input_ids = torch.tensor([a + b + [0] * (width - len(a) - len(b)) for a, b in rows])
            labels = torch.tensor([[-100] * len(a) + b + [-100] * (width - len(a) - len(b)) for a, b in rows])
            mask = torch.tensor([[1] * (len(a) + len(b)) + [0] * (width - len(a) - len(b)) for a, b in rows])
            logits = model(input_ids=input_ids, attention_mask=mask).logits
            (F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / divisor).backward()

    return measured(run)


def bench_step(ours: bool):
    """8 problems, at most 128 new tokens: lengths are a geometric distribution's (mean 32) at 1/16, 3/16, ... 15/16, no lucky draw. Both sides
    end each response at its own length."""
    from transformers import GenerationConfig, StoppingCriteria

    import rollout
    from losses import OutputLayer
    from sdzero import Example, distill_step
    from srt import Optimizer
    from teacher import Teacher

    model, generator = smollm2(), torch.Generator().manual_seed(0)
    lengths = (-32 * torch.log1p(-(torch.arange(8) + 0.5) / 8)).ceil().int().tolist()  # 3 to 89
    prompts = [torch.randint(1, V, (int(n),), generator=generator).tolist() for n in torch.randint(40, 80, (8,), generator=generator)]
    phrase = list(range(5, 17))
    teacher, layer = Teacher(model), OutputLayer(model)
    teacher_layer = OutputLayer(teacher.module)

    def ours_step():
        model.train()
        responses = rollout.generate(model, prompts, max_new_tokens=lengths, eos_token_ids=[V], slots=8)
        assert [len(y.ids) for y in responses] == lengths
        distill_step(model, teacher, layer, teacher_layer, [Example(p, y, 0, phrase) for p, y in zip(prompts, responses)], FLAGS)
        optimizer.step(1e-5)

    class EndAt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            return input_ids.shape[1] >= torch.tensor(lengths) + max(map(len, prompts))

    def padded(rows, left=False):
        width = max(map(len, rows))
        ids = [[0] * (width - len(r)) + r if left else r + [0] * (width - len(r)) for r in rows]
        mask = [[0] * (width - len(r)) + [1] * len(r) if left else [1] * len(r) + [0] * (width - len(r)) for r in rows]
        return dict(input_ids=torch.tensor(ids), attention_mask=torch.tensor(mask))

    def plain_step():
        width = max(map(len, prompts))
        config = GenerationConfig(
            max_new_tokens=max(lengths), do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0, eos_token_id=None
        )
        model.eval()
        out = model.generate(**padded(prompts, left=True), generation_config=config, stopping_criteria=[EndAt()])
        model.train()
        responses = [row[width : width + n].tolist() for row, n in zip(out, lengths)]
        student_rows, teacher_rows = [p + y for p, y in zip(prompts, responses)], [p + y + phrase + y for p, y in zip(prompts, responses)]
        student_logits = model(**padded(student_rows)).logits
        with torch.no_grad():
            teacher_logits = teacher.module(**padded(teacher_rows)).logits
        s = torch.cat([x[len(row) - n - 1 : len(row) - 1] for x, row, n in zip(student_logits, student_rows, lengths)]).log_softmax(-1)
        t = torch.cat([x[len(row) - n - 1 : len(row) - 1] for x, row, n in zip(teacher_logits, teacher_rows, lengths)]).log_softmax(-1)
        ((s.exp() * (s - t)).sum(-1).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    if ours:
        optimizer = Optimizer(model, FLAGS)
        return measured(ours_step)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-5)
    return measured(plain_step)


def bench_memory(stage_2: bool):
    """(bytes of the estimate, bytes measured) of the training part of a step whose responses are as long as they may be."""
    from losses import OutputLayer
    from rollout import Rollout
    from sdzero import Example, distill_step
    from srt import LM, Optimizer, Problem, report_memory, srt_step
    from teacher import Teacher

    start = resident()
    model, prompt, response, phrase = smollm2().train(), list(range(1, 101)), list(range(1, 257)), list(range(5, 17))
    lm = LM(model, None, {0}, V, 8192)
    lm.phrase_ids = lambda text: phrase
    args = argparse.Namespace(
        **vars(FLAGS), max_new_tokens=len(response), batch_size=4, slots=1, gradient_checkpointing=False, phrase_wrong=""
    )
    parts = report_memory(lm, args, [Problem("", None, prompt)], "base" if stage_2 else None)
    layer, optimizer = OutputLayer(model), Optimizer(model, FLAGS)
    teacher = Teacher(model) if stage_2 else None
    trace = dict(prompt_ids=prompt, init_ids=response, phrase_ids=phrase, revision_ids=response, reward=0, finished=True)
    example = Example(prompt, Rollout(response, [0.0] * len(response), False), 0, phrase)

    def step():
        if stage_2:
            distill_step(model, teacher, layer, OutputLayer(teacher.module), [example] * 4, FLAGS)
        else:
            srt_step(model, layer, [trace] * 4, (1, 2), 16384)
        optimizer.step(1e-5)

    _, peak = measured(step, start=start)
    return sum(parts.values()) - parts["cache"], peak * 1e6


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["loss", "step", "srt", "memory"])
    parser.add_argument("--runs", type=int, default=5, help="processes of each alternative, interleaved (default: 5)")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        name, ours = args.child.rsplit(":", 1)
        bench = {"step": bench_step, "srt": bench_srt, "memory": bench_memory}.get(args.what) or partial(bench_loss, name)
        print(json.dumps(bench(ours == "1")))
        return
    for name in ["full_logits", "topk_logits", "sampled_token"] if args.what == "loss" else [args.what]:
        results = {"0": [], "1": []}
        for _ in range(args.runs):
            for ours, rows in results.items():
                command = [sys.executable, __file__, args.what, "--child", f"{name}:{ours}"]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                rows.append(json.loads(out.splitlines()[-1]))
        if args.what == "memory":
            for stage, rows in results.items():
                said, took = (statistics.median(column) / 1e9 for column in zip(*rows))
                print(
                    f"stage {int(stage) + 1}: estimate {said:.2f} GB, measured {took:.2f} GB, {said / took - 1:+.0%}  (median of {args.runs})"
                )
            continue
        (plain_s, plain_mb), (our_s, our_mb) = ([statistics.median(column) for column in zip(*results[k])] for k in ("0", "1"))
        print(f"{name}: alternative {plain_s:.2f} s, {plain_mb:.0f} MB; ours {our_s:.2f} s, {our_mb:.0f} MB; time x {plain_s / our_s:.2f}, "
              f"memory / {plain_mb / our_mb:.1f}  ({torch.get_num_threads()} threads, median of {args.runs})")  # fmt: skip


if __name__ == "__main__":
    main()
