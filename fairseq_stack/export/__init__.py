"""Students for other libraries: Hugging Face transformers and s3prl. Needs neither fairseq nor hydra."""
