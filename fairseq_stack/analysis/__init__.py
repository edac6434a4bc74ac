"""What a training did and what its student became, from files alone: neither fairseq nor hydra is needed."""
