"""Rollout of one prompt, four ways in one run: model calls, evaluations, seconds, peak memory.

    python benchmarks/rollout.py                  the Shapes model, on the CPU or the GPU at hand
    python benchmarks/rollout.py --model flux     FLUX.1-dev's own size with random weights, 720x720, on a GPU

- alone:            every picture by itself, one row per call, its whole prefix computed again (what public codes do)
- batched:          a group's pictures together, still without sharing the prefix
- wavefront:        all live rows of a grid step in one call, one prefix; one line per backend of the ops that can run
The variants take turns, round by round; ratios are medians of their rounds. All give the same pictures: checked.
"""

import argparse
import json
import platform
import statistics
import threading
import time

import psutil
import torch
from diffusers import FluxTransformer2DModel

from egrpo_fast import noise, ops
from egrpo_fast.backbones.flux import FluxBackbone
from egrpo_fast.kernels.reference.philox import philox_normal
from egrpo_fast.methods import e_grpo
from egrpo_fast.rollout import NoiseKey, Wavefront
from egrpo_fast.schedule import make_schedule
from egrpo_fast.shapes import PIPELINE, PROMPTS


class Counter:
    """A velocity callable that counts its calls and rows."""

    def __init__(self, velocity):
        self.velocity, self.calls, self.rows = velocity, 0, 0

    def __call__(self, latents, t, rows):
        self.calls, self.rows = self.calls + 1, self.rows + len(latents)
        return self.velocity(latents, t, rows)


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


def without_prefix(velocity, plan, key, shape, device, model_dtype, batch):
    """Every picture from the noise on, `batch` rows of a group per call; pictures in the plan's order."""
    schedule, pictures = plan.schedule, []
    for group in plan.groups:
        for first in range(0, len(group.draws), batch):
            draws = torch.tensor(group.draws[first : first + batch], device=device)
            rows = torch.zeros(len(draws), dtype=torch.int64, device=device)
            x = noise.initial_noise(key.seed, key.iteration, key.prompts, shape).expand(len(draws), *shape)
            index = 0
            while index < schedule.num_steps:
                v = velocity(x.to(model_dtype), schedule.times[index], rows).float()
                if index == group.index:
                    stream = noise.streams(key.iteration, key.prompts, draws)[0]
                    eps = philox_normal(stream, x[0].numel(), key.seed).reshape(x.shape)
                    x = group.step.c_x * x + group.step.c_v * v + group.step.s * eps
                    index += schedule.merges[index]
                else:
                    x, index = x + schedule.ode(index, index + 1).c_v * v, index + 1
            pictures.append(x)
    return torch.cat(pictures)


def shapes_velocity(device):
    backbone = FluxBackbone.from_pretrained(str(PIPELINE), 32, 32, max_sequence_length=24, device=device)
    conditioning = backbone.encode(PROMPTS["held_out"].read_text().splitlines()[:1])
    model = backbone.transformer
    return (
        lambda latents, t, rows: backbone.velocity(model, latents, t, conditioning, rows),
        backbone.latent_shape,
        torch.float32,
    )


def flux_velocity(device, height=720):
    """FLUX.1-dev's own architecture with random bfloat16 weights and conditioning."""
    if device.type != "cuda" or torch.cuda.get_device_properties(device).total_memory < 40 * 2**30:
        raise SystemExit("error: --model flux needs a GPU of at least 40 GiB")
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model = FluxTransformer2DModel(guidance_embeds=True).eval()
    torch.set_default_dtype(torch.float32)
    side = height // 16
    ids = torch.zeros(side, side, 3, device=device)
    ids[..., 1], ids[..., 2] = torch.arange(side, device=device)[:, None], torch.arange(side, device=device)[None]
    text = torch.randn(1, 512, 4096, device=device, dtype=torch.bfloat16)
    pooled = torch.randn(1, 768, device=device, dtype=torch.bfloat16)

    def velocity(latents, t, rows):
        count = len(latents)
        return model(
            hidden_states=latents, timestep=torch.full((count,), t, device=device, dtype=latents.dtype),
            guidance=torch.full((count,), 3.5, device=device), pooled_projections=pooled[rows],
            encoder_hidden_states=text[rows], txt_ids=torch.zeros(512, 3, device=device), img_ids=ids.flatten(0, 1),
            return_dict=False,
        )[0]  # fmt: skip

    return velocity, (side * side, 64), torch.bfloat16


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("shapes", "flux"), default="shapes")
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds after one warm-up")
    parser.add_argument("--micro-batch", type=int, help="most rows of one model call; default: 8 for flux, else all")
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    velocity, shape, dtype = (flux_velocity if arguments.model == "flux" else shapes_velocity)(device)
    micro_batch = arguments.micro_batch or (8 if arguments.model == "flux" else None)
    plan = e_grpo(make_schedule(), [12] * 8, [1] * 8)
    key = NoiseKey(0, 0, torch.tensor([0], device=device))

    def wavefront(chosen):
        made = Wavefront(plan, 1, shape, chosen, device, model_dtype=dtype, micro_batch=micro_batch)
        return lambda counted: made.run(counted, key).final_latents[0]

    def apart(batch):
        return lambda counted: without_prefix(counted, plan, key, shape, device, dtype, batch)

    variants = {"alone": apart(1), "batched": apart(min(12, micro_batch or 12))}
    for backend in ops.BACKENDS:
        try:
            variants[f"wavefront, {backend}"] = wavefront(ops.choose(backend, device))
        except ValueError as reason:
            print(f"left out: {reason}")

    results = {name: {"seconds": []} for name in variants}
    pictures = {}
    for round_ in range(arguments.rounds + 1):
        for name, run in variants.items():
            counted = Counter(velocity)
            with PeakMemory(device) as memory:
                start = time.perf_counter()
                pictures[name] = run(counted)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = time.perf_counter() - start
            if round_:
                results[name]["seconds"].append(seconds)
            else:  # later rounds reuse what the allocator kept
                results[name] |= {"calls": counted.calls, "evaluations": counted.rows, "peak_mib": memory.mebibytes}
    for name in variants:
        difference = (pictures[name] - pictures["alone"]).abs().max().item()
        results[name]["largest_difference"] = difference
        assert dtype != torch.float32 or difference < 1e-2, f"{name} gives other pictures than alone: {difference}"

    where = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    print(f"\n{arguments.model}, {where}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'variant':<24}{'calls':>7}{'evaluations':>13}{'seconds (min to max)':>26}{'ratio':>8}{'peak MiB':>10}")
    for name, result in results.items():
        seconds = result["seconds"]
        result["ratio"] = statistics.median(a / b for a, b in zip(results["alone"]["seconds"], seconds))
        spread = f"{statistics.median(seconds):.3f} ({min(seconds):.3f} to {max(seconds):.3f})"
        print(
            f"{name:<24}{result['calls']:>7}{result['evaluations']:>13}{spread:>26}"
            f"{result['ratio']:>7.2f}x{result['peak_mib']:>10.1f}"
        )
    if arguments.json:
        with open(arguments.json, "w") as file:
            told = {"model": arguments.model, "device": where, "torch": torch.__version__, "variants": results}
            json.dump(told, file, indent=2)


if __name__ == "__main__":
    main()
