"""Problems, prompts and what a model remembers: the held-out set, every form of row, tokenizers.

Most tests stop after `common.setup`, which is all that a run does before its first sample.
"""

import json
import os
import random
import socket
from datetime import date
from decimal import Decimal
from types import SimpleNamespace

import pytest
import transformers
from test_scripts import (
    FLAGS,
    ROWS,
    keys,
    log_of,
    read,
    save_model,
    save_rows,
    task_of,
)
from tiny import call, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import sdzero
import srt
from common import key_of
from rollout import Rollout

datasets = pytest.importorskip("datasets")  # which a bare GPU machine lacks
transformers.utils.logging.disable_progress_bar()

SCRIPTS = {"srt": srt, "sdzero": sdzero}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_rows(tmp_path_factory.mktemp("data") / "problems.jsonl", ROWS)


@pytest.fixture(scope="module")
def lineage(base, data, tmp_path_factory):
    """Stage 1, stage 2 with fewer held-out problems, and stage 2 once more."""
    out = tmp_path_factory.mktemp("lineage")
    flags = [*FLAGS, "--dataset", data, "--batch-size", "8"]
    flags1 = ["--problems", "20", "--epochs", "1"]
    call(srt, *flags, *flags1, model=base, output=out / "one")
    few = ["--eval-problems", "2", "--problems", "10"]
    call(sdzero, *flags, *few, model=out / "one", output=out / "two")
    call(sdzero, *flags, *few, "--seed", "3", model=out / "two", output=out / "three")
    call(srt, *flags, *flags1, "--seed", "5", model=out / "two", output=out / "again")
    return out


# -------------------------------------------------------------------------------- the held-out set

WAYS = {
    "another limit": ["--max-new-tokens", "243"],
    "another prompt": ["--prompt-suffix", "x" * 235],
    "another template": ["--prompt-template", "Q: {problem} A:" + "y" * 232],
    "another seed": ["--seed", "7"],
    "fewer to train on": ["--problems", "3"],
    "another verifier": ["--verifier", "math"],
    "another temperature": ["--temperature", "0.3"],
}


@pytest.mark.parametrize("script", SCRIPTS.values())
@pytest.mark.parametrize("way", WAYS)
def test_the_held_out_set_does_not_depend_on_flags(way, script, base, data):
    """It is chosen before anything is dropped: what does not fit is missing from it, and nothing
    takes its place; none of it is trained on. Catches a set chosen among problems that fit."""
    flags = [*FLAGS, "--model", base, "--dataset", data, "--eval-problems", "20"]
    usual, task = task_of(script, *flags), task_of(script, *flags, *WAYS[way])
    assert len(usual.held_out) == 20
    assert keys(task.held_out) <= keys(usual.held_out)
    assert not keys(task.problems) & keys(usual.held_out)
    if way in ("another limit", "another prompt", "another template"):
        assert 0 < task.counts["eval_too_long"] == 20 - len(task.held_out) < 20
        assert task.counts["too_long"] > 0
    else:
        assert keys(task.held_out) == keys(usual.held_out)


def shuffled(rows):
    return random.Random(0).sample(rows, len(rows))


FORMS = {
    "in another order": shuffled(ROWS),
    "with blanks at the end": [(x + " \n", y) for x, y in ROWS],
    "with blanks inside": [(x.replace(" ", "  ") + "\t", y) for x, y in ROWS],
    "twice, with a blank more": [(x + " " * n, y) for x, y in ROWS for n in range(2)],
    "incomplete rows between": [row for x, y in ROWS for row in ((x, y), (x + "!", None))],
    "more columns": [{"problem": x, "answer": y, "other": 1} for x, y in ROWS],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_held_out_set_does_not_depend_on_the_form_of_the_rows(form, base, data, tmp_path):
    """The same problems with other blanks, in another order: the same set, and no problem on both
    sides."""
    other = save_rows(tmp_path / "other.jsonl", FORMS[form])
    flags = [*FLAGS, "--model", base, "--eval-problems", "20", "--dataset"]
    usual, task = task_of(sdzero, *flags, data), task_of(sdzero, *flags, other)
    assert keys(task.held_out) == keys(usual.held_out)
    assert keys(task.problems) == keys(usual.problems) and len(task.problems) == 40
    left_out = task.counts["duplicates"] + task.counts["incomplete"]
    assert left_out == len(FORMS[form]) - 60


def test_a_larger_set_contains_the_smaller_one(base, data):
    flags = [*FLAGS, "--model", base, "--dataset", data, "--eval-problems"]
    sets = [keys(task_of(srt, *flags, n).held_out) for n in (3, 10, 30)]
    assert sets[0] < sets[1] < sets[2] and [len(s) for s in sets] == [3, 10, 30]


# ---------------------------------------------------------------------------- what was trained on


def remembered(folder):
    saved = read(folder / "srt.json")
    return set(saved["trained"]), set(saved["problems"])


def test_every_problem_ever_trained_on_is_remembered(lineage, base, data):
    """Of all ancestors, over both stages; "problems" are those of the stages 1, which a stage 2
    leaves out."""
    trained, of_stage_1 = zip(*(remembered(lineage / n) for n in ("one", "two", "three", "again")))
    assert len(trained[0]) == 20 and trained[0] == of_stage_1[0]
    assert len(trained[1]) == 30 and trained[0] < trained[1] and of_stage_1[1] == of_stage_1[0]
    assert trained[1] < trained[2] and of_stage_1[2] == of_stage_1[0]
    assert trained[1] <= trained[3] and of_stage_1[0] <= of_stage_1[3]
    for name, count in (("two", 20), ("three", 20)):
        assert len(of_stage_1[("one", "two", "three").index(name)]) == count


@pytest.mark.parametrize("name", ["one", "two", "three", "again"])
@pytest.mark.parametrize("script", SCRIPTS.values())
def test_nothing_trained_on_is_evaluated_without_a_word(name, script, lineage, data, capfd):
    """--eval-problems 40 of 60, after up to 50 were trained on: they are left out, counted, and a
    warning says how many. Catches srt.py --eval-only without a list, and lists of one stage only.
    """
    trained, _ = remembered(lineage / name)
    evaluated = []

    def noted(problems):
        evaluated.extend(problems)
        return {"sample": ""}

    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(common, "evaluate", lambda task, step: noted(task.held_out))
        flags = dict(model=lineage / name, dataset=data, eval_problems=40, eval_only=True)
        call(script, *FLAGS, **flags)
    first = set(sorted(key_of(x) for x, _ in ROWS)[:40])
    assert keys(evaluated) == first - trained and evaluated
    warning = f"{len(first & trained)} of 40 held-out problems are left out"
    assert warning in capfd.readouterr().err


def test_a_further_stage_trains_and_evaluates_on_other_problems(lineage, data):
    """Stage 2 leaves out what stage 1 had; a run evaluates nothing that an ancestor had."""
    trained, of_stage_1 = remembered(lineage / "two")
    task = task_of(sdzero, *FLAGS, model=lineage / "two", dataset=data, eval_problems=30)
    assert not keys(task.problems) & of_stage_1 and not keys(task.held_out) & trained
    assert task.counts["eval_trained_on"] == 30 - len(task.held_out) > 0
    held_out = set(sorted(key_of(x) for x, _ in ROWS)[:30])
    assert not keys(task.problems) & held_out


def test_the_problems_of_given_traces_are_remembered_and_not_evaluated(
    base, data, tmp_path, capsys
):
    """Also those that were tried without a trace: traces.jsonl has a srt.json beside it."""
    first = tmp_path / "collected"
    flags = [*FLAGS, "--model", base, "--dataset", data, "--eval-samples", "1"]
    flags += ["--eval-every", "99", "--batch-size", "32"]
    few = ["--problems", "20", "--eval-problems", "2", "--revisions", "1"]
    call(srt, *flags, *few, collect_only=True, output=first)
    tried = set(read(first / "srt.json")["problems"])
    lines = (first / "traces.jsonl").read_text().splitlines()
    assert {key_of(json.loads(line)["problem"]) for line in lines} < tried
    traces, out = first / "traces.jsonl", tmp_path / "out"
    call(srt, *flags, "--eval-problems", "30", traces=traces, output=out, epochs=1)
    assert len(tried) == 20 and remembered(out) == (tried, tried)
    held_out = set(sorted(key_of(x) for x, _ in ROWS)[:30]) - tried
    assert {e["problems"] for e in log_of(out, "eval")} == {len(held_out)}
    assert read(out / "settings.json")["counts"]["held_out"] == len(held_out) < 30
    said = f"{30 - len(held_out)} of 30 held-out problems are left out"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("rows, training", [(25_000, 10_000), (7, 4), (1, 1)])
def test_stage_1_takes_half_and_at_most_10_000(rows, training, monkeypatch):
    found = {f"{i:05}": (str(i), "1") for i in range(rows)}
    monkeypatch.setattr(common, "load_problems", lambda *rest: (found, {}))
    monkeypatch.setattr(common, "render", lambda lm, text, args: [int(text)])
    argv = ["--model", "m", "--dataset", "d", "--eval-problems", "0", "--max-new-tokens", "1"]
    args, saved = srt.parse_arguments(argv), {"trained": [], "problems": []}
    lm = SimpleNamespace(context=9)
    problems, _, counts = common.split_problems(lm, args, saved, half=True)
    assert len(problems) == counts["training"] == training


def test_memory_is_estimated_for_held_out_problems_too(base, data, monkeypatch):
    seen = []
    monkeypatch.setattr(common, "fit_memory", lambda lm, args, problems: seen.extend(problems))
    task = task_of(sdzero, *FLAGS, model=base, dataset=data)
    assert keys(seen) == keys(task.problems + task.held_out)


def test_a_problem_that_just_fits_is_kept(base, tmp_path):
    """Context 256, --max-new-tokens 8, three tokens of template: 245 fit."""
    path = save_rows(tmp_path / "d.jsonl", [("x" * n, "1") for n in (5, 245, 246)])
    flags = [*FLAGS, "--eval-problems", "0", "--problems", "9"]
    task = task_of(srt, *flags, model=base, dataset=path)
    assert sorted(len(p.text) for p in task.problems) == [5, 245]
    assert task.counts["too_long"] == 1


def test_the_first_of_two_answers_counts(tmp_path):
    path = save_rows(tmp_path / "d.jsonl", [("1?", "1"), ("2?", "2"), ("1? ", "9")])
    args = srt.parse_arguments(["--model", "m", "--dataset", "d", "--eval-only"])
    problems, counts = common.load_problems(args, str(path))
    assert [*problems.values()] == [("1?", "1"), ("2?", "2")] and counts["duplicates"] == 1


# ----------------------------------------------------------------------------- the evaluation set


def test_losses_of_the_evaluation_set_are_counted(base, data, tmp_path):
    """Incomplete, twice, too long, with names of their own beside those of --dataset."""
    rows = [(f"{n}?", "1") for n in range(5)] + [("0? ", "1"), ("", "1"), ("z" * 300, "1")]
    path = save_rows(tmp_path / "eval.jsonl", [*rows, ("5?", None)])
    task = task_of(
        srt, *FLAGS, "--eval-problems", "50", model=base, dataset=data, eval_dataset=path
    )
    assert len(task.held_out) == 5
    counts = {k: v for k, v in task.counts.items() if k.startswith("eval_")}
    assert counts == dict(eval_rows=9, eval_incomplete=2, eval_duplicates=1, eval_too_long=1)
    assert task.counts["rows"] == 60 and task.counts["held_out"] == 5


def test_problems_of_the_evaluation_set_are_never_trained_on(base, data, tmp_path):
    """Whatever blanks they have."""
    path = save_rows(tmp_path / "eval.jsonl", [(x + "  ", y) for x, y in ROWS[:15]])
    flags = dict(model=base, dataset=data, eval_dataset=path, eval_problems=15)
    task = task_of(sdzero, *FLAGS, **flags)
    assert keys(task.held_out) == {key_of(x) for x, _ in ROWS[:15]}
    assert keys(task.problems) == {key_of(x) for x, _ in ROWS[15:]}


def test_each_data_set_has_its_own_split_and_configuration(base, tmp_path):
    """FOLDER@SPLIT and NAME:CONFIG@SPLIT; without one, "train" and, to evaluate, "test"."""
    for name, rows in (("train", ROWS[:30]), ("test", ROWS[30:40]), ("validation", ROWS[40:45])):
        save_rows(tmp_path / "set" / f"{name}.jsonl", rows)
    flags = [*FLAGS, "--model", base, "--eval-problems", "60", "--dataset", tmp_path / "set"]
    for split, count in (("", 10), ("@validation", 5), ("@test", 10)):
        task = task_of(sdzero, *flags, "--eval-dataset", f"{tmp_path / 'set'}{split}")
        assert (len(task.held_out), len(task.problems)) == (count, 30)
    asked = []
    with pytest.MonkeyPatch.context() as patch:
        table = datasets.Dataset.from_dict({"problem": ["1?"]})
        load = lambda *names, split: asked.append((*names, split)) or table  # noqa: E731
        patch.setattr(datasets, "load_dataset", load)
        common.load_rows("openai/gsm8k:main@test[:9]", "train")
        common.load_rows("HuggingFaceH4/MATH-500", "test")
    assert asked == [
        ("openai/gsm8k", "main", "test[:9]"),
        ("HuggingFaceH4/MATH-500", None, "test"),
    ]


# --------------------------------------------------------------------------------- rows and answers


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_other_data_files_and_columns(suffix, base, tmp_path):
    columns = {"question": [f"{i}?" for i in range(20)], "solution": list(range(20))}
    table = datasets.Dataset.from_dict({**columns, "other": ["x"] * 20})
    path = tmp_path / f"p.{suffix}"
    getattr(table, f"to_{suffix}")(path)
    task = task_of(srt, *FLAGS, "--verifier", "math", model=base, dataset=path)
    problems = task.problems + task.held_out
    assert {(p.text, p.answer) for p in problems} <= {(f"{i}?", str(i)) for i in range(20)}
    flags = ["--problem-column", "other", "--answer-column", "question"]
    assert task_of(srt, *FLAGS, *flags, model=base, dataset=path, eval_problems=0).problems


# verifier: rows whose third is of another form, each with what the message names
MALFORMED = {
    "math": [["5"], {"answer": 5}, True, [], {}],
    "code": [
        "assert f(1) == 2",
        "[1",
        ["assert f(1) =="],
        {"inputs": ["1"], "outputs": ["2"]},
        [{"input": "1"}],
        [{"input": 1, "output": "1"}],
        [1],
        5,
        True,
    ],
}
GOOD_ANSWERS = {"math": "5", "code": ["assert f(1) == 2"]}
CASES = [(name, i) for name, bad in MALFORMED.items() for i in range(len(bad))]


@pytest.mark.parametrize("name, case", CASES)
def test_a_malformed_answer_is_found_before_the_first_sample(
    name,
    case,
    base,
    tmp_path,
    ended,
):
    """One line that names the row; nothing is written. Catches reward 0 for ever, and tracebacks
    hours later."""
    bad, good = MALFORMED[name][case], GOOD_ANSWERS[name]
    rows = {"problem": ["1?", "2?", "3?", "4?"], "answer": [good, good, bad, good]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_rows", lambda *rest: rows)
        flags = dict(model=base, dataset="x", verifier=name, output=tmp_path / "out")
        code, _, err = ended(srt, *FLAGS, "--eval-problems", "1", **flags)
    if bad in ([], {}):  # no answer at all
        assert code in (0, 2) and "Traceback" not in err
    else:
        assert code == 2 and f"srt.py: row 3 of x, for --verifier {name}: " in err, err
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "answer", [date(2026, 1, 2), Decimal("1.50"), b"12"], ids=lambda x: type(x).__name__
)
@pytest.mark.parametrize("verify", ["math", "tiny:odd"])
def test_answers_that_json_cannot_hold(answer, verify, base, tmp_path, ended):
    """From Parquet: found at once, not after the first chunk of traces."""
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_dict({"problem": ["1?", "2?"], "answer": [answer] * 2}).to_parquet(path)
    flags = dict(model=base, dataset=path, verifier=verify, output=tmp_path / "out")
    code, _, err = ended(srt, *FLAGS, "--eval-problems", "1", **flags)
    assert code == 2 and f"row 1 of {path}, for --verifier {verify}: " in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("answer", ["5", 5, 5.5, "\\boxed{5}"])
def test_numbers_are_answers_too(answer, base, tmp_path):
    rows = {"problem": ["1?", "2?"], "answer": [answer] * 2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_rows", lambda *rest: rows)
        flags = dict(model=base, dataset="x", verifier="math", eval_problems=0)
        task = task_of(sdzero, *FLAGS, **flags)
    assert {p.answer for p in task.problems} == {str(answer)}
    assert task.verify_all([f"The answer is {answer}"], [str(answer)]) == [1]


def test_a_long_field_of_a_csv_file_is_read(tmp_path):
    """The csv module by itself takes at most 131,072 characters."""
    (tmp_path / "a.csv").write_text("problem,answer\n" + "1" * 140_000 + "x,2\n")
    assert common.load_rows(str(tmp_path / "a.csv"), "train")["answer"] == ["2"]


def test_the_cause_of_a_broken_file_is_named(base, tmp_path, ended):
    """Not the library's "An error occurred while generating the dataset"."""
    (tmp_path / "a.jsonl").write_text('{"problem": "1", "answer": "1"}\n{"problem": \n')
    (tmp_path / "b.jsonl").write_text('{"problem": "1", "answer": "1"}\n', encoding="utf-16")
    (tmp_path / "c.parquet").write_text("no parquet")
    (tmp_path / "d.csv").write_text('problem,answer\n"1,2\n')
    for name in ("a.jsonl", "b.jsonl", "c.parquet"):
        code, _, err = ended(srt, *FLAGS, model=base, dataset=tmp_path / name)
        assert code == 2 and err.startswith(f"srt.py: cannot load the data set {tmp_path / name}: ")
        assert "generating the dataset" not in err and len(err) > 90, err


def answers_of(path):
    """The gold answers that a custom verifier would get."""
    args = srt.parse_arguments(["--model", "x", "--dataset", "x", "--verifier", "tiny:odd"])
    return [answer for _, answer in common.load_problems(args, str(path))[0].values()]


def test_text_is_read_as_it_was_written(tmp_path):
    """The library guesses types: 007 became 7, a date a datetime, a long number a float."""
    written = ["007", "1.50", "2020-01-01", "12345678901234567", "3/4", "NA", "true"]
    csv_rows = "".join(f"{i}?,{text}\n" for i, text in enumerate(written))
    (tmp_path / "a.csv").write_text("problem,answer\n" + csv_rows)
    assert answers_of(tmp_path / "a.csv") == written
    objects = [{"problem": f"{i}?", "answer": text} for i, text in enumerate(written)]
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, objects)))
    (tmp_path / "a.json").write_text(json.dumps(objects, indent=1))
    assert answers_of(tmp_path / "a.jsonl") == answers_of(tmp_path / "a.json") == written
    mixed = [5, "5", 2.5, 12345678901234567890, "2020-01-01"]
    objects = [{"problem": f"{i}?", "answer": x} for i, x in enumerate(mixed)]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, objects)), encoding="utf-8-sig")
    assert answers_of(tmp_path / "b.jsonl") == mixed
    (tmp_path / "b.csv").write_text('problem,answer\n"a\nb\u2028c, ""d""",1\n')
    assert common.load_rows(str(tmp_path / "b.csv"), "")["problem"] == ['a\nb\u2028c, "d"']


@pytest.mark.parametrize(
    "text",
    ['{"problem": "1?",\n "answer": "1"}\n\n{"problem": "2?", "answer": "2"}',
     '[{"problem": "1?", "answer": "1"}]\n[{"problem": "2?", "answer": "2"}]',
     '[\r\n {"problem": "1?", "answer": "1"},\r\n {"problem": "2?", "answer": "2"}\r\n]',
     '{"problem": "1?", "answer": "1"}{"problem": "2?", "answer": "2"}\r'],
)  # fmt: skip
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_objects_in_any_order_of_lines(text, suffix, tmp_path):
    (tmp_path / f"a.{suffix}").write_bytes(text.encode())
    assert answers_of(tmp_path / f"a.{suffix}") == ["1", "2"]


@pytest.mark.parametrize(
    "name, text, line",
    [
        ("a.csv", 'problem,answer\n"a\nb",1\n\n"c" d,2\n', "line 5: "),
        ("a.csv", 'problem,answer\n"a\nb",1\n\nc,2,3\n', "line 5: more fields"),
        ("a.csv", "problem,answer,answer\na,1,2\n", "two columns have one name"),
        ("a.json", '[{"problem": "1"}, 5]', "line 1: must be a JSON object"),
        ("a.jsonl", '{"problem": "1"}\n{"problem": "2",}\n', "line 2: "),
        ("a.jsonl", '{"problem": "1"}\n\n{"answer": ' + "1" * 5000 + "}", "line 3: Exceeds the"),
        ("a.jsonl", '{"problem": "1"}\n' + "[" * 100_000, "line 2: maximum recursion"),
    ],
)
def test_the_line_of_a_broken_file(name, text, line, tmp_path, capsys):
    (tmp_path / name).write_text(text)
    with pytest.raises(SystemExit) as end:
        common.load_rows(str(tmp_path / name), "train")
    assert end.value.code == 2 and line in capsys.readouterr().err


def test_a_parquet_file_is_no_pattern(tmp_path):
    """train[1].parquet was the name of train1.parquet."""
    for name in ("train[1]", "train1"):
        table = datasets.Dataset.from_dict({"problem": ["1?"], "answer": [name]})
        table.to_parquet(tmp_path / f"{name}.parquet")
    assert answers_of(tmp_path / "train[1].parquet") == ["train[1]"]


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_a_changed_file_is_read_again(suffix, tmp_path):
    """Whatever its time stamp, as after cp -p; the library takes its copy by that."""
    path = tmp_path / f"rows.{suffix}"
    for answer in ("1", "333"):
        table = datasets.Dataset.from_dict({"problem": ["1?"], "answer": [answer]})
        getattr(table, f"to_{suffix}")(path)
        os.utime(path, (1e9, 1e9))
        assert answers_of(path) == [answer]


@pytest.mark.parametrize("kind", ["float16", "float32"])
def test_short_floats_of_a_parquet_file_have_their_own_digits(kind, tmp_path):
    """0.1 in float32 is 0.10000000149011612: no response would ever be right."""
    values, features = [0.1, 2.7, None, 2.0**13 + 8], {"problem": "string", "answer": kind}
    features = datasets.Features({name: datasets.Value(x) for name, x in features.items()})
    table = datasets.Dataset.from_dict(
        {"problem": ["a", "b", "c", "d"], "answer": values}, features
    )
    table.to_parquet(tmp_path / "a.parquet")
    assert answers_of(tmp_path / "a.parquet") == [0.1, 2.7, 8200]


def test_a_problem_that_is_no_text_is_named(base, tmp_path, ended):
    """Half of a surrogate pair is no character: it was a traceback."""
    (tmp_path / "a.jsonl").write_text(
        '{"problem": "1", "answer": "1"}\n{"problem": "\\ud800", "answer": "1"}\n'
    )
    code, _, err = ended(srt, *FLAGS, model=base, dataset=tmp_path / "a.jsonl")
    assert code == 2 and "row 2 of" in err and "surrogates" in err


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_a_file_without_rows_is_empty(suffix, base, tmp_path, ended):
    rows = datasets.Dataset.from_dict({"problem": [], "answer": []})
    getattr(rows, f"to_{suffix}")(path := tmp_path / f"rows.{suffix}")
    code, _, err = ended(srt, *FLAGS, model=base, dataset=path)
    assert (code, err) == (2, f"srt.py: the data set {path} is empty\n")


# ------------------------------------------------------------------------------ prompts, tokenizers


@pytest.mark.parametrize("adds", ["", "bos", "eos", "bos eos"])
def test_a_prompt_template_with_every_kind_of_tokenizer(adds, tmp_path):
    """A BOS where the tokenizer wants one, once; never an EOS, behind which every response would be
    sampled."""
    tokenizer = make_tokenizer(adds=adds)
    lm = common.LM(None, tokenizer, {0}, 99, 256)
    args = srt.parse_arguments(["--model", "m", "--dataset", "d"])
    args.prompt_suffix, bos = " Think.", "<|user|>"
    for template in ("Q: {problem}\nA:", bos + "Q: {problem}\nA:"):
        args.prompt_template = template
        text = tokenizer.decode(common.render(lm, "1+1", args))
        wanted = bos if "bos" in adds or template.startswith(bos) else ""
        assert text == wanted + "Q: 1+1 Think.\nA:"
    assert lm.phrase_ids("No.") == tokenizer.convert_tokens_to_ids(list("\n\nNo.\n\n"))


def test_a_chat_template_renders_the_users_side_only(base):
    """Its switches reach it, and what the tokenizer adds elsewhere does not."""
    args = srt.parse_arguments(["--model", "m", "--dataset", "d"])
    args.prompt_template, args.prompt_suffix = "", " Think."
    args.template_kwargs = {"mark": "#"}
    for adds in ("", "bos eos"):
        lm = common.LM(None, make_tokenizer(adds=adds), {0}, 99, 256)
        text = lm.tokenizer.decode(common.render(lm, "1+1", args))
        assert text == "<|user|>1+1 Think.<|im_end|><|assistant|>#"


DATES = {
    "%d %b %Y": "01 Jan 2026",
    "%Y-%m-%d": "2026-01-01",
    "%B %-d, %Y": "January 1, 2026",
    "%A, %d/%m/%y": "Thursday, 01/01/26",
}


@pytest.mark.parametrize("form", DATES)
def test_a_template_that_shows_the_date_always_shows_the_same_one(form):
    """Catches prompts that change from one day to the next. Templates ask whether the function is
    there; blanks and lines around it stay as they are."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "\n  {%- if strftime_now is defined %}\n  {%- set day = strftime_now('" + form + "') %}\n"
        "  {%- endif %} {{ day }}\n{{ messages[0].content }}"
    )
    lm = common.LM(None, tokenizer, {0}, 99, 256)
    args = srt.parse_arguments(["--model", "m", "--dataset", "d"])
    args.prompt_template, args.prompt_suffix, args.template_kwargs = "", "", {}
    text = tokenizer.decode(common.render(lm, "1+1", args))
    plain = tokenizer.chat_template.replace(f"strftime_now('{form}')", f"'{DATES[form]}'")
    plain = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+1"}],
        chat_template=plain,
        add_generation_prompt=True,
        tokenize=False,
    )
    assert text == plain and DATES[form] in text


def test_texts_are_decoded_without_clean_up():
    """Tokenizers that ask for it would turn "1 != 2" into "1!= 2" before the verifier reads it."""
    tokenizer = make_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    lm = common.LM(None, tokenizer, {0}, 99, 256)
    for text in ("1 != 2", "a , b .", "x ' s , y ?"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert lm.text(ids + [0]) == text


def test_stop_tokens_end_responses_and_are_remembered(base, data, tmp_path):
    """A token that the model's configuration does not know as EOS; the second stage needs no
    flag, and another one is refused."""
    stops, out = "a b c d e f 1 2 3 <|user|>", tmp_path / "out"
    ids = set(make_tokenizer().convert_tokens_to_ids(stops.split()))
    few = ["--eval-problems", "0", "--max-new-tokens", "20", "--problems", "12", "--epochs", "1"]
    call(srt, *FLAGS, *few, "--stop-tokens", stops, model=base, dataset=data, output=out)
    traces = [json.loads(line) for line in open(out / "traces.jsonl")]
    ends = {t["revision_ids"][-1] for t in traces if t["finished"]}
    assert len(ends & ids) > 1 and ends <= ids | {0}
    assert all(not (ids | {0}) & set(t["revision_ids"][:-1]) for t in traces)
    task = task_of(sdzero, *FLAGS, model=out, dataset=data)
    assert task.lm.eos_ids == ids | {0}
    saved = AutoModelForCausalLM.from_pretrained(out).generation_config
    assert saved.eos_token_id == sorted(ids | {0})  # for whoever samples from the output
    with pytest.raises(SystemExit):
        task_of(sdzero, *FLAGS, "--stop-tokens", "a", model=out, dataset=data)


@pytest.mark.parametrize("eos, ends", [(5, {0, 5}), ([5, 7], {0, 5, 7})])
def test_every_eos_of_the_generation_config_ends_responses(eos, ends, base, data, tmp_path):
    """Besides the tokenizer's own: Llama 3 has three, of which its tokenizer names one."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.eos_token_id = eos
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    assert task_of(srt, *FLAGS, model=tmp_path, dataset=data).lm.eos_ids == ends


def test_the_prompt_is_inherited_and_contradictions_are_refused(base, data, tmp_path, ended):
    """Every flag of the prompt: as stage 1 had it unless --force is given; nothing of it is lost on
    the way through a second stage."""
    out, two = tmp_path / "one", tmp_path / "two"
    prompt = {
        "prompt_suffix": " Think.",
        "template_kwargs": '{"mark": "#"}',
        "phrase_wrong": "No.",
        "phrase_right": "Yes.",
    }
    few = ["--problems", "12", "--eval-problems", "1", "--epochs", "1"]
    call(srt, *FLAGS, *few, model=base, dataset=data, output=out, **prompt)
    call(sdzero, *FLAGS, *few[:4], model=out, dataset=data, output=two)
    expected = {**prompt, "template_kwargs": {"mark": "#"}, "prompt_template": ""}
    for folder in (out, two):
        saved = read(folder / "srt.json")["prompt"]
        assert expected.items() <= saved.items()
    given = [*prompt.items(), ("prompt_template", "{problem}"), ("prompt_suffix", "")]
    for name, value in given:
        other = value.replace("#", "!").replace(".", "!")
        flags = {name: other, "model": two, "dataset": data}
        code, _, err = ended(sdzero, *FLAGS, **flags, output=tmp_path / "no")
        assert code == 2 and f"--{name.replace('_', '-')} is" in err, err
    task = task_of(sdzero, *FLAGS, "--force", phrase_wrong="Hm.", model=two, dataset=data)
    assert task.lm.tokenizer.decode(task.problems[0].prompt_ids).endswith(
        "Think.<|im_end|><|assistant|>#"
    )


# ------------------------------------------------------------- what is certain to fail, and no-ops

CONFIGS = {
    "a negative padding id": {"pad_token_id": -1},
    "top-k without sampling": {"top_k": 5, "do_sample": False},
    "a temperature without sampling": {"temperature": 0.6, "do_sample": False},
    "top-p without sampling": {"top_p": 0.9},
    "a valid one": {"temperature": 0.6, "do_sample": True},
    "none": None,
}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_model_with_any_generation_config_can_be_saved(config, name, base, data, tmp_path, capfd):
    """Saved again, with its EOS; a valid configuration stays as it is, and one that had no sampling
    gets none."""
    folder, out, content = tmp_path / "model", tmp_path / "out", CONFIGS[config]
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    path = folder / "generation_config.json"
    if content is None:
        path.unlink()
    else:
        path.write_text(json.dumps({"eos_token_id": 0, **content}))
    few = ["--problems", "8", "--eval-problems", "0", "--batch-size", "8"]
    call(SCRIPTS[name], *FLAGS, *few, model=folder, dataset=data, output=out)
    saved = AutoModelForCausalLM.from_pretrained(out).generation_config
    assert saved.eos_token_id == 0
    assert bool(saved.do_sample) == bool(content and content.get("do_sample"))
    if config == "a valid one":
        assert saved.temperature == 0.6 and "generation config" not in capfd.readouterr().err


MODIFIED = {"pad_token_id": -1, "top_k": 5, "max_new_tokens": 0, "early_stopping": 7}


@pytest.mark.parametrize("name", MODIFIED)
def test_a_generation_config_that_cannot_be_saved_is_replaced_at_once(
    name, base, data, tmp_path, ended
):
    """transformers refuses to save one that was changed after loading: a warning with the cause
    comes before the first sample, and the model is there in the end."""
    load, out = AutoModelForCausalLM.from_pretrained, tmp_path / "out"

    def changed(*args, **rest):
        model, loaded = load(*args, **rest)
        setattr(model.generation_config, name, MODIFIED[name])
        return model, loaded

    few = ["--problems", "8", "--eval-problems", "0", "--batch-size", "8"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AutoModelForCausalLM, "from_pretrained", changed)
        code, _, err = ended(sdzero, *FLAGS, *few, model=base, dataset=data, output=out)
    assert code == 0 and f"`{name}`" in err.replace("'", "`"), err
    assert AutoModelForCausalLM.from_pretrained(out).generation_config.eos_token_id == 0


def test_a_stage_2_in_which_no_response_fits_twice_is_refused(tmp_path, data, ended):
    """Before the first sample, when even the shortest response cannot fit; both phrases count, and
    what --skip-first leaves."""
    base = save_model(tmp_path / "short", n_positions=60, max_position_embeddings=60)
    flags = dict(model=base, dataset=data, output=tmp_path / "out", eval_problems=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "generate", None)  # nothing is sampled
        long = dict(phrase_wrong="x" * 50, phrase_right="y" * 50)
        code, _, err = ended(sdzero, *FLAGS, **flags, **long)
        assert code == 2 and "no response fits twice" in err
        skip = dict(skip_first=8)
        code, _, err = ended(sdzero, *FLAGS, **flags, **skip)
        assert code == 2 and "--skip-first leaves nothing" in err
        both = dict(skip_first=7, phrase_wrong="x" * 36, phrase_right="y" * 36)
        code, _, err = ended(sdzero, *FLAGS, **flags, **both)
        assert code == 2 and "no response fits twice" in err
        code, _, err = ended(srt, *FLAGS, **flags, **long)
        assert code == 2 and "no attempt can be revised" in err
    assert not (tmp_path / "out").exists()


def test_a_run_that_trained_on_no_token_does_not_say_saved(base, data, tmp_path, ended):
    """All responses are dropped, which was not certain before: exit code 1, no model."""
    flags = ["--drop-truncated", "--problems", "4", "--eval-problems", "0", "--batch-size", "2"]
    out = tmp_path / "out"

    def cut_off(model, prompts, *, max_new_tokens, **rest):
        return [Rollout([5] * max_new_tokens, [-1.0] * max_new_tokens, False) for _ in prompts]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "generate", cut_off)
        code, stdout, err = ended(sdzero, *FLAGS, *flags, model=base, dataset=data, output=out)
    assert code == 1 and "sdzero.py: not one token was trained on" in err
    assert "saved" not in stdout and not (out / "config.json").exists()
    assert [x["loss_tokens"] for x in log_of(out, "train")] == [0, 0]


@pytest.mark.parametrize("name", ["runs/str", "./runs/str", "/nowhere/model", "a/b/c", "~/model"])
@pytest.mark.parametrize("script", SCRIPTS.values())
def test_a_mistyped_folder_is_not_looked_up_on_the_hub(
    name,
    script,
    tmp_path,
    ended,
    monkeypatch,
):
    """Without a network that takes more than a minute, and ends in a word about the hub."""

    def lookup(*args, **rest):
        raise AssertionError(f"a look at the network: {args[:2]}")

    (tmp_path / "runs" / "srt").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    code, _, err = ended(script, model=name, dataset="x.jsonl")
    assert code == 2 and err == f"{script.__name__}.py: no such model folder: {name}\n"


def test_a_model_that_may_be_of_the_hub_is_also_called_no_folder(tmp_path, ended, monkeypatch):
    def offline(*args, **rest):
        raise OSError("we are offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common.transformers.utils, "cached_file", lambda *args, **rest: None)
    monkeypatch.setattr(common.transformers.AutoTokenizer, "from_pretrained", offline)
    code, _, err = ended(srt, model="some/model", dataset="x.jsonl")
    assert code == 2 and "no such folder is here" in err and "we are offline" in err
