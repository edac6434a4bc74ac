"""Runs the benchmark: checks the options, measures or bounds the updates, and makes tables."""

import importlib.util
import json
import logging
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from fairseq_stack.benchmark.inputs import teacher_shape
from fairseq_stack.benchmark.measure import cases_of, measure
from fairseq_stack.benchmark.ours import LIVE
from fairseq_stack.benchmark.roofline import named_gpu, roofline_tables, rooflines
from fairseq_stack.benchmark.tables import benchmark_tables
from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.errors import InputError, check_output, check_positive
from fairseq_stack.files import write_whole
from fairseq_stack.models.conv_geometry import parse_conv_layers, receptive_field
from fairseq_stack.targets.formats import check_format


def run(
    recipes: Path,
    size: str,
    batch: int | None,
    seconds: float | None,
    rounds: int,
    precisions: Sequence[str],
    targets: Sequence[str],
    cnns: Sequence[str],
    formats: Sequence[str],
    baselines: Sequence[str],
    device: str | None,
    threads: int | None,
    gpu: str | None = None,
    output: str | None = None,
) -> str:
    """Measures updates, or with `gpu` computes a lower bound of their time, and returns the tables as Markdown.

    Args:
        recipes, size, rounds, baselines: see measure.
        precisions: of our students, fp32, bf16 or fp16; without any, only the baselines are measured.
        targets: live, stored or both.
        cnns: trained, shared or both.
        formats: of stored targets.
        batch, seconds: see measure; None for 4 utterances of 8 s, or with `gpu` for 64 of 12 s.
        device: cpu or cuda; None for cuda if there is a GPU, else cpu.
        threads: of each training, on a CPU; None for torch's default.
        gpu: the GPU to bound the time for, see named_gpu; it need not be in this machine.
        output: path of a JSON file for all figures, or None.

    Raises:
        InputError: a value cannot be measured; the message names the option of `fairseq-stack benchmark`.
    """
    batch = batch if batch is not None else 64 if gpu else 4
    seconds = seconds if seconds is not None else 12.0 if gpu else 8.0
    threads = torch.get_num_threads() if threads is None else threads
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    check(batch, seconds, rounds, precisions, formats, baselines, None if gpu else device, threads, output, size)
    shared = {"size": size, "batch": batch, "seconds": seconds, "baselines": baselines}
    sources = [source for kind in targets for source in ((LIVE,) if kind == LIVE else formats)]
    cases = cases_of(precisions, cnns, sources)
    if gpu:
        bounded = named_gpu(gpu)
        logging.disable(logging.WARNING)
        result = {"cases": rooflines(recipes, gpu=bounded, cases=cases, **shared), "gpu": asdict(bounded), **shared}
        text = roofline_tables(result["cases"], size, batch)
    else:
        given = {**shared, "rounds": rounds, "device": device, "threads": threads}
        measured = measure(recipes, cases=cases, **given)
        result = {**measured, "torch": torch.__version__, "machine": platform.machine(), **given}
        text = benchmark_tables(result)
    if output:
        write_whole(output, json.dumps(result, indent=2), f"--output {output}")
    return text


def check(
    batch: int,
    seconds: float,
    rounds: int,
    precisions: Sequence[str],
    formats: Sequence[str],
    baselines: Sequence[str],
    device: str | None,
    threads: int,
    output: str | None,
    size: str,
) -> None:
    """Raises an InputError unless updates can be measured with these options; a `device` of None is a pretended one."""
    for option, value in (("--batch", batch), ("--seconds", seconds), ("--rounds", rounds), ("--threads", threads)):
        check_positive(option, value)
    frame = receptive_field(parse_conv_layers(teacher_shape(size)["conv_feature_layers"]))
    if round(seconds * SAMPLE_RATE) < frame:
        raise InputError(f"--seconds {seconds} is shorter than a frame; give {frame / SAMPLE_RATE} or more")
    if not (precisions or baselines):
        raise InputError("--precision without a precision leaves nothing to measure; name one, or a --baseline")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no GPU that it can use; give --device cpu")
    if device == "cpu" and "fp16" in precisions:
        raise InputError("--precision fp16 needs a GPU; give fp32 or bf16")
    for form in formats:
        try:
            check_format(form)
        except InputError as error:
            raise InputError(str(error).replace("task.target_format=", "--target-format ")) from None
    if "s3prl" in baselines and importlib.util.find_spec("s3prl") is None:
        raise InputError(
            "--baseline s3prl: s3prl is not installed; leave it out, or install what constraints.txt names"
        )
    if output:
        check_output("--output", output)
