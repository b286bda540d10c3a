"""An index of paragraphs: which of them are nearest to a question. No torch is needed.

Runs model.onnx of a train_qcemb.py output folder. Vectors are saved beside the texts, and only
what is new or has changed is embedded again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tqdm import tqdm

import squad_utils
from cli import UserError, read_text, warn
from deploy.runtime import Infer, Runtime, load_exported
from squad_utils import SpecialIds

SUFFIXES = (".txt", ".md")  # of the files of a folder that are read
INDEX_FILE = ".context_index.npz"
BLANK_LINES = re.compile(r"\n\s*\n")
SHAPES = (16, 32, 64, 128, 256, 384, 512)  # lengths that texts are padded to


# ------------------------------------------------------------------------------------------------
# Paragraphs


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of a file; `line` is that of its first character, from 1."""

    text: str
    path: str
    line: int

    @property
    def source(self) -> str:
        return f"{self.path}:{self.line}"


def read_paragraphs(paths: Sequence[str], flag: str = "--context") -> list[Paragraph]:
    """The paragraphs of files, and of the .txt and .md files of folders; blank lines part them.

    Raises:
        UserError: a path cannot be read, a folder has no such file, or there is no text at all.
    """
    files: list[str] = []
    for path in paths:
        if not os.path.isdir(path):
            files.append(path)
            continue
        inside = sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if name.endswith(SUFFIXES)
        )
        if not inside:
            raise UserError(f"{flag}: the folder {path} has no {' or '.join(SUFFIXES)} file")
        files += inside
    paragraphs = []
    for path in dict.fromkeys(files):
        text, begin = read_text(path, flag), 0
        line, counted = 1, 0
        for gap in [*BLANK_LINES.finditer(text), None]:
            part = text[begin : gap.start() if gap else len(text)]
            stripped = part.strip()
            if stripped:
                first = begin + part.index(stripped[0])
                line, counted = line + text.count("\n", counted, first), first
                paragraphs.append(Paragraph(stripped, path, line))
            begin = gap.end() if gap else begin
    if not paragraphs:
        raise UserError(f"{flag}: {', '.join(paths)} has no text")
    return paragraphs


# ------------------------------------------------------------------------------------------------
# Vectors


@dataclass(frozen=True)
class Embedder:
    """An exported embedding model.

    Attributes:
        compile: gives the function that runs it at a length.
        key: what tells its vectors from those of other models and other arithmetic.
    """

    compile: Callable[[int], Infer]
    tokenizer: Tokenizer
    special: SpecialIds
    max_seq_length_q: int
    max_seq_length_c: int
    key: str

    def vectors(self, texts: Sequence[str], max_length: int, description: str = "") -> np.ndarray:
        """Float32 [texts, H]; each text cut to max_length tokens, [CLS] and [SEP] among them."""
        tokens = squad_utils.tokenize(self.tokenizer, list(texts), False, description)
        tokens = squad_utils.truncate(tokens, max_length - 2)
        shapes = [n for n in SHAPES if n < max_length] + [max_length]
        needed = np.searchsorted(shapes, tokens.lengths + 2)
        found: list[Any] = [None] * len(texts)
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
            found[i] = vector[0]
        return np.stack(found).astype(np.float32)


def load_embedder(folder: str, runtime: Runtime) -> Embedder:
    """Load the output folder of an embedding model.

    Raises:
        UserError: as `load_exported`.
    """
    model = load_exported(
        folder, "--model_emb", "an embedding model", "train_qcemb.py", ["embedding"], runtime
    )
    longest = model.arguments["max_seq_length_c"]
    with open(model.path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Embedder(
        functools.lru_cache(model.compile),
        model.tokenizer,
        model.special,
        model.arguments["max_seq_length_q"],
        longest,
        key=f"{digest} {longest} {model.arithmetic}",
    )


# ------------------------------------------------------------------------------------------------
# The index


@dataclass(frozen=True)
class ContextIndex:
    """Paragraphs and their vectors [paragraphs, H]."""

    paragraphs: list[Paragraph]
    vectors: np.ndarray

    def nearest(self, vector: np.ndarray, count: int) -> list[tuple[Paragraph, float]]:
        """The `count` paragraphs nearest (L2) to a vector [H], and their distances."""
        # |q - c|^2 orders paragraphs as |c|^2 - 2 q c does.
        scores = np.square(self.vectors).sum(axis=1) - 2 * self.vectors @ vector
        count = min(count, len(scores))
        chosen = np.argpartition(scores, count - 1)[:count]
        chosen = chosen[np.argsort(scores[chosen], kind="stable")]
        distances = np.linalg.norm(self.vectors[chosen] - vector, axis=1)
        return [(self.paragraphs[i], float(d)) for i, d in zip(chosen, distances, strict=True)]


def build_index(embedder: Embedder, paths: Sequence[str]) -> ContextIndex:
    """The index of the paragraphs of files and folders; what is saved of it is not made again."""
    paragraphs = _cut_long(read_paragraphs(paths), embedder)
    path = index_path(paths[0])
    saved = _read_saved(path, embedder.key)
    names = [hashlib.sha256(each.text.encode()).hexdigest() for each in paragraphs]
    missing = {
        name: each.text for name, each in zip(names, paragraphs, strict=True) if name not in saved
    }
    if missing:
        vectors = embedder.vectors(
            list(missing.values()), embedder.max_seq_length_c, "indexing paragraphs"
        )
        saved |= dict(zip(missing, vectors, strict=True))
    index = ContextIndex(paragraphs, np.stack([saved[name] for name in names]))
    if missing or len(saved) != len(set(names)):
        _save(path, embedder.key, names, index.vectors)
    return index


def _cut_long(paragraphs: list[Paragraph], embedder: Embedder) -> list[Paragraph]:
    """The same, with those that are longer than the model reads cut into parts that are not."""
    room = embedder.max_seq_length_c - 2
    texts = [each.text for each in paragraphs]
    tokens = squad_utils.tokenize(embedder.tokenizer, texts, True, "reading paragraphs")
    parts = []
    for i, paragraph in enumerate(paragraphs):
        offsets = tokens.offsets_of(i)
        for begin in range(0, max(len(offsets), 1), room):
            if len(offsets) <= room:
                parts.append(paragraph)
                break
            some = offsets[begin : begin + room]
            first, last = int(some[0, 0]), int(some[-1, 1])
            line = paragraph.line + paragraph.text.count("\n", 0, first)
            parts.append(Paragraph(paragraph.text[first:last], paragraph.path, line))
    return parts


def index_path(context: str) -> str:
    """Where the index is: in the folder that is indexed, or beside the first file."""
    if os.path.isdir(context):
        return os.path.join(context, INDEX_FILE)
    return os.path.join(os.path.dirname(context), f".{os.path.basename(context)}{INDEX_FILE}")


def _read_saved(path: str, key: str) -> dict[str, np.ndarray]:
    """Vectors by the hash of their text; none where the file is another model's or damaged."""
    with contextlib.suppress(Exception), np.load(path) as file:
        if str(file["key"]) == key:
            return dict(zip(map(str, file["names"]), file["vectors"], strict=True))
    return {}


def _save(path: str, key: str, names: list[str], vectors: np.ndarray) -> None:
    temporary = f"{path}.tmp.npz"
    try:
        np.savez(temporary, key=key, names=np.array(names), vectors=vectors)
        os.replace(temporary, path)
    except OSError as error:
        warn(f"the index cannot be saved as {path} ({error.strerror}); it is made anew next time")
        with contextlib.suppress(OSError):
            os.remove(temporary)
