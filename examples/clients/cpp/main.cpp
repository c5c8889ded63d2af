// A client in C++: a small job with Compute, a larger one with ComputeStream, and what
// a refusal says. docs/contract.md explains the order of the messages.
//
//   client localhost:50051
//
// The stub is generated from protos/, see scripts/check-clients.

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <bit>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <future>
#include <iostream>
#include <map>
#include <string>
#include <vector>

#include "error_details.pb.h"
#include "gradwire/v1/gradient_service.grpc.pb.h"

namespace gw = gradwire::v1;
using std::int64_t;

static_assert(std::endian::native == std::endian::little, "elements are little-endian");

// A message of about 1 MiB is the fastest.
constexpr int64_t kChunkElements = 1 << 18;

// Row-major and contiguous, as in messages.
struct Matrix {
  int64_t rows, columns;
  std::vector<float> elements = std::vector<float>(rows * columns);

  // The bytes of rows first to last - 1.
  std::string bytes(int64_t first, int64_t last) const {
    auto *begin = reinterpret_cast<const char *>(elements.data() + first * columns);
    return {begin, begin + (last - first) * columns * sizeof(float)};
  }
  std::string bytes() const { return bytes(0, rows); }

  // Stores elements that begin at an index. False: they are outside the matrix.
  bool set(int64_t index, const std::string &data) {
    int64_t count = data.size() / sizeof(float);
    if (index < 0 || index > rows * columns - count) return false;
    std::memcpy(elements.data() + index, data.data(), count * sizeof(float));
    return true;
  }
};

struct Operands {
  Matrix x, w, dy;
};

struct Results {
  Matrix y, dx, dw;

  explicit Results(const Operands &of)
      : y{of.x.rows, of.w.columns}, dx{of.x.rows, of.x.columns}, dw{of.w.rows, of.w.columns} {}
};

// A float32 job with all operands and results in its messages.
gw::Job header(int64_t m, int64_t n, int64_t k) {
  gw::Job job;
  job.set_m(m);
  job.set_n(n);
  job.set_k(k);
  job.set_dtype(gw::DTYPE_FLOAT32);
  for (auto *operand : {job.mutable_x(), job.mutable_w(), job.mutable_dy()})
    operand->mutable_inline_();
  for (auto *result : {job.mutable_y(), job.mutable_dx(), job.mutable_dw()})
    result->mutable_inline_();
  return job;
}

gw::Job header(const Operands &of) { return header(of.x.rows, of.x.columns, of.w.columns); }

void set_deadline(grpc::ClientContext &context) {
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::minutes(1));
}

// One message each way. Operands, and results, have at most 4 MiB - 64 KiB.
grpc::Status compute(gw::GradientService::Stub &stub, const Operands &of, Results &results) {
  gw::ComputeRequest request;
  *request.mutable_job() = header(of);
  request.set_x(of.x.bytes());
  request.set_w(of.w.bytes());
  request.set_dy(of.dy.bytes());
  grpc::ClientContext context;
  set_deadline(context);
  gw::ComputeResponse response;
  auto status = stub.Compute(&context, request, &response);
  if (status.ok()) {
    results.y.set(0, response.y());
    results.dx.set(0, response.dx());
    results.dw.set(0, response.dw());
  }
  return status;
}

using Stream = grpc::ClientReaderWriter<gw::ComputeStreamRequest, gw::ComputeStreamResponse>;

// Sends rows first to last - 1. False: the call has ended, Finish has its status.
bool send_rows(Stream &stream, gw::Matrix name, const Matrix &of, int64_t first, int64_t last) {
  auto *elements = reinterpret_cast<const char *>(of.elements.data());
  int64_t end = last * of.columns;
  for (int64_t at = first * of.columns; at < end; at += kChunkElements) {
    gw::ComputeStreamRequest request;
    auto &chunk = *request.mutable_chunk();
    chunk.set_matrix(name);
    chunk.set_index(at);
    chunk.set_data(elements + at * sizeof(float),
                   std::min(kChunkElements, end - at) * sizeof(float));
    if (!stream.Write(request)) return false;
  }
  return true;
}

// Sends W, then X and dY row block by row block, then End.
void send_operands(Stream &stream, const Operands &of, int64_t block_rows) {
  if (!send_rows(stream, gw::MATRIX_W, of.w, 0, of.w.rows)) return;
  for (int64_t first = 0; first < of.x.rows; first += block_rows) {
    int64_t last = std::min(first + block_rows, of.x.rows);
    if (!send_rows(stream, gw::MATRIX_X, of.x, first, last)) return;
    if (!send_rows(stream, gw::MATRIX_DY, of.dy, first, last)) return;
  }
  gw::ComputeStreamRequest end;
  end.mutable_end()->set_m(of.x.rows);
  if (stream.Write(end)) stream.WritesDone();
}

// A job of any size. One thread sends while this one receives: a client that sends
// everything first is ended with CLIENT_IDLE.
grpc::Status compute_stream(gw::GradientService::Stub &stub, const Operands &of,
                            int64_t block_rows, Results &results, gw::Receipt &receipt) {
  grpc::ClientContext context;
  set_deadline(context);
  auto stream = stub.ComputeStream(&context);
  gw::ComputeStreamRequest first;
  *first.mutable_job() = header(of);
  first.mutable_job()->set_block_rows(block_rows);
  first.mutable_job()->add_required_features("block-rows");
  stream->Write(first);

  std::map<gw::Matrix, Matrix *> matrices{
      {gw::MATRIX_Y, &results.y}, {gw::MATRIX_DX, &results.dx}, {gw::MATRIX_DW, &results.dw}};
  std::future<void> sending;
  gw::ComputeStreamResponse response;
  while (stream->Read(&response)) {
    if (response.has_accepted()) {
      sending = std::async(std::launch::async, send_operands, std::ref(*stream),
                           std::cref(of), response.accepted().block_rows());
    } else if (response.has_chunk()) {
      auto found = matrices.find(response.chunk().matrix());
      if (found == matrices.end() ||
          !found->second->set(response.chunk().index(), response.chunk().data()))
        context.TryCancel();  // Not this contract. Finish says that it was cancelled.
    } else if (response.has_receipt()) {
      receipt = response.receipt();
    }
  }
  if (sending.valid()) sending.wait();  // Finish must not run beside Write.
  return stream->Finish();
}

// Numbers of which every sum below is exact.
Matrix whole_numbers(int64_t rows, int64_t columns, int seed) {
  Matrix result{rows, columns};
  for (int64_t i = 0; i < rows * columns; ++i)
    result.elements[i] = (i * 7 + i / columns * 3 + seed) % 5 - 2;
  return result;
}

Operands operands(int64_t m, int64_t n, int64_t k) {
  return {whole_numbers(m, n, 1), whole_numbers(n, k, 2), whole_numbers(m, k, 3)};
}

// Compares all results with products computed here.
bool right(const Operands &of, const Results &results) {
  auto [m, n, k] = std::tuple{of.x.rows, of.x.columns, of.w.columns};
  Results expected(of);
  for (int64_t i = 0; i < m; ++i)
    for (int64_t l = 0; l < n; ++l)
      for (int64_t j = 0; j < k; ++j) {
        float x = of.x.elements[i * n + l];
        float w = of.w.elements[l * k + j];
        float dy = of.dy.elements[i * k + j];
        expected.y.elements[i * k + j] += x * w;
        expected.dx.elements[i * n + l] += dy * w;
        expected.dw.elements[l * k + j] += x * dy;
      }
  return expected.y.elements == results.y.elements &&
         expected.dx.elements == results.dx.elements &&
         expected.dw.elements == results.dw.elements;
}

bool report(const grpc::Status &status, bool is_right, const std::string &what) {
  if (!status.ok())
    std::cerr << what << ": " << status.error_message() << '\n';
  else
    std::cout << (is_right ? "right" : "wrong") << " results: " << what << '\n';
  return status.ok() && is_right;
}

// The reason in a status of a gradwire server; empty: it has none.
std::string reason(const grpc::Status &status) {
  examples::Status details;
  if (!details.ParseFromString(status.error_details())) return "";
  for (const auto &detail : details.details()) {
    // Any of google.rpc.ErrorInfo: the type's name is what matters, not the class.
    if (!detail.type_url().ends_with("/google.rpc.ErrorInfo")) continue;
    examples::ErrorInfo info;
    if (info.ParseFromString(detail.value()) && info.domain() == "gradwire")
      return info.reason();
  }
  return "";
}

int main(int count, char **arguments) {
  if (count != 2) {
    std::cerr << "usage: " << arguments[0] << " HOST:PORT\n";
    return 2;
  }
  auto channel = grpc::CreateChannel(arguments[1], grpc::InsecureChannelCredentials());
  gw::GradientService::Stub stub(channel);

  auto small = operands(300, 200, 100);
  Results once(small);
  auto status = compute(stub, small, once);
  if (!report(status, right(small, once), "Compute, 300 x 200 x 100")) return 1;

  auto large = operands(8192, 256, 128);
  Results streamed(large);
  gw::Receipt receipt;
  auto started = std::chrono::steady_clock::now();
  status = compute_stream(stub, large, 1024, streamed, receipt);
  auto took = std::chrono::duration_cast<std::chrono::milliseconds>(
      std::chrono::steady_clock::now() - started);
  auto what = "ComputeStream, 8192 x 256 x 128 in " + std::to_string(receipt.blocks()) +
              " row blocks, " + std::to_string(took.count()) + "ms";
  if (!report(status, right(large, streamed), what)) return 1;

  gw::ComputeRequest request;
  *request.mutable_job() = header(1, -1, 1);
  gw::ComputeResponse response;
  grpc::ClientContext context;
  set_deadline(context);
  status = stub.Compute(&context, request, &response);
  if (reason(status).empty()) {
    std::cerr << "a job of -1 columns should be refused with details\n";
    return 1;
  }
  std::cout << "a job of -1 columns is refused: " << reason(status) << '\n';
}
