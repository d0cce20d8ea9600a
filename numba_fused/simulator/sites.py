"""From a running frame to the place in the kernel's source that a reader wants to see."""

import dis
import linecache
import os
from functools import lru_cache
from types import CodeType, FrameType, TracebackType

HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


@lru_cache(maxsize=4096)
def line_number(code: CodeType, lasti: int) -> int:
    """Source line of the instruction at byte offset `lasti` of `code`."""
    for start, end, line in code.co_lines():
        if start <= lasti < end and line is not None:
            return line
    return code.co_firstlineno


def source_text(filename: str, line: int) -> str:
    """The source line without indentation; empty where the source is gone."""
    return linecache.getline(filename, line).strip()


def describe(code: CodeType, lasti: int) -> str:
    """``file:line: text`` of one instruction."""
    line = line_number(code, lasti)
    return f"{code.co_filename}:{line}: {source_text(code.co_filename, line)}"


@lru_cache(maxsize=1024)
def assigned_name(code: CodeType, lasti: int) -> str:
    """Name of the variable that receives the value of the call at `lasti`, or its line number."""
    for instruction in dis.get_instructions(code):
        if instruction.offset > lasti:
            if instruction.opname.startswith(("STORE_FAST", "STORE_DEREF")):
                stored = instruction.argval  # from 3.13 on, a pair of names for a fused pair
                return stored if isinstance(stored, str) else stored[0]
            break
    return f"line {line_number(code, lasti)}"


def innermost_kernel_frame(traceback: TracebackType | None) -> tuple[CodeType, int] | None:
    """The deepest (code, offset) of a traceback that is not the simulator's own."""
    found = None
    while traceback is not None:
        code = traceback.tb_frame.f_code
        if not code.co_filename.startswith(HERE):
            found = code, traceback.tb_lasti
        traceback = traceback.tb_next
    return found


class Places:
    """Turns frames into places in the kernel's own source.

    Attributes
    ----------
    transparent : set of int
        Ids of code objects to look through: the simulator's own and the meanings of intrinsics.
    """

    def __init__(self, transparent: set[int]):
        self.transparent = transparent
        self._starts: dict[int, tuple[CodeType, list[int]]] = {}

    def outside(self, frame: FrameType | None) -> tuple[FrameType, FrameType | None]:
        """Climb to the kernel's source.

        Returns
        -------
        frame : FrameType
            The frame to blame.
        call : FrameType or None
            The outermost transparent frame, if any: one call of an intrinsic is one memory
            request, however many elements its Python meaning touches.
        """
        call = None
        while frame is not None and id(frame.f_code) in self.transparent:
            call, frame = frame, frame.f_back
        assert frame is not None
        return frame, call

    def __call__(self, frame: FrameType) -> tuple[CodeType, int]:
        """The instruction of the kernel's source that `frame` is at."""
        frame, _ = self.outside(frame)
        return frame.f_code, self.instruction(frame)

    def instruction(self, frame: FrameType) -> int:
        """Offset of the running instruction.

        CPython's ``f_lasti`` points at the instruction or at one of the cache entries behind it,
        depending on whether the interpreter has specialised it yet.
        """
        return self.starts(frame.f_code)[frame.f_lasti >> 1]

    def starts(self, code: CodeType) -> list[int]:
        """For each code unit (2 bytes), the offset of the instruction it belongs to."""
        known = self._starts.get(id(code))
        if known is None:
            starts, last = [], 0
            offsets = {instruction.offset for instruction in dis.get_instructions(code)}
            for offset in range(0, len(code.co_code), 2):
                last = offset if offset in offsets else last
                starts.append(last)
            known = self._starts[id(code)] = (code, starts)
        return known[1]
