"""The calls of PyTorch's symmetric memory that symmem makes, with named errors. No other module imports it.

Facts about torch 2.11 and newer that shape this module:

* A process has one transport. It can be chosen until the first allocation and is frozen then. In 2.11 the default
  transport cannot be chosen by name, not even to return to it. So this module reads the active transport first.
* Groups need no registration; torch resolves process groups by name.
* NCCL registers memory with the communicator of the process group. torch makes the communicator at the first
  collective of the group, so there must be one.
"""

from __future__ import annotations

import os
import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from symmem.backends import gpu
from symmem.config import Settings
from symmem.errors import BackendUnavailableError, OutOfMemoryError, ResourceLimitError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BACKENDS", "TorchTransport", "backend_of", "connect"]

BACKENDS = {"CUDA": "pytorch_cuda", "NCCL": "pytorch_nccl", "NVSHMEM": "pytorch_nvshmem"}
"""The name of symmem's backend, by transport of torch."""

_OLDEST_NCCL = (2, 28)  # the first version with pointers of peers in its windows

_alone: weakref.WeakKeyDictionary[ProcessGroup, ProcessGroup] = weakref.WeakKeyDictionary()
_connected: weakref.WeakSet[ProcessGroup] = weakref.WeakSet()  # process groups with an NCCL communicator


def _symmetric_memory() -> Any:
    """torch's class. The public functions above it allocate from a pool, and know only the transports of torch."""
    from torch._C._distributed_c10d import _SymmetricMemory

    return _SymmetricMemory


class TorchTransport:
    """One of torch's transports.

    Args:
        name: ``CUDA``, ``NCCL`` or ``NVSHMEM``.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.rendezvous_count = 0  # rendezvous that this process took part in

    def check(self) -> None:
        """Return if torch has this transport. Allocates nothing.

        Raises:
            BackendUnavailableError: torch lacks it; the text says why.
        """
        if not dist.is_available():
            reason, hint = "is built without torch.distributed", "install a build of torch that has it"
        elif (lack := {"NCCL": _lack_of_nccl, "NVSHMEM": _lack_of_nvshmem}.get(self.name, lambda: None)()) is None:
            return
        else:
            reason, hint = lack
        raise BackendUnavailableError(
            f"the backend {BACKENDS[self.name]!r} needs torch's {self.name} transport, and torch "
            f"{torch.__version__} here {reason}",
            hint=hint,
        )

    def activate(self, device: torch.device) -> None:
        """Make this torch's transport, unless it is.

        Raises:
            BackendUnavailableError: torch refuses; the text names the active transport. Or torch's symmetric memory is
                symmem itself.
        """
        active = _symmetric_memory().get_backend(device)
        if active == self.name:
            return
        if active == "SYMMEM":
            raise BackendUnavailableError(
                f"the backend {BACKENDS[self.name]!r} is torch's symmetric memory, which is symmem itself in this "
                "process: symmem.torch_backend was enabled, and set_backend('SYMMEM') called",
                hint="use the backend 'native' or 'nvshmem'; or leave out set_backend('SYMMEM')",
            )
        try:
            _symmetric_memory().set_backend(self.name)
        except RuntimeError as error:
            other = BACKENDS.get(active, active)
            raise BackendUnavailableError(
                f"torch's symmetric memory uses its {active} transport in this process and does not change to "
                f"{self.name}: {_reason(error)}",
                hint=f"a process can use one transport of torch, frozen at the first allocation: use {other!r} for "
                f"all, or set TORCH_SYMMMEM={self.name} in the environment of all ranks before they start; "
                "the backends 'native' and 'nvshmem' work together with any transport",
            ) from error

    def empty(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """Memory from torch: uint8 tensor of shape [nbytes]. Freezes the transport.

        Raises:
            OutOfMemoryError, ResourceLimitError: torch cannot allocate; the text has its reason.
        """
        try:
            memory: torch.Tensor = _symmetric_memory().empty_strided_p2p((nbytes,), (1,), torch.uint8, device)
        except RuntimeError as error:
            full = any(text in str(error) for text in ("out of memory", "nvshmem_malloc failed"))
            kind = OutOfMemoryError if full else ResourceLimitError
            raise kind(
                f"torch's {self.name} transport could not allocate {nbytes} bytes on {device}: {_reason(error)}",
                hint="free memory on that GPU, or allocate less" if full else "look for an earlier warning of torch",
            ) from error
        return memory

    def rendezvous(self, memory: torch.Tensor, group: ProcessGroup) -> tuple[Any, list[int]]:
        """torch's rendezvous. Collective. Returns torch's handle, and every rank's pointer, 0 if not reachable."""
        self.rendezvous_count += 1
        handle = _symmetric_memory().rendezvous(memory, group.group_name)
        offset = getattr(handle, "offset", 0)  # missing in 2.11; it is 0 outside of torch's memory pools
        pointers = [pointer + offset if pointer else 0 for pointer in handle.buffer_ptrs]
        if len(pointers) != group.size():
            raise BackendUnavailableError(
                f"torch's {self.name} transport gives the pointers of {len(pointers)} of {group.size()} ranks",
                hint="with NCCL: use a torch that is built with NCCL 2.28 or newer",
            )
        return handle, pointers

    def catch_up(self, count: int, device: torch.device) -> None:
        """Repeat a rendezvous in a group of one rank until this process has made ``count`` of them, like its peers.

        torch's CUDA transport numbers its exchanges per process, not per group. A rank that was not part of a
        subgroup's rendezvous has a lower number. It would wait for messages with that number until the timeout of the
        store (seen with torch 2.11).
        """
        if self.name != "CUDA":
            return
        alone = _group_of_one()
        while self.rendezvous_count < count:
            self.rendezvous(self.empty(1, device), alone)

    def obey(self, settings: Settings) -> None:
        """If the settings forbid multicast, forbid it to the library too, by its only switch: the environment.

        Raises:
            BackendUnavailableError: It is too late for this.
        """
        if settings.multicast != "off":
            return
        if self.name == "NCCL" and os.environ.get("NCCL_NVLS_ENABLE") != "0":
            raise BackendUnavailableError(
                "multicast is switched off, but NCCL may have set it up already",
                hint="set NCCL_NVLS_ENABLE=0 in the environment of all ranks before they start",
            )
        os.environ["TORCH_SYMM_MEM_DISABLE_MULTICAST"] = "1"
        os.environ["NVSHMEM_DISABLE_NVLS"] = "1"


def _group_of_one() -> ProcessGroup:
    """A process group with this rank only. It is made once per default process group, without the other ranks."""
    job = dist.distributed_c10d._get_default_group()
    if job not in _alone:
        made = dist.new_group([dist.get_rank()], backend="gloo", use_local_synchronization=True)
        assert isinstance(made, dist.ProcessGroup)
        _alone[job] = made
    return _alone[job]


def _reason(error: RuntimeError) -> str:
    return str(error).partition("\n")[0]  # the other lines are torch's C++ stack


def backend_of(group: ProcessGroup, device: torch.device) -> str:
    """The name of a process group's backend for a device, or ``none``."""
    try:
        return str(group._get_backend(device).name())
    except RuntimeError:
        return "none"


def connect(group: ProcessGroup, device: torch.device) -> None:
    """Let torch make the NCCL communicator of a process group. Collective at the first call.

    Only a collective works whether or not ``init_process_group`` was given a ``device_id``
    (https://github.com/pytorch/pytorch/issues/188567).
    """
    if group not in _connected:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        gpu.finish_stream(device)
        _connected.add(group)


def _lack_of_nccl() -> tuple[str, str] | None:
    if not dist.is_nccl_available():
        return "is built without NCCL", "install a CUDA build of torch for Linux"
    major, minor, *_ = torch.cuda.nccl.version()  # type: ignore[no-untyped-call]
    if (major, minor) < _OLDEST_NCCL:
        return f"has NCCL {major}.{minor}", "use a torch that is built with NCCL 2.28 or newer"
    return None


def _lack_of_nvshmem() -> tuple[str, str] | None:
    try:
        from torch._C._distributed_c10d import _is_nvshmem_available
    except ImportError:
        return "is built without NVSHMEM", "install a CUDA build of torch for Linux, or use 'nvshmem'"
    if not _is_nvshmem_available():
        return "cannot load NVSHMEM's library", f"{gpu.install_hint('nvshmem')}, in the version that torch needs"
    return None
