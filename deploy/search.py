"""An index of paragraphs, to find those nearest to a question. No torch is needed.

Paragraphs are found by their vectors (from the model.onnx of a train_qcemb.py output folder), by
the words that they share with the question (BM25), or by both. Vectors are saved beside the texts,
so only new and changed paragraphs are embedded. Words are counted at each start, which takes less
time than tokenising the texts.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

import squad_utils
from cli import Interrupted, UserError, warn
from deploy.documents import SENTENCE_END, Paragraph
from deploy.runtime import Infer, Runtime, load_exported, question_tokens
from deploy.settings import EMBEDDING
from squad_utils import MAX_ANSWER_LENGTH, SpecialIds

if TYPE_CHECKING:
    from bm25s import BM25  # at run time, a search by vectors alone does without it

SEARCHES = ("dense", "bm25", "hybrid")
# The larger, the less the first ranks count. 60 is usual; on questions of the train file 10 finds
# more among the first 5, and hardly less among the first 20 (docs/embeddings.md).
RANK_OFFSET = 10
INDEX_FILE = ".context_index.npz"
SHAPES = (16, 32, 64, 128, 256, 384, 512)  # lengths that texts are padded to
SAVE_SECONDS = 30  # between two saves of a growing index
ROWS = 4096  # vectors to compare at once


# ------------------------------------------------------------------------------------------------
# Vectors


@dataclass(frozen=True)
class Embedder:
    """An exported embedding model.

    Attributes:
        folder: its folder, for messages.
        compile: makes the function that runs it at a length.
        max_seq_length_q, max_seq_length_c: most tokens of a question and of a paragraph, with
            [CLS] and [SEP].
        key: differs between models and between arithmetics, as their vectors do.
    """

    folder: str
    compile: Callable[[int], Infer]
    tokenizer: Tokenizer
    special: SpecialIds
    max_seq_length_q: int
    max_seq_length_c: int
    key: str

    @property
    def room(self) -> int:
        """The most tokens of a paragraph, without [CLS] and [SEP]."""
        return self.max_seq_length_c - 2

    def question(self, text: str) -> np.ndarray:
        """The vector of a question, float32 [H]; a warning tells if the question is cut."""
        question_tokens(self.tokenizer, text, self.max_seq_length_q - 2, "the embedding model")
        return self.vectors([text], self.max_seq_length_q)[0]

    def vectors(self, texts: Sequence[str], max_length: int) -> np.ndarray:
        """The vectors of texts, float32 [texts, H].

        Each text is cut to max_length tokens, which include [CLS] and [SEP].
        """
        found = dict(self.one_by_one(texts, max_length))
        return np.stack([found[i] for i in range(len(texts))])

    def one_by_one(
        self, texts: Sequence[str], max_length: int, description: str = ""
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Each text's place and its vector, float32 [H], the longest texts first.

        Args:
            description: shown beside the progress bar; "" shows no bar.

        Raises:
            UserError: a vector is not finite.
        """
        tokens = squad_utils.tokenize(self.tokenizer, list(texts), False, description)
        tokens = squad_utils.truncate(tokens, max_length - 2)
        shapes = [n for n in SHAPES if n < max_length] + [max_length]
        needed = np.searchsorted(shapes, tokens.lengths + 2)
        order = np.argsort(-needed, kind="stable")
        hidden = None if description else True
        run: Infer | None = None
        at = -1
        for i in tqdm(order, desc=description, unit=" texts", disable=hidden):
            length = shapes[needed[i]]
            ids = tokens.ids[tokens.of(i)]
            if run is None or at != length:
                run, at = self.compile(length), length
            (vector,) = run(squad_utils.token_rows([(ids,)], self.special, length))
            if not np.isfinite(vector).all():
                raise UserError(
                    f"--model_emb: {self.folder} gives numbers that are not finite, of"
                    f" {texts[i][:50]!r}"
                )
            yield int(i), vector[0].astype(np.float32)


def load_embedder(folder: str, runtime: Runtime) -> Embedder:
    """Load the output folder of an embedding model.

    Raises:
        UserError: as `load_exported`.
    """
    model = load_exported(folder, "--model_emb", EMBEDDING, runtime)
    lengths, special = model.settings.lengths, model.settings.special
    longest = lengths["max_seq_length_c"]
    with open(model.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update(model.tokenizer.to_str().encode())
    return Embedder(
        os.path.dirname(model.path),
        functools.lru_cache(model.compile),
        model.tokenizer,
        special,
        lengths["max_seq_length_q"],
        longest,
        key=f"{digest.hexdigest()} {special} {longest} {model.arithmetic}",
    )


@dataclass(frozen=True)
class Words:
    """The tokenizer of a search by words alone.

    Attributes:
        room: the most tokens of a paragraph; longer ones are cut.
    """

    tokenizer: Tokenizer
    room: int


# ------------------------------------------------------------------------------------------------
# Paragraphs that are too long for the model


Part = tuple[Paragraph, np.ndarray]  # a paragraph or a part of one, and its token ids, int32


def cut_long(paragraphs: list[Paragraph], tokenizer: Tokenizer, room: int) -> list[Part]:
    """The same paragraphs, those of more than `room` tokens cut into parts that overlap.

    Parts begin and end with sentences if possible, else with words. A word is cut only if it is
    longer than a part. Any MAX_ANSWER_LENGTH tokens in a row, or `room` // 2 if that is less, lie
    in one part. Paragraphs without tokens are left out.
    """
    texts = [each.text for each in paragraphs]
    tokens = squad_utils.tokenize(tokenizer, texts, False, "reading paragraphs")
    parts: list[Part] = []
    for i, paragraph in enumerate(paragraphs):
        ids = tokens.ids[tokens.of(i)]
        if 0 < len(ids) <= room:
            parts.append((paragraph, ids))
        elif len(ids):
            starts = squad_utils.tokenize(tokenizer, [paragraph.text], True, "").offsets_of(0)[:, 0]
            cuts = _cuts(paragraph.text, starts, room)
            some = [paragraph.part(begin, end) for begin, end in cuts]
            # The part of a word may have more tokens than it had in the word.
            shorter = [each for each in some if len(each.text) < len(paragraph.text)]
            parts += cut_long(shorter, tokenizer, room) if shorter else [(paragraph, ids)]
    return parts


def _cuts(text: str, starts: np.ndarray, room: int) -> Iterator[tuple[int, int]]:
    """Where the parts of a text begin and end, as characters; `starts` are those of its tokens."""
    gaps = [gap.end() for gap in SENTENCE_END.finditer(text)]
    sentences = np.unique(np.searchsorted(starts, gaps))
    words = np.flatnonzero([any(map(str.isspace, text[at - 1 : at + 1])) for at in starts])
    anywhere = np.flatnonzero(np.diff(starts)) + 1  # but within a character of several tokens

    def last(low: int, high: int) -> int:
        """The last token in (low, high] that a part may begin with, or end before."""
        for places in (sentences, words, anywhere):
            i = np.searchsorted(places, high, side="right") - 1
            if i >= 0 and places[i] > low:
                return int(places[i])
        return high

    overlap = min(MAX_ANSWER_LENGTH, room // 2)
    begin = end = 0
    while len(starts) - begin > room:
        # Over `overlap` tokens, so that the next part begins later, and further than the last one.
        end = last(max(begin + overlap, end), begin + room)
        yield int(starts[begin]), int(starts[end])
        begin = last(begin, end - overlap)
    yield int(starts[begin]), len(text)


# ------------------------------------------------------------------------------------------------
# The index


class Found(NamedTuple):
    """A paragraph that a search has found.

    Attributes:
        score: how far it is above the mean of all paragraphs, in standard deviations: the mean of
            this by vectors and by words, or by the one that the index searches.
        distance: the distance (L2) of its vector from the question's; None for a search by words.
    """

    paragraph: Paragraph
    score: float
    distance: float | None

    def as_record(self) -> dict[str, str | float]:
        """The paragraph for JSON; without a distance if it has none."""
        record: dict[str, str | float] = {
            "source": self.paragraph.source,
            "paragraph": self.paragraph.text,
            "start": self.paragraph.start,
            "end": self.paragraph.start + len(self.paragraph.text),
        }
        return record if self.distance is None else record | {"distance": self.distance}


@dataclass(frozen=True)
class ContextIndex:
    """Paragraphs, with their vectors, their words, or both. Nothing in it changes, so several
    threads may search it.

    Attributes:
        method: one of SEARCHES.
        model: the embedder, or the tokenizer of a search by words alone.
        vectors: [paragraphs, H]; None for a search by words alone.
        words: scores of all tokens in all paragraphs; None for a search by vectors alone.
    """

    paragraphs: list[Paragraph]
    method: str
    model: Embedder | Words
    vectors: np.ndarray | None
    words: BM25 | None

    def nearest(self, question: str, count: int) -> list[Found]:
        """The best `count` paragraphs, best first; equal ones keep their order.

        By BM25 alone, only paragraphs with a token of the question are found.
        """
        distances, ranks, scores = None, [], []
        if isinstance(self.model, Embedder) and self.vectors is not None:
            distances = _distances(self.vectors, self.model.question(question))
            ranks.append(_reciprocal_ranks(-distances))
            scores.append(_standardised(-distances))
        if self.words is not None:
            ids = _known_ids(self.model.tokenizer, question)
            overlaps = self.words.get_scores_from_ids(ids).astype(np.float64)
            ranks.append(np.where(overlaps > 0, _reciprocal_ranks(overlaps), 0))
            scores.append(_standardised(overlaps))
        fused, score = np.sum(ranks, axis=0), np.mean(scores, axis=0)
        chosen = np.argsort(-fused, kind="stable")[:count]
        return [
            Found(
                self.paragraphs[i],
                float(score[i]),
                None if distances is None else float(distances[i]),
            )
            for i in chosen
            if fused[i] > 0
        ]


def _distances(vectors: np.ndarray, vector: np.ndarray) -> np.ndarray:
    """The distance (L2) of each of `vectors` [N, H] from one [H]: float64 [N]."""
    # By differences: the squares of norms and products would cancel most digits of distances that
    # are small compared to the norms.
    squares = np.empty(len(vectors))
    for begin in range(0, len(squares), ROWS):
        gaps = vectors[begin : begin + ROWS].astype(np.float64) - vector
        squares[begin : begin + ROWS] = np.einsum("ij,ij->i", gaps, gaps)
    return np.sqrt(squares)


def _reciprocal_ranks(values: np.ndarray) -> np.ndarray:
    """1 / (RANK_OFFSET + rank) of each value [N], float64; the highest value has rank 1."""
    ranks = np.empty(len(values))
    ranks[np.argsort(-values, kind="stable")] = np.arange(1, len(values) + 1)
    return 1 / (RANK_OFFSET + ranks)


def _standardised(values: np.ndarray) -> np.ndarray:
    """Values [N] with mean 0 and standard deviation 1; all 0 if they are equal."""
    return (values - values.mean()) / (values.std() or 1.0)


def _known_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of a text's tokens, without unknown ones: these say nothing about a match."""
    unknown = tokenizer.token_to_id(getattr(tokenizer.model, "unk_token", None) or "")
    return [i for i in tokenizer.encode(text, add_special_tokens=False).ids if i != unknown]


def check_method(method: str | None, has_embedder: bool) -> str:
    """The way to search: `method`, or, if that is None, the best with the models there are.

    Raises:
        UserError: the method is unknown, needs an embedder, or needs bm25s, which is not installed.
    """
    method = method or ("hybrid" if has_embedder else "bm25")
    if method not in SEARCHES:
        raise UserError(f"--search={method} is not one of {', '.join(SEARCHES)}")
    if method != "bm25" and not has_embedder:
        raise UserError(f"--search={method} needs --model_emb; --search=bm25 needs none")
    if method != "dense" and importlib.util.find_spec("bm25s") is None:
        raise UserError(
            f"--search={method} needs bm25s: pip install bm25s"
            + (", or --search=dense" if has_embedder else "")
        )
    return method


def build_index(
    paragraphs: list[Paragraph],
    model: Embedder | Words,
    method: str | None = None,
    earlier: ContextIndex | None = None,
) -> ContextIndex:
    """The index of paragraphs; saved vectors are used again.

    Paragraphs that are too long for the model are cut into parts. Those that differ only in white
    space count once. Each folder keeps the vectors of its own files, so neither other files nor
    their order matter.

    Args:
        model: an embedder, or `Words` to search by BM25 alone.
        method: one of SEARCHES; None is the best with this model.
        earlier: an index of the same model and method, whose vectors are used again too.

    Raises:
        UserError: as `check_method`; no paragraph has a token.
    """
    method = check_method(method, isinstance(model, Embedder))
    parts = cut_long(paragraphs, model.tokenizer, model.room)
    first: dict[str, Part] = {}
    for each in parts:
        first.setdefault(" ".join(each[0].text.split()), each)
    if not first:
        files = ", ".join(dict.fromkeys(each.path for each in paragraphs))
        raise UserError(f"--context: {files} has no text")
    unique = [paragraph for paragraph, _ in first.values()]
    vectors = words = None
    if isinstance(model, Embedder) and method != "bm25":
        known = {}
        if earlier is not None and earlier.vectors is not None:
            known = dict(zip(map(_digest, earlier.paragraphs), earlier.vectors, strict=True))
        stores = _stores([paragraph for paragraph, _ in parts])
        vectors = _vectors(unique, model, stores, known)
    if method != "dense":
        import bm25s  # need not be installed for a search by vectors alone

        words = bm25s.BM25()
        ids = [ids.tolist() for _, ids in first.values()]
        words.index((ids, model.tokenizer.get_vocab()), show_progress=False)
    return ContextIndex(unique, method, model, vectors, words)


def _vectors(
    unique: list[Paragraph], embedder: Embedder, stores: Stores, known: dict[str, np.ndarray]
) -> np.ndarray:
    """The vectors of paragraphs, float32 [paragraphs, H]: known ones by digest, saved ones, and
    those made and saved now."""
    for folder in stores:
        saved = _read_saved(folder, embedder.key)
        known |= {digest: vector for (_, digest), vector in saved.items()}
    missing = [each for each in unique if _digest(each) not in known]
    texts = [each.text for each in missing]
    done, saved_at = 0, time.monotonic()
    try:
        for i, vector in embedder.one_by_one(
            texts, embedder.max_seq_length_c, "indexing paragraphs"
        ):
            known[_digest(missing[i])] = vector
            done += 1
            if time.monotonic() > saved_at + SAVE_SECONDS:
                _save_all(stores, embedder.key, known)
                saved_at = time.monotonic()
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped: {done} of {len(missing)} new paragraphs are indexed; the same command goes"
            " on from there",
            signal.SIGINT,
        ) from None
    finally:
        _save_all(stores, embedder.key, known)
    return np.stack([known[_digest(each)] for each in unique])


Stores = dict[str, set[tuple[str, str]]]  # folder -> file in it and digest of each paragraph


def _digest(paragraph: Paragraph) -> str:
    return hashlib.sha256(paragraph.text.encode()).hexdigest()


def _stores(paragraphs: list[Paragraph]) -> Stores:
    """The folders of some paragraphs, each with the paragraphs that its index must hold."""
    stores: Stores = {}
    files = {each.path for each in paragraphs if each.is_file}
    places = {path: os.path.split(os.path.realpath(path)) for path in files}
    for each in paragraphs:
        if each.path in places:
            folder, file = places[each.path]
            stores.setdefault(folder, set()).add((file, _digest(each)))
    return stores


def _read_saved(folder: str, key: str) -> dict[tuple[str, str], np.ndarray]:
    """Vectors by file and digest; none if the index is damaged, or of another model."""
    with contextlib.suppress(Exception), np.load(os.path.join(folder, INDEX_FILE)) as saved:
        if str(saved["key"]) == key:
            names = zip(map(str, saved["files"]), map(str, saved["digests"]), strict=True)
            return dict(zip(names, saved["vectors"], strict=True))
    return {}


def _save_all(stores: Stores, key: str, known: dict[str, np.ndarray]) -> None:
    """Save all known vectors; after an error, their folder is not tried again."""
    for folder, names in list(stores.items()):
        try:
            _save(folder, key, {name: known[name[1]] for name in names if name[1] in known})
        except OSError as error:
            del stores[folder]
            path = os.path.join(folder, INDEX_FILE)
            why = error.strerror or error
            warn(f"the index cannot be saved as {path} ({why}); it is made again next time")


def _save(folder: str, key: str, vectors: dict[tuple[str, str], np.ndarray]) -> None:
    """Save the vectors of a folder's files; vectors of files that were not read now stay."""
    saved = _read_saved(folder, key)  # read again, since other processes may write it too
    read = {file for file, _ in vectors}
    kept = {
        name: vector
        for name, vector in saved.items()
        if name in vectors
        or (name[0] not in read and os.path.exists(os.path.join(folder, name[0])))
    }
    kept |= vectors
    if kept.keys() == saved.keys():
        return
    temporary = os.path.join(folder, f".{secrets.token_hex(8)}{INDEX_FILE}")  # this writer's own
    try:
        with open(temporary, "xb") as file:
            np.savez(
                file,
                key=key,
                files=np.array([name for name, _ in kept]),
                digests=np.array([digest for _, digest in kept]),
                vectors=np.stack(list(kept.values())),
            )
        os.replace(temporary, os.path.join(folder, INDEX_FILE))
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
