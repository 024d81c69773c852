"""Plain records that the compiler writes into generated code and that the runtime reads there.

Their ``repr`` is the code that makes them again, so every field is a literal or a dtype.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch

__all__ = ["ArgumentRecord", "BufferRecord", "Usage"]


class Usage:
    """How often an argument that compiled code checks was used in place or copied.

    Attributes:
        in_place: Number of calls that used it in place.
        copied: Number of calls that copied it.
        nbytes: Bytes of all these copies.
    """

    __slots__ = ("copied", "in_place", "nbytes")

    def __init__(self) -> None:
        self.in_place = self.copied = self.nbytes = 0


class BufferRecord(NamedTuple):
    """A symmetric buffer of a compiled graph. Its shape is passed at every call.

    Attributes:
        number: Number of the buffer within the graph.
        dtype: Element type.
        device: Name of the device.
        groups: Names of the groups that reach the buffer. The first group owns the memory.
        backend: Backend of a separate allocation; None for the group's arena.
        keep: Whether outgrown memory stays allocated, because a captured CUDA graph may still use it.
        op: An operator and its argument in the buffer, for messages.
    """

    number: int
    dtype: torch.dtype
    device: str
    groups: tuple[str, ...]
    backend: str | None
    keep: bool
    op: str = ""


class ArgumentRecord(NamedTuple):
    """An argument that compiled code checks at run time.

    Attributes:
        number: Number of the argument within the graph.
        group: Name of the operator's group.
        backend: Backend of a copy: see :class:`BufferRecord`.
        policy: ``"agree"``: the ranks compare, and use the argument in place if it is the same on all of them.
            ``"own"``: symmetric memory is used in place without comparing, because all ranks allocate it alike.
            ``"strict"``: like ``"own"``, but plain memory is an error. ``"copy"``: the argument is always copied.
        keep: Whether an outgrown copy stays allocated: see :class:`BufferRecord`.
        op: The operator and the argument, for messages.
    """

    number: int
    group: str
    backend: str | None
    policy: str
    keep: bool
    op: str
