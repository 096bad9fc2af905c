"""One whole iteration of one prompt (rollout, decode, rewards, update), several ways in one run.

    python benchmarks/iteration.py                       the Shapes model, 32x32
    python benchmarks/iteration.py --model flux-30m      FLUX's layout at 30 million parameters, 1,024 tokens
    python benchmarks/iteration.py --model flux          FLUX.1-dev's own size with random weights, 720x720, on a GPU
    python benchmarks/iteration.py --profile OUT         a trace of the exact wavefront iteration, and tables of it

- naive:      one image per model call, its whole prefix computed again, decoded, scored and trained on by itself, as
              public trainers work
- batched:    the same for a group of images at a time: nothing is shared across active steps
- exact:      the trainer's own: one prefix, one wavefront, one update forward per active step
- compiled:   the same through `rollout.compile`
- fast:       compiled, with two thirds of the tail's steps left out (`tail.stride`), of second order (`tail.solver`)

Variants take turns, round by round. All but the last do the same work: their images, rewards and the norm of their
gradient are compared. Ratios are to the first variant that is not left out. On a CPU each one's memory is that of a
process of its own, what compiling takes included (`--together`: that of this one, which is sooner done). Written to
`benchmarks/results/iteration-<device>.json`, one entry per model.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from peft import LoraConfig
from torch.profiler import ProfilerActivity, profile, record_function

from egrpo_fast import noise
from egrpo_fast.config import ModelConfig, load_config
from egrpo_fast.distributed.heartbeat import Heartbeat
from egrpo_fast.distributed.world import World
from egrpo_fast.files import read_json
from egrpo_fast.kernels.reference.group_advantage_clip_loss import group_advantage_ref
from egrpo_fast.kernels.reference.philox import philox_normal
from egrpo_fast.models.attention import use_arithmetic, use_attention
from egrpo_fast.models.flux.backbone import FluxBackbone
from egrpo_fast.models.flux.compiled import CompiledFlux
from egrpo_fast.models.folder import configs_of
from egrpo_fast.models.random import make_pipeline
from egrpo_fast.models.sizes import Sizes
from egrpo_fast.policy import Policy
from egrpo_fast.prompts.order import Prompt
from egrpo_fast.rewards import make_reward
from egrpo_fast.runs.provenance import commit
from egrpo_fast.shapes import PIPELINE, PROMPTS
from egrpo_fast.trainer import TrainingLoop

RESULTS = Path(__file__).parent / "results"
FLUX_DEV = "black-forest-labs/FLUX.1-dev"
PHASES = ("rollout", "decode", "rewards", "update")
SAME = ("optimizer.lr=1e-12", "optimizer.weight_decay=0", "deepspeed.zero_stage=1", "evaluation.num_prompts=1")
"""The weights stay as they are, so that every variant and round does the same."""


class RandomText:
    """Conditioning of FLUX.1-dev's shapes, the same for all prompts: its text encoders are no part of an iteration."""

    def __init__(self, device):
        generator = torch.Generator(device).manual_seed(0)
        options = {"generator": generator, "device": device, "dtype": torch.bfloat16}
        self.t5, self.pooled = torch.randn(1, 512, 4096, **options), torch.randn(1, 768, **options)

    def encode(self, prompts):
        return {"t5": self.t5.expand(len(prompts), -1, -1), "pooled": self.pooled.expand(len(prompts), -1)}


class RandomScore:
    """ViT-H/14 with random weights: the work of HPSv2.1's or PickScore's image tower."""

    def __init__(self, device):
        from torchvision.models import vit_h_14

        with torch.device(device):
            self.network = vit_h_14(weights=None, image_size=224).eval().requires_grad_(False).bfloat16()
            torch.nn.init.normal_(self.network.heads.head.weight, std=0.02)

    @torch.no_grad()
    def __call__(self, images, prompts):
        small = torch.nn.functional.interpolate(images, size=(224, 224), mode="bilinear", antialias=True)
        return self.network(small.bfloat16())[:, 0].float()


SMALL = ModelConfig(path=str(PIPELINE), height=32, width=32, max_sequence_length=24, dtype="float32")


def shapes(device, folder):
    backbone = Policy(SMALL, PIPELINE).load(device).backbone
    return backbone, make_reward("shapes_soft", {}), ["model.path=shapes"]


def flux_30m(device, folder):
    make_pipeline("flux-dev", "30m").save_pretrained(folder)
    # 960 tokens of the image and 64 of the prompt.
    model = SMALL.model_copy(update={"height": 512, "width": 480, "max_sequence_length": 64})
    backbone = Policy(model, folder).load(device).backbone
    plan = ["schedule.num_steps=4", "rollout.group_size=4", "model.height=512", "model.width=480"]
    return backbone, make_reward("jpeg", {}), plan


def flux(device, folder):
    if device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory < 40 * 2**30:
        raise SystemExit("error: --model flux needs a GPU of at least 40 GiB")
    image = ["model.height=720", "model.width=720", "model.decode_batch_size=4"]
    settings = [*image, "model.dtype=bfloat16", "model.lora={}"]
    lora = load_config("flux-dev-lora-8x24gb").model.lora
    configs = configs_of(FLUX_DEV)
    torch.set_default_dtype(torch.bfloat16)
    with device:
        transformer, vae = (
            kind.from_config(read_json(configs / part / "config.json")).requires_grad_(False)
            for kind, part in ((FluxTransformer2DModel, "transformer"), (AutoencoderKL, "vae"))
        )
        targets = list(FluxBackbone.lora_targets)
        transformer.add_adapter(
            LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, init_lora_weights=False)
        )
    torch.set_default_dtype(torch.float32)
    transformer.enable_gradient_checkpointing()
    model = load_config("shapes", settings).model
    backbone = FluxBackbone(transformer, vae, RandomText(device), model, FluxBackbone.guidance(configs, model))
    return backbone, RandomScore(device), [*settings, "rollout.max_rows_per_call=auto"]


MODELS = {"shapes": shapes, "flux-30m": flux_30m, "flux": flux}


class Meter:
    """Seconds by phase, and model calls and evaluations with and without gradient, of a trainer's parts.

    Of one CPU thread it is the thread's own time, which other work on the machine does not stretch.
    """

    def __init__(self, trainer, reward):
        self.trainer, self.reward = trainer, reward
        self.cuda = trainer.world.device.type == "cuda"
        self.own_time = not self.cuda and torch.get_num_threads() == 1
        self.velocity, self.decoder = trainer.sampler.policy.backbone.velocity, trainer.sampler.policy.backbone.decode
        trainer.sampler.policy.backbone.velocity, trainer.sampler.policy.backbone.decode = self.evaluate, self.decode
        trainer.sampler.rewards = dict.fromkeys(trainer.sampler.rewards, self.score)
        self.clear()

    def clear(self):
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self.calls = {False: [0, 0], True: [0, 0]}
        self.start = self.now()

    def now(self):
        if self.cuda:
            torch.cuda.synchronize()
        return time.thread_time() if self.own_time else time.perf_counter()

    def read(self):
        """What is no decoding, scoring or update is rollout."""
        whole = self.now() - self.start
        return self.seconds | {"rollout": whole - sum(self.seconds.values()), "all": whole}

    def evaluate(self, module, latents, *rest):
        counted = self.calls[torch.is_grad_enabled()]
        counted[0], counted[1] = counted[0] + 1, counted[1] + len(latents)
        return self.velocity(module, latents, *rest)

    @contextmanager
    def phase(self, name):
        start = self.now()
        with record_function(name):
            yield
        self.seconds[name] += self.now() - start

    def decode(self, *latents):
        with self.phase("decode"):
            return self.decoder(*latents)

    def score(self, images, prompts):
        with self.phase("rewards"):
            return self.reward(images, prompts)


class PeakMemory:
    """Most memory in use inside the block, in MiB, above what was in use at its start."""

    def __init__(self, device):
        self.device = device

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        self.process, self.running = psutil.Process(), True
        self.start = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _watch(self):
        while self.running:
            self.peak = max(self.peak, self.process.memory_info().rss)
            time.sleep(0.01)

    def __exit__(self, *_):
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
        else:
            self.running = False
            self.thread.join()
        self.mebibytes = (self.peak - self.start) / 2**20


def unshared(trainer, meter, prompt, size):
    """An iteration in which nothing is shared, `size` samples of a group at a time. Returns what `shared` does."""
    backbone, plan, device = trainer.sampler.policy.backbone, trainer.sampler.wavefront.plan, trainer.world.device
    dtype, schedule = trainer.sampler.wavefront._model_dtype, plan.schedule
    conditioning = backbone.encode([prompt.text])
    number = torch.tensor([prompt.number], device=device)
    parts = []
    with trainer.engine.inference(True) as module, torch.no_grad():
        for group in plan.groups:
            for draws in torch.tensor(group.draws, device=device).split(size):
                rows = torch.zeros(len(draws), dtype=torch.int64, device=device)
                x = noise.initial_noise(0, 0, number, backbone.latent_shape).expand(len(draws), -1, -1)
                index = 0
                while index < schedule.num_steps:
                    v = backbone.velocity(module, x.to(dtype), schedule.times[index], conditioning, rows).float()
                    if index == group.index:
                        eps = philox_normal(noise.streams(0, number, draws)[0], x[0].numel(), 0).reshape(x.shape)
                        state, step = x.contiguous(), group.step
                        x = sample = step.c_x * x + step.c_v * v + step.s * eps
                        coefficients = x.new_tensor([[step.c_x, step.c_v, step.s]]).repeat(len(draws), 1)
                        log_prob = trainer.objective.ops.gaussian_log_prob(sample, state, v, coefficients)
                        index += schedule.merges[index]
                    else:
                        x, index = x + schedule.ode(index, index + 1).c_v * v, index + 1
                images = [backbone.decode(some) for some in x.split(trainer.config.model.decode_batch_size)]
                scores = [meter.score(some, [prompt.text] * len(some)) for some in images]
                parts.append((group, rows, state, sample, coefficients, log_prob, x, torch.cat(scores)))
    rewards = torch.cat([part[-1] for part in parts])
    advantages = torch.cat(
        [
            group_advantage_ref(some.reshape(1, 1, 1, -1), rewards.new_ones(1), "reward", 5.0).flatten()
            for some in rewards.split([group.size for group in plan.groups])
        ]
    )
    clip = trainer.config.objective.clip_range
    with meter.phase("update"):
        for place, (part, advantage) in enumerate(zip(parts, advantages.split([len(part[1]) for part in parts]))):
            group, rows, state, sample, coefficients, log_prob, *_ = part
            module = trainer.engine.module
            v = backbone.velocity(module, state.to(dtype), group.time, conditioning, rows).float()
            ratio = (trainer.objective.ops.gaussian_log_prob(sample, state, v, coefficients) - log_prob).exp()
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            trainer.engine.backward(-surrogate.sum() / group.size / len(plan.groups), place == len(parts) - 1)
        norm = trainer.engine.step()
    return torch.cat([part[-2] for part in parts]), rewards, norm


def shared(trainer, meter, prompt):
    """The trainer's own iteration. Returns images' latents, their rewards, and the gradient's norm."""
    trainer.progress.committed = False
    batch = trainer.sampler.sample([prompt])
    with meter.phase("update"):
        norm = trainer.update(batch)["grad_norm"]
    return batch[0].rollout.final_latents[0], batch[0].rewards[0, 0], norm


def matmul_peak(meter, dtype):
    """FLOP/s of a large square matrix product: the best of several."""
    size = 8192 if meter.cuda else 2048
    a, b = torch.randn(2, size, size, device=meter.trainer.world.device).to(dtype)
    seconds = []
    for _ in range(8):
        start = meter.now()
        a @ b
        seconds.append(meter.now() - start)
    return 2 * size**3 / min(seconds)


def report(result):
    where, peak = result["device"], result["matmul_peak"] / 1e9
    print(
        f"\n{result['model']}: {where}, {result['threads']} threads, torch {result['torch']}; a matrix product of the"
    )
    print(f"same type reaches {peak:,.0f} GFLOP/s. Medians of {result['rounds']} rounds; an evaluation is")
    print(f"{result['flops_per_evaluation'] / 1e9:,.3f} GFLOP, one with gradient three times as much.\n")
    heads = "".join(f"{name:>9}" for name in (*PHASES, "all"))
    print(f"{'':<10}{'calls':>7}{'evaluations':>13}{heads}{'ratio':>8}{'rollout':>9}{'of peak':>9}{'MiB':>8}")
    for name, row in result["variants"].items():
        seconds = "".join(f"{row['seconds'][phase]:>9.3f}" for phase in (*PHASES, "all"))
        counts = f"{row['calls'] + row['calls_with_gradient']:>7}"
        counts += f"{row['evaluations']:>7} + {row['evaluations_with_gradient']:>3}"
        ratios = f"{row['ratio']:>7.2f}x{row['rollout_ratio']:>8.2f}x{row['share_of_peak']:>9.0%}"
        print(f"{name:<10}{counts}{seconds}{ratios}{row['peak_mib']:>8.0f}")


def memory_alone(name):
    """Peak of a variant's memory in a process like this one, in MiB: what it allocates there nothing was left for."""
    command = [sys.executable, *sys.argv, "--memory-of", name]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")}
    told = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(told.split()[-1])


def measure(trainer, meter, variants, rounds, flops, peak, alone):
    device, runs = trainer.world.device, {name: [] for name in variants}
    told, first = {}, None
    for round_ in range(rounds + 1):
        for name, (run, stand_in, config) in variants.items():
            trainer.engine._stand_in, trainer.sampler.config = stand_in, config
            with PeakMemory(device) as memory:
                meter.clear()
                latents, rewards, norm = run()
                seconds = meter.read()
            phases = ", ".join(f"{phase} {spent:.3f}" for phase, spent in seconds.items())
            print(f"round {round_} of {rounds}, {name}: {phases} s", flush=True)
            if round_:
                runs[name].append(seconds)
                continue
            (calls, rows), (calls_with, rows_with) = meter.calls[False], meter.calls[True]
            told[name] = {
                "calls": calls, "evaluations": rows, "calls_with_gradient": calls_with,
                "evaluations_with_gradient": rows_with,
                "peak_mib": memory.mebibytes if meter.cuda or not alone else memory_alone(name),
            }  # fmt: skip
            first = first or (latents, rewards, norm)
            if len(latents) == len(first[0]) and name != "fast":
                exact = trainer.config.model.dtype == "float32"
                apart = (latents - first[0]).abs().max().item(), abs(norm / first[2] - 1)
                told[name] |= {"largest_difference": apart[0], "gradient_norm_apart": apart[1]}
                if exact and not (apart[0] < 1e-2 and apart[1] < 1e-2):
                    raise SystemExit(f"error: {name} is not the same iteration as {next(iter(runs))}: {apart}")
    for name, row in told.items():
        medians = {p: statistics.median(run[p] for run in runs[name]) for p in (*PHASES, "all")}
        row["seconds"], row["rounds"] = medians, [run["all"] for run in runs[name]]
        for field, phase in (("ratio", "all"), ("rollout_ratio", "rollout")):
            row[field] = statistics.median(a[phase] / b[phase] for a, b in zip(runs[next(iter(runs))], runs[name]))
        row["share_of_peak"] = row["evaluations"] * flops / medians["rollout"] / peak
    return told


KINDS = {
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm", "aten::linear"),
    "attention": ("scaled_dot_product", "flash", "cudnn_attention"),
    "GELU": ("aten::gelu",),
    "convolutions": ("convolution",),
}
"""Ops by a part of their name; all others are the rest."""


def by_phase(events, cuda):
    """Milliseconds of every phase by kind of op, and waits of the device's host in each (copies to it, syncs)."""
    phases, waits = {}, {}
    for event in events:
        above = event
        while above is not None and above.name not in PHASES:
            above = above.cpu_parent
        if above is None:
            continue
        kind = next((k for k, parts in KINDS.items() if any(part in event.name for part in parts)), "the rest")
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        row = phases.setdefault(above.name, dict.fromkeys((*KINDS, "the rest"), 0.0))
        row[kind] += spent / 1000
        waits[above.name] = waits.get(above.name, 0) + (
            event.name in ("cudaStreamSynchronize", "cudaDeviceSynchronize")
        )
    return phases, waits


def write_profile(trainer, meter, prompt, folder):
    """`trace.json` for chrome://tracing or Perfetto, and `table.txt`: time by phase and kind of op, and by op."""
    folder.mkdir(parents=True, exist_ok=True)
    shared(trainer, meter, prompt)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if meter.cuda else [])]) as told:
        shared(trainer, meter, prompt)
    told.export_chrome_trace(str(folder / "trace.json"))
    phases, waits = by_phase(told.events(), meter.cuda)
    lines = [f"{'milliseconds':<16}" + "".join(f"{name:>12}" for name in phases)]
    lines += [
        f"{kind:<16}" + "".join(f"{row[kind]:>12.1f}" for row in phases.values()) for kind in (*KINDS, "the rest")
    ]
    lines += [f"{'all':<16}" + "".join(f"{sum(row.values()):>12.1f}" for row in phases.values())]
    if meter.cuda:  # the stopwatch itself waits at the start and the end of every phase
        lines += [f"{'host waits':<16}" + "".join(f"{waits[name]:>12}" for name in phases)]
    sort = "self_cuda_time_total" if meter.cuda else "self_cpu_time_total"
    lines += ["", told.key_averages().table(sort_by=sort, row_limit=25, max_name_column_width=48)]
    (folder / "table.txt").write_text("\n".join(lines))
    print("\n".join(lines), f"\n{folder}: trace.json (chrome://tracing or Perfetto), table.txt")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="shapes")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds after one warm-up")
    parser.add_argument("--leave-out", action="append", default=[], metavar="VARIANT", help="a variant not to run")
    parser.add_argument("--profile", type=Path, metavar="OUT", help="write a profile into this folder instead")
    parser.add_argument(
        "--together",
        action="store_true",
        help="on a CPU measure memory in one process, where a variant reuses another's",
    )
    parser.add_argument(
        "--memory-of", metavar="VARIANT", help="print the peak of one variant's memory, in MiB, instead"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that iteration-<device>.json is in")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    arguments = parser.parse_args()
    world = World()
    with tempfile.TemporaryDirectory() as folder, Heartbeat(0, 1, None, 3600.0) as heart:
        backbone, reward, settings = MODELS[arguments.model](world.device, Path(folder) / "model")
        config = load_config("shapes", [*SAME, *settings, f"output_dir={folder}/run", *arguments.overrides])
        use_arithmetic(config.model)
        use_attention(backbone.transformer, config.model.attention)
        names = {reward.name: None for reward in config.rewards}
        lines = PROMPTS["held_out"].read_text().splitlines()
        policy = Policy.around(backbone, config.model)
        trainer = TrainingLoop(config, world, heart, policy, names, SimpleNamespace(signal=0), lines, lines)
        meter, prompt = Meter(trainer, reward), Prompt(0, lines[0])
        if arguments.profile:
            write_profile(trainer, meter, prompt, arguments.profile)
            return
        whole = max(group.size for group in trainer.sampler.wavefront.plan.groups)
        most = min(whole, config.rollout.most_rows or (whole if arguments.model != "flux" else 4))
        compiled = CompiledFlux.of(backbone.transformer)
        fast = config.with_tail(stride=3, solver="dpm2m")
        variants = {
            "naive": (lambda: unshared(trainer, meter, prompt, 1), None, config),
            "batched": (lambda: unshared(trainer, meter, prompt, most), None, config),
            "exact": (lambda: shared(trainer, meter, prompt), None, config),
            "compiled": (lambda: shared(trainer, meter, prompt), compiled, config),
            "fast": (lambda: shared(trainer, meter, prompt), compiled, fast),
        }
        variants = {name: variant for name, variant in variants.items() if name not in arguments.leave_out}
        if arguments.memory_of:
            run, trainer.engine._stand_in, trainer.sampler.config = variants[arguments.memory_of]
            with PeakMemory(world.device) as memory:
                run()
            print(memory.mebibytes)
            return
        dtype = torch.bfloat16 if config.model.dtype == "bfloat16" else torch.float32
        text = backbone.encode([prompt.text])["t5"].shape[1]
        path = {"shapes": "shapes", "flux": FLUX_DEV}.get(arguments.model, f"{folder}/model")
        sizes = Sizes(config.model.model_copy(update={"path": path, "max_sequence_length": text}))
        flops = sizes.evaluation_flops[0]
        peak = matmul_peak(meter, dtype)
        told = measure(trainer, meter, variants, arguments.rounds, flops, peak, not arguments.together)
    cuda = world.device.type == "cuda"
    result = {
        "model": arguments.model,
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "commit": commit(),
        "overrides": arguments.overrides,
        "tokens": [backbone.latent_shape[0], text],
        "rounds": arguments.rounds,
        "clock": "thread" if meter.own_time else "wall",
        "micro_batch": trainer.sampler.wavefront.rows_per_call(),
        "flops_per_evaluation": flops,
        "matmul_peak": peak,
        "variants": told,
    }
    report(result)
    path = arguments.results / f"iteration-{'gpu' if cuda else 'cpu'}.json"
    recorded = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(recorded | {arguments.model: result}, indent=2) + "\n")
    world.close()


if __name__ == "__main__":
    main()
