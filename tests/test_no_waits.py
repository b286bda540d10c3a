"""A training step never waits for a GPU: nothing in it reads a tensor's values.

Everything runs on the device "meta", whose tensors have shapes alone, so that any read raises.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertForQuestionAnswering

from bert.attention import fuse_attention
from bert.embedding import BertForEmbedding
from bert.packed import merge
from bert_pack import PackCfg, pack
from squad_utils import SquadData, load_squad
from tasks import embedding, negatives, qa, texts
from tasks.embedding_loss import (
    EmbeddingError,
    EmbeddingLoss,
    HardNegatives,
    LossCfg,
    Mining,
    PairBatches,
    fit_temperature,
)
from tasks.hidden_states import StateLoss
from tasks.qa import LogitsLoss, QaLoss


def run_on(device: torch.device, processes: int = 1) -> SimpleNamespace:
    return SimpleNamespace(
        accelerator=SimpleNamespace(
            autocast=contextlib.nullcontext,
            device=device,
            process_index=0,
            num_processes=processes,
        )
    )


META = torch.device("meta")
RUN, CPU_RUN = run_on(META), run_on(torch.device("cpu"))
PACK = PackCfg(2, 2, 4, 16, 1)
HIDDEN, STATES = 32, 3  # of the tiny BERT, and of one packed from it


@pytest.fixture(scope="module")
def data(sample: Path) -> SquadData:
    return load_squad(str(sample / "train-v1.1.json"), "--squad_train_data")


@pytest.fixture(scope="module")
def pairs(tiny_bert: Path, data: SquadData) -> texts.Pairs:
    return texts.make_pairs(data, AutoTokenizer.from_pretrained(tiny_bert), 24, 96)


@pytest.fixture(scope="module")
def qa_batch(tiny_bert: Path, data: SquadData) -> dict[str, Tensor]:
    """Four windows, on the device."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    windows = qa.make_windows(data, tokenizer, 16, 96, 32, for_training=True)
    return on_meta(qa.QaBatches(windows, 4, 0).batch(0, np.arange(4)))


@pytest.fixture(scope="module")
def make(tiny_bert: Path) -> Callable[..., nn.Module]:
    """Makes a model on the CPU: of a class, packed or not, merged or not."""

    def model(of: type, packed: bool = False, merged: bool = False) -> nn.Module:
        config = BertConfig.from_pretrained(tiny_bert)
        config.pooling = "mean"
        found = fuse_attention(of(config).eval())
        found = pack(found, PACK, start="random") if packed else found
        return merge(found) if merged else found

    return model


def on_meta(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(META) for name, tensor in batch.items()}


def state_maps() -> nn.ModuleList:
    """From the states of a merged student to the size of its teacher's."""
    return nn.ModuleList(nn.Linear(PACK.hidden_size, HIDDEN) for _ in range(STATES)).to(META)


def teacher_of(model: nn.Module) -> nn.Module:
    return model.to(META).eval().requires_grad_(False)


def assert_trains(model: nn.Module, losses: dict[str, Tensor], names: set[str], count: int) -> None:
    """Each loss is there, one figure an example, and its gradient reaches the model."""
    assert {name: (each.shape, each.device) for name, each in losses.items()} == {
        name: ((count,), META) for name in names
    }
    torch.stack(list(losses.values())).sum().backward()
    assert any(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    "read",
    [
        lambda t: t.item(),
        lambda t: t.cpu(),
        lambda t: t.tolist(),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: bool((t > 0).any()),
    ],
    ids=["item", "cpu", "tolist", "boolean index", "nonzero", "bool"],
)
def test_a_read_raises(read: Callable[[Tensor], object]) -> None:
    """Else no other test here could fail."""
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.zeros(1, device=META))


# ------------------------------------------------------------------------------------------------
# Question answering, distillation


@pytest.mark.parametrize("taught", ["alone", "by a teacher", "with state maps"])
def test_the_qa_loss_reads_nothing(
    make: Callable[..., nn.Module], qa_batch: dict[str, Tensor], taught: str
) -> None:
    mapped = taught == "with state maps"
    student = make(BertForQuestionAnswering, packed=mapped, merged=mapped).to(META).train()
    teacher = None if taught == "alone" else teacher_of(make(BertForQuestionAnswering))
    loss = QaLoss(RUN, teacher, 1.0, 1.0, state_maps() if mapped else None)
    names = {"answer"} if teacher is None else {"answer", "distillation", "hidden_states"}
    assert_trains(student, loss(student, qa_batch), names, 4)


@pytest.mark.parametrize("taught", [False, True])
def test_the_qa_loss_of_groups_reads_nothing(
    make: Callable[..., nn.Module], tiny_bert: Path, data: SquadData, taught: bool
) -> None:
    windows = qa.make_windows(
        data, AutoTokenizer.from_pretrained(tiny_bert), 16, 96, 32, for_training=True
    )
    chosen = np.tile([0, 1], (len(data.ids), 1))
    room = 96 - 3 - windows.questions.lengths
    batch = on_meta(negatives.GroupBatches(windows, chosen, room, 4, 0).batch(0, np.arange(4)))
    assert len(batch["input_ids"]) > 4
    student = make(BertForQuestionAnswering).to(META).train()
    teacher = teacher_of(make(BertForQuestionAnswering)) if taught else None
    names = {"answer", "no_answer"} | ({"distillation", "hidden_states"} if taught else set())
    assert_trains(student, QaLoss(RUN, teacher, 1.0, 1.0)(student, batch), names, 4)


@pytest.mark.parametrize("layers", [0, 2])
def test_the_loss_of_a_stage_reads_nothing(
    make: Callable[..., nn.Module], qa_batch: dict[str, Tensor], layers: int
) -> None:
    student = make(BertForQuestionAnswering, packed=True).to(META).train()
    teacher = teacher_of(make(BertForQuestionAnswering))
    loss = StateLoss(RUN, teacher, 2, (1.0,) * (layers + 1))
    names = {f"state_{i}" for i in range(layers + 1)}
    assert_trains(student, loss(student, qa_batch), names, 4)


@pytest.mark.parametrize("teachers", [1, 2])
def test_the_loss_of_distilled_logits_reads_nothing(
    make: Callable[..., nn.Module], qa_batch: dict[str, Tensor], teachers: int
) -> None:
    student = make(BertForQuestionAnswering, packed=True).to(META).train()
    taught = [teacher_of(make(BertForQuestionAnswering)) for _ in range(teachers)]
    loss = StateLoss(RUN, taught[0], 2, (0.2, 0.3, 0.5), LogitsLoss(RUN, taught, 0.1, 2.0))
    names = {"state_0", "state_1", "state_2", "logits"}
    assert_trains(student, loss(student, qa_batch), names, 4)


def test_the_loss_of_distilled_embeddings_reads_nothing(
    make: Callable[..., nn.Module], pairs: texts.Pairs
) -> None:
    student = make(BertForEmbedding, packed=True).to(META).train()
    batches = embedding.TextBatches(pairs, 4, 0)
    count = len(pairs.questions)
    batch = on_meta(batches.batch(0, np.array([0, 1, count, count + 1])))  # both kinds of text
    teacher = teacher_of(make(BertForEmbedding))
    error_of = EmbeddingError(RUN, teacher, 3.0)
    loss = StateLoss(RUN, teacher, 2, (0.0, 0.5, 0.5), error_of)
    names = {"state_0", "state_1", "state_2", "embedding"}
    assert_trains(student, loss(student, batch), names, 4)


# ------------------------------------------------------------------------------------------------
# Embeddings


@pytest.fixture
def mine(
    make: Callable[..., nn.Module], pairs: texts.Pairs
) -> Callable[[LossCfg], tuple[HardNegatives, np.ndarray]]:
    """Mines for a step of 20 pairs on the CPU."""

    def mined(cfg: LossCfg) -> tuple[HardNegatives, np.ndarray]:
        negatives = HardNegatives(CPU_RUN, pairs, Mining(12, 4, 2, 1.0), 0, cfg)
        chosen = PairBatches(pairs, negatives, 20, 0).steps(0)[0]
        negatives(make(BertForEmbedding), 0, chosen)
        return negatives, chosen

    return mined


@pytest.mark.parametrize("taught", ["alone", "by a teacher", "with state maps"])
@pytest.mark.parametrize(
    "cfg",
    [LossCfg(1), LossCfg(2), LossCfg(0, "none", 1), LossCfg(1, "L1"), LossCfg(2, "L2", 1, 0.5)],
    ids=["triplet 1", "triplet 2", "in_batch", "L1", "all"],
)
def test_the_loss_of_embeddings_reads_nothing(
    make: Callable[..., nn.Module],
    pairs: texts.Pairs,
    mine: Callable,
    cfg: LossCfg,
    taught: str,
) -> None:
    mapped = taught == "with state maps"
    student = make(BertForEmbedding, packed=mapped, merged=mapped).to(META).train()
    teacher = None if taught == "alone" else teacher_of(make(BertForEmbedding))
    negatives, chosen = mine(cfg)
    batch = PairBatches(pairs, negatives, 20, 0).batch(0, chosen[:10])
    assert "c1_input_ids" in batch  # several groups
    loss = EmbeddingLoss(RUN, teacher, cfg, 0.5, state_maps() if mapped else None)
    names = {"triplet"} if cfg.triplet_num else set()
    names |= {"in_batch"} if cfg.in_batch else set()
    if teacher is not None:
        names |= {"hidden_states"} | ({"embedding"} if cfg.emb_loss != "none" else set())
    assert_trains(student, loss(student, on_meta(batch)), names, 10)


def test_encoding_reads_nothing(make: Callable[..., nn.Module], pairs: texts.Pairs) -> None:
    every = np.arange(len(pairs.contexts))
    found = texts.Encoder(RUN, 4)(make(BertForEmbedding).to(META), pairs.contexts, every)
    assert found.shape == (len(every), HIDDEN) and found.device == META
    assert found.dtype == torch.float32


def test_ranking_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedding, "CONTEXT_BLOCK", 8)
    vectors = torch.zeros(20, 5, device=META)
    own = torch.zeros(7, dtype=torch.int64, device=META)
    assert embedding.ranks(vectors[:7], vectors, own).device == META


def test_the_softmax_of_a_step_reads_nothing(
    make: Callable[..., nn.Module], pairs: texts.Pairs, mine: Callable
) -> None:
    """Once the nearest contexts are known; and its rows make batches without a read as well."""
    learned = LossCfg(0, "none", 1)
    of_cpu, chosen = mine(learned)
    negatives = HardNegatives(RUN, pairs, Mining(12, 4, 2, 1.0), 0, learned)
    negatives.load_state_dict(of_cpu.state_dict())
    negatives.negative_of, negatives.row = of_cpu.negative_of, of_cpu.row
    questions = torch.zeros(len(chosen), HIDDEN, device=META)
    model = make(BertForEmbedding).to(META)
    negatives.in_batch = negatives._softmax(model, chosen, questions)
    assert negatives.temperature.device == META
    batch = PairBatches(pairs, negatives, 20, 0).batch(0, chosen[:10])
    assert batch["in_batch"].shape == (10,) and batch["gradient_q"].shape == (10, HIDDEN)
    assert batch["gradient_c"].shape == (20, HIDDEN) and batch["gradient_c"].device == META
    assert batch["attention_mask"].device.type == "cpu"  # where its tokens are counted


def test_a_learned_temperature_is_not_read() -> None:
    scores, own = torch.zeros(4, 9, device=META), torch.zeros(4, dtype=torch.int64, device=META)
    now = torch.ones((), dtype=torch.float64, device=META)
    assert fit_temperature(scores, own, now).device == META


# ------------------------------------------------------------------------------------------------
# Passes of a GPU


@pytest.mark.parametrize("order", [1, -1], ids=["rising", "falling"])
def test_passes_of_a_gpu_are_as_large_as_may_be(
    order: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(texts, "PASS_TOKENS", 4000)
    lengths = np.sort(np.random.default_rng(0).integers(3, 385, 500))[::order]
    passes = texts.split_passes(lengths, 4, RUN.accelerator)
    assert np.concatenate(passes).tolist() == list(range(500))
    padded = [-(-int(lengths[p].max()) // 8) * 8 * len(p) for p in passes]
    assert max(padded) <= 4000 and len(passes) < 1.5 * lengths.sum() / 4000
    # Never fewer texts than asked for, whatever their length; on a CPU just so many.
    assert {len(p) for p in texts.split_passes(lengths, 50, RUN.accelerator)[:-1]} >= {50}
    sizes = [len(p) for p in texts.split_passes(lengths, 50, CPU_RUN.accelerator)]
    assert sizes == [50] * 10


def test_each_of_several_gpus_gets_a_pass() -> None:
    eight = run_on(META, processes=8).accelerator
    lengths = np.full(256, 64)
    assert len(texts.split_passes(lengths, 8, RUN.accelerator)) == 1
    assert len(texts.split_passes(lengths, 8, eight)) == 8
