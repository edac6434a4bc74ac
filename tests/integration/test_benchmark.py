"""The benchmark measures what it says; how fast a machine is, no test says."""

import json
import sys

import pytest
from training import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
import benchmark  # noqa: E402


def test_speed_ups_are_shares_of_the_updates_at_the_cost_of_their_stage():
    proportional = benchmark.speed_ups({3: 3.0, 6: 6.0, 9: 9.0, 12: 12.0})
    assert proportional["prop"] == pytest.approx((4 / 3, 4 / 3)) and proportional["equal"] == pytest.approx((1.6, 1.6))
    # Half of an update at full depth is spent on what does not shrink.
    measured, _ = benchmark.speed_ups({3: 15.0, 6: 18.0, 9: 21.0, 12: 24.0})["prop"]
    assert measured == pytest.approx(24 / (0.1 * 15 + 0.2 * 18 + 0.3 * 21 + 0.4 * 24))


def test_every_stage_and_part_is_measured_and_written(monkeypatch, tmp_path, capsys):
    arguments = ["--size", "demo", "--batch", "1", "--seconds", "1", "--rounds", "1", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *arguments, "--output", str(tmp_path / "figures.json")])
    benchmark.main()
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert list(figures["stages"]) == ["3", "6", "9", "12"] and figures["weights"] == "random"
    for parts in figures["stages"].values():
        assert list(parts) == list(benchmark.PARTS) and all(seconds > 0 for seconds in parts.values())
    assert "| 12 |" in capsys.readouterr().out


def test_going_back_to_the_first_stage_gives_the_student_of_that_depth():
    arguments = benchmark.argparse.Namespace(size="demo", batch=1, seconds=1.0, precision="fp32", device="cpu")
    run = benchmark.Run(arguments)
    for _ in range(2):
        depths = [run.student.depth]
        while run.student.depth < 12:
            run.update()
            run.grow()
            depths.append(run.student.depth)
        assert depths == [3, 6, 9, 12]
        run.student.shrink()
