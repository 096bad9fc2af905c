"""`make faults`: what a run survives, with the figures in a table at the end."""

import os
import sys
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
sys.path.append(HERE)  # ranks find `fault_injection`, and the recipe's rewards in it, by name

FIGURES = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[FIGURES] = {}


def pytest_terminal_summary(terminalreporter, config):
    if figures := config.stash[FIGURES]:
        width = max(map(len, figures))
        terminalreporter.section("faults")
        for name, value in figures.items():
            terminalreporter.line(f"{name:<{width}}  {value}")


@pytest.fixture(scope="session")
def figures(pytestconfig):
    """What a fault came to: name -> figures, printed at the end."""
    return pytestconfig.stash[FIGURES]


@pytest.fixture(scope="session")
def server():
    from forked import Server

    paths = [HERE, *filter(None, [os.environ.get("PYTHONPATH")])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(paths))
        yield Server()


def _uninterrupted(server, folder, ranks):
    server.run(folder, ranks=ranks)
    return folder


@pytest.fixture(scope="session")
def one_rank(server, tmp_path_factory):
    """A run of one rank that nothing happened to."""
    return _uninterrupted(server, tmp_path_factory.mktemp("runs") / "uninterrupted", 1)


@pytest.fixture(scope="session")
def two_ranks(server, tmp_path_factory):
    return _uninterrupted(server, tmp_path_factory.mktemp("runs") / "uninterrupted", 2)
