"""New layers that are mixed in: x <- (1 - m) x + m layer(x), where m goes from 0 to 1 over UPDATES updates.

So a growth changes nothing at first, in post-norm too. A run that resumes while m is below 1 goes on with m = 1.
"""

from functools import partial

from fairseq_stack.growth.events import LISTENERS, GrowthListener

UPDATES = 50


@LISTENERS.register("gated layers")
class GatedLayers(GrowthListener):
    """Gates the new layers."""

    def after(self, growth):
        model = growth.model
        for _, seat in model.plan.growths[model.stage_number - 2]:
            layer = model.encoder.layers[seat]
            layer.forward = partial(_gated, model, type(layer).forward, layer, growth.update)


def _gated(model, forward, layer, begin, x, padding=None):
    share = min((model._updates - begin) / UPDATES, 1.0)
    return x + share * (forward(layer, x, padding) - x)
