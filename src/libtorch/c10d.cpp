#include "tch-distributed/src/libtorch/c10d.rs.h"

#include <c10/core/DeviceGuard.h>
#include <torch/version.h>
#include "c10d/parts.h"

namespace tchd {
namespace {
using std::chrono::milliseconds;
using TensorList = std::vector<at::Tensor>;

c10d::ReduceOp premul_sum(double factor) {
#if TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13
  return c10d::makeNCCLPreMulSum(factor);
#else
  return c10d::makePreMulSum(factor);
#endif
}

c10d::ReduceOp reduce_op(std::uint8_t op, double factor) {
  auto type = static_cast<c10d::ReduceOp::RedOpType>(op);
  return type == c10d::ReduceOp::PREMUL_SUM ? premul_sum(factor) : c10d::ReduceOp(type);
}

std::unique_ptr<C10dWork> pending(c10::intrusive_ptr<c10d::Work> work) {
  TORCH_CHECK(work, "the engine gave no work object");
  auto parts = std::make_unique<WorkParts>();
  parts->work = std::move(work);
  return std::make_unique<C10dWork>(std::move(parts));
}
} // namespace

C10dWork::C10dWork(std::unique_ptr<WorkParts> parts) : parts_(std::move(parts)) {}
C10dWork::~C10dWork() = default;

bool C10dWork::wait(std::int64_t timeout_ms) const {
  return parts_->work->wait(milliseconds(timeout_ms));
}
void C10dWork::abort() const {
  parts_->work->abort();
}
void C10dWork::order() const {
  parts_->work->synchronize();
}
bool C10dWork::completed() const {
  return parts_->work->isCompleted();
}
void C10dWork::check() const {
  if (auto exception = parts_->work->exception()) {
    std::rethrow_exception(exception);
  }
}
std::int32_t C10dWork::source() const {
  return parts_->work->sourceRank();
}
bool C10dWork::tell(rust::Box<WorkEnd> end) const {
  c10::intrusive_ptr<c10::ivalue::Future> future;
  try {
    future = parts_->work->getFuture();
  } catch (const c10::Error&) {
  }
  if (!future) {
    return false;
  }
  // A std::function must be copyable.
  auto shared = std::make_shared<rust::Box<WorkEnd>>(std::move(end));
  future->addCallback([shared](c10::ivalue::Future& future) {
    // The empty text is what says that it ended well.
    std::string error;
    if (future.hasError()) {
      error = future.tryRetrieveErrorMessage();
      if (error.empty()) {
        error = "an error without a message";
      }
    }
    work_ended(**shared, error);
  });
  return true;
}

C10dBackend::C10dBackend(std::unique_ptr<BackendParts> parts) : parts_(std::move(parts)) {}
C10dBackend::~C10dBackend() = default;

std::unique_ptr<C10dWork> C10dBackend::all_reduce(
    const at::Tensor& tensor,
    std::uint8_t op,
    double factor,
    std::int64_t timeout_ms) const {
  c10d::AllreduceOptions options;
  options.reduceOp = reduce_op(op, factor);
  options.timeout = milliseconds(timeout_ms);
  TensorList tensors{tensor};
  return pending(parts_->backend->allreduce(tensors, options));
}

std::unique_ptr<C10dWork> C10dBackend::reduce(
    const at::Tensor& tensor,
    std::uint8_t op,
    double factor,
    std::int32_t root,
    std::int64_t timeout_ms) const {
  c10d::ReduceOptions options;
  options.reduceOp = reduce_op(op, factor);
  options.rootRank = root;
  options.timeout = milliseconds(timeout_ms);
  TensorList tensors{tensor};
  return pending(parts_->backend->reduce(tensors, options));
}

std::unique_ptr<C10dWork>
C10dBackend::broadcast(const at::Tensor& tensor, std::int32_t root, std::int64_t timeout_ms) const {
  c10d::BroadcastOptions options;
  options.rootRank = root;
  options.timeout = milliseconds(timeout_ms);
  TensorList tensors{tensor};
  return pending(parts_->backend->broadcast(tensors, options));
}

std::unique_ptr<C10dWork>
C10dBackend::all_gather(const Tensors& outputs, const at::Tensor& input, std::int64_t timeout_ms) const {
  c10d::AllgatherOptions options;
  options.timeout = milliseconds(timeout_ms);
  std::vector<TensorList> out{outputs.list()};
  TensorList in{input};
  return pending(parts_->backend->allgather(out, in, options));
}

std::unique_ptr<C10dWork> C10dBackend::all_gather_flat(
    const at::Tensor& output,
    const at::Tensor& input,
    std::int64_t timeout_ms) const {
  c10d::AllgatherOptions options;
  options.timeout = milliseconds(timeout_ms);
  at::Tensor out = output, in = input;
  return pending(parts_->backend->_allgather_base(out, in, options));
}

std::unique_ptr<C10dWork> C10dBackend::gather(
    const Tensors& outputs,
    const at::Tensor& input,
    std::int32_t root,
    std::int64_t timeout_ms) const {
  c10d::GatherOptions options;
  options.rootRank = root;
  options.timeout = milliseconds(timeout_ms);
  std::vector<TensorList> out;
  if (outputs.size() > 0) {
    out.push_back(outputs.list());
  }
  TensorList in{input};
  return pending(parts_->backend->gather(out, in, options));
}

std::unique_ptr<C10dWork> C10dBackend::scatter(
    const at::Tensor& output,
    const Tensors& inputs,
    std::int32_t root,
    std::int64_t timeout_ms) const {
  c10d::ScatterOptions options;
  options.rootRank = root;
  options.timeout = milliseconds(timeout_ms);
  TensorList out{output};
  std::vector<TensorList> in;
  if (inputs.size() > 0) {
    in.push_back(inputs.list());
  }
  return pending(parts_->backend->scatter(out, in, options));
}

std::unique_ptr<C10dWork> C10dBackend::reduce_scatter(
    const at::Tensor& output,
    const at::Tensor& input,
    std::uint8_t op,
    double factor,
    std::int64_t timeout_ms) const {
  c10d::ReduceScatterOptions options;
  options.reduceOp = reduce_op(op, factor);
  options.timeout = milliseconds(timeout_ms);
  at::Tensor out = output, in = input;
  return pending(parts_->backend->_reduce_scatter_base(out, in, options));
}

std::unique_ptr<C10dWork> C10dBackend::all_to_all(
    const at::Tensor& output,
    const at::Tensor& input,
    rust::Slice<const std::int64_t> output_splits,
    rust::Slice<const std::int64_t> input_splits,
    std::int64_t timeout_ms) const {
  c10d::AllToAllOptions options;
  options.timeout = milliseconds(timeout_ms);
  at::Tensor out = output, in = input;
  std::vector<std::int64_t> outs(output_splits.begin(), output_splits.end());
  std::vector<std::int64_t> ins(input_splits.begin(), input_splits.end());
  return pending(parts_->backend->alltoall_base(out, in, outs, ins, options));
}

std::unique_ptr<C10dWork> C10dBackend::barrier(std::int32_t cuda, std::int64_t timeout_ms) const {
  c10d::BarrierOptions options;
  options.timeout = milliseconds(timeout_ms);
  if (cuda >= 0) {
    options.device_ids = {cuda};
    options.device = at::Device(c10::DeviceType::CUDA, static_cast<c10::DeviceIndex>(cuda));
  }
  return pending(parts_->backend->barrier(options));
}

std::unique_ptr<C10dWork>
C10dBackend::send(const at::Tensor& tensor, std::int32_t dst, std::int32_t tag) const {
  TensorList tensors{tensor};
  auto work = parts_->backend->send(tensors, dst, tag);
  return parts_->grouping ? nullptr : pending(std::move(work));
}
std::unique_ptr<C10dWork>
C10dBackend::recv(const at::Tensor& tensor, std::int32_t src, std::int32_t tag) const {
  TensorList tensors{tensor};
  auto work = parts_->backend->recv(tensors, src, tag);
  return parts_->grouping ? nullptr : pending(std::move(work));
}
std::unique_ptr<C10dWork> C10dBackend::recv_any(const at::Tensor& tensor, std::int32_t tag) const {
  TensorList tensors{tensor};
  return pending(parts_->backend->recvAnysource(tensors, tag));
}
void C10dBackend::start_group() const {
  parts_->backend->startCoalescing();
  parts_->grouping = true;
}
std::unique_ptr<C10dWork> C10dBackend::end_group() const {
  parts_->grouping = false;
  // It looks at the thread's current device, which may be another.
  c10::OptionalDeviceGuard guard(parts_->device);
  return pending(parts_->backend->endCoalescing());
}
void C10dBackend::abort() const {
  parts_->backend->abort();
}
void C10dBackend::shutdown() const {
  parts_->backend->shutdown();
}
} // namespace tchd
