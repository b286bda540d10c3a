"""The command line that all scripts share: errors, the argument parser, number checks.

Only the standard library is imported here: ask.py must not wait for torch.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
import io
import json
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

MAIN_PROCESS_SECONDS = 10.0  # other processes wait so long before they report an error
PATHS = ("FILE", "FOLDER", "MODEL")  # metavars of flags whose values may be paths
BYTE_ORDER_MARKS = (  # longest first: the mark of UTF-32 begins with that of UTF-16
    (b"\xff\xfe\0\0", "UTF-32"),
    (b"\0\0\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)


class UserError(Exception):
    """A user's mistake: one line that names the file, flag or value, and says what is right."""


class UnreadableError(Exception):
    """Why a file cannot be read, as the end of a sentence that begins with its name."""


class Interrupted(Exception):
    """The run was asked to stop (Ctrl-C, SIGTERM); the message says how to resume it.

    Attributes:
        signal_number: the signal; the exit code is 128 + signal_number.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the error's name if the message is empty."""
    return (str(error).strip() or repr(error)).splitlines()[0]


@contextlib.contextmanager
def in_one_line(what: str, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Turn a library's errors into UserErrors that read "`what`: <first line of the error>".

    Args:
        kinds: the errors to turn. UserError and Interrupted pass unchanged.
    """
    try:
        yield
    except (UserError, Interrupted):
        raise
    except kinds as error:
        raise UserError(f"{what}: {first_line(error)}") from None


class HelpFormatter(argparse.HelpFormatter):
    """Adds to each flag's help that the flag is required, or its default.

    If the default is None, the help itself says what happens without the flag.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.required:
            return f"{action.help} (required)"
        if action.default is False:
            return f"{action.help} (default: off)"
        if action.default in (None, argparse.SUPPRESS):
            return action.help
        return f"{action.help} (default: %(default)s)"

    def _split_lines(self, text: str, width: int) -> list[str]:
        # A default longer than a line stays in one piece, so that it can be copied.
        return textwrap.wrap(
            " ".join(text.split()), width, break_long_words=False, break_on_hyphens=False
        )


class ArgumentParser(argparse.ArgumentParser):
    """argparse with one-line errors, close matches for unknown flags, defaults in --help.

    Args:
        groups: titles of the groups of flags, in the order in which --help shows them.
    """

    def __init__(self, groups: Sequence[str] = (), **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=HelpFormatter, **kwargs)
        for title in groups:
            self.group(title)

    def group(self, title: str) -> argparse._ArgumentGroup:
        """The group of flags with this title; --help does not show a group without flags."""
        found = [each for each in self._action_groups if each.title == title]
        return found[0] if found else self.add_argument_group(title)

    def format_usage(self) -> str:
        """The required flags alone: the list of all flags follows in --help."""
        required = [
            f"{a.option_strings[-1]} ..." if a.option_strings else f"{a.metavar} ..."
            for a in self._actions
            if a.required
        ]
        words = f"usage: {self.prog} {' '.join(required)} [--flag=value ...]"
        return textwrap.fill(
            " ".join(words.split()), 80, subsequent_indent=" " * 7, break_on_hyphens=False
        )

    def format_help(self) -> str:
        self.usage = self.format_usage().removeprefix("usage: ").replace("%", "%%")
        return super().format_help()

    def parse_args(  # type: ignore[override]  # the library's method takes other namespaces too
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].split("=")[0]
            raise UserError(f"unknown argument {unknown[0]}{self._close_matches(flag)}")
        return parsed

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        if action.metavar in PATHS:  # a shell does not expand the ~ in --flag=~/x
            arg_string = os.path.expanduser(arg_string)
        return super()._get_value(action, arg_string)

    def _close_matches(self, flag: str) -> str:
        close = difflib.get_close_matches(flag, self._option_string_actions, n=3)
        return f"; did you mean {' or '.join(close)}?" if close else f"; see {self.prog} --help"

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def is_main_process() -> bool:
    """Whether this process prints: it has rank 0, or it is the only one."""
    return int(os.environ.get("RANK", "0")) == 0


def warn(message: str) -> None:
    """Print one line ``warning: ...`` to stderr; the main process alone does so."""
    if is_main_process():
        print(f"warning: {message}", file=sys.stderr, flush=True)


def tell(message: str) -> None:
    """Print one line ``note: ...`` to stderr; the main process alone does so."""
    if is_main_process():
        print(f"note: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _main_process_first() -> Iterator[None]:
    """Let a process other than the main one wait before it reports an error.

    Often the main process fails too, or first. It then reports its error and ends, and torchrun
    ends the waiting processes. Otherwise this process reports its own error after the wait.
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


def memory_is_full(error: RuntimeError) -> bool:
    """Whether torch says that a GPU's memory is full.

    Its allocator has an error of its own, known by its name since this module does not import
    torch. CUDA and cuBLAS only say so in their texts.
    """
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return any(part in str(error) for part in ("CUDA error: out of memory", "STATUS_ALLOC_FAILED"))


def run_main(main: Callable[[], None]) -> NoReturn:
    """Run a script's ``main``; turn mistakes and interruptions into one line and an exit code.

    Exit codes: 0 done, 2 a user's mistake, 128 + n stopped by signal n.
    """
    code, message = 0, ""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        _prepare_streams()
        with _main_process_first():
            main()
        sys.stdout.flush()
    except UserError as error:
        code, message = 2, f"error: {error}"
    except BrokenPipeError:  # the reader of our output is gone, as `| head` is after ten lines
        pass
    except OSError as error:  # most often a full disk; UserErrors cover other causes
        where = f"{error.filename}: " if error.filename else ""
        code, message = 2, f"error: {where}{error.strerror or error}"
    except RuntimeError as error:
        if not memory_is_full(error):  # training handles its own
            raise
        code, message = (
            2,
            (
                "error: the GPU's memory is full. Use a smaller --per_gpu_eval_batch_size, or close"
                " other programs on the GPU; the same command resumes from the last saved state"
            ),
        )
    except Interrupted as stop:
        code, message = 128 + stop.signal_number, str(stop) if is_main_process() else ""
    except KeyboardInterrupt:
        code = 130
        message = "stopped before there was anything to save" if is_main_process() else ""
    if message:
        print(message, file=sys.stderr, flush=True)
    try:
        sys.stdout.flush()
    except (OSError, AttributeError):  # its reader is gone, its disk full, or it was never open
        # Python flushes once more at exit, and would print an error of its own.
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.exit(code)


def _prepare_streams() -> None:
    """Make stdout and stderr safe to write to, however this process was started.

    stdout replaces characters that it cannot show. A closed stderr becomes one that drops all
    text. A closed stdin stays None.

    Raises:
        UserError: stdout is closed.
    """
    # C libraries print to descriptors 1 and 2, so no file that is opened later may get these.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w")
    if sys.stdout is None:
        raise UserError("stdout is closed; > /dev/null drops all output")
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
    """A hint about an unknown name: the nearest known name, or all of them."""
    names = list(known)
    close = difflib.get_close_matches(given, names, n=1)
    return f"did you mean {close[0]}?" if close else f"known are {', '.join(names)}"


def key_values(text: str, flag: str, kinds: dict[str, Callable[[str], Any]]) -> dict[str, Any]:
    """The values of a flag's "key:value,key:value".

    Args:
        kinds: for each known key, the function that turns a text into its value: `number`, or a
            function whose ValueError says what the text should be.

    Raises:
        UserError: a key is unknown or given twice, or a value is not of its kind.
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
        except argparse.ArgumentTypeError as error:  # from `number`; it names the value
            raise UserError(f"{flag}: {key}:{error}") from None
    return values


def one_of(*values: Any) -> Callable[[str], Any]:
    """A kind for `key_values`: one of these values, written as `str` writes it."""
    texts = {str(value): value for value in values}

    def parse(text: str) -> Any:
        if text not in texts:
            raise ValueError(f"one of {', '.join(texts)}")
        return texts[text]

    return parse


def decode(data: bytes) -> str:
    """The text in UTF-8 bytes, with a byte order mark if there is one.

    Raises:
        UnreadableError: the bytes are not UTF-8, or contain NULs, which no text does.
    """
    for mark, name in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            raise UnreadableError(f"is {name}, not UTF-8: iconv -f {name} -t UTF-8 converts it")
    if b"\0" in data:
        raise UnreadableError(
            f"has NUL bytes (the first is byte {data.index(0)}), so it is UTF-16 or no text"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise UnreadableError(f"is not UTF-8 text (byte {error.start})") from None


def read_text(path: str, flag: str) -> str:
    """The text of a UTF-8 file, without a byte order mark; ends of lines stay as they are.

    Raises:
        UserError: the file is missing, a folder, unreadable or not UTF-8; names flag and path.
    """
    try:
        with open(path, "rb") as file:
            return decode(file.read()).removeprefix("\ufeff")
    except FileNotFoundError:
        raise UserError(f"{flag}: no such file: {path}") from None
    except IsADirectoryError:
        raise UserError(f"{flag}: {path} is a folder, a file is needed") from None
    except OSError as error:
        raise UserError(f"{flag}: cannot read {path}: {error.strerror or error}") from None
    except UnreadableError as error:
        raise UserError(f"{flag}: {path} {error}") from None


def read_object(path: str, flag: str, remedy: str = "") -> dict[str, Any]:
    """The object in a JSON file.

    Args:
        remedy: the end of the message if the file does not hold an object.

    Raises:
        UserError: as `read_text`, or the file is not JSON, or not an object.
    """
    text = read_text(path, flag)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:  # numbers too long, lists too deep
        raise UserError(f"{flag}: {path} is not JSON: {error}{remedy}") from None
    if not isinstance(value, dict):
        raise UserError(f"{flag}: {path} is not a JSON object{remedy}")
    return value
