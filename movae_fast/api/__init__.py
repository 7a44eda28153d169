"""Define the trainer's functions for Python programs: `movae_fast.train`, `load` and `evaluate`."""
