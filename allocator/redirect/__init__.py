"""Redirect ordinary PyTorch allocations into an arena: `use_symmetric_memory`."""
