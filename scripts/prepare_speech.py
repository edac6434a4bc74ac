"""Prepare speech for distillation: 16 kHz mono audio, manifests and labels."""

import argparse
import logging
import sys

from fairseq_stack.data.bad_audio import BAD_AUDIO_LIMIT
from fairseq_stack.data.prepare import check, prepare, summary
from fairseq_stack.data.splits import GROUPINGS
from fairseq_stack.errors import InputError

DESCRIPTION = """\
Prepare speech for distillation.

Writes into the output folder
  train.tsv, valid.tsv, test.tsv   fairseq manifests: the audio's folder, then path<TAB>samples
  labels.tsv                       utterance, speaker, language, text, keyword (empty where unknown)
  audio/                           16 kHz mono FLAC, where the source has to be converted
The same prompt, known by its text or file name, never is in two splits; a name that tells nothing, such
as a number or "audio", counts with its folders. valid and test get 5 % each. What cannot be used is
named and left out. Run again, the command continues where it was stopped and reuses what is there.
"""
EXAMPLES = """\
examples:
  python scripts/prepare_speech.py --source asterisk --output data/asterisk
  python scripts/prepare_speech.py --source /corpora/LibriSpeech --output data/librispeech
  python scripts/prepare_speech.py --source /corpora/VoxCeleb1/wav --output data/voxceleb --split-by speaker
  python scripts/prepare_speech.py --output data/librispeech --check
"""


def main():
    parser = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--source", metavar="asterisk|FOLDER",
        help="asterisk: fetch Debian's recordings of telephone prompts, 2.9 hours in five languages (needs"
             " apt-get and dpkg, no root); a LibriSpeech folder: list its files in place, in its own splits;"
             " any other folder: convert the audio files in it and its subfolders, of any rate and channel count"
             " and of every format that libsndfile reads (wav, flac, ogg, opus, mp3, aiff, sph and more)",
    )
    parser.add_argument("--output", metavar="FOLDER", required=True, help="where to write; made if missing")
    parser.add_argument(
        "--split-by", choices=GROUPINGS, default="prompt",
        help="what is in one split only: prompt (default); or speaker, whose name is the first folder below"
             " --source (LibriSpeech keeps its own splits)",
    )
    parser.add_argument(
        "--bad-audio-limit", metavar="SHARE", type=float, default=BAD_AUDIO_LIMIT,
        help="share of the recordings that may be unusable, as task.bad_audio_limit in training; more stop the"
             " preparation (default: %(default)s)",
    )
    parser.add_argument(
        "--check", action="store_true",
        help="prepare nothing, but read every file that the manifests in --output list; print one line for"
             " each problem and exit with 1 if there are any",
    )
    args = parser.parse_args()
    if args.check == bool(args.source):
        parser.error("give either --source, to prepare, or --check, to verify what was prepared")
    if not 0 <= args.bad_audio_limit < 1:
        parser.error(f"--bad-audio-limit {args.bad_audio_limit} must be 0 or more and below 1")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if args.check:
            problems = check(args.output)
            if problems:
                sys.exit("\n".join(problems))
        else:
            prepare(args.source, args.output, args.split_by, args.bad_audio_limit)
        print(summary(args.output))
    except (InputError, OSError) as error:  # such as a folder that may not be written
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command continues")


if __name__ == "__main__":
    main()
