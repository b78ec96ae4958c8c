"""That the method learns: both scripts by their command lines, on a task of seconds.

A problem names a good and a market; the answer is the good's price, one token. The base is mostly
wrong at first, as the crowd is that wrote its pre-training text. Second answers after "Wait" are
better, those after "Let me rephrase" are the first again. Stage 1 learns to revise on one half of
the goods. Stage 2 has to put what the reviser knows of the other half into the first answer, and is
evaluated with markets that it has not trained on. Nothing of the scripts is replaced here.
"""

import json
import random
import re
import shlex
import shutil
from pathlib import Path

import torch
from test_scripts import call, lines_of
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import sdzero
import srt

GOODS, MARKETS, PRICES = "abcdefghijkl", "ABCDEFGHIJKLMNOP", "0123456789"
PHRASES = (
    "Wait, this response is not correct, let me start over.",
    "Let me rephrase the above solution.",
)
FIRST, AGAIN = (0.3, 0.6), (0.65, 0.25)  # shares of the right and of the popular wrong price
REPEATS, FITS = 0.9, 0.85  # second answers that copy after "rephrase"; phrases that tell the truth


def says_the_price(response, answer):
    return response[-1:] == answer


def make_tokenizer():
    special = ["<|end|>", "<|unk|>", "<|user|>", "<|assistant|>", "<|thread|>"]
    phrases = [f"\n\n{phrase}\n\n" for phrase in PHRASES]  # a token each
    words = [*special, *GOODS, *MARKETS, *PRICES, *phrases]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<|unk|>"))
    pattern = Regex("|".join([*(phrase.replace(".", r"\.") for phrase in phrases), "."]))
    backend.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="isolated")
    backend.decoder = decoders.Fuse()
    names = dict(unk_token="<|unk|>", eos_token="<|end|>", pad_token="<|end|>")
    names["additional_special_tokens"] = special
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    tokenizer.chat_template = "<|user|>{{ messages[0].content }}<|assistant|>"
    return tokenizer


def document(rng, prices):
    """An answer, or a thread of two to four, each after a phrase that mostly fits."""
    good, thread = rng.choice(GOODS), rng.random() < 0.5
    text = f"<|user|>{good}{rng.choice(MARKETS)}" + ("<|thread|>" if thread else "<|assistant|>")

    def look_up(right, popular):
        return rng.choices(
            [*prices[good], rng.choice(PRICES)], [right, popular, 1 - right - popular]
        )[0]

    said = look_up(*FIRST)
    text += said
    for _ in range(rng.randint(1, 3) if thread else rng.random() < 0.1):
        phrase = (said == prices[good][0]) == (rng.random() < FITS)
        if not phrase or rng.random() > REPEATS:
            said = look_up(*AGAIN)
        text += f"\n\n{PHRASES[phrase]}\n\n{said}"
    return text + "<|end|>"


def make_base(folder, seed=7, steps=200, rate=1e-2):
    """The pre-trained model, and two data sets of which each names one half of the goods."""
    rng = random.Random(seed)
    prices = {good: rng.sample(PRICES, 2) for good in GOODS}  # the right one, the popular one
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(vocab_size=len(tokenizer), eos_token_id=0, pad_token_id=0, bos_token_id=None)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **ids, max_position_embeddings=256))
    adamw = torch.optim.AdamW(model.parameters(), lr=rate)
    for step in range(steps):
        adamw.param_groups[0]["lr"] = rate * min(1, 2 * (1 - step / steps))
        texts = [document(rng, prices) for _ in range(64)]
        rows = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
        labels = rows.input_ids.masked_fill(rows.attention_mask == 0, -100)
        labels[:, :4] = -100  # the question
        model(input_ids=rows.input_ids, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adamw.step()
        adamw.zero_grad()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    half = len(GOODS) // 2
    for name, goods in (("stage_1", GOODS[:half]), ("stage_2", GOODS[half:])):
        with open(folder / f"{name}.jsonl", "w") as file:
            for problem in (good + market for good in goods for market in MARKETS):
                answer = prices[problem[0]][0]
                file.write(json.dumps({"problem": problem, "answer": answer}) + "\n")


def test_both_stages_learn(tmp_path):
    """Accuracy on held-out problems, from 0.31 to 0.69 to 0.95. A wrong sign, a learning rate of 0,
    the other phrase and a teacher that is shifted by a token, or by a copy, all stay below 0.7."""
    make_base(tmp_path)
    stage_2, flags = tmp_path / "stage_2.jsonl", ["--verifier", "test_learning:says_the_price"]
    flags += "--max-new-tokens 8 --temperature 1 --eval-temperature 1 --eval-problems 32".split()
    flags += "--eval-samples 8 --batch-size 8 --warmup 2 --device cpu".split()
    first, second = tmp_path / "srt", tmp_path / "sdzero"
    data = ["--dataset", tmp_path / "stage_1.jsonl", "--eval-dataset", stage_2, "--problems", "96"]
    call(srt, "--model", tmp_path / "base", *data, *flags, "--lr", "1.5e-3", "--output", first)
    data = ["--dataset", stage_2, "--epochs", "4"]
    call(sdzero, "--model", first, *data, *flags, "--lr", "1e-3", "--output", second)
    lines = [x for x in lines_of(first / "metrics.jsonl") if x["kind"] == "eval"]
    lines += [x for x in lines_of(second / "metrics.jsonl") if x["kind"] == "eval"]
    base, revising, _, last = (x["accuracy"] for x in lines)
    assert base < 0.4 and revising > base + 0.12 and last > 0.8 and last > revising + 0.2
    assert lines[-1]["accuracy_se"] < 0.04


def command_of(module):
    """The command of a script's docstring that a laptop can run, as a list of flags."""
    text = module.__doc__.replace("\\\n", " ")
    (line,) = re.findall(rf"python {module.__name__}\.py (--model runs/toy.*)\(CPU", text)
    return shlex.split(line)


def test_the_commands_of_the_docstrings_learn(tmp_path, monkeypatch):
    """As they stand, but on the small task, whose few problems need more epochs. Catches flags of
    yesterday, and rates and batches that do not learn."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "toy"
    folder.mkdir(parents=True)
    make_base(folder)
    (folder / "stage_1.jsonl").rename(folder / "stage1.jsonl")
    (folder / "stage_2.jsonl").rename(folder / "stage2.jsonl")
    data = ["--eval-dataset", folder / "stage2.jsonl", "--eval-problems", "32", "--device", "cpu"]
    data += ["--verifier", "test_learning:says_the_price", "--eval-temperature", "1"]
    accuracies = []
    for script, part, epochs in ((srt, "srt", 30), (sdzero, "sdzero", 40)):
        flags = command_of(script)
        call(script, *flags, *data, "--epochs", epochs)
        output = Path(flags[flags.index("--output") + 1])
        shutil.copytree(output, folder / part)
        for line in lines_of(output / "metrics.jsonl"):
            accuracies += [line["accuracy"]] if line["kind"] == "eval" else []
    assert accuracies[1] > accuracies[0] + 0.12 and accuracies[-1] > accuracies[1] + 0.15
