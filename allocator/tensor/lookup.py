"""Look up the block of a plain tensor, and the mapping of a block; check that both may be used."""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import torch

from symmem.errors import ClosedError, ForkedError, NotRendezvousedError, NotSymmetricError
from symmem.group.resolve import GroupLike, resolve_group
from symmem.memory import cuda_graphs
from symmem.memory.block import Block
from symmem.memory.layout import Layout
from symmem.memory.registry import block_at

if TYPE_CHECKING:
    from symmem.backends.base import Mapping

__all__ = ["address_of", "check_open", "check_process", "locate", "mapping_of", "storage_address"]


def address_of(tensor: torch.Tensor) -> int | None:
    """Return the address of the first element; of an empty tensor, the address of its storage.

    Returns:
        None for a tensor without an address: sparse, meta, fake, or a functional wrapper.
    """
    if tensor.layout != torch.strided or tensor.device.type == "meta":
        return None
    try:
        return tensor.data_ptr() or tensor.untyped_storage().data_ptr()
    except RuntimeError:
        return None


def storage_address(tensor: torch.Tensor) -> int:
    """Return the address of a tensor's storage; 0 if it has no memory."""
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # sparse, fake, or a functional wrapper
        return 0


def locate(tensor: torch.Tensor, backend: str | None) -> tuple[Block, Layout]:
    """Return a tensor's block, and its layout within the block.

    Raises:
        NotSymmetricError: See :meth:`SymmetricTensor.wrap`.
    """
    if not isinstance(tensor, torch.Tensor):
        _fail("type", f"a {type(tensor).__name__} is not a tensor")
    address = address_of(tensor)
    if address is None:
        _fail("layout", f"a {type(tensor).__name__} of layout {tensor.layout} on {tensor.device} has no address")
    block = block_at(address)
    if block is None or block.allocation.device != tensor.device:
        _fail("address", f"no live allocation on {tensor.device} holds {address:#x}")
    layout = Layout.of(tensor, address - block.pointer)
    if layout.offset + layout.nbytes > block.nbytes:
        _fail("extent", f"it ends {layout.offset + layout.nbytes - block.nbytes} bytes after the end of the allocation")
    if layout.overlaps:
        _fail("strides", f"with sizes {layout.sizes} and strides {layout.strides}, elements share memory")
    if backend is not None and block.allocation.backend.name != backend:
        _fail("backend", f"its memory is from the backend {block.allocation.backend.name!r}, not {backend!r}")
    return block, layout


def _fail(check: str, why: str) -> NoReturn:
    raise NotSymmetricError(
        f"not symmetric memory, by the check {check!r}: {why}",
        hint="allocate it with symmem.allocate(...), and use its .tensor or views of that tensor",
    )


def check_open(block: Block, operation: str) -> None:
    """Raise ClosedError if a handle of the block was closed."""
    if block.closed:
        raise ClosedError(
            f"this symmetric tensor of shape {block.layout.sizes} was closed",
            hint="allocate a new one, or close it later",
            step=operation,
        )


def check_process(block: Block, operation: str) -> None:
    """Raise ForkedError in a process that was forked after the allocation."""
    if block.inherited:
        raise ForkedError(
            "this symmetric tensor was allocated before this process was forked; the child is not a rank",
            hint="use its .tensor, which is shared with the parent, or allocate in the child with a new group",
            step=operation,
        )


def mapping_of(block: Block, operation: str, group: GroupLike) -> Mapping:
    """Return the mapping from a group's rendezvous. If a CUDA graph is being captured, keep the block for the graph.

    Args:
        block: The block to use.
        operation: The step for error messages.
        group: None for the group of the first rendezvous.

    Raises:
        ClosedError, ForkedError: The block cannot be used.
        NotRendezvousedError: The group has not rendezvoused the block.
        DivergenceError: The ranks have allocated differently from the arena of the block.
    """
    check_open(block, operation)
    check_process(block, operation)
    if block.diverged:
        block.check_acts()
    if cuda_graphs.is_capturing(block.allocation.device):
        cuda_graphs.keep(block)
    mappings = block.mappings
    if group is None and mappings:
        return mappings[block.first or next(iter(mappings))]
    resolved = resolve_group(group)
    if resolved not in mappings:
        raise NotRendezvousedError(
            f"the group {resolved.name!r} has not rendezvoused this tensor",
            hint="let all its ranks call rendezvous(group) first",
            rank=resolved.rank,
            group=resolved.name,
            step=operation,
        )
    return mappings[resolved]
