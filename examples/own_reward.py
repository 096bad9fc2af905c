"""Trains the embedded pipeline on a reward of one's own: bright images. About a minute on two CPU cores.

    python examples/own_reward.py
    deepspeed --num_gpus 2 examples/own_reward.py        # the same on several ranks

A reward is a function of images and prompts. It may do anything that gives a number for each image: a network, a
rule, a call of a service.
"""

import os

from egrpo_fast import Trainer


def brightness(images, prompts):
    """images [B, 3, H, W], float32 in [0, 1]; prompts: B strings. Returns [B], higher is better."""
    return images.mean((1, 2, 3))


def main(iterations=8, **settings):
    curve = []
    trainer = Trainer(
        "shapes",
        rewards={"brightness": brightness, "shapes_strict": 0.0},  # the second has no weight: it is only watched
        prompts={"per_iteration": int(os.environ.get("WORLD_SIZE", "1"))},  # one for each rank
        iterations=iterations,
        optimizer={"lr": 3e-4},
        evaluation={"every": 0},
        on_iteration=lambda done, metrics: curve.append(metrics["reward/brightness"]),
        **settings,
    )
    result = trainer.train()
    for name, before in result.before.items():
        print(f"{name}: {before:.3f} before, {result.after[name]:.3f} after {result.iterations} iterations")
    print("brightness of the training images, by iteration:", " ".join(f"{value:.3f}" for value in curve))
    print(f"trained pipeline: {result.pipeline}")
    return result


if __name__ == "__main__":
    main(output_dir="runs/own-reward")
