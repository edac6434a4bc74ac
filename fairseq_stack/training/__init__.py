"""Trains a student: trainer, optimizers, checks at the start, resuming, progress."""
