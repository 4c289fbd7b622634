"""Fitting a plan's factors, then refitting them in order and jointly."""
