"""Tests of the index of paragraphs, and of ask.py over many texts."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import call, error_line
from conftest import ROOT, command_of

from cli import UserError
from deploy import documents, search
from deploy.runtime import Runtime
from deploy.search import ContextIndex, Embedder, load_embedder
from squad_utils import load_squad

TEXTS = {
    "harbour.txt": "The harbour was built by Ada Brook in 1907.\n\nIt is of stone.\n \nIt is deep.",
    "more/bridge.md": "\n\nThe bridge was opened in 1931.\nIt is painted red.\n",
    "more/notes.csv": "not,read",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with TEXTS."""
    for name, text in TEXTS.items():
        path = tmp_path / "texts" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "texts"


@pytest.fixture(scope="module")
def models(
    base: Path, teacher: Path, few: Path, sample: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Output folders of a QA model and of an embedding model that nothing has trained."""
    qa, emb = (tmp_path_factory.mktemp(name) / "out" for name in ("qa", "emb"))
    assert call(command_of("train_qa", teacher, few, qa, "--num_train_epochs=0")) == 0
    assert (
        call(command_of("train_qcemb", base, sample, emb, "--num_train_epochs=0", "--pooling=mean"))
        == 0
    )
    return qa, emb


@pytest.fixture(scope="module")
def embedder(models: tuple[Path, Path]) -> Embedder:
    return load_embedder(str(models[1]), Runtime("openvino"))


def indexed(embedder: Embedder, paths: list[str]) -> ContextIndex:
    return search.build_index(documents.read_paragraphs(paths), embedder)


# ------------------------------------------------------------------------------------------------
# Paragraphs and vectors


def test_paragraphs_and_where_they_are(folder: Path) -> None:
    found = documents.read_paragraphs([str(folder)])
    names = [(Path(each.path).name, each.line, each.text) for each in found]
    assert names == [
        ("harbour.txt", 1, "The harbour was built by Ada Brook in 1907."),
        ("harbour.txt", 3, "It is of stone."),
        ("harbour.txt", 5, "It is deep."),
        ("bridge.md", 3, "The bridge was opened in 1931.\nIt is painted red."),
    ]
    file = str(folder / "harbour.txt")
    assert len(documents.read_paragraphs([file, str(folder), file])) == 4


def test_nothing_to_index(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the folder .* has no \.txt, .* or \.docx file"):
        documents.read_paragraphs([str(tmp_path)])
    (tmp_path / "empty.txt").write_text(" \n\n ")
    with pytest.raises(UserError, match="has no text"):
        documents.read_paragraphs([str(tmp_path)])
    with pytest.raises(UserError, match="no such file"):
        documents.read_paragraphs([str(tmp_path / "nowhere.txt")])


def test_both_runtimes_give_the_same_vectors(models: tuple[Path, Path], embedder: Embedder) -> None:
    texts = ["one", "a longer text about harbours " * 9, "", "word " * 400]
    other = load_embedder(str(models[1]), Runtime("onnxruntime"))
    for length in (embedder.max_seq_length_c, embedder.max_seq_length_q):
        vectors = [each.vectors(texts, length) for each in (embedder, other)]
        assert vectors[0].shape == (4, 32)
        assert np.abs(vectors[0] - vectors[1]).max() < 1e-4 * vectors[1].std()


def test_long_paragraph_is_cut_into_parts(tmp_path: Path, embedder: Embedder) -> None:
    file = tmp_path / "long.txt"
    lines = [f"the harbour {i} of the town is deep and wide" for i in range(60)]
    file.write_text("short\n\n" + "\n".join(lines))
    found = indexed(embedder, [str(file)]).paragraphs
    assert len(found) > 3
    assert found[0].text == "short"
    parts = [each.text.split("\n") for each in found[1:]]
    assert [line for line in lines if not any(line in part for part in parts)] == []
    assert {line for part in parts for line in part} == set(lines)  # whole ones alone
    for each in found[1:]:
        assert each.text.startswith(file.read_text().splitlines()[each.line - 1])
        assert len(embedder.tokenizer.encode(each.text).ids) <= embedder.max_seq_length_c


def test_twenty_threads_find_what_one_finds(folder: Path, embedder: Embedder) -> None:
    index = indexed(embedder, [str(folder)])
    questions = [f"Is the {'very ' * (i % 9)}harbour {i} deep?" for i in range(200)]
    expected = [index.nearest(each, 3) for each in questions]
    with ThreadPoolExecutor(20) as threads:
        assert list(threads.map(lambda each: index.nearest(each, 3), questions)) == expected


# ------------------------------------------------------------------------------------------------
# What is kept


def test_only_what_changed_is_embedded(
    folder: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[str] = []
    original = Embedder.one_by_one

    def counted(self: Embedder, texts: Any, *args: Any) -> Any:
        embedded.extend(texts)
        return original(self, texts, *args)

    monkeypatch.setattr(Embedder, "one_by_one", counted)
    first = indexed(embedder, [str(folder)])
    assert len(embedded) == 4
    embedded.clear()
    again = indexed(embedder, [str(folder)])
    assert not embedded
    assert np.array_equal(first.vectors, again.vectors)
    (folder / "harbour.txt").write_text(TEXTS["harbour.txt"].replace("stone", "iron"))
    changed = indexed(embedder, [str(folder)])
    assert embedded == ["It is of iron."]
    assert len(changed.paragraphs) == 4
    embedded.clear()
    (folder / "more" / "bridge.md").unlink()
    assert len(indexed(embedder, [str(folder)]).paragraphs) == 3
    assert not embedded
    # A file that is damaged, or of another model, is as none.
    (folder / search.INDEX_FILE).write_bytes(b"PK damaged")
    indexed(embedder, [str(folder)])
    assert len(embedded) == 3


def test_vectors_in_bf16_and_in_f32_are_not_mixed(
    models: tuple[Path, Path], folder: Path, embedder: Embedder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index that was made in one is made anew for the other."""
    original = search.load_exported
    monkeypatch.setattr(
        search, "load_exported", lambda *a: replace(original(*a), arithmetic="bf16")
    )
    other = load_embedder(str(models[1]), Runtime("openvino", "default"))
    assert other.key != embedder.key
    ones = np.ones((4, 32), np.float32)
    monkeypatch.setattr(Embedder, "one_by_one", lambda _, texts, *__: enumerate(ones[: len(texts)]))
    indexed(other, [str(folder)])
    monkeypatch.setattr(
        Embedder, "one_by_one", lambda _, texts, *__: enumerate(2 * ones[: len(texts)])
    )
    assert np.array_equal(indexed(other, [str(folder)]).vectors, ones)
    assert np.array_equal(indexed(embedder, [str(folder)]).vectors, 2 * ones)


def test_folder_that_cannot_be_written(
    folder: Path, embedder: Embedder, monkeypatch: Any, capfd: pytest.CaptureFixture
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert len(indexed(embedder, [str(folder)]).paragraphs) == 4
    assert "the index cannot be saved" in capfd.readouterr().err


# ------------------------------------------------------------------------------------------------
# ask.py


def ask(*flags: str) -> int:
    return call(["python", str(ROOT / "ask.py"), *flags])


def test_answers_come_with_their_source(
    models: tuple[Path, Path], folder: Path, capfd: pytest.CaptureFixture
) -> None:
    flags = (f"--model={models[0]}", f"--model_emb={models[1]}", "--context", str(folder))
    question = ("--question", "Who built the harbour?")
    assert ask(*flags, *question, "--json", "--top_k=4") == 0
    record = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert record["question"] == "Who built the harbour?"
    assert len(record["answers"]) == 4
    for source in {each["source"] for each in record["answers"]}:
        same = [each["probability"] for each in record["answers"] if each["source"] == source]
        assert same == sorted(same, reverse=True)
    for each in record["answers"]:
        path, line = each["source"].rsplit(":", 1)
        assert each["paragraph"] in Path(path).read_text()
        assert Path(path).read_text()[each["start"] : each["end"]] == each["text"]
        assert int(line) > 0
    assert ask(*flags, *question, "--top_contexts=1") == 0
    assert "distance" in capfd.readouterr().out


def test_paragraphs_alone(
    models: tuple[Path, Path], folder: Path, capfd: pytest.CaptureFixture
) -> None:
    flags = (f"--model_emb={models[1]}", "--context", str(folder), "--question=Who?")
    assert ask(*flags, "--json", "--top_contexts=2") == 0
    nearest = json.loads(capfd.readouterr().out)["paragraphs"]
    assert len(nearest) == 2
    assert nearest[0]["distance"] <= nearest[1]["distance"]
    for each in nearest:
        assert each["paragraph"] in Path(each["source"].rsplit(":", 1)[0]).read_text()
    assert ask(*flags, "--top_contexts=2") == 0
    shown = capfd.readouterr().out
    for each in nearest:
        assert " ".join(each["paragraph"].split()) in shown
        assert each["source"] in shown


def test_without_an_embedder_texts_are_searched_by_their_words(
    models: tuple[Path, Path], folder: Path, capfd: pytest.CaptureFixture
) -> None:
    flags = (f"--model={models[0]}", "--context", str(folder), "--json", "--question")
    assert ask(*flags, "Who built it of stone?", "--top_contexts=1") == 0
    answers = json.loads(capfd.readouterr().out)["answers"]
    assert {each["paragraph"] for each in answers} == {"It is of stone."}
    assert not any("distance" in each for each in answers)
    assert ask(*flags, "Zzz", "--top_contexts=1") == 0
    assert json.loads(capfd.readouterr().out)["answers"] == []
    assert ask(*flags[:-2], "--question=Zzz") == 0
    assert "no paragraph has a word of the question" in capfd.readouterr().out
    assert not list(folder.rglob(".*"))


def test_wrong_input(
    models: tuple[Path, Path], folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    qa, emb = models
    file = str(folder / "harbour.txt")
    empty = tmp_path / "empty"
    empty.mkdir()
    for flags, message in (
        (("--context", file), "give --model, which reads a text"),
        ((f"--model={qa}",), "give --context, the texts with the answers"),
        ((f"--model={qa}", "--context", file, "--search=dense"), "dense needs --model_emb"),
        ((f"--model={qa}", "--context", file, f"--evaluate={file}"), "--context: --evaluate asks"),
        ((f"--model={qa}", f"--evaluate={file}"), "--question: --evaluate asks the questions"),
        (
            (f"--model={qa}", "--context", file, f"--eval_extra_contexts={file}"),
            "--eval_extra_contexts needs --evaluate",
        ),
        ((f"--model={qa}", f"--model_emb={emb}", "--context", str(empty)), "has no .txt"),
        ((f"--model={qa}", f"--model_emb={qa}", "--context", file), "not embedding"),
        ((f"--model={emb}", f"--model_emb={emb}", "--context", file), "is not a QA model"),
        ((f"--model={qa}", f"--model_emb={empty}", "--context", file), "has no model.onnx"),
    ):
        assert ask(*flags, "--question=What?") == 2
        assert message in error_line(capfd.readouterr().err)


def test_a_file_is_evaluated_by_search_and_answers(
    models: tuple[Path, Path], few: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    file, extra = (
        Path(shutil.copy(few / "dev-v1.1.json", tmp_path / name))
        for name in ("few.json", "extra.json")
    )
    data = json.loads(extra.read_text())
    data["data"][0]["paragraphs"][0]["context"] += " More."
    extra.write_text(json.dumps(data))
    flags = (f"--model={models[0]}", f"--model_emb={models[1]}", f"--evaluate={file}", "--json")
    found = {}
    for method in search.SEARCHES:
        assert ask(*flags, f"--search={method}", f"--eval_extra_contexts={extra}") == 0
        found[method] = json.loads(capfd.readouterr().out)
        assert found[method]["search"] == method
        assert found[method]["read_1"]["ms"] > found[method]["search_ms"]
    assert found["bm25"]["contexts"] == len(load_squad(str(file), "").contexts) + 1
    assert ask(*flags[:-1]) == 0
    shown = capfd.readouterr().out
    assert shown.startswith("search hybrid: top 1 ")
    assert "of that F1" in shown
    assert ask(f"--model_emb={models[1]}", f"--evaluate={file}", "--json") == 0
    assert json.loads(capfd.readouterr().out)["f1_given_right"] is None
