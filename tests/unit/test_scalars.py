"""Scalars are read from real event files, as several starts of one training leave them."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from fairseq_stack.analysis.scalars import read_scalars
from fairseq_stack.errors import InputError


def write_start(folder, entries):
    """One start of a training: {tag: [(update, clock, value), ...]} in one event file."""
    before = set(folder.glob("*"))
    with SummaryWriter(folder) as writer:
        for tag, rows in entries.items():
            for update, clock, value in rows:
                writer.add_scalar(tag, value, update, walltime=clock)
    (file,) = set(folder.glob("*")) - before
    return file


def test_scalars_keep_update_clock_and_value(tmp_path):
    write_start(tmp_path, {"loss": [(10, 100.25, 2.5), (20, 103.5, 1.5)], "lr": [(10, 100.25, 0.5)]})
    scalars = read_scalars(tmp_path)
    assert set(scalars) == {"loss", "lr"}
    assert scalars["loss"].updates.tolist() == [10, 20]
    assert scalars["loss"].clock.tolist() == [100.25, 103.5]
    assert scalars["loss"].values.tolist() == [2.5, 1.5]
    assert scalars["loss"].starts.tolist() == [0, 0]


def test_a_resumed_training_replaces_what_the_earlier_start_logged_after_the_checkpoint(tmp_path):
    write_start(tmp_path, {"loss": [(u, 100 + u, 1.0) for u in (10, 20, 30, 40)]})
    # Resumed from update 20, and cut off again before it came as far as the first start.
    write_start(tmp_path, {"loss": [(u, 500 + u, 2.0) for u in (30,)]})
    loss = read_scalars(tmp_path)["loss"]
    assert loss.updates.tolist() == [10, 20, 30]
    assert loss.values.tolist() == [1, 1, 2]
    assert loss.starts.tolist() == [0, 0, 1]


def test_the_clock_in_the_files_orders_the_starts_and_not_their_names(tmp_path):
    later = write_start(tmp_path, {"loss": [(20, 900.0, 2.0)]})
    write_start(tmp_path, {"loss": [(10, 100.0, 1.0), (20, 110.0, 1.0)]})
    later.rename(tmp_path / "events.out.tfevents.0000000001.another-host.1.0")
    assert read_scalars(tmp_path)["loss"].values.tolist() == [1, 2]


def test_more_entries_than_tensorboard_samples_by_default_are_all_read(tmp_path):
    write_start(tmp_path, {"loss": [(update, 1.0 + update, update) for update in range(1, 12_001)]})
    assert read_scalars(tmp_path)["loss"].updates.tolist() == list(range(1, 12_001))


def test_a_file_cut_off_in_the_middle_of_an_entry_is_read_up_to_there(tmp_path):
    file = write_start(tmp_path, {"loss": [(10, 100.0, 1.0), (20, 110.0, 2.0)]})
    file.write_bytes(file.read_bytes()[:-5])
    assert read_scalars(tmp_path)["loss"].updates.tolist() == [10]


def test_a_start_that_logged_nothing_changes_nothing(tmp_path):
    write_start(tmp_path, {"loss": [(10, 100.0, 1.0)]})
    (tmp_path / "events.out.tfevents.9999999999.host.1.0").touch()
    assert read_scalars(tmp_path)["loss"].updates.tolist() == [10]


def test_folders_without_scalars_are_refused(tmp_path):
    with pytest.raises(InputError, match="no TensorBoard event files"):
        read_scalars(tmp_path / "missing")
    write_start(tmp_path, {})
    with pytest.raises(InputError, match="without scalars"):
        read_scalars(tmp_path)
