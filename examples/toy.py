"""Self-Distillation Zero on a CPU, from nothing and without a download: a task, a base model, both stages, one table,
a page and a picture.

    python examples/toy.py                             one seed: base, SRT, SD-Zero
    python examples/toy.py --seeds 3 --baselines       three, with RFT, GRPO, SDFT, SDPO and variations of stage 2

The task. 60 made-up goods have hidden one-digit prices. A problem names four of them, and the answer is the last digit of their total.
A response names each good, its price and the running sum:

    Last digit of bako + tilu + nisa + taka?   ->   bako: 4, sum 4 / tilu: 9, sum 3 / nisa: 1, sum 4 / taka: 6, sum 0 / #### 0

The base model is a Llama of 0.35M parameters that reads one word a token (a character a token needs four times the time for the same
findings). It is pre-trained on a synthetic web, whose writers are an imperfect crowd.

What is built into the toy, plainly:
- Most goods are known to nearly everybody. About one in seven carries a misconception: nearly everybody writes the same wrong price at
  first. So the base is wrong when a problem names such a good, which is about half of the time.
- Second attempts exist. A few documents go on after the first attempt with a control phrase of the method and a second attempt, and so do
  many forum threads, which have a marker of their own. The writer of the phrase is right about the first attempt in four cases of five.
- A second attempt after "Let me rephrase" repeats nearly all prices, one after "Wait" fewer, and looks up the others afresh; there the
  misconceptions are weaker, though still by far the likeliest price. So a base that is told that it was wrong seldom gets it right.
- Attempts that another one follows have slips: a good read twice, a sum gone wrong. The next attempt reads the question again and adds up
  anew. Without them a reviser copies whatever stands there, and stage 2 may drift to where its teacher sees nothing wrong: a run in which
  the student learned to name a good twice, and fell from 92% to 12%, is why they are here.
- Exercises in copying (random prices, "Let me rephrase", the same prices again; no loss but on the last attempt) teach the model to use
  what stands in its context. A reviser that copies badly breaks right answers: without these, SRT broke a tenth of its own in some worlds.
So the base knows phrases, attempts and weak alternatives, as a model trained on the web does, but does not use them: that is what stage 1
brings out and stage 2 puts into the first attempt. The verifier's bit is all that either stage hears of an answer (so do RFT, GRPO and
SDPO; SDFT's teacher is shown the right prices). The problems of pre-training, of stage 1, of stage 2 and the held-out ones are disjoint,
as sets of four goods, so that no order of one is another's.
"""
import argparse
import importlib.util
import json
import math
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so small a model is faster on one core than on two; before torch is imported
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import losses
import sdzero
import srt

PHRASES = "Wait, this response is not correct, let me start over.", "Let me rephrase the above solution."  # [r]: the paper's, our default
GOODS = [a + b + c for a in "bdgklmnprt" for b in "ai" for c in ("ko", "lu", "sa")]  # 60: each is in some 4,000 documents
HARD = 9                     # goods with a misconception: 0.85 ** 4 = 52% of the problems name none, so the base is right half the time
KNOWN, KNOWN_AGAIN = 0.99, 0.96  # share of writers who get an ordinary good's price right, at first and in haste in a later attempt
HARD_FIRST = 0.001, 0.006    # of the first attempts at a hard good, the share with the right price: between these two, by the good ...
MISLED_FIRST = 0.97          # ... and the share with the popular wrong price; the rest are guesses
RIGHT_AGAIN, MISLED_AGAIN = 0.16, 0.66  # the same two shares when a later attempt looks a hard good up afresh
REPEAT = 0.6, 0.98           # share of prices that a second attempt takes over from the first: after the phrase for wrong, for right
JUDGE = 0.8                  # share of phrases that fit the first attempt
SLIP = 0.08                  # of the attempts that another one follows, the share where a good is misread; likewise where a sum is wrong
DOCUMENTS = 60_000           # some 2.4M tokens, each seen once
KINDS = {"answer": 0.42, "revision": 0.03, "thread": 0.35, "copy": 0.20}  # shares of the documents, see `document`
MOST_ATTEMPTS = 4            # in a thread or an exercise, at least 2: stage 2's teacher reads four (a response with a revision in it, twice)
SIZES = {"stage1": 3000, "stage2": 2400, "heldout": 500}  # problems in the JSONL files
BATCH_TOKENS, LR = 2048, 3e-3  # about 1,200 steps
STAGE_1 = ["--batch-size", 16, "--lr", 5e-4]
STAGE_2 = ["--batch-size", 32, "--lr", 3e-4, "--warmup", 5]
RFT = ["--batch-size", 16, "--lr", 5e-4, "--warmup", 0.05, "--lr-schedule", "cosine"]
GRPO = ["--batch-size", 96, "--lr", 3e-4, "--warmup", 5]  # 12 problems x 8
SDFT = ["--batch-size", 96, "--lr", 5e-5, "--warmup", 5, "--solution-column", "solution"]
SDPO = ["--batch-size", 96, "--lr", 5e-5, "--warmup", 5]
MODEL = dict(hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=512)


class World:
    """The prices, what the crowd believes, and one stream of random numbers for everything that is drawn."""
    def __init__(self, seed):
        self.rng = random.Random(seed)
        self.price = {good: self.rng.randrange(10) for good in GOODS}
        hard = self.rng.sample(GOODS, HARD)
        self.belief = {good: (self.price[good] + self.rng.randrange(1, 10)) % 10 for good in hard}
        self.insight = {good: self.rng.uniform(*HARD_FIRST) for good in hard}
        self.seen = set()

    def make_problem(self):
        """Four goods that no problem before had together."""
        while frozenset(goods := self.rng.sample(GOODS, 4)) in self.seen:
            pass
        self.seen.add(frozenset(goods))
        return goods

    def look_up(self, good, again):
        """The price that one writer of the crowd believes in."""
        right, misled = (KNOWN_AGAIN if again else KNOWN), 0.0
        if good in self.belief:
            right, misled = (RIGHT_AGAIN, MISLED_AGAIN) if again else (self.insight[good], MISLED_FIRST)
        u = self.rng.random()
        return self.price[good] if u < right else self.belief[good] if u < right + misled else self.rng.randrange(10)

    def document(self):
        """One page of the web: the text that is given, and the text whose tokens are trained on."""
        goods, rng = self.make_problem(), self.rng
        kind = rng.choices(list(KINDS), KINDS.values())[0]
        attempts = {"answer": 1, "revision": 2}.get(kind) or rng.randint(2, MOST_ATTEMPTS)
        # a thread and an exercise show by their marker that more attempts follow, so that an assistant's answer rarely goes on
        given, text = chat(question(goods), {"thread": "<|forum|>", "copy": "<|copy|>"}.get(kind, "<|assistant|>")), ""
        prices = [rng.randrange(10) if kind == "copy" else self.look_up(good, again=False) for good in goods]
        for _ in range(attempts - 1):
            written, added = goods.copy(), prices.copy()
            i = rng.randrange(4)
            if kind != "copy" and rng.random() < SLIP:
                written[i] = rng.choice(goods)
                prices[i] = added[i] = self.look_up(written[i], again=False)
            if kind != "copy" and rng.random() < SLIP:
                added[i] = rng.randrange(10)
            right = sum(added) % 10 == self.answer(goods)
            called = kind == "copy" or (right if rng.random() < JUDGE else not right)
            text += solution(written, prices, added) + "\n\n" + PHRASES[called] + "\n\n"
            if kind == "copy":
                given, text = given + text, ""  # nobody could learn anything from random prices
            else:
                prices = [old if name == good and rng.random() < REPEAT[called] else self.look_up(good, again=True)
                          for good, name, old in zip(goods, written, prices)]
        return given, text + solution(goods, prices) + "<|eos|>"

    def answer(self, goods):
        return sum(self.price[good] for good in goods) % 10


def question(goods):
    return "Last digit of " + " + ".join(goods) + "?"


def chat(problem, turn="<|assistant|>"):
    return "<|user|>" + problem + turn  # what the chat template renders


def solution(goods, prices, added=None):
    sums = [sum((added or prices)[: i + 1]) % 10 for i in range(len(prices))]
    return "".join(f"{good}: {price}, sum {total}\n" for good, price, total in zip(goods, prices, sums)) + f"#### {sums[-1]}"


def make_tokenizer():
    """One token a word; a price, a sum and an answer are one token each with the signs around their digit, and so is each phrase."""
    special = ["<|pad|>", "<|eos|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|forum|>", "<|copy|>"]
    signs = [sign % digit for sign in (": %d", ", sum %d\n", "#### %d") for digit in range(10)]
    words = GOODS + signs + ["Last digit of ", " + ", "?", "\n\n", *PHRASES]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(special + words)}, unk_token="<|unk|>"))
    pattern = "|".join(word.replace("?", r"\?").replace("+", r"\+").replace(".", r"\.") for word in sorted(words, key=len, reverse=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # the tokens hold their own spaces: decoding joins them and adds none
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|eos|>", unk_token="<|unk|>",
                                   additional_special_tokens=special[3:], clean_up_tokenization_spaces=False)
    fast.chat_template = ("{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
                          "{% if add_generation_prompt %}<|assistant|>{% endif %}")
    return fast


def pretrain(world, tokenizer):
    """The base model: one pass after the other over the synthetic web, documents of like length in a batch, padded on the right."""
    torch.manual_seed(world.rng.randrange(2**31))
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
                                         pad_token_id=tokenizer.pad_token_id, bos_token_id=None, **MODEL))
    given, trained = zip(*(world.document() for _ in range(DOCUMENTS)))
    encode = lambda texts: tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    pages = list(zip(encode(given), encode(trained)))
    pages.sort(key=lambda page: len(page[0]) + len(page[1]))
    batches = [[]]
    for page in pages:
        if (len(batches[-1]) + 1) * (len(page[0]) + len(page[1])) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(page)
    world.rng.shuffle(batches)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=len(batches), pct_start=0.05)
    for batch in (bar := tqdm(batches, desc="pre-training")):
        width = max(len(given) + len(trained) for given, trained in batch)
        pad = lambda row, fill: row + [fill] * (width - len(row))
        ids = torch.tensor([pad(given + trained, tokenizer.pad_token_id) for given, trained in batch])
        # the padding stands on the right, where causal attention never looks: no attention mask is needed, only labels
        labels = torch.tensor([pad([-100] * len(given) + trained, -100) for given, trained in batch])
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


def write(out, world):
    """The problems, then the base model that has seen none of them, in `out`."""
    for name, size in SIZES.items():
        with open(out / f"{name}.jsonl", "w") as file:
            for goods in (world.make_problem() for _ in range(size)):
                worked = solution(goods, [world.price[good] for good in goods])  # for SDFT's teacher alone: --solution-column
                file.write(json.dumps({"problem": question(goods), "answer": str(world.answer(goods)), "solution": worked}) + "\n")
    (out / "both.jsonl").write_text((out / "stage1.jsonl").read_text() + (out / "stage2.jsonl").read_text())  # for the baselines
    tokenizer = make_tokenizer()
    model = pretrain(world, tokenizer)
    tokenizer.save_pretrained(out / "base")
    model.save_pretrained(out / "base")


def call(script, *flags):
    """Run a script as a user would."""
    print("\n$", shlex.join(["python", script, *map(str, flags)]), flush=True)
    if code := subprocess.run([sys.executable, ROOT / script, *map(str, flags)]).returncode:
        raise SystemExit(code)


def run(script, out, data, *flags):
    """A method, unless it is done already; its output folder comes last. Returns its evaluations, the first of them before any training."""
    if not (flags[-1] / "config.json").exists():
        call(script, "--dataset", out / f"{data}.jsonl", "--eval-dataset", out / "heldout.jsonl", "--eval-problems", SIZES["heldout"],
             "--eval-samples", 4, "--eval-temperature", 1, "--temperature", 1, "--max-new-tokens", 64, "--save-every", 10**6, *flags)
    return [line for line in map(json.loads, open(flags[-1] / "metrics.jsonl")) if line["kind"] == "eval"]


def pictures(out):
    """A page of the base's responses, coloured by what SRT as the teacher makes of them (F4); curves, where matplotlib is installed."""
    call("examples/localize.py", "--model", out / "base", "--teacher", out / "srt", "--dataset", out / "heldout.jsonl",
         "--max-new-tokens", 64, "--output", out / "localize.html")
    if importlib.util.find_spec("matplotlib"):
        runs = [out / name for name in ("srt", "sdzero", "rft", "grpo", "sdft", "sdpo") if (out / name).exists()]
        call("examples/curves.py", *runs, "--output", out / "curves.png")


def both_stages(out, seed):
    """The method itself: {row of the table: its evaluation}."""
    first = run("srt.py", out, "stage1", "--model", out / "base", "--problems", SIZES["stage1"], *STAGE_1, "--seed", seed,
              "--eval-every", 100, "--output", out / "srt")
    second = run("sdzero.py", out, "stage2", "--model", out / "srt", *STAGE_2, "--seed", seed,
                 "--eval-every", 25, "--output", out / "sdzero")
    return {"base": first[0], "SRT": first[-1], "SD-Zero": second[-1]}


def baseline(out, method, *flags):
    """RFT samples 4 responses a problem, as stage 1 does; the others as many as both stages. Returns its evaluations."""
    data, settings = {"rft": ("stage1", RFT), "grpo": ("both", GRPO), "sdft": ("both", SDFT), "sdpo": ("both", SDPO)}[method]
    budget = [] if method == "rft" else ["--generations", 4 * SIZES["stage1"] + SIZES["stage2"]]
    return run("examples/baselines.py", out, data, "--method", method, "--model", out / "base", *settings, *budget, *flags)


def the_rest(out, seed):
    """Baselines, at as many responses as both stages sample, and variations of stage 2: {row of the table: its evaluation}."""
    rows, rare = {}, ["--seed", seed, "--eval-every", 10**6, "--output"]
    for name in ("RFT", "GRPO", "SDFT", "SDPO"):
        every = [*rare[:3], SIZES["stage2"] // 96, rare[-1]] if name == "GRPO" else rare
        evals = baseline(out, name.lower(), *every, out / name.lower())
        if name == "GRPO":
            rows["GRPO, at stage 2's number of responses"] = evals[1]
        rows[name] = evals[-1]
    again = ["--model", out / "srt", *STAGE_2, "--epochs", 2, *rare]  # stage 2 twice as long: its first half is SD-Zero's own run
    rows["SD-Zero twice as long, old teacher"] = run("sdzero.py", out, "stage2", *again, out / "again")[-1]
    copy = ["--teacher", "ema", "--teacher-rate", 1, "--teacher-interval", math.ceil(SIZES["stage2"] / 32)]
    rows["SD-Zero twice as long, teacher synced between"] = run("sdzero.py", out, "stage2", *copy, *again, out / "synced")[-1]
    rows["stage 2 without stage 1"] = run("sdzero.py", out, "stage2", "--model", out / "base", *STAGE_2, *rare, out / "alone")[-1]
    return rows


@torch.no_grad()
def revised_by_srt(out, world, seed, whose):
    """SRT as the reviser of a model's attempts at the held-out problems: what its revisions are worth (F2, F5), where its KL lies (F4)."""
    flags = ["--dataset", out / "heldout.jsonl", "--max-new-tokens", 64, "--seed", seed, "--temperature", 1, "--model"]
    (lm, _, args), (reviser, phrases, _) = (load(*flags, out / name) for name in (whose, "srt"))
    problems, _ = srt.load_problems(lm, args, args.dataset, None)
    verify = srt.load_verifier("math")
    attempts = srt.sample(lm, args, [p.prompt_ids for p in problems], ("attempts",), 1.0, 1.0, "attempts")
    rewards = verify([lm.text(y.ids) for y in attempts], [p.answer for p in problems])
    examples = [sdzero.Example(p.prompt_ids, y, r, phrases[r]) for p, y, r in zip(problems, attempts, rewards)]
    contexts = [e.prompt_ids + srt.without_eos(e.response) + e.phrase_ids for e in examples]
    revisions = srt.sample(reviser, args, contexts, ("revisions",), 1.0, 1.0, "revisions")
    revised = verify([lm.text(y.ids) for y in revisions], [p.answer for p in problems])
    share = lambda values: sum(values) / max(1, len(values))
    first, last = share(rewards), share(revised)
    row = {"accuracy": first, "revised_accuracy": last, "correction_rate": (last - first) / (1 - first),
           "wrong_to_right": share([new for old, new in zip(rewards, revised) if not old]),
           "right_to_wrong": share([1 - new for old, new in zip(rewards, revised) if old]), "length": share([len(y.ids) for y in attempts])}
    kl = {0: [], 1: [], "revising": []}  # a token, by reward; right ones that hold two attempts are apart: the teacher skips the first
    top, at_error = [], []  # of the KL of a wrong response: the share in its top 5% of tokens, and on wrong prices
    for e in examples:
        n = len(e.response.ids)
        student, teacher = lm.model(torch.tensor([e.student_ids])).logits[0], reviser.model(torch.tensor([e.teacher_ids])).logits[0]
        values = losses.full_logits(student[-n - 1 : -1], teacher[-n - 1 : -1])  # [n], position t-1 predicts token t
        revising = e.reward and any(phrase in lm.text(e.response.ids) for phrase in PHRASES)
        kl["revising" if revising else e.reward] += values.tolist()
        if not e.reward:
            words = lm.tokenizer.convert_ids_to_tokens(e.response.ids)
            wrong = [good in world.price and price != f": {world.price[good]}" for good, price in zip(words, words[1:])]
            top.append((values.sort(descending=True).values[: math.ceil(n / 20)].sum() / values.sum()).item())
            at_error.append((values[1:][torch.tensor(wrong)].sum() / values.sum()).item())
    return row, [share(top), share(at_error), share(kl[0]), share(kl[1]), share(kl["revising"])]


def load(*flags):
    args = srt.parse_arguments([str(flag) for flag in flags])
    srt.inherit_prompt(args)
    lm = srt.load_lm(args)
    return lm, [lm.phrase_ids(args.phrase_wrong), lm.phrase_ids(args.phrase_right)], args


def spread(values, scale=100.0):
    """Mean, and standard deviation over seeds when there are some."""
    values = [scale * v for v in values if v is not None]
    if not values:
        return "-"
    return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def main():
    parser = argparse.ArgumentParser(description="Self-Distillation Zero on a toy, on a CPU, without a download")
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder; finished runs in it are kept (default: runs/toy)")
    parser.add_argument("--seed", type=int, default=0, help="of the prices, the problems, the model and all sampling (default: 0)")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from --seed on, each in a folder of its own (default: 1)")
    parser.add_argument("--baselines", action="store_true", help="add the baselines and the variations of stage 2")
    args = parser.parse_args()
    started, tables, localised = time.time(), [], []
    for seed in range(args.seed, args.seed + args.seeds):
        out, world = args.out / f"seed{seed}" if args.seeds > 1 else args.out, World(seed)
        if not (out / "base" / "config.json").exists():
            out.mkdir(parents=True, exist_ok=True)
            write(out, world)
        tables.append(both_stages(out, seed))
        tables[-1]["base, revised by SRT"], figures = revised_by_srt(out, world, seed, "base")
        tables[-1]["SD-Zero, revised by SRT"], _ = revised_by_srt(out, world, seed, "sdzero")  # its own revisions beat these, or a sync harms
        localised.append(figures)
        if args.baselines:
            tables[-1].update(the_rest(out, seed))
        pictures(out)
    print("\n| model | accuracy, % | after one revision, % | correction rate, % | wrong put right, % | right broken, % | tokens |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    keys = "accuracy", "revised_accuracy", "correction_rate", "wrong_to_right", "right_to_wrong"
    for name in tables[0]:
        cells = [spread([t[name][key] for t in tables]) for key in keys] + [spread([t[name]["length"] for t in tables], 1)]
        print(f"| {name} | {' | '.join(cells)} |")
    top, at_error, wrong, right, revising = zip(*localised)
    error = max(100 * e.get("accuracy_se", 0) for e in tables[0].values())
    print(f"\n{SIZES['heldout']} held-out problems, 4 samples each (of those revised by SRT 1); seeds {args.seed} to {seed}, "
          + ("mean ± standard deviation over seeds" if args.seeds > 1 else f"standard errors of accuracies up to {error:.1f}"))
    print(f"KL of the base from SRT as teacher: on wrong responses {spread(top)}% of it in the top 5% of the tokens, {spread(at_error)}% "
          f"on wrong prices; a token {spread(wrong, 1000)} millinats on wrong responses, {spread(right, 1000)} on right ones, "
          f"{spread(revising, 1000)} on right ones that hold a revision of their own")
    print(f"{(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
