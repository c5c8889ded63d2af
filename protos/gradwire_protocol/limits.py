"""Bounds that the contract puts on messages."""

MIB = 1 << 20

MAX_PAYLOAD_BYTES = 4 * MIB
"""Largest payload of a Block."""

DEFAULT_BLOCK_BYTES = MIB
"""Payload of a Block unless the receiver asks for another size."""

FRAMING_BYTES = 64 * 1024
"""Room beside a payload for everything else that a message holds."""

MAX_MESSAGE_BYTES = MAX_PAYLOAD_BYTES + FRAMING_BYTES
"""Receive limit that both sides set on their channels."""

MAX_COMPUTE_BYTES = MAX_PAYLOAD_BYTES - FRAMING_BYTES
"""Most elements, in bytes, in a request or a response of Compute: with what
else they hold, both stay below the 4 MiB that gRPC takes by default."""

MAX_INT64 = 2**63 - 1
"""Largest value of a size, a count or an index on the wire."""

MAX_JOB_ID_LENGTH = 128
"""Characters of a job's id."""

SERVICE = "gradwire.v1.GradientService"
"""Full name of the service."""

COMPUTE = f"/{SERVICE}/Compute"
COMPUTE_STREAM = f"/{SERVICE}/ComputeStream"
OPEN_REGION = f"/{SERVICE}/OpenRegion"
GET_SERVER_INFO = f"/{SERVICE}/GetServerInfo"

CONTRACT = "gradwire.v1"
"""The contract's name and version."""

RESUME = "resume"
"""Name of the feature of jobs that go on where others were cut off."""

SHARED_MEMORY = "shared-memory"
"""Name of the feature of servers that share memory with clients."""

SHARED_ALIGNMENT = 64
"""Bytes of which every offset in shared memory is a multiple: a cache line."""
