"""Measurements. Never asserted by a test: figures depend on the machine, correctness does not."""
