"""Every setting of a run as Markdown tables, drawn from the typed configuration: docs/configuration.md."""

from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic.json_schema import models_json_schema

from egrpo_fast.config.config import Config
from egrpo_fast.methods import METHODS

Node = Mapping[str, Any]
"""A node of the configuration's JSON schema."""

INTRODUCTION = """\
<!-- Written by `make docs` from egrpo_fast/config/: change it there. -->
# Configuration

A recipe is a YAML tree of these settings; `key.path=value` on the command line changes one, by a YAML value. In a file
a setting may be written as a section or by its whole name (`optimizer.lr: 1.0e-4`), but once.
**Required** is what has no default, `null` means none given. What is unknown, of another type, out of range or not
used by the method is refused by name before anything loads. Values are read by the rules of YAML 1.2: `yes` is text and
no truth value, `010` and `1:30` are no numbers; whole numbers are below 2^31. In paths `~` and variables such as
`$HOME` are filled in; `$$` is a dollar sign. A path of digits alone would be read as a number: quote it, or write
`./2026`. `egrpo settings` prints this page.

A recipe of your own may extend another: a shipped one by its name, or a file, found from the folder of the file that
names it. Its settings change those; a list, or a section of another `name`, replaces the whole.

```yaml
extends: flux-dev-8x80gb
model:
  path: /models/FLUX.1-dev
schedule.eta: 0.6
```
"""
KINDS = {
    "integer": "integer", "number": "number", "string": "text", "boolean": "`true`, `false`", "object": "mapping",
    "null": "`null`",
}  # fmt: skip


def _value(value: Any) -> str:
    """As it would stand in a recipe."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n")
    return f"`{text.strip()}`"


def _range(node: Node) -> str:
    """`>= 1`, `in [1, 512]`, `in (0, 1]`, or nothing."""
    low, high = (node.get(key, node.get(f"exclusive{key.title()}")) for key in ("minimum", "maximum"))
    if high is None or high == 2**31:  # the bound of every whole number, said once in the introduction
        return "" if low is None else f"{'≥' if 'minimum' in node else '>'} {low:g}"
    message = "2^63" if high == 2**63 else f"{high:g}" if high < 1e6 else f"{high:,.0f}"
    return f"in {'[' if 'minimum' in node else '('}{low:g}, {message}{']' if 'maximum' in node else ')'}"


def _allowed(node: Node) -> str:
    """Type and range, in words."""
    if options := node.get("anyOf"):
        return " or ".join(map(_allowed, options))
    if "enum" in node:
        return ", ".join(map(_value, node["enum"]))
    if "const" in node:
        return _value(node["const"])
    if members := node.get("prefixItems"):
        return f"[{'; '.join(map(_allowed, members))}]"
    if node["type"] == "array":
        return f"{'non-empty ' if node.get('minItems') else ''}list of {_allowed(node['items'])}"
    return f"{KINDS[node['type']]} {_range(node)}".strip()


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _places(node: Node) -> Iterator[Node]:
    """Where a section may stand: there by itself, or none, or in a list, or as one of several."""
    yield node
    for place in (*([node["items"]] if "items" in node else ()), *node.get("anyOf", ()), *node.get("oneOf", ())):
        yield from _places(place)


def _table(path: str, section: Node, sections: Mapping[str, Node]) -> Iterator[str]:
    """The section's own settings, then the sections inside it."""
    rows, inside = [], []
    for name, node in section["properties"].items():
        if found := [sections[place["$ref"].rpartition("/")[2]] for place in _places(node) if "$ref" in place]:
            inside.append((f"{path}{name}{'[]' if 'items' in node else ''}", node, found))
        else:
            default = _value(node["default"]) if "default" in node and "const" not in node else "**required**"
            rows.append(f"| `{path}{name}` | {_cell(_allowed(node))} | {default} | {_cell(node['description'])} |")
    yield from ("| setting | allowed | default | |", "| --- | --- | --- | --- |", *rows, "")
    for place, node, found in inside:
        yield f"## {place}\n"
        if "description" in node:
            yield f"{_cell(node['description'])}\n"
        for one in found:
            if len(found) > 1:
                yield f"### {one['properties']['name']['const']}\n"
            if "description" in one:
                yield f"{_cell(one['description'])}\n"
            yield from _table(f"{place}.", one, sections)


def reference() -> str:
    """The whole page: one table per section, one line per setting."""
    schema = Config.model_json_schema()
    places, methods = models_json_schema([(METHODS[name], "validation") for name in sorted(METHODS)])
    schema["$defs"] |= methods["$defs"]
    del schema["properties"]["method"]["$ref"]
    schema["properties"]["method"]["oneOf"] = list(places.values())
    return "\n".join((INTRODUCTION, *_table("", schema, schema["$defs"])))
