"""Stage 1 of SD-Zero, Self-Revision Training (arXiv 2604.12002, section 2.1): learn to revise.

    for each problem x:   sample y_init ~ pi(. | x)                          attempt
                          r = verify(y_init)                                 right or wrong: 1 bit
                          sample y_rev ~ pi(. | x, y_init, P_r)              revise in the same turn
                          keep (x, y_init, P_r, y_rev) if y_rev verifies     a trace
    fine-tune on          (1) L_revision   = - log pi(y_rev | x, y_init, P_r)
                          (2) L_generation = - log pi(y_init, P_r, y_rev | x)
                          (3) L_SRT        = (1) + (2)

Both terms score the same sequence, so one forward pass with per-token weights gives both:

    sequence    x       y_init   P_r     y_rev EOS
    weight      0       1        1       2

    python srt.py --model Qwen/Qwen3-4B-Instruct-2507 --dataset open-r1/OpenR1-Math-220k \\
        --gradient-checkpointing --output runs/srt                               (one GPU)
    python srt.py --model runs/toy/base --dataset runs/toy/stage1.jsonl --problems 3000 \\
        --eval-dataset runs/toy/heldout.jsonl --max-new-tokens 64 --temperature 1 --batch-size 16 \\
        --lr 5e-4 --output runs/my-srt                             (CPU, after examples/toy.py)

Where this departs from the paper: held-out problems of the same data set are evaluated instead of
benchmarks; an attempt is not revised where the context might not hold it with the longest
revision (nothing is ever cut). Read `collect`, `srt_loss` and `main`; what both stages share is in
common.py.

Letters in shapes: N tokens in the loss, H hidden size.
"""

import json
import math
import random
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from common import (
    LM,
    Optimizer,
    Problem,
    Run,
    Task,
    barrier,
    check_flags,
    count,
    entry,
    explained,
    fail,
    in_micro_batches,
    key_of,
    learning_rate,
    make_parser,
    render,
    revise,
    sample_and_verify,
    seed_of,
    setup,
    warn,
)
from losses import OutputLayer, backward_by_chunks, predicting_last, token_logprobs

BETAS, WEIGHT_DECAY = (0.9, 0.95), 1e-4  # AdamW's, the paper's
PROBLEMS_AT_ONCE = 256  # sampled together; a run that is killed repeats at most these
# (loss weight of y_init and P_r, of y_rev)
LOSS_WEIGHTS = {"both": (1, 2), "generation": (1, 1), "revision": (0, 1)}

FLAGS = [
    ("attempts", count, 1, "n: first attempts per problem"),
    ("revisions", count, 3, "m: revisions per attempt, right or wrong"),
    ("epochs", count, 3, "passes over the traces"),
    # sequential is the authors' code: L_generation on traces of wrong attempts, then L_revision
    ("terms", [*LOSS_WEIGHTS, "sequential"], "both", "of L_SRT; sequential: one after the other"),
    ("collect-only", bool, False, "stop when the traces are saved"),
    ("traces", Path, None, "train on the traces.jsonl of a --collect-only run"),
]


@dataclass
class Trace:
    """A revision that verified, with what led to it."""

    problem: str
    answer: object
    reward: int  # r, of the first attempt
    phrase: str  # P_r
    init_text: str
    revision_text: str
    finished: bool  # the revision ended by itself
    prompt_ids: list[int]  # x
    init_ids: list[int]  # y_init, without EOS: stage 1 never shows one before P_r
    phrase_ids: list[int]
    revision_ids: list[int]  # y_rev, with the EOS that ended it, if one did

    @property
    def ids(self) -> list[int]:
        """The sequence that both terms score: ids are put together, never tokenised again."""
        return self.prompt_ids + self.init_ids + self.phrase_ids + self.revision_ids

    def weights(self, pair: tuple[int, int]) -> list[int]:
        """The loss weight of each token after x, by a pair of `LOSS_WEIGHTS`."""
        before = len(self.init_ids) + len(self.phrase_ids)
        return [pair[0]] * before + [pair[1]] * len(self.revision_ids)


def collect(task: Task, problems: list[Problem], chunk: int) -> tuple[list[Trace], dict]:
    """Sample, verify, revise, verify. Returns (traces whose revision is right, counts).

    Identical traces count once. A revision that hit the length limit verifies or not like any
    other. Attempts whose longest revision would not fit the context are not revised; "too_long"
    counts the revisions that are missing.
    """
    args, phrases = task.args, task.lm.phrases(task.args)
    asked = [p for p in problems for _ in range(args.attempts)]
    attempts = sample_and_verify(task, asked, ("attempts", chunk))
    pairs = revise(task, attempts, args.revisions, ("revisions", chunk))

    traces = {}
    for attempt, revision in pairs:
        problem, init_ids, r = attempt.problem, attempt.response.without_eos, attempt.reward
        same = problem.key, tuple(init_ids), tuple(revision.response.ids)
        if not revision.reward or same in traces:
            continue
        traces[same] = Trace(
            problem=problem.text,
            answer=problem.answer,
            reward=r,
            phrase=(args.phrase_wrong, args.phrase_right)[r],
            init_text=task.lm.text(init_ids),
            revision_text=revision.text,
            finished=revision.response.finished,
            prompt_ids=problem.prompt_ids,
            init_ids=init_ids,
            phrase_ids=phrases[r],
            revision_ids=revision.response.ids,
        )
    revised_right = sum(attempt.reward for attempt, _ in pairs)
    kept_right = sum(trace.reward for trace in traces.values())
    counts = {
        "problems": len(problems),
        "attempts": len(attempts),
        "right": sum(attempt.reward for attempt in attempts),
        "cut_off": sum(not attempt.response.finished for attempt in attempts),
        "too_long": len(attempts) * args.revisions - len(pairs),
        "revisions_of_wrong": len(pairs) - revised_right,
        "kept_of_wrong": len(traces) - kept_right,
        "revisions_of_right": revised_right,
        "kept_of_right": kept_right,
        "sample": attempts[0].shown(),
    }
    return list(traces.values()), counts


def srt_loss(
    model: torch.nn.Module, layer: OutputLayer, traces: list[Trace], pair: tuple, divisor: float
) -> dict[str, torch.Tensor]:
    """Add the gradient of README (3) of some traces to the model's, in one forward pass.

    (1) scores y_rev; (2) scores y_init, P_r and y_rev: the pair (1, 2) of `LOSS_WEIGHTS` is their
    sum. The loss is the sum of weight x -log pi over all tokens, divided by `divisor`: the sum of
    the weights in the whole optimizer step, which the caller counts, so that micro-batches change
    nothing. Returns "nll" (-log pi) and "weight" of the tokens after x, [N] each.
    """
    token_ids, weights = [], []
    for trace in traces:
        token_ids += trace.ids[len(trace.prompt_ids) :]
        weights += trace.weights(pair)
    counts = [len(trace.ids) - len(trace.prompt_ids) for trace in traces]
    hidden = predicting_last(model, [trace.ids for trace in traces], counts)  # [N, H]
    token_ids = torch.tensor(token_ids, device=hidden.device)  # [N]
    weights = torch.tensor(weights, device=hidden.device)  # [N]

    def weighted_nll(logits, ids, weight):
        nll = -token_logprobs(logits, ids)
        return torch.stack([weight * nll, nll], dim=-1)

    columns = backward_by_chunks(
        weighted_nll, layer, hidden, token_ids, weights, divisor=divisor, compiled=hidden.is_cuda
    )
    return {"nll": columns[:, 1], "weight": weights}


def srt_step(
    model: torch.nn.Module, layer: OutputLayer, traces: list[Trace], pair: tuple, micro_tokens: int
) -> dict:
    """Add the gradient of one optimizer step's mean loss to the model's; returns its metrics. The
    result does not depend on the micro-batches."""
    divisor = sum(sum(trace.weights(pair)) for trace in traces)

    def backward(some: list[Trace]) -> dict[str, torch.Tensor]:
        return srt_loss(model, layer, some, pair, divisor)

    lengths = [len(trace.ids) for trace in traces]
    whole = in_micro_batches(model, traces, lengths, micro_tokens, backward)
    loss = (whole["nll"] * whole["weight"]).sum().item() / divisor
    if not math.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss}")
    return {
        "loss": loss,
        "nll": whole["nll"].mean().item(),  # per token, of y_init, P_r and y_rev alike
        "reward": sum(trace.reward for trace in traces) / len(traces),  # of the first attempts
        "length": sum(len(trace.revision_ids) for trace in traces) / len(traces),
        "cut_off": sum(not trace.finished for trace in traces) / len(traces),
        "tokens": sum(len(trace.ids) for trace in traces),
    }


def plan(args: Namespace, traces: list[Trace]) -> list[tuple[list[Trace], tuple[int, int]]]:
    """All optimizer steps: (traces, loss weights)."""
    wrong = [trace for trace in traces if not trace.reward]
    phases = [(traces, args.terms)]
    if args.terms == "sequential":
        phases = [(wrong, "generation"), (traces, "revision")]
    steps = []
    for chosen, terms in phases:
        for epoch in range(args.epochs):
            order = chosen.copy()
            random.Random(seed_of(args.seed, "order", terms, epoch)).shuffle(order)
            for i in range(0, len(order), args.batch_size):
                steps.append((order[i : i + args.batch_size], LOSS_WEIGHTS[terms]))
    return steps


def train(task: Task, traces: list[Trace], run: Run) -> None:
    """Fine-tune on L_SRT, from the last checkpoint if there is one."""
    args, model = task.args, task.lm.model
    optimizer = Optimizer(model, BETAS, WEIGHT_DECAY)
    done = run.restore(optimizer=optimizer)
    layer = OutputLayer(model, task.lm.vocab_size)
    steps = plan(args, traces)
    model.train()
    for step in range(done + 1, len(steps) + 1):
        run.begin_step(step)
        batch, pair = steps[step - 1]
        metrics = srt_step(model, layer, batch, pair, args.micro_tokens)
        lr = learning_rate(args, step, len(steps))
        grad_norm = optimizer.step(lr)
        metrics.update(grad_norm=grad_norm, lr=lr)
        run.end_step(step, len(steps), metrics, metrics["tokens"])


def collect_all(task: Task, run: Run) -> list[Trace]:
    """`collect` chunk by chunk into traces.jsonl. A chunk whose file exists is done."""
    path, lines, tried = run.folder / "traces.jsonl", [], 0
    if not path.exists():
        for chunk, start in enumerate(range(0, len(task.problems), PROBLEMS_AT_ONCE)):
            file = run.folder / f"chunk-{chunk}.json"
            if file.exists():
                saved = json.loads(file.read_text())
            else:
                started = time.time()
                problems = task.problems[start : start + PROBLEMS_AT_ONCE]
                traces, counts = collect(task, problems, chunk)
                counts["seconds"] = time.time() - started
                saved = {"counts": counts, "traces": [asdict(trace) for trace in traces]}
                run.write(file.name, json.dumps(saved))
            run.log("collect", chunk + 1, saved["counts"])
            lines += [json.dumps(trace) + "\n" for trace in saved["traces"]]
            tried += saved["counts"]["revisions_of_wrong"] + saved["counts"]["revisions_of_right"]
        if not lines:
            fail(
                f"not one of {tried} revisions verified: try a stronger model, easier problems, "
                "more --revisions, another --prompt-suffix, --verifier or --max-new-tokens"
            )
        run.write(path.name, "".join(lines))
    barrier()  # all processes have read the chunks, and the traces are written
    for file in run.folder.glob("chunk-*.json"):
        file.unlink(missing_ok=True)
    return [Trace(**json.loads(line)) for line in open(path)]


def load_traces(lm: LM, args: Namespace) -> tuple[list[Trace], list[str]]:
    """Traces of an earlier --collect-only run, and the keys of all problems that it tried: those
    of the srt.json beside them, or else of the traces."""
    path = args.traces
    made = f"{path} was collected with"
    other = f"{path} is not a traces file of srt.py"
    if not path.is_file():
        fail(f"cannot read {path}: there is no such file")
    with explained(other):
        traces = [Trace(**json.loads(line)) for line in open(path)]
        if not traces:
            fail(f"{path} holds no trace")
        for trace in traces:
            right = isinstance(trace.reward, int) and trace.reward in (0, 1)
            right = right and isinstance(trace.problem, str)
            known = all(type(i) is int and 0 <= i < lm.vocab_size for i in trace.ids)
            if not (right and known and trace.revision_ids):
                fail(f"{other}: a reward or an id is out of range")
    for trace in traces:
        if trace.phrase != (args.phrase_wrong, args.phrase_right)[trace.reward]:
            flag = ("--phrase-wrong", "--phrase-right")[trace.reward]
            fail(f"{made} the phrase {trace.phrase!r}: give it as {flag}")
        if trace.phrase_ids != lm.phrase_ids(trace.phrase):
            fail(f"{made} another tokenizer than that of {args.model}")
        if trace.prompt_ids != render(lm, trace.problem, args):
            fail(f"{made} another prompt: repeat that run's flags, and keep its srt.json beside it")
        if len(trace.ids) > lm.context:
            fail(f"{path} holds a trace of {len(trace.ids)} tokens, the context {lm.context}")
    beside = path.parent / "srt.json"
    with explained(f"{beside} is damaged"):
        tried = json.loads(beside.read_text())["problems"] if beside.exists() else []
    return traces, sorted({*tried, *(key_of(trace.problem) for trace in traces)})


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    parser = make_parser(
        "Stage 1 of SD-Zero: sample, verify, revise, keep what verifies, fine-tune.",
        FLAGS,
        max_new_tokens=16384,
        temperature=0.7,
        batch_size=4,
        lr_schedule="cosine",
        warmup=0.05,
        eval_every=2000,
        save_every=500,
        output=Path("runs/srt"),
    )
    args = parser.parse_args(argv)
    check_flags(args)
    if args.collect_only and args.traces:
        fail("--collect-only and --traces contradict each other")
    return args


def check_lengths(task: Task) -> None:
    """Fail where not even an attempt that is nothing but EOS could be revised, see `revise`."""
    least = min(len(p.prompt_ids) for p in task.problems) + task.args.max_new_tokens
    least += min(len(phrase_ids) for phrase_ids in task.lm.phrases(task.args))
    if least > task.lm.context:
        holds = f"the context holds {task.lm.context} tokens"
        least = f"a prompt with a revision has at least {least}: lower --max-new-tokens"
        fail(f"no attempt can be revised: {holds}, {least}")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    task = setup(args, half=True)
    if args.traces:
        traces, tried = load_traces(task.lm, args)
        unseen = [p for p in task.held_out if p.key not in tried]
        if seen := len(task.held_out) - len(unseen):
            left = f"{seen} of {len(task.held_out)} held-out problems are left out"
            warn(f"{left}: the traces are of them")
        task.held_out, task.counts["held_out"] = unseen, len(unseen)
    else:
        traces, tried = None, [p.key for p in task.problems]
        check_lengths(task)
    task.trained_on(tried, stage_1=True)
    run = Run(task, traces)
    if not args.collect_only:
        run.evaluate(0)
    if traces is None:
        traces = collect_all(task, run)
    if args.collect_only:
        run.write("srt.json", json.dumps(task.saved, indent=1))
        print(f"saved {args.output / 'traces.jsonl'}: {len(traces)} traces")
        return
    train(task, traces, run)
    run.finish()


if __name__ == "__main__":
    entry(main)
