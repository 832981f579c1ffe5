"""The integer evaluation of a quantized network."""
