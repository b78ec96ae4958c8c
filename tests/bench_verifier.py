"""The verifier beside math-verify 0.9.0: accuracy, speed, agreement on GSM8K; and the fuzzer.

By hand, not part of the tests:

    python -m venv venv_mv
    venv_mv/bin/pip install math-verify==0.9.0 antlr4-python3-runtime==4.13.2
    venv_mv/bin/python tests/bench_verifier.py gsm8k_train.jsonl gsm8k_test.jsonl  # ten minutes
    python tests/bench_verifier.py --fuzz 120  # seconds; needs no math-verify

A GSM8K answer is graded against itself (must be right) and as the response to the problem before.

Right verdicts in percent on the 3,271 cases of tests/verifier_cases.jsonl (1,386 of them wrong), by
the third command without GSM8K, 2026-11-28, on the project's machine (EPYC, 2 cores, Python 3.11).
`before` is verifier.py of commit c4b0e6d; the cases from "hedging" on are kinds that readers found.

    category                          cases  before  here  math-verify
    integers                             45   100.0   100         86.7
    decimals                             38   100.0   100         84.2
    fractions                            39   100.0   100         82.1
    percentages                          34    94.1   100         85.3
    powers                               60    90.0   100         91.7
    surds                                46   100.0   100         84.8
    pi                                   20   100.0   100         90.0
    functions                            45    91.1   100         64.4
    degrees                              19    89.5   100         78.9
    units                               129    85.3   100         74.4
    currency                             43    72.1   100         41.9
    assignments                          83    80.7   100         79.5
    tuples                               34    88.2   100         76.5
    intervals                            32    84.4   100         65.6
    sets                                 66    83.3   100         81.8
    matrices                             28    82.1   100         82.1
    expressions                          61    83.6   100         88.5
    equations                            19   100.0   100         89.5
    inequalities                         29    96.6   100         79.3
    choices                              51    70.6   100         70.6
    words                                64    89.1   100         56.2
    varied                              272    96.0   100         77.2
    extraction                          532    88.7   100         69.5
    hedging                             115    44.3   100         60.0
    decimal point                        21    81.0   100         95.2
    letters as units                     55    58.2   100         69.1
    labels on both sides                 56    57.1   100         85.7
    relations between constants          29    48.3   100         44.8
    commas between brackets              30    46.7   100         86.7
    functions are no products            57    63.2   100         80.7
    order and names                      65    73.8   100         69.2
    small numbers                        26    80.8   100         88.5
    number words and signs              146    63.7   100         51.4
    later remarks                       216    25.0   100         59.3
    two letters                          24    54.2   100         91.7
    box before the verb                  10    20.0   100         90.0
    prose after the box                  20    60.0   100         65.0
    chains                               40    65.0   100         82.5
    roman letters                        24    66.7   100         62.5
    numbers after powers                 34    44.1   100         94.1
    set differences                      28    64.3   100         85.7
    adverbs and separators               43    46.5   100         69.8
    and, or                              30    50.0   100         63.3
    rounding                             15    46.7   100         53.3
    near irrational numbers              22    90.9   100         68.2
    the name on the right                15    80.0   100         80.0
    operators by name                    22    40.9   100         77.3
    no solution                          14    57.1   100         64.3
    infinity                             12    58.3   100         75.0
    labels that are formulas             83    45.8   100         43.4
    factorials and floors of letters     29    55.2   100         75.9
    TeX noise                            60    31.7   100         35.0
    powers of minus one                  27    77.8   100         81.5
    conditions in brackets                9    77.8   100         66.7
    matrices and vectors by letters      24    50.0   100         54.2
    names with more than a letter        15    46.7   100         46.7
    signs outside TeX                    29    20.7   100         20.7
    periods                              12    25.0   100         50.0
    roots and logarithms of letters      25    76.0   100         64.0
    all                                3271    72.1   100         70.0

The 100% are no surprise: the file was mended until it had them. Six answers that were right (\\mp,
\\choose and the like) and one near miss (sixteen right digits times pi) have been given up: see
"Not claimed" in verifier.py.
On 334 other cases of these kinds and ordinary ones, written by the same hand before the mending:
333 when it was finished, 334 since (before 237, 71.0%), no near miss accepted (before 58).
Then five who had not seen it before tried to break it, one after the other, on 2026-11-27, each
before the mending that their cases led to; cases on whose verdict graders differ are left out. The
first had read the rules and aimed at them: 1,241 cases, 90.0% right, 45 wrongly accepted (after all
mending 97.0% and 17). The second wrote 900 cases blind: 97.4% of those in the style of data sets,
90.7% of the aimed ones, 14 wrongly accepted; the third 616, without those that "Not claimed" names:
99.7 and 94.1%, 5 wrongly accepted (after all mending 1 and 0). The fourth wrote 961: 99.8 and
97.6%, 6 wrongly accepted (after all mending 99.8 and 98.5%, 1); then, with the code at hand, boxes
that were right for two golds (a = 5 because b = 6), a sin x for sin x, texts that took nine
seconds: these are mended. The fifth wrote 1,249 blind, 388 of them hedges: 99.5 and 99.0%, 7
wrongly accepted, none of them for two golds (after the mending 100 and 99.8%, 2), then a grid of
3,952: 99.0%, 34 wrongly accepted (after the mending 99.7% and 11). A sixth, on 2026-11-28, wrote
1,571 pairs of answers, many aimed at the code, with letters for numbers, matrices and signs outside
TeX: 87.4%, 24 wrongly accepted, most of them powers of -1 (after the mending 95.2% and 5), and
434 responses: 94.9%, 9 wrongly accepted (95.6% and 6).
A seventh wrote 1,240 blind, after that mending, 756 of them near misses: 97.2%, one wrongly
accepted (204% for 204, which the rules allow; after the next mending 97.7%), then with the code at
hand some 40 pairs that are wrongly taken for equal. The ordinary ones are mended; not mended are
floors as [n/2], matrices in brackets, and powers of -1 that agree by chance.
Of code 149 of 149; a later set, blind as well, 284 of 285 (a program that prints an int of more
than 4,300 digits is right here), and none of 150 hostile programs passed. Their kinds are among
the cases above, with other numbers.
Of the file's near misses math-verify accepts 402.
Speed: 28 times math-verify's, in CPU time on the same cases. On GSM8K all 8,792 gold answers equal
themselves and only those neighbours that have the same number; before the file was made smaller
math-verify gave 2,634 of the 2,638 verdicts on the test set (in the other four it rejects a right
answer).
Fuzzing (`--fuzz 60`): 18,625 inputs, no exception, the slowest 44 ms of CPU time; of the hostile
texts of the tests: hashes 25 ms, dollars and blanks 25, dollars 24, phrases with sums 16.
"""

import argparse
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import verifier

CASES = [
    json.loads(line)
    for line in (Path(__file__).parent / "verifier_cases.jsonl")
    .read_text(encoding="utf-8")
    .splitlines()
]


def public_grader():
    """math-verify as its README uses it: the gold answer in dollars, or in its own delimiters."""
    from math_verify import parse, verify

    def grade(response: str, gold: str) -> bool:
        gold = gold.rsplit("####", 1)[-1].strip() if "####" in gold else gold
        gold = gold if "$" in gold or "\\boxed" in gold else f"${gold}$"
        try:
            return verify(parse(gold), parse(response))
        except Exception:
            return False

    return grade


def compare_cases(grade) -> None:
    total, ours, theirs = Counter(), Counter(), Counter()
    accepted = {"here": 0, "math-verify": 0}
    seconds = {"here": 0.0, "math-verify": 0.0}
    disagreements = []
    for case in CASES:
        response, gold, correct, category = (
            case["response"],
            case["gold"],
            case["correct"],
            case["category"],
        )
        start = time.process_time()
        a = verifier.verify(response, gold)
        middle = time.process_time()
        b = grade(response, gold)
        seconds["here"] += middle - start
        seconds["math-verify"] += time.process_time() - middle
        total[category] += 1
        ours[category] += a == correct
        theirs[category] += b == correct
        accepted["here"] += a and not correct
        accepted["math-verify"] += b and not correct
        if a != b:
            truth = "right" if correct else "wrong"
            verdicts = f"{truth} here {a!s:5} math-verify {b!s:5}"
            disagreements.append(f"{category:13} {verdicts} {gold!r} | {response[-90:]!r}")
    print("category                  cases   here  math-verify")
    for category, n in [*total.items(), ("all", len(CASES))]:
        right = (
            [ours.total(), theirs.total()]
            if category == "all"
            else [ours[category], theirs[category]]
        )
        print(f"{category:25} {n:5}  {right[0] / n:5.1%}  {right[1] / n:5.1%}")
    print("near misses accepted:", *accepted.items())
    rates = {name: len(CASES) / s for name, s in seconds.items()}
    ratio = rates["here"] / rates["math-verify"]
    print(f"cases per second: {rates}, ratio {ratio:.1f}")
    print(f"{len(disagreements)} disagreements:", *disagreements, sep="\n  ")


def compare_gsm8k(grade, paths: list[str]) -> None:
    answers = [
        json.loads(line)["answer"]
        for path in paths
        for line in Path(path).read_text(encoding="utf-8").splitlines()
    ]
    count, agree, differences = 0, 0, []
    for answer, following in zip(answers, answers[1:] + answers[:1]):
        final = answer.rsplit("####", 1)[1].strip()
        for response in (answer, following):
            a, b = verifier.verify(response, answer), grade(response, answer)
            count, agree = count + 1, agree + (a == b)
            if a != b:
                differences.append(
                    f"here {a!s:5} math-verify {b!s:5} gold {final!r} | {response[-70:]!r}"
                )
    self_right = sum(verifier.verify(answer, answer) for answer in answers)
    print(f"GSM8K: {self_right} of {len(answers)} gold answers equal themselves;")
    print(f"{agree} of {count} verdicts agree with math-verify's")
    print(*differences, sep="\n  ")


def fuzz(seconds: float, seed: int) -> None:
    """No exception below verify(), and the slowest input: noise, mutated LaTeX, nesting, towers."""
    rng = random.Random(seed)
    golds = [case["gold"] for case in CASES]
    texts = [case["response"] for case in CASES]
    commands = r"""\frac \sqrt \boxed \text \left \right \begin{pmatrix} \end{pmatrix} \pm \cup \pi
        \infty \log_ \sin \setminus \approx \mathrm \\ #### answer~is~ 10^{10^{10}} f( ! { } ( ) [ ]
        | ^ _ & ° %""".split()
    commands = [command.replace("~", " ") for command in commands] + ["9" * 50]

    def mutated() -> str:
        text = list(rng.choice(texts))
        for _ in range(rng.randint(1, 12)):
            i = rng.randrange(len(text) + 1)
            new = rng.choice(
                ([rng.choice(commands)], list(rng.choice(golds)), [chr(rng.randrange(32, 0x250))])
            )
            text[i : i + rng.choice((0, 0, 1, 3))] = new
        return "".join(text)

    def nested() -> str:
        left = [
            r"\frac{1}{",
            r"\sqrt{",
            r"\{",
            "2^{",
            r"\boxed{",
            r"\text{",
            r"\sin ",
            "x/",
            "1,",
            "a_{",
            r"\left(",
            *"({[|-",
        ]
        left = rng.choice(left)
        right = (
            {"{": "}", "(": ")", "[": "]", "|": "|"}.get(left[-1], "")
            if left != r"\{"
            else left[0] + "}"
        )
        n = rng.choice((3, 10, 30, 100, 1000, 10_000))
        text = (
            left * n + rng.choice(golds) + right * (n if rng.random() < 0.7 else rng.randrange(n))
        )
        return text if rng.random() < 0.3 else rf"\boxed{{{text}}}"

    def noise() -> str:
        return rng.randbytes(rng.choice((5, 50, 500))).decode(
            rng.choice(("latin-1", "utf-16", "utf-8")), "replace"
        )

    def soup() -> str:
        text = "".join(
            rng.choices(
                commands + list("0123456789xyab+-*/,.;=<> $"), k=rng.choice((5, 20, 100, 400))
            )
        )
        return text if rng.random() < 0.3 else rf"\boxed{{{text}}}"

    def repeated() -> str:
        piece = "".join(rng.choices(commands + list("0123456789x ,.$*#\n\t:"), k=rng.randint(1, 4)))
        return (
            rng.choice(("", r"\boxed{", "The answer is ", "#### "))
            + piece * (100_000 // len(piece))
        )[:100_000]

    def checked(text: str, gold: str) -> None:
        for x in (text, gold):
            answer = verifier.extract_answer(x)
            if answer is not None:
                verifier.is_equivalent(answer, gold)
        verifier.is_equivalent(text, gold)

    runs, slowest, failures, end = 0, (0.0, ""), Counter(), time.monotonic() + seconds
    while time.monotonic() < end:
        text = rng.choice((mutated, nested, noise, soup, repeated))()
        gold = rng.choice((rng.choice(golds), text[-500:]))
        start = time.thread_time()
        verifier.verify(text, gold)
        elapsed = time.thread_time() - start
        if elapsed > slowest[0]:
            slowest = (
                (min(elapsed, *(timed(text, gold) for _ in range(2))), text)
                if elapsed > 0.01
                else (elapsed, text)
            )
        try:
            checked(text, gold)
        except Exception as error:
            failures[f"{type(error).__name__}: {error}"[:80]] += 1
            if failures.total() < 6:
                print(f"{error!r} from {text[:300]!r} and {gold[:100]!r}")
        runs += 1
    print(f"{runs} inputs, {failures.total()} exceptions {dict(failures)}")
    print(f"slowest {slowest[0] * 1000:.0f} ms: {len(slowest[1])} characters, {slowest[1][:120]!r}")
    hostile_times()


def hostile_times() -> None:
    """The slowest of the hostile texts of the tests, in CPU time, the best of three runs."""
    from test_verifier import HOSTILE  # which needs pytest

    times = {}
    for name, text in HOSTILE.items():
        golds = (r"\frac{1}{2}", "1, 2, 3", text.replace("1", "2"))
        times[name] = max(min(timed(text, gold) for _ in range(3)) for gold in golds)
    slowest = sorted(times.items(), key=lambda item: -item[1])[:5]
    print("hostile texts:", ", ".join(f"{name} {1000 * t:.0f} ms" for name, t in slowest))


def timed(text: str, gold: str) -> float:
    start = time.thread_time()
    verifier.verify(text, gold)
    return time.thread_time() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("gsm8k", nargs="*", help="GSM8K files, a JSON object with `answer` a line")
    parser.add_argument(
        "--fuzz",
        type=float,
        default=0,
        metavar="SECONDS",
        help="fuzz for so long, and do nothing else",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the fuzzer")
    args = parser.parse_args()
    if args.fuzz:
        fuzz(args.fuzz, args.seed)
    else:
        grader = public_grader()
        compare_cases(grader)
        if args.gsm8k:
            compare_gsm8k(grader, args.gsm8k)
