"""Run fairseq's real training in tests: in this process, or as the command that users type."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

from conftest import TINY

import fairseq_stack
from fairseq_stack.errors import one_line_errors
from fairseq_stack.targets.shards import ROW

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def tiny(speech, teacher_file, run_dir, **overrides):
    """Hydra overrides that make a recipe small enough for a test, and nothing else."""
    fields = {
        "task.data": speech,
        "task.teacher": teacher_file,
        "checkpoint.save_dir": f"{run_dir}/checkpoints",
        "common.tensorboard_logdir": f"{run_dir}/tensorboard",
        "common.fp16": False,
        "common.log_interval": 1,
        "dataset.batch_size": 4,
        "dataset.num_workers": 0,
        "optimization.max_update": 20,
        "lr_scheduler.warmup_updates": 2,
        **{f"model.{name}": value for name, value in TINY.items() if name != "encoder_layers"},
        **overrides,
    }
    return [f"{name}={_quoted(value)}" for name, value in fields.items()]


def stored_entries(folder):
    """The number of entries in the stores below a folder."""
    return sum(path.stat().st_size for path in Path(folder).rglob("*.index")) // ROW.itemsize


def _quoted(value):
    return f'"{value}"' if isinstance(value, str) and value.startswith("[(") else value


def train(config, overrides, folder="interleaved"):
    """Compose a recipe and train it in this process, as fairseq-hydra-train does; returns fairseq's trainer."""
    return one_line_errors(lambda: train_configuration(configuration(config, overrides, folder)))()


def train_configuration(cfg):
    """Train a configuration that `configuration` made; returns fairseq's trainer."""
    from fairseq.logging import progress_bar
    from fairseq.trainer import Trainer

    trainers, start = [], Trainer.__init__

    def remembered(self, *args, **kwargs):
        start(self, *args, **kwargs)
        trainers.append(self)

    try:
        with mock.patch.object(Trainer, "__init__", remembered):
            run_training(cfg)
    finally:
        progress_bar._close_writers()  # as at the end of a process
    return trainers[0]


def run_training(cfg):
    """Train as fairseq's command lines do, once they have a whole configuration."""
    from fairseq.distributed import utils as distributed_utils
    from fairseq_cli import train as fairseq_train

    one_line_errors(distributed_utils.call_main)(cfg, fairseq_train.main)


def configuration(config, overrides, folder="interleaved"):
    """The configuration of a training, as fairseq-hydra-train makes it of a recipe."""
    from fairseq.dataclass.initialize import hydra_init

    fairseq_stack.register()
    hydra_init(config)
    return completed(composed(config, [*overrides, f"common.user_dir={ROOT}/fairseq_stack"], folder))


def completed(cfg):
    """A composed configuration with all defaults, as fairseq-hydra-train hands it to the training."""
    from fairseq_cli import train as fairseq_train
    from omegaconf import OmegaConf

    fairseq_train.add_defaults(cfg)
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    OmegaConf.set_struct(cfg, True)
    return cfg


def composed(config, overrides, folder="interleaved", **options):
    """A recipe of examples/ as hydra composes it."""
    try:
        from hydra import compose, initialize_config_dir
    except ImportError:  # hydra 1.0, beside fairseq 0.12.2
        from hydra.experimental import compose, initialize_config_dir

    with initialize_config_dir(config_dir=str(EXAMPLES / folder)):
        return compose(config_name=config, overrides=overrides, **options)


def command(program, *arguments, cwd=ROOT, **options):
    """Start one of fairseq's commands, or python for a script, as a user would type it."""
    return subprocess.Popen(
        [str(Path(sys.executable).with_name(program)), *map(str, arguments)],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def hydra_train(config, overrides, config_dir="examples/interleaved", **options):
    """Start `fairseq-hydra-train` on a recipe."""
    return command("fairseq-hydra-train", "--config-dir", config_dir, "--config-name", config, *overrides, **options)
