"""The pictures in examples/: localize.py's page of a tiny random model, by the command line, its numbers by hand; and curves.py's PNG."""

import importlib.util
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from test_scripts import save_model
from tiny import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import srt
from rollout import Rollout

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TEMPERATURE = 0.8


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


localize = load("localize")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The page of 12 responses of a random student under another random model as the teacher, and what `score` saw and said for it."""
    folder = tmp_path_factory.mktemp("pictures")
    save_model(folder / "student", seed=1), save_model(folder / "teacher", seed=2)
    rows = [{"problem": f'<b>{i}</b> & {i} < "{i + 1}"?', "answer": str(i)} for i in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    seen, score = {}, localize.score

    def record(lm, teacher, examples, args):
        # what a model might write to break the page
        text = "</span><script>alert(1)</script> &amp; \"'<!-- \n"
        examples[0].response = Rollout([*lm.tokenizer(text, add_special_tokens=False)["input_ids"], 0], [0.0], True)
        seen.update(lm=lm, args=args, examples=examples, tables=score(lm, teacher, examples, args))
        return seen["tables"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(localize, "score", record)
        localize.main([str(f) for f in (
            "--model", folder / "student", "--teacher", folder / "teacher", "--dataset", folder / "data.jsonl", "--verifier", "tiny:odd",
            "--max-new-tokens", 8, "--temperature", TEMPERATURE, "--micro-tokens", 300, "--slots", 4, "--shown", 10, "--device", "cpu",
            "--output", folder / "page.html")])  # fmt: skip
    text = (folder / "page.html").read_text()
    return {**seen, "folder": folder, "text": text, "root": ElementTree.fromstring(text)}


def tokens_of(made):
    """The page's token elements, a list for each response that is shown."""
    return [list(p) for p in made["root"].iter("p") if p.get("class") == "y"]


def test_the_page_is_well_formed_and_stands_alone(made):
    names = {element.tag for element in made["root"].iter()}
    assert not names & {"script", "link", "img", "iframe", "object", "base"} and {"svg", "table", "article"} <= names
    for element in made["root"].iter():
        assert not {"href", "src", "srcset", "action"} & set(element.keys()) and not any(k.startswith("on") for k in element.keys())
    assert "://" not in made["text"] and "url(" not in made["text"] and "@import" not in made["text"]
    shown = re.findall(r"r = ([01])", made["text"])
    assert len(shown) == len(tokens_of(made)) == 10 and shown[:4] == ["0", "1"] * 2  # in turn


def test_text_is_escaped_and_whole(made):
    lm, texts = made["lm"], ["".join(token.text for token in tokens) for tokens in tokens_of(made)]
    expected = {lm.tokenizer.decode(e.response.ids).replace("\n", "↵\n") for e in made["examples"]}
    assert set(texts) <= expected and any("</span><script>alert(1)" in text for text in texts)
    assert any(p.text.startswith("<b>") for p in made["root"].iter("p") if p.get("class") == "x")
    assert localize.clean("a\x08\x0b<\ttab\n") == "a\ufffd\ufffd&lt;\ttab\n"


def test_kl_of_a_token_against_float64(made):
    """Whole models, every position by itself: a wrong shift, a mask, the temperature, KL the other way round would all show."""
    folder, lm = made["folder"], made["lm"]
    student, teacher = (AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64).eval() for name in ("student", "teacher"))
    reference = []
    for e, table in zip(made["examples"], made["tables"]):
        y, rows = e.response.ids, []
        copy = [t for t in y if t != 0]
        with torch.no_grad():
            for t in range(len(y)):
                p, q = (
                    (model(torch.tensor([ids])).logits[0, -1, : lm.vocab_size] / TEMPERATURE).softmax(-1)
                    for model, ids in ((student, e.prompt_ids + y[:t]), (teacher, e.prompt_ids + copy + e.phrase_ids + y[:t]))
                )
                best = q.argmax()
                rows.append([(p * (p / q).log()).sum(), p[y[t]], q[y[t]], p[best], q[best], best])
        reference.append(torch.tensor(rows, dtype=torch.float64))
        torch.testing.assert_close(table, reference[-1], rtol=1e-3, atol=1e-5)
    assert reference[0][:, 0].min() > 0.1 and len(reference[0]) > 40
    # the page says the same of each token in its title; the n-th wrong response comes before the n-th right one, both in the order drawn
    rewards = [e.reward for e in made["examples"]]
    order = sorted(range(len(rewards)), key=lambda i: (rewards[:i].count(rewards[i]), rewards[i]))
    for tokens, i in zip(tokens_of(made), order):
        kl = [float(re.match(r"KL ([\d.e+-]+) \|", token.get("title"))[1]) for token in tokens]
        assert kl == pytest.approx(reference[i][:, 0].tolist(), rel=2e-3, abs=1e-5)
        assert [token.get("class")[:2] for token in tokens] == [f"k{sum(v >= edge for edge in localize.LEVELS)}" for v in kl]


@pytest.mark.parametrize("tokens", [1, 7, 19, 20, 21, 137])
def test_buckets_sum_to_the_mean(tokens):
    kl = torch.rand(tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens)) ** 4
    bars = localize.buckets(kl)
    assert bars.shape == (20,) and bars.sum().item() == pytest.approx(kl.mean().item()) and (bars.diff() <= 1e-12).all()
    fine = kl.sort(descending=True).values.repeat_interleave(20).reshape(20, tokens)  # each token cut in 20: equal parts exist
    torch.testing.assert_close(bars, fine.sum(1) / 20 / tokens)


def test_figures(made):
    kls = [torch.tensor([1.0, *[0.0] * 39], dtype=torch.float64), torch.tensor([0.5] * 20, dtype=torch.float64)]
    figures = localize.summarize(kls)
    assert figures["mean_kl"] == pytest.approx(11 / 60) and figures["top5_each"] == pytest.approx((1 + 1 / 20) / 2)
    assert figures["top5_all"] == pytest.approx((1 + 2 * 0.5) / 11)  # 5% of 60 tokens are 3
    assert figures["bars"][0] == pytest.approx((1 / 40 + 0.5 / 20) / 2) and figures["tokens"] == 60
    rects = [r for r in made["root"].iter("rect") if len(r)]  # with a title: the bars
    heights = {name: [float(r.get("height")) for r in rects if r.get("class") == name] for name in ("wrong", "right")}
    for r, name in enumerate(heights):
        bars = localize.summarize([t[:, 0] for e, t in zip(made["examples"], made["tables"]) if e.reward == r])["bars"]
        scale = max(heights["wrong"] + heights["right"]) / 165  # the highest bar of both fills the figure
        assert scale == pytest.approx(1) and max(heights[name]) / heights[name][10] == pytest.approx(bars[0] / bars[10], rel=0.05)


def test_tokens_that_are_parts_of_characters():
    """One byte a token: what completes a character shows it, and nothing is lost."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = tokenizer("a 😀é\n")["input_ids"]
    assert localize.pieces(tokenizer, ids) == ["a", " ", "", "", "", "😀", "", "é", "\n"]
    assert localize.pieces(tokenizer, ids[:4]) == ["a", " ", "", ""]
    spans = ElementTree.fromstring(f"<p>{localize.spans(tokenizer, ids, torch.zeros(9, 6, dtype=torch.float64))}</p>")
    assert "".join(s.text for s in spans) == "a ◌◌◌😀◌é↵\n" and "part of a character" in spans[2].get("title")


def test_what_a_user_can_mend(made, tmp_path):
    folder, other = made["folder"], save_model(tmp_path / "other", family="llama")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(other)
    flags = ["--model", str(folder / "student"), "--dataset", str(folder / "data.jsonl"), "--output", str(tmp_path / "page.html")]
    with pytest.raises(srt.BadInput, match="different vocabularies"):
        localize.main([*flags, "--teacher", str(other), "--max-new-tokens", "8"])
    with pytest.raises(srt.BadInput, match="unrecognized arguments: --lr"):
        localize.main([*flags, "--teacher", str(folder / "teacher"), "--lr", "1"])
    assert not (tmp_path / "page.html").exists()


def write_run(folder, lines, **flags):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "settings.json").write_text(json.dumps({"flags": flags}))
    return folder


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    curves = load("curves")
    evaluation = {"kind": "eval", "accuracy": 0.5, "accuracy_se": None, "length": 9.0}
    stage_1 = write_run(tmp_path / "srt", [
        {**evaluation, "step": 0},
        {"kind": "collect", "step": 1, "attempts": 10, "revisions_of_wrong": 12, "revisions_of_right": 18},
        {"kind": "train", "step": 1, "loss": 1.0}, {**evaluation, "step": 1, "accuracy_se": 0.1}], model="base")  # fmt: skip
    stage_2 = write_run(tmp_path / "sdzero", [
        {"kind": "train", "step": 1, "loss": 1.0, "kl_right": None, "kl_wrong": 0.2},
        {"kind": "train", "step": 2, "loss": 0.5, "kl_right": 0.1, "kl_wrong": 0.2},
    ], model=str(stage_1), batch_size=8, passes=2)  # fmt: skip
    assert [line["x"] for line in curves.read(stage_1, "generations")[0]] == [0, 40, 40, 40]
    assert [line["x"] for line in curves.read(stage_2, "generations")[0]] == [44, 48]  # stage 1 paid for
    assert [line["x"] for line in curves.read(stage_1, "steps")[0]] == [0, 0, 1, 1]
    baseline = write_run(tmp_path / "rft", [{"kind": "collect", "step": 1, "generations": 12}, {"kind": "train", "step": 1, "loss": 1.0}])
    assert [line["x"] for line in curves.read(baseline, "generations")[0]] == [12, 12]
    baseline = write_run(tmp_path / "grpo", [{"kind": "train", "step": i, "generations": 8 * i} for i in (1, 2, 3)])
    assert [line["x"] for line in curves.read(baseline, "generations")[0]] == [8, 16, 24]  # a baseline counts them all, at every step
    assert curves.smooth([1, 2, 6], 2) == [1, 1.5, 4] and math.isclose(sum(curves.smooth([3.0], 5)), 3)
    for runs in ([stage_1, stage_2], [stage_2], [stage_1]):
        curves.main([str(run) for run in runs])
        picture = runs[0] / "curves.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
        picture.unlink()
    for empty in (write_run(tmp_path / "nothing", []), tmp_path / "missing"):
        with pytest.raises(SystemExit):
            curves.main([str(empty)])
        assert not (empty / "curves.png").exists()
