"""A control: output projections of all layers start at zero, also without growth."""

import torch

from fairseq_stack.growth.events import LISTENERS, GrowthListener
from fairseq_stack.models.layer_stack import OUTPUT_PROJECTIONS


@LISTENERS.register("silent start")
class SilentStart(GrowthListener):
    """Zeroes the output projections of a new student."""

    @torch.no_grad()
    def start(self, model):
        for layer in model.encoder.layers:
            for name in OUTPUT_PROJECTIONS:
                for parameter in layer.get_submodule(name).parameters():
                    parameter.zero_()
