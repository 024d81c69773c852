"""Signal pads of backend ``native``: small slots of one block of GPU memory for each group and GPU.

The driver shares memory in granules of 2 MiB, and exporting, importing and mapping one takes it 0.3 ms or more, one
process of the host after the other. A pad needs a few hundred bytes. So a rank cuts a granule into slots, its peers
map that once, and a later rendezvous of the group only says which slot it uses; a rank makes another block when it
has no free slot.

A block is sent until its owner knows that all peers have mapped it: a rendezvous that failed half-way, on any rank,
leaves blocks that some have and some have not. Who has it already ignores it. Blocks live as long as the group.

A block also keeps the driver warm, measured on 4 H200s: while some mapping of a peer's memory lives, importing 64 MiB
from three peers and setting access takes 0.6 ms instead of 15; while some exported descriptor is open, exporting takes
0.2 ms instead of 2.7.

A slot is zeroed when it is taken. It comes free when this rank's mapping is gone and its kernels are done, which says
nothing of a peer's: one that sets a signal nobody waits for could still do so. Hence the slots that came free last
are used last, hundreds of rendezvous later or more.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from symmem.backends.base import Group
from symmem.backends.gpu_cards import cannot_map
from symmem.backends.vmm import DeviceRange, MemoryHandle, Token
from symmem.errors import SymmemError

__all__ = ["PadBlock", "GroupPads", "Slot", "mapping_order"]

_numbers = itertools.count()  # never used twice in a process, so that a peer can't take one block for another


class PadBlock:
    """This rank's memory for pads.

    Args:
        handle: The memory; kept, for a fabric handle can be imported only while its exporter has this.
        region: Its mapping in this process.

    Attributes:
        number: What peers know it by.
        shared: Whether all peers are known to have mapped it.
    """

    def __init__(self, handle: MemoryHandle, region: DeviceRange) -> None:
        self.number = next(_numbers)
        self.handle, self._region = handle, region
        self.address, self.nbytes = region.pieces[0]
        self.shared = False


class Slot:
    """A pad of this rank, taken from a block."""

    def __init__(self, block: PadBlock, offset: int, give_back: Callable[[], None]) -> None:
        self.block, self.address = block, block.address + offset
        # Called by the collector as well, on any thread: appending to a deque is one step.
        self.give_back = give_back
        self.card = (block.number, offset, block.nbytes)

    @property
    def handles(self) -> tuple[MemoryHandle, ...]:
        """What peers may not have yet."""
        return () if self.block.shared else (self.block.handle,)


class GroupPads:
    """The blocks of all ranks of one group, as this rank has them on one GPU.

    It does not refer to the group, with which it shall go. Within a collective of the group, of which there is one at
    a time, nobody else uses it; but for slots that come free.
    """

    def __init__(self) -> None:
        self._free: deque[tuple[PadBlock, int]] = deque()
        self._peers: dict[tuple[int, int], tuple[int, DeviceRange]] = {}  # by rank and number: address and its owner

    def take(self, nbytes: int, make: Callable[[], PadBlock]) -> Slot:
        """A slot of ``nbytes``, always the same; ``make`` makes a block if there is none."""
        if not self._free:
            block = make()
            self._free += ((block, offset) for offset in range(0, block.nbytes - nbytes + 1, nbytes))
        taken = self._free.popleft()
        return Slot(*taken, functools.partial(self._free.append, taken))

    def map(
        self,
        cards: Sequence[dict[str, Any]],
        tokens: Sequence[tuple[Token, ...]],
        group: Group,
        reserve: Callable[[int], DeviceRange],
    ) -> None:
        """Map the blocks that came and that this rank has not, all in one range.

        Args:
            cards: Of each rank; ``"pad"`` is its :attr:`Slot.card`.
            tokens: Each rank's memory, and :attr:`Slot.handles`.
            group: The group.
            reserve: Makes a range of so many bytes.
        """
        others = [rank for rank in mapping_order(group) if len(tokens[rank]) > 1]
        new = [rank for rank in others if (rank, cards[rank]["pad"][0]) not in self._peers]
        if not new:
            return
        with contextlib.ExitStack() as undo:
            region = reserve(sum(cards[rank]["pad"][2] for rank in new))
            undo.callback(region.close)
            end, mapped = 0, {}
            try:
                for rank in new:
                    number, _offset, nbytes = cards[rank]["pad"]
                    mapped[rank, number] = region.place(end, tokens[rank][1], nbytes), region
                    end += nbytes
                region.open()
            except SymmemError as error:
                raise cannot_map(error, region, new, cards, group) from error
            self._peers |= mapped
            undo.pop_all()

    def addresses(self, cards: Sequence[dict[str, Any]], group: Group, own: Slot) -> tuple[int, ...]:
        """Address of each rank's pad in this process."""
        pads = [card["pad"] for card in cards]
        return tuple(
            own.address if rank == group.rank else self._peers[rank, number][0] + offset
            for rank, (number, offset, _nbytes) in enumerate(pads)
        )


def mapping_order(group: Group) -> list[int]:
    """The peers in the order in which this rank maps their memory: the next one first.

    So the ranks do not all work on the same GPU's memory at a time.
    """
    return [(group.rank + i) % group.size for i in range(1, group.size)]
