"""Stand-ins for the pickled objects in checkpoints. They hold an object's data and have no code.

Besides tensors, published checkpoints of fairseq pickle the training options (an `argparse.Namespace` or objects of
omegaconf), the dictionaries of the labels, and a few numbers of numpy.

Reading them this way cannot run code. torch's weights-only unpickler reads the pickle and never imports the names in
it. A name is one of torch's own functions that make tensors, a class from `stand_ins`, or an error. The classes from
`stand_ins` are created here. They keep the arguments and the state from the pickle and call nothing. So it does not
matter what a name means elsewhere, or which arguments and state it gets. Names that do not look like data get no
stand-in, so a file that asks for `os.system` is refused with an error.
"""

import io
import os
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Mapping
from os import PathLike
from typing import IO, Any

# The full names that get a stand-in. omegaconf 2 pickles types such as typing.Optional[int], which need `getitem`.
HELD = re.compile(
    r"argparse\.Namespace|(fairseq|omegaconf|pathlib|typing)(\.\w+)+|collections\.defaultdict"
    r"|numpy\.(dtype|ndarray|(_?core\.)?multiarray\.(scalar|_reconstruct))|_codecs\.encode|_?operator\.getitem"
    r"|builtins\.(type|object|bool|int|float|complex|str|bytes|list|tuple|dict|set|frozenset)"
)
# The names that are also harmless in an unpickler that imports them: the dictionary of the labels, which checkpoints
# of hubert_pretraining have.
HARMLESS = re.compile(r"fairseq\.data\.dictionary\.Dictionary")
PICKLES = 4  # in a file of torch's first format: a magic number, a version, the system and the content


class StandIn:
    """The data that a pickle has for an object: the constructor's arguments and the attributes."""

    __slots__ = ("arguments", "__dict__")
    arguments: tuple[Any, ...]

    def __new__(cls, *arguments: Any) -> "StandIn":
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __init__(self, *arguments: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        vars(self).update(state if isinstance(state, dict) else {"state": state})


class _Mapping:
    """Creates a plain dict, because torch's unpickler fills nothing else with items."""

    def __new__(cls, *arguments: Any) -> dict:  # pyright: ignore[reportInconsistentConstructor]
        return {}


def stand_ins(path: str | PathLike[str], zipped: bool, held: re.Pattern[str] = HELD) -> list[type]:
    """Return classes for the names in a torch file that match `held`. Each has the name that it stands for.

    Args:
        path: the file.
        zipped: whether it is a zip file. torch has written zip files since 1.6.
        held: a pattern for full names.
    """
    if zipped:
        with zipfile.ZipFile(path) as file:
            names = _names(io.BytesIO(_content(file)), 1)
    else:
        with open(path, "rb") as file:
            names = _names(file, PICKLES)
    return [_stand_in(name) for name in sorted(names) if held.fullmatch(name)]


def _content(file: zipfile.ZipFile) -> bytes:
    """Return the pickle in an open zip file, or no bytes if there is none."""
    members = [name for name in file.namelist() if name.rpartition("/")[2] == "data.pkl"]
    return file.read(members[0]) if members else b""


def _names(file: IO[bytes], pickles: int) -> set[str]:
    """Return the full names that consecutive pickles ask for. It reads their opcodes and executes none."""
    names = set()
    for _ in range(pickles):
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL" and isinstance(argument, str):
                # Python 3 writes Python 2's names into torch's pickles.
                module, name = argument.split(" ", 1)
                module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                names.add(f"{module}.{name}")
    return names


def _stand_in(full_name: str) -> type:
    module, _, name = full_name.rpartition(".")
    base = _Mapping if name == "defaultdict" else StandIn
    # torch's unpickler finds an allowed class by its name. Later versions of torch also accept (class, name) pairs; a
    # class with the pickled name works in every version since 2.4.
    return type(name, (base,), {"__module__": module, "__slots__": ()})


def plain(value: Any) -> Any:
    """Replace the stand-ins in `value` by lists, dicts and plain values. Return None if they are nested too deeply.

    A Namespace and a DictConfig become a dict, a ListConfig a list. A node of omegaconf becomes its value, a path its
    text, a member of an enumeration its value. Other objects stay stand-ins. An object that is in two places of
    `value` is in both places of the result.
    """
    try:
        return _plain(value, {})
    except RecursionError:
        return None


def _plain(value: Any, done: dict[int, Any]) -> Any:
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, (list, tuple)):
        result = done[id(value)] = []
        result.extend(_plain(item, done) for item in value)
        return result
    held: Mapping[str, Any] = vars(value) if isinstance(value, StandIn) else {}
    if isinstance(value, dict) or isinstance(value, StandIn) and type(value).__name__ == "Namespace":
        result = done[id(value)] = {}
        items = value if isinstance(value, dict) else held
        result.update((key, _plain(item, done)) for key, item in items.items())
        return result
    done[id(value)] = value  # it may contain itself
    for inside in ("_content", "_val"):  # omegaconf's attributes
        if inside in held:
            done[id(value)] = _plain(held[inside], done)
            return done[id(value)]
    if isinstance(value, StandIn) and type(value).__module__.startswith("pathlib"):
        return os.path.join("", *map(str, value.arguments))
    if isinstance(value, StandIn) and len(value.arguments) == 1 and not held:
        return _plain(value.arguments[0], done)
    return value
