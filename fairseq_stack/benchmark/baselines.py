"""Updates of the baselines: s3prl's distiller, and fairseq's own modules. All have full depth and a live teacher.

Their batch is in memory, and their teacher is in fp32. The student trains in fp16 autocast on a GPU and in fp32 on a
CPU, as in s3prl's distiller.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_stack.benchmark.clock import Clock
from fairseq_stack.benchmark.inputs import TEACHER, student_shape, teacher_shape
from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.models.conv_geometry import parse_conv_layers

TEACHER_LAYERS = (4, 8, 12)


class Baseline(ABC):
    """Trains other libraries' modules, one update at a time.

    Args:
        folder: written by make_inputs.
        size: of make_inputs.
        batch: utterances of an update.
        seconds: length of each utterance.
        device: cpu or cuda.
        clock: a Clock (default: one of seconds).
    """

    def __init__(self, folder: Path, size: str, batch: int, seconds: float, device: str, clock: Clock | None = None):
        self.device = torch.device(device)
        self.clock = clock or Clock(self.device)
        torch.manual_seed(0)
        self.build(torch.load(folder / TEACHER, weights_only=True)["model"], folder, size)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=2e-4)
        self.scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
        self.waveforms = 0.1 * torch.randn(batch, round(seconds * SAMPLE_RATE), device=self.device)

    @abstractmethod
    def build(self, weights: dict[str, Tensor], folder: Path, size: str) -> None:
        """Makes the teacher, with these weights, and the student."""

    @abstractmethod
    def parameters(self) -> Iterable[torch.nn.Parameter]:
        """Returns the parameters to train."""

    @abstractmethod
    def targets(self) -> Any:
        """Returns the teacher's hidden states that `loss` needs."""

    @abstractmethod
    def loss(self, targets: Any) -> Tensor:
        """Returns the student's loss on the batch."""

    def update(self, depth: int) -> dict[str, Any]:
        """Makes one update and returns {part: seconds}."""
        self.clock.restart()
        with self.clock("targets"), torch.no_grad():
            targets = self.targets()
        with self.clock("student"), torch.autocast(self.device.type, torch.float16, enabled=self.scaler.is_enabled()):
            loss = self.loss(targets)
        with self.clock("backward"):
            self.scaler.scale(loss).backward()
        with self.clock("optimiser"):
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
        return self.clock.stop()


class S3prlDistiller(Baseline):
    """DistillerModel and the HuBERT upstream of s3prl, with DistilHuBERT's loss: L1 and cosine similarity."""

    def build(self, weights: dict[str, Tensor], folder: Path, size: str) -> None:
        from s3prl.upstream.distiller.model import DistillerConfig, DistillerModel
        from s3prl.upstream.hubert.hubconf import hubert_local

        teacher, student = teacher_shape(size), student_shape(size)
        width = teacher["encoder_embed_dim"]
        unused = {
            "mask_emb": torch.zeros(width),
            "final_proj.weight": torch.zeros(1, width),
            "final_proj.bias": torch.zeros(1),
        }
        fields = {**teacher, "final_dim": 1, "encoder_layerdrop": 0.0, "label_rate": 50.0}
        fields.pop("pos_conv_depth")
        converted = {
            "task_cfg": {"sample_rate": SAMPLE_RATE, "normalize": False},
            "model_cfg": {**fields, "conv_feature_layers": str(parse_conv_layers(teacher["conv_feature_layers"]))},
            "model_weight": {**weights, **unused},
            "dictionaries_symbols": [None],
        }
        torch.save(converted, folder / "s3prl.pt")
        self.teacher = hubert_local(ckpt=str(folder / "s3prl.pt")).to(self.device).eval()
        fields = {name: value for name, value in student.items() if name != "conv_feature_layers"}
        config = {
            **fields,
            "extractor_conv_feature_layers": str(parse_conv_layers(student["conv_feature_layers"])),
            "activation_dropout": 0.0,
            "final_dim": width,
            "n_tasks": len(TEACHER_LAYERS),
            "pred_layer_id": list(TEACHER_LAYERS),
        }
        self.student = DistillerModel(DistillerConfig(config)).to(self.device).train()

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return self.student.parameters()

    def targets(self) -> Tensor:
        states = self.teacher(list(self.waveforms))["hidden_states"]
        return torch.stack([states[layer] for layer in TEACHER_LAYERS], dim=1)

    def loss(self, targets: Tensor) -> Tensor:
        _, _, predictions, _ = self.student(self.waveforms, torch.ones_like(self.waveforms))
        similarity = F.cosine_similarity(predictions, targets, dim=-1)
        return F.l1_loss(predictions, targets) - F.logsigmoid(similarity).mean()


class FairseqModules(Baseline):
    """fairseq's HubertModel as teacher and as student, with linear heads and the mean squared error."""

    def build(self, weights: dict[str, Tensor], folder: Path, size: str) -> None:
        teacher = teacher_shape(size)
        self.teacher = hubert(teacher).to(self.device).eval()
        self.teacher.load_state_dict(weights, strict=False)
        self.student = hubert({**student_shape(size), "dropout": 0.1, "attention_dropout": 0.1}).to(self.device).train()
        widths = student_shape(size)["encoder_embed_dim"], teacher["encoder_embed_dim"]
        self.heads = torch.nn.ModuleList(torch.nn.Linear(*widths) for _ in TEACHER_LAYERS).to(self.device)

    def parameters(self) -> Iterable[torch.nn.Parameter]:
        return [*self.student.parameters(), *self.heads.parameters()]

    def targets(self) -> list[Tensor]:
        return hidden_states(self.teacher, self.waveforms)

    def loss(self, targets: list[Tensor]) -> Tensor:
        states = hidden_states(self.student, self.waveforms)
        losses = (F.mse_loss(head(state), target) for head, state, target in zip(self.heads, states, targets))
        return sum(losses)  # pyright: ignore[reportReturnType]  # only a sum of no losses is an int


def hubert(shape: dict[str, Any]) -> Any:
    """Returns fairseq's HubertModel of a shape, without the modules for pre-training."""
    from fairseq.models.hubert.hubert import HubertConfig, HubertModel

    config = HubertConfig(label_rate=50, final_dim=1, encoder_layerdrop=0.0)
    for name, value in shape.items():
        setattr(config, name, value)
    task: Any = SimpleNamespace(sample_rate=SAMPLE_RATE)  # the only field of a task that the model reads
    dictionaries: list[Any] = [None]
    model = HubertModel(config, task, dictionaries)
    model.mask_emb.requires_grad_(False)
    return model


def hidden_states(model: Any, waveforms: Tensor) -> list[Tensor]:
    """Returns the outputs of TEACHER_LAYERS of a HubertModel, each [T, B, D]."""
    states = []
    hooks = [
        model.encoder.layers[layer - 1].register_forward_hook(lambda _, __, output: states.append(output[0]))
        for layer in TEACHER_LAYERS
    ]
    model(waveforms, features_only=True, mask=False)
    for hook in hooks:
        hook.remove()
    return states


BASELINES: dict[str, type[Baseline]] = {"s3prl": S3prlDistiller, "fairseq": FairseqModules}
