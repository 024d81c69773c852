"""Engines that run the collective operators: over host shared memory, and as CUDA kernels."""
