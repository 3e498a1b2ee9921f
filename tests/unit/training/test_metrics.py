"""The metrics file: whole lines, rank 0 alone, and nothing of what a lost worker wrote past its checkpoint."""

from pathlib import Path

from hone.run_folder import METRICS_FILE, LinesFollower, read_metrics
from training.launch import final_metrics
from training.metrics import MetricsFile


def test_a_resumed_run_drops_what_was_written_past_its_checkpoint(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path, rank=0, keep_steps=0, total_steps=9)
    for step in range(1, 6):
        first.write({"step": step, "loss": 1.0 / step})
    with MetricsFile(tmp_path, rank=0, keep_steps=3, total_steps=9) as resumed:
        resumed.write({"step": 4, "loss": 0.5})
    assert [m["step"] for m in read_metrics(tmp_path) if "loss" in m] == [1, 2, 3, 4]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    MetricsFile(tmp_path, rank=1, keep_steps=0, total_steps=9).write({"step": 1})
    assert read_metrics(tmp_path) == []


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1}]


def test_final_metrics_hold_the_first_and_the_last_validation(tmp_path: Path) -> None:
    with MetricsFile(tmp_path, rank=0, keep_steps=0, total_steps=2) as metrics:
        for line in ({"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 1.5}):
            metrics.write(line)
    final = final_metrics(tmp_path)
    assert (final["base_eval_loss"], final["eval_loss"], final["loss"]) == (3.0, 1.5, 1.0)


def test_a_follower_gives_each_whole_line_once_and_begins_anew_after_a_restart(tmp_path: Path) -> None:
    follower = LinesFollower(tmp_path / METRICS_FILE)
    assert follower.new_lines() == ([], False)
    first = MetricsFile(tmp_path, rank=0, keep_steps=0, total_steps=4)
    first.write({"step": 1, "loss": 2.0})
    assert follower.new_lines() == ([{"step": 0, "total_steps": 4}, {"step": 1, "loss": 2.0}], True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
        file.flush()
        assert follower.new_lines() == ([], False)
        file.write('ss": 1.0}\n')
    assert follower.new_lines() == ([{"step": 2, "loss": 1.0}], False)
    with MetricsFile(tmp_path, rank=0, keep_steps=1, total_steps=4):
        pass
    lines, is_new = follower.new_lines()
    assert ([line["step"] for line in lines], is_new) == ([0, 1, 1], True)
