"""Blocks of symmetric memory: layouts, lookup by address, call sites, and CUDA graphs that use them."""
