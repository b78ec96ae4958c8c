"""The README keeps true: line references, line counts, flags, the code that it shows."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from tiny import tiny

import sdzero
import srt

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def lines(file):
    return (ROOT / file).read_text(encoding="utf-8").splitlines()


def test_line_references_point_at_what_they_quote():
    references = re.findall(r"\[(\w+\.py):(\d+)\]\(\1#L\2\) `([^`]+)`", README)
    assert len(references) > 10
    assert [r for r in references if r[2] not in lines(r[0])[int(r[1]) - 1]] == []


def test_line_counts():
    counts = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", README, re.MULTILINE)
    assert {f for f, _ in counts} >= {"srt.py", "sdzero.py", "teacher.py", "losses.py", "verifier.py", "rollout.py", "examples/toy.py"}
    assert [(f, n) for f, n in counts if len(lines(f)) != int(n)] == []


COMMANDS = [
    c
    for language, block in BLOCKS
    if not language
    for c in block.replace("\\\n", " ").splitlines()
    if re.match(r"python (srt|sdzero)\.py", c)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_flags_that_exist(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an output folder of the same name may be there
    script, *flags = shlex.split(command, comments=True)[1:]
    {"srt.py": srt, "sdzero.py": sdzero}[script].parse_arguments(flags)


def test_the_code_that_it_shows_runs():
    (code,) = [block for language, block in BLOCKS if language == "python"]
    model = tiny("llama", dtype=torch.float32)
    hidden = model.base_model(input_ids=torch.tensor([[5, 9, 3]])).last_hidden_state[0]
    names = dict(model=model, prompts=[[5, 9], [7]], hidden=hidden, teacher_hidden=torch.zeros_like(hidden))
    exec(code.replace("max_new_tokens=512", "max_new_tokens=8"), names)
    assert len(names["responses"]) == 2 and names["columns"].shape == (3, 1) and model.lm_head.weight.grad.abs().sum() > 0
    assert names["verify"]("... so the answer is \\boxed{\\frac12}", "0.5")
