"""Pure decisions: frozen values in, decisions out; no I/O, no clock, no randomness of its own."""
