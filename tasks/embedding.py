"""Embeddings as a task for the training loop: texts, vectors, metrics, export."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

import squad_utils
from bert.embedding import AutoModelForEmbedding
from bert.model_folder import load_for_export, special_ids
from cli import UserError, is_main_process
from deploy import onnx_file
from deploy.onnx_check import Check
from squad_utils import INPUTS, SpecialIds, SquadData, Tokens, load_squad
from training import results
from training.passes import Batches, to_device
from training.run import Run

CHECKED_TEXTS = 8  # on which the exported file is compared with PyTorch


TOP = (1, 5, 10, 100, 200)  # of the nearest contexts


QUESTION_BLOCK, CONTEXT_BLOCK = 1024, 65536  # of the distances computed at once: 256 MB


PASS_TOKENS = 32768  # with padding, of one forward pass on a GPU


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
        places = np.arange(length)
        # What pads beyond the longest may be beyond the model's positions.
        position_ids = np.minimum(places, (pad_to or int(total.max())) - 1)
        position_ids = np.broadcast_to(position_ids, input_ids.shape).copy()
        return {
            "input_ids": input_ids,
            "attention_mask": (places < total[:, None]).astype(np.int64),
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

    @cached_property
    def _answering(self) -> dict[int, set[int]]:
        """The contexts of each question: the same one may be asked of several."""
        found: dict[int, set[int]] = {}
        for question, context in zip(self.question.tolist(), self.context.tolist(), strict=True):
            found.setdefault(question, set()).add(context)
        return found

    def answered_by(self, pair: int, context: int) -> bool:
        """Whether a context is one that the file gives the pair's question, or is of the same
        article and has one of its answers."""
        own = self.context[pair]
        if int(context) in self._answering[int(self.question[pair])]:
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
def split_passes(lengths: np.ndarray, least: int, accelerator: Accelerator) -> list[np.ndarray]:
    """Split texts that are in the order of their lengths into those of each forward pass.

    A CPU gets `least` texts a pass, which are then padded little. A GPU is fast only with many
    tokens at once: it gets as many texts as have PASS_TOKENS tokens with padding, or as each
    process's share of all tokens if that is less; but never fewer than `least`.

    Args:
        lengths: int64 [texts], rising or falling.

    Returns:
        places in `lengths`, int64, of each pass.
    """
    padded = -(-lengths // 8) * 8
    limit = 0
    if accelerator.device.type != "cpu":
        limit = min(PASS_TOKENS, -(-int(padded.sum()) // accelerator.num_processes))
    ends, begin, longest = [], 0, 0
    for i, length in enumerate(padded.tolist()):
        longest = max(longest, length)
        if i - begin >= least and (i + 1 - begin) * longest > limit:
            ends.append(i)
            begin, longest = i, length
    return np.split(np.arange(len(lengths)), ends)


@torch.no_grad()
def encode(
    run: Run,
    model: nn.Module,
    texts: Texts,
    chosen: np.ndarray,
    batch_size: int,
    precise: bool = False,
    may_stop: bool = False,
) -> Tensor:
    """Vectors of texts[chosen], FP32 [len(chosen), H] on the device, the same on all processes.

    In eval mode, in passes of texts of similar length, padded to the longest of each; every process
    takes some of them. Nothing here waits for a GPU.

    Args:
        batch_size: texts in a pass; on a GPU the fewest, see `split_passes`.
        precise: compute in FP32 whatever the run's precision is.
        may_stop: a signal stops the run between two batches, since nothing is to be saved.
    """
    accelerator = run.accelerator
    order = np.argsort(-texts.total_lengths[chosen], kind="stable")
    passes = split_passes(texts.total_lengths[chosen[order]], batch_size, accelerator)
    was_training = model.training
    model.eval()
    width = model.output_map.out_features
    vectors = torch.zeros(len(chosen), width, device=accelerator.device)
    for places in passes[accelerator.process_index :: accelerator.num_processes]:
        if may_stop:
            run.stop_if_asked()
        arrays = {**texts.batch(chosen[order[places]]), "rows": order[places]}
        batch = {name: torch.from_numpy(array) for name, array in arrays.items()}
        batch = to_device(batch, accelerator.device)
        rows = batch.pop("rows")
        with contextlib.nullcontext() if precise else accelerator.autocast():
            embedding = model(**batch).embedding
        vectors.index_copy_(0, rows, embedding.float())
    model.train(was_training)
    if accelerator.num_processes > 1:
        # Each process has zeros where the others have vectors.
        for block in vectors.split(CONTEXT_BLOCK):
            block.copy_(accelerator.reduce(block, reduction="sum"))
    return vectors


def ranks(questions: Tensor, contexts: Tensor, own: Tensor) -> Tensor:
    """How many contexts are nearer (L2) to each question than its own is: int64 [questions].

    What is as near but for rounding counts as nearer, so that vectors that are all alike find
    nothing; and so do vectors that are not finite.

    As matrix products in blocks: what it needs beside the vectors hardly grows with their number.
    Computed where the arguments are, all on one device; nothing is read from it.

    Args:
        questions: [Q, H].
        contexts: [C, H].
        own: int64 [Q], the index of each question's own context.
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
            # A question's own context is not nearer than itself, whatever rounding makes of it.
            column = (mine - begin).clamp(0, scores.shape[1] - 1)[:, None]
            elsewhere = column != (mine - begin)[:, None]
            nearer.scatter_(1, column, nearer.gather(1, column) & elsewhere)
            found[block] += nearer.sum(dim=1)
    return found


def retrieval_figures(found: Tensor) -> dict[str, float]:
    """Share of questions whose own context is among the nearest, and mean reciprocal rank, in %."""
    found = found.cpu()
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
            index_model: what embeds the contexts in the place of `model`.
        """

        def vectors(of: nn.Module, texts: Texts) -> Tensor:
            every = np.arange(len(texts))
            return encode(self.run, of, texts, every, self.batch_size, precise, may_stop=True)

        contexts = vectors(index_model or model, self.contexts)
        questions = vectors(model, self.pairs.questions)
        asked, own = (
            torch.from_numpy(each).to(contexts.device)
            for each in (self.pairs.question, self.pairs.context)
        )
        return retrieval_figures(ranks(questions[asked], contexts, own))


# ------------------------------------------------------------------------------------------------
# The task as the scripts see it
class TextBatches(Batches):
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

    def tokens(self, chosen: np.ndarray) -> np.ndarray:
        """Tokens of each text without padding, int64 [len(chosen)]."""
        return self.lengths[chosen]

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
            UserError: one of them is not what it should be, or a length leaves no room for a text.
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
                f" --max_seq_length_c={args.max_seq_length_c}, the longest that the model is for"
            )
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
        results.write_emb_card(self.args.output_dir, metrics, script, made)

    def export(self) -> Check:
        """Export the checkpoint in the output folder to model.onnx; see `export`."""
        folder, length = self.args.output_dir, self.args.max_seq_length_c
        return export(folder, self.dev_pairs.contexts, length)


def export(output_dir: str, texts: Texts, max_seq_length_c: int) -> Check:
    """Export the checkpoint in output_dir to model.onnx beside it; see `onnx_file.export_onnx`.

    It is the saved checkpoint that is exported, so the check covers saving and loading too.
    """
    model, quantized = load_for_export(output_dir, AutoModelForEmbedding)
    by_length = np.argsort(texts.total_lengths, kind="stable")
    chosen = by_length[np.linspace(0, len(by_length) - 1, CHECKED_TEXTS).astype(int)]
    return onnx_file.export_onnx(
        onnx_file.EmbeddingGraph(model),
        os.path.join(output_dir, "model.onnx"),
        [texts.batch(text[None], pad_to=max_seq_length_c) for text in chosen],
        quantized,
    )
