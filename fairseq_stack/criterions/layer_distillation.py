"""The criterion: the distance between the student and the teacher's layers."""

from dataclasses import dataclass, field
from typing import Any, List

import torch
from fairseq.criterions import FairseqCriterion
from fairseq.dataclass import FairseqDataclass
from fairseq.logging import metrics
from torch import Tensor, nn

from fairseq_stack.criterions.layer_mapping import check_supervision, student_position, taught_layers
from fairseq_stack.criterions.losses import (
    LOSSES,
    TARGET_NORMALIZATIONS,
    normalize_targets,
    predicted_right,
    valid_frames,
)
from fairseq_stack.errors import InputError, check_choice, check_weight


@dataclass
class LayerDistillationConfig(FairseqDataclass):
    """Which teacher layers the student learns, with which loss, and the weight of each part."""

    loss: str = field(
        default="mse",
        metadata={
            "help": "the loss: mse, l1, l1_cosine (DistilHuBERT's), temporal_gram (STaR's; it compares hidden states"
            " directly, without heads), units (cross-entropy of the teacher's k-means clusters, as in HuBERT; it needs"
            " task.target_format=unitsN), codes (cross-entropy of all codebooks of task.target_format=pqN), or the"
            " name of a loss in an extension"
        },
    )
    cosine_weight: float = field(
        default=1.0, metadata={"help": "weight of -log sigmoid(cosine similarity) in l1_cosine, the paper's lambda"}
    )
    target_normalization: str = field(
        default="none",
        metadata={
            "help": "normalisation of the teacher's hidden states: none, layer_norm (each frame, over its features) or"
            " instance_norm (each feature, over the frames of the utterance)"
        },
    )
    teacher_layers: List[int] = field(
        default_factory=lambda: [4, 8, 12],
        metadata={"help": "teacher layers of the intermediate loss, counted from 1"},
    )
    intermediate_style: str = field(
        default="layer_to_layer",
        metadata={
            "help": "which student layer learns a teacher layer: layer_to_layer (the one at the same relative depth,"
            " in every stage) or prediction (the last one learns all of them, as in DistilHuBERT)"
        },
    )
    intermediate_weight: float = field(
        default=0.5, metadata={"help": "weight of the intermediate loss; with 0 only the output loss is trained"}
    )
    output_weight: float = field(
        default=1.0,
        metadata={
            "help": "weight of the output loss, which compares with the teacher's last layer; with 0 only the"
            " intermediate loss is trained"
        },
    )
    unmasked_weight: float = field(
        default=1.0,
        metadata={"help": "weight of the unmasked frames when task.mask_prob is above 0; masked frames have weight 1"},
    )


class LayerDistillation(FairseqCriterion):
    """Weighted output loss plus weighted intermediate loss, both per frame.

    output = loss(teacher's last layer, prediction from the student's last layer)
    intermediate = mean over `teacher_layers` of the loss between a teacher layer and its prediction
    loss = output_weight * output + intermediate_weight * intermediate

    The defaults are those of Kim & Lee, Interspeech 2026. The paper does not say whether the
    intermediate terms are averaged or summed. With the mean, the weight does not depend on the number of
    layers.

    DistilHuBERT's loss is only a mean over the predicted layers. It is l1_cosine with
    intermediate_style=prediction, intermediate_weight=1 and output_weight=0. STaR's loss is temporal_gram
    with the same weights, all layers and layer_to_layer. It differs by a factor, because STaR sums over
    layers.

    With task.mask_prob some of the student's input frames are masked, while the teacher gets all of
    them. Masked and unmasked frames have separate weights and log entries. ARMHuBERT (Jang et al.,
    Interspeech 2023) gives both the weight 1. Its unmasked frames learn from a second pass of the teacher
    over the masked input; here both learn from the same pass.

    Raises:
        InputError: a name is unknown, a weight is negative, nothing is left to learn, or a combination
            cannot be computed.
    """

    def __init__(self, cfg: LayerDistillationConfig, task: Any) -> None:
        super().__init__(task)
        self.cfg = cfg
        self.loss = LOSSES.choose(cfg.loss)
        self.output_layer = task.teacher.depth
        self.intermediate_layers = sorted(set(cfg.teacher_layers))
        self.layers = taught_layers(cfg, task.teacher.depth)
        self.target_layers = self.layers
        if not self.loss.heads:  # such a loss needs the input of each layer too
            self.target_layers = sorted({*self.layers, *(layer - 1 for layer in self.layers)})

    @classmethod
    def build_criterion(cls, cfg: LayerDistillationConfig, task: Any) -> "LayerDistillation":
        """Check the configuration and build the criterion for a task."""
        check_supervision(cfg)
        check_choice("criterion.target_normalization", cfg.target_normalization, TARGET_NORMALIZATIONS)
        if LOSSES[cfg.loss].codes and cfg.target_normalization != "none":
            raise InputError(
                f"criterion.target_normalization={cfg.target_normalization} has no meaning for the codes of"
                f" criterion.loss={cfg.loss}; set it to none"
            )
        for name in ("cosine_weight", "intermediate_weight", "unmasked_weight"):
            check_weight(f"criterion.{name}", getattr(cfg, name))
        if not cfg.output_weight and not cfg.intermediate_weight:
            raise InputError(
                "criterion.output_weight=0 and criterion.intermediate_weight=0 leave nothing to learn; raise one"
            )
        return cls(cfg, task)

    @property
    def validation_metrics(self) -> list[str]:
        """The names of the values that a validation logs; validations mask nothing."""
        output = ["output_loss"] if self.output_layer in self.layers else []
        layers = [f"layer_{layer}" for layer in self.layers]
        about_targets = "accuracy" if self.loss.codes else "teacher_norm"
        return ["loss", *output, "intermediate_loss", *layers, about_targets, "stage", "depth"]

    def forward(
        self, model: nn.Module, sample: dict[str, Any], reduce: bool = True
    ) -> tuple[Tensor, int, dict[str, Any]]:
        """Loss of one batch.

        Args:
            model: the student.
            sample: `waveforms` [B, S], `lengths` (B ints, in samples) and `targets` {teacher layer: [B, T, D]},
                or [B, T, codebooks] for a loss on codes;
                `mask` [B, T] bool if frames of the student's input are masked; `features` [B, C, T] if the
                student shares the teacher's CNN.
            reduce: an argument of fairseq's that has no effect here.

        Returns:
            the loss summed over frames; the number of valid frames, by which fairseq divides the
            gradient; and the sums to log. The CPU does not wait for any of them.
        """
        mask, last = sample.get("mask"), sample["targets"][self.layers[-1]]
        net = model(sample["waveforms"], sample["lengths"], mask, sample.get("features"))
        valid = valid_frames(net["frames"], last.size(1)).to(last.device, non_blocking=True)
        targets = {
            layer: normalize_targets(target, valid, self.cfg.target_normalization)
            for layer, target in sample["targets"].items()
        }
        terms = everywhere = self.terms(net, targets, valid)
        masked = {}
        if mask is not None:
            weight = self.cfg.unmasked_weight
            with torch.set_grad_enabled(torch.is_grad_enabled() and weight != 1):
                masked = self.terms(net, targets, valid & mask)
            if weight != 1:
                terms = {layer: weight * everywhere[layer] + (1 - weight) * masked[layer] for layer in self.layers}
        loss = self.total(terms)

        sample_size = int(net["frames"].sum())
        logging = {
            "loss": loss.detach(),
            "intermediate_loss": self.intermediate(terms).detach(),
            "depth": float((len(net["hidden_states"]) - 1) * sample_size),
            "stage": float(net["stage"] * sample_size),
            "sample_size": sample_size,
            "ntokens": sample_size,
            "nsentences": len(sample["lengths"]),
        }
        if self.loss.codes:
            right = [predicted_right(net["predictions"][layer], targets[layer], valid) for layer in self.layers]
            logging["accuracy"] = torch.stack(right).mean()
        else:
            logging["teacher_norm"] = last.norm(dim=-1, dtype=torch.float32).masked_fill(~valid, 0.0).sum()
        if self.output_layer in terms:
            logging["output_loss"] = terms[self.output_layer].detach()
        for layer in terms:
            logging[f"layer_{layer}"] = terms[layer].detach()
        if mask is not None:
            logging["masked_loss"] = self.total(masked).detach()
            logging["unmasked_loss"] = self.total(everywhere).detach() - logging["masked_loss"]
            logging["masked_share"] = (valid & mask).sum(dtype=torch.float32)
        return loss, sample_size, logging

    def terms(self, net: dict[str, Any], targets: dict[int, Tensor], frames: Tensor) -> dict[int, Tensor]:
        """Return {teacher layer: its loss, summed over `frames`}; the arguments are those of `term`."""
        return {layer: self.term(layer, net, targets, frames) for layer in self.layers}

    def term(self, layer: int, net: dict[str, Any], targets: dict[int, Tensor], frames: Tensor) -> Tensor:
        """The loss of one teacher layer, summed over `frames`.

        Args:
            layer: of the teacher, counted from 1.
            net: what the student's forward pass returns.
            targets: {teacher layer: [B, T, D]}.
            frames: [B, T] bool.
        """
        options = {name: getattr(self.cfg, name) for name in self.loss.fields}
        if self.loss.heads:
            return self.loss.function(net["predictions"][layer], targets[layer], frames, **options)
        states = net["hidden_states"]
        position = student_position(layer, self.output_layer, len(states) - 1)
        pairs = states[position - 1], states[position], targets[layer - 1], targets[layer]
        return self.loss.function(*pairs, frames, **options)

    def total(self, terms: dict[int, Tensor]) -> Tensor:
        """The weighted sum of the terms."""
        output = terms[self.output_layer] if self.cfg.output_weight else 0.0
        return self.cfg.output_weight * output + self.cfg.intermediate_weight * self.intermediate(terms)

    def intermediate(self, terms: dict[int, Tensor]) -> Tensor:
        """The mean of the terms of `teacher_layers`; 0 if there are none."""
        zero = terms[self.layers[0]].new_zeros(())
        return sum((terms[layer] for layer in self.intermediate_layers), zero) / max(len(self.intermediate_layers), 1)

    @classmethod
    def reduce_metrics(cls, logging_outputs: list[dict[str, Any]]) -> None:
        """Log the means per frame over all processes. The best checkpoint is chosen by them."""
        totals = {name: sum(log[name] for log in logging_outputs) for name in logging_outputs[0]}
        frames, masked = totals["sample_size"], totals.get("masked_share", 0)
        for name, total in totals.items():
            if name not in ("sample_size", "ntokens", "nsentences"):
                # masked_loss and unmasked_loss are means over the masked and the unmasked frames.
                count = {"masked_loss": masked, "unmasked_loss": frames - masked}.get(name, frames)
                priority = {"stage": 1, "depth": 2}.get(name, 10)  # small numbers come first in the log line
                metrics.log_scalar(name, total / max(count, 1), count, priority, round=4)

    @staticmethod
    def logging_outputs_can_be_summed() -> bool:
        """True: all logged values are sums, so processes exchange only one small tensor."""
        return True
