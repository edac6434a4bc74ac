"""Experiments: a grid of students trained with several seeds, measured alike, in one table and one set of figures."""
