"""The artefact: one safetensors file whose header says how to rebuild the model."""
