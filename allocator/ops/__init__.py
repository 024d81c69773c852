"""Operators that take symmetric memory: which arguments of which op, and what happens where one is plain memory.

    symmem.register_symm_mem_args("lib::op", ["x", "outs"])     # once, where the op is defined
    symmem.ops.registration("lib::op")                          # what is known of it; None if nothing
    with symmem.ops.checked():                                  # eager calls with plain memory: an error, or a copy
        torch.ops.lib.op(x, outs, "tp")

What torch brings itself, ``torch.ops.symm_mem``, is registered already.

And operators of our own, ``torch.ops.symmem``, with a function each:

    y = symmem.ops.all_reduce(x, group)                         # functional; also in place and into an out tensor
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from symmem._lazy import lazy_exports

if TYPE_CHECKING:
    from symmem.ops.functions import (
        all_gather,
        all_reduce,
        all_to_all,
        barrier,
        broadcast,
        get,
        put,
        put_signal,
        reduce_scatter,
        wait_signal,
    )
    from symmem.ops.registry.eager_checks import check, checked
    from symmem.ops.registry.library import Library
    from symmem.ops.registry.registration import Registration
    from symmem.ops.registry.registry import (
        fingerprint,
        lookup,
        register_symm_mem_args,
        registered,
        registration,
        unregister,
        version,
    )

__all__ = [
    "Library",
    "Registration",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "barrier",
    "broadcast",
    "check",
    "checked",
    "fingerprint",
    "get",
    "lookup",
    "put",
    "put_signal",
    "reduce_scatter",
    "register_symm_mem_args",
    "registered",
    "registration",
    "unregister",
    "version",
    "wait_signal",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Library": "symmem.ops.registry.library",
        "Registration": "symmem.ops.registry.registration",
        "check": "symmem.ops.registry.eager_checks",
        "checked": "symmem.ops.registry.eager_checks",
        **dict.fromkeys(
            ("all_gather", "all_reduce", "all_to_all", "barrier", "broadcast", "reduce_scatter"),
            "symmem.ops.functions",
        ),
        **dict.fromkeys(("get", "put", "put_signal", "wait_signal"), "symmem.ops.functions"),
        **dict.fromkeys(
            ("fingerprint", "lookup", "register_symm_mem_args", "registered", "registration", "unregister", "version"),
            "symmem.ops.registry.registry",
        ),
    },
)
