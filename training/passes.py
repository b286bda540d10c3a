"""The gradient of an optimisation step, in passes that fit the memory, on any number of processes.

A loss is one figure per example and a step's loss is their mean, so a step's gradient is the same,
to rounding, however its examples are spread over processes and passes. On a CPU a pass takes as
many examples as the flag says. On a GPU it takes as many as the memory holds.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch.distributed
from accelerate import Accelerator
from torch import Tensor, nn

import squad_utils
from cli import UserError, first_line, warn
from training.machine import Compiled, compiled_layers, linear_weights, running

PROBE_TOKENS = 2048  # of the first of two passes that tell how much memory a token takes
MEMORY_SHARE = 0.85  # of the memory that passes may fill, by that estimate
COUNTS = ("tokens", "positions")
LAUNCH_BOUND = 0.7  # share of a pass's time in which the CPU launches kernels: a graph pays
MAX_GRAPHS = 64
COMPILE_OPERATIONS = 1e16  # of a stage on a GPU, from which on half a minute to compile is repaid
WARM_UP_SHAPE = (16, 128)  # of the texts that layers are compiled by, whatever the run's are


class Batches(ABC):
    """What a task gives the loop. The same for every process and accumulation."""

    @abstractmethod
    def steps(self, epoch: int) -> list[np.ndarray]:
        """The examples of each optimisation step of an epoch, as indices."""

    @abstractmethod
    def tokens(self, chosen: np.ndarray) -> np.ndarray:
        """Tokens of each example, int64 [len(chosen)], padding left out."""

    @abstractmethod
    def batch(self, epoch: int, chosen: np.ndarray) -> dict[str, Tensor]:
        """The batch of a few examples; `attention_mask` [B, L] among its tensors."""

    def prepare(  # noqa: B027 - most tasks have nothing to prepare
        self, model: nn.Module, step: int, chosen: np.ndarray
    ) -> None:
        """Called with the examples of a step before its batches are made."""


# From model and batch to named losses, each [B], one figure an example. The sum is minimised.
LossFunction = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]


class StepGradient:
    """Leaves in the parameters the gradient of a step's mean loss.

    Attributes:
        names: of the figures that a call returns, known after the first.
        pass_tokens: tokens of one pass on a GPU, padding included; None until the first step has
            measured what fits, and on a CPU.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        batches: Batches,
        loss_function: LossFunction,
        micro_batch_size: int,
        total_steps: int = 1,
    ) -> None:
        """Prepare for the steps of a stage.

        Args:
            micro_batch_size: examples of a pass on a CPU.
            total_steps: of the whole stage; long ones are worth compiling for.
        """
        self.accelerator, self.model, self.batches = accelerator, model, batches
        self.loss_function, self.micro_batch_size = loss_function, micro_batch_size
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.names: list[str] = []
        self.pass_tokens: int | None = None
        self.on_gpu = accelerator.device.type == "cuda"
        self.compiled = self._compile(total_steps) if self.on_gpu else []
        self.graphs = (
            GraphedPasses(self._run, self.trained) if self.on_gpu and not drops(model) else None
        )

    def __call__(self, epoch: int, chosen: np.ndarray) -> Tensor:
        """Add the gradient of the mean loss over the examples `chosen` of an epoch.

        Returns:
            float64 [len(names)], on the device: the mean of each named loss; the numbers of
            "tokens" and of "positions" (tokens and padding). Over all processes.
        """
        if self.on_gpu and self.pass_tokens is None:
            self.pass_tokens = self._measure(epoch, chosen)
        while True:
            try:
                figures = self._share_of_step(epoch, chosen)
                break
            except torch.OutOfMemoryError:
                # The traceback would keep the tensors of the pass alive: get out of it first.
                pass
            self._halve(chosen)
        if self.accelerator.num_processes > 1:
            make_gradients(self.trained)
            waits = [
                torch.distributed.all_reduce(gradient, async_op=True)
                for gradient in self._gradients()
            ]
            figures = self.accelerator.reduce(figures, reduction="sum")
            for wait in waits:
                wait.wait()
        return figures

    def all_pass_tokens(self) -> list[int]:
        """`pass_tokens` of each process, 0 for None: a run goes on with what it had."""
        mine = torch.tensor([self.pass_tokens or 0], device=self.accelerator.device)
        return self.accelerator.gather(mine).tolist()

    def set_pass_tokens(self, saved: list[int]) -> None:
        """Go on with passes as they were, where the processes are as many as they were."""
        if self.on_gpu and len(saved) == self.accelerator.num_processes:
            self.pass_tokens = saved[self.accelerator.process_index] or None

    @property
    def gradients_stay(self) -> bool:
        """Whether a step's gradients are to be set to 0, and not dropped: graphs add to them in
        place."""
        return self.graphs is not None and bool(self.graphs.captured)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.trained if parameter.grad is not None]

    # -- a process's share

    def _passes(self, chosen: np.ndarray) -> list[np.ndarray]:
        """The examples of each pass of this process; none if there are fewer than processes."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if self.pass_tokens is None:
            # A small step is shared out as well as it goes.
            size = min(self.micro_batch_size, -(-len(chosen) // world))
            return np.split(chosen, range(size, len(chosen), size))[rank::world]
        mine = chosen[rank::world]
        if not len(mine):
            return []
        # Rows of a pass are as long as its longest.
        longest = squad_utils.padded(int(self.batches.tokens(mine).max()))
        rows = max(1, self.pass_tokens // longest)
        return np.array_split(mine, -(-len(mine) // rows))

    def _share_of_step(self, epoch: int, chosen: np.ndarray) -> Tensor:
        device = self.accelerator.device
        passes, weight = self._passes(chosen), 1.0 / len(chosen)
        if not passes:  # it goes through one example with weight 0, to know what figures there are
            passes, weight = [chosen[:1]], 0.0
        tokens = positions = 0
        losses: Tensor | None = None
        for examples in passes:
            batch = self.batches.batch(epoch, examples)
            if weight:
                tokens += int(batch["attention_mask"].sum())  # on the CPU still
                positions += batch["attention_mask"].numel()
            batch = to_device(batch, device)
            figures = self.graphs(batch, weight) if self.graphs else self._run(batch, weight)
            losses = figures if losses is None else losses + figures
        assert losses is not None  # there is a pass
        counts = torch.tensor([tokens, positions], dtype=torch.float64)
        return torch.cat([losses, counts.to(device, non_blocking=True)])

    def _run(self, batch: dict[str, Tensor], weight: float | Tensor) -> Tensor:
        """Forward and backward of one pass; the sums of its losses times weight."""
        with running(self.compiled):
            losses = self.loss_function(self.model, batch)
            self.names = [*losses, *COUNTS]
            self.accelerator.backward(torch.stack(list(losses.values())).sum() * weight)
        return torch.stack([each.detach().double().sum() * weight for each in losses.values()])

    def _compile(self, total_steps: int) -> Compiled:
        """The compiled layers of the model and its teacher, if the stage is long enough for that.

        They are compiled by texts of one shape: sums may be split by the shape that comes first,
        and a run that goes on has another first step than one that was never stopped.
        """
        teacher = getattr(self.loss_function, "teacher", None)
        models = [self.model] if teacher is None else [self.model, teacher]
        weights = 6 * linear_weights(self.model) + (2 * linear_weights(teacher) if teacher else 0)
        first = self.batches.steps(0)[0]
        if weights * self.batches.tokens(first).sum() * total_steps < COMPILE_OPERATIONS:
            return []
        compiled = [layer for model in models for layer in compiled_layers(model)]
        ids = torch.zeros(WARM_UP_SHAPE, dtype=torch.int64, device=self.accelerator.device)
        names = ("input_ids", "token_type_ids", "position_ids")
        with running(compiled):
            inputs = {**dict.fromkeys(names, ids), "attention_mask": torch.ones_like(ids)}
            self.model(**inputs)[0].float().sum().backward()
        for parameter in self.trained:
            parameter.grad = None
        return compiled

    # -- the memory of a GPU

    def _measure(self, epoch: int, chosen: np.ndarray) -> int:
        """Tokens that fit in one pass, from the memory that two small ones take."""
        tokens = self.batches.tokens(chosen)
        longest = chosen[np.argsort(-tokens, kind="stable")]
        device, cost = self.accelerator.device, squad_utils.padded(int(tokens.max()))
        sizes = [max(1, PROBE_TOKENS // cost), max(2, 2 * PROBE_TOKENS // cost)]
        if sizes[1] > len(longest):
            return cost * len(longest)  # a step that is hardly more than the probe
        peaks = []
        for size in [sizes[0], *sizes]:  # the first is not measured: caches fill, kernels load
            batch = to_device(self.batches.batch(epoch, longest[:size]), device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            self._run(batch, 0.0)
            peaks.append(torch.cuda.max_memory_allocated(device) - before)
        for gradient in self._gradients():
            gradient.zero_()
        each = max(1.0, (peaks[2] - peaks[1]) / (cost * (sizes[1] - sizes[0])))
        once = max(0.0, peaks[1] - each * cost * sizes[0])
        free = torch.cuda.mem_get_info(device)[0]
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        # AdamW's two moments come with the first step.
        free -= 8 * sum(parameter.numel() for parameter in self.trained)
        return max(cost, int((free * MEMORY_SHARE - once) / each))

    def _halve(self, chosen: np.ndarray) -> None:
        """After a pass that did not fit: forget its part of the gradient, and take half of it."""
        passes = self._passes(chosen)
        largest = max(len(examples) for examples in passes)
        if self.pass_tokens is None or largest == 1:
            raise UserError(
                "the GPU's memory does not hold the training of one example; a shorter"
                " --max_seq_length_c, a smaller model or a larger GPU would"
            )
        cost = max(int(self.batches.tokens(examples).max()) for examples in passes)
        self.pass_tokens = max(1, min(self.pass_tokens, largest * cost) // 2)
        for gradient in self._gradients():
            gradient.zero_()
        if self.graphs:
            self.graphs.forget()
        torch.cuda.empty_cache()
        warn(f"the GPU's memory is full: passes take {self.pass_tokens:,} tokens from now on")


def make_gradients(parameters: list[nn.Parameter]) -> None:
    """Gradients of 0 where there are none: graphs add to them in place, processes sum them."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def drops(model: nn.Module) -> bool:
    """Whether a model has dropout that is on: a graph would not draw what an eager pass draws."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The batch's tensors on `device`; to a GPU without waiting for it."""
    if device.type == "cuda":
        batch = {n: t if t.is_cuda else t.pin_memory() for n, t in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


Shape = tuple[tuple[str, torch.Size], ...]  # of a batch's tensors, by name


class GraphedPasses:
    """Passes replayed as CUDA graphs, one for each shape of a batch, where that is faster.

    A small model's kernels take less time than the CPU needs to launch them one by one; a graph
    launches them all at once.
    """

    def __init__(
        self,
        run_pass: Callable[[dict[str, Tensor], Tensor], Tensor],
        trained: list[nn.Parameter],
    ) -> None:
        self.run_pass, self.trained, self.off = run_pass, trained, False
        self.forget()

    def forget(self) -> None:
        """Drop all graphs and their memory."""
        self.seen: dict[Shape, int] = {}
        self.pays: dict[Shape, bool] = {}
        self.captured: dict[Shape, tuple[torch.cuda.CUDAGraph, dict[str, Tensor], Tensor]] = {}
        self.pool: torch.cuda._POOL_HANDLE | None = None

    def __call__(self, batch: dict[str, Tensor], weight: float) -> Tensor:
        """As `run_pass`: eagerly at first, and later by a graph if launching takes most of it."""
        shape = tuple((name, tensor.shape) for name, tensor in batch.items())
        self.seen[shape] = self.seen.get(shape, 0) + 1
        scale = torch.tensor(weight, dtype=torch.float64).to("cuda", non_blocking=True)
        if self.off or self.seen[shape] == 1:
            return self.run_pass(batch, scale)
        if self.seen[shape] == 2:
            return self._timed(shape, batch, scale)
        if shape not in self.captured and self.pays.get(shape) and len(self.captured) < MAX_GRAPHS:
            self._capture(shape, batch, scale)
        if shape not in self.captured:
            return self.run_pass(batch, scale)
        graph, inputs, figures = self.captured[shape]
        for name, tensor in {**batch, "weight": scale}.items():
            inputs[name].copy_(tensor, non_blocking=True)
        graph.replay()
        return figures.clone()

    def _timed(self, shape: Shape, batch: dict[str, Tensor], weight: Tensor) -> Tensor:
        """A pass on a stream of its own, as one must be before a capture; what launching took."""
        make_gradients(self.trained)  # not on that stream
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        began = time.perf_counter()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            figures = self.run_pass(batch, weight)
        launched = time.perf_counter() - began
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self.pays[shape] = launched > LAUNCH_BOUND * (time.perf_counter() - began)
        return figures

    def _capture(self, shape: Shape, batch: dict[str, Tensor], weight: Tensor) -> None:
        inputs = {name: tensor.clone() for name, tensor in {**batch, "weight": weight}.items()}
        make_gradients(self.trained)
        graph = torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        try:
            with torch.cuda.graph(graph, pool=self.pool):
                rest = {name: tensor for name, tensor in inputs.items() if name != "weight"}
                figures = self.run_pass(rest, inputs["weight"])
            self.captured[shape] = graph, inputs, figures
        except RuntimeError as error:  # an operation that cannot be captured; out of memory
            self.forget()
            self.off = True
            torch.cuda.empty_cache()
            warn(
                "passes are not captured as CUDA graphs, which would be faster:"
                f" {first_line(error)}"
            )
