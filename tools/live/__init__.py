"""Look at running jobs from outside: processes, who waits for whom, and reports."""
