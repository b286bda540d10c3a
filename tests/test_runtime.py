"""Tests of INT8 files: whether their integer sums can overflow, and what then runs them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import ROOT, run
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from cli import UserError
from deploy import int8_file, ort_file, runtime
from deploy.cpu import Cpu, this_cpu
from deploy.settings import QA
from squad_utils import SpecialIds

node = helper.make_node


def model_of(
    nodes: list[onnx.NodeProto],
    tensors: dict[str, np.ndarray],
    inputs: dict[str, tuple[int, list[int | str]]],
    outputs: dict[str, list[int | str]],
) -> onnx.ModelProto:
    """A checked model; inputs are (type, shape) by name, outputs are float of a shape."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info(name, *each) for name, each in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in tensors.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return model


def linear(weight: np.ndarray, *, transposed: bool = False, gemm: bool = False) -> onnx.ModelProto:
    """x [1, in] in INT8 times a weight [in, out], stored as [out, in] if `transposed`."""
    stored = np.ascontiguousarray(weight.T) if transposed else weight
    nodes = [
        node("QuantizeLinear", ["x", "scale", "x_zero"], ["x_q"]),
        node("DequantizeLinear", ["x_q", "scale", "x_zero"], ["x_d"]),
        node("DequantizeLinear", ["w", "scale", "w_zero"], ["w_d"]),
    ]
    if gemm:
        nodes.append(node("Gemm", ["x_d", "w_d"], ["y"], transB=int(transposed)))
    else:
        if transposed:
            nodes.append(node("Transpose", ["w_d"], ["w_t"], perm=[1, 0]))
        nodes.append(node("MatMul", ["x_d", "w_t" if transposed else "w_d"], ["y"]))
    tensors = {
        "scale": np.float32(1),
        "x_zero": np.uint8(0),
        "w_zero": weight.dtype.type(128 if weight.dtype == np.uint8 else 0),
        "w": stored,
    }
    inputs = {"x": (TensorProto.FLOAT, [1, weight.shape[0]])}
    return model_of(nodes, tensors, inputs, {"y": [1, weight.shape[1]]})


# ------------------------------------------------------------------------------------------------
# What a file multiplies


@pytest.mark.parametrize("form", [{}, {"transposed": True}, {"gemm": True},
                                  {"transposed": True, "gemm": True}])  # fmt: skip
def test_pairs_are_neighbours_along_the_input_axis_of_one_channel(form: dict[str, bool]) -> None:
    """Each larger sum of this weight is of numbers that no kernel adds in 16 bits."""
    weight = np.array(  # [in, out]
        [[-60, 3], [50, 4], [127, -64], [1, 64], [-20, 5], [2, 90]], np.int8
    )
    assert int8_file.largest_pair(linear(weight, **form)) == 128
    weight[3, 0] = -2
    assert int8_file.largest_pair(linear(weight, **form)) == 129
    assert int8_file.overflow_causes(linear(weight, **form))


def test_the_last_of_an_odd_number_of_inputs_counts_alone() -> None:
    weight = np.array([[1], [-100], [127]], np.int8)
    assert int8_file.largest_pair(linear(weight)) == 127
    assert not int8_file.overflow_causes(linear(weight))
    assert int8_file.largest_pair(linear(np.array([[-128]], np.int8))) == 128
    assert int8_file.largest_pair(linear(np.full((4, 1), -128, np.int8))) == 256


def test_unsigned_weights_count_by_their_distance_from_128() -> None:
    weight = np.array([[128, 255], [0, 254]], np.uint8)
    assert int8_file.largest_pair(linear(weight)) == 127 + 126 + 0
    assert int8_file.largest_pair(linear(weight[:, :1])) == 128


def test_tables_that_are_looked_up_do_not_count() -> None:
    """Rows of a table at full range go as floating point into a product of small weights."""
    tensors = {
        "table": np.full((3, 4), 127, np.int8),
        "w": np.full((4, 2), 9, np.int8),
        "scale": np.float32(1),
    }
    look_up = [
        node("Gather", ["table", "ids"], ["rows"]),
        node("DequantizeLinear", ["rows", "scale"], ["x"]),
    ]
    inputs = {"ids": (TensorProto.INT64, [1])}
    only = model_of(look_up, {k: tensors[k] for k in ("table", "scale")}, inputs, {"x": [1, 4]})
    assert int8_file.largest_pair(only) is None
    assert not int8_file.overflow_causes(only)
    product = [
        node("DequantizeLinear", ["w", "scale"], ["w_d"]),
        node("MatMul", ["x", "w_d"], ["y"]),
    ]
    both = model_of([*look_up, *product], tensors, inputs, {"y": [1, 2]})
    assert int8_file.largest_pair(both) == 18


def test_a_file_in_floating_point_has_no_pairs() -> None:
    weight = {"w": np.full((4, 2), 127, np.float32)}
    inputs = {"x": (TensorProto.FLOAT, [1, 4])}
    model = model_of([node("MatMul", ["x", "w"], ["y"])], weight, inputs, {"y": [1, 2]})
    assert int8_file.largest_pair(model) is None
    assert not int8_file.overflow_causes(model)


@pytest.mark.parametrize("quantized", [("q", "k"), ("q",), ("k",), ()])
def test_a_product_of_two_activations_is_told_from_one_of_weights(
    quantized: tuple[str, ...],
) -> None:
    """Both factors in INT8 can overflow whatever the weights are; one in INT8 is no product."""
    nodes = []
    for name in quantized:
        nodes.append(node("QuantizeLinear", [name, "scale", "zero"], [f"{name}_q"]))
        nodes.append(node("DequantizeLinear", [f"{name}_q", "scale", "zero"], [f"{name}_d"]))
    query, key = (f"{name}_d" if name in quantized else name for name in ("q", "k"))
    nodes.append(node("Transpose", [key], ["k_t"], perm=[1, 0]))
    nodes.append(node("MatMul", [query, "k_t"], ["y"]))
    inputs = {name: (TensorProto.FLOAT, [2, 4]) for name in ("q", "k")}
    tensors = {"scale": np.float32(1), "zero": np.uint8(0)} if quantized else {}
    model = model_of(nodes, tensors, inputs, {"y": [2, 2]})
    assert int8_file.largest_pair(model) is None
    assert int8_file.multiplies_activations(model) == (len(quantized) == 2)
    assert bool(int8_file.overflow_causes(model)) == (len(quantized) == 2)


def test_weights_become_floating_point_with_the_scale_of_their_channel() -> None:
    model = linear(np.array([[1, -2], [3, 127]], np.int8))
    (weight,) = [each for each in model.graph.node if each.output[0] == "w_d"]
    weight.input[:] = ["w", "scales", "zeros"]
    weight.attribute.append(helper.make_attribute("axis", 1))
    for name, array in (
        ("scales", np.array([0.5, 2], np.float32)),
        ("zeros", np.zeros(2, np.int8)),
    ):
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    changed = int8_file.with_float_weights(model)
    assert int8_file.largest_pair(changed) is None
    values = {each.name: numpy_helper.to_array(each) for each in changed.graph.initializer}
    assert values["w_d"].tolist() == [[0.5, -4], [1.5, 254]]


def test_weights_are_no_activations() -> None:
    assert not int8_file.multiplies_activations(linear(np.ones((2, 2), np.int8)))


# ------------------------------------------------------------------------------------------------
# What runs a file

LENGTH = 16
VOCABULARY = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "alpha", "beta")
TEXT = "x alpha x x beta x"
# In exact sums alpha is first. Sums in 16 bits hold two of its products at 32767 of 64770, and
# then beta is, whose products lie apart.
STATES = np.tile(
    np.array([[0] * 4] * 4 + [[255, 255, 0, 0], [255, 0, 255, 0]], np.float32), (1, 16)
)
WEIGHT = np.tile(np.array([[127], [127], [20], [0]], np.int8), (16, 2))  # [64, 2]
PAIRS_WEIGHT = np.minimum(WEIGHT, 64)
LOGITS = STATES.astype(np.int64) @ WEIGHT[:, 0].astype(np.int64)  # of each token, exact

OLD = Cpu("Old CPU", ("avx2",))
NEW = Cpu("New CPU", ("avx2", "avx512", "vnni", "bf16"))
ARM = Cpu("Arm CPU", ("arm_dot_product",))
UNKNOWN = Cpu("Unknown CPU", ())


def qa_folder(folder: Path, weight: np.ndarray, *, of_activations: bool = False) -> str:
    """A QA model whose logits are rows of STATES times a weight [64, 2], INT8 or FP32.

    With `of_activations` the end's logits are products of those rows by one another.
    """
    folder.mkdir()
    tensors = {"table": STATES, "w": weight, "axes": np.array([2]), "no": np.array(0)}
    nodes = [
        node("Add", ["attention_mask", "token_type_ids"], ["some"]),
        node("Add", ["some", "position_ids"], ["others"]),
        node("Mul", ["others", "no"], ["nothing"]),  # a graph that uses all of its inputs
        node("Add", ["input_ids", "nothing"], ["ids"]),
        node("Gather", ["table", "ids"], ["x"]),
    ]
    factors = ["x", "w"]
    if weight.dtype == np.int8:
        tensors |= {"one": np.float32(1), "zero": np.uint8(0), "shift": np.int8(0)}
        nodes += [  # scales and zero points in all forms that are found in exported files
            node("Constant", [], ["scale"], value=numpy_helper.from_array(np.float32(1))),
            node("QuantizeLinear", ["x", "one", "zero"], ["x_q"]),
            node("DequantizeLinear", ["x_q", "one", "zero"], ["x_d"]),
            node("Identity", ["shift"], ["no_shift"]),
            node("DequantizeLinear", ["w", "scale", "no_shift"], ["w_d"]),
        ]
        factors = ["x_d", "w_d"]
    nodes.append(node("MatMul", factors, ["logits"]))
    nodes.append(node("Split", ["logits"], ["s", "e"], axis=2))
    nodes.append(node("Squeeze", ["s", "axes"], ["output_s"]))
    if of_activations:
        nodes.append(node("Transpose", ["x_d"], ["x_t"], perm=[0, 2, 1]))
        nodes.append(node("MatMul", ["x_d", "x_t"], ["products"]))
        nodes.append(node("ReduceMax", ["products"], ["output_e"], axes=[2], keepdims=0))
    else:
        nodes.append(node("Squeeze", ["e", "axes"], ["output_e"]))
    names = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
    inputs = {name: (TensorProto.INT64, [1, LENGTH]) for name in names}
    outputs = {name: [1, LENGTH] for name in ("output_s", "output_e")}
    onnx.save(model_of(nodes, tensors, inputs, outputs), folder / "model.onnx")
    words = WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"max_query_length": 4, "max_seq_length": LENGTH, "doc_stride": 4}
    settings |= {"max_answer_length": 30, "special_ids": {"cls": 1, "sep": 2, "pad": 0}}
    (folder / "reader.json").write_text(json.dumps({**settings, "null_threshold": None}))
    return str(folder)


@pytest.fixture
def full(tmp_path: Path) -> str:
    """A folder whose INT8 weights use the full range."""
    return qa_folder(tmp_path / "full", WEIGHT)


def load(folder: str, *asked: str) -> runtime.OnnxModel:
    return runtime.load_exported(folder, "--model", QA, runtime.Runtime(*asked))


def logits(model: runtime.OnnxModel) -> np.ndarray:
    """The start's logits of each token of the vocabulary."""
    ids = np.zeros((1, LENGTH), np.int64)
    ids[0, : len(VOCABULARY)] = np.arange(len(VOCABULARY))
    feed = {name: ids for name in ("input_ids", "attention_mask", "token_type_ids", "position_ids")}
    return model.compile(LENGTH)(feed)[0][0, : len(VOCABULARY)]


@pytest.fixture
def picked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What has been opened: the runtime and its options."""
    calls: list[tuple[Any, ...]] = []
    for name in ("in_openvino", "in_onnxruntime"):
        original = getattr(runtime, name)

        def opened(path: str, *options: Any, name: str = name, original: Any = original) -> Any:
            calls.append((name, *options))
            return original(path, *options)

        monkeypatch.setattr(runtime, name, opened)
    return calls


@pytest.mark.parametrize("cpu", [OLD, NEW, ARM, UNKNOWN], ids=str)
@pytest.mark.parametrize("weight", [PAIRS_WEIGHT, WEIGHT.astype(np.float32)], ids=["pairs", "fp32"])
def test_a_file_that_cannot_overflow_runs_in_openvino_in_f32_on_every_cpu(
    cpu: Cpu, weight: np.ndarray, tmp_path: Path, picked: list, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.setattr(runtime, "this_cpu", lambda: cpu)
    model = load(qa_folder(tmp_path / "qa", weight))
    assert picked == [("in_openvino", "f32", False)]
    assert model.arithmetic == "f32"
    note = f"note: --model {tmp_path / 'qa'} runs in f32; --runtime_precision=default is faster"
    assert capfd.readouterr().err == (f"{note} and less exact\n" if cpu.has_bf16 else "")
    assert logits(model).tolist() == (STATES @ weight[:, 0].astype(np.float32)).tolist()


def test_onnx_runtime_takes_the_file_made_for_it(tmp_path: Path) -> None:
    """In the file beside, the first answer has other logits, which tells which file has run."""
    folder = qa_folder(tmp_path / "qa", PAIRS_WEIGHT)
    other = Path(qa_folder(tmp_path / "other", -PAIRS_WEIGHT)) / "model.onnx"
    beside = Path(folder) / "model.ort.onnx"
    onnx.save(ort_file.converted(onnx.load(other)), beside)
    expected = STATES @ PAIRS_WEIGHT[:, 0].astype(np.float32)
    by_openvino, by_onnxruntime = load(folder), load(folder, "onnxruntime")
    assert logits(by_openvino).tolist() == expected.tolist()
    assert logits(by_onnxruntime).tolist() == (-expected).tolist()
    assert by_onnxruntime.arithmetic != by_openvino.arithmetic
    beside.write_bytes(beside.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"model\.ort\.onnx is cut or damaged"):
        load(folder, "onnxruntime")


@pytest.mark.parametrize("asked", ["auto", "onnxruntime"])
@pytest.mark.parametrize(
    "cpu,claim",
    [
        (OLD, "integer kernels without VNNI, and this CPU (Old CPU) has none; "),
        (ARM, "some integer kernels, and this CPU (Arm CPU) has not been tried; "),
        (UNKNOWN, "some integer kernels, and this CPU (Unknown CPU) has not been tried; "),
    ],
    ids=str,
)
def test_full_range_without_vnni_is_computed_in_floating_point_and_says_so_in_a_line(
    cpu: Cpu, claim: str, asked: str, full: str, picked: list, monkeypatch: Any, capfd: Any
) -> None:
    options: list[str] = []
    original = onnxruntime.InferenceSession

    def session(model: bytes, given: onnxruntime.SessionOptions, **others: Any) -> Any:
        options.append(given.get_session_config_entry("session.disable_quant_qdq"))
        return original(model, given, **others)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    monkeypatch.setattr(runtime, "this_cpu", lambda: cpu)
    model = load(full, asked)
    assert picked == [("in_onnxruntime", True)]
    assert options == ["1"]
    assert logits(model).tolist() == LOGITS.tolist()
    assert capfd.readouterr().err == (
        f"warning: --model {full}: its INT8 weights use the full range, which can overflow in"
        f" {claim}it runs in floating point, which is slower; quantize again with weight_range"
        " pairs\n"
    )


def test_full_range_with_vnni_runs_as_it_is(
    full: str, picked: list, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.setattr(runtime, "this_cpu", lambda: NEW)
    load(full), load(full, "onnxruntime")
    assert picked == [("in_openvino", "f32", False), ("in_onnxruntime", False)]
    assert "warning" not in capfd.readouterr().err


def test_without_openvino_onnx_runtime_is_taken(
    full: str, picked: list, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(runtime, "this_cpu", lambda: NEW)
    load(full)
    assert picked == [("in_onnxruntime", False)]


def test_openvino_where_it_is_asked_for_multiplies_full_range_weights_in_floating_point(
    full: str, picked: list, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.setattr(runtime, "this_cpu", lambda: OLD)
    model = load(full, "openvino")
    assert picked == [("in_openvino", "f32", True)]
    assert model.arithmetic == "f32"
    assert logits(model).tolist() == LOGITS.tolist()
    assert "it runs in floating point, which is slower" in capfd.readouterr().err


def test_openvino_says_that_products_of_activations_may_be_wrong(
    tmp_path: Path, picked: list, monkeypatch: Any, capfd: Any
) -> None:
    """And vectors made so are not taken for exact ones."""
    monkeypatch.setattr(runtime, "this_cpu", lambda: OLD)
    folder = qa_folder(tmp_path / "qa", PAIRS_WEIGHT, of_activations=True)
    assert load(folder, "openvino").arithmetic == "f32, overflows"
    (line,) = capfd.readouterr().err.splitlines()
    assert "it multiplies activations of 8 bits" in line
    assert "its numbers may be wrong, which --runtime=onnxruntime avoids" in line
    assert line.endswith("quantize again with weight_range pairs")
    assert load(folder).arithmetic == "f32"
    assert picked == [("in_openvino", "f32", True), ("in_onnxruntime", True)]


@pytest.mark.skipif(not this_cpu().has_bf16, reason="only a CPU with bf16 computes in it")
def test_special_tokens_may_have_any_names(full: str) -> None:
    path = Path(full, "tokenizer.json")
    path.write_text(path.read_text().replace("[SEP]", "</s>").replace("[CLS]", "<s>"))
    assert load(full).settings.special == SpecialIds(cls=1, sep=2, pad=0)


def test_openvino_takes_bf16_only_where_it_is_asked_to(tmp_path: Path) -> None:
    weight = (1 + np.arange(128, dtype=np.float32) / 1000).reshape(64, 2)  # more digits than bf16
    folder = qa_folder(tmp_path / "qa", weight)
    expected = STATES @ weight[:, 0]
    exact, other = load(folder), load(folder, "auto", "default")
    assert (exact.arithmetic, other.arithmetic) == ("f32", "bf16")
    assert logits(exact) == pytest.approx(expected, rel=1e-5)
    assert logits(other) == pytest.approx(expected, rel=1e-2)
    assert logits(other) != pytest.approx(expected, rel=1e-5)


# Where oneDNN is told to leave VNNI out, its integer kernels do overflow: no pretence.
IN_AVX2 = """
import sys, pathlib, deploy.cpu
from deploy.reader import Reader
import deploy.runtime as runtime
folder, cpuinfo, text = sys.argv[1:]
deploy.cpu.CPUINFO = pathlib.Path(cpuinfo)

def best(name):
    return Reader(folder, runtime=name)("who", text)[0].text

print(*map(best, ("auto", "onnxruntime", "openvino")))
runtime.this_cpu = lambda: deploy.cpu.Cpu("", ("vnni",))
print(best("openvino"))
"""


@pytest.mark.skipif("avx2" not in this_cpu().features, reason="these are kernels of x86")
def test_a_cpu_without_vnni_gives_the_answers_of_exact_sums(full: str, tmp_path: Path) -> None:
    """In every runtime; and the kernels that are avoided do give another answer."""
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name : Old CPU\nflags : fpu avx2\n")
    done = run(
        [sys.executable, "-c", IN_AVX2, full, str(cpuinfo), TEXT],
        cwd=ROOT,
        env={"ONEDNN_MAX_CPU_ISA": "AVX2"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["alpha alpha alpha", "beta"]
    assert done.stderr.count("warning: ") == 3
