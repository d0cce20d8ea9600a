"""Rows as a GPU might have measured them, for tests of what is made of rows."""

from pathlib import Path
from typing import Any

from numba_fused import bench, ladder, results
from numba_fused.results import AUTO, COMPILED, EAGER, Row

GPU = "Test GPU"
COMPARED = (EAGER, COMPILED, AUTO)


def made_up(case: str, variant: str, precision: str = "ieee", **rest: Any) -> Row:
    """A row whose time is in proportion to the bytes: eager 8 floors, compile 4, all others 2."""
    spec, backward = bench.case_spec(case, precision), rest.get("backward", False)
    floor = bench.compulsory_bytes(spec, backward=backward) / 4e9
    milliseconds = rest.get("p50_ms", {EAGER: 8, COMPILED: 4}.get(variant, 2) * floor)
    made = bench.case_row(case, spec, backward=backward) | {
        "variant": variant,
        "status": "ok",
        "p20_ms": 0.9 * milliseconds,
        "p50_ms": milliseconds,
        "p80_ms": 1.1 * milliseconds,
        "host_us": 30.0,
        "peak_extra_bytes": 3 * spec.output_bytes if variant == EAGER else 0,
        "copy_gb_per_s": 4000.0,
        "floor_ms": floor,
        "error": 2e-7 if precision == "ieee" else 3e-4,
        "error_bound": 4e-7 if precision == "ieee" else 2e-3,
        "gradient_error": 5e-7 if backward else None,
        "gradient_error_bound": 8e-7 if backward else None,
        "gpu": GPU,
        "torch": "2.13.0",
        "numba_cuda": "0.30.4",
        "commit": "0123abcd",
        "utc": "2026-01-01T00:00:00+00:00",
    }
    if variant == AUTO:
        made["runs"] = "pipelined"
    elif variant != COMPILED and not backward:
        ledger = ladder.get(variant).ledger(spec)
        made |= {"ledger_bytes": ledger.bytes_moved, "launches": ledger.launches}
    return made | rest


def everything() -> list[Row]:
    """Enough for each figure."""
    rows = [
        made_up("kb83", variant, precision)
        for precision in ("ieee", "tf32")
        for variant in results.variants()
        if variant not in ("algebra", "tensor_core")
    ]
    skipped = {"status": "skipped", "reason": "it needs <tf32> & more", "p50_ms": None}
    rows.append(made_up("kb83", "tensor_core") | skipped | {"error": None})
    others = ["kb83-b1", "kb83-b16", "kb83-b1024", "2d-3-64", "3d-8-16"]
    others += ["kb83,plane=8", "kb83,plane=32", "kb83,num_groups=2"]
    others += ["kb83-b32,padding=same", "kb83-b32,kernel_size=5,padding=same"]
    channels = "kb83-b16,plane=32{},padding=same"
    others += [channels.format(more) for more in ("", ",in_channels=8", ",out_channels=64")]
    rows += [made_up(case, variant) for case in others for variant in COMPARED]
    rows += [made_up("kb83", variant, backward=True) for variant in COMPARED]
    for threads in (128, 256, 1024):
        time = 10.0 if threads == 256 else 30.0
        rows.append(made_up("kb83", "one_kernel", threads_per_block=threads, p50_ms=time))
    return rows


def written(path: Path, rows: list[Row]) -> Path:
    """A file with these rows."""
    results.append(rows, path)
    return path
