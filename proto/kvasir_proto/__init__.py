"""Wire formats: protobuf messages, gRPC services and the internal token stream."""
