"""numba_fused: convolution -> group norm -> min -> clamp -> dropout as one operator.

`fused_conv_group_norm_min_clamp_dropout` is the operator, `FusedConvGroupNormMinClampDropout`
the module; `reference` is the same chain in PyTorch, `keep_mask` the dropout mask, `explain`
the account of what a call must cost, and `ladder` the kernels, one idea a file.
"""

from numba_fused import _numpy_names  # noqa: F401  isort: skip  # before anything imports numba.cuda
from numba_fused import ladder
from numba_fused.explain import explain
from numba_fused.module import FusedConvGroupNormMinClampDropout
from numba_fused.ops import fused_conv_group_norm_min_clamp_dropout
from numba_fused.reference import reference
from numba_fused.rng import keep_mask
from numba_fused.spec import BlockSpec, DegenerateChainWarning

__version__ = "0.1.0"

__all__ = [
    "BlockSpec",
    "DegenerateChainWarning",
    "FusedConvGroupNormMinClampDropout",
    "explain",
    "fused_conv_group_norm_min_clamp_dropout",
    "keep_mask",
    "ladder",
    "reference",
]
