"""fairseq's Trainer for a student that grows. It saves and restores the whole state of a run, or says why it cannot."""

import logging
import math
import os
import sys
from argparse import Namespace
from typing import Any

import torch
from fairseq.data.iterators import EpochBatchIterator
from fairseq.logging import metrics
from fairseq.registry import REGISTRIES
from fairseq.trainer import Trainer
from fairseq_cli import train as fairseq_train
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError
from torch import Tensor

from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.data.dataset import SpeechDataset
from fairseq_stack.errors import InputError, TrainingStopped, input_errors
from fairseq_stack.training.full_depth import depth_at_end
from fairseq_stack.training.logs import read
from fairseq_stack.training.moving_average import MovingAverage
from fairseq_stack.training.muon import mark_matrices
from fairseq_stack.training.nonfinite import gradient_stop, loss_elsewhere_stop, loss_scale_stop
from fairseq_stack.training.optimizers import save_whole_state
from fairseq_stack.training.resume import fit, saved_configuration
from fairseq_stack.training.resume_state import check_optimizer, plain_configuration

logger = logging.getLogger(__name__)


class StudentTrainer(Trainer):
    """Trains a StackedHubert.

    - The optimizer and the moving average save all that a resumed run needs (optimizers.py, moving_average.py).
    - A checkpoint that does not fit the configuration ends the run with one line (resume.py, resume_state.py).
    - A gradient that is not finite ends the run with one line. fairseq would save the state as crash.pt, compute the
      update again to find the layer, and show a traceback.
    - Validation on the training subset reads the recordings as validation does. fairseq keeps one dataset for a name,
      and would reset its epoch in the middle of the training's epoch.
    - A run that ends before full depth logs this.
    """

    loading: "StudentTrainer | None" = None  # the trainer that is loading a checkpoint, for guards.py
    depth_logged = False
    cfg: Any  # fairseq declares FairseqConfig and passes a DictConfig
    optimizer: Any  # a FairseqOptimizer, which fairseq builds when it is first read
    task: Any  # a SpeechDistillation

    def _build_optimizer(self) -> None:
        if self.cfg.optimizer._name == "muon":
            self._prepare_muon()
        fields = ", ".join(_chosen(self.cfg[group], group) for group in ("optimizer", "lr_scheduler"))
        with input_errors(f"fairseq cannot build the optimizer and the learning rate schedule from {fields}"):
            try:
                super()._build_optimizer()
            except ConfigAttributeError as error:  # fairseq does not declare the fields of some optimizers
                declared = REGISTRIES["optimizer"]["dataclass_registry"]
                group = "lr_scheduler" if self.cfg.optimizer._name in declared else "optimizer"
                raise InputError(f"{group}.{error.key} is missing; add +{group}.{error.key}=VALUE") from None
            betas = self.optimizer.optimizer.param_groups[0].get("betas", ())
            if not all(0 <= beta < 1 for beta in betas):
                raise InputError(f"optimizer.adam_betas={tuple(betas)} must be from 0 to below 1")
        save_whole_state(self.optimizer, self.cfg)

    def _prepare_muon(self) -> None:
        model, common = self.get_model(), self.cfg.common
        for half in ("fp16", "bf16"):
            if common[half] and common[f"memory_efficient_{half}"]:
                raise InputError(
                    f"common.memory_efficient_{half}=true keeps no fp32 weights, but optimizer._name=muon needs them;"
                    " set it to false"
                )
        matrices = list(model.matrices())
        mark_matrices(matrices)
        count, total = (sum(each.numel() for each in parameters) for parameters in (matrices, model.parameters()))
        logger.info(f"muon | updates {len(matrices)} matrices with {count:,} of {total:,} parameters, adamw the rest")
        if common.fp16 and not common.fp16_no_flatten_grads:
            common.fp16_no_flatten_grads = True
            logger.info("muon | common.fp16_no_flatten_grads=true, because a flat buffer has no matrices")

    def _build_ema(self) -> None:
        if self.cfg.ema.store_ema:
            self._ema = MovingAverage(self._model, self.cfg.ema, self.device)
            logger.info("Exponential Moving Average Shadow Model is initialized.")

    # Checkpoints

    def save_checkpoint(self, filename: str, extra_state: dict[str, Any]) -> None:
        # fairseq saves a crash.pt after an error in an update. Bad input and a loss that is not finite need none.
        crash = os.path.basename(filename) == "crash.pt"
        if crash and isinstance(sys.exc_info()[1], (InputError, TrainingStopped)):
            return None
        return super().save_checkpoint(filename, extra_state)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        # fairseq counts for checkpoint.patience in the attributes of a function.
        counted = vars(fairseq_train.should_stop_early)
        state["extra_state"]["patience"] = {name: counted[name] for name in ("best", "num_runs") if name in counted}
        return {**state, "cfg": plain_configuration(state["cfg"])}

    def load_checkpoint(
        self,
        filename: str,
        reset_optimizer: bool = False,
        reset_lr_scheduler: bool = False,
        optimizer_overrides: dict[str, Any] | None = None,
        reset_meters: bool = False,
    ) -> dict[str, Any] | None:
        """Load a checkpoint that fits this configuration, and return its extra state.

        A run that stopped at the end of an epoch is restored exactly, too. There, fairseq saves before the learning
        rate schedule gets the validation loss, and a resumed run loses the means since the last log entry.

        Raises:
            InputError: the checkpoint is from another network, training or optimizer.
        """
        # Otherwise rank 0 sends the loaded state as a pickle that torch's safe loading refuses on the other ranks.
        self.cfg.checkpoint.load_checkpoint_on_all_dp_ranks = True
        if os.path.isfile(filename):
            saved = load_checkpoint(filename, header_only=True).get("cfg")
            check_optimizer(saved, self.cfg, filename, reset_optimizer, reset_lr_scheduler)
        self._starts, self._reset_optimizer = [], reset_optimizer
        StudentTrainer.loading = self
        try:
            state = super().load_checkpoint(
                filename, reset_optimizer, reset_lr_scheduler, optimizer_overrides, reset_meters
            )
        except InputError:
            raise
        except (AssertionError, KeyError, ValueError) as error:
            raise InputError(
                f"the state in {filename} does not fit this configuration ({type(error).__name__} {error}); use the"
                " configuration that it was saved with, or for this start set checkpoint.reset_optimizer=true"
            ) from None
        finally:
            StudentTrainer.loading = None
        # A new run may save to the folder of an earlier run, whose checkpoints have more updates. Recovery compares the
        # number of starts first.
        self._optim_history = self._starts or self._optim_history
        if state is None or reset_meters:
            return state
        if not reset_optimizer:  # as fairseq does with the best loss
            vars(fairseq_train.should_stop_early).update(state.get("patience", {}))
        if state["train_iterator"]["iterations_in_epoch"] == 0:
            self.lr_step(state["train_iterator"]["epoch"] - 1, state["val_loss"])
            metrics.load_state_dict({"train_inner": state["metrics"]["train_inner"]})
        return state

    def saved_configuration(self, path: str, local_path: str) -> dict[str, Any]:
        """Return the configuration in a checkpoint that is about to be loaded.

        Args:
            path: the path in this configuration.
            local_path: the path of a copy on this machine.

        Raises:
            InputError: the file is not a training checkpoint of a student.
        """
        return saved_configuration(load_checkpoint(local_path, header_only=True), path, self._field_of(path))

    def _field_of(self, path: str) -> str:
        """Return the field of the configuration that names the file."""
        ways = ("restore_file", "finetune_from_model", "continue_once")
        chosen = (name for name in ways if getattr(self.cfg.checkpoint, name, None) == path)
        return f"checkpoint.{next(chosen, 'save_dir')}"

    def fitted(self, path: str, saved: dict[str, Any], state: dict[str, Any]) -> dict[str, Any]:
        """Return the content of a checkpoint that is being loaded, changed to fit this run (resume.fit).

        Args:
            path: the path in this configuration.
            saved: the result of saved_configuration.
            state: the content that fairseq has read. It is changed in place.

        Raises:
            InputError: it does not fit.
        """
        cfg, field = plain_configuration(self.cfg), self._field_of(path)
        stateless = state.get("last_optimizer_state") is None
        if stateless and not self._reset_optimizer and field == "checkpoint.save_dir":
            raise InputError(
                f"{path} was saved without the state of its optimizer (checkpoint.no_save_optimizer_state=true), so no"
                f" run can resume from it; checkpoint.finetune_from_model={path} with a new checkpoint.save_dir starts"
                " a new run from its weights"
            )
        new_run = self._reset_optimizer or stateless
        if new_run and field != "checkpoint.finetune_from_model":
            self._starts = list(state["optimizer_history"])
        fit(state, path, field, saved, cfg, self.get_model(), self.task.state_dict(), new_run)
        return state

    # Training

    def train_step(self, samples: list[dict[str, Any]], raise_oom: bool = False) -> dict[str, Any] | None:
        self._samples = samples
        return super().train_step(samples, raise_oom)

    def _aggregate_logging_outputs(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, Any]], Any]:
        self.task.logs, sums = super()._aggregate_logging_outputs(*args, **kwargs)
        return self.task.logs, sums

    def clip_grad_norm(self, clip_norm: float) -> Tensor:
        """Clip the gradient and return its norm, which is on the CPU.

        The norm is read together with all that the update logs, so the CPU waits only once for the GPU.

        Raises:
            TrainingStopped: the loss is not finite, or the gradient although the loss is.
        """
        where = (self.task.utterances, self.get_num_updates(), self.get_model().stage_number)
        try:
            norm = self.optimizer.clip_grad_norm(clip_norm, self._read)
        except FloatingPointError as error:  # fp16's loss scale has reached its minimum
            raise loss_scale_stop(error, *where) from None
        # With AMP the loss scaler handles an overflow. FP16Optimizer has raised an OverflowError for it.
        if not self.cfg.common.amp and not bool(torch.isfinite(norm)):
            raise gradient_stop(norm, *where)
        return norm

    def _read(self, norm: Tensor) -> Tensor:
        """Return the norm on the CPU, and read what the update logs; the optimizer calls this before it clips."""
        losses, logs = self.task.losses, self.task.logs
        self.task.losses, self.task.logs = [], []
        number, *losses = read(logs, norm, *losses)
        where = (self.get_num_updates(), self.get_model().stage_number)
        for loss, sample in zip(losses, self._samples):
            if not math.isfinite(loss):
                raise self.task.loss_stop(loss, self._prepare_sample(sample)[0], *where)
        if not all(math.isfinite(log["loss"]) for log in logs):
            raise loss_elsewhere_stop(*where)
        return torch.tensor(number)

    def get_valid_iterator(self, subset: str, *args: Any) -> EpochBatchIterator:
        datasets = self.task.datasets
        dataset = datasets.get(subset)
        if not isinstance(dataset, SpeechDataset):  # fairseq reports the error
            return super().get_valid_iterator(subset, *args)
        datasets[subset] = dataset.for_validation()
        try:
            return super().get_valid_iterator(subset, *args)
        finally:
            datasets[subset] = dataset

    def lr_step(self, epoch: int, val_loss: float | None = None) -> float:
        lr = super().lr_step(epoch, val_loss)
        if lr <= self.cfg.optimization.stop_min_lr:
            self.log_depth(next_epoch=1)
        return lr

    def log_depth(self, next_epoch: int) -> None:
        """Log the depth of a run that ends before full depth, once."""
        line = depth_at_end(self.cfg, self, next_epoch)
        if line and self.is_data_parallel_master and not self.depth_logged:
            self.depth_logged = True
            logger.warning(line)


def _chosen(section: DictConfig | Namespace, group: str) -> str:
    """Return the fields of a section of the configuration that differ from their defaults, as text."""
    if not isinstance(section, DictConfig):  # the older command line gives a namespace
        return f"{group}._name={section._name}"
    values: Any = OmegaConf.to_container(section)
    registered = REGISTRIES[group]["dataclass_registry"].get(values["_name"])
    known = registered.__dataclass_fields__ if registered else {}
    return ", ".join(
        f"{group}.{name}={value}" for name, value in values.items() if name not in known or known[name].default != value
    )
