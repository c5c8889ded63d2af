"""A device that works beside the thread that talks to it."""
