"""Tests of `bert.attention.center_keys`: the outputs stay, the keys' range shrinks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import BertForQuestionAnswering, PreTrainedModel

import bert_pack
from bert.attention import center_keys, fuse_attention


def sample(seed: int) -> dict[str, Tensor]:
    """Two texts, the second with padding."""
    ids = torch.randint(5, 60, (2, 24), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    mask[1, 15:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, "token_type_ids": ids * 0}


def make(teacher: Path, packed: bool) -> PreTrainedModel:
    """A reader whose keys lie far from 0."""
    model = BertForQuestionAnswering.from_pretrained(teacher)
    if packed:
        cfg = bert_pack.parse_pack_cfg("num_hidden_layers:2,num_attention_heads:2,hidden_size:8")
        model = bert_pack.pack(model, cfg, start="random")
    torch.manual_seed(3)
    for name, bias in model.named_parameters():
        if name.endswith(("key.bias", "qkv.bias")):
            bias.data += torch.rand_like(bias)
    return fuse_attention(model, separate_products=True).eval()


def ends_of_keys(model: PreTrainedModel, samples: list[dict[str, Tensor]]) -> list[Tensor]:
    """Per layer the largest and the least value of each key's coordinate, padding left out."""
    found: list[Tensor] = []
    tokens: Tensor

    def see(module: nn.Linear, _: object, outputs: Tensor) -> None:
        keys = outputs[tokens]
        if names[module].endswith("qkv"):
            keys = keys.chunk(3, dim=-1)[1]
        found.append(torch.stack([keys.amax(dim=0), keys.amin(dim=0)]))

    names = {module: name for name, module in model.named_modules()}
    watched = [m for m, name in names.items() if name.endswith((".key", ".qkv"))]
    hooks = [module.register_forward_hook(see) for module in watched]
    for each in samples:
        tokens = each["attention_mask"].bool()
        model(**each)
    for hook in hooks:
        hook.remove()
    layers = [torch.stack(found[i :: len(watched)]) for i in range(len(watched))]
    return [torch.stack([each[:, 0].amax(dim=0), each[:, 1].amin(dim=0)]) for each in layers]


@pytest.mark.parametrize("packed", [False, True])
def test_outputs_stay_and_keys_lie_around_0(teacher: Path, packed: bool) -> None:
    model, samples = make(teacher, packed), [sample(seed) for seed in range(3)]
    other = sample(9)
    with torch.no_grad():
        before, ends_before = model(**other), ends_of_keys(model, samples)
        center_keys(model, samples)
        after, ends = model(**other), ends_of_keys(model, samples)
    tokens = other["attention_mask"].bool()
    assert len(ends) == model.config.num_hidden_layers
    assert torch.allclose(before.start_logits[tokens], after.start_logits[tokens], atol=1e-5)
    assert torch.allclose(before.end_logits[tokens], after.end_logits[tokens], atol=1e-5)
    for old, new in zip(ends_before, ends, strict=True):
        assert torch.allclose(new[0], -new[1], atol=1e-6)
        assert torch.allclose(new[0] - new[1], old[0] - old[1], atol=1e-6)
        assert new.abs().max() < 0.9 * old.abs().max()
