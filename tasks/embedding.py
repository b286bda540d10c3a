"""Embeddings as a task: ranks of contexts, evaluation, batches of texts."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bert.embedding import AutoModelForEmbedding, BertForEmbedding
from bert.model_folder import AutoClass
from cli import UserError, is_main_process, warn
from deploy import onnx_file
from squad_utils import INPUTS, load_squad
from tasks import embedding_loss
from tasks.hidden_states import OutputLoss
from tasks.task import Rows, Task
from tasks.texts import CONTEXT_BLOCK, Encoder, Pairs, Texts, make_pairs, make_texts, once
from training.passes import Batches, BatchesByLength, LossFunction, as_tensors
from training.results import TaskCard
from training.run import Run

TOP = (1, 5, 10, 100, 200)  # the numbers of nearest contexts that figures are about
QUESTION_BLOCK = 1024  # questions whose distances are computed at once: 256 MB with the contexts


# ------------------------------------------------------------------------------------------------
# Ranks


def ranks(questions: Tensor, contexts: Tensor, own: Tensor) -> Tensor:
    """Count, for each question, the contexts that are nearer (L2) than its own.

    A context at the same distance, to rounding, counts as nearer. So vectors that are all equal,
    or not finite, find nothing.

    Distances are matrix products in blocks, so memory hardly grows with the number of vectors. All
    arguments are on one device, which computes without a wait.

    Args:
        questions: [Q, H].
        contexts: [C, H].
        own: int64 [Q], the index of each question's own context.

    Returns:
        int64 [Q].
    """
    # |q - c|^2 orders contexts as |c|^2 / 2 - q c does.
    blocks = contexts.split(CONTEXT_BLOCK)
    halves = torch.cat([block.square().sum(dim=1) / 2 for block in blocks])
    rounding = 1e-6 * halves.abs().max()
    found = torch.zeros(len(questions), dtype=torch.int64, device=questions.device)
    for first in range(0, len(questions), QUESTION_BLOCK):
        block = slice(first, first + QUESTION_BLOCK)
        q, mine = questions[block], own[block]
        limit = halves[mine] - (q * contexts[mine]).sum(dim=1)
        for begin in range(0, len(contexts), CONTEXT_BLOCK):
            there = slice(begin, begin + CONTEXT_BLOCK)
            scores = torch.addmm(halves[there], q, contexts[there].T, alpha=-1)
            nearer = ~(scores > limit[:, None] + rounding)
            # A question's own context must not count, even if rounding makes it nearer.
            column = (mine - begin).clamp(0, scores.shape[1] - 1)[:, None]
            elsewhere = column != (mine - begin)[:, None]
            nearer.scatter_(1, column, nearer.gather(1, column) & elsewhere)
            found[block] += nearer.sum(dim=1)
    return found


def retrieval_figures(found: Tensor) -> dict[str, float]:
    """Percentage of questions whose own context is among the nearest, and mean reciprocal rank."""
    found = found.cpu()
    figures = {f"top_{k}": float((found < k).double().mean() * 100) for k in TOP}
    figures["mrr"] = float((1.0 / (found + 1).double()).mean() * 100)
    return figures


class EmbEvaluation:
    """Retrieval by the dev file's questions among `contexts`, which begin with the file's own."""

    def __init__(self, run: Run, pairs: Pairs, contexts: Texts, batch_size: int) -> None:
        self.run, self.pairs, self.contexts, self.batch_size = run, pairs, contexts, batch_size

    def __call__(
        self, model: nn.Module, fp32: bool = False, index_model: nn.Module | None = None
    ) -> dict[str, float]:
        """`top_1` ... `top_200` and `mrr`, in percent; each text is encoded once.

        Args:
            fp32: as in `stage.Evaluation`.
            index_model: embeds the contexts in place of `model`.
        """
        encode = Encoder(self.run, self.batch_size, fp32, may_stop=True)
        texts = self.pairs.questions
        contexts = encode(index_model or model, self.contexts, np.arange(len(self.contexts)))
        questions = encode(model, texts, np.arange(len(texts)))
        asked, own = (
            torch.from_numpy(each).to(contexts.device)
            for each in (self.pairs.question, self.pairs.context)
        )
        return retrieval_figures(ranks(questions[asked], contexts, own))


# ------------------------------------------------------------------------------------------------
# The task


class TextBatches(BatchesByLength):
    """Batches of single texts for losses that need no pairs: all questions, then all contexts."""

    def __init__(self, pairs: Pairs, step_size: int, seed: int) -> None:
        lengths = [pairs.questions.total_lengths, pairs.contexts.total_lengths]
        super().__init__(np.concatenate(lengths), step_size, seed)
        self.pairs = pairs

    def batch(self, epoch: int, chosen: np.ndarray) -> dict[str, Tensor]:
        """Inputs [B, L]."""
        pairs, count = self.pairs, len(self.pairs.questions)
        parts = (
            (pairs.questions, chosen[chosen < count]),
            (pairs.contexts, chosen[chosen >= count] - count),
        )
        arrays = [texts.batch(some) for texts, some in parts if len(some)]
        longest = max(each["input_ids"].shape[1] for each in arrays)

        def padded(name: str) -> list[np.ndarray]:
            return [np.pad(e[name], ((0, 0), (0, longest - e[name].shape[1]))) for e in arrays]

        return as_tensors({name: np.concatenate(padded(name)) for name in INPUTS})


class EmbeddingTask(Task):
    """Embeddings: texts, and the nearest contexts.

    Attributes:
        train_pairs, dev_pairs: set by `tokenize`.
        searched: the dev file's contexts, then those of --eval_extra_contexts.
    """

    auto_class: ClassVar[AutoClass] = AutoModelForEmbedding
    architectures: ClassVar[tuple[str, ...]] = ("BertForEmbedding", "PackedBertForEmbedding")
    best_by = "mrr"
    drop_by = "top_5"
    packing_rate = 2.5e-4
    score_names: ClassVar[dict[str, str]] = {"top_1": "top 1", "top_5": "top 5", "mrr": "MRR"}
    outputs = onnx_file.Outputs(("embedding",), ("embedding",), per_token=False)
    train_pairs: Pairs
    dev_pairs: Pairs
    searched: Texts
    evaluation: EmbEvaluation

    def __init__(self, args: argparse.Namespace) -> None:
        """Read the files that the flags name.

        Raises:
            UserError: a file cannot be used, or a length leaves no room for a text.
        """
        for name in ("max_seq_length_q", "max_seq_length_c"):
            if getattr(args, name) < 3:
                raise UserError(
                    f"--{name}={getattr(args, name)} leaves nothing between [CLS] and [SEP]; it"
                    " must be 3 or more"
                )
        if args.max_seq_length_q > args.max_seq_length_c:
            raise UserError(
                f"--max_seq_length_q={args.max_seq_length_q} is over"
                f" --max_seq_length_c={args.max_seq_length_c}, the longest text that the model"
                " takes"
            )
        super().__init__(args)
        if path := getattr(args, "eval_extra_contexts", None):
            self.data["extra"] = load_squad(path, "--eval_extra_contexts")

    def tokenize(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Tokenise the texts of all files.

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
                    f"{flag}: {len(pairs)} questions and {len(pairs.contexts)} different contexts;"
                    " at least one question and two contexts are needed"
                )
        self.train_rows, self.dev_rows = (
            Rows(each.contexts.total_lengths, each.contexts.batch)
            for each in (self.train_pairs, self.dev_pairs)
        )
        self.searched = self.dev_pairs.contexts
        if "extra" in self.data:
            extra = self.data["extra"]
            every = list(once([*self.searched.strings, *extra.contexts]).values())
            own = len(self.searched)
            self.searched, longer = make_texts(every, tokenizer, lengths[1], "contexts to search")
            if longer[own:].any():
                warn(
                    f"{extra.path}: {longer[own:].sum():,} of {len(every) - own:,} further contexts"
                    f" are cut at --max_seq_length_c={lengths[1]} tokens"
                )

    def apply_flags(self, student: PreTrainedModel) -> None:
        """Apply --pooling and --pooler to a student before fine-tuning.

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
                    " leave the flag out"
                )
            cast(BertForEmbedding, student).start_pooler_anew()
            if is_main_process():
                print(f"--model_student {name}: the pooler starts as the identity")

    def make_evaluation(self, run: Run) -> EmbEvaluation:
        size = self.args.per_gpu_eval_batch_size
        self.evaluation = EmbEvaluation(run, self.dev_pairs, self.searched, size)
        return self.evaluation

    def score_in_teacher_index(
        self, student: nn.Module, teacher: nn.Module
    ) -> dict[str, dict[str, float]]:
        """Retrieval by the student's questions among contexts that the teacher embeds."""
        return {"teacher_index": self.evaluation(student, fp32=True, index_model=teacher)}

    def batches(self, step_size: int) -> TextBatches:
        return TextBatches(self.train_pairs, step_size, self.args.seed)

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Half of the `count` random texts are questions."""
        asked, given = len(self.train_pairs.questions), len(self.train_pairs.contexts)
        return np.concatenate(
            [rng.permutation(asked)[: count // 2], asked + rng.permutation(given)[: count // 2]]
        )

    def fine_tuning(
        self, run: Run, teacher: PreTrainedModel | None, state_maps: nn.ModuleList | None
    ) -> tuple[LossFunction, Batches]:
        """`EmbeddingLoss` by --loss_cfg, and batches of pairs with their hard negatives."""
        args = self.args
        cfg = embedding_loss.parse_loss_cfg(args.loss_cfg)
        mining = embedding_loss.Mining(
            args.hnm_num, args.hnm_batch_size, args.hnm_hist_num, args.hnm_hist_alpha
        )
        pairs, size, seed = self.train_pairs, args.total_train_batch_size, args.seed
        negatives = embedding_loss.HardNegatives(run, pairs, mining, seed, cfg)
        run.accelerator.register_for_checkpointing(negatives)
        batches = embedding_loss.PairBatches(pairs, negatives, size, seed)
        weight = args.supervision_weight
        return embedding_loss.EmbeddingLoss(run, teacher, cfg, weight, state_maps), batches

    def output_loss(self, run: Run, teachers: Sequence[PreTrainedModel]) -> OutputLoss | None:
        """`EmbeddingError`, by --embedding_weight."""
        weight = self.args.embedding_weight
        return embedding_loss.EmbeddingError(run, teachers[0], weight) if weight else None

    @property
    def num_examples(self) -> int:
        return len(self.train_pairs.questions) + len(self.train_pairs.contexts)

    def describe(self) -> str:
        extra = len(self.searched) - len(self.dev_pairs.contexts)
        more = f" and {extra:,} more" if extra else ""
        return (
            f"{len(self.train_pairs):,} pairs of {len(self.train_pairs.contexts):,} contexts to"
            f" train on, {len(self.dev_pairs):,} questions to find among"
            f" {len(self.dev_pairs.contexts):,} contexts{more}"
        )

    def counts(self) -> dict[str, int]:
        return {
            "train_pairs": len(self.train_pairs),
            "train_contexts": len(self.train_pairs.contexts),
            "dev_questions": len(self.dev_pairs),
            "dev_contexts": len(self.dev_pairs.contexts),
            "extra_contexts": len(self.searched) - len(self.dev_pairs.contexts),
        }

    def card(self, figures: Mapping[str, float]) -> TaskCard:
        args, counts, dev = self.args, self.counts(), os.path.basename(self.args.squad_dev_data)
        return TaskCard(
            title="Embeddings of questions and contexts",
            tag="sentence-similarity",
            rows={
                f"own context nearest, `{dev}`": f"{figures['top_1']:.2f}%",
                "among the 5 nearest": f"{figures['top_5']:.2f}%",
                "mean reciprocal rank": f"{figures['mrr']:.2f}%",
                "dev questions": counts["dev_questions"],
                "contexts searched": len(self.searched),
                "training pairs": counts["train_pairs"],
            },
            outputs="output\n`embedding`, float32 [1, H].",
            inputs="The input is `[CLS] text [SEP]`, token types 0; questions are cut to"
            f" {args.max_seq_length_q} tokens in all,\ncontexts to {args.max_seq_length_c}. The"
            " right context is the one whose embedding is nearest (L2) to the question's.",
        )

    def reader_settings(self, figures: Mapping[str, float]) -> dict[str, float | None]:
        """The lengths to which texts are cut."""
        return {name: getattr(self.args, name) for name in ("max_seq_length_q", "max_seq_length_c")}
