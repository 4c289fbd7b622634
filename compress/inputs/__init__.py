"""What a run is given: checkpoint, model, images, the user's own functions."""

from compress.inputs.load import Inputs, load_network

__all__ = ["Inputs", "load_network"]
