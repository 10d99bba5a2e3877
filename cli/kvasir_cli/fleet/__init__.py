"""A fleet on one machine: planned, started, watched and stopped."""
