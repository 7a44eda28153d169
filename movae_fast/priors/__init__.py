"""Fit priors in a second stage to what a trained model encodes images to: codes, or vectors of latents."""
