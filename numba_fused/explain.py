"""What a call must cost, before anything runs: shapes, bytes, launches, bounds, degeneracy."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from numba_fused import ladder
from numba_fused.ladder import Ledger, Rung
from numba_fused.spec import BlockSpec

if TYPE_CHECKING:
    from matplotlib.axes import Axes

H200 = "NVIDIA H200"
# Measured: copying 2 GiB, read plus written, and an fp32 FFMA kernel.
MEASURED = {H200: (4.19e12, 50e12)}
DOUBLE_RATE_SMALL = 64  # fp64 throughput of GPUs without full fp64 units, relative to fp32
FULL_DOUBLE = ((7, 0), (8, 0), (9, 0), (10, 0))  # compute capabilities with fp64 at half rate
HALF_LANES = ((7, 0), (7, 2), (7, 5), (8, 0))  # 64 fp32 lanes per SM; all later ones have 128


@dataclass(frozen=True)
class Machine:
    """The two rates that bound any kernel.

    Attributes
    ----------
    name : str
    bytes_per_second : float
        Global memory, read plus written.
    flops_per_second : float
        On the fp32 (or fp64) units, not the tensor cores.
    origin : str
        Where the rates come from: measured, the data sheet, or assumed for want of a GPU.
    """

    name: str
    bytes_per_second: float
    flops_per_second: float
    origin: str

    @classmethod
    def of(cls, device: str | torch.device | None = None, dtype: str = "float32") -> Machine:
        """The GPU `device`, by default the current one; an H200 where there is none."""
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(device)
        if device.type != "cuda":
            return cls._measured(H200, dtype, (9, 0), "assumed, no GPU here; measured on one")
        name = torch.cuda.get_device_name(device)
        capability = torch.cuda.get_device_capability(device)
        if name in MEASURED:
            return cls._measured(name, dtype, capability, "measured")
        return cls._data_sheet(name, device, dtype, capability)

    @classmethod
    def _measured(cls, name: str, dtype: str, capability: tuple[int, int], origin: str) -> Machine:
        bandwidth, flops = MEASURED[name]
        return cls(name, bandwidth, flops / _slowdown(dtype, capability), origin)

    @classmethod
    def _data_sheet(
        cls, name: str, device: torch.device, dtype: str, capability: tuple[int, int]
    ) -> Machine:
        from numba import cuda

        gpu = cuda.gpus[device.index or 0]._device
        # Clocks are in kHz; memory transfers twice a clock.
        bandwidth = 2e3 * gpu.MEMORY_CLOCK_RATE * gpu.GLOBAL_MEMORY_BUS_WIDTH / 8
        lanes = 64 if capability in HALF_LANES else 128
        flops = 2e3 * gpu.CLOCK_RATE * lanes * gpu.MULTIPROCESSOR_COUNT
        return cls(name, bandwidth, flops / _slowdown(dtype, capability), "from its data sheet")


def _slowdown(dtype: str, capability: tuple[int, int]) -> int:
    if dtype == "float32":
        return 1
    return 2 if capability in FULL_DOUBLE else DOUBLE_RATE_SMALL


@dataclass(frozen=True)
class RungAccount:
    """What one rung needs for the call, or in `limit` why it cannot run: one of them is None.

    Attributes
    ----------
    number : int
    name, idea : str
    ledger : Ledger or None
    limit : str or None
    memory_ms : float or None
        Time to move the bytes of the ledger.
    """

    number: int
    name: str
    idea: str
    ledger: Ledger | None
    limit: str | None
    memory_ms: float | None


@dataclass(frozen=True)
class Explanation:
    """The account of one call. Print it, show it in a notebook, or `plot` it.

    Attributes
    ----------
    spec : BlockSpec
    machine : Machine
    rungs : tuple of RungAccount
    """

    spec: BlockSpec
    machine: Machine
    rungs: tuple[RungAccount, ...]

    @property
    def intensity(self) -> float:
        """FLOPs per compulsory byte."""
        return self.spec.flops / self.spec.compulsory_bytes

    @property
    def ridge(self) -> float:
        """FLOPs per byte above which the machine is bound by arithmetic."""
        return self.machine.flops_per_second / self.machine.bytes_per_second

    @property
    def memory_floor_ms(self) -> float:
        """Time to move the compulsory bytes."""
        return 1e3 * self.spec.compulsory_bytes / self.machine.bytes_per_second

    @property
    def arithmetic_ms(self) -> float:
        """Time of the convolution's arithmetic outside the tensor cores."""
        return 1e3 * self.spec.flops / self.machine.flops_per_second

    @property
    def roofline_ms(self) -> float:
        """The larger of the two: nothing without tensor cores is faster."""
        return max(self.memory_floor_ms, self.arithmetic_ms)

    def to_dict(self) -> dict[str, Any]:
        """The account as plain numbers and strings, for ``json.dumps``.

        A rung that cannot run has None for its numbers.
        """
        spec = self.spec
        return {
            "x_shape": list(spec.x_shape),
            "weight_shape": list(spec.weight_shape),
            "output_shape": list(spec.output_shape),
            "dtype": spec.dtype,
            "flops": spec.flops,
            "compulsory_bytes": spec.compulsory_bytes,
            "flops_per_byte": self.intensity,
            "machine": self.machine.name,
            "machine_origin": self.machine.origin,
            "bytes_per_second": self.machine.bytes_per_second,
            "flops_per_second": self.machine.flops_per_second,
            "memory_floor_ms": self.memory_floor_ms,
            "arithmetic_ms": self.arithmetic_ms,
            "roofline_ms": self.roofline_ms,
            "constant": spec.constant,
            "degeneracy": spec.degeneracy,
            "rungs": [
                {
                    "number": rung.number,
                    "name": rung.name,
                    "idea": rung.idea,
                    "bytes_read": rung.ledger and rung.ledger.bytes_read,
                    "bytes_written": rung.ledger and rung.ledger.bytes_written,
                    "launches": rung.ledger and rung.ledger.launches,
                    "memory_ms": rung.memory_ms,
                    "limit": rung.limit,
                }
                for rung in self.rungs
            ],
        }

    def facts(self) -> list[tuple[str, str]]:
        """(Label, value) lines about the call itself."""
        spec, machine = self.spec, self.machine
        bound = "memory" if self.memory_floor_ms >= self.arithmetic_ms else "arithmetic"
        return [
            ("input", f"{_shape(spec.x_shape)}  {spec.dtype}, {_bytes(spec.x_bytes)}"),
            ("weight", _shape(spec.weight_shape)),
            ("output", f"{_shape(spec.output_shape)}  {_bytes(spec.output_bytes)}"),
            ("arithmetic", f"{spec.flops / 1e9:.4g} GFLOP in the convolution"),
            (
                "compulsory",
                f"{_bytes(spec.compulsory_bytes)}: inputs read once, output written once",
            ),
            (
                "intensity",
                f"{self.intensity:.1f} FLOP/byte; the machine balances at {self.ridge:.1f}",
            ),
            (
                "machine",
                f"{machine.name}: {machine.bytes_per_second / 1e12:.3g} TB/s, "
                f"{machine.flops_per_second / 1e12:.3g} TFLOP/s ({machine.origin})",
            ),
            (
                "floor",
                f"{_ms(self.memory_floor_ms)} to move the compulsory bytes, "
                f"{_ms(self.arithmetic_ms)} for the arithmetic",
            ),
            ("roofline", f"{_ms(self.roofline_ms)}, bound by {bound} (tensor cores not counted)"),
            ("values", spec.degeneracy),
        ]

    def rows(self) -> list[tuple[str, ...]]:
        """Header and one row a rung."""
        table = [("rung", "read", "written", "x compulsory", "launches", "time at full rate")]
        for rung in self.rungs:
            ledger, name = rung.ledger, f"{rung.number} {rung.name}"
            if ledger is None or rung.memory_ms is None:
                table.append((name, f"cannot run: {rung.limit}", "", "", "", ""))
                continue
            table.append(
                (
                    name,
                    _bytes(ledger.bytes_read),
                    _bytes(ledger.bytes_written),
                    f"{ledger.bytes_moved / self.spec.compulsory_bytes:.2f}",
                    str(ledger.launches),
                    _ms(rung.memory_ms),
                )
            )
        return table

    def __str__(self) -> str:
        lines = [_wrapped(label, value) for label, value in self.facts()]
        lines += ["", "Bytes through global memory, if caches serve every re-read within a pass:"]
        lines += [_columns(row) for row in self.rows()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        facts = "".join(
            f"<tr><th style='text-align:left'>{html.escape(label)}</th>"
            f"<td style='text-align:left'>{html.escape(value)}</td></tr>"
            for label, value in self.facts()
        )
        header, *rows = self.rows()
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in rows
        )
        return f"<table>{facts}</table><table><tr>{head}</tr>{body}</table>"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw bars of the bytes each rung moves, with a line at the compulsory ones.

        Parameters
        ----------
        ax : matplotlib.axes.Axes, optional
            Drawn into; a new figure if not given.

        Returns
        -------
        matplotlib.axes.Axes
        """
        from numba_fused.plot import traffic_bars

        runnable = [(rung.name, rung.ledger) for rung in self.rungs if rung.ledger is not None]
        return traffic_bars(
            [name for name, _ in runnable],
            [ledger.bytes_read for _, ledger in runnable],
            [ledger.bytes_written for _, ledger in runnable],
            compulsory=self.spec.compulsory_bytes,
            ax=ax,
        )


def explain(
    x: Tensor | Sequence[int],
    weight: Tensor | Sequence[int],
    *,
    device: str | torch.device | None = None,
    bias: bool = True,
    affine: bool = True,
    dtype: str | None = None,
    **parameters: Any,
) -> Explanation:
    """Account for one call of the block without running it.

    Parameters
    ----------
    x, weight : Tensor or sequence of int
        (N, C, [D, [H]], W) and (K, C / groups, \\*kernel_size): tensors or just their shapes.
    device : str or torch.device, optional
        The GPU to bound the time for; by default x's, or the current one. Without any GPU, an
        H200 is assumed, and the account says so.
    bias, affine : bool
        Whether the convolution has a bias, the normalisation gamma and beta.
    dtype : str, optional
        ``"float32"`` or ``"float64"``; by default x's, or fp32.
    **parameters
        The block's keywords: `num_groups`, `min_value`, `max_value`, `cap`, `dropout_p`,
        `training`, `stride`, `padding`, `dilation`, `groups`, `eps`.

    Returns
    -------
    Explanation

    Raises
    ------
    RuntimeError, ValueError, TypeError
        As `BlockSpec.from_arguments`.
    """
    if isinstance(x, Tensor):
        dtype = dtype or str(x.dtype).removeprefix("torch.")
        device = device or (x.device if x.is_cuda else None)
    spec = BlockSpec.from_arguments(
        _dimensions(x),
        _dimensions(weight),
        has_bias=bias,
        affine=affine,
        dtype=dtype or "float32",
        **parameters,
    )
    machine = Machine.of(device, spec.dtype)
    return Explanation(
        spec, machine, tuple(_account(rung, spec, machine) for rung in ladder.rungs())
    )


def _account(rung: Rung, spec: BlockSpec, machine: Machine) -> RungAccount:
    """A rung's limit, and its numbers if there is none: what cannot run may have no ledger."""
    limit = rung.limit(spec)
    ledger = memory_ms = None
    if limit is None:
        ledger = rung.ledger(spec)
        memory_ms = 1e3 * ledger.bytes_moved / machine.bytes_per_second
    return RungAccount(rung.number, rung.name, rung.idea, ledger, limit, memory_ms)


def _dimensions(operand: Tensor | Sequence[int]) -> tuple[int, ...]:
    return tuple(operand.shape if isinstance(operand, Tensor) else operand)


def _shape(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


def _bytes(count: int) -> str:
    """`count` with a decimal unit, three significant digits."""
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1e3, larger
    return f"{value:.3g} {unit}"


def _ms(milliseconds: float) -> str:
    """A time with three significant digits, in ms or us."""
    if milliseconds >= 0.1:
        return f"{milliseconds:.3g} ms"
    return f"{1e3 * milliseconds:.3g} us"


def _wrapped(label: str, value: str) -> str:
    import textwrap

    return textwrap.fill(value, 100, initial_indent=f"{label:<12}", subsequent_indent=" " * 12)


def _columns(row: Sequence[str]) -> str:
    name, *cells = row
    if len(cells[0]) > 20:  # a reason instead of numbers
        return f"{name:<16} {cells[0]}"[:100]
    return f"{name:<16}" + "".join(
        f"{cell:>{width}}" for cell, width in zip(cells, (10, 10, 14, 10, 20), strict=True)
    )
