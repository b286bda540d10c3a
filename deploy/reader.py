"""Answers from texts and documents: the module for programs to import, without torch.

from deploy.reader import Reader

reader = Reader("models/qa")
reader("Who designed the lighthouse?", "Ada Brook designed it in 1907.")[0].text

reader = Reader("models/qa", embedder="models/emb").add(["texts/", "notes.md"])
for answer in reader("Who designed the lighthouse?", top_k=3):
    print(answer.text, answer.score, answer.source)
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import overload

from cli import UserError
from deploy import documents, qa_model
from deploy.documents import SENTENCE_END, Document, Source
from deploy.qa_model import QaModel, Span
from deploy.runtime import Runtime
from deploy.search import (
    ContextIndex,
    Embedder,
    Found,
    Words,
    build_index,
    check_method,
    load_embedder,
)

TOP_K = 3  # answers per question
TOP_CONTEXTS = 5  # paragraphs to read per question
WHOLE = "none"  # a search that finds all documents, each as a whole
# The log odds of a paragraph against one whose search score is lower by 1. On questions of SQuAD's
# train file F1 is about the same for 1.5 to 3, and lower for less (docs/embeddings.md).
SEARCH_WEIGHT = 2.0


@dataclass(frozen=True)
class Answer:
    """An answer.

    Attributes:
        text: the answer, in the text's own words.
        score: how sure the model is, 0 to 1; scores compare between texts.
        start, end: its place in the text that was given, or in its document; in code points.
        sentence: the sentence or sentences that contain it.
        source: its document and the line or page there, to show; None for a text that was given,
            and so are those that follow.
        document: the name of its document.
        line: its line in the document, from 1; None if the document has pages.
        page: its page, from 1; None if the document has no pages.
        paragraph: the text that was read.
        distance: how far the paragraph's vector is from the question's (L2); None without vectors.
        offset: where it begins in `sentence`.
        no_answer: whether it is more probable that there is no answer; None for a SQuAD 1.1 model.
        probability: its probability in its window alone; `score` replaces it.
    """

    text: str
    score: float
    start: int
    end: int
    sentence: str
    source: str | None
    document: str | None
    line: int | None
    page: int | None
    paragraph: str | None
    distance: float | None
    offset: int
    no_answer: bool | None
    probability: float

    def as_record(self) -> dict[str, str | float | bool]:
        """The answer for JSON, without attributes that are None."""
        values = dataclasses.asdict(self).items()
        return {name: value for name, value in values if value is not None and name != "offset"}


@dataclass(frozen=True)
class _Documents:
    """Documents by their names, and the index of their paragraphs, if there is one."""

    by_name: dict[str, Document]
    index: ContextIndex | None

    def find(self, question: str, count: int) -> list[Found]:
        if not self.by_name:
            raise UserError("there are no documents to read; add some, or give a text")
        if self.index is None:
            return [Found(each.whole(), 1.0, None) for each in self.by_name.values()]
        return self.index.nearest(question, count)


class Reader:
    """A QA model, documents that it reads, and an index to find what to read.

    Threads may ask and add documents at the same time; a question sees all documents of an `add`,
    or none of them.

    Args:
        model: the output folder of a QA model, or the model.onnx in it; None only finds paragraphs.
        embedder: the output folder of an embedding model; None searches by words alone (BM25).
        search: one of `search.SEARCHES`; None is the best with these models. "none" does no search:
            each question reads all of every document.
        runtime: one of `runtime.RUNTIMES`.
        runtime_precision: one of `runtime.PRECISIONS`.

    Raises:
        UserError: a folder cannot be loaded, or the search needs what there is not.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | QaModel | None,
        embedder: str | os.PathLike[str] | Embedder | None = None,
        *,
        search: str | None = None,
        runtime: str = "auto",
        runtime_precision: str = "f32",
    ) -> None:
        how = Runtime(runtime, runtime_precision)
        if isinstance(embedder, str | os.PathLike):
            embedder = load_embedder(os.fspath(embedder), how)
        if isinstance(model, str | os.PathLike):
            model = qa_model.load(os.fspath(model), how)
        self.embedder, self.model = embedder, model
        self.search = search
        if search not in (None, WHOLE):
            check_method(search, self.embedder is not None)
        self.skipped: list[str] = []
        self._documents = _Documents({}, None)
        self._adding = threading.Lock()

    @overload
    def __call__(
        self, question: str, text: str | None = None, *, top_k: int = ..., top_contexts: int = ...
    ) -> list[Answer]: ...

    @overload
    def __call__(
        self,
        question: list[str],
        text: str | None = None,
        *,
        top_k: int = ...,
        top_contexts: int = ...,
    ) -> list[list[Answer]]: ...

    def __call__(
        self,
        question: str | list[str],
        text: str | None = None,
        *,
        top_k: int = TOP_K,
        top_contexts: int = TOP_CONTEXTS,
    ) -> list[Answer] | list[list[Answer]]:
        """The best answers that do not overlap, best first; of a list of questions, a list each.

        Args:
            text: the text to read, of any length; None reads the documents.
            top_k: the most answers per question.
            top_contexts: the paragraphs of the documents to read per question.

        Raises:
            UserError: there is nothing to read, or the model gives numbers that are not finite.
        """
        if not isinstance(question, str):
            return [self(each, text, top_k=top_k, top_contexts=top_contexts) for each in question]
        if self.model is None:
            raise UserError("answers need a QA model; without one, `paragraphs` finds texts")
        snapshot = self._documents
        if text is None:
            found = snapshot.find(question, top_contexts)
        else:
            found = [Found(Document("", text).whole(), 1.0, None)]
        best: list[Answer] = []
        for span in read(self.model, found, question, top_k):
            near = found[span.text]
            document = None if text is not None else snapshot.by_name[near.paragraph.path]
            answer = _answer(span, near, document)
            if len(best) < top_k and not any(_overlap(answer, each) for each in best):
                best.append(answer)
        return best

    def paragraphs(self, question: str, count: int = TOP_CONTEXTS) -> list[Found]:
        """The paragraphs that a question would be answered from, best first.

        Raises:
            UserError: there are no documents.
        """
        return self._documents.find(question, count)

    def add(self, sources: str | Iterable[Source], flag: str = "") -> Reader:
        """Add documents; one with the name of an earlier one replaces it.

        `skipped` then tells which could not be read, a line each.

        Args:
            sources: paths of files and folders, and documents from memory as (name, bytes), whose
                names are never looked for on the disk.
            flag: the command-line flag that gave them, for messages.

        Raises:
            UserError: as `documents.read`.
        """
        added, skipped = documents.read(sources, flag)
        with self._adding:
            self.skipped = skipped
            self._keep(self._documents.by_name | {each.name: each for each in added})
        return self

    def remove(self, name: str) -> None:
        """Forget a document.

        Raises:
            KeyError: there is none of this name.
        """
        with self._adding:
            by_name = dict(self._documents.by_name)
            del by_name[name]
            self._keep(by_name)

    @property
    def documents(self) -> list[str]:
        """The names of the documents, in the order in which they were added."""
        return list(self._documents.by_name)

    def text(self, name: str) -> str:
        """The text of a document, into which `start` and `end` of its answers point.

        Raises:
            KeyError: there is none of this name.
        """
        return self._documents.by_name[name].text

    @property
    def searcher(self) -> Embedder | Words:
        """The embedder, or else the QA model's tokenizer, which finds paragraphs by words.

        Raises:
            UserError: there is neither.
        """
        if self.embedder is not None:
            return self.embedder
        if self.model is None:
            raise UserError("documents need a QA model to read them, or an embedding model")
        return Words(self.model.tokenizer, self.model.room)

    def _keep(self, by_name: dict[str, Document]) -> None:
        """Take these documents in place of the present ones, with an index of their paragraphs."""
        index = None
        if by_name and self.search != WHOLE:
            paragraphs = [each for document in by_name.values() for each in document.paragraphs()]
            index = build_index(paragraphs, self.searcher, self.search, self._documents.index)
        self._documents = _Documents(by_name, index)


def read(model: QaModel, found: Sequence[Found], question: str, top_k: int) -> list[Span]:
    """The most probable spans of paragraphs that a search has found, best first.

    The search's score counts too: the reader has mostly seen windows that hold the answer, and is
    often too sure of one that does not.
    """
    first = max((each.score for each in found), default=0.0)  # so that no answer keeps its odds
    log_odds = [SEARCH_WEIGHT * (each.score - first) for each in found]
    return model.spans([each.paragraph.text for each in found], question, top_k, log_odds)


def _answer(span: Span, near: Found, document: Document | None) -> Answer:
    """The answer that is a span of a paragraph; `document` is None if the text was given."""
    paragraph = near.paragraph
    first, stop = sentence_around(paragraph.text, span.start, span.end)
    start, end = paragraph.start + span.start, paragraph.start + span.end
    line, page = document.place(start) if document else (None, None)
    return Answer(
        text=paragraph.text[span.start : span.end],
        score=span.score,
        start=start,
        end=end,
        sentence=paragraph.text[first:stop],
        source=documents.source_name(document.name, line, page) if document else None,
        document=document.name if document else None,
        line=line,
        page=page,
        paragraph=paragraph.text if document else None,
        distance=near.distance,
        offset=span.start - first,
        no_answer=span.no_answer,
        probability=span.probability,
    )


def _overlap(one: Answer, other: Answer) -> bool:
    """Whether two answers share characters of a document."""
    return one.document == other.document and one.start < other.end and other.start < one.end


def sentence_around(text: str, start: int, end: int) -> tuple[int, int]:
    """Where the sentence or sentences around text[start:end] begin and end."""
    begin, stop = 0, len(text)
    for gap in SENTENCE_END.finditer(text):
        if gap.end() <= start:
            begin = gap.end()
        elif gap.start() >= end:
            stop = gap.start()
            break
    return begin, stop
