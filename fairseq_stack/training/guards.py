"""Guards: replacements for functions of fairseq, for runs of this package's task.

Those with `always` serve other tasks too, once --user-dir has named this package: fine-tuning a student needs them.

Only this module replaces functions, and only where fairseq has no hook and a subclass (trainer.py) cannot help. Each
guard calls fairseq's function and adds to it. tests/integration/test_guards.py fails if fairseq no longer calls it.

- Bad input ends every process of a job with a one-line message.
- Under torchrun, all processes train together, and under torchrun and SLURM also without a GPU.
- A training starts as in a new process (process_state.py). Its configuration is checked first (start_checks.py).
- A field with a wrong type or name gets a one-line error.
- A checkpoint is copied to a temporary name and then renamed. fairseq copies in place, so a kill leaves half a file.
- Before a run resumes, the newest whole checkpoint becomes checkpoint_last.pt (checkpoints/recovery.py).
- A file is unpickled only if checkpoints/read.py finds that no code in it can run. (torch has refused other files
  since 2.6, with a traceback.)
- A loaded checkpoint fits this configuration, or a one-line error says what does not fit.
- A run does not resume in the middle of an epoch if its batches have changed (resume_state.py).
- A finished run that is started again makes no update. fairseq would make one more.
- A run that cannot reach, or has not reached, full depth logs this (full_depth.py).
- A job that receives SIGTERM saves a checkpoint before it ends (preemption.py).
- Validation subsets that no field names get a one-line error.
- The wait for the batches of an update is measured (progress.py).
- Data workers end with their epoch. fairseq keeps them for the next epoch, which starts its own workers. Python's
  garbage collector then breaks their queues before they know that they shall end, and the training stands still for
  5 s per worker.
"""

import difflib
import functools
import logging
import os
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.data import data_utils, iterators
from fairseq.dataclass import utils as dataclass_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.logging import metrics
from fairseq.tasks import TASK_REGISTRY
from fairseq.trainer import Trainer
from fairseq_cli import train as fairseq_train
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
from torch.distributed import PrefixStore, Store  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous
from torch.multiprocessing.spawn import ProcessExitedException

from fairseq_stack.checkpoints.read import load_checkpoint
from fairseq_stack.checkpoints.recovery import LAST, UNFINISHED, recover
from fairseq_stack.errors import InputError, input_errors, one_line_errors
from fairseq_stack.extensions import use_extensions
from fairseq_stack.teachers.base import default_precision
from fairseq_stack.training import preemption, progress
from fairseq_stack.training.full_depth import check_depth
from fairseq_stack.training.process_state import reset_process_state
from fairseq_stack.training.resume_state import epoch_layout, layout_change, next_epoch
from fairseq_stack.training.start_checks import check_configuration, check_names
from fairseq_stack.training.trainer import StudentTrainer

logger = logging.getLogger(__name__)

TASK = "speech_distillation"


def _guard(owner: Any, name: str, always: bool = False) -> Callable[[Callable], Callable]:
    """Replace `owner.name` by the decorated function, whose first argument is fairseq's function.

    The decorated function is called in runs of this package's task, or with `always` in all runs.
    """

    def decorate(function: Callable) -> Callable:
        original = getattr(owner, name)

        @functools.wraps(original)
        def guarded(*args, **kwargs):
            ours = always or fairseq_train.Trainer is StudentTrainer
            return function(original, *args, **kwargs) if ours else original(*args, **kwargs)

        setattr(owner, name, staticmethod(guarded) if owner is PathManager else guarded)
        return function

    return decorate


@_guard(distributed_utils, "call_main", always=True)
def _end_in_one_line(call_main: Callable, cfg: DictConfig | Namespace, main: Callable, **kwargs: Any) -> Any:
    """Both command lines of fairseq start their work with call_main, in this process or in one for each GPU."""
    if main is not fairseq_train.main:
        return call_main(cfg, main, **kwargs)
    try:
        return call_main(cfg, one_line_training, **kwargs)
    except ProcessExitedException as error:
        if error.exit_code < 0:  # a signal has ended the process, which could print no reason
            raise SystemExit(f"error: {error}") from None
        raise SystemExit(error.exit_code) from None


@one_line_errors
def one_line_training(cfg: Any, **kwargs: Any) -> None:
    """Run fairseq's training. An InputError or TrainingStopped ends the process with its one-line message."""
    try:
        return fairseq_train.main(cfg, **kwargs)
    finally:
        use_extensions([])  # they belong to this training


@_guard(distributed_utils, "infer_init_method", always=True)
def _join_the_processes_of_torchrun(infer: Callable, cfg: Any, *args: Any, **kwargs: Any) -> None:
    """fairseq trains alone in a process whose configuration has one process, whatever torchrun has started."""
    if not torch.distributed.is_torchelastic_launched():
        return infer(cfg, *args, **kwargs)
    if cfg.distributed_world_size == 1:
        cfg.distributed_world_size = int(os.environ["WORLD_SIZE"])
    infer(cfg, *args, **kwargs)
    if cfg.distributed_init_method == "env://":
        cfg.distributed_init_method = "torchrun://"


def _meet_after_a_restart(url: str, **kwargs: Any) -> Iterator[tuple[Store, int, int]]:
    """Newer versions of torchrun keep their store over a restart, and a process would find addresses of dead ones."""
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    for store, rank, size in rendezvous(url.replace("torchrun:", "env:", 1), **kwargs):
        yield PrefixStore(f"attempt {attempt}", store), rank, size


register_rendezvous_handler("torchrun", _meet_after_a_restart)


@_guard(distributed_utils, "_infer_slurm_init", always=True)
@_guard(distributed_utils, "_infer_torch_distributed_launch_init", always=True)
def _start_without_a_gpu(infer: Callable, cfg: Any, *args: Any) -> bool | None:
    """fairseq counts the GPUs of a node. Without one, each process that the launcher has started is a rank."""
    if torch.cuda.is_available():
        return infer(cfg, *args)
    device_count, torch.cuda.device_count = torch.cuda.device_count, lambda: 1
    try:
        found = infer(cfg, *args)
    finally:
        torch.cuda.device_count = device_count
    if cfg.distributed_init_method is not None:
        cfg.distributed_no_spawn, cfg.device_id = True, 0
        if cfg.distributed_backend == "nccl":  # fairseq's default
            cfg.distributed_backend = "gloo"
    return found


@_guard(fairseq_train, "add_defaults", always=True)
def _start_clean_and_checked(add_defaults: Callable, cfg: DictConfig) -> None:
    """In every training, fairseq calls add_defaults first, right after it has imported the user_dir."""
    name = getattr(cfg.task, "_name", None)
    ours = name == TASK or name not in TASK_REGISTRY  # check_names reports an unknown name
    fairseq_train.Trainer = StudentTrainer if ours else Trainer
    reset_process_state()  # for another task too: the state may come from a run of our task
    if not ours:
        preemption.unlisten()
        return add_defaults(cfg)
    use_extensions(getattr(cfg.task, "extensions", None))  # they may register an optimizer with fairseq
    check_names(cfg)
    add_defaults(cfg)
    check_configuration(cfg)
    if name == TASK:  # checkpoints have the precision in use, so a resumed run on another device logs the change
        cfg.task.teacher_precision = cfg.task.teacher_precision or default_precision(cfg.common.cpu)


@_guard(PathManager, "copy", always=True)
def _copy_as_a_whole(copy: Callable, src_path: str, dst_path: str, overwrite: bool = False) -> bool | None:
    if not PathManager.supports_rename(dst_path):
        return copy(src_path, dst_path, overwrite=overwrite)
    copied = copy(src_path, dst_path + UNFINISHED, overwrite=True)
    PathManager.rename(dst_path + UNFINISHED, dst_path)
    return copied


@_guard(iterators.EpochBatchIterator, "state_dict")
def _save_the_layout(state_dict: Callable, iterator: iterators.EpochBatchIterator) -> dict[str, Any]:
    state = state_dict(iterator)
    return {**state, "layout": epoch_layout(iterator)} if state["iterations_in_epoch"] else state


@_guard(iterators.EpochBatchIterator, "load_state_dict")
def _skip_an_epoch_of_other_batches(
    load: Callable, iterator: iterators.EpochBatchIterator, state: dict[str, Any]
) -> None:
    if state.get("iterations_in_epoch") and state.get("layout") not in (None, epoch_layout(iterator)):
        state = next_epoch(state)
    try:
        load(iterator, state)
    except RuntimeError:  # an older checkpoint has no layout, and its position lies after the epoch's last batch
        load(iterator, next_epoch(state))


@_guard(checkpoint_utils, "load_checkpoint")
def _start_the_next_epoch(load: Callable, cfg: DictConfig, trainer: StudentTrainer, **kwargs: Any) -> tuple[Any, Any]:
    state, epochs = load(cfg, trainer, **kwargs)
    if state is not None and epochs.epoch > state["train_iterator"]["epoch"]:
        left = state["train_iterator"]
        change = layout_change(left.get("layout"), epoch_layout(epochs))
        logger.info(
            f"resume | epoch {left['epoch']} {change}, so training resumes at the start of epoch {epochs.epoch}"
        )
        epochs = trainer.get_train_iterator(epochs.epoch, load_dataset=False, **kwargs)
        metrics.reset_meters("train")
    return state, epochs


@_guard(checkpoint_utils, "load_checkpoint")
def _check_the_start(load: Callable, cfg: DictConfig, trainer: StudentTrainer, **kwargs: Any) -> tuple[Any, Any]:
    preemption.listen()
    if not trainer.checkpoint_suffix:
        _check_where_from(cfg)
    state, epoch_itr = load(cfg, trainer, **kwargs)
    optimization = trainer.cfg.optimization
    if optimization.skip_remainder_batch and len(epoch_itr) < max(optimization.update_freq):
        raise InputError(
            f"optimization.skip_remainder_batch=true leaves out all {len(epoch_itr)} batches of an epoch with"
            f" optimization.update_freq={optimization.update_freq}; set it to false, or lower optimization.update_freq"
        )
    if cfg.no_save_optimizer_state:
        logger.warning("checkpoint.no_save_optimizer_state=true: once this run is stopped, it cannot resume")
    check_depth(trainer.cfg, trainer.get_model(), len(epoch_itr))
    if 0 < trainer.cfg.optimization.max_epoch < epoch_itr.next_epoch_idx:
        trainer.log_depth(epoch_itr.next_epoch_idx)
    return state, epoch_itr


@_guard(checkpoint_utils, "load_checkpoint", always=True)
def _recover_the_newest(load: Callable, cfg: DictConfig, trainer: Trainer, **kwargs: Any) -> tuple[Any, Any]:
    if cfg.restore_file == LAST and not trainer.checkpoint_suffix:
        if trainer.data_parallel_rank == 0:
            recover(cfg.save_dir)
        if trainer.data_parallel_world_size > 1:
            torch.distributed.barrier()  # every process reads the file
    return load(cfg, trainer, **kwargs)


def _check_where_from(cfg: DictConfig) -> None:
    """Refuse a missing checkpoint, for which fairseq would train from the beginning, and contradicting fields."""
    others = [f"checkpoint.{name}=true" for name in map(str, cfg) if name.startswith("reset_") and cfg[name]]
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
    if cfg.restore_file == LAST:  # without this file, a run starts from the files of other fields
        names = [] if PathManager.exists(last) else ["continue_once", "finetune_from_model"]
    for name in names:
        if cfg.get(name) and not PathManager.isfile(cfg[name]):
            raise InputError(f"checkpoint.{name}={cfg[name]} is no file; give the path of a checkpoint")


@_guard(fairseq_train, "train")
def _leave_a_finished_run_alone(
    train: Callable, cfg: DictConfig, trainer: StudentTrainer, task: Any, epoch_itr: Any
) -> tuple[list, bool]:
    finished = 0 < cfg.optimization.max_update <= trainer.get_num_updates()
    losses, should_stop = ([None], True) if finished else train(cfg, trainer, task, epoch_itr)
    next_epoch = epoch_itr.next_epoch_idx
    if should_stop or 0 < cfg.optimization.max_epoch < next_epoch:
        trainer.log_depth(next_epoch)
    return losses, should_stop


@_guard(fairseq_train, "validate_and_save")
def _save_on_sigterm(
    validate_and_save: Callable, cfg: DictConfig, trainer: StudentTrainer, task: Any, epoch_itr: Any, *args: Any
) -> tuple[list, bool]:
    losses, should_stop = validate_and_save(cfg, trainer, task, epoch_itr, *args)
    if getattr(task, "preempted", False) and not should_stop:
        checkpoint_utils.save_checkpoint(cfg.checkpoint, trainer, epoch_itr, None)
        if trainer.data_parallel_world_size > 1:
            torch.distributed.barrier()  # SLURM kills a job once a process has ended, and the first one still saves
        if trainer.is_data_parallel_master:
            logger.warning(
                f"{preemption.received()} ends the run at update {trainer.get_num_updates()}; the same command resumes"
                " it from its last checkpoint"
            )
        preemption.stop()
    return losses, should_stop


@_guard(dataclass_utils, "merge_with_parent", always=True)
def _name_the_field(merge: Callable, dc: Any, cfg: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        return merge(dc, cfg, *args, **kwargs)
    except OmegaConfBaseException as error:
        group, field = cfg._key(), error.full_key or error.key
        name = "" if group is None else f"{group}."
        if isinstance(error, (ConfigKeyError, ConfigAttributeError)):
            known = [each for each in dc.__dataclass_fields__ if not each.startswith("_")]
            similar = difflib.get_close_matches(str(field), known, n=3) or known
            raise InputError(
                f"{name}{field} is no field of {name}_name={cfg.get('_name')}; take it out (~{name}{field} on the"
                f" command line) or choose from {', '.join(similar)}"
            ) from None
        reason = str(error.msg or error).splitlines()[0]
        raise InputError(f"{name}{field}: {reason}; correct the configuration") from None


@_guard(checkpoint_utils, "verify_checkpoint_directory")
def _name_the_folder(verify: Callable, save_dir: str) -> None:
    with input_errors(f"checkpoint.save_dir={save_dir} cannot be written to; choose another folder"):
        verify(save_dir)


@_guard(data_utils, "raise_if_valid_subsets_unintentionally_ignored")
def _name_the_ignored_subsets(check: Callable, cfg: DictConfig) -> None:
    try:
        check(cfg)
    except ValueError as error:
        raise InputError(
            f"task.data={cfg.task.data}: {str(error).split('. ')[0]}; name them in dataset.valid_subset, or set"
            " dataset.combine_valid_subsets=true or dataset.ignore_unused_valid_subsets=true"
        ) from None


@_guard(iterators, "_chunk_iterator")
def _time_the_wait(groups: Callable[..., Iterable], *args: Any) -> Iterator:
    return progress.timed(groups(*args))


@_guard(checkpoint_utils, "load_checkpoint_to_cpu", always=True)
def _load_what_is_safe_and_fits(load: Callable, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    local_path = PathManager.get_local_path(path)
    if os.path.isfile(local_path):
        load_checkpoint(local_path, header_only=True, harmless_only=True)
    trainer = StudentTrainer.loading
    if trainer is None:
        return load(path, *args, **kwargs)
    saved = trainer.saved_configuration(path, local_path)
    return trainer.fitted(path, saved, load(path, *args, **kwargs))


@_guard(checkpoint_utils, "load_ema_from_checkpoint", always=True)
def _unpickle_only_what_is_safe(load: Callable, path: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    if os.path.isfile(path):
        load_checkpoint(path, header_only=True, harmless_only=True)
    return load(path, *args, **kwargs)


@_guard(iterators.EpochBatchIterator, "_get_iterator_for_epoch", always=True)
def _end_workers_with_their_epoch(get_iterator: Callable, epochs: Any, *args: Any, **kwargs: Any) -> Any:
    if hasattr(epochs, "persistent_workers"):
        epochs.persistent_workers = False
        return get_iterator(epochs, *args, **kwargs)
    loader = torch.utils.data.DataLoader  # of which fairseq 0.12.2 asks for persistent workers
    torch.utils.data.DataLoader = lambda *given, **options: loader(*given, **{**options, "persistent_workers": False})
    try:
        return get_iterator(epochs, *args, **kwargs)
    finally:
        torch.utils.data.DataLoader = loader
