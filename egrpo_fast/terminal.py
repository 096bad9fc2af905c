"""What a command prints. What files, servers and other people's code say is shown, and never obeyed.

What cannot be printed ends nothing.
"""

import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

FOREIGN = {
    "DeepSpeed", "accelerate", "bitsandbytes", "datasets", "deepspeed", "diffusers", "huggingface_hub", "open_clip",
    "peft", "torch", "torchao", "transformers",
}  # fmt: skip
"""Loggers of packages that a run uses. Their warnings are for who develops with them, not for who trains."""


def printable(text: str) -> str:
    """The text with every character that a terminal may act upon spelled as an escape (`\\x1b`).

    That is all that `str.isprintable` refuses: control characters, marks that turn the direction of writing, lone
    surrogates. Line ends and tabs stay.
    """
    return "".join(
        mark if mark.isprintable() or mark in "\n\t" else mark.encode("unicode_escape", "surrogatepass").decode()
        for mark in text
    )


def error_lines(error: BaseException) -> str:
    """What a command prints of an error that the user can mend: first the traceback of the user's own code, if any."""
    lines = [f"error: {line}" for line in str(error).splitlines()]
    return printable(getattr(error, "trace", "") + "\n".join(lines))


class _Logger(logging.Logger):
    def isEnabledFor(self, level: int) -> bool:
        return (level >= logging.ERROR or self.name.partition(".")[0] not in FOREIGN) and super().isEnabledFor(level)


def keep_clean(verbose: bool = False) -> None:
    """From now on, in this process, the terminal shows this project's messages and the user's code's.

    Warnings are one line each, and safe to print. Those of installed packages, and what the packages in FOREIGN log
    below an error, are not shown. verbose: everything is. Call it before these packages are imported.
    """
    if verbose:
        logging.basicConfig(level=logging.INFO)
    else:
        logging.setLoggerClass(_Logger)

    def show(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        path = Path(filename)
        installed = {"site-packages", "dist-packages"} & {*path.parts}
        if verbose or not installed or path.is_relative_to(Path(__file__).parent):
            tqdm.write(printable(f"warning: {message}"), file=sys.stderr)  # beside a progress bar, not through it

    warnings.showwarning = show


class Attempts:
    """Runs what only tells something, such as a log or an image. A failure is a warning and ends nothing.

    Where the same thing fails again and again there is one warning, and another one when it fails after it had worked.
    """

    def __init__(self) -> None:
        self._failing: set[str] = set()

    @contextmanager
    def __call__(self, what: str, then: str = "this is tried again") -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if what not in self._failing:
                why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                # Not `warnings.warn`: Python shows what a line warns of once, however often it happens.
                warnings.warn_explicit(f"{what}: {why}; training goes on, and {then}", UserWarning, __file__, 0)
            self._failing.add(what)
        else:
            self._failing.discard(what)


class _Steady:
    """A stream that takes every text. What cannot be written is lost; the first time `other` says so."""

    def __init__(self, stream: TextIO, name: str, other: TextIO) -> None:
        self._stream, self._name, self._other, self._told = stream, name, other, False

    def write(self, text: str) -> int:
        self._attempt(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, do: Callable[[], object]) -> None:
        try:
            do()
        except OSError as error:
            if not self._told:
                self._told = True
                with suppress(OSError):
                    print(f"{self._name} cannot be written: {error.strerror}", file=self._other, flush=True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def steady_streams() -> None:
    """From now on stdout and stderr raise nothing, also where they are closed, their reader is gone or a disk is full.

    Characters that their encoding does not know are spelled. A descriptor of them that is closed leads to nowhere, else
    the next file that is opened would get its number, and what is printed there.
    """
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.set_inheritable(nowhere, nowhere < 3)
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.dup2(nowhere, descriptor)
    out, err = (stream or os.fdopen(nowhere, "w", closefd=False) for stream in (sys.stdout, sys.stderr))
    for stream in (out, err):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = _Steady(out, "stdout", err), _Steady(err, "stderr", out)  # type: ignore[assignment]
