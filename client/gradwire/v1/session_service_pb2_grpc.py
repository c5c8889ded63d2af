"""Generated code of the contract; see `gradwire_protocol.v1`."""

from gradwire_protocol.v1.session_service_pb2_grpc import *  # noqa: F403 - all of it
