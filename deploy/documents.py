"""Files of all kinds as paragraphs, which know where in their file they stand. No torch is needed.

Positions count code points of the whole file as UTF-8 decodes it; a byte order mark and the
carriage returns of CRLF count too.
"""

from __future__ import annotations

import os
import re
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cli import UserError, tell, warn

TEXTS = (".txt", ".md")  # suffixes of the files of a folder that are read
DOCUMENTS = (".html", ".htm", ".pdf", ".docx")  # suffixes that say a file is no plain text
LINE_END = re.compile(r"\r\n|\r|\n")
BLANK_LINES = re.compile(r"(?>\r\n|\r|\n)\s*[\r\n]")  # CRLF is one line end, never two
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[^a-z])|(?<=[。！？])[”’」』）]*|[\r\n]+")
MARKS = (  # the longest first: that of UTF-32 begins as that of UTF-16
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
OPEN_FILE = re.compile(r"/dev/stdin|/(?:dev|proc/self)/fd/(\d{1,6})")  # by the shell, as pipes are
NAMED = 5  # skipped files that are told by their names


class UnreadableError(Exception):
    """Why a file is not read, as the end of a sentence about it."""


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of a file; `line` (from 1) and `start` are those of its first character."""

    text: str
    path: str
    line: int
    start: int

    @property
    def source(self) -> str:
        """File and line, to show; what is not UTF-8 in the file's name is replaced."""
        return f"{os.fsencode(self.path).decode(errors='replace')}:{self.line}"

    def part(self, begin: int, end: int) -> Paragraph:
        """The text's [begin:end] without the white space around it."""
        text = self.text[begin:end]
        begin += len(text) - len(text.lstrip())
        line = self.line + len(LINE_END.findall(self.text, 0, begin))
        return Paragraph(text.strip(), self.path, line, self.start + begin)


def decode(data: bytes) -> str:
    """The text that UTF-8 bytes hold.

    Raises:
        UnreadableError: they are no UTF-8, or hold NULs.
    """
    for mark, name in MARKS:
        if data.startswith(mark):
            raise UnreadableError(f"is {name}, not UTF-8: iconv -f {name} -t UTF-8 converts it")
    if b"\0" in data:
        raise UnreadableError(
            f"has NUL bytes (the first is byte {data.index(0)}), so it is UTF-16 or no text"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UnreadableError(f"is not UTF-8 text (byte {error.start})") from None


def _read(path: str) -> Paragraph:
    """A whole file as one paragraph, which begins after a byte order mark.

    Raises:
        UnreadableError: it cannot be read, or is no UTF-8 text.
    """
    if path.lower().endswith(DOCUMENTS):
        raise UnreadableError(f"is {os.path.splitext(path)[1][1:].upper()}, not plain text")
    try:
        opened = OPEN_FILE.fullmatch(path)
        if opened:
            descriptor = os.dup(int(opened[1] or 0))
        elif stat.S_ISREG(os.stat(path).st_mode):
            descriptor = os.open(path, os.O_RDONLY)
        else:  # a named pipe would wait for a writer
            raise UnreadableError("is no regular file; a pipe is read as /dev/stdin")
        with open(descriptor, "rb") as file:
            text = decode(file.read())
    except OSError as error:
        if isinstance(error, FileNotFoundError) and os.path.islink(path):
            raise UnreadableError("is a link to a file that is not there") from None
        raise UnreadableError(f"cannot be read: {error.strerror or error}") from None
    mark = len(text) - len(text.removeprefix("\ufeff"))
    return Paragraph(text[mark:], path, 1, mark)


def read_file(path: str, flag: str = "--context") -> Paragraph:
    """The text of one file that the user has named, without a byte order mark.

    Raises:
        UserError: it cannot be read, or is no UTF-8 text.
    """
    if not os.path.lexists(path) and not OPEN_FILE.fullmatch(path):
        raise UserError(f"{flag}: no such file: {path}")
    if os.path.isdir(path):
        raise UserError(f"{flag}: {path} is a folder, a file is needed")
    try:
        return _read(path)
    except UnreadableError as error:
        raise UserError(f"{flag}: {path} {error}") from None


def read_paragraphs(paths: Sequence[str], flag: str = "--context") -> list[Paragraph]:
    """The paragraphs of files, and of the .txt and .md files of folders; blank lines part them.

    A file that is reached in several ways counts once. Links are followed. Files of a folder that
    cannot be read are left out and told, by the flag that gave the paths.

    Raises:
        UserError: a path cannot be read, a folder has no such file, or there is no text at all.
    """
    paragraphs: list[Paragraph] = []
    skipped: list[str] = []
    seen: set[str] = set()
    for path in paths:
        for file in _files_of(path, flag, skipped) if os.path.isdir(path) else [path]:
            if (real := os.path.realpath(file)) in seen:
                continue
            seen.add(real)
            try:
                paragraphs += _paragraphs(read_file(file, flag) if file == path else _read(file))
            except UnreadableError as error:
                skipped.append(f"{file} {error}")
    if skipped:
        count = f"{len(skipped)} of {len(seen)} files" if seen else f"{len(skipped)} files"
        warn(f"{flag}: {count} could not be read and are skipped: {_named(skipped, '; ')}")
    if not paragraphs:
        raise UserError(f"{flag}: {', '.join(paths)} has no text")
    return paragraphs


def _files_of(top: str, flag: str, skipped: list[str]) -> list[str]:
    """The texts in a folder and in those below it, also linked ones; other files are told."""
    texts, others, visited = [], [], set()

    def failed(error: OSError) -> None:
        skipped.append(f"{error.filename} cannot be read: {error.strerror}")

    for folder, inside, names in os.walk(top, onerror=failed, followlinks=True):
        if (real := os.path.realpath(folder)) in visited:  # links may lead round in a circle
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
        found = f"; it has {_named(others, ', ')}" if others else ""
        raise UserError(f"{flag}: the folder {top} has no {' or '.join(TEXTS)} file{found}")
    if others:
        files = "1 file is" if len(others) == 1 else f"{len(others)} files are"
        tell(f"{flag}: {files} skipped, not being {' or '.join(TEXTS)}: {_named(others, ', ')}")
    return texts


def _named(names: list[str], between: str) -> str:
    """The first few of some names, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return between.join(names[:NAMED]) + more


def _paragraphs(whole: Paragraph) -> Iterator[Paragraph]:
    """The paragraphs of a file's text."""
    lines = [end.end() for end in LINE_END.finditer(whole.text)]
    begin = 0
    for gap in [*BLANK_LINES.finditer(whole.text), None]:
        text = whole.text[begin : gap.start() if gap else None]
        first = begin + len(text) - len(text.lstrip())
        if text.strip():
            line = whole.line + bisect_right(lines, first)
            yield Paragraph(text.strip(), whole.path, line, whole.start + first)
        begin = gap.end() if gap else begin
