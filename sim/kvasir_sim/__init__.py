"""Simulator: drives the production cores under a simulated clock."""
