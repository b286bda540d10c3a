"""Latency of FP32 and INT8 files in OpenVINO and ONNX Runtime, 1 x 384, alternating in one run.

    python -m benchmarks.latency [--model teacher=DIR --model "teacher, INT8=DIR"] \
        [--random BERT-small,h192]

Each round times every file in every runtime and precision. The table shows medians over rounds,
how many times faster a model is than the first one of its group, and how many times faster
"NAME, INT8" is than NAME. --random exports models with random weights, which do not change the
latency: shapes of SHAPES, each in FP32 and quantized by nncf_config.json.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cli import ArgumentParser, UserError, first_line, number, run_main
from deploy import timing

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

LENGTH = 384
INT8 = ", INT8"  # after the name of a model: the same model, quantized
BASES: dict[str, dict[str, Any]] = {  # a group of SHAPES starts with each
    "BERT-small": {
        "hidden_size": 384,
        "num_hidden_layers": 6,
        "num_attention_heads": 12,
        "intermediate_size": 1536,
    },
    "BERT-large": {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
}
# Name -> one of BASES, and --pack_cfg where it differs from the default; None: not packed.
SHAPES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "BERT-small": ("BERT-small", None),
    **{
        f"h{hidden}": (
            "BERT-small",
            {"num_hidden_layers": 6, "num_attention_heads": heads, "hidden_size": hidden},
        )
        for heads, hidden in ((6, 192), (9, 252), (12, 288))
    },
    "BERT-large": ("BERT-large", None),
    "h512": ("BERT-large", {}),
}


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


def random_model(shape: str) -> PreTrainedModel:
    """A reader of a shape of SHAPES, merged if it is packed."""
    import torch
    from transformers import BertConfig, BertForQuestionAnswering

    from bert.packed import PackedBertForQuestionAnswering
    from bert_pack import PackCfg, packed_config

    base, changes = SHAPES[shape]
    config = BertConfig(vocab_size=30522, **BASES[base])
    torch.manual_seed(0)
    if changes is None:
        return BertForQuestionAnswering(config).eval()
    pack_cfg = PackCfg(**changes)
    packed = packed_config(config, pack_cfg)
    packed.merged, packed.num_attention_heads = True, pack_cfg.num_attention_heads
    return PackedBertForQuestionAnswering(packed).eval()


def export_random(shapes: Sequence[str], folder: str) -> dict[str, str]:
    """Export models with random weights, each in FP32 and in INT8; give the paths by name."""
    import torch

    from bert.attention import fuse_attention
    from deploy import onnx_file
    from int8 import calibration, quantizers, settings
    from tasks import qa

    paths = {}
    batch = inputs()
    sample = {key: torch.from_numpy(value) for key, value in batch.items()}
    config = settings.read_nncf_config(os.path.join(ROOT, "nncf_config.json"))
    for shape in shapes:
        for name in (shape, f"{shape}{INT8}"):
            print(f"exporting {name} ...", flush=True)
            model, int8 = random_model(shape), name.endswith(INT8)
            if int8:
                model = fuse_attention(model, separate_products=True)
                calibration.check_scope(config, model)
                model = calibration.calibrate(model, config, [sample] * 2)
                quantizers.make_exportable(model)
            elif SHAPES[shape][1] is None:
                model.set_attn_implementation("eager")
            os.makedirs(os.path.join(folder, name))
            paths[name] = os.path.join(folder, name, "model.onnx")
            graph = onnx_file.ExportedGraph(model, qa.QaTask.outputs)
            onnx_file.export_onnx(graph, paths[name], [batch], int8)
    return paths


def refuse(name: str, way: str, error: Exception) -> None:
    """End the run: a table with a gap would mislead."""
    raise UserError(f"{name} does not run in {way}: {first_line(error)}")


def table(results: dict[str, dict[str, float]], sizes: dict[str, float]) -> str:
    """The figures as Markdown.

    Args:
        results: milliseconds by file and way to run it, the first file of a group before others.
        sizes: megabytes by file.
    """
    lines = [f"| | MB | {' | '.join(timing.WAYS)} |", f"|{'---|' * (2 + len(timing.WAYS))}"]
    first = ""
    for name, row in results.items():
        if not first or name in BASES:
            first = name
        cells = []
        for way, taken in row.items():
            factors = [f"{results[first][way] / taken:.1f} times"] if name != first else []
            plain = name.removesuffix(INT8)
            if plain not in (name, first) and plain in results:
                factors.append(f"its FP32: {results[plain][way] / taken:.2f}")
            cells.append(f"{taken:.1f}" + (f" ({', '.join(factors)})" if factors else ""))
        lines.append(f"| {name} | {sizes[name]:.1f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model", action="append", default=[], help="name=folder with model.onnx; several times")
    add("--random", default="", help=f"random weights; comma-separated, of {', '.join(SHAPES)}")
    add("--rounds", type=number(int, 1, 1000), default=10, help="with a turn for every file")
    add("--json", help="write the figures to this file")
    args = parser.parse_args()
    pairs: dict[str, str] = {}
    for text in args.model:
        name, equals, folder = text.partition("=")
        path = os.path.join(folder, "model.onnx")
        if not equals or not os.path.isfile(path):
            raise UserError(f"--model: {text} is not name=folder of a folder with model.onnx")
        pairs[name] = path
    shapes = args.random.split(",") if args.random else []
    for shape in shapes:
        if shape not in SHAPES:
            raise UserError(f"--random: {shape!r} is none of {', '.join(SHAPES)}")
    if not pairs and not shapes:
        raise UserError("--model name=folder or --random is needed")
    with tempfile.TemporaryDirectory() as folder:
        paths = pairs | export_random(shapes, folder)
        results = timing.time_files(paths, LENGTH, args.rounds, failed=refuse)
        sizes = {name: os.path.getsize(path) / 1e6 for name, path in paths.items()}
    print(f"\n{table(results, sizes)}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(results, file, indent=1)


if __name__ == "__main__":
    run_main(main)
