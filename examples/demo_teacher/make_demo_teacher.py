"""Train the teacher of the demo: a small HuBERT, by fairseq's own `hubert_pretraining` on MFCC k-means labels.

This is a small version of the first iteration of Hsu et al. 2021 (HuBERT): 39-dimensional MFCC features at 100 frames
per second, k-means, and masked prediction of the cluster numbers. The result is an ordinary fairseq checkpoint, like
the published HuBERT checkpoints. After an interruption the same command resumes from the last checkpoint.
"""

import argparse
import logging
import shutil
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torchaudio
from sklearn.cluster import MiniBatchKMeans

from fairseq_stack.data.audio import read_audio
from fairseq_stack.data.manifest import write_lines
from fairseq_stack.errors import InputError, one_line_errors
from fairseq_stack.files import written_beside

CONFIG_DIR = Path(__file__).resolve().parent
CLUSTERS = 100  # as in HuBERT's first iteration
SPLITS = ("train", "valid")


@one_line_errors
def main() -> None:
    args = parse_arguments()
    teacher = args.output.resolve() / "teacher.pt"
    if teacher.exists():
        print(f"teacher: {teacher} is already there, kept")
        return
    speech = args.speech.resolve()
    labels = teacher.parent / "labels"
    make_labels(speech, labels)
    train(speech, labels, teacher, args.overrides)
    print(f"teacher: trained, {teacher}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--speech", type=Path, required=True, help="folder with train.tsv and valid.tsv (16 kHz mono audio)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder for teacher.pt, the labels and the training's own files; existing files are reused",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="FIELD=VALUE",
        help="fields of examples/demo_teacher/hubert_demo.yaml to change, such as optimization.max_update=2000",
    )
    return parser.parse_args()


def make_labels(speech: Path, labels: Path) -> None:
    """Cluster the MFCC frames of both splits and write the labels to the folder `labels`.

    For each split the folder gets the manifest and SPLIT.km, which has a line of cluster numbers for each utterance,
    100 per second. dict.km.txt is written last, so its existence shows that the labels are complete.

    Raises:
        InputError: a manifest is missing or empty, the labels belong to other speech, or the speech is too short.
    """
    dictionary = labels / "dict.km.txt"
    manifests = {split: manifest_text(speech / f"{split}.tsv") for split in SPLITS}
    if dictionary.exists():
        for split, manifest in manifests.items():
            if (labels / f"{split}.tsv").read_text(encoding="utf-8") != manifest:
                raise InputError(f"{labels}: belongs to another {split}.tsv than {speech}'s; change --output")
        print(f"labels: {labels} is already there, kept")
        return
    labels.mkdir(parents=True, exist_ok=True)

    features = {}
    for split in SPLITS:
        root, *rows = manifests[split].splitlines()
        print(f"labels: MFCC features of {len(rows)} utterances ({split})", flush=True)
        features[split] = [mfcc_features(Path(root) / row.split("\t")[0]) for row in rows]
    frames = np.concatenate(features["train"])
    if len(frames) < CLUSTERS:
        raise InputError(f"{speech / 'train.tsv'}: {len(frames) / 100} s are too few for {CLUSTERS} clusters")

    print(f"labels: k-means with {CLUSTERS} clusters on {len(frames)} frames", flush=True)
    kmeans = MiniBatchKMeans(CLUSTERS, batch_size=10000, n_init=3, reassignment_ratio=0.0, random_state=0)  # pyright: ignore[reportArgumentType]  takes numbers too
    kmeans.fit(frames)
    for split in SPLITS:
        clusters = [kmeans.predict(utterance) for utterance in features[split]]
        write_lines(labels / f"{split}.tsv", manifests[split].splitlines())
        write_lines(labels / f"{split}.km", (" ".join(map(str, row)) for row in clusters))
    counts = np.bincount(np.concatenate(clusters), minlength=CLUSTERS)
    print(f"labels: always guessing the largest cluster has an accuracy of {counts.max() / counts.sum():.3f} on valid")
    # fairseq's dictionary format: a symbol and its count on each line; the counts are not used.
    write_lines(dictionary, (f"{cluster} 1" for cluster in range(CLUSTERS)))


def manifest_text(path: Path) -> str:
    """The text of a fairseq manifest: the root of the audio, then path TAB samples on each line."""
    try:
        manifest = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such manifest; run fairseq-stack prepare first") from None
    if len(manifest.splitlines()) < 2:
        raise InputError(f"{path}: lists no audio; run fairseq-stack prepare again")
    return manifest


def mfcc_features(path: Path) -> np.ndarray:
    """13 MFCCs with their first and second differences, [T, 39], 100 frames per second.

    They are the features of fairseq's examples/hubert/simple_kmeans. Its scripts are not used because they need a
    package that fairseq does not declare, and store the clusters as a pickle.
    """
    samples = read_audio(path)
    cepstra = torchaudio.compliance.kaldi.mfcc(torch.from_numpy(samples)[None], use_energy=False).T
    slopes = torchaudio.functional.compute_deltas(cepstra)
    return torch.cat([cepstra, slopes, torchaudio.functional.compute_deltas(slopes)]).T.numpy()


def train(speech: Path, labels: Path, teacher: Path, overrides: Sequence[str]) -> None:
    """Run fairseq-hydra-train in this process, then copy its last checkpoint to `teacher`."""
    warnings.simplefilter("ignore")  # deprecations inside fairseq and hydra, which users cannot change
    from fairseq.data import Dictionary
    from fairseq_cli.hydra_train import cli_main

    # Every checkpoint of hubert_pretraining has a Dictionary. When fairseq resumes, torch's safe loading only accepts
    # classes that this process has named, so the training cannot run in a subprocess.
    torch.serialization.add_safe_globals([Dictionary])
    checkpoints = teacher.parent / "checkpoints"
    # Announcements (the whole configuration, each layer of the model) would hide fairseq's progress lines. hydra also
    # writes the configuration to the folder of logs.
    for announcer in ("fairseq", "fairseq_cli", "hydra"):
        logging.getLogger(announcer).setLevel(logging.WARNING)
    logging.getLogger("fairseq.logging.progress_bar").setLevel(logging.INFO)
    sys.argv = [
        "fairseq-hydra-train",
        f"--config-dir={CONFIG_DIR}",
        "--config-name=hubert_demo",
        f"task.data={quoted(speech)}",
        f"task.label_dir={quoted(labels)}",
        f"checkpoint.save_dir={quoted(checkpoints)}",
        f"hydra.run.dir={quoted(teacher.parent / 'logs')}",
        *overrides,
    ]
    print("teacher: training", flush=True)
    cli_main()
    with written_beside(teacher) as beside:
        shutil.copyfile(checkpoints / "checkpoint_last.pt", beside)


def quoted(path: Path) -> str:
    """The path as a quoted string of hydra's override grammar."""
    return "'" + str(path).replace("'", r"\'") + "'"


if __name__ == "__main__":
    main()
