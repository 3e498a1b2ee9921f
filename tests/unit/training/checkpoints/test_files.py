"""Files of a checkpoint: anyone's safetensors, read in any cut, told from damaged ones, and kept or removed whole."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem
from safetensors.torch import load_file

from hone.errors import ResourceError
from hone.folder import Folder
from training.checkpoints.files import (
    INDEX,
    Checkpoint,
    DamagedCheckpointError,
    Part,
    PieceReader,
    check_part,
    find,
    folder_name,
    keep,
    key_of,
    read_index,
    write_index,
    write_part,
)


@pytest.fixture(params=["path", "filesystem", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Folder]:
    """A folder by its path, one in a file system that knows paths of its own alone, and one in an object store."""
    if request.param == "path":
        yield Folder(tmp_path / "checkpoints")
    elif request.param == "s3":
        store = request.getfixturevalue("store")
        yield Folder(store.uri(f"{store.new_bucket()}/checkpoints"))
    else:
        yield Folder("checkpoints", filesystem=SubTreeFileSystem(str(tmp_path), LocalFileSystem()))


def cut(tensor: torch.Tensor, places: list[int]) -> dict[str, torch.Tensor]:
    """A flat tensor in runs that begin at these places."""
    ends = [*places[1:], tensor.numel()]
    return {key_of("weight", "a.b", start): tensor[start:end] for start, end in zip(places, ends, strict=True)}


def made(root: Folder, step: int, *, attempt: int = 1) -> Folder:
    folder = root.below(folder_name(step, attempt))
    part = write_part(folder, "part-00000.safetensors", {key_of("weight", "a.b", 0): torch.full((4,), float(step))})
    write_index(folder, Checkpoint(step=step, attempt=attempt, loss=1.0, world_size=1, guard={}, adam_steps={}, parts=[part]))
    return folder


def test_a_part_is_a_safetensors_file_like_any_other(tmp_path: Path) -> None:
    tensors = {
        "float": torch.randn(3, 5),
        "half": torch.randn(7).bfloat16(),
        "number": torch.tensor(3),
        "none": torch.empty(0),
        "yes": torch.tensor([True, False, True]),
    }
    part = write_part(Folder(tmp_path), "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
    assert part.size == (tmp_path / "x.safetensors").stat().st_size
    check_part(Folder(tmp_path), part)


@pytest.mark.parametrize("wanted", [(0, 100), (0, 1), (31, 34), (99, 100), (10, 90)])
def test_any_run_is_read_from_whatever_parts_it_was_written_in(root: Folder, wanted: tuple[int, int]) -> None:
    tensor = torch.arange(100, dtype=torch.float32)
    runs = list(cut(tensor, [0, 1, 33, 40]).items())
    parts = [write_part(root, f"part-{n}.safetensors", dict(runs[n::2])) for n in range(2)]
    reader, values = PieceReader(root, parts), torch.empty(wanted[1] - wanted[0])
    reader.fill("weight/a.b", wanted[0], values)
    assert torch.equal(values, tensor[slice(*wanted)])


@pytest.mark.parametrize("rank", range(8))
def test_a_rank_of_as_many_looks_into_its_own_part_alone(tmp_path: Path, rank: int) -> None:
    root, names = Folder(tmp_path), [f"part-{n}.safetensors" for n in range(8)]
    parts = [write_part(root, name, {key_of("weight", "a", 10 * n): torch.full((10,), float(n))}) for n, name in enumerate(names)]
    for name in set(names) - {names[rank]}:
        (tmp_path / name).unlink()
    reader, values = PieceReader(root, parts, place=rank / 8), torch.empty(10)
    reader.fill("weight/a", 10 * rank, values)
    assert values.tolist() == [rank] * 10


def test_what_all_ranks_share_is_looked_for_in_the_first_part_next(tmp_path: Path) -> None:
    root = Folder(tmp_path)
    parts = [write_part(root, f"part-{n}", {key_of("buffer", "mean", 0): torch.ones(3)} if n == 0 else {}) for n in range(8)]
    for n in set(range(8)) - {0, 5}:
        (tmp_path / f"part-{n}").unlink()
    reader, values = PieceReader(root, parts, place=5 / 8), torch.empty(3)
    reader.fill("buffer/mean", 0, values)
    assert values.tolist() == [1, 1, 1]


def test_what_is_in_no_part_is_said(root: Folder) -> None:
    part = write_part(root, "x.safetensors", cut(torch.zeros(10), [0]))
    reader = PieceReader(root, [part])
    with pytest.raises(DamagedCheckpointError, match=r"has 2 of 5 elements of weight/a\.b from 8 on"):
        reader.fill("weight/a.b", 8, torch.empty(5))
    with pytest.raises(DamagedCheckpointError, match="has 0 of 1 elements of exp_avg/a"):
        reader.fill("exp_avg/a", 0, torch.empty(1))


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "bytes, and"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1])), "its bytes have changed"),
        (lambda path: path.unlink(), "is gone"),
    ],
)
def test_a_harmed_part_is_noticed(tmp_path: Path, harm: object, said: str) -> None:
    part = write_part(Folder(tmp_path), "x.safetensors", {"a": torch.randn(100)})
    harm(tmp_path / "x.safetensors")  # type: ignore[operator]
    with pytest.raises(DamagedCheckpointError, match=said):
        check_part(Folder(tmp_path), part)


def test_a_checkpoint_is_one_once_its_index_is_there(root: Folder) -> None:
    made(root, 20)
    made(root, 5)
    write_part(root.below(folder_name(30, 1)), "part-00000.safetensors", {})
    assert find(root) == [folder_name(20, 1), folder_name(5, 1)]
    assert read_index(root.below(folder_name(5, 1))).step == 5
    assert find(root.below("nowhere")) == []


OLD = {"format": 99, "step": 3, "attempt": 1, "loss": 1, "world_size": 1, "guard": {}, "adam_steps": {}, "parts": []}


@pytest.mark.parametrize("text", ["", '{"step": 3', json.dumps(OLD)])
def test_an_index_that_cannot_be_read_is_damage(root: Folder, text: str) -> None:
    root.write(INDEX, text.encode())
    with pytest.raises(DamagedCheckpointError, match=INDEX):
        read_index(root)


def test_the_newest_and_the_best_are_kept(root: Folder) -> None:
    for step in (10, 20, 30, 40, 50):
        made(root, step)
    write_part(root.below(folder_name(15, 1)), "part-00000.safetensors", {})  # begun, and never completed
    write_part(root.below(folder_name(60, 1)), "part-00000.safetensors", {})  # being written
    keep(root, last=2, best_step=20)
    assert find(root) == [folder_name(step, 1) for step in (50, 40, 20)]
    assert sorted(root.folders()) == [folder_name(step, 1) for step in (20, 40, 50, 60)]


def test_a_later_attempt_s_checkpoint_of_the_same_step_comes_first(root: Folder) -> None:
    made(root, 10, attempt=2)
    made(root, 10, attempt=1)
    assert find(root) == [folder_name(10, 2), folder_name(10, 1)]


def test_a_store_that_there_is_no_file_system_for_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"^nope://bucket: cannot be opened"):
        Folder("nope://bucket")


def test_parts_are_compared_by_what_was_meant_to_be_written(tmp_path: Path) -> None:
    part = write_part(Folder(tmp_path), "x.safetensors", {"a": torch.zeros(4)})
    assert part == Part(name="x.safetensors", size=part.size, sha256=part.sha256)
    again = write_part(Folder(tmp_path), "y.safetensors", {"a": torch.zeros(4)})
    assert again.sha256 == part.sha256
