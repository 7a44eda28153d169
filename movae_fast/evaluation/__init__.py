"""What a trained model is worth: likelihoods, image quality, rate and distortion, disentanglement, samples."""
