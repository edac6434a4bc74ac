"""Fine-tuned students, of transformers and of fairseq, as Students with output layers."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoFeatureExtractor, HubertForCTC, HubertForSequenceClassification

from fairseq_stack.checkpoints.read import configurations, load_checkpoint
from fairseq_stack.checkpoints.student import Output, Student, hubert_shapes
from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.errors import InputError, input_errors
from fairseq_stack.export.formats import Outputs
from fairseq_stack.export.huggingface import ACTIVATIONS, NORMS, transformers_names
from fairseq_stack.export.plain import PlainStudent
from fairseq_stack.export.verify import padded_batch
from fairseq_stack.models.conv_geometry import parse_conv_layers
from fairseq_stack.models.waveform_norm import FAIRSEQ_EPSILON, TRANSFORMERS_EPSILON, normalize_waveforms

_PREFIX = "w2v_encoder.w2v_model."


@dataclass(frozen=True)
class FineTuned:
    """A fine-tuned student and the model that its exports are compared with.

    Attributes:
        student: the Student, with its output layers.
        name: of the model.
        reference: its Outputs, {"logits": [B, T, outputs]}. It computes utterances one by one.
    """

    student: Student
    name: str
    reference: Outputs


def from_transformers(folder: Path) -> FineTuned:
    """Load a folder that transformers' Trainer saved: a HubertForCTC or a HubertForSequenceClassification.

    Raises:
        InputError: the folder is another one, or lacks its preprocessor or, with CTC, its tokenizer.
    """
    classes = {"HubertForCTC": HubertForCTC, "HubertForSequenceClassification": HubertForSequenceClassification}
    with input_errors(f"{folder} cannot be loaded as a fine-tuned HuBERT of transformers"):
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"][0]
        if kind not in classes:
            raise InputError(f"it holds a {kind}; give a checkpoint, or a folder with one of {', '.join(classes)}")
        model: Any = classes[kind].from_pretrained(folder, local_files_only=True).float().eval()
        preprocess = AutoFeatureExtractor.from_pretrained(folder, local_files_only=True)
        config = model.config
        if getattr(config, "conv_pos_batch_norm", False) or getattr(config, "use_weighted_layer_sum", False):
            raise InputError("its config.json has conv_pos_batch_norm or use_weighted_layer_sum; no student has these")
        student = _student_of(model, preprocess.do_normalize)
        output = _output_of(model, folder)

    @torch.no_grad()
    def reference(waveforms: list[Tensor]) -> dict[int | str, Tensor]:
        logits = []
        for waveform in waveforms:
            inputs = preprocess(waveform.numpy(), sampling_rate=SAMPLE_RATE, return_tensors="pt")
            found = model(inputs.input_values).logits  # [1, T, outputs], or [1, outputs]
            logits.append(found if output.pooled else found[0])
        return {"logits": pad_sequence(logits, batch_first=True)}

    return FineTuned(Student(**student, output=output), f"transformers' {kind}", reference)


def _student_of(model: Any, normalize: bool) -> dict[str, Any]:
    """The fields of a Student in a HuBERT of transformers with a head."""
    theirs = model.config
    depth: int = theirs.num_hidden_layers
    conv_layers = list(zip(theirs.conv_dim, theirs.conv_kernel, theirs.conv_stride))
    config: dict[str, Any] = {
        "extractor_mode": {name: mode for mode, name in NORMS.items()}[theirs.feat_extract_norm],
        "conv_bias": theirs.conv_bias,
        "conv_feature_layers": str(conv_layers),
        "feature_layer_norm": theirs.feat_proj_layer_norm,
        "encoder_layers": depth,
        "encoder_embed_dim": theirs.hidden_size,
        "encoder_ffn_embed_dim": theirs.intermediate_size,
        "encoder_attention_heads": theirs.num_attention_heads,
        "activation_fn": {name: ours for ours, name in ACTIVATIONS.items()}[theirs.hidden_act],
        "layer_norm_first": theirs.do_stable_layer_norm,
        "conv_pos": theirs.num_conv_pos_embeddings,
        "conv_pos_groups": theirs.num_conv_pos_embedding_groups,
    }
    # transformers has a projection behind the CNN even if the widths are equal.
    projection = ("post_extract_proj.weight", "post_extract_proj.bias")
    ours = {*hubert_shapes(config, conv_layers, range(depth)), *projection}
    names = transformers_names(ours, len(conv_layers), depth)
    found = model.base_model.state_dict()
    return {
        "config": config,
        "conv_layers": conv_layers,
        "normalize": normalize,
        "normalize_epsilon": TRANSFORMERS_EPSILON,
        "depth": depth,
        "weights": {name: found[other] for name, other in names.items()},
        "heads": {},
        "mask_emb": None,
    }


def _output_of(model: Any, folder: Path) -> Output:
    """The output layers of a HuBERT of transformers, with the tokenizer's letters or the configuration's classes."""
    if isinstance(model, HubertForSequenceClassification):
        maps = [(layer.weight.detach(), layer.bias.detach()) for layer in (model.projector, model.classifier)]
        return Output(maps, True, [label for _, label in sorted((model.config.id2label or {}).items())])
    numbers = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    letters = {number: letter for letter, number in numbers.items()} | {model.config.pad_token_id: ""}
    labels = [letters.get(number, "") for number in range(model.config.vocab_size)]
    return Output([(model.lm_head.weight.detach(), model.lm_head.bias.detach())], False, labels)


def from_fairseq(state: dict[str, Any], path: Path) -> FineTuned:
    """Take the student out of a checkpoint of fairseq's `hubert_ctc`.

    Args:
        state: the result of load_checkpoint.
        path: of the checkpoint.

    Raises:
        InputError: the student that was fine-tuned is no longer at model.w2v_path, or a weight is missing.
    """
    config, task = configurations(state)
    assert config is not None and task is not None  # the name of the model stands there
    with input_errors(f"{path} cannot be read as a checkpoint of hubert_ctc"):
        start_path = Path(config["w2v_path"]).absolute()
        if not start_path.is_file():
            raise InputError(
                f"it was fine-tuned from model.w2v_path={config['w2v_path']}, and there is no {start_path}; put the"
                " file there"
            )
        start = load_checkpoint(start_path)  # its configuration is in no other file
        shape, _ = configurations(start)
        if shape is None:
            raise InputError(f"{config['w2v_path']} has no configuration; give the file that was fine-tuned")
        conv_layers = parse_conv_layers(shape["conv_feature_layers"])
        depth = shape["encoder_layers"]
        names = hubert_shapes(shape, conv_layers, range(depth))
        weights = {name: state["model"][_PREFIX + name].float() for name in names}
        weight, bias = (state["model"][f"w2v_encoder.proj.{name}"].float() for name in ("weight", "bias"))
        symbols = list(state["task_state"]["target_dictionary"].symbols)
        symbols[0] = ""  # fairseq's blank
        output = Output([(weight, bias)], False, symbols)
        student = Student(shape, conv_layers, task["normalize"], FAIRSEQ_EPSILON, depth, weights, {}, None, output)
    try:
        from fairseq.checkpoint_utils import load_model_ensemble_and_task

        from fairseq_stack import register
    except ImportError:
        model = PlainStudent(student)
        name = "the same weights in plain PyTorch (fairseq is not installed)"
        return FineTuned(student, name, lambda waveforms: model.outputs(*padded_batch(waveforms)))
    register()
    (ctc,), _, _ = load_model_ensemble_and_task([str(path)])
    ctc.eval()

    @torch.no_grad()
    def reference(waveforms: list[Tensor]) -> dict[int | str, Tensor]:
        logits = []
        for waveform in waveforms:
            source, length = waveform[None], torch.tensor([len(waveform)])
            if student.normalize:
                source = normalize_waveforms(source, length, FAIRSEQ_EPSILON)
            logits.append(
                ctc(source=source, padding_mask=torch.zeros_like(source, dtype=torch.bool))["encoder_out"][:, 0]
            )
        return {"logits": pad_sequence(logits, batch_first=True)}

    return FineTuned(student, "fairseq's hubert_ctc", reference)
