"""From a recipe and `key.path=value` overrides to a `Config`; a mistake is a `ConfigError` of one line per field."""

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from egrpo_fast.config.config import Config
from egrpo_fast.config.recipe_files import ConfigError, Tree, override, read_recipe
from egrpo_fast.config.sections import CONFIG_FILE, RUN_FILE
from egrpo_fast.methods import METHODS, Method

RENAMED = {
    "model.decode_batch": "model.decode_batch_size",
    "rollout.micro_batch": "rollout.max_rows_per_call",
    "rollout.prompts_per_call": "rollout.prompts_per_rollout",
    "rollout.weights": "rollout.parameters",
    "tail.weights": "tail.quantization",
    "objective.normalise": "objective.scale_rewards",
    "optimizer.decay": "optimizer.lr_scheduler",
    "deepspeed.offload_weights": "deepspeed.offload_param",
    "evaluation.num_steps": "evaluation.num_inference_steps",
    "evaluation.prompts_per_call": "evaluation.batch_size",
    "evaluation.grid_pictures": "evaluation.grid_images",
    "checkpoint.keep": "checkpoint.save_total_limit",
}
"""What a setting was called in earlier versions, and what it is called now."""


def _sections(annotation: Any) -> Iterator[type[BaseModel]]:
    """The sections that a field may hold: by itself, or none, or in a list."""
    if parts := get_args(annotation):
        for part in parts:
            yield from _sections(part)
    elif annotation is Method:
        yield from METHODS.values()
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation


def _field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, field in model.model_fields.items():
        names.append(prefix + name)
        for section in _sections(field.annotation):
            names += _field_names(section, f"{prefix}{name}.")
    return names


def _nearest(where: str, given: Any) -> str:
    """Settings that an unknown one was perhaps meant as; empty: none is like it.

    Misspelt it is like the whole of a name, without its sections like the end of one.
    """
    while isinstance(given, dict) and given:  # a section that is none is known by what is in it
        inner, given = next(iter(given.items()))
        where = f"{where}.{inner}"
    parts = where.split(".")
    scores: dict[str, float] = {}
    for name in _field_names(Config):
        known = name.split(".")
        ends = {name, ".".join(known[-len(parts) :])}
        alike = max(difflib.SequenceMatcher(None, where, end).ratio() for end in ends)
        alike += 0.1 if len(known) == len(parts) == 1 else 0.0  # where it stands, not at the end of another
        scores[name] = max(alike, 0.8 if known[-1] == parts[-1] else 0.0)
    best = max(scores.values())
    names = [name for name, score in scores.items() if score == best]
    return " or ".join(names[:3]) if best >= 0.6 else ""


def _shown(text: str) -> str:
    """In one line that is not too long."""
    text = text if text.isprintable() else repr(text)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _explain(error: ValidationError) -> str:
    lines: dict[str, str] = {}
    for item in error.errors():
        # Branches of a union add their own tags to the location; the reader knows the field alone.
        unknown = item["type"] == "extra_forbidden"
        location = [str(part) for part in item["loc"] if unknown or isinstance(part, int) or str(part).isidentifier()]
        location = [part for part in location if unknown or part not in ("int", "list")]
        where, message = _shown(".".join(location)), item["msg"]
        if unknown:
            near = "" if where in RENAMED else _nearest(where, item["input"])
            message = "unknown key" + (f"; did you mean {near}?" if near else "")
            message = f"is called {RENAMED[where]} now" if where in RENAMED else message
        elif item["type"] == "missing":
            message = "missing, and has no default"
        elif item["type"] == "value_error":
            message = str(item["ctx"]["error"])
        else:
            message = f"{_shown(repr(item['input']))}: {message}"
        message = message if not where else f"{where}: {message}"
        lines[where] = f"{lines[where]}; or {item['msg']}" if where in lines else message
    return "\n".join(lines.values())


def _as_called_now(tree: Tree) -> None:
    """Give the settings of a run's own file, which has all of them, the names that they have now."""
    for old, new in RENAMED.items():
        section, _, name = old.partition(".")
        if isinstance(settings := tree.get(section), dict) and name in settings:
            settings[new.partition(".")[2]] = settings.pop(name)
    model, tail = tree.get("model"), tree.get("tail")
    if isinstance(model, dict) and isinstance(model.get("guidance"), int | float):
        model["guidance_scale"] = model.pop("guidance")
    if isinstance(tail, dict) and tail.get("quantization") == "exact":
        tail["quantization"] = "none"


def load_config(recipe: str | Config, overrides: Sequence[str] = ()) -> Config:
    """A named recipe or a YAML file, and what it extends, with `key.path=value` overrides (YAML values), checked.

    recipe: or settings that were loaded already. Raises ConfigError.
    """
    tree = recipe.used() if isinstance(recipe, Config) else read_recipe(recipe)
    if isinstance(recipe, str) and Path(recipe).name == CONFIG_FILE and Path(recipe).with_name(RUN_FILE).exists():
        _as_called_now(tree)
    for assignment in overrides:
        override(tree, assignment)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error)) from None
