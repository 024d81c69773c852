"""Sizes, strides and bytes of a tensor in an allocation, compared with torch."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from symmem.errors import InvalidArgumentError
from symmem.memory.layout import Layout, may_share_elements

DTYPES = (torch.uint8, torch.bool, torch.bfloat16, torch.float32, torch.int64, torch.complex128, torch.float8_e5m2)
dtypes = st.sampled_from(DTYPES)
shapes = st.lists(st.integers(0, 4), max_size=4).map(tuple)


@st.composite
def layouts(draw: st.DrawFn, offsets: bool = True) -> Layout:
    """Any sizes and strides, overlapping ones too."""
    sizes, dtype = draw(shapes), draw(dtypes)
    strides = tuple(draw(st.integers(0, 9)) for _ in sizes)
    return Layout(sizes, strides, dtype, draw(st.integers(0, 5)) * dtype.itemsize if offsets else 0)


def positions(layout: Layout) -> list[int]:
    """The position of every element, in elements."""
    indices = itertools.product(*map(range, layout.sizes))
    return [sum(i * s for i, s in zip(index, layout.strides, strict=True)) for index in indices]


def nests(layout: Layout) -> bool:
    """Whether the dimensions nest: in some order, every stride exceeds the extent of the dimensions before."""
    dimensions = [(stride, size) for size, stride in zip(layout.sizes, layout.strides, strict=True) if size > 1]
    return any(
        all(
            stride > sum((inner_size - 1) * inner for inner, inner_size in order[:place])
            for place, (stride, _) in enumerate(order)
        )
        for order in itertools.permutations(dimensions)
    )


def ramp(nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Bytes that depend on their position; a bool has only two values."""
    return torch.arange(nbytes, dtype=torch.int64).remainder(2 if dtype == torch.bool else 251).to(torch.uint8)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether shape and bytes are equal. Values cannot be compared, because NaN differs from itself."""
    pair = [tensor.flatten().clone().as_strided((tensor.numel(),), (1,)).view(torch.uint8) for tensor in (one, other)]
    return one.shape == other.shape and one.dtype == other.dtype and torch.equal(*pair)


@given(shapes, dtypes)
def test_contiguous_strides_are_torchs(sizes: tuple[int, ...], dtype: torch.dtype) -> None:
    layout = Layout.make(sizes, dtype, None)
    expected = torch.empty(sizes, dtype=dtype, device="meta")
    assert (layout.sizes, layout.strides, layout.dtype) == (sizes, expected.stride(), dtype)
    assert layout.nbytes == expected.numel() * dtype.itemsize
    assert Layout.of(expected, 8) == Layout(sizes, expected.stride(), dtype, 8)


@settings(deadline=None)
@given(layouts())
def test_bytes_against_brute_force_and_torch(layout: Layout) -> None:
    places = positions(layout)
    assert layout.nbytes == (max(places) + 1 if places else 0) * layout.dtype.itemsize
    made = torch.empty_strided(layout.sizes, layout.strides, dtype=layout.dtype)
    assert layout.nbytes == made.untyped_storage().nbytes()


@settings(max_examples=300)
@given(layouts(offsets=False))
def test_an_overlap_is_never_missed(layout: Layout) -> None:
    """``overlaps`` may be True although no elements overlap, but only if the dimensions do not nest."""
    places = positions(layout)
    if len(set(places)) < len(places):
        assert layout.overlaps
    assert layout.overlaps == (bool(places) and not nests(layout))


def test_interlocked_dimensions_are_refused_though_no_elements_meet() -> None:
    layout = Layout((3, 2), (2, 3), torch.float32)
    assert len(set(positions(layout))) == 6
    assert layout.overlaps
    with pytest.raises(InvalidArgumentError, match="share memory"):
        Layout.make(layout.sizes, torch.float32, layout.strides)


@given(layouts())
def test_view_is_as_strided(layout: Layout) -> None:
    itemsize = layout.dtype.itemsize
    size = (layout.offset + layout.nbytes + itemsize) // itemsize * itemsize
    memory = ramp(size, layout.dtype)
    view = layout.view(memory)
    expected = memory.view(layout.dtype).as_strided(layout.sizes, layout.strides, layout.offset // itemsize)
    assert same(view, expected)
    assert (view.stride(), view.storage_offset()) == (expected.stride(), expected.storage_offset())
    assert view.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()  # not a copy


@given(layouts(), st.integers(1, 4), st.integers(0, 3))
def test_view_all_is_every_ranks_view(layout: Layout, world: int, spare: int) -> None:
    stride = -(-(layout.offset + layout.nbytes) // 16) * 16 + 16 * spare  # a multiple of every itemsize, as pages are
    memory = ramp(world * stride, layout.dtype)
    view = layout.view_all(memory, world, stride)
    ranks = [layout.view(memory[rank * stride : (rank + 1) * stride]) for rank in range(world)]
    assert same(view, torch.stack(ranks))
    assert view.untyped_storage().data_ptr() == memory.untyped_storage().data_ptr()


big = st.integers(0, 3) | st.integers(2**28, 2**33) | st.integers(2**60, 2**64)


@settings(max_examples=300)
@given(st.lists(st.tuples(big, big), max_size=3), dtypes, st.booleans())
def test_what_is_accepted_torch_can_represent(pairs: list[tuple[int, int]], dtype: torch.dtype, dense: bool) -> None:
    sizes, strides = [size for size, _ in pairs], [stride for _, stride in pairs]
    try:
        layout = Layout.make(sizes, dtype, None if dense else strides)
    except InvalidArgumentError:
        return
    made = torch.empty_strided(layout.sizes, layout.strides, dtype=dtype, device="meta")
    assert made.untyped_storage().nbytes() == layout.nbytes < 2**63


@given(st.lists(st.integers(1, 2**20), max_size=3), dtypes)
def test_what_fits_is_accepted(sizes: list[int], dtype: torch.dtype) -> None:
    nbytes = math.prod(sizes) * dtype.itemsize
    if nbytes < 2**62:
        assert Layout.make(sizes, dtype, None).nbytes == nbytes


def test_defaults() -> None:
    assert Layout.make(5, None, None) == Layout((5,), (1,), torch.get_default_dtype())
    assert Layout.make((), torch.int8, ()).nbytes == 1
    # Integers of numpy and torch count as integers.
    assert Layout.make(torch.Size([2, 3]), torch.int8, (torch.tensor(3), 1)).strides == (3, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "dtype", "strides", "text"),
    [
        (-1, None, None, "sizes must not be negative: (-1,)"),
        ((2, 3), None, (-3, 1), "strides must not be negative: (-3, 1)"),
        ((2.0,), None, None, "sizes must be integers, not (2.0,)"),
        (None, None, None, "sizes must be integers, not (None,)"),
        (True, None, None, "sizes must be integers, not (True,)"),
        ((2, True), None, None, "sizes must be integers, not (2, True)"),
        ((2, 3), None, 3, "strides must be integers, not 3"),
        ((2, 3), None, (1,), "2 sizes, but 1 strides"),
        ((2, 3), None, (1, 1), "two elements would share memory"),
        (2**63, None, None, "must be below 2**63"),
        ((2**40, 2**40), None, None, "too many"),
        ((0, 2**40, 2**40), None, None, "too many"),
        ((1,), torch.int64, (2**61,), "too many"),
        (4, "float32", None, "dtype must be a torch.dtype, not 'float32'"),
        (4, torch.qint8, None, "torch.qint8"),
    ],
)
def test_bad_requests_say_what_is_wrong(sizes: object, dtype: object, strides: object, text: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        Layout.make(sizes, dtype, strides)  # type: ignore[arg-type]
    assert text in str(caught.value)


@given(layouts(offsets=False), layouts(offsets=False), st.integers(-60, 60))
def test_shared_elements_are_found_exactly(one: Layout, other: Layout, distance: int) -> None:
    other = Layout(other.sizes, other.strides, one.dtype)
    width = one.dtype.itemsize
    begins = [width * position for position in positions(one)]
    shared = any(abs(begin - distance - width * position) < width for position in positions(other) for begin in begins)
    assert may_share_elements(one, other, distance) is shared


def test_parts_of_one_tensor_that_share_no_element() -> None:
    whole = torch.zeros(6, 8, 10)
    parts = [whole[:, :4], whole[:, 4:], whole[:, 3:], whole[..., ::2], whole[..., 1::2], whole[:3], whole[3:]]
    share = {
        (i, j)
        for (i, a), (j, b) in itertools.combinations(enumerate(parts), 2)
        if may_share_elements(Layout.of(a, 0), Layout.of(b, 0), b.data_ptr() - a.data_ptr())
    }
    assert share == set(itertools.combinations(range(7), 2)) - {(0, 1), (3, 4), (5, 6)}


@pytest.mark.parametrize("sizes", [b"3", bytearray(b"3"), memoryview(b"3"), "", {3, 4}, frozenset({3}), {1: 2}])
def test_other_collections_are_no_sizes_and_no_strides(sizes: object) -> None:
    with pytest.raises(InvalidArgumentError, match="sizes must be integers"):
        Layout.make(sizes, torch.float32, None)  # type: ignore[arg-type]
    with pytest.raises(InvalidArgumentError, match="strides must be integers"):
        Layout.make((3,), torch.float32, sizes)  # type: ignore[arg-type]
