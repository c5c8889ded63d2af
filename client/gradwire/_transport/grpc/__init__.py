"""Calls over gRPC, for programs that wait and for event loops."""
