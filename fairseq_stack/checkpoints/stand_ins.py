"""Stand-ins for what checkpoints pickle besides tensors: they hold the data and have no code of their own.

Published checkpoints of fairseq pickle the options of their training as an `argparse.Namespace` or as objects of
omegaconf, the dictionaries of their labels, and a number of numpy here and there.

Reading them this way cannot run code. The pickle is read by torch's weights-only unpickler, which looks no name up in
a module: a name means one of torch's own functions that make tensors, or what `stand_ins` gives it, or an error. What
`stand_ins` gives is made here for the occasion. It keeps the arguments and the state that the pickle has for it, and
calls nothing. So it does not matter what a name means elsewhere, nor what arguments and state are. Names that do not
look like data are left out all the same, so that a file that asks for `os.system` is refused and its user hears of it.
"""

import io
import os
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING

# By the full name. `getitem` is in the types that omegaconf 2 notes, such as typing.Optional[int].
HELD = re.compile(
    r"argparse\.Namespace|(fairseq|omegaconf|pathlib|typing)(\.\w+)+|collections\.defaultdict"
    r"|numpy\.(dtype|ndarray|(_?core\.)?multiarray\.(scalar|_reconstruct))|_codecs\.encode|_?operator\.getitem"
    r"|builtins\.(type|object|bool|int|float|complex|str|bytes|list|tuple|dict|set|frozenset)"
)
# Of these, what is data under an unpickler that looks names up, too: the dictionary of the labels, which checkpoints of
# hubert_pretraining have.
HARMLESS = re.compile(r"fairseq\.data\.dictionary\.Dictionary")
PICKLES = 4  # of a file in torch's first format: a magic number, a version, the system, and the content


class StandIn:
    """What a pickle says of an object: the arguments that it is made with, and its attributes."""

    __slots__ = ("arguments", "__dict__")

    def __new__(cls, *arguments):
        made = super().__new__(cls)
        made.arguments = arguments
        return made

    def __init__(self, *arguments):
        pass

    def __setstate__(self, state):
        vars(self).update(state if isinstance(state, dict) else {"state": state})


class _Mapping:
    """A dict, whatever it is made with: torch fills nothing else."""

    def __new__(cls, *arguments):
        return {}


def stand_ins(path, zipped, held=HELD):
    """Classes for the names in a torch file that are to be held; each goes by the name that it stands for.

    Args:
        path: the file.
        zipped: whether it is a zip file, as torch has written since 1.6.
        held: a pattern of the names.
    """
    if zipped:
        with zipfile.ZipFile(path) as file:
            names = _names(io.BytesIO(_content(file)), 1)
    else:
        with open(path, "rb") as file:
            names = _names(file, PICKLES)
    return [_stand_in(name) for name in sorted(names) if held.fullmatch(name)]


def _content(file):
    """The pickle of an open zip file; empty where there is none."""
    members = [name for name in file.namelist() if name.rpartition("/")[2] == "data.pkl"]
    return file.read(members[0]) if members else b""


def _names(file, pickles):
    """The full names that some pickles, one after the other, ask for. Reads their opcodes and follows none."""
    names = set()
    for _ in range(pickles):
        for opcode, argument, _ in pickletools.genops(file):
            if opcode.name == "GLOBAL":
                # Python 3 writes Python 2's names into torch's pickles.
                module, name = argument.split(" ", 1)
                module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
                names.add(f"{module}.{name}")
    return names


def _stand_in(name):
    module, _, name = name.rpartition(".")
    base = _Mapping if name == "defaultdict" else StandIn
    # torch's unpickler knows an allowed class by the name that it goes by. Later versions take (class, name) pairs; a
    # class that goes by the pickled name works in every version since 2.4.
    return type(name, (base,), {"__module__": module, "__slots__": ()})


def plain(value):
    """Lists, dicts and plain values in the place of the stand-ins in `value`; None if they are nested too deeply.

    A Namespace and a DictConfig become a dict, a ListConfig a list, a node of omegaconf its value, a path its text and
    a member of an enumeration its value; any other object stays a stand-in. What is in two places is so in the result.
    """
    try:
        return _plain(value, {})
    except RecursionError:
        return None


def _plain(value, done):
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, (list, tuple)):
        result = done[id(value)] = []
        result.extend(_plain(item, done) for item in value)
        return result
    held = vars(value) if isinstance(value, StandIn) else {}
    if isinstance(value, dict) or isinstance(value, StandIn) and type(value).__name__ == "Namespace":
        result = done[id(value)] = {}
        items = value if isinstance(value, dict) else held
        result.update((key, _plain(item, done)) for key, item in items.items())
        return result
    done[id(value)] = value  # in case it holds itself
    for inside in ("_content", "_val"):  # of omegaconf
        if inside in held:
            done[id(value)] = _plain(held[inside], done)
            return done[id(value)]
    if isinstance(value, StandIn) and type(value).__module__.startswith("pathlib"):
        return os.path.join("", *map(str, value.arguments))
    if isinstance(value, StandIn) and len(value.arguments) == 1 and not held:
        return _plain(value.arguments[0], done)
    return value
