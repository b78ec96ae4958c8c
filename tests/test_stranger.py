"""What a stranger broke: each a line on stderr and exit code 2 before anything is sampled."""

import contextlib
import json
import math
import shutil
from argparse import Namespace
from types import SimpleNamespace

import pytest
from test_scripts import FLAGS, STAGE_1, STAGE_2, call, lines_of, save_model, save_rows, task_of
from tiny import make_tokenizer

import common
import sdzero
import srt


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    rows = [(f"{i} + {i + 1} = ?", str(2 * i + 1)) for i in range(40)]
    return save_rows(tmp_path_factory.mktemp("data") / "problems.jsonl", rows)


def pair(response, answer):
    return True, "why"


def signed(response, answer):
    return 1 if response else -1


def worded(response, answer):
    return "False"


def raising(response, answer):
    raise KeyError("no such unit")


number = 7


@pytest.mark.parametrize("name", ["pair", "signed", "worded", "raising", "number"])
def test_a_verifier_says_true_or_false(name, base, data, tmp_path, ended, monkeypatch):
    """A pair, -1 or the text "False" are all true to Python: reward 1 for every response."""
    monkeypatch.setattr(common, "generate", None)
    flags = [*FLAGS, "--verifier", f"test_stranger:{name}"]
    code, _, err = ended(srt, *flags, model=base, dataset=data, output=tmp_path / "out")
    assert code == 2 and f"--verifier test_stranger:{name}" in err.splitlines()[-1]


def test_golds_of_data_files_keep_their_digits(tmp_path):
    """pandas would make floats of whole numbers beside a blank, and of NA a missing answer."""
    path = tmp_path / "a.csv"
    path.write_text("problem,answer\na,9007199254740993\nb,\nc,NA\nd,None\n")
    args = srt.parse_arguments(["--model", "m", "--dataset", "d", "--eval-only"])
    problems, counts = common.load_problems(args, str(path))
    assert [*problems.values()] == [("a", "9007199254740993"), ("c", "NA"), ("d", "None")]
    assert counts["incomplete"] == 1


@pytest.mark.parametrize("answer", [10**30 + 0.5, math.inf])
def test_golds_that_have_lost_their_digits_are_refused(answer):
    with pytest.raises(ValueError, match="as text"):
        common.checked_answer(answer, "math")


@pytest.mark.parametrize("answer", [None, "", "  ", [], math.nan])
def test_answers_that_are_none(answer):
    assert common.is_empty(answer) and not common.is_empty("None") and not common.is_empty(0)


def test_a_csv_row_with_a_comma_too_many(tmp_path, capsys):
    path = tmp_path / "a.csv"
    path.write_text("problem,answer\nfine,1\nWhat is 1,000 plus 2,1002\n")
    with pytest.raises(SystemExit) as end:
        common.load_rows(str(path), "train")
    assert end.value.code == 2 and "line 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--template-kwargs", '{"truncation": true, "max_length": 3}'], "max_length, truncation"),
        (["--template-kwargs", '{"padding": "max_length"}'], "not padding"),
    ],
)
def test_template_switches_cannot_cut_prompts(flags, said, base, data, tmp_path, ended):
    code, _, err = ended(srt, *FLAGS, *flags, model=base, dataset=data, output=tmp_path / "out")
    assert code == 2 and said in err and not (tmp_path / "out").exists()


def test_a_switch_that_the_template_lacks(base, data, capsys):
    """A warning: it may come from the model's srt.json, or from an older run."""
    kwargs = '{"mark": "", "enable_thinkin": false}'
    task_of(srt, *FLAGS, "--template-kwargs", kwargs, model=base, dataset=data)
    assert f"of {base} ignores --template-kwargs 'enable_thinkin'" in capsys.readouterr().err


def test_an_eos_that_is_never_sampled(data, tmp_path, ended, monkeypatch):
    """The output layer is wider than the tokenizer, and its only EOS lies beyond."""
    monkeypatch.setattr(common, "generate", None)
    model = save_model(tmp_path / "model", eos=False, eos_token_id=101)
    code, _, err = ended(srt, *FLAGS, model=model, dataset=data, output=tmp_path / "out")
    assert code == 2 and "responses could not end" in err


def test_a_vocabulary_narrower_than_the_tokenizer(data, tmp_path, ended):
    model = save_model(tmp_path / "model", vocab_size=50)
    code, _, err = ended(srt, *FLAGS, model=model, dataset=data, output=tmp_path / "out")
    assert code == 2 and "has 50 embeddings for the" in err


def test_an_unfinished_run_is_no_model(base, data, tmp_path, ended):
    collected = tmp_path / "collected"
    call(srt, *FLAGS, *STAGE_1, collect_only=True, model=base, dataset=data, output=collected)
    code, _, err = ended(sdzero, *FLAGS, model=collected, dataset=data, output=tmp_path / "out")
    assert code == 2 and "unfinished run" in err
    code, _, err = ended(sdzero, *FLAGS, model=data, dataset=data, output=tmp_path / "out")
    assert code == 2 and "is no model folder" in err


@pytest.mark.parametrize(
    "change", [dict(reward=5), *(dict(revision_ids=ids) for ids in ([9999], [-1], [1.5], []))]
)
def test_damaged_traces(change, base, data, tmp_path, ended):
    out = tmp_path / "collected"
    call(srt, *FLAGS, *STAGE_1, collect_only=True, model=base, dataset=data, output=out)
    traces = lines_of(out / "traces.jsonl")
    traces[1].update(change)
    (out / "traces.jsonl").write_text("".join(json.dumps(trace) + "\n" for trace in traces))
    flags = dict(model=base, dataset=data, traces=out / "traces.jsonl", output=tmp_path / "out")
    code, _, err = ended(srt, *FLAGS, **flags)
    assert code == 2 and "out of range" in err


@pytest.fixture
def killed(base, data, tmp_path, monkeypatch):
    """A stage 2 that was stopped after its checkpoint of step 4; its flags."""
    end_step = common.Run.end_step

    def stop(self, step, *rest):
        end_step(self, step, *rest)
        if step == 4:
            raise KeyboardInterrupt

    flags = dict(model=base, dataset=data, output=tmp_path / "out")
    monkeypatch.setattr(common.Run, "end_step", stop)
    with pytest.raises(KeyboardInterrupt):
        call(sdzero, *FLAGS, *STAGE_2, **flags)
    monkeypatch.setattr(common.Run, "end_step", end_step)
    return flags


@pytest.mark.parametrize(
    "file", ["checkpoint-4/training_state.pt", "checkpoint-4/model.safetensors", "settings.json"]
)
def test_damaged_files_are_named(file, killed, ended):
    path = killed["output"] / file
    path.write_bytes(path.read_bytes()[:100])
    code, _, err = ended(sdzero, *FLAGS, *STAGE_2, resume=True, **killed)
    assert code == 2 and "damaged" in err.splitlines()[-1]


def test_ctrl_c_before_a_resumed_run_goes_on_says_how_to(killed, ended, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(common, "load_lm", interrupted)
    code, _, err = ended(sdzero, *FLAGS, *STAGE_2, resume=True, **killed)
    assert code == 130 and "interrupted; the same command with --resume goes on" in err


def test_a_folder_that_is_called_checkpoint_is_none(killed):
    (killed["output"] / "checkpoint-99").mkdir()
    call(sdzero, *FLAGS, *STAGE_2, resume=True, **killed)
    assert (killed["output"] / "config.json").exists()
    assert (killed["output"] / "checkpoint-99").exists()


def test_a_lost_log_does_not_pass_the_trained_model_off_as_the_first(killed):
    (killed["output"] / "metrics.jsonl").unlink()
    call(sdzero, *FLAGS, *STAGE_2, resume=True, **killed)
    assert min(x["step"] for x in lines_of(killed["output"] / "metrics.jsonl")) == 5


def test_a_full_disk_is_one_line_and_costs_nothing(killed, ended, monkeypatch):
    """Room is made afterwards, and the run ends."""

    def full(*args):
        raise RuntimeError("unexpected pos 253440 vs 253332")

    with monkeypatch.context() as patch:
        patch.setattr(common.torch, "save", full)
        code, _, err = ended(sdzero, *FLAGS, *STAGE_2, resume=True, **killed)
    assert code == 1 and "make room" in err.splitlines()[-1]
    shutil.rmtree(killed["output"] / "saving")
    call(sdzero, *FLAGS, *STAGE_2, resume=True, **killed)
    assert (killed["output"] / "config.json").exists()


def test_a_file_system_without_locks(base, data, tmp_path, monkeypatch, capsys):
    def flock(*args):
        raise OSError(38, "Function not implemented")

    without = SimpleNamespace(flock=flock, LOCK_EX=2, LOCK_NB=4)  # `datasets` keeps the real one
    monkeypatch.setattr(common, "fcntl", without)
    flags = dict(model=base, dataset=data, problems=4, output=tmp_path / "out")
    call(sdzero, *FLAGS, **flags)
    assert "cannot be locked" in capsys.readouterr().err


def test_responses_that_may_not_fit_twice_are_announced(data, tmp_path, capsys):
    sizes = dict(n_positions=75, max_position_embeddings=75)
    model = save_model(tmp_path / "model", **sizes)
    flags = dict(model=model, dataset=data, problems=4, eval_problems=0, max_new_tokens=30)
    phrases = ["--phrase-wrong", "No.", "--phrase-right", "Yes."]
    with contextlib.suppress(SystemExit):  # where all of them are too long
        call(sdzero, *FLAGS, *phrases, **flags, output=tmp_path / "out")
    assert "may not fit twice" in capsys.readouterr().err


def test_a_machine_that_cannot_run_code_says_so(base, data, tmp_path, ended, monkeypatch):
    """Where the sandbox itself fails, every program would get reward 0 without a word."""
    monkeypatch.setattr(common.verifier, "verify_code", lambda response, tests: False)
    flags = dict(model=base, dataset=data, output=tmp_path / "out", verifier="code")
    code, _, err = ended(srt, *FLAGS, **flags)
    assert code == 2 and "cannot run programs on this machine" in err.splitlines()[-1]


def checked(lengths, context, **saved):
    """What the stages' checks of lengths look at. P_0 has two tokens, P_1 one."""
    flags = dict(model="m", top_p=1, temperature=1, skip_first=0, max_new_tokens=8)
    lm = SimpleNamespace(context=context, phrases=lambda args: [[1, 2], [3]])
    problems = [common.Problem("", None, [5] * n) for n in lengths]
    saved = {"problems": ["k"], **saved}
    return SimpleNamespace(args=Namespace(**flags), lm=lm, problems=problems, saved=saved)


def test_one_long_problem_is_no_reason_to_refuse_the_others(capsys):
    """It is named by how little of a response fits twice: (20 - 11 - 2) / 2."""
    srt.check_lengths(checked([3, 19], context=20))
    sdzero.check(checked([3, 19], context=20))
    capsys.readouterr()
    sdzero.check(checked([3, 11], context=20))
    assert "more than 3 tokens may not fit twice" in capsys.readouterr().err


def test_a_fine_tuned_model_is_not_taken_for_stage_1(capsys):
    sdzero.check(checked([3], context=99, problems=[], trained=["k"]))
    assert "does not come from stage 1" in capsys.readouterr().err


def leaving(response, answer):
    raise SystemExit(0)


@pytest.mark.parametrize(
    "verify, line",
    [
        ("test_stranger:leaving", "raised SystemExit (test_stranger.py:"),
        ("leaves:verify", "to be imported: 0"),
        ("verifier:verify", "is verifier already: rename"),
        ("json:loads", "is json already: rename"),
        ("json:no_such", "is json already: rename"),
        ("time:sleep", "a module of Python's is time already: rename time"),
        ("wave:open", "is wave already: rename wave"),  # a package
    ],
)
def test_a_verifier_that_leaves_or_is_another_one(
    verify, line, base, data, tmp_path, ended, monkeypatch
):
    """sys.exit(0) ended a run without a model and without a word; the repository's verifier.py was
    taken for a copy of it that the user had changed."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "leaves.py").write_text("raise SystemExit(0)\n")
    (tmp_path / "wave").mkdir()
    for name in ("verifier", "json", "time", "wave/__init__"):
        (tmp_path / f"{name}.py").write_text("def verify(response, answer): return True\n")
    flags = dict(model=base, dataset=data, verifier=verify, output="out")
    code, _, err = ended(srt, *FLAGS, **flags)
    assert code == 2 and line in err and not (tmp_path / "out").exists(), err


def test_a_run_that_begins_while_another_one_loads(base, data, tmp_path, ended, monkeypatch):
    """It went on from that one's checkpoint with its own flags, and said that it was saved."""
    split, out = common.split_problems, tmp_path / "out"

    def slow(*arguments):
        (out / "checkpoint-4").mkdir(parents=True)
        (out / "checkpoint-4" / "training_state.pt").touch()
        return split(*arguments)

    monkeypatch.setattr(common, "split_problems", slow)
    monkeypatch.setattr(common, "generate", None)
    code, _, err = ended(srt, *FLAGS, model=base, dataset=data, output=out)
    assert code == 2 and "already holds something" in err
    assert not (out / "settings.json").exists()


def test_ids_with_gaps(tmp_path, data):
    """phi-4-mini's: ids from len(tokenizer) on, its EOS among them, would never be sampled."""
    tokenizer = make_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"]["~"] += 7  # the last one
    tokenizer._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(state))
    path = save_model(tmp_path / "base", tokenizer=tokenizer, vocab_size=120)
    task = task_of(srt, *FLAGS, model=path, dataset=data)
    assert task.lm.vocab_size == len(tokenizer) + 7
    assert task.lm.text([len(tokenizer) + 6]) == "~"


def test_a_problem_without_a_token(data, tmp_path, ended, monkeypatch):
    """With a tokenizer that drops what it does not know; sampling failed in mid-run."""
    monkeypatch.setattr(common, "render", lambda lm, text, args: [5] * (text != "1 + 2 = ?"))
    path = save_model(tmp_path / "base")
    code, _, err = ended(srt, *FLAGS, model=path, dataset=data, output=tmp_path / "out")
    assert code == 2 and "makes no token of '1 + 2 = ?'" in err


@pytest.mark.parametrize("reward", [1.0, "1", None])
def test_the_reward_of_a_trace_is_a_whole_number(reward, base, data, tmp_path, ended):
    """pandas writes 1.0 where a column had a gap: it was a traceback."""
    trace = srt.Trace("1?", "1", reward, "", "", "", True, [5], [6], [7], [8])
    (tmp_path / "traces.jsonl").write_text(json.dumps(vars(trace)) + "\n")
    flags = dict(model=base, dataset=data, traces=tmp_path / "traces.jsonl")
    code, _, err = ended(srt, *FLAGS, **flags, output=tmp_path / "out")
    assert code == 2 and "a reward or an id is out of range" in err


def test_traces_beside_held_out_problems_only(base, data, tmp_path):
    """The traces are what is trained on: no other problem has to be left."""
    flags = [*FLAGS, "--model", base, "--batch-size", "32", "--eval-samples", "1", "--epochs", "1"]
    call(srt, *flags, "--eval-problems", "2", "--dataset", data, "--collect-only",
         "--output", tmp_path / "collected")  # fmt: skip
    other = save_rows(tmp_path / "other.jsonl", [(f"{i} - 1 = ?", str(i - 1)) for i in range(3)])
    flags += ["--traces", tmp_path / "collected" / "traces.jsonl", "--dataset", other]
    call(srt, *flags, "--eval-problems", "3", "--output", tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
