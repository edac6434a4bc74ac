"""The student and its parts."""
