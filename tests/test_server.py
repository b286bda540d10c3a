"""The page's server: what it answers, whom it refuses, and that no question is lost."""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import re
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jsonschema
import numpy as np
import openapi_spec_validator
import pytest
import uvicorn
from calls import call, error_line, started
from conftest import ROOT, command_of
from test_runtime import WEIGHT, qa_folder

from cli import UserError
from deploy import server
from deploy.feedback import Feedback
from deploy.reader import Reader
from squad_utils import load_squad

DESCRIPTION = json.loads((ROOT / "deploy" / "openapi.json").read_text(encoding="utf-8"))
TEXT = "🐑 one alpha is here\r\n\r\nthen the lamp beta burns\n"


@contextlib.contextmanager
def serving(reader: Reader, feedback: Feedback, host: str = "127.0.0.1") -> Iterator[int]:
    """The port of a server in another thread."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = server.make_app(reader, feedback, host)
    running = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        running.should_exit = True
        thread.join()


def send(
    port: int, method: str, path: str, body: Any = None, **headers: str
) -> tuple[int, Any, http.client.HTTPMessage]:
    """Status, JSON and headers that come back. A `body` that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        text = response.read()
        is_json = response.headers["content-type"] == "application/json"
        return response.status, json.loads(text) if is_json else text, response.headers


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    """One that answers alpha, and has a document in a folder."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "notes.txt").write_bytes(TEXT.encode())
    model = Reader(qa_folder(folder / "qa", WEIGHT.astype(np.float32)))
    return model.add([str(folder / "notes.txt")])


@pytest.fixture(scope="module")
def shared_port(reader: Reader, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with serving(
        reader, Feedback(str(tmp_path_factory.mktemp("kept") / "feedback.json"))
    ) as number:
        yield number


@pytest.fixture
def port(shared_port: int) -> Iterator[int]:
    yield shared_port
    for each in send(shared_port, "GET", "/api/documents")[1]["documents"]:
        if each["added"]:
            send(shared_port, "DELETE", f"/api/documents?name={quote(each['name'])}")


# ------------------------------------------------------------------------------------------------
# Answers


def test_an_answer_has_the_fields_of_the_description_and_its_place_in_the_text(port: int) -> None:
    status, found, _ = send(port, "POST", "/api/ask", {"question": "alpha", "top_k": 1})
    assert status == 200 and found.keys() == {"answers"}
    (answer,) = found["answers"]
    assert list(answer)[:6] == ["text", "score", "start", "end", "sentence", "source"]
    assert (answer["text"], answer["sentence"]) == ("alpha", "🐑 one alpha is here")
    assert 0 < answer["score"] <= 1
    _, document, _ = send(port, "GET", f"/api/documents/text?name={quote(answer['document'])}")
    assert document["text"] == TEXT
    assert document["text"][answer["start"] : answer["end"]] == "alpha"


def test_without_top_k_there_are_up_to_three_answers(port: int) -> None:
    _, three, _ = send(port, "POST", "/api/ask", {"question": "alpha"})
    _, all_of_them, _ = send(port, "POST", "/api/ask", {"question": "alpha", "top_k": 50})
    assert len(three["answers"]) == 3 < len(all_of_them["answers"])
    assert three["answers"] == all_of_them["answers"][:3]


def test_a_document_is_added_asked_and_removed(port: int) -> None:
    body = b"the end is alpha " * 3
    status, added, _ = send(port, "POST", "/api/documents?name=new.txt", body)
    assert (status, added["name"], added["added"]) == (201, "new.txt", True)
    _, listed, _ = send(port, "GET", "/api/documents")
    assert added in listed["documents"] and len(listed["documents"]) == 2
    _, found, _ = send(port, "POST", "/api/ask", {"question": "alpha", "top_k": 9})
    assert "new.txt" in {each["document"] for each in found["answers"]}
    assert send(port, "DELETE", "/api/documents?name=new.txt")[0] == 204
    _, found, _ = send(port, "POST", "/api/ask", {"question": "alpha", "top_k": 9})
    assert "new.txt" not in {each["document"] for each in found["answers"]}


def test_an_added_document_replaces_the_one_of_its_name(port: int) -> None:
    for body in (b"one alpha", b"another alpha"):
        assert send(port, "POST", "/api/documents?name=new.txt", body)[0] == 201
    assert send(port, "GET", "/api/documents/text?name=new.txt")[1]["text"] == "another alpha"


def test_the_description_is_valid_and_names_every_address(port: int) -> None:
    status, described, _ = send(port, "GET", "/openapi.json")
    assert status == 200 and described == DESCRIPTION
    openapi_spec_validator.validate(described)
    allowed = {
        (path, method)
        for path, methods in described["paths"].items()
        for method in ("get", "post", "put", "delete")
        if send(port, method.upper(), path)[0] != 405
    }
    assert allowed == {(p, m) for p, methods in described["paths"].items() for m in methods}


def test_what_comes_back_is_as_described(port: int) -> None:
    answer = send(port, "POST", "/api/ask", {"question": "alpha"})[1]["answers"][0]
    right = {"question": "alpha", **{key: answer[key] for key in ("document", "start", "end")}}
    name = f"?name={quote(answer['document'])}"
    for method, path, body in (
        ("POST", "/api/ask", {"question": "alpha"}),
        ("POST", "/api/ask", {"question": ""}),
        ("GET", "/api/documents", None),
        ("POST", "/api/documents?name=a.txt", b"alpha"),
        ("GET", f"/api/documents/text{name}", None),
        ("GET", "/api/documents/text?name=none", None),
        ("POST", "/api/feedback", right),
        ("GET", "/api/feedback", None),
        ("GET", "/nothing", None),
    ):
        status, found, _ = send(port, method, path, body)
        schema = {"$ref": "#/components/schemas/Error"}
        if status < 400:
            responses = DESCRIPTION["paths"][path.partition("?")[0]][method.lower()]["responses"]
            schema = responses[str(status)]["content"]["application/json"]["schema"]
        jsonschema.validate(found, {**schema, "components": DESCRIPTION["components"]})


# ------------------------------------------------------------------------------------------------
# What is refused: the request -> the status and the line

ASK = ("POST", "/api/ask")
BAD: dict[str, tuple[str, str, Any, int, str]] = {
    "no JSON": (*ASK, b"who?", 400, "the request is not JSON: "),
    "deep JSON": (*ASK, b"[" * 90_000, 400, "the request is not JSON"),
    "half a character": (*ASK, b'{"question": "\xc3"}', 400, "the request is not JSON: "),
    "a list": (*ASK, ["who?"], 400, "the request is not a JSON object"),
    "no question": (*ASK, {"top_k": 3}, 400, "question should be a text"),
    "an empty question": (*ASK, {"question": " "}, 400, "question is empty"),
    "a question that is a number": (*ASK, {"question": 3}, 400, "question should be a text"),
    "a surrogate": (*ASK, b'{"question": "\\ud800"}', 400, "question is not UTF-8 text"),
    "no answers": (*ASK, {"question": "who", "top_k": 0}, 400, "top_k should be 1 to 50"),
    "too many": (*ASK, {"question": "who", "top_k": 51}, 400, "top_k should be 1 to 50"),
    "true": (*ASK, {"question": "who", "top_k": True}, 400, "top_k should be a number"),
    "half an answer": (*ASK, {"question": "who", "top_k": 1.5}, 400, "top_k should be a number"),
    "an unknown key": (
        *ASK, {"question": "who", "topk": 1}, 400, "'topk' is unknown; did you mean top_k?"),
    "a request of 1 MB": (*ASK, b" " * 10**6, 413, "the request has 1.0 MB; at most 0.1 MB"),
    "another method": ("GET", "/api/ask", None, 405, "Method Not Allowed"),
    "no such page": ("GET", "/etc/passwd", None, 404, "Not Found"),
    "a file without a name": ("POST", "/api/documents", b"x", 400, "the address should end with"),
    "UTF-16": ("POST", "/api/documents?name=a.txt", "a".encode("utf-16"), 400, "a.txt is UTF-16"),
    "bytes": ("POST", "/api/documents?name=a.txt", b"\xff\0", 400, "a.txt "),
    "no text": ("POST", "/api/documents?name=a.txt", b" \n", 400, "a.txt has no text"),
    "a damaged PDF": ("POST", "/api/documents?name=a.pdf", b"%PDF-1.4 x", 400, "a.pdf "),
    "over 20 MB": (
        "POST", "/api/documents?name=a.txt", b"a " * 10_000_001, 413,
        "a.txt has 20.0 MB; at most 20 MB are taken"),
    "none to remove": ("DELETE", "/api/documents?name=x", None, 404, "'x' is no document"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_is_told_in_a_line_and_changes_nothing(name: str, port: int) -> None:
    method, path, body, status, line = BAD[name]
    before = send(port, "GET", "/api/documents")[1]
    got, found, _ = send(port, method, path, body)
    assert (got, list(found)) == (status, ["error"])
    assert found["error"].startswith(line) and "\n" not in found["error"]
    assert send(port, "GET", "/api/documents")[1] == before


def test_20_mb_are_taken(port: int) -> None:
    body = b"alpha".ljust(20_000_000)
    assert send(port, "POST", "/api/documents?name=a.txt", body)[0] == 201


def test_what_is_added_is_limited_in_all(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "MAX_UPLOADS", 20)
    assert send(port, "POST", "/api/documents?name=a.txt", b"alpha is here")[0] == 201
    status, found, _ = send(port, "POST", "/api/documents?name=b.txt", b"alpha is here")
    assert (status, "together" in found["error"]) == (413, True)
    assert send(port, "POST", "/api/documents?name=a.txt", b"alpha was here")[0] == 201


PATHS = ["../secret.txt", "..%2Fsecret.txt", "%2Fetc%2Fpasswd", "/etc/passwd", "..%5Csecret.txt",
         "secret.txt%00.txt", ".", "..", "%2e%2e%2fsecret.txt", "a%0Ab.txt", "secret.txt",
         "file%3A%2F%2F%2Fetc%2Fpasswd", "http%3A%2F%2F127.0.0.1%2F"]  # fmt: skip


@pytest.mark.parametrize("name", PATHS)
def test_a_name_in_a_request_is_no_path_and_no_address(
    name: str, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """secret.txt lies in the folder where the server runs, above it and below it."""
    for folder in (tmp_path, tmp_path / "in", tmp_path / "in" / "deeper"):
        folder.mkdir(exist_ok=True)
        (folder / "secret.txt").write_text("alpha is the secret")
    monkeypatch.chdir(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    for method, path in (("GET", "/api/documents/text"), ("DELETE", "/api/documents")):
        assert send(port, method, f"{path}?name={name}")[0] == 404
    assert send(port, "GET", f"/{name}")[0] == 404
    status, _, _ = send(port, "POST", f"/api/documents?name={name}", b"one alpha")
    if name == "secret.txt":  # the upload, not the file
        assert send(port, "GET", f"/api/documents/text?name={name}")[1]["text"] == "one alpha"
    else:
        assert status == 400
    assert sorted(tmp_path.rglob("*")) == before


# ------------------------------------------------------------------------------------------------
# Other sites: Host and Origin -> whether they may ask

OWN = "127.0.0.1:{port}"
SITES: dict[str, tuple[dict[str, str], bool]] = {
    "the page": ({"Host": OWN, "Origin": f"http://{OWN}"}, True),
    "a program": ({"Host": OWN}, True),
    "localhost": ({"Host": "localhost:{port}", "Origin": "http://localhost:{port}"}, True),
    "a tunnel from another port": ({"Host": "localhost:9", "Origin": "http://localhost:9"}, True),
    "IPv6": ({"Host": "[::1]:{port}"}, True),
    "capitals": ({"Host": "LOCALHOST:{port}"}, True),
    "rebinding": ({"Host": "evil.example:{port}"}, False),
    "rebinding with its origin": (
        {"Host": "evil.example:{port}", "Origin": "http://evil.example:{port}"}, False),
    "a name that begins alike": ({"Host": "127.0.0.1.evil.example:{port}"}, False),
    "a name that ends alike": ({"Host": "evil-localhost"}, False),
    "a name before it": ({"Host": "evil.example@127.0.0.1:{port}"}, False),
    "another address": ({"Host": "192.168.1.7:{port}"}, False),
    "no name": ({"Host": ""}, False),
    "brackets": ({"Host": "[::1"}, False),
    "another site": ({"Host": OWN, "Origin": "https://evil.example"}, False),
    "another port": ({"Host": OWN, "Origin": "http://127.0.0.1:9"}, False),
    "the other name": ({"Host": OWN, "Origin": "http://localhost:{port}"}, False),
    "https": ({"Host": OWN, "Origin": f"https://{OWN}"}, False),
    "a frame without a site": ({"Host": OWN, "Origin": "null"}, False),
    "an extension": ({"Host": OWN, "Origin": "chrome-extension://abc"}, False),
}  # fmt: skip


@pytest.mark.parametrize("name", SITES)
def test_other_sites_are_refused(name: str, port: int) -> None:
    given, may = SITES[name]
    headers = {key: value.format(port=port) for key, value in given.items()}
    for method, path, body in (
        ("GET", "/", None),
        ("GET", "/api/documents", None),
        ("POST", "/api/ask", {"question": "alpha"}),
        ("POST", "/api/documents?name=a.txt", b"alpha"),
    ):
        status, found, _ = send(port, method, path, body, **headers)
        assert status < 300 if may else (status, list(found)) == (403, ["error"])
    documents = send(port, "GET", "/api/documents")[1]["documents"]
    assert ("a.txt" in [each["name"] for each in documents]) == may


@pytest.mark.parametrize(
    ("host", "name", "may"),
    [("0.0.0.0", "192.168.1.7", True), ("0.0.0.0", socket.gethostname(), True),
     ("0.0.0.0", "evil.example", False), ("::", "[fe80::1]:80", True),
     ("192.168.1.7", "192.168.1.7:80", True), ("192.168.1.7", "192.168.1.8", False),
     ("Attic.local", "attic.local:80", True), ("127.0.0.1", socket.gethostname(), False)],
)  # fmt: skip
def test_a_server_for_others_knows_its_names(host: str, name: str, may: bool) -> None:
    assert server.is_own_name(name, host) == may


def test_the_page_may_load_nothing_and_be_framed_by_no_one(port: int) -> None:
    _, page, headers = send(port, "GET", "/")
    policy = headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
    assert not re.search(rb"""(src|href|action)=["']?(https?:)?//""", page)


# ------------------------------------------------------------------------------------------------
# Many at once


def test_of_200_questions_by_20_threads_none_is_lost(port: int) -> None:
    def ask(number: int) -> tuple[int, int, Any]:
        body = {"question": f"alpha {number}", "top_k": 1 + number % 3}
        status, found, _ = send(port, "POST", "/api/ask", body)
        return number, status, found

    alone = {count: send(port, "POST", "/api/ask", {"question": "alpha", "top_k": count})[1]
             for count in (1, 2, 3)}  # fmt: skip
    with ThreadPoolExecutor(20) as threads:
        for number, status, found in threads.map(ask, range(200)):
            assert status == 200 and found == alone[1 + number % 3]


def test_documents_that_are_added_and_removed_at_once_are_all_kept(port: int) -> None:
    def add(number: int) -> int:
        path = f"/api/documents?name={number}.txt"
        status, _, _ = send(port, "POST", path, f"alpha in {number}".encode())
        if number % 2:
            assert send(port, "GET", "/api/documents")[0] == 200
            return send(port, "DELETE", path)[0]
        return status

    with ThreadPoolExecutor(10) as threads:
        assert set(threads.map(add, range(40))) == {201, 204}
    _, found, _ = send(port, "GET", "/api/documents")
    added = {each["name"] for each in found["documents"] if each["added"]}
    assert added == {f"{number}.txt" for number in range(0, 40, 2)}


def test_a_question_that_takes_long_blocks_no_other(
    reader: Reader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def answers(question: str, **_: Any) -> list[Any]:
        if question == "long":
            began.set()
            assert go_on.wait(30)
        return []

    monkeypatch.setattr(Reader, "__call__", lambda _, *args, **more: answers(*args, **more))
    with (
        serving(reader, Feedback(str(tmp_path / "f.json"))) as port,
        ThreadPoolExecutor(1) as thread,
    ):
        long = thread.submit(send, port, "POST", "/api/ask", {"question": "long"})
        assert began.wait(30)
        assert send(port, "POST", "/api/ask", {"question": "short"})[0] == 200
        assert send(port, "GET", "/")[0] == 200 and not long.done()
        go_on.set()
        assert long.result()[0] == 200


# ------------------------------------------------------------------------------------------------
# What is kept


def test_confirmed_answers_are_a_file_that_can_be_trained_on(tmp_path: Path) -> None:
    """Their context is the paragraph; a second answer to a question replaces the first."""
    feedback = Feedback(str(tmp_path / "kept.json"))
    reader = Reader(qa_folder(tmp_path / "qa", WEIGHT.astype(np.float32)))
    reader.add(
        [("a.txt", b"\xef\xbb\xbf  one alpha\n\nbeta and\ngamma \n\n last"), ("b.md", b"x beta")]
    )
    with serving(reader, feedback) as port:

        def confirm(question: str, document: str, words: str) -> int:
            start = reader.text(document).index(words)
            given = {"question": question, "document": document}
            given |= {"start": start, "end": start + len(words)}
            status, found, _ = send(port, "POST", "/api/feedback", given)
            assert status == 201
            return found["feedback"]

        assert confirm("who?", "a.txt", "one") == 1
        assert confirm("who?", "a.txt", "beta") == 2
        assert confirm("who?", "b.md", "beta") == 3
        assert confirm("who?", "a.txt", "gamma") == 3
        _, shown, headers = send(port, "GET", "/api/feedback")
    assert "attachment" in headers["Content-Disposition"]
    assert shown == json.loads((tmp_path / "kept.json").read_text("utf-8"))
    again = Feedback(str(tmp_path / "kept.json"))
    again.confirm("where?", "x beta", 0, 1, "b.md")
    data = load_squad(str(tmp_path / "kept.json"), "--squad_train_data")
    assert len(again) == len(set(data.ids)) == 4
    found = {
        (data.contexts[context], question): answers
        for context, question, answers in zip(
            data.context_of, data.questions, data.answers, strict=True
        )
    }
    assert found == {
        ("one alpha", "who?"): [(0, "one")],
        ("beta and\ngamma ", "who?"): [(9, "gamma")],
        ("x beta", "who?"): [(2, "beta")],
        ("x beta", "where?"): [(0, "x")],
    }


@pytest.mark.slow
def test_train_qa_takes_the_file_as_it_is(tiny_bert: Path, sample: Path, tmp_path: Path) -> None:
    feedback = Feedback(str(tmp_path / "train-v1.1.json"))
    for article in json.loads((sample / "dev-v1.1.json").read_text("utf-8"))["data"]:
        for paragraph in article["paragraphs"]:
            for asked in paragraph["qas"][:1]:
                start, words = asked["answers"][0]["answer_start"], asked["answers"][0]["text"]
                place = (paragraph["context"], start, start + len(words))
                feedback.confirm(asked["question"], *place, "a title")
    shutil.copy(sample / "dev-v1.1.json", tmp_path)
    assert call(command_of("train_qa", tiny_bert, tmp_path, tmp_path / "out")) == 0


@pytest.mark.parametrize("text", ["[]", "{}", '{"data": [{}]}', '{"data": [{"paragraphs": 1}]}'])
def test_another_file_is_not_written_over(text: str, tmp_path: Path) -> None:
    (tmp_path / "kept.json").write_text(text)
    with pytest.raises(UserError, match=r"^--feedback: .*kept\.json is not a "):
        Feedback(str(tmp_path / "kept.json"))


BAD_SPANS = {
    "empty": (4, 4), "backwards": (7, 4), "before the text": (-3, 2), "behind the text": (4, 999),
    "with a space": (1, 5), "huge": (0, 10**30),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SPANS)
def test_what_is_no_answer_is_not_kept(name: str, reader: Reader, port: int) -> None:
    start, end = BAD_SPANS[name]
    given = {"question": "who?", "document": reader.documents[0], "start": start, "end": end}
    before = send(port, "GET", "/api/feedback")[1]
    assert send(port, "POST", "/api/feedback", given)[0] == 400
    assert send(port, "POST", "/api/feedback", {**given, "document": "/etc/passwd"})[0] == 404
    assert send(port, "GET", "/api/feedback")[1] == before


# ------------------------------------------------------------------------------------------------
# The command


def test_the_command_serves_until_ctrl_c(tmp_path: Path) -> None:
    qa = qa_folder(tmp_path / "qa", WEIGHT.astype(np.float32))
    (tmp_path / "notes.txt").write_text("one alpha")
    command = [sys.executable, str(ROOT / "ask.py"), "--serve", "--port=0", f"--model={qa}"]
    command += [f"--context={tmp_path / 'notes.txt'}", f"--feedback={tmp_path / 'kept.json'}"]
    with started(command, fresh=True) as process:
        line = process.stdout.readline()
        port = int(re.match(r"http://127\.0\.0\.1:(\d+)/ is the page", line)[1])
        _, found, _ = send(port, "POST", "/api/ask", {"question": "alpha", "top_k": 1})
        assert [each["text"] for each in found["answers"]] == ["alpha"]
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130 and stderr.splitlines()[-1] == "stopped"
    assert not (tmp_path / "kept.json").exists()


MISTAKES = {
    "no model": ((), "--serve needs --model, which reads the documents"),
    "a question": (("--model=x", "--question=who"), "--serve asks in the browser: leave out"),
    "a port that is none": (("--model=x", "--port=65536"), "argument --port: '65536' is not a "),
    "no packages": (("--model=x",), "--serve needs the package starlette: pip install -r "),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_page_that_cannot_be_shown_is_a_line(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    flags, line = MISTAKES[name]
    if name == "no packages":
        monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert call(["python", str(ROOT / "ask.py"), "--serve", *flags]) == 2
    assert error_line(capfd.readouterr().err).startswith(f"error: {line}")


def test_a_port_that_is_taken_is_a_line(port: int, reader: Reader, tmp_path: Path) -> None:
    for host, number in (("127.0.0.1", port), ("192.0.2.1", 0)):
        with pytest.raises(UserError, match=f"^--host {host} --port {number}: cannot listen there"):
            server.serve(reader, Feedback(str(tmp_path / "f.json")), host, number)
