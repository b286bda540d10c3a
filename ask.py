"""Ask an exported QA model about a text of any length, or about many texts.

Runs model.onnx of a train_qa.py output folder in ONNX Runtime or OpenVINO; no torch is needed.
Tokenisation, windows and span search are those of the evaluation. With an embedding model too, it
finds the paragraphs that are nearest to a question first, and reads those; alone, it shows them.
"""

from __future__ import annotations

import os
import signal


def stop(number: int, _: FrameType | None) -> NoReturn:
    """Ctrl-C while there is nothing to save: a line, and the exit code that it always has.

    KeyboardInterrupt would not do: raised in a callback of an import it is shown and forgotten.
    """
    os.write(2, b"stopped\n")
    os._exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import Any, NoReturn

from cli import ArgumentParser, Interrupted, UserError, number, run_main
from deploy import documents, reader
from deploy.documents import Paragraph, UnreadableError
from deploy.reader import Answer
from deploy.runtime import PRECISIONS, RUNTIMES, Runtime
from deploy.search import build_index, load_embedder

HIGHLIGHT, PLAIN = "\033[1;30;43m", "\033[0m"


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.group("models").add_argument
    add("--model", metavar="FOLDER",
        help="output folder of train_qa.py or pack_and_distill.py, or the model.onnx in it; it"
        " reads the text (default: none, show the paragraphs that --model_emb finds)")  # fmt: skip
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
        help="may be given several times (default: asked for, or the lines of a pipe, in"
        " UTF-8)")  # fmt: skip
    add = parser.group("answers").add_argument
    add("--top_k", type=number(int, 1, 50), default=3, metavar="N",
        help="answers to show for a question")  # fmt: skip
    add("--json", action="store_true",
        help="print a line for each question, one JSON object; start and end of an answer count"
        " code points of the whole file, byte order mark and carriage returns too")  # fmt: skip
    add = parser.group("the machine").add_argument
    add("--runtime", choices=RUNTIMES, default="auto",
        help="auto takes OpenVINO where it is installed and computes exactly, else ONNX"
        " Runtime")  # fmt: skip
    add("--runtime_precision", choices=PRECISIONS, default="f32",
        help="default lets OpenVINO take bf16 where the CPU has it: faster and less"
        " exact")  # fmt: skip
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------
# What is printed


def show(answers: list[Answer]) -> None:
    """Print answers for people: probability, answer, its sentence, and where that stands."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if answers and answers[0].no_answer and answers[0].source is None:
        print("  no answer in this text; the nearest there is:")
    for rank, each in enumerate(answers, 1):
        marked = f"{HIGHLIGHT}{each.text}{PLAIN}" if colour else each.text
        after = each.offset + len(each.text)
        sentence = each.sentence[: each.offset] + marked + each.sentence[after:]
        unsure = "  (it may have no answer)" if each.no_answer and each.source else ""
        print(f"  {rank}. {each.probability:6.1%}  {' '.join(each.text.split())}{unsure}")
        print(f"             {' '.join(sentence.split())}")
        if each.source is not None:
            print(f"             {each.source.source}, distance {each.distance:.3f}")
    print(flush=True)


def as_record(answer: Answer) -> dict[str, Any]:
    """An answer for JSON; `no_answer` only for models of SQuAD 2.0."""
    record: dict[str, Any] = {
        "text": answer.text,
        "probability": answer.probability,
        "start": answer.start,
        "end": answer.end,
        "sentence": answer.sentence,
    }
    if answer.source is not None:
        record |= {"source": answer.source.source, "paragraph": answer.source.text}
        record["distance"] = answer.distance
        if answer.no_answer is not None:
            record["no_answer"] = answer.no_answer
    return record


def show_paragraphs(nearest: list[tuple[Paragraph, float]]) -> None:
    """Print the paragraphs nearest to a question for people."""
    for rank, (paragraph, distance) in enumerate(nearest, 1):
        print(f"  {rank}. {paragraph.source}, distance {distance:.3f}")
        print(f"     {' '.join(paragraph.text.split())}")
    print(flush=True)


def print_json(question: str, **found: Any) -> None:
    """Print what was found as one line of JSON, escaped where stdout has no UTF-8."""
    escaped = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    print(json.dumps({"question": question, **found}, ensure_ascii=escaped), flush=True)


# ------------------------------------------------------------------------------------------------
# What is asked


def questions_from_input() -> Iterator[str]:
    """Questions from a prompt, until its end or an empty line; or all lines of a pipe that are not
    blank.

    Raises:
        UserError: a line is no UTF-8 text; names it.
    """
    prompts = sys.stdin.isatty()
    for count in itertools.count(1):
        if prompts:
            print("question> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        try:
            text = documents.decode(line)
        except UnreadableError as error:
            raise UserError(f"line {count} of the input {error}") from None
        if count == 1:
            text = text.removeprefix("\ufeff")
        questions = [each.strip() for each in text.split("\r")]
        yield from filter(None, questions)
        if not line or (prompts and not any(questions)):
            return


def check_streams(args: argparse.Namespace) -> None:
    """Raises a UserError where there is no input to read questions from, or texts take it."""
    for each in args.question or ():
        try:
            each.encode()
        except UnicodeEncodeError:
            raise UserError("--question is not UTF-8 text") from None
        if not each.strip():
            raise UserError("--question is empty")
    if args.question:
        return
    if sys.stdin is None:
        raise UserError("stdin is closed, and there is no --question")
    if any(path in ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0") for path in args.context):
        raise UserError("--context is read from stdin: give each question by --question")


def ask_text(args: argparse.Namespace) -> Callable[[str], None]:
    """Answers from one text: what prints those to a question."""
    if len(args.context) > 1:
        raise UserError("--context: several files need --model_emb, which finds what to read")
    file = documents.read_file(args.context[0])
    model = reader.load(args.model, Runtime(args.runtime, args.runtime_precision))
    if not len(model.tokens(file.text).ids):
        raise UserError(f"--context: {args.context[0]} has no text")

    def ask(question: str) -> None:
        answers = [
            replace(each, start=each.start + file.start, end=each.end + file.start)
            for each in model.answers(file.text, question, args.top_k)
        ]
        if args.json:
            sure = model.threshold is None or not answers
            none = {} if sure else {"no_answer": answers[0].no_answer}
            print_json(question, **none, answers=[as_record(each) for each in answers])
        else:
            show(answers)

    return ask


def ask_texts(args: argparse.Namespace) -> Callable[[str], None]:
    """Answers from many texts, or with no --model their paragraphs: what prints those to a
    question."""
    runtime = Runtime(args.runtime, args.runtime_precision)
    embedder = load_embedder(args.model_emb, runtime)
    model = reader.load(args.model, runtime) if args.model else None
    signal.signal(signal.SIGINT, signal.default_int_handler)  # an index saves what it has
    index = build_index(embedder, args.context)

    def ask(question: str) -> None:
        nearest = index.nearest(embedder.question(question), args.top_contexts)
        if model is not None:
            answers = model.answers_from(nearest, question, args.top_k)
            if args.json:
                print_json(question, answers=[as_record(each) for each in answers])
            else:
                show(answers)
        elif args.json:
            paragraphs = [
                {
                    "source": each.source,
                    "paragraph": each.text,
                    "start": each.start,
                    "end": each.start + len(each.text),
                    "distance": distance,
                }
                for each, distance in nearest
            ]
            print_json(question, paragraphs=paragraphs)
        else:
            show_paragraphs(nearest)

    return ask


def main() -> None:
    signal.signal(signal.SIGINT, stop)  # still: runtimes are imported as models are loaded
    args = parse_arguments()
    check_streams(args)
    if not args.model and not args.model_emb:
        raise UserError("give --model, which reads a text, --model_emb, which finds texts, or both")
    args.context = [os.path.expanduser(path) for path in args.context]
    try:
        ask = ask_texts(args) if args.model_emb else ask_text(args)
        for question in args.question or questions_from_input():
            if not args.json and (args.question or not sys.stdin.isatty()):
                print(question)
            ask(question)
    except KeyboardInterrupt:
        raise Interrupted("stopped", signal.SIGINT) from None


if __name__ == "__main__":
    run_main(main)
