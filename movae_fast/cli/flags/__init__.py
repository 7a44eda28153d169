"""Read the flags of every command, and check them as far as flags alone can be checked.

Nothing here imports torch, nor what imports it: help and mistyped flags are answered without. A module a
command; its `parse` returns what the command's `run` takes, or an exit status where it has printed what was
asked for.
"""
