"""Hold the Triton kernels, one file per kernel: the @triton.jit function and its launcher.

They are imported as movae_fast.kernels, through the relative symlink movae_fast/kernels.
"""
