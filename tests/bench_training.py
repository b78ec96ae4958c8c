"""Speed and memory of training: each alternative in a process of its own, interleaved.

    python tests/bench_training.py loss      full_logits, topk_logits, sampled_token: by chunks
                                             against whole logits
    python tests/bench_training.py step      one stage-2 step, sampling included, against
                                             model.generate + padded batches + whole logits
    python tests/bench_training.py srt       one L_SRT step against two records per trace

--device cuda runs `loss`, `step` and `srt` on a GPU, in bf16. Printed are medians over --runs.

How it is measured. Random weights in SmolLM2-135M's shape; `loss` has 2,048 tokens, a vocabulary of
49,152 and a width of 576, on a GPU Qwen3-4B's numbers: 8,192 tokens, 151,669 of 151,936 ids, 2,560.
The tensors of its gradients exist before, as in every micro-batch but the first. On a CPU, peak
memory is the resident set above what it was with weights, inputs and code loaded, sampled every
millisecond; on a GPU it is the allocator's. With OMP_NUM_THREADS=1 seconds are that thread's CPU
time, which other work on the machine disturbs less; else wall time.

Figures: 2-core machine of this project, torch 2.13.0 (CPU), transformers 5.24, fp32,
`OMP_NUM_THREADS=1 python tests/bench_training.py loss|step|srt --runs 3`, CPU seconds and peak
memory. The steps: 8 problems of at most 128 new tokens; 4 traces.

    what                           the usual way         ours                 date
    full_logits                    10.28 s, 2,836 MB     6.29 s,   143 MB     2026-11-25
    topk_logits, k = 64, tail       9.60 s, 2,445 MB     6.83 s,   143 MB     2026-11-25
    sampled_token                   6.50 s, 1,632 MB     6.03 s,   140 MB     2026-11-25
    stage-2 step (2 runs)          42.6 s,  4,761 MB    20.2 s,  2,237 MB     2026-11-26
    the same, both cores (1 run)   23.5 s,  4,812 MB    13.0 s,  2,228 MB     2026-11-26
    L_SRT step (usual way: 1 run)  29.7 s,  4,483 MB    12.1 s,  1,785 MB     2026-11-25

Ours in turn with commit c4b0e6d, which cut micro-batches by a dynamic programme: the steps on
2026-11-27 (medians of 3 processes of `step`, 2 of `srt`; a light program beside them), the losses
on 2026-11-26 (1 process, at a load of 1 to 6).

    what                           commit c4b0e6d        now
    stage-2 step                   19.6 s,  2,226 MB    18.9 s,  2,247 MB
    L_SRT step                      8.2 s,  1,583 MB     8.1 s,  1,600 MB
    full_logits                    4.63 s,   139 MB     4.68 s,   137 MB
    topk_logits, k = 64, tail      5.69 s,   139 MB     5.77 s,   138 MB
    sampled_token                  4.52 s,   136 MB     4.32 s,   138 MB

Nearly half of our stage-2 step is sampling (torch profiler), which the longest response keeps busy
for 89 steps. Large matrix products run at some 140 GFLOP/s per core. The rest of a pass is mostly
the allocator's fresh pages, so we use few micro-batches, with at most 10% padding.
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
TOKENS, VOCABULARY, ROWS, WIDTH = 2048, 49152, 49152, 576  # of `loss`; on a GPU: see main
DEVICE, DTYPE = "cpu", torch.float32  # --device
SMOLLM2 = dict(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
    rope_theta=100000.0,
    bos_token_id=None,
    eos_token_id=0,
)
FLAGS = argparse.Namespace(
    objective="full_logits",
    alpha=1.0,
    topk=None,
    no_tail=False,
    temperature=1.0,
    skip_first=0,
    importance_cap=None,
    micro_tokens=16384,
)


def resident() -> int:
    return int(open("/proc/self/statm").read().split()[1]) * 4096


def measured(function, repeats=2):
    """(seconds of the last of some calls, peak MB above the start); the first one warms up."""
    if DEVICE == "cuda":
        return measured_on_gpu(function, repeats)
    start, running = resident(), True
    peak = start
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def watch():
        nonlocal peak
        while running:
            peak = max(peak, resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    for _ in range(repeats):
        began = clock()
        function()
        seconds = clock() - began
    running = False
    watcher.join()
    return seconds, (peak - start) / 1e6


def measured_on_gpu(function, repeats):
    start = torch.cuda.memory_allocated()
    for _ in range(repeats):  # the first call may compile: its memory does not count either
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
        began = time.perf_counter()
        function()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return seconds, (torch.cuda.max_memory_allocated() - start) / 1e6


def output_layer(losses):
    """An output layer without a model around it."""
    layer = losses.OutputLayer.__new__(losses.OutputLayer)
    weight = torch.randn(ROWS, WIDTH, device=DEVICE) * 0.02
    layer.weight, layer.bias = torch.nn.Parameter(weight.to(DTYPE)), None
    layer.vocab_size, layer.scale, layer.cap = VOCABULARY, 1, None
    layer.rows = ROWS if DEVICE == "cuda" else VOCABULARY
    return layer


def bench_loss(objective: str, ours: bool):
    import losses

    torch.manual_seed(0)
    layer, other = output_layer(losses), output_layer(losses)
    other.weight.requires_grad_(False)
    student_h, teacher_h = torch.randn(2, TOKENS, WIDTH, device=DEVICE).to(DTYPE)
    student_h.requires_grad_()
    token_ids = torch.randint(VOCABULARY, (TOKENS,), device=DEVICE)

    def loss(student_l, teacher_l, token_ids):
        if objective == "full_logits":
            return losses.full_logits(student_l, teacher_l)
        if objective == "topk_logits":
            return losses.topk_logits(student_l, teacher_l, 64)
        return losses.sampled_token(student_l, teacher_l, token_ids)

    if DEVICE == "cuda":
        layer.weight.grad_dtype = torch.float32
    layer.weight.grad = torch.zeros_like(layer.weight, dtype=layer.weight.grad_dtype)
    student_h.grad = torch.zeros_like(student_h)

    def by_chunks():
        how = dict(divisor=TOKENS, teacher=(other, teacher_h), compiled=DEVICE == "cuda")
        losses.backward_by_chunks(loss, layer, student_h * 1, token_ids, **how)

    def whole():
        with torch.no_grad():
            teacher_l = other(teacher_h)
        (loss(layer(student_h * 1), teacher_l, token_ids).sum() / TOKENS).backward()

    return measured(by_chunks if ours else whole)


def smollm2():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMOLLM2)).to(DEVICE, DTYPE)


def bench_srt(ours: bool):
    from losses import OutputLayer
    from srt import Trace, srt_step

    model, generator = smollm2().train(), torch.Generator().manual_seed(0)

    def ids(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()

    traces = []
    for _ in range(4):
        x, y_init, phrase, y_rev = ids(40, 80), ids(20, 200), ids(12, 13), ids(20, 200)
        traces.append(Trace("", "", 0, "", "", "", True, x, y_init, phrase, y_rev))
    layer = OutputLayer(model)

    def run():
        model.zero_grad()
        if ours:
            return srt_step(model, layer, traces, (1, 2), 16384)
        # Two records per trace, as the framework's version has them: a batch of each kind, padded,
        # whole logits, cross entropy with labels.
        divisor = sum(sum(t.weights((1, 2))) for t in traces)
        for only_revision in (True, False):
            rows = []
            for t in traces:
                first = t.init_ids + t.phrase_ids
                if only_revision:
                    rows.append((t.prompt_ids + first, t.revision_ids))
                else:
                    rows.append((t.prompt_ids, first + t.revision_ids))
            labels = [[-100] * len(given) + scored for given, scored in rows]
            width = max(map(len, labels))
            labels = torch.tensor([x + [-100] * (width - len(x)) for x in labels], device=DEVICE)
            logits = model(**padded([given + scored for given, scored in rows])).logits
            flat = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            (F.cross_entropy(*flat, reduction="sum") / divisor).backward()

    return measured(run)


def padded(rows, left=False):
    """input_ids and attention_mask of lists of ids."""
    width = max(map(len, rows))
    ids, mask = [], []
    for row in rows:
        pad, real = [0] * (width - len(row)), [1] * len(row)
        ids.append(pad + row if left else row + pad)
        mask.append(pad + real if left else real + pad)
    return dict(
        input_ids=torch.tensor(ids, device=DEVICE), attention_mask=torch.tensor(mask, device=DEVICE)
    )


def bench_step(ours: bool):
    """8 problems, at most 128 new tokens. The lengths are the quantiles of a geometric distribution
    (mean 32) at 1/16, 3/16, ..., 15/16: no lucky draw. Both sides end each response at its own."""
    from transformers import GenerationConfig, StoppingCriteria

    import rollout
    from common import Optimizer
    from losses import OutputLayer
    from sdzero import BETAS, WEIGHT_DECAY, Example, distill_step
    from teacher import Teacher

    model, generator = smollm2(), torch.Generator().manual_seed(0)
    lengths = (-32 * torch.log1p(-(torch.arange(8) + 0.5) / 8)).ceil().int().tolist()  # 3 to 89
    prompts = []
    for n in torch.randint(40, 80, (8,), generator=generator).tolist():
        prompts.append(torch.randint(1, VOCABULARY, (n,), generator=generator).tolist())
    phrase = list(range(5, 17))
    teacher, layer = Teacher(model), OutputLayer(model)
    teacher_layer = OutputLayer(teacher.module)

    def ours_step():
        model.train()
        responses = rollout.generate(
            model, prompts, max_new_tokens=lengths, eos_token_ids=[], slots=8
        )
        assert [len(y.ids) for y in responses] == lengths
        examples = [Example(p, y, 0, phrase) for p, y in zip(prompts, responses)]
        distill_step(model, teacher, layer, teacher_layer, examples, FLAGS)
        optimizer.step(1e-5)

    class EndAt(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            ends = torch.tensor(lengths, device=DEVICE) + max(map(len, prompts))
            return input_ids.shape[1] >= ends

    def scored(logits, rows):
        """Log-probabilities [N, V] of the rows that predict the last ids of each sequence."""
        ends = [len(row) - 1 for row in rows]
        parts = [x[end - n : end] for x, end, n in zip(logits, ends, lengths)]
        return torch.cat(parts).log_softmax(-1)

    def plain_step():
        width = max(map(len, prompts))
        config = GenerationConfig(
            max_new_tokens=max(lengths),
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            pad_token_id=0,
            eos_token_id=None,
        )
        model.eval()
        batch = padded(prompts, left=True)
        out = model.generate(**batch, generation_config=config, stopping_criteria=[EndAt()])
        model.train()
        student_rows, teacher_rows = [], []
        for prompt, row, n in zip(prompts, out, lengths):
            response = row[width : width + n].tolist()
            student_rows.append(prompt + response)
            teacher_rows.append(prompt + response + phrase + response)
        student_logits = model(**padded(student_rows)).logits
        with torch.no_grad():
            teacher_logits = teacher.module(**padded(teacher_rows)).logits
        s, t = scored(student_logits, student_rows), scored(teacher_logits, teacher_rows)
        ((s.exp() * (s - t)).sum(-1).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()

    if ours:
        optimizer = Optimizer(model, BETAS, WEIGHT_DECAY)
        return measured(ours_step)
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-5)
    return measured(plain_step)


def report(name, results, runs):
    """One line of medians. results: "0" (the usual way) and "1" (ours) -> rows of (seconds, MB)."""
    medians = {
        k: [statistics.median(column) for column in zip(*rows)] for k, rows in results.items()
    }
    (plain_s, plain_mb), (our_s, our_mb) = medians["0"], medians["1"]
    threads = f"{torch.get_num_threads()} threads"
    print(
        f"{name}: alternative {plain_s:.2f} s, {plain_mb:.0f} MB; ours {our_s:.2f} s, "
        f"{our_mb:.0f} MB; time x {plain_s / our_s:.2f}, memory / {plain_mb / our_mb:.1f}  "
        f"({threads if DEVICE == 'cpu' else torch.cuda.get_device_name()}, median of {runs})"
    )


def main(argv=None):
    global DEVICE, DTYPE, TOKENS, VOCABULARY, ROWS, WIDTH
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["loss", "step", "srt"])
    parser.add_argument(
        "--runs", type=int, default=5, help="processes of each alternative, interleaved"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.device == "cuda":
        DEVICE, DTYPE = "cuda", torch.bfloat16
        if args.what == "loss":
            TOKENS, VOCABULARY, ROWS, WIDTH = 8192, 151669, 151936, 2560
    if args.child:
        name, ours = args.child.rsplit(":", 1)
        functions = {"step": bench_step, "srt": bench_srt}
        bench = functions.get(args.what) or partial(bench_loss, name)
        print(json.dumps(bench(ours == "1")))
        return
    objectives = ["full_logits", "topk_logits", "sampled_token"]
    for name in objectives if args.what == "loss" else [args.what]:
        results = {"0": [], "1": []}
        for _ in range(args.runs):
            for ours, rows in results.items():
                command = [sys.executable, __file__, args.what, "--device", args.device]
                command += ["--child", f"{name}:{ours}"]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                rows.append(json.loads(out.splitlines()[-1]))
        report(name, results, args.runs)


if __name__ == "__main__":
    main()
