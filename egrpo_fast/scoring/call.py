"""Calls a reward and checks what goes in and what comes out: a reward that fails is named, and never becomes 0."""

import os
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from egrpo_fast.scoring.preprocess import check_images, unfit_images

Reward = Callable[[Tensor, Sequence[str]], Tensor]

LARGEST = 1e15
"""Most that a score may be on either side of 0: the sum of a group's squares stays in float32."""

_NOT_THE_USERS = (
    *(f"{Path(path)}{os.sep}" for path in (Path(__file__).parents[1], Path(torch.__file__).parent)),
    "<frozen",
)
"""How the names of files begin that are not the user's own code."""
_LIBRARY = sysconfig.get_path("stdlib")


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was deleted
        return None


_SETTINGS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "the working directory": (_folder, lambda path: os.chdir(path) if path else None),
    "torch's gradient mode": (torch.is_grad_enabled, torch.set_grad_enabled),
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, lambda device: torch.set_default_device(None)),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's deterministic mode": (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    "the precision of float32 products": (
        lambda: torch.backends.cuda.matmul.fp32_precision,
        lambda kept: torch.set_float32_matmul_precision("high" if kept == "tf32" else "highest"),
    ),
    "the precision of float32 convolutions": (
        lambda: torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
        lambda kept: setattr(torch.backends.cudnn, "allow_tf32", kept == "tf32"),
    ),
}
"""What a user's code may change for the whole process, and training would feel: how to get it and how to set it."""


class RewardError(ValueError):
    """A reward failed; the message begins with its name. trace: the traceback of the user's own code, or empty."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


@contextmanager
def users_code(name: str) -> Iterator[None]:
    """Around code of a reward: RewardError for all that it raises, SystemExit included; Ctrl-C passes.

    Settings of the process that it changed are put back, with a warning.
    """
    before = [get() for get, _ in _SETTINGS.values()]
    try:
        yield
    except (KeyboardInterrupt, RewardError):
        raise
    except BaseException as error:
        where, trace = _own(error)
        raise RewardError(f"rewards.{name}: {type(error).__name__}: {text_of(error)}{where}", trace) from error
    finally:
        for (what, (get, put)), kept in zip(_SETTINGS.items(), before):
            if get() != kept:
                put(kept)
                warnings.warn(f"rewards.{name}: changed {what}, which is put back", stacklevel=4)


def text_of(error: BaseException) -> str:
    """What an exception says, on one line."""
    try:
        return " ".join(str(error).split())
    except Exception:  # its own __str__ fails
        return "(says nothing)"


def _own(error: BaseException) -> tuple[str, str]:
    """Where an error arose in the user's own code, as ` (FILE, line N)`, and the traceback from there on.

    Both are empty where no such code took part.
    """
    spelled = traceback.TracebackException.from_exception(error)
    while spelled.stack and not _is_users(spelled.stack[0].filename):
        del spelled.stack[0]
    own = [(frame.filename, frame.lineno) for frame in spelled.stack if frame.filename == spelled.stack[0].filename]
    if isinstance(error, SyntaxError) and error.filename:
        own.append((error.filename, error.lineno))
    if not own:
        return "", ""
    path, line = own[-1]
    return f" ({Path(path).name}, line {line})", "".join(spelled.format())


def _is_users(path: str) -> bool:
    return not path.startswith(_NOT_THE_USERS) and ("site-packages" in path or not path.startswith(_LIBRARY))


def score(name: str, reward: Reward, images: Tensor, prompts: Sequence[str], drop: bool = False) -> Tensor:
    """images [B, 3, H, W] float in [0, 1], one prompt each -> [B] float32 scores on their device.

    RewardError: images that are none, prompts that are too many or few, a reward that raises, returns another shape,
    or a number that is not finite or beyond LARGEST. With `drop`, an image that is at fault alone gets NaN and a
    warning instead: one out of range, one with such a number, or, where the call raises, one that raises again by
    itself. What is not an image's fault is still an error: wrong shapes, a missing server or file (OSError), a call in
    which every image fails.
    """
    try:
        check_images(images, prompts)
    except ValueError as error:
        raise RewardError(f"rewards.{name}: {error}") from None
    unfit = unfit_images(images)
    if not drop:
        try:
            scores = call(name, reward, images, prompts)
        except RewardError:
            _require(unfit, name, "given images that are not in [0, 1]", prompts)
            raise
        if bool((unfit | ~(scores.abs() <= LARGEST)).any()):  # the host waits for the device here alone
            _require(unfit, name, "given images that are not in [0, 1]", prompts)
            _require(~torch.isfinite(scores), name, "not finite", prompts)
            _require(scores.abs() > LARGEST, name, f"scores beyond {LARGEST:g}", prompts)
        return scores
    rows = (~unfit).nonzero().flatten().tolist()
    scores = torch.full((len(images),), torch.nan, device=images.device)
    if rows:
        scores[rows] = _call_or_each(name, reward, images, prompts, rows)
    scores = torch.where(scores.abs() <= LARGEST, scores, torch.nan)
    if dropped := int(scores.isnan().sum()):
        warnings.warn(f"rewards.{name}: dropped {dropped} of {len(images)} images", stacklevel=2)
    return scores


def score_or_nan(name: str, reward: Reward, images: Tensor, prompts: Sequence[str], drop: bool = False) -> Tensor:
    """`score`, but NaN for all of them, and a warning, where it raises RewardError."""
    try:
        return score(name, reward, images, prompts, drop)
    except RewardError as error:
        warnings.warn(f"{error}: no score for {len(images)} images", stacklevel=2)
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
        raise RewardError("rewards: every image of a rollout was dropped")
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


def _require(wrong: Tensor, name: str, message: str, prompts: Sequence[str]) -> None:
    rows = wrong.nonzero().flatten().tolist()
    if rows:
        raise RewardError(f"rewards.{name}: {message} for {len(rows)} images, the first of {prompts[rows[0]]!r}")


def _is_built_in(reward: Reward) -> bool:
    return type(reward).__module__.startswith("egrpo_fast.rewards.")


def call(
    name: str, reward: Reward, images: Tensor, prompts: Sequence[str], rows: Sequence[int] | None = None
) -> Tensor:
    """One call on these rows, or on all: [B] float32 on the images' device, perhaps not finite.

    A reward may change what it is given: it gets copies. A built-in one changes nothing and gets all images as they
    are. RewardError where the reward raises or returns anything but a dense, real tensor of this shape.
    """
    with users_code(name), torch.no_grad():  # here, for it is a matter of the thread that calls
        if rows is not None:
            images, prompts = images[rows], [prompts[row] for row in rows]
        elif not _is_built_in(reward):
            images = images.clone()
        scores = reward(images, list(prompts))
        if not isinstance(scores, Tensor):
            raise RewardError(f"rewards.{name}: returned {type(scores).__name__}, expected a tensor [{len(images)}]")
        if scores.layout != torch.strided or scores.is_complex():
            raise RewardError(
                f"rewards.{name}: scores of {scores.layout}, {scores.dtype}; dense real ones are expected"
            )
        if scores.shape != (len(images),):
            raise RewardError(f"rewards.{name}: scores of shape {tuple(scores.shape)} for {len(images)} images")
        return scores.detach().to(images.device, torch.float32, copy=True)


def try_reward(name: str, reward: Reward, prompt: str, height: int, width: int, device: torch.device | str) -> None:
    """Call a reward once, on an image of noise: RewardError where it raises, or returns what is no score.

    Its value does not matter. torch's random state is afterwards what it was.
    """
    device = torch.device(device)
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        call(name, reward, image, [prompt])


def _call_or_each(name: str, reward: Reward, images: Tensor, prompts: Sequence[str], rows: Sequence[int]) -> Tensor:
    try:
        return call(name, reward, images, prompts, rows if len(rows) < len(images) else None)
    except RewardError as error:
        if error.__cause__ is None or isinstance(error.__cause__, OSError):
            raise
        scores, failed = [], error
    for row in rows:
        try:
            scores.append(call(name, reward, images, prompts, [row]))
        except RewardError as error:
            if isinstance(error.__cause__, OSError):
                raise
            scores.append(torch.full((1,), torch.nan, device=images.device))
    together = torch.cat(scores)
    if len(scores) > 1 and together.isnan().all():
        raise failed
    return together
