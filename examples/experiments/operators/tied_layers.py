"""New layers that share the weights of their originals for the first SHARE of their stage, and then get their own.

So 3 layers are first applied twice each, and become 6 layers later. When they do, the student computes what it did
before, and the new layers take over the moments of their originals.

An update takes as long as one with plain copies. Sharing from the first update on would cost more. With each of the 3
layers applied four times, the layers take the time of full depth. With the depth of the next stage (6, 9, 12 and 12
layers in place of 3, 6, 9 and 12), they take 1.3 times as long.

A run that resumes while layers are tied goes on with layers of their own. It is for trainings without a moving average.
"""

from fairseq_stack.growth.events import LISTENERS, GrowthListener
from fairseq_stack.growth.surgery import copy_optimizer_state, copy_weights

SHARE = 0.5


@LISTENERS.register("tied layers")
class TiedLayers(GrowthListener):
    """Ties the new layers to their originals, and unties them within their stage."""

    def after(self, growth):
        model, stage = growth.model, growth.model.stage_number
        end = (*model.starts, model.cfg.max_update)[stage]
        until = growth.update + round(SHARE * (end - growth.update))
        own = [
            (module, name, parameter)
            for _, seat in model.plan.growths[stage - 2]
            for module in model.encoder.layers[seat].modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]
        originals = {new: source for source, new, _ in growth.copied}
        for module, name, parameter in own:
            setattr(module, name, originals[parameter])

        def untie(*_):
            if model._updates < until:
                return
            for module, name, parameter in own:
                setattr(module, name, parameter)
            copy_weights(growth.copied)
            copy_optimizer_state(growth.optimizer, growth.copied, model.stack_optimizer_state)
            hook.remove()

        hook = model.register_forward_pre_hook(untie)
