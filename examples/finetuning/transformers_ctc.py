"""Fine-tune a student for speech recognition with CTC, by transformers' Trainer.

    python examples/finetuning/transformers_ctc.py --student student --speech manifests --output_dir outputs/ctc_hf \
        --max_steps 4000 --learning_rate 1e-4 --warmup_steps 400 --per_device_train_batch_size 8

The student is a folder of `fairseq-stack export --to huggingface`. The speech is a folder of `fairseq-stack prepare`
with texts in labels.tsv. The output is a folder for `transformers.HubertForCTC`, with results.json. The script takes
all arguments of transformers.TrainingArguments.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torchaudio.functional import edit_distance
from transformers import (
    AutoFeatureExtractor,
    HfArgumentParser,
    HubertConfig,
    HubertForCTC,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    Wav2Vec2CTCTokenizer,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from fairseq_stack.data.audio import SAMPLE_RATE, read_audio
from fairseq_stack.data.splits import SPLITS
from fairseq_stack.errors import InputError, one_line_errors
from fairseq_stack.evaluation.tasks import plain_text, read_labelled_speech
from fairseq_stack.models.conv_geometry import frames_from_samples
from fairseq_stack.models.exact_padding import ignore_padding

UNKNOWN = "⁇"


@dataclass
class Arguments:
    student: str = field(metadata={"help": "folder of fairseq-stack export --to huggingface"})
    speech: str = field(metadata={"help": "folder of fairseq-stack prepare, with texts in labels.tsv"})
    random_weights: bool = field(default=False, metadata={"help": "start from random weights, as a baseline"})
    train_cnn: bool = field(default=False, metadata={"help": "train the CNN too"})
    frozen_steps: int = field(default=0, metadata={"help": "steps at the start that train the new output layer alone"})
    output_learning_rate: float | None = field(
        default=None, metadata={"help": "learning rate of the output layer (default: --learning_rate)"}
    )


@one_line_errors
def main():
    arguments, training = HfArgumentParser((Arguments, TrainingArguments)).parse_args_into_dataclasses()
    set_seed(training.seed)
    output = Path(training.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    texts = {split: [] for split in SPLITS}  # of pairs: a recording and its text
    for recording in read_labelled_speech(arguments.speech):
        if text := plain_text(recording.labels["text"]):
            texts[recording.split].append((recording, text))
    if not (texts["train"] and texts["valid"]):
        raise InputError(f"{arguments.speech}/labels.tsv has no texts in train and valid; fill its column text")
    keep_arguments(arguments, output)
    tokenizer = letter_tokenizer([text for _, text in texts["train"]], output)

    config = HubertConfig.from_pretrained(
        arguments.student,
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,  # CTC's blank
        ctc_loss_reduction="mean",
        ctc_zero_infinity=True,
    )
    conv_layers = list(zip(config.conv_dim, config.conv_kernel, config.conv_stride))
    # Masks of mask_time_length frames need longer utterances, and CTC needs a frame for each letter.
    masked = config.mask_time_length if config.mask_time_prob > 0 else 0
    texts["train"] = [
        (recording, text)
        for recording, text in texts["train"]
        if frames_from_samples(recording.samples, conv_layers) > max(masked, len(text))
    ]
    if not texts["train"]:
        raise InputError(
            f"{arguments.speech}/train.tsv has no recording that is longer than a mask of {masked} frames and has a"
            " frame for each letter of its text; check the column text of labels.tsv"
        )
    if arguments.random_weights:
        model = HubertForCTC(config)
    else:
        model = HubertForCTC.from_pretrained(arguments.student, config=config)
    ignore_padding(model)
    if not (arguments.train_cnn or arguments.random_weights):
        model.freeze_feature_encoder()

    preprocess = AutoFeatureExtractor.from_pretrained(arguments.student)
    training.remove_unused_columns = False  # the batch is made of recordings, below

    def batch(pairs):
        waveforms = [read_audio(recording.path) for recording, _ in pairs]
        inputs = preprocess(waveforms, sampling_rate=SAMPLE_RATE, padding=True, return_tensors="pt")
        labels = tokenizer([text for _, text in pairs], padding=True, return_tensors="pt")
        return {**inputs, "labels": labels.input_ids.masked_fill(labels.attention_mask == 0, -100)}

    def error_rates(predictions):
        """Character and word error rates of the greedy transcripts."""
        best = np.where(predictions.predictions < 0, tokenizer.pad_token_id, predictions.predictions)
        wanted = np.where(predictions.label_ids < 0, tokenizer.pad_token_id, predictions.label_ids)
        found, wanted = tokenizer.batch_decode(best), tokenizer.batch_decode(wanted, group_tokens=False)
        return {name: error_rate(found, wanted, parts) for name, parts in (("cer", list), ("wer", str.split))}

    trainer = LetterTrainer(
        training.learning_rate if arguments.output_learning_rate is None else arguments.output_learning_rate,
        model,
        training,
        data_collator=batch,
        train_dataset=texts["train"],
        eval_dataset=texts["valid"],
        processing_class=preprocess,
        compute_metrics=error_rates,
        callbacks=[OutputLayerFirst(arguments.frozen_steps)],
    )
    trainer.train(resume_from_checkpoint=get_last_checkpoint(output))  # None if there is none
    trainer.save_model()
    scored = [split for split in ("valid", "test") if texts[split]]
    results = {split: trainer.evaluate(texts[split], metric_key_prefix=split) for split in scored}
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    for split, metrics in results.items():
        print(f"{split}: {metrics[f'{split}_cer']:.1%} of characters and {metrics[f'{split}_wer']:.1%} of words wrong")


class LetterTrainer(Trainer):
    """A Trainer that predicts the best letter of each frame, and -100 after the end of an utterance.

    The output layer has its own learning rate: it starts from random weights, and the student does not.
    """

    def __init__(self, output_learning_rate, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.output_learning_rate = output_learning_rate

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        output_layer = set(self.model.lm_head.parameters())
        for group in list(optimizer.param_groups):
            outputs = [parameter for parameter in group["params"] if parameter in output_layer]
            group["params"] = [parameter for parameter in group["params"] if parameter not in output_layer]
            optimizer.add_param_group({**group, "params": outputs, "lr": self.output_learning_rate})
        return optimizer

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, logits, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        frames = self.model._get_feat_extract_output_lengths(inputs["attention_mask"].sum(1))
        padding = torch.arange(logits.size(1), device=logits.device) >= frames[:, None].to(logits.device)
        return loss, logits.argmax(-1).masked_fill(padding, -100), labels


class OutputLayerFirst(TrainerCallback):
    """Trains the output layer alone for some steps. Until it knows letters, its gradients only harm the student."""

    def __init__(self, steps):
        self.steps = steps
        self.student = []

    def on_train_begin(self, args, state, control, model, **_):
        self.student = [parameter for parameter in model.hubert.parameters() if parameter.requires_grad]

    def on_step_begin(self, args, state, control, **_):
        for parameter in self.student:
            parameter.requires_grad_(state.global_step >= self.steps)


def keep_arguments(arguments, output):
    """Write the arguments to the folder `output`; refuse a folder whose run, which would resume, had others."""
    file, given = output / "arguments.json", json.dumps(vars(arguments))
    if file.exists() and file.read_text() != given:
        raise InputError(f"--output_dir {output} has a run with {file.read_text()}; give another folder")
    file.write_text(given)


def letter_tokenizer(texts, output):
    """A tokenizer of the letters in texts, saved in the folder `output`."""
    letters = sorted({letter for text in texts for letter in text} - {" "})
    # A letter that train lacks is one sign, so that it counts as one error.
    vocabulary = {letter: number for number, letter in enumerate(["[PAD]", UNKNOWN, "|", *letters])}
    (output / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    tokenizer = Wav2Vec2CTCTokenizer(
        str(output / "vocab.json"), pad_token="[PAD]", unk_token=UNKNOWN, bos_token=None, eos_token=None
    )
    tokenizer.save_pretrained(output)
    return tokenizer


def error_rate(found, wanted, parts):
    """Edits of all texts, divided by the number of their parts."""
    errors = sum(edit_distance(parts(one), parts(other)) for one, other in zip(found, wanted))
    return errors / sum(len(parts(text)) for text in wanted)


if __name__ == "__main__":
    main()
