"""The simulator computes what a GPU computes: arithmetic, collectives, barriers, arrays."""

# numba declares its device API as empty classes, which no call in a kernel can satisfy:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportFunctionMemberAccess=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalSubscript=false

import math

import numba
import numpy as np
import pytest
import torch
from numba import boolean, cuda, float32, float64, int32, uint8, uint32, uint64
from numba.cuda import cg, shared, syncthreads, threadIdx
from numba.cuda.extending import intrinsic

from numba_fused.simulator import SimulationError, Simulator

FULL = 0xFFFFFFFF
WARP = np.arange(32)


@pytest.fixture(params=["plain", "races", "count", "shuffled"])
def sim(request):
    """Every kind of array wrapper and schedule must give the same results."""
    return {
        "plain": lambda: Simulator(check_races=False),
        "races": Simulator,
        "count": lambda: Simulator(count=True, check_races=False),
        "shuffled": lambda: Simulator(schedule_seed=7),
    }[request.param]()


# ---------------------------------------------------------------------- arithmetic and types


@cuda.jit
def splitmix(seed, out):
    i = cuda.grid(1)
    z = uint64(seed) + uint64(0x9E3779B97F4A7C15) * uint64(i + 1)
    z = (z ^ (z >> uint64(30))) * uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> uint64(27))) * uint64(0x94D049BB133111EB)
    out[i] = z ^ (z >> uint64(31))


@pytest.mark.filterwarnings("error")
def test_uint64_wraps_silently(sim):
    out = np.zeros(4, np.uint64)
    sim.launch(splitmix, 1, 4, 2**64 - 5, out)
    mask = 2**64 - 1
    for i, value in enumerate(out.tolist()):
        z = (2**64 - 5 + 0x9E3779B97F4A7C15 * (i + 1)) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        assert value == z ^ (z >> 31)


@cuda.jit
def casts(out_i32, out_u32, out_u8, out_f):
    out_i32[0] = int32(2**31)
    out_i32[1] = int32(float32(-2.7))
    out_i32[2] = 2**32 + 5
    out_u32[0] = uint32(-1)
    out_u32[1] = -2
    out_u8[0] = uint8(uint32(300))
    out_f[0] = float32(1) / float32(3)
    out_f[1] = float32(16777216) + float32(1)
    out_f[2] = float32(1) / float32(0)
    out_f[3] = out_f.dtype.type(0.1)
    out_f[4] = float32(boolean(1))


def test_casts_wrap_and_round_as_in_c(sim):
    i, u, b, f = (np.zeros(5, t) for t in (np.int32, np.uint32, np.uint8, np.float32))
    sim.launch(casts, 1, 1, i, u, b, f)
    assert i[:3].tolist() == [-(2**31), -2, 5]
    assert u[:2].tolist() == [2**32 - 1, 2**32 - 2]
    assert b[0] == 44
    assert f.tolist() == [np.float32(1) / np.float32(3), 2**24, np.inf, np.float32(0.1), 1]


@cuda.jit
def transcendental(x, out):
    i = cuda.grid(1)
    out[i] = math.sqrt(x[i])
    out[i + 4] = math.exp(x[i])
    if i == 0:
        kept_single = math.sqrt(x[1]) * x[1]
        out[8] = 1 if kept_single.dtype.itemsize == 4 else 0


def test_math_keeps_float32_and_does_not_raise(sim):
    x = np.array([-1, 2, 1000, 0], np.float32)
    out = np.zeros(9, np.float32)
    sim.launch(transcendental, 1, 4, x, out)
    assert np.isnan(out[0])
    assert out[1] == np.sqrt(np.float32(2))
    assert out[6] == np.inf
    assert out[7] == 1
    assert out[8] == 1


@cuda.jit
def bit_functions(out):
    out[0] = cuda.popc(uint32(0xF0F0))
    out[1] = cuda.clz(uint32(1))
    out[2] = cuda.clz(uint64(1))
    out[3] = cuda.ffs(uint32(8))
    out[4] = cuda.ffs(uint32(0))
    out[5] = cuda.brev(uint32(1))
    out[6] = cuda.selp(out[0] > 0, 7, 9)
    out[7] = cuda.popc(int32(-1))


def test_bit_functions(sim):
    out = np.zeros(8, np.int64)
    sim.launch(bit_functions, 1, 1, out)
    assert out.tolist() == [8, 31, 63, 4, 0, 2**31, 7, 32]


@cuda.jit
def fused(a, b, c, out):
    out[0] = cuda.fma(a[0], b[0], c[0])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_fma_rounds_once(sim, dtype):
    eps = np.finfo(dtype).eps
    a, out = np.array([1 + eps], dtype), np.zeros(1, dtype)
    sim.launch(fused, 1, 1, a, a, -np.array([1 + 2 * eps], dtype), out)
    assert out[0] == dtype(eps) * dtype(eps)  # a * a rounded first would give 0


def test_float32_fma_does_not_round_twice(sim):
    a, b, c = (np.array([v], np.float32) for v in (97 / 2**24, 172961, 2.0**-80))
    out = np.zeros(1, np.float32)
    sim.launch(fused, 1, 1, a, b, c, out)  # a * b is 1 + 2**-24, halfway between two floats
    assert out[0] == 1 + np.float32(2.0**-23)


# ---------------------------------------------------------------------- coordinates and names


@cuda.jit
def coordinates(out):
    x, y, z = cuda.grid(3)
    sx, sy, _sz = cuda.gridsize(3)
    rank = (z * sy + y) * sx + x
    out[rank, 0] = cuda.threadIdx.x + 10 * cuda.threadIdx.y + 100 * cuda.threadIdx.z
    out[rank, 1] = cuda.blockIdx.x + 10 * cuda.blockIdx.y + 100 * cuda.blockIdx.z
    out[rank, 2] = cuda.blockDim.x + 10 * cuda.blockDim.y + 100 * cuda.blockDim.z
    out[rank, 3] = cuda.gridDim.x + 10 * cuda.gridDim.y + 100 * cuda.gridDim.z
    out[rank, 4] = cuda.laneid


def test_three_dimensional_geometry(sim):
    grid, block = (2, 3, 2), (3, 2, 7)
    out = np.full((2 * 3 * 2 * 42, 5), -1)
    sim.launch(coordinates, grid, block, out)
    assert sim.launches[0].threads == len(out)
    for z in range(14):
        for y in range(6):
            for x in range(6):
                t, b = (x % 3, y % 2, z % 7), (x // 3, y // 2, z // 7)
                expected = [t @ np.array([1, 10, 100]) for t in (t, b, block, grid)]
                expected.append((t[0] + 3 * t[1] + 6 * t[2]) % 32)
                assert out[(z * 6 + y) * 6 + x].tolist() == expected


@cuda.jit
def names_imported_directly(out):
    tile = shared.array(4, numba.float32)
    t = threadIdx.x
    tile[t] = numba.cuda.blockIdx.x + t
    syncthreads()
    out[t] = tile[3 - t]


def test_names_imported_from_numba_cuda(sim):
    out = np.zeros(4, np.float32)
    sim.launch(names_imported_directly, 1, 4, out)
    assert out.tolist() == [3, 2, 1, 0]


@cuda.jit
def unknown_name():
    cuda.no_such_thing()


def test_a_missing_name_is_named(sim):
    with pytest.raises(AttributeError, match="no_such_thing") as caught:
        sim.launch(unknown_name, 1, 1)
    assert "block (0, 0, 0), thread (0, 0, 0)" in caught.value.__notes__[0]
    assert "cuda.no_such_thing()" in caught.value.__notes__[0]


@cuda.jit
def divides(n):
    return 1 // (n - cuda.grid(1))


def test_exceptions_of_the_kernel_say_where():
    with pytest.raises(ZeroDivisionError) as caught:
        Simulator().launch(divides, 4, 8, 13)
    note = caught.value.__notes__[0]
    assert "kernel divides, block (1, 0, 0), thread (5, 0, 0)" in note
    assert "return 1 // (n - cuda.grid(1))" in note


# ---------------------------------------------------------------------- functions


@cuda.jit(device=True)
def square(v):
    return v * v


def plain_helper(v):
    return square(v) + float32(cuda.laneid)


@cuda.jit(device=True)
def outer(v):
    return plain_helper(v) + square(v)


def make_scaler(factor, inner):
    @cuda.jit(device=True)
    def scale(v):
        return float32(factor) * inner(v)

    return scale


def make_kernel(function):
    @cuda.jit
    def kernel(x, out):
        i = cuda.grid(1)
        out[i] = function(x[i])

    return kernel


def test_device_functions_call_each_other_through_globals_and_closures(sim):
    kernel = make_kernel(make_scaler(3, outer))
    x, out = np.arange(8, dtype=np.float32), np.zeros(8, np.float32)
    sim.launch(kernel, 1, 8, x, out)
    assert out.tolist() == (3 * (2 * x * x + np.arange(8))).tolist()


@cuda.jit(device=True)
def countdown(n):
    return 0 if n == 0 else 1 + countdown(n - 1)


@cuda.jit
def recursive(out):
    out[0] = countdown(5)


def test_recursive_functions(sim):
    out = np.zeros(1, np.int64)
    sim.launch(recursive, 1, 1, out)
    assert out[0] == 5


@intrinsic
def ptx_pair_sum(typingctx, x):
    return None


def pair_sum_meaning(x):
    return x + cuda.shfl_xor_sync(FULL, x, 1)


ptx_pair_sum.simulated_as = pair_sum_meaning


@cuda.jit
def uses_intrinsic(x, out):
    i = cuda.grid(1)
    out[i] = ptx_pair_sum(x[i])


def test_intrinsics_run_as_their_python_meaning(sim):
    x, out = WARP.astype(np.float32), np.zeros(32, np.float32)
    sim.launch(uses_intrinsic, 1, 32, x, out)
    assert out.tolist() == (x + x[WARP ^ 1]).tolist()


def test_plain_functions_launch_too(sim):
    out = np.zeros(1, np.int64)
    sim.launch(recursive.py_func, 1, 1, out)
    assert out[0] == 5


# ---------------------------------------------------------------------- warp collectives


@cuda.jit
def shuffles(x, out):
    t = cuda.threadIdx.x
    v = x[t]
    out[0, t] = cuda.shfl_sync(FULL, v, (t * 3) % 40)
    out[1, t] = cuda.shfl_up_sync(FULL, v, 3)
    out[2, t] = cuda.shfl_down_sync(FULL, v, 5)
    out[3, t] = cuda.shfl_xor_sync(FULL, v, 6)


def test_shuffles(sim):
    x, out = np.arange(64, dtype=np.float32), np.zeros((4, 64), np.float32)
    sim.launch(shuffles, 1, 64, x, out)
    for base in (0, 32):
        part = out[:, base : base + 32] - base
        t = WARP + base
        assert part[0].tolist() == ((t * 3) % 40 % 32).tolist()
        assert part[1].tolist() == np.where(WARP < 3, WARP, WARP - 3).tolist()
        assert part[2].tolist() == np.where(WARP > 26, WARP, WARP + 5).tolist()
        assert part[3].tolist() == (WARP ^ 6).tolist()


@cuda.jit
def votes(out):
    t = cuda.threadIdx.x
    out[0, t] = cuda.all_sync(FULL, t < 31)
    out[1, t] = cuda.any_sync(FULL, t == 31)
    out[2, t] = cuda.eq_sync(FULL, t >= 0)
    out[3, t] = cuda.eq_sync(FULL, t > 3)
    out[4, t] = cuda.ballot_sync(FULL, t % 2)
    out[5, t] = cuda.match_any_sync(FULL, t % 3)
    mask, same = cuda.match_all_sync(FULL, 7)
    out[6, t] = mask if same else -1
    mask, same = cuda.match_all_sync(FULL, t)
    out[7, t] = -1 if same else mask
    out[8, t] = cuda.lanemask_lt()
    out[9, t] = cuda.all_sync(FULL, t < 32)


def test_votes_and_matches(sim):
    out = np.zeros((10, 32), np.int64)
    sim.launch(votes, 1, 32, out)
    assert [set(out[i]) for i in (0, 1, 2, 3, 9)] == [{0}, {1}, {1}, {0}, {1}]
    assert set(out[4]) == {0xAAAAAAAA}
    for lane in range(32):
        assert out[5, lane] == sum(1 << other for other in range(lane % 3, 32, 3))
        assert out[8, lane] == 2**lane - 1
    assert set(out[6]) == {FULL}
    assert set(out[7]) == {0}


@cuda.jit
def half_warps(out):
    t = cuda.threadIdx.x
    if t < 16:
        out[t] = cuda.ballot_sync(0xFFFF, True) + cuda.shfl_xor_sync(0xFFFF, t, 1)
    else:
        out[t] = cuda.ballot_sync(0xFFFF0000, t % 2 == 0)
    cuda.syncwarp()


def test_collectives_of_part_of_a_warp(sim):
    out = np.zeros(32, np.int64)
    sim.launch(half_warps, 1, 32, out)
    assert out[:16].tolist() == [0xFFFF + (t ^ 1) for t in range(16)]
    assert set(out[16:]) == {0x55550000}


@cuda.jit
def reads_absent_lane(out):
    t = cuda.threadIdx.x
    if t < 16:
        out[t] = cuda.shfl_down_sync(0xFFFF, float32(t), 8)


def test_a_lane_outside_the_mask_gives_nan(sim):
    out = np.zeros(32, np.float32)
    sim.launch(reads_absent_lane, 1, 32, out)
    assert out[:8].tolist() == list(range(8, 16))
    assert np.isnan(out[8:16]).all()


@cuda.jit
def short_last_warp(out):
    t = cuda.threadIdx.x
    out[t] = cuda.ballot_sync(FULL, True)


def test_a_short_last_warp(sim):
    out = np.zeros(40, np.int64)
    sim.launch(short_last_warp, 1, 40, out)
    assert set(out[:32]) == {FULL}
    assert set(out[32:]) == {0xFF}


@cuda.jit
def active(out):
    t = cuda.threadIdx.x
    if t % 4 == 0:
        out[t] = cuda.activemask()
    else:
        cuda.syncwarp(0xEEEEEEEE)
        out[t] = cuda.activemask()


def test_activemask_is_who_came_this_way(sim):
    out = np.zeros(32, np.int64)
    sim.launch(active, 1, 32, out)
    assert set(out[::4]) == {0x11111111}
    assert set(out[1::4]) | set(out[2::4]) | set(out[3::4]) == {0xEEEEEEEE}


@cuda.jit
def exchange(out):
    t = cuda.threadIdx.x
    values = cuda.exchange_sync(0xFFFF, t * t) if t < 16 else (None,)
    if t == 3:
        out[0] = values[15]
        out[1] = values[16] is None


def test_exchange_gives_all_lanes_values(sim):
    out = np.zeros(2, np.int64)
    sim.launch(exchange, 1, 32, out)
    assert out.tolist() == [225, 1]


# ---------------------------------------------------------------------- barriers


@cuda.jit
def reverse_often(x, out):
    tile = shared.array(96, float32)
    t = cuda.threadIdx.x
    v = x[cuda.grid(1)]
    for i in range(5):
        tile[t] = v + i
        cuda.syncthreads()
        v = tile[95 - t]
        cuda.syncthreads()
    out[cuda.grid(1)] = v


def test_syncthreads_orders_rounds(sim):
    x, out = np.arange(192, dtype=np.float32), np.zeros(192, np.float32)
    sim.launch(reverse_often, 2, 96, x, out)
    assert out.reshape(2, 96).tolist() == (x.reshape(2, 96)[:, ::-1] + 10).tolist()
    assert sim.launches[0].collectives == {"syncthreads": 20}


@cuda.jit
def barrier_votes(out):
    t = cuda.threadIdx.x
    out[0, t] = cuda.syncthreads_count(t % 3 == 0)
    out[1, t] = cuda.syncthreads_and(t < 63)
    out[2, t] = cuda.syncthreads_and(t < 64)
    out[3, t] = cuda.syncthreads_or(t == 5)
    out[4, t] = cuda.syncthreads_or(False)


def test_barriers_that_vote(sim):
    out = np.full((5, 64), -1)
    sim.launch(barrier_votes, 1, 64, out)
    assert [set(row) for row in out] == [{22}, {0}, {1}, {1}, {0}]


@cuda.jit
def grid_sum(x, partial, out):
    grid = cg.this_grid()
    b = cuda.blockIdx.x
    total = cuda.shfl_xor_sync(FULL, x[cuda.grid(1)], 0)
    for d in (16, 8, 4, 2, 1):
        total += cuda.shfl_xor_sync(FULL, total, d)
    if cuda.threadIdx.x == 0:
        partial[b] = total
    grid.sync()
    value = float32(0)
    for i in range(cuda.gridDim.x):
        value += partial[i]
    cuda.cg.this_grid().sync()
    out[cuda.grid(1)] = value


def test_grid_sync_over_several_blocks(sim):
    x, out = np.arange(128, dtype=np.float32), np.zeros(128, np.float32)
    sim.launch(grid_sum, 4, 32, x, np.full(4, np.nan, np.float32), out)
    assert set(out) == {x.sum()}
    assert sim.launches[0].collectives["grid.sync"] == 2


@cuda.jit
def waits_for_other_block(flag, out):
    if cuda.blockIdx.x == 0:
        while cuda.atomic.add(flag, 0, 0) == 0:
            cuda.nanosleep(100)
        out[0] = 5
    else:
        cuda.threadfence()
        cuda.atomic.add(flag, 0, 1)


@cuda.jit
def spin_lock(lock, out):
    while cuda.atomic.cas(lock, 0, 0, 1) != 0:
        pass
    cuda.threadfence()
    out[0] += 1
    cuda.threadfence()
    cuda.atomic.exch(lock, 0, 0)


def test_spinning_threads_let_others_run(sim):
    out = np.zeros(1, np.int32)
    sim.launch(waits_for_other_block, 3, 1, np.zeros(1, np.int32), out)
    assert out[0] == 5
    out[:] = 0
    sim.launch(spin_lock, 2, 8, np.zeros(1, np.int32), out)
    assert out[0] == 16


# ---------------------------------------------------------------------- arrays


@cuda.jit
def two_on_one_line(out):
    a, b = shared.array(4, float32), shared.array(4, float32)
    t = cuda.threadIdx.x
    a[t] = 1 + t
    b[t] = 10 * a[t]
    cuda.syncthreads()
    out[t] = a[3 - t] + b[t]


def test_two_shared_arrays_on_one_line_are_two(sim):
    out = np.zeros(4, np.float32)
    sim.launch(two_on_one_line, 1, 4, out)
    assert out.tolist() == [14, 23, 32, 41]


def make_swap(dtype):
    @cuda.jit(device=True)
    def swap(v, t):
        tile = cuda.shared.array(8, dtype)
        tile[t] = v
        cuda.syncthreads()
        swapped = tile[7 - t]
        cuda.syncthreads()
        return swapped

    return swap


swap_f32 = make_swap(float32)
swap_f64 = make_swap(float64)


@cuda.jit
def specialised_twice(out):
    t = cuda.threadIdx.x
    out[t] = swap_f32(float32(t), t) + 100 * swap_f64(float64(0.1) + t, t)


def test_one_declaration_in_two_specialisations_is_two_arrays(sim):
    out = np.zeros(8)
    sim.launch(specialised_twice, 1, 8, out)
    assert out == pytest.approx([7 - t + 100 * (7 - t + 0.1) for t in range(8)], abs=1e-9)


@cuda.jit
def dynamic_memory(n, out):
    whole = shared.array(0, float32)
    first, second = whole[:n], whole[n : 2 * n]
    integers = shared.array(0, int32)
    t = cuda.threadIdx.x
    first[t] = float32(1)
    second[t] = float32(t)
    cuda.syncthreads()
    out[t] = second[n - 1 - t] + first[t]
    out[n + t] = integers[t] == 0x3F800000
    if t == 0:
        out[2 * n] = whole.size


def test_dynamic_shared_memory_is_one_buffer_for_all_types(sim):
    out = np.zeros(9, np.float32)
    sim.launch(dynamic_memory, 1, 4, 4, out, shared_bytes=32)
    assert out.tolist() == [4, 3, 2, 1, 1, 1, 1, 1, 8]


TABLE = np.array([[1, 2], [3, 4]], np.float32)
SHAPE = (2, 3)


@cuda.jit
def local_and_const(out):
    table = cuda.const.array_like(TABLE)
    mine = cuda.local.array(SHAPE, float32)
    t = cuda.threadIdx.x
    for i in range(2):
        for j in range(3):
            mine[i, j] = table[i, j % 2] * t
    row = mine[1]
    out[t] = mine[0, 2] + row[1] + len(row)


def test_local_and_constant_arrays(sim):
    out = np.zeros(4, np.float32)
    sim.launch(local_and_const, 1, 4, out)
    assert out.tolist() == [3 + 5 * t for t in range(4)]


@cuda.jit
def five_dimensional(x, out):
    i = cuda.grid(1)
    n, c, d, h, w = x.shape
    if i < x.size and x.ndim == 5:
        iw = i % w
        ih = i // w % h
        id_ = i // (w * h) % d
        ic = i // (w * h * d) % c
        out[uint32(i // (w * h * d * c)), ic, id_, ih, iw] = x[0, ic, id_, ih, w - 1 - iw] + n


@pytest.mark.parametrize("layout", ["contiguous", "strided", "reversed"])
def test_five_dimensions_and_any_strides(sim, layout):
    x = np.arange(2 * 3 * 4 * 5 * 6, dtype=np.float32).reshape(2, 3, 4, 5, 6)
    x = {"contiguous": x, "strided": x[:, ::2, :, 1::2], "reversed": x[..., ::-1]}[layout]
    out = np.zeros_like(x)
    sim.launch(five_dimensional, 6, 128, x, out)
    assert np.array_equal(out, np.broadcast_to(x[:1, ..., ::-1] + 2, x.shape))


@cuda.jit
def flags(mask, out):
    t = cuda.threadIdx.x
    seen = shared.array(8, boolean)
    seen[t] = mask[t] and t > 1
    cuda.syncthreads()
    out[t] = seen[7 - t]


def test_bool_and_byte_arrays(sim):
    out = np.zeros(8, np.uint8)
    sim.launch(flags, 1, 8, np.array([1, 0] * 4, bool), out)
    assert out.tolist() == [0, 1, 0, 1, 0, 1, 0, 0]


def test_torch_tensors_are_changed_in_place(sim):
    x = torch.arange(12, dtype=torch.float32).reshape(3, 4).requires_grad_()
    out = torch.zeros(4, 3).t()
    sim.launch(doubled, 1, 12, x, out)
    assert torch.equal(out, x.detach() * 2)


@cuda.jit
def doubled(x, out):
    i = cuda.grid(1)
    out[i // 4, i % 4] = x[i // 4, i % 4] * float32(2)


@cuda.jit
def arguments(pair, scale, flag, nothing, out):
    out[0] = pair[1] * scale
    out[1] = flag and nothing is None
    out[2] = (out[0] / scale).dtype.itemsize


def test_tuples_numbers_and_none_as_arguments(sim):
    out = np.zeros(3, np.float32)
    sim.launch(arguments, 1, 1, (2, 3), 0.5, True, None, out)
    assert out.tolist() == [1.5, 1, 8]  # a Python float is a double, as it is for numba


# ---------------------------------------------------------------------- atomics


@cuda.jit
def atomics(ints, floats):
    t = cuda.grid(1)
    cuda.atomic.add(ints, 0, t)
    cuda.atomic.sub(ints, 1, t)
    cuda.atomic.max(ints, 2, t)
    cuda.atomic.min(ints, 3, -t)
    cuda.atomic.and_(ints, 4, ~(1 << (t % 8)))
    cuda.atomic.or_(ints, 5, 1 << (t % 8))
    cuda.atomic.xor(ints, 6, 3)
    cuda.atomic.inc(ints, 7, 9)
    cuda.atomic.dec(ints, 8, 9)
    cuda.atomic.add(floats, (0, 1), float32(0.5))
    cuda.atomic.nanmax(floats, (1, 0), float32(t))
    cuda.atomic.nanmin(floats, (1, 1), float32(t))


def test_atomic_arithmetic(sim):
    ints = np.array([0, 0, 0, 0, -1, 0, 0, 0, 3], np.int32)
    floats = np.array([[0, 0], [np.nan, np.nan]], np.float32)
    sim.launch(atomics, 2, 35, ints, floats)
    total = 69 * 70 // 2
    assert ints.tolist() == [total, -total, 69, -69, -256, 255, 0, 0, 3]
    assert floats.tolist() == [[0, 35], [69, 0]]


@cuda.jit
def swaps(word, old, out):
    t = cuda.threadIdx.x
    out[t] = cuda.atomic.exch(word, 0, t + 1)
    old[t] = cuda.atomic.compare_and_swap(word[1:], -1, t)
    out[t + 4] = cuda.atomic.cas(word, 2, t, t + 1)


def test_atomics_return_what_was_there():
    word, old, out = np.array([0, -1, 0], np.int32), np.zeros(4, np.int32), np.zeros(8, np.int32)
    Simulator().launch(swaps, 1, 4, word, old, out)
    assert word.tolist() == [4, 0, 4]
    assert old.tolist() == [-1, 0, 0, 0]
    assert out.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


# ---------------------------------------------------------------------- schedules and launches


@cuda.jit
def arrival_order(counter, order):
    order[cuda.atomic.add(counter, 0, 1)] = cuda.grid(1)


def orders(seed):
    order = np.zeros(96, np.int32)
    Simulator(schedule_seed=seed).launch(arrival_order, 3, 32, np.zeros(1, np.int32), order)
    return order.tolist()


def test_schedule_seed_shuffles_threads_and_blocks_reproducibly():
    assert orders(None) == list(range(96))
    assert orders(1) == orders(1) != orders(2)
    assert sorted(orders(1)) == list(range(96))
    assert len({thread // 32 for thread in orders(1)[:3]}) == 1  # blocks are not interleaved


@cuda.jit
def order_after_barrier(counter, order):
    cuda.syncthreads()
    order[cuda.atomic.add(counter, 0, 1)] = cuda.threadIdx.x


def test_the_order_is_drawn_anew_at_a_barrier():
    order = np.zeros(32, np.int32)
    Simulator(schedule_seed=1).launch(order_after_barrier, 1, 32, np.zeros(1, np.int32), order)
    assert sorted(order) == list(range(32))
    assert np.count_nonzero(order == np.arange(32)) < 16


@pytest.mark.parametrize("seed", range(5))
def test_correct_kernels_do_not_depend_on_the_schedule(seed):
    x, out = np.arange(192, dtype=np.float32), np.zeros(192, np.float32)
    Simulator(schedule_seed=seed).launch(reverse_often, 2, 96, x, out)
    assert out.reshape(2, 96).tolist() == (x.reshape(2, 96)[:, ::-1] + 10).tolist()


@pytest.mark.parametrize(
    ("grid", "block"), [(0, 1), (1, 0), (1, 1025), ((1, 1, 1, 1), 1), (1, (32, 33))]
)
def test_impossible_geometry_is_refused(grid, block):
    with pytest.raises(ValueError, match=r"grid|block"):
        Simulator().launch(recursive, grid, block, np.zeros(1))


def test_wrong_arguments_are_refused():
    with pytest.raises(TypeError, match="missing a required argument: 'out'"):
        Simulator().launch(recursive, 1, 1)
    with pytest.raises(TypeError, match="'out' is a list"):
        Simulator().launch(recursive, 1, 1, [1])


def test_bytes_need_counting():
    with pytest.raises(SimulationError, match="count=True"):
        _ = Simulator().bytes_read


def test_a_simulator_survives_a_failed_launch():
    sim = Simulator()
    with pytest.raises(ZeroDivisionError):
        sim.launch(divides, 1, 1, 0)
    out = np.zeros(1, np.int64)
    sim.launch(recursive, 1, 1, out)
    assert out[0] == 5
    assert [launch.kernel for launch in sim.launches] == ["recursive"]
