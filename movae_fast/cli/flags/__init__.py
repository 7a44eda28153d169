"""Read and check the flags of every command without importing torch, so that --help and flag errors come
quickly.

There is one module per command. Its `parse` returns the argument of the command's `run`, or an exit status if
it has already printed what was asked for, such as a help text. Checks that need torch, a device or a file of
weights come later, in `run`.
"""
