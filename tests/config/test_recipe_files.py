"""Recipes as trees: YAML by the rules of 1.2, dotted keys, keys once, one file that extends another."""

import pytest
import yaml

from egrpo_fast.config import ConfigError, load_config
from egrpo_fast.config.recipe_files import read_recipe, read_yaml, write_yaml

SCALARS = {
    "1e-4": 1e-4, "1": 1, "+5": 5, "-3": -3, "0x1f": 31, "0o10": 8, "1.": 1.0, ".5": 0.5, "1e5": 1e5, "true": True,
    "False": False, "~": None, "null": None, "": None, "-.inf": float("-inf"), "<<x": "<<x",
    # What YAML 1.1 takes for a truth value, an octal or sexagesimal number, a date.
    "yes": "yes", "on": "on", "010": "010", "00": "00", "1:30": "1:30", "1_000": "1_000", "2026-11-26": "2026-11-26",
}  # fmt: skip


@pytest.mark.parametrize("text", SCALARS)
def test_scalars(text):
    found = read_yaml(text, "here")
    assert found == SCALARS[text] and type(found) is type(SCALARS[text])


@pytest.mark.parametrize("value", [*SCALARS.values(), *SCALARS, "a: b", "# x", "line\\nbreak", 1e-300, 2**62])
def test_what_is_written_is_read_as_the_same_by_any_reader(value):
    text = write_yaml({"key": value})
    assert read_yaml(text, "here") == yaml.safe_load(text) == {"key": value}


def recipe(folder, text, name="recipe.yaml"):
    (folder / name).write_text(text)
    return str(folder / name)


def test_a_dotted_key_is_a_setting(tmp_path):
    text = "extends: shapes\noptimizer.lr: 1.0e-3\nschedule: {eta: 0.5}\nschedule.num_steps: 8\nmodel.lora.rank: 4\n"
    config = load_config(recipe(tmp_path, text))
    assert (config.optimizer.lr, config.optimizer.warmup_steps) == (1e-3, 3)
    assert (config.schedule.eta, config.schedule.num_steps, config.model.lora.rank) == (0.5, 8, 4)


def test_a_dot_in_what_is_not_ours_stays(tmp_path):
    tree = read_recipe(recipe(tmp_path, "deepspeed: {overrides: {a.b: 1}}\nrewards: [{name: x, options: {c.d: 1}}]\n"))
    assert tree["deepspeed"]["overrides"] == {"a.b": 1} and tree["rewards"][0]["options"] == {"c.d": 1}


TWICE = {
    "model: {width: 64}\nmodel: {height: 64}\n": "model is given twice",
    "optimizer: {lr: 1, lr: 2}\n": "lr is given twice",
    "optimizer.lr: 1\noptimizer.lr: 2\n": "optimizer.lr is given twice",
    "optimizer: {lr: 1}\noptimizer.lr: 2\n": "lr is given twice",
    "optimizer.lr: 2\noptimizer: {lr: 1}\n": "lr is given twice",
    "optimizer: 3\noptimizer.lr: 2\n": "optimizer is a value, not a section",
    ".foo: 1\n": "'.foo' is no setting's name",
    "optimizer: {1: 2}\n": "1 is no setting's name",
    "a: &a [*a]\n": "nested too deeply",
    "a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 8)}]\n" for n in range(8)
    ): "more than 100,000 values",
}  # fmt: skip


@pytest.mark.parametrize("text", TWICE)
def test_what_cannot_be_meant_is_refused(text, tmp_path):
    with pytest.raises(ConfigError, match=TWICE[text]) as told:
        read_recipe(recipe(tmp_path, text))
    assert "recipe.yaml" in str(told.value) and len(str(told.value).splitlines()) == 1


def test_a_recipe_extends_others(tmp_path):
    (tmp_path / "inner").mkdir()
    recipe(
        tmp_path, "extends: shapes\nseed: 1\nmethod: {name: mix_grpo, window: 2}\noptimizer.lr: 1.0e-3\n", "base.yaml"
    )
    recipe(
        tmp_path / "inner", "extends: ../base.yaml\nseed: 2\nmethod: {name: dance_grpo}\nmodel.lora: {rank: 2}\n", "own"
    )
    config = load_config(str(tmp_path / "inner" / "own"), ["iterations=7"])
    assert (config.seed, config.iterations, config.optimizer.lr, config.optimizer.warmup_steps) == (2, 7, 1e-3, 3)
    assert config.method.name == "dance_grpo" and config.model.lora.rank == 2 and len(config.rewards) == 3
    assert "extends" not in config.yaml(), "a run records what it means"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("extends: own.yaml", "extends: .*own.yaml extends .*own.yaml, which never ends"),
        ("extends: other.yaml", "own.yaml extends .*other.yaml extends .*own.yaml, which never ends"),
        ("extends: nowhere.yaml", "own.yaml: extends: no file and no recipe 'nowhere.yaml'; there are: .*shapes"),
        ("extends: [a]", "own.yaml: extends: .'a'. is neither a recipe nor a file"),
        ("extends: .", "own.yaml: extends: cannot read .*a folder"),
        ("extends: ''", "own.yaml: extends: '' is no path"),
    ],
)
def test_what_cannot_be_extended_is_refused(text, told, tmp_path):
    recipe(tmp_path, "extends: own.yaml", "other.yaml")
    with pytest.raises(ConfigError, match=told):
        load_config(recipe(tmp_path, text, "own.yaml"))


@pytest.mark.parametrize("name", ["a" * 300, "a" * 300 + ".yaml", "a/" * 3000, "", "a\0b", "$NOT_SET.yaml"])
def test_a_recipe_that_no_file_can_be(name):
    with pytest.raises(ConfigError, match="^recipe: "):
        load_config(name)


def test_an_empty_section_can_be_filled(tmp_path):
    saved = recipe(tmp_path, load_config("shapes").yaml())
    assert "lora: null" in (tmp_path / "recipe.yaml").read_text()
    assert load_config(saved, ["model.lora.rank=4"]).model.lora.rank == 4
