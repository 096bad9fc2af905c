"""Text for a terminal. What files, servers and other people's code say is shown, and never obeyed."""

import warnings


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


def print_warnings_safely() -> None:
    """From now on, in this process, no warning is printed raw."""
    spell = warnings.formatwarning
    warnings.formatwarning = lambda *arguments, **named: printable(spell(*arguments, **named))
