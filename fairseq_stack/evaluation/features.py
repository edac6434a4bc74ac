"""Features of frozen upstreams, extracted once for all seeds and learning rates."""

from collections.abc import Container

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fairseq_stack.data.audio import SAMPLE_RATE, read_audio
from fairseq_stack.evaluation.tasks import LONGEST_SECONDS, LabelledRecording


@torch.no_grad()
def extract(
    upstream: nn.Module,
    recordings: dict[str, LabelledRecording],
    with_frames: Container[str],
    name: str = "features",
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the hidden states of recordings: their means over time and, for some, all frames.

    The upstream processes one recording at a time, so that there is no padding. The mean over time, the weighted sum
    of the layers and a linear map commute. Therefore SUPERB's probes for whole utterances, which apply a linear map
    and then pool, need only the means.

    Args:
        upstream: a module with the interface of S3PRLUpstream.
        recordings: by utterance; only their first LONGEST_SECONDS are used.
        with_frames: utterances whose frames are returned too.
        name: label of the progress bar.

    Returns:
        {utterance: means [layers, D] float32}, and {utterance: frames [layers, T, D] float16}.

    Raises:
        InputError: a recording cannot be read.
    """
    means, frames = {}, {}
    for utterance, recording in tqdm(recordings.items(), desc=name, unit=" recordings", mininterval=1):
        samples = min(recording.samples, LONGEST_SECONDS * SAMPLE_RATE)
        waveform = torch.from_numpy(read_audio(recording.path, 0, samples))
        states, _ = upstream(waveform[None], torch.tensor([samples]))
        states = torch.cat(states)
        means[utterance] = states.mean(1)
        if utterance in with_frames:
            frames[utterance] = states.half()
    return means, frames
