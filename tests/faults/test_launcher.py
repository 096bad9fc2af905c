"""The same through the real command, `deepspeed egrpo_fast/train.py`: kill -9, and what the launcher itself returns."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from forked import BOUND, TINY, differences, newest, unsound

from egrpo_fast.distributed.world import free_port

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


class Launched:
    """A run under `deepspeed`, in a process group of its own; it is the caller's to end."""

    def __init__(self, folder, *overrides, ranks=2):
        self._log = folder.with_name(f"{folder.name}.log")
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
        arguments = ["egrpo_fast/train.py", "shapes", *TINY, f"output_dir={folder}", *overrides]
        paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*launcher, "--master_port", str(free_port()), *arguments],
                cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def tree(self):
        return [*psutil.Process(self.process.pid).children(recursive=True), psutil.Process(self.process.pid)]

    def ranks(self):
        found = [process for process in self.tree() if "--local_rank=0" in " ".join(process.cmdline())]
        return found + [process for process in self.tree() if "--local_rank=1" in " ".join(process.cmdline())]

    def until(self, done):
        while not done():
            assert self.process.poll() is None, self.told()
            time.sleep(0.05)

    def end(self):
        """Exit status as a shell tells it, once nothing of the run is alive."""
        tree = self.tree() if self.process.poll() is None else []
        status = self.process.wait(BOUND)
        _, alive = psutil.wait_procs(tree, timeout=BOUND)
        assert alive == [], self.told()
        return status if status >= 0 else 128 - status

    def told(self):
        return self._log.read_text(errors="replace")


def training(run, launched, iteration):
    launched.until(lambda: newest(run) >= iteration)


def test_killed_and_resumed_through_the_launcher(two_ranks, tmp_path, figures):
    """The whole tree and single ranks in turn, all in one run."""
    run, rng, statuses = tmp_path / "run", random.Random(5), []
    for kill in range(6):
        launched = Launched(run, *(["resume=true"] if kill else []))
        before = newest(run)
        training(run, launched, min(before + 1, 8))
        time.sleep(rng.uniform(0.0, 0.4))
        victims = launched.tree() if kill % 2 == 0 else [rng.choice(launched.ranks())]
        watched = launched.tree()
        for victim in victims:
            victim.kill()
        status = launched.process.wait(BOUND)
        assert psutil.wait_procs(watched, timeout=BOUND)[1] == []
        statuses.append(status if status >= 0 else 128 - status)
        assert statuses[-1] != 0 and unsound(run) == [] and newest(run) >= before
    launched = Launched(run, "resume=true")
    assert launched.end() == 0, launched.told()
    assert differences(run, two_ranks) == []
    figures["kill -9 through the launcher"] = f"6 kills, 0 lost or wrong; statuses {statuses} (tree, one rank in turn)"


ASKED = {  # who gets the signal -> statuses of the launcher
    "SIGTERM to a rank": (signal.SIGTERM, "rank", {0}),
    "SIGTERM to the process group": (signal.SIGTERM, "group", {143}),
    # DeepSpeed's handler passes a rank's status on where it has seen one end, and says 1 where it has not.
    "Ctrl-C": (signal.SIGINT, "group", {130, 1}),
}


@pytest.mark.parametrize("case", ASKED)
def test_asked_to_end_through_the_launcher(case, two_ranks, tmp_path, figures):
    number, who, expected = ASKED[case]
    run = tmp_path / "run"
    launched = Launched(run)
    training(run, launched, 2)
    if who == "rank":
        launched.ranks()[1].send_signal(number)
    else:
        os.killpg(launched.process.pid, number)
    status = launched.end()
    assert f"{number.name}: ending with a checkpoint" in launched.told()
    assert "ended at once" not in launched.told() and unsound(run) == []
    resumed = Launched(run, "resume=true")
    assert resumed.end() == 0, resumed.told()
    assert differences(run, two_ranks) == []
    figures[f"launcher, {case}"] = f"status {status}, resumed bit for bit"
    assert status in expected, launched.told()[-3000:]


FAILS = {
    "a reward hangs": (["guards.stall_seconds=15", "{fault: hang, first: 2, rank: 1}"], {75}),
    "NaN always": (["guards.bad_steps=2", "{fault: nan, first: 2}"], {1}),
}


@pytest.mark.parametrize("case", FAILS)
def test_a_failure_through_the_launcher(case, tmp_path, figures):
    (setting, options), allowed = FAILS[case]
    reward = f"rewards=[{{name: 'fault_injection:FaultyReward', options: {options}}}]"
    launched = Launched(tmp_path / "run", setting, "checkpoint.best=null", reward)
    status = launched.end()
    figures[f"launcher, {case}"] = f"status {status}"
    assert status in allowed, launched.told()[-3000:]
