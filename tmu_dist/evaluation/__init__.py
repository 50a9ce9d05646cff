"""Scores, baselines, figures and reports of trained predictors."""
