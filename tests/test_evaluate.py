"""Tests of a SQuAD file's questions asked of all its contexts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from test_asking import CountingEmbedder, make_embedder, make_reader

from cli import UserError
from deploy import evaluate
from deploy.reader import Reader

# The reader of test_asking finds velmora more probable than tindale, that more than oster, and that
# more than ada: by log odds of 18, 16, 14 and 12.
CONTEXTS = {
    "a b c ada": [("a b c", "ada")],
    "a d e f oster": [("d e", "the Oster")],  # F1 and EM drop articles and cases
    "g h velmora": [("i", "velmora"), ("g", "tindale")],
    "a b": [],
}
EXTRA = {"i": [], "g  h\nvelmora": [("g h", "velmora")], "j velmora": []}


def squad(path: Path, contexts: dict[str, list[tuple[str, str]]]) -> str:
    """A SQuAD file of contexts, each with its questions and their answers."""
    paragraphs = [
        {
            "context": context,
            "qas": [
                {
                    "id": f"{context} {n}",
                    "question": question,
                    "answers": [{"text": answer, "answer_start": 0}] if answer else [],
                }
                for n, (question, answer) in enumerate(asked)
            ],
        }
        for context, asked in contexts.items()
    ]
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))
    return str(path)


def test_figures_are_those_computed_by_hand(tmp_path: Path) -> None:
    asked = evaluate.load(squad(tmp_path / "dev.json", CONTEXTS), None)
    figures = evaluate.evaluate(asked, make_reader())
    assert (figures.search, figures.questions, figures.contexts) == ("bm25", 4, 4)
    # "i" is in no context; the own contexts of the others come first.
    assert figures.top == {1: 75.0, 5: 75.0, 20: 75.0}
    # ada, oster, nothing, velmora in place of tindale
    assert figures.read[1][:2] == (50.0, 50.0)
    # Of "a b c", oster has log odds of 14, ada 12; but ada's context leads the search by over one
    # standard deviation, which is SEARCH_WEIGHT = 2.
    for count in (5, 20):
        assert figures.read[count][:2] == (50.0, 50.0)
    assert figures.f1_given_right == 75.0
    assert figures.read[1].ms <= figures.read[5].ms <= figures.read[20].ms


def test_contexts_of_another_file_are_searched_too(tmp_path: Path) -> None:
    asked = evaluate.load(
        squad(tmp_path / "dev.json", CONTEXTS), squad(tmp_path / "train.json", EXTRA)
    )
    assert len(asked.questions) == 4
    assert [" ".join(each.text.split()) for each in asked.contexts] == [
        *CONTEXTS,
        "i",
        "j velmora",
    ]
    figures = evaluate.evaluate(
        asked, Reader(None, make_embedder(CountingEmbedder()), search="bm25")
    )
    assert (figures.contexts, figures.read, figures.f1_given_right) == (6, {}, None)
    assert figures.top == {1: 75.0, 5: 75.0, 20: 75.0}  # "i" finds only the other file's context


def test_a_search_by_vectors_ranks_the_contexts(tmp_path: Path) -> None:
    asked = evaluate.load(squad(tmp_path / "dev.json", CONTEXTS), None)
    figures = evaluate.evaluate(
        asked, Reader(None, make_embedder(CountingEmbedder()), search="dense")
    )
    assert (figures.search, figures.top[5]) == ("dense", 100.0)
    assert (tmp_path / ".context_index.npz").exists()
    model = CountingEmbedder()
    evaluate.evaluate(asked, Reader(None, make_embedder(model)))
    assert sorted(model.texts) == ["a b c", "d e", "g", "i"]  # no context a second time


def test_parts_of_a_context_count_as_one(tmp_path: Path) -> None:
    long = " ".join(["a b c d e f g h."] * 3)
    contexts = {long: [], "a b x": [("a b", "x")]}
    asked = evaluate.load(squad(tmp_path / "dev.json", contexts), None)
    figures = evaluate.evaluate(asked, make_reader(length=20))
    assert figures.top == {1: 100.0, 5: 100.0, 20: 100.0}
    contexts = {long: [("h", "h")], "h x": [], "h y": [("h y", "y")]}
    asked = evaluate.load(squad(tmp_path / "dev.json", contexts), None)
    figures = evaluate.evaluate(asked, make_reader(length=20))
    assert figures.top == {1: 50.0, 5: 100.0, 20: 100.0}


def test_questions_without_an_answer_are_not_asked(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    contexts = {"a ada": [("a", "ada"), ("b", ""), ("c", "")]}
    asked = evaluate.load(squad(tmp_path / "dev.json", contexts), None)
    assert asked.questions == ["a"]
    assert "2 of 3 questions have no answer and are not asked" in capfd.readouterr().err


@pytest.mark.parametrize(
    "contexts,message",
    [
        ({"a": []}, r"--evaluate: .*dev.json has no questions"),
        ({"a": [("b", "")]}, r"--evaluate: .*dev.json has no question with an answer"),
    ],
)
def test_a_file_without_questions_is_a_line(
    contexts: dict[str, list[tuple[str, str]]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        evaluate.load(squad(tmp_path / "dev.json", contexts), None)


def test_files_that_are_no_squad_are_a_line(tmp_path: Path) -> None:
    good, bad = squad(tmp_path / "dev.json", CONTEXTS), tmp_path / "bad.json"
    bad.write_text("{")
    with pytest.raises(UserError, match=r"--evaluate: .*bad.json line 1 column 2 is not"):
        evaluate.load(str(bad), None)
    with pytest.raises(UserError, match=r"--eval_extra_contexts: .*bad.json line 1 column 2 is"):
        evaluate.load(good, str(bad))
    with pytest.raises(UserError, match="--evaluate: no such file"):
        evaluate.load(str(tmp_path / "none.json"), None)


def test_the_table_has_the_figures(tmp_path: Path) -> None:
    asked = evaluate.load(squad(tmp_path / "dev.json", CONTEXTS), None)
    figures = evaluate.evaluate(asked, make_reader())
    shown = evaluate.table(figures).splitlines()
    assert shown[0].startswith("search bm25: top 1 75.00%, top 5 75.00%, top 20 75.00% of 4 que")
    assert shown[1] == "given the right context, the reader's F1 is 75.00"
    assert [line.split()[:4] for line in shown[3:]] == [
        ["1", "50.00", "50.00", "66.7%"],
        ["5", "50.00", "50.00", "66.7%"],
        ["20", "50.00", "50.00", "66.7%"],
    ]
    record = json.loads(json.dumps(figures.record()))
    assert record["read_5"]["f1"] == 50.0
