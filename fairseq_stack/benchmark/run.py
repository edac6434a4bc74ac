"""The benchmark as a whole: check what is asked for, measure or bound it, and make tables."""

import importlib.util
import json
import logging
import platform
from dataclasses import asdict

import torch

from fairseq_stack.benchmark.inputs import teacher_shape
from fairseq_stack.benchmark.measure import measure
from fairseq_stack.benchmark.roofline import named_gpu, roofline_tables, rooflines
from fairseq_stack.benchmark.tables import benchmark_tables
from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.errors import InputError, check_output, check_positive
from fairseq_stack.files import write_whole
from fairseq_stack.models.conv_geometry import parse_conv_layers, receptive_field


def run(recipes, size, batch, seconds, rounds, precisions, baselines, device, threads, gpu=None, output=None):
    """Measure updates, or with `gpu` bound their time without one; returns the tables as Markdown.

    Args:
        recipes, size, rounds, precisions, baselines: see measure.
        batch, seconds: see measure; None for 4 utterances of 8 s, with `gpu` 64 of 12 s.
        device: cpu, cuda, or None for the GPU where there is one.
        threads: of each training, on a CPU; None for torch's.
        gpu: see named_gpu.
        output: path of a JSON file for all figures, or None.

    Raises:
        InputError: a value cannot be measured; the message names the option of `fairseq-stack benchmark`.
    """
    batch = batch if batch is not None else 64 if gpu else 4
    seconds = seconds if seconds is not None else 12.0 if gpu else 8.0
    threads = torch.get_num_threads() if threads is None else threads
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check(batch, seconds, rounds, precisions, baselines, None if gpu else device, threads, output, size)
    shared = {"size": size, "batch": batch, "seconds": seconds, "precisions": precisions, "baselines": baselines}
    if gpu:
        gpu = named_gpu(gpu)
        logging.disable(logging.WARNING)
        result = {"cases": rooflines(recipes, gpu=gpu, **shared), "gpu": asdict(gpu), **shared}
        text = roofline_tables(result["cases"], size, batch)
    else:
        given = {**shared, "rounds": rounds, "device": device, "threads": threads}
        result = {**measure(recipes, **given), "torch": torch.__version__, "machine": platform.machine(), **given}
        text = benchmark_tables(result)
    if output:
        write_whole(output, json.dumps(result, indent=2), f"--output {output}")
    return text


def check(batch, seconds, rounds, precisions, baselines, device, threads, output, size):
    """Raise an InputError unless the options' values can be measured; a `device` of None is a pretended one."""
    for option, value in (("--batch", batch), ("--seconds", seconds), ("--rounds", rounds), ("--threads", threads)):
        check_positive(option, value)
    frame = receptive_field(parse_conv_layers(teacher_shape(size)["conv_feature_layers"]))
    if round(seconds * SAMPLE_RATE) < frame:
        raise InputError(f"--seconds {seconds} is shorter than a frame; give {frame / SAMPLE_RATE} or more")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU that it can use; give --device cpu")
    if device == "cpu" and "fp16" in precisions:
        raise InputError("--precision fp16 needs a GPU; give fp32 or bf16")
    if "s3prl" in baselines and importlib.util.find_spec("s3prl") is None:
        raise InputError(
            "--baseline s3prl: s3prl is not installed; leave it out, or install what constraints.txt names"
        )
    if output:
        check_output("--output", output)
