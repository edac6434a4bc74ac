"""Manifests, audio and the dataset, which makes batches of them."""
