"""Small real parts that many tests need: recordings, manifests, a HuBERT of fairseq's own.

The teacher's weights are random: these tests are about mechanics, not about what a teacher knows.
"""

import logging
import sys

import numpy as np
import pytest
import soundfile
import torch

# espnet-s3prl needs omegaconf 2.1 or later, and fairseq 0.12.2, the fairseq of Python 3.10, an earlier one.
S3PRL_FITS = sys.version_info >= (3, 11)
# These cannot even be imported without s3prl, or are about nothing else.
collect_ignore = [] if S3PRL_FITS else ["integration/test_probes.py", "integration/test_superb.py"]


# Files of tests that take long, the longest first. Files run side by side, and one that starts last runs alone.
LONG = (
    "test_trainings.py", "test_resume.py", "test_export.py", "test_processes.py", "test_kill.py", "test_recipes.py",
    "test_stored_targets.py", "test_experiment.py", "test_other_configurations.py", "test_guards.py",
    "test_benchmark.py", "test_probes.py", "test_superb.py", "test_training.py", "test_fuzz.py", "test_finetuning.py",
    "test_roofline.py", "test_imports.py", "test_options.py", "test_bad_audio.py", "test_full_depth.py",
    "test_extending.py", "test_sweep.py", "test_published_files.py", "test_teachers.py",
)  # fmt: skip


def pytest_collection_modifyitems(config, items):
    """Put long files first. Where s3prl and fairseq exclude each other, deselect what compares with s3prl."""
    out = {item for item in items if item.get_closest_marker("s3prl") and not S3PRL_FITS}
    rank = {name: number for number, name in enumerate(LONG)}
    items[:] = sorted((item for item in items if item not in out), key=lambda item: rank.get(item.path.name, len(rank)))
    config.hook.pytest_deselected(items=list(out))


TINY = {
    "conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 4 + [(8,2,2)] * 2",
    "encoder_layers": 12,
    "encoder_embed_dim": 16,
    "encoder_ffn_embed_dim": 32,
    "encoder_attention_heads": 4,
    "conv_pos": 8,
    "conv_pos_groups": 4,
}

# What a student's configuration takes from criterion, task and optimisation by interpolation.
LINKED = {
    "loss": "mse",
    "teacher_layers": [4, 8, 12],
    "intermediate_style": "layer_to_layer",
    "output_weight": 1.0,
    "mask_prob": 0.0,
    "normalize": False,
    "max_update": 1000,
}


def stock_hubert(seed=0, normalize=False, dictionary=None, final_dim=8, **shape):
    """fairseq's own HubertModel with random weights, and the configuration that its checkpoint would hold."""
    from fairseq.data import Dictionary
    from fairseq.models.hubert.hubert import HubertConfig, HubertModel
    from fairseq.tasks.hubert_pretraining import HubertPretrainingConfig
    from omegaconf import OmegaConf

    torch.manual_seed(seed)
    model_cfg = OmegaConf.structured(HubertConfig(label_rate=50, final_dim=final_dim, **shape))
    task_cfg = OmegaConf.structured(HubertPretrainingConfig(data="", labels=["km"], normalize=normalize))
    model = HubertModel(model_cfg, task_cfg, [dictionary or Dictionary()]).eval()
    cfg = {
        "model": {**OmegaConf.to_container(model_cfg, enum_to_str=True), "_name": "hubert"},
        "task": {"_name": "hubert_pretraining", "normalize": normalize},
    }
    return model, cfg


@pytest.fixture(autouse=True)
def logging_as_before():
    """Undo what commands do to logging for good, since their process ends."""
    before = logging.root.manager.disable
    yield
    logging.disable(before)


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A checkpoint of a random HuBERT of 12 layers x 16, as fairseq's pre-training writes it."""
    model, cfg = stock_hubert(**TINY)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save({"args": None, "cfg": cfg, "model": model.state_dict(), "task_state": {}}, path)
    return path


@pytest.fixture(scope="session")
def speech(tmp_path_factory):
    """A folder of manifests, 24 recordings for training and 6 for validation: sweeps of 0.2 to 0.6 s."""
    root = tmp_path_factory.mktemp("speech")
    (root / "audio").mkdir()
    generator = np.random.default_rng(0)
    for split, count in (("train", 24), ("valid", 6)):
        lines = [str(root)]
        for number in range(count):
            samples = int(generator.integers(3200, 9600))
            phase = np.cumsum(np.linspace(generator.uniform(0.02, 0.1), generator.uniform(0.1, 0.5), samples))
            noise = 0.02 * generator.standard_normal(samples)
            soundfile.write(root / f"audio/{split}{number}.flac", 0.3 * np.sin(phase) + noise, 16_000)
            lines.append(f"audio/{split}{number}.flac\t{samples}")
        (root / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return root
