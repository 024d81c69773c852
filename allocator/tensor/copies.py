"""Copies between this rank's tensors and a peer's memory, for `SymmetricTensor.put` and `get`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from symmem.backends.kernel_status import raise_failure
from symmem.errors import InvalidArgumentError
from symmem.memory.layout import Layout, may_share_elements
from symmem.tensor.arguments import check_dense, check_memory, check_written

if TYPE_CHECKING:
    from symmem.backends.base import Mapping

__all__ = ["copy_elements", "get_bytes", "put_bytes"]

_RAW = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64, 16: torch.complex128}


def copy_elements(target: torch.Tensor, source: torch.Tensor, mapping: Mapping | None = None) -> None:
    """Copy all elements between tensors of the same shape and dtype, on the current stream.

    Args:
        target: Is written.
        source: Is read.
        mapping: Of the symmetric memory; the other tensor may be in a contiguous view of it.

    Raises:
        InvalidArgumentError: A copy would overwrite elements that it has not read yet, or has just written.
        SymmemError: A barrier or signal in earlier work on the GPU failed.
    """
    try:
        _check_apart(target, source, (lambda address: address) if mapping is None else mapping.home_of)
        if _is_lazy(target):
            target.copy_(source)
        else:
            _raw(target).copy_(_raw(source.resolve_conj().resolve_neg()))
    except RuntimeError as error:
        raise_failure(error)
        check_dense(source, "a copy")
        raise


def put_bytes(mapping: Mapping, rank: int, offset: int, tensor: torch.Tensor, source: torch.Tensor) -> None:
    """Let the backend copy ``source`` to a rank, at ``offset`` bytes of its allocation; for memory that is not mapped.

    ``tensor`` is this rank's symmetric tensor; the peer's tensor has the same strides.
    """
    dense = source.resolve_conj().resolve_neg().contiguous()
    mapping.put(rank, offset, _flat(dense, mapping, tensor, "put"))


def get_bytes(mapping: Mapping, rank: int, offset: int, tensor: torch.Tensor, out: torch.Tensor) -> None:
    """Let the backend copy a rank's elements to ``out``; see :func:`put_bytes`."""
    is_plain = out.is_contiguous() and not _is_lazy(out)
    dense = out if is_plain else torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    mapping.get(rank, offset, _flat(dense, mapping, tensor, "get"))
    if dense is not out:
        copy_elements(out, dense)


def _check_apart(target: torch.Tensor, source: torch.Tensor, home_of: Callable[[int], int]) -> None:
    """Raise InvalidArgumentError if elements of the target share memory with each other, or with others of source."""
    check_memory(source, "the source")
    check_memory(target, "the target")
    distance = home_of(source.data_ptr()) - home_of(target.data_ptr())
    if target.is_contiguous() and source.is_contiguous():
        overlap = distance and abs(distance) < target.nbytes
    else:
        check_written(target, "the target")
        of, to = Layout.of(source, 0), Layout.of(target, 0)
        overlap = (distance or of.strides != to.strides) and may_share_elements(to, of, distance)
    if overlap:
        raise InvalidArgumentError(
            "source and target share memory, so the copy would overwrite elements before it reads them",
            hint="copy a clone() of the source, or get into a new tensor",
        )


def _raw(tensor: torch.Tensor) -> torch.Tensor:
    """View elements as integers, because torch cannot copy all dtypes and a copy must not change the values."""
    return tensor.view(_RAW[tensor.dtype.itemsize])


def _is_lazy(tensor: torch.Tensor) -> bool:
    """Return whether torch conjugates or negates the elements when it reads them from memory."""
    return tensor.is_conj() or tensor.is_neg()


def _flat(dense: torch.Tensor, mapping: Mapping, tensor: torch.Tensor, operation: str) -> torch.Tensor:
    """View a contiguous tensor as bytes; the symmetric tensor must be contiguous as well."""
    if not tensor.is_contiguous():
        mapping.unsupported(operation, "peers that are not load/store reachable need a contiguous tensor")
    # A contiguous tensor may have any stride in a dimension of one element, so view() alone could fail.
    return dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)
