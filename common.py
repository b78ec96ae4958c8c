"""What srt.py and sdzero.py share: sampling, verifying, revising, and all that is not the method.

The first half is worth reading: what a run works on, sampling and evaluation, the optimizer, the
processes of torchrun, and the run itself, with its log and its checkpoints. The second half can be
skipped at a first reading: flags, loading, the memory estimate, error messages.

The two scripts import this file and never each other. What a user can mend ends in `fail`: one line
on stderr and exit code 2.
"""

import argparse
import csv
import functools
import hashlib
import importlib
import inspect
import io
import json
import math
import os
import random
import re
import shutil
import sys
import time
import traceback
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm
from transformers.integrations import sdpa_attention

import verifier
from lora import adapter_config, adapter_state, add_lora, load_adapter, merged_state_dict
from losses import CHUNK, OutputLayer, grad_of, micro_batches
from rollout import (
    Rollout,
    cache_bytes_per_token,
    check_supported,
    generate,
    pack_weights,
    stream_seeds,
)

try:
    import fcntl  # the lock of a run's folder; Windows has none, and runs there go unlocked
except ImportError:
    fcntl = None

if sys.platform == "linux" and torch.version.cuda:
    # Sampling and training take turns with tens of GB in pieces of other sizes: without this, what
    # one of them gave back is too fragmented for the other. Torch reads it at its first allocation.
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


# ------------------------------------------------------------------------------ what a run works on

VERDICTS = ("wrong", "right")  # of r


@dataclass
class LM:
    """A model with what its text needs."""

    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    eos_ids: set[int]  # each of them ends a response
    vocab_size: int  # ids from here on are not the tokenizer's: never sampled, never scored
    context: int  # tokens of the longest sequence

    def text(self, ids: list[int]) -> str:
        """What the verifier reads. The library would tidy up "1 != 2" to "1!= 2" if it were let."""
        return self.tokenizer.decode(
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def phrase_ids(self, phrase: str) -> list[int]:
        """P_r as its own token ids, with a blank line before and after it."""
        return self.tokenizer(f"\n\n{phrase}\n\n", add_special_tokens=False)["input_ids"]

    def phrases(self, args: Namespace) -> list[list[int]]:
        """The ids of P_0 and P_1: index them with the verdict r."""
        return [self.phrase_ids(args.phrase_wrong), self.phrase_ids(args.phrase_right)]


def key_of(text: str) -> str:
    """A problem's identity: a hash of its words. Blanks do not make another problem."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:16]


@dataclass
class Problem:
    """One problem; `answer` is the gold answer, or a list of tests for code."""

    text: str
    answer: object
    prompt_ids: list[int]  # x, up to where the assistant begins to write

    @property
    def key(self) -> str:
        return key_of(self.text)


@dataclass
class Attempt:
    """A response to a problem, or a revision of one, with its verdict."""

    problem: Problem
    response: Rollout  # y
    text: str  # of y, as the verifier read it
    reward: int  # r

    def shown(self) -> str:
        """As text for the log."""
        gold = f"{VERDICTS[self.reward]}; gold {self.problem.answer!r}"
        return f"  problem: {self.problem.text!r}\n  response [{gold}]: {self.text!r}"


@dataclass
class Task:
    """What a run works on."""

    args: Namespace
    lm: LM
    verify_all: Callable
    problems: list[Problem]  # to train on
    held_out: list[Problem]  # never trained on
    counts: dict  # of problems
    saved: dict  # what the output's srt.json will say, see `inherit_prompt`

    def trained_on(self, keys: list[str], stage_1: bool = False) -> None:
        """Let srt.json remember these problems. stage_1: stage 2 leaves them out."""
        for name in ("trained", "problems") if stage_1 else ("trained",):
            self.saved[name] = sorted({*self.saved[name], *keys})


# ----------------------------------------------------------------------------- sampling, evaluation

SHORT = 128  # tokens of a response; up to here bf16 on a CPU is trained with eager attention
SLOTS, MAX_SLOTS = 64, 256  # sequences decoded at once, without a GPU and with one
SHOW_EVERY = 10  # batches between two responses shown in the log


def seed_of(*parts) -> int:
    """Every random number of a run comes from (seed, purpose, step): there is no random state that
    a checkpoint could miss."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def sample_all(
    lm: LM, args: Namespace, prompts: list[list[int]], purpose: tuple, temperature=1.0, top_p=1.0
) -> list[Rollout]:
    """One response for each prompt. purpose: what they are for, and the step, for the seed."""
    slots, cache_bytes = args.slots, getattr(args, "cache_bytes", None)
    graphs = args.cuda_graphs == "on" and lm.model.device.type == "cuda"
    if cache_bytes is not None:  # else nothing trains here, and the sampler takes what is free
        longest = max(map(len, prompts), default=0) + args.max_new_tokens
        slots = slots_that_fit(args, cache_bytes_per_token(lm.model) * longest, cache_bytes)
        print(f"{' '.join(map(str, purpose))}  slots {slots}")
    seeds = stream_seeds(seed_of(args.seed, *purpose), len(prompts))

    def sample(part: list[tuple]) -> list[Rollout]:
        with progress(None, f"sampling {purpose[0]}", total=len(part), unit="response") as bar:
            return generate(
                lm.model,
                [prompt for prompt, _ in part],
                max_new_tokens=args.max_new_tokens,
                eos_token_ids=lm.eos_ids,
                temperature=temperature,
                top_p=top_p,
                slots=slots,
                seed=[seed for _, seed in part],
                vocab_size=lm.vocab_size,
                progress=bar.update,
                cuda_graph=graphs,
                compile_layers=graphs,
            )

    # load_lm may have chosen eager, for training; one token at a time it takes twice as long
    chosen = lm.model.config._attn_implementation
    if lm.model.device.type == "cpu" and lm.model._supports_sdpa:
        lm.model.set_attn_implementation("sdpa")
    responses = map_over_ranks(sample, list(zip(prompts, seeds)))
    lm.model.set_attn_implementation(chosen)
    return responses


def sample_and_verify(
    task: Task, problems: list[Problem], purpose: tuple, prefixes: list | None = None, **settings
) -> list[Attempt]:
    """One response for each problem (list it n times for n), and its verdict.

    prefixes: the ids that each response continues, if not the problem's prompt. settings: of
    `sample_all`, where they are not those of training samples.
    """
    args, lm = task.args, task.lm
    prompts = [p.prompt_ids for p in problems] if prefixes is None else prefixes
    settings = {"temperature": args.temperature, "top_p": args.top_p, **settings}
    responses = sample_all(lm, args, prompts, purpose, **settings)
    texts = [lm.text(y.ids) for y in responses]
    rewards = task.verify_all(texts, [p.answer for p in problems])
    return [Attempt(*fields) for fields in zip(problems, responses, texts, rewards)]


def revise(
    task: Task, attempts: list[Attempt], n: int, purpose: tuple, **settings
) -> list[tuple[Attempt, Attempt]]:
    """(attempt, revision): n revisions of each, told only right or wrong. Attempts whose revision
    might not fit the context are left out."""
    phrases, revised, prefixes = task.lm.phrases(task.args), [], []
    for attempt in attempts:
        prefix = attempt.problem.prompt_ids + attempt.response.without_eos + phrases[attempt.reward]
        if len(prefix) + task.args.max_new_tokens <= task.lm.context:
            revised += [attempt] * n
            prefixes += [prefix] * n
    problems = [attempt.problem for attempt in revised]
    return list(zip(revised, sample_and_verify(task, problems, purpose, prefixes, **settings)))


def evaluate(task: Task, step: int) -> dict:
    """Generate-then-revise on held-out problems: k attempts each, and one revision of each attempt.

    All shares lie in [0, 1], lengths are tokens with EOS. accuracy is avg@k and accuracy_se its
    standard error over problems; pass_at_k counts a problem that any attempt solves.
    correction_rate = (revised - first) / (1 - first), net of right answers that the revision breaks
    (the paper's table 3; None at accuracy 1). wrong_to_right and right_to_wrong are shares of the
    wrong and of the right attempts. Attempts whose revision does not fit the context are not
    revised: revision_too_long counts them, and the figures of revisions leave them out.
    """
    problems, k = task.held_out, task.args.eval_samples
    settings = {"temperature": task.args.eval_temperature, "top_p": 1.0}
    asked = [p for p in problems for _ in range(k)]
    attempts = sample_and_verify(task, asked, ("eval", step), **settings)
    pairs = revise(task, attempts, 1, ("eval revisions", step), **settings)
    rewards = np.array([attempt.reward for attempt in attempts]).reshape(len(problems), k)
    first = np.array([attempt.reward for attempt, _ in pairs])
    revised = np.array([revision.reward for _, revision in pairs])

    def mean(values):
        return float(np.mean(values)) if len(values) else None

    figures = {
        "problems": len(problems),
        "samples": k,
        "accuracy": mean(rewards),
        "accuracy_se": None,
        "pass_at_k": mean(rewards.max(1)),
        "finished": mean([attempt.response.finished for attempt in attempts]),
        "length": mean([len(attempt.response.ids) for attempt in attempts]),
        "revised_accuracy": mean(revised),
        "correction_rate": None,
        "wrong_to_right": mean(revised[first == 0]),
        "right_to_wrong": mean(1 - revised[first == 1]),
        "revised_finished": mean([revision.response.finished for _, revision in pairs]),
        "revised_length": mean([len(revision.response.ids) for _, revision in pairs]),
        "revision_too_long": len(attempts) - len(pairs),
        "sample": attempts[0].shown(),
    }
    if len(problems) > 1:
        figures["accuracy_se"] = float(rewards.mean(1).std(ddof=1) / math.sqrt(len(problems)))
    if len(first) and first.mean() < 1:
        figures["correction_rate"] = (mean(revised) - mean(first)) / (1 - mean(first))
    if pairs and pairs[0][0] is attempts[0]:
        revision = pairs[0][1]
        figures["sample"] += f"\n  revised [{VERDICTS[revision.reward]}]: {revision.text!r}"
    return figures


# ---------------------------------------------------------------------------------------- optimizer


class Optimizer:
    """AdamW over fp32 weights, whatever the model's dtype. It takes any module.

    At a learning rate of 5e-6 the update of a bf16 weight is below half of its last bit and would
    be rounded away: it needs an fp32 master. A bf16 weight is the rounded upper half of its master,
    so we store only the lower half, 2 bytes per weight instead of 4, and rebuild each master,
    exactly, just before it is updated. fp32 weights are their own masters. Gradients of
    micro-batches are summed in fp32.

    betas, weight_decay (of matrices; biases and norms have none): AdamW's. clip: the largest norm
    of the gradient.
    """

    def __init__(self, model: torch.nn.Module, betas=(0.9, 0.999), weight_decay=0.0, clip=1.0):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.clip = clip
        self.narrow = []  # (bf16 weight, lower half, master, which is empty between steps)
        groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
        for weight in self.weights:
            master = weight
            if weight.dtype == torch.bfloat16:
                weight.grad_dtype = torch.float32  # micro-batches are added up in it
                master = torch.nn.Parameter(torch.empty(0, device=weight.device))
                self.narrow.append((weight, torch.zeros_like(weight, dtype=torch.int16), master))
            groups[weight.dim() < 2]["params"].append(master)
        # the embedding is the largest: its temporary copies come when other gradients are gone
        self.narrow.sort(key=lambda item: item[0].numel())
        # fused: no temporary copy of all weights
        self.adamw = torch.optim.AdamW(groups, lr=0.0, betas=tuple(betas), fused=True)

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """One clipped step with learning rate lr; returns the gradient's norm before clipping.

        Raises FloatingPointError, weights untouched, when that norm is not finite. Without any
        gradient (a step without a token) nothing moves.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.clip).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"the norm of the gradient is {norm}")
        if not norm:
            for weight, _, _ in self.narrow:
                weight.grad = None  # in fp32: the compiler refuses it beside a bf16 weight
            return norm
        for group in self.adamw.param_groups:
            group["lr"] = lr
        # AdamW skips what has no gradient. So all fp32 weights move at once; then one bf16 weight
        # after another gets its master back, hands it the gradient, moves and is split again.
        self.adamw.step()
        # on a CPU the gradients' memory is kept: re-allocating it costs 10% of a step (page faults)
        on_cpu = self.weights[0].device.type == "cpu"
        self.adamw.zero_grad(set_to_none=bool(self.narrow) or not on_cpu)
        for weight, low, master in self.narrow:
            master.data, master.grad, weight.grad = join(weight, low), weight.grad, None
            self.adamw.step()
            upper, lower = split(master)
            weight.copy_(upper)
            low.copy_(lower)
            master.data, master.grad = master.new_empty(0), None
        return norm

    def state_dict(self) -> dict:
        return {"adamw": self.adamw.state_dict(), "low": [low for _, low, _ in self.narrow]}

    def load_state_dict(self, state: dict) -> None:
        """Put a `state_dict` back. The bf16 weights, the upper halves, are saved with the model."""
        self.adamw.load_state_dict(state["adamw"])
        for (_, low, _), saved in zip(self.narrow, state["low"], strict=True):
            low.copy_(saved)


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 -> (the nearest bf16, the remainder in units of fp32's last bit, int16).

    Halves are rounded away from zero, so that the remainder always fits in 16 bits.
    """
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(weight: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The inverse of `split`, exactly."""
    return ((weight.view(torch.int16).int() << 16) + low).view(torch.float32)


def learning_rate(args: Namespace, step: int, total: int) -> float:
    """For optimizer step `step` of 1 ... total: linear warm-up, then cosine to 0 or constant."""
    warmup = math.ceil(args.warmup if args.warmup >= 1 else args.warmup * total)
    if step == 1 and warmup > total:
        warn(f"--lr is not reached: there are {total} steps, --warmup has {warmup}")
    if step <= warmup:
        return args.lr * step / warmup
    if args.lr_schedule == "constant":
        return args.lr
    return args.lr * (0.5 + 0.5 * math.cos(math.pi * (step - 1 - warmup) / (total - warmup)))


def checkpoint_layers(model: torch.nn.Module) -> None:
    """Gradient checkpointing: store each layer's input; the backward pass computes the rest again.
    The method was renamed in transformers 5.2x."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
    # it lets the embedding's output require a gradient, in sampling too, where the compiler would
    # compile the first layer apart from the others; only the reentrant way needs that
    model.disable_input_require_grads()


# -------------------------------------------------------------------------------- several processes

# torchrun starts one process per GPU. All of them run the same code, but each one samples, verifies
# and scores only its share, and only rank 0 writes files. They meet where shares are put together
# (`map_over_ranks`, `in_micro_batches`), and hold the same weights and metrics afterwards. Without
# torchrun there is one process, rank 0, whose share is everything.

HEAD_START = 5  # seconds that rank 0 has to say what went wrong, before the others do


def join_processes(args: Namespace) -> None:
    """Find the other processes of `torchrun --nproc-per-node N script.py ...`, if there are any."""
    if world_size() == 1:
        return
    if args.device not in ("cpu", "cuda"):
        fail(f"torchrun's processes take --device cuda, one GPU each, or cpu, not {args.device}")
    if args.device == "cuda":
        there, wanted = torch.cuda.device_count(), int(os.environ["LOCAL_WORLD_SIZE"])
        if there < wanted:
            fail(f"each of {wanted} processes needs a GPU of its own, torch finds {there} here")
        args.device = f"cuda:{os.environ['LOCAL_RANK']}"
    # gloo for Python objects, which travel over the CPU. Waiting for the slowest one may take long.
    backend = "cpu:gloo,cuda:nccl" if args.device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=6))


def rank() -> int:
    """This process's number, from 0. Only torchrun's variables count: clusters set RANK and
    WORLD_SIZE for other jobs too, and a process that believed them would wait for ever."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else 0


def world_size() -> int:
    """How many processes there are."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def on_rank_0(function: Callable) -> Callable:
    """The other processes do nothing when they call it."""

    @functools.wraps(function)
    def called(*args, **kwargs):
        return None if rank() else function(*args, **kwargs)

    return called


def meet(operation: Callable, *args) -> None:
    """operation(*args) of torch.distributed; if another process has died, this one ends, too."""
    try:
        operation(*args)
    except RuntimeError as error:  # which begins with gloo's own [file:line]
        cause = re.sub(r"^\[.*?\] *", "", last_cause(error)).partition(". ")[0]
        ended = "another process of this run has ended, or cannot be reached"
        fail(f"{ended} ({cause:.200})", 1, at_once=True)


def all_gather(part: list) -> list[list]:
    """The parts of all processes, by rank, on each of them."""
    parts = [part] * world_size()
    if len(parts) > 1:
        meet(dist.all_gather_object, parts, part)
    return parts


def barrier() -> None:
    """Where one process writes what the others read, or have read."""
    all_gather([])


def map_over_ranks(work: Callable[[list], list], items: list) -> list:
    """work(items): each of n processes does every n-th item, and gets the whole result."""
    results = [None] * len(items)
    for i, part in enumerate(all_gather(work(items[rank() :: world_size()]))):
        results[i :: world_size()] = part
    return results


def in_micro_batches(
    model: torch.nn.Module, items: list, lengths: list[int], budget: int, backward: Callable
) -> dict[str, torch.Tensor]:
    """Call backward(a few of the items) until each process has done its share, then add up the
    gradients of all processes.

    lengths: tokens of each item; budget: --micro-tokens. backward adds to the model's gradient, and
    returns values per token by name. Returns these of all items, in the order of the micro-batches,
    not of the items; {} where there is no token.

    Not by DistributedDataParallel: it waits for its own forward, and our losses go round that, so
    that nothing would be added up.
    """
    # every n-th by length, so that all processes have equal work
    by_length = sorted(range(len(items)), key=lambda i: lengths[i])
    mine = sorted(by_length[rank() :: world_size()])
    groups, parts = micro_batches([lengths[i] for i in mine], budget), []
    for group in progress(groups, "training"):
        parts.append(backward([items[mine[k]] for k in group]))
    if world_size() > 1:
        on_cpu = [{name: x.cpu() for name, x in part.items()} for part in parts]
        parts = [part for theirs in all_gather(on_cpu) for part in theirs]
        for weight in model.parameters():
            if weight.requires_grad and parts:
                meet(dist.all_reduce, grad_of(weight))
    names = parts[0] if parts else ()
    return {name: torch.cat([part[name] for part in parts]) for name in names}


# -------------------------------------------------------------------------------------------- a run

# Flags that --resume may change. Those in FREE do not affect the result; those in NOTED may, and
# the change is logged. Model and data may have been moved: they are compared by content.
PLACES = {"model", "dataset", "eval_dataset", "traces", "output", "device", "resume"}
FREE = {"micro_tokens", "gradient_checkpointing", "save_every", "eval_every"} | PLACES
BUDGETS = {"cache_bytes", "training_bytes"}  # no flags: see `fit_memory`
NOTED = {"slots", "lr"} | BUDGETS
ADAPTER = "adapter/adapter_model.safetensors"  # in a model's folder, what PEFT and vLLM read


def setup(args: Namespace, half: bool = False) -> Task:
    """Join torchrun's processes, if there are any; load model, verifier and problems. With
    --eval-only, evaluate and end the program.

    All that can be known to fail later fails here, before the first sample. half: see
    `split_problems`.
    """
    join_processes(args)
    saved = inherit_prompt(args)
    verify_all = load_verifier(args.verifier)
    lm = load_lm(args)
    task = Task(args, lm, verify_all, *split_problems(lm, args, saved, half), saved)
    some = (task.problems + task.held_out)[0]  # a verifier that raises, raises now
    verify_all([""], [some.answer])
    if args.eval_only:
        figures = evaluate(task, 0)
        sample = figures.pop("sample")
        if rank() == 0:
            print(sample, file=sys.stderr)
        print(json.dumps(figures, indent=1))
        raise SystemExit(0)
    print(f"problems: {json.dumps(task.counts)}")
    if args.lora:
        # the seed counts what the model was trained on: stage 2 begins with other factors than 1
        seed = seed_of(args.seed, "lora", len(saved["trained"]))
        with explained(f"--lora cannot be used with {args.model}", ValueError):
            add_lora(lm.model, args.lora, args.lora_alpha, seed)
    if args.gradient_checkpointing:
        checkpoint_layers(lm.model)
    fit_memory(lm, args, task.problems + task.held_out)
    return task


class Run:
    """The output folder: settings.json, metrics.jsonl, checkpoint-STEP/ while it runs, best/ (the
    model of the best evaluation, where that is not the last), and in the end the model itself.

    A run that was killed at any moment goes on from its last checkpoint and ends as if nothing had
    happened: files and folders appear and vanish whole (`write`, `save`, `remove`), and what the
    log has of later steps is dropped. If the final model is there already, the program ends.
    """

    begun = False  # whether a run of this process can be resumed

    def __init__(self, task: Task, traces: list | None = None):
        self.task, self.args, self.folder = task, task.args, task.args.output
        self.lines: list[dict] = []  # of metrics.jsonl
        self.told: set[str] = set()  # warnings are given once
        self.lost = 0  # of the evaluations up to this step no model is kept
        self.parts: dict = {}  # what has a state_dict besides the model
        settings = {
            "flags": dict(vars(task.args)),
            "fingerprint": fingerprint(task, traces),
            "eos_ids": sorted(task.lm.eos_ids),
            "vocab_size": task.lm.vocab_size,
            "context": task.lm.context,
            "counts": task.counts,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        notes = self.check_resume(settings) if task.args.resume else []
        barrier()  # all processes have looked at the folder before one writes
        self.lock = locked(self.folder)
        if rank() == 0:  # whose settings the others may see already
            check_output(self.args)  # again: loading took time, in which another run may have begun
        if (self.folder / "config.json").exists():  # complete: its settings and its log stay
            self.clean_up()  # what a kill left beside the final model
            print(f"{self.folder} is complete")
            raise SystemExit(0)
        self.write("settings.json", json.dumps(settings, indent=1, default=str))  # paths as text
        Run.begun = True
        self.rewind()
        for note in notes:
            self.log("note", self.last_checkpoint(), {"changed": note})

    def check_resume(self, settings: dict) -> list[str]:
        """Fail where a flag would change the run; return what may change but is worth a note."""
        path, now = self.folder / "settings.json", vars(self.args)
        with explained(f"{path} is damaged"):
            before = json.loads(path.read_text())
            flags, hashes = dict(before["flags"]), dict(before["fingerprint"])
            settings["started"] = before["started"]
            for name in BUDGETS:
                if old := flags.get(name):
                    settings["flags"][name] = old  # less room now may be more again next time
                    now[name] = now[name] and min(old, now[name])  # with more room the same slots
        changed = {
            name: f"{name if name in BUDGETS else '--' + name.replace('_', '-')} was {old!r}"
            for name, old in flags.items()
            if now.get(name, old) != old and name not in FREE
        }
        if fixed := [text for name, text in changed.items() if name not in NOTED]:
            fail(f"--resume needs the flags that the run began with: {', '.join(fixed)}")
        for what, value in settings["fingerprint"].items():
            if hashes.get(what) != value:
                fail(f"--resume needs the {what} that the run began with: these are other ones")
        return list(changed.values())

    # the log

    def rewind(self) -> None:
        """Forget what was logged after the last checkpoint: the resumed run logs it again. A line
        that was half written when the run was killed is such a line."""
        path, last = self.folder / "metrics.jsonl", self.last_checkpoint()
        collected, lines = (self.folder / "traces.jsonl").exists(), []
        texts = path.read_text().splitlines() if path.exists() else []
        with suppress(ValueError):
            for text in texts:
                lines.append(json.loads(text))
        for line in lines:
            if collected if line["kind"] == "collect" else line["step"] <= last:
                self.lines.append(line)
        if best_step(lines) > last:  # the model of an evaluation that is forgotten
            self.remove("best")
        if not (self.folder / "best").exists():
            self.lost = last
        self.write(path.name, "".join(json.dumps(line) + "\n" for line in self.lines))

    def log(self, kind: str, step: int, values: dict) -> None:
        """One line for machines, one for people; warnings where the run goes wrong."""
        self.lines.append({"kind": kind, "step": step, **values})
        if rank() == 0:
            with self.writing(), open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(self.lines[-1]) + "\n")
        plain = {k: v for k, v in values.items() if k != "sample" and not isinstance(v, dict)}
        figures = [f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in plain.items()]
        print(f"{kind} {step}  " + "  ".join(figures))
        if "sample" in values:
            print(values["sample"])
        for name, sentence in signs_of_collapse(self.lines).items():
            if name not in self.told:
                self.told.add(name)
                print(f"warning: {sentence}")
        sys.stdout.flush()

    def evaluate(self, step: int, last: bool = False) -> None:
        """Evaluate and log, unless the log has it; keep the best model that is not the last."""
        logged = step in [line["step"] for line in self.lines if line["kind"] == "eval"]
        too_late = step == 0 and self.last_checkpoint()  # the model is no longer what it was then
        if logged or too_late or not self.task.held_out:
            return
        self.log("eval", step, evaluate(self.task, step))
        if step and step == best_step([x for x in self.lines if x["step"] > self.lost]):
            if last:
                self.remove("best")
            else:
                self.save("best")

    # files and folders

    def writing(self):
        """Where the disk may be full; torch and safetensors have their own exceptions for that."""
        full = f"cannot write to {self.folder}, make room and --resume"
        return explained(full, OSError, RuntimeError, SafetensorError, code=1)

    @on_rank_0
    def write(self, name: str, text: str) -> None:
        """A small file, whole or not at all."""
        temporary = self.folder / f"{name}.tmp"
        with self.writing():
            temporary.write_text(text)
            os.replace(temporary, self.folder / name)

    @on_rank_0
    def remove(self, name: str) -> None:
        """A folder, if it is there: renamed first, so that a kill leaves no half of it."""
        doomed = self.folder / "removing"
        shutil.rmtree(doomed, ignore_errors=True)
        if (self.folder / name).is_dir():
            os.replace(self.folder / name, doomed)
            shutil.rmtree(doomed)

    @on_rank_0
    def save(self, name: str, state: dict | None = None) -> None:
        """The model as an ordinary transformers folder, with the training state if there is one:
        written elsewhere and then renamed.

        Adapters are merged, and also saved in a folder of their own: transformers would take a
        model beside an adapter_config.json for their base. A checkpoint has only the adapters.
        """
        temporary, model = self.folder / "saving", self.task.lm.model
        with self.writing():
            shutil.rmtree(temporary, ignore_errors=True)
            if self.args.lora:
                (temporary / "adapter").mkdir(parents=True)
                config = json.dumps(adapter_config(model, self.args.model), indent=1)
                (temporary / "adapter" / "adapter_config.json").write_text(config)
                save_file(adapter_state(model), temporary / ADAPTER)
            if not self.args.lora or state is None:
                model.save_pretrained(temporary, state_dict=merged_state_dict(model))
            self.task.lm.tokenizer.save_pretrained(temporary)
            (temporary / "srt.json").write_text(json.dumps(self.task.saved))
            if state is not None:
                torch.save(state, temporary / "training_state.pt")
            self.remove(name)
            os.replace(temporary, self.folder / name)

    def checkpoints(self) -> list[int]:
        """Their steps, in order. A user's own folder checkpoint-3-mine is ignored."""
        states = self.folder.glob("checkpoint-*/training_state.pt")
        steps = [path.parent.name.removeprefix("checkpoint-") for path in states]
        return sorted(int(step) for step in steps if step.isdecimal())

    def last_checkpoint(self) -> int:
        return max(self.checkpoints(), default=0)

    def restore(self, **parts) -> int:
        """Put the last checkpoint back into the model and `parts` (optimizer, teacher), whose
        states later checkpoints will hold. Returns the number of steps done, 0 without one."""
        self.parts, model, step = parts, self.task.lm.model, self.last_checkpoint()
        self.args.cache_bytes = self.args.training_bytes  # there is an optimizer from now on
        if not step:
            return 0
        path = self.folder / f"checkpoint-{step}"
        with explained(f"{path} is damaged"):  # each format has its own exceptions
            if self.args.lora:
                load_adapter(model, load_file(path / ADAPTER))
            else:
                saved = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=model.dtype)
                model.load_state_dict(saved.state_dict())
            # on the CPU: each part copies what it needs, so that no second state stays on the GPU
            state = torch.load(path / "training_state.pt", map_location="cpu")
            for name, part in parts.items():
                part.load_state_dict(state[name])
        return step

    # the steps

    def begin_step(self, step: int) -> None:
        """Start the clock, and seed dropout."""
        torch.manual_seed(seed_of(self.args.seed, "dropout", step))
        self.started = time.time()

    def end_step(self, step: int, total: int, metrics: dict, tokens: int = 0) -> None:
        """Log step `step` of `total`; evaluate, and write a checkpoint, where one is due: not
        between the --passes on one batch. tokens: what tokens_per_s counts."""
        metrics["seconds"] = time.time() - self.started
        if tokens:
            metrics["tokens_per_s"] = tokens / metrics["seconds"]
        self.log("train", step, metrics)
        self.started = time.time()
        passes = getattr(self.args, "passes", 1)
        if step % passes:
            return

        def due(every: int) -> bool:
            return step // every > (step - passes) // every

        if due(self.args.eval_every) or step == total:
            self.evaluate(step, last=step == total)
        if due(self.args.save_every) and step < total:
            states = {name: part.state_dict() for name, part in self.parts.items()}
            self.save(f"checkpoint-{step}", states)
            for old in self.checkpoints()[:-1]:
                self.remove(f"checkpoint-{old}")

    @on_rank_0
    def finish(self) -> None:
        """The final model into the folder itself, config.json last: with it the run is complete."""
        self.save("final")
        final = self.folder / "final"
        for path in sorted(final.iterdir(), key=lambda p: p.name == "config.json"):
            self.remove(path.name)
            os.replace(path, self.folder / path.name)
        self.clean_up()
        print(f"saved {self.folder}")

    @on_rank_0
    def clean_up(self) -> None:
        for step in self.checkpoints():
            self.remove(f"checkpoint-{step}")
        for name in ("final", "saving", "removing"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        self.lock.close()  # before its file goes: Windows removes no open file
        (self.folder / ".lock").unlink(missing_ok=True)


def fingerprint(task: Task, traces: list | None) -> dict[str, str]:
    """What --resume compares instead of names and places: hashes of some weights, of the problems,
    and of the traces that the run was given."""
    weights = [p.detach().flatten()[:64].float().cpu().numpy() for p in task.lm.model.parameters()]
    problems = [(p.key, p.answer) for p in task.problems + task.held_out]
    parts = {"model": np.concatenate(weights).tobytes(), "problems": repr(problems).encode()}
    parts["traces"] = repr(traces).encode()
    return {name: hashlib.sha256(part).hexdigest()[:16] for name, part in parts.items()}


@on_rank_0
def locked(folder: Path):
    """A file that is open while this process works in the folder, so that no second one does."""
    with explained(f"cannot write to {folder}", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "w")
    try:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another process is at work in {folder}")
    except OSError:
        warn(f"{folder} cannot be locked: start no second process there")
    return file


def best_step(lines: list[dict]) -> int:
    """The step of the best evaluation of a trained model, the first of equals; 0 without one."""
    evals = [line for line in lines if line["kind"] == "eval" and line["step"]]
    return max(evals, key=lambda line: line["accuracy"], default={"step": 0})["step"]


def signs_of_collapse(lines: list[dict]) -> dict[str, str]:
    """What goes wrong in the lines of a log: {name: sentence}, empty while all is well.

    The ways in which self-distillation is known to fail: held-out accuracy falls, responses run
    away or are cut off, or the student's entropy is gone. The last ten steps are compared with the
    first ten.
    """
    signs, window = {}, 10
    evals = [e for e in lines if e["kind"] == "eval" and e["accuracy_se"] is not None]
    if len(evals) > 1:
        last, best = evals[-1], max(evals[:-1], key=lambda e: e["accuracy"])
        error = max(last["accuracy_se"], best["accuracy_se"])
        if best["accuracy"] - last["accuracy"] > 3 * error:
            signs["accuracy"] = (
                f"held-out accuracy fell from {best['accuracy']:.3f} at step {best['step']} to "
                f"{last['accuracy']:.3f} at step {last['step']}, more than three standard errors"
            )
    steps = [e for e in lines if e["kind"] == "train" and e.get("entropy") is not None]
    for name, wrong, what in (
        ("cut_off", lambda old, new: new > old + 0.2, "the share of responses cut off"),
        ("length", lambda old, new: new > 2 * old or new < old / 4, "the length of responses"),
        ("entropy", lambda old, new: new < old / 5 or new > 3 * old, "the student's entropy"),
    ):
        values = [e[name] for e in steps]
        old, new = sum(values[:window]) / window, sum(values[-window:]) / window
        if len(steps) >= 2 * window and wrong(old, new):
            signs[name] = f"{what} went from {old:.3g} to {new:.3g} ({window} steps' means)"
    return signs


# --------------------------------------------- from here on: what can be skipped at a first reading
# -------------------------------------------------------------------------------------------- flags


def number(kind: type, low: float, high: float = sys.float_info.max, above: bool = False):
    """An argparse type: a finite number from `low` (or `above` it) to `high`."""
    limits = f"{'above' if above else 'at least'} {low}"
    limits += f" and at most {high}" if high < sys.float_info.max else ""

    def parse(text: str):
        value = kind(text)
        if (low < value if above else low <= value) and value <= high:
            return value
        raise argparse.ArgumentTypeError(f"must be {limits}, not {text}")

    parse.__name__ = kind.__name__  # argparse names it in "invalid int value"
    return parse


def json_object(text: str) -> dict:
    with suppress(ValueError):
        if isinstance(value := json.loads(text), dict):
            return value
    raise argparse.ArgumentTypeError(f"must be a JSON object, not {text!r:.100}") from None


count, natural = number(int, 1), number(int, 0)
positive, at_least_0 = number(float, 0, above=True), number(float, 0)
share, fraction = number(float, 0, 1, above=True), number(float, 0, 1)  # (0, 1] and [0, 1]
LR = 5e-6  # of full fine-tuning, the paper's; adapters need about ten times that
REQUIRED = object()
# P_r by r, the paper's own. A stage-1 model is saved with its phrases, and stage 2 must use them.
PHRASES = (
    "Wait, this response is not correct, let me start over.",
    "Let me rephrase the above solution.",
)
INHERITED = "(default: what the model was trained with, else"
# name, kind (a list: a choice; bool: a switch), default, help, in the order of a run
FLAGS = [
    ("model", str, REQUIRED, "hub name, or a transformers folder"),
    ("dataset", str, REQUIRED, "FILE (.jsonl .json .csv .parquet), or NAME[:CONFIG][@SPLIT]"),
    ("problem-column", str, None, "(default: problem, question or prompt, whichever is there)"),
    ("answer-column", str, None, "gold answers, or tests (default: answer, solution or tests)"),
    ("problems", count, None, "how many to train on (default: all; stage 1: half, at most 10,000)"),
    ("prompt-suffix", str, None, f"text after every problem {INHERITED} none)"),
    ("prompt-template", str, None, f"text with {{problem}}, no chat template {INHERITED} none)"),
    ("template-kwargs", json_object, None, "of the chat template: '{\"enable_thinking\": false}'"),
    ("phrase-wrong", str, None, f"P_0, after a wrong response {INHERITED} {PHRASES[0]!r})"),
    ("phrase-right", str, None, f"P_1, after a right response {INHERITED} {PHRASES[1]!r})"),
    ("stop-tokens", str.split, None, f"ends of responses besides the EOS {INHERITED} none)"),
    ("force", bool, False, "allow another prompt or phrase than the model was trained with"),
    ("verifier", str, "math", "math, code, or MODULE:FUNCTION(response, answer)"),
    ("max-new-tokens", count, 8192, "limit of one response"),
    ("temperature", at_least_0, 1.0, "of training samples"),
    ("top-p", share, 1.0, "nucleus of training samples; 1 is off"),
    ("slots", count, None, f"sequences decoded at once (default: {SLOTS}; on a GPU what fits)"),
    ("cuda-graphs", ["on", "off"], "on", "on CUDA, sample by compiled layers and replayed graphs"),
    ("batch-size", count, 128, "problems (stage 1: traces) per optimizer step"),
    ("lora", count, None, "train LoRA adapters of this rank, 64 say (default: all weights)"),
    ("lora-alpha", count, None, "their scale is alpha / rank (default: twice the rank)"),
    ("lr", positive, None, f"peak learning rate (default: {LR}; with --lora {10 * LR})"),
    ("lr-schedule", ["cosine", "constant"], "constant", "after the warm-up; cosine falls to 0"),
    ("warmup", at_least_0, 20.0, "linear: steps, or below 1 a share of all steps"),
    ("micro-tokens", count, 16384, "tokens per forward pass: changes memory, not results"),
    ("gradient-checkpointing", bool, False, "store only layers' inputs, recompute the rest"),
    ("eval-dataset", str, None, "held-out problems (default: some of --dataset, always the same)"),
    ("eval-problems", natural, 128, "how many are held out; 0 is off"),
    ("eval-samples", count, 8, "k: attempts per problem, and one revision of each"),
    ("eval-temperature", at_least_0, 0.7, "of the evaluation's samples"),
    ("eval-every", count, 100, "steps between evaluations"),
    ("eval-only", bool, False, "evaluate --model, print JSON, write nothing"),
    ("seed", int, 0, "of sampling and of the order of the data"),
    ("device", str, "cuda" if torch.cuda.is_available() else "cpu", "a torch device"),
    ("dtype", ["auto", "float32", "bfloat16"], "auto", "of the weights; auto: what the GPU has"),
    ("output", Path, Path("runs/out"), "an empty folder, for the model and the run"),
    ("save-every", count, 100, "steps between checkpoints; the last one is kept"),
    ("resume", bool, False, "go on with the run in --output; repeat its flags"),
]


def make_parser(description: str, own: list[tuple], **defaults) -> argparse.ArgumentParser:
    """A parser of FLAGS and a script's own flags. defaults: those that differ from FLAGS'."""
    usage = "%(prog)s --model MODEL --dataset DATASET [flags]"
    parser = argparse.ArgumentParser(description=description, usage=usage, allow_abbrev=False)
    parser.error = fail
    for name, kind, default, text in FLAGS + own:
        if kind is bool:
            parser.add_argument(f"--{name}", action="store_true", help=text)
            continue
        if default not in (None, REQUIRED):
            text += " (default: %(default)s)"
        how = {"choices": kind} if isinstance(kind, list) else {"type": kind}
        required = default is REQUIRED
        parser.add_argument(f"--{name}", default=default, help=text, required=required, **how)
    parser.set_defaults(**defaults)
    return parser


def check_flags(args: Namespace) -> None:
    """Fail early: flags that contradict each other, or an --output that is in use. Fill in the
    defaults that depend on --lora."""
    if args.prompt_template and "{problem}" not in args.prompt_template:
        fail("--prompt-template has no {problem} in it")
    if args.prompt_template and args.template_kwargs:
        fail("--prompt-template replaces the chat template: it has no --template-kwargs")
    arguments = inspect.signature(transformers.PreTrainedTokenizerBase.apply_chat_template)
    if taken := set(args.template_kwargs or ()) & set(arguments.parameters):
        fail(f"--template-kwargs are the template's own switches, not {', '.join(sorted(taken))}")
    for name in ("temperature", "eval_temperature"):
        if 0 < getattr(args, name) < 1e-5:
            fail(f"--{name.replace('_', '-')} is nearly 0: give 0, which takes the likeliest token")
    if args.eval_only and (args.resume or not args.eval_problems):
        fail("--eval-only contradicts --resume and --eval-problems 0")
    if args.lora_alpha and not args.lora:
        fail("--lora-alpha belongs to --lora")
    if args.eval_only:
        return
    with explained(f"cannot use {args.output}", OSError):
        check_output(args)
    if args.lora and not args.lora_alpha:
        args.lora_alpha = 2 * args.lora
    if args.lr is None:
        args.lr = 10 * LR if args.lora else LR
        if args.lora:
            print(f"learning rate {args.lr}: for --lora ten times that of full fine-tuning")


def check_output(args: Namespace) -> None:
    """Fail where the folder holds something that the run would mix with."""
    if args.output.exists() and not args.output.is_dir():
        fail(f"{args.output} is a file: name another --output")
    there = {path.name for path in args.output.iterdir()} if args.output.exists() else set()
    begun = "settings.json" in there
    if args.resume and not begun:
        fail(f"{args.output} holds no run to resume")
    # a run that was killed before it had settings leaves only these two
    if not args.resume and there - {".lock", "settings.json.tmp"}:
        how = "go on with its run with --resume" if begun else "empty it"
        fail(f"{args.output} already holds something: name another --output, or {how}")


# -------------------------------------------------------------------- loading the model, the prompt


def load_lm(args: Namespace) -> LM:
    """The model in --dtype on --device. Fails where it cannot be loaded, sampled from, told when
    to stop, or saved again."""
    name, gpu, mps = args.model, args.device.startswith("cuda"), args.device.startswith("mps")
    if mps and not torch.backends.mps.is_available():
        fail("--device mps: there is no Apple GPU here")
    here = "" if Path(name).is_dir() else " (of the hub: no such folder is here)"
    with explained(f"cannot use the model {name}{here} on {args.device}"):  # it may raise anything
        torch.empty(0, device=args.device)
        if gpu:  # what graphs are captured on, and NCCL works with
            torch.cuda.set_device(torch.device(args.device).index or 0)
        prepare_torch(args.device, compiles=gpu)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        if args.dtype == "auto":  # bfloat16 where a GPU computes in it, which T4 and V100 do not
            has_bfloat16 = gpu and torch.cuda.is_bf16_supported(including_emulation=False)
            args.dtype = "bfloat16" if has_bfloat16 else "float32"
            if gpu and not has_bfloat16:
                warn("this GPU has no bfloat16: float32 weights take twice the memory")
        # scaled_dot_product_attention of Apple's GPUs is silently wrong for strided keys and for
        # masks that several heads share (pytorch#181133, #184180, #195910). On a CPU in bf16 its
        # backward pass is slow: SmolLM2-135M takes 3.3 s with eager attention instead of 4.4 for
        # 16 x 105 tokens, forward and backward; for 4 x 420 it is 4.6 and 4.1. See `sample_all`.
        short = args.device == "cpu" and args.dtype == "bfloat16" and args.max_new_tokens <= SHORT
        attention = "eager" if mps or short else None
        model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=args.dtype, attn_implementation=attention, output_loading_info=True
        )
        if missing := sorted(loaded["missing_keys"]):  # transformers would draw them at random
            raise ValueError(f"its files lack {len(missing)} of its weights, {missing[0]} first")
        model.to(args.device)
        if gpu and args.cuda_graphs == "on":
            pack_weights(model)
        check_supported(model)
        OutputLayer(model)
    if gpu and not hasattr(sdpa_attention, "pack_gqa"):
        slow = "keys and values for every query head, and samples up to 10 times slower than 5.23"
        warn(f"transformers {transformers.__version__} copies {slow}")
    if not args.prompt_template and not tokenizer.chat_template:
        example = r"$'Question: {problem}\nAnswer: '"
        fail(f"{name} has no chat template: give --prompt-template, in bash for example {example}")
    template = args.prompt_template or str(tokenizer.chat_template)
    if unknown := [switch for switch in args.template_kwargs if switch not in template]:
        warn(f"the template of {name} ignores --template-kwargs {', '.join(unknown)!r:.100}")
    stops = [tokenizer.convert_tokens_to_ids(token) for token in args.stop_tokens]
    for token, i in zip(args.stop_tokens, stops):
        if i is None or i == tokenizer.unk_token_id:
            fail(f"{token!r} of --stop-tokens is no token of {name}")
    config = model.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if not all(isinstance(i, int | None) for i in ends):
        fail(f"eos_token_id {config.eos_token_id!r} in {name}'s generation_config.json is no id")
    eos_ids = {tokenizer.eos_token_id, *ends, *stops} - {None}
    size = max(tokenizer.get_vocab().values()) + 1  # len(tokenizer), unless ids have gaps
    if min(eos_ids, default=math.inf) >= size:
        fail(f"{name} has no EOS token, so responses could not end: give --stop-tokens")
    if stops:
        config.eos_token_id = sorted(eos_ids)  # for whoever loads the output
    try:
        config.validate(strict=True)
    except ValueError as error:  # transformers loads it, and would refuse to save it in the end
        warn(f"the generation config cannot be saved, only its EOS is kept: {last_cause(error)}")
        kept = {"eos_token_id": config.eos_token_id, "bos_token_id": config.bos_token_id}
        model.generation_config = transformers.GenerationConfig(**kept)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is None:
        fail(f"{name} does not say how long its context is (max_position_embeddings)")
    rows = model.get_output_embeddings().weight.shape[0]
    if rows < size:
        fail(f"{name} has {rows} embeddings for the {size} tokens of its tokenizer")
    return LM(model, tokenizer, eos_ids, size, context)


def prepare_torch(device: str, compiles: bool) -> None:
    """How torch attends and compiles in this process."""
    # cuDNN's attention plans anew for every shape, and ours change at every step. (The sampler
    # allows it where shapes are few.)
    torch.backends.cuda.enable_cudnn_sdp(False)
    if not compiles:
        return
    # Compiled layers call attention as it is: compiled, transformers copies keys and values for
    # every query head, and torch does not choose cuDNN.
    attention = torch.compiler.disable(sdpa_attention.sdpa_attention_forward)
    transformers.AttentionInterface.register("sdpa", attention)
    one = torch.ones(1, device=device)
    try:
        torch.compile(torch.neg)(one)
    except Exception as error:  # Triton needs a C compiler
        warn(f"nothing is compiled here, which makes it slower: {last_cause(error)}")
        torch._dynamo.config.disable = True
    torch._dynamo.config.recompile_limit = 64  # 8 is not much for all temperatures and batches
    torch._dynamo.config.suppress_errors = True  # from here on torch says why, and goes on without


def check_is_there(name: str, what: str) -> None:
    """Fail where it can only be a folder, and there is none. It comes before the first look at the
    hub, which takes more than a minute where there is no network."""
    path = Path(name)
    if path.is_file() or not name:
        fail(f"{name!r} is no {what} folder")
    if (path / "settings.json").exists() and not (path / "config.json").exists():
        fail(
            f"{name} holds an unfinished run, which --resume goes on with (its best/ may be used), "
            "or only traces, which srt.py --traces takes"
        )
    like_a_folder = name.startswith((".", "/", "~")) or name.count("/") > 1
    # runs/typo looks like a name of the hub, but there is a folder runs
    if not path.is_dir() and (like_a_folder or "/" in name and path.parent.is_dir()):
        fail(f"no such {what} folder: {name}")


# What a prompt is made of: saved with the model, so that a later stage asks as this one did.
PROMPT_DEFAULTS = {
    "prompt_suffix": "",
    "prompt_template": "",
    "template_kwargs": {},
    "stop_tokens": [],
    "phrase_wrong": PHRASES[0],
    "phrase_right": PHRASES[1],
}


def inherit_prompt(args: Namespace) -> dict:
    """Fill the prompt's flags that were not given from the srt.json beside the model.

    Returns what the output's srt.json will say: "prompt" (these flags), "problems" (keys of those
    that stage 1 used and stage 2 leaves out) and "trained" (keys of all that this model or an
    ancestor was trained on). Fails when a flag contradicts the model's, unless --force is given.
    """
    check_is_there(args.model, "model")
    try:
        path = transformers.utils.cached_file(args.model, "srt.json")
    except OSError:  # the model has none; or there is no such model, which load_lm says
        path = None
    with explained(f"{path} is damaged"):
        saved = dict(json.loads(Path(path).read_text())) if path else {}
        prompt = dict(saved.get("prompt", {}))
        for name, value in {"problems": [], "trained": [], **PROMPT_DEFAULTS}.items():
            found = prompt.get(name, value) if name in PROMPT_DEFAULTS else saved.get(name, value)
            if type(found) is not type(value) or {type(x) for x in found} - {str}:
                raise TypeError(f"{name} is {found!r:.100}")
    for name, default in PROMPT_DEFAULTS.items():
        given, before = getattr(args, name), prompt.get(name, default)
        if given is None:
            setattr(args, name, before)
        elif prompt and given != before and not args.force:
            was = f"{args.model} was trained with {before!r}"
            flag = name.replace("_", "-")
            fail(f"--{flag} is {given!r}, but {was}: drop the flag, or add --force")
    saved["prompt"] = {name: getattr(args, name) for name in PROMPT_DEFAULTS}
    return {"problems": [], "trained": [], **saved}


def render(lm: LM, problem: str, args: Namespace) -> list[int]:
    """prompt_ids of a problem: only the user's side, up to where the assistant begins to write.

    What the assistant writes is appended as ids and never rendered: some templates would insert an
    empty think block, or strip the blank lines at its end.
    """
    text = problem + args.prompt_suffix
    if args.prompt_template:
        text = args.prompt_template.replace("{problem}", text)
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        # the tokenizer may want a BOS; an EOS, which some add as well, would end the prompt
        bos = lm.tokenizer.bos_token_id
        wanted = bos is not None and bos in lm.tokenizer("")["input_ids"]
        return [bos] + ids if wanted and ids[:1] != [bos] else ids
    # templates that show today's date show this day, or a prompt would be another one tomorrow
    day = time.strptime("2026-01-01", "%Y-%m-%d")
    pattern = r"""strftime_now\(\s*(['"])(.*?)\1\s*\)"""
    with explained("the chat template does not take this prompt"):  # it may raise what it likes
        template = lm.tokenizer.get_chat_template()
        template = re.sub(pattern, lambda match: repr(time.strftime(match[2], day)), template)
        return lm.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}],
            chat_template=template,
            add_generation_prompt=True,
            return_dict=True,
            **args.template_kwargs,
        )["input_ids"]


# ------------------------------------------------------------------- loading problems, the verifier

DATA_FILES = (".jsonl", ".json", ".csv", ".parquet")


def load_rows(name: str, default_split: str) -> dict[str, Sequence]:
    """The columns of a data set: a file, or NAME[:CONFIG][@SPLIT] of a folder or the hub.

    A single file is read here. The library, which reads folders, guesses a type for each column, so
    that 007 becomes 7 and 2020-01-01 a date, and may take an old copy of a changed file.
    """
    with explained(f"cannot load the data set {name}"):  # each reader has its own exceptions
        path = Path(name)
        if path.suffix in DATA_FILES and not path.is_file():
            fail(f"no such data file: {name}")
        if path.is_file() and path.suffix not in DATA_FILES:
            fail(f"{name} is no data file of a known form: {', '.join(DATA_FILES)}")
        if path.suffix in DATA_FILES and path.suffix != ".parquet":
            rows = csv_rows(path) if path.suffix == ".csv" else json_rows(path)
            return {key: [row.get(key) for row in rows] for key in dict.fromkeys(chain(*rows))}
        import datasets  # here, so that all the rest runs where it is not installed
        from pyarrow import parquet  # what it reads with

        datasets.utils.logging.set_verbosity(50)  # what it logs as an error it also raises
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()
        if path.is_file():
            table = datasets.Dataset(parquet.ParquetFile(path).read())
        else:
            rest, _, split = name.partition("@")
            rest, _, config = rest.partition(":") if not Path(rest).exists() else (rest, "", "")
            check_is_there(rest, "data set")
            table = datasets.load_dataset(rest, config or None, split=split or default_split)
        return {key: table[key] for key in table.column_names}


def text_of(path: Path) -> str:
    data = path.read_bytes()
    try:
        return str(data, "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"line {line}: {error}") from None


def csv_rows(path: Path) -> list[dict]:
    """The rows of a .csv file, all of it text."""
    csv.field_size_limit(2**31 - 1)
    reader, rows = csv.DictReader(io.StringIO(text_of(path), newline=""), strict=True), []
    names = [name for name in reader.fieldnames or () if name]
    if len({*names}) < len(names):
        raise ValueError(f"two columns have one name: {', '.join(names)}")
    try:
        for row in reader:
            if None in row:
                raise ValueError(f"line {reader.line_num}: more fields than in the header")
            rows.append(row)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num + 1}: {error}") from None
    return rows


def json_rows(path: Path) -> list[dict]:
    """The objects of a .jsonl or .json file: one after the other, in lists or not."""
    text, at, rows = text_of(path), 0, []
    decoder, blanks = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")
    try:
        while (at := blanks.match(text, at).end()) < len(text):
            value, end = decoder.raw_decode(text, at)
            found = value if isinstance(value, list) else [value]
            if not all(isinstance(row, dict) for row in found):
                raise ValueError(f"must be a JSON object, not {text[at:end]!r:.100}")
            rows.extend(found)
            at = end
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {text.count(chr(10), 0, at) + 1}: {error}") from None
    return rows


def is_empty(answer: object) -> bool:
    """Whether a row has no gold answer; a blank among numbers is nan, which is not itself."""
    if isinstance(answer, str):
        return not answer.strip()
    return answer in (None, []) or answer != answer


def checked_answer(answer: object, verifier_name: str) -> object:
    """A gold answer in the form that its verifier takes; ValueError or TypeError for another."""
    if verifier_name == "math":
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise TypeError(f"a gold answer is text or a number, not {answer!r}")
        if isinstance(answer, float) and not abs(answer) < 2**53:  # nan, inf, or digits are lost
            raise ValueError(f"{answer!r} is no exact number: store such answers as text")
        return str(answer)
    if verifier_name == "code":
        try:
            tests = json.loads(answer) if isinstance(answer, str) else answer
        except ValueError:
            raise ValueError(f"tests are a list in JSON, not {answer!r:.60}") from None
        verifier.check_tests(tests)
        return tests
    json.dumps(answer)  # traces are saved as JSON
    return answer


def with_short_floats(column: Sequence) -> list:
    """The values of a column, and 0.1 for what float32 makes of it, 0.10000000149011612."""
    kind = getattr(getattr(column, "features", None), "dtype", "")
    if kind not in ("float16", "float32"):
        return list(column)
    short = np.dtype(kind).type
    return [x if x is None or x % 1 == 0 else float(str(short(x))) for x in column]


def load_problems(args: Namespace, name: str, split: str = "train") -> tuple[dict, dict]:
    """The distinct problems of a data set, {key: (text, answer)}, and counts of its rows."""
    rows = load_rows(name, split)

    def column(given: str | None, usual: tuple[str, ...], flag: str):
        for candidate in [given] if given else usual:
            if candidate in rows:
                with explained(f"cannot load the data set {name}"):  # it is decoded only now
                    return with_short_floats(rows[candidate])
        there = ", ".join(rows) + ("" if given else f": give {flag}")
        fail(f"{name} has no column {given or ' or '.join(usual)}; it has {there}")

    if not max(map(len, rows.values()), default=0):
        fail(f"the data set {name} is empty")
    texts = column(args.problem_column, ("problem", "question", "prompt"), "--problem-column")
    answers = column(args.answer_column, ("answer", "solution", "tests"), "--answer-column")
    problems, counts = {}, {"rows": len(texts), "incomplete": 0, "duplicates": 0}
    for i, (text, answer) in enumerate(zip(texts, answers), 1):
        if not isinstance(text, str) or not text.strip() or is_empty(answer):
            counts["incomplete"] += 1
            continue
        row = f"row {i} of {name}, for --verifier {args.verifier}"
        with explained(row, TypeError, ValueError, SyntaxError, RecursionError):
            if (key := key_of(text)) in problems:
                counts["duplicates"] += 1
            else:
                problems[key] = text, checked_answer(answer, args.verifier)
    if not problems:
        kinds = sorted({type(text).__name__ for text in texts} - {"str", "NoneType"})
        but = f" (problems are text, these are {', '.join(kinds)})" if kinds else ""
        fail(f"all {len(texts)} rows of {name} are incomplete: no problem, or no answer{but}")
    return problems, counts


def split_problems(lm: LM, args: Namespace, saved: dict, half: bool) -> tuple[list, list, dict]:
    """(problems to train on, held-out problems, counts).

    Held out are the first --eval-problems by a hash of the text, before anything is dropped: the
    same ones in every run, whatever its seed and lengths. None of them is ever trained on, and one
    that the model has been trained on is not evaluated. half: train on half of the rest, at most
    10,000, where --problems does not say how many (the paper's split).
    """
    rows, counts = load_problems(args, args.dataset)
    candidates = rows
    if args.eval_dataset:
        candidates, more = load_problems(args, args.eval_dataset, "test")
        counts.update({f"eval_{name}": n for name, n in more.items() if n})
    kept_apart = sorted(candidates)[: args.eval_problems]
    unseen = sorted(set(kept_apart) - set(saved["trained"]))
    if seen := len(kept_apart) - len(unseen):
        counts["eval_trained_on"] = seen
        left = f"{seen} of {len(kept_apart)} held-out problems are left out"
        warn(f"{left}: {args.model} was trained on them")
    unused = sorted(rows.keys() - set(kept_apart) - set(saved["problems"]))

    def fitting(rows: dict, keys: list[str], name: str) -> list[Problem]:
        """Never cut: a problem without its beginning is another problem."""
        bar = progress(keys, "tokenizing")
        problems = [Problem(*rows[key], render(lm, rows[key][0], args)) for key in bar]
        if empty := [p for p in problems if not p.prompt_ids]:
            fail(f"the tokenizer of {args.model} makes no token of {empty[0].text!r:.60}")
        short = [p for p in problems if len(p.prompt_ids) + args.max_new_tokens <= lm.context]
        counts[name] = len(problems) - len(short)
        return short

    held_out = fitting(candidates, unseen, "eval_too_long")
    problems = fitting(rows, [] if args.eval_only else unused, "too_long")
    prompts = [p.prompt_ids for p in problems + held_out]
    if len(prompts) > 1 and min(prompts) == max(prompts):
        fail(f"template and tokenizer of {args.model} make the same prompt of every problem")
    random.Random(seed_of(args.seed, "problems")).shuffle(problems)
    default = min((len(problems) + 1) // 2, 10_000) if half else None
    problems = problems[: args.problems or default]
    counts.update(held_out=len(held_out), training=len(problems))
    wanted, kind = (held_out, "evaluate") if args.eval_only else (problems, "train on")
    if not wanted and not getattr(args, "traces", None):
        fail(
            f"no problem is left to {kind}: {len(kept_apart)} are held out (--eval-problems), "
            f"{len(saved['problems'])} were used by stage 1, of {json.dumps(counts)}; a prompt "
            f"and --max-new-tokens {args.max_new_tokens} must fit {lm.context} tokens"
        )
    return problems, held_out, counts


def load_verifier(name: str) -> Callable[[list[str], list], list[int]]:
    """verify_all(responses, answers) -> r in {0, 1} for each."""
    if name == "math":
        verify = verifier.verify
    elif name == "code":
        verify = verifier.verify_code
        if sys.platform != "linux":
            fail("--verifier code needs Linux, whose kernel contains what it runs")
        if not verify("```python\npass\n```", ["assert True"]):
            fail("--verifier code cannot run programs on this machine: a right one came out wrong")
    else:
        unknown = f"--verifier {name} is neither math nor code nor a module:function to be imported"
        with explained(unknown, Exception, SystemExit):  # importing runs the user's code
            sys.path.append(os.getcwd())
            module, function = name.split(":")
            imported, path = importlib.import_module(module), Path(*module.split("."))
            taken = getattr(imported, "__file__", None) or "a module of Python's"
            here = [x for x in (path.with_suffix(".py"), path / "__init__.py") if x.exists()]
            if here and Path(taken).resolve() not in [x.resolve() for x in here]:
                raise ImportError(f"{taken} is {module} already: rename {here[0]}")
            verify = getattr(imported, function)

    def verdict_of(pair: tuple[str, object]) -> int:
        try:
            found = verify(*pair)
            verdict = int(found) if found in (0, 1) else None  # True and False are 1 and 0
        except (Exception, SystemExit) as error:  # the user's code: say where
            at = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(at.filename).name}:{at.lineno}"
            cause = f"{type(error).__name__} ({where}): {last_cause(error)}"
            fail(f"--verifier {name} raised {cause}")
        if verdict is None:
            fail(f"--verifier {name} returned {found!r}: True or False is wanted")
        return verdict

    def verdicts_of(pairs: list[tuple]) -> list[int]:
        if name != "code":
            return [verdict_of(pair) for pair in pairs]
        # code runs in other processes: as many at once as there are cores
        here = int(os.environ["LOCAL_WORLD_SIZE"]) if world_size() > 1 else 1
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) // here)) as pool:
            return list(progress(pool.map(verdict_of, pairs), "verifying", total=len(pairs)))

    return lambda responses, answers: map_over_ranks(verdicts_of, list(zip(responses, answers)))


# ------------------------------------------------------------------------------------------- memory


def estimate_memory(lm: LM, args: Namespace, longest_prompt: int) -> dict[str, int]:
    """Where a run's memory goes at most, in bytes by part (table: tests/memory_table.py).

    Every response is taken to be as long as --max-new-tokens allows. A run without --teacher is
    stage 1. The activations are those of a Llama-like layer, or of one with experts. "slot" is the
    cache of one sequence, the longest: a revision.
    """
    teacher = getattr(args, "teacher", None)
    config, size, cached = lm.model.config, lm.model.dtype.itemsize, cache_bytes_per_token(lm.model)
    parameters = sum(p.numel() for p in lm.model.parameters())
    # with LoRA only the adapters are trained, in fp32, and the base teacher takes nothing
    adapters = sum(factor.numel() for factor in adapter_state(lm.model).values())
    trained, in_fp32 = adapters or parameters, size == 4 or adapters > 0
    copies = {"base": 0 if adapters else size, "ema": 4 if in_fp32 else 6}
    response = longest_prompt + args.max_new_tokens  # x + y
    revision = response + max(map(len, lm.phrases(args))) + args.max_new_tokens
    revision = min(revision, lm.context)
    # tokens of one forward and backward pass; in stage 2 the student reads only x + y
    length = response if teacher else revision
    tokens = min(args.batch_size * length, max(args.micro_tokens, length))
    layers, width, heads = config.num_hidden_layers, config.hidden_size, config.num_attention_heads
    queries = heads * (getattr(config, "head_dim", None) or width // heads)
    keys = cached // (2 * layers * size)
    inner = getattr(config, "moe_intermediate_size", None)
    inner = inner or getattr(config, "intermediate_size", None) or 4 * width
    experts = getattr(config, "num_experts_per_tok", None) or 0
    shared = getattr(config, "shared_expert_intermediate_size", None) or 0
    inner = inner * max(1, experts) + shared
    layer = (8 * width + 5 * (queries + keys) + 4 * inner + 3 * experts * width) * size
    per_token = layers * width * size + layer if args.gradient_checkpointing else layers * layer
    per_token += (3 * inner + 2 * width) * size  # the gradients inside the layer that is at work
    chunk, chunks = CHUNK.get(lm.model.device.type, CHUNK["cuda"])
    # fp32 tensors of a chunk of logits, tensors of a block: as it is, and compiled, as on CUDA
    of_chunk, of_block = (12, 2) if lm.model.device.type in ("cpu", "mps") else (8, 3)
    return {
        "weights": (parameters - adapters) * size + adapters * 4,
        "optimizer": trained * (8 if in_fp32 else 10),
        "gradients": trained * 4,
        "teacher": trained * copies.get(teacher, 0),
        "activations": tokens * per_token,
        "logits": (of_chunk * 4 + of_block * chunks * size) * chunk,
        "slot": cached * revision,
    }


def fit_memory(lm: LM, args: Namespace, problems: list[Problem]) -> None:
    """Say what the run needs and what to lower, and divide up a GPU's memory.

    A cache gets `cache_bytes`: nine tenths of the card, less where others use it, without the
    weights, and from `Run.restore` on, with optimizer and teacher, `training_bytes`. Both are saved
    for --resume, which then samples with the same slots. On a CPU they are None: no limit.
    """
    longest = max(len(p.prompt_ids) for p in problems)
    parts = estimate_memory(lm, args, longest)
    standing = parts["weights"] + parts["optimizer"] + parts["teacher"]
    training = standing + parts["gradients"] + parts["activations"] + parts["logits"]
    args.cache_bytes, args.training_bytes, available = None, None, math.inf
    if lm.model.device.type == "cuda":
        free, card = torch.cuda.mem_get_info(lm.model.device)
        available = free + torch.cuda.memory_reserved(lm.model.device)
        room = int(min(0.9 * card, 0.95 * available))
        args.cache_bytes, args.training_bytes = room - parts["weights"], room - standing
    slots = slots_that_fit(args, parts["slot"], args.training_bytes)
    sampling = standing + slots * parts["slot"]
    needed = f"training {training / 1e9:.3g}, sampling {sampling / 1e9:.3g} at {slots} slots"
    figures = ", ".join(f"{name} {n / 1e9:.3g}" for name, n in parts.items())
    print(f"memory at most, GB: {needed} of full length; {figures}")
    if training > available:
        warn("training may not fit: lower --micro-tokens, or add --gradient-checkpointing")
    if sampling > available:
        warn("sampling may not fit: lower --slots or --max-new-tokens")


def slots_that_fit(args: Namespace, slot: int, cache_bytes: int | None) -> int:
    """How many sequences are decoded at once: --slots, or as many as fit, `slot` bytes each. Not
    the sampler's choice by what is free at that moment: this one is the same after --resume."""
    if args.slots or cache_bytes is None:
        return args.slots or SLOTS
    return max(1, min(MAX_SLOTS, cache_bytes // slot))


# ------------------------------------------------------------------------------- how a program ends


def fail(message: str, code: int = 2, at_once: bool = False) -> NoReturn:
    """End the program with one line on stderr. Code 2: the user's to mend; 1: the run broke."""
    if rank() and not at_once:
        # Most failures are those of all processes: rank 0 says so, and torchrun ends the others.
        time.sleep(HEAD_START)
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(code)


def warn(message: str) -> None:
    if rank() == 0:
        print(f"warning: {message}", file=sys.stderr, flush=True)


def last_cause(error: BaseException) -> str:
    """The first line of the innermost exception: libraries wrap the one that says what is wrong.
    Where that line ends with a colon, the second one belongs to it."""
    while inner := error.__cause__ or (not error.__suppress_context__ and error.__context__):
        error = inner
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].rstrip().endswith(":") else lines[0]


@contextmanager
def explained(message: str, *errors: type[Exception], code: int = 2):
    """Turn these exceptions (default: all) into `fail(message: cause)`."""
    errors = errors or (Exception,)
    try:
        yield
    except errors as error:
        if isinstance(error, torch.OutOfMemoryError) and Run.begun:
            raise  # `entry` says what to lower
        fail(f"{message}: {last_cause(error)}", code)


def progress(items: Iterable, label: str, **settings) -> tqdm:
    """A bar on a terminal, once it takes more than two seconds; nothing in a log file."""
    hidden = True if rank() else None  # None: where there is no terminal
    return tqdm(items, desc=label, delay=2, leave=False, disable=hidden, **settings)


def entry(main: Callable) -> None:
    """Call main(); turn what a user can mend into one line on stderr and an exit code."""
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    for stream in (sys.stdout, sys.stderr):  # a log on Windows takes only some characters
        stream.reconfigure(errors="backslashreplace")
    if rank():
        sys.stdout = open(os.devnull, "w")
    Run.begun = False
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise  # else nothing went wrong: --eval-only, or a complete run
    except FloatingPointError as error:
        again = "; --resume with a lower --lr goes on from the last checkpoint, if there is one"
        fail(f"{error}{again if Run.begun else ''}", 1)
    except torch.OutOfMemoryError:
        again = "--resume with " if Run.begun else ""
        fail(f"out of memory: {again}lower --slots (sampling) or --micro-tokens (training)", 1)
    except KeyboardInterrupt:
        if rank():  # rank 0 says so, and torchrun waits for this one
            raise SystemExit(130) from None
        again = "; the same command with --resume goes on from the last checkpoint"
        fail("interrupted" + (again if Run.begun or "--resume" in sys.argv else ""), 130)
    if dist.is_initialized():
        barrier()  # rank 0 may still be writing, and torchrun ends it if another one breaks
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # gloo's threads abort Python's own way out once in some 20 runs
