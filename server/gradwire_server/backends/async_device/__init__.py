"""Jobs on an asynchronous device."""
