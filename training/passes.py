"""The gradient of an optimisation step, in passes that fit the memory, on any number of processes.

A loss is one figure per example, and a step's loss is the mean over its examples. So a step's
gradient is the same, to rounding, however its examples are spread over processes and passes. On a
CPU the flag sets the examples per pass. On a GPU a pass takes as many as the memory holds.
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
from cli import UserError, first_line, memory_is_full, warn
from training.machine import Compiled, compiled_layers, linear_weights, running

PROBE_TOKENS = 2048  # tokens of the first of two passes that measure the memory per token
MEMORY_SHARE = 0.85  # share of the free memory that a pass may fill, by that measurement
COUNTS = ("tokens", "positions")
LAUNCH_BOUND = 0.7  # a graph is faster if launching kernels takes over this share of a pass
MAX_GRAPHS = 64
COMPILE_OPERATIONS = 1e16  # on a GPU, stages with more operations repay half a minute of compiling
WARM_UP_SHAPE = (16, 128)  # layers are compiled with a batch of this shape, whatever the run's are


class Batches(ABC):
    """The batches that a task gives the loop, the same on every process."""

    @abstractmethod
    def steps(self, epoch: int) -> list[np.ndarray]:
        """The examples of each optimisation step of an epoch, as indices."""

    @abstractmethod
    def tokens(self, chosen: np.ndarray) -> np.ndarray:
        """Tokens of each example without padding, int64 [len(chosen)]."""

    @abstractmethod
    def batch(self, epoch: int, chosen: np.ndarray) -> dict[str, Tensor]:
        """The batch of a few examples; one of its tensors is `attention_mask` [B, L]."""

    def prepare(  # noqa: B027 - most tasks have nothing to prepare
        self, model: nn.Module, step: int, chosen: np.ndarray
    ) -> None:
        """Called with the examples of a step before its batches are made."""


class BatchesByLength(Batches):
    """Batches whose steps hold examples of similar length.

    Attributes:
        lengths: int64 [examples], tokens without padding.
    """

    def __init__(self, lengths: np.ndarray, step_size: int, seed: int) -> None:
        self.lengths, self.step_size, self.seed = lengths, step_size, seed

    def steps(self, epoch: int) -> list[np.ndarray]:
        return squad_utils.plan_steps(self.lengths, self.step_size, self.seed, epoch)

    def tokens(self, chosen: np.ndarray) -> np.ndarray:
        return self.lengths[chosen]


# From model and batch to named losses, each [B], one figure per example. Training minimises their
# sum.
LossFunction = Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]]


class StepGradient:
    """Leaves the gradient of a step's mean loss in the parameters.

    Attributes:
        names: the names of the figures that a call returns, known after the first call.
        pass_tokens: on a GPU, tokens per pass with padding; None until the first step has measured
            how many fit, and on a CPU.
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
            micro_batch_size: examples per pass on a CPU.
            total_steps: steps of the whole stage; a long one is worth compiling for.
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
            float64 [len(names)] on the device, over all processes: the mean of each named loss,
            then the numbers of "tokens" and "positions" (tokens and padding).
        """
        if self.on_gpu and self.pass_tokens is None:
            self.pass_tokens = self._measure(epoch, chosen)
        while True:
            try:
                figures = self._share_of_step(epoch, chosen)
                break
            except RuntimeError as error:
                if not memory_is_full(error):
                    raise
                # leave the handler first: its traceback keeps the pass's tensors alive
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
        """`pass_tokens` of each process, 0 for None, for a saved state."""
        mine = torch.tensor([self.pass_tokens or 0], device=self.accelerator.device)
        return self.accelerator.gather(mine).tolist()

    def set_pass_tokens(self, saved: list[int]) -> None:
        """Take `pass_tokens` from a saved state, if it is of as many processes."""
        if self.on_gpu and len(saved) == self.accelerator.num_processes:
            self.pass_tokens = saved[self.accelerator.process_index] or None

    @property
    def gradients_stay(self) -> bool:
        """Whether gradients must be set to 0 after a step, not dropped: graphs add in place."""
        return self.graphs is not None and bool(self.graphs.captured)

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.trained if parameter.grad is not None]

    # -- the share of one process

    def _passes(self, chosen: np.ndarray) -> list[np.ndarray]:
        """The examples of each pass of this process; none if there are more processes."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if self.pass_tokens is None:
            # A small step is spread over all processes.
            size = min(self.micro_batch_size, -(-len(chosen) // world))
            return np.split(chosen, range(size, len(chosen), size))[rank::world]
        mine = chosen[rank::world]
        if not len(mine):
            return []
        # All rows of a pass are padded to the longest.
        rows = self.pass_tokens // squad_utils.padded(int(self.batches.tokens(mine).max())) or 1
        return np.array_split(mine, -(-len(mine) // rows))

    def _share_of_step(self, epoch: int, chosen: np.ndarray) -> Tensor:
        device = self.accelerator.device
        passes, weight = self._passes(chosen), 1.0 / len(chosen)
        if not passes:  # run one example with weight 0, to learn the names of the figures
            passes, weight = [chosen[:1]], 0.0
        tokens = positions = 0
        losses: Tensor | None = None
        for examples in passes:
            batch = self.batches.batch(epoch, examples)
            if weight:
                tokens += int(batch["attention_mask"].sum())  # still on the CPU: no wait
                positions += batch["attention_mask"].numel()
            batch = to_device(batch, device)
            figures = self.graphs(batch, weight) if self.graphs else self._run(batch, weight)
            losses = figures if losses is None else losses + figures
        assert losses is not None  # there is a pass
        counts = torch.tensor([tokens, positions], dtype=torch.float64)
        return torch.cat([losses, counts.to(device, non_blocking=True)])

    def _run(self, batch: dict[str, Tensor], weight: float | Tensor) -> Tensor:
        """Run one pass forward and backward; return the sum of each loss, times weight."""
        with running(self.compiled):
            losses = self.loss_function(self.model, batch)
            self.names = [*losses, *COUNTS]
            self.accelerator.backward(torch.stack(list(losses.values())).sum() * weight)
        return torch.stack([each.detach().double().sum() * weight for each in losses.values()])

    def _compile(self, total_steps: int) -> Compiled:
        """The compiled layers of model and teacher; none if the stage is too short for that.

        They are compiled with a batch of one fixed shape: the first shape may decide how kernels
        split sums, and a run that continues has another first batch than one never stopped.
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
        """The tokens that fit in one pass, estimated from the memory of two small passes."""
        tokens = self.batches.tokens(chosen)
        longest = chosen[np.argsort(-tokens, kind="stable")]
        device, cost = self.accelerator.device, squad_utils.padded(int(tokens.max()))
        sizes = [max(1, PROBE_TOKENS // cost), max(2, 2 * PROBE_TOKENS // cost)]
        if sizes[1] > len(longest):
            return cost * len(longest)  # the step is hardly larger than the probe
        peaks = []
        for size in [sizes[0], *sizes]:  # the first only fills caches and loads kernels
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
        # The first step will allocate AdamW's two moments.
        free -= 8 * sum(parameter.numel() for parameter in self.trained)
        return max(cost, int((free * MEMORY_SHARE - once) / each))

    def _halve(self, chosen: np.ndarray) -> None:
        """After a pass that did not fit: drop the step's gradient so far, and halve the passes."""
        passes = self._passes(chosen)
        largest = max(len(examples) for examples in passes)
        if self.pass_tokens is None or largest == 1:
            raise UserError(
                "the GPU's memory does not hold the training of one example; use a shorter"
                " --max_seq_length_c, a smaller model or a larger GPU"
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
    """Set missing gradients to 0: graphs add to them in place, and processes sum them."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def drops(model: nn.Module) -> bool:
    """Whether a model has active dropout: a graph would not draw the same random numbers."""
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())


def as_tensors(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """The arrays of a batch as tensors."""
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy the batch's tensors to `device`, without waiting for a GPU."""
    if device.type == "cuda":
        batch = {n: t if t.is_cuda else t.pin_memory() for n, t in batch.items()}
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


Shape = tuple[tuple[str, torch.Size], ...]  # names and shapes of a batch's tensors


class GraphedPasses:
    """Replays passes as CUDA graphs, one per batch shape, where that is faster.

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
        """As `run_pass`: eagerly at first, later by a graph if launching takes most of the time."""
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
        """Run a pass on a side stream, as a capture requires, and note whether a graph pays."""
        make_gradients(self.trained)  # here, so that they are not made on that stream
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
        except RuntimeError as error:  # an operation cannot be captured, or the memory is full
            self.forget()
            self.off = True
            torch.cuda.empty_cache()
            warn(
                "passes are not captured as CUDA graphs, which would be faster:"
                f" {first_line(error)}"
            )
