"""Recipes as trees of settings: YAML, one file that extends another, `key.path=value` from the command line."""

import os
import re
from collections.abc import Iterable
from importlib import resources
from itertools import chain, islice
from pathlib import Path
from typing import Any

import yaml

from egrpo_fast.files import expanded, read_text

Tree = dict[str, Any]


class ConfigError(ValueError):
    """A configuration that cannot run; the message names each field, its value and what is allowed."""


EXTENDS = "extends"
"""Key of a recipe file: the recipe, or file relative to this one, whose settings it changes."""
FREE = ("options", "overrides")
"""Sections whose keys are no settings of ours: a dot there stands for itself."""
LIMIT, MOST_VALUES, MOST_LEVELS, MOST_DIGITS = 1 << 20, 100_000, 50, 100
"""Bytes of a recipe, values in it, sections inside sections, digits of a whole number: far more than any run needs."""
MERGE = "tag:yaml.org,2002:merge"
PLAIN = {
    "bool": ("true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": ("[-+]?(0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "merge": ("<<", "<"),
}
"""YAML 1.2's plain scalars that are not text, and the characters that they begin with."""


class _Loader(yaml.SafeLoader):
    """By the rules of YAML 1.2: `1e-4` is a number; `yes`, `010` and `1:30` are text. A key stands once."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 - PyYAML's own way

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key_node, _ in node.value:
            if key_node.tag == MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if key in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is given twice", key_node.start_mark)
            keys.add(key)
        return super().construct_mapping(node, deep)

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = self.construct_scalar(node)
        if len(text) > MOST_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, f"a number of {len(text)} digits", node.start_mark)
        return int(text, 0)


class _Dumper(yaml.SafeDumper):
    """Quotes all text that either version of YAML would read as something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)
for _kind, (_pattern, _first) in PLAIN.items():
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_yaml(text: str, where: str) -> Any:
    """What a YAML text says, by the rules of YAML 1.2. ConfigError, with `where` it stands: it is none, or too much."""
    try:
        found = yaml.load(text, _Loader)
    except RecursionError:
        raise ConfigError(f"{where}: nested too deeply") from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ConfigError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
    layer = [found]
    for _ in range(MOST_LEVELS):  # an alias may make a tree of any size, or without end
        inside: Iterable[Iterable[Any]] = (
            each.values() if isinstance(each, dict) else each for each in layer if isinstance(each, dict | list)
        )
        layer = list(islice(chain.from_iterable(inside), MOST_VALUES + 1))
        if len(layer) > MOST_VALUES:
            raise ConfigError(f"{where}: more than {MOST_VALUES:,} values")
    if layer:
        raise ConfigError(f"{where}: nested too deeply")
    return found


def write_yaml(tree: Tree) -> str:
    """The tree as YAML that `read_yaml`, and any other reader, reads as the same."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


def recipe_names() -> list[str]:
    """Recipes that ship with the package."""
    names = (item.name for item in resources.files("egrpo_fast.recipes").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def _names(path: str, where: str) -> list[str]:
    """The parts of a dotted key."""
    if not all(names := path.split(".")):
        raise ConfigError(f"{where}: {path!r} is no setting's name")
    return names


def _section(tree: Tree, names: list[str], path: str) -> Tree:
    """The section that these names lead to, made where it is not there."""
    for name in names:
        if tree.get(name) is None:
            tree[name] = {}
        tree = tree[name]
        if not isinstance(tree, dict):
            raise ConfigError(f"{path}: {name} is a value, not a section")
    return tree


def _undotted(tree: dict[Any, Any], where: str) -> Tree:
    """The same with `a.b: value` as `a: {b: value}`, at every level. ConfigError: a setting is given twice."""
    made: Tree = {}

    def add(target: Tree, key: str, value: Any) -> None:
        both = isinstance(value, dict) and isinstance(target.get(key), dict)
        if key in target and not both:
            raise ConfigError(f"{where}: {key} is given twice")
        if both:
            for inner, part in value.items():
                add(target[key], inner, part)
        else:
            target[key] = value

    for key, value in tree.items():
        if not isinstance(key, str):
            raise ConfigError(f"{where}: {key!r} is no setting's name")
        *parents, leaf = _names(key, where)
        if isinstance(value, dict) and leaf not in FREE:
            value = _undotted(value, where)
        add(_section(made, parents, f"{where}: {key}"), leaf, value)
    return made


def merged(base: Any, changes: Any) -> Any:
    """`base` with the settings of `changes`; lists, and sections of another `name`, are replaced as a whole."""
    if not (isinstance(base, dict) and isinstance(changes, dict)):
        return changes
    if "name" in base and "name" in changes and base["name"] != changes["name"]:
        return changes
    return base | {key: merged(base.get(key), value) for key, value in changes.items()}


def read_recipe(recipe: str, extended_by: tuple[str, ...] = ()) -> Tree:
    """The tree of a named recipe or of a YAML file, with what it extends. ConfigError.

    extended_by: the files that asked for this one, from the first on.
    """
    field = f"{extended_by[-1]}: {EXTENDS}" if extended_by else "recipe"
    if recipe in recipe_names():
        text = (resources.files("egrpo_fast.recipes") / f"{recipe}.yaml").read_text()
    else:
        try:
            folder = Path(extended_by[-1] if extended_by else "").parent
            there = len(recipe) < 4096 and os.path.isfile(folder / recipe)  # a run's own file, say: its name is known
            path = folder / (recipe if there else expanded(recipe))
            text, recipe = read_text(path, LIMIT), str(path.resolve() if extended_by else path)
        except FileNotFoundError:
            message = f"no file and no recipe {recipe!r}; there are: {', '.join(recipe_names())}"
            raise ConfigError(f"{field}: {message}") from None
        except OSError as error:
            raise ConfigError(f"{field}: cannot read {recipe}: {error.strerror}") from None
        except ValueError as error:
            raise ConfigError(f"{field}: {error}") from None
        if str(path.resolve()) in (str(Path(file).resolve()) for file in extended_by):
            raise ConfigError(f"{field}: {' extends '.join((*extended_by, recipe))}, which never ends")
    tree = read_yaml(text, f"recipe: {recipe}")
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe: {recipe} must hold a mapping of settings")
    tree = _undotted(tree, f"recipe: {recipe}")
    if EXTENDS not in tree:
        return tree
    base = tree.pop(EXTENDS)
    if not isinstance(base, str):
        raise ConfigError(f"{recipe}: {EXTENDS}: {base!r} is neither a recipe nor a file")
    return merged(read_recipe(base, (*extended_by, recipe)), tree)


def override(tree: Tree, assignment: str) -> None:
    """Change a tree by `key.path=value`, a YAML value. ConfigError."""
    path, equals, value = assignment.partition("=")
    if not equals or not path:
        raise ConfigError(f"override: {assignment!r} is not key.path=value")
    *parents, leaf = _names(path, "override")
    _section(tree, parents, path)[leaf] = read_yaml(value, path)
