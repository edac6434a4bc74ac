from setuptools import find_namespace_packages, setup

ONNX = ["onnx", "onnxruntime"]
# Starts jobs on a SLURM cluster; its version for fairseq 0.12.2's hydra is another.
SUBMITIT = ['hydra-submitit-launcher>=1.2; python_version >= "3.11"']
# What s3prl's problems import and espnet-s3prl does not ask for; dcase_util imports setuptools' old pkg_resources. There is no s3prl below Python 3.11, see below.
SUPERB = [
    f'{package}; python_version >= "3.11"'
    for package in ("pandas", "librosa", "editdistance", "sed_eval", "dcase_util", "more-itertools", "setuptools<81")
]

setup(
    name="fairseq_stack",
    version="0.1.0",
    description="Fast distillation of speech foundation models by interleaved stacking, for fairseq",
    license="MIT",
    # hydra looks for plugins in the folders of the namespace package hydra_plugins. Named like this, an editable install
    # puts this folder on the path; otherwise it leaves a finder there, which has no folders to look into.
    package_dir={"": "."},
    packages=find_namespace_packages(
        include=["fairseq_stack", "fairseq_stack.*", "hydra_plugins.*"], exclude=["fairseq_stack.examples*"]
    ),
    # fairseq_stack/examples is a link to examples/, so that the recipes are installed with the package.
    package_data={"fairseq_stack": ["examples/*/*.yaml", "examples/*/*/*.yaml"]},
    python_requires=">=3.9",
    install_requires=[
        # ve-fairseq follows fairseq's main branch and has wheels for Python 3.11 and later;
        # the last official release works up to 3.10 and predates numpy 2.
        'fairseq==0.12.2; python_version < "3.11"',
        've-fairseq==0.12.3; python_version >= "3.11"',
        'numpy<2; python_version < "3.11"',
        'numpy; python_version >= "3.11"',
        "torch>=2.4",
        "torchaudio>=2.4",
        "soundfile",
        "tqdm",
        "sentencepiece",
        "transformers>=4.44",
        "safetensors",
        "scikit-learn",
        "scipy",
        "tensorboard",
        "matplotlib",
        "pyyaml",
        # espnet-s3prl is the s3prl that is kept up; its omegaconf excludes fairseq 0.12.2.
        'espnet-s3prl==2026.5.14; python_version >= "3.11"',
    ],
    entry_points={"console_scripts": ["fairseq-stack = fairseq_stack.cli:main"]},
    extras_require={
        "onnx": ONNX,
        "slurm": SUBMITIT,
        "superb": SUPERB,
        # fairseq's CTC loss, for fine-tuning, computes word errors with editdistance.
        "test": ["pytest", "pytest-xdist", "editdistance", *ONNX, *SUBMITIT, *SUPERB],
    },
)
