"""The student: a HuBERT whose depth grows while it trains."""

import logging
from dataclasses import dataclass, field
from typing import Any, List

import torch
import torch.nn as nn
from fairseq.dataclass import FairseqDataclass
from omegaconf import II, OmegaConf

from fairseq_stack.criterions.layer_mapping import (
    check_mask,
    check_supervision,
    predicted_layers,
    student_position,
    taught_layers,
)
from fairseq_stack.errors import InputError, check_choice, check_numbers, input_errors
from fairseq_stack.growth.plan import METHODS, SEATS, known_stage, layers_text, plan_growth, plan_text
from fairseq_stack.growth.schedule import SCHEDULES, Plateau, stage_at, stage_starts
from fairseq_stack.growth.surgery import copy_weights, paired_parameters
from fairseq_stack.models.hubert_encoder import HubertEncoder
from fairseq_stack.models.init_from_teacher import start_cnn, start_layers
from fairseq_stack.models.shape import LARGEST_WIDTH

logger = logging.getLogger(__name__)


@dataclass
class StackedHubertConfig(FairseqDataclass):
    """Shape of the finished student and the way it grows. The defaults are the paper's student."""

    extractor_mode: str = field(
        default="default",
        metadata={"help": "norm of the CNN: default (group norm in the first layer) or layer_norm (in every layer)"},
    )
    conv_feature_layers: str = field(
        default="[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
        metadata={"help": "layers of the CNN as [(channels, kernel, stride), ...]"},
    )
    conv_bias: bool = field(default=False, metadata={"help": "biases in the CNN"})
    feature_layer_norm: bool = field(
        default=True, metadata={"help": "layer norm between the CNN and the projection; DistilHuBERT has none"}
    )
    feature_grad_mult: float = field(default=1.0, metadata={"help": "factor on the gradient of the CNN; 0 freezes it"})
    encoder_layers: int = field(default=12, metadata={"help": "transformer layers of the finished student"})
    encoder_embed_dim: int = field(default=384, metadata={"help": "width of the transformer"})
    encoder_ffn_embed_dim: int = field(default=1536, metadata={"help": "width of the feed-forward layers"})
    encoder_attention_heads: int = field(default=8, metadata={"help": "attention heads of each layer"})
    activation_fn: str = field(default="gelu", metadata={"help": "activation of the feed-forward layers"})
    layer_norm_first: bool = field(
        default=False, metadata={"help": "layer norm before attention and feed-forward (pre-norm) instead of after"}
    )
    conv_pos: int = field(default=128, metadata={"help": "kernel of the positional convolution, in frames"})
    conv_pos_groups: int = field(default=16, metadata={"help": "groups of the positional convolution"})
    dropout: float = field(default=0.1, metadata={"help": "dropout in the transformer"})
    attention_dropout: float = field(default=0.1, metadata={"help": "dropout of the attention weights"})
    activation_dropout: float = field(default=0.0, metadata={"help": "dropout after the activation"})
    dropout_input: float = field(default=0.0, metadata={"help": "dropout of the transformer's input"})

    init_cnn_from_teacher: bool = field(
        default=False, metadata={"help": "start the CNN from the teacher's, which must have the same shape"}
    )
    init_layers_from_teacher: List[int] = field(
        default_factory=list,
        metadata={"help": "start the first stage's layers from these layers of the teacher, of the same width"},
    )

    share_teacher_cnn: bool = field(
        default=False,
        metadata={"help": "take over the teacher's CNN, frozen (with feature_grad_mult=0), and run it once for both"},
    )

    stack_method: str = field(
        default="interleaved",
        metadata={
            "help": "how the depth grows: interleaved (each copy right behind its original), gradual (a copy of"
            " the last block on top), midas (of the middle block, right behind it), stackbert (of the whole stack"
            " on top, depth doubles), gstack (copies of the whole stack on top, full depth at once), none, or one of an"
            " extension"
        },
    )
    stack_stages: int = field(
        default=4,
        metadata={
            "help": "stages B; stage b trains b * encoder_layers / B layers (stackbert: the first trains"
            " encoder_layers / 2 ** (B - 1); gstack: the first of two trains encoder_layers / B; none: B is 1)"
        },
    )
    stack_schedule: str = field(
        default="prop",
        metadata={
            "help": "updates of each stage: equal, prop (stage b in proportion to b ** alpha), milestones, plateau (a"
            " stage ends as with prop, or before when the validation loss has stopped falling), or one of an extension"
        },
    )
    stack_alpha: float = field(default=1.0, metadata={"help": "alpha of the prop and plateau schedules"})
    stack_milestones: List[int] = field(
        default_factory=list,
        metadata={"help": "first updates of stages 2, 3, ... for the milestones schedule"},
    )
    stack_patience: int = field(
        default=3,
        metadata={
            "help": "validations in a row without a lower loss that end a stage of the plateau schedule (loss of"
            " the first subset in dataset.valid_subset, to four decimals as in the log)"
        },
    )
    stack_min_updates: int = field(
        default=0,
        metadata={"help": "updates of a stage before which the plateau schedule does not end it early"},
    )
    stack_optimizer_state: str = field(
        default="copy", metadata={"help": "the optimiser's moments of a new layer: those of its original, or zeros"}
    )

    head_shared: bool = field(
        default=False, metadata={"help": "one head for all teacher layers instead of one for each"}
    )
    head_inner_dim: int = field(
        default=0,
        metadata={"help": "width of a hidden layer with GELU in every head (DistilHuBERT's); 0: linear heads"},
    )

    loss: str = II("criterion.loss")
    teacher_layers: Any = II("criterion.teacher_layers")
    intermediate_style: str = II("criterion.intermediate_style")
    output_weight: float = II("criterion.output_weight")
    mask_prob: float = II("task.mask_prob")
    normalize: bool = II("task.normalize")
    max_update: int = II("optimization.max_update")


class StackedHubert(HubertEncoder):
    """A HuBERT student with one prediction head for each teacher layer that it learns from.

    All layers exist from the start, each in its final seat. `stage`, a buffer, says how many of them
    are in use; it is the only truth about the depth. It counts in the plan of this configuration. So the
    weights are saved with the seats in use too, and loading finds the stage that uses the same.

    Args:
        cfg: a StackedHubertConfig.
        head_widths: {teacher layer: teacher width}; empty for a loss between hidden states.
        teacher_depth: transformer layers of the teacher.
        plan: a GrowthPlan (default: that of the configuration).

    Raises:
        InputError: the method, stages and layers do not fit, or a teacher layer has no student layer
            at the same relative depth.
    """

    def __init__(self, cfg, head_widths, teacher_depth, plan=None):
        super().__init__(cfg)
        self.cfg = cfg
        self.plan = plan or plan_growth(cfg.stack_method, cfg.encoder_layers, cfg.stack_stages)
        self.teacher_depth = teacher_depth
        self.intermediate_style = cfg.intermediate_style
        self.head_widths = head_widths
        if not 0 <= cfg.head_inner_dim <= LARGEST_WIDTH:
            raise InputError(f"model.head_inner_dim={cfg.head_inner_dim} must lie between 0 and {LARGEST_WIDTH}")
        heads = [prediction_head(cfg.encoder_embed_dim, cfg.head_inner_dim, width) for width in head_widths.values()]
        if cfg.head_shared:
            heads = heads[:1] * len(heads)
        self.heads = nn.ModuleDict(zip(map(str, head_widths), heads))
        if self.feature_grad_mult == 0:
            # Otherwise weight decay would move what has no gradient, where masters are flat or DDP invents zeros.
            self.feature_extractor.requires_grad_(False)
        if cfg.mask_prob > 0:
            self.mask_emb = nn.Parameter(torch.rand(cfg.encoder_embed_dim))  # as fairseq starts it
        self.stack_optimizer_state = cfg.stack_optimizer_state
        self.starts = None  # set for training; a model that is only evaluated never grows
        self.plateau = None
        # A float, because fairseq's moving average multiplies every entry of the state dict.
        self.register_buffer("stage", torch.zeros(()))
        self._stage_index = 0
        self._unfinished = []
        self._updates = 0  # as set_num_updates was told last

    @classmethod
    def build_model(cls, cfg, task):
        teacher = task.teacher
        check_supervision(cfg)
        check_numbers("model.init_layers_from_teacher", cfg.init_layers_from_teacher)
        check_numbers("model.stack_milestones", cfg.stack_milestones)
        check_choice("model.stack_optimizer_state", cfg.stack_optimizer_state, ("copy", "reset"))
        if cfg.share_teacher_cnn and (cfg.feature_grad_mult or cfg.normalize != getattr(teacher, "normalize", None)):
            raise InputError(
                "model.share_teacher_cnn=true needs a teacher from a checkpoint of fairseq, model.feature_grad_mult=0"
                " and task.normalize as the teacher was trained; correct them or set it to false"
            )
        if cfg.share_teacher_cnn and cfg.normalize and task.cfg.normalize_epsilon != teacher.epsilon:
            raise InputError(
                "model.share_teacher_cnn=true takes over the teacher's normalisation too; set"
                f" task.normalize_epsilon={teacher.epsilon:g} in place of {task.cfg.normalize_epsilon:g}"
            )
        check_mask(cfg)
        unknown = [layer for layer in cfg.teacher_layers if not 1 <= layer <= teacher.depth]
        if unknown:
            raise InputError(
                f"criterion.teacher_layers: {unknown[0]} is no layer of task.teacher={teacher.name}; choose from 1 to"
                f" {teacher.depth}"
            )
        layers = taught_layers(cfg, teacher.depth)
        heads = {layer: teacher.width for layer in predicted_layers(cfg, teacher.depth)}
        model = cls(cfg, heads, teacher.depth)
        for layer in layers:
            for depth in model.plan.depths:
                student_position(layer, teacher.depth, depth, cfg.intermediate_style)
        layer_to_layer = cfg.intermediate_style == "layer_to_layer"
        if cfg.stack_method in ("gradual", "midas") and layer_to_layer and layers != [teacher.depth]:
            # A growth gives the layers another relative depth, and with it another teacher layer.
            logger.warning(
                f"model.stack_method={cfg.stack_method} diverged with a layer-to-layer intermediate loss in Kim"
                " & Lee 2026; they used what criterion.intermediate_style=prediction does"
            )
        model.starts = stage_starts(
            cfg.stack_schedule, len(model.plan.stages), cfg.max_update, cfg.stack_alpha, cfg.stack_milestones
        )
        if SCHEDULES[cfg.stack_schedule].ends_early:
            model.plateau = Plateau(cfg.stack_patience, cfg.stack_min_updates)
        if cfg.init_cnn_from_teacher or cfg.share_teacher_cnn:
            start_cnn(model, teacher)
        if cfg.init_layers_from_teacher:
            start_layers(model, model.seats, teacher, cfg.init_layers_from_teacher)
        return model

    @classmethod
    def from_checkpoint(cls, state, name="the checkpoint", teacher_depth=None):
        """The student of a fairseq checkpoint's content, in fp32 and eval mode, at the depth it had reached.

        Args:
            state: what load_checkpoint returns.
            name: what an error calls the checkpoint, such as its path.
            teacher_depth: transformer layers of its teacher. Without it, a student that learned layer to layer and
                not from the teacher's last layer loses its heads, because nothing in a checkpoint tells where in the
                student they belong.

        Raises:
            InputError: the content is not what a training of a `stacked_hubert` saves.
        """
        with input_errors(f"{name} holds no stacked_hubert that can be used"):
            return cls._from_checkpoint(state, teacher_depth)

    @classmethod
    def _from_checkpoint(cls, state, teacher_depth):
        cfg = OmegaConf.merge(OmegaConf.structured(StackedHubertConfig), state["cfg"]["model"])
        weights = state["model"]
        if cfg.intermediate_style == "layer_to_layer" and not cfg.output_weight and teacher_depth is None:
            weights = {name: weight for name, weight in weights.items() if not name.startswith("heads.")}
        heads = {
            int(name.split(".")[1]): weight.size(0)  # the last weight of a head is that of its output
            for name, weight in weights.items()
            if name.startswith("heads.") and name.endswith(".weight")
        }
        # A student of an extension's growth method can be used without the extension, at the depth that it has.
        plan = None if cfg.stack_method in METHODS or SEATS not in weights else known_stage(weights[SEATS].tolist())
        model = cls(cfg, heads, teacher_depth or max(heads, default=0), plan)
        model.load_state_dict(weights)
        return model.float().eval()

    def at_initialisation(self):
        """A student of the same shape and depth with new random weights, in eval mode: what training has to beat."""
        fresh = StackedHubert(self.cfg, self.head_widths, self.teacher_depth, self.plan)
        fresh.stage.copy_(self.stage)
        fresh._stage_index = self._stage_index
        return fresh.eval()

    # Growth

    @property
    def seats(self):
        """The seats in use, in the order of the forward pass."""
        return self.plan.stages[self._stage_index]

    @property
    def depth(self):
        """Number of layers in use."""
        return len(self.seats)

    @property
    def stage_number(self):
        """The current stage, counted from 1 as the paper does."""
        return self._stage_index + 1

    def due_stage(self, update):
        """The stage (from 1) that the schedule asks for at `update`, never less than the current one."""
        if not self.starts:
            return self.stage_number
        ended = self.plateau is not None and self.plateau.reached and self.stage_number < len(self.plan.stages)
        return max(stage_at(update, self.starts) + 1, self.stage_number + ended)

    def updates_left(self, update):
        """{depth: updates still to do at it} after `update` updates; empty without optimization.max_update.

        With the plateau schedule a stage may end before, and the next one then takes its updates.
        """
        if self.cfg.max_update <= 0:
            return {}
        begins = [update] * self.stage_number + [max(start, update) for start in self.starts[self.stage_number :]]
        ends = (*self.starts[1:], self.cfg.max_update)
        stages = list(zip(self.plan.depths, begins, ends))[self._stage_index :]
        return {depth: max(end - begin, 0) for depth, begin, end in stages}

    def observe_validation(self, update, loss):
        """Tell the plateau schedule the validation loss at `update`; the other schedules do not care."""
        if self.plateau is not None:
            self.plateau.observe(update, loss)

    def set_num_updates(self, num_updates):
        """fairseq's hook before every forward pass in training: grow if the schedule asks for it.

        Called again at the same update (gradient accumulation) it does nothing more.
        """
        super().set_num_updates(num_updates)
        self._updates = num_updates
        due = self.due_stage(num_updates)
        if due == self.stage_number:
            return
        self.grow_to(due)
        if self.plateau is not None:
            self.plateau.begin(num_updates)

    def grow_to(self, stage):
        """Wake layers until `stage` (from 1) is reached; `finish_growth` tells which parameters were copied."""
        while self.stage_number < stage:
            growth = self.plan.growths[self._stage_index]
            copy_weights(paired_parameters(self.encoder.layers, growth))
            self._unfinished.extend(growth)
            self._stage_index += 1
            self.stage.fill_(self._stage_index)

    def finish_growth(self):
        """Pairs (source, woken) of parameters copied since the last call, for the optimiser's surgery."""
        growth, self._unfinished = self._unfinished, []
        return list(paired_parameters(self.encoder.layers, growth))

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Floats, as `stage`: fairseq's average_checkpoints.py divides every entry in place.
        destination[prefix + SEATS] = torch.tensor(self.plan.uses(self._stage_index), dtype=torch.float32)
        if self.plateau is not None:
            # fairseq saves its tasks' state but does not load it when training resumes, so it is here.
            # No buffer: training in half precision would round it.
            destination[prefix + "plateau"] = torch.tensor(self.plateau.state, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        seats = state_dict.pop(prefix + SEATS, None)
        if seats is not None:
            stage = self.plan.stage_that_uses(seats.tolist())
            if stage is None:
                raise InputError(
                    f"the weights use {layers_text(seats.nonzero().flatten().tolist())}, and no stage of"
                    f" {plan_text(self.cfg)} uses the same layers"
                )
            state_dict[prefix + "stage"] = torch.tensor(float(stage))
        plateau = state_dict.pop(prefix + "plateau", None)
        if self.plateau is not None:
            # Without a state of it the wait begins here: nothing tells when the stage began.
            self.plateau.begin(self._updates)
            if plateau is not None:
                self.plateau.state = plateau.tolist()
        super()._load_from_state_dict(state_dict, prefix, *args)
        stage = self.stage.item()
        if stage not in range(len(self.plan.stages)):
            raise InputError(f"the weights have stage {stage}, not one of 0 to {len(self.plan.stages) - 1}")
        # fairseq calls set_num_updates on a fresh model before it loads the weights of a resumed
        # run. What grew then was a copy of random weights, and the checkpoint has replaced it.
        self._stage_index = int(stage)
        self._unfinished = []

    # Forward pass

    def forward(self, waveforms, lengths, mask=None, features=None):
        """Hidden states and what the heads predict of the teacher from them.

        Args:
            waveforms: [B, S], samples at 16 kHz.
            lengths: [B], samples.
            mask: [B, T] bool, the frames whose input to the transformer is the mask embedding.
            features: [B, C, T], the CNN's, where the teacher has computed them already.

        Returns:
            a dict: `hidden_states`, depth + 1 times [B, T, D]; `frames` [B]; `predictions`, a dict
            from teacher layer to [B, T, teacher width]; `stage`, counted from 1.
        """
        hidden_states, frames = self.hidden_states(waveforms, lengths, mask, features)
        predictions = {}
        for layer, head in self.heads.items():
            position = student_position(int(layer), self.teacher_depth, self.depth, self.intermediate_style)
            predictions[int(layer)] = head(hidden_states[position])
        return {
            "hidden_states": hidden_states,
            "frames": frames,
            "predictions": predictions,
            "stage": self.stage_number,
        }

    def hidden_states(self, waveforms, lengths, mask=None, features=None):
        """[B, S] samples and [B] lengths to a list of depth + 1 times [B, T, D], and [B] frames."""
        if features is None:
            features = self.features(waveforms, lengths)
        return self.encode(features.type_as(self.encoder.layer_norm.weight), lengths, self.seats, mask=mask)


def prediction_head(width, inner, teacher_width):
    """[B, T, width] to [B, T, teacher_width], linear or with a hidden layer of `inner` features."""
    if not inner:
        return nn.Linear(width, teacher_width)
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, teacher_width))
