"""`egrpo evaluate`: the same prompts from the same noise through several models, judged by the same rewards.

First every model draws its images, 8-bit PNG files; then every reward judges the files. So no reward shares the
device with a model, anyone can check a score from its file, and an interrupted evaluation continues where it stopped.
In the folder of an evaluation:

    settings.json                      what must not change between its parts
    models/MODEL/model.json            where the model came from, and fingerprints of its parts
    models/MODEL/images/00012.png    of prompt 12, counted from 0
    models/MODEL/scores/REWARD.jsonl   {"prompt": 12, "score": 0.31} a line, whole lines only
    scores.parquet, table.md, page.html
"""

import gc
import hashlib
import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow
import pyarrow.parquet
import scipy.stats
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from egrpo_fast import noise, ops
from egrpo_fast.commands.page import Shown, Table, write_page
from egrpo_fast.config import CONFIG_FILE, ModelConfig, RewardConfig, load_config
from egrpo_fast.config.recipe_files import read_yaml
from egrpo_fast.files import expanded, fingerprint, is_hub_id, read_json, read_text, write_whole
from egrpo_fast.models.fingerprint import TRAINED, base_of, check_base, differing, identity
from egrpo_fast.models.folder import INDEX as WHOLE
from egrpo_fast.models.folder import configs_of, family_of, resolve
from egrpo_fast.models.lora import FILE as ADAPTERS
from egrpo_fast.plan import ode_plan
from egrpo_fast.policy import Policy
from egrpo_fast.rewards import Reward, check_reward, make_reward, require_trust, score, try_reward
from egrpo_fast.rollout import NoiseKey, Wavefront
from egrpo_fast.runs.inputs import SOURCE, of_rewards
from egrpo_fast.runs.plots import png
from egrpo_fast.schedule import make_schedule
from egrpo_fast.shapes import EMBEDDED, PIPELINE, pipeline_path

PAPER_REWARDS = (
    RewardConfig(name="hps"),
    RewardConfig(name="clip", options={"model": "ViT-H-14", "pretrained": "laion2b_s32b_b79k"}),
    RewardConfig(name="pick_score", options={"scaled": False}),
    RewardConfig(name="image_reward"),
)
"""The four that the paper reports, with the options that give its table's scales: our reading of it."""
RESAMPLES = 10_000


@dataclass(frozen=True)
class Settings:
    """How images are made, the same for every model. prompts: all of them, in the order that numbers their noise."""

    prompts: tuple[str, ...]
    height: int = 1024
    width: int = 1024
    num_inference_steps: int = 50
    guidance_scale: float = 3.5
    shift: float | Literal["auto"] = 3.0
    max_sequence_length: int = 512
    dtype: str = "bfloat16"
    seed: int = 0

    def recorded(self) -> dict[str, Any]:
        spelled = json.dumps(self.prompts).encode()
        return {**asdict(self), "prompts": f"{len(self.prompts)}, SHA-256 {hashlib.sha256(spelled).hexdigest()}"}

    def __str__(self) -> str:
        return (
            f"{len(self.prompts)} prompts, {self.width}x{self.height} pixels, {self.num_inference_steps} ODE steps, "
            f"shift {self.shift}, guidance {self.guidance_scale:g}, {self.dtype}, seed {self.seed}"
        )


@dataclass(frozen=True)
class Model:
    """A diffusers folder or hub id. run: the folder of the run that made it, or None. rewards: that run's, or None.

    lora: the folder of adapters that are added to its weights, or None.
    """

    label: str
    path: str
    rewards: tuple[RewardConfig, ...] | None = None
    run: Path | None = None
    lora: str | None = None

    @property
    def is_shapes(self) -> bool:
        """Whether this is the embedded architecture, trained or not."""
        ours, theirs = (Path(path) / "transformer" / "config.json" for path in (PIPELINE, self.path))
        if not theirs.is_file():
            return False
        try:
            kept = [{k: v for k, v in read_json(p).items() if k[0] != "_"} for p in (ours, theirs)]
        except (OSError, ValueError, AttributeError):
            return False  # loading it will tell
        return kept[0] == kept[1]

    @cached_property
    def identity(self) -> dict[str, str]:
        """Fingerprints of its parts; a hub id is downloaded for them. ValueError where it cannot be read."""
        found = identity(resolve(self.path))
        if self.lora is not None:
            found[TRAINED] = fingerprint([found[TRAINED].encode(), (Path(self.lora) / ADAPTERS).read_bytes()])
        return found

    def open(self, settings: Settings, batch: int) -> Policy:
        """What draws its images, not loaded yet. ValueError: it is no pipeline, or not the base of its adapters."""
        base = resolve(self.path)
        if self.lora is not None and self.run is not None:
            check_base(self.run, base)
        names = ("height", "width", "guidance_scale", "max_sequence_length", "dtype")
        given = {name: getattr(settings, name) for name in names}
        model = ModelConfig.model_validate({"path": self.path, "decode_batch_size": batch, **given})
        return Policy(model, base, fuse=self.lora)


def find_model(given: str) -> Model:
    """`[LABEL=]` and a run's folder (its `pipeline/` is meant), a diffusers folder, a hub id, or `shapes`.

    Of a LoRA run: the base that its `config.yaml` names, with the adapters in `pipeline/`.
    """
    label, equals, path = given.partition("=")
    if not equals or Path(given).exists():
        label, path = "", given
    if path == EMBEDDED:
        return Model(label or EMBEDDED, str(PIPELINE), tuple(load_config("shapes").rewards))
    folder, rewards, run, lora = Path(path), None, None, None
    if (folder / CONFIG_FILE).is_file() and not (folder / WHOLE).is_file():
        folder = folder / "pipeline"
        if not (folder / WHOLE).is_file() and not (folder / ADAPTERS).is_file():
            raise ValueError(f"models: the run in {path} has no pipeline/ yet; it is written when the run ends")
    if folder.is_dir():
        path = str(folder.resolve())
        named = folder.resolve().parent if folder.resolve().name == "pipeline" else folder.resolve()
        label = label or named.name
        alone = (folder / ADAPTERS).is_file() and not (folder / WHOLE).is_file()
        if (config := named / CONFIG_FILE).is_file():
            try:
                settings = read_yaml(read_text(config), str(config))
                rewards = tuple(RewardConfig.model_validate(some) for some in settings["rewards"])
                run = named
                if alone:
                    lora, path = path, pipeline_path(expanded(settings["model"]["path"]))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ValueError(f"models: {config} cannot be read: {' '.join(str(error).split())}") from None
        elif alone:
            how = "name the run's folder, or write the whole pipeline: egrpo export RUN OUT --fuse"
            raise ValueError(f"models: {path} holds adapters without their base; {how}")
    label = label or Path(path).name
    if not label or label != Path(label).name or label.startswith(".") or not label.isprintable():
        raise ValueError(f"models: {label!r} is no name for a folder; give LABEL=PATH")
    return Model(label, path, rewards, run, lora)


def find_models(given: Sequence[str]) -> list[Model]:
    """Models with different labels, all of one kind. ValueError otherwise, before any weight is read."""
    models = [find_model(name) for name in given]
    labels = [model.label for model in models]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise ValueError(f"models: two are called {twice[0]}; give LABEL=PATH")
    if len({model.is_shapes for model in models}) > 1:
        raise ValueError("models: some are of the Shapes world and some are not; nothing to compare")
    return models


def comparability_warnings(models: Sequence[Model]) -> Iterator[str]:
    """What makes a comparison one of something else than training: runs that did not begin with the first model."""
    base = models[0]
    for model in models:
        began = base_of(model.run) if model.run else {}
        kept = {part: was for part, was in began.items() if part != TRAINED}
        if parts := differing(kept, model.identity):
            yield f"{model.label}: another {parts} than it was trained with; export it again"
        elif model.run and not base.run and (parts := differing(began, base.identity)):
            yield f"{model.label}: began with another {parts} than {base.label}'s; its gain is not training's alone"


def default_settings(model: Model) -> dict[str, Any]:
    """What is not asked for: this project's protocol, or the embedded recipe's for a model of the Shapes world.

    Guidance and shift are the model family's. The size that a run trained at is not looked at: numbers of one protocol
    can be compared. ValueError: the model's configs cannot be read.
    """
    if not model.is_shapes:
        folder = configs_of(model.path)
        family = family_of(folder)
        guidance = family.guidance(folder, ModelConfig(path="."))
        return {"guidance_scale": guidance.scale, "shift": family.evaluation_shift}
    recipe = load_config("shapes")
    names = ("height", "width", "guidance_scale", "max_sequence_length", "dtype")
    return {name: getattr(recipe.model, name) for name in names} | {
        "num_inference_steps": recipe.evaluation.num_inference_steps, "shift": recipe.schedule.shift
    }  # fmt: skip


def default_rewards(models: Sequence[Model], trust_run: bool = False) -> list[RewardConfig]:
    """The first run's own rewards, and but for Shapes the paper's four columns with that run's options.

    ValueError where that run's file names rewards that need the user's trust (`require_trust`), and trust_run is not
    set.
    """
    first = next((model for model in models if model.rewards), None)
    ran = first.rewards or () if first else ()
    if first and first.run and not trust_run:
        require_trust((reward.name for reward in ran), first.run / CONFIG_FILE)
    if models[0].is_shapes:
        return list(ran) or list(load_config("shapes").rewards)
    names = {reward.name for reward in ran}
    return [*ran, *(reward for reward in PAPER_REWARDS if reward.name not in names)]


class Folder:
    """Where an evaluation is kept. ValueError where it holds another one: named are the settings that differ."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(
        self, name: str, values: Mapping[str, Any], anew: bool = False, notes: Mapping[str, Any] | None = None,
        way_out: str = "choose another --out",
    ) -> dict[str, Any]:  # fmt: skip
        """Write `values`, or compare them with what is there, which is returned.

        anew: keys may be added. notes: written, not compared. ValueError names what differs, and the way out.
        """
        file = self.path / name
        now = json.loads(json.dumps(values))
        before = {}
        if file.exists():
            try:
                before = dict(read_json(file))
            except (OSError, ValueError, TypeError):
                raise ValueError(f"out: {file} is damaged; choose another folder") from None
            for key in before.keys() | now.keys() if not anew else before.keys() & now.keys():
                if before.get(key) != now.get(key):
                    raise ValueError(f"{key}: {now.get(key)} differs from {before.get(key)} in {file}; {way_out}")
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**before, **now, **(notes or {})}, indent=2) + "\n"
        if not file.exists() or file.read_text() != text:
            write_whole(file, text, alone=False)  # parts of one evaluation may begin together
        return before

    def keep_reward(self, name: str, reward: Reward) -> None:
        """ValueError: the reward has other weights than those of its scores here. Changed source code is named."""
        found, file = of_rewards({name: reward}), self._scores_name(name)
        scored = any(path.name == file for path in self.path.glob("models/*/scores/*"))
        weights = {key: value for key, value in found.items() if scored and not key.startswith(SOURCE)}
        which = self.path / "models" / "*" / "scores" / file
        way_out = f"choose another --out, or delete {which} to score the same images again"
        before = self.keep("reward_fingerprints.json", weights, anew=True, notes=found, way_out=way_out)
        for key in found:
            if scored and before.get(key, found[key]) != found[key]:
                message = f"the {key} has changed since scores in {self.path} were made; they are kept"
                warnings.warn(f"{message}. To score the same images again, delete {which}", stacklevel=3)

    def open(self, settings: Settings, models: Sequence[Model], rewards: Sequence[RewardConfig]) -> None:
        # Another part of the same evaluation may be writing its settings at this moment.
        strange = self.path.is_dir() and any(not file.name.startswith(".settings.json") for file in self.path.iterdir())
        if strange and not (self.path / "settings.json").exists():
            raise ValueError(f"out: {self.path} is not empty and holds no evaluation")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"out: {self.path}: {error.strerror}") from None
        self.keep("settings.json", settings.recorded())
        self.keep("rewards.json", {reward.name: reward.options for reward in rewards}, anew=True)
        for model in models:
            places = {"path": model.path} | ({"lora": model.lora} if model.lora else {})
            self.keep(f"models/{model.label}/model.json", model.identity, anew=True, notes=places)

    def image(self, model: Model, prompt: int) -> Path:
        return self.path / "models" / model.label / "images" / f"{prompt:05d}.png"

    def scores_file(self, model: Model, reward: str) -> Path:
        return self.path / "models" / model.label / "scores" / self._scores_name(reward)

    @staticmethod
    def _scores_name(reward: str) -> str:
        return f"{reward.replace('/', '~')}.jsonl"

    def scores(self, model: Model, reward: str) -> dict[int, float]:
        """Scores so far by prompt. A last line that an interruption cut off is dropped from the file, too."""
        file = self.scores_file(model, reward)
        if not file.exists():
            return {}
        text = file.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            write_whole(file, whole)
        try:
            return {line["prompt"]: line["score"] for line in map(json.loads, whole.splitlines())}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"out: {file} is damaged; remove it to score again") from None

    def add_scores(self, model: Model, reward: str, scores: Mapping[int, float]) -> None:
        file = self.scores_file(model, reward)
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as out:
            out.write("".join(json.dumps({"prompt": n, "score": value}) + "\n" for n, value in scores.items()))


def _batches(items: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _progress(what: str, total: int, todo: int) -> "tqdm[Any]":
    return tqdm(total=total, initial=total - todo, desc=what, unit=" images", disable=not todo, dynamic_ncols=True)


def _opened(models: Sequence[Model], settings: Settings, batch: int) -> dict[str, Policy]:
    """By label. ValueError names the model that cannot be used."""
    found = {}
    for model in models:
        try:
            found[model.label] = model.open(settings, batch)
        except ValueError as error:
            raise ValueError(f"{model.label}: {error}") from None
    return found


def draw(
    folder: Folder,
    model: Model,
    policy: Policy,
    settings: Settings,
    batch: int,
    device: torch.device,
    places: Sequence[int] | None = None,
) -> None:
    """Images of those prompts (`places`; None: all) that have none yet, each from its own noise, whatever the batch.

    policy: the model's, not loaded yet.
    x_1 of prompt n is the stream (iteration 0, prompt n, EVALUATION, 0) of the seed: the trainer's held-out images of
    the same file, seed and settings start from it as well.
    """
    places = range(len(settings.prompts)) if places is None else places
    todo = [place for place in places if not folder.image(model, place).exists()]
    if not todo:
        return
    policy.load(device, tell=False)
    steps = settings.num_inference_steps
    plan = ode_plan(make_schedule(steps, policy.times(steps, settings.shift)))
    wavefronts: dict[int, Wavefront] = {}
    with _progress(f"{model.label}: drawing", len(places), len(todo)) as bar:
        for chunk in _batches(todo, batch):
            if len(chunk) not in wavefronts:  # the last batch may be smaller
                wavefronts[len(chunk)] = Wavefront(
                    plan, len(chunk), policy.latent_shape, ops.choose("auto", device), device,
                    model_dtype=policy.dtype,
                )  # fmt: skip
            velocity = policy.velocity(policy.encode([settings.prompts[place] for place in chunk]))
            key = NoiseKey(settings.seed, 0, torch.tensor(chunk, device=device))
            rollout = wavefronts[len(chunk)].run(velocity, key, noise.EVALUATION)
            images = policy.decode(rollout.final_latents[:, 0])
            for place, image in zip(chunk, images):
                if not torch.isfinite(image).all():
                    raise ValueError(f"models: {model.label} drew an image that is not finite for prompt {place}")
                folder.image(model, place).parent.mkdir(parents=True, exist_ok=True)
                write_whole(folder.image(model, place), png(image))
            bar.update(len(chunk))


def _read_images(paths: Sequence[Path], height: int, width: int) -> Tensor:
    """[B, 3, H, W], float32 in [0, 1]."""
    images = []
    for path in paths:
        try:
            pixels = np.asarray(Image.open(path).convert("RGB"))
        except OSError as error:
            raise ValueError(f"out: {path} is damaged ({error}); remove it to draw it again") from None
        if pixels.shape != (height, width, 3):
            raise ValueError(f"out: {path} is not of {width}x{height} pixels; remove it to draw it again")
        images.append(torch.from_numpy(pixels.copy()))
    return torch.stack(images).permute(0, 3, 1, 2).float() / 255


def judge(
    folder: Folder,
    models: Sequence[Model],
    settings: Settings,
    rewards: Sequence[RewardConfig],
    batch: int,
    device: torch.device,
) -> Tensor:
    """Score what has no score yet. Returns [models, rewards, prompts], float64. Rewards are loaded one at a time."""
    everything = range(len(settings.prompts))
    table = []
    for reward in rewards:
        rows, judge_of = [], None
        for model in models:
            scores = folder.scores(model, reward.name)
            todo = [place for place in everything if place not in scores]
            if todo and judge_of is None:
                judge_of = make_reward(reward.name, reward.options, device)
                folder.keep_reward(reward.name, judge_of)
            with _progress(f"{model.label}: {reward.name}", len(everything), len(todo)) as bar:
                for chunk in _batches(todo, batch):
                    files = [folder.image(model, place) for place in chunk]
                    images = _read_images(files, settings.height, settings.width).to(device)
                    assert judge_of is not None
                    values = score(reward.name, judge_of, images, [settings.prompts[place] for place in chunk])
                    fresh = dict(zip(chunk, values.tolist()))
                    folder.add_scores(model, reward.name, fresh)
                    scores |= fresh
                    bar.update(len(chunk))
            rows.append([scores[place] for place in everything])
        table.append(rows)
        del judge_of
        _free(device)
    return torch.tensor(table, dtype=torch.float64).transpose(0, 1)


def _free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def bootstrap(values: Tensor, level: float = 0.95, resamples: int = RESAMPLES) -> Tensor:
    """Percentile interval of the mean: resample the N prompts with replacement, all rows alike. [..., N] -> [..., 2].

    Always the same resamples, so that an interval is a function of its scores.
    """
    if values.shape[-1] == 1:  # nothing to resample
        return torch.cat((values, values), dim=-1)
    found = scipy.stats.bootstrap(
        (values.numpy(),), np.mean, axis=-1, confidence_level=level, n_resamples=resamples, method="percentile",
        batch=500, rng=0,
    )  # fmt: skip
    return torch.from_numpy(np.stack(found.confidence_interval, -1))


def wins(ours: Tensor, base: Tensor) -> Tensor:
    """Per prompt 1 where ours is better, 1/2 where equal, else 0; their mean is the paired win rate."""
    return (ours > base).to(torch.float64) + (ours == base).to(torch.float64) / 2


def tables(scores: Tensor, labels: Sequence[str], names: Sequence[str]) -> list[Table]:
    """scores [models, rewards, prompts]. Means; then every further model against the first, prompt by prompt."""

    def table(title: str, values: Tensor, labels: Sequence[str], style: str, scale: float = 1) -> Table:
        means, intervals = values.mean(-1) * scale, bootstrap(values) * scale
        cells = [
            [f"{mean:{style}} [{low:{style}}, {high:{style}}]" for mean, (low, high) in zip(row, ends)]
            for row, ends in zip(means.tolist(), intervals.tolist())
        ]
        return Table(title, ["model", *names], [[label, *row] for label, row in zip(labels, cells)])

    found = [table("Mean score [95% interval]", scores, labels, ".4f")]
    if len(labels) > 1:
        base, others = scores[:1], scores[1:]
        found += [
            table(f"Gain over {labels[0]}, paired [95% interval]", others - base, labels[1:], "+.4f"),
            table(f"Win rate against {labels[0]} in %, ties half [95% interval]", wins(others, base), labels[1:], ".1f",
                  100),
        ]  # fmt: skip
    return found


def report(
    folder: Folder,
    models: Sequence[Model],
    settings: Settings,
    names: Sequence[str],
    scores: Tensor,
    page_prompts: int,
    page_side: int = 512,
) -> str:
    """Write Parquet, Markdown and the page. Returns the Markdown."""
    labels, prompts = [model.label for model in models], settings.prompts
    columns: dict[str, Any] = {
        "model": [label for label in labels for _ in prompts],
        "prompt_number": list(range(len(prompts))) * len(models),
        "prompt": list(prompts) * len(models),
        "image": [
            str(folder.image(model, place).relative_to(folder.path))
            for model in models
            for place in range(len(prompts))
        ],
    }
    columns |= {name: scores[:, place].flatten().numpy() for place, name in enumerate(names)}
    rows = pyarrow.table(columns).replace_schema_metadata({"settings": json.dumps(settings.recorded())})
    pyarrow.parquet.write_table(rows, folder.path / "scores.parquet")

    found = tables(scores, labels, names)
    markdown = f"{settings}\n\n" + "\n\n".join(table.markdown() for table in found) + "\n"
    write_whole(folder.path / "table.md", markdown)

    def shown() -> Iterator[tuple[str, list[Shown]]]:
        for place, prompt in enumerate(prompts[:page_prompts]):
            yield (
                prompt,
                [
                    Shown(label, _thumbnail(folder.image(model, place), page_side), dict(zip(names, row)))
                    for label, model, row in zip(labels, models, scores[:, :, place].tolist())
                ],
            )

    message = f"{settings}. The first {min(page_prompts, len(prompts))} prompts of the file are shown, none left out."
    title = f"{', '.join(labels[1:])} against {labels[0]}" if len(labels) > 1 else labels[0]
    write_page(folder.path / "page.html", title, message, found, shown())
    return markdown


def _thumbnail(path: Path, side: int) -> bytes:
    """The image as PNG, its longer side at most `side` pixels."""
    image = Image.open(path)
    if max(image.size) <= side:
        return path.read_bytes()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def evaluate(
    models: Sequence[Model],
    settings: Settings,
    rewards: Sequence[RewardConfig],
    out: Path,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    part: tuple[int, int] | None = None,
    page_prompts: int = 64,
) -> str:
    """Draw, judge, report; returns the table. ValueError, before any weight is read, for what the user must mend.

    batch: images made or judged at a time; it changes no score beyond rounding. part: (i, n) draws every n-th prompt
    from i on, and no more, so that n processes share the work.
    """
    device = torch.device(device)
    batch = batch or (64 if models[0].is_shapes else 4)
    hub = [model for model in models if is_hub_id(model.path)]  # downloaded only once all else is known to be right
    policies = _opened([model for model in models if model not in hub], settings, batch)
    for reward in rewards:
        check_reward(reward.name, reward.options, settings.prompts, settings.height, settings.width)
    if len({reward.name for reward in rewards}) < len(rewards) or not rewards:
        raise ValueError("rewards: at least one, each once")
    policies |= _opened(hub, settings, batch)
    folder = Folder(out)
    folder.open(settings, models, rewards)
    for message in comparability_warnings(models):
        warnings.warn(message, stacklevel=2)
    everything = range(len(settings.prompts))
    if not part and not all(folder.image(model, place).exists() for model in models for place in everything):
        for reward in rewards:  # hours of drawing are not to end at a weight file that is not there, or at a KeyError
            made = make_reward(reward.name, reward.options, device)
            try_reward(reward.name, made, settings.prompts[0], settings.height, settings.width, device)
            folder.keep_reward(reward.name, made)
            del made
            _free(device)
    for model in models:
        first, stride = part or (0, 1)
        draw(folder, model, policies.pop(model.label), settings, batch, device, everything[first::stride])
        _free(device)
    if part:
        return f"part {part[0]} of {part[1]} is drawn; when all are, run without --part\n"
    scores = judge(folder, models, settings, rewards, batch, device)
    return report(folder, models, settings, [reward.name for reward in rewards], scores, page_prompts)
