// Makes libtorch's NCCL engine as PyTorch makes it, so that Python ranks can be in the group. Compiled with the
// feature `nccl` only.
#include "tch-distributed/src/libtorch/c10d.rs.h"

#include <array>
#include <cstddef>
#include <new>
#include <string>

#define USE_C10D_NCCL
#include <ATen/Context.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAFunctions.h>
#include <c10/util/env.h>
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#include "../store.h"
#include "../store_parts.h"
#include "parts.h"

namespace tchd {
namespace {
constexpr const char* ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING";

// libtorch's own threads end the process when an operation fails or hangs, unless told otherwise before the
// engine is made. Our caller watches and aborts instead. What the user has set stands.
void keep_the_process_alive() {
  constexpr std::array<const char*, 5> off{
      ERROR_HANDLING,
      "TORCH_NCCL_ENABLE_MONITORING",
      "TORCH_NCCL_DUMP_ON_TIMEOUT",
      "TORCH_NCCL_PROPAGATE_ERROR",
      "TORCH_NCCL_RETHROW_CUDA_ERRORS"};
  for (const char* name : off) {
    c10::utils::set_env(name, "0", /*overwrite=*/false);
  }
  // Its watchdog sleeps four times this long after a failure, a minute as a rule, for the sake of dumps.
  if (c10::utils::get_env("TORCH_NCCL_DUMP_ON_TIMEOUT") == "0") {
    c10::utils::set_env("TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC", "0", /*overwrite=*/false);
  }
  // torchrun gives every worker 1 here, which nobody asked for.
  if (c10::utils::has_env("TORCHELASTIC_RUN_ID") && c10::utils::get_env(ERROR_HANDLING) == "1") {
    c10::utils::set_env(ERROR_HANDLING, "0");
  }
}

c10::intrusive_ptr<c10d::ProcessGroupNCCL::Options> nccl_options(
    rust::Slice<const std::uint64_t> ranks,
    rust::Str name,
    const NcclPlan& plan) {
  auto options = c10d::ProcessGroupNCCL::Options::create(plan.high_priority);
  options->timeout = std::chrono::milliseconds(plan.timeout_ms);
  options->group_name = std::string(name);
  options->global_ranks_in_group.assign(ranks.begin(), ranks.end());
  return options;
}
std::string version_text(unsigned int code) {
  return c10::str(code / 10000, ".", code / 100 % 100, ".", code % 100);
}

// libtorch's options hold a structure of NCCL's that grows with its versions, and are made here and read there: with
// headers of another version than libtorch's own, each would see the other's members elsewhere. Empty where they fit.
std::string headers_that_do_not_fit() {
  using Options = c10d::ProcessGroupNCCL::Options;
  // libtorch's constructor writes as much as libtorch believes it to be, and is the only one who knows. What it made is
  // not destroyed: that would read it as we believe it to be.
  struct Room {
    alignas(std::max_align_t) std::array<std::byte, sizeof(Options) + 4096> bytes;
  };
  static const Options* const theirs = new ((new Room)->bytes.data()) Options();
  constexpr ncclConfig_t ours = NCCL_CONFIG_INITIALIZER;
  if (theirs->config.size == ours.size) {
    return "";
  }
  return c10::str(
      "this program was compiled with the headers of NCCL ", version_text(ours.version), ", and its libtorch with those of ",
      version_text(theirs->config.version), ", whose options differ: build with NCCL_HOME naming the latter");
}
} // namespace

rust::String why_no_nccl() {
  if (!at::Context::hasCUDART()) {
    return "this libtorch has no CUDA part";
  }
  if (static const std::string unfit = headers_that_do_not_fit(); !unfit.empty()) {
    return unfit;
  }
  if (c10::cuda::device_count() == 0) {
    return "libtorch finds no CUDA device on this machine";
  }
  return "";
}

std::unique_ptr<C10dBackend> new_nccl(
    const StoreHandle& store,
    std::int32_t rank,
    rust::Slice<const std::uint64_t> ranks,
    rust::Str name,
    const NcclPlan& plan) {
  using c10d::ProcessGroupNCCL;
  keep_the_process_alive();
  // Nothing of this may be allocated on another device.
  const at::Device bound(at::kCUDA, static_cast<c10::DeviceIndex>(plan.device));
  c10::DeviceGuard guard(bound);
  auto options = nccl_options(ranks, name, plan);
  auto parts = std::make_unique<BackendParts>();
  parts->backend = c10::make_intrusive<ProcessGroupNCCL>(
      store.parts().store, rank, static_cast<int>(ranks.size()), options);
  parts->backend->setSequenceNumberForGroup();
  parts->device = bound;
  if (plan.eager) {
    parts->backend->setBoundDeviceId(bound);
    parts->backend->eagerConnectSingleDevice(bound);
  }
  return std::make_unique<C10dBackend>(std::move(parts));
}

std::unique_ptr<C10dBackend> split_nccl(
    const C10dBackend& parent,
    const StoreHandle& store,
    rust::Slice<const std::int32_t> members,
    rust::Slice<const std::uint64_t> ranks,
    rust::Str name,
    const NcclPlan& plan) {
  const at::Device bound(at::kCUDA, static_cast<c10::DeviceIndex>(plan.device));
  c10::DeviceGuard guard(bound);
  std::vector<int> in_parent(members.begin(), members.end());
  auto options = nccl_options(ranks, name, plan);
  auto child = parent.parts().backend->split(store.parts().store, in_parent, options);
  if (!child) {
    return nullptr;
  }
  auto parts = std::make_unique<BackendParts>();
  // It is connected: once more would be a second split, which the other ranks take no part in.
  parts->backend = std::move(child);
  parts->device = bound;
  parts->backend->setBoundDeviceId(bound);
  parts->backend->setSequenceNumberForGroup();
  return std::make_unique<C10dBackend>(std::move(parts));
}
} // namespace tchd
