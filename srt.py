"""Stage 1 of SD-Zero, Self-Revision Training (arXiv 2604.12002, section 2.1; METHOD.md equations (1) to (3)): teach a model to revise.

    for each problem x:   sample y_init ~ pi(. | x)                          attempt
                          r = verify(y_init)                                 0 or 1
                          sample y_rev ~ pi(. | x, y_init, P_r)              revise, in the same assistant turn
                          keep (x, y_init, P_r, y_rev) if y_rev verifies
    fine-tune on          L_SRT = - log pi(y_rev | x, y_init, P_r) - log pi(y_init, P_r, y_rev | x)

    python srt.py --model runs/toy/base --dataset runs/toy/stage1.jsonl --max-new-tokens 64 --output runs/toy/srt       (small, CPU)
    python srt.py --model Qwen/Qwen3-4B-Instruct-2507 --dataset open-r1/OpenR1-Math-220k --output runs/srt              (real, one GPU)

To read it like the algorithm box start at `main`, at the end. In front of it, in the order of the run: flags, model, problems, sampling,
evaluation, optimizer, checkpoints (all of that shared with sdzero.py), then the two halves of stage 1, `collect` and `train`.

Departures from the paper, each a flag: the held-out evaluation (the paper has separate benchmarks); traces that no context can hold are
skipped and counted, never cut. Letters in shapes: B sequences, T tokens of the longest one, N tokens in the loss, D hidden size.
"""

import argparse
import hashlib
import importlib
import json
import logging
import math
import os
import random
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from tqdm import tqdm

import verifier
from losses import CHUNK, OutputLayer, backward_by_chunks, token_logprobs
from rollout import Rollout, check_supported, generate, prefill

PHRASES = ("Wait, this response is not correct, let me start over.", "Let me rephrase the above solution.")  # P_r by r: the paper's
WEIGHTS = {"both": (1, 2), "generation": (1, 1), "revision": (0, 1)}  # of y_init and P_r, and of y_rev, in the loss: see `srt_loss`
PROMPT_DEFAULTS = {"prompt_suffix": "", "system": "", "prompt_template": "", "template_kwargs": {},
                   "phrase_wrong": PHRASES[0], "phrase_right": PHRASES[1]}  # fmt: skip
DATA_FILES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


class BadInput(Exception):
    """Something that the user has to change: printed as one line, exit code 2."""


class Stopped(Exception):
    """The run cannot go on, its last checkpoint stands: printed as one line, exit code 1."""


# ---------------------------------------------------------------------------------------------------------------------- flags


class Help(argparse.HelpFormatter):
    def _get_help_string(self, action):  # the library's own formatter would add "(default: None)" as well
        return action.help + ("" if action.default in (None, False, argparse.SUPPRESS) else " (default: %(default)s)")


class Parser(argparse.ArgumentParser):
    def __init__(self, description: str):
        super().__init__(
            description=description, usage="%(prog)s --model MODEL --dataset DATASET [flags]", formatter_class=Help, allow_abbrev=False
        )

    def error(self, message):
        raise BadInput(message)


def add_arguments(parser, *, max_new_tokens, temperature, problems, batch_size, lr_schedule, warmup, weight_decay, betas, output):
    """The flags that both scripts have, in the order of the run; the defaults that differ are the arguments."""
    add = parser.add_argument
    add("--model", required=True, help="name on the hub, or a transformers folder")
    add("--dataset", required=True, help="name on the hub, a folder, or a .jsonl, .json, .csv or .parquet file")
    add("--dataset-config", help="configuration of a hub data set")
    add("--split", help="split of --dataset (default: train)")
    add("--problem-column", help="default: problem, question or prompt, whichever is there")
    add("--answer-column", help="gold answers or solutions; for --verifier code the tests (default: answer, solution or tests)")
    add("--problems", type=int, help=f"how many problems to train on (default: {problems})")
    add("--prompt-suffix", help="text behind every problem in the user's turn (default: none, or what the model's srt.json says)")
    add("--system", help="system message (default: likewise)")
    add("--prompt-template", help="text with {problem} in it, instead of the tokenizer's chat template (default: likewise)")
    add(
        "--template-kwargs",
        type=json.loads,
        help="switches of the chat template, as JSON: '{\"enable_thinking\": false}' (default: likewise)",
    )
    add("--phrase-wrong", help=f"P_0, appended to a wrong response (default: likewise; else {PHRASES[0]!r})")
    add("--phrase-right", help=f"P_1, appended to a right response (default: likewise; else {PHRASES[1]!r})")
    add(
        "--force",
        action="store_true",
        help="allow a prompt or phrase other than the one that the model's srt.json says it was trained with",
    )
    add("--verifier", default="math", help="math, code, or module:function of your own, called with (response, answer)")
    add("--max-length", type=int, help="tokens of the longest sequence, problem and all (default: the model's context)")
    add("--max-new-tokens", type=int, default=max_new_tokens, help="tokens of one response at most")
    add("--temperature", type=float, default=temperature, help="of the training samples")
    add("--top-p", type=float, default=1.0, help="nucleus of the training samples; 1 is off")
    add("--slots", type=int, default=64, help="sequences decoded at once: lower it if sampling runs out of memory")
    add("--batch-size", type=int, default=batch_size, help="of an optimizer step")
    add("--lr", type=float, default=5e-6, help="peak learning rate of AdamW")
    add("--lr-schedule", choices=["cosine", "constant"], default=lr_schedule, help="after the warm-up; cosine ends at 0")
    add("--warmup", type=float, default=warmup, help="linear warm-up: steps, or below 1 a share of all steps")
    add("--weight-decay", type=float, default=weight_decay, help="of matrices; biases and norms have none")
    add("--betas", type=float, nargs=2, default=betas, help="of AdamW")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--micro-tokens", type=int, default=16384, help="tokens of one forward and backward pass; changes memory, not the result")
    add("--gradient-checkpointing", action="store_true", help="keep the layers' inputs alone and compute the rest twice")
    add("--eval-dataset", help="held-out problems from elsewhere (default: held out of --dataset, the same ones in every run)")
    add("--eval-split", help="their split (default: test, or train of a file)")
    add("--eval-problems", type=int, default=128, help="held-out problems; 0: no evaluation")
    add("--eval-samples", type=int, default=8, help="k: samples a problem, and one revision of each")
    add("--eval-temperature", type=float, default=0.7, help="of the evaluation's samples")
    add(
        "--eval-every",
        type=int,
        default=100,
        help="optimizer steps between evaluations; there is one before and one after training as well",
    )
    add("--eval-only", action="store_true", help="evaluate --model, print the figures as JSON, write nothing")
    add("--seed", type=int, default=0, help="of all sampling and of the data's order")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="torch device")
    add("--dtype", choices=["auto", "float32", "bfloat16"], default="auto", help="of the weights; auto: bfloat16 on a GPU, where the "
        "optimizer keeps fp32 masters, else float32")  # fmt: skip
    add("--output", type=Path, default=Path(output), help="folder for the model and the run's files; must not hold anything")
    add("--save-every", type=int, default=100, help="optimizer steps between checkpoints; the last one is kept")
    add("--resume", action="store_true", help="go on with the run in --output from its last checkpoint (repeat its flags)")


def check_arguments(args) -> None:
    """Raise BadInput for values outside their range, and for flags that contradict each other."""
    for name in ("max_new_tokens", "slots", "batch_size", "micro_tokens", "eval_samples", "eval_every", "save_every", "lr", "clip"):
        if getattr(args, name) <= 0:
            raise BadInput(f"--{name.replace('_', '-')} must be positive, not {getattr(args, name)}")
    for name in ("temperature", "eval_temperature", "warmup", "weight_decay", "eval_problems"):
        if getattr(args, name) < 0:
            raise BadInput(f"--{name.replace('_', '-')} must not be negative")
    if args.problems is not None and args.problems < 1:
        raise BadInput("--problems must be positive")
    if not isinstance(args.template_kwargs, dict | None):
        raise BadInput("--template-kwargs must be a JSON object")
    if not 0 < args.top_p <= 1:
        raise BadInput("--top-p must lie above 0 and not above 1")
    if args.prompt_template and "{problem}" not in args.prompt_template:
        raise BadInput("--prompt-template has no {problem} in it")
    if args.prompt_template and (args.system or args.template_kwargs):
        raise BadInput("--prompt-template replaces the chat template: --system and --template-kwargs have no place in it")
    if args.eval_only and (args.resume or not args.eval_problems):
        raise BadInput("--eval-only contradicts --resume and --eval-problems 0")
    if args.output.exists() and not args.resume and not args.eval_only and (not args.output.is_dir() or any(args.output.iterdir())):
        raise BadInput(f"{args.output} already holds something: name another --output, or go on with its run with --resume")
    if args.resume and not (args.output / "settings.json").exists():
        raise BadInput(f"{args.output} holds no run to resume")


def entry(main) -> None:
    """Call main(); turn what a user can mend into one line on stderr and an exit code."""
    if not sys.stderr.isatty():  # a log file is no place for progress bars; ours have disable=None for the same reason
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()
    datasets.utils.logging.set_verbosity(logging.CRITICAL)  # what it logs as an error it raises as well
    try:
        return main()
    except BadInput as error:
        code, message = 2, str(error)
    except Stopped as error:
        code, message = 1, str(error)
    except torch.OutOfMemoryError:
        code, message = 1, "out of memory: lower --slots (sampling), --micro-tokens (training) or the lengths"
    except KeyboardInterrupt:
        code, message = 130, "interrupted; the same command with --resume goes on from the last checkpoint"
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    sys.exit(code)


# ---------------------------------------------------------------------------------------------------------------------- model


@dataclass
class LM:
    """A model with what its text needs."""

    model: torch.nn.Module
    tokenizer: object
    eos_ids: set[int]  # of generation config and tokenizer together: each of them ends a response
    vocab_size: int  # ids from here on are not the tokenizer's (an output layer may be wider): never sampled, never scored
    context: int  # tokens

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def phrase_ids(self, phrase: str) -> list[int]:
        """P_r as its own token ids, with a blank line before and after it."""
        return self.tokenizer(f"\n\n{phrase}\n\n", add_special_tokens=False)["input_ids"]


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_lm(args) -> LM:
    """The model in --dtype on --device. Raises BadInput where it cannot be loaded, sampled from, or told when to stop."""
    if (
        (os.path.isabs(args.model) or args.model.count("/") != 1 or args.model.startswith("."))
        and "/" in args.model
        and not Path(args.model).is_dir()
    ):
        raise BadInput(f"no such model folder: {args.model}")
    name = args.dtype if args.dtype != "auto" else "bfloat16" if args.device.startswith("cuda") else "float32"
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, name)).to(args.device)
        check_supported(model)
        OutputLayer(model)
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise BadInput(f"cannot use the model {args.model}: {first_line(error)}") from error
    if tokenizer.eos_token_id is None:
        raise BadInput(f"the tokenizer of {args.model} has no EOS token: responses could not end")
    if not args.prompt_template and not tokenizer.chat_template:
        raise BadInput(f"{args.model} has no chat template: give --prompt-template, such as 'Question: {{problem}}\\nAnswer: '")
    eos = model.generation_config.eos_token_id
    eos_ids = {tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [] if eos is None else [eos])}
    context = getattr(model.config, "max_position_embeddings", None) or args.max_length
    if context is None:
        raise BadInput(f"{args.model} does not say how long its context is: give --max-length")
    if (args.max_length or 0) > context:
        raise BadInput(f"--max-length {args.max_length} is more than the model's context of {context} tokens")
    vocab_size = min(len(tokenizer), model.get_output_embeddings().weight.shape[0])
    model.generation_config.do_sample = True  # a sampling setting without it, as some hub models have, could not be saved again
    return LM(model, tokenizer, eos_ids, vocab_size, args.max_length or context)


def inherit_prompt(args) -> dict | None:
    """Fill the prompt and phrase flags that were not given from the `srt.json` beside the model, else from PROMPT_DEFAULTS.

    Returns srt.json's content, None where there is none. Raises BadInput when a flag differs from it, unless --force is given.
    """
    try:
        path = transformers.utils.cached_file(args.model, "srt.json", _raise_exceptions_for_missing_entries=False,
                                              _raise_exceptions_for_connection_errors=False)  # fmt: skip
    except OSError:  # no such model: load_lm says so
        path = None
    saved = json.loads(Path(path).read_text()) if path else None
    for name, default in PROMPT_DEFAULTS.items():
        given, trained = getattr(args, name), saved["prompt"][name] if saved else None
        if given is None:
            setattr(args, name, default if trained is None else trained)
        elif saved and given != trained and not args.force:
            raise BadInput(
                f"--{name.replace('_', '-')} is {given!r}, but {args.model} was trained with {trained!r}: drop the flag, or add --force"
            )
    return saved


# ------------------------------------------------------------------------------------------------------------------- problems


@dataclass
class Problem:
    text: str
    answer: object  # gold answer or solution; for code a list of tests
    prompt_ids: list[int]  # x, up to where the assistant begins to write

    @property
    def key(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]


def load_problems(lm: LM, args, name: str, split: str | None) -> tuple[list[Problem], dict]:
    """The distinct problems of a data set, with the counts of what was left out. Raises BadInput."""
    path = Path(name)
    if path.suffix in DATA_FILES and not path.is_file():
        raise BadInput(f"no such data file: {name}")
    source = (
        (DATA_FILES[path.suffix], None, str(path)) if path.is_file() and path.suffix in DATA_FILES else (name, args.dataset_config, None)
    )
    try:
        rows = datasets.load_dataset(source[0], source[1], data_files=source[2], split=split or "train")
    except Exception as error:  # each builder has its own exceptions; the first line says what is wrong
        raise BadInput(f"cannot load the data set {name}: {first_line(error)}") from error

    def column(given, usual, flag):
        names = [n for n in ([given] if given else usual) if n in rows.column_names]
        if not names:
            raise BadInput(f"{name} has no column {given or ' or '.join(usual)}; it has {', '.join(rows.column_names)}: give {flag}")
        return rows[names[0]]

    texts = column(args.problem_column, ("problem", "question", "prompt"), "--problem-column")
    answers = column(args.answer_column, ("answer", "solution", "tests"), "--answer-column")
    problems, seen, counts = [], set(), {"rows": len(rows), "incomplete": 0, "duplicates": 0, "too_long": 0}
    for text, answer in tqdm(zip(texts, answers), total=len(rows), desc="tokenizing", delay=2, leave=False, disable=None):
        if not isinstance(text, str) or not text.strip() or answer in (None, "", []):
            counts["incomplete"] += 1
        elif text in seen:
            counts["duplicates"] += 1
        else:
            seen.add(text)
            problem = Problem(text, answer, render(lm, text, args))
            if len(problem.prompt_ids) + args.max_new_tokens > lm.context:  # never cut: a problem without its beginning is another problem
                counts["too_long"] += 1
            else:
                problems.append(problem)
    if not len(rows):
        raise BadInput(f"the data set {name} is empty")
    if not problems:
        raise BadInput(f"no problem of {name} is left of {json.dumps(counts)}: a prompt and --max-new-tokens {args.max_new_tokens} must fit "
                       f"{lm.context} tokens")  # fmt: skip
    return problems, counts


def render(lm: LM, problem: str, args) -> list[int]:
    """prompt_ids: the user's side alone, up to the generation prompt. What the assistant writes is appended as ids, never rendered."""
    if args.prompt_template:
        return lm.tokenizer(args.prompt_template.replace("{problem}", problem + args.prompt_suffix))["input_ids"]
    messages = [{"role": "system", "content": args.system}] if args.system else []
    messages.append({"role": "user", "content": problem + args.prompt_suffix})
    try:
        return lm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, **args.template_kwargs)["input_ids"]
    except Exception as error:  # a template may raise what it likes, about a system message for instance
        raise BadInput(f"the chat template does not take this prompt: {first_line(error)}") from error


def split_problems(lm: LM, args, used: set[str], problems: int | None) -> tuple[list[Problem], list[Problem], dict]:
    """(training problems, held-out problems, counts). `used`: keys of an earlier stage's problems, which neither part may hold.

    Held out are the first --eval-problems by a hash of the text: the same in every stage, whatever the seed. `problems`: how many
    to train on, None for half of them, at most 10,000 (the paper's split).
    """
    rest, counts = load_problems(lm, args, args.dataset, args.split)
    if args.eval_dataset or args.eval_split:
        name = args.eval_dataset or args.dataset
        held_out, _ = load_problems(lm, args, name, args.eval_split or (None if Path(name).suffix in DATA_FILES else "test"))
    else:
        held_out = rest
    held_out = sorted((p for p in held_out if p.key not in used), key=lambda p: p.key)[: args.eval_problems]
    keys = used | {p.key for p in held_out}
    rest = sorted((p for p in rest if p.key not in keys), key=lambda p: p.key)
    random.Random(seed_of(args.seed, "problems")).shuffle(rest)
    if problems is None:
        problems = min((len(rest) + 1) // 2, 10_000)
    rest = rest[:problems]
    if not rest and not args.eval_only:
        raise BadInput(f"no problem is left to train on: {len(held_out)} are held out (--eval-problems), {len(used)} were used by stage 1, "
                       f"of {json.dumps(counts)}")  # fmt: skip
    return rest, held_out, {**counts, "held_out": len(held_out), "training": len(rest)}


def load_verifier(name: str):
    """verify(responses, answers) -> r in {0, 1} for each; whatever a verifier returns is one of the two. Raises BadInput."""
    if name == "math":
        return lambda responses, answers: [int(verifier.verify(r, str(a))) for r, a in zip(responses, answers)]
    if name == "code":

        def run_tests(response, tests):
            return int(verifier.verify_code(response, json.loads(tests) if isinstance(tests, str) else tests))

        def verify_all(responses, answers):  # the work is done in other processes: as many at once as there are cores
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return list(
                    tqdm(
                        pool.map(run_tests, responses, answers), total=len(responses), desc="verifying", delay=2, leave=False, disable=None
                    )
                )

        return verify_all
    try:
        sys.path.insert(0, os.getcwd())
        module, function = name.split(":")
        function = getattr(importlib.import_module(module), function)
        return lambda responses, answers: [int(bool(function(r, a))) for r, a in zip(responses, answers)]
    except (ValueError, ImportError, AttributeError) as error:
        raise BadInput(
            f"--verifier {name} is neither math nor code nor a module:function that can be imported: {first_line(error)}"
        ) from error


# ------------------------------------------------------------------------------------------------------------------- sampling


def seed_of(*parts) -> int:
    """Every random number of a run comes from (seed, purpose, step): there is no random state that a checkpoint could miss."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1


def sample(lm: LM, args, prompts: list[list[int]], purpose: tuple, temperature: float, top_p: float, label: str) -> list[Rollout]:
    generator = torch.Generator(lm.model.device).manual_seed(seed_of(args.seed, *purpose))
    with tqdm(total=len(prompts), desc=label, delay=2, leave=False, disable=None, unit="response") as bar:
        return generate(lm.model, prompts, max_new_tokens=args.max_new_tokens, eos_token_ids=lm.eos_ids, temperature=temperature, top_p=top_p,
                        slots=args.slots, generator=generator, vocab_size=lm.vocab_size, progress=bar.update)  # fmt: skip


def without_eos(rollout: Rollout) -> list[int]:
    """y as the first copy: stage 1 never shows an EOS in front of P_r."""
    return rollout.ids[:-1] if rollout.finished else rollout.ids


def evaluate(lm: LM, args, verify, problems: list[Problem], step: int) -> dict:
    """Generate-then-revise on held-out problems: k attempts each, one revision of every attempt, told only right or wrong.

    All shares lie in [0, 1], lengths are tokens with EOS. accuracy is avg@k and accuracy_se its standard error over problems;
    correction_rate = (revised - first) / (1 - first), net of right answers that the revision breaks (METHOD.md; None at accuracy 1);
    wrong_to_right and right_to_wrong are shares of the wrong and of the right attempts (None where there are none). Attempts whose
    revision does not fit the context are not revised: revision_too_long counts them, the revised figures leave them out.
    """
    k, phrases = args.eval_samples, [lm.phrase_ids(args.phrase_wrong), lm.phrase_ids(args.phrase_right)]
    prompts, answers = [p.prompt_ids for p in problems for _ in range(k)], [p.answer for p in problems for _ in range(k)]
    attempts = sample(lm, args, prompts, ("eval", step), args.eval_temperature, 1.0, "evaluating")
    rewards = verify([lm.text(a.ids) for a in attempts], answers)
    revisable = [p + without_eos(a) + phrases[r] for p, a, r in zip(prompts, attempts, rewards)]
    fits = [i for i, ids in enumerate(revisable) if len(ids) + args.max_new_tokens <= lm.context]
    revisions = sample(lm, args, [revisable[i] for i in fits], ("eval revisions", step), args.eval_temperature, 1.0, "evaluating revisions")
    revised = np.array(verify([lm.text(r.ids) for r in revisions], [answers[i] for i in fits]))
    table = np.array(rewards).reshape(len(problems), k)
    first = np.array(rewards)[fits]

    def mean(x):
        return float(np.mean(x)) if len(x) else None

    return {
        "problems": len(problems),
        "samples": k,
        "accuracy": mean(table),
        "accuracy_se": float(table.mean(1).std(ddof=1) / math.sqrt(len(problems))) if len(problems) > 1 else None,
        "pass_at_k": mean(table.max(1)),
        "finished": mean([a.finished for a in attempts]),
        "length": mean([len(a.ids) for a in attempts]),
        "revised_accuracy": mean(revised),
        "correction_rate": (mean(revised) - mean(first)) / (1 - mean(first)) if len(first) and mean(first) < 1 else None,
        "wrong_to_right": mean(revised[first == 0]),
        "right_to_wrong": mean(1 - revised[first == 1]),
        "revised_finished": mean([r.finished for r in revisions]),
        "revised_length": mean([len(r.ids) for r in revisions]),
        "revision_too_long": len(prompts) - len(fits),
    }


# ------------------------------------------------------------------------------------------------------------------- training


def micro_batches(lengths: list[int], budget: int) -> list[list[int]]:
    """Indices of sequences in groups of like length: rows x longest within `budget` tokens (or one sequence).

    At least 90% of all positions are real, in as few groups as that allows, since each is one more pass over weights and gradients: the
    best cut of the sorted lengths at a price for a group, in positions of padding, that falls until the padding is within its tenth."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    room = price = sum(lengths) / 9  # a tenth of all positions is a ninth of the real ones
    while True:
        best = [(0.0, 0, 0)]  # of the j longest: (padding + price x groups, padding, where their last group begins)
        for end in range(1, len(order) + 1):
            real, options = 0, []
            for start in range(end - 1, -1, -1):
                longest, rows = lengths[order[start]], end - start
                real += longest
                if rows > 1 and (rows * longest > budget or rows * longest - real > room):
                    break
                cost, padding, _ = best[start]
                options.append((cost + rows * longest - real + price, padding + rows * longest - real, start))
            best.append(min(options))
        if best[-1][1] <= room:
            break
        price *= 0.8
    groups, end = [], len(order)
    while end:
        groups.insert(0, order[best[end][2] : end])
        end = best[end][2]
    return groups


def hidden_states(model, sequences: list[list[int]]) -> torch.Tensor:
    """Last hidden states [B, T, D] of sequences padded on the RIGHT: causal attention never looks there, so no mask is needed and positions
    count from zero in every row. What stands in the padded places is never used."""
    longest = max(map(len, sequences))
    ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences], device=model.device)
    return model.base_model(input_ids=ids, use_cache=False).last_hidden_state


def predicting(hidden: torch.Tensor, starts: list[int], ends: list[int]) -> torch.Tensor:
    """The rows of hidden [B, T, D] that predict tokens start, ..., end - 1 of each sequence: position t-1 predicts token t. -> [N, D]"""
    return torch.cat([h[start - 1 : end - 1] for h, start, end in zip(hidden, starts, ends)])


def checkpoint_layers(model) -> None:
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # renamed in transformers 5.2x
    enable({"use_reentrant": False})


def kept_bytes(model, tokens: int = 128) -> float:
    """Bytes a token that autograd keeps of a forward pass for the backward pass: measured on a few tokens, hence right for every family."""

    def kept(tokens):
        sizes, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = hidden_states(model, [[0] * tokens])  # alive until here, and with it all that is kept: no address comes twice
        return sum(sizes.values()) + 0 * len(hidden)

    return (kept(tokens) - kept(tokens // 2)) / (tokens - tokens // 2)


def report_memory(lm: LM, args, problems: list[Problem], teacher: str | None = None) -> dict[str, float]:
    """Print where a run's memory goes at most, and what to lower where the device has less (README, "Memory"). Returns the parts in bytes.

    teacher: of stage 2, "base", "live" or "ema"; None: stage 1. All responses are taken to be as long as --max-new-tokens allows.
    """
    model, layers = lm.model, lm.model.config.num_hidden_layers
    size, count = model.dtype.itemsize, sum(p.numel() for p in model.parameters())
    one = max(len(p.prompt_ids) for p in problems) + args.max_new_tokens  # x + y
    two = min(one + len(lm.phrase_ids(args.phrase_wrong)) + args.max_new_tokens, lm.context)  # x + y + P_r + y
    tokens = min(args.batch_size * two, max(args.micro_tokens, two)) * (one if teacher else two) // two  # that the student reads in a pass
    per_token = kept_bytes(model, min(128, lm.context))
    if args.gradient_checkpointing:  # every layer's input, and one layer's inside
        per_token = layers * model.config.hidden_size * size + per_token / layers
    with torch.no_grad():
        cache = prefill(model, [(0, 0)]).numel() * size  # a token
    chunk, chunks = CHUNK.get(model.device.type, CHUNK["cuda"])
    parts = {
        "weights": count * size, "optimizer": count * (8 if size > 2 else 10), "gradients": 4 * count,
        "teacher": count * {"base": size, "ema": size + (4 if size < 4 else 0)}.get(teacher, 0), "activations": int(tokens * per_token),
        "logits": (12 * 4 + 2 * chunks * size) * chunk, "cache": args.slots * (one if teacher else two) * cache,
    }  # fmt: skip
    standing = parts["weights"] + parts["optimizer"] + parts["teacher"]
    training, sampling = standing + parts["gradients"] + parts["activations"] + parts["logits"], standing + parts["cache"]
    sampling += parts["gradients"] if model.device.type == "cpu" and size > 2 else 0  # `Optimizer.step` keeps their memory
    device = (
        torch.cuda.mem_get_info(model.device)[1]
        if model.device.type == "cuda"
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    print("memory at most, GB: " + ", ".join(f"{name} {n / 1e9:.3g}" for name, n in parts.items()) + f"; training {training / 1e9:.3g}, "
          f"sampling {sampling / 1e9:.3g}, of {device / 1e9:.3g}")  # fmt: skip
    if training > device:
        print("warning: training may not fit: lower --micro-tokens or --max-new-tokens, add --gradient-checkpointing", file=sys.stderr)
    if sampling > device:
        print("warning: sampling may not fit: lower --slots or --max-new-tokens", file=sys.stderr)
    return parts


class Optimizer:
    """AdamW over fp32 weights. A bf16 model gets fp32 masters: at a learning rate of 5e-6 an update is below half of a bf16 weight's last
    bit and would be rounded away. A bf16 weight is the rounded upper half of its master, so only the lower half is stored, and the master
    is put together for the moment of its step: 2 bytes a weight instead of 4, and exact. Gradients of micro-batches are summed in fp32.
    fp32 weights are their own masters.
    """

    def __init__(self, model: torch.nn.Module, args):
        self.weights, self.clip = [p for p in model.parameters() if p.requires_grad], args.clip
        self.narrow, masters = [], []  # narrow: (bf16 weight, lower half, master: a place that is empty between steps)
        for weight in self.weights:
            masters.append(weight)
            if weight.dtype == torch.bfloat16:
                weight.grad_dtype = torch.float32
                masters[-1] = torch.nn.Parameter(torch.empty(0, device=weight.device))
                self.narrow.append((weight, torch.zeros_like(weight, dtype=torch.int16), masters[-1]))
        groups = [{"params": [m for w, m in zip(self.weights, masters) if w.dim() > 1], "weight_decay": args.weight_decay},
                  {"params": [m for w, m in zip(self.weights, masters) if w.dim() <= 1], "weight_decay": 0.0}]  # fmt: skip
        self.adamw = torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=True)  # no temporary copy of all weights

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """One clipped step; returns the gradient's norm before clipping. Raises Stopped, weights untouched, when that is not finite.
        Without any gradient (a step without a token) nothing moves."""
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.clip).item()
        if not math.isfinite(norm):
            raise Stopped("the gradient is not finite; the last checkpoint stands: lower --lr and go on from it")
        if not norm:
            return norm
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()  # the fp32 weights
        # on a CPU the memory is kept: taking it anew from the system, page by page, costs a tenth of a step's time
        self.adamw.zero_grad(set_to_none=self.weights[0].device.type != "cpu")
        for weight, low, master in self.narrow:
            master.data, master.grad, weight.grad = join(weight, low), weight.grad, None
            self.adamw.step()  # this one alone: no other has a gradient now
            for half, new in zip((weight, low), split(master)):
                half.copy_(new)
            master.data, master.grad = master.new_empty(0), None
        return norm

    def state_dict(self) -> dict:
        return {"adamw": self.adamw.state_dict(), "low": [low for _, low, _ in self.narrow]}

    def load_state_dict(self, state: dict) -> None:
        """Put a `state_dict` back; the bf16 weights, which are the upper halves, are the model's."""
        self.adamw.load_state_dict(state["adamw"])
        for (_, low, _), saved in zip(self.narrow, state["low"], strict=True):
            low.copy_(saved)


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 -> (the nearest bf16, what is missing in units of fp32's last bit, int16). Ties go away from zero: the rest always fits."""
    bits = master.view(torch.int32)
    upper = (bits + 0x8000) >> 16
    return upper.to(torch.int16).view(torch.bfloat16), (bits - (upper << 16)).to(torch.int16)


def join(weight: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """The inverse of `split`, exactly."""
    return ((weight.view(torch.int16).int() << 16) + low).view(torch.float32)


def learning_rate(args, step: int, total: int) -> float:
    """For optimizer step `step` of 1 ... total: linear warm-up, then cosine to 0 or constant."""
    warmup = math.ceil(args.warmup if args.warmup >= 1 else args.warmup * total)
    if step <= warmup:
        return args.lr * step / warmup
    return args.lr * (0.5 + 0.5 * math.cos(math.pi * (step - 1 - warmup) / (total - warmup)) if args.lr_schedule == "cosine" else 1)


def finite(loss: float) -> float:
    if not math.isfinite(loss):
        raise Stopped(f"the loss is {loss}; the last checkpoint stands: lower --lr and go on from it")
    return loss


# ---------------------------------------------------------------------------------------------------- log, checkpoints, output


class Run:
    """The output folder: settings.json, metrics.jsonl, checkpoint-STEP/ while it runs, and in the end the model itself."""

    def __init__(self, args, srt: dict, extra: dict):
        """srt: what the model's srt.json will say. A resumed run must have the settings that it began with: else BadInput."""
        self.folder, self.srt = args.output, srt
        settings = {**{k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k != "resume"}}
        settings["betas"] = list(settings["betas"])
        path = self.folder / "settings.json"
        if args.resume:
            saved = json.loads(path.read_text())["flags"]
            changed = [f"--{k.replace('_', '-')} was {saved.get(k)!r}" for k in settings if settings[k] != saved.get(k)]
            if changed:
                raise BadInput(f"--resume needs the flags that the run began with: {', '.join(changed)}")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            versions = {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}
            self.write("settings.json", {"flags": settings, **extra, **versions, "started": time.strftime("%Y-%m-%d %H:%M:%S")})
        self.metrics = open(self.folder / "metrics.jsonl", "a")

    def write(self, name: str, content) -> None:
        """A small file, there as a whole or not at all."""
        (self.folder / f"{name}.tmp").write_text(json.dumps(content, indent=1))
        os.replace(self.folder / f"{name}.tmp", self.folder / name)

    def log(self, kind: str, step: int, values: dict) -> None:
        """One line for people, one for machines."""
        self.metrics.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.metrics.flush()
        shown = {k: v for k, v in values.items() if not isinstance(v, dict)}
        print(f"{kind} {step}  " + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in shown.items()), flush=True)

    def offset(self) -> int:
        return os.path.getsize(self.folder / "metrics.jsonl")

    def rewind(self, offset: int) -> None:
        """Forget the lines that were logged after a checkpoint: the resumed run writes them again."""
        self.metrics.truncate(offset)

    def save(self, lm: LM, name: str, state: dict | None = None) -> None:
        """The model as an ordinary transformers folder, with the training state if there is one, written elsewhere and then renamed."""
        temporary = self.folder / "saving"
        shutil.rmtree(temporary, ignore_errors=True)
        lm.model.save_pretrained(temporary)
        lm.tokenizer.save_pretrained(temporary)
        (temporary / "srt.json").write_text(json.dumps(self.srt))
        if state is not None:
            torch.save(state, temporary / "training_state.pt")
        shutil.rmtree(self.folder / name, ignore_errors=True)
        os.replace(temporary, self.folder / name)

    def checkpoint(self, lm: LM, step: int, state: dict) -> None:
        self.save(lm, f"checkpoint-{step}", {**state, "step": step, "metrics": self.offset()})
        for old in self.folder.glob("checkpoint-*"):
            if old.name != f"checkpoint-{step}":
                shutil.rmtree(old)

    def restore(self, lm: LM) -> dict | None:
        """Put the newest checkpoint's weights into the model; returns its training state, or None where there is no checkpoint."""
        steps = [int(path.name.split("-")[1]) for path in self.folder.glob("checkpoint-*")]
        if not steps:
            return None
        path = self.folder / f"checkpoint-{max(steps)}"
        saved = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=lm.model.dtype)
        lm.model.load_state_dict(saved.state_dict())
        state = torch.load(path / "training_state.pt", map_location=lm.model.device)
        self.rewind(state["metrics"])
        return state

    def finish(self, lm: LM) -> None:
        """The final model into the folder itself, config.json last: where that stands, the run is complete. Then the checkpoints go."""
        self.save(lm, "final")
        for path in sorted((self.folder / "final").iterdir(), key=lambda p: p.name == "config.json"):
            os.replace(path, self.folder / path.name)
        (self.folder / "final").rmdir()
        for old in self.folder.glob("checkpoint-*"):
            shutil.rmtree(old)
        print(f"saved {self.folder}")


# -------------------------------------------------------------------------------------------------------------------- stage 1


def collect(lm: LM, args, verify, problems: list[Problem], chunk: int) -> tuple[list[dict], dict]:
    """Attempts, revisions and their verdicts for some problems. Returns (the traces whose revision is right, counts).

    A trace: problem, answer, prompt_ids (x), init_ids (y_init without EOS), reward and phrase (r and P_r), phrase_ids, revision_ids
    (y_rev, with the EOS that it ended with, if it did) and the texts. Identical ones count once (METHOD.md, stage 1).
    """
    phrases = [(p, lm.phrase_ids(p)) for p in (args.phrase_wrong, args.phrase_right)]
    tried = [p for p in problems for _ in range(args.attempts)]
    attempts = sample(lm, args, [p.prompt_ids for p in tried], ("attempts", chunk), args.temperature, args.top_p, "attempts")
    rewards = verify([lm.text(a.ids) for a in attempts], [p.answer for p in tried])

    contexts = [p.prompt_ids + without_eos(a) + phrases[r][1] for p, a, r in zip(tried, attempts, rewards)]
    fits = [i for i, ids in enumerate(contexts) if len(ids) + args.max_new_tokens <= lm.context for _ in range(args.revisions)]
    revisions = sample(lm, args, [contexts[i] for i in fits], ("revisions", chunk), args.temperature, args.top_p, "revisions")
    texts = [lm.text(r.ids) for r in revisions]
    verdicts = verify(texts, [tried[i].answer for i in fits])

    traces = {}
    for i, revision, text, right in zip(fits, revisions, texts, verdicts):
        if right:
            init_ids, (phrase, phrase_ids) = without_eos(attempts[i]), phrases[rewards[i]]
            traces.setdefault((tried[i].key, *init_ids, -1, *revision.ids), {
                "problem": tried[i].text, "answer": tried[i].answer, "reward": rewards[i], "phrase": phrase, "init_text": lm.text(init_ids),
                "revision_text": text, "finished": revision.finished, "prompt_ids": tried[i].prompt_ids, "init_ids": init_ids,
                "phrase_ids": phrase_ids, "revision_ids": revision.ids,
            })  # fmt: skip
    tried_right, kept = [rewards[i] for i in fits], [t["reward"] for t in traces.values()]
    return list(traces.values()), {
        "problems": len(problems), "attempts": len(attempts), "right": sum(rewards), "cut_off": sum(not a.finished for a in attempts),
        "too_long": len(contexts) * args.revisions - len(fits),
        "revisions_of_wrong": len(fits) - sum(tried_right), "kept_of_wrong": len(kept) - sum(kept),
        "revisions_of_right": sum(tried_right), "kept_of_right": sum(kept),
    }  # fmt: skip


def collect_all(lm: LM, args, verify, problems: list[Problem], run: Run) -> list[dict]:
    """`collect`, chunk after chunk, into traces.jsonl; what collected.json has is not done again. Raises BadInput when nothing is kept."""
    path, size = args.output / "traces.jsonl", 4 * args.slots
    done = json.loads((args.output / "collected.json").read_text()) if (args.output / "collected.json").exists() else None
    done = done or {"chunks": 0, "traces": 0, "metrics": run.offset(), "counts": {}}
    with open(path, "a") as file:
        file.truncate(done["traces"])
        for chunk in range(done["chunks"], math.ceil(len(problems) / size)):
            started = time.time()
            traces, counts = collect(lm, args, verify, problems[chunk * size : (chunk + 1) * size], chunk)
            file.writelines(json.dumps(t) + "\n" for t in traces)
            file.flush()
            run.log("collect", chunk + 1, {**counts, "seconds": time.time() - started})
            total = {k: done["counts"].get(k, 0) + n for k, n in counts.items()}
            done = {"chunks": chunk + 1, "traces": file.tell(), "metrics": run.offset(), "counts": total}
            run.write("collected.json", done)
    traces, total = [json.loads(line) for line in open(path)], done["counts"]
    if not traces:
        raise BadInput(f"not one of {total['revisions_of_wrong'] + total['revisions_of_right']} revisions verified ({total['right']} of "
                       f"{total['attempts']} first attempts did; {total['too_long']} revisions did not fit the context): try a stronger model, "
                       f"easier problems, more --problems or --revisions, or look at --prompt-suffix, --verifier and the lengths")  # fmt: skip
    return traces


def load_traces(lm: LM, args) -> tuple[list[dict], list[str]]:
    """Traces of an earlier --collect-only run, and the keys of all problems which that run tried. Raises BadInput."""
    path = Path(args.traces)
    if not path.is_file():
        raise BadInput(f"no such traces file: {path}")
    try:
        traces = [json.loads(line) for line in open(path)]
        for trace in traces:
            if trace["phrase"] != (args.phrase_wrong, args.phrase_right)[trace["reward"]]:
                raise BadInput(f"{path} was collected with the phrase {trace['phrase']!r}: give it as --phrase-wrong or --phrase-right")
            if lm.phrase_ids(trace["phrase"]) != trace["phrase_ids"]:
                raise BadInput(f"{path} was collected with another tokenizer than that of {args.model}")
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{path} is not a traces file of srt.py: {first_line(error)}") from error
    if not traces:
        raise BadInput(f"{path} holds no trace")
    beside = path.parent / "srt.json"
    keys = json.loads(beside.read_text())["problems"] if beside.exists() else []
    return traces, sorted({*keys, *(Problem(t["problem"], None, []).key for t in traces)})


def srt_loss(model, layer: OutputLayer, traces: list[dict], weights: tuple[int, int], divisor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Add the gradient of L_SRT (3) of some traces, in ONE forward pass, to the model's. Returns (-log pi [N], weight [N]) of their tokens.

    L_revision (1) scores y_rev, L_generation (2) scores y_init, P_r and y_rev, both in the sequence x + y_init + P_r + y_rev: their sum is
    that sequence with weight 1 on y_init and P_r and 2 on y_rev and its EOS, `weights` = (1, 2). The loss is the sum of weight x -log pi
    / divisor, where the caller's divisor is the sum of the weights in the whole optimizer step, so that micro-batches change nothing.
    """
    sequences = [t["prompt_ids"] + t["init_ids"] + t["phrase_ids"] + t["revision_ids"] for t in traces]
    starts, ends = [len(t["prompt_ids"]) for t in traces], [len(s) for s in sequences]
    hidden = predicting(hidden_states(model, sequences), starts, ends)  # [N, D]
    targets = torch.tensor([token for s, start in zip(sequences, starts) for token in s[start:]], device=hidden.device)
    parts = [[weights[0]] * (len(t["init_ids"]) + len(t["phrase_ids"])) + [weights[1]] * len(t["revision_ids"]) for t in traces]
    weight = torch.tensor(sum(parts, []), device=hidden.device)

    def loss(logits, target, weight):
        nll = -token_logprobs(logits, target)
        return torch.stack([weight * nll, nll], dim=-1)

    return backward_by_chunks(loss, layer, hidden, targets, weight, divisor=divisor)[:, 1], weight


def srt_step(model, layer: OutputLayer, traces: list[dict], weights: tuple[int, int], micro_tokens: int) -> dict:
    """Add the gradient of one optimizer step's mean loss to the model's; returns its metrics. One number however it is cut."""
    lengths = [sum(len(t[k]) for k in ("prompt_ids", "init_ids", "phrase_ids", "revision_ids")) for t in traces]
    divisor = sum(weights[0] * (len(t["init_ids"]) + len(t["phrase_ids"])) + weights[1] * len(t["revision_ids"]) for t in traces)
    parts = []
    for group in tqdm(micro_batches(lengths, micro_tokens), desc="training", delay=2, leave=False, disable=None):
        parts.append(srt_loss(model, layer, [traces[i] for i in group], weights, divisor))
    nll, weight = (torch.cat(column) for column in zip(*parts))
    return {
        "loss": finite((nll * weight).sum().item() / divisor),
        "nll": nll.mean().item(),  # a token, of y_init, P_r and y_rev alike
        "reward": sum(t["reward"] for t in traces) / len(traces),  # of the first attempts
        "length": sum(len(t["revision_ids"]) for t in traces) / len(traces),
        "cut_off": sum(not t["finished"] for t in traces) / len(traces),
        "tokens": sum(lengths),
    }


def plan(args, traces: list[dict]) -> list[tuple[list[int], tuple[int, int]]]:
    """All optimizer steps: (indices of the traces, weights). --terms sequential is the authors' order: L_generation on wrong attempts'
    traces, then L_revision on all of them."""
    everything, wrong = list(range(len(traces))), [i for i, t in enumerate(traces) if not t["reward"]]
    phases = [(wrong, "generation"), (everything, "revision")] if args.terms == "sequential" else [(everything, args.terms)]
    steps = []
    for indices, terms in phases:
        for epoch in range(args.epochs):
            order = indices.copy()
            random.Random(seed_of(args.seed, "order", terms, epoch)).shuffle(order)
            steps += [(order[i : i + args.batch_size], WEIGHTS[terms]) for i in range(0, len(order), args.batch_size)]
    return steps


def train(lm: LM, args, verify, traces: list[dict], held_out: list[Problem], run: Run) -> None:
    """Fine-tune on L_SRT, from the last checkpoint if there is one."""
    optimizer, steps = Optimizer(lm.model, args), plan(args, traces)
    state = run.restore(lm)
    if state:
        optimizer.load_state_dict(state["optimizer"])
    if args.gradient_checkpointing:
        checkpoint_layers(lm.model)
    layer = OutputLayer(lm.model, lm.vocab_size)
    lm.model.train()
    for step in range(state["step"] + 1 if state else 1, len(steps) + 1):
        started = time.time()
        torch.manual_seed(seed_of(args.seed, "dropout", step))
        indices, weights = steps[step - 1]
        metrics = srt_step(lm.model, layer, [traces[i] for i in indices], weights, args.micro_tokens)
        lr = learning_rate(args, step, len(steps))
        norm = optimizer.step(lr)
        seconds = time.time() - started
        run.log("train", step, {**metrics, "grad_norm": norm, "lr": lr, "tokens_per_s": metrics["tokens"] / seconds, "seconds": seconds})
        if held_out and (step % args.eval_every == 0 or step == len(steps)):
            run.log("eval", step, evaluate(lm, args, verify, held_out, step))
        if step % args.save_every == 0 and step < len(steps):
            run.checkpoint(lm, step, {"optimizer": optimizer.state_dict()})


def parse_arguments(argv=None):
    parser = Parser("Stage 1 of SD-Zero, Self-Revision Training: sample, verify, revise, keep what verifies, fine-tune. "
                    "Defaults are the paper's where it has one.")  # fmt: skip
    add = parser.add_argument
    add_arguments(parser, max_new_tokens=16384, temperature=0.7, problems="half of them, at most 10000; the other half is stage 2's",
                  batch_size=4, lr_schedule="cosine", warmup=0.05, weight_decay=1e-4, betas=(0.9, 0.95), output="runs/srt")  # fmt: skip
    add("--attempts", type=int, default=1, help="n: first attempts a problem")
    add("--revisions", type=int, default=3, help="m: revisions of an attempt, right or wrong")
    add("--epochs", type=int, default=3, help="passes over the traces")
    add("--terms", choices=["both", "generation", "revision", "sequential"], default="both",
        help="of L_SRT; sequential: L_generation on wrong attempts, then L_revision on all, the authors' code's order")  # fmt: skip
    add("--collect-only", action="store_true", help="stop when the traces are saved")
    add("--traces", help="train on the traces.jsonl of a --collect-only run instead of sampling")
    args = parser.parse_args(argv)
    check_arguments(args)
    if min(args.attempts, args.revisions, args.epochs) < 1:
        raise BadInput("--attempts, --revisions and --epochs must be positive")
    if args.collect_only and args.traces:
        raise BadInput("--collect-only and --traces contradict each other")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    inherit_prompt(args)
    verify = load_verifier(args.verifier)
    lm = load_lm(args)
    problems, held_out, counts = split_problems(lm, args, set(), args.problems)
    if args.eval_only:
        print(json.dumps(evaluate(lm, args, verify, held_out, 0), indent=1))
        return
    traces, used = load_traces(lm, args) if args.traces else (None, [p.key for p in problems])
    held_out = [p for p in held_out if p.key not in set(used)]
    srt = {"prompt": {name: getattr(args, name) for name in PROMPT_DEFAULTS}, "problems": used}
    run = Run(args, srt, {"eos_ids": sorted(lm.eos_ids), "vocab_size": lm.vocab_size, "context": lm.context, "counts": counts})
    if (args.output / "config.json").exists():
        print(f"{args.output} is complete")
        return
    print(f"problems: {json.dumps(counts)}")
    report_memory(lm, args, problems)

    if not any(args.output.glob("checkpoint-*")):
        collected = args.output / "collected.json"
        run.rewind(json.loads(collected.read_text())["metrics"] if collected.exists() else 0)
        if held_out and not collected.exists():
            run.log("eval", 0, evaluate(lm, args, verify, held_out, 0))
    traces = traces or collect_all(lm, args, verify, problems, run)
    if args.collect_only:
        run.write("srt.json", srt)
        print(f"saved {args.output / 'traces.jsonl'}: {len(traces)} traces")
        return
    train(lm, args, verify, traces, held_out, run)
    run.finish(lm)


if __name__ == "__main__":
    entry(main)
