"""`egrpo doctor`: what a bug report needs, without secrets, and a self test of seconds; every line says what to do."""

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

import psutil  # DeepSpeed's and accelerate's too
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.collect_env import get_env_info

from egrpo_fast import __version__, ops
from egrpo_fast.kernels import extension, triton
from egrpo_fast.methods.e_grpo import e_grpo
from egrpo_fast.noise import draw_word, streams
from egrpo_fast.rollout import NoiseKey, Wavefront
from egrpo_fast.runs.provenance import commit
from egrpo_fast.schedule import make_schedule
from egrpo_fast.terminal import printable

OK, WARNING, FAILED = "ok", "warning", "FAILED"
GIB = 2**30
CACHE_GIB, EXPORT_GIB = 40, 30
"""What a model of 12 billion parameters takes: its download, and one pipeline written in bfloat16."""
CHILD_SECONDS = 300.0
"""After which a child process of the self test counts as hung."""

OPTIONAL = ("bitsandbytes", "flash-attn", "peft", "triton")
"""Looked at even where the installed metadata does not list them."""

COLLECTED = (
    "os", "libc_version", "python_version", "torch_version", "cuda_compiled_version", "cuda_runtime_version",
    "cudnn_version", "nvidia_driver_version", "nvidia_gpu_models",
)  # fmt: skip
"""What is shown of torch's own report, `python -m torch.utils.collect_env`."""
SECRET_NAME = re.compile("TOKEN|SECRET|KEY|PASS|CREDENTIAL|AUTH|COOKIE", re.IGNORECASE)
CREDENTIALS = re.compile(r"(?<=://)\S+(?=@)")
SECRET_SHAPE = re.compile(r"\b(hf_|ghp_|github_pat_|glpat-|sk-|AKIA|eyJ)[\w.-]{12,}")


@dataclass(frozen=True)
class Finding:
    """One line of the report. remedy: what to do where the verdict is not ok."""

    section: str
    name: str
    verdict: str
    value: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"  {self.verdict:<7}  {self.name}: {self.value}" + (
            f"\n             -> {self.remedy}" * bool(self.remedy)
        )


def judged(section: str, name: str, trouble: bool, value: str, remedy: str, verdict: str = WARNING) -> Finding:
    """`verdict`, with its remedy, where there is trouble; else ok."""
    return Finding(section, name, verdict, value, remedy) if trouble else Finding(section, name, OK, value)


def scrubber(environment: Mapping[str, str]) -> Callable[[str], str]:
    """A function that takes secrets, the environment's and whatever has the shape of one, and the home folder out.

    The report is made without looking at secrets; this holds where an error's message or a path carries one along.
    """
    secrets = {value for name, value in environment.items() if SECRET_NAME.search(name) and len(value) >= 6}
    for credentials in CREDENTIALS.findall("\n".join(environment.values())):
        secrets |= {part for part in credentials.split(":") if len(part) >= 6}
    home = os.path.expanduser("~")

    def scrub(text: str) -> str:
        for secret in sorted(secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        text = SECRET_SHAPE.sub("***", CREDENTIALS.sub("***", text))
        return text if len(home) < 2 else text.replace(home, "~")

    return scrub


def package() -> Iterator[Finding]:
    yield Finding("package", "egrpo_fast", OK, __version__)
    yield Finding("package", "commit", OK, commit() or "not run from a git checkout")
    folder = Path(__file__).parents[1]
    yield Finding("package", "folder", OK, str(folder))


def machine() -> Iterator[Finding]:
    found = get_env_info()._asdict()
    for name in COLLECTED:
        if found.get(name) not in (None, "N/A", "Could not collect"):
            yield Finding("machine", name, OK, str(found[name]))
    if match := re.search("Model name: *(.+)", found["cpu_info"] or ""):
        yield Finding("machine", "cpu", OK, f"{match[1]}, {len(os.sched_getaffinity(0))} cores for this process")
    free = psutil.virtual_memory().available / GIB
    message = f"{free:.1f} GiB free"
    with contextlib.suppress(OSError, ValueError):
        message += f"; the container may use {int(Path('/sys/fs/cgroup/memory.max').read_text()) / GIB:.1f}"
    yield judged("machine", "memory", free < 4, message, "a rank of the embedded recipe takes about 2 GiB: free some")
    shared = shutil.disk_usage("/dev/shm").total / GIB
    remedy = "NCCL and workers share it: docker run --shm-size=8g"
    yield judged("machine", "/dev/shm", shared < 1, f"{shared:.2f} GiB", remedy)
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        message = f"{gpu.name}, {gpu.total_memory / GIB:.0f} GiB, compute capability {gpu.major}.{gpu.minor}"
        old = (gpu.major, gpu.minor) < (8, 0)
        yield judged("machine", f"gpu {index}", old, message, "kernels and bfloat16 need 8.0 or later (A100)")
    remedy = "the embedded recipe runs on the CPU. Large models need a GPU, a CUDA build of torch and a driver as new"
    yield judged("machine", "gpus", not torch.cuda.is_available(), f"{torch.cuda.device_count()} for torch", remedy)


def dependencies() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    listed = [Requirement(text) for text in metadata.requires("egrpo_fast") or []]
    unlisted = set(OPTIONAL) - {requirement.name for requirement in listed}
    for requirement in [*listed, *(Requirement(f"{name}; extra == 'none'") for name in sorted(unlisted))]:
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", str(requirement.marker))
        if (extra and extra[1] == "dev") or requirement.name == "egrpo_fast":
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        install = f"pip install '{requirement.name}{requirement.specifier}'"
        if version is None and extra:
            yield Finding("dependencies", requirement.name, OK, f"not installed; optional, {install}")
        elif version is None:
            yield Finding("dependencies", requirement.name, FAILED, "not installed", install)
        else:
            fits = requirement.specifier.contains(version, prereleases=True)
            wants = "" if fits else f", {requirement.specifier} is needed"
            yield judged("dependencies", requirement.name, not fits, version + wants, install, FAILED)


def kernels() -> Iterator[Finding]:
    missing = _unavailable(extension, "cpu")
    built = f"{extension.LIBRARY} loads" if missing is None else missing
    remedy = "everything runs without it, slower; build it: pip install --no-build-isolation -e ."
    yield judged("kernels", "extension", missing is not None, built, remedy)
    if torch.cuda.is_available():
        lacking = _unavailable(extension, "cuda")
        remedy = "install the CUDA toolkit of torch's version, then pip install --no-build-isolation -e ."
        yield judged("kernels", "extension on CUDA", lacking is not None, lacking or "built", remedy)
    for device in _devices():
        reason = _unavailable(triton, device)
        trouble = reason is not None and device == "cuda"
        yield judged("kernels", f"triton on {device}", trouble, reason or "usable", "pip install triton (Linux)")
        with _without_warnings():
            chosen = ops.choose("auto", device).chosen
        yield Finding("kernels", f"auto on {device}", OK, ", ".join(f"{op}: {name}" for op, name in chosen.items()))


def _devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def _unavailable(backend: ModuleType, device: str) -> str | None:
    with _without_warnings():
        return backend.unavailable(torch.device(device))


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """A missing extension warns once; here the report tells it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def storage(output_dir: Path) -> Iterator[Finding]:
    from huggingface_hub import constants, get_token

    for name, folder, needed in (
        ("output folder", output_dir, EXPORT_GIB),
        ("hub cache", Path(constants.HF_HUB_CACHE), CACHE_GIB),
    ):
        there = _existing(folder)
        free = shutil.disk_usage(there).free / GIB
        remedy = f"a model of 12 billion parameters takes about {needed} GiB here; the embedded recipe 1"
        yield judged("storage", name, free < needed, f"{folder}, {free:.1f} GiB free", remedy)
    message = "there is one" if get_token() else "none; gated models need one: hf auth login"
    yield Finding("storage", "hub token", OK, message)


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


IMPORTS = "import egrpo_fast.policy, egrpo_fast.distributed.engine, egrpo_fast.rewards"
COLLECTIVE = """
import torch, torch.distributed as dist
dist.init_process_group("{backend}", store=dist.HashStore(), rank=0, world_size=1)
ones = torch.ones(3, device="{device}")
dist.all_reduce(ones)
assert ones.sum() == 3
dist.destroy_process_group()
"""


def self_test(output_dir: Path) -> Iterator[Finding]:
    """What a run relies on, in small. Child processes start first and are asked last: they run meanwhile."""
    children = [Child("imports", IMPORTS, "install again: pip install --no-build-isolation -e .")]
    remedy = "the host's name must resolve: see /etc/hosts, or set GLOO_SOCKET_IFNAME=lo"
    children.append(Child("gloo, one rank", COLLECTIVE.format(backend="gloo", device="cpu"), remedy))
    if torch.cuda.is_available() and dist.is_nccl_available():
        code = COLLECTIVE.format(backend="nccl", device="cuda")
        children.append(Child("nccl, one rank", code, "run it again with NCCL_DEBUG=INFO; driver and torch must match"))
    try:
        for device in _devices():
            for backend in ops.BACKENDS[1:]:
                yield from guarded("self test", check_ops, backend, device)
            yield from guarded("self test", check_rollout, device)
        yield from guarded("self test", check_writing, output_dir)
        for child in children:
            yield child.finding()
    finally:
        for child in children:
            child.end()


class Child:
    """Python code in a process of its own, which may crash or hang."""

    def __init__(self, name: str, code: str, remedy: str):
        self.name, self.remedy = name, remedy
        self._process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            text=True, errors="replace",
        )  # fmt: skip

    def finding(self) -> Finding:
        try:
            _, errors = self._process.communicate(timeout=CHILD_SECONDS)
        except subprocess.TimeoutExpired:
            return Finding("self test", self.name, FAILED, f"no answer within {CHILD_SECONDS:g} s", self.remedy)
        code = self._process.returncode
        message = f"status {code}: {(errors.strip().splitlines() or ['no message'])[-1]}" if code else "works"
        return judged("self test", self.name, code != 0, message, self.remedy, FAILED)

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()


def check_ops(backend: str, device: str) -> Iterator[Finding]:
    if _unavailable(import_module(f"egrpo_fast.kernels.{backend}"), device) is not None:
        return  # `kernels` says so
    chosen, truth = ops.choose(backend, device), ops.choose("reference", device)
    found, expected = _op_results(chosen, device), _op_results(truth, device)
    own = [op for op, name in chosen.chosen.items() if name == backend]
    wrong = [op for op in own if not torch.allclose(found[op], expected[op], rtol=1e-4, atol=1e-5)]
    message = f"{', '.join(wrong)}: not as the reference" if wrong else f"{', '.join(own)}: as the reference"
    remedy = "build the extension again with this torch, or train with rollout.backend=reference; please report it"
    yield judged("self test", f"ops, {backend} on {device}", bool(wrong), message, remedy, FAILED)


def _op_results(chosen: ops.Ops, device: str) -> dict[str, Tensor]:
    """Every op on a small case, the same whatever the backend."""
    rows, size, samples, seed = 4, 37, 3, 2**40 + 1
    generator = torch.Generator().manual_seed(0)
    x, v, w = (torch.randn(rows, size, generator=generator).to(device) for _ in range(3))
    coefficients = torch.tensor([(0.9, -0.2, 0.7)] * rows, device=device)
    draws = torch.tensor([draw_word(2, sample) for sample in range(samples)], device=device)
    words = streams(5, torch.arange(rows, device=device), draws)
    rewards = torch.randn(2, 1, rows, samples, generator=generator).to(device)
    sample, _ = chosen.sde_step(x, v, coefficients, words[:, 0].contiguous(), seed)
    log_ratio = chosen.replay_log_ratio(v + 0.01 * w, v, coefficients, words, seed)
    return {
        "sde_step": sample,
        "replay_log_ratio": log_ratio,
        "gaussian_log_prob": chosen.gaussian_log_prob(sample, x, w, coefficients),
        "group_advantage_clip_loss": chosen.group_advantage_clip_loss(
            rewards, log_ratio[None], torch.ones(2, device=device), "advantage", 1e-4, 5.0
        )[1],
        "branch_rows": _small_rollout(chosen, device, torch.float32),
    }


def _small_rollout(chosen: ops.Ops, device: str, dtype: torch.dtype) -> Tensor:
    """Images of 2 prompts under the velocity of Gaussian data, N(1, 1 / 4): a closed form in place of a model."""

    def velocity(x: Tensor, t: float, rows: Tensor) -> Tensor:
        return (t - (1 - t) / 4) / ((1 - t) ** 2 / 4 + t**2) * (x - (1 - t)) - 1

    plan = e_grpo(make_schedule(8, active_steps=[0, 2]), [4, 3], [1, 2])
    wavefront = Wavefront(plan, 2, (6, 8), chosen, device, dtype, dtype)
    return wavefront.run(velocity, NoiseKey(1, 0, torch.tensor([3, 8], device=device))).final_latents


def check_rollout(device: str) -> Iterator[Finding]:
    with _without_warnings():
        images = _small_rollout(ops.choose("auto", device), device, torch.float32)
    truth = _small_rollout(ops.choose("reference", device), device, torch.float64)
    error = (images - truth).abs().max().item()
    message = f"largest error against float64 {error:.1e}"
    remedy = "a wrong sampler trains nothing: compare rollout.backend=reference, and please report it"
    yield judged("self test", f"rollout on {device}", not error < 1e-4, message, remedy, FAILED)


def check_writing(output_dir: Path) -> Iterator[Finding]:
    there = _existing(output_dir)
    content = os.urandom(2**16)
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".egrpo-doctor-") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            same = Path(file.name).read_bytes() == content
        message = f"{there}: " + ("written and read back" if same else "read back other bytes than were written")
    except OSError as error:
        same, message = False, f"{there}: {error.strerror}"
    remedy = "choose another output_dir that can be written"
    yield judged("self test", "output folder", not same, message, remedy, FAILED)


def guarded(section: str, look: Callable[..., Iterable[Finding]], *arguments: object) -> Iterator[Finding]:
    """What `look` finds; should it fail itself, that is a finding too: a doctor is called where things are broken."""
    try:
        yield from look(*arguments)
    except Exception as error:
        name = look.__name__.strip("_").replace("_", " ")
        yield Finding(section, name, FAILED, f"{type(error).__name__}: {error}", "please report it with this text")


def examine(output_dir: Path) -> Iterator[Finding]:
    """All findings, scrubbed, as they come."""
    scrub = scrubber(os.environ)
    looks: list[tuple[Callable[..., Iterable[Finding]], tuple[object, ...]]] = [
        (package, ()), (machine, ()), (dependencies, ()), (kernels, ()), (storage, (output_dir,)),
        (self_test, (output_dir,)),
    ]  # fmt: skip
    for look, arguments in looks:
        for finding in guarded(look.__name__.replace("_", " "), look, *arguments):
            yield replace(
                finding, value=printable(" ".join(scrub(finding.value).split())), remedy=scrub(finding.remedy)
            )


def main(output_dir: Path, as_json: bool) -> int:
    """Print the report; 1 where something failed, else 0."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    start, findings, section = time.monotonic(), [], ""
    for finding in examine(output_dir):
        findings.append(finding)
        if as_json:
            continue
        if finding.section != section:
            section = finding.section
            print(section)
        print(finding, flush=True)
    count = {verdict: sum(finding.verdict == verdict for finding in findings) for verdict in (OK, WARNING, FAILED)}
    seconds = time.monotonic() - start
    if as_json:
        print(
            json.dumps({"findings": [asdict(finding) for finding in findings], **count, "seconds": seconds}, indent=2)
        )
    else:
        message = ", ".join(f"{number} {verdict}" for verdict, number in count.items())
        print(f"{message}; {seconds:.1f} s. No secrets above: paste it as it is.")
    return int(count[FAILED] > 0)
