"""Tests of packing: exactness, pruning, merging, saving, the budget, the text of --pack_cfg."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForQuestionAnswering,
    BertConfig,
    BertForQuestionAnswering,
    PreTrainedModel,
)

from bert.attention import fuse_attention
from bert.packed import PackedBertForQuestionAnswering, PackedBertModel, merge
from bert_pack import (
    STARTS,
    HeadImportance,
    PackCfg,
    check_pack_cfg,
    pack,
    packed_config,
    parse_pack_cfg,
    prune_heads,
    size_of,
)
from cli import UserError

FULL = PackCfg(4, 0, 4, 32, 1)  # of the teacher below: nothing is left out
SMALL = PackCfg(2, 3, 2, 16, 1)


def batch(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Rows of random tokens of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    position = torch.arange(max(lengths)).expand(len(lengths), -1).clone()
    mask = (position < torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": torch.randint(5, 90, mask.shape, generator=generator) * mask,
        "attention_mask": mask,
        "token_type_ids": (position > 3).long() * mask,
        "position_ids": position,
    }


def sample() -> list[dict[str, Tensor]]:
    return [batch([9, 12, 20, 24], seed) for seed in range(24)]


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    """4 layers, hidden size 32, 4 heads; random, far from trivial everywhere."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=90,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    model = BertForQuestionAnswering(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    return fuse_attention(model).requires_grad_(False)


def states(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """All hidden states of the real tokens, [states, tokens, H]."""
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    return torch.stack(outputs.hidden_states)[:, inputs["attention_mask"].bool()]


def logits(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Start and end logits of the real tokens."""
    with torch.no_grad():
        outputs = model(**inputs)
    return torch.stack([outputs.start_logits, outputs.end_logits])[
        :, inputs["attention_mask"].bool()
    ]


def shaken(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with every weight moved, as training would: no zero stays a zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# ------------------------------------------------------------------------------------------------
# Exactness


@pytest.mark.parametrize("pack_emb", [0, 1])
def test_full_width_is_the_teacher(teacher: PreTrainedModel, pack_emb: int) -> None:
    cfg = PackCfg(**{**vars(FULL), "pack_emb": pack_emb})
    student = pack(teacher, cfg, sample())
    held_out = batch([7, 30, 16], seed=99)
    expected = states(teacher, held_out)
    assert expected.var(dim=1).min() > 1e-2
    assert (states(student, held_out) - expected).abs().max() < 1e-5
    assert (logits(student, held_out) - logits(teacher, held_out)).abs().max() < 1e-5


@pytest.mark.parametrize("cfg", [SMALL, PackCfg(3, 0, 4, 24, 0), PackCfg(4, 1, 2, 20, 1)])
def test_packed_states_are_nearer_than_random_ones(teacher: PreTrainedModel, cfg: PackCfg) -> None:
    held_out = batch([7, 30, 16], seed=99)
    targets = states(teacher, held_out)
    chosen = [i * 4 // cfg.num_hidden_layers for i in range(cfg.num_hidden_layers + 1)]
    variance = targets[chosen].var(dim=1).mean(dim=1)
    packed = states(pack(teacher, cfg, sample()), held_out)
    random = states(pack(teacher, cfg, start="random"), held_out)
    errors = (packed - targets[chosen]).square().mean(dim=(1, 2))
    assert (errors < 0.8 * variance).all()
    assert (errors < 0.5 * (random - targets[chosen]).square().mean(dim=(1, 2))).all()


def test_packing_in_bf16_comes_to_the_same(teacher: PreTrainedModel) -> None:
    held_out = batch([7, 30, 16], seed=99)
    targets = states(teacher, held_out)[::2]
    errors = [
        (states(pack(teacher, SMALL, sample(), bf16=bf16), held_out) - targets).square().mean()
        for bf16 in (False, True)
    ]
    assert errors[0] != errors[1]
    assert abs(errors[0] - errors[1]) < 0.1 * errors[0]


def test_packing_is_deterministic(teacher: PreTrainedModel) -> None:
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        weights.append(pack(teacher, SMALL, sample()).state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_layers_come_from_the_last_of_the_teachers_they_stand_for(teacher: PreTrainedModel) -> None:
    # At full width a student of 2 of the 4 layers has Q, K, V, O near those of layers 1 and 3.
    student = pack(teacher, PackCfg(2, 0, 4, 32, 1), sample())
    for i, original in ((0, 1), (1, 3)):
        found = student.bert.layers[i].feed_forward[0].weight
        gaps = [
            (found - teacher.bert.encoder.layer[j].intermediate.dense.weight).norm()
            for j in range(4)
        ]
        assert gaps.index(min(gaps)) == original
        nearest, second, *_ = sorted(gaps)
        assert nearest < 0.6 * second


def test_a_start_is_a_function_by_name(
    teacher: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It gets the student with the teacher's tables and head, and what it leaves is the student."""

    def all_ones(student: PreTrainedModel, *_: object) -> None:
        assert torch.equal(student.qa_outputs.weight, teacher.qa_outputs.weight)
        with torch.no_grad():
            student.bert.layers[0].qkv.weight.fill_(1.0)

    monkeypatch.setitem(STARTS, "ones", all_ones)
    assert (pack(teacher, SMALL, start="ones").bert.layers[0].qkv.weight == 1.0).all()
    assert (pack(teacher, SMALL, start="random").bert.layers[0].qkv.weight != 1.0).all()


# ------------------------------------------------------------------------------------------------
# Merging and pruning


@pytest.mark.parametrize("pack_emb", [0, 1])
@pytest.mark.parametrize("ff_iter_num", [0, 1, 4])
def test_merging_changes_no_logit(
    teacher: PreTrainedModel, pack_emb: int, ff_iter_num: int
) -> None:
    student = shaken(pack(teacher, PackCfg(2, ff_iter_num, 2, 16, pack_emb), start="random"))
    merged = merge(student)
    inputs = batch([7, 30, 16], seed=3)
    expected = logits(student, inputs)
    assert expected.std() > 0.1
    assert (logits(merged, inputs) - expected).abs().max() < 1e-4
    assert not any("_map" in name for name, _ in merged.named_parameters()) or pack_emb == 0
    assert not any("state_maps" in name for name, _ in merged.named_parameters())
    width = 16 if pack_emb else 32
    assert merged.bert.embeddings.word_embeddings.weight.shape == (90, width)
    assert merged.config.merged
    assert not student.config.merged


def test_merging_needs_the_biases(teacher: PreTrainedModel) -> None:
    # The test above would miss a dropped bias if biases were nothing: here they are everything.
    student = pack(teacher, SMALL, start="random")
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "_map" in name and name.endswith("bias"):
                parameter.fill_(0.3).add_(torch.randn_like(parameter))
    inputs = batch([7, 30, 16], seed=3)
    expected = logits(student, inputs)
    assert (logits(merge(student), inputs) - expected).abs().max() < 1e-4
    for name, parameter in student.named_parameters():
        if name.endswith(("word_map.bias", "type_map.bias", "state_maps.2.bias")):
            kept = parameter.detach().clone()
            with torch.no_grad():
                parameter.zero_()
            assert (logits(student, inputs) - expected).abs().max() > 1e-3, name
            with torch.no_grad():
                parameter.copy_(kept)


def test_pruning_a_head_whose_gate_is_0_changes_nothing(teacher: PreTrainedModel) -> None:
    student = shaken(pack(teacher, SMALL, start="random"))
    importance = HeadImportance(student, torch.device("cpu"))
    importance.insert(student)
    inputs = batch([7, 30, 16], seed=3)
    before = states(student, inputs)
    with torch.no_grad():
        importance.gates[0, [0, 3]] = 0.0
        importance.gates[1, [1, 2]] = 0.0
    gated = states(student, inputs)
    assert (gated - before).abs().max() > 1e-2
    importance.remove()
    assert torch.equal(states(student, inputs), before)
    pruned = prune_heads(student, torch.tensor([[1, 2], [0, 3]]))
    assert pruned.config.num_attention_heads == 2
    assert (states(pruned, inputs) - gated).abs().max() < 1e-5


def test_importance_is_the_running_mean_of_absolute_gradients(teacher: PreTrainedModel) -> None:
    class OneProcess:
        scaler = None

        @staticmethod
        def reduce(gradient: Tensor, reduction: str) -> Tensor:
            return gradient

    student = shaken(pack(teacher, SMALL, start="random"))
    importance = HeadImportance(student, torch.device("cpu"))
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for seed in range(3):
        inputs = batch([12, 9], seed)

        def loss(inputs: dict[str, Tensor] = inputs) -> Tensor:
            return student(**inputs).start_logits.square().mean()

        # By finite differences: the gate of one head at 1 - e and 1 + e.
        for layer, head in itertools.product(range(2), range(4)):
            values = []
            for gate in (0.99, 1.01):
                probe = HeadImportance(student, torch.device("cpu"))
                probe.insert(student)
                with torch.no_grad():
                    probe.gates[layer, head] = gate
                    values.append(loss().double())
                probe.remove()
            expected[layer, head] += ((values[1] - values[0]) / 0.02).abs() / 3
        importance.insert(student)
        loss().backward()
        importance.remove()
        importance.update(OneProcess)
    assert expected.min() > 1e-6
    assert torch.allclose(importance.mean, expected, rtol=0.05, atol=1e-6)
    best = importance.most_important(2)
    for layer in range(2):
        chosen = set(best[layer].tolist())
        others = set(range(4)) - chosen
        assert min(expected[layer, h] for h in chosen) >= max(expected[layer, h] for h in others)
        assert best[layer].tolist() == sorted(chosen)
    restored = HeadImportance(student, torch.device("cpu"))
    restored.load_state_dict(importance.state_dict())
    assert torch.equal(restored.mean, importance.mean)
    assert restored.steps == 3


# ------------------------------------------------------------------------------------------------
# Saving and loading


@pytest.mark.parametrize("merged", [False, True])
def test_save_load_save_is_identical(
    teacher: PreTrainedModel, merged: bool, tmp_path: Path
) -> None:
    student = shaken(pack(teacher, SMALL, start="random"))
    student = merge(student) if merged else student
    student.save_pretrained(tmp_path / "a")
    loaded = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "a")
    assert type(loaded) is PackedBertForQuestionAnswering
    assert loaded.config.merged is merged
    assert loaded.config.pack_cfg == vars(SMALL)
    loaded.save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    inputs = batch([7, 30, 16], seed=3)
    assert torch.equal(logits(loaded.eval(), inputs), logits(student.eval(), inputs))
    encoder = AutoModel.from_pretrained(tmp_path / "a")
    assert type(encoder) is PackedBertModel
    weight = student.bert.layers[0].qkv.weight
    assert torch.equal(encoder.layers[0].qkv.weight, weight)


LOADS = """
import sys

import bert_pack
from transformers import AutoModel, AutoModelForQuestionAnswering
from bert.embedding import AutoModelForEmbedding

for auto in (AutoModel, AutoModelForQuestionAnswering, AutoModelForEmbedding):
    print(type(auto.from_pretrained(sys.argv[1])).__name__)
"""


@pytest.mark.slow
def test_import_bert_pack_is_enough_for_the_auto_classes(
    teacher: PreTrainedModel, tmp_path: Path
) -> None:
    """In a program elsewhere, which imports nothing else of ours first."""
    pack(teacher, SMALL, start="random").save_pretrained(tmp_path)
    command = [sys.executable, "-c", LOADS, str(tmp_path)]
    done = run(command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)})
    assert done.stdout.split() == [
        "PackedBertModel",
        "PackedBertForQuestionAnswering",
        "PackedBertForEmbedding",
    ], done.stderr


# ------------------------------------------------------------------------------------------------
# The budget

LARGE = BertConfig(
    vocab_size=30522,
    hidden_size=1024,
    num_hidden_layers=24,
    num_attention_heads=16,
    intermediate_size=4096,
)


def merged_size(text: str) -> tuple[int, float]:
    cfg = parse_pack_cfg(text)
    config = packed_config(LARGE, cfg)
    config.merged, config.num_attention_heads = True, cfg.num_attention_heads
    return size_of(PackedBertForQuestionAnswering, config, 384)


def test_budget_of_bert_large() -> None:
    parameters, gops = merged_size(
        "num_hidden_layers:12,ff_iter_num:4,num_attention_heads:8,hidden_size:512,pack_emb:1,"
        "hidden_act:orig"
    )
    assert f"{parameters / 1e6:.1f}" == "41.1"
    assert gops <= 23.9
    parameters, gops = size_of(BertForQuestionAnswering, LARGE, 384)
    assert parameters == pytest.approx(333.96e6, rel=1e-3)
    assert gops == pytest.approx(246.93, rel=3e-3)


@pytest.mark.parametrize("pack_emb", [0, 1])
@pytest.mark.parametrize(
    ("n", "k", "heads", "h"), [(12, 4, 8, 512), (6, 2, 4, 256), (24, 0, 16, 768)]
)
def test_size_by_formula(pack_emb: int, n: int, k: int, heads: int, h: int) -> None:
    parameters, gops = merged_size(
        f"num_hidden_layers:{n},ff_iter_num:{k},num_attention_heads:{heads},hidden_size:{h},"
        f"pack_emb:{pack_emb}"
    )
    width, attention, length = h if pack_emb else 1024, 64 * heads, 384
    feed = [(h, h)] * k or [(h, 4096), (4096, h)]
    linears = [(h, 3 * attention), (attention, h), *feed]
    layer = sum(i * o + o for i, o in linears) + 4 * h
    head = 2 * h + 2
    tables = (30522 + 512 + 2) * width + 2 * width
    sum_map = 0 if pack_emb else 1024 * h + h
    assert parameters == tables + sum_map + n * layer + head
    products = sum(i * o for i, o in linears) + 2 * length * attention
    weights = n * products + (0 if pack_emb else 1024 * h) + 2 * h
    assert gops == pytest.approx(2 * length * weights / 1e9, rel=1e-9)


# ------------------------------------------------------------------------------------------------
# --pack_cfg


def test_pack_cfg_is_read() -> None:
    text = "num_hidden_layers:6, ff_iter_num:0,num_attention_heads:4,hidden_size:64,pack_emb:0,"
    assert parse_pack_cfg(text + "hidden_act:relu") == PackCfg(6, 0, 4, 64, 0, "relu")
    config = packed_config(LARGE, parse_pack_cfg("hidden_act:orig"))
    assert config.hidden_act == LARGE.hidden_act
    assert packed_config(LARGE, parse_pack_cfg("hidden_act:relu")).hidden_act == "relu"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hiden_size:512", "did you mean hidden_size?"),
        ("hidden_size", "key:value"),
        ("", "key:value"),
        ("hidden_size:512,", "key:value"),
        ("hidden_size:512,hidden_size:256", "twice"),
        ("hidden_size:51.2", "whole number"),
        ("hidden_size:-8", "whole number"),
        ("hidden_size:²", "whole number"),
        ("num_hidden_layers:0", "at least 1"),
        ("ff_iter_num:x", "at least 0"),
        ("num_attention_heads:0", "at least 1"),
        ("pack_emb:2", "pack_emb:2 is not one of 0, 1"),
        ("hidden_act:gleu", "gelu"),
        ("hidden_act:", "orig"),
        ("num_attention_heads:7,hidden_size:512", "511 and 518"),
        ("num_attention_heads:16,hidden_size:8", "the nearest that are: 16"),
    ],
)
def test_wrong_pack_cfg(text: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_pack_cfg(text)
    message = str(error.value)
    assert message.startswith("--pack_cfg: ")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("num_hidden_layers:25", "over the 24"),
        ("num_attention_heads:17,hidden_size:170", "over the 16"),
        ("num_attention_heads:8,hidden_size:2048", "over the 1024"),
    ],
)
def test_more_than_the_teacher_has(text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_pack_cfg(parse_pack_cfg(text), LARGE)


def test_packed_model_type_is_registered() -> None:
    assert AutoConfig.for_model("packed_bert").model_type == "packed_bert"
