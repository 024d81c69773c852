"""Mapping memory of other libraries a second time, over the fake driver."""

from __future__ import annotations

import pytest
import torch
from fake_driver import GRANULARITY, FakeDriver

from symmem.backends.base import tensor_at
from symmem.backends.vmm import DeviceRange, MemoryHandle, map_again
from symmem.errors import SymmemError, UnsupportedError


class Library:
    """Memory of ranks, each in a range of its own that two mappings of the driver fill."""

    def __init__(self, world: int) -> None:
        self.driver = FakeDriver()
        self.handles = [MemoryHandle(self.driver, self.driver.create(0, GRANULARITY, False)) for _ in range(2 * world)]
        self.ranges = [DeviceRange(self.driver, 0, 2 * GRANULARITY, GRANULARITY) for _ in range(world)]
        for index, handle in enumerate(self.handles):
            self.ranges[index // 2].map(index % 2 * GRANULARITY, handle, GRANULARITY)
        for each in self.ranges:
            each.open()

    def memory(self, rank: int, offset: int, nbytes: int) -> torch.Tensor:
        return tensor_at(self.ranges[rank].address + offset, nbytes, torch.device("cpu"), self)


@pytest.mark.parametrize(("offset", "nbytes", "pieces"), [(0, 100, 1), (512, GRANULARITY, 2), (512, 100, 1)])
def test_the_second_mapping_shows_the_same_memory(offset: int, nbytes: int, pieces: int) -> None:
    library, world = Library(3), 3
    pointers = [each.address + offset for each in library.ranges]
    before = library.driver.live
    region, begin, stride = map_again(library.driver, 0, pointers, nbytes)
    assert (begin, stride) == (offset, pieces * GRANULARITY)
    view = tensor_at(region.address, world * stride, torch.device("cpu"), region).view(world, stride)
    for rank in range(world):
        library.memory(rank, offset, nbytes).fill_(rank + 1)
        assert (view[rank, begin : begin + nbytes] == rank + 1).all()
        view[rank, begin + nbytes - 1] = 77
        assert library.memory(rank, offset, nbytes)[-1] == 77
    del view
    region.close()
    assert library.driver.live == before  # no handle is left either


def test_memory_at_different_offsets_cannot_be_side_by_side() -> None:
    library = Library(2)
    before = library.driver.live
    with pytest.raises(UnsupportedError, match=r"\[0, 256\] bytes after"):
        map_again(library.driver, 0, [library.ranges[0].address, library.ranges[1].address + 256], 100)
    assert library.driver.live == before


@pytest.mark.parametrize("method", ["range_of", "retain", "reserve", "map", "allow"])
@pytest.mark.parametrize("call", [0, 1])
def test_a_refusal_of_the_driver_leaves_nothing(method: str, call: int) -> None:
    library = Library(2)
    before = library.driver.live
    library.driver.faults[method] = "CUDA_ERROR_INVALID_VALUE", 0 if method in ("reserve", "allow") else call
    with pytest.raises(SymmemError, match="CUDA_ERROR_INVALID_VALUE"):
        map_again(library.driver, 0, [each.address for each in library.ranges], 100)
    assert library.driver.live == before
