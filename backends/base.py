"""The contract between symmem and a backend.

A backend knows how to make, export and map memory; it knows nothing of shapes, dtypes or handles. Of the group
it sees only :class:`Group` and :class:`Collective`. A new backend subclasses three classes:

* :class:`Backend`: ``probe``, ``allocate`` and the one collective hook, ``rendezvous``;
* :class:`Allocation`: this rank's memory; it is freed when the last tensor over it is gone;
* :class:`Mapping`: every rank's memory as this rank sees it, plus whatever the ``capabilities`` promise.

What a backend does not list in ``capabilities`` needs no code: the methods below raise the named error.
"""

from __future__ import annotations

import abc
import contextlib
import enum
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch

from symmem.errors import MulticastUnavailableError, UnsupportedError

if TYPE_CHECKING:
    from symmem.backends.descriptors import Received
    from symmem.config import Settings

__all__ = [
    "SIGNAL_CHANNELS",
    "Allocation",
    "Backend",
    "Capability",
    "Collective",
    "Group",
    "Mapping",
    "Signals",
    "storage_at",
    "tensor_at",
]

SIGNAL_CHANNELS = 64
"""Independent channels of ``barrier``, ``put_signal`` and ``wait_signal`` of each tensor and group."""


class Capability(enum.Flag):
    """What a backend can do beyond allocating and rendezvousing."""

    REMOTE_TENSOR = enum.auto()
    """Peers' memory is load/store reachable: ``remote_tensor`` and ``remote_pointers``."""
    CONTIGUOUS_VIEW = enum.auto()
    """All ranks' memory in one address range: ``contiguous_view``."""
    MULTICAST = enum.auto()
    """One address that stores to, or reduces over, all ranks: ``multicast_ptr``."""
    SIGNALS = enum.auto()
    """``barrier``, ``put_signal`` and ``wait_signal``."""
    ONE_SIDED = enum.auto()
    """``put`` and ``get``, also where peers are not load/store reachable."""
    MULTI_HOST = enum.auto()
    """A group may span hosts."""
    SECOND_GROUP = enum.auto()
    """The same memory can be rendezvoused over several groups."""
    COLLECTIVE_ALLOCATION = enum.auto()
    """A limitation: all ranks of the job must allocate together, with the same size, in the same order."""


class Signals(Protocol):
    """Barrier and signals over the pads of all ranks; a :class:`Mapping` is one too."""

    def barrier(self, channel: int, timeout: float) -> None:
        """See :meth:`Mapping.barrier`."""

    def put_signal(self, rank: int, channel: int, timeout: float) -> None:
        """See :meth:`Mapping.put_signal`."""

    def wait_signal(self, rank: int, channel: int, timeout: float) -> None:
        """See :meth:`Mapping.wait_signal`."""

    def check(self) -> None:
        """See :meth:`Mapping.check`."""

    def signal_pad(self, rank: int) -> tuple[int, int]:
        """See :meth:`Mapping.signal_pad`."""


class Group(Protocol):
    """What a backend may know of a group of ranks."""

    @property
    def name(self) -> str:
        """Name of the group, for messages."""

    @property
    def rank(self) -> int:
        """This process's rank within the group."""

    @property
    def size(self) -> int:
        """Number of ranks."""

    @property
    def settings(self) -> Settings:
        """The configuration that applies to this group."""

    @property
    def process_group(self) -> Any:
        """The ``torch.distributed.ProcessGroup``, or None for a group made from a store alone."""

    def lost(self) -> tuple[int, ...]:
        """Ranks whose process is known to have ended. Costs a few microseconds, never blocks."""

    def collective(self, operation: str, timeout: float | None = None) -> contextlib.AbstractContextManager[Collective]:
        """Begin a collective operation; all ranks must. For what a mapping sets up later, such as multicast.

        Args:
            operation: Named in errors; the same on all ranks.
            timeout: Seconds; None for the configured ``rendezvous_timeout``.
        """


class Collective(Protocol):
    """One collective operation in progress.

    Whatever a backend raises inside of it reaches all ranks: they all raise that error.
    """

    @property
    def group(self) -> Group:
        """The group that is meeting."""

    @property
    def passes_descriptors(self) -> bool:
        """Whether file descriptors can pass between all ranks; the same on all of them."""

    def exchange(self, step: str, payload: bytes = b"", descriptors: Sequence[int] = ()) -> Received:
        """Give every rank's contribution to every rank; all ranks must call it with the same ``step``.

        Args:
            step: Named in errors.
            payload: Any bytes.
            descriptors: File descriptors to duplicate into the other processes; they stay the caller's.

        Returns:
            One contribution a rank, in rank order. The descriptors in it are this process's own duplicates and
            are closed by ``close()`` or at the end of a ``with`` block.

        Raises:
            SymmemError: The same on all ranks, when a rank failed, died, did not come in time or is at another
                step; or when descriptors are to pass between hosts.
        """


_storage_from: Any = torch._C._construct_storage_from_data_pointer


def storage_at(pointer: int, nbytes: int, device: torch.device, owner: object) -> Any:
    """An untyped storage over memory at ``pointer``; all tensors over it keep ``owner`` alive.

    ``owner`` must not hold a tensor made from itself: such a circle runs through C++, where the garbage collector
    does not see it. At least one byte at ``pointer`` must be mapped, even for ``nbytes == 0``.
    """
    # The device is stated, not looked up by torch: for a peer's memory the driver names the peer's GPU, and through
    # __cuda_array_interface__ or from_blob it would come as a copy, or as a tensor of the wrong device.
    storage: Any = _storage_from(pointer, device, nbytes or 1)
    storage.owner = owner  # torch keeps a storage's Python object, and thus this, as long as any tensor over it
    return storage


def tensor_at(pointer: int, nbytes: int, device: torch.device, owner: object) -> torch.Tensor:
    """A uint8 tensor of shape [nbytes] over memory at ``pointer``; see :func:`storage_at`."""
    storage = storage_at(pointer, nbytes, device, owner)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (nbytes,), (1,))


class Allocation:
    """This rank's memory, of one backend.

    It lives as long as anything refers to it. When the last reference is gone it frees itself, with no
    communication (``weakref.finalize`` in the subclass, or members that do).

    Args:
        backend: The backend that made it.
        device: Where it lies.
        nbytes: Bytes that were asked for.
        pointer: Address of the first byte.
    """

    def __init__(self, backend: Backend, device: torch.device, nbytes: int, pointer: int) -> None:
        self.backend = backend
        self.device = device
        self.nbytes = nbytes
        self.pointer = pointer

    def tensor(self, owner: object | None = None) -> torch.Tensor:
        """The memory as a new uint8 tensor of shape [nbytes], which keeps ``owner`` (default: this) alive."""
        return tensor_at(self.pointer, self.nbytes, self.device, owner or self)


class Mapping:
    """Every rank's memory of one rendezvous, as this rank sees it.

    Offsets are in bytes from the beginning of the allocation and the same on all ranks. A mapping must not refer
    to its allocation (the allocation refers to it).

    Args:
        backend: Whose it is; its ``capabilities`` decide what may be called.
        group: The group that met.
        device: Where tensors over the memory lie.
        pointers: Each rank's first byte in this rank's address space; 0 where it is not load/store reachable.

    Attributes:
        serial: Which of the group's rendezvous made it; the same on all ranks.
    """

    serial = 0

    def __init__(self, backend: Backend, group: Group, device: torch.device, pointers: Sequence[int]) -> None:
        self.backend = backend
        self.group = group
        self.device = device
        self.pointers = tuple(pointers)

    def unsupported(self, what: str, why: str | None = None) -> NoReturn:
        """Raise the error for something this backend lacks."""
        name = self.backend.name
        raise UnsupportedError(
            f"the backend {name!r} has no {what}" + (f": {why}" if why else ""),
            hint="choose a backend that has it; `symmem doctor` lists what each can do",
            rank=self.group.rank,
            group=self.group.name,
            step=what,
        )

    def tensor(self, rank: int, nbytes: int, owner: object) -> torch.Tensor:
        """The first ``nbytes`` bytes of a rank's memory as a uint8 tensor."""
        if not self.pointers[rank]:
            self.unsupported("remote_tensor", f"rank {rank}'s memory is not load/store reachable from here")
        return tensor_at(self.pointers[rank], nbytes, self.device, (owner, self))

    def contiguous(self) -> tuple[int, int]:
        """Address of rank 0's memory in a range that holds all ranks' side by side, and the stride in bytes."""
        self.unsupported("contiguous_view")

    def multicast(self) -> int:
        """The multicast address of the memory; never 0. May be collective the first time.

        Raises:
            MulticastUnavailableError: It has none; says why.
        """
        self.no_multicast("it takes NVLink SHARP, and a backend for CUDA")

    def no_multicast(self, why: str) -> NoReturn:
        """Raise the error of memory that has no multicast address."""
        raise MulticastUnavailableError(
            f"the backend {self.backend.name!r} has no multicast pointer for this memory: {why}",
            hint="store to each remote_tensor instead; `symmem config show` says where a setting comes from",
            rank=self.group.rank,
            group=self.group.name,
            step="multicast_ptr",
        )

    def signal_pad(self, rank: int) -> tuple[int, int]:
        """Address and bytes of a rank's flags: a uint32 word for each [channel, source rank], all 0 at first."""
        self.unsupported("signal pad")

    def barrier(self, channel: int, timeout: float) -> None:
        """Wait, on the current stream, for all ranks; what they stored before is visible afterwards."""
        self.unsupported("barrier")

    def put_signal(self, rank: int, channel: int, timeout: float) -> None:
        """Set this rank's flag at ``rank`` once the one before was taken; what was stored before is visible."""
        self.unsupported("put_signal")

    def wait_signal(self, rank: int, channel: int, timeout: float) -> None:
        """Wait for the flag from ``rank`` and take it."""
        self.unsupported("wait_signal")

    def check(self) -> None:
        """Raise if a stream-ordered signal has failed. Local and quick; does not wait for the device.

        A barrier or signal that is work on a stream can fail long after the call that put it there. This tells; where
        signals are done when the call returns, as on the CPU, there is nothing to tell.

        Raises:
            PeerTimeoutError, PeerLostError: Which rank was waited for, on which channel.
        """

    def signals_at(self, pads: Sequence[int]) -> Signals:
        """Signals apart from those of the whole memory, over other pads in it.

        Args:
            pads: Address of each rank's pad in this process, ``Backend.pad_nbytes`` bytes at a multiple of 256, filled
                with zeros before any rank signals; 0 where the rank is not load/store reachable.
        """
        self.unsupported("signals over pads anywhere in its memory")

    def put(self, rank: int, offset: int, source: torch.Tensor) -> None:
        """Copy a contiguous uint8 tensor to ``offset`` of a rank's memory, on the current stream.

        Called only where ``pointers[rank]`` is 0; else the copy is an ordinary one between tensors.
        """
        self.unsupported("put", f"rank {rank}'s memory is not load/store reachable from here")

    def get(self, rank: int, offset: int, out: torch.Tensor) -> None:
        """Copy from ``offset`` of a rank's memory into a contiguous uint8 tensor; see :meth:`put`."""
        self.unsupported("get", f"rank {rank}'s memory is not load/store reachable from here")


class Backend(abc.ABC):
    """Makes memory that other ranks can reach. One instance a process and name.

    Args:
        name: The name it is registered under, which is how users choose it.

    Attributes:
        device_type: ``"cpu"`` or ``"cuda"``: where its memory lies.
        capabilities: What its mappings can do.
    """

    device_type: str
    capabilities: Capability

    def __init__(self, name: str) -> None:
        self.name = name

    def pad_nbytes(self, size: int) -> int:
        """Bytes of a signal pad in a group of ``size`` ranks; 0 if :meth:`Mapping.signals_at` is not supported.

        A backend that has ``SIGNALS`` needs it for arenas: there, each tensor has a pad of its own.
        """
        return 0

    @abc.abstractmethod
    def probe(self) -> None:
        """Return if this backend works in this process, shown by a real allocation, export and map.

        Not collective. Attributes that a driver advertises don't count.

        Raises:
            BackendUnavailableError: Says why it does not, and what would make it work.
        """

    @abc.abstractmethod
    def allocate(self, nbytes: int, device: torch.device, group: Group | None) -> Allocation:
        """Make ``nbytes`` (0 or more) bytes of zeroed memory on ``device``.

        Not collective, unless the backend has ``COLLECTIVE_ALLOCATION``.

        Args:
            nbytes: Bytes.
            device: Of ``device_type``, with an index if that has several.
            group: The group that was named, else the default process group, else None.

        Raises:
            OutOfMemoryError, ResourceLimitError: Nothing is left behind.
            GroupError: The backend needs a group to allocate, and there is none.
        """

    @abc.abstractmethod
    def rendezvous(self, allocation: Allocation, collective: Collective) -> Mapping:
        """Map all ranks' memory. Collective; what the caller compared before (bytes, backend) is the same everywhere.

        An error on one rank reaches all. Everything made until then must be undone by the time it is raised.
        """
