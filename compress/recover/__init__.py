"""Recovery: a compressed network learns from the original, on images without labels."""

from compress.recover.course import Course, Keep, Length, State, Task
from compress.recover.distance import Distance
from compress.recover.lessons import Division, divided
from compress.recover.search import begin

__all__ = ["Course", "Distance", "Division", "Keep", "Length", "State", "Task", "begin", "divided"]
