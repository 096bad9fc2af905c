"""A process that is asked to end: once it may finish, twice or too late it is ended."""

import os
import signal
import subprocess
import sys
import time

import pytest

from egrpo_fast.distributed.signals import EXIT_CODES, FORCED, Interruption

SCRIPT = """
import sys, time
from egrpo_fast.distributed import signals as interruption
interruption.ECHO = float(sys.argv[2])
asked = interruption.Interruption(float(sys.argv[1]))
print("ready", flush=True)
while not (asked.signal and sys.argv[3] == "obedient"):
    time.sleep(0.01)
sys.exit(interruption.EXIT_CODES[asked.signal])
"""


def started(seconds, echo, how, hangup=signal.SIG_DFL):
    """hangup: what SIGHUP does when the process starts; `nohup` has it ignored."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(seconds), str(echo), how], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, preexec_fn=lambda: signal.signal(signal.SIGHUP, hangup),
    )  # fmt: skip


def ended(*signals, seconds=3600.0, echo=0.3, how="obedient", pause=0.0):
    """Exit status and stderr of a process that gets these signals."""
    with started(seconds, echo, how) as process:
        assert process.stdout.readline() == "ready\n"
        told = ""
        for index, number in enumerate(signals):
            if index:
                while "ending" not in told:  # the first has arrived
                    told += process.stderr.readline()
                time.sleep(pause)
            process.send_signal(number)
        return process.wait(600), told + process.stderr.read()


@pytest.mark.parametrize(("number", "status"), EXIT_CODES.items(), ids=["SIGTERM", "SIGINT", "SIGHUP"])
def test_the_first_signal_asks(number, status):
    found, told = ended(number)
    assert found == status and f"{signal.Signals(number).name}: ending with a checkpoint" in told


def test_a_run_under_nohup_outlives_its_terminal():
    with started(3600.0, 0.3, "obedient", signal.SIG_IGN) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        process.send_signal(signal.SIGTERM)
        assert process.wait(600) == EXIT_CODES[signal.SIGTERM]
        assert "SIGHUP" not in process.stderr.read()


def test_an_echo_counts_as_the_same():
    """Launchers send SIGTERM to ranks that Ctrl-C has reached already; the first signal counts."""
    handlers = {number: signal.getsignal(number) for number in EXIT_CODES}
    try:
        asked = Interruption(1e6)  # longer than these tests: the timer stays
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert asked.signal == signal.SIGINT
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_second_signal_ends_at_once():
    found, told = ended(signal.SIGTERM, signal.SIGTERM, how="deaf", pause=0.6)
    assert found == FORCED
    assert "asked again: ended at once; the last complete checkpoint, if there is one, stands" in told


def test_too_late_ends_at_once():
    found, told = ended(signal.SIGTERM, seconds=0.3, how="deaf")
    assert found == FORCED and "not done 0 s after being asked" in told
