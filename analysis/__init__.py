"""Figures and reports, made from run records alone."""
