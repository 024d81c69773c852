"""The registry of operators with symmetric arguments, and the operators ``torch.ops.symmem``.

Register the arguments that must be in symmetric memory, and check eager calls:

    symmem.register_symm_mem_args("lib::op", ["x", "outs"])     # once, where the op is defined
    symmem.ops.registration("lib::op")                          # the registration, or None
    with symmem.ops.checked():                                  # for plain memory, raises or copies
        torch.ops.lib.op(x, outs, "tp")

``torch.ops.symm_mem``, the operators of torch itself, are already registered.

Every operator of ``torch.ops.symmem`` has a function, for example:

    y = symmem.ops.all_reduce(x, group)                         # functional; also in place, and with out=
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
        requires_symmetric_memory,
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
    "requires_symmetric_memory",
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
            (
                "fingerprint",
                "lookup",
                "register_symm_mem_args",
                "registered",
                "registration",
                "requires_symmetric_memory",
                "unregister",
                "version",
            ),
            "symmem.ops.registry.registry",
        ),
    },
)
