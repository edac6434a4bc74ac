"""What fairseq's `hubert_ctc` needs to fine-tune a student, where fairseq does not bring it.

- The encoder of fairseq's main branch reads `autoregressive`, which the configuration of `hubert_ctc` lacks, so that no
  configuration can build the model (fairseq#4916). fairseq 0.12.2 has no such field and does not read it.
- The checkpoints hold the dictionary of the letters, which torch's safe loading does not know: a run could not resume.
"""

from dataclasses import dataclass, field

import torch
from fairseq.data import Dictionary
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.models.hubert.hubert_asr import HubertCtcConfig


@dataclass
class CompleteHubertCtcConfig(HubertCtcConfig):
    autoregressive: bool = field(default=False, metadata={"help": "whether a decoder follows; with CTC none does"})


def complete_hubert_ctc():
    """Let fairseq build `hubert_ctc` and resume its runs."""
    MODEL_DATACLASS_REGISTRY["hubert_ctc"] = CompleteHubertCtcConfig
    torch.serialization.add_safe_globals([Dictionary])  # a list of strings and numbers
