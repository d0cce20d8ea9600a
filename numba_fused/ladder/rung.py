"""What a rung of the ladder is, and what it is handed."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from numba_fused.device.launch import GpuLauncher, Launcher
from numba_fused.spec import BlockSpec


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
    return GpuLauncher(device.index or 0, torch.cuda.current_stream(device).cuda_stream)


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


@dataclass(frozen=True)
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
    out: Tensor
    threads_per_block: int

    @property
    def group_count(self) -> int:
        """(Sample, group) pairs: N * G."""
        return self.spec.batch * self.spec.num_groups

    @property
    def blocks(self) -> int:
        """Blocks it takes to give every output element a thread."""
        return -(-self.out.numel() // self.threads_per_block)

    @property
    def groups(self) -> tuple[np.int32, np.int32]:
        """(group_size, num_groups) in 32 bits, which saves the kernels' loops registers."""
        return np.int32(self.spec.group_size), np.int32(self.spec.num_groups)

    @property
    def sample_size(self) -> int:
        """Output values of one sample."""
        return self.spec.group_size * self.spec.num_groups

    @property
    def output_size(self) -> tuple[int, ...]:
        """(D, H, W) of the output."""
        return self.spec.volume(self.spec.output_shape)[2:]

    @property
    def geometry(self) -> tuple[tuple[np.int32, ...], ...]:
        """What `convolve_at` needs to find its taps; see `device.convolution`."""
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

    @property
    def bounds(self) -> tuple[Any, ...]:
        """(cap, min_value, max_value) in the kernels' type."""
        real, spec = self.real, self.spec
        return real(spec.cap), real(spec.min_value), real(spec.max_value)

    @property
    def dropout(self) -> tuple[Any, ...]:
        """The trailing arguments of `rng.dropout`: seed, width, threshold, scale."""
        spec = self.spec
        return self.seed, self.output_size[2], spec.drop_threshold, self.real(spec.keep_scale)

    @property
    def eps(self) -> Any:
        """eps in the kernels' type."""
        return self.real(self.spec.eps)

    @property
    def real(self) -> Callable[[float], Any]:
        """The kernels' floating type: an np.float32 argument keeps fp32 arithmetic fp32."""
        return np.float64 if self.spec.dtype == "float64" else np.float32


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
        Holds `forward` and `ledger`; also `limit` if there are shapes it cannot run.
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
        return limit(spec) if limit else None
