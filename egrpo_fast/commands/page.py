"""Images side by side with their scores: one HTML file that needs nothing else, and the tables above it."""

import base64
import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from egrpo_fast.terminal import printable


@dataclass(frozen=True)
class Table:
    """The first column is text, the others are numbers."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [list(map(_cell, row)) for row in (self.header, *self.rows)]
        widths = [max(3, *map(len, column)) for column in zip(*lines)]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        padded = [[row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in lines]
        message = (f"| {' | '.join(row)} |" for row in (padded[0], rule, *padded[1:]))
        return "\n".join((f"**{self.title}**", "", *message))

    def html(self) -> str:
        def row(cells: Sequence[str], tag: str) -> str:
            # The interval may go below its number where the screen is narrow.
            shown = (html.escape(cell).replace(" [", " <span>[").replace("]", "]</span>") for cell in cells[1:])
            return (
                f"<tr><{tag}>{html.escape(cells[0])}</{tag}>{''.join(f'<{tag}>{cell}</{tag}>' for cell in shown)}</tr>"
            )

        return (
            f'<div class="table"><table><caption>{html.escape(self.title)}</caption>'
            f"<thead>{row(self.header, 'th')}</thead><tbody>{''.join(row(cells, 'td') for cells in self.rows)}</tbody>"
            "</table></div>"
        )


def _cell(text: str) -> str:
    return printable(text.replace("|", "\\|").replace("\n", " "))


@dataclass(frozen=True)
class Shown:
    """One model's image of a prompt, as PNG, and its score by every reward."""

    label: str
    png: bytes
    scores: dict[str, float]


# The policy lets the page load nothing and run nothing, should an escape ever be missing.
HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --back: #fafafa; --card: #fff; --ink: #1c1c1e; --dim: #6b6b70; --line: #e2e2e5;
  --best: #0a7d3b; }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #131315; --card: #1d1d20; --ink: #ececee; --dim: #9a9aa0;
  --line: #323237; --best: #5fd08b; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 72rem; padding: 1rem; background: var(--back); color: var(--ink);
  font: 16px/1.45 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; margin: .5rem 0; overflow-wrap: anywhere; }}
p.about {{ color: var(--dim); margin: 0 0 1rem; }}
.table {{ overflow-x: auto; margin: 0 0 1.25rem; }}
table {{ border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }}
caption {{ text-align: left; font-weight: 600; padding-bottom: .25rem; }}
th, td {{ padding: .3rem .8rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); }}
td span {{ color: var(--dim); white-space: nowrap; }}
th:first-child, td:first-child {{ text-align: left; }}
main {{ display: grid; gap: 1rem; }}
main:has(img.small) {{ grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }}
article {{ background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .8rem;
  content-visibility: auto; contain-intrinsic-size: auto 24rem; }}
h2 {{ font-size: 1rem; font-weight: 500; margin: 0 0 .6rem; overflow-wrap: anywhere; }}
h2 span {{ color: var(--dim); margin-right: .4rem; }}
.side {{ display: grid; gap: .8rem; grid-template-columns: repeat(auto-fit, minmax(min(9rem, 45%), 1fr)); }}
figure {{ margin: 0; min-width: 0; max-width: 32rem; }}
img {{ display: block; width: 100%; height: auto; border-radius: .35rem; background: var(--line); }}
img.small {{ image-rendering: pixelated; max-width: 16rem; }}
figcaption {{ font-size: .8125rem; margin-top: .35rem; }}
figcaption b {{ overflow-wrap: anywhere; }}
dl {{ display: grid; grid-template-columns: auto 1fr; gap: 0 .6rem; margin: .15rem 0 0; }}
dt {{ color: var(--dim); overflow-wrap: anywhere; }}
dd {{ margin: 0; font-variant-numeric: tabular-nums; }}
dd.best {{ color: var(--best); font-weight: 600; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p class="about">{about}</p>
"""


def write_page(
    path: Path, title: str, about: str, tables: Sequence[Table], rows: Iterable[tuple[str, Sequence[Shown]]]
) -> None:
    """rows: a prompt and what every model made of it. Written row by row: images are never all in memory."""
    part = path.with_name(f".{path.name}")
    with part.open("w", encoding="utf-8") as page:
        page.write(HEAD.format(title=html.escape(title), about=html.escape(about)))
        page.writelines(table.html() + "\n" for table in tables)
        page.write("<main>\n")
        for number, (prompt, shown) in enumerate(rows):
            _write_row(page, number, prompt, shown)
        page.write("</main>\n</body>\n</html>\n")
    part.replace(path)


def _write_row(page: TextIO, number: int, prompt: str, shown: Sequence[Shown]) -> None:
    best = {name: max(some.scores[name] for some in shown) for name in shown[0].scores}
    alike = {name for name in best if all(some.scores[name] == best[name] for some in shown)}
    page.write(f'<article><h2><span>{number}</span>{html.escape(prompt)}</h2><div class="side">\n')
    for some in shown:
        width, height = (int.from_bytes(some.png[at : at + 4], "big") for at in (16, 20))  # PNG's first chunk
        scores = "".join(
            f"<dt>{html.escape(name)}</dt><dd{_best(value == best[name] and name not in alike)}>{value:.4f}</dd>"
            for name, value in some.scores.items()
        )
        page.write(
            f'<figure><img{_small(width)} width="{width}" height="{height}" loading="lazy" decoding="async" '
            f'alt="{html.escape(some.label)}" src="data:image/png;base64,{base64.b64encode(some.png).decode()}">'
            f"<figcaption><b>{html.escape(some.label)}</b><dl>{scores}</dl></figcaption></figure>\n"
        )
    page.write("</div></article>\n")


def _best(is_best: bool) -> str:
    return ' class="best"' if is_best else ""


def _small(width: int) -> str:
    return ' class="small"' if width < 128 else ""
