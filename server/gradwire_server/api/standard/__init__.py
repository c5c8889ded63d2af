"""gRPC's standard services: health, reflection, channelz."""
