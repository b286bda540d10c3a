"""The losses of embeddings: --loss_cfg, hard negatives, batches of pairs, triplet and softmax."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypedDict, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput

from bert.embedding import Embedding, EmbeddingOutput
from cli import UserError, key_values, one_of, warn
from squad_utils import INPUTS
from tasks.hidden_states import summed_errors
from tasks.texts import Encoder, Pairs, split_passes
from training.passes import BatchesByLength, as_tensors, to_device
from training.run import Run

PASS_TEXTS = 16  # texts of similar length per pass on a CPU: mined ones may have any length
NEAREST = 32  # contexts that are read first per question: so many hardly ever answer it
NEAR_ZERO = 1e-12  # smaller squared distances get a gradient of 0


# ------------------------------------------------------------------------------------------------
# --loss_cfg


@dataclass(frozen=True)
class LossCfg:
    """The values of --loss_cfg.

    Attributes:
        triplet_num: terms of the triplet loss: 0, 1 or 2.
        emb_loss: "L1" or "L2" adds this distance between the teacher's and the student's embedding;
            "none" adds nothing.
        in_batch: 1 adds a softmax over all contexts of the step and those mined for it.
        temperature: the temperature of that softmax; None: learned, see `fit_temperature`.
    """

    triplet_num: int = 1
    emb_loss: str = "none"
    in_batch: int = 0
    temperature: float | None = None


def temperature(text: str) -> float | None:
    """A kind for `key_values`: a number over 0, or None for "learned"."""
    if text == "learned":
        return None
    with contextlib.suppress(ValueError):
        if 0 < float(text) < float("inf"):
            return float(text)
    raise ValueError("a number over 0, or learned")


LOSS_KINDS: dict[str, Callable[[str], object]] = {
    "triplet_num": one_of(0, 1, 2),
    "emb_loss": one_of("none", "L1", "L2"),
    "in_batch": one_of(0, 1),
    "temperature": temperature,
}


def parse_loss_cfg(text: str) -> LossCfg:
    """Parse --loss_cfg; an omitted key keeps its default.

    Raises:
        UserError: as `cli.key_values`; or the loss has no term; or a temperature without in_batch.
    """
    values = key_values(text, "--loss_cfg", LOSS_KINDS)
    cfg = LossCfg(**values)
    if not cfg.triplet_num and not cfg.in_batch:
        raise UserError("--loss_cfg: triplet_num:0 leaves no loss without in_batch:1")
    if "temperature" in values and not cfg.in_batch:
        raise UserError("--loss_cfg: temperature belongs to in_batch:1, which is missing")
    return cfg


# ------------------------------------------------------------------------------------------------
# Hard negatives


@dataclass(frozen=True)
class Mining:
    """How contexts are mined.

    Attributes:
        num: random contexts that each step embeds.
        batch_size: contexts per pass of one process on a CPU.
        history: steps whose contexts are candidates.
        alpha: distances of contexts that are n steps old are multiplied by alpha^n.
    """

    num: int
    batch_size: int
    history: int
    alpha: float


class MinedState(TypedDict):
    """The contexts of the last steps, newest first, with their vectors; and the temperature."""

    ids: list[np.ndarray]
    vectors: list[Tensor]
    temperature: float | None


class HardNegatives:
    """For each question of an optimisation step, the nearest context that does not answer it.

    Each step embeds `num` random contexts without gradient. These and the contexts of the steps
    before, `history` steps in all, are the candidates. Distances of older ones are multiplied by
    alpha^age. Vectors and distances stay on the device: a step reads only the order of contexts.
    All of it is saved and restored with a run's state.

    With in_batch it also computes the loss of each question against all contexts of the step and
    those mined for it, and the gradient of this loss in their vectors. The passes of the step need
    only this gradient, so the loss spans the whole step, however it is split into passes and
    processes (Gao et al., 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited
    Setup"). Vectors of earlier steps only help to choose negatives: no gradient moves them, so in
    the softmax all new vectors could win by moving away from them together.

    Attributes:
        negative_of: from each pair of the present step to its negative context. It is the pair's
            own context if every other context of the file answers it; the triplet then counts 0.
        in_batch: losses [Q] of the present step's pairs, and gradients in their questions,
            contexts and mined contexts, [Q, H] each, on the device; None without in_batch.
        row: from a pair to its row in `in_batch`.
        temperature: the temperature at the last step; if learned, an FP64 scalar on the device.
    """

    def __init__(self, run: Run, pairs: Pairs, mining: Mining, seed: int, cfg: LossCfg) -> None:
        self.run, self.pairs, self.mining, self.seed, self.cfg = run, pairs, mining, seed, cfg
        self.encode = Encoder(run, mining.batch_size)
        self.kept: deque[tuple[np.ndarray, Tensor]] = deque(maxlen=mining.history)
        self.temperature: float | Tensor | None = cfg.temperature
        self.negative_of: dict[int, int] = {}
        self.told: set[str] = set()
        self.in_batch: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
        self.row: dict[int, int] = {}

    def __call__(self, model: nn.Module, step: int, chosen: np.ndarray) -> None:
        """Mine negatives for the pairs `chosen`, the same on all processes."""
        pairs, count = self.pairs, len(self.pairs.contexts)
        rng = np.random.default_rng([self.seed, step, 4])
        drawn = rng.choice(count, min(self.mining.num, count), replace=False)
        self.kept.appendleft((drawn, self.encode(model, pairs.contexts, drawn)))
        questions = self.encode(model, pairs.questions, pairs.question[chosen])
        candidates = np.concatenate([ids for ids, _ in self.kept])
        self.negative_of = self._nearest(step, chosen, candidates, self._distances(questions))
        if self.cfg.in_batch:
            self.in_batch = self._softmax(model, chosen, questions)
            self.row = {int(pair): row for row, pair in enumerate(chosen)}

    def _distances(self, questions: Tensor) -> Tensor:
        """Distances [Q, candidates], multiplied by alpha^age."""
        alpha, kept = self.mining.alpha, enumerate(self.kept)
        parts = [all_distances(questions, v) * alpha**age for age, (_, v) in kept]
        return torch.cat(parts, dim=1)

    def _nearest(
        self, step: int, chosen: np.ndarray, candidates: np.ndarray, distances: Tensor
    ) -> dict[int, int]:
        """`negative_of`; reads the order of the NEAREST candidates, and of the others if needed."""
        order = distances.argsort(dim=1)
        nearest = candidates[order[:, :NEAREST].cpu().numpy()]

        def from_the_nearest(row: int) -> Iterator[int]:
            yield from nearest[row].tolist()
            yield from candidates[order[row, NEAREST:].cpu().numpy()].tolist()

        found = {}
        for row, pair in enumerate(chosen.tolist()):
            contexts = from_the_nearest(row)
            wrong = next((c for c in contexts if not self.pairs.answered_by(pair, c)), None)
            found[pair] = self._random(step, pair) if wrong is None else wrong
        return found

    def _random(self, step: int, pair: int) -> int:
        """A random context that does not answer the pair; its own context if all answer it.

        It is for pairs that all candidates answer.
        """
        rng = np.random.default_rng([self.seed, step, pair, 5])
        contexts = rng.permutation(len(self.pairs.contexts)).tolist()
        wrong = next((c for c in contexts if not self.pairs.answered_by(pair, c)), None)
        remedy = "it gets another one at random"
        if wrong is None:
            remedy = "and so does every other context of its file, so the triplet leaves it out"
        if remedy not in self.told:
            self.told.add(remedy)
            question = self.pairs.questions.strings[self.pairs.question[pair]]
            warn(f"every context mined for the question {question!r} answers it; {remedy}")
        return int(self.pairs.context[pair]) if wrong is None else wrong

    def _softmax(
        self, model: nn.Module, chosen: np.ndarray, questions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`in_batch`: -log softmax of -distance / temperature at each question's own context."""
        pairs, count = self.pairs, len(chosen)
        mined = [self.negative_of[int(pair)] for pair in chosen]
        texts, place = np.unique([*pairs.context[chosen], *mined], return_inverse=True)
        contexts = self.encode(model, pairs.contexts, texts)
        questions.requires_grad_(), contexts.requires_grad_()
        others = np.array([[pairs.answered_by(pair, c) for c in texts] for pair in chosen])
        others[np.arange(count), place[:count]] = False
        arrays = {"excluded": others, "places": place, "uses": np.bincount(place)}
        excluded, places, uses = to_device(as_tensors(arrays), questions.device).values()
        own = places[:count]
        scores = (-all_distances(questions, contexts)).masked_fill(excluded, float("-inf"))
        now: float | Tensor | None = self.cfg.temperature
        if now is None:
            now = self.temperature = fit_temperature(scores.detach(), own, self.temperature)
        losses = F.cross_entropy(scores / now, own, reduction="none")
        of_questions, of_contexts = torch.autograd.grad(losses.sum(), (questions, contexts))
        # A context in several places is embedded in each: each gets its share of the gradient.
        of_contexts = (of_contexts / uses[:, None]).index_select(0, places)
        return losses.detach(), of_questions, of_contexts[:count], of_contexts[count:]

    def state_dict(self) -> MinedState:
        """The state on the CPU, so that it loads on any device."""
        return {
            "ids": [ids for ids, _ in self.kept],
            "vectors": [vectors.cpu() for _, vectors in self.kept],
            "temperature": None if self.temperature is None else float(self.temperature),
        }

    def load_state_dict(self, state: MinedState) -> None:
        self.temperature = state["temperature"]
        self.kept.clear()
        vectors = [each.to(self.run.accelerator.device) for each in state["vectors"]]
        self.kept.extend(zip(state["ids"], vectors, strict=True))


def fit_temperature(scores: Tensor, own: Tensor, now: float | Tensor | None) -> Tensor:
    """The softmax temperature of a step, from the temperature of the step before.

    If the temperature does not fit the scale of the vectors, training first rescales the vectors.
    So the first temperature is the one with the least loss. Each later one moves a tenth of the
    way, in logarithms, to the temperature with the least loss now.

    Args:
        scores: [Q, C], -distance, or -inf for a context that does not count.
        own: int64 [Q], the own context of each question.
        now: the temperature of the step before, or None at the first step.

    Returns:
        an FP64 scalar on the device of `scores`; only the first call waits for the device.
    """
    if now is None:
        spread = scores[scores.isfinite()].std().double()
        start, (low, high, part) = torch.where(spread == 0, 1.0, spread), (-32, 8, 4)
    else:
        start = torch.as_tensor(now, dtype=torch.float64, device=scores.device)
        low, high, part = -8, 8, 8
    powers = torch.arange(low, high + 1, dtype=torch.float64, device=scores.device) / part
    tried = start * 2.0**powers
    every = scores / tried.to(scores.dtype)[:, None, None]
    losses = F.cross_entropy(every.flatten(0, 1), own.repeat(len(tried)), reduction="none")
    best = tried.index_select(0, losses.view(len(tried), -1).mean(dim=1).argmin()[None])[0]
    return best if now is None else start * (best / start) ** 0.1


def all_distances(a: Tensor, b: Tensor) -> Tensor:
    """L2 distances of all rows of a to all rows of b, [A, B], by one matrix product."""
    squares = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1) - 2 * a @ b.T
    return squares.clamp_min(NEAR_ZERO).sqrt()


# ------------------------------------------------------------------------------------------------
# Batches


class PairBatches(BatchesByLength):
    """Batches of pairs with their hard negatives."""

    def __init__(self, pairs: Pairs, negatives: HardNegatives, step_size: int, seed: int) -> None:
        """Steps hold pairs whose contexts are of similar length."""
        super().__init__(pairs.contexts.total_lengths[pairs.context], step_size, seed)
        self.pairs, self.negatives = pairs, negatives

    def prepare(self, model: nn.Module, step: int, chosen: np.ndarray) -> None:
        """Mine the step's negatives."""
        self.negatives(model, step, chosen)

    def tokens(self, chosen: np.ndarray) -> np.ndarray:
        """Tokens of each pair without padding, int64 [len(chosen)]: its question and twice its
        context, since the mined context is unknown before the step."""
        questions = self.pairs.questions.total_lengths[self.pairs.question[chosen]]
        return questions + 2 * self.lengths[chosen]

    def batch(self, epoch: int, chosen: np.ndarray) -> dict[str, Tensor]:
        """The texts of a few pairs, in groups of similar length, with indices into the groups.

        Returns:
            "q_...": inputs of the questions, [B, Lq];
            "c0_...", "c1_...", ...: inputs of groups of contexts, the pairs' own and mined ones;
            "c0_rows", "c0_pairs", ...: rows of a group with the pairs' own contexts, and the places
                of these pairs in the batch; absent if the group has none;
            "place" [2B]: among the rows of all groups, the row of each pair's own context, then
                of each mined one;
            "attention_mask" [1, all]: all masks, to count tokens;
            "has_negative" [B]: 0 for a pair whose mined context is its own, else 1;
            with in_batch, on the device, "in_batch" [B]: the losses, and their gradients:
                "gradient_q" [B, H] in questions, "gradient_c" [2B, H] in own and mined contexts.
        """
        pairs, mined = self.pairs, self.negatives
        arrays = _named("q_", pairs.questions.batch(pairs.question[chosen]))
        negatives = [mined.negative_of[int(pair)] for pair in chosen]
        contexts = np.concatenate([pairs.context[chosen], negatives])
        lengths = pairs.contexts.total_lengths[contexts]
        order = np.argsort(lengths, kind="stable")
        accelerator = mined.run.accelerator
        for i, places in enumerate(split_passes(lengths[order], PASS_TEXTS, accelerator)):
            group = order[places]
            arrays |= _named(f"c{i}_", pairs.contexts.batch(contexts[group]))
            rows = np.flatnonzero(group < len(chosen))
            if len(rows):
                arrays |= {f"c{i}_rows": rows, f"c{i}_pairs": group[rows]}
        arrays["place"] = np.argsort(order)
        arrays["has_negative"] = (pairs.context[chosen] != negatives).astype(np.float32)
        masks = [array.ravel() for name, array in arrays.items() if name.endswith("_mask")]
        arrays["attention_mask"] = np.concatenate(masks)[None]
        batch = as_tensors(arrays)
        if mined.in_batch is not None:
            ours = torch.tensor([mined.row[int(pair)] for pair in chosen])
            ours = to_device({"rows": ours}, accelerator.device)["rows"]
            losses, of_q, of_c, of_n = (each.index_select(0, ours) for each in mined.in_batch)
            batch |= {"in_batch": losses, "gradient_q": of_q, "gradient_c": torch.cat([of_c, of_n])}
        return batch


def _named(prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {prefix + name: array for name, array in arrays.items()}


def inputs_of(batch: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The inputs of questions ("q_") or of a group of contexts ("c0_", "c1_", ...)."""
    return {name: batch[prefix + name] for name in INPUTS}


# ------------------------------------------------------------------------------------------------
# The loss


class EmbeddingLoss:
    """The losses of a question q, its context c and its hard negative n, [B] each.

    - `triplet`: softplus(|q - c| - |q - n|), and with triplet_num 2 also
      softplus(|q - c| - |c - n|);
    - `in_batch`, with in_batch: the softmax of `HardNegatives`, by its gradient;
    - `hidden_states`, with a teacher: supervision_weight x squared error of the hidden states of
      question and context, summed over pairs of states;
    - `embedding`, with a teacher: the L1 or L2 distance between the teacher's and the student's
      embeddings.

    Nothing here reads a tensor's values, so nothing waits for a GPU.
    """

    def __init__(
        self,
        run: Run,
        teacher: nn.Module | None,
        cfg: LossCfg,
        supervision_weight: float,
        state_maps: nn.ModuleList | None = None,
    ) -> None:
        """`state_maps` map the states of a merged student to the teacher's size."""
        self.run, self.teacher, self.cfg = run, teacher, cfg
        self.supervision_weight, self.state_maps = supervision_weight, state_maps

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        teacher = self.teacher
        count = len(batch["q_input_ids"])
        prefixes = ["q_"]
        while f"c{len(prefixes) - 1}_input_ids" in batch:
            prefixes.append(f"c{len(prefixes) - 1}_")
        outputs = [
            model(**inputs_of(batch, each), output_hidden_states=teacher is not None)
            for each in prefixes
        ]
        q = outputs[0].embedding.float()
        contexts = torch.cat([each.embedding.float() for each in outputs[1:]])
        c, n = contexts.index_select(0, batch["place"]).split(count)
        losses = {}
        if self.cfg.triplet_num:
            triplet = F.softplus(row_distance(q, c) - row_distance(q, n))
            if self.cfg.triplet_num == 2:
                triplet = triplet + F.softplus(row_distance(q, c) - row_distance(c, n))
            losses["triplet"] = triplet * batch["has_negative"]
        if self.cfg.in_batch:
            of_c, of_n = batch["gradient_c"].split(count)
            along = (batch["gradient_q"] * q + of_c * c + of_n * n).sum(dim=1)
            losses["in_batch"] = batch["in_batch"] + along - along.detach()
        if teacher is None:
            return losses
        errors, distances = self._taught(teacher, inputs_of(batch, "q_"), outputs[0])
        for prefix, mine in zip(prefixes[1:], outputs[1:], strict=True):
            rows = batch.get(f"{prefix}rows")
            if rows is not None:  # the teacher does not embed mined contexts
                error, distance = self._taught(teacher, inputs_of(batch, prefix), mine, rows)
                errors = errors.index_add(0, batch[f"{prefix}pairs"], error)
                distances = distances.index_add(0, batch[f"{prefix}pairs"], distance)
        losses["hidden_states"] = self.supervision_weight * errors
        if self.cfg.emb_loss != "none":
            losses["embedding"] = distances
        return losses

    def _taught(
        self,
        teacher: nn.Module,
        inputs: dict[str, Tensor],
        outputs: EmbeddingOutput,
        rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Error of the hidden states and distance of the embeddings, [rows] each, for all rows of
        a pass or for those with indices `rows`."""
        states, embedding = list(outputs.hidden_states or ()), outputs.embedding
        if rows is not None:
            inputs = {name: value.index_select(0, rows) for name, value in inputs.items()}
            states = [state.index_select(0, rows) for state in states]
            embedding = embedding.index_select(0, rows)
        with torch.no_grad(), self.run.accelerator.autocast():
            target = teacher(**inputs, output_hidden_states=True)
        mask, accelerator = inputs["attention_mask"], self.run.accelerator
        errors = summed_errors(states, target.hidden_states, mask, self.state_maps, accelerator)
        difference = embedding.float() - target.embedding.float()
        if self.cfg.emb_loss == "L1":
            return errors, difference.abs().sum(dim=1)
        return errors, norm(difference)


class EmbeddingError:
    """The weighted squared error of a distilled embedding, mean over H, as `embedding` [B]."""

    def __init__(self, run: Run, teacher: PreTrainedModel, weight: float) -> None:
        self.run, self.teacher, self.weight = run, cast(Embedding, teacher), weight

    def __call__(
        self, outputs: ModelOutput, state: Tensor, batch: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        with torch.no_grad(), self.run.accelerator.autocast():
            target = self.teacher.embed(state, batch["attention_mask"])
        difference = cast(EmbeddingOutput, outputs).embedding.float() - target.float()
        return {"embedding": self.weight * difference.square().mean(dim=1)}


def row_distance(a: Tensor, b: Tensor) -> Tensor:
    """L2 distance between the same rows of a and b, [B]."""
    return norm(a - b)


def norm(rows: Tensor) -> Tensor:
    """L2 norm of each row, with a gradient of 0 at 0."""
    return rows.square().sum(dim=1).clamp_min(NEAR_ZERO).sqrt()
