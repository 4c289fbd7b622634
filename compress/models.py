"""Building networks from model specs; the documented face of `compress.inputs.models`."""

from compress.inputs.models import build_model

__all__ = ["build_model"]
