"""Self-Distillation Zero on a CPU, from nothing and without a download: a task, a base model, both stages, one table.

The task. 120 made-up goods have hidden one-digit prices. A problem names four of them, and the answer is the last digit of their total.
A response names each good, its price and the running sum:

    Last digit of bako + tilu + nemi + sopa?   ->   bako: 4, sum 4 / tilu: 9, sum 3 / nemi: 1, sum 4 / sopa: 6, sum 0 / #### 0

The base model is a Llama of 0.35M parameters that reads one word a token (a character a token needs four times the time for the same
findings). It is pre-trained on a synthetic web, whose writers are an imperfect crowd.

What is built into the toy, plainly:
- Most goods are known to nearly everybody. About one in seven carries a misconception: nearly everybody writes the same wrong price at first.
  So the base is wrong when a problem names such a good, which is about half of the time.
- Second attempts exist. A few documents go on after the first attempt with a control phrase of the method and a second attempt, and so do
  many forum threads, which have a marker of their own. The writer of the phrase is right about the first attempt in four cases of five. A
  second attempt repeats many prices and looks up the others afresh; there the misconceptions are weaker, though still the likeliest price.
- Exercises in copying (random prices, no loss on them) teach the model to use what stands in its context.
So the base knows phrases, attempts and weak alternatives, as a model trained on the web does, but does not use them: that is what stage 1
brings out and stage 2 puts into the first attempt. The verifier's bit is all that either stage hears of an answer. The problems of
pre-training, of stage 1, of stage 2 and the held-out ones are disjoint, as sets of four goods, so that no order of one is another's.
"""
import argparse
import json
import os
import random
import shlex
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
PHRASES = "Wait, this response is not correct, let me start over.", "Let me rephrase the above solution."  # [r]: the paper's, our default
GOODS = [a + b + c for a in "bdgklmnprt" for b in "aeiu" for c in ("ko", "lu", "sa")]  # 120: each is seen some 2,000 times
HARD = 18                    # goods with a misconception: 0.85 ** 4 = 52% of the problems have none, so the base is right about half the time
KNOWN, KNOWN_AGAIN = 0.99, 0.96  # share of writers who get an ordinary good's price right, at first and in haste in a later attempt
HARD_FIRST = 0.001, 0.006    # of the first attempts at a hard good, the share with the right price: between these two, by the good ...
MISLED_FIRST = 0.97          # ... and the share with the popular wrong price; the rest are guesses
RIGHT_AGAIN, MISLED_AGAIN = 0.18, 0.60  # the same two shares when a later attempt looks a hard good up afresh
REPEAT = 0.45, 0.97          # share of prices that a second attempt takes over from the first, after the phrase for wrong and for right
JUDGE = 0.95                 # share of phrases that fit the first attempt
DOCUMENTS = 80_000           # some 3.3M tokens, each seen once
KINDS = {"answer": 0.42, "revision": 0.03, "thread": 0.35, "copy": 0.20}  # shares of the documents, see `document`
MOST_ATTEMPTS = 4            # in a thread, at least 2: stage 2's teacher reads four (a response with a revision in it, twice)
SIZES = {"stage1": 2400, "stage2": 2400, "heldout": 500}  # problems in the JSONL files
BATCH_TOKENS, LR = 2048, 3e-3  # about 1,700 steps
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
        attempts = 1 if kind == "answer" else rng.randint(2, MOST_ATTEMPTS) if kind == "thread" else 2
        # a thread and an exercise show by their marker that more attempts follow, so that an assistant's answer rarely goes on
        given, text = chat(question(goods), {"thread": "<|forum|>", "copy": "<|copy|>"}.get(kind, "<|assistant|>")), ""
        prices = [rng.randrange(10) if kind == "copy" else self.look_up(good, again=False) for good in goods]
        for _ in range(attempts - 1):
            right = sum(prices) % 10 == self.answer(goods)
            called = right if rng.random() < JUDGE else not right
            text += solution(goods, prices) + "\n\n" + PHRASES[called] + "\n\n"
            if kind == "copy":
                given, text = given + text, ""  # nobody could learn anything from random prices
            else:
                prices = [old if rng.random() < REPEAT[called] else self.look_up(good, again=True) for good, old in zip(goods, prices)]
        return given, text + solution(goods, prices) + "<|eos|>"

    def answer(self, goods):
        return sum(self.price[good] for good in goods) % 10


def question(goods):
    return "Last digit of " + " + ".join(goods) + "?"


def chat(problem, turn="<|assistant|>"):
    return "<|user|>" + problem + turn  # what the chat template renders


def solution(goods, prices):
    sums = [sum(prices[: i + 1]) % 10 for i in range(len(prices))]
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
                file.write(json.dumps({"problem": question(goods), "answer": str(world.answer(goods))}) + "\n")
    tokenizer = make_tokenizer()
    pretrain(world, tokenizer).save_pretrained(out / "base")
    tokenizer.save_pretrained(out / "base")


def stage(script, out, name, *flags):
    """Run srt.py or sdzero.py as a user would; returns its evaluations, the first of them before any training."""
    command = [sys.executable, ROOT / script, "--dataset", out / f"{name}.jsonl", "--eval-dataset", out / "heldout.jsonl",
               "--eval-problems", SIZES["heldout"], "--eval-samples", 4, "--eval-temperature", 1, "--temperature", 1, "--max-new-tokens", 64, *flags]
    command = [str(part) for part in command]
    print("\n$", shlex.join(["python", script, *command[2:]]), flush=True)
    if code := subprocess.run(command).returncode:
        raise SystemExit(code)
    lines = [json.loads(line) for line in open(Path(command[-1]) / "metrics.jsonl")]
    return [line for line in lines if line["kind"] == "eval"]


def main():
    parser = argparse.ArgumentParser(description="Self-Distillation Zero on a toy, on a CPU, without a download")
    parser.add_argument("--out", type=Path, default=Path("runs/toy"), help="folder to write; must not hold a run (default: runs/toy)")
    parser.add_argument("--seed", type=int, default=0, help="of the prices, the problems, the model and all sampling (default: 0)")
    args = parser.parse_args()
    out, started = args.out, time.time()
    if out.exists() and any(out.iterdir()):
        print(f"toy.py: {out} already holds something: name another folder with --out, or remove it", file=sys.stderr)
        raise SystemExit(2)
    out.mkdir(parents=True, exist_ok=True)
    write(out, World(args.seed))
    srt = stage("srt.py", out, "stage1", "--model", out / "base", "--problems", SIZES["stage1"], "--batch-size", 16, "--lr", 5e-4,
                "--seed", args.seed, "--eval-every", 100, "--output", out / "srt")
    sdzero = stage("sdzero.py", out, "stage2", "--model", out / "srt", "--batch-size", 32, "--lr", 3e-4, "--warmup", 5,
                   "--seed", args.seed, "--eval-every", 25, "--output", out / "sdzero")
    print("\n| model | accuracy, % | after one revision, % | wrong put right, % | right broken, % | tokens |\n| --- | --- | --- | --- | --- | --- |")
    for name, e in (("base", srt[0]), ("SRT", srt[-1]), ("SD-Zero", sdzero[-1])):
        percent = [f"{100 * e[k]:.1f}" for k in ("accuracy", "accuracy_se", "revised_accuracy", "wrong_to_right", "right_to_wrong")]
        print(f"| {name} | {percent[0]} ± {percent[1]} | {' | '.join(percent[2:])} | {e['length']:.1f} |")
    print(f"\n{SIZES['heldout']} held-out problems, 4 samples each; seed {args.seed}; {(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
