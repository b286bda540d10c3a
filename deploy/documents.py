"""Documents of all kinds as paragraphs, each with its place. No torch is needed.

Positions count code points of a document's text. The text of a plain file is the whole file,
decoded as UTF-8: a byte order mark and the carriage returns of CRLF count too.
"""

from __future__ import annotations

import os
import re
import stat
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from cli import UnreadableError, UserError, decode, tell, warn

TEXTS = (".txt", ".md")  # suffixes of plain text
DOCUMENTS = (".html", ".htm", ".pdf", ".docx")  # suffixes of files that are not plain text
LINE_END = re.compile(r"\r\n|\r|\n")
BLANK_LINES = re.compile(r"(?>\r\n|\r|\n)\s*[\r\n]")  # CRLF is one line end, never two
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[^a-z])|(?<=[。！？])[”’」』）]*|[\r\n]+")
OPEN_FILE = re.compile(r"/dev/stdin|/(?:dev|proc/self)/fd/(\d{1,6})")  # opened by the shell
NAMED = 5  # how many skipped files a note names

Source = str | os.PathLike[str] | tuple[str, bytes]  # a path, or a name and the content


def source_name(name: str, line: int | None, page: int | None) -> str:
    """A document's name with a line or a page, to show; bytes that are not UTF-8 are replaced."""
    name = os.fsencode(name).decode(errors="replace")
    return f"{name}:{line}" if page is None else f"{name}, page {page}"


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of a document.

    Attributes:
        path: the document's name.
        line: the line of its first character, from 1; None if the document has pages.
        start: the position of its first character in the document, in code points.
        page: its page, from 1; None if the document has no pages.
        is_file: whether `path` is that of a file on a disk.
    """

    text: str
    path: str
    line: int | None
    start: int
    page: int | None = None
    is_file: bool = True

    @property
    def source(self) -> str:
        return source_name(self.path, self.line, self.page)

    def part(self, begin: int, end: int) -> Paragraph:
        """The paragraph text[begin:end], without the white space around it."""
        text = self.text[begin:end]
        begin += len(text) - len(text.lstrip())
        line = self.line
        if line is not None:
            line += len(LINE_END.findall(self.text, 0, begin))
        return replace(self, text=text.strip(), line=line, start=self.start + begin)


@dataclass(frozen=True)
class Document:
    """A document's text.

    Attributes:
        name: its path, or the name that it was given.
        text: all of it.
        begin: where it begins in `text`, which is behind a byte order mark.
        pages: where each page begins in `text`; empty if it has no pages.
        is_file: whether `name` is the path of a file on a disk.
    """

    name: str
    text: str
    begin: int = 0
    pages: tuple[int, ...] = ()
    is_file: bool = False

    def place(self, at: int) -> tuple[int | None, int | None]:
        """The line and the page of a position in the text; one of them is None."""
        page = bisect_right(self.pages, at) or None
        return (None if page else 1 + len(LINE_END.findall(self.text, 0, at))), page

    def whole(self) -> Paragraph:
        """All of it as one paragraph."""
        line, page = self.place(self.begin)
        return Paragraph(self.text[self.begin :], self.name, line, self.begin, page, self.is_file)

    def paragraphs(self) -> Iterator[Paragraph]:
        """Its paragraphs, which blank lines part."""
        lines = [end.end() for end in LINE_END.finditer(self.text)]
        begin = self.begin
        for gap in [*BLANK_LINES.finditer(self.text, begin), None]:
            text = self.text[begin : gap.start() if gap else None]
            first = begin + len(text) - len(text.lstrip())
            if text.strip():
                page = bisect_right(self.pages, first) or None
                line = None if page else 1 + bisect_right(lines, first)
                yield Paragraph(text.strip(), self.name, line, first, page, self.is_file)
            begin = gap.end() if gap else begin


def read(sources: str | Iterable[Source], flag: str = "") -> tuple[list[Document], list[str]]:
    """Read files, the documents in folders, and documents from memory.

    Links are followed, and a file that several paths lead to counts once. Documents that cannot be
    read are skipped, with a warning each at the end, unless nothing can be read.

    Args:
        sources: paths, and documents as (name, content); the name is no path, and its suffix
            tells the kind.
        flag: the flag that gave them, for messages; "" for none.

    Returns:
        the documents, and why others are skipped, a line each.

    Raises:
        UserError: a path leads nowhere, a folder has no document, or there is no text at all.
    """
    where = f"{flag}: " if flag else ""
    documents: list[Document] = []
    skipped: list[str] = []
    seen: set[str] = set()
    named = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    for source in named:
        if isinstance(source, tuple):
            parts: Iterable[Source] = [source]
        else:
            path = os.path.expanduser(source)
            if not os.path.lexists(path) and not OPEN_FILE.fullmatch(path):
                raise UserError(f"{where}no such file: {path}")
            parts = _files_of(path, where, skipped) if os.path.isdir(path) else [path]
        for part in parts:
            name, real = (
                (part[0], "") if isinstance(part, tuple) else (part, os.path.realpath(part))
            )
            if real and real in seen:
                continue
            seen.add(real)
            try:
                documents.append(_read(part))
            except UnreadableError as error:
                skipped.append(f"{name} {error}")
    if not documents and len(named) == len(skipped) == 1:
        raise UserError(f"{where}{skipped[0]}")
    for line in skipped:
        warn(f"{where}{line}; it is skipped")
    if not any(each.text[each.begin :].strip() for each in documents):
        raise UserError(f"{where}{', '.join(map(_name, named))} has no text")
    return documents, skipped


def read_paragraphs(paths: Iterable[Source], flag: str = "--context") -> list[Paragraph]:
    """The paragraphs of documents; arguments and errors are those of `read`."""
    documents, _ = read(paths, flag)
    return [each for document in documents for each in document.paragraphs()]


def _name(source: Source) -> str:
    return source[0] if isinstance(source, tuple) else os.fspath(source)


def _read(source: Source) -> Document:
    """One document.

    Raises:
        UnreadableError: it cannot be read, or is not UTF-8 text.
    """
    name, data = _name(source), source[1] if isinstance(source, tuple) else None
    if name.lower().endswith(DOCUMENTS):
        raise UnreadableError(f"is {os.path.splitext(name)[1][1:].upper()}, not plain text")
    is_file = data is None and not OPEN_FILE.fullmatch(name)
    text = decode(_bytes_of(name) if data is None else data)
    return Document(name, text, len(text) - len(text.removeprefix("\ufeff")), is_file=is_file)


def _bytes_of(path: str) -> bytes:
    try:
        opened = OPEN_FILE.fullmatch(path)
        if opened:
            descriptor = os.dup(int(opened[1] or 0))
        elif stat.S_ISREG(os.stat(path).st_mode):
            descriptor = os.open(path, os.O_RDONLY)
        else:  # a named pipe would wait for a writer
            raise UnreadableError("is no regular file; a pipe is read as /dev/stdin")
        with open(descriptor, "rb") as file:
            return file.read()
    except OSError as error:
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            raise UnreadableError("is a link to a file that is not there") from None
        raise UnreadableError(f"cannot be read: {error.strerror or error}") from None


def _files_of(top: str, where: str, skipped: list[str]) -> list[str]:
    """The text files in a folder and the folders below it, links followed; a note names others."""
    texts, others, visited = [], [], set()

    def failed(error: OSError) -> None:
        skipped.append(f"{error.filename} cannot be read: {error.strerror}")

    for folder, inside, names in os.walk(top, onerror=failed, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:  # links may form a circle
            inside.clear()
            continue
        visited.add(real)
        inside.sort()
        for name in sorted(names):
            if name.lower().endswith(TEXTS):
                texts.append(os.path.join(folder, name))
            elif not name.startswith("."):
                others.append(os.path.join(folder, name))
    others.sort(key=lambda name: not name.lower().endswith(DOCUMENTS))
    if not texts:
        found = f"; it has {_named(others)}" if others else ""
        raise UserError(f"{where}the folder {top} has no {' or '.join(TEXTS)} file{found}")
    if others:
        files = "1 file is" if len(others) == 1 else f"{len(others)} files are"
        tell(f"{where}{files} skipped, not being {' or '.join(TEXTS)}: {_named(others)}")
    return texts


def _named(names: list[str]) -> str:
    """The first NAMED names, and the number of further ones."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
