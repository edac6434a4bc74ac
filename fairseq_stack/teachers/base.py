"""What the rest of the package knows of a teacher."""

from abc import ABC, abstractmethod


class Teacher(ABC):
    """A frozen speech foundation model in eval mode that gives hidden states without gradient.

    It takes waveforms as they are recorded and normalises them itself where its training did.

    Attributes:
        name: what to call it in messages: the file or folder it was loaded from.
        depth: number of transformer layers.
        width: features of a hidden state.
    """

    name: str
    depth: int
    width: int

    @abstractmethod
    def hidden_states(self, waveforms, lengths, layers):
        """Outputs of chosen layers.

        Args:
            waveforms: [B, S], samples at 16 kHz.
            lengths: [B], samples.
            layers: numbers from 1 to depth.

        Returns:
            {layer: [B, T, width]}, on the waveforms' device.
        """

    @abstractmethod
    def frames(self, samples):
        """Frames that the teacher makes of `samples` samples (an int)."""
