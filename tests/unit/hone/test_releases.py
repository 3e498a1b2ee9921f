"""Aliases as releases: shares, stickiness, history, going back, and several who move one at once."""

import json
import multiprocessing
import random
from collections import Counter
from pathlib import Path

import pytest
from pydantic import ValidationError

from hone.aliases import Aliases
from hone.errors import CorruptAdapterError, GateError, RegistryError, UnknownAdapterError
from hone.ids import AdapterRef
from hone.promotion import Wishes, promote, roll_back, take_back
from hone.registry import Registry
from hone.releases import Alias, Release, RollbackPolicy, Target, percent, shared_out
from hone.storage import Home
from tests.manifests import Describe, weights
from tests.unit.hone.test_registry import publish

USERS = [f"user-{n}" for n in range(4000)]


def release(*weights: float, sticky: bool = False) -> Release:
    targets = tuple(Target(version=f"bot@{n}", digest=str(n), weight=weight) for n, weight in enumerate(weights, start=1))
    return Release(targets=targets, sticky=sticky, at="2026-01-01T00:00:00+00:00")


def counted(state: Release, **asked: str) -> Counter[str]:
    chance = random.Random(7)
    return Counter(state.pick(chance, **asked).version for _ in range(4000))


@pytest.fixture
def registry(home: Home, tmp_path: Path) -> Registry:
    """bot@1 to bot@4."""
    for n in range(4):
        publish(home, weights(tmp_path / str(n), float(n)))
    return Registry(home)


def shares(alias: Alias | None) -> dict[str, float]:
    assert alias is not None
    return {each.version: each.weight for each in alias.current.targets}


def test_requests_fall_to_versions_by_their_weights() -> None:
    picked = counted(release(0.7, 0.2, 0.1))
    # Four standard deviations of a share of 4,000 draws are at most 0.032.
    assert {version: n / 4000 for version, n in picked.items()} == pytest.approx({"bot@1": 0.7, "bot@2": 0.2, "bot@3": 0.1}, abs=0.032)


def test_a_sticky_user_stays_with_a_version_and_users_are_spread_by_weight() -> None:
    state = release(0.7, 0.3, sticky=True)
    chance = random.Random(0)
    picked = {user: state.pick(chance, alias="prod", user=user).version for user in USERS}
    assert picked == {user: state.pick(chance, alias="prod", user=user).version for user in USERS}
    assert Counter(picked.values())["bot@2"] / len(USERS) == pytest.approx(0.3, abs=0.03)
    elsewhere = [state.pick(chance, alias="other", user=user).version for user in USERS]
    assert elsewhere != list(picked.values())


def test_without_a_user_or_stickiness_a_request_falls_by_chance() -> None:
    assert set(counted(release(0.5, 0.5, sticky=True), alias="prod")) == {"bot@1", "bot@2"}
    assert set(counted(release(0.5, 0.5), alias="prod", user="ann")) == {"bot@1", "bot@2"}


def test_a_larger_share_moves_users_only_to_the_version_that_got_it() -> None:
    chance = random.Random(0)
    before, after = release(0.6, 0.3, 0.1, sticky=True), release(0.4, 0.2, 0.4, sticky=True)
    moves = {
        (was, now)
        for user in USERS
        if (was := before.pick(chance, alias="prod", user=user).version) != (now := after.pick(chance, alias="prod", user=user).version)
    }
    assert moves == {("bot@1", "bot@3"), ("bot@2", "bot@3")}


def test_a_share_is_taken_from_the_others_in_proportion() -> None:
    targets = shared_out(release(0.6, 0.3, 0.1).targets, "bot@3", "3", 0.4)
    assert [(each.version, each.weight) for each in targets] == [("bot@1", 0.4), ("bot@2", 0.2), ("bot@3", 0.4)]
    assert [each.version for each in shared_out(targets, "bot@9", "9", 1)] == ["bot@9"]
    with pytest.raises(RegistryError, match="no other version answers the rest"):
        shared_out((), "bot@1", "1", 0.5)
    thirds = shared_out(shared_out(release(1).targets, "bot@2", "2", 1 / 3), "bot@3", "3", 1 / 3)
    assert sum(each.weight for each in thirds) == pytest.approx(1, abs=1e-9)
    assert percent(thirds[0].weight) == "44.4445%"


@pytest.mark.parametrize("wrong", [(0.5, 0.4), (0.9, 0.2), (1.0, 0.0)])
def test_weights_that_are_no_shares_of_a_whole_are_refused(wrong: tuple[float, ...]) -> None:
    with pytest.raises(ValidationError):
        release(*wrong)


def test_a_canary_grows_and_what_is_not_said_stays(registry: Registry) -> None:
    promote(registry, "prod", "bot@1", wishes=Wishes(sticky=True, rollback=RollbackPolicy(error_rate=0.05)))
    promote(registry, "prod", "bot@2", wishes=Wishes(share=0.1, shadow=("bot@3", 0.5)), by="ann@home", why="canary")
    alias = promote(registry, "prod", "bot@3", wishes=Wishes(share=0.2))
    assert shares(alias) == {"bot@1": 0.72, "bot@2": 0.08, "bot@3": 0.2}
    assert alias.current.sticky
    assert alias.current.rollback == RollbackPolicy(error_rate=0.05)
    assert alias.current.shadow is None, "it answers now"
    assert (alias.state(2).by, alias.state(2).why) == ("ann@home", "canary")
    assert alias.state(2).says() == "bot@1 90%, bot@2 10%, sticky, shadow bot@3 of 50%, back past 5% errors of 20 or more in 60 s"
    assert alias == Registry(Home(registry.root.parent)).alias("prod"), "as the file has it"
    assert str(registry.resolve("prod").ref) == "bot@1"
    assert "@" in alias.state(1).by
    ended = promote(registry, "prod", "bot@3", wishes=Wishes(sticky=False, shadow=None, rollback=None)).current
    assert (ended.sticky, ended.rollback, [each.version for each in ended.targets]) == (False, None, ["bot@3"])


def test_versions_that_cannot_share_an_alias_are_told_apart(registry: Registry, tmp_path: Path) -> None:
    class Other(Describe):
        def __call__(self, version, files):  # type: ignore[no-untyped-def]
            return super().__call__(version, files).model_copy(update={"task": "completion"})

    registry.publish(weights(tmp_path / "other"), "writer", describe=Other("writer"))
    promote(registry, "prod", "bot@1")
    with pytest.raises(RegistryError, match="one alias is of one task"):
        promote(registry, "prod", "writer@1", wishes=Wishes(share=0.5))
    with pytest.raises(RegistryError, match="one alias is of one task"):
        promote(registry, "prod", "bot@1", wishes=Wishes(shadow=("writer@1", 0.5)))
    with pytest.raises(RegistryError, match="a shadow is another version"):
        promote(registry, "prod", "bot@1", wishes=Wishes(shadow=("bot@1", 0.5)))
    with pytest.raises(RegistryError, match="versions never change"):
        promote(registry, "prod@2", "bot@1")
    with pytest.raises(UnknownAdapterError):
        promote(registry, "prod", "bot@9")
    assert shares(registry.alias("prod")) == {"bot@1": 1}
    with pytest.raises(GateError, match=r"who calls 'prod' would be told so; 'prod' goes on meaning bot@1\. `hone adapters promote prod"):
        promote(registry, "prod", "writer@1")
    moved = promote(registry, "prod", "writer@1", force=True)
    assert shares(moved) == {"writer@1": 1}
    assert "one alias is of one task" in moved.current.forced[0]


def test_a_move_that_changes_nothing_is_none(registry: Registry) -> None:
    promote(registry, "prod", "bot@1")
    first = promote(registry, "prod", "bot@2", why="first")
    assert promote(registry, "prod", "bot@2", why="again", force=True) == first
    assert promote(registry, "prod", "bot@2", wishes=Wishes(sticky=False)) == first
    assert shares(roll_back(registry, "prod")) == {"bot@1": 1}


def test_going_back_passes_over_states_that_answer_the_same(registry: Registry) -> None:
    promote(registry, "prod", "bot@1")
    alias = promote(registry, "prod", "bot@2")
    registry.alias_files.write("prod", alias.then(alias.current).then(alias.current))  # as they were written once
    assert shares(roll_back(registry, "prod")) == {"bot@1": 1}
    with pytest.raises(RegistryError, match="nothing to go back to"):
        roll_back(registry, "prod")


def test_a_version_that_answers_or_shadows_is_not_removed(registry: Registry) -> None:
    promote(registry, "prod", "bot@1", wishes=Wishes(shadow=("bot@3", 1.0)))
    promote(registry, "prod", "bot@2", wishes=Wishes(share=0.1))
    for version in (1, 2, 3):
        with pytest.raises(RegistryError, match="alias 'prod' points at it"):
            registry.remove(AdapterRef("bot", version))
    registry.remove(AdapterRef("bot", 4))


def test_going_back_twice_does_not_come_back_to_what_was_left(registry: Registry) -> None:
    for n in (1, 2, 3):
        promote(registry, "prod", f"bot@{n}")
    assert shares(roll_back(registry, "prod")) == {"bot@2": 1}
    back = roll_back(registry, "prod", why="also bad")
    assert (shares(back), back.current.restores, back.current.why) == ({"bot@1": 1}, 1, "also bad")
    with pytest.raises(RegistryError, match="nothing to go back to"):
        roll_back(registry, "prod")
    assert shares(roll_back(registry, "prod", to=3)) == {"bot@3": 1}
    assert shares(roll_back(registry, "prod")) == {"bot@2": 1}, "before a restored state is what was before it"
    with pytest.raises(RegistryError, match="no state 99; there are 1 to 7"):
        roll_back(registry, "prod", to=99)
    with pytest.raises(UnknownAdapterError, match="no alias 'nobody'"):
        roll_back(registry, "nobody")


def test_a_state_whose_version_is_gone_is_not_brought_back(registry: Registry) -> None:
    promote(registry, "prod", "bot@1")
    promote(registry, "prod", "bot@2")
    registry.remove(AdapterRef("bot", 1))
    with pytest.raises(UnknownAdapterError, match="bot@1"):
        roll_back(registry, "prod")
    assert shares(registry.alias("prod")) == {"bot@2": 1}


def test_a_failing_version_is_left_at_once_however_far_it_had_come(registry: Registry) -> None:
    promote(registry, "prod", "bot@1")
    for share in (0.1, 0.5, 1.0):
        promote(registry, "prod", "bot@2", wishes=Wishes(share=share))
    moved = take_back(registry, "prod", "bot@2", seen=4, by="server", why="9% errors")
    assert (shares(moved), moved.current.restores) == ({"bot@1": 1}, 1)  # type: ignore[union-attr]
    assert take_back(registry, "prod", "bot@2", seen=4, by="another server", why="late") is None
    assert take_back(registry, "prod", "bot@1", seen=5, by="server", why="it too") is None, "never on to what was rolled back from"
    assert registry.alias("prod").number == 5  # type: ignore[union-attr]


def test_aliases_of_the_first_format_are_read_and_moved(registry: Registry) -> None:
    moves = [{"target": f"bot@{n}", "digest": registry.resolve(f"bot@{n}").digest, "at": "2026-01-01T00:00:00+00:00"} for n in (1, 2)]
    folder = registry.root / ".aliases"
    folder.mkdir()
    (folder / "prod.json").write_text(json.dumps({"target": "bot@2", "history": moves}))
    assert registry.aliases() == {"prod": "bot@2"}
    assert str(registry.resolve("prod").ref) == "bot@2"
    assert shares(roll_back(registry, "prod")) == {"bot@1": 1}
    written = json.loads((folder / "prod.json").read_text())
    assert (written["target"], len(written["history"])) == ("bot@1", 3)


@pytest.mark.parametrize("content", ["", "{}", '{"history": []}', '{"history": [{"at": "x", "targets": []}]}', "\0"])
def test_a_damaged_alias_is_named(registry: Registry, content: str) -> None:
    folder = registry.root / ".aliases"
    folder.mkdir()
    (folder / "prod.json").write_text(content)
    with pytest.raises(CorruptAdapterError, match=r"prod\.json"):
        registry.alias("prod")


def test_a_reader_sees_every_move_though_it_reads_no_file_twice(registry: Registry) -> None:
    reader = Aliases(registry.root / ".aliases")
    for n in (1, 2, 3, 4, 1, 2):
        promote(registry, "prod", f"bot@{n}")
        assert reader.read("prod") == registry.alias("prod")
        assert reader.read("prod") is reader.read("prod")
    registry.remove_alias("prod")
    assert reader.read("prod") is None


def test_moves_at_the_same_time_are_all_kept(registry: Registry) -> None:
    context = multiprocessing.get_context("spawn")
    movers = [context.Process(target=_promote_often, args=(registry.root.parent, n)) for n in (1, 2, 3)]
    for mover in movers:
        mover.start()
    for mover in movers:
        mover.join(60)
    assert [mover.exitcode for mover in movers] == [0, 0, 0]
    alias = registry.alias("prod")
    assert alias is not None
    assert Counter(state.why for state in alias.history) == {f"{n}-{turn}": 1 for n in (1, 2, 3) for turn in range(20)}


def test_a_mover_that_dies_leaves_no_lock(registry: Registry) -> None:
    promote(registry, "prod", "bot@1")
    context = multiprocessing.get_context("spawn")
    holds = context.Event()
    mover = context.Process(target=_hold, args=(registry.root, holds))
    mover.start()
    assert holds.wait(60)
    mover.kill()
    mover.join(60)
    assert shares(promote(registry, "prod", "bot@2")) == {"bot@2": 1}


def test_who_waits_too_long_for_a_lock_is_told(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hone.aliases.LOCK_WAIT_S", 0.1)
    promote(registry, "prod", "bot@1")
    with registry.alias_files.locked("prod"), pytest.raises(RegistryError, match="being moved by another process"):
        promote(registry, "prod", "bot@2")


def _promote_often(home: Path, n: int) -> None:
    registry = Registry(Home(home))
    for turn in range(20):
        shadow = "bot@4", (turn + 1) / 100  # each differs from the one before it, whoever made that
        promote(registry, "prod", f"bot@{n}", wishes=Wishes(shadow=shadow), why=f"{n}-{turn}")


def _hold(root: Path, holds: object) -> None:
    with Aliases(root / ".aliases").locked("prod"):
        holds.set()  # type: ignore[attr-defined]
        multiprocessing.get_context("spawn").Event().wait(60)
