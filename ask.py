"""Ask an exported QA model about documents, from the command line.

deploy/reader.py finds the answers; this script has the flags, and shows them. No torch.
"""

from __future__ import annotations

import os
import signal


def stop(number: int, _: FrameType | None) -> NoReturn:
    """Handle Ctrl-C while there is nothing to save: print a line and exit as after any Ctrl-C.

    A KeyboardInterrupt is not enough: if a callback of an import raises it, Python prints it and
    goes on.
    """
    os.write(2, b"stopped\n")
    os._exit(128 + number)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, stop)

import argparse
import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn

from cli import (
    ArgumentParser,
    Interrupted,
    UnreadableError,
    UserError,
    decode,
    number,
    run_main,
)
from deploy import evaluate
from deploy.feedback import Feedback
from deploy.reader import TOP_CONTEXTS, TOP_K, WHOLE, Answer, Reader
from deploy.runtime import PRECISIONS, RUNTIMES
from deploy.search import SEARCHES, Found

HIGHLIGHT, PLAIN = "\033[1;30;43m", "\033[0m"


def parse_arguments() -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.group("models").add_argument
    add("--model", metavar="FOLDER",
        help="QA model that reads the text: an output folder of train_qa.py or"
        " pack_and_distill.py, or the model.onnx in it (default: none, show the paragraphs that"
        " --model_emb finds)")  # fmt: skip
    add("--model_emb", metavar="FOLDER",
        help="embedding model that finds the paragraphs to read: an output folder, or the"
        " model.onnx in it (default: none, read all of one file; find paragraphs of several by"
        " their words)")  # fmt: skip
    add = parser.group("texts and questions").add_argument
    add("--context", nargs="+", default=[], metavar="FILE",
        help="documents with the answers: files (.txt, .md, .html, .pdf, .docx), folders of them,"
        " and addresses of web pages (required without --serve or --evaluate)")  # fmt: skip
    add("--search", choices=SEARCHES,
        help="how paragraphs are found: dense by the vectors of --model_emb, bm25 by the words that"
        " they share with the question, hybrid by the ranks of both (default: hybrid with"
        " --model_emb; without it bm25, but all of one file is read)")  # fmt: skip
    add("--top_contexts", type=number(int, 1, 1000), default=TOP_CONTEXTS, metavar="N",
        help="paragraphs to read per question, where they are searched")  # fmt: skip
    add("--question", action="append", metavar="TEXT",
        help="a question; may be given several times (default: type questions at a prompt, or pipe"
        " them in, one per line, in UTF-8)")  # fmt: skip
    add("--evaluate", metavar="FILE",
        help="SQuAD file whose questions are asked of all its contexts, for the scores of search"
        " and answers; vectors are kept beside the file (default: none)")  # fmt: skip
    add("--eval_extra_contexts", metavar="FILE",
        help="SQuAD file whose contexts --evaluate searches too (default: none)")  # fmt: skip
    add = parser.group("answers").add_argument
    add("--top_k", type=number(int, 1, 50), default=TOP_K, metavar="N",
        help="answers to show per question")  # fmt: skip
    add("--json", action="store_true",
        help="print one JSON object per question, each on its own line; an answer's start and end"
        " count code points of the whole file, with byte order mark and carriage"
        " returns")  # fmt: skip
    add = parser.group("the page").add_argument
    add("--serve", action="store_true",
        help="answer in the browser: a page and its JSON API, on this machine alone")  # fmt: skip
    add("--port", type=number(int, 0, 65535), default=8000,
        help="port of the page; 0 takes a free one")  # fmt: skip
    add("--host", default="127.0.0.1",
        help="address that the page listens on; 0.0.0.0 lets other machines ask, and see the"
        " documents")  # fmt: skip
    add("--feedback", default="feedback.json", metavar="FILE",
        help="SQuAD file that keeps the answers that are confirmed or corrected in the"
        " page")  # fmt: skip
    add = parser.group("the machine").add_argument
    add("--runtime", choices=RUNTIMES, default="auto",
        help="auto takes OpenVINO if it is installed and computes the file exactly, else ONNX"
        " Runtime")  # fmt: skip
    add("--runtime_precision", choices=PRECISIONS, default="f32",
        help="default lets OpenVINO compute in bf16 on CPUs that have it: faster, less"
        " exact")  # fmt: skip
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------
# Output


def show(answers: list[Answer]) -> None:
    """Print answers to read: score, answer, its sentence, and its source."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if not answers:
        print("  no paragraph has a word of the question")
    elif answers[0].no_answer:
        print("  no answer in what was read; the nearest there is:")
    for rank, each in enumerate(answers, 1):
        marked = f"{HIGHLIGHT}{each.text}{PLAIN}" if colour else each.text
        after = each.offset + len(each.text)
        sentence = each.sentence[: each.offset] + marked + each.sentence[after:]
        print(f"  {rank}. {each.score:6.1%}  {' '.join(each.text.split())}")
        print(f"             {' '.join(sentence.split())}")
        print(f"             {each.source}{near(each.distance)}")
    print(flush=True)


def near(distance: float | None) -> str:
    """A paragraph's distance from the question, to show behind its source."""
    return "" if distance is None else f", distance {distance:.3f}"


def show_paragraphs(found: list[Found]) -> None:
    """Print the paragraphs that a question found, to read."""
    for rank, (paragraph, _, distance) in enumerate(found, 1):
        print(f"  {rank}. {paragraph.source}{near(distance)}")
        print(f"     {' '.join(paragraph.text.split())}")
    print(flush=True)


def print_json(question: str, **found: Any) -> None:
    """Print the results as one line of JSON, with escapes if stdout's encoding is not UTF-8."""
    escaped = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    print(json.dumps({"question": question, **found}, ensure_ascii=escaped), flush=True)


# ------------------------------------------------------------------------------------------------
# Questions


def questions_from_input() -> Iterator[str]:
    """Questions typed at a prompt, until an empty line or its end; or a pipe's lines, blank ones
    left out.

    Raises:
        UserError: a line is not UTF-8 text; names the line.
    """
    prompts = sys.stdin.isatty()
    for count in itertools.count(1):
        if prompts:
            print("question> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()
        try:
            text = decode(line)
        except UnreadableError as error:
            raise UserError(f"line {count} of the input {error}") from None
        if count == 1:
            text = text.removeprefix("\ufeff")
        questions = [each.strip() for each in text.split("\r")]
        yield from filter(None, questions)
        if not line or (prompts and not any(questions)):
            return


def check_streams(args: argparse.Namespace) -> None:
    """Check that there is a question, or an input to read questions from.

    Raises:
        UserError: a question is empty or not UTF-8; stdin is closed, or is read as a text.
    """
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


def ask(reader: Reader, question: str, args: argparse.Namespace) -> None:
    """Print the answers to a question, or, without --model, the paragraphs that it finds."""
    if args.model is None:
        found = reader.paragraphs(question, args.top_contexts)
        if args.json:
            print_json(question, paragraphs=[each.as_record() for each in found])
        else:
            show_paragraphs(found)
        return
    answers = reader(question, top_k=args.top_k, top_contexts=args.top_contexts)
    if args.json:
        print_json(question, answers=[each.as_record() for each in answers])
    else:
        show(answers)


def evaluate_file(reader: Reader, args: argparse.Namespace) -> None:
    """Print the figures of --evaluate, as a table or as a line of JSON."""
    figures = evaluate.evaluate(evaluate.load(args.evaluate, args.eval_extra_contexts), reader)
    print(json.dumps(figures.record()) if args.json else evaluate.table(figures), flush=True)


def serve(reader: Reader, args: argparse.Namespace) -> None:
    """Show the page until Ctrl-C."""
    from deploy import server  # its packages are optional

    server.serve(reader, Feedback(args.feedback), args.host, args.port, args.top_contexts)


def check_page(args: argparse.Namespace) -> None:
    """Check what --serve needs, before models load.

    Raises:
        UserError: a package is missing, or flags do not go together.
    """
    if args.question or args.json:
        raise UserError("--serve asks in the browser: leave out --question and --json")
    if not args.model:
        raise UserError("--serve needs --model, which reads the documents")
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"--serve needs the package {package}: pip install -r requirements-serve.txt"
            )


def check_arguments(args: argparse.Namespace) -> None:
    """Check that the flags fit together.

    Raises:
        UserError: a flag that is needed is missing, or one has nothing to do.
    """
    if args.serve:
        check_page(args)
    if args.evaluate:
        for flag in ("context", "question", "serve"):
            if getattr(args, flag):
                raise UserError(
                    f"--{flag}: --evaluate asks the questions of its file, of the file's contexts"
                )
    elif args.eval_extra_contexts:
        raise UserError("--eval_extra_contexts needs --evaluate")
    elif not args.serve:
        if not args.context:
            raise UserError(
                "give --context, the texts with the answers, or --serve, a page to ask on"
            )
        check_streams(args)
    if not args.model and not args.model_emb:
        raise UserError("give --model, which reads a text, --model_emb, which finds texts, or both")


def main() -> None:
    signal.signal(signal.SIGINT, stop)  # again, for the imports of runtimes as models load
    args = parse_arguments()
    check_arguments(args)
    one_file = len(args.context) == 1 and not os.path.isdir(os.path.expanduser(args.context[0]))
    searches = args.search or args.model_emb or args.serve or not one_file
    reader = Reader(
        args.model,
        args.model_emb,
        search=args.search if searches else WHOLE,
        runtime=args.runtime,
        runtime_precision=args.runtime_precision,
    )
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # an index saves its vectors
        if args.context:
            reader.add(args.context, "--context")
        if args.evaluate:
            return evaluate_file(reader, args)
        if args.serve:
            return serve(reader, args)
        for question in args.question or questions_from_input():
            if not args.json and (args.question or not sys.stdin.isatty()):
                print(question)
            ask(reader, question, args)
    except KeyboardInterrupt:
        raise Interrupted("stopped", signal.SIGINT) from None


if __name__ == "__main__":
    run_main(main)
