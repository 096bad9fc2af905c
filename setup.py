"""The mapped layout, and the build of the extension in `csrc/`. Everything else: pyproject.toml.

The folders of `kernels/` are imported as `egrpo_fast.kernels.*`. The extension is one library on PyTorch's stable ABI,
`kernels/extension/_C.abi3.so`, for every Python >= 3.11 and torch >= 2.10. EGRPO_BUILD says what to build:

- auto (default): CUDA where nvcc and torch are of one CUDA major version, else CPU, else (no C++ compiler) nothing
- cuda, cpu: that, or an error; none: nothing

Only a tool that is absent or does not fit changes what `auto` builds: a compilation that fails is an error.
EGRPO_SANITIZE=1 adds AddressSanitizer and UndefinedBehaviorSanitizer to a CPU build. Tools: CXX (or c++),
CUDA_HOME/bin/nvcc (or nvcc).
"""

import os
import re
import runpy
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

BUILDS = ("auto", "cuda", "cpu", "none")
BUILD = os.environ.get("EGRPO_BUILD", "auto")
SANITIZE = os.environ.get("EGRPO_SANITIZE") == "1"

MINIMUM_TORCH = (2, 10)
ARCHITECTURES = ("80", "90", "100")
"""Compute capabilities with machine code, as far as nvcc knows them; the last one's PTX serves whatever is newer."""

# No fused multiply-add on either side (csrc/philox.h); errno and traps would keep sqrt and selections out of vectors.
CXX_FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra",
             "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]  # fmt: skip
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-warn-spills"]
SANITIZE_FLAGS = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]


class Tools:
    """What this machine can build with. Anything missing is None, and said only where it is needed."""

    @cached_property
    def torch(self) -> Path:
        # Found, not imported: its folder and version are all that a stable-ABI build needs.
        spec = find_spec("torch")
        if spec is None or spec.origin is None:
            raise SetupError("install torch first, then `pip install --no-build-isolation -e .`")
        root = Path(spec.origin).parent
        if tuple(map(int, self._version(root)["__version__"].split(".")[:2])) < MINIMUM_TORCH:
            raise SetupError(f"torch {self._version(root)['__version__']} is too old: 2.10 or later")
        return root

    @staticmethod
    def _version(root: Path) -> dict:
        return runpy.run_path(str(root / "version.py"))

    @cached_property
    def torch_cuda(self) -> str | None:
        return self._version(self.torch)["cuda"]

    @cached_property
    def cxx(self) -> str | None:
        return os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")

    @cached_property
    def nvcc(self) -> str | None:
        home = os.environ.get("CUDA_HOME")
        return shutil.which(str(Path(home, "bin", "nvcc"))) if home else shutil.which("nvcc")

    @cached_property
    def architectures(self) -> list[str]:
        known = subprocess.check_output([self.nvcc, "--list-gpu-arch"], text=True).split()
        return [arch for arch in ARCHITECTURES if f"compute_{arch}" in known]

    def refusal(self, build: str) -> str | None:
        """Why this build is not possible here; None: it is."""
        if build == "none":
            return None
        if not sys.platform.startswith("linux"):
            return f"the extension builds on Linux, not on {sys.platform}"
        if self.cxx is None:
            return "no C++ compiler (CXX, c++ or g++)"
        if build == "cpu":
            return None
        if self.nvcc is None:
            return "no nvcc (CUDA_HOME/bin or PATH)"
        if self.torch_cuda is None:
            return "this torch is built without CUDA"
        told = subprocess.check_output([self.nvcc, "--version"], text=True)
        version = re.search(r"release (\d+)\.", told)
        if version is None or version[1] != self.torch_cuda.split(".")[0]:
            release = version[1] if version else "?"
            return f"{self.nvcc} is CUDA {release}, torch is built with {self.torch_cuda}: CUDA_HOME names a toolkit"
        return None

    def choose(self, asked: str) -> str:
        """cuda, cpu or none; prints which and why."""
        if asked not in BUILDS:
            raise SetupError(f"EGRPO_BUILD={asked}: allowed are {', '.join(BUILDS)}")
        if asked != "auto":
            if refusal := self.refusal(asked):
                raise SetupError(f"EGRPO_BUILD={asked}: {refusal}")
            print(f"egrpo_fast extension: {asked}, as asked")
            return asked
        reasons = []
        for build in ("cuda", "cpu"):
            if (refusal := self.refusal(build)) is None:
                break
            reasons.append(refusal)
        else:
            build = "none"
        print(f"egrpo_fast extension: {build}" + (f"; {reasons[-1]}" if reasons else ""))
        return build


class BuildLibrary(build_ext):
    """Compiles every source on its own, at the same time, and links one library."""

    def run(self) -> None:
        self.tools = Tools()
        self.choice = self.tools.choose(BUILD)
        if self.choice == "none":
            self.extensions = []
        super().run()

    def build_extension(self, ext: Extension) -> None:
        tools, cuda = self.tools, self.choice == "cuda"
        if SANITIZE and cuda:
            raise SetupError("EGRPO_SANITIZE=1 needs EGRPO_BUILD=cpu")
        sanitize = SANITIZE_FLAGS if SANITIZE else []
        torch = tools.torch
        temporary = Path(self.build_temp, self.choice)
        temporary.mkdir(parents=True, exist_ok=True)
        defines = ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(["-DUSE_CUDA"] if cuda else [])]
        cxx = [tools.cxx, *CXX_FLAGS, *sanitize, *defines, "-isystem", str(torch / "include")]
        newest = tools.architectures[-1] if cuda else ""
        nvcc = [tools.nvcc, *NVCC_FLAGS] + [
            f"-gencode=arch=compute_{arch},code=[sm_{arch}{f',compute_{arch}' if arch == newest else ''}]"
            for arch in (tools.architectures if cuda else [])
        ]

        sources = [Path(source) for source in ext.sources if cuda or not source.endswith(".cu")]
        objects = {source: str(temporary / f"{source.stem}.o") for source in sources}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = ([*(nvcc if s.suffix == ".cu" else cxx), "-c", str(s), "-o", o] for s, o in objects.items())
            list(pool.map(self._call, commands))

        library = Path(self.get_ext_fullpath(ext.name))
        library.parent.mkdir(parents=True, exist_ok=True)
        # torch is imported before the library is loaded, so its own copies of these serve: no run path.
        link = [tools.nvcc, "-cudart=shared"] if cuda else [tools.cxx, *sanitize]
        libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", *(["-ltorch_cuda"] if cuda else [])]
        self._call([*link, "-shared", "-o", str(library), *objects.values(), *libraries])

    @staticmethod
    def _call(command: list[str]) -> None:
        print(" ".join(command), flush=True)
        if subprocess.call(command) != 0:
            tool = Path(command[0]).name
            raise CompileError(f"{tool} failed (above); EGRPO_BUILD=cpu or none does without")


BACKENDS = {f"egrpo_fast.kernels.{name}": f"kernels/{name}" for name in find_packages("kernels")}

setup(
    # Folders of data, such as the embedded pipeline, count as packages: setuptools warns about each that is none.
    packages=[*find_namespace_packages(include=["egrpo_fast", "egrpo_fast.*"], exclude=["*.__pycache__"]), *BACKENDS],
    package_dir={"egrpo_fast": "egrpo_fast", **BACKENDS},
    ext_modules=[
        Extension(
            "egrpo_fast.kernels.extension._C",
            sources=["csrc/library.cpp", "csrc/branch_rows_cpu.cpp", "csrc/branch_rows_cuda.cu"],
            depends=sorted(map(str, Path("csrc").glob("*.*h"))),
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
