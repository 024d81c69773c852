"""The errors of symmem.

Every error that symmem raises on purpose is a :class:`SymmemError`. Its text says what happened. Its attributes give
the rank, the group, the failed step and the peers, so that a program can react without parsing the text. If a standard
exception has the same meaning (``ValueError``, ``IndexError``, ``TimeoutError``, ...), the class derives from it too.

Errors can be sent to other ranks (:func:`to_wire`, :func:`from_wire`). If one rank fails in a collective step, all
ranks of the group raise that rank's error.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BackendUnavailableError",
    "ClosedError",
    "ConfigError",
    "DivergenceError",
    "ForkedError",
    "GroupError",
    "InspectionError",
    "InvalidArgumentError",
    "MismatchError",
    "MulticastUnavailableError",
    "NotRendezvousedError",
    "NotSymmetricError",
    "OutOfMemoryError",
    "PeerLostError",
    "PeerTimeoutError",
    "PlatformError",
    "RankError",
    "RendezvousError",
    "ResourceLimitError",
    "SymmemError",
    "UnsupportedError",
    "from_wire",
    "to_wire",
]


class SymmemError(Exception):
    """Base of all errors of symmem.

    Args:
        what: What happened and what was expected.
        hint: What to do next.
        rank: The rank within ``group`` on which it happened; None outside any group.
        group: Name of the group.
        step: The collective step or operation that failed, for example ``"rendezvous"``.
        peers: Other ranks of the group that caused it: ranks that differ, died or did not come.
    """

    _fields: tuple[str, ...] = ("what", "hint", "rank", "group", "step", "peers")  # that other ranks get

    def __init__(
        self,
        what: str,
        *,
        hint: str | None = None,
        rank: int | None = None,
        group: str | None = None,
        step: str | None = None,
        peers: tuple[int, ...] = (),
    ) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.rank = rank
        self.group = group
        self.step = step
        self.peers = tuple(peers)
        self.propagated_to: str | None = None  # the name of the group if all of its ranks raise this error

    def located(self, *, rank: int, group: str, step: str) -> SymmemError:
        """Fill in the attributes that are still None; returns the error itself."""
        if self.rank is None:
            self.rank = rank
        if self.group is None:
            self.group = group
        if self.step is None:
            self.step = step
        return self

    def __str__(self) -> str:
        location = [
            f"{label} {value}"
            for label, value in (("rank", self.rank), ("group", self.group), ("step", self.step))
            if value is not None
        ]
        text = f"[{', '.join(location)}] {self.what}" if location else self.what
        return f"{text}\n  What to do: {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[Any, ...]:
        return from_wire, (to_wire(self),)


class ConfigError(SymmemError, ValueError):
    """An option, key, backend name or value in the configuration is invalid; the text names its source."""


class InvalidArgumentError(SymmemError, ValueError):
    """A size, stride, dtype, device, channel or other argument is invalid."""


class RankError(SymmemError, IndexError):
    """A rank is outside ``range(world_size)``."""


class GroupError(SymmemError, ValueError):
    """The group argument is not usable: unknown name, not a member, not initialised, more than one dimension."""


class PlatformError(SymmemError, ImportError):
    """symmem does not run on this operating system; it needs Linux."""


class BackendUnavailableError(SymmemError, RuntimeError):
    """A backend does not work on this machine; the text gives the reason and a remedy."""


class UnsupportedError(SymmemError, NotImplementedError):
    """The backend lacks this capability."""


class MulticastUnavailableError(UnsupportedError):
    """There is no multicast pointer; the text gives the reason."""


class OutOfMemoryError(SymmemError, MemoryError):
    """There is not enough memory or address space."""


class ResourceLimitError(SymmemError, RuntimeError):
    """A limit other than memory was reached, for example the number of descriptors or mappings, or a file size."""


class NotSymmetricError(SymmemError, ValueError):
    """A tensor is not in symmetric memory; the text names the failed check."""


class NotRendezvousedError(SymmemError, RuntimeError):
    """Peers' memory is needed, but :meth:`SymmetricTensor.rendezvous` was not called with that group."""


class ClosedError(SymmemError, RuntimeError):
    """The object was used after :meth:`close`."""


class ForkedError(SymmemError, RuntimeError):
    """The object was used in a forked child of the process that made it; the child is no rank of the group."""


class InspectionError(SymmemError, RuntimeError):
    """A process cannot be inspected: its socket is not private, or its answer is not valid."""


class RendezvousError(SymmemError, RuntimeError):
    """A collective step failed."""


class MismatchError(RendezvousError):
    """A value that must be the same on all ranks differs; ``peers`` are the ranks that differ."""


class DivergenceError(MismatchError):
    """The ranks made different allocations from an arena, so offsets differ; or they wait in different calls.

    The text names the first difference.

    Args:
        arena: The backend and the type of the device of the arena, for example ``"host on cpu"``; None for calls.
    """

    _fields = (*MismatchError._fields, "arena")

    def __init__(self, what: str, *, arena: str | None = None, **attributes: Any) -> None:
        super().__init__(what, **attributes)
        self.arena = arena


class PeerLostError(RendezvousError):
    """Ranks died or left their group; ``peers`` are these ranks."""


class PeerTimeoutError(RendezvousError, TimeoutError):
    """Ranks did not come in time; ``peers`` are these ranks."""


def to_wire(error: BaseException) -> dict[str, Any]:
    """Convert an error to plain data. An exception of another library becomes a :class:`RendezvousError`."""
    if isinstance(error, SymmemError):
        return {"type": type(error).__name__} | {field: getattr(error, field) for field in error._fields}
    return {"type": "RendezvousError", "what": f"{type(error).__name__}: {error}"}


def from_wire(data: dict[str, Any]) -> SymmemError:
    """Make an error from the data of :func:`to_wire`. An unknown type becomes a :class:`RendezvousError`."""
    cls = globals().get(data["type"])
    if not (isinstance(cls, type) and issubclass(cls, SymmemError)):
        cls = RendezvousError
    fields = {field: data[field] for field in cls._fields if field in data}
    return cls(**fields)
