"""Benchmarks: each prints figures of one shape, beside a peer's from the same run."""
