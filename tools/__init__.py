"""Tools for symmem: the command line, benchmarks, the conformance suite, and pools of ranks."""

import warnings

# torch warns once per process if NumPy is missing; nothing here uses it.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
