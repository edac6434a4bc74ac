"""The task. fairseq imports every module here for `--user-dir`; registration.py is the one that registers."""
