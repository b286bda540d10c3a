"""The class for programs: texts, documents, batches, threads."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from test_asking import (
    CountingEmbedder,
    by_names,
    fakes,
    make_embedder,
    make_model,
    odd_name,
    random_logits,
    run_ask,
)
from test_documents import make_docx, make_pdf, site
from test_runtime import WEIGHT, qa_folder

from cli import UserError
from deploy.reader import Answer, Reader

TOWNS = b"Velmora is a town.\n\nIt was built by Ada.\n\nOster is a river."


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """A QA model that runs, whose answer is the word alpha."""
    return qa_folder(tmp_path / "qa", WEIGHT.astype(np.float32))


def test_a_text_gives_records_with_their_place(folder: str) -> None:
    text = "x beta.\nThen alpha came. X"
    best, *_ = found = Reader(folder)("who", text, top_k=2)
    assert len(found) == 2 and found[0].score > found[1].score
    assert (best.text, best.sentence) == ("alpha", "Then alpha came.")
    assert text[best.start : best.end] == "alpha" == best.sentence[best.offset :][:5]
    assert (best.source, best.document, best.line, best.page) == (None, None, None, None)
    assert best.as_record() == {
        "text": "alpha", "score": best.score, "probability": best.score, "start": 13, "end": 18,
        "sentence": "Then alpha came."}  # fmt: skip


def test_files_and_documents_from_memory_give_records_with_line_or_page(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_bytes(b"\xef\xbb\xbfOne.\r\n\r\nTwo\r\nnames Velmora.")
    path = str(tmp_path / "sub" / "a.txt")
    reader = Reader(make_model(), embedder=make_embedder(CountingEmbedder()))
    assert reader.add([str(tmp_path / "sub"), ("b.pdf", make_pdf("One.", "Ada."))]) is reader
    velmora, ada = reader("Velmora or Ada", top_k=2)
    assert (velmora.text, velmora.source, velmora.line, velmora.page) == (
        "Velmora", f"{path}:4", 4, None)  # fmt: skip
    assert (ada.text, ada.source, ada.line, ada.page) == ("Ada", "b.pdf, page 2", None, 2)
    assert reader.documents == [path, "b.pdf"]
    for each in (velmora, ada):
        assert each.document is not None and each.paragraph is not None
        assert reader.text(each.document)[each.start : each.end] == each.text
        assert each.text in each.paragraph and each.distance is not None


def test_without_an_embedder_words_find_the_paragraphs() -> None:
    reader = Reader(make_model()).add([("a.txt", TOWNS)])
    (found,) = reader.paragraphs("which river?", 1)
    assert (found.paragraph.text, found.distance) == ("Oster is a river.", None)
    assert [each.text for each in reader("which river?", top_contexts=1, top_k=1)] == ["Oster"]
    assert reader("東京は") == []


def test_without_a_search_all_documents_are_read_as_a_whole() -> None:
    reader = Reader(make_model(), search="none").add([("a.txt", TOWNS), ("b.pdf", make_pdf("Ada"))])
    found = reader("nothing here", top_k=9)
    assert {(each.text, each.source) for each in found} >= {
        ("Velmora", "a.txt:1"), ("Ada", "a.txt:3"), ("Ada", "b.pdf, page 1")}  # fmt: skip


def test_without_a_qa_model_paragraphs_are_found() -> None:
    reader = Reader(None, embedder=make_embedder(CountingEmbedder())).add([("a.txt", TOWNS)])
    assert reader.paragraphs("oster river", 1)[0].paragraph.line == 5
    with pytest.raises(UserError, match="answers need a QA model"):
        reader("who")
    with pytest.raises(UserError, match="documents need a QA model"):
        Reader(None).add([("a.txt", TOWNS)])


def test_a_list_of_questions_gives_a_list_of_answers_each() -> None:
    reader = Reader(make_model()).add([("a.txt", TOWNS)])
    questions = ["which river?", "which town?", "nothing"]
    assert reader(questions) == [reader(each) for each in questions]
    assert reader(questions, "Ada") == [reader(each, "Ada") for each in questions]
    assert reader([]) == []


def test_documents_are_replaced_and_removed() -> None:
    model = CountingEmbedder()
    reader = Reader(make_model(), embedder=make_embedder(model), search="dense")
    with pytest.raises(UserError, match="there are no documents to read"):
        reader("who")
    reader.add([("a.txt", b"Ada."), ("b.txt", b"Oster.")])
    reader.add([("a.txt", b"Tindale.")])
    assert model.texts == ["ada .", "oster .", "tindale ."]  # each once
    assert reader.documents == ["a.txt", "b.txt"] and reader.text("a.txt") == "Tindale."
    assert {"Oster", "Tindale"} <= {each.text for each in reader("who")}
    reader.remove("b.txt")
    assert [each.text for each in reader("who", top_k=1)] == ["Tindale"]
    reader.remove("a.txt")
    assert reader.documents == []
    for lost in (reader.remove, reader.text):
        with pytest.raises(KeyError):
            lost("a.txt")


def test_what_cannot_be_added_changes_nothing() -> None:
    reader = Reader(make_model()).add([("a.txt", TOWNS)])
    for data in (b"caf\xe9", b" \n "):
        with pytest.raises(UserError, match=r"^b\.txt (is not UTF-8|has no text)"):
            reader.add([("b.txt", data)])
    with pytest.raises(UserError, match=r"^no such file: nowhere"):
        reader.add("nowhere")
    assert reader.documents == ["a.txt"]
    reader.add([("b.txt", b"Ada."), ("c.txt", b"caf\xe9")])
    assert reader.skipped == ["c.txt is not UTF-8 text (byte 3)"]
    assert reader.documents == ["a.txt", "b.txt"]


def test_documents_from_memory_leave_nothing_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even vectors, though a file has their name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("other")
    Reader(make_model(), embedder=make_embedder(CountingEmbedder())).add([("a.txt", TOWNS)])
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_a_name_that_is_not_utf8_can_be_shown(tmp_path: Path) -> None:
    odd_name(tmp_path)
    (found,) = Reader(make_model()).add(tmp_path)("one", top_k=1)
    assert found.source is not None and found.source.encode().endswith("caf\ufffd.txt:1".encode())


# ------------------------------------------------------------------------------------------------
# ask.py: the same answers

__all__ = ["fakes", "site"]  # fixtures of other files


@pytest.mark.usefixtures("fakes")
def test_ask_prints_the_records_of_the_reader(
    tmp_path: Path, site: str, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.pdf").write_bytes(make_pdf("One.", "Two of Ada."))
    (tmp_path / "b.docx").write_bytes(make_docx())
    paths = [str(tmp_path), site + "/page"]
    assert run_ask("--model=x", "--context", *paths, "--question=Ada", "--json", "--top_k=9") == 0
    printed = json.loads(capfd.readouterr().out)
    expected = Reader(make_model()).add(paths)("Ada", top_k=9)
    assert printed == {"question": "Ada", "answers": [each.as_record() for each in expected]}
    sources = {each["source"] for each in printed["answers"] if each["text"] == "Ada"}
    files = {f"{tmp_path}/a.pdf, page 2", f"{tmp_path}/b.docx:2"}
    assert sources == files | {f"{site}/page:2"}
    assert sum(each["score"] for each in printed["answers"]) < 1  # among all documents
    assert all(0 < each["probability"] <= 1 for each in printed["answers"])
    assert run_ask("--model=x", f"--context={site}/page", "--question=Ada") == 0
    shown = capfd.readouterr().out
    assert "Ada designed it in 1907" in shown and f"{site}/page:2" in shown


# ------------------------------------------------------------------------------------------------
# Threads


def in_threads(ask: Callable[[int], Any], count: int = 200) -> list[Any]:
    with ThreadPoolExecutor(20) as threads:
        return list(threads.map(ask, range(count)))


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime"])
def test_twenty_threads_get_the_answers_of_one(runtime: str, folder: str) -> None:
    """Texts of different lengths, so that a mixed-up window would show."""
    reader = Reader(folder, runtime=runtime)
    texts = [" ".join(["x", "beta"] * (i % 7) + ["alpha", "x"] * (i % 3 + 1)) for i in range(200)]
    expected = [reader("who", text) for text in texts]
    assert in_threads(lambda i: reader("who", texts[i])) == expected


def test_twenty_threads_get_the_answers_of_one_from_documents() -> None:
    pages = [(f"{i}.txt", f"Page {i} is of Ada and x{i % 7}.".encode()) for i in range(8)]
    reader = Reader(make_model(random_logits(0, 1.0)), make_embedder(CountingEmbedder()))
    reader.add(pages)
    questions = [f"page {i % 8}" for i in range(60)]
    expected = reader(questions)
    assert in_threads(lambda i: reader(questions[i]), 60) == expected


def test_documents_can_be_added_while_questions_are_asked() -> None:
    """A question sees both documents of an `add`, or none of them."""
    reader = Reader(make_model(by_names), search="bm25").add([("start.txt", b"Ada is here.")])
    asked: list[list[Answer]] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            asked.append(reader("here", top_k=50, top_contexts=1000))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for i in range(10):
        reader.add([(f"{i}a.txt", b"Oster %d is here." % i), (f"{i}b.txt", b"Ada %d is here." % i)])
    done.set()
    for thread in threads:
        thread.join()
    assert len(reader.documents) == 21
    assert asked
    for answers in asked:
        names = {str(each.document) for each in answers} - {"start.txt"}
        assert {name[:-5] for name in names if name.endswith("a.txt")} == {
            name[:-5] for name in names if name.endswith("b.txt")
        }


def test_adding_in_many_threads_loses_nothing() -> None:
    reader = Reader(make_model())
    in_threads(lambda i: reader.add([(f"{i}.txt", b"Ada %d" % i)]), 40)
    assert sorted(reader.documents) == sorted(f"{i}.txt" for i in range(40))


def test_the_module_needs_no_torch() -> None:
    code = "import sys, deploy.reader; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
