"""Codebooks: a frame of a layer as a few small numbers, each of which chooses a learned vector.

Product quantisation (Jégou, Douze & Schmid, "Product Quantization for Nearest Neighbor Search", PAMI 2011). A
frame is rotated to its principal components. The components are dealt out to the codebooks in turn, so that each
codebook gets strong and weak ones, and k-means finds the entries of each codebook. With a single codebook, the codes
are the clusters of plain k-means: the units of HuBERT.
"""

import hashlib
import json
import os
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from fairseq_stack.errors import InputError
from fairseq_stack.files import CannotWrite

TENSORS = ("mean", "rotation", "entries")
SCORES = 2**24  # of frames and entries at a time; 64 MB
K_MEANS_BATCH = 4096  # frames
STARTING_FRAMES = 10  # for each entry, of which k-means takes one as its start


@dataclass
class Codebooks:
    """The codebooks of one layer.

    M codebooks have K entries of d components each. Where M does not divide the teacher's D features, some
    components are zero.

    Attributes:
        mean: [D].
        rotation: [D, M, d].
        entries: [M, K, d].
        kept: share of the variance of held-out frames that the codes keep.
    """

    mean: Tensor
    rotation: Tensor
    entries: Tensor
    kept: float

    def encode(self, values: Tensor) -> Tensor:
        """Return the nearest entry of each codebook, [..., M] integers, for values [..., D]."""
        self._move_to(values.device)
        frames = values.reshape(-1, values.size(-1)).float() - self.mean
        codebooks, size, _ = self.entries.shape
        codes = torch.cat([self._nearest(part) for part in frames.split(max(1, SCORES // (codebooks * size)))])
        return codes.view(*values.shape[:-1], codebooks)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the values [..., D] that codes [..., M] stand for, in fp32.

        They are rotated back in the precision `dtype`. Half precision takes a fraction of the time, and its error is
        small beside that of the codes.
        """
        self._move_to(codes.device)
        # On a CPU in fp32, a sum of entries that are already rotated takes a third of the time for 16 codebooks, the
        # same for 64, and three times as long for 128.
        parts = self.entries.to(dtype)[torch.arange(len(self.entries), device=codes.device), codes.long()]
        return F.linear(parts.flatten(-2), self.rotation.flatten(1).to(dtype)).float() + self.mean

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the contents, in hex."""
        content = hashlib.sha256()
        for tensor in (getattr(self, name) for name in TENSORS):
            content.update(f"{tuple(tensor.shape)}".encode() + tensor.cpu().numpy().tobytes())
        return content.hexdigest()

    def _nearest(self, frames: Tensor) -> Tensor:
        components = torch.einsum("nd,dme->mne", frames, self.rotation)
        half_norms = self.entries.pow(2).sum(2)[:, None] / 2
        # Half of the squared distance, without the part that is the same for all entries.
        distances = torch.baddbmm(half_norms, components, self.entries.transpose(1, 2), alpha=-1)
        return distances.argmin(2).T.to(torch.uint8 if self.entries.size(1) <= 256 else torch.int16)

    def _move_to(self, device: torch.device) -> None:
        if self.mean.device != device:
            for name in TENSORS:
                setattr(self, name, getattr(self, name).to(device))


def learn_codebooks(frames: Tensor, held_out: Tensor, codebooks: int, entries: int) -> Codebooks:
    """Return codebooks for frames [N, D] of a layer; the same frames give the same codebooks.

    Args:
        frames: to learn from, at least one for each entry.
        held_out: [N', D], frames on which `kept` is measured.
        codebooks, entries: how many, and of which size.
    """
    from sklearn.cluster import MiniBatchKMeans

    frames = frames.float().cpu()
    mean = frames.mean(0)
    centred = (frames - mean).double()
    _, directions = torch.linalg.eigh(centred.T @ centred)  # by ascending variance
    directions = F.pad(directions.flip(1), (0, -frames.size(1) % codebooks)).float()
    rotation = directions.unflatten(1, (-1, codebooks)).transpose(1, 2).contiguous()
    components = torch.einsum("nd,dme->mne", centred.float(), rotation)
    k_means = MiniBatchKMeans(
        entries,
        batch_size=K_MEANS_BATCH,
        init_size=STARTING_FRAMES * entries,
        n_init=1,  # pyright: ignore[reportArgumentType]  sklearn's annotation knows only the default, "auto"
        random_state=0,
        reassignment_ratio=0,
    )
    centres = [torch.from_numpy(k_means.fit(part.numpy()).cluster_centers_).float() for part in components]
    learned = Codebooks(mean, rotation, torch.stack(centres), 0.0)
    held_out = held_out.float().cpu()
    errors = (learned.decode(learned.encode(held_out)) - held_out).pow(2).sum()
    learned.kept = 1 - float(errors / (held_out - held_out.mean(0)).pow(2).sum())
    return learned


def write_codebooks(codebooks: Codebooks, path: str | os.PathLike, teacher: str) -> None:
    """Write a file whole, unless another process has written one: then that one stays.

    Args:
        codebooks: of a layer.
        path: of the file.
        teacher: the fingerprint of the teacher, which `read_codebooks` compares.

    Raises:
        CannotWrite: no permission, no room, or a file system without hard links.
    """
    path = Path(path)
    beside = path.with_name(f"{uuid.uuid4().hex}.part")
    tensors = {name: getattr(codebooks, name).cpu() for name in TENSORS}
    about = {"teacher": teacher, "digest": codebooks.digest, "kept": json.dumps(codebooks.kept)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(save(tensors, about))
            os.link(beside, path)  # unlike a rename, it never replaces a file that others already use
        except FileExistsError:
            pass
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise CannotWrite(f"{path} cannot be written ({error.strerror}); make room or choose another place") from None


def read_codebooks(path: str | os.PathLike, teacher: str, width: int, codebooks: int, entries: int) -> Codebooks | None:
    """Return the codebooks in a file, or None where there is no file.

    Args:
        path, teacher: as for `write_codebooks`.
        width: features of the layer.
        codebooks, entries: the numbers that the format asks for.

    Raises:
        InputError: the file is damaged, of another teacher or of another shape.
    """
    if not os.path.exists(path):
        return None
    advice = "delete this file to learn new codebooks; the targets that it belongs to are then computed again"
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            mean, rotation, books = (file.get_tensor(name) for name in TENSORS)
        learned = Codebooks(mean, rotation, books, json.loads(about["kept"]))
        if learned.digest != about["digest"]:
            raise ValueError("other contents than when it was written")
    except Exception as error:  # damage can break any rule of the format
        raise InputError(f"{path} is damaged ({type(error).__name__}: {error}); {advice}") from None
    if about["teacher"] != teacher:
        raise InputError(f"{path} has codebooks of the teacher {about['teacher']}, not of {teacher}; {advice}")
    size = -(-width // codebooks)
    expected = [(width,), (width, codebooks, size), (codebooks, entries, size)]
    shapes = [tuple(getattr(learned, name).shape) for name in TENSORS]
    if shapes != expected:
        raise InputError(f"{path} has codebooks of the shapes {shapes}, not {expected}; {advice}")
    return learned
