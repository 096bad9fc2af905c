"""What strangers say is shown on a terminal, and never obeyed."""

import subprocess
import sys
import unicodedata

from egrpo_fast.rewards import RewardError
from egrpo_fast.terminal import error_lines, printable


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
        "import warnings; from egrpo_fast.terminal import keep_clean; keep_clean();"
        "warnings.warn('a \\x1b[31mserver\\x1b[0m says')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "a \\x1b[31mserver\\x1b[0m says" in result.stderr and "\x1b" not in result.stderr


CODE = """
import logging, warnings
from egrpo_fast.terminal import keep_clean
keep_clean(verbose=%s)
for name in ("torch.utils._pytree", "DeepSpeed", "transformers.modeling_utils", "a_reward_of_mine"):
    for level in ("warning", "error"):
        getattr(logging.getLogger(name), level)("%%s: %%s", name, level)
warnings.warn("mine")
warnings.warn_explicit("installed", FutureWarning, "/x/site-packages/torch/nn.py", 1)
warnings.warn_explicit("ours, installed", UserWarning, "/x/site-packages/egrpo_fast/trainer.py", 1)
"""


def shown(verbose):
    result = subprocess.run([sys.executable, "-c", CODE % verbose], capture_output=True, text=True, check=True)
    return result.stderr.splitlines()


def test_other_packages_keep_their_warnings_to_themselves():
    """Errors of anybody, and warnings of the user's own code, are shown."""
    assert shown(verbose=False) == [
        "torch.utils._pytree: error",
        "DeepSpeed: error",
        "transformers.modeling_utils: error",
        "a_reward_of_mine: warning",
        "a_reward_of_mine: error",
        "warning: mine",
        "warning: ours, installed",
    ]


def test_verbose_shows_everything():
    assert len(shown(verbose=True)) == 11
