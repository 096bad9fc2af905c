"""Images of a run: held-out grids, before and after, reward curves, and the entropy of a schedule. As PNG."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from egrpo_fast.schedule import Schedule

plt.switch_backend("Agg")  # images go to files; a machine without a screen has no other


def _show(axis: Any, image: Tensor, title: str) -> None:
    smooth = "nearest" if image.shape[-1] < 64 else "antialiased"
    axis.imshow(image.permute(1, 2, 0).float().cpu(), interpolation=smooth)
    axis.set_title(title, fontsize=7, parse_math=False)  # a prompt may hold dollars
    axis.axis("off")


def _wrapped(caption: str, width: int = 26) -> str:
    return "\n".join(textwrap.wrap(caption, width)[:4])


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    try:
        figure.savefig(file, dpi=110)
    finally:
        plt.close(figure)
    return file.getvalue()


def png(image: Tensor, text: Mapping[str, str] | None = None) -> bytes:
    """An image [3, H, W] in [0, 1] as PNG. text: what it says of itself, by keyword."""
    pixels, said = image.mul(255).round().byte().permute(1, 2, 0).cpu().numpy(), PngInfo()
    for keyword, value in (text or {}).items():
        said.add_itxt(keyword, value)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=4, pnginfo=said)
    return file.getvalue()


def image_grid(images: Tensor, captions: Sequence[str], columns: int = 8) -> bytes:
    """[N, 3, H, W] images under their captions, as one PNG."""
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(1.6 * columns, 2.3 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, caption in zip(axes.flat, images, captions):
        _show(axis, image, _wrapped(caption))
    return _png(figure)


def before_after(before: Tensor, after: Tensor, captions: Sequence[str], columns: int = 8) -> bytes:
    """The same prompts from the same noise, base above trained, as one PNG."""
    bands = -(-len(captions) // columns)
    figure, axes = plt.subplots(
        2 * bands, columns, figsize=(1.6 * columns, 4.0 * bands), squeeze=False, layout="constrained"
    )
    for axis in axes.flat:
        axis.axis("off")
    for place, caption in enumerate(captions):
        band, column = divmod(place, columns)
        _show(axes[2 * band, column], before[place], _wrapped(caption))
        _show(axes[2 * band + 1, column], after[place], "")
    for band in range(bands):
        for row, label in ((2 * band, "before"), (2 * band + 1, "after")):
            axes[row, 0].text(-0.08, 0.5, label, rotation=90, va="center", ha="right", transform=axes[row, 0].transAxes)
    return _png(figure)


def curves(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Held-out rewards (one panel each) and the training reward, by iteration, and where the watch stopped the run.

    One PNG.
    """
    names = list(dict.fromkeys(name for line in lines for name in line if name.startswith("held_out/")))
    figure, axes = plt.subplots(1, max(1, len(names)), figsize=(4.2 * max(1, len(names)), 3.2), squeeze=False)
    for axis, name in zip(axes.flat, names):
        reward = name.removeprefix("held_out/")
        trained = [(line["iteration"], line[f"reward/{reward}"]) for line in lines if f"reward/{reward}" in line]
        if trained:
            axis.plot(*zip(*trained), color="tab:blue", alpha=0.35, linewidth=1, label="training groups")
        axis.plot(
            *zip(*[(line["iteration"], line[name]) for line in lines if name in line]),
            color="tab:red", marker="o", markersize=3, label="held out",
        )  # fmt: skip
        for line in lines:
            if line.get("watch/stop"):
                axis.axvline(line["iteration"], color="black", linestyle="--", linewidth=1, label="watch: stop")
        axis.set(title=reward, xlabel="iteration")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.tight_layout()
    return _png(figure)


def entropy_plot(path: Path, schedule: Schedule, threshold: float, longest: int = 6) -> None:
    """Entropy of every step merged over 1 to `longest` grid steps, the threshold, and the merges that were chosen."""
    figure, axis = plt.subplots(figsize=(7, 4))
    for length in range(1, longest + 1):
        steps = range(schedule.num_steps - length + 1)
        axis.plot(steps, [schedule.entropy(step, length) for step in steps], label=f"merge {length}", linewidth=1)
    chosen = [schedule.entropy(step, schedule.merges[step]) for step in schedule.active]
    axis.plot(schedule.active, chosen, "ko", markersize=5, label="trained, as merged")
    axis.axhline(threshold, color="gray", linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
    axis.set(xlabel="grid step (0: noise)", ylabel="per-dimension entropy of the SDE step")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
