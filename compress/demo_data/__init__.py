"""The embedded demo: the UCI digits, a network for them and its trained weights."""
