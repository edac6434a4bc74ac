"""The features of frozen upstreams, extracted once for all seeds and learning rates."""

import torch
from tqdm import tqdm

from fairseq_stack.data.audio import SAMPLE_RATE, read_audio
from fairseq_stack.evaluation.tasks import LONGEST_SECONDS


@torch.no_grad()
def extract(upstream, recordings, with_frames, name="features"):
    """Run an upstream over recordings, one by one, so that no padding takes part.

    The mean over time, the weighted sum of the layers and a linear map commute. So for a probe that maps,
    then pools (SUPERB's for whole utterances), the means are all that is needed of an utterance.

    Args:
        upstream: an S3PRLUpstream, or what has its interface.
        recordings: {utterance: LabelledRecording}; only their first LONGEST_SECONDS are used.
        with_frames: utterances whose frames are kept too.
        name: what the progress bar says.

    Returns:
        {utterance: [layers, D] float32}, and {utterance: [layers, T, D] float16}.

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
