"""Data files of several layouts, read as the articles of a SQuAD file. No torch is needed.

    read    SQuAD JSON                                      -> its articles, unchanged
            rows of one question each, in JSON, JSON lines,
            CSV or parquet                                  -> articles, by title and context

Rows have the columns of Hugging Face `datasets`: question, context, answers, and optionally id,
title and is_impossible. CSV has answer_text and answer_start in place of answers.
`squad_utils.load_squad` checks the content of each question.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from cli import UserError, in_one_line, read_text

LAYOUTS = (
    "the layouts that are read are SQuAD JSON; rows with question, context and answers in JSON or"
    " JSON lines; CSV with the columns question, context and answer_text; and a folder with"
    " parquet files of such rows"
)
SPLITS = {  # flag -> names of its split in file names, the preferred ones first
    "--squad_train_data": (("train",),),
    "--squad_dev_data": (("validation", "valid", "val", "dev"), ("test",)),
}
LINES_SUFFIXES = (".jsonl", ".ndjson")
CSV_SUFFIXES = (".csv", ".tsv")
OF_A_QUESTION = ("id", "question", "answers", "is_impossible")  # a row's keys that SQuAD has too
KINDS = {list: "a list", str: "a string", int: "a whole number"}
TRUTHS = {"true": True, "1": True, "false": False, "0": False, "": None}  # of CSV cells


@dataclass(frozen=True)
class DataFile:
    """A data file as SQuAD articles, with records that are not checked yet.

    Attributes:
        root: the content of a SQuAD file: {"data": articles}, and its version if it has one.
        places: the place of each question in the file, in the order of the articles; None if its
            keys are its place.
        layout: the layout of the file; "" for a SQuAD file.
        sha256: the hash of its content.
    """

    path: str
    flag: str
    root: Any
    places: list[str] | None
    layout: str
    sha256: str

    def get(self, parent: Any, where: str, key: str, kind: type) -> Any:
        """The value of a key in a record of this file.

        Args:
            where: the place of the record; "" for the top.

        Raises:
            UserError: it is missing or not of its kind.
        """
        if not isinstance(parent, dict):
            raise self.refused(f"{where or 'the top'} must be an object", not where)
        if key not in parent:
            raise self.refused(f"{within(where, key)} is missing", key in ("data", "paragraphs"))
        value = parent[key]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.refused(f"{within(where, key)} must be {KINDS[kind]}", not where)
        if isinstance(value, str) and not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{self.flag}: {self.path}: {within(where, key)} has half of a surrogate pair,"
                    " which is not text"
                ) from None
        return value

    def refused(self, why: str, is_no_layout: bool = False) -> UserError:
        """The error that a record is wrong, or that the file has none of the layouts."""
        kind = "" if self.layout else " is not SQuAD"
        return UserError(
            f"{self.flag}: {self.path}{kind}: {why}{f'; {LAYOUTS}' if is_no_layout else ''}"
        )


def within(where: str, key: str) -> str:
    """The name of a key of the record at `where`: "data[0].paragraphs", "line 3: question"."""
    return f"{where}{' ' if where.endswith(':') else '.' if where else ''}{key}"


def read(path: str, flag: str) -> DataFile:
    """Read a data file of any layout.

    Args:
        flag: the command-line flag that gave it, for error messages; in a folder it also decides
            which split is read.

    Raises:
        UserError: the file cannot be read, or has none of the layouts.
    """
    if os.path.isdir(path) or path.endswith(".parquet"):
        files = _parquet_files(path, flag) if os.path.isdir(path) else [path]
        digest = hashlib.sha256()
        for each in files:
            try:
                with open(each, "rb") as file:
                    digest.update(file.read())
            except OSError as error:
                raise UserError(f"{flag}: cannot read {each}: {error.strerror}") from None
        rows = [(f"row {n}:", row) for n, row in enumerate(_parquet_rows(files, flag), 1)]
        names = ", ".join(os.path.relpath(each, path) for each in files if each != path)
        layout = f"parquet ({names})" if names else "parquet"
        return _from_rows(path, flag, rows, layout, "", digest.hexdigest())
    text = read_text(path, flag)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    first, _, rest = text.lstrip().partition("\n")
    columns = {name.strip(' "\r').lower() for name in re.split("[,;\t]", first[:1000])}
    if path.lower().endswith(CSV_SUFFIXES) or {"question", "context"} <= columns:
        return _from_rows(path, flag, _csv_rows(text, path, flag), "CSV", "", sha256)
    if path.lower().endswith(LINES_SUFFIXES) or (rest.strip() and _is_object(first)):
        return _from_rows(path, flag, _json_lines(text, path, flag), "JSON lines", "", sha256)
    root = _parse(text, path, flag)
    data, version, at = root, "", ""
    if isinstance(root, dict):
        data, version, at = root.get("data"), str(root.get("version", "")), "data"
        if _is_row(root):
            data, at = [root], ""
    if isinstance(data, list) and data and _is_row(data[0]):
        rows = [(f"{at}[{n}]", row) for n, row in enumerate(data)]
        return _from_rows(path, flag, rows, "JSON of rows", version, sha256)
    return DataFile(path, flag, root, None, "", sha256)


def _is_row(record: Any) -> bool:
    return isinstance(record, dict) and {"question", "context"} <= record.keys()


def _is_object(line: str) -> bool:
    """Whether a line is a JSON object by itself."""
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse(text: str, path: str, flag: str, line: int | None = None) -> Any:
    """The value of a JSON text; `line` is its number in the file if it is one line of many."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{flag}: {path} line {line or error.lineno} column {error.colno} is not JSON:"
            f" {error.msg}{'' if line else f'; {LAYOUTS}'}"
        ) from None
    except (ValueError, RecursionError) as error:  # a number too long, lists too deep
        raise UserError(f"{flag}: {path} is not JSON that can be read: {error}") from None


def _json_lines(text: str, path: str, flag: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"line {number}:", _parse(line, path, flag, number)


def _csv_rows(text: str, path: str, flag: str) -> Iterator[tuple[str, Any]]:
    """The rows of a CSV file whose columns are separated by commas, semicolons or tabs."""
    csv.field_size_limit(2**31 - 1)  # contexts may be longer than the library's 128 KB
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [name.strip().lower() for name in next(reader, [])]
        missing = [n for n in ("question", "context", "answer_text") if n not in columns]
        if missing:
            raise UserError(
                f"{flag}: {path} is CSV whose first line lacks the column {missing[0]}; {LAYOUTS}"
            )
        line = reader.line_num + 1
        for cells in reader:
            place = f"line {line}:"
            if cells and len(cells) != len(columns):
                raise UserError(
                    f"{flag}: {path}: {place} {len(cells)} cells, of {len(columns)} columns"
                )
            if cells:  # an empty line has none
                row = dict(zip(columns, cells, strict=True))
                yield place, _csv_values(row, f"{flag}: {path}: {place}")
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{flag}: {path} line {reader.line_num} is not CSV: {error}") from None


def _csv_values(row: dict[str, str], where: str) -> dict[str, Any]:
    """A row with its numbers and booleans converted, without those that are empty."""
    values: dict[str, Any] = dict(row)
    start, impossible = row.get("answer_start", "").strip(), row.get("is_impossible", "")
    if start and not re.fullmatch(r"-?[0-9]{1,9}(\.0+)?", start):
        raise UserError(f"{where} answer_start must be a whole number, not {start[:20]!r}")
    values |= {"answer_start": int(float(start)) if start else None}
    if impossible.strip().lower() not in TRUTHS:
        raise UserError(f"{where} is_impossible must be true or false, not {impossible[:20]!r}")
    values |= {"is_impossible": TRUTHS[impossible.strip().lower()]}
    return {name: value for name, value in values.items() if value is not None}


def _parquet_files(folder: str, flag: str) -> list[str]:
    """The parquet files in a folder, as data sets on the hub have them; of several splits, the
    flag's.

    Raises:
        UserError: there are none, or the split's files lie in several folders.
    """
    found = sorted(
        os.path.join(where, name)
        for where, _, names in os.walk(folder)
        for name in names
        if name.endswith(".parquet")
    )
    if not found:
        raise UserError(f"{flag}: {folder} is a folder without parquet files; {LAYOUTS}")

    def is_of(path: str, names: Iterable[str]) -> bool:
        return not set(names).isdisjoint(re.findall("[a-z]+", os.path.relpath(path, folder)))

    every = [names for choices in SPLITS.values() for names in choices]
    splits = {names for names in every for path in found if is_of(path, names)}
    chosen = found
    if len(splits) > 1:
        wanted = [names for names in SPLITS.get(flag, ()) if names in splits]
        chosen = [path for path in found if wanted and is_of(path, wanted[0])]
    if not chosen or len({os.path.dirname(path) for path in chosen}) > 1:
        several = ", ".join(os.path.relpath(path, folder) for path in (chosen or found)[:4])
        raise UserError(
            f"{flag}: {folder} has parquet files of several data sets ({several}); name one of"
            " them, or its folder"
        )
    return chosen


def _parquet_rows(files: list[str], flag: str) -> Iterator[Any]:
    try:
        from pyarrow import parquet  # need not be installed
    except ImportError:
        raise UserError(
            f"{flag}: {files[0]} is parquet, which needs `pip install pyarrow` (datasets brings it)"
        ) from None
    for path in files:
        with in_one_line(f"{flag}: {path} is not parquet that can be read"):
            yield from parquet.read_table(path).to_pylist()


def _from_rows(
    path: str,
    flag: str,
    rows: Iterable[tuple[str, Any]],
    layout: str,
    version: str,
    sha256: str,
) -> DataFile:
    """Rows, each with its place, as articles in the order of their first titles and contexts.

    If no row has an id, the id of each question is the number of its row.
    """
    rows = list(rows)
    with_ids = any(isinstance(row, dict) and "id" in row for _, row in rows)
    places: list[str] = []
    file = DataFile(path, flag, {"version": version}, places, layout, sha256)
    articles: dict[str, dict[str, list[tuple[str, Any]]]] = {}
    for number, (place, row) in enumerate(rows, 1):
        context = file.get(row, place, "context", str)
        question = {key: row[key] for key in OF_A_QUESTION if key in row}
        if not with_ids:
            question["id"] = str(number)
        elif type(row.get("id")) is int:  # which True is not
            question["id"] = str(row["id"])
        if "answers" not in row:
            start = row.get("answer_start")
            answer = {"text": row.get("answer_text") or ""}
            question["answers"] = [answer if start is None else {**answer, "answer_start": start}]
        title = row["title"] if isinstance(row.get("title"), str) else ""
        articles.setdefault(title, {}).setdefault(context, []).append((place, question))
    data = file.root["data"] = []
    for title, by_context in articles.items():
        paragraphs = []
        for context, asked in by_context.items():
            places += [place for place, _ in asked]
            paragraphs.append({"context": context, "qas": [question for _, question in asked]})
        data.append({"title": title, "paragraphs": paragraphs})
    return file
