"""Prepare speech for distillation: 16 kHz mono audio, manifests and labels.

Writes into the output folder
  train.tsv, valid.tsv, test.tsv   fairseq's manifests
  labels.tsv                       utterance, speaker, language, text, keyword
  phones.tsv                       utterance, its phones and their ends in seconds, if known
  audio/                           16 kHz mono FLAC, if the source has to be converted
No prompt is in two splits; valid and test get 5 % each. Unusable recordings are named
and left out. After an interruption the same command resumes.

examples:
  fairseq-stack prepare --source /corpora/LibriSpeech --output data/librispeech
  fairseq-stack prepare --output data/librispeech --check
"""

from argparse import ArgumentParser, Namespace

from fairseq_stack.data.splits import GROUPINGS
from fairseq_stack.errors import InputError


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--source", metavar="NAME|FOLDER",
        help="asterisk: fetch Debian's telephone prompts, 2.9 hours in five languages (needs apt-get and dpkg, no"
             " root); debian-speech: fetch more from Debian, 7.2 hours in 19 languages; a LibriSpeech folder: list its"
             " files in place, in its own splits; any other folder: convert its audio",
    )  # fmt: skip
    parser.add_argument("--output", metavar="FOLDER", required=True, help="where to write")
    parser.add_argument(
        "--split-by", choices=GROUPINGS, default="prompt",
        help="keep each prompt (default; known by text or file name) or each speaker (the first folder below --source)"
             " in one split only; LibriSpeech keeps its own splits",
    )  # fmt: skip
    parser.add_argument(
        "--texts", metavar="FILE",
        help="transcripts of a folder: lines of a path below --source, a tab and the text",
    )  # fmt: skip
    parser.add_argument(
        "--bad-audio-limit", metavar="SHARE", type=float,
        help="largest share of unusable recordings, like task.bad_audio_limit in training (default: 0.01)",
    )  # fmt: skip
    parser.add_argument(
        "--check", action="store_true",
        help="only read every file of the manifests in --output; print a line for each problem and exit with 1 if"
             " there is one",
    )  # fmt: skip


def run(args: Namespace) -> str | None:
    import logging

    from fairseq_stack.data.bad_audio import BAD_AUDIO_LIMIT
    from fairseq_stack.data.prepare import check_speech, prepare, summary

    if args.check == bool(args.source):
        raise InputError("give either --source, to prepare, or --check, to verify what was prepared")
    limit = BAD_AUDIO_LIMIT if args.bad_audio_limit is None else args.bad_audio_limit
    if not 0 <= limit < 1:
        raise InputError(f"--bad-audio-limit {limit} must be 0 or more and below 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.check:
        problems = check_speech(args.output)
        if problems:
            return "\n".join(problems)
    else:
        prepare(args.source, args.output, args.split_by, limit, args.texts)
    print(summary(args.output))
    return None
