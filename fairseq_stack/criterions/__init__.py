"""What the student learns from which teacher layer, and what is minimised."""
