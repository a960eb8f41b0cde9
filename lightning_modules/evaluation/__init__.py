"""Evaluations of frozen features, one file each, and the callbacks that run them during training."""
