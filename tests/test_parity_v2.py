"""Model runner V2: runs `v2_cases.py`."""

from own_process import ON_V2, assert_all_pass


def test_model_runner_v2():
    assert_all_pass("v2_cases.py", 13, ON_V2)
