"""Resampling in blocks gives what torchaudio makes of the whole recording."""

import numpy as np
import pytest
import torch
from torchaudio.functional import resample as torchaudio_resample

from fairseq_stack.data.resample import resample


@pytest.mark.parametrize("rate", [4_000, 8_000, 11_025, 16_000, 22_050, 44_100, 48_000, 192_000, 16_001])
def test_blocks_of_any_size_equal_the_whole_in_every_sample(rate):
    rng = np.random.default_rng(rate)
    for length in (1, 399, 20_011):
        samples = rng.uniform(-1, 1, length).astype(np.float32)
        whole = np.concatenate(list(resample([samples], rate, 16_000)))
        assert whole.dtype == np.float32 and len(whole) == -(-length * 16_000 // rate)
        if rate != 16_001:  # for which torchaudio's filter takes gigabytes
            # In double precision, since torchaudio rounds the positions of its filter in single.
            expected = torchaudio_resample(torch.from_numpy(samples.astype(np.float64)), rate, 16_000).numpy()
            np.testing.assert_allclose(whole, expected, atol=3e-6)
        for size in (1, 1000, 4410) if length == 399 else (997, 4410, 20_010):
            blocks = list(resample((samples[at : at + size] for at in range(0, length, size)), rate, 16_000))
            np.testing.assert_allclose(np.concatenate(blocks), whole, atol=1e-6)
