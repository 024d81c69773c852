"""A block of symmetric memory: the part of an allocation that one tensor uses."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from symmem.backends.base import tensor_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from symmem.backends.base import Allocation, Mapping, RankGroup, Signals
    from symmem.group.call_site import CallSite
    from symmem.group.group import Group
    from symmem.memory.layout import Layout

__all__ = ["Block", "current_process"]

current_process = os.getpid()
"""The id of this process, also in a forked child."""


def _update_process() -> None:
    global current_process
    current_process = os.getpid()


os.register_at_fork(after_in_child=_update_process)


class Block:
    """A block of symmetric memory. Its handles and all tensors over it refer to it and keep it alive.

    Args:
        allocation: The backend's memory that contains the block.
        layout: The requested layout. As in every layout, its offset counts from the beginning of the block.
        offset: Bytes from the beginning of the allocation.
        nbytes: Bytes of the block; by default, of the whole allocation.
        site: Where the program allocated it. For a block of an arena, the allocation log knows this and the name.
        name: The program's name for it.

    Attributes:
        pointer: Address of its first byte in this process.
        mappings: Every rank's memory, by the group that rendezvoused.
        first: The first group that rendezvoused the block explicitly. It is the default group of the tensor. None
            before.
        compared: The layouts that all ranks of a group have compared. A group alone stands for the layout of the
            block; a pair stands for the group and another layout.
        process: The process that allocated it. A forked child is not a rank.
        closed: Whether a handle was closed.
    """

    __slots__ = (
        "__weakref__",
        "allocation",
        "closed",
        "compared",
        "first",
        "layout",
        "mappings",
        "name",
        "nbytes",
        "offset",
        "pointer",
        "process",
        "site",
    )

    def __init__(
        self,
        allocation: Allocation,
        layout: Layout,
        offset: int = 0,
        nbytes: int | None = None,
        site: CallSite | None = None,
        name: str | None = None,
    ) -> None:
        self.allocation, self.layout, self.offset = allocation, layout, offset
        self.site, self.name = site, name
        self.nbytes = allocation.nbytes if nbytes is None else nbytes
        self.pointer = allocation.pointer + offset
        # These two are replaced, never changed, because all blocks of an arena share the initial ones.
        self.mappings: dict[Group, Mapping] = {}
        self.compared: frozenset[Group | tuple[Group, Layout]] = frozenset()
        self.first: Group | None = None
        self.process = current_process
        self.closed = False

    @property
    def end(self) -> int:
        """Bytes from the beginning of the allocation to the end of the block."""
        return self.offset + self.nbytes

    @property
    def groups(self) -> list[Group]:
        """The groups that rendezvoused the block, ``first`` first. An arena's group counts for all its blocks."""
        return sorted(self.mappings, key=lambda group: group is not self.first)

    @property
    def diverged(self) -> bool:
        """Whether :meth:`check_acts` must look: a rank has found a difference, or this rank is far ahead of another."""
        return False

    def before_access(self, group: RankGroup, rank: int | None = None) -> None:
        """Compare the allocations with a rank, before this rank uses its memory. Local.

        If that rank has not allocated the block yet, wait for it a moment. Afterwards it compares itself, and raises a
        difference in its allocation.

        Args:
            group: A group of the block.
            rank: The rank; None for all ranks.

        Raises:
            DivergenceError: They differ.
        """

    def check_acts(self, late: Sequence[int] = (), group: RankGroup | None = None) -> None:
        """Compare the allocations of the ranks from the arena of the block, as far as this is possible locally.

        Args:
            late: Ranks of ``group`` that have not come to a barrier in time.
            group: A group of the block.

        Raises:
            DivergenceError: They differ.
        """

    @property
    def inherited(self) -> bool:
        """Whether this process was forked after the allocation."""
        return self.process != current_process

    def at(self, address: int) -> Block | None:
        """This block; see :class:`symmem.memory.registry.AddressRange`."""
        return self

    def tensor(self) -> torch.Tensor:
        """This rank's memory as a uint8 tensor of shape [nbytes] that keeps the block alive."""
        return tensor_at(self.pointer, self.nbytes, self.allocation.device, self)

    def part(self, memory: torch.Tensor) -> torch.Tensor:
        """This block's slice of ``memory``, a uint8 tensor over a whole allocation."""
        return memory[self.offset : self.end]

    def mapping_for(self, group: Group) -> Mapping | None:
        """Every rank's memory, if the group has rendezvoused this block or the memory around it."""
        return self.mappings.get(group)

    @property
    def home(self) -> tuple[str, int, int] | None:
        """The group of the arena: its name, its size, and this rank. None for a block outside of arenas."""
        return None

    def dropped_pads(self, group: Group) -> list[int] | None:
        """Slots of tensors that this rank has dropped, but that still hold a signal pad for ``group``.

        None if the group's signal pads come with the mapping. Then the next two methods are not called.
        """
        return None

    def free_pads(self, group: Group, slots: Sequence[int]) -> None:
        """Free the signal pads of tensors that all ranks of a group have dropped."""

    def pad_for(self, group: Group) -> int:
        """Offset of this rank's signal pad for a group; the first call takes a pad."""
        raise NotImplementedError

    def enter(self, group: Group, mapping: Mapping, pads: Sequence[int]) -> None:
        """Note that a group has rendezvoused. ``pads`` holds every rank's :meth:`pad_for`, or is empty."""
        self.mappings = {**self.mappings, group: mapping}

    def signals(self, mapping: Mapping) -> Signals:
        """The signals of the block, in the group of one of its mappings."""
        return mapping

    def pads(self, mapping: Mapping) -> list[int]:
        """The address of every rank's signal pad in this process; 0 for a rank that is not reachable."""
        signals = self.signals(mapping)
        return [signals.signal_pad(rank)[0] if pointer else 0 for rank, pointer in enumerate(mapping.pointers)]

    def key(self, group: Group, layout: Layout) -> Group | tuple[Group, Layout]:
        """The member of ``compared`` that stands for a group and a layout."""
        return group if layout is self.layout else (group, layout)

    def close(self) -> None:
        """Release the peers' memory. This rank's memory is freed with the last reference."""
        self.closed = True
        self.mappings, self.compared = {}, frozenset()
