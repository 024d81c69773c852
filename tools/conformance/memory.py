"""Conformance cases: allocate, wrap, find and close memory."""

from __future__ import annotations

import gc

import torch

import symmem
from symmem.backends.base import tensor_at
from symmem.errors import (
    BackendUnavailableError,
    ClosedError,
    ConfigError,
    InvalidArgumentError,
    NotSymmetricError,
)
from symmem.tools.conformance.case import Context, case, expect

DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=lambda dtype: str(dtype)
)


@case()
def memory_is_zeroed_and_local(ctx: Context) -> None:
    for nbytes in (1, 4096, (2 << 20) + 3):
        st = ctx.shared(nbytes, torch.uint8)
        assert st.tensor.device == ctx.device
        assert st.tensor.shape == (nbytes,)
        assert not st.tensor.any().item()
        st.tensor.fill_(255)
        ctx.meet()


@case(both=True)
def any_shape_works(ctx: Context) -> None:
    for sizes in ((), (0,), (3, 0, 2), (1,), (7,), (5, 3), (1, 1, 1, 4), (2**20 + 1,)):
        st = ctx.shared(sizes)
        assert st.tensor.shape == st.shape == torch.Size(sizes)
        assert st.tensor.is_contiguous()
        st.tensor.fill_(3.0)
        assert st.tensor.sum().item() == 3 * st.tensor.numel()
        assert st.nbytes == 4 * st.tensor.numel()
        ctx.meet()
    assert ctx.shared(5).tensor.shape == (5,)


@case(both=True)
def every_dtype_works_or_is_refused_by_name(ctx: Context) -> None:
    for dtype in DTYPES:
        if str(dtype).startswith(("torch.qint", "torch.quint")):
            with expect(InvalidArgumentError, str(dtype)):
                ctx.allocate(4, dtype)
            continue
        st = ctx.shared((4, 2), dtype)
        assert st.tensor.dtype == st.dtype == dtype
        limit = 2 if dtype == torch.bool else 128  # torch does not copy other byte values of a bool as they are
        pattern = torch.arange(st.nbytes, dtype=torch.uint8) % limit
        st.tensor.view(-1).view(torch.uint8).copy_((pattern + ctx.rank) % limit)
        ctx.meet()
        got = st.get(ctx.next)
        assert got.dtype == dtype
        assert torch.equal(got.view(-1).view(torch.uint8).cpu(), (pattern + ctx.next) % limit), dtype
        ctx.meet()


@case(both=True)
def strides_without_overlap_work(ctx: Context) -> None:
    for sizes, strides in (((3, 5), (1, 3)), ((2, 3), (8, 2)), ((4, 1, 2), (2, 99, 1)), ((0, 3), (1, 1))):
        st = ctx.shared(sizes, strides=strides)
        assert st.tensor.stride() == strides
        assert st.tensor.shape == sizes
        st.tensor.copy_(torch.arange(st.tensor.numel(), dtype=torch.float32).view(sizes))
        assert st.tensor.flatten().tolist() == list(range(st.tensor.numel()))
        ctx.meet()


@case()
def bad_requests_are_refused_by_name(ctx: Context) -> None:
    for sizes in (-1, (4, -2), (2**40, 2**40), 2**63, (2**63, 2**63)):
        with expect(InvalidArgumentError):
            ctx.allocate(sizes)
    for odd in (1.5, (2, "3"), "12", None, (None,)):
        with expect(InvalidArgumentError, "integers"):
            ctx.allocate(odd)
    for strides in ((0, 1), (1, 1), (1,), (-3, 1), (1.5, 1), 3):
        with expect(InvalidArgumentError):
            ctx.allocate((2, 3), strides=strides)
    with expect(InvalidArgumentError, "dtype"):
        ctx.allocate(4, "float32")  # type: ignore[arg-type]
    with expect(InvalidArgumentError, "device"):
        ctx.allocate(4, device="nowhere")
    with expect(BackendUnavailableError, "meta"):
        ctx.allocate(4, device="meta")
    with expect(ConfigError, "use one of"):
        symmem.allocate(4, backend="nosuch")


@case(both=True)
def wrap_finds_a_view(ctx: Context) -> None:
    st = ctx.shared((8, 4))
    st.tensor.copy_(torch.arange(32.0).view(8, 4) + 100 * ctx.rank)
    ctx.meet()
    part = symmem.SymmetricTensor.wrap(st.tensor[2:6].t(), backend=ctx.backend.name).rendezvous()
    assert (part.shape, part.strides) == ((4, 4), (1, 4))
    got = part.get(ctx.next) if part.tensor.is_contiguous() else part.remote_tensor(ctx.next).clone()
    assert torch.equal(got.cpu(), (torch.arange(32.0).view(8, 4) + 100 * ctx.next)[2:6].t())
    whole = symmem.SymmetricTensor.wrap(st.tensor)
    assert whole.groups == st.groups  # both handles share the mapping
    ctx.meet()


@case()
def wrap_names_the_check_that_failed(ctx: Context) -> None:
    st = ctx.allocate((8, 4))
    wrap = symmem.SymmetricTensor.wrap
    inside = st.tensor
    for check, tensor in (
        ("type", [1.0, 2.0]),
        ("layout", torch.ones(3, 3).to_sparse()),
        ("layout", torch.empty(3, device="meta")),
        ("address", torch.ones(5, device=ctx.device)),
        ("extent", tensor_at(inside.data_ptr(), 1024, ctx.device, inside)),
        ("strides", inside[:1].expand(5, 4)),
    ):
        with expect(NotSymmetricError, repr(check)):
            wrap(tensor)  # type: ignore[arg-type]
    with expect(NotSymmetricError, "'backend'"):
        wrap(inside, backend="another")
    st.close()
    with expect(ClosedError):
        wrap(inside)


@case(both=True)
def find_gives_the_handle_of_any_view(ctx: Context) -> None:
    tensors = [ctx.allocate((16, size + 1)) for size in range(8)]
    for st in tensors:
        for view in (st.tensor, st.tensor[3:], st.tensor.t()[-1], st.tensor.view(torch.int32)):
            found = symmem.find(view)
            assert found is not None
            assert found.tensor.data_ptr() == st.tensor.data_ptr()
            assert found.shape == st.shape
    assert symmem.find(torch.ones(4, device=ctx.device)) is None
    assert symmem.find(torch.empty(4, device="meta")) is None
    addresses = [st.tensor.data_ptr() for st in tensors]
    plain = tensors[0].tensor
    del st, tensors, found, view
    gc.collect()
    assert symmem.find(plain) is not None  # the tensor keeps its memory
    assert addresses[0] == plain.data_ptr()


@case(both=True)
def use_after_close_is_an_error(ctx: Context) -> None:
    st = ctx.shared(16)
    st.tensor.fill_(ctx.rank)
    ctx.meet()
    mine = st.tensor
    st.close()
    st.close()
    assert st.closed
    for use in (
        lambda: st.tensor,
        lambda: st.remote_tensor(ctx.next),
        lambda: st.remote_pointers,
        lambda: st.contiguous_view(),
        lambda: st.multicast_ptr,
        lambda: st.barrier(),
        lambda: st.put_signal(ctx.next),
        lambda: st.get(ctx.next),
        lambda: st.rendezvous(),
    ):
        with expect(ClosedError):
            use()
    assert (mine == ctx.rank).all().item()  # a tensor taken before close stays valid
    assert symmem.find(mine) is None
    assert "closed" in repr(st)
    with ctx.allocate(4) as other:
        other.tensor.fill_(1)
    assert other.closed
    ctx.meet()
