"""Every objective trains through fairseq and through growth."""

import pytest
from training import tiny, train

from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.checkpoints.student import student_from_checkpoint
from fairseq_stack.export.limits import has_heads
from fairseq_stack.export.student import export

# A field that the recipe's YAML does not name takes hydra's `+`.
OBJECTIVES = {
    "prediction from the last layer, L1 and cosine, no output term": {
        "+criterion.loss": "l1_cosine",
        "+criterion.intermediate_style": "prediction",
        "+criterion.output_weight": 0.0,
        "criterion.teacher_layers": [5, 7],
        "+model.head_inner_dim": 16,
    },
    "temporal relations": {"+criterion.loss": "temporal_gram", "+criterion.output_weight": 0.0},
    "masked input, normalised targets": {
        "+criterion.target_normalization": "layer_norm",
        "+task.mask_prob": 0.5,
        "+task.mask_length": 4,
    },
    "units of masked frames": {
        "+criterion.loss": "units",
        "+task.target_format": "units20",
        "+task.mask_prob": 0.5,
        "+task.mask_length": 4,
        "+criterion.unmasked_weight": 0.0,
        "common.bf16": True,
        "criterion.teacher_layers": [8],
    },
    "codes": {"+criterion.loss": "codes", "+task.target_format": "pq4", "+model.head_inner_dim": 16},
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_student_grows_to_its_full_depth_and_all_its_parameters_learn(objective, speech, teacher_file, tmp_path):
    fields = {"optimization.max_update": 8, "model.stack_alpha": 0.0, **OBJECTIVES[objective]}
    if "+task.target_format" in fields:
        fields["+task.target_store"] = tmp_path / "store"
    student = train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields)).get_model()
    assert student.depth == 12
    for name, parameter in student.named_parameters():
        assert parameter.isfinite().all() and parameter.grad.any(), name


@pytest.mark.parametrize(
    "field, message",
    [
        (
            "+criterion.loss=huber",
            "criterion.loss=huber is unknown; choose from mse, l1, l1_cosine, temporal_gram, units, codes",
        ),
        ("+task.mask_prob=1.5", "task.mask_prob=1.5 must lie between 0 and 1"),
        ("+task.mask_length=0", "task.mask_length=0 must be 1 or more"),
        (
            "+criterion.loss=units",
            "criterion.loss=units learns from stored codes; set task.target_store=FOLDER and task.target_format=unitsN,"
            " such as units500",
        ),
    ],
)
def test_a_wrong_objective_ends_the_command_with_one_line(field, message, speech, teacher_file, tmp_path):
    name, value = field.split("=")
    with pytest.raises(SystemExit) as ended:
        train("librispeech_base", tiny(speech, teacher_file, tmp_path, **{name: value}))
    assert str(ended.value) == f"error: {message}"


def test_codes_are_of_the_store_that_a_run_began_with(speech, teacher_file, tmp_path):
    fields = {"+criterion.loss": "codes", "+task.target_format": "pq2", "optimization.max_update": 2}
    fields |= {"+task.target_store": tmp_path / "store", "model.stack_method": "none", "model.stack_stages": 1}
    trainer = train("librispeech_base", tiny(speech, teacher_file, tmp_path / "run", **fields))
    assert [tuple(head.weight.shape) for head in trainer.get_model().heads.values()] == [(2 * 256, 16)] * 3
    proof = export(tmp_path / "run/checkpoints/checkpoint_last.pt", "huggingface", tmp_path / "student")
    assert proof["largest_difference_alone"] < 1e-4
    student = student_from_checkpoint(load_checkpoint(tmp_path / "run/checkpoints/checkpoint_last.pt"))
    assert "predict hidden states, not codes" in has_heads(student)
    fields["optimization.max_update"] = 3
    train("librispeech_base", tiny(speech, teacher_file, tmp_path / "run", **fields))
    next(tmp_path.glob("store/*/codebooks/8.pq2.safetensors")).unlink()
    with pytest.raises(
        SystemExit, match="has learned codes of other codebooks than those in task.target_store="
    ) as ended:
        train("librispeech_base", tiny(speech, teacher_file, tmp_path / "run", **fields))
    assert "\n" not in str(ended.value)
    fields |= {"+criterion.target_normalization": "layer_norm"}
    with pytest.raises(
        SystemExit, match="^error: criterion.target_normalization=layer_norm has no meaning for the codes"
    ):
        train("librispeech_base", tiny(speech, teacher_file, tmp_path / "other", **fields))
