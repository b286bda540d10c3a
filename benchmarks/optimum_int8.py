"""Post-training INT8 of an FP32 QA model by Optimum Intel, on our calibration windows.

Optimum Intel pins an older transformers, so it has an environment of its own:

    pip install torch==2.13.0 "optimum-intel[openvino,nncf]==2.2.0" "datasets<5" \
        accelerate onnx onnxruntime
    python -m benchmarks.optimum_int8 --model=DIR --squad_train_data=TRAIN --output_dir=DIR

The result, openvino_model.xml, goes to benchmarks/int8_files.py as --other.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from cli import ArgumentParser, number, run_main


def calibration_windows(model: str, data: str, count: int) -> Iterator[dict[str, Any]]:
    """The windows on which train_qa.py --nncf_config calibrates a model, as tensors [1, 384]."""
    from transformers import AutoTokenizer

    from tasks.qa import QaTask

    settings = argparse.Namespace(
        squad_train_data=data,
        squad_dev_data=data,
        squad_eval_script=None,
        max_seq_length_q=64,
        max_seq_length_c=384,
        max_answer_length=30,
        doc_stride=128,
        negative_windows=0,
        per_gpu_eval_batch_size=1,
        seed=42,
    )
    task = QaTask(settings)
    task.tokenize(AutoTokenizer.from_pretrained(model))
    return task.calibration(count)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="output folder of train_qa.py, FP32, not packed")
    add("--squad_train_data", required=True)
    add("--output_dir", required=True)
    add("--subset_size", type=number(int, 1), default=300, help="windows to calibrate on")
    args = parser.parse_args()

    import nncf
    from optimum.intel import (
        OVConfig,
        OVModelForQuestionAnswering,
        OVQuantizationConfig,
        OVQuantizer,
    )

    model = OVModelForQuestionAnswering.from_pretrained(args.model, export=True)
    names = {each.any_name for each in model.model.inputs}
    windows = [
        {name: tensor.numpy() for name, tensor in window.items() if name in names}
        for window in calibration_windows(args.model, args.squad_train_data, args.subset_size)
    ]
    config = OVConfig(quantization_config=OVQuantizationConfig(num_samples=len(windows)))
    OVQuantizer.from_pretrained(model).quantize(
        nncf.Dataset(windows), save_directory=args.output_dir, ov_config=config
    )


if __name__ == "__main__":
    run_main(main)
