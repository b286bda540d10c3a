"""Learning from a teacher's hidden states."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import BertModel, PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from bert.attention import bert_layers, mask_for
from squad_utils import INPUTS
from training.run import Run


class SquaredError(torch.autograd.Function):
    """Mean squared error between two states per token, in FP32.

    As one function it needs three passes over the memory; separate operations need twelve.
    """

    @staticmethod
    def forward(ctx: Any, state: Tensor, target: Tensor) -> Tensor:
        """Two states [B, L, H] of any dtype to their error [B, L]."""
        difference = state - target.float()
        ctx.dtype = state.dtype
        ctx.save_for_backward(difference)
        return torch.linalg.vector_norm(difference, dim=2).square() / state.shape[2]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (difference,) = ctx.saved_tensors
        scale = (2 / difference.shape[2]) * grad.unsqueeze(2)
        return torch.mul(difference, scale, out=torch.empty_like(difference, dtype=ctx.dtype)), None


def state_errors(
    student: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor
) -> Tensor:
    """Mean squared error between hidden states, per pair of states.

    Student state i of n_S (state 0 is the embedding output) pairs with teacher state
    floor(i (n_T - 1) / (n_S - 1)): first with first, last with last.

    Args:
        student, teacher: hidden states [B, L, H], as `output_hidden_states` gives them.
        attention_mask: [B, L], 1 for tokens, 0 for padding, which does not count.

    Returns:
        [n_S, B], means over the tokens of a row and over H, independent of the padding.
    """
    mask = attention_mask.to(torch.float32)
    weight = mask / mask.sum(dim=1, keepdim=True)
    errors = []
    for i, state in enumerate(student):
        target = teacher[i * (len(teacher) - 1) // max(1, len(student) - 1)]
        error: Tensor = SquaredError.apply(state, target)
        errors.append((error * weight).sum(dim=1))
    return torch.stack(errors)


def summed_errors(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    attention_mask: Tensor,
    state_maps: nn.ModuleList | None,
    accelerator: Accelerator,
) -> Tensor:
    """`state_errors` summed over the pairs of states, [B].

    Args:
        state_maps: maps from the states of a merged student to the teacher's size, or None.
    """
    if state_maps is not None:
        with accelerator.autocast():
            student = [m(state) for m, state in zip(state_maps, student, strict=True)]
    return state_errors(student, teacher, attention_mask).sum(dim=0)


# From the student's outputs, the teacher's last state [B, L, H] and the batch to named errors of
# outputs, [B] each.
OutputLoss = Callable[[ModelOutput, Tensor, dict[str, Tensor]], dict[str, Tensor]]


class StateLoss:
    """The weighted squared errors of states 0..k, [B] each, as `state_0` ... `state_k`.

    The target of state i of n student layers is state floor(i N / n) of N teacher layers. Only the
    first k student layers run. If all run, an `output_loss` may add its own errors.
    """

    def __init__(
        self,
        run: Run,
        teacher: PreTrainedModel,
        num_layers: int,
        weights: tuple[float, ...],
        output_loss: OutputLoss | None = None,
    ) -> None:
        """`num_layers` is the student's n; `weights` has k + 1 entries."""
        self.run, self.teacher, self.weights = run, teacher, weights
        self.output_loss = output_loss
        depth = teacher.config.num_hidden_layers
        self.targets = [i * depth // num_layers for i in range(len(weights))]

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        inputs = {name: batch[name] for name in INPUTS}
        with torch.no_grad(), self.run.accelerator.autocast():
            bert = cast(BertModel, self.teacher.base_model)
            taught = teacher_states(bert, inputs, self.targets[-1])
        k, mask = len(self.weights) - 1, batch["attention_mask"]
        outputs = model(**inputs, output_hidden_states=True, num_layers=k)
        errors = state_errors(outputs.hidden_states, [taught[j] for j in self.targets], mask)
        losses = {f"state_{i}": self.weights[i] * error for i, error in enumerate(errors)}
        if self.output_loss is not None:
            losses |= self.output_loss(outputs, taught[-1], batch)
        return losses


def teacher_states(bert: BertModel, inputs: dict[str, Tensor], count: int) -> list[Tensor]:
    """The hidden states 0..count of a BERT, [B, L, H]; only its first `count` layers run."""
    head_size = bert.config.hidden_size // bert.config.num_attention_heads
    mask = mask_for(inputs["attention_mask"], head_size)
    ids = {name: value for name, value in inputs.items() if name != "attention_mask"}
    states = [bert.embeddings(**ids)]
    for layer in bert_layers(bert)[:count]:
        states.append(layer(states[-1], mask))
    return states
