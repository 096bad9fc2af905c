"""What strangers say is shown on a terminal, and never obeyed; what cannot be told ends nothing."""

import os
import subprocess
import sys
import unicodedata

import pytest

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
from egrpo_fast import terminal
terminal.keep_clean(verbose=%s)
for name in ("torch.utils._pytree", "DeepSpeed", "transformers.modeling_utils", "a_reward_of_mine"):
    for level in ("warning", "error"):
        getattr(logging.getLogger(name), level)("%%s: %%s", name, level)
warnings.warn("mine")
warnings.warn_explicit("installed", FutureWarning, "/x/site-packages/torch/nn.py", 1)
warnings.warn_explicit("installed in a clone", FutureWarning, "/x/egrpo_fast/.venv/site-packages/torch/nn.py", 1)
terminal.__file__ = "/x/site-packages/egrpo_fast/terminal.py"
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
    assert len(shown(verbose=True)) == 12


TALK = """
import sys
from egrpo_fast.terminal import steady_streams

steady_streams()
for number in range(20_000):
    print(number, "\\u7d75", flush=number % 100 == 0)
    print(number, file=sys.stderr)
with open(sys.argv[1], "w") as file:
    file.write("done")
"""


LOST = {"{} | head -1": "Broken pipe", "{} >/dev/full": "No space left on device"}


@pytest.mark.parametrize("how", [*LOST, "{} 2>&1 | head -1", "{} >/dev/full 2>&1", "{} >&- 2>&-"])
def test_nobody_need_listen(how, tmp_path):
    command = how.format(f"{sys.executable} -c '{TALK}' {tmp_path / 'file'}")
    told = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert told.returncode == 0 and (tmp_path / "file").read_text() == "done"
    warned = [line for line in told.stderr.splitlines() if not line.isdecimal()]
    assert warned == ([f"stdout cannot be written: {LOST[how]}"] if how in LOST else [])


def test_what_an_encoding_does_not_know_is_spelled():
    told = subprocess.run(
        [sys.executable, "-c", "from egrpo_fast.terminal import steady_streams; steady_streams(); print('\u7d75')"],
        capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert told.stdout == "\\u7d75\n", told.stderr


def test_it_is_written_again_once_that_works(tmp_path):
    """A disk that is full for a while: what was not written is lost, what comes later is not."""
    code = (
        "import resource, sys; from egrpo_fast.terminal import steady_streams; steady_streams();"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (10, resource.RLIM_INFINITY));"
        "[print('x' * 99, flush=True) for _ in range(1000)];"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2);"
        "print('later', flush=True)"
    )
    with (tmp_path / "out").open("w") as out:
        told = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=subprocess.PIPE, text=True)
    assert told.returncode == 0 and told.stderr == "stdout cannot be written: File too large\n"
    assert (tmp_path / "out").read_text().endswith("later\n")


def test_what_fails_is_told_once_until_it_works_again():
    """Under Python's own filters, which show a repeated warning once in a process."""
    code = """
from egrpo_fast.terminal import Attempts, keep_clean
keep_clean()
attempt = Attempts()
for works in (%s):
    with attempt("a plot"):
        if not works:
            raise KeyError("font")
"""

    def told(*outcomes):
        command = [sys.executable, "-c", code % (", ".join(map(str, outcomes)) + ",")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr.splitlines()

    once = ["warning: a plot: KeyError: 'font'; training goes on, and this is tried again"]
    assert told(True) == [] and told(False, False, False) == once
    assert told(False, False, True, False) == 2 * once
