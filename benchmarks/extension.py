"""`branch_rows` of the extension against the reference path, at FLUX-size rows: seconds, bytes per second, ratio.

    python benchmarks/extension.py                  on the CPU, with the threads PyTorch uses
    python benchmarks/extension.py --device cuda    device events

Three waves of the paper's plan (16 steps, 8 active, 12 samples): the first (one anchor parts into 12 samples), the
last active one (12 samples part, others go on), and the last (96 rows, no noise); velocity and the model's copy in
bfloat16. The two take turns, round by round; times and ratios are medians of their rounds. Bytes are the least that any
implementation moves: x and v read once per source, x' and its copy written once per edge.
"""

import argparse
import statistics
import time

import torch

from egrpo_fast.methods.e_grpo import e_grpo
from egrpo_fast.ops import choose
from egrpo_fast.schedule import make_schedule

TOKENS = {"720x720": 2025, "1024x1024": 4096}
CHANNELS = 64


def waves():
    """The plan, and name -> index of the waves that are timed."""
    schedule = make_schedule()
    plan = e_grpo(schedule, (12,) * len(schedule.active), (1,) * len(schedule.active))
    return plan, {"first": 0, "active": schedule.active[-1], "last": len(plan.waves) - 1}


def seconds(call, device):
    if device == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(2_000_000)  # the host gets ahead, so that its launch is not in the time
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    device = options.device
    backends = {name: choose(name, device).branch_rows for name in ("extension", "reference")}
    plan, indices = waves()
    tables = plan.tables(1, device, torch.float32)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}")
    print(f"{'image':>10} {'wave':>8} {'sources':>7} {'edges':>5} {'noisy':>5} "
          f"{'extension ms':>12} {'reference ms':>12} {'GB/s':>6} {'ratio':>6}")  # fmt: skip
    for image, tokens in TOKENS.items():
        for wave, index in indices.items():
            table = tables[index]
            latents = torch.randn(plan.num_rows, tokens, CHANNELS, device=device)
            velocity = torch.randn(len(table.sources), tokens, CHANNELS, device=device).bfloat16()
            arguments = (
                latents, latents.bfloat16(), velocity, table.sources, table.offsets, table.destinations,
                table.coefficients, table.draws, table.slots, torch.zeros(1, dtype=torch.int64, device=device), 0, 0,
            )  # fmt: skip
            times = {name: [] for name in backends}
            for warm in (True, *[False] * options.rounds):
                for name, op in backends.items():
                    taken = seconds(lambda op=op, arguments=arguments: op(*arguments), device)
                    if not warm:
                        times[name].append(taken)
            ours, theirs = (statistics.median(times[name]) for name in ("extension", "reference"))
            ratio = statistics.median(r / e for e, r in zip(times["extension"], times["reference"]))
            moved = 6 * tokens * CHANNELS * (len(table.sources) + len(table.destinations))
            noisy = int((table.coefficients[:, 2] > 0).sum())
            print(f"{image:>10} {wave:>8} {len(table.sources):>7} {len(table.destinations):>5} {noisy:>5} "
                  f"{ours * 1e3:>12.2f} {theirs * 1e3:>12.2f} {moved / ours * 1e-9:>6.1f} {ratio:>6.1f}")  # fmt: skip


if __name__ == "__main__":
    main()
