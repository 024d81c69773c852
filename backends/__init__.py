"""Backends by name, loaded on first use.

A third party adds a backend by an entry point in the group ``symmem.backends``: a name, and ``module:Class``, which
names a subclass of :class:`symmem.backends.base.Backend`.
"""

from __future__ import annotations

import importlib
import os
import threading
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

import torch

from symmem.config import BACKENDS
from symmem.errors import BackendUnavailableError, ConfigError, SymmemError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from symmem.backends.base import Backend

__all__ = ["AUTO_ORDER", "available_names", "get_backend", "select_backend"]

_BUILTIN = {
    "host": "symmem.backends.host:HostBackend",
    "native": "symmem.backends.native:NativeBackend",
    "nvshmem": "symmem.backends.nvshmem:NvshmemBackend",
    "pytorch_cuda": "symmem.backends.pytorch:TorchBackend",
    "pytorch_nccl": "symmem.backends.pytorch:TorchNcclBackend",
    "pytorch_nvshmem": "symmem.backends.pytorch:TorchNvshmemBackend",
}
assert _BUILTIN.keys() <= set(BACKENDS)

AUTO_ORDER = {
    "cuda": ("native", "nvshmem", "pytorch_cuda", "pytorch_nvshmem", "pytorch_nccl"),
    "cpu": ("host",),
}
"""The backends that ``auto`` tries, in this order, by device type. It never tries a third party's backend."""

_instances: dict[str, Backend] = {}
_probed: set[str] = set()
_lock = threading.RLock()


def _renew_lock() -> None:
    """In a forked child, the thread that held the lock does not exist and cannot release it."""
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


def available_names() -> tuple[str, ...]:
    """The names of all backends: the built-in ones, then the installed ones of third parties."""
    return (*BACKENDS, *sorted(_entry_points().keys() - set(BACKENDS)))


def get_backend(name: str) -> Backend:
    """The backend with this name; a process always gets the same object. The backend is not probed.

    Raises:
        ConfigError: No backend has this name.
        BackendUnavailableError: The backend cannot be imported or made, for any reason.
    """
    with _lock:
        if name not in _instances:
            target = _BUILTIN.get(name) or _entry_points().get(name)
            if target is None:
                raise ConfigError(f"unknown backend {name!r}; known are: auto, {', '.join(available_names())}")
            module, _, attribute = target.partition(":")
            try:
                _instances[name] = getattr(importlib.import_module(module), attribute)(name)
            except SymmemError:
                raise
            except Exception as error:
                reason = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
                raise BackendUnavailableError(
                    f"the backend {name!r} cannot be imported: {reason}",
                    hint=f"reinstall the package that provides {target!r}; `python -c 'import {module}'` must work",
                ) from error
        return _instances[name]


def select_backend(order: Sequence[str], device_type: str | None) -> Backend:
    """The first backend in ``order`` that works here. Every backend is probed once per process.

    Args:
        order: Names in order of preference, or ``("auto",)`` for :data:`AUTO_ORDER`.
        device_type: ``"cpu"`` or ``"cuda"``. None takes the device type of the backend; with ``auto``, ``"cuda"`` if
            torch can use CUDA.

    Raises:
        BackendUnavailableError: No backend works. The text has one reason per backend; for a single name it is the
            backend's own error.
    """
    if tuple(order) == ("auto",):
        device_type = device_type or ("cuda" if torch.cuda.is_available() else "cpu")
        if device_type not in AUTO_ORDER:
            raise BackendUnavailableError(
                f"no backend has memory for {device_type} tensors",
                hint=f"use {' or '.join(AUTO_ORDER)} tensors, or name a third party's backend that has such memory",
            )
        order = AUTO_ORDER[device_type]
    errors: list[tuple[str, BackendUnavailableError]] = []
    for name in order:
        try:
            backend = get_backend(name)
            if device_type not in (None, backend.device_type):
                raise BackendUnavailableError(
                    f"the backend {name!r} is not for {device_type} tensors: its memory is {backend.device_type}",
                    hint=f"choose another backend, or a device of type {backend.device_type}",
                )
            with _lock:
                if name not in _probed:
                    backend.probe()
                    _probed.add(name)
        except BackendUnavailableError as error:
            errors.append((name, error))
        else:
            return backend
    if len(errors) == 1:
        raise errors[0][1]
    raise BackendUnavailableError(
        f"no backend of {list(order)} works for {device_type or 'any'} tensors in this process:\n"
        + "\n".join(f"  - {name}: {error.what}" + f"\n    {error.hint}" * bool(error.hint) for name, error in errors),
        hint="`symmem doctor` shows what every backend needs",
    )


def _entry_points() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group="symmem.backends")}
