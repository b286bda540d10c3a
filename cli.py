"""The command line that all scripts share: errors, the argument parser, number checks.

Only the standard library is imported here: ask.py must not wait for torch.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

MAIN_PROCESS_SECONDS = 10.0  # that the main process has to tell an error before others tell it
PATHS = ("FILE", "FOLDER", "MODEL")  # metavars of flags whose values may be paths


class UserError(Exception):
    """A mistake of the user's: one line that names the file, flag or value and what is right."""


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM); the message says how to go on.

    Attributes:
        signal_number: the signal, which gives the exit code 128 + signal_number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def first_line(error: BaseException) -> str:
    """What an error says, in one line; its name where it says nothing."""
    return (str(error).strip() or repr(error)).splitlines()[0]


@contextlib.contextmanager
def in_one_line(what: str, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Around calls of a library: its errors become ours, "`what`: <first line of the error>".

    Args:
        kinds: the errors that become ours; those that are ours already stay as they are.
    """
    try:
        yield
    except (UserError, Interrupted):
        raise
    except kinds as error:
        raise UserError(f"{what}: {first_line(error)}") from None


class HelpFormatter(argparse.HelpFormatter):
    """Says of each flag that it is required, or its default. Where None is the default, what that
    means is said by the flag's own help."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required:
            return f"{action.help} (required)"
        if action.default is False:
            return f"{action.help} (default: off)"
        if action.default in (None, argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: %(default)s)"

    def _split_lines(self, text: str, width: int) -> list[str]:
        # A default that is longer than a line stays whole, to be copied.
        return textwrap.wrap(
            " ".join(text.split()), width, break_long_words=False, break_on_hyphens=False
        )


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors, close matches for unknown flags, defaults in --help.

    Args:
        groups: titles of flags in --help, in the order in which it shows them; see `group`.
    """

    def __init__(self, groups: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        for title in groups:
            self.group(title)

    def group(self, title: str) -> argparse._ArgumentGroup:
        """The flags that --help shows under this title; without flags it shows no title."""
        for each in self._action_groups:
            if each.title == title:
                return each
        return self.add_argument_group(title)

    def format_usage(self) -> str:
        """What must be given, alone: the list of all flags follows anyway."""
        required = [f"{a.option_strings[-1]} ..." for a in self._actions if a.required]
        words = f"usage: {self.prog} {' '.join(required)} [--flag=value ...]"
        return textwrap.fill(
            " ".join(words.split()), 80, subsequent_indent=" " * 7, break_on_hyphens=False
        )

    def format_help(self) -> str:
        self.usage = self.format_usage().removeprefix("usage: ").replace("%", "%%")
        return super().format_help()

    def parse_args(  # type: ignore[override]  # the library's also takes namespaces of other kinds
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            raise UserError(f"unknown argument {unknown[0]}{self._close_matches(flag)}")
        return parsed

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if action.metavar in PATHS:  # a shell leaves the ~ of --flag=~/x as it is
            arg_string = os.path.expanduser(arg_string)
        return super()._get_value(action, arg_string)

    def _close_matches(self, flag: str) -> str:
        close = difflib.get_close_matches(flag, self._option_string_actions, n=3)
        return f"; did you mean {' or '.join(close)}?" if close else f"; see {self.prog} --help"

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def is_main_process() -> bool:
    """Whether this process is the one that speaks (rank 0, or not launched in parallel)."""
    return int(os.environ.get("RANK", "0")) == 0


def warn(message: str) -> None:
    """Print one line ``warning: ...`` to stderr, on the main process alone."""
    if is_main_process():
        print(f"warning: {message}", file=sys.stderr, flush=True)


def tell(message: str) -> None:
    """Print one line ``note: ...`` to stderr, on the main process alone."""
    if is_main_process():
        print(f"note: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _main_process_first() -> Iterator[None]:
    """Around a script: an error beside the main process waits before it is told.

    If the main process has it too, or has caused it, that tells it and ends; then torchrun ends the
    others, which say nothing. If not, an error of this process alone is told after all.
    """
    try:
        yield
    except Interrupted:
        raise
    except Exception:
        if not is_main_process():
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            time.sleep(MAIN_PROCESS_SECONDS)
        raise


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a script's ``main``; turn mistakes and interruptions into one line and an exit code.

    Exit codes: 0 done, 2 a user's mistake, 128 + n stopped by signal n.
    """
    code = 0
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _prepare_streams()
        with _main_process_first():
            main()
        sys.stdout.flush()
    except UserError as error:
        code = 2
        print(f"error: {error}", file=sys.stderr, flush=True)
    except BrokenPipeError:  # the reader of our output has gone, as `| head` does
        pass
    except OSError as error:  # most often a full disk; UserErrors name the rest before it matters
        code = 2
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr, flush=True)
    except RuntimeError as error:
        # torch's, by name: this module does without torch. Training has an answer of its own.
        if type(error).__name__ != "OutOfMemoryError":
            raise
        code = 2
        print(
            "error: the GPU's memory is full. A smaller --per_gpu_eval_batch_size takes less,"
            " and so does closing what else runs there; the same command again goes on from"
            " the last saved state",
            file=sys.stderr,
            flush=True,
        )
    except Interrupted as stop:
        code = 128 + stop.signal_number
        if is_main_process():
            print(str(stop), file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        code = 130
        if is_main_process():
            print("stopped before there was anything to save", file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):  # gone, full, or closed from the start
        # Python tries once more as it ends, and would then complain in lines of its own.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def _prepare_streams() -> None:
    """Make this process's streams fit to write to, whatever terminal or shell it was started from.

    Characters that stdout cannot show are replaced. A closed stderr becomes one that drops what it
    is given. A closed stdin stays None.

    Raises:
        UserError: stdout is closed.
    """
    # A file that is opened later must not get the number of a closed stream: C libraries print
    # there.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w")
    if sys.stdout is None:
        raise UserError("stdout is closed; > /dev/null drops what is printed")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def number(
    kind: type, low: float, high: float = float("inf"), low_open: bool = False
) -> Callable[[str], Any]:
    """A finite number of `kind` in [low, high], or (low, high] if low_open.

    For argparse's `type` and as a kind for `key_values`.
    """
    name = {int: "a whole number", float: "a number"}[kind]
    bound = f"over {low:g}" if low_open else f"of at least {low:g}"
    limits = f"{name} {bound}" + ("" if high == float("inf") else f" and at most {high:g}")

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        above = value > low if low_open else value >= low
        if not (above and value <= high) or value == float("inf"):
            raise argparse.ArgumentTypeError(f"{text[:20]!r} is not {limits}")
        return value

    return parse


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """What to say of a name that is not known: the nearest that is, or all that are."""
    names = list(known)
    close = difflib.get_close_matches(given, names, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}"


def key_values(text: str, flag: str, kinds: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    """The values of a flag's "key:value,key:value".

    Args:
        kinds: for each key that there is, the function from a text to its value: `number`, or one
            that raises a ValueError that says what the text should be.

    Raises:
        UserError: a key that is not known or given twice; a value that is not of its kind.
    """
    values: dict[str, Any] = {}
    for item in text.split(","):
        key, colon, value = (part.strip() for part in item.partition(":"))
        if key not in kinds or not colon:
            hint = did_you_mean(key, kinds)
            raise UserError(f"{flag}: {item.strip()!r} is not key:value with a known key; {hint}")
        if key in values:
            raise UserError(f"{flag}: {key} is given twice")
        try:
            values[key] = kinds[key](value)
        except ValueError as error:
            raise UserError(f"{flag}: {key}:{value[:20]} is not {error}") from None
        except argparse.ArgumentTypeError as error:  # which names the value: of `number`
            raise UserError(f"{flag}: {key}:{error}") from None
    return values


def one_of(*values: Any) -> Callable[[str], Any]:
    """A kind for `key_values`: one of some values, written as `str` writes it."""
    texts = {str(value): value for value in values}

    def parse(text: str) -> Any:
        if text not in texts:
            raise ValueError(f"one of {', '.join(texts)}")
        return texts[text]

    return parse


def read_text(path: str, flag: str, newline: str | None = None) -> str:
    """The text of a UTF-8 file.

    Args:
        newline: as of `open`; "" keeps ends of lines as they are.

    Raises:
        UserError: the file is missing, unreadable, a folder, or not UTF-8, or has NUL bytes, which
            no text has; names flag and path.
    """
    try:
        with open(path, encoding="utf-8-sig", newline=newline) as file:
            text = file.read()
    except FileNotFoundError:
        raise UserError(f"{flag}: no such file: {path}") from None
    except IsADirectoryError:
        raise UserError(f"{flag}: {path} is a folder, a file is needed") from None
    except UnicodeDecodeError as error:
        utf_16 = error.object[:2] in (b"\xff\xfe", b"\xfe\xff")
        kind = ", but UTF-16; save it as UTF-8" if utf_16 else f" (byte {error.start})"
        raise UserError(f"{flag}: {path} is not UTF-8 text{kind}") from None
    except OSError as error:
        raise UserError(f"{flag}: cannot read {path}: {error.strerror or error}") from None
    if "\0" in text:
        raise UserError(f"{flag}: {path} is not UTF-8 text: character {text.index(chr(0))} is NUL")
    return text
