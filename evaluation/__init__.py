"""Measurements on top of training, likelihood and samplers: speed, studies, sweeps, baselines, dated results."""
