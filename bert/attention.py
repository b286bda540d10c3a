"""Attention as fast as its matrix products, for the library's BERT and the packed BERT."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertModel, PreTrainedModel
from transformers.models.bert.modeling_bert import BertCrossAttention, BertLayer, BertSelfAttention

try:
    from torch.nn.attention.varlen import varlen_attn  # since torch 2.10
except ImportError:
    varlen_attn = None  # type: ignore[assignment]  # replaces a function


def attend(
    parts: Sequence[Tensor],
    heads: int,
    mask: Tensor | None,
    dropout: float = 0.0,
    separate_products: bool = False,
) -> Tensor:
    """Scaled-dot-product attention (Vaswani et al., 2017, eq. 1).

    It runs torch's fused kernel, except in three cases:
    - On a CPU with gradients it runs two batched products and a softmax. Forward and backward then
      take half the time of the fused kernel, whose backward pass recomputes. Without gradients the
      fused kernel takes half the time of the products.
    - An exported graph has the same products, since OpenVINO fuses this pattern.
    - On a GPU in half precision it runs the flash kernel for texts of different lengths, which
      takes no mask.

    Args:
        parts: query, key and value, [B, L, A] each, with `heads` heads side by side.
        mask: None; or [B, 1, 1 or L, L], either bool, True for tokens and False for padding (all
            rows alike), or float, added to the scores; or int32 [1, 1, 1, 2 B + 1], `segments`.
        dropout: probability with which a weight is dropped.
        separate_products: run two products on a GPU too, whose inputs have quantizers.

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
        # Any mask gives one multiplication, one addition and two products: quantizers know an
        # operation by its place among operations of its kind.
        if mask is None:
            mask = scores.new_zeros(1)
        elif mask.dtype == torch.bool:
            # Added, not filled in: the backward pass of an addition costs nothing.
            lowest = torch.finfo(scores.dtype).min
            mask = scores.new_zeros(1).masked_fill(~mask[:, :, :1], lowest)
        scores = scores + mask.to(scores.dtype)
        weights = torch.softmax(scores, dim=-1, dtype=scores.dtype)
        if dropout:  # an exported graph must have no dropout, not even with probability 0
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
    """The mask for the flash kernel: the ends of the tokens and of the padding of each row.

    Padding becomes a text of its own: it attends only to itself, and no token attends to it. So
    the batch keeps its padding.

    Args:
        attention_mask: [B, L], 1 for tokens and then 0 for padding.

    Returns:
        int32 [1, 1, 1, 2 B + 1]: a 0, then the ends, with all rows in sequence. The library passes
        on a mask with four dimensions as it is.
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
    """Convert a mask, 1 for tokens and 0 for padding, for `attend`, without waiting for a GPU.

    Args:
        attention_mask: [B, L].
        masked: rule out the flash kernel, because of quantizers or dropout.
    """
    half = attention_mask.is_cuda and torch.is_autocast_enabled("cuda")
    if half and not masked and head_size % 8 == 0 and has_flash():
        return segments(attention_mask)
    return attention_mask.bool()[:, None, None, :]


def bert_layers(bert: BertModel) -> list[BertLayer]:
    """The layers of the library's encoder, with their type, which a ModuleList hides."""
    return cast("list[BertLayer]", list(bert.encoder.layer))


def _give_mask(
    bert: BertModel, args: tuple[object, ...], kwargs: dict[str, Any]
) -> tuple[tuple[object, ...], dict[str, Any]] | None:
    """Hook before a BERT's forward on a GPU: replace the library's mask.

    Making the library's mask waits for the GPU, and using it rules out the flash kernel.
    """
    mask = kwargs.get("attention_mask")
    if mask is None or mask.dim() != 2 or mask.device.type == "cpu":
        return None
    attention = cast(FusedSelfAttention, bert_layers(bert)[0].attention.self)
    masked = attention.separate_products or (attention.training and attention.dropout.p > 0)
    head_size = attention.query.out_features // attention.heads
    return args, {**kwargs, "attention_mask": mask_for(mask, head_size, masked)}


class FusedSelfAttention(nn.Module):
    """BERT's self-attention with one matrix product for query, key and value, or with three.

    It replaces the library's module and holds its parameters under the same names, so a state dict
    does not change. With a small hidden size, three products run at half the rate of one that is
    three times as wide. Quantizers need three, whose weights are parameters.
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
        """hidden_states [B, L, H] to [B, L, H]; attention_mask as in `attend`."""
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
    """Make a BERT's attention fast, and return the BERT; a packed BERT's attention already is.

    Args:
        separate_products: run each product as its own operation, as quantizers need it.
    """
    encoder = model.base_model
    if model.config.model_type == "bert":
        encoder = cast(BertModel, encoder)
        model.set_attn_implementation("sdpa")  # its masks are bool, True for tokens
        if not isinstance(bert_layers(encoder)[0].attention.self, FusedSelfAttention):
            encoder.register_forward_pre_hook(_give_mask, with_kwargs=True)
            for layer in bert_layers(encoder):
                fused = FusedSelfAttention(layer.attention.self, separate_products)
                layer.attention.self = fused  # type: ignore[assignment]  # replaces it
    else:
        layers: Any = encoder.layers  # of a packed BERT, whose module imports this one
        for packed in layers:
            packed.separate_products |= separate_products
    return model


@torch.no_grad()
def center_keys(model: PreTrainedModel, samples: Iterable[dict[str, Tensor]]) -> None:
    """Shift the biases of all keys so that the keys of the samples' tokens lie around 0.

    A vector that is added to all keys adds one number to all scores of a query, which softmax
    takes away: the outputs stay the same. Keys around 0 have the shortest symmetric range, so
    that 8 bits resolve them best.

    Args:
        model: a BERT of `fuse_attention`, or a packed BERT.
        samples: inputs [B, L] each.
    """
    parts = [each for module in model.modules() for each in _keys(module)]
    lowest, highest = (
        [bias.new_full(bias.shape, sign * torch.inf) for _, bias, _ in parts] for sign in (1, -1)
    )
    tokens: Tensor

    def watch(i: int, _: nn.Module, __: object, outputs: Tensor) -> None:
        keys = outputs[tokens][:, parts[i][2]]
        lowest[i] = torch.minimum(lowest[i], keys.amin(dim=0))
        highest[i] = torch.maximum(highest[i], keys.amax(dim=0))

    hooks = [
        linear.register_forward_hook(functools.partial(watch, i))
        for i, (linear, _, _) in enumerate(parts)
    ]
    try:
        for sample in samples:
            tokens = sample["attention_mask"].bool()
            model(**sample)
    finally:
        for hook in hooks:
            hook.remove()
    for (_, bias, _), low, high in zip(parts, lowest, highest, strict=True):
        bias -= (low + high) / 2


def _keys(module: nn.Module) -> Iterator[tuple[nn.Linear, Tensor, slice]]:
    """The linear layer that makes a module's keys, the bias of the keys, and their place among its
    outputs."""
    if isinstance(module, FusedSelfAttention):
        yield module.key, module.key.bias.data, slice(None)
    elif isinstance(linear := getattr(module, "qkv", None), nn.Linear):
        third = linear.out_features // 3
        place = slice(third, 2 * third)
        yield linear, linear.bias.data[place], place
