"""Thousands of broken configurations, one mistake each: every one a ConfigError that names its field."""

import copy
import math
import random
import types
import typing
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from egrpo_fast.config import OWNED_BY_US, Config, ConfigError, TailConfig, TaylorSeerConfig, load_config
from egrpo_fast.methods import METHODS, Method

SECTIONS = {  # a whole tree in which every optional section is there, so that every field can be broken
    "output_dir": "runs/fuzz",
    "model": {"path": "shapes", "lora": {}, "guidance": {}},
    "prompts": {"train": "shapes", "held_out": "shapes"},
    "schedule": {}, "rollout": {}, "tail": {}, "objective": {}, "optimizer": {}, "deepspeed": {}, "checkpoint": {},
    "samples": {}, "guards": {},
    "rewards": [{"name": "shapes_soft"}, {"name": "clip", "weight": 0, "options": {"model": "shapes"}}],
    "evaluation": {"stop_when": {"reward": "clip"}},
}  # fmt: skip


def branches(annotation):
    """The alternatives of a type, each as its bare type and the constraints that hold for it."""
    if typing.get_origin(annotation) is typing.Annotated:
        inner, *metadata = typing.get_args(annotation)
        return [(kind, [*told, *metadata]) for kind, told in branches(inner)]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [branch for each in typing.get_args(annotation) for branch in branches(each)]
    return [(annotation, [])]


def constraints(metadata):
    """Bounds by name, whether they came by `Field` or one by one."""
    bounds = {}
    for each in metadata:
        for one in getattr(each, "metadata", [each]):
            for name in ("ge", "gt", "le", "lt", "min_length"):
                if (value := getattr(one, name, None)) is not None:
                    bounds[name] = value
    return bounds


def fields(model, path=()):
    """(path, alternatives) of every field of the tree; lists of sections by their first entry.

    A section that is chosen by its name (`method`, `tail.cache`) is not entered: see BRANCH_FIELDS.
    """
    for name, info in model.model_fields.items():
        here = (*path, name)
        kinds = [(kind, [*told, *info.metadata]) for kind, told in branches(info.annotation)]
        yield here, kinds
        sections = [kind for kind, _ in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if Method in sections or any(kind is TaylorSeerConfig for kind in sections):  # chosen by a name: BRANCH_FIELDS
            continue
        for kind, _ in kinds:
            items = typing.get_args(kind) if typing.get_origin(kind) is list else ()
            for inner, step in ((kind, here), *((item, (*here, 0)) for item in items)):
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    yield from fields(inner, step)


FIELDS = list(fields(Config))
NAMES = [".".join(map(str, path)) for path, _ in FIELDS]
CACHE = TailConfig.model_fields["cache"].annotation
BRANCH_FIELDS = [
    (path, kinds, {**SECTIONS, **tree(typing.get_args(section.model_fields["name"].annotation)[0])})
    for annotation, place, tree in (
        (typing.Union[tuple(METHODS.values())], ("method",), lambda name: {"method": name}),  # noqa: UP007
        (CACHE, ("tail", "cache"), lambda name: {"tail": {"cache": {"name": name}}}),
    )
    for section, _ in branches(annotation)
    if section is not types.NoneType
    for path, kinds in fields(section, place)
    if path[-1] != "name"
]
TREES = [*((path, kinds, SECTIONS) for path, kinds in FIELDS), *BRANCH_FIELDS]
"""Every field, with a tree in which it is."""


def is_number(kind):
    return kind in (int, float)


def wrong_values(kinds):
    """Values that no alternative of a field takes."""
    plain = [typing.get_origin(kind) or kind for kind, _ in kinds]
    choices = [typing.get_args(kind) for kind, _ in kinds if typing.get_origin(kind) is typing.Literal]
    literals = [value for choice in choices for value in choice]
    found = [st.just([[["nested"]]]), st.just({"no": {"such": "thing"}})]
    if dict in plain or any(isinstance(kind, type) and issubclass(kind, BaseModel) for kind in plain):
        found = [st.just([1, 2]), st.integers(), st.text("abc", min_size=1), st.floats(allow_nan=True)]
    if types.NoneType not in plain:
        found.append(st.none())
    if not {str, Path} & set(plain):
        found.append(st.text("xyz", min_size=4))  # nothing that reads as a number or a truth value
    if not {int, float, bool} & set(plain) and not any(isinstance(value, int) for value in literals):
        found += [st.integers(), st.floats()]
    if literals:
        found.append(st.text("xyz", min_size=1).filter(lambda text: text not in literals))
        if not {int, float} & set(plain):
            found.append(st.integers(10, 99))
    for kind, metadata in kinds:
        bounds = constraints(metadata)
        if is_number(kind):
            found += list(outside(kind, bounds))
            found.append(st.sampled_from([float("nan"), float("inf"), float("-inf")]))
        if kind is int:
            found.append(st.floats(0.1, 0.9).map(lambda part: 3 + part))
        if typing.get_origin(kind) is list:
            found += list(broken_lists(kind, bounds))
        if typing.get_origin(kind) is tuple:
            sizes = st.lists(st.floats(0.1, 0.9), max_size=4).filter(lambda numbers: len(numbers) != 2)
            found += [sizes, st.tuples(st.floats(0.1, 0.9), st.floats(1.0, 9.0)).map(list)]
    return st.one_of(found)


def outside(kind, bounds):
    """Numbers just, or far, out of range."""
    step = 1 if kind is int else 1e-9
    if "ge" in bounds:
        yield st.sampled_from([bounds["ge"] - step, bounds["ge"] - 10**6])
    if "gt" in bounds:
        yield st.sampled_from([bounds["gt"], bounds["gt"] - step, bounds["gt"] - 10**6])
    if "le" in bounds:
        above = bounds["le"] + 1 if kind is int else math.nextafter(bounds["le"], math.inf)
        yield st.sampled_from([above, bounds["le"] + 10**6])
    if "lt" in bounds:
        yield st.sampled_from([bounds["lt"], bounds["lt"] * 2])


def broken_lists(kind, bounds):
    """Lists with one entry that the field does not take; and the empty one where it must not be."""
    (item,) = typing.get_args(kind)
    if bounds.get("min_length"):
        yield st.just([])
    for inner, metadata in branches(item):
        if is_number(inner):
            for broken in (*outside(inner, constraints(metadata)), st.just("x"), st.none(), st.just(float("nan"))):
                yield broken.map(lambda value: [value])
        if inner is str:
            yield st.one_of(st.integers(), st.none(), st.just([])).map(lambda value: ["to_q", value])


def put(tree, path, value):
    tree = copy.deepcopy(tree)
    if path[0] == "method" and len(path) > 1:
        tree["method"] = {"name": tree["method"]}
    node = tree
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return tree


def refusal(tree, folder):
    """The message that load_config refuses a tree with."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as told:
        load_config(str(file))
    return str(told.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


EXAMPLES = 28
"""Per field; there are enough fields for thousands."""
FUZZ = settings(
    max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)  # fmt: skip


def test_the_whole_tree_is_valid_and_known(folder):
    (folder / "recipe.yaml").write_text(yaml.safe_dump(SECTIONS))
    config = load_config(str(folder / "recipe.yaml"))
    assert config.model.lora is not None and config.evaluation.stop_when is not None
    assert len(NAMES) == len(set(NAMES)) > 80
    assert {"model.lora.rank", "rewards.0.weight", "evaluation.stop_when.drop"} <= set(NAMES), "sections in sections"


def test_broken_values_are_refused_by_the_name_of_their_field(folder):
    reached = Counter()

    def break_field(path, kinds, tree, name, label):
        @FUZZ
        @given(wrong_values(kinds))
        def broken(value):
            message = refusal(put(tree, path, value), folder)
            assert any(line.startswith(name) for line in message.splitlines()), (label, value, message)
            reached[label] += 1

        broken()

    for path, kinds, tree in TREES:
        name = ".".join(map(str, path))
        break_field(path, kinds, tree, name, (name, tree.get("method")))
    assert len(reached) == len(TREES), "every field was broken"
    print(f"{reached.total()} broken values of {len(reached)} fields, each refused by name")
    assert reached.total() >= 1500 and min(reached.values()) >= 2


def test_misspelt_and_unknown_keys_are_refused_with_the_nearest_name(folder):
    rng, refused = random.Random(0), 0
    for path, _, tree in TREES:
        if isinstance(path[-1], int):
            continue
        for _ in range(5):
            name, at = path[-1], rng.randrange(len(path[-1]))
            letter = rng.choice("qxz")
            wrong = rng.choice([name[:at] + letter + name[at:], name[:at] + letter + name[at + 1 :], name + letter])
            if wrong == name:
                continue
            where = ".".join(map(str, (*path[:-1], wrong)))
            message = refusal(put(tree, (*path[:-1], wrong), 1), folder)
            assert message.startswith(f"{where}: unknown key"), (where, message)
            if len(name) > 4 and not any(isinstance(part, int) for part in path):
                # Methods share one place, and another's name may be as near.
                near = "did you mean method." if path[:-1] == ("method",) else f"did you mean {'.'.join(path)}?"
                assert near in message, (where, message)
            refused += 1
    print(f"{refused} misspelt keys, each refused by name")
    assert refused >= 400


REQUIRED = [
    "output_dir", "model", "model.path", "prompts", "prompts.train", "prompts.held_out", "rewards", "rewards.0.name",
    "evaluation.stop_when.reward",
]  # fmt: skip


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_fields_are_refused_by_name(name, folder):
    *parents, leaf = next(path for path, found in zip([path for path, _ in FIELDS], NAMES) if found == name)
    tree = node = copy.deepcopy(SECTIONS)
    for part in parents:
        node = node[part]
    del node[leaf]
    assert f"{name}: missing, and has no default" in refusal(tree, folder)


def across(draw):
    """One rule that spans fields, broken: (settings to change, the field that is named)."""
    steps = draw(st.integers(2, 40))
    past = draw(st.integers(steps, steps + 50))
    wrong_length = draw(st.integers(1, 60).filter(lambda count: count != steps))
    not_half = draw(st.integers(1, 60).filter(lambda count: count != steps // 2))
    grid = {"schedule.num_steps": steps}
    owned = draw(st.sampled_from(sorted(OWNED_BY_US)))
    index = draw(st.integers(0, steps - 1))
    merges = [1] * steps
    merges[index] = steps - index + draw(st.integers(1, 9))
    repeated = draw(st.integers(0, steps - 1))
    one = draw(st.sampled_from(["rollout.group_size", "tail.stride"]))
    rank = draw(st.sampled_from([1, 2]))
    unknown = draw(st.text("xyz", min_size=1, max_size=9))
    return draw(
        st.sampled_from(
            [
                (grid | {"schedule.active_steps": [past]}, "schedule.active_steps"),
                (grid | {"schedule.active_steps": [repeated, repeated]}, "schedule.active_steps"),
                (grid | {"schedule.active_steps": [steps - 1, 0]}, "schedule.active_steps"),
                (grid | {"schedule.merge_lengths": [1] * wrong_length}, "schedule.merge_lengths"),
                (grid | {"schedule.merge_lengths": merges}, "schedule.merge_lengths"),
                (grid | {"schedule.merge_lengths": past + 1}, "schedule.merge_lengths"),
                (grid | {"schedule.merge_lengths": 1, "schedule.max_merge": past}, "schedule.max_merge"),
                (grid | {one: [2] * not_half}, one),
                ({"schedule.shift": 10.0 ** draw(st.integers(25, 300))}, "schedule"),
                ({"schedule.eta": 10.0 ** draw(st.integers(170, 300))}, "schedule"),
                ({"deepspeed.overrides": {owned: 1}}, "deepspeed.overrides"),
                ({"rollout.parameters": "sharded", "tail.lora": unknown}, "tail.lora"),
                ({"rollout.parameters": "sharded", "tail.quantization": "int8"}, "tail.quantization"),
                ({"rollout.parameters": "sharded", "tail.cache": "taylor_seer"}, "tail.cache"),
                ({"tail.cache": "taylor_seer", "model.guidance.calls": 2}, "tail.cache"),
                ({"tail.cache": "taylor_seer", "model.guidance.truncation": 0.5}, "tail.cache"),
                ({"rewards": [{"name": unknown, "weight": 0}]}, "rewards"),
                ({"rewards": [{"name": unknown}] * draw(st.integers(2, 4))}, "rewards"),
                ({"evaluation.stop_when": {"reward": unknown}}, "evaluation.stop_when.reward"),
                ({"evaluation.stop_when": {"reward": "shapes_soft"}}, "evaluation.stop_when.reward"),
                ({"evaluation.every": 0}, "evaluation.stop_when"),
                ({"checkpoint.best": unknown}, "checkpoint.best"),
                ({"deepspeed.offload_optimizer": "nvme"}, "deepspeed.nvme_path"),
                ({"deepspeed.offload_param": "nvme"}, "deepspeed.nvme_path"),
                ({"deepspeed.offload_param": "cpu", "deepspeed.zero_stage": rank}, "deepspeed.offload_param"),
                (
                    {
                        "deepspeed.offload_optimizer": "nvme", "deepspeed.nvme_path": unknown,
                        "deepspeed.zero_stage": rank,
                    },
                    "deepspeed.offload_optimizer",
                ),
                (
                    {"deepspeed.offload_optimizer": "cpu", "optimizer.name": "adamw8bit"},
                    "deepspeed.offload_optimizer",
                ),
                (
                    {
                        "deepspeed.offload_optimizer": "nvme", "deepspeed.nvme_path": unknown,
                        "optimizer.ema_decay": 0.5,
                    },
                    "optimizer.ema_decay",
                ),
            ]
        )
    )  # fmt: skip


def test_settings_that_contradict_one_another_are_refused_by_name(folder):
    named = Counter()

    @settings(FUZZ, max_examples=500)
    @given(st.composite(across)())
    def contradict(broken):
        changed, name = broken
        tree = SECTIONS
        for path, value in changed.items():
            tree = put(tree, path.split("."), value)
        message = refusal(tree, folder)
        assert message.startswith(name), (changed, message)
        named[name] += 1

    contradict()
    print(f"{sum(named.values())} contradictions in {len(named)} fields, each refused by name")
    assert sum(named.values()) >= 400 and len(named) >= 13, named


def right_values(kinds):
    """Values that a field takes by itself."""
    found = []
    for kind, metadata in kinds:
        bounds = constraints(metadata)
        low, high = bounds.get("ge", bounds.get("gt")), bounds.get("le", bounds.get("lt"))
        if typing.get_origin(kind) is typing.Literal:
            found.append(st.sampled_from(typing.get_args(kind)))
        elif kind is bool:
            found.append(st.booleans())
        elif kind is int:
            found.append(st.integers(low, high - ("lt" in bounds) if high is not None else 10**6))
        elif kind is float:
            limits = {"exclude_min": "gt" in bounds, "exclude_max": "lt" in bounds}
            limits = {name: value for name, value in limits.items() if value}
            found.append(st.floats(low, high, allow_nan=False, allow_infinity=False, **limits))
        elif kind is types.NoneType:
            found.append(st.none())
        elif kind in (str, Path):
            found.append(st.text("abc/._-", min_size=1, max_size=20))
    return st.one_of(found) if found else None


CROSS = {  # fields whose range depends on others
    "schedule.num_steps", "schedule.shift", "schedule.eta", "schedule.sde_form", "method",
    "schedule.merge_lengths", "schedule.active_steps",
    "schedule.max_merge", "rewards.0.weight", "rewards.0.name", "rewards.1.name", "evaluation.stop_when",
    "evaluation.stop_when.reward", "evaluation.every", "checkpoint.best", "deepspeed.offload_optimizer",
    "deepspeed.offload_param", "deepspeed.zero_stage", "model.quantization", "model.lora", "rewards", "model.attention",
    "rollout.parameters", "tail.lora", "tail.quantization",
}  # fmt: skip


def test_random_valid_configs_are_accepted(folder):
    free = [
        (path, right_values(kinds)) for (path, kinds), name in zip(FIELDS, NAMES) if name not in CROSS
    ]  # fmt: skip
    free = [(path, values) for path, values in free if values is not None]
    accepted = Counter()

    @settings(FUZZ, max_examples=400)
    @given(st.data())
    def accepts(data):
        tree = SECTIONS
        for path, values in data.draw(st.lists(st.sampled_from(free), max_size=12, unique_by=lambda each: each[0])):
            value = data.draw(values)
            tree = put(tree, path, value)
            accepted[path] += 1
        (folder / "recipe.yaml").write_text(yaml.safe_dump(tree))
        config = load_config(str(folder / "recipe.yaml"))
        (folder / "again.yaml").write_text(config.yaml())
        assert load_config(str(folder / "again.yaml")) == config

    accepts()
    assert len(accepted) == len(free) > 50
