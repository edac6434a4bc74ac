"""The listeners that a training has for a growth. They run in this order, before those of extensions."""

import logging

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq_cli import train as fairseq_train

from fairseq_stack.criterions.losses import valid_frames
from fairseq_stack.growth.events import LISTENERS, Growth, GrowthListener
from fairseq_stack.growth.growth_similarity import GrowthSimilarity, similarity_of, write_growth
from fairseq_stack.growth.surgery import copy_optimizer_state

logger = logging.getLogger(__name__)


@LISTENERS.register("optimizer")
class OptimizerState(GrowthListener):
    """Copies the fp32 masters and the moments of the copied layers."""

    def after(self, growth: Growth) -> None:
        copy_optimizer_state(growth.optimizer, growth.copied, growth.model.stack_optimizer_state)


@LISTENERS.register("moving average")
class Average(GrowthListener):
    """Grows the averaged student, too."""

    def after(self, growth: Growth) -> None:
        if growth.average is not None:
            growth.average.grow_to(growth.model.stage_number)


@LISTENERS.register("best loss")
class BestLoss(GrowthListener):
    """Forgets fairseq's best validation loss.

    So checkpoint_best.pt is the best of the deepest stage. A growth that raises the loss does not count against
    checkpoint.patience.
    """

    def after(self, growth: Growth) -> None:
        vars(checkpoint_utils.save_checkpoint).pop("best", None)
        vars(fairseq_train.should_stop_early).pop("best", None)


@LISTENERS.register("similarity")
class Similarity(GrowthListener):
    """Writes the similarity of the layers before and after a growth beside the checkpoints, for the report."""

    def __init__(self) -> None:
        self.writes = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0

    def before(self, growth: Growth) -> None:
        if self.writes:
            self.similarity = _similarity(growth)

    def after(self, growth: Growth) -> None:
        if self.writes:
            write_growth(growth.folder, GrowthSimilarity(growth.update, self.similarity, _similarity(growth)))


@LISTENERS.register("log")
class LogLine(GrowthListener):
    """Logs the loss on the current batch before and after the growth."""

    def before(self, growth: Growth) -> None:
        self.depth, self.loss = growth.model.depth, growth.loss()

    def after(self, growth: Growth) -> None:
        logger.info(
            f"growth | update {growth.update} | stage {growth.model.stage_number} | depth {self.depth} ->"
            f" {growth.model.depth} | loss on this batch {self.loss:.4f} -> {growth.loss():.4f}"
        )


@torch.no_grad()
def _similarity(growth: Growth) -> np.ndarray:
    """Return the linear CKA between the student's hidden states on the current batch, without dropout."""
    model, sample = growth.model, growth.sample
    model.eval()
    with torch.autocast("cuda", enabled=isinstance(growth.optimizer, AMPOptimizer)):
        states, frames = model.hidden_states(
            sample["waveforms"], sample["lengths"], sample.get("mask"), sample.get("features")
        )
    model.train()
    return similarity_of(states, valid_frames(frames, states[0].size(1)))
