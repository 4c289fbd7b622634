"""Running a model: forward passes, evaluation mode, hooks, memory formats, what is finite."""
