"""The contract's generated messages and stubs, for clients of the bare service.

Example:
    >>> from gradwire.v1 import gradient_service_pb2_grpc, job_pb2
    >>> stub = gradient_service_pb2_grpc.GradientServiceStub(channel)
"""
