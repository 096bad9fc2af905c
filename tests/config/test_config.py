"""Every mistake in a recipe is one clear line that names the field and what is allowed."""

import pytest
import yaml

from egrpo_fast.config import Config, ConfigError, load_config, loading
from egrpo_fast.config.loading import RENAMED
from egrpo_fast.config.recipe_files import recipe_names


@pytest.mark.parametrize("recipe", recipe_names())
def test_recipes_load_and_survive_a_round_trip(recipe, tmp_path):
    config = load_config(recipe)
    (tmp_path / "again.yaml").write_text(config.yaml())
    assert load_config(str(tmp_path / "again.yaml")) == config


def test_overrides_are_typed_yaml():
    config = load_config("shapes", ["schedule.active_steps=[0, 3]", "rollout.group_size=[4, 6]", "optimizer.lr=3e-5"])
    assert config.schedule.active_steps == [0, 3] and config.rollout.group_size == [4, 6]
    assert config.optimizer.lr == 3e-5 and config.per_active_step(config.tail.stride) == [1, 1]


BAD = {
    "rewards=[{name: shapes_soft, weight: 1e7}]": "rewards.0.weight: 1e7|rewards.0.weight: 10000000",
    'rewards=[{name: "a\\x07b"}]': "rewards.0.name: .*a name of printable characters",
    "schedul.eta=1": "schedul: unknown key; did you mean schedule.eta?",
    "schedule.etta=1": "schedule.etta: unknown key; did you mean schedule.eta?",
    "schedule.eta=0": "schedule.eta: 0: .*greater than 0",
    "tail.weights=int8": "tail.weights: is called tail.quantization now",
    "checkpoint={keep: 3}": "checkpoint.keep: is called checkpoint.save_total_limit now",
    "schedule.num-steps=8": "schedule.num-steps: unknown key; did you mean schedule.num_steps?",
    "schedule.eta=1e300": "schedule: shift 3 and eta 1e.300 leave no usable time grid",
    "schedule.shift=1e-300": "schedule: shift 1e-300",
    "schedule.shift=1e30": "schedule: shift 1e.30",
    "schedule.merge_lengths=10": "schedule.merge_lengths: 10 passes the end from the last active step; at most 9",
    "deepspeed.overrides.bf16=3": "deepspeed.overrides: bf16 follow from this configuration",
    "schedule.eta=.nan": "schedule.eta: nan: .*finite",
    "schedule.entropy_threshold=-0.1": "schedule.entropy_threshold: -0.1: .*greater than or equal to 0",
    "schedule.active_steps=[0, 16]": "schedule.active_steps: 16 is past the end; allowed: 0 to 15",
    "schedule.active_steps=[3, 3]": "schedule.active_steps: .*increasing",
    "schedule.active_steps=[]": "schedule.active_steps: .*at least 1",
    "schedule.merge_lengths=0": "schedule.merge_lengths: 0: .*greater than or equal to 1",
    "schedule.merge_lengths=[1, 2]": "schedule.merge_lengths: 2 numbers, one per grid step needed .16.",
    f"schedule.merge_lengths={[1] * 15 + [2]}": "schedule.merge_lengths: step 15 merged over 2 passes the end",
    "rollout.group_size=1": "rollout.group_size: 1: .*greater than or equal to 2",
    "rollout.group_size=[4, 4]": "rollout.group_size: 2 numbers, one per active step needed .8.",
    "tail.stride=0": "tail.stride: 0: .*greater than or equal to 1",
    "rollout.backend=cuda": "rollout.backend: 'cuda': .*'auto', 'reference', 'triton' or 'extension'",
    "model.height=tall": "model.height: 'tall': .*valid integer",
    "model.dtype=float8": "model.dtype: 'float8': .*'float32' or 'bfloat16'",
    "rewards=[]": "rewards: .*at least 1",
    "rewards=[{name: clip, weight: 0}]": "rewards: at least one needs a weight other than 0",
    "rewards=[{name: clip}, {name: clip}]": "rewards: .*names one twice",
    "seed=-1": "seed: -1: .*greater than or equal to 0",
    "iterations=0": "iterations: 0: .*greater than or equal to 1",
    "optimizer.lr=0": "optimizer.lr: 0: .*greater than 0",
    "deepspeed.zero_stage=4": "deepspeed.zero_stage: 4: .*1, 2 or 3",
    "schedule=3": "schedule: 3: ",
    "schedule.eta.x=3": "schedule.eta",
    "no equals sign": "override: 'no equals sign' is not key.path=value",
    "optimizer.lr=yes": "optimizer.lr: 'yes': .*valid number",
    "optimizer.lr=true": "optimizer.lr: True: .*valid number",
    "optimizer.lr='1e-4'": "optimizer.lr: '1e-4': .*valid number",
    "iterations=true": "iterations: True: .*valid integer",
    "iterations=010": "iterations: '010': .*valid integer",
    "iterations=1:30": "iterations: '1:30': .*valid integer",
    "iterations=1_000": "iterations: '1_000': .*valid integer",
    "iterations=3.0": "iterations: 3.0: .*valid integer",
    "iterations=2147483648": "iterations: 2147483648: .*less than 2147483648",
    "resume=yes": "resume: 'yes': .*valid boolean",
    "resume=1": "resume: 1: .*valid boolean",
    "deepspeed.zero_stage=true": "deepspeed.zero_stage: True: 1, 2 or 3 is needed",
    "deepspeed.zero_stage=1.0": "deepspeed.zero_stage: 1.0: 1, 2 or 3 is needed",
    "model.path=123": "model.path: 123 is read as a number .*quote it or write ./123$",
    "output_dir=20261126": "output_dir: 20261126 is read as a number .*quote it or write ./20261126$",
    "output_dir=1.5": "output_dir: 1.5 is read as a number .*quote it",
    "output_dir=true": "output_dir: True is read as .* truth value.*quote it",
    "output_dir=": "output_dir: None is no path$",
    "output_dir=[a]": r"output_dir: \['a'\] is no path$",
    "tail.path=123": "tail.path: 123 is read as a number .*quote it or write ./123$",
    "output_dir=runs/a$1": r"output_dir: the variable \$1 is not set; a dollar sign in a name is written \$\$$",
    "guards.stop_seconds=1e300": "guards.stop_seconds: 1e.300: .*less than or equal to 100000000",
    "guards.stall_seconds=1e18": "guards.stall_seconds: 1e.18: .*less than or equal to 100000000",
    "deepspeed.init_timeout=1000000000": "deepspeed.init_timeout: 1000000000: .*less than or equal to 100000000",
    f"seed=0x{'f' * 5000}": "seed: not YAML: a number of 5002 digits",
    f"seed={'9' * 5000}": "seed: not YAML: a number of 5000 digits",
    f"seed={'[' * 3000}": "seed: nested too deeply",
    f"seed={'[' * 100}{']' * 100}": "seed: nested too deeply",
    "seed=!!int x": "seed: not YAML",
    "seed=!!bool x": "seed: not YAML",
    "seed=!!timestamp x": "seed: not YAML",
    "seed={a: 1, a: 2}": "seed: not YAML: a is given twice",
    "seed={[1]: 2}": "seed: not YAML: unhashable",
    ".foo=1": "override: '.foo' is no setting's name",
    "schedule..eta=1": "override: 'schedule..eta' is no setting's name",
    '"a\nb"=1': r"'\"a\\nb\"': unknown key",
    "output_dir=''": "output_dir: '' is no path",
    '"output_dir"="a\\0b"': '"output_dir": unknown key',
    'output_dir="a\\0b"': r"output_dir: 'a\\x00b' is no path",
    "output_dir=$NOT_SET/run": r"output_dir: the variable \$NOT_SET is not set",
    "output_dir=${NOT_SET}/run": r"output_dir: the variable \$\{NOT_SET\} is not set",
    "output_dir=~nobody_at_all/run": "output_dir: '~nobody_at_all/run': there is no such user",
    f"model.path={'a' * 256}": "model.path: the path, or a name in it, is longer than any file's",
    f"prompts.train={'a/' * 2100}": "prompts.train: the path, or a name in it, is longer than any file's",
    "lora.rank=4": "lora: unknown key; did you mean model.lora.rank\\?$",
    "lora={rank: 4}": "lora: unknown key; did you mean model.lora.rank\\?$",
    "rank=4": "rank: unknown key; did you mean model.lora.rank\\?$",
    "lr=1": "lr: unknown key; did you mean optimizer.lr\\?$",
    "optimizer.iterations=3": "optimizer.iterations: unknown key; did you mean iterations\\?$",
    "num_steps=3": "num_steps: unknown key; did you mean schedule.num_steps\\?$",
    "lorra.rnk=3": "lorra: unknown key; did you mean model.lora.rank\\?$",
    "xyzzy=1": "xyzzy: unknown key$",
    "method={name: branch_grpo, splits: [0, 1, 2, 3, 4, 5], branching: 65536}": "method.max_rows: a tree of",
    "seed=[": "seed: not YAML: .*line 1, column 2",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_values_are_refused_by_name(override):
    with pytest.raises(ConfigError, match=BAD[override]) as told:
        load_config("shapes", [override])
    assert len(str(told.value).splitlines()) == 1 and len(str(told.value)) < 500


QUANTIZED = ["model.quantization=nf4", "model.lora={}", "deepspeed.zero_stage=2"]
BESIDE_QUANTIZED = {
    "model.lora=null": "model.quantization: nf4 is for the weights under adapters; without model.lora all are trained",
    "deepspeed.zero_stage=3": "deepspeed.zero_stage: 3 shards weights; with model.quantization nf4 .*use 1 or 2",
    "deepspeed.offload_param=cpu": "deepspeed.offload_param: only ZeRO-3 shards weights, zero_stage is 2",
    "deepspeed.offload_optimizer=nvme": "deepspeed.nvme_path: |deepspeed.offload_optimizer: nvme needs zero_stage 3",
    "rollout.compile=true": "rollout.compile: has not been tried with model.quantization nf4",
    "tail.quantization=int8": "tail.quantization: its model takes the policy's weights .*give tail.path, or leave",
    "tail.lora=folder": "tail.lora: its model takes the policy's weights",
    "tail.cache=taylor_seer": "tail.cache: its model takes the policy's weights",
    "model.quantization=int4": "model.quantization: 'int4': .*'none', 'int8', 'nf4' or 'float8'",
}


@pytest.mark.parametrize("override", BESIDE_QUANTIZED)
def test_what_does_not_go_with_quantized_weights_is_refused_by_name(override):
    load_config("shapes", QUANTIZED)
    with pytest.raises(ConfigError, match=f"^{BESIDE_QUANTIZED[override]}") as told:
        load_config("shapes", [*QUANTIZED, override])
    assert len(str(told.value).splitlines()) == 1


@pytest.mark.parametrize("kind", ["int8", "nf4", "float8"])
def test_what_goes_with_quantized_weights_is_taken(kind):
    others = ["deepspeed.zero_stage=1", "deepspeed.offload_optimizer=cpu", "optimizer.ema_decay=0.9",
              "tail={path: folder, quantization: int8, stride: 2}", "model.lora={path: folder}"]  # fmt: skip
    assert load_config("shapes", [*QUANTIZED, f"model.quantization={kind}", *others]).model.quantization == kind


def test_every_mistake_is_told_at_once():
    with pytest.raises(ConfigError) as told:
        load_config("shapes", ["seed=-1", "iterations=0", "schedule.eta=0"])
    assert len(str(told.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("content", "told"),
    [("a: [", "recipe: .*: not YAML: "), ("- 1\n", "must hold a mapping"), ("{}", "output_dir: missing")],
)
def test_bad_recipe_files(content, told, tmp_path):
    (tmp_path / "recipe.yaml").write_text(content)
    with pytest.raises(ConfigError, match=told):
        load_config(str(tmp_path / "recipe.yaml"))


def test_a_recipe_that_is_not_text(tmp_path):
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="recipe: cannot read"):
        load_config(str(tmp_path / "recipe.yaml"))


def test_a_recipe_that_never_ends_or_is_too_large_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="recipe: cannot read /dev/zero: it is a device"):
        load_config("/dev/zero")
    (tmp_path / "r.yaml").write_bytes(b"#" * 2**21)
    with pytest.raises(ConfigError, match="r.yaml: it is larger than 1,048,576 bytes"):
        load_config(str(tmp_path / "r.yaml"))


def test_an_unknown_recipe_lists_the_known():
    with pytest.raises(ConfigError, match="no recipe 'flux'; there are: .*shapes"):
        load_config("flux")


def test_the_recipe_file_is_plain_yaml():
    assert yaml.safe_load(load_config("shapes").yaml())["schedule"]["entropy_threshold"] == 2.2


def test_paths_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "/data")
    (tmp_path / "recipe.yaml").write_text("extends: shapes\noutput_dir: ~/run\n")
    paths = {
        "model.path": "~/flux", "prompts.train": "$HOME/a.txt", "prompts.held_out": "${DATA}/b.txt",
        "prompts.embeddings": "~/e", "tail.path": "~/t", "tail.lora": "~/l", "tail.decoder": "$DATA/d",
        "deepspeed.nvme_path": "~/n", "model.lora.path": "~/lora",
    }  # fmt: skip
    config = load_config("~/recipe.yaml", [f"{name}={path}" for name, path in paths.items()])
    assert config.output_dir == tmp_path / "run"
    for name, path in paths.items():
        found = config
        for part in name.split("."):
            found = getattr(found, part)
        assert found == path.replace("${DATA}", "/data").replace("$DATA", "/data").replace("$HOME", "~").replace(
            "~", str(tmp_path)
        )
    assert load_config("shapes", ["model.path=org/name"]).model.path == "org/name"


def test_a_dollar_sign_in_a_path_is_written_twice_and_recorded_so(tmp_path):
    run = tmp_path / "a$1"
    run.mkdir()
    config = load_config("shapes", [f"output_dir={tmp_path}/a$$1", "model.path=$${HOME}", "tail.lora=b$$$$c"])
    assert (config.output_dir, config.model.path, config.tail.lora) == (run, "${HOME}", "b$$c")
    (run / "config.yaml").write_text(config.yaml())
    assert load_config(str(run / "config.yaml")) == config
    assert load_config("shapes", ["output_dir='2026'"]).output_dir.name == "2026"


def test_a_run_of_an_earlier_version_is_read_under_todays_names(tmp_path):
    config = load_config("shapes", ["tail.stride=2"])
    tree = config.model_dump(mode="json", exclude={"model": {"guidance"}})
    for old, new in RENAMED.items():
        section, _, name = old.partition(".")
        if (new := new.partition(".")[2]) in tree.get(section, {}):
            tree[section][name] = tree[section].pop(new)
    tree["model"]["guidance"] = tree["model"].pop("guidance_scale")
    tree["tail"]["weights"] = "exact"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**tree, "schedule": config.used()["schedule"]}))
    with pytest.raises(ConfigError, match=r"tail.weights: is called tail.quantization now"):
        load_config(str(tmp_path / "config.yaml"))
    (tmp_path / "run.json").write_text("{}")
    assert load_config(str(tmp_path / "config.yaml")) == config


def test_renamed_settings_are_settings_and_their_old_names_are_none():
    known = set(loading._field_names(Config))
    assert set(RENAMED.values()) <= known and not known & RENAMED.keys()
