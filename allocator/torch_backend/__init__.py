"""symmem as the backend of ``torch.distributed._symmetric_memory``, with torch's import unchanged.

    import torch.distributed._symmetric_memory as symm_mem
    import symmem.torch_backend

    symmem.torch_backend.enable()
    t = symm_mem.empty(1024, device="cpu")
    hdl = symm_mem.rendezvous(t, dist.group.WORLD)

For CUDA tensors, ``symm_mem.set_backend("SYMMEM")`` after ``enable()`` chooses it, before the first use on any device.
The memory is of the backend ``host``, or ``native`` on CUDA. Allocation is local, as in torch: ranks may allocate
different things, and compare at the rendezvous. docs/torch_backend.md says what works.
"""

from symmem.torch_backend import bridge

__all__ = ["enable"]


def enable() -> None:
    """Let torch's symmetric memory and ``torch.ops.symm_mem`` use symmem for CPU tensors, and offer it for CUDA.

    For CUDA it is in force after ``set_backend("SYMMEM")`` of torch's module. Local; later calls do nothing. Compiles a
    small library for the installed torch the first time on a machine, which takes some ten seconds.

    Raises:
        UnsupportedError: This torch has no symmetric memory, or there is no C++ compiler, or it is too old.
        BackendUnavailableError: The backend ``host`` does not work here.
        ForkedError: The process was forked after another call.
    """
    bridge.enable()
    from symmem.torch_backend import cpu_operators, inductor  # need torch.distributed; the line before has checked it

    if cpu_operators.register():
        inductor.install()
