"""The growth operators of examples/experiments do what they say."""

import pytest
import torch
from training import EXAMPLES, tiny, train

OPERATORS = EXAMPLES / "experiments/operators"


@pytest.fixture
def trained(speech, teacher_file, tmp_path):
    """A function that trains with an operator, growing at update 2, and returns the weights after 2, 4 and 6 updates."""

    def run(operator):
        fields = {
            "model.stack_stages": 2,
            "optimization.max_update": 6,
            "checkpoint.save_interval_updates": 2,
            "checkpoint.keep_interval_updates": -1,
            "+task.extensions": f"[{OPERATORS}/{operator}.py]",
        }
        model = train("librispeech_base", tiny(speech, teacher_file, tmp_path, **fields)).get_model()
        paths = [tmp_path / "checkpoints" / f"checkpoint_{name}.pt" for name in ("1_2", "1_4", "last")]
        return model.plan.growths[0], [torch.load(path, weights_only=True)["model"] for path in paths]

    return run


def of_layer(weights, seat):
    prefix = f"encoder.layers.{seat}."
    return torch.cat([value.flatten() for name, value in weights.items() if name.startswith(prefix)])


def test_new_layers_warm_up_alone(trained):
    growth, (before, after, _) = trained("rewarm_new_layers")
    for source, new in growth:
        start = of_layer(before, source)
        moved, moved_whole = ((of_layer(after, seat) - start).norm() for seat in (new, source))
        # Two updates, by 1/50 and 2/50 of what they would be. Adam's updates have about the same size for both layers.
        assert 0.5 * 1.5 / 50 < moved / moved_whole < 2 * 1.5 / 50


def test_tied_layers_are_one_until_they_become_layers_of_their_own(trained):
    growth, (before, tied, after) = trained("tied_layers")
    for source, new in growth:
        assert not torch.equal(of_layer(tied, source), of_layer(before, source))
        assert torch.equal(of_layer(tied, source), of_layer(tied, new))
        assert not torch.equal(of_layer(after, source), of_layer(after, new))
