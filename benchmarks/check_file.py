"""Repeat the export check on any folder and machine: model.onnx compared with PyTorch.

    python -m benchmarks.check_file --model=DIR --squad_dev_data=DEV [--windows=16 --length=128]

Under an emulator it shows the numbers of another CPU, e.g. one without VNNI:

    qemu-x86_64 -cpu Haswell $(realpath .venv/bin/python) -m benchmarks.check_file ...
"""

from __future__ import annotations

import dataclasses
import json
import os

import numpy as np

from cli import ArgumentParser, number, run_main


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="output folder of a QA model")
    add("--squad_dev_data", required=True)
    add("--windows", type=number(int, 1), default=16)
    add("--length", type=number(int, 80), default=128, help="tokens of a window")
    args = parser.parse_args()

    import onnx
    from transformers import AutoModelForQuestionAnswering

    import squad_utils
    from bert.model_folder import load_for_export, open_model
    from deploy import onnx_check, onnx_file
    from squad_utils import INPUTS
    from tasks import qa

    data = squad_utils.load_squad(args.squad_dev_data, "--squad_dev_data")
    tokenizer = open_model(args.model, "--model").tokenizer
    windows = qa.make_windows(data, tokenizer, 64, args.length, 64, for_training=False)
    chosen = np.linspace(0, len(windows) - 1, args.windows).astype(int)
    feeds = []
    for window in chosen:
        arrays = squad_utils.make_batch(windows, window[None], pad_to=args.length)
        feeds.append({name: arrays[name] for name in INPUTS})
    # The same file, declared for this length.
    file = onnx.load(os.path.join(args.model, "model.onnx"))
    for value in (*file.graph.input, *file.graph.output):
        value.type.tensor_type.shape.dim[1].dim_value = args.length
    path = os.path.join(args.model, f"model.{args.length}.{os.getpid()}.onnx")
    onnx.save(file, path)
    try:
        model, int8 = load_for_export(args.model, AutoModelForQuestionAnswering)
        check = onnx_check.check_file(
            path, onnx_file.ExportedGraph(model, qa.QaTask.outputs).eval(), feeds, int8
        )
    finally:
        os.remove(path)
    print(json.dumps({"passed": check.passed, **dataclasses.asdict(check)}, indent=1))


if __name__ == "__main__":
    run_main(main)
