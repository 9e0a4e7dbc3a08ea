"""How hard the property tests look: enough to find what is wrong within seconds."""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("quick", max_examples=80, deadline=None, database=None)
settings.load_profile("quick")
