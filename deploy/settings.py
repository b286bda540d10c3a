"""reader.json: the settings that a model needs to run, as in its training. No torch is needed.

Folders of earlier versions lack it. There the settings come from metrics.json, and the names of
the special tokens from tokenizer_config.json.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from cli import UserError, read_object, tell
from squad_utils import MAX_ANSWER_LENGTH, SpecialIds

FILE, EARLIER = "reader.json", "metrics.json"
TOKENS = {"cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]"}  # BERT's names, the default
REMEDY = "copy the folder again from where the model was trained"


@dataclass(frozen=True)
class Kind:
    """A kind of model.

    Attributes:
        name: its name in messages.
        script: the script that makes its folders.
        outputs: the names of its file's outputs.
        lengths: the keys of reader.json that are numbers of tokens -> the arguments in
            metrics.json.
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
        lengths: numbers of tokens, by the keys of `Kind.lengths`.
        special: ids of the special tokens.
        null_threshold: a no-answer score above it means that there is no answer; None if every
            question has an answer.
        temperature: of `squad_utils.span_scores`; 1 in folders without it.
    """

    lengths: dict[str, int]
    special: SpecialIds
    null_threshold: float | None
    temperature: float


def read_settings(
    folder: str, flag: str, kind: Kind, tokenizer: Tokenizer, declared: int
) -> Settings:
    """The settings in a model's folder.

    Args:
        declared: the number of tokens per row that model.onnx declares.

    Raises:
        UserError: the file is missing or damaged, or lacks a setting; names file and remedy.
    """
    path = os.path.join(folder, FILE)
    called = {key: key for key in kind.lengths}  # names in the file
    if os.path.exists(path):
        record = read_object(path, flag, f"; {REMEDY}")
    else:
        path = os.path.join(folder, EARLIER)
        record = _of_before(folder, flag, kind, tokenizer, declared)
        called = {key: f"arguments.{name}" for key, name in kind.lengths.items()}
        tell(f"{flag} {folder} has no {FILE}; its settings are read from {EARLIER}")

    def require(right: bool, name: str) -> None:
        if not right:
            state = "has a wrong value of" if name in record else "lacks"
            raise UserError(f"{flag}: {path} {state} {name}; {REMEDY}")

    def whole(value: object, low: int, high: float) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high

    for key in kind.lengths:
        require(whole(record.get(key), 1, math.inf), called[key])
    ids = record.get("special_ids")
    last = tokenizer.get_vocab_size() - 1
    known = isinstance(ids, dict) and all(whole(ids.get(each), 0, last) for each in TOKENS)
    require(known, "special_ids")
    threshold = record.get("null_threshold")
    if kind.has_threshold:
        number = isinstance(threshold, int | float) and threshold == threshold
        require("null_threshold" in record and (threshold is None or number), "null_threshold")
    temperature = record.get("temperature", 1.0)
    number = isinstance(temperature, int | float) and not isinstance(temperature, bool)
    require(number and 0 < temperature < math.inf, "temperature")
    return Settings(
        {key: record[key] for key in kind.lengths},
        SpecialIds(**{token: record["special_ids"][token] for token in TOKENS}),
        threshold,
        float(temperature),
    )


def _of_before(
    folder: str, flag: str, kind: Kind, tokenizer: Tokenizer, declared: int
) -> dict[str, Any]:
    """The content that reader.json would have, from the other files of a folder without it."""
    metrics = read_object(os.path.join(folder, EARLIER), flag, f"; {REMEDY}")
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
