"""The task. With `--user-dir`, fairseq imports every module here; only registration.py registers."""
