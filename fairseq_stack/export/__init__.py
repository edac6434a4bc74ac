"""Exports of students to other libraries, each verified. Only the fairseq format needs fairseq; none needs hydra."""
