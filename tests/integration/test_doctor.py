"""The doctor looks at the real installation, speech and teacher, and at broken ones."""

import re
import shutil
import subprocess
import sys

import pytest
import transformers
from training import ROOT

from fairseq_stack.doctor import TESTED, Finding, examine_speech, examine_teacher


def doctor(*arguments, before="pass"):
    """Run `python -m fairseq_stack doctor`, after some statements of Python; returns exit code, lines and stderr."""
    code = f"import runpy, sys; {before}; sys.argv[0] = 'fairseq_stack'; runpy.run_module('fairseq_stack', run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", code, "doctor", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_a_sound_installation_with_speech_and_teacher_is_ready_to_train(speech, teacher_file):
    code, lines, errors = doctor("--data", speech, "--teacher", teacher_file)
    assert code == 0, (lines, errors)
    assert errors == "" and lines[-1] == "ready to train"
    assert all(re.match(r"(ok|note) +[\w .-]+: \S", line) for line in lines[:-1])
    for line in ("ok    torch: ", "ok    libsndfile: ", "ok    train.tsv: 24 recordings of 0.2 to 0.6 s"):
        assert any(one.startswith(line) for one in lines), line
    assert lines[-2].endswith(
        ": HuBERT, 12 layers x 16, 0.02854 M parameters, takes waveforms as they are, 50 frames a second"
    )


def test_a_package_that_does_not_import_is_to_be_fixed_and_nothing_that_needs_it_is_tried(speech):
    code, lines, errors = doctor("--data", speech, before="sys.modules.update(torchaudio=None)")
    assert code == 1 and errors == "1 to fix\n"
    (fix,) = [line for line in lines if line.startswith("fix")]
    assert re.match(r"fix   torchaudio: \S+ cannot be imported .*; pip install -c constraints\S* -e \.\[train\]$", fix)
    assert lines[-1] == "note  data: not examined; first fix the installation"


def test_missing_and_broken_speech_is_named_by_manifest(speech, tmp_path):
    shutil.copy(speech / "valid.tsv", tmp_path)
    root, *lines = (speech / "train.tsv").read_text().splitlines()
    (tmp_path / "train.tsv").write_text("\n".join([root, *lines, "audio/gone.flac\t5000"]) + "\n")
    train, valid = examine_speech(tmp_path)
    assert valid == Finding("valid.tsv", "ok", valid.text) and valid.text.startswith("6 recordings")
    assert train.verdict == "fix" and "audio/gone.flac: does not exist; prepare again (1 of 25 recordings" in train.text

    name, samples = max((line.split("\t") for line in lines), key=lambda entry: int(entry[1]))
    (tmp_path / "train.tsv").write_text(f"{root}\n{name}\t{int(samples) + 1}\n")
    assert next(examine_speech(tmp_path)).verdict == "fix"  # longer in the manifest than in the file


def test_a_teacher_is_described(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    strides = {"conv_dim": (8, 8), "conv_kernel": (10, 8), "conv_stride": (10, 8)}
    wavlm = transformers.WavLMConfig(**shape, **strides, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=4)
    wavlm = transformers.WavLMModel(wavlm)
    wavlm.save_pretrained(tmp_path / "wavlm")
    transformers.Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(tmp_path / "wavlm")
    whisper = transformers.WhisperConfig(
        d_model=16, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=32, vocab_size=5,
        decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=32, pad_token_id=0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    whisper = transformers.WhisperModel(whisper)
    whisper.save_pretrained(tmp_path / "whisper")
    for name, encoder, family, takes in (
        ("wavlm", wavlm, "WavLM", "normalised waveforms, 200 frames a second"),
        ("whisper", whisper.encoder, "Whisper's encoder", "log-mel, 50 frames a second"),
    ):
        parameters = sum(weight.numel() for key, weight in encoder.state_dict().items() if key != "masked_spec_embed")
        (finding,) = examine_teacher(tmp_path / name)
        assert finding.verdict == "ok"
        assert finding.text == (
            f"{tmp_path / name}: {family}, 2 layers x 16, {parameters / 1e6:.4g} M parameters, takes {takes}"
        )


def test_a_teacher_that_cannot_be_loaded_is_to_be_fixed(speech, tmp_path):
    for path in (tmp_path / "none.pt", speech / "train.tsv"):
        (finding,) = examine_teacher(path)
        assert finding.verdict == "fix" and str(path) in finding.text and "\n" not in finding.text


@pytest.mark.parametrize(
    "version, file", [("3.10", "constraints-3.10.txt"), ("3.11", "constraints.txt"), ("3.12", "constraints.txt")]
)
def test_the_tested_versions_are_those_of_the_constraints(version, file):
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / file).read_text(), re.MULTILINE))
    assert TESTED[version].items() <= pins.items()
