"""Stage 2 of SD-Zero, on-policy self-distillation (arXiv 2604.12002, section 2.2): distil the
reviser into the generator.

    for each batch of problems x:
        sample y ~ pi(. | x)                       the student answers
        r = verify(y)                              right or wrong: one bit
        pi_bar reads x + y + P_r + y               the teacher: the same model, told that bit
    (4) L = sum_t D( pi(. | x, y_<t), pi_bar(. | x, y, P_r, y_<t) )        one optimizer step

    student reads    x            y EOS
    teacher reads    x  y  P_r    y EOS       only this second copy is scored

    python sdzero.py --model runs/srt --dataset open-r1/OpenR1-Math-220k \\
        --gradient-checkpointing --output runs/sdzero                            (one GPU)
    python sdzero.py --model runs/toy/srt --dataset runs/toy/stage2.jsonl \\
        --eval-dataset runs/toy/heldout.jsonl --max-new-tokens 64 --batch-size 32 --lr 3e-4 \\
        --warmup 5 --output runs/my-sdzero                         (CPU, after examples/toy.py)

--model is what srt.py saved: its srt.json brings the prompt, the control phrases and the problems
that stage 1 has used, which stage 2 leaves out.

Departures from the paper: README, "A real model on one GPU". Read `Example`, `make_loss`,
`distill`, `distill_step` and `main`.

Letters in shapes: N tokens in the loss, V vocabulary size, H hidden size.
"""

import math
import random
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

import torch

import losses
from common import (
    SHOW_EVERY,
    Attempt,
    Optimizer,
    Problem,
    Run,
    Task,
    check_flags,
    count,
    entry,
    fail,
    fraction,
    in_micro_batches,
    learning_rate,
    make_parser,
    natural,
    positive,
    sample_and_verify,
    seed_of,
    setup,
    share,
    warn,
)
from lora import LoraTeacher
from losses import OutputLayer, backward_by_chunks, predicting_last
from rollout import Rollout
from teacher import Teacher

BETAS, WEIGHT_DECAY = (0.9, 0.999), 0.01  # AdamW's, from the authors' scripts
OBJECTIVES = ["full_logits", "topk_logits", "sampled_token", "mixed_kl"]
POSITIONS = (16, 64, 256, 1024)  # the KL is logged for tokens 0 to 15, 16 to 63, ..., 1024 on

FLAGS = [
    ("epochs", count, 1, "passes over the problems; each samples anew"),
    ("objective", OBJECTIVES, "full_logits", "the divergence; mixed_kl is the authors' code's"),
    # 1 is the reverse KL, 0 the forward KL, between lies (5), which is 0 at both ends: 0.999 is
    # almost no loss. Of mixed_kl alpha is the weight of the FORWARD KL.
    (
        "alpha",
        fraction,
        None,
        "1: reverse KL, 0: forward KL (default: 1; mixed_kl's share of the forward KL: 0.5)",
    ),
    # the student's most likely tokens in topk_logits, the teacher's in mixed_kl
    ("topk", count, None, "tokens of topk_logits (default: 64), and of mixed_kl (default: all)"),
    ("no-tail", bool, False, "topk_logits: renormalise on the k tokens, without a tail bucket"),
    ("skip-first", natural, 0, "leave the first n tokens of every response out of the loss"),
    ("drop-truncated", bool, False, "leave responses that hit the length limit out of the loss"),
    ("passes", count, 1, "optimizer steps on each batch of responses"),
    ("importance-cap", positive, None, "c of README (6) (default: no weight)"),
    ("teacher", ["base", "live", "ema"], "base", "frozen; the student itself; moving average"),
    # teacher <- (1 - rate) teacher + rate student; a rate of 1 copies the student
    ("teacher-rate", share, None, "of ema, every --teacher-interval steps (default: 0.05)"),
    ("teacher-interval", count, None, "of ema, in optimizer steps (default: 1)"),
]


@dataclass
class Example:
    """One response with its verdict, as student and teacher read it."""

    prompt_ids: list[int]  # x
    response: Rollout  # y
    reward: int  # r
    phrase_ids: list[int]  # P_r

    @property
    def student_ids(self) -> list[int]:
        return self.prompt_ids + self.response.ids

    @property
    def teacher_ids(self) -> list[int]:
        """x + y + P_r + y: ids are put together, never tokenised again. The first copy has no EOS,
        as in stage 1; the second one keeps it."""
        first_copy = self.response.without_eos
        return self.prompt_ids + first_copy + self.phrase_ids + self.response.ids


def make_examples(task: Task, attempts: list[Attempt]) -> list[Example]:
    """What is trained on: the responses that fit the context twice, as the teacher reads them, and
    with --drop-truncated have ended by themselves."""
    phrases, examples = task.lm.phrases(task.args), []
    for attempt in attempts:
        x, y, r = attempt.problem.prompt_ids, attempt.response, attempt.reward
        example = Example(x, y, r, phrases[r])
        kept = y.finished or not task.args.drop_truncated
        if kept and len(example.teacher_ids) <= task.lm.context:
            examples.append(example)
    return examples


def batch_metrics(attempts: list[Attempt], examples: list[Example]) -> dict:
    """Means over the responses of a batch, and how many of them are not trained on."""
    n = len(attempts)
    return {
        "reward": sum(attempt.reward for attempt in attempts) / n,
        "length": sum(len(attempt.response.ids) for attempt in attempts) / n,
        "cut_off": sum(not attempt.response.finished for attempt in attempts) / n,
        "dropped": n - len(examples),
    }


def make_loss(args: Namespace):
    """D of README (4) for the logits of a few tokens, with what is logged beside it.

    Returns a function (student logits [N, V], teacher logits [N, V], token_ids [N], log pi_old of
    those tokens [N]) -> [N, 4]: the loss; the KL, which is the exact reverse KL over the vocabulary
    whatever the objective; the log ratio, log pi - log pi_bar of the sampled token; the student's
    entropy. All in nats.

    The mean log ratio would estimate the KL if the teacher did not know y_t. It does: it has read
    y, and one that copies makes every sampled token likelier, so that the mean can be negative
    where the KL is large.
    """
    temperature = args.temperature or 1  # both models are scored at it (greedy sampling: at 1)

    def loss(student_logits, teacher_logits, token_ids, old_logprobs):
        student_logits = student_logits / temperature
        teacher_logits = teacher_logits / temperature
        student_logprobs = losses.log_softmax(student_logits)
        teacher_logprobs = losses.log_softmax(teacher_logits)
        # full_logits shares its log-softmax with the figures below. The others get the logits: a
        # token that topk_logits leaves out must have the gradient 0. Through one more log-softmax
        # it would get a rounding error, of which AdamW makes a full step.
        if args.objective == "full_logits":
            value = losses.divergence(student_logprobs, teacher_logprobs, args.alpha)
        elif args.objective == "topk_logits":
            value = losses.topk_logits(
                student_logits, teacher_logits, args.topk, args.alpha, tail=not args.no_tail
            )
        elif args.objective == "mixed_kl":
            value = losses.mixed_kl(student_logits, teacher_logits, args.alpha, args.topk)
        else:
            value = losses.sampled_token(student_logits, teacher_logits, token_ids)
        with torch.no_grad():
            entropy = losses.entropy(student_logprobs)
            log_pi = student_logprobs.gather(-1, token_ids[:, None])[:, 0]
            log_ratio = log_pi - teacher_logprobs.gather(-1, token_ids[:, None])[:, 0]
            kl = value
            if (args.objective, args.alpha) != ("full_logits", 1):
                kl = losses.divergence(student_logprobs, teacher_logprobs, 1)
        if args.importance_cap:
            value = value * losses.importance_weight(log_pi, old_logprobs, args.importance_cap)
        return torch.stack([value, kl.detach(), log_ratio, entropy], dim=-1)

    return loss


def distill(
    student: torch.nn.Module,
    teacher: Teacher | LoraTeacher,
    student_layer: OutputLayer,
    teacher_layer: OutputLayer,
    examples: list[Example],
    args: Namespace,
    divisor: int,
) -> dict[str, torch.Tensor]:
    """Add the gradient of README (4) of some examples, divided by `divisor`, to the student's.

    One forward pass of each model; *_layer are their output layers. Returns values per token, [N]
    each, in the examples' order: "loss", "kl", "log_ratio" and "entropy" of `make_loss`, "reward",
    and "position" (t, from 0).
    """
    # Both models score the last ids of what they read: for the student y, for the teacher the
    # second copy of y. Position t-1 predicts token t in both sequences.
    counts = [len(e.response.ids) - args.skip_first for e in examples]
    student_hidden = predicting_last(student, [e.student_ids for e in examples], counts)  # [N, H]
    with teacher.scoring() as module:
        teacher_hidden = predicting_last(module, [e.teacher_ids for e in examples], counts)

    token_ids, old_logprobs, rewards, positions = [], [], [], []
    for example, n in zip(examples, counts):
        token_ids += example.response.ids[args.skip_first :]
        old_logprobs += example.response.logprobs[args.skip_first :]
        rewards += [example.reward] * n
        positions += range(args.skip_first, args.skip_first + n)
    device = student_hidden.device
    columns = backward_by_chunks(
        make_loss(args),
        student_layer,
        student_hidden,
        torch.tensor(token_ids, device=device),
        torch.tensor(old_logprobs, device=device),
        divisor=divisor,
        teacher=(teacher_layer, teacher_hidden),
        compiled=student_hidden.is_cuda,
    )
    values = dict(zip(("loss", "kl", "log_ratio", "entropy"), columns.unbind(-1)))
    values["reward"] = torch.tensor(rewards, device=device)
    values["position"] = torch.tensor(positions, device=device)
    return values


def distill_step(
    student: torch.nn.Module,
    teacher: Teacher | LoraTeacher,
    student_layer: OutputLayer,
    teacher_layer: OutputLayer,
    examples: list[Example],
    args: Namespace,
) -> dict:
    """Add the gradient of the mean of README (4) over all response tokens of this optimizer step.

    The divisor is counted before the micro-batches, so that cutting the step differently changes
    nothing. Without a single token the loss is 0 and the gradient is left alone. Returns metrics.
    Raises FloatingPointError when the loss is not finite.
    """
    examples = [e for e in examples if len(e.response.ids) > args.skip_first]
    divisor = sum(len(e.response.ids) - args.skip_first for e in examples)

    def backward(some: list[Example]) -> dict[str, torch.Tensor]:
        return distill(student, teacher, student_layer, teacher_layer, some, args, divisor)

    lengths = [len(e.teacher_ids) for e in examples]
    whole = in_micro_batches(student, examples, lengths, args.micro_tokens, backward)
    if not whole:
        return {"loss": 0.0, "kl": None, "log_ratio": None, "entropy": None, "loss_tokens": 0}
    loss = whole["loss"].sum().item() / divisor
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")

    def mean_kl(mask):
        return whole["kl"][mask].mean().item() if mask.any() else None

    by_position, edges = {}, (0, *POSITIONS, math.inf)
    for low, high in zip(edges, edges[1:]):
        by_position[low] = mean_kl((whole["position"] >= low) & (whole["position"] < high))
    return {
        "loss": loss,
        "kl": whole["kl"].mean().item(),
        "log_ratio": whole["log_ratio"].mean().item(),
        "entropy": whole["entropy"].mean().item(),
        "kl_right": mean_kl(whole["reward"] == 1),
        "kl_wrong": mean_kl(whole["reward"] == 0),
        "kl_from_position": by_position,
        "loss_tokens": divisor,
    }


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    parser = make_parser(
        "Stage 2 of SD-Zero: sample, verify, score with the reviser, learn.",
        FLAGS,
        save_every=20,
        output=Path("runs/sdzero"),
    )
    args = parser.parse_args(argv)
    check_flags(args)
    if args.objective == "sampled_token" and (args.alpha is not None or args.topk):
        fail("--objective sampled_token has neither --alpha nor --topk")
    if args.no_tail and args.objective != "topk_logits":
        fail("--no-tail belongs to --objective topk_logits")
    if args.topk and args.objective == "full_logits":
        fail("--topk belongs to --objective topk_logits and mixed_kl")
    if args.topk == 1 and (args.no_tail or args.objective == "mixed_kl"):
        fail("--topk 1 without a tail: one token has probability 1 on both sides, the loss is 0")
    if args.teacher != "ema" and (args.teacher_rate or args.teacher_interval):
        fail(f"--teacher {args.teacher} has no --teacher-rate or --teacher-interval: ema has")
    if args.alpha is None:
        args.alpha = 0.5 if args.objective == "mixed_kl" else 1.0
    if args.topk is None and args.objective == "topk_logits":
        args.topk = 64
    args.teacher_rate = args.teacher_rate or 0.05
    args.teacher_interval = args.teacher_interval or 1
    return args


def check(task: Task) -> None:
    """Warn of what the method does not mean; fail where even the shortest response would leave
    nothing to train on."""
    args, context = task.args, task.lm.context
    if not task.saved["problems"]:
        warn(f"{args.model} does not come from stage 1: it has not learnt to revise")
    if args.top_p < 1 or args.temperature == 0:
        own = "--top-p 1 and a --temperature above 0 sample it"
        warn(f"the loss is an expectation over the model's own distribution: {own}")
    if args.skip_first >= args.max_new_tokens:
        fail("--skip-first leaves nothing of a response of --max-new-tokens")
    prompts = [len(p.prompt_ids) for p in task.problems]
    phrases = [len(phrase_ids) for phrase_ids in task.lm.phrases(args)]
    least = min(prompts) + args.skip_first + min(phrases) + args.skip_first + 1  # its EOS
    if least > context:
        read = f"what the teacher reads has at least {least} tokens"
        fail(f"no response fits twice: {read}, the context {context}")
    fitting = (context - max(prompts) - max(phrases)) // 2
    if fitting < args.max_new_tokens:
        warn(f"responses of more than {fitting} tokens may not fit twice, and are then dropped")


def plan(args: Namespace, problems: list[Problem]) -> list[list[Problem]]:
    """The batches of all epochs."""
    batches, order = [], problems.copy()
    for epoch in range(args.epochs):
        random.Random(seed_of(args.seed, "order", epoch)).shuffle(order)
        batches += [order[i : i + args.batch_size] for i in range(0, len(order), args.batch_size)]
    return batches


def main(argv: list[str] | None = None) -> None:
    # set-up: the student, its frozen or moving teacher, the optimizer; a checkpoint if there is one
    args = parse_arguments(argv)
    task = setup(args)
    lm, student = task.lm, task.lm.model
    check(task)
    task.trained_on([p.key for p in task.problems])
    run = Run(task)
    # made before `restore`: the frozen teacher is the model that the run began with
    make_teacher = LoraTeacher if args.lora else Teacher
    teacher = make_teacher(student, args.teacher, args.teacher_rate, args.teacher_interval)
    optimizer = Optimizer(student, BETAS, WEIGHT_DECAY)
    done = run.restore(optimizer=optimizer, teacher=teacher)
    layers = OutputLayer(student, lm.vocab_size), OutputLayer(teacher.module, lm.vocab_size)
    batches = plan(args, task.problems)
    total = len(batches) * args.passes
    run.evaluate(0)
    student.train()

    for index, batch in enumerate(batches):
        first_step = index * args.passes + 1
        if first_step <= done:  # before --resume
            continue
        run.begin_step(first_step)

        # the student answers, the verifier gives its bit
        attempts = sample_and_verify(task, batch, ("responses", first_step))
        examples = make_examples(task, attempts)
        tokens = sum(len(attempt.response.ids) for attempt in attempts)

        for step in range(first_step, first_step + args.passes):
            # the teacher scores, the student moves towards it, then the teacher follows (ema)
            metrics = distill_step(student, teacher, *layers, examples, args)
            lr = learning_rate(args, step, total)
            grad_norm = optimizer.step(lr)
            teacher.update(step)

            metrics.update(batch_metrics(attempts, examples), grad_norm=grad_norm, lr=lr)
            first = step == first_step  # the responses were sampled in it
            if first and index % SHOW_EVERY == 0:
                metrics["sample"] = attempts[0].shown()
            run.end_step(step, total, metrics, tokens if first else 0)
    if not any(line.get("loss_tokens") for line in run.lines):
        fail("not one token was trained on: the responses are dropped (see the log's lines)", 1)
    run.finish()


if __name__ == "__main__":
    entry(main)
