"""Programs over symmem: the command line, the demo, benchmarks, the conformance suite, and pools of ranks."""

import warnings

# torch says so once a process where there is no NumPy, which nothing here uses.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
