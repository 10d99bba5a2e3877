"""Model folders: fetched, imported from GGUF files, or made with random weights."""
