"""The student: a HuBERT whose depth grows while it trains."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, List

import torch
import torch.nn as nn
from fairseq.dataclass import FairseqDataclass
from omegaconf import II, OmegaConf
from torch import Tensor

from fairseq_stack.criterions.layer_mapping import (
    check_mask,
    check_supervision,
    head_width,
    predicted_layers,
    student_position,
    taught_layers,
)
from fairseq_stack.errors import InputError, check_choice, check_numbers, input_errors
from fairseq_stack.growth.plan import METHODS, SEATS, GrowthPlan, known_stage, layers_text, plan_growth, plan_text
from fairseq_stack.growth.schedule import SCHEDULES, Plateau, stage_at, stage_starts
from fairseq_stack.growth.surgery import ParameterPair, copy_weights, paired_parameters
from fairseq_stack.models.hubert_encoder import HubertEncoder
from fairseq_stack.models.init_from_teacher import start_cnn, start_layers
from fairseq_stack.models.layer_stack import OUTPUT_PROJECTIONS
from fairseq_stack.models.shape import LARGEST_WIDTH

logger = logging.getLogger(__name__)


@dataclass
class StackedHubertConfig(FairseqDataclass):
    """The shape of the finished student and how it grows. The defaults are the paper's student."""

    extractor_mode: str = field(
        default="default",
        metadata={"help": "norm of the CNN: default (group norm in the first layer) or layer_norm (in every layer)"},
    )
    conv_feature_layers: str = field(
        default="[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
        metadata={"help": "layers of the CNN as [(channels, kernel, stride), ...]"},
    )
    conv_bias: bool = field(default=False, metadata={"help": "whether the CNN has biases"})
    feature_layer_norm: bool = field(
        default=True,
        metadata={"help": "whether a layer norm follows the CNN, before the projection; DistilHuBERT has none"},
    )
    feature_grad_mult: float = field(
        default=1.0, metadata={"help": "factor for the gradient of the CNN; 0 freezes the CNN"}
    )
    encoder_layers: int = field(default=12, metadata={"help": "number of transformer layers of the finished student"})
    encoder_embed_dim: int = field(default=384, metadata={"help": "width of the transformer"})
    encoder_ffn_embed_dim: int = field(default=1536, metadata={"help": "width of the feed-forward layers"})
    encoder_attention_heads: int = field(default=8, metadata={"help": "attention heads of each layer"})
    activation_fn: str = field(default="gelu", metadata={"help": "activation function of the feed-forward layers"})
    layer_norm_first: bool = field(
        default=False, metadata={"help": "layer norm before attention and feed-forward (pre-norm) instead of after"}
    )
    conv_pos: int = field(default=128, metadata={"help": "kernel of the positional convolution, in frames"})
    conv_pos_groups: int = field(default=16, metadata={"help": "groups of the positional convolution"})
    dropout: float = field(default=0.1, metadata={"help": "dropout in the transformer"})
    attention_dropout: float = field(default=0.1, metadata={"help": "dropout of the attention weights"})
    activation_dropout: float = field(default=0.0, metadata={"help": "dropout after the activation function"})
    dropout_input: float = field(default=0.0, metadata={"help": "dropout of the transformer's input"})

    init_cnn_from_teacher: bool = field(
        default=False,
        metadata={"help": "initialise the CNN with the teacher's weights; both CNNs must have the same shape"},
    )
    init_layers_from_teacher: List[int] = field(
        default_factory=list,
        metadata={
            "help": "initialise the layers of the first stage with these teacher layers, counted from 1, one for each"
            " layer; both models must have the same width"
        },
    )

    share_teacher_cnn: bool = field(
        default=False,
        metadata={
            "help": "use the teacher's CNN in the student too and run it once for both; the CNN stays frozen, so set"
            " model.feature_grad_mult=0"
        },
    )

    stack_method: str = field(
        default="interleaved",
        metadata={
            "help": "how the depth grows: interleaved (each copy goes right behind its original), gradual (a copy of"
            " the last block goes on top), midas (a copy of the middle block goes right behind it), stackbert (a copy"
            " of the whole stack goes on top and doubles the depth), gstack (copies of the whole stack go on top, up"
            " to full depth at once), none (no growth), or the name of a method in an extension"
        },
    )
    stack_stages: int = field(
        default=4,
        metadata={
            "help": "number of stages, B. Stage b trains b * encoder_layers / B layers. Exceptions: stackbert starts"
            " with encoder_layers / 2 ** (B - 1) layers; gstack has two stages and starts with encoder_layers / B;"
            " none needs B = 1"
        },
    )
    stack_schedule: str = field(
        default="prop",
        metadata={
            "help": "how many updates each stage gets: equal, prop (stage b in proportion to b ** alpha), milestones"
            " (see model.stack_milestones), plateau (as prop, but a stage ends earlier if the validation loss stops"
            " falling), or the name of a schedule in an extension"
        },
    )
    stack_alpha: float = field(default=1.0, metadata={"help": "alpha of the schedules prop and plateau"})
    stack_milestones: List[int] = field(
        default_factory=list,
        metadata={"help": "first updates of stages 2, 3, ... for the schedule milestones"},
    )
    stack_patience: int = field(
        default=3,
        metadata={
            "help": "the schedule plateau ends a stage after this many validations in a row without a lower loss. It"
            " uses the loss of the first subset in dataset.valid_subset, with four decimals as in the log"
        },
    )
    stack_min_updates: int = field(
        default=0,
        metadata={"help": "the schedule plateau ends no stage early before this many updates of the stage"},
    )
    stack_optimizer_state: str = field(
        default="copy",
        metadata={"help": "the optimizer's moments of a new layer: copy (those of its original) or reset (zeros)"},
    )

    stack_silent_copies: bool = field(
        default=False,
        metadata={
            "help": "whether new layers start silent: the output projections of their attention and feed-forward start"
            " at zero instead of as copies, so a new layer adds nothing to its input at first"
        },
    )

    head_shared: bool = field(
        default=False, metadata={"help": "use one prediction head for all teacher layers instead of one for each"}
    )
    head_inner_dim: int = field(
        default=0,
        metadata={
            "help": "width of a hidden layer with GELU in every prediction head, as in DistilHuBERT; 0 for linear heads"
        },
    )

    compile_layers: bool = field(
        default=False,
        metadata={
            "help": "compile the transformer layers with torch.compile at the start of a training on a GPU; a growth"
            " compiles nothing more"
        },
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

    All layers exist from the start, each in its final seat. The buffer `stage` alone defines which of them
    are in use. It is a number in the plan of this configuration. Another configuration may have another
    plan, so a state dict also has the seats in use, and loading finds the stage that uses the same seats.

    Args:
        cfg: a StackedHubertConfig.
        head_widths: {teacher layer: outputs of its head}; empty for a loss between hidden states.
        teacher_depth: number of transformer layers of the teacher.
        plan: a GrowthPlan (default: that of the configuration).

    Raises:
        InputError: the method, stages and layers do not fit each other, or a field is out of range.
    """

    stage: Tensor
    starts: tuple[int, ...] | None
    plateau: Plateau | None

    def __init__(
        self, cfg: Any, head_widths: dict[int, int], teacher_depth: int, plan: GrowthPlan | None = None
    ) -> None:
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
        self.heads = nn.ModuleDict(dict(zip(map(str, head_widths), heads)))
        if self.feature_grad_mult == 0:
            # Flat masters and DDP give parameters without a gradient one of zeros, so weight decay would change them.
            self.feature_extractor.requires_grad_(False)
        if cfg.mask_prob > 0:
            self.mask_emb = nn.Parameter(torch.rand(cfg.encoder_embed_dim))  # as fairseq initialises it
        self.stack_optimizer_state = cfg.stack_optimizer_state
        self.starts = None  # set for training; a model that is only evaluated never grows
        self.plateau = None
        # A float, because fairseq's moving average multiplies every entry of the state dict.
        self.register_buffer("stage", torch.zeros(()))
        self._stage_index = 0
        self._unfinished: list[tuple[int, int]] = []  # (source seat, new seat), for finish_growth
        self._updates = 0  # the argument of the last set_num_updates

    @classmethod
    def build_model(cls, cfg: Any, task: Any) -> "StackedHubert":
        """Check the configuration and build the student for a task, ready to train.

        Raises:
            InputError: fields are wrong, or do not fit each other or the task's teacher.
        """
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
        heads = dict.fromkeys(predicted_layers(cfg, teacher.depth), head_width(cfg, task))
        model = cls(cfg, heads, teacher.depth)
        for layer in layers:
            for depth in model.plan.depths:
                student_position(layer, teacher.depth, depth, cfg.intermediate_style)
        layer_to_layer = cfg.intermediate_style == "layer_to_layer"
        if cfg.stack_method in ("gradual", "midas") and layer_to_layer and layers != [teacher.depth]:
            # A growth changes the relative depth of the layers, so they learn from other teacher layers.
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
        if cfg.compile_layers:
            if not torch.cuda.is_available():
                raise InputError("model.compile_layers=true needs a GPU, and torch finds none; set it to false")
            model.encoder.compile_layers()
        return model

    @classmethod
    def from_checkpoint(
        cls, state: dict[str, Any], name: str = "the checkpoint", teacher_depth: int | None = None
    ) -> "StackedHubert":
        """Build the student of a fairseq checkpoint, in fp32 and eval mode, at the depth that it had reached.

        Args:
            state: the content of the checkpoint, as load_checkpoint returns it.
            name: the checkpoint's name for errors, such as its path.
            teacher_depth: number of transformer layers of its teacher. It is needed to place the heads of a student
                that learned layer to layer, but not from the teacher's last layer. A checkpoint does not contain
                it. Without it such a student is built without heads.

        Raises:
            InputError: the content does not come from a training of a `stacked_hubert`.
        """
        with input_errors(f"{name} holds no stacked_hubert that can be used"):
            return cls._from_checkpoint(state, teacher_depth)

    @classmethod
    def _from_checkpoint(cls, state: dict[str, Any], teacher_depth: int | None) -> "StackedHubert":
        cfg: Any = OmegaConf.merge(OmegaConf.structured(StackedHubertConfig), state["cfg"]["model"])
        weights = state["model"]
        if cfg.intermediate_style == "layer_to_layer" and not cfg.output_weight and teacher_depth is None:
            weights = {name: weight for name, weight in weights.items() if not name.startswith("heads.")}
        heads = {
            int(name.split(".")[1]): weight.size(0)  # the last weight of a head belongs to its output layer
            for name, weight in weights.items()
            if name.startswith("heads.") and name.endswith(".weight")
        }
        # A student with an extension's growth method can be used without the extension, at its present depth.
        plan = None if cfg.stack_method in METHODS or SEATS not in weights else known_stage(weights[SEATS].tolist())
        model = cls(cfg, heads, teacher_depth or max(heads, default=0), plan)
        model.load_state_dict(weights)
        return model.float().eval()

    def at_initialisation(self) -> "StackedHubert":
        """A student of the same shape and depth with new random weights, in eval mode. It is a baseline."""
        fresh = StackedHubert(self.cfg, self.head_widths, self.teacher_depth, self.plan)
        fresh.stage.copy_(self.stage)
        fresh._stage_index = self._stage_index
        return fresh.eval()

    # Growth

    @property
    def seats(self) -> tuple[int, ...]:
        """The seats in use, in the order of the forward pass."""
        return self.plan.stages[self._stage_index]

    @property
    def depth(self) -> int:
        """The number of layers in use."""
        return len(self.seats)

    @property
    def stage_number(self) -> int:
        """The current stage, counted from 1 as in the paper."""
        return self._stage_index + 1

    def due_stage(self, update: int) -> int:
        """The stage (from 1) that the schedule requires at `update`. It is never below the current stage."""
        if not self.starts:
            return self.stage_number
        ended = self.plateau is not None and self.plateau.reached and self.stage_number < len(self.plan.stages)
        return max(stage_at(update, self.starts) + 1, self.stage_number + ended)

    def updates_left(self, update: int) -> dict[int, int]:
        """The number of updates still to do at each depth, after `update` updates: {depth: updates}.

        It is empty without optimization.max_update, and for a model that does not train. With the plateau schedule a
        stage may end earlier, and the next stage then gets its updates.
        """
        if self.cfg.max_update <= 0 or self.starts is None:
            return {}
        begins = [update] * self.stage_number + [max(start, update) for start in self.starts[self.stage_number :]]
        ends = (*self.starts[1:], self.cfg.max_update)
        stages = list(zip(self.plan.depths, begins, ends))[self._stage_index :]
        return {depth: max(end - begin, 0) for depth, begin, end in stages}

    def observe_validation(self, update: int, loss: float) -> None:
        """Record the validation loss at `update` for the plateau schedule. Other schedules do not use it."""
        if self.plateau is not None:
            self.plateau.observe(update, loss)

    def set_num_updates(self, num_updates: int) -> None:
        """Grow if the schedule requires it. fairseq calls this before every forward pass in training.

        A second call at the same update (gradient accumulation) changes nothing.
        """
        super().set_num_updates(num_updates)
        self._updates = num_updates
        due = self.due_stage(num_updates)
        if due == self.stage_number:
            return
        self.grow_to(due)
        if self.plateau is not None:
            self.plateau.begin(num_updates)

    def grow_to(self, stage: int) -> None:
        """Add layers until `stage` (from 1) is reached. `finish_growth` returns the parameters that were copied."""
        while self.stage_number < stage:
            growth = self.plan.growths[self._stage_index]
            copy_weights(self._pairs(growth))
            self._unfinished.extend(growth)
            self._stage_index += 1
            self.stage.fill_(self._stage_index)

    def matrices(self) -> Iterator[nn.Parameter]:
        """Yield the trained matrices between hidden layers: projections, and kernels of the CNN after the first.

        The heads and the positional convolution are not among them.
        """
        for name, parameter in self.named_parameters():
            if not name.startswith(("heads.", "encoder.pos_conv.")) and parameter.requires_grad:
                if parameter.dim() > 1 and min(parameter.shape[:2]) > 1:
                    yield parameter

    def finish_growth(self) -> list[ParameterPair]:
        """The pairs of parameters copied since the last call, whose optimizer state is to be copied."""
        growth, self._unfinished = self._unfinished, []
        return self._pairs(growth)

    def _pairs(self, growth: Sequence[tuple[int, int]]) -> list[ParameterPair]:
        silent = OUTPUT_PROJECTIONS if self.cfg.stack_silent_copies else ()
        return list(paired_parameters(self.encoder.layers, growth, silent))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Floats like `stage`, because fairseq's average_checkpoints.py divides every entry in place.
        destination[prefix + SEATS] = torch.tensor(self.plan.uses(self._stage_index), dtype=torch.float32)
        if self.plateau is not None:
            # It is saved with the model, because fairseq saves the state of its tasks but does not load it when a
            # training resumes. It is not a buffer, because training in half precision would round it.
            destination[prefix + "plateau"] = torch.tensor(self.plateau.state, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
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
            # Without a saved state, the stage counts as begun now.
            self.plateau.begin(self._updates)
            if plateau is not None:
                self.plateau.state = plateau.tolist()
        super()._load_from_state_dict(state_dict, prefix, *args)
        stage = self.stage.item()
        if stage not in range(len(self.plan.stages)):
            raise InputError(f"the weights have stage {stage}, not one of 0 to {len(self.plan.stages) - 1}")
        # fairseq calls set_num_updates on a new model before it loads the weights of a resumed run. The new model may
        # have grown in this call by copying random weights, which the checkpoint has now replaced.
        self._stage_index = int(stage)
        self._unfinished = []

    # Forward pass

    def forward(
        self,
        waveforms: Tensor,
        lengths: Tensor | Sequence[int],
        mask: Tensor | None = None,
        features: Tensor | None = None,
    ) -> dict[str, Any]:
        """Compute the hidden states, and from them the heads' predictions of the teacher's layers.

        Args:
            waveforms: [B, S], samples at 16 kHz.
            lengths: [B], samples. If they are on a GPU, the CPU waits for them.
            mask: [B, T] bool, the frames to replace with the mask embedding before the transformer.
            features: [B, C, T], of the CNN, if the teacher has computed them already.

        Returns:
            a dict: `hidden_states`, a list of depth + 1 tensors [B, T, D]; `frames` [B], where `lengths` are;
            `predictions`,
            {teacher layer: [B, T, outputs of its head]}; `stage`, counted from 1.
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

    def hidden_states(
        self,
        waveforms: Tensor,
        lengths: Tensor | Sequence[int],
        mask: Tensor | None = None,
        features: Tensor | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """Compute the hidden states, a list of depth + 1 tensors [B, T, D], and the frame counts [B].

        The arguments are those of `forward`.
        """
        lengths = torch.as_tensor(lengths)
        if features is None:
            features = self.features(waveforms, lengths)
        return self.encode(features.type_as(self.encoder.layer_norm.weight), lengths, self.seats, mask=mask)


def prediction_head(width: int, inner: int, outputs: int) -> nn.Module:
    """Build a head from [B, T, width] to [B, T, outputs], with a hidden layer of `inner` features unless 0."""
    if not inner:
        return nn.Linear(width, outputs)
    return nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, outputs))
