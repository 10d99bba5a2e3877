"""The OpenAI HTTP API: chat completions, completions, models."""
