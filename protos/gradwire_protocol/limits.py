"""Limits and names of the contract."""

MIB = 1 << 20

MAX_PAYLOAD_BYTES = 4 * MIB
"""Largest payload of a Chunk."""

DEFAULT_CHUNK_BYTES = MIB
"""Default payload of a Chunk."""

FRAMING_BYTES = 64 * 1024
"""Bytes reserved for the rest of a message beside its payload."""

MAX_MESSAGE_BYTES = MAX_PAYLOAD_BYTES + FRAMING_BYTES
"""Receive limit of client and server channels."""

MAX_COMPUTE_BYTES = MAX_PAYLOAD_BYTES - FRAMING_BYTES
"""Most bytes of elements in a Compute request or response. The complete messages
stay below gRPC's default limit of 4 MiB."""

MAX_INT64 = 2**63 - 1
"""Largest value of a size, a count or an index on the wire."""

QUEUED_EVERY_S = 15.0
"""Longest time in seconds between two Queued messages of a job that waits."""

MAX_JOB_ID_LENGTH = 128
"""Maximum length of a job id in characters."""

SERVICE = "gradwire.v1.GradientService"
"""Full name of the service."""

SESSION_SERVICE = "gradwire.v1.SessionService"
"""Full name of the service of sessions."""

COMPUTE = f"/{SERVICE}/Compute"
COMPUTE_STREAM = f"/{SERVICE}/ComputeStream"
OPEN_REGION = f"/{SERVICE}/OpenRegion"
GET_SERVER_INFO = f"/{SERVICE}/GetServerInfo"
PUT_TENSOR = f"/{SESSION_SERVICE}/PutTensor"
GET_TENSOR = f"/{SESSION_SERVICE}/GetTensor"

REPORT_KEY = "gradwire-report"
"""Metadata of GetServerInfo with which a client reports a failure that it has found."""

REPORT_JOB_KEY = "gradwire-report-job"
"""Metadata with the id of the job that the report is about."""

DAMAGED, WRONG = "damaged", "wrong"
REPORTS = (DAMAGED, WRONG)
"""What can be reported: elements with a wrong checksum, and wrong results."""

CONTRACT = "gradwire.v1"
"""The contract's name and version."""

RESUME = "resume"
"""Feature name for continuing interrupted jobs."""

BLOCK_ROWS = "block-rows"
"""Feature name for jobs that limit the rows of a block."""

SEGMENTS = "segments"
"""Feature name for jobs whose dW and dB are summed in segments."""

EARLY_ROWS = "early-rows"
"""Feature name for operands that are sent before the job is accepted."""

DIRECT = "direct"
"""Feature name for elements on direct connections."""

SESSIONS = "sessions"
"""Feature name for sessions."""

FROZEN_TENSORS = "frozen-tensors"
"""Feature name for tensors that never change, and that sessions share."""

SESSION_STATE = "session-state"
"""Feature name for states of sessions that the server saves."""

MAX_STATE_NAME_LENGTH = 64
"""Maximum length of a saved state's name in characters."""

MAX_TENSOR_DIMENSIONS = 8
"""Most dimensions of a kept tensor."""

MAX_NAME_LENGTH = 128
"""Maximum length of a session's label and a tensor's name in characters."""

SHARED_MEMORY = "shared-memory"
"""Feature name for shared memory."""

AFFINITY = "gradwire-affinity"
"""Metadata by which a proxy can send related calls to the same server: the id of a job,
or what all calls of a session have in common."""

PROOF_FILE = "gradwire-proof"
"""Name of the file that proves that a client shares the server's host."""

SHARED_ALIGNMENT = 64
"""Alignment of offsets in shared memory in bytes: a cache line."""
