"""Measurements on top of likelihood and samplers: speed, studies, and their dated results."""
