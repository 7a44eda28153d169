"""Hold the Triton kernels, one file each: the @triton.jit function and its launcher.

Imported as movae_fast.kernels, by way of the relative symlink movae_fast/kernels.
"""
