"""The contract between symmem and a backend.

A backend makes, exports and maps memory. It knows nothing of shapes, dtypes or handles. Of the group it sees only
:class:`RankGroup` and :class:`Collective`. A new backend subclasses three classes:

* :class:`Backend`: ``probe``, ``allocate`` and the one collective hook, ``rendezvous``;
* :class:`Allocation`: this rank's memory, freed when the last tensor over it is gone;
* :class:`Mapping`: the memory of all ranks as this rank sees it, and everything that ``capabilities`` promises.

A capability that a backend does not list needs no code: the methods below raise the named error.
"""

from __future__ import annotations

import abc
import contextlib
import enum
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

import torch

from symmem.backends.neutral import neutral
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
    "RankGroup",
    "Signals",
    "storage_at",
    "tensor_at",
]

SIGNAL_CHANNELS = 64
"""Independent channels of ``barrier``, ``put_signal`` and ``wait_signal``, per tensor and group."""


class Capability(enum.Flag):
    """The abilities of a backend beyond allocation and rendezvous."""

    REMOTE_TENSOR = enum.auto()
    """The memory of peers is load/store reachable: ``remote_tensor`` and ``remote_pointers``."""
    CONTIGUOUS_VIEW = enum.auto()
    """All ranks' memory in one address range: ``contiguous_view``."""
    MULTICAST = enum.auto()
    """One address that stores to, or reduces over, all ranks: ``multicast_ptr``."""
    SIGNALS = enum.auto()
    """``barrier``, ``put_signal`` and ``wait_signal``."""
    ONE_SIDED = enum.auto()
    """``put`` and ``get``, even if peers are not load/store reachable."""
    MULTI_HOST = enum.auto()
    """A group may span hosts."""
    SECOND_GROUP = enum.auto()
    """The same memory can be rendezvoused over several groups."""
    COLLECTIVE_ALLOCATION = enum.auto()
    """A limitation: all ranks of the job must allocate together, with the same size, in the same order."""


class Signals(Protocol):
    """Barrier and signals over the pads of all ranks. Every :class:`Mapping` implements it too."""

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


class RankGroup(Protocol):
    """The part of a group of ranks that backends see."""

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
        """The ranks with a process that is known to have ended. It takes a few microseconds and never blocks."""

    def when_lost(self, function: Callable[[int], None]) -> None:
        """Call ``function(rank)`` once for every rank with a process that has ended, or as soon as it ends.

        The call comes from another thread, which must not wait in it, unless the process has ended already.
        """

    def collective(self, operation: str, timeout: float | None = None) -> contextlib.AbstractContextManager[Collective]:
        """Begin a collective operation; all ranks must. For resources that a mapping makes later, such as multicast.

        Args:
            operation: Its name in errors; the same on all ranks.
            timeout: Seconds; None means the configured ``rendezvous_timeout``.
        """


Group = RankGroup
"""The name by which backends import :class:`RankGroup`."""


class Collective(Protocol):
    """One collective operation in progress.

    An error that a backend raises inside it reaches all ranks: all of them raise that error.
    """

    @property
    def group(self) -> RankGroup:
        """The group of the operation."""

    @property
    def passes_descriptors(self) -> bool:
        """Whether file descriptors can pass between all ranks; the same on all of them."""

    @property
    def line(self) -> str:
        """The line of the program that called the operation, for messages."""

    def exchange(self, step: str, payload: bytes = b"", descriptors: Sequence[int] = ()) -> Received:
        """Give every rank's contribution to every rank; all ranks must call it with the same ``step``.

        Args:
            step: Its name in errors.
            payload: Any bytes.
            descriptors: File descriptors to duplicate into the other processes; the caller keeps them.

        Returns:
            One contribution per rank, in rank order. Its descriptors are duplicates of this process. ``close()`` or
            the end of a ``with`` block closes them.

        Raises:
            SymmemError: A rank failed, died, was late or is at another step, or descriptors would have to pass between
                hosts. The error is the same on all ranks.
        """


_storage_from: Any = torch._C._construct_storage_from_data_pointer


def storage_at(pointer: int, nbytes: int, device: torch.device, owner: object) -> Any:
    """An untyped storage over memory at ``pointer``; all tensors over it keep ``owner`` alive.

    ``owner`` must not hold a tensor made from itself: such a circle runs through C++, and the garbage collector cannot
    see it. At least one byte at ``pointer`` must be mapped, even if ``nbytes`` is 0.
    """
    # torch must not look up the device: for a peer's memory the driver names the peer's GPU. __cuda_array_interface__
    # and from_blob would therefore make a copy, or a tensor on the wrong device.
    storage: Any = _storage_from(pointer, device, nbytes or 1)
    storage.owner = owner  # torch keeps a storage's Python object, and so its attributes, as long as any tensor over it
    return storage


@neutral
def tensor_at(pointer: int, nbytes: int, device: torch.device, owner: object) -> torch.Tensor:
    """A uint8 tensor of shape [nbytes] over memory at ``pointer``; see :func:`storage_at`."""
    storage = storage_at(pointer, nbytes, device, owner)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage, 0, (nbytes,), (1,))


class Allocation:
    """This rank's memory, made by one backend.

    It frees itself with its last reference, without communication. The subclass, or its members, use
    ``weakref.finalize`` for this.

    Args:
        backend: The backend that made it.
        device: The device of the memory.
        nbytes: The bytes that the caller asked for.
        pointer: Address of the first byte.

    Attributes:
        pad_nbytes: Bytes of the signal pad for PyTorch's kernels, behind the user's bytes; 0 if there is none. The same
            on all ranks.
        pad: Offset of that pad in bytes, a multiple of 256; the same on all ranks.
    """

    pad_nbytes = 0
    pad = 0

    def __init__(self, backend: Backend, device: torch.device, nbytes: int, pointer: int) -> None:
        self.backend = backend
        self.device = device
        self.nbytes = nbytes
        self.pointer = pointer

    def tensor(self, owner: object | None = None) -> torch.Tensor:
        """The memory as a new uint8 tensor of shape [nbytes], which keeps ``owner`` (default: this) alive."""
        return tensor_at(self.pointer, self.nbytes, self.device, owner or self)


class Mapping:
    """The memory of all ranks after one rendezvous, as this rank sees it.

    Offsets are in bytes from the start of the allocation, and the same on all ranks. A mapping must not refer to its
    allocation, because the allocation refers to it.

    Args:
        backend: The backend that made it; its ``capabilities`` decide which methods may be called.
        group: The group of the rendezvous.
        device: The device of tensors over the memory.
        pointers: Every rank's first byte in this rank's address space; 0 if it is not load/store reachable.

    Attributes:
        serial: Number of the group's rendezvous that made it; the same on all ranks.
    """

    serial = 0

    def __init__(self, backend: Backend, group: RankGroup, device: torch.device, pointers: Sequence[int]) -> None:
        self.backend = backend
        self.group = group
        self.device = device
        self.pointers = tuple(pointers)

    def unsupported(self, feature: str, why: str | None = None) -> NoReturn:
        """Raise the error for a feature that this backend lacks."""
        name = self.backend.name
        raise UnsupportedError(
            f"the backend {name!r} has no {feature}" + (f": {why}" if why else ""),
            hint="choose a backend that has it; `symmem doctor` lists the abilities of all",
            rank=self.group.rank,
            group=self.group.name,
            step=feature,
        )

    def tensor(self, rank: int, nbytes: int, owner: object) -> torch.Tensor:
        """The first ``nbytes`` bytes of a rank's memory as a uint8 tensor."""
        if not self.pointers[rank]:
            self.unsupported("remote_tensor", f"rank {rank}'s memory is not load/store reachable from here")
        return tensor_at(self.pointers[rank], nbytes, self.device, (owner, self))

    def contiguous(self) -> tuple[int, int]:
        """Address of a range that holds the memory of all ranks side by side, and the stride between ranks in bytes."""
        self.unsupported("contiguous_view")

    def home_of(self, address: int) -> int:
        """Where :attr:`pointers` have the byte at an address of :meth:`contiguous`; any other address is returned."""
        return address

    def multicast(self) -> int:
        """The multicast address of the memory; never 0. May be collective the first time.

        Raises:
            MulticastUnavailableError: The memory has no multicast address; the text says why.
        """
        self.no_multicast("it needs NVLink SHARP and a backend for CUDA")

    def no_multicast(self, why: str) -> NoReturn:
        """Raise the error for memory that has no multicast address."""
        raise MulticastUnavailableError(
            f"the backend {self.backend.name!r} has no multicast pointer for this memory: {why}",
            hint="store to every remote_tensor instead; `symmem config show` shows where a setting comes from",
            rank=self.group.rank,
            group=self.group.name,
            step="multicast_ptr",
        )

    def signal_pad(self, rank: int) -> tuple[int, int]:
        """Address and bytes of a rank's flags: one uint32 word per [channel, source rank], all 0 at first."""
        self.unsupported("signal pad")

    def barrier(self, channel: int, timeout: float) -> None:
        """Wait, on the current stream, for all ranks. Afterwards the earlier stores of all ranks are visible."""
        self.unsupported("barrier")

    def put_signal(self, rank: int, channel: int, timeout: float) -> None:
        """Wait until ``rank`` has taken this rank's last flag, then set it. ``rank`` then sees all earlier stores."""
        self.unsupported("put_signal")

    def wait_signal(self, rank: int, channel: int, timeout: float) -> None:
        """Wait for the flag from ``rank`` and take it."""
        self.unsupported("wait_signal")

    def check(self) -> None:
        """Raise if a stream-ordered signal has failed. Local and quick; does not wait for the device.

        A barrier or signal on a stream can fail long after the call that enqueued it. On the CPU a signal is complete
        when its call returns, so this does nothing.

        Raises:
            PeerTimeoutError, PeerLostError: They name the awaited rank and the channel.
        """

    def signals_at(self, pads: Sequence[int]) -> Signals:
        """Independent signals over other pads in the same memory.

        Args:
            pads: Address of every rank's pad in this process; 0 if the rank is not load/store reachable. A pad has
                ``Backend.pad_nbytes`` bytes, begins at a multiple of 256, and is zeroed before any rank signals. It may
                have less if no barrier is called: then only the flags of the channels in use are touched.
        """
        self.unsupported("signals over pads anywhere in its memory")

    def put(self, rank: int, offset: int, source: torch.Tensor) -> None:
        """Copy a contiguous uint8 tensor to ``offset`` of a rank's memory, on the current stream.

        Called only if ``pointers[rank]`` is 0. Otherwise the caller makes an ordinary copy between tensors.
        """
        self.unsupported("put", f"rank {rank}'s memory is not load/store reachable from here")

    def get(self, rank: int, offset: int, out: torch.Tensor) -> None:
        """Copy from ``offset`` of a rank's memory into a contiguous uint8 tensor; see :meth:`put`."""
        self.unsupported("get", f"rank {rank}'s memory is not load/store reachable from here")


class Backend(abc.ABC):
    """Makes memory that other ranks can reach. A process has one instance per name.

    Args:
        name: The name by which users choose it.

    Attributes:
        device_type: ``"cpu"`` or ``"cuda"``: the kind of its memory.
        capabilities: The abilities of its mappings.
    """

    device_type: str
    capabilities: Capability

    def __init__(self, name: str) -> None:
        self.name = name

    def pad_nbytes(self, size: int) -> int:
        """Bytes of a signal pad in a group of ``size`` ranks; 0 if :meth:`Mapping.signals_at` is not supported.

        A backend with ``SIGNALS`` needs it for arenas: every tensor in an arena has a separate pad.
        """
        return 0

    @abc.abstractmethod
    def probe(self) -> None:
        """Return if this backend works in this process. Test it by a real allocation, export and map.

        Not collective. Do not rely on attributes that a driver advertises.

        Raises:
            BackendUnavailableError: It does not work; the text says why, and the hint how to make it work.
        """

    @abc.abstractmethod
    def allocate(self, nbytes: int, device: torch.device, group: RankGroup | None) -> Allocation:
        """Make ``nbytes`` (0 or more) bytes of zeroed memory on ``device``.

        Not collective, unless the backend has ``COLLECTIVE_ALLOCATION``.

        Args:
            nbytes: Bytes.
            device: A device of ``device_type``, with an index on CUDA.
            group: The group that the caller named, else the default process group, else None.

        Raises:
            OutOfMemoryError, ResourceLimitError: Nothing is left behind.
            GroupError: The backend needs a group to allocate, and no group exists.
        """

    @abc.abstractmethod
    def rendezvous(self, allocation: Allocation, collective: Collective) -> Mapping:
        """Map the memory of all ranks. Collective. The caller has checked that bytes and backend are the same on all.

        An error on one rank reaches all. Before an error is raised, everything made so far must be undone.
        """
