"""FLUX's own layout on CPU ranks, end to end: load sharded, train, export, load into diffusers, draw the same images.

    python benchmarks/flux_layout.py --prompts FILE [--size small medium] [--ranks 2] [--iterations 3]

Per size: a folder with random weights in several shards (`egrpo_fast.models.random`); loaded under ZeRO-3 by
1, 2 and 4 ranks, with the memory it took; then trained by `deepspeed egrpo_fast/train.py flux-dev` on the prompts of
FILE, a prompt per rank and iteration, on the rewards `jpeg` and `clip` (embedded model); exported by `egrpo export`;
and images of `FluxPipeline.from_pretrained(export)` compared with those of the trainer, resumed from its checkpoint.
Writes benchmarks/results/flux-layout-cpu.json.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import diffusers
import psutil
import torch
import transformers
from diffusers import FluxPipeline
from safetensors.torch import load_file, save_file

from egrpo_fast import noise, ops
from egrpo_fast.config import CONFIG_FILE, load_config
from egrpo_fast.models.flux.backbone import FluxBackbone
from egrpo_fast.models.flux.text import FluxTextEncoder
from egrpo_fast.models.transformer import meta_transformer
from egrpo_fast.plan import ode_plan
from egrpo_fast.rollout import NoiseKey, Wavefront
from egrpo_fast.runs.provenance import commit
from egrpo_fast.schedule import make_schedule

ROOT = Path(__file__).parents[1]
MIB = 2**20
SHARDS = {"tiny": "400KB", "small": "4MB", "medium": "200MB"}
LORA = "model.lora={rank: 8, alpha: 16}"
RUNS = {
    "bfloat16": ["model.dtype=bfloat16", "optimizer.lr=1e-4"],
    "float32": ["model.dtype=float32", "optimizer.lr=1e-4"],
    "float32, LoRA, EMA": ["model.dtype=float32", "optimizer.lr=1e-3", LORA, "optimizer.ema_decay=0.9"],
}
IMAGE = ["model.height=64", "model.width=48", "model.max_sequence_length=32"]
SETTINGS = [
    *IMAGE, "schedule.num_steps=4", "schedule.active_steps=[0]", "rollout.group_size=2",
    "evaluation.num_inference_steps=4",
    "evaluation.num_prompts=2", "checkpoint.every=0", "rewards=[{name: jpeg}, {name: clip, options: {model: shapes}}]",
]  # fmt: skip


def ranks(count, *command):
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(count), "--master_port", "29517"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launcher, *map(str, command)], cwd=ROOT, env=environment, check=True)


class HostMemory:
    """Growth of this process's memory inside the block, in MiB: its peak as the kernel counts it, and the largest part
    seen of it that is no page of a file. Pages of weight files that were read count to the first, until the kernel
    wants them back."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self.start, self.peak_anonymous, self.running = self._now(), 0.0, True
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def _now(self):
        lines = (line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return {key: int(value.split()[0]) / 1024 for key, value in lines if key in ("VmHWM", "VmRSS", "RssAnon")}

    def _watch(self):
        while self.running:
            self.peak_anonymous = max(self.peak_anonymous, self._now()["RssAnon"])
            time.sleep(0.002)

    def __exit__(self, *_):
        self.running = False
        self.thread.join()
        end = self._now()
        self.peak = end["VmHWM"] - self.start["VmRSS"]
        self.anonymous = max(self.peak_anonymous, end["RssAnon"]) - self.start["RssAnon"]


def load_as_rank(folder, dtype, out):
    """On every rank: the transformer built partitioned and filled, and what that took."""
    from egrpo_fast.distributed.heartbeat import Heartbeat, group_store
    from egrpo_fast.distributed.loading import materialize
    from egrpo_fast.distributed.world import World

    config = load_config("flux-dev", [f"model.path={folder}", f"model.dtype={dtype}"])
    world = World()
    transformer, weights = meta_transformer(folder)
    largest = max(parameter.numel() for parameter in transformer.parameters())
    with Heartbeat(world.rank, world.size, group_store(), 600.0) as heart:
        world.gather(None)  # the transport's own buffers are there before
        start = time.perf_counter()
        with HostMemory() as memory:
            materialize(transformer, weights, config, world, heart)
        weights.files.close()
        size = getattr(torch, dtype).itemsize
        told = {
            "rank": world.rank,
            "seconds": time.perf_counter() - start,
            "partition_mib": sum(p.ds_tensor.numel() for p in transformer.parameters()) * size / MIB,
            "largest_shard_mib": weights.files.largest_file / MIB,
            "largest_parameter_mib": largest * size / MIB,
            "peak_mib": memory.peak,
            "peak_anonymous_mib": memory.anonymous,
        }
        every = world.gather(told)
        if world.is_main:
            out.write_text(json.dumps(every))
    world.close()


def draw_as_rank(run, out):
    """On every rank: the trainer, resumed from the run's checkpoint, and its held-out images."""
    from egrpo_fast.distributed.heartbeat import Heartbeat, group_store
    from egrpo_fast.distributed.world import World
    from egrpo_fast.train import check_inputs, make_trainer

    config = load_config(str(run / CONFIG_FILE), ["resume=true"])
    prompts = check_inputs(config)
    world = World()
    with Heartbeat(world.rank, world.size, group_store(), 600.0) as heart:
        images = make_trainer(config, world, heart, *prompts).evaluate().images
        if world.is_main:
            save_file({"images": images.contiguous()}, out)
    world.close()


def draw_by_diffusers(config, exported):
    """Held-out images of the exported folder: of the pipeline itself, and of its parts under our sampler, which like
    the trainer keeps latents in float32 between steps."""
    dtype, model = getattr(torch, config.model.dtype), config.model
    if model.lora:
        pipeline = FluxPipeline.from_pretrained(model.path, torch_dtype=dtype)
        pipeline.load_lora_weights(exported)
    else:
        pipeline = FluxPipeline.from_pretrained(exported, torch_dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    text = FluxTextEncoder(Path(model.path if model.lora else exported), model)
    guidance = FluxBackbone.guidance(Path(model.path), model)
    backbone = FluxBackbone(pipeline.transformer.eval(), pipeline.vae, text, model, guidance)
    steps = config.evaluation.num_inference_steps
    plan = ode_plan(make_schedule(steps, config.schedule.shift))
    wavefront = Wavefront(plan, 1, backbone.latent_shape, ops.choose("reference"), model_dtype=dtype)
    theirs, ours = [], []
    for place, prompt in enumerate(Path(config.prompts.held_out).read_text().splitlines()[:2]):
        number = torch.tensor([place])
        start = noise.initial_noise(config.seed, 0, number, backbone.latent_shape, step=noise.EVALUATION)
        theirs += pipeline(
            prompt, height=model.height, width=model.width, num_inference_steps=steps,
            guidance_scale=model.guidance_scale,
            max_sequence_length=model.max_sequence_length, latents=start.to(dtype), output_type="pt",
        ).images.float()  # fmt: skip
        conditioning = backbone.encode([prompt])
        rollout = wavefront.run(
            lambda latents, t, rows, c=conditioning: backbone.velocity(backbone.transformer, latents, t, c, rows),
            NoiseKey(config.seed, 0, number), noise.EVALUATION,
        )  # fmt: skip
        ours += backbone.decode(rollout.final_latents[:, 0])
    return torch.stack(theirs), torch.stack(ours)


def export(run, out, *options):
    """`egrpo export`: seconds, and the largest memory of the process that was seen."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "egrpo_fast.cli", "export", run, out, *options]
    with subprocess.Popen(command, cwd=ROOT) as process:
        watched, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            try:
                peak = max(peak, watched.memory_info().rss)
            except psutil.NoSuchProcess:
                break
            time.sleep(0.005)
    assert process.returncode == 0, "egrpo export failed"
    return {"seconds": time.perf_counter() - start, "peak_mib": peak / MIB}


def train(folder, run, arguments, overrides):
    shutil.rmtree(run, ignore_errors=True)
    inputs = [f"model.path={folder}", f"prompts.train={arguments.prompts}", f"prompts.held_out={arguments.prompts}"]
    ranks(
        arguments.ranks, "egrpo_fast/train.py", "flux-dev", *inputs, *SETTINGS, f"output_dir={run}",
        f"iterations={arguments.iterations}", f"prompts.per_iteration={arguments.ranks}", *overrides,
    )  # fmt: skip
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    iterations = [line for line in lines if "loss" in line]
    assert len(iterations) == arguments.iterations and all(line["skipped_steps"] == 0 for line in iterations)
    phases = ("rollout", "rewards", "update")
    return {
        "seconds_per_iteration": [sum(line[f"seconds/{phase}"] for phase in phases) for line in iterations],
        "grad_norm": [line["grad_norm"] for line in iterations],
        "log_ratio_before_update": max(line["log_ratio_before_update"] for line in iterations),
    }


def measure(size, name, folder, arguments):
    run = arguments.out / size / name.replace(", ", "-").lower()
    told = train(folder, run, arguments, RUNS[name])
    config = load_config(str(run / CONFIG_FILE))
    exported = run.with_name(f"{run.name}-exported")
    shutil.rmtree(exported, ignore_errors=True)
    told["export"] = export(run, exported)
    if config.optimizer.ema_decay is not None:
        average = run.with_name(f"{run.name}-ema")
        shutil.rmtree(average, ignore_errors=True)
        export(run, average, "--weights", "ema")
    file = arguments.out / size / "images.safetensors"
    ranks(arguments.ranks, __file__, "--draw", run, file)
    images = load_file(file)["images"]
    theirs, ours = draw_by_diffusers(config, exported)
    base = load_file(run / "base_images.safetensors")["images"]
    return told | {
        "pipeline_differs_by": (theirs - images).abs().max().item(),
        "its_parts_differ_by": (ours - images).abs().max().item(),
        "training_moved_images_by": (images - base).abs().max().item(),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, help="file with one prompt per line")
    parser.add_argument("--size", nargs="+", choices=SHARDS, default=["small", "medium"])
    parser.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--load-ranks", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "flux-layout")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "results" / "flux-layout-cpu.json")
    parser.add_argument("--load", nargs=3, help=argparse.SUPPRESS)  # FOLDER DTYPE OUT, on every rank
    parser.add_argument("--draw", nargs=2, type=Path, help=argparse.SUPPRESS)  # RUN OUT, on every rank
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the launcher adds it
    arguments = parser.parse_args()
    if arguments.load:
        folder, dtype, out = arguments.load
        return load_as_rank(Path(folder), dtype, Path(out))
    if arguments.draw:
        return draw_as_rank(*arguments.draw)
    if arguments.prompts is None:
        parser.error("--prompts: a file with one prompt per line is needed")

    results = json.loads(arguments.json.read_text())["sizes"] if arguments.json.exists() else {}
    for size in arguments.size:
        folder = arguments.out / size / "pipeline"
        shutil.rmtree(folder, ignore_errors=True)
        made = ["--size", size, "--shard-size", SHARDS[size], "--dtype", "bfloat16"]
        subprocess.run([sys.executable, "-m", "egrpo_fast.models.random", folder, *made], check=True)
        transformer, _ = meta_transformer(folder)
        found = results.setdefault(size, {"loading": {}, "runs": {}})
        found["parameters"] = transformer.num_parameters()
        file = arguments.out / size / "loading.json"
        for count in arguments.load_ranks:
            ranks(count, __file__, "--load", folder, "bfloat16", file)
            found["loading"][str(count)] = json.loads(file.read_text())
        for name in arguments.runs:
            found["runs"][name] = measure(size, name, folder, arguments)
        about = {
            "commit": commit(),
            "machine": f"{platform.machine()} CPU, {psutil.cpu_count()} cores, "
            f"{psutil.virtual_memory().total / 2**30:.0f} GiB, one thread per rank",
            "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
            "ranks": arguments.ranks,
            "settings": SETTINGS,
            "sizes": results,
        }
        arguments.json.write_text(json.dumps(about, indent=2) + "\n")

    for size, found in results.items():
        print(f"\n{size}: {found['parameters']:,} parameters, bfloat16\n{'':<10}{'':>9}{'partition':>11}{'+ shard':>9}"
              f"{'peak MiB':>10}{'anonymous':>11}")  # fmt: skip
        for count, every in found["loading"].items():
            for rank in every:
                bound = rank["partition_mib"] + rank["largest_shard_mib"]
                print(f"{rank['rank'] + 1:>4} of {count:<3}{rank['seconds']:>7.1f} s{rank['partition_mib']:>11.1f}"
                      f"{bound:>9.1f}{rank['peak_mib']:>10.1f}{rank['peak_anonymous_mib']:>11.1f}")  # fmt: skip
        for name, run in found["runs"].items():
            seconds = ", ".join(f"{value:.1f}" for value in run["seconds_per_iteration"])
            print(f"{name}: {seconds} s per iteration; export {run['export']['seconds']:.1f} s, peak "
                  f"{run['export']['peak_mib']:.0f} MiB; images differ by {run['pipeline_differs_by']:.1e} "
                  f"(its parts, our sampler: {run['its_parts_differ_by']:.1e})")  # fmt: skip


if __name__ == "__main__":
    main()
