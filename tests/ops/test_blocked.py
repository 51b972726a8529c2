"""blocked: what it keeps between calls."""

from nat_models.ops.backends import blocked


def test_plans_are_cached_within_bounds():
    assert blocked._plan_of.cache_info().maxsize == 64
