"""The README keeps true: files and functions that it names, line counts, commands, its program."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import sdzero
import srt

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def test_no_figure_is_missing():
    assert not re.findall(r"@[A-Z]+@", README)


def test_names_exist():
    """`srt.collect`, `losses.divergence` and the like, in the text and in the algorithm box."""
    files = "srt|sdzero|common|losses|teacher|rollout|verifier|lora"
    names = set(re.findall(rf"\b({files})\.([a-z_A-Z][\w.]*)", README)) - {("srt", "json")}
    names = {(file, name) for file, name in names if name != "py"}
    assert len(names) > 6
    for file, name in names:
        found = importlib.import_module(file)
        for part in name.rstrip(".").split("."):
            found = getattr(found, part)


def test_files_exist():
    for name in set(re.findall(r"`([\w/]+\.(?:py|jsonl|png))`", README)):
        assert (ROOT / name).exists() or name.startswith("runs/"), name


def test_line_counts():
    counts = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.MULTILINE)
    assert {"srt.py", "sdzero.py", "common.py", "teacher.py", "losses.py"} <= {f for f, _ in counts}
    for file, lines in counts:
        assert len((ROOT / file).read_text(encoding="utf-8").splitlines()) == int(lines), file


def commands():
    for language, block in BLOCKS:
        for line in block.replace("\\\n", " ").splitlines():
            if not language and re.match(r"python (srt|sdzero)\.py", line):
                yield line


@pytest.mark.parametrize("command", list(commands()))
def test_commands_have_flags_that_exist(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an output folder of the same name may be there
    script, *flags = shlex.split(command, comments=True)[1:]
    {"srt.py": srt, "sdzero.py": sdzero}[script].parse_arguments(flags)


def test_the_program_that_it_shows_runs():
    (code,) = [block for language, block in BLOCKS if language == "python"]
    names = {}
    exec(code, names)
    assert len(names["responses"]) == 2 and len(names["kl"]) == sum(names["counts"])
    assert names["student"].lm_head.weight.grad.abs().sum() > 0
    for line in code.splitlines():  # what a comment says that a call returns
        if match := re.match(r"(verify\(.*\))  # (True|False)", line):
            assert str(eval(match[1], names)) == match[2], line
