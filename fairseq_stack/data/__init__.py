"""Speech on its way to the student: audio files, manifests, preparation."""
