"""Several processes train what one trains: the same losses, the same weights, the same answers."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.run
from accelerate.commands.launch import launch_command_parser
from calls import (
    error_line,
    first_questions,
    last_step,
    records,
    run_in_two,
    started,
    state_step,
    states,
    wait_for,
)
from conftest import ROOT, command_of, run
from safetensors.torch import load_file

from cli import ArgumentParser
from training import machine

# 2 micro-batches of 4 for each of 2 processes, 4 for one.
FLAGS = (
    "--num_train_epochs=1.3",
    "--max_seq_length_c=256",
    "--doc_stride=128",
    "--per_gpu_train_batch_size=4",
    "--total_train_batch_size=16",
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def in_several(command: list[str], count: int = 2) -> list[str]:
    """The command, launched in so many processes."""
    return [sys.executable, *TORCHRUN, f"--nproc_per_node={count}", *command[1:]]


def windows_of(output_dir: Path) -> int:
    return json.loads((output_dir / "metrics.json").read_text())["counts"]["train_windows"]


# Windows left over for the last step of an epoch: fewer than a micro-batch, so that one process
# has none; two micro-batches of unequal size.
LEFT_OVER = {"one process has none": (1, 4), "uneven": (5, 7)}


@pytest.fixture(scope="module", params=["one process has none", "uneven"])
def data(
    request: pytest.FixtureRequest,
    sample: Path,
    tiny_bert: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with data whose last step of an epoch is incomplete in the way of the name."""
    from transformers import AutoTokenizer

    from squad_utils import load_squad
    from tasks import qa

    folder = tmp_path_factory.mktemp("data")
    first_questions(sample / "dev-v1.1.json", folder / "dev-v1.1.json", 5)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    train = folder / "train-v1.1.json"
    low, high = LEFT_OVER[request.param]
    for count in range(44, 80):  # of five steps an epoch, at least
        first_questions(sample / "train-v1.1.json", train, count)
        windows = qa.make_windows(
            load_squad(str(train), ""), tokenizer, 24, 256, 128, for_training=True
        )
        if low <= len(windows) % 16 <= high:
            return folder
    raise AssertionError("no such number of questions")


@pytest.fixture(scope="module")
def alone(data: Path, tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run in one process."""
    out = tmp_path_factory.mktemp("alone") / "out"
    done = run(command_of("train_qa", tiny_bert, data, out, *FLAGS))
    assert done.returncode == 0, done.stderr
    return out


# A softmax does not change with a constant that is added to all its inputs, so the gradient of
# these is 0 (in FP64 under 1e-16; all others' is over 1e-7). In FP32 it is rounding, which Adam
# scales up to whole steps: these drift at random and change no answer.
NO_GRADIENT = (
    "qa_outputs.bias",
    "bert.encoder.layer.1.output.LayerNorm.bias",
    "bert.encoder.layer.0.attention.self.key.bias",
    "bert.encoder.layer.1.attention.self.key.bias",
)


def assert_close(output_dir: Path, alone: Path, count: int = 2) -> None:
    """The same training, but for the order in which numbers are summed."""
    mine, theirs = records(output_dir), records(alone)
    assert [(r["step"], "f1" in r) for r in mine] == [(r["step"], "f1" in r) for r in theirs]
    steps = [r["step"] for r in mine if "f1" not in r]
    assert steps == list(range(1, len(steps) + 1))
    for one, other in zip(mine, theirs, strict=True):
        assert one.keys() == other.keys()
        keys = {"loss", "answer", "learning_rate", "f1", "exact_match"}
        # Padding is that of micro-batches: the same ones, unless a small step is shared by three.
        keys |= {"padding"} if count == 2 else set()
        for key in one.keys() & keys:
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-9), (key, one["step"])
    weights, expected = (load_file(f / "model.safetensors") for f in (output_dir, alone))
    assert weights.keys() == expected.keys()
    for name in weights.keys() - set(NO_GRADIENT):
        difference = (weights[name] - expected[name]).abs().max()
        assert difference < 1e-5, (name, difference)
    predictions, truth = (
        json.loads((folder / "predictions.json").read_text()) for folder in (output_dir, alone)
    )
    assert predictions == truth
    figures, right = (
        json.loads((folder / "metrics.json").read_text()) for folder in (output_dir, alone)
    )
    assert (figures["f1"], figures["exact_match"]) == (right["f1"], right["exact_match"])
    assert (figures["processes"], right["processes"]) == (count, 1)


@pytest.mark.parametrize(
    ("data", "count"), [("one process has none", 2), ("uneven", 3)], indirect=["data"]
)
def test_several_processes_are_as_one(
    count: int, data: Path, alone: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    """Three do not divide a step of 16 windows: one of them takes more than the others."""
    out = tmp_path / "out"
    done = run(in_several(command_of("train_qa", tiny_bert, data, out, *FLAGS), count))
    assert done.returncode == 0, done.stderr
    assert f"on {count} x cpu" in done.stdout
    assert done.stdout.count("after epoch 1:") == 1
    assert_close(out, alone, count)
    assert not (out / "checkpoints").exists() and not (out / ".lock").exists()


@pytest.mark.parametrize("data", ["uneven"], indirect=True)
def test_torchrun_is_stopped_and_goes_on(
    data: Path, alone: Path, tiny_bert: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = in_several(command_of("train_qa", tiny_bert, data, out, *FLAGS))
    with started(command) as process:
        wait_for(process, lambda: last_step(out) >= 1)
        os.kill(process.pid, signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode != 0
    assert stderr.count("SIGTERM: saved at step") == 1
    assert len(states(out)) == 1
    saved = state_step(out)
    assert f"SIGTERM: saved at step {saved} of" in stderr

    done = run(command)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {saved} of" in done.stdout
    assert_close(out, alone)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[str]]]:
    """What would have taken the place of this process."""
    calls: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(os, "execv", lambda path, arguments: calls.append((path, arguments)))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(sys, "argv", ["train_qa.py", "--output_dir=a b", "--seed=3"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    return calls


def test_all_gpus_are_used(executed: list[tuple[str, list[str]]]) -> None:
    assert machine.process_count(no_cuda=False) == 3
    machine.use_all_gpus(no_cuda=False)
    [(path, command)] = executed
    assert path == command[0] == sys.executable
    assert command[1:3] == ["-P", machine.LAUNCH]
    launch = torch.distributed.run.parse_args(command[3:])
    assert launch.standalone and launch.nproc_per_node == "3"
    # A step and a save may take longer than the 30 s that torchrun leaves a signalled process.
    assert launch.shutdown_timeout >= 600
    assert [launch.training_script, *launch.training_script_args] == sys.argv


def test_nothing_is_launched_twice_nor_without_need(
    executed: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.use_all_gpus(no_cuda=True)
    assert machine.process_count(no_cuda=True) == 1
    for count in (0, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        machine.use_all_gpus(no_cuda=False)
        assert machine.process_count(no_cuda=False) == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setenv("WORLD_SIZE", "2")
    machine.use_all_gpus(no_cuda=False)
    assert machine.process_count(no_cuda=False) == 2
    assert executed == []


def test_accelerate_launches_one_process_if_told_so(
    executed: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.utils.launch import prepare_simple_launcher_cmd_env

    flags = ["--num_processes=1", "--num_machines=1", "--mixed_precision=no"]
    flags += ["--dynamo_backend=no", "--num_cpu_threads_per_process=1"]
    launch = launch_command_parser().parse_args([*flags, "train_qa.py"])
    launch.use_cpu = False
    _, environment = prepare_simple_launcher_cmd_env(launch)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert machine.process_count(no_cuda=False) == 1
    machine.use_all_gpus(no_cuda=False)
    assert executed == []


SCRIPTS = ("train_qa", "train_qcemb", "pack_and_distill")


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_reaches_the_script_under_every_start(
    script: str, executed: list[tuple[str, list[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher takes a flag that begins one of its own for an abbreviation of that."""
    parsers: list[ArgumentParser] = []

    def end(parser: ArgumentParser) -> None:
        parsers.append(parser)
        raise SystemExit

    monkeypatch.setattr(ArgumentParser, "parse_args", end)
    with pytest.raises(SystemExit):
        importlib.import_module(script).parse_arguments()
    (parser,) = parsers
    flags = [
        option if action.nargs == 0 else f"{option}=1"
        for action in parser._actions
        for option in action.option_strings
        if not isinstance(action, argparse._HelpAction)
    ]
    assert "--seed=1" in flags and "--no_cuda" in flags and len(flags) > 20
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    machine.use_all_gpus(no_cuda=False)
    torchrun = torch.distributed.run.parse_args
    for launch in (
        torchrun(executed[0][1][3:]),
        torchrun(["--nproc_per_node=2", *sys.argv]),
        launch_command_parser().parse_args(["--num_processes=2", *sys.argv]),
    ):
        assert [launch.training_script, *launch.training_script_args] == sys.argv


# ------------------------------------------------------------------------------------------------
# How a launched run ends

# The script's processes do not find their mistake at once: the main one is the last to do so.
MISTAKE = """
import os, sys, time
sys.path.insert(0, {root!r})
from cli import UserError, run_main

def main():
    if os.environ["RANK"] == "0":
        time.sleep(1.0)
    raise UserError("--seed: it is wrong")

run_main(main)
"""
KILLED = """
import os, signal, time
if os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(60)
"""
ALONE = """
import os, sys, time
sys.path.insert(0, {root!r})
import cli

def main():
    if os.environ["RANK"] == "0":
        time.sleep(60)
    raise cli.UserError("--seed: it is wrong")

cli.MAIN_PROCESS_SECONDS = 0.5
cli.run_main(main)
"""
STOPPED = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {root!r})
from cli import Interrupted, run_main

def main():
    signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
    Path(sys.argv[1] + os.environ["RANK"]).touch()
    while not asked:
        time.sleep(0.01)
    time.sleep(0.5)
    raise Interrupted("SIGTERM: saved", signal.SIGTERM)

asked = []
run_main(main)
"""


def launched(script: str, folder: Path) -> list[str]:
    """The command of a script's own start, for one of two processes."""
    path = folder / "script.py"
    path.write_text(script.format(root=str(ROOT)))
    return [sys.executable, machine.LAUNCH, "--standalone", "--nproc_per_node=2", "--", str(path)]


@pytest.mark.slow
@pytest.mark.parametrize("script", [MISTAKE, ALONE], ids=["of all", "of one"])
def test_a_mistake_is_one_line_and_code_2(script: str, tmp_path: Path) -> None:
    done = run(launched(script, tmp_path))
    assert (done.returncode, done.stderr) == (2, "error: --seed: it is wrong\n")


def test_a_signal_is_passed_on_and_its_code_comes_back(tmp_path: Path) -> None:
    ready = [tmp_path / f"ready{rank}" for rank in (0, 1)]
    with started([*launched(STOPPED, tmp_path), str(tmp_path / "ready")]) as process:
        wait_for(process, lambda: all(path.exists() for path in ready))
        os.kill(process.pid, signal.SIGTERM)
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (128 + signal.SIGTERM, "SIGTERM: saved\n")


def test_a_killed_process_is_named(tmp_path: Path) -> None:
    done = run(launched(KILLED, tmp_path))
    assert done.returncode == 128 + signal.SIGKILL
    assert "process 1 was killed by SIGKILL" in error_line(done.stderr)


def test_under_torchrun_our_line_comes_first(tmp_path: Path) -> None:
    command = launched(MISTAKE, tmp_path)
    done = run([sys.executable, *TORCHRUN, *command[3:]])
    assert done.returncode != 0
    assert done.stderr.startswith("error: --seed: it is wrong\n")
    assert done.stderr.count("it is wrong") == 1


# ------------------------------------------------------------------------------------------------
# Two processes, in the ways that differ from one


def on_devices(command: list[str]) -> list[str]:
    """The command as on a machine with devices for its processes."""
    return [word for word in command if word != "--no_cuda"]


@pytest.mark.slow
def test_each_script_trains_two_steps_in_two_processes(
    teacher: Path, base: Path, sample: Path, few: Path, tmp_path: Path
) -> None:
    """That of packed models before merging as well, which without a teacher leave maps unused."""
    packed = tmp_path / "packed"
    two = ("--stages=final", "--max_steps_per_stage=2")
    run_in_two(on_devices(command_of("pack_and_distill", teacher, few, packed, *two)))
    size = "--total_train_batch_size=16"
    emb = command_of("train_qcemb", base, sample, tmp_path / "emb", size, "--num_train_epochs=0.25")
    run_in_two(on_devices(emb))
    model = packed / "unmerged"
    qa = command_of("train_qa", model, few, tmp_path / "qa", size, "--num_train_epochs=0.4")
    run_in_two(on_devices(qa))
    for name in ("packed", "emb", "qa"):
        figures = json.loads((tmp_path / name / "metrics.json").read_text())
        steps = [r["step"] for r in records(tmp_path / name) if "loss" in r]
        assert (figures["processes"], steps) == (2, [1, 2]), name


DROPOUT = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
sys.path.insert(0, {root!r})
import numpy as np, torch
from cli import Interrupted
from training import loop, machine
from training.passes import Batches
from training.run import Run

class Ones(Batches):
    def steps(self, epoch):
        return [np.arange(2)] * 4

    def tokens(self, chosen):
        return chosen * 0 + 1

    def batch(self, epoch, chosen):
        return {{"x": torch.ones(len(chosen), 16), "attention_mask": torch.ones(len(chosen), 1)}}

out, stops = Path(sys.argv[1]), sys.argv[2] == "stops"
model = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(16, 1))
flags = SimpleNamespace(output_dir=str(out), save_minutes=60.0, log_steps=1, report_to="none",
    overwrite_output_dir=False)
run = Run(machine.make_accelerator("fp32", True, 7), flags, {{}}, "unfinished")
drawn = []

def loss(model, batch):
    dropped = model[0](batch["x"])
    drawn.append(dropped.detach())
    if stops and len(drawn) == 2:
        run.stop_signal = signal.SIGTERM
    return {{"error": model[1](dropped)[:, 0].square()}}

try:
    loop.train(run, model, loop.Stage("test", 1, 1e-2, 2, 1), Ones(), loss)
except Interrupted:
    assert stops
torch.save(drawn, out / (sys.argv[2] + os.environ["RANK"]))
"""


def test_processes_drop_out_differently_and_go_on_as_they_were(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(DROPOUT.format(root=str(ROOT)))
    for out, how in (("a", "whole"), ("b", "stops"), ("b", "goes_on")):
        (tmp_path / out).mkdir(exist_ok=True)
        run_in_two([sys.executable, str(script), str(tmp_path / out), how])

    def masks(name: str) -> torch.Tensor:
        return torch.stack([torch.cat(torch.load(tmp_path / f"{name}{rank}")) for rank in (0, 1)])

    whole = masks("a/whole")
    assert whole.shape == (2, 4, 16)
    assert not any(torch.equal(whole[0, step], other) for step in range(4) for other in whole[1])
    parts = torch.cat([masks("b/stops"), masks("b/goes_on")], dim=1)
    assert torch.equal(parts, whole)


CALIBRATION = """
import argparse, datetime, os, sys, time
from types import SimpleNamespace
sys.path.insert(0, {root!r})
import torch
import torch.distributed
from training import fine_tuning, machine
from training.run import Run

torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds=2))
os.makedirs(sys.argv[1], exist_ok=True)
flags = SimpleNamespace(output_dir=sys.argv[1], report_to="none", max_drop=100.0)
run = Run(machine.make_accelerator("fp32", True, 7), flags, {{}}, "new")
model = torch.nn.Linear(1, 1)
run.evaluate_once = lambda stage, evaluate: None
run.evaluated = lambda stage: {{"f1": 0.0}}
run.say = lambda text: None

def calibrate(model, *_):
    time.sleep(4)
    return model

def save_quantized(model, folder):
    os.makedirs(folder)

class Task:
    auto_class, best_by, drop_by, score_names = None, "f1", "f1", {{"f1": "F1"}}
    calibration = staticmethod(lambda count: [])

for name in ("fuse_attention", "load_model", "hold_weight_range", "replace"):
    setattr(fine_tuning, name, lambda *_, **__: model)
fine_tuning.calibrate, fine_tuning.save_quantized = calibrate, save_quantized
config = argparse.Namespace(subset_size=1, weight_range=None)
fine_tuning.quantize(run, model, config, argparse.Namespace(task=Task, student=None, args=flags))
"""


@pytest.mark.slow
def test_a_calibration_may_outlast_the_time_limit_of_process_groups(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(CALIBRATION.format(root=str(ROOT)))
    run_in_two([sys.executable, str(script), str(tmp_path / "out")])
