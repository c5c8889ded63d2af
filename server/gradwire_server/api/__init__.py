"""The contract's methods: decode, call, encode."""
