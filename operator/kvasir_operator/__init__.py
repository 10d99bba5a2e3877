"""Kubernetes operator: decides which pods exist, in which role, and when one may go."""
