"""srt.py and sdzero.py through their command lines: a whole run, kill -9 and --resume, bad input. The model is tiny and random."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import make_tokenizer, odd, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import sdzero
import srt

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--verifier", "tiny:odd", "--eval-problems", "4", "--eval-samples", "2", "--eval-every", "5", "--save-every", "2", "--max-new-tokens", "8",
         "--slots", "4", "--lr", "1e-3", "--dtype", "float32", "--device", "cpu"]  # fmt: skip
STAGE_1 = ["--batch-size", "4", "--epochs", "2", "--problems", "24"]
STAGE_2 = [
    "--batch-size",
    "2",
    "--teacher",
    "ema",
    "--teacher-rate",
    "0.3",
    "--teacher-interval",
    "3",
    "--warmup",
    "4",
]


def save_model(folder, *, family="gpt2", eos=True, template=True, **settings):
    """gpt2 has dropout, so that a run's random state matters; its output layer is three ids wider than the tokenizer."""
    tokenizer = make_tokenizer(eos=eos, template=template)
    model = tiny(
        family,
        vocab_size=len(tokenizer) + 3,
        dtype=torch.float32,
        **{"eos_token_id": 0, "n_positions": 256, "max_position_embeddings": 256, **settings},
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = [{"problem": f"{i} + {i + 1} = ?", "answer": str(2 * i + 1)} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows + rows[:5]))
    return path


def call(script, *flags):
    script.main([str(f) for f in flags])


@pytest.fixture(scope="module")
def runs(base, data, tmp_path_factory):
    """Both stages, uninterrupted."""
    out = tmp_path_factory.mktemp("runs")
    call(srt, "--model", base, "--dataset", data, *FLAGS, *STAGE_1, "--output", out / "srt")
    call(
        sdzero,
        "--model",
        out / "srt",
        "--dataset",
        data,
        *FLAGS,
        *STAGE_2,
        "--output",
        out / "sdzero",
    )
    return out


def lines_of(path):
    lines = [json.loads(line) for line in open(path)]
    return [
        {k: v for k, v in line.items() if k not in ("seconds", "tokens_per_s")} for line in lines
    ]


def test_the_output_is_a_transformers_folder(runs, base):
    for name in ("srt", "sdzero"):
        model, tokenizer = (
            AutoModelForCausalLM.from_pretrained(runs / name),
            AutoTokenizer.from_pretrained(runs / name),
        )
        assert tokenizer.chat_template and model.generation_config.eos_token_id == 0
        before = AutoModelForCausalLM.from_pretrained(base).state_dict()
        assert any(not torch.equal(p, before[n]) for n, p in model.state_dict().items())
        settings = json.loads((runs / name / "settings.json").read_text())
        assert settings["flags"]["lr"] == 1e-3 and settings["vocab_size"] == len(tokenizer)
        assert not list((runs / name).glob("checkpoint-*")) and not list(
            (runs / name).glob("*.tmp")
        )


def test_the_stages_share_no_problem_and_count_duplicates(runs):
    stage_1, stage_2 = (
        json.loads((runs / name / "settings.json").read_text())["counts"]
        for name in ("srt", "sdzero")
    )
    assert stage_1 == {
        "rows": 65,
        "incomplete": 0,
        "duplicates": 5,
        "too_long": 0,
        "held_out": 4,
        "training": 24,
    }
    assert stage_2["training"] == 60 - 4 - 24
    used = json.loads((runs / "srt" / "srt.json").read_text())["problems"]
    assert len(set(used)) == 24


def test_traces_are_what_was_sampled(runs):
    """Ids, never re-tokenised: no EOS in front of P_r, the revision's own EOS kept, the texts decoded from the ids, the verdicts right."""
    tokenizer, traces = (
        AutoTokenizer.from_pretrained(runs / "srt"),
        lines_of(runs / "srt" / "traces.jsonl"),
    )
    assert (
        len(traces) > 10
        and {t["reward"] for t in traces} == {0, 1}
        and len({json.dumps(t) for t in traces}) == len(traces)
    )
    for t in traces:
        assert tokenizer.decode(t["prompt_ids"]) == f"<|user|>{t['problem']}<|im_end|><|assistant|>"
        assert (
            0 not in t["init_ids"]
            and t["finished"] == (t["revision_ids"][-1] == 0)
            and len(t["revision_ids"]) <= 8
        )
        assert (
            tokenizer.decode(t["phrase_ids"]) == f"\n\n{t['phrase']}\n\n"
            and t["phrase"] == srt.PHRASES[t["reward"]]
        )
        assert tokenizer.decode(t["revision_ids"], skip_special_tokens=True) == t["revision_text"]
        assert odd(t["init_text"], None) == t["reward"] and odd(t["revision_text"], None)


def test_metrics(runs):
    for name, steps in (("srt", None), ("sdzero", 16)):
        lines = lines_of(runs / name / "metrics.jsonl")
        train, evals = (
            [x for x in lines if x["kind"] == "train"],
            [x for x in lines if x["kind"] == "eval"],
        )
        assert [x["step"] for x in train] == list(range(1, len(train) + 1)) and steps in (
            None,
            len(train),
        )
        assert [x["step"] for x in evals] == sorted({0, *range(5, len(train), 5), len(train)})
        for e in evals:
            wrong, right = 1 - e["accuracy"], e["accuracy"]
            net = (e["wrong_to_right"] or 0) * wrong - (e["right_to_wrong"] or 0) * right
            assert e["revised_accuracy"] == pytest.approx(right + net) and e["pass_at_k"] >= right
            assert e["correction_rate"] == (pytest.approx(net / wrong) if wrong else None)
    assert {
        "loss",
        "kl",
        "kl_right",
        "kl_wrong",
        "reward",
        "length",
        "cut_off",
        "dropped",
    } <= train[0].keys()


def start(script, *flags):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, ROOT / script, *map(str, flags)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def kill_when(process, condition):
    deadline = time.time() + 60
    while not condition():
        assert process.poll() is None and time.time() < deadline, (
            "it ended before it could be killed"
        )
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    "script, name, stage", [("srt.py", "srt", STAGE_1), ("sdzero.py", "sdzero", STAGE_2)]
)
def test_a_killed_run_goes_on_bit_for_bit(script, name, stage, runs, base, data, tmp_path):
    """kill -9 while sampling the traces (stage 1) and after a checkpoint; model and metrics equal those of the run that nobody touched."""
    out = tmp_path / "out"
    flags = [
        "--model",
        base if name == "srt" else runs / "srt",
        "--dataset",
        data,
        *FLAGS,
        *stage,
        "--output",
        out,
    ]
    first = start(script, *flags)
    if name == "srt":
        kill_when(first, (out / "collected.json").exists)
        first = start(script, *flags, "--resume")
    kill_when(first, lambda: any(out.glob("checkpoint-[46]")))
    assert not (out / "config.json").exists()
    last = start(script, *flags, "--resume")
    assert last.communicate()[1] == "" and last.returncode == 0
    for file in ("metrics.jsonl", "traces.jsonl") if name == "srt" else ("metrics.jsonl",):
        assert lines_of(out / file) == lines_of(runs / name / file)
    assert (out / "model.safetensors").read_bytes() == (
        runs / name / "model.safetensors"
    ).read_bytes()


def test_collecting_and_training_one_by_one(runs, base, data, tmp_path):
    call(
        srt,
        "--model",
        base,
        "--dataset",
        data,
        *FLAGS,
        *STAGE_1,
        "--collect-only",
        "--output",
        tmp_path / "traces",
    )
    assert lines_of(tmp_path / "traces" / "traces.jsonl") == lines_of(runs / "srt" / "traces.jsonl")
    assert not (tmp_path / "traces" / "model.safetensors").exists()
    call(
        srt,
        "--model",
        base,
        "--dataset",
        data,
        *FLAGS,
        *STAGE_1,
        "--traces",
        tmp_path / "traces" / "traces.jsonl",
        "--output",
        tmp_path / "srt",
    )
    assert (tmp_path / "srt" / "model.safetensors").read_bytes() == (
        runs / "srt" / "model.safetensors"
    ).read_bytes()
    a, b = (
        json.loads((folder / "srt.json").read_text()) for folder in (tmp_path / "srt", runs / "srt")
    )
    assert a["prompt"] == b["prompt"] and sorted(a["problems"]) == sorted(b["problems"])


@pytest.mark.parametrize("flags", [
    ["--objective", "topk_logits", "--topk", "5", "--teacher", "live"], ["--objective", "sampled_token", "--passes", "2", "--importance-cap", "2"],
    ["--objective", "mixed_kl", "--skip-first", "1", "--drop-truncated", "--gradient-checkpointing", "--dtype", "bfloat16"],
])  # fmt: skip
def test_other_objectives_and_teachers_run(flags, runs, data, tmp_path):
    call(
        sdzero,
        "--model",
        runs / "srt",
        "--dataset",
        data,
        *FLAGS,
        "--batch-size",
        "8",
        *flags,
        "--output",
        tmp_path / "out",
    )
    train = [x for x in lines_of(tmp_path / "out" / "metrics.jsonl") if x["kind"] == "train"]
    assert len(train) == (8 if "--passes" in flags else 4) and all(
        abs(x["loss"]) < 100 for x in train
    )
    if "--passes" in flags:
        assert train[0]["reward"] == train[1]["reward"] and train[0]["loss"] != train[1]["loss"]


def test_sequential_terms(runs, base, data, tmp_path):
    traces = runs / "srt" / "traces.jsonl"
    call(srt, "--model", base, "--dataset", data, *FLAGS, "--terms", "sequential", "--epochs", "1", "--batch-size", "4", "--traces", traces,
         "--output", tmp_path / "out")  # fmt: skip
    train = [x for x in lines_of(tmp_path / "out" / "metrics.jsonl") if x["kind"] == "train"]
    wrong, everything = sum(not t["reward"] for t in lines_of(traces)), len(lines_of(traces))
    assert [x["reward"] == 0 for x in train[: -(-wrong // 4)]] == [True] * -(-wrong // 4)
    assert len(train) == -(-wrong // 4) + -(-everything // 4)


def test_eval_only_prints_and_writes_nothing(runs, data, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    for script in (srt, sdzero):
        call(script, "--model", runs / "sdzero", "--dataset", data, *FLAGS, "--eval-only")
        figures = json.loads(capsys.readouterr().out)
        assert figures["problems"] == 4 and 0 <= figures["accuracy"] <= 1
    assert list(tmp_path.iterdir()) == []


def test_prompts(base):
    """The template renders the user's side alone, its switches reach it, and a mapping is not taken for a list."""
    lm = srt.LM(None, AutoTokenizer.from_pretrained(base), {0}, 99, 256)
    args = srt.Parser("").parse_args([])
    args.prompt_template, args.system, args.prompt_suffix, args.template_kwargs = (
        "",
        "Be brief.",
        " Think.",
        {"mark": "#"},
    )
    rendered = lm.tokenizer.decode(srt.render(lm, "1+1", args))
    assert (
        rendered.replace("<|system|>", "").endswith("<|user|>1+1 Think.<|im_end|><|assistant|>#")
        and "Be brief." in rendered
    )
    args.prompt_template = "Q: {problem}\nA:"
    assert lm.tokenizer.decode(srt.render(lm, "1+1", args)) == "Q: 1+1 Think.\nA:"


@pytest.mark.parametrize("suffix", ["csv", "json", "parquet"])
def test_other_data_files_and_columns(suffix, base, tmp_path, capsys):
    import datasets

    table = datasets.Dataset.from_dict(
        {"question": [f"{i}?" for i in range(20)], "solution": list(range(20)), "other": ["x"] * 20}
    )
    getattr(table, f"to_{suffix}")(tmp_path / f"p.{suffix}")
    capsys.readouterr()
    call(srt, "--model", base, "--dataset", tmp_path / f"p.{suffix}", *FLAGS, "--eval-only")
    assert json.loads(capsys.readouterr().out)["problems"] == 4


def refuse_all(response, answer):
    return False


@pytest.fixture(scope="module")
def wrong(base, runs, data, tmp_path_factory):
    """Files and folders that the scripts must refuse, by the names in `BAD`."""
    made = tmp_path_factory.mktemp("made")
    (made / "empty.jsonl").write_text("")
    (made / "columns.jsonl").write_text('{"a": 1, "b": 2}\n')
    (made / "long.jsonl").write_text(json.dumps({"problem": "x" * 300, "answer": "1"}) + "\n")
    (made / "broken.jsonl").write_text('{"problem": \n')
    (made / "traces.jsonl").write_text('{"nothing": 1}\n')
    (made / "full").mkdir()
    (made / "full" / "file").write_text("mine")
    return dict(
        base=base,
        runs=runs,
        data=data,
        made=made,
        no_template=save_model(made / "no_template", template=False),
        no_eos=save_model(made / "no_eos", eos=False),
        bloom=save_model(made / "bloom", family="bloom", n_embed=32),
    )


HUB = "--model {base} --dataset {data}"  # enough for a run
GOOD = f"{HUB} {' '.join(FLAGS)}"
BAD = {  # name: (script, flags, what the line must say)
    "no model folder": (
        srt,
        "--model ./nowhere --dataset {data}",
        "no such model folder: ./nowhere",
    ),
    "no model in it": (srt, "--model {made} --dataset {data}", "cannot use the model"),
    "a family without a sampler": (srt, "--model {bloom} --dataset {data}", "bloom"),
    "no file": (srt, "--model {base} --dataset nowhere.jsonl", "no such data file: nowhere.jsonl"),
    "a broken file": (srt, f"{HUB} --dataset {{made}}/broken.jsonl", "cannot load the data set"),
    "no column": (
        srt,
        f"{HUB} --dataset {{made}}/columns.jsonl",
        "no column problem or question or prompt; it has a, b",
    ),
    "no such column": (srt, f"{GOOD} --answer-column gold", "gold; it has problem, answer"),
    "an empty data set": (srt, f"{HUB} --dataset {{made}}/empty.jsonl", "empty"),
    "no such split": (srt, f"{GOOD} --split test", "cannot load the data set"),
    "no chat template": (
        srt,
        "--model {no_template} --dataset {data}",
        "no chat template: give --prompt-template",
    ),
    "no EOS": (srt, "--model {no_eos} --dataset {data}", "no EOS token"),
    "prompts beyond the context": (
        srt,
        f"{HUB} --dataset {{made}}/long.jsonl --max-new-tokens 8",
        '"too_long": 1',
    ),
    "responses beyond the context": (srt, HUB, "--max-new-tokens 16384 must fit 256 tokens"),
    "a full folder": (srt, f"{GOOD} --output {{made}}/full", "already holds something"),
    "nothing to resume": (
        srt,
        f"{GOOD} --resume --output {{made}}/none",
        "holds no run to resume",
    ),
    "another flag with --resume": (
        sdzero,
        f"--model {{runs}}/srt --dataset {{data}} {' '.join(FLAGS + STAGE_2)} --seed 1 --resume"
        " --output {runs}/sdzero",
        "--seed was 0",
    ),
    "no revision that verified": (
        srt,
        f"{GOOD} --verifier test_scripts:refuse_all --problems 5 --output {{made}}/none",
        "not one of 15 revisions verified (0 of 5 first attempts did;",
    ),
    "nothing left to train on": (
        srt,
        f"{GOOD} --eval-problems 100 --output {{made}}/none",
        "60 are held out",
    ),
    "another phrase": (
        sdzero,
        "--model {runs}/srt --dataset {data} --phrase-wrong No.",
        "drop the flag, or add --force",
    ),
    "another verifier": (srt, f"{GOOD} --verifier nothing", "neither math nor code nor"),
    "not a traces file": (srt, f"{GOOD} --traces {{made}}/traces.jsonl", "not a traces file"),
    "collect and train": (
        srt,
        f"{GOOD} --collect-only --traces {{made}}/traces.jsonl",
        "contradict each other",
    ),
    "alpha of nothing": (
        sdzero,
        f"{GOOD} --objective sampled_token --alpha 1",
        "has neither --alpha nor --topk",
    ),
    "a frozen teacher's rate": (
        sdzero,
        f"{GOOD} --teacher-rate 0.5",
        "--teacher base has neither",
    ),
    "tail of the whole vocabulary": (sdzero, f"{GOOD} --no-tail", "--no-tail belongs to"),
    "a template without a problem": (srt, f"{GOOD} --prompt-template Q:", "no {problem} in it"),
    "an unknown flag": (srt, f"{GOOD} --teacher base", "unrecognized arguments"),
    "a missing flag": (srt, "--dataset {data}", "--model"),
    "a negative number": (srt, f"{GOOD} --slots 0", "--slots must be positive"),
}


def everything_under(*folders):
    return {
        p: p.stat().st_mtime_ns
        for folder in folders
        for p in folder.rglob("*")
        if p.is_file() and p.name != "none"
    }


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name, wrong, tmp_path, capfd, monkeypatch):
    """No traceback, and nothing that was there is touched."""
    script, flags, message = BAD[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *flags.format(**wrong).split()])
    there = wrong["made"] / "full", wrong["runs"], wrong["base"]
    before = everything_under(*there)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        srt.entry(script.main)
    errors = capfd.readouterr().err
    assert stop.value.code == 2
    assert re.fullmatch(rf"{script.__name__}\.py: [^\n]*\n", errors) and message in errors
    assert everything_under(*there) == before
    shutil.rmtree(
        wrong["made"] / "none", ignore_errors=True
    )  # a run without a trace has its folder


def test_a_forced_phrase_is_taken(runs, data, tmp_path):
    call(
        sdzero,
        "--model",
        runs / "srt",
        "--dataset",
        data,
        *FLAGS,
        "--phrase-wrong",
        "No.",
        "--force",
        "--problems",
        "2",
        "--output",
        tmp_path / "out",
    )
    assert (
        json.loads((tmp_path / "out" / "srt.json").read_text())["prompt"]["phrase_wrong"] == "No."
    )


def test_bad_input_and_ctrl_c_of_a_real_process(base, data, tmp_path):
    """The module as a process: no traceback, exit codes 2 and 130."""
    process = start("srt.py", "--model", "./nowhere", "--dataset", data)
    assert (
        process.communicate()[1] == "srt.py: no such model folder: ./nowhere\n"
        and process.returncode == 2
    )
    process = start(
        "srt.py",
        "--model",
        base,
        "--dataset",
        data,
        *FLAGS,
        *STAGE_1,
        "--epochs",
        "1000",
        "--output",
        tmp_path / "out",
    )
    while not any((tmp_path / "out").glob("checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert (
        re.fullmatch(r"srt.py: interrupted; .*--resume.*\n", process.communicate()[1])
        and process.returncode == 130
    )


def test_a_loss_that_is_not_finite_keeps_the_last_checkpoint(
    base, data, tmp_path, capfd, monkeypatch
):
    real, out = srt.srt_step, tmp_path / "out"

    def poisoned(model, *rest):
        if any(out.glob("checkpoint-2")):
            next(model.parameters()).data.fill_(float("nan"))
        return real(model, *rest)

    monkeypatch.setattr(srt, "srt_step", poisoned)
    monkeypatch.setattr(
        sys,
        "argv",
        list(
            map(
                str,
                ["srt.py", "--model", base, "--dataset", data, *FLAGS, *STAGE_1, "--output", out],
            )
        ),
    )
    with pytest.raises(SystemExit) as stop:
        srt.entry(srt.main)
    assert (
        stop.value.code == 1
        and "the loss is nan; the last checkpoint stands" in capfd.readouterr().err
    )
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-2"] and not (
        out / "config.json"
    ).exists()
