"""The page of a run: what is on it, of whatever the log holds."""

import json
import re

import pytest

from egrpo_fast.commands.watch import page, watch
from egrpo_fast.runs.metrics import METRICS

LINES = [
    {"iteration": 0, "held_out/clip": 0.25},
    {"iteration": 1, "reward/clip": 0.2, "loss": 0.5, "alarms": ["a <b>bold</b> claim"],
     "samples": [{"file": "samples/a.png", "prompt": "1 < 2", "place": "best", "rewards": {"clip": 0.31}},
                 {"file": "samples/gone.png", "prompt": "gone", "place": "worst", "rewards": {"clip": 0.1}}]},
    {"iteration": 2, "reward/clip": 0.4, "loss": -0.5},
    {"iteration": 2, "held_out/clip": 0.75},
]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (tmp_path / "config.yaml").write_text("iterations: 4\n")
    for name in ("samples/a.png", "images/iteration-000002.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"png")
    return tmp_path


def test_curves_alarms_and_pictures(run):
    text = page(run, 30)
    own, held = re.findall(r'class="(?:own|held)" points="([^"]+)"', text)[:2]
    assert own == "160.0,116.0 316.0,75.3" and held == "4.0,105.8 316.0,4.0"
    assert "2 of 4 iterations, going on" in text and 'http-equiv="refresh" content="30"' in text
    assert "a &lt;b&gt;bold&lt;/b&gt; claim" in text and "1 &lt; 2" in text and "<b>bold" not in text
    assert 'src="samples/a.png"' in text and "gone" not in text and 'src="images/iteration-000002.png"' in text


def test_a_run_that_is_over_is_not_read_again(run):
    (run / "summary.json").write_text("{}")
    assert watch(run, 0.01) == run / "watch.html"
    text = (run / "watch.html").read_text()
    assert "finished" in text and "refresh" not in text


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no metrics\.jsonl; a run's folder is expected"):
        watch(tmp_path, None)
    (tmp_path / METRICS).write_text("")
    with pytest.raises(ValueError, match=r"config\.yaml cannot be read"):
        watch(tmp_path, None)
