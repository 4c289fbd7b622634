"""Pure tensor maths: no modules, no files, no global state."""
