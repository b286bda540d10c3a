"""Attention at the rate of its matrix products, for the library's BERT and for the packed one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


def attend(
    parts: Sequence[Tensor],
    heads: int,
    mask: Tensor | None,
    dropout: float = 0.0,
    plain: bool = False,
) -> Tensor:
    """Scaled-dot-product attention (Vaswani et al., 2017, eq. 1).

    It is torch's fused kernel, but for two cases. On a CPU with gradients it is two batched
    products and a softmax in the activations' precision, which takes half the time of the fused
    kernel with its backward pass, which recomputes; without gradients the fused one takes half of
    theirs. In a graph being exported it is the same products: the pattern that OpenVINO fuses.

    Args:
        parts: query, key and value, [B, L, A] each, of `heads` heads.
        mask: [B, 1, 1 or L, L]; bool, True for tokens and False for padding (all rows alike), or
            a float that is added to the scores; or None.
        dropout: probability with which a weight is dropped.
        plain: two products on a GPU too, for the quantizers of their inputs.

    Returns:
        [B, L, A].
    """
    head_size = parts[0].shape[-1] // heads
    # Each [B, heads, L, head_size].
    query, key, value = (part.unflatten(-1, (heads, head_size)).transpose(1, 2) for part in parts)
    on_cpu = query.device.type == "cpu"
    if plain or (on_cpu and (torch.is_grad_enabled() or torch.jit.is_tracing())):
        scores = torch.matmul(query * head_size**-0.5, key.transpose(2, 3))
        # Always one multiplication, one addition, two products, whatever the mask is: quantizers
        # know an operation by its place among those of its kind.
        if mask is None:
            mask = scores.new_zeros(1)
        elif mask.dtype == torch.bool:
            # Added, not filled in: an addition costs the backward pass nothing.
            lowest = torch.finfo(scores.dtype).min
            mask = scores.new_zeros(1).masked_fill(~mask[:, :, :1], lowest)
        scores = scores + mask.to(scores.dtype)
        weights = torch.softmax(scores, dim=-1, dtype=scores.dtype)
        if dropout:  # an exported graph must not have one, not even of probability 0
            weights = F.dropout(weights, dropout)
        context = torch.matmul(weights, value)
    else:
        if mask is not None and mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        context = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, dropout_p=dropout
        )
    return context.transpose(1, 2).flatten(2)


class FusedSelfAttention(nn.Module):
    """BERT's self-attention with one matrix product for query, key and value, or with three.

    Takes the place of the library's module and holds its parameters under the same names, so a
    state dict does not change. Three products of a small hidden size run at half the rate of one
    three times as wide; but quantizers need the three, whose weights are parameters.
    """

    def __init__(self, original: nn.Module, plain: bool = False) -> None:
        super().__init__()
        self.plain = plain
        self.query, self.key, self.value = original.query, original.key, original.value
        self.dropout = original.dropout
        self.heads = original.num_attention_heads
        self.train(original.training)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [B, L, H]; attention_mask as in `attend`. Returns [B, L, H]."""
        parts = (self.query, self.key, self.value)
        if self.plain:
            qkv = [part(hidden_states) for part in parts]
        else:
            weight = torch.cat([part.weight for part in parts])
            bias = torch.cat([part.bias for part in parts])
            qkv = F.linear(hidden_states, weight, bias).chunk(3, dim=-1)
        dropout = self.dropout.p if self.training else 0.0
        return attend(qkv, self.heads, attention_mask, dropout, self.plain), None


def fuse_attention(model: PreTrainedModel, plain: bool = False) -> PreTrainedModel:
    """Make a BERT's attention fast, and return it; a packed BERT's is so already.

    Args:
        plain: one operation for each product, as quantizers need them.
    """
    if model.config.model_type == "bert":
        model.set_attn_implementation("sdpa")  # whose masks are bool, True for what is seen
        for layer in model.base_model.encoder.layer:
            if not isinstance(layer.attention.self, FusedSelfAttention):
                layer.attention.self = FusedSelfAttention(layer.attention.self, plain)
    else:
        for layer in model.base_model.layers:
            layer.plain_attention |= plain
    return model
