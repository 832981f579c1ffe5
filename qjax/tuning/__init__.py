"""Tuning the quantizer of a quantized network: its scales and biases learn, its codes stay."""
