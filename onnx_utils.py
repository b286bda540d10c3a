"""Export to one ONNX file that OpenVINO and ONNX Runtime take as it is, and its check.

The file declares static shapes [1, max_seq_length], as the model converters want them, but
nothing inside depends on them: it is traced with dynamic axes and the shapes are declared after.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from cli_utils import UserError

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")
QA_OUTPUTS = ("output_s", "output_e")
OPSET = 17  # the first with LayerNormalization, and one that openvino-dev 2024.6 still reads
MAX_DIFFERENCE = 1e-3  # of the outputs, between the file and PyTorch in FP32
MASKED = -1e4  # added to the scores of padding: 0 after softmax, and a number in FP16 too


class QaGraph(nn.Module):
    """What the QA file computes: four int64 [B, L] inputs to start and end logits [B, L]."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        token_type_ids: Tensor,
        position_ids: Tensor,
    ) -> tuple[Tensor, Tensor]:
        # As one [B, 1, 1, L] term that is added to the scores, the mask is part of an attention
        # pattern that OpenVINO fuses into one kernel, whatever the library makes of a 2-D mask.
        mask = (1.0 - attention_mask[:, None, None, :].to(torch.float32)) * MASKED
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=mask,
            token_type_ids=token_type_ids,
            position_ids=position_ids,
        )
        return outputs.start_logits, outputs.end_logits


def export_onnx(
    graph: nn.Module,
    path: str,
    batches: Sequence[dict[str, np.ndarray]],
    output_names: Sequence[str],
    max_seq_length: int,
) -> float:
    """Write `graph` to `path`, declared [1, max_seq_length], and compare it with PyTorch.

    Args:
        graph: a module in FP32 on the CPU from the four INPUTS to the outputs; outputs of shape
            [B, L] are declared [1, max_seq_length] too.
        batches: real inputs [1, max_seq_length] to compare on.

    Returns:
        the largest difference of the outputs over `batches`.

    Raises:
        UserError: the file cannot be written; the difference is over MAX_DIFFERENCE.
    """
    # The wrapper's own mode counts: the exporter restores it, and with it all modules' dropout.
    graph.eval()
    temporary = f"{path}.tmp"
    try:
        _trace(graph, temporary, batches[0], output_names, max_seq_length)
        onnx.checker.check_model(temporary)
        difference = compare(graph, temporary, batches)
        if not difference <= MAX_DIFFERENCE:
            raise UserError(
                f"the exported {path} differs from the PyTorch model by {difference:.2g} on real"
                f" windows, over {MAX_DIFFERENCE:g}; it was not kept"
            )
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        with contextlib.suppress(OSError):
            os.remove(temporary)
    return difference


def _trace(
    graph: nn.Module,
    path: str,
    example: dict[str, np.ndarray],
    output_names: Sequence[str],
    max_seq_length: int,
) -> None:
    """Write the graph, traced with dynamic axes, with static shapes declared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: `compare` runs it on other inputs
        torch.onnx.export(
            graph,
            tuple(torch.from_numpy(example[name]) for name in INPUTS),
            path,
            dynamo=False,  # its graphs keep OpenVINO's attention pattern
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=list(output_names),
            dynamic_axes={name: {0: "batch", 1: "length"} for name in (*INPUTS, *output_names)},
        )
    model = onnx.load(path)
    for value in [*model.graph.input, *model.graph.output]:
        for dim, size in zip(value.type.tensor_type.shape.dim, (1, max_seq_length), strict=True):
            dim.Clear()
            dim.dim_value = size
    onnx.save(model, path)


def compare(graph: nn.Module, path: str, batches: Sequence[dict[str, np.ndarray]]) -> float:
    """Largest absolute difference between the outputs of PyTorch and of ONNX Runtime."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch in batches:
        feed = {name: batch[name] for name in INPUTS}
        with torch.no_grad():
            expected = graph(*(torch.from_numpy(feed[name]) for name in INPUTS))
        for mine, theirs in zip(expected, session.run(None, feed), strict=True):
            gap = np.abs(mine.numpy() - theirs).max()
            worst = max(worst, float("inf") if np.isnan(gap) else float(gap))
    return worst
