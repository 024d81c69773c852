"""Redirect ordinary PyTorch allocations into an arena, for `use_symmetric_memory`."""
