"""Documents at addresses of the web: fetched whole, within limits of size and time. No torch.

Only addresses that a user or a program names are fetched, and only by http and https.
"""

from __future__ import annotations

import http.client
import re
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import IO
from urllib.parse import quote, urlsplit, urlunsplit

from cli import UnreadableError, first_line

MAX_BYTES = 10_000_000
SECONDS = 20.0  # for all of a document, with redirects
ADDRESS = re.compile(r"https?://", re.IGNORECASE)
KINDS = {  # type that a server tells -> suffix of such files
    "text/html": ".html",
    "application/xhtml+xml": ".html",
    "application/pdf": ".pdf",
    "application/vnd.openxmlformats-officedocument.wordprocessingml.document": ".docx",
    "text/plain": ".txt",
    "text/markdown": ".md",
}
UNTOLD = ("", "application/octet-stream", "binary/octet-stream")  # types that tell nothing
HEADERS = {"User-Agent": "Mozilla/5.0 (compatible; ask.py)", "Accept": ", ".join(KINDS)}


@dataclass(frozen=True)
class Fetched:
    """A document as a server sent it.

    Attributes:
        kind: the suffix of files of its kind.
        charset: the encoding that the server tells, or None.
    """

    data: bytes
    kind: str
    charset: str | None


def fetch(address: str) -> Fetched:
    """The document at an address.

    Raises:
        UnreadableError: there is none, it has more than MAX_BYTES, takes more than SECONDS, or is
            of a kind that cannot be read.
    """
    results: list[Fetched | UnreadableError] = []
    deadline = time.monotonic() + SECONDS

    def work() -> None:
        try:
            results.append(_fetch(address, deadline))
        except UnreadableError as error:
            results.append(error)

    # In a thread: no timeout of a socket ends a search for a name, or headers that come in drops.
    worker = threading.Thread(target=work, daemon=True)
    worker.start()
    worker.join(SECONDS)
    if not results:
        raise UnreadableError(_too_slow())
    if isinstance(results[0], UnreadableError):
        raise results[0]
    return results[0]


def _too_slow() -> str:
    return f"took more than {SECONDS:g} seconds"


class _HttpAlone(urllib.request.HTTPRedirectHandler):
    """Follow redirects to http and https alone."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        if not ADDRESS.match(newurl):
            raise UnreadableError(f"leads to {newurl}, which is no http or https address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """One that knows http and https, and no files, FTP or data addresses."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _HttpAlone(),
    ):
        opener.add_handler(handler)
    return opener


def _fetch(address: str, deadline: float) -> Fetched:
    try:
        request = urllib.request.Request(_ascii(address), headers=HEADERS)
        with _opener().open(request, timeout=SECONDS) as response:
            kind = _kind(response.headers.get_content_type(), response)
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding != "identity":  # which is all that was asked for
                raise UnreadableError(f"is sent with the encoding {encoding}")
            data = bytearray()
            while some := response.read1(65536):
                data += some
                if len(data) > MAX_BYTES:
                    raise UnreadableError(f"has more than {MAX_BYTES / 1e6:g} MB")
                if time.monotonic() > deadline:
                    raise UnreadableError(_too_slow())
            return Fetched(bytes(data), kind, response.headers.get_content_charset())
    except urllib.error.HTTPError as error:
        raise UnreadableError(f"cannot be fetched: {error.code} {first_line(error)}") from None
    except TimeoutError:
        raise UnreadableError(_too_slow()) from None
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise UnreadableError(_too_slow()) from None
        raise UnreadableError(f"cannot be fetched: {error.reason}") from None
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise UnreadableError(f"cannot be fetched: {first_line(error)}") from None


def _kind(told: str, response: http.client.HTTPResponse) -> str:
    """The suffix for a response's type, or for its address if its type tells nothing."""
    if not response.headers.get("Content-Type") or told in UNTOLD:
        path = urlsplit(response.geturl()).path.lower()
        for suffix in (*KINDS.values(), ".htm"):
            if path.endswith(suffix):
                return suffix
        raise UnreadableError("is of a kind that neither its server nor its name tells")
    if told not in KINDS:
        raise UnreadableError(f"is {told}; text, HTML, PDF and DOCX can be read")
    return KINDS[told]


def _ascii(address: str) -> str:
    """An address as servers take it: letters beyond ASCII encoded, the part behind # dropped.

    Raises:
        ValueError: it has no host, or one that cannot be encoded.
    """
    parts = urlsplit(address.strip())
    if not parts.hostname:
        raise ValueError("the address names no server")
    user, at, host = parts.netloc.rpartition("@")
    if not host.isascii():
        name, colon, port = host.partition(":")
        host = name.encode("idna").decode() + colon + port
    path, query = (quote(each, safe="/%:@!$&'()*+,;=~?-._") for each in (parts.path, parts.query))
    return urlunsplit((parts.scheme.lower(), f"{user}{at}{host}", path, query, ""))
