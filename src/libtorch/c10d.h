// libtorch's own collective engines, through what they have in common: c10d::Backend.
#pragma once
#include <cstdint>
#include <memory>
#include "list.h"
#include "rust/cxx.h"

namespace tchd {
class StoreHandle;
struct NcclPlan;
struct WorkEnd;
struct WorkParts;
struct BackendParts;

/// One operation under way.
class C10dWork {
 public:
  explicit C10dWork(std::unique_ptr<WorkParts> parts);
  ~C10dWork();
  /// Blocks until the operation has ended; throws what it failed with. A timeout breaks Gloo's connections. False where
  /// `abort` ended it.
  bool wait(std::int64_t timeout_ms) const;
  /// Ends the waiting for one of Gloo's messages.
  void abort() const;
  /// What this thread's current stream does from now on comes after it (NCCL). Does not block.
  void order() const;
  bool completed() const;
  /// Throws what a completed operation failed with.
  void check() const;
  std::int32_t source() const;
  /// Has the end told to Rust, from a thread of the engine; false where the engine cannot.
  bool tell(rust::Box<WorkEnd> end) const;

 private:
  std::unique_ptr<WorkParts> parts_;
};

/// The engine of one group on this rank. Tensors are flat and contiguous.
class C10dBackend {
 public:
  explicit C10dBackend(std::unique_ptr<BackendParts> parts);
  ~C10dBackend();
  std::unique_ptr<C10dWork>
  all_reduce(const at::Tensor& tensor, std::uint8_t op, double factor, std::int64_t timeout_ms) const;
  std::unique_ptr<C10dWork> reduce(
      const at::Tensor& tensor,
      std::uint8_t op,
      double factor,
      std::int32_t root,
      std::int64_t timeout_ms) const;
  std::unique_ptr<C10dWork> broadcast(const at::Tensor& tensor, std::int32_t root, std::int64_t timeout_ms)
      const;
  std::unique_ptr<C10dWork>
  all_gather(const Tensors& outputs, const at::Tensor& input, std::int64_t timeout_ms) const;
  std::unique_ptr<C10dWork> all_gather_flat(
      const at::Tensor& output,
      const at::Tensor& input,
      std::int64_t timeout_ms) const;
  std::unique_ptr<C10dWork> gather(
      const Tensors& outputs,
      const at::Tensor& input,
      std::int32_t root,
      std::int64_t timeout_ms) const;
  std::unique_ptr<C10dWork> scatter(
      const at::Tensor& output,
      const Tensors& inputs,
      std::int32_t root,
      std::int64_t timeout_ms) const;
  std::unique_ptr<C10dWork> reduce_scatter(
      const at::Tensor& output,
      const at::Tensor& input,
      std::uint8_t op,
      double factor,
      std::int64_t timeout_ms) const;
  std::unique_ptr<C10dWork> all_to_all(
      const at::Tensor& output,
      const at::Tensor& input,
      rust::Slice<const std::int64_t> output_splits,
      rust::Slice<const std::int64_t> input_splits,
      std::int64_t timeout_ms) const;
  std::unique_ptr<C10dWork> barrier(std::int32_t cuda, std::int64_t timeout_ms) const;
  std::unique_ptr<C10dWork> send(const at::Tensor& tensor, std::int32_t dst, std::int32_t tag) const;
  std::unique_ptr<C10dWork> recv(const at::Tensor& tensor, std::int32_t src, std::int32_t tag) const;
  std::unique_ptr<C10dWork> recv_any(const at::Tensor& tensor, std::int32_t tag) const;
  void start_group() const;
  std::unique_ptr<C10dWork> end_group() const;
  void abort() const;
  void shutdown() const;
  const BackendParts& parts() const {
    return *parts_;
  }

 private:
  std::unique_ptr<BackendParts> parts_;
};

std::unique_ptr<C10dBackend> new_gloo(
    const StoreHandle& store,
    std::int32_t rank,
    std::int32_t size,
    rust::Slice<const std::uint64_t> ranks,
    rust::Str name,
    std::int64_t timeout_ms);
/// Why the NCCL engine cannot be made here; empty where it can.
rust::String why_no_nccl();
std::unique_ptr<C10dBackend> new_nccl(
    const StoreHandle& store,
    std::int32_t rank,
    rust::Slice<const std::uint64_t> ranks,
    rust::Str name,
    const NcclPlan& plan);
/// The engine of some ranks of an NCCL group, whose communicator is split off the group's. Every rank of the group calls
/// it; null on those that are not among them.
std::unique_ptr<C10dBackend> split_nccl(
    const C10dBackend& parent,
    const StoreHandle& store,
    rust::Slice<const std::int32_t> members,
    rust::Slice<const std::uint64_t> ranks,
    rust::Str name,
    const NcclPlan& plan);
} // namespace tchd
