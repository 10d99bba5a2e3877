"""What holds for all tests."""

from hypothesis import HealthCheck, settings

# a busy machine is not a fault of the code: examples have no time limit of their own
settings.register_profile("kvasir", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("kvasir")
