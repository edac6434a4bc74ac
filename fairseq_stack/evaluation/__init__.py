"""How good a student is: small probes on its frozen features, by SUPERB's protocol. fairseq is not needed."""
