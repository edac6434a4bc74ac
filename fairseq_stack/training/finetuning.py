"""Completes fairseq's `hubert_ctc`, so that it can fine-tune a student.

- The encoder of fairseq's main branch reads the field `autoregressive`, but the configuration of `hubert_ctc` lacks it.
  So no configuration can build the model (fairseq#4916). fairseq 0.12.2 does not read the field.
- The checkpoints hold the dictionary of the letters. torch's safe loading does not know it, so no run could resume.
"""

from dataclasses import dataclass, field

import torch
from fairseq.data import Dictionary
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.models.hubert.hubert_asr import HubertCtcConfig


@dataclass
class CompleteHubertCtcConfig(HubertCtcConfig):
    autoregressive: bool = field(
        default=False, metadata={"help": "whether a decoder follows the encoder; with CTC there is none"}
    )


def complete_hubert_ctc() -> None:
    """Make fairseq able to build `hubert_ctc` and to resume its runs."""
    MODEL_DATACLASS_REGISTRY["hubert_ctc"] = CompleteHubertCtcConfig
    torch.serialization.add_safe_globals([Dictionary])  # a list of strings and numbers
