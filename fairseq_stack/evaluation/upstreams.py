"""The probed models as s3prl's upstreams: exported students, a random student, the teacher and log-mel.

s3prl calls a frozen model an upstream. It maps waveforms to hidden states 0 to N. A probe learns a weight for each.
"""

import hashlib
import json
import math
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn as nn
from s3prl.nn import S3PRLUpstream
from s3prl.upstream.hubert.convert import merge_with_parent
from s3prl.upstream.hubert.hubert_model import (
    HubertConfig,
    HubertModel,
    HubertPretrainingConfig,
)
from torch import Tensor

from fairseq_stack.analysis.hidden_states import check_export
from fairseq_stack.errors import InputError, input_errors
from fairseq_stack.teachers import load_teacher

SAMPLES_PER_FRAME = 320  # of every HuBERT that s3prl loads


def load_export(path: str | Path) -> Any:
    """Returns a student that fairseq-stack export wrote, in eval mode: an OnnxUpstream or an S3PRLUpstream.

    Args:
        path: the folder of `--to huggingface`, or the file of `--to s3prl`, `--to s3prl-distiller` or `--to onnx`.

    Raises:
        InputError: the path is no such export, cannot be loaded without running code from it, or is an ONNX file
            without hidden states to probe.
    """
    path = Path(path)
    if is_onnx(path):
        upstream = OnnxUpstream(path)
        if upstream.output == "logits":
            raise InputError(f"{path} is fine-tuned, and probes need hidden states; give the export of the student")
        if upstream.output == "weighted_sum":
            raise InputError(f"{path} has a weighted sum alone, and probes learn the weights; export all hidden states")
        return upstream
    if path.is_dir():
        check_export(path)
        upstream = _load("hf_hubert_custom", path)
        hop = math.prod(upstream.upstream.model.config.conv_stride)
        if hop != SAMPLES_PER_FRAME:
            raise InputError(
                f"{path} makes a frame of {hop} samples, but s3prl supports only {SAMPLES_PER_FRAME}; probe a student"
                " with such frames"
            )
        return upstream
    return _load("hubert_local" if "model_weight" in _read(path) else "distiller_local", path)


def is_onnx(path: str | Path) -> bool:
    """Whether an export is an ONNX file, by its name."""
    return Path(path).suffix == ".onnx"


def load_random(path: str | Path, seed: int = 1) -> S3PRLUpstream:
    """Returns a model of an export's shape with random initial weights, in eval mode.

    Args:
        path: see load_export; no ONNX file.
        seed: of the weights.
    """
    upstream = load_export(path)
    expert: Any = upstream.upstream
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        if Path(path).is_dir():
            model, fresh = expert.model, type(expert.model)(expert.model.config)
        elif isinstance(expert.model, HubertModel):
            state = _read(path)
            shape = merge_with_parent(HubertConfig, state["model_cfg"])
            task = merge_with_parent(HubertPretrainingConfig, state["task_cfg"])
            model, fresh = expert.model, HubertModel(shape, task, state["dictionaries_symbols"])
        else:
            # Imported here, because it needs distutils, which Python 3.12 has only with setuptools.
            from s3prl.upstream.distiller.model import DistillerModel

            with redirect_stdout(sys.stderr):
                model, fresh = expert.model.model, DistillerModel(expert.model.model_config)
    # s3prl has registered hooks on these modules, so the modules stay and only their weights are replaced.
    model.load_state_dict(fresh.state_dict())
    return upstream


def load_log_mel(normalized: bool = False) -> S3PRLUpstream:
    """Returns 80 log-mel filters with their first and second differences, every 10 ms: s3prl's `fbank_no_cmvn`.

    Args:
        normalized: normalise the mean and variance of every utterance: s3prl's `fbank`, the row FBANK of SUPERB's
            tables. A probe on the mean over time then gets little of the long-term spectrum.
    """
    return S3PRLUpstream("fbank" if normalized else "fbank_no_cmvn").eval()


class OnnxUpstream(nn.Module):
    """A student in an ONNX file, with the interface of S3PRLUpstream. onnxruntime has as many threads as torch.

    Logits of a fine-tuned student, or a weighted sum with equal weights, take the place of the hidden states.

    Args:
        path: the file of `--to onnx`.

    Attributes:
        output: name of the file's first output.

    Raises:
        InputError: onnxruntime is not installed, or the file is none of fairseq-stack's.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        try:
            import onnxruntime
        except ImportError as error:
            raise InputError(f"{path}: onnxruntime cannot be imported ({error}); pip install onnxruntime") from None
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with input_errors(f"{path} cannot be loaded by onnxruntime; give what fairseq-stack export --to onnx wrote"):
            self.session = onnxruntime.InferenceSession(os.fspath(path), options, providers=["CPUExecutionProvider"])
            facts = self.session.get_modelmeta().custom_metadata_map
            width, hop, self.parameter_count = (
                int(facts[name]) for name in ("width", "samples_per_frame", "parameters")
            )
        outputs, inputs = self.session.get_outputs(), self.session.get_inputs()
        self.output = outputs[0].name
        self.layer_weights = {
            one.name: np.full(one.shape, 1 / one.shape[0], np.float32) for one in inputs if one.name == "layer_weights"
        }
        self.num_layers = len(outputs) - 1
        self.hidden_sizes, self.downsample_rates = [width] * self.num_layers, [hop] * self.num_layers

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Maps waveforms [B, S] and their samples [B] to hidden states [B, T, D] and their frames [B]."""
        inputs = {"waveforms": waveforms.numpy(), "lengths": lengths.numpy(), **self.layer_weights}
        outputs = self.session.run(None, inputs)
        *states, frames = map(torch.from_numpy, outputs)
        return states, [frames] * self.num_layers


class TeacherUpstream(nn.Module):
    """A teacher with the interface of S3PRLUpstream.

    Args:
        path: see load_teacher. A fairseq checkpoint needs fairseq.
    """

    def __init__(self, path: str | Path):
        super().__init__()
        self.teacher = load_teacher(path)
        self.model = self.teacher.model
        self.num_layers = self.teacher.depth + 1
        self.hidden_sizes = [self.teacher.width] * self.num_layers
        self.downsample_rates = [SAMPLES_PER_FRAME] * self.num_layers

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Maps waveforms [B, S] and their samples [B] to N + 1 hidden states [B, T, D] and their frames [B]."""
        states = self.teacher.hidden_states(waveforms, lengths, range(self.num_layers))
        frames = torch.tensor([self.teacher.frames(samples) for samples in lengths.tolist()])
        return list(states.values()), [frames] * self.num_layers


def files_digest(path: str | Path) -> str:
    """Returns the SHA-256 of a file, or of the files directly in a folder, in hexadecimal digits."""
    path, digest = Path(path), hashlib.sha256()
    if not path.exists():
        raise InputError(f"{path} does not exist; give what fairseq-stack export wrote, or a teacher")
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.name} {file.stat().st_size}\n".encode("utf-8", "surrogateescape"))
            with open(file, "rb") as opened:
                for block in iter(lambda: opened.read(1 << 20), b""):
                    digest.update(block)
    return digest.hexdigest()


def _load(name, path):
    try:
        with redirect_stdout(sys.stderr):  # s3prl's distiller prints its shape
            upstream = S3PRLUpstream(name, os.fspath(path)).eval()
    except (OSError, ValueError, KeyError, RuntimeError, json.JSONDecodeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} cannot be loaded by s3prl ({reason}); export the student again") from None
    if len(set(upstream.hidden_sizes)) > 1:
        raise InputError(
            f"{path} has predictions and hidden states of different widths, which s3prl cannot add in one"
            " weighted sum; export it with --to huggingface"
        )
    return upstream


def _read(path):
    """The content of a file for s3prl. s3prl itself would unpickle anything."""
    if not path.is_file():
        raise InputError(f"{path} does not exist; give what fairseq-stack export wrote")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch's errors for a damaged file have no common class
        state = None
    if not isinstance(state, dict) or not {"model_weight", "Distiller"} & state.keys():
        raise InputError(
            f"{path} is no export for s3prl; give what fairseq-stack export made with --to huggingface,"
            " s3prl or s3prl-distiller, or an ONNX file whose name ends in .onnx"
        )
    return state
