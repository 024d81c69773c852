"""symmem as the backend of ``torch.distributed._symmetric_memory`` for CPU tensors, with torch's import unchanged.

    import torch.distributed._symmetric_memory as symm_mem
    import symmem.torch_backend

    symmem.torch_backend.enable()
    t = symm_mem.empty(1024, device="cpu")
    hdl = symm_mem.rendezvous(t, dist.group.WORLD)

The memory is of the backend ``host``. Allocation is local, as in torch: ranks may allocate different things, and
compare at the rendezvous. docs/torch_backend.md says what works.
"""

from symmem.torch_backend.bridge import enable, last_error

__all__ = ["enable", "last_error"]
