"""Reads fairseq's checkpoint files safely, recovers them after a kill, and takes the student out of one."""
