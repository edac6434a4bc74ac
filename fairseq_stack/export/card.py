"""The model card of a student: its shape, its training, its verification and how to use it."""

from pathlib import Path

from fairseq_stack.checkpoints.student import Student
from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.data.manifest import read_manifests
from fairseq_stack.errors import InputError
from fairseq_stack.models.conv_geometry import samples_per_frame

_CARD = """---
library_name: transformers
pipeline_tag: feature-extraction
tags:
- hubert
- speech
- distillation
---

# {title}

A speech encoder, distilled from a foundation model with fairseq_stack after
[Kim & Lee, Interspeech 2026](https://arxiv.org/abs/2606.11766).
16 kHz mono waveforms in, {depth} + 1 hidden states of {width} features out, one frame for every {hop} ms.
{note}
| | |
| --- | --- |
{rows}

## Agreement

{agreement}
`verification.json` has the numbers of every hidden state and recording.

## Use

```python
import torch
from transformers import AutoFeatureExtractor, HubertModel

student = HubertModel.from_pretrained("FOLDER").eval()
preprocess = AutoFeatureExtractor.from_pretrained("FOLDER")
inputs = preprocess([waveform], sampling_rate=16_000, padding=True, return_tensors="pt")  # waveform: [samples]
with torch.no_grad():
    hidden_states = student(**inputs, output_hidden_states=True).hidden_states
```

```python
import s3prl.hub
import torch

student = s3prl.hub.hf_hubert_custom("FOLDER")
hidden_states = student([torch.from_numpy(waveform)])["hidden_states"]
```

Padded batches: {padding}.
{last}
Fine-tuning with masks (SpecAugment): {masks}.

## Citation

```bibtex
@inproceedings{{kim2026interleaved,
  author = {{Kim and Lee}},
  title = {{Fast Speech Foundation Model Distillation Using Interleaved Stacking}},
  booktitle = {{Interspeech}},
  year = {{2026}},
  note = {{arXiv:2606.11766}},
}}
```
"""

# Texts of the card on fine-tuning with masks.
_MASKS = (
    "training masks 5 % of the frames (`mask_time_prob`, transformers' default) with the mask embedding of the"
    " distillation, `masked_spec_embed`, and needs utterances of more than 10 frames (`mask_time_length`);"
    " `mask_time_prob=0.0` in `from_pretrained` masks none"
)
_NO_MASKS = (
    "the distillation masked nothing, so there is no mask embedding and training masks nothing; with"
    " `mask_time_prob=0.05` in `from_pretrained` transformers masks, and initialises the embedding at random"
)


# A text on pre-norm students.
_LAST = (
    "\nLast hidden state: transformers 5.0 to 5.17 leave the final layer norm out of `hidden_states[-1]`, also under"
    " s3prl; `last_hidden_state` has it, and other versions have it in both.\n"
)


def before_full_depth(student: Student) -> str:
    """One line on a Student whose training has not reached full depth; an empty string for any other."""
    layers = student.config["encoder_layers"]
    if student.depth == layers:
        return ""
    return f"its growth has not ended, the student has {student.depth} of {layers} layers"


def model_card(student: Student, state: dict, proof: dict, moving_average: bool = False) -> str:
    """The model card as Markdown, for README.md.

    Args:
        student: a Student.
        state: the content of the checkpoint. The card leaves out facts that it does not have.
        proof: the comparison with the training model, see write_verified.
        moving_average: whether the weights are the moving average.
    """
    cfg, model = state["cfg"], student.config
    task, criterion = cfg.get("task") or {}, cfg.get("criterion") or {}
    history, extra = state.get("optimizer_history") or [{}], state.get("extra_state") or {}
    metric = (cfg.get("checkpoint") or {}).get("best_checkpoint_metric", "loss")
    seconds = extra.get("previous_training_time")
    growth = model["stack_method"]
    if growth != "none":
        growth += f" stacking in {model['stack_stages']} stages"
        growth += f", {model['stack_schedule']} schedule" if "stack_schedule" in model else ""
        growth += f"; exported at {student.depth} of {model['encoder_layers']} layers"
    facts = {
        "parameters": f"{sum(tensor.numel() for tensor in student.weights.values()) / 1e6:.2f} M",
        "transformer": f"{student.depth} layers x {model['encoder_embed_dim']},"
        f" feed-forward {model['encoder_ffn_embed_dim']}, {model['encoder_attention_heads']} heads",
        "growth": growth,
        # Only the name: the rest of the path describes a machine, not a model.
        "teacher": Path(task["teacher"]).name if task.get("teacher") else None,
        "data": _data(task.get("data"), (cfg.get("dataset") or {}).get("train_subset", "train")),
        "input": _input(student),
        "loss": criterion.get("loss", model.get("loss")),
        "teacher layers": ", ".join(map(str, criterion.get("teacher_layers") or [])) or None,
        "intermediate loss": _intermediate(criterion),
        "masked frames": f"{task['mask_prob']:g}" if task.get("mask_prob") else None,
        "optimiser": _optimiser(cfg),
        "batch": _batch(cfg),
        "precision": _precision(cfg.get("common")),
        "updates": f"{history[-1]['num_updates']:,}" if "num_updates" in history[-1] else None,
        "training time": f"{seconds / 3600:.2f} h" if seconds else None,
        f"validation {metric}": f"{extra['val_loss']:g}" if extra.get("val_loss") is not None else None,
        f"best validation {metric}": f"{extra['best']:g}" if extra.get("best") is not None else None,
        "weights": "exponential moving average" if moving_average else "after the last update",
    }
    note = before_full_depth(student)
    return _CARD.format(
        note=f"\n**From the middle of a training: {note}.**\n" if note else "",
        title=f"HuBERT student, {student.depth} layers x {model['encoder_embed_dim']}",
        depth=student.depth,
        width=model["encoder_embed_dim"],
        hop=f"{1000 * samples_per_frame(student.conv_layers) / SAMPLE_RATE:g}",
        rows="\n".join(f"| {name} | {value} |" for name, value in facts.items() if value is not None),
        agreement=_agreement(student, proof),
        padding=proof["padding"],
        last=_LAST if model.get("layer_norm_first") else "",
        masks=_MASKS if student.mask_emb is not None else _NO_MASKS,
    )


def _input(student: Student) -> str:
    if not student.normalize:
        return "the waveform as it is"
    return f"zero mean and unit variance ({student.normalize_epsilon:g} is added to the variance)"


def _agreement(student: Student, proof: dict) -> str:
    """Which speech was compared, and how much the hidden states differ from those of the training model."""
    alone = proof["alone"]
    ranges = {name: (min(one[name] for one in alone), max(one[name] for one in alone)) for name in ("samples", "level")}
    (shortest, longest), (quietest, loudest) = ranges["samples"], ranges["level"]
    text = (
        f"If the student is called as below, its hidden states differ from those of {proof['compared_with']} by at most"
        f" {proof['largest_difference_alone']:.2g}. That was measured on {len(alone)} excerpts of speech of"
        f" {shortest / SAMPLE_RATE:.1f} to {longest / SAMPLE_RATE:.1f} s at levels (rms) of {quietest:.3g} to"
        f" {loudest:.3g} of full scale, one with an offset."
    )
    if "normalization" not in proof:
        return text
    epsilon = student.normalize_epsilon
    return (
        f"{text} {proof['normalization']}. If both models normalise in the same way, the largest difference is"
        f" {proof['largest_difference_normalized_alike']:.2g}. To normalise as the training did, give the student"
        f" `torch.nn.functional.layer_norm(torch.from_numpy(waveform), waveform.shape, eps={epsilon:g})[None]` instead"
        " of the `inputs.input_values` of `preprocess`."
    )


def _data(folder: str | None, subset: str) -> str | None:
    """The name of the folder of manifests and, if the training manifests are still there, the size of the data."""
    if not folder:
        return None
    try:
        manifest = read_manifests([Path(folder) / f"{name.strip()}.tsv" for name in subset.split(",")])
    except InputError:
        return Path(folder).name
    hours = manifest.samples.sum() / SAMPLE_RATE / 3600
    return f"{Path(folder).name}: {len(manifest):,} recordings, {hours:,.2f} h"


def _optimiser(cfg: dict) -> str | None:
    optimizer, schedule = cfg.get("optimizer") or {}, cfg.get("lr_scheduler") or {}
    rate = (cfg.get("optimization") or {}).get("lr")
    if not optimizer.get("_name") or not rate:
        return None
    parts = [
        optimizer["_name"],
        f"learning rate {rate[0]:g}",
        f"weight decay {optimizer['weight_decay']:g}" if optimizer.get("weight_decay") else None,
        f"{schedule['_name'].replace('_', ' ')}" if schedule.get("_name") else None,
        f"{schedule['warmup_updates']:,} updates of warm-up" if schedule.get("warmup_updates") else None,
    ]
    return ", ".join(part for part in parts if part)


def _batch(cfg: dict) -> str | None:
    """The most speech in an update, over all processes and accumulated batches."""
    dataset, accumulated = cfg.get("dataset") or {}, (cfg.get("optimization") or {}).get("update_freq") or [1]
    batches = accumulated[-1] * ((cfg.get("distributed_training") or {}).get("distributed_world_size") or 1)
    parts = [
        f"{batches * dataset['batch_size']:,} utterances" if dataset.get("batch_size") else None,
        f"{batches * dataset['max_tokens'] / SAMPLE_RATE:,.0f} s of audio" if dataset.get("max_tokens") else None,
    ]
    parts = [part for part in parts if part]
    return f"up to {' or '.join(parts)}" if parts else None


def _precision(common: dict | None) -> str | None:
    if common is None:
        return None
    return next((name for name in ("fp16", "bf16", "amp") if common.get(name)), "fp32")


def _intermediate(criterion: dict) -> str | None:
    if not criterion.get("intermediate_weight") or not criterion.get("intermediate_style"):
        return None
    return f"{criterion['intermediate_style'].replace('_', ' ')}, weight {criterion['intermediate_weight']:g}"
