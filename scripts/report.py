"""Report a training: losses, time per stage, similarity of the student's layers."""

import argparse
import sys
from pathlib import Path

import yaml

from fairseq_stack.analysis.hidden_states import hidden_states_of
from fairseq_stack.analysis.report import write_report
from fairseq_stack.errors import InputError


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of the training, with tensorboard/ in it")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the report to")
    parser.add_argument("--student", type=Path, help="Hugging Face folder, for the layer similarity")
    parser.add_argument("--speech", type=Path, help="manifest (TSV) of the speech to run the student on")
    parser.add_argument("--seconds", type=float, default=60.0, help="seconds of that speech (default: 60)")
    parser.add_argument(
        "--config",
        type=Path,
        help="resolved configuration to show (default: RUN/.hydra/config.yaml where it exists)",
    )
    args = parser.parse_args()
    if (args.student is None) != (args.speech is None):
        parser.error("--student and --speech belong together")

    try:
        states = hidden_states_of(args.student, args.speech, args.seconds) if args.student else None
        config = _config_text(args)
        print(write_report(args.run, args.output, states, _layers_per_block(config), config), end="")
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"report: {args.output / 'index.html'}")


def _config_text(args):
    path = args.config or args.run / ".hydra" / "config.yaml"
    if args.config is None and not path.exists():
        return None
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--config {path} cannot be read; give another or leave it out") from error


def _layers_per_block(config):
    """In a finished interleaved student every layer of the first stage has become one layer per stage."""
    try:
        model = (yaml.safe_load(config or "") or {}).get("model") or {}
        return model["stack_stages"] if model.get("stack_method") == "interleaved" else None
    except (yaml.YAMLError, AttributeError, KeyError) as error:
        raise InputError("--config is no resolved configuration of a training; leave it out") from error


if __name__ == "__main__":
    main()
