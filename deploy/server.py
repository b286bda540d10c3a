"""The page in the browser, and its JSON API, which deploy/openapi.json describes. No torch.

    python ask.py --serve --model models/qa --model_emb models/emb --context texts/

Names in requests are looked up among the documents in memory. They never become paths or addresses.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import functools
import hashlib
import ipaddress
import json
import os
import re
import socket
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cli import UserError, did_you_mean, first_line
from deploy.documents import BLANK_LINES
from deploy.feedback import Feedback
from deploy.reader import TOP_CONTEXTS, TOP_K, Answer, Reader

MAX_UPLOAD = 20_000_000  # bytes of a document
MAX_UPLOADS = 200_000_000  # bytes of all documents that are added in the page
MAX_JSON = 100_000  # bytes of another request
MAX_TOP_K = 50
HERE = Path(__file__).parent
PAGE = (HERE / "page.html").read_text(encoding="utf-8")
DESCRIPTION = (HERE / "openapi.json").read_text(encoding="utf-8")
ANY_ADDRESS = ("0.0.0.0", "::")
KINDS = {str: "a text", int: "a number"}
FIELDS = ("text", "score", "start", "end", "sentence", "source", "document", "line", "page",
          "offset", "no_answer")  # fmt: skip  # of an answer, in JSON


def serve(
    reader: Reader, feedback: Feedback, host: str, port: int, top_contexts: int = TOP_CONTEXTS
) -> None:
    """Serve the page until Ctrl-C; a line names its address.

    Args:
        port: 0 takes a free one.

    Raises:
        UserError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(
            f"--host {host} --port {port}: cannot listen there: {error.strerror or error};"
            " --port 0 takes a free port"
        ) from None
    shown = "localhost" if host in ANY_ADDRESS else f"[{host}]" if ":" in host else host
    print(f"http://{shown}:{listener.getsockname()[1]}/ is the page; Ctrl-C stops it", flush=True)
    config = uvicorn.Config(
        make_app(reader, feedback, host, top_contexts),
        log_level="error",
        ws="none",
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    uvicorn.Server(config).run(sockets=[listener])


def make_app(
    reader: Reader,
    feedback: Feedback,
    host: str = "127.0.0.1",
    top_contexts: int = TOP_CONTEXTS,
) -> ASGIApp:
    """The page and its API.

    Args:
        host: the address that it listens on.
        top_contexts: the paragraphs to read per question.
    """
    app = Starlette(
        routes=[
            Route("/", page),
            Route("/openapi.json", openapi),
            Route("/api/ask", ask, methods=["POST"]),
            Route("/api/documents", documents, methods=["GET"]),
            Route("/api/documents", add, methods=["POST"]),
            Route("/api/documents", remove, methods=["DELETE"]),
            Route("/api/documents/text", text),
            Route("/api/feedback", confirmed, methods=["GET"]),
            Route("/api/feedback", confirm, methods=["POST"]),
        ],
        exception_handlers={HTTPException: refused, UserError: mistaken, Exception: failed},
    )
    app.state.feedback, app.state.reader = feedback, reader
    app.state.answers = functools.partial(reader, top_contexts=top_contexts)
    app.state.added = {}  # name of a document that was added in the page -> its bytes
    app.state.changing = asyncio.Lock()  # one that waited in a thread would take it from questions
    return guarded(app, host)


# ------------------------------------------------------------------------------------------------
# Who may ask


def guarded(app: ASGIApp, host: str) -> ASGIApp:
    """Refuse requests that another site has the user's browser make.

    Such a site is told by the Origin of its requests. If it has its own name lead to this machine
    (DNS rebinding), Host is that name.
    """
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'"
            for each in re.findall(f"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
        )
        for tag in ("script", "style")
    }
    headers = {
        "Content-Security-Policy": "default-src 'none'; base-uri 'none'; form-action 'none';"
        " frame-ancestors 'none'; connect-src 'self'; img-src data:;"
        f" script-src {hashes['script']}; style-src {hashes['style']}",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cross-Origin-Opener-Policy": "same-origin",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-store",
    }

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(headers)
            await send(message)

        given = Headers(scope=scope)
        address, origin = given.get("host", ""), given.get("origin")
        if not is_own_name(address, host):
            problem = f"Host {address[:100]!r} is not a name of this server"
        elif origin is not None and origin != f"http://{address}":
            problem = f"Origin {origin[:100]!r} is another site"
        else:
            return await app(scope, receive, send_with_headers)
        await JSONResponse({"error": problem}, 403)(scope, receive, send_with_headers)

    return answer


def is_own_name(address: str, host: str) -> bool:
    """Whether a request's Host is a name of the server that listens on `host`."""
    found = re.fullmatch(r"(?:\[([\da-f:.]+)\]|([\w.-]+))(?::\d+)?", address.lower())
    if found is None:
        return False
    name = found[1] or found[2]
    if name in ("localhost", "127.0.0.1", "::1", host.lower()):
        return True
    if host not in ANY_ADDRESS:
        return False
    try:  # of this machine: a site's name may lead here, a number is no site's name
        return bool(ipaddress.ip_address(name))
    except ValueError:
        return name in (socket.gethostname().lower(), socket.getfqdn().lower())


async def refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def mistaken(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)


async def failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"the server failed: {first_line(error)}"}, 500)


# ------------------------------------------------------------------------------------------------
# What is asked


async def read_body(request: Request, limit: int, what: str) -> bytes:
    """A request's body.

    One that is too large is read to its end, since a browser looks at no answer before that;
    nothing of it is kept.
    """
    body, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= limit:
            body += chunk
        else:
            body.clear()
    if size > limit:
        raise HTTPException(
            413, f"{what} has {size / 1e6:.1f} MB; at most {limit / 1e6:g} MB are taken"
        )
    return bytes(body)


async def read_object(request: Request, kinds: dict[str, type], **defaults: Any) -> dict[str, Any]:
    """The values of a JSON object, which has the keys of `kinds` and no others."""
    body = await read_body(request, MAX_JSON, "the request")
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the request is not JSON: {first_line(error)}") from None
    if not isinstance(given, dict):
        raise HTTPException(400, "the request is not a JSON object")
    for key in given:
        if key not in kinds:
            raise HTTPException(400, f"{key[:50]!r} is unknown; {did_you_mean(key, kinds)}")
    values = defaults | given
    for key, kind in kinds.items():
        if type(values.get(key)) is not kind:  # a bool is an int, and no number
            raise HTTPException(400, f"{key} should be {KINDS[kind]}")
    return values


def read_question(values: dict[str, Any]) -> str:
    """`question` of a request's values."""
    question: str = values["question"].strip()
    if not question:
        raise HTTPException(400, "question is empty")
    if re.search("[\ud800-\udfff]", question):  # half of a character, by an escape of JSON
        raise HTTPException(400, "question is not UTF-8 text")
    return question


def name_of(request: Request) -> str:
    """The name at the end of a request's address."""
    name = request.query_params.get("name", "").strip()
    if not name:
        raise HTTPException(400, "the address should end with ?name=<name of a document>")
    return name


def shown(name: str) -> str:
    """A document's name in JSON: bytes of a path that are not UTF-8 are replaced."""
    return os.fsencode(name).decode(errors="replace")


def text_of(reader: Reader, name: str) -> str:
    """The text of the document that is shown by this name."""
    for each in reader.documents:
        if shown(each) == name:
            with contextlib.suppress(KeyError):  # it was removed meanwhile
                return reader.text(each)
    raise HTTPException(404, f"there is no document {name[:100]!r}")


# ------------------------------------------------------------------------------------------------
# What is answered


async def page(request: Request) -> Response:
    return HTMLResponse(PAGE)


async def openapi(request: Request) -> Response:
    return Response(DESCRIPTION, media_type="application/json")


async def ask(request: Request) -> Response:
    asked = await read_object(request, {"question": str, "top_k": int}, top_k=TOP_K)
    question, top_k = read_question(asked), asked["top_k"]
    if not 1 <= top_k <= MAX_TOP_K:
        raise HTTPException(400, f"top_k should be 1 to {MAX_TOP_K}")
    answers = await run_in_threadpool(request.app.state.answers, question, top_k=top_k)
    return JSONResponse({"answers": [record(each) for each in answers]})


def record(answer: Answer) -> dict[str, Any]:
    """An answer in JSON, without attributes that are None."""
    values = {name: getattr(answer, name) for name in FIELDS}
    values["document"] = shown(values["document"])
    return {name: value for name, value in values.items() if value is not None}


async def documents(request: Request) -> Response:
    state, found = request.app.state, []
    for name in state.reader.documents:
        with contextlib.suppress(KeyError):  # it was removed meanwhile
            found.append(document(request, name))
    kept = len(state.feedback)
    return JSONResponse({"documents": found, "limit": MAX_UPLOAD, "feedback": kept})


def document(request: Request, name: str) -> dict[str, Any]:
    """A document in JSON."""
    state = request.app.state
    characters = len(state.reader.text(name))
    return {"name": shown(name), "characters": characters, "added": name in state.added}


async def add(request: Request) -> Response:
    """Take a file, which is the body of the request."""
    name, state = name_of(request), request.app.state
    if re.search(r"[/\\\x00-\x1f\x7f]|^\.+$", name) or len(name) > 255:
        raise HTTPException(400, "name should be that of a file, without folders")
    if name not in state.added and name in map(shown, state.reader.documents):
        raise HTTPException(409, f"{name} is there already")
    data = await read_body(request, MAX_UPLOAD, name)
    async with state.changing:
        if sum(state.added.values()) - state.added.get(name, 0) + len(data) > MAX_UPLOADS:
            raise HTTPException(
                413, f"what is added may have {MAX_UPLOADS / 1e6:g} MB together; remove a document"
            )
        await run_in_threadpool(state.reader.add, [(name, data)])
        state.added[name] = len(data)
        return JSONResponse(document(request, name), 201)


async def remove(request: Request) -> Response:
    name, state = name_of(request), request.app.state
    async with state.changing:
        if state.added.pop(name, None) is None:
            raise HTTPException(404, f"{name[:100]!r} is no document that was added here")
        await run_in_threadpool(state.reader.remove, name)
    return Response(status_code=204)


async def text(request: Request) -> Response:
    name = name_of(request)
    return JSONResponse({"name": name, "text": text_of(request.app.state.reader, name)})


async def confirm(request: Request) -> Response:
    """Keep the right answer to a question, with the paragraph around it."""
    kinds = {"question": str, "document": str, "start": int, "end": int}
    given, state = await read_object(request, kinds), request.app.state
    whole, start, end = text_of(state.reader, given["document"]), given["start"], given["end"]
    if not 0 <= start < end <= len(whole) or whole[start:end] != whole[start:end].strip():
        raise HTTPException(400, "start and end should be those of words in the document")
    gaps = list(BLANK_LINES.finditer(whole))
    begin = max((gap.end() for gap in gaps if gap.end() <= start), default=0)
    stop = min((gap.start() for gap in gaps if gap.start() >= end), default=len(whole))
    context = whole[begin:stop].lstrip("\ufeff \t\r\n")
    begin = stop - len(context)
    question, title = read_question(given), given["document"]
    await run_in_threadpool(
        state.feedback.confirm, question, context, start - begin, end - begin, title
    )
    return JSONResponse({"feedback": len(state.feedback)}, 201)


async def confirmed(request: Request) -> Response:
    headers = {"Content-Disposition": 'attachment; filename="feedback.json"'}
    return JSONResponse(request.app.state.feedback.as_squad(), headers=headers)
