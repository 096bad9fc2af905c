"""What a run will cost before it runs: parameters, memory per GPU by part and phase, FLOPs, bytes gathered, seconds.

Parameters and FLOPs are counted on the meta device (`models/sizes.py`), the rest are closed forms of the recipe, which
`docs/cost.md` derives; no weight is loaded. Memory is held against CPU runs (`tests/commands/test_cost.py`); what
concerns a GPU is an estimate.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from egrpo_fast.commands.cluster import GIB, Cluster
from egrpo_fast.config import Config, plan_of
from egrpo_fast.models.folder import with_times
from egrpo_fast.models.sizes import Sizes
from egrpo_fast.plan import Plan
from egrpo_fast.rewards import parameters

HOST_LINK = 25e9
"""Assumed bytes per second between a GPU and host memory; the host's AdamW is taken to read and write as fast."""


@dataclass(frozen=True)
class Memory:
    """Bytes by part: on every GPU in all phases, in each phase on top of that, and in host memory per GPU."""

    always: dict[str, float] = field(default_factory=dict)
    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    host: dict[str, float] = field(default_factory=dict)

    @property
    def totals(self) -> dict[str, float]:
        standing = sum(self.always.values())
        return {phase: standing + sum(parts.values()) for phase, parts in self.phases.items()}

    @property
    def peak(self) -> float:
        return max(self.totals.values())


class Cost:
    """The cost of one recipe on one cluster. ValueError where the prompts cannot be shared among the GPUs."""

    def __init__(self, config: Config, cluster: Cluster, sizes: Sizes | None = None) -> None:
        """sizes: of the config's model; None: counted here."""
        self.sizes = sizes or Sizes(config.model)
        config = with_times(config)
        if config.model.lora is not None:
            config = config.with_lora(self.sizes.followed(config.model.lora))
        self.config, self.cluster = config, cluster
        per_iteration = config.prompts.per_iteration
        if per_iteration % cluster.gpus:
            raise ValueError(f"prompts.per_iteration: {per_iteration} is not a multiple of {cluster.gpus} GPUs")
        self.prompts = per_iteration // cluster.gpus
        self.itemsize = 2 if config.model.dtype == "bfloat16" else 4
        self.plan: Plan = plan_of(config, 0)
        self.parameters, self.adapters = self.sizes.parameters, self.sizes.adapters(config.model.lora)
        self.trained = self.adapters or self.parameters
        zero = config.deepspeed.overrides.get("zero_optimization", {})
        self.hpz = int(zero.get("zero_hpz_partition_size", 1))
        self.bucket = int(zero.get("reduce_bucket_size", 5e8))
        self.sub_group = int(zero.get("sub_group_size", 1e9))
        self.max_live = int(zero.get("stage3_max_live_parameters", 1e9))

    @property
    def sharded(self) -> bool:
        return self.config.deepspeed.zero_stage == 3 and self.cluster.gpus > 1

    @property
    def calls(self) -> int:
        """Model calls of one wavefront."""
        rows = [len(wave.sources) * self._per_call for wave in self.plan.waves]
        return sum(-(-count // (self.config.rollout.most_rows or count)) for count in rows)

    @property
    def _per_call(self) -> int:
        return min(self.config.rollout.prompts_per_rollout, self.prompts)

    @property
    def _wavefronts(self) -> int:
        return -(-self.prompts // self._per_call)

    @property
    def _moments(self) -> float:
        """AdamW's bytes per trained weight."""
        return 2 * (1 + 4 / 256) if self.config.optimizer.name == "adamw8bit" else 8.0

    @property
    def checkpoint(self) -> float:
        """Bytes of one: float32 master weights, moments and average, whatever the number of GPUs that write it."""
        return (4.0 + self._moments + (4.0 if self.config.optimizer.ema_decay is not None else 0.0)) * self.trained

    @property
    def checkpoints_on_disk(self) -> int:
        """At most: the newest, the best, and one being written."""
        return self.config.checkpoint.save_total_limit + (self.config.checkpoint.best is not None) + 1

    @cached_property
    def memory(self) -> Memory:
        """By part and phase; ZeRO's partitions are P / N of P parameters on N GPUs."""
        config, gpus, stage, size = self.config, self.cluster.gpus, self.config.deepspeed.zero_stage, self.itemsize
        quantized = self.sizes.quantized(config.model.quantization)
        weights = (self.parameters - quantized.parameters + self.adapters) * size
        share = self.trained / gpus
        always: dict[str, float] = {}
        host: dict[str, float] = {}
        on_host = config.deepspeed.offload_optimizer == "cpu"
        on_disk = config.deepspeed.offload_optimizer == "nvme"

        def put(part: str, amount: float, away: bool) -> None:
            (host if away else always)[part] = amount

        shard = weights / gpus if stage == 3 else weights
        if config.deepspeed.offload_param != "nvme":
            put("weights", shard, config.deepspeed.offload_param == "cpu")
        always |= {"quantized weights": float(quantized.weights), "their scales": float(quantized.scales)}
        if self.hpz > 1:
            always["weights, hpZ copy"] = weights / self.hpz
        put("gradients", 4.0 * (self.trained if stage == 1 else share), (on_host or on_disk) and stage > 1)
        moments = self._moments * share
        if not on_disk:
            put("master weights", 4.0 * share, on_host)  # also of float32 weights
            put("optimizer moments", moments, on_host)
        if config.optimizer.ema_decay is not None:
            put("average of the weights", 4.0 * share, on_host)
        always["reduction bucket"] = float(self.bucket * size)
        always |= self.sizes.frozen
        if config.prompts.embeddings is not None:
            del always["text encoders"]
        tails = float(self.parameters * (size if config.tail.quantization == "none" else 1)) * config.tail.has_weights
        if config.tail.path is not None:
            always["the tail's model"] = tails
        rewards = {name: 4.0 * (count or 0) for name, count in self.reward_parameters.items()}
        offloaded = {reward.name for reward in config.rewards if reward.options.get("offload")}
        always |= {f"reward {name}": amount for name, amount in rewards.items() if amount and name not in offloaded}
        host |= {f"reward {name}": amount for name, amount in rewards.items() if amount and name in offloaded}
        host["copy of a checkpoint"] = self.checkpoint / gpus
        latents = prod(self.sizes.backbone.latent_shape)
        rows = self._per_call * self.plan.num_rows
        always["state of all rows"] = float(rows * latents * (4 + (size if size == 2 else 0)))
        always["context and reserve"] = self.cluster.reserve

        gathered = 0.0
        if self.sharded or config.deepspeed.offload_param != "none":
            gathered = float(min(self.max_live * size, weights))
        live = max(len(wave.sources) for wave in self.plan.waves) * self._per_call
        evaluated = min(config.evaluation.batch_size, -(-config.evaluation.num_prompts // gpus))
        micro_batch = min(config.rollout.most_rows or 10**9, max(live, evaluated))
        images = min(config.model.decode_batch_size, len(self.plan.image_rows) * self._per_call)
        pixels = config.model.height * config.model.width
        activations = self.sizes.activations
        whole = config.rollout.parameters == "gathered" and (gathered > 0)
        sub_group = min(self.sub_group, share) if stage == 3 else share
        away = on_host or on_disk
        # torch's plain AdamW, on a CPU: the square root and its quotient. The fused one and bitsandbytes work in place.
        temporaries = 2 if self.cluster.kind == "cpu" and config.optimizer.name == "adamw" else 0
        # Every prompt's image latents stay until the update; so do the shared states.
        dequantized = float(quantized.largest * size)  # by a layer, while it computes
        samples = sum(group.size for group in self.plan.groups) if config.objective.log_prob == "stored" else 0
        rows_kept = len(self.plan.image_rows) + samples
        kept = float(self.prompts * latents * (4 * rows_kept + (4 + size) * self.plan.trained_states))
        states = self._per_call * max(len(group.sources) for group in self.plan.groups)
        trained_rows = self.sizes.backbone.trained_rows_per_velocity
        phases = {
            "rollout": {
                "gathered weights": weights if whole else gathered,
                "the tail's copy": 0.0 if config.tail.path is not None else tails,
                "the tail's cache": self._tail_cache(),
                "a layer dequantized": dequantized,
                "activations": micro_batch * self.sizes.backbone.rows_per_call * activations.forward,
                "velocities": 2.0 * size * live * latents,
                "images' latents": kept,
            },
            "rewards": {
                "VAE activations": images * activations.decode,
                "images": 2.0 * 4 * 3 * images * pixels,
                "visiting reward": max((rewards[name] for name in offloaded), default=0.0),
                "images' latents": kept,
            },
            "update": {
                "gathered weights": gathered,
                "a layer dequantized": dequantized,
                "activations": states * trained_rows * activations.update(config.model.gradient_checkpointing),
                "gradients in reduction": (4.0 if size == 2 else 0.0) * min(self.bucket, self.trained),
                "images' latents": kept,
            },
            "optimizer step": {
                "gradient of a sub-group": 0.0 if away else 4.0 * sub_group,
                "temporaries": 0.0 if away else 4.0 * temporaries * sub_group,
            },
        }  # fmt: skip
        return Memory(always, phases, host)

    def _tail_cache(self) -> float:
        """What `tail.cache` keeps of all rows that have a tail, until the rollout ends."""
        cache = self.config.tail.cache
        if cache is None:
            return 0.0
        rows = self._per_call * sum(map(len, self.plan.families))
        kept = (cache.order + 1) * prod(self.sizes.backbone.latent_shape)
        return float(rows * kept * self.itemsize)

    @cached_property
    def reward_parameters(self) -> dict[str, int | None]:
        """By reward; None: it does not say, and is counted as nothing."""
        return {reward.name: parameters(reward.name, reward.options) for reward in self.config.rewards}

    @property
    def unknown_rewards(self) -> list[str]:
        """Rewards that do not say their size."""
        return [name for name, count in self.reward_parameters.items() if count is None]

    @property
    def fits(self) -> bool:
        return self.memory.peak <= self.cluster.gpu.memory

    @cached_property
    def flops(self) -> dict[str, float]:
        """Of one prompt's iteration; scoring by the reward models is not counted, it is below 1% for ViT-H."""
        evaluation, attention = self.sizes.evaluation_flops
        # Backward: gradients of inputs and of weights, each as much as the forward; adapters need no base weights'.
        backward = (1 if self.adapters else 2) + (1 if self.config.model.gradient_checkpointing else 0)
        backbone = self.sizes.backbone
        passes = 1 + backward * backbone.trained_rows_per_velocity / backbone.rows_per_velocity
        steps = self.plan.trained_states
        references = steps if self.config.objective.optimizer_step == "active_step" else 0
        return {
            "evaluation": evaluation,
            "attention": attention,
            "rollout": self.plan.evaluations * evaluation,
            "update": (passes * steps + references) * evaluation,
            "decode": len(self.plan.image_rows) * self.sizes.decode_flops,
        }

    @cached_property
    def traffic(self) -> dict[str, float]:
        """Bytes that every GPU receives in one iteration: gathered weights by phase, and reduced gradients."""
        gpus, steps = self.cluster.gpus, len(self.plan.groups) * self._wavefronts
        part = (gpus - 1) / gpus
        gather = (self.parameters + self.adapters) * self.itemsize * part if self.sharded else 0.0
        optimizer_steps = len(self.plan.groups) if self.config.objective.optimizer_step == "active_step" else 1
        calls = 1 if self.config.rollout.parameters == "gathered" else self.calls * self._wavefronts
        references = steps if optimizer_steps > 1 else 0
        return {
            "rollout": calls * gather,
            "update, forwards": (steps + references) * gather,
            "update, backwards": steps * gather,
            "gradients": steps * self.trained * self.itemsize * part,
            "weights after a step": 0.0 if self.sharded else optimizer_steps * self.trained * self.itemsize * part,
        }

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Estimated, of one iteration; nothing overlaps."""
        gpu, flops = self.cluster.gpu, self.flops
        rate = gpu.flops * self.cluster.utilisation
        link = gpu.link if self.cluster.nodes == 1 else min(gpu.link, self.cluster.network)
        # hpZ keeps a copy inside each machine, which serves the backwards.
        inside = gpu.link if self.hpz > 1 else link
        speeds = {name: inside if name == "update, backwards" else link for name in self.traffic}
        zero, moved = self.config.deepspeed, 0.0
        if zero.offload_optimizer != "none":
            moved += (16 if zero.offload_optimizer == "cpu" else 32) * self.trained / self.cluster.gpus
        if zero.offload_param != "none":
            forwards = 2 * len(self.plan.groups) * self._wavefronts
            calls = 1 if self.config.rollout.parameters == "gathered" else self.calls * self._wavefronts
            moved += (calls + forwards) * self.parameters * self.itemsize / self.cluster.gpus
        parts = {name: flops[name] * self.prompts / rate for name in ("rollout", "decode", "update")}
        parts |= {"communication": sum(amount / speeds[name] for name, amount in self.traffic.items())}
        if zero.offload_optimizer == "none":  # gradient, weight and both moments are read, all but the first written
            parts |= {"optimizer": 7 * 4 * self.trained / self.cluster.gpus / gpu.bandwidth}
        parts |= {"host": moved / HOST_LINK}
        return parts | {"total": sum(parts.values())}

    @cached_property
    def advice(self) -> list[dict[str, Any]]:
        """What to change where it does not fit, in this order: every change that fits alone, else the first changes
        together that do. Each: settings, peak bytes, whether it fits."""
        if self.fits:
            return []
        tried = [made for settings in CHANGES if (made := self._with([settings]))]
        alone = [made for made in tried if made["fits"]]
        if alone:
            return alone
        taken: list[Mapping[str, Any]] = []
        best = self.memory.peak
        for settings in CHANGES:
            made = self._with([*taken, settings])
            if made is not None and made["peak"] <= best:  # also what helps only together with a later one
                taken, best = [*taken, settings], made["peak"]
            if made is not None and made["fits"]:
                break
        enough = max(best, 0.95 * self.cluster.gpu.memory)  # with some room to spare
        for settings in reversed(taken):  # what costs most goes first
            without = [other for other in taken if other is not settings]
            made = self._with(without)
            if made is not None and made["peak"] <= enough:
                taken = without
        made = self._with(taken) if taken else None
        return [made] if made else []

    def _with(self, changes: list[Mapping[str, Any]]) -> dict[str, Any] | None:
        """The estimate with these changes; None where they change nothing, or cannot be."""
        tree = self.config.model_dump()
        cluster = self.cluster
        settings: dict[str, Any] = {}
        changed: dict[str, Any] = {}
        for change in changes:
            settings |= change
        for name, value in settings.items():
            if name == "GPUs":
                count = cluster.gpus * value
                cluster = replace(cluster, gpus=count, nodes=cluster.nodes * value)
                tree["prompts"]["per_iteration"] = max(tree["prompts"]["per_iteration"], count)
                changed[name] = count
            elif name == "rewards.offload":
                for reward in tree["rewards"]:
                    if self.reward_parameters[reward["name"]] and not reward["options"].get("offload"):
                        reward["options"]["offload"] = changed[name] = True
            else:
                *sections, leaf = name.split(".")
                node = tree
                for section in sections:
                    node = node[section]
                if node[leaf] != value and not (name == "model.lora" and node[leaf]):
                    node[leaf] = changed[name] = value
        if not changed:
            return None
        try:
            cost = Cost(Config.model_validate(tree), cluster, self.sizes)
        except ValueError:
            return None
        host = sum(cost.memory.host.values())
        return {"settings": changed, "peak": cost.memory.peak, "host": host, "fits": cost.fits}


CHANGES: tuple[Mapping[str, Any], ...] = (
    {"model.gradient_checkpointing": True},
    {"rollout.max_rows_per_call": 1},
    {"model.decode_batch_size": 1},
    {"rollout.parameters": "sharded"},
    {"optimizer.name": "adamw8bit"},
    {"prompts.embeddings": "FOLDER"},
    {"rewards.offload": True},
    {"optimizer.name": "adamw", "deepspeed.offload_optimizer": "cpu"},
    {"deepspeed.offload_param": "cpu"},
    {"optimizer.name": "adamw", "deepspeed.offload_optimizer": "none", "model.lora": {}},
    {"model.lora": {}, "model.quantization": "nf4", "deepspeed.zero_stage": 2, "deepspeed.offload_param": "none"},
    {"GPUs": 2},
    {"GPUs": 4},
)
"""What saves memory, from what costs nothing to what costs most."""


def describe(config: Config, cluster: Cluster) -> dict[str, Any]:
    """The whole estimate as plain numbers: bytes, FLOPs, seconds."""
    cost = Cost(config, cluster)
    memory = cost.memory
    return {
        "model": config.model.path,
        "cluster": {
            "gpus": cluster.gpus, "nodes": cluster.nodes, "gpu": cluster.kind, "utilisation": cluster.utilisation,
            "peak_flops": cluster.gpu.flops, "memory": cluster.gpu.memory, "memory_bandwidth": cluster.gpu.bandwidth,
            "link": cluster.gpu.link, "network": cluster.network,
        },
        "parameters": {"total": cost.parameters, "lora": cost.adapters, "trained": cost.trained},
        "memory": {
            "always": memory.always, "phases": memory.phases, "totals": memory.totals, "peak": memory.peak,
            "host_per_gpu": memory.host, "fits": cost.fits, "unknown_rewards": cost.unknown_rewards,
            "advice": cost.advice,
        },
        "checkpoint": {"bytes": cost.checkpoint, "at_once": cost.checkpoints_on_disk},
        "flops_per_prompt": cost.flops,
        "latent_shape": cost.sizes.backbone.latent_shape,
        "bytes_per_gpu": cost.traffic,
        "prompts_per_gpu": cost.prompts,
        "seconds": cost.seconds,
    }  # fmt: skip


def summary(cost: Mapping[str, Any]) -> str:
    """`describe` in a line."""
    cluster, memory = cost["cluster"], cost["memory"]
    phase = max(memory["totals"], key=memory["totals"].get)
    return (
        f"estimated: {memory['peak'] / GIB:.1f} of {cluster['memory'] / GIB:.1f} GiB per GPU, most in the {phase}"
        f"{'' if memory['fits'] else ' (does not fit)'}; {cost['seconds']['total']:.0f} s per iteration"
    )


def report(cost: Mapping[str, Any]) -> str:
    """`describe` as text."""
    cluster, memory, seconds = cost["cluster"], cost["memory"], cost["seconds"]
    flops, parameters = cost["flops_per_prompt"], cost["parameters"]
    machines = f" on {cluster['nodes']} machines" if cluster["nodes"] > 1 else ""
    lines = [
        f"{cost['model']} on {cluster['gpus']} x {cluster['gpu']}{machines}; an estimate, no GPU was asked",
        f"  parameters   {parameters['total']:,}; trained {parameters['trained']:,}",
        "",
        f"memory per GPU, GiB {'':<12}" + "".join(f"{phase:>16}" for phase in memory["phases"]),
    ]
    rows: dict[str, list[float]] = {name: [amount] * 4 for name, amount in memory["always"].items()}
    for place, parts in enumerate(memory["phases"].values()):
        for name, amount in parts.items():
            rows.setdefault(name, [0.0] * 4)[place] += amount
    rows["total"] = list(memory["totals"].values())
    for name, amounts in rows.items():
        if any(amounts):
            lines.append(
                f"  {name:<30}" + "".join(f"{amount / GIB:>16.2f}" if amount else " " * 16 for amount in amounts)
            )
    verdict = "fits" if memory["fits"] else "does not fit"
    lines.append(f"  peak {memory['peak'] / GIB:.1f} GiB of {cluster['memory'] / GIB:.1f}: {verdict}")
    host, checkpoint = memory["host_per_gpu"], cost["checkpoint"]
    machine = sum(host.values()) * cluster["gpus"] / cluster["nodes"]
    lines += [
        f"  host memory per machine {machine / GIB:.3g} GiB; per GPU: "
        + ", ".join(f"{name} {amount / GIB:.3g}" for name, amount in host.items()),
        f"  a checkpoint {checkpoint['bytes'] / GIB:.3g} GiB; at most {checkpoint['at_once']} on the disk at once, "
        f"{checkpoint['at_once'] * checkpoint['bytes'] / GIB:.3g} GiB",
    ]
    if memory["unknown_rewards"]:
        lines.append(f"  of unknown size, counted as 0: {', '.join(memory['unknown_rewards'])}")
    for change in memory["advice"]:
        settings = " ".join(f"{name}={value}" for name, value in change["settings"].items())
        message = "would fit" if change["fits"] else "not enough either"
        lines.append(f"  {message} at {change['peak'] / GIB:.1f} GiB: {settings}")
    if not memory["fits"] and not memory["advice"]:
        lines.append("  no change known here makes it fit")
    total = sum(flops[part] for part in ("rollout", "update", "decode"))
    lines += [
        "",
        f"compute per prompt: {total / 1e15:.4g} PFLOP = rollout {flops['rollout'] / 1e15:.4g}, update "
        f"{flops['update'] / 1e15:.4g}, decode {flops['decode'] / 1e15:.4g}; one evaluation "
        f"{flops['evaluation'] / 1e12:.4g} TFLOP, {flops['attention'] / 1e12:.4g} of them attention",
        "received per GPU and iteration, GB: "
        + ", ".join(f"{name} {amount / 1e9:.1f}" for name, amount in cost["bytes_per_gpu"].items() if amount),
        f"seconds per iteration of {cost['prompts_per_gpu']} prompt(s) per GPU: {seconds['total']:.3g} = "
        + " + ".join(f"{name} {amount:.3g}" for name, amount in seconds.items() if amount and name != "total"),
        f"  assumed: {cluster['utilisation']:.0%} of {cluster['peak_flops'] / 1e12:g} TFLOP/s, "
        f"{cluster['link'] / 1e9:.0f} GB/s inside a machine, {cluster['network'] / 1e9:.0f} GB/s per GPU between, "
        f"no overlap; rewards' own time not counted",
        "",
        summary(cost),
    ]
    return "\n".join(line.rstrip() for line in lines)
