"""The time of a step of quantization-aware training, in steps of the FP32 model.

    python -m benchmarks.int8_training [--precision=bf16] [--passes=4]

A step is forward, backward and AdamW, without a teacher and without dropout. The model with
quantizers runs with NNCF's reference functions, with ours as plain operations and with ours
compiled, in turn with the FP32 model in the same process; the table shows medians over the rounds.
The model is a BERT of 6 layers and hidden size 384 with random weights.
"""

from __future__ import annotations

import copy
import os
import statistics
import time
import types
from collections.abc import Callable

import torch
from nncf.torch.quantization import extensions
from nncf.torch.quantization.layers import AsymmetricQuantizer, SymmetricQuantizer
from nncf.torch.quantization.reference import ReferenceBackendType, ReferenceQuantize
from transformers import BertConfig, BertForQuestionAnswering

from bert.attention import fuse_attention
from cli import ArgumentParser, number, run_main
from deploy.cpu import this_cpu
from int8 import (
    calibration,
    fake_quantize,
)
from int8.settings import read_nncf_config
from int8.weight_range import hold
from squad_utils import INPUTS
from training.machine import make_accelerator

SIZES = {"hidden_size": 384, "num_hidden_layers": 6, "intermediate_size": 1536}
SIZES |= {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
LENGTH = 384  # tokens of a window
KINDS = (SymmetricQuantizer, AsymmetricQuantizer)
REFERENCE = ReferenceQuantize(ReferenceBackendType.TORCH)
FUNCTIONS = {"Quantize_forward": REFERENCE.forward, "Quantize_backward": REFERENCE.backward}


ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def by_nncf(quantizer: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    """NNCF's own forward, with the range of weights held as in ours."""
    if hasattr(quantizer, "weight_range"):
        hold(quantizer, x)
    return fake_quantize.REPLACED[type(quantizer)](quantizer, x)


def use(way: str) -> None:
    """Let all quantizers run in one of the ways of the table."""
    for kind in KINDS:
        kind._forward_impl = by_nncf if way == "NNCF" else fake_quantize.quantize
    fake_quantize.PLAIN_VALUES = 0 if way == "compiled" else float("inf")
    fake_quantize._Compiled.failed = way == "plain"


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add, positive = parser.add_argument, number(int, 1)
    add("--precision", choices=("fp32", "bf16"), default="fp32")
    add("--batch_size", type=positive, default=8, help="windows of one pass")
    add("--passes", type=positive, default=1, help="forward and backward passes per step")
    add(
        "--rounds", type=positive, default=7, help="timed steps of each model, after an untimed one"
    )
    args = parser.parse_args()
    accelerator = make_accelerator(args.precision, no_cuda=False, seed=0)
    device = accelerator.device
    for extension in (extensions.QuantizedFunctionsCPU, extensions.QuantizedFunctionsCUDA):
        extension._loaded_namespace = types.SimpleNamespace(**FUNCTIONS)  # not compiled
    model = BertForQuestionAnswering(BertConfig(**SIZES))
    ids = torch.randint(5, model.config.vocab_size, (args.batch_size, LENGTH))
    rest = (torch.ones_like(ids), torch.zeros_like(ids), torch.arange(LENGTH).expand_as(ids))
    batch = dict(zip(INPUTS, (ids, *rest), strict=True))
    settings = read_nncf_config(os.path.join(ROOT, "nncf_config.json"))
    int8 = fuse_attention(copy.deepcopy(model), separate_products=True)
    int8 = calibration.calibrate(int8, settings, [{key: batch[key][:1] for key in batch}])
    batch = {name: each.to(device) for name, each in batch.items()}

    def step_of(model: torch.nn.Module) -> Callable[[], None]:
        model.to(device).train()
        trained = (each for each in model.parameters() if each.requires_grad)
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True)

        def step() -> None:
            for _ in range(args.passes):
                with accelerator.autocast():
                    outputs = model(**batch)
                scores = outputs.start_logits + outputs.end_logits
                scores.float().log_softmax(1)[:, 3].mean().neg().backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return step

    fp32_step, int8_step = step_of(fuse_attention(model)), step_of(int8)
    seconds: dict[str, list[float]] = {way: [] for way in ("FP32", "NNCF", "plain", "compiled")}
    for _ in range(args.rounds + 1):
        for way in seconds:
            use(way)
            start = time.perf_counter()
            (fp32_step if way == "FP32" else int8_step)()
            seconds[way].append(time.perf_counter() - start)
    print(f"{this_cpu()}, {device.type}; {args.precision}; first step, then medians")
    for way, (first, *others) in seconds.items():
        median = statistics.median(others)
        ratio = median / statistics.median(seconds["FP32"][1:])
        rate = args.passes * ids.numel() / median
        print(f"{way:9}{first:7.2f} s{median:8.3f} s{ratio:6.2f} x FP32{rate:8.0f} tokens/s")


if __name__ == "__main__":
    run_main(main)
