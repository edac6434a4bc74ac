"""Train the demo's teacher: a small HuBERT, by fairseq's own `hubert_pretraining` on MFCC k-means labels.

The first iteration of Hsu et al. 2021 (HuBERT) in small: 39-dimensional MFCC features at 100 frames per
second, k-means, masked prediction of the cluster numbers. The result is an ordinary fairseq checkpoint, as
the published HuBERT checkpoints are. A run that was interrupted goes on from its last checkpoint.
"""

import argparse
import logging
import shutil
import sys
import warnings
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
def main():
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


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--speech", type=Path, required=True, help="folder with train.tsv and valid.tsv (16 kHz mono audio)"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder for teacher.pt, the labels and the training's own files; what is there is reused",
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="FIELD=VALUE",
        help="fields of examples/demo_teacher/hubert_demo.yaml to change, as optimization.max_update=2000",
    )
    return parser.parse_args()


def make_labels(speech, labels):
    """Cluster the MFCC frames of both splits.

    The folder `labels` gets, beside each split's manifest, train.km and valid.km: a line of cluster numbers
    per utterance, 100 per second. dict.km.txt comes last; its existence says that the labels are complete.
    """
    dictionary = labels / "dict.km.txt"
    manifests = {split: read_manifest(speech / f"{split}.tsv") for split in SPLITS}
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
    kmeans = MiniBatchKMeans(CLUSTERS, batch_size=10000, n_init=3, reassignment_ratio=0.0, random_state=0)
    kmeans.fit(frames)
    for split in SPLITS:
        clusters = [kmeans.predict(utterance) for utterance in features[split]]
        write_lines(labels / f"{split}.tsv", manifests[split].splitlines())
        write_lines(labels / f"{split}.km", (" ".join(map(str, row)) for row in clusters))
    counts = np.bincount(np.concatenate(clusters), minlength=CLUSTERS)
    print(f"labels: guessing the largest cluster scores {counts.max() / counts.sum():.3f} on valid")
    # fairseq's dictionary format, one symbol and its count a line; the counts are not used.
    write_lines(dictionary, (f"{cluster} 1" for cluster in range(CLUSTERS)))


def read_manifest(path):
    """Return the text of a fairseq manifest: the audio's root, then path TAB samples on each line."""
    try:
        manifest = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such manifest; run fairseq-stack prepare first") from None
    if len(manifest.splitlines()) < 2:
        raise InputError(f"{path}: lists no audio; run fairseq-stack prepare again")
    return manifest


def mfcc_features(path):
    """Return 13 MFCCs with their first and second differences, [T, 39], 100 frames per second.

    The features of fairseq's examples/hubert/simple_kmeans, whose scripts need a package that fairseq does
    not declare and keep the clusters as a pickle.
    """
    samples = read_audio(path)
    cepstra = torchaudio.compliance.kaldi.mfcc(torch.from_numpy(samples)[None], use_energy=False).T
    slopes = torchaudio.functional.compute_deltas(cepstra)
    return torch.cat([cepstra, slopes, torchaudio.functional.compute_deltas(slopes)]).T.numpy()


def train(speech, labels, teacher, overrides):
    """Run fairseq-hydra-train in this process, then copy its last checkpoint to `teacher`."""
    warnings.simplefilter("ignore")  # deprecations inside fairseq and hydra, which no user can act upon
    from fairseq.data import Dictionary
    from fairseq_cli.hydra_train import cli_main

    # hubert_pretraining keeps its Dictionary in every checkpoint; torch's safe loading, through which fairseq
    # resumes, admits it only by name. Hence no subprocess.
    torch.serialization.add_safe_globals([Dictionary])
    checkpoints = teacher.parent / "checkpoints"
    # Announcements (the whole configuration, each of the model's layers) would bury fairseq's progress lines.
    # hydra keeps the configuration in the folder of logs.
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


def quoted(path):
    """Return the path as a quoted string of hydra's override grammar."""
    return "'" + str(path).replace("'", r"\'") + "'"


if __name__ == "__main__":
    main()
