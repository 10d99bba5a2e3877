"""Inference engine and worker: decides what is computed in the next step."""
