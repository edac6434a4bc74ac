"""Train the demo's teacher: a small HuBERT, by fairseq's own `hubert_pretraining` on MFCC k-means labels.

The first iteration of Hsu et al. 2021 (HuBERT) in small: 39-dimensional MFCC features at 100 frames per second,
k-means, masked prediction of the cluster numbers. The result is an ordinary fairseq checkpoint, such as the
HuBERT checkpoints that are published.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
import torchaudio
from sklearn.cluster import MiniBatchKMeans

from fairseq_stack.errors import InputError

CONFIG_DIR = Path(__file__).resolve().parent.parent / "examples" / "demo_teacher"
SAMPLE_RATE = 16000  # Hz
CLUSTERS = 100  # as in HuBERT's first iteration
SPLITS = ("train", "valid")


def main():
    args = parse_arguments()
    teacher = args.output.resolve() / "teacher.pt"
    if teacher.exists():
        print(f"teacher: {teacher} is already there, kept")
        return
    try:
        speech = args.speech.resolve()
        labels = teacher.parent / "labels"
        make_labels(speech, labels)
        train(speech, labels, teacher, args.overrides)
    except InputError as error:
        sys.exit(f"error: {error}")
    print(f"teacher: trained, {teacher}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--speech", type=Path, required=True, help="folder with train.tsv and valid.tsv (16 kHz mono audio)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder for teacher.pt, the labels and the training's own files; what is there already is reused",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="FIELD=VALUE",
        help="fields of examples/demo_teacher/hubert_demo.yaml to change, such as optimization.max_update=2000",
    )
    return parser.parse_args()


def make_labels(speech, labels):
    """Cluster the MFCC frames of both splits: `labels` gets train.km, valid.km and, last of all, dict.km.txt."""
    dictionary = labels / "dict.km.txt"
    if dictionary.exists():
        print(f"labels: {labels} is already there, kept")
        return
    listed = {split: read_manifest(speech / f"{split}.tsv") for split in SPLITS}
    labels.mkdir(parents=True, exist_ok=True)

    features = {}
    for split in SPLITS:
        print(f"labels: MFCC features of {len(listed[split])} utterances ({split})", flush=True)
        features[split] = [mfcc_features(path) for path in listed[split]]
    frames = np.concatenate(features["train"])
    if len(frames) < CLUSTERS:
        raise InputError(f"{speech / 'train.tsv'}: {len(frames)} frames of 10 ms, need at least {CLUSTERS}; add speech")

    print(f"labels: k-means with {CLUSTERS} clusters on {len(frames)} frames", flush=True)
    kmeans = MiniBatchKMeans(CLUSTERS, batch_size=10000, n_init=3, reassignment_ratio=0.0, random_state=0).fit(frames)
    for split in SPLITS:
        clusters = [kmeans.predict(utterance) for utterance in features[split]]
        write_beside(labels / f"{split}.km", "".join(" ".join(map(str, row)) + "\n" for row in clusters))
    counts = np.bincount(np.concatenate(clusters), minlength=CLUSTERS)
    print(f"labels: always guessing the largest cluster would score {counts.max() / counts.sum():.3f} on valid")
    # fairseq's dictionary format, one symbol and its count a line; the counts are not used.
    write_beside(dictionary, "".join(f"{cluster} 1\n" for cluster in range(CLUSTERS)))


def read_manifest(manifest):
    """Return the audio paths that a fairseq manifest lists: its first line is their root, then path TAB samples."""
    try:
        root, *rows = manifest.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{manifest}: no such manifest; prepare the speech first (scripts/prepare_speech.py)") from None
    except ValueError:
        raise InputError(f"{manifest}: empty; prepare the speech again (scripts/prepare_speech.py)") from None
    return [Path(root) / row.split("\t")[0] for row in rows]


def mfcc_features(path):
    """Return 13 MFCCs with first and second differences, [T, 39], 100 frames per second, as fairseq's k-means uses."""
    try:
        samples, rate = soundfile.read(path, dtype="float32")
    except soundfile.SoundFileError as error:
        raise InputError(f"{path}: cannot be read as audio ({error}); run prepare_speech.py --check") from None
    if rate != SAMPLE_RATE or samples.ndim != 1:
        raise InputError(f"{path}: {rate} Hz, shape {samples.shape}; the teacher needs {SAMPLE_RATE} Hz mono")
    cepstra = torchaudio.compliance.kaldi.mfcc(torch.from_numpy(samples)[None], use_energy=False).T
    slopes = torchaudio.functional.compute_deltas(cepstra)
    return torch.cat([cepstra, slopes, torchaudio.functional.compute_deltas(slopes)]).T.numpy()


def train(speech, labels, teacher, overrides):
    """Run fairseq-hydra-train in this process (it resumes from its own checkpoint) and copy its last checkpoint."""
    from fairseq.data import Dictionary
    from fairseq_cli.hydra_train import cli_main

    # hubert_pretraining keeps its Dictionary in every checkpoint; torch's safe loading, which fairseq's resume
    # goes through, admits it only by name.
    torch.serialization.add_safe_globals([Dictionary])
    checkpoints = teacher.parent / "checkpoints"
    sys.argv = [
        "fairseq-hydra-train",
        f"--config-dir={CONFIG_DIR}",
        "--config-name=hubert_demo",
        f"task.data='{speech}'",
        f"task.label_dir='{labels}'",
        f"checkpoint.save_dir='{checkpoints}'",
        f"hydra.run.dir='{teacher.parent / 'logs'}'",
        *overrides,
    ]
    print("teacher: training", flush=True)
    cli_main()
    copy = teacher.with_suffix(".tmp")
    shutil.copyfile(checkpoints / "checkpoint_last.pt", copy)
    os.replace(copy, teacher)


def write_beside(path, text):
    """Write a text file under a temporary name and rename it, so that it exists only when complete."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


if __name__ == "__main__":
    main()
