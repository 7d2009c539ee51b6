"""The timings' sections: there, and together with the proofs within eight minutes."""

from benchmarks.gpu.sections import SECTIONS, TIMINGS


def test_every_section_has_something_to_run():
    assert all(callable(section.load()) for section in TIMINGS)


def test_the_limits_add_up():
    assert sum(section.limit for section in SECTIONS) <= 480
