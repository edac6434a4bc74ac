import sys
from fairseq_stack.data.prepare import prepare
if __name__ == "__main__":
    prepare(sys.argv[1], sys.argv[2])
