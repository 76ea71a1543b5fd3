"""Latent reward models on Stable Diffusion 3.5, in JAX and Flax NNX."""

__version__ = "0.1.0"
