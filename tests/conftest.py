"""One profile for hypothesis: the same examples on every run, and not too many."""

from hypothesis import HealthCheck, settings

settings.register_profile(
    "gateway",
    derandomize=True,
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("gateway")
