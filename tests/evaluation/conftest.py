"""Fixtures of the tests of evaluation."""

from window_pair import one_thread

__all__ = ["one_thread"]
