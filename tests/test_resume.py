"""Runs that are killed and go on: at every file operation, with changed flags, in moved folders.

A run that goes on must end as if nothing had happened: the log (without clock times), the traces
and the weights, byte for byte.
"""

import gc
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


class Killed(BaseException):
    """Nothing catches it, as nothing catches kill -9."""


class Killer:
    """Ends a run at its n-th operation on files: before it, or half way through (torn).

    Operations are counted; 0 lets the run pass. Files that are open are closed as the system would.
    """

    def __init__(self, monkeypatch):
        self.at, self.torn, self.count, self.files, self.names = 0, False, 0, [], []
        self.patch(monkeypatch, os, "replace", lambda source, target: None)
        self.patch(monkeypatch, shutil, "rmtree", half_removed)
        self.patch(monkeypatch, Path, "write_text", half_written)
        self.patch(monkeypatch, Path, "unlink", lambda path, **rest: None)
        self.patch(monkeypatch, Path, "mkdir", lambda path, **rest: None)
        self.patch(monkeypatch, PreTrainedModel, "save_pretrained", half_saved)
        self.patch(monkeypatch, PreTrainedTokenizerBase, "save_pretrained", half_saved)
        self.patch(monkeypatch, common.torch, "save", lambda state, path: path.write_bytes(b"PK"))
        self.patch(monkeypatch, common.Run, "log", half_logged)
        monkeypatch.setattr(common, "open", self.open, raising=False)

    def patch(self, monkeypatch, owner, name, half):
        real = getattr(owner, name)

        def operation(*args, **kwargs):
            self.step(name, half, *args, **kwargs)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, operation)

    def step(self, name, half, *args, **kwargs):
        self.count += 1
        self.names.append(name)
        if self.count == self.at:
            if self.torn:
                half(*args, **kwargs)
            raise Killed(f"{name} {args}")

    def open(self, path, mode="r"):
        self.step("open", lambda *rest: None, path, mode)
        self.files.append(open(path, mode))
        return self.files[-1]

    def run(self, script, *flags, at=0, torn=False, **named):
        """True when it came to its end."""
        self.at, self.torn, self.count, self.names = at, torn, 0, []
        try:
            call(script, *flags, **named)
            return True
        except Killed:
            return False
        finally:
            for file in self.files:
                file.close()
            self.files = []
            gc.collect()


def half_removed(folder, **rest):
    if Path(folder).is_dir():
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        for path in files[: len(files) // 2 + 1]:
            os.remove(path)


def half_written(path, text):
    with open(path, "w") as file:
        file.write(text[: len(text) // 2])


def half_saved(self, folder):
    os.makedirs(folder, exist_ok=True)
    for name in ("config.json", "tokenizer_config.json", "model.safetensors"):
        half_written(Path(folder, name), '{"half": ')


def half_logged(run, kind, step, values):
    line = json.dumps({"kind": kind, "step": step, **values})
    run.metrics.write(line[: len(line) // 2])
    run.metrics.flush()


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
    sizes = dict(n_embd=16, n_layer=1, n_head=2, n_inner=16)
    save_model(folder / "base", tokenizer=tokenizer, **sizes)
    assert (folder / "base" / "additional_chat_templates").is_dir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common, "load_rows", lambda *rest: Rows())
        call(srt, *SMALL, *OWN["srt"], model=folder / "base", dataset="x", output=folder / "srt")
    return {"srt": folder / "base", "sdzero": folder / "srt"}


@pytest.mark.parametrize("torn", [False, True])
@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_at_every_file_operation(name, torn, small, tmp_path, monkeypatch):
    """The sweep: whatever was done last, and whether it was done half, the run goes on and ends
    like one that nobody touched."""
    monkeypatch.setattr(common, "load_rows", lambda *rest: Rows())
    monkeypatch.setattr(srt, "CHUNK", 3)
    script, killer = SCRIPTS[name], Killer(monkeypatch)
    flags, places = [*SMALL, *OWN[name]], dict(model=small[name], dataset="x")
    assert killer.run(script, *flags, **places, output=tmp_path / "whole")
    operations, expected = killer.names, ending(tmp_path / "whole")
    steps = [x["step"] for x in expected["metrics.jsonl"] if x["kind"] == "train"]
    assert len(steps) >= 3 and len(operations) > 40
    for n in range(1, len(operations) + 1):
        out = tmp_path / str(n)
        done = killer.run(script, *flags, **places, output=out, at=n, torn=torn)
        assert not done, operations[n - 1]
        resume = {"resume": True} if (out / "settings.json").exists() else {}
        assert killer.run(script, *flags, **places, output=out, **resume), (n, operations[n - 1])
        assert_same_ending(out, expected)
        shutil.rmtree(out)
