"""What a command prints. What files, servers and other people's code say is shown, and never obeyed."""

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

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
        parts = Path(filename).parts
        if verbose or Path(__file__).parent.name in parts or not {"site-packages", "dist-packages"} & {*parts}:
            tqdm.write(printable(f"warning: {message}"), file=sys.stderr)  # beside a progress bar, not through it

    warnings.showwarning = show
