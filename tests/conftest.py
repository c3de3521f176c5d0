"""What holds for all tests."""

from hypothesis import settings

# How long an example takes is no promise of ours, and torch's first calls are slow.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
