"""Tests of fused attention, freezing, dropout and the saved vocabulary."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertForQuestionAnswering, BertTokenizerFast

import squad_utils
from bert import attention
from bert.attention import FusedSelfAttention, fuse_attention
from bert.model_folder import UNMERGED, open_model, save_vocabulary, special_ids
from bert.packed import merge
from bert_pack import PackCfg, pack
from cli import UserError
from int8.quantizers import QUANTIZERS
from tasks import qa
from training.fine_tuning import freeze, set_dropout

CLOSE = 1e-5


def random_inputs(lengths: list[int], width: int, vocabulary: int = 600) -> dict[str, Tensor]:
    """Rows of random tokens of the given lengths, padded to `width`."""
    generator = torch.Generator().manual_seed(0)
    position = torch.arange(width).expand(len(lengths), width).clone()
    mask = (position < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, vocabulary, mask.shape, generator=generator)
    types = (position > 4).long() * mask
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "token_type_ids": types,
        "position_ids": position,
    }


def bert(folder: Path, scale: float = 1.0) -> BertForQuestionAnswering:
    """The tiny BERT; `scale` over 1 makes its attention less even."""
    model = BertForQuestionAnswering.from_pretrained(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "attention.self" in name:
                parameter.mul_(scale)
                if name.endswith("bias"):
                    parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model.eval()


@pytest.fixture
def pair(tiny_bert: Path) -> tuple[nn.Module, nn.Module]:
    """The library's model and the fused one, with equal weights, in eval mode."""
    return bert(tiny_bert, 20.0), fuse_attention(bert(tiny_bert, 20.0)).eval()


# ------------------------------------------------------------------------------------------------
# Fused attention


@pytest.mark.parametrize("lengths", [[16, 16], [16, 9, 1], [3, 12]])
def test_fused_outputs_are_the_librarys(
    pair: tuple[nn.Module, nn.Module], lengths: list[int]
) -> None:
    """Logits and every hidden state, with and without padding."""
    library, fused = pair
    assert sum(isinstance(module, FusedSelfAttention) for module in fused.modules()) == 2
    inputs = random_inputs(lengths, 16)
    with torch.no_grad():
        expected = qa.forward(library, inputs, hidden_states=True)
        found = qa.forward(fused, inputs, hidden_states=True)
    for name in ("start_logits", "end_logits"):
        assert getattr(expected, name).std() > 1e-2
        assert (getattr(found, name) - getattr(expected, name)).abs().max() < CLOSE
    assert len(found.hidden_states) == len(expected.hidden_states) == 3
    for mine, theirs in zip(found.hidden_states, expected.hidden_states, strict=True):
        assert (mine - theirs).abs().max() < CLOSE


def test_fused_attention_sees_the_mask(pair: tuple[nn.Module, nn.Module]) -> None:
    """What stands in the padding changes nothing; what stands in the text does."""
    fused = pair[1]
    inputs = random_inputs([16, 9], 16)
    with torch.no_grad():
        before = qa.forward(fused, inputs).start_logits[1, :9]
        inputs["input_ids"][1, 9:] = 77
        after = qa.forward(fused, inputs).start_logits[1, :9]
        assert (after - before).abs().max() < 1e-6
        inputs["input_ids"][1, 8] = 78 if inputs["input_ids"][1, 8] == 77 else 77
        assert (qa.forward(fused, inputs).start_logits[1, :8] - before[:8]).abs().max() > 1e-3


@pytest.mark.parametrize("lengths", [[16, 16], [16, 9, 1]])
def test_fused_gradients_are_the_librarys(
    pair: tuple[nn.Module, nn.Module], lengths: list[int]
) -> None:
    """The gradient of every parameter, in training mode without dropout."""
    inputs = random_inputs(lengths, 16)
    targets = torch.tensor([[n // 2, n - 1] for n in lengths])
    gradients = []
    for model in pair:
        set_dropout(model.train(), 0.0)
        log_probs = qa.log_probabilities(qa.forward(model, inputs), inputs["attention_mask"])
        qa.answer_loss(log_probs, targets).mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    expected, found = gradients
    assert found.keys() == expected.keys()
    assert max(g.abs().max() for name, g in expected.items() if "self.key.weight" in name) > 1e-3
    for name, gradient in expected.items():
        assert (found[name] - gradient).abs().max() < CLOSE, name


def test_fused_state_dict_is_the_librarys(
    pair: tuple[nn.Module, nn.Module], tmp_path: Path
) -> None:
    """Same names in the same order; a saved fused model loads as a plain one, and back."""
    library, fused = pair
    assert list(fused.state_dict()) == list(library.state_dict())
    with torch.no_grad():
        fused.bert.encoder.layer[1].attention.self.key.weight.add_(1.0)
    fused.save_pretrained(tmp_path)
    loaded = BertForQuestionAnswering.from_pretrained(tmp_path)
    for name, value in fused.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    library.load_state_dict(fused.state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_fusing_keeps_the_mode(tiny_bert: Path, training: bool) -> None:
    """A model in eval mode has no dropout after it, one in training mode does."""
    model = fuse_attention(BertForQuestionAnswering.from_pretrained(tiny_bert).train(training))
    assert {module.training for module in model.modules()} == {training}


def test_set_dropout_reaches_the_fused_attention(tiny_bert: Path) -> None:
    """0: training equals evaluation. In the attention alone, too, it takes effect; eval has none.

    The configuration, and what is saved of it, keeps its own figure.
    """
    model = fuse_attention(BertForQuestionAnswering.from_pretrained(tiny_bert))
    inputs = random_inputs([16, 9], 16)
    with torch.no_grad():
        evaluated = qa.forward(model.eval(), inputs).start_logits
        model.train()
        set_dropout(model, 0.0)
        assert torch.equal(qa.forward(model, inputs).start_logits, evaluated)
        set_dropout(model, 0.5)
        assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.5}
        assert torch.equal(qa.forward(model.eval(), inputs).start_logits, evaluated)
        set_dropout(model, 0.0)
        for layer in model.bert.encoder.layer:
            layer.attention.self.dropout.p = 0.5
        first, second = (qa.forward(model.train(), inputs).start_logits for _ in range(2))
        assert (first - second).abs().max() > 1e-4
    assert model.config.attention_probs_dropout_prob == model.config.hidden_dropout_prob == 0.1


def test_fused_dropout_keeps_the_mean() -> None:
    """Dropped weights are made up for: over many draws the output's mean is that without."""
    torch.manual_seed(0)
    original = nn.Module()
    original.query, original.key, original.value = (nn.Linear(8, 8) for _ in range(3))
    original.dropout = nn.Dropout(0.25)
    original.num_attention_heads, original.attention_head_size = 2, 4
    attention = FusedSelfAttention(original)
    states = torch.randn(1, 6, 8)
    with torch.no_grad():
        expected = attention.eval()(states)[0]
        drawn = attention.train()(states.expand(20_000, -1, -1))[0]
    assert drawn.std(dim=0).min() > 0.01
    assert (drawn.mean(dim=0, keepdim=True) - expected).abs().max() < 0.02


# ------------------------------------------------------------------------------------------------
# Freezing


def frozen_names(model: nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if not p.requires_grad}


@pytest.mark.parametrize(
    "freeze_list,parts",
    [
        ("embeddings", ["embeddings"]),
        ("embeddings,layer.0.", ["embeddings", "layer.0."]),
        (" LayerNorm , qa_outputs.bias,", ["LayerNorm", "qa_outputs.bias"]),
        ("none", []),
        ("", []),
        (" , ", []),
    ],
)
def test_freeze_takes_the_named_parameters(
    tiny_bert: Path, freeze_list: str, parts: list[str]
) -> None:
    """Those whose name has one of the substrings, no other; counts their weights."""
    model = BertForQuestionAnswering.from_pretrained(tiny_bert)
    expected = {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
    assert bool(expected) == bool(parts)
    count = freeze(model, freeze_list)
    assert frozen_names(model) == expected
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert count == sum(sizes[name] for name in expected)


def test_freezing_anew_forgets_the_last(tiny_bert: Path) -> None:
    model = BertForQuestionAnswering.from_pretrained(tiny_bert)
    freeze(model, "embeddings")
    freeze(model, "qa_outputs")
    assert frozen_names(model) == {"qa_outputs.weight", "qa_outputs.bias"}


@pytest.mark.parametrize(
    "freeze_list,close",
    [
        ("embedings", "embeddings"),
        ("layernorm", "LayerNorm"),
        ("embeddings,quary", "query"),
        ("none,embeddings", "embeddings"),
    ],
)
def test_an_unknown_name_is_a_user_error(tiny_bert: Path, freeze_list: str, close: str) -> None:
    """It names the flag and the wrong part, shows a close name, and freezes nothing."""
    model = BertForQuestionAnswering.from_pretrained(tiny_bert)
    with pytest.raises(UserError) as error:
        freeze(model, freeze_list)
    message = str(error.value)
    wrong = next(p for p in freeze_list.split(",") if p != "embeddings")
    assert "--freeze_list" in message and repr(wrong) in message
    if wrong != "none":
        assert close in message.split("try")[1]
    assert frozen_names(model) == set()


def test_nothing_left_to_train_is_a_user_error(tiny_bert: Path) -> None:
    model = BertForQuestionAnswering.from_pretrained(tiny_bert)
    with pytest.raises(UserError, match="bert,qa_outputs leaves nothing to train"):
        freeze(model, "bert,qa_outputs")


# ------------------------------------------------------------------------------------------------
# Tokenizers


def test_a_packed_folder_opens_as_it_is_or_as_it_was_before_merging(
    tiny_bert: Path, tmp_path: Path
) -> None:
    """With the maps to its teacher's states in either case, unless the folder has lost them."""
    whole, inner = str(tmp_path), str(tmp_path / UNMERGED)
    student = pack(bert(tiny_bert).eval(), PackCfg(1, 2, 4, 16, 1), start="random")
    student.save_pretrained(inner)
    merge(student).save_pretrained(whole)
    for before_merging, folder in ((False, whole), (True, inner)):
        opened = open_model(whole, "--model", before_merging=before_merging)
        assert (opened.name, opened.folder, opened.local) == (whole, folder, True)
        assert (opened.packed, opened.merged) == (True, not before_merging)
        assert not opened.quantized
        assert opened.architecture == "PackedBertForQuestionAnswering"
        assert (opened.state_maps is None) == before_merging
        if opened.state_maps is not None:
            maps = student.bert.state_maps.state_dict()
            assert all(torch.equal(w, maps[n]) for n, w in opened.state_maps.state_dict().items())
    # A quantized one is not opened as another model that its folder may hold.
    (tmp_path / QUANTIZERS).touch()
    opened = open_model(whole, "--model", before_merging=True)
    assert (opened.folder, opened.quantized, opened.merged) == (whole, True, True)
    shutil.rmtree(inner)
    assert open_model(whole, "--model").state_maps is None


def test_a_tokenizer_is_needed_only_to_read_texts(tiny_bert: Path, tmp_path: Path) -> None:
    bert(tiny_bert).save_pretrained(tmp_path)
    assert not open_model(str(tmp_path), "--model").packed
    with pytest.raises(UserError, match=r"--model: .* has no fast BERT tokenizer"):
        open_model(str(tmp_path), "--model", 16)


TEXTS = ["The CAFÉ in 東京, don't 🙂", "unbelievable  1999 (U.S.)\n", "", "[MASK] [SEP] x"]


def tokenizer_of(folder: Path) -> Any:
    return open_model(str(folder), "--model_student").tokenizer


def test_vocab_txt_is_the_tokenizer(tiny_bert: Path, tmp_path: Path) -> None:
    """A token a line in the order of ids; from it alone the same tokenizer is built."""
    tokenizer = tokenizer_of(tiny_bert)
    saved, alone = tmp_path / "saved", tmp_path / "alone"
    saved.mkdir()
    save_vocabulary(tokenizer, str(saved))
    lines = (saved / "vocab.txt").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    assert lines == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert {"tokenizer.json", "tokenizer_config.json"} <= {file.name for file in saved.iterdir()}
    alone.mkdir()
    shutil.copy(saved / "vocab.txt", alone)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_bert / name, saved)
    for again in (tokenizer_of(saved), BertTokenizerFast.from_pretrained(alone)):
        assert again.get_vocab() == tokenizer.get_vocab()
        assert special_ids(again) == special_ids(tokenizer) == squad_utils.SpecialIds(2, 3, 0)
        for text in TEXTS:
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_a_tokenizers_truncation_and_padding_are_switched_off(
    tiny_bert: Path, tmp_path: Path
) -> None:
    """A tokenizer.json that would cut texts to 8 tokens and pad them tokenises them whole."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_bert, folder)
    settings = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    settings["truncation"] = {
        "direction": "Right",
        "max_length": 8,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    settings["padding"] = {
        "strategy": {"Fixed": 12},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    (folder / "tokenizer.json").write_text(json.dumps(settings), encoding="utf-8")
    texts = ["a b c d e f g h i j k l m n", "a b"]
    backend = tokenizer_of(folder).backend_tokenizer
    assert backend.truncation and backend.padding
    for with_offsets in (True, False):
        backend = tokenizer_of(folder).backend_tokenizer
        tokens = squad_utils.tokenize(backend, texts, with_offsets, "")
        assert tokens.lengths.tolist() == [14, 2]
        assert [backend.id_to_token(i) for i in tokens.ids] == [*texts[0].split(), "a", "b"]
        assert (tokens.offsets is not None) == with_offsets


def test_a_folder_without_tokenizer_is_a_user_error(tiny_bert: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_bert / name, tmp_path)
    with pytest.raises(UserError, match="--model_student") as error:
        tokenizer_of(tmp_path)
    assert "\n" not in str(error.value)


def test_texts_told_by_their_ends_attend_as_masked_ones_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a GPU's flash kernel is given: here each text, and each padding, attends by itself."""

    def kernel(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, *_: Any) -> Tensor:
        texts = []
        for begin, end in itertools.pairwise(ends.tolist()):
            parts = (part[begin:end].transpose(0, 1) for part in (q, k, v))
            texts.append(F.scaled_dot_product_attention(*parts).transpose(0, 1))
        return torch.cat(texts)

    monkeypatch.setattr(attention, "varlen_attn", kernel)
    mask = (torch.arange(7) < torch.tensor([[7], [3], [1]])).long()
    parts = [torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    ends = attention.segments(mask)
    assert ends.flatten().tolist() == [0, 7, 7, 10, 14, 15, 21]
    found = attention.attend(parts, 2, ends)
    expected = attention.attend(parts, 2, mask.bool()[:, None, None, :])
    assert (found - expected)[mask.bool()].abs().max() < 1e-6
