"""Look at running jobs from outside: their processes, waits, and reports."""
