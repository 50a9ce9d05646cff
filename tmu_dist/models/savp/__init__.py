"""Stochastic adversarial video prediction (Lee et al. 2018)."""
