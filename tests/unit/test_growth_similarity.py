"""The similarity around a growth: which frames count, and what is read back."""

import numpy as np
import pytest
import torch

from fairseq_stack.errors import InputError
from fairseq_stack.growth.growth_similarity import (
    FRAMES,
    GrowthSimilarity,
    read_growths,
    similarity_of,
    write_growth,
)
from fairseq_stack.growth.similarity import layer_similarity


def test_padding_takes_no_part_and_neither_does_the_precision():
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(2, 30, 6, generator=generator).bfloat16() for _ in range(3)]
    valid = torch.arange(30) < torch.tensor([30, 17])[:, None]
    expected = layer_similarity([torch.cat([state[0], state[1, :17]]).float().numpy() for state in states])
    for state in states:
        state[1, 17:] = 1e3
    np.testing.assert_allclose(similarity_of(states, valid), expected, atol=1e-12)


def test_of_a_long_batch_frames_are_taken_at_even_steps():
    state = torch.randn(1, 2 * FRAMES - 1, 4, generator=torch.Generator().manual_seed(1))
    other = state.roll(1, dims=2) ** 2
    every_second = [x[0, ::2].numpy() for x in (state, other)]
    found = similarity_of([state, other], torch.ones(1, 2 * FRAMES - 1, dtype=torch.bool))
    np.testing.assert_allclose(found, layer_similarity(every_second), atol=1e-12)


def test_growths_are_read_back_in_their_order(tmp_path):
    for update, depth in ((100, 9), (20, 6)):
        write_growth(tmp_path / "new", GrowthSimilarity(update, np.full((4, 4), 1 / 3), np.eye(depth + 1)))
    first, second = read_growths(tmp_path / "new")
    assert (first.update, second.update) == (20, 100) and first.after.shape == (7, 7)
    assert (first.before == 0.3333).all()
    assert read_growths(tmp_path) == []


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"update": 3, "before": "x", "after": [[1]]}'])
def test_a_file_that_is_something_else_is_named(tmp_path, content):
    (tmp_path / "growth_at_3.json").write_text(content)
    with pytest.raises(InputError, match="growth_at_3.json is not as the training wrote it"):
        read_growths(tmp_path)
