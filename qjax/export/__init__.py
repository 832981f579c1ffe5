"""Quantized networks in the formats of other runtimes."""
