"""Runs that are killed and go on: at every file operation, with changed flags, in moved folders.

A run that goes on must end as if nothing had happened: the log (without clock times), the traces
and the weights, byte for byte.
"""

import copy
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

import pytest
import torch
import transformers
from test_scripts import (
    FLAGS,
    ROWS,
    STAGE_1,
    STAGE_2,
    as_flags,
    call,
    ended,  # noqa: F401: a fixture
    lines_of,
    log_of,
    read,
    save_model,
    save_rows,
)
from tiny import CHAT_TEMPLATE, make_tokenizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import common
import sdzero
import srt
from rollout import Rollout

transformers.utils.logging.disable_progress_bar()
ROOT = Path(__file__).resolve().parents[1]
SMALL = shlex.split(
    "--verifier tiny:odd --eval-problems 2 --eval-samples 1 --eval-every 2 --save-every 1 "
    "--max-new-tokens 4 --lr 1e-2 --dtype float32 --device cpu --phrase-wrong No. --phrase-right "
    "Yes. --warmup 1"
)
OWN = {
    "srt": shlex.split("--problems 6 --batch-size 3 --epochs 1"),
    "sdzero": shlex.split("--problems 6 --batch-size 2 --teacher ema --teacher-rate 0.3"),
}
SCRIPTS = {"srt": srt, "sdzero": sdzero}


class Snapshots:
    """What kill -9 leaves behind: a copy of the run's folder before each of its file operations, or,
    if torn, when that operation is half done."""

    def __init__(self, monkeypatch, out, copies, torn):
        self.out, self.copies, self.torn, self.names = out, copies, torn, []
        for owner, name, half in (
            (os, "replace", None),
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
            shutil.copytree(self.out, copy)
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


def half_written(path, text):
    with open(path, "w") as file:
        file.write(text[: len(text) // 2])


def half_saved(self, folder):
    os.makedirs(folder, exist_ok=True)
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        half_written(folder / name, '{"half": ')


def sampled(model, prompts, *, max_new_tokens, eos_token_ids, generator, **rest):
    """In the place of the sampler, which would take most of the time: random ids by the seed."""
    responses, eos = [], min(eos_token_ids)
    for _ in prompts:
        ids = torch.randint(4, 90, (max_new_tokens,), generator=generator).tolist()
        finished = ids[0] % 2 == 0
        ids[-1] = eos if finished else ids[-1]
        responses.append(Rollout(ids, [-1.0] * len(ids), finished))
    return responses


class Rows:
    """A data set without the data-set library, which would take most of the time here."""

    column_names = ["problem", "answer"]

    def __len__(self):
        return len(ROWS[:20])

    def __getitem__(self, name):
        return [row[name == "answer"] for row in ROWS[:20]]


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
        patch.setattr(common, "load_rows", lambda *rest: Rows())
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
    monkeypatch.setattr(common, "load_rows", lambda *rest: Rows())
    monkeypatch.setattr(common, "generate", sampled)
    monkeypatch.setattr(srt, "CHUNK", 3)


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
        resume = {"resume": True} if (out / "settings.json").exists() else {}
        try:
            call(script, *flags, output=out, **resume)
            assert_same_ending(out, expected)
        except (Exception, SystemExit) as error:
            failed.append((n, operation, repr(error)[:300]))
    assert failed == []
