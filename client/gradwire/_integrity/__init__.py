"""Whether results are right: random checks on the client's side."""
