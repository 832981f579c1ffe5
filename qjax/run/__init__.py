"""Evaluating a network by rules for its layers and primitives."""
