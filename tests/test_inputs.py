"""What people feed the scripts: one row an input, with the value that comes out or the line."""

from __future__ import annotations

import csv
import importlib
import io
import json
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertTokenizerFast

import squad_utils
from cli import ArgumentParser, UserError
from squad_utils import SpecialIds, SquadData, load_squad
from tasks import EmbeddingTask, QaTask
from tasks.embedding_loss import HardNegatives, LossCfg, Mining, PairBatches
from tasks.qa import warn_of_long_answers
from tasks.texts import Pairs, make_pairs
from training.flags import GROUPS, add_data_arguments

FLAG = "--squad_dev_data"
HARBOUR = "The harbour was dug in 1742 by two brothers."
BAKERS = "Bakers sell rye bread on Mondays, and eleven rolls."
NONE = object()  # of a key that is left out


# ------------------------------------------------------------------------------------------------
# Ids, and questions without an answer


def answer(text: str, start: int) -> dict[str, Any]:
    return {"text": text, "answer_start": start}


YEAR, DAY = answer("1742", 23), answer("Mondays", 25)


def question(name: str, answers: Any = NONE, text: str = "When?", **more: Any) -> dict[str, Any]:
    qa = {"id": name, "question": text, **more}
    return qa if answers is NONE else {**qa, "answers": answers}


def squad(*contexts: tuple[str, list[dict[str, Any]]], version: str | None = "1.1") -> str:
    """A SQuAD file of one article, of contexts and their questions."""
    paragraphs = [{"context": context, "qas": qas} for context, qas in contexts]
    head = {} if version is None else {"version": version}
    return json.dumps({**head, "data": [{"title": "t", "paragraphs": paragraphs}]})


def two(*answers: Any, version: str | None = "1.1", **more: Any) -> str:
    """A SQuAD file: question q0 has an answer, and q1, ... have `answers` and `more` keys."""
    others = [question(f"q{n}", each, **more) for n, each in enumerate(answers, 1)]
    return squad((HARBOUR, [question("q0", [YEAR]), *others]), version=version)


@pytest.fixture
def read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that reads a data file; the data, and the lines that are told."""

    def of(name: str, content: str | bytes) -> tuple[SquadData, list[str]]:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        data = load_squad(str(path), FLAG)
        return data, capsys.readouterr().err.splitlines()

    return of


AS_2 = "so the file counts as SQuAD 2.0"


@pytest.mark.parametrize(
    ("content", "answers", "told"),
    [
        # is_impossible, an answer without text, an empty list, no key: all say the same.
        (two([], version="v2.0"), {"q0": ["1742"], "q1": []}, []),
        (two([answer("", -1)], version="v2.0"), {"q0": ["1742"], "q1": []}, []),
        (two([answer("", 0)], version="v2.0"), {"q0": ["1742"], "q1": []}, []),
        (two([answer("  ", 3)], version="v2.0"), {"q0": ["1742"], "q1": []}, []),
        (two([{"text": ""}], version="v2.0"), {"q0": ["1742"], "q1": []}, []),
        (two(NONE, version="v2.0"), {"q0": ["1742"], "q1": []}, []),
        (two(None, version="v2.0"), {"q0": ["1742"], "q1": []}, []),
        (two({"text": [], "answer_start": []}, version="v2.0"), {"q0": ["1742"], "q1": []},
         ["answers as Hugging Face datasets writes them"]),
        (two({"text": [""], "answer_start": [-1]}, version="v2.0"), {"q0": ["1742"], "q1": []},
         ["answers as Hugging Face datasets writes them"]),
        (two([], version="v2.0", is_impossible=True), {"q0": ["1742"], "q1": []}, []),
        (two([], version="v2.0", is_impossible=False), {"q0": ["1742"], "q1": []}, []),
        (two([], version="v2.0", is_impossible=True, plausible_answers=[YEAR]),
         {"q0": ["1742"], "q1": []}, []),
        (two([YEAR], version="v2.0", is_impossible=False), {"q0": ["1742"], "q1": ["1742"]}, []),
        (two([YEAR], version="v2.0", is_impossible=None), {"q0": ["1742"], "q1": ["1742"]}, []),
        (two([YEAR], version="v2.0", is_impossible=True), {"q0": ["1742"], "q1": []},
         ["questions with an answer beside is_impossible: true: 1 (first ids: q1)"]),
        (two([answer("", -1), YEAR], version="v2.0"), {"q0": ["1742"], "q1": ["1742"]},
         ["questions with an empty answer beside another: 1 (first ids: q1)"]),
        # A file that does not say that it is SQuAD 2.0, or says that it is not.
        (two([]), {"q0": ["1742"], "q1": []},
         [f"1 of 2 questions have no answer (first ids: q1), {AS_2}, though its version is 1.1"]),
        (two([], NONE, [answer("", -1)], version=None), {"q0": ["1742"], "q1": []},
         [f"3 of 4 questions have no answer (first ids: q1, q2, q3), {AS_2}"]),
        # Not in place is another thing than none.
        (two([answer("1742", -1)]), {"q0": ["1742"], "q1": []},
         ["1 answers are not in the context at answer_start and are left out (first ids: q1)"]),
        # An id is a key.
        (squad((HARBOUR, [question("0", [YEAR])] * 2)), {"0": ["1742"]},
         ["come again with the same id, context and answers: 1 (first ids: 0); they count once"]),
        (squad((HARBOUR, [question("0", [YEAR])]), (BAKERS, [question("1", [DAY])]),
               (HARBOUR, [question("0", [YEAR])])), {"0": ["1742"], "1": ["Mondays"]},
         ["come again with the same id, context and answers: 1 (first ids: 0); they count once"]),
        (squad((HARBOUR, [question("0", [YEAR]), question(" 0", [YEAR]), question("", [YEAR])])),
         {"0": ["1742"], " 0": ["1742"], "": ["1742"]}, []),
        # What is not text of one kind all the same.
        ("\ufeff" + two([YEAR]), {"q0": ["1742"], "q1": ["1742"]}, []),
        (two([YEAR]).replace(", ", ",\r\n"), {"q0": ["1742"], "q1": ["1742"]}, []),
    ],
)  # fmt: skip
def test_squad_files(read: Any, content: str, answers: dict[str, list[str]], told: list[str]):
    data, lines = read("data.json", content)
    found = dict(zip(data.ids, [[text for _, text in each] for each in data.answers], strict=True))
    assert {name: found[name] for name in answers} == answers
    assert len(lines) == len(told)
    assert all(part in line for part, line in zip(told, lines, strict=True))
    # What evaluation scripts see: each id once, its answers a list.
    qas = [qa for a in data.articles for p in a["paragraphs"] for qa in p["qas"]]
    assert [qa["id"] for qa in qas] == data.ids
    assert [bool(qa["answers"]) for qa in qas] == data.answerable.tolist()
    assert data.version_2 == ('"v2.0"' in content or not data.answerable.all())


ROWS = [
    {"id": "a", "title": "t", "context": HARBOUR, "question": "When?", "answers": [YEAR]},
    {"id": "b", "title": "t", "context": BAKERS, "question": "Which day?", "answers": [DAY]},
]
LAYOUTS = "the layouts that are read are SQuAD JSON; rows with question, context and answers in"
TABLE = "id,question,context,answer_text,answer_start\n"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        # Ids that repeat: both places are named.
        ("d.json", squad((HARBOUR, [question("0", [YEAR])]), (BAKERS, [question("0", [DAY])])),
         "the id '0' stands at data[0].paragraphs[0].qas[0] and, with another question, context or"
         " answer, at data[0].paragraphs[1].qas[0]"),
        ("d.json", squad((HARBOUR, [question("0", [YEAR]), question("0", [YEAR], "Who?")])),
         "'0' stands at data[0].paragraphs[0].qas[0] and, with another question"),
        ("d.json", squad((HARBOUR, [question("0", [YEAR]), question("0", [])])),
         "'0' stands at data[0].paragraphs[0].qas[0] and, with another question"),
        ("d.jsonl", "\n".join(json.dumps({**row, "id": "x"}) for row in ROWS),
         "the id 'x' stands at line 1 and, with another question, context or answer, at line 2"),
        ("d.csv", f'{TABLE}x,When?,"{HARBOUR}",1742,23\nx,Who?,"{HARBOUR}",1742,23\n',
         "the id 'x' stands at line 2 and, with another question, context or answer, at line 3"),
        ("d.json", json.dumps([{**row, "id": 7} for row in ROWS]),
         "the id '7' stands at [0] and, with another question, context or answer, at [1]"),
        # Keys of rows.
        ("d.jsonl", '{"id": "a", "question": "?", "context": 3, "answers": []}',
         "line 1: context must be a string"),
        ("d.jsonl", f'{json.dumps(ROWS[0])}\n{{"id": "b", "question": "?"}}',
         "line 2: context is missing"),
        ("d.jsonl", f"{json.dumps(ROWS[0])}\n[]\n", "line 2: must be an object"),
        ("d.jsonl", f'{json.dumps(ROWS[0])}\n\n{{"id": \n', "line 3 column 8 is not JSON"),
        ("d.jsonl", json.dumps({**ROWS[0], "answers": {"text": ["1742"], "answer_start": []}}),
         "line 1: answers has 1 texts, but 0 starts"),
        ("d.jsonl", json.dumps({**ROWS[0], "answers": {"text": "1742", "answer_start": 23}}),
         "line 1: answers.text must be a list"),
        ("d.jsonl", json.dumps({**ROWS[0], "answers": {"text": ["1742"], "answer_start": [2.5]}}),
         "line 1: answers[0].answer_start must be a whole number"),
        ("d.json", json.dumps([ROWS[0], {**ROWS[1], "answers": "Mondays"}]),
         "[1].answers must be a list"),
        ("d.json", two([], is_impossible="yes"), "qas[1].is_impossible must be true or false"),
        # CSV.
        ("d.csv", "question,context\n", "lacks the column answer_text; " + LAYOUTS),
        ("d.csv", "", "lacks the column question; " + LAYOUTS),
        ("d.csv", f"{TABLE}a,?,c,d\n", "line 2: 4 cells, of 5 columns"),
        ("d.csv", f"{TABLE}a,?,c,d,x\n", "line 2: answer_start must be a whole number, not 'x'"),
        ("d.csv", f'{TABLE}a,?,"c', "line 2 is not CSV: unexpected end of data"),
        ("d.csv", f"{TABLE.strip()},is_impossible\na,?,c,d,0,maybe\n",
         "line 2: is_impossible must be true or false, not 'maybe'"),
        # No layout at all.
        ("d.json", "{}", "is not SQuAD: data is missing; " + LAYOUTS),
        ("d.json", "[]", "is not SQuAD: the top must be an object; " + LAYOUTS),
        ("d.json", '{"data": {"train": []}}', "data must be a list; " + LAYOUTS),
        ("d.json", '{"data": [{"text": "a"}]}', "paragraphs is missing; " + LAYOUTS),
        ("d.json", '[{"context": "a", "qas": []}]', "the top must be an object; " + LAYOUTS),
        ("d.txt", "What is this?\n", "line 1 column 1 is not JSON: Expecting value; " + LAYOUTS),
        ("d.jsonl", "", "has no questions"),
        ("d.csv", TABLE, "has no questions"),
        # Bytes that are no UTF-8 text.
        ("d.json", two([]).encode("utf-16"), "is UTF-16, not UTF-8: iconv -f UTF-16 -t UTF-8"),
        ("d.csv", TABLE.encode("utf-16-be"), "has NUL bytes (the first is byte 0)"),
        ("d.csv", "\ufeff".encode("utf-16-be") + TABLE.encode("utf-16-be"), "is UTF-16, not UTF-8"),
        ("d.json", two([]) + "\0", "has NUL bytes"),
        ("d.csv", f"{TABLE}a,caf\xe9,c,d,0".encode("latin-1"), "is not UTF-8 text (byte"),
    ],
)  # fmt: skip
def test_refused_files(read: Any, name: str, content: str | bytes, said: str) -> None:
    with pytest.raises(UserError) as error:
        read(name, content)
    line = str(error.value)
    assert line.startswith(f"{FLAG}: ") and name in line and said in line and "\n" not in line


# ------------------------------------------------------------------------------------------------
# SQuAD in other layouts


def rows_of(data: list[dict[str, Any]], first_only: bool = False) -> list[dict[str, Any]]:
    """The questions of SQuAD articles as rows of Hugging Face datasets."""
    rows = []
    for article in data:
        for paragraph in article["paragraphs"]:
            for qa in paragraph["qas"]:
                given = qa["answers"][: 1 if first_only else None]
                answers = {key: [each[key] for each in given] for key in ("text", "answer_start")}
                row = {"id": qa["id"], "title": article["title"], "context": paragraph["context"]}
                rows.append({**row, "question": qa["question"], "answers": answers})
    return rows


def as_csv(rows: list[dict[str, Any]], delimiter: str = ",", start: str = "{}") -> str:
    columns = ["title", "question", "id", "context", "answer_start", "answer_text"]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, delimiter=delimiter, extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        answers = row["answers"]
        place, words = answers["answer_start"] or [""], answers["text"] or [""]
        cells = {"answer_start": start.format(place[0]), "answer_text": words[0]}
        writer.writerow({**row, **cells})
    return text.getvalue()


def same(data: SquadData, expected: SquadData) -> bool:
    """Whether data of two files are equal but for the names and hashes of the files."""
    return all(
        np.array_equal(getattr(data, name), getattr(expected, name))
        if name in ("context_of", "answerable")
        else getattr(data, name) == getattr(expected, name)
        for name in ("contexts", "ids", "questions", "answers", "context_of", "answerable")
    ) and [[(p["context"], p["qas"]) for p in a["paragraphs"]] for a in data.articles] == [
        [(p["context"], p["qas"]) for p in a["paragraphs"]] for a in expected.articles
    ]


def layouts(rows: list[dict[str, Any]]) -> dict[str, tuple[str, str, str]]:
    """Files of the same rows: name, content, what they are read as."""
    lists = [{**row, "answers": [
        answer(text, at) for text, at in zip(*row["answers"].values(), strict=True)
    ]} for row in rows]  # fmt: skip
    lines = "".join(f"{json.dumps(row)}\n" for row in rows)
    return {
        "flat": ("d.json", json.dumps({"version": "1.1", "data": rows}), "JSON of rows"),
        "list": ("d.json", json.dumps(rows, indent=1), "JSON of rows"),
        "lists of answers": ("d.json", json.dumps(lists), "JSON of rows"),
        "lines": ("d.jsonl", lines, "JSON lines"),
        "lines by another name": ("d.json", lines.replace("\n", "\r\n"), "JSON lines"),
        "blank lines": ("d.ndjson", lines.replace("\n", "\n\n"), "JSON lines"),
    }


@pytest.fixture(scope="module")
def dev(sample: Path) -> list[dict[str, Any]]:
    return json.loads((sample / "dev-v1.1.json").read_text(encoding="utf-8"))["data"]


@pytest.mark.parametrize("layout", layouts(rows_of([])))
def test_rows_are_read_as_the_squad_file(read: Any, dev: list[dict[str, Any]], layout: str) -> None:
    expected, lines = read("squad.json", json.dumps({"version": "1.1", "data": dev}))
    assert lines == []
    name, content, kind = layouts(rows_of(dev))[layout]
    data, lines = read(name, content)
    assert same(data, expected)
    assert len(lines) == 1 and f"{name} is read as {kind}: {len(data.ids)} questions" in lines[0]


@pytest.mark.parametrize(
    ("delimiter", "start", "told"),
    [(",", "{}", 1), (";", "{}.0", 1), ("\t", "{}", 1), (",", "", 2)],
    ids=["commas", "semicolons and floats", "tabs", "without answer_start"],
)
def test_csv_is_read_as_the_squad_file(
    read: Any, dev: list[dict[str, Any]], delimiter: str, start: str, told: int
) -> None:
    rows = rows_of(dev, first_only=True)
    rows = [row for row in rows if row["context"].count(row["answers"]["text"][0]) == 1]
    content = "".join(f"{json.dumps(row)}\n" for row in rows)
    expected, _ = read("d.jsonl", content)
    data, lines = read("d.csv", as_csv(rows, delimiter, start))
    assert same(data, expected)
    assert len(lines) == told and "is read as CSV" in lines[0]


def test_rows_of_a_context_are_one_paragraph_wherever_they_stand(read: Any) -> None:
    rows = [{**ROWS[n % 2], "id": str(n)} for n in range(6)]
    data, _ = read("d.json", json.dumps(rows))
    assert data.ids == ["0", "2", "4", "1", "3", "5"] and data.contexts == [HARBOUR, BAKERS]
    assert data.context_of.tolist() == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("row", "answers", "told"),
    [
        ("x,When?,In 1742 they dug.,1742,", [(3, "1742")], "were found at one place in their"),
        ("x,When?,In 1742 they dug.,1742,3.0", [(3, "1742")], ""),
        ("x,How many?,In 1901 with 1 man.,1,", [(13, "1")], "were found at one place in their"),
        ("x,When?,In 1742 and 1742.,1742,", [], "1 answers are not in the context at answer_start,"
         " or, without answer_start, at exactly one place,"),
        ("x,When?,In 1742.,1743,", [], "or, without answer_start, at exactly one place,"),
        ("x,When?,In 1742.,1742,4", [], "1 answers are not in the context at answer_start and"),
        ("x,When?,In 1742.,,", [], ""),
        ('x,When?,"In\r\n1742, ""so"".",1742,4', [(4, "1742")], ""),
    ],
)  # fmt: skip
def test_rows_of_csv(read: Any, row: str, answers: list[tuple[int, str]], told: str) -> None:
    first = f"y,When?,{HARBOUR},1742,23\n"
    data, lines = read("d.csv", f"{TABLE}{first}{row}\n")
    assert data.answers == [[(23, "1742")], answers]
    assert told in "".join(lines[1:])


def test_rows_without_ids_have_their_numbers(read: Any) -> None:
    data, _ = read(
        "d.csv", f"question,context,answer_text\nWhen?,{HARBOUR},1742\nWho?,{HARBOUR},\n"
    )
    assert data.ids == ["1", "2"] and data.answers == [[(23, "1742")], []]


class Parquet(ModuleType):
    """pyarrow.parquet for files that are JSON."""

    @staticmethod
    def read_table(path: str) -> Any:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))
        return SimpleNamespace(to_pylist=lambda: rows)


@pytest.fixture
def hub(tmp_path: Path, dev: list[dict[str, Any]]) -> Path:
    """A folder as the hub has it, its parquet files JSON: the rows in two parts of the validation
    split, and one row of the training split."""
    rows = rows_of(dev)
    parts = {"validation-00000-of-00002": rows[:9], "validation-00001-of-00002": rows[9:],
             "train-00000-of-00001": rows[:1]}  # fmt: skip
    (tmp_path / "hub" / "plain_text").mkdir(parents=True)
    (tmp_path / "hub" / "README.md").write_text("a card")
    for name, part in parts.items():
        (tmp_path / "hub" / "plain_text" / f"{name}.parquet").write_text(json.dumps(part))
    return tmp_path / "hub"


@pytest.fixture
def parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModuleType("pyarrow")
    package.parquet = Parquet("pyarrow.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", package)


def test_a_folder_of_the_hub_is_read_by_split(
    parquet: None, hub: Path, read: Any, dev: list[dict[str, Any]], capsys: Any
) -> None:
    expected, _ = read("squad.json", json.dumps({"data": dev}))
    assert same(load_squad(str(hub), "--squad_dev_data"), expected)
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "is read as parquet (plain_text/validation-00000" in told
    assert len(load_squad(str(hub), "--squad_train_data").ids) == 1
    one = hub / "plain_text" / "train-00000-of-00001.parquet"
    assert len(load_squad(str(one), "--squad_dev_data").ids) == 1


def test_real_parquet(tmp_path: Path, dev: list[dict[str, Any]], read: Any) -> None:
    arrow = pytest.importorskip("pyarrow")
    arrow_parquet = importlib.import_module("pyarrow.parquet")
    arrow_parquet.write_table(arrow.Table.from_pylist(rows_of(dev)), tmp_path / "dev.parquet")
    expected, _ = read("squad.json", json.dumps({"data": dev}))
    assert same(load_squad(str(tmp_path), FLAG), expected)


def test_folders_that_are_refused(
    parquet: None, hub: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="parquet files of several data sets"):
        load_squad(str(hub), "--eval_extra_contexts")  # which split is not said
    (hub / "other").mkdir()
    (hub / "other" / "validation.parquet").write_text("[]")
    with pytest.raises(UserError, match=r"several data sets .*other/validation\.parquet"):
        load_squad(str(hub), FLAG)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="is a folder without parquet files; the layouts"):
        load_squad(str(tmp_path / "empty"), FLAG)
    (tmp_path / "cut.parquet").write_text("{")
    with pytest.raises(UserError, match=r"cut\.parquet is not parquet that can be read"):
        load_squad(str(tmp_path / "cut.parquet"), FLAG)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"parquet, which needs `pip install pyarrow`"):
        load_squad(str(tmp_path / "cut.parquet"), FLAG)


# ------------------------------------------------------------------------------------------------
# All scripts


def arguments(script: str, train: Path, dev: Path, *flags: str) -> Any:
    """What a script's flags parse to."""
    command = [f"--model_student=m --model_teacher=m --output_dir={train.parent} "
               f"--squad_train_data={train} --squad_dev_data={dev}", *flags]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *" ".join(command).split()])
        return importlib.import_module(script).parse_arguments()


@pytest.fixture
def files(tmp_path: Path, dev: list[dict[str, Any]]) -> dict[str, Path]:
    """Data files of several kinds, by name."""
    unanswered = [{**row, "answers": {"text": [], "answer_start": []}} for row in rows_of(dev)]
    mixed = [*rows_of(dev)[:5], *unanswered[5:9]]
    contents = {
        "lines": "".join(f"{json.dumps(row)}\n" for row in rows_of(dev)),
        "none": json.dumps(unanswered),
        "keyless": json.dumps([{k: row[k] for k in row if k != "answers"} for row in unanswered]),
        "mixed": json.dumps(mixed),
    }
    for name, content in contents.items():
        (tmp_path / f"{name}.json").write_text(content)
    return {name: tmp_path / f"{name}.json" for name in contents}


@pytest.mark.parametrize(
    ("script", "task"),
    [("train_qa", QaTask), ("train_qcemb", EmbeddingTask),
     ("pack_and_distill", QaTask), ("pack_and_distill", EmbeddingTask)],
)  # fmt: skip
@pytest.mark.parametrize(
    ("train", "dev_file", "said"),
    [
        ("lines", "lines", ""),
        ("lines", "none", "no question of * has an answer, so there is nothing to evaluate on"),
        ("lines", "keyless", "no question of * has an answer, so there is nothing to evaluate on"),
    ],
)
def test_all_scripts_read_all_layouts_and_refuse_dev_data_without_answers(
    files: dict[str, Path], script: str, task: Any, train: str, dev_file: str, said: str
) -> None:
    args = arguments(script, files[train], files[dev_file])
    if said:
        with pytest.raises(UserError) as error:
            task(args)
        assert said.replace("*", str(files[dev_file])) in str(error.value)
    else:
        assert len(task(args).dev_data.ids) > 30


def test_training_data_with_unanswerable_questions_and_dev_data_without(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    QaTask(arguments("train_qa", files["mixed"], files["lines"]))
    assert "no threshold can be fitted" in capsys.readouterr().err
    QaTask(arguments("train_qa", files["mixed"], files["mixed"]))
    QaTask(arguments("train_qa", files["lines"], files["mixed"]))
    assert "no threshold" not in capsys.readouterr().err
    task = QaTask(arguments("train_qa", files["none"], files["lines"]))
    with pytest.raises(UserError, match=r"no question of .* has an answer, so there is nothing"):
        task.fine_tuning(SimpleNamespace(), None, None)


def test_an_evaluation_script_is_given_squad_articles(
    files: dict[str, Path], tmp_path: Path, dev: list[dict[str, Any]]
) -> None:
    script = tmp_path / "evaluate.py"
    script.write_text(
        "def evaluate(dataset, predictions):\n"
        "    qas = [qa for a in dataset for p in a['paragraphs'] for qa in p['qas']]\n"
        "    gold = [answer['text'] for qa in qas for answer in qa['answers']]\n"
        "    return {'f1': len(gold), 'exact_match': len(predictions)}\n"
    )
    args = arguments("train_qa", files["lines"], files["lines"], f"--squad_eval_script={script}")
    task = QaTask(args)
    gold = sum(len(qa["answers"]) for a in dev for p in a["paragraphs"] for qa in p["qas"])
    figures = task.scorer(task.dev_data, {"a": "b"}, {})
    assert figures == {"f1": gold, "exact_match": 1}


def test_what_a_reader_needs_is_written_beside_the_model(
    files: dict[str, Path], tiny_bert: Path, tmp_path: Path
) -> None:
    """Special tokens by the ids that training uses, whatever their names are."""
    names = {"cls_token": "<s>", "sep_token": "</s>", "pad_token": "<pad>"}
    (tmp_path / "vocab.txt").write_text("[UNK]\na\nb\n<pad>\n<s>\n</s>\n[MASK]\n")
    tokenizer = BertTokenizerFast.from_pretrained(tmp_path, **names)
    flags = "--max_seq_length_q=24 --max_seq_length_c=160 --max_answer_length=77 --doc_stride=50"
    ids = {"cls": 4, "sep": 5, "pad": 3}
    lengths = {"max_query_length": 24, "max_seq_length": 160, "doc_stride": 50,
               "max_answer_length": 77}  # fmt: skip
    for figures, threshold in (({"f1": 3.0, "f1_threshold": 1.5}, 1.5), ({"f1": 3.0}, None)):
        for script in ("train_qa", "pack_and_distill"):
            task = QaTask(arguments(script, files["lines"], files["lines"], flags))
            task.evaluation = SimpleNamespace(temperature=lambda: 1.25)
            task.write_reader(tokenizer, figures)
            found = json.loads((tmp_path / "reader.json").read_text())
            learned = {"null_threshold": threshold, "temperature": 1.25}
            assert found == {**lengths, **learned, "special_ids": ids}
    embedding = EmbeddingTask(arguments("train_qcemb", files["lines"], files["lines"], flags))
    embedding.write_reader(tokenizer, {"mrr": 3.0})
    found = json.loads((tmp_path / "reader.json").read_text())
    assert found == {"max_seq_length_q": 24, "max_seq_length_c": 160, "special_ids": ids}


@pytest.mark.parametrize(
    ("value", "path"),
    [("~/x.json", "/home/me/x.json"), ("~", "/home/me"), ("a~/x", "a~/x"), ("./~/x", "./~/x")],
)
@pytest.mark.parametrize("flag", ["--squad_train_data", "--output_dir"])
def test_the_home_folder(monkeypatch: pytest.MonkeyPatch, flag: str, value: str, path: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    parser = ArgumentParser(GROUPS)
    add_data_arguments(parser, 64)
    values = {"--squad_train_data": "t", "--squad_dev_data": "d", "--output_dir": "o", flag: value}
    args = parser.parse_args([f"{name}={each}" for name, each in values.items()])
    assert getattr(args, flag[2:]) == path
    parser.add_argument("--question", metavar="TEXT")
    every = [f"{name}={each}" for name, each in values.items()]
    assert parser.parse_args([*every, f"--question={value}"]).question == value


# ------------------------------------------------------------------------------------------------
# An answer is the text's own words, to the last mark


def splitting_tokenizer(text: str) -> Tokenizer:
    """BERT's tokenizer with a vocabulary of the text's characters: each is a token."""
    normalizer = normalizers.BertNormalizer()
    pieces = sorted(set(normalizer.normalize_str(text)) - {" "})
    names = ["[UNK]", *pieces, *(f"##{piece}" for piece in pieces)]
    vocabulary = {name: i for i, name in enumerate(dict.fromkeys(names))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizers.BertPreTokenizer()
    return tokenizer


def data_of(context: str, *spans: tuple[int, str]) -> SquadData:
    return SquadData("d", [], [context], ["q"], ["?"], np.zeros(1, np.int32), [list(spans)],
                     np.ones(1, bool), False, "")  # fmt: skip


def learnt_and_predicted(context: str, start: int, text: str) -> str:
    """What is predicted by a model that has learnt an answer: its target, back as text."""
    data = data_of(context, (start, text))
    contexts = squad_utils.tokenize(splitting_tokenizer(context), data.contexts, True, "")
    questions = squad_utils.tokenize(splitting_tokenizer("?"), ["?"], False, "")
    windows = squad_utils.cut_windows(
        data, (contexts, questions), SpecialIds(0, 0, 0), 400, 128, for_training=True
    )
    first, last = squad_utils.targets(windows, np.random.default_rng(0))[0]
    start_logits, end_logits = np.zeros((1, 400)), np.zeros((1, 400))
    start_logits[0, first] = end_logits[0, last] = 20
    answers = squad_utils.Answers(data, windows, 400)
    answers.add(np.array([0]), start_logits, end_logits)
    return answers.texts()["q"]


@pytest.mark.parametrize(
    ("context", "text"),
    [
        ("कु", "कु"),  # a vowel sign of combining class 0
        ("में", "में"),
        ("ที่", "ที่"),
        ("❤️", "❤️"),  # with a variation selector
        ("I ❤️ it", "❤️"),
        ("the cafe\u0301 x", "cafe\u0301"),
        ("का कि x", "कि"),
        ("שָׁלוֹם x", "שָׁלוֹם"),
        ("مُحَمَّد x", "مُحَمَّد"),
        ("Việ\u0323\u0302t", "Việ\u0323\u0302t"),
        ("a\u200db\u200d x", "a\u200db\u200d"),  # zero-width joiners
        ("👩\u200d👧\u200d x", "👩\u200d👧\u200d"),
        ("co\u00adop\u00ad x", "co\u00adop\u00ad"),  # soft hyphens
        ("a\u200b x", "a\u200b"),
        ("a\x0b x", "a\x0b"),  # a control that other rules call white space
        ("a\x00\x07\x1f", "a\x00\x07\x1f"),
        ("\u0935\u093f\u0915\u094d\u200d x", "\u0935\u093f\u0915\u094d\u200d"),
        ("한\u200d x", "한\u200d"),  # several tokens of one character
        ("x\ufffd y", "x\ufffd"),
        ("1\u20e3 y", "1\u20e3"),  # a keycap: an enclosing mark, which the tokenizer keeps
    ],
)
def test_marks_at_the_end_of_an_answer(context: str, text: str) -> None:
    assert learnt_and_predicted(context, context.index(text), text) == text


@pytest.mark.parametrize(
    ("context", "start", "text", "predicted"),
    [
        ("कु x", 0, "क", "कु"),  # a gold answer that ends before the mark
        ("कु x", 1, "ु", "कु"),  # or is the mark alone
        ("a\u0301b", 1, "\u0301b", "a\u0301b"),
        ("a \u0301 b", 0, "a", "a"),  # a mark behind a space is no letter's
        ("\ufeffab c", 0, "\ufeffab", "ab"),  # nothing stands before it
        ("ab\u200b\n\u200bcd", 0, "ab", "ab\u200b"),
    ],
)
def test_marks_belong_to_the_character_before(
    context: str, start: int, text: str, predicted: str
) -> None:
    assert learnt_and_predicted(context, start, text) == predicted


def test_an_answer_of_which_nothing_is_left_is_told_and_not_learnt(
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = data_of("\u200b ab", (0, "\u200b"))
    contexts = squad_utils.tokenize(splitting_tokenizer("ab"), data.contexts, True, "")
    windows = squad_utils.cut_windows(
        data, (contexts, contexts), SpecialIds(0, 0, 0), 40, 12, for_training=True
    )
    assert len(windows) == 0
    assert "1 answers give no tokens" in capsys.readouterr().err


SCRIPTS = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x52F),
           (0x590, 0x6FF), (0x900, 0xDFF), (0xE00, 0xEFF), (0xF00, 0xFFF), (0x1000, 0x109F),
           (0x1100, 0x11FF), (0x1780, 0x17FF), (0x1AB0, 0x1AFF), (0x2000, 0x206F),
           (0x20D0, 0x20FF), (0x3040, 0x30FF), (0x4E00, 0x4EFF), (0xAC00, 0xACFF),
           (0xFE00, 0xFE0F), (0x1F1E6, 0x1F64F), (0xE0100, 0xE0110)]  # fmt: skip
CHARACTERS = st.one_of(
    *(st.characters(min_codepoint=low, max_codepoint=high) for low, high in SCRIPTS),
    st.characters(exclude_categories=["Cs"]),
    st.sampled_from("\t\n\r\x0b\x00\u200b\u200c\u200d\ufeff\u0301\u094d\ufe0f ab"),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(text=st.text(CHARACTERS, min_size=1, max_size=24), seed=st.integers(0, 99))
def test_no_dropped_character_follows_an_answer(text: str, seed: int) -> None:
    """Of random texts of all scripts, the answer of tokens i..j; dropped is by the normaliser's
    own word. And it begins where its first token does."""
    tokenizer = splitting_tokenizer(text)
    theirs = tokenizer.encode(text, add_special_tokens=False).offsets
    offsets = squad_utils.tokenize(tokenizer, [text], True, "").offsets_of(0)
    if not len(offsets):
        return
    i, j = sorted(np.random.default_rng(seed).integers(0, len(offsets), 2))
    begin, end = int(offsets[i, 0]), int(offsets[j, 1])
    assert begin == theirs[i][0] and end >= theirs[j][1]
    following = text[end : end + 1]
    assert not following or tokenizer.normalizer.normalize_str(following)
    assert not following or unicodedata.category(following) not in ("Mn", "Me")
    added = text[theirs[j][1] : end]
    assert all(
        not tokenizer.normalizer.normalize_str(c) or unicodedata.category(c) in ("Mn", "Me")
        for c in added
    )


# ------------------------------------------------------------------------------------------------
# Long answers


@pytest.mark.parametrize(
    ("train", "dev_lengths", "longest", "said"),
    [
        ([3, 30], [30], 30, ""),
        ([3, 31], [30], 30, "1 of 2 training answers and 0 of 1 dev answers have over"
         " --max_answer_length=30 tokens and are never found; 31 covers 99% of all"),
        ([72] * 40, [72] * 40, 30, "40 of 40 training answers and 40 of 40 dev answers"),
        ([5] * 990 + [100] * 5, [40] * 5, 30, "5 of 995 training answers and 5 of 5 dev answers"
         " have over --max_answer_length=30 tokens and are never found; 5 covers 99% of all"),
        ([5] * 989 + [100] * 5, [40] * 6, 30, "40 covers 99% of all"),
        ([72] * 40, [72] * 40, 72, ""),
        ([], [90], 30, "0 of 0 training answers and 1 of 1 dev answers"),
        ([], [101], 30, "101 covers 99% of all, but --max_seq_length_c=103 is too short for that"),
        ([], [100], 30, "100 covers 99% of all\n"),
        ([], [], 30, ""),
    ],
)  # fmt: skip
def test_long_answers_are_counted(
    capsys: pytest.CaptureFixture[str],
    train: list[int], dev_lengths: list[int], longest: int, said: str,
) -> None:  # fmt: skip
    def windows(lengths: list[int]) -> Any:
        spans = np.array([(7, 7 + length - 1) for length in lengths], np.int32).reshape(-1, 2)
        return SimpleNamespace(answer_tokens=spans)

    files = {"training": windows(train), "dev": windows(dev_lengths)}
    warn_of_long_answers(files, longest, 103)
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == bool(said)


@pytest.mark.parametrize(("longest", "found"), [(30, 30), (72, 72), (400, 72), (10**6, 72)])
def test_long_answers_are_found(longest: int, found: int) -> None:
    start, end = np.zeros((1, 200)), np.zeros((1, 200))
    start[0, 10], end[0, 81] = 20, 20
    end[0, 39] = 10
    first, last, *_ = squad_utils.best_spans(start, end, np.array([200]), np.array([5]), longest)
    assert last[0] - first[0] + 1 == found


# ------------------------------------------------------------------------------------------------
# Embeddings


@pytest.mark.parametrize(
    ("phrase", "text", "stands"),
    [
        ("1", "in 1901", False),
        ("1", "in 1901, 1 man", True),
        ("art", "the party", False),
        ("art", "art.", True),
        ("new york", "in new york's north", True),
        ("new york", "renew yorkshire", False),
        ("$5", "for us$5 each", True),
        ("c++", "in c++11", True),
        ("क", "कु", False),  # a letter without its vowel sign
        ("東京", "東京都は", True),  # scripts without spaces
        ("서울", "서울은", True),
        ("ไทย", "ภาษาไทยคือ", True),
        ("münchen", "münchener", False),
    ],
)
def test_whole_words(phrase: str, text: str, stands: bool) -> None:
    assert bool(list(squad_utils.whole_words(phrase, text))) is stands


@pytest.fixture(scope="module")
def tokenizer(tiny_bert: Path) -> BertTokenizerFast:
    return BertTokenizerFast.from_pretrained(tiny_bert)


LONG = "a " * 50 + "z"  # 51 tokens
SHORT = [("b c", [answer("c", 2)])]


@pytest.mark.parametrize(
    ("contexts", "said"),
    [
        ([(LONG[60:], [answer("z", 40)]), *SHORT], ""),
        ([(LONG, [answer("z", 100)]), *SHORT], "1 of 2 contexts are cut at"
         " --max_seq_length_c=40 tokens; 1 of them hold an answer in the part that is cut off"),
        ([(LONG, [answer("a", 0)]), *SHORT], "0 of them hold an answer"),
        ([(LONG, [answer("a", 74)]), *SHORT], "0 of them hold an answer"),  # token 37
        ([(LONG, [answer("a", 76)]), *SHORT], "1 of them hold an answer"),
        ([(LONG, [answer("a", 0), answer("z", 100)]), *SHORT], "1 of them hold an answer"),
        ([(LONG, [answer("a", 0)]), (f" {LONG}\n", [answer("z", 101)]), *SHORT],
         "1 of 2 contexts are cut at --max_seq_length_c=40 tokens; 1 of them hold an answer"),
    ],
)  # fmt: skip
def test_contexts_that_are_cut(
    read: Any, tokenizer: BertTokenizerFast, capsys: pytest.CaptureFixture[str],
    contexts: list[tuple[str, list[dict[str, Any]]]], said: str,
) -> None:  # fmt: skip
    content = [(text, [question(f"{n}", each)]) for n, (text, each) in enumerate(contexts)]
    data, _ = read("d.json", squad(*content))
    pairs = make_pairs(data, tokenizer, 12, 40)
    told = capsys.readouterr().err
    assert said in told and told.count("\n") == bool(said)
    assert pairs.contexts.total_lengths.max() <= 40


def test_contexts_that_differ_in_white_space_are_one(
    read: Any, tokenizer: BertTokenizerFast
) -> None:
    spaced = HARBOUR.replace(" ", "\n ", 1)
    year = answer("1742", spaced.index("1742"))
    content = [(HARBOUR, [question("a", [YEAR])]), (BAKERS, [question("b", [DAY], "Which day?")]),
               (spaced, [question("c", [year], "Since when?")])]  # fmt: skip
    data, _ = read("d.json", squad(*content))
    pairs = make_pairs(data, tokenizer, 12, 40)
    assert pairs.contexts.strings == [HARBOUR, BAKERS] and pairs.context.tolist() == [0, 1, 0]


class Constant(torch.nn.Module):
    """A model whose vectors say nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.output_map = torch.nn.Linear(4, 4)

    def forward(self, input_ids: torch.Tensor, **_: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(embedding=self.output_map(torch.ones(len(input_ids), 4)))


@pytest.mark.parametrize(
    ("more", "negative", "counts", "said"),
    [
        ([BAKERS], 3, 1.0, "it gets another one at random"),
        ([], None, 0.0, "so does every other context of its file, so the triplet leaves it out"),
    ],
    ids=["another context is there", "no other is"],
)
def test_an_answer_that_stands_in_every_context_mined(
    tokenizer: BertTokenizerFast,
    read: Any,
    capsys: pytest.CaptureFixture[str],
    accelerator: Any,
    more: list[str],
    negative: int | None,
    counts: float,
    said: str,
) -> None:
    """An article about one firm, whose name is an answer; the loss goes on and says so once."""
    firm = [f"Velmora{text}" for text in (" digs.", " bakes, and 1901 is not 1.", " sails.")]
    asked = [(text, [question(str(n), [answer("Velmora", 0)], f"Who {n}?")])
             for n, text in enumerate(firm)]  # fmt: skip
    data, _ = read("d.json", squad(*asked, *[(text, []) for text in more]))
    pairs = make_pairs(data, tokenizer, 12, 40)
    running = SimpleNamespace(accelerator=accelerator)
    model, chosen = Constant(), np.arange(3)
    for cfg in (LossCfg(), LossCfg(2, "none", 1)):
        mining = HardNegatives(running, pairs, Mining(1, 1, 1, 1.0), 7, cfg)
        # Of what is drawn, some steps have the other context and some have not.
        for step in range(4):
            mining(model, step, chosen)
            for pair in range(3):
                own = int(pairs.context[pair])
                assert mining.negative_of[pair] == (own if negative is None else negative)
        batch = PairBatches(pairs, mining, 3, 0).batch(0, chosen)
        assert batch["has_negative"].tolist() == [counts] * 3
        assert capsys.readouterr().err.count(said) == 1


def test_a_number_within_another_is_no_answer(tokenizer: BertTokenizerFast, read: Any) -> None:
    one, other = "It had 1 mast.", "It sank in 1901."
    content = [
        (one, [question("a", [answer("1", 7)], "How many?")]),
        (other, [question("b", [answer("1901", 11)])]),
    ]
    data, _ = read("d.json", squad(*content))
    pairs: Pairs = make_pairs(data, tokenizer, 12, 40)
    assert not pairs.answered_by(0, 1) and pairs.answered_by(0, 0)
    assert replace(pairs, answers=[("1901",), ("1901",)]).answered_by(0, 1)
