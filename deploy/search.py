"""An index of paragraphs, to find those nearest to a question. No torch is needed.

Runs the model.onnx of a train_qcemb.py output folder. Vectors are saved beside the texts, so only
new and changed paragraphs are embedded.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import secrets
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

import squad_utils
from cli import Interrupted, UserError, warn
from deploy.documents import OPEN_FILE, SENTENCE_END, Paragraph, read_paragraphs
from deploy.runtime import Infer, Runtime, load_exported, question_tokens
from deploy.settings import EMBEDDING
from squad_utils import MAX_ANSWER_LENGTH, SpecialIds

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
            if run is None or at != length:
                run, at = self.compile(length), length
            ids = tokens.ids[tokens.of(i)]
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


# ------------------------------------------------------------------------------------------------
# Paragraphs that are too long for the model


def cut_long(paragraphs: list[Paragraph], tokenizer: Tokenizer, room: int) -> list[Paragraph]:
    """The same paragraphs, those of more than `room` tokens cut into parts that overlap.

    Parts begin and end with sentences if possible, else with words. A word is cut only if it is
    longer than a part. Any MAX_ANSWER_LENGTH tokens in a row, or `room` // 2 if that is less, lie
    in one part. Paragraphs without tokens are left out.
    """
    texts = [each.text for each in paragraphs]
    tokens = squad_utils.tokenize(tokenizer, texts, True, "reading paragraphs")
    parts = []
    for i, paragraph in enumerate(paragraphs):
        if 0 < tokens.lengths[i] <= room:
            parts.append(paragraph)
        elif tokens.lengths[i]:
            cuts = _cuts(paragraph.text, tokens.offsets_of(i)[:, 0], room)
            some = [paragraph.part(begin, end) for begin, end in cuts]
            # The part of a word may have more tokens than it had in the word.
            shorter = [each for each in some if len(each.text) < len(paragraph.text)]
            parts += cut_long(shorter, tokenizer, room) if shorter else [paragraph]
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


@dataclass(frozen=True)
class ContextIndex:
    """Paragraphs and their vectors [paragraphs, H]."""

    paragraphs: list[Paragraph]
    vectors: np.ndarray

    def nearest(self, vector: np.ndarray, count: int) -> list[tuple[Paragraph, float]]:
        """The `count` paragraphs nearest (L2) to a vector [H], and their distances."""
        # |c|^2 - 2 q c would lose the digits of distances that are small compared to the norms.
        squares = np.empty(len(self.vectors))
        for begin in range(0, len(squares), ROWS):
            gaps = self.vectors[begin : begin + ROWS].astype(np.float64) - vector
            squares[begin : begin + ROWS] = np.einsum("ij,ij->i", gaps, gaps)
        chosen = np.argsort(squares, kind="stable")[:count]
        return [(self.paragraphs[i], float(np.sqrt(squares[i]))) for i in chosen]


def build_index(embedder: Embedder, paths: Sequence[str]) -> ContextIndex:
    """The index of the paragraphs of files and folders; saved vectors are used again.

    Paragraphs that differ only in white space count once. Each folder keeps the vectors of its own
    files, so neither other files nor their order matter.
    """
    room = embedder.max_seq_length_c - 2
    paragraphs = cut_long(read_paragraphs(paths), embedder.tokenizer, room)
    first: dict[str, Paragraph] = {}
    for each in paragraphs:
        first.setdefault(" ".join(each.text.split()), each)
    if not first:
        raise UserError(f"--context: {', '.join(paths)} has no text")
    stores = _stores(paragraphs)
    known = {
        digest: vector
        for folder in stores
        for (_, digest), vector in _read_saved(folder, embedder.key).items()
    }
    missing = [each for each in first.values() if _digest(each) not in known]
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
    unique = list(first.values())
    return ContextIndex(unique, np.stack([known[_digest(each)] for each in unique]))


Stores = dict[str, set[tuple[str, str]]]  # folder -> file in it and digest of each paragraph


def _digest(paragraph: Paragraph) -> str:
    return hashlib.sha256(paragraph.text.encode()).hexdigest()


def _stores(paragraphs: list[Paragraph]) -> Stores:
    """The folders of some paragraphs, each with the paragraphs that its index must hold."""
    stores: Stores = {}
    files = {each.path for each in paragraphs if not OPEN_FILE.fullmatch(each.path)}
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
