"""Export a trained student to other libraries: the command fairseq-stack-export."""

from fairseq_stack.export.command import main

if __name__ == "__main__":
    main()
