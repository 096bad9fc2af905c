"""What strangers say is shown on a terminal, and never obeyed."""

import subprocess
import sys
import unicodedata

from egrpo_fast.rewards import RewardError
from egrpo_fast.telling import error_lines, printable


def test_what_a_terminal_may_act_upon_is_spelled():
    assert printable("\x1b[2J\x07 \x9b31m \r \u202e \u2066 \udc80 \0") == (
        "\\x1b[2J\\x07 \\x9b31m \\r \\u202e \\u2066 \\udc80 \\x00"
    )
    kept = "a red circle, é 絵 🙂\tand\n\nlines"
    assert printable(kept) == kept


def test_no_control_or_format_character_is_left():
    everything = "".join(map(chr, range(sys.maxunicode + 1)))
    left = {unicodedata.category(mark) for mark in printable(everything)} - {"Cc"}
    assert not left & {"Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert {mark for mark in printable(everything) if unicodedata.category(mark) == "Cc"} == {"\n", "\t"}


def test_errors_and_their_traceback_are_safe():
    error = RewardError("two\nlines \x1b]0;title\x07", "Traceback\n  \x1b[1m\n")
    assert error_lines(error) == "Traceback\n  \\x1b[1m\nerror: two\nerror: lines \\x1b]0;title\\x07"


def test_a_warning_is_printed_safely():
    code = (
        "import warnings; from egrpo_fast.telling import print_warnings_safely; print_warnings_safely();"
        "warnings.warn('a \\x1b[31mserver\\x1b[0m says')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "a \\x1b[31mserver\\x1b[0m says" in result.stderr and "\x1b" not in result.stderr
