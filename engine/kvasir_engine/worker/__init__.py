"""The worker: one process with an engine, its gRPC and HTTP services and a KV data plane."""
