"""reader.json: the settings that running a model takes, as training had them. No torch is needed.

Folders without it are of earlier versions: metrics.json has the settings there, and
tokenizer_config.json the names of the special tokens.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from cli import UserError, read_text, tell
from squad_utils import MAX_ANSWER_LENGTH, SpecialIds

FILE, EARLIER = "reader.json", "metrics.json"
TOKENS = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]"}  # BERT's names, where none are told
REMEDY = "copy the folder again from where the model was trained"


@dataclass(frozen=True)
class Kind:
    """What a model is for.

    Attributes:
        name, script: as messages call it, and what makes its folders.
        outputs: the names of its file's outputs.
        lengths: keys of numbers of tokens in reader.json -> the arguments in metrics.json.
        has_threshold: whether reader.json has `null_threshold`.
    """

    name: str
    script: str
    outputs: tuple[str, ...]
    lengths: dict[str, str]
    has_threshold: bool


QA = Kind(
    "a QA model",
    "train_qa.py",
    ("output_s", "output_e"),
    {
        "max_query_length": "max_seq_length_q",
        "max_seq_length": "max_seq_length_c",
        "doc_stride": "doc_stride",
        "max_answer_length": "max_answer_length",
    },
    True,
)
EMBEDDING = Kind(
    "an embedding model",
    "train_qcemb.py",
    ("embedding",),
    {name: name for name in ("max_seq_length_q", "max_seq_length_c")},
    False,
)


@dataclass(frozen=True)
class Settings:
    """The settings of a model.

    Attributes:
        lengths: tokens, by the keys of `Kind.lengths`.
        special: ids of the tokens that stand around texts.
        null_threshold: of the no-answer score, over which there is no answer; None where every
            question has one.
    """

    lengths: dict[str, int]
    special: SpecialIds
    null_threshold: float | None


def read_settings(
    folder: str, flag: str, kind: Kind, tokenizer: Tokenizer, declared: int
) -> Settings:
    """The settings in a model's folder.

    Args:
        declared: tokens of a row that model.onnx declares.

    Raises:
        UserError: the file is missing or damaged, or lacks a setting; names file and remedy.
    """
    path = os.path.join(folder, FILE)
    called = {key: key for key in kind.lengths}  # as the file calls them
    if os.path.exists(path):
        record = _read(path, flag)
    else:
        path = os.path.join(folder, EARLIER)
        record = _of_before(folder, flag, kind, tokenizer, declared)
        called = {key: f"arguments.{name}" for key, name in kind.lengths.items()}
        tell(f"{flag} {folder} has no {FILE}; its settings are read from {EARLIER}")

    def check(right: bool, name: str) -> None:
        if not right:
            state = "has a wrong value of" if name in record else "lacks"
            raise UserError(f"{flag}: {path} {state} {name}; {REMEDY}")

    def whole(value: object, low: int, high: float) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    for key in kind.lengths:
        check(whole(record.get(key), 1, math.inf), called[key])
    ids = record.get("special_ids")
    last = tokenizer.get_vocab_size() - 1
    if not isinstance(ids, dict) or not all(whole(ids.get(each), 0, last) for each in TOKENS):
        check(False, "special_ids")
    threshold = record.get("null_threshold")
    if kind.has_threshold:
        number = isinstance(threshold, int | float) and threshold == threshold
        check("null_threshold" in record and (threshold is None or number), "null_threshold")
    return Settings(
        {key: record[key] for key in kind.lengths},
        SpecialIds(**{token: record["special_ids"][token] for token in TOKENS}),
        threshold,
    )


def _read(path: str, flag: str) -> dict[str, Any]:
    """The object in a JSON file."""
    try:
        record = json.loads(read_text(path, flag))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{flag}: {path} is damaged ({error}); {REMEDY}") from None
    if not isinstance(record, dict):
        raise UserError(f"{flag}: {path} is damaged (it is no JSON object); {REMEDY}")
    return record


def _of_before(
    folder: str, flag: str, kind: Kind, tokenizer: Tokenizer, declared: int
) -> dict[str, Any]:
    """What reader.json would hold, from the files of a folder that has none."""
    metrics = _read(os.path.join(folder, EARLIER), flag)
    arguments = {"max_answer_length": MAX_ANSWER_LENGTH, "max_seq_length_c": declared}
    if isinstance(metrics.get("arguments"), dict):
        arguments |= metrics["arguments"]
    names: dict[str, Any] = {}
    path = os.path.join(folder, "tokenizer_config.json")
    with contextlib.suppress(OSError, ValueError, TypeError), open(path, encoding="utf-8") as file:
        names = dict(json.load(file))
    ids = {}
    for token, usual in TOKENS.items():
        name = names.get(f"{token}_token", usual)
        name = name.get("content") if isinstance(name, dict) else name
        ids[token] = tokenizer.token_to_id(str(name))
        if ids[token] is None:
            raise UserError(f"{flag}: the tokenizer of {folder} lacks {name}; {REMEDY}")
    return {
        **{key: arguments.get(of_before) for key, of_before in kind.lengths.items()},
        "special_ids": ids,
        "null_threshold": metrics.get("f1_threshold"),
    }
