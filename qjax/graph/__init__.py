"""The network as layers, read from its jaxpr."""
