"""Which device a job runs on, and whose row block is next."""
