"""How good a student is, measured by small probes on its frozen features by SUPERB's protocol. Needs no fairseq."""
