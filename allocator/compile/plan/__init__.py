"""Compile time: which buffers go to symmetric memory, and how operators are lowered."""
