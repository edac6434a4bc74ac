"""A learning rate that falls with the depth: the schedule's rate times (first depth / depth) ** POWER."""

from fairseq_stack.growth.events import LISTENERS, GrowthListener

POWER = 0.25


@LISTENERS.register("rate by depth")
class RateByDepth(GrowthListener):
    """Scales all rates that the schedule sets from a growth on. A run that resumes after a growth has the full rate."""

    def after(self, growth):
        optimizer, depths = growth.optimizer, growth.model.plan.depths
        factor = (depths[0] / growth.model.depth) ** POWER
        set_lr = type(optimizer).set_lr
        optimizer.set_lr = lambda lr: set_lr(optimizer, lr * factor)
