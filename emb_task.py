"""Embeddings as a task for the training loop: texts, hard negatives, losses, metrics, export."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.utils import gather_object
from torch import Tensor, nn

import onnx_utils
import report_utils
import squad_utils
from cli_utils import UserError, is_main_process
from embedding_model import AutoModelForEmbedding, EmbeddingOutput
from model_utils import load_for_export, special_ids, state_errors
from onnx_utils import INPUTS
from run_utils import Run
from squad_utils import SpecialIds, SquadData, Tokens, load_squad
from train_utils import to_device

PASS_TEXTS = 16  # of similar length, in one pass: what is mined has any length
CHECKED_TEXTS = 8  # on which the exported file is compared with PyTorch
TOP = (1, 5, 10, 100, 200)  # of the nearest contexts
QUESTION_BLOCK, CONTEXT_BLOCK = 1024, 65536  # of the distances computed at once: 256 MB
NEAR_ZERO = 1e-12  # squared distances below it have no direction


# ------------------------------------------------------------------------------------------------
# Texts


@dataclass(frozen=True)
class Texts:
    """Texts as the model reads them: [CLS] text [SEP], token types 0, cut to a length.

    Attributes:
        strings: each once.
        tokens: of each, cut.
    """

    strings: list[str]
    tokens: Tokens
    special: SpecialIds

    def __len__(self) -> int:
        return len(self.strings)

    @cached_property
    def total_lengths(self) -> np.ndarray:
        """int64 [texts], with [CLS] and [SEP]."""
        return self.tokens.lengths + 2

    def batch(self, chosen: np.ndarray, pad_to: int | None = None) -> dict[str, np.ndarray]:
        """input_ids, attention_mask, token_type_ids, position_ids of a few texts, int64 [B, L];
        padded to the longest, rounded up to a multiple of 8, or to `pad_to`."""
        total = self.total_lengths[chosen]
        length = pad_to or -(-int(total.max()) // 8) * 8
        input_ids = np.full((len(chosen), length), self.special.pad, np.int64)
        for row, text in enumerate(chosen):
            ids = self.tokens.ids[self.tokens.of(text)]
            input_ids[row, : len(ids) + 2] = [self.special.cls, *ids, self.special.sep]
        position_ids = np.broadcast_to(np.arange(length), input_ids.shape).copy()
        return {
            "input_ids": input_ids,
            "attention_mask": (position_ids < total[:, None]).astype(np.int64),
            "token_type_ids": np.zeros_like(input_ids),
            "position_ids": position_ids,
        }


def make_texts(strings: Sequence[str], tokenizer: Any, max_length: int, what: str) -> Texts:
    """Texts of at most max_length tokens, of which 2 are [CLS] and [SEP]."""
    tokens = squad_utils.tokenize(
        tokenizer.backend_tokenizer, list(strings), False, f"tokenising {what}"
    )
    return Texts(
        list(strings), squad_utils.truncate(tokens, max_length - 2), special_ids(tokenizer)
    )


@dataclass(frozen=True)
class Pairs:
    """Questions and the contexts that answer them, each text once.

    Pair i is questions[question[i]] and contexts[context[i]].

    Attributes:
        question, context: int64 [pairs].
        article: int64 [contexts], the article of a context.
        answers: of each pair, in lower case.
    """

    questions: Texts
    contexts: Texts
    question: np.ndarray
    context: np.ndarray
    article: np.ndarray
    answers: list[tuple[str, ...]]

    def __len__(self) -> int:
        return len(self.question)

    def answered_by(self, pair: int, context: int) -> bool:
        """Whether a context is the pair's own or, of the same article, has one of its answers."""
        own = self.context[pair]
        if context == own:
            return True
        if self.article[context] != self.article[own]:
            return False
        text = self.contexts.strings[context].lower()
        return any(answer in text for answer in self.answers[pair])


def make_pairs(
    data: SquadData, tokenizer: Any, max_seq_length_q: int, max_seq_length_c: int
) -> Pairs:
    """The pairs of a SQuAD file; questions that no context answers (SQuAD 2.0) are left out."""
    asked = np.flatnonzero(data.answerable)
    questions = list(dict.fromkeys(data.questions[i] for i in asked))
    contexts = list(dict.fromkeys(data.contexts))
    question_at = {text: i for i, text in enumerate(questions)}
    context_at = {text: i for i, text in enumerate(contexts)}
    article, paragraph = np.zeros(len(contexts), np.int64), 0
    for a, each in enumerate(data.articles):
        for _ in each["paragraphs"]:
            article[context_at[data.contexts[paragraph]]] = a
            paragraph += 1
    return Pairs(
        questions=make_texts(questions, tokenizer, max_seq_length_q, "questions"),
        contexts=make_texts(contexts, tokenizer, max_seq_length_c, "contexts"),
        question=np.array([question_at[data.questions[i]] for i in asked], np.int64),
        context=np.array([context_at[data.contexts[data.context_of[i]]] for i in asked], np.int64),
        article=article,
        answers=[tuple({text.lower() for _, text in data.answers[i]}) for i in asked],
    )


# ------------------------------------------------------------------------------------------------
# Vectors


@torch.no_grad()
def encode(
    run: Run,
    model: nn.Module,
    texts: Texts,
    chosen: np.ndarray,
    batch_size: int,
    precise: bool = False,
) -> Tensor:
    """Vectors of texts[chosen], FP32 [len(chosen), H] on the CPU, shared among all processes.

    In eval mode, in batches of texts of similar length, padded to the longest of each.

    Args:
        precise: compute in FP32 whatever the run's precision is.
    """
    accelerator = run.accelerator
    order = np.argsort(-texts.total_lengths[chosen], kind="stable")
    batches = np.split(order, range(batch_size, len(order), batch_size))
    was_training = model.training
    model.eval()
    vectors = torch.empty(0, 0)
    for rows in batches[accelerator.process_index :: accelerator.num_processes]:
        arrays = texts.batch(chosen[rows])
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        with contextlib.nullcontext() if precise else accelerator.autocast():
            embedding = model(**to_device(batch, accelerator.device)).embedding
        if not len(vectors):
            vectors = torch.zeros(len(chosen), embedding.shape[1])
        vectors[rows] = embedding.float().cpu()
    model.train(was_training)
    if accelerator.num_processes > 1:
        # Each process has zeros where the others have vectors, and may have had no batch at all.
        width = max(gather_object([vectors.shape[1]]))
        vectors = vectors if len(vectors) else torch.zeros(len(chosen), width)
        for block in vectors.split(CONTEXT_BLOCK):
            block.copy_(accelerator.reduce(block.to(accelerator.device)))
    return vectors


def ranks(questions: Tensor, contexts: Tensor, own: Tensor) -> Tensor:
    """How many contexts are nearer (L2) to each question than its own is: int64 [questions].

    As matrix products in blocks: what it needs beside the vectors hardly grows with their number.

    Args:
        questions: [Q, H].
        contexts: [C, H].
        own: int64 [Q], the index of each question's own context.
    """
    # |q - c|^2 orders contexts as |c|^2 / 2 - q c does.
    blocks = contexts.split(CONTEXT_BLOCK)
    halves = torch.cat([block.square().sum(dim=1) / 2 for block in blocks])
    found = torch.zeros(len(questions), dtype=torch.int64)
    for first in range(0, len(questions), QUESTION_BLOCK):
        block = slice(first, first + QUESTION_BLOCK)
        q, mine = questions[block], own[block]
        limit = halves[mine] - (q * contexts[mine]).sum(dim=1)
        for begin in range(0, len(contexts), CONTEXT_BLOCK):
            there = slice(begin, begin + CONTEXT_BLOCK)
            nearer = torch.addmm(halves[there], q, contexts[there].T, alpha=-1) < limit[:, None]
            inside = (mine >= begin) & (mine < begin + CONTEXT_BLOCK)
            nearer[inside, mine[inside] - begin] = False  # whatever rounding makes of itself
            found[block] += nearer.sum(dim=1)
    return found


def retrieval_figures(found: Tensor) -> dict[str, float]:
    """Share of questions whose own context is among the nearest, and mean reciprocal rank, in %."""
    figures = {f"top_{k}": float((found < k).double().mean() * 100) for k in TOP}
    figures["mrr"] = float((1.0 / (found + 1).double()).mean() * 100)
    return figures


class EmbEvaluation:
    """Retrieval on the dev file's questions, among contexts of which its own are the first."""

    def __init__(self, run: Run, pairs: Pairs, contexts: Texts, batch_size: int) -> None:
        self.run, self.pairs, self.contexts, self.batch_size = run, pairs, contexts, batch_size

    def __call__(
        self, model: nn.Module, precise: bool = False, index_model: nn.Module | None = None
    ) -> dict[str, float]:
        """`top_1` ... `top_200` and `mrr`, in percent; each text is encoded once.

        Args:
            index_model: what embeds the contexts in the place of `model`, in the run's precision.
        """

        def vectors(of: nn.Module, texts: Texts) -> Tensor:
            every, exact = np.arange(len(texts)), precise and of is model
            return encode(self.run, of, texts, every, self.batch_size, exact)

        contexts = vectors(index_model or model, self.contexts)
        questions = vectors(model, self.pairs.questions)[self.pairs.question]
        return retrieval_figures(ranks(questions, contexts, torch.from_numpy(self.pairs.context)))


# ------------------------------------------------------------------------------------------------
# Hard negatives


@dataclass(frozen=True)
class LossCfg:
    """What --loss_cfg says.

    Attributes:
        triplet_num: terms of the triplet loss: 0, 1 or 2.
        emb_loss: the distance between the teacher's embedding and the student's that counts:
            "none", "L1" or "L2".
        in_batch: 1 adds a softmax over all contexts of the step and those mined for it.
        temperature: of that softmax; None: learned, see `fit_temperature`.
    """

    triplet_num: int = 1
    emb_loss: str = "none"
    in_batch: int = 0
    temperature: float | None = None


LOSS_VALUES = {
    "triplet_num": ("0", "1", "2"),
    "emb_loss": ("none", "L1", "L2"),
    "in_batch": ("0", "1"),
}


def parse_loss_cfg(text: str) -> LossCfg:
    """Parse "key:value,key:value"; a key that is left out keeps its default.

    Raises:
        UserError: an unknown key or value, a key given twice, or nothing is left of the loss.
    """
    known = (*LOSS_VALUES, "temperature")
    values: dict[str, Any] = {}
    for item in text.split(","):
        key, _, value = (each.strip() for each in item.partition(":"))
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"keys are {', '.join(known)}"
            raise UserError(f"--loss_cfg: {item.strip()!r} has no known key; {hint}")
        if key in values:
            raise UserError(f"--loss_cfg: {key} is given twice")
        if key == "temperature":
            try:
                values[key] = None if value == "learned" else float(value)
            except ValueError:
                values[key] = 0.0
            if values[key] is not None and not 0 < values[key] < float("inf"):
                raise UserError(
                    f"--loss_cfg: temperature:{value} is neither learned nor a number over 0"
                )
        elif value not in LOSS_VALUES[key]:
            raise UserError(
                f"--loss_cfg: {key}:{value} is not one of {', '.join(LOSS_VALUES[key])}"
            )
        else:
            values[key] = value if key == "emb_loss" else int(value)
    cfg = LossCfg(**values)
    if not cfg.triplet_num and not cfg.in_batch:
        raise UserError("--loss_cfg: triplet_num:0 leaves no loss without in_batch:1")
    return cfg


class HardNegatives:
    """The nearest context that does not answer, for each question of an optimisation step.

    Each step embeds `num` random contexts, without gradient. They and those of the steps before
    it, `history` steps in all, are the candidates; the distances of older ones count times
    alpha^age. Saved and restored with a run's state.

    With in_batch it also finds each question's loss against all contexts of the step and those
    mined for it, and its gradient in their vectors. The passes of the step then need no more than
    that gradient, so that the loss is over the whole step whatever its micro-batches and
    processes (Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
    Setup"). Kept vectors only choose: against them, which no gradient moves, all new vectors could
    win by moving away together.

    Attributes:
        found: pair -> context, of the present step.
        in_batch: pair -> its loss, and gradients [H] in its question, its context and the one
            mined for it.
        temperature: of in_batch, as of the last step.
    """

    def __init__(
        self,
        run: Run,
        pairs: Pairs,
        num: int,
        batch_size: int,
        history: int,
        alpha: float,
        seed: int,
        cfg: LossCfg,
    ) -> None:
        self.run, self.pairs, self.num, self.batch_size = run, pairs, num, batch_size
        self.alpha, self.seed, self.cfg = alpha, seed, cfg
        self.kept: deque[tuple[np.ndarray, Tensor]] = deque(maxlen=history)
        self.temperature = cfg.temperature
        self.found: dict[int, int] = {}
        self.in_batch: dict[int, tuple[float, Tensor, Tensor, Tensor]] = {}

    def __call__(self, model: nn.Module, step: int, chosen: np.ndarray) -> None:
        """Mine for the pairs `chosen`, on all processes alike."""
        pairs, count = self.pairs, len(self.pairs.contexts)
        rng = np.random.default_rng([self.seed, step, 4])
        drawn = rng.choice(count, min(self.num, count), replace=False)
        self.kept.appendleft((drawn, self._encode(model, pairs.contexts, drawn)))
        questions = self._encode(model, pairs.questions, pairs.question[chosen])
        candidates = np.concatenate([ids for ids, _ in self.kept])
        self.found = self._nearest(chosen, candidates, self._distances(questions))
        if self.cfg.in_batch:
            self.in_batch = self._softmax(model, chosen, questions)

    def _encode(self, model: nn.Module, texts: Texts, chosen: np.ndarray) -> Tensor:
        return encode(self.run, model, texts, chosen, self.batch_size)

    def _distances(self, questions: Tensor) -> Tensor:
        """Of each question to all candidates, with their age."""
        parts = [distance(questions, v) * self.alpha**age for age, (_, v) in enumerate(self.kept)]
        return torch.cat(parts, dim=1)

    def _nearest(
        self, chosen: np.ndarray, candidates: np.ndarray, distances: Tensor
    ) -> dict[int, int]:
        found = {}
        for pair, order in zip(chosen, distances.argsort(dim=1).numpy(), strict=True):
            for context in candidates[order]:
                if not self.pairs.answered_by(pair, context):
                    found[int(pair)] = int(context)
                    break
            else:
                raise UserError(
                    "--hnm_num: all contexts mined answer the same question; mine more of them"
                )
        return found

    def _softmax(
        self, model: nn.Module, chosen: np.ndarray, questions: Tensor
    ) -> dict[int, tuple[float, Tensor, Tensor, Tensor]]:
        """-log softmax of -distance / temperature at each question's own context."""
        pairs, count = self.pairs, len(chosen)
        mined = [self.found[int(pair)] for pair in chosen]
        texts, place = np.unique([*pairs.context[chosen], *mined], return_inverse=True)
        contexts = self._encode(model, pairs.contexts, texts)
        questions.requires_grad_(), contexts.requires_grad_()
        own = torch.from_numpy(place[:count])
        excluded = torch.tensor([[pairs.answered_by(pair, c) for c in texts] for pair in chosen])
        excluded[torch.arange(count), own] = False
        scores = (-distance(questions, contexts)).masked_fill(excluded, float("-inf"))
        if self.cfg.temperature is None:
            self.temperature = fit_temperature(scores.detach(), own, self.temperature)
        losses = F.cross_entropy(scores / self.temperature, own, reduction="none")
        of_questions, of_contexts = torch.autograd.grad(losses.sum(), (questions, contexts))
        # A context is embedded wherever it stands: together those give its gradient once.
        of_contexts = (of_contexts / torch.from_numpy(np.bincount(place))[:, None])[place]
        rows = zip(
            losses.tolist(), of_questions, of_contexts[:count], of_contexts[count:], strict=True
        )
        return dict(zip(map(int, chosen), rows, strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {
            "ids": [ids for ids, _ in self.kept],
            "vectors": [v for _, v in self.kept],
            "temperature": self.temperature,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.temperature = state["temperature"]
        self.kept.clear()
        self.kept.extend(zip(state["ids"], state["vectors"], strict=True))


def fit_temperature(scores: Tensor, own: Tensor, now: float | None) -> float:
    """A temperature for the softmax of scores, a step on from the one before.

    Vectors may be of any size, and a temperature that does not fit theirs has training grow or
    shrink them before anything else. The first is the one at which the loss is least; later ones go
    a tenth of the way, in logarithms, to where it would be.

    Args:
        scores: [Q, C], -distance, or -inf where a context does not count.
        own: int64 [Q], the context of each question.
        now: the temperature of the step before, or None at the first.
    """
    if now is None:
        spread = float(scores[scores.isfinite()].std()) or 1.0
        tried = [spread * 2.0 ** (power / 4) for power in range(-32, 9)]
    else:
        tried = [now * 2.0 ** (power / 8) for power in range(-8, 9)]
    losses = [float(F.cross_entropy(scores / temperature, own)) for temperature in tried]
    best = tried[int(np.argmin(losses))]
    return best if now is None else now * (best / now) ** 0.1


def distance(a: Tensor, b: Tensor) -> Tensor:
    """L2 distances of all pairs, [A, B], as one matrix product."""
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T
    return squares.clamp_min(NEAR_ZERO).sqrt()


# ------------------------------------------------------------------------------------------------
# Batches


class PairBatches:
    """Batches of pairs with their hard negatives, for `train_utils.train`."""

    def __init__(self, pairs: Pairs, negatives: HardNegatives, step_size: int, seed: int) -> None:
        self.pairs, self.negatives = pairs, negatives
        self.step_size, self.seed = step_size, seed

    def steps(self, epoch: int) -> list[np.ndarray]:
        """The pairs of each optimisation step of an epoch, of contexts of similar length."""
        lengths = self.pairs.contexts.total_lengths[self.pairs.context]
        return squad_utils.plan_steps(lengths, self.step_size, self.seed, epoch)

    def batch(self, epoch: int, chosen: np.ndarray) -> dict[str, Tensor]:
        """Inputs "q_..." of questions [B, Lq]; "c0_...", "c1_...", ... of groups of contexts and
        of those mined, with the `place` of each among first all contexts, then all mined; all
        masks as `attention_mask` [1, all], for the count of tokens; with in_batch its losses [B]
        and gradients [B, H] and, of contexts and mined ones, [2B, H]."""
        pairs, mined = self.pairs, self.negatives
        arrays = _named("q_", pairs.questions.batch(pairs.question[chosen]))
        negatives = [mined.found[int(pair)] for pair in chosen]
        contexts = np.concatenate([pairs.context[chosen], negatives])
        order = np.argsort(pairs.contexts.total_lengths[contexts], kind="stable")
        for i, place in enumerate(np.split(order, range(PASS_TEXTS, len(order), PASS_TEXTS))):
            arrays |= _named(f"c{i}_", pairs.contexts.batch(contexts[place]))
            arrays[f"c{i}_place"] = place
        masks = [array.ravel() for name, array in arrays.items() if name.endswith("_mask")]
        arrays["attention_mask"] = np.concatenate(masks)[None]
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if mined.in_batch:
            rows = [mined.in_batch[int(pair)] for pair in chosen]
            losses, of_q, of_c, of_n = zip(*rows, strict=True)
            batch["in_batch"] = torch.tensor(losses)
            batch["gradient_q"] = torch.stack(of_q)
            batch["gradient_c"] = torch.stack([*of_c, *of_n])
        return batch


def _named(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: array for name, array in arrays.items()}


def part(batch: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The inputs of questions ("q_") or of a group of contexts ("c0_", "c1_", ...)."""
    return {name: batch[prefix + name] for name in INPUTS}


# ------------------------------------------------------------------------------------------------
# The loss


class EmbLoss:
    """The losses of a question q, its context c and its hard negative n, each [B].

    - `triplet`: softplus(|q - c| - |q - n|), and with triplet_num 2 also
      softplus(|q - c| - |c - n|);
    - with in_batch, `in_batch`: the softmax of `HardNegatives`, by its gradient;
    - with a teacher, `hidden_states`: supervision_weight x the error of hidden states of question
      and context, and `embedding`: the L1 or L2 distance between its embeddings and the student's.
    """

    def __init__(
        self,
        run: Run,
        teacher: nn.Module | None,
        cfg: LossCfg,
        supervision_weight: float,
        state_maps: nn.ModuleList | None = None,
    ) -> None:
        """`state_maps` take the states of a merged student to the size of the teacher's."""
        self.run, self.teacher, self.cfg = run, teacher, cfg
        self.supervision_weight, self.state_maps = supervision_weight, state_maps

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        taught = self.teacher is not None
        count = len(batch["q_input_ids"])
        passes = [(part(batch, "q_"), torch.arange(count, device=batch["q_input_ids"].device))]
        while (place := batch.get(f"c{len(passes) - 1}_place")) is not None:
            passes.append((part(batch, f"c{len(passes) - 1}_"), place))
        outputs = [model(**inputs, output_hidden_states=taught) for inputs, _ in passes]
        q = outputs[0].embedding.float()
        contexts = torch.cat([each.embedding.float() for each in outputs[1:]])
        c, n = contexts[torch.cat([place for _, place in passes[1:]]).argsort()].split(count)
        losses = {}
        if self.cfg.triplet_num:
            losses["triplet"] = F.softplus(gap(q, c) - gap(q, n))
            if self.cfg.triplet_num == 2:
                losses["triplet"] = losses["triplet"] + F.softplus(gap(q, c) - gap(c, n))
        if self.cfg.in_batch:
            of_c, of_n = batch["gradient_c"].split(count)
            along = (batch["gradient_q"] * q + of_c * c + of_n * n).sum(dim=1)
            losses["in_batch"] = batch["in_batch"] + along - along.detach()
        if not taught:
            return losses
        errors, distances = torch.zeros_like(q[:, 0]), torch.zeros_like(q[:, 0])
        for (inputs, place), mine in zip(passes, outputs, strict=True):
            own = place < count  # of what is mined the teacher is not asked
            if own.any():
                error, distance = self._taught(inputs, mine, own)
                errors = errors.index_add(0, place[own], error)
                distances = distances.index_add(0, place[own], distance)
        losses["hidden_states"] = self.supervision_weight * errors
        if self.cfg.emb_loss != "none":
            losses["embedding"] = distances
        return losses

    def _taught(
        self, inputs: dict[str, Tensor], outputs: EmbeddingOutput, rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Error of the hidden states and distance of the embeddings, of some rows of a pass."""
        inputs = {name: value[rows] for name, value in inputs.items()}
        states = [state[rows] for state in outputs.hidden_states]
        with torch.no_grad(), self.run.accelerator.autocast():
            target = self.teacher(**inputs, output_hidden_states=True)
        if self.state_maps is not None:
            with self.run.accelerator.autocast():
                states = [m(s) for m, s in zip(self.state_maps, states, strict=True)]
        errors = state_errors(states, target.hidden_states, inputs["attention_mask"]).sum(dim=0)
        difference = outputs.embedding[rows].float() - target.embedding.float()
        if self.cfg.emb_loss == "L1":
            return errors, difference.abs().sum(dim=1)
        return errors, norm(difference)


def gap(a: Tensor, b: Tensor) -> Tensor:
    """L2 distance of each row of a and of b, [B]."""
    return norm(a - b)


def norm(rows: Tensor) -> Tensor:
    """L2 norm of each row, with a gradient of 0 at 0."""
    return rows.square().sum(dim=1).clamp_min(NEAR_ZERO).sqrt()


# ------------------------------------------------------------------------------------------------
# The task as the scripts see it


class TextBatches:
    """Batches of single texts, questions and contexts, for losses that need no pairs."""

    def __init__(self, pairs: Pairs, step_size: int, seed: int) -> None:
        self.pairs, self.step_size, self.seed = pairs, step_size, seed

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.concatenate(
            [self.pairs.questions.total_lengths, self.pairs.contexts.total_lengths]
        )

    def steps(self, epoch: int) -> list[np.ndarray]:
        """The texts of each optimisation step of an epoch: questions first, then contexts."""
        return squad_utils.plan_steps(self.lengths, self.step_size, self.seed, epoch)

    def batch(self, epoch: int, chosen: np.ndarray) -> dict[str, Tensor]:
        """Inputs [B, L]."""
        count = len(self.pairs.questions)
        asked = self.pairs.questions.batch(chosen[chosen < count]) if (chosen < count).any() else {}
        given = chosen[chosen >= count] - count
        arrays = [asked] if asked else []
        if len(given):
            arrays.append(self.pairs.contexts.batch(given))
        longest = max(each["input_ids"].shape[1] for each in arrays)
        merged = {}
        for name in INPUTS:
            rows = [np.pad(e[name], ((0, 0), (0, longest - e[name].shape[1]))) for e in arrays]
            merged[name] = torch.from_numpy(np.concatenate(rows))
        return merged


class EmbTask:
    """Embeddings for a script: what is read, trained on, evaluated, written and exported.

    Attributes:
        train_pairs, dev_pairs: after `tokenize`.
        searched: the dev file's contexts, then those of --eval_extra_contexts that it has not.
        evaluation: after `make_evaluation`.
    """

    auto_class = AutoModelForEmbedding
    architectures = ("BertForEmbedding", "PackedBertForEmbedding")
    best_by = "mrr"  # of two evaluations, the one with more of it is better
    score_names: ClassVar[dict[str, str]] = {"top_1": "top 1", "top_5": "top 5", "mrr": "MRR"}
    train_pairs: Pairs
    dev_pairs: Pairs
    searched: Texts
    evaluation: EmbEvaluation

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the files that args names.

        Raises:
            UserError: one of them is not what it should be.
        """
        self.args = args
        self.train_data = load_squad(args.squad_train_data, "--squad_train_data")
        self.dev_data = load_squad(args.squad_dev_data, "--squad_dev_data")
        path = getattr(args, "eval_extra_contexts", None)
        self.extra_data = load_squad(path, "--eval_extra_contexts") if path else None

    def hashes(self) -> dict[str, str]:
        """What tells the data from other files of the same name."""
        hashes = {
            "sha256_train": self.train_data.sha256[:16],
            "sha256_dev": self.dev_data.sha256[:16],
        }
        if self.extra_data:
            hashes["sha256_extra"] = self.extra_data.sha256[:16]
        return hashes

    def tokenize(self, tokenizer: Any) -> None:
        """Make the texts of all files.

        Raises:
            UserError: there is nothing to train on, or only one context.
        """
        lengths = (self.args.max_seq_length_q, self.args.max_seq_length_c)
        self.train_pairs = make_pairs(self.train_data, tokenizer, *lengths)
        self.dev_pairs = make_pairs(self.dev_data, tokenizer, *lengths)
        for flag, pairs in (
            ("--squad_train_data", self.train_pairs),
            ("--squad_dev_data", self.dev_pairs),
        ):
            if not len(pairs) or len(pairs.contexts) < 2:
                raise UserError(
                    f"{flag}: {len(pairs)} questions of {len(pairs.contexts)} different contexts;"
                    " at least one of two is needed"
                )
        self.searched = self.dev_pairs.contexts
        if self.extra_data:
            every = dict.fromkeys([*self.searched.strings, *self.extra_data.contexts])
            self.searched = make_texts(list(every), tokenizer, lengths[1], "contexts to search")

    def adapt(self, student: nn.Module) -> None:
        """Give a student that is to be fine-tuned what --pooling and --pooler say.

        Raises:
            UserError: --pooler would undo what the student has learned.
        """
        if self.args.pooling:
            student.config.pooling = self.args.pooling
        if self.args.pooler == "identity":
            name = self.args.model_student
            if (student.config.architectures or [""])[0] in self.architectures:
                raise UserError(
                    f"--pooler=identity: {name} is an embedding model, whose pooler would be lost;"
                    " leave it out"
                )
            student.start_pooler_anew()
            if is_main_process():
                print(f"--model_student {name}: the pooler starts as the identity")

    def make_evaluation(self, run: Run) -> EmbEvaluation:
        """The evaluation on the dev file."""
        size = self.args.per_gpu_eval_batch_size
        self.evaluation = EmbEvaluation(run, self.dev_pairs, self.searched, size)
        return self.evaluation

    def with_teacher(self, student: nn.Module, teacher: nn.Module) -> dict[str, dict[str, float]]:
        """Retrieval of the student's questions among the teacher's contexts."""
        return {"teacher_index": self.evaluation(student, precise=True, index_model=teacher)}

    def batches(self, step_size: int) -> TextBatches:
        """Batches of the training file's texts."""
        return TextBatches(self.train_pairs, step_size, self.args.seed)

    def sample(self, count: int) -> Iterator[dict[str, Tensor]]:
        """Batches of `count` texts, half of them questions, or of all where there are fewer."""
        batches = self.batches(self.args.per_gpu_eval_batch_size)
        rng = np.random.default_rng([self.args.seed, 2])
        asked, given = len(self.train_pairs.questions), len(self.train_pairs.contexts)
        chosen = np.concatenate(
            [rng.permutation(asked)[: count // 2], asked + rng.permutation(given)[: count // 2]]
        )
        chosen = chosen[np.argsort(batches.lengths[chosen], kind="stable")]
        for some in np.split(chosen, range(batches.step_size, len(chosen), batches.step_size)):
            yield batches.batch(0, some)

    def calibration(self, count: int) -> Iterator[dict[str, Tensor]]:
        """`count` training contexts, or all, as they are at run time: inputs
        [1, max_seq_length_c] each, padded."""
        contexts = self.train_pairs.contexts
        chosen = np.random.default_rng([self.args.seed, 3]).permutation(len(contexts))
        for text in chosen[:count]:
            arrays = contexts.batch(text[None], pad_to=self.args.max_seq_length_c)
            yield {name: torch.from_numpy(array) for name, array in arrays.items()}

    @property
    def num_examples(self) -> int:
        """Examples of an epoch of `batches`."""
        return len(self.train_pairs.questions) + len(self.train_pairs.contexts)

    def describe(self) -> str:
        """One line on the data."""
        extra = len(self.searched) - len(self.dev_pairs.contexts)
        more = f" and {extra:,} more" if extra else ""
        return (
            f"{len(self.train_pairs):,} pairs of {len(self.train_pairs.contexts):,} contexts to"
            f" train on, {len(self.dev_pairs):,} questions to find among"
            f" {len(self.dev_pairs.contexts):,} contexts{more}"
        )

    def counts(self) -> dict[str, int]:
        """For metrics.json."""
        return {
            "train_pairs": len(self.train_pairs),
            "train_contexts": len(self.train_pairs.contexts),
            "dev_questions": len(self.dev_pairs),
            "dev_contexts": len(self.dev_pairs.contexts),
            "extra_contexts": len(self.searched) - len(self.dev_pairs.contexts),
        }

    def write_answers(self) -> None:
        """Nothing: vectors are not kept."""

    def write_card(self, metrics: dict[str, Any], script: str, made: str) -> None:
        """Write the model card."""
        report_utils.write_emb_card(self.args.output_dir, metrics, script, made)

    def export(self) -> float:
        """Export the checkpoint in the output folder to model.onnx; see `export`."""
        folder, length = self.args.output_dir, self.args.max_seq_length_c
        return export(folder, self.dev_pairs.contexts, length)


def export(output_dir: str, texts: Texts, max_seq_length_c: int) -> float:
    """Export the checkpoint in output_dir to model.onnx beside it; see `onnx_utils.export_onnx`.

    It is the saved checkpoint that is exported, so the check covers saving and loading too.
    """
    model, quantized = load_for_export(output_dir, AutoModelForEmbedding)
    by_length = np.argsort(texts.total_lengths, kind="stable")
    chosen = by_length[np.linspace(0, len(by_length) - 1, CHECKED_TEXTS).astype(int)]
    return onnx_utils.export_onnx(
        onnx_utils.EmbeddingGraph(model),
        os.path.join(output_dir, "model.onnx"),
        [texts.batch(text[None], pad_to=max_seq_length_c) for text in chosen],
        onnx_utils.EMBEDDING_OUTPUTS,
        quantized,
    )
