"""The verbs of the command line, in order."""
