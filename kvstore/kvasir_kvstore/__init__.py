"""KV tier: decides where KV blocks live, how they move and what is evicted."""
