"""DistilHuBERT's recipe computes what s3prl's distiller computes, with the same weights in s3prl's own model."""

from types import SimpleNamespace

import pytest
import torch
from conftest import LINKED, TINY
from omegaconf import OmegaConf
from training import composed

from fairseq_stack.criterions.layer_distillation import (
    LayerDistillation,
    LayerDistillationConfig,
)
from fairseq_stack.models.stacked_hubert import StackedHubert, StackedHubertConfig

LAYERS, WIDTH = [4, 8, 12], 6


def distilhubert():
    """Student and criterion of the recipe in examples/, with random weights and small sizes."""
    recipe = composed("distilhubert", [], "distillation")
    criterion_fields, model_fields = ({**recipe[part]} for part in ("criterion", "model"))
    for fields in (criterion_fields, model_fields):
        del fields["_name"]
    linked = {name: criterion_fields[name] for name in LINKED.keys() & criterion_fields.keys()}
    small = {**TINY, "encoder_layers": 2, "head_inner_dim": 16}
    no_start = {"init_cnn_from_teacher": False, "init_layers_from_teacher": []}
    criterion_cfg = OmegaConf.merge(OmegaConf.structured(LayerDistillationConfig), criterion_fields)
    student_cfg = OmegaConf.merge(
        OmegaConf.structured(StackedHubertConfig), {**LINKED, **linked, **model_fields, **small, **no_start}
    )
    task = SimpleNamespace(teacher=SimpleNamespace(name="teacher.pt", depth=12, width=WIDTH))
    torch.manual_seed(0)
    student = StackedHubert.build_model(student_cfg, task).eval()
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return student, LayerDistillation.build_criterion(criterion_cfg, task)


def s3prl_distiller(student):
    """s3prl's model of the same shape and weights."""
    from s3prl.upstream.distiller.model import DistillerConfig, DistillerModel

    config = DistillerConfig(
        {
            **TINY,
            "extractor_conv_feature_layers": TINY["conv_feature_layers"],
            "encoder_layers": 2,
            "final_dim": WIDTH,
            "feature_grad_mult": 0.1,
            "n_tasks": len(LAYERS),
            "pred_layer_id": LAYERS,
        }
    )
    distiller = DistillerModel(config).eval()
    weights = student.state_dict()
    heads = [student.heads[str(layer)] for layer in LAYERS]
    mapped = {
        "output_layer.0.weight": torch.cat([head[0].weight for head in heads]),
        "output_layer.0.bias": torch.cat([head[0].bias for head in heads]),
        "output_layer.2.weight": torch.stack([head[2].weight.t() for head in heads]),
        "output_layer.2.bias": torch.stack([head[2].bias for head in heads])[None, None],
    }
    shared = {name: weights[name] for name in distiller.state_dict() if not name.startswith("output_layer.")}
    distiller.load_state_dict({**shared, **mapped})
    return distiller


@pytest.mark.s3prl
def test_the_distilhubert_recipe_gives_the_loss_and_gradient_of_s3prls_distiller():
    student, criterion = distilhubert()
    distiller = s3prl_distiller(student)
    generator = torch.Generator().manual_seed(1)
    waveforms = torch.randn(3, 4000, generator=generator)  # of one length: s3prl's loss counts padding
    targets = {layer: torch.randn(3, 12, WIDTH, generator=generator) for layer in criterion.target_layers}

    loss, frames, log = criterion(
        student, {"waveforms": waveforms, "lengths": torch.full((3,), 4000), "targets": targets}
    )
    _, _, predictions, _ = distiller(waveforms, torch.ones_like(waveforms))
    assert predictions.shape == (3, len(LAYERS), 12, WIDTH)
    target = torch.stack([targets[layer] for layer in LAYERS], dim=1)
    cosine = (predictions * target).sum(-1) / predictions.norm(dim=-1) / target.norm(dim=-1)
    expected = (predictions - target).abs().mean() - torch.sigmoid(cosine).log().mean()
    assert loss.item() / frames == pytest.approx(expected.item(), rel=1e-5)
    assert "output_loss" in log and float(log["intermediate_loss"]) == pytest.approx(loss.item(), rel=1e-6)

    (loss / frames).backward()
    expected.backward()
    theirs = dict(distiller.named_parameters())
    shared = {name: parameter.grad for name, parameter in student.named_parameters() if name in theirs}
    assert {name.split(".")[0] for name in shared} == {"feature_extractor", "post_extract_proj", "encoder"}
    for name, gradient in shared.items():
        torch.testing.assert_close(gradient, theirs[name].grad, atol=1e-6, rtol=1e-3)
    assert shared["feature_extractor.conv_layers.0.0.weight"].abs().max() > 1e-5
