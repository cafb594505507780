"""A pretrained model: what FLORA, GaLore and LoRA do to it."""
