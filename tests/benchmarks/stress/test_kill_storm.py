import pytest

from prunevit.benchmarks.stress.kill_storm import KillStormConfig, storm


@pytest.mark.stress
def test_killed_runs_end_as_if_they_had_not_been(tmp_path):
    said = storm(KillStormConfig(kills=3, iterations=6), tmp_path)
    assert "of 3 runs" in said
    assert "all ended bit for bit" in said
