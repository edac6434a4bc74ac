"""The split of recordings into train, valid and test, in which no content is in two splits."""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from fairseq_stack.errors import InputError

if TYPE_CHECKING:
    from fairseq_stack.data.recordings import Recording

    Group = tuple[str, str]  # the kind of the name (prompt, speaker or text), and the name

SPLITS = ("train", "valid", "test")
HELD_OUT = 0.05  # the share of each of valid and test
GROUPINGS = ("prompt", "speaker")
# Words in files' names that do not tell what is said in the recording.
_GENERIC = frozenset(
    "audio sound sounds recording recordings record rec file sample clip clips track wav wave wavs flac mp3 utt"
    " utterance utterances speech voice mic microphone channel ch session take part chapter segment seg chunk output"
    " out untitled id no".split()
)

_ONE_OF_SEVERAL = re.compile(r"[\W_]+(mic|microphone|channel)[\W_]*\d+$")  # such as p225_001_mic2


def choose_splits(
    recordings: Sequence["Recording"], copies: Mapping[str, str], grouping: str = "prompt"
) -> dict[str, str]:
    """Return {utterance: split} such that no prompt, text or audio is in two splits.

    If the `prompt` of a recording is unknown, its file's name counts as its prompt, for any speaker. Some names do not
    tell what is said: numbers, "audio", or a name that more files have than there are names. With these names the
    folders before them count, too.

    Args:
        recordings: Recordings (recordings.py), copies included.
        copies: {utterance: utterance with the same audio}.
        grouping: "prompt", or "speaker". With "speaker" no speaker is in two splits, but prompts and texts may be.

    Raises:
        InputError: there are fewer than three groups.
    """
    keys = _speakers(recordings) if grouping == "speaker" else _prompts(recordings)
    group: dict[Group, Group] = {}  # a union-find forest over the keys

    def find(key: "Group") -> "Group":
        while group.setdefault(key, key) != key:
            group[key] = key = group[group[key]]
        return key

    for recording in recordings:
        same = [keys[recording.utterance], keys[copies.get(recording.utterance, recording.utterance)]]
        words = re.findall(r"\w+", recording.text.casefold())
        if words and grouping == "prompt":
            same.append(("text", " ".join(words)))
        roots = sorted(find(key) for key in same)
        for root in roots:
            group[root] = roots[0]  # the first by name: a prompt, whatever the order of the recordings

    sizes = Counter(find(key) for key in keys.values())
    if len(sizes) < len(SPLITS):
        raise InputError(
            f"--source has {len(sizes)} different {grouping}s; train, valid and test need one each: add more"
            + {
                "prompt": " (files with the same name or text count as one prompt)",
                "speaker": ", or give --source the folder that holds the speakers' folders (the first folder below"
                " --source is the speaker)",
            }[grouping]
        )
    split = _deal(sizes)
    return {utterance: split[find(key)] for utterance, key in keys.items()}


def _prompts(recordings: Sequence["Recording"]) -> dict[str, "Group"]:
    """Return {utterance: ("prompt", what is said)}."""
    prompts = {recording.utterance: recording.prompt.casefold() for recording in recordings}
    names = {utterance: _telling_name(utterance) for utterance, prompt in prompts.items() if not prompt}
    counts = Counter(names.values())
    for utterance, name in names.items():
        prompts[utterance] = name if counts[name] <= len(counts) else utterance
    return {utterance: ("prompt", prompt) for utterance, prompt in prompts.items()}


def _telling_name(utterance: str) -> str:
    """Return the shortest end of a path that can tell what is said: the file's name, or some folders and the name.

    Recordings that several microphones made at once get the same name.
    """
    utterance = _ONE_OF_SEVERAL.sub("", utterance.casefold())
    parts = utterance.split("/")
    for first in reversed(range(len(parts))):
        if set(re.findall(r"[^\W\d_]+", parts[first])) - _GENERIC:
            return "/".join(parts[first:])
    return utterance


def _speakers(recordings: Sequence["Recording"]) -> dict[str, "Group"]:
    """Return {utterance: ("speaker", name)}."""
    for recording in recordings:
        if not recording.speaker:
            raise InputError(
                f"{recording.source}: its speaker is not known; for --split-by speaker, put it into a folder below"
                " --source that is named after the speaker"
            )
    return {recording.utterance: ("speaker", recording.speaker) for recording in recordings}


def _deal(sizes: Mapping["Group", int]) -> dict["Group", str]:
    """Return {group: split} for {group: number of recordings}. A hash shuffles the groups, always in the same way."""
    groups = sorted(sizes, key=lambda key: hashlib.sha256(key[1].encode("utf-8", "surrogateescape")).digest())
    share = HELD_OUT * sum(sizes.values())
    # By the number of groups, so that one more speaker of all prompts moves no group.
    count = max(1, round(HELD_OUT * len(groups)))
    test, valid = set(groups[:count]), set(groups[count : 2 * count])
    if not all(share / 2 <= sum(sizes[group] for group in held_out) <= 1.5 * share for held_out in (test, valid)):
        # By the number of recordings, because the groups differ too much in size.
        test = _filled(groups, sizes, share, len(groups) - 2)
        rest = [group for group in groups if group not in test]
        valid = _filled(rest, sizes, share, len(rest) - 1)
    return {group: "test" if group in test else "valid" if group in valid else "train" for group in groups}


def _filled(groups: Sequence["Group"], sizes: Mapping["Group", int], share: float, most: int) -> set["Group"]:
    """Return the first groups, at most `most`, that together have at most `share` recordings; or else the smallest."""
    chosen, left = set(), share
    for group in groups:
        if sizes[group] <= left and len(chosen) < most:
            chosen.add(group)
            left -= sizes[group]
    return chosen or {min(groups, key=sizes.__getitem__)}
