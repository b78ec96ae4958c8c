"""srt.py and sdzero.py through their command lines: whole runs, and every kind of bad input.

The model is tiny and random. What is killed and resumed is in test_resume.py, whether the pieces
are put together rightly in test_wiring.py.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from tiny import as_flags, call, make_tokenizer, odd, tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import sdzero
import srt

FLAGS = shlex.split(
    "--verifier tiny:odd --eval-problems 4 --eval-samples 2 --eval-every 5 --save-every 2 "
    "--max-new-tokens 8 --slots 4 --lr 1e-3 --dtype float32 --device cpu"
)
STAGE_1 = shlex.split("--batch-size 4 --epochs 2 --problems 24")
STAGE_2 = shlex.split(
    "--batch-size 2 --teacher ema --teacher-rate 0.3 --teacher-interval 3 --warmup 4"
)


def save_model(
    folder, *, family="gpt2", eos=True, template=True, adds="", tokenizer=None, **settings
):
    """gpt2 has dropout, so that a run's random state matters; its output layer is three ids wider
    than the tokenizer."""
    tokenizer = tokenizer or make_tokenizer(eos, template, adds)
    sizes = dict(eos_token_id=0, n_positions=256, max_position_embeddings=256)
    model = tiny(
        family, **{"dtype": torch.float32, "vocab_size": len(tokenizer) + 3, **sizes, **settings}
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_rows(path, rows):
    """rows: dicts, or (problem, answer) pairs, as a .jsonl file."""
    rows = [r if isinstance(r, dict) else {"problem": r[0], "answer": r[1]} for r in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def task_of(script, *flags, **named):
    """What a run would work on: model, problems, held-out problems, counts."""
    args = script.parse_arguments(as_flags(flags, named))
    return common.setup(args, half=script is srt)


def keys(problems):
    return {p.key for p in problems}


def read(path):
    return json.loads(path.read_text())


def lines_of(path):
    """Of a .jsonl file, without what no two runs have in common."""
    lines = [json.loads(line) for line in open(path)]
    clocks = ("seconds", "tokens_per_s")
    return [{k: v for k, v in line.items() if k not in clocks} for line in lines]


def log_of(folder, kind):
    return [line for line in lines_of(folder / "metrics.jsonl") if line["kind"] == kind]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "base")


ROWS = [(f"{i} + {i + 1} = ?", str(2 * i + 1)) for i in range(60)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_rows(tmp_path_factory.mktemp("data") / "problems.jsonl", ROWS + ROWS[:5])


@pytest.fixture(scope="module")
def runs(base, data, tmp_path_factory):
    """Both stages, uninterrupted."""
    out = tmp_path_factory.mktemp("runs")
    call(srt, *FLAGS, *STAGE_1, model=base, dataset=data, output=out / "srt")
    call(sdzero, *FLAGS, *STAGE_2, model=out / "srt", dataset=data, output=out / "sdzero")
    return out


# ------------------------------------------------------------------------------------- whole runs


def test_the_output_is_a_transformers_folder(runs, base):
    before = AutoModelForCausalLM.from_pretrained(base).state_dict()
    for name in ("srt", "sdzero"):
        model = AutoModelForCausalLM.from_pretrained(runs / name)
        tokenizer = AutoTokenizer.from_pretrained(runs / name)
        assert tokenizer.chat_template and model.generation_config.eos_token_id == 0
        assert any(not torch.equal(p, before[n]) for n, p in model.state_dict().items())
        settings = read(runs / name / "settings.json")
        assert settings["flags"]["lr"] == 1e-3 and settings["vocab_size"] == len(tokenizer)
        there = {path.name for path in (runs / name).iterdir()}
        ours = {"settings.json", "metrics.jsonl", "srt.json", "best", "traces.jsonl"}
        assert there - ours == {path.name for path in base.iterdir()}  # nothing is left behind


def test_the_stages_share_no_problem_and_count_duplicates(runs):
    stage_1, stage_2 = (read(runs / name / "settings.json")["counts"] for name in ("srt", "sdzero"))
    assert stage_1["rows"] == 65 and stage_1["duplicates"] == 5 and stage_1["training"] == 24
    assert stage_1["held_out"] == stage_2["held_out"] == 4
    assert stage_2["training"] == 60 - 4 - 24
    used = read(runs / "srt" / "srt.json")["problems"]
    assert len(set(used)) == 24


def test_traces_are_what_was_sampled(runs):
    """Ids, never tokenised again: no EOS before P_r, the revision's own EOS kept, the texts decoded
    from the ids, the verdicts right, no trace twice."""
    tokenizer = AutoTokenizer.from_pretrained(runs / "srt")
    traces = lines_of(runs / "srt" / "traces.jsonl")
    assert len(traces) > 10 and {t["reward"] for t in traces} == {0, 1}
    assert len({json.dumps(t) for t in traces}) == len(traces)
    answers = dict(ROWS)
    for t in traces:
        prompt = f"<|user|>{t['problem']}<|im_end|><|assistant|>"
        assert tokenizer.decode(t["prompt_ids"]) == prompt and t["answer"] == answers[t["problem"]]
        assert 0 not in t["init_ids"] and len(t["revision_ids"]) <= 8
        assert t["finished"] == (t["revision_ids"][-1] == 0)
        assert t["phrase"] == common.PHRASES[t["reward"]]
        assert tokenizer.decode(t["phrase_ids"]) == f"\n\n{t['phrase']}\n\n"
        text = tokenizer.decode(t["revision_ids"], skip_special_tokens=True)
        assert text == t["revision_text"]
        assert odd(t["init_text"], None) == t["reward"] and odd(t["revision_text"], None)


@pytest.mark.parametrize("name", ["srt", "sdzero"])
def test_metrics(runs, name):
    """A line for every step; the figures of an evaluation belong together."""
    train, evals = log_of(runs / name, "train"), log_of(runs / name, "eval")
    assert [x["step"] for x in train] == list(range(1, len(train) + 1))
    assert name == "srt" or len(train) == 16
    assert [x["step"] for x in evals] == sorted({0, *range(5, len(train), 5), len(train)})
    for e in evals:
        wrong, right = 1 - e["accuracy"], e["accuracy"]
        net = (e["wrong_to_right"] or 0) * wrong - (e["right_to_wrong"] or 0) * right
        assert e["revised_accuracy"] == pytest.approx(right + net) and e["pass_at_k"] >= right
        assert e["correction_rate"] == (pytest.approx(net / wrong) if wrong else None)
        assert e["problems"] == 4 and e["sample"]
    wanted = {"loss", "reward", "length", "cut_off", "grad_norm", "lr"}
    if name == "sdzero":
        wanted |= {"kl", "kl_right", "kl_wrong", "entropy", "dropped", "loss_tokens"}
    assert wanted <= train[0].keys()
    samples = [x["step"] for x in train if "sample" in x]
    assert samples == ([1, 11] if name == "sdzero" else [])


def test_best_is_the_best_evaluation_that_is_not_the_last(runs):
    """Of step 0 nothing is kept: that model is --model."""
    for name in ("srt", "sdzero"):
        evals = [e for e in log_of(runs / name, "eval") if e["step"]]
        best = max(e["accuracy"] for e in evals[:-1])
        kept = (runs / name / "best").exists()
        assert kept == (best >= evals[-1]["accuracy"])
        if kept:
            assert AutoModelForCausalLM.from_pretrained(runs / name / "best")
            assert read(runs / name / "best" / "srt.json") == read(runs / name / "srt.json")


def test_collecting_and_training_one_by_one(runs, base, data, tmp_path):
    """--collect-only, then --traces: the same model as in one go."""
    first, second = tmp_path / "traces", tmp_path / "srt"
    flags = dict(model=base, dataset=data)
    call(srt, *FLAGS, *STAGE_1, collect_only=True, output=first, **flags)
    assert lines_of(first / "traces.jsonl") == lines_of(runs / "srt" / "traces.jsonl")
    assert not (first / "model.safetensors").exists()
    call(srt, *FLAGS, *STAGE_1, traces=first / "traces.jsonl", output=second, **flags)
    for file in ("model.safetensors", "srt.json"):
        assert (second / file).read_bytes() == (runs / "srt" / file).read_bytes()


@pytest.mark.parametrize(
    "flags",
    [
        "--objective topk_logits --topk 5 --teacher live",
        "--objective sampled_token --passes 2 --importance-cap 2",
        "--objective mixed_kl --skip-first 1 --drop-truncated --gradient-checkpointing "
        "--dtype bfloat16 --stop-tokens 'p a e W' --force",
    ],
)
def test_other_objectives_and_teachers_run(flags, runs, data, tmp_path):
    out, flags = tmp_path / "out", shlex.split(flags)
    call(sdzero, *FLAGS, *flags, model=runs / "srt", dataset=data, batch_size=8, output=out)
    train = log_of(out, "train")
    assert len(train) == (8 if "--passes" in flags else 4)
    assert all(abs(x["loss"]) < 100 and x["loss_tokens"] > 0 for x in train)
    if "--passes" in flags:
        assert train[0]["reward"] == train[1]["reward"] and train[0]["loss"] != train[1]["loss"]
        assert "sample" in train[0] and "sample" not in train[1]
        lines = (out / "metrics.jsonl").read_text().splitlines()
        clocks = ["tokens_per_s" in line for line in lines if '"train"' in line]
        assert clocks == [True, False] * 4
        assert [e["step"] for e in log_of(out, "eval")] == [0, 6, 8]  # of --eval-every 5
    if "bfloat16" in flags:
        assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == torch.bfloat16


def test_sequential_terms(runs, base, data, tmp_path):
    """The authors' code: first traces of wrong attempts only, then all."""
    path, out = runs / "srt" / "traces.jsonl", tmp_path / "out"
    flags = dict(model=base, dataset=data, terms="sequential", epochs=1, batch_size=4)
    call(srt, *FLAGS, traces=path, output=out, **flags)
    train, traces = log_of(out, "train"), lines_of(path)
    first, second = -(-sum(not t["reward"] for t in traces) // 4), -(-len(traces) // 4)
    assert len(train) == first + second
    assert [x["reward"] for x in train[:first]] == [0] * first


def test_eval_only_prints_and_writes_nothing(runs, data, tmp_path, capsys, monkeypatch):
    """And renders no problem that is not evaluated: a data set may have 220,000."""
    monkeypatch.chdir(tmp_path)
    rendered, render = [], common.render
    monkeypatch.setattr(common, "render", lambda *args: rendered.append(args) or render(*args))
    for script in (srt, sdzero):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(script, *FLAGS, model=runs / "sdzero", dataset=data, eval_only=True)
        figures = json.loads(capsys.readouterr().out)
        assert stop.value.code == 0
        assert figures["problems"] == 4 and 0 <= figures["accuracy"] <= 1
    assert list(tmp_path.iterdir()) == [] and len(rendered) == 2 * 4


@pytest.mark.parametrize(
    "flags, short, training",
    [
        ("--dtype bfloat16", 8, "eager"),
        ("--dtype bfloat16", 7, "sdpa"),  # with longer responses eager attention is slower
        ("", 8, "sdpa"),
    ],
)
def test_attention_of_short_sequences_in_bf16_on_a_cpu(
    flags, short, training, base, data, tmp_path, monkeypatch
):
    """Trained with eager attention, which is faster there, and sampled without, also after it."""
    seen = []

    def watched(kind, function):
        def call_it(model, *args, **settings):
            seen.append((kind, model.config._attn_implementation))
            return function(model, *args, **settings)

        return call_it

    monkeypatch.setattr(common, "SHORT", short)
    monkeypatch.setattr(common, "generate", watched("sample", common.generate))
    monkeypatch.setattr(sdzero, "predicting_last", watched("train", sdzero.predicting_last))
    more = ["--problems", "4", *STAGE_2, *shlex.split(flags)]
    call(sdzero, "--model", base, "--dataset", data, *FLAGS, *more, "--output", tmp_path / "out")
    assert {a for kind, a in seen if kind == "sample"} == {"sdpa"}
    assert {a for kind, a in seen if kind == "train"} == {training}
    assert [kind for kind, _ in seen].count("sample") > 2


def test_a_forced_phrase_is_taken_and_saved(runs, data, tmp_path):
    flags = dict(phrase_wrong="No.", force=True, problems=2, output=tmp_path / "out")
    call(sdzero, *FLAGS, model=runs / "srt", dataset=data, **flags)
    assert read(tmp_path / "out" / "srt.json")["prompt"]["phrase_wrong"] == "No."


# -------------------------------------------------------------------------------------- bad input


def refuse_all(response, answer):
    return False


def test_without_a_trace_it_says_what_to_look_at(base, data, tmp_path, ended):
    flags = dict(model=base, dataset=data, problems=5, output=tmp_path / "out")
    code, _, err = ended(srt, *FLAGS, "--verifier", "test_scripts:refuse_all", **flags)
    assert code == 2 and "not one of 15 revisions verified" in err and "--verifier" in err


def refuse_answers(response, answer):
    return bool(1 / (not response))


@pytest.mark.parametrize(
    "verify, line",
    [
        ("test_scripts:refuse_answers", "raised ZeroDivisionError (test_scripts.py:"),
        ("broken_verifier:verify", "(broken_verifier.py, line 1)"),
    ],
)
def test_a_verifier_that_raises_is_one_line(verify, line, base, data, tmp_path, ended, monkeypatch):
    """At its import; or in the run, since it raised nothing for an empty response."""
    monkeypatch.chdir(tmp_path)
    Path("broken_verifier.py").write_text("def verify(response, answer) return True\n")
    flags = dict(model=base, dataset=data, problems=5, output="out")
    code, _, err = ended(srt, *FLAGS, "--verifier", verify, **flags)
    assert code == 2 and line in err and err.count("\n") == 1, err


def everything_under(folder):
    """What changes when somebody writes."""
    return {path: path.lstat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory, base, data, runs):
    """What bad input refers to; its names are the placeholders of BAD."""
    made = tmp_path_factory.mktemp("made")
    texts = {
        "empty": "",
        "columns": '{"a": 1, "b": 2}\n',
        "long": json.dumps({"problem": "x" * 300, "answer": "1"}) + "\n",
        "broken": '{"problem": "1", "answer": "1"}\n\n{"problem": \n',
        "incomplete": '{"problem": "1 + 1", "answer": null}\n{"problem": " ", "answer": "2"}\n',
        "nothing": '{"nothing": 1}\n',
        "chats": '{"prompt": [{"role": "user", "content": "1 + 1"}], "answer": "2"}\n',
    }
    places = {"base": base, "data": data, "stage1": runs / "srt", "stage2": runs / "sdzero"}
    for name, text in texts.items():
        places[name] = made / f"{name}.jsonl"
        places[name].write_text(text)
    save_rows(made / "seen.jsonl", ROWS[:50])
    trained = read(runs / "sdzero" / "srt.json")["trained"]
    save_rows(made / "trained.jsonl", [row for row in ROWS if common.key_of(row[0]) in trained])
    (made / "rows.tsv").write_text("problem\tanswer\n1\t2\n")
    (made / "rows.csv.gz").write_bytes(b"\x1f\x8b")
    (made / "utf16.jsonl").write_text(texts["long"], encoding="utf-16")
    (made / "header.csv").write_text("problem,answer\n")
    (made / "nothing.json").write_text("[]")
    latin = '{"problem": "1", "answer": "1"}\n{"problem": "größe", "answer": "2"}\n'
    (made / "latin.jsonl").write_text(latin, encoding="latin-1")
    (made / "full").mkdir()
    (made / "full" / "file").write_text("mine")
    save_model(made / "no_template", template=False)
    save_model(made / "no_eos", eos=False, eos_token_id=None)
    save_model(made / "bloom", family="bloom", n_embed=32)
    (made / "strict").mkdir()
    strict = make_tokenizer()
    strict.chat_template = "{{ raise_exception('no user here') }}"
    save_model(made / "strict", tokenizer=strict)
    strict.chat_template = {"rag": "{{ messages[0].content }}"}
    save_model(made / "no_default", tokenizer=strict)
    strict.chat_template = "<|user|>{% for m in messages if m.role == 'system' %}{% endfor %}"
    save_model(made / "deaf", tokenizer=strict)
    traces = (runs / "srt" / "traces.jsonl").read_text().splitlines()
    trace = json.loads(traces[0])
    (made / "good_traces.jsonl").write_text("\n".join(traces) + "\n")
    trace["revision_ids"] += [5] * 300
    (made / "long_traces.jsonl").write_text(json.dumps(trace) + "\n")
    phrase = json.loads(traces[0])["phrase_ids"]
    other = json.loads(traces[0]) | {"phrase_ids": [phrase[0], phrase[3], *phrase[2:]]}
    (made / "other_traces.jsonl").write_text(json.dumps(other) + "\n")
    (made / "odd_traces.jsonl").write_text(json.dumps({**trace, "prompt_ids": "1"}) + "\n")
    for name, file, text in (
        ("cut", "model.safetensors", "\x08"),
        ("odd", "config.json", json.dumps(read(base / "config.json") | {"hidden_size": "32"})),
        ("no_json", "srt.json", "{"),
        ("no_keys", "srt.json", '{"trained": null}'),
        ("no_suffix", "srt.json", '{"prompt": {"prompt_suffix": 3}}'),
        ("stop_ids", "srt.json", '{"prompt": {"stop_tokens": [3]}}'),
        ("eos_text", "generation_config.json", '{"eos_token_id": "x"}'),
        ("eos_list", "generation_config.json", '{"eos_token_id": [0, ["x"]]}'),
        ("more_layers", "config.json", json.dumps(read(base / "config.json") | {"n_layer": 5})),
    ):
        shutil.copytree(base, made / name)
        (made / name / file).write_text(text)
    return {"made": made, **places}


GOOD = "--model {base} --dataset {data} " + " ".join(FLAGS)
RESUME_2 = f"{GOOD} {' '.join(STAGE_2)} --output {{stage2}} --resume".replace("{base}", "{stage1}")
# script, flags, what the line must say
BAD = {
    "no model folder": ("srt", "--model ./nowhere --dataset {data}", "no such model folder"),
    "a typo beside a folder": (
        "srt",
        "--model {made}/strikt --dataset {data}",
        "no such model folder: {made}/strikt",
    ),
    "a folder without a model": ("srt", "--model {made} --dataset {data}", "cannot use the model"),
    "weights that were cut off": ("srt", "--model {made}/cut --dataset {data}", "cannot use the"),
    "a size that is text": ("srt", "--model {made}/odd --dataset {data}", "cannot use the model"),
    "a damaged srt.json": ("srt", "--model {made}/no_json --dataset {data}", "srt.json is damaged"),
    "problems that srt.json lacks": (
        "sdzero",
        "--model {made}/no_keys --dataset {data}",
        "srt.json is damaged: trained is None",
    ),
    "a suffix that is no text": (
        "srt",
        "--model {made}/no_suffix --dataset {data}",
        "srt.json is damaged: prompt_suffix is 3",
    ),
    "stop tokens that are ids": (
        "srt",
        "--model {made}/stop_ids --dataset {data}",
        "srt.json is damaged: stop_tokens is [3]",
    ),
    "an EOS that is text": (
        "srt",
        "--model {made}/eos_text --dataset {data}",
        "eos_token_id 'x' in {made}/eos_text's generation_config.json is no id",
    ),
    "one of two EOS that is none": (
        "srt",
        "--model {made}/eos_list --dataset {data}",
        "eos_token_id [0, ['x']] in",
    ),
    "layers without weights": (
        "srt",
        "--model {made}/more_layers --dataset {data}",
        "its files lack 24 of its weights, transformer.h.3",
    ),
    "a family that cannot be sampled": ("srt", "--model {made}/bloom --dataset {data}", "bloom"),
    "no chat template": (
        "srt",
        "--model {made}/no_template --dataset {data}",
        r"no chat template: give --prompt-template, in bash for example $'Question: {{problem}}\n",
    ),
    "a template that refuses": (
        "srt",
        "--model {made}/strict --dataset {data} --max-new-tokens 8",
        "the chat template does not take this prompt: no user here",
    ),
    "no default among chat templates": (
        "srt",
        GOOD.replace("{base}", "{made}/no_default"),
        "the chat template does not take this prompt: This model has multiple chat templates",
    ),
    "a template that ignores the problem": (
        "sdzero",
        GOOD.replace("{base}", "{made}/deaf"),
        "template and tokenizer of {made}/deaf make the same prompt of every problem",
    ),
    "no EOS": ("srt", "--model {made}/no_eos --dataset {data}", "no EOS token"),
    "no such stop token": ("srt", GOOD + " --stop-tokens '<|end|>'", "'<|end|>' of --stop-tokens"),
    "no such device": ("srt", GOOD + " --device nonsense", "on nonsense"),
    "no file": ("srt", "--model {base} --dataset nowhere.jsonl", "no such data file: nowhere.json"),
    "no data folder": ("srt", "--model {base} --dataset ./rows", "no such data set folder: ./rows"),
    "a broken line": (
        "srt",
        "--model {base} --dataset {broken}",
        "line 3: Expecting value",
    ),
    "another encoding": (
        "srt",
        "--model {base} --dataset {made}/utf16.jsonl",
        "line 1: 'utf-8' codec can't decode byte 0xff",
    ),
    "latin-1": (
        "srt",
        "--model {base} --dataset {made}/latin.jsonl",
        "line 2: 'utf-8' codec can't decode",
    ),
    "problems that are chats": (
        "srt",
        "--model {base} --dataset {chats}",
        "no problem, or no answer (problems are text, these are list)",
    ),
    "tests that are text": (
        "srt",
        GOOD + " --verifier code --answer-column problem",
        "tests are a list in JSON, not '",
    ),
    "no column": (
        "srt",
        "--model {base} --dataset {columns}",
        "no column problem or question or prompt; it has a, b: give --problem-column",
    ),
    "no such column": (
        "srt",
        GOOD + " --answer-column gold",
        "no column gold; it has problem, answer\n",
    ),
    "an empty data set": ("srt", "--model {base} --dataset {empty}", "is empty"),
    "a header without rows": ("srt", "--model {base} --dataset {made}/header.csv", "csv is empty"),
    "an empty array": ("srt", "--model {base} --dataset {made}/nothing.json", "json is empty"),
    "nothing complete": (
        "srt",
        "--model {base} --dataset {incomplete}",
        "all 2 rows of {incomplete} are incomplete",
    ),
    "no such split": ("srt", "--model {base} --dataset {made}@test", "cannot load the data set"),
    "tab-separated values": ("srt", "--model {base} --dataset {made}/rows.tsv", "known form"),
    "compressed rows": ("srt", "--model {base} --dataset {made}/rows.csv.gz", "known form"),
    "prompts beyond the context": (
        "srt",
        "--model {base} --dataset {long} --max-new-tokens 8 --eval-problems 0",
        '"too_long": 1',
    ),
    "responses beyond the context": (
        "srt",
        "--model {base} --dataset {data}",
        "--max-new-tokens 16384 must fit 256 tokens",
    ),
    "nothing left to train on": ("srt", GOOD + " --eval-problems 100", "60 are held out"),
    "nothing left to evaluate": (
        "srt",
        "--model {base} --dataset {long} --max-new-tokens 8 --eval-only",
        "no problem is left to evaluate",
    ),
    "all were trained on": (
        "sdzero",
        GOOD.replace("{base}", "{stage2}") + " --eval-only --eval-dataset {made}/trained.jsonl",
        "no problem is left to evaluate",
    ),
    "a folder that holds something": ("srt", GOOD + " --output {made}/full", "already holds some"),
    "a complete run": ("sdzero", RESUME_2.replace(" --resume", ""), "with --resume"),
    "a file as output": ("srt", GOOD + " --output {data}", "is a file: name another --output"),
    "output below a file": ("srt", GOOD + " --output {data}/out", "cannot write to"),
    "output in /proc": ("sdzero", GOOD + " --output /proc/nowhere/out", "cannot write to"),
    "nothing to resume": (
        "srt",
        GOOD + " --resume --output {made}/none",
        "holds no run to resume",
    ),
    "another seed with --resume": ("sdzero", RESUME_2 + " --seed 1", "--seed was 0"),
    "another objective with --resume": ("sdzero", RESUME_2 + " --alpha 0.5", "--alpha was 1.0"),
    "another model with --resume": (
        "sdzero",
        RESUME_2.replace("{stage1}", "{base}"),
        "--resume needs the model that the run began with",
    ),
    "other data with --resume": (
        "sdzero",
        RESUME_2.replace("{data}", "{made}/seen.jsonl"),
        "--resume needs the problems that the run began with",
    ),
    "another phrase": (
        "sdzero",
        "--model {stage1} --dataset {data} --phrase-wrong No.",
        "drop the flag, or add --force",
    ),
    "another verifier": ("srt", GOOD + " --verifier nothing", "neither math nor code nor"),
    "a verifier that is not there": ("srt", GOOD + " --verifier tiny:nothing", "nothing"),
    "not a traces file": ("srt", GOOD + " --traces {nothing}", "not a traces file"),
    "ids that are text": ("srt", GOOD + " --traces {made}/odd_traces.jsonl", "not a traces file"),
    "an empty traces file": ("srt", GOOD + " --traces {empty}", "holds no trace"),
    "no traces file": ("srt", GOOD + " --traces {made}/none", "cannot read"),
    "traces of another tokenizer": (
        "srt",
        GOOD + " --traces {made}/other_traces.jsonl",
        "was collected with another tokenizer",
    ),
    "traces of another prompt": (
        "srt",
        GOOD + " --traces {made}/good_traces.jsonl --prompt-template '#{{problem}}##'",  # as long
        "was collected with another prompt",
    ),
    "traces of another phrase": (
        "srt",
        GOOD + " --traces {made}/good_traces.jsonl --phrase-wrong No. --phrase-right Yes.",
        "was collected with the phrase",
    ),
    "traces beyond the context": (
        "srt",
        GOOD + " --traces {made}/long_traces.jsonl",
        "the context 256",
    ),
    "collect and train": (
        "srt",
        GOOD + " --collect-only --traces {nothing}",
        "contradict each other",
    ),
    "alpha of nothing": (
        "sdzero",
        GOOD + " --objective sampled_token --alpha 1",
        "has neither --alpha nor --topk",
    ),
    "the rate of a frozen teacher": ("sdzero", GOOD + " --teacher-rate 0.5", "--teacher base has"),
    "tail of the whole vocabulary": ("sdzero", GOOD + " --no-tail", "--no-tail belongs to"),
    "one token without a tail": (
        "sdzero",
        GOOD + " --objective topk_logits --topk 1 --no-tail",
        "the loss is 0",
    ),
    "one token of mixed_kl": ("sdzero", GOOD + " --objective mixed_kl --topk 1", "the loss is 0"),
    "alpha above 1": (
        "sdzero",
        GOOD + " --alpha 1.5",
        "--alpha: must be at least 0 and at most 1, not",
    ),
    "a template without a problem": ("srt", GOOD + " --prompt-template Q:", "no {{problem}} in it"),
    "two kinds of template": (
        "srt",
        GOOD + " --prompt-template {{problem}} --template-kwargs '{{\"a\": 1}}'",
        "replaces the chat template",
    ),
    "keywords that are no object": ("srt", GOOD + " --template-kwargs '[1]'", "JSON object"),
    "an unknown flag": ("srt", GOOD + " --teacher base", "unrecognized arguments"),
    "a missing flag": ("srt", "--dataset {data}", "--model"),
    "no slots": ("srt", GOOD + " --slots 0", "--slots: must be at least 1"),
    "half a slot": ("srt", GOOD + " --slots 1.5", "--slots: invalid int value"),
    "a rate that is no number": ("srt", GOOD + " --lr nan", "--lr: must be above 0"),
    "an infinite rate": ("sdzero", GOOD + " --lr inf", "--lr: must be above 0"),
    "no rate": ("sdzero", GOOD + " --lr 0", "--lr: must be above 0"),
    "a temperature that is no number": ("srt", GOOD + " --temperature nan", "--temperature"),
    "a negative temperature": ("srt", GOOD + " --eval-temperature -1", "--eval-temperature"),
    "an empty nucleus": ("srt", GOOD + " --top-p 0", "--top-p"),
    "a nucleus above 1": ("srt", GOOD + " --top-p 1.1", "--top-p"),
    "a warm-up that is no number": ("srt", GOOD + " --warmup nan", "--warmup"),
    "a negative number of skipped tokens": ("sdzero", GOOD + " --skip-first -1", "--skip-first"),
    "a cap of 0": ("sdzero", GOOD + " --importance-cap 0", "--importance-cap"),
    "a teacher that jumps": ("sdzero", GOOD + " --teacher ema --teacher-rate 2", "--teacher-rate"),
    "evaluate and resume": ("sdzero", GOOD + " --eval-only --resume", "contradicts"),
    "evaluate nothing": ("sdzero", GOOD + " --eval-only --eval-problems 0", "contradicts"),
}
if not torch.cuda.is_available():
    BAD["no GPU"] = ("srt", GOOD + " --device cuda", "on cuda")


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name, world, tmp_path, ended, monkeypatch):
    """No traceback, and nothing written. Warnings may come before the line."""
    monkeypatch.chdir(tmp_path)
    script, flags, message = BAD[name]
    flags, message = shlex.split(flags.format(**world)), message.format(**world)
    folders = {path if path.is_dir() else path.parent for path in world.values()} | {tmp_path}
    before = [everything_under(folder) for folder in folders]
    code, out, err = ended({"srt": srt, "sdzero": sdzero}[script], *flags)
    assert code == 2 and message in err
    assert re.fullmatch(rf"(warning: [^\n]+\n)*{script}\.py: [^\n]+\n", err)
    assert [everything_under(folder) for folder in folders] == before
