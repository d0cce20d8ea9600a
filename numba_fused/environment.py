"""What is installed, what is missing, and what to do about it."""

from __future__ import annotations

import importlib
import platform
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numba_fused.results import driver_version, version

# Distributions whose version decides what works.
DISTRIBUTIONS = (
    "torch",
    "numba",
    "numba-cuda",
    "numpy",
    "llvmlite",
    "cuda-bindings",
    "cuda-core",
    "cuda-toolkit",
    "nvidia-nvvm",
    "nvidia-nvjitlink",
    "nvidia-cuda-nvcc",
    "nvidia-cuda-nvdisasm",
    "greenlet",
    "pandas",
    "matplotlib",
    "rich",
    "typer",
)
CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


@dataclass(frozen=True)
class Environment:
    """The state of this machine.

    Attributes
    ----------
    python : str
    gpu, driver : str
        Empty where there is none.
    compute_capability : str
    torch_cuda : str
        CUDA version torch was built for; empty for a CPU build.
    installed : dict
        Version of each of `DISTRIBUTIONS`; empty for one that is missing.
    tested : dict
        Versions in constraints.txt; empty outside a checkout.
    advice : list of str
        One line per thing that does not work, with what to do.
    """

    python: str
    gpu: str
    driver: str
    compute_capability: str
    torch_cuda: str
    installed: dict[str, str]
    tested: dict[str, str]
    advice: list[str] = field(default_factory=list)

    @property
    def mismatches(self) -> dict[str, tuple[str, str]]:
        """(Installed, tested) of every distribution that is installed in another version."""
        return {
            name: (self.installed[name], tested)
            for name, tested in self.tested.items()
            if self.installed.get(name) and _public(self.installed[name]) != tested
        }

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, for ``json.dumps``."""
        return {
            "python": self.python,
            "gpu": self.gpu,
            "driver": self.driver,
            "compute_capability": self.compute_capability,
            "torch_cuda": self.torch_cuda,
            "installed": self.installed,
            "tested": self.tested,
            "mismatches": {name: list(pair) for name, pair in self.mismatches.items()},
            "advice": self.advice,
        }


def inspect() -> Environment:
    """Look at this machine; imports torch and numba.cuda, launches nothing."""
    installed = {name: version(name) for name in DISTRIBUTIONS}
    driver = driver_version()
    gpu, capability, torch_cuda = _torch_gpu()
    return Environment(
        python=platform.python_version(),
        gpu=gpu,
        driver=driver,
        compute_capability=capability,
        torch_cuda=torch_cuda,
        installed=installed,
        tested=read_constraints(CONSTRAINTS),
        advice=advise(
            installed=installed,
            driver=driver,
            gpu=gpu,
            torch_cuda=torch_cuda,
            numba_cuda_problem=_numba_cuda_problem(),
            numba_sees_gpu=_numba_sees_gpu(),
            compiles=_numba_compiles(),
        ),
    )


def advise(
    *,
    installed: dict[str, str],
    driver: str,
    gpu: str,
    torch_cuda: str,
    numba_cuda_problem: str,
    numba_sees_gpu: bool,
    compiles: bool,
) -> list[str]:
    """What to do about what is missing or does not fit, most important first."""
    advice = []
    if numba_cuda_problem:
        advice.append(f"numba.cuda does not import ({numba_cuda_problem}): pip install numba-cuda")
    if not compiles:
        advice.append(
            "no CUDA compiler libraries: pip install 'numba_fused[cuda13]' (or [cuda12]); without "
            "them kernels run in the simulator but cannot be compiled"
        )
    if not driver:
        advice.append(
            "no NVIDIA driver answers (nvidia-smi): there is no GPU here, or its driver is not "
            "installed. Every kernel still runs in the simulator: demo, verify, explain and the "
            "tests work; bench needs a GPU"
        )
    elif not torch_cuda:
        advice.append(
            f"a GPU is here (driver {driver}) but torch is a CPU build: install one for CUDA from "
            f"https://pytorch.org/get-started/locally"
        )
    elif not gpu:
        advice.append(
            f"torch is built for CUDA {torch_cuda} but sees no GPU under driver {driver}: the "
            f"driver may be too old for it (CUDA 12 needs 525, CUDA 13 needs 580), or "
            f"CUDA_VISIBLE_DEVICES hides the GPU"
        )
    elif not numba_sees_gpu:
        advice.append("torch sees the GPU and numba.cuda does not: run python -m numba -s")
    runtime = installed.get("nvidia-nvvm", "")
    if torch_cuda and runtime and torch_cuda.partition(".")[0] != runtime.partition(".")[0]:
        major = torch_cuda.partition(".")[0]
        advice.append(
            f"torch is built for CUDA {torch_cuda}, numba's compiler is CUDA {runtime}: they can "
            f"work together, but pip install 'numba_fused[cuda{major}]' makes them agree"
        )
    if _numbers(installed.get("numpy", "")) >= (2, 5):
        advice.append(
            f"NumPy {installed['numpy']}: numba-cuda 0.30 imports three names it removed; "
            f"numba_fused puts them back. Import numba_fused before numba.cuda"
        )
    return advice


def _numba_compiles() -> bool:
    """Whether numba.cuda finds NVVM, wherever it was installed from: asked by compiling."""
    from numba import cuda, types

    try:
        cuda.compile_ptx(lambda: None, types.void(), cc=(8, 0))
    except Exception:  # whatever the missing library raises, the answer is no
        return False
    return True


def read_constraints(path: Path) -> dict[str, str]:
    """Pinned versions of a constraints file; empty if there is no such file."""
    if not path.exists():
        return {}
    pins = re.findall(r"^([\w.-]+)==([\w.]+)", path.read_text(), flags=re.MULTILINE)
    return dict(pins)


def _torch_gpu() -> tuple[str, str, str]:
    """GPU name, compute capability, and the CUDA version torch was built for."""
    import torch

    built = torch.version.cuda or ""
    if not torch.cuda.is_available():
        return "", "", built
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), f"{major}.{minor}", built


def _numba_cuda_problem() -> str:
    try:
        importlib.import_module("numba.cuda")
    except Exception as problem:  # whatever it is, it goes into the report
        return f"{type(problem).__name__}: {problem}"
    return ""


def _numba_sees_gpu() -> bool:
    try:
        return importlib.import_module("numba.cuda").is_available()
    except Exception:
        return False


def _public(installed: str) -> str:
    """A version without its local part: 2.13.0+cpu is 2.13.0."""
    return installed.partition("+")[0]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])
