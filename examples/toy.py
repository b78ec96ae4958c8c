"""SD-Zero on a CPU in 4 minutes, without a download: a task, a base model, both stages, a table.

    python examples/toy.py                          one seed: base, SRT, SD-Zero
    python examples/toy.py --seeds 3 --baselines    three, and RFT, GRPO, SDFT, SDPO, variations

60 made-up goods have hidden one-digit prices. A problem names four of them; the answer is their
total. A response gives each good, its price and the sum so far:

    Total of bako + tilu + nisa + taka?
    bako: 4, sum 4 / tilu: 9, sum 13 / nisa: 1, sum 14 / taka: 6, sum 20 / #### 20

The base is a Llama of 0.35M parameters, with one token per word, pre-trained on a synthetic web.
The run begins by printing one page of each kind. This is what makes it a task for self-revision:

- Seven goods carry a misconception: every first attempt gives the same wrong price, and the base's
  samples the right one 0.4 to 4 times in a thousand, so that a group of eight is nearly always all
  wrong and tells nothing. A writer who looks again is right three times in ten.
- Four goods are disputed: half of the writers are right, at first and later. Here samples and the
  verifier's bit are enough. Over half of the problems name one of these eleven goods, so the base
  is right about half of the time.
- Revisions are in forum threads. An assistant's page holds one only where attempt and phrase are
  given: it revises when told to. A phrase fits the attempt before it in four cases of five. After
  "Wait" more prices are looked up afresh than after "Let me rephrase".
- One of those attempts in four names a good that was not asked for, so a reviser has to read the
  question again. A base that had seen fewer such slips copied the names of the attempt instead.
  Its teacher let every wrong name pass, and at twice the rate stage 2 fell from 87% to 32%.
- Exercises in copying teach the model to use its context: random prices, repeated, with a loss on
  the last attempt only.

So the base has seen phrases, revisions and weak alternatives, as a model trained on the real web
has, but does not use them. Stage 1 brings them out; stage 2 puts them into the first attempt. All
that a method learns of an answer is the verifier's bit, except SDFT, whose teacher is shown the
prices. No set of four goods is in more than one of the web, stage 1, stage 2 and the held-out set.
Five versions of the task were tried, on worlds 100 to 102 (--seed 100 ...); this is the fifth.
"""

import argparse
import importlib.util
import json
import math
import os
import random
import re
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

# So small a model is faster on one core than on two. Torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import srt
from common import PHRASES, SLOTS, inherit_prompt, load_lm, load_problems, render, sample_all
from losses import full_logits
from rollout import Rollout
from sdzero import Example
from verifier import verify

ROOT = Path(srt.__file__).parent

# The goods: each is in some 4,000 pages.
GOODS = [a + b + c for a in "bdgklmnprt" for b in "ai" for c in ("ko", "lu", "sa")]

# Number of goods; share of the writers who know the price, at first and when they look again
MISCONCEIVED = 7, 0.0, 0.3
DISPUTED = 4, 0.5, 0.5
KNOWN = 0.995, 0.96  # all the other goods
REPEAT = 0.6, 0.98  # that an attempt takes over a price from the one before, by the phrase's r
JUDGE = 0.8  # that a phrase fits the attempt before it
MISREAD, MISCOUNT = 0.25, 0.08  # that an attempt before the last names another good; adds wrongly

DOCUMENTS = 60_000  # pages of the web, some 2.4M tokens; each is seen once
KINDS = {"answer": 0.42, "revision": 0.03, "thread": 0.35, "copy": 0.20}  # shares of the pages
# A thread and an exercise show by their marker that more attempts follow.
MARKERS = {"thread": "<|forum|>", "copy": "<|copy|>"}
# In a thread or an exercise. Stage 2's teacher may read four: a response that holds a revision,
# and this response again.
MOST_ATTEMPTS = 4
SIZES = {"stage1": 3000, "stage2": 2400, "heldout": 500}  # problems

MODEL = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
BATCH_TOKENS, LR = 2048, 3e-3  # of pre-training: about 1,200 steps
STAGE_1 = ["--batch-size", 16, "--lr", 5e-4]
STAGE_2 = ["--batch-size", 32, "--lr", 3e-4, "--warmup", 5]
GROUPS = ["--batch-size", 96, "--warmup", 5]  # GRPO: 12 problems x 8 responses
BASELINES = {  # method: (problems, flags)
    "rft": ("stage1", [*STAGE_1, "--warmup", 0.05, "--lr-schedule", "cosine"]),
    "grpo": ("both", [*GROUPS, "--lr", 1e-3]),
    "sdft": ("both", [*GROUPS, "--lr", 5e-5, "--solution-column", "solution"]),
    "sdpo": ("both", [*GROUPS, "--lr", 1e-4]),
}
COLUMNS = {  # of the table: key of an evaluation
    "accuracy, %": "accuracy",
    "after one revision, %": "revised_accuracy",
    "correction rate, %": "correction_rate",
    "wrong put right, %": "wrong_to_right",
    "right broken, %": "right_to_wrong",
    "tokens": "length",
}


# ---------------------------------------------------------------------------- the task and its web


class World:
    """The prices, what the crowd believes, and the stream of random numbers for all draws."""

    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.price = {good: self.rng.randrange(10) for good in GOODS}
        self.known = dict.fromkeys(GOODS, KNOWN)  # good: (at first, again)
        hard = self.rng.sample(GOODS, MISCONCEIVED[0] + DISPUTED[0])
        for i, good in enumerate(hard):
            self.known[good] = (MISCONCEIVED if i < MISCONCEIVED[0] else DISPUTED)[1:]
        self.belief = {good: (self.price[good] + self.rng.randrange(1, 10)) % 10 for good in hard}
        self.seen = set()

    def make_problem(self):
        """Four goods that no problem before had together."""
        while frozenset(goods := self.rng.sample(GOODS, 4)) in self.seen:
            pass
        self.seen.add(frozenset(goods))
        return goods

    def answer(self, goods):
        return sum(self.price[good] for good in goods)

    def look_up(self, good, again=False):
        """The price that one writer of the crowd believes in. again: in a later attempt."""
        if self.rng.random() < self.known[good][again]:
            return self.price[good]
        return self.belief[good] if good in self.belief else self.rng.randrange(10)

    def document(self, kind=None):
        """One page of the web: (the text that is given, the text whose tokens are trained on)."""
        goods, rng = self.make_problem(), self.rng
        kind = kind or rng.choices(list(KINDS), KINDS.values())[0]
        attempts = {"answer": 1, "revision": 2}.get(kind) or rng.randint(2, MOST_ATTEMPTS)
        given, text = chat(question(goods), MARKERS.get(kind, "<|assistant|>")), ""
        copied = kind == "copy"
        prices = [rng.randrange(10) if copied else self.look_up(good) for good in goods]
        for _ in range(attempts - 1):
            attempt, called = solution(goods, prices), True
            if not copied:
                named, prices, added = self.slip(goods, prices)
                attempt = solution(named, prices, added)
                called = (sum(added) == self.answer(goods)) == (rng.random() < JUDGE)
                prices = self.look_again(goods, named, prices, REPEAT[called])
            attempt += f"\n\n{PHRASES[called]}\n\n"
            if kind == "thread":
                text += attempt
            else:
                given += attempt
        return given, text + solution(goods, prices) + "<|eos|>"

    def slip(self, goods, prices):
        """An attempt as it is written: (goods that it names, their prices, the prices it adds)."""
        named, prices = goods.copy(), prices.copy()
        place = self.rng.randrange(4)
        if self.rng.random() < MISREAD:
            named[place] = self.rng.choice(GOODS)
            prices[place] = self.look_up(named[place])
        added = prices.copy()
        if self.rng.random() < MISCOUNT:
            added[place] = self.rng.randrange(10)
        return named, prices, added

    def look_again(self, goods, named, prices, repeat):
        """The prices of the next attempt: repeated, or looked up afresh."""
        found = []
        for good, name, price in zip(goods, named, prices):
            repeated = name == good and self.rng.random() < repeat
            found.append(price if repeated else self.look_up(good, again=True))
        return found


def question(goods):
    return "Total of " + " + ".join(goods) + "?"


def chat(problem, marker="<|assistant|>"):
    return f"<|user|>{problem}{marker}"  # what the chat template renders


def solution(goods, prices, added=None):
    """A response. added: the prices that its sums are made of, where they are other ones."""
    lines, total = [], 0
    for good, price, summand in zip(goods, prices, added or prices):
        total += summand
        lines.append(f"{good}: {price}, sum {total}\n")
    return "".join(lines) + f"#### {total}"


def show_pages(world):
    """One page of each kind, with what is only given in front of the bar."""
    for kind, part in KINDS.items():
        given, text = world.document(kind)
        print(f"--- {part:.0%} of the web: {kind}\n{given} | {text}\n")


# ----------------------------------------------------------------------------------- the base model


def make_tokenizer():
    """One token per word. A price, a sum and an answer are one token each, with the signs around
    their digit, and so is each phrase."""
    special = ["<|pad|>", "<|eos|>", "<|unk|>", "<|user|>", "<|assistant|>", *MARKERS.values()]
    signs = [f": {price}" for price in range(10)]
    signs += [sign % total for sign in (", sum %d\n", "#### %d") for total in range(4 * 9 + 1)]
    words = GOODS + signs + ["Total of ", " + ", "?", "\n\n", *PHRASES]
    vocabulary = {token: i for i, token in enumerate(special + words)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    pattern = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    backend.decoder = decoders.Fuse()  # tokens hold their own spaces: decoding adds none
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|eos|>",
        unk_token="<|unk|>",
        additional_special_tokens=special[3:],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return tokenizer


def make_batches(pages):
    """Pages (given ids, trained ids) of similar length, at most BATCH_TOKENS with their padding."""
    batches = [[]]
    for page in sorted(pages, key=lambda page: len(page[0]) + len(page[1])):
        if (len(batches[-1]) + 1) * (len(page[0]) + len(page[1])) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(page)
    return batches


def padded(batch, pad):
    """(input ids, labels) [B, T] of some pages. Padding is on the right, where causal attention
    does not see it, so that no mask is needed; the label -100 is no part of the loss."""
    longest = max(len(given) + len(trained) for given, trained in batch)
    ids, labels = [], []
    for given, trained in batch:
        padding = longest - len(given) - len(trained)
        ids.append(given + trained + [pad] * padding)
        labels.append([-100] * len(given) + trained + [-100] * padding)
    return torch.tensor(ids), torch.tensor(labels)


def pretrain(world, tokenizer):
    """The base model, after one pass over the synthetic web."""
    torch.manual_seed(world.rng.randrange(2**31))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **MODEL,
    )
    model = LlamaForCausalLM(config)
    columns = zip(*(world.document() for _ in range(DOCUMENTS)))
    given, trained = (tokenizer(texts, add_special_tokens=False)["input_ids"] for texts in columns)
    batches = make_batches(zip(given, trained))
    world.rng.shuffle(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=len(batches), pct_start=0.05
    )
    for batch in (bar := tqdm(batches, desc="pre-training", disable=None)):
        ids, labels = padded(batch, tokenizer.pad_token_id)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def make_row(world):
    """A line of a file of problems. The solution is for SDFT's teacher only."""
    goods = world.make_problem()
    row = {"problem": question(goods), "answer": str(world.answer(goods))}
    row["solution"] = solution(goods, [world.price[good] for good in goods])
    return json.dumps(row) + "\n"


def write(out, world):
    """The problems, then the base model, which has seen none of them, in `out`."""
    for name, size in SIZES.items():
        (out / f"{name}.jsonl").write_text("".join(make_row(world) for _ in range(size)))
    # the baselines' problems: those of both stages
    both = (out / "stage1.jsonl").read_text() + (out / "stage2.jsonl").read_text()
    (out / "both.jsonl").write_text(both)
    tokenizer = make_tokenizer()
    model = pretrain(world, tokenizer)
    tokenizer.save_pretrained(out / "base")
    model.save_pretrained(out / "base")


# ------------------------------------------------------------------------------------------ methods


def call(script, *flags):
    """Run a script as a user would."""
    flags = [str(flag) for flag in flags]
    print("\n$", shlex.join(["python", script, *flags]), flush=True)
    if code := subprocess.run([sys.executable, ROOT / script, *flags]).returncode:
        raise SystemExit(code)


def run(script, data, output, *flags):
    """A method on a file of problems, unless its output folder is complete. Returns its
    evaluations; the first is from before any training."""
    resume = ["--resume"] if (output / "settings.json").exists() else []
    if not (output / "config.json").exists():
        call(
            script,
            *("--dataset", data, "--eval-dataset", data.parent / "heldout.jsonl"),
            *("--eval-problems", SIZES["heldout"], "--eval-samples", 4, "--eval-temperature", 1),
            *("--temperature", 1, "--max-new-tokens", 64, "--save-every", 10**6),
            *("--device", "cpu", *flags, "--output", output, *resume),
        )
    lines = [json.loads(line) for line in open(output / "metrics.jsonl")]
    return [line for line in lines if line["kind"] == "eval"]


def both_stages(out, seed):
    """The method itself: {row of the table: its evaluation}."""
    flags = ["--model", out / "base", "--problems", SIZES["stage1"], *STAGE_1, "--seed", seed]
    first = run("srt.py", out / "stage1.jsonl", out / "srt", *flags, "--eval-every", 100)
    flags = ["--model", out / "srt", *STAGE_2, "--seed", seed]
    second = run("sdzero.py", out / "stage2.jsonl", out / "sdzero", *flags, "--eval-every", 25)
    return {"base": first[0], "SRT": first[-1], "SD-Zero": second[-1]}


def baseline(out, method, output, *flags, start="base"):
    """RFT samples 4 responses per problem, as stage 1 does; the others as many as both stages, and
    from SRT on as many as stage 2, on its problems. Returns the evaluations."""
    data, settings = BASELINES[method]
    budget = SIZES["stage2"] if start == "srt" else 4 * SIZES["stage1"] + SIZES["stage2"]
    if method != "rft":
        settings = [*settings, "--generations", budget]
    flags = ["--method", method, "--model", out / start, *settings, *flags]
    return run("examples/baselines.py", out / f"{data}.jsonl", output, *flags)


def the_rest(out, seed):
    """The baselines, and variations of stage 2: {row of the table: its evaluation}."""
    rows, rare = {}, ["--seed", seed, "--eval-every", 10**6]
    for name in ("RFT", "GRPO", "SDFT", "SDPO"):
        settings = rare
        if name == "GRPO":  # also evaluated when it has sampled as much as stage 2 alone
            settings = ["--seed", seed, "--eval-every", max(1, SIZES["stage2"] // 96)]
        evals = baseline(out, name.lower(), out / name.lower(), *settings)
        if name == "GRPO":
            rows["GRPO, at stage 2's number of responses"] = evals[1]
        rows[name] = evals[-1]
    flags = ["--seed", seed, "--eval-every", 25, "--lr", 3e-4]  # steadier, and slower
    rows["GRPO, rate 3e-4"] = baseline(out, "grpo", out / "grpo_3e-4", *flags)[-1]
    from_srt = baseline(out, "grpo", out / "grpo_from_srt", *rare, start="srt")
    rows["GRPO from SRT, at stage 2's number of responses"] = from_srt[-1]

    data = out / "stage2.jsonl"
    longer = ["--model", out / "srt", *STAGE_2, "--epochs", 2, *rare]
    evals = run("sdzero.py", data, out / "again", *longer)  # its first half is SD-Zero's own run
    rows["SD-Zero twice as long, old teacher"] = evals[-1]
    interval = math.ceil(SIZES["stage2"] / 32)
    copy = ["--teacher", "ema", "--teacher-rate", 1, "--teacher-interval", interval]
    evals = run("sdzero.py", data, out / "synced", *copy, *longer)
    rows["SD-Zero twice as long, teacher synced between"] = evals[-1]
    evals = run("sdzero.py", data, out / "alone", "--model", out / "base", *STAGE_2, *rare)
    rows["stage 2 without stage 1"] = evals[-1]
    return rows


# -------------------------------------------------------------------------- SRT as reviser, teacher


def load(model, out, seed):
    """A model of the toy with what srt.py's flags say of it."""
    flags = ["--model", model, "--dataset", out / "heldout.jsonl", "--max-new-tokens", 64]
    flags += ["--seed", seed, "--device", "cpu", "--slots", SLOTS, "--eval-only"]
    args = srt.parse_arguments([str(flag) for flag in flags])
    inherit_prompt(args)
    return load_lm(args), args


def share(values):
    """Their mean; that of no values is 0."""
    return sum(values) / max(1, len(values))


def revised_by_srt(out, seed, whose):
    """SRT revises a model's attempts at the held-out problems: what its revisions are worth.

    Returns (row of the table, the attempts as what student and teacher read, the two models).
    """
    (lm, args), (reviser, _) = load(out / whose, out, seed), load(out / "srt", out, seed)
    phrases = lm.phrases(args)
    problems = load_problems(args, args.dataset)[0].values()
    prompts = [render(lm, text, args) for text, _ in problems]
    answers = [answer for _, answer in problems]

    def verified(responses):
        return [int(verify(lm.text(y.ids), a)) for y, a in zip(responses, answers)]

    attempts = sample_all(lm, args, prompts, ("attempts",), temperature=1.0)
    rewards = verified(attempts)
    examples = [Example(x, y, r, phrases[r]) for x, y, r in zip(prompts, attempts, rewards)]
    contexts = [e.prompt_ids + e.response.without_eos + e.phrase_ids for e in examples]
    revised = verified(sample_all(reviser, args, contexts, ("revisions",), temperature=1.0))

    first, last = share(rewards), share(revised)
    row = {
        "accuracy": first,
        "revised_accuracy": last,
        "correction_rate": (last - first) / (1 - first) if first < 1 else None,
        "wrong_to_right": share([new for old, new in zip(rewards, revised) if not old]),
        "right_to_wrong": share([1 - new for old, new in zip(rewards, revised) if old]),
        "length": share([len(y.ids) for y in attempts]),
    }
    return row, examples, lm, reviser


KINDS_OF_TOKENS = (
    "names",
    "right prices",
    "wrong prices",
    "sums",
    "answer",
    "what comes next",
    "more",
)


def kinds_of_tokens(words, price):
    """What each token of a response is; "what comes next" is the one after the first answer: the
    response ends, or goes on with a phrase and another attempt ("more")."""
    kinds, answered = [], False
    for i, word in enumerate(words):
        if answered:
            kinds.append("more" if kinds[-1] in ("what comes next", "more") else "what comes next")
        elif word.startswith(": "):
            named = words[i - 1] if i else ""
            kinds.append("right prices" if word == f": {price.get(named)}" else "wrong prices")
        else:
            kinds.append("names" if word in price else "sums" if ", sum" in word else "answer")
        answered = answered or word.startswith("####")
    return kinds


@torch.no_grad()
def kl_by_token(e, student, teacher):
    """README (4) of an example, token by token: [n]."""
    n = len(e.response.ids)
    rows = slice(-n - 1, -1)  # position t-1 predicts token t
    student_logits = student(torch.tensor([e.student_ids])).logits[0, rows]
    return full_logits(student_logits, teacher(torch.tensor([e.teacher_ids])).logits[0, rows])


def where_the_kl_is(world, examples, lm, reviser):
    """README (4) of a model's attempts, with SRT as the teacher.

    Returns, for "wrong" and "right" responses: "nats" per response by kind of token, the number of
    "tokens" of a response, and the share of its KL that is in its "top" 5% of tokens.
    """
    found = {}
    for verdict in ("wrong", "right"):
        nats, tokens, top = dict.fromkeys(KINDS_OF_TOKENS, 0.0), 0, []
        chosen = [e for e in examples if e.reward == (verdict == "right")]
        for e in chosen:
            n, values = len(e.response.ids), kl_by_token(e, lm.model, reviser.model)
            words = lm.tokenizer.convert_ids_to_tokens(e.response.ids)
            for kind, value in zip(kinds_of_tokens(words, world.price), values.tolist()):
                nats[kind] += value / len(chosen)
            largest = values.sort(descending=True).values[: math.ceil(n / 20)]
            top.append((largest.sum() / values.sum()).item())
            tokens += n / len(chosen)
        found[verdict] = {"nats": nats, "tokens": tokens, "top": share(top)}
    return found


def show_trace(out, world, lm, reviser):
    """README's picture: the first trace of a wrong attempt, with what stage 2 would make of it.
    Some 6% of these traces have a right total of wrong prices: such a one is not shown."""
    traces = [srt.Trace(**json.loads(line)) for line in open(out / "srt" / "traces.jsonl")]
    for trace in [t for t in traces if not t.reward]:
        goods = trace.problem.removeprefix("Total of ").removesuffix("?").split(" + ")
        if trace.revision_text == solution(goods, [world.price[good] for good in goods]):
            break
    else:
        return
    ids = trace.init_ids + [lm.tokenizer.eos_token_id]
    response = Rollout(ids, [0.0] * len(ids), True)
    example = Example(trace.prompt_ids, response, trace.reward, trace.phrase_ids)
    tokens, nats = "token y_t ", "KL, nats  "
    values = kl_by_token(example, lm.model, reviser.model).tolist()
    for token, value in zip(lm.tokenizer.convert_ids_to_tokens(ids), values):
        token = token.strip(" ,\n").replace("<|eos|>", "EOS")
        width = max(len(token), 5)
        tokens, nats = f"{tokens} {token:{width}}", f"{nats} {value:<{width}.3f}"
    x, y, y_rev = (
        text.replace("\n", " / ") for text in (trace.problem, trace.init_text, trace.revision_text)
    )
    print(f"\nx          {x} (the answer is {trace.answer})\ny          {y}")
    print(f"P_{trace.reward}        {trace.phrase}\ny_rev      {y_rev}\n{tokens}\n{nats}")


# --------------------------------------------------------------------------------------- the report


def pictures(out):
    """A page of the base's responses, coloured by their KL; curves, where matplotlib is."""
    flags = ["--model", out / "base", "--teacher", out / "srt", "--dataset", out / "heldout.jsonl"]
    flags += ["--max-new-tokens", 64, "--device", "cpu", "--output", out / "localize.html"]
    call("examples/localize.py", *flags)
    if importlib.util.find_spec("matplotlib"):
        names = "srt", "sdzero", *BASELINES, "grpo_from_srt"
        runs = [out / name for name in names if (out / name).exists()]
        call("examples/curves.py", *runs, "--output", out / "curves.png")


def spread(values, scale=100.0):
    """Mean, and standard deviation over seeds when there are several."""
    values = [scale * value for value in values if value is not None]
    if not values:
        return "-"
    mean = f"{statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.1f}"


def cells(evaluations, columns=COLUMNS):
    """The cells of a row of the table, from its evaluation with each seed."""
    found = []
    for key in columns.values():
        scale = 1.0 if key == "length" else 100.0
        found.append(spread([evaluation[key] for evaluation in evaluations], scale))
    return " | ".join(found)


def print_kl(figures):
    """A table of where the KL of the loss lies, from `where_the_kl_is` of each seed."""
    print("\nKL from SRT as the teacher, millinats per response by kind of token:\n")
    print(f"| student | response | tokens | top 5% | {' | '.join(KINDS_OF_TOKENS)} |")
    print("| --- | --- | --- | --- |" + " --- |" * len(KINDS_OF_TOKENS))
    for student in figures[0]:
        for verdict in ("wrong", "right"):
            found = [kl[student][verdict] for kl in figures]
            cells = [spread([f["tokens"] for f in found], 1), spread([f["top"] for f in found])]
            for kind in KINDS_OF_TOKENS:
                cells.append(spread([f["nats"][kind] for f in found], 1000))
            print(f"| {student} | {verdict} | {' | '.join(cells)} |")


def main(argv=None):
    parser = argparse.ArgumentParser(description="SD-Zero on a toy, on a CPU, without a download")
    add = parser.add_argument
    add("--out", type=Path, default=Path("runs/toy"), help="where it goes on (default: runs/toy)")
    add("--seed", type=int, default=0, help="of the world and of all sampling (default: 0)")
    add("--seeds", type=common.count, default=1, help="how many, from --seed on, a folder each")
    add("--baselines", action="store_true", help="add the baselines and variations of stage 2")
    args = parser.parse_args(argv)
    started, tables, figures = time.time(), [], []
    for seed in range(args.seed, args.seed + args.seeds):
        out = args.out / f"seed{seed}" if args.seeds > 1 else args.out
        world = World(seed)
        with common.explained(f"cannot use {out}, name another --out", OSError):
            if not (out / "base" / "config.json").exists():
                out.mkdir(parents=True, exist_ok=True)
                show_pages(World(seed))  # of its own: the other world's draws stay as they are
                write(out, world)
            elif open(out / "stage1.jsonl").readline() != make_row(World(seed)):
                # a world is known by its first problem; its results would pass for this one's
                common.fail(f"{out} holds another world than {seed}: name another --out")
        table, kl = both_stages(out, seed), {}
        table["base, revised by SRT"], *attempts = revised_by_srt(out, seed, "base")
        kl["base"] = where_the_kl_is(world, *attempts)
        show_trace(out, world, *attempts[1:])
        kl["SRT"] = where_the_kl_is(world, *revised_by_srt(out, seed, "srt")[1:])
        # SRT against SD-Zero as its own reviser: which of them would be the better teacher now
        table["SD-Zero, revised by SRT"], *_ = revised_by_srt(out, seed, "sdzero")
        if args.baselines:
            table.update(the_rest(out, seed))
        tables.append(table)
        figures.append(kl)
        report = {"world": seed, "rows": table, "kl": kl}
        with common.explained(f"cannot write to {out}, make room and repeat", OSError):
            (out / "report.tmp").write_text(json.dumps(report, indent=1))
            os.replace(out / "report.tmp", out / "report.json")  # a kill leaves no half of it
        pictures(out)

    print(f"\n| model | {' | '.join(COLUMNS)} |\n| --- |{' --- |' * len(COLUMNS)}")
    for name in tables[0]:
        print(f"| {name} | {cells([table[name] for table in tables])} |")
    error = max(100 * (e.get("accuracy_se") or 0) for e in tables[0].values())
    errors = f"standard errors of accuracies up to {error:.1f}"
    if args.seeds > 1:
        errors = "mean ± standard deviation over seeds"
    print(
        f"\n{SIZES['heldout']} held-out problems, 4 samples each (of those revised by SRT 1); "
        f"seeds {args.seed} to {seed}, {errors}"
    )
    print_kl(figures)
    print(f"{(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
