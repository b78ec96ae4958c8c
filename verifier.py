"""The binary verifier r(y, a): 1 when the last final answer of a response equals the gold answer (first version; being deepened)."""

import re
import subprocess
import sys
import tempfile
from fractions import Fraction

_MARKER = re.compile(r"\\f?boxed\s*\{|####|answer(?:\s+is|\s*:)", re.IGNORECASE)


def extract_answer(response: str) -> str | None:
    """The last final answer of a response, or None."""
    for match in reversed(list(_MARKER.finditer(response))):
        rest = response[match.end() :]
        if not match.group().endswith("{"):
            line = rest.strip().split("\n")[0].strip(" *$.")
            return re.split(r"\.\s", line)[0] or None
        depth = 1
        for i, c in enumerate(rest):
            depth += {"{": 1, "}": -1}.get(c, 0)
            if depth == 0:
                if rest[:i].strip():
                    return rest[:i].strip()
                break
        else:
            return None
    return None


def _value(text: str):
    text = re.sub(r"\\[dt]?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", text)
    text = re.sub(r"[\s$,]|\\[!,;$]|\.$", "", text)
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return text.lower()


def is_equivalent(answer: str, gold: str) -> bool:
    """Whether two answers are the same."""
    return _value(answer) == _value(gold)


def verify(response: str, gold: str) -> bool:
    """Whether the last final answer of `response` equals `gold`. Always True or False."""
    answer = extract_answer(response)
    return answer is not None and is_equivalent(answer, extract_answer(gold) or gold)


def verify_code(response: str, tests: list, *, timeout: float = 5.0, memory: int = 512) -> bool:
    """Whether the last fenced Python block of `response` passes every test."""
    blocks = re.findall(r"```(?:python|py)?[ \t]*\n(.*?)```", response, re.DOTALL)
    if not blocks or not tests:
        return False
    for test in tests:
        pair = isinstance(test, dict)
        with tempfile.TemporaryDirectory() as folder:
            try:
                done = subprocess.run(
                    [sys.executable, "-I", "-c", blocks[-1] if pair else f"{blocks[-1]}\n{test}\nprint('passed')"],
                    input=test["input"] if pair else "", capture_output=True, text=True, timeout=timeout, cwd=folder, env={},
                )  # fmt: skip
            except (subprocess.SubprocessError, ValueError):
                return False
        expected = test["output"] if pair else "passed"
        if done.returncode or [x.rstrip() for x in done.stdout.strip().split("\n")] != [x.rstrip() for x in expected.strip().split("\n")]:
            return False
    return True
