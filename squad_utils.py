"""SQuAD v1.1 and v2.0, from the data file to windows, batches and answers.

The way of the data, top to bottom:

    load_squad        file -> contexts, questions, answers         (checked key by key)
    tokenize_squad    -> token ids of every context and question   (each tokenised once)
    cut_windows       -> [CLS] question [SEP] context part [SEP]   (index arrays into those ids)
    plan_steps        -> the windows of every optimisation step    (by seed and epoch alone)
    make_batch        -> padded arrays for a model
    best_spans        -> the most probable answer span of each window
    span_scores       -> its score among the spans of all windows
    Answers           -> the best span of each question, cut from the original text

F1 and exact match are in deploy/squad_scores.py. Everything here is numpy, so that an exported
model answers questions without torch.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypedDict

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

from cli import UserError, is_main_process, tell, warn
from files import squad_layouts
from files.squad_layouts import DataFile, within

INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")  # of a model
MAX_ANSWER_LENGTH = 30  # the most tokens of an answer, unless a user sets another number
POOL_STEPS = 64  # steps whose windows are sorted by length together
TOKENIZER_CHUNK = 1000  # texts between two moves of the progress bar
IMPOSSIBLE = -np.inf  # log odds of spans that must not be chosen
TEMPERATURES = (0.25, 4.0)  # the least and the most that `fit_temperature` tries
FIT_STEPS = 12  # of its search: the last interval is 0.5% wide
# Thai, Lao, Burmese, Hangul (whose particles join words), Khmer, kana and Chinese characters.
UNSPACED = re.compile(
    "[\u0e00-\u0eff\u1000-\u11ff\u1780-\u17ff\u2e80-\u9fff\ua960-\ua97f\uac00-\ud7ff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)


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
    """A SQuAD file. Question i is ids[i], questions[i], about contexts[context_of[i]].

    Attributes:
        articles: the articles in SQuAD's layout, for evaluation scripts. Each question is there
            once; its answers are a list, which is empty if it has none.
        answers: the (answer_start, text) pairs of each question that are in its context; empty for
            a question without an answer.
        answerable: bool [questions], whether the file gives an answer, in the context or not.
        version_2: whether some question has no answer (SQuAD 2.0), or the file's version says so.
        sha256: the hash of the file's text, so that a run resumes only with the same data.
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

    @property
    def all_answers(self) -> list[list[str]]:
        """The texts of each question's answers, those that are not in its context too."""
        return [
            [answer["text"] for answer in qa["answers"]]
            for article in self.articles
            for paragraph in article["paragraphs"]
            for qa in paragraph["qas"]
        ]


def load_squad(path: str, flag: str) -> SquadData:
    """Read and check a data file: SQuAD v1.1 or v2.0, or another layout of `squad_layouts`.

    A line tells of each oddity that the file's author may not know; see `_tell_notes`.

    Args:
        path: the file, or a folder with parquet files.
        flag: the command-line flag that gave it, for error messages.

    Raises:
        UserError: the file cannot be read, or has none of the layouts, a wrong record (the message
            names its place), two questions with one id, or no question.
    """
    file = squad_layouts.read(path, flag)
    notes: Notes = defaultdict(list)
    articles = _read_articles(file, notes)
    paragraphs = [paragraph for article in articles for paragraph in article["paragraphs"]]
    asked = [(n, qa) for n, paragraph in enumerate(paragraphs) for qa in paragraph["qas"]]
    if not asked:
        raise UserError(f"{flag}: {path} has no questions")
    answers: list[list[tuple[int, str]]] = []
    for n, qa in asked:
        context, name = paragraphs[n]["context"], qa["id"]
        given = [(each["answer_start"], each["text"]) for each in qa["answers"]]
        kept = [(at, text) for at, text in given if at >= 0 and context.startswith(text, at)]
        answers.append(kept)
        notes["misplaced"] += [name] * (len(given) - len(kept))
        notes["lost" if given else "unanswered"] += [] if kept else [name]
    version = str(file.root.get("version", ""))
    version_2 = version.lstrip("vV").startswith("2")
    _tell_notes(file, notes, len(asked), len(paragraphs), "" if version_2 else version or None)
    return SquadData(
        path=path,
        articles=articles,
        contexts=[paragraph["context"] for paragraph in paragraphs],
        ids=[qa["id"] for _, qa in asked],
        questions=[qa["question"] for _, qa in asked],
        context_of=np.array([n for n, _ in asked], np.int32),
        answers=answers,
        answerable=np.array([bool(qa["answers"]) for _, qa in asked]),
        version_2=version_2 or bool(notes["unanswered"]),
        sha256=file.sha256,
    )


Notes = defaultdict[str, list[str]]  # kind of oddity -> ids of the questions that have it
Seen = dict[str, tuple[object, str]]  # id -> question with context and answers; and its place


def _read_articles(file: DataFile, notes: Notes) -> list[ArticleRecord]:
    """The articles of a file, checked, with each question once."""
    articles: list[ArticleRecord] = []
    seen: Seen = {}
    places = iter(file.places or ())
    for a, article in enumerate(file.get(file.root, "", "data", list)):
        paragraphs: list[ParagraphRecord] = []
        for p, paragraph in enumerate(file.get(article, f"data[{a}]", "paragraphs", list)):
            where = f"data[{a}].paragraphs[{p}]"
            context = file.get(paragraph, where, "context", str)
            qas: list[QuestionRecord] = []
            for q, qa in enumerate(file.get(paragraph, where, "qas", list)):
                at = next(places, f"{where}.qas[{q}]")
                name, question = file.get(qa, at, "id", str), file.get(qa, at, "question", str)
                answers = _read_answers(file, qa, at, context, notes)
                spans = [(each["answer_start"], each["text"]) for each in answers]
                if _is_repeated(file, name, (question, context, spans), at, seen):
                    notes["repeated"].append(name)
                else:
                    qas.append({**qa, "id": name, "question": question, "answers": answers})
            paragraphs.append({**paragraph, "context": context, "qas": qas})
        articles.append({**article, "paragraphs": paragraphs})
    return articles


def _read_answers(
    file: DataFile, qa: Any, at: str, context: str, notes: Notes
) -> list[AnswerRecord]:
    """The answers of a question in SQuAD's form, from any form in which files have them.

    If a row has no answer_start, it becomes the only place of the answer in the context, or -1 if
    there is none or more than one.
    """
    name, given = qa["id"], qa.get("answers")
    if isinstance(given, dict):
        texts, starts = (
            file.get(given, within(at, "answers"), k, list) for k in ("text", "answer_start")
        )
        if len(texts) != len(starts):
            raise file.refused(
                f"{within(at, 'answers')} has {len(texts)} texts, but {len(starts)} starts"
            )
        notes["lists"].append(name)
        given = [{"text": t, "answer_start": n} for t, n in zip(texts, starts, strict=True)]
    elif given is None:
        given = []
    elif not isinstance(given, list):
        raise file.refused(f"{within(at, 'answers')} must be a list")
    answers: list[AnswerRecord] = []
    for n, answer in enumerate(given):
        here = within(at, f"answers[{n}]")
        text = file.get(answer, here, "text", str)
        if not text.strip():  # some converters write this for "no answer"
            continue
        if file.layout and "answer_start" not in answer:
            start = only_place(text, context)
            notes["searched" if start >= 0 else "not found"].append(name)
        else:
            start = file.get(answer, here, "answer_start", int)
        answers.append({**answer, "text": text, "answer_start": start})
    if answers and len(answers) < len(given):
        notes["blank"].append(name)
    impossible = qa.get("is_impossible")
    if not (impossible is None or isinstance(impossible, bool)):
        raise file.refused(f"{within(at, 'is_impossible')} must be true or false")
    if impossible and answers:
        notes["contradicted"].append(name)
        return []
    return answers


def _is_repeated(file: DataFile, name: str, asked: object, at: str, seen: Seen) -> bool:
    """Whether a question has been seen before; from now on it has.

    Raises:
        UserError: another question with its id has been seen.
    """
    earlier, place = seen.setdefault(name, (asked, at))
    if asked != earlier:
        raise UserError(
            f"{file.flag}: {file.path}: the id {name!r} stands at {place.rstrip(':')} and, with"
            f" another question, context or answer, at {at.rstrip(':')}; each question needs an id"
            " of its own"
        )
    return place != at


def _tell_notes(
    file: DataFile, notes: Notes, questions: int, contexts: int, version: str | None
) -> None:
    """Print the layout of a file and its oddities, one line each.

    Args:
        version: the SQuAD version in the file, or None; "" for 2.0.
    """

    def first(key: str) -> str:
        return ", ".join(list(dict.fromkeys(notes[key]))[:3])

    def count(key: str) -> str:
        return f"{len(notes[key])} (first ids: {first(key)})"

    if file.layout or notes["lists"]:
        layout = file.layout or "SQuAD JSON with answers as Hugging Face datasets writes them"
        tell(f"{file.path} is read as {layout}: {questions} questions, {contexts} contexts")
    if notes["searched"]:
        tell(
            f"{file.path}: {len(notes['searched'])} answers without answer_start were found at one"
            " place in their context"
        )
    for key, kind, then in (
        ("repeated", "that come again with the same id, context and answers", "they count once"),
        ("contradicted", "with an answer beside is_impossible: true", "they count as having none"),
        ("blank", "with an empty answer beside another", "the empty one is left out"),
    ):
        if notes[key]:
            warn(f"{file.path}: questions {kind}: {count(key)}; {then}")
    if misplaced := len(notes["misplaced"]):
        searched = ", or, without answer_start, at exactly one place," if notes["not found"] else ""
        warn(
            f"{file.path}: {misplaced} answers are not in the context at answer_start{searched} and"
            f" are left out (first ids: {first('misplaced')}); {len(notes['lost'])} questions lose"
            " their only answer"
        )
    unanswered = len(notes["unanswered"])
    if version != "" and 0 < unanswered < questions:
        though = f", though its version is {version}" if version else ""
        warn(
            f"{file.path}: {unanswered} of {questions} questions have no answer (first ids:"
            f" {first('unanswered')}), so the file counts as SQuAD 2.0{though}"
        )


def only_place(phrase: str, text: str) -> int:
    """The only place of a phrase in a text, or -1. If the phrase occurs as whole words, other
    places do not count."""
    for places in (list(whole_words(phrase, text)), list(_places(phrase, text))):
        if places:
            return places[0] if len(places) == 1 else -1
    return -1


def whole_words(phrase: str, text: str) -> Iterator[int]:
    """The places where a phrase occurs in a text and neither begins nor ends inside a word."""
    return (
        at
        for at in _places(phrase, text)
        if not (_inside_a_word(text, at) or _inside_a_word(text, at + len(phrase)))
    )


def _places(phrase: str, text: str) -> Iterator[int]:
    at = text.find(phrase)
    while at >= 0:
        yield at
        at = text.find(phrase, at + 1)


def _inside_a_word(text: str, at: int) -> bool:
    """Whether the characters before and after a place are letters, digits or marks of one word.

    In scripts that put no spaces between words, or not between all, no place counts as inside one.
    """
    beside = text[at - 1 : at + 1] if at else ""
    return len(beside) == 2 and all(
        unicodedata.category(c)[0] in "LMN" and not UNSPACED.match(c) for c in beside
    )


# ------------------------------------------------------------------------------------------------
# Tokens: flat arrays, one slice per text


@dataclass(frozen=True)
class Tokens:
    """The tokens of many texts in flat arrays; text i is the slice bounds[i]:bounds[i + 1].

    Attributes:
        ids: int32 [tokens].
        bounds: int64 [texts + 1].
        offsets: int32 [tokens, 2], each token's first character in the original text, and the one
            after its last; dropped characters belong to the token in front of them. None if
            offsets were not asked for.
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
        """The offsets of a text's tokens, int32 [tokens, 2]."""
        assert self.offsets is not None
        return self.offsets[self.of(text)]


def tokenize(
    tokenizer: Tokenizer, texts: Sequence[str], with_offsets: bool, description: str
) -> Tokens:
    """Tokenise texts on all cores, without special tokens, truncation or padding.

    Args:
        tokenizer: the Rust tokenizer (`PreTrainedTokenizerFast.backend_tokenizer`). Truncation
            and padding that its file may set are switched off.
        with_offsets: keep character offsets too.
        description: the text beside the progress bar.
    """
    # Only if it is needed: another thread may be using the tokenizer, which then cannot change.
    if tokenizer.truncation is not None:
        tokenizer.no_truncation()
    if tokenizer.padding is not None:
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
            some = texts[first : first + TOKENIZER_CHUNK]
            for text, encoding in zip(some, encode(some, add_special_tokens=False), strict=True):
                ids.append(np.array(encoding.ids, np.int32))
                lengths.append(len(ids[-1]))
                if with_offsets:
                    theirs = np.array(encoding.offsets, np.int32).reshape(-1, 2)
                    offsets.append(_with_last_marks(text, theirs))
            bar.update(len(some))
    return Tokens(
        ids=np.concatenate(ids),
        bounds=np.cumsum(lengths, dtype=np.int64),
        offsets=np.concatenate(offsets) if with_offsets else None,
    )


def _with_last_marks(text: str, offsets: np.ndarray) -> np.ndarray:
    """The offsets of a text's tokens, with each end moved behind the marks of the last character.

    The tokenizer's normaliser drops accents, variation selectors, joiners and controls. A
    character that is in no token and is not white space was dropped; it belongs to the character
    before it. So do marks that a tokenizer keeps as tokens of their own.
    """
    if text.isascii() and text.isprintable():
        return offsets
    begins, ends = (np.bincount(each, minlength=len(text) + 1) for each in offsets.T)
    covered = np.cumsum(begins - ends)[:-1] > 0
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    kinds = {c: unicodedata.category(c) for c in set(text)}
    spaces = [ord(c) for c, kind in kinds.items() if c in "\t\n\r" or kind[0] == "Z"]
    marks = [ord(c) for c, kind in kinds.items() if kind in ("Mn", "Me")]
    belongs = ~(covered | np.isin(codes, spaces)) | np.isin(codes, marks)
    stops = np.flatnonzero(~np.append(belongs, False))
    ends = stops[np.searchsorted(stops, offsets[:, 1])]
    return np.stack([offsets[:, 0], ends], axis=1, dtype=np.int32)


@dataclass(frozen=True)
class SpecialIds:
    """The ids of the tokens that BERT's input format adds."""

    cls: int
    sep: int
    pad: int


# ------------------------------------------------------------------------------------------------
# Windows


@dataclass(frozen=True)
class Windows:
    """Windows over contexts, as indices: no token is copied before a batch is made.

    Window w is [CLS] question [SEP] context part [SEP], with the question `question[w]` and the
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
    def own(self) -> np.ndarray:
        """int64 [windows, 2], limits low <= start + end < high of positions in the window.

        A span that lies in several windows of a question counts in one: where the fewer tokens
        before and behind it are the most. The windows have equal lengths, so it is that whose
        middle is nearest to the span's.
        """
        follows = np.diff(self.question) == 0
        middles = self.first[:-1].astype(np.int64) + self.first[1:] + self.length[1:]
        first = np.pad(np.where(follows, middles, 0), (1, 0))
        last = np.pad(np.where(follows, middles, np.iinfo(np.int32).max), (0, 1))
        if len(self):
            first[0], last[-1] = 0, np.iinfo(np.int32).max
        limits = np.stack([first, last], axis=1)
        return limits + 2 * (self.context_at - self.first)[:, None]

    @cached_property
    def rows(self) -> np.ndarray:
        """int32 [windows, 3]: the question, the first token in contexts.ids, the context tokens."""
        first = self.contexts.bounds[self.context_of[self.question]] + self.first
        return np.stack([self.question, first, self.length], axis=1).astype(np.int32)

    @cached_property
    def context_at(self) -> np.ndarray:
        """int64 [windows], the position of the first context token, after [CLS] question [SEP]."""
        return self.questions.lengths[self.question] + 2

    @cached_property
    def total_lengths(self) -> np.ndarray:
        """int64 [windows], the tokens of each window with its special tokens."""
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
    tokens: tuple[Tokens, Tokens],
    special: SpecialIds,
    max_seq_length_c: int,
    doc_stride: int,
    for_training: bool,
) -> Windows:
    """Cut every question's context into windows of at most max_seq_length_c tokens in all.

    Windows start `doc_stride` tokens apart. The last one is moved back to end with the context. If
    a question leaves less room for the context than the stride, its windows start one room apart,
    so that they still cover the context.

    Args:
        tokens: of contexts and questions, as from `tokenize_squad`.
        for_training: leave out questions whose answers are all misplaced in the file or without
            tokens; otherwise training would learn that they have no answer.

    Raises:
        UserError: a question leaves no room for a context token.
    """
    contexts, questions = tokens
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
    answer_tokens, answer_count = _answer_tokens(data, contexts)
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
        answer_tokens=answer_tokens,
        special=special,
    )


def _answer_tokens(data: SquadData, contexts: Tokens) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of all answers; answers without tokens are left out.

    Returns:
        the first and last token that share a character with each answer, int32 [answers, 2], and
        the number of answers of each question, int64 [questions].
    """
    found, counts = [], np.zeros(len(data.answers), np.int64)
    for q, (context, answers) in enumerate(zip(data.context_of, data.answers, strict=True)):
        starts, ends = contexts.offsets_of(context).T
        for start, text in answers:
            first = np.searchsorted(ends, start, side="right")
            last = np.searchsorted(starts, start + len(text), side="left") - 1
            if first <= last:
                found.append((first, last))
                counts[q] += 1
    if lost := sum(map(len, data.answers)) - len(found):
        warn(f"{data.path}: {lost} answers give no tokens, and are left out")
    return np.array(found, np.int32).reshape(-1, 2), counts


def targets(windows: Windows, rng: np.random.Generator) -> np.ndarray:
    """The spans to learn: int64 [windows, 2], positions in the window of first and last token.

    If a question has several answers, one is drawn for all its windows. The span is (0, 0), the
    [CLS] token, if the window lacks a part of the answer or the question has none.
    """
    counts = np.diff(windows.answer_bounds)
    draw = windows.answer_bounds[:-1] + (rng.random(len(counts)) * counts).astype(np.int64)
    # A question without answers takes the last row, which `inside` masks below.
    rows = np.vstack([windows.answer_tokens, [[0, -1]]])[np.where(counts > 0, draw, -1)]
    first, last = rows[windows.question].T.astype(np.int64)
    inside = (first >= windows.first) & (last < windows.first + windows.length) & (first <= last)
    shift = windows.context_at - windows.first
    return np.where(inside[:, None], np.stack([first + shift, last + shift], axis=1), 0)


# ------------------------------------------------------------------------------------------------
# Batches


def plan_steps(lengths: np.ndarray, step_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The windows of each optimisation step of an epoch, as indices, longest last in a step.

    Windows are shuffled, then sorted by length within pools of POOL_STEPS steps, so that a step's
    windows are of similar length; then the steps are shuffled. The order depends only on seed and
    epoch, not on the number of processes or the accumulation. Each window occurs once; the last
    step takes the remaining windows.
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
    """The length to which rows of `length` tokens are padded: the next multiple of 8."""
    return -(-length // 8) * 8


def token_rows(
    rows: Sequence[Sequence[np.ndarray]], special: SpecialIds, pad_to: int | None = None
) -> dict[str, np.ndarray]:
    """A model's inputs, padded to the length of the longest row, rounded up to a multiple of 8.

    Args:
        rows: the token ids of each row's parts; a row is [CLS] part [SEP] part [SEP] ..., and the
            number of a part is its token type.
        pad_to: pad to this length instead, for graphs of static shape.

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
        # Rounding up may exceed a model's positions, so padding repeats the last one.
        "position_ids": np.minimum(position_ids, max(longest, pad_to or 0) - 1),
    }


def make_batch(
    windows: Windows, chosen: np.ndarray, pad_to: int | None = None
) -> dict[str, np.ndarray]:
    """`token_rows` of the windows `chosen`, int [B]."""
    rows, ids = windows.rows[chosen], windows.contexts.ids
    return rows_batch(rows, windows.questions, ids, windows.special, pad_to)


def rows_batch(
    rows: np.ndarray,
    questions: Tokens,
    ids: np.ndarray,
    special: SpecialIds,
    pad_to: int | None = None,
) -> dict[str, np.ndarray]:
    """`token_rows` of windows that are given as `Windows.rows`, int [B, 3].

    Args:
        ids: the tokens of which they are parts.
    """
    parts = [(questions.ids[questions.of(q)], ids[at : at + n]) for q, at, n in rows]
    return token_rows(parts, special, pad_to)


# ------------------------------------------------------------------------------------------------
# Answers


def best_spans(
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    lengths: np.ndarray,
    context_at: np.ndarray,
    max_answer_length: int = MAX_ANSWER_LENGTH,
    taken: np.ndarray | None = None,
    own: np.ndarray | None = None,
    temperature: float = 1.0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The most probable span inside the context part of each window of a batch.

    A span has at most max_answer_length tokens. Its log odds are those against no answer: the
    logits of its start and end, minus both logits of [CLS]. A model learns the odds within a
    window, and these compare between windows, which bare logits do not. Of spans with equal
    logits, the one that starts first wins, then the one that ends first; sums may round apart.

    Args:
        start_logits, end_logits: float [B, L].
        lengths: int [B], tokens of each window, without padding.
        context_at: int [B], position of the first context token; the last is lengths - 2.
        taken: bool [B, L], positions that no span may contain; None for none.
        own: int [B, 2], limits of start + end, as `Windows.own`; None for no limits.
        temperature: divides the log odds in `total`.

    Returns:
        start, end: int64 [B], positions in the window, end inclusive.
        odds: float64 [B], log odds of the best span; -inf for a window without a span.
        total: float64 [B], log of the sum of exp(log odds / temperature) over all spans allowed.
    """
    batch, length = start_logits.shape
    max_answer_length = min(max_answer_length, length)
    position = np.arange(length)
    context = (position >= context_at[:, None]) & (position < lengths[:, None] - 1)
    start, end = (
        np.where(context, logits.astype(np.float64) - logits[:, :1], IMPOSSIBLE)
        for logits in (start_logits, end_logits)
    )

    def ahead(values: np.ndarray, beyond: float) -> np.ndarray:
        """[b, i, d]: the value at i + d, or `beyond` after the window's end."""
        padding = ((0, 0), (0, max_answer_length - 1))
        padded_values = np.pad(values, padding, constant_values=beyond)
        return np.lib.stride_tricks.sliding_window_view(padded_values, max_answer_length, axis=1)

    # odds[b, i, d]: log odds that the answer starts at i and ends at i + d
    odds = start[:, :, None] + ahead(end, IMPOSSIBLE)
    if taken is not None:
        passed = np.cumsum(taken, axis=1)
        free = ~taken[:, :, None] & (ahead(passed, 0) == passed[:, :, None])
        odds = np.where(free, odds, IMPOSSIBLE)
    if own is not None:
        both = 2 * position[:, None] + np.arange(max_answer_length)
        low, high = own.T[:, :, None, None]
        odds = np.where((both >= low) & (both < high), odds, IMPOSSIBLE)
    odds = odds.reshape(batch, -1)
    best = odds.argmax(axis=1)
    highest = odds[np.arange(batch), best]
    shift = np.where(np.isfinite(highest), highest, 0.0)[:, None]
    with np.errstate(divide="ignore"):  # log(0) where there is no span
        sums = np.log(np.exp((odds - shift) / temperature).sum(axis=1))
    first, extra = best // max_answer_length, best % max_answer_length
    return first, first + extra, highest, shift[:, 0] / temperature + sums


def span_scores(
    odds: np.ndarray | float, total: np.ndarray | float, temperature: float
) -> np.ndarray:
    """The scores of spans: a softmax over all spans of all windows read, and no answer.

    Args:
        odds: log odds of spans against no answer.
        total: log of the sum of exp(log odds / temperature) over all spans: the `total` of
            `best_spans` for each window, joined by logaddexp.
        temperature: of the softmax, as `fit_temperature` finds it.
    """
    # No answer has log odds 0.
    return np.exp(np.asarray(odds) / temperature - np.logaddexp(total, 0.0))


def fit_temperature(scores: Callable[[float], np.ndarray], right: np.ndarray) -> float:
    """The temperature with the least squared error: a score is to be the share of right answers.

    This is the Brier score (Brier, 1950). The log loss would depend on a few right answers that
    score near 0, such as those that a model hides behind no answer. The temperature is searched
    for by golden sections, between TEMPERATURES.

    Args:
        scores: from a temperature to the scores of answers, [N].
        right: bool [N], whether each answer is right.
    """

    def loss(log_temperature: float) -> float:
        return float(((scores(math.exp(log_temperature)) - right) ** 2).mean())

    low, high = map(math.log, TEMPERATURES)
    golden = (math.sqrt(5) - 1) / 2
    places = [high - golden * (high - low), low + golden * (high - low)]
    losses = [loss(place) for place in places]
    for _ in range(FIT_STEPS):
        if losses[0] <= losses[1]:
            high = places[1]
            places = [high - golden * (high - low), places[0]]
            losses = [loss(places[0]), losses[0]]
        else:
            low = places[0]
            places = [places[1], low + golden * (high - low)]
            losses = [losses[1], loss(places[1])]
    return math.exp((low + high) / 2)


class Answers:
    """The best span of every question over all its windows, which may come in any order.

    Attributes:
        max_answer_length: the most tokens of an answer.
        odds: float64 [questions], log odds of the best span against no answer; -inf if none was
            found.
        batches: the arguments of all calls of `add`, to join the answers of several processes.
    """

    def __init__(
        self, data: SquadData, windows: Windows, max_answer_length: int = MAX_ANSWER_LENGTH
    ) -> None:
        self.data, self.windows, self.max_answer_length = data, windows, max_answer_length
        self.odds = np.full(len(data.ids), IMPOSSIBLE)
        self.batches: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._window = np.full(len(data.ids), -1)  # the window of the best span
        self._span = np.zeros((len(data.ids), 2), np.int64)  # tokens of the context

    def add(self, chosen: np.ndarray, start_logits: np.ndarray, end_logits: np.ndarray) -> None:
        """Add the logits [B, L] of the windows `chosen` [B]; of equal spans the first wins."""
        self.batches.append((chosen, start_logits, end_logits))
        windows = self.windows
        start, end, odds, _ = self._best(chosen, start_logits, end_logits, 1.0)
        shift = windows.first[chosen] - windows.context_at[chosen]
        spans = np.stack([start + shift, end + shift], axis=1)
        for window, log_odds, span in zip(chosen, odds, spans, strict=True):
            q = windows.question[window]
            earlier = log_odds == self.odds[q] and window < self._window[q]
            if log_odds > self.odds[q] or earlier:
                self.odds[q], self._window[q], self._span[q] = log_odds, window, span

    def _best(
        self, chosen: np.ndarray, start: np.ndarray, end: np.ndarray, temperature: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        windows = self.windows
        return best_spans(
            start,
            end,
            windows.total_lengths[chosen],
            windows.context_at[chosen],
            self.max_answer_length,
            own=windows.own[chosen],
            temperature=temperature,
        )

    def scores(self, temperature: float) -> np.ndarray:
        """`span_scores` of the best spans, float64 [questions]; 0 where none was found."""
        total = np.full(len(self.odds), IMPOSSIBLE)
        for chosen, start, end in self.batches:
            found = self._best(chosen, start, end, temperature)[3]
            np.logaddexp.at(total, self.windows.question[chosen], found)
        return span_scores(self.odds, total, temperature)

    def texts(self) -> dict[str, str]:
        """Question id -> the answer, cut from the original context; "" if none was found."""
        answers = {}
        for q, name in enumerate(self.data.ids):
            answers[name] = ""
            if self._window[q] >= 0:
                context = self.windows.context_of[q]
                offsets = self.windows.contexts.offsets_of(context)
                begin, end = offsets[self._span[q, 0], 0], offsets[self._span[q, 1], 1]
                answers[name] = self.data.contexts[context][begin:end]
        return answers

    def no_answer_scores(self) -> dict[str, float]:
        """Question id -> the probability of no answer divided by that of the best span."""
        return dict(zip(self.data.ids, np.exp(np.minimum(-self.odds, 700.0)).tolist(), strict=True))
