"""What SD-Zero is compared with, on the same pieces and any model and data set.

    python examples/baselines.py --method rft --model runs/toy/base \\
        --dataset runs/toy/stage1.jsonl --max-new-tokens 64 --batch-size 16 --lr 5e-4 --warmup 5 \\
        --output runs/my-rft                                           (CPU, after examples/toy.py)

- sft:  fine-tuning on the worked solutions of --solution-column, each with EOS. Of one that holds
        an attempt, P_r and a revision only the revision is trained on.
- rft:  rejection fine-tuning. Sample --group responses per problem once, keep the distinct right
        ones, fine-tune on them.
- grpo: policy gradient. A response's advantage is its reward, normalised within the --group
        responses to its problem. One step per batch, so that there is neither a ratio nor a clip;
        no KL term; mean over all tokens of the step.
- sdft: on-policy self-distillation from a teacher that was shown a worked solution, from
        --solution-column. It knows more than a verifier tells.
- sdpo: the same from a teacher that was shown another, right response of the same group. A response
        for which there is none is left out.

Both teachers read x + shown + P_1 + y and follow the student as a moving average. (The papers put
what is shown into the user's turn, in words that a small model need not know; here the method's
phrase for right answers comes after it.) --generations is the budget in responses: SD-Zero with its
defaults samples 4 per problem in stage 1 and 1 in stage 2.

--model may be what srt.py saved: the problems that stage 1 used are left out, as in stage 2.
"""

import json
import random
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import (
    LM,
    REQUIRED,
    SHOW_EVERY,
    Attempt,
    Optimizer,
    Problem,
    Run,
    Task,
    barrier,
    check_flags,
    count,
    entry,
    fail,
    in_micro_batches,
    learning_rate,
    load_problems,
    make_parser,
    sample_and_verify,
    seed_of,
    setup,
    share,
)
from lora import LoraTeacher
from losses import OutputLayer, backward_by_chunks, predicting_last, token_logprobs
from rollout import Rollout
from sdzero import BETAS, WEIGHT_DECAY, Example, distill_step
from srt import Trace, plan, srt_step
from teacher import Teacher

GROUP = {"sft": 1, "rft": 4, "grpo": 8, "sdft": 1, "sdpo": 8}  # the default of --group
FLAGS = [
    ("method", list(GROUP), REQUIRED, "see the top of the file"),
    ("group", count, None, "responses per problem (default: rft 4, grpo and sdpo 8)"),
    (
        "generations",
        count,
        None,
        "grpo, sdft, sdpo: responses in all, --batch-size per step, over as many passes as "
        "needed (default: one pass)",
    ),
    ("epochs", count, None, "sft, rft: passes over what is trained on (default: 3)"),
    ("solution-column", str, None, "sft, sdft: worked solutions (default: the gold answers)"),
    ("teacher", ["base", "live", "ema"], None, "sdft, sdpo: see sdzero.py (default: ema)"),
    ("teacher-rate", share, None, "sdft, sdpo: of ema, at every step (default: 0.05)"),
]
BELONGS_TO = {  # flag: methods; elsewhere it would do nothing
    "group": ("rft", "grpo", "sdft", "sdpo"),
    "generations": ("grpo", "sdft", "sdpo"),
    "epochs": ("sft", "rft"),
    "solution_column": ("sft", "sdft"),
    "teacher": ("sdft", "sdpo"),
    "teacher_rate": ("sdft", "sdpo"),
}


@dataclass
class Group:
    """Responses to one problem, with their verdicts."""

    problem: Problem
    responses: list[Rollout]
    rewards: list[int]


def sample_groups(task: Task, problems: list[Problem], purpose: tuple) -> list[Group]:
    n = task.args.group
    attempts = sample_and_verify(task, [p for p in problems for _ in range(n)], purpose)
    groups = []
    for i, problem in enumerate(problems):
        own = attempts[i * n : i * n + n]
        groups.append(Group(problem, [a.response for a in own], [a.reward for a in own]))
    return groups


# ------------------------------------------------------------------------------------- SFT and RFT


def make_trace(
    task: Task, problem: Problem, ids: list[int], finished: bool, attempt: str = "", reward: int = 1
) -> Trace:
    """What stage 1 trains on: a response alone, or the revision of a given attempt."""
    lm, args, phrase = task.lm, task.args, ""
    if attempt:
        phrase = (args.phrase_wrong, args.phrase_right)[reward]
    return Trace(
        problem=problem.text,
        answer=problem.answer,
        reward=reward,
        phrase=phrase,
        init_text=attempt,
        revision_text=lm.text(ids),
        finished=finished,
        prompt_ids=problem.prompt_ids,
        init_ids=ids_of(lm, attempt),
        phrase_ids=lm.phrase_ids(phrase) if attempt else [],
        revision_ids=ids,
    )


def ids_of(lm: LM, text: str) -> list[int]:
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"]


def worked_solutions(task: Task, solutions: dict[str, str]) -> list[Trace]:
    """solutions: by the problem's key. One that holds an attempt, P_r and its revision is cut
    there, so that only the revision is trained on."""
    lm, args, traces = task.lm, task.args, []
    eos = lm.tokenizer.eos_token_id
    eos = min(lm.eos_ids) if eos is None else eos  # it may have --stop-tokens only
    for problem in task.problems:
        attempt, reward, text = "", 1, solutions[problem.key]
        for r, phrase in enumerate((args.phrase_wrong, args.phrase_right)):
            before, found, last = solutions[problem.key].rpartition(f"\n\n{phrase}\n\n")
            if found and len(last) < len(text):
                attempt, reward, text = before, r, last
        ids = ids_of(lm, text) + [eos]
        trace = make_trace(task, problem, ids, True, attempt, reward)
        if len(trace.ids) > lm.context:
            fail(f"the context holds {lm.context} tokens, the solution of {problem.text!r} not")
        traces.append(trace)
    return traces


def right_responses(task: Task, groups: list[Group]) -> list[Trace]:
    """The distinct right responses."""
    traces = {}
    for g in groups:
        for y, r in zip(g.responses, g.rewards):
            if r:
                same = g.problem.key, tuple(y.ids), y.finished
                traces[same] = make_trace(task, g.problem, y.ids, y.finished)
    return list(traces.values())


def collect(task: Task, args: Namespace, run: Run) -> list[Trace]:
    """Sample all responses and keep what is right in traces.jsonl, unless that is done."""
    path = args.output / "traces.jsonl"
    if not path.exists():
        start = time.time()
        groups = sample_groups(task, task.problems, ("responses",))
        traces = right_responses(task, groups)
        if not traces:
            fail(f"not one of {args.group * len(groups)} responses verified")
        counts = {
            "problems": len(groups),
            "generations": args.group * len(groups),
            "right": sum(sum(g.rewards) for g in groups),
            "kept": len(traces),
            "seconds": time.time() - start,
        }
        run.log("collect", 1, counts)
        run.write(path.name, "".join(json.dumps(asdict(t)) + "\n" for t in traces))
    barrier()  # until rank 0 has written it
    return [Trace(**json.loads(line)) for line in open(path)]


def fine_tune(task: Task, args: Namespace, run: Run, traces: list[Trace] | None) -> None:
    """sft on these traces, rft on what it collects."""
    run.evaluate(0)
    args.terms = "revision" if args.method == "sft" else "generation"
    model, steps = task.lm.model, plan(args, traces or collect(task, args, run))
    layer = OutputLayer(model, task.lm.vocab_size)

    def learn(step: int) -> dict:
        traces, weights = steps[step - 1]
        return srt_step(model, layer, traces, weights, args.micro_tokens)

    train(task, args, run, learn, len(steps))


# -------------------------------------------------------------------------------------------- GRPO


def grpo_step(
    model: torch.nn.Module, layer: OutputLayer, groups: list[Group], args: Namespace
) -> dict:
    """Add the gradient of - sum_i A_i sum_t log pi(y_it | x) / (tokens of the step) to the model's;
    returns its metrics.

    A_i = (r_i - mean r) / (std r + 1e-6) within the group: zero where all its responses are right,
    or all wrong. Such responses add nothing to the sum but do count in the divisor, so that one
    with a signal weighs the same whatever is in the rest of the batch.
    """
    live, responses, tokens = [], 0, 0  # live: (x, y, A) of the responses with a signal
    for g in groups:
        rewards = torch.tensor(g.rewards, dtype=torch.float)
        advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
        for y, advantage in zip(g.responses, advantages.tolist()):
            responses, tokens = responses + 1, tokens + len(y.ids)
            if advantage:
                live.append((g.problem.prompt_ids, y, advantage))

    def loss(logits, token_ids, advantages):
        return -advantages * token_logprobs(logits / (args.temperature or 1), token_ids)

    def backward(some: list[tuple]) -> dict[str, torch.Tensor]:
        sequences, counts, token_ids, advantages = [], [], [], []
        for x, y, advantage in some:
            sequences.append(x + y.ids)
            counts.append(len(y.ids))
            token_ids += y.ids
            advantages += [advantage] * len(y.ids)
        hidden = predicting_last(model, sequences, counts)  # [N, H]
        token_ids = torch.tensor(token_ids, device=hidden.device)
        advantages = torch.tensor(advantages, device=hidden.device)
        how = dict(divisor=tokens, compiled=hidden.is_cuda)
        values = backward_by_chunks(loss, layer, hidden, token_ids, advantages, **how)
        return {"loss": values}

    lengths = [len(x) + len(y.ids) for x, y, _ in live]
    values = in_micro_batches(model, live, lengths, args.micro_tokens, backward)
    total = values["loss"].sum().item() if values else 0.0
    return {"loss": total / tokens, "with_signal": len(live) / responses}


def grpo(task: Task, args: Namespace, run: Run) -> None:
    model, batches = task.lm.model, plan_batches(task, args)
    layer = OutputLayer(model, task.lm.vocab_size)

    def learn(step: int) -> dict:
        groups = sample_groups(task, batches[step - 1], ("responses", step))
        return {**grpo_step(model, layer, groups, args), **describe(task.lm, groups, step)}

    train(task, args, run, learn, len(batches))


# ----------------------------------------------------------------------------------- SDFT and SDPO


@dataclass
class Shown(Example):
    """A response whose teacher reads something right first: x + shown + P_1 + y."""

    shown_ids: list[int]

    @property
    def teacher_ids(self) -> list[int]:
        return self.prompt_ids + self.shown_ids + self.phrase_ids + self.response.ids


def sdft_examples(
    groups: list[Group], solutions: dict[str, list[int]], phrase_ids: list[int]
) -> list[Shown]:
    """solutions: ids by the problem's key."""
    examples = []
    for g in groups:
        for y, r in zip(g.responses, g.rewards):
            shown_ids = solutions[g.problem.key]
            examples.append(Shown(g.problem.prompt_ids, y, r, phrase_ids, shown_ids))
    return examples


def sdpo_examples(groups: list[Group], phrase_ids: list[int]) -> list[Shown]:
    examples = []
    for g in groups:
        right = [i for i, r in enumerate(g.rewards) if r]
        for i, (y, r) in enumerate(zip(g.responses, g.rewards)):
            others = [j for j in right if j != i]
            if others:
                # each response of the group is paired with another one, where there are several
                shown_ids = g.responses[others[i % len(others)]].without_eos
                examples.append(Shown(g.problem.prompt_ids, y, r, phrase_ids, shown_ids))
    return examples


def load_solutions(task: Task, args: Namespace) -> dict[str, str]:
    """Worked solutions by the problem's key: gold answers, or another column."""
    texts = {p.key: p.answer for p in task.problems}
    if args.solution_column:
        # a worked solution is text, whatever the verifier wants of an answer
        of_column = {"answer_column": args.solution_column, "verifier": "any"}
        rows, _ = load_problems(Namespace(**{**vars(args), **of_column}), args.dataset)
        found = {key: solution for key, (_, solution) in rows.items()}
        missing = sum(key not in found for key in texts)
        if missing:
            fail(f"{missing} of {len(texts)} problems have no {args.solution_column}")
        texts = {key: found[key] for key in texts}
    return {key: str(text) for key, text in texts.items()}


def from_a_teacher(task: Task, args: Namespace, run: Run, make_examples: Callable) -> None:
    """sdft and sdpo. make_examples(groups): what student and teacher read."""
    lm, model = task.lm, task.lm.model
    make_teacher = LoraTeacher if args.lora else Teacher
    teacher = make_teacher(model, args.teacher, args.teacher_rate)
    layers = OutputLayer(model, lm.vocab_size), OutputLayer(teacher.module, lm.vocab_size)
    batches = plan_batches(task, args)

    def learn(step: int) -> dict:
        groups = sample_groups(task, batches[step - 1], ("responses", step))
        examples = [e for e in make_examples(groups) if len(e.teacher_ids) <= lm.context]
        metrics = distill_step(model, teacher, *layers, examples, args)
        dropped = {"dropped": args.batch_size - len(examples)}
        return {**metrics, **dropped, **describe(lm, groups, step)}

    train(task, args, run, learn, len(batches), teacher)


# ---------------------------------------------------------------------------------------- the loop


def plan_batches(task: Task, args: Namespace) -> list[list[Problem]]:
    """The problems of every step: pass after pass over all of them until the budget is spent."""
    problems, per_step = task.problems, args.batch_size // args.group
    budget = args.generations or args.group * len(problems)
    total = max(1, budget // args.batch_size)
    order = []
    while len(order) < total * per_step:
        rng = random.Random(seed_of(args.seed, "order", len(order)))
        order += rng.sample(problems, len(problems))
    return [order[i * per_step : (i + 1) * per_step] for i in range(total)]


def describe(lm: LM, groups: list[Group], step: int) -> dict:
    """Metrics of a step's responses."""
    responses, rewards = [], []
    for g in groups:
        responses += g.responses
        rewards += g.rewards
    metrics = {
        "reward": sum(rewards) / len(rewards),
        "length": sum(len(y.ids) for y in responses) / len(responses),
        "cut_off": sum(not y.finished for y in responses) / len(responses),
        "generations": step * len(responses),
    }
    if step % SHOW_EVERY == 1:
        text = lm.text(responses[0].ids)
        metrics["sample"] = Attempt(groups[0].problem, responses[0], text, rewards[0]).shown()
    return metrics


def train(
    task: Task,
    args: Namespace,
    run: Run,
    learn: Callable[[int], dict],
    total: int,
    teacher: Teacher | LoraTeacher | None = None,
) -> None:
    """`total` optimizer steps. learn(step): adds its gradient to the model's, returns metrics."""
    model = task.lm.model
    optimizer = Optimizer(model, BETAS, WEIGHT_DECAY)
    parts = {"teacher": teacher} if teacher else {}
    done = run.restore(optimizer=optimizer, **parts)
    run.evaluate(0)
    model.train()
    for step in range(done + 1, total + 1):
        run.begin_step(step)
        metrics = learn(step)
        lr = learning_rate(args, step, total)
        metrics.update(grad_norm=optimizer.step(lr), lr=lr)
        if teacher:
            teacher.update(step)
        run.end_step(step, total, metrics)
    if not any(line.get("grad_norm") for line in run.lines):
        fail("not one step had a gradient: no response told the method anything (see the log)", 1)


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    parser = make_parser(
        "Baselines: SFT, RFT, GRPO, SDFT, SDPO, with the flags of srt.py and sdzero.py.",
        FLAGS,
        output=Path("runs/baseline"),
    )
    args = parser.parse_args(argv)
    check_flags(args)
    for name, methods in BELONGS_TO.items():
        if getattr(args, name) is not None and args.method not in methods:
            fail(f"--{name.replace('_', '-')} belongs to --method {' and '.join(methods)}")
    args.group = args.group or GROUP[args.method]
    if args.batch_size % args.group and args.method != "rft":
        fail(f"--batch-size {args.batch_size} responses are not whole groups of {args.group}")
    if args.method in ("grpo", "sdpo") and args.group == 1:
        fail(f"--group 1 has no other response that --method {args.method} could learn from")
    if args.generations and args.generations < args.batch_size:
        fail(f"--generations {args.generations} is less than a batch of {args.batch_size}")
    args.epochs = args.epochs or 3
    if args.method in BELONGS_TO["teacher"]:
        args.teacher, args.teacher_rate = args.teacher or "ema", args.teacher_rate or 0.05
    # what `distill_step` reads besides: sdzero.py's defaults
    vars(args).update(objective="full_logits", alpha=1.0, skip_first=0, importance_cap=None)
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    task = setup(args)
    task.trained_on([p.key for p in task.problems])
    phrase_ids = task.lm.phrase_ids(args.phrase_right)
    traces, shown = None, {}
    if args.method in ("sft", "sdft"):
        solutions = load_solutions(task, args)
        traces = worked_solutions(task, solutions) if args.method == "sft" else None
        shown = {key: ids_of(task.lm, text) for key, text in solutions.items()}
    # a column that has changed is seen by --resume; of the other methods nothing comes from a file
    run = Run(task, traces or list(shown.items()) or None)
    if args.method in ("sft", "rft"):
        fine_tune(task, args, run, traces)
    elif args.method == "grpo":
        grpo(task, args, run)
    elif args.method == "sdft":
        from_a_teacher(task, args, run, lambda g: sdft_examples(g, shown, phrase_ids))
    else:
        from_a_teacher(task, args, run, lambda g: sdpo_examples(g, phrase_ids))
    run.finish()


if __name__ == "__main__":
    entry(main)
