r"""The binary verifier r(y, a): 1 when the final answer of a response equals the gold, else 0.

    verify(response, gold)        mathematics, by the conventions of GSM8K, MATH, OpenR1-Math, AIME
    verify_code(response, tests)  Python programs, by input/output pairs or assert statements

The verifiable rewards of SD-Zero (arXiv 2604.12002). Standard library only: copy this file out and
it works. Nothing that a model wrote is evaluated (mathematics) or run in this process (code). No
response raises or hangs; a gold answer or tests of the wrong type do raise.

Which answer counts? Markers are \boxed{} and \fbox{}, `####`, and "answer is" (or "answer:",
<answer>). The LAST marker counts, so a revision outranks the first attempt whatever both used.
Passed over are boxes without an answer (\boxed{...}: an instruction repeated), headings
(`#### Step 2`), phrases that state none ("the answer is correct", "the final answer is positive"
after a box) and those about a wrong answer. A box that never closes ends the search: the response
was cut there. A response without a marker has no answer: verify("42", "42") is False by design.

Claimed equal (accuracy by category: tests/bench_verifier.py):
  integers     1,234 = 1{,}234 = 1\,234 = 1 234 = 1234. A comma is never a decimal point.
  decimals     0.50 = 1/2 = .5, exactly. A decimal that rounds the gold value is wrong (0.333 for
               1/3), unless gold is that decimal or the response says both (1/3 \approx 0.333).
  fractions    a/b, \frac, \dfrac, \tfrac, mixed numbers; lowest terms or not
  percentages  50% = 0.5 = 1/2; and 50% = 50 as GSM8K and MATH have it, from 1% on
  powers       2^{10} = 1024; scientific notation 1.5 \times 10^3 = 1.5e3; 5!, \binom{5}{2}
  irrationals  roots, pi, e, i, logarithms and trigonometric functions to 11 digits
  units        dropped when one side has none, equal when both have one (cm = centimeters, $ =
               dollars); degrees and currencies as well
  assignments  x = 5, f(2) = 5, m + n = 5, Area = 5 for 5; not 2x = 10 for 10
  tuples       in order; intervals with their brackets; vectors and matrices entry by entry
  sets, lists  in any order, unless names are dropped: 1, 2 for x = 1, y = 2; {1, 2} is not (1, 2)
  expressions  polynomial and rational ones: 2(x+1) = 2x+2. The case of a letter counts.
  relations    equations up to a constant factor, inequalities up to a positive one;
               x > 3 = (3, \infty)
  choices      (B) = B = \text{B} = B. 12; ACD = A, C, D; words by letters, in any case
Not claimed: conversion of units, number words, decimal commas, multiples of matrices, determinants,
set-builder notation, \mp, \choose (but \binom), sets after a minus (but \setminus) or with \pm in
their braces, x \ne 1, x \ne 2 for a union of intervals, answers longer than 600 characters, numbers
beyond 10^2400; ratios (3:4), times and numbers in other bases count as written.

One answer through all steps: verify(r"So it is \boxed{\frac{1}{2}\text{ cm}}.", "0.5")
  extract_answer  \frac{1}{2}\text{ cm}
  _clean          \frac {1}{2} ‹cm›
  _tokens         command \frac, sign {, number 1, close }, sign {, number 2, close }, word cm
  _Reader         _Value(numbers=(1/2, 1/2, 1/2), unit="cm"): the expression's value at three points
  _Comparison     equal to _Value((1/2, 1/2, 1/2), ""): the numbers agree, and one has no unit
An expression is its values at three points, where every variable is a number drawn by its name.
Rational functions that differ agree there with a chance of 1e-15: no algebra is needed.

Private characters, which a cleaned text holds for what TeX spells in several ways:
  ‹ ›     around the words of \text{}        ⦃ ⦄   braces of a set; { } are those of a group
  ⟦ & ⏎ ⟧ a matrix, its columns and rows     ¤     a dollar as currency; $ is a delimiter in TeX
"""

import ast
import builtins
import cmath
import contextlib
import ctypes
import functools
import glob
import inspect
import itertools
import json
import math
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import types
from decimal import Decimal
from fractions import Fraction
from operator import mul, neg, truediv
from typing import NamedTuple


def verify(response: str, gold: str) -> bool:
    """Whether the final answer of `response` equals `gold`: the reward r(y, a) of the paper.

    gold: a bare or boxed answer, or a GSM8K solution that ends in `#### 42`.
    Takes less than 100 ms for 100,000 characters. Raises TypeError when one of them is no string,
    nothing for any two strings. verify("42", "42") is False by design: the response has no marker.
    """
    _require_strings(response=response, gold=gold)
    try:
        answer = extract_answer(response)
        return answer is not None and is_equivalent(answer, extract_answer(gold) or gold)
    except Exception:  # the fuzzer finds none; a training run must not end when it missed one
        return False


def is_equivalent(answer: str, gold: str) -> bool:
    """Whether two bare answers are equal, by the categories at the top of this file.

    Answers of more than 4,000 characters are equal only when identical. Raises TypeError when one
    of them is no string.
    """
    _require_strings(answer=answer, gold=gold)
    if max(len(answer), len(gold)) > 4000:
        return answer.strip() == gold.strip()
    a, b = _clean(answer), _clean(gold)
    same = _same_choice(a, b)
    if same is not None:
        return same
    return _same_text(a, b) or _same_text(*_without_labels(a, b))


def extract_answer(response: str) -> str | None:
    """The final answer of a response, as it was written; None when it states none.

    The rule is at the top of this file. Raises TypeError when the response is no string.
    """
    _require_strings(response=response)
    fallback = None  # a phrase that counts only when no better answer is before it
    for match in [*_MARKER.finditer(response)][:-100:-1]:  # the last first; more is no honest text
        before = response[max(0, match.start() - 120) : match.start()]
        if match["box"]:
            content = match["bare"] or _boxed(response, match.end())
            if content is None:
                return fallback
            end = match.end() + (0 if match["bare"] else len(content) + 1)
            is_remark = _REMARK_BEFORE.search(before) or _REMARK_AFTER.match(response, end)
            if not is_remark and not _EMPTY.fullmatch(content):
                return content.strip()
            continue
        text = response[match.end() : match.end() + 500].lstrip(" \t#*:_")
        content = _stated(text)
        if _EMPTY.fullmatch(content) or _HEADING.match(content):
            continue
        if match["hash"] or _is_final(before, match[0], content):
            return content
        fallback = fallback or content
    return fallback


def _require_strings(**arguments) -> None:
    for name, value in arguments.items():
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string, not {type(value).__name__}: {value!r:.80}")


# ------------------------------------------------------------------------------ finding the answer

_MARKER = re.compile(
    r"""(?P<box>\\f?box(?:ed)?(?:\s*(?:\{|\Z)|\s?(?P<bare>\d+)))
    |(?P<hash>\#{4,})
    |(?P<phrase>\b(?<!</)answers?\b(?:
        (?:[^\n.:=\\]|\\(?!f?box)){0,60}?\s(?:is|are|was|equals|(?:would|should|will|must)\s+be)\b
            (?:\s+(?:therefore|thus|simply|then|just)\b)?[*:\s]*
            (?:(?<=\n)-\ )?         # the answer, in dollars, is therefore (a list of one)
        |>\s*                       # <answer>
        |[^\n\w:=]{0,4}[:=][*\s]*   # **Answer:**
        |[*\#\s]{0,4}\n\s*))        # ### Final Answer""",
    re.IGNORECASE | re.VERBOSE,
)
_REMARK_BEFORE = re.compile(  # a common wrong answer is \boxed{13}; 12, not \boxed{13}
    r"""\b(?:(?:wrong|incorrect|mistaken|common|tempting|naive|other|another|students?'?)
    \ (?:\w+\ )?(?:answer|mistake|error)s?\b[^.,!?\n]{0,60}
    |(?:if|who)\ [^.!?\n]{0,30}\bforg[eo]t\b[^.!?\n]{0,60}
    |not|instead\ of|rather\ than)[\s$*:(\\]*\Z""",
    re.IGNORECASE | re.VERBOSE,
)
_REMARK_AFTER = re.compile(  # \boxed{13} is a common mistake
    r"[\s$)\\]*(?:is|was|would be) (?:an? |the )?(?:\w+ )?(?:wrong|incorrect|not|mistake|error)\b"
)
_CONCLUSION = re.compile(  # the words before "answer" in a clause that states the final one
    r"""[\s*_\#>"'($\\-]*(?:(?:so|thus|hence|therefore|then|and|now|wait|actually|finally|that|this
    |which|it|we|means?|gives?|get|have|find|see|conclude|shows?|follows|is|in|the|our|my|its|final
    |correct|right|required|desired|numerical|exact|simplified|revised|corrected|new|true|actual
    |overall|short|text|boxed|conclusion|<think>|</think>|<)[\s*_]*)*""",
    re.IGNORECASE | re.VERBOSE,
)
_HEADING = re.compile(  # #### Step 2
    r"(?:step|verif\w+|check\w*|solution|conclusion|explanation|note|analysis|case|part|summary)\b",
    re.IGNORECASE,
)
_EMPTY = re.compile(  # a box, or what is after a phrase, without an answer in it
    r"(?:\\text\{)?(?:\s|\.|…|\\[lc]?dots|\\[,; ]|_|\?"
    r"|your|the|final|answer|number|letter|here)*\}?",
    re.IGNORECASE,
)
_REASON = re.compile(  # what may follow the answer in its sentence
    r"""[,;]?\s*\(?\b(?:because|since|which|where|when|so|as|if|but|hence|thus|therefore|after|from
    |given|not|by|using|see|and\ (?:we|this|that|it|so|not))\b""",
    re.IGNORECASE | re.VERBOSE,
)
_FORMULA = re.compile(  # in its delimiters, alone or before a unit, and no item of a list
    r"""(?:\$\$?|\\[(\[])((?:[^$\\]|\\[^)\]])+)(?:\$\$?|\\[)\]])
    (?!(?:[ ,;]|and\b|or\b)*(?:\$|\\\(|-?\d))
    (?:\s*(\\?%|°|[a-zA-Z]+)(?=\s*\*{0,2}(?:[.,;!]|\n|$)))?""",
    re.VERBOSE,
)
_BOLD = re.compile(r"[A-Z][a-z]* [^\n*.]{3,100}\*\*([^*\n]{1,60})\*\*")  # It takes **5 hours**.
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def _boxed(text: str, start: int) -> str | None:
    """The content of the box that opens before `start`; None when it never closes."""
    depth = 1
    for match in _BRACES.finditer(text, start):  # an escaped brace is a set's, not a group's
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : match.start()]
    return None


def _stated(text: str) -> str:
    """The answer at the beginning of a text.

    Rule: a formula in delimiters; or what is bold, in a sentence; or the words up to the end of the
    sentence or to a reason (because, which, so).
    """
    if bold := _BOLD.match(text):
        return bold[1]
    if formula := _FORMULA.match(text):
        return " ".join(filter(None, formula.groups()))
    sentence = re.split(r"[.!?](?=[\s*]|$)|(?<=\w)\*\*(?!\w)|\n|<[|/]", text, maxsplit=1)[0]
    stated = _REASON.split(sentence, maxsplit=1)[0].strip(" *,;:")
    return re.sub(r"\s\([A-Za-z][A-Za-z -]{3,}\)$", "", stated)  # 42 (forty-two)


def _is_final(before: str, phrase: str, content: str) -> bool:
    """Whether a phrase states the final answer, whatever is boxed before it.

    Rule: only words of conclusion are before "answer" in its clause (so the final answer is), no
    word of doubt is in its sentence, and its content is mathematics, a name, or yes or no. A name
    has at most three words, the first of which is no ordinary word in lower case (positive, even).
    """
    sentence = re.split(r"[.!?]\s|\n", before)[-1]
    clause = re.split(r"[.,;:—]", sentence)[-1]
    in_doubt = re.search(r"\b(?:if|would|similar|other|previous)\b", sentence + phrase)
    if in_doubt or not _CONCLUSION.fullmatch(clause):
        return False
    if re.match(r"[-+$¤£€\\({\[.\d]", content):
        return True
    adjective = r"(?!(?:yes|no|true|false|none|sin|cos|tan|ln|log)\b)[a-z]{2,}\b|[aI] [a-z]"
    return len(content.split()) <= 3 and not re.match(adjective, content)


# ------------------------------------------------------------------------- one spelling for answers

_UNIT_NAMES = """$ dollar usd ¤ buck|£ pound gbp|€ euro eur|¢ cent|% percent|° degree deg
|mm millimeter millimetre|cm centimeter centimetre|dm|m meter metre|km kilometer kilometre
|in inch inche|ft foot feet|yd yard|mi mile|mg milligram|g gram|kg kilogram|lb|oz ounce
|ml milliliter millilitre|l liter litre|s second sec|min minute|h hour hr|mph|kph|week|year yr
|rad radian|pt|am a.m|pm p.m|kb|mb|gb|kw|kwh|hp|hz|n|j|w|v|sq square|cubic|us|th st nd rd|of|per"""
_UNITS = {}
for _aliases in _UNIT_NAMES.split("|"):
    _UNITS.update(dict.fromkeys(_aliases.split(), _aliases.split()[0]))

_FUNCTIONS = {
    "sin": cmath.sin,
    "cos": cmath.cos,
    "tan": cmath.tan,
    "cot": lambda x: 1 / cmath.tan(x),
    "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x),
    "arcsin": cmath.asin,
    "arccos": cmath.acos,
    "arctan": cmath.atan,
    "exp": cmath.exp,
    "ln": cmath.log,
    "log": lambda x, base=10: cmath.log(x) / cmath.log(base),
}

_SPELLINGS = r"""\frac frac dfrac tfrac cfrac, \binom binom dbinom tbinom, * cdot times ast, / div
√ sqrt, π pi, ∞ infty infinity, ° circ degree, % %, ¤ $, £ pounds, ± pm, ⏎ \, or lor vee
and land wedge, < lt, > gt, ≤ le leq leqslant, ≥ ge geq geqslant, ≠ ne neq, ≈ approx simeq, ∈ in
⦃ { lbrace, ⦄ } rbrace, [ lbrack, ] rbrack, ( langle, ) rangle, | | lvert rvert vert, ⦃⦄ emptyset
⦃⦄ varnothing, ∪ cup bigcup, ∖ setminus backslash smallsetminus"""  # sign, its names in TeX
_IGNORED = r"""left right big Big bigl bigr Bigl Bigr bigg Bigg displaystyle textstyle quad qquad
limits boxed mathit mathbb mathcal boldsymbol bm vec overrightarrow angle triangle hline bf rm it
checkmark , ; : ! > ( ) [ ]"""  # these become a space
_GREEK = """alpha α beta β gamma γ delta δ epsilon ε varepsilon ε eta η theta θ lambda λ mu μ nu ν
rho ρ sigma σ tau τ phi φ psi ψ omega ω Delta Δ Gamma Γ Omega Ω""".split()
_COMMANDS = dict.fromkeys([" ", "\n", *_IGNORED.split()], " ")
_COMMANDS.update((name, f" {name} ") for name in _FUNCTIONS)
_COMMANDS.update((name, f" {letter} ") for name, letter in zip(_GREEK[::2], _GREEK[1::2]))
for _line in re.split(", |\n", _SPELLINGS):
    _COMMANDS.update(dict.fromkeys(_line.split()[1:], f" {_line.split()[0]} "))

_UNICODE = {chr(i + 0xFEE0): chr(i) for i in range(0x21, 0x7F)}  # full-width forms
_UNICODE |= dict(zip("。、~−–×·⋅÷’⟨⟩º\u00a0\u202f\u2009‹›", ".,\x20--***/'()°\x20\x20\x20\x20\x20"))
_UNICODE |= {"½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "²": "^2", "³": "^3"}
_UNICODE |= {"ℝ": r"\mathbb{R}", "∅": r"\emptyset ", **dict.fromkeys('“”"`', "")}
_UNICODE = str.maketrans(_UNICODE)


def _repeating(match: re.Match) -> str:
    """A repeating decimal as a fraction: 0.1666... = (16 - 1) / 90."""
    whole, fixed, repeated = match.groups()
    numerator = int(whole + fixed + repeated) - int(whole + fixed or "0")
    return rf"\frac{{{numerator}}}{{{'9' * len(repeated)}{'0' * len(fixed)}}}"


_TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|up|normal)?|operatorname|mathrm|mathbf|mathsf|mbox|hbox)"
_SEPARATOR = r"(?:\\[a-z]+)?\{\s*,?\s*(?:\\[!,])?\s*\}(?:\\[!,:; ])?|,\\!|\\!,?|\\[,;: ]"
_COMPARISONS = {"<=": "≤", ">=": "≥", "!=": "≠", "==": "="}
_REWRITES = [  # in this order; the comments run as a test
    # 1{,}234 -> 1234
    (rf"(?<=\d)\s?(?:{_SEPARATOR})\s*(?=\d{{3}}(?!\d))", ""),
    # 0.1\overline{6} -> \frac{15}{90}
    (r"(\d{0,50})\.(\d{0,50})\\(?:overline|bar)\{(\d{1,50})\}", _repeating),
    (r"(?<=\d) ?x ?(?=10\^)", "*"),  # 3 x 10^5 -> 3*10^5
    (r"(?<![\\A-Za-z])(sqrt|pi|infinity)(?![A-Za-z])", r"\\\1"),  # sqrt(2) -> \sqrt(2)
    (r"\\mathbb ?\{?R\}?", r"(-\\infty,\\infty)"),  # \mathbb{R} -> (-\infty,\infty)
    (r"\\(?:text)?color\{[^{}]*\}|\\overline ?(?=\{[A-Z]{2}\})", ""),  # \overline{AB} -> {AB}
    (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"{\\frac{\1}{\2}}"),  # {1\over2} -> {\frac{1}{2}}
    (rf"({_TEXT})\s+([A-Za-z])(?![A-Za-z])", r"\1{\2}"),  # \mathrm e -> \mathrm{e}
    (_TEXT + r"\{d\}\s*(?=[a-z])", "d"),  # \mathrm{d}x -> dx
    # a letter is a variable unless it is a unit: 3\mathrm{e}+2 -> 3 e +2
    (_TEXT + r"\s*\{\s*([A-IKMO-UX-Za-fi-knp-rt-z])\s*\}", r" \1 "),
    (_TEXT + r"\s*\{\s*([A-Za-z][A-Za-z ./'-]*)\}", r" ‹\1› "),  # 5\text{ cm} -> 5 ‹cm›
    (_TEXT + r"\s*\{([^{}]*)\}", r" \1 "),  # \text{1st} -> 1st
    # \frac{ ‹km› }{ ‹h› } -> ‹km/h›
    (r"\\[dt]?frac ?\{ ‹([^‹›]*)› \}\{ ‹([^‹›]*)› \}", r"‹\1/\2›"),
    (r"\\begin\{(?:[pbB]?matrix\}|array\}(?:\{[^{}]*\})?)", "⟦"),  # \begin{pmatrix}1 -> ⟦1
    (r"\\end\{(?:[pbB]?matrix|array)\}", "⟧"),  # 1\end{pmatrix} -> 1⟧
    # the other commands: 2\cdot\pi -> 2 *  π
    (r"\\([A-Za-z]+|(?s:.))", lambda match: _COMMANDS.get(match[1], match[0] + " ")),
    (r"\\(frac|binom)\s*(\d)\s*(\d)", r"\\\1{\2}{\3}"),  # \frac 12 -> \frac{1}{2}
    (r"(?<=[\w)}])\*\*(?=[\w({])", "^"),  # x**2 -> x^2
    (r"[<>!=]=", lambda match: _COMPARISONS[match[0]]),  # x <= 2 -> x ≤ 2
    (r"\A([^$]*)\$(?=\s?[\d.])([^$]*)\Z", r"\1¤\2"),  # $5 -> ¤5
    (r"\*\*|__|\$", " "),  # **5** -> 5
    (r"\^ ?(-\d+|-[A-Za-z])", r"^{\1}"),  # 2^-1 -> 2^{-1}
    (r"-\s*([¤£€])", r"\1-"),  # -¤5 -> ¤-5
    (r"\^\s*(?:\{\s*(?:°|‹o›)\s*\}|°)", "°"),  # 30^{°} -> 30°
    # 10 000 -> 10000
    (r"(?<![\d.,^_])\d{1,3}(?: \d{3})+(?![\d/,]| \d)", lambda match: match[0].replace(" ", "")),
    # 3 1/2 -> (3+1/2)
    (
        r"(?<![\w.,^])(\d+) *(\\frac *\{ *\d+ *\} *\{ *\d+ *\}|(?<= )\d+ ?/ ?\d+(?![\d.]))",
        r"(\1+\2)",
    ),
    # after a number and a space, a last letter is a unit: 5 m/s -> 5 ‹m›/s
    (r"\A([-+]?[\d.,]+) ([mghslL])((?:\^\d|/[a-zA-Z]+(?:\^\d)?)*)\Z", r"\1 ‹\2›\3"),
]


_COMPILED = [(re.compile(pattern), replacement) for pattern, replacement in _REWRITES]


def _clean(text: str) -> str:
    """The answer in one spelling, with the private characters of the top of this file."""
    text = text.translate(_UNICODE)
    for pattern, replacement in _COMPILED:
        text = pattern.sub(replacement, text)
    text = text.lstrip(" ,;:=≈").rstrip(" .,;:")
    return _ADVERB.sub("", text)


_ADVERB = re.compile(
    r"(?i)(?<=[^\s,])(?:[ ,]*‹?(?:altogether|in total|in all|overall|combined|total)"
    r"|, ?‹?(?:respectively|exactly|precisely|only|each|so far|now|of course))›?\Z"
)


def _joined(text: str) -> str:
    """1,234 -> 1234, not (1,234).

    Rule: a comma before three digits joins them; between brackets only before a 0, as in {1,000}.
    """

    def join(match):
        before = text[: match.start()]
        opened = sum(map(before.count, "([⦃")) > sum(map(before.count, ")]⦄"))
        return match[0] if opened and ",0" not in match[0] else match[0].replace(",", "")

    return re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\d)", join, text)


# ------------------------------------------------------------------------------- reading an answer

_LETTER = "[A-Za-zΑ-Ωα-ορ-ω]"  # without pi
_NAME = rf"{_LETTER}(?:_(?:\w|\{{\w{{1,9}}\}})'*|'+)"
_TOKEN = re.compile(
    rf"""\s*(?:‹(?P<word>[^‹›]*)›
    |(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d{{1,3}}(?![\w^]))?|\.\d+)
    |(?P<name>{_NAME})|(?P<letters>{_LETTER}+)|(?P<command>\\[A-Za-z]+)|(?P<sign>\S))""",
    re.VERBOSE,
)
_SIDE_NAME = re.compile(  # of an equation: x, m + n, a/b, sin A, f(2), (x, y); not 2x, x + 1, x^2
    rf"(?!-)(?:(?!log|ln|exp)(?:{_NAME}|{_LETTER})(?:\(-?\d[\d./]*\))?|\\frac|[-+*/(),|{{}}⟦⟧⏎&])+"
)
_NUMBER_WORD = re.compile(  # what changes the number before it, and is no unit of it
    r"""hal(?:f|fs|ves?)|thirds?|quarters?|(?:four|fif|six|seven|eigh|nin|ten|eleven|twelf|\w+teen
    |\w+tie|hundred|thousand|\w+illion)ths?|tens|dozens?|hundreds?|thousands?|[mbtr]+illions?|score
    |\w+(?:teen|ty)|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twice|thrice
    |squared|cubed|doubled|tripled|halved|factorial|plus|minus|negative|point|remainder""",
    re.VERBOSE,
)
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9}
_SCALES |= {"trillion": 10**12, "half": Fraction(1, 2), "halves": Fraction(1, 2), "dozen": 12}
_LINKS = "/ * - a an to by as at on for with than from".split()  # in a unit of several words


class _Unreadable(ValueError):
    """Not mathematics that this file reads, or too deep: the answer is then compared as text."""


class _Value(NamedTuple):
    numbers: tuple[Fraction | complex, ...]  # at the three points
    unit: str = ""
    kind = "value"  # this and the other two kinds are no fields

    @property
    def is_constant(self) -> bool:
        return len(set(self.numbers)) == 1


class _Group(NamedTuple):
    kind: str  # its brackets; "" for a bare list; "∪", "matrix", "row"; "text" with a string
    items: list


class _Side(NamedTuple):
    value: _Value | _Group
    text: str
    is_name: bool  # it only names what is asked for: see _SIDE_NAME


class _Relation(NamedTuple):
    sides: list
    operators: list  # = ≠ < ≤ ≈ ∈; what was written with > and ≥ is turned round
    kind = "relation"


def _tokens(text: str) -> list[tuple[str, str]]:
    """Pairs of a kind (number, name, word, function, command, sign, close, and, end) and a text."""
    tokens = [("and", "")]  # what begins a statement
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup, match[match.lastgroup].strip()
        if kind == "sign":
            kind = "close" if token in "}⦄)]⟧" else "and" if token in ",;" else kind
        if token.lower() in ("and", "or"):
            tokens.append(("and", token))
        elif token.lower() in _FUNCTIONS:
            tokens.append(("function", token.lower()))
        elif kind == "letters":
            tokens += _letters(token, *tokens[-1], match[0][0].isspace())
        else:
            tokens.append((kind, token))
    return tokens[1:] + [("end", "")]


def _letters(run: str, kind: str, before: str, spaced: bool) -> list[tuple[str, str]]:
    """A run of letters, after a token of this kind: a word, or a product of variables.

    Rule: it is a word after a word; after a number if it is a known unit; after a number and a
    space, or where a statement begins, if it looks like a word (see _is_wordlike). dx is one name.
    """
    if len(run) == 1 or run in ("dx", "dy", "dz", "dt", "du", "dv", "dr", "ds"):
        return [("name", run)]
    known = run.lower() in _UNITS or run.lower().removesuffix("s") in _UNITS
    if kind == "word" or known and (kind in ("number", "close") or kind == "name" and spaced):
        return [("word", run)]
    begins = kind == "and" or before in "=<>≤≥≠≈∈([⦃"
    if begins and run.lower() in ("no", "on", "is") or _is_wordlike(run):
        if begins or spaced and kind in ("number", "close"):
            return [("word", run)]
    return [("name", letter) for letter in run]


def _is_wordlike(run: str) -> bool:
    """Rule: three letters or more, with a vowel, not in alphabetical order as factors are (abc)."""
    low = run.lower()
    in_order = list(low) == sorted(set(low)) and not low.endswith("s")  # (but chips, films)
    return len(low) > 2 and re.search("[aeiou]", low) is not None and not in_order


def _unit(text: str, constant: bool) -> str:
    """One spelling for a unit: centimeters -> cm, square meters -> m^2, dollars -> $.

    Rule: after a number every word that looks like one is a unit, except number words; after an
    expression with variables only a known unit is.
    """
    words = []
    for word in re.sub(r"\bper\b|/", " / ", text.lower()).replace("^ ", "^").split():
        name, _, power = word.strip(".").partition("^")
        singular = name.removesuffix("s")
        known = _UNITS.get(name) or _UNITS.get(singular)
        if _NUMBER_WORD.fullmatch(name):
            raise _Unreadable("a number word")
        if not known and name not in _LINKS:
            if not constant or not all(map(_is_wordlike, name.split("-"))):
                raise _Unreadable("no unit")
        if words and words[-1] in ("sq", "cubic"):
            power = "3" if words.pop() == "cubic" else "2"
        words.append((known or singular) + (f"^{power}" if power else ""))
    return " ".join(words).replace("mi / h", "mph")


def _whole(node) -> int:
    """A whole number up to 300."""
    n = node.numbers[0] if node.kind == "value" else None
    if not isinstance(n, Fraction) or n not in range(301):
        raise _Unreadable("no small whole number")
    return int(n)


class _Reader:
    """Recursive descent over the tokens of one answer, from lists down to single numbers.

    items -> statement -> quantity -> sum -> product -> power -> atom: each method reads one of
    these and leaves `at` on the token after it.
    """

    def __init__(self, text: str):
        if len(text) > _MAX_LENGTH:
            raise _Unreadable("too long")
        self.tokens, self.at, self.depth = _tokens(text), 0, 0

    @property
    def kind(self) -> str:
        return self.tokens[self.at][0]

    def next(self) -> str:
        token = self.tokens[self.at][1]
        self.at = min(self.at + 1, len(self.tokens) - 1)
        return token

    def sees(self, signs: str) -> bool:
        return self.kind in ("sign", "close") and self.tokens[self.at][1] in signs

    def accept(self, signs: str) -> str:
        return self.next() if self.sees(signs) else ""

    def fail(self):
        raise _Unreadable(f"unexpected {self.tokens[self.at][1]!r}")

    def items(self, end: str = "end") -> list:
        """Statements between commas, semicolons, `and`, `or`, up to the end or a bracket."""
        items = [self.statement()]
        while self.kind == "and":
            while self.kind == "and":
                self.next()
            items.append(self.statement())
        return items if self.kind == end else self.fail()

    def statement(self):
        """A quantity, or a relation between several: x = 2, 1 < x < 3. `x ∈ A` is only A."""
        sides, operators = [], []
        while not sides or self.sees("=<>≤≥≠≈∈"):
            operators += [self.next()] if sides else []
            start, node = self.at, self.quantity()
            text = "".join(token for _, token in self.tokens[start : self.at])
            is_name = node.kind == "text" or _SIDE_NAME.fullmatch(text) is not None
            sides.append(_Side(node, text, is_name))
        if not operators:
            return sides[0].value
        if sides[0].is_name and operators == ["∈"]:
            return sides[1].value
        if sides[0].is_name and operators == ["="]:
            if [side.value.kind for side in sides] == ["()", "()"]:
                return _one_by_one(*sides)
        if set(operators) <= {">", "≥"}:
            sides.reverse()
            operators = ["<" if operator == ">" else "≤" for operator in reversed(operators)]
        return _Relation(sides, operators)

    def quantity(self):
        """A sum with its unit, words, or brackets joined by ∪ or ∖."""
        if self.kind == "word":
            words = []
            while self.kind in ("word", "name") or self.sees("-"):
                words.append(self.next())
            return _Group("text", [" ".join(words)])
        currency = self.accept("¤£€")
        node = self.sum()
        if node.kind != "value":
            while self.accept("∖"):
                node = _without_points(node, self.sum())
            parts = node.items if node.kind == "∪" else [node]
            while self.accept("∪"):
                parts = [*parts, self.sum()]
            return node if len(parts) == 1 else _Group("∪", parts)
        while self.kind == "word" and self.tokens[self.at][1].lower() in _SCALES:
            node = _apply(mul, node, _number(_SCALES[self.next().lower()]))
        unit = ""  # words, signs like %, and powers and quotients of them: cm^2, m/s, °C
        while self.kind == "word" or self.sees("%°¤£€¢") or unit and self.sees("^/*{}-"):
            unit += " " * (self.kind == "word") + self.next()
            if unit[-1] in {"number": "^{", "name": "/*°"}.get(self.kind, ""):
                unit += self.next()
        unit = _unit(re.sub(r"[{}]", "", unit), node.is_constant)
        return node._replace(unit=_UNITS.get(currency) or unit)

    def sum(self):
        node = self.product()
        while self.sees("+-"):
            node = _apply(_add, node, self.product())  # which begins with its sign
        return node

    def product(self):
        node = self.power()
        while True:
            if self.sees("*/"):
                node = _apply(mul if self.next() == "*" else truediv, node, self.power())
            elif self.kind in ("name", "function", "command") or self.sees("(√π∞{⟦["):
                node = _apply(mul, node, self.power())
            elif self.kind == "number" and self.after_power:  # 2^6 3^5
                node = _apply(mul, node, self.power())
            else:
                return node

    def power(self):
        minus = False
        while self.sees("+-"):
            minus ^= self.next() == "-"
        node, self.after_power = self.atom(), False
        if self.accept("^"):  # once: 2^3^4 is not TeX, and may be read in two ways
            node, self.after_power = _apply(_power, node, self.atom()), True
        while self.accept("!"):
            node = _number(math.factorial(_whole(node)))
        return _apply(neg, node) if minus else node

    def atom(self):
        self.depth += 1  # every recursion passes here
        if self.depth > _MAX_DEPTH:
            raise _Unreadable("too deep")
        kind, token = self.kind, self.next()
        if kind == "number":
            node = _number(token) if not self.sees("_") else self.fail()  # in another base
        elif kind == "name":
            node = self.application(re.sub("[{}]", "", token))
        elif token in ("π", "∞"):
            node = _symbol(token)
        elif kind == "function":
            node = self.function(token)
        elif token == r"\frac":
            numerator = self.atom()
            node = _apply(truediv, numerator, self.atom())
        elif token == r"\binom":
            node = _binomial(self.atom(), _whole(self.atom()))
        elif token == "⟦":
            node = self.matrix()
        elif token == "√":
            degree = _number(2)
            if self.accept("["):
                degree = self.sum()
                self.accept("]") or self.fail()
            node = _apply(_power, self.atom(), _apply(truediv, _number(1), degree))
        elif token == "|":
            node = _apply(abs, self.sum())
            self.accept("|") or self.fail()
        else:
            node = self.bracket(token) if kind == "sign" and token in "([{⦃" else self.fail()
        self.depth -= 1
        return node

    def application(self, name: str) -> _Value:
        """A variable, or the value of a function, which is a variable named after its argument.

        Rule: f, g, F, G (and f^{-1}) before a bracket are functions, every other letter is one
        before a bracket with a single number or letter: P(x), a(3), not n(n+1).
        """
        start, exponent = self.at, ""
        inside = [kind for kind, _ in self.tokens[start + 1 : start + 3]]
        if name[0] in "fgFG" and self.accept("^"):
            exponent = f"^{self.atom()}"
        is_function = name[0] in "fgFG" or inside in (["number", "close"], ["name", "close"])
        if name in _CONSTANTS or not is_function or not self.sees("("):
            self.at = start
            return _symbol(name)
        argument = self.atom()
        if argument.kind != "value":
            self.fail()
        points = [f"{complex(number):.9g}" for number in argument.numbers]
        calls = [_symbol(f"{name}{exponent}({point})") for point in points]
        return _Value(tuple(call.numbers[0] for call in calls))

    def function(self, name: str) -> _Value:
        scripts = {}
        while self.sees("^_"):
            script = self.next()
            scripts[script] = self.atom()
        if self.sees("("):
            argument = self.atom()
        else:
            argument = self.power()
            while self.kind in ("name", "command") or self.sees("√π{"):
                argument = _apply(mul, argument, self.power())
        if argument.kind == "value" and argument.unit == "°" or self.accept("°"):
            argument = _apply(truediv, _apply(mul, argument, _symbol("π")), _number(180))
        if scripts.get("^") == _number(-1) and f"arc{name}" in _FUNCTIONS:  # \tan^{-1}
            name = f"arc{name}"
            del scripts["^"]
        base = [scripts["_"]] if name == "log" and "_" in scripts else []
        result = _apply(functools.partial(_call, name), argument, *base)
        return _apply(_power, result, scripts["^"]) if "^" in scripts else result

    def matrix(self) -> _Group:
        rows = [[]]
        while not self.accept("⟧"):
            if self.accept("⏎"):
                rows.append([])
            elif not self.accept("&"):
                rows[-1].append(self.quantity())
        return _Group("matrix", [_Group("row", row) for row in rows if row])

    def bracket(self, left: str):
        items = self.items("close")
        closing = {"(": ")]", "[": ")]", "{": "}", "⦃": "⦄"}[left]
        kind = left + (self.accept(closing) or self.fail())
        if len(items) == 1 and kind in ("()", "[]", "{}"):
            return self.fail() if items[0].kind == "relation" else items[0]
        if kind == "[]" and all(row.kind == "[]" for row in items):
            return _Group("matrix", [_Group("row", row.items) for row in items])  # [[1, 2], [3, 4]]
        return _Group("" if kind == "{}" else kind, items)


def _one_by_one(left: _Side, right: _Side) -> _Group:
    """(x, y) = (1, 2) -> x = 1, y = 2."""
    relations = []
    names = left.text[1:-1].split(",")
    for name, x, y in zip(names, left.value.items, right.value.items, strict=True):
        relations.append(_Relation([_Side(x, name, True), _Side(y, "", False)], ["="]))
    return _Group("", relations)


def _read(text: str):
    """The parsed answer. Each ± stands for both signs of its own."""
    first, *pieces = text.split("±")
    if not pieces:
        items = _Reader(text).items()
        return items[0] if len(items) == 1 else _Group("", items)
    if len(pieces) > 4:
        raise _Unreadable("too many ±")
    values = []
    for signs in itertools.product("+-", repeat=len(pieces)):
        node = _read(first + "".join(sign + piece for sign, piece in zip(signs, pieces)))
        for x in _Comparison(exact=False).meanings(node) or [node]:
            values += x.items if x.kind in ("", "⦃⦄") else [x]
    return _Group("⦃⦄", values)


# --------------------------------------------------------------------------------------- the values

_MAX_BITS, _MAX_LENGTH, _MAX_DEPTH = 2**13, 600, 24
_CONSTANTS = {"π": complex(math.pi), "e": complex(math.e), "i": 1j}


def _number(x) -> _Value:
    return _Value((Fraction(x),) * 3)


@functools.lru_cache(maxsize=4096)
def _symbol(name: str) -> _Value:
    """A constant, a variable or infinity. Variables have both signs, so that |x| is not x."""
    if name in _CONSTANTS:
        return _Value((_CONSTANTS[name],) * 3)
    draw = random.Random(name).randrange  # the same in every process
    return _Value(tuple(Fraction(sign * draw(1, 10**6), 400_009) for sign in (1, -1, 1)))


def _apply(function, *arguments) -> _Value:
    """The function at the three points.

    Raises ArithmeticError or ValueError where it has no value: ZeroDivisionError, OverflowError.
    """
    for argument in arguments:
        if argument.kind != "value":
            raise _Unreadable("arithmetic on something other than a number")
    points = [*zip(*(argument.numbers for argument in arguments))]
    if points[0] == points[1] == points[2]:  # constants
        return _Value((_checked(function(*points[0]), points[0]),) * 3)
    return _Value(tuple(_checked(function(*point), point) for point in points))


def _checked(x: Fraction | complex, operands: tuple) -> Fraction | complex:
    """x, unless it is too large to go on with or a float that became zero by underflow."""
    if isinstance(x, Fraction):
        if max(x.numerator.bit_length(), x.denominator.bit_length()) > _MAX_BITS:
            raise _Unreadable("too large")
    elif not cmath.isfinite(x) or abs(x) < 1e-250 and all(operands):
        raise _Unreadable("too large or too small")
    return x


def _add(x: Fraction | complex, y: Fraction | complex) -> Fraction | complex:
    """The sum; floats that cancel to their last digits make exactly 0."""
    total = x + y
    cancels = isinstance(total, complex) and abs(total) < 1e-13 * abs(x)
    return Fraction(0) if cancels else total


def _power(x: Fraction | complex, y: Fraction | complex) -> Fraction | complex:
    """x^y, exact for whole y and for square roots of squares; real roots where there are any."""
    if not isinstance(x, Fraction) or not isinstance(y, Fraction):
        return complex(x) ** complex(y)
    n, degree = y.as_integer_ratio()
    size = max(abs(x.numerator), x.denominator) - 1  # 0 and 1 may have any power
    if size.bit_length() * abs(n) > 2 * _MAX_BITS * degree:
        raise _Unreadable("too large")
    if degree == 2 and x > 0:
        root = Fraction(math.isqrt(x.numerator), math.isqrt(x.denominator))
        if root * root == x:
            return root**n
    if degree == 1:
        return x**n
    if x < 0 and degree % 2:
        return complex(-((-x) ** (1 / degree))) ** n
    return complex(x) ** (n / degree)


def _call(name: str, x, *base) -> Fraction | complex:
    """A function's value; rounding errors are 0 (the sine of pi, say)."""
    result = _FUNCTIONS[name](x, *base)
    return Fraction(0) if abs(result) < 1e-15 * abs(x) and name != "exp" else result


def _binomial(top: _Value, k: int) -> _Value:
    if k > 20:  # of x it would grow long
        return _number(math.comb(_whole(top), k))

    def choose(x):
        return math.prod(((x - i) / Fraction(i + 1) for i in range(k)), start=Fraction(1))

    return _apply(choose, top)


# -------------------------------------------------------------------------------- comparing answers


def _same_text(a: str, b: str) -> bool:
    """Whether two cleaned answers are the same text, or equal mathematics."""
    if not a or not b or _plain(a) == _plain(b):
        return bool(a and b)
    a, b = _joined(a), _joined(b)
    try:
        exact = bool(_LONG_DECIMAL.search(a)) != bool(_LONG_DECIMAL.search(b))
        return _Comparison(exact).same(_read(a), _read(b))
    except (ValueError, ArithmeticError):  # unreadable, or no value
        return False


_LONG_DECIMAL = re.compile(r"\.0*[1-9]\d{6}")  # which is no irrational number


def _plain(text: str) -> str:
    """Text without spaces, a leading article and a full stop; words also without case."""
    text = re.sub(r"(?i)^(?:the|an|a)\s(?=[a-z]{3})", "", re.sub("[‹›]", "", text).strip())
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(r"\{(\w)\}(?!\w)", r"\1", text))
    text = re.sub(r"^[,;:]+|[.,;:]+$", "", text)  # a leading point is a decimal point
    return text.lower() if text.isalpha() and (len(text) > 2 or text.lower() == "no") else text


class _Comparison:
    """Compares parsed answers, with a bound on the work: lists in lists multiply it.

    exact: one of the two has a long decimal, and floats equal nothing.
    """

    def __init__(self, exact: bool):
        self.exact, self.left = exact, 2500

    def same(self, a, b) -> bool:
        self.left -= 10 if a.kind == "relation" else 1
        if self.left < 0:
            raise _Unreadable("too much to compare")
        if a.kind == b.kind == "relation":
            return self.same_relation(self.without_steps(a), self.without_steps(b))
        if a.kind == b.kind == "value":
            return self.same_quantity(a, b)
        if isinstance(a, _Group) and isinstance(b, _Group) and self.same_group(a, b):
            return True
        for x, y in ((a, b), (b, a)):
            if y.kind != "relation" and any(self.same(meaning, y) for meaning in self.meanings(x)):
                return True
        return False

    def same_group(self, a: _Group, b: _Group) -> bool:
        """Whether two lists, sets, tuples, intervals, unions, matrices or words are the same.

        Rule: lists, sets and unions have no order, unless only one of the two names its values; a
        list may be the tuple of the same order.
        """
        kinds, x, y = {a.kind, b.kind}, a.items, b.items
        if kinds == {"text"}:
            return _plain(x[0]) == _plain(y[0])
        in_any_order = kinds <= {"", "⦃⦄"} or kinds == {"∪"}
        if in_any_order and _are_named(x) == _are_named(y):
            table = [[self.same(item, other) for other in y] for item in x]
            if "⦃⦄" in kinds:
                return all(map(any, table)) and all(map(any, zip(*table))) and bool(x) == bool(y)
            # as often in one as in the other
            return len(x) == len(y) and all(0 < sum(row) == table.count(row) for row in table)
        alike = a.kind == b.kind or kinds == {"", "()"}  # "1, 2" may be the point (1, 2)
        return alike and len(x) == len(y) and all(map(self.same, x, y))

    def same_quantity(self, a: _Value, b: _Value) -> bool:
        """Equal numbers, and no different units.

        Rule: a percentage is a hundredth, and from 1% on also the bare number: 50% is 0.5 and 50.
        """
        if a.unit and b.unit and a.unit != b.unit:
            return False
        equal = all(map(self.close, a.numbers, b.numbers))
        if (a.unit == "%") == (b.unit == "%"):
            return equal
        percent, other = (a, b) if a.unit == "%" else (b, a)
        if equal and abs(percent.numbers[0]) >= 1:
            return True
        return all(self.close(x, 100 * y) for x, y in zip(percent.numbers, other.numbers))

    def close(self, x: Fraction | complex, y: Fraction | complex) -> bool:
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            return x == y
        return not self.exact and abs(x - y) <= 1e-11 * max(abs(x), abs(y))

    def same_relation(self, a: _Relation, b: _Relation) -> bool:
        """Equations up to a factor, inequalities up to a positive one; others side by side.

        Rule: without a variable in both differences, as in 1 + 1 = 2, every factor would do, and
        the sides are compared. y = ... and f(x) = ... both name the values of a function.
        """
        if a.operators != b.operators:
            return False
        if re.fullmatch(r"y [a-zA-Z]\(x\)|[a-zA-Z]\(x\) y", f"{a.sides[0].text} {b.sides[0].text}"):
            return self.same(a.sides[1].value, b.sides[1].value)
        x, y = _differences(a), _differences(b)
        if x and y:
            return all(map(self.proportional, x, y, a.operators))
        x, y = ([side.value for side in relation.sides] for relation in (a, b))
        if all(map(self.same, x, y)):
            return True
        return a.operators in (["="], ["≠"]) and all(map(self.same, x, y[::-1]))

    def proportional(self, a: _Value, b: _Value, operator: str) -> bool:
        """Whether a = c b for one number c, greater than zero for an inequality."""
        first, *others = _apply(truediv, a, b).numbers
        return all(self.close(first, x) for x in others) and (operator in "=≠" or first.real > 0)

    def without_steps(self, chain: _Relation) -> _Relation:
        """x = 5 + 6 = 11 -> x = 11."""
        sides = chain.sides
        if len(sides) > 2 and sides[0].is_name and {*chain.operators} == {"="} and self.said(sides):
            return _Relation([sides[0], sides[-1]], ["="])
        return chain

    def said(self, sides: list[_Side]) -> list:
        """What a chain of equations says: its last side, in a list; nothing if it contradicts that.

        Rule: every side before is a name or equal to the last; after a name it may also have
        variables, as in A = pi r^2 = 9 pi. So 2x = 10 does not say 10.
        """
        *before, (last, _, _) = sides
        for value, _, is_name in before:
            formula = sides[0].is_name and value.kind == "value" and not value.is_constant
            if not (is_name or formula or self.same(value, last)):
                return []
        return [last]

    def meanings(self, node) -> list:
        """What an answer may mean beside itself, when the other one is no relation.

        {5} and x = 5 mean 5; x > 3 means (3, oo), x < 1 or x > 2 a union, x ≠ 0 all but 0.
        Rule for 2/3 ≈ 0.67: either side, if what is after ≈ is the first one rounded.
        """
        if node.kind == "⦃⦄" and len(node.items) == 1:
            return node.items
        if node.kind == "":
            parts = [self.intervals(item) for item in node.items if item.kind == "relation"]
            whole = len(parts) == len(node.items) and all(parts)
            return [_Group("∪", sum(parts, []))] if whole else []
        if node.kind != "relation":
            return []
        sides, operators = node
        if set(operators) == {"="}:
            return self.said(sides)
        if "≈" in operators and set(operators) <= {"=", "≈"}:
            n = operators.index("≈") + 1
            if all(side.is_name for side in sides[:n]):
                return [sides[-1].value] if len(sides) == n + 1 else []
            exact = self.said(sides[:n])
            rounded = exact and all(_rounds(exact[0], side) for side in sides[n:])
            return [*exact, sides[-1].value] if rounded else []
        parts = self.intervals(node)
        return parts if len(parts) < 2 else [_Group("∪", parts)]

    def intervals(self, node: _Relation) -> list:
        """Of which numbers an inequality is true, if one of its sides is a variable."""
        sides, operators = node
        values, infinity = [side.value for side in sides], _symbol("∞")
        if operators == ["≠"] and sides[0].is_name:
            ends = [_apply(neg, infinity), values[1], infinity]
            return [_Group("()", ends[:2]), _Group("()", ends[1:])]
        if not set(operators) <= {"<", "≤"}:
            return []
        if len(sides) == 2 and sides[0].is_name:  # x < 5
            ends, operators = [_apply(neg, infinity), values[1]], ["<", *operators]
        elif len(sides) == 2 and sides[1].is_name:  # 5 < x
            ends, operators = [values[0], infinity], [*operators, "<"]
        elif len(sides) == 3 and sides[1].is_name:
            ends = [values[0], values[2]]
        else:
            return []
        return [_Group("(["[operators[0] == "≤"] + ")]"[operators[1] == "≤"], ends)]


def _differences(relation: _Relation) -> list[_Value]:
    """Left minus right side for every operator; none unless all are numbers with a variable."""
    differences = []
    for sides in itertools.pairwise(relation.sides):
        left, right = (side.value for side in sides)
        if {left.kind, right.kind} != {"value"} or left.unit or right.unit:
            return []
        differences.append(_apply(_add, left, _apply(neg, right)))
    return [] if any(x.is_constant for x in differences) else differences


def _are_named(items: list) -> bool:
    """Whether the values of a list have different names (x = 1, y = 2) or units (3 m, 4 s)."""
    names = []
    for item in items:
        if item.kind == "relation" and item.sides[0].is_name and item.operators[0] == "=":
            names.append(item.sides[0].text)
        else:
            names.append(item.unit if item.kind == "value" else "")
    return all(names) and len(set(names)) > 1


def _rounds(exact, side: _Side) -> bool:
    """Whether a side, as it was written, is the other one to its last place.

    Rule: from the second decimal on it may be cut off (pi ≈ 3.1415), before it must be rounded.
    """
    match = re.fullmatch(
        r"[¤£€]?-?(?=\.?\d)\d*\.?(\d*)(?:\*10\^\{?(-?\d+)\}?)?[^\d+*/^-]*", side.text
    )
    rounded = side.value
    if not match or not exact.kind == rounded.kind == "value" or not exact.is_constant:
        return False
    x, y = exact.numbers[0], rounded.numbers[0]
    if rounded.unit == "%" != exact.unit:
        x = 100 * x
    place = Fraction(10) ** (int(match[2] or 0) - len(match[1]))
    return abs(x - y) < place * (1 if match[1][1:] else Fraction(1, 2))


def _without_points(node, points) -> _Group:
    """An interval without a set of points: (-oo, oo) without {0} is (-oo, 0) ∪ (0, oo)."""
    items = points.items if points.kind == "⦃⦄" else [points]
    is_interval = node.kind in ("()", "(]", "[)", "[]") and len(node.items) == 2
    if not is_interval or any(point.kind != "value" for point in items):
        raise _Unreadable("no interval without points")
    inner = sorted(items, key=lambda point: point.numbers[0].real)
    ends = [node.items[0], *inner, node.items[1]]
    brackets = node.kind[0] + ")(" * len(inner) + node.kind[1]
    pieces = [_Group(brackets[2 * i : 2 * i + 2], ends[i : i + 2]) for i in range(len(ends) - 1)]
    return _Group("∪", pieces)


_CHOICE = re.compile(  # and its text, in which no other choice may hide: A. 12, not (A) or (B)
    r"(?:[Oo]ption |[Cc]hoice )?\(?\s*([A-J])(?:\s*[).:]+(?!\s*(?:or|and|not|[/,])(?!\w))"
    r"(?!.*\([A-J]\)|\s*[A-J](?:[).:,]|$))\s*(.*))?"
)
_FILLER = re.compile(
    r"(?i)(?:‹?\b(?:(?:the )?(?:final )?answer is|approximately|about|roughly|around|exactly|only"
    r"|just|a total of|is|equals|equal to|either|both)\b›?\s*)+"
)
_LABEL = re.compile(  # Area = 5, total cost: 5, P(X = 2) = 5, A(1, 2)
    r"\s*(?=[^=:\d]{0,60}?[A-Za-z]{3})[A-Za-z‹][^=:<>≤≥≠≈∈\d]{0,60}[=:](?!\s*$)"
    r"|^P ?\([^()]{1,40}\) ?=|^[A-Z] ?(?=\([^()]*,)"
)


def _same_choice(a: str, b: str) -> bool | None:
    """Whether two choices are the same, (B) = B. 12; None when neither of them is one.

    Rule for several letters: ABC is one word, in order; the list A, C, D has no order and is ACD.
    """
    a, b = re.sub("[‹›{}]", "", a).strip(), re.sub("[‹›{}]", "", b).strip()
    x, y = _CHOICE.fullmatch(a), _CHOICE.fullmatch(b)
    if x and y:
        return x[1] == y[1] and (not x[2] or not y[2] or _same_text(x[2], y[2]))
    if x or y:
        choice, other = (x, b) if x else (y, a)
        if other.strip("( )").upper() == choice[1]:
            return True
        return True if choice[2] and _same_text(choice[2], other) else None
    letters = [re.sub(r"[\s,;()]|and", "", text) for text in (a, b)]
    if letters == [a, b]:
        return a == b if re.fullmatch("[A-Z]{2,}", a) and re.fullmatch("[A-Z]{2,}", b) else None
    if not all(re.fullmatch("[A-J]{2,10}", text) for text in letters):
        return None
    ordered = any(x == y != "".join(sorted(x)) for x, y in zip(letters, (a, b)))
    return letters[0] == letters[1] or not ordered and sorted(letters[0]) == sorted(letters[1])


def _without_labels(a: str, b: str) -> tuple[str, str]:
    """Both answers without what introduces them: about 5, Area = 5, total cost: 5.

    Rule: words before the only = or : are a label if the other answer has the same ones or none.
    """
    labels, rests = [], []
    for text in (a, b):
        text = _FILLER.sub("", text, count=1)
        label = _LABEL.match(text)
        labels.append(_plain(label[0]) if label else "")
        rests.append(text[label.end() :] if label else text)
    if any(labels) and "=" in rests[0] + rests[1] or all(labels) and labels[0] != labels[1]:
        return "", ""
    return rests[0], rests[1]


# --------------------------------------------------------------------------------------------- code
# verify_code starts a Python process for every input/output pair, or one for all statements. That
# process is a launcher: it shuts itself off from the system, forks the one that runs the solution,
# and kills whatever the solution started when that ends.

_MAX_FILE, _MAX_PROCESSES = 16 << 20, 64  # bytes (of the output too), processes of a user


def verify_code(response: str, tests: list, *, timeout: float = 5.0, memory: int = 1024) -> bool:
    """Whether the last fenced Python block of `response` passes every test.

    tests: `{"input": str, "output": str}` each (standard input and output of a run of its own,
    compared line by line without trailing blanks; exit status 0), or statements with asserts as
    strings, run in their order after the solution in one process.
    timeout: seconds of wall time and of CPU time for a process. memory: MiB of address space for a
    process. False without tests, and for a block that never closes. Raises what check_tests raises,
    TypeError for a response that is no string, NotImplementedError elsewhere than on Linux, nothing
    because of what the response holds.

    The verdict is made in this process. Of `assert f(2) == 4` the child gets `f(2)` and sends back
    plain data; the 4 never leaves this process. So an early exit, printing "passed", objects that
    equal everything, patched built-ins and AssertionErrors fail. An assert of another form, such as
    `assert isclose(f(2), 4)`, is evaluated in the child: objects with operators of their own, a
    patched math module, or code that inspects frames can forge those.

    The child has an empty environment, no inherited descriptors, an empty folder, and limits on
    time, memory, processes and output. Where the kernel allows namespaces it also has no network,
    sees no other process, and can write to that folder only; started by root it runs as nobody.
    Elsewhere (many containers) network and the user's own files and processes are NOT protected.
    Files that the user can read can be read everywhere. Run hostile code in a virtual machine.
    """
    if sys.platform != "linux":
        raise NotImplementedError("verify_code needs Linux")
    _require_strings(response=response)
    if isinstance(tests, (list, tuple)) and not tests:
        return False
    check_tests(tests)
    code = _code_block(response)
    if code is None:
        return False
    job = {"code": code, "timeout": timeout, "memory": memory << 20}
    if isinstance(tests[0], dict):
        return all(_prints(job, test["input"], test["output"]) for test in tests)
    steps, wanted = [], []  # what the child gets; the literal sides, which it does not get
    for statement in _statements("\n".join(tests)):
        test = statement.test if isinstance(statement, ast.Assert) else None
        if isinstance(test, ast.Compare) and [*map(type, test.ops)] == [ast.Eq]:
            sides = [ast.unparse(side) for side in (test.left, test.comparators[0])]
            wanted.append([_literal(side) for side in sides])
            steps.append([None if value else side for value, side in zip(wanted[-1], sides)])
        else:
            wanted.append(None)
            steps.append(ast.unparse(statement))
    token = secrets.token_hex(16)  # what the solution guesses and prints is no reply
    replies = _run(job | {"asserts": True}, json.dumps([token, steps]).encode()) or b""
    replies = replies.split(b"\n")[:-1]
    return len(replies) == len(steps) and all(
        _passed(reply, token, values) for reply, values in zip(replies, wanted)
    )


def check_tests(tests: list) -> None:
    """Raise for tests that verify_code cannot use, without running anything.

    TypeError for another form than verify_code documents, ValueError for no test at all and for a
    statement that is no Python. Call it for every row of a data set before the first sample is
    drawn: a malformed test would give the reward 0 for ever.
    """
    form = 'tests must be a list of {"input": str, "output": str}, or of statements as strings'
    if not isinstance(tests, (list, tuple)):
        raise TypeError(f"{form}, not {type(tests).__name__}: {tests!r:.80}")
    if not tests:
        raise ValueError(f"{form}; the list is empty")
    for test in tests:
        if isinstance(tests[0], dict):
            values = [test.get("input"), test.get("output")] if isinstance(test, dict) else [None]
        else:
            values = [test]
        if not all(isinstance(value, str) for value in values):
            raise TypeError(f"{form}; this is neither: {test!r:.80}")
        if isinstance(test, str):
            _statements(test)


def _statements(source: str) -> list[ast.stmt]:
    try:
        return ast.parse(source).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ValueError(f"a test that is no Python ({error}): {source!r:.80}") from error


_FENCE = re.compile(
    r"(?P<indent>[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)(?P<fence>`{3,}|~{3,})"
    r"[ \t]*\{?\.?(?P<language>\w*)[^`]*"
)


def _code_block(response: str) -> str | None:
    """The last fenced block marked as Python, or without a language where none is marked.

    None when there is none, or when it never closes. As in CommonMark a fence closes with as many
    marks as it has or more, indented by three blanks more at most (a docstring's are deeper). The
    indentation of a fence in a list item is taken from its lines.
    """
    blocks, opening, lines = [], None, []
    for line in response.replace("\r\n", "\n").split("\n"):
        if opening is None:
            opening, lines = _FENCE.fullmatch(line), []
            continue
        depth, fence = len(opening["indent"]), opening["fence"]
        closing = re.fullmatch(r"([ \t]*)(`{3,}|~{3,})[ \t]*(?:<[|/].*)?", line)
        if closing and len(closing[1]) <= depth + 3 and closing[2].startswith(fence):
            indents = [len(line) - len(line.lstrip(" \t")) for line in lines if line.strip()]
            indent = min([depth, *indents])  # (textwrap.dedent would change blanks in strings)
            blocks.append((opening["language"].lower(), "\n".join(line[indent:] for line in lines)))
            opening = None
        else:
            lines.append(line)
    if opening:
        blocks.append((opening["language"].lower(), None))
    marked = [code for language, code in blocks if language in ("python", "python3", "py", "py3")]
    unmarked = [code for language, code in blocks if language == ""]
    return (marked or unmarked or [None])[-1]


def _prints(job: dict, given: str, wanted: str) -> bool:
    """Whether the program, given this input, ends well and prints the wanted lines."""
    out = _run(job, given.encode(errors="replace"))
    return out is not None and _lines(out.decode(errors="replace")) == _lines(wanted)


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().split("\n")]


def _literal(source: str) -> tuple | None:
    """The plain value that a source text spells, in a tuple; None when it spells none."""
    try:
        return (ast.literal_eval(source),)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _passed(reply: bytes, token: str, wanted: list | None) -> bool:
    """Whether the child's reply to one statement says that it passed.

    wanted: the literal sides of an equality, None for another statement.
    """
    try:
        answer, *values = json.loads(reply)
        if answer != token:
            return False
        if values == [True]:  # it ran without an error, or two equal objects that are no plain data
            return wanted in (None, [None, None])
        left, right = (side or (_decoded(value),) for side, value in zip(wanted, values))
        return left == right
    except (ValueError, TypeError, RecursionError, KeyError, AttributeError):
        return False


def _encoded(value):
    """A value for JSON: as it is, or the name of the built-in type that it equals and its contents.

    So a Counter becomes a dict, d.keys() a set, a NumPy array a list. Runs in the child. Raises
    TypeError for what equals no built-in value.
    """
    if value is None or isinstance(value, (str, float)):
        return value
    if isinstance(value, int):  # JSON has a limit on decimal digits
        return ["int", int.__format__(value, "x")]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, Fraction) or isinstance(value, Decimal) and value.is_finite():
        return ["Fraction", [*map(_encoded, value.as_integer_ratio())]]
    if value is ...:
        return ["Ellipsis", []]
    sets = set, frozenset, type({}.keys()), type({}.items())
    for name, kinds in (("dict", dict), ("list", list), ("tuple", tuple), ("frozenset", sets)):
        if isinstance(value, kinds):
            items = value.items() if name == "dict" else value
            return [name, [*map(_encoded, items)]]
    if hasattr(value, "tolist"):
        return _encoded(value.tolist())
    raise TypeError("no plain data")


def _decoded(tree):
    """The value that _encoded wrote down. Raises KeyError and the like for anything else."""
    if not isinstance(tree, list):
        return tree
    name, contents = tree
    if name == "int":
        return int(contents, 16)
    if name == "bytes":
        return bytes.fromhex(contents)
    items = [*map(_decoded, contents)]
    if name in ("complex", "Fraction"):
        return {"complex": complex, "Fraction": Fraction}[name](*items)
    kinds = {"dict": dict, "list": list, "tuple": tuple, "frozenset": frozenset}
    return ... if name == "Ellipsis" else kinds[name](items)


def _run(job: dict, data: bytes) -> bytes | None:
    """What a child, given `data`, wrote to standard output; None when it failed or was stopped."""
    with (
        tempfile.TemporaryDirectory(prefix="verifier_", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as given,
        tempfile.TemporaryFile() as out,  # its limit is that on file size
    ):
        os.chmod(folder, 0o777)
        header = json.dumps(job | {"folder": folder}).encode()
        given.write(b"%10d" % len(header) + header + data)
        given.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-I", "-c", _child_source()],
            stdin=given,
            stdout=out,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={},
            start_new_session=True,
        )
        try:
            status = child.wait(job["timeout"] + 5)  # the launcher stops it after `timeout`
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        out.seek(0)
        return out.read() if status == 0 else None


# ----------------------------------------------------------------------- code: in the child process


@functools.cache
def _child_source() -> str:
    """The program of the child: the functions below. It works in a notebook's cell as well."""
    functions = (_encoded, _launch, _kill_descendants, _isolate, _restrict, _solve)
    try:
        sources = [inspect.getsource(function) for function in functions]
    except (OSError, TypeError) as error:
        raise TypeError(
            "verify_code must read its own source for the child process: import verifier.py as a "
            "file, or paste it into a notebook's cell, but do not exec its text"
        ) from error
    imports = "ast builtins contextlib ctypes glob json math os signal sys types".replace(" ", ", ")
    imports = f"import {imports}\nfrom decimal import Decimal\nfrom fractions import Fraction\n"
    limits = f"_MAX_FILE, _MAX_PROCESSES = {_MAX_FILE}, {_MAX_PROCESSES}\n"
    return imports + limits + "\n".join(sources) + "\n_launch()\n"


def _launch() -> None:
    """The launcher: reads its job from standard input, and leaves the rest to the solution.

    The job is ten digits for its length, and JSON.
    """
    text, size = b"", int(os.read(0, 10))
    while len(text) < size:
        text += os.read(0, size - len(text))
    job, libc = json.loads(text), ctypes.CDLL(None)
    isolated = _isolate(libc, job["folder"].encode())
    # PR_SET_CHILD_SUBREAPER: what the solution's children leave behind becomes a child of this one
    libc.prctl(36, 1, 0, 0, 0)
    pid = os.fork()
    if pid == 0:
        _restrict(libc, job)
        return _solve(job)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, job["timeout"])
    status = os.waitpid(pid, 0)[1]  # the first process of a PID namespace takes all others with it
    if not isolated:
        _kill_descendants()
    os._exit(status != 0)


def _kill_descendants() -> None:
    """Stop them first: a stopped process forks no more, but counts towards the limit on processes.

    So a fork bomb comes to its end.
    """
    stopped = set()
    while True:
        found = [os.getpid()]
        for parent in found:  # which grows meanwhile
            for file in glob.glob(f"/proc/{parent}/task/*/children"):
                with contextlib.suppress(OSError), open(file) as children:  # (it may have ended)
                    found += map(int, children.read().split())
        running = {*found[1:]} - stopped
        if not running:
            break
        for pid in running:
            os.kill(pid, signal.SIGSTOP)
        stopped |= running
    for pid in found[1:]:
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _isolate(libc, folder: bytes) -> bool:
    """New namespaces: no network, no other processes, nothing writable but `folder`.

    Returns whether the kernel allowed it.
    """
    uid, gid = os.getuid(), os.getgid()
    spaces = 0x40000000 | 0x20000000 | 0x20000 | 0x8000000  # CLONE_NEWNET, NEWPID, NEWNS, NEWIPC
    new_user = 0x10000000  # CLONE_NEWUSER: how those who are not root get the others
    for user in (0, new_user) if uid == 0 else (new_user,):
        if libc.unshare(spaces | user) == 0:
            break
    else:
        return False
    if user:
        maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
        for name, text in maps.items():
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    private, readonly = 1 << 18, 1
    if libc.mount(None, b"/", None, private | 1 << 14, None) == 0:  # seen in here only (MS_REC)
        attributes = (ctypes.c_uint64 * 4)(readonly, 0, 0, 0)
        libc.syscall(442, -100, b"/", 0x8000, attributes, 32)  # mount_setattr(AT_RECURSIVE)
        options = b"size=%d,mode=777" % _MAX_FILE
        libc.mount(b"tmpfs", folder, b"tmpfs", 6, options)  # MS_NOSUID | MS_NODEV
        libc.mount(b"tmpfs", b"/proc", b"tmpfs", 6 | readonly, None)  # others' /proc/<pid>/environ
    return True


def _restrict(libc, job: dict) -> None:
    """Fewer rights and resource limits for this process."""
    import resource

    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    capabilities = 0
    if os.getuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)
        if not os.access(os.__file__, os.R_OK, effective_ids=True):
            capabilities = 1 << 2  # CAP_DAC_READ_SEARCH: the interpreter is below /root, say
        os.seteuid(0)
        libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)  # root would not be bound by the limit on processes
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)
    libc.capset(header, sets(capabilities, capabilities))
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: not without the launcher
    os.chdir(job["folder"])
    limits = {"CPU": math.ceil(job["timeout"]), "AS": job["memory"], "NPROC": _MAX_PROCESSES}
    limits |= {"FSIZE": _MAX_FILE, "CORE": 0, "NOFILE": 64}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def _solve(job: dict) -> None:
    """Run the solution: as a program, or loaded and then asked for the values of the tests."""
    sys.set_int_max_str_digits(0)
    name = "solution" if "asserts" in job else "__main__"
    module = types.ModuleType(name)
    sys.modules["__main__"] = sys.modules[name] = module  # dataclasses and pickle look it up
    namespace = vars(module)
    code = compile(job["code"], "solution.py", "exec")
    if "asserts" not in job:
        exec(code, namespace)
        return
    requests, replies, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    originals = dict(vars(builtins))
    exec(code, namespace)
    vars(builtins).update(originals)
    with open(requests, "rb") as file:
        token, steps = json.loads(file.read())
    for step in steps:
        if isinstance(step, str):
            exec(step, namespace)
            values = [True]
        else:
            sides = [side and eval(side, namespace) for side in step]
            try:
                values = [source and _encoded(side) for source, side in zip(step, sides)]
            except TypeError:  # two objects that are no plain data
                left, right = sides
                values = [None not in step and type(left) is type(right) and bool(left == right)]
        os.write(replies, json.dumps([token, *values]).encode() + b"\n")
    os._exit(0)
