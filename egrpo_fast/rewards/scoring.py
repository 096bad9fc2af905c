"""Calls a reward and checks what goes in and what comes out: a reward that fails is named, and never becomes 0."""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from egrpo_fast.rewards.preprocess import check_pictures, unfit_pictures

Reward = Callable[[Tensor, Sequence[str]], Tensor]


class RewardError(ValueError):
    """A reward failed on pictures; the message begins with its name."""


def score(name: str, reward: Reward, images: Tensor, prompts: Sequence[str], drop: bool = False) -> Tensor:
    """images [B, 3, H, W] float in [0, 1], one prompt each -> [B] float32 scores on their device.

    RewardError: pictures that are none, prompts that are too many or few, a reward that raises, returns another shape
    or a number that is none. With `drop`, a picture that is at fault alone gets NaN and a warning instead: one out of
    range, one scored NaN, or, where the call raises, one that raises again by itself. What is not a picture's fault is
    still an error: wrong shapes, a missing server or file (OSError), a call in which every picture fails.
    """
    try:
        check_pictures(images, prompts)
    except ValueError as error:
        raise RewardError(f"rewards.{name}: {error}") from None
    unfit = unfit_pictures(images)
    if not drop:
        _require(unfit, name, "given pictures that are not in [0, 1]", prompts)
        scores = _call(name, reward, images, prompts)
        _require(~torch.isfinite(scores), name, "not finite", prompts)
        return scores
    rows = (~unfit).nonzero().flatten()
    kept = [prompts[row] for row in rows.tolist()]
    scores = torch.full((len(images),), torch.nan, device=images.device)
    if kept:
        scores[rows] = _call_or_each(name, reward, images[rows], kept)
    scores = torch.where(torch.isfinite(scores), scores, torch.nan)
    if dropped := int(scores.isnan().sum()):
        warnings.warn(f"rewards.{name}: dropped {dropped} of {len(images)} pictures", stacklevel=2)
    return scores


def score_or_nan(name: str, reward: Reward, images: Tensor, prompts: Sequence[str], drop: bool = False) -> Tensor:
    """`score`, but NaN for all of them, and a warning, where it raises RewardError."""
    try:
        return score(name, reward, images, prompts, drop)
    except RewardError as error:
        warnings.warn(f"{error}: no score for {len(images)} pictures", stacklevel=2)
        return torch.full((len(images),), torch.nan, device=images.device)


def fill_dropped(rewards: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """NaN -> what gives its sample no advantage. rewards: [K, P, G] per group -> ([K, P, sum G] filled, [] share).

    A sample that one reward dropped is dropped for all K. It gets each reward's mean over the rest of its group, so its
    standardised value is 0 (to float32 rounding) and the others' mean is theirs alone. Their standard deviation is
    still taken over G - 1, so with d dropped of G the others' advantages are sqrt((G - 1) / (G - d - 1)) times what
    the smaller group would give: 1.05 for one of 12. A group with less than two left gives no advantage at all.
    RewardError: nothing is left.
    """
    valid = [~values.isnan().any(0, keepdim=True) for values in rewards]
    everything = torch.cat([values[:, mask[0]] for values, mask in zip(rewards, valid)], dim=1)
    if not everything.numel():
        raise RewardError("rewards: every picture of a rollout was dropped")
    # A group that is wholly lost takes the others' mean: it is only logged.
    elsewhere = everything.mean(1).reshape(-1, 1, 1)
    filled = []
    for values, mask in zip(rewards, valid):
        # From the group's minimum: equal rewards must stay exactly equal, or rounding would be standardised.
        least = torch.where(mask, values, torch.inf).amin(-1, keepdim=True)
        count = mask.sum(-1, keepdim=True)
        mean = least + torch.where(mask, values - least, 0.0).sum(-1, keepdim=True) / count
        filled.append(torch.where(mask, values, torch.where(count > 0, mean, elsewhere)))
    lost = 1 - torch.cat([mask.float().flatten() for mask in valid]).mean()
    return torch.cat(filled, dim=-1), lost


def _require(wrong: Tensor, name: str, told: str, prompts: Sequence[str]) -> None:
    rows = wrong.nonzero().flatten().tolist()
    if rows:
        raise RewardError(f"rewards.{name}: {told} for {len(rows)} pictures, the first of {prompts[rows[0]]!r}")


def _call(name: str, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    try:
        with torch.no_grad():  # here, for it is a matter of the thread that calls
            scores = reward(images, prompts)
    except Exception as error:
        raise RewardError(f"rewards.{name}: {type(error).__name__}: {error}") from error
    if not isinstance(scores, Tensor) or scores.shape != (len(images),):
        shape = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
        raise RewardError(f"rewards.{name}: scores of shape {shape} for {len(images)} pictures")
    return scores.to(images.device, torch.float32)


def _call_or_each(name: str, reward: Reward, images: Tensor, prompts: Sequence[str]) -> Tensor:
    try:
        return _call(name, reward, images, prompts)
    except RewardError as error:
        if error.__cause__ is None or isinstance(error.__cause__, OSError):
            raise
        scores, failed = [], error
    for image, prompt in zip(images, prompts):
        try:
            scores.append(_call(name, reward, image[None], [prompt]))
        except RewardError as error:
            if isinstance(error.__cause__, OSError):
                raise
            scores.append(torch.full((1,), torch.nan, device=images.device))
    together = torch.cat(scores)
    if len(scores) > 1 and together.isnan().all():
        raise failed
    return together
