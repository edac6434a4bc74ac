"""Students for other libraries, each export verified. Needs neither fairseq nor hydra, where a format is not theirs."""
