"""The Open Inference Protocol over gRPC, and health and reflection beside it. Imported only where a port is set."""
