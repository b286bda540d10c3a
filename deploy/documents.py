"""Files of all kinds as paragraphs, each with its place in its file. No torch is needed.

Positions count code points of the whole file, decoded as UTF-8. A byte order mark and the carriage
returns of CRLF count too.
"""

from __future__ import annotations

import os
import re
import stat
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cli import UnreadableError, UserError, decode, tell, warn

TEXTS = (".txt", ".md")  # suffixes of the files that are read in a folder
DOCUMENTS = (".html", ".htm", ".pdf", ".docx")  # suffixes of files that are not plain text
LINE_END = re.compile(r"\r\n|\r|\n")
BLANK_LINES = re.compile(r"(?>\r\n|\r|\n)\s*[\r\n]")  # CRLF is one line end, never two
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[^a-z])|(?<=[。！？])[”’」』）]*|[\r\n]+")
OPEN_FILE = re.compile(r"/dev/stdin|/(?:dev|proc/self)/fd/(\d{1,6})")  # opened by the shell
NAMED = 5  # how many skipped files a message names


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of a file.

    Attributes:
        line: the line of its first character, from 1.
        start: the position of its first character in the file, in code points.
    """

    text: str
    path: str
    line: int
    start: int

    @property
    def source(self) -> str:
        """File and line, to show; bytes of the name that are not UTF-8 are replaced."""
        return f"{os.fsencode(self.path).decode(errors='replace')}:{self.line}"

    def part(self, begin: int, end: int) -> Paragraph:
        """The paragraph text[begin:end], without the white space around it."""
        text = self.text[begin:end]
        begin += len(text) - len(text.lstrip())
        line = self.line + len(LINE_END.findall(self.text, 0, begin))
        return Paragraph(text.strip(), self.path, line, self.start + begin)


def _read(path: str) -> Paragraph:
    """A whole file as one paragraph, which begins after a byte order mark.

    Raises:
        UnreadableError: the file cannot be read, or is not UTF-8 text.
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
        UserError: the file cannot be read, or is not UTF-8 text.
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
    """The paragraphs of files, and of the .txt and .md files in folders; blank lines part them.

    Links are followed, and a file that several paths lead to counts once. Unreadable files in
    folders are skipped with a warning.

    Args:
        flag: the flag that gave the paths, for messages.

    Raises:
        UserError: a path cannot be read, a folder has no text file, or there is no text at all.
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
        found = f"; it has {_named(others, ', ')}" if others else ""
        raise UserError(f"{flag}: the folder {top} has no {' or '.join(TEXTS)} file{found}")
    if others:
        files = "1 file is" if len(others) == 1 else f"{len(others)} files are"
        tell(f"{flag}: {files} skipped, not being {' or '.join(TEXTS)}: {_named(others, ', ')}")
    return texts


def _named(names: list[str], between: str) -> str:
    """The first NAMED names, and the number of further ones."""
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
