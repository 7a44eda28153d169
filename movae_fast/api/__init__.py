"""Define what a Python program uses of the trainer: `movae_fast.train`, `load` and `evaluate`."""
