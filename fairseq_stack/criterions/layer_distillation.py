"""The criterion: how far the student's predictions are from the teacher's layers."""

from dataclasses import dataclass, field
from typing import List

from fairseq.criterions import FairseqCriterion, register_criterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics

from fairseq_stack.errors import InputError, one_line_errors
from fairseq_stack.losses import mse, valid_frames


@dataclass
class LayerDistillationConfig(FairseqDataclass):
    """Which teacher layers the student learns, and how much the intermediate ones weigh."""

    teacher_layers: List[int] = field(
        default_factory=lambda: [4, 8, 12],
        metadata={
            "help": "teacher layers of the intermediate loss, counted from 1; each is learned by the student layer at"
            " the same relative depth, in every stage"
        },
    )
    intermediate_weight: float = field(
        default=0.5, metadata={"help": "weight of the intermediate loss; 0 leaves the output loss alone"}
    )


@register_criterion("layer_distillation", dataclass=LayerDistillationConfig)
class LayerDistillation(FairseqCriterion):
    """Output loss plus weighted intermediate loss, both per frame.

    output = MSE(teacher's last layer, prediction from the student's last layer)
    intermediate = mean over `teacher_layers` of the MSE between that teacher layer and the prediction
    from the student layer at the same relative depth
    loss = output + intermediate_weight * intermediate

    From Kim & Lee, Interspeech 2026. The paper does not say whether the intermediate terms are
    averaged or summed; the mean makes the weight independent of how many layers are chosen.

    Raises:
        InputError: a teacher layer that the teacher does not have, or a negative weight.
    """

    def __init__(self, cfg, task):
        super().__init__(task)
        self.teacher_layers = sorted(set(cfg.teacher_layers))
        self.intermediate_weight = cfg.intermediate_weight
        self.output_layer = task.teacher.depth

    @classmethod
    @one_line_errors
    def build_criterion(cls, cfg, task):
        if cfg.intermediate_weight < 0:
            raise InputError(f"criterion.intermediate_weight={cfg.intermediate_weight} must be 0 or more")
        return cls(cfg, task)

    def forward(self, model, sample, reduce=True):
        """Loss of one batch.

        Args:
            model: the student.
            sample: `waveforms` [B, S], `lengths` [B] in samples, `targets` {teacher layer: [B, T, D]}.

        Returns:
            the loss summed over frames; the number of valid frames, by which fairseq divides the
            gradient; and the sums to be logged.
        """
        net = model(sample["waveforms"], sample["lengths"])
        frames, targets = net["frames"], sample["targets"]
        valid = valid_frames(frames, targets[self.output_layer].size(1))
        terms = {layer: mse(net["predictions"][layer], target, valid) for layer, target in targets.items()}
        output = terms[self.output_layer]
        intermediate = sum(terms[layer] for layer in self.teacher_layers) / max(len(self.teacher_layers), 1)
        loss = output + self.intermediate_weight * intermediate

        sample_size = int(frames.sum())
        last = targets[self.output_layer].float()
        logging = {
            "loss": loss.detach(),
            "output_loss": output.detach(),
            "intermediate_loss": intermediate.detach() if self.teacher_layers else 0.0,
            "teacher_norm": last.norm(dim=-1)[valid].sum(),
            "depth": float((len(net["hidden_states"]) - 1) * sample_size),
            "stage": float(net["stage"] * sample_size),
            "sample_size": sample_size,
            "ntokens": sample_size,
            "nsentences": len(sample["lengths"]),
        }
        for layer in terms:
            logging[f"layer_{layer}"] = terms[layer].detach()
        return loss, sample_size, logging

    @classmethod
    def reduce_metrics(cls, logging_outputs):
        """Per-frame means over all processes, for the log and for choosing the best checkpoint."""
        frames = sum(log["sample_size"] for log in logging_outputs)
        names = [name for name in logging_outputs[0] if name not in ("sample_size", "ntokens", "nsentences")]
        for name in names:
            total = sum(log[name] for log in logging_outputs)
            metrics.log_scalar(name, total / max(frames, 1), frames, round=4)

    @staticmethod
    def logging_outputs_can_be_summed():
        """All logged values are sums, so that processes exchange one small tensor."""
        return True
