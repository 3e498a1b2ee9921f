"""Tokens of a set of files, made once under the digest of everything that shapes them, whoever asks first.

A folder of shards appears in one rename when all of it is there. Processes that want the same tokens at once wait for the one that makes
them; when it dies, its lock dies with it and the next one begins anew in a folder of its own.
"""

import gc
import json
import logging
import os
import pickle
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hone.base_model import BaseModel, tokenizer_fingerprint
from hone.data.cache import SHARDS_FILE, mark_used, token_folder, token_lock
from hone.data.files import MEDIA, DataFile, check_unchanged
from hone.data.gate import Look
from hone.data.parts import Part, bundled, numbers_in
from hone.data.readers import sha256_of
from hone.data.rows import named_media
from hone.errors import HoneError, ResourceError
from hone.recipe import Recipe
from hone.storage import Home, digest_of, new_folder, write_json
from models.tasks import TASKS
from training.tokenise import Shard, Tokenising, longest, tokenise

LAYOUT = 3
"""Raised whenever the same inputs would make different shards."""
HASHING_THREADS = 8

Watch = Callable[[str, int, int], object]
"""Told of which data how many bytes are done, and of how many."""


def unwatched(_name: str, _done: int, _total: int) -> None:
    """Nobody is told."""


@dataclass(frozen=True)
class Tokens:
    """A data set's tokens, on disk."""

    digest: str
    folder: Path
    shards: list[Path]

    @cached_property
    def look(self) -> Look:
        """What was seen of the rows; read only where a split has yet to be made."""
        return Look.load(self.folder)


def tokens_of(files: Sequence[DataFile], recipe: Recipe, base: BaseModel, *, columns: dict[str, str], home: Home, watch: Watch) -> Tokens:
    """Tokenise files, or find that done.

    Raises:
        DataError: a file that cannot be read at all, or that is written to meanwhile.
        ResourceError: a node that does not see the home.
    """
    data, task = recipe.data, TASKS[recipe.task]
    shaping: dict[str, Any] = {
        "task": recipe.task,
        "columns": columns,
        "group_by": data.group_by,
        "max_length": longest(recipe, base),
        "keeps_text": data.augment.text is not None,
    }
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        fingerprints = [[sha, f.name, f.kind, f.class_folder] for sha, f in zip(pool.map(sha256_of, files), files, strict=True)]
    media: list[Any] = []
    if task.shape in MEDIA:
        media = [list(each) for each in named_media(files, shape=task.shape, columns=columns)]
    tokenizer, near_rows = tokenizer_fingerprint(base.folder), data.near_duplicate_rows
    versions = [version(library) for library in ("tokenizers", "transformers")]
    digest = digest_of(
        {
            "layout": LAYOUT,
            "versions": versions,
            "files": fingerprints,
            "media": media,
            "tokenizer": tokenizer,
            "near_rows": near_rows,
            **shaping,
        }
    )
    folder = token_folder(home, digest)
    if not (folder / SHARDS_FILE).exists():
        task.load_processor(base.folder)  # what is wrong with it is better said before workers start
        with _alone(token_lock(home, digest)):
            if not (folder / SHARDS_FILE).exists():
                with new_folder(folder) as staging:
                    work = Tokenising(**shaping, base_folder=base.folder, folder=staging)
                    _make(bundled(files), work, near_rows=near_rows, watch=watch)
                    check_unchanged(files)
    mark_used(folder)
    made = json.loads((folder / SHARDS_FILE).read_text(encoding="utf-8"))
    return Tokens(digest, folder, [folder / name for name in made["shards"]])


def _make(bundles: Sequence[list[Part]], work: Tokenising, *, near_rows: int, watch: Watch) -> None:
    """All shards, and what was seen of the rows; in order, whichever is done first."""
    sizes = [sum(part.size for part in bundle) for bundle in bundles]
    name, done = bundles[0][0].file.name, 0
    watch(name, done, sum(sizes))
    shards: dict[int, Shard] = {}
    for number, shard in _shards(bundles, _shares(bundles, near_rows), work):
        shards[number] = shard
        done += sizes[number]
        watch(name, done, sum(sizes))
    look = Look(unit=TASKS[work.task].unit)
    for number in sorted(shards):
        look.join(shards[number].look)
    look.save(work.folder)
    write_json(
        work.folder / SHARDS_FILE,
        {
            "shards": [shards[number].name for number in sorted(shards)],
            "rows": sum(shard.rows for shard in shards.values()),
            "files": list(dict.fromkeys(part.file.name for bundle in bundles for part in bundle)),
        },
    )


def _shares(bundles: Sequence[list[Part]], near_rows: int) -> list[int]:
    """For each bundle, how many of its rows may be among the first `near_rows` of all."""
    shares, left = [], near_rows
    for bundle in bundles:
        shares.append(left)
        if left:  # a file that is not parted is not counted either: as if its rows were long
            left = max(0, left - sum(numbers_in(part) or part.size // 16_384 for part in bundle))
    return shares


def _shards(bundles: Sequence[list[Part]], near_rows: Sequence[int], work: Tokenising) -> Iterator[tuple[int, Shard]]:
    """Each bundle's shard as it is done: over the cluster by Ray Data, or here where there is but one."""
    import ray

    if len(bundles) == 1 or not ray.is_initialized():
        for number, bundle in enumerate(bundles):
            yield number, tokenise(bundle, number, work, near_rows=near_rows[number])
        return
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # Pickled here: Ray Data would try to make Arrow columns of them first, and say that it could not.
    numbered = [{"number": number, "bundle": pickle.dumps(bundle), "near_rows": near_rows[number]} for number, bundle in enumerate(bundles)]
    done = ray.data.from_items(numbered, override_num_blocks=len(bundles)).map(partial(_tokenise_row, work=work), num_cpus=1)
    for row in done.iter_rows():
        shard = pickle.loads(row["shard"])
        if isinstance(shard, HoneError):
            raise shard
        yield row["number"], shard


def _tokenise_row(row: dict[str, Any], *, work: Tokenising) -> dict[str, Any]:
    """One bundle, on a worker of Ray Data. What the user has to mend is an answer: what is raised, Ray would wrap and retry."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one CPU was asked for
    gc.freeze()  # what is loaded by now lives on, and need not be looked through while rows come and go
    shard: Shard | HoneError
    try:
        shard = tokenise(pickle.loads(row["bundle"]), row["number"], work, near_rows=row["near_rows"])
    except HoneError as error:
        shard = error
    except OSError as error:
        shard = ResourceError(f"{work.folder}: cannot be written on node {socket.gethostname()} ({error.strerror})")
    return {"number": row["number"], "shard": pickle.dumps(shard)}


@contextmanager
def _alone(lock: FileLock) -> Iterator[None]:
    """The block runs while no other process has the lock."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print("another process is preparing the same data; waiting for it", file=sys.stderr)  # noqa: T201
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
