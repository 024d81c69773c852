"""The operator registry: which arguments must be in symmetric memory, and how eager calls are checked."""
