"""The contract's messages and stubs, generated from protos/gradwire/v1."""
