"""Tests of INT8: its settings, calibration, training, the checkpoint, the exported file."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from calls import call, error_line, records, run_in_two, started, states, wait_for
from conftest import ROOT, command_of, run
from safetensors.torch import load_file
from transformers import (
    AutoModelForQuestionAnswering,
    BertConfig,
    BertForQuestionAnswering,
    PreTrainedModel,
)

import squad_utils
from bert.attention import fuse_attention
from bert.model_folder import load_model, open_model
from cli import Interrupted, UserError
from deploy import cpu, int8_file, onnx_file
from deploy.onnx_file import QA_OUTPUTS
from int8 import calibration, quantizers
from int8.settings import NncfConfig, read_nncf_config
from squad_utils import INPUTS, Windows
from tasks import qa
from training import fine_tuning

SETTINGS = {
    "preset": "mixed",
    "model_type": "transformer",
    "subset_size": 8,
    "advanced_parameters": {"smooth_quant_alphas": {"matmul": -1}},
}
LENGTH = 160
SHORT = ("--max_seq_length_c=160", "--total_train_batch_size=8", "--per_gpu_train_batch_size=8")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file for --nncf_config."""
    path = tmp_path_factory.mktemp("settings") / "nncf_config.json"
    path.write_text(json.dumps(SETTINGS))
    return path


@pytest.fixture(scope="module")
def packed(teacher: Path, few: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a packed teacher."""
    folder = tmp_path_factory.mktemp("packed") / "out"
    assert (
        call(command_of("pack_and_distill", teacher, few, folder, "--max_steps_per_stage=1")) == 0
    )
    return folder


def int8_flags(settings: Path, teacher: Path) -> tuple[str, ...]:
    """Those of a short quantization with a teacher."""
    return (
        f"--nncf_config={settings}",
        "--supervision_weight=0.02",
        f"--model_teacher={teacher}",
        *SHORT,
    )


@pytest.fixture(scope="module", params=["bert", "packed_bert"])
def quantized(
    request: pytest.FixtureRequest,
    teacher: Path,
    packed: Path,
    few: Path,
    settings: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The output folder of a quantization, of a BERT and of a packed one."""
    folder = tmp_path_factory.mktemp("quantized") / "out"
    model = teacher if request.param == "bert" else packed
    done = run(
        command_of("train_qa", model, few, folder, *int8_flags(settings, teacher), "--keep=last")
    )
    assert done.returncode == 0, done.stderr
    (folder.parent / "stdout").write_text(done.stdout)
    return folder


@pytest.fixture(scope="module")
def windows(teacher: Path, few: Path) -> Windows:
    """Windows of the dev file."""
    return dev_windows(teacher, few)


def dev_windows(model: Path, few: Path) -> Windows:
    from transformers import AutoTokenizer

    data = squad_utils.load_squad(str(few / "dev-v1.1.json"), "--squad_dev_data")
    tokenizer = AutoTokenizer.from_pretrained(model)
    return qa.make_windows(data, tokenizer, 24, LENGTH, 64, for_training=False)


def feeds(windows: Windows) -> list[dict[str, np.ndarray]]:
    """Inputs [1, LENGTH] of each window."""
    batches = []
    for window in range(len(windows)):
        arrays = squad_utils.make_batch(windows, np.array([window]), pad_to=LENGTH)
        batches.append({name: arrays[name] for name in INPUTS})
    return batches


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


# ------------------------------------------------------------------------------------------------
# A whole run


def test_stages_and_their_figures(quantized: Path) -> None:
    seen = list(dict.fromkeys(record["stage"] for record in records(quantized)))
    assert seen == ["fp32", "calibrated", "ranges", "weights"]
    rows = {row["stage"]: row for row in metrics(quantized)["stages"]}
    assert list(rows) == [*seen, "kept"]
    assert all("f1" in row and "exact_match" in row for row in rows.values())
    ranges = [r for r in records(quantized) if r["stage"] == "ranges" and "loss" in r]
    rates = [record["learning_rate"] for record in ranges]
    assert rates[0] == fine_tuning.QUANTIZER_RATE and rates == sorted(rates, reverse=True)
    assert {"answer", "distillation", "hidden_states"} <= ranges[0].keys()
    stdout = (quantized.parent / "stdout").read_text()
    check = metrics(quantized)["onnx_check"]
    assert check["passed"] and check["difference"] < 1e-4 and check["flipped"] < 1e-3
    assert set(check["runtimes"]) == {"exact", "ONNX Runtime", "OpenVINO", "OpenVINO f32"}
    assert check["cpu"] == str(cpu.this_cpu()) and check["largest_pair"] <= int8_file.PAIR_LIMIT
    assert "calibrating quantizers on 8 windows" in stdout
    assert "stage 2/2 weights" in stdout


def test_table_of_what_is_int8(quantized: Path) -> None:
    rows = {row["kind"]: row for row in metrics(quantized)["int8"]}
    weights = load_file(quantized / "model.safetensors")
    linear = [name for name, value in weights.items() if value.dim() == 2]
    tables = [name for name in linear if "embeddings" in name]
    assert rows["embedding"]["int8"] == len(tables) == 3
    assert rows["linear"]["int8"] == len(linear) - 3
    assert "float" in rows["linear"] and rows["linear"]["float"] == 0
    assert (rows["matmul"]["int8"], rows["matmul"]["float"]) == (2, 2)
    for kind in ("softmax", "layer_norm", "gelu", "matmul"):
        assert rows[kind]["float"] and rows[kind]["why"]


@pytest.mark.slow
def test_ranges_train_alone_first(
    teacher: Path, few: Path, settings: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    flags = ("--num_train_epochs=0", "--keep=last", "--save_minutes=0")
    command = command_of("train_qa", teacher, few, out, *int8_flags(settings, teacher), *flags)
    assert call(command) == 0, capfd.readouterr().err
    before, after = load_file(teacher / "model.safetensors"), load_file(out / "model.safetensors")
    # Bias correction has moved biases; nothing has moved a weight.
    for name, value in before.items():
        if not name.endswith("bias"):
            assert torch.equal(after[name], value), name
    # Calibration alone gives other ranges.
    other = tmp_path / "other"
    command = command_of(
        "train_qa",
        teacher,
        few,
        other,
        *int8_flags(settings, teacher),
        "--num_train_epochs=0",
        "--quantizer_epochs=0",
    )
    assert call(command) == 0, capfd.readouterr().err
    ranges, calibrated = (
        load_file(folder / quantizers.QUANTIZER_WEIGHTS) for folder in (out, other)
    )
    moved = [n for n in ranges if ("scale" in n or "input" in n) and ranges[n].is_floating_point()]
    assert moved
    assert sum(not torch.equal(ranges[n], calibrated[n]) for n in moved) > 0.9 * len(moved)


def test_a_step_moves_a_range_by_a_share_of_its_size(reading: Reading) -> None:
    """And leaves other parameters their step; a low end of 0, as behind ReLU, stays."""
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=32, vocab_size=200)  # fmt: skip
    sample = {name: torch.from_numpy(each) for name, each in random_inputs(1, 16).items()}
    model = fuse_attention(BertForQuestionAnswering(config), separate_products=True).eval()
    model = calibration.calibrate(model, reading(SETTINGS), [sample])
    lows = [q.input_low for _, q in quantizers.quantizers(model) if hasattr(q, "input_low")]
    lows[0].data.zero_()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.01, weight_decay=0.0)
    quantizers.take_relative_steps(optimizer, model)
    model(**sample).start_logits[:, 3].sum().backward()
    optimizer.step()
    moved = dict.fromkeys(("range", "weight"), 0)
    for name, value in model.named_parameters():
        step, start = (value.detach() - before[name]).abs(), before[name].abs()
        if name.startswith(quantizers.HOOKS):
            assert (step <= 0.01001 * start).all(), name
            moved["range"] += int((step > 0.009 * start).sum())
        elif value.grad is not None:
            moved["weight"] += int((step > 0.009).sum())
    assert moved["range"] > 50 and moved["weight"] > 500
    assert lows[0].item() == 0


def test_folder_gives_the_same_model_again(
    quantized: Path, teacher: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Evaluated again and exported again; and trained on, from the folder alone."""
    again, on = tmp_path / "again", tmp_path / "on"
    command = command_of("train_qa", quantized, few, again, "--num_train_epochs=0", *SHORT)
    assert call(command) == 0, capfd.readouterr().err
    assert metrics(again)["f1"] == metrics(quantized)["f1"]
    assert (again / "predictions.json").read_text() == (quantized / "predictions.json").read_text()
    for name in ("model.safetensors", quantizers.QUANTIZER_WEIGHTS):
        before, after = load_file(quantized / name), load_file(again / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert (again / "model.onnx").read_bytes() == (quantized / "model.onnx").read_bytes()
    taught = ("--supervision_weight=0.02", f"--model_teacher={teacher}")
    command = command_of("train_qa", quantized, few, on, *taught, *SHORT, "--keep=last")
    assert call(command) == 0, capfd.readouterr().err
    before, after = (load_file(folder / "model.safetensors") for folder in (quantized, on))
    assert not torch.equal(before["qa_outputs.weight"], after["qa_outputs.weight"])
    assert (on / "quantizers.json").exists()
    assert [row["stage"] for row in metrics(on)["stages"]] == ["fine-tuning", "kept"]


@pytest.mark.slow
def test_the_best_is_kept(
    teacher: Path, few: Path, settings: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """A rate that ruins the model must not reach the folder; with --keep=last it does."""
    known = f"--squad_dev_data={few / 'train-v1.1.json'}"  # so that it has an F1 to lose
    learned = tmp_path / "learned"
    flags = (known, "--learning_rate=3e-3", "--num_train_epochs=12", *SHORT)
    assert call(command_of("train_qa", teacher, few, learned, *flags)) == 0
    kept = {}
    for keep in ("best", "last"):
        out = tmp_path / keep
        flags = (known, f"--keep={keep}", "--learning_rate=0.1")
        command = command_of("train_qa", learned, few, out, *int8_flags(settings, teacher), *flags)
        assert call(command) == 0, capfd.readouterr().err
        rows = {row["stage"]: row["f1"] for row in metrics(out)["stages"]}
        kept[keep] = load_file(out / "model.safetensors")["qa_outputs.weight"]
        scores = [rows[stage] for stage in ("calibrated", "ranges", "weights")]
        assert scores[-1] < max(scores)
        assert rows["kept"] == (max(scores) if keep == "best" else scores[-1])
    assert (kept["last"] - kept["best"]).abs().max() > 0.1


# ------------------------------------------------------------------------------------------------
# The exported file


def test_file_is_int8_and_standard(quantized: Path) -> None:
    model = onnx.load(quantized / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {opset.domain for opset in model.opset_import} == {""}
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    large = [t for t in model.graph.initializer if len(t.dims) == 2 and min(t.dims) > 2]
    assert large
    assert {kinds[tensor.name] for tensor in large} == {onnx.TensorProto.INT8}
    assert not int8_file.overflow_causes(model)
    assert 100 < int8_file.largest_pair(model) <= int8_file.PAIR_LIMIT
    shapes = [[d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input]
    assert shapes == [[1, LENGTH]] * 4


def test_file_is_a_quarter_of_the_fp32_one(reading: Reading, tmp_path: Path) -> None:
    """Of a model of which weights are the most, as they are of any real one."""
    config = BertConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=1024,
    )
    model = BertForQuestionAnswering(config).eval()
    sample = random_inputs(1, 64)
    sizes = []
    for int8 in (False, True):
        exported = fuse_attention(model, separate_products=True)
        if int8:
            inputs = {name: torch.from_numpy(array) for name, array in sample.items()}
            exported = calibration.calibrate(exported, reading(SETTINGS), [inputs])
            quantizers.make_exportable(exported)
        path = tmp_path / f"{int8}.onnx"
        onnx_file.export_onnx(
            onnx_file.ExportedGraph(exported, qa.QaTask.outputs), str(path), [sample], int8
        )
        sizes.append(path.stat().st_size)
    assert sizes[1] <= 0.3 * sizes[0]


def random_inputs(batch: int, length: int) -> dict[str, np.ndarray]:
    """Random tokens, without padding."""
    shape, rng = (batch, length), np.random.default_rng(length)
    return {
        "input_ids": rng.integers(5, 200, shape),
        "attention_mask": np.ones(shape, np.int64),
        "token_type_ids": np.zeros(shape, np.int64),
        "position_ids": np.broadcast_to(np.arange(length), shape).copy(),
    }


def pytorch_answers(folder: Path, batches: list[dict[str, np.ndarray]]) -> list[np.ndarray]:
    """Logits [2, L] of each window by the fake-quantized model."""
    model = load_model(
        open_model(str(folder), "--model"), AutoModelForQuestionAnswering, quiet=True
    ).eval()
    found = []
    for batch in batches:
        with torch.no_grad():
            outputs = model(**{name: torch.from_numpy(array) for name, array in batch.items()})
        found.append(np.concatenate([outputs.start_logits.numpy(), outputs.end_logits.numpy()]))
    return found


def test_both_runtimes_agree_with_pytorch(quantized: Path, windows: Windows) -> None:
    batches = feeds(windows)
    expected = pytorch_answers(quantized, batches)
    session = onnxruntime.InferenceSession(quantized / "model.onnx")
    compiled = openvino.Core().compile_model(
        quantized / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    converted = openvino.compile_model(  # as `ovc` does it, given nothing but the file
        openvino.convert_model(quantized / "model.onnx"), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    agree: dict[str, list[bool]] = {"onnxruntime": [], "openvino": [], "ovc": []}
    for batch, logits in zip(batches, expected, strict=True):
        real = batch["attention_mask"][0].astype(bool)
        for name, got in (
            ("onnxruntime", np.concatenate(session.run(list(QA_OUTPUTS), batch))),
            ("openvino", np.concatenate([compiled(batch)[each] for each in QA_OUTPUTS])),
            ("ovc", np.concatenate([converted(batch)[each] for each in QA_OUTPUTS])),
        ):
            assert np.abs(got - logits)[:, real].mean() < 0.05 * logits[:, real].std(), name
            agree[name].append((got[:, real].argmax(1) == logits[:, real].argmax(1)).all())
    assert len(batches) > 20
    for name, each in agree.items():
        assert np.mean(each) >= 0.95, name


def test_linear_layers_execute_in_int8(quantized: Path) -> None:
    """Read from what OpenVINO has compiled."""
    compiled = openvino.Core().compile_model(quantized / "model.onnx", "CPU")
    layers = [op.get_rt_info() for op in compiled.get_runtime_model().get_ops()]
    executed = [
        (layer["layerType"].astype(str), layer["runtimePrecision"].astype(str)) for layer in layers
    ]
    linear = [precision for kind, precision in executed if kind == "FullyConnected"]
    table = {row["kind"]: row for row in metrics(quantized)["int8"]}
    config = json.loads((quantized / "config.json").read_text())
    joined = config["num_hidden_layers"] if config["model_type"] != "bert" else 0
    assert len(linear) == table["linear"]["int8"] + 2 * joined  # query, key and value are three
    assert set(linear) <= {"u8", "i8"}


def test_linear_layers_execute_in_int8_in_onnxruntime(quantized: Path, tmp_path: Path) -> None:
    """Read from the graph that ONNX Runtime runs."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(quantized / "model.onnx", options)
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    table = {row["kind"]: row for row in metrics(quantized)["int8"]}
    assert kinds.count("MatMulIntegerToFloat") >= table["linear"]["int8"]
    assert "Gemm" not in kinds


def test_file_reshapes(quantized: Path, windows: Windows) -> None:
    core = openvino.Core()
    expected = load_model(
        open_model(str(quantized), "--model"), AutoModelForQuestionAnswering, quiet=True
    )
    for shape in ((1, 32), (8, 128)):
        model = core.read_model(quantized / "model.onnx")
        model.reshape({name: list(shape) for name in INPUTS})
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        batch = random_inputs(*shape)
        with torch.no_grad():
            outputs = expected.eval()(**{k: torch.from_numpy(v) for k, v in batch.items()})
        got = compiled(batch)["output_s"]
        gap = np.abs(got - outputs.start_logits.numpy()).mean()
        assert gap < 0.05 * outputs.start_logits.std(), shape


@pytest.mark.slow
def test_narrow_weights_export_as_they_are(
    teacher: Path, few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    """Half of INT8's range for weights, as processors without VNNI need it; one range a table."""
    file = tmp_path / "half.json"
    advanced = {
        "overflow_fix": "enable",
        "weights_quantization_params": {"per_channel": False},
        "smooth_quant_alphas": {"matmul": 0.5},
    }
    scope = {"types": ["matmul"], "names": ["qa_outputs"]}
    file.write_text(
        json.dumps({**SETTINGS, "advanced_parameters": advanced, "ignored_scope": scope})
    )
    out = tmp_path / "out"
    flags = ("--quantizer_epochs=0", "--num_train_epochs=0")
    command = command_of("train_qa", teacher, few, out, *int8_flags(file, teacher), *flags)
    assert call(command) == 0, capfd.readouterr().err
    weights = [
        onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(out / "model.onnx").graph.initializer
        if tensor.data_type == onnx.TensorProto.INT8
        and len(tensor.dims) == 2
        and "embeddings" not in tensor.name
    ]
    assert len(weights) == 12
    assert all(np.abs(w.astype(int)).max() <= 64 for w in weights)
    batches = feeds(dev_windows(teacher, few))[:4]
    session = onnxruntime.InferenceSession(out / "model.onnx")
    for batch, logits in zip(batches, pytorch_answers(out, batches), strict=True):
        got = np.concatenate(session.run(list(QA_OUTPUTS), batch))
        assert np.abs(got - logits).mean() < 0.05 * logits.std()
    rows = {row["kind"]: row for row in metrics(out)["int8"]}
    assert rows["linear"]["float"] == 1 and rows["matmul"]["int8"] == 0


# ------------------------------------------------------------------------------------------------
# Kills and processes

RESUMED = ("model.safetensors", quantizers.QUANTIZER_WEIGHTS)


@pytest.mark.slow
def test_killed_in_each_phase(teacher: Path, few: Path, settings: Path, tmp_path: Path) -> None:
    flags = ("--keep=last", "--save_minutes=0", "--supervision_weight=0.02")
    whole = tmp_path / "whole"
    done = run(command_of("train_qa", teacher, few, whole, *int8_flags(settings, teacher), *flags))
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    command = command_of("train_qa", teacher, few, out, *int8_flags(settings, teacher), *flags)
    for stage, step in (("calibrated", 0), ("ranges", 3), ("weights", 3)):

        def reached(stage: str = stage, step: int = step) -> bool:
            if stage == "calibrated":
                return (out / "checkpoints" / "calibrated").exists()
            newest = states(out)[-1:]
            return bool(newest) and any(
                r["stage"] == stage and r["step"] >= step for r in records(out)
            )

        with started(command) as process:
            wait_for(process, reached)
            process.send_signal(signal.SIGKILL)
            process.wait()
    done = run(command)
    assert done.returncode == 0, done.stderr
    assert "calibrating" not in done.stdout
    assert "of weights, saved in" in done.stdout
    for name in RESUMED:
        before, after = load_file(whole / name), load_file(out / name)
        assert all(torch.equal(before[key], after[key]) for key in before), name
    assert (out / "model.onnx").read_bytes() == (whole / "model.onnx").read_bytes()
    assert not (out / "checkpoints").exists()


@pytest.mark.slow
def test_two_processes_are_as_one(teacher: Path, few: Path, settings: Path, tmp_path: Path) -> None:
    flags = ("--per_gpu_train_batch_size=4", "--keep=last")
    folders = []
    for count in (1, 2):
        folders.append(tmp_path / str(count))
        command = command_of(
            "train_qa", teacher, few, folders[-1], *int8_flags(settings, teacher), *flags
        )
        if count == 2:
            run_in_two(command)
            continue
        done = run(command)
        assert done.returncode == 0, done.stderr
    logs = [[r["loss"] for r in records(folder) if "loss" in r] for folder in folders]
    assert logs[0] == pytest.approx(logs[1], rel=2e-3)


def first_sample(teacher: Path, few: Path) -> dict[str, torch.Tensor]:
    """The first window of the dev file, as calibration takes it."""
    first = feeds(dev_windows(teacher, few))[0]
    return {name: torch.from_numpy(array) for name, array in first.items()}


def test_calibration_can_be_stopped(reading: Reading, teacher: Path, few: Path) -> None:
    sample = first_sample(teacher, few)
    called: list[int] = []

    def third() -> None:
        called.append(1)
        if len(called) == 3:
            raise Interrupted("asked", signal.SIGTERM)

    with pytest.raises(Interrupted):
        calibration.calibrate(small_model(teacher), reading({}), [sample] * 4, third)


def test_settings_that_nncf_has_not_for_torch(reading: Reading, teacher: Path, few: Path) -> None:
    sample = first_sample(teacher, few)
    for settings in ({"fast_bias_correction": False}, {"target_device": "CPU_SPR"}):
        config = reading(settings)
        with pytest.raises(UserError, match="NNCF refuses it: ") as error:
            calibration.calibrate(small_model(teacher), config, [sample])
        assert config.path in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_works_without_a_compiler(teacher: Path, few: Path, settings: Path, tmp_path: Path) -> None:
    out, empty = tmp_path / "out", tmp_path / "bin"
    empty.mkdir()
    flags = ("--num_train_epochs=0", "--quantizer_epochs=0.2")
    command = command_of("train_qa", teacher, few, out, *int8_flags(settings, teacher), *flags)
    extensions = tmp_path / "extensions"
    environment = {"PATH": str(empty), "CXX": "none", "TORCH_EXTENSIONS_DIR": str(extensions)}
    done = run(command, env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    assert done.returncode == 0, done.stderr
    assert not extensions.exists()


# ------------------------------------------------------------------------------------------------
# The configuration file

Reading = Callable[[Any], NncfConfig]


@pytest.fixture
def reading(tmp_path: Path) -> Reading:
    def read(value: Any) -> NncfConfig:
        path = tmp_path / "config.json"
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return read_nncf_config(str(path))

    return read


def test_the_projects_own_file(reading: Reading) -> None:
    config = read_nncf_config(str(ROOT / "nncf_config.json"))
    assert config.subset_size == 300
    assert "ignored_scope" not in config.arguments  # queries x keys are INT8


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("{", "is not JSON"),
        ([], "is not a JSON object"),
        ({"prest": "mixed"}, "unknown key prest; did you mean preset?"),
        ({"preset": "mix"}, 'preset is "mix", not one of performance, mixed'),
        ({"subset_size": "300"}, 'subset_size is "300", not a whole number'),
        ({"subset_size": True}, "subset_size is true, not a whole number"),
        ({"fast_bias_correction": 1}, "fast_bias_correction is 1, not true or false"),
        ({"target_device": "TPU"}, "not one of ANY, CPU, GPU, NPU, CPU_SPR"),
        ({"ignored_scope": ["x"]}, "not an object"),
        ({"ignored_scope": {"names": "x"}}, 'ignored_scope.names is "x", not a list'),
        ({"ignored_scope": {"patterns": ["("]}}, "ignored_scope.patterns[0], '(', is not a"),
        (
            {"advanced_parameters": {"smooth_quant_alphas": {"linear": 1}}},
            "unknown key advanced_parameters.smooth_quant_alphas.linear",
        ),
        (
            {"advanced_parameters": {"weights_quantization_params": {"num_bits": 4}}},
            "weights_quantization_params.num_bits is 4; only 8 is INT8",
        ),
        (
            {"advanced_parameters": {"activations_range_estimator_params": {"min": {"x": 1}}}},
            "unknown key advanced_parameters.activations_range_estimator_params.min.x",
        ),
        ({"compression": {"algorithm": "filter_pruning"}}, "'filter_pruning', not 'quantization'"),
        ({"compression": {"preset": "fast"}}, 'preset is "fast"'),
        ({"compression": {"ignored_scopes": 1}}, "compression.ignored_scopes is 1, not a list"),
        ({"compression": {"ignored_scopes": [1]}}, "ignored_scopes[0] is 1, not a string"),
        (
            {"compression": {"initializer": {"range": [{"type": "mean"}]}}},
            'compression.initializer.range is [{"type": "mean"}], not an object',
        ),
    ],
)
def test_wrong_settings(reading: Reading, value: Any, message: str) -> None:
    with pytest.raises(UserError, match="--nncf_config") as error:
        reading(value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_reach_nncf(reading: Reading) -> None:
    import nncf
    from nncf.common.quantization.quantizer_propagation.structs import QuantizerPropagationRule
    from nncf.quantization.range_estimator import AggregatorType

    arguments = reading(
        {
            "preset": "performance",
            "model_type": None,
            "ignored_scope": {"types": ["matmul"], "validate": False},
            "advanced_parameters": {
                "overflow_fix": "disable",
                "quantizer_propagation_rule": "merge_all_in_one",
                "weights_quantization_params": {"per_channel": True, "mode": "symmetric"},
                "activations_range_estimator_params": {"max": {"aggregator_type": "mean"}},
            },
        }
    ).arguments
    assert arguments["preset"] is nncf.QuantizationPreset.PERFORMANCE
    assert arguments["model_type"] is None
    assert arguments["ignored_scope"].types == ["matmul"]
    advanced = arguments["advanced_parameters"]
    assert advanced.overflow_fix is nncf.OverflowFix.DISABLE
    assert advanced.quantizer_propagation_rule is QuantizerPropagationRule.MERGE_ALL_IN_ONE
    assert advanced.weights_quantization_params.per_channel is True
    maximum = advanced.activations_range_estimator_params.max
    assert maximum.aggregator_type is AggregatorType.MEAN


def test_file_of_nncf_before_3(reading: Reading) -> None:
    config = reading(
        {
            "input_info": [{"sample_size": [1, 384]}],
            "target_device": "CPU",
            "compression": {
                "algorithm": "quantization",
                "preset": "mixed",
                "initializer": {
                    "range": {"num_init_samples": 32, "type": "percentile"},
                    "batchnorm_adaptation": {"num_bn_adaptation_samples": 200},
                },
                "ignored_scopes": ["{re}.*qa_outputs.*", "BertModel/Linear[0]/linear_0"],
                "weights": {"mode": "symmetric", "bits": 8, "per_channel": True},
                "overflow_fix": "disable",
            },
        }
    )
    assert config.subset_size == 32
    assert config.arguments["ignored_scope"].patterns == [".*qa_outputs.*"]
    assert config.arguments["advanced_parameters"].weights_quantization_params.num_bits == 8
    assert config.without_effect == (
        "input_info",
        "compression.initializer.range.type",
        "compression.initializer.batchnorm_adaptation",
        "compression.ignored_scopes 'BertModel/Linear[0]/linear_0'",
        "target_device",
        "compression.weights.bits",
        "compression.overflow_fix",
    )


def small_model(teacher: Path) -> PreTrainedModel:
    model = load_model(
        open_model(str(teacher), "--model"), AutoModelForQuestionAnswering, quiet=True
    )
    return fuse_attention(model, separate_products=True).eval()


@pytest.mark.parametrize(
    ("scope", "found"),
    [
        ({"names": ["qa_outputs"]}, 1),
        ({"patterns": [r"bert\.encoder\.layer\.\d+\.intermediate\.dense"]}, 2),
        ({"types": ["matmul"]}, 4),
        (
            {
                "subgraphs": [
                    {
                        "inputs": ["bert.encoder.layer.0.intermediate.dense"],
                        "outputs": ["bert.encoder.layer.0.output.dense"],
                    }
                ]
            },
            3,
        ),
    ],
)
def test_scope_names_modules(reading: Reading, teacher: Path, scope: Any, found: int) -> None:
    config = reading({"ignored_scope": scope})
    calibration.check_scope(config, small_model(teacher))
    assert len(config.arguments["ignored_scope"].names) == found


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        ({"names": ["qa_output"]}, "'qa_output' matches nothing in this model; it has qa_outputs"),
        ({"patterns": ["layer.*"]}, "'layer.*' matches nothing"),
        ({"types": ["MatMul"]}, "'MatMul' matches nothing in this model; it has matmul"),
        ({"subgraphs": [{"inputs": ["a"], "outputs": ["b"]}]}, "subgraphs[0]: no way leads"),
        ({"subgraphs": [{"inputs": ["qa_outputs"]}]}, "subgraphs[0]: no way leads"),
    ],
)
def test_scope_of_nothing(reading: Reading, teacher: Path, scope: Any, message: str) -> None:
    config = reading({"ignored_scope": scope})
    with pytest.raises(UserError) as error:
        calibration.check_scope(config, small_model(teacher))
    assert message in str(error.value)


def test_wrong_input_comes_first(
    teacher: Path, packed: Path, few: Path, settings: Path, tmp_path: Path,
    capfd: pytest.CaptureFixture,
) -> None:  # fmt: skip
    def message(model: Path, *flags: str) -> str:
        command = command_of("train_qa", model, few, tmp_path / "out", *flags)
        assert call(command) == 2
        captured = capfd.readouterr()
        assert not (tmp_path / "out" / "checkpoints").exists()
        return error_line(captured.err)

    assert "no such file: nowhere.json" in message(teacher, "--nncf_config=nowhere.json")
    scope = tmp_path / "scope.json"
    scope.write_text(json.dumps({**SETTINGS, "ignored_scope": {"names": ["pooler"]}}))
    assert "'pooler' matches nothing" in message(teacher, f"--nncf_config={scope}")
    scope.write_text(json.dumps({**SETTINGS, "target_device": "CPU_SPR"}))
    assert "NNCF refuses it: " in message(teacher, f"--nncf_config={scope}")
    unmerged = message(packed / "unmerged", f"--nncf_config={settings}")
    assert "packed but not merged" in unmerged
    alone = tmp_path / "alone"
    shutil.copytree(packed, alone)
    shutil.rmtree(alone / "unmerged")
    taught = ("--supervision_weight=1", f"--model_teacher={teacher}")
    assert "merged" in message(alone, f"--nncf_config={settings}", *taught)
    damaged = tmp_path / "damaged"
    shutil.copytree(teacher, damaged)
    (damaged / "quantizers.json").write_text("{")
    assert "quantizers.json is not JSON" in message(damaged)
