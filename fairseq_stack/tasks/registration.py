"""Registers task, model, criterion and optimizers. fairseq imports this module with `--user-dir fairseq_stack`.

Only this module registers anything with fairseq. Only guards.py, which it imports, replaces functions of fairseq.
"""

from fairseq.criterions import register_criterion
from fairseq.models import register_model
from fairseq.optim import register_optimizer
from fairseq.tasks import register_task

from fairseq_stack.criterions.layer_distillation import LayerDistillation, LayerDistillationConfig
from fairseq_stack.models.stacked_hubert import StackedHubert, StackedHubertConfig
from fairseq_stack.tasks.speech_distillation import SpeechDistillation, SpeechDistillationConfig
from fairseq_stack.training import guards
from fairseq_stack.training.adamw import AdamWConfig, FairseqAdam
from fairseq_stack.training.finetuning import complete_hubert_ctc
from fairseq_stack.training.muon import FairseqMuon, MuonConfig

register_task(guards.TASK, dataclass=SpeechDistillationConfig)(SpeechDistillation)
register_model("stacked_hubert", dataclass=StackedHubertConfig)(StackedHubert)
register_criterion("layer_distillation", dataclass=LayerDistillationConfig)(LayerDistillation)
register_optimizer("muon", dataclass=MuonConfig)(FairseqMuon)
register_optimizer("adamw", dataclass=AdamWConfig)(FairseqAdam)
complete_hubert_ctc()
