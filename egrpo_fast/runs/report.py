"""What a run tells: metrics and alarms as it goes, images of the held-out prompts, and a summary. Rank 0 only."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safetensors.torch import load_file, save
from torch import Tensor

from egrpo_fast import __version__
from egrpo_fast.config import PIPELINE, Config
from egrpo_fast.files import write_whole
from egrpo_fast.folder_lock import Claim
from egrpo_fast.plan import Plan
from egrpo_fast.runs import plots
from egrpo_fast.runs.export import export
from egrpo_fast.runs.guards import History, Verdict
from egrpo_fast.runs.metrics import RunLog
from egrpo_fast.terminal import Attempts

BASE_IMAGES, SUMMARY, SAMPLES = "base_images.safetensors", "summary.json", "samples"


@dataclass(frozen=True)
class HeldOut:
    """A held-out evaluation, on every rank: mean of each reward, and on rank 0 the first images [N, 3, H, W]."""

    rewards: dict[str, float]
    images: Tensor | None


@dataclass(frozen=True)
class Sample:
    """A training image [3, H, W] of a prompt. place: `best` or `worst` by the mixed reward. rewards: trained ones."""

    prompt: str
    place: str
    rewards: dict[str, float]
    image: Tensor


class Report:
    """Of one run. iteration, evaluated: what the log's lines are kept up to (`RunLog`). held_out: its prompts.

    On other ranks than 0 (`speaks`) nothing is printed or written. Images and plots that cannot be drawn or written are
    reported once and end nothing; what is drawn is kept, and written with the next. claim: of the run's folder.
    """

    def __init__(
        self,
        config: Config,
        held_out: Sequence[str],
        iteration: int,
        evaluated: bool,
        speaks: bool = True,
        claim: Claim | None = None,
    ) -> None:
        self._config, self._prompts, self._folder, self._claim = config, held_out, config.output_dir, claim
        self._attempt, self._unwritten = Attempts(), dict[str, bytes]()
        self._log: RunLog | None = None
        if speaks:
            wandb_config = config.model_dump(mode="json") if config.wandb else None
            self._log = RunLog(self._folder, config.iterations, iteration, evaluated, wandb_config, claim)

    def begin(self, plan: Plan, iteration: int, where: str, backends: Mapping[str, str]) -> None:
        """What runs, on what, what an iteration costs, and where the run writes. backends: by op."""
        config, prompts = self._config, self._config.prompts.per_iteration
        first = f"goes on after {iteration} of" if iteration else "runs for"
        self.say(
            f"egrpo_fast {__version__}: {config.method.name} on {config.model.path} {first} {config.iterations} "
            f"iterations on {where}; kernels: {', '.join(sorted(set(backends.values())))}\n"
            f"per iteration: {prompts} prompt(s), {prompts * len(plan.image_rows)} images; "
            f"{prompts * plan.evaluations:,} model evaluations without gradient, {prompts * plan.trained_states} with\n"
            f"writes to {self._folder}"
        )

    def say(self, text: str) -> None:
        if self._log:
            self._log.say(text)

    def sync(self) -> None:
        """Every line so far survives a power cut."""
        if self._log:
            self._log.sync()

    def close(self) -> None:
        if self._log:
            self._log.close()

    def iteration(
        self, done: int, values: Mapping[str, float], notes: Mapping[str, Any], alarms: Sequence[str],
        samples: Sequence[Sample] = (),
    ) -> None:  # fmt: skip
        """One line of metrics, one step of the progress bar, the images of some samples."""
        if self._log is None:
            return
        shown = [self._show(done, place, sample) for place, sample in enumerate(samples)]
        said = {name: value for name, value in (("alarms", list(alarms)), ("samples", shown)) if value}
        self._log.write(done, values, {**notes, **said})
        self._write()
        trained = next(reward.name for reward in self._config.rewards if reward.weight)
        beside = {"images/s": values["speed/images_per_second"]} if "speed/images_per_second" in values else {}
        self._log.advance(**{trained: values[f"reward/{trained}"]}, **beside)
        for alarm in alarms:
            self.say(f"WARNING: iteration {done}: {alarm}")

    def _show(self, done: int, place: int, sample: Sample) -> dict[str, Any]:
        """Its image as a file and in TensorBoard and W&B; what `metrics.jsonl` says of it."""
        name = f"{SAMPLES}/iteration-{done:06d}-{place // 2}-{sample.place}.png"
        rewards = {reward: float(f"{value:.6g}") for reward, value in sample.rewards.items()}
        said = {"prompt": sample.prompt, "iteration": str(done), "model": self._config.model.path,
                "seed": str(self._config.seed), "rewards": json.dumps(rewards)}  # fmt: skip
        drawn = self._put(name, lambda: plots.png(sample.image, said))
        if self._log and drawn:
            self._log.picture(done, f"{sample.place}/{place // 2}", drawn, f"{sample.prompt} {json.dumps(rewards)}")
        return {"file": name, "prompt": sample.prompt, "place": sample.place, "rewards": rewards}

    def held_out(self, done: int, held_out: HeldOut, watched: Verdict | None, seconds: Mapping[str, float]) -> None:
        """An evaluation after `done` iterations: its line, its images, and what the watch makes of it."""
        if self._log is None:
            return
        assert held_out.images is not None
        values = {f"held_out/{name}": value for name, value in held_out.rewards.items()}
        if watched:
            values |= {"watch/best": watched.best, "watch/alarms": watched.alarms, "watch/stop": float(watched.stop)}
        self._log.write(done, values | dict(seconds))
        shown = "  ".join(f"{name} {value:.4f}" for name, value in held_out.rewards.items())
        self.say(f"held-out prompts after {done} iterations: {shown}")
        if (rule := self._config.evaluation.stop_when) and watched and watched.alarms:
            self.say(
                f"WARNING: {rule.reward} fell to {held_out.rewards[rule.reward]:.4f} from its best of "
                f"{watched.best:.4f} (iteration {watched.best_at}) while the trained rewards rose: alarm "
                f"{watched.alarms} of {rule.patience}{'; the run stops here' if watched.stop else ''}"
            )
        images, captions = held_out.images, self._prompts[: len(held_out.images)]
        if drawn := self._put(f"images/iteration-{done:06d}.png", lambda: plots.image_grid(images, captions)):
            self._log.picture(done, "held_out", drawn, "held-out prompts")
        if done == 0:
            self._put(BASE_IMAGES, lambda: save({"images": images.contiguous()}))

    def _put(self, name: str, make: Callable[[], bytes]) -> bytes | None:
        """A file of the run's folder. Returns what is in it; None: it could not be made."""
        made = None
        with self._attempt(name, "it is left out"):
            made = self._unwritten[name] = make()
        self._write()
        return made

    def _write(self) -> None:
        """The files that are not there yet."""
        for name, content in list(self._unwritten.items()):
            with self._attempt("images, plots and summary"):
                if self._claim:
                    self._claim.check()
                (self._folder / name).parent.mkdir(exist_ok=True)
                write_whole(self._folder / name, content)
                del self._unwritten[name]

    def finish(self, done: int, history: History, after: HeldOut, stopped: bool) -> None:
        """The run is over: curves, before and after, `summary.json`, the trained pipeline.

        history: every evaluation. What was drawn or logged before may be damaged: then an image is missing. OSError or
        ValueError, once all was tried: summary or pipeline cannot be written.
        """
        if self._log is None:
            return
        self._log.end_bar()
        images = after.images
        assert images is not None

        def before_after() -> bytes:
            before = load_file(self._folder / BASE_IMAGES)["images"]
            return plots.before_after(before, images, self._prompts[: len(before)])

        self._put("curve.png", lambda: plots.curves(RunLog.read(self._folder)))
        self._put("before_after.png", before_after)
        before = history[0][1]
        held_out = {name: {"before": before[name], "after": value} for name, value in after.rewards.items()}
        summary: dict[str, Any] = {"iterations": done, "held_out": held_out}
        if stopped and self._config.evaluation.stop_when:
            summary["stopped_by"] = self._config.evaluation.stop_when.reward
        self._put(SUMMARY, lambda: (json.dumps(summary, indent=2) + "\n").encode())
        export(self._folder, self._folder / PIPELINE, checkpoint=str(done), replace=True, verify=False)
        if SUMMARY in self._unwritten:
            write_whole(self._folder / SUMMARY, self._unwritten[SUMMARY])
        print(f"\n{'held-out reward':<18}{'before':>10}{'after':>10}")
        for name, value in held_out.items():
            print(f"{name:<18}{value['before']:>10.4f}{value['after']:>10.4f}")
        loader = "load_lora_weights" if self._config.model.lora else "DiffusionPipeline.from_pretrained"
        print(f"\n{self._folder}: curve.png, before_after.png, {PIPELINE}/ ({loader} loads it)")
