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
from fairseq_stack.data.recordings import PHONES
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
    recordings = read_labelled_speech(arguments.speech)
    check_choice("--label", arguments.label, [name for name in recordings[0].labels if name not in PHONES])
    set_seed(training.seed)
    output = Path(training.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    labelled = [one for one in recordings if one.labels[arguments.label]]
    classes = sorted({one.labels[arguments.label] for one in labelled if one.split == "train"})
    number = {name: index for index, name in enumerate(classes)}

    config = HubertConfig.from_pretrained(
        arguments.student, label2id=number, id2label={index: name for name, index in number.items()}
    )
    conv_layers = list(zip(config.conv_dim, config.conv_kernel, config.conv_stride))
    parts = {split: [one for one in labelled if one.split == split] for split in SPLITS}
    for split in SPLITS[1:]:
        known = [one for one in parts[split] if one.labels[arguments.label] in number]
        if len(known) < len(parts[split]):
            print(f"{split}: left out {len(parts[split]) - len(known)} utterances whose {arguments.label} train lacks")
        parts[split] = known
    # Masks of mask_time_length frames need longer utterances.
    masked = config.mask_time_length if config.mask_time_prob > 0 else 0
    parts["train"] = [one for one in parts["train"] if frames_from_samples(one.samples, conv_layers) > masked]
    if len(classes) < 2 or not (parts["train"] and parts["valid"]):
        raise InputError(
            f"--label {arguments.label} of {arguments.speech} gives {len(classes)} classes, {len(parts['train'])}"
            f" utterances of train that are longer than {masked} frames and {len(parts['valid'])} of valid with these"
            " classes; at least two classes and an utterance in both are needed"
        )
    keep_arguments(arguments, output)
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


def keep_arguments(arguments, output):
    """Write the arguments to the folder `output`; refuse a folder whose run, which would resume, had others."""
    file, given = output / "arguments.json", json.dumps(vars(arguments))
    if file.exists() and file.read_text() != given:
        raise InputError(f"--output_dir {output} has a run with {file.read_text()}; give another folder")
    file.write_text(given)


if __name__ == "__main__":
    main()
