"""Pictures and torchvision."""
