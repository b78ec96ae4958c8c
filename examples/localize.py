"""Where does the teacher differ? A page that shows a student's responses with every token coloured by its KL, and figure F4 of METHOD.md.

    python examples/localize.py --model runs/toy/srt --teacher runs/toy/srt --dataset runs/toy/heldout.jsonl --max-new-tokens 64

--model answers, the verifier gives its bit r, and --teacher (a stage-1 model: the reviser) reads x + y + P_r + y, as in sdzero.py. The KL
of a token is the t-th term of METHOD.md (4), D_KL(student || teacher) over the whole vocabulary at its position, in nats, at the sampling
temperature. The claim (the paper's self-localisation, F4): though the teacher hears one bit about the whole response, on a wrong one it
differs from the student in few places, and on a right one hardly anywhere. The problems are those that an evaluation with the same
--dataset holds out.

The page is one file without script or network. Letters in shapes: T tokens of a response, N tokens of several, V vocabulary.
"""

import argparse
import json
import re
import sys
from html import escape
from pathlib import Path
from string import Template
from types import SimpleNamespace

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from losses import OutputLayer, full_logits, token_logprobs  # noqa: E402
from sdzero import Example  # noqa: E402
from srt import (  # noqa: E402
    LM, BadInput, Parser, add_arguments, check_arguments, entry, hidden_states, inherit_prompt, load_lm, load_verifier, micro_batches,
    predicting, sample, split_problems,
)  # fmt: skip

UNUSED = ("--(problems|temperature|top-p|batch-size|lr|lr-schedule|warmup|weight-decay|betas|clip|gradient-checkpointing|eval-.*|output|"
          "save-every|resume)")  # flags of the two scripts that have no place here, or have another meaning
LEVELS = (0.03, 0.1, 0.3, 1, 3)  # nats, where the colour changes: fixed, so that two pages can be compared
BUCKETS = 20
FIGURES = [  # the table's rows: label, key of `summarize`, format
    ("responses", "responses", "d"), ("their tokens", "tokens", "d"), ("mean KL of a token", "mean_kl", ".3g"),
    ("the same of the median response", "median_kl", ".3g"), ("of the KL of all these tokens, in the top 5% of them", "top5_all", ".0%"),
    ("of a response's KL, in its own top 5%, on average", "top5_each", ".0%"),
]  # fmt: skip


@torch.no_grad()
def score(lm: LM, teacher: LM, examples: list[Example], args) -> list[torch.Tensor]:
    """For each example a float64 table [T, 6], a row a token y_t of its response: D_KL(student || teacher), METHOD.md (4)'s t-th term; the
    student's and the teacher's probability of y_t; the student's and the teacher's of the teacher's most likely token; that token's id."""
    layers = [OutputLayer(m.model, lm.vocab_size) for m in (lm, teacher)]
    temperature, size = args.temperature or 1, max(1, 2 ** (27 if lm.model.device.type == "cuda" else 22) // lm.vocab_size)
    tables = [None] * len(examples)
    for group in micro_batches([len(e.teacher_ids) for e in examples], args.micro_tokens):
        chosen = [examples[i] for i in group]
        lengths = [len(e.response.ids) for e in chosen]
        hidden = []  # [N, D] of student and teacher: both score the last T ids of what they read
        for model, sequences in ((lm.model, [e.student_ids for e in chosen]), (teacher.model, [e.teacher_ids for e in chosen])):
            ends = [len(s) for s in sequences]
            hidden.append(predicting(hidden_states(model, sequences), [end - n for end, n in zip(ends, lengths)], ends))
        token_ids = torch.tensor([t for e in chosen for t in e.response.ids], device=lm.model.device)
        rows = []
        for *h, y in zip(*(x.split(size) for x in (*hidden, token_ids))):  # logits exist for `size` tokens at a time
            logits = [layer(x).float() / temperature for layer, x in zip(layers, h)]
            best = logits[1].argmax(-1)
            probabilities = [token_logprobs(x, tokens).exp() for tokens in (y, best) for x in logits]
            rows.append(torch.stack([c.double() for c in (full_logits(*logits), *probabilities, best)], dim=-1))
        for i, table in zip(group, torch.cat(rows).cpu().split(lengths)):
            tables[i] = table
    return tables


def buckets(kl: torch.Tensor) -> torch.Tensor:
    """The bars of F4: a response's KLs [T], sorted, largest first, in 20 equal parts -> [20], whose sum is its mean KL a token.

    Each part holds T / 20 tokens, whatever T is: a token on an edge counts on both sides, by its share.
    """
    total = torch.cat([kl.new_zeros(1), kl.sort(descending=True).values.cumsum(0)])  # [T + 1], linear between whole tokens
    edges = torch.arange(BUCKETS + 1, dtype=kl.dtype) * len(kl) / BUCKETS
    low = edges.floor().long().clamp(max=len(kl) - 1)
    return torch.diff(total[low] + (edges - low) * (total[low + 1] - total[low])) / len(kl)


def summarize(kls: list[torch.Tensor]) -> dict:
    """The figures of some responses, KLs [T] each: the bars of F4 averaged over the responses, and what they amount to."""
    bars, means, every = torch.stack([buckets(kl) for kl in kls]), torch.stack([kl.mean() for kl in kls]), torch.cat(kls)
    return {
        "responses": len(kls), "tokens": len(every), "mean_kl": every.mean().item(), "median_kl": means.median().item(),
        "top5_all": (buckets(every)[0] / every.mean()).item(),  # of the KL of all these tokens together, the share in the top 5% of them
        "top5_each": (bars[:, 0] / means).mean().item(),  # in each response's own top 5%, which of 15 tokens are less than one
        "bars": bars.mean(0).tolist(),
    }  # fmt: skip


def pieces(tokenizer, ids: list[int]) -> list[str]:
    """The text that each token adds to those before it: one that ends inside a UTF-8 character "", the one that completes it all of it."""
    texts, start, done = [], 0, 0
    for end in range(1, len(ids) + 1):
        # decoded behind the tokens before, since some tokenizers drop a text's first space
        before, now = (tokenizer.decode(ids[start:n], clean_up_tokenization_spaces=False) for n in (done, end))
        complete = len(now) > len(before) and not now.endswith("\ufffd")
        texts.append(now[len(before) :] if complete else "")
        if complete:
            start, done = done, end
    return texts


def clean(text: str) -> str:
    """Text for the page: escaped, and without the control characters that no page may hold."""
    return escape(re.sub(r"[\0-\x08\x0b-\x1f\x7f\ufffe\uffff]", "\ufffd", text))


def spans(tokenizer, ids: list[int], table: torch.Tensor) -> str:
    """A response's tokens, [T] ids and `score`'s [T, 6], as HTML. What the table says of a token is its title: on hover, focus, tap."""
    out = []
    for text, (kl, p, p_bar, p_best, p_bar_best, best) in zip(pieces(tokenizer, ids), table.tolist()):
        quoted = [json.dumps(t, ensure_ascii=False) for t in (text or "part of a character", tokenizer.decode([int(best)]))]
        title = (f"KL {kl:.4g} | {quoted[0]}: student {p:.1%}, teacher {p_bar:.1%} | "
                 f"teacher's first choice {quoted[1]}: student {p_best:.1%}, teacher {p_bar_best:.1%}")  # fmt: skip
        level, line, stop = sum(kl >= edge for edge in LEVELS), " u" if p_bar < p_bar_best else "", 0 if kl >= LEVELS[2] else -1
        shown = clean(text).replace("\n", "↵\n") or "◌"
        out.append(f'<span class="k{level}{line}" tabindex="{stop}" title="{clean(title)}">{shown}</span>')
    return "".join(out)


def figure(groups: dict[str, dict]) -> str:
    """F4 as SVG: `summarize`'s bars of each group, side by side."""
    top = max(max(g["bars"]) for g in groups.values()) or 1
    step = next(s * 10.0**e for e in range(-9, 9) for s in (1, 2, 5) if top / (s * 10.0**e) <= 4)  # at most four round ticks
    y, out = lambda value: 190 - 165 * value / top, []
    for i in range(int(top / step) + 1):
        out.append(f'<path d="M44 {y(i * step):.1f}H416"/><text x="38" y="{y(i * step) + 4:.1f}" text-anchor="end">{i * step:.4g}</text>')
    for percent in range(0, 101, 25):
        out.append(f'<text x="{44 + 3.72 * percent:.0f}" y="206" text-anchor="middle">{percent}%</text>')
    width = 14.6 / len(groups)
    for j, (name, g) in enumerate(groups.items()):
        low = 34 + 18 * j
        out.append(f'<rect class="{name}" x="290" y="{low - 10}" width="11" height="11"/><text x="306" y="{low}">{name} responses</text>')
        for i, bar in enumerate(g["bars"]):
            label = f"{name}, {5 * i} to {5 * i + 5}% of the tokens: {bar:.4g} nats"
            x, height = 46 + 18.6 * i + width * j, max(190 - y(bar), 0)
            out.append(f'<rect class="{name}" x="{x:.1f}" y="{190 - height:.1f}" width="{width:.1f}" height="{height:.1f}">'
                       f"<title>{label}</title></rect>")  # fmt: skip
    return ('<svg viewBox="0 0 440 228" role="img" aria-label="F4"><text x="4" y="12">part of the mean KL a token, nats</text>'
            f'{"".join(out)}<text x="230" y="223" text-anchor="middle">tokens of a response, sorted by KL</text></svg>')  # fmt: skip


def page(lm: LM, args, problems: list, examples: list[Example], tables: list[torch.Tensor], skipped: int) -> tuple[str, dict]:
    """The HTML and the figures in it. problems, examples and tables (`score`) go together; skipped: responses that no context holds."""
    by_reward = {name: [i for i, e in enumerate(examples) if e.reward == r] for r, name in enumerate(("wrong", "right"))}
    groups = {name: summarize([tables[i][:, 0] for i in indices]) for name, indices in by_reward.items() if indices}
    head = "".join(f'<th class="{name}">{name}</th>' for name in groups)
    cells = lambda key, form: "".join(f"<td>{g[key]:{form}}</td>" for g in groups.values())
    rows = "".join(f"<tr><th>{label}</th>{cells(key, form)}</tr>" for label, key, form in FIGURES)
    order = sorted((rank, examples[i].reward, i) for indices in by_reward.values() for rank, i in enumerate(indices))[: args.shown]
    cards = []
    for *_, i in order:
        e, kl, name = examples[i], tables[i][:, 0], ("wrong", "right")[examples[i].reward]
        phrase = (args.phrase_wrong, args.phrase_right)[e.reward]
        cut = "" if e.response.finished else ", cut off"
        cards.append(f'<article><aside><b class="{name}">{name}, r = {e.reward}</b><q>{clean(phrase)}</q>{len(kl)} tokens{cut}<br/>'
                     f'mean KL {kl.mean():.3g}, largest {kl.max():.3g}</aside><div><p class="x">{clean(problems[i].text)}</p>'
                     f'<p class="y">{spans(lm.tokenizer, e.response.ids, tables[i])}</p></div></article>')  # fmt: skip
    edges = [f"{low:g} to {high:g}" if low else f"below {high:g}" for low, high in zip((0, *LEVELS), LEVELS)] + [f"{LEVELS[-1]:g} or more"]
    legend = "".join(f'<span class="k{i}">{label}</span>' for i, label in enumerate(edges))
    content = PAGE.substitute(
        model=clean(args.model), teacher=clean(args.teacher), dataset=clean(args.dataset), temperature=f"{args.temperature:g}",
        count=len(examples), skipped=f", {skipped} more did not fit the context" if skipped else "", figure=figure(groups), head=head,
        rows=rows, shown=len(order), legend=legend, cards="\n".join(cards))  # fmt: skip
    return content, groups


PAGE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/><meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta name="color-scheme" content="light dark"/><title>KL by token: $model</title><style>
:root { --page: #fff; --text: #1b1c1e; --faint: #5b6068; --line: #dcdfe4; --hot: 255 140 40; --wrong: #b84300; --right: #1663b8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #15171a; --text: #eceef0; --faint: #a2a9b3; --line: #363b42; --hot: 190 72 8; --wrong: #ff9a57; --right: #74b3ff; } }
body { max-width: 70rem; margin: 0 auto; padding: 1rem; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.3rem; } p { margin: .5rem 0; max-width: 46rem; }
code, .y { font-family: ui-monospace, monospace; overflow-wrap: anywhere; }
.top { display: flex; flex-wrap: wrap; gap: 1rem 2rem; align-items: center; } .top > * { flex: 1 1 20rem; min-width: 0; }
table { border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .5rem; text-align: right; border-top: 1px solid var(--line); }
tbody th { font-weight: normal; text-align: left; } thead th { border: 0; }
svg { max-width: 34rem; } svg text { font-size: 12px; fill: var(--text); stroke: var(--page); stroke-width: 4px; paint-order: stroke; }
svg path { stroke: var(--line); } rect.wrong { fill: var(--wrong); } rect.right { fill: var(--right); }
.wrong { color: var(--wrong); } .right { color: var(--right); }
article { display: grid; grid-template-columns: 13rem 1fr; gap: .3rem 1.5rem; padding: 1rem 0; border-top: 1px solid var(--line); }
aside { font-size: .85rem; color: var(--faint); } aside q { display: block; margin: .2rem 0; font-style: italic; }
article div { min-width: 0; } .x { margin-top: 0; color: var(--faint); white-space: pre-wrap; overflow-wrap: anywhere; }
.y { white-space: pre-wrap; line-height: 1.75; max-width: none; } .y span, .legend span { padding: .15em 0; border-radius: 2px; }
.y span { box-shadow: inset -1px 0 var(--page); } .legend span { display: inline-block; padding: .1em .6em; }
.u { text-decoration: underline dotted; text-underline-offset: .2em; }
.k1 { background: rgb(var(--hot) / .14); } .k2 { background: rgb(var(--hot) / .3); } .k3 { background: rgb(var(--hot) / .5); }
.k4 { background: rgb(var(--hot) / .74); } .k5 { background: rgb(var(--hot)); font-weight: bold; }
.y span:hover, .y span:focus { outline: 2px solid var(--text); }
.y span:focus::after { content: attr(title); position: fixed; inset: auto 0 0 0; padding: .8rem 1rem;
  background: var(--text); color: var(--page); font: 14px/1.4 system-ui, sans-serif; white-space: normal; }
@media (max-width: 44rem) { article { grid-template-columns: 1fr; } } @media (max-width: 30rem) { svg text { font-size: 14px; } }
</style></head><body>
<h1>Where student and teacher differ</h1>
<p>Student <code>$model</code>, teacher <code>$teacher</code>, problems of <code>$dataset</code>: $count responses at temperature
$temperature$skipped. The teacher reads the student's response, one bit about it as a phrase, and scores the response again. The KL of a
token is D(student ‖ teacher) at its position, over the whole vocabulary, in nats.</p>
<div class="top">$figure
<table><thead><tr><th></th>$head</tr></thead><tbody>$rows</tbody></table></div>
<p>Below, the first $shown responses as drawn, in turn a wrong and a right one. Hover over a token, tap it, or reach the strong ones by
the tab key: its probabilities and the teacher's first choice. A dotted line: that is another token; colour without a line: the teacher
would write the same token, but is more or less sure of it. ↵ is a newline, ◌ a token that ends inside a character.</p>
<p class="legend">KL, nats: $legend</p>
$cards
</body></html>
""")


def parse_arguments(argv=None):
    parser = Parser("An HTML page of a student's responses, each token coloured by its KL to the teacher, with figure F4.")
    parser.usage = "%(prog)s --model STUDENT --teacher REVISER --dataset DATASET [flags]"
    add = parser.add_argument

    def shared(*names, default=None, **settings):  # the flags of the two scripts; the unused ones keep their defaults and are no flags
        if re.fullmatch(UNUSED, names[0]):
            parser.set_defaults(**{names[0][2:].replace("-", "_"): default})
        else:
            add(*names, default=default, **settings)

    add_arguments(SimpleNamespace(add_argument=shared), max_new_tokens=1024, temperature=1.0, problems=None, batch_size=1,
                  lr_schedule="constant", warmup=0, weight_decay=0, betas=(0, 0), output="")  # fmt: skip
    add("--teacher", required=True, help="the reviser, a stage-1 model: name on the hub, or a transformers folder")
    add("--problems", type=int, default=200, dest="eval_problems", metavar="N", help="how many, one response each; the paper's F4 has 200")
    add("--temperature", type=float, default=1.0, help="of the responses, and of both distributions")
    add("--shown", type=int, default=24, help="responses on the page; the figures are over all of them")
    add("--output", type=Path, default=Path("localize.html"), help="the page; an old one is written over")
    parser.set_defaults(eval_only=True)  # to the functions of srt.py this is an evaluation: its held-out problems, no run's folder
    args = parser.parse_args(argv)
    check_arguments(args)
    return args


def main(argv=None):
    args = parse_arguments(argv)
    verify = load_verifier(args.verifier)
    of_teacher = argparse.Namespace(**{**vars(args), "model": args.teacher})
    stage_1 = inherit_prompt(of_teacher)  # the phrases and the prompt are those that the reviser was trained with
    teacher, args = load_lm(of_teacher), argparse.Namespace(**{**vars(of_teacher), "model": args.model})
    lm = load_lm(args)
    if lm.vocab_size != teacher.vocab_size or lm.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise BadInput(f"{args.model} and {args.teacher} have different vocabularies")
    problems = split_problems(lm, args, set(stage_1["problems"] if stage_1 else ()), 0)[1]

    responses = sample(lm, args, [p.prompt_ids for p in problems], ("localize",), args.temperature, 1.0, "responses")
    rewards = verify([lm.text(y.ids) for y in responses], [p.answer for p in problems])
    phrases = [lm.phrase_ids(args.phrase_wrong), lm.phrase_ids(args.phrase_right)]
    pairs = [(p, Example(p.prompt_ids, y, r, phrases[r])) for p, y, r in zip(problems, responses, rewards)]
    fitting = [(p, e) for p, e in pairs if len(e.teacher_ids) <= teacher.context]
    if not fitting:
        raise BadInput(f"no response to show: {len(problems)} problems, of which none fits the context with its response twice")
    problems, examples = zip(*fitting)
    content, groups = page(lm, args, problems, examples, score(lm, teacher, examples, args), len(pairs) - len(fitting))
    args.output.write_text(content, encoding="utf-8")
    for name, g in groups.items():
        print(f"{name}  " + "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in g.items() if k != "bars"))
    print(f"saved {args.output}")


if __name__ == "__main__":
    entry(main)
