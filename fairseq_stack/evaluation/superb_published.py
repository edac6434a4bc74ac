"""Published SUPERB results of HuBERT Base and its students, all trained on LibriSpeech 960 h.

Sources: Yang et al., "SUPERB", Interspeech 2021 (HuBERT Base); Chang et al., "DistilHuBERT", ICASSP 2022; Lee et al.,
"FitHuBERT", Interspeech 2022; Jang et al., "ARMHuBERT", Interspeech 2023; Peng et al., "DPHuBERT", Interspeech 2023;
Jang et al., "STaR", ICASSP 2024; Kim & Lee, "Fast Speech Foundation Model Distillation Using Interleaved Stacking",
Interspeech 2026, for the other rows.
"""

# Model, then {column of superb.COLUMNS: per cent}.
PUBLISHED = (
    ("HuBERT Base (teacher)", {"PR PER": 5.41, "ASR WER": 6.42, "SF F1": 88.53, "SF CER": 25.20, "SID acc": 81.42}),
    ("DistilHuBERT", {"PR PER": 16.27, "ASR WER": 13.37, "SF F1": 82.57, "SF CER": 35.59, "SID acc": 73.54}),
    ("FitHuBERT", {"PR PER": 13.32, "ASR WER": 12.09, "SF F1": 84.06, "SF CER": 32.46, "SID acc": 55.71}),
    ("ARMHuBERT", {"PR PER": 7.72, "ASR WER": 9.96, "SF F1": 87.59, "SF CER": 26.06, "SID acc": 65.03}),
    ("DPHuBERT", {"PR PER": 9.67, "ASR WER": 10.47, "SF F1": 86.86, "SF CER": 28.26, "SID acc": 76.83}),
    ("STaRHuBERT-L", {"PR PER": 7.97, "ASR WER": 8.91, "SF F1": 88.01, "SF CER": 25.36, "SID acc": 78.66}),
    ("Full L2L", {"PR PER": 9.12, "ASR WER": 9.92, "SF F1": 86.47, "SID acc": 72.99}),
    ("GradStack, EQL", {"PR PER": 11.50, "ASR WER": 11.04, "SF F1": 84.34, "SID acc": 70.89}),
    ("MIDAS, EQL", {"PR PER": 10.75, "ASR WER": 10.74, "SF F1": 83.43, "SID acc": 69.94}),
    ("Interleaved, EQL", {"PR PER": 9.08, "ASR WER": 10.22, "SF F1": 86.36, "SID acc": 72.26}),
    ("Interleaved, PROP-1", {"PR PER": 8.88, "ASR WER": 9.99, "SF F1": 85.70, "SID acc": 73.60}),
)
