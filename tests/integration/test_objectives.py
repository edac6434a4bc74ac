"""Every objective trains through fairseq and through growth."""

import pytest
from training import tiny, train

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
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_student_grows_to_its_full_depth_and_all_its_parameters_learn(objective, speech, teacher_file, tmp_path):
    fields = {"optimization.max_update": 8, "model.stack_alpha": 0.0, **OBJECTIVES[objective]}
    student = train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields)).get_model()
    assert student.depth == 12
    for name, parameter in student.named_parameters():
        assert parameter.isfinite().all() and parameter.grad.any(), name
