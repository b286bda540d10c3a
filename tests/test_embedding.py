"""Tests of embeddings: model, texts, hard negatives, loss, metrics, and all three stages."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from calls import (
    call,
    curves,
    error_line,
    first_questions,
    records,
    run_in_two,
    started,
    states,
    wait_for,
)
from conftest import command_of, run
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, BertModel

from bert.attention import fuse_attention
from bert.embedding import AutoModelForEmbedding, BertForEmbedding, pool
from bert.model_folder import load_model, open_model
from bert.packed import merge
from bert_pack import PackCfg, pack
from cli import UserError
from deploy import int8_file, onnx_file
from deploy.cpu import Cpu, this_cpu
from squad_utils import INPUTS, SpecialIds, Tokens, load_squad
from tasks import EmbeddingTask, embedding, embedding_loss, texts
from tasks.embedding_loss import EmbeddingError, EmbeddingLoss, HardNegatives, LossCfg, Mining
from tasks.hidden_states import StateLoss
from tasks.texts import Pairs, Texts
from training import machine

LENGTH = 160


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file for --nncf_config."""
    path = tmp_path_factory.mktemp("settings") / "nncf_config.json"
    path.write_text(json.dumps({"model_type": "transformer", "subset_size": 6}))
    return path


@pytest.fixture(scope="module")
def tuned(base: Path, sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of fine-tuning."""
    folder = tmp_path_factory.mktemp("tuned") / "out"
    assert call(command_of("train_qcemb", base, sample, folder, "--num_train_epochs=2")) == 0
    return folder


@pytest.fixture(scope="module")
def packed(tuned: Path, sample: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of packing."""
    folder = tmp_path_factory.mktemp("packed") / "out"
    flags = ("--max_steps_per_stage=2", "--log_steps=1", "--embedding_weight=10")
    assert call(command_of("pack_and_distill", tuned, sample, folder, *flags)) == 0
    return folder


@pytest.fixture(scope="module")
def quantized(
    packed: Path, tuned: Path, sample: Path, settings: Path, tmp_path_factory: Any
) -> Path:
    """The output folder of quantization of what was packed."""
    folder = tmp_path_factory.mktemp("quantized") / "out"
    flags = (f"--nncf_config={settings}", "--supervision_weight=0.02", f"--model_teacher={tuned}",
             "--loss_cfg=triplet_num:2,emb_loss:L2", "--num_train_epochs=0.5")  # fmt: skip
    assert call(command_of("train_qcemb", packed, sample, folder, *flags)) == 0
    return folder


def metrics(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


# ------------------------------------------------------------------------------------------------
# The model


def inputs(lengths: list[int], seed: int = 0) -> dict[str, Tensor]:
    """Random tokens; row i has lengths[i] of them."""
    rng, longest = np.random.default_rng(seed), max(lengths)
    mask = np.arange(longest) < np.array(lengths)[:, None]
    arrays = {
        "input_ids": rng.integers(5, 200, mask.shape) * mask,
        "attention_mask": mask.astype(np.int64),
        "token_type_ids": np.zeros(mask.shape, np.int64),
        "position_ids": np.broadcast_to(np.arange(longest), mask.shape).copy(),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def test_pretrained_pooler_is_kept(base: Path, capfd: pytest.CaptureFixture) -> None:
    model = load_model(open_model(str(base), "--model"), AutoModelForEmbedding).eval()
    assert "starting anew: log_scale" in capfd.readouterr().out
    plain = BertModel.from_pretrained(base).eval()
    assert torch.equal(model.bert.pooler.dense.weight, plain.pooler.dense.weight)
    batch = inputs([9, 5])
    with torch.no_grad():
        embedding = model(**batch).embedding
        expected = plain.pooler.dense(plain(**batch).last_hidden_state[:, 0])
        assert torch.allclose(embedding, expected, atol=1e-6)
        model.log_scale.fill_(0.7)
        assert torch.allclose(model(**batch).embedding, expected * np.exp(0.7), atol=1e-5)


@pytest.mark.slow
def test_identity_pooler_gives_the_states(
    base: Path, tuned: Path, sample: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    flags = ("--num_train_epochs=0", "--pooling=mean", "--pooler=identity")
    assert call(command_of("train_qcemb", base, sample, out, *flags)) == 0
    assert "the pooler starts as the identity" in capfd.readouterr().out
    model = load_model(open_model(str(out), "--model"), AutoModelForEmbedding, quiet=True).eval()
    plain = BertModel.from_pretrained(base).eval()
    batch = inputs([9])
    with torch.no_grad():
        expected = plain(**batch).last_hidden_state.mean(dim=1)
        assert torch.allclose(model(**batch).embedding, expected, atol=1e-6)
    assert call(command_of("train_qcemb", tuned, sample, tmp_path / "no", "--pooler=identity")) == 2
    assert "is an embedding model, whose pooler would be lost" in error_line(capfd.readouterr().err)


def test_mean_is_over_real_tokens() -> None:
    states = torch.randn(2, 6, 3)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0]])
    added = (1.0 - mask[:, None, None].float()) * -1e4
    for each in (mask, added):
        pooled = pool(states, each, "mean")
        assert torch.allclose(pooled[0], states[0].mean(dim=0), atol=1e-6)
        assert torch.allclose(pooled[1], states[1, :2].mean(dim=0), atol=1e-6)
    assert torch.equal(pool(states, mask, "cls"), states[:, 0])
    assert torch.allclose(pool(states, None, "mean"), states.mean(dim=1))


# ------------------------------------------------------------------------------------------------
# Metrics


@pytest.mark.parametrize("blocks", [(2, 3), (1024, 65536)])
def test_ranks_against_brute_force(blocks: tuple[int, int], monkeypatch: Any) -> None:
    monkeypatch.setattr(embedding, "QUESTION_BLOCK", blocks[0])
    monkeypatch.setattr(embedding, "CONTEXT_BLOCK", blocks[1])
    torch.manual_seed(0)
    questions, contexts = torch.randn(17, 5), torch.randn(23, 5)
    own = torch.randint(23, (17,))
    found = embedding.ranks(questions, contexts, own)
    distances = (questions[:, None] - contexts[None]).norm(dim=2)
    expected = [
        sum(float(d) < float(row[o]) for i, d in enumerate(row) if i != o)
        for row, o in zip(distances, own, strict=True)
    ]
    assert found.tolist() == expected
    figures = embedding.retrieval_figures(found)
    assert figures["top_5"] == pytest.approx(100 * np.mean([r < 5 for r in expected]))
    assert figures["mrr"] == pytest.approx(100 * np.mean([1 / (r + 1) for r in expected]))
    assert set(figures) == {"top_1", "top_5", "top_10", "top_100", "top_200", "mrr"}


def test_texts_are_encoded_once(base: Path, sample: Path, monkeypatch: Any) -> None:
    data = load_squad(str(sample / "dev-v1.1.json"), "--squad_dev_data")
    pairs = texts.make_pairs(data, AutoTokenizer.from_pretrained(base), 24, LENGTH)
    assert len(pairs) == len(data.ids)
    assert len(pairs.contexts) == len(set(data.contexts)) < len(pairs)
    for i in range(len(pairs)):
        context = pairs.contexts.strings[pairs.context[i]]
        assert context == data.contexts[data.context_of[i]]
        assert pairs.questions.strings[pairs.question[i]] == data.questions[i]
    seen: list[int] = []
    running = SimpleNamespace(accelerator=Accelerator(cpu=True), stop_if_asked=lambda: None)
    model = load_model(open_model(str(base), "--model"), AutoModelForEmbedding, quiet=True)
    original = Texts.batch

    def counted(self: Texts, chosen: np.ndarray, pad_to: int | None = None) -> Any:
        seen.extend(chosen)
        return original(self, chosen, pad_to)

    monkeypatch.setattr(Texts, "batch", counted)
    embedding.EmbEvaluation(running, pairs, pairs.contexts, 4)(model)
    assert len(seen) == len(pairs.contexts) + len(pairs.questions)


# ------------------------------------------------------------------------------------------------
# Hard negatives and the loss


class Lookup(nn.Module):
    """A model whose embedding of a text is the row of a table at its first token."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.output_map = nn.Linear(1, table.shape[1])  # as wide as the embedding

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(embedding=self.table[input_ids[:, 1]], hidden_states=())


def few_texts(count: int, offset: int, strings: list[str] | None = None) -> Texts:
    """Texts of one token each: offset, offset + 1, ..."""
    tokens = Tokens(np.arange(offset, offset + count, dtype=np.int32), np.arange(count + 1), None)
    strings = strings or [f"text {i}" for i in range(count)]
    return Texts(strings, tokens, SpecialIds(0, 1, 2))


def test_positions_end_with_the_longest() -> None:
    batch = few_texts(3, 10).batch(np.array([0, 2]))
    length = int(few_texts(3, 10).total_lengths.max())
    assert batch["input_ids"].shape == (2, 8) and length < 8
    assert batch["position_ids"].max() == length - 1
    assert batch["attention_mask"].sum() == 2 * length


@pytest.mark.parametrize("read", [1, 32])
def test_mining_against_a_slow_one(read: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where all contexts that are read first answer."""
    monkeypatch.setattr(embedding_loss, "NEAREST", read)
    torch.manual_seed(0)
    count = 12
    strings = [f"this one says {word}" for word in ["red", "blue", "green", "grey"] * 3]
    pairs = Pairs(
        questions=few_texts(8, 100),
        contexts=few_texts(count, 10, strings),
        question=np.arange(8),
        context=np.array([0, 1, 2, 3, 4, 5, 6, 7]),
        article=np.array([0] * 6 + [1] * 6),
        answers=[(strings[i].split()[-1],) for i in range(8)],
    )
    model = Lookup(torch.randn(200, 4))
    running = SimpleNamespace(accelerator=Accelerator(cpu=True))
    alpha, history = 1.5, 3
    mining = HardNegatives(running, pairs, Mining(5, 2, history, alpha), 7, LossCfg())
    past: list[tuple[list[int], Tensor]] = []
    for step in range(6):
        with torch.no_grad():
            model.table += 0.3 * torch.randn_like(model.table)
        chosen = np.array([1, 3, 0, 7])
        mining(model, step, chosen)
        drawn = [int(i) for i in mining.kept[0][0]]
        assert len(set(drawn)) == 5
        past.insert(0, (drawn, model.table.detach()[[10 + i for i in drawn]].clone()))
        past = past[:history]
        for pair in chosen:
            q = model.table.detach()[100 + pair]
            best, nearest = float("inf"), None
            for age, (ids, vectors) in enumerate(past):
                for i, vector in zip(ids, vectors, strict=True):
                    same = pairs.article[i] == pairs.article[pairs.context[pair]]
                    answers = same and pairs.answers[pair][0] in strings[i]
                    d = float((q - vector).norm()) * alpha**age
                    if i != pairs.context[pair] and not answers and d < best:
                        best, nearest = d, i
            assert mining.negative_of[int(pair)] == nearest
    again = HardNegatives(running, pairs, Mining(5, 2, history, alpha), 7, LossCfg())
    again.load_state_dict(mining.state_dict())
    mining(model, 6, chosen)
    again(model, 6, chosen)
    assert again.negative_of == mining.negative_of


@pytest.mark.parametrize(("num", "emb_loss"), [(1, "none"), (2, "none"), (1, "L1"), (2, "L2")])
def test_loss_against_a_slow_one(base: Path, num: int, emb_loss: str) -> None:
    running = SimpleNamespace(accelerator=Accelerator(cpu=True))
    opened = open_model(str(base), "--m")
    model, teacher = (load_model(opened, AutoModelForEmbedding, True).eval() for _ in range(2))
    with torch.no_grad():
        teacher.bert.pooler.dense.weight.mul_(1.3)
        teacher.bert.encoder.layer[0].output.dense.bias.add_(0.2)
    questions, contexts = inputs([7, 4], 1), inputs([12, 9, 6, 11], 2)
    batch = {f"q_{k}": v for k, v in questions.items()}
    # Contexts 0 and 1 are of pairs 0 and 1; 2 and 3 are mined for them.
    for group, chosen, rows, of in (("c0", [2, 0, 3], [1], [0]), ("c1", [1], [0], [1])):
        batch |= {f"{group}_{k}": v[chosen] for k, v in contexts.items()}
        batch |= {f"{group}_rows": torch.tensor(rows), f"{group}_pairs": torch.tensor(of)}
    batch["place"] = torch.tensor([1, 3, 0, 2])
    batch["has_negative"] = torch.ones(2)
    taught = emb_loss != "none"
    loss = EmbeddingLoss(running, teacher if taught else None, LossCfg(num, emb_loss), 0.5)
    with torch.no_grad():
        found = loss(model, batch)
        second = loss(model, {**batch, "has_negative": torch.tensor([0.0, 1.0])})["triplet"]
    assert list(found) == ["triplet", "hidden_states", "embedding"][: 3 if taught else 1]
    assert second.tolist() == [0.0, float(found["triplet"][1])]

    def one(m: nn.Module, group: dict[str, Tensor], row: int) -> tuple[Tensor, list[Tensor]]:
        length = int(group["attention_mask"][row].sum())
        single = {k: v[row : row + 1, :length] for k, v in group.items()}
        with torch.no_grad():
            out = m(**single, output_hidden_states=True)
        return out.embedding[0], [state[0] for state in out.hidden_states]

    for i in range(2):
        q, c, n = (one(model, questions, i), one(model, contexts, i), one(model, contexts, i + 2))
        triplet = np.log1p(np.exp(float((q[0] - c[0]).norm() - (q[0] - n[0]).norm())))
        if num == 2:
            triplet += np.log1p(np.exp(float((q[0] - c[0]).norm() - (c[0] - n[0]).norm())))
        assert float(found["triplet"][i]) == pytest.approx(triplet, rel=1e-4)
        if not taught:
            continue
        errors = distances = 0.0
        for (mine, states_), group in ((q, questions), (c, contexts)):
            target, targets = one(teacher, group, i)
            pairs = zip(states_, targets, strict=True)
            errors += sum(float((a - b).square().mean()) for a, b in pairs)
            gap = mine - target
            distances += float(gap.abs().sum() if emb_loss == "L1" else gap.norm())
        assert float(found["hidden_states"][i]) == pytest.approx(0.5 * errors, rel=1e-4)
        assert float(found["embedding"][i]) == pytest.approx(distances, rel=1e-4)


def test_distilled_embeddings_are_compared_each(base: Path) -> None:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(base)
    config.pooling = "mean"
    teacher = fuse_attention(BertForEmbedding(config).eval())
    student = pack(teacher, PackCfg(2, 2, 4, 16, 1), start="random")
    batch, weights = inputs([9, 5, 12]), (0.0, 0.25, 0.75)

    class OneProcess:
        accelerator = Accelerator(cpu=True)

    error_of = EmbeddingError(OneProcess, teacher, 3.0)
    found = StateLoss(OneProcess, teacher, 2, weights, error_of)(student, batch)
    for row in range(3):
        one = {name: value[row : row + 1] for name, value in batch.items()}
        length = int(one["attention_mask"].sum())
        one = {name: value[:, :length] for name, value in one.items()}
        error = (student(**one).embedding - teacher(**one).embedding).square().mean()
        assert float(found["embedding"][row]) == pytest.approx(3 * float(error), rel=1e-4)
    assert found["embedding"].requires_grad
    without = StateLoss(OneProcess, teacher, 2, weights)(student, batch)
    assert set(found) - set(without) == {"embedding"}


@pytest.mark.parametrize("value", [0.3, float("nan")])
def test_vectors_that_say_nothing_find_nothing(value: float) -> None:
    found = embedding.ranks(torch.full((7, 5), value), torch.full((9, 5), value), torch.arange(7))
    assert embedding.retrieval_figures(found)["top_5"] == 0


def test_a_question_of_several_contexts_is_answered_by_all() -> None:
    pairs = Pairs(
        questions=few_texts(1, 100),
        contexts=few_texts(3, 0, ["one", "two", "three"]),
        question=np.array([0, 0]),
        context=np.array([0, 2]),
        article=np.array([0, 1, 2]),
        answers=[("one",), ("three",)],
    )
    assert [pairs.answered_by(0, context) for context in range(3)] == [True, False, True]


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("pack_emb", [0, 1])
def test_merging_changes_no_embedding(base: Path, pooling: str, pack_emb: int) -> None:
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(base)
    config.pooling = pooling
    student = pack(
        fuse_attention(BertForEmbedding(config).eval()),
        PackCfg(2, 2, 4, 16, pack_emb),
        start="random",
    )
    for parameter in student.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    batch = inputs([9, 5, 12])
    wanted, found = student.eval()(**batch).embedding, merge(student).eval()(**batch).embedding
    assert (wanted - found).abs().max() < 1e-4


def test_softmax_is_over_the_whole_step() -> None:
    """The gradient that micro-batches get is that of the loss over all of the step at once."""
    torch.manual_seed(0)
    strings = [f"this one says {word}" for word in ["red", "blue", "green", "grey"] * 3]
    pairs = Pairs(
        questions=few_texts(6, 100),
        contexts=few_texts(12, 10, strings),
        question=np.arange(6),
        context=np.array([0, 1, 1, 3, 4, 5]),
        article=np.array([0] * 6 + [1] * 6),
        answers=[(strings[i].split()[-1],) for i in (0, 1, 1, 3, 0, 1)],
    )
    running = SimpleNamespace(accelerator=Accelerator(cpu=True))
    cfg, alpha = LossCfg(0, "none", 1, 0.7), 1.3
    model = Lookup(torch.randn(200, 4))
    mining = HardNegatives(running, pairs, Mining(5, 2, 2, alpha), 7, cfg)
    chosen = np.array([0, 1, 2, 4, 5])
    for step in range(2):
        mining(model, step, chosen)
    loss = EmbeddingLoss(running, None, cfg, 0.0)
    batches = embedding_loss.PairBatches(pairs, mining, 5, 0)
    found = []
    for some in (chosen[:2], chosen[2:]):
        losses = loss(model, batches.batch(0, some))["in_batch"]
        losses.sum().backward()
        found += losses.tolist()
    gradient, model.table.grad = model.table.grad, None

    mined = [mining.negative_of[int(pair)] for pair in chosen]
    candidates = sorted({*pairs.context[chosen], *mined})
    assert len(candidates) < 2 * len(chosen)  # some stand at several places
    total = []
    for pair in chosen:
        q = model.table[100 + pair]
        scores, mine = [], None
        for c in candidates:
            if c == pairs.context[pair]:
                mine = len(scores)
            elif pairs.answered_by(pair, c):
                continue
            scores.append(-(q - model.table[10 + c]).norm() / 0.7)
        total.append(torch.stack(scores).logsumexp(dim=0) - scores[mine])
    torch.stack(total).sum().backward()
    assert found == pytest.approx([float(each) for each in total], rel=1e-4)
    assert torch.allclose(gradient, model.table.grad, atol=1e-5)
    assert gradient.abs().max() > 0.1


def test_tokens_of_examples_are_those_of_their_batches() -> None:
    lengths = np.array([3, 1, 4, 1, 5])
    tokens = Tokens(np.arange(14, dtype=np.int32), np.concatenate([[0], lengths.cumsum()]), None)
    contexts = Texts([f"text {i}" for i in range(5)], tokens, SpecialIds(0, 1, 2))
    pairs = Pairs(
        questions=few_texts(3, 100),
        contexts=contexts,
        question=np.array([2, 0, 1]),
        context=np.array([4, 1, 2]),
        article=np.arange(5),
        answers=[("nowhere",)] * 3,
    )
    texts = embedding.TextBatches(pairs, 4, 0)
    for some in (np.array([0, 2]), np.array([7, 3, 1])):
        mask = texts.batch(0, some)["attention_mask"]
        assert sorted(texts.tokens(some)) == sorted(mask.sum(dim=1).tolist())
    mining = HardNegatives(
        SimpleNamespace(accelerator=Accelerator(cpu=True)),
        pairs,
        Mining(5, 2, 1, 1.0),
        7,
        LossCfg(),
    )
    mining.negative_of = {0: 4, 1: 1, 2: 2}  # as long as the pair's own
    batches = embedding_loss.PairBatches(pairs, mining, 3, 0)
    for some in (np.array([0]), np.array([2, 1])):
        counted = int(batches.batch(0, some)["attention_mask"].sum())
        assert batches.tokens(some).sum() == counted


def test_learned_temperature_fits_vectors_of_any_size() -> None:
    torch.manual_seed(0)
    own = torch.arange(40)
    contexts = torch.randn(60, 8)
    questions = contexts[:40] + 0.6 * torch.randn(40, 8)
    scores = -embedding_loss.all_distances(questions, contexts)
    first = float(embedding_loss.fit_temperature(scores, own, None))

    def loss(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(scores / temperature, own))

    assert loss(first) < min(loss(first * 1.3), loss(first / 1.3))
    larger = embedding_loss.fit_temperature(scores * 1000, own, None)
    assert float(larger) == pytest.approx(1000 * first)
    now = first * 16
    for _ in range(60):
        now = embedding_loss.fit_temperature(scores, own, now)
    assert float(now) == pytest.approx(first, rel=0.15)


def test_the_temperature_is_part_of_the_state() -> None:
    running = SimpleNamespace(accelerator=Accelerator(cpu=True))
    pairs = Pairs(
        questions=few_texts(6, 100),
        contexts=few_texts(6, 10),
        question=np.arange(6),
        context=np.arange(6),
        article=np.zeros(6, np.int64),
        answers=[("nowhere",)] * 6,
    )
    torch.manual_seed(0)
    model = Lookup(torch.randn(200, 4))
    one, other = (HardNegatives(running, pairs, Mining(5, 2, 2, 1.0), 7, LossCfg(0, "none", 1))
                  for _ in range(2))  # fmt: skip
    for step in range(3):
        one(model, step, np.arange(6))
    other.load_state_dict(one.state_dict())
    for each in (one, other):
        each(model, 3, np.arange(6))
    assert one.temperature == other.temperature
    assert torch.equal(one.in_batch[0], other.in_batch[0])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("triplet:1", "did you mean triplet_num?"),
        ("triplet_num:3", "triplet_num:3 is not one of 0, 1, 2"),
        ("triplet_num:0", "leaves no loss"),
        ("in_batch:1,temperature:0", "temperature:0 is not a number over 0, or learned"),
        ("temperature:0.1", "temperature belongs to in_batch:1, which is missing"),
        ("emb_loss:l2", "emb_loss:l2 is not one of none, L1, L2"),
        ("triplet_num:1,triplet_num:2", "given twice"),
    ],
)
def test_wrong_loss_cfg(text: str, message: str) -> None:
    with pytest.raises(UserError, match="--loss_cfg") as error:
        embedding_loss.parse_loss_cfg(text)
    assert message in str(error.value)


# ------------------------------------------------------------------------------------------------
# All stages


def test_fine_tuning_learns_and_leaves_a_folder(tuned: Path) -> None:
    losses = [r["triplet_loss"] if "triplet_loss" in r else r["loss"] for r in records(tuned)
              if "loss" in r]  # fmt: skip
    assert np.mean(losses[-5:]) < np.mean(losses[:5])
    figures = metrics(tuned)
    assert figures["counts"]["dev_contexts"] > 1
    assert {"top_1", "top_5", "mrr"} <= figures.keys()
    names = {path.name for path in tuned.iterdir()}
    assert {"model.onnx", "model.safetensors", "vocab.txt", "README.md", "curves.png"} <= names
    assert json.loads((tuned / "config.json").read_text())["architectures"] == ["BertForEmbedding"]
    assert json.loads((tuned / "reader.json").read_text())["max_seq_length_c"] == 160


def test_packed_and_quantized_go_on_from_it(packed: Path, quantized: Path) -> None:
    rows = {row["stage"]: row for row in metrics(packed)["stages"]}
    assert rows["merged"]["mrr"] == pytest.approx(rows["unmerged"]["mrr"])
    assert rows["teacher_index"] == {"stage": "teacher_index", **metrics(packed)["teacher_index"]}
    assert json.loads((packed / "config.json").read_text())["merged"]
    steps = [record for record in records(packed) if "loss" in record]
    assert {step["stage"] for step in steps if "embedding" in step} == {"final"}
    stages = [row["stage"] for row in metrics(quantized)["stages"]]
    assert stages == ["fp32", "calibrated", "ranges", "weights", "kept", "teacher_index"]
    assert metrics(quantized)["stages"][0]["mrr"] == pytest.approx(rows["merged"]["mrr"])
    assert (quantized / "state_maps.safetensors").exists()
    assert "`train_qcemb.py --model_student=<this folder>`" in (quantized / "README.md").read_text()
    linear = next(row for row in metrics(quantized)["int8"] if row["kind"] == "linear")
    assert not int8_file.overflow_causes(onnx.load(quantized / "model.onnx"))
    assert linear["float"] == 0


@pytest.mark.slow
def test_figures_are_of_the_delivered_weights_in_fp32(
    base: Path, sample: Path, tmp_path: Path, monkeypatch: Any, capfd: pytest.CaptureFixture
) -> None:
    """Trained in bf16, which any CPU can; evaluated again from the folder in FP32."""
    monkeypatch.setattr(machine, "this_cpu", lambda: Cpu("a CPU", ("bf16",)))
    trained, again = tmp_path / "trained", tmp_path / "again"
    # So many questions and contexts that bf16 ranks some of them otherwise.
    data = [f"--squad_dev_data={sample / 'train-v1.1.json'}"]
    data += [f"--eval_extra_contexts={sample / 'dev-v1.1.json'}"]
    flags = ("--precision=bf16", "--keep=last", "--pooling=mean", *data)
    AcceleratorState._reset_state(True)  # it is one for a process, and of other tests' precision
    assert call(command_of("train_qcemb", base, sample, trained, *flags)) == 0, (
        capfd.readouterr().err
    )
    AcceleratorState._reset_state(True)
    assert (
        call(command_of("train_qcemb", trained, sample, again, "--num_train_epochs=0", *data)) == 0
    )
    assert metrics(trained)["precision"] == "bf16"
    assert metrics(trained)["evaluated_in"] == metrics(again)["precision"] == "fp32"
    for figure in ("top_1", "top_5", "mrr"):
        assert metrics(trained)[figure] == metrics(again)[figure]
    in_bf16 = [record["mrr"] for record in records(trained) if "evaluation" in record]
    assert in_bf16[-1] != metrics(trained)["mrr"]
    assert metrics(trained)["cpu"]["name"] == this_cpu().name
    assert metrics(trained)["cpu"]["features"] == list(this_cpu().features)


@pytest.mark.slow
def test_curves_show_every_loss_that_was_logged(packed: Path, quantized: Path) -> None:
    scores = {"top 1", "top 5", "MRR"}
    teachers = {f"teacher's {name}" for name in scores}
    stages = {"loss", "state_0", "state_1", "state_2", "embedding"}
    assert set(curves(packed, EmbeddingTask.score_names)) == stages | scores | teachers
    pairs = {"loss", "triplet", "embedding", "hidden_states"}
    assert set(curves(quantized, EmbeddingTask.score_names)) == pairs | scores


@pytest.mark.slow
@pytest.mark.parametrize("which", ["tuned", "packed", "quantized"])
@pytest.mark.parametrize("length", [32, 384])
def test_file_reshapes_and_is_as_pytorch(
    which: str, length: int, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(which)
    model = load_model(open_model(str(folder), "--m"), AutoModelForEmbedding, quiet=True).eval()
    core = openvino.Core()
    network = core.read_model(folder / "model.onnx")
    assert [list(p.shape) for p in network.inputs] == [[1, LENGTH]] * 4
    assert list(network.output("embedding").shape) == [1, 32]
    network.reshape({name: [1, length] for name in INPUTS})
    compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    batch = inputs([length - 10, length, 20], seed=length)
    with torch.no_grad():
        expected = model(**batch).embedding.numpy()
    got = np.concatenate(
        [
            compiled({k: v[i : i + 1].numpy() for k, v in batch.items()})["embedding"]
            for i in range(3)
        ]
    )
    limit = 0.1 * expected.std() if which == "quantized" else 1e-4
    assert np.abs(got - expected).mean() < limit


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_width_may_be_the_length(base: Path, tmp_path: Path, pooling: str) -> None:
    """An embedding as wide as the file's texts are long is no output per token."""
    config = AutoConfig.from_pretrained(base, pooling=pooling)
    model = BertForEmbedding(config).eval()
    model.set_attn_implementation("eager")
    width, path = config.hidden_size, str(tmp_path / "model.onnx")
    batch = {name: value.numpy() for name, value in inputs([width]).items()}
    onnx_file.export_onnx(
        onnx_file.ExportedGraph(model, embedding.EmbeddingTask.outputs), path, [batch]
    )
    network = openvino.Core().read_model(path)
    network.reshape({name: [2, 16] for name in INPUTS})
    assert list(network.output("embedding").shape) == [2, width]
    short = inputs([16, 9])
    compiled = openvino.Core().compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    got = compiled({name: value.numpy() for name, value in short.items()})["embedding"]
    with torch.no_grad():
        assert np.abs(got - model(**short).embedding.numpy()).max() < 1e-5


def test_two_instances_of_one_converted_file_rank_as_pytorch(tuned: Path, tmp_path: Path) -> None:
    """The contract of the Open Model Zoo's embedding demo: one file that `ovc` has made, an
    instance of it reshaped for questions and one for contexts, L2 distances between them."""
    openvino.save_model(openvino.convert_model(tuned / "model.onnx"), tmp_path / "model.xml")
    core = openvino.Core()

    def instance(length: int) -> openvino.CompiledModel:
        network = core.read_model(tmp_path / "model.xml")
        network.reshape({name: [1, length] for name in INPUTS})
        return core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    model = load_model(open_model(str(tuned), "--m"), AutoModelForEmbedding, quiet=True).eval()
    found, expected = [], []
    for count, length, seed in ((12, 32, 1), (30, LENGTH, 2)):
        batch = inputs([length, *range(8, 8 + count - 1)], seed)
        compiled = instance(length)
        rows = [{k: v[i : i + 1].numpy() for k, v in batch.items()} for i in range(count)]
        found.append(torch.from_numpy(np.concatenate([compiled(r)["embedding"] for r in rows])))
        with torch.no_grad():
            expected.append(model(**batch).embedding)
    distances, wanted = torch.cdist(*found), torch.cdist(*expected)
    assert (distances - wanted).abs().max() < 0.01 * wanted.std()  # weights are FP16 in the file
    assert (distances.argmin(dim=1) == wanted.argmin(dim=1)).all()


def test_killed_run_goes_on(base: Path, sample: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = command_of(
        "train_qcemb", base, sample, out, "--num_train_epochs=2", "--save_minutes=0"
    )
    for step in (4, 20):
        with started(command) as process:
            wait_for(process, lambda step=step: bool(states(out)) and any(
                r["step"] >= step and "loss" in r for r in records(out)))  # fmt: skip
            process.send_signal(signal.SIGKILL)
            process.wait()
    done = run(command, fresh=True)  # no other run of this script is
    assert done.returncode == 0, done.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (tuned, out))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert metrics(out)["mrr"] == metrics(tuned)["mrr"]


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["triplet_num:1", "triplet_num:0,in_batch:1"])
def test_two_processes_are_as_one(
    loss: str, base: Path, sample: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    logs = []
    flags = ("--hnm_hist_alpha=1.2", f"--loss_cfg={loss}")
    for count in (1, 2):
        out = tmp_path / str(count)
        command = command_of("train_qcemb", base, sample, out, *flags)
        if count == 2:
            run_in_two(command)
        else:
            assert call(command) == 0, capfd.readouterr().err
        logs.append(([r["loss"] for r in records(out) if "loss" in r], metrics(out)["mrr"]))
    assert logs[0][0] == pytest.approx(logs[1][0], rel=1e-3)
    assert logs[0][1] == pytest.approx(logs[1][1], abs=3)


def test_extra_contexts_make_it_harder(
    tuned: Path, sample: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    extra = f"--eval_extra_contexts={sample / 'train-v1.1.json'}"
    assert call(command_of("train_qcemb", tuned, sample, out, "--num_train_epochs=0", extra)) == 0
    assert "more" in capfd.readouterr().out
    figures = metrics(out)
    assert figures["counts"]["extra_contexts"] > 0
    assert figures["mrr"] <= metrics(tuned)["mrr"] + 1e-9


# ------------------------------------------------------------------------------------------------
# Wrong input


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--hnm_num=0",), "--hnm_num"),
        (("--hnm_batch_size=-1",), "--hnm_batch_size"),
        (("--loss_cfg=triplet_num:1,in_batch:2",), "in_batch:2 is not one of 0, 1"),
        (("--pooling=max",), "--pooling"),
        (("--max_seq_length_q=2",), "--max_seq_length_q=2 leaves nothing between"),
        (("--max_seq_length_q=200",), "--max_seq_length_q=200 is over --max_seq_length_c="),
        (("--eval_extra_contexts=nowhere.json",), "nowhere.json"),
    ],
)
def test_wrong_flags(
    base: Path, sample: Path, tmp_path: Path, flags: Any, message: str, capfd: Any
) -> None:
    assert call(command_of("train_qcemb", base, sample, tmp_path / "out", *flags)) == 2
    assert message in error_line(capfd.readouterr().err)


def test_models_of_the_other_task(
    teacher: Path, tuned: Path, sample: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    assert call(command_of("train_qcemb", teacher, sample, tmp_path / "a")) == 2
    line = error_line(capfd.readouterr().err)
    assert "BertForQuestionAnswering" in line and "BertForEmbedding" in line
    assert call(command_of("train_qa", tuned, sample, tmp_path / "b")) == 2
    assert "is a model of another task (BertForEmbedding)" in error_line(capfd.readouterr().err)
    command = command_of(
        "pack_and_distill", tuned, sample, tmp_path / "c", f"--model_teacher={teacher}"
    )
    assert call(command) == 2
    assert "different tasks" in error_line(capfd.readouterr().err)


def test_one_context_is_too_few(
    base: Path, sample: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    first_questions(sample / "train-v1.1.json", data / "train-v1.1.json", 2)
    first_questions(sample / "dev-v1.1.json", data / "dev-v1.1.json", 6)
    assert call(command_of("train_qcemb", base, data, tmp_path / "out")) == 2
    assert "--squad_train_data: 2 questions and 1 different contexts" in error_line(
        capfd.readouterr().err
    )
