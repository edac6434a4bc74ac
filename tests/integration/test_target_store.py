"""The teacher's targets are computed once: stored ones train a student as live ones do, and no other is ever used."""

import pytest
import torch
from training import tiny, train

from fairseq_stack.analysis.scalars import read_scalars
from fairseq_stack.teachers.fairseq_checkpoint import FairseqTeacher

SHARED_CNN = {"+model.share_teacher_cnn": True, "+model.feature_grad_mult": 0.0}
# The windows of longer recordings, dropout and growth all take part.
WINDOWS = {"task.max_sample_size": 4000}


@pytest.fixture
def heard(monkeypatch):
    """The batches that teachers have heard."""
    batches = []
    hidden_states = FairseqTeacher.hidden_states

    def watched(teacher, waveforms, *args):
        batches.append(waveforms)
        return hidden_states(teacher, waveforms, *args)

    monkeypatch.setattr(FairseqTeacher, "hidden_states", watched)
    return batches


def run(speech, teacher_file, folder, store=None, **fields):
    if store:
        fields["+task.target_store"] = store
    return train("librispeech_base", tiny(speech, teacher_file, folder, **WINDOWS, **fields))


def weights(trainer):
    return {name: value.clone() for name, value in trainer.get_model().state_dict().items()}


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in ours.items())


def losses(folder):
    return read_scalars(folder / "tensorboard/train_inner")["loss"].values


@pytest.mark.parametrize("cnn", [{}, SHARED_CNN], ids=["own CNN", "shared CNN"])
def test_stored_targets_train_as_live_ones_do_and_the_teacher_is_not_loaded_again(speech, teacher_file, tmp_path, heard, cnn):
    run(speech, teacher_file, tmp_path / "live", **cnn)
    first = run(speech, teacher_file, tmp_path / "first", tmp_path / "store", **cnn)
    assert heard
    heard.clear()
    second = run(speech, teacher_file, tmp_path / "second", tmp_path / "store", **cnn)
    assert not heard and ("loaded" in vars(second.task.teacher)) == bool(cnn)  # which the student's CNN comes from
    assert same(weights(first), weights(second))
    live, stored = losses(tmp_path / "live"), losses(tmp_path / "first")
    assert abs(live - stored).max() < 2e-3 * live.min() and len(live) == 20
