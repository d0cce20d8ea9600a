"""The block as numbers: what is computed, on which shapes, and what that must cost.

    z   = conv(x, weight, bias)                     1-D, 2-D or 3-D
    h   = group_norm(z, num_groups, gamma, beta, eps)
    m   = min(h, cap)
    c   = clamp(m, min_value, max_value)
    out = dropout(c, dropout_p)                     when training

One frozen dataclass holds every shape and parameter of that chain. It validates itself, so
whoever holds a `BlockSpec` may launch on it; it knows nothing of torch or CUDA.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

IntOrTuple: TypeAlias = int | Sequence[int]
Padding: TypeAlias = int | Sequence[int] | str
Triple: TypeAlias = tuple[int, int, int]

SUPPORTED_DTYPES = ("float32", "float64")
PRECISIONS = ("ieee", "tf32")


class DegenerateChainWarning(UserWarning):
    """The bounds fold the whole chain to one constant: no kernel is tested by its values."""


@dataclass(frozen=True, kw_only=True)
class BlockSpec:
    """Shapes and parameters of one call of the block.

    Build it with `BlockSpec.from_arguments`, which takes PyTorch's spellings (ints or tuples,
    ``"same"``) and raises what PyTorch raises.

    Attributes
    ----------
    batch, in_channels, out_channels : int
        N, C and K: x is (N, C, *input_size), out is (N, K, *output_size).
    input_size, kernel_size, stride, dilation : tuple of int
        One entry per spatial axis, 1 to 3 of them.
    padding : tuple of (int, int)
        Zeros before and after each spatial axis; they differ for ``"same"`` and even kernels.
    groups, num_groups : int
        Groups of the convolution and groups of the normalisation.
    min_value, max_value, cap : float
        ``clamp(min(h, cap), min_value, max_value)``.
    dropout_p : float
        Probability that an element is dropped.
    training : bool
        Whether dropout acts at all.
    eps : float
        Added to the variance.
    has_bias, affine : bool
        Whether the convolution has a bias, the normalisation gamma and beta.
    dtype : str
        ``"float32"`` or ``"float64"``.
    precision : str
        What the convolution's products must be good for: ``"ieee"``, the error of fp32
        arithmetic; ``"tf32"``, operands rounded to 10 fraction bits.
    """

    batch: int
    in_channels: int
    out_channels: int
    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    dilation: tuple[int, ...]
    groups: int
    num_groups: int
    min_value: float
    max_value: float
    cap: float
    dropout_p: float
    training: bool
    eps: float
    has_bias: bool = True
    affine: bool = True
    dtype: str = "float32"
    precision: str = "ieee"

    @classmethod
    def from_arguments(
        cls,
        x_shape: Sequence[int],
        weight_shape: Sequence[int],
        *,
        num_groups: int,
        min_value: float,
        max_value: float,
        cap: float | None = None,
        dropout_p: float = 0.0,
        training: bool = False,
        stride: IntOrTuple = 1,
        padding: Padding = 0,
        dilation: IntOrTuple = 1,
        groups: int = 1,
        eps: float = 1e-5,
        has_bias: bool = True,
        affine: bool = True,
        dtype: str = "float32",
        precision: str = "ieee",
    ) -> BlockSpec:
        """Validate the arguments of one call and normalise their spelling.

        Parameters
        ----------
        x_shape : sequence of int
            (N, C, [D, [H]], W).
        weight_shape : sequence of int
            (K, C / groups, *kernel_size).
        num_groups, min_value, max_value, cap, dropout_p, training
            As in `fused_conv_group_norm_min_clamp_dropout`; ``cap=None`` means `min_value`.
        stride, padding, dilation, groups, eps
            Likewise.
        has_bias, affine, dtype, precision
            See the attributes.

        Returns
        -------
        BlockSpec

        Raises
        ------
        RuntimeError
            Shapes, channels, groups, stride, padding or dilation that do not fit together:
            what ``torch.nn.functional.conv3d`` and ``group_norm`` raise. An unsupported dtype
            or precision raises its subclass `NotImplementedError`.
        ValueError
            `dropout_p` outside [0, 1] or NaN; a NaN bound; a single value per group.
        TypeError
            A size that is not an int, a bound that is not a number.
        """
        if dtype not in SUPPORTED_DTYPES:
            raise NotImplementedError(
                f"the kernels are not implemented for dtype {dtype}: use "
                f"{' or '.join(SUPPORTED_DTYPES)}, for example x.float()"
            )
        check_precision(precision)
        axes = len(weight_shape) - 2
        if axes not in (1, 2, 3):
            raise RuntimeError(
                f"expected weight of 3, 4 or 5 dimensions (out_channels, in_channels / groups, "
                f"*kernel_size), but got {len(weight_shape)}: shape {list(weight_shape)}"
            )
        if len(x_shape) != axes + 2:
            raise RuntimeError(
                f"expected x of {axes + 2} dimensions (batch, channels, {axes} spatial) to match "
                f"weight of shape {list(weight_shape)}, but got {len(x_shape)}: shape "
                f"{list(x_shape)}; add a batch axis with x.unsqueeze(0) if it lacks one"
            )
        strides = _per_axis("stride", stride, axes, minimum=1)
        dilations = _per_axis("dilation", dilation, axes, minimum=1)
        kernel = tuple(int(k) for k in weight_shape[2:])
        spec = cls(
            batch=int(x_shape[0]),
            in_channels=int(x_shape[1]),
            out_channels=int(weight_shape[0]),
            input_size=tuple(int(n) for n in x_shape[2:]),
            kernel_size=kernel,
            stride=strides,
            padding=_padding(padding, kernel, strides, dilations),
            dilation=dilations,
            groups=_integer("groups", groups),
            num_groups=_integer("num_groups", num_groups),
            min_value=_number("min_value", min_value),
            max_value=_number("max_value", max_value),
            cap=_number("cap", min_value if cap is None else cap),
            dropout_p=_number("dropout_p", dropout_p),
            training=bool(training),
            eps=_number("eps", eps),
            has_bias=has_bias,
            affine=affine,
            dtype=dtype,
            precision=precision,
        )
        spec._check_convolution(int(weight_shape[1]))
        spec._check_normalisation()
        check_dropout_p(spec.dropout_p)
        return spec

    def _check_convolution(self, weight_channels: int) -> None:
        kernel, groups = list(self.kernel_size), self.groups
        if groups < 1:
            raise RuntimeError(f"groups must be at least 1, but got {groups}")
        if min(kernel) < 1:
            raise RuntimeError(f"kernel sizes must be at least 1, but got {kernel}")
        if self.out_channels < 1 or self.out_channels % groups:
            raise RuntimeError(
                f"out_channels must be a positive multiple of groups={groups}, but weight has "
                f"{self.out_channels} at dimension 0"
            )
        if weight_channels < 1 or self.in_channels != weight_channels * groups:
            raise RuntimeError(
                f"with groups={groups} and {weight_channels} weight channels per group, expected "
                f"x to have {weight_channels * groups} channels (at least 1), but got "
                f"{self.in_channels}"
            )
        padded = [n + sum(p) for n, p in zip(self.input_size, self.padding, strict=True)]
        if min(self.input_size) < 1 or min(self.output_size) < 1:
            span = [d * (k - 1) + 1 for k, d in zip(self.kernel_size, self.dilation, strict=True)]
            raise RuntimeError(
                f"padded input size {padded} (input {list(self.input_size)}) is smaller than the "
                f"dilated kernel {span}, or empty: enlarge x or padding, or use a smaller kernel "
                f"or dilation"
            )

    def _check_normalisation(self) -> None:
        if self.num_groups < 1:
            raise RuntimeError(f"num_groups must be at least 1, but got {self.num_groups}")
        if self.out_channels % self.num_groups:
            raise RuntimeError(
                f"out_channels must be divisible by num_groups, but got {self.out_channels} "
                f"channels and num_groups={self.num_groups}"
            )
        if self.batch * self.group_size == 1:
            raise ValueError(
                f"expected more than 1 value per group to normalise, but got batch 1 and output "
                f"size {list(self.output_shape)} with num_groups={self.num_groups}: use fewer "
                f"groups or a larger input"
            )

    def __eq__(self, other: object) -> bool:
        """Equal in all fields; bounds of 0.0 and -0.0 are not the same, since results show it."""
        if not isinstance(other, BlockSpec):
            return NotImplemented
        return self is other or self._key == other._key

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _key(self) -> tuple[Any, ...]:
        fields = tuple(getattr(self, name) for name in self.__dataclass_fields__)
        bounds = (self.min_value, self.max_value, self.cap)
        return *fields, *(math.copysign(1.0, bound) for bound in bounds)

    @cached_property
    def _hash(self) -> int:
        """Specs are keys wherever something is remembered; twenty fields take a while to hash."""
        return hash(self._key)

    # ---- shapes ---------------------------------------------------------------------------

    @cached_property
    def output_size(self) -> tuple[int, ...]:
        """Spatial extent of the output, by the formula of ``torch.nn.Conv3d``:
        ``(input + padding - dilation * (kernel - 1) - 1) // stride + 1`` per axis.
        """
        return tuple(
            (n + before + after - d * (k - 1) - 1) // s + 1
            for n, (before, after), d, k, s in zip(
                self.input_size,
                self.padding,
                self.dilation,
                self.kernel_size,
                self.stride,
                strict=True,
            )
        )

    @cached_property
    def x_shape(self) -> tuple[int, ...]:
        """(N, C, *input_size)."""
        return (self.batch, self.in_channels, *self.input_size)

    @cached_property
    def weight_shape(self) -> tuple[int, ...]:
        """(K, C / groups, *kernel_size)."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @cached_property
    def output_shape(self) -> tuple[int, ...]:
        """(N, K, *output_size)."""
        return (self.batch, self.out_channels, *self.output_size)

    @cached_property
    def group_size(self) -> int:
        """Values per sample and normalisation group: what one mean is taken over."""
        return self.out_channels // self.num_groups * math.prod(self.output_size)

    def volume(self, shape: Sequence[int]) -> tuple[int, ...]:
        """`shape` of x, weight or output as the kernels see it: 5-D, missing axes of size 1.

        >>> spec.volume((8, 3, 5))          # (N, C, W)
        (8, 3, 1, 1, 5)
        """
        lead, spatial = tuple(shape[:2]), tuple(shape[2:])
        return (*lead, *(1,) * (3 - len(spatial)), *spatial)

    @property
    def stride3(self) -> Triple:
        """Stride as (d, h, w), missing axes 1."""
        return _triple(self.stride, 1)

    @property
    def dilation3(self) -> Triple:
        """Dilation as (d, h, w), missing axes 1."""
        return _triple(self.dilation, 1)

    @property
    def padding3(self) -> Triple:
        """Zeros *before* each axis as (d, h, w), missing axes 0: all a kernel needs to know."""
        return _triple([before for before, _ in self.padding], 0)

    # ---- cost -----------------------------------------------------------------------------

    @property
    def itemsize(self) -> int:
        """Bytes per element."""
        return 8 if self.dtype == "float64" else 4

    @property
    def x_bytes(self) -> int:
        """Bytes of x."""
        return math.prod(self.x_shape) * self.itemsize

    @property
    def output_bytes(self) -> int:
        """Bytes of the output, and of every intermediate tensor of the unfused chain."""
        return math.prod(self.output_shape) * self.itemsize

    @property
    def parameter_bytes(self) -> int:
        """Bytes of weight and of whichever of bias, gamma and beta exist."""
        vectors = self.has_bias + 2 * self.affine
        return (math.prod(self.weight_shape) + vectors * self.out_channels) * self.itemsize

    @property
    def compulsory_bytes(self) -> int:
        """Fewest bytes any implementation moves: every input read once, the output written once."""
        return self.x_bytes + self.parameter_bytes + self.output_bytes

    @property
    def flops(self) -> int:
        """Floating-point operations of the convolution, 2 per multiply-add; the rest is noise."""
        taps = self.in_channels // self.groups * math.prod(self.kernel_size)
        return 2 * math.prod(self.output_shape) * taps

    # ---- dropout and degeneracy -----------------------------------------------------------

    @property
    def draws(self) -> bool:
        """Whether this call draws random numbers."""
        return self.training and self.dropout_p > 0.0

    @property
    def drop_threshold(self) -> int:
        """An element is dropped when its 32-bit draw is below this; 0 when nothing is drawn."""
        return round(self.dropout_p * 2**32) if self.draws else 0

    @property
    def keep_scale(self) -> float:
        """1 / (1 - p), what kept elements are multiplied by; 0 for p = 1, 1 when not drawing."""
        if not self.draws:
            return 1.0
        return 0.0 if self.dropout_p == 1.0 else 1.0 / (1.0 - self.dropout_p)

    @property
    def constant(self) -> float | None:
        """What ``clamp(min(h, cap), min_value, max_value)`` is for *every* finite h, or None.

        ``min_value >= max_value`` gives `max_value` (PyTorch's clamp); otherwise
        ``cap <= min_value`` leaves nothing above `min_value`, so the clamp returns that.
        """
        if self.min_value >= self.max_value:
            return self.max_value
        return self.min_value if self.cap <= self.min_value else None

    @property
    def degeneracy(self) -> str:
        """One sentence on whether the chain is degenerate, naming the constant."""
        if self.constant is None:
            return "the chain depends on its input: min_value < cap and min_value < max_value"
        return (
            f"clamp(min(h, {self.cap:g}), {self.min_value:g}, {self.max_value:g}) is "
            f"{self.constant:g} for every finite h: the convolution and the normalisation do not "
            f"reach the output. Pass a cap above min_value for a chain that computes something"
        )


def check_dropout_p(p: float) -> None:
    """Raise `ValueError` unless `p` is a probability."""
    if not 0.0 <= p <= 1.0:  # also catches NaN
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


def check_bounds(**bounds: float | None) -> None:
    """Raise `TypeError` for a bound that is no number, `ValueError` for one that is NaN."""
    for name, value in bounds.items():
        if value is not None:
            _number(name, value)


def check_precision(precision: str) -> None:
    """Raise `NotImplementedError` for a precision no rung computes in."""
    if precision not in PRECISIONS:
        raise NotImplementedError(
            f"precision must be one of {', '.join(map(repr, PRECISIONS))}, but got {precision!r}"
        )


def check_threads_per_block(threads_per_block: int) -> None:
    """Raise `ValueError` unless the block is a whole number of warps the hardware can hold."""
    if threads_per_block not in range(32, 1025, 32):
        raise ValueError(
            f"threads_per_block must be a multiple of 32 from 32 to 1024, but got "
            f"{threads_per_block}"
        )


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an int, but got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(
            f"{name} must be an int, but got {value!r} of type {type(value).__name__}"
        ) from None


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"{name} must be a number, but got {value!r} of type {type(value).__name__}"
        ) from None
    if math.isnan(number):
        raise ValueError(f"{name} must be a number, but got NaN")
    return number


def _per_axis(name: str, value: Any, axes: int, minimum: int) -> tuple[int, ...]:
    """`value` as one int per spatial axis; a single int or 1-tuple is repeated."""
    sequence = value if isinstance(value, Sequence) and not isinstance(value, str) else (value,)
    entries = tuple(_integer(name, entry) for entry in sequence)
    if len(entries) == 1:
        entries *= axes
    if len(entries) != axes:
        raise RuntimeError(
            f"expected {name} to be an int or {axes} ints to match the {axes} spatial axes, but "
            f"got {list(entries)}"
        )
    if min(entries) < minimum:
        raise RuntimeError(f"{name} must be at least {minimum}, but got {list(entries)}")
    return entries


def _padding(
    padding: Padding,
    kernel_size: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[tuple[int, int], ...]:
    """(before, after) per axis; ``"same"`` puts the odd zero after, as PyTorch does."""
    if padding == "valid":
        padding = 0
    if isinstance(padding, str):
        if padding != "same":
            raise RuntimeError(f"padding must be 'same', 'valid' or ints, but got {padding!r}")
        if max(stride) > 1:
            raise RuntimeError(f"padding='same' needs stride 1, but got stride {list(stride)}")
        totals = [d * (k - 1) for k, d in zip(kernel_size, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((p, p) for p in _per_axis("padding", padding, len(kernel_size), minimum=0))


def _triple(values: Sequence[int], fill: int) -> Triple:
    d, h, w = (fill,) * (3 - len(values)) + tuple(values)
    return d, h, w
