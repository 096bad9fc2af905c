"""The `egrpo` command: train, and what is beside training.

What takes seconds to import is imported where it is used: help and settings come at once.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from egrpo_fast import __version__
from egrpo_fast.commands import launch
from egrpo_fast.commands.cluster import GPUS, Cluster, default_gpus, parse_gpu
from egrpo_fast.commands.plan import describe, print_plan
from egrpo_fast.config import ConfigError, RewardConfig
from egrpo_fast.config.recipe_files import read_yaml, recipe_names
from egrpo_fast.config.reference import reference
from egrpo_fast.files import expanded, read_text
from egrpo_fast.shapes import prompts_path
from egrpo_fast.terminal import error_lines, keep_clean, steady_streams


def parse_rewards(given: Sequence[str]) -> list[RewardConfig]:
    """`NAME` or `NAME={option: value, ...}` (YAML) each, as a recipe's `rewards`."""
    rewards = []
    for text in given:
        name, _, options = text.partition("=")
        try:
            rewards.append(RewardConfig(name=name, options=read_yaml(options, "rewards") if options else {}))
        except (ConfigError, ValidationError):
            raise ValueError(f"rewards: {text!r} is neither NAME nor NAME={{option: value}}") from None
    return rewards


def _train(arguments: argparse.Namespace) -> None:
    launch.launch(arguments.recipe, arguments.overrides, vars(arguments))


def _plan(arguments: argparse.Namespace) -> None:
    from egrpo_fast.commands import cost
    from egrpo_fast.models.folder import with_times

    config = with_times(launch.load_checked(arguments.recipe, arguments.overrides))
    if arguments.plot and (arguments.plot.suffix != ".png" or not arguments.plot.resolve().parent.is_dir()):
        raise ValueError(f"--plot: {arguments.plot} is not the name of a .png file in a folder that exists")
    description = describe(config)
    gpus = arguments.gpus or default_gpus(config)
    name, gpu = parse_gpu(arguments.gpu)
    cluster = Cluster(gpus, arguments.nodes, name, arguments.utilisation, arguments.network * 1e9, gpu)
    description["cost"] = cost.describe(config, cluster)
    if arguments.json:
        print(json.dumps(description, indent=2))
    else:
        print_plan(description)
        print(f"\n{cost.report(description['cost'])}")
    if arguments.plot:
        from egrpo_fast.runs.plots import entropy_plot

        trained = tuple(step["step"] for step in description["steps"] if step["trained"])
        entropy_plot(
            arguments.plot, replace(config.build_schedule(), active=trained), config.schedule.entropy_threshold
        )


def _settings(arguments: argparse.Namespace) -> None:
    print(reference(), end="")


def _device(asked: str | None) -> str:
    import torch

    device = asked or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device: {device!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


SETTINGS = ("height", "width", "num_inference_steps", "guidance_scale", "shift", "max_sequence_length", "dtype", "seed")


TRUST = "let the run's own config.yaml name rewards that run Python code, or send images and a token to a server"


def _evaluate(arguments: argparse.Namespace) -> None:
    # Mistakes in what is quick to read are reported before the seconds that diffusers takes to import.
    from egrpo_fast.prompts.files import read_prompts

    rewards = parse_rewards(arguments.rewards or ())
    found = read_prompts(prompts_path(arguments.prompts, "held_out"), "--prompts", arguments.column)
    prompts = tuple(found[: arguments.num_prompts])

    try:
        from egrpo_fast.commands import evaluate
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install 'egrpo_fast[evaluation]'") from None

    models = evaluate.find_models(arguments.models)
    asked = {name: value for name in SETTINGS if (value := getattr(arguments, name)) is not None}
    settings = evaluate.Settings(prompts, **evaluate.default_settings(models[0]) | asked)
    rewards = rewards or evaluate.default_rewards(models, arguments.trust_run)
    device = _device(arguments.device)
    print(settings)
    message = evaluate.evaluate(
        models, settings, rewards, arguments.out, arguments.batch, device, arguments.part, arguments.page_prompts
    )
    whole = "table.md, scores.parquet, page.html, and the images in models/"
    print(f"\n{message}\n{arguments.out}: {whole if arguments.part is None else 'the images of this part in models/'}")


def _watch(arguments: argparse.Namespace) -> None:
    from egrpo_fast.commands.watch import PAGE, watch

    print(f"{arguments.run_folder / PAGE}: open it in a browser; it is drawn again while the run goes on")
    watch(arguments.run_folder, None if arguments.once else arguments.every)


def _serve(arguments: argparse.Namespace) -> None:
    try:
        from egrpo_fast.commands import serve_rewards
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed; pip install 'egrpo_fast[http]'") from None

    token = os.environ.get(serve_rewards.TOKEN_VARIABLE)
    if arguments.token_file:
        try:
            token = read_text(arguments.token_file, 1 << 16).strip()
        except OSError as error:
            raise ValueError(f"--token-file: cannot read {arguments.token_file}: {error.strerror}") from None
    serve_rewards.serve(
        parse_rewards(arguments.rewards), arguments.host, arguments.port, token, _device(arguments.device),
        arguments.batch,
    )  # fmt: skip


def _doctor(arguments: argparse.Namespace) -> None:
    from egrpo_fast.commands import doctor

    raise SystemExit(doctor.main(arguments.output_dir, arguments.json))


def _encode(arguments: argparse.Namespace) -> None:
    from egrpo_fast.commands import encode as encoding

    settings = encoding.default_settings(arguments.model)
    settings |= {name: value for name in settings if (value := getattr(arguments, name)) is not None}
    encoding.encode(
        arguments.prompts, arguments.out, arguments.model, quantization=arguments.quantization, batch=arguments.batch,
        column=arguments.column, device=_device(arguments.device), verify=arguments.verify,
        negative_prompt=arguments.negative_prompt,
        **settings,
    )  # fmt: skip


def _export(arguments: argparse.Namespace) -> None:
    from egrpo_fast.runs.export import export

    path, written = export(
        arguments.run_folder, arguments.out, arguments.weights, arguments.checkpoint, fuse=arguments.fuse
    )
    done = "" if written else "already there, whole, and left as it is: "
    print(f"{arguments.out}: {done}{arguments.weights} weights of {path}; README.md says how to load them")


def _fidelity(arguments: argparse.Namespace) -> None:
    from egrpo_fast.commands.fidelity import fidelity

    message = fidelity(
        arguments.recipe, arguments.overrides, arguments.tails or (), arguments.target, arguments.num_prompts,
        arguments.checkpoint, _device(arguments.device), arguments.json, arguments.trust_run,
    )  # fmt: skip
    print(f"\n{message}", end="")


def _shift(text: str) -> Any:
    return text if text == "auto" else _number(0.01, 100, float)(text)


def _number(least: float, most: float = 2**63 - 1, kind: type = int) -> Any:
    """For argparse: a number from `least` to `most`."""

    def read(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least:g} to {most:g}")
        return value

    return read


def _name(text: str) -> str:
    """For argparse: a path or the like, with `~` and variables filled in."""
    try:
        return expanded(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _model(text: str) -> str:
    """The same, of `[LABEL=]PATH`."""
    label, equals, path = text.partition("=")
    return f"{label}={_name(path)}" if equals and not os.path.exists(text) else _name(text)


def _path(text: str) -> Path:
    return Path(_name(text))


def _part(text: str) -> tuple[int, int]:
    part, slash, parts = text.partition("/")
    if not (slash and part.isdecimal() and parts.isdecimal() and int(part) < int(parts)):
        raise argparse.ArgumentTypeError(f"{text!r} is not I/N with I from 0 to N - 1")
    return int(part), int(parts)


def _recipe(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help=f"a YAML file, or one of: {', '.join(recipe_names())}")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="settings of the recipe to change")


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and by name those of the commands."""
    parser = argparse.ArgumentParser(prog="egrpo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--version", action="version", version=f"egrpo_fast {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    about = "train a recipe, by the deepspeed launcher, on the GPUs of this machine or of several"
    train = commands.add_parser("train", help=about, description=about)
    train.set_defaults(run=_train)
    _recipe(train)
    train.add_argument("--verbose", action="store_true", help="show also what DeepSpeed, torch and others print")
    options = train.add_argument_group("options of the deepspeed launcher")
    kinds = {"N": _number(0), "PORT": _number(1, 65535)}
    for name, (metavar, message) in launch.OPTIONS.items():
        options.add_argument(f"--{name}", metavar=metavar, type=kinds.get(metavar, str), help=message)
    for name, message in launch.FLAGS.items():
        options.add_argument(f"--{name}", action="store_true", help=message)

    plan = commands.add_parser("plan", help="print a recipe's schedule, rows, and estimated memory and time")
    plan.set_defaults(run=_plan)
    _recipe(plan)
    plan.add_argument("--json", action="store_true", help="for machines")
    plan.add_argument("--plot", type=_path, metavar="PNG", help="entropy by step and merge length, as an image")
    estimate = plan.add_argument_group("what the cost is estimated for")
    add = estimate.add_argument
    add("--gpus", type=_number(1, 65536), metavar="N", help="in all (as many, up to 8, as share the prompts evenly)")
    add("--nodes", type=_number(1, 65536), default=1, metavar="M", help="machines they are in (%(default)s)")
    add("--gpu", default="H100", metavar="NAME",
        help=f"{', '.join(GPUS)}, or one of your own by its numbers, as in 'L40S={{memory: 44, tflops: 362, "
        "bandwidth: 864, link: 32}' (GiB, dense bfloat16, GB/s, GB/s to the next GPU) (%(default)s)")  # fmt: skip
    add("--utilisation", type=_number(0.01, 1, float), default=0.4, metavar="SHARE",
        help="of the GPU's peak FLOP/s; an assumption (%(default)s)")  # fmt: skip
    add("--network", type=_number(0.1, 1e6, float), default=50.0, metavar="GB/S",
        help="per GPU and direction between machines; an assumption (%(default)g)")  # fmt: skip

    settings = commands.add_parser("settings", help="print every setting of a recipe: range, default, meaning")
    settings.set_defaults(run=_settings)

    about = "draw the same prompts from the same noise with several models, score them, compare with the first"
    evaluate = commands.add_parser("evaluate", help=about, description=about)
    evaluate.set_defaults(run=_evaluate)
    add = evaluate.add_argument
    add("models", nargs="+", type=_model, metavar="[LABEL=]MODEL",
        help="a run's folder, a diffusers folder, a hub id, or `shapes`; the first is the base")  # fmt: skip
    add("--prompts", required=True, type=_name, metavar="FILE",
        help="of any kind that `prompts.held_out` takes, or `shapes`")  # fmt: skip
    add("--column", default="prompt", metavar="NAME", help="field or column that holds the prompt (%(default)s)")
    add("--num-prompts", type=_number(1), metavar="N", help="only the first N of them")
    add("--rewards", nargs="+", action="extend", metavar="NAME[={...}]",
        help="with options as YAML; none given: the run's own and, but for Shapes, the paper's four")  # fmt: skip
    add("--trust-run", action="store_true", help=TRUST)
    add("--out", type=_path, default=Path("runs/evaluation"), metavar="DIR",
        help="continued where it already holds this evaluation (%(default)s)")  # fmt: skip
    about = "the defaults are for large models; a Shapes model has its own"
    protocol = evaluate.add_argument_group("how images are made", about)
    add = protocol.add_argument
    add("--height", type=_number(1, 8192), metavar="PIXELS", help="(1024)")
    add("--width", type=_number(1, 8192), metavar="PIXELS", help="(1024)")
    add("--num-inference-steps", type=_number(2, 1000), metavar="N", help="ODE steps (50)")
    add("--guidance-scale", type=_number(0, 1000, float), metavar="SCALE", help="(that of the model's pipeline)")
    add("--shift", type=_shift, metavar="S",
        help="time shift, or `auto`: the model's own scheduler (FLUX.1: 3, as in training; else auto)")  # fmt: skip
    add("--max-sequence-length", type=_number(1, 1024), metavar="N", help="tokens of the prompt (512)")
    add("--dtype", choices=("float32", "bfloat16"), help="(bfloat16)")
    add("--seed", type=_number(0), metavar="N", help="of the noise (0)")
    work = evaluate.add_argument_group("how the work is done", "changes no score beyond rounding")
    add = work.add_argument
    add("--batch", type=_number(1), metavar="N", help="images at a time (4; Shapes 64)")
    add("--device", help="(cuda where there is one, else cpu)")
    add("--part", type=_part, metavar="I/N", help="draw every N-th prompt from I on, and stop: N processes, N devices")
    add("--page-prompts", type=_number(0), default=64, metavar="N", help="prompts on the image page (%(default)s)")

    about = "run prompts through the text encoders once, into a folder for `prompts.embeddings`, or go on there"
    encode = commands.add_parser("encode", help=about, description=about)
    encode.set_defaults(run=_encode)
    add = encode.add_argument
    add("prompts", nargs="+", type=_name, metavar="PROMPTS", help="of any kind that `prompts.train` takes, or `shapes`")
    add("out", type=_path, metavar="OUT", help="folder of the embeddings")
    add("--model", required=True, type=_name, metavar="PATH",
        help="a diffusers pipeline's folder or hub id, or `shapes`")  # fmt: skip
    add("--max-sequence-length", type=_number(1, 1024), metavar="N", help="tokens of a prompt (512; shapes 24)")
    add("--dtype", choices=("float32", "bfloat16"), help="as `model.dtype` of the run (bfloat16; shapes float32)")
    add("--quantization", choices=("none", "int8", "nf4"), default="none",
        help="of the largest encoder, as `model.text_encoder_quantization` of the run (%(default)s)")  # fmt: skip
    add("--negative-prompt", default="", metavar="TEXT",
        help="`model.guidance.negative_prompt` of the run, where guidance is classifier-free (empty)")  # fmt: skip
    add("--column", default="prompt", metavar="NAME", help="field or column that holds the prompt (%(default)s)")
    add("--batch", type=_number(1), default=16, metavar="N", help="prompts at a time (%(default)s)")
    add("--device", help="(cuda where there is one, else cpu)")
    add("--verify", action="store_true", help="read all that is there already; what is damaged is made again")

    about = "write a run's checkpoint as a pipeline folder, or LoRA file, that diffusers loads; no GPU is needed"
    export = commands.add_parser("export", help=about, description=about)
    export.set_defaults(run=_export)
    add = export.add_argument
    add("run_folder", type=_path, metavar="RUN", help="the run's output_dir")
    add("out", type=_path, metavar="OUT", help="folder to write; must not exist, or be empty")
    add("--weights", choices=("model", "ema"), default="model", help="as trained, or their average (%(default)s)")
    add("--checkpoint", default="newest", metavar="WHICH", help="newest, best, or an iteration (%(default)s)")

    add("--fuse", action="store_true", help="write a LoRA run as a whole pipeline, the adapters in the base's weights")

    about = "draw a run as one page that grows: curves, alarms, best and worst training images, held-out grids"
    watch = commands.add_parser("watch", help=about, description=about)
    watch.set_defaults(run=_watch)
    add = watch.add_argument
    add("run_folder", type=_path, metavar="RUN", help="the run's output_dir; the page is its watch.html")
    add("--every", type=_number(1, 86400, float), default=30.0, metavar="SECONDS", help="(%(default)s)")
    add("--once", action="store_true", help="draw it once and end")

    about = "compare fast ODE tails with the exact one, by how they rank the samples of a group, and suggest one"
    fidelity = commands.add_parser("fidelity", help=about, description=about)
    fidelity.set_defaults(run=_fidelity)
    add = fidelity.add_argument
    add("recipe", type=_name, metavar="RUN_OR_RECIPE", help="a run's folder, whose checkpoint is measured, or a recipe")
    add("overrides", nargs="*", metavar="key.path=value", help="settings of it to change")
    add("--tails", nargs="+", action="extend", metavar="'SETTING ...'",
        help="to compare, such as 'tail.stride=3 tail.solver=dpm2m' (strides with solvers, TaylorSeer)")  # fmt: skip
    add("--target", type=_number(0.01, 0.9999, float), default=0.95, metavar="RHO",
        help="rank correlation within groups (%(default)s)")  # fmt: skip
    add("--num-prompts", type=_number(1), default=8, metavar="N", help="from the run's order (%(default)s)")
    add("--checkpoint", default="newest", metavar="WHICH", help="newest, best, or an iteration (%(default)s)")
    add("--trust-run", action="store_true", help=TRUST)
    add("--device", help="(cuda where there is one, else cpu)")
    add("--json", type=_path, metavar="FILE", help="write the figures there as well")

    about = "score images for trainers elsewhere, over HTTP (the reward `http`)"
    serve = commands.add_parser("serve-rewards", help=about, description=about)
    serve.set_defaults(run=_serve)
    add = serve.add_argument
    add("--rewards", nargs="+", required=True, metavar="NAME[={...}]", help="with options as YAML")
    add("--host", default="127.0.0.1", help="address to bind; beyond loopback a token is required (%(default)s)")
    add("--port", type=_number(1, 65535), default=8017, help="(%(default)s)")
    add("--token-file", type=_path, metavar="FILE", help="bearer token; else the variable EGRPO_REWARD_TOKEN")
    add("--device", help="(cuda where there is one, else cpu)")
    add("--batch", type=_number(1), default=32, metavar="N", help="images scored at a time (%(default)s)")

    about = "look at this installation and test it, in seconds; a report for bug reports, without secrets"
    doctor = commands.add_parser("doctor", help=about, description=f"{about}. Status 1 where something failed.")
    doctor.set_defaults(run=_doctor)
    doctor.add_argument("--json", action="store_true", help="for machines")
    doctor.add_argument("--output-dir", type=_path, default=Path("runs"), metavar="DIR",
                        help="where a run would write (%(default)s)")  # fmt: skip
    return parser, commands.choices


def parse(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of a command, its options before, between or after the others. Exits where they are wrong."""
    parser, commands = _parsers()
    if words and words[0] in commands:
        return commands[words[0]].parse_intermixed_args(words[1:])
    return parser.parse_args(words)


def main() -> None:
    steady_streams()
    keep_clean()
    arguments = parse(sys.argv[1:])
    try:
        arguments.run(arguments)
    except ValueError as error:
        raise SystemExit(error_lines(error)) from None
    except KeyboardInterrupt:
        continued = "interrupted; `egrpo evaluate` and `egrpo encode` continue when they are given the same again"
        raise SystemExit(continued) from None


if __name__ == "__main__":
    main()
