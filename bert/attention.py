"""Attention at the rate of its matrix products, for the library's BERT and for the packed one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertModel, PreTrainedModel
from transformers.models.bert.modeling_bert import BertCrossAttention, BertLayer, BertSelfAttention

try:
    from torch.nn.attention.varlen import varlen_attn  # since torch 2.10
except ImportError:
    varlen_attn = None  # type: ignore[assignment]  # in the place of a function


def attend(
    parts: Sequence[Tensor],
    heads: int,
    mask: Tensor | None,
    dropout: float = 0.0,
    separate_products: bool = False,
) -> Tensor:
    """Scaled-dot-product attention (Vaswani et al., 2017, eq. 1).

    It is torch's fused kernel, except in three cases:
    - On a CPU with gradients it is two batched products and a softmax. Forward and backward then
      take half the time of the fused kernel, whose backward pass recomputes. Without gradients the
      fused kernel takes half the time.
    - In a graph that is exported it is the same products: the pattern that OpenVINO fuses.
    - On a GPU in half precision it is the flash kernel for texts of different lengths, which takes
      no mask.

    Args:
        parts: query, key and value, [B, L, A] each, of `heads` heads.
        mask: [B, 1, 1 or L, L]; bool, True for tokens and False for padding (all rows alike), or
            a float that is added to the scores; or None. Or int32 [1, 1, 1, 2 B + 1]: `segments`.
        dropout: probability with which a weight is dropped.
        separate_products: two products on a GPU too, for the quantizers of their inputs.

    Returns:
        [B, L, A].
    """
    head_size = parts[0].shape[-1] // heads
    if mask is not None and mask.dtype == torch.int32:
        batch, length, _ = parts[0].shape
        # Each [B L, heads, head_size].
        q, k, v = (part.reshape(batch * length, heads, head_size) for part in parts)
        ends = mask.flatten()
        rows = varlen_attn(q, k, v, ends, ends, length, length)
        return cast(Tensor, rows).reshape(batch, length, heads * head_size)
    # Each [B, heads, L, head_size].
    query, key, value = (part.unflatten(-1, (heads, head_size)).transpose(1, 2) for part in parts)
    on_cpu = query.device.type == "cpu"
    if separate_products or (on_cpu and (torch.is_grad_enabled() or torch.jit.is_tracing())):
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


def segments(attention_mask: Tensor) -> Tensor:
    """A mask as the flash kernel takes it: where the tokens, and then the padding, of each row end.

    Padding attends to padding alone and no token to it, so that nothing need be taken out of the
    batch and put back.

    Args:
        attention_mask: [B, L], 1 for tokens and then 0 for padding.

    Returns:
        int32 [1, 1, 1, 2 B + 1], of the rows one behind the other, with a 0 in front. It has the
        four dimensions of a mask that the library passes on as it is.
    """
    rows, length = attention_mask.shape
    begins = torch.arange(rows, device=attention_mask.device, dtype=torch.int32) * length
    tokens = begins + attention_mask.sum(dim=1, dtype=torch.int32)
    ends = torch.stack([tokens, begins + length], dim=1).flatten()
    return F.pad(ends, (1, 0))[None, None, None]


@functools.lru_cache
def has_flash() -> bool:
    """Whether the GPU has the flash kernel for texts of different lengths."""
    return varlen_attn is not None and torch.cuda.get_device_capability() >= (8, 0)


def mask_for(attention_mask: Tensor, head_size: int, masked: bool = False) -> Tensor:
    """[B, L], 1 for tokens and 0 for padding, as `attend` takes it; without a wait for a GPU.

    Args:
        masked: whether the flash kernel will not do: there are quantizers, or dropout.
    """
    half = attention_mask.is_cuda and torch.is_autocast_enabled("cuda")
    if half and not masked and head_size % 8 == 0 and has_flash():
        return segments(attention_mask)
    return attention_mask.bool()[:, None, None, :]


def bert_layers(bert: BertModel) -> list[BertLayer]:
    """The layers of the library's encoder, with their type, which a ModuleList does not have."""
    return cast("list[BertLayer]", list(bert.encoder.layer))


def _give_mask(
    bert: BertModel, args: tuple[object, ...], kwargs: dict[str, Any]
) -> tuple[tuple[object, ...], dict[str, Any]] | None:
    """Before a BERT's forward on a GPU, take the place of the library's mask: making that waits
    for the GPU, and having it rules the flash kernel out."""
    mask = kwargs.get("attention_mask")
    if mask is None or mask.dim() != 2 or mask.device.type == "cpu":
        return None
    attention = cast(FusedSelfAttention, bert_layers(bert)[0].attention.self)
    masked = attention.separate_products or (attention.training and attention.dropout.p > 0)
    head_size = attention.query.out_features // attention.heads
    return args, {**kwargs, "attention_mask": mask_for(mask, head_size, masked)}


class FusedSelfAttention(nn.Module):
    """BERT's self-attention with one matrix product for query, key and value, or with three.

    Takes the place of the library's module and holds its parameters under the same names, so a
    state dict does not change. Three products of a small hidden size run at half the rate of one
    three times as wide; but quantizers need the three, whose weights are parameters.
    """

    def __init__(
        self, original: BertSelfAttention | BertCrossAttention, separate_products: bool = False
    ) -> None:
        super().__init__()
        self.separate_products = separate_products
        self.query, self.key, self.value = original.query, original.key, original.value
        self.dropout = original.dropout
        self.heads = original.num_attention_heads
        self.train(original.training)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, None]:
        """hidden_states [B, L, H]; attention_mask as in `attend`. Returns [B, L, H]."""
        parts = (self.query, self.key, self.value)
        if self.separate_products:
            qkv = tuple(part(hidden_states) for part in parts)
        else:
            weight = torch.cat([part.weight for part in parts])
            bias = torch.cat([part.bias for part in parts])
            qkv = F.linear(hidden_states, weight, bias).chunk(3, dim=-1)
        dropout = self.dropout.p if self.training else 0.0
        return attend(qkv, self.heads, attention_mask, dropout, self.separate_products), None


def fuse_attention(model: PreTrainedModel, separate_products: bool = False) -> PreTrainedModel:
    """Make a BERT's attention fast, and return it; a packed BERT's is so already.

    Args:
        separate_products: one operation for each product, as quantizers need them.
    """
    encoder = model.base_model
    if model.config.model_type == "bert":
        encoder = cast(BertModel, encoder)
        model.set_attn_implementation("sdpa")  # whose masks are bool, True for what is seen
        if not isinstance(bert_layers(encoder)[0].attention.self, FusedSelfAttention):
            encoder.register_forward_pre_hook(_give_mask, with_kwargs=True)
            for layer in bert_layers(encoder):
                fused = FusedSelfAttention(layer.attention.self, separate_products)
                layer.attention.self = fused  # type: ignore[assignment]  # in its place
    else:
        layers: Any = encoder.layers  # of a packed BERT, which this module does not know
        for packed in layers:
            packed.separate_products |= separate_products
    return model
