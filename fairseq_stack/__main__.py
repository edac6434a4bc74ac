"""python -m fairseq_stack: the command fairseq-stack."""

from fairseq_stack.cli import main

if __name__ == "__main__":
    main()
