"""What one start found out is there for the next, and only where it holds."""

import json

import pytest
import torch
from octavo.workers.parallel import TensorParallel
from octavo.workers.start_record import Sizes, StartRecord
from triton import knobs

CPU = torch.device("cpu")
ALONE = TensorParallel(0, 1, CPU)
GIB = 1024**3
SIZES = Sizes(1000, (16, 32), (1, 2, 8))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "octavo-0.json"


def note_sizes(path, sizes=SIZES, free_bytes=70 * GIB):
    StartRecord(path).note_sizes(sizes.num_blocks, sizes.segments, sizes.decodes, free_bytes)


def compiled(path, name):
    """A kernel's files in Triton's cache, as its compiler names them."""
    folder = path.parent / name
    folder.mkdir()
    files = {suffix: folder / f"kernel.{suffix}" for suffix in ("json", "cubin", "ttir")}
    for file in files.values():
        file.touch()
    knobs.compilation.listener(
        src=None, metadata={}, metadata_group={f.name: str(f) for f in files.values()}, times=None, cache_hit=False
    )
    return files


def test_kernels_are_there_as_long_as_their_files_are(path):
    assert not StartRecord(path).has_kernels
    with StartRecord(path).noting_kernels():
        compiled(path, "first")
        files = compiled(path, "second")
    assert StartRecord(path).has_kernels
    files["ttir"].unlink()
    assert StartRecord(path).has_kernels
    files["cubin"].unlink()
    assert not StartRecord(path).has_kernels
    assert knobs.compilation.listener is None


def test_a_start_that_fails_notes_no_kernels(path):
    def fail():
        with StartRecord(path).noting_kernels():
            compiled(path, "first")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not StartRecord(path).has_kernels
    assert knobs.compilation.listener is None


def test_sizes_hold_for_a_device_that_is_as_free_as_it_was(path):
    assert StartRecord(path).agreed_sizes(ALONE, 70 * GIB) is None
    note_sizes(path)
    record = StartRecord(path)
    assert record.agreed_sizes(ALONE, 70 * GIB + 2**20) == SIZES
    assert record.agreed_sizes(ALONE, 69 * GIB) is None
    assert record.agreed_sizes(ALONE, 71 * GIB) is None
    assert record.agreed_sizes(ALONE, None) == SIZES  # the weights are there already


def test_a_rank_that_kept_its_weights_does_not_say_how_free_the_device_was(path):
    note_sizes(path)
    other = Sizes(900, (16,), ())
    note_sizes(path, other, None)
    assert StartRecord(path).agreed_sizes(ALONE, 70 * GIB) == other


def test_sizes_that_were_too_large_are_forgotten_and_kernels_are_not(path):
    with StartRecord(path).noting_kernels():
        compiled(path, "first")
    note_sizes(path)
    StartRecord(path).forget_sizes()
    record = StartRecord(path)
    assert record.agreed_sizes(ALONE, None) is None
    assert record.has_kernels


@pytest.mark.parametrize(
    "others", [SIZES, None, Sizes(999, (16, 32), (1, 2, 8)), Sizes(1000, (16,), (1, 2, 8)), Sizes(1000, (16, 32), ())]
)
def test_ranks_use_what_all_of_them_know(others, tmp_path, run_ranks):
    def run(tp):
        path = tmp_path / f"octavo-{tp.rank}.json"
        if (sizes := (SIZES, others)[tp.rank]) is not None:
            note_sizes(path, sizes)
        return StartRecord(path).agreed_sizes(tp, None)

    assert run_ranks(2, run) == ([SIZES] * 2 if others == SIZES else [None] * 2)


@pytest.mark.parametrize("content", ["", "[1]", "{", json.dumps({"sizes": None})])
def test_a_file_that_says_nothing_is_as_none(path, content):
    path.write_text(content)
    record = StartRecord(path)
    assert not record.has_kernels
    assert record.agreed_sizes(ALONE, None) is None


def test_what_cannot_be_kept_is_only_logged(path, caplog):
    path.parent.rmdir()
    path.parent.touch()
    note_sizes(path)
    assert "what this start found out is not kept" in caplog.text
