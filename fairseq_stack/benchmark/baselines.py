"""Updates of the baselines: s3prl's distiller, and fairseq's own modules. All at full depth, with a live teacher.

They get their batch from memory, and their teacher is in fp32. On a GPU the student trains in fp16 autocast, on a CPU
in fp32, as s3prl's distiller does.
"""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from fairseq_stack.benchmark.clock import Clock
from fairseq_stack.benchmark.inputs import TEACHER, student_shape, teacher_shape
from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.models.conv_geometry import parse_conv_layers

TEACHER_LAYERS = (4, 8, 12)


class Baseline:
    """Trains other libraries' modules, one update at a time.

    Args:
        folder: what make_inputs filled.
        size: of make_inputs.
        batch: utterances of an update.
        seconds: length of each.
        device: cpu or cuda.
        clock: a Clock (default: one of seconds).
    """

    def __init__(self, folder, size, batch, seconds, device, clock=None):
        self.device = torch.device(device)
        self.clock = clock or Clock(self.device)
        torch.manual_seed(0)
        self.build(torch.load(folder / TEACHER, weights_only=True)["model"], folder, size)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=2e-4)
        self.scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
        self.waveforms = 0.1 * torch.randn(batch, round(seconds * SAMPLE_RATE), device=self.device)

    def update(self, depth):
        """One update; returns {part: seconds}."""
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

    def build(self, weights, folder, size):
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

    def parameters(self):
        return self.student.parameters()

    def targets(self):
        states = self.teacher(list(self.waveforms))["hidden_states"]
        return torch.stack([states[layer] for layer in TEACHER_LAYERS], dim=1)

    def loss(self, targets):
        _, _, predictions, _ = self.student(self.waveforms, torch.ones_like(self.waveforms))
        similarity = F.cosine_similarity(predictions, targets, dim=-1)
        return F.l1_loss(predictions, targets) - F.logsigmoid(similarity).mean()


class FairseqModules(Baseline):
    """HubertModel of fairseq as teacher and as student, with linear heads and the mean squared error."""

    def build(self, weights, folder, size):
        teacher = teacher_shape(size)
        self.teacher = hubert(teacher).to(self.device).eval()
        self.teacher.load_state_dict(weights, strict=False)
        self.student = hubert({**student_shape(size), "dropout": 0.1, "attention_dropout": 0.1}).to(self.device).train()
        widths = student_shape(size)["encoder_embed_dim"], teacher["encoder_embed_dim"]
        self.heads = torch.nn.ModuleList(torch.nn.Linear(*widths) for _ in TEACHER_LAYERS).to(self.device)

    def parameters(self):
        return [*self.student.parameters(), *self.heads.parameters()]

    def targets(self):
        return hidden_states(self.teacher, self.waveforms)

    def loss(self, targets):
        states = hidden_states(self.student, self.waveforms)
        return sum(F.mse_loss(head(state), target) for head, state, target in zip(self.heads, states, targets))


def hubert(shape):
    """fairseq's HubertModel of a shape, without what its pre-training needs."""
    from fairseq.models.hubert.hubert import HubertConfig, HubertModel

    config = HubertConfig(label_rate=50, final_dim=1, encoder_layerdrop=0.0)
    for name, value in shape.items():
        setattr(config, name, value)
    model = HubertModel(config, SimpleNamespace(sample_rate=SAMPLE_RATE), [None])
    model.mask_emb.requires_grad_(False)
    return model


def hidden_states(model, waveforms):
    """Outputs of TEACHER_LAYERS of a HubertModel, each [T, B, D]."""
    states = []
    hooks = [
        model.encoder.layers[layer - 1].register_forward_hook(lambda *given: states.append(given[2][0]))
        for layer in TEACHER_LAYERS
    ]
    model(waveforms, features_only=True, mask=False)
    for hook in hooks:
        hook.remove()
    return states


BASELINES = {"s3prl": S3prlDistiller, "fairseq": FairseqModules}
