"""Measure where the time of an update goes at each stage, and what stacking saves of it.

The stages are measured in turn within one run, round after round, and medians are taken, so that what
the machine does meanwhile falls on all alike. Weights and waveforms are random: they do not change the time.
"""

import argparse
import json
import resource
import statistics
import time
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from fairseq import optim
from omegaconf import OmegaConf

from fairseq_stack.criterions.layer_distillation import (
    LayerDistillation,
    LayerDistillationConfig,
)
from fairseq_stack.data.audio import SAMPLE_RATE
from fairseq_stack.errors import one_line_errors
from fairseq_stack.growth.plan import plan_growth
from fairseq_stack.growth.schedule import stage_starts
from fairseq_stack.growth.surgery import copy_optimizer_state
from fairseq_stack.models.hubert_encoder import HubertEncoder
from fairseq_stack.models.stacked_hubert import StackedHubert, StackedHubertConfig
from fairseq_stack.teachers.fairseq_checkpoint import BASE_SHAPE, FairseqTeacher

PARTS = ("teacher", "student CNN", "student transformer", "backward", "optimiser")
SIZES = {
    # HuBERT Base into the paper's student.
    "paper": ({}, {}),
    # The demo's teacher and student.
    "demo": (
        {
            "encoder_embed_dim": 128,
            "encoder_ffn_embed_dim": 512,
            "encoder_attention_heads": 4,
            "conv_feature_layers": "[(64,10,5)] + [(64,3,2)] * 2 + [(128,3,2)] * 2 + [(128,2,2)] * 2",
        },
        {
            "encoder_embed_dim": 96,
            "encoder_ffn_embed_dim": 384,
            "encoder_attention_heads": 4,
            "conv_feature_layers": "[(48,10,5)] + [(48,3,2)] * 2 + [(96,3,2)] * 2 + [(96,2,2)] * 2",
        },
    ),
}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@one_line_errors
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="paper", help="shapes of teacher and student")
    parser.add_argument("--batch", type=int, default=4, help="utterances of an update")
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each utterance")
    parser.add_argument("--rounds", type=int, default=5, help="updates measured at each stage")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="the student's; the teacher is fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--output", help="write the figures to this JSON file too")
    result = measure(parser.parse_args())
    print(table(result))


def measure(arguments):
    """Time every stage and return the figures as plain values, in seconds."""
    run = Run(arguments)
    rounds = {depth: [] for depth in run.plan.depths}
    growths = []
    for number in range(arguments.rounds + 1):
        run.student.shrink()
        for depth in run.plan.depths:
            if run.student.depth < depth:
                growths.append(run.grow())
            spent = run.update()
            if number:  # the first round warms up
                rounds[depth].append(spent)
    stages = {
        depth: {part: statistics.median(spent[part] for spent in all_spent) for part in PARTS}
        for depth, all_spent in rounds.items()
    }
    totals = {depth: statistics.median(sum(spent.values()) for spent in rounds[depth]) for depth in rounds}
    result = {
        "size": arguments.size,
        "batch": arguments.batch,
        "seconds": arguments.seconds,
        "precision": arguments.precision,
        "device": arguments.device,
        "weights": "random",
        "stages": stages,
        "update": totals,
        "audio_hours_per_hour": {depth: arguments.batch * arguments.seconds / total for depth, total in totals.items()},
        "growth": max(growths),
        "speed_up": speed_ups(totals),
        "peak_memory_bytes": peak_memory(arguments.device),
    }
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=2)
    return result


class Run:
    """Teacher, student, criterion and optimiser as a training has them, and a batch."""

    def __init__(self, arguments):
        teacher_shape, student_shape = SIZES[arguments.size]
        self.device = torch.device(arguments.device)
        torch.manual_seed(0)
        self.teacher = random_teacher(teacher_shape)
        linked = {"loss": "mse", "teacher_layers": [4, 8, 12], "intermediate_style": "layer_to_layer",
                  "output_weight": 1.0, "mask_prob": 0.0, "normalize": False, "max_update": 1000}  # fmt: skip
        cfg = OmegaConf.merge(OmegaConf.structured(StackedHubertConfig), linked, student_shape)
        task = SimpleNamespace(teacher=self.teacher)
        self.student = ShrinkingStudent.build_model(cfg, task).to(self.device).train()
        self.plan = plan_growth(cfg.stack_method, cfg.encoder_layers, cfg.stack_stages)
        self.criterion = LayerDistillation.build_criterion(OmegaConf.structured(LayerDistillationConfig), task)
        adam = {"_name": "adam", "adam_betas": "(0.9, 0.98)", "adam_eps": 1e-6, "weight_decay": 1e-4, "lr": [5e-4],
                "use_old_adam": False, "fp16_adam_stats": False, "tpu": False}  # fmt: skip
        self.optimizer = optim.build_optimizer(OmegaConf.create(adam), list(self.student.parameters()))
        self.autocast = torch.autocast(
            self.device.type, dtype=PRECISIONS[arguments.precision], enabled=arguments.precision != "fp32"
        )
        samples = round(arguments.seconds * SAMPLE_RATE)
        self.waveforms = torch.randn(arguments.batch, samples, device=self.device)
        self.lengths = torch.full((arguments.batch,), samples, device=self.device)
        self.spent = {}

    def update(self):
        """One update; returns {part: seconds}."""
        self.spent = {part: 0.0 for part in PARTS}
        with self.clock("teacher"):
            targets = self.teacher.hidden_states(self.waveforms, self.lengths, self.criterion.target_layers)
        with self.autocast:
            with self.clock("student CNN"):
                features = self.student.features(self.waveforms, self.lengths)
            sample = {"waveforms": self.waveforms, "lengths": self.lengths, "targets": targets, "features": features}
            with self.clock("student transformer"):
                loss, sample_size, _ = self.criterion(self.student, sample)
        with self.clock("backward"):
            self.optimizer.backward(loss / sample_size)
        with self.clock("optimiser"):
            self.optimizer.step()
            self.optimizer.zero_grad()
        return self.spent

    def grow(self):
        """The next growth; returns its seconds."""
        with self.clock("growth"):
            self.student.grow_to(self.student.stage_number + 1)
            copy_optimizer_state(self.optimizer, self.student.finish_growth(), "copy")
        return self.spent.pop("growth")

    @contextmanager
    def clock(self, part):
        self.synchronize()
        begin = time.perf_counter()
        yield
        self.synchronize()
        self.spent[part] = time.perf_counter() - begin

    def synchronize(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()


class ShrinkingStudent(StackedHubert):
    """A student that can go back to its first stage, so that the stages can be measured in turn."""

    def shrink(self):
        self._stage_index = 0
        self.stage.zero_()


def random_teacher(shape):
    cfg = {"_name": "hubert", **BASE_SHAPE, **shape}
    untrained = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "dropout_input": 0.0}
    weights = HubertEncoder(SimpleNamespace(**cfg, **untrained, feature_grad_mult=1.0)).state_dict()
    return FairseqTeacher("random weights", cfg, False, weights)


def speed_ups(totals):
    """{schedule: (measured, arithmetic limit)} against training all updates at full depth.

    The limit is reached if an update costs in proportion to the student's layers and nothing else.
    """
    depths, updates = list(totals), 10_000
    found = {}
    for name in ("equal", "prop"):
        starts = [*stage_starts(name, len(depths), updates), updates]
        share = {depth: (end - begin) / updates for depth, begin, end in zip(depths, starts, starts[1:])}
        full = totals[depths[-1]]
        measured = full / sum(share[depth] * totals[depth] for depth in depths)
        limit = depths[-1] / sum(share[depth] * depth for depth in depths)
        found[name] = (measured, limit)
    return found


def peak_memory(device):
    """Bytes: of the GPU, or of the process."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(result):
    """The figures as text."""
    lines = [
        f"{result['size']} sizes, {result['batch']} x {result['seconds']:g} s, {result['precision']},"
        f" {result['device']}, {result['weights']} weights; seconds of an update, medians",
        "| layers | " + " | ".join(PARTS) + " | update | audio hours per hour |",
        "| ---: |" + " ---: |" * (len(PARTS) + 2),
    ]
    for depth, parts in result["stages"].items():
        cells = [f"{parts[part]:.3f}" for part in PARTS]
        total, rate = result["update"][depth], result["audio_hours_per_hour"][depth]
        lines.append(f"| {depth} | " + " | ".join(cells) + f" | {total:.3f} | {rate:.1f} |")
    lines += ["", "| schedule | speed-up against full depth | arithmetic limit |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {ours:.2f}x | {limit:.2f}x |" for name, (ours, limit) in result["speed_up"].items()]
    lines += ["", f"slowest growth {result['growth']:.3f} s, peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB"]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
