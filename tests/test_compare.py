"""Tests of what tells a file's speed: deploy/timing.py, deploy/compare.py, `deployed`."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from calls import call, error_line
from conftest import command_of
from transformers import BertConfig, BertForQuestionAnswering

import bert_pack
from cli import UserError, run_main
from deploy import compare, timing
from deploy.cpu import Cpu, this_cpu
from deploy.timing import WAYS

LENGTH = 160


@pytest.fixture(autouse=True)
def all_runtimes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As outside of tests."""
    monkeypatch.setattr(timing, "compiled", timing.compiled.__wrapped__)


@pytest.fixture(scope="module")
def tuned(teacher: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a QA model."""
    folder = tmp_path_factory.mktemp("tuned") / "reader"
    assert call(command_of("train_qa", teacher, few, folder, "--num_train_epochs=0")) == 0
    return folder


@pytest.fixture(scope="module")
def quantized(tuned: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of that model in INT8."""
    folder = tmp_path_factory.mktemp("quantized") / "in-int8"
    settings = folder.parent / "nncf_config.json"
    settings.write_text(json.dumps({"model_type": "transformer", "subset_size": 6}))
    flags = (f"--nncf_config={settings}", "--num_train_epochs=0", "--quantizer_epochs=0")
    assert call(command_of("train_qa", tuned, few, folder, *flags)) == 0
    return folder


@pytest.fixture(scope="module")
def embedder(base: Path, sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of an embedding model."""
    folder = tmp_path_factory.mktemp("embedder") / "embedder"
    flags = ("--num_train_epochs=0", "--max_seq_length_c=128", "--max_seq_length_q=24")
    assert call(command_of("train_qcemb", base, sample, folder, *flags)) == 0
    return folder


def deployed(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())["deployed"]


class Clock:
    """A clock that runs alone: `perf_counter` and `monotonic` tell it, sleeping moves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        for name in ("perf_counter", "monotonic"):
            monkeypatch.setattr(timing.time, name, lambda: self.now)
        monkeypatch.setattr(timing.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def run(self, *seconds: float) -> timing.Run:
        """A call takes the first of the times, then the next, and the last again and again."""
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return call


# ------------------------------------------------------------------------------------------------
# The clock


def test_the_median_is_over_rounds_and_leaves_the_first_call_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    # Calls that warm up take 9 s; the timed ones 1, 5 and 2, and loading 20.
    uneven, even = clock.run(9, 1, 9, 5, 9, 2), clock.run(3)
    found = timing.milliseconds(
        {"uneven": lambda: clock.sleep(20) or uneven, "even": lambda: even}, rounds=3
    )
    assert found == {"uneven": pytest.approx(2000), "even": pytest.approx(3000)}


def test_quick_files_get_several_calls_and_slow_ones_few_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    calls: list[str] = []

    def counted(name: str, seconds: float) -> timing.Load:
        run = clock.run(seconds)
        return lambda: lambda: (calls.append(name), run())

    timing.milliseconds({"quick": counted("quick", 0.01)}, rounds=2, seconds=60)
    assert len(calls) == 2 * (1 + timing.CALLS)
    calls.clear()
    timing.milliseconds({"slow": counted("slow", 10.0)}, rounds=10, seconds=60)
    assert len(calls) == 3 * 2  # a fourth round would end after 60 s
    assert clock.now <= 60 + 1


def test_one_round_is_whole_though_no_time_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    a, b = clock.run(50), clock.run(70)
    found = timing.milliseconds({"a": lambda: a, "b": lambda: b}, seconds=-5)
    assert found == {"a": 50_000, "b": 70_000}


def test_one_file_is_loaded_at_a_time_and_one_that_fails_is_left_out() -> None:
    loaded: list[str] = []

    class File:
        def __init__(self, name: str) -> None:
            self.name = name
            loaded.append(name)
            assert loaded == [name]
            if name == "broken":
                loaded.clear()
                raise RuntimeError("no such operator")

        def __call__(self) -> None:
            pass

        def __del__(self) -> None:
            if self.name != "broken":
                loaded.remove(self.name)

    failed: list[str] = []
    loads = {name: functools.partial(File, name) for name in ("a", "broken", "b")}
    found = timing.milliseconds(
        loads, 3, failed=lambda key, error: failed.append(f"{key}: {error}")
    )
    assert list(found) == ["a", "b"]
    assert failed == ["broken: no such operator"]


# ------------------------------------------------------------------------------------------------
# The line


FP32 = {"OpenVINO f32": 46.0, "OpenVINO default": 45.0, "ONNX Runtime": 75.0}


def test_the_line_names_the_fastest_way_and_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "this_cpu", lambda: Cpu("An old CPU", ("avx2",)))
    line = timing.fastest(FP32, {}, False, 384)
    assert line == (
        "fastest here (An old CPU (avx2)): OpenVINO default (--runtime=openvino"
        " --runtime_precision=default), 45.0 ms for 384 tokens"
    )


def test_the_line_says_where_int8_is_slower() -> None:
    own = {"OpenVINO f32": 58.0, "OpenVINO default": 69.0, "ONNX Runtime": 60.0}
    line = timing.fastest(own, FP32, True, 384)
    assert "INT8 is slower than FP32 in OpenVINO f32 (58.0 against 46.0 ms)," in line
    assert "OpenVINO default (69.0 against 45.0 ms)" in line
    assert "ONNX Runtime (60" not in line
    assert line.endswith("the FP32 file is faster, 45.0 ms in OpenVINO default")


def test_the_line_of_an_int8_file_that_gains_says_by_how_much() -> None:
    own = {"OpenVINO f32": 20.0, "OpenVINO default": 21.0, "ONNX Runtime": 30.0}
    line = timing.fastest(own, FP32, True, 384)
    assert "slower" not in line
    assert line.endswith("FP32 at best 45.0 ms in OpenVINO default")
    assert "no FP32 model.onnx to compare with" in timing.fastest(own, {}, True, 384)


# ------------------------------------------------------------------------------------------------
# What a run delivers


def test_a_run_tells_what_its_file_takes(
    tuned: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "again"
    shutil.copytree(tuned, folder)
    figures = timing.deliver(str(folder), "no-such-folder", LENGTH)
    assert capfd.readouterr().err == f"note: {figures['fastest']}\n"
    assert figures["cpu"] == str(this_cpu()) and figures["cores"] >= 1
    assert figures["milliseconds"].keys() == set(WAYS)
    assert min(figures["milliseconds"].values()) > 0
    assert figures["fp32"] == {} and figures["fp32_folder"] is None
    assert deployed(tuned).keys() == figures.keys()
    card = (tuned / "README.md").read_text()
    assert card.count("## Speed") == 1 and "| | OpenVINO f32 |" in card
    assert deployed(tuned)["fastest"][1:] in card


def test_an_int8_file_is_timed_beside_the_fp32_one_it_was_made_from(
    quantized: Path, tuned: Path
) -> None:
    figures = deployed(quantized)
    assert figures["fp32_folder"] == str(tuned)
    assert figures["fp32"].keys() == figures["milliseconds"].keys() != set()
    assert f"| FP32, `{tuned}` |" in (quantized / "README.md").read_text()
    assert timing.is_int8(str(quantized / "model.onnx"))
    assert not timing.is_int8(str(tuned / "model.onnx"))


def test_a_file_that_failed_its_check_has_no_speed(tmp_path: Path) -> None:
    (tmp_path / "model.failed.onnx").write_bytes(b"")
    assert timing.deliver(str(tmp_path), "none", LENGTH) is None


# ------------------------------------------------------------------------------------------------
# Folders side by side


def main(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """The exit code of `python -m deploy.compare`."""
    monkeypatch.setattr("sys.argv", ["compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        run_main(compare.main)
    return stop.value.code


def test_each_folder_is_a_row(
    tuned: Path,
    quantized: Path,
    embedder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    file, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    flags = (f"--json={file}", f"--picture={picture}", "--rounds=1")
    assert main(monkeypatch, tuned, f"{quantized}/", embedder, *flags) == 0
    out, err = capfd.readouterr()
    assert err == ""
    head, line, *rows = out.splitlines()
    cells = [cell.strip() for cell in head.strip("|").split("|")]
    assert cells[:6] == ["folder", "F1", "top 1", "top 5", "M parameters", "GOps at 1 x 128"]
    assert cells[6:] == ["MB", *(f"{way}, ms" for way in WAYS)]
    assert line.count("---") == len(cells) == 10
    assert [row.split("|")[1].strip() for row in rows] == list(
        map(str, (tuned, quantized, embedder))
    )
    assert {row.count("|") for row in (head, *rows)} == {11}
    assert picture.read_bytes().startswith(b"\x89PNG")

    written = json.loads(file.read_text())
    assert written["tokens"] == 128  # the embedder's; the readers declare 160
    first, second, third = written["rows"]
    metrics = json.loads((tuned / "metrics.json").read_text())
    assert first["scores"] == {"f1": metrics["f1"]}
    assert first["parameters"] == metrics["parameters"]
    assert third["scores"].keys() == {"top_1", "top_5"}
    assert second["megabytes"] == (quantized / "model.onnx").stat().st_size / 1e6
    assert second["megabytes"] < first["megabytes"]
    assert second["gops"] == first["gops"] > 0
    assert all(row["milliseconds"].keys() == set(WAYS) for row in written["rows"])


def test_operations_are_those_that_torch_counts(tuned: Path) -> None:
    config = BertConfig.from_pretrained(tuned)
    with torch.no_grad():
        _, counted = bert_pack.size_of(BertForQuestionAnswering, config, 64)
    assert compare.gops(str(tuned / "model.onnx"), 64) == pytest.approx(counted, rel=1e-6)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda folder: (folder / "model.onnx").unlink(), "has no model.onnx"),
        (lambda folder: (folder / "metrics.json").unlink(), "no such file"),
        (lambda folder: (folder / "metrics.json").write_text("[]"), "is not a JSON object"),
        (lambda folder: (folder / "model.onnx").write_text("no model"), "no runtime on this"),
    ],
)
def test_a_folder_that_cannot_be_compared_is_one_line(
    change: Any, said: str, tuned: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "other"
    shutil.copytree(tuned, folder)
    change(folder)
    with pytest.raises(UserError, match=said) as error:
        compare.compare([str(folder)], rounds=1)
    assert "\n" not in str(error.value)


def test_help_names_the_folders(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["compare", "--help"])
    with pytest.raises(SystemExit) as ended:
        compare.main()
    assert ended.value.code == 0
    assert capfd.readouterr().out.startswith("usage: python -m deploy.compare FOLDER ... [--flag")


def test_files_that_cannot_be_written_are_told_before_anything_is_timed(
    tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(timing, "compiled", None)
    for flag, said in (
        ("--picture=a.jpg", "does not end in .png"),
        (f"--json={tmp_path}/none/a.json", "--json: no such folder"),
    ):
        assert main(monkeypatch, tuned, flag) == 2
        assert said in error_line(capfd.readouterr().err)
