"""Several processes (torchrun) against one, on the CPU with gloo: the same samples, metrics and
weights, whoever has how much to do; nobody waits for a process that has ended."""

import json
import multiprocessing
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_scripts import ROWS, lines_of, log_of, save_model, save_rows
from transformers import AutoModelForCausalLM

import common

ROOT = Path(__file__).resolve().parents[1]
COMMON = (
    "--eval-problems 3 --eval-samples 2 --eval-every 2 --save-every 1 --max-new-tokens 6 --lr 1e-2 "
    "--dtype float32 --device cpu --phrase-wrong No. --phrase-right Yes. --warmup 1 "
    "--micro-tokens 64 "
)
OWN = {
    "srt": "--verifier tiny:odd --problems 7 --batch-size 3 --epochs 1 ",
    "sdzero": "--verifier tiny:odd --problems 7 --batch-size 5 --teacher ema --teacher-rate 0.3 ",
    "baselines": "--verifier tiny:odd --method grpo --group 2 --problems 6 --batch-size 6 ",
}


def work(script, argv, env, folder, patch):
    """One process, as torchrun starts it: its exit code is the script's."""
    os.environ.update(env)
    os.chdir(folder)
    rank = env["RANK"]
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.argv = [f"{script}.py", *argv]
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests in the background ignore it
    torch.set_num_threads(1)
    module = __import__(script)
    if patch:
        common.HEAD_START = 1
        patch(module, int(rank))
    common.entry(module.main)


@pytest.fixture
def together(tmp_path):
    """together(n, script, flags) -> (exit codes, outputs, error outputs) of n processes.

    They are forked from a server that has imported everything: torchrun itself would take 10
    seconds each time; one test starts it."""
    context = multiprocessing.get_context("forkserver")
    modules = ["test_processes", "srt", "sdzero", "baselines", "datasets", "tiny"]
    context.set_forkserver_preload([*modules, "transformers.models.llama.modeling_llama"])
    sys.path[:0] = [p for p in (str(ROOT / "examples"),) if p not in sys.path]
    folder = tmp_path / "cwd"
    folder.mkdir()
    (folder / "tiny.py").symlink_to(ROOT / "tests" / "tiny.py")

    def run(n, script, flags, patch=None, kill=None, seconds=60):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        env = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(n))
        env.update(LOCAL_WORLD_SIZE=str(n), TORCHELASTIC_RUN_ID="test")
        processes = []
        for rank in range(n):
            for name in ("out", "err"):
                (folder / f"{name}{rank}").write_text("")
            ranks = {**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            argv = script, shlex.split(flags), ranks, folder, patch
            processes.append(context.Process(target=work, args=argv))
            processes[-1].start()
        if kill:
            kill(processes)
        deadline = time.time() + seconds
        for process in processes:
            process.join(max(0, deadline - time.time()))
        late = [process.pid for process in processes if process.exitcode is None]
        for pid in late:
            os.kill(pid, signal.SIGKILL)
        assert not late, "a process hangs"
        outputs = []
        for name in ("out", "err"):
            outputs.append([(folder / f"{name}{rank}").read_text() for rank in range(n)])
        return [process.exitcode for process in processes], *outputs

    return run


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    save_model(folder / "model", family="llama")  # no dropout, no bias of keys: gradients of 0
    save_rows(folder / "rows.jsonl", ROWS)
    return f"--model {folder / 'model'} --dataset {folder / 'rows.jsonl'} {COMMON}"


def weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return torch.cat([p.flatten() for p in model.parameters()])


def assert_same_run(a, b):
    """Whole numbers and texts exactly, sums of floating-point numbers but for their rounding."""
    one, two = lines_of(a / "metrics.jsonl"), lines_of(b / "metrics.jsonl")
    assert len(one) == len(two) and any(line["kind"] == "train" for line in one)
    for x, y in zip(one, two):
        assert x.keys() == y.keys()
        for name in x:
            if isinstance(x[name], float):
                assert y[name] == pytest.approx(x[name], rel=1e-3, abs=1e-5), name
            elif not isinstance(x[name], dict):
                assert x[name] == y[name], name
    torch.testing.assert_close(weights(a), weights(b), rtol=1e-3, atol=1e-4)
    if (a / "traces.jsonl").exists():
        assert (a / "traces.jsonl").read_text() == (b / "traces.jsonl").read_text()


@pytest.mark.parametrize("script", list(OWN))
def test_two_and_three_processes_equal_one(script, base, together, tmp_path):
    """Catches shares that are put together in another order, gradients that are not added up or
    are averaged, a divisor of one process, random numbers of a rank, and whoever else writes."""
    flags = base + OWN[script]
    for n in (1, 2, 3):
        codes, out, err = together(n, script, f"{flags} --output {tmp_path / str(n)}")
        assert codes == [0] * n, err
        assert "saved" in out[0] and not any(out[1:]) and not any(err[1:])
    assert_same_run(tmp_path / "1", tmp_path / "2")
    assert_same_run(tmp_path / "1", tmp_path / "3")
    moved = (weights(tmp_path / "1") - weights(shlex.split(base)[1])).abs().max()
    assert moved > 1e-3


def test_more_processes_than_responses(base, together, tmp_path):
    """One process has nothing to sample, to verify or to score, and no gradient of its own."""
    flags = base + OWN["sdzero"].replace("--batch-size 5", "--batch-size 2")
    for n in (1, 3):
        codes, _, err = together(n, "sdzero", f"{flags} --output {tmp_path / str(n)}")
        assert codes == [0] * n, err
    assert_same_run(tmp_path / "1", tmp_path / "3")


@pytest.mark.parametrize("script, before, after", [("srt", 2, 1), ("sdzero", 1, 2)])
def test_resume_with_another_number(script, before, after, base, together, tmp_path):
    flags = base + OWN[script]
    assert not any(together(1, script, f"{flags} --output {tmp_path / 'whole'}")[0])
    flags += f"--output {tmp_path / 'cut'}"
    codes, _, err = together(before, script, flags, patch=stop_after_two_steps)
    assert codes == [7] * before, err
    assert list((tmp_path / "cut").glob("checkpoint-*"))
    codes, _, err = together(after, script, flags + " --resume")
    assert codes == [0] * after, err
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def stop_after_two_steps(module, rank):
    end_step = module.Run.end_step

    def ended(self, step, *rest):
        end_step(self, step, *rest)
        if step >= 1:
            time.sleep(1)  # rank 0 saves
            os._exit(7)

    module.Run.end_step = ended


def not_finite_on_rank_1(module, rank):
    name = "srt_loss" if module.__name__ == "srt" else "distill"
    loss = getattr(module, name)

    def broken(*args):
        found = loss(*args)
        for values in found.values() if isinstance(found, dict) else found:
            if rank and values.is_floating_point():
                values.fill_(float("nan"))
        return found

    setattr(module, name, broken)


@pytest.mark.parametrize("script", ["srt", "sdzero"])
def test_a_loss_that_is_not_finite_on_one_process_stops_all(script, base, together, tmp_path):
    """With one message, and none has made the step."""
    flags = f"{base}{OWN[script]} --output {tmp_path / 'out'}"
    codes, _, err = together(2, script, flags, patch=not_finite_on_rank_1)
    assert codes == [1, 1] and "Traceback" not in err[0] + err[1]
    assert err[0].count("the loss is nan; --resume with a lower --lr") == 1
    assert not log_of(tmp_path / "out", "train")


def raises_on_rank_1(module, rank):
    def broken(*args):
        raise RuntimeError("a fault of rank 1")

    if rank:
        common.micro_batches = broken


def fails_on_rank_1(module, rank):
    if rank:
        common.micro_batches = lambda *args: common.fail("rank 1 cannot go on")


@pytest.mark.parametrize("patch", [raises_on_rank_1, fails_on_rank_1])
@pytest.mark.parametrize("script", ["srt", "sdzero"])
def test_nobody_waits_for_a_process_that_failed(script, patch, base, together, tmp_path):
    flags = f"{base}{OWN[script]} --output {tmp_path / 'out'}"
    codes, _, err = together(2, script, flags, patch=patch)
    assert codes[0] == 1 and codes[1] in (1, 2)
    assert err[0].count("another process of this run has ended") == 1 and "Trace" not in err[0]
    assert "a fault of rank 1" in err[1] or "rank 1 cannot go on" in err[1]


@pytest.mark.parametrize("victims", [[0], [1], [0, 1]])
def test_nobody_waits_for_a_process_that_was_killed(victims, base, together, tmp_path):
    """kill -9 in the middle of training: the other one ends within seconds, with one line. So do
    both after Ctrl-C, which torchrun hands on to all: rank 0 has the line."""
    sent = signal.SIGINT if len(victims) == 2 else signal.SIGKILL
    many = OWN["sdzero"].replace("--problems 7", "--problems 7 --epochs 500")
    started = []

    def kill(processes):
        log = tmp_path / "out" / "metrics.jsonl"
        while not log.exists() or log.read_text().count('"train"') < 2:
            time.sleep(0.05)
            assert all(p.exitcode is None for p in processes)
        for victim in victims:
            os.kill(processes[victim].pid, sent)
        started.append(time.time())

    codes, _, err = together(
        2, "sdzero", f"{base}{many} --output {tmp_path / 'out'}", kill=kill, seconds=100
    )
    assert time.time() - started[0] < 60, "it waited for a process that was gone"
    assert "Traceback" not in err[0] + err[1]
    if sent == signal.SIGINT:
        assert codes == [130, 130] and not err[1]
        assert err[0].count("interrupted; the same command with --resume") == 1
        return
    victim = victims[0]
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 1
    assert (
        err[1 - victim].count("another process of this run has ended, or cannot be reached (") == 1
    )
    assert "third_party" not in err[1 - victim]


def full_disk(module, rank):
    def opened(path, mode="r", **settings):
        if mode == "a":
            raise OSError(28, "No space left on device")
        return open(path, mode, **settings)

    common.open = opened


def test_a_full_disk_is_said_in_one_line(base, together, tmp_path):
    codes, _, err = together(
        2, "srt", f"{base}{OWN['srt']} --output {tmp_path / 'out'}", patch=full_disk
    )
    assert codes == [1, 1] and "Traceback" not in err[0] + err[1]
    assert "make room and --resume: [Errno 28] No space left" in err[0]


def test_variables_that_a_cluster_left_are_not_believed(monkeypatch):
    """It would wait for a second process, or as rank 1 write nothing."""
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert (common.rank(), common.world_size()) == (0, 1)


@pytest.mark.parametrize(
    "device, why", [("cuda", "needs a GPU of its own"), ("cuda:0", "one GPU each")]
)
def test_fewer_gpus_than_processes(device, why, monkeypatch, capsys):
    ranks = dict(WORLD_SIZE="99", LOCAL_WORLD_SIZE="99", RANK="0", LOCAL_RANK="0")
    for name, value in (ranks | {"TORCHELASTIC_RUN_ID": "test"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        common.join_processes(common.Namespace(device=device))
    assert ended.value.code == 2 and why in capsys.readouterr().err


def test_bad_flags_are_said_once(base, together, tmp_path):
    """Rank 0 says so at once; the other one would after 5 seconds, if torchrun let it."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    flags = f"{base}{OWN['srt']} --output {tmp_path / 'out'}"

    def end_the_other(processes):  # as torchrun does
        processes[0].join()
        processes[1].terminate()

    codes, _, err = together(2, "srt", flags, kill=end_the_other)
    assert codes == [2, -signal.SIGTERM]
    assert "already holds something" in err[0] and not err[1]


def test_torchrun_and_code(base, tmp_path):
    """The README's launch line, with the code verifier shared out."""
    save_rows(tmp_path / "rows.jsonl", [(text, json.dumps(["assert True"])) for text, _ in ROWS])
    flags = base.replace(shlex.split(base)[3], str(tmp_path / "rows.jsonl"))
    launch = "-m torch.distributed.run --standalone --nproc-per-node 2 srt.py"
    flags += "--verifier code --problems 4 --batch-size 3 --eval-only"
    process = subprocess.run(
        [sys.executable, *shlex.split(f"{launch} {flags}")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout)["problems"] == 3
