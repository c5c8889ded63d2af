"""What a job's header asks for, checked."""
