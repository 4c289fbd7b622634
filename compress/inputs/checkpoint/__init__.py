"""Checkpoints as users have them: reading the file, and loading it without ignoring anything."""

from compress.inputs.checkpoint.loading import load_into
from compress.inputs.checkpoint.reading import ARTEFACT_KEY, Checkpoint, Pick, read_checkpoint

__all__ = ["ARTEFACT_KEY", "Checkpoint", "Pick", "load_into", "read_checkpoint"]
