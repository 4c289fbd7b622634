"""Calibration: data streamed through hooked layers into statistics."""
