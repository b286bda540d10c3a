"""A run that is killed, stopped, or out of disk goes on and ends as if nothing had happened."""

from __future__ import annotations

import json
import math
import os
import random
import resource
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from calls import (
    call,
    error_line,
    last_step,
    records,
    started,
    state_step,
    states,
    wait_for,
)
from conftest import ROOT, command_of, run, run_flags
from safetensors.torch import load_file, save_file

from cli import UserError
from training import loop, progress, results
from training.passes import Batches
from training.run import Run
from training.states import States

FLAGS = (
    "--dropout=0.1",  # so that the state of the random generators matters
    "--num_train_epochs=2.4",
    "--max_seq_length_c=256",
    "--doc_stride=128",
    "--total_train_batch_size=4",
    "--per_gpu_train_batch_size=2",
    "--save_minutes=0",
)


@pytest.fixture(scope="module")
def reference(tiny_bert: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("reference") / "out"
    done = run(command_of("train_qa", tiny_bert, few, folder, *FLAGS, "--save_minutes=10"))
    assert done.returncode == 0, done.stderr
    return folder


def story(output_dir: Path) -> list[tuple]:
    """What metrics.jsonl says, but for how long it took."""
    keys = ("stage", "step", "epoch", "loss", "learning_rate", "evaluation", "f1", "exact_match")
    return [tuple(record.get(key) for key in keys) for record in records(output_dir)]


def assert_same(output_dir: Path, reference: Path) -> None:
    """The run has become the one that nothing stopped, bit by bit, and has tidied up."""
    assert story(output_dir) == story(reference)
    for name in ("model.safetensors", "predictions.json", "config.json"):
        assert (output_dir / name).read_bytes() == (reference / name).read_bytes(), name
    assert not (output_dir / "checkpoints").exists()
    assert not (output_dir / ".lock").exists()


# ------------------------------------------------------------------------------------------------
# A whole run


def test_reference_logs_every_step_once(reference: Path) -> None:
    trained = [r for r in records(reference) if "evaluation" not in r]
    assert [r["step"] for r in trained] == list(range(1, len(trained) + 1))
    counts = json.loads((reference / "metrics.json").read_text())["counts"]
    assert len(trained) >= 18 and counts["train_windows"] % 4  # what the tests below rely on
    assert len({r["loss"] for r in trained}) == len(trained)


def test_epochs_may_be_a_fraction(reference: Path) -> None:
    counts = json.loads((reference / "metrics.json").read_text())["counts"]
    an_epoch = math.ceil(counts["train_windows"] / 4)
    total = math.ceil(2.4 * an_epoch)
    assert 2 * an_epoch < total < 3 * an_epoch
    assert max(r["step"] for r in records(reference)) == total
    evaluated = [r["step"] for r in records(reference) if "evaluation" in r]
    assert evaluated == [an_epoch, 2 * an_epoch, total]
    rates = [r["learning_rate"] for r in records(reference) if "evaluation" not in r]
    assert rates == pytest.approx([1e-3 * (1 - step / total) for step in range(total)])


def test_finished_folder(reference: Path, few: Path) -> None:
    assert sorted(path.name for path in reference.iterdir()) == [
        "README.md",
        "config.json",
        "curves.png",
        "metrics.json",
        "metrics.jsonl",
        "model.onnx",
        "model.safetensors",
        "predictions.json",
        "reader.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.txt",
    ]
    assert json.loads((reference / "reader.json").read_text())["max_query_length"] == 24
    metrics = json.loads((reference / "metrics.json").read_text())
    last = [r for r in records(reference) if "evaluation" in r][-1]
    assert (metrics["f1"], metrics["exact_match"]) == (last["f1"], last["exact_match"])
    assert 0 < metrics["train_seconds"] < metrics["total_seconds"]
    assert metrics["counts"]["train_questions"] == 30
    assert metrics["counts"]["dev_questions"] == 6
    assert metrics["arguments"]["dropout"] == 0.1
    assert metrics["versions"]["torch"] == torch.__version__
    assert (reference / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    from PIL import Image

    with Image.open(reference / "curves.png") as image:
        image.load()
        assert min(image.size) > 300
    dev = json.loads((few / "dev-v1.1.json").read_text())["data"]
    ids = [qa["id"] for a in dev for p in a["paragraphs"] for qa in p["qas"]]
    assert list(json.loads((reference / "predictions.json").read_text())) == ids
    assert f"{metrics['f1']:.2f}" in (reference / "README.md").read_text()


# ------------------------------------------------------------------------------------------------
# Killed and stopped


def test_killed_at_random_moments(
    tiny_bert: Path, few: Path, reference: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = command_of("train_qa", tiny_bert, few, out, *FLAGS)
    rng = random.Random(3)
    kills = [
        lambda: last_step(out) >= 2,
        lambda: last_step(out) >= 5 and (out / "checkpoints" / "saving").exists(),
        lambda: last_step(out) >= 9,
    ]
    for number, moment in enumerate(kills):
        with started(command) as process:
            wait_for(process, moment)
            time.sleep(0 if number == 1 else rng.random() * 0.15)
            os.kill(process.pid, signal.SIGKILL)
            assert process.wait(timeout=60) == -signal.SIGKILL, "it finished before the kill"
        assert not (out / "metrics.json").exists()
        # What a kill in the midst of saving leaves.
        half = out / "checkpoints" / "saving"
        half.mkdir(exist_ok=True)
        (half / "model.safetensors").write_bytes(b"half of it")
    saved = state_step(out)
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {saved} of" in done.stdout
    assert_same(out, reference)


def test_killed_before_the_first_state(
    tiny_bert: Path, few: Path, reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    command = command_of("train_qa", tiny_bert, few, out, *FLAGS, "--save_minutes=10")
    with started(command) as process:
        wait_for(process, lambda: last_step(out) >= 2)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(timeout=60) == -signal.SIGKILL
    assert states(out) == []
    assert call(command) == 0, capfd.readouterr().err
    assert_same(out, reference)


def test_stopped_then_out_of_disk(
    tiny_bert: Path, few: Path, reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    command = command_of("train_qa", tiny_bert, few, out, *FLAGS)

    with started(command) as process:
        wait_for(process, lambda: last_step(out) >= 3)
        os.kill(process.pid, signal.SIGSTOP)
        # Meanwhile another process wants the folder.
        capfd.readouterr()
        assert call(command) == 2
        line = error_line(capfd.readouterr().err)
        assert "another process" in line and str(out) in line
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGCONT)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"SIGTERM: saved at step {state_step(out)} of" in stderr
    assert "same command again goes on" in stderr and "Traceback" not in stderr
    assert len(states(out)) == 2

    with started(command) as process:
        wait_for(process, lambda: last_step(out) >= 9)
        os.kill(process.pid, signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "going on from step" in stdout
    saved = state_step(out)
    assert f"SIGINT: saved at step {saved} of" in stderr and "Traceback" not in stderr
    assert len(states(out)) == 2

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    kept = {p: p.read_bytes() for p in (out / "checkpoints").rglob("*") if p.is_file()}
    with started(command, before=small_files) as process:
        wait_for(process, lambda: last_step(out) >= saved + 2)
        os.kill(process.pid, signal.SIGTERM)
        _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM
    assert f"SIGTERM: NOT SAVED at step {last_step(out)} of" in stderr
    warnings = [line for line in stderr.splitlines() if line.startswith("warning: ")]
    assert f"the state at step {saved + 1} could not be saved" in warnings[0]
    assert "Traceback" not in stderr
    assert {p: p.read_bytes() for p in (out / "checkpoints").rglob("*") if p.is_file()} == kept

    done = run(command)
    assert done.returncode == 0, done.stderr
    assert f"going on from step {saved} of" in done.stdout
    assert_same(out, reference)


def test_a_state_that_does_not_fit_the_disk_says_what_is_left(
    accelerator: Accelerator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(accelerator, "save_state", full)
    states = States(accelerator, str(tmp_path), print)
    assert not states.save({"step": 1})
    assert (
        "; there is no earlier state, so a run that stops now starts anew" in capfd.readouterr().err
    )
    (tmp_path / "state-000001").mkdir()
    (tmp_path / "state-000001" / "position.json").write_text("{}")
    assert not states.save({"step": 2})
    assert "; the one before it stays" in capfd.readouterr().err


def test_log_of_several_steps_a_record_goes_on(
    tiny_bert: Path, few: Path, reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    # A record is the mean over log_steps steps, also where a stop came between them.
    out = tmp_path / "out"
    command = command_of("train_qa", tiny_bert, few, out, *FLAGS, "--log_steps=4")
    with started(command) as process:
        wait_for(process, lambda: bool(states(out)) and state_step_or_0(out) >= 6)
        os.kill(process.pid, signal.SIGTERM)
        process.communicate(timeout=120)
    saved = state_step(out)
    while saved % 4 == 0:  # stopped at a record: take the state before it
        shutil.rmtree(out / "checkpoints" / states(out)[-1])
        saved = state_step(out)
    assert call(command) == 0, capfd.readouterr().err
    each = {r["step"]: r for r in records(reference) if "evaluation" not in r}
    for record in records(out):
        if "evaluation" not in record:
            first = (record["step"] - 1) // 4 * 4 + 1
            some = [each[step] for step in range(first, record["step"] + 1)]
            weights = [examples_of(r, reference) for r in some]
            mean = np.average([r["loss"] for r in some], weights=weights)
            assert record["loss"] == pytest.approx(mean, rel=1e-6), record["step"]


def state_step_or_0(output_dir: Path) -> int:
    """`state_step`, while states come and go."""
    try:
        return state_step(output_dir)
    except (OSError, IndexError):
        return 0


def examples_of(record: dict, output_dir: Path) -> int:
    """The examples of a step: 4, or what is left over for the last of an epoch."""
    windows = json.loads((output_dir / "metrics.json").read_text())["counts"]["train_windows"]
    last = record["epoch"] == int(record["epoch"])
    return (windows % 4 or 4) if last else 4


@pytest.mark.slow
def test_ctrl_c_while_starting(tiny_bert: Path, few: Path, tmp_path: Path) -> None:
    # The libraries take some seconds to import; the signal comes amid that.
    command = command_of("train_qa", tiny_bert, few, tmp_path / "out", *FLAGS)
    with started(command, fresh=True) as process:
        loaded = Path(f"/proc/{process.pid}/maps")
        wait_for(process, lambda: "libtorch" in loaded.read_text())
        os.kill(process.pid, signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert "Traceback" not in stderr


# ------------------------------------------------------------------------------------------------
# The folder: whose run it is


@pytest.fixture(scope="module")
def unfinished(tiny_bert: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was killed."""
    out = tmp_path_factory.mktemp("unfinished") / "out"
    with started(command_of("train_qa", tiny_bert, few, out, *FLAGS)) as process:
        wait_for(process, lambda: state_step_or_0(out) >= 2)
        os.kill(process.pid, signal.SIGKILL)
    return out


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    """Content and time of each file, but for the lock's."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_same_command_on_a_finished_folder(
    tiny_bert: Path, few: Path, reference: Path, capfd: pytest.CaptureFixture
) -> None:
    before = snapshot(reference)
    # Saving more often does not make it another command.
    assert call(command_of("train_qa", tiny_bert, few, reference, *FLAGS, "--save_minutes=3")) == 0
    stdout, stderr = capfd.readouterr()
    assert "is finished" in stdout and str(reference) in stdout
    assert stderr == ""
    assert snapshot(reference) == before


def test_the_folder_spelled_otherwise_is_the_same(
    tiny_bert: Path, few: Path, reference: Path, capfd: pytest.CaptureFixture
) -> None:
    command = command_of(
        "train_qa", tiny_bert, few, reference, *FLAGS, f"--output_dir={reference}/"
    )
    assert call(command) == 0, capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("which", ["reference", "unfinished"])
def test_another_command(
    which: str,
    tiny_bert: Path,
    few: Path,
    request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture,
) -> None:
    out = request.getfixturevalue(which)
    before = snapshot(out)
    assert call(command_of("train_qa", tiny_bert, few, out, *FLAGS, "--learning_rate=2e-3")) == 2
    line = error_line(capfd.readouterr().err)
    assert "learning_rate was 0.001, now 0.002" in line
    assert str(out) in line and "--overwrite_output_dir" in line
    assert ("unfinished" in line) == (which == "unfinished")
    assert snapshot(out) == before


def test_a_run_of_another_version_is_refused_by_the_flags_that_are_new_or_gone(
    tiny_bert: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"arguments": {"start": "teacher"}}))
    assert call(command_of("train_qa", tiny_bert, few, tmp_path, *FLAGS)) == 2
    line = error_line(capfd.readouterr().err)
    assert "max_answer_length was absent, now 30" in line
    assert "start was 'teacher', now absent" in line


@pytest.mark.slow
@pytest.mark.parametrize("which", ["reference", "unfinished"])
@pytest.mark.parametrize("split", ["train", "dev"])
def test_changed_data(
    which: str,
    split: str,
    tiny_bert: Path,
    few: Path,
    request: pytest.FixtureRequest,
    capfd: pytest.CaptureFixture,
) -> None:
    out = request.getfixturevalue(which)
    before = snapshot(out)
    path = few / f"{split}-v1.1.json"
    original = path.read_text()
    try:
        path.write_text(original.replace("?", " ?", 1))
        assert path.read_text() != original
        assert call(command_of("train_qa", tiny_bert, few, out, *FLAGS)) == 2
    finally:
        path.write_text(original)
    line = error_line(capfd.readouterr().err)
    assert f"sha256_{split} was" in line and "sha256" not in line.split(f"sha256_{split}")[0]
    assert snapshot(out) == before


def test_overwrite_removes_only_its_own(
    tiny_bert: Path,
    few: Path,
    reference: Path,
    unfinished: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(unfinished, out)  # another command's: it names the other folder
    shutil.copy(reference / "model.onnx", out)
    (out / "mine.txt").write_text("mine")
    (out / "notes").mkdir()
    (out / "notes" / "config.json").write_text("{}")
    flags = (*FLAGS, "--num_train_epochs=0.1", "--overwrite_output_dir")
    assert call(command_of("train_qa", tiny_bert, few, out, *flags)) == 0, capfd.readouterr().err
    assert "going on" not in capfd.readouterr().out
    assert (out / "mine.txt").read_text() == "mine"
    assert (out / "notes" / "config.json").read_text() == "{}"
    assert min(r["step"] for r in records(out)) == 1
    assert len([r for r in records(out) if r["step"] == 1 and "evaluation" not in r]) == 1
    assert (out / "model.onnx").read_bytes() != (reference / "model.onnx").read_bytes()
    assert json.loads((out / "metrics.json").read_text())["arguments"]["num_train_epochs"] == 0.1


def test_foreign_model_is_not_written_over(
    tiny_bert: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    shutil.copytree(tiny_bert, out)
    before = snapshot(out)
    assert call(command_of("train_qa", tiny_bert, few, out, *FLAGS)) == 2
    line = error_line(capfd.readouterr().err)
    assert "config.json" in line and str(out) in line
    assert snapshot(out) == before


def test_stop_says_when_overwriting_would_start_again(
    tiny_bert: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    # With --overwrite_output_dir the same command does not go on, so it must not be said.
    out = tmp_path / "out"
    command = command_of("train_qa", tiny_bert, few, out, *FLAGS, "--overwrite_output_dir")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            progress.Progress,
            "advance",
            lambda self, *_: setattr(self.run, "stop_signal", signal.SIGTERM),
        )
        assert call(command) == 143
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert "saved at step 1" in line
    assert "same command" not in line or "without --overwrite_output_dir" in line


# ------------------------------------------------------------------------------------------------
# A loss that is no number


class _Batches(Batches):
    """Two steps an epoch of 4 random examples."""

    def steps(self, epoch: int) -> list[np.ndarray]:
        return [np.arange(4), np.arange(4, 8)]

    def tokens(self, chosen: np.ndarray) -> np.ndarray:
        return np.full(len(chosen), 3)

    def batch(self, epoch: int, chosen: np.ndarray) -> dict[str, torch.Tensor]:
        rng = np.random.default_rng(epoch)
        x = torch.from_numpy(rng.normal(size=(8, 3)).astype(np.float32))[chosen]
        return {"x": x, "attention_mask": torch.ones(len(chosen), 3, dtype=torch.long)}


@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("bad_step", [1, 4])
def test_nan_keeps_the_last_good_state(what: str, bad_step: int, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    set_seed(0)
    run_ = Run(accelerator, run_flags(tmp_path, 0.0), {}, "new")
    model = torch.nn.Linear(3, 1)
    start = model.weight.detach().clone()
    calls = []

    def loss_function(model: torch.nn.Module, batch: dict) -> dict[str, torch.Tensor]:
        calls.append(1)
        loss = model(batch["x"])[:, 0].square()
        if len(calls) == bad_step:
            loss = loss * float("nan")
            if what == "gradient":  # NaN in the gradient alone
                loss = torch.where(torch.isnan(loss), torch.ones_like(loss), loss)
        return {"error": loss}

    stage = loop.Stage("test", 4, 1e-2, 4, 4)
    with pytest.raises(UserError, match=f"at step {bad_step} of 8 .*nan") as caught:
        loop.train(run_, model, stage, _Batches(), loss_function, lambda model: {"f1": 0.0})
    assert "\n" not in str(caught.value) and "--learning_rate" in str(caught.value)
    if bad_step == 1:
        assert states(tmp_path) == []
        assert torch.equal(model.weight, start)
        return
    assert state_step(tmp_path) == bad_step - 1
    weights = load_file(tmp_path / "checkpoints" / states(tmp_path)[-1] / "model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert torch.equal(weights["weight"], model.weight)
    assert len(records(tmp_path)) == bad_step - 1 + 1  # the steps, and an evaluation after two
    run_._lock_file.close()


def test_model_with_nan_weights(
    tiny_bert: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_bert, model)
    weights = load_file(model / "model.safetensors")
    weights["qa_outputs.weight"][0, 0] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    assert call(command_of("train_qa", model, few, out, *FLAGS)) == 2
    line = error_line(capfd.readouterr().err)
    assert "at step 1" in line and "nan" in line
    assert states(out) == []


def test_the_cards_command_is_the_command() -> None:
    """Zeros are among its flags, and paths with spaces are one word for a shell."""
    arguments = {
        "model_student": "my models/bert",
        "num_train_epochs": 0.0,
        "seed": 0,
        "no_cuda": True,
        "overwrite_output_dir": False,
        "report_to": None,
        "stages": ["heads", "final"],
        "nncf": {"preset": "mixed"},
        "sha256_train": "0",
    }
    command = results.command_line("train_qa.py", arguments).replace("\\\n", " ")
    assert shlex.split(command) == [
        "python3",
        "train_qa.py",
        "--model_student=my models/bert",
        "--num_train_epochs=0.0",
        "--seed=0",
        "--no_cuda",
        "--stages=heads,final",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_qa", "pack_and_distill"])
def test_a_cards_command_gives_the_same_files(
    script: str, teacher: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out, again = tmp_path / "first one", tmp_path / "again"
    flags = ["--seed=0", "--save_minutes=0"]
    if script == "train_qa":
        made = command_of("train_qa", teacher, few, out, *flags, "--num_train_epochs=0.5")
    else:
        made = command_of(
            "pack_and_distill",
            teacher,
            few,
            out,
            *flags,
            "--stages=final",
            "--max_steps_per_stage=2",
        )
    assert call(made) == 0, capfd.readouterr().err
    command = (out / "README.md").read_text().split("## Training\n```\n")[1].split("```")[0]
    python, name, *words = shlex.split(command.replace("\\\n", " "))
    assert (python, name) == ("python3", f"{script}.py")
    assert f"--output_dir={out}" in words
    words = [word for word in words if not word.startswith("--output_dir=")]
    done = run([sys.executable, str(ROOT / name), *words, f"--output_dir={again}"])
    assert done.returncode == 0, done.stderr
    for file in ("model.safetensors", "model.onnx"):
        assert (out / file).read_bytes() == (again / file).read_bytes(), file


@pytest.mark.slow
def test_a_card_does_not_tell_of_training_that_was_not(
    tiny_bert: Path, few: Path, reference: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert call(command_of("train_qa", tiny_bert, few, out, "--num_train_epochs=0")) == 0
    card = (out / "README.md").read_text()
    assert "fine-tuned on" not in card and "not trained on" in card
    assert "fine-tuned on" in (reference / "README.md").read_text()


# ------------------------------------------------------------------------------------------------
# What is told is of the folder


def told(folder: Path) -> tuple[float, float, str]:
    """F1, exact match and the answers, as a folder tells them."""
    figures = json.loads((folder / "metrics.json").read_text())
    return figures["f1"], figures["exact_match"], (folder / "predictions.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train_qa", "pack_and_distill"])
def test_figures_and_answers_are_those_of_the_saved_weights(
    script: str,
    teacher: Path,
    few: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: other weights get into the folder than were trained."""
    save_model, saved = results.save_model, []

    def save_others(model: torch.nn.Module, *arguments: object) -> None:
        saved.append(model)
        with torch.no_grad():
            model.qa_outputs.weight.neg_()
        save_model(model, *arguments)
        with torch.no_grad():
            model.qa_outputs.weight.neg_()

    out, again = tmp_path / "out", tmp_path / "again"
    with monkeypatch.context() as patch:
        patch.setattr(results, "save_model", save_others)
        if script == "train_qa":
            command = command_of("train_qa", teacher, few, out, "--num_train_epochs=0.3")
        else:
            flags = ("--stages=final", "--max_steps_per_stage=1", "--num_train_epochs=1")
            command = command_of("pack_and_distill", teacher, few, out, *flags)
        assert call(command) == 0, capfd.readouterr().err
    assert call(command_of("train_qa", out, few, again, "--num_train_epochs=0")) == 0
    assert told(out) == told(again)
    # The memory of what was trained was free for what was loaded.
    assert all(parameter.is_meta for model in saved for parameter in model.parameters())
    assert f"{told(out)[0]:.2f}" in (out / "README.md").read_text()


@pytest.mark.slow
def test_the_best_weights_have_their_own_figures_if_the_last_state_is_not_saved(
    teacher: Path,
    few: Path,
    sample: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    save_state, keep_if_best = Accelerator.save_state, States.keep_if_best
    scores = iter([9.0, 8.0])  # so that the best is not the last

    def full(self: Accelerator, folder: str) -> None:
        if len(states(out)):
            raise OSError("the disk is full")
        save_state(self, folder)

    def keep(self: States, model: torch.nn.Module, stage: str, step: int, score: float) -> None:
        keep_if_best(self, model, stage, step, next(scores))

    out, again = tmp_path / "out", tmp_path / "again"
    dev = f"--squad_dev_data={sample / 'dev-v1.1.json'}"  # of questions enough to tell F1 apart
    flags = (dev, "--num_train_epochs=2", "--learning_rate=3e-3", "--total_train_batch_size=8")
    with monkeypatch.context() as patch:
        patch.setattr(Accelerator, "save_state", full)
        patch.setattr(States, "keep_if_best", keep)
        assert call(command_of("train_qa", teacher, few, out, *flags)) == 0
    assert "the state at step 16 could not be saved" in capfd.readouterr().err
    evaluated = [r for r in records(out) if "evaluation" in r]
    assert call(command_of("train_qa", out, few, again, dev, "--num_train_epochs=0")) == 0
    assert told(out) == told(again)
    assert told(out)[:2] == (evaluated[0]["f1"], evaluated[0]["exact_match"])
    assert evaluated[0]["f1"] != evaluated[1]["f1"]
