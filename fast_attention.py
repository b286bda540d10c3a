"""Attention at the rate of its matrix products, for the library's BERT and for the packed one."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


def attend(qkv: Tensor, heads: int, mask: Tensor | None, dropout: float = 0.0) -> Tensor:
    """Scaled-dot-product attention (Vaswani et al., 2017, eq. 1) of one product's output.

    On a GPU it is torch's fused kernel. On a CPU it is two batched products and a softmax in the
    activations' precision: in training that takes half the time of the CPU's fused kernel, whose
    backward pass recomputes, and it is the pattern that OpenVINO fuses in an exported graph.

    Args:
        qkv: [B, L, 3 A], query, key and value side by side, each of `heads` heads.
        mask: [B, 1, 1 or L, L]; bool, True for tokens and False for padding (all rows alike), or
            a float that is added to the scores; or None.
        dropout: probability with which a weight is dropped.

    Returns:
        [B, L, A].
    """
    batch, length, width = qkv.shape
    head_size = width // (3 * heads)
    # Each [B, heads, L, head_size].
    query, key, value = qkv.view(batch, length, 3, heads, head_size).permute(2, 0, 3, 1, 4).unbind()
    if qkv.device.type == "cpu":
        scores = torch.matmul(query * head_size**-0.5, key.transpose(2, 3))
        if mask is not None:
            if mask.dtype == torch.bool:
                # Added, not filled in: an addition costs the backward pass nothing.
                lowest = torch.finfo(scores.dtype).min
                mask = (~mask[:, :, :1]).to(scores.dtype) * lowest
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
    return context.transpose(1, 2).reshape(batch, length, width // 3)


class FusedSelfAttention(nn.Module):
    """BERT's self-attention with one matrix product for query, key and value.

    Takes the place of the library's module and holds its parameters under the same names, so a
    state dict does not change. Three products of a small hidden size run at half the rate of one
    three times as wide.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.query, self.key, self.value = original.query, original.key, original.value
        self.dropout = original.dropout
        self.heads = original.num_attention_heads
        self.train(original.training)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [B, L, H]; attention_mask as in `attend`. Returns [B, L, H]."""
        parts = (self.query, self.key, self.value)
        qkv = F.linear(
            hidden_states,
            torch.cat([part.weight for part in parts]),
            torch.cat([part.bias for part in parts]),
        )
        dropout = self.dropout.p if self.training else 0.0
        return attend(qkv, self.heads, attention_mask, dropout), None


def fuse_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Make a BERT's attention fast, and return it; a packed BERT's is so already."""
    if model.config.model_type == "bert":
        model.set_attn_implementation("sdpa")  # whose masks are bool, True for what is seen
        for layer in model.base_model.encoder.layer:
            layer.attention.self = FusedSelfAttention(layer.attention.self)
    return model
