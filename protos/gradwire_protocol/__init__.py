"""The protocol shared by SDK and server; it imports neither.

It holds the generated messages (`v1`, public as ``gradwire.v1``), the job header
(`job_spec`), matrices and element types (`matrices`, `dtypes`), the optimizers of
sessions (`optimizers`), the encoding of messages with elements (`framing`), error
reasons and their encoding (`error_reasons`, `error_details`), checksums (`checksum`)
and the limits of a message (`limits`). The package does no I/O.
"""

from gradwire_protocol.byte_order import require_little_endian
from gradwire_protocol.grpc_import import import_grpc

require_little_endian()
import_grpc()
