"""The kinds of teachers by name. Each registers where it is written."""

from collections.abc import Callable
from dataclasses import dataclass

from fairseq_stack.registry import Registry


@dataclass(frozen=True)
class Layout:
    """A way to keep a model in a file that torch.save wrote.

    Attributes:
        load: a function of (content, name): a Teacher, or the Encoder (layouts.py) of a model of the HuBERT family.
        recognizes: a function of the content, a dict: whether it is laid out like this.
    """

    load: Callable
    recognizes: Callable


@dataclass(frozen=True)
class Family:
    """Models in Hugging Face's format with one `model_type`.

    Attributes:
        load: a function of (name, config, weights, normalize): the Teacher. `config` is the content of config.json,
            `weights` the state dict of the encoder, `normalize` whether waveforms are to be normalised.
        prefixes: where models with a head or a decoder keep the encoder: beginnings of the names of its weights.
        takes_waveforms: whether it needs a preprocessor that says how to normalise them; else it computes a spectrogram.
    """

    load: Callable
    prefixes: tuple[str, ...] = ()
    takes_waveforms: bool = True


# The last one is asked first, so that extensions come before the package.
LAYOUTS = Registry("layout", ["fairseq_stack.teachers.layouts"], Layout)
FAMILIES = Registry("model_type", ["fairseq_stack.teachers.huggingface"], Family)
