r"""The binary verifier r(y, a): 1 when the last final answer of a response equals the gold answer, else 0.

    verify(response, gold)         mathematics by the conventions of GSM8K, MATH, OpenR1-Math and AIME
    verify_code(response, tests)   Python programs, by input/output pairs or assert statements

The verifiable rewards of SD-Zero (arXiv 2604.12002). Standard library only: copy this file out and it works. Nothing that a model wrote
is evaluated (mathematics) or run in this process (code); nothing raises or hangs; the result is always True or False.

Which answer is the last? Markers are \boxed{} and \fbox{}, `####`, and "answer is" (or "answer:", <answer>). The LAST marker in the text
counts, so a revision outranks the first attempt whatever both used. Passed over are boxes without an answer (\boxed{}, \boxed{...}: an
instruction repeated), headings (`#### Step 2`) and phrases that state none ("the answer is correct"). A box that never closes ends the
search: the response was cut there and has no answer.

Claimed equal (accuracy by category: tests/bench_verifier.py):
  integers       1,234 = 1{,}234 = 1\,234 = 1 234 = 1234. A comma is never a decimal point.
  decimals       0.50 = 1/2 = .5, exactly. A decimal that ROUNDS the gold value is wrong (0.333 for 1/3), unless gold is that decimal.
  fractions      a/b, \frac, \dfrac, \tfrac, mixed numbers; lowest terms or not
  percentages    50% = 0.5 = 1/2; and 50% = 50 as GSM8K and MATH have it, from 1% on (0.5% is not 0.5)
  powers         2^{10} = 1024; scientific notation 1.5 \times 10^3 = 1.5e3; 5!, \binom{5}{2}
  surds, pi      to 200 digits with square roots, pi and e; i, other roots, logarithms and trigonometric functions to 1e-9 relative
  units          dropped when one side has none, equal when both have one (cm = centimeters, $ = dollars); degrees, currency likewise
  assignments    x = 5, f(2) = 5, m + n = 5, Area = 5 for 5; not 2x = 10 for 10
  tuples         in order; intervals with their brackets; vectors and matrices entry by entry, a row is not a column
  sets, lists    in any order; {1, 2} is not (1, 2)
  expressions    polynomial and rational ones: 2(x+1) = 2x+2. The case of a letter counts.
  relations      equations up to a constant factor, inequalities up to a positive one; x > 3 = (3, \infty)
  choices        (B) = B = \text{B} = B. 12; ACD = A, C, D; words by letters, whatever their case and spaces
Not claimed: an answer without a marker; conversion of units, number words, decimal commas, multiples of matrices, determinants,
set-builder notation, answers longer than 600 characters, numbers beyond 10^2400; ratios (3:4), times and numbers in other bases count as
written.
"""

import ast
import builtins
import cmath
import contextlib
import ctypes
import functools
import glob
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
import threading
from fractions import Fraction
from operator import add, mul, neg, sub, truediv
from typing import NamedTuple

# ------------------------------------------------------------------------------------------------------------ finding the answer

_MARKER = re.compile(
    r"(?P<box>\\f?box(?:ed)?(?:\s*(?:\{|\Z)|\s?(?P<bare>\d+)))|(?P<hash>#{4,})"
    r"|\b(?<!</)(?<!check the )(?<!verify the )(?<!if the )(?<!\{)(?<!\{the )(?<!\{final )(?<!\{the final )answers?\b(?:"
    r"[^\n.:=]{0,60}?\s(?:is|are|was|equals|(?:would|should|will|must)\s+be)\b"  # the answer, in dollars, is
    r"(?:\s+(?:therefore|thus|simply|indeed|then|just|clearly)\b)?[*:\s]*(?:(?<=\n)- )?"  # (a list of one)
    r"|>\s*|[^\n\w:=]{0,4}[:=][*\s]*|[*#\s]{0,4}\n\s*)",  # <answer>, **Answer:**, ### Final Answer
    re.IGNORECASE,
)
_EMPTY = re.compile(r"(?:\\text\{)?(?:\s|\.|…|\\[lc]?dots|\\[,; ]|_|\?|your|the|final|answer|number|letter|here)*\}?", re.IGNORECASE)
_NO_ANSWER = re.compile(  # what stands behind "the answer is" or "####" and is no answer
    r"(?i)(?:not|in|of|to|that|quite|very|(?:in)?correct|right|wrong|(?:in)?valid|reasonable|consistent|confirmed|unique|obtained|given"
    r"|found|expressed|written|rounded|as|what|clear|step|verif\w+|check\w*|solution|conclusion|explanation|note|analysis|case|method|part"
    r"|summary|why|how|(?:we|i|this)(?=\s))\b"
)
_REASON = re.compile(  # what may follow the answer in its sentence
    r"(?i)[,;]?\s*\(?\b(?:because|since|which|where|when|so|as|if|but|hence|thus|therefore|after|from|given|not|by|using|see"
    r"|and (?:we|this|that|it|so|not))\b"
)
_FORMULA = re.compile(  # in its delimiters, alone or before a unit, and no item of a list
    r"(?:\$\$?|\\[(\[])((?:[^$\\]|\\[^)\]])+)(?:\$\$?|\\[)\]])(?!(?:[ ,;]|and\b|or\b)*(?:\$|\\\(|-?\d))"
    r"(?:\s*(\\?%|°|[a-zA-Z]+)(?=\s*\*{0,2}(?:[.,;!]|\n|$)))?"
)
_BRACES = re.compile(r"\\.|[{}]", re.DOTALL)


def _boxed(text: str, start: int) -> str | None:
    """What stands in the box that opens before `start`; None when it never closes."""
    depth = 1
    for match in _BRACES.finditer(text, start):  # an escaped brace is a set's, not a group's
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return text[start : match.start()]
    return None


def _stated(text: str) -> str:
    """The answer at the beginning of a text: a formula in its delimiters, or words up to the end of the sentence or its reason."""
    text = text.lstrip(" \t\n*:_")
    if formula := _FORMULA.match(text):
        return " ".join(filter(None, formula.groups()))
    sentence = re.split(r"[.!?](?=[\s*]|$)|(?<=\w)\*\*(?!\w)|\n|<[|/]", text, maxsplit=1)[0]
    return re.sub(r"\s\([A-Za-z][A-Za-z -]{3,}\)$", "", _REASON.split(sentence, maxsplit=1)[0].strip(" *,;:"))  # 42 (forty-two)


def extract_answer(response: str) -> str | None:
    """The last final answer of a response, as it was written; None when it states none. The rule stands at the top of this file."""
    fallback = None
    for match in [*_MARKER.finditer(response)][:-200:-1]:  # from the last one on; more is no honest text
        if match["box"]:
            content = match["bare"] or _boxed(response, match.end())
            if content is None:
                return fallback
            if not _EMPTY.fullmatch(content):
                return content.strip()
        else:
            content = response[match.end() : match.end() + 500].lstrip(" \t#*")
            if match["hash"]:
                content = re.split(r"\n|<[|/]", content)[0].strip(" *")  # up to <|endoftext|>
            else:
                bold = re.match(r"[A-Z][a-z]* [^\n*.]{3,100}\*\*([^*\n]{1,60})\*\*", content)  # The train travels **120 miles**.
                content = bold[1] if bold else _stated(content)
            if content and not _EMPTY.fullmatch(content) and not _NO_ANSWER.match(content):
                if len(content.split()) <= 3 and not content.startswith(("a ", "an ")) or re.match(r"[-+$¤£€\\({\[.\d]", content):
                    return content
                fallback = fallback or content  # a long sentence counts only when nothing better stands before it
    return fallback


# ------------------------------------------------------------------------------------------------------------------ exact values
# An expression is its values at three points, where every variable is a rational number drawn by its name: rational functions that differ
# agree there with a chance of 1e-15. Square roots, pi and e are fractions, right to 200 digits. All other numbers are complex floats.

_MAX_BITS, _MAX_LENGTH, _MAX_DEPTH = 2**13, 600, 24
_SCALE = 10007**53  # the denominator of irrational numbers: 212 digits, and hardly that of a rational one, which tells the two apart


class _Unreadable(ValueError):
    """Not mathematics that this file reads, or too deep: the answer is then compared as text."""


class _Value(NamedTuple):
    numbers: tuple[Fraction | complex, ...]  # at the three points
    unit: str = ""


class _Group(NamedTuple):
    kind: str  # its two brackets; "" a bare list; "∪" a union; "matrix" and its "row"s; "text" with one string
    items: list


class _Relation(NamedTuple):
    sides: list
    operators: list  # = ≠ < ≤ ≈; what was written with > and ≥ is turned round
    names: list  # for every side, whether it only names what is asked for: x, m + n, a/b, sin A, f(2), (x, y); not 2x, x + 1, x^2


def _number(x) -> _Value:
    return _Value((Fraction(x),) * 3)


def _arctan(n: int) -> int:
    return sum((-1) ** k * _SCALE // ((2 * k + 1) * n ** (2 * k + 1)) for k in range(160))  # of 1/n, times _SCALE


_CONSTANTS = {
    "π": Fraction(16 * _arctan(5) - 4 * _arctan(239), _SCALE),
    "e": Fraction(sum(_SCALE // math.factorial(k) for k in range(150)), _SCALE),
    "i": 1j,
}


@functools.lru_cache(maxsize=4096)
def _symbol(name: str) -> _Value:
    """A constant, a variable or infinity. Variables have both signs, so that |x| is not x, and are no whole numbers."""
    if name in _CONSTANTS:
        return _Value((_CONSTANTS[name],) * 3)
    draw = random.Random(name).randrange  # the same in every process
    return _Value(tuple(Fraction(sign * draw(1, 10**6), 400_009) for sign in (1, -1, 1)))


def _irrational(x: Fraction | complex) -> bool:
    return isinstance(x, Fraction) and x.denominator % 10007**40 == 0


def _short(x: Fraction | complex, rounded: bool) -> Fraction | complex:
    """x, to 212 digits behind the point if it is to be rounded."""
    if isinstance(x, Fraction) and rounded:
        x = Fraction(x.numerator * _SCALE // x.denominator, _SCALE)
    if max(map(int.bit_length, x.as_integer_ratio())) > _MAX_BITS if isinstance(x, Fraction) else not cmath.isfinite(x):
        raise _Unreadable("too large")
    return x


def _apply(function, *arguments) -> _Value:
    """The function at the three points. Raises ArithmeticError or ValueError where it has no value, ZeroDivisionError for example."""
    for argument in arguments:
        if not isinstance(argument, _Value):
            raise _Unreadable("arithmetic on something other than a number")
    points = [*zip(*(argument.numbers for argument in arguments))]
    if points[0] == points[1] == points[2]:  # constants
        points = points[:1]
    numbers = [_short(function(*point), any(map(_irrational, point))) for point in points]
    return _Value(tuple(numbers * 3 if len(numbers) == 1 else numbers))


def _power(x: Fraction | complex, y: Fraction | complex) -> Fraction | complex:
    if not isinstance(x, Fraction) or not isinstance(y, Fraction) or y.denominator > 64:
        return complex(x) ** complex(y)
    x, n = _root(x, y.denominator), abs(y.numerator)
    if isinstance(x, complex):
        return x**y.numerator
    if n.bit_length() > 64 and abs(x) != 1:
        raise _Unreadable("too large")
    result, rounded = Fraction(1), _irrational(x)
    for bit in bin(n)[2:]:
        result = _short(result * result * (x if bit == "1" else 1), rounded)
    return result if y > 0 else _short(1 / result, rounded)


def _root(x: Fraction, degree: int) -> Fraction | complex:
    """The degree-th root, the real one if there is one: exact for squares, to 212 digits for square roots, else a float."""
    if degree == 1:
        return x
    if x < 0 and degree % 2:
        return -_root(-x, degree)
    n, d = x.as_integer_ratio()
    if x < 0 or degree > 2:
        return complex(x) ** (1 / degree)
    root = Fraction(math.isqrt(n), math.isqrt(d))
    return root if root * root == x else Fraction(math.isqrt(n * d * _SCALE**2), d * _SCALE)


_FUNCTIONS = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "cot": lambda x: 1 / cmath.tan(x), "sec": lambda x: 1 / cmath.cos(x),
    "csc": lambda x: 1 / cmath.sin(x), "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "ln": cmath.log, "exp": cmath.exp,
    "log": lambda x, base=10: cmath.log(x) / cmath.log(base),
}  # fmt: skip


def _close(x: Fraction | complex, y: Fraction | complex) -> bool:
    if isinstance(x, Fraction) and isinstance(y, Fraction):
        return x == y or (_irrational(x) or _irrational(y)) and abs(x - y) <= (abs(x) + abs(y) + 1) / 10**190
    if any(isinstance(z, Fraction) and z.denominator > 10**6 and 10**400 % z.denominator == 0 for z in (x, y)):
        return False  # a decimal that agrees to 1e-9 with an irrational number is that number rounded
    return abs(x - y) <= 1e-9 * max(abs(x), abs(y)) + 1e-13


# ------------------------------------------------------------------------------------------------------------- reading an answer

_COMMANDS = {
    **dict.fromkeys("left right big Big bigl bigr Bigl Bigr bigg Bigg displaystyle textstyle quad qquad limits boxed mathit mathbb mathcal "
                    "boldsymbol bm vec overrightarrow angle triangle hline bf rm it checkmark , ; : ! > ( ) [ ]".split(), " "),
    " ": " ", "\n": " ", "dfrac": r"\frac ", "tfrac": r"\frac ", "cfrac": r"\frac ", "dbinom": r"\binom ", "tbinom": r"\binom ",
    "cdot": "*", "times": "*", "ast": "*", "div": "/", "pi": " π ", "infty": "∞", "sqrt": "√", "infinity": "∞",
    "le": "≤", "leq": "≤", "leqslant": "≤", "ge": "≥", "geq": "≥", "geqslant": "≥", "lt": "<", "gt": ">", "ne": "≠", "neq": "≠",
    "in": "∈", "approx": "≈", "simeq": "≈", "circ": "°", "degree": "°", "%": "%", "$": "¤", "pounds": "£", "pm": "±", "mp": "∓",
    "{": "⦃", "}": "⦄", "lbrace": "⦃", "rbrace": "⦄", "lbrack": "[", "rbrack": "]", "langle": "(", "rangle": ")", "lvert": "|",
    "rvert": "|", "vert": "|", "|": "|", "cup": "∪", "bigcup": "∪", "lor": " or ", "vee": " or ", "land": " and ", "wedge": " and ",
    "emptyset": "⦃⦄", "varnothing": "⦃⦄", "\\": "⏎", **{name: f" {name} " for name in _FUNCTIONS},
    **{name: f" {letter} " for name, letter in zip(
        "alpha beta gamma delta epsilon varepsilon eta theta lambda mu nu rho sigma tau phi psi omega Delta Gamma Omega".split(),
        "αβγδεεηθλμνρστφψωΔΓΩ")},
}  # fmt: skip
_UNICODE = str.maketrans({
    **{chr(i + 0xFEE0): chr(i) for i in range(0x21, 0x7F)}, "。": ".", "、": ",", "~": " ", "ℝ": r"\mathbb{R}",  # first: full-width forms
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "²": "^2",
    "³": "^3", "\u00a0": " ", "\u202f": " ", "\u2009": " ", "’": "'", "“": "", "”": "", '"': "", "`": "", "⟨": "(", "⟩": ")", "º": "°",
    "∅": r"\emptyset ", "\x01": " ",
})  # fmt: skip
_UNITS = {
    alias: words.split()[0]
    for words in (
        "$ dollar usd ¤ buck|£ pound gbp|€ euro eur|¢ cent|% percent|° degree deg|mm millimeter millimetre|cm centimeter centimetre|m meter"
        " metre|km kilometer kilometre|in inch inche|ft foot feet|yd yard|mi mile|mg milligram|g gram|kg kilogram|lb|oz ounce|ml milliliter"
        " millilitre|l liter litre|s second sec|min minute|h hour hr|mph|kph|d day|week|month|year yr|unit|rad radian"
    ).split("|")
    for alias in words.split()
}
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}


_TEXT = r"\\(?:text(?:bf|it|rm|sf|tt|up|normal)?|operatorname|mathrm|mathbf|mathsf|mbox|hbox)\s*\{"
_REWRITES = [
    (r"(?<=\d)(?:\{,\}|,?\\[,!;: ])\s*(?=\d{3}(?!\d))", ""),  # 1{,}234
    (r"(\d{0,50}\.)(\d{0,50})\\(?:overline|bar)\{(\d{1,50})\}",  # 0.1\overline{6} = 0.1 + 6 / (10 * 9)
     lambda match: f"(0{match[1]}{match[2]}0 + {match[3]} / ({10 ** len(match[2])} * {10 ** len(match[3]) - 1}))"),
    (r"(?<=\d) ?x ?(?=10\^)", "*"),
    (r"(?<![\\A-Za-z])(sqrt|pi|infinity)(?![A-Za-z])", r"\\\1"),
    (r"\\mathbb ?\{?R\}?", r"(-\\infty,\\infty)"),
    (r"\\(?:text)?color\{[^{}]*\}|\\overline ?(?=\{[A-Z]{2}\})", ""),
    (r"\{([^{}]*)\\over(?![a-z])([^{}]*)\}", r"{\\frac{\1}{\2}}"),
    (r"\{([^{}]*)\\choose(?![a-z])([^{}]*)\}", r"{\\binom{\1}{\2}}"),
    (_TEXT + r"\s*([A-Za-z][A-Za-z ./'-]*)\}", " \x01\\1\x01 "),  # words
    (_TEXT + r"([^{}]*)\}", r" \1 "),  # \text{} in \text{}
    (r"\\[dt]?frac ?\{ \x01([^\x01]*)\x01 \}\{ \x01([^\x01]*)\x01 \}", "\x01\\1/\\2\x01"),  # \frac{km}{h}
    (r"\\begin\{(?:[pbB]?matrix\}|array\}(?:\{[^{}]*\})?)", "⟦"),
    (r"\\end\{(?:[pbB]?matrix|array)\}", "⟧"),
    (r"\\([A-Za-z]+|(?s:.))", lambda match: _COMMANDS.get(match[1], match[0] + " ")),
    (r"\\(frac|binom)\s*(\d)\s*(\d)", r"\\\1{\2}{\3}"),  # \frac12
    (r"(?<=[\w)}])\*\*(?=[\w({])", "^"),
    ("<=", "≤"), (">=", "≥"), ("!=", "≠"), ("==", "="),
    (r"\A([^$]*)\$(?=\s?[\d.])([^$]*)\Z", r"\1¤\2"),  # a single one is a currency sign
    (r"\*\*|__|\$", " "),
    (r"\^ ?(-\d+|-[A-Za-z])", r"^{\1}"),
    (r"-\s*([¤£€])", r"\1-"),
    (r"\^\s*(?:\{\s*(?:°|\x01o\x01)\s*\}|°)", "°"),
    (r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d/,]| \d)", lambda match: match[0].replace(" ", "")),  # 10 000
    (r"(?<![\w.,^])(\d+) *(\\frac *\{ *\d+ *\} *\{ *\d+ *\}|(?<= )\d+ ?/ ?\d+(?![\d.]))", r"(\1+\2)"),  # 3 1/2
    (r"\s+", " "),
]  # fmt: skip


def _clean(text: str) -> str:
    """One spelling for what LaTeX, Markdown and Unicode spell in several ways. Words of \\text{} come out between \\x01 characters."""
    text = text.translate(_UNICODE)
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    return text.lstrip(" ,;:=≈").rstrip(" .,;:")


def _unit(text: str) -> str:
    """One spelling for a unit: centimeters -> cm, square meters -> m^2, dollars -> $."""
    words = []
    for word in re.sub(r"\bper\b|/", " / ", text.lower()).replace("^ ", "^").split():
        name, _, power = word.strip(".").partition("^")
        name = _UNITS.get(name) or _UNITS.get(name.removesuffix("s")) or name.removesuffix("s")
        if words and words[-1] in ("square", "sq", "cubic"):
            power = "3" if words.pop() == "cubic" else "2"
        words.append(name + (f"^{power}" if power else ""))
    return " ".join(words).replace("mi / h", "mph")


_LETTER = "[A-Za-zΑ-Ωα-ορ-ω]"  # without pi
_NAME = rf"{_LETTER}(?:_(?:\w|\{{\w{{1,9}}\}})'*|'+)"
_TOKEN = re.compile(
    rf"\s*(?:\x01(?P<word>[^\x01]*)\x01|(?P<number>\d+(?:\.\d+)?(?:[eE][+-]?\d{{1,3}}(?![\w^]))?|\.\d+)"
    rf"|(?P<name>{_NAME}|{_LETTER}+)|(?P<command>\\[A-Za-z]+)|(?P<sign>\S))"
)
_NAMES = re.compile(rf"(?!-)(?:(?!log|ln|exp)(?:{_NAME}|{_LETTER})(?:\(-?\d[\d./]*\))?|\\frac|[-+*/(),|{{}}⟦⟧⏎&])+")  # see _Relation.names


def _tokens(text: str) -> list[tuple[str, str]]:
    """Pairs of a kind (number, name, word, function, command, sign, close, and, end) and a text."""
    tokens = []
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup, match[match.lastgroup].strip()
        spaced, behind, low = match[0][0] == " ", tokens[-1][0] if tokens else "", token.lower()
        if kind == "sign":
            kind = "close" if token in "}⦄)]⟧" else "and" if token in ",;" else kind
        elif low in ("and", "or"):
            kind = "and"
        elif low in _FUNCTIONS:
            kind, token = "function", low
        elif kind == "name" and len(token) > 1 and token.isalpha():
            if len(token) > 3 or low in _UNITS or spaced and behind or not behind and (len(token) > 2 or low in ("no", "on", "is")):
                kind = "word"
            else:  # a product of variables
                tokens += [(kind, letter) for letter in token[:-1]]
                token = token[-1]
        tokens.append((kind, token))
    return tokens + [("end", "")]


def _whole(node) -> int:
    """A whole number up to 300."""
    n = node.numbers[0] if isinstance(node, _Value) else None
    if not isinstance(n, Fraction) or n not in range(301):
        raise _Unreadable("no small whole number")
    return int(n)


class _Reader:
    """Recursive descent over the tokens of one answer: list, relation, union, quantity, sum, product, power, atom."""

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
        """Statements between commas, semicolons, `and`, `or`, up to the end or a closing bracket."""
        items = [self.statement()]
        while self.kind == "and":
            while self.kind == "and":
                self.next()
            items.append(self.statement())
        return items if self.kind == end else self.fail()

    def statement(self):
        sides, operators, names = [], [], []
        while not sides or self.sees("=<>≤≥≠≈∈"):
            operators += [self.next()] if sides else []
            start = self.at
            sides.append(self.quantity())
            names.append(bool(_NAMES.fullmatch("".join(token for _, token in self.tokens[start : self.at]))))
        if operators == ["∈"] and names[0]:
            return sides[1]
        if operators and set(operators) <= {">", "≥"}:
            operators = ["<" if operator == ">" else "≤" for operator in operators]
            sides, operators, names = sides[::-1], operators[::-1], names[::-1]
        return _Relation(sides, operators, names) if operators else sides[0]

    def quantity(self):
        if self.kind == "word":
            words = []
            while self.kind in ("word", "name") or self.sees("-"):
                words.append(self.next())
            return _Group("text", [" ".join(words)])
        currency = self.accept("¤£€")
        node = self.sum()
        if isinstance(node, _Group):
            parts = [node]
            while self.accept("∪"):
                parts.append(self.sum())
            return node if len(parts) == 1 else _Group("∪", parts)
        while self.kind == "word" and self.tokens[self.at][1].lower() in _SCALES:
            node = _apply(mul, node, _number(_SCALES[self.next().lower()]))
        unit = ""  # words, signs like %, and powers and quotients of them: cm^2, m/s, °C
        while self.kind == "word" or self.sees("%°¤£€¢") or unit and self.sees("^/*{}-"):
            unit += " " * (self.kind == "word") + self.next()
            if unit[-1] in "^{" and self.kind == "number" or unit[-1] in "/*°" and self.kind == "name":
                unit += self.next()
        return node._replace(unit=_unit(currency or re.sub(r"[{}]", "", unit)))

    def sum(self):
        node = self.product()
        while self.sees("+-"):
            node = _apply(add, node, self.product())  # which begins with its sign
        return node

    def product(self):
        node = self.power()
        while True:
            if self.sees("*/"):
                node = _apply(mul if self.next() == "*" else truediv, node, self.power())
            elif self.kind in ("name", "function", "command") or self.sees("(√π∞{⟦["):
                node = _apply(mul, node, self.power())
            else:
                return node

    def power(self):
        minus = False
        while self.sees("+-"):
            minus ^= self.next() == "-"
        node = self.atom()
        if self.accept("^"):  # once: 2^3^4 is not TeX, and may be read in two ways
            node = _apply(_power, node, self.atom())
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
        elif kind == "name" or token in ("π", "∞"):
            node = _symbol(re.sub("[{}]", "", token))
        elif kind == "function":
            node = self.function(token)
        elif token == r"\frac":
            numerator = self.atom()
            node = _apply(truediv, numerator, self.atom())
        elif token == r"\binom":
            top, k = self.atom(), _whole(self.atom())
            if k > 20:  # of x, and even of pi, it would grow long
                node = _number(math.comb(_whole(top), k))
            else:
                node = _apply(lambda x: math.prod(((x - i) / Fraction(i + 1) for i in range(k)), start=Fraction(1)), top)
        elif token == "⟦":
            rows = [[]]
            while not self.accept("⟧"):
                if self.accept("⏎"):
                    rows.append([])
                elif not self.accept("&"):
                    rows[-1].append(self.quantity())
            node = _Group("matrix", [_Group("row", row) for row in rows if row])
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
        if isinstance(argument, _Value) and argument.unit == "°" or self.accept("°"):
            argument = _apply(truediv, _apply(mul, argument, _symbol("π")), _number(180))
        if scripts.get("^") == _number(-1) and f"arc{name}" in _FUNCTIONS:  # \tan^{-1}
            name = f"arc{name}"
            del scripts["^"]
        result = _apply(_FUNCTIONS[name], argument, *([scripts["_"]] if name == "log" and "_" in scripts else []))
        return _apply(_power, result, scripts["^"]) if "^" in scripts else result

    def bracket(self, left: str):
        items = self.items("close")
        kind = left + (self.accept({"(": ")]", "[": ")]", "{": "}", "⦃": "⦄"}[left]) or self.fail())
        if len(items) == 1 and kind in ("()", "[]", "{}"):
            return self.fail() if isinstance(items[0], _Relation) else items[0]
        if kind == "[]" and all(isinstance(row, _Group) and row.kind == "[]" for row in items):
            return _Group("matrix", [_Group("row", row.items) for row in items])  # [[1, 2], [3, 4]]
        return _Group("" if kind == "{}" else kind, items)


# ------------------------------------------------------------------------------------------------------------- comparing answers


_work = threading.local()  # what is left to spend on the comparison at hand: lists in lists multiply it


def _same(a, b) -> bool:
    """Whether two parsed answers are equal."""
    _work.left -= 10 if isinstance(a, _Relation) else 1
    if _work.left < 0:
        raise _Unreadable("too much to compare")
    if isinstance(a, _Relation) and isinstance(b, _Relation):
        return _same_relation(a, b)
    if isinstance(a, _Value) and isinstance(b, _Value):
        return _same_quantity(a, b)
    if isinstance(a, _Group) and isinstance(b, _Group):
        kinds, x, y = {a.kind, b.kind}, a.items, b.items
        if kinds == {"text"}:
            return _plain(x[0]) == _plain(y[0])
        if kinds <= {"", "⦃⦄"} or kinds == {"∪"}:  # in any order
            table = [[_same(item, other) for other in y] for item in x]
            if "⦃⦄" in kinds:
                same = all(map(any, table)) and all(map(any, zip(*table))) and bool(x) == bool(y)
            else:  # as often in the one as in the other
                same = len(x) == len(y) and all(0 < sum(row) == table.count(row) for row in table)
        else:  # "1, 2" may stand for the point (1, 2)
            same = (a.kind == b.kind or kinds == {"", "()"}) and len(x) == len(y) and all(map(_same, x, y))
        if same:
            return True
    return any(not isinstance(y, _Relation) and any(_same(z, y) for z in _meanings(x)) for x, y in ((a, b), (b, a)))


def _same_quantity(a: _Value, b: _Value) -> bool:
    if a.unit and b.unit and a.unit != b.unit:
        return False
    percent, plain = (b, a) if b.unit == "%" else (a, b)
    factors = [1]
    if percent.unit == "%" != plain.unit:
        factors = [100, 1] if abs(percent.numbers[0]) >= 1 else [100]
    return any(all(_close(x, factor * y) for x, y in zip(percent.numbers, plain.numbers)) for factor in factors)


def _meanings(node) -> list:
    """What an answer may stand for beside one that is no relation: x = 5 and {5} for 5, x > 3 for (3, oo), x < 1 or x > 2 for a union."""
    if isinstance(node, _Group) and node.kind == "⦃⦄" and len(node.items) == 1:
        return node.items
    if isinstance(node, _Relation):
        sides, operators, names = node
        if set(operators) <= {"=", "≈"}:
            if "≈" in operators:  # sqrt(2) = 1.41 (about): either
                return [side for side, name in zip(sides, names) if not name]
            return sides[-1:] if all(name or _same(side, sides[-1]) for side, name in zip(sides[:-1], names)) else []
        if not set(operators) <= {"<", "≤"}:
            return []
        if len(sides) == 2 and names[0]:  # -oo < x < 5
            sides, operators, names = [_apply(neg, _symbol("∞")), *sides], ["<", *operators], [False, *names]
        elif len(sides) == 2:
            sides, operators = [*sides, _symbol("∞")], [*operators, "<"]
        interval = _Group("(["[operators[0] == "≤"] + ")]"[operators[1] == "≤"], [sides[0], sides[2]])
        return [interval] if len(sides) == 3 and names[1] else []
    if isinstance(node, _Group) and node.kind == "":  # x < 1 or x > 2
        intervals = [x for item in node.items if isinstance(item, _Relation) and "=" not in item.operators for x in _meanings(item)]
        return [_Group("∪", intervals)] if len(intervals) == len(node.items) else []
    return []


def _same_relation(a: _Relation, b: _Relation) -> bool:
    if a.operators != b.operators:
        return False
    if not all(isinstance(side, _Value) for side in a.sides + b.sides):
        return all(map(_same, a.sides, b.sides))
    x, y = ([_apply(sub, right, left) for left, right in zip(r.sides, r.sides[1:])] for r in (a, b))  # compared with 0
    return all(_proportional(left, right, operator in "<≤") for left, right, operator in zip(x, y, a.operators))


def _proportional(a: _Value, b: _Value, positive: bool) -> bool:
    """Whether a = c b for one number c, greater than zero where `positive`."""
    if not any(a.numbers) or not any(b.numbers):
        return a == b
    first, *others = _apply(truediv, a, b).numbers
    return all(_close(first, other) for other in others) and (not positive or first.real > 0)


def _plain(text: str) -> str:
    """Text without spaces, a leading article and a full stop; words also without case."""
    text = re.sub(r"^(?:the|an|a)\s(?=[a-z]{3})", "", text.replace("\x01", "").strip(), flags=re.IGNORECASE)
    text = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", re.sub(r"\{(\w)\}(?!\w)", r"\1", text)).strip(".,;:")  # 5 1/2 is not 51/2
    return text.lower() if text.isalpha() and (len(text) > 2 or text.lower() == "no") else text


def _read(text: str):
    """The parsed answer. A plus-minus stands for the set of both its values."""
    if not re.search("[±∓]", text):
        items = _Reader(text).items()
        return items[0] if len(items) == 1 else _Group("", items)
    values = []
    for signs in ("+-", "-+"):
        node = _read(text.translate(str.maketrans("±∓", signs)))
        for x in _meanings(node) or [node]:
            values += x.items if isinstance(x, _Group) and x.kind in ("", "⦃⦄") else [x]
    return _Group("⦃⦄", values)


def _same_text(a: str, b: str) -> bool:
    if not a or not b or _plain(a) == _plain(b):
        return bool(a and b)
    joined = [re.sub(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?!\d|,\d)", lambda match: match[0].replace(",", ""), text) for text in (a, b)]
    readings = [joined, [re.sub(r"(?<=[\d})]) ([mghsdlL])(?![A-Za-z])", " \x01\\1\x01", text) for text in joined]]  # 5 m: a unit
    if not re.search(r"\d,0\d\d", a + " " + b):  # 1,000 is no list 1, 0
        readings.append([a, b])
    for x, y in dict.fromkeys(map(tuple, readings)):
        with contextlib.suppress(ValueError, ArithmeticError):  # unreadable
            if _same(_read(x), _read(y)):
                return True
    return False


_FILLER = re.compile(
    r"(?i)(?:\x01?\b(?:(?:the )?(?:final )?answer is|approximately|about|roughly|around|exactly|only|just|a total of|is|equals|equal to"
    r"|either|both)\b\x01?\s*)+"
)
_LABEL = re.compile(  # Area = 5, total cost: 5, P(X = 2) = 5, A(1, 2)
    r"\s*(?=[^=:\d]{0,60}?[A-Za-z]{3})[A-Za-z\x01][^=:<>≤≥≠≈∈\d]{0,60}[=:](?!\s*$)|^P\([^()]{1,40}\) ?=|^[A-Z](?=\([^()]*,)"
)
_CHOICE = re.compile(r"(?:[Oo]ption |[Cc]hoice )?\(?\s*([A-J])(?:\s*[).:]+\s*(.*))?")


def is_equivalent(answer: str, gold: str) -> bool:
    """Whether two bare answers are equal, by the categories at the top of this file. Longer than 4,000 characters: only when identical."""
    if max(len(answer), len(gold)) > 4000:
        return answer.strip() == gold.strip()
    a, b, _work.left = _clean(answer), _clean(gold), 2500
    x, y = _CHOICE.fullmatch(a.replace("\x01", "")), _CHOICE.fullmatch(b.replace("\x01", ""))
    if x and y:
        return x[1] == y[1] and (not x[2] or not y[2] or _same_text(x[2], y[2]))
    if x or y:
        choice, other = (x, b) if x else (y, a)
        if other.strip("( )").upper() == choice[1] or choice[2] and _same_text(choice[2], other):
            return True
    x, y = (re.sub(r"[\s,;\x01]|and", "", t) for t in (a, b))
    if re.fullmatch("[A-J]{2,10}", x) and sorted(x) == sorted(y):  # ACD for A, C, D
        return True
    bare = [_FILLER.sub("", _LABEL.sub("", _FILLER.sub("", text, count=1), count=1), count=1) for text in (a, b)]
    return _same_text(a, b) or bare != [a, b] and _same_text(*bare)


def verify(response: str, gold: str) -> bool:
    """Whether the last final answer of `response` equals `gold`: bare, boxed, or a GSM8K solution that ends in `#### 42`.

    True or False for any two strings, in less than 100 ms for 100,000 characters. It never raises.
    """
    try:
        answer = extract_answer(response)
        return answer is not None and is_equivalent(answer, extract_answer(gold) or gold)
    except Exception:  # the fuzzer finds none that gets here; a training run must not end when it missed one
        return False


# ------------------------------------------------------------------------------------------------------------------------- code
# verify_code starts `python -I verifier.py` for every input/output pair, or once for all asserts. That process is a launcher: it shuts
# itself off from the system, forks the one that runs the solution, and kills whatever the solution started when that ends.

_MAX_FILE, _MAX_REPLY, _MAX_PROCESSES = 16 << 20, 1 << 20, 64  # bytes (of the output too), bytes, processes of a user


def verify_code(response: str, tests: list, *, timeout: float = 5.0, memory: int = 1024) -> bool:
    """Whether the last fenced Python block of `response` passes every test; False without tests, and for a block that never closes.

    tests: `{"input": str, "output": str}` each (standard input and output of a run of its own, compared line by line without trailing
    blanks; exit status 0), or statements with asserts as strings, run in their order behind the solution in one process.
    timeout: seconds of wall time and of CPU time for a process. memory: MiB of address space for a process.
    Raises SyntaxError, TypeError or KeyError for tests of another form, NotImplementedError elsewhere, nothing because of the response.

    The verdict is made in this process. Outputs are compared here. Of `assert f(2) == 4` the child gets `f(2)` and sends back plain
    data; the 4 never leaves this process. So an early exit, printing "passed", objects that equal everything, patched built-ins
    and AssertionErrors fail. An assert of another form, `assert isclose(f(2), 4)`, is evaluated in the child, with the built-ins
    restored: objects with operators of their own, a patched math module, or code that inspects frames can forge those.

    The child has an empty environment, no inherited descriptors, its own session, a folder that disappears, and limits on CPU and wall
    time, address space, processes, file size and output. Where the kernel allows it (to root, or to users by unprivileged namespaces)
    it also has no network, sees no other process, and can write to that folder only; started by root it runs as nobody. Where
    the kernel forbids namespaces (many containers) network and the user's own files and processes are NOT protected. Files
    that the user can read can be read everywhere. A container or a virtual machine is the answer for hostile code.
    """
    if sys.platform != "linux":
        raise NotImplementedError("verify_code needs Linux")
    parts = re.split(r"^[ \t]*```[ \t]*(\w*).*$", response, flags=re.MULTILINE)  # text, language, code, "", text, language, code, ...
    fences = [(parts[i].lower(), *parts[i + 1 : i + 3]) for i in range(1, len(parts), 4)]
    blocks = [fence for fence in fences if fence[0] in ("python", "python3", "py")] or [fence for fence in fences if fence[0] == ""]
    if not blocks or len(blocks[-1]) < 3 or not tests:
        return False
    job = {"code": blocks[-1][1], "timeout": timeout, "memory": memory << 20}
    if isinstance(tests[0], dict):
        pairs = [(test["input"].encode(errors="replace"), test["output"]) for test in tests]
        runs = ((_run(job, given), wanted) for given, wanted in pairs)
        return all(out is not None and _lines(out.decode(errors="replace")) == _lines(wanted) for out, wanted in runs)
    steps, wanted = [], []
    for statement in ast.parse("\n".join(tests)).body:
        test = statement.test if isinstance(statement, ast.Assert) else None
        if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.Eq):
            wanted.append([_literal(ast.unparse(side)) for side in (test.left, test.comparators[0])])
            steps.append([None if x else ast.unparse(side) for x, side in zip(wanted[-1], (test.left, test.comparators[0]))])
        else:
            wanted.append(None)
            steps.append(ast.unparse(statement))
    token = secrets.token_hex(16)  # what the solution guesses and prints is no reply
    replies = (_run(job | {"asserts": True}, json.dumps([token, steps]).encode()) or b"").split(b"\n")[:-1]
    return len(replies) == len(steps) and all(_passed(reply, token, values) for reply, values in zip(replies, wanted))


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.rstrip().splitlines()]


def _literal(source: str) -> tuple | None:
    """The plain value that a source text spells, in a tuple; None when it spells none."""
    try:
        return (ast.literal_eval(source),)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


def _passed(reply: bytes, token: str, wanted: list | None) -> bool:
    """Whether the child's reply to one statement says that it passed. wanted: the literal sides of an equality."""
    try:
        answer, *values = json.loads(reply) if len(reply) < _MAX_REPLY else ("",)
    except (ValueError, TypeError, RecursionError):
        return False
    if wanted in (None, [None, None]) and values == [True]:  # it ran without an error, or two objects that are no plain data are equal
        return answer == token
    if wanted is None or answer != token or len(values) != 2:
        return False
    left, right = (side or _literal(str(value)) for side, value in zip(wanted, values))
    return left is not None and right is not None and left == right


def _run(job: dict, data: bytes) -> bytes | None:
    """What a child, given `data`, wrote to standard output; None when it failed or had to be stopped."""
    with tempfile.TemporaryDirectory(prefix="verifier_", ignore_cleanup_errors=True) as folder, tempfile.TemporaryFile() as given:
        os.chmod(folder, 0o777)
        header = json.dumps(job | {"folder": folder}).encode()
        given.write(b"%10d" % len(header) + header + data)
        given.seek(0)
        with tempfile.TemporaryFile() as out:  # a file: the limit on file size bounds it, and nobody has to read while it grows
            child = subprocess.Popen(
                [sys.executable, "-I", os.path.abspath(__file__)], stdin=given, stdout=out, stderr=subprocess.DEVNULL, cwd=folder, env={},
                start_new_session=True,
            )  # fmt: skip
            try:
                status = child.wait(job["timeout"] + 5)  # the launcher stops the solution after `timeout`
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()
            out.seek(0)
            return out.read() if status == 0 else None


def _launch() -> None:
    """The launcher: reads its job from standard input (ten digits for the length, JSON), and leaves the rest to the solution."""
    text, size = b"", int(os.read(0, 10))
    while len(text) < size:
        text += os.read(0, size - len(text))
    job, libc = json.loads(text), ctypes.CDLL(None)
    isolated = _isolate(libc, job["folder"].encode())
    libc.prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what the solution's children leave behind becomes a child of this process
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
    """Stop them first: a stopped process forks no more but still counts towards the limit, so that a fork bomb comes to its end."""
    stopped, found = set(), {0}
    while found - stopped:
        for pid in found - stopped - {0}:
            os.kill(pid, signal.SIGSTOP)
        stopped, found, parents = stopped | found, set(), [os.getpid()]
        for parent in parents:
            for file in glob.glob(f"/proc/{parent}/task/*/children"):
                with contextlib.suppress(OSError), open(file) as children:  # (it may have ended)
                    parents += map(int, children.read().split())
        found = set(parents[1:])
    for pid in found:
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _isolate(libc, folder: bytes) -> bool:
    """New namespaces: no network, no other processes, nothing writable but `folder`. Whether the kernel allowed it."""
    uid, gid = os.getuid(), os.getgid()
    spaces = 0x40000000 | 0x20000000 | 0x20000 | 0x8000000  # CLONE_NEWNET, NEWPID, NEWNS, NEWIPC
    for user in (0, 0x10000000) if uid == 0 else (0x10000000,):  # CLONE_NEWUSER: how those who are not root get the others
        if libc.unshare(spaces | user) == 0:
            break
    else:
        return False
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")) if user else ():
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    private, readonly = 1 << 18, 1
    if libc.mount(None, b"/", None, private | 1 << 14, None) == 0:  # MS_PRIVATE | MS_REC: what follows is seen in here only
        libc.syscall(442, -100, b"/", 0x8000, (ctypes.c_uint64 * 4)(readonly, 0, 0, 0), 32)  # mount_setattr(AT_RECURSIVE)
        libc.mount(b"tmpfs", folder, b"tmpfs", 6, b"size=%d,mode=777" % _MAX_FILE)  # MS_NOSUID | MS_NODEV
        libc.mount(b"tmpfs", b"/proc", b"tmpfs", 6 | readonly, None)  # /proc/<pid>/environ of the user's processes
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
            capabilities = 1 << 2  # CAP_DAC_READ_SEARCH: the interpreter lies below /root, say
        os.seteuid(0)
        libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)  # root would not be bound by the limit on processes
    libc.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)(capabilities, capabilities))
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: not without the launcher
    os.chdir(job["folder"])
    limits = {"CPU": math.ceil(job["timeout"]), "AS": job["memory"], "NPROC": _MAX_PROCESSES, "FSIZE": _MAX_FILE, "CORE": 0, "NOFILE": 64}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def _solve(job: dict) -> None:
    """Run the solution: as a program, or loaded and then asked for the values of the tests' expressions."""
    code = compile(job["code"], "solution.py", "exec")
    if "asserts" not in job:
        exec(code, {"__name__": "__main__"})
        return
    requests, replies, null = os.dup(0), os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    originals, namespace = dict(vars(builtins)), {"__name__": "solution"}
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
            values = [repr(_plain_data(side)) for side in sides]
            if None not in step and None in map(_literal, values):
                values = [type(sides[0]) is type(sides[1]) and bool(sides[0] == sides[1])]  # two Fractions, say
        os.write(replies, json.dumps([token, *values]).encode() + b"\n")
    os._exit(0)


def _plain_data(value):
    """The built-in containers and numbers that a value consists of: a Counter becomes a dict, a NumPy array a list."""
    if isinstance(value, dict):
        return {_plain_data(k): _plain_data(v) for k, v in value.items()}
    for kind in (list, tuple, bool, int, float, complex, str, bytes):
        if isinstance(value, kind):
            return kind(map(_plain_data, value)) if kind in (list, tuple) else kind(value)
    if isinstance(value, (set, frozenset)):
        return {_plain_data(item) for item in value}
    return _plain_data(value.tolist()) if hasattr(value, "tolist") else value


if __name__ == "__main__":
    _launch()


def check_tests(tests):
    pass
