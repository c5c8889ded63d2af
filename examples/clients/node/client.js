// A client in Node: a small job with Compute, a larger one with ComputeStream, and what
// a refusal says. docs/contract.md explains the order of the messages.
//
//   npm install
//   node client.js localhost:50051

import { once } from "node:events";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import * as grpc from "@grpc/grpc-js";
import * as protoLoader from "@grpc/proto-loader";

const here = dirname(fileURLToPath(import.meta.url));
const LOADER_OPTIONS = {
  includeDirs: [join(here, "../../../protos"), join(here, "..")],
  keepCase: true, // block_rows, as the contract spells it, not blockRows
  longs: Number, // int64 as numbers, which are exact to 2**53, not as objects
  enums: String, // "MATRIX_Y", not 4
  defaults: true, // an index of 0 is not sent, and would be undefined
  oneofs: true, // response.message names the member that is set
};

function load(file) {
  return grpc.loadPackageDefinition(protoLoader.loadSync(file, LOADER_OPTIONS));
}

const { GradientService } = load("gradwire/v1/gradient_service.proto").gradwire.v1;
const errorDetails = load("error_details.proto").examples;

const CHANNEL_OPTIONS = {
  // Node's default window is 64 KiB for each stream: at 20 ms of round trip that is
  // 3 MB a second, whatever the link.
  "grpc-node.flow_control_window": 8 << 20,
};

// A message of about 1 MiB is the fastest.
const CHUNK_ELEMENTS = 1 << 18;

/** A row-major matrix of float32 elements, in the machine's byte order. */
class Matrix {
  constructor(rows, columns) {
    this.rows = rows;
    this.columns = columns;
    this.elements = new Float32Array(rows * columns);
  }

  /** The bytes of elements first to last - 1, without a copy. Little-endian machines only. */
  bytes(first = 0, last = this.elements.length) {
    return Buffer.from(this.elements.buffer, 4 * first, 4 * (last - first));
  }

  /** Stores elements that begin at an index. */
  set(index, data) {
    data.copy(this.bytes(index, index + data.length / 4));
  }
}

/** A float32 job with all operands and results in its messages. */
function header(m, n, k, options = {}) {
  const job = { m, n, k, dtype: "DTYPE_FLOAT32", ...options };
  for (const name of ["x", "w", "dy", "y", "dx", "dw"]) job[name] = { inline: {} };
  return job;
}

function newResults({ x, w }) {
  return {
    y: new Matrix(x.rows, w.columns),
    dx: new Matrix(x.rows, x.columns),
    dw: new Matrix(w.rows, w.columns),
  };
}

const deadline = () => ({ deadline: Date.now() + 60_000 });

/** One message each way. Operands, and results, have at most 4 MiB - 64 KiB. */
function compute(client, operands) {
  const { x, w, dy } = operands;
  const job = header(x.rows, x.columns, w.columns);
  const request = { job, x: x.bytes(), w: w.bytes(), dy: dy.bytes() };
  return new Promise((resolve, reject) => {
    client.Compute(request, deadline(), (error, response) => {
      if (error) return reject(error);
      const results = newResults(operands);
      for (const name of ["y", "dx", "dw"]) results[name].set(0, response[name]);
      resolve(results);
    });
  });
}

/** A job of any size. It sends while results arrive, and waits where the server does. */
async function computeStream(client, operands, blockRows) {
  const { x, w } = operands;
  const results = newResults(operands);
  const matrices = { MATRIX_Y: results.y, MATRIX_DX: results.dx, MATRIX_DW: results.dw };
  const call = client.ComputeStream(deadline());
  let sending, receipt;
  const ended = new Promise((resolve, reject) => {
    call.on("data", (response) => {
      if (response.message === "accepted") {
        sending = sendOperands(call, operands, response.accepted.block_rows);
        sending.catch(reject);
      } else if (response.message === "chunk") {
        matrices[response.chunk.matrix].set(response.chunk.index, response.chunk.data);
      } else if (response.message === "receipt") {
        receipt = response.receipt;
      }
    });
    call.on("error", reject);
    call.on("end", resolve);
  });
  const options = { block_rows: blockRows, required_features: ["block-rows"] };
  call.write({ job: header(x.rows, x.columns, w.columns, options) });
  await ended;
  await sending;
  return { results, receipt };
}

/** W, then X and dY row block by row block, then End. */
async function sendOperands(call, { x, w, dy }, blockRows) {
  await sendRows(call, "MATRIX_W", w, 0, w.rows);
  for (let first = 0; first < x.rows; first += blockRows) {
    const last = Math.min(first + blockRows, x.rows);
    await sendRows(call, "MATRIX_X", x, first, last);
    await sendRows(call, "MATRIX_DY", dy, first, last);
  }
  call.write({ end: { m: x.rows } });
  call.end();
}

async function sendRows(call, matrix, of, first, last) {
  const end = last * of.columns;
  for (let index = first * of.columns; index < end; index += CHUNK_ELEMENTS) {
    const data = of.bytes(index, Math.min(index + CHUNK_ELEMENTS, end));
    // Without the wait, Node holds all operands in its memory. "close" ends it if the
    // call fails.
    if (!call.write({ chunk: { matrix, index, data } }))
      await Promise.race([once(call, "drain"), once(call, "close")]);
  }
}

/** The reason in an error of a gradwire server; undefined: it has none. */
function reason(error) {
  const [trailer] = error.metadata.get("grpc-status-details-bin");
  if (!trailer) return undefined;
  const { Status, ErrorInfo } = errorDetails;
  for (const detail of Status.deserialize(trailer).details) {
    if (!detail.type_url.endsWith("/google.rpc.ErrorInfo")) continue;
    const info = ErrorInfo.deserialize(detail.value);
    if (info.domain === "gradwire") return info.reason;
  }
}

/** Numbers of which every sum below is exact. */
function wholeNumbers(rows, columns, seed) {
  const result = new Matrix(rows, columns);
  for (let i = 0; i < rows * columns; i++)
    result.elements[i] = ((i * 7 + Math.floor(i / columns) * 3 + seed) % 5) - 2;
  return result;
}

function operandsOf(m, n, k) {
  return {
    x: wholeNumbers(m, n, 1),
    w: wholeNumbers(n, k, 2),
    dy: wholeNumbers(m, k, 3),
  };
}

/** Compares all results with products computed here. */
function check({ x, w, dy }, { y, dx, dw }, what) {
  const [m, n, k] = [x.rows, x.columns, w.columns];
  const expected = newResults({ x, w });
  for (let i = 0; i < m; i++)
    for (let l = 0; l < n; l++)
      for (let j = 0; j < k; j++) {
        const xi = x.elements[i * n + l];
        const wi = w.elements[l * k + j];
        const dyi = dy.elements[i * k + j];
        expected.y.elements[i * k + j] += xi * wi;
        expected.dx.elements[i * n + l] += dyi * wi;
        expected.dw.elements[l * k + j] += xi * dyi;
      }
  for (const [name, result] of Object.entries({ y, dx, dw }))
    if (!result.elements.every((each, i) => each === expected[name].elements[i]))
      throw new Error(`wrong results: ${what}: ${name}`);
  console.log("right results:", what);
}

if (process.argv.length !== 3) {
  console.error("usage: node client.js HOST:PORT");
  process.exit(2);
}
const client = new GradientService(
  process.argv[2],
  grpc.credentials.createInsecure(),
  CHANNEL_OPTIONS,
);

const small = operandsOf(300, 200, 100);
check(small, await compute(client, small), "Compute, 300 x 200 x 100");

const large = operandsOf(8192, 256, 128);
const started = performance.now();
const { results, receipt } = await computeStream(client, large, 1024);
const took = Math.round(performance.now() - started);
check(
  large,
  results,
  `ComputeStream, 8192 x 256 x 128 in ${receipt.blocks} row blocks, ${took}ms`,
);

try {
  await new Promise((resolve, reject) => {
    const answered = (error) => (error ? reject(error) : resolve());
    client.Compute({ job: header(1, -1, 1) }, deadline(), answered);
  });
  throw new Error("a job of -1 columns should be refused");
} catch (error) {
  if (!error.metadata || !reason(error)) throw error;
  console.log("a job of -1 columns is refused:", reason(error));
}
client.close();
