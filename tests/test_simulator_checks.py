"""What the simulator refuses: deadlocks, races, bad indices, unwritten words; and whom it blames.

Each wrong kernel is one change away from a right one that is accepted.
"""

# numba declares its device API as empty classes, which no call in a kernel can satisfy:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportFunctionMemberAccess=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalSubscript=false

import re

import numpy as np
import pytest
from numba import cuda, float32, int32

from numba_fused.device import ptx
from numba_fused.simulator import (
    DeadlockError,
    OutOfBoundsError,
    RaceError,
    SimulationError,
    Simulator,
    UninitialisedReadError,
)

FULL = 0xFFFFFFFF
MODES = {
    "plain": {"check_races": False},
    "races": {},
    "count": {"count": True},
    "shuffled": {"schedule_seed": 3},
}


def zeros(n, dtype=np.float32):
    return np.zeros(n, dtype)


def words_of(error):
    return re.sub(r"\s+", " ", str(error.value))


# ---------------------------------------------------------------------- deadlocks


@cuda.jit
def returns_before_barrier(n):
    t = cuda.threadIdx.x
    if t >= n:
        return
    cuda.syncthreads()


@pytest.mark.parametrize("mode", MODES)
def test_a_returned_thread_is_missed_at_the_barrier(mode):
    sim = Simulator(**MODES[mode])
    sim.launch(returns_before_barrier, 2, 64, 64)
    with pytest.raises(DeadlockError) as error:
        sim.launch(returns_before_barrier, 2, 64, 40)
    text = words_of(error)
    assert re.search(r"returns_before_barrier, block \([01], 0, 0\)", text)
    assert re.search(
        r"threads 0-39 wait at syncthreads, \S+test_simulator_checks.py:\d+: cuda.syncthreads\(\)",
        text,
    )
    assert "threads 40-63 have returned" in text


@cuda.jit
def hands_on(out, arriving, waits, threads):
    """The first warp stores and arrives at barrier 3; the second waits there, and reads."""
    staged = cuda.shared.array(32, float32)
    t = cuda.threadIdx.x
    if t < 32:
        staged[t] = t
        if t < arriving:
            ptx.arrive(3, 64)
    elif waits:
        ptx.barrier(3, threads)
        out[t - 32] = staged[63 - t]
    else:
        ptx.arrive(3, threads)
        out[t - 32] = staged[63 - t]


@pytest.mark.parametrize("mode", MODES)
def test_who_waits_at_a_numbered_barrier_sees_what_was_stored_before(mode):
    out = zeros(32)
    Simulator(**MODES[mode]).launch(hands_on, 1, 64, out, 32, True, 64)
    assert out.tolist() == list(range(31, -1, -1))


def test_who_only_arrives_races():
    with pytest.raises(RaceError, match="staged"):
        Simulator(check_races=True).launch(hands_on, 1, 64, zeros(32), 32, False, 64)


@pytest.mark.parametrize("mode", MODES)
def test_a_thread_is_missed_at_a_numbered_barrier(mode):
    with pytest.raises(DeadlockError) as error:
        Simulator(**MODES[mode]).launch(hands_on, 1, 64, zeros(32), 31, True, 64)
    assert "threads 32-63 wait at barrier 3" in words_of(error)


def test_all_name_the_same_number_of_threads():
    with pytest.raises(SimulationError, match="barrier 3 was joined for 64 threads, and is now"):
        Simulator().launch(hands_on, 1, 64, zeros(32), 32, True, 96)


@cuda.jit
def two_barriers():
    if cuda.threadIdx.x % 2 == 0:
        cuda.syncthreads()
    else:
        cuda.syncthreads()


def test_different_barriers_do_not_match():
    with pytest.raises(DeadlockError) as error:
        Simulator().launch(two_barriers, 1, 4)
    first, second = re.findall(r"threads (\d, \d) wait at syncthreads", words_of(error))
    assert {first, second} == {"0, 2", "1, 3"}


@cuda.jit
def warp_and_block_wait(lane):
    if cuda.threadIdx.x < 32:
        cuda.syncwarp()
    cuda.syncthreads()
    if cuda.threadIdx.x == lane:
        cuda.syncwarp()


@pytest.mark.parametrize("lane", [3, 31])
def test_collective_with_missing_lanes(lane):
    with pytest.raises(DeadlockError, match=r"names lanes [0-9, -]+, which have returned"):
        Simulator().launch(warp_and_block_wait, 1, 64, lane)


@cuda.jit
def masks_differ():
    t = cuda.threadIdx.x
    cuda.syncwarp(0x3 if t == 0 else 0x7)


def test_lanes_with_different_masks_wait_forever():
    with pytest.raises(DeadlockError) as error:
        Simulator().launch(masks_differ, 1, 3)
    text = words_of(error)
    assert "syncwarp with mask 0x00000003 has lanes 0 of" in text
    assert "syncwarp with mask 0x00000007 has lanes 1-2 of" in text


@cuda.jit
def kinds_differ():
    t = cuda.threadIdx.x
    if t % 2:
        cuda.ballot_sync(FULL, True)
    else:
        cuda.any_sync(FULL, True)


def test_different_collectives_do_not_match():
    with pytest.raises(DeadlockError, match=r"any_sync.*\n.*ballot_sync|ballot_sync.*\n.*any_sync"):
        Simulator().launch(kinds_differ, 1, 32)


@cuda.jit
def not_in_own_mask():
    cuda.syncwarp(1)


def test_a_lane_must_be_in_its_own_mask():
    with pytest.raises(
        SimulationError, match=r"lane 1 is not in its own mask 0x00000001, in kernel"
    ):
        Simulator().launch(not_in_own_mask, 1, 32)


@cuda.jit
def block_leaves_grid(leaver):
    if cuda.blockIdx.x == leaver:
        return
    cuda.cg.this_grid().sync()


@pytest.mark.parametrize("leaver", [0, 2])
def test_a_block_that_returns_is_missed_at_the_grid_barrier(leaver):
    Simulator().launch(block_leaves_grid, 3, 4, -1)
    with pytest.raises(DeadlockError, match=r"1 of 3 blocks returned[^\n]*\n[^\n]*\n.*grid.sync"):
        Simulator().launch(block_leaves_grid, 3, 4, leaver)


@cuda.jit
def thread_leaves_grid():
    if cuda.threadIdx.x != 1:
        cuda.cg.this_grid().sync()


def test_a_thread_that_returns_is_missed_at_the_grid_barrier():
    with pytest.raises(DeadlockError, match=r"threads 0, 2-3 wait at grid.sync"):
        Simulator().launch(thread_leaves_grid, 1, 4)


@cuda.jit
def spins_forever(flag):
    while cuda.atomic.add(flag, 0, 0) == 0:
        cuda.nanosleep(10)


def test_spinning_on_what_never_comes():
    with pytest.raises(DeadlockError, match="spin"):
        Simulator(check_races=False).launch(spins_forever, 1, 1, zeros(1, np.int32))


# ---------------------------------------------------------------------- bounds


@cuda.jit
def shifted_copy(x, out, shift):
    i = cuda.grid(1)
    out[i] = x[i + shift]


@cuda.jit
def shifted_store(x, out, shift):
    i = cuda.grid(1)
    out[i + shift] = x[i]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kernel", "shift", "index", "thread", "array"),
    [
        (shifted_copy, 1, 8, 3, "x"),
        (shifted_copy, -1, -1, 0, "x"),
        (shifted_store, 1, 8, 3, "out"),
        (shifted_store, -1, -1, 0, "out"),
    ],
)
def test_global_index_out_of_bounds(mode, kernel, shift, index, thread, array):
    with pytest.raises(OutOfBoundsError) as error:
        Simulator(**MODES[mode]).launch(kernel, 2, 4, zeros(8), zeros(8), shift)
    text = words_of(error)
    assert f"index {index} is outside global array '{array}' (shape (8,), float32)" in text
    assert (
        f"kernel {kernel.py_func.__name__}, block ({index // 8}, 0, 0)".replace("-1", "0") in text
    )
    assert f"thread ({thread}, 0, 0), at" in text
    assert re.search(r"test_simulator_checks.py:\d+: out\[i", text)
    assert isinstance(error.value, IndexError)


@cuda.jit
def index_pair(x, i, j):
    x[i, j] += x[i, j]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("i", "j"), [(2, 0), (0, 3), (-1, 0), (0, -1)])
def test_each_axis_has_its_own_bound(mode, i, j):
    sim = Simulator(**MODES[mode])
    sim.launch(index_pair, 1, 1, zeros((2, 3)), 1, 2)
    with pytest.raises(OutOfBoundsError, match=re.escape(f"index ({i}, {j}) is outside")):
        sim.launch(index_pair, 1, 1, zeros((2, 3)), i, j)


@cuda.jit
def shared_out_of_bounds(n):
    tile = cuda.shared.array((4, 4), float32)
    tile[0, n] = 0


@cuda.jit
def local_out_of_bounds(n):
    mine = cuda.local.array(4, float32)
    mine[n] = 0


@cuda.jit
def slice_out_of_bounds(x, n):
    part = x[2:4]
    part[n] = 0


@pytest.mark.parametrize("mode", MODES)
def test_shared_local_and_sliced_bounds(mode):
    sim = Simulator(**MODES[mode])
    for kernel, match in [
        (shared_out_of_bounds, r"shared array 'tile' \(shape \(4, 4\), float32\)"),
        (local_out_of_bounds, r"local array 'mine' \(shape \(4,\), float32\)"),
    ]:
        sim.launch(kernel, 1, 1, 3)
        with pytest.raises(OutOfBoundsError, match=match):
            sim.launch(kernel, 1, 1, 4)
    sim.launch(slice_out_of_bounds, 1, 1, zeros(8), 1)
    with pytest.raises(OutOfBoundsError, match=r"a view of \(2,\)"):
        sim.launch(slice_out_of_bounds, 1, 1, zeros(8), 2)


@cuda.jit
def float_index(x):
    x[0.5] = 1


@cuda.jit
def too_many_indices(x):
    x[0, 0] = 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kernel", [float_index, too_many_indices])
def test_nonsensical_indices(mode, kernel):
    with pytest.raises(SimulationError, match=r"cannot index global array 'x'.*at .*x\[0"):
        Simulator(**MODES[mode]).launch(kernel, 1, 1, zeros(2))


TABLE = np.arange(4)


@cuda.jit
def writes_constant():
    table = cuda.const.array_like(TABLE)
    table[0] = 5


def test_constants_are_constant():
    with pytest.raises(SimulationError, match=r"const array 'table'.*read-only"):
        Simulator().launch(writes_constant, 1, 1)
    assert TABLE[0] == 0


# ---------------------------------------------------------------------- initialisation


@cuda.jit
def shared_half_written(out, n):
    tile = cuda.shared.array(8, float32)
    t = cuda.threadIdx.x
    if t < n:
        tile[t] = 1
    cuda.syncthreads()
    out[t] = tile[7 - t]


@cuda.jit
def local_half_written(out, n):
    mine = cuda.local.array((2, 8), float32)
    t = cuda.threadIdx.x
    for i in range(n):
        mine[1, i] = 1
    out[t] = mine[1, 7]


@cuda.jit
def dynamic_half_written(out, n):
    tile = cuda.shared.array(0, float32)
    t = cuda.threadIdx.x
    if t < n:
        tile[t] = 1
    cuda.syncthreads()
    out[t] = tile[7 - t]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("kernel", "what"),
    [
        (shared_half_written, "element 7 of shared array 'tile'"),
        (dynamic_half_written, "element 7 of shared array 'tile'"),
        (local_half_written, "element (1, 7) of local array 'mine'"),
    ],
)
def test_reading_what_nobody_wrote(mode, kernel, what):
    sim = Simulator(**MODES[mode])
    sim.launch(kernel, 1, 8, zeros(8), 8, shared_bytes=32)
    with pytest.raises(UninitialisedReadError) as error:
        sim.launch(kernel, 1, 8, zeros(8), 7, shared_bytes=32)
    text = words_of(error)
    assert what in text
    assert re.search(r"thread \(\d, 0, 0\), at \S+:\d+: out\[t\] = (tile|mine)\[", text)


@cuda.jit
def shared_of_previous_block(out):
    tile = cuda.shared.array(1, float32)
    if cuda.blockIdx.x == 0:
        tile[0] = 1
    out[cuda.blockIdx.x] = tile[0]


def test_blocks_do_not_inherit_shared_memory():
    with pytest.raises(UninitialisedReadError, match=r"block \(1, 0, 0\)"):
        Simulator().launch(shared_of_previous_block, 2, 1, zeros(2))


# ---------------------------------------------------------------------- races


@cuda.jit
def missing_barrier(out, wait):
    tile = cuda.shared.array(64, float32)
    t = cuda.threadIdx.x
    tile[t] = 0
    cuda.syncthreads()
    tile[t] = t
    if wait:
        cuda.syncthreads()
    out[t] = tile[t ^ 33]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_read_after_write_in_shared_memory(seed):
    sim = Simulator(schedule_seed=seed)
    sim.launch(missing_barrier, 1, 64, zeros(64), True)
    with pytest.raises(RaceError, match="shared array 'tile'"):
        sim.launch(missing_barrier, 1, 64, zeros(64), False)


@cuda.jit
def missing_second_barrier(out, wait):
    tile = cuda.shared.array(64, float32)
    t = cuda.threadIdx.x
    for i in range(2):
        tile[t] = t + i
        cuda.syncthreads()
        out[t] = tile[63 - t]
        if wait:
            cuda.syncthreads()


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_write_after_read_in_shared_memory_names_both_lines(seed):
    sim = Simulator(schedule_seed=seed)
    sim.launch(missing_second_barrier, 1, 64, zeros(64), True)
    with pytest.raises(RaceError) as error:
        sim.launch(missing_second_barrier, 1, 64, zeros(64), False)
    text = words_of(error)
    assert "of shared array 'tile' (shape (64,), float32) in kernel missing_second_barrier" in text
    reader = re.search(r"thread \((\d+), 0, 0\) reads it at \S+:\d+: out\[t\] = tile\[63", text)
    writer = re.search(r"thread \((\d+), 0, 0\) writes it at \S+:\d+: tile\[t\] = t \+ i", text)
    assert reader
    assert writer
    assert int(reader[1]) == 63 - int(writer[1])


@cuda.jit
def neighbour_in_warp(out, how):
    tile = cuda.shared.array(64, float32)
    t = cuda.threadIdx.x
    tile[t] = 0
    cuda.syncthreads()
    tile[t] = t
    if how == 1:
        cuda.syncwarp()
    neighbour = t ^ 1 if how < 2 else (t + 32) % 64
    if how == 2:
        cuda.syncwarp()
    if t % 2 or how == 2:
        out[t] = tile[neighbour]


def test_syncwarp_orders_one_warp_only():
    Simulator().launch(neighbour_in_warp, 1, 64, zeros(64), 1)
    with pytest.raises(RaceError):
        Simulator().launch(neighbour_in_warp, 1, 64, zeros(64), 0)
    with pytest.raises(RaceError):
        Simulator().launch(neighbour_in_warp, 1, 64, zeros(64), 2)


@cuda.jit
def last_reader_writes(out):
    tile = cuda.shared.array(1, float32)
    t = cuda.threadIdx.x
    if t == 0:
        tile[0] = 0
    cuda.syncthreads()
    out[t] = tile[0]
    if t == 0:  # the last to wake: the other one has read before
        tile[0] = 1


def test_a_writer_that_read_too_races_with_the_other_reader():
    Simulator().launch(last_reader_writes, 1, 1, zeros(1))
    with pytest.raises(RaceError, match=r"thread \(1, 0, 0\) reads it"):
        Simulator().launch(last_reader_writes, 1, 2, zeros(2))


@cuda.jit
def everyone_writes(out, stride):
    out[cuda.grid(1) // stride] = 1


def test_two_threads_write_one_global_word():
    Simulator().launch(everyone_writes, 2, 4, zeros(8), 1)
    with pytest.raises(RaceError, match=r"element 0 of global array 'out'"):
        Simulator().launch(everyone_writes, 2, 4, zeros(8), 2)
    with pytest.raises(RaceError, match=r"block \(0, 0, 0\).*\n.*block \(1, 0, 0\)"):
        Simulator().launch(everyone_writes, 2, 1, zeros(8), 2)


@cuda.jit
def reads_other_block(x, out, sync):
    i = cuda.grid(1)
    x[i] = i
    if sync == 1:
        cuda.syncthreads()
    elif sync == 2:
        cuda.cg.this_grid().sync()
    out[i] = x[x.size - 1 - i]


def test_only_a_grid_barrier_orders_blocks():
    Simulator().launch(reads_other_block, 2, 4, zeros(8), zeros(8), 2)
    Simulator().launch(reads_other_block, 1, 8, zeros(8), zeros(8), 1)
    for blocks, sync in [(2, 0), (2, 1), (1, 0)]:
        with pytest.raises(RaceError, match="global array 'x'"):
            Simulator().launch(reads_other_block, blocks, 8 // blocks, zeros(8), zeros(8), sync)


@cuda.jit
def in_place_shift(x, y):
    i = cuda.grid(1)
    y[i] = x[i] + float32(1)


def test_arguments_that_overlap_are_seen_through():
    memory = zeros(9)
    Simulator().launch(in_place_shift, 1, 8, memory[:8], memory[:8])
    assert memory[:8].tolist() == [1] * 8
    with pytest.raises(RaceError):
        Simulator().launch(in_place_shift, 1, 8, memory[:8], memory[1:])


@cuda.jit
def histogram(data, out, wait):
    bins = cuda.shared.array(4, int32)
    t = cuda.threadIdx.x
    if t < 4:
        bins[t] = 0
    cuda.syncthreads()
    cuda.atomic.add(bins, data[t], 1)
    if wait:
        cuda.syncthreads()
    if t < 4:
        out[t] = bins[t]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_atomics_exempt_only_each_other(seed):
    data, out = np.arange(64) % 4, zeros(4)
    Simulator(schedule_seed=seed).launch(histogram, 1, 64, data, out, True)
    assert out.tolist() == [16] * 4
    with pytest.raises(RaceError, match="updates it atomically"):
        Simulator(schedule_seed=seed).launch(histogram, 1, 64, data, out, False)


@cuda.jit
def last_block_sums(x, partial, counter, out, fence):
    last = cuda.shared.array(1, int32)
    t, b = cuda.threadIdx.x, cuda.blockIdx.x
    partial[b, t] = x[b, t]
    if fence == 1:
        cuda.threadfence()
    cuda.syncthreads()
    if t == 0:
        if fence == 2:
            cuda.threadfence()
        last[0] = cuda.atomic.add(counter, 0, 1) == cuda.gridDim.x - 1
    cuda.syncthreads()
    if last[0]:
        total = float32(0)
        for i in range(cuda.gridDim.x):
            total += partial[i, t]
        out[t] = total
        if t == 0:
            counter[0] = 0


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("fence", [0, 1, 2])
def test_last_block_pattern_needs_a_fence(seed, fence):
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    counter, out = zeros(1, np.int32), zeros(4)
    sim = Simulator(schedule_seed=seed)
    if fence:
        sim.launch(last_block_sums, 3, 4, x, zeros((3, 4)), counter, out, fence)
        assert out.tolist() == x.sum(axis=0).tolist()
        assert counter[0] == 0
    else:
        with pytest.raises(RaceError, match="global array 'partial'"):
            sim.launch(last_block_sums, 3, 4, x, zeros((3, 4)), counter, out, fence)


@cuda.jit
def fence_without_barrier(partial, counter, out):
    t, b = cuda.threadIdx.x, cuda.blockIdx.x
    partial[b, t] = 1
    arrived = 0
    if t == 63:
        cuda.threadfence()
        arrived = cuda.atomic.add(counter, 0, 1) + 1
    if cuda.syncthreads_or(arrived == cuda.gridDim.x):
        out[t] = partial[0, t]


def test_one_threads_fence_does_not_release_the_others_writes():
    with pytest.raises(RaceError, match="global array 'partial'"):
        Simulator().launch(
            fence_without_barrier, 2, 64, zeros((2, 64)), zeros(1, np.int32), zeros(64)
        )


@cuda.jit
def producer_consumer_warps(out):
    box = cuda.shared.array(1, float32)
    ready = cuda.shared.array(1, int32)
    t = cuda.threadIdx.x
    if t == 0:
        ready[0] = 0
    cuda.syncthreads()
    if t == 40:
        box[0] = 7
        cuda.threadfence_block()
        cuda.atomic.exch(ready, 0, 1)
    if t == 0:
        while cuda.atomic.add(ready, 0, 0) == 0:
            pass
        out[0] = box[0]


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_warps_may_hand_over_through_an_atomic_flag(seed):
    out = zeros(1)
    Simulator(schedule_seed=seed).launch(producer_consumer_warps, 1, 64, out)
    assert out[0] == 7


@cuda.jit
def broadcast_through_shared(x, out):
    total = cuda.shared.array(1, float32)
    partial = cuda.shared.array(2, float32)
    t = cuda.threadIdx.x
    for i in range(3):
        v = x[cuda.grid(1)] + i
        for d in (16, 8, 4, 2, 1):
            v += cuda.shfl_down_sync(FULL, v, d)
        if t % 32 == 0:
            partial[t // 32] = v
        cuda.syncthreads()
        if t == 0:
            total[0] = partial[0] + partial[1]
        cuda.syncthreads()
        out[cuda.grid(1)] = total[0]


@pytest.mark.parametrize("seed", [None, *range(5)])
def test_a_correct_block_reduction_is_accepted(seed):
    x, out = np.ones(128, np.float32), zeros(128)
    Simulator(schedule_seed=seed, count=True).launch(broadcast_through_shared, 2, 64, x, out)
    assert set(out) == {64 + 64 * 2}


def test_races_are_not_looked_for_when_not_wanted():
    out = zeros(8)
    Simulator(check_races=False).launch(everyone_writes, 2, 4, out, 2)
    assert out.tolist() == [1] * 4 + [0] * 4
