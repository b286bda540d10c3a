"""The text of HTML, PDF and Word documents, by libraries that need not be installed. No torch.

pip install -r requirements-documents.txt
"""

from __future__ import annotations

import io
import logging
import re
import zipfile
from collections.abc import Iterator

from cli import UnreadableError, first_line

INSTALL = "pip install -r requirements-documents.txt"
MAX_UNPACKED = 200_000_000  # bytes of a Word document's parts, which a small file can claim to have
PAGE_BREAK = "\n\f\n"  # a blank line, too, so that paragraphs end with their page
FULL_LINE = 0.75  # a line of at least this share of the longest on its page goes on in the next
CHARSET = re.compile(rb"<(?:meta[^>]+charset|\?xml[^>]+encoding)\s*=\s*[\"']?([\w.:-]+)", re.I)
SPACES = re.compile(r"\s+")
XML_HEAD = re.compile(r"^\s*<\?xml.*?\?>", re.DOTALL)
for library in ("pypdf", "trafilatura", "htmldate", "courlan", "justext"):
    logging.getLogger(library).addHandler(logging.NullHandler())  # else stderr shows its words


class MissingLibraryError(UnreadableError):
    """The library that reads a kind of document is not installed; the message names it."""

    def __init__(self, library: str) -> None:
        super().__init__(f"cannot be read without {library}: {INSTALL}")


def read(kind: str, data: bytes, charset: str | None = None) -> tuple[str, tuple[int, ...]]:
    """The text of a document, and where its pages begin in it; () if it has no pages.

    Args:
        kind: the suffix of its file, a key of READERS.
        charset: the encoding that a server tells for HTML, or None.

    Raises:
        UnreadableError: it is damaged, encrypted or without text, or a library is missing.
    """
    name = kind[1:].upper()
    try:
        if kind == ".pdf":
            text, pages = _pdf(data)
        else:
            text, pages = _docx(data) if kind == ".docx" else _html(data, charset), ()
    except UnreadableError:
        raise
    except Exception as error:  # what is wrong in a file makes libraries raise errors of any kind
        raise UnreadableError(f"is damaged, or no {name}: {first_line(error)}") from None
    if not text.strip():
        raise UnreadableError("has no text" + ("; its pages may be pictures" if pages else ""))
    return text, pages


def _html(data: bytes, charset: str | None) -> str:
    """The main text of a page, without menus; a line for each paragraph, item and row."""
    try:
        import trafilatura  # optional
    except ImportError:
        raise MissingLibraryError("trafilatura") from None

    page = XML_HEAD.sub("", decode_html(data, charset))  # lxml refuses a declaration in a str
    tree = trafilatura.load_html(page)
    if tree is None:
        return ""
    # Line ends of the file are spaces to a browser, and would part sentences here.
    for each in tree.xpath("//*[not(ancestor-or-self::pre)]"):
        each.text = SPACES.sub(" ", each.text or "")
    for each in tree.xpath("//*[not(ancestor::pre)]"):
        each.tail = SPACES.sub(" ", each.tail or "")
    found = trafilatura.extract(tree, include_comments=False, favor_recall=True)
    return found or trafilatura.html2txt(page)


def decode_html(data: bytes, charset: str | None) -> str:
    """The text of an HTML file, as browsers decode it.

    The encoding is the one that the byte order mark, `charset` or the page itself tells; else it is
    UTF-8, or Windows-1252 if it cannot be UTF-8.
    """
    marks = ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16"))
    marked = [name for mark, name in marks if data.startswith(mark)]
    told = [each.decode() for each in CHARSET.findall(data[:2048])]
    for name in (*marked, charset, *told[:1], "utf-8"):
        try:
            return data.decode(name or "")
        except (LookupError, UnicodeDecodeError):
            continue
    return data.decode("windows-1252", errors="replace")


def _pdf(data: bytes) -> tuple[str, tuple[int, ...]]:
    try:
        import pypdf  # optional
    except ImportError:
        raise MissingLibraryError("pypdf") from None

    file = pypdf.PdfReader(io.BytesIO(data))
    if file.is_encrypted and not file.decrypt(""):
        raise UnreadableError("is encrypted")
    texts, starts, length = [], [], 0
    for page in file.pages:
        text = page.extract_text()
        # Characters beyond 16 bits may come as two surrogates, and halves of them alone.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        texts.append("".join(_unwrapped(text)))
        starts.append(length)
        length += len(texts[-1]) + len(PAGE_BREAK)
    return PAGE_BREAK.join(texts), tuple(starts)


def _unwrapped(page: str) -> Iterator[str]:
    """The text of a page, in pieces, with the lines of a paragraph joined.

    A file has no paragraphs, only lines: one that is nearly as long as the longest goes on in the
    next. Words that are parted by a hyphen at the end of a line are joined.
    """
    lines = [line.strip() for line in page.splitlines()] or [""]
    longest = max(map(len, lines))
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if len(line) < FULL_LINE * longest or not following:
            yield f"{line}\n"
        elif line[-1] == "-" and line[-2:-1].isalpha() and following[0].islower():
            yield line[:-1]
        else:
            yield f"{line} "


def _docx(data: bytes) -> str:
    try:
        import docx  # optional
        from docx.table import Table  # optional
    except ImportError:
        raise MissingLibraryError("python-docx") from None

    with zipfile.ZipFile(io.BytesIO(data)) as parts:
        if sum(each.file_size for each in parts.infolist()) > MAX_UNPACKED:
            raise UnreadableError(f"has over {MAX_UNPACKED / 1e6:g} MB when it is unpacked")
    pieces = []
    for block in docx.Document(io.BytesIO(data)).iter_inner_content():
        if isinstance(block, Table):
            rows = [dict.fromkeys(cell.text.strip() for cell in row.cells) for row in block.rows]
            pieces += [" | ".join(filter(None, row)) + "\n" for row in rows] + ["\n"]
        elif block.text.strip():
            heading = block.style is not None and block.style.name.startswith(("Heading", "Title"))
            pieces.append(block.text.strip() + ("\n" if heading else "\n\n"))
    return "".join(pieces)
