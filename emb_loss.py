"""The losses of embeddings: --loss_cfg, hard negatives, batches of pairs, triplet and softmax."""

from __future__ import annotations

import difflib
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import squad_utils
from cli_utils import UserError
from emb_task import Pairs, Texts, encode
from embedding_model import EmbeddingOutput
from model_utils import state_errors
from onnx_utils import INPUTS
from run_utils import Run

PASS_TEXTS = 16  # of similar length, in one pass: what is mined has any length
NEAR_ZERO = 1e-12  # squared distances below it have no direction


# ------------------------------------------------------------------------------------------------
# --loss_cfg


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
    if "temperature" in values and not cfg.in_batch:
        raise UserError("--loss_cfg: temperature is of in_batch:1, which is not there")
    return cfg


# ------------------------------------------------------------------------------------------------
# Hard negatives


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
