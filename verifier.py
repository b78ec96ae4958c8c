r"""The binary verifier r(y, a): 1 when the final answer of a response equals the gold, else 0.

    verify(response, gold)        mathematics, by the conventions of GSM8K, MATH, OpenR1-Math, AIME
    verify_code(response, tests)  Python programs, by input/output pairs or assert statements

The verifiable rewards of SD-Zero (arXiv 2604.12002). Standard library only: copy this file out and
it works. Nothing that a model wrote is evaluated (mathematics) or run in this process (code). No
response raises or hangs; a gold answer or tests of the wrong type raise.

Which answer counts? Markers are \boxed{} and \fbox{}, `####`, and "answer is" (or "answer:",
<answer>). The LAST marker counts, so a revision outranks the first attempt whatever both used; but
an answer that is only taken back stays. Boxes on one line, or with "and" or "or" between
them, are one answer, a list. Of a sentence ("Answer: She sold 72 clips.") the only number counts.
Skipped: boxes without an answer (\boxed{...}: an instruction repeated), headings (`#### Step 2`),
phrases that state no answer ("the answer is correct", "the final answer is positive" after a box),
conditions ("if ..., the answer would be"), denials ("is not", "I doubt whether it is") and remarks
about another answer ("a common wrong answer is", "13 is a mistake"). But "the answer is 2 digits
long" states 2, with a unit. A box that never closes ends the search: the response was cut there. A
response without a marker has no answer: verify("42", "42") is False by design. What stands around a
box is not read: -\boxed{5} is 5.

Claimed equal (accuracy by category: tests/bench_verifier.py):
  integers     1,234 = 1{,}234 = 1\,234 = 1 234 = 1234. A comma is never a decimal point.
  decimals     0.50 = 1/2 = .5, exactly. A decimal that rounds the gold value is wrong (0.333 for
               1/3), unless gold is that decimal or the response says both (1/3 \approx 0.333).
  fractions    a/b, \frac, \dfrac, \tfrac, mixed numbers; lowest terms or not
  percentages  50% = 0.5 = 1/2; and 50% = 50, since gold answers to "what percent" lack the sign
  powers       2^{10} = 1024; scientific notation 1.5 \times 10^3 = 1.5e3; 5!, n!, \binom{5}{2}
  irrationals  roots, pi, e, i, logarithms and trigonometric functions to 11 digits or more
  units        dropped when one side has none, else equal (cm = centimeters, $ = dollars, degrees)
  assignments  x = 5, f(2) = 5, m + n = 5, Area = 5 for 5; not 2x = 10 for 10
  tuples       in order; intervals with their brackets; vectors, matrices, multiples of them
  sets, lists  in any order; 1, 1, 2 is not 1, 2; 2, 1 is not x = 1, y = 2; {1, 2} is not (1, 2)
  expressions  polynomial and rational ones: 2(x+1) = 2x+2. The case of a letter counts. Roots and
               logarithms of letters are compared where these are positive: \ln(ab) = \ln a + \ln b
  relations    equations up to a constant factor, inequalities a positive one; x > 3 = (3, \infty)
  choices      (B) = B = \text{B} = B. 12; ACD = A, C, D; words as they are spelled, in any case
Not claimed: conversion of units, number words (but thousand, million), decimal commas,
determinants, set-builder notation, \mp, \choose (but \binom), sets after a minus (but \setminus),
conditions that hold together as intervals (x > 0 and x < 1; x \ne 1, x \ne 2), 2|x|, "5 or so", the
environments cases and aligned, answers of more than 600 characters, numbers beyond
10^2400. Ratios (3:4), congruences, times and numbers in other bases count as written. A word after
a number is its unit whatever it means: 5 wrong is 5, 3mg is 3 milligrams, and 5 apples is not 5
pears. A calculation with different units (5 cm x 3 cm = 15 cm^2) is not read. Not detected are
more than ten right digits next to an irrational number (0.33333333333\pi), a small term next to a
large one (e^{-100} + 1), and that |x - 3| is not 3 - x: variables are compared below 2.5. Powers of
-1, and signs, agree at all points by chance once in some hundred pairs. Variables are
real numbers (|z|^2 = z^2, xyx^{-1} = y), but products of capitals with ^{-1} or ^T are matrices.

One answer through all steps: verify(r"So it is \boxed{\frac{1}{2}\text{ cm}}.", "0.5")
  extract_answer  \frac{1}{2}\text{ cm}
  _clean          \frac {1}{2} ‹cm›
  _tokens         command \frac, sign {, number 1, close }, sign {, number 2, close }, word cm
  _Reader         _Node("value", (1/2,) * 8, unit="cm"): its values at eight points
  _Comparison     equal to _Node("value", (1/2,) * 8): the numbers agree, and one has no unit
An expression is its values at eight points, where every variable is a number drawn by its name.
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
import signal
import subprocess
import sys
import tempfile
import unicodedata
from decimal import Decimal
from fractions import Fraction
from operator import mul, neg, truediv
from typing import NamedTuple


def verify(response: str, gold: str) -> bool:
    """Whether the final answer of `response` equals `gold`: the reward r(y, a) of the paper.

    gold: a bare or boxed answer, or a GSM8K solution that ends in `#### 42`.
    Takes less than 100 ms for 100,000 characters. Raises TypeError when one of them is not a
    string, and nothing for any two strings.
    """
    _require_strings(response=response, gold=gold)
    try:
        answer = extract_answer(response)
        return answer is not None and is_equivalent(answer, extract_answer(gold) or gold)
    except Exception:  # no such input is known, and one must not end a training run
        return False


def is_equivalent(answer: str, gold: str) -> bool:
    """Whether two bare answers are equal, by the categories at the top of this file.

    Rule: what is before a colon (total cost: 5), or a capital letter before a tuple (A(1, 2)), is a
    label: it may be missing on one side, and is the same text if it is on both.
    Answers of more than 4,000 characters are equal only when identical. Raises TypeError when one
    of them is not a string.
    """
    _require_strings(answer=answer, gold=gold)
    if max(len(answer), len(gold)) > _MAX_ANSWER:
        return answer.strip() == gold.strip()
    a, b = _clean(answer), _clean(gold)
    same = _same_choice(a, b)
    if same is not None:
        return same
    x, y = map(_INTEGER.fullmatch, (a, b))
    a, b = x[1] if x else a, y[1] if y else b
    if x and y and x[2] not in b:  # n π is k π
        b = re.sub(rf"(?<![A-Za-z\\]){y[2]}(?![A-Za-z])", x[2], b)
    a, b = (_FILLER.sub("", text).strip() or text for text in (a, b))
    x, y = _LABELLED.fullmatch(a), _LABELLED.fullmatch(b)
    return (not x[1] or not y[1] or _plain(x[1]) == _plain(y[1])) and _same_text(x[2], y[2])


def extract_answer(response: str) -> str | None:
    """The final answer of a response as it was written, by the rule at the top of this file.

    None when it states none. Raises TypeError when the response is not a string.
    """
    _require_strings(response=response)
    response = re.sub(r"\\(boxed|fbox)\s*(\d+)", r"\\\1{\2}", response)  # \boxed5
    fallback = None  # what a phrase stated; used only if nothing better comes before it
    markers = [*_MARKER.finditer(response)][-10:]  # no honest text needs more
    while markers:
        match = markers.pop()
        before, end = response[max(0, match.start() - 120) : match.start()], match.end()
        if match["box"]:
            content = _boxed(response, match)
            if content is None:
                return fallback
            after, is_final = end + len(content), True
        else:
            content = _stated(response[end : end + 500].lstrip(" \t#*:_>"))
            last_word = content.split()[-1] if content.strip() else ""
            after = response.find(last_word, end) + len(last_word)
            is_final = _is_final(before, match["phrase"] or "", content)
            before += match[0]
        is_remark = _REMARK_BEFORE.search(before) or _REMARK_AFTER.match(response, after)
        if is_remark or _EMPTY.fullmatch(content):
            continue
        if is_final:
            return _with_boxes_before(response, markers, match, content)
        fallback = fallback or content
    return fallback


def _require_strings(**arguments) -> None:
    for name, value in arguments.items():
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a string, not {type(value).__name__}: {value!r:.80}")


# ------------------------------------------------------------------------------- finding the answer

_MAX_ANSWER = 4000  # characters; a longer box counts as one that never closes
_MARKER = re.compile(r"""(?ix)
    (?P<box>\\(?:boxed|fbox)\s*(?:\{|\Z))
    |(?P<hash>\#{4,}(?!\s*\d\d?\.\s+[A-Z][\w ]{2,40}\n))  # #### 1. A heading
    |(?P<phrase>\b(?<!</)answers?\b(?:
        (?:[^\n.:=\\a]|\\(?!f?box)|a(?!nswer)){0,60}?
            \s(?:is|are|was|equals|(?:would|should|will|must|to)\ be)\b
            (?:,?\s+(?:therefore|thus|simply|then|indeed|actually|still|probably|clearly
                |obviously|hence|given\ by)\b)?[*:\s]*
        |>\s*                       # <answer>
        |[^\n\w:=]{0,4}[:=][*\s]*   # **Answer:**
        |[*\#\s]{0,4}\n\s*)         # ### Final Answer
        (?:(?<=\n)-\ )?)            # which is a list of one""")
_REMARK_BEFORE = re.compile(r"""(?ix)
    (?:\b(?<!\d\ )(?<!no\ )(?<!of\ )(?<!least\ )(?<!my\ )  # a common wrong answer is \boxed{13}
    (?:wrong|incorrect|mistaken|common|frequent|typical|tempting|naive|(?:an)?other|student'?s'?)
    \ (?:\w+\ )?(?:answer|mistake|error|slip)s?\b
    (?!\ (?:to|his|her|their|our|the|we)\b)[^.,!?\n]{0,60}
    # if you forgot the first, you have \boxed{13}; if it is wrong, then \boxed{13}
    |\b(?:(?:if|who)\ [^.!?\n]{0,30}\bforg[eo]t|forgetting)\b(?!.*\ is\b)[^.!?\n]{0,60}
    |\bif\ (?:that|it)\ is(?:\ not|n't)?\ (?:wrong|right|(?:in)?correct)\b(?!\ to)[^.!?\n]{0,60}
    # I do not think it is \boxed{13}; most people say \boxed{13}; previously I said \boxed{13}
    |(?:\b(?:whether|doubt|false|tempt(?:ing|ed)\ to)
    |(?:\bnot|n't)\ (?:true|think|believe|sure|certain)
    |\b(?:people|someone|nobody|students|many|most|others)\ (?:\w+\ )?(?:say|think|guess)s?
    |\bpreviously\ (?:\w+\ )?(?:said|thought|wrote))
    (?:\ (?!(?:so|but|gives?|we|and|hence)\b)\w+){0,4}:?  # not: I am not sure, so it is 13
    # if you get \boxed{13}; 12, not \boxed{13}
    |\b(?:if\ you\ g[eo]t|instead\ of|rather\ than)|(?:\bnot|n't|\bcannot)(?:\ be)?)
    [\s$*([\\]*\Z""")
_REMARK_AFTER = re.compile(r"""(?ix)  # \boxed{13} is a common mistake; 13, but this is wrong
    [\s$)}\\*,]*(?:(?:and|but|though|which|that|this|it)\ )*(?:is|was|would)\ (?:\w+\ ){0,2}
    (?:wrong|incorrect|mistake|error|not\ (?:be\ )?(?:correct|right|possible|the\ answer))\b
    |[\s$)}\\*]*(?:\.\s*no,|\?\s*no\b)""")
_EMPTY = re.compile(r"""(?isx)  # no answer in a box, or after a phrase; #### Step 2
    (?:\\text\{)?(?:[\s._?…]|\\[lc]?dots|your|the|final|answer|number|letter|here)*\}?
    |(?:step|verif\w+|check\w*|solution|conclusion|explanation|note|analysis|case|part|summary)\b
    .*""")
_JOINED = re.compile(r"""(?ix)  # between boxes that are one answer; not only a line's end
    (?![\s$)}\]\\]*\n[\s$(\[\\]*\Z)(?:[\s$*.,;:/()\[\]{}\\]|\\q?quad\b|\\text\b
    |\b(?:and|or|also|else|either|alternatively|maybe|perhaps|possibly|though|even)\b)*""")


def _boxed(text: str, box: re.Match) -> str | None:
    """The content of a box; None when it does not close."""
    start, depth = box.end(), 1  # of braces; escaped ones are those of a set
    for match in re.compile(r"\\[\\{}]|[{}]").finditer(text, start, start + _MAX_ANSWER):
        depth += (match[0] == "{") - (match[0] == "}")
        if depth == 0:
            return text[start : match.start()]
    return None


def _with_boxes_before(text: str, markers: list, last: re.Match, content: str) -> str:
    r"""The last answer; together with those in the boxes before it, if it is a box.

    Rule: boxes without words between them but and, or, ... are one answer, a list: the roots are
    \boxed{2} and \boxed{3}. So are alternatives, of which none is right by itself.
    """
    while last["box"] and markers and markers[-1]["box"]:
        box = markers.pop()
        other = _boxed(text, box)
        if not other or not _JOINED.fullmatch(text, box.end() + len(other), last.start()):
            break
        if other != content:
            content = f"{other}, {content}"
        last = box
    return content.strip()


_REASON = re.compile(r"""(?ix)  # what may follow the answer in its sentence
    \b(?:because|since|which|where|so|as|hence|thus|therefore|after|from|given|not|by|using
    |altogether|I\ (?:think|believe)|and\ (?:we|this|that|it|so|not)
    |(?:when|if)\b(?!.*\b(?:when|if|otherwise)\b)  # not: 5 if n is even, 6 otherwise
    # not: 5, but it may be 6; 5, but 6 is also possible
    |but\b(?!,?\ (?:it\ )?(?:could|might|may|perhaps|maybe|possibly)(?:\ it)?(?:\ also)?
    (?:\ is|\ be)?\ [$]?-?\d|\ [$]?-?\d+[$]?\ is\ (?:also|poss|accept)))\b""")
_FORMULA = re.compile(r"""(?x)  # in its delimiters, alone or before a unit, and no item of a list
    (?:\$\$?|\\[(\[])((?:[^$\\]|\\[^)\]])+)(?:\$\$?|\\[)\]])
    (?!(?:[ ,;]|and\b|or\b)*(?:\$|\\\(|-?\d))(?!\s*[a-z]+\ (?:and\ |or\ )?(?:\$|\\\(|-?\d))
    (?:\s*([a-zA-Z]+)(?=\s*\*{0,2}(?:[.,;!]|\n|$)))?
    (?![\s*]*(?:or|and|to|less|more|is|equals|plus|minus|times)\b)
    (?=[\s*]*(?:[.,;:!\n]|$|[A-Za-z]))""")
_SENTENCE = re.compile(r"""(?x)  # She sold 72 clips in May. Not: She sold 6 dozen; more than 5
    (?!.*(?:[\\^*/=+]|n't|\b(?:not?|never|or|than|about|nearly|almost|approximately|around|roughly
    |over|under|times)\b))(?:that\ |[A-Z])[a-z]+\ [a-z]+\ """)
_SENTENCE_END = re.compile(r"""(?x)  # not: **5** or **6**; 5 — no, 6
    (?:[.?](?!\s*or\b)|!(?!\s*[=+/-]))(?=[\s*]|$)|(?<=\w)\*\*(?!\w|\s?(?:or|and)\b)|\n|<[|/]
    |\s—\s(?!(?:no|wait|or)\b)|\s[-–]\s(?=(?:the|this|that|which|it)\b)|;\s(?=[a-z]{3})""")
_BOLD = re.compile(r"""(?x)  # It takes **5 hours**. Not: It is not **5**; more than **5**; **5** or
    (?!.*(?:n't|\b(?:not?|never|than|or)\b))[A-Z][a-z]*\ [^\n*.]{3,100}\*\*([^*\n]{1,60})\*\*""")


def _stated(text: str) -> str:
    """The answer at the beginning of a text: what is bold in a sentence; or a formula and its unit;
    or the only number of a sentence (She sold 72 clips in May); or the words up to the end of the
    sentence or to a reason (because, which, so).
    """
    text = re.sub(r"\A(?:<[a-z]+>|~~[^~\n]*~~)", "", text)  # <b>5</b>; struck out: ~~4~~ 5
    if found := _BOLD.match(text) or _FORMULA.match(text):
        return " ".join(filter(None, found.groups()))
    sentence = _SENTENCE_END.split(text, maxsplit=1)[0]
    numbers = re.findall(r"-?[$€£¥]?\d[\d,]*(?:\.\d+)?%?", sentence)
    changed = any(map(_NUMBER_WORD.fullmatch, sentence.split()))  # 6 dozen, 3 more than twice
    if _SENTENCE.match(sentence) and len(numbers) == 1 and not changed:
        return numbers[0]
    stated = _REASON.split(sentence, maxsplit=1)[0].rstrip(" *,;:(")
    return re.sub(r"\s\([A-Za-z][A-Za-z -]{3,}\)$", "", stated)  # 42 (forty-two)


_ASIDE = re.compile(r"""(?ix)  # an answer other than the final one
    \b(?:wrong|incorrect|mistaken|common|tempting|naive|trap|(?:an)?other|similar|previous|earlier
    |old|first|initial|original|intermediate|partial|approximate|rough|next|possible|potential|guess
    |sometimes|often|usually|makes|rounding|students?|not|no|without|any|each|every|an|a)\b
    |\b(?:check|verify|confirm)\w*\ (?:the|my|our)\ |\bof\ (?:the|my|our)\ answer\b
    |\b(?:twice|half|double)\ |\bfor\ \w\ =""")


def _is_final(before: str, phrase: str, content: str) -> bool:
    """Whether a phrase or a heading states the final answer, whatever is boxed before it.

    Rule: what it states, in 120 characters, is mathematics that this file reads, or (but not after
    ####) at most three words that begin with a capital letter or yes, no, ... (not: positive); and
    neither its clause (a wrong answer is) nor a condition in its sentence makes another one of it.
    """
    sentence = re.split(r"[.!?]\s|\n", before)[-1]
    clause = re.split(r"[.,;:—>}]", sentence)[-1]
    conditional = re.search(r"(?i)\b(?:if|would(?! (?:say|like)))\b", sentence + phrase)
    if conditional or _ASIDE.search(clause + phrase) or len(content) > 120:
        return False
    content = _FILLER.sub("", re.sub("[‹›]", "", _clean(content)))
    if re.match(r"[-+$¤£€¥₹\\({\[.\d⟦⦃|√]", content):
        with contextlib.suppress(ValueError, ArithmeticError):
            return _read(content) is not None
        return False
    prose = r"(?!(?:yes|no|true|false|none|sin|cos|tan|ln|log)\b)[a-z]{2,}\b|Correct|[aI] [a-z]|\W"
    return phrase != "" and len(content.split()) <= 3 and not re.match(prose, content)


# ------------------------------------------------------------------------- one spelling for answers

_FUNCTIONS = {name: getattr(cmath, name) for name in ("sin", "cos", "tan", "exp")}
_FUNCTIONS |= {"arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan}
_FUNCTIONS |= {"cot": lambda x: 1 / cmath.tan(x), "sec": lambda x: 1 / cmath.cos(x)}
_FUNCTIONS |= {"csc": lambda x: 1 / cmath.sin(x), "ln": cmath.log}
_FUNCTIONS |= {"log": lambda x, base=10: cmath.log(x, base)}
_SPELLINGS = r"""\frac frac dfrac tfrac cfrac nicefrac, \binom binom dbinom tbinom, * cdot times ast
/ div, √ sqrt, π pi, ∞ infty infinity, ° circ degree, % %, ¤ $, £ pounds, ± pm, ⏎ \, or lor vee
and land wedge, < lt, > gt, ≤ le leq leqslant, ≥ ge geq geqslant, ≠ ne neq, ≈ approx simeq, ∈ in
⦃ { lbrace, ⦄ } rbrace, [ lbrack, ] rbrack, ( langle, ) rangle rfloor rceil, ⌊( lfloor, ⌈( lceil
| | lvert rvert vert, ⦃⦄ emptyset varnothing, ∪ cup bigcup, ∖ setminus backslash smallsetminus
T top, \to rightarrow, \neg lnot
‹gcd› gcd, ‹lcm› lcm, ‹max› max, ‹min› min, ‹det› det, log lg, tan tg, cot ctg, arctan arctg
α alpha, β beta, γ gamma, δ delta, ε epsilon varepsilon, η eta, θ theta vartheta, λ lambda, μ mu
ν nu, ρ rho, σ sigma, τ tau, φ phi varphi, ψ psi, ω omega, Δ Delta, Γ Gamma, Ω Omega"""
_IGNORED = r"""left right big Big bigl bigr Bigl Bigr bigg Bigg biggl biggr displaystyle textstyle
quad qquad bm limits boxed emph ensuremath nonumber newline hfill mathit mathbb mathbf mathcal
boldsymbol vec overrightarrow angle triangle hline bf rm it large Large underline therefore
checkmark , ; : ! > ( ) [ ]"""  # these become a space
_COMMANDS = dict.fromkeys([" ", "", *_IGNORED.split()], " ")
_COMMANDS.update((name, f" {name} ") for name in _FUNCTIONS)
for _line in re.split(", |\n", _SPELLINGS):  # a sign, and its commands: ⏎ is \\ and ≤ \le or \leq
    _COMMANDS.update(dict.fromkeys(_line.split()[1:], f" {_line.split()[0]} "))
_UNICODE = map(chr, [*range(0xFF01, 0xFF5F), *range(0x1D400, 0x1D800)])  # full-width, 𝑥
_UNICODE = {c: unicodedata.normalize("NFKC", c) for c in _UNICODE}
_UNICODE |= dict(zip("。、~−–×·⋅÷⁄∶’′⟨⟩º˚∘ϕ⩽⩾", ".,\x20--***//:''()°°°φ≤≥"))
for _c in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞":
    _n, _d = Fraction(unicodedata.numeric(_c)).limit_denominator(9).as_integer_ratio()
    _UNICODE[_c] = rf" \frac{{{_n}}}{{{_d}}}"
_UNICODE |= {"ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "∅": r"\emptyset "}
_UNICODE |= {"⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil "}
_UNICODE |= {"∩": r"\cap ", "∧": r"\land ", "∨": r"\lor ", "″": "''"}
_UNICODE |= {**dict.fromkeys('∠△“”"`\u200b', ""), **dict.fromkeys("‹›\u00a0\u202f\u2009", " ")}
_UNICODE = str.maketrans(_UNICODE)
# These are units in \text{}, and last after a number and a space: 5 m. But 5m is a product.
_UNIT_LETTER = "[ghlmsJLNVW]"
_VARIABLE = f"(?!{_UNIT_LETTER})[A-Za-z]"
_TEXT = r"\\(?:text[a-z]*|operatorname|math(?:rm|bf|sf|tt)|[mh]box)(?![a-z])"
_SEPARATOR = r"(?:\\[a-z]+)?\{\s*,?\s*(?:\\[!,])?\s*\}(?:\\[!,])?|,\\!"
_ARROW = r"\\(?:vec|overrightarrow|mathbf|bm|boldsymbol)"
_VECTOR = r"\\(?:vec|overrightarrow)\s*\{([A-Z]{2})\}"
_REPEATING = r"(\d{0,50})\.(\d{0,50})\\(?:overline|bar|dot)\{(\d{1,50})\}"
_FLOOR = r"""(?x)  # with a letter in it
    ((?:\A|[-+=\d])\ *)\[\ *(?=[^][]*(?<![\\A-Za-z])[a-z](?![a-z]))
    ((?:\\frac|√)[^][,;&]*)\](?=\ *(?:[-+]|\Z))"""
_SIGNS = {"<=": "≤", ">=": "≥", "!=": "≠", "==": "=", "begin": "⟦", "end": "⟧"}
_REWRITES = [  # tests check every example, and every "in any order"
    # what the others would spoil, in this order
    # 5x⁻¹² -> 5x^{-12}; log₂3 -> log_2 3
    (r"(?:([²³¹⁰-ⁿ]+)|([₀-ₜ]+))(?=(\d?))", lambda m: _script(*m.groups())),
    # cross products have an order: \vec a\times b -> \vec a\cross b
    (rf"({_ARROW}\s*\{{?[A-Za-z]{{1,2}}\}}?\s*)\\times\b", r"\1\\cross"),
    # TeX as it was written, in any order
    (r"\.\.\.|\\[lc]dots|…", r"\\dots "),  # 1, ... -> 1, \dots
    (rf"(?:{_SEPARATOR})\s*(?=\d{{3}}(?!\d))", ""),  # 1{,}234 -> 1234
    # 0.1\overline{6} -> (0.10+6/90)
    (_REPEATING, lambda m: f"({m[1]}.{m[2]}0+{m[3]}/{'9' * len(m[3])}{'0' * len(m[2])})"),
    (r"x ?(?=10\^)", "*"),  # 3 x 10^5 -> 3 *10^5
    (r"\\q?quad(?=\s*[A-Za-z]\s*=)", ","),  # x = 6 \quad y = 8 -> x = 6 , y = 8
    (r"(?<![\\A-Za-z])(sqrt|pi|infinity)(?![A-Za-z])", r"\\\1"),  # sqrt(2) -> \sqrt(2)
    (r"\\mathbb ?\{?R\}?|\\R(?![A-Za-z])", r"(-\\infty,\\infty)"),  # \mathbb{R} -> (-\infty,\infty)
    (r"\\(bar|hat|overline) ?\{?([A-Za-z])(?:\}|\b)", r"\2_{\1}"),  # \bar x -> x_{bar}
    # \overline{AB} -> {AB}; \hspace{2pt}5 -> 5
    (r"\\(?:(?:text)?color|hspace|tag|phantom)\{[^{}]*\}|\\overline(?=\{[A-Z]{2}\})", " "),
    (r"(?<=\\\\)\[[\d.]+ ?[a-z]{2}\]", ""),  # 1\\[4pt]2 -> 1\\2
    (r"\{([^{}]*)\\over([^{}]*)\}", r"{\\frac{\1}{\2}}"),  # {1\over2} -> {\frac{1}{2}}
    (r"\^\s*\{?\s*((?:\\prime\s*)+)\}?", lambda m: "'" * m[1].count("p")),  # y^{\prime} -> y'
    # 5{\rm cm} -> 5\text{cm}; 5\rm{cm} -> 5\text{cm}
    (r"\{\\rm\b\s*([^{}]*)\}|\\rm\s*\{([^{}]*)\}", r"\\text{\1\2}"),
    # AB is a product of two letters; a vector is not: 2\vec{AB} -> 2 V_{AB}
    (_VECTOR, lambda m: f" V_{{{m[1]}}}" if len(m[0]) < len(m.string) else m[1]),
    (r"\\math(?:bb|rm)\s*\{?E\}?\s*(?=(?:\\left)?\[)", "E"),  # \mathbb{E}[X] -> E[X]
    # words, in this order
    # \operatorname{tg}x -> \tg x
    (_TEXT + r"\s*\{((?:arc)?(?:sin|cos|tan|tg)|cot|ctg|ln|lg|log)\}", r"\\\1 "),
    # the last letter is a unit: 5\mathrm{K} -> 5 ‹K›
    (rf"(?<=[\d}}])(?:\s|\\[, ])*{_TEXT}\s*\{{\s*([ACFHKT])\s*\}}\s*\Z", r" ‹\1›"),
    # a letter is a variable unless it is a unit: 3\mathrm{e}+2 -> 3 e+2
    (rf"{_TEXT}\s*(?:\{{\s*({_VARIABLE})\s*\}}|({_VARIABLE}))", r" \1\2"),
    # 5\text{ cm} -> 5 ‹cm›; \text{No root.} -> ‹No root›
    (_TEXT + r"\s*\{\s*([A-Za-z][A-Za-z ./'-]*?)(?:(?<=[a-z]{2})\.)?\s*\}", r" ‹\1› "),
    (_TEXT + r"\s*\{([^{}]*)\}", r" \1 "),  # \text{1st} -> 1st
    # \begin{pmatrix}1 -> ⟦1; 1\end{pmatrix} -> 1⟧
    (r"\\(begin|end)\{(?:[pbB]?matrix|array)\}(?:\{[clr|]*\})?", lambda m: _SIGNS[m[1]]),
    # the other commands: 2\cdot\pi -> 2 *  π
    (r"\\([A-Za-z]+|(?s:.)|\Z)", lambda m: _COMMANDS.get(m[1], m[0] + " ")),
    # signs and digits, in any order
    (r"\\frac \{ ‹([^›]*)› \}\{ ‹([^›]*)› \}", r"‹\1/\2›"),  # \frac { ‹m› }{ ‹s› } -> ‹m/s›
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),  # \frac 12 -> \frac{1}{2}
    (r"_\s*\{[\s‹]*(\w+)[\s›]*\}", r"_{\1}"),  # x_{ ‹max› } -> x_{max}
    (r"(?<![A-Za-z])C_(\{\w+\}|\w)\^(\{\w+\}|\w)", r"\\binom \1 \2"),  # C_9^{2} -> \binom 9 {2}
    (r"(?<=[\w)])\*\*(?=[\w(])", "^"),  # x**2 -> x^2
    (r"[<>!=]=", lambda m: _SIGNS[m[0]]),  # x <= 2 -> x ≤ 2
    (r"\^\s*(?:\{\s*[°o]\s*\}|°|o\b)", "°"),  # 30^{°} -> 30°
    (r"\^\s*\{[\s‹]*(st|nd|rd|th)[\s›]*\}", r"‹\1›"),  # 21^{ ‹st› } -> 21‹st›; 5^{th} -> 5‹th›
    # 3 1/2 -> (3+1/2)
    (r"(?<![\w.^])(\d+) *(\\frac *(?:\{ *\d+ *\} *){2}|(?<= )\d+ ?/ ?\d+)", r"(\1+\2)"),
    # in this order
    (r"\A([^$]*)\$(?=\s?[\d.])([^$]*)\Z", r"\1¤\2"),  # $5 -> ¤5
    (r"\A\s*(?:US ?¤|USD|Rs\.?|₹) ?(?=\d)", lambda m: "¤" if "U" in m[0] else "₹"),  # US¤5 -> ¤5
    (r"(¤ ?[\d.,]*\d) ?/ ?(‹?)(?=[a-z]{3})", r"\1 \2per "),  # ¤5/hour -> ¤5 per hour
    (r"\*\*|__|\$", " "),  # **5** -> 5
    # after a number and a space, a last letter is a unit: 5 m/s -> 5 ‹m›/s
    (rf"\A(\s*[-+]?[\d.,]+) +({_UNIT_LETTER})(?=(?:[\^/]\w+)*\s*\Z)", r"\1 ‹\2›"),
    # in any order
    # a bracket around a fraction or a root is a floor: [\frac {n}{2}]+1 -> ⌊(\frac {n}{2})+1
    (_FLOOR, r"\1⌊(\2)"),
    # a number after a power is a factor: 2^6 3^5 -> 2^6*3^5; 8!2! -> 8!*2!
    (r"((?<!_)[\w)]\^(?:\{[^{}]*\}|[a-z]|\w(?=\s))|!)\s*(?=\d)", r"\1*"),
    # 5 ‹million people› -> 5 ‹million› ‹people›
    (r"‹((?:thous|hundr|[mbtr]+illi)\w+) ", r"‹\1› ‹"),
    (r"(?i)\A[\s‹]*no (?:real )?solutions?[\s›]*\Z", "⦃⦄"),  # ‹No solution› -> ⦃⦄
    # 2x = 10 \Rightarrow x = 5 -> x = 5
    (r"\A[^,;]{0,199}(?:\\Rightarrow|\\implies|⇒)\s*(?=[^=]*=)", ""),
]


def _clean(text: str) -> str:
    """The answer in one spelling, with the private characters of the top of this file."""
    text = " ".join(text.translate(_UNICODE).split())  # (long runs of blanks would take minutes)
    for pattern, replacement in _REWRITES:
        text = re.sub(pattern, replacement, text)
    return " ".join(text.split()).lstrip(" ,;:=≈").rstrip(" .,;:⏎")


def _script(above: str | None, below: str | None, after: str) -> str:
    """Raised or lowered characters as TeX. after: the digit that follows."""
    plain = unicodedata.normalize("NFKC", above or below).replace("−", "-")
    plain = plain if len(plain) == 1 else f"{{{plain}}}"
    return ("^" if above else "_") + plain + " " * len(after)


# ------------------------------------------------------- choices, labels and words around an answer

_CHOICE = re.compile(r"""(?x)  # and its text, with no other choice in it: A. 12, not (A) or (B)
    (?:(?i:option|choice)\ )?\(?\s*([A-J])(?:\s*[).:]+(?!\s*(?:=|not|[A-J]\Z))
    (?!.*(?:\b[A-J]\s*[).:]|(?:\bor|\band|[,/])\s*\(?[A-J]\b))\s*(.*))?""")
_CHOICES = re.compile(r"\A[( ]*[A-J]\)?(?:(?:[\s,;]|and)+\(?[A-J]\)?)+[) ]*\Z")  # A, (C) and D
# Words that deny the number beside them, or say that it is a multiple; and others that change it
_DENIED = r"""(?i:n't\b|\b(?:no(?!\.)|not|none|never|cannot|false|wrong|incorrect|invalid|rejected
    |extraneous|impossible|half|twice|double|triple|square\ of\ the)\b)"""
_CHANGED = rf"""(?:{_DENIED}|\b(?i:except|at\ (?:most|least)|less|fewer|more|than|almost|nearly|too
    |negative|minus|thirds|(?:doubl|tripl|halv|squar|cub)ed|root|dozen|(?:hundr|thous|\w*illi)\w+)\b)"""
_FILLER = re.compile(rf"""(?ix)  # words around an answer; the lookbehind saves time on commas
    ‹?\b(?:(?:the\ )?(?:final\ )?answer\ is|approximately|about|exactly|only|just
    |a\ total\ of|equal\ to|either|both)\b\ ?›?\s*
    |(?<=[^\s,])(?:[ ,]*‹?(?:altogether|in\ total|in\ all|overall|combined|total)
    |,\ ?‹?(?:respectively|exactly|precisely|each|now|of\ course))›?\s*\Z
    |(?<=[^\s,(])[ ,(‹]*(?:for\ (?:all|any|every)\b[^\d<>≤≥≠]{{0,40}}|(?:since|because)\b.*)\Z
    |(?<=[\d}}])[\ ‹]+\(
    (?![^)]{{0,60}}(?:{_CHANGED}|\b(?:maybe|base|mod|factorial|percent|or|and
    |if|when|unless|where|odd|even)\b))
    (?=by|[a-z]*[aeiou])[a-z]{{2}}[a-z\ -]{{2,60}}\)\ ?›?\Z""")
_INTEGER = re.compile(r"""(?x)  # π/4 + n π, n ∈ Z; or where n is an integer
    (.*?[^ ,(‹])[ ,(‹]*(?:(?:where|for|with)(?:\ all|\ any|\ some)?[ ›]*)?\b([kmn])
    (?:\ *∈\ *\{?\ *Z\ *\}?|[ ‹]*is\ an(?:y)?\ integer)[ ›)]*""")
_LABELLED = re.compile(rf"""(?sx)  # total cost: 5, ‹The cost is› 5, A(1, 2); the label may be empty
    ((?![^:]{{0,60}}{_CHANGED}[^:]{{0,60}}(?::|\bis\b))(?=[^:\d]*[A-Za-z]{{3}})
    [A-Za-z‹][^=:<>≤≥≠≈∈\d]{{0,60}}(?::|\bis\b\ ?›?)|[A-Z]\ ?(?=\([^()]*,)|)(.*)""")


def _same_choice(a: str, b: str) -> bool | None:
    """Whether two choices are the same, (B) = B. 12; None when neither of them is one.

    Rule: a list of letters, D, A and C, is the word of them in alphabetical order, ACD.
    """
    a, b = (re.sub("[‹›{}]", "", text).strip() for text in (a, b))
    x, y = _CHOICE.fullmatch(a), _CHOICE.fullmatch(b)
    if x and y:
        return x[1] == y[1] and (not x[2] or not y[2] or _same_text(x[2], y[2]))
    if x or y:
        choice, other = (x, b) if x else (y, a)
        letter = re.fullmatch(r"\(?([A-Ja-j])\)?", other)  # (b); A. b is not the choice b
        if letter:
            return letter[1].upper() == choice[1] or None
        return _same_text(choice[2] or "", other) or None
    a, b = (_CHOICES.sub(lambda m: "".join(sorted(re.findall("[A-J]", m[0]))), x) for x in (a, b))
    return a == b if all(re.fullmatch("[A-Z]{2,}", x) for x in (a, b)) else None


def _same_text(a: str, b: str) -> bool:
    """Whether two cleaned answers are the same text, or equal mathematics."""
    if _plain(a) == _plain(b):
        return a != ""
    try:
        return _Comparison().same(_read(a), _read(b))
    except (ValueError, ArithmeticError):  # not mathematics that this file reads, or without value
        return False


def _plain(text: str) -> str:
    """Text without an article and blanks, except between two numbers; words also without case."""
    text = re.sub("[‹› ]+", " ", text).strip()
    article, _, rest = text.partition(" ")
    words = all(map(_is_wordlike, rest.lower().split()))  # (a sin x is a product)
    if rest and (article.lower() == "the" or article.lower() in ("a", "an") and words):
        text = rest
    text = re.sub(r"\s(?!\d)|(?<!\w)\s", "", re.sub(r"\{([\w:])\}", r"\1", text))
    low = text.lower()
    is_word = text.isalpha() and (low == "no" or _is_wordlike(low) or text[2:].islower())
    return low if is_word else text


# -------------------------------------------------------------------------------- reading an answer

# With these limits no text takes 100 ms (measured); a number of 2^13 bits is near 10^2400.
_MAX_LENGTH, _MAX_DEPTH, _MAX_BITS, _POINTS = 600, 24, 2**13, 8


class _Node(NamedTuple):
    """What an answer, or a part of it, was read as."""

    kind: str  # value, relation, text, ∪, ±; the brackets of a group, [] of a matrix, "" of a list
    items: list | tuple  # of a value: eight numbers, Fraction or complex; of a relation: its sides
    unit: str = ""  # of a value
    # Of a relation: the signs between its sides, = ≠ < ≤ ≈ ∈; > and ≥ are turned around.
    # Of a list joined by `or`: "or". Of an interval after ∈, or from an inequality: "∈". Such a
    # list and such an interval are no point (1, 2).
    signs: str = ""
    text: str = ""  # as it was written

    @property
    def alternatives(self) -> list:
        return self.items if self.kind == "±" else [self]

    @property
    def is_constant(self) -> bool:
        nodes = self.alternatives  # (sets of fractions would be slow)
        return all(x.kind == "value" and x.items.count(x.items[0]) == _POINTS for x in nodes)

    @property
    def is_variable(self) -> bool:
        return self.kind == "value" and not self.is_constant

    @property
    def is_name(self) -> bool:
        """Whether it only names what is asked for: words, or letters joined by signs (m + n; not
        2x, or 2x = 10 would say 10).
        """
        if self.kind == "text":
            return re.search(_DENIED, self.items[0], re.X) is None
        # x + x = 10 does not say 10: no name comes twice, and no small letter (but those of dy/dx
        # and f(1) + f(2))
        letters = [name for name in self.names if name in "abcehijklmnopqrstuvwxyz"]
        runs = re.findall(rf"(?:{_NAME}|{_LETTER})+(?:\(-?\d+\))?", self.text)
        unique = all(len(x) == len({*x}) for x in (letters, runs))
        return unique and _SIDE_NAME.fullmatch(self.text) is not None

    @property
    def names(self) -> list[str]:
        """Names in its text: x and y_1 of sin x + y_1."""
        found = re.findall(rf"frac|binom|{'|'.join(_FUNCTIONS)}|({_NAME}|{_LETTER})", self.text)
        return [name for name in found if name]


_UNREAD_NAME = re.compile(r"""(?x)  # \sum_{k=1}^{9} k, |A ∪ B|, a \bmod 7; not x \oplus 2, \neg x
    # and with its right side. Without signs and numbers, except in brackets and scripts
    ((?![A-Za-z]\s*\^|(?:sin|cos|tan|ln|log|exp)\b|\\frac|\\binom)(?!.*\\(?:l?not|neg|nexists|sim
    |equiv|cong|[gl]l|gg)\b)(?!.*(?:\b(?:since|because)\b|›\ *\^))
    # 1 + 2 + \dots + 9; not 2(x + \dots + y), nor a polynomial, which is 0
    (?:(?!-|\d+\s*\*?\s*(?:\(|[A-Za-z]_)|.*=\s*0\s*\Z)[^=<>,;]{1,60}\\dots[^=<>,;]{1,60}|
    (?:[A-Za-z|‹›°∪\s]|\\bmod\s*\w+|\\[A-Za-z]+|[_^]\s*[\w∞]|\([^()]*\)|[_^]?\s*\{[^{}]*\}){1,60}+))
    =([^=]+)""")


def _read(text: str) -> _Node:
    """The parsed answer. ±1, 2 is the list of three numbers.

    Rule: a left side that is not read, as in \\lim f(n) = 3, is a name (see _UNREAD_NAME).
    Inequalities joined by `and` are not those joined by `or`; a comma may be either.
    """
    if len(text) > _MAX_LENGTH:
        raise ValueError("too long")
    try:
        nodes = _Reader(text).items()
    except ValueError:
        named = _UNREAD_NAME.fullmatch(text)
        if not named:
            raise
        nodes = _Reader(f"‹{re.sub('[‹›]', '', named[1]).strip()}›={named[2]}").items()
    if len(nodes) == 1:
        return nodes[0]
    joined = {*re.findall(r"\b(?:and|or)\b", text)}
    if joined and any(set(x.signs) & {*"<≤≠"} or x.is_variable for x in nodes):
        if len(joined) == 2:
            raise ValueError("and beside or")
        return _Node(*joined, nodes)
    items = sum((node.alternatives for node in nodes), [])
    if all(item.kind == "relation" and item.items[0].text in [*"xyz"] for item in items):
        items.sort(key=lambda item: item.items[0].text)  # y = 3, x = 2 is (2, 3), not (3, 2)
    return _Node("", items, signs="or" * (joined == {"or"}))


def _for_each_sign(function, nodes: list[_Node]) -> _Node:
    """The function of some nodes. Each ± among them stands for both signs of its own."""
    choices = [node.alternatives for node in nodes]
    if math.prod(map(len, choices)) > 16:
        raise ValueError("too many ±")
    results = [function(*choice) for choice in itertools.product(*choices)]
    return results[0] if len(results) == 1 else _Node("±", results)


_CLOSING = {"(": ")]", "[": ")]", "{": "}", "⦃": "⦄"}
_SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}  # 10^n


class _Reader:
    """Recursive descent over the tokens of one answer, from lists down to single numbers: items ->
    statement -> quantity -> sum -> product -> power -> atom, each from `token` on.
    """

    kind = token = read = ""  # of the token that comes next; the texts of those before
    depth = 0

    def __init__(self, text: str):
        self.tokens = iter(_tokens(text))
        self.ahead = next(self.tokens, ("end", ""))
        self.next()

    def next(self) -> str:
        token = self.token
        self.read += " " * (self.kind == "word") + token
        (self.kind, self.token), self.ahead = self.ahead, next(self.tokens, ("end", ""))
        if self.kind == "number" and self.ahead == ("sign", "^"):
            self.kind = "base"  # a number that is a factor after anything: n 2^k
        return token

    def sees(self, signs: str) -> bool:
        return self.kind in ("sign", "close") and self.token in signs

    def accept(self, signs: str) -> str:
        return self.next() if self.sees(signs) else ""

    def fail(self):
        raise ValueError(f"unexpected {self.token!r}")

    def items(self, end: str = "end") -> list[_Node]:
        """Statements between commas, semicolons, `and`, `or`, up to the end or a bracket."""
        items = []
        while not items or self.kind == "and":
            while self.kind == "and":
                self.next()
            items.append(self.statement())
        return items if self.kind == end else self.fail()

    def statement(self) -> _Node:
        """A quantity, or a relation between several: x = 2, 1 < x < 3.

        Rule: `x ∈ A` is only A; an equation without a name on its left (5 = x) is turned around.
        """
        sides, signs = [], ""
        while not sides or self.sees("=<>≤≥≠≈∈"):
            signs += self.next() if sides else ""
            start, node = len(self.read), self.quantity()
            sides.append(node._replace(text=self.read[start:]))
        if not signs:
            return sides[0]
        if signs == "∈" and sides[0].is_name and sides[1].kind != "value":
            return sides[1]._replace(signs=signs)
        if signs == "=" and not sides[0].is_name and sides[1].is_name:
            sides.reverse()
        if signs == "=" and sides[0].kind == sides[1].kind == "()":
            pairs = zip(sides[0].items, sides[1].items, strict=True)  # (x, y) = (1, 2)
            return _Node("", [_Node("relation", pair, signs="=") for pair in pairs])
        if set(signs) <= {*">≥"}:
            sides, signs = sides[::-1], signs[::-1].translate({ord(">"): "<", ord("≥"): "≤"})
        return _Node("relation", sides, signs=signs)

    def quantity(self) -> _Node:
        """A sum with its unit, words, or brackets joined by ∪ or ∖."""
        if self.kind == "word":
            start = len(self.read)
            while self.kind in ("word", "name"):
                self.read += " "
                self.next()
            if self.sees("("):  # Area(ABC), gcd(4, 6)
                self.atom()
            return _Node("text", [self.read[start:].strip()])
        node = self.sum()
        while node.kind not in ("value", "±") and (sign := self.accept("∪∖")):
            parts, other = node.items if node.kind == "∪" else [node], self.sum()
            if sign == "∪" and node.kind == other.kind == "⦃⦄":
                node = node._replace(items=node.items + other.items)
            else:
                node = _without_points(node, other) if sign == "∖" else _Node("∪", [*parts, other])
        return node

    def sum(self) -> _Node:
        node = self.term()
        while self.sees("+-±"):
            node = _apply(_add, node, self.term())  # power() reads the sign: a - b is a + (-b)
        if node.unit and not node.is_constant:
            _unit(node.unit, False)  # raises for x + 3 pears
        return node

    def term(self) -> _Node:
        """A product with its unit: 3 thousand m/s."""
        node = self.product()
        if node.kind not in ("value", "±"):
            return node
        while self.token.lower() in _SCALES:
            node = _apply(mul, node, _number(10 ** _SCALES[self.next().lower()]))
        # words, signs like %, and powers and quotients of them: cm^2, m/s, °C
        start, last = len(self.read), ""
        while self.kind == "word" or self.sees("%°¤£€¢¥₹^/*" if last else "%°¤£€¢¥₹"):
            last = self.next()
            if last == "^":
                self.atom()
            elif self.kind == "name" and last in "/*°":
                self.next()
        unit = _unit(re.sub(r"[{}]", "", self.read[start:]), node.is_constant)
        return _for_each_sign(lambda part: part._replace(unit=part.unit or unit), [node])

    def product(
        self, signs="*/(√{⟦[", kinds=("name", "base", "call", "command", "function")
    ) -> _Node:
        """Factors that begin with one of these signs or kinds of tokens: 2x, 2 * 3."""
        node = self.power()
        while self.sees(signs) or self.kind in kinds:
            operation = truediv if self.accept("*/") == "/" else mul
            node = _apply(operation, node, self.power())
        return node

    def power(self) -> _Node:
        signs = ""
        while self.sees("+-±¤£€¥₹"):  # -$5 and $-5
            signs += self.next()
        currency = _UNITS.get(signs.strip("+-±"), "")
        node = self.atom()
        if self.accept("^"):  # once: 2^3^4 is not TeX, and may be read in two ways
            node = _apply(_power, node, self.power() if self.sees("-") else self.atom())
        if self.accept("!"):
            node = self.fail() if self.sees("!") else _apply(_factorial, node)
        node = _apply(neg, node) if signs.count("-") % 2 else node
        if currency:
            node = _for_each_sign(lambda part: part._replace(unit=currency), [node])
        return _Node("±", [node, _apply(neg, node)]) if "±" in signs else node

    def atom(self) -> _Node:
        self.depth += 1  # every recursion passes through here
        if self.depth > _MAX_DEPTH:
            raise ValueError("too deep")
        kind, token = self.kind, self.next()
        if kind in ("number", "base"):
            node = _number(token)
        elif kind == "name":
            node = _symbol(re.sub("[{} ]", "", token))
        elif kind == "call":  # an unknown function: a variable named after it and its argument
            node = _apply(lambda x: _symbol(f"{token}({complex(x):.9g})").items[0], self.atom())
        elif kind == "function":
            node = self.function(token)
        elif token in (r"\frac", r"\binom"):
            node = _apply(truediv if token == r"\frac" else _binomial, self.atom(), self.atom())
        elif token == "√":
            degree = self.bracket(self.next()) if self.sees("[") else _number(2)
            node = _apply(_power, self.atom(), _apply(truediv, _number(1), degree))
        elif token == "|":
            node = _apply(abs, self.sum())
            self.accept("|") or self.fail()
        elif token == "⟦":
            rows = []
            while not self.accept("⟧"):
                rows.append(_Node("[]", self.items("close")))
                self.accept("⏎")
            node = _Node("[]", rows)
        else:
            node = self.bracket(token) if token in _CLOSING else self.fail()
        self.depth -= 1
        return node

    def function(self, name: str) -> _Node:
        """sin x, \\sin^2 x, \\log_2 x: without brackets its argument is a product of names."""
        scripts = {}
        while self.sees("^_"):
            sign = self.next()
            scripts[sign] = self.atom()
        factors = "√{", ("name", "call", "command")
        argument = self.atom() if self.sees("(") else self.product(*factors)
        if argument.unit == "°" or self.accept("°"):
            argument = _apply(lambda x: x * _CONSTANTS["π"] / 180, argument._replace(unit=""))
        power = scripts.get("^", _number(1))
        if f"arc{name}" in _FUNCTIONS and power.items[:1] == (-1,):  # \tan^{-1}
            name, power = f"arc{name}", _number(1)
        base = [scripts["_"]] if name == "log" and "_" in scripts else []
        result = _apply(functools.partial(_call, name), argument, *base)
        return _apply(_power, result, power)

    def bracket(self, left: str) -> _Node:
        if self.kind == "and":  # 5 (or 6)
            self.fail()
        items = [] if self.kind == "close" else self.items("close")
        kind = left + self.accept(_CLOSING[left])
        if len(items) == 1 and kind in ("()", "[]", "{}"):
            return items[0]
        if kind == "⦃⦄":  # {±1, ±2} has four elements
            items = sum((item.alternatives for item in items), [])
            items = [x._replace(kind=x.kind.replace("⦃⦄", "⦃⦃⦄⦄")) for x in items]  # a set in it
        kind = "" if kind == "{}" else kind
        return _for_each_sign(lambda *items: _Node(kind, items), items)


_LETTER = "[A-Za-zΑ-Ωα-ορ-ω]"  # without pi
_INDEX = r"(?:_(?:\w|\{\w[\w+,-]{0,8}\})'*|'+)"
_NAME = rf"(?:{_LETTER}{_INDEX}|P\([^()]*(?:[=<>≤≥|∪‹]|\\cap)[^()]*\))"  # x_1, x', P(X = 2)
_CALL = rf"""(?:(?:[fgFG]{_INDEX}?(?:\^(?:\{{-?\w+\}}|\w))?|[⌊⌈])(?=\s*\()  # f(x + 1), f^{{-1}}(2)
    |E(?=\s*\[)  # an expectation
    # P(x), but e(x) and i(3) are products
    |(?![ei]\s*\(){_LETTER}{_INDEX}?(?=\s*\(\s*(?:[\d.]+|{_LETTER}{_INDEX}?)\s*\)))"""
_INVERSE = r"\s*\^\s*(?:\{\s*(?:-1|T)\s*\}|T)"
# A product of matrices, B^{-1}A^T, has an order: it is a variable of that name.
_FACTOR = r"[A-Z](?!_)(?:\s*\^\s*(?:\{\s*-?\w+\s*\}|\w))?\s*"
_MATRICES = rf"(?=(?:{_FACTOR})*?[A-Z]{_INVERSE})(?:{_FACTOR}){{2,}}"
_TOKEN = re.compile(rf"""(?x)  # a number may have groups of three digits: 1,234 or 1 234
    \s*(?:(?P<and>[,;&]|(?i:‹?\s*(?:and|or)(?![A-Za-z])\s*›?))
    |‹(?P<word>[^›]*)›
    |(?P<number>(?:(?<![,^_])\d{{1,3}}(?:(?:,\d{{3}})+|(?:[ ]\d{{3}})+)(?![, ]?\d)
        |\d+)(?:\.\d+)?(?:[eE][+-]?\d{{1,3}})?|\.\d+)
    |(?P<function>(?:{"|".join(_FUNCTIONS)})(?![A-Za-z]))
    |(?P<name>{_MATRICES}|{_NAME}|[π∞])|(?P<call>{_CALL})
    |(?P<letters>(?:(?!{_CALL}|{_NAME}){_LETTER})+)
    |(?P<command>\\[A-Za-z]+)|(?P<close>[}}⦄)\]⟧⏎])|(?P<sign>\S))""")
_SIDE_NAME = re.compile(rf"""(?x)  # x, m + n, a/b, f^{{-1}}(2), [ABC]; not 2x, x + 1, x^2, -x
    (?!.*(?<!\^)[({{|]-|-)(?:(?!log|ln|exp)(?:{_NAME}|{_LETTER})(?:\^\{{-1\}}(?=\())?(?:\(-?\d+\))?
    |\\frac|[-+*/(),|{{}}⟦⟧⏎[\]])+""")


def _tokens(text: str) -> list[tuple[str, str]]:
    """Pairs of a kind (a group of _TOKEN) and a text.

    Rule: a comma before three digits joins them; between brackets only before a 0, as in {1,000}.
    f, g, F, G before a bracket are functions, another letter before one with a single number or
    letter.
    """
    tokens, opened = [("and", "")], 0  # what begins a statement
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup, match[match.lastgroup]
        opened += (token in "([⦃") - (token in ")]⦄")
        if kind == "letters":
            tokens += _letters(token, *tokens[-1], match[0][0].isspace())
        elif kind == "number":
            apart = opened > 0 and ",0" not in token
            for part in token.replace(" ", "").replace(",", "," if apart else "").split(","):
                tokens += [("number", part), ("and", ",")]
            tokens.pop()
        else:
            tokens.append((kind, token))
    return tokens[1:]


def _letters(run: str, kind: str, before: str, spaced: bool) -> list[tuple[str, str]]:
    """A run of letters after a token of this kind: a word, or a product of variables (dx is one).

    Rule: it is a word after a word; after a number if it is a known unit; after a number and a
    space, or where a statement begins, if it looks like a word (see _is_wordlike).
    """
    if kind == "word":  # 18 dollars a day
        return [("word", run)]
    if len(run) == 1 or re.fullmatch("d[r-z]", run):  # dx, dt: one variable, not d times x
        return [("name", run)]
    low, follows = run.lower(), kind in ("number", "close")
    begins = kind == "and" or before in "=<>≤≥≠≈∈([⦃"
    may_be_unit = kind == "number" or before in ("/", "%") or spaced and (follows or kind == "name")
    is_unit = low in _UNITS and may_be_unit
    is_word = (begins or follows and spaced) and _is_wordlike(low)
    if is_unit or is_word or begins and low in ("no", "on", "is"):
        return [("word", run)]
    return [("name", letter) for letter in run]


def _is_wordlike(word: str) -> bool:
    """Three letters or more, with a vowel, not in alphabetical order as factors are (abc)."""
    in_order = list(word) == sorted(set(word)) and not word.endswith("s")  # (but chips, films)
    return len(word) > 2 and re.search("[aeiou]", word) is not None and not in_order


# Signs, synonyms, and names that do not look like words or that follow a variable. Any other word
# after a number is its unit without being listed (see _unit). A plural with s is added to each.
_UNIT_NAMES = """$ dollar usd ¤ buck|£ gbp|€ euro eur|¢ cent|¥ yen yuan|₹ rupee|% percent
|° degree deg|°c|°f|mm millimeter millimetre|cm centimeter centimetre|dm|m meter metre
|km kilometer kilometre|in inch inche|ft foot feet|yd yard|mi mile|mg milligram|g gram
|kg kilogram|lb pound|oz ounce|ml milliliter millilitre|l liter litre|s second sec|min minute
|h hour hr|mph|kph|week|year yr|rad radian|pt|am a.m|pm p.m|kb|mb|gb|kw|kwh|hp|hz|n|j|w|v
|sq square|cubic|us|th st nd rd|of|per|unit"""
_UNITS = [names.split() for names in _UNIT_NAMES.split("|")]
_UNITS = {alias + s: names[0] for names in _UNITS for alias in names for s in ("", "s")}
_SI_UNIT = re.compile("[kmgtnp]?(?:[jkcatfhwvnmsgl]|ev|hz|pa|mol)")  # in \\text{}: 5 eV, 3 kJ
_LINKS = "/ * - a an to by as at on for with than from".split()  # in a unit of several words
_NUMBER_WORD = re.compile(r"""(?x)  # not a unit: it changes the number before it, as in 3 halves
    \w+tieths?|(?:\w+illion|(?:thir|four|fif|six|seven|eigh|nine)teen|hundred|thousand|dozen
    |(?:twen|thir|for|fif|six|seven|eigh|nine)ty|one|two|three|four|five|six|seven|eight|nine|ten
    |eleven|twelve|third|quarter|mil)(?:ths?|s)?|(?:fif|eigh|nin|twelf)ths?|half|halfs|halves
    |lakh|crore|gross|permille|twice|thrice|score|least|most|double|triple|factorial|plus|minus
    |negative|point|root|power|remainder|(?:squar|cub|doubl|tripl|halv|divid|multipli|increas|decreas
    |reduc|rais|add|subtract)ed""")


def _unit(text: str, constant: bool) -> str:
    """One spelling for a unit: centimeters -> cm, m^2 -> sq m, dollars -> $.

    Rule: after a number, what looks like a word is a unit, except number words; after an expression
    with variables only a known unit is.
    """
    words = []
    for word in re.sub(r"\bper\b|/", " / ", text.lower().replace("*", " ")).split():
        name, _, power = word.strip(".").partition("^")
        is_word = all(map(_is_wordlike, name.split("-"))) or _SI_UNIT.fullmatch(name)
        is_unit = name in _UNITS or name in _LINKS or constant and is_word
        if not is_unit or _NUMBER_WORD.fullmatch(name):
            raise ValueError("no unit")
        prefix = {"2": "sq ", "3": "cubic "}.get(power, power)
        words.append(prefix + _UNITS.get(name, name.removesuffix("s")))
    return " ".join(words).replace("mi / h", "mph")


# --------------------------------------------------------------------------------------- the values

_WHOLE = frozenset(range(301))  # what may have a factorial; 3, 3.0 and Fraction(3) are in it
# Floats have 16 digits. A sum of 1e-13 of its terms, or a sine of 1e-15 of its argument, is a
# rounding error and 0. Which floats are equal: see _close.
_CONSTANTS = {"π": complex(math.pi), "e": complex(math.e), "i": 1j, "∞": complex(math.inf)}


def _number(x) -> _Node:
    return _Node("value", (Fraction(x),) * _POINTS)


@functools.lru_cache(maxsize=4096)
def _symbol(name: str) -> _Node:
    """A constant (infinity is one) or a variable.

    Every variable has both signs, so that |x| is not x; and no two small letters have the same or
    opposite ones at every point, so that |a + d| is not |a| + |d|, nor |ad| = ad. Modulo 8 letters
    differ from point to point and from each other, so that (-1)^n is neither (-1)^k nor
    (-1)^(n(n-1)/2): three bits of a code, shifted by one from point to point, whose factor 233 was
    found by trial.
    """
    if name in _CONSTANTS:
        return _Node("value", (_CONSTANTS[name],) * _POINTS)
    draw = random.Random(name).randrange  # the same in every process
    code = ord(name) if len(name) == 1 else draw(10**6)
    signs = code % 31 + 1  # five bits, not all 0; at the last three points all are positive
    draws = [8 * draw(1, 125_000) + (233 * code >> k + 1) % 8 for k in range(_POINTS)]
    points = [Fraction(-n if signs >> k & 1 else n, 400_009) for k, n in enumerate(draws)]
    return _Node("value", tuple(points))


def _apply(function, *arguments: _Node) -> _Node:
    """The function at the eight points; an ArithmeticError or ValueError where it has no value."""
    if "±" in [argument.kind for argument in arguments]:
        return _for_each_sign(functools.partial(_apply, function), arguments)
    if arguments[-1].kind == "[]" and function in (mul, neg):  # a matrix, a row of it
        entries = (_apply(function, *arguments[:-1], entry) for entry in arguments[-1].items)
        return arguments[-1]._replace(items=[*entries])
    units = [argument.unit for argument in arguments if argument.unit]
    unit, n = (*units, "")[0], len(units)
    if function is _add:  # 3 + 5 m is 8 m
        fits = {*units} <= {unit} and (unit != "%" or n == 2)
    else:  # 2 x $5; 180°/5
        fits = function is neg or n == 0 or n == 1 and unit in "$£€¥₹°"
    if not fits or any(argument.kind != "value" for argument in arguments):
        raise ValueError("arithmetic on something other than numbers of one unit")
    points, numbers = [*zip(*(argument.items for argument in arguments))], []
    constant = points.count(points[0]) == _POINTS
    for point in points[:1] if constant else points:
        x = function(*point)
        if isinstance(x, Fraction):
            bits = max(x.numerator.bit_length(), x.denominator.bit_length())
            extreme = bits > (_MAX_BITS if constant else _MAX_BITS // 4)  # x^100, not x^200
        else:  # (a float that became zero by underflow would equal others)
            finite = function is neg or all(map(cmath.isfinite, (x, *point)))  # -∞; no 0*∞
            extreme = not finite or abs(x) < 1e-250 and all(point)
        if extreme:
            raise ValueError("too large or too small")
        numbers.append(x)
    return _Node("value", tuple(numbers) * (_POINTS // len(numbers)), unit)


def _add(x: Fraction | complex, y: Fraction | complex) -> Fraction | complex:
    """The sum; floats that cancel to their last digits make exactly 0."""
    total = x + y
    cancels = isinstance(total, complex) and abs(total) < 1e-13 * abs(x)
    return Fraction(0) if cancels else total


def _power(x: Fraction | complex, y: Fraction | complex) -> Fraction | complex:
    """x^y, exact for whole y and for square roots of squares; real roots where there are any."""
    if not isinstance(y, Fraction):
        return complex(x) ** complex(y)
    n, degree = y.as_integer_ratio()
    if isinstance(x, Fraction):
        size = max(abs(x.numerator), x.denominator) - 1  # 0 and 1 may have any power
        if size.bit_length() * abs(n) > 2 * _MAX_BITS * degree:
            raise ValueError("too large")
        if degree == 2 and x > 0:
            root = Fraction(math.isqrt(x.numerator), math.isqrt(x.denominator))
            if root * root == x:
                return root**n
    if degree == 1:
        return x**n
    if degree % 2 and x.imag == 0 > x.real:
        return complex((-1) ** (n % 2) * (-x.real) ** (n / degree))
    return complex(x) ** (n / degree)


def _call(name: str, x, *base) -> Fraction | complex:
    """A function's value; rounding errors are 0 (the sine of pi, say)."""
    result = _FUNCTIONS[name](x, *base)
    return Fraction(0) if abs(result) < 1e-15 * abs(x) and name != "exp" else result


def _factorial(n: Fraction | complex) -> Fraction | complex:
    """n!, by the gamma function where n is not whole, so that (n + 1)! is (n + 1) n!."""
    if n in _WHOLE:
        return Fraction(math.factorial(int(n.real)))
    return complex(math.gamma(n.real + 1) if n.imag == 0 else math.nan)


def _binomial(n: Fraction | complex, k: Fraction | complex) -> Fraction | complex:
    if k not in _WHOLE or k.real > 20 and n not in _WHOLE:
        return _factorial(n) / (_factorial(k) * _factorial(n - k))
    factors = [(n - i) / Fraction(i + 1) for i in range(int(k.real))]
    return math.prod(factors, start=Fraction(1))


# -------------------------------------------------------------------------------- comparing answers


class _Comparison:
    """Compares parsed answers, with a bound on the work, which lists in lists multiply."""

    left = 2500  # comparisons that may still be made; all of them take some 10 ms

    def same(self, a: _Node, b: _Node) -> bool:
        self.left -= 10 if a.kind == "relation" else 1
        if self.left < 0:
            raise ValueError("too much to compare")
        if a.kind == b.kind == "relation":
            return self.same_relation(a, b)
        if a.kind == b.kind == "value":
            return self.same_value(a, b)
        if self.same_group(a, b):
            return True
        pairs = (a, b), (b, a)
        return any(self.same(meaning, y) for x, y in pairs for meaning in self.meanings(x))

    def same_group(self, a: _Node, b: _Node) -> bool:
        """Lists, sets and unions have no order, unless only one of the two names its values;
        tuples, intervals and matrices have one; a list may be the tuple of the same order.
        """
        kinds, x, y = {kind.replace("±", "⦃⦄") for kind in (a.kind, b.kind)}, a.items, b.items
        if kinds == {"text"}:
            return _plain(x[0]) == _plain(y[0])
        unordered = {"", "⦃⦄"}, {"⦃⦃⦄⦄"}, {"", "and"}, {"", "or"}, {"∪"}
        in_any_order = any(kinds <= pair for pair in (*unordered, {"or", "⦃⦄"}, {"and", "⦃⦄"}))
        if in_any_order and _are_named(x) == _are_named(y):
            table = [[self.same(item, other) for other in y] for item in x]
            if "⦃⦄" in kinds:
                return all(map(any, table)) and all(map(any, zip(*table))) and bool(x) == bool(y)
            # Each item is in y (the sum) as often as in x, where equal items have equal rows.
            return len(x) == len(y) and all(0 < sum(row) == table.count(row) for row in table)
        is_point = kinds == {"", "()"} and not (a.signs or b.signs)  # "1, 2" may be (1, 2)
        alike = a.kind == b.kind or is_point
        return alike and len(x) == len(y) and all(map(self.same, x, y))

    def same_value(self, a: _Node, b: _Node) -> bool:
        """Equal numbers, and no different units; a percentage is a hundredth, and from 1% on also
        the bare number, since gold answers to "what percent" lack the sign: 50% is 0.5 and 50.
        """
        short, long = sorted((a.unit, b.unit), key=len)
        if short not in ("", long) and not (short in "$£€¥₹%°" and long.startswith(f"{short} ")):
            return False  # $18 is 18 dollars per hour, and 25% is 25% of the boys
        # √(ab) is √a √b, and ln(ab) is ln a + ln b, where all letters are positive
        start = -3 if _has_branches(a.text) and _has_branches(b.text) else 0
        equal = all(map(_close, a.items[start:], b.items[start:]))
        if a.unit[:1] == "%" == b.unit[:1] or "%" not in a.unit + b.unit:
            return equal
        percent, other = (a, b) if a.unit[:1] == "%" else (b, a)
        hundredth = all(_close(x, 100 * y) for x, y in zip(percent.items, other.items))
        return hundredth or equal and abs(percent.items[0]) >= 1

    def same_relation(self, a: _Node, b: _Node) -> bool:
        """Equations up to a constant factor, inequalities a positive one; others side by side.

        Rule: two that name the same thing (also y and f(x)) are equal if the values are; without
        a variable in both differences, as in 1 + 1 = 2, every factor would do, and none is tried.
        """
        x, y, names = self.said(a), self.said(b), f"{a.items[0].text} {b.items[0].text}"
        named = x and y and re.fullmatch(r"(.*) \1|y \w\(x\)|\w\(x\) y", names)  # x x, y f(x)
        if named and self.same(x[0], y[0]):
            return True
        if a.signs != b.signs:
            return False
        x, y = _differences(a), _differences(b)
        if x and y:
            ratios = [_apply(truediv, left, right).items for left, right in zip(x, y)]
            is_positive = all(c[0].real > 0 for c, sign in zip(ratios, a.signs) if sign not in "=≠")
            return is_positive and all(_close(c[0], x) for c in ratios for x in c)
        return all(map(self.same, a.items, b.items))

    def said(self, chain: _Node) -> list[_Node]:
        """What a chain of = and ≈ says: its last side before any ≈, and the last rounded one.

        x = 10/4 = 5/2 says 5/2, and so does 10/4 = 5/2, where all sides are equal. 2x = 10 says
        nothing; but after a name a formula may come: A = pi r^2 = 9 pi says 9 pi. x = 1/3 ≈ 0.333
        says 1/3 and 0.333, x ≈ 0.333 only 0.333, and 1/3 ≈ 0.4 nothing, since it rounds to 0.3.
        """
        n = (chain.signs + "≈").index("≈") + 1
        sides, rounded = chain.items[:n], chain.items[n:]
        names = [name for side in chain.items[1:] for name in side.names]
        if set(chain.signs) - {*"=≈"} or sides[0].text in names:  # x = 2x
            return []
        last = chain.items[-1]
        if len(chain.items) > 2 and (last.kind == "text" or last.is_name):  # x = B = D
            return []
        if rounded and all(side.is_name for side in sides):
            return rounded if len(rounded) == 1 else []
        for side in sides[:-1]:
            gone = {*side.names} - {*sides[-1].names}  # replaced by their values
            formula = sides[0].is_name and side.kind == "value" and gone and not side.is_constant
            power = sides[-1].kind == "[]" and re.fullmatch(r"[A-Z]\^.*", side.text)  # of a matrix
            if not (side.is_name or formula or power or self.same(side, sides[-1])):
                return []
        return [sides[-1], *rounded[-1:]] if all(_rounds(sides[-1], x) for x in rounded) else []

    def meanings(self, node: _Node) -> list[_Node]:
        """What an answer may mean besides itself, when the other one is not a relation: {5},
        x = 5, and 10/2 or 5 mean 5; x > 3 means (3, oo), x < 1 or x > 2 a union, x ≠ 0 all but 0.
        """
        if node.kind in ("", "⦃⦄") and node.items:
            if all(self.same(node.items[0], item) for item in node.items[1:]):
                return node.items[:1]
        if node.kind == "[]" and all(x.kind == "[]" and len(x.items) == 1 for x in node.items):
            return [_Node("()", [row.items[0] for row in node.items])]  # a column vector
        relations = node.items if node.kind in ("", "or") else [node]
        pieces = _intervals(relations) if all(x.kind == "relation" for x in relations) else []
        if pieces:
            return pieces if len(pieces) == 1 else [_Node("∪", pieces)]
        return self.said(node) if node.kind == "relation" else []


def _intervals(relations: list[_Node]) -> list[_Node]:
    """Where one of some inequalities holds: x < 1 or 2 <= x < 3 give (-oo, 1) and [2, 3).

    Rule: one variable is in all of them; x > 1, y < 2 give none.
    """
    infinity, pieces, variables = _symbol("∞"), [], set()
    for relation in relations:
        sides, signs = [_apply(neg, infinity), *relation.items, infinity], f"<{relation.signs}<"
        k = 1 if len(sides) == 4 and sides[1].is_name else 2  # where the variable is
        if len(sides) > 5 or not sides[k].is_name or "|" in sides[k].text:
            return []
        if signs == "<≠<":
            pieces += _without_points(_Node("()", [sides[0], infinity]), sides[3 - k]).items
        elif set(signs) <= {*"<≤"}:
            kind = "(["[signs[k - 1] == "≤"] + ")]"[signs[k] == "≤"]
            pieces.append(_Node(kind, [sides[k - 1], sides[k + 1]], signs="∈"))
        else:
            return []
        variables.add(sides[k].text)
    return pieces if len(variables) == 1 else []


def _close(x: Fraction | complex, y: Fraction | complex) -> bool:
    """Whether exact numbers are equal, or floats to 11 digits, or one of each to 13.

    Rule: a float equals no decimal of four places or more, and no number above 10^9, which would be
    an irrational number rounded (1.41421356237309 is not the root of 2). The denominator of a
    decimal divides a power of ten.
    """
    exact = [abs(number) for number in (x, y) if isinstance(number, Fraction)]
    if len(exact) == 2:
        return x == y
    if any(n > 10**9 or n.denominator > 1024 and 10**400 % n.denominator == 0 for n in exact):
        return False
    return x == y or abs(x - y) < (1e-13 if exact else 1e-11) * max(abs(x), abs(y))


def _has_branches(text: str) -> bool:
    """Whether roots or logarithms, but no absolute values and no powers of -1, are in a text."""
    power = r"[|]|\(-|-[^(]{0,60}[)}\]]\^\{?[^}]{0,60}[a-z]"  # also ((1-√5)/2)^n
    return re.match(rf"(?!.*(?:{power})).*(?:√|ln|log)", text) is not None


def _differences(relation: _Node) -> list[_Node]:
    """Left minus right side for every sign; none unless all are numbers with a variable."""
    sides = relation.items
    if any(side.kind != "value" or side.unit for side in sides):
        return []
    differences = [_apply(_add, x, _apply(neg, y)) for x, y in zip(sides, sides[1:])]
    return [] if any(x.is_constant for x in differences) else differences


def _are_named(items: list[_Node]) -> bool:
    """Whether every item of a list has a name (x = 1, y = 2) or a unit (3 m, 4 s), not all one."""
    names = [x.items[0].text if x.kind == "relation" else x.unit for x in items]
    return all(names) and len(set(names)) > 1


def _rounds(exact: _Node, rounded: _Node) -> bool:
    """Whether a number, as it was written, is the other one rounded to its last place.

    Rule: a rounded number has two digits or more, for 1/3 ≈ 0 would be an answer and a guess.
    """
    number = r"[¤£€¥₹]?-?\d*\.?(\d*)(?:\*10\^\{?(-?\d+)\}?)?[^\d+*/^-]*"
    match = re.fullmatch(number, rounded.text)
    if not match or not exact.kind == rounded.kind == "value" or not exact.is_constant:
        return False
    x, y = exact.items[0], rounded.items[0]
    if rounded.unit == "%" != exact.unit:
        x = 100 * x
    place = Fraction(10) ** (int(match[2] or 0) - len(match[1]))
    return x == y or abs(x - y) <= place / 2 and abs(y) >= 10 * place


def _without_points(node: _Node, points: _Node) -> _Node:
    """An interval without a set of points: (-oo, oo) without {0} is (-oo, 0) ∪ (0, oo)."""
    items = points.items if points.kind == "⦃⦄" else points.alternatives
    is_interval = node.kind in ("()", "(]", "[)", "[]") and len(node.items) == 2
    if not is_interval or any(point.kind != "value" for point in items):
        raise ValueError("no interval without points")
    inner = sorted(items, key=lambda point: point.items[0].real)
    ends, kinds = [node.items[0], *inner, node.items[1]], node.kind[0] + ")(" * len(inner)
    kinds = re.findall("..", kinds + node.kind[1])
    return _Node("∪", [_Node(kind, pair) for kind, *pair in zip(kinds, ends, ends[1:])])


# --------------------------------------------------------------------------------------------- code
# verify_code starts a Python process for every input/output pair, or one for all statements. That
# process is a launcher: it shuts itself off from the system, forks the one that runs the solution,
# and kills whatever the solution started when that ends.


def verify_code(response: str, tests: list, *, timeout: float = 5.0, memory: int = 1024) -> bool:
    """Whether the last fenced Python block of `response` passes every test.

    tests: `{"input": str, "output": str}` each (standard input and output of a run of its own,
    compared line by line without trailing blanks; exit status 0), or statements with asserts as
    strings, run in their order after the solution in one process.
    timeout: seconds of wall time and of CPU time for a process. memory: MiB of address space for a
    process. False without tests, and for a block that never closes. Raises what check_tests raises,
    TypeError for a response that is not a string, NotImplementedError outside Linux.

    The verdict is made in this process. Of `assert f(2) == 4` the child gets `f(2)` and sends back
    its value as a text; the 4 never leaves this process. So an early exit, printing "passed",
    objects that equal everything, patched built-ins and AssertionErrors fail. An assert of another
    form (`assert isclose(f(2), 4)`), without a literal side (`assert f(2) == g(3)`) or in a
    function or loop (HumanEval's `check(candidate)`) is evaluated in the child, where code can
    forge it.

    The child has an environment and an empty folder of its own, no inherited descriptors and limits
    on time, memory, processes and output; started by root it runs as a user without rights. Where
    the kernel allows namespaces it has no network and sees no other process, and where it allows
    mounts in them it writes to that folder only. Elsewhere (many containers) network and the user's
    own files and processes are NOT protected, and files in /tmp stay. Files that the user can read
    can be read everywhere. Run hostile code in a virtual machine.
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
        return all(_lines(_run(job, test["input"])) == _lines(test["output"]) for test in tests)
    token = os.urandom(16).hex()  # what the solution guesses and prints is no reply
    steps, literals = [], []  # what the child gets; the literal sides, for which it gets None
    for statement in ast.parse("\n".join(tests)).body:
        test = statement.test if isinstance(statement, ast.Assert) else None
        if isinstance(test, ast.Compare) and [*map(type, test.ops)] == [ast.Eq]:
            sides = [test.left, test.comparators[0]]
            texts = [*map(_literal, sides)]
            steps.append([None if text else ast.unparse(side) for side, text in zip(sides, texts)])
            literals += [text and f"{token} {text}" for text in texts]
        else:
            steps.append(ast.unparse(statement))
            literals += [None, None]
    out = _run(job | {"steps": steps, "token": token})
    replies = (out or "").split("\n")[:-1]
    if len(replies) != len(literals):
        return False
    sides = [literal or reply for literal, reply in zip(literals, replies)]
    return sides[::2] == sides[1::2] and all(reply.startswith(token) for reply in replies)


def check_tests(tests: list) -> None:
    """Raise for tests that verify_code cannot use, without running anything.

    TypeError for a form that verify_code does not document, ValueError for no test and for one that
    is not Python. Call it for every row before the first sample: the reward would be 0 forever.
    """
    form = 'tests must be a list of {"input": str, "output": str}, or of statements as strings'
    if not isinstance(tests, (list, tuple)):
        raise TypeError(f"{form}, not {type(tests).__name__}: {tests!r:.80}")
    kind = dict if tests and isinstance(tests[0], dict) else str
    for test in tests:
        values = [test.get("input"), test.get("output")] if isinstance(test, dict) else [test]
        if not isinstance(test, kind) or not all(isinstance(value, str) for value in values):
            raise TypeError(f"{form}; this is neither: {test!r:.80}")
    try:
        statements = tests if kind is dict else ast.parse("\n".join(tests)).body
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:  # by version
        raise ValueError(f"tests that are not Python ({error}): {tests!r:.80}") from error
    if not statements:
        raise ValueError(f"{form}; the list is empty or has comments only: {tests!r:.80}")


_CONSTRUCTORS = set, frozenset, tuple, list, dict, sorted, round, str, float
_CONSTRUCTORS = {function.__name__: function for function in _CONSTRUCTORS}


def _literal(side: ast.expr) -> str | None:
    """The text of a literal, as _spelled has it, or of one within calls such as set((4, 5)), whose
    names the solution could give another meaning; None for an expression that must be evaluated.
    """
    try:
        if isinstance(side, ast.Call) and not side.keywords:
            arguments = [ast.literal_eval(argument) for argument in side.args]
            return _spelled(_CONSTRUCTORS[ast.unparse(side.func)](*arguments))
        return _spelled(ast.literal_eval(side))
    except (ValueError, TypeError, KeyError, ArithmeticError):
        return None


def _lines(text: str | None) -> list[str] | None:
    return None if text is None else [line.rstrip() for line in text.rstrip().split("\n")]


_FENCE = re.compile(r"""(?x)
    (?P<indent>[ \t]*(?:(?:[-*+]|\d+[.)])[ \t]+)?)(?P<fence>`{3,}|~{3,})
    [ \t]*(?P<language>\w*)[^`]*""")


def _code_block(response: str) -> str | None:
    """The last fenced block marked as Python, or without a language where none is marked.

    None without one, or when it never closes. As in CommonMark a fence closes with as many marks or
    more, indented by at most three blanks more (those in a docstring are deeper); a list item's
    indentation is dropped.
    """
    blocks, opening = {}, None  # the last block of each language
    for line in response.replace("\r\n", "\n").split("\n"):
        if opening is None:
            if opening := _FENCE.fullmatch(line):
                depth, lines = len(opening["indent"]), []
                language = re.sub("^py(thon)?3?$", "python", opening["language"].lower())
                blocks[language] = None  # until it closes
            continue
        closing = re.fullmatch(r"([ \t]*)(`{3,}|~{3,})[ \t]*(?:<[|/].*)?", line)
        if closing and len(closing[1]) <= depth + 3 and closing[2].startswith(opening["fence"]):
            indents = [len(line) - len(line.lstrip(" \t")) for line in lines if line.strip()]
            indent = min([depth, *indents])  # (textwrap.dedent would change blanks in strings)
            blocks[language] = "\n".join(line[indent:] for line in lines)
            opening = None
        lines.append(line)
    return blocks.get("python", blocks.get(""))


@contextlib.contextmanager
def _empty_folder():
    """A temporary folder. tempfile cannot remove what is a thousand levels deep, and of what is a
    hundred times deeper some may stay.
    """
    folder = tempfile.TemporaryDirectory(prefix="verifier_", ignore_cleanup_errors=True)
    try:
        yield folder.name
    finally:
        try:
            folder.cleanup()
        except RecursionError:
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(["rm", "-rf", folder.name], timeout=10)


def _run(job: dict, given: str = "") -> str | None:
    """What a child, given this input, prints; None when it failed or was stopped."""
    with _empty_folder() as folder, tempfile.TemporaryFile() as out:  # limited as files are
        os.chmod(folder, 0o777)
        header = json.dumps(job | {"folder": folder}).encode()
        command = [sys.executable, "-I", "-c", _child_source()]
        pipes = {"stdin": subprocess.PIPE, "stdout": out, "stderr": subprocess.DEVNULL}
        # a thread's heap, and NumPy's thread per core, would take more than the memory
        env = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
        child = subprocess.Popen(command, **pipes, cwd=folder, env=env, start_new_session=True)
        with child, contextlib.suppress(subprocess.TimeoutExpired):
            try:  # the launcher stops it after `timeout`; killing a fork bomb may take it seconds
                data = b"%10d" % len(header) + header + given.encode(errors="replace")
                child.communicate(data, job["timeout"] + 20)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
        out.seek(0)
        return out.read().decode(errors="replace") if child.returncode == 0 else None


# ----------------------------------------------------------------------- code: in the child process


@functools.cache
def _child_source() -> str:
    """The program of the child: the functions below. It works in a notebook's cell as well."""
    imports = """import builtins, contextlib, ctypes, glob, json, math, os, signal, sys
from decimal import Decimal
from fractions import Fraction"""
    functions = _launch, _kill_descendants, _isolate, _hide_files, _restrict, _solve, _spelled
    try:
        return "\n".join([imports, *map(inspect.getsource, functions), "_launch()\n"])
    except (OSError, TypeError) as error:
        where = "import verifier.py, or paste it into a notebook's cell, but do not exec its text"
        raise TypeError(f"verify_code must read its own source for the child: {where}") from error


def _launch() -> None:
    """Read the job from standard input (ten digits for its length, and JSON), and run it."""
    text, size = b"", int(os.read(0, 10))
    while len(text) < size:
        text += os.read(0, size - len(text))  # (the rest is the solution's input)
    job, libc = json.loads(text), ctypes.CDLL(None)
    isolated = _isolate(libc)
    # PR_SET_CHILD_SUBREAPER: what the solution's children leave behind becomes a child of this one
    libc.prctl(36, 1, 0, 0, 0)
    pid = os.fork()
    if pid == 0:
        if isolated:
            _hide_files(libc, job["folder"].encode())
        _restrict(libc, job, isolated)
        return _solve(job)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(pid, signal.SIGKILL))
    signal.setitimer(signal.ITIMER_REAL, job["timeout"])
    status = os.waitpid(pid, 0)[1]
    if not isolated:  # (a PID namespace ends with its first process)
        _kill_descendants()
    os._exit(status != 0)


def _kill_descendants() -> None:
    """Kill them all, even a fork bomb: stopped first, they fork no more, and still count."""
    stopped, running = set(), {0}
    while running:
        found = [os.getpid()]
        for parent in found:  # which grows meanwhile
            for file in glob.glob(f"/proc/{parent}/task/*/children"):
                with contextlib.suppress(OSError), open(file) as children:  # (it may have ended)
                    found += map(int, children.read().split())
        running = {*found[1:]} - stopped
        for pid in running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        stopped |= running
    for pid in found[1:]:
        os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def _isolate(libc) -> bool:
    """New namespaces for the next child: no network, no other processes, mounts of its own; False
    where the kernel does not allow it.
    """
    uid, gid = os.getuid(), os.getgid()
    spaces = 0x40000000 | 0x20000000 | 0x20000 | 0x8000000  # CLONE_NEWNET, NEWPID, NEWNS, NEWIPC
    if uid != 0:  # (a root of such a namespace could not become nobody)
        spaces |= 0x10000000  # CLONE_NEWUSER: how other users get the rest
    if libc.unshare(spaces) != 0:
        return False
    if uid != 0:
        maps = {"setgroups": "deny", "uid_map": f"{uid} {uid} 1", "gid_map": f"{gid} {gid} 1"}
        for name, text in maps.items():
            # (AppArmor may forbid it)
            with contextlib.suppress(OSError), open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    return True


def _hide_files(libc, folder: bytes) -> None:
    """Nothing is writable but `folder` and shared memory, both empty; /proc has only this
    namespace's processes (of others it would show the environment) or nothing.
    """
    private, readonly = 1 << 18, 1
    if libc.mount(None, b"/", None, private | 1 << 14, None) != 0:  # seen in here only (MS_REC)
        return
    attributes = (ctypes.c_uint64 * 4)(readonly, 0, 0, 0)
    libc.syscall(442, -100, b"/", 0x8000, attributes, 32)  # mount_setattr(AT_RECURSIVE)
    for place in (folder, b"/dev/shm"):
        libc.mount(b"tmpfs", place, b"tmpfs", 6, b"size=16m,mode=777")  # MS_NOSUID | MS_NODEV
    if libc.mount(b"proc", b"/proc", b"proc", 6, b"subset=pid") != 0:  # for /dev/stdin
        libc.mount(b"tmpfs", b"/proc", b"tmpfs", 6 | readonly, None)


def _restrict(libc, job: dict, isolated: bool) -> None:
    """Fewer rights and resource limits for this process."""
    import resource

    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    capabilities, processes = 0, 64  # a limit for all processes of a user
    if os.getuid() == 0:
        user = 1 << 30 | int.from_bytes(os.urandom(3), "big")  # that nobody else is
        try:
            os.setegid(user)
        except OSError:  # this container has few users
            user = 65534
            os.setegid(user)
        os.seteuid(user)
        if not os.access(os.__file__, os.R_OK, effective_ids=True):
            capabilities = 1 << 2  # CAP_DAC_READ_SEARCH: the interpreter is below /root, say
        os.seteuid(0)
        libc.prctl(8, 1, 0, 0, 0)  # PR_SET_KEEPCAPS
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)  # root would not be bound by the limit on processes
    elif not isolated:  # the user's other processes count as well
        processes = 512 + len(glob.glob("/proc/[0-9]*/task/*"))
    header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)
    libc.capset(header, sets(capabilities, capabilities))
    libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: it dies with the launcher
    os.chdir(job["folder"])
    cpu = math.ceil(job["timeout"])
    limits = {"CPU": cpu, "AS": job["memory"], "FSIZE": 16 << 20, "NPROC": processes, "CORE": 0}
    for name, limit in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))


def _solve(job: dict) -> None:
    """Run the solution: as a program, or loaded and then asked for the values of the tests."""
    sys.set_int_max_str_digits(0)
    module = type(sys)("solution" if "steps" in job else "__main__")
    sys.modules["__main__"] = sys.modules[module.__name__] = module  # dataclasses look it up
    namespace, code = vars(module), compile(job["code"], "solution.py", "exec")
    if "steps" not in job:
        exec(code, namespace)
        return
    replies, null = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    originals = dict(vars(builtins))
    exec(code, namespace)
    vars(builtins).update(originals)
    for step in job["steps"]:
        if isinstance(step, str):
            exec(step, namespace)
            texts = ["done", "done"]
        else:
            values = [side and eval(side, namespace) for side in step]
            try:
                texts = [side and _spelled(value) for side, value in zip(step, values)]
            except TypeError:  # objects that are no plain data
                left, right = values
                same = type(left) is type(right) and bool(left == right)
                texts = ["an object", "an object" if same else "another object"]
        os.write(replies, "".join(f"{job['token']} {text}\n" for text in texts).encode())
    os._exit(0)  # without waiting for threads that the solution left


def _spelled(value) -> str:
    """Plain data as one line; equal values have equal texts: 2, 2.0 and Fraction(2); a Counter and
    a dict; d.keys() and a set; a NumPy array and a list. Raises TypeError or ValueError for others.
    """
    if value is None or value is ... or isinstance(value, str):
        return "..." if value is ... else json.dumps(value)
    if isinstance(value, (bytes, bytearray, memoryview)):
        return f"bytes {bytes(value).hex()}"
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, complex):
        real, imaginary = map(_spelled, (value.real, value.imag))
        return real if value.imag == 0 else f"({real} + {imaginary} j)"
    if isinstance(value, (int, float, Fraction, Decimal)):
        if abs(value) == math.inf:
            return str(float(value))
        numerator, denominator = value.as_integer_ratio()
        return f"{numerator:x}/{denominator:x}"  # hexadecimal, which has no limit on digits
    if isinstance(value, dict):
        return f"dict {_spelled(dict.items(value))}"
    sets = set, frozenset, type({}.keys()), type({}.items())
    for name, kinds in (("set", sets), ("list", list), ("tuple", tuple)):
        if isinstance(value, kinds):
            texts = [*map(_spelled, value)]
            return f"{name}({', '.join(sorted({*texts}) if name == 'set' else texts)})"
    raise TypeError("no plain data")
