"""Print how far hidden states of teachers in bf16 and fp16 are from those in fp32, on real speech.

    python scripts/teacher_precision.py TEACHER [TEACHER ...] --speech FOLDER/test.tsv [--seconds 60]

The numbers are squared errors as shares of the variance of a layer's hidden states in fp32.
"""

from argparse import ArgumentParser

import torch

from fairseq_stack.data.audio import SAMPLE_RATE, read_audio
from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.growth.similarity import explained_variance
from fairseq_stack.tables import markdown_table
from fairseq_stack.teachers import load_teacher


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("teachers", nargs="+")
    parser.add_argument("--speech", required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    args = parser.parse_args()
    manifest = read_manifest(args.speech)
    waveforms, left = [], args.seconds * SAMPLE_RATE
    for index in range(len(manifest)):
        if left > 0 and manifest.samples[index] >= SAMPLE_RATE:
            waveforms.append(torch.from_numpy(read_audio(manifest.path(index))))
            left -= len(waveforms[-1])
    rows = []
    for name in args.teachers:
        exact = load_teacher(name)
        layers = [exact.depth * third // 3 for third in (1, 2, 3)]
        expected = states(exact, waveforms, layers)
        for precision in ("bf16", "fp16"):
            found = states(load_teacher(name, precision=precision), waveforms, layers)
            errors = [1 - explained_variance(found[layer].numpy(), expected[layer].numpy()) for layer in layers]
            rows.append([exact.family, precision, *(f"{100 * error:.4f} %" for error in errors)])
    print(markdown_table(["teacher", "precision", "layer at 1/3", "at 2/3", "last"], rows))


def states(teacher, waveforms, layers):
    """{layer: [all frames, D]} in fp32."""
    found = [teacher.hidden_states(each[None], torch.tensor([len(each)]), layers) for each in waveforms]
    return {layer: torch.cat([each[layer][0] for each in found]).float() for layer in layers}


if __name__ == "__main__":
    main()
