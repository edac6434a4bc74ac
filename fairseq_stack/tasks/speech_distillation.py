"""The task: it has the teacher, reads the manifests, lets the student grow, and trains it on batches."""

import itertools
import logging
import math
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, List, Optional

import torch
from fairseq.data.iterators import EpochBatchIterator
from fairseq.dataclass import FairseqDataclass
from fairseq.optim.amp_optimizer import AMPOptimizer
from fairseq.tasks import FairseqTask
from omegaconf import II, MISSING
from torch import Tensor

from fairseq_stack.criterions.layer_distillation import LayerDistillation, LayerDistillationConfig
from fairseq_stack.criterions.losses import LOSSES
from fairseq_stack.data.bad_audio import BAD_AUDIO_LIMIT, BadAudio, check_bad_audio, listed_problems
from fairseq_stack.data.dataset import SpeechDataset
from fairseq_stack.data.manifest import read_manifests
from fairseq_stack.data.masking import span_mask
from fairseq_stack.errors import InputError, TrainingStopped, check_choice
from fairseq_stack.growth.events import Growth, announce_start, announced
from fairseq_stack.models.conv_geometry import receptive_field
from fairseq_stack.models.stacked_hubert import StackedHubert, StackedHubertConfig
from fairseq_stack.models.waveform_norm import TRANSFORMERS_EPSILON, normalize_waveforms
from fairseq_stack.targets.formats import CODES, check_format, codebook_shape, kind_of
from fairseq_stack.targets.source import learn_all_codebooks, targets_of
from fairseq_stack.targets.store import CNN, TargetStore, size_text
from fairseq_stack.teachers import load_teacher
from fairseq_stack.teachers.base import PRECISIONS, Teacher, default_precision
from fairseq_stack.teachers.lazy import described_teacher, weights_digest
from fairseq_stack.training import growth_listeners, preemption  # noqa: F401  the former registers
from fairseq_stack.training.logs import read
from fairseq_stack.training.nonfinite import loss_stop
from fairseq_stack.training.progress import COUNTS, Progress

logger = logging.getLogger(__name__)


@dataclass
class SpeechDistillationConfig(FairseqDataclass):
    """Speech, teacher, masking and stored targets."""

    data: str = field(
        default=MISSING, metadata={"help": "folder with the manifests; the manifest of subset NAME is NAME.tsv"}
    )
    teacher: str = field(
        default=MISSING, metadata={"help": "the teacher: a fairseq checkpoint or a folder in Hugging Face's format"}
    )
    whisper_pad: bool = field(
        default=False,
        metadata={
            "help": "pad the input of a Whisper teacher to 30 s, as in its pre-training (default: keep the true length)"
        },
    )
    teacher_precision: Optional[str] = field(
        default=None,
        metadata={
            "help": "precision of the teacher: bf16, fp16, or fp32 (without TF32 on a GPU; default: bf16 on a GPU, fp16"
            " on one without bf16, and fp32 on a CPU)"
        },
    )
    max_sample_size: int = field(
        default=250_000, metadata={"help": "crop longer recordings to this number of samples (at 16 kHz)"}
    )
    normalize: bool = field(
        default=False,
        metadata={
            "help": "normalize the student's waveforms to zero mean and unit variance (the teacher always gets the"
            " input of its pre-training)"
        },
    )
    normalize_epsilon: float = field(
        default=TRANSFORMERS_EPSILON,
        metadata={
            "help": "number that normalize adds to the variance: 1e-7 as in transformers, or 1e-5 as in fairseq and"
            " s3prl. A library with another number computes other features for quiet recordings"
        },
    )
    mask_prob: float = field(
        default=0.0,
        metadata={
            "help": "share of the student's input frames that masked spans cover in training, if no spans overlap; 0"
            " for no masking. The teacher's input is not masked"
        },
    )
    mask_length: int = field(default=10, metadata={"help": "length of a masked span in frames"})
    bad_audio: str = field(
        default="skip",
        metadata={"help": "skip: log unusable recordings and train without them; fail: stop at the first one"},
    )
    bad_audio_limit: float = field(
        default=BAD_AUDIO_LIMIT,
        metadata={"help": "largest share of a manifest's recordings to skip; the training stops at one more"},
    )
    target_store: Optional[str] = field(
        default=None,
        metadata={
            "help": "folder for stored targets of the teacher. The teacher is loaded only to compute missing targets,"
            " which are then stored (default: no store; the teacher runs on every batch)"
        },
    )
    target_format: str = field(
        default="fp16",
        metadata={
            "help": "format of stored targets: fp16; int8 with one scale per frame, which is half the size; pqN, which"
            " is N bytes for a frame of a layer, such as pq64 (product quantisation); or unitsN, the nearest of N"
            " clusters, such as units500. The store learns the codebooks of pqN and unitsN from a sample of the"
            " training speech"
        },
    )
    extensions: List[str] = field(
        default_factory=list,
        metadata={
            "help": "Python files and modules that are loaded at the start, with your own losses, growth methods,"
            " schedules, listeners or teachers; see docs/extending.md"
        },
    )
    train_subset: str = II("dataset.train_subset")
    valid_subset: str = II("dataset.valid_subset")
    seed: int = II("common.seed")
    cpu: bool = II("common.cpu")
    save_dir: str = II("checkpoint.save_dir")
    best_checkpoint_metric: str = II("checkpoint.best_checkpoint_metric")


class SpeechDistillation(FairseqTask):
    """Distils a teacher's hidden states into a student that may grow.

    The task has the teacher, because fairseq would halve, save and train it as a part of the model, and wrap it for
    distributed training as a part of the criterion.
    """

    # With this, fairseq passes the moving average to train_step, where it grows with the student.
    uses_ema = True

    # Every criterion of fairseq 0.12.2 reads this from its task.
    target_dictionary = None  # pyright: ignore[reportAssignmentType]  a property in fairseq

    cfg: SpeechDistillationConfig  # pyright: ignore[reportIncompatibleVariableOverride]  fairseq declares its base
    datasets: dict[str, SpeechDataset]

    def __init__(self, cfg: SpeechDistillationConfig, teacher: Teacher, store_folder: Path | None = None) -> None:
        super().__init__(cfg)
        self.teacher = teacher
        self.model_cfg: StackedHubertConfig | None = None
        self.target_layers: Sequence[int] = ()  # of the teacher, from the criterion
        self.store_folder = store_folder  # for the targets of this teacher
        self.store: TargetStore | None = None
        self.codebook_shape = codebook_shape(cfg.target_format) if store_folder else None
        self.learns_codes = False  # whether the criterion compares codes, not hidden states
        self.shares_cnn = False
        self.bad_audio: dict[str, BadAudio] = {}  # of each split
        self.left_out: set[str] = set()  # splits with a logged warning that batches leave recordings out
        self.update, self.utterances = 0, []  # the current update, and its utterances so far
        # The losses of its batches in this process, and all that it logs; the trainer reads them.
        self.losses: list[Tensor] = []
        self.logs: list[dict[str, Any]] = []
        self.preempted = False  # whether a process has received SIGTERM; the same in all processes
        self.progress = Progress()
        self.depth, self.updates_left = 0, {}

    @classmethod
    def setup_task(cls, cfg: SpeechDistillationConfig, **kwargs: Any) -> "SpeechDistillation":
        for name in ("data", "teacher"):
            path = getattr(cfg, name)
            if not os.path.exists(path):
                raise InputError(f"task.{name}={path} does not exist")
        if not 0 < cfg.normalize_epsilon < 1:
            raise InputError(
                f"task.normalize_epsilon={cfg.normalize_epsilon} must lie between 0 and 1; take 1e-7 or 1e-5"
            )
        if not 0 <= cfg.mask_prob <= 1:
            raise InputError(f"task.mask_prob={cfg.mask_prob} must lie between 0 and 1")
        if cfg.mask_length < 1:
            raise InputError(f"task.mask_length={cfg.mask_length} must be 1 or more")
        cfg.teacher_precision = cfg.teacher_precision or default_precision(cfg.cpu)
        check_choice("task.teacher_precision", cfg.teacher_precision, PRECISIONS)
        check_bad_audio(cfg.bad_audio, cfg.bad_audio_limit)
        check_format(cfg.target_format)
        options = {"whisper_pad": cfg.whisper_pad, "precision": cfg.teacher_precision}
        if cfg.target_store:
            task = cls(cfg, *described_teacher(cfg.teacher, cfg.target_store, **options))
        else:
            task = cls(cfg, load_teacher(cfg.teacher, **options))
        # The digest is saved in every checkpoint, so that a run resumes only with the teacher that it began with.
        task.state.merge_state_dict({"teacher": weights_digest(cfg.teacher)})
        return task

    def load_dataset(self, split: str, combine: bool = False, **kwargs: Any) -> None:
        """Read the manifest `split`.tsv of task.data and check its recordings without opening their files.

        `split` may be several subsets, separated by commas. The subset of dataset.train_subset is for training, all
        others are for validation. With dataset.combine_valid_subsets, fairseq sets `combine` for the split "valid".
        """
        training = split == self.cfg.train_subset
        names = dict.fromkeys(name.strip() for name in split.split(","))
        paths = [os.path.join(self.cfg.data, f"{name}.tsv") for name in names]
        if combine and not training:
            if split != self.cfg.valid_subset:
                raise InputError(
                    f"dataset.combine_valid_subsets=true combines {split}.tsv, {split}1.tsv and so on, but"
                    f" dataset.valid_subset={self.cfg.valid_subset}; leave one of the two out"
                )
            numbered = (os.path.join(self.cfg.data, f"{split}{number}.tsv") for number in itertools.count(1))
            paths += itertools.takewhile(os.path.exists, numbered)
        path = ", ".join(paths)
        manifest = read_manifests(paths)
        shortest = receptive_field(self.teacher.conv_layers)
        bad_audio = BadAudio(path, len(manifest), self.cfg.bad_audio, self.cfg.bad_audio_limit)
        bad_audio.report(listed_problems(manifest, shortest))
        self.bad_audio[split] = bad_audio
        self.datasets[split] = SpeechDataset(
            manifest, self.cfg.max_sample_size, self.cfg.seed, training, split, self.store, shortest
        )
        if self.store is not None:
            windows, missing, missing_bytes = self.store.plan(self.datasets[split])
            free = self.store.check_space(missing_bytes, path)
            logger.info(
                f"target store | {self.store.folder} | {split}: {windows - missing} of {windows} windows are"
                f" stored, the rest takes {size_text(missing_bytes)} of {size_text(free)} free"
            )
            if training:
                self._prepare_codebooks(self.store, self.datasets[split])

    def _prepare_codebooks(self, store: TargetStore, dataset: SpeechDataset) -> None:
        """Learn the codebooks that the store lacks, and log what they keep."""
        if store.without_codebooks:
            on_gpu = torch.cuda.is_available() and not self.cfg.cpu
            learn_all_codebooks(store, self.teacher, dataset, torch.device("cuda" if on_gpu else "cpu"))
            self.state.merge_state_dict({"codebooks": store.version(self.target_layers)})
        kept = [f"{codebooks.kept:.3f} ({name})" for name, codebooks in store.codebooks.items()]
        if kept:
            logger.info(f"target store | share of the variance that {store.form} keeps, by layer: {', '.join(kept)}")

    def get_batch_iterator(
        self, dataset: SpeechDataset, max_tokens: int | None = None, **options: Any
    ) -> EpochBatchIterator:
        """Return fairseq's iterator, and warn if its batches leave out recordings.

        Raises:
            InputError: a recording is longer than `max_tokens`, or no recording is left.
        """
        longest = int(dataset.sizes.argmax())
        samples = int(dataset.sizes[longest])
        if max_tokens is not None and samples > max_tokens:
            field = "max_tokens" if dataset.random_crop else "max_tokens_valid"
            raise InputError(
                f"dataset.{field}={max_tokens} is less than the {samples} samples of {dataset.manifest.path(longest)};"
                f" raise it to {samples} or more, or lower task.max_sample_size={self.cfg.max_sample_size}"
            )
        epochs = super().get_batch_iterator(dataset, max_tokens=max_tokens, **options)
        recordings, used = len(dataset.ordered_indices()), sum(map(len, epochs.frozen_batches))
        if used < recordings:
            line = (
                f"dataset.required_batch_size_multiple={options['required_batch_size_multiple']} leaves out"
                f" {recordings - used} of the {recordings} recordings of {dataset.split}, the longest; set it to 1"
            )
            if not used:
                raise InputError(line)
            if dataset.split not in self.left_out:
                self.left_out.add(dataset.split)
                logger.warning(line)
        return epochs

    def build_model(self, cfg: StackedHubertConfig, *args: Any) -> StackedHubert:
        check_links(cfg, "task", self.cfg, ("mask_prob", "normalize"))
        check_codes(cfg.loss, self.cfg)
        model = super().build_model(cfg, *args)
        self.shares_cnn = cfg.share_teacher_cnn
        check_frames(model, self.teacher, self.cfg.max_sample_size)
        announce_start(model)
        self.model_cfg = cfg
        return model

    def build_criterion(self, cfg: LayerDistillationConfig, *args: Any) -> LayerDistillation:
        if self.model_cfg is not None:
            names = ("loss", "teacher_layers", "intermediate_style", "output_weight")
            check_links(self.model_cfg, "criterion", cfg, names)
        build: Any = super().build_criterion  # fairseq 0.12.2 takes one argument, later versions take two
        criterion = build(cfg, *args)
        check_choice("checkpoint.best_checkpoint_metric", self.cfg.best_checkpoint_metric, criterion.validation_metrics)
        self.target_layers = criterion.target_layers
        self.learns_codes = bool(criterion.loss.codes)
        if self.store_folder:
            self.store = TargetStore(
                self.store_folder,
                self.target_layers,
                self.shares_cnn,
                self.cfg.target_format,
                self.teacher.width,
                self.teacher.conv_layers,
            )
            self.state.merge_state_dict({"codebooks": self.store.version(self.target_layers)})
        return criterion

    def train_step(
        self,
        sample: dict[str, Any],
        model: StackedHubert,
        criterion: LayerDistillation,
        optimizer: Any,
        update_num: int,
        ignore_grad: bool = False,
        ema_model: Any = None,
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        """Let the model grow if a new stage is due, then run forward and backward as every fairseq task does."""
        if update_num != self.update:
            self.update, self.utterances, self.losses, self.logs = update_num, [], [], []
        self.utterances += sample["utterances"]
        sample = self.with_targets(sample, model)
        if self.cfg.mask_prob > 0:
            device = sample["targets"][self.target_layers[-1]].device
            sample["mask"] = self.mask(sample, model, update_num).to(device, non_blocking=True)
        if model.due_stage(update_num) > model.stage_number:
            self.grow(sample, model, criterion, optimizer, update_num, ema_model)
        ignore_grad = ignore_grad or not sample["utterances"]
        output = super().train_step(sample, model, criterion, optimizer, update_num, ignore_grad)
        loss, sample_size, logging_output = _counted(output, sample)
        self.losses.append(output[0].detach())
        self.logs.append(logging_output)
        logging_output["preempted"] = float(preemption.requested())
        logging_output.update(self.progress.count(sample))
        self.depth, self.updates_left = model.depth, model.updates_left(update_num + 1)
        return loss, sample_size, logging_output

    def valid_step(
        self, sample: dict[str, Any], model: StackedHubert, criterion: LayerDistillation, ema_model: Any = None
    ) -> tuple[Tensor, Any, dict[str, Any]]:
        sample = self.with_targets(sample, model)
        output = super().valid_step(sample, model, criterion)
        (loss,) = read([output[2]], output[0])
        if not math.isfinite(loss):
            raise loss_stop(loss, sample["targets"], sample["utterances"], self.update + 1, model.stage_number)
        return _counted(output, sample)

    def loss_stop(self, loss: float, sample: dict[str, Any], update: int, stage: int) -> TrainingStopped:
        """Return the TrainingStopped for a batch of training whose loss is not finite."""
        targets = targets_of(sample, self.teacher, self.target_layers, False, self.store)
        return loss_stop(loss, targets, self.utterances, update, stage)

    def reduce_metrics(self, logging_outputs: list[dict[str, Any]], criterion: LayerDistillation) -> None:
        """Log an update or a validation. fairseq calls this with the sums over all processes."""
        read(logging_outputs)  # those of a validation by several processes; the trainer has read those of an update
        preempted = [log.pop("preempted", 0.0) for log in logging_outputs]
        self.preempted = self.preempted or any(preempted)
        counts = [{name: log.pop(name) for name in COUNTS if name in log} for log in logging_outputs]
        super().reduce_metrics(logging_outputs, criterion)
        if counts[0]:  # in training
            sums = {name: sum(count[name] for count in counts) for name in COUNTS}
            self.progress.log(sums, self.depth, self.updates_left)

    def post_validate(self, model: StackedHubert, stats: dict[str, Any], agg: Any) -> None:
        """Pass the loss to the model. fairseq calls this after each subset, with the mean over all processes."""
        model.observe_validation(stats["num_updates"], float(stats["loss"]))

    def with_targets(self, sample: dict[str, Any], model: StackedHubert) -> dict[str, Any]:
        """Return the batch with the teacher's hidden states and with the student's input."""
        self.bad_audio[sample["split"]].report(sample["problems"])
        dtype = next(model.parameters()).dtype
        targets = targets_of(
            sample, self.teacher, self.target_layers, self.shares_cnn, self.store, self.learns_codes, dtype
        )
        features = targets.pop(CNN).transpose(1, 2) if self.shares_cnn else None
        waveforms = sample["waveforms"]
        if self.cfg.normalize and features is None:
            lengths = torch.as_tensor(sample["lengths"])
            waveforms = normalize_waveforms(waveforms, lengths, self.cfg.normalize_epsilon)
        return {**sample, "waveforms": waveforms, "features": features, "targets": targets}

    def mask(self, sample: dict[str, Any], model: StackedHubert, update_num: int) -> Tensor:
        """Return [B, T] bool, the masked frames of a batch. They depend only on seed, update and utterance."""
        seeds = [(self.cfg.seed, update_num, zlib.crc32(name.encode())) for name in sample["utterances"]]
        frames = model.frames(torch.as_tensor(sample["lengths"]))
        return span_mask(frames, self.cfg.mask_prob, self.cfg.mask_length, seeds)

    def grow(
        self,
        sample: dict[str, Any],
        model: StackedHubert,
        criterion: LayerDistillation,
        optimizer: Any,
        update_num: int,
        ema_model: Any,
    ) -> None:
        """Let the model grow. The listeners update the optimizer and the moving average, and log the growth."""
        growth = Growth(
            update=update_num,
            model=model,
            optimizer=optimizer,
            average=None if ema_model is None else ema_model.moving_average,
            sample=sample,
            loss=lambda: self._loss(sample, model, criterion, optimizer),
            folder=self.cfg.save_dir,
        )
        with announced(growth):
            model.set_num_updates(update_num)
            growth.copied = model.finish_growth()

    def _loss(
        self, sample: dict[str, Any], model: StackedHubert, criterion: LayerDistillation, optimizer: Any
    ) -> float:
        """Return the loss per frame of a batch, without dropout or gradient."""
        with torch.autocast("cuda", enabled=isinstance(optimizer, AMPOptimizer)):
            loss, sample_size, _ = super().valid_step(sample, model, criterion)
        model.train()
        return loss.item() / sample_size


def _counted(output: tuple[Tensor, Any, dict[str, Any]], sample: dict[str, Any]) -> tuple[Tensor, Any, dict[str, Any]]:
    """Return loss, sample size and log of a batch. All are 0 for a batch without a readable recording."""
    if sample["utterances"]:
        return output
    loss, _, logging_output = output
    return loss * 0, 0, {name: value * 0 for name, value in logging_output.items()}


def check_links(model_cfg: Any, node: str, cfg: Any, names: tuple[str, ...]) -> None:
    """Check that fields which the model takes from the task or the criterion have the same values there.

    Raises:
        InputError: a field has another value in the model.
    """
    for name in names:
        ours, theirs = getattr(model_cfg, name), getattr(cfg, name)
        if ours != theirs:
            raise InputError(f"model.{name}={ours} differs from {node}.{name}={theirs}; set {node}.{name} alone")


def check_codes(loss: str, cfg: SpeechDistillationConfig) -> None:
    """Raise an InputError if the loss compares codes, and the store has none of their kind."""
    kind = LOSSES.choose(loss).codes
    if kind and kind not in CODES:
        raise InputError(f"criterion.loss={loss} was registered with codes={kind!r}; give one of {', '.join(CODES)}")
    if kind and not (cfg.target_store and kind_of(cfg.target_format) == kind):
        example = {"units": "units500", "pq": "pq16"}[kind]
        raise InputError(
            f"criterion.loss={loss} learns from stored codes; set task.target_store=FOLDER and"
            f" task.target_format={kind}N, such as {example}"
        )


def check_frames(student: StackedHubert, teacher: Teacher, max_samples: int) -> None:
    """Check that teacher and student divide every recording into the same frames.

    Raises:
        InputError: their frames differ for some length up to `max_samples` samples, or that is less than one frame.
    """
    shortest = receptive_field(student.conv_layers)
    if max_samples < shortest:
        raise InputError(f"task.max_sample_size={max_samples} is shorter than one frame, which has {shortest} samples")
    for samples in (*range(shortest, 4 * shortest), max_samples):
        ours, theirs = student.frames(samples), teacher.frames(samples)
        if ours != theirs:
            raise InputError(
                f"model.conv_feature_layers makes {ours} frames of {samples} samples, but task.teacher={teacher.name}"
                f" makes {theirs}; choose strides and kernels that give the teacher's frames"
            )
