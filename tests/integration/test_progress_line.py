"""The progress line and TensorBoard of a real training, with batches accumulated."""

import numpy as np
from training import tiny, train

from fairseq_stack.analysis.scalars import read_scalars
from fairseq_stack.data.manifest import read_manifest


def test_the_log_tells_speed_waiting_padding_and_the_time_left(speech, teacher_file, tmp_path, caplog):
    caplog.set_level("INFO")
    fields = {"optimization.update_freq": "[2]", "optimization.max_update": 6, "dataset.validate_interval": 1}
    train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields))

    # An epoch of three updates, each of two batches of four recordings that are neighbours in length.
    samples = np.sort(read_manifest(speech / "train.tsv").samples)
    padded = sum(4 * max(samples[first : first + 4]) for first in range(0, 24, 4))
    epochs = read_scalars(tmp_path / "tensorboard" / "train")
    np.testing.assert_allclose(epochs["padding_share"].values, [1 - samples.sum() / padded] * 2, atol=6e-4)

    updates = read_scalars(tmp_path / "tensorboard" / "train_inner")
    assert (updates["audio_hours_per_hour"].values > 0).all()
    waits = updates["data_wait_share"].values
    assert waits[0] > 0 and (waits >= 0).all() and (waits < 1).all()  # later batches are read ahead
    # Stages of 1, 1, 2 and 2 updates: the fourth is the first that is not the first at its depth.
    assert updates["eta_hours"].updates.tolist() == [4, 5, 6] and updates["eta_hours"].values[-1] == 0
    assert "padding_share" not in read_scalars(tmp_path / "tensorboard" / "valid")

    line = next(record.getMessage() for record in caplog.records if record.name == "train_inner")
    names = [part.split("=")[0].split()[-1] for part in line.split(", ")]
    wanted = ["stage", "depth", "loss", "audio_hours_per_hour", "data_wait_share", "padding_share", "num_updates"]
    assert [name for name in names if name in wanted] == wanted
