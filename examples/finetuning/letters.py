"""Write the letters of labelled speech for fairseq's CTC: manifests, transcripts and a dictionary.

    python examples/finetuning/letters.py --speech manifests --output letters

The speech is a folder of `fairseq-stack prepare` with texts in labels.tsv. The output has train.tsv, valid.tsv and
test.tsv of the recordings with a text, a line of letters for each recording in train.ltr, valid.ltr and test.ltr, and
dict.ltr.txt.
"""

import os
from argparse import ArgumentParser
from collections import Counter
from pathlib import Path

from fairseq_stack.data.manifest import write_lines, write_manifest
from fairseq_stack.data.splits import SPLITS
from fairseq_stack.errors import InputError, one_line_errors
from fairseq_stack.evaluation.tasks import plain_text, read_labelled_speech


@one_line_errors
def main():
    parser = ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--speech", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    args = parser.parse_args()
    recordings = read_labelled_speech(args.speech)
    args.output.mkdir(parents=True, exist_ok=True)
    counts = Counter()
    for split in SPLITS:
        spoken = [one for one in recordings if one.split == split and plain_text(one.labels["text"])]
        if not spoken:
            raise InputError(f"{args.speech}/labels.tsv has no text of {split}.tsv; fill its column text")
        lines = [" ".join(f"{plain_text(one.labels['text'])} ".replace(" ", "|")) for one in spoken]
        # Manifests list files below a root, and speech can have several.
        write_manifest(
            args.output / f"{split}.tsv", "/", [(os.path.abspath(one.path)[1:], one.samples) for one in spoken]
        )
        write_lines(args.output / f"{split}.ltr", lines)
        if split == "train":
            counts.update(letter for line in lines for letter in line.split())
        print(f"{split}: {len(spoken):,} recordings with a text")
    write_lines(args.output / "dict.ltr.txt", [f"{letter} {count}" for letter, count in counts.most_common()])


if __name__ == "__main__":
    main()
