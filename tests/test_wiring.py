"""Whole scripts with a sampler that answers by rule and a verifier that looks at the answer,
compared with a slow training loop: one plain forward pass per sequence, in float64.

Everything that a script does with a response is known beforehand. A mix-up between a response, its
problem, its answer, its verdict, its phrase, its log-probabilities or its place in the batch
changes a loss, a figure or a prompt that is compared. Then the flags, one by one: each must arrive
where it acts.
"""

import contextlib
import copy
import functools
import importlib
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_scripts import FLAGS, call, lines_of, save_model
from test_scripts import base as scripts_base  # noqa: F401
from test_scripts import data as scripts_data  # noqa: F401
from tiny import make_tokenizer
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import common  # whose `generate` all scripts sample with: the only name patched here
import losses
import sdzero
import srt
from rollout import Rollout

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import baselines

SCRIPTS = {
    "srt": (srt,),
    "sdzero": (sdzero,),
    **{name: (baselines, "--method", name) for name in ("sft", "rft", "grpo", "sdft", "sdpo")},
}
PHRASES = (
    "Wait, this response is not correct, let me start over.",
    "Let me rephrase the above solution.",
)
SHORT = ("No.", "Yes.")  # the phrases of most runs here: a character is a token
TOKENIZER = make_tokenizer()
AdamW = torch.optim.AdamW  # a `watch` replaces both in torch
clip_grad_norm_ = torch.nn.utils.clip_grad_norm_
EOS, VOCAB = 0, len(TOKENIZER)  # the model's output layer is three rows wider

# -------------------------------------------------------------------------------------- the rule

# held-out problem: which of its three attempts are right (R) or wrong (W), and which revisions
HELD_OUT = {101: "RRW", 102: "WWW", 103: "RWW", 104: "RRR", 105: "WWR"}
REVISED = {101: "RRR", 102: "RWW", 103: "WWW", 104: "WRR", 105: "RWR"}


def ids_of(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def verdict(text, i):
    return int(text.endswith(f"<{i}>"))


def attempt(i, n):
    """The n-th attempt at problem i within one call of the sampler: (text, finished)."""
    right = HELD_OUT[i][n] == "R" if i in HELD_OUT else (i + n) % 3 != 0
    return "ab"[: (i + n) % 3] + f"<{i if right else i + 1}>", (i + 2 * (n % 3)) % 5 != 0


def revision(i, shown, fits, n):
    """The n-th revision of one attempt; right only after the phrase that fits the attempt."""
    if i in REVISED:
        right = REVISED[i][[attempt(i, k)[0] for k in range(3)].index(shown)] == "R"
    else:
        right = (i + n) % 4 != 3
    return f"{'c' * (n % 2)}<{i if right and fits else 'no'}>", (i + n % 2) % 3 != 0


def response(text, finished, i, n):
    """Every token has a log-probability of its own, which no other response has at its place."""
    y = ids_of(text) + [EOS] * finished
    return Rollout(y, [-2 - 2 * ((3 * i + 5 * n + 7 * t) % 8) for t in range(len(y))], finished)


def answered(prompt, n, phrases):
    """The rule for a prompt's text, the n-th time that it is asked in one call."""
    match = re.fullmatch(r"(?s).*?(\d+)\?.*?(?:<\|assistant\|>#?|A:)(.*)", prompt)
    i, written = int(match[1]), match[2]
    if not written:
        return response(*attempt(i, n), i, n)
    shown, phrase = re.fullmatch(r"(.*)\n\n(.*)\n\n", written).groups()
    assert shown in [attempt(i, k)[0] for k in range(3)], f"problem {i} was shown {shown!r}"
    assert phrase in phrases, f"the phrase was {phrase!r}"
    return response(*revision(i, shown, phrase == phrases[verdict(shown, i)], n), i, n)


def says_its_answer(text, answer):
    return text.endswith(answer)


def always(text, answer):
    return True


# ------------------------------------------------------------------------- what a run records


class Watch:
    """One run: calls of the sampler, forward passes in training, optimizer steps, checkpoints."""

    def __init__(self, out):
        self.out, self.phrases, self.model = out, SHORT, None
        self.held_out = HELD_OUT.keys()  # None: the problems of the first call
        self.samples, self.updates, self.layers = [], [SimpleNamespace(passes=[], rate=None)], 0
        self.groups, self.clips, self.checkpoints = [], set(), set()

    def asked(self, held_out=False, revisions=False):
        """The calls for training, or for the evaluation; for attempts, or for revisions."""
        return [s for s in self.samples if (s.held_out, s.revisions) == (held_out, revisions)]

    def again(self, name):
        """Forget what was recorded, for another run in a folder beside the first."""
        self.__init__(self.out.parent / name)

    @property
    def steps(self):
        return [u for u in self.updates if u.rate is not None]

    @property
    def rates(self):
        return [u.rate for u in self.steps]

    def log(self, kind):
        return [x for x in lines_of(self.out / "metrics.jsonl") if x["kind"] == kind]

    def moved(self):
        """By how much all weights have moved, as one vector."""
        new = load_file(self.out / "model.safetensors")
        old = start(self.model).named_parameters()
        return torch.cat([(new[n].double() - p.detach()).flatten() for n, p in old])


@functools.cache
def start(folder):
    """The model that a run begins with, in float64: copied, never changed."""
    return AutoModelForCausalLM.from_pretrained(folder).double()


def problem_of(text):
    return int(re.search(r"(\d+)\?", text)[1])


def problems_of(samples):
    return {problem_of(text) for s in samples for text in s.texts}


@pytest.fixture
def watch(monkeypatch, tmp_path):
    w = Watch(tmp_path / "out")

    def generate(model, prompts, **rest):
        texts, asked = [TOKENIZER.decode(p) for p in prompts], Counter()
        found = []
        for text in texts:
            found.append(answered(text, asked[text], w.phrases))
            asked[text] += 1
        if not texts:
            return []
        problems, revisions = {problem_of(t) for t in texts}, {t.endswith("\n\n") for t in texts}
        w.held_out = problems if w.held_out is None else w.held_out
        held_out = problems & w.held_out
        assert len(revisions) == 1 and held_out in (problems, set())
        seed = rest["seed"][0]
        call = dict(texts=texts, held_out=bool(held_out), revisions=revisions.pop(), seed=seed)
        w.samples.append(SimpleNamespace(**{**rest, **call}))
        return found

    forward, layer = modeling_llama.LlamaModel.forward, modeling_llama.LlamaMLP.forward

    def watched_forward(self, input_ids=None, **rest):
        rows = []
        for row in input_ids.tolist():
            while row and row[-1] == EOS:  # also what the shorter rows are padded with
                row.pop()
            rows.append(row)
        if any(rows) and rows != [list(range(8))]:  # the check of the output layer
            found = SimpleNamespace(rows=rows, size=input_ids.numel(), dtype=self.dtype)
            found.grad, found.training = torch.is_grad_enabled(), self.training
            found.seed = torch.initial_seed()  # of dropout
            w.updates[-1].passes.append(found)
        return forward(self, input_ids=input_ids, **rest)

    def watched_layer(self, x):
        w.layers += torch.is_grad_enabled()
        return layer(self, x)

    class WatchedAdamW(AdamW):
        def __init__(self, groups, **rest):
            super().__init__(groups, **rest)
            w.groups += self.param_groups

        def step(self):
            (w.updates[-1].rate,) = {group["lr"] for group in self.param_groups}
            w.updates.append(SimpleNamespace(passes=[], rate=None))
            w.checkpoints |= {p.name for p in w.out.glob("checkpoint-*")}
            super().step()

    def watched_clip(parameters, limit):
        w.clips.add(limit)
        return clip_grad_norm_(parameters, limit)

    monkeypatch.setattr(common, "generate", generate)
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", watched_forward)
    monkeypatch.setattr(modeling_llama.LlamaMLP, "forward", watched_layer)
    monkeypatch.setattr(torch.optim, "AdamW", WatchedAdamW)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watched_clip)
    return w


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model; 12 problems to train on; the held-out ones; a data set in a folder."""
    folder = tmp_path_factory.mktemp("wiring")
    sizes = dict(num_hidden_layers=2, max_position_embeddings=40_000)
    save_model(folder / "base", family="llama", **sizes)
    save_model(folder / "short", family="llama", **{**sizes, "max_position_embeddings": 24})

    def rows(numbers, asked="problem", wanted="answer", **more):
        lines = []
        for i in numbers:
            row = {**more, asked: f"{i}?", wanted: f"<{i}>", "solution": f"s{i}"}
            row["revised"] = f"b\n\n{SHORT[0]}\n\ns{i}"
            lines.append(json.dumps(row) + "\n")
        return "".join(lines)

    (folder / "data.jsonl").write_text(rows(range(12)))
    (folder / "heldout.jsonl").write_text(rows(HELD_OUT))
    (folder / "many.jsonl").write_text(rows(range(1000, 1300)))
    decoys = dict(problem="99?", answer="<99>")
    (folder / "columns.jsonl").write_text(rows(range(12), "text", "gold", **decoys))
    (folder / "columns_heldout.jsonl").write_text(rows(HELD_OUT, "text", "gold", **decoys))
    splits = folder / "splits"
    splits.mkdir()
    for name, numbers in SPLITS.items():
        (splits / f"{name}.jsonl").write_text(rows(numbers))
    card = "---\nconfigs:\n"
    for config, train in (("default", "train"), ("other", "elsewhere")):
        card += f"- config_name: {config}\n  data_files:\n"
        for split, name in (("train", train), *((n, n) for n in ("more", "test", "validation"))):
            card += f"  - {{split: {split}, path: {name}.jsonl}}\n"
    (splits / "README.md").write_text(card + "---\n")
    return folder


SPLITS = dict(
    train=range(6), more=range(6, 12), elsewhere=range(20, 26), test=(101, 102), validation=(103,)
)
BASE = [
    *("--verifier", "test_wiring:says_its_answer", "--max-new-tokens", "12", "--device", "cpu"),
    *("--temperature", "0.9", "--top-p", "0.8", "--eval-temperature", "0.6", "--slots", "5"),
    *("--eval-samples", "3", "--batch-size", "4", "--lr", "3e-3", "--warmup", "2"),
    *("--phrase-wrong", SHORT[0], "--phrase-right", SHORT[1], "--problems", "12"),
]


OWN = {
    "srt": ["--epochs", "1", "--revisions", "2"],
    "sft": ["--epochs", "2", "--solution-column", "solution"],
    "rft": ["--epochs", "1", "--group", "4"],
    "grpo": ["--group", "2", "--batch-size", "8"],
    "sdpo": ["--group", "4", "--batch-size", "8", "--generations", "24"],
}
STEPS = {"srt": 5, "sdzero": 3, "sft": 6, "rft": 6, "grpo": 3, "sdft": 3, "sdpo": 3}


def run(w, files, name, *flags, data="data.jsonl", held_out="heldout.jsonl"):
    """A script with BASE, OWN and then the flags: of one that comes twice the last one counts."""
    script, *method = SCRIPTS[name]
    w.model = files / "base"
    sources = ["--model", w.model, "--dataset", files / data]
    sources += ["--eval-dataset", files / held_out] if held_out else []
    call(script, *method, *sources, *BASE, *OWN.get(name, []), "--output", w.out, *flags)
    return w


# --------------------------------------------------------------------------------- the slow loop


def logits(model, ids, n, temperature=1.0):
    """Those that predict the last n of the ids [n, VOCAB]: one plain forward, nothing padded."""
    return model(input_ids=torch.tensor([ids])).logits[0, -n - 1 : -1, :VOCAB] / temperature


def logprobs(values, ids):
    return values.log_softmax(-1)[range(len(ids)), ids]


def slow_training(files, batches, loss, rates, betas, weight_decay, rate=0.0, interval=1):
    """Plain AdamW in float64 on `loss(student, teacher, batch)`, the teacher a moving average.

    rate 0: the teacher is frozen; rate None: it is the student. Returns (losses, moved weights).
    """
    old = start(files / "base")
    student = copy.deepcopy(old)
    teacher = student if rate is None else copy.deepcopy(student)
    parameters = list(student.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    adamw, found = AdamW(groups, betas=betas), []
    for step, (batch, lr) in enumerate(zip(batches, rates, strict=True), 1):
        value = loss(student, teacher, batch)
        value.backward()
        clip_grad_norm_(parameters, 1.0)
        for group in adamw.param_groups:
            group["lr"] = lr
        adamw.step()
        adamw.zero_grad()
        found.append(value.item())
        if rate and step % interval == 0:
            with torch.no_grad():
                for a, b in zip(teacher.parameters(), parameters):
                    a.copy_((1 - rate) * a + rate * b)
    moved = [(b - a).detach().flatten() for a, b in zip(old.parameters(), parameters)]
    return found, torch.cat(moved)


def assert_same_training(w, files, expected, metric="loss"):
    values, moved = expected
    assert [x[metric] for x in w.log("train")] == pytest.approx(values, rel=1e-3, abs=1e-5)
    assert [x["lr"] for x in w.log("train")] == pytest.approx(w.rates)
    assert (w.moved() - moved).norm() < 1e-3 * moved.norm()


def assert_other_training(a, b):
    """That a flag makes a difference which `assert_same_training` would see."""
    assert (a[1] - b[1]).norm() > 4e-3 * b[1].norm() or abs(a[0][0] / b[0][0] - 1) > 4e-3


# --------------------------------------------------------------------------------------- stage 2


def stage_2_loss(
    phrases=SHORT,
    objective=losses.full_logits,
    temperature=0.9,
    skip_first=0,
    drop_truncated=False,
    cap=None,
    limit=math.inf,
):
    """The mean of D(pi, pi_bar) over all response tokens of a step."""

    def loss(student, teacher, batch):
        values = []
        for i, x in batch:
            text, finished = attempt(i, 0)
            y, r = response(text, finished, i, 0), verdict(text, i)
            ids, n = y.ids[skip_first:], len(y.ids) - skip_first
            if n <= 0 or not finished and drop_truncated:
                continue
            p = logits(student, x + y.ids, n, temperature)
            with torch.no_grad():
                told = x + ids_of(text) + ids_of(f"\n\n{phrases[r]}\n\n")
                if len(told + y.ids) > limit:
                    continue
                q = logits(teacher, told + y.ids, n, temperature)
            value = objective(p, q, torch.tensor(ids))
            if cap:
                ratio = (logprobs(p, ids) - torch.tensor(y.logprobs[skip_first:])).exp()
                value = value * ratio.detach().clamp(max=cap)
            values.append(value)
        return torch.cat(values).mean()

    return loss


def named(objective, **settings):
    if objective is losses.sampled_token:
        return objective
    return lambda p, q, ids: objective(p, q, **settings)


FULL_LOGITS = named(losses.full_logits)


def slow_stage_2(
    w, files, sizes=(4, 4, 4), epochs=1, passes=1, rates=None, rate=0.0, interval=1, **settings
):
    batches = [b for b in batches_of(w, list(sizes), epochs) for _ in range(passes)]
    rates = rates or [HALF] + [FULL] * (len(batches) - 1)
    loss = stage_2_loss(**{"objective": FULL_LOGITS, **settings})
    return slow_training(files, batches, loss, rates, (0.9, 0.999), 0.01, rate, interval)


def plain_stage_2(w, files, known={}, **shape):  # noqa: B006
    """`slow_stage_2` without any flag."""
    key = str([[s.texts for s in w.asked()], shape])
    if key not in known:
        known[key] = slow_stage_2(w, files, **shape)
    return known[key]


def batches_of(w, sizes, epochs=1, problems=range(12)):
    """[(problem, prompt_ids)] of each batch; every problem comes once per epoch."""
    batches = [[(problem_of(t), ids_of(t)) for t in s.texts] for s in w.asked()]
    assert [len(b) for b in batches] == sizes
    order = [i for batch in batches for i, _ in batch]
    orders = [order[k : k + len(problems)] for k in range(0, len(order), len(problems))]
    assert len(orders) == epochs and all(sorted(o) == list(problems) for o in orders)
    assert len({tuple(o) for o in orders}) == epochs and sorted(order) != order
    return batches


def objective(name, **settings):
    return dict(objective=named(getattr(losses, name), **settings))


HALF, FULL = 1.5e-3, 3e-3  # learning rates of the first step, in the warm-up, and of the others
TOPK, MIXED = "--objective topk_logits", "--objective mixed_kl"
STAGE_2 = {
    "": {},
    "--lr 1e-3": dict(rates=[5e-4, 1e-3, 1e-3]),
    "--warmup 0": dict(rates=[FULL] * 3),
    "--warmup 0.9": dict(rates=[1e-3, 2e-3, 3e-3]),
    "--lr-schedule cosine --warmup 0": dict(rates=[FULL, 0.75 * FULL, 0.25 * FULL]),
    "--batch-size 5": dict(sizes=[5, 5, 2]),
    "--epochs 2": dict(sizes=[4] * 6, epochs=2),
    "--passes 2": dict(passes=2),
    "--passes 2 --lr-schedule cosine --warmup 0": dict(
        passes=2, rates=[FULL * (0.5 + 0.5 * math.cos(math.pi * k / 6)) for k in range(6)]
    ),
    "--passes 2 --importance-cap 1.2": dict(passes=2, cap=1.2),
    "--importance-cap 1.2": dict(cap=1.2),
    "--importance-cap 100": dict(cap=100),
    "--temperature 0.5": dict(temperature=0.5),
    "--temperature 0": dict(temperature=1),
    "--alpha 0": objective("full_logits", alpha=0),
    "--alpha 0.3": objective("full_logits", alpha=0.3),
    f"{TOPK} --no-tail": objective("topk_logits", k=64, tail=False),
    f"{TOPK} --topk 3": objective("topk_logits", k=3),
    f"{TOPK} --topk 3 --no-tail": objective("topk_logits", k=3, tail=False),
    f"{TOPK} --topk 3 --alpha 0.3": objective("topk_logits", k=3, alpha=0.3),
    "--objective sampled_token": objective("sampled_token"),
    MIXED: objective("mixed_kl", w=0.5),
    f"{MIXED} --alpha 0.2": objective("mixed_kl", w=0.2),
    f"{MIXED} --alpha 0.2 --topk 3": objective("mixed_kl", w=0.2, k=3),
    "--objective sampled_token --importance-cap 1.2": objective("sampled_token") | dict(cap=1.2),
    "--skip-first 5": dict(skip_first=5),
    "--skip-first 2 --importance-cap 1.2": dict(skip_first=2, cap=1.2),
    "--drop-truncated": dict(drop_truncated=True),
    "--model short": dict(limit=24),  # what the teacher reads just fits: 18 to 24 ids, and 27
    "--teacher live": dict(rate=None),
    "--teacher ema": dict(rate=0.05),
    "--teacher ema --teacher-rate 0.6": dict(rate=0.6),
    "--teacher ema --teacher-rate 0.6 --teacher-interval 2": dict(rate=0.6, interval=2),
    "--teacher ema --teacher-rate 0.6 --teacher-interval 3 --passes 2": dict(
        rate=0.6, interval=3, passes=2
    ),
}


@pytest.mark.parametrize("flags", STAGE_2)
def test_stage_2_equals_the_slow_loop(flags, watch, files):
    """Losses of all steps and the final weights, for each flag of stage 2. Catches the phrase of
    the other verdict, another problem's reward, weights of the wrong log-probabilities, a teacher
    that does not move, and whatever else changes what a step learns."""
    changed = STAGE_2[flags]
    flags = [files / flag if flag == "short" else flag for flag in flags.split()]
    run(watch, files, "sdzero", *flags)
    expected = slow_stage_2(watch, files, **changed)
    rates = changed.get("rates", [HALF] + [FULL] * (len(expected[0]) - 1))
    assert watch.rates == pytest.approx(rates)
    assert_same_training(watch, files, expected)
    assert all(p.training == p.grad for u in watch.steps for p in u.passes)
    dropped = [x["dropped"] for x in watch.log("train")]
    assert "limit" not in changed or sum(dropped) == 1
    shape = {k: v for k, v in changed.items() if k in ("sizes", "epochs", "passes")}
    if len(shape) < len(changed):
        assert_other_training(expected, plain_stage_2(watch, files, **shape))


def test_what_stage_2_logs(watch, files):
    """The first step's figures by hand, before anything moved. Catches shares of another batch, a
    KL that is not the whole vocabulary's, right for wrong, positions that count the prompt."""
    flags = ["--objective", "topk_logits", "--topk", "3", "--drop-truncated"]
    run(watch, files, "sdzero", *flags)
    first, batch = watch.log("train")[0], batches_of(watch, [4, 4, 4])[0]
    model = start(files / "base")
    kls, ratios, attempts = {0: [], 1: []}, [], [(i, x, *attempt(i, 0)) for i, x in batch]
    for i, x, text, _ in [a for a in attempts if a[3]]:
        r, ids = verdict(text, i), [*ids_of(text), EOS]
        told = x + ids_of(f"{text}\n\n{SHORT[r]}\n\n")
        with torch.no_grad():
            p, q = (logits(model, read + ids, len(ids), 0.9) for read in (x, told))
        kls[r] += losses.full_logits(p, q).tolist()
        ratios += (logprobs(p, ids) - logprobs(q, ids)).tolist()
    mean = lambda x: pytest.approx(sum(x) / len(x), rel=1e-4)  # noqa: E731
    assert first["kl"] == mean(kls[0] + kls[1]) == first["kl_from_position"]["0"]
    assert (first["kl_wrong"], first["kl_right"]) == (mean(kls[0]), mean(kls[1]))
    assert first["log_ratio"] == mean(ratios) and first["loss_tokens"] == len(ratios)
    assert first["kl_from_position"]["16"] is None
    assert first["reward"] == mean([verdict(text, i) for i, _, text, _ in attempts])
    assert first["length"] == mean([len(text) + finished for *_, text, finished in attempts])
    cut = [not finished for *_, finished in attempts]
    assert first["cut_off"] == mean(cut) and first["dropped"] == sum(cut) > 0


# --------------------------------------------------------------------------------------- stage 1


def expected_traces(m, n=1, phrases=SHORT):
    """{(problem, y_init, y_rev): (r, P_r, whether y_rev ended)} by the rule alone."""
    found = {}
    for i in range(12):
        for text, _ in (attempt(i, k) for k in range(n)):
            r = verdict(text, i)
            for k in range(m):
                new, finished = revision(i, text, True, k)
                if verdict(new, i):
                    found[i, text, new, finished] = (r, phrases[r])
    return found


def slow_stage_1(
    w, files, weights=(1, 2), sizes=None, rates=None, m=2, n=1, phrases=SHORT, epochs=1
):
    """weights: of y_init and P_r, and of y_rev; a list: those of each step."""
    traces, x = {}, {problem_of(t): t for s in w.asked() for t in s.texts}
    for (i, text, new, finished), (_, phrase) in expected_traces(m, n, phrases).items():
        parts = ids_of(x[i]), ids_of(f"{text}\n\n{phrase}\n\n"), ids_of(new) + [EOS] * finished
        traces[tuple(ids_of(x[i] + f"{text}\n\n{phrase}\n\n{new}"))] = parts
    steps = [[traces[tuple(row)] for p in u.passes for row in p.rows] for u in w.steps]
    assert sizes is None or [len(batch) for batch in steps] == sizes
    if len(traces) * epochs == sum(map(len, steps)):  # all of them, in each epoch in another order
        order = [str(trace) for batch in steps for trace in batch]
        orders = [tuple(order[k : k + len(traces)]) for k in range(0, len(order), len(traces))]
        assert all(len(set(o)) == len(traces) for o in orders) and len(set(orders)) == epochs
    by_step = weights if isinstance(weights, list) else [weights] * len(steps)
    weights_of = iter(by_step)

    def loss(student, teacher, batch):
        total, divisor, (a, b) = 0, 0, next(weights_of)
        for x, shown, new in batch:
            values = -logprobs(logits(student, x + shown + new, len(shown + new)), shown + new)
            total += a * values[: len(shown)].sum() + b * values[len(shown) :].sum()
            divisor += a * len(shown) + b * len(new)
        return total / divisor

    rates = rates or w.rates
    return slow_training(files, steps, loss, rates, (0.9, 0.95), 1e-4), steps


CUT = [4, 4, 4, 4, 2]  # the 18 traces in steps of --batch-size 4
COSINE = [HALF, FULL, FULL, 0.75 * FULL, 0.25 * FULL]  # after two steps of warm-up
GENERATION, REVISION = (1, 1), (0, 1)
STAGE_1 = {
    "": dict(sizes=CUT, rates=COSINE),
    "--lr 1e-3 --lr-schedule constant": dict(rates=[5e-4, 1e-3, 1e-3, 1e-3, 1e-3]),
    "--warmup 0.6": dict(rates=[1e-3, 2e-3, 3e-3, FULL, 0.5 * FULL]),
    "--batch-size 6": dict(sizes=[6, 6, 6], rates=[HALF, FULL, FULL]),
    "--epochs 2": dict(sizes=CUT * 2, epochs=2),
    "--revisions 3": dict(sizes=[4] * 5 + [1], m=3),
    "--attempts 2": dict(sizes=[4] * 9, n=2),
    "--terms generation": dict(weights=GENERATION),
    "--terms revision": dict(weights=REVISION),
    "--terms sequential": dict(sizes=[4, 2, *CUT], weights=[GENERATION] * 2 + [REVISION] * 5),
    "--terms sequential --epochs 2": dict(
        sizes=[4, 2] * 2 + CUT * 2, weights=[GENERATION] * 4 + [REVISION] * 10, epochs=2
    ),
}


@pytest.mark.parametrize("flags", STAGE_1)
def test_stage_1_equals_the_slow_loop(flags, watch, files):
    """As for stage 2. Catches weights that are exchanged, a trace of another attempt, a phrase of
    the other verdict, traces that are left out or come twice, a schedule that is ignored."""
    changed = STAGE_1[flags]
    run(watch, files, "srt", *flags.split())
    expected, steps = slow_stage_1(watch, files, **changed)
    assert watch.rates == pytest.approx(changed.get("rates", watch.rates))
    assert_same_training(watch, files, expected)
    if "weights" in changed:
        same = {**changed, "weights": (1, 2)}
        assert_other_training(expected, slow_stage_1(watch, files, **same)[0])


def test_traces_and_what_stage_1_logs(watch, files):
    """Catches verdicts against another problem's answer, revisions that were sampled after one
    phrase and stored with the other, counts of right for wrong."""
    run(watch, files, "srt", "--attempts", "2", "--revisions", "3")
    traces, expected = lines_of(watch.out / "traces.jsonl"), expected_traces(3, 2)
    assert len(traces) == len(expected) == 42  # every third revision is like its first
    for t in traces:
        i, new = problem_of(t["problem"]), t["revision_text"]
        r, phrase = expected[i, t["init_text"], new, t["finished"]]
        assert (t["answer"], t["reward"], t["phrase"]) == (f"<{i}>", r, phrase)
        assert t["prompt_ids"] == ids_of(f"<|user|>{i}?<|im_end|><|assistant|>")
        assert t["init_ids"] == ids_of(t["init_text"])
        assert t["phrase_ids"] == ids_of(f"\n\n{phrase}\n\n")
        assert t["revision_ids"] == ids_of(new) + [EOS] * t["finished"]
    (asked,), (revised,) = watch.asked(), watch.asked(revisions=True)
    assert Counter(map(problem_of, asked.texts)) == dict.fromkeys(range(12), 2)
    assert set(Counter(revised.texts).values()) == {3} and len(revised.texts) == 3 * 2 * 12
    tried = [attempt(i, n) for i in range(12) for n in range(2)]
    right = sum(verdict(attempt(i, n)[0], i) for i in range(12) for n in range(2))
    kept = Counter(r for r, _ in expected.values())
    (counts,) = watch.log("collect")
    assert {k: v for k, v in counts.items() if k not in ("kind", "step", "sample")} == {
        "problems": 12,
        "attempts": 24,
        "right": right,
        "cut_off": sum(not finished for _, finished in tried),
        "too_long": 0,
        "revisions_of_wrong": 3 * (24 - right),
        "kept_of_wrong": kept[0],
        "revisions_of_right": 3 * right,
        "kept_of_right": kept[1],
    }
    assert right != 12 and kept[0] != kept[1]
    (values, _), steps = slow_stage_1(watch, files, weights=GENERATION, n=2, m=3)
    first, new = watch.log("train")[0], [new for _, _, new in steps[0]]
    phrases = [TOKENIZER.decode(shown).split("\n\n")[1] for _, shown, _ in steps[0]]
    assert first["nll"] == pytest.approx(
        values[0], rel=1e-4
    )  # nothing has moved: of all its tokens
    assert first["reward"] == phrases.count(SHORT[1]) / 4
    assert first["length"] == sum(map(len, new)) / 4
    assert first["cut_off"] == sum(y[-1] != EOS for y in new) / 4
    assert first["tokens"] == sum(len(x) + len(shown) + len(new) for x, shown, new in steps[0])


def test_stage_1_in_parts(watch, files, monkeypatch):
    """Each part has its own problems and its own random numbers; nothing else changes."""
    monkeypatch.setattr(srt, "PROBLEMS_AT_ONCE", 5)
    run(watch, files, "srt")
    parts = [set(map(problem_of, s.texts)) for s in watch.asked()]
    assert [len(part) for part in parts] == [5, 5, 2] and set.union(*parts) == set(range(12))
    assert [problems_of([s]) for s in watch.asked(revisions=True)] == parts
    seeds = {s.seed for s in watch.samples if not s.held_out}
    assert len(seeds) == 6 and len(watch.log("collect")) == 3
    assert_same_training(watch, files, slow_stage_1(watch, files, sizes=CUT)[0])


def test_collecting_and_training_on_some_of_it(watch, files, tmp_path):
    """--collect-only trains nothing; --traces trains on what the file holds and samples nothing."""
    run(watch, files, "srt", "--collect-only")
    traces = (watch.out / "traces.jsonl").read_text().splitlines(keepends=True)
    assert len(traces) == 18 and not watch.steps and not (watch.out / "config.json").exists()
    (tmp_path / "few.jsonl").write_text("".join(traces[3:8]))
    watch.out = tmp_path / "trained"
    earlier = len(watch.asked()), len(watch.asked(revisions=True))
    run(watch, files, "srt", "--traces", tmp_path / "few.jsonl")
    assert (len(watch.asked()), len(watch.asked(revisions=True))) == earlier
    texts = [watch_rows for u in watch.steps for p in u.passes for watch_rows in p.rows]
    few = [json.loads(t) for t in traces[3:8]]
    keys = "prompt_ids", "init_ids", "phrase_ids", "revision_ids"
    wanted = [[token for k in keys for token in t[k]] for t in few]
    assert sorted(texts) == sorted(row[:-1] if row[-1] == EOS else row for row in wanted)


# -------------------------------------------------------------------------------------- evaluation

EVALUATION = {  # of HELD_OUT and REVISED, counted by hand
    "problems": 5,
    "samples": 3,
    "accuracy": 7 / 15,
    "pass_at_k": 4 / 5,
    "revised_accuracy": 8 / 15,
    "correction_rate": 1 / 8,
    "wrong_to_right": 3 / 8,
    "right_to_wrong": 2 / 7,
    "revision_too_long": 0,
}


def evaluation():
    """EVALUATION, and what the rule says of lengths and ends."""
    tried = [attempt(i, n) for i in HELD_OUT for n in range(3)]
    revised = [revision(i, attempt(i, n)[0], True, 0) for i in HELD_OUT for n in range(3)]
    shares = torch.tensor([2 / 3, 0, 1 / 3, 1, 1 / 3], dtype=torch.float64)
    figures = {"accuracy_se": (shares.std() / 5**0.5).item()}
    for prefix, responses in (("", tried), ("revised_", revised)):
        figures[prefix + "finished"] = sum(end for _, end in responses) / 15
        figures[prefix + "length"] = sum(len(text) + end for text, end in responses) / 15
    return {**EVALUATION, **figures}


def assert_evaluations(w, steps):
    found = w.log("eval")
    assert [x["step"] for x in found] == steps
    for x in found:
        figures = {k: v for k, v in x.items() if k not in ("kind", "step", "sample")}
        assert figures == pytest.approx(evaluation())


@pytest.mark.parametrize("name", ["srt", "sdzero", "grpo"])
def test_evaluation_figures(name, watch, files, capsys):
    """Figures that all differ. Catches revisions after the other phrase, answers of other problems,
    samples of one problem counted for another, shares of wrong attempts taken for right ones."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(watch, files, name, "--eval-only")
    assert end.value.code == 0
    assert json.loads(capsys.readouterr().out) == pytest.approx(evaluation())
    assert not watch.out.exists() and not watch.steps
    run(watch, files, name)
    assert_evaluations(watch, [0, STEPS[name]])


@pytest.mark.parametrize("name", ["srt", "sdzero", "grpo", "sdpo"])
def test_samples_in_the_log_belong_together(name, watch, files):
    """Problem, gold answer, response, verdict and revision, by the rule. Catches a sample that
    shows one problem with the response, the verdict or the revision of another."""
    run(watch, files, name)
    shown = [x for x in lines_of(watch.out / "metrics.jsonl") if "sample" in x]
    assert {x["kind"] for x in shown} == {"eval", "collect" if name == "srt" else "train"}
    word = ("wrong", "right")
    for x in shown:
        i = problem_of(x["sample"])
        text, _ = attempt(i, 0)
        expected = (
            f"  problem: '{i}?'\n  response [{word[verdict(text, i)]}; gold '<{i}>']: {text!r}"
        )
        if x["kind"] == "eval":
            new, _ = revision(i, text, True, 0)
            expected += f"\n  revised [{word[verdict(new, i)]}]: {new!r}"
        assert x["sample"] == expected


# -------------------------------------------------------------------------- flags, in every script

ALL = pytest.mark.parametrize("name", SCRIPTS)
FOUR = pytest.mark.parametrize("name", ["srt", "sdzero", "rft", "grpo"])


@ALL
def test_sampling_flags(name, watch, files):
    flags = "--temperature 0.5 --top-p 0.7 --eval-temperature 0.4 --max-new-tokens 11 --slots 3"
    run(watch, files, name, *flags.split())
    for s in watch.samples:
        assert (s.temperature, s.top_p) == ((0.4, 1.0) if s.held_out else (0.5, 0.7))
        assert (s.max_new_tokens, s.slots) == (11, 3)
        assert (s.eos_token_ids, s.vocab_size) == ({EOS}, VOCAB)
    assert bool(watch.asked()) == (name != "sft")
    assert watch.asked(True, True) and watch.asked(True, False)
    assert bool(watch.asked(revisions=True)) == (name == "srt")


@pytest.mark.parametrize("device, flag", [("cuda", "on"), ("cuda", "off"), ("cpu", "on")])
def test_cuda_graphs(device, flag, monkeypatch):
    """With a model that only says where it is."""
    config, found = SimpleNamespace(_attn_implementation="sdpa"), []
    model = SimpleNamespace(device=torch.device(device), config=config, _supports_sdpa=False)
    model.set_attn_implementation = lambda name: None
    args = SimpleNamespace(slots=1, seed=0, max_new_tokens=1, cuda_graphs=flag)

    def generate(*rest, cuda_graph, compile_layers, **settings):
        found.append((cuda_graph, compile_layers))
        return [1]

    monkeypatch.setattr(common, "generate", generate)
    common.sample_all(common.LM(model, None, {EOS}, VOCAB, 9), args, [[1]], ("attempts",))
    assert found == [((device, flag) == ("cuda", "on"),) * 2]


@ALL
def test_how_often_it_evaluates_and_saves(name, watch, files):
    flags = "--eval-samples 2 --eval-problems 3 --eval-every 2 --save-every 1"
    run(watch, files, name, *flags.split())
    steps, last = [x["step"] for x in watch.log("eval")], STEPS[name]
    assert steps == sorted({0, *range(2, last, 2), last})
    assert watch.checkpoints == {f"checkpoint-{step}" for step in range(1, last)}
    evaluated = [Counter(map(problem_of, s.texts)) for s in watch.samples if s.held_out]
    assert len(evaluated) == 2 * len(steps) and all(e == evaluated[0] for e in evaluated)
    assert sorted(evaluated[0].values()) == [2, 2, 2]
    watch.again("rarely")
    run(watch, files, name, "--eval-every", "100", "--save-every", "2")
    assert [x["step"] for x in watch.log("eval")] == [0, last]
    assert watch.checkpoints == {f"checkpoint-{step}" for step in range(2, last, 2)}


def test_no_evaluation(watch, files):
    run(watch, files, "sdzero", "--eval-problems", "0")
    assert not watch.log("eval") and len(watch.samples) == 3


@ALL
def test_the_seed(name, watch, files):
    """Every call of the sampler and every step's dropout has a seed of its own; another --seed has
    others, and another order."""
    seeds, orders = [], []
    for seed in (0, 1):
        watch.again(str(seed))
        run(watch, files, name, "--seed", seed)
        seeds += [s.seed for s in watch.samples] + [u.passes[0].seed for u in watch.steps]
        orders.append([row for u in watch.steps for p in u.passes for row in p.rows])
        orders[-1] += [[problem_of(t) for t in s.texts] for s in watch.asked()]
    assert len(set(seeds)) == len(seeds) and orders[0] != orders[1]


@FOUR
def test_the_number_of_problems(name, watch, files):
    """Which ones they are depends on the seed."""
    chosen = []
    for seed in (0, 1):
        watch.again(str(seed))
        run(watch, files, name, "--problems", "8", "--seed", seed)
        chosen.append(problems_of(watch.asked()))
        assert len(chosen[-1]) == 8
    assert chosen[0] != chosen[1]


PROMPTS = {
    "<|user|>{i}? Think.<|im_end|><|assistant|>": ["--prompt-suffix", " Think."],
    "<|user|>{i}?<|im_end|><|assistant|>#": ["--template-kwargs", '{"mark": "#"}'],
    "Q: {i}?\nA:": ["--prompt-template", "Q: {problem}\nA:"],
    "Q: {i}?!\nA:": ["--prompt-template", "Q: {problem}\nA:", "--prompt-suffix", "!"],
}


@FOUR
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompt_flags(name, prompt, watch, files):
    """Sampled, evaluated and trained with the same prompt, and handed down in srt.json."""
    run(watch, files, name, *PROMPTS[prompt])
    trained = [TOKENIZER.decode(row) for u in watch.steps for p in u.passes for row in p.rows]
    for text in [*trained, *(t for s in watch.samples for t in s.texts)]:
        assert text.startswith(prompt.replace("{i}", str(problem_of(text))))
    assert trained and watch.asked(True)
    kept = json.loads((watch.out / "srt.json").read_text())["prompt"]
    flag, value = PROMPTS[prompt][:2]
    assert kept[flag[2:].replace("-", "_")] == (json.loads(value) if "kwargs" in flag else value)


@pytest.mark.parametrize(
    "flags, said", [("", True), ("--top-p 1", False), ("--top-p 1 --temperature 0", True)]
)
def test_what_stage_2_does_not_mean(flags, said, watch, files, capsys):
    """A model without stage 1, and samples that are not the model's own distribution."""
    run(watch, files, "sdzero", *flags.split())
    err = capsys.readouterr().err
    assert ("expectation over the model's own distribution" in err) == said
    assert "does not come from stage 1" in err


def test_stage_2_inherits_the_prompt_and_the_phrases(watch, files, capsys):
    """And leaves out the problems that stage 1 has used."""
    own = ["--phrase-wrong", "Nope.", "--phrase-right", "Yep."]
    watch.phrases = "Nope.", "Yep."
    run(watch, files, "srt", "--prompt-suffix", " Think.", "--problems", "5", *own)
    first, used = watch.out, problems_of(watch.asked())
    watch.again("second")
    watch.phrases = "Nope.", "Yep."
    flags = ["--dataset", files / "data.jsonl", "--eval-dataset", files / "heldout.jsonl"]
    call(sdzero, "--model", first, *flags, *BASE[:-6], "--output", watch.out)
    assert "does not come from stage 1" not in capsys.readouterr().err
    asked = [problem_of(t) for s in watch.asked() for t in s.texts]
    assert len(used) == 5 and sorted(asked) == sorted(set(range(12)) - used)
    for text in [t for s in watch.samples for t in s.texts]:
        assert text.startswith(f"<|user|>{problem_of(text)}? Think.<|im_end|><|assistant|>")
    read = [
        TOKENIZER.decode(r) for u in watch.steps for p in u.passes if not p.grad for r in p.rows
    ]
    assert read
    for text in read:
        i, shown, phrase = re.search(r"(\d+)\? Think.*assistant\|>(.*)\n\n(.*)\n\n", text).groups()
        assert phrase == watch.phrases[verdict(shown, int(i))]
    assert_evaluations(watch, [0, 2])


@pytest.mark.parametrize("name", ["srt", "sdzero"])
def test_phrase_flags(name, watch, files):
    """Sampling, evaluation and training have the phrases that were given."""
    watch.phrases = phrases = ("Oh no.", "Oh yes.")
    run(watch, files, name, "--phrase-wrong", phrases[0], "--phrase-right", phrases[1])
    if name == "srt":
        expected, _ = slow_stage_1(watch, files, sizes=CUT, phrases=phrases)
    else:
        expected = slow_stage_2(watch, files, phrases=phrases)
    assert_same_training(watch, files, expected)
    assert_evaluations(watch, [0, STEPS[name]])


@FOUR
def test_columns(name, watch, files):
    """The columns problem and answer hold decoys."""
    flags = "--problem-column text --answer-column gold --eval-every 1".split()
    run(watch, files, name, *flags, data="columns.jsonl", held_out="columns_heldout.jsonl")
    assert problems_of(watch.asked()) == set(range(12))
    assert_evaluations(watch, list(range(STEPS[name] + 1)))
    rewards = {x["reward"] for x in watch.log("train")}
    assert len(rewards) > 1 or name == "rft"


@ALL
def test_another_verifier(name, watch, files):
    """One that accepts everything, so the phrase of a wrong attempt is not that of the rule."""
    no_signal = pytest.raises(SystemExit) if name == "grpo" else contextlib.nullcontext()
    with no_signal:  # to GRPO a group that is all right says nothing
        run(watch, files, name, "--verifier", "test_wiring:always")
    for x in watch.log("eval"):
        assert x["accuracy"] == x["pass_at_k"] == x["revised_accuracy"] == 1
    assert all(x["reward"] == 1 for x in watch.log("train"))


@FOUR
def test_splits_and_configurations(name, watch, files):
    """A data set in a folder with several splits, as on the hub; held out is its split test."""
    cases = {
        ("splits", "splits"): ("train", "test"),
        ("splits@more", "splits@validation"): ("more", "validation"),
        ("splits:other", "splits"): ("elsewhere", "test"),
        ("splits:other@more", "splits"): ("more", "test"),
    }
    for k, ((data, held_out), splits) in enumerate(cases.items()):
        watch.again(str(k))
        run(watch, files, name, "--batch-size", "4", data=data, held_out=held_out)
        assert problems_of(watch.asked()) == set(SPLITS[splits[0]])
        assert problems_of(watch.asked(held_out=True)) == set(SPLITS[splits[1]])


@ALL
def test_passes_of_the_model(name, watch, files):
    """--micro-tokens limits one pass; the student is in train mode and the teacher is not."""
    runs = {}
    for tokens in (30, 1000):
        watch.again(str(tokens))
        run(watch, files, name, "--micro-tokens", tokens)
        passes = [p for u in watch.steps for p in u.passes]
        runs[tokens] = passes, watch.log("train"), watch.moved()
        for p in passes:
            assert p.training == p.grad and p.dtype == torch.float32
            assert p.size <= tokens or len(p.rows) == 1
    (many, log, moved), (few, same_log, same) = runs.values()
    assert len(many) > len(few)
    assert [x["loss"] for x in log] == pytest.approx(
        [x["loss"] for x in same_log], rel=1e-3, abs=1e-5
    )
    assert (moved - same).norm() < 1e-3 * moved.norm()


@ALL
def test_gradient_checkpointing(name, watch, files):
    """Every layer is computed a second time in the backward pass."""
    layers = []
    for flags in ([], ["--gradient-checkpointing"]):
        watch.again(f"{len(flags)}")
        run(watch, files, name, *flags)
        layers.append(watch.layers)
    assert layers[1] - layers[0] == 2 * sum(p.grad for u in watch.steps for p in u.passes) > 0


@ALL
def test_dtype(name, watch, files):
    run(watch, files, name, "--dtype", "bfloat16")
    assert {p.dtype for u in watch.updates for p in u.passes} == {torch.bfloat16}
    saved = AutoModelForCausalLM.from_pretrained(watch.out, dtype="auto")
    assert {p.dtype for p in saved.parameters()} == {torch.bfloat16}


@ALL
def test_optimizer_settings(name, watch, files):
    """The paper's (stage 1) and the authors' (stage 2) constants; matrices alone decay."""
    decay, betas = (1e-4, (0.9, 0.95)) if name == "srt" else (0.01, (0.9, 0.999))
    run(watch, files, name)
    assert watch.clips == {1.0} and {g["betas"] for g in watch.groups} == {betas}
    found = {(p.dim() > 1, g["weight_decay"]) for g in watch.groups for p in g["params"]}
    assert found == {(True, decay), (False, 0.0)}


def test_the_length_limit(watch, files):
    """The context holds a revision with all that is before it and --max-new-tokens: what does not
    fit is left out of the traces and of the revised figures, and counted."""

    def short(limit):
        sizes = dict(num_hidden_layers=2, max_position_embeddings=limit)
        return save_model(files / f"short{limit}", family="llama", **sizes)

    def fits(i, n, limit):
        text, _ = attempt(i, n)
        phrase = ids_of(f"\n\n{SHORT[verdict(text, i)]}\n\n")
        return len(ids_of(f"<|user|>{i}?<|im_end|><|assistant|>{text}")) + len(phrase) + 12 <= limit

    run(watch, files, "srt", "--model", short(29))
    left = [i for i in range(12) if fits(i, 0, 29)]
    assert problems_of(watch.asked(revisions=True)) == set(left)
    (counts,) = watch.log("collect")
    assert 0 < counts["too_long"] == 2 * (12 - len(left)) < 24
    watch.again("evaluation")
    run(watch, files, "srt", "--model", short(32))
    pairs = [(i, n) for i in HELD_OUT for n in range(3)]
    first, revised = [], []
    for i, n in [pair for pair in pairs if fits(*pair, 32)]:
        first.append(HELD_OUT[i][n] == "R")
        revised.append(REVISED[i][n] == "R")
    rise = sum(revised) - sum(first)
    assert 0 < len(first) < 15
    for x in watch.log("eval"):
        assert x["accuracy"] == 7 / 15 and x["revision_too_long"] == 15 - len(first)
        assert x["revised_accuracy"] == sum(revised) / len(first)
        assert x["correction_rate"] == pytest.approx(rise / (len(first) - sum(first)))
        assert ("revised" in x["sample"]) == fits(*pairs[0], 32)


@pytest.mark.parametrize("name", ["srt", "sdzero"])
def test_the_defaults_are_the_papers(name, watch, files):
    """What acts when a user gives no flag but a verifier."""
    watch.phrases, watch.held_out = PHRASES, None
    flags = ["--dataset", files / "many.jsonl", "--verifier", "test_wiring:says_its_answer"]
    script, stage_1 = SCRIPTS[name][0], name == "srt"
    call(script, "--model", files / "base", *flags, "--device", "cpu", "--output", watch.out)
    steps = len(watch.steps)
    for s in watch.samples:
        assert s.temperature == (0.7 if s.held_out or stage_1 else 1.0) and s.top_p == 1
        assert (s.max_new_tokens, s.slots) == (16384 if stage_1 else 8192, None)
    assert set(Counter(map(problem_of, watch.samples[0].texts)).values()) == {8}
    assert len(watch.held_out) == 128 and not watch.held_out & problems_of(watch.asked())
    assert len(problems_of(watch.asked())) == (86 if stage_1 else 172)
    eval_every, save_every = (2000, 500) if stage_1 else (100, 20)
    assert [x["step"] for x in watch.log("eval")] == sorted({*range(0, steps, eval_every), steps})
    assert watch.checkpoints == {f"checkpoint-{k}" for k in range(save_every, steps, save_every)}
    args = script.parse_arguments(["--model", "m", "--dataset", "d"])
    assert (args.eval_every, args.save_every) == (eval_every, save_every)
    if stage_1:
        tried = [t for s in watch.asked() for t in s.texts]
        assert len(tried) == 86  # one attempt at each problem, and three revisions of it
        assert sum(len(s.texts) for s in watch.asked(revisions=True)) == 3 * 86
        traces = len(lines_of(watch.out / "traces.jsonl"))
        assert [sum(len(p.rows) for p in u.passes) for u in watch.steps[:3]] == [4, 4, 4]
        assert steps == 3 * traces // 4 + bool(3 * traces % 4)  # three epochs
        warmup = math.ceil(0.05 * steps)
        decay = [
            0.5 + 0.5 * math.cos(math.pi * k / (steps - warmup)) for k in range(steps - warmup)
        ]
        factors = [k / warmup for k in range(1, warmup + 1)] + decay
    else:
        assert [len(s.texts) for s in watch.asked()] == [128, 44]
        factors = [1 / 20, 2 / 20]
    assert watch.rates == pytest.approx([5e-6 * f for f in factors])


# -------------------------------------------------------------------------------------- baselines


def slow_baseline(w, files, name, batches, right_only=False, rate=0.05, shown=None):
    """batches: of (prompt_ids, i, n)."""

    def loss(student, teacher, batch):
        total, tokens = 0, 0
        for x, i, n in batch:
            text, finished = attempt(i, n)
            y = ids_of(text) + [EOS] * finished
            if name == "sft":
                y = ids_of(worked(i, n)) + [EOS]
            p = logits(student, x + y, len(y), 1.0 if name in ("sft", "rft") else 0.9)
            if name in ("sft", "rft"):
                values = -logprobs(p, y)
            elif name == "grpo":
                rewards = [verdict(attempt(i, k)[0], i) for k in range(GROUP["grpo"])]
                rewards = torch.tensor(rewards, dtype=torch.float64)
                advantage = (rewards[n] - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
                values = -advantage * logprobs(p, y)
            elif (told := shown(i, n)) is None:
                continue
            else:
                with torch.no_grad():
                    told = x + ids_of(f"{told}\n\n{SHORT[1]}\n\n")
                    q = logits(teacher, told + y, len(y), 0.9)
                values = losses.full_logits(p, q)
            total, tokens = total + values.sum(), tokens + len(y)
        return total / tokens

    rates = [HALF] + [FULL] * (len(batches) - 1)
    assert w.rates == pytest.approx(rates)
    return slow_training(files, batches, loss, rates, (0.9, 0.999), 0.01, rate)


def groups_of(w, steps, size, group):
    """[(prompt_ids, problem, n)] of each step: `group` responses to each problem of a batch."""
    batches = []
    for s in w.asked():
        order = list(dict.fromkeys(s.texts))
        assert Counter(s.texts) == dict.fromkeys(order, group) and len(s.texts) == size
        batches.append([(ids_of(t), problem_of(t), n) for t in order for n in range(group)])
    assert len(batches) == steps
    order = [i for batch in batches for _, i, n in batch if n == 0]
    first = order[:12]
    assert len(set(first)) == len(first) and first != sorted(first)
    second = order[12:]  # the next pass: in another order
    assert not second or second != first[: len(second)]
    return batches


def worked(i, n):
    return f"s{i}"


def gold(i, n):
    return f"<{i}>"


def another_right_one(i, n):
    others = [k for k in range(4) if k != n and verdict(attempt(i, k)[0], i)]
    return attempt(i, others[n % len(others)])[0] if others else None


def one_that_fits(i, n):
    """If all that the teacher reads is within the context of `short`."""
    told, (text, finished) = another_right_one(i, n), attempt(i, n)
    read = f"<|user|>{i}?<|im_end|><|assistant|>{told}\n\n{SHORT[1]}\n\n{text}"
    return told if told and len(ids_of(read)) + finished <= 24 else None


GROUP = {"grpo": 2, "sdft": 1, "sdpo": 4}
BASELINES = {
    "grpo": dict(steps=3, size=8),
    "grpo --generations 16": dict(steps=2, size=8),
    "grpo --generations 32": dict(steps=4, size=8),
    "sdft": dict(steps=3, size=4, shown=gold),
    "sdft --solution-column solution": dict(steps=3, size=4, shown=worked),
    "sdft --solution-column solution --teacher base": dict(steps=3, size=4, shown=worked, rate=0),
    "sdft --teacher live": dict(steps=3, size=4, shown=gold, rate=None),
    "sdpo": dict(steps=3, size=8, shown=another_right_one),
    "sdpo --teacher-rate 0.6": dict(steps=3, size=8, shown=another_right_one, rate=0.6),
    "sdpo --model short --generations 48": dict(steps=6, size=8, shown=one_that_fits),
}


@pytest.mark.parametrize("command", BASELINES)
def test_baselines_equal_the_slow_loop(command, watch, files):
    """Catches advantages of another group, a teacher that is shown the response itself or another
    problem's, a budget that is ignored, a response with which the teacher would read more than the
    context holds; and figures in the log that are not those of the step's responses."""
    (name, *flags), changed = command.split(), dict(BASELINES[command])
    run(watch, files, name, *(files / flag if flag == "short" else flag for flag in flags))
    batches = groups_of(watch, changed.pop("steps"), changed.pop("size"), GROUP[name])
    expected = slow_baseline(watch, files, name, batches, **changed)
    assert_same_training(watch, files, expected)
    for line, batch in zip(watch.log("train"), batches, strict=True):
        rewards, lengths, cut, dropped = [], [], [], 0
        for _, i, n in batch:
            text, finished = attempt(i, n)
            rewards.append(verdict(text, i))
            lengths.append(len(text) + finished)
            cut.append(not finished)
            dropped += name != "grpo" and changed["shown"](i, n) is None
        for figure, values in (("reward", rewards), ("length", lengths), ("cut_off", cut)):
            assert line[figure] == pytest.approx(sum(values) / len(batch))
        assert line.get("dropped", 0) == dropped
    usual = {k: v for k, v in changed.items() if k != "rate"}
    if "short" in flags:
        usual["shown"] = another_right_one
    if usual != changed:
        assert_other_training(expected, slow_baseline(watch, files, name, batches, **usual))


@pytest.mark.parametrize("column", ["solution", "revised"])
def test_fine_tuning_on_solutions_equals_the_slow_loop(column, watch, files):
    """Each solution with its EOS once per epoch, after its own problem; nothing is sampled. Of one
    that holds an attempt and P_0 only the revision is trained on."""
    run(watch, files, "sft", "--solution-column", column)
    assert not watch.asked()
    before, batches = f"b\n\n{SHORT[0]}\n\n" if column == "revised" else "", []
    for step in watch.steps:
        batch = []
        for row in (row for p in step.passes for row in p.rows):
            i = problem_of(TOKENIZER.decode(row))
            y = ids_of(worked(i, 0))
            assert list(row[-len(y) :]) == y  # what was read: EOS is padding, too
            x = ids_of(f"<|user|>{i}?<|im_end|><|assistant|>{before}")
            assert list(row[: -len(y)]) == x
            batch.append((x, i, 0))
        batches.append(batch)
    assert Counter(i for batch in batches for _, i, _ in batch) == dict.fromkeys(range(12), 2)
    assert_same_training(watch, files, slow_baseline(watch, files, "sft", batches, rate=0))


@pytest.mark.parametrize(
    "flags, group, epochs", [("", 4, 1), ("--epochs 2", 4, 2), ("--group 2", 2, 1)]
)
def test_rejection_fine_tuning_equals_the_slow_loop(flags, group, epochs, watch, files):
    """Trains on all distinct right responses and nothing else, each once per epoch. Catches traces
    with another answer or end than theirs, and counts of what is kept for what is right."""
    run(watch, files, "rft", *flags.split())
    (sample,), known = watch.asked(), {}
    assert Counter(map(problem_of, sample.texts)) == dict.fromkeys(range(12), group)
    for i in range(12):
        x = next(t for t in sample.texts if problem_of(t) == i)
        for n in range(group):
            if verdict(attempt(i, n)[0], i):
                known.setdefault(tuple(ids_of(x + attempt(i, n)[0])), (ids_of(x), i, n))
    assert len(known) < sum(verdict(attempt(i, n)[0], i) for i in range(12) for n in range(4))
    rows = [[tuple(row) for p in u.passes for row in p.rows] for u in watch.steps]
    assert Counter(sum(rows, [])) == dict.fromkeys(known, epochs)
    batches = [[known[row] for row in batch] for batch in rows]
    assert_same_training(watch, files, slow_baseline(watch, files, "rft", batches, rate=0))
    traces = lines_of(watch.out / "traces.jsonl")
    names = ("problem", "answer", "revision_text", "finished")
    expected = {(f"{i}?", f"<{i}>", *attempt(i, n)) for _, i, n in known.values()}
    assert {tuple(t[name] for name in names) for t in traces} == expected
    (counts,) = watch.log("collect")
    right = sum(verdict(attempt(i, n)[0], i) for i in range(12) for n in range(group))
    assert (counts["right"], counts["kept"], len(traces)) == (right, len(known), len(known))


# ------------------------------------------------------------------- resume, code, the whole toy

RESUMED = {
    "srt": "--dtype bfloat16 --batch-size 4 --problems 16 --epochs 2",
    "sdzero": "--dtype bfloat16 --batch-size 2 --teacher ema --teacher-rate 0.3 --problems 16",
    "sdzero, frozen teacher": "--batch-size 2 --problems 16",
    "sdzero, two passes": "--batch-size 4 --passes 2 --teacher ema --teacher-interval 3",
    "rft": "--batch-size 4 --problems 16 --epochs 3",
    "grpo": "--batch-size 4 --group 4 --problems 8 --dtype bfloat16",
    "sdpo": "--batch-size 4 --group 4 --problems 8 --dtype bfloat16 --teacher-rate 0.3",
}


@pytest.mark.parametrize("case", RESUMED)
def test_an_interrupted_run_goes_on_bit_for_bit(case, request, tmp_path, monkeypatch):
    """With the real sampler and dropout, stopped between two checkpoints. Catches a master's lower
    half, a teacher's average or a moment that a checkpoint does not hold."""
    base, data = (request.getfixturevalue(name) for name in ("scripts_base", "scripts_data"))
    script, *method = SCRIPTS[case.split(",")[0]]
    flags = [*method, "--model", base, "--dataset", data, *FLAGS, *RESUMED[case].split()]
    call(script, *flags, "--output", tmp_path / "whole")
    steps = []

    def stop(parameters, limit):
        steps.append(limit)
        if len(steps) == 6:
            raise KeyboardInterrupt
        return clip_grad_norm_(parameters, limit)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", stop)
    with pytest.raises(KeyboardInterrupt):
        call(script, *flags, "--output", tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-4"]
    call(script, *flags, "--output", tmp_path / "out", "--resume")
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert lines_of(out / "metrics.jsonl") == lines_of(whole / "metrics.jsonl")
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert len(steps) < 6 + len(
        [x for x in lines_of(out / "metrics.jsonl") if x["kind"] == "train"]
    )


CODE_TESTS = {
    "json": lambda i: json.dumps([{"input": str(k), "output": str(k + i)} for k in range(2)]),
    "list": lambda i: [f"assert f({k}) == {k + i}" for k in range(2)],
}


@pytest.mark.parametrize("kind", CODE_TESTS)
def test_code_through_the_scripts(kind, files, tmp_path, monkeypatch):
    """Tests as a JSON string, as data sets have them, or as a list of asserts; first attempts are
    right for even problems, revisions always. Catches tests of another problem."""
    lines = [{"problem": f"{i}?", "tests": CODE_TESTS[kind](i)} for i in range(6)]
    (tmp_path / "code.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def generate(model, prompts, **rest):
        found = []
        for text in map(TOKENIZER.decode, prompts):
            i = problem_of(text)
            added = i if text.endswith("\n\n") or i % 2 == 0 else i + 1
            body = (
                f"print(int(input()) + {added})" if kind == "json" else f"f = lambda x: x + {added}"
            )
            found.append(response(f"```python\n{body}\n```", True, i, 0))
        return found

    monkeypatch.setattr(common, "generate", generate)
    flags = ["--model", files / "base", "--dataset", tmp_path / "code.jsonl", "--verifier", "code"]
    flags += "--eval-problems 2 --eval-samples 1 --max-new-tokens 64 --device cpu".split()
    call(
        srt, *flags, *"--problems 4 --revisions 1 --epochs 1".split(), "--output", tmp_path / "srt"
    )
    traces = lines_of(tmp_path / "srt" / "traces.jsonl")
    assert len(traces) == 4 and all(t["reward"] == 1 - problem_of(t["problem"]) % 2 for t in traces)
    assert lines_of(tmp_path / "srt" / "metrics.jsonl")[0]["revised_accuracy"] == 1
    call(sdzero, *flags, "--output", tmp_path / "sdzero")
    right = {problem_of(t["problem"]): t["reward"] for t in traces}
    (train,) = [x for x in lines_of(tmp_path / "sdzero" / "metrics.jsonl") if x["kind"] == "train"]
    assert train["reward"] == sum(right.values()) / 4
    seen = [problem_of(t["problem"]) for t in traces]
    (first, _) = [x for x in lines_of(tmp_path / "sdzero" / "metrics.jsonl") if x["kind"] == "eval"]
    assert first["accuracy"] == sum(1 - i % 2 for i in range(6) if i not in seen) / 2


def test_the_toy_in_small(tmp_path, monkeypatch, capsys):
    """examples/toy.py from nothing to its table with the baselines, each script called here and not
    in a process of its own. That it learns anything is not asked of so small a version."""
    import toy

    small = dict(DOCUMENTS=2500, SIZES=dict(stage1=96, stage2=96, heldout=6))
    small["MODEL"] = {**toy.MODEL, "hidden_size": 64, "num_hidden_layers": 1}
    for name, value in small.items():
        monkeypatch.setattr(toy, name, value)
    monkeypatch.setattr(sys, "argv", ["toy.py", "--out", str(tmp_path), "--baselines"])
    called = []

    def in_process(name, *flags):
        called.append(name)
        importlib.import_module(Path(name).stem).main([str(flag) for flag in flags])

    monkeypatch.setattr(toy, "call", in_process)
    toy.main()
    out = capsys.readouterr().out.split("KL from SRT")[0]
    table = [line.split(" | ") for line in out.splitlines() if line[:2] == "| "]
    rows = {cells[0].strip("| "): cells[1:] for cells in table[2:]}
    assert {"base", "SRT", "SD-Zero", "RFT", "GRPO", "SDFT", "SDPO"} <= rows.keys()
    assert len(rows) == 15
    for cells in rows.values():
        assert 0 <= float(cells[0]) <= 100 and 0 < float(cells[-1].strip("| ")) <= 64
    goods = []
    for name, size in toy.SIZES.items():
        problems = [json.loads(line) for line in open(tmp_path / f"{name}.jsonl")]
        assert len(problems) == size
        for p in problems:
            goods.append(frozenset(re.findall(r"[a-z]{4}", p["problem"].split(" of ")[1])))
            assert p["solution"].endswith(f"#### {p['answer']}")
    assert len(set(goods)) == len(goods)
    assert {"srt.py", "sdzero.py", "examples/baselines.py", "examples/localize.py"} <= set(called)
