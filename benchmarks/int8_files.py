"""INT8 files beside their FP32 model: F1, agreement with PyTorch, size, latency, in both runtimes.

    python -m benchmarks.int8_files --squad_dev_data=DEV --fp32=DIR --int8=DIR \
        [--other NAME=FILE.onnx|FILE.xml ...]

--other adds a file from another tool, e.g. Optimum Intel's static quantization of the same FP32
model. Its inputs must have the same names, and its outputs the order start, end. All files are
timed in turns in one run, each loaded anew for its turn. The table has the share of answers that
equal those of the fake-quantized PyTorch model in FP32 arithmetic, by SQuAD's exact match. Some
answers always differ, since no two programs add in the same order. To show how many, the PyTorch
model is also compared with itself after three changes in the last digits of its embedding
LayerNorm's gains.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from typing import Any

import numpy as np

import squad_utils
from cli import ArgumentParser, UserError, number, run_main
from deploy import timing
from deploy.runtime import for_onnxruntime
from deploy.squad_scores import exact_match, load_scorer

MOVED = 1e-6  # relative change of LayerNorm's gains; FP32 resolves 1.2e-7

Infer = Callable[[dict[str, np.ndarray]], tuple[np.ndarray, np.ndarray]]


def in_openvino(path: str, precision: str | None, length: int) -> Infer:
    """The file in OpenVINO at 1 x length; `precision` is its INFERENCE_PRECISION_HINT, None for
    the default."""
    import openvino

    config = {"PERFORMANCE_HINT": "LATENCY"}
    if precision:
        config["INFERENCE_PRECISION_HINT"] = precision
    core = openvino.Core()
    model = core.read_model(path)
    names = {each.any_name for each in model.inputs}
    model.reshape({name: [1, length] for name in names})
    compiled = core.compile_model(model, "CPU", config)

    def run(feed: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        result = compiled({name: feed[name] for name in names})
        return result[0], result[1]

    return run


def in_onnxruntime(path: str) -> Infer:
    """The file in ONNX Runtime, in the form made for it where there is one."""
    import onnxruntime

    path = for_onnxruntime(path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = {each.name for each in session.get_inputs()}
    return lambda feed: tuple(session.run(None, {n: feed[n] for n in names})[:2])


def in_pytorch(folder: str, moved: float = 0.0, seed: int = 0) -> Infer:
    """The checkpoint with its quantizers; `moved` changes its embedding LayerNorm's gains by
    random shares of them, which the seed gives."""
    import torch
    from transformers import AutoModelForQuestionAnswering

    from bert.model_folder import load_model, open_model

    model = load_model(open_model(folder, "--int8"), AutoModelForQuestionAnswering, True).eval()
    gains = model.bert.embeddings.LayerNorm.weight.data
    gains.mul_(1 + moved * torch.randn(gains.shape, generator=torch.Generator().manual_seed(seed)))

    def run(feed: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        with torch.no_grad():
            outputs = model(**{name: torch.from_numpy(each) for name, each in feed.items()})
        return outputs.start_logits.numpy(), outputs.end_logits.numpy()

    return run


def answers_of(run: Infer, data: Any, windows: Any, feeds: list[dict[str, np.ndarray]]) -> Any:
    """Question id -> answer."""
    found = squad_utils.Answers(data, windows)
    for window, feed in enumerate(feeds):
        found.add(np.array([window]), *run(feed))
    return found.texts()


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--squad_dev_data", required=True)
    add("--fp32", required=True, help="output folder of the FP32 model")
    add("--int8", required=True, help="output folder of train_qa.py --nncf_config")
    add("--other", action="append", default=[], help="name=file; several times")
    add("--rounds", type=number(int, 1, 1000), default=10, help="of all files")
    add("--json", help="write the figures to this file")
    args = parser.parse_args()

    from bert.model_folder import open_model
    from squad_utils import INPUTS
    from tasks import qa

    with open(os.path.join(args.int8, "metrics.json"), encoding="utf-8") as file:
        arguments = json.load(file)["arguments"]
    lengths = [arguments[key] for key in ("max_seq_length_q", "max_seq_length_c", "doc_stride")]
    data = squad_utils.load_squad(args.squad_dev_data, "--squad_dev_data")
    tokenizer = open_model(args.int8, "--int8").tokenizer
    windows = qa.make_windows(data, tokenizer, *lengths, for_training=False)
    feeds = []
    for window in range(len(windows)):
        arrays = squad_utils.make_batch(windows, np.array([window]), pad_to=lengths[1])
        feeds.append({name: arrays[name] for name in INPUTS})
    scorer = load_scorer(None, data)

    files = {"FP32": os.path.join(args.fp32, "model.onnx")}
    files["INT8"] = os.path.join(args.int8, "model.onnx")
    for text in args.other:
        name, equals, path = text.partition("=")
        if not equals or not os.path.isfile(path):
            raise UserError(f"--other: {text} is not name=file")
        files[name] = path
    loads: dict[tuple[str, str], Callable[[], Infer]] = {}
    for name, path in files.items():
        loads[name, "OpenVINO f32"] = functools.partial(in_openvino, path, "f32", lengths[1])
        loads[name, "OpenVINO default"] = functools.partial(in_openvino, path, None, lengths[1])
        if path.endswith(".onnx"):
            loads[name, "ONNX Runtime"] = functools.partial(in_onnxruntime, path)

    rows: dict[str, dict[str, float]] = {}
    reference = answers_of(in_pytorch(args.int8), data, windows, feeds)
    rows["INT8, PyTorch"] = {"f1": scorer(data, reference, {})["f1"]}
    moved = {
        ("INT8", f"PyTorch, {MOVED:.0e}, {seed}"): functools.partial(
            in_pytorch, args.int8, MOVED, seed
        )
        for seed in range(3)
    }
    for (name, runtime), load in {**moved, **loads}.items():
        found = answers_of(load(), data, windows, feeds)
        same = [exact_match(found[key], reference[key]) for key in reference]
        row = {"f1": scorer(data, found, {})["f1"]}
        if name == "INT8":
            row["same_answers"] = 100 * float(np.mean(same))
        rows[f"{name}, {runtime}"] = row
        print(f"{name}, {runtime}: {row}", flush=True)

    def load_with_feed(load: Callable[[], Infer]) -> timing.Run:
        return functools.partial(load(), feeds[0])

    taken = timing.milliseconds(
        {key: functools.partial(load_with_feed, load) for key, load in loads.items()}, args.rounds
    )
    for (name, runtime), each in taken.items():
        row = rows[f"{name}, {runtime}"]
        row["milliseconds"] = each
        size = os.path.getsize(files[name])
        weights = os.path.splitext(files[name])[0] + ".bin"
        beside = os.path.getsize(weights) if files[name].endswith(".xml") else 0
        row["megabytes"] = (size + beside) / 1e6
    print(f"\n{'':28}{'F1':>8}{'same answers':>14}{'ms':>9}{'MB':>9}")
    for name, row in rows.items():
        cells = [f"{row['f1']:8.2f}"]
        for key, width in (("same_answers", 14), ("milliseconds", 9), ("megabytes", 9)):
            cells.append(f"{row[key]:{width}.2f}" if key in row else " " * width)
        print(f"{name:28}" + "".join(cells))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    run_main(main)
