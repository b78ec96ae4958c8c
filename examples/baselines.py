"""What SD-Zero is compared with, on the same pieces (sampler, losses, evaluation) and any model and data set: RFT, GRPO, SDFT, SDPO.

    python examples/baselines.py --method rft --model runs/toy/base --dataset runs/toy/stage1.jsonl --max-new-tokens 64 --output runs/rft

- rft:  rejection fine-tuning. Sample --group responses a problem once, keep the distinct right ones, fine-tune on them.
- grpo: each response's advantage is its reward, normalised within the --group responses to its problem; policy gradient. On-policy (one
        step a batch, so that neither ratio nor clipping is there), no KL term, mean over all tokens of the step.
- sdft: on-policy self-distillation from a teacher that was shown a worked solution: --solution-column. It knows more than a verifier tells.
- sdpo: the same from a teacher that was shown another, right response of the same group. A response without one is left out.

Both teachers read x + shown + P_1 + y, with the method's phrase for right answers between the two (the papers put what is shown into the
user's turn, in words that a small model need not know), and follow the student as a moving average. --generations is the budget in
responses: SD-Zero with its defaults samples 4 a problem in stage 1 and 1 in stage 2.
"""

import json
import random
import sys
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import srt
from losses import OutputLayer, backward_by_chunks, token_logprobs
from sdzero import Example, distill_step
from srt import (
    PROMPT_DEFAULTS, BadInput, Optimizer, Parser, Problem, Run, add_arguments, check_arguments, checkpoint_layers, entry, evaluate, finite,
    hidden_states, inherit_prompt, learning_rate, load_lm, load_problems, load_verifier, micro_batches, predicting, sample, seed_of,
    split_problems, without_eos,
)  # fmt: skip
from teacher import Teacher


@dataclass
class Group:
    """Responses to one problem, with their verdicts."""

    problem: Problem
    responses: list  # of Rollout
    rewards: list[int]


def sample_groups(lm, args, verify, problems: list[Problem], purpose: tuple) -> list[Group]:
    n, asked = args.group, [p for p in problems for _ in range(args.group)]
    responses = sample(lm, args, [p.prompt_ids for p in asked], purpose, args.temperature, args.top_p, "responses")
    rewards = verify([lm.text(y.ids) for y in responses], [p.answer for p in asked])
    return [Group(p, responses[i * n : i * n + n], rewards[i * n : i * n + n]) for i, p in enumerate(problems)]


# ------------------------------------------------------------------------------------------------------------------------ RFT


def right_responses(groups: list[Group]) -> list[dict]:
    """The distinct right responses, as what srt.py's `train` takes: a trace without a first attempt and without a phrase."""
    return [
        {"prompt_ids": g.problem.prompt_ids, "init_ids": [], "phrase_ids": [], "revision_ids": list(ids), "finished": finished, "reward": 1}
        for g in groups for ids, finished in dict.fromkeys((tuple(y.ids), y.finished) for y, r in zip(g.responses, g.rewards) if r)
    ]  # fmt: skip


def rft(lm, args, verify, problems, held_out, run) -> None:
    groups = sample_groups(lm, args, verify, problems, ("responses",))
    kept = right_responses(groups)
    if not kept:
        raise BadInput(f"not one of {args.group * len(problems)} responses verified")
    if not any(args.output.glob("checkpoint-*")):
        run.rewind(0)
        if held_out:
            run.log("eval", 0, evaluate(lm, args, verify, held_out, 0))
        counts = {"problems": len(problems), "generations": args.group * len(problems)}
        run.log("collect", 1, {**counts, "right": sum(sum(g.rewards) for g in groups), "kept": len(kept)})
    args.terms = "generation"
    srt.train(lm, args, verify, kept, held_out, run)


# ----------------------------------------------------------------------------------------------------------------------- GRPO


def grpo_step(model, layer, groups: list[Group], args) -> dict:
    """Add the gradient of - sum_i A_i sum_t log pi(y_it | x) / (tokens of the step) to the model's; returns its metrics.

    A_i = (r_i - mean r) / (std r + 1e-6) within the group: zero where all its responses are right, or all wrong. Such responses add nothing
    to the sum but do count in the divisor, so that one with a signal weighs the same whatever it stands beside.
    """
    rows = []
    for g in groups:
        rewards = torch.tensor(g.rewards, dtype=torch.float)
        advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
        rows += [(g.problem.prompt_ids, y, a) for y, a in zip(g.responses, advantages.tolist())]
    divisor, total, live = sum(len(y.ids) for _, y, _ in rows), 0.0, [row for row in rows if row[2]]
    for group in micro_batches([len(x) + len(y.ids) for x, y, _ in live], args.micro_tokens):
        part = [live[i] for i in group]
        sequences = [x + y.ids for x, y, _ in part]
        hidden = predicting(hidden_states(model, sequences), [len(x) for x, _, _ in part], [len(s) for s in sequences])  # [N, D]
        token_ids = torch.tensor([t for _, y, _ in part for t in y.ids], device=hidden.device)
        advantage = torch.tensor([a for _, y, a in part for _ in y.ids], device=hidden.device)

        def loss(logits, token_ids, advantage):
            return (-advantage * token_logprobs(logits / (args.temperature or 1), token_ids))[:, None]

        total += backward_by_chunks(loss, layer, hidden, token_ids, advantage, divisor=divisor).sum().item()
    return {"loss": finite(total / divisor), "with_signal": len(live) / len(rows)}


# --------------------------------------------------------------------------------------------------------------- SDFT and SDPO


@dataclass
class Shown(Example):
    """A response whose teacher reads something right first: x + shown + P_1 + y."""

    shown_ids: list[int]

    @property
    def teacher_ids(self) -> list[int]:
        return self.prompt_ids + self.shown_ids + self.phrase_ids + self.response.ids


def sdft_examples(groups: list[Group], solutions: dict[str, list[int]], phrase_ids: list[int]) -> list[Shown]:
    return [Shown(g.problem.prompt_ids, y, r, phrase_ids, solutions[g.problem.key]) for g in groups for y, r in zip(g.responses, g.rewards)]


def sdpo_examples(groups: list[Group], phrase_ids: list[int]) -> list[Shown]:
    examples = []
    for g in groups:
        right = [i for i, r in enumerate(g.rewards) if r]
        for i, (y, r) in enumerate(zip(g.responses, g.rewards)):
            if others := [j for j in right if j != i]:
                shown = g.responses[others[i % len(others)]]  # each response of the group gets another one, where there are several
                examples.append(Shown(g.problem.prompt_ids, y, r, phrase_ids, without_eos(shown)))
    return examples


# ---------------------------------------------------------------------------------------------------- the loop of all but RFT


def on_policy(lm, args, verify, problems, held_out, run) -> None:
    """Sample a group for each problem, verify, one optimizer step; pass after pass over the problems until the budget is spent."""
    model, layer, optimizer = lm.model, OutputLayer(lm.model, lm.vocab_size), Optimizer(lm.model, args)
    if args.method != "grpo":
        teacher = Teacher(model, args.teacher, args.teacher_rate)
        teacher_layer, phrase_ids = OutputLayer(teacher.module, lm.vocab_size), lm.phrase_ids(args.phrase_right)
    if args.method == "sdft":
        with_solutions = Namespace(**{**vars(args), "answer_column": args.solution_column or args.answer_column})
        rows, _ = load_problems(lm, with_solutions, args.dataset, args.split)
        solutions = {p.key: lm.tokenizer(str(p.answer), add_special_tokens=False)["input_ids"] for p in rows}
    state = run.restore(lm)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        if args.method != "grpo":
            teacher.load_state_dict(state["teacher"])
    else:
        run.rewind(0)
    if args.gradient_checkpointing:
        checkpoint_layers(model)
    per_step = args.batch_size // args.group
    total = max(1, (args.generations or args.group * len(problems)) // args.batch_size)
    order = []
    while len(order) < total * per_step:
        order += random.Random(seed_of(args.seed, "order", len(order))).sample(problems, len(problems))
    model.train()
    if held_out and not state:
        run.log("eval", 0, evaluate(lm, args, verify, held_out, 0))
    for step in range(state["step"] + 1 if state else 1, total + 1):
        started = time.time()
        torch.manual_seed(seed_of(args.seed, "dropout", step))
        groups = sample_groups(lm, args, verify, order[(step - 1) * per_step : step * per_step], ("responses", step))
        if args.method == "grpo":
            metrics = grpo_step(model, layer, groups, args)
        else:
            examples = sdft_examples(groups, solutions, phrase_ids) if args.method == "sdft" else sdpo_examples(groups, phrase_ids)
            examples = [e for e in examples if len(e.teacher_ids) <= lm.context]
            metrics = {**distill_step(model, teacher, layer, teacher_layer, examples, args), "dropped": args.batch_size - len(examples)}
        lr = learning_rate(args, step, total)
        norm = optimizer.step(lr)
        if args.method != "grpo":
            teacher.update(step)
        responses, rewards = [y for g in groups for y in g.responses], [r for g in groups for r in g.rewards]
        run.log("train", step, {
            **metrics, "reward": sum(rewards) / len(rewards), "length": sum(len(y.ids) for y in responses) / len(responses),
            "generations": step * args.batch_size, "grad_norm": norm, "lr": lr, "seconds": time.time() - started,
        })  # fmt: skip
        if held_out and (step % args.eval_every == 0 or step == total):
            run.log("eval", step, evaluate(lm, args, verify, held_out, step))
        if step % args.save_every == 0 and step < total:
            moving = {} if args.method == "grpo" else teacher.state_dict()
            run.checkpoint(lm, step, {"optimizer": optimizer.state_dict(), "teacher": moving})


def parse_arguments(argv=None):
    parser = Parser("Baselines: RFT, GRPO, SDFT, SDPO, with the flags of srt.py and sdzero.py.")
    add = parser.add_argument
    add("--method", choices=["rft", "grpo", "sdft", "sdpo"], required=True, help="see the top of the file")
    add_arguments(parser, max_new_tokens=8192, temperature=1.0, problems="all but the held-out ones", batch_size=128,
                  lr_schedule="constant", warmup=20, weight_decay=0.01, betas=(0.9, 0.999), output="runs/baseline")  # fmt: skip
    add("--group", type=int, help="responses a problem (default: rft 4, grpo and sdpo 8, sdft 1)")
    add("--generations", type=int, help="all but rft: responses in all, --batch-size a step, over as many passes as needed (default: 1)")
    add("--epochs", type=int, default=3, help="rft: passes over what was kept")
    add("--solution-column", help="sdft: what the teacher is shown (default: the answer column)")
    add("--teacher", choices=["base", "live", "ema"], default="ema", help="sdft and sdpo: see sdzero.py")
    add("--teacher-rate", type=float, default=0.05, help="of ema, at every step")
    args = parser.parse_args(argv)
    check_arguments(args)
    args.group = args.group or {"rft": 4, "grpo": 8, "sdft": 1, "sdpo": 8}[args.method]
    if args.epochs < 1 or args.group < 1 or not 0 < args.teacher_rate <= 1:
        raise BadInput("--epochs and --group must be positive, --teacher-rate in (0, 1]")
    if args.method != "rft" and args.batch_size % args.group:
        raise BadInput(f"--batch-size {args.batch_size} responses a step are not whole groups of {args.group}")
    if args.method == "rft" and args.generations:
        raise BadInput("--method rft samples --group responses a problem: give that and --problems instead of --generations")
    vars(args).update(objective="full_logits", alpha=1.0, skip_first=0, importance_cap=None)  # sdzero.py's defaults
    return args


def main(argv=None):
    args = parse_arguments(argv)
    before = inherit_prompt(args)
    verify, lm = load_verifier(args.verifier), load_lm(args)
    used = before["problems"] if before else []
    problems, held_out, counts = split_problems(lm, args, set(used), args.problems or sys.maxsize)
    if args.eval_only:
        print(json.dumps(evaluate(lm, args, verify, held_out, 0), indent=1))
        return
    saved = {"prompt": {name: getattr(args, name) for name in PROMPT_DEFAULTS}, "problems": used + [p.key for p in problems]}
    run = Run(args, saved, {"counts": counts})
    if (args.output / "config.json").exists():
        print(f"{args.output} is complete")
        return
    print(f"problems: {counts}")
    (rft if args.method == "rft" else on_policy)(lm, args, verify, problems, held_out, run)
    run.finish(lm)


if __name__ == "__main__":
    entry(main)
