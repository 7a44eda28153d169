"""Evaluate a trained model: likelihoods, image quality, rate and distortion, disentanglement, samples."""
