"""How fast a training is: real updates of it and of the baselines, measured side by side in one run."""
