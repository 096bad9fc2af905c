"""`egrpo fidelity`: the same samples finished exactly and by many tails; suggests the cheapest that ranks them so."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from egrpo_fast import ops
from egrpo_fast.commands.page import Table
from egrpo_fast.config import CONFIG_FILE, Config, load_config, plan_of
from egrpo_fast.distributed.checkpoint import CheckpointReader, check_sound
from egrpo_fast.models.fingerprint import check_base
from egrpo_fast.models.folder import resolve, with_times
from egrpo_fast.models.tail import with_local_tail
from egrpo_fast.models.tail_check import Comparison, compare
from egrpo_fast.models.transformer import fill_whole
from egrpo_fast.objective import Objective
from egrpo_fast.plan import tail_grid
from egrpo_fast.policy import Policy
from egrpo_fast.prompts.files import read_split
from egrpo_fast.prompts.order import Prompt, PromptOrder
from egrpo_fast.rewards import check_reward, make_reward, require_trust, score, try_reward
from egrpo_fast.rollout import NoiseKey, Wavefront
from egrpo_fast.runs.export import open_checkpoint
from egrpo_fast.runs.metrics import Stopwatch
from egrpo_fast.shapes import pipeline_path

STRIDES, SOLVERS = (2, 3, 4, 5, 6), ("euler", "ab2", "dpm2m")
CACHED = "tail.cache=taylor_seer", "tail.cache=taylor_seer tail.stride=2 tail.solver=dpm2m"
"""What `egrpo fidelity` measures by default: every stride with every solver, and these caches."""
MARGINS, TRIES = 5, 8
"""Margins above the target that it composes strides for, and settings that it tries on further prompts."""


@dataclass(frozen=True)
class Measured:
    """A tail against the exact one. speedup: of rollouts alone; decoding, and a copy of the policy, come on top.

    evaluations: of its tails, as a share; what a cache leaves out of them is counted block by block and not in it.
    """

    settings: str
    comparison: Comparison
    evaluations: float
    speedup: float

    def row(self) -> list[str]:
        found = self.comparison
        return [
            self.settings,
            f"{found.correlation:.3f} ± {found.standard_error:.3f}",
            f"{100 * found.flips.mean():.1f}%",
            f"{found.bias:+.4f}",
            f"{100 * self.evaluations:.1f}%",
            f"{self.speedup:.2f}x",
        ]

    def recorded(self) -> dict[str, Any]:
        found = self.comparison
        return {
            "settings": self.settings,
            "correlation": found.correlation,
            "standard_error": found.standard_error,
            "correlation_by_step": found.correlations.nanmean(1).tolist(),
            "sign_flips": found.flips.mean().item(),
            "reward_bias": found.bias.item(),
            "tail_evaluations": self.evaluations,
            "rollout_speedup": self.speedup,
        }


@dataclass(frozen=True)
class _Sampled:
    """rewards [K, P, images]; seconds: of the rollouts alone; computed: share of the blocks that tails ask for."""

    rewards: Tensor
    seconds: float
    computed: float


class _Sampler:
    """The policy, ready to draw and score an iteration's samples with any tail."""

    def __init__(
        self, config: Config, policy: Policy, reader: CheckpointReader | None, prompt: str, device: torch.device
    ) -> None:
        """policy: not loaded yet. reader: of the checkpoint whose weights it is to have; None: its folder's own."""
        model, self._policy, self._device = config.model, policy, device
        self._trained = [reward for reward in config.rewards if reward.weight]
        self._judges = {reward.name: make_reward(reward.name, reward.options, device) for reward in self._trained}
        for name, judge in self._judges.items():  # a mistake in one is found before the model is loaded
            try_reward(name, judge, prompt, model.height, model.width, device)
        trained = set(reader.names()) if reader else set()

        def fill(transformer: nn.Module, weights: Callable[[str], Tensor]) -> None:
            def read(name: str) -> Tensor:
                return reader.tensor(name) if reader and name in trained else weights(name)

            fill_whole(transformer.requires_grad_(False).eval(), read, policy.dtype, device)

        policy.load(device, fill, tell=False)
        if policy.compiled:
            policy.compiled.load_state_dict(dict(policy.transformer.named_parameters()), assign=True)
        self._ops = ops.choose(config.rollout.backend, device)
        self.objective = Objective.of(config, self._ops)

    def __call__(self, config: Config, prompts: Sequence[Prompt], title: str) -> _Sampled:
        """Iteration 0's samples of the prompts."""
        plan = plan_of(config, 0)
        policy = self._policy
        wavefront = Wavefront(
            plan, 1, policy.latent_shape, self._ops, self._device, model_dtype=policy.dtype,
            micro_batch=config.rollout.most_rows,
        )  # fmt: skip
        policy.use_tail(with_local_tail(config).tail)
        policy.load_tail(self._device)
        watch, rewards = Stopwatch(self._device), []
        cache = policy.tail.cache if policy.tail else None

        def latents_of(prompt: Prompt, text: Any) -> Tensor:
            """[images, L, C]."""
            key = NoiseKey(config.seed, 0, torch.tensor([prompt.number], device=self._device))
            velocity, tail = policy.velocity(text, policy.compiled), policy.tail_velocity(text)
            return wavefront.run(velocity, key, tail=tail).final_latents[0]

        with policy.tail_follows(policy.transformer):
            if config.rollout.compile:  # that takes its time at the first calls
                latents_of(prompts[0], policy.encode([prompts[0].text]))
            for prompt in tqdm(prompts, desc=title, unit=" prompts", leave=False, dynamic_ncols=True):
                text = policy.encode([prompt.text])
                with watch.phase("rollout"):
                    latents = latents_of(prompt, text)
                rewards.append(self._score(latents, prompt.text, tiny=config.tail.decoder is not None))
        computed = cache.computed / cache.asked if cache else 1.0
        return _Sampled(torch.stack(rewards, dim=1), watch.read()["seconds/rollout"], computed)

    def _score(self, latents: Tensor, prompt: str, tiny: bool) -> Tensor:
        """[images, L, C] -> [K, images]."""
        scores = []
        for some in latents.split(self._policy.model.decode_batch_size):
            images = self._policy.decode(some, tiny)
            scores.append(
                torch.stack([score(name, judge, images, [prompt] * len(some)) for name, judge in self._judges.items()])
            )
        return torch.cat(scores, dim=1)


def cheapest_strides(
    costs: Sequence[Mapping[int, int]], correlations: Sequence[Mapping[int, float]], target: float
) -> tuple[int, ...] | None:
    """One stride per active step: fewest evaluations in all whose mean correlation reaches the target; None: none do.

    costs, correlations: of every step by stride; a step's tails do not touch the others', so they add up.
    """
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for cost, correlation in zip(costs, correlations, strict=True):
        longer: dict[int, tuple[float, tuple[int, ...]]] = {}
        for spent, (total, strides) in best.items():
            for stride, value in correlation.items():
                found = total + value, (*strides, stride)
                place = spent + cost[stride]
                longer[place] = max(longer.get(place, found), found)
        best = longer
    enough = [spent for spent, (total, _) in best.items() if total >= target * len(costs)]
    return best[min(enough)][1] if enough else None


class _Search:
    """Measures tails of one policy, and looks for the cheapest that reaches a target."""

    def __init__(
        self, recipe: str, overrides: Sequence[str], folder: Path, sampler: _Sampler, prompts: PromptOrder, count: int
    ) -> None:
        self._recipe, self._overrides, self._folder, self._sampler = recipe, overrides, folder, sampler
        self._prompts, self._count = prompts, count
        self._exact: dict[int, _Sampled] = {}

    def config(self, settings: str) -> Config:
        return with_times(load_config(self._recipe, [*self._overrides, *settings.split()]), self._folder)

    def measure(self, settings: str, part: int = 0) -> Measured:
        """The tail on the `part`-th lot of prompts."""
        config = self.config(settings)
        exact, prompts = config.with_tail(), self._prompts.iteration(part, self._count)
        if part not in self._exact:
            if not self._exact:
                self._sampler(exact, prompts[:1], "warming up")
            self._exact[part] = self._sampler(exact, prompts, "exact tail")
        expected, found = self._exact[part], self._sampler(config, prompts, settings)
        return Measured(
            settings,
            compare(plan_of(exact, 0), self._sampler.objective, expected.rewards, found.rewards),
            found.computed * self._cost(settings),
            expected.seconds / found.seconds,
        )

    def _by_step(self, solver: str, measured: Mapping[str, Measured], aim: float) -> str | None:
        """Strides of their own for the active steps, composed of those that were measured for all."""
        strides = [stride for stride in STRIDES if _grid(stride, solver) in measured]
        plan = plan_of(self.config(""), 0)
        starts = [(group.index + plan.schedule.merges[group.index], group.size) for group in plan.groups]
        end = plan.schedule.num_steps
        costs = [{n: size * (len(tail_grid(start, end, n)) - 1) for n in (1, *strides)} for start, size in starts]
        found = {n: measured[_grid(n, solver)].comparison.correlations.nanmean(1).tolist() for n in strides}
        correlations = [{1: 1.0} | {n: values[step] for n, values in found.items()} for step in range(len(starts))]
        known = [{n: value for n, value in step.items() if not math.isnan(value)} for step in correlations]
        chosen = cheapest_strides(costs, known, aim)
        if chosen is None or max(chosen) == 1:
            return None
        if len(set(chosen)) == 1:
            return _grid(chosen[0], solver)
        return f"tail.stride=[{','.join(map(str, chosen))}] tail.solver={solver}"

    def _cost(self, settings: str) -> float:
        """Share of the exact tails' evaluations that its plan has."""
        config = self.config(settings)
        return plan_of(config, 0).tail_evaluations / plan_of(config.with_tail(), 0).tail_evaluations

    def suggest(self, measured: Sequence[Measured], target: float) -> Measured | None:
        """The cheapest that reaches the target on prompts that it was not chosen by; None: none tried does.

        Cheap is few evaluations, and of equally many the faster one. Composed ones are chosen by the luck of their
        prompts, so those that aim higher are tried as well. Several may be tried on the further prompts, of which the
        first that passes is somewhat lucky there, too.
        """
        passing = (one for one in measured if one.comparison.correlation >= target)
        costs = {one.settings: (one.evaluations, -one.speedup) for one in passing}
        if self.config("").method.uses.issuperset(("tail.stride", "schedule.active_steps")):
            by_name = {one.settings: one for one in measured}
            aims = [target + (1.0 - target) * part / MARGINS for part in range(MARGINS)]
            composed = (self._by_step(solver, by_name, aim) for solver in SOLVERS for aim in aims)
            costs = {settings: (self._cost(settings), 0.0) for settings in composed if settings} | costs
        for settings in sorted(costs, key=lambda settings: (costs[settings], settings))[:TRIES]:
            result = self.measure(settings, part=1)
            if result.comparison.correlation >= target:
                return result
        return None


def _grid(stride: int, solver: str) -> str:
    return f"tail.stride={stride} tail.solver={solver}"


def _candidates(config: Config) -> list[str]:
    """What the method and the way its weights are held let be chosen, and first the configuration's own tail."""
    uses = config.method.uses
    own = [""] if not config.tail.exact else []
    cached = list(CACHED) if config.calls_are_alike and not config.collects_weights else []
    if "tail.stride" in uses:
        return own + [_grid(stride, solver) for solver in SOLVERS for stride in STRIDES] + cached
    return own + ([f"tail.solver={solver}" for solver in SOLVERS[1:]] + cached[:1] if "tail.solver" in uses else [])


def fidelity(
    recipe: str,
    overrides: Sequence[str] = (),
    tails: Sequence[str] = (),
    target: float = 0.95,
    num_prompts: int = 8,
    checkpoint: str = "newest",
    device: str = "cpu",
    out: Path | None = None,
    trust_run: bool = False,
) -> str:
    """Measure tails against the exact one and suggest a setting; returns a table. ValueError: what the user must mend.

    recipe: one, or a run's folder, whose `checkpoint` is then the policy. tails: settings each, as on the command line;
    none given: strides, solvers and caches. The prompts are the first `num_prompts` of the run's own order; what is
    suggested was measured once more on the next ones. out: also write everything there as JSON. trust_run: the run's
    own rewards may run code, and send images and a token elsewhere; so may those that `overrides` name.
    """
    reader = None
    with ExitStack() as stack:
        if (run := Path(recipe)).is_dir():
            if not (run / CONFIG_FILE).is_file():
                raise ValueError(f"recipe: {run} holds no run ({CONFIG_FILE} is missing)")
            recipe = str(run / CONFIG_FILE)
            reader = stack.enter_context(open_checkpoint(run, checkpoint))
            check_sound(reader.path)
        config = with_times(load_config(recipe, overrides))
        if reader and not trust_run and not any(given.startswith("rewards=") for given in overrides):
            require_trust((reward.name for reward in config.rewards if reward.weight), run / CONFIG_FILE)
        candidates = list(tails) or _candidates(config)
        configs = [with_times(load_config(recipe, [*overrides, *settings.split()])) for settings in candidates]
        if not plan_of(config.with_tail(), 0).tail_evaluations or not configs:
            raise ValueError(f"method: the tails of {config.method.name} cannot be approximated by strides or solvers")
        for settings, one in zip(candidates, configs):
            if one.model_copy(update={"tail": config.tail}) != config:
                raise ValueError(f"tails: {settings!r} changes more than tail.*")
        model = config.model
        lines = read_split(config.prompts.train, "train", config.prompts.column)
        for reward in filter(attrgetter("weight"), config.rewards):
            check_reward(reward.name, reward.options, lines, model.height, model.width)
        # Last: a hub id is downloaded for it.
        folder = resolve(pipeline_path(model.path))
        policy = Policy.of(config, folder)
        for settings, one in zip(list(candidates), configs):
            try:
                policy.use_tail(with_local_tail(one).tail)
            except ValueError:
                if tails or settings not in CACHED:
                    raise
                candidates.remove(settings)  # a model that diffusers cannot cache
        if reader:
            check_base(run, folder)
        order = PromptOrder(lines, config.seed, config.prompts.shuffle)
        sampler = _Sampler(config, policy, reader, lines[0], torch.device(device))
    search = _Search(recipe, overrides, folder, sampler, order, num_prompts)
    measured = [search.measure(settings) for settings in candidates]
    chosen = search.suggest(measured, target)
    header = ["tail", "rank correlation", "sign flips", "reward bias", "tail evaluations", "rollout"]
    what = f"Tails against the exact one: {config.method.name}, {num_prompts} prompts, {model.path}"
    message = Table(what, header, [one.row() for one in measured]).markdown()
    if chosen:
        again = Table("Suggested, on further prompts", header, [chosen.row()]).markdown()
        message += f"\n\n{again}\n\nsuggested for a correlation of {target:g}: {chosen.settings}\n"
    else:
        message += f"\n\nno tail that was measured reaches {target:g}: keep the exact one, or ask for less\n"
    if out:
        everything = {
            "recipe": recipe,
            "overrides": list(overrides),
            "checkpoint": reader.iteration if reader else None,
            "prompts": num_prompts,
            "target": target,
            "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU",
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "tails": [one.recorded() for one in measured],
            "suggested": chosen.recorded() if chosen else None,
        }
        out.write_text(json.dumps(everything, indent=2) + "\n")
    return message
