"""Calls over gRPC, synchronous and asynchronous."""
