"""Machine instructions that Python has no word for, each with its meaning in Python.

A function here is two things. To the compiler it is one PTX instruction (the decorator's text);
to a reader, and to the simulator, it is its own body. `simulated_as` ties the two together, so
the very same kernels run with and without a GPU. This is the only module that knows PTX.

Fragments: an ``m16n8`` matrix instruction is executed by a warp together. Lane ``l`` is in row
``l // 4`` ("group") and column ``l % 4`` of the operand tables in NVIDIA's "PTX ISA", section
"Matrix fragments for mma.m16n8k8 / m16n8k16"; the meanings below spell out who holds what.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cuda, float32, float64, int32, types, uint32
from numba.cuda.extending import intrinsic

FULL_WARP = 0xFFFFFFFF
WARP = 32

_IR_TYPES = {
    float32: ir.FloatType(),
    float64: ir.DoubleType(),
    int32: ir.IntType(32),
    uint32: ir.IntType(32),
    types.void: ir.VoidType(),
}


def instruction(
    assembly: str, constraints: str, signature: Any, *, side_effect: bool = False
) -> Callable[[Callable[..., Any]], Any]:
    """Make the decorated function, which is the meaning, an intrinsic that emits `assembly`.

    Parameters
    ----------
    assembly, constraints : str
        As in CUDA C++'s ``asm``, with ``$0`` for ``%0``; outputs come first.
    signature : numba signature
        Of scalars; several results are a `UniTuple`.
    side_effect : bool
        Whether the compiler must leave the instruction in its place.
    """
    results = signature.return_type
    several = isinstance(results, types.UniTuple)
    scalars = [results.dtype] * results.count if several else [results]

    def codegen(context: Any, builder: Any, _: Any, args: Any) -> Any:
        returned = [_IR_TYPES[t] for t in scalars]
        function = ir.FunctionType(
            ir.LiteralStructType(returned) if several else returned[0], [a.type for a in args]
        )
        code = ir.InlineAsm(function, assembly, constraints, side_effect=side_effect)
        value = builder.call(code, args)
        if not several:
            return context.get_dummy_value() if results == types.void else value
        parts = [builder.extract_value(value, i) for i in range(len(scalars))]
        return context.make_tuple(builder, results, parts)

    def decorate(meaning: Callable[..., Any]) -> Any:
        def definition(typingctx: Any, *args: Any) -> Any:
            return signature, codegen

        return _intrinsic(definition, meaning)

    return decorate


def memory(
    codegen: Callable[..., Any], result: Callable[[Any], Any], value: Any = None
) -> Callable[[Any], Any]:
    """Make the decorated function an intrinsic on ``(array, index, *values)``.

    `codegen` gets the builder, the element's pointer and the values; `result` maps the element
    type to the type of what comes back; `value` is the values' type, if not the element's.
    """

    def decorate(meaning: Callable[..., Any]) -> Any:
        def definition(typingctx: Any, array: Any, index: Any, *values: Any) -> Any:
            element = array.dtype
            returned = result(element)
            signature = returned(array, types.uint64, *[value or element] * len(values))

            def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                data = context.make_array(sig.args[0])(context, builder, args[0]).data
                pointer = builder.gep(data, [args[1]])
                found = codegen(builder, pointer, list(args[2:]))
                if not isinstance(returned, types.UniTuple):
                    return context.get_dummy_value() if found is None else found
                lanes = [
                    builder.extract_element(found, ir.Constant(ir.IntType(32), i))
                    for i in range(returned.count)
                ]
                return context.make_tuple(builder, returned, lanes)

            return signature, lower

        return _intrinsic(definition, meaning)

    return decorate


def _intrinsic(definition: Callable[..., Any], meaning: Callable[..., Any]) -> Any:
    """Numba reads the arguments off the definition's signature: the meaning's, after a context."""
    context = inspect.Parameter("typingctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(meaning).parameters.values()
    definition.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    definition.__name__ = definition.__qualname__ = meaning.__name__
    definition.__module__, definition.__doc__ = meaning.__module__, meaning.__doc__
    found: Any = intrinsic(definition)
    found.simulated_as = meaning
    return found


# ---- scalars ----------------------------------------------------------------------------------


@instruction("min.NaN.f32 $0, $1, $2;", "=f,f,f", float32(float32, float32))
def minimum_nan(a, b):
    """The smaller; NaN if either is NaN, as in PyTorch. One instruction, from sm_80 on."""
    return np.minimum(a, b)


@instruction("max.NaN.f32 $0, $1, $2;", "=f,f,f", float32(float32, float32))
def maximum_nan(a, b):
    """The larger; NaN if either is NaN."""
    return np.maximum(a, b)


@instruction("mov.b32 $0, $1;", "=r,f", uint32(float32))
def float_bits(value):
    """The 32 bits of a float."""
    return np.float32(value).view(np.uint32)


@instruction("mov.b32 $0, $1;", "=f,r", float32(uint32))
def bits_float(bits):
    """The float with these 32 bits."""
    return np.uint32(bits).view(np.float32)


@instruction("cvt.rna.tf32.f32 $0, $1;", "=r,f", uint32(float32))
def to_tf32(value):
    """Round to 10 fraction bits, ties away from zero: the operand format of `mma_tf32`."""
    bits = np.float32(value).view(np.uint32)
    if not np.isfinite(value):
        return bits
    return (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)


@instruction("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", uint32(float32, float32))
def pack_halves(low, high):
    """Round two floats to half precision and put them in one word."""
    return np.array([low, high], np.float32).astype(np.float16).view(np.uint32)[0]


@instruction(
    "{ .reg .b16 l, h; .reg .f32 x, y; cvt.rn.f16x2.f32 $0, $3, $2; mov.b32 {l, h}, $0; "
    "cvt.f32.f16 x, l; cvt.f32.f16 y, h; sub.f32 x, $2, x; sub.f32 y, $3, y; "
    "cvt.rn.f16x2.f32 $1, y, x; }",
    "=&r,=r,f,f",
    types.UniTuple(uint32, 2)(float32, float32),
)
def split_halves(low, high):
    """As `pack_halves`, and what that rounding left over as a second word of halves.

    Together the two halves of a value keep 22 bits of it.
    """
    values = np.array([low, high], np.float32)
    halves = values.astype(np.float16)
    rest = (values - halves.astype(np.float32)).astype(np.float16)
    return halves.view(np.uint32)[0], rest.view(np.uint32)[0]


@instruction("{ .reg .b32 low; mov.b64 {low, $0}, $1; }", "=r,d", uint32(float64))
def high_bits(value):
    """The upper 32 bits of a double."""
    return np.array([value], np.float64).view(np.uint32)[1]


@instruction("{ .reg .b32 high; mov.b64 {$0, high}, $1; }", "=r,d", uint32(float64))
def low_bits(value):
    """The lower 32 bits of a double."""
    return np.array([value], np.float64).view(np.uint32)[0]


@instruction("mov.b64 $0, {$1, $2};", "=d,r,r", float64(uint32, uint32))
def join_words(low, high):
    """The double of these bits."""
    return np.array([low, high], np.uint32).view(np.float64)[0]


# Read anew at each use, these keep the compiler from computing everything that depends on them
# before a long loop and spilling it for want of registers.


@instruction("mov.u32 $0, %tid.x;", "=r", uint32(), side_effect=True)
def thread_index():
    """``cuda.threadIdx.x``, not remembered."""
    return cuda.threadIdx.x


@instruction("mov.u32 $0, %laneid;", "=r", uint32(), side_effect=True)
def lane_index():
    """``cuda.laneid``, not remembered."""
    return cuda.laneid


@instruction("mov.b32 $0, $1;", "=r,r", int32(int32), side_effect=True)
def anew(value):
    """`value`; what depends on it is computed again, not kept in registers from before."""
    return value


# ---- memory -----------------------------------------------------------------------------------


def _vector_type(pointer: Any, lanes: int) -> Any:
    return ir.VectorType(pointer.type.pointee, lanes)


def _load_vector(lanes: int) -> Callable[..., Any]:
    def codegen(builder: Any, pointer: Any, _: Any) -> Any:
        vector = _vector_type(pointer, lanes)
        cast = builder.bitcast(pointer, vector.as_pointer())
        return builder.load(cast, align=4 * lanes)

    return codegen


def _store_vector(builder: Any, pointer: Any, values: list[Any]) -> None:
    vector = ir.Constant(_vector_type(pointer, len(values)), ir.Undefined)
    for lane, value in enumerate(values):
        vector = builder.insert_element(vector, value, ir.Constant(ir.IntType(32), lane))
    cast = builder.bitcast(pointer, vector.type.as_pointer())
    builder.store(vector, cast, align=4 * len(values))


@memory(_load_vector(4), lambda element: types.UniTuple(element, 4))
def load_4(array, index):
    """Four neighbours of a 4-byte type in one 128-bit load; `index` is a multiple of 4."""
    return array[index], array[index + 1], array[index + 2], array[index + 3]


@memory(_load_vector(2), lambda element: types.UniTuple(element, 2))
def load_2(array, index):
    """Two neighbours in one 64-bit load; `index` is even."""
    return array[index], array[index + 1]


@memory(_store_vector, lambda element: types.void)
def store_4(array, index, a, b, c, d):
    """Four neighbours in one 128-bit store."""
    array[index], array[index + 1], array[index + 2], array[index + 3] = a, b, c, d


@memory(_store_vector, lambda element: types.void)
def store_2(array, index, a, b):
    """Two neighbours in one 64-bit store."""
    array[index], array[index + 1] = a, b


def _from_element_on(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    array = context.make_array(sig.args[0])(context, builder, args[0])
    array.data = builder.gep(array.data, [args[1]])
    return array._getvalue()


def _beyond(meaning: Callable[..., Any]) -> Any:
    def definition(typingctx: Any, array: Any, first: Any) -> Any:
        return array(array, types.uint64), _from_element_on

    return _intrinsic(definition, meaning)


@_beyond
def beyond(array, first):
    """The array from element `first` on. A slice would be clamped to its end, in 64 bits."""
    return array[first:]


def _load_matrices(builder: Any, pointer: Any, _: Any) -> Any:
    shared = builder.addrspacecast(pointer, ir.PointerType(pointer.type.pointee, 3))
    word = ir.IntType(32)
    function = ir.FunctionType(ir.LiteralStructType([word] * 4), [word])
    assembly = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {$0, $1, $2, $3}, [$4];"
    code = ir.InlineAsm(function, assembly, "=r,=r,=r,=r,r,~{memory}", side_effect=True)
    found = builder.call(code, [builder.ptrtoint(shared, word)])
    words = ir.Constant(ir.VectorType(word, 4), ir.Undefined)
    for i in range(4):
        lane = ir.Constant(word, i)
        words = builder.insert_element(words, builder.extract_value(found, i), lane)
    return words


@memory(_load_matrices, lambda element: types.UniTuple(element, 4))
def load_matrices(array, index):
    """Four 8x8 matrices of halves from shared memory, transposed, spread over the warp.

    Lane ``8 i + r`` says where row r of matrix i begins: eight halves in four words, `index` a
    multiple of 4. Lane ``4 g + t`` gets, for each matrix, the halves in rows 2t and 2t + 1 of
    column g.
    """
    rows = cuda.exchange_sync(FULL_WARP, index)
    g, t = int(cuda.laneid) // 4, int(cuda.laneid) % 4
    found = []
    for i in range(0, WARP, 8):
        pair = [int(array[np.uint64(rows[i + 2 * t + r] + g // 2)]) for r in range(2)]
        low, high = (word >> 16 * (g % 2) & 0xFFFF for word in pair)
        found.append(np.uint32(low | high << 16))
    return tuple(found)


def _load_published(builder: Any, pointer: Any, _: Any) -> Any:
    address = builder.ptrtoint(pointer, ir.IntType(64))
    code = ir.InlineAsm(
        ir.FunctionType(ir.DoubleType(), [address.type]),
        "ld.relaxed.gpu.global.f64 $0, [$1];",
        "=d,l,~{memory}",
        side_effect=True,
    )
    return builder.call(code, [address])


def _publish(builder: Any, pointer: Any, values: list[Any]) -> None:
    address = builder.ptrtoint(pointer, ir.IntType(64))
    code = ir.InlineAsm(
        ir.FunctionType(ir.VoidType(), [address.type, ir.DoubleType()]),
        "st.relaxed.gpu.global.f64 [$0], $1;",
        "l,d,~{memory}",
        side_effect=True,
    )
    builder.call(code, [address, *values])


@memory(_publish, lambda element: types.void, float64)
def publish(array, index, value):
    """Store a double to two words for other blocks to see, now; `index` is even."""
    low, high = np.array([value], np.float64).view(np.uint32)
    cuda.atomic.exch(array, index, low)
    cuda.atomic.exch(array, index + 1, high)


@memory(_load_published, lambda element: float64)
def load_published(array, index):
    """Load a double from two words that another block may be publishing; `index` is even.

    Nothing else of what that block wrote is known to be visible.
    """
    high = cuda.atomic.add(array, index + 1, 0)
    low = cuda.atomic.add(array, index, 0)
    return np.array([low, high], np.uint32).view(np.float64)[0]


# ---- warps ------------------------------------------------------------------------------------


@instruction("redux.sync.max.u32 $0, $1, 0xffffffff;", "=r,r", uint32(uint32), side_effect=True)
def warp_max(value):
    """The largest of the warp's 32 words, in every lane. From sm_80 on."""
    return max(cuda.exchange_sync(FULL_WARP, value))


_MMA_CONSTRAINTS = "=f,=f,=f,=f,r,r,r,r,r,r,0,1,2,3"
_MMA_SIGNATURE = types.UniTuple(float32, 4)(*[uint32] * 6, *[float32] * 4)


@instruction(
    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$0, $1, $2, $3};",
    _MMA_CONSTRAINTS,
    _MMA_SIGNATURE,
)
def mma_half(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """``C + A @ B``: A 16x16 and B 16x8 of halves, C 16x8 of floats, spread over the warp.

    Lane ``4 g + t`` holds two halves a word: of A rows g (a0, a2) and g + 8 (a1, a3), columns
    2t, 2t + 1 (a0, a1) and 8 more (a2, a3); of B column g, rows 2t, 2t + 1 (b0) and 8 more (b1);
    of C rows g (c0, c1) and g + 8 (c2, c3), columns 2t and 2t + 1.
    """
    lane = (a0, a1, a2, a3, b0, b1), (c0, c1, c2, c3)
    return cuda.exchange_sync(FULL_WARP, lane, _sums_of_halves)[cuda.laneid]


@instruction(
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
    "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$0, $1, $2, $3};",
    _MMA_CONSTRAINTS,
    _MMA_SIGNATURE,
)
def mma_tf32(a0, a1, a2, a3, b0, b1, c0, c1, c2, c3):
    """``C + A @ B``: A 16x8 and B 8x8 in TF32, C 16x8 of floats.

    As `mma_half` with one value a word: column t of A for columns 2t, 2t + 1, column t + 4 for
    the 8 more, and the same for the rows of B.
    """
    lane = (a0, a1, a2, a3, b0, b1), (c0, c1, c2, c3)
    return cuda.exchange_sync(FULL_WARP, lane, _sums_of_tf32)[cuda.laneid]


FLOAT_BITS, NO_EXPONENT = 24, -1000
EXTRA_BITS = 2  # that a sum has below the last one of an fp32 value of the largest exponent


def _sums_of_halves(lanes):
    """What `mma_half` gives each lane."""
    return _sums(lanes, np.float16)


def _sums_of_tf32(lanes):
    """What `mma_tf32` gives each lane."""
    return _sums(lanes, np.float32)


def _sums(lanes, dtype):
    """Four results for each lane of a warp, from what each has of A, B and C.

    As an H200 adds them, to the last bit: products and C are shifted to the largest exponent among
    them (a product's is the sum of its factors'), what then lies below the sum's last bits is cut
    off, and so is the result's end. Errors all point towards zero: a long chain drifts.
    """
    words, sums = zip(*lanes, strict=True)
    values = np.array(words, np.uint32).view(dtype).reshape(8, 4, 6, -1).astype(np.float64)
    a = values[:, :, [[0, 2], [1, 3]]].transpose(2, 0, 1, 3, 4).reshape(2, 8, 1, -1)
    b = values[:, :, 4:].reshape(8, -1)  # (column, k); a is (rows up to 8 or beyond, row, 1, k)
    c = np.array(sums, np.float64).reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(2, 8, 8)
    products = a * b
    exponents = np.frexp(a)[1] + np.frexp(b)[1] - 1
    exponents = np.where(products == 0, NO_EXPONENT, exponents).max(axis=-1)
    exponents = np.maximum(exponents, np.where(c == 0, NO_EXPONENT, np.frexp(c)[1]))
    last_bit = np.ldexp(1.0, exponents - FLOAT_BITS - EXTRA_BITS)
    cut = np.trunc(products / last_bit[..., None]).sum(axis=-1) + np.trunc(c / last_bit)
    found = _towards_zero(cut * last_bit).reshape(2, 8, 4, 2).transpose(1, 2, 0, 3)
    return [tuple(of_lane) for of_lane in found.reshape(32, 4)]


def _towards_zero(values):
    """fp64 values in fp32, their ends cut off."""
    rounded = values.astype(np.float32)
    beyond = np.abs(rounded) > np.abs(values)
    return np.where(beyond, np.nextafter(rounded, np.float32(0)), rounded)


# ---- barriers of some of a block's warps, and registers that they hand to each other ------------


@instruction("bar.sync $0, $1;", "r,r,~{memory}", types.void(int32, int32), side_effect=True)
def barrier(which, threads):
    """Wait at barrier number `which` until `threads` threads are there or have arrived."""
    cuda.named_barrier(which, threads, True)


@instruction("bar.arrive $0, $1;", "r,r,~{memory}", types.void(int32, int32), side_effect=True)
def arrive(which, threads):
    """Be counted at a barrier without waiting: what was stored before is seen beyond it."""
    cuda.named_barrier(which, threads, False)


def _set_registers(direction: str, registers: int) -> Callable[[Callable[..., Any]], Any]:
    assembly = f"setmaxnreg.{direction}.sync.aligned.u32 {registers};"
    return instruction(assembly, "~{memory}", types.void(), side_effect=True)


@_set_registers("inc", 128)
def take_registers():
    """From here on a thread of these four warps has 128 registers, once others gave some back."""


@_set_registers("dec", 48)
def give_registers():
    """From here on a thread of these four warps has 48 registers."""


# ---- asynchronous copies ----------------------------------------------------------------------


def _copy_async(values: int) -> Callable[[Callable[..., Any]], Any]:
    size = 4 * values
    cache = "cg" if size == 16 else "ca"  # 16 bytes go past the first-level cache
    assembly = f"cp.async.{cache}.shared.global [$0], [$1], {size}, $2;"

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        target, target_index, source, source_index, inside = args
        shared = context.make_array(sig.args[0])(context, builder, target).data
        shared = builder.gep(shared, [target_index])
        shared = builder.addrspacecast(shared, ir.PointerType(shared.type.pointee, 3))
        data = context.make_array(sig.args[2])(context, builder, source).data
        data = builder.gep(data, [source_index])
        word, address = ir.IntType(32), ir.IntType(64)
        operands = [
            builder.ptrtoint(shared, word),
            builder.ptrtoint(data, address),
            builder.select(inside, ir.Constant(word, size), ir.Constant(word, 0)),
        ]
        function = ir.FunctionType(ir.VoidType(), [o.type for o in operands])
        code = ir.InlineAsm(function, assembly, "r,l,r,~{memory}", side_effect=True)
        builder.call(code, operands)
        return context.get_dummy_value()

    def decorate(meaning: Callable[..., Any]) -> Any:
        def definition(typingctx: Any, *args: Any) -> Any:
            target, _, source, _, _ = args
            kinds = (target, types.uint64, source, types.uint64, types.boolean)
            return types.void(*kinds), lower

        return _intrinsic(definition, meaning)

    return decorate


@_copy_async(4)
def copy_async_4(target, target_index, source, source_index, inside):
    """Start a 16-byte copy from global to shared memory; zeros if not `inside`."""
    for i in range(4):
        target[target_index + i] = source[source_index + i] if inside else 0


@_copy_async(1)
def copy_async_1(target, target_index, source, source_index, inside):
    """Start a 4-byte copy from global to shared memory; zero if not `inside`."""
    target[target_index] = source[source_index] if inside else 0


@instruction("cp.async.wait_all;", "~{memory}", types.void(), side_effect=True)
def wait_for_copies():
    """Wait until the copies this thread has started are done."""


# ---- bulk copies: the copy engine of sm_90 moves whole runs, and one thread asks for it ----------


def _copy_out(context: Any, builder: Any, sig: Any, args: Any) -> Any:
    target, target_index, source, source_index, values = args
    data = context.make_array(sig.args[0])(context, builder, target).data
    shared = context.make_array(sig.args[2])(context, builder, source).data
    shared = builder.gep(shared, [source_index])
    shared = builder.addrspacecast(shared, ir.PointerType(shared.type.pointee, 3))
    word, address = ir.IntType(32), ir.IntType(64)
    operands = [
        builder.ptrtoint(builder.gep(data, [target_index]), address),
        builder.ptrtoint(shared, word),
        builder.mul(values, ir.Constant(word, 4)),
    ]
    function = ir.FunctionType(ir.VoidType(), [o.type for o in operands])
    assembly = (
        "cp.async.bulk.global.shared::cta.bulk_group [$0], [$1], $2; cp.async.bulk.commit_group;"
    )
    code = ir.InlineAsm(function, assembly, "l,r,r,~{memory}", side_effect=True)
    builder.call(code, operands)
    return context.get_dummy_value()


def _bulk_copy(meaning: Callable[..., Any]) -> Any:
    def definition(typingctx: Any, *args: Any) -> Any:
        target, _, source, _, _ = args
        kinds = (target, types.uint64, source, types.uint64, types.int32)
        return types.void(*kinds), _copy_out

    return _intrinsic(definition, meaning)


@_bulk_copy
def copy_out(target, target_index, source, source_index, values):
    """Start copying a run of 4-byte values from shared to global memory.

    Both begin at multiples of 16 bytes, and the number of values is a multiple of 4. What other
    threads have staged must have been handed over: see `hand_to_copy_engine`.
    """
    for i in range(values):
        target[target_index + i] = source[source_index + i]


@instruction("fence.proxy.async.shared::cta;", "~{memory}", types.void(), side_effect=True)
def hand_to_copy_engine():
    """Let what this thread has stored to shared memory be seen by bulk copies; then a barrier."""


@instruction("cp.async.bulk.wait_group.read 0;", "~{memory}", types.void(), side_effect=True)
def wait_for_copies_out():
    """Wait until what this thread's bulk copies read may be overwritten."""
