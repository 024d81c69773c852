"""Facts about the machine and its environment that are independent of the configuration."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping
from pathlib import Path

__all__ = ["gpu_model", "multicast_blocker", "peer_of"]


def multicast_blocker(environ: Mapping[str, str] | None = None) -> str | None:
    """The environment variable that forbids multicast in spite of the configuration, as ``NAME=value``, or None."""
    environ = os.environ if environ is None else environ
    for name in ("TORCH_SYMM_MEM_DISABLE_MULTICAST", "NVSHMEM_DISABLE_NVLS"):
        if environ.get(name, "").strip() not in ("", "0"):
            return f"{name}={environ[name]}"
    value = environ.get("NCCL_NVLS_ENABLE", "")
    # NCCL reads a C integer: 00 and 0x0 are zero too.
    try:
        blocked = int(value, 0) == 0
    except ValueError:
        blocked = False
    return f"NCCL_NVLS_ENABLE={value}" if blocked else None


def gpu_model(root: str = "/proc/driver/nvidia/gpus") -> str | None:
    """The model of this host's first NVIDIA GPU, as named by its driver; None if it has no GPU."""
    for path in sorted(Path(root).glob("*/information")):
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            label, _, model = line.partition(":")
            if label.strip() == "Model" and model.strip():
                return model.strip()
    return None


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """The process id and user id of the peer of a unix socket (SO_PEERCRED)."""
    pid, uid, _gid = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return pid, uid
