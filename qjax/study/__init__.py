"""Measuring, comparing and explaining quantized networks."""
