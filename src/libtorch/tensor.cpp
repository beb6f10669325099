#include "tch-distributed/src/libtorch/tensor.rs.h"

#include <ATen/core/Tensor.h>
#include <ATen/MemoryOverlap.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <torch/csrc/autograd/variable.h>

#include <memory>

namespace tchd {
MemOverlap overlap_at_a_glance(const at::Tensor& tensor) {
  switch (at::has_internal_overlap(tensor)) {
    case at::MemOverlap::No:
      return MemOverlap::No;
    case at::MemOverlap::Yes:
      return MemOverlap::Yes;
    default:
      return MemOverlap::TooHard;
  }
}
at::Tensor* empty_pinned_like(const at::Tensor& like) {
  auto options = like.options().device(at::kCPU).pinned_memory(true);
  return new at::Tensor(at::empty(like.sizes(), options));
}
std::int64_t storage_offset(const at::Tensor& tensor) noexcept {
  return tensor.storage_offset();
}
bool same(const at::Tensor& left, const at::Tensor& right) noexcept {
  return left.is_same(right);
}
at::Tensor* tensor_over(
    std::size_t data,
    rust::Slice<const std::int64_t> size,
    std::int8_t kind,
    rust::Box<Keeper> keeper) {
  // A deleter must be copyable; the last copy dies with the tensor's storage, or here on an exception.
  auto held = std::make_shared<rust::Box<Keeper>>(std::move(keeper));
  auto options = at::TensorOptions().dtype(static_cast<at::ScalarType>(kind)).device(at::kCPU);
  return new at::Tensor(at::from_blob(
      reinterpret_cast<void*>(data),
      at::IntArrayRef(size.data(), size.size()),
      [held](void*) mutable { held.reset(); },
      options));
}
bool shares_memory(const at::Tensor& tensor) {
  if (!tensor.has_storage()) {
    return false;
  }
  std::size_t own = 1;
  if (const auto* view = torch::autograd::impl::get_view_autograd_meta(tensor)) {
    // A view holds the tensor that it was taken from; it counts if anyone else holds that one too.
    const auto& base = view->has_bw_view() ? view->get_backward_view().base_ : view->get_forward_view().base_;
    const std::size_t held = view->has_bw_view() && view->has_fw_view() && !view->shared_view_info() ? 2 : 1;
    if (base.use_count() > held) {
      return true;
    }
    own += 1;
  }
  return tensor.storage().use_count() > own;
}
} // namespace tchd
