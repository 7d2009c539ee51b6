"""The timings' sections: there, within ten minutes, as the proofs are."""

from benchmarks.gpu.sections import GROUPS, TIMINGS


def test_every_section_has_something_to_run():
    assert all(callable(section.load()) for section in TIMINGS)


def test_the_limits_add_up():
    for sections in GROUPS.values():
        assert sum(section.limit for section in sections) <= 600
