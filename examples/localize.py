"""Where does the teacher differ? A page of a student's responses, every token coloured by its KL.

    python examples/localize.py --model runs/toy/base --teacher runs/toy/srt \\
        --dataset runs/toy/heldout.jsonl --max-new-tokens 64

--model answers, the verifier gives its bit r, and --teacher, a stage-1 model, reads x + y + P_r + y
as in sdzero.py. The KL of a token is the t-th term of README (4) at the sampling temperature:
D_KL(student || teacher) over the whole vocabulary, in nats. The paper's claim (self-localisation):
though the teacher is told one bit about the whole response, it differs from the student in few
places of a wrong response, and hardly anywhere in a right one.

The problems are those that an evaluation with the same --dataset holds out, without those that
either model was trained on. The page is one file without script or network.

Letters in shapes: T tokens of a response, N tokens of several, D hidden size, V vocabulary size.
"""

import json
import os
import re
import sys
from argparse import Namespace
from html import escape
from pathlib import Path
from string import Template

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from common import (
    LM,
    REQUIRED,
    VERDICTS,
    Problem,
    check_flags,
    count,
    entry,
    explained,
    fail,
    inherit_prompt,
    load_lm,
    load_verifier,
    make_parser,
    sample_all,
    split_problems,
)
from losses import OutputLayer, full_logits, micro_batches, predicting_last, token_logprobs
from sdzero import Example

LEVELS = (0.03, 0.1, 0.3, 1, 3)  # nats, where the colour changes: fixed, to compare two pages
BARS = 20
LOGITS = 2**22  # computed at a time
ROWS = [  # of the page's table: label, key of `summarize`, format
    ("responses", "responses", "d"),
    ("their tokens", "tokens", "d"),
    ("mean KL per token", "mean_kl", ".3g"),
    ("the same of the median response", "median_kl", ".3g"),
    ("of the KL of all these tokens, in the top 5% of them", "top5_all", ".0%"),
    ("of a response's KL, in its own top 5%, on average", "top5_each", ".0%"),
]
FLAGS = [
    ("teacher", str, REQUIRED, "the reviser: a stage-1 model, hub name or folder"),
    ("shown", count, 24, "responses on the page; the figures are over all of them"),
]
# Flags of training and of runs, which would do nothing here.
UNUSED = (
    *("problems", "top_p", "batch_size", "lr", "lr_schedule", "warmup", "eval_samples"),
    *("gradient_checkpointing", "eval_temperature", "eval_every", "eval_only", "save_every"),
    *("resume", "lora"),
)


@torch.no_grad()
def score(lm: LM, teacher: LM, examples: list[Example], args: Namespace) -> list[torch.Tensor]:
    """For each example a float64 table [T, 6], one row per token y_t of its response:

    D_KL(student || teacher); the student's and the teacher's probability of y_t; the student's and
    the teacher's probability of the teacher's most likely token; that token's id.
    """
    layers = OutputLayer(lm.model, lm.vocab_size), OutputLayer(teacher.model, lm.vocab_size)
    temperature = args.temperature or 1
    tables = [None] * len(examples)
    for group in micro_batches([len(e.teacher_ids) for e in examples], args.micro_tokens):
        chosen = [examples[i] for i in group]
        counts = [len(e.response.ids) for e in chosen]
        # both models score the last T ids of what they read: [N, H] each
        student_hidden = predicting_last(lm.model, [e.student_ids for e in chosen], counts)
        teacher_hidden = predicting_last(teacher.model, [e.teacher_ids for e in chosen], counts)
        token_ids = []
        for e in chosen:
            token_ids += e.response.ids
        rows, size = [], max(1, LOGITS // lm.vocab_size)
        tensors = student_hidden, teacher_hidden, torch.tensor(token_ids, device=lm.model.device)
        for student_h, teacher_h, y in zip(*(x.split(size) for x in tensors)):
            student_logits = layers[0](student_h).float() / temperature
            teacher_logits = layers[1](teacher_h).float() / temperature
            best = teacher_logits.argmax(-1)
            columns = [
                full_logits(student_logits, teacher_logits),
                token_logprobs(student_logits, y).exp(),
                token_logprobs(teacher_logits, y).exp(),
                token_logprobs(student_logits, best).exp(),
                token_logprobs(teacher_logits, best).exp(),
                best,
            ]
            rows.append(torch.stack([column.double() for column in columns], dim=-1))
        for i, table in zip(group, torch.cat(rows).cpu().split(counts)):
            tables[i] = table
    return tables


# ------------------------------------------------------------------------------------ the figures


def bars_of(kl: torch.Tensor) -> torch.Tensor:
    """The paper's bars: a response's KLs [T], largest first, in 20 equal parts -> [20], whose sum
    is the mean KL per token.

    Each part holds T / 20 tokens, whatever T is: a token on an edge counts on both sides, by its
    share.
    """
    # the sum of the n largest: [T + 1]; between whole tokens it is linear
    total = torch.cat([kl.new_zeros(1), kl.sort(descending=True).values.cumsum(0)])
    edges = torch.arange(BARS + 1, dtype=kl.dtype) * len(kl) / BARS
    low = edges.floor().long().clamp(max=len(kl) - 1)
    return torch.diff(total[low] + (edges - low) * (total[low + 1] - total[low])) / len(kl)


def summarize(kls: list[torch.Tensor]) -> dict:
    """The figures of some responses, KLs [T] each: their bars on average, and what they come to."""
    bars = torch.stack([bars_of(kl) for kl in kls])
    means = torch.stack([kl.mean() for kl in kls])
    every = torch.cat(kls)
    return {
        "responses": len(kls),
        "tokens": len(every),
        "mean_kl": every.mean().item(),
        "median_kl": means.median().item(),
        # of the KL of all these tokens together, the share in the top 5% of them
        "top5_all": (bars_of(every)[0] / every.mean()).item(),
        # in each response's own top 5%, which is less than one token of 15
        "top5_each": (bars[:, 0] / means).mean().item(),
        "bars": bars.mean(0).tolist(),
    }


# --------------------------------------------------------------------------------------- the page


def clean(text: str) -> str:
    """Text for the page: escaped, and without the control characters that no page may hold."""
    return escape(re.sub(r"[\0-\x08\x0b-\x1f\x7f\ufffe\uffff]", "\ufffd", text))


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds to those before it. A token that ends inside a UTF-8 character
    adds "", the one that completes it the whole character."""
    texts, start, done = [], 0, 0
    for end in range(1, len(ids) + 1):
        # decoded after the tokens before it, since some tokenizers drop a text's first space
        before = tokenizer.decode(ids[start:done], clean_up_tokenization_spaces=False)
        now = tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False)
        complete = len(now) > len(before) and not now.endswith("\ufffd")
        texts.append(now[len(before) :] if complete else "")
        if complete:
            start, done = done, end
    return texts


def spans(tokenizer, ids: list[int], table: torch.Tensor) -> str:
    """A response's tokens, [T] ids and `score`'s [T, 6], as HTML. The title of a token, which is
    shown on hover, focus and tap, says what is in its row."""
    found = []
    for text, row in zip(pieces(tokenizer, ids), table.tolist()):
        kl, student, teacher, student_best, teacher_best, best = row
        name = json.dumps(text or "part of a character", ensure_ascii=False)
        best_name = json.dumps(tokenizer.decode([int(best)]), ensure_ascii=False)
        title = (
            f"KL {kl:.4g} | {name}: student {student:.1%}, teacher {teacher:.1%} | "
            f"teacher's first choice {best_name}: "
            f"student {student_best:.1%}, teacher {teacher_best:.1%}"
        )
        style = f"k{sum(kl >= edge for edge in LEVELS)}"
        style += " u" if teacher < teacher_best else ""  # it would write another token
        stop = 0 if kl >= LEVELS[2] else -1  # of the tab key
        visible = clean(text).replace("\n", "↵\n") or "◌"
        found.append(
            f'<span class="{style}" tabindex="{stop}" title="{clean(title)}">{visible}</span>'
        )
    return "".join(found)


def figure(groups: dict[str, dict]) -> str:
    """The bars of each group's `summarize` side by side, as SVG."""
    top = max(max(g["bars"]) for g in groups.values()) or 1
    steps = [s * 10.0**e for e in range(-9, 9) for s in (1, 2, 5)]
    step = next(s for s in steps if top / s <= 4)  # at most four round ticks
    out = []
    for i in range(int(top / step) + 1):
        y = 190 - 165 * i * step / top
        out.append(f'<path d="M44 {y:.1f}H416"/>')
        out.append(f'<text x="38" y="{y + 4:.1f}" text-anchor="end">{i * step:.4g}</text>')
    for percent in range(0, 101, 25):
        x = 44 + 3.72 * percent
        out.append(f'<text x="{x:.0f}" y="206" text-anchor="middle">{percent}%</text>')
    width = 14.6 / len(groups)
    for j, (name, g) in enumerate(groups.items()):
        y = 34 + 18 * j
        out.append(f'<rect class="{name}" x="290" y="{y - 10}" width="11" height="11"/>')
        out.append(f'<text x="306" y="{y}">{name} responses</text>')
        for i, bar in enumerate(g["bars"]):
            x, height = 46 + 18.6 * i + width * j, max(165 * bar / top, 0)
            title = f"{name}, {5 * i} to {5 * i + 5}% of the tokens: {bar:.4g} nats"
            out.append(
                f'<rect class="{name}" x="{x:.1f}" y="{190 - height:.1f}" width="{width:.1f}" '
                f'height="{height:.1f}"><title>{title}</title></rect>'
            )
    return (
        '<svg viewBox="0 0 440 228" role="img" aria-label="KL by part of the tokens">'
        '<text x="4" y="12">part of the mean KL per token, nats</text>'
        f'{"".join(out)}<text x="230" y="223" text-anchor="middle">'
        "tokens of a response, sorted by KL</text></svg>"
    )


def article(lm: LM, args: Namespace, problem: Problem, e: Example, table: torch.Tensor) -> str:
    """One response with its problem, as HTML."""
    name, kl = VERDICTS[e.reward], table[:, 0]
    phrase = (args.phrase_wrong, args.phrase_right)[e.reward]
    cut = "" if e.response.finished else ", cut off"
    return (
        f'<article><aside><b class="{name}">{name}, r = {e.reward}</b><q>{clean(phrase)}</q>'
        f"{len(kl)} tokens{cut}<br/>mean KL {kl.mean():.3g}, largest {kl.max():.3g}</aside>"
        f'<div><p class="x">{clean(problem.text)}</p>'
        f'<p class="y">{spans(lm.tokenizer, e.response.ids, table)}</p></div></article>'
    )


def page(
    lm: LM,
    args: Namespace,
    problems: list[Problem],
    examples: list[Example],
    tables: list[torch.Tensor],
    skipped: int,
) -> tuple[str, dict[str, dict]]:
    """(the HTML, the figures in it). problems, examples and `score`'s tables go together; skipped:
    responses that no context holds."""
    members = {"wrong": [], "right": []}
    for i, e in enumerate(examples):
        members[VERDICTS[e.reward]].append(i)
    groups, ranked = {}, []
    for name, indices in members.items():
        if indices:
            groups[name] = summarize([tables[i][:, 0] for i in indices])
        ranked += [(rank, examples[i].reward, i) for rank, i in enumerate(indices)]
    order = [i for *_, i in sorted(ranked)][: args.shown]  # in turn a wrong and a right one

    rows = []
    for label, key, form in ROWS:
        cells = "".join(f"<td>{g[key]:{form}}</td>" for g in groups.values())
        rows.append(f"<tr><th>{label}</th>{cells}</tr>")
    edges = [f"below {LEVELS[0]:g}"]
    edges += [f"{low:g} to {high:g}" for low, high in zip(LEVELS, LEVELS[1:])]
    edges += [f"{LEVELS[-1]:g} or more"]
    content = PAGE.substitute(
        model=clean(args.model),
        teacher=clean(args.teacher),
        dataset=clean(args.dataset),
        temperature=f"{args.temperature:g}",
        count=len(examples),
        skipped=f", {skipped} more did not fit the context" if skipped else "",
        figure=figure(groups),
        head="".join(f'<th class="{name}">{name}</th>' for name in groups),
        rows="".join(rows),
        shown=len(order),
        legend="".join(f'<span class="k{i}">{edge}</span>' for i, edge in enumerate(edges)),
        articles="\n".join(article(lm, args, problems[i], examples[i], tables[i]) for i in order),
    )
    return content, groups


PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta name="color-scheme" content="light dark"/><title>KL by token: $model</title><style>
:root { --page: #fff; --text: #1b1c1e; --faint: #5b6068; --line: #dcdfe4; --hot: 255 140 40;
  --wrong: #b84300; --right: #1663b8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --text: #eceef0; --faint: #a2a9b3; --line: #363b42; --hot: 190 72 8;
    --wrong: #ff9a57; --right: #74b3ff; } }
body { max-width: 70rem; margin: 0 auto; padding: 1rem; background: var(--page);
  color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; } p { margin: .5rem 0; max-width: 46rem; }
code, .y { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
.top { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: center; }
.top > * { flex: 1 1 20rem; min-width: 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .5rem; text-align: right; border-top: 1px solid var(--line); }
tbody th { font-weight: normal; text-align: left; } thead th { border: 0; }
svg { max-width: 34rem; } svg path { stroke: var(--line); }
svg text { font-size: 12px; fill: var(--text); stroke: var(--page); stroke-width: 4px;
  paint-order: stroke; }
rect.wrong { fill: var(--wrong); } rect.right { fill: var(--right); }
.wrong { color: var(--wrong); } .right { color: var(--right); }
article { display: grid; grid-template-columns: 13rem 1fr; gap: .3rem 1.5rem; padding: 1rem 0;
  border-top: 1px solid var(--line); }
article div { min-width: 0; }
aside { font-size: .85rem; color: var(--faint); }
aside q { display: block; margin: .2rem 0; font-style: italic; }
.x { margin-top: 0; color: var(--faint); white-space: pre-wrap; overflow-wrap: anywhere; }
.y { white-space: pre-wrap; line-height: 1.75; max-width: none; }
.y span, .legend span { padding: .15em 0; border-radius: 2px; }
.y span { box-shadow: inset -1px 0 var(--page); }
.legend span { display: inline-block; padding: .1em .6em; }
.u { text-decoration: underline dotted; text-underline-offset: .2em; }
.k1 { background: rgb(var(--hot) / .14); } .k2 { background: rgb(var(--hot) / .3); }
.k3 { background: rgb(var(--hot) / .5); } .k4 { background: rgb(var(--hot) / .74); }
.k5 { background: rgb(var(--hot)); font-weight: bold; }
.y span:hover, .y span:focus { outline: 2px solid var(--text); }
.y span:focus::after { content: attr(title); position: fixed; inset: auto 0 0 0;
  padding: .8rem 1rem; background: var(--text); color: var(--page);
  font: 14px/1.4 system-ui, sans-serif; white-space: normal; }
@media (max-width: 44rem) { article { grid-template-columns: 1fr; } }
@media (max-width: 30rem) { svg text { font-size: 14px; } }
</style></head><body>
<h1>Where student and teacher differ</h1>
<p>Student <code>$model</code>, teacher <code>$teacher</code>, problems of <code>$dataset</code>:
$count responses at temperature $temperature$skipped. The teacher reads the student's response and
one bit about it as a phrase, and scores the response again. The KL of a token is D(student ‖
teacher) at its position, over the whole vocabulary, in nats.</p>
<div class="top">$figure
<table><thead><tr><th></th>$head</tr></thead><tbody>$rows</tbody></table></div>
<p>Below are the first $shown responses as drawn, in turn a wrong and a right one. Hover over a
token, tap it, or reach the strong ones by the tab key, to see its probabilities and the teacher's
first choice. A dotted line means that this is another token; colour without a line, that the
teacher would write the same token but is more or less sure of it. ↵ is a newline, ◌ a token that
ends inside a character.</p>
<p class="legend">KL, nats: $legend</p>
$articles
</body></html>
""")


# -------------------------------------------------------------------------------------------- main


def parse_arguments(argv: list[str] | None = None) -> Namespace:
    parser = make_parser(
        "A page of a student's responses, each token coloured by its KL from the teacher. Flags of "
        "training are refused; --eval-problems says how many responses there are.",
        FLAGS,
        max_new_tokens=1024,
        eval_problems=200,  # as many as the paper's figure has
        output=Path("localize.html"),
    )
    args = parser.parse_args(argv)
    for name in UNUSED:
        if getattr(args, name) != parser.get_default(name):
            fail(f"--{name.replace('_', '-')} means nothing here")
    if not args.eval_problems:
        fail("--eval-problems 0 leaves no response to look at")
    args.eval_only = True  # for common.py this is an evaluation: held-out problems, no run
    check_flags(args)
    if args.output.is_dir() or not os.access(args.output.resolve().parent, os.W_OK):
        fail(f"cannot write the page {args.output}: name another --output")
    return args


def load_both(args: Namespace) -> tuple[LM, LM, dict]:
    """(student, teacher, what their srt.json files say). The prompt and the phrases are those that
    the teacher was trained with."""
    of_teacher = Namespace(**{**vars(args), "model": args.teacher})
    saved = inherit_prompt(of_teacher)
    teacher = load_lm(of_teacher)
    vars(args).update({**vars(of_teacher), "model": args.model})
    # on a copy, for its check: the student may have been trained with another prompt
    of_student = inherit_prompt(Namespace(**vars(args)))
    saved["trained"] = [*saved["trained"], *of_student["trained"]]
    lm = load_lm(args)
    if lm.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        fail(f"{args.model} and {args.teacher} have different vocabularies")
    return lm, teacher, saved


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    verify_all = load_verifier(args.verifier)
    lm, teacher, saved = load_both(args)
    _, held_out, _ = split_problems(lm, args, saved, half=False)

    prompts = [p.prompt_ids for p in held_out]
    responses = sample_all(lm, args, prompts, ("localize",), args.temperature)
    rewards = verify_all([lm.text(y.ids) for y in responses], [p.answer for p in held_out])
    phrases, problems, examples = lm.phrases(args), [], []
    for problem, y, r in zip(held_out, responses, rewards):
        example = Example(problem.prompt_ids, y, r, phrases[r])
        if len(example.teacher_ids) <= teacher.context:
            problems.append(problem)
            examples.append(example)
    if not examples:
        fail(f"none of {len(held_out)} responses fits the context twice: lower --max-new-tokens")

    tables = score(lm, teacher, examples, args)
    content, groups = page(lm, args, problems, examples, tables, len(held_out) - len(examples))
    with explained(f"cannot write the page {args.output}, name another --output", OSError):
        args.output.write_text(content, encoding="utf-8")
    for name, g in groups.items():
        figures = [f"{key} {g[key]:.4g}" for _, key, _ in ROWS]
        print(f"{name}  " + "  ".join(figures))
    print(f"saved {args.output}")


if __name__ == "__main__":
    entry(main)
