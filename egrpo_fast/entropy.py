"""How random a sampling step is, in closed form, and how many grid steps are merged until it is random enough."""

import math
from collections.abc import Sequence


def entropy(s: float) -> float:
    """Per-dimension entropy H of a step's policy N(mean, s^2 I), as `exp(h / d) = sqrt(2 pi e s^2)`.

    The paper compares exp(h) with its threshold tau and leaves the dimension open. Per dimension, its thresholds tell
    apart the merges that it reports different results for.
    """
    return math.sqrt(2.0 * math.pi * math.e) * s


def merge_length(entropies: Sequence[float], threshold: float) -> int:
    """Smallest l whose merged entropy reaches the threshold; all that is left where none does.

    entropies: H of one step merged over l = 1, 2, ... grid steps. Threshold 0 never merges.
    """
    return next((length for length, entropy in enumerate(entropies, 1) if entropy >= threshold), len(entropies))
