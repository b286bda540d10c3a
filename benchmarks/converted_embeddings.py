"""The Open Model Zoo's embedding demo contract: two reshaped instances of one converted file.

    mo --input_model DIR/model.onnx --output_dir mo      # or ovc
    python -m benchmarks.converted_embeddings --model_emb=DIR --squad_data=DEV --ir=mo/model.xml

One instance takes questions, one contexts; their L2 distances are compared with PyTorch's.
"""

from __future__ import annotations

import numpy as np
import openvino
import torch
from torch import Tensor

from bert.embedding import AutoModelForEmbedding
from bert.model_folder import load_model, open_model
from cli import ArgumentParser, number, run_main
from squad_utils import (
    INPUTS,
    load_squad,
)
from tasks.embedding import ranks, retrieval_figures
from tasks.embedding_loss import all_distances
from tasks.texts import Texts, make_pairs


def in_pytorch(model: torch.nn.Module, texts: Texts) -> Tensor:
    """Vectors of all texts, in FP32."""
    found = []
    for text in range(len(texts)):
        arrays = texts.batch(np.array([text]))
        with torch.no_grad():
            found.append(model(**{k: torch.from_numpy(v) for k, v in arrays.items()}).embedding)
    return torch.cat(found)


def in_openvino(path: str, texts: Texts, length: int) -> Tensor:
    """Vectors of all texts by an instance of the file reshaped to [1, length]."""
    core = openvino.Core()
    network = core.read_model(path)
    network.reshape({name: [1, length] for name in INPUTS})
    compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = []
    for text in range(len(texts)):
        arrays = texts.batch(np.array([text]), pad_to=length)
        found.append(torch.from_numpy(compiled(arrays)["embedding"].copy()))
    return torch.cat(found)


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--model_emb", required=True, help="output folder of train_qcemb.py")
    add("--squad_data", required=True, help="SQuAD JSON")
    add("--ir", action="append", required=True, help="converted file (.xml); several times")
    add("--max_seq_length_q", type=number(int, 8), default=32)
    add("--max_seq_length_c", type=number(int, 8), default=384)
    args = parser.parse_args()
    lengths = (args.max_seq_length_q, args.max_seq_length_c)
    opened = open_model(args.model_emb, "--model_emb")
    pairs = make_pairs(load_squad(args.squad_data, "--squad_data"), opened.tokenizer, *lengths)
    own = torch.from_numpy(pairs.context)
    model = load_model(opened, AutoModelForEmbedding, quiet=True).eval()
    vectors = {"PyTorch": [in_pytorch(model, t) for t in (pairs.questions, pairs.contexts)]}
    for path in args.ir:
        both = zip((pairs.questions, pairs.contexts), lengths, strict=True)
        vectors[path] = [in_openvino(path, texts, length) for texts, length in both]
    wanted = all_distances(*vectors["PyTorch"])
    for name, (questions, contexts) in vectors.items():
        found = all_distances(questions, contexts)
        figures = retrieval_figures(ranks(questions[pairs.question], contexts, own))
        same = (found.argmin(dim=1) == wanted.argmin(dim=1)).double().mean() * 100
        print(
            f"{name}: top 1 {figures['top_1']:.2f}, top 5 {figures['top_5']:.2f}, nearest context"
            f" as PyTorch's for {same:.2f}% of questions, distances differ by at most"
            f" {float((found - wanted).abs().max()):.2g} (mean distance {float(wanted.mean()):.3g})"
        )


if __name__ == "__main__":
    run_main(main)
