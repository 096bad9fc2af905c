"""The reward-hacking watch: a reward that falls on held-out prompts while what is trained on rises."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from egrpo_fast.config import Config

History = Sequence[tuple[int, Mapping[str, float]]]
"""Every evaluation so far: iteration, and the mean of each reward on the held-out prompts."""


@dataclass(frozen=True)
class Verdict:
    """best: the watched reward's highest mean, first reached at iteration best_at. alarms: evaluations in a row, up to
    the last, that were below `best - drop` with the trained rewards above what they were at best_at."""

    best: float
    best_at: int
    alarms: int
    stop: bool


def verdict(config: Config, history: History) -> Verdict | None:
    """What the watch makes of the evaluations; a pure function, so ranks agree and a resumed run knows what it knew.

    None where `evaluation.stop_when` asks for no watch. The trained rewards count as their weighted sum, without the
    watched one.
    """
    rule = config.evaluation.stop_when
    if rule is None or not history:
        return None
    weights = {reward.name: reward.weight for reward in config.rewards if reward.name != rule.reward}
    best_at, best, trained_at_best, alarms = 0, float("-inf"), 0.0, 0
    for iteration, means in history:
        watched, trained = means[rule.reward], sum(weight * means[name] for name, weight in weights.items())
        if watched > best:
            best_at, best, trained_at_best = iteration, watched, trained
        alarms = alarms + 1 if watched < best - rule.drop and trained > trained_at_best else 0
    return Verdict(best, best_at, alarms, alarms >= rule.patience)
