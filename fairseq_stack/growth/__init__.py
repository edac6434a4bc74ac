"""How a student grows in depth: who is copied where (plan), when (schedule), and the copying (surgery)."""
