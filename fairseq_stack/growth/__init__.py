"""How a student grows in depth: which layer is copied where (plan), when (schedule), and the copying (surgery)."""
