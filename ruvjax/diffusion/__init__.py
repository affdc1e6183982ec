"""Masked diffusion: schedules, corruption, training losses, likelihoods, certificates and the sampler."""
