"""One job over many servers: a model of it, fed with measured figures."""
