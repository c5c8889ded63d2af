"""What both sides of the contract agree on; it imports neither SDK nor server.

The generated messages (`v1`, public as ``gradwire.v1``), a job's header
(`job_spec`), matrices and element types (`matrices`, `dtypes`), the messages that
carry elements (`framing`), the reasons of errors and how they travel
(`error_reasons`, `error_details`), checksums (`checksum`), and the bounds of a
message (`limits`). Nothing here does I/O.
"""

from gradwire_protocol.byte_order import require_little_endian
from gradwire_protocol.grpc_import import import_grpc

require_little_endian()
import_grpc()
