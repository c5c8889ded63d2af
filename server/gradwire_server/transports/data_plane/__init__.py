"""The port for direct connections: accepting them, and giving them to calls."""

from gradwire_server.transports.data_plane.listener import (
    DataListener,
    make_data_listener,
)
from gradwire_server.transports.data_plane.offers import Connection, Offer

__all__ = ["Connection", "DataListener", "Offer", "make_data_listener"]
