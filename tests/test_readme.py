"""The README keeps true: its commands have flags that exist, the functions that it names are there,
its program runs."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import torch

import sdzero
import srt

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)
MODULES = {path.stem: path for path in [*ROOT.glob("*.py"), *ROOT.glob("examples/*.py")]}


def names_in(path):
    """Functions, classes, methods and constants of a file: f, C, C.m, X."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        for inner in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(inner, ast.FunctionDef):
                found.add(f"{node.name}.{inner.name}")
            elif isinstance(inner, ast.AnnAssign):
                found.add(f"{node.name}.{inner.target.id}")
    return found


def test_functions_that_it_names_exist():
    """`file.function`, as in `sdzero.distill` and `srt.Trace.weights`."""
    text = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    named = re.findall(r"`(\w+)\.(\w+(?:\.\w+)?)(?:\([^`]*\))?`", text)
    named = [(module, name) for module, name in named if module in MODULES and name != "py"]
    assert len(named) > 5
    wrong = [(m, name) for m, name in named if name not in names_in(MODULES[m])]
    assert wrong == []


def test_files_that_it_names_exist():
    """`file.py`, links to files, pictures."""
    files = re.findall(r"`([\w/]+\.\w*py)`", README) + re.findall(
        r"\]\(([^)#:]+)(?:#[^)]*)?\)", README
    )
    assert len(files) > 5
    assert [file for file in files if not (ROOT / file).exists()] == []


COMMANDS = []
for language, block in BLOCKS:
    if language in ("", "sh", "bash", "shell", "console"):
        for line in block.replace("\\\n", " ").splitlines():
            if re.match(r"(\$ )?python (srt|sdzero)\.py", line):
                COMMANDS.append(line.removeprefix("$ "))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_have_flags_that_exist(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # an output folder of the same name may be here
    script, *flags = shlex.split(command, comments=True)[1:]
    {"srt.py": srt, "sdzero.py": sdzero}[script].parse_arguments(flags)


def test_there_are_commands_and_a_program():
    assert len(COMMANDS) >= 3
    assert [language for language, _ in BLOCKS].count("python") >= 1


@pytest.mark.parametrize("code", [block for language, block in BLOCKS if language == "python"])
def test_the_program_that_it_shows_runs(code, tmp_path, monkeypatch):
    """As it is, in a fresh namespace: it makes or imports everything that it uses."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
