"""fairseq's checkpoint files: read safely, recovered after a kill, and the student that one of them holds."""
