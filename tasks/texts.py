"""Texts, pairs of a question and its context, and vectors of texts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

import squad_utils
from bert.embedding import Embedding
from bert.model_folder import special_ids
from cli import warn
from squad_utils import SpecialIds, SquadData, Tokens
from training.passes import as_tensors, to_device
from training.run import Run

CONTEXT_BLOCK = 65536  # vectors that are added or compared at once
PASS_TOKENS = 32768  # tokens, with padding, per forward pass on a GPU


@dataclass(frozen=True)
class Texts:
    """Texts as the model reads them: [CLS] text [SEP], token types 0, cut to a length.

    Attributes:
        strings: the texts, each once.
        tokens: the tokens of each text, after the cut.
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
        """`squad_utils.token_rows` of the texts `chosen`, int [B]."""
        rows = [(self.tokens.ids[self.tokens.of(text)],) for text in chosen]
        return squad_utils.token_rows(rows, self.special, pad_to)


def make_texts(
    strings: Sequence[str], tokenizer: PreTrainedTokenizerFast, max_length: int, name: str
) -> tuple[Texts, np.ndarray]:
    """Tokenise texts and cut each to max_length tokens, [CLS] and [SEP] included.

    Args:
        name: of the texts, for the progress bar.

    Returns:
        the texts, and whether each was longer: bool [texts].
    """
    tokens = squad_utils.tokenize(
        tokenizer.backend_tokenizer, list(strings), False, f"tokenising {name}"
    )
    cut = squad_utils.truncate(tokens, max_length - 2)
    return Texts(list(strings), cut, special_ids(tokenizer)), tokens.lengths > cut.lengths


def once(texts: Iterable[str]) -> dict[str, str]:
    """From the words of each text to the first text with these words: white space is ignored."""
    found: dict[str, str] = {}
    for text in texts:
        found.setdefault(" ".join(text.split()), text)
    return found


@dataclass(frozen=True)
class Pairs:
    """Questions and the contexts that answer them, each text once.

    Pair i is questions[question[i]] and contexts[context[i]].

    Attributes:
        question, context: int64 [pairs].
        article: int64 [contexts], the article of each context.
        answers: the answers of each pair, in lower case.
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
        """From each question to its contexts: a question may be asked of several."""
        found: dict[int, set[int]] = {}
        for question, context in zip(self.question.tolist(), self.context.tolist(), strict=True):
            found.setdefault(question, set()).add(context)
        return found

    def answered_by(self, pair: int, context: int) -> bool:
        """Whether a context answers a pair's question: the file says so, or it belongs to the same
        article and contains one of the answers."""
        own = self.context[pair]
        if int(context) in self._answering[int(self.question[pair])]:
            return True
        if self.article[context] != self.article[own]:
            return False
        text = self.contexts.strings[context].lower()
        return any(
            next(squad_utils.whole_words(answer, text), None) is not None
            for answer in self.answers[pair]
        )


def make_pairs(
    data: SquadData,
    tokenizer: PreTrainedTokenizerFast,
    max_seq_length_q: int,
    max_seq_length_c: int,
) -> Pairs:
    """The pairs of a SQuAD file, without the questions that have no answer (SQuAD 2.0)."""
    asked = np.flatnonzero(data.answerable)
    questions = list(dict.fromkeys(data.questions[i] for i in asked))
    question_at = {text: i for i, text in enumerate(questions)}
    strings = once(data.contexts)
    place = {words: i for i, words in enumerate(strings)}
    context_at = np.array([place[" ".join(text.split())] for text in data.contexts])
    article, paragraph = np.zeros(len(strings), np.int64), 0
    for a, each in enumerate(data.articles):
        for _ in each["paragraphs"]:
            article[context_at[paragraph]] = a
            paragraph += 1
    contexts, longer = make_texts(list(strings.values()), tokenizer, max_seq_length_c, "contexts")
    warn_of_cut_contexts(data, tokenizer, max_seq_length_c, longer, context_at)
    return Pairs(
        questions=make_texts(questions, tokenizer, max_seq_length_q, "questions")[0],
        contexts=contexts,
        question=np.array([question_at[data.questions[i]] for i in asked], np.int64),
        context=context_at[data.context_of[asked]],
        article=article,
        answers=[tuple({text.lower() for _, text in data.answers[i]}) for i in asked],
    )


def warn_of_cut_contexts(
    data: SquadData,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int,
    longer: np.ndarray,
    context_at: np.ndarray,
) -> None:
    """Warn of cut texts, with their number and the number of those that lose an answer.

    Args:
        longer: bool [texts], whether a text is cut.
        context_at: int64 [contexts of data], the text of each context.
    """
    if not longer.any():
        return
    ends = np.zeros(len(data.contexts), np.int64)  # the end of the last answer
    for context, answers in zip(data.context_of, data.answers, strict=True):
        ends[context] = max([ends[context], *(start + len(text) for start, text in answers)])
    cut = np.flatnonzero(longer[context_at])
    strings = [data.contexts[i] for i in cut]
    tokens = squad_utils.tokenize(tokenizer.backend_tokenizer, strings, True, "")
    kept = [tokens.offsets_of(i)[max_length - 3, 1] for i in range(len(cut))]
    lost = np.unique(context_at[cut[ends[cut] > kept]])
    warn(
        f"{data.path}: {longer.sum():,} of {len(longer):,} contexts are cut at"
        f" --max_seq_length_c={max_length} tokens; {len(lost):,} of them hold an answer in the part"
        " that is cut off"
    )


def split_passes(lengths: np.ndarray, least: int, accelerator: Accelerator) -> list[np.ndarray]:
    """Split texts, sorted by length, into forward passes.

    A CPU gets `least` texts per pass, so that they need little padding. A GPU is fast only with
    many tokens at once. It gets PASS_TOKENS tokens per pass with padding, or one process's share
    of all tokens if that is less, and never fewer than `least` texts.

    Args:
        lengths: int64 [texts], rising or falling.

    Returns:
        for each pass, places in `lengths`, int64.
    """
    padded = [squad_utils.padded(length) for length in lengths.tolist()]
    limit = 0
    if accelerator.device.type != "cpu":
        limit = min(PASS_TOKENS, -(-sum(padded) // accelerator.num_processes))
    ends, begin, longest = [], 0, 0
    for i, length in enumerate(padded):
        longest = max(longest, length)
        if i - begin >= least and (i + 1 - begin) * longest > limit:
            ends.append(i)
            begin, longest = i, length
    return np.split(np.arange(len(lengths)), ends)


@dataclass(frozen=True)
class Encoder:
    """Encodes texts as vectors.

    Attributes:
        batch_size: texts per pass; on a GPU the fewest, see `split_passes`.
        fp32: compute in FP32, whatever the run's precision is.
        may_stop: let a signal stop the run between two passes, since nothing needs saving.
    """

    run: Run
    batch_size: int
    fp32: bool = False
    may_stop: bool = False

    @torch.no_grad()
    def __call__(self, model: nn.Module, texts: Texts, chosen: np.ndarray) -> Tensor:
        """Vectors of texts[chosen], FP32 [len(chosen), H] on the device, alike on all processes.

        The model runs in eval mode. A pass holds texts of similar length, padded to the longest;
        each process takes a share of the passes. Nothing here waits for a GPU.
        """
        accelerator = self.run.accelerator
        order = np.argsort(-texts.total_lengths[chosen], kind="stable")
        passes = split_passes(texts.total_lengths[chosen[order]], self.batch_size, accelerator)
        was_training = model.training
        model.eval()
        width = cast(Embedding, model).output_map.out_features
        vectors = torch.zeros(len(chosen), width, device=accelerator.device)
        for places in passes[accelerator.process_index :: accelerator.num_processes]:
            if self.may_stop:
                self.run.stop_if_asked()
            arrays = {**texts.batch(chosen[order[places]]), "rows": order[places]}
            batch = to_device(as_tensors(arrays), accelerator.device)
            rows = batch.pop("rows")
            with contextlib.nullcontext() if self.fp32 else accelerator.autocast():
                embedding = model(**batch).embedding
            vectors.index_copy_(0, rows, embedding.float())
        model.train(was_training)
        if accelerator.num_processes > 1:
            # Each process has zeros where the others have vectors.
            for block in vectors.split(CONTEXT_BLOCK):
                block.copy_(accelerator.reduce(block, reduction="sum"))
        return vectors
