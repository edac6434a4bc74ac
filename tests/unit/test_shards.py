"""Entries in shards: what was written whole is read, by any process, during kills and after a copy."""

import io
import itertools
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import tarfile
import threading
import time

import numpy as np
import pytest
import torch
from test_target_store import arrays, entry, equal, store

from fairseq_stack.targets import shards

PROCESSES = 10
ENTRIES = 50


def name(number):
    return f"{number:032x}"


def content(number):
    return bytes([number]) * (1000 + number)


def read(found, number):
    """What a search for a file finds, right after it was written."""
    found.refresh()
    contents = []
    for place in found.places(name(number)):
        with found.open(name(number), place) as file:
            contents.append(file.read())
    return contents


@pytest.fixture
def found(tmp_path):
    """Three files in a shard."""
    found = shards.Shards(str(tmp_path))
    for number in range(3):
        found.append(name(number), content(number))
    return found


def _fill(folder, rank, event):
    """Store what is missing of a share of the entries; at this event in shards.py, die."""
    left = itertools.count(event, -1)

    def die(frame, *_):
        if frame.f_code.co_filename == shards.__file__ and next(left) == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    made = store(folder)
    names = made.names()
    threading.setprofile(die if event else None)
    for one in range(rank, ENTRIES, PROCESSES):
        if _entry(made, one).name not in names:
            made.write({0: _entry(made, one)}, arrays(made, frames=4 + one % 9, seed=one))


def _entry(made, one):
    return entry(made, f"{one}.wav", samples=400 + 320 * (3 + one % 9), digest=f"digest {one}")


def test_ten_processes_that_are_killed_and_started_again_fill_a_store_as_one_process_does(tmp_path):
    chance = random.Random(0)
    context = multiprocessing.get_context("fork")
    killed = 0
    reader = store(tmp_path / "ten")
    for last in (False, True):
        events = [0 if last else chance.randrange(1, 120) for _ in range(PROCESSES)]
        processes = [context.Process(target=_fill, args=(tmp_path / "ten", *share)) for share in enumerate(events)]
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            reader.shards.refresh()
            for one in chance.sample(range(ENTRIES), 10):
                reader.read(_entry(reader, one))  # raises if it meets half an entry
            time.sleep(0.01)
        codes = [process.exitcode for process in processes]
        killed += codes.count(-signal.SIGKILL)
    assert codes == [0] * PROCESSES and killed > PROCESSES // 2
    for rank in range(PROCESSES):
        _fill(tmp_path / "one", rank, 0)
    one, ten = store(tmp_path / "one"), store(tmp_path / "ten")
    assert ten.names() == one.names() and len(one.names()) == ENTRIES
    for number in range(ENTRIES):
        theirs, ours = (made.read(_entry(made, number)) for made in (one, ten))
        assert len(ten.shards.places(_entry(ten, number).name)) == 1
        assert all(torch.equal(ours[layer]["values"], theirs[layer]["values"]) for layer in (2, 3))


def test_a_copied_and_a_moved_store_is_read(tmp_path):
    made = store(tmp_path / "first")
    targets = arrays(made)
    made.write({0: entry(made)}, targets)
    subprocess.run(["cp", "-r", tmp_path / "first", tmp_path / "copied"], check=True)
    shutil.move(tmp_path / "first", tmp_path / "moved")
    for place in ("copied", "moved"):
        again = store(tmp_path / place)
        assert equal(again.read(entry(again)), targets)
        again.write({0: entry(again, "b.wav")}, targets)
        assert len(again.names()) == 2 and equal(again.read(entry(again, "b.wav")), targets)


def test_a_shard_is_a_tar_of_npz_files(tmp_path):
    made = store(tmp_path)
    targets = arrays(made)
    made.write({0: entry(made)}, targets)
    (path,) = tmp_path.glob("*/*.tar")
    with tarfile.open(path) as archive:
        (file,) = archive
        assert file.name == f"{entry(made).name}.npz"
        values = np.load(io.BytesIO(archive.extractfile(file).read()))
    assert values["audio"].tolist() == ["d", "s"] and (values["2.values"] == targets[2]["values"][0].numpy()).all()
    listing = subprocess.run(["tar", "tf", path], capture_output=True, text=True, check=True)
    assert listing.stdout.split() == [file.name] and not listing.stderr


def test_entries_that_earlier_versions_stored_in_files_of_their_own_are_read(tmp_path):
    made = store(tmp_path)
    targets = arrays(made)
    made.write({0: entry(made)}, targets)
    (path,) = tmp_path.glob("*/*.tar")
    one = entry(made).name
    with tarfile.open(path) as archive:
        whole = archive.extractfile(f"{one}.npz").read()
    shutil.rmtree(made.folder)
    old = made.shards.folder + f"/{one[:2]}/{one[2:]}.npz"
    os.makedirs(os.path.dirname(old))
    with open(old, "wb") as file:
        file.write(whole)
    made = store(tmp_path)
    assert made.names() == {one} and equal(made.read(entry(made)), targets)
    made.write({0: entry(made)}, targets)
    assert not list(tmp_path.glob("*/*.tar"))  # it need not be stored again


@pytest.mark.parametrize(("lost", "whole"), [(0, 3), (1, 3), (300, 2), (1300, 2), (1536, 2), (2000, 1), (4300, 0)])
def test_without_an_index_the_whole_files_of_a_torn_shard_are_read(found, lost, whole, tmp_path):
    (tar,), (index,) = tmp_path.glob("*.tar"), tmp_path.glob("*.index")
    index.unlink()
    os.truncate(tar, tar.stat().st_size - lost)
    again = shards.Shards(str(tmp_path))
    assert again.names() == {name(number) for number in range(whole)}
    assert all(read(again, number) == [content(number)] for number in range(whole))


def test_a_torn_row_of_an_index_is_no_file(found, tmp_path):
    (index,) = tmp_path.glob("*.index")
    os.truncate(index, 3 * 32 - 1)
    again = shards.Shards(str(tmp_path))
    assert again.names() == {name(0), name(1)}
    again.append(name(2), content(2))
    assert read(again, 2) == [content(2)] and len(list(tmp_path.glob("*.tar"))) == 2


def test_a_row_that_points_to_another_file_is_noticed(found, tmp_path):
    (index,) = tmp_path.glob("*.index")
    rows = np.fromfile(index, shards.ROW)
    rows["offset"][0] = rows["offset"][2]
    rows["size"][0] = rows["size"][2]
    rows["offset"][1] = 2**60
    rows["size"][2] = 2**60
    rows.tofile(index)
    again = shards.Shards(str(tmp_path))
    for number in range(3):
        with pytest.raises((ValueError, OSError, MemoryError, tarfile.TarError)):
            read(again, number)


def test_a_shard_that_is_full_is_followed_by_another_and_a_fork_has_its_own(found, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 3000)
    for number in range(3, 9):
        found.append(name(number), content(number))
    assert len(list(tmp_path.glob("*.tar"))) == 3
    process = multiprocessing.get_context("fork").Process(target=found.append, args=(name(9), content(9)))
    process.start()
    process.join()
    found.append(name(10), content(10))
    assert len(list(tmp_path.glob("*.tar"))) == 4
    assert all(read(found, number) == [content(number)] for number in range(11) if number != 9)
    assert read(found, 9) == [content(9)]


def test_what_others_write_is_found_when_it_is_missed_and_the_last_look_is_long_ago(found, tmp_path, monkeypatch):
    other = shards.Shards(str(tmp_path))
    assert not found.places(name(9))
    other.append(name(9), content(9))
    assert not found.places(name(9))
    monkeypatch.setattr(shards, "REFRESH_SECONDS", -1)
    assert len(found.places(name(9))) == 1
    for path in tmp_path.iterdir():
        path.unlink()
    assert not found.names()
