"""What both sides of the contract agree on, beside the generated messages.

Names and shapes of the six matrices (`matrices`), element types (`dtypes`),
the messages that carry elements (`framing`), the reasons of errors and how
they travel (`reasons`, `status`), checksums (`checksum`), and the bounds of
a message (`limits`). Nothing here does I/O.
"""
