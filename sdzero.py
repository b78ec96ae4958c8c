"""Stage 2 of SD-Zero, on-policy self-distillation (arXiv 2604.12002, section 2.2; METHOD.md (4)): distil the reviser into the generator.

    for each batch of problems x:   sample y ~ pi(. | x)                       the student answers
                                    r = verify(y)                              one bit
                                    pi_bar reads x + y + P_r and scores y again: the same model, told only right or wrong
                                    L = sum_t D(pi(. | x, y_<t), pi_bar(. | x, y, P_r, y_<t)), one optimizer step

    python sdzero.py --model runs/toy/srt --dataset runs/toy/stage2.jsonl --max-new-tokens 64 --output runs/toy/sdzero     (small, CPU)
    python sdzero.py --model runs/srt --dataset open-r1/OpenR1-Math-220k --output runs/sdzero                             (real, one GPU)

--model is what srt.py saved: its srt.json brings the prompt's settings, the control phrases and the problems that stage 1 has used, which
stage 2 leaves out. `main`, at the end, is the algorithm box. Departures from the paper, each a flag: the objective is the whole vocabulary
(theirs: top 64), and sampling is at temperature 1, since (4) is an expectation over pi itself.
"""

import json
import math
import random
import sys
import time
from dataclasses import dataclass

import torch
from tqdm import tqdm

import losses
from losses import OutputLayer, backward_by_chunks, importance_weight, token_logprobs
from rollout import Rollout
from srt import (
    PROMPT_DEFAULTS, BadInput, Optimizer, Parser, Run, add_arguments, check_arguments, checkpoint_layers, entry, evaluate, finite,
    hidden_states, inherit_prompt, learning_rate, load_lm, load_verifier, micro_batches, predicting, report_memory, sample, seed_of, split_problems, without_eos,
)  # fmt: skip
from teacher import Teacher

POSITIONS = (16, 64, 256, 1024)  # the KL is logged for tokens before each of these, and for the rest


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
        """x + y + P_r + y: ids are put together, never tokenised again; the first copy has no EOS, the second one keeps it."""
        return self.prompt_ids + without_eos(self.response) + self.phrase_ids + self.response.ids


def objective(args):
    """The function (student logits [N, V], teacher logits [N, V], token_ids [N]) -> [N] that --objective names."""
    if args.objective == "full_logits":
        return lambda student, teacher, token_ids: losses.full_logits(student, teacher, args.alpha)
    if args.objective == "topk_logits":
        return lambda student, teacher, token_ids: losses.topk_logits(student, teacher, args.topk, args.alpha, tail=not args.no_tail)
    if args.objective == "mixed_kl":
        return lambda student, teacher, token_ids: losses.mixed_kl(student, teacher, args.alpha, args.topk)
    return losses.sampled_token


def distill(student, teacher, student_layer, teacher_layer, examples: list[Example], args, divisor: int) -> dict[str, torch.Tensor]:
    """Add the gradient of (4) of some examples, divided by `divisor`, to the student's: one forward of each model.

    student: model; teacher: `Teacher`; *_layer: their output layers. Returns per token [N], in the examples' order: "loss", "kl" (the
    reverse KL of (4) over the whole vocabulary, whatever the objective), "log_ratio" (log pi - log pi_bar of the sampled token), "reward"
    and "position" (t, from 0). The mean log ratio would estimate the KL if the teacher did not know y_t. It does: it has read y, and a teacher
    that copies makes every sampled token likelier, so that the ratio's mean can be negative where the KL is large.
    """
    spans = [(len(e.prompt_ids) + args.skip_first, len(e.student_ids)) for e in examples]
    shifts = [len(e.teacher_ids) - len(e.student_ids) for e in examples]  # the second copy's distance from the first
    student_h = predicting(hidden_states(student, [e.student_ids for e in examples]), *zip(*spans))  # [N, D]
    with teacher.scoring() as module:
        teacher_h = hidden_states(module, [e.teacher_ids for e in examples])
        teacher_h = predicting(
            teacher_h, *zip(*[(start + d, end + d) for (start, end), d in zip(spans, shifts)])
        )  # [N, D], the SECOND copy
    device, divergence = student_h.device, objective(args)
    token_ids = torch.tensor([t for e in examples for t in e.response.ids[args.skip_first :]], device=device)
    old_logprobs = torch.tensor([p for e in examples for p in e.response.logprobs[args.skip_first :]], device=device)
    temperature = args.temperature or 1  # sampling's belongs to both distributions; at 0 there is none to speak of

    def loss(student_l, teacher_l, token_ids, old_logprobs):
        with torch.no_grad():
            teacher_l = teacher_l / temperature
            log_pi, log_pi_bar = token_logprobs(student_l / temperature, token_ids), token_logprobs(teacher_l, token_ids)
        value = kl = divergence(student_l / temperature, teacher_l, token_ids)
        if (args.objective, args.alpha) != ("full_logits", 1):
            kl = losses.full_logits(student_l.detach() / temperature, teacher_l)
        if args.importance_cap:
            value = value * importance_weight(log_pi, old_logprobs, args.importance_cap)
        return torch.stack([value, kl, log_pi - log_pi_bar], dim=-1)

    columns = backward_by_chunks(
        loss, student_layer, student_h, token_ids, old_logprobs, divisor=divisor, teacher=(teacher_layer, teacher_h)
    )
    counts = [end - start for start, end in spans]
    return {
        "loss": columns[:, 0],
        "kl": columns[:, 1],
        "log_ratio": columns[:, 2],
        "reward": torch.tensor([e.reward for e, n in zip(examples, counts) for _ in range(n)], device=device),
        "position": torch.tensor([args.skip_first + i for n in counts for i in range(n)], device=device),
    }


def distill_step(student, teacher, student_layer, teacher_layer, examples: list[Example], args) -> dict:
    """Add the gradient of the mean of (4) over all response tokens of this optimizer step to the student's; returns its metrics.

    The divisor is counted before the micro-batches, so that cutting the step differently changes nothing. Without a single token the
    loss is 0 and the gradient is left alone.
    """
    examples = [e for e in examples if len(e.response.ids) > args.skip_first]
    divisor = sum(len(e.response.ids) - args.skip_first for e in examples)
    parts = []
    for group in tqdm(
        micro_batches([len(e.teacher_ids) for e in examples], args.micro_tokens), desc="training", delay=2, leave=False, disable=None
    ):
        parts.append(distill(student, teacher, student_layer, teacher_layer, [examples[i] for i in group], args, divisor))
    if not parts:
        return {"loss": 0.0, "kl": None, "log_ratio": None, "loss_tokens": 0}
    whole = {name: torch.cat([p[name] for p in parts]) for name in parts[0]}

    def mean(mask):
        return whole["kl"][mask].mean().item() if mask.any() else None

    edges = (0, *POSITIONS, math.inf)
    return {
        "loss": finite(whole["loss"].sum().item() / divisor),
        "kl": whole["kl"].mean().item(),
        "log_ratio": whole["log_ratio"].mean().item(),
        "kl_right": mean(whole["reward"] == 1),
        "kl_wrong": mean(whole["reward"] == 0),
        "kl_from_position": {a: mean((whole["position"] >= a) & (whole["position"] < b)) for a, b in zip(edges, edges[1:])},
        "loss_tokens": divisor,
    }


def parse_arguments(argv=None):
    parser = Parser("Stage 2 of SD-Zero, on-policy self-distillation: sample, verify, score with the reviser, learn. "
                    "Defaults are the paper's where it has one.")  # fmt: skip
    add = parser.add_argument
    add_arguments(parser, max_new_tokens=8192, temperature=1.0, problems="all that stage 1 and the evaluation left", batch_size=128,
                  lr_schedule="constant", warmup=20, weight_decay=0.01, betas=(0.9, 0.999), output="runs/sdzero")  # fmt: skip
    add("--epochs", type=int, default=1, help="passes over the problems, each with fresh responses")
    add("--objective", choices=["full_logits", "topk_logits", "sampled_token", "mixed_kl"], default="full_logits",
        help="D of (4); mixed_kl is the authors' code's")  # fmt: skip
    add("--alpha", type=float, help="full_logits, topk_logits: 1 reverse KL, 0 forward KL, between them the generalised Jensen-Shannon "
        "divergence, which goes to 0 at both ends: 0.999 is not almost 1 (default: 1); mixed_kl: weight of the forward KL (default: 0.5)")  # fmt: skip
    add("--topk", type=int, help="tokens of topk_logits (the student's) and of mixed_kl (the teacher's) (default: 64; mixed_kl: all)")
    add("--no-tail", action="store_true", help="topk_logits: renormalise on the k tokens instead of keeping the rest as one bucket")
    add("--skip-first", type=int, default=0, help="leave the first n tokens of every response out of the loss")
    add("--drop-truncated", action="store_true", help="leave responses that hit the length limit out of the loss")
    add("--passes", type=int, default=1, help="optimizer steps on each batch of responses")
    add("--importance-cap", type=float, help="weight each token by min(pi / pi_old, this), METHOD.md (6) (default: no weight)")
    add("--teacher", choices=["base", "live", "ema"], default="base",
        help="frozen stage-1 weights; the student's own; or their moving average")  # fmt: skip
    add("--teacher-rate", type=float, help="ema: teacher <- (1 - rate) teacher + rate student; 1 copies (default: 0.05)")
    add("--teacher-interval", type=int, help="ema: optimizer steps between updates (default: 1)")
    args = parser.parse_args(argv)
    check_arguments(args)
    if min(args.epochs, args.passes) < 1 or args.skip_first < 0 or (args.topk or 1) < 1 or (args.importance_cap or 1) <= 0:
        raise BadInput("--epochs, --passes, --topk and --importance-cap must be positive, --skip-first not negative")
    if args.objective == "sampled_token" and (args.alpha is not None or args.topk):
        raise BadInput("--objective sampled_token has neither --alpha nor --topk")
    if args.objective != "topk_logits" and args.no_tail or args.objective == "full_logits" and args.topk:
        raise BadInput("--no-tail belongs to --objective topk_logits, --topk to topk_logits and mixed_kl")
    if args.teacher != "ema" and (args.teacher_rate is not None or args.teacher_interval is not None):
        raise BadInput(f"--teacher {args.teacher} has neither --teacher-rate nor --teacher-interval: --teacher ema has")
    if args.alpha is None:
        args.alpha = 0.5 if args.objective == "mixed_kl" else 1.0
    if args.topk is None and args.objective == "topk_logits":
        args.topk = 64
    args.teacher_rate, args.teacher_interval = args.teacher_rate or 0.05, args.teacher_interval or 1
    if not 0 <= args.alpha <= 1 or not 0 < args.teacher_rate <= 1 or args.teacher_interval < 1:
        raise BadInput("--alpha must lie in [0, 1], --teacher-rate in (0, 1], --teacher-interval must be positive")
    return args


def main(argv=None):
    args = parse_arguments(argv)
    stage_1 = inherit_prompt(args)
    verify = load_verifier(args.verifier)
    lm = load_lm(args)
    used = stage_1["problems"] if stage_1 else []
    problems, held_out, counts = split_problems(lm, args, set(used), args.problems or sys.maxsize)
    if args.eval_only:
        print(json.dumps(evaluate(lm, args, verify, held_out, 0), indent=1))
        return
    srt = {"prompt": {name: getattr(args, name) for name in PROMPT_DEFAULTS}, "problems": used}
    run = Run(args, srt, {"eos_ids": sorted(lm.eos_ids), "vocab_size": lm.vocab_size, "context": lm.context, "counts": counts})
    if (args.output / "config.json").exists():
        print(f"{args.output} is complete")
        return
    print(f"problems: {json.dumps(counts)}")
    report_memory(lm, args, problems, args.teacher)
    if not stage_1:
        print(
            f"warning: {args.model} has no srt.json, so stage 1 did not make it: without a reviser stage 2 gains almost nothing",
            file=sys.stderr,
        )
    if args.top_p < 1 or args.temperature == 0:
        print(
            "warning: the loss is an expectation over the model's own distribution: --top-p 1 and a --temperature above 0 sample it",
            file=sys.stderr,
        )

    # load: the student, its frozen or moving teacher, the optimizer; a checkpoint if there is one
    student, teacher = lm.model, Teacher(lm.model, args.teacher, args.teacher_rate, args.teacher_interval)
    optimizer, state = Optimizer(student, args), run.restore(lm)
    if state:
        optimizer.load_state_dict(state["optimizer"])
        teacher.load_state_dict(state["teacher"])
    else:
        run.rewind(0)
    if args.gradient_checkpointing:
        checkpoint_layers(student)
    student_layer, teacher_layer = OutputLayer(student, lm.vocab_size), OutputLayer(teacher.module, lm.vocab_size)
    phrases = [lm.phrase_ids(args.phrase_wrong), lm.phrase_ids(args.phrase_right)]
    batches = []
    for epoch in range(args.epochs):
        random.Random(seed_of(args.seed, "order", epoch)).shuffle(problems)
        batches += [problems[i : i + args.batch_size] for i in range(0, len(problems), args.batch_size)]
    total = len(batches) * args.passes
    student.train()
    if held_out and not state:
        run.log("eval", 0, evaluate(lm, args, verify, held_out, 0))

    for step in range(state["step"] + 1 if state else 1, total + 1, args.passes):  # checkpoints lie between batches
        started, batch = time.time(), batches[(step - 1) // args.passes]
        torch.manual_seed(seed_of(args.seed, "dropout", step))

        # sample y ~ pi(. | x), verify: r
        responses = sample(lm, args, [p.prompt_ids for p in batch], ("responses", step), args.temperature, args.top_p, "responses")
        rewards = verify([lm.text(y.ids) for y in responses], [p.answer for p in batch])

        # what the teacher reads, x + y + P_r + y, must fit the context whole
        examples = [Example(p.prompt_ids, y, r, phrases[r]) for p, y, r in zip(batch, responses, rewards)]
        fitting = [e for e in examples if len(e.teacher_ids) <= lm.context]
        scored = [e for e in fitting if e.response.finished or not args.drop_truncated]

        # score, loss, step
        for step in range(step, step + args.passes):
            metrics = distill_step(student, teacher, student_layer, teacher_layer, scored, args)
            lr = learning_rate(args, step, total)
            norm = optimizer.step(lr)
            teacher.update(step)
            seconds = time.time() - started
            run.log("train", step, {
                **metrics, "reward": sum(rewards) / len(batch), "length": sum(len(y.ids) for y in responses) / len(batch),
                "cut_off": sum(not y.finished for y in responses) / len(batch), "dropped": len(batch) - len(scored),
                "grad_norm": norm, "lr": lr, "tokens_per_s": sum(len(y.ids) for y in responses) / seconds, "seconds": seconds,
            })  # fmt: skip
            started = time.time()
        if held_out and (step // args.eval_every > (step - args.passes) // args.eval_every or step == total):
            run.log("eval", step, evaluate(lm, args, verify, held_out, step))
        if step // args.save_every > (step - args.passes) // args.save_every and step < total:
            run.checkpoint(lm, step, {"optimizer": optimizer.state_dict(), "teacher": teacher.state_dict()})
    run.finish(lm)


if __name__ == "__main__":
    entry(main)
