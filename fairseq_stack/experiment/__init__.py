"""Experiments: a grid of students, trained with several seeds and compared in one table and figures."""
