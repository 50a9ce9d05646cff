"""Stochastic adversarial video prediction (Lee et al. 2018; models_spec B4)."""
