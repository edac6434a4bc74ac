"""Fine-tune a student to classify utterances, such as by speaker or keyword, by transformers' Trainer.

    python examples/finetuning/transformers_classification.py --student student --speech manifests --label keyword \
        --output_dir outputs/keyword --max_steps 2000 --learning_rate 1e-4 --warmup_steps 200 \
        --per_device_train_batch_size 16

The student is a folder of `fairseq-stack export --to huggingface`. The speech is a folder of `fairseq-stack prepare`.
The output is a folder for `transformers.HubertForSequenceClassification`, with results.json. The script takes all
arguments of transformers.TrainingArguments.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import (
    AutoFeatureExtractor,
    HfArgumentParser,
    HubertConfig,
    HubertForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from fairseq_stack.data.audio import SAMPLE_RATE, read_audio
from fairseq_stack.data.recordings import LABELS
from fairseq_stack.data.splits import SPLITS
from fairseq_stack.errors import InputError, check_choice, one_line_errors
from fairseq_stack.evaluation.tasks import read_labelled_speech
from fairseq_stack.models.conv_geometry import frames_from_samples
from fairseq_stack.models.exact_padding import ignore_padding


@dataclass
class Arguments:
    student: str = field(metadata={"help": "folder of fairseq-stack export --to huggingface"})
    speech: str = field(metadata={"help": "folder of fairseq-stack prepare"})
    label: str = field(metadata={"help": "column of labels.tsv with the answers"})
    random_weights: bool = field(default=False, metadata={"help": "start from random weights, as a baseline"})
    train_cnn: bool = field(default=False, metadata={"help": "train the CNN too"})


@one_line_errors
def main():
    arguments, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    check_choice("--label", arguments.label, LABELS[1:])
    set_seed(training.seed)
    output = Path(training.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    labelled = [one for one in read_labelled_speech(arguments.speech) if one.labels[arguments.label]]
    classes = sorted({one.labels[arguments.label] for one in labelled if one.split == "train"})
    if len(classes) < 2:
        raise InputError(f"--label {arguments.label} has {len(classes)} classes in train of {arguments.speech}")
    number = {name: index for index, name in enumerate(classes)}

    config = HubertConfig.from_pretrained(
        arguments.student, label2id=number, id2label={index: name for name, index in number.items()}
    )
    conv_layers = list(zip(config.conv_dim, config.conv_kernel, config.conv_stride))
    parts = {
        split: [one for one in labelled if one.split == split and one.labels[arguments.label] in number]
        for split in SPLITS
    }
    # Masks of mask_time_length frames need longer utterances.
    masked = config.mask_time_length if config.mask_time_prob > 0 else 0
    parts["train"] = [one for one in parts["train"] if frames_from_samples(one.samples, conv_layers) > masked]
    if arguments.random_weights:
        model = HubertForSequenceClassification(config)
    else:
        model = HubertForSequenceClassification.from_pretrained(arguments.student, config=config)
    ignore_padding(model)
    if not (arguments.train_cnn or arguments.random_weights):
        model.freeze_feature_encoder()

    preprocess = AutoFeatureExtractor.from_pretrained(arguments.student)
    training.remove_unused_columns = False  # the batch is made of recordings, below

    def batch(recordings):
        waveforms = [read_audio(recording.path) for recording in recordings]
        inputs = preprocess(waveforms, sampling_rate=SAMPLE_RATE, padding=True, return_tensors="pt")
        return {**inputs, "labels": torch.tensor([number[one.labels[arguments.label]] for one in recordings])}

    trainer = Trainer(
        model,
        training,
        data_collator=batch,
        train_dataset=parts["train"],
        eval_dataset=parts["valid"],
        processing_class=preprocess,
        compute_metrics=lambda found: {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())},
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output))  # None if there is none
    trainer.save_model()
    scored = [split for split in ("valid", "test") if parts[split]]
    results = {split: trainer.evaluate(parts[split], metric_key_prefix=split) for split in scored}
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for split, metrics in results.items():
        print(f"{split}: {metrics[f'{split}_accuracy']:.1%} of utterances right")


if __name__ == "__main__":
    main()
