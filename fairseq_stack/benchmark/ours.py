"""Updates of our recipe with fairseq's trainer."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import tasks
from fairseq.data import iterators

from fairseq_stack.benchmark.clock import Clock
from fairseq_stack.benchmark.inputs import TEACHER, student_shape, teacher_shape
from fairseq_stack.growth.surgery import copy_optimizer_state
from fairseq_stack.training.recipes import compose_recipe
from fairseq_stack.training.stored_targets import store_targets
from fairseq_stack.training.trainer import StudentTrainer

RECIPE = "librispeech_base"
STORE = "targets"
LIVE = "live"


@dataclass(frozen=True)
class Case:
    """A variant of the training.

    Attributes:
        precision: of the student: fp32, bf16 or fp16. The teacher's is bf16.
        targets: LIVE, from the teacher, or the format in which they are stored.
        cnn: `trained`, or `shared` with the teacher and frozen; stored targets then include its features.
    """

    precision: str
    targets: str
    cnn: str

    def __str__(self) -> str:
        targets = "live targets" if self.targets == LIVE else f"targets stored in {self.targets}"
        return f"{self.precision}, {targets}, CNN {self.cnn}"


class Ours:
    """Our training, one update at a time, each at a given depth.

    Args:
        recipes: folder of the recipe.
        folder: written by make_inputs.
        size: of make_inputs.
        batch: utterances of an update.
        device: cpu or cuda.
        case: the variant.
        clock: a Clock (default: one of seconds).
    """

    def __init__(
        self,
        recipes: Path,
        folder: Path,
        size: str,
        batch: int,
        device: str,
        case: Case,
        clock: Clock | None = None,
    ):
        cfg = configuration(recipes, folder, size, batch, device, case)
        self.clock = clock or Clock(torch.device(device))
        self.task = tasks.setup_task(cfg.task)
        self.model = self.task.build_model(cfg.model)
        criterion = self.task.build_criterion(cfg.criterion)
        self.task.load_dataset("train")
        self.trainer = StudentTrainer(cfg, self.task, self.model, criterion)
        self.trainer.cuda_env = None  # otherwise every update resets the peak of the GPU's memory
        epochs = self.trainer.get_train_iterator(epoch=1, load_dataset=False)
        self.trainer.begin_epoch(1)
        self.batches = iterators.GroupedIterator(epochs.next_epoch_itr(shuffle=False), 1)
        later = len(self.model.plan.stages) - 1
        self.model.starts = (0, *[cfg.optimization.max_update] * later)  # `update` sets the depth
        self.clock.wrap(self.task, "with_targets", "targets")
        self.clock.wrap(self.model, "features", "student CNN")
        self.clock.wrap(criterion, "forward", "student transformer")
        self.clock.wrap(self.trainer.optimizer, "backward", "backward")
        for method in ("step", "clip_grad_norm", "zero_grad"):
            self.clock.wrap(self.trainer.optimizer, method, "optimiser")

    def update(self, depth: int) -> dict[str, Any]:
        """Makes one update of a student with `depth` layers and returns {part: seconds}.

        Raises:
            RuntimeError: memory ran out. Without raise_oom fairseq would skip the batch, which would look fast.
        """
        self.model._stage_index = self.model.plan.depths.index(depth)
        self.model.stage.fill_(self.model._stage_index)
        self.clock.restart()
        with self.clock("data"):
            batch = next(self.batches)
        loading, done = self.clock.stop(), self.trainer.get_num_updates()
        while self.trainer.get_num_updates() == done:  # in fp16 an overflow lowers the scale and skips the step
            self.clock.restart()
            self.trainer.train_step(batch, raise_oom=True)
        return {**loading, **self.clock.stop()}

    def growth(self) -> float:
        """Returns the seconds of the last growth, which copies weights, fp32 masters and moments."""
        self.model._stage_index = len(self.model.plan.stages) - 2
        self.clock.restart()
        self.model.grow_to(self.model.stage_number + 1)
        copy_optimizer_state(self.trainer.optimizer, self.model.finish_growth(), "copy")
        return sum(self.clock.stop().values())


def fill_store(recipes: Path, folder: Path, size: str, batch: int, device: str, case: Case) -> None:
    """Stores the targets that a Case with stored targets reads."""
    store_targets(configuration(recipes, folder, size, batch, device, case), ["train"])


def configuration(recipes: Path, folder: Path, size: str, batch: int, device: str, case: Case) -> Any:
    """Returns the recipe of a Case, composed as by fairseq-hydra-train."""
    shape = student_shape(size)
    if case.cnn == "shared":
        shape = {**shape, "conv_feature_layers": teacher_shape(size)["conv_feature_layers"]}
    fields = {
        "common.fp16": case.precision == "fp16",
        "common.bf16": case.precision == "bf16",
        "common.cpu": device == "cpu",
        "common.tensorboard_logdir": "",
        "dataset.batch_size": batch,
        "dataset.num_workers": 1,
        "distributed_training.distributed_world_size": 1,
        "task.data": folder,
        "task.max_sample_size": 1_000_000_000,  # whole utterances, as in the baselines
        "task.teacher": folder / TEACHER,
        "+task.teacher_precision": "bf16",
        **{f"model.{name}": f'"{value}"' if isinstance(value, str) else value for name, value in shape.items()},
    }
    if case.targets != LIVE:
        fields.update({"+task.target_store": folder / STORE, "+task.target_format": case.targets})
    if case.cnn == "shared":
        fields.update({"+model.share_teacher_cnn": True, "+model.feature_grad_mult": 0})
    return compose_recipe(recipes, RECIPE, [f"{name}={value}" for name, value in fields.items()])
