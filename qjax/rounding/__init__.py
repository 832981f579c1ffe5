"""Rounding kernels to codes, once their ranges are chosen."""
