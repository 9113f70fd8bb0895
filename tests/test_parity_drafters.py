"""Speculative decoding: runs `v2_drafter_cases.py`."""

from own_process import ON_V2, assert_all_pass


def test_speculative_decoding():
    assert_all_pass("v2_drafter_cases.py", 5, ON_V2)
