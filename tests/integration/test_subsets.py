"""What a subset is for is told by dataset.train_subset and valid_subset, never by its name."""

import shutil

import pytest
import torch
from training import configuration, stored_entries, tiny, train

from fairseq_stack.analysis.runs import read_run
from fairseq_stack.data.manifest import read_manifest
from fairseq_stack.data.windows import count_windows
from fairseq_stack.doctor import examine_speech
from fairseq_stack.training.recipes import subsets
from fairseq_stack.training.stored_targets import store_targets

# Every recording has several windows, and there are six updates in an epoch.
FIELDS = {"task.max_sample_size": 1600, "optimization.max_update": 9, "dataset.disable_validation": True}
NAMED = {**FIELDS, "dataset.valid_subset": "dev"}  # which fairseq 0.12.2 reads without validation too
VALIDATED = {**FIELDS, "dataset.disable_validation": False}


@pytest.fixture(scope="module")
def data(speech, tmp_path_factory):
    """The manifests of `speech` under other names, whole and in two parts."""
    folder = tmp_path_factory.mktemp("named")
    shutil.copy(speech / "train.tsv", folder / "train_960.tsv")
    shutil.copy(speech / "valid.tsv", folder / "dev.tsv")
    root, *lines = (speech / "train.tsv").read_text().splitlines()
    (folder / "first.tsv").write_text("\n".join([root, *lines[:10]]) + "\n")
    # The same files below another root.
    below = [line[len("audio/") :] for line in lines[10:]]
    (folder / "second.tsv").write_text("\n".join([f"{root}/audio", *below]) + "\n")
    (folder / "rest.tsv").write_text("\n".join([root, *lines[10:]]) + "\n")
    return folder


def weights(data, teacher_file, folder, **fields):
    trainer = train("librispeech_base", tiny(data, teacher_file, folder, **fields))
    return {name: value.clone() for name, value in trainer.get_model().state_dict().items()}


@pytest.fixture(scope="module")
def expected(speech, teacher_file, tmp_path_factory):
    return weights(speech, teacher_file, tmp_path_factory.mktemp("run"), **FIELDS)


@pytest.mark.parametrize(
    "fields",
    [
        {**NAMED, "dataset.train_subset": "train_960"},
        {**NAMED, "dataset.train_subset": "'first,rest'"},
        {**NAMED, "dataset.train_subset": "'first, second, first'"},
        # Validated on in the middle of an epoch too, by the process that trains.
        {**VALIDATED, "dataset.train_subset": "train_960", "dataset.valid_subset": "'dev,train_960'",
         "dataset.validate_interval_updates": 2},
    ],
)  # fmt: skip
def test_runs_that_differ_in_the_subsets_names_alone_end_with_the_same_weights(
    fields, data, expected, teacher_file, tmp_path
):
    found = weights(data, teacher_file, tmp_path, **fields)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())
    if not fields["dataset.disable_validation"]:
        assert list(read_run(tmp_path, "run").valid["loss"].updates) == [2, 4, 6, 8, 9]


def test_a_subset_that_is_trained_on_is_validated_on_without_random_windows(data, teacher_file, tmp_path):
    fields = {**VALIDATED, "dataset.train_subset": "train_960", "dataset.valid_subset": "train_960"}
    trainer = train("librispeech_base", tiny(data, teacher_file, tmp_path, **fields))
    first, again = (
        [batch["waveforms"] for batch in trainer.get_valid_iterator("train_960").next_epoch_itr(shuffle=False)]
        for _ in range(2)
    )
    training = trainer.task.dataset("train_960")
    assert training.random_crop and training.epoch == 2
    assert sum(map(len, first)) == 24 and all(map(torch.equal, first, again))
    beginnings = {training.load_window(index, 0)["waveform"].numpy().tobytes() for index in range(24)}
    assert {wave.numpy().tobytes() for batch in first for wave in batch} == beginnings


def test_a_store_is_filled_with_all_windows_of_the_training(data, teacher_file, tmp_path):
    fields = {**VALIDATED, "dataset.train_subset": "train_960", "dataset.valid_subset": "'dev,train_960'",
              "+task.target_store": tmp_path / "store"}  # fmt: skip
    cfg = configuration("librispeech_base", tiny(data, teacher_file, tmp_path / "run", **fields))
    assert subsets(cfg.dataset) == ["train_960", "dev"]
    store_targets(cfg, subsets(cfg.dataset))
    windows = count_windows(read_manifest(data / "train_960.tsv").samples, FIELDS["task.max_sample_size"])
    assert stored_entries(tmp_path) == windows.sum() + 6


def test_a_store_is_filled_with_all_windows_of_one_of_several_training_subsets(data, teacher_file, tmp_path):
    fields = {**VALIDATED, "dataset.train_subset": "'first,second'", "dataset.valid_subset": "dev",
              "+task.target_store": tmp_path / "store"}  # fmt: skip
    cfg = configuration("librispeech_base", tiny(data, teacher_file, tmp_path / "run", **fields))
    store_targets(cfg, ["second", "dev"])
    windows = count_windows(read_manifest(data / "second.tsv").samples, FIELDS["task.max_sample_size"])
    assert windows.sum() > len(windows) and stored_entries(tmp_path) == windows.sum() + 6


def test_combined_validation_subsets_are_one(speech, teacher_file, tmp_path):
    for name, source in (("train", "train"), ("valid", "valid"), ("valid1", "train")):
        shutil.copy(speech / f"{source}.tsv", tmp_path / f"{name}.tsv")
    fields = {**VALIDATED, "optimization.max_update": 9}

    def message(**more):
        with pytest.raises(SystemExit) as ended:
            train("librispeech_base", tiny(tmp_path, teacher_file, tmp_path / "run", **fields, **more))
        assert ended.value.code.startswith("error: ") and "\n" not in ended.value.code
        return ended.value.code

    assert "['valid1'] will be ignored; name them in dataset.valid_subset" in message()
    combined = {"dataset.combine_valid_subsets": True}
    assert "dataset.valid_subset=valid1" in message(**combined, **{"dataset.valid_subset": "valid1"})
    trainer = train("librispeech_base", tiny(tmp_path, teacher_file, tmp_path / "run", **fields, **combined))
    assert len(trainer.task.dataset("valid")) == 30 and not trainer.task.dataset("valid").random_crop


def test_an_utterance_in_two_training_subsets_is_named(data, teacher_file, tmp_path):
    with pytest.raises(SystemExit, match="first.tsv: the utterance 'audio/train0' is listed in .*train_960.tsv too"):
        train(
            "librispeech_base",
            tiny(data, teacher_file, tmp_path, **{**NAMED, "dataset.train_subset": "'train_960,first'"}),
        )


def test_the_older_command_line_names_subsets_too(data, teacher_file):
    from fairseq import options
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    configuration("librispeech_base", tiny(data, teacher_file, data))  # registers what --user-dir imports
    arguments = [str(data), "--task", "speech_distillation", "--teacher", str(teacher_file), "--arch", "stacked_hubert",
                 "--criterion", "layer_distillation", "--train-subset", "first,second",
                 "--valid-subset", "dev,rest"]  # fmt: skip
    args = options.parse_args_and_arch(options.get_training_parser(), arguments)
    task = convert_namespace_to_omegaconf(args).task
    assert (task.train_subset, task.valid_subset) == ("first,second", "dev,rest")


def test_the_doctor_looks_at_manifests_of_any_name(data, speech, tmp_path):
    found = {finding.what: finding for finding in examine_speech(data)}
    assert found["train.tsv"].verdict == found["valid.tsv"].verdict == "note"
    assert "dataset.train_subset" in found["train.tsv"].text
    assert found["train_960.tsv"].verdict == "ok" and found["train_960.tsv"].text.startswith("24 recordings")
    shutil.copytree(data, tmp_path / "broken")
    (tmp_path / "broken/labels.tsv").write_text("utterance\tspeaker\n")  # a table
    (tmp_path / "broken/train_960.tsv").write_text(f"{speech}\ngone.wav\t5000\n")
    broken = [finding.what for finding in examine_speech(tmp_path / "broken") if finding.verdict == "fix"]
    assert broken == ["train_960.tsv"]
