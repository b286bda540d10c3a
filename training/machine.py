"""The machine a run uses: precision, processes, and models prepared for both."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from transformers import PreTrainedModel

from cli import UserError
from deploy.cpu import this_cpu

LAUNCH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "launch.py")
SHUTDOWN_SECONDS = 600  # for a signalled run to end its step and save; torchrun's default is 30
PRECISIONS = ("auto", "fp32", "bf16", "fp16")


def pick_precision(precision: str, no_cuda: bool) -> str:
    """Accelerate's name ("no", "bf16" or "fp16") for --precision on this machine.

    Raises:
        UserError: the hardware does not have this precision.
    """
    if torch.cuda.is_available() and not no_cuda:
        has_bf16, where = torch.cuda.is_bf16_supported(including_emulation=False), "this GPU"
    else:
        has_bf16, where = this_cpu().has_bf16, "this CPU"
        if precision == "fp16":
            raise UserError("--precision=fp16 needs a GPU; fp32 or auto is right on a CPU")
    if precision == "bf16" and not has_bf16:
        raise UserError(f"--precision=bf16: {where} has no bf16 arithmetic; use fp32 or auto")
    if precision == "auto" and where == "this GPU" and not has_bf16:
        has_fp16 = torch.cuda.get_device_capability() >= (7, 0)  # older GPUs are slow in it
        precision = "fp16" if has_fp16 else "fp32"
    elif precision == "auto":
        precision = "bf16" if has_bf16 else "fp32"
    return {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}[precision]


def launched() -> bool:
    """Whether torchrun, accelerate or the like started this process, and so chose how many run."""
    # `accelerate launch --num_processes=1` sets no WORLD_SIZE.
    return "WORLD_SIZE" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def process_count(no_cuda: bool) -> int:
    """The processes of this run, once `use_all_gpus` has launched them."""
    if launched():
        return int(os.environ.get("WORLD_SIZE", "1"))
    return 1 if no_cuda else max(1, torch.cuda.device_count())


def use_all_gpus(no_cuda: bool) -> None:
    """Start this script again with one process per GPU, if there are several GPUs.

    It does not return then: `launch.py` replaces this process, and gets its signals and gives the
    exit code.
    """
    count = process_count(no_cuda)
    if launched() or count == 1:
        return
    print(f"using {count} GPUs", flush=True)
    how = ["--standalone", f"--nproc_per_node={count}", f"--shutdown-timeout={SHUTDOWN_SECONDS}"]
    # -P: launch.py must not import the modules beside it.
    os.execv(sys.executable, [sys.executable, "-P", LAUNCH, *how, "--", *sys.argv])


def make_accelerator(precision: str, no_cuda: bool, seed: int) -> Accelerator:
    """The accelerator of this process; seeds all random generators."""
    mixed_precision = pick_precision(precision, no_cuda)
    if torch.cuda.is_available() and not no_cuda:
        # Add in a fixed order: a run that continues must end like one that was never stopped.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic: Any = torch.utils.deterministic  # torch replaces this module by a class
        deterministic.fill_uninitialized_memory = False
    # Without `cpu`, several processes on a machine without GPUs would not form a group.
    cpu = no_cuda or not torch.cuda.is_available()
    accelerator = Accelerator(mixed_precision=mixed_precision, cpu=cpu)
    set_seed(seed)
    # Denormal numbers slow a CPU down a hundredfold and change no figure.
    torch.set_flush_denormal(True)
    _keep_freed_memory()
    return accelerator


def part_generators(accelerator: Accelerator) -> None:
    """Give each process its own random numbers from here on, so that its dropout differs."""
    if accelerator.num_processes > 1:
        # The seed is drawn: else each stage would begin with the same numbers.
        torch.manual_seed(int(torch.randint(2**62, ())) + accelerator.process_index)


def _keep_freed_memory() -> None:
    """Make the C library, if it is glibc, keep the memory of freed tensors for new ones.

    By default it returns large blocks to the system at once. Each new block then costs a page
    fault per 4 KB: on a CPU a third of a training step.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: take all blocks from the heap ...
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: ... and do not shrink it


HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}


def in_half(teacher: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """A copy of a teacher whose linear layers hold their weights in the run's half precision.

    Under autocast its outputs are the teacher's, to the bit, but no pass needs to cast weights. In
    an FP32 run it is the teacher itself.
    """
    dtype = HALF.get(accelerator.mixed_precision)
    if dtype is None:
        return teacher
    teacher = copy.deepcopy(teacher)
    for module in teacher.modules():
        if isinstance(module, nn.Linear):
            module.to(dtype)
    return teacher


Compiled = list[tuple[nn.Module, Callable[..., object]]]  # layers with their compiled forward


def compiled_layers(model: nn.Module) -> Compiled:
    """The compiled layers of an encoder: operations between matrix products are fused.

    All layers share one compilation, for any number and length of texts. The list is empty if
    nothing can be compiled: without Triton, or if quantizers or gates hook into the layers.
    """
    encoder: Any = model.base_model  # a BertModel or a PackedBertModel
    layers = encoder.encoder.layer if hasattr(encoder, "encoder") else encoder.layers
    hooked = hasattr(model, "__nncf_hooks") or any(
        module._forward_pre_hooks or module._forward_hooks
        for layer in layers
        for module in layer.modules()
    )
    if not importlib.util.find_spec("triton") or hooked:
        return []
    torch._dynamo.config.suppress_errors = True  # layers that do not compile run as they are
    compile_ = functools.partial(torch.compile, dynamic=True)
    return [(layer, compile_(layer.forward)) for layer in layers]


@contextlib.contextmanager
def running(compiled: Compiled | tuple[()] = ()) -> Iterator[None]:
    """Run layers by their compiled forward, and let backward passes add in a fixed order.

    So a run that continues from a saved state ends like one never stopped, to the bit.
    """
    for layer, forward in compiled:
        layer.forward = forward
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(True, warn_only=False)  # flash attention reads this
    try:
        yield
    finally:
        for layer, _ in compiled:
            del layer.forward
        if torch.are_deterministic_algorithms_enabled():
            torch.use_deterministic_algorithms(True, warn_only=warn_only)


def linear_weights(model: nn.Module) -> int:
    """The number of weights of all linear layers."""
    layers = (module for module in model.modules() if isinstance(module, nn.Linear))
    return sum(layer.weight.numel() for layer in layers)
