import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

# Read and not imported, which would need torch.
INIT = Path(__file__).resolve().parent / "fairseq_stack" / "__init__.py"
VERSION = re.search(r'^__version__ = "(.+)"$', INIT.read_text(), re.MULTILINE)[1]

# espnet-s3prl is the s3prl that is kept up. Its omegaconf excludes fairseq 0.12.2, the fairseq of Python 3.10.
S3PRL = 'espnet-s3prl==2026.5.14; python_version >= "3.11"'
TRAIN = [
    # ve-fairseq follows fairseq's main branch and has wheels for Python 3.11 and later;
    # the last official release works up to 3.10 and predates numpy 2.
    'fairseq==0.12.2; python_version < "3.11"',
    've-fairseq==0.12.3; python_version >= "3.11"',
    'numpy<2; python_version < "3.11"',
    "tensorboard",
    "scikit-learn",  # the clusters of stored codes, and those that the demo's teacher learns
]
ONNX = ["onnx", "onnxruntime"]
FINETUNING = [
    "transformers>=4.46",  # whose Trainer has processing_class
    "accelerate",
    "editdistance",  # the word errors of fairseq's CTC loss
]
# Starts jobs on a SLURM cluster; its version for fairseq 0.12.2's hydra is another.
SLURM = ['hydra-submitit-launcher>=1.2; python_version >= "3.11"']
# What s3prl's problems import and espnet-s3prl does not ask for; dcase_util imports setuptools' old pkg_resources.
SUPERB = [
    f'{package}; python_version >= "3.11"'
    for package in ("pandas", "librosa", "editdistance", "sed_eval", "dcase_util", "more-itertools", "setuptools<81")
]
LINT = ["ruff==0.17.6", "pyright[nodejs]==1.1.414"]

setup(
    name="fairseq_stack",
    version=VERSION,
    description="Fast distillation of speech foundation models by interleaved stacking, for fairseq",
    license="MIT",
    # hydra looks for plugins in the folders of the namespace package hydra_plugins. Named like this, an editable
    # install puts this folder on the path; otherwise it leaves a finder there, which has no folders to look into.
    package_dir={"": "."},
    packages=find_namespace_packages(
        include=["fairseq_stack", "fairseq_stack.*", "hydra_plugins.*"], exclude=["fairseq_stack.examples*"]
    ),
    # fairseq_stack/examples is a link to examples/, so that the recipes are installed with the package.
    package_data={
        "fairseq_stack": ["py.typed", "examples/*/*.yaml", "examples/*/*/*.yaml"],
        "fairseq_stack.analysis": ["*.jinja"],
    },
    python_requires=">=3.10",
    # To export a student, to use and to evaluate it. Training needs fairseq, which is in [train].
    install_requires=[
        "numpy",
        "torch>=2.4",
        "torchaudio>=2.4",
        "soundfile",
        "scipy",
        "tqdm",
        "transformers>=4.44",
        "safetensors",
        "sentencepiece",
        "matplotlib",
        "pyyaml",
        "jinja2",
        S3PRL,
    ],
    entry_points={"console_scripts": ["fairseq-stack = fairseq_stack.cli:main"]},
    extras_require={
        "train": TRAIN,
        "onnx": ONNX,
        "finetuning": FINETUNING,
        "slurm": SLURM,
        "superb": SUPERB,
        "test": ["pytest", "pytest-xdist", *FINETUNING, *TRAIN, *ONNX, *SLURM, *SUPERB, *LINT],
    },
)
