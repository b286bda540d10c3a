"""Ask an exported QA model about a text of any length, or about many texts.

Runs model.onnx of a train_qa.py output folder in ONNX Runtime or OpenVINO; no torch is needed.
Tokenisation, windows and span search are those of the evaluation. With an embedding model too, it
finds the paragraphs that are nearest to a question first, and reads those; alone, it shows them.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

import squad_utils
from cli import ArgumentParser, UserError, number, read_text, run_main, warn
from deploy.runtime import PRECISIONS, RUNTIMES, Infer, Runtime, load_exported
from deploy.search import Paragraph, build_index, load_embedder
from squad_utils import SpecialIds, SquadData, Tokens

SPANS_A_WINDOW = 20  # candidates from each window ...
SPANS_KEPT = 200  # ... and from the whole text, before overlapping ones are dropped
SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)\]]*\s+(?=[^a-z])|\n+")
HIGHLIGHT, PLAIN = "\033[1;30;43m", "\033[0m"


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.group("models").add_argument
    add("--model", metavar="FOLDER",
        help="output folder of train_qa.py or pack_and_distill.py, with model.onnx; it reads the"
        " text (default: none, show the paragraphs that --model_emb finds)")  # fmt: skip
    add("--model_emb", metavar="FOLDER",
        help="the same of an embedding model; it finds the paragraphs to read (default: none, read"
        " all of one text)")  # fmt: skip
    add = parser.group("texts and questions").add_argument
    add("--context", required=True, nargs="+", metavar="FILE",
        help="UTF-8 text that holds the answers; with --model_emb several, and folders, whose .txt"
        " and .md files are taken")  # fmt: skip
    add("--top_contexts", type=number(int, 1, 1000), default=5, metavar="N",
        help="paragraphs to read for a question, with --model_emb")  # fmt: skip
    add("--question", action="append", metavar="TEXT",
        help="may be given several times (default: asked for, or the lines of the"
        " input)")  # fmt: skip
    add = parser.group("answers").add_argument
    add("--top_k", type=number(int, 1, 50), default=3, metavar="N",
        help="answers to show for a question")  # fmt: skip
    add("--json", action="store_true", help="print a line for each question, one JSON object")
    add = parser.group("the machine").add_argument
    add("--runtime", choices=RUNTIMES, default="auto",
        help="auto takes OpenVINO where it is installed and computes exactly, else ONNX"
        " Runtime")  # fmt: skip
    add("--runtime_precision", choices=PRECISIONS, default="f32",
        help="default lets OpenVINO take bf16 where the CPU has it: faster and less"
        " exact")  # fmt: skip
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------
# The model


@dataclass(frozen=True)
class QaModel:
    """An exported model with what is needed to feed it and to read its answers.

    Attributes:
        infer: from inputs to start and end logits, [1, L] each.
        length: L, the tokens of a window.
        max_seq_length_q, doc_stride: what it was trained with.
        threshold: of the no-answer score, over which there is no answer; None for a model of
            SQuAD 1.1, which has one for every question.
    """

    infer: Infer
    tokenizer: Tokenizer
    special: SpecialIds
    length: int
    max_seq_length_q: int
    doc_stride: int
    threshold: float | None


def load(folder: str, runtime: Runtime) -> QaModel:
    """Load the output folder of a QA model.

    Raises:
        UserError: as `load_exported`.
    """
    outputs = ["output_s", "output_e"]
    model = load_exported(folder, "--model", "a QA model", "train_qa.py", outputs, runtime)
    return QaModel(
        model.compile(model.length),
        model.tokenizer,
        model.special,
        model.length,
        model.arguments["max_seq_length_q"],
        model.arguments["doc_stride"],
        threshold=model.metrics.get("f1_threshold"),
    )


# ------------------------------------------------------------------------------------------------
# The answers


@dataclass(frozen=True)
class Answer:
    """An answer: `context[start:end]`, in the sentence `context[slice(*sentence)]`."""

    text: str
    probability: float
    start: int
    end: int
    sentence: tuple[int, int]


def answer(
    model: QaModel, context: str, tokens: Tokens, question: str, top_k: int
) -> tuple[list[Answer], float]:
    """The most probable answers that do not overlap, best first, and the no-answer score.

    Args:
        context: the text; its tokens are given beside it, so that they are made once.

    Returns:
        the answers, each with the probability it has in its window, and the ratio of the
        probabilities of no answer and of the best answer, in the best answer's window.
    """
    data = SquadData("", [], [context], ["question"], [question], np.zeros(1, np.int32), [[]],
                     np.zeros(1, bool), True, "")  # fmt: skip
    asked = squad_utils.tokenize(model.tokenizer, [question], False, "")
    if asked.lengths[0] > model.max_seq_length_q:
        warn(
            f"the question has {asked.lengths[0]} tokens; the model sees the first"
            f" {model.max_seq_length_q}"
        )
    windows = squad_utils.cut_windows(
        data,
        tokens,
        squad_utils.truncate(asked, model.max_seq_length_q),
        model.special,
        model.length,
        model.doc_stride,
        for_training=False,
    )
    offsets = tokens.offsets_of(0)
    # One window at a time, and few spans of each: memory does not grow with their number.
    spans: list[tuple[float, float, int, int]] = []
    for window in range(len(windows)):
        chosen = np.array([window])
        start_logits, end_logits = model.infer(
            squad_utils.make_batch(windows, chosen, pad_to=model.length)
        )
        at = windows.context_at[chosen]
        first, last, log_prob, no_answer = squad_utils.best_spans(
            start_logits, end_logits, windows.total_lengths[chosen], at, SPANS_A_WINDOW
        )
        shift = windows.first[window] - at[0]
        for i in np.flatnonzero(np.isfinite(log_prob[0])):
            begin = int(offsets[first[0, i] + shift, 0])
            end = int(offsets[last[0, i] + shift, 1])
            spans.append((float(log_prob[0, i]), float(no_answer[0]), begin, end))
        spans = heapq.nlargest(SPANS_KEPT, spans)

    best: list[Answer] = []
    for score, _, begin, end in spans:
        if len(best) < top_k and all(end <= a.start or begin >= a.end for a in best):
            sentence = sentence_around(context, begin, end)
            text = squad_utils.cut(context, begin, end)
            end = begin + len(text)
            best.append(Answer(text, math.exp(score), begin, end, sentence))
    return best, math.exp(min(spans[0][1] - spans[0][0], 700.0))


def sentence_around(text: str, start: int, end: int) -> tuple[int, int]:
    """Where the sentence (or sentences) that hold text[start:end] begin and end."""
    begin, stop = 0, len(text)
    for gap in SENTENCE_END.finditer(text):
        if gap.end() <= start:
            begin = gap.end()
        elif gap.start() >= end:
            stop = gap.start()
            break
    return begin, stop


# ------------------------------------------------------------------------------------------------
# Printing


def show(model: QaModel, context: str, found: list[Answer], no_answer: float) -> None:
    """Print answers for people: probability, answer, and the sentence with it highlighted."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if model.threshold is not None and no_answer > model.threshold:
        print("  no answer in this text; the nearest there is:")
    for rank, each in enumerate(found, 1):
        begin, stop = each.sentence
        marked = f"{HIGHLIGHT}{each.text}{PLAIN}" if colour else each.text
        sentence = context[begin : each.start] + marked + context[each.end : stop]
        print(f"  {rank}. {each.probability:6.1%}  {' '.join(each.text.split())}")
        print(f"             {' '.join(sentence.split())}")
    print(flush=True)


def as_json(model: QaModel, context: str, question: str, found: list[Answer], ratio: float) -> str:
    """The same as one line of JSON; `no_answer` only for models of SQuAD 2.0."""
    record: dict[str, Any] = {"question": question}
    if model.threshold is not None:
        record["no_answer"] = ratio > model.threshold
    record["answers"] = [
        {
            "text": each.text,
            "probability": each.probability,
            "start": each.start,
            "end": each.end,
            "sentence": context[slice(*each.sentence)],
        }
        for each in found
    ]
    return json.dumps(record, ensure_ascii=False)


def questions_from_input() -> Iterator[str]:
    """Questions from a prompt, or from the lines of a pipe, until the end or an empty line."""
    with contextlib.suppress(EOFError):
        while question := input("question> " if sys.stdin.isatty() else "").strip():
            yield question


# ------------------------------------------------------------------------------------------------
# Many texts


@dataclass(frozen=True)
class Found:
    """An answer in one of many paragraphs, with the paragraph's distance from the question."""

    answer: Answer
    paragraph: Paragraph
    distance: float
    no_answer: float


def read(
    model: QaModel, nearest: list[tuple[Paragraph, float]], question: str, top_k: int
) -> list[Found]:
    """The most probable answers in the paragraphs nearest to the question, best first."""
    found = []
    for paragraph, distance in nearest:
        tokens = squad_utils.tokenize(model.tokenizer, [paragraph.text], True, "")
        if not len(tokens.ids):
            continue
        answers, no_answer = answer(model, paragraph.text, tokens, question, top_k)
        found += [Found(each, paragraph, distance, no_answer) for each in answers]
    return sorted(found, key=lambda each: -each.answer.probability)[:top_k]


def show_found(model: QaModel, found: list[Found]) -> None:
    """Print answers of `read` for people, each with the file and line of its paragraph."""
    for rank, each in enumerate(found, 1):
        unsure = model.threshold is not None and each.no_answer > model.threshold
        begin, stop = each.answer.sentence
        note = "  (it may have no answer)" if unsure else ""
        print(
            f"  {rank}. {each.answer.probability:6.1%}  {' '.join(each.answer.text.split())}{note}"
        )
        print(f"             {' '.join(each.paragraph.text[begin:stop].split())}")
        print(f"             {each.paragraph.source}, distance {each.distance:.3f}")
    print(flush=True)


def found_as_json(model: QaModel, question: str, found: list[Found]) -> str:
    """The same as one line of JSON."""
    answers = []
    for each in found:
        record = {
            "text": each.answer.text,
            "probability": each.answer.probability,
            "start": each.answer.start,
            "end": each.answer.end,
            "sentence": each.paragraph.text[slice(*each.answer.sentence)],
            "source": each.paragraph.source,
            "paragraph": each.paragraph.text,
            "distance": each.distance,
        }
        if model.threshold is not None:
            record["no_answer"] = each.no_answer > model.threshold
        answers.append(record)
    return json.dumps({"question": question, "answers": answers}, ensure_ascii=False)


def show_paragraphs(nearest: list[tuple[Paragraph, float]]) -> None:
    """Print the paragraphs nearest to a question for people."""
    for rank, (paragraph, distance) in enumerate(nearest, 1):
        print(f"  {rank}. {paragraph.source}, distance {distance:.3f}")
        print(f"     {' '.join(paragraph.text.split())}")
    print(flush=True)


def paragraphs_as_json(question: str, nearest: list[tuple[Paragraph, float]]) -> str:
    """The same as one line of JSON."""
    paragraphs = [
        {"source": each.source, "paragraph": each.text, "distance": distance}
        for each, distance in nearest
    ]
    return json.dumps({"question": question, "paragraphs": paragraphs}, ensure_ascii=False)


# ------------------------------------------------------------------------------------------------


def ask_text(args: argparse.Namespace) -> Callable[[str], None]:
    """Answers from one text: what prints those to a question."""
    if len(args.context) > 1:
        raise UserError("--context: several files need --model_emb, which finds what to read")
    context = read_text(args.context[0], "--context")
    model = load(args.model, Runtime(args.runtime, args.runtime_precision))
    tokens = squad_utils.tokenize(model.tokenizer, [context], True, "")
    if not len(tokens.ids):
        raise UserError(f"--context: {args.context[0]} has no text")

    def ask(question: str) -> None:
        answers, no_answer = answer(model, context, tokens, question, args.top_k)
        if args.json:
            print(as_json(model, context, question, answers, no_answer), flush=True)
        else:
            show(model, context, answers, no_answer)

    return ask


def ask_texts(args: argparse.Namespace) -> Callable[[str], None]:
    """Answers from many texts, or with no --model their paragraphs: what prints those to a
    question."""
    runtime = Runtime(args.runtime, args.runtime_precision)
    embedder = load_embedder(args.model_emb, runtime)
    model = load(args.model, runtime) if args.model else None
    index = build_index(embedder, args.context)

    def ask(question: str) -> None:
        (vector,) = embedder.vectors([question], embedder.max_seq_length_q)
        nearest = index.nearest(vector, args.top_contexts)
        if model is None and args.json:
            print(paragraphs_as_json(question, nearest), flush=True)
        elif model is None:
            show_paragraphs(nearest)
        else:
            found = read(model, nearest, question, args.top_k)
            if args.json:
                print(found_as_json(model, question, found), flush=True)
            else:
                show_found(model, found)

    return ask


def main() -> None:
    args = parse_arguments()
    if args.question and not all(question.strip() for question in args.question):
        raise UserError("--question is empty")
    if not args.model and not args.model_emb:
        raise UserError("give --model, which reads a text, --model_emb, which finds texts, or both")
    ask = ask_texts(args) if args.model_emb else ask_text(args)
    for question in args.question or questions_from_input():
        if not args.json and (not sys.stdin.isatty() or args.question):
            print(question)
        ask(question)


if __name__ == "__main__":
    run_main(main)
