"""What a run is beside its task: trainer, optimizers, checks at the start, resuming, progress."""
