"""The command kvasir."""
