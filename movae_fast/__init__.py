"""Train multi-objective variational autoencoders as fast as single-objective ones."""

__version__ = "0.1.0"
