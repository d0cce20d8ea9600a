"""``python -m numba_fused`` is ``numba-fused``."""

from numba_fused.cli import main

main()
