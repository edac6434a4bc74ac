"""The newest whole checkpoint of a folder is found, whatever a kill or a disk has done to the others."""

import random

import pytest
import torch

from fairseq_stack.checkpoints.recovery import recover
from fairseq_stack.errors import InputError


class Hostile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def save(path, updates, **more):
    torch.save(
        {
            "cfg": {"task": {"seed": 1}},
            "model": {"weight": torch.full((50, 3), float(updates))},
            "optimizer_history": [{"num_updates": updates}],
            "last_optimizer_state": {"state": {0: {"exp_avg": torch.ones(50, 3)}}},
            "extra_state": {"train_iterator": {"epoch": 1}},
            **more,
        },
        path,
    )
    return path


def weight_of(path):
    return torch.load(path, weights_only=True)["model"]["weight"][0, 0].item()


@pytest.fixture
def run(tmp_path):
    """A folder as fairseq keeps it: the last two of an interval, the best, the last."""
    for name, updates in (("1_10", 10), ("1_20", 20), ("best", 10), ("last", 20)):
        save(tmp_path / f"checkpoint_{name}.pt", updates)
    return tmp_path


def test_a_whole_folder_is_left_as_it_is(run, caplog):
    caplog.set_level("INFO")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert recover(run) == 20
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before and not caplog.messages


def test_a_folder_without_checkpoints_starts_from_the_beginning(tmp_path, caplog):
    caplog.set_level("INFO")
    save(tmp_path / "crash.pt", 30)  # what fairseq calls the state of a run that failed
    assert recover(tmp_path) is None and recover(tmp_path / "missing") is None
    assert [path.name for path in tmp_path.iterdir()] == ["crash.pt"] and not caplog.messages


@pytest.mark.parametrize("seed", range(4))
def test_a_file_cut_off_anywhere_is_skipped_and_kept_aside(run, caplog, seed):
    whole = (run / "checkpoint_last.pt").read_bytes()
    chosen = random.Random(seed)
    for cut in {0, len(whole) - 1, *(chosen.randrange(len(whole)) for _ in range(50))}:
        (run / "checkpoint_last.pt").write_bytes(whole[:cut])
        caplog.clear()
        assert recover(run) == 20
        assert weight_of(run / "checkpoint_last.pt") == 20
        assert (run / "checkpoint_last.pt.broken").read_bytes() == whole[:cut]
        skipped, found = caplog.messages
        assert f"skipped {run}/checkpoint_last.pt: " in skipped and "\n" not in skipped
        assert "checkpoint_1_20.pt at update 20 is the newest whole checkpoint" in found


def test_a_flipped_bit_anywhere_is_noticed_or_harmless(run):
    whole = (run / "checkpoint_last.pt").read_bytes()
    chosen = random.Random(1)
    noticed = 0
    for _ in range(200):
        altered = bytearray(whole)
        altered[chosen.randrange(len(whole))] ^= 1 << chosen.randrange(8)
        (run / "checkpoint_last.pt").write_bytes(altered)
        assert recover(run) == 20
        assert weight_of(run / "checkpoint_last.pt") == 20
        noticed += (run / "checkpoint_last.pt").read_bytes() != altered
    assert noticed > 100  # much of so small a file is the zip format's padding


def test_the_newest_counts_not_the_name(run, caplog):
    save(run / "checkpoint_2_30.pt", 30)
    assert recover(run) == 30 and weight_of(run / "checkpoint_last.pt") == 30
    assert "checkpoint_last.pt, which was at update 20" in caplog.text


def test_the_best_checkpoint_is_better_than_none(run):
    for name in ("last", "1_10", "1_20"):
        (run / f"checkpoint_{name}.pt").write_bytes(b"PK")
    assert recover(run) == 10 and weight_of(run / "checkpoint_last.pt") == 10


def test_a_missing_last_checkpoint_is_made_from_the_newest(run, caplog):
    (run / "checkpoint_last.pt").unlink()
    assert recover(run) == 20 and weight_of(run / "checkpoint_last.pt") == 20
    assert "which was missing" in caplog.text


def test_nothing_whole_is_said_to_be_a_new_beginning(tmp_path, caplog):
    (tmp_path / "checkpoint_last.pt").write_bytes(b"half")
    assert recover(tmp_path) is None
    assert not (tmp_path / "checkpoint_last.pt").exists() and "training starts from the beginning" in caplog.text


def test_weights_alone_cannot_be_gone_on_from(run):
    save(run / "checkpoint_last.pt", 40, extra_state={})
    assert recover(run) == 20 and (run / "checkpoint_last.pt.broken").exists()


def test_unfinished_files_are_removed(run):
    (run / "checkpoint_1_30.pt.tmp").write_bytes(b"half")
    (run / "notes.tmp").write_text("the user's")
    (run / "checkpoint_student.pt").write_text("the user's too")
    assert recover(run) == 20
    assert (run / "notes.tmp").exists() and (run / "checkpoint_student.pt").exists()
    assert not (run / "checkpoint_1_30.pt.tmp").exists()


def test_a_checkpoint_that_needs_code_is_refused_and_nothing_runs(run):
    save(run / "checkpoint_last.pt", 40, args=Hostile(run / "ran"))
    with pytest.raises(InputError, match="could run code") as error:
        recover(run)
    assert "\n" not in str(error.value) and not (run / "ran").exists() and (run / "checkpoint_last.pt").exists()
    # The file is as hostile as it claims to be.
    torch.load(run / "checkpoint_last.pt", weights_only=False)["args"].close()
    assert (run / "ran").exists()


def test_the_latest_start_counts_before_the_most_updates(run):
    save(run / "checkpoint_last.pt", 5, optimizer_history=[{"num_updates": 20}, {"num_updates": 5}])
    assert recover(run) == 5 and weight_of(run / "checkpoint_last.pt") == 5
