"""What a rung of the ladder is, and what it is handed."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from numba_fused.device.launch import GpuLauncher, Launcher
from numba_fused.spec import BlockSpec

Result = TypeVar("Result")


@functools.lru_cache(maxsize=4096)
def once(function: Callable[[BlockSpec], Result], spec: BlockSpec) -> Result:
    """``function(spec)``, worked out once for each spec: what a call repeats costs microseconds."""
    return function(spec)


@dataclass(frozen=True)
class Ledger:
    """What a rung should move through global memory, and in how many launches.

    Every pass over a tensor counts once: caches are trusted to serve the re-reads within a
    pass (a convolution's overlapping windows), and to keep nothing from one pass to the next.

    Attributes
    ----------
    bytes_read, bytes_written : int
    launches : int
    library_launches : int
        How many of them are PyTorch's own kernels, which the simulator does not run.
    """

    bytes_read: int
    bytes_written: int
    launches: int
    library_launches: int = 0

    @property
    def bytes_moved(self) -> int:
        """Bytes read plus bytes written."""
        return self.bytes_read + self.bytes_written


def gpu_launcher(device: torch.device) -> Launcher:
    """Launches on torch's current stream of the CUDA `device`."""
    index = device.index or 0
    # The handle alone: torch.cuda.current_stream makes an object around it, for two microseconds.
    return GpuLauncher(index, torch._C._cuda_getCurrentRawStream(index))


def vector_bytes(spec: BlockSpec) -> int:
    """Bytes of one per-channel vector: bias, gamma or beta."""
    return spec.out_channels * spec.itemsize


def seed_bytes(spec: BlockSpec) -> int:
    """Bytes of the seed: read only when dropout draws."""
    return 8 if spec.draws else 0


def convolution_bytes(spec: BlockSpec) -> int:
    """What a convolution reads: x, the weight and the bias."""
    weight = math.prod(spec.weight_shape) * spec.itemsize
    return spec.x_bytes + weight + vector_bytes(spec)


# The kernels index within a sample in 32 bits, and the last block of a sample looks beyond its end
# by less than 4096 values (the largest tile, rung 10's): that overshoot must not wrap either.
LARGEST_SAMPLE = 2**31 - 4096


def sample_limit(spec: BlockSpec) -> str | None:
    """Why kernels that index within a sample in 32 bits cannot run `spec`, or None."""
    values = max(math.prod(spec.x_shape[1:]), math.prod(spec.output_shape[1:]))
    if values <= LARGEST_SAMPLE:
        return None
    return (
        f"one sample has {values:,} values, and the kernels' 32-bit index within a sample allows "
        f"{LARGEST_SAMPLE:,}; use variant='torch'"
    )


class LaunchArguments:
    """What of the `Operands` depends on the spec alone."""

    def __init__(self, spec: BlockSpec) -> None:
        self.spec = spec
        self.output_size = spec.volume(spec.output_shape)[2:]
        self.group_count = spec.batch * spec.num_groups
        self.sample_size = spec.group_size * spec.num_groups
        self.real = np.float64 if spec.dtype == "float64" else np.float32

    @functools.cached_property
    def groups(self) -> tuple[np.int32, np.int32]:
        """(group_size, num_groups): fits only shapes that the kernels can run."""
        return np.int32(self.spec.group_size), np.int32(self.spec.num_groups)

    @functools.cached_property
    def geometry(self) -> tuple[tuple[np.int32, ...], ...]:
        """Shapes, stride, padding and dilation."""
        spec = self.spec
        tuples = (
            spec.volume(spec.x_shape),
            spec.volume(spec.weight_shape),
            self.output_size,
            spec.stride3,
            spec.padding3,
            spec.dilation3,
        )
        return tuple(tuple(map(np.int32, entries)) for entries in tuples)

    @functools.cached_property
    def bounds(self) -> tuple[Any, ...]:
        """(cap, min_value, max_value)."""
        return tuple(map(self.real, (self.spec.cap, self.spec.min_value, self.spec.max_value)))

    @functools.cached_property
    def dropout(self) -> tuple[Any, ...]:
        """(width, threshold, scale)."""
        spec = self.spec
        return self.output_size[2], spec.drop_threshold, self.real(spec.keep_scale)

    @functools.cached_property
    def eps(self) -> Any:
        """In the kernels' type."""
        return self.real(self.spec.eps)


@dataclass(eq=False)  # not frozen, which would take a microsecond more to construct
class Operands:
    """The tensors of one call, shaped for the kernels.

    Attributes
    ----------
    spec : BlockSpec
    x, weight : Tensor
        Flat and contiguous: of (N, C, D, H, W) and (K, C / groups, kd, kh, kw).
    bias, gamma, beta : Tensor
        (K,); zeros, ones, zeros where the caller has none.
    seed : Tensor
        (1,) int64; read only when the spec draws.
    statistics : Tensor
        Flat, of (2, N, G): takes mean and rstd of each group, if it is not empty and the rung
        is one that keeps them.
    out : Tensor
        Flat, K * D * H * W values a sample; the values of a (sample, group) are consecutive.
    threads_per_block : int
    """

    spec: BlockSpec
    x: Tensor
    weight: Tensor
    bias: Tensor
    gamma: Tensor
    beta: Tensor
    seed: Tensor
    statistics: Tensor
    out: Tensor
    threads_per_block: int
    _arguments: LaunchArguments = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._arguments = once(LaunchArguments, self.spec)

    @property
    def group_count(self) -> int:
        """(Sample, group) pairs: N * G."""
        return self._arguments.group_count

    @property
    def blocks(self) -> int:
        """Blocks it takes to give every output element a thread."""
        return -(-self.out.numel() // self.threads_per_block)

    @property
    def groups(self) -> tuple[np.int32, np.int32]:
        """(group_size, num_groups) in 32 bits, which saves the kernels' loops registers."""
        return self._arguments.groups

    @property
    def sample_size(self) -> int:
        """Output values of one sample."""
        return self._arguments.sample_size

    @property
    def output_size(self) -> tuple[int, ...]:
        """(D, H, W) of the output."""
        return self._arguments.output_size

    @property
    def geometry(self) -> tuple[tuple[np.int32, ...], ...]:
        """What `convolve_at` needs to find its taps; see `device.convolution`."""
        return self._arguments.geometry

    @property
    def bounds(self) -> tuple[Any, ...]:
        """(cap, min_value, max_value) in the kernels' type."""
        return self._arguments.bounds

    @property
    def dropout(self) -> tuple[Any, ...]:
        """The trailing arguments of `rng.dropout`: seed, width, threshold, scale."""
        return self.seed, *self._arguments.dropout

    @property
    def eps(self) -> Any:
        """eps in the kernels' type."""
        return self._arguments.eps

    @property
    def real(self) -> Callable[[float], Any]:
        """The kernels' floating type: an np.float32 argument keeps fp32 arithmetic fp32."""
        return self._arguments.real


@dataclass(frozen=True)
class Rung:
    """One rung: a module of the ladder with its number, name and idea.

    Attributes
    ----------
    number : int
        Its place on the ladder (DESIGN: 0 is the vendor, 1 the naive kernels ...).
    name : str
        What ``variant=`` takes.
    idea : str
        The first line of the module's docstring.
    module : module
        Holds `forward` and `ledger`; also `limit` if there are shapes it cannot run,
        `least_capability` if it needs more than any GPU has, and `keeps_statistics` if it can.
    takes_threads_per_block : bool
        Whether the block size is a free axis.
    """

    number: int
    name: str
    idea: str
    module: ModuleType
    takes_threads_per_block: bool

    def forward(self, launch: Launcher, operands: Operands) -> None:
        """Write the block's output into ``operands.out``."""
        self.module.forward(launch, operands)

    def ledger(self, spec: BlockSpec, threads_per_block: int = 256) -> Ledger:
        """Bytes and launches the rung should need for `spec`."""
        return self.module.ledger(spec, threads_per_block)

    def limit(self, spec: BlockSpec) -> str | None:
        """Why the rung cannot run `spec`, or None if it can."""
        limit = getattr(self.module, "limit", None)
        return once(limit, spec) if limit else None

    @property
    def keeps_statistics(self) -> bool:
        """Whether the rung writes the groups' mean and rstd where it is given memory for them."""
        return getattr(self.module, "keeps_statistics", False)

    @property
    def least_capability(self) -> tuple[int, int]:
        """The oldest compute capability whose instructions suffice."""
        return getattr(self.module, "least_capability", (0, 0))

    def obstacle(self, spec: BlockSpec, capability: tuple[int, int]) -> str | None:
        """As `limit`, on a GPU of this compute capability."""
        if capability < self.least_capability:
            needed, found = ("{}.{}".format(*c) for c in (self.least_capability, capability))
            return f"it needs compute capability {needed}, and this GPU has {found}"
        return self.limit(spec)
