"""Ask an exported QA model about a text of any length, or about many texts.

Runs the model.onnx of a train_qa.py output folder in ONNX Runtime or OpenVINO, without torch.
Tokenisation, windows and span search are those of the evaluation. Of many texts it first finds the
paragraphs nearest to a question, by an embedding model, by their words or by both, and reads only
those. With an embedding model alone, it shows these paragraphs. --evaluate measures all of it.
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
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
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
from deploy import documents, evaluate, reader, search
from deploy.documents import Paragraph
from deploy.reader import Answer, Reader
from deploy.runtime import PRECISIONS, RUNTIMES, Runtime
from deploy.search import Embedder, Found, Words

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
        " model.onnx in it (default: none; one text is read as a whole, several are searched by"
        " BM25)")  # fmt: skip
    add = parser.group("texts and questions").add_argument
    add("--context", nargs="+", metavar="FILE",
        help="UTF-8 texts with the answers: files, and folders, of which the .txt and .md files"
        " are read (default: none, which --evaluate alone allows)")  # fmt: skip
    add("--search", choices=search.SEARCHES,
        help="how paragraphs are found: dense by the vectors of --model_emb, bm25 by the words that"
        " they share with the question, hybrid by the ranks of both (default: hybrid with"
        " --model_emb; without it bm25, but all of one file is read)")  # fmt: skip
    add("--top_contexts", type=number(int, 1, 1000), default=5, metavar="N",
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
    add("--top_k", type=number(int, 1, 50), default=3, metavar="N",
        help="answers to show per question")  # fmt: skip
    add("--json", action="store_true",
        help="print one JSON object per question, each on its own line; an answer's start and end"
        " count code points of the whole file, with byte order mark and carriage"
        " returns")  # fmt: skip
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
    """Print answers to read: probability, answer, its sentence, and its source."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    if not answers:
        print("  no paragraph has a word of the question")
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
            print(f"             {place(each.source, each.distance)}")
    print(flush=True)


def as_record(answer: Answer) -> dict[str, Any]:
    """An answer for JSON, with `no_answer` only if the model is one for SQuAD 2.0."""
    record: dict[str, Any] = {
        "text": answer.text,
        "probability": answer.probability,
        "start": answer.start,
        "end": answer.end,
        "sentence": answer.sentence,
    }
    if answer.source is not None:
        record |= {"source": answer.source.source, "paragraph": answer.source.text}
        if answer.distance is not None:
            record["distance"] = answer.distance
        if answer.no_answer is not None:
            record["no_answer"] = answer.no_answer
    return record


def place(paragraph: Paragraph, distance: float | None) -> str:
    """File and line of a paragraph and, if it was found by its vector, the distance."""
    return paragraph.source + ("" if distance is None else f", distance {distance:.3f}")


def show_paragraphs(found: list[Found]) -> None:
    """Print the paragraphs nearest to a question, to read."""
    for rank, each in enumerate(found, 1):
        print(f"  {rank}. {place(each.paragraph, each.distance)}")
        print(f"     {' '.join(each.paragraph.text.split())}")
    print(flush=True)


def print_json(question: str, **found: Any) -> None:
    """Print the results as one line of JSON, with escapes if stdout's encoding is not UTF-8."""
    escaped = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    print(json.dumps({"question": question, **found}, ensure_ascii=escaped), flush=True)


def print_answers(as_json: bool, question: str, answers: list[Answer], **more: Any) -> None:
    """Print the answers to a question.

    Args:
        more: further values for JSON.
    """
    if as_json:
        print_json(question, **more, answers=[as_record(each) for each in answers])
    else:
        show(answers)


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
    if args.question or args.evaluate:
        return
    if sys.stdin is None:
        raise UserError("stdin is closed, and there is no --question")
    if any(path in ("/dev/stdin", "/dev/fd/0", "/proc/self/fd/0") for path in args.context):
        raise UserError("--context is read from stdin: give each question by --question")


def ask_text(args: argparse.Namespace) -> Callable[[str], None]:
    """The function that prints the answers to a question from one text."""
    file = documents.read_file(args.context[0])
    model = reader.load(args.model, Runtime(args.runtime, args.runtime_precision))
    if not len(model.tokens(file.text).ids):
        raise UserError(f"--context: {args.context[0]} has no text")

    def ask(question: str) -> None:
        answers = [
            replace(each, start=each.start + file.start, end=each.end + file.start)
            for each in model.answers(file.text, question, args.top_k)
        ]
        knows_none = model.threshold is not None and answers
        none = {"no_answer": answers[0].no_answer} if knows_none else {}
        print_answers(args.json, question, answers, **none)

    return ask


def load_models(args: argparse.Namespace) -> tuple[Reader | None, Embedder | Words]:
    """The models that read and search; the reader's tokenizer searches without --model_emb."""
    search.check_method(args.search, bool(args.model_emb))
    runtime = Runtime(args.runtime, args.runtime_precision)
    embedder = search.load_embedder(args.model_emb, runtime) if args.model_emb else None
    model = reader.load(args.model, runtime) if args.model else None
    if embedder is None:
        assert model is not None  # `main` checks that there is one of them
        return model, Words(model.tokenizer, model.room)
    return model, embedder


def ask_texts(args: argparse.Namespace) -> Callable[[str], None]:
    """The function that prints the answers to a question from many texts, or, without --model, the
    nearest paragraphs."""
    model, finder = load_models(args)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # stopped, an index saves its vectors
    index = search.build_index(documents.read_paragraphs(args.context), finder, args.search)

    def ask(question: str) -> None:
        found = index.nearest(question, args.top_contexts)
        if model is not None:
            print_answers(args.json, question, model.answers_from(found, question, args.top_k))
        elif args.json:
            paragraphs = [
                {
                    "source": each.paragraph.source,
                    "paragraph": each.paragraph.text,
                    "start": each.paragraph.start,
                    "end": each.paragraph.start + len(each.paragraph.text),
                    **({} if each.distance is None else {"distance": each.distance}),
                }
                for each in found
            ]
            print_json(question, paragraphs=paragraphs)
        else:
            show_paragraphs(found)

    return ask


def evaluate_file(args: argparse.Namespace) -> None:
    """Print the figures of --evaluate, as a table or as a line of JSON."""
    model, finder = load_models(args)
    asked = evaluate.load(args.evaluate, args.eval_extra_contexts)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # stopped, an index saves its vectors
    figures = evaluate.evaluate(asked, model, finder, args.search)
    print(json.dumps(figures.record()) if args.json else evaluate.table(figures), flush=True)


def check_arguments(args: argparse.Namespace) -> None:
    """Check that the flags fit together.

    Raises:
        UserError: a flag that is needed is missing, or has nothing to do.
    """
    if not args.model and not args.model_emb:
        raise UserError("give --model, which reads a text, --model_emb, which finds texts, or both")
    if args.evaluate and (args.context or args.question):
        raise UserError(
            f"--{'context' if args.context else 'question'}: --evaluate asks the questions of its"
            " file, of the file's contexts"
        )
    if args.eval_extra_contexts and not args.evaluate:
        raise UserError("--eval_extra_contexts needs --evaluate")
    if not args.context and not args.evaluate:
        raise UserError("give --context, the texts with the answers")


def main() -> None:
    signal.signal(signal.SIGINT, stop)  # again, for the imports of runtimes as models load
    args = parse_arguments()
    check_arguments(args)
    check_streams(args)
    try:
        if args.evaluate:
            evaluate_file(args)
            return
        args.context = [os.path.expanduser(path) for path in args.context]
        (first, *more) = args.context
        whole = not (args.model_emb or args.search or more or os.path.isdir(first))
        ask = ask_text(args) if whole else ask_texts(args)
        for question in args.question or questions_from_input():
            if not args.json and (args.question or not sys.stdin.isatty()):
                print(question)
            ask(question)
    except KeyboardInterrupt:
        raise Interrupted("stopped", signal.SIGINT) from None


if __name__ == "__main__":
    run_main(main)
