"""Run time: the functions that compiled code calls."""
