"""Importing the package changes nothing; the command line and `register()` work after any import order."""

import subprocess
import sys

import pytest
from conftest import S3PRL_FITS
from training import ROOT

PARTS = [
    "fairseq_stack",
    *sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in (ROOT / "fairseq_stack").rglob("*.py")
        if path.name not in ("__init__.py", "__main__.py", "guards.py", "registration.py")
    ),
]

# What fairseq has before: its registries, and every function and class of the modules that guards.py replaces some of.
SNAPSHOT = """
import importlib
MODULES = ["fairseq.checkpoint_utils", "fairseq.data.data_utils", "fairseq.data.iterators", "fairseq.dataclass.utils",
           "fairseq.distributed.utils", "fairseq.file_io", "fairseq.models.ema", "fairseq.optim", "fairseq.trainer",
           "fairseq.utils", "fairseq_cli.train", "fairseq_cli.hydra_train"]

def snapshot():
    seen = {}
    for module in map(importlib.import_module, MODULES):
        for name, value in vars(module).items():
            seen[module.__name__, name] = value
            if isinstance(value, type):
                seen.update({(module.__name__, name, each): member for each, member in vars(value).items()})
    return seen

def registered():
    from fairseq.models import MODEL_REGISTRY
    from fairseq.registry import REGISTRIES
    from fairseq.tasks import TASK_REGISTRY
    return set(TASK_REGISTRY), set(MODEL_REGISTRY), set(REGISTRIES["criterion"]["registry"])
"""


# Where s3prl and fairseq exclude each other, the modules that build on s3prl cannot be imported.
IMPORT_ALL = f"""
for part in {PARTS!r}:
    try:
        importlib.import_module(part)
    except ModuleNotFoundError as error:
        assert error.name.split(".")[0] == "s3prl" and not {S3PRL_FITS}, (part, error)
"""


def python(*lines):
    """Run lines in a process of its own; returns what they print."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "\n".join([SNAPSHOT, *lines])], capture_output=True, text=True, cwd="/"
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_no_part_of_the_package_registers_or_replaces_anything():
    python(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})",
        "functions, names = snapshot(), registered()",
        IMPORT_ALL,
        "after = snapshot()",
        "changed = [key for key in functions if after[key] is not functions[key]]",
        "assert not changed and registered() == names, (changed, registered())",
    )


ORDERS = {
    "the package first": "import fairseq_stack.growth.plan, fairseq_stack.export.verify",
    "fairseq first": "import fairseq.models, fairseq.tasks, fairseq_stack.models.stacked_hubert",
    "registered before": "import fairseq_stack; fairseq_stack.register(); fairseq_stack.register()",
}


@pytest.mark.parametrize("order", ORDERS)
def test_the_command_line_knows_the_task_after_any_import(order, tmp_path):
    (tmp_path / "link").symlink_to(ROOT)
    user_dir = tmp_path / "link/fairseq_stack" if order == "registered before" else ROOT / "fairseq_stack"
    python(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})",
        ORDERS[order],
        "from fairseq import options",
        f"sys.argv = ['fairseq-train', 'data', '--user-dir', {str(user_dir)!r},"
        " '--task', 'speech_distillation', '--arch', 'stacked_hubert', '--criterion', 'layer_distillation', '--stack-method', 'none']",
        "args = options.parse_args_and_arch(options.get_training_parser(), sys.argv[1:])",
        "assert args.stack_method == 'none' and args.teacher_layers == [4, 8, 12]",
    )


def test_a_program_registers_by_calling_register():
    python(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})",
        "import fairseq_stack",
        "assert 'fairseq' not in sys.modules",
        "fairseq_stack.register()",
        "tasks, models, criterions = registered()",
        "assert 'speech_distillation' in tasks and 'stacked_hubert' in models and 'layer_distillation' in criterions",
    )
