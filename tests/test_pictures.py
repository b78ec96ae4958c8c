"""The pictures in examples/: localize.py's page of a tiny random model, by the command line, with
its numbers by hand; and curves.py's PNG."""

import importlib.util
import json
import re
import shutil
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import torch
from test_scripts import save_model
from tiny import make_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from common import PHRASES, key_of
from rollout import Rollout

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
TEMPERATURE = 0.8
FLAGS = (
    *("--verifier", "tiny:odd", "--max-new-tokens", 8, "--temperature", TEMPERATURE),
    *("--micro-tokens", 300, "--slots", 4, "--shown", 10, "--device", "cpu"),
)


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


localize, curves = load("localize"), load("curves")


def flags_for(folder):
    """Of a page of the student and the teacher in a folder, for the problems in it."""
    sources = ["--model", folder / "student", "--teacher", folder / "teacher"]
    sources += ["--dataset", folder / "data.jsonl", "--output", folder / "page.html"]
    return [*sources, *FLAGS]


def call(folder, *flags):
    localize.main([str(flag) for flag in (*flags_for(folder), *flags)])


@pytest.fixture(scope="module")
def models_and_problems(tmp_path_factory):
    """Two random models, and 12 problems whose texts look like markup."""
    folder = tmp_path_factory.mktemp("pictures")
    save_model(folder / "student", seed=1)
    save_model(folder / "teacher", seed=2)
    rows = [{"problem": f'<b>{i}</b> & {i} < "{i + 1}"?', "answer": str(i)} for i in range(12)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def made(models_and_problems):
    """The page of 12 responses, and what `score` saw and said for it."""
    folder, seen, score = models_and_problems, {}, localize.score

    def record(lm, teacher, examples, args):
        # what a model might write to break the page
        text = "</span><script>alert(1)</script> &amp; \"'<!-- \n"
        ids = lm.tokenizer(text, add_special_tokens=False)["input_ids"]
        examples[0].response = Rollout([*ids, 0], [0.0] * (len(ids) + 1), True)
        seen.update(lm=lm, examples=examples, tables=score(lm, teacher, examples, args))
        return seen["tables"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(localize, "score", record)
        call(folder)
    text = (folder / "page.html").read_text()
    return {**seen, "folder": folder, "text": text, "root": ElementTree.fromstring(text)}


def tokens_of(made):
    """The page's token elements, a list for each response that is shown."""
    return [list(p) for p in made["root"].iter("p") if p.get("class") == "y"]


# ----------------------------------------------------------------------------------- localize.py


def test_the_page_is_well_formed_and_needs_nothing_else(made):
    """Catches markup that is left open, a script, anything that is loaded from elsewhere."""
    names = {element.tag for element in made["root"].iter()}
    assert not names & {"script", "link", "img", "iframe", "object", "base"}
    assert {"svg", "table", "article"} <= names
    for element in made["root"].iter():
        assert not {"href", "src", "srcset", "action"} & set(element.keys())
        assert not any(key.startswith("on") for key in element.keys())
    for text in ("://", "url(", "@import"):
        assert text not in made["text"]
    shown = re.findall(r"r = ([01])", made["text"])
    assert len(shown) == len(tokens_of(made)) == 10
    assert shown[:4] == ["0", "1"] * 2  # in turn


def test_text_is_escaped_and_whole(made):
    """Catches a response that ends the page's markup, and one of which a token is lost."""
    tokenizer = made["lm"].tokenizer
    texts = ["".join(token.text for token in tokens) for tokens in tokens_of(made)]
    written = [tokenizer.decode(e.response.ids) for e in made["examples"]]
    assert set(texts) <= {text.replace("\n", "↵\n") for text in written}
    assert any("</span><script>alert(1)" in text for text in texts)
    problems = [p.text for p in made["root"].iter("p") if p.get("class") == "x"]
    assert any(text.startswith("<b>") for text in problems)
    assert localize.clean("a\x08\x0b<\ttab\n") == "a\ufffd\ufffd&lt;\ttab\n"


def probabilities(model, ids, vocab_size):
    """Of the next token, from a whole model in float64."""
    return (model(torch.tensor([ids])).logits[0, -1, :vocab_size] / TEMPERATURE).softmax(-1)


@torch.no_grad()
def test_kl_of_a_token_against_float64(made):
    """Whole models, every position by itself. Catches a wrong shift, a mask, a temperature that is
    forgotten, the KL in the other direction, an EOS in the teacher's first copy, the phrase of the
    other verdict."""
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(made["folder"] / name, dtype=torch.float64).eval()
        for name in ("student", "teacher")
    )
    phrases = [made["lm"].phrase_ids(phrase) for phrase in PHRASES]
    assert [e.phrase_ids for e in made["examples"]] == [phrases[e.reward] for e in made["examples"]]
    reference, vocab_size = [], made["lm"].vocab_size
    for e, table in zip(made["examples"], made["tables"]):
        y, rows = e.response.ids, []
        told = e.prompt_ids + [t for t in y if t != 0] + e.phrase_ids
        for t in range(len(y)):
            p = probabilities(student, e.prompt_ids + y[:t], vocab_size)
            q = probabilities(teacher, told + y[:t], vocab_size)
            best = q.argmax()
            rows.append([(p * (p / q).log()).sum(), p[y[t]], q[y[t]], p[best], q[best], best])
        reference.append(torch.tensor(rows, dtype=torch.float64))
        torch.testing.assert_close(table, reference[-1], rtol=1e-3, atol=1e-5)
    assert reference[0][:, 0].min() > 0.1 and len(reference[0]) > 40
    # The page says the same of each token in its title. The n-th wrong response comes before the
    # n-th right one, both in the order drawn.
    rewards = [e.reward for e in made["examples"]]
    order = sorted(range(len(rewards)), key=lambda i: (rewards[:i].count(rewards[i]), rewards[i]))
    for tokens, i in zip(tokens_of(made), order):
        titles = [token.get("title") for token in tokens]
        kl = [float(re.match(r"KL ([\d.e+-]+) \|", title)[1]) for title in titles]
        assert kl == pytest.approx(reference[i][:, 0].tolist(), rel=2e-3, abs=1e-5)
        levels = [f"k{sum(value >= edge for edge in localize.LEVELS)}" for value in kl]
        assert [token.get("class")[:2] for token in tokens] == levels
        other = made["tables"][i][:, 2] < made["tables"][i][:, 4]  # the teacher's own choice
        assert [token.get("class")[2:] == " u" for token in tokens] == other.tolist()


@pytest.mark.parametrize("tokens", [1, 7, 19, 20, 21, 137])
def test_bars_sum_to_the_mean(tokens):
    """Catches a token on an edge that counts twice or not at all."""
    generator = torch.Generator().manual_seed(tokens)
    kl = torch.rand(tokens, dtype=torch.float64, generator=generator) ** 4
    bars = localize.bars_of(kl)
    assert bars.shape == (20,) and (bars.diff() <= 1e-12).all()
    assert bars.sum().item() == pytest.approx(kl.mean().item())
    # with each token cut in 20, equal parts exist
    fine = kl.sort(descending=True).values.repeat_interleave(20).reshape(20, tokens)
    torch.testing.assert_close(bars, fine.sum(1) / 20 / tokens)


def test_figures(made):
    """By hand for two responses; then the figure's bars are those of its responses."""
    one, even = [1.0, *[0.0] * 39], [0.5] * 20
    kls = [torch.tensor(values, dtype=torch.float64) for values in (one, even)]
    figures = localize.summarize(kls)
    assert figures["mean_kl"] == pytest.approx(11 / 60) and figures["tokens"] == 60
    assert figures["top5_each"] == pytest.approx((1 + 1 / 20) / 2)
    assert figures["top5_all"] == pytest.approx((1 + 2 * 0.5) / 11)  # 5% of 60 tokens are 3
    assert figures["bars"][0] == pytest.approx((1 / 40 + 0.5 / 20) / 2)
    rects = [r for r in made["root"].iter("rect") if len(r)]  # with a title: the bars
    heights, bars = {"wrong": [], "right": []}, {}
    for rect in rects:
        heights[rect.get("class")].append(float(rect.get("height")))
    for r, name in enumerate(heights):
        own = [t[:, 0] for e, t in zip(made["examples"], made["tables"]) if e.reward == r]
        bars[name] = localize.summarize(own)["bars"]
    scale = 165 / max(bars["wrong"] + bars["right"])  # the highest bar of both fills the figure
    for name, found in heights.items():
        assert found == pytest.approx([scale * bar for bar in bars[name]], abs=0.051)


def test_the_median_is_of_responses_not_of_tokens():
    kls = [torch.tensor(x, dtype=torch.float64) for x in ([1.0, *[0.0] * 39], [0.5] * 20, [0.3])]
    assert localize.summarize(kls)["median_kl"] == pytest.approx(0.3)


def test_the_numbers_of_the_page(made):
    """Ticks fit the bars; the legend has the tokens' colours; bars, tokens and verdicts have their
    own values in their titles."""
    root, tables, examples = made["root"], made["tables"], made["examples"]
    rewards, figures = [e.reward for e in examples], {}
    for r, name in enumerate(("wrong", "right")):
        kls = [table[:, 0] for table, reward in zip(tables, rewards) if reward == r]
        figures[name] = localize.summarize(kls)
    top = max(figures["wrong"]["bars"] + figures["right"]["bars"])
    ticks = [x for x in root.iter("text") if x.get("text-anchor") == "end"]
    assert len(ticks) > 1
    for tick in ticks:
        height = 190 - (float(tick.get("y")) - 4)  # the highest bar has 165
        assert height == pytest.approx(165 * float(tick.text) / top, abs=0.06)
    (legend,) = [p for p in root.iter("p") if p.get("class") == "legend"]
    edges = ["below 0.03", "0.03 to 0.1", "0.1 to 0.3", "0.3 to 1", "1 to 3", "3 or more"]
    assert [(x.get("class"), x.text) for x in legend] == [(f"k{i}", e) for i, e in enumerate(edges)]
    for name, values in figures.items():
        bars = [x[0].text for x in root.iter("rect") if len(x) and x.get("class") == name]
        assert bars == [
            f"{name}, {5 * i} to {5 * i + 5}% of the tokens: {value:.4g} nats"
            for i, value in enumerate(values["bars"])
        ]
    order = sorted(range(12), key=lambda i: (rewards[:i].count(rewards[i]), rewards[i]))
    for tokens, article, i in zip(tokens_of(made), root.iter("article"), order):
        assert article.find("aside/q").text == PHRASES[rewards[i]]
        for token, row in zip(tokens, tables[i].tolist(), strict=True):
            found = re.findall(r"(student|teacher) ([\d.]+)%", token.get("title"))[-4:]
            assert [name for name, _ in found] == ["student", "teacher"] * 2
            shown = [float(value) for _, value in found]
            assert shown == pytest.approx([100 * p for p in row[1:5]], abs=0.051)


def test_rows_of_the_table(models_and_problems, monkeypatch):
    figures = dict(responses=1, tokens=2, mean_kl=0.3, median_kl=0.4, top5_all=0.5, top5_each=0.6)
    monkeypatch.setattr(localize, "summarize", lambda kls: {**figures, "bars": [0.1] * 20})
    call(models_and_problems)
    root = ElementTree.parse(models_and_problems / "page.html").getroot()
    rows = {row[0].text: row[1].text for row in root.iter("tr")}
    wanted = {
        "responses": "1",
        "their tokens": "2",
        "mean KL per token": "0.3",
        "the same of the median response": "0.4",
        "of the KL of all these tokens, in the top 5% of them": "50%",
        "of a response's KL, in its own top 5%, on average": "60%",
    }
    assert wanted.items() <= rows.items()


def test_what_the_teachers_context_does_not_hold(models_and_problems, tmp_path, monkeypatch):
    for name in ("student", "teacher"):
        shutil.copytree(models_and_problems / name, tmp_path / name)
    shutil.copy(models_and_problems / "data.jsonl", tmp_path)
    seen, load, score = [], localize.load_both, localize.score

    def short(args):
        lm, teacher, saved = load(args)
        teacher.context = 95
        return lm, teacher, saved

    def watched(lm, teacher, examples, args):
        seen.extend(examples)
        return score(lm, teacher, examples, args)

    monkeypatch.setattr(localize, "load_both", short)
    monkeypatch.setattr(localize, "score", watched)
    call(tmp_path)
    assert 0 < len(seen) < 12 and all(len(e.teacher_ids) <= 95 for e in seen)
    text = (tmp_path / "page.html").read_text()
    assert f", {12 - len(seen)} more did not fit the context" in text


def test_tokens_that_are_parts_of_characters():
    """One byte per token: what completes a character shows it, and nothing is lost."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    ids = tokenizer("a 😀é\n")["input_ids"]
    assert localize.pieces(tokenizer, ids) == ["a", " ", "", "", "", "😀", "", "é", "\n"]
    assert localize.pieces(tokenizer, ids[:4]) == ["a", " ", "", ""]
    html = localize.spans(tokenizer, ids, torch.zeros(9, 6, dtype=torch.float64))
    spans = ElementTree.fromstring(f"<p>{html}</p>")
    assert "".join(s.text for s in spans) == "a ◌◌◌😀◌é↵\n"
    assert "part of a character" in spans[2].get("title")


def test_nothing_that_a_model_was_trained_on(models_and_problems, tmp_path, monkeypatch):
    """Neither what the teacher was trained on nor what the student was; and both are asked with the
    phrases of the teacher. Catches a list that is not read, phrases of the student."""
    for name in ("student", "teacher"):
        shutil.copytree(models_and_problems / name, tmp_path / name)
    text = (models_and_problems / "data.jsonl").read_text()
    (tmp_path / "data.jsonl").write_text(text)
    keys = [key_of(json.loads(line)["problem"]) for line in text.splitlines()]
    prompt = {"prompt_suffix": "!", "phrase_wrong": "No.", "phrase_right": "Yes."}
    prompt.update(prompt_template="", template_kwargs={})
    of_teacher = {"trained": keys[5:7], "prompt": prompt}
    (tmp_path / "teacher" / "srt.json").write_text(json.dumps(of_teacher))
    (tmp_path / "student" / "srt.json").write_text(json.dumps({"trained": keys[:3]}))
    seen = []

    def watched(lm, teacher, examples, args, score=localize.score):
        seen.extend(lm.tokenizer.decode(e.prompt_ids) for e in examples)
        return score(lm, teacher, examples, args)

    monkeypatch.setattr(localize, "score", watched)
    call(tmp_path)
    # "<|user|>PROBLEM!<|im_end|><|assistant|>"
    problems = [text.removeprefix("<|user|>").split("!<|im_end|>")[0] for text in seen]
    assert {key_of(problem) for problem in problems} == {*keys[3:5], *keys[7:]}
    quotes = re.findall(r"<q>(.*?)</q>", (tmp_path / "page.html").read_text())
    assert quotes and set(quotes) <= {"No.", "Yes."}


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--teacher", "other"], "different vocabularies"),
        (["--output", "missing/page.html"], "cannot write the page"),
        (["--output", "student"], "cannot write the page"),
        (["--lr", "1"], "--lr means nothing here"),
        (["--eval-temperature", "0"], "--eval-temperature means nothing here"),
        (["--resume"], "--resume means nothing here"),
        (["--lora", "4"], "--lora means nothing here"),
        (["--eval-problems", "0"], "--eval-problems 0 leaves no response"),
        (["--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_what_a_user_can_mend(flags, message, models_and_problems, capsys, monkeypatch):
    """One line and exit code 2, and all of it before anything is sampled."""
    other = save_model(models_and_problems / "other", family="llama")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["more"])
    tokenizer.save_pretrained(other)
    monkeypatch.chdir(models_and_problems)
    monkeypatch.setattr(localize, "sample_all", None)
    with pytest.raises(SystemExit) as stopped:
        call(Path("."), *flags)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error and "Traceback" not in error


def test_a_page_that_cannot_be_written(models_and_problems, capsys):
    with pytest.raises(SystemExit) as stopped:
        call(models_and_problems, "--output", "/dev/full")
    message = "cannot write the page /dev/full, name another --output: "
    assert stopped.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("error, code", [(KeyboardInterrupt, 130), (torch.OutOfMemoryError, 1)])
def test_an_end_that_nothing_resumes(error, code, models_and_problems, ended, monkeypatch):
    def stop(*args):
        raise error

    monkeypatch.setattr(localize, "sample_all", stop)
    found, _, err = ended(localize, *flags_for(models_and_problems))
    message = err.splitlines()[-1]
    assert found == code and "--resume" not in message and message.startswith("localize.py: ")


# ------------------------------------------------------------------------------------- curves.py


def write_run(folder, lines, **flags):
    folder.mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "settings.json").write_text(json.dumps({"flags": flags}))
    return folder


@pytest.fixture
def two_runs(tmp_path):
    """Logs of a stage 1 and of the stage 2 that went on from it."""
    evaluation = {"kind": "eval", "accuracy": 0.5, "accuracy_se": None, "length": 9.0}
    counts = {"attempts": 10, "revisions_of_wrong": 12, "revisions_of_right": 18}
    first = [
        {**evaluation, "step": 0},
        {"kind": "collect", "step": 1, **counts},
        {"kind": "train", "step": 1, "loss": 1.0},
        {**evaluation, "step": 1, "accuracy_se": 0.1},
    ]
    second = [
        {"kind": "train", "step": 1, "loss": 1.0, "kl_right": None, "kl_wrong": 0.2},
        {"kind": "train", "step": 2, "loss": 0.5, "kl_right": 0.1, "kl_wrong": 0.2},
    ]
    stage_1 = write_run(tmp_path / "srt", first, model="base")
    flags = {"model": str(stage_1), "batch_size": 8, "passes": 2}
    return stage_1, write_run(tmp_path / "sdzero", second, **flags)


def x_of(run, x="generations"):
    return [line["x"] for line in curves.read(run, x)]


def test_what_a_run_has_generated(two_runs, tmp_path):
    """Catches steps that count for nothing or twice, a stage 2 that has not paid for stage 1."""
    stage_1, stage_2 = two_runs
    assert x_of(stage_1) == [0, 40, 40, 40] and x_of(stage_2) == [44, 48]
    assert x_of(stage_1, "steps") == [0, 0, 1, 1]
    # a baseline counts for itself
    lines = [{"kind": "collect", "step": 1, "generations": 12}, {"kind": "train", "step": 1}]
    assert x_of(write_run(tmp_path / "rft", lines)) == [12, 12]
    lines = [{"kind": "train", "step": i, "generations": 8 * i} for i in (1, 2, 3)]
    assert x_of(write_run(tmp_path / "grpo", lines)) == [8, 16, 24]
    assert x_of(write_run(tmp_path / "after", lines, model=str(stage_1))) == [48, 56, 64]


def test_which_runs_a_run_has_paid_for(tmp_path, monkeypatch, capsys):
    """A relative --model read from elsewhere, best/ and a checkpoint that is gone, traces of
    another run, one run as both; a warning for what is not found, none for a name on the hub."""
    counts = {"attempts": 4, "revisions_of_wrong": 0, "revisions_of_right": 12}
    collected = [{"kind": "collect", "step": 1, **counts}]
    step = [{"kind": "train", "step": 1, "generations": 8}]
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    runs, n = tmp_path / "runs", 0

    def x_after(**flags):
        nonlocal n
        n += 1
        return x_of(write_run(runs / f"run-{n}", step, **flags))

    write_run(runs / "c", collected, model="Qwen/Qwen3-4B")
    write_run(runs / "s1", [{"kind": "train", "step": 1}], model="gone/base", traces="runs/c/t")
    for model in ("runs/s1", "runs/s1/best", "s1/checkpoint-4", str(runs / "s1")):
        assert x_after(model=model) == [24], model
    assert x_after(model="runs/s1", traces="c/traces.jsonl") == [24]
    assert x_after(model="Qwen/Qwen3-4B", traces="../runs/c/traces.jsonl") == [24]
    assert capsys.readouterr().err == ""
    assert x_after(model="runs/s2") == x_after(model="/nowhere/s2") == [8]
    assert x_after(model="Qwen/Qwen3-4B", traces="d/traces.jsonl") == [8]
    error = capsys.readouterr().err
    assert [line.split()[2] for line in error.splitlines()] == [
        "runs/s2",
        "/nowhere/s2",
        "d/traces.jsonl",
    ]


@pytest.mark.parametrize("line", ["{}", "[]", '{"kind": "tr', "\x00", "7"])
def test_lines_that_are_none(line, tmp_path, capsys):
    """One that is half written is left out at the end; anything else is one line with its place."""
    good = {"kind": "train", "step": 1, "generations": 8}
    run = write_run(tmp_path / "run", [good])
    log = run / "metrics.jsonl"
    log.write_text(f"{log.read_text()}{line}\n{log.read_text()}")
    with pytest.raises(SystemExit) as stopped:
        curves.main([str(run)])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and f"{log}, line 2" in error and error.count("\n") == 1
    log.write_text(json.dumps(good) + '\n{"kind": "tr')
    assert x_of(run) == [8]
    (run / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match="settings.json"):
        curves.read(run, "generations")


def test_curves(two_runs, tmp_path):
    """A picture of any of the runs; of nothing one line and exit code 2."""
    pytest.importorskip("matplotlib")
    assert curves.smooth([1, 2, 6], 2) == [1, 1.5, 4]
    stage_1, stage_2 = two_runs
    for runs in ([stage_1, stage_2], [stage_2], [stage_1]):
        curves.main([str(run) for run in runs])
        picture = runs[0] / "curves.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 10_000
        picture.unlink()
    for empty in (write_run(tmp_path / "nothing", []), tmp_path / "missing"):
        with pytest.raises(SystemExit) as stopped:
            curves.main([str(empty)])
        assert stopped.value.code == 2 and not (empty / "curves.png").exists()


def test_what_is_drawn(two_runs, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot")
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    curves.main([str(run) for run in two_runs])
    axes = {axis.get_title(loc="left"): axis for axis in figures[0].axes}
    assert {x.get_xlabel() for x in figures[0].axes[-2:]} == {"responses generated for training"}
    (bars,) = axes["accuracy, %"].containers
    assert bars[0].get_xydata().tolist() == [[0, 50], [40, 50]]
    ends = [segment[:, 1].tolist() for segment in bars[2][0].get_segments()]
    assert ends == [[50, 50], pytest.approx([40, 60])]
    (line,) = axes["tokens of a response"].lines
    assert line.get_xydata().tolist() == [[0, 9], [40, 9]]
    lines = axes["KL per token, nats"].lines
    assert {line.get_label(): line.get_xydata().tolist() for line in lines} == {
        "sdzero, right responses": [[48, 0.1]],
        "sdzero, wrong responses": [[44, 0.2], [48, 0.2]],
    }
    (line,) = axes["loss"].lines
    assert line.get_xydata().tolist() == [[44, 1.0], [48, 0.5]]
    curves.main([str(two_runs[1])])
    assert figures[1].axes[-1].get_xlabel() == "optimizer steps"
