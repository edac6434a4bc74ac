"""The registries of teachers: layouts of files, and model types of Hugging Face."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fairseq_stack.registry import Registry


@dataclass(frozen=True)
class Layout:
    """A layout of files that torch.save wrote.

    Attributes:
        load: returns, from (content, name), a Teacher or the Encoder (layouts.py) of a model of the HuBERT family.
        recognizes: returns whether a file's content, a dict, has this layout.
    """

    load: Callable[[dict, str], Any]
    recognizes: Callable[[dict], bool]


@dataclass(frozen=True)
class Family:
    """Models in Hugging Face's format with one `model_type`.

    Attributes:
        load: returns the Teacher from (name, config, weights, normalize). `config` is the content of config.json,
            `weights` the state dict of the encoder; `normalize` says whether waveforms must be normalised.
        prefixes: prefixes of the encoder's weights in models with a head or a decoder.
        takes_waveforms: whether it takes waveforms, and so needs a preprocessor's do_normalize. Other models
            compute a spectrogram.
    """

    load: Callable[..., Any]
    prefixes: tuple[str, ...] = ()
    takes_waveforms: bool = True


# Layouts are tried from the last to the first, so that extensions come before the package.
LAYOUTS = Registry("layout", ["fairseq_stack.teachers.layouts"], Layout)
FAMILIES = Registry("model_type", ["fairseq_stack.teachers.huggingface"], Family)
