"""Latency of exported models in OpenVINO and ONNX Runtime, 1 x 384, alternating in one run.

    python -m benchmarks.latency --model teacher=DIR --model student=DIR --bert_large

Each round times every model in every runtime and precision. The table shows medians over rounds,
and how many times faster a model is than the first one. --bert_large adds
BERT-large, packed by the default --pack_cfg of pack_and_distill.py, and packed and quantized by
nncf_config.json. Its weights and calibration tokens are random, which does not change the latency.
"""

from __future__ import annotations

import json
import os
import tempfile

import numpy as np

from cli import ArgumentParser, UserError, number, run_main
from deploy import timing

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

LENGTH = 384


def inputs() -> dict[str, np.ndarray]:
    """Random tokens, none of them padding."""
    rng = np.random.default_rng(0)
    row = np.ones((1, LENGTH), np.int64)
    return {
        "input_ids": rng.integers(1000, 20000, (1, LENGTH)),
        "attention_mask": row,
        "token_type_ids": (np.arange(LENGTH)[None] > 20) * row,
        "position_ids": np.arange(LENGTH)[None] * row,
    }


def export_random(folder: str) -> dict[str, str]:
    """Export BERT-large, packed and in INT8 too, with random weights; give the paths by name."""
    import torch
    from transformers import BertConfig, BertForQuestionAnswering

    from bert.attention import fuse_attention
    from bert.packed import PackedBertForQuestionAnswering
    from bert_pack import PackCfg, packed_config
    from deploy import onnx_file
    from int8 import calibration, quantizers, settings
    from tasks import qa

    large = BertConfig(
        vocab_size=30522,
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
    )
    small = packed_config(large, PackCfg())
    small.merged, small.num_attention_heads = True, PackCfg().num_attention_heads
    paths = {}
    batch = inputs()
    sample = {key: torch.from_numpy(value) for key, value in batch.items()}
    nncf_config = settings.read_nncf_config(os.path.join(ROOT, "nncf_config.json"))
    for name, model_class, config in (
        ("BERT-large", BertForQuestionAnswering, large),
        ("BERT-large packed", PackedBertForQuestionAnswering, small),
        ("BERT-large INT8", PackedBertForQuestionAnswering, small),
    ):
        print(f"exporting {name} ...", flush=True)
        torch.manual_seed(0)
        model = model_class(config).eval()
        if model_class is BertForQuestionAnswering:
            model.set_attn_implementation("eager")
        int8 = name.endswith("INT8")
        if int8:
            model = fuse_attention(model, separate_products=True)
            calibration.check_scope(nncf_config, model)
            model = calibration.calibrate(model, nncf_config, [sample] * 2)
            quantizers.make_exportable(model)
        paths[name] = os.path.join(folder, f"{name}.onnx")
        graph = onnx_file.ExportedGraph(model, qa.QaTask.outputs)
        onnx_file.export_onnx(graph, paths[name], [batch], int8)
        print(f"  {os.path.getsize(paths[name]) / 1e6:.1f} MB", flush=True)
    return paths


def measure(paths: dict[str, str], rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Median milliseconds of each model in each way to run it."""
    runs = {
        (name, way): timing.compiled(path, way, LENGTH)
        for name, path in paths.items()
        for way in timing.WAYS
    }
    found = timing.milliseconds(runs, rounds, turn=seconds, calls=10**6)
    return {name: {way: found[name, way] for way in timing.WAYS} for name in paths}


def show(results: dict[str, dict[str, float]]) -> None:
    """Print the table; the factors compare a model with the first one of its group."""
    print(f"\n{'ms, 1 x 384':22}" + "".join(f"{column:>26}" for column in timing.WAYS))
    for name, row in results.items():
        first = results[next(iter(results)) if "BERT-large" not in name else "BERT-large"]
        cells = []
        for column in timing.WAYS:
            same, f32 = first[column] / row[column], first["OpenVINO f32"] / row[column]
            cells.append(f"{row[column]:10.2f} {same:6.2f}x {f32:6.2f}x")
        print(f"{name:22}" + "".join(f"{cell:>26}" for cell in cells))
    print(
        "first factor: speed over the first model's in this column; second: over its OpenVINO f32"
    )


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", action="append", default=[], help="name=folder with model.onnx; several times")
    add("--bert_large", action="store_true", help="BERT-large, packed, INT8; random weights")
    add(
        "--rounds",
        type=number(int, 1, 1000),
        default=5,
        help="rounds, each with a turn for every file",
    )
    add("--seconds", type=number(float, 0, 60, True), default=2.0, help="per file and round")
    add("--json", help="write the figures to this file")
    args = parser.parse_args()
    pairs: dict[str, str] = {}
    for text in args.model:
        name, equals, folder = text.partition("=")
        path = os.path.join(folder, "model.onnx")
        if not equals or not os.path.isfile(path):
            raise UserError(f"--model: {text} is not name=folder of a folder with model.onnx")
        pairs[name] = path
    if not pairs and not args.bert_large:
        raise UserError("--model name=folder or --bert_large is needed")
    results: dict[str, dict[str, float]] = {}
    if pairs:
        results.update(measure(pairs, args.rounds, args.seconds))
    if args.bert_large:
        with tempfile.TemporaryDirectory() as folder:
            large = export_random(folder)
            results.update(measure(large, args.rounds, args.seconds))
    show(results)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    run_main(main)
