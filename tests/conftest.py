"""What all suites share."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# Time says how loaded a machine is, and nothing about the product.
settings.register_profile(
    "suite", deadline=None, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("suite")
