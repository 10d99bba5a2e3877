"""Generated protobuf and gRPC stubs of package kvasir.v1 (make gen)."""
