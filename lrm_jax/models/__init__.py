"""The networks: backbones, heads, VAE, text encoders. Weights come from keymaps."""
