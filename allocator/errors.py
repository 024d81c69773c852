"""The one vocabulary of errors.

Every error that symmem raises on purpose is a :class:`SymmemError`. It says what happened, and carries as
attributes the rank and group it happened on, the step that failed and the peers concerned, so that a program
can act on it without reading the text. Where a standard exception has the same meaning (``ValueError``,
``IndexError``, ``TimeoutError``, ...), the class derives from that as well.

An error can be sent to other ranks (:func:`to_wire`, :func:`from_wire`): when one rank fails inside a
collective step, all ranks of the group raise that rank's error.
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
        rank: The rank, within ``group``, on which it happened; None outside of any group.
        group: Name of the group.
        step: The collective step or operation that failed, for example ``"rendezvous"``.
        peers: Other ranks of the group that the error is about: those that differ, died or did not come.
    """

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
        self.propagated_to: str | None = None  # the group of which all ranks have raised it

    def located(self, *, rank: int, group: str, step: str) -> SymmemError:
        """Fill in where the error happened, unless that is known already; returns the error itself."""
        if self.rank is None:
            self.rank = rank
        if self.group is None:
            self.group = group
        if self.step is None:
            self.step = step
        return self

    def __str__(self) -> str:
        place = [
            f"{label} {value}"
            for label, value in (("rank", self.rank), ("group", self.group), ("step", self.step))
            if value is not None
        ]
        text = f"[{', '.join(place)}] {self.what}" if place else self.what
        return f"{text}\n  What to do: {self.hint}" if self.hint else text

    def __reduce__(self) -> tuple[Any, ...]:
        return from_wire, (to_wire(self),)


class ConfigError(SymmemError, ValueError):
    """An option, key, backend name or value of the configuration is not valid; the text names the place."""


class InvalidArgumentError(SymmemError, ValueError):
    """A size, stride, dtype, device, channel or other argument is not valid."""


class RankError(SymmemError, IndexError):
    """A rank is outside of ``range(world_size)``."""


class GroupError(SymmemError, ValueError):
    """The group argument is not usable: unknown name, not a member, not initialised, more than one dimension."""


class PlatformError(SymmemError, ImportError):
    """symmem does not run on this operating system; it needs Linux."""


class BackendUnavailableError(SymmemError, RuntimeError):
    """A backend does not work on this machine; the text says why, and what would make it work."""


class UnsupportedError(SymmemError, NotImplementedError):
    """The backend lacks this capability."""


class MulticastUnavailableError(UnsupportedError):
    """There is no multicast pointer; the text says why."""


class OutOfMemoryError(SymmemError, MemoryError):
    """There is not enough memory or address space left."""


class ResourceLimitError(SymmemError, RuntimeError):
    """A limit of the operating system other than memory was reached: descriptors, file size, mappings."""


class NotSymmetricError(SymmemError, ValueError):
    """A tensor is not symmetric memory; the text names the check that failed."""


class NotRendezvousedError(SymmemError, RuntimeError):
    """Peers' memory was asked for before :meth:`SymmetricTensor.rendezvous` with that group."""


class ClosedError(SymmemError, RuntimeError):
    """Use after :meth:`close`."""


class ForkedError(SymmemError, RuntimeError):
    """Use in a process that was forked after the object was made; the parent's group has no such rank."""


class InspectionError(SymmemError, RuntimeError):
    """A process cannot be inspected: its socket is not private, or nobody answers as expected."""


class RendezvousError(SymmemError, RuntimeError):
    """A collective step failed."""


class MismatchError(RendezvousError):
    """Ranks disagree on something that must be the same everywhere; ``peers`` are the ranks that differ."""


class DivergenceError(MismatchError):
    """Ranks have allocated from an arena differently, so that offsets do not mean the same; names the first place."""


class PeerLostError(RendezvousError):
    """A rank died or left its group; ``peers`` are the ranks that are gone."""


class PeerTimeoutError(RendezvousError, TimeoutError):
    """Ranks did not come in time; ``peers`` are the ranks that were waited for."""


_FIELDS = ("what", "hint", "rank", "group", "step", "peers")


def to_wire(error: BaseException) -> dict[str, Any]:
    """Describe an error in plain data. An exception of another library becomes a :class:`RendezvousError`."""
    if isinstance(error, SymmemError):
        return {"type": type(error).__name__} | {field: getattr(error, field) for field in _FIELDS}
    return {"type": "RendezvousError", "what": f"{type(error).__name__}: {error}"}


def from_wire(data: dict[str, Any]) -> SymmemError:
    """Make the error that :func:`to_wire` described. An unknown type becomes a :class:`RendezvousError`."""
    cls = globals().get(data["type"])
    if not (isinstance(cls, type) and issubclass(cls, SymmemError)):
        cls = RendezvousError
    fields = {field: data[field] for field in _FIELDS if field in data}
    return cls(**fields)
