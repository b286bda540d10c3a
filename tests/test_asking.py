"""What people feed to ask.py: each row is an input, and the value or the line that it must give."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from calls import call, error_line
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from test_answers import all_spans, log_sum
from test_runtime import WEIGHT, qa_folder
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel

import ask
import squad_utils
from cli import Interrupted, UserError
from deploy import documents, qa_model, reader, runtime, search
from deploy import settings as model_settings
from deploy.documents import Paragraph
from deploy.qa_model import QaModel
from deploy.reader import Reader
from deploy.search import Embedder
from squad_utils import SpecialIds

PROPERTY = settings(max_examples=60, deadline=None, derandomize=True)
LETTERS = [chr(code) for code in range(33, 127)]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "velmora", "tindale", "oster", "ada", *LETTERS]
WORDS += [f"##{letter}" for letter in LETTERS]
VOCABULARY = {word: i for i, word in enumerate(dict.fromkeys(WORDS))}
SPECIAL = SpecialIds(cls=2, sep=3, pad=0)
NAMES = [VOCABULARY[name] for name in ("velmora", "tindale", "oster", "ada")]  # the best first


def make_tokenizer() -> Tokenizer:
    """One that lower-cases and drops accents and controls, as BERT's do."""
    tokenizer = Tokenizer(WordPiece(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer()
    tokenizer.pre_tokenizer = BertPreTokenizer()
    return tokenizer


def by_names(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a model whose answers are NAMES, each alone."""
    ids = arrays["input_ids"]
    weights = np.zeros(len(VOCABULARY), np.float32)
    weights[NAMES] = 9 - np.arange(len(NAMES))
    return weights[ids], weights[ids]


def make_model(infer: runtime.Infer = by_names, length: int = 32, **changes: Any) -> QaModel:
    given_settings: dict[str, Any] = {"max_query_length": 8, "doc_stride": 8}
    given_settings |= {"max_answer_length": 30, "threshold": None, **changes}
    return QaModel("models/qa", infer, make_tokenizer(), SPECIAL, length, **given_settings)


def make_reader(infer: runtime.Infer = by_names, length: int = 32, **changes: Any) -> Reader:
    return Reader(make_model(infer, length, **changes))


class CountingEmbedder:
    """A compiled embedding model: a text's vector tells how often it has each token.

    Attributes:
        texts: those that were embedded.
        stops_at: Ctrl-C comes instead of this one.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.stops_at: int | None = None
        self.factor = np.float32(1)

    def __call__(self, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        if len(self.texts) == self.stops_at:
            raise KeyboardInterrupt
        ids = arrays["input_ids"][0][arrays["attention_mask"][0] > 0]
        words = {i: word for word, i in VOCABULARY.items()}
        self.texts.append(" ".join(words[i] for i in ids[1:-1]))
        counts = np.bincount(ids, minlength=len(VOCABULARY)).astype(np.float32)
        return (counts[None] * self.factor,)


def make_embedder(
    model: runtime.Infer, key: str = "key", max_q: int = 10, max_c: int = 34
) -> Embedder:
    return Embedder("models/emb", lambda _: model, make_tokenizer(), SPECIAL, max_q, max_c, key)


# ------------------------------------------------------------------------------------------------
# Files: bytes -> (text, line, start) of each paragraph, or the end of the line

FILES: dict[str, tuple[bytes, list[tuple[str, int, int]] | str]] = {
    "plain": (b"one\n\ntwo\n", [("one", 1, 0), ("two", 3, 5)]),
    "no line end at the end": (b"one\n\ntwo", [("one", 1, 0), ("two", 3, 5)]),
    "CRLF": (b"one\r\nmore\r\n\r\ntwo\r\n", [("one\r\nmore", 1, 0), ("two", 4, 13)]),
    "CRLF without blank lines": (b"one\r\ntwo\r\n", [("one\r\ntwo", 1, 0)]),
    "CR alone": (b"one\rmore\r\rtwo", [("one\rmore", 1, 0), ("two", 4, 10)]),
    "a mark": (b"\xef\xbb\xbfone\n\ntwo", [("one", 1, 1), ("two", 3, 6)]),
    "a mark and CRLF": (b"\xef\xbb\xbfone\r\n\r\ntwo", [("one", 1, 1), ("two", 3, 8)]),
    "two marks": (b"\xef\xbb\xbf\xef\xbb\xbfone", [("\ufeffone", 1, 1)]),
    "a mark within": ("one\n\n\ufefftwo".encode(), [("one", 1, 0), ("\ufefftwo", 3, 5)]),
    "blank lines with spaces": (b"one\n \t\n  two  ", [("one", 1, 0), ("two", 3, 9)]),
    "many blank lines": (b"\n\n\none\n\n\n\n\ntwo", [("one", 4, 3), ("two", 9, 11)]),
    "beyond 16 bits": ("😀😀 one\n\ntwo".encode(), [("😀😀 one", 1, 0), ("two", 3, 8)]),
    "accents on their own": ("e\u0301\n\nतो".encode(), [("e\u0301", 1, 0), ("तो", 3, 4)]),
    "a form feed": (b"one\n\x0c\ntwo", [("one", 1, 0), ("two", 3, 6)]),
    "line separators are no lines": ("one\u2028two".encode(), [("one\u2028two", 1, 0)]),
    "empty": (b"", "has no text"),
    "a mark alone": (b"\xef\xbb\xbf", "has no text"),
    "white space alone": (b" \r\n\t\r\n", "has no text"),
    "UTF-16": ("one".encode("utf-16"), "is UTF-16, not UTF-8: iconv -f UTF-16 -t UTF-8 "),
    "UTF-16, big-endian": ("\ufeffone".encode("utf-16-be"), "is UTF-16, not UTF-8: iconv "),
    "UTF-16 without a mark": ("one".encode("utf-16-le"), "has NUL bytes (the first is byte 1)"),
    "UTF-32": ("one".encode("utf-32"), "is UTF-32, not UTF-8: iconv -f UTF-32 -t UTF-8 "),
    "a NUL": (b"one\0two", "has NUL bytes (the first is byte 3), so it is UTF-16 or no text"),
    "Latin-1": ("caf\u00e9".encode("latin-1"), "is not UTF-8 text (byte 3)"),
    "cut within a character": ("café".encode()[:-1], "is not UTF-8 text (byte 3)"),
    "half a surrogate pair": (b"a\xed\xa0\x80", "is not UTF-8 text (byte 1)"),
    "gzip": (b"\x1f\x8b\x08\x00abc", "has NUL bytes (the first is byte 3)"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_its_paragraphs_or_a_line(name: str, tmp_path: Path) -> None:
    data, expected = FILES[name]
    path = tmp_path / "file.txt"
    path.write_bytes(data)
    if isinstance(expected, str):
        with pytest.raises(UserError) as error:
            documents.read_paragraphs([str(path)])
        assert str(error.value).startswith(f"--context: {path} {expected}")
        return
    found = documents.read_paragraphs([str(path)])
    assert [(each.text, each.line, each.start) for each in found] == expected
    for each in found:
        assert data.decode()[each.start : each.start + len(each.text)] == each.text


# ------------------------------------------------------------------------------------------------
# Folders: what is made -> the texts that are read, and what is told


def write(folder: Path, **files: str) -> None:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def odd_name(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")).write_text("one")


def circle(folder: Path) -> None:
    write(folder, below__a_txt="one")
    (folder / "below" / "back").symlink_to(folder)


def linked_folder(folder: Path) -> None:
    write(folder.parent / "elsewhere", a_txt="one")
    (folder / "linked").symlink_to(folder.parent / "elsewhere")


def linked_file(folder: Path) -> None:
    write(folder, a_txt="one")
    (folder / "b.txt").symlink_to(folder / "a.txt")


def fifo(folder: Path) -> None:
    write(folder, a_txt="one")
    os.mkfifo(folder / "b.txt")


def dangling(folder: Path) -> None:
    write(folder, a_txt="one")
    (folder / "b.txt").symlink_to(folder / "nowhere.txt")


def bad_one(folder: Path) -> None:
    write(folder, **{f"{i:03}_txt": f"text {i}" for i in range(40)})
    (folder / "017.txt").write_bytes(b"\xff\xfeo\0n\0e\0")


def many_bad(folder: Path) -> None:
    write(folder, a_txt="one")
    for i in range(8):
        (folder / f"bad{i}.md").write_bytes(b"\xe9")


FORTY = [f"text {i}" for i in range(40) if i != 17]
FOLDERS: dict[str, tuple[Callable[[Path], None], list[str] | str, list[str]]] = {
    "capital letters": (lambda f: write(f, NOTES_TXT="one", Read_Me_MD="two"), ["one", "two"], []),
    "one picture": (
        lambda f: write(f, a_txt="one", b_png="x"),
        ["one"],
        ["1 file is skipped, not being .txt, .md, .html, .htm, .pdf or .docx: ", "b.png"],
    ),
    "many pictures": (
        lambda f: write(f, a_txt="one", **{f"{i:03}_png": "x" for i in range(99)}),
        ["one"],
        ["99 files are skipped", "004.png and 94 more"],
    ),
    "hidden files are not told": (lambda f: write(f, a_txt="one", _DS="x"), ["one"], []),
    "nothing but a picture": (
        lambda f: write(f, a_png="x"), r"has no \.txt, .* or \.docx file; it has .*a\.png", []),
    "nothing": (lambda f: None, "has no .txt, .md, .html, .htm, .pdf or .docx file", []),
    "one that cannot be read": (
        bad_one, FORTY, ["017.txt is UTF-16, not UTF-8"]),
    "many that cannot be read": (
        many_bad, ["one"], [f"bad{i}.md is not UTF-8 text (byte 0)" for i in range(8)]),
    "none that can be read": (
        lambda f: (f / "a.txt").write_bytes(b"\xe9"), "a.txt is not UTF-8 text", []),
    "a named pipe": (fifo, ["one"], ["b.txt is no regular file"]),
    "a link to nowhere": (dangling, ["one"], ["b.txt is a link to a file that"]),
    "a linked folder": (linked_folder, ["one"], []),
    "a link round in a circle": (circle, ["one"], []),
    "a file and a link to it": (linked_file, ["one"], []),
    "a name that is not UTF-8": (odd_name, ["one"], []),
    "a folder that is called like a file": (lambda f: write(f, a_txt__b_txt="one"), ["one"], []),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_is_read_and_what_is_not_is_told(
    name: str, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    make, expected, told = FOLDERS[name]
    folder = tmp_path / "docs"
    folder.mkdir()
    make(folder)
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            documents.read_paragraphs([str(folder)])
    else:
        found = documents.read_paragraphs([str(folder)])
        assert [each.text for each in found] == expected
        for each in found:
            each.source.encode()  # can be shown
    lines = capfd.readouterr().err.splitlines()
    if lines and lines[0].startswith("note: "):  # one, of all files of other kinds
        assert len(lines) == 1 and all(words in lines[0] for words in told)
    else:  # a line each
        assert len(lines) == len(told)
        assert all(words in line for words, line in zip(told, lines, strict=True))
        assert all(line.startswith("warning: --context: ") for line in lines)


@pytest.mark.parametrize(
    "paths,count",
    [
        (["docs", "./docs"], 2),
        (["docs", "docs/a.txt"], 2),
        (["docs/a.txt", "docs"], 2),
        (["docs/sub/../a.txt", "docs/a.txt"], 1),
        (["docs/sub", "docs"], 2),
        (["linked", "docs"], 2),
    ],
)
def test_a_file_that_is_named_twice_counts_once(
    paths: list[str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, docs__a_txt="one", docs__sub__b_txt="two")
    (tmp_path / "linked").symlink_to("docs")
    monkeypatch.chdir(tmp_path)
    assert len(documents.read_paragraphs(paths)) == count


def named_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    "name,make,line",
    [
        ("a.txt", named_pipe, "is no regular file; a pipe is read as /dev/stdin"),
        ("a.txt", lambda path: path.symlink_to("b"), "is a link to a file that is not there"),
        ("a.txt", lambda path: None, "no such file: "),
    ],
)
def test_a_file_that_is_named_and_cannot_be_read_is_an_error(
    name: str, make: Callable[[Path], None], line: str, tmp_path: Path
) -> None:
    make(tmp_path / name)
    with pytest.raises(UserError) as error:
        documents.read([str(tmp_path / name)])
    assert line in str(error.value)


def test_what_the_shell_has_opened_is_read() -> None:
    """As /dev/stdin is, and what bash puts in the place of <(command)."""
    read_end, write_end = os.pipe()
    os.write(write_end, "\ufeffone\n\ntwo".encode())
    os.close(write_end)
    found = documents.read_paragraphs([f"/dev/fd/{read_end}"])
    os.close(read_end)
    assert [(each.text, each.start) for each in found] == [("one", 1), ("two", 6)]


# ------------------------------------------------------------------------------------------------
# Questions: bytes of a pipe -> what is asked, or the line

PIPES: dict[str, tuple[bytes, list[str] | str]] = {
    "lines": (b"one?\ntwo?\n", ["one?", "two?"]),
    "no line end at the end": (b"one?\ntwo?", ["one?", "two?"]),
    "blank lines": (b"one?\n\n \t\ntwo?\n\nthree?\n", ["one?", "two?", "three?"]),
    "CRLF": (b"one?\r\n\r\ntwo?\r\n", ["one?", "two?"]),
    "CR alone": (b"one?\rtwo?\r", ["one?", "two?"]),
    "a mark": (b"\xef\xbb\xbfone?\ntwo?\n", ["one?", "two?"]),
    "a mark alone": (b"\xef\xbb\xbf", []),
    "nothing": (b"", []),
    "blank lines alone": (b"\n\n\r\n", []),
    "other scripts": ("東京は?\nतो?\n😀?\n".encode(), ["東京は?", "तो?", "😀?"]),
    "Latin-1": (b"one?\ncaf\xe9?\n", "line 2 of the input is not UTF-8 text (byte 3)"),
    "UTF-16": ("one?\n".encode("utf-16"), "line 1 of the input is UTF-16, not UTF-8"),
    "UTF-16 without a mark": ("on?".encode("utf-16-le"), "line 1 of the input has NUL bytes"),
    "a NUL": (b"one?\n\nt\0o?\n", "line 3 of the input has NUL bytes"),
}


@pytest.mark.parametrize("name", PIPES)
def test_each_line_of_a_pipe_is_a_question(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, expected = PIPES[name]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), "ascii"))
    if isinstance(expected, str):
        with pytest.raises(UserError) as error:
            list(ask.questions_from_input())
        assert str(error.value).startswith(expected)
    else:
        assert list(ask.questions_from_input()) == expected


def test_prompts_go_to_stderr_and_an_empty_line_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO("wo 😀?\n\nnot read\n".encode()), "ascii")
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", terminal)
    assert list(ask.questions_from_input()) == ["wo 😀?"]
    assert capfd.readouterr() == ("", "question> question> ")


# ------------------------------------------------------------------------------------------------
# Streams: a shell's command -> exit code, stdout, stderr

SAY = f"""{shlex.quote(sys.executable)} -c '
import sys
sys.path.insert(0, sys.argv[1])
import cli
def main():
    print(sys.argv[2], flush=True)
    cli.warn("careful")
cli.run_main(main)' {shlex.quote(str(ROOT))} """
FULL = "error: No space left on device\n"
CLOSED = "error: stdout is closed; > /dev/null drops all output\n"
STREAMS = {
    "as usual": ("hi", 0, "hi\n", "warning: careful\n"),
    "stdin closed": ("hi <&-", 0, "hi\n", "warning: careful\n"),
    "stdout closed": ("hi >&-", 2, "", CLOSED),
    "stderr closed": ("hi 2>&-", 0, "hi\n", ""),
    "all closed": ("hi <&- >&- 2>&-", 2, "", ""),
    "stdout full": ("hi >/dev/full", 2, "", FULL),
    "the reader has gone": ("hi | true", 0, "", "warning: careful\n"),
    "an ASCII terminal": ("'caf\u00e9 😀 !'", 0, "caf? ? !\n", "warning: careful\n"),
    "bytes that are no text": ("$'caf\\xe9'", 0, "caf?\n", "warning: careful\n"),
}


@pytest.mark.parametrize("name", STREAMS)
def test_streams_as_they_come(name: str) -> None:
    command, code, stdout, stderr = STREAMS[name]
    environment = {**os.environ}
    if name == "an ASCII terminal":
        environment["PYTHONIOENCODING"] = "ascii"
    done = subprocess.run(
        ["bash", "-c", SAY + command], capture_output=True, env=environment, timeout=60
    )
    assert done.stdout.decode() == stdout
    if name != "the reader has gone":  # or not yet
        assert (done.returncode, done.stderr.decode()) == (code, stderr)
    assert b"Traceback" not in done.stderr


def test_ctrl_c_while_imports_run_is_a_line(tmp_path: Path) -> None:
    """The import of numpy takes long here, and Ctrl-C comes in it."""
    (tmp_path / "numpy.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "ask.py"), "--help"],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        timeout=60,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"stopped\n")


@pytest.mark.parametrize("encoding,escaped", [("utf-8", False), ("UTF8", False), ("ascii", True),
                                              ("latin-1", True)])  # fmt: skip
def test_json_loses_nothing_whatever_stdout_can_show(
    encoding: str, escaped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    ask.print_json("wo 😀?", text="तो")
    line = written.getvalue().decode()
    assert json.loads(line) == {"question": "wo 😀?", "text": "तो"}
    assert line.isascii() == escaped


# ------------------------------------------------------------------------------------------------
# Asking: what ask.py prints, with models that are functions


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> CountingEmbedder:
    """ask.py with a reader of NAMES and an embedder that counts tokens."""
    model = CountingEmbedder()
    monkeypatch.setattr(qa_model, "load", lambda *_: make_model())
    monkeypatch.setattr(reader, "load_embedder", lambda *_: make_embedder(model))
    return model


def run_ask(*flags: str) -> int:
    return call(["python", str(ROOT / "ask.py"), *flags])


MODES = {
    "a text": ("--model=x",),
    "texts": ("--model=x", "--model_emb=x"),
    "paragraphs": ("--model_emb=x",),
}
MANY = b"\n\n".join(b"line %d of many words" % i for i in range(30)) + b"\n\nat last Velmora."
LONG = b"a. " * 40 + "😀 ".encode() * 9 + b"Then Ada came. " + b"b. " * 40
OFFSETS: dict[str, tuple[bytes, str]] = {
    "plain": (b"Line one names Velmora.", "Velmora"),
    "CRLF": (b"Line one.\r\nLine two names Tindale.\r\nLine three.\r\n", "Tindale"),
    "CRLF and paragraphs": (b"Line one.\r\n\r\nLine two names Oster.\r\n", "Oster"),
    "a mark": (b"\xef\xbb\xbfVelmora is a town.", "Velmora"),
    "a mark, CRLF, paragraphs": (b"\xef\xbb\xbfone\r\n\r\ntwo of Ada\r\n", "Ada"),
    "CR alone": (b"one\r\rtwo of Oster\r", "Oster"),
    "beyond 16 bits": ("😀 😀\n\n🎉 Tindale".encode(), "Tindale"),
    "white space first": (b" \n\t\n   Ada", "Ada"),
    "deep in a file": (MANY, "Velmora"),
    "in a part of a long paragraph": (LONG, "Ada"),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", OFFSETS)
def test_offsets_index_the_file_that_the_user_has(
    name: str, mode: str, fakes: CountingEmbedder, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    data, answer = OFFSETS[name]
    path = tmp_path / "file.txt"
    path.write_bytes(data)
    code = run_ask(*MODES[mode], f"--context={path}", f"--question={answer}", "--json")
    printed = json.loads(capfd.readouterr().out)
    assert code == 0
    found = printed["paragraphs" if mode == "paragraphs" else "answers"]
    parts = [data.decode()[each["start"] : each["end"]] for each in found]
    if mode == "paragraphs":
        assert parts == [each["paragraph"] for each in found]
        assert any(answer in part for part in parts)
    else:
        assert parts == [each["text"] for each in found]
        assert parts[0] == answer


@pytest.mark.parametrize("mode", MODES)
def test_a_question_that_is_cut_is_told_once_a_model(
    mode: str, fakes: CountingEmbedder, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "a.txt").write_bytes(MANY)
    question = "ada " * 504
    assert run_ask(*MODES[mode], f"--context={tmp_path / 'a.txt'}", f"--question={question}") == 0
    said = {
        "--model=x": "warning: the question has 504 tokens; the model sees the first 8",
        "--model_emb=x": "warning: the question has 504 tokens; the embedding model sees the"
        " first 8",
    }
    lines = [each for each in capfd.readouterr().err.splitlines() if each.startswith("warning")]
    assert sorted(lines) == sorted(said[flag] for flag in MODES[mode])


INPUTS: dict[str, tuple[tuple[str, ...], str]] = {
    "no model": ((), "give --model, which reads a text, --model_emb, which finds texts, or both"),
    "an empty question": (("--model=x", "--question= "), "--question is empty"),
    "a question in Latin-1": (("--model=x", "--question=caf\udce9"), "--question is not UTF-8"),
    "stdin as text": (("--model=x", "--context=/dev/stdin"), "give each question by --question"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_what_cannot_be_asked_is_a_line(
    name: str, fakes: CountingEmbedder, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    flags, line = INPUTS[name]
    (tmp_path / "a.txt").write_text("ada")
    assert run_ask(f"--context={tmp_path / 'a.txt'}", *flags) == 2
    assert line in error_line(capfd.readouterr().err)


def test_without_stdin_a_question_has_to_be_given(
    fakes: CountingEmbedder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    (tmp_path / "a.txt").write_text("ada")
    monkeypatch.setattr(sys, "stdin", None)
    flags = ("--model=x", f"--context={tmp_path / 'a.txt'}")
    assert run_ask(*flags) == 2
    assert error_line(capfd.readouterr().err) == (
        "error: stdin is closed, and there is no --question"
    )
    assert run_ask(*flags, "--question=who?") == 0


def test_home_is_expanded(
    fakes: CountingEmbedder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
) -> None:
    (tmp_path / "a.txt").write_text("ada")
    monkeypatch.setenv("HOME", str(tmp_path))
    for flags in MODES.values():
        assert run_ask(*flags, "--context=~/a.txt", "--question=who?") == 0


# ------------------------------------------------------------------------------------------------
# A model's folder: what is wrong in it -> the line, or the settings

SETTINGS = {"max_query_length": 4, "max_seq_length": 16, "doc_stride": 4, "max_answer_length": 7,
            "special_ids": {"cls": 1, "sep": 2, "pad": 0}, "null_threshold": 0.5}  # fmt: skip
EARLIER = {"arguments": {"max_seq_length_q": 4, "doc_stride": 4}}


@pytest.fixture
def qa(tmp_path: Path) -> Path:
    """A folder with a model that runs."""
    folder = Path(qa_folder(tmp_path / "qa", WEIGHT.astype(np.float32)))
    (folder / "reader.json").write_text(json.dumps(SETTINGS))
    return folder


def replaced(**changes: Any) -> str:
    """reader.json with some other values; without those that are None."""
    return json.dumps({k: v for k, v in {**SETTINGS, **changes}.items() if v != "gone"})


READER_FILES = {
    "empty": ("", "is not JSON: "),
    "cut": (json.dumps(SETTINGS)[:40], "is not JSON: "),
    "a list": ("[1]", "is not a JSON object; "),
    "no stride": (replaced(doc_stride="gone"), "lacks doc_stride"),
    "no length": (replaced(max_seq_length="gone"), "lacks max_seq_length"),
    "no ids": (replaced(special_ids="gone"), "lacks special_ids"),
    "no threshold": (replaced(null_threshold="gone"), "lacks null_threshold"),
    "no pad": (replaced(special_ids={"cls": 1, "sep": 2}), "has a wrong value of special_ids"),
    "an id that no token has": (
        replaced(special_ids={"cls": 1, "sep": 2, "pad": 6}), "has a wrong value of special_ids"),
    "a length in words": (replaced(max_query_length="4"), "has a wrong value of max_query_length"),
    "a length of nothing": (replaced(max_seq_length=0), "has a wrong value of max_seq_length"),
    "true": (replaced(doc_stride=True), "has a wrong value of doc_stride"),
    "a threshold that is no number": (
        json.dumps(SETTINGS).replace("0.5", "NaN"), "has a wrong value of null_threshold"),
    "no heat": (replaced(temperature=0), "has a wrong value of temperature"),
    "a temperature in words": (replaced(temperature="1"), "has a wrong value of temperature"),
}  # fmt: skip


@pytest.mark.parametrize("name", READER_FILES)
def test_reader_json_that_is_damaged_names_itself_and_the_remedy(name: str, qa: Path) -> None:
    text, line = READER_FILES[name]
    (qa / "reader.json").write_text(text)
    with pytest.raises(UserError) as error:
        Reader(str(qa))
    message = str(error.value)
    assert message.startswith(f"--model: {qa / 'reader.json'} {line}")
    assert message.endswith("; copy the folder again from where the model was trained")
    assert "\n" not in message


def test_reader_json_is_what_runs_a_model(qa: Path, capfd: pytest.CaptureFixture) -> None:
    """metrics.json, for people, may then hold anything, or not be there."""
    for text in ("damaged", None):
        if text:
            (qa / "metrics.json").write_text(text)
        model = qa_model.load(str(qa), runtime.Runtime())
        assert model.special == SpecialIds(cls=1, sep=2, pad=0)
        lengths = (model.max_query_length, model.length, model.doc_stride, model.max_answer_length)
        assert (*lengths, model.threshold) == (4, 16, 4, 7, 0.5)
        assert "reader.json" not in capfd.readouterr().err


METRICS_FILES = {
    "empty": ("", "is not JSON: "),
    "without arguments": ("{}", "lacks arguments.max_seq_length_q"),
    "arguments of another kind": ('{"arguments": 1}', "lacks arguments.max_seq_length_q"),
    "no stride": (
        json.dumps({"arguments": {"max_seq_length_q": 4, "max_seq_length_c": 16}}),
        "lacks arguments.doc_stride",
    ),
}


@pytest.mark.parametrize("name", METRICS_FILES)
def test_metrics_json_that_is_damaged_names_itself_where_it_is_read(name: str, qa: Path) -> None:
    text, line = METRICS_FILES[name]
    (qa / "reader.json").unlink()
    (qa / "metrics.json").write_text(text)
    with pytest.raises(UserError) as error:
        Reader(str(qa))
    assert str(error.value).startswith(f"--model: {qa / 'metrics.json'} {line}")
    assert str(error.value).endswith("; copy the folder again from where the model was trained")


@pytest.mark.parametrize("form", [str, lambda name: {"content": name}], ids=["name", "record"])
@pytest.mark.parametrize("names", [("[CLS]", "[SEP]", "[PAD]"), ("<s>", "</s>", "<pad>")])
def test_a_folder_of_before_is_read_as_before_and_told(
    names: tuple[str, ...], form: Callable[[str], Any], qa: Path, capfd: pytest.CaptureFixture
) -> None:
    (qa / "reader.json").unlink()
    (qa / "metrics.json").write_text(json.dumps({**EARLIER, "f1_threshold": 0.25}))
    path = qa / "tokenizer.json"
    for old, new in zip(("[CLS]", "[SEP]", "[PAD]"), names, strict=True):
        path.write_text(path.read_text().replace(old, new))
    keys = ("cls_token", "sep_token", "pad_token")
    config = {key: form(name) for key, name in zip(keys, names, strict=True)}
    (qa / "tokenizer_config.json").write_text(json.dumps(config))
    model = qa_model.load(str(qa), runtime.Runtime())
    assert model.special == SpecialIds(cls=1, sep=2, pad=0)
    lengths = (model.max_query_length, model.length, model.doc_stride, model.max_answer_length)
    assert (*lengths, model.threshold) == (4, 16, 4, 30, 0.25)
    told = f"note: --model {qa} has no reader.json; its settings are read from metrics.json\n"
    assert capfd.readouterr().err.count(told) == 1


@pytest.mark.parametrize("config", [None, "[1]", '{"sep_token": null}', "damaged"])
def test_a_folder_of_before_without_a_special_token_names_it(config: str | None, qa: Path) -> None:
    (qa / "reader.json").unlink()
    (qa / "metrics.json").write_text(json.dumps(EARLIER))
    path = qa / "tokenizer.json"
    path.write_text(path.read_text().replace("[SEP]", "</s>"))
    if config:
        (qa / "tokenizer_config.json").write_text(config)
    with pytest.raises(UserError, match=r"the tokenizer of .* lacks (\[SEP\]|None); copy the"):
        Reader(str(qa))


def test_special_tokens_may_have_any_names(qa: Path) -> None:
    expected = [each.text for each in Reader(str(qa))("who", "x alpha x beta")]
    path = qa / "tokenizer.json"
    for old, new in (("[CLS]", "<s>"), ("[SEP]", "</s>"), ("[PAD]", "<pad>")):
        path.write_text(path.read_text().replace(old, new))
    for name in ("openvino", "onnxruntime"):
        model = Reader(str(qa), runtime=name)
        assert [each.text for each in model("who", "x alpha x beta")] == expected
    assert expected[0] == "alpha"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


CUT = "model.onnx is cut or damaged; copy the folder again from where the model was trained"
MODEL_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda qa: cut(qa / "model.onnx"), CUT),
    "empty": (lambda qa: (qa / "model.onnx").write_bytes(b""), CUT),
    "zeros": (lambda qa: (qa / "model.onnx").write_bytes(bytes(999)), CUT),
    "a pointer to a large file": (
        lambda qa: (qa / "model.onnx").write_text("version https://git-lfs.github.com/\n"), CUT),
    "no model": (lambda qa: (qa / "model.onnx").unlink(), "qa has no model.onnx; train_qa.py"),
    "a tokenizer that is cut": (
        lambda qa: cut(qa / "tokenizer.json"), "tokenizer.json is damaged ("),
    "no tokenizer": (lambda qa: (qa / "tokenizer.json").unlink(), "no such file: "),
    "neither settings nor metrics": (lambda qa: (qa / "reader.json").unlink(), "no such file: "),
    "settings of an embedding model": (
        lambda qa: (qa / "reader.json").write_text('{"max_seq_length_q": 4}'),
        "reader.json lacks max_query_length"),
    "no folder": (lambda qa: qa.rename(qa.parent / "other"), "no such folder: "),
}  # fmt: skip


@pytest.mark.parametrize("name", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("case", MODEL_FILES)
def test_a_folder_that_cannot_be_run_is_a_line(
    case: str, name: str, qa: Path, capfd: pytest.CaptureFixture
) -> None:
    spoil, line = MODEL_FILES[case]
    spoil(qa)
    with pytest.raises(UserError) as error:
        Reader(str(qa), runtime=name)
    assert line in str(error.value) and "\n" not in str(error.value)
    assert capfd.readouterr().err == ""  # no words of a library's either


def test_every_cut_of_a_file_is_seen(qa: Path) -> None:
    path = qa / "model.onnx"
    whole = path.read_bytes()
    assert runtime._is_whole(str(path))
    for length in {*range(0, len(whole), 101), *range(len(whole) - 20, len(whole))}:
        path.write_bytes(whole[:length])
        assert not runtime._is_whole(str(path)), length


@pytest.mark.parametrize("given_as", ["qa", "qa/", "qa/model.onnx", "./qa/../qa", "~/qa"])
def test_a_folder_may_be_given_by_its_file(
    given_as: str, qa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(qa.parent)
    monkeypatch.setenv("HOME", str(qa.parent))
    assert Reader(given_as)("who", "x alpha x")[0].text == "alpha"


def test_model_onnx_in_the_folder_where_one_is(qa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(qa)
    assert Reader("model.onnx")("who", "x alpha x")[0].text == "alpha"


@pytest.mark.parametrize("written,read", [({}, 1.0), ({"temperature": 2}, 2.0)])
def test_a_folder_without_a_temperature_has_1(
    written: dict[str, int], read: float, qa: Path
) -> None:
    (qa / "reader.json").write_text(json.dumps({**SETTINGS, **written}))
    assert qa_model.load(str(qa), runtime.Runtime("onnxruntime")).temperature == read


def test_a_setting_that_training_writes_for_embedders_is_read(tmp_path: Path) -> None:
    record = {"max_seq_length_q": 12, "max_seq_length_c": 34}
    record |= {"special_ids": {"cls": 2, "sep": 3, "pad": 0}}
    (tmp_path / "reader.json").write_text(json.dumps(record))
    found = model_settings.read_settings(
        str(tmp_path), "--model_emb", model_settings.EMBEDDING, make_tokenizer(), 34
    )
    assert found.lengths == {"max_seq_length_q": 12, "max_seq_length_c": 34}
    assert found.special == SPECIAL and found.null_threshold is None


# ------------------------------------------------------------------------------------------------
# Answers


def random_logits(seed: int, scale: float) -> runtime.Infer:
    """Logits that depend on a window's tokens alone."""

    def infer(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, ...]:
        own = hash(tuple(arrays["input_ids"][0].tolist()))
        rng = np.random.default_rng([seed, own % 2**32])
        return tuple(rng.standard_normal((2, *arrays["input_ids"].shape)) * scale)

    return infer


@PROPERTY
@given(
    words=st.integers(1, 40),
    top_k=st.integers(1, 6),
    most=st.integers(1, 12),
    seed=st.integers(0, 9),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_answers_are_the_best_of_all_windows_that_do_not_overlap(
    words: int, top_k: int, most: int, seed: int, scale: float
) -> None:
    """By a plain search: all spans of all windows, the best first, less those that overlap."""
    text = " ".join("abcdefgh"[i % 8] for i in range(words))  # a token every second character
    infer = random_logits(seed, scale)
    model = make_reader(infer, length=18, max_answer_length=most, temperature=2.0)
    found = model("a b", text, top_k=top_k)
    ids = [VOCABULARY[letter] for letter in text.split()]
    room = 18 - 5
    spans: dict[tuple[int, int], tuple[int, float]] = {}
    starts = [0] if words <= room else [*range(0, words - room, 8), words - room]
    for first in starts:
        part = ids[first : first + room]
        row = [2, VOCABULARY["a"], VOCABULARY["b"], 3, *part, 3]
        start, end = infer({"input_ids": np.array([row + [0] * (18 - len(row))])})
        for odds, i, j in all_spans(
            start[0, : len(row)].tolist(), end[0, : len(row)].tolist(), 4, most
        ):
            span, around = (first + i - 4, first + j - 4), min(i - 4, len(row) - 2 - j)
            if around > spans.get(span, (-1, 0.0))[0]:  # counts where it has most around it
                spans[span] = around, odds
    expected: list[tuple[float, int, int]] = []
    for (i, j), (_, odds) in sorted(spans.items(), key=lambda each: -each[1][1]):
        if len(expected) < top_k and all(j < a or i > b for _, a, b in expected):
            expected.append((odds, i, j))
    assert [(each.start, each.end) for each in found] == [
        (2 * i, 2 * j + 1) for _, i, j in expected
    ]
    total = log_sum([0.0, *(odds / 2 for _, odds in spans.values())])
    assert [each.score for each in found] == pytest.approx(
        [np.exp(odds / 2 - total) for odds, _, _ in expected]
    )


def test_scores_of_paragraphs_compare() -> None:
    """One softmax over the spans of all paragraphs: what is certain in a window alone is not, if
    another window has more odds against [CLS]."""

    def infer(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        ids = arrays["input_ids"]
        logits = np.full(ids.shape, -50.0, np.float32)
        for letter, value in (("c", 3.0), ("d", 1.0)):
            logits[ids == VOCABULARY[letter]] = value
        logits[:, 0] = 0
        return logits, logits

    model = make_model(infer, temperature=2.0, threshold=1.0)
    c, d = model.spans(["a d b", "c b"], "a", 1)
    total = 1 + np.exp(3) + np.exp(1)
    assert (c.text, c.start, d.text, d.start) == (1, 0, 0, 2)
    assert [c.score, d.score] == pytest.approx([np.exp(3) / total, np.exp(1) / total])
    assert d.probability > 0.5  # in its window
    assert not c.no_answer and not d.no_answer
    (nothing,) = model.spans(["b b"], "a", 1)
    assert nothing.no_answer and nothing.score < 1e-9


def near_one_place(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Logits of a model whose 200 best spans all hold one token."""
    position = np.arange(arrays["input_ids"].shape[1], dtype=np.float32)[None]
    return -np.abs(position - 20) + 5.0 * (position <= 20), -np.abs(position - 22) + 5.0 * (
        position >= 22
    )


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
def test_three_answers_where_there_are_three(top_k: int) -> None:
    model = make_reader(near_one_place, length=64)
    found = model("a", "a b c d e f g h i j k l m n o p q r s t u v w x y z", top_k=top_k)
    assert len(found) == top_k
    for i, each in enumerate(found):
        assert all(each.end <= a.start or each.start >= a.end for a in found[:i])


def test_answers_do_not_share_a_character_that_has_several_tokens() -> None:
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    model = Reader(replace(make_model(random_logits(0, 1.0)), tokenizer=tokenizer))
    found = model("a", "😀🎉", top_k=9)  # of four tokens each
    spans = sorted((each.start, each.end) for each in found)
    assert spans in ([(0, 1), (1, 2)], [(0, 2)])


def test_fewer_answers_where_there_are_fewer() -> None:
    assert [each.text for each in make_reader()("who", "Ada")] == ["Ada"]
    assert make_reader()("who", "") == []
    assert make_reader()("who", "\u200b\ufeff") == []


def test_the_longest_answer_is_as_long_as_the_settings_say() -> None:
    def infer(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        position = np.arange(arrays["input_ids"].shape[1])[None]
        return np.where(position == 4, 20.0, 0), np.where(position == 12, 20.0, 0)

    text = "a b c d e f g h i j k l"
    answers = [make_reader(infer, max_answer_length=n)("a", text, top_k=1)[0].text for n in (8, 9)]
    assert "b c d e f g h i j" in (answers[1], text[2:19])
    assert len(answers[1].split()) == 9 and len(answers[0].split()) <= 8


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_a_line(value: float) -> None:
    def infer(arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        start, end = by_names(arrays)
        end[0, 3] = value
        return start, end

    line = "--model: models/qa gives numbers that are not finite"
    with pytest.raises(UserError, match=line):
        make_reader(infer)("who", "Ada of Velmora")


def test_one_answer_of_two_parts_that_share_it_counts_once() -> None:
    text = "a b Ada c d"
    model = Reader(make_model(), make_embedder(CountingEmbedder(), max_c=6), search="dense")
    found = model.add([("f.txt", text.encode())])("who", top_k=9)
    assert len(model.paragraphs("who")) == 2
    assert [each.text for each in found if "Ada" in each.text] == ["Ada"]
    assert all(text[each.start : each.end] == each.text for each in found)


@pytest.mark.parametrize("lead,first", [(2.9, "velmora"), (3.1, "ada")])
def test_the_search_counts_beside_the_reader(lead: float, first: str) -> None:
    """velmora leads ada by 6 in log odds, and each standard deviation of the search counts 2."""
    found = [
        search.Found(Paragraph("a ada", "f", 1, 0), 1.0 + lead, None),
        search.Found(Paragraph("a velmora", "f", 3, 9), 1.0, 0.5),
    ]
    spans = reader.read(make_model(), found, "who", 9)
    best = found[spans[0].text].paragraph.text[spans[0].start : spans[0].end]
    assert best == first
    assert sum(each.score for each in spans) <= 1


# ------------------------------------------------------------------------------------------------
# Long paragraphs

SENTENCE = st.lists(st.sampled_from(["ada", "of", "velmora,", "x-y", "(b)", "1.5", "U.S.",
                                     "a" * 9, "東京"]), min_size=1, max_size=25)  # fmt: skip


@PROPERTY
@given(sentences=st.lists(SENTENCE, min_size=1, max_size=9), room=st.integers(4, 62))
def test_parts_hold_every_answer_and_are_short_enough(
    sentences: list[list[str]], room: int
) -> None:
    text = " ".join(" ".join(words).capitalize() + "." for words in sentences)
    tokenizer = make_tokenizer()
    parts = [each for each, _ in search.cut_long([Paragraph(text, "f", 1, 0)], tokenizer, room)]
    for each in parts:
        assert text[each.start : each.start + len(each.text)] == each.text
        assert len(tokenizer.encode(each.text, add_special_tokens=False).ids) <= room
    offsets = tokenizer.encode(text, add_special_tokens=False).offsets
    longest = min(squad_utils.MAX_ANSWER_LENGTH, room // 2)
    if max(map(len, text.split())) * 2 > room:
        return  # words that are longer than a part have to be cut
    ends = [each.start + len(each.text) for each in parts]
    assert ends == sorted(set(ends))  # no part lies within another
    for first in range(len(offsets)):
        begin, end = offsets[first][0], offsets[min(first + longest, len(offsets)) - 1][1]
        assert any(p.start <= begin and end <= p.start + len(p.text) for p in parts)


PARTS: dict[str, tuple[str, int, list[str] | None]] = {
    "short": ("Ada of Velmora.", 5, ["Ada of Velmora."]),
    "sentences": (
        "Ada a b c. Ada d e f. Ada g h i. Ada j k l.", 10,
        ["Ada a b c. Ada d e f.", "Ada d e f. Ada g h i.", "Ada g h i. Ada j k l."]),
    "words": ("a b c d e f g h", 4, ["a b c d", "c d e f", "e f g h"]),
    "lines": ("a b c\nd e f\ng h i", 7, ["a b c\nd e f", "d e f\ng h i"]),
    "line ends of all kinds": (
        "a b\r\nc d\re f\ng h", 4, ["a b\r\nc d", "c d\re f", "e f\ng h"]),
    "Chinese": ("東京塔。大阪城。京都寺。", 8, ["東京塔。大阪城。", "大阪城。京都寺。"]),
    "a word that is too long": ("abcdefghij", 4, ["abcd", "cdef", "efgh", "ghij"]),
    "marks at a cut": ("e\u0301 o\u0301 u\u0301 i\u0301", 2,
                       ["e\u0301 o\u0301", "o\u0301 u\u0301", "u\u0301 i\u0301"]),
    "no tokens": ("\u200b\ufeff", 4, []),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_long_paragraph_is_cut_at_sentences_or_at_words(name: str) -> None:
    text, room, expected = PARTS[name]
    cut = search.cut_long([Paragraph(text, "f", 3, 7)], make_tokenizer(), room)
    parts = [each for each, _ in cut]
    assert [each.text for each in parts] == expected
    for each in parts:
        assert text[each.start - 7 :].startswith(each.text)
        assert each.line == 2 + len(re.split("\r\n|\r|\n", text[: each.start - 7]))


# ------------------------------------------------------------------------------------------------
# The index


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    """A folder with ten paragraphs in four files."""
    write(
        tmp_path / "docs",
        a_txt="ada\n\nb\n\nc",
        d_txt="d\n\ne",
        sub__f_txt="f\n\ng",
        sub__h_txt="h\n\ni\n\nj",
    )
    return tmp_path / "docs"


def indexed(embedder: Embedder, *paths: str) -> search.ContextIndex:
    return search.build_index(documents.read_paragraphs(paths), embedder, "dense")


def embedded(docs: Path, *paths: str, key: str = "key") -> list[str]:
    """Build an index; the texts that were embedded for it."""
    model = CountingEmbedder()
    indexed(make_embedder(model, key), *(str(docs / path) for path in paths))
    return sorted(model.texts)


CALLS: dict[str, list[tuple[tuple[str, ...], int]]] = {  # paths -> how many texts are embedded
    "the same again": [(("",), 10), (("",), 0)],
    "a smaller call": [(("",), 10), (("d.txt",), 0), (("",), 0)],
    "a larger call": [(("d.txt",), 2), (("sub",), 5), (("",), 3)],
    "another order": [(("a.txt", "sub"), 8), (("sub", "a.txt"), 0)],
    "the first path is another": [(("sub/f.txt", "a.txt"), 5), (("d.txt", "sub/f.txt"), 2)],
    "a folder by another path": [(("",), 10), (("sub/..",), 0), (("sub/../sub/../d.txt",), 0)],
}


@pytest.mark.parametrize("name", CALLS)
def test_what_was_embedded_once_stays(name: str, docs: Path) -> None:
    for paths, count in CALLS[name]:
        assert len(embedded(docs, *paths)) == count


def test_the_index_drops_what_is_gone_alone(docs: Path) -> None:
    embedded(docs, "")
    (docs / "a.txt").write_text("ada\n\nother")
    (docs / "sub" / "f.txt").unlink()
    assert embedded(docs, "") == ["o ##t ##h ##e ##r"]
    saved = {
        name
        for folder in (docs, docs / "sub")
        for name, _ in search._read_saved(str(folder), "key")
    }
    assert saved == {"a.txt", "d.txt", "h.txt"}
    digests = [digest for _, digest in search._read_saved(str(docs), "key")]
    assert len(digests) == 4  # ada, other; d, e


def test_the_index_is_of_one_model(docs: Path) -> None:
    embedded(docs, "")
    assert len(embedded(docs, "", key="other")) == 10


def test_a_tokenizer_that_changed_makes_the_index_anew(
    qa: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {**SETTINGS, "max_seq_length_q": 8, "max_seq_length_c": 16}
    (qa / "reader.json").write_text(json.dumps(record))
    outputs = model_settings.Kind(
        "", "", ("output_s", "output_e"), model_settings.EMBEDDING.lengths, False
    )
    monkeypatch.setattr(search, "EMBEDDING", outputs)
    keys = [search.load_embedder(str(qa), runtime.Runtime()).key]
    path = qa / "tokenizer.json"
    path.write_text(path.read_text().replace("alpha", "alphb"))
    keys.append(search.load_embedder(str(qa), runtime.Runtime()).key)
    (qa / "reader.json").write_text(
        json.dumps({**record, "special_ids": {"cls": 2, "sep": 1, "pad": 0}})
    )
    keys.append(search.load_embedder(str(qa), runtime.Runtime()).key)
    assert len(set(keys)) == 3


@pytest.mark.parametrize("at", [0, 1, 8])
def test_ctrl_c_keeps_what_is_embedded(at: int, docs: Path) -> None:
    model = CountingEmbedder()
    model.stops_at = at
    with pytest.raises(Interrupted) as stop:
        indexed(make_embedder(model), str(docs))
    assert stop.value.signal_number == signal.SIGINT
    assert str(stop.value) == (
        f"stopped: {at} of 10 new paragraphs are indexed; the same command goes on from there"
    )
    assert len(embedded(docs, "")) == 10 - at
    assert not list(docs.rglob(".*npz.*")) and len(list(docs.rglob(".*"))) == 2


def test_a_kill_keeps_what_was_saved_on_the_way(
    docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each text is saved here at once; what a kill leaves is what there was before the last."""
    monkeypatch.setattr(search, "SAVE_SECONDS", -1)
    counts = []
    original = search._save

    def counted(*args: Any) -> None:
        original(*args)
        counts.append(sum(len(search._read_saved(str(f), "key")) for f in (docs, docs / "sub")))

    monkeypatch.setattr(search, "_save", counted)
    assert len(embedded(docs, "")) == 10
    assert set(range(1, 11)) <= set(counts)


def test_two_writers_leave_a_whole_index(docs: Path) -> None:
    vectors = {("a.txt", str(i)): np.full(500, i, np.float32) for i in range(40)}
    problems: list[BaseException] = []

    def write_often(first: int) -> None:
        try:
            for i in range(first, 40, 2):
                search._save(str(docs), "key", {("a.txt", str(i)): vectors["a.txt", str(i)]})
                assert search._read_saved(str(docs), "key")
        except BaseException as problem:
            problems.append(problem)

    writers = [threading.Thread(target=write_often, args=(first,)) for first in (0, 1)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert problems == []
    assert len(list(docs.glob(".*"))) == 1


@pytest.mark.parametrize(
    "texts,count",
    [
        (["ada", "ada", "ada"], 1),
        (["ada of", "ada\nof", "ada  of"], 1),
        (["ada of", "ada\r\nof"], 1),
        (["ada", "Ada"], 2),
    ],
)
def test_equal_paragraphs_count_once(texts: list[str], count: int, tmp_path: Path) -> None:
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_bytes(f"{text}\n\nother".encode())
    embedder = make_embedder(CountingEmbedder())
    index = indexed(embedder, str(tmp_path))
    assert len(index.paragraphs) == count + 1
    nearest = index.nearest("ada", 5)
    assert len(nearest) == count + 1
    assert nearest[0][0].path.endswith("0.txt")


def test_a_pipe_is_indexed_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    read_end, write_end = os.pipe()
    os.write(write_end, b"ada\n\nb")
    os.close(write_end)
    index = indexed(make_embedder(CountingEmbedder()), f"/dev/fd/{read_end}")
    os.close(read_end)
    assert [each.text for each in index.paragraphs] == ["ada", "b"]
    assert list(tmp_path.iterdir()) == []


def test_a_file_whose_name_is_not_utf8_is_kept_in_the_index(tmp_path: Path) -> None:
    odd_name(tmp_path)
    assert len(embedded(tmp_path, "")) == 1
    assert len(embedded(tmp_path, "")) == 0


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_vectors_that_are_not_finite_are_a_line(value: float, docs: Path) -> None:
    model = CountingEmbedder()
    model.factor = np.float32(value)
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(UserError, match="--model_emb: models/emb gives numbers that are not fini"),
    ):
        indexed(make_embedder(model), str(docs))
    assert not list(docs.rglob(".*"))


@pytest.mark.parametrize("norm", [0.0, 1e3, 1e5, 1e8])
def test_distances_keep_their_digits_whatever_the_norms(norm: float) -> None:
    rng = np.random.default_rng(0)
    middle = norm * rng.standard_normal(64) / 8
    vectors = (middle + rng.standard_normal((5000, 64)) * max(1, norm / 1e4)).astype(np.float32)
    query = (middle + 0.1 * rng.standard_normal(64)).astype(np.float32)
    exact = np.linalg.norm(vectors.astype(np.float64) - query.astype(np.float64), axis=1)
    paragraphs = [Paragraph("", "f", i, 0) for i in range(5000)]
    embedder = make_embedder(lambda _: (query[None],))
    found = search.ContextIndex(paragraphs, "dense", embedder, vectors, None).nearest("ada", 5)
    assert [each.paragraph.line for each in found] == np.argsort(exact, kind="stable")[:5].tolist()
    assert [each.distance for each in found] == pytest.approx(np.sort(exact)[:5], rel=1e-9)


# ------------------------------------------------------------------------------------------------
# Search by vectors, by words, by both

SEARCHED = ["ada b c d", "velmora b c", "ada velmora b b c d e f g", "h i j", "ada", "東京 e"]
WITHOUT_EMBEDDER = search.Words(make_tokenizer(), 62)


def paragraphs_of(texts: list[str]) -> list[Paragraph]:
    return [Paragraph(text, "f", i, 100 * i) for i, text in enumerate(texts)]


def bm25(texts: list[str], question: str) -> np.ndarray:
    """Lucene's BM25 with k1 = 1.5, b = 0.75, by its formula: float64 [texts]."""
    rows = [text.split() for text in texts]
    mean = sum(map(len, rows)) / len(rows)
    scores = np.zeros(len(rows))
    for token in question.split():
        frequency = sum(token in row for row in rows)
        idf = math.log(1 + (len(rows) - frequency + 0.5) / (frequency + 0.5))
        for i, row in enumerate(rows):
            count = row.count(token)
            scores[i] += idf * count / (count + 1.5 * (0.25 + 0.75 * len(row) / mean))
    return scores


@pytest.mark.parametrize("question", ["ada", "velmora d", "ada ada b", "of i j", "g"])
def test_a_search_by_words_ranks_by_bm25(question: str) -> None:
    texts = SEARCHED[:5]
    expected = bm25(texts, question)
    index = search.build_index(paragraphs_of(texts), WITHOUT_EMBEDDER)
    found = index.nearest(question, 9)
    order = [i for i in np.argsort(-expected, kind="stable") if expected[i] > 0]
    assert [each.paragraph.text for each in found] == [texts[i] for i in order]
    standardised = (expected - expected.mean()) / (expected.std() or 1)
    assert [each.score for each in found] == pytest.approx(standardised[order], rel=1e-5)
    assert {each.distance for each in found} == {None}


@pytest.mark.parametrize("question", ["k", "", "☃", "☃ k"])
def test_a_search_by_words_finds_nothing_if_no_word_is_shared(question: str) -> None:
    paragraphs = paragraphs_of([*SEARCHED[:5], "☃ ada"])  # an unknown word in both is no match
    assert search.build_index(paragraphs, WITHOUT_EMBEDDER).nearest(question, 9) == []


@pytest.mark.parametrize("question", ["ada", "velmora d", "b h", "k"])
def test_a_hybrid_search_adds_the_reciprocal_ranks(question: str) -> None:
    embedder = make_embedder(CountingEmbedder())
    paragraphs = paragraphs_of(SEARCHED)
    found = {
        method: search.build_index(paragraphs, embedder, method).nearest(question, 9)
        for method in search.SEARCHES
    }
    ranks = dict.fromkeys(paragraphs, 0.0)
    for method in ("dense", "bm25"):
        for rank, each in enumerate(found[method], 1):
            ranks[each.paragraph] += 1 / (search.RANK_OFFSET + rank)
    order = [each.paragraph for each in found["hybrid"]]
    assert order == sorted(paragraphs, key=lambda each: -ranks[each])
    by_vector = {each.paragraph: each for each in found["dense"]}
    by_words = {each.paragraph: each.score for each in found["bm25"]}
    for each in found["hybrid"]:
        assert each.distance == by_vector[each.paragraph].distance
        if each.paragraph in by_words:
            both = (by_vector[each.paragraph].score + by_words[each.paragraph]) / 2
            assert each.score == pytest.approx(both)


@pytest.mark.parametrize("count", [1, 3])
def test_paragraphs_that_match_alike_have_the_score_0(count: int) -> None:
    paragraphs = paragraphs_of([f"ada{' ' * i} b" for i in range(1)] + ["b ada"] * (count - 1))
    index = search.build_index(paragraphs, make_embedder(CountingEmbedder()))
    assert {each.score for each in index.nearest("ada", 9)} == {0.0}


def test_without_a_method_the_search_is_the_best_there_is() -> None:
    assert search.check_method(None, True) == "hybrid"
    assert search.check_method(None, False) == "bm25"


@pytest.mark.parametrize(
    "method,has_embedder,message",
    [
        ("dense", False, "--search=dense needs --model_emb; --search=bm25 needs none"),
        ("hybrid", False, "--search=hybrid needs --model_emb"),
        ("best", True, "--search=best is not one of dense, bm25, hybrid"),
    ],
)
def test_a_search_without_what_it_needs_is_a_line(
    method: str, has_embedder: bool, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        search.check_method(method, has_embedder)


def test_without_bm25s_a_line_names_it_and_vectors_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    monkeypatch.setattr(search.importlib.util, "find_spec", lambda _: None)
    model, paragraphs = make_embedder(CountingEmbedder()), paragraphs_of(SEARCHED)
    with pytest.raises(UserError, match="needs bm25s: pip install bm25s, or --search=dense"):
        search.build_index(paragraphs, model)
    with pytest.raises(UserError, match=r"needs bm25s: pip install bm25s$"):
        search.build_index(paragraphs, WITHOUT_EMBEDDER)
    assert search.build_index(paragraphs, model, "dense").nearest("ada", 1)[0].distance == 0


def test_a_search_by_words_makes_no_vectors_and_saves_nothing(docs: Path) -> None:
    model = CountingEmbedder()
    paragraphs = documents.read_paragraphs([str(docs)])
    found = search.build_index(paragraphs, make_embedder(model), "bm25").nearest("ada", 9)
    assert [each.paragraph.text for each in found] == ["ada"]
    assert not model.texts
    assert not list(docs.rglob(".*"))


def test_twenty_threads_find_what_one_finds() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdefghij"), 6)) for _ in range(300)]
    index = search.build_index(paragraphs_of(texts), WITHOUT_EMBEDDER)
    questions = texts[:200]
    expected = [index.nearest(each, 5) for each in questions]
    with ThreadPoolExecutor(20) as threads:
        assert list(threads.map(lambda each: index.nearest(each, 5), questions)) == expected
