"""The gRPC side: kvasir.v1.Inference, health and reflection."""
