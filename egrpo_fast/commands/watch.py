"""A run as one page that grows: curves, alarms, the best and the worst training images, held-out grids over time."""

import html
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from egrpo_fast.config import CONFIG_FILE
from egrpo_fast.config.recipe_files import read_yaml
from egrpo_fast.files import read_text, write_whole
from egrpo_fast.runs.metrics import METRICS, RunLog
from egrpo_fast.runs.report import SUMMARY

PAGE = "watch.html"
ALARMS = 50
"""Alarms that are listed, the newest ones."""
SAMPLES = 24
"""Training images that are shown, of the newest iterations that have some."""
PANELS = (
    "reward/", "reward_spread/", "latent_spread", "zero_advantage_share", "clip_fraction", "grad_norm", "loss",
    "max_log_ratio", "policy_mismatch", "kl", "tail/rank_correlation", "speed/images_per_second",
    "speed/model_tflops_per_second", "speed/peak_memory_gib",
)  # fmt: skip
"""Metrics by the beginnings of their names, in the order of their panels. Rewards are drawn beside held-out ones."""
WIDTH, HEIGHT, EDGE = 320, 120, 4

HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src * data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
{refresh}<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --back: #fafafa; --card: #fff; --ink: #1c1c1e; --dim: #6b6b70; --line: #e2e2e5;
  --held: #c2410c; --own: #2563a8; }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #131315; --card: #1d1d20; --ink: #ececee; --dim: #9a9aa0;
  --line: #323237; --held: #fb923c; --own: #7cb3ee; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 80rem; padding: 1rem; background: var(--back); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 1.4rem; margin: .5rem 0; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.05rem; margin: 1.6rem 0 .6rem; }}
p {{ color: var(--dim); margin: 0 0 .6rem; }}
progress {{ width: 100%; }}
.cards {{ display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }}
.pictures {{ display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 11rem), 1fr)); }}
figure {{ margin: 0; padding: .7rem; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }}
figcaption {{ font-size: .8125rem; color: var(--dim); overflow-wrap: anywhere; }}
figcaption b {{ color: var(--ink); }}
svg {{ display: block; width: 100%; height: auto; margin-top: .3rem; }}
polyline {{ fill: none; stroke-width: 1.5; vector-effect: non-scaling-stroke; }}
.own {{ stroke: var(--own); }} .held {{ stroke: var(--held); }}
i.own, i.held {{ font-style: normal; }} i.own {{ color: var(--own); }} i.held {{ color: var(--held); }}
img {{ display: block; width: 100%; height: auto; border-radius: .35rem; margin-bottom: .35rem; }}
.pictures img {{ image-rendering: auto; }}
ul {{ margin: 0; padding-left: 1.1rem; }}
li {{ overflow-wrap: anywhere; }}
</style>
</head>
<body>
"""


def page(run: Path, seconds: float | None) -> str:
    """The page of a run as it is now. seconds: after which a browser is to read it again; None: never.

    ValueError: the folder holds no run.
    """
    if not (run / METRICS).exists():
        raise ValueError(f"{run} has no {METRICS}; a run's folder is expected")
    lines = RunLog.read(run)
    try:
        config = read_yaml(read_text(run / CONFIG_FILE), CONFIG_FILE)
    except OSError as error:
        raise ValueError(f"{run / CONFIG_FILE} cannot be read: {error.strerror}") from None
    total, done = int(config["iterations"]), max((line["iteration"] for line in lines), default=0)
    over = (run / SUMMARY).exists()
    refresh = "" if over or seconds is None else f'<meta http-equiv="refresh" content="{max(1, round(seconds))}">\n'
    state = "finished" if over else "going on, or ended early"
    return "".join(
        (
            HEAD.format(title=html.escape(f"{run.name}: {done} of {total}"), refresh=refresh),
            f"<h1>{html.escape(str(run))}</h1>\n<progress max=\"{total}\" value=\"{done}\"></progress>\n",
            f"<p>{done} of {total} iterations, {state}; drawn {time.strftime('%Y-%m-%d %H:%M:%S')}</p>\n",
            *_alarms(lines),
            *_curves(lines),
            *_samples(run, lines),
            *_grids(run),
            "</body>\n</html>\n",
        )
    )


def _alarms(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found = [f"iteration {line['iteration']}: {alarm}" for line in lines for alarm in line.get("alarms", ())]
    if found:
        shown = "".join(f"<li>{html.escape(alarm)}</li>" for alarm in reversed(found[-ALARMS:]))
        yield f"<h2>Alarms ({len(found)})</h2>\n<ul>{shown}</ul>\n"


def _curves(lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    names = list(dict.fromkeys(name for line in lines for name in line))
    rewards = dict.fromkeys(name.partition("/")[2] for name in names if name.startswith(("reward/", "held_out/")))
    panels = [(reward, {"own": f"reward/{reward}", "held": f"held_out/{reward}"}) for reward in rewards]
    panels += [(name, {"own": name}) for start in PANELS[1:] for name in names if name.startswith(start)]
    yield '<h2>Curves</h2>\n<p><i class="own">training</i>, <i class="held">held-out prompts</i></p>\n'
    yield '<div class="cards">\n'
    for title, series in panels:
        points = {
            kind: [(line["iteration"], line[name]) for line in lines if isinstance(line.get(name), int | float)]
            for kind, name in series.items()
        }
        if any(points.values()):
            yield _chart(title, points)
    yield "</div>\n"


def _chart(title: str, points: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Lines [(iteration, value), ...] by their kind, over one another."""
    every = [point for some in points.values() for point in some]
    right, low, high = max(x for x, _ in every) or 1, min(y for _, y in every), max(y for _, y in every)
    span = high - low or 1.0

    def place(x: float, y: float) -> str:
        across = EDGE + (WIDTH - 2 * EDGE) * x / right
        return f"{across:.1f},{HEIGHT - EDGE - (HEIGHT - 2 * EDGE) * (y - low) / span:.1f}"

    drawn = "".join(
        f'<polyline class="{kind}" points="{" ".join(place(*point) for point in some)}"/>'
        for kind, some in points.items() if some
    )  # fmt: skip
    last = ", ".join(f'<i class="{kind}">{some[-1][1]:.4g}</i>' for kind, some in points.items() if some)
    return (
        f"<figure><figcaption><b>{html.escape(title)}</b> now {last}; {low:.4g} to {high:.4g}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{html.escape(title)}">{drawn}</svg></figure>\n'
    )


def _samples(run: Path, lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    found = [(line["iteration"], sample) for line in lines for sample in line.get("samples", ())]
    shown = [(done, sample) for done, sample in found if (run / sample["file"]).is_file()][-SAMPLES:]
    if shown:
        yield "<h2>Best and worst training images</h2>\n<p>by the mixed reward, the newest first</p>\n"
        yield '<div class="pictures">\n'
        for done, sample in sorted(shown, key=lambda pair: -pair[0]):
            rewards = ", ".join(f"{name} {value:.4g}" for name, value in sample["rewards"].items())
            said = html.escape(f"{sample['prompt']} — {rewards}")
            yield (
                f'<figure><img loading="lazy" alt="{html.escape(sample["place"])}" src="{html.escape(sample["file"])}">'
                f"<figcaption><b>{done}, {html.escape(sample['place'])}</b> {said}</figcaption></figure>\n"
            )
        yield "</div>\n"


def _grids(run: Path) -> Iterator[str]:
    files = sorted((run / "images").glob("iteration-*.png"), reverse=True)
    if files:
        yield "<h2>Held-out prompts</h2>\n<p>the same prompts from the same noise, the newest first</p>\n"
        for file in files:
            done = int(file.stem.partition("-")[2])
            yield (
                f'<figure><img loading="lazy" alt="held-out images after {done} iterations" src="images/{file.name}">'
                f"<figcaption>after {done} iterations</figcaption></figure>\n"
            )


def watch(run: Path, seconds: float | None) -> Path:
    """Write the page into the run's folder, and again every so often until the run is over. None: once.

    ValueError: the folder holds no run, or cannot be written.
    """
    while True:
        text = page(run, seconds)
        try:
            write_whole(run / PAGE, text.encode(), alone=False)
        except OSError as error:
            raise ValueError(f"{run / PAGE} cannot be written: {error.strerror}") from None
        if seconds is None or (run / SUMMARY).exists():
            return run / PAGE
        time.sleep(seconds)
