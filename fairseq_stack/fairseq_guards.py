"""The one place that reaches into fairseq: functions of its own that a long run could lose work by.

fairseq has no hook for any of this. Each guard calls fairseq's function and adds to it, and
tests/integration/test_guards.py fails where fairseq no longer calls it.

- A checkpoint is copied beside and renamed; fairseq copies in place, and a kill leaves half of one.
- Before a run resumes, recovery.py makes checkpoint_last.pt the newest whole checkpoint.
- What is loaded fits this configuration (resume.py), or ends in one line that says what does not.
- A run that cannot, or did not, reach full depth says so (full_depth.py).
- A file is unpickled only after checkpoint.py has found that nothing in it can run. (torch refuses
  the rest since 2.6, with a traceback.)
- An update whose gradient is not finite ends the run in one line; fairseq would save the state as
  crash.pt, compute the update again in search of the place, and show a traceback.
- A run that has done its updates and is started again does none; fairseq does one more.
- A job that is told to end (preemption.py) saves a checkpoint first.
- Validation on a subset that is trained on too hears it as validation does: fairseq keeps one dataset for a name, and
  would set its epoch back in the middle of the training's.
- Validation subsets that nothing names are answered in one line.
- A training starts as in a new process (process_state.py), after its configuration has been checked (start_checks.py).
- A field of the wrong type or name, and what fairseq cannot build of its fields, is answered in one line.
- A run resumes only from a state that fits its configuration, and not in the middle of an epoch of other batches
  (training_state.py).
- A run resumes with the validations that checkpoint.patience has counted, whatever optimizer fairseq-train has.
- The wait for the batches of an update is on the clock (progress.py).
- Data workers end with their epoch. fairseq lets them wait for a next one, which gets workers of its own, and leaves
  them to Python's garbage collector: it takes their queues apart before they have heard that it is over, and the
  training stands still for 5 s for each.
"""

import difflib
import functools
import logging
import os

import torch
from fairseq import checkpoint_utils
from fairseq.data import data_utils, iterators
from fairseq.dataclass import utils as dataclass_utils
from fairseq.file_io import PathManager
from fairseq.logging import metrics
from fairseq.registry import REGISTRIES
from fairseq.trainer import Trainer
from fairseq_cli import train as fairseq_train
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from fairseq_stack import preemption, progress
from fairseq_stack.checkpoint import load_checkpoint
from fairseq_stack.data.speech import SpeechDataset
from fairseq_stack.errors import InputError, input_errors, one_line_errors
from fairseq_stack.finite import gradient_stop, loss_scale_stop
from fairseq_stack.full_depth import check_depth, depth_at_end
from fairseq_stack.process_state import reset_process_state
from fairseq_stack.recovery import LAST, UNFINISHED, recover
from fairseq_stack.resume import fit, saved_configuration
from fairseq_stack.start_checks import check_configuration, check_names
from fairseq_stack.training_state import (
    check_optimizer,
    epoch_layout,
    layout_change,
    next_epoch,
    plain_configuration,
)

logger = logging.getLogger(__name__)


def _guard(owner, name):
    """Replace `owner.name` by the decorated function, which gets fairseq's as its first argument."""

    def decorate(function):
        original = getattr(owner, name)

        @functools.wraps(original)
        @one_line_errors
        def guarded(*args, **kwargs):
            return function(original, *args, **kwargs)

        setattr(owner, name, staticmethod(guarded) if owner is PathManager else guarded)
        return function

    return decorate


@_guard(PathManager, "copy")
def _copy_as_a_whole(copy, src_path, dst_path, overwrite=False):
    if not PathManager.supports_rename(dst_path):
        return copy(src_path, dst_path, overwrite=overwrite)
    copied = copy(src_path, dst_path + UNFINISHED, overwrite=True)
    PathManager.rename(dst_path + UNFINISHED, dst_path)
    return copied


@_guard(Trainer, "load_checkpoint")
def _resume_the_optimizer_that_was_saved(
    load, trainer, filename, reset_optimizer=False, reset_lr_scheduler=False, *args, **kwargs
):
    if os.path.isfile(filename):
        saved = load_checkpoint(filename, header_only=True).get("cfg")
        check_optimizer(saved, trainer.cfg, filename, reset_optimizer, reset_lr_scheduler)
    try:
        return load(trainer, filename, reset_optimizer, reset_lr_scheduler, *args, **kwargs)
    except InputError:
        raise
    except (AssertionError, KeyError, ValueError) as error:
        raise InputError(
            f"the state in {filename} does not fit this configuration ({type(error).__name__} {error}); take that which"
            " it was saved with, or for this start checkpoint.reset_optimizer=true"
        ) from None


@_guard(Trainer, "state_dict")
def _save_what_resumes(state_dict, trainer):
    state = state_dict(trainer)
    state["extra_state"]["patience"] = _patience()
    return {**state, "cfg": plain_configuration(state["cfg"])}


@_guard(Trainer, "load_checkpoint")
def _resume_the_patience(load, trainer, filename, reset_optimizer=False, *args, reset_meters=False, **kwargs):
    state = load(trainer, filename, reset_optimizer, *args, reset_meters=reset_meters, **kwargs)
    if state is not None and not reset_optimizer and not reset_meters:  # as fairseq does with the best loss
        vars(fairseq_train.should_stop_early).update(state.get("patience", {}))
    return state


def _patience():
    """What fairseq counts for checkpoint.patience: the best loss, and the validations since."""
    counted = vars(fairseq_train.should_stop_early)
    return {name: counted[name] for name in ("best", "num_runs") if name in counted}


@_guard(iterators.EpochBatchIterator, "state_dict")
def _remember_the_batches(state_dict, iterator):
    state = state_dict(iterator)
    return {**state, "layout": epoch_layout(iterator)} if state["iterations_in_epoch"] else state


@_guard(iterators.EpochBatchIterator, "load_state_dict")
def _leave_an_epoch_of_other_batches(load, iterator, state):
    if state.get("iterations_in_epoch") and state.get("layout") not in (None, epoch_layout(iterator)):
        state = next_epoch(state)
    try:
        load(iterator, state)
    except RuntimeError:  # an older checkpoint has no layout, and its place lies behind the epoch's last batch
        load(iterator, next_epoch(state))


@_guard(checkpoint_utils, "load_checkpoint")
def _start_the_next_epoch(load, cfg, trainer, **kwargs):
    state, epochs = load(cfg, trainer, **kwargs)
    if state is not None and epochs.epoch > state["train_iterator"]["epoch"]:
        left = state["train_iterator"]
        change = layout_change(left.get("layout"), epoch_layout(epochs))
        logger.info(f"resume | epoch {left['epoch']} {change}, so training goes on at the start of epoch {epochs.epoch}")
        epochs = trainer.get_train_iterator(epochs.epoch, load_dataset=False, **kwargs)
        metrics.reset_meters("train")
    return state, epochs


@_guard(checkpoint_utils, "load_checkpoint")
def _resume_from_the_newest(load, cfg, trainer, **kwargs):
    preemption.listen()
    if cfg.restore_file == LAST and not trainer.checkpoint_suffix:
        if trainer.data_parallel_rank == 0:
            recover(cfg.save_dir)
        if trainer.data_parallel_world_size > 1:
            torch.distributed.barrier()  # every process looks for the file
    if not trainer.checkpoint_suffix:
        _check_where_from(cfg)
    state, epoch_itr = load(cfg, trainer, **kwargs)
    optimization = trainer.cfg.optimization
    if optimization.skip_remainder_batch and len(epoch_itr) < max(optimization.update_freq):
        raise InputError(
            f"optimization.skip_remainder_batch=true leaves out all {len(epoch_itr)} batches of an epoch with"
            f" optimization.update_freq={optimization.update_freq}; set it to false, or lower optimization.update_freq"
        )
    if _trains_a_student(trainer):
        if cfg.no_save_optimizer_state:
            logger.warning("checkpoint.no_save_optimizer_state=true: once this run is stopped, it cannot resume")
        check_depth(trainer.cfg, trainer.get_model(), len(epoch_itr))
        if 0 < trainer.cfg.optimization.max_epoch < epoch_itr.next_epoch_idx:
            _say_the_depth(trainer, epoch_itr.next_epoch_idx)
    return state, epoch_itr


def _check_where_from(cfg):
    """Refuse a file that is not there, for which fairseq trains from the beginning, and fields that contradict it."""
    others = [f"checkpoint.{name}=true" for name in cfg if name.startswith("reset_") and cfg[name]]
    if cfg.restore_file != LAST:
        others.append(f"checkpoint.restore_file={cfg.restore_file}")
    if cfg.finetune_from_model and others:
        raise InputError(
            f"checkpoint.finetune_from_model={cfg.finetune_from_model} takes the weights alone of that file and"
            f" excludes {', '.join(others)}; set one of the two"
        )
    last = os.path.join(cfg.save_dir, LAST)
    leaves_last = cfg.restore_file != LAST and os.path.isfile(last)
    if leaves_last and os.path.realpath(last) != os.path.realpath(cfg.restore_file):
        logger.warning(
            f"every start loads checkpoint.restore_file={cfg.restore_file}, and this one leaves {last} aside; leave the"
            " field out to resume from there"
        )
    names = ["restore_file"]
    if cfg.restore_file == LAST:  # without which a run starts from others
        names = [] if PathManager.exists(last) else ["continue_once", "finetune_from_model"]
    for name in names:
        if cfg.get(name) and not PathManager.isfile(cfg[name]):
            raise InputError(f"checkpoint.{name}={cfg[name]} is no file; give the path of a checkpoint")


@_guard(Trainer, "load_checkpoint")
def _load_what_fits(load, trainer, filename, reset_optimizer=False, *args, **kwargs):
    if not _trains_a_student(trainer):
        return load(trainer, filename, reset_optimizer, *args, **kwargs)
    cfg = plain_configuration(trainer.cfg)
    read, starts = checkpoint_utils.load_checkpoint_to_cpu, []
    ways = ("restore_file", "finetune_from_model", "continue_once")
    field = "checkpoint." + next((name for name in ways if cfg["checkpoint"].get(name) == filename), "save_dir")

    def read_what_fits(path, *args, **kwargs):
        header = load_checkpoint(PathManager.get_local_path(path), header_only=True)
        saved = saved_configuration(header, path, field)
        state = read(path, *args, **kwargs)
        stateless = state.get("last_optimizer_state") is None
        if stateless and not reset_optimizer and field == "checkpoint.save_dir":
            raise InputError(
                f"{path} was saved without the state of its optimizer (checkpoint.no_save_optimizer_state=true), so no"
                f" run can resume from it; checkpoint.finetune_from_model={path} with a new checkpoint.save_dir starts a"
                " new run from its weights"
            )
        new_run = reset_optimizer or stateless
        if new_run and field != "checkpoint.finetune_from_model":
            starts.extend(state["optimizer_history"])
        fit(state, path, field, saved, cfg, trainer.get_model(), trainer.task.state_dict().get("teacher"), new_run)
        return state

    checkpoint_utils.load_checkpoint_to_cpu = read_what_fits
    try:
        loaded = load(trainer, filename, reset_optimizer, *args, **kwargs)
        # A new run may save beside the checkpoints of the one before, which have more updates: recover counts starts.
        trainer._optim_history = starts or trainer._optim_history
        return loaded
    finally:
        checkpoint_utils.load_checkpoint_to_cpu = read


def _trains_a_student(trainer):
    return hasattr(trainer.get_model(), "plan")


def _say_the_depth(trainer, next_epoch):
    """Log, once, the depth of a run that ends before full depth."""
    line = depth_at_end(trainer.cfg, trainer, next_epoch)
    if line and trainer.is_data_parallel_master and not getattr(trainer, "depth_is_said", False):
        trainer.depth_is_said = True
        logger.warning(line)


@_guard(checkpoint_utils, "load_checkpoint_to_cpu")
@_guard(checkpoint_utils, "load_ema_from_checkpoint")
def _unpickle_only_what_is_safe(load, path, *args, **kwargs):
    if os.path.isfile(path):
        load_checkpoint(path, header_only=True, harmless_only=True)
    return load(path, *args, **kwargs)


@_guard(Trainer, "clip_grad_norm")
def _stop_at_a_gradient_that_is_not_finite(clip, trainer, clip_norm):
    if not hasattr(trainer.task, "utterances"):
        return clip(trainer, clip_norm)
    where = (trainer.task.utterances, trainer.get_num_updates(), trainer.get_model().stage_number)
    try:
        norm = clip(trainer, clip_norm)
    except FloatingPointError as error:  # fp16's loss scale has reached its minimum
        raise loss_scale_stop(error, *where) from None
    # AMP's loss scale takes care of an overflow by itself; FP16Optimizer raises OverflowError for it.
    if not trainer.cfg.common.amp and not bool(torch.isfinite(norm)):
        raise gradient_stop(norm, *where)
    return norm


@_guard(fairseq_train, "train")
def _leave_a_finished_run_alone(train, cfg, trainer, task, epoch_itr):
    finished = 0 < cfg.optimization.max_update <= trainer.get_num_updates()
    losses, should_stop = ([None], True) if finished else train(cfg, trainer, task, epoch_itr)
    next_epoch = epoch_itr.next_epoch_idx
    if _trains_a_student(trainer) and (should_stop or 0 < cfg.optimization.max_epoch < next_epoch):
        _say_the_depth(trainer, next_epoch)
    return losses, should_stop


@_guard(Trainer, "lr_step")
def _say_that_the_learning_rate_ends_the_run(lr_step, trainer, *args, **kwargs):
    lr = lr_step(trainer, *args, **kwargs)
    if _trains_a_student(trainer) and lr <= trainer.cfg.optimization.stop_min_lr:
        _say_the_depth(trainer, next_epoch=1)
    return lr


@_guard(fairseq_train, "validate_and_save")
def _save_when_told_to_end(validate_and_save, cfg, trainer, task, epoch_itr, *args):
    losses, should_stop = validate_and_save(cfg, trainer, task, epoch_itr, *args)
    if getattr(task, "told_to_end", False) and not should_stop:
        checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
        if trainer.is_data_parallel_master:
            logger.warning(
                f"SIGTERM ends the run at update {trainer.get_num_updates()}; the same command resumes it from its last"
                " checkpoint"
            )
        preemption.obey()
    return losses, should_stop


@_guard(fairseq_train, "add_defaults")
def _start_clean_and_checked(add_defaults, cfg):
    """fairseq's first step in every training, right after it has imported the user_dir."""
    reset_process_state()
    check_names(cfg)
    add_defaults(cfg)
    check_configuration(cfg)


@_guard(dataclass_utils, "merge_with_parent")
def _name_the_field(merge, dc, cfg, *args, **kwargs):
    try:
        return merge(dc, cfg, *args, **kwargs)
    except OmegaConfBaseException as error:
        group, field = cfg._key(), error.full_key or error.key
        name = "" if group is None else f"{group}."
        if isinstance(error, (ConfigKeyError, ConfigAttributeError)):
            known = [each for each in dc.__dataclass_fields__ if not each.startswith("_")]
            alike = difflib.get_close_matches(str(field), known, n=3) or known
            raise InputError(
                f"{name}{field} is no field of {name}_name={cfg.get('_name')}; take it out (~{name}{field} on the"
                f" command line) or choose from {', '.join(alike)}"
            ) from None
        reason = str(error.msg or error).splitlines()[0]
        raise InputError(f"{name}{field}: {reason}; correct the configuration") from None


@_guard(checkpoint_utils, "verify_checkpoint_directory")
def _name_the_folder(verify, save_dir):
    with input_errors(f"checkpoint.save_dir={save_dir} cannot be written to; choose another folder"):
        verify(save_dir)


@_guard(Trainer, "_build_optimizer")
def _name_the_optimizer(build, trainer):
    fields = ", ".join(_chosen(trainer.cfg[group], group) for group in ("optimizer", "lr_scheduler"))
    with input_errors(f"fairseq cannot build the optimizer and the learning rate schedule from {fields}"):
        try:
            build(trainer)
        except ConfigAttributeError as error:  # of an optimizer or a schedule whose fields fairseq does not declare
            declared = REGISTRIES["optimizer"]["dataclass_registry"]
            group = "lr_scheduler" if trainer.cfg.optimizer._name in declared else "optimizer"
            raise InputError(f"{group}.{error.key} is missing; add +{group}.{error.key}=VALUE") from None
        betas = trainer.optimizer.optimizer.param_groups[0].get("betas", ())
        if not all(0 <= beta < 1 for beta in betas):
            raise InputError(f"optimizer.adam_betas={tuple(betas)} must be from 0 to below 1")


def _chosen(section, group):
    """The fields of a section of the configuration that have no default value, as text."""
    if not isinstance(section, DictConfig):  # of the older command line
        return f"{group}._name={section._name}"
    values = OmegaConf.to_container(section)
    registered = REGISTRIES[group]["dataclass_registry"].get(values["_name"])
    known = registered.__dataclass_fields__ if registered else {}
    return ", ".join(
        f"{group}.{name}={value}" for name, value in values.items() if name not in known or known[name].default != value
    )


@_guard(Trainer, "get_valid_iterator")
def _validate_as_validation_hears(get_iterator, trainer, subset, *args):
    datasets = trainer.task.datasets
    dataset = datasets.get(subset)
    if not isinstance(dataset, SpeechDataset):
        return get_iterator(trainer, subset, *args)
    datasets[subset] = dataset.for_validation()
    try:
        return get_iterator(trainer, subset, *args)
    finally:
        datasets[subset] = dataset


@_guard(data_utils, "raise_if_valid_subsets_unintentionally_ignored")
def _name_the_ignored_subsets(check, cfg):
    try:
        check(cfg)
    except ValueError as error:
        raise InputError(
            f"task.data={cfg.task.data}: {str(error).split('. ')[0]}; name them in dataset.valid_subset, or set"
            " dataset.combine_valid_subsets=true or dataset.ignore_unused_valid_subsets=true"
        ) from None


@_guard(iterators, "_chunk_iterator")
def _time_the_wait(groups, *args):
    return progress.timed(groups(*args))


@_guard(iterators.EpochBatchIterator, "_get_iterator_for_epoch")
def _end_workers_with_their_epoch(get_iterator, *args, **kwargs):
    loader = torch.utils.data.DataLoader
    torch.utils.data.DataLoader = lambda *given, **options: loader(*given, **{**options, "persistent_workers": False})
    try:
        return get_iterator(*args, **kwargs)
    finally:
        torch.utils.data.DataLoader = loader
