"""SQuAD v1.1 and v2.0, from the JSON file to windows, batches and answers.

The way of the data, top to bottom:

    load_squad        JSON -> contexts, questions, answers         (checked key by key)
    tokenize_squad    -> token ids of every context and question   (each tokenised once)
    cut_windows       -> [CLS] question [SEP] context part [SEP]   (index arrays into those ids)
    plan_steps        -> the windows of every optimisation step    (by seed and epoch alone)
    make_batch        -> padded arrays for a model
    best_spans        -> the most probable answer span of each window
    Answers           -> the best span of each question, cut from the original text

Scores are in squad_scores.py. Everything is numpy: answering questions with an exported model
needs no torch.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from cli import UserError, is_main_process, read_text, warn

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")  # of a model
MAX_ANSWER_TOKENS = 30  # longest span that is searched
POOL_STEPS = 64  # steps whose windows are sorted by length together
TOKENIZER_CHUNK = 1000  # texts between two moves of the progress bar
IMPOSSIBLE = -np.inf  # log-probability of what must not be chosen


# ------------------------------------------------------------------------------------------------
# The file


class AnswerRecord(TypedDict):
    """An answer as a SQuAD file has it."""

    text: str
    answer_start: int


class QuestionRecord(TypedDict):
    """A question of a SQuAD file."""

    id: str
    question: str
    answers: list[AnswerRecord]


class ParagraphRecord(TypedDict):
    """A context of a SQuAD file and its questions."""

    context: str
    qas: list[QuestionRecord]


class ArticleRecord(TypedDict):
    """An article of a SQuAD file; these records may have other keys as well."""

    paragraphs: list[ParagraphRecord]


@dataclass(frozen=True)
class SquadData:
    """A SQuAD file. Question i is ids[i], questions[i], asked of contexts[context_of[i]].

    Attributes:
        articles: the file's `data` list as it was read, for evaluation scripts.
        answers: for each question its (answer_start, text) pairs that stand in the context;
            empty for a question without an answer.
        answerable: bool [questions], what the file says: whether it gives an answer at all.
        version_2: whether some question has no answer (SQuAD 2.0), or the file's version says so.
        sha256: of the file's text, to tell whether a run goes on with the same data.
    """

    path: str
    articles: list[ArticleRecord]
    contexts: list[str]
    ids: list[str]
    questions: list[str]
    context_of: np.ndarray
    answers: list[list[tuple[int, str]]]
    answerable: np.ndarray
    version_2: bool
    sha256: str


def load_squad(path: str, flag: str) -> SquadData:
    """Read and check a SQuAD v1.1 or v2.0 file.

    Answers whose text is not at `answer_start` are left out, with one warning.

    Args:
        path: the JSON file.
        flag: the command-line flag that gave it, for error messages.

    Raises:
        UserError: the file cannot be read, is not JSON (names the line), is not SQuAD (names the
            path of the first offending key), or has no question.
    """
    text = read_text(path, flag)
    try:
        root = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{flag}: {path} line {error.lineno} column {error.colno} is not JSON: {error.msg}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number too long, lists too deep
        raise UserError(f"{flag}: {path} is not JSON that can be read: {error}") from None

    def get(parent: Any, where: str, key: str, kind: type) -> Any:
        names = {list: "a list", str: "a string", int: "a whole number"}
        here = f"{where}.{key}" if where else key
        if not isinstance(parent, dict):
            raise UserError(f"{flag}: {path} is not SQuAD: {where or 'the top'} must be an object")
        if key not in parent:
            raise UserError(f"{flag}: {path} is not SQuAD: {here} is missing")
        if not isinstance(parent[key], kind) or isinstance(parent[key], bool):
            raise UserError(f"{flag}: {path} is not SQuAD: {here} must be {names[kind]}")
        if kind is str:
            try:
                parent[key].encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{flag}: {path}: {here} has half of a surrogate pair, which is not text"
                ) from None
        return parent[key]

    contexts: list[str] = []
    ids: list[str] = []
    questions: list[str] = []
    context_of: list[int] = []
    answers: list[list[tuple[int, str]]] = []
    answerable: list[bool] = []
    misplaced: list[str] = []
    articles = get(root, "", "data", list)
    for a, article in enumerate(articles):
        for p, paragraph in enumerate(get(article, f"data[{a}]", "paragraphs", list)):
            where = f"data[{a}].paragraphs[{p}]"
            context = get(paragraph, where, "context", str)
            for q, qa in enumerate(get(paragraph, where, "qas", list)):
                at = f"{where}.qas[{q}]"
                ids.append(get(qa, at, "id", str))
                questions.append(get(qa, at, "question", str))
                context_of.append(len(contexts))
                given = get(qa, at, "answers", list)
                kept = []
                for n, answer in enumerate(given):
                    start = get(answer, f"{at}.answers[{n}]", "answer_start", int)
                    words = get(answer, f"{at}.answers[{n}]", "text", str)
                    if words.strip() and start >= 0 and context.startswith(words, start):
                        kept.append((start, words))
                    else:
                        misplaced.append(ids[-1])
                answers.append(kept)
                answerable.append(bool(given))
            contexts.append(context)
    if not questions:
        raise UserError(f"{flag}: {path} has no questions")
    if misplaced:
        lost = sum(has and not kept for has, kept in zip(answerable, answers, strict=True))
        warn(
            f"{path}: {len(misplaced)} answers are not in the context at answer_start and are left"
            f" out (first ids: {', '.join(misplaced[:3])}); {lost} questions lose their only answer"
        )
    version = str(root.get("version", ""))
    return SquadData(
        path=path,
        articles=articles,
        contexts=contexts,
        ids=ids,
        questions=questions,
        context_of=np.array(context_of, np.int32),
        answers=answers,
        answerable=np.array(answerable),
        version_2=version.lstrip("vV").startswith("2") or not all(answerable),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
    )


# ------------------------------------------------------------------------------------------------
# Tokens: flat arrays, one slice a text


@dataclass(frozen=True)
class Tokens:
    """The tokens of many texts in flat arrays; text i is the slice bounds[i]:bounds[i + 1].

    Attributes:
        ids: int32 [tokens].
        bounds: int64 [texts + 1].
        offsets: int32 [tokens, 2], each token's first character and the one after its last, in
            the original text; None where they were not asked for.
    """

    ids: np.ndarray
    bounds: np.ndarray
    offsets: np.ndarray | None

    @cached_property
    def lengths(self) -> np.ndarray:
        """int64 [texts], tokens of each text."""
        return np.diff(self.bounds)

    def of(self, text: int) -> slice:
        return slice(self.bounds[text], self.bounds[text + 1])

    def offsets_of(self, text: int) -> np.ndarray:
        """The offsets of a text's tokens, where they were kept: int32 [tokens, 2]."""
        assert self.offsets is not None
        return self.offsets[self.of(text)]


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], with_offsets: bool, description: str
) -> Tokens:
    """Tokenise texts on all cores, without special tokens, truncation or padding.

    Args:
        tokenizer: the Rust tokenizer (`PreTrainedTokenizerFast.backend_tokenizer`). Truncation
            and padding that its file may carry are switched off.
        with_offsets: keep character offsets too.
        description: shown beside the progress bar.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    encode = tokenizer.encode_batch if with_offsets else tokenizer.encode_batch_fast
    ids, offsets, lengths = [np.zeros(0, np.int32)], [np.zeros((0, 2), np.int32)], [0]
    with tqdm(
        total=len(texts),
        desc=description,
        unit=" texts",
        unit_scale=True,
        disable=None if len(texts) > TOKENIZER_CHUNK and is_main_process() else True,
    ) as bar:
        for first in range(0, len(texts), TOKENIZER_CHUNK):
            encodings = encode(texts[first : first + TOKENIZER_CHUNK], add_special_tokens=False)
            for encoding in encodings:
                ids.append(np.array(encoding.ids, np.int32))
                lengths.append(len(ids[-1]))
                if with_offsets:
                    offsets.append(np.array(encoding.offsets, np.int32).reshape(-1, 2))
            bar.update(len(encodings))
    return Tokens(
        ids=np.concatenate(ids),
        bounds=np.cumsum(lengths, dtype=np.int64),
        offsets=np.concatenate(offsets) if with_offsets else None,
    )


@dataclass(frozen=True)
class SpecialIds:
    """Ids of the tokens that BERT's input format adds."""

    cls: int
    sep: int
    pad: int


# ------------------------------------------------------------------------------------------------
# Windows


@dataclass(frozen=True)
class Windows:
    """Windows over contexts, as indices: no token is copied before a batch is made.

    Window w is [CLS] question [SEP] context part [SEP], of question `question[w]` and of the
    context tokens first[w] .. first[w] + length[w]. A question's windows follow one another.

    Attributes:
        contexts, questions: their tokens; questions are already cut to max_seq_length_q.
        context_of: int32 [questions].
        question, first, length: int32 [windows].
        answer_bounds: int64 [questions + 1]; the answers of question q are
            answer_tokens[answer_bounds[q]:answer_bounds[q + 1]].
        answer_tokens: int32 [answers, 2], first and last token in the context.
        special: ids of [CLS], [SEP] and [PAD].
    """

    contexts: Tokens
    questions: Tokens
    context_of: np.ndarray
    question: np.ndarray
    first: np.ndarray
    length: np.ndarray
    answer_bounds: np.ndarray
    answer_tokens: np.ndarray
    special: SpecialIds

    def __len__(self) -> int:
        return len(self.question)

    @cached_property
    def context_at(self) -> np.ndarray:
        """int64 [windows], position of the first context token: after [CLS] question [SEP]."""
        return self.questions.lengths[self.question] + 2

    @cached_property
    def total_lengths(self) -> np.ndarray:
        """int64 [windows], tokens of each window with its special tokens."""
        return self.context_at + self.length + 1


def tokenize_squad(
    data: SquadData, tokenizer: Tokenizer, max_seq_length_q: int
) -> tuple[Tokens, Tokens]:
    """The tokens of all contexts (with offsets) and of all questions (cut to max_seq_length_q)."""
    contexts = tokenize(tokenizer, data.contexts, True, "tokenising contexts")
    questions = tokenize(tokenizer, data.questions, False, "tokenising questions")
    return contexts, truncate(questions, max_seq_length_q)


def truncate(tokens: Tokens, max_length: int) -> Tokens:
    """The first `max_length` tokens of every text."""
    starts = np.repeat(tokens.bounds[:-1], tokens.lengths)
    keep = np.arange(len(tokens.ids)) - starts < max_length
    bounds = np.concatenate([[0], np.cumsum(np.minimum(tokens.lengths, max_length))])
    offsets = None if tokens.offsets is None else tokens.offsets[keep]
    return Tokens(tokens.ids[keep], bounds.astype(np.int64), offsets)


def cut_windows(
    data: SquadData,
    contexts: Tokens,
    questions: Tokens,
    special: SpecialIds,
    max_seq_length_c: int,
    doc_stride: int,
    for_training: bool,
) -> Windows:
    """Cut every question's context into windows of at most max_seq_length_c tokens in all.

    Windows start `doc_stride` tokens apart, and the last one is moved back so that it ends where
    the context ends. Where a question leaves less room for the context than the stride, its
    windows start one room apart, so that they cover the context in any case.

    Args:
        for_training: leave out questions whose answers were all misplaced in the file: they
            would be learnt as having none.

    Raises:
        UserError: a question leaves no room for a context token.
    """
    room = max_seq_length_c - 3 - questions.lengths  # context tokens beside each question
    if len(room) and room.min() < 1:
        worst = int(room.argmin())
        raise UserError(
            f"--max_seq_length_c={max_seq_length_c} leaves no room for a context beside a question"
            f" of {questions.lengths[worst]} tokens ({data.ids[worst]}): at least"
            f" {max_seq_length_c - room[worst] + 1} is needed, or a smaller --max_seq_length_q"
        )
    stride = np.minimum(doc_stride, room)
    context_length = contexts.lengths[data.context_of]
    count = 1 + np.maximum(0, -(-(context_length - room) // stride))
    answer_count = np.array([len(each) for each in data.answers])
    if for_training:
        count[data.answerable & (answer_count == 0)] = 0
    question = np.repeat(np.arange(len(count)), count)
    nth = np.arange(len(question)) - np.repeat(np.cumsum(count) - count, count)
    last_start = np.maximum(0, context_length - room)[question]
    return Windows(
        contexts=contexts,
        questions=questions,
        context_of=data.context_of,
        question=question.astype(np.int32),
        first=np.minimum(nth * stride[question], last_start).astype(np.int32),
        length=np.minimum(context_length, room)[question].astype(np.int32),
        answer_bounds=np.concatenate([[0], np.cumsum(answer_count)]),
        answer_tokens=_answer_tokens(data, contexts),
        special=special,
    )


def _answer_tokens(data: SquadData, contexts: Tokens) -> np.ndarray:
    """int32 [answers, 2]: first and last token that share a character with each answer."""
    found = []
    for context, answers in zip(data.context_of, data.answers, strict=True):
        starts, ends = contexts.offsets_of(context).T
        for start, text in answers:
            first = np.searchsorted(ends, start, side="right")
            last = np.searchsorted(starts, start + len(text), side="left") - 1
            found.append((first, last))
    return np.array(found, np.int32).reshape(-1, 2)


def targets(windows: Windows, rng: np.random.Generator) -> np.ndarray:
    """The spans to learn: int64 [windows, 2], positions in the window of first and last token.

    Where a question has several answers one is drawn, the same for all its windows. (0, 0), the
    [CLS] token, where the window lacks part of the answer or the question has none.
    """
    counts = np.diff(windows.answer_bounds)
    draw = windows.answer_bounds[:-1] + (rng.random(len(counts)) * counts).astype(np.int64)
    # A question without answers points one past its own; any row serves, it is masked below.
    rows = np.vstack([windows.answer_tokens, [[0, -1]]])[np.where(counts > 0, draw, -1)]
    first, last = rows[windows.question].T.astype(np.int64)
    inside = (first >= windows.first) & (last < windows.first + windows.length) & (first <= last)
    shift = windows.context_at - windows.first
    return np.where(inside[:, None], np.stack([first + shift, last + shift], axis=1), 0)


# ------------------------------------------------------------------------------------------------
# Batches


def plan_steps(lengths: np.ndarray, step_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The windows of each optimisation step of an epoch, as indices, longest last in a step.

    Windows are shuffled, sorted by length within pools of POOL_STEPS steps so that a step's
    windows are of similar length, and the steps shuffled again. The order depends on seed and
    epoch alone: not on the number of processes, nor on the accumulation. Each window occurs once;
    the last step has what is left over.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    whole = len(order) - len(order) % step_size
    steps = []
    pool_size = POOL_STEPS * step_size
    for pool in np.split(order[:whole], range(pool_size, whole, pool_size)):
        pool = pool[np.argsort(lengths[pool], kind="stable")]
        steps += np.split(pool, range(step_size, len(pool), step_size)) if len(pool) else []
    steps = [steps[i] for i in rng.permutation(len(steps))]
    rest = order[whole:]
    return steps + ([rest[np.argsort(lengths[rest], kind="stable")]] if len(rest) else [])


def padded(length: int) -> int:
    """The length that rows of so many tokens are padded to: a multiple of 8."""
    return -(-length // 8) * 8


def token_rows(
    rows: Sequence[Sequence[np.ndarray]], special: SpecialIds, pad_to: int | None = None
) -> dict[str, np.ndarray]:
    """What a model reads, padded to the longest row, rounded up to a multiple of 8.

    Args:
        rows: the token ids of each row's parts; a row is [CLS] part [SEP] part [SEP] ..., and a
            part's place is its token type.
        pad_to: pad to this length instead (what a static graph needs).

    Returns:
        input_ids, attention_mask, token_type_ids, position_ids: int64 [B, L].
    """
    lengths = np.array([1 + sum(len(part) + 1 for part in parts) for parts in rows])
    longest = int(lengths.max())
    input_ids = np.full((len(rows), pad_to or padded(longest)), special.pad, np.int64)
    token_type_ids = np.zeros_like(input_ids)
    input_ids[:, 0] = special.cls
    for row, parts in enumerate(rows):
        begin = 1
        for kind, part in enumerate(parts):
            end = begin + len(part)
            input_ids[row, begin:end] = part
            input_ids[row, end] = special.sep
            token_type_ids[row, begin : end + 1] = kind
            begin = end + 1
    position_ids = np.broadcast_to(np.arange(input_ids.shape[1]), input_ids.shape)
    return {
        "input_ids": input_ids,
        "attention_mask": (position_ids < lengths[:, None]).astype(np.int64),
        "token_type_ids": token_type_ids,
        # Rounding up may go past the positions that a model has; padding may repeat one.
        "position_ids": np.minimum(position_ids, max(longest, pad_to or 0) - 1),
    }


def make_batch(
    windows: Windows, chosen: np.ndarray, pad_to: int | None = None
) -> dict[str, np.ndarray]:
    """`token_rows` of a few windows, `chosen`: int [B]."""
    rows = []
    for w in chosen:
        question = windows.questions.ids[windows.questions.of(windows.question[w])]
        begin = windows.contexts.bounds[windows.context_of[windows.question[w]]] + windows.first[w]
        rows.append((question, windows.contexts.ids[begin : begin + windows.length[w]]))
    return token_rows(rows, windows.special, pad_to)


# ------------------------------------------------------------------------------------------------
# Answers


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def best_spans(
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    lengths: np.ndarray,
    context_at: np.ndarray,
    max_answer_tokens: int = MAX_ANSWER_TOKENS,
    taken: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The most probable span inside the context part of each window of a batch.

    A span's probability is the product of the softmax probabilities of its start and its end,
    taken over the window's tokens; it has at most max_answer_tokens tokens. Of equal spans the
    one that starts, then ends, first wins (equal logits; sums may round apart).

    Args:
        start_logits, end_logits: float [B, L].
        lengths: int [B], tokens of each window, padding excluded.
        context_at: int [B], position of the first context token; the last is lengths - 2.
        taken: bool [B, L], positions that no span may hold; None for none.

    Returns:
        start, end: int64 [B], positions in the window, end inclusive.
        log_prob: float64 [B]; -inf where there is no span.
        no_answer: float64 [B], log-probability of the span ([CLS], [CLS]).
    """
    batch, length = start_logits.shape
    position = np.arange(length)
    real = position < lengths[:, None]
    context = (position >= context_at[:, None]) & (position < lengths[:, None] - 1)
    start = _log_softmax(np.where(real, start_logits.astype(np.float64), IMPOSSIBLE))
    end = _log_softmax(np.where(real, end_logits.astype(np.float64), IMPOSSIBLE))
    no_answer = start[:, 0] + end[:, 0]

    def ahead(values: np.ndarray, beyond: float) -> np.ndarray:
        """[b, i, d]: the value at i + d; `beyond` the window's end."""
        padding = ((0, 0), (0, max_answer_tokens - 1))
        padded_values = np.pad(values, padding, constant_values=beyond)
        return np.lib.stride_tricks.sliding_window_view(padded_values, max_answer_tokens, axis=1)

    # score[b, i, d]: log-probability that the answer starts at i and ends at i + d
    score = np.where(context, start, IMPOSSIBLE)[:, :, None] + ahead(
        np.where(context, end, IMPOSSIBLE), IMPOSSIBLE
    )
    if taken is not None:
        passed = np.cumsum(taken, axis=1)
        free = ~taken[:, :, None] & (ahead(passed, 0) == passed[:, :, None])
        score = np.where(free, score, IMPOSSIBLE)
    score = score.reshape(batch, -1)
    best = score.argmax(axis=1)
    first, extra = best // max_answer_tokens, best % max_answer_tokens
    return first, first + extra, score[np.arange(batch), best], no_answer


def cut(text: str, begin: int, end: int) -> str:
    """text[begin:end], with the combining accents that follow: BERT's tokens end before them."""
    while end < len(text) and unicodedata.combining(text[end]):
        end += 1
    return text[begin:end]


class Answers:
    """The best span of every question over all its windows, whatever order they come in.

    Attributes:
        log_prob: float64 [questions], of the best span; -inf where none was found.
        no_answer: float64 [questions], log-probability of no answer in that span's window.
    """

    def __init__(self, data: SquadData, windows: Windows) -> None:
        self.data, self.windows = data, windows
        self.log_prob = np.full(len(data.ids), IMPOSSIBLE)
        self.no_answer = np.zeros(len(data.ids))
        self._window = np.full(len(data.ids), -1)  # the window of the best span
        self._span = np.zeros((len(data.ids), 2), np.int64)  # tokens of the context

    def add(self, chosen: np.ndarray, start_logits: np.ndarray, end_logits: np.ndarray) -> None:
        """Take in the logits [B, L] of the windows `chosen` [B]."""
        windows = self.windows
        context_at = windows.context_at[chosen]
        lengths = context_at + windows.length[chosen] + 1
        start, end, log_prob, no_answer = best_spans(start_logits, end_logits, lengths, context_at)
        shift = windows.first[chosen] - context_at
        spans = np.stack([start + shift, end + shift], axis=1)
        self.merge(list(zip(chosen, log_prob, no_answer, spans, strict=True)))

    def merge(self, found: Sequence[tuple[int, float, float, np.ndarray]]) -> None:
        """Take in (window, log_prob, no_answer, span) of windows; of equals the first wins."""
        for window, log_prob, no_answer, span in found:
            q = self.windows.question[window]
            earlier = log_prob == self.log_prob[q] and window < self._window[q]
            if log_prob > self.log_prob[q] or earlier:
                self.log_prob[q], self.no_answer[q] = log_prob, no_answer
                self._window[q], self._span[q] = window, span

    def found(self) -> list[tuple[int, float, float, np.ndarray]]:
        """What `merge` takes, to bring the answers of several processes together."""
        return [
            (int(self._window[q]), self.log_prob[q], self.no_answer[q], self._span[q])
            for q in np.flatnonzero(self._window >= 0)
        ]

    def texts(self) -> dict[str, str]:
        """Question id -> the answer, cut from the original context; "" where none was found."""
        answers = {}
        for q, name in enumerate(self.data.ids):
            answers[name] = ""
            if self._window[q] >= 0:
                context = self.windows.context_of[q]
                offsets = self.windows.contexts.offsets_of(context)
                begin, end = offsets[self._span[q, 0], 0], offsets[self._span[q, 1], 1]
                answers[name] = cut(self.data.contexts[context], begin, end)
        return answers

    def no_answer_scores(self) -> dict[str, float]:
        """Question id -> probability of no answer over that of the best span."""
        odds = np.where(self._window >= 0, self.no_answer - self.log_prob, np.inf)
        return dict(zip(self.data.ids, np.exp(np.minimum(odds, 700.0)).tolist(), strict=True))
