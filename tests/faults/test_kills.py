"""kill -9 at random moments over loading, training, checkpointing and the end; then resume, until done."""

import random
import time
from collections import Counter

import pytest
from forked import differences, kill_until_done

pytestmark = pytest.mark.slow

CASES = {
    "one rank": {"ranks": 1, "kills": 24, "seed": 1},
    "two ranks, all killed": {"ranks": 2, "kills": 14, "seed": 2},
    "two ranks, one killed": {"ranks": 2, "kills": 8, "seed": 3, "only_one": True},
}


@pytest.mark.parametrize("case", CASES)
def test_killed_anywhere_and_resumed_equals_uninterrupted(case, server, tmp_path, figures, request):
    settings = dict(CASES[case])
    ranks, wanted, rng = settings["ranks"], settings.pop("kills"), random.Random(settings.pop("seed"))
    reference = request.getfixturevalue("one_rank" if ranks == 1 else "two_ranks")
    began = time.monotonic()
    server.run(tmp_path / "again", ranks=ranks)
    seconds = time.monotonic() - began
    assert differences(tmp_path / "again", reference) == [], "two runs of one seed"
    kills = resumes = saves = runs = 0
    wrong, phases = [], Counter()
    while kills < wanted:
        runs += 1
        found = kill_until_done(server, tmp_path / f"run-{runs}", reference, rng=rng, seconds=seconds, **settings)
        kills, resumes, saves = kills + found.kills, resumes + found.resumes, saves + found.in_a_save
        wrong += found.wrong
        phases.update(found.phases)
    figures[f"kill -9, {case}"] = (
        f"{kills} kills, {runs} runs, {resumes} resumes, {saves} in the middle of a save; {len(wrong)} lost or wrong; "
        f"in {', '.join(f'{phase} {count}' for phase, count in phases.most_common())}"
    )
    assert wrong == []
    assert saves and len(phases) >= 3, "the kills must hit saves, and several phases"
