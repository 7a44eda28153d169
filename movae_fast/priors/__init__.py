"""Fit priors to what a trained model encodes, a second stage: over codes, and over vectors of latents."""
