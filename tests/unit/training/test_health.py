"""What the watch makes of clocks and silence."""

import os
from pathlib import Path

from training.health import FileClock, _silence


def test_a_clock_that_is_set_is_noticed_and_one_that_goes_is_not() -> None:
    clock = FileClock()
    assert not clock.jumped(1_000.0, 5.0, by_s=10)
    assert not clock.jumped(1_060.2, 65.0, by_s=10)
    assert clock.jumped(1_062.0 + 86_400, 67.0, by_s=10)
    assert not clock.jumped(1_064.0 + 86_400, 69.0, by_s=10)
    assert clock.jumped(1_066.0, 71.0, by_s=10), "and back"


def test_a_rank_is_silent_on_whichever_side_of_our_clock_its_last_file_is(tmp_path: Path) -> None:
    for rank, written_at in enumerate((1_000_000, 1_000_001, 900_000, 1_086_400)):
        path = tmp_path / f"rank-{rank:05d}.json"
        path.write_text("{}")
        os.utime(path, (written_at, written_at))
    assert _silence(tmp_path, 0) == {0: 0, 1: 1, 2: 100_000, 3: 86_400}
