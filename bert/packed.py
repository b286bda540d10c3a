"""The packed BERT: its configuration, its modules, and merging.

The packed encoder is narrower than its teacher (hidden size h instead of H), may have fewer layers
and heads, and has stacked h x h layers in place of the wide feed-forward. Linear maps H -> h after
the embedding tables and h -> H after each layer make its hidden states comparable with the
teacher's. `merge` folds the maps that outputs need into other weights and drops the rest.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    BertForQuestionAnswering,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.activations import ACT2FN
from transformers.modeling_outputs import BaseModelOutput, QuestionAnsweringModelOutput

from bert.attention import attend, mask_for


class PackedBertConfig(PreTrainedConfig):
    """Configuration of a packed BERT.

    `hidden_size` is h and `state_size` the teacher's H. `num_attention_heads` is the number of
    heads left: all of the teacher's until `prune_heads`. `pack_cfg` is the --pack_cfg it came from.
    """

    model_type = "packed_bert"

    vocab_size: int = 30522
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_size: int = 512
    state_size: int = 1024
    head_size: int = 64
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    ff_iter_num: int = 4
    intermediate_size: int = 4096  # if ff_iter_num is 0
    pack_emb: bool = True
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    pad_token_id: int | None = 0
    pooling: str = "cls"  # for an embedding model
    merged: bool = False
    pack_cfg: dict | None = None  # type: ignore[type-arg]  # the library checks values by the type


# ------------------------------------------------------------------------------------------------
# The model


class PackedEmbeddings(nn.Module):
    """Embeds tokens: the sum of word, position and type embeddings, as the encoder's input."""

    def __init__(self, config: PackedBertConfig) -> None:
        super().__init__()
        full, packed = config.state_size, config.hidden_size
        width = packed if config.pack_emb and config.merged else full
        self.word_embeddings = nn.Embedding(config.vocab_size, width)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, width)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, width)
        self.word_map = self.position_map = self.token_type_map = self.sum_map = None
        if not config.pack_emb:
            self.sum_map = nn.Linear(full, packed)
        elif not config.merged:
            self.word_map = nn.Linear(full, packed)
            self.position_map = nn.Linear(full, packed)
            self.token_type_map = nn.Linear(full, packed)
        self.LayerNorm = nn.LayerNorm(packed if config.pack_emb else full, config.layer_norm_eps)

    def maps(self) -> list[nn.Linear]:
        """The maps of words, positions and types; none if the sum has one, or after merging."""
        maps = (self.word_map, self.position_map, self.token_type_map)
        return [each for each in maps if each is not None]

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Three int64 [B, L] to [B, L, h]."""
        states = self.LayerNorm(self.summed(input_ids, token_type_ids, position_ids))
        return states if self.sum_map is None else self.sum_map(states)

    def summed(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> Tensor:
        """The sum that LayerNorm reads."""
        words = self.word_embeddings(input_ids)
        positions = self.position_embeddings(position_ids)
        types = self.token_type_embeddings(token_type_ids)
        if maps := self.maps():
            of_words, of_positions, of_types = maps
            words, positions, types = of_words(words), of_positions(positions), of_types(types)
        return words + positions + types


class PackedLayer(nn.Module):
    """Self-attention and stacked feed-forward, each followed by a residual sum and a LayerNorm."""

    def __init__(self, config: PackedBertConfig) -> None:
        super().__init__()
        h, attention_size = config.hidden_size, config.num_attention_heads * config.head_size
        self.heads, self.stacked = config.num_attention_heads, config.ff_iter_num > 0
        self.separate_products = False  # see attention.fuse_attention
        self.qkv = nn.Linear(h, 3 * attention_size)
        self.attention_output = nn.Linear(attention_size, h)
        self.attention_norm = nn.LayerNorm(h, config.layer_norm_eps)
        widths = [h] * (config.ff_iter_num + 1)
        if not config.ff_iter_num:
            widths = [h, config.intermediate_size, h]
        self.feed_forward = nn.ModuleList(nn.Linear(*pair) for pair in itertools.pairwise(widths))
        self.output_norm = nn.LayerNorm(h, config.layer_norm_eps)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """[B, L, h] to [B, L, h]; mask as in `attention.attend`."""
        attended = self.attention_output(self.context(states, mask))
        return self.after_attention(self.attention_norm(states + attended))

    def context(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """The heads' outputs side by side, [B, L, heads x head size]."""
        parts = self.qkv(states).chunk(3, dim=-1)
        return attend(parts, self.heads, mask, separate_products=self.separate_products)

    @property
    def linears(self) -> list[nn.Linear]:
        """`feed_forward` as a list, with the type of its layers."""
        return cast("list[nn.Linear]", list(self.feed_forward))

    def after_attention(self, states: Tensor) -> Tensor:
        return self.output_norm(states + self.feed(states))

    def feed(self, states: Tensor) -> Tensor:
        """The feed-forward: linear layers with the activation between them."""
        inner = self.feed_forward[0](states)
        for linear in self.feed_forward[1:]:
            inner = linear(self.activation(inner))
        return inner


class PackedBertPreTrainedModel(PreTrainedModel):
    """The base of all packed models, as the library needs it."""

    config_class = PackedBertConfig
    base_model_prefix = "bert"
    _supports_sdpa = True
    head: str  # the name of the linear layer that reads the last state

    def copy_head(self, teacher: Any) -> None:
        """Copy the weights that read the last state from a teacher of the same task."""
        raise NotImplementedError


class PackedBertModel(PackedBertPreTrainedModel):
    """The packed encoder.

    Unmerged, it returns hidden states H wide, by a map per state. Merged, it returns them h wide.
    """

    def __init__(self, config: PackedBertConfig) -> None:
        super().__init__(config)
        self.embeddings = PackedEmbeddings(config)
        self.layers = nn.ModuleList(PackedLayer(config) for _ in range(config.num_hidden_layers))
        self.state_maps = None
        if not config.merged:
            self.state_maps = nn.ModuleList(
                nn.Linear(config.hidden_size, config.state_size)
                for _ in range(config.num_hidden_layers + 1)
            )
        self.post_init()

    @property
    def packed_layers(self) -> list[PackedLayer]:
        """`layers` as a list, with their type."""
        return cast("list[PackedLayer]", list(self.layers))

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        output_hidden_states: bool = False,
        num_layers: int | None = None,
        **_: Any,
    ) -> BaseModelOutput:
        """Run the encoder, or its first `num_layers` layers.

        Args:
            input_ids, token_type_ids, position_ids: int64 [B, L].
            attention_mask: [B, L], 1 for tokens and 0 for padding; or [B, 1, 1, L] as in
                `attention.attend`.

        Returns:
            last_hidden_state, and num_layers + 1 hidden_states if asked for.
        """
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        if attention_mask is not None and attention_mask.dim() == 2:
            masked = self.packed_layers[0].separate_products
            attention_mask = mask_for(attention_mask, self.config.head_size, masked)
        states = [self.embeddings(input_ids, token_type_ids, position_ids)]
        for layer in self.layers[:num_layers]:
            states.append(layer(states[-1], attention_mask))
        hidden = None
        if output_hidden_states:
            hidden = tuple(self.to_state(i, state) for i, state in enumerate(states))
        last = hidden[-1] if hidden else self.to_state(len(states) - 1, states[-1])
        return BaseModelOutput(last_hidden_state=last, hidden_states=hidden)

    def to_state(self, i: int, packed: Tensor) -> Tensor:
        """Map state i to the state that is returned: [B, L, H], or [B, L, h] if merged."""
        return packed if self.state_maps is None else self.state_maps[i](packed)


class PackedBertForQuestionAnswering(PackedBertPreTrainedModel):
    """The packed encoder with the teacher's QA head."""

    head = "qa_outputs"

    def __init__(self, config: PackedBertConfig) -> None:
        super().__init__(config)
        self.bert = PackedBertModel(config)
        self.qa_outputs = nn.Linear(
            config.hidden_size if config.merged else config.state_size, cast(int, config.num_labels)
        )
        self.post_init()

    def copy_head(self, teacher: BertForQuestionAnswering) -> None:
        """Copy the teacher's QA head."""
        self.qa_outputs.load_state_dict(teacher.qa_outputs.state_dict())

    def forward(self, input_ids: Tensor, **inputs: Any) -> QuestionAnsweringModelOutput:
        """Start and end logits, [B, L] each; the arguments are those of `PackedBertModel`."""
        outputs = self.bert(input_ids, **inputs)
        start_logits, end_logits = self.qa_outputs(outputs.last_hidden_state).unbind(dim=-1)
        return QuestionAnsweringModelOutput(
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=outputs.hidden_states,
        )


AutoConfig.register(PackedBertConfig.model_type, PackedBertConfig)
AutoModel.register(PackedBertConfig, PackedBertModel)
AutoModelForQuestionAnswering.register(PackedBertConfig, PackedBertForQuestionAnswering)


# ------------------------------------------------------------------------------------------------
# Merging


@torch.no_grad()
def merge(student: PreTrainedModel) -> PreTrainedModel:
    """A student that computes the same without linear maps, on the CPU, in eval mode.

    The embedding maps are folded into the tables, and the last output map into the head. The maps
    that only losses use are dropped.
    """
    config = copy.deepcopy(student.config)
    config.merged = True
    merged = type(student)(config).eval()
    weights = {name: value.cpu() for name, value in student.state_dict().items()}

    def pop(name: str) -> tuple[Tensor, Tensor]:
        weight, bias = (weights.pop(f"{name}.{part}").double() for part in ("weight", "bias"))
        return weight, bias

    prefix = student.base_model_prefix
    if config.pack_emb:
        for kind in ("word", "position", "token_type"):
            weight, bias = pop(f"{prefix}.embeddings.{kind}_map")
            table = f"{prefix}.embeddings.{kind}_embeddings.weight"
            weights[table] = weights[table].double() @ weight.T + bias
    weight, bias = pop(str(student.head))
    maps = [pop(f"{prefix}.state_maps.{i}") for i in range(config.num_hidden_layers + 1)]
    weights[f"{student.head}.weight"] = weight @ maps[-1][0]
    weights[f"{student.head}.bias"] = weight @ maps[-1][1] + bias
    merged.load_state_dict(weights)
    return merged
