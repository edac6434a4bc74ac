"""New layers that warm up again: their updates are scaled by a factor that rises to 1 over UPDATES updates.

So the new layers have a learning rate of their own. Their moments stay as they are. It is for trainings in fp32: half
precision has fp32 masters, which it does not scale. A run that resumes while the factor is below 1 goes on with 1.
"""

import torch

from fairseq_stack.growth.events import LISTENERS, GrowthListener

UPDATES = 50


@LISTENERS.register("rewarm new layers")
class RewarmNewLayers(GrowthListener):
    """Scales the updates of the layers that the last growth has added."""

    def after(self, growth):
        model, optimizer, begin = growth.model, growth.optimizer, growth.update
        new = [parameter.data for _, parameter, _ in growth.copied]
        whole_step = type(optimizer).step

        def step(*args, **kwargs):
            factor = min((model._updates + 1 - begin) / UPDATES, 1.0)
            before = [parameter.clone() for parameter in new] if factor < 1 else []
            whole_step(optimizer, *args, **kwargs)
            for parameter, old in zip(new, before):
                parameter.copy_(torch.lerp(old, parameter, factor))

        optimizer.step = step
