"""A pool of gradwire servers in a Ray cluster: one on each node.

Ray starts the servers, restarts them and finds their nodes; elements never pass through
it. `control` starts and stops a pool, as ``gradwire ray`` does. The pool is an actor
(`actors`) around plain objects that need no Ray: `pool` says what to start and stop,
`scaling` how many servers there should be, and `host` is one server.
"""
