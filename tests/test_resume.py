"""Runs that are killed and go on: at every file operation, with changed flags, in moved folders.

A run that goes on must end as if nothing had happened: the log (without clock times), the traces
and the weights, byte for byte.
"""

import copy
import dataclasses
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from test_scripts import (
    FLAGS,
    ROWS,
    STAGE_1,
    STAGE_2,
    lines_of,
    log_of,
    read,
    save_model,
    save_rows,
)
from test_training import OnGPU
from tiny import CHAT_TEMPLATE, as_flags, call, make_tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import common
import sdzero
import srt
from rollout import Rollout

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
import baselines

transformers.utils.logging.disable_progress_bar()
ROOT = Path(__file__).resolve().parents[1]
SMALL = shlex.split(
    "--verifier tiny:odd --eval-problems 2 --eval-samples 1 --eval-every 2 --save-every 1 "
    "--max-new-tokens 4 --lr 1e-2 --dtype float32 --device cpu --phrase-wrong No. --phrase-right "
    "Yes. --warmup 1"
)
OWN = {
    "srt": shlex.split("--problems 6 --batch-size 2 --epochs 1"),
    "sdzero": shlex.split("--problems 6 --batch-size 2 --teacher ema --teacher-rate 0.3"),
}
SCRIPTS = {"srt": srt, "sdzero": sdzero}


copytree = shutil.copytree  # the real one


class Snapshots:
    """What kill -9 leaves behind: a copy of the run's folder before each of its file operations,
    or, if torn, when that operation is half done."""

    def __init__(self, monkeypatch, out, copies, torn):
        self.out, self.copies, self.torn, self.names = out, copies, torn, []
        for owner, name, half in (
            (os, "replace", None),
            (os, "rename", None),
            (shutil, "move", None),
            (shutil, "copytree", half_copied),
            (shutil, "rmtree", half_removed),
            (Path, "write_text", half_written),
            (Path, "unlink", None),
            (Path, "mkdir", None),
            (PreTrainedModel, "save_pretrained", half_saved),
            (PreTrainedTokenizerBase, "save_pretrained", half_saved),
            (common.torch, "save", lambda state, path: path.write_bytes(b"PK")),
            (common.Run, "log", self.half_logged),
        ):
            self.patch(monkeypatch, owner, name, half)
        monkeypatch.setattr(common, "open", open, raising=False)
        self.patch(monkeypatch, common, "open", None)

    def patch(self, monkeypatch, owner, name, half):
        real = getattr(owner, name)

        def operation(*args, **rest):
            if any(isinstance(x, str | Path) and self.out in Path(x).parents for x in args) or (
                name in ("log", "mkdir") and self.out in (args[0], getattr(args[0], "folder", None))
            ):
                self.take(name, half, args)
            return real(*args, **rest)

        monkeypatch.setattr(owner, name, operation)

    def take(self, name, half, args):
        self.names.append(name)
        copy = self.copies / str(len(self.names))
        if self.out.exists():
            copytree(self.out, copy)
        if self.torn and half:
            half(*(self.moved(x, copy) for x in args))

    def moved(self, x, copy):
        inside = isinstance(x, str | Path) and self.out in Path(x).parents
        return copy / Path(x).relative_to(self.out) if inside else x

    def half_logged(self, run, kind, step, values):
        line = json.dumps({"kind": kind, "step": step, **values})
        with open(self.copies / str(len(self.names)) / "metrics.jsonl", "a") as file:
            file.write(line[: len(line) // 2])


def half_removed(folder, **rest):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files[: len(files) // 2 + 1]:
        os.remove(path)


def half_copied(source, target, **rest):
    copytree(source, target, dirs_exist_ok=True)
    half_removed(target)


def half_written(path, text):
    with open(path, "w") as file:
        file.write(text[: len(text) // 2])


def half_saved(self, folder):
    os.makedirs(folder, exist_ok=True)
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        half_written(folder / name, '{"half": ')


def sampled(model, prompts, *, max_new_tokens, eos_token_ids, seed, **rest):
    """In the place of the sampler, which would take most of the time: random ids by the seed."""
    responses, eos = [], min(eos_token_ids)
    for _, own in zip(prompts, seed):
        generator = torch.Generator().manual_seed(own)
        ids = torch.randint(4, 90, (max_new_tokens,), generator=generator).tolist()
        finished = ids[0] % 2 == 0
        ids[-1] = eos if finished else ids[-1]
        responses.append(Rollout(ids, [-1.0] * len(ids), finished))
    return responses


ROWS_BY = {name: [row[i] for row in ROWS[:20]] for i, name in enumerate(("problem", "answer"))}


def ending(folder):
    """All that a run leaves behind, by name."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl":
            found[name] = lines_of(path)
        elif name == "settings.json":
            settings = read(path)
            for part in ("started", "flags"):  # other names of places
                settings.pop(part)
            found[name] = settings
        elif path.is_file() and path.name != "README.md":
            found[name] = path.read_bytes()
    return found


def resume(script, *flags, **named):
    """--resume of a run that may be complete: then the program ends at once, with code 0."""
    try:
        call(script, *flags, resume=True, **named)
    except SystemExit as end:
        assert end.code == 0


def assert_same_ending(folder, expected):
    found = ending(folder)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small model; its tokenizer has several chat templates, which are saved as a folder."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": CHAT_TEMPLATE}
    sizes = dict(n_embd=16, num_hidden_layers=1, n_head=2, n_inner=16)
    save_model(folder / "base", tokenizer=tokenizer, **sizes)
    assert (folder / "base" / "additional_chat_templates").is_dir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_rows", lambda *rest: ROWS_BY)
        call(srt, *SMALL, *OWN["srt"], model=folder / "base", dataset="x", output=folder / "srt")
    return {"srt": folder / "base", "sdzero": folder / "srt"}


@pytest.fixture
def quick(monkeypatch):
    """What has nothing to do with the run's folder, replaced by something faster."""
    loaded, load = {}, common.load_lm

    def load_lm(args):
        if args.model not in loaded:
            loaded[args.model] = load(args)
        return copy.deepcopy(loaded[args.model])

    monkeypatch.setattr(common, "load_lm", load_lm)
    monkeypatch.setattr(common, "load_rows", lambda *rest: ROWS_BY)
    monkeypatch.setattr(common, "generate", sampled)
    monkeypatch.setattr(srt, "PROBLEMS_AT_ONCE", 3)


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_at_every_file_operation(name, torn, small, quick, tmp_path, monkeypatch):
    """The sweep: whatever was done last, and whether it was done half, the run goes on and ends
    like one that nobody touched. (A run without settings.json has done nothing: it starts again.)
    """
    script, whole, copies = SCRIPTS[name], tmp_path / "whole", tmp_path / "copies"
    flags = [*SMALL, *OWN[name], "--model", small[name], "--dataset", "x"]
    with monkeypatch.context() as patch:
        snapshots = Snapshots(patch, whole, copies, torn)
        call(script, *flags, output=whole)
    expected, failed = ending(whole), []
    steps = [x["step"] for x in expected["metrics.jsonl"] if x["kind"] == "train"]
    assert len(steps) >= 3 and len(snapshots.names) > 40
    for n, operation in enumerate(snapshots.names, 1):
        out = copies / str(n)
        again = resume if (out / "settings.json").exists() else call
        try:
            again(script, *flags, output=out)
            assert_same_ending(out, expected)
        except (Exception, SystemExit) as error:
            failed.append((n, operation, repr(error)[:300]))
    assert failed == []


# ------------------------------------------------------------- what may change, and what may not


@pytest.fixture
def stopped(small, quick, tmp_path, monkeypatch):
    """Runs of both stages that were killed in their third step: stopped(name) -> folder, flags."""

    def make(name, *more):
        folder = tmp_path / name
        flags = [*SMALL, *OWN[name], "--model", small[name], "--dataset", "x", *more]
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(common.Run, "log", killed_after(3))
            call(SCRIPTS[name], *flags, output=folder)
        return folder, flags

    return make


class Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


def killed_after(last, of="train"):
    log = common.Run.log

    def killed(run, kind, step, values):
        log(run, kind, step, values)
        if (kind, step) == (of, last):
            raise Killed

    return killed


def without_dropout(folder, copy):
    """Dropout depends on how a step is cut into micro-batches."""
    shutil.copytree(folder, copy)
    config = read(copy / "config.json")
    config.update(attn_pdrop=0, embd_pdrop=0, resid_pdrop=0)
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def notes_of(folder):
    return [line["changed"] for line in log_of(folder, "note")]


FREE = "--micro-tokens 9 --gradient-checkpointing --save-every 2 --eval-every 1"


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_changes_memory_saving_and_logging_may_change(name, stopped, small, tmp_path):
    """The advice of the messages (less --micro-tokens, say) is taken by --resume, without a note;
    results are the same up to rounding."""
    model = without_dropout(small[name], tmp_path / "model")
    folder, flags = stopped(name, "--model", model)
    whole = shutil.copytree(folder, folder.with_name("whole"))
    call(SCRIPTS[name], *flags, output=whole, resume=True)
    call(SCRIPTS[name], *flags, *shlex.split(FREE), output=folder, resume=True)
    a, b = (log_of(path, "train") for path in (whole, folder))
    assert [x["step"] for x in a] == [x["step"] for x in b]
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], rel=1e-4)
    assert notes_of(folder) == []


def test_rate_and_slots_may_change_with_a_note(stopped):
    """The note says what was; a second --resume with the new flags adds no other."""
    folder, flags = stopped("sdzero")
    resume(sdzero, *flags, "--lr", "1e-5", "--slots", "3", output=folder)
    (slots, rate) = sorted(notes_of(folder), reverse=True)
    assert slots.startswith("--slots was") and rate == "--lr was 0.01"
    rates = [x["lr"] for x in log_of(folder, "train")]
    assert rates == pytest.approx([1e-2, 1e-2, 1e-5])
    before = ending(folder)
    resume(sdzero, *flags, "--lr", "1e-5", "--slots", "3", output=folder)
    assert_same_ending(folder, before)


@pytest.mark.parametrize("name", SCRIPTS)
def test_slots_on_a_gpu_are_those_that_the_run_began_with(name, small, stopped, monkeypatch, capfd):
    """Also on a card with more room; with less they are fewer, and a note says so. More sequences
    fit until there is an optimizer. Each number is shown."""
    used, sampler, fit = [], common.generate, common.fit_memory

    def generate(model, prompts, *, slots, **settings):
        used.append((max(map(len, prompts)) + settings["max_new_tokens"], slots))
        return sampler(model, prompts, **settings)

    def fit_memory(lm, *rest):
        fit(dataclasses.replace(lm, model=OnGPU(lm.model)), *rest)

    def sampled_on(memory, run):
        """[(tokens of the longest sequence, slots)] of each call of the sampler"""
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory, memory))
        used.clear()
        found = run()
        return found, used.copy(), capfd.readouterr().out

    monkeypatch.setattr(common, "generate", generate)
    monkeypatch.setattr(common, "fit_memory", fit_memory)
    monkeypatch.setattr(common, "cache_bytes_per_token", lambda model: 1000)
    (folder, flags), first, out = sampled_on(10**6, lambda: stopped(name))
    model = AutoModelForCausalLM.from_pretrained(small[name])
    weights = 4 * sum(p.numel() for p in model.parameters())
    standing = {"srt": 3, "sdzero": 4}[name] * weights  # with two moments, and a teacher
    early = {"srt": 6, "sdzero": 0}[name]  # calls before: evaluation 0, two chunks of traces
    assert len(first) > early
    for i, (longest, slots) in enumerate(first):
        there = weights if i < early else standing
        assert slots == (900_000 - there) // (1000 * longest) and f"  slots {slots}\n" in out

    copies = [shutil.copytree(folder, folder.with_name(str(n))) for n in range(3)]
    rest = []
    for memory, output in zip((10**6, 2 * 10**6, 6 * 10**5), copies):
        _, slots, _ = sampled_on(
            memory, lambda output=output: call(SCRIPTS[name], *flags, output=output, resume=True)
        )
        rest.append(slots)
    assert rest[0] and rest[0] == rest[1] and not notes_of(copies[1])
    assert all(few < many for (_, few), (_, many) in zip(rest[2], rest[0], strict=True))
    assert any(note.startswith("training_bytes was") for note in notes_of(copies[2]))
    budgets = [read(copy / "settings.json")["flags"]["training_bytes"] for copy in copies]
    assert budgets == [900_000 - standing] * 3  # what a later --resume finds


FIXED = {
    "srt": "--seed 1;--revisions 2;--temperature 0.5;--terms revision;--epochs 2;--top-p 0.5",
    "sdzero": "--seed 1;--alpha 0;--teacher-rate 0.5;--batch-size 3;--max-new-tokens 5;"
    "--warmup 2;--phrase-wrong Nope. --force;--eval-samples 2;--passes 2",
}


# without effect on the result; the last four with a note
MAY_CHANGE = set(
    "micro_tokens gradient_checkpointing save_every eval_every model dataset eval_dataset traces "
    "output device resume slots lr cache_bytes training_bytes".split()
)


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_changes_the_result_is_refused_and_named(name, stopped, ended, capfd):
    """Some by the command line, then each flag, also of baselines.py, by settings.json."""
    folder, flags = stopped(name)
    before = ending(folder)
    for change in FIXED[name].split(";"):
        change = shlex.split(change)
        code, _, err = ended(SCRIPTS[name], *flags, *change, output=folder, resume=True)
        assert code == 2 and f"{change[0]} was" in err, err
    assert_same_ending(folder, before)
    run, refused = SimpleNamespace(folder=folder), set()
    settings = read(folder / "settings.json")
    for flag, *_ in baselines.FLAGS:
        settings["flags"].setdefault(flag.replace("-", "_"))
    (folder / "settings.json").write_text(json.dumps(settings))
    for flag in settings["flags"]:
        try:
            run.args = SimpleNamespace(**{**settings["flags"], flag: "another"})
            common.Run.check_resume(run, settings)
        except SystemExit:
            assert f"--{flag.replace('_', '-')} was" in capfd.readouterr().err
            refused.add(flag)
    assert len(refused) > 30 and refused == settings["flags"].keys() - MAY_CHANGE


@pytest.mark.parametrize("name", SCRIPTS)
def test_folders_may_move_and_the_run_may_start_elsewhere(
    name, stopped, small, tmp_path, monkeypatch
):
    """Model and output under other names, relative to another working directory."""
    folder, _ = stopped(name)
    whole = shutil.copytree(folder, tmp_path / "whole")
    flags = [*SMALL, *OWN[name], "--dataset", "x", "--resume"]
    call(SCRIPTS[name], *flags, model=small[name], output=whole)
    elsewhere = tmp_path / "else" / "where"
    shutil.move(folder, elsewhere / "moved")
    shutil.copytree(small[name], elsewhere / "copy")
    monkeypatch.chdir(elsewhere)
    call(SCRIPTS[name], *flags, model="./copy", output="moved")
    assert_same_ending(elsewhere / "moved", ending(whole))


def test_another_model_other_data_and_other_traces_are_refused(
    stopped,
    small,
    tmp_path,
    monkeypatch,
    ended,
):
    """By content: the names are the same, and one weight, one answer, one trace differ."""
    folder, flags = stopped("sdzero")
    model = AutoModelForCausalLM.from_pretrained(small["sdzero"])
    other = shutil.copytree(small["sdzero"], tmp_path / "other")
    model.transformer.ln_f.weight.data[3] += 0.01
    model.save_pretrained(other)
    code, _, err = ended(sdzero, *flags, "--model", other, output=folder, resume=True)
    assert code == 2 and "--resume needs the model that the run began with" in err

    by_key = sorted(ROWS_BY["problem"], key=common.key_of)
    for changed in (by_key[:1], by_key[2:]):  # one that is held out; those that are not
        answers = [y + "0" * (x in changed) for x, y in ROWS[:20]]
        with monkeypatch.context() as patch:
            patch.setitem(ROWS_BY, "answer", answers)
            code, _, err = ended(sdzero, *flags, output=folder, resume=True)
        assert code == 2 and "--resume needs the problems that the run began with" in err

    collected = dict(collect_only=True, output=tmp_path / "collected")
    call(srt, *SMALL, model=small["srt"], dataset="x", **collected)
    traces = tmp_path / "collected" / "traces.jsonl"
    folder, flags = stopped("srt", "--traces", str(traces), "--epochs", "5")
    lines = traces.read_text().splitlines()
    traces.write_text("\n".join(lines[1:]) + "\n")
    code, _, err = ended(srt, *flags, output=folder, resume=True)
    assert code == 2 and "--resume needs the traces that the run began with" in err


def test_a_chunk_that_is_there_is_not_sampled_again(small, quick, tmp_path, monkeypatch):
    """Killed with the first of two chunks of traces done: --resume samples the second one only,
    with a seed of its own."""
    flags = [*SMALL, *OWN["srt"], "--model", small["srt"], "--dataset", "x"]
    flags += ["--output", tmp_path / "out", "--collect-only"]
    asked, real = [], common.sample_all

    def noted(lm, args, prompts, purpose, **settings):
        asked.extend([purpose] if purpose[0] in ("attempts", "revisions") else [])
        return real(lm, args, prompts, purpose, **settings)

    monkeypatch.setattr(common, "sample_all", noted)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.Run, "log", killed_after(1, "collect"))
        call(srt, *flags)
    assert asked == [("attempts", 0), ("revisions", 0)]
    call(srt, *flags, "--resume")
    assert asked[2:] == [("attempts", 1), ("revisions", 1)]


def test_best_is_gone_with_its_evaluation(small, quick, tmp_path, monkeypatch):
    """Killed after a new best and before the next checkpoint: the log forgets that evaluation, and
    a --resume with another --eval-every may never repeat it."""
    folder, accuracies = tmp_path / "out", {0: 0.9, 1: 0.3, 2: 0.2, 3: 0.6}

    def evaluate(task, step):
        return dict(accuracy=accuracies.get(step, 0.1), accuracy_se=0.01, sample="")

    monkeypatch.setattr(common, "evaluate", evaluate)
    flags = [*SMALL, *OWN["sdzero"], "--model", small["sdzero"], "--dataset", "x"]
    flags += ["--epochs", "2", "--save-every", "2", "--output", folder]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.Run, "log", killed_after(4))
        call(sdzero, *flags, "--eval-every", "1")
    assert (folder / "best").exists() and (folder / "checkpoint-2").exists()
    call(sdzero, *flags, "--eval-every", "100", "--resume")
    assert [x["step"] for x in log_of(folder, "eval")] == [0, 1, 2, 6]
    assert not (folder / "best").exists()


def test_best_is_kept_anew_where_it_was_lost(small, quick, tmp_path, monkeypatch):
    """Step 3 was the best and took the place of step 1; killed there, and sampled again with other
    rounding, it is not: step 5 then beats only what is still there to be kept."""
    folder, accuracies = tmp_path / "out", {1: 0.6, 3: 0.7, 5: 0.55}

    def evaluate(task, step):
        return dict(accuracy=accuracies.get(step, 0.1), accuracy_se=0.01, sample="")

    monkeypatch.setattr(common, "evaluate", evaluate)
    flags = [*SMALL, *OWN["sdzero"], "--model", small["sdzero"], "--dataset", "x"]
    flags += ["--epochs", "2", "--save-every", "2", "--eval-every", "1", "--output", folder]
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(common.Run, "log", killed_after(4))
        call(sdzero, *flags)
    accuracies[3] = 0.5
    kept = []
    save = common.Run.save
    monkeypatch.setattr(
        common.Run, "save", lambda self, name, *rest: kept.append(name) or save(self, name, *rest)
    )
    call(sdzero, *flags, "--resume")
    assert (folder / "best").exists() and kept.count("best") == 2


@pytest.mark.parametrize("last", [0.4, 0.6])
def test_the_best_model_is_kept_beside_a_worse_last_one(last, small, quick, tmp_path, monkeypatch):
    def evaluate(task, step):
        return dict(accuracy={4: 0.5, 6: last}.get(step, 0.1), accuracy_se=0.01, sample="")

    monkeypatch.setattr(common, "evaluate", evaluate)
    flags = [*SMALL, *OWN["sdzero"], "--model", small["sdzero"], "--dataset", "x"]
    call(sdzero, *flags, "--epochs", "2", "--eval-every", "2", "--output", tmp_path / "out")
    assert [x["step"] for x in log_of(tmp_path / "out", "eval")] == [0, 2, 4, 6]
    assert (tmp_path / "out" / "best").exists() == (last < 0.5)


# --------------------------------------------------------------------------- the state of a folder


def test_a_complete_run_stays_as_it_is(stopped):
    """--resume once more, with other flags: nothing is logged, trained or written again."""
    folder, flags = stopped("sdzero")
    call(sdzero, *flags, output=folder, resume=True)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    resume(sdzero, *flags, "--lr", "5", output=folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


CUTS = {
    "half of the last line": lambda text: text[: -len(text.splitlines()[-1]) // 2],
    "the last newline": lambda text: text[:-1],
    "zeros at the end": lambda text: text + "\0" * 50,
    "zeros instead of a line": lambda text: text[:-100] + "\0" * 100,
    "two lines less than the checkpoint knows": lambda text: lines_less(text, 2),
    "half of the file": lambda text: text[: len(text) // 2],
    "everything": lambda text: "",
}


def lines_less(text, n):
    return "\n".join(text.splitlines()[:-n]) + "\n"


@pytest.mark.parametrize("cut", CUTS)
def test_a_torn_log_is_no_dead_end(cut, stopped):
    """The lines that are there stay, those of steps to come are logged, and the file has only
    whole lines. The weights are those of the run with its log."""
    folder, flags = stopped("sdzero")
    whole = shutil.copytree(folder, folder.with_name("whole"))
    call(sdzero, *flags, output=whole, resume=True)
    path = folder / "metrics.jsonl"
    path.write_text(CUTS[cut](path.read_text()))
    call(sdzero, *flags, output=folder, resume=True)
    assert "\0" not in path.read_text()
    found, wanted = lines_of(path), lines_of(whole / "metrics.jsonl")
    assert found[-1] == wanted[-1] and [x for x in wanted if x in found] == found
    weights = "model.safetensors"
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()


def test_a_users_own_files_survive(stopped):
    """checkpoint-3-mine is no checkpoint of ours: neither removed nor resumed from."""
    folder, flags = stopped("sdzero")
    for name in ("checkpoint-3-mine", "checkpoint-best", "my-checkpoint-9", "checkpoint-"):
        (folder / name).mkdir()
        (folder / name / "notes.txt").write_text("mine")
    call(sdzero, *flags, output=folder, resume=True)
    assert len(list(folder.glob("*/notes.txt"))) == 4 and (folder / "config.json").exists()
    assert [x["step"] for x in log_of(folder, "train")] == [1, 2, 3]


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", "settings.json.tmp"]])
def test_a_run_that_was_killed_before_its_settings_starts_again(left, small, quick, tmp_path):
    """It left nothing but a lock and a torn file: a fresh start takes the folder."""
    out = tmp_path / "out"
    out.mkdir()
    for name in left:
        (out / name).write_text('{"fla')
    flags = [*SMALL, *OWN["sdzero"], "--model", small["sdzero"], "--dataset", "x"]
    call(sdzero, *flags, output=out)
    assert (out / "config.json").exists() and not (out / "settings.json.tmp").exists()


def test_two_processes_in_one_folder(stopped, ended):
    """The second one is told so, writes nothing, and the first one ends as usual."""
    folder, flags = stopped("sdzero")
    args = sdzero.parse_arguments(as_flags(flags, dict(output=folder, resume=True)))
    first = common.Run(common.setup(args))
    before = ending(folder)
    code, _, err = ended(sdzero, *flags, output=folder, resume=True)
    assert code == 2 and f"another process is at work in {folder}" in err
    assert_same_ending(folder, before)
    first.lock.close()
    call(sdzero, *flags, output=folder, resume=True)


# ---------------------------------------------------------------------------------- real processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Both stages, uninterrupted, with the real sampler; and what they were made from."""
    folder = tmp_path_factory.mktemp("runs")
    data = save_rows(folder / "data.jsonl", ROWS)
    base = save_model(folder / "base")
    call(srt, *FLAGS, *STAGE_1, model=base, dataset=data, output=folder / "srt")
    call(sdzero, *FLAGS, *STAGE_2, model=folder / "srt", dataset=data, output=folder / "sdzero")
    return folder


def start(script, *flags, **named):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, ROOT / script, *as_flags(flags, named)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        # a shell that starts the tests in the background has Ctrl-C ignored, which children inherit
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        text=True,
    )


def wait_for(process, condition):
    deadline = time.time() + 120
    while not condition():
        assert process.poll() is None and time.time() < deadline, "it ended too early"
        time.sleep(0.002)


def kill_when(process, condition):
    wait_for(process, condition)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_killed_run_goes_on_bit_for_bit(name, runs, tmp_path):
    """kill -9 while the traces are sampled (stage 1) and after a checkpoint, in processes of their
    own; everything equals the run that nobody touched."""
    out = tmp_path / "out"
    flags = [*FLAGS, *(STAGE_1 if name == "srt" else STAGE_2), "--dataset", runs / "data.jsonl"]
    flags += ["--model", runs / ("base" if name == "srt" else "srt"), "--output", out]
    first = start(f"{name}.py", *flags)
    if name == "srt":
        kill_when(first, (out / "settings.json").exists)
        first = start("srt.py", *flags, "--resume")
    kill_when(first, lambda: any(out.glob("checkpoint-[46]")))
    assert not (out / "config.json").exists()
    last = start(f"{name}.py", *flags, "--resume")
    assert last.communicate()[1] == "" and last.returncode == 0
    assert_same_ending(out, ending(runs / name))


def test_bad_input_and_ctrl_c_of_a_real_process(runs, tmp_path):
    """No traceback, exit codes 2 and 130; --resume is advised only where there is a run."""
    process = start("srt.py", "--model", "./nowhere", "--dataset", "x.jsonl")
    assert process.communicate()[1] == "srt.py: no such model folder: ./nowhere\n"
    assert process.returncode == 2

    flags = [*FLAGS, "--dataset", runs / "data.jsonl", "--model", runs / "base"]
    out = tmp_path / "out"
    process = start("srt.py", *flags, *STAGE_1, "--epochs", "1000", "--output", out)
    wait_for(process, lambda: any(out.glob("checkpoint-*")))
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert re.fullmatch(r"srt.py: interrupted; .*--resume.*\n", said)
    assert process.returncode == 130


@pytest.mark.parametrize("script", SCRIPTS.values())
def test_ctrl_c_while_evaluating_advises_nothing(script, runs, ended, monkeypatch):
    def interrupted(*args, **rest):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "generate", interrupted)
    flags = dict(model=runs / "srt", dataset=runs / "data.jsonl")
    code, _, err = ended(script, *FLAGS, **flags, eval_only=True)
    assert code == 130 and err.endswith(f"{script.__name__}.py: interrupted\n")


FAILURES = {
    "a loss that is no number": (FloatingPointError, 1, "lower --lr"),
    "out of memory": (torch.OutOfMemoryError, 1, "lower --slots"),
    "Ctrl-C": (KeyboardInterrupt, 130, "--resume goes on from the last checkpoint"),
}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("failure", FAILURES)
def test_the_last_checkpoint_is_kept_and_the_advice_works(
    failure,
    name,
    small,
    quick,
    tmp_path,
    monkeypatch,
    ended,
):
    """One line, the checkpoint of the step before, and a run that --resume brings to its end."""
    error, code, advice = FAILURES[failure]
    flags = [*SMALL, *OWN[name], "--model", small[name], "--dataset", "x"]
    real, out = common.Optimizer.step, tmp_path / "out"

    def failing(self, lr):
        if (out / "checkpoint-1").exists():
            raise error("the loss is nan")
        return real(self, lr)

    with monkeypatch.context() as patch:
        patch.setattr(common.Optimizer, "step", failing)
        found, _, err = ended(SCRIPTS[name], *flags, output=out)
    assert found == code and re.fullmatch(rf"{name}\.py: [^\n]+{advice}[^\n]*\n", err), err
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    call(SCRIPTS[name], *flags, output=out, resume=True)
    assert (out / "config.json").exists()


@pytest.mark.parametrize("script, name", [(srt, "srt"), (sdzero, "sdzero")])
def test_weights_that_are_no_numbers_stop_the_run(script, name, small, quick, tmp_path, ended):
    """The loss itself is looked at, before the optimizer."""
    flags = [*SMALL, *OWN[name], "--model", small[name], "--dataset", "x", "--lr", "1e38"]
    code, _, err = ended(script, *flags, output=tmp_path / "out")
    assert code == 1 and "is nan" in err and "--resume with a lower --lr" in err
