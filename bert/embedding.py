"""The embedding model, a BERT or a packed BERT: one vector per question or context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, BertConfig, BertModel, BertPreTrainedModel, PretrainedConfig
from transformers.modeling_outputs import ModelOutput

from bert.packed import PackedBertConfig, PackedBertModel, PackedBertPreTrainedModel

POOLINGS = ("cls", "mean")
POOLERS = ("pretrained", "identity")


@dataclass
class EmbeddingOutput(ModelOutput):
    """The `embedding` [B, H], and hidden_states if asked for."""

    embedding: Tensor
    hidden_states: tuple[Tensor, ...] | None = None


def pool(states: Tensor, attention_mask: Tensor | None, pooling: str) -> Tensor:
    """Pool the states of each text to one, [B, width]: the state of [CLS], or the mean over tokens.

    Args:
        states: [B, L, width].
        attention_mask: [B, L], 1 for tokens and 0 for padding; or [B, 1, 1, L], 0 for tokens and
            large negative for padding, as added to scores; or None if all are tokens.
        pooling: "cls" or "mean".
    """
    if pooling == "cls":
        return states[:, 0]
    if attention_mask is None:
        return states.mean(dim=1)
    real = attention_mask[:, 0, 0] > -1.0 if attention_mask.dim() == 4 else attention_mask > 0
    weights = real.to(states.dtype)[:, :, None]
    return (states * weights).sum(dim=1) / weights.sum(dim=1)


class LinearPooler(nn.Module):
    """BERT's pooler without tanh; `BertForEmbedding` applies its linear layer.

    It has the library's parameter names, so that a pretrained pooler loads. When the library's
    model calls it, it returns the states unchanged.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, states: Tensor) -> Tensor:
        return states


class Embedding:
    """The part of both models after their encoder `bert`.

    It pools by `config.pooling` ("cls" or "mean") and applies the linear layer `output_map` and a
    learned scale exp(s), in place of the tanh of the library's pooler.
    """

    bert: nn.Module
    config: Any  # of either model
    log_scale: nn.Parameter

    @property
    def output_map(self) -> nn.Linear:
        """The linear layer after pooling."""
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)  # type: ignore[misc]  # the next base class is the library's
        if module is cast(nn.Module, self):
            nn.init.zeros_(self.log_scale)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **inputs: Any
    ) -> EmbeddingOutput:
        """Embed texts; the arguments are those of the encoder."""
        outputs = self.bert(input_ids, attention_mask=attention_mask, **inputs)
        embedding = self.embed(outputs.last_hidden_state, attention_mask)
        return EmbeddingOutput(embedding=embedding, hidden_states=outputs.hidden_states)

    def embed(self, states: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The embeddings [B, H] of texts with these last states; arguments as in `pool`."""
        pooled = pool(states, attention_mask, self.config.pooling)
        return self.output_map(pooled) * self.log_scale.exp()


class BertForEmbedding(Embedding, BertPreTrainedModel):
    """BERT with the linear layer of its pooler; the output is H wide."""

    bert: BertModel

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        config.pooling = getattr(config, "pooling", "cls")
        self.bert = BertModel(config, add_pooling_layer=False)
        self.bert.pooler = LinearPooler(config)  # type: ignore[assignment]  # replaces it
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.post_init()

    @property
    def output_map(self) -> nn.Linear:
        return cast(LinearPooler, self.bert.pooler).dense

    def start_pooler_anew(self) -> None:
        """Make the linear layer the identity, so that the embedding is the pooled state."""
        nn.init.eye_(self.output_map.weight)
        nn.init.zeros_(self.output_map.bias)


class PackedBertForEmbedding(Embedding, PackedBertPreTrainedModel):
    """The packed encoder with its teacher's pooler and scale; the output is H wide too."""

    head = "pooler"
    bert: PackedBertModel

    def __init__(self, config: PackedBertConfig) -> None:
        super().__init__(config)
        self.bert = PackedBertModel(config)
        width = config.hidden_size if config.merged else config.state_size
        self.pooler = nn.Linear(width, config.state_size)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.post_init()

    @property
    def output_map(self) -> nn.Linear:
        return self.pooler

    @torch.no_grad()
    def copy_head(self, teacher: BertForEmbedding) -> None:
        """Copy the teacher's pooler and scale."""
        self.pooler.load_state_dict(teacher.output_map.state_dict())
        self.log_scale.copy_(teacher.log_scale)


class AutoModelForEmbedding:
    """Chooses the embedding model by its configuration, as the library's Auto classes do."""

    @staticmethod
    def _class_of(config: PretrainedConfig) -> type[BertForEmbedding | PackedBertForEmbedding]:
        return PackedBertForEmbedding if isinstance(config, PackedBertConfig) else BertForEmbedding

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> BertForEmbedding | PackedBertForEmbedding:
        return cls._class_of(config)(cast(Any, config))  # each class takes its own

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, **kwargs: Any) -> Any:
        local = kwargs.get("local_files_only", False)
        config = AutoConfig.from_pretrained(pretrained_model_name_or_path, local_files_only=local)
        return cls._class_of(config).from_pretrained(pretrained_model_name_or_path, **kwargs)
