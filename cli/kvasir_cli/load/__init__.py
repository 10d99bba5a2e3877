"""Load on a serving fleet: prompts made, requests sent, times summed up."""
