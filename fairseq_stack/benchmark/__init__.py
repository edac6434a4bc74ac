"""How fast a training is, beside what else there is: real updates, measured side by side in one run."""
