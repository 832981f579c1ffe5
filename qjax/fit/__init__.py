"""Fitting the layers of a network, one after the other."""
