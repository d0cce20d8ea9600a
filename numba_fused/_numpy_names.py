"""Give NumPy >= 2.5 back the three names that numba-cuda 0.30 still imports.

NumPy 2.5 removed `row_stack`, `in1d` and `trapz`; numba-cuda registers overloads for them when
it is imported and fails without. None of our kernels calls them. Import this module first.
"""

import numpy as np

for _removed, _successor in (("row_stack", "vstack"), ("in1d", "isin"), ("trapz", "trapezoid")):
    if not hasattr(np, _removed):
        setattr(np, _removed, getattr(np, _successor))
