"""Documents of all kinds: what is read in them, where it stands, and the line if it cannot be."""

from __future__ import annotations

import contextlib
import io
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import docx
import pypdf
import pytest

from cli import UnreadableError, UserError
from deploy import documents, formats, web
from deploy.documents import Document


def make_pdf(*pages: str) -> bytes:
    """A PDF with a page for each text, whose lines are those of the text."""
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Count {len(pages)} /Kids ["
        + " ".join(f"{4 + 2 * i} 0 R" for i in range(len(pages)))
        + "] >>",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for i, page in enumerate(pages):
        lines = "".join(f"({line}) Tj 0 -14 Td\n" for line in page.split("\n"))
        stream = f"BT /F1 12 Tf 50 750 Td\n{lines}ET"
        objects.append(
            f"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents {5 + 2 * i} 0 R"
            " /Resources << /Font << /F1 3 0 R >> >> >>"
        )
        objects.append(f"<< /Length {len(stream)} >>\nstream\n{stream}\nendstream")
    body, places = "%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(body))
        body += f"{number} 0 obj\n{each}\nendobj\n"
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    return (
        f"{body}xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}"
        f"trailer << /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{len(body)}\n%%EOF"
    ).encode("cp1252")


def make_docx() -> bytes:
    document = docx.Document()
    document.add_heading("The lighthouse")
    document.add_paragraph("Ada designed it.")
    document.add_paragraph("It is of stone.")
    table = document.add_table(rows=2, cols=2)
    for cell, text in zip(table._cells, ("Height", "42 m", "Colour", "red"), strict=True):
        cell.text = text
    written = io.BytesIO()
    document.save(written)
    return written.getvalue()


def encrypted() -> bytes:
    writer = pypdf.PdfWriter(io.BytesIO(make_pdf("one")))
    writer.encrypt("secret", algorithm="RC4-128")
    written = io.BytesIO()
    writer.write(written)
    return written.getvalue()


HTML = """<html><head><title>T</title><style>p {}</style><script>var x = 1;</script></head><body>
<h1>The lighthouse</h1><p>Ada designed it in 1907, as the caf\u00e9 owner says.</p>
<ul><li>It is of stone.</li></ul></body></html>"""
HTML_TEXT = "The lighthouse\nAda designed it in 1907, as the caf\u00e9 owner says.\nIt is of stone."


def only(name: str, data: bytes) -> Document:
    """The document that is read from memory."""
    (found,), skipped = documents.read([(name, data)])
    assert skipped == []
    return found


# ------------------------------------------------------------------------------------------------
# Kinds


def test_answers_of_a_pdf_know_their_page() -> None:
    found = only("a.PDF", make_pdf("The first page", "", "The third page\nhas Ada"))
    assert found.text.startswith("The first page") and "Ada" in found.text
    parts = list(found.paragraphs())
    assert [(each.page, each.line) for each in parts] == [(1, None), (3, None)]
    for each in parts:
        assert found.text[each.start :].startswith(each.text)
    assert found.place(found.text.index("Ada")) == (None, 3)
    assert parts[1].source == "a.PDF, page 3"
    assert parts[1].part(4, 9).page == 3


def test_the_lines_of_a_paragraph_of_a_pdf_are_joined() -> None:
    text = only(
        "a.pdf", make_pdf("Title\nThe lighthouse of Oster was de-\nsigned by Ada Brook, a fisher")
    ).text
    assert text.split("\n")[:2] == [
        "Title",
        "The lighthouse of Oster was designed by Ada Brook, a fisher",
    ]


def test_a_word_document_is_its_paragraphs_and_its_rows() -> None:
    found = only("a.docx", make_docx())
    assert [each.text for each in found.paragraphs()] == [
        "The lighthouse\nAda designed it.",
        "It is of stone.",
        "Height | 42 m\nColour | red",
    ]
    assert [each.line for each in found.paragraphs()] == [1, 4, 6]


ENCODINGS: dict[str, tuple[bytes, str | None]] = {
    "UTF-8": (HTML.encode(), None),
    "a mark": (b"\xef\xbb\xbf" + HTML.encode(), "latin-1"),
    "UTF-16": (HTML.encode("utf-16"), None),
    "told by the server": (HTML.encode("latin-1"), "ISO-8859-1"),
    "told by the page": (
        HTML.replace("<title>", "<meta charset='latin-1'><title>").encode("latin-1"), None),
    "told by XML": (
        ("<?xml version='1.0' encoding='iso-8859-1'?>\n" + HTML).encode("latin-1"), None),
    "untold, not UTF-8": (HTML.encode("cp1252"), None),
    "told wrongly": (HTML.encode(), "no-such-encoding"),
}  # fmt: skip


@pytest.mark.parametrize("name", ENCODINGS)
def test_html_is_decoded_as_browsers_do(name: str) -> None:
    text, pages = formats.read(".html", *ENCODINGS[name])
    assert (text, pages) == (HTML_TEXT, ())


def test_a_line_end_in_html_is_a_space_except_in_code() -> None:
    page = (
        b"<html><body><p>Ada <b>built\nit</b> in\r\n1904, of\nstone.</p><pre>one\ntwo</pre></body>"
    )
    assert only("a.html", page).text.split("\n") == [
        "Ada built it in 1904, of stone.", "one", "two"]  # fmt: skip


UNREADABLE: dict[str, tuple[str, Callable[[], bytes], str]] = {
    "a PDF that is none": ("a.pdf", lambda: b"x", "is damaged, or no PDF: "),
    "a PDF that is cut": ("a.pdf", lambda: make_pdf("one")[:300], "is damaged, or no PDF: "),
    "a PDF of pictures": ("a.pdf", lambda: make_pdf("", ""), "has no text; its pages may be pic"),
    "an encrypted PDF": ("a.pdf", encrypted, "is encrypted"),
    "a Word document that is none": ("a.docx", lambda: b"x", "is damaged, or no DOCX: "),
    "another ZIP": ("a.docx", lambda: b"PK\5\6" + bytes(18), "is damaged, or no DOCX: "),
    "HTML without text": ("a.html", lambda: b"<html><script>x()</script></html>", "has no text"),
    "empty HTML": ("a.html", lambda: b"", "has no text"),
    "UTF-16": ("a.txt", lambda: "one".encode("utf-16"), "is UTF-16, not UTF-8"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_a_document_that_cannot_be_read_is_a_line(case: str, capfd: pytest.CaptureFixture) -> None:
    name, make, line = UNREADABLE[case]
    with pytest.raises(UserError) as error:
        documents.read([(name, make())])
    assert str(error.value).startswith(f"{name} {line}") and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # no words of a library's


def test_a_word_document_that_unpacks_to_too_much_is_a_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert formats.MAX_UNPACKED == 200_000_000
    data = make_docx()
    monkeypatch.setattr(formats, "MAX_UNPACKED", len(data))
    with pytest.raises(UserError, match=r"a\.docx has over 0\.0\d+ MB when it is unpacked"):
        documents.read([("a.docx", data)])


def test_a_folder_is_read_with_all_kinds_and_the_others_are_listed_at_the_end(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    for name, data in {
        "a.txt": b"Text.",
        "b.md": b"Notes.",
        "c.html": HTML.encode(),
        "d.pdf": make_pdf("A page."),
        "sub/e.docx": make_docx(),
        "broken.pdf": b"x",
        "latin.txt": b"caf\xe9",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    found, skipped = documents.read([str(tmp_path)], "--context")
    assert [Path(each.name).name for each in found] == [
        "a.txt",
        "b.md",
        "c.html",
        "d.pdf",
        "e.docx",
    ]
    lines = capfd.readouterr().err.splitlines()
    assert [line.removeprefix("warning: --context: ") for line in lines] == [
        f"{line}; skipped" for line in skipped
    ]
    assert [line.removeprefix(str(tmp_path)).split()[0] for line in skipped] == [
        "/broken.pdf", "/latin.txt"]  # fmt: skip


@pytest.mark.parametrize("library,kind", [("pypdf", ".pdf"), ("docx", ".docx"),
                                          ("trafilatura", ".html")])  # fmt: skip
def test_a_library_that_is_missing_is_named_in_one_line_with_the_command(
    library: str,
    kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    (tmp_path / "a.txt").write_text("Text.")
    for name in "bc":
        (tmp_path / f"{name}{kind}").write_bytes(b"x")
    found, (line,) = documents.read([str(tmp_path)])
    assert [each.text for each in found] == ["Text."]
    assert f"b{kind}, " in line and line.endswith(
        f"cannot be read without {'python-' * (library == 'docx')}{library}:"
        " pip install -r requirements-documents.txt"
    )
    assert capfd.readouterr().err == f"warning: {line}; skipped\n"
    with pytest.raises(UserError, match=r"pip install -r requirements-documents\.txt"):
        documents.read([str(tmp_path / f"b{kind}")])


def test_the_name_of_a_document_from_memory_is_never_looked_for(tmp_path: Path) -> None:
    """Neither on the disk nor on the web."""
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    for name in (str(secret), "/dev/stdin", "http://127.0.0.1:1/a.txt", str(tmp_path)):
        (found,), _ = documents.read([(name, b"given")])
        assert (found.name, found.text, found.is_file) == (name, "given", False)


# ------------------------------------------------------------------------------------------------
# Addresses: path -> what the server here does


def send(handler: BaseHTTPRequestHandler, kind: str | None, body: bytes, **headers: str) -> None:
    handler.send_response(200)
    if kind is not None:
        handler.send_header("Content-Type", kind)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)


def redirect(handler: BaseHTTPRequestHandler, to: str) -> None:
    handler.send_response(302)
    handler.send_header("Location", to)
    handler.end_headers()


def drip(handler: BaseHTTPRequestHandler) -> None:
    """A body that comes in drops, none of which is late."""
    handler.send_response(200)
    handler.send_header("Content-Type", "text/plain")
    handler.end_headers()
    for _ in range(60):
        handler.wfile.write(b"word ")
        time.sleep(0.05)


def drip_headers(handler: BaseHTTPRequestHandler) -> None:
    for _ in range(60):
        handler.wfile.write(b"H")
        time.sleep(0.05)


WORD = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
PLAIN = "text/plain; charset=utf-8"
SITE: dict[str, Callable[[Any], None]] = {
    "/page": lambda h: send(h, "text/html", HTML.encode()),
    "/latin": lambda h: send(h, "text/html; charset=latin-1", HTML.encode("latin-1")),
    "/plain": lambda h: send(h, PLAIN, "caf\u00e9".encode()),
    "/plain-latin": lambda h: send(h, "text/plain; charset=latin-1", "caf\u00e9".encode("latin-1")),
    "/caf%C3%A9?q=%C3%A9": lambda h: send(h, PLAIN, b"found"),
    "/file.pdf": lambda h: send(h, "application/octet-stream", make_pdf("A page.")),
    "/notes.md": lambda h: send(h, None, b"notes"),
    "/word": lambda h: send(h, WORD, make_docx()),
    "/moved": lambda h: redirect(h, "/plain"),
    "/picture": lambda h: send(h, "image/png", b"x"),
    "/untold": lambda h: send(h, None, b"x"),
    "/gzip": lambda h: send(h, PLAIN, b"x", Content_Encoding="gzip"),
    "/large": lambda h: send(h, PLAIN, bytes(10_000_001)),
    "/cut": lambda h: send(h, PLAIN, b"Ada", Content_Length="99"),
    "/largest": lambda h: send(h, PLAIN, b"a" * 10_000_000),
    "/to-file": lambda h: redirect(h, "file:///etc/hostname"),
    "/to-ftp": lambda h: redirect(h, "ftp://127.0.0.1/x"),
    "/to-data": lambda h: redirect(h, "data:text/plain,x"),
    "/circle": lambda h: redirect(h, "/circle"),
    "/error": lambda h: h.send_error(500),
    "/wait": lambda h: time.sleep(3),
    "/drip": drip,
    "/drip-headers": drip_headers,
    "/nothing": lambda h: None,
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        with contextlib.suppress(OSError):  # the other end has had enough
            SITE.get(self.path, lambda h: h.send_error(404))(self)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    "path,text",
    [
        ("/page", HTML_TEXT),
        ("/latin", HTML_TEXT),
        ("/plain", "caf\u00e9"),
        ("/plain#part", "caf\u00e9"),
        ("/plain-latin", "caf\u00e9"),
        ("/caf\u00e9?q=\u00e9", "found"),
        ("/caf%C3%A9?q=%C3%A9", "found"),
        ("/file.pdf", "A page.\n"),
        ("/notes.md", "notes"),
        ("/moved", "caf\u00e9"),
        ("/largest", "a" * 10_000_000),
    ],
)
def test_an_address_is_read(path: str, text: str, site: str) -> None:
    (found,), skipped = documents.read([site + path, site + path])
    assert (found.text, skipped, found.is_file) == (text, [], False)
    assert found.name == site + path


def test_a_word_document_at_an_address_is_read(site: str) -> None:
    assert documents.read(site + "/word")[0][0].text == only("a.docx", make_docx()).text


@pytest.mark.parametrize(
    "path,line",
    [
        ("/nowhere", "cannot be fetched: 404 "),
        ("/error", "cannot be fetched: 500 "),
        ("/picture", "is image/png; text, HTML, PDF and DOCX can be read"),
        ("/untold", "is of a kind that neither its server nor its name tells"),
        ("/gzip", "is sent with the encoding gzip"),
        ("/cut", "ended after 3 of 99 bytes"),
        ("/large", "has more than 10 MB"),
        ("/to-file", "cannot be fetched: 302 "),
        ("/to-ftp", "leads to ftp://127.0.0.1/x, which is no http or https address"),
        ("/to-data", "cannot be fetched: 302 "),
        ("/circle", "cannot be fetched: 302 "),
        ("/nothing", "cannot be fetched: "),
    ],
)
def test_an_address_that_cannot_be_read_is_a_line(path: str, line: str, site: str) -> None:
    with pytest.raises(UserError) as error:
        documents.read([site + path])
    assert str(error.value).startswith(f"{site}{path} {line}") and "\n" not in str(error.value)


@pytest.mark.parametrize("path", ["/wait", "/drip", "/drip-headers"])
def test_an_address_takes_no_longer_than_the_limit_in_all(
    path: str, site: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert web.SECONDS == 20
    monkeypatch.setattr(web, "SECONDS", 0.3)
    began = time.monotonic()
    with pytest.raises(UnreadableError, match=r"took more than 0\.3 seconds"):
        web.fetch(site + path)
    assert time.monotonic() - began < 2.5  # each of them would take 3 seconds


@pytest.mark.parametrize(
    "address", ["http://", "http://127.0.0.1:1/x", "http://[::1", "https://a b"]
)
def test_an_address_that_leads_nowhere_is_a_line(address: str) -> None:
    with pytest.raises(UnreadableError, match="cannot be fetched: "):
        web.fetch(address)


def test_other_documents_are_read_if_an_address_cannot_be(
    site: str, capfd: pytest.CaptureFixture
) -> None:
    found, (line,) = documents.read([site + "/nowhere", ("a.txt", b"Text.")])
    assert [each.text for each in found] == ["Text."]
    assert capfd.readouterr().err == f"warning: {line}; skipped\n"
