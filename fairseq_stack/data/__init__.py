"""From recordings to batches: manifests, audio and the dataset."""
