"""The microscope's numbers on kernels whose numbers can be worked out by hand."""

# numba declares its device API as empty classes, which no call in a kernel can satisfy:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportFunctionMemberAccess=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalSubscript=false

import numpy as np
import pytest
from numba import cuda, float32, float64, uint8
from numba.cuda.extending import intrinsic

from numba_fused.simulator import Simulator

FULL = 0xFFFFFFFF


def run(kernel, grid, block, *args, **kwargs):
    sim = Simulator(count=True, check_races=False)
    sim.launch(kernel, grid, block, *args, **kwargs)
    return sim


def line(sim, text, kind, array=None):
    found = [
        entry
        for entry in sim.launches[-1].lines
        if text in entry.text and entry.kind == kind and array in (None, entry.array)
    ]
    assert len(found) == 1, sim.report()
    return found[0]


# ---------------------------------------------------------------------- global memory


@cuda.jit
def strided_load(x, out, stride):
    i = cuda.grid(1)
    v = x[i * stride]
    out[i] = v


@pytest.mark.parametrize(
    ("dtype", "stride", "sectors_per_request"),
    [
        (np.float32, 1, 4),
        (np.float32, 2, 8),
        (np.float32, 8, 32),
        (np.float32, 33, 32),
        (np.float32, 0, 1),
        (np.float64, 1, 8),
        (np.uint8, 1, 1),
        (np.uint8, 32, 32),
    ],
)
def test_sectors_per_request(dtype, stride, sectors_per_request):
    x = np.zeros(max(1, 128 * stride), dtype)
    load = line(run(strided_load, 2, 64, x, np.zeros(128, dtype), stride), "v = x", "load")
    assert load.accesses == 128
    assert load.bytes == 128 * x.itemsize
    assert load.requests == 4
    assert load.sectors == 4 * sectors_per_request
    assert load.space == "global"
    assert load.file == __file__
    assert load.text == "v = x[i * stride]"


@cuda.jit
def shifted(x, out):
    i = cuda.grid(1)
    out[i] = x[i + 1]


def test_a_misaligned_request_touches_one_sector_more():
    load = line(run(shifted, 1, 32, np.zeros(64, np.float32), np.zeros(32)), "x[i + 1]", "load")
    assert (load.requests, load.sectors, load.distinct_sectors) == (1, 5, 5)


@cuda.jit
def three_point(x, out):
    i = cuda.grid(1)
    if 0 < i < x.size - 1:
        out[i] = x[i - 1] + x[i] + x[i + 1]


def test_one_line_is_charged_each_sector_once_per_launch():
    x, out = np.zeros(1024, np.float32), np.zeros(1024, np.float32)
    sim = run(three_point, 8, 128, x, out)
    load = line(sim, "x[i - 1]", "load")
    assert load.requests == 3 * 32
    assert load.distinct_sectors == 128
    assert sim.bytes_read == x.nbytes
    assert sim.bytes_written == out.nbytes
    sim.launch(three_point, 8, 128, x, out)
    assert sim.bytes_read == 2 * x.nbytes


@cuda.jit
def two_lines(x, out):
    i = cuda.grid(1)
    a = x[i]
    b = x[i]
    out[i] = a + b


def test_two_lines_are_charged_twice():
    x, out = np.zeros(64, np.float32), np.zeros(64, np.float32)
    assert run(two_lines, 1, 64, x, out).bytes_read == 2 * x.nbytes


@cuda.jit
def two_arrays_one_line(x, y, out):
    i = cuda.grid(1)
    out[i] = x[i] + y[i]


def test_arrays_on_one_line_are_told_apart():
    x, y, out = np.zeros(64, np.float32), np.zeros(64), np.zeros(64, np.float32)
    sim = run(two_arrays_one_line, 1, 64, x, y, out)
    assert line(sim, "x[i] + y[i]", "load", "x").bytes == x.nbytes
    assert line(sim, "x[i] + y[i]", "load", "y").bytes == y.nbytes
    assert sim.bytes_read == x.nbytes + y.nbytes


@pytest.mark.parametrize("n", [1, 7, 8, 9, 33])
def test_reading_a_whole_array_costs_its_bytes(n):
    x, out = np.zeros(n, np.float32), np.zeros(n, np.float32)
    sim = run(two_arrays_one_line, 1, n, x, x, out)
    assert sim.bytes_read == 2 * x.nbytes
    assert sim.bytes_written == out.nbytes


def test_a_touched_sector_is_charged_whole():
    x, out = np.zeros(64, np.float32), np.zeros(1, np.float32)
    assert run(strided_load, 1, 1, x, out, 0).bytes_read == 32


@cuda.jit
def increments(x, total):
    i = cuda.grid(1)
    x[i] += float32(1)
    cuda.atomic.add(total, 0, x[i])


def test_read_modify_write_and_atomics_count_both_ways():
    x, total = np.zeros(64, np.float32), np.zeros(1, np.float32)
    sim = run(increments, 1, 64, x, total)
    atomic = line(sim, "atomic.add", "atomic")
    assert (atomic.accesses, atomic.requests, atomic.distinct_bytes) == (64, 2, 4)
    assert sim.bytes_read == 2 * x.nbytes + 4
    assert sim.bytes_written == x.nbytes + 4


def test_strided_views_are_charged_where_they_lie():
    x = np.zeros((64, 8), np.float32)[:, 0]
    load = line(run(strided_load, 1, 64, x, np.zeros(64), 1), "v = x", "load")
    assert load.sectors == 64
    assert load.distinct_bytes == 63 * 32 + 4


@cuda.jit
def rows(x, out):
    i = cuda.grid(1)
    total = float32(0)
    for j in range(x.shape[1]):
        total += x[i, j]
    out[i] = total


def test_loop_iterations_are_requests_of_their_own():
    x = np.zeros((32, 16), np.float32)
    load = line(run(rows, 1, 32, x, np.zeros(32)), "total += x", "load")
    assert (load.requests, load.sectors, load.distinct_sectors) == (16, 16 * 32, 64)


@cuda.jit
def half_active(x, out):
    i = cuda.grid(1)
    if i % 2:
        out[i] = x[i]


def test_inactive_lanes_ask_for_nothing():
    load = line(run(half_active, 1, 64, np.zeros(64, np.float32), np.zeros(64)), "x[i]", "load")
    assert (load.accesses, load.requests, load.bytes, load.sectors) == (32, 2, 128, 8)


@cuda.jit(device=True)
def fetch(x, i):
    return x[i]


@cuda.jit
def calls_fetch(x, y, out):
    i = cuda.grid(1)
    out[i] = fetch(x, i) + fetch(y, i)


def test_device_functions_own_their_accesses():
    x = np.zeros(32, np.float32)
    sim = run(calls_fetch, 1, 32, x, x.copy(), np.zeros(32))
    assert line(sim, "return x[i]", "load", "x").requests == 1
    assert line(sim, "return x[i]", "load", "y").requests == 1


@cuda.jit
def after_collective(x, out):
    i = cuda.grid(1)
    for k in range(4):
        v = cuda.shfl_xor_sync(FULL, x[i], k)
        cuda.syncthreads()
        out[i] = v


@pytest.mark.parametrize("seed", [None, 5])
def test_requests_do_not_depend_on_who_wakes_first(seed):
    sim = Simulator(count=True, schedule_seed=seed)
    sim.launch(after_collective, 2, 96, np.zeros(192, np.float32), np.zeros(192, np.float32))
    load, store = line(sim, "shfl", "load"), line(sim, "out[i]", "store")
    assert (load.requests, load.sectors) == (24, 96)
    assert (store.requests, store.sectors) == (24, 96)
    assert sim.launches[0].collectives == {"shfl_xor_sync": 24, "syncthreads": 8}


# ---------------------------------------------------------------------- intrinsics


@intrinsic
def load_four(typingctx, x, i):
    return None


def load_four_meaning(x, i):
    return x[i], x[i + 1], x[i + 2], x[i + 3]


load_four.simulated_as = load_four_meaning


@cuda.jit
def vector_loads(x, out):
    tile = cuda.shared.array(128, float32)
    i = cuda.grid(1)
    a, b, c, d = load_four(x, 4 * i)
    tile[i] = a + b + c + d
    tile[i + 32] = tile[i + 64] = tile[i + 96] = a
    cuda.syncwarp()
    a, b, c, d = load_four(tile, 4 * i)
    out[i] = a + b + c + d


def test_a_vector_access_is_one_request_at_the_line_that_calls_it():
    x = np.zeros(128, np.float32)
    sim = run(vector_loads, 1, 32, x, np.zeros(32))
    load = line(sim, "load_four(x", "load")
    assert (load.requests, load.accesses, load.bytes, load.sectors) == (1, 32, 512, 16)
    load = line(sim, "load_four(tile", "load")
    assert (load.requests, load.wavefronts, load.bank_conflicts) == (1, 4, 0)
    assert sim.launches[0].intrinsics == {"load_four": 64}


# ---------------------------------------------------------------------- shared memory


@cuda.jit
def shared_stride(out, stride, n):
    tile = cuda.shared.array(1024, float32)
    t = cuda.threadIdx.x
    tile[(t * stride) % n] = 1
    out[t] = tile[(t * stride) % n]


@pytest.mark.parametrize(
    ("stride", "n", "wavefronts"),
    [
        (1, 1024, 1),
        (2, 1024, 2),
        (4, 1024, 4),
        (32, 1024, 32),
        (33, 1089, 1),
        (1, 1, 1),
        (8, 64, 2),
    ],
)
def test_bank_conflicts_of_words(stride, n, wavefronts):
    if n == 1089:
        stride, n = 31, 1024
    sim = run(shared_stride, 1, 64, np.zeros(64), stride, n)
    for kind in ("load", "store"):
        access = line(sim, "tile[(t", kind, "tile") if kind == "load" else None
        access = access or line(sim, "= 1", "store", "tile")
        assert access.requests == 2
        assert access.wavefronts == 2 * wavefronts
        assert access.bank_conflicts == 2 * (wavefronts - 1)
        assert (access.sectors, access.distinct_bytes) == (0, 0)


@cuda.jit
def shared_doubles(out):
    tile = cuda.shared.array(64, float64)
    small = cuda.shared.array(64, uint8)
    t = cuda.threadIdx.x
    tile[t] = 1
    tile[2 * t] = 2
    small[t] = 3
    out[t] = 0


def test_banks_for_other_widths():
    sim = run(shared_doubles, 1, 32, np.zeros(32))
    for text, wavefronts, conflicts in [("= 1", 2, 0), ("= 2", 4, 2), ("= 3", 1, 0)]:
        store = line(sim, text, "store")
        assert (store.wavefronts, store.bank_conflicts) == (wavefronts, conflicts)


@cuda.jit
def shared_column(out, columns):
    tile = cuda.shared.array((32, 33), float32) if columns == 33 else None
    if columns == 32:
        tile = cuda.shared.array((32, 32), float32)
    t = cuda.threadIdx.x
    tile[t, 0] = t
    out[t] = tile[t, 0]


@pytest.mark.parametrize(("columns", "conflicts"), [(32, 31), (33, 0)])
def test_padding_a_tile_removes_its_conflicts(columns, conflicts):
    sim = run(shared_column, 1, 32, np.zeros(32), columns)
    assert line(sim, "out[t] = tile", "load").bank_conflicts == conflicts


def test_shared_memory_is_not_global_traffic():
    sim = run(shared_stride, 1, 32, np.zeros(32), 1, 32)
    assert sim.bytes_read == 0
    assert sim.bytes_written == 32 * 8


# ---------------------------------------------------------------------- the report


def test_report_has_a_row_per_line():
    sim = run(shared_stride, 1, 32, np.zeros(32), 2, 1024)
    report = sim.report()
    assert "shared_stride  grid (1, 1, 1)  block (32, 1, 1)  32 threads" in report
    row = next(row for row in report.splitlines() if "shared load" in row)
    assert row.split()[1:11] == ["tile", "shared", "load", "32", "1", "128", "0", "0", "2", "1"]
    assert row.endswith("out[t] = tile[(t * stride) % n]")


def test_without_counting_the_report_has_collectives_only():
    sim = Simulator()
    sim.launch(after_collective, 1, 32, np.zeros(32, np.float32), np.zeros(32, np.float32))
    assert "collectives: shfl_xor_sync 4, syncthreads 4" in sim.report()
    assert sim.launches[0].lines == []
