"""What a training did and what its student became. Reads files only; needs neither fairseq nor hydra."""
