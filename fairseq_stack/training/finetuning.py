"""Completes fairseq's `hubert_ctc`, so that it can fine-tune a student.

- The encoder of fairseq's main branch reads the field `autoregressive`, but the configuration of `hubert_ctc` lacks it.
  So no configuration can build the model (fairseq#4916). fairseq 0.12.2 does not read the field.
- The checkpoints hold the dictionary of the letters. torch's safe loading does not know it, so no run could resume.
- fairseq finds a transcript by its place in bytes, but reads it by letters. So a transcript in any script but Latin
  would run on into the next ones (av_hubert#74 has the same fault).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from fairseq.data import Dictionary
from fairseq.data.audio.hubert_dataset import HubertDataset
from fairseq.models import MODEL_DATACLASS_REGISTRY
from fairseq.models.hubert.hubert_asr import HubertCtcConfig


@dataclass
class CompleteHubertCtcConfig(HubertCtcConfig):
    autoregressive: bool = field(
        default=False, metadata={"help": "whether a decoder follows the encoder; with CTC there is none"}
    )


def label_by_bytes(self: HubertDataset, index: int, label_idx: int) -> Any:
    """Return a label of an utterance, as `HubertDataset.get_label` does for texts in ASCII."""
    if self.store_labels:
        label = self.label_list[label_idx][index]
    else:
        begin, end = self.label_offsets_list[label_idx][index]
        with open(self.label_paths[label_idx], "rb") as file:
            file.seek(begin)
            label = file.read(end - begin).decode()
    return label if self.label_processors is None else self.label_processors[label_idx](label)


def complete_hubert_ctc() -> None:
    """Make fairseq able to build `hubert_ctc`, to resume its runs, and to read transcripts of all languages."""
    MODEL_DATACLASS_REGISTRY["hubert_ctc"] = CompleteHubertCtcConfig
    HubertDataset.get_label = label_by_bytes
    torch.serialization.add_safe_globals([Dictionary])  # a list of strings and numbers
